/* Reductions of whole tensors, elementwise in float64: bound by memory, and needed only for what takes no faster path.
 *
 * For dimension d a tensor is (outer, n, inner).  Where inner is long a thread block adds up one index of n; where it is short
 * the tensor is a matrix of `outer` rows, whose columns are added up and then taken together in groups of inner.  Blocks
 * write their sums to scratch, and a second launch adds these in a fixed order. */
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/internal.h"

extern "C" {
#include "kernels/cuda/plan.h"
}

enum {
    THREADS = 256,
    INNER_MIN = 32,      /* from this inner size on a block takes one index */
    PART = THREADS * 32, /* elements of an index that a block should have at least */
    ROWS = THREADS / 32, /* rows of a matrix that a block takes at a time */
    PARTS_MAX = 1024     /* along the rows */
};

namespace
{

struct element_job {
    const void *weight, *grad, *square;
    lp_dtype weight_dtype, grad_dtype, square_dtype;
    lp_score_kind kind;
};

__device__ __forceinline__ double element(const element_job &job, size_t i)
{
    double w = lp_load(job.weight, job.weight_dtype, i), g, s;

    switch (job.kind) {
    case LP_SCORE_L1:
        return fabs(w);
    case LP_SCORE_L2:
        return w * w;
    case LP_SCORE_VECTOR:
        return lp_load(job.grad, job.grad_dtype, i) * w;
    case LP_SCORE_ELEMENT1:
        return fabs(lp_load(job.grad, job.grad_dtype, i) * w);
    default:
        g = lp_load(job.grad, job.grad_dtype, i);
        s = lp_load(job.square, job.square_dtype, i);
        return fabs(g * w - 0.5 * w * s * w);
    }
}

/* parts[blockIdx.y][index] = what the block's part of (outer, inner) adds to index first + blockIdx.x of n. */
__global__ void __launch_bounds__(THREADS) sum_indices(element_job job, size_t outer, size_t n, size_t inner,
                                                       size_t first, size_t each, double *parts)
{
    __shared__ double warps[THREADS / 32];
    const size_t index = first + blockIdx.x, begin = (size_t)blockIdx.y * each;
    const size_t end = begin + each < outer * inner ? begin + each : outer * inner;
    size_t at = begin + threadIdx.x, o = at / inner, k = at % inner;
    double sum = 0;

    for (; at < end; at += THREADS) {
        sum += element(job, (o * n + index) * inner + k);
        for (k += THREADS; k >= inner; k -= inner)
            ++o;
    }
    sum = lp_warp_sum(sum);
    if (threadIdx.x % 32 == 0)
        warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        sum = 0;
        for (int w = 0; w < THREADS / 32; w++)
            sum += warps[w];
        parts[(size_t)blockIdx.y * gridDim.x + blockIdx.x] = sum;
    }
}

/* parts[blockIdx.y][column] = the sum of the block's rows of column first + column; `columns` are wanted. */
__global__ void __launch_bounds__(THREADS)
    sum_columns(element_job job, size_t rows, size_t width, size_t first, size_t columns, size_t each,
                double *parts)
{
    __shared__ double lanes[ROWS][33];
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const size_t column = (size_t)blockIdx.x * 32 + lane, begin = (size_t)blockIdx.y * each;
    const size_t end = begin + each < rows ? begin + each : rows;
    double sum = 0;

    if (column < columns)
        for (size_t row = begin + warp; row < end; row += ROWS)
            sum += element(job, row * width + first + column);
    lanes[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < columns) {
        sum = 0;
        for (int w = 0; w < ROWS; w++)
            sum += lanes[w][lane];
        parts[(size_t)blockIdx.y * columns + column] = sum;
    }
}

/* sums[i] += the sum of parts[p][i * inner + k] over p and k. */
__global__ void add_groups(double *sums, const double *parts, size_t count, size_t inner, size_t part_count)
{
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    double sum = 0;

    if (i >= count)
        return;
    for (size_t p = 0; p < part_count; p++)
        for (size_t k = 0; k < inner; k++)
            sum += parts[(p * count + i) * inner + k];
    sums[i] += sum;
}

