#include "status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

lp_status lp_error_set(lp_error *err, lp_status code, const char *format, ...)
{
    if (err != NULL) {
        va_list args;
        err->code = code;
        va_start(args, format);
        (void)vsnprintf(err->message, sizeof err->message, format, args);
        va_end(args);
    }
    return code;
}

static void *default_resize(void *ctx, void *block, size_t old_size, size_t new_size)
{
    (void)ctx;
    (void)old_size;
    if (new_size == 0) {
        free(block);
        return NULL;
    }
    return realloc(block, new_size);
}

lp_allocator lp_allocator_default(void)
{
    return (lp_allocator){.resize = default_resize, .ctx = NULL};
}

bool lp_mul_size(size_t a, size_t b, size_t *out)
{
    if (a != 0 && b > SIZE_MAX / a)
        return false;
    *out = a * b;
    return true;
}

bool lp_add_size(size_t a, size_t b, size_t *out)
{
    if (b > SIZE_MAX - a)
        return false;
    *out = a + b;
    return true;
}

bool lp_mul_i64(int64_t a, int64_t b, int64_t *out)
{
    if (a < 0 || b < 0 || (a != 0 && b > INT64_MAX / a))
        return false;
    *out = a * b;
    return true;
}

bool lp_add_i64(int64_t a, int64_t b, int64_t *out)
{
    if (a < 0 || b < 0 || b > INT64_MAX - a)
        return false;
    *out = a + b;
    return true;
}

lp_status lp_grow(const lp_allocator *allocator, void **block, size_t *capacity, size_t need, size_t width,
                  lp_error *err)
{
    size_t target = *capacity, bytes, old_bytes;
    void *moved;

    if (need <= *capacity)
        return LP_OK;
    if (target < 8)
        target = 8;
    while (target < need)
        if (!lp_add_size(target, target, &target))
            return lp_error_set(err, LP_ERR_OVERFLOW, "an array of %zu elements does not fit in memory",
                                need);
    if (!lp_mul_size(target, width, &bytes))
        return lp_error_set(err, LP_ERR_OVERFLOW, "an array of %zu elements does not fit in memory", need);
    old_bytes = *capacity * width;
    moved = allocator->resize(allocator->ctx, *block, old_bytes, bytes);
    if (moved == NULL)
        return lp_error_set(err, LP_ERR_NOMEM, "out of memory: %zu bytes for the graph were refused", bytes);
    *block = moved;
    *capacity = target;
    return LP_OK;
}

void lp_release(const lp_allocator *allocator, void *block, size_t capacity, size_t width)
{
    if (block != NULL)
        (void)allocator->resize(allocator->ctx, block, capacity * width, 0);
}
