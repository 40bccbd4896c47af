/* The scores of fused.cu, of first order too, by what only compute capability 9.0 has: products of whole warpgroups, which
 * read both operands from shared memory, transposed as they lie, and tensor copies, which bring a panel into two blocks'
 * shared memory at once.  At full rate two operands of 128 features would need twice what the L2 cache delivers; shared
 * by 2 x 2 blocks they need as much as it has.
 *
 * A multiplying thread holds 3 x 64 sums: the gradient of the sample at hand, g and s.  The first product of a sample overwrites
 * the gradient instead of adding to it.  A stage goes back to those who fill it when each warp of all its readers has seen its
 * products done.
 *
 * Tried on an H100 and slower by a tenth or more: the warpgroups in turns, or one a head start, so that one's products run while
 * the other adds a sample up (it leaves fewer stages for the copies under way), and twice as many stages of half the size. */
#include "kernels/cuda/fused_job.cuh"
#include "kernels/cuda/hopper_index.h"

#include <stdint.h>

namespace
{

enum {
    WARPGROUPS = LP_FUSED_THREADS / 128, /* that multiply */
    WARPS = LP_FUSED_THREADS / 32,
    FINISH_BYTES = (1 + WARPS) * LP_FUSED_TILE * 8,
    SHARED_BYTES = LP_HOPPER_ALIGN + LP_HOPPER_STAGE * LP_HOPPER_STAGES + FINISH_BYTES +
        16 * LP_HOPPER_STAGES,
    FEW_REGISTERS = 40,  /* of a thread that copies */
    MANY_REGISTERS = 232 /* of one that multiplies; 65536 for all */
};

/* A launch: the strip, and its operands as the copies see them. */
struct hopper_job {
    lp_fused_job fused;
    lp_tensor_map dy, x;    /* (samples, tokens, features); beyond them lie zeros */
    unsigned rows, columns; /* in tiles of 2 x 2 */
    unsigned samples, tokens;
};

#if LP_WARPGROUPS

/* Where a block is in the pipeline; all walk over the same stages. */
struct cursor {
    unsigned stage = 0, phase = 0;

