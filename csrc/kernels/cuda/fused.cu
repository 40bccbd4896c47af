/* Scores in one kernel: g = mean_j dy_j^T x_j and s = mean_j (dy_j^T x_j)^2 never leave the registers.
 *
 * Tokens stream through a pipeline in shared memory, sample after sample; when a sample's last tokens are multiplied, its
 * gradient, which is in the tensor cores' accumulators, is added to g, its square to s, and the accumulators are cleared.
 * A thread holds 3 x 64 sums, so one block fills a multiprocessor, and needs no other: the tensor cores have 128 x 128 x 32
 * products to do for each stage of 16 KiB. */
#include "kernels/cuda/fused_job.cuh"

enum { SHARED_BYTES = 2 * LP_FUSED_OPERAND * LP_FUSED_STAGES, HALF_STEPS = LP_FUSED_TOKENS / 16 };

namespace
{

typedef lp_fused_position<LP_FUSED_TOKENS> position;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800 /* older devices are never asked to run it */

/* Start copying one stage of both operands; what lies outside of them becomes zeros. */
__device__ __forceinline__ void fetch(const lp_fused_job &job, const position &at, size_t row0,
                                      size_t column0, unsigned char *stage)
{
    const unsigned chunk = lp_fused_copy_chunk(threadIdx.x), count = at.count(job);
    const size_t first = at.sample * job.tokens + at.token;
    const size_t row = row0 + chunk * 8, column = column0 + chunk * 8;
    const unsigned row_bytes = lp_fused_valid(row, job.rows),
                   column_bytes = lp_fused_valid(column, job.columns);

#pragma unroll
    for (unsigned v = 0; v < 2; v++) {
        unsigned token = lp_fused_copy_token(threadIdx.x, v), place = lp_fused_place(token, chunk);
        bool inside = token < count;
        unsigned from_dy = inside ? row_bytes : 0, from_x = inside ? column_bytes : 0;

        lp_copy16(stage + place, from_dy > 0 ? job.dy + (first + token) * job.dy_stride + row : job.dy,
                  from_dy);
        lp_copy16(stage + LP_FUSED_OPERAND + place,
                  from_x > 0 ? job.x + (first + token) * job.x_stride + column : job.x, from_x);
    }
}

typedef float sums_t[LP_FUSED_M_TILES][LP_FUSED_N_TILES][4];

template <lp_dtype dtype>
__device__ __forceinline__ void multiply(sums_t &sums, const unsigned char *stage, unsigned count,
                                         unsigned lane, unsigned warp)
{
#pragma unroll
    for (unsigned step = 0; step < HALF_STEPS; step++) {
        uint32_t a[LP_FUSED_M_TILES][4];

        if (step * 16 >= count)
            break; /* the same for all threads */
#pragma unroll
        for (unsigned m = 0; m < LP_FUSED_M_TILES; m++)
            lp_load_transposed(a[m],
                               stage + lp_fused_a_place(lane, step * 16, lp_fused_warp_row(warp) + m * 16));
#pragma unroll
        for (unsigned n = 0; n < LP_FUSED_N_TILES; n += 2) {
            uint32_t b[4];

            lp_load_transposed(b, stage + LP_FUSED_OPERAND +
                                      lp_fused_b_place(lane, step * 16, lp_fused_warp_column(warp) + n * 8));
#pragma unroll
            for (unsigned m = 0; m < LP_FUSED_M_TILES; m++) {
                lp_multiply_add<dtype>(sums[m][n], a[m], b[0], b[1]);
                lp_multiply_add<dtype>(sums[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

#endif

template <lp_dtype dtype>
__global__ void __launch_bounds__(LP_FUSED_THREADS, 1) fused_scores(lp_fused_job job)
{
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    LP_DYNAMIC_SHARED(shared);
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const size_t row0 = (size_t)(blockIdx.x / job.column_tiles) * LP_FUSED_TILE,
                 column0 = (size_t)(blockIdx.x % job.column_tiles) * LP_FUSED_TILE;
    sums_t sums = {}, g = {}, s = {};
    position ahead = {0, 0}, here = {0, 0};
    unsigned filled = 0, used = 0;

    for (; filled < LP_FUSED_STAGES - 1; filled++) {
        if (!ahead.done(job)) {
            fetch(job, ahead, row0, column0, shared + filled * 2 * LP_FUSED_OPERAND);
            ahead.advance(job);
        }
        lp_copy_commit(); /* empty at the end, so that the count of groups stays the same */
    }
    for (; !here.done(job); here.advance(job)) {
        lp_copy_wait<LP_FUSED_STAGES - 2>();
        /* Everybody's copies of this stage are visible, and everybody is done with the stage that is filled next. */
        __syncthreads();
        if (!ahead.done(job)) {
            fetch(job, ahead, row0, column0, shared + filled * 2 * LP_FUSED_OPERAND);
            ahead.advance(job);
        }
        lp_copy_commit();
        filled = filled + 1 == LP_FUSED_STAGES ? 0 : filled + 1;
        multiply<dtype>(sums, shared + used * 2 * LP_FUSED_OPERAND, here.count(job), lane, warp);
        used = used + 1 == LP_FUSED_STAGES ? 0 : used + 1;
        if (here.ends_sample(job)) {
            lp_fused_gather(job, sums, g, s);
            memset(&sums, 0, sizeof sums);
        }
    }
    lp_copy_wait<0>();
    __syncthreads(); /* the pipeline's memory is free */
    lp_fused_finish<dtype, 2, 4>(job, g, s, row0, column0, lp_fused_warp_row(warp),
                                 lp_fused_warp_column(warp), warp % 2, warp / 2, shared);
#endif
}

} // namespace

extern "C" bool lp_fused_takes(const lp_cuda_context *context, const lp_linear *linear)
{
    /* A gradient of all tokens together is a matrix product, which cuBLAS is better at than these older instructions. */
    return context->major >= 8 && (linear->order == 2 || context->clusters > 0) && lp_fused_fits(linear);
}

extern "C" lp_status lp_fused_prepare(lp_cuda_context *context, lp_error *err)
{
    cudaError_t error;

    if (context->major < 8)
        return LP_OK;
    error = cudaFuncSetAttribute(fused_scores<LP_BF16>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 SHARED_BYTES);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(fused_scores<LP_F16>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     SHARED_BYTES);
    if (error == cudaSuccess)
        error = lp_hopper_prepare(context);
    return error == cudaSuccess ? LP_OK : lp_cuda_failed(err, error, "loading llmprune's kernels");
}

namespace
{

lp_status launch(const lp_fused_job &job, lp_dtype dtype, size_t row_tiles, const lp_exec *exec,
                 lp_error *err)
{
    const lp_cuda_context *context = lp_cuda_context_of(exec);
    cudaStream_t stream = (cudaStream_t)exec->stream;
    unsigned blocks = (unsigned)(row_tiles * job.column_tiles);
    cudaError_t error = cudaSuccess;

    if (context->clusters > 0 && lp_hopper_launch(job, dtype, context, stream, &error))
        return error == cudaSuccess ? LP_OK : lp_cuda_failed(err, error, "scoring a linear layer");
    if (dtype == LP_BF16)
        LP_LAUNCH(fused_scores<LP_BF16>, blocks, LP_FUSED_THREADS, SHARED_BYTES, stream, job);
    else
        LP_LAUNCH(fused_scores<LP_F16>, blocks, LP_FUSED_THREADS, SHARED_BYTES, stream, job);
    return LP_OK;
}

} // namespace

extern "C" lp_status lp_fused_scores(const lp_linear *linear, double *row, double *col, const lp_exec *exec,
                                     bool *done, lp_error *err)
{
    cudaStream_t stream = (cudaStream_t)exec->stream;
    unsigned char *scratch = (unsigned char *)exec->scratch;
    const bool second = linear->order == 2;
    lp_fused_plan plan;
    lp_status status = LP_OK;

    *done = lp_fused_plan_make(&plan, linear->out, linear->in, exec->scratch_bytes);
    for (size_t first = 0; *done && status == LP_OK && first < linear->out; first += plan.rows) {
        lp_fused_job job = {};
        size_t row_tiles;

        job.rows = linear->out - first < plan.rows ? linear->out - first : plan.rows;
        job.columns = linear->in;
        job.weight = (const uint16_t *)linear->weight + first * linear->weight_stride;
        job.x = (const uint16_t *)linear->x;
        job.dy = (const uint16_t *)linear->dy + first;
        job.weight_stride = linear->weight_stride;
        job.x_stride = linear->x_stride;
        job.dy_stride = linear->dy_stride;
        job.samples = second ? linear->samples : 1;
        job.tokens = second ? linear->tokens : linear->samples * linear->tokens;
        job.share = 1.0f / (float)linear->samples;
        job.second = second;
        job.pairs = (uintptr_t)job.weight % 4 == 0 && job.weight_stride % 2 == 0;
        job.row_parts = (double *)(scratch + plan.row_parts);
        job.column_parts = (double *)(scratch + plan.column_parts);
        job.column_tiles = (unsigned)lp_ceil_div(job.columns, LP_FUSED_TILE);
        row_tiles = lp_ceil_div(job.rows, LP_FUSED_TILE);
        status = launch(job, linear->dtype, row_tiles, exec, err);
        lp_add_parts(row + first, job.row_parts, job.rows, job.column_tiles, job.rows, stream);
        lp_add_parts(col, job.column_parts, job.columns, row_tiles, job.columns, stream);
    }
    return *done && status == LP_OK ? lp_cuda_launched(err, "scoring a linear layer") : status;
}