template <typename real>
__global__ void add_squares(real *acc, const void *grad, lp_dtype dtype, double scale, size_t count)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (size_t)gridDim.x * blockDim.x) {
        double g = lp_load(grad, dtype, i);

        acc[i] = (real)((double)acc[i] + scale * g * g);
    }
}

size_t at_most(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* How many parts to cut `length` into, for `blocks` blocks already there, with room for `room` parts. */
size_t parts_of(size_t length, size_t least, size_t blocks, size_t room, const lp_cuda_context *context)
{
    size_t wanted = lp_ceil_div((size_t)context->processors * 8, blocks);

    wanted = at_most(at_most(wanted, lp_ceil_div(length, least)), at_most(room, PARTS_MAX));
    return wanted < 1 ? 1 : wanted;
}

void sum_by_index(const element_job &job, size_t outer, size_t n, size_t inner, double *out,
                  const lp_exec *exec)
{
    size_t step = at_most(n, exec->scratch_bytes / sizeof(double)), length = outer * inner;

    for (size_t first = 0; first < n; first += step) {
        size_t count = at_most(step, n - first);
        size_t parts = parts_of(length, PART, count, exec->scratch_bytes / sizeof(double) / count,
                                lp_cuda_context_of(exec));
        size_t each = lp_ceil_div(length, parts);
        dim3 blocks((unsigned)count, (unsigned)lp_ceil_div(length, each));

        LP_LAUNCH(sum_indices, blocks, THREADS, 0, (cudaStream_t)exec->stream, job, outer, n, inner, first,
                  each, (double *)exec->scratch);
        lp_add_parts(out + first, (const double *)exec->scratch, count, blocks.y, count,
                     (cudaStream_t)exec->stream);
    }
}

void sum_by_column(const element_job &job, size_t outer, size_t n, size_t inner, double *out,
                   const lp_exec *exec)
{
    size_t step = at_most(n, exec->scratch_bytes / sizeof(double) / inner);

    for (size_t first = 0; first < n; first += step) {
        size_t count = at_most(step, n - first), columns = count * inner;
        size_t parts = parts_of(outer, ROWS * 8, lp_ceil_div(columns, 32),
                                exec->scratch_bytes / sizeof(double) / columns, lp_cuda_context_of(exec));
        size_t each = lp_ceil_div(outer, parts);
        dim3 blocks((unsigned)lp_ceil_div(columns, 32), (unsigned)lp_ceil_div(outer, each));

        LP_LAUNCH(sum_columns, blocks, THREADS, 0, (cudaStream_t)exec->stream, job, outer, n * inner,
                  first * inner, columns, each, (double *)exec->scratch);
        LP_LAUNCH(add_groups, (unsigned)lp_ceil_div(count, THREADS), THREADS, 0, (cudaStream_t)exec->stream,
                  out + first, (const double *)exec->scratch, count, inner, (size_t)blocks.y);
    }
}

bool known(lp_dtype dtype)
{
    return (unsigned)dtype <= LP_BF16;
}

lp_status check_size(const char *operation, size_t count, lp_error *err)
{
    size_t bytes;

    return lp_mul_size(count, 8, &bytes)
               ? LP_OK
               : lp_error_set(err, LP_ERR_OVERFLOW, "%s was given a tensor that fits no memory", operation);
}

lp_status check_scores(const element_job &job, const size_t *shape, size_t ndim, double *const *outs,
                       lp_error *err)
{
    bool needs_grad = job.kind <= LP_SCORE_ELEMENT2, needs_square = job.kind == LP_SCORE_ELEMENT2;
    size_t count = 1;

    if (shape == NULL || outs == NULL || ndim < 1 || ndim > LP_MAX_DIMS)
        return lp_error_set(err, LP_ERR_ARGUMENT,
                            "tensor_scores takes tensors of 1 to %d dimensions, not %zu", LP_MAX_DIMS, ndim);
    if ((unsigned)job.kind > LP_SCORE_L2)
        return lp_error_set(err, LP_ERR_ARGUMENT, "tensor_scores does not know importance %d", (int)job.kind);
    if (job.weight == NULL || !known(job.weight_dtype) ||
        (needs_grad && (job.grad == NULL || !known(job.grad_dtype))) ||
        (needs_square && (job.square == NULL || !known(job.square_dtype))))
        return lp_error_set(
            err, LP_ERR_ARGUMENT,
            "tensor_scores lacks the weight, gradient or squared gradient its importance needs");
    for (size_t d = 0; d < ndim; d++) {
        if (shape[d] < 1)
            return lp_error_set(err, LP_ERR_ARGUMENT,
                                "tensor_scores was given a tensor whose dimension %zu is empty", d);
        if (!lp_mul_size(count, shape[d], &count))
            count = SIZE_MAX;
    }
    return check_size("tensor_scores", count, err);
}

} // namespace

