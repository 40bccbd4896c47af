/* Packing the kept elements of one row to its front: the inner loop of compaction. */
#ifndef LP_KERNELS_CPU_PACK_H
#define LP_KERNELS_CPU_PACK_H

#include "core/backend.h"

/* Which elements of a row stay, in the forms the variants read.  Elements beyond `size` count as dropped. */
typedef struct {
    size_t size, count;      /* of the row, before and after */
    const int64_t *position; /* (count) kept positions */
    size_t tail;             /* how many of them lie below size rounded down to a multiple of 8 */
    const uint8_t *bits;     /* bit i % 8 of bits[i / 8] says whether element i stays; 8 spare bytes follow */
    const uint8_t
        *lanes; /* for each 8 elements the kept ones' numbers 0..7 first, then zeros; 8 spare bytes follow */
} lp_selection;

/* Write the kept elements of the row at `source` to `target`, and return the first byte behind them.  target is either
 * at or below source (in place: every byte a call writes lies below what it has still to read), or elsewhere.  No byte at
 * or above `limit` is written, and what lies between the result and the limit may be overwritten; the result never
 * exceeds the limit. */
typedef unsigned char *(*lp_pack_row)(unsigned char *target, const unsigned char *source,
                                      const lp_selection *selection, const unsigned char *limit);

typedef struct {
    lp_pack_row row[4]; /* by log2 of the element's width: 1, 2, 4 and 8 bytes */

    /* memmove towards lower addresses (target <= source) or between separate memory. */
    void (*copy)(unsigned char *target, const unsigned char *source, size_t bytes);

    size_t run_bytes; /* mean length of a row's kept runs from which on copying them beats packing the row */
} lp_pack;

extern const lp_pack lp_pack_plain, lp_pack_avx2, lp_pack_vbmi2, lp_pack_neon;

lp_status lp_compact(const lp_pack *pack, void *data, size_t width, const size_t *shape, size_t ndim,
                     const lp_kept *kept, const lp_exec *exec, lp_error *err);
lp_status lp_compact_into(const lp_pack *pack, void *target, const void *source, size_t width,
                          const size_t *shape, size_t ndim, const lp_kept *kept, const lp_exec *exec,
                          lp_error *err);

#endif
