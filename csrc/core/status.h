/* Status codes, error messages, allocation and overflow-checked sizes, shared by every room of the C sources.
 *
 * Every call that can fail returns an lp_status and fills the caller's lp_error with one sentence for a human reader
 * (what was wrong, where, what to do).  An lp_error pointer may be NULL where the caller does not want the sentence.
 */
#ifndef LP_CORE_STATUS_H
#define LP_CORE_STATUS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
    LP_OK = 0,
    LP_ERR_NOMEM,       /* the allocator returned NULL */
    LP_ERR_ARGUMENT,    /* an argument outside its documented domain */
    LP_ERR_OVERFLOW,    /* a size does not fit its integer type */
    LP_ERR_UNSUPPORTED, /* valid input this build or machine cannot handle */
    LP_ERR_TRACE,       /* a tape that does not describe a forward pass */
    LP_ERR_PLAN,        /* a removal that cannot be carried out */
    LP_ERR_TENSOR,      /* a tensor of the wrong type, device, layout or mutability */
    LP_ERR_DEVICE,      /* an accelerator that is missing, unsupported, busy or failing */
    LP_ERR_INTERNAL     /* an invariant of ours broke: a bug to report */
} lp_status;

typedef struct {
    lp_status code;
    char message[512]; /* NUL-terminated, UTF-8 */
} lp_error;

/* Compilers that can compare format, the f-th parameter, with the arguments from the a-th on, do. */
#if defined(__MINGW32__)
#define LP_PRINTF(f, a) __attribute__((format(gnu_printf, f, a))) /* of the universal C runtime */
#elif defined(__GNUC__)
#define LP_PRINTF(f, a) __attribute__((format(printf, f, a)))
#else
#define LP_PRINTF(f, a)
#endif

/* Fill *err (may be NULL) and return code, so that a failing function can `return lp_error_set(...)`. */
LP_PRINTF(3, 4)
lp_status lp_error_set(lp_error *err, lp_status code, const char *format, ...);

/* The allocator every object of the core is made with.  resize(ctx, NULL, 0, n) allocates, resize(ctx, p, n, 0) frees
 * and returns NULL; a failed resize returns NULL and leaves p as it was.  Objects keep the allocator by value. */
typedef struct {
    void *(*resize)(void *ctx, void *block, size_t old_size, size_t new_size);
    void *ctx;
} lp_allocator;

/* malloc/realloc/free. */
lp_allocator lp_allocator_default(void);

/* *out = a * b or a + b; false when it does not fit. */
bool lp_mul_size(size_t a, size_t b, size_t *out);
bool lp_add_size(size_t a, size_t b, size_t *out);
/* The same of numbers that are not negative; false for those too. */
bool lp_mul_i64(int64_t a, int64_t b, int64_t *out);
bool lp_add_i64(int64_t a, int64_t b, int64_t *out);

/* Make room for `need` elements of `width` bytes in the array *block of capacity *capacity (in elements), at least
 * doubling it.  On failure the array is as it was. */
lp_status lp_grow(const lp_allocator *allocator, void **block, size_t *capacity, size_t need, size_t width,
                  lp_error *err);

/* Give back an array made by lp_grow; NULL is fine. */
void lp_release(const lp_allocator *allocator, void *block, size_t capacity, size_t width);

#endif