    __device__ __forceinline__ void advance()
    {
        if (++stage == LP_HOPPER_STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

struct pipeline {
    unsigned char *stages;
    uint64_t *full, *empty; /* [LP_HOPPER_STAGES] */
};

/* First row and column of a block's tile; a tile may lie outside of the weight. */
struct tile {
    size_t row, column;

    __device__ __forceinline__ tile(const hopper_job &job, unsigned index, unsigned rank)
    {
        unsigned r, c;

        lp_hopper_place(index, job.rows, job.columns, &r, &c);
        row = (size_t)(2 * r + lp_hopper_block_row(rank)) * LP_FUSED_TILE;
        column = (size_t)(2 * c + lp_hopper_block_column(rank)) * LP_FUSED_TILE;
    }
};

/* One warp: has this block's panels of every stage of every tile copied. */
__device__ __forceinline__ void copy_all(const hopper_job &job, const pipeline &pipe, unsigned rank)
{
    const lp_fused_job &fused = job.fused;
    const bool leads = threadIdx.x % 32 == 0;
    const unsigned dy_panel = lp_hopper_dy_panel(rank), x_panel = lp_hopper_x_panel(rank);
    cursor at;

    for (unsigned index = blockIdx.x / LP_HOPPER_CLUSTER; index < job.rows * job.columns;
         index += gridDim.x / LP_HOPPER_CLUSTER) {
        const tile here(job, index, rank);
        const int row = (int)here.row + (int)dy_panel * LP_HOPPER_PANEL_FEATURES,
                  column = (int)here.column + (int)x_panel * LP_HOPPER_PANEL_FEATURES;

        lp_fused_prefetch(fused, here.row, here.column);
        for (unsigned sample = 0; sample < job.samples; sample++) {
            for (unsigned token = 0; token < job.tokens; token += LP_HOPPER_TOKENS) {
                unsigned char *stage = pipe.stages + at.stage * LP_HOPPER_STAGE;

                lp_barrier_wait(pipe.empty + at.stage, at.phase ^ 1);
                if (leads) {
                    lp_barrier_expect(pipe.full + at.stage, LP_HOPPER_STAGE);
                    lp_tensor_copy(stage + dy_panel * LP_HOPPER_PANEL, &job.dy, pipe.full + at.stage, row,
                                   (int)token, (int)sample, lp_hopper_dy_readers(rank));
                    lp_tensor_copy(stage + LP_HOPPER_OPERAND + x_panel * LP_HOPPER_PANEL, &job.x,
                                   pipe.full + at.stage, column, (int)token, (int)sample,
                                   lp_hopper_x_readers(rank));
                }
                at.advance();
            }
        }
    }
}

typedef float sums_t[1][16][4];

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
__device__ __forceinline__ void multiply(sums_t &sums, unsigned stage, unsigned count, unsigned warpgroup,
                                         bool begins)
{
    if (count > LP_HOPPER_TOKENS - LP_HOPPER_STEP) {
        lp_warpgroup_arrive();
#pragma unroll
        for (unsigned step = 0; step < LP_HOPPER_TOKENS / LP_HOPPER_STEP; step++)
            multiply_step<dtype>(sums, stage, step, warpgroup, !begins || step > 0);
        lp_warpgroup_commit();
    } else {
#pragma unroll 1
        for (unsigned step = 0; step * LP_HOPPER_STEP < count; step++) {
            lp_warpgroup_arrive();
            multiply_step<dtype>(sums, stage, step, warpgroup, !begins || step > 0);
            lp_warpgroup_commit();
        }
        lp_warpgroup_wait<0>();
    }
}

/* A warp tells the blocks that fill the stage that it has read it. */
__device__ __forceinline__ void give_back(const pipeline &pipe, unsigned stage, unsigned rank)
{
    const unsigned lane = threadIdx.x % 32;

    if (lane < LP_HOPPER_READERS / 8)
        lp_barrier_arrive_at(pipe.empty + stage, lp_hopper_feeder(rank, lane));
}

/* Two warpgroups: multiply every stage of every tile, and finish the tile. */
template <lp_dtype dtype>
__device__ __forceinline__ void multiply_all(const hopper_job &job, const pipeline &pipe,
                                             unsigned char *memory, unsigned rank)
{
    const lp_fused_job &fused = job.fused;
    const unsigned warp = threadIdx.x / 32, warpgroup = threadIdx.x / 128;
    const unsigned stages = lp_shared_address(pipe.stages);
    cursor at;

    for (unsigned index = blockIdx.x / LP_HOPPER_CLUSTER; index < job.rows * job.columns;
         index += gridDim.x / LP_HOPPER_CLUSTER) {
        const tile here(job, index, rank);
        sums_t sums, g = {}, s = {};

        for (unsigned sample = 0; sample < job.samples; sample++) {
            unsigned last = at.stage;

            for (unsigned token = 0; token < job.tokens; token += LP_HOPPER_TOKENS) {
                lp_barrier_wait(pipe.full + at.stage, at.phase);
                multiply<dtype>(sums, stages + at.stage * LP_HOPPER_STAGE, job.tokens - token, warpgroup,
                                token == 0);
                lp_warpgroup_wait<1>();
                if (token > 0)
                    give_back(pipe, last, rank);
                last = at.stage;
                at.advance();
            }
            lp_warpgroup_wait<0>();
            give_back(pipe, last, rank);
            lp_warpgroup_have(sums[0]);
            lp_fused_gather(fused, sums, g, s);
        }
        lp_fused_finish<dtype, 1, WARPS>(fused, g, s, here.row, here.column, lp_hopper_warp_row(warp), 0, 0,
                                         warp, memory);
    }
}

#endif

template <lp_dtype dtype>
__global__ void __launch_bounds__(LP_HOPPER_THREADS, 1) hopper_scores(const LP_GRID_CONSTANT hopper_job job)
{
#if LP_WARPGROUPS
    LP_DYNAMIC_SHARED(unaligned);
    pipeline pipe;
    unsigned char *memory;
    const unsigned rank = lp_cluster_rank();

    pipe.stages = unaligned + (0u - lp_shared_address(unaligned)) % LP_HOPPER_ALIGN;
    memory = pipe.stages + LP_HOPPER_STAGE * LP_HOPPER_STAGES;
    pipe.full = (uint64_t *)(memory + FINISH_BYTES);
    pipe.empty = pipe.full + LP_HOPPER_STAGES;
    if (threadIdx.x == 0) {
        for (unsigned stage = 0; stage < LP_HOPPER_STAGES; stage++) {
            lp_barrier_init(pipe.full + stage, 1);
            lp_barrier_init(pipe.empty + stage, LP_HOPPER_READERS);
        }
        lp_barriers_ready();
    }
    lp_cluster_sync();
    if (threadIdx.x / 128 == WARPGROUPS) {
        lp_registers_fewer<FEW_REGISTERS>();
        if (threadIdx.x / 32 == WARPS)
            copy_all(job, pipe, rank);
    } else {
        lp_registers_more<MANY_REGISTERS>();
        multiply_all<dtype>(job, pipe, memory, rank);
    }
    lp_cluster_sync(); /* none goes while another may still write to it */
#else
    (void)job;
#endif
}

bool map_of(lp_tensor_map *map, const lp_fused_job &job, const uint16_t *values, size_t features,
            size_t stride, lp_dtype dtype, void *encode)
{
    return lp_tensor_map_make(map, encode, values, dtype, features, job.tokens, job.samples, stride,
                              LP_HOPPER_PANEL_FEATURES, LP_HOPPER_TOKENS);
}

} // namespace

cudaError_t lp_hopper_prepare(lp_cuda_context *context)
{
#ifdef LP_NO_HOPPER
    (void)context;
    return cudaSuccess;
#else
    cudaError_t error = cudaSuccess;

    if (context->major != 9 || context->minor != 0)
        return cudaSuccess;
    context->encode = lp_tensor_map_encoder();
    if (context->encode == NULL)
        return cudaSuccess;
    for (lp_dtype dtype : {LP_BF16, LP_F16}) {
        int clusters = 0;

        error = lp_cluster_prepare(dtype == LP_BF16 ? hopper_scores<LP_BF16> : hopper_scores<LP_F16>,
                                   LP_HOPPER_THREADS, SHARED_BYTES, LP_HOPPER_CLUSTER, &clusters);
        if (error != cudaSuccess)
            return error;
        context->clusters = clusters; /* 0: the device (a part of one, say) has no room for any */
    }
    return cudaSuccess;
#endif
}

bool lp_hopper_launch(const lp_fused_job &fused, lp_dtype dtype, const lp_cuda_context *context,
                      cudaStream_t stream, cudaError_t *error)
{
    hopper_job job = {};
    unsigned clusters;

    if (fused.tokens > INT32_MAX || fused.samples > INT32_MAX || fused.columns > INT32_MAX ||
        fused.rows > INT32_MAX ||
        !map_of(&job.dy, fused, fused.dy, fused.rows, fused.dy_stride, dtype, context->encode) ||
        !map_of(&job.x, fused, fused.x, fused.columns, fused.x_stride, dtype, context->encode))
        return false;
    job.fused = fused;
    job.rows = (unsigned)lp_ceil_div(fused.rows, 2 * LP_FUSED_TILE);
    job.columns = (unsigned)lp_ceil_div(fused.columns, 2 * LP_FUSED_TILE);
    job.samples = (unsigned)fused.samples;
    job.tokens = (unsigned)fused.tokens;
    clusters = job.rows * job.columns;
    if (clusters > (unsigned)context->clusters)
        clusters = (unsigned)context->clusters;
    *error = lp_launch_cluster(dtype == LP_BF16 ? hopper_scores<LP_BF16> : hopper_scores<LP_F16>,
                               clusters * LP_HOPPER_CLUSTER, LP_HOPPER_THREADS, SHARED_BYTES,
                               LP_HOPPER_CLUSTER, stream, job);
    return true;
}
