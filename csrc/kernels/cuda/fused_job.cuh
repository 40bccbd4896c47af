/* What the fused second-order kernels share: the work of a launch, the walk over its tokens, and the end, where a tile's g and
 * s meet the weight. */
#ifndef LP_KERNELS_CUDA_FUSED_JOB_CUH
#define LP_KERNELS_CUDA_FUSED_JOB_CUH

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/fused_index.h"
#include "kernels/cuda/internal.h"

extern "C" {
#include "kernels/cuda/plan.h"
}

/* One strip of the weight; block b scores the tile of 128 x 128 in row b / column_tiles, column b % column_tiles. */
struct lp_fused_job {
    const void *weight;
    const uint16_t *x, *dy;
    size_t rows, columns; /* of the strip; dy begins at its first row */
    size_t weight_stride, x_stride, dy_stride;
    size_t samples, tokens;
    double *row_parts, *column_parts; /* (column tiles, rows), (row tiles, columns) */
    unsigned column_tiles;
};

/* Where a pipeline stage's tokens come from; walks over all samples, `stage` tokens at a time. */
template <unsigned stage> struct lp_fused_position {
    size_t sample, token;

    __device__ bool done(const lp_fused_job &job) const
    {
        return sample >= job.samples;
    }
    __device__ unsigned count(const lp_fused_job &job) const
    {
        size_t left = job.tokens - token;

        return left < stage ? (unsigned)left : stage;
    }
    __device__ bool ends_sample(const lp_fused_job &job) const
    {
        return job.tokens - token <= stage;
    }
    __device__ void advance(const lp_fused_job &job)
    {
        if (ends_sample(job)) {
            token = 0;
            ++sample;
        } else {
            token += stage;
        }
    }
};

/* A sample is over: its gradient goes into g and s. */
template <unsigned m_tiles, unsigned n_tiles>
static __device__ __forceinline__ void lp_fused_gather(const float (&sums)[m_tiles][n_tiles][4],
                                                       float (&g)[m_tiles][n_tiles][4],
                                                       float (&s)[m_tiles][n_tiles][4])
{
#pragma unroll
    for (unsigned m = 0; m < m_tiles; m++)
#pragma unroll
        for (unsigned n = 0; n < n_tiles; n++)
#pragma unroll
            for (unsigned r = 0; r < 4; r++) {
                float gradient = sums[m][n][r];

                g[m][n][r] += gradient;
                s[m][n][r] += gradient * gradient;
            }
}

/* Multiply the tile's g and s with the weight, and add its rows and columns up.  A warp has the products of 16 x 8 from
 * (warp_row, warp_column) on; `row_slots` warps share a row and `column_slots` a column, this one is number row_slot and
 * column_slot of them.  shared: (row_slots + column_slots) x 128 float64. */
template <lp_dtype dtype, unsigned row_slots, unsigned column_slots, unsigned m_tiles, unsigned n_tiles>
static __device__ __forceinline__ void
lp_fused_finish(const lp_fused_job &job, const float (&g)[m_tiles][n_tiles][4],
                const float (&s)[m_tiles][n_tiles][4], unsigned warp_row, unsigned warp_column,
                unsigned row_slot, unsigned column_slot, unsigned char *shared)
{
    double (*rows)[LP_FUSED_TILE] = (double (*)[LP_FUSED_TILE])shared;
    double (*columns)[LP_FUSED_TILE] = rows + row_slots;
    const unsigned row_tile = blockIdx.x / job.column_tiles, column_tile = blockIdx.x % job.column_tiles;
    const size_t row0 = (size_t)row_tile * LP_FUSED_TILE, column0 = (size_t)column_tile * LP_FUSED_TILE;
    const unsigned lane = threadIdx.x % 32;
    const float share = 1.0f / (float)job.samples;
    double row_sums[m_tiles][2] = {}, column_sums[n_tiles][2] = {};

#pragma unroll
    for (unsigned m = 0; m < m_tiles; m++) {
#pragma unroll
        for (unsigned n = 0; n < n_tiles; n++) {
#pragma unroll
            for (unsigned r = 0; r < 4; r++) {
                size_t row = row0 + warp_row + m * 16 + lp_fused_sum_row(lane, r);
                size_t column = column0 + warp_column + n * 8 + lp_fused_sum_column(lane, r);
                float w, e;

                if (row >= job.rows || column >= job.columns)
                    continue;
                w = lp_element_of<dtype>::load(job.weight, row * job.weight_stride + column);
                e = fabsf(g[m][n][r] * share * w - 0.5f * w * (s[m][n][r] * share) * w);
                row_sums[m][r / 2] += (double)e;
                column_sums[n][r % 2] += (double)e;
            }
        }
    }
#pragma unroll
    for (unsigned m = 0; m < m_tiles; m++) {
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
            double sum = row_sums[m][half];

            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            if (lane % 4 == 0)
                rows[row_slot][warp_row + m * 16 + lp_fused_sum_row(lane, half * 2)] = sum;
        }
    }
#pragma unroll
    for (unsigned n = 0; n < n_tiles; n++) {
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
            double sum = column_sums[n][half];

            sum += __shfl_xor_sync(0xffffffffu, sum, 4);
            sum += __shfl_xor_sync(0xffffffffu, sum, 8);
            sum += __shfl_xor_sync(0xffffffffu, sum, 16);
            if (lane / 4 == 0)
                columns[column_slot][warp_column + n * 8 + lp_fused_sum_column(lane, half)] = sum;
        }
    }
    __syncthreads();
    if (threadIdx.x < LP_FUSED_TILE) {
        unsigned i = threadIdx.x;
        double sum = 0;

#pragma unroll
        for (unsigned slot = 0; slot < row_slots; slot++)
            sum += rows[slot][i];
        if (row0 + i < job.rows)
            job.row_parts[column_tile * job.rows + row0 + i] = sum;
    } else {
        unsigned i = threadIdx.x - LP_FUSED_TILE;
        double sum = 0;

#pragma unroll
        for (unsigned slot = 0; slot < column_slots; slot++)
            sum += columns[slot][i];
        if (column0 + i < job.columns)
            job.column_parts[row_tile * job.columns + column0 + i] = sum;
    }
}

/* hopper.cu: the same scores by the tensor cores of compute capability 9.0; whether this build has that kernel. */
bool lp_hopper_built(void);
cudaError_t lp_hopper_prepare(void);
void lp_hopper_launch(const lp_fused_job &job, lp_dtype dtype, unsigned blocks, cudaStream_t stream);

#endif
