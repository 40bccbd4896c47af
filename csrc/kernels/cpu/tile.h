/* What an instruction set offers linear_scores: one register tile of dW = dY^T X and the reduction of its result.
 *
 * Arithmetic is in `real` (float, or double for F64 tensors).  Packed operands: x [tokens][columns] and dy
 * [tiles][tokens][rows], zero beyond the edge.  A tile's state is three [rows][columns] arrays of reals, one after the
 * other: the unfinished sample's dW, the sum g of the finished samples' dW, and the sum s of their squares. */
#ifndef LP_KERNELS_CPU_TILE_H
#define LP_KERNELS_CPU_TILE_H

#include "core/backend.h"

enum {
    LP_TILE_SQUARE = 1,    /* keep s */
    LP_TILE_CARRY_IN = 2,  /* the first sample began in an earlier call */
    LP_TILE_CARRY_OUT = 4, /* the last sample ends in a later call */
};

typedef struct {
    size_t rows, columns; /* of the register tile: output and input features */
    size_t real;          /* sizeof the arithmetic type */

    /* Convert `tokens` rows of `columns` (<= the tile's) elements, `stride` elements apart. */
    void (*pack_x)(void *target, const void *source, lp_dtype dtype, size_t stride, size_t tokens,
                   size_t columns);

    /* The same for dy, split into ceil(columns / rows) tiles. */
    void (*pack_dy)(void *target, const void *source, lp_dtype dtype, size_t stride, size_t tokens,
                    size_t columns);

    /* `samples` samples of `tokens` tokens each pass through the tile.  With a carry flag samples is 1.  Meanwhile the
     * cache line at `ahead` and those every `ahead_step` bytes after it, one for each token, are fetched into L2: x of
     * the next panel, which would otherwise be waited for.  Any address will do; none is read. */
    void (*run)(void *state, const void *x, const void *dy, size_t tokens, size_t samples, unsigned flags,
                uintptr_t ahead, size_t ahead_step);

    /* Elementwise importance of the finished state against a (rows, columns) corner of the weight, where g and s are
     * means over `samples`; its sums are added to row (rows) and column (columns). */
    void (*reduce)(const void *state, const void *weight, lp_dtype dtype, size_t stride, size_t rows,
                   size_t columns, size_t samples, unsigned flags, double *row, double *column);
} lp_tile;

/* linear_scores over a pair of tiles: `single` for F32, BF16 and F16, `twice` for F64.  Checks its arguments. */
lp_status lp_linear_scores(const lp_tile *single, const lp_tile *twice, const lp_linear *linear, double *row,
                           double *col, const lp_exec *exec, lp_error *err);

/* Every build has the plain tiles (portable C); the others exist where their architecture does. */
extern const lp_tile lp_tile_plain, lp_tile_plain_f64;
extern const lp_tile lp_tile_avx2, lp_tile_avx2_f64;
extern const lp_tile lp_tile_avx512, lp_tile_avx512_f64;
extern const lp_tile lp_tile_neon, lp_tile_neon_f64;

#endif
