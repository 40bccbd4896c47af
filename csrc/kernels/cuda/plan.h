/* How linear_scores divides a weight and its scratch.  Plain C, no CUDA. */
#ifndef LP_KERNELS_CUDA_PLAN_H
#define LP_KERNELS_CUDA_PLAN_H

#include "core/backend.h"

enum {
    LP_REDUCE_ROWS = 32,      /* rows of a thread block of the reduction */
    LP_REDUCE_COLUMNS = 1024, /* and its columns */
    LP_FUSED_TILE = 128,      /* rows and columns of a thread block of the fused kernel */
    LP_FUSED_TOKENS = 32,     /* tokens of a pipeline stage */
    LP_FUSED_STAGES = 4,
    LP_ALIGN = 256 /* of every part of the scratch */
};

/* By matrix products into scratch: for each tile (rows x columns) of the weight, for each group of samples, one batched
 * product writes the group's gradients, and a reduction adds them up.  Offsets are bytes into the scratch. */
typedef struct {
    size_t rows, columns; /* of a tile; the last ones may be smaller */
    size_t group;         /* samples of a batch */
    bool carried;         /* several groups: sums of g and g^2 wait between them */
    size_t workspace;     /* bytes for cuBLAS, at offset 0 */
    size_t row_parts;     /* (column blocks of a tile, rows) float64 */
    size_t column_parts;  /* (row blocks of a tile, columns) float64 */
    size_t carry;         /* (2, rows, columns) reals, where carried */
    size_t gradients;     /* (group, rows, columns) reals */
    size_t bytes;         /* of the whole, <= the scratch */
} lp_linear_plan;

/* By the fused kernel: strips of rows, each in one launch. */
typedef struct {
    size_t rows;         /* of a strip, a multiple of LP_FUSED_TILE; the last one may have fewer */
    size_t row_parts;    /* (column tiles, rows) float64 */
    size_t column_parts; /* (row tiles of a strip, in) float64 */
    size_t bytes;
} lp_fused_plan;

static inline size_t lp_ceil_div(size_t a, size_t b)
{
    return a / b + (a % b != 0);
}

/* Scratch divided for a weight (out, in) of `samples` samples in reals of `real` bytes.  False: it is too small. */
bool lp_linear_plan_make(lp_linear_plan *plan, size_t out, size_t in, size_t samples, size_t real,
                         size_t scratch);

/* False: the scratch holds no strip. */
bool lp_fused_plan_make(lp_fused_plan *plan, size_t out, size_t in, size_t scratch);

/* Whether the fused kernel can take the operands: 16-bit values whose rows begin on 16 bytes. */
bool lp_fused_fits(const lp_linear *linear);

#endif
