/* linear_scores by matrix products: gradients of a tile of the weight go to scratch, and one pass over them and the
 * weight adds the tile's rows and columns up, in float64 and a fixed order. */
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/internal.h"

extern "C" {
#include "kernels/cuda/plan.h"
}

enum { THREADS = 256, WARPS = THREADS / 32, EACH = LP_REDUCE_COLUMNS / THREADS };

namespace
{

/* One tile of the weight and its samples' gradients. */
struct tile_job {
    const void *weight;    /* its first element */
    size_t weight_stride;  /* elements */
    const void *gradients; /* (group, rows, columns) */
    void *mean, *square; /* (rows, columns): sums over earlier groups; NULL where the group is all samples */
    size_t rows, columns, group;
    bool first, last;     /* group */
    bool second;          /* order */
    double share;         /* 1 / samples; 1 for order 1, whose gradients are scaled already */
    double *row_parts;    /* (gridDim.x, rows) */
    double *column_parts; /* (gridDim.y, columns) */
};

/* EACH values side by side, of which `inside` are there and the others zeros; at once where they lie so that they can be. */
template <typename stored> struct alignas(EACH * sizeof(stored)) quad {
    stored value[EACH];
};
template <typename stored>
__device__ __forceinline__ quad<stored> read_quad(const stored *at, unsigned inside, bool together)
{
    quad<stored> found = {};

    if (together && inside == EACH)
        return *(const quad<stored> *)at;
#pragma unroll
    for (unsigned k = 0; k < EACH; k++)
        if (k < inside)
            found.value[k] = at[k];
    return found;
}

/* A thread has EACH columns of every row of its block.  Of AT_ONCE rows everything is read before anything is added up, so that
 * enough reads are under way. */
template <lp_dtype dtype> __global__ void __launch_bounds__(THREADS) reduce_tile(tile_job job)
{
    typedef typename lp_element_of<dtype>::real real;
    typedef typename lp_element_of<dtype>::stored stored;
    enum { AT_ONCE = sizeof(real) > 4 ? 2 : 4 };
    __shared__ double row_sums[WARPS][LP_REDUCE_ROWS];
    const size_t first_row = (size_t)blockIdx.y * LP_REDUCE_ROWS, size = job.rows * job.columns,
                 column = (size_t)blockIdx.x * LP_REDUCE_COLUMNS + threadIdx.x * EACH;
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const size_t left = column < job.columns ? job.columns - column : 0;
    const unsigned inside = left < EACH ? (unsigned)left : (unsigned)EACH;
    const bool together = job.columns % EACH == 0,
               weight_together =
                   (uintptr_t)job.weight % sizeof(quad<stored>) == 0 && job.weight_stride % EACH == 0;
    double columns[EACH] = {};

    for (unsigned r = 0; r < LP_REDUCE_ROWS && first_row + r < job.rows; r += AT_ONCE) {
        real g[AT_ONCE][EACH], s[AT_ONCE][EACH];
        quad<stored> w[AT_ONCE];
        unsigned there[AT_ONCE];
        size_t at[AT_ONCE];

#pragma unroll
        for (unsigned i = 0; i < AT_ONCE; i++) {
            quad<real> mean = {}, square = {};
            size_t row = first_row + r + i;

            there[i] = row < job.rows ? inside : 0;
            at[i] = row * job.columns + column;
            if (!job.first) {
                mean = read_quad((const real *)job.mean + at[i], there[i], together);
                square = read_quad((const real *)job.square + at[i], there[i], together);
            }
            if (job.last)
                w[i] = read_quad((const stored *)job.weight + row * job.weight_stride + column, there[i],
                                 weight_together);
#pragma unroll
            for (unsigned k = 0; k < EACH; k++) {
                g[i][k] = mean.value[k];
                s[i][k] = square.value[k];
            }
        }
        for (size_t j = 0; j < job.group; j++) {
            quad<real> gradient[AT_ONCE];

#pragma unroll
            for (unsigned i = 0; i < AT_ONCE; i++)
                gradient[i] = read_quad((const real *)job.gradients + j * size + at[i], there[i], together);
#pragma unroll
            for (unsigned i = 0; i < AT_ONCE; i++)
#pragma unroll
                for (unsigned k = 0; k < EACH; k++) {
                    real value = gradient[i].value[k];

                    g[i][k] += value;
                    s[i][k] += value * value;
                }
        }
        if (!job.last) {
#pragma unroll
            for (unsigned i = 0; i < AT_ONCE; i++)
#pragma unroll
                for (unsigned k = 0; k < EACH; k++)
                    if (k < there[i]) {
                        ((real *)job.mean)[at[i] + k] = g[i][k];
                        ((real *)job.square)[at[i] + k] = s[i][k];
                    }
            continue;
        }
#pragma unroll
        for (unsigned i = 0; i < AT_ONCE; i++) {
            double sum = 0;

#pragma unroll
            for (unsigned k = 0; k < EACH; k++) {
                real weight = lp_element_of<dtype>::of(w[i].value[k]), mean = g[i][k] * (real)job.share, e;

                e = job.second ? mean * weight - (real)0.5 * weight * (s[i][k] * (real)job.share) * weight
                               : mean * weight;
                sum += (double)lp_abs(e);
                columns[k] += (double)lp_abs(e);
            }
            sum = lp_warp_sum(sum);
            if (lane == 0)
                row_sums[warp][r + i] = sum;
        }
    }
    if (!job.last)
        return;
    __syncthreads();
    if (threadIdx.x < LP_REDUCE_ROWS && first_row + threadIdx.x < job.rows) {
        double sum = 0;

        for (int w = 0; w < WARPS; w++)
            sum += row_sums[w][threadIdx.x];
        job.row_parts[(size_t)blockIdx.x * job.rows + first_row + threadIdx.x] = sum;
    }
#pragma unroll
    for (unsigned k = 0; k < EACH; k++)
        if (k < inside)
            job.column_parts[(size_t)blockIdx.y * job.columns + column + k] = columns[k];
}

__global__ void add_parts(double *sums, const double *parts, size_t count, size_t part_count, size_t stride)
{
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    double sum = 0;

    if (i >= count)
        return;
    for (size_t p = 0; p < part_count; p++)
        sum += parts[p * stride + i];
    sums[i] += sum;
}

void launch_reduction(const tile_job &job, lp_dtype dtype, cudaStream_t stream)
{
    dim3 blocks((unsigned)lp_ceil_div(job.columns, LP_REDUCE_COLUMNS),
                (unsigned)lp_ceil_div(job.rows, LP_REDUCE_ROWS));

    if (dtype == LP_F64)
        LP_LAUNCH(reduce_tile<LP_F64>, blocks, THREADS, 0, stream, job);
    else if (dtype == LP_F32)
        LP_LAUNCH(reduce_tile<LP_F32>, blocks, THREADS, 0, stream, job);
    else if (dtype == LP_BF16)
        LP_LAUNCH(reduce_tile<LP_BF16>, blocks, THREADS, 0, stream, job);
    else
        LP_LAUNCH(reduce_tile<LP_F16>, blocks, THREADS, 0, stream, job);
}

size_t width_of(lp_dtype dtype)
{
    return dtype == LP_F64 ? 8 : dtype == LP_F32 ? 4 : 2;
}

const unsigned char *element_at(const void *values, lp_dtype dtype, size_t i)
{
    return (const unsigned char *)values + i * width_of(dtype);
}

/* One tile whose first row is `row0` and first column `column0`. */
lp_status score_tile(const lp_linear *l, const lp_linear_plan *plan, size_t row0, size_t column0, size_t rows,
                     size_t columns, double *row, double *col, const lp_exec *exec, lp_error *err)
{
    unsigned char *scratch = (unsigned char *)exec->scratch;
    cudaStream_t stream = (cudaStream_t)exec->stream;
    size_t samples = l->order == 1 ? 1 : l->samples,
           tokens = l->order == 1 ? l->samples * l->tokens : l->tokens;
    size_t real = l->dtype == LP_F64 ? sizeof(double) : sizeof(float);
    tile_job job = {};
    lp_gemm gemm = {};

    job.weight = element_at(l->weight, l->dtype, row0 * l->weight_stride + column0);
    job.weight_stride = l->weight_stride;
    job.gradients = scratch + plan->gradients;
    job.mean = scratch + plan->carry;
    job.square = scratch + plan->carry + rows * columns * real;
    job.rows = rows;
    job.columns = columns;
    job.second = l->order == 2;
    job.share = l->order == 2 ? 1.0 / (double)samples : 1.0;
    job.row_parts = (double *)(scratch + plan->row_parts);
    job.column_parts = (double *)(scratch + plan->column_parts);
    gemm.g = scratch + plan->gradients;
    gemm.rows = rows;
    gemm.columns = columns;
    gemm.tokens = tokens;
    gemm.x_stride = l->x_stride;
    gemm.dy_stride = l->dy_stride;
    gemm.dtype = l->dtype;
    gemm.scale = l->order == 2 ? 1.0 : 1.0 / (double)l->samples;
    gemm.workspace = scratch;
    gemm.workspace_bytes = plan->workspace;
    for (size_t j = 0; j < samples; j += plan->group) {
        lp_status status;

        gemm.group = job.group = samples - j < plan->group ? samples - j : plan->group;
        gemm.x = element_at(l->x, l->dtype, j * tokens * l->x_stride + column0);
        gemm.dy = element_at(l->dy, l->dtype, j * tokens * l->dy_stride + row0);
        status = lp_gemm_run(lp_cuda_context_of(exec)->blas, &gemm, stream, err);
        if (status != LP_OK)
            return status;
        job.first = j == 0;
        job.last = j + job.group == samples;
        launch_reduction(job, l->dtype, stream);
    }
    lp_add_parts(row + row0, job.row_parts, rows, lp_ceil_div(columns, LP_REDUCE_COLUMNS), rows, stream);
    lp_add_parts(col + column0, job.column_parts, columns, lp_ceil_div(rows, LP_REDUCE_ROWS), columns,
                 stream);
    return lp_cuda_launched(err, "scoring a linear layer");
}

lp_status score(const lp_linear *l, double *row, double *col, const lp_exec *exec, lp_error *err)
{
    lp_linear_plan plan;
    size_t samples = l->order == 1 ? 1 : l->samples;
    bool done = false;
    lp_status status;

    if (lp_fused_takes(lp_cuda_context_of(exec), l)) {
        status = lp_fused_scores(l, row, col, exec, &done, err);
        if (status != LP_OK || done)
            return status;
    }
    if (!lp_linear_plan_make(&plan, l->out, l->in, samples,
                             l->dtype == LP_F64 ? sizeof(double) : sizeof(float), exec->scratch_bytes))
        return lp_error_set(err, LP_ERR_NOMEM, "linear_scores cannot work in %zu bytes of scratch",
                            exec->scratch_bytes);
    for (size_t r = 0; r < l->out; r += plan.rows) {
        for (size_t c = 0; c < l->in; c += plan.columns) {
            status = score_tile(l, &plan, r, c, l->out - r < plan.rows ? l->out - r : plan.rows,
                                l->in - c < plan.columns ? l->in - c : plan.columns, row, col, exec, err);
            if (status != LP_OK)
                return status;
        }
    }
    return LP_OK;
}

lp_status check(const lp_linear *l, const double *row, const double *col, lp_error *err)
{
    size_t x_columns, dy_columns, tokens, bytes;

    if (l == NULL || row == NULL || col == NULL || l->weight == NULL || l->x == NULL || l->dy == NULL)
        return lp_error_set(err, LP_ERR_ARGUMENT, "linear_scores was given a NULL tensor");
    x_columns = l->in;
    dy_columns = l->out;
    if (l->out < 1 || l->in < 1 || l->samples < 1 || l->tokens < 1 || (unsigned)l->dtype > LP_BF16 ||
        (l->order != 1 && l->order != 2) || l->x_stride < x_columns || l->dy_stride < dy_columns ||
        l->weight_stride < (l->transposed ? l->out : l->in))
        return lp_error_set(
            err, LP_ERR_ARGUMENT,
            "linear_scores cannot take a weight of %zu x %zu with %zu samples of %zu tokens, order %d",
            l->out, l->in, l->samples, l->tokens, l->order);
    if (!lp_mul_size(l->samples, l->tokens, &tokens) ||
        !lp_mul_size(tokens, l->x_stride > l->dy_stride ? l->x_stride : l->dy_stride, &bytes) ||
        !lp_mul_size(bytes, 8, &bytes))
        return lp_error_set(err, LP_ERR_OVERFLOW, "linear_scores was given a tensor that fits no memory");
    return LP_OK;
}

} // namespace

