#include "kernels/cuda/plan.h"

enum {
    WORKSPACE_MAX = 32 << 20, /* what cuBLAS advises on Hopper */
    TILE_MIN = 1 << 18        /* elements below which a matrix product wastes the device */
};

static size_t at_most(size_t a, size_t b)
{
    return a < b ? a : b;
}

static size_t aligned(size_t bytes)
{
    return lp_ceil_div(bytes, LP_ALIGN) * LP_ALIGN;
}

/* Lay the parts of a plan with its rows, columns and group behind its workspace. False where sizes overflow. */
static bool lay_out(lp_linear_plan *p, size_t real)
{
    size_t tile, gradients, carry, row_parts, column_parts;

    if (!lp_mul_size(p->rows, p->columns, &tile) || !lp_mul_size(tile, real, &tile) ||
        !lp_mul_size(tile, p->group, &gradients) || !lp_mul_size(tile, p->carried ? 2 : 0, &carry) ||
        gradients > SIZE_MAX / 8 || carry > SIZE_MAX / 8)
        return false;
    row_parts = lp_ceil_div(p->columns, LP_REDUCE_COLUMNS) * p->rows * sizeof(double);
    column_parts = lp_ceil_div(p->rows, LP_REDUCE_ROWS) * p->columns * sizeof(double);
    p->row_parts = aligned(p->workspace);
    p->column_parts = p->row_parts + aligned(row_parts);
    p->carry = p->column_parts + aligned(column_parts);
    p->gradients = p->carry + aligned(carry);
    p->bytes = p->gradients + aligned(gradients);
    return true;
}

/* The largest tile for the plan's group of samples that fits; false where not even one element does. */
static bool fit_tile(lp_linear_plan *p, size_t out, size_t in, size_t real, size_t scratch)
{
    p->rows = out;
    p->columns = in;
    while (!lay_out(p, real) || p->bytes > scratch) {
        /* Whole rows as long as there are enough of them for a block, then narrower tiles. */
        if (p->rows > LP_REDUCE_ROWS)
            p->rows = at_most(p->rows - 1,
                              lp_ceil_div(lp_ceil_div(p->rows * 7, 8), LP_REDUCE_ROWS) * LP_REDUCE_ROWS);
        else if (p->columns > 64)
            p->columns = lp_ceil_div(p->columns / 2, 64) * 64;
        else if (p->rows > 1)
            p->rows /= 2;
        else if (p->columns > 1)
            p->columns /= 2;
        else
            return false;
    }
    return true;
}

bool lp_linear_plan_make(lp_linear_plan *plan, size_t out, size_t in, size_t samples, size_t real,
                         size_t scratch)
{
    size_t whole, least;

    if (!lp_mul_size(out, in, &whole))
        return false;
    least = at_most(whole, TILE_MIN);
    for (size_t group = samples;; group = lp_ceil_div(group, 2)) {
        *plan = (lp_linear_plan){.group = group, .carried = group < samples};
        plan->workspace = at_most(WORKSPACE_MAX, scratch / 2) / LP_ALIGN * LP_ALIGN;
        if (fit_tile(plan, out, in, real, scratch) && (plan->rows * plan->columns >= least || group == 1))
            return true;
        if (group == 1)
            return false;
    }
}

bool lp_fused_plan_make(lp_fused_plan *plan, size_t out, size_t in, size_t scratch)
{
    size_t tiles = lp_ceil_div(in, LP_FUSED_TILE), strips = lp_ceil_div(out, LP_FUSED_TILE), each;

    /* Bytes of one row of tiles. */
    if (in > SIZE_MAX / 32 || tiles > SIZE_MAX / (LP_FUSED_TILE * sizeof(double) * 4))
        return false;
    each = (tiles * LP_FUSED_TILE + in) * sizeof(double);
    if (scratch < 2 * LP_ALIGN || (scratch - 2 * LP_ALIGN) / each < 1)
        return false;
    strips = at_most(strips, (scratch - 2 * LP_ALIGN) / each);
    plan->rows = strips * LP_FUSED_TILE;
    plan->row_parts = 0;
    plan->column_parts = aligned(tiles * plan->rows * sizeof(double));
    plan->bytes = plan->column_parts + aligned(strips * in * sizeof(double));
    return true;
}

bool lp_fused_fits(const lp_linear *linear)
{
    uintptr_t address = (uintptr_t)linear->x | (uintptr_t)linear->dy;

    return (linear->dtype == LP_BF16 || linear->dtype == LP_F16) && address % 16 == 0 &&
           linear->x_stride % 8 == 0 && linear->dy_stride % 8 == 0;
}
