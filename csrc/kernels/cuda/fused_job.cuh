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

/* One strip of the weight, scored in tiles of 128 x 128. */
struct lp_fused_job {
    const void *weight;
    const uint16_t *x, *dy;
    size_t rows, columns; /* of the strip; dy begins at its first row */
    size_t weight_stride, x_stride, dy_stride;
    size_t samples, tokens;
    float share; /* 1 / samples; of first order, whose tokens are one sample's, 1 / what they were */
    bool second; /* order */
    bool pairs;  /* two elements of the weight side by side can be read at once */
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

/* A sample is over: its gradient goes into g, and for second order its square into s. */
template <unsigned m_tiles, unsigned n_tiles>
static __device__ __forceinline__ void
lp_fused_gather(const lp_fused_job &job, const float (&sums)[m_tiles][n_tiles][4],
                float (&g)[m_tiles][n_tiles][4], float (&s)[m_tiles][n_tiles][4])
{
#pragma unroll
    for (unsigned m = 0; m < m_tiles; m++)
#pragma unroll
        for (unsigned n = 0; n < n_tiles; n++)
#pragma unroll
            for (unsigned r = 0; r < 4; r++) {
                float gradient = sums[m][n][r];

                g[m][n][r] += gradient;
                if (job.second)
                    s[m][n][r] += gradient * gradient;
            }
}

/* A thread's part of a tile's weight: of each 16 x 8 two pairs of elements side by side, the first in the low half; zeros beyond
 * the weight's edges.  All reads are under way before the first is waited for. */
template <unsigned m_tiles, unsigned n_tiles>
static __device__ __forceinline__ void lp_fused_weight(const lp_fused_job &job, size_t row0, size_t column0,
                                                       uint32_t (&pairs)[m_tiles][n_tiles][2])
{
    const unsigned lane = threadIdx.x % 32, row = lp_fused_sum_row(lane, 0),
                   column = lp_fused_sum_column(lane, 0);
    const unsigned rows = lp_fused_within(row0, job.rows), columns = lp_fused_within(column0, job.columns);
    const uint16_t *const at =
        (const uint16_t *)job.weight + (row0 + row) * job.weight_stride + column0 + column;

    if (job.pairs && rows >= m_tiles * 16 && columns >= n_tiles * 8) {
#pragma unroll
        for (unsigned m = 0; m < m_tiles; m++)
#pragma unroll
            for (unsigned half = 0; half < 2; half++)
#pragma unroll
                for (unsigned n = 0; n < n_tiles; n++)
                    pairs[m][n][half] =
                        *(const uint32_t *)(at + (m * 16 + half * 8) * job.weight_stride + n * 8);
        return;
    }
#pragma unroll
    for (unsigned m = 0; m < m_tiles; m++) {
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
            const uint16_t *const from = at + (m * 16 + half * 8) * job.weight_stride;
            const bool inside = row + m * 16 + half * 8 < rows;

#pragma unroll
            for (unsigned n = 0; n < n_tiles; n++) {
                uint32_t low = 0, high = 0;

                if (inside && column + n * 8 < columns)
                    low = from[n * 8];
                if (inside && column + n * 8 + 1 < columns)
                    high = from[n * 8 + 1];
                pairs[m][n][half] = low | high << 16;
            }
        }
    }
}

/* A warp has a tile's part of the weight brought to where reading it will not take long. */
static __device__ __forceinline__ void lp_fused_prefetch(const lp_fused_job &job, size_t row0, size_t column0)
{
    const unsigned lane = threadIdx.x % 32;

    for (unsigned line = lane; line < 2 * LP_FUSED_TILE; line += 32) { /* of 128 bytes */
        size_t row = row0 + line / 2, column = column0 + line % 2 * 64;

        if (row < job.rows && column < job.columns)
            lp_prefetch((const uint16_t *)job.weight + row * job.weight_stride + column);
    }
}

/* Multiply the g and s of the tile from (row0, column0) on with the weight, and add its rows and columns up: 16 elements in
 * float32, which is what they come in, the rest in float64, all in a fixed order.  256 threads call it: a warp has the products
 * of 16 x 8 from (warp_row, warp_column) on; `row_slots` warps share a row and `column_slots` a column, this one is number
 * row_slot and column_slot of them.  shared: (row_slots + column_slots) x 128 float64, which nobody else uses until all are
 * back. */
