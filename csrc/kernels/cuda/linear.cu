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

/* Sum element `at` of the tile over the group's samples, and over the groups before it. */
template <typename real>
__device__ __forceinline__ void gather_samples(const tile_job &job, size_t at, real *g, real *s)
{
    const real *gradient = (const real *)job.gradients + at;
    size_t size = job.rows * job.columns;
    real mean = 0, square = 0;

    if (!job.first) {
        mean = ((const real *)job.mean)[at];
        square = ((const real *)job.square)[at];
    }
    for (size_t j = 0; j < job.group; j++) {
        real value = gradient[j * size];

        mean += value;
        square += value * value;
    }
    *g = mean;
    *s = square;
}

template <lp_dtype dtype> __global__ void __launch_bounds__(THREADS) reduce_tile(tile_job job)
{
    typedef typename lp_element_of<dtype>::real real;
    __shared__ double row_sums[WARPS][LP_REDUCE_ROWS];
    const size_t first_row = (size_t)blockIdx.y * LP_REDUCE_ROWS,
                 first_column = (size_t)blockIdx.x * LP_REDUCE_COLUMNS;
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double columns[EACH] = {};

    for (unsigned r = 0; r < LP_REDUCE_ROWS; r++) {
        size_t row = first_row + r;
        double sum = 0;

        if (row >= job.rows)
            break; /* the same for the whole block */
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            size_t column = first_column + (size_t)k * THREADS + threadIdx.x;
            real g, s, e, w;

            if (column >= job.columns)
                continue;
            gather_samples<real>(job, row * job.columns + column, &g, &s);
            if (!job.last) {
                ((real *)job.mean)[row * job.columns + column] = g;
                ((real *)job.square)[row * job.columns + column] = s;
                continue;
            }
            w = lp_element_of<dtype>::load(job.weight, row * job.weight_stride + column);
            g *= (real)job.share;
            e = job.second ? g * w - (real)0.5 * w * (s * (real)job.share) * w : g * w;
            sum += (double)lp_abs(e);
            columns[k] += (double)lp_abs(e);
        }
        sum = lp_warp_sum(sum);
        if (lane == 0)
            row_sums[warp][r] = sum;
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
    for (int k = 0; k < EACH; k++) {
        size_t column = first_column + (size_t)k * THREADS + threadIdx.x;

        if (column < job.columns)
            job.column_parts[(size_t)blockIdx.y * job.columns + column] = columns[k];
    }
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

    if (l->order == 2 && lp_fused_supported(lp_cuda_context_of(exec)) && lp_fused_fits(l)) {
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
