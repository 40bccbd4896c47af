/* Which parts of a tensor may move at once when it is compacted in its own memory.  Plain C, no CUDA.
 *
 * Output word p comes from source word S(p) >= p, and S rises strictly.  Thread blocks run in no order, so one launch may
 * write words [a, b) only if none of them is still to be read: all sources from a on lie at S(a) or above, hence b <= S(a).
 * For whole rows of C columns cut to C' this is b C' <= a C: waves grow by C / C'.  Where S(a) - a is small (at the front, or
 * where little is removed) the wave goes through a stage instead: one launch copies its sources out, the next one copies
 * the stage in.  Both launches read only what is at S(a) or above, and the second one writes what the first has read. */
#ifndef LP_KERNELS_CUDA_WAVES_H
#define LP_KERNELS_CUDA_WAVES_H

#include "core/backend.h"

typedef struct {
    uint64_t count;          /* kept positions */
    uint64_t stride;         /* source words from one position to the next */
    const int64_t *position; /* (count); NULL: position i is i */
} lp_wave_dim;

/* A cut as words in, words out: dimensions that stay whole are merged with their neighbours, and a row that stays whole is
 * counted in the widest words that divide it and the address. */
typedef struct {
    lp_wave_dim dim[LP_MAX_DIMS + 1]; /* outermost first; the innermost has stride 1 */
    unsigned ndim;                    /* >= 1 */
    unsigned word;                    /* bytes: 1, 2, 4, 8 or 16 */
    uint64_t total;                   /* output words */
} lp_wave_layout;

typedef struct {
    uint64_t begin, end; /* output words */
    bool staged;
} lp_wave;

/* Fill *layout for a tensor of `shape` (ndim sizes >= 1, whose product of bytes fits size_t) cut to `kept` (valid positions);
 * `address` is that of the tensor, or the bitwise or of source's and target's. */
void lp_wave_layout_make(lp_wave_layout *layout, uintptr_t address, size_t width, const size_t *shape,
                         size_t ndim, const lp_kept *kept);

/* S(p) for p < total. */
uint64_t lp_wave_source(const lp_wave_layout *layout, uint64_t p);

/* The first output word that is not in its place already; total if all are. */
uint64_t lp_wave_start(const lp_wave_layout *layout);

/* The wave from output word `begin` (lp_wave_start or the end of the wave before) on, with a stage of `stage` words, at
 * least one.  False when everything is in place. */
bool lp_wave_next(const lp_wave_layout *layout, uint64_t begin, uint64_t stage, lp_wave *wave);

#endif