extern "C" void lp_add_parts(double *sums, const double *parts, size_t count, size_t part_count,
                             size_t stride, cudaStream_t stream)
{
    LP_LAUNCH(add_parts, (unsigned)lp_ceil_div(count, THREADS), THREADS, 0, stream, sums, parts, count,
              part_count, stride);
}

extern "C" lp_status lp_cuda_linear_scores(const lp_linear *linear, double *row, double *col,
                                           const lp_exec *exec, lp_error *err)
{
    lp_linear turned;
    lp_status status = check(linear, row, col, err);
    int before;

    if (status != LP_OK)
        return status;
    turned = *linear;
    if (linear->transposed) { /* the weight's rows are the inputs: W^T = x^T dy */
        double *swap = row;

        row = col;
        col = swap;
        turned.out = linear->in;
        turned.in = linear->out;
        turned.x = linear->dy;
        turned.x_stride = linear->dy_stride;
        turned.dy = linear->x;
        turned.dy_stride = linear->x_stride;
        turned.transposed = false;
    }
    status = lp_cuda_enter(exec, &before, err);
    if (status != LP_OK)
        return status;
    status = lp_cuda_check_scratch(exec, 1, "linear_scores", err);
    if (status == LP_OK)
        status = score(&turned, row, col, exec, err);
    return lp_cuda_leave(exec, before, status, err);
}
