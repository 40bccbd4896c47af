/* The second-order scores of fused.cu by the warpgroup-wide products of compute capability 9.0, which read both operands from
 * shared memory, transposed as they lie, and run while the next tokens are copied.
 *
 * A thread holds 3 x 64 sums: the gradient of the sample at hand, g and s.  The first product of a sample overwrites the
 * gradient instead of adding to it.  Of four stages two are being filled, one is being multiplied and one just was: at a
 * stage's barrier every warpgroup has waited for its products of the stage before last, so that is the one to fill. */
#include "kernels/cuda/fused_job.cuh"
#include "kernels/cuda/hopper_index.h"

namespace
{

enum { SHARED_BYTES = LP_HOPPER_STAGE * LP_HOPPER_STAGES + LP_HOPPER_ALIGN, COPIES = 4 };

#if LP_WARPGROUPS

typedef lp_fused_position<LP_HOPPER_TOKENS> position;

/* Start copying one stage of both operands; what lies outside of them becomes zeros. */
__device__ __forceinline__ void fetch(const lp_fused_job &job, const position &at, size_t row0,
                                      size_t column0, unsigned char *stage)
{
    const unsigned chunk = lp_hopper_copy_chunk(threadIdx.x), count = at.count(job);
    const size_t first = at.sample * job.tokens + at.token;
    const size_t row = row0 + chunk * 8, column = column0 + chunk * 8;
    const unsigned row_bytes = lp_fused_valid(row, job.rows),
                   column_bytes = lp_fused_valid(column, job.columns);

#pragma unroll
    for (unsigned v = 0; v < COPIES; v++) {
        unsigned token = lp_hopper_copy_token(threadIdx.x, v), place = lp_hopper_place(token, chunk);
        bool inside = token < count;
        unsigned from_dy = inside ? row_bytes : 0, from_x = inside ? column_bytes : 0;

        lp_copy16(stage + place, from_dy > 0 ? job.dy + (first + token) * job.dy_stride + row : job.dy,
                  from_dy);
        lp_copy16(stage + LP_HOPPER_OPERAND + place,
                  from_x > 0 ? job.x + (first + token) * job.x_stride + column : job.x, from_x);
    }
}

typedef float sums_t[1][LP_HOPPER_N_TILES][4];

/* Queue the products of 16 tokens of a stage. */
template <lp_dtype dtype>
__device__ __forceinline__ void multiply_step(sums_t &sums, unsigned stage, unsigned step, unsigned warpgroup,
                                              bool add)
{
    lp_warpgroup_multiply_add<dtype>(sums[0],
                                     lp_hopper_descriptor(stage + lp_hopper_a_begin(warpgroup, step)),
                                     lp_hopper_descriptor(stage + lp_hopper_b_begin(step)), add);
}

/* Queue those of a stage's first `count` tokens.  The tensor cores' sums are not to be branched over: a stage that is nearly
 * full is multiplied whole, zeros and all. */
template <lp_dtype dtype>
__device__ __forceinline__ void multiply(sums_t &sums, unsigned stage, size_t count, unsigned warpgroup,
                                         bool begins)
{
    if (count > LP_HOPPER_TOKENS - LP_HOPPER_STEP) {
        lp_warpgroup_arrive();
#pragma unroll
        for (unsigned step = 0; step < LP_HOPPER_TOKENS / LP_HOPPER_STEP; step++)
            multiply_step<dtype>(sums, stage, step, warpgroup, !begins || step > 0);
    } else {
#pragma unroll 1
        for (unsigned step = 0; step * LP_HOPPER_STEP < count; step++) {
            lp_warpgroup_arrive();
            multiply_step<dtype>(sums, stage, step, warpgroup, !begins || step > 0);
        }
    }
    lp_warpgroup_commit();
}

#endif

template <lp_dtype dtype>
__global__ void __launch_bounds__(LP_FUSED_THREADS, 1) hopper_scores(lp_fused_job job)
{
#if LP_WARPGROUPS
    LP_DYNAMIC_SHARED(unaligned);
    unsigned char *const shared = unaligned + (0u - lp_shared_address(unaligned)) % LP_HOPPER_ALIGN;
    const unsigned base = lp_shared_address(shared), warp = threadIdx.x / 32, warpgroup = threadIdx.x / 128;
    const size_t row0 = (size_t)(blockIdx.x / job.column_tiles) * LP_FUSED_TILE,
                 column0 = (size_t)(blockIdx.x % job.column_tiles) * LP_FUSED_TILE;
    sums_t sums = {}, g = {}, s = {};
    position ahead = {0, 0};
    unsigned filled = 0, used = 0;

    for (; filled < LP_HOPPER_AHEAD; filled++) {
        if (!ahead.done(job)) {
            fetch(job, ahead, row0, column0, shared + filled * LP_HOPPER_STAGE);
            ahead.advance(job);
        }
        lp_copy_commit(); /* empty at the end, so that the count of groups stays the same */
    }
    for (size_t sample = 0; sample < job.samples; sample++) {
        for (size_t token = 0; token < job.tokens; token += LP_HOPPER_TOKENS) {
            lp_copy_wait<LP_HOPPER_AHEAD - 1>();
            lp_copies_for_products();
            /* Everybody's copies of this stage are visible; everybody's products of the stage before last are done. */
            __syncthreads();
            multiply<dtype>(sums, base + used * LP_HOPPER_STAGE, job.tokens - token, warpgroup, token == 0);
            lp_warpgroup_wait<1>();
            if (!ahead.done(job)) {
                fetch(job, ahead, row0, column0, shared + filled * LP_HOPPER_STAGE);
                ahead.advance(job);
            }
            lp_copy_commit();
            filled = (filled + 1) % LP_HOPPER_STAGES;
            used = (used + 1) % LP_HOPPER_STAGES;
        }
        lp_warpgroup_wait<0>();
        lp_warpgroup_have(sums[0]);
        lp_fused_gather(sums, g, s);
    }
    lp_copy_wait<0>();
    __syncthreads(); /* the pipeline's memory is free */
    lp_fused_finish<dtype, 1, LP_FUSED_THREADS / 32>(job, g, s, lp_hopper_warp_row(warp), 0, 0, warp, shared);
#else
    (void)job;
#endif
}

} // namespace

bool lp_hopper_built(void)
{
#ifdef LP_NO_HOPPER
    return false;
#else
    return true;
#endif
}

cudaError_t lp_hopper_prepare(void)
{
    cudaError_t error = cudaFuncSetAttribute(hopper_scores<LP_BF16>,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);

    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(hopper_scores<LP_F16>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     SHARED_BYTES);
    return error;
}

void lp_hopper_launch(const lp_fused_job &job, lp_dtype dtype, unsigned blocks, cudaStream_t stream)
{
    if (dtype == LP_BF16)
        LP_LAUNCH(hopper_scores<LP_BF16>, blocks, LP_FUSED_THREADS, SHARED_BYTES, stream, job);
    else
        LP_LAUNCH(hopper_scores<LP_F16>, blocks, LP_FUSED_THREADS, SHARED_BYTES, stream, job);
}