extern "C" lp_status lp_cuda_tensor_scores(lp_values weight, lp_values grad, lp_values square,
                                           const size_t *shape, size_t ndim, lp_score_kind kind,
                                           double *const *outs, const lp_exec *exec, lp_error *err)
{
    element_job job = {weight.data, grad.data, square.data, weight.dtype, grad.dtype, square.dtype, kind};
    lp_status status = check_scores(job, shape, ndim, outs, err);
    int before;

    if (status != LP_OK)
        return status;
    status = lp_cuda_enter(exec, &before, err);
    if (status != LP_OK)
        return status;
    status = lp_cuda_check_scratch(exec, INNER_MIN * sizeof(double), "tensor_scores", err);
    for (size_t d = 0; status == LP_OK && d < ndim; d++) {
        size_t outer = 1, inner = 1;

        if (outs[d] == NULL)
            continue;
        for (size_t k = 0; k < ndim; k++)
            *(k < d ? &outer : &inner) *= k == d ? 1 : shape[k];
        if (inner >= INNER_MIN)
            sum_by_index(job, outer, shape[d], inner, outs[d], exec);
        else
            sum_by_column(job, outer, shape[d], inner, outs[d], exec);
    }
    if (status == LP_OK)
        status = lp_cuda_launched(err, "scoring a tensor");
    return lp_cuda_leave(exec, before, status, err);
}

extern "C" lp_status lp_cuda_dot_columns(const void *a, const void *b, lp_dtype dtype, size_t rows,
                                         size_t columns, double *out, const lp_exec *exec, lp_error *err)
{
    size_t shape[2] = {rows, columns};
    double *outs[2] = {NULL, out};

    if (a == NULL || b == NULL || out == NULL)
        return lp_error_set(err, LP_ERR_ARGUMENT, "dot_columns was given a NULL tensor");
    if (rows < 1 || columns < 1 || !known(dtype))
        return lp_error_set(err, LP_ERR_ARGUMENT, "dot_columns cannot take %zu x %zu values of dtype %d",
                            rows, columns, (int)dtype);
    return lp_cuda_tensor_scores({a, dtype}, {b, dtype}, {NULL, dtype}, shape, 2, LP_SCORE_VECTOR, outs, exec,
                                 err);
}

extern "C" lp_status lp_cuda_accumulate_square(void *acc, lp_dtype acc_dtype, lp_values grad, double scale,
                                               size_t count, const lp_exec *exec, lp_error *err)
{
    lp_status status;
    unsigned blocks;
    int before;

    if (acc == NULL || grad.data == NULL)
        return lp_error_set(err, LP_ERR_ARGUMENT, "accumulate_square was given a NULL tensor");
    if ((acc_dtype != LP_F32 && acc_dtype != LP_F64) || !known(grad.dtype))
        return lp_error_set(err, LP_ERR_ARGUMENT,
                            "accumulate_square sums into float32 or float64, not dtype %d", (int)acc_dtype);
    status = check_size("accumulate_square", count, err);
    if (status == LP_OK && count > 0)
        status = lp_cuda_enter(exec, &before, err);
    if (status != LP_OK || count == 0)
        return status;
    blocks =
        (unsigned)at_most(lp_ceil_div(count, THREADS), (size_t)lp_cuda_context_of(exec)->processors * 32);
    if (acc_dtype == LP_F64)
        LP_LAUNCH(add_squares<double>, blocks, THREADS, 0, (cudaStream_t)exec->stream, (double *)acc,
                  grad.data, grad.dtype, scale, count);
    else
        LP_LAUNCH(add_squares<float>, blocks, THREADS, 0, (cudaStream_t)exec->stream, (float *)acc, grad.data,
                  grad.dtype, scale, count);
    return lp_cuda_leave(exec, before, lp_cuda_launched(err, "adding squares"), err);
}