template <lp_dtype dtype, unsigned row_slots, unsigned column_slots, unsigned m_tiles, unsigned n_tiles>
static __device__ __forceinline__ void
lp_fused_finish(const lp_fused_job &job, const float (&g)[m_tiles][n_tiles][4],
                const float (&s)[m_tiles][n_tiles][4], size_t row0, size_t column0, unsigned warp_row,
                unsigned warp_column, unsigned row_slot, unsigned column_slot, unsigned char *shared)
{
    double (*rows)[LP_FUSED_TILE] = (double (*)[LP_FUSED_TILE])shared;
    double (*columns)[LP_FUSED_TILE] = rows + row_slots;
    const unsigned lane = threadIdx.x % 32, i = threadIdx.x % LP_FUSED_TILE;
    const size_t row_tile = row0 / LP_FUSED_TILE, column_tile = column0 / LP_FUSED_TILE;
    /* |g w / N - w s w / (2 N)|; of first order s is 0.  Beyond the edges the weight is. */
    const float share = job.share, half_share = -0.5f * job.share;
    double row_sums[m_tiles][2] = {}, sum = 0;
    float few[m_tiles][2] = {}; /* the row sums of 8 elements */
    uint32_t weight[m_tiles][n_tiles][2];

    lp_fused_weight(job, row0 + warp_row, column0 + warp_column, weight);
#pragma unroll
    for (unsigned n = 0; n < n_tiles; n++) {
        float column_sums[2] = {};

#pragma unroll
        for (unsigned m = 0; m < m_tiles; m++) {
#pragma unroll
            for (unsigned r = 0; r < 4; r++) {
                const float w = lp_element_of<dtype>::of((uint16_t)(weight[m][n][r / 2] >> r % 2 * 16));
                const float e = fabsf(w * fmaf(half_share * w, s[m][n][r], share * g[m][n][r]));

                few[m][r / 2] += e;
                column_sums[r % 2] += e;
            }
            if (n % 4 == 3) {
#pragma unroll
                for (unsigned half = 0; half < 2; half++) {
                    row_sums[m][half] += (double)few[m][half];
                    few[m][half] = 0.0f;
                }
            }
        }
#pragma unroll
        for (unsigned r = 0; r < 2; r++) {
            column_sums[r] += __shfl_xor_sync(0xffffffffu, column_sums[r], 4);
            column_sums[r] += __shfl_xor_sync(0xffffffffu, column_sums[r], 8);
            column_sums[r] += __shfl_xor_sync(0xffffffffu, column_sums[r], 16);
            if (lane / 4 == 0)
                columns[column_slot][warp_column + n * 8 + lp_fused_sum_column(lane, r)] =
                    (double)column_sums[r];
        }
    }
#pragma unroll
    for (unsigned m = 0; m < m_tiles; m++) {
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
            double in_row = row_sums[m][half];

            in_row += __shfl_xor_sync(0xffffffffu, in_row, 1);
            in_row += __shfl_xor_sync(0xffffffffu, in_row, 2);
            if (lane % 4 == 0)
                rows[row_slot][warp_row + m * 16 + lp_fused_sum_row(lane, half * 2)] = in_row;
        }
    }
    lp_sync_workers();
    if (threadIdx.x < LP_FUSED_TILE) {
#pragma unroll
        for (unsigned slot = 0; slot < row_slots; slot++)
            sum += rows[slot][i];
        if (row0 + i < job.rows && column0 < job.columns)
            job.row_parts[column_tile * job.rows + row0 + i] = sum;
    } else {
#pragma unroll
        for (unsigned slot = 0; slot < column_slots; slot++)
            sum += columns[slot][i];
        if (column0 + i < job.columns && row0 < job.rows)
            job.column_parts[row_tile * job.columns + column0 + i] = sum;
    }
    lp_sync_workers();
}

/* hopper.cu: the scores of first and second order by the tensor cores of compute capability 9.0.  Prepared, the context says how
 * many clusters run at once; none where device, driver or build have not what it takes.  Launching is false for operands that
 * no tensor map describes, and fused.cu has to do it. */
cudaError_t lp_hopper_prepare(lp_cuda_context *context);
bool lp_hopper_launch(const lp_fused_job &job, lp_dtype dtype, const lp_cuda_context *context,
                      cudaStream_t stream, cudaError_t *error);

#endif
