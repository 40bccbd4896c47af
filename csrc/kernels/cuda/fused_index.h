/* Who handles what in the fused second-order kernel: the same functions on the device and in the host's tests.
 *
 * A thread block of 8 warps scores a tile of 128 rows (m, output features) x 128 columns (n, input features); warp w has
 * rows 32 (w / 2) and columns 64 (w % 2) of it.  dy and x arrive as [tokens][features], so both operands lie token by
 * token in shared memory and are transposed as they are loaded into fragments. */
#ifndef LP_KERNELS_CUDA_FUSED_INDEX_H
#define LP_KERNELS_CUDA_FUSED_INDEX_H

#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#define LP_HD static __host__ __device__ __forceinline__
#else
#define LP_HD static inline
#endif

enum {
    LP_FUSED_THREADS = 256,
    LP_FUSED_M_TILES = 2,   /* of a warp: 16 rows each */
    LP_FUSED_N_TILES = 8,   /* 8 columns each */
    LP_FUSED_PITCH = 256,   /* bytes of 128 features of one token */
    LP_FUSED_OPERAND = 8192 /* bytes of one operand's pipeline stage: 32 tokens */
};

/* Byte within an operand's stage of features 8 chunk .. 8 chunk + 7 of a token: chunks change places with the token so that
 * eight tokens' chunks of one column lie in different banks. */
LP_HD unsigned lp_fused_place(unsigned token, unsigned chunk)
{
    return token * LP_FUSED_PITCH + ((chunk ^ (token & 7u)) << 4);
}

/* The vector-th of the two copies of 16 bytes that a thread makes for each operand and stage. */
LP_HD unsigned lp_fused_copy_token(unsigned thread, unsigned vector)
{
    return (thread + vector * LP_FUSED_THREADS) / 16;
}
LP_HD unsigned lp_fused_copy_chunk(unsigned thread)
{
    return thread % 16;
}

LP_HD unsigned lp_fused_warp_row(unsigned warp)
{
    return warp / 2 * 32;
}
LP_HD unsigned lp_fused_warp_column(unsigned warp)
{
    return warp % 2 * 64;
}

/* Of the 16 tokens from `token` on, the address a lane gives for the fragments of the 16 rows from `row` on: registers 0
 * to 3 are then a's (rows +0, tokens +0), (rows +8, tokens +0), (rows +0, tokens +8), (rows +8, tokens +8). */
LP_HD unsigned lp_fused_a_place(unsigned lane, unsigned token, unsigned row)
{
    return lp_fused_place(token + lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2);
}

/* The same for two n tiles, the 16 columns from `column` on: registers 0 and 1 are the first one's b, 2 and 3 the other's. */
LP_HD unsigned lp_fused_b_place(unsigned lane, unsigned token, unsigned column)
{
    return lp_fused_place(token + lane % 16, column / 8 + lane / 16);
}

/* Row and column, within a 16 x 8 product, of register r of a lane's accumulator. */
LP_HD unsigned lp_fused_sum_row(unsigned lane, unsigned r)
{
    return lane / 4 + r / 2 * 8;
}
LP_HD unsigned lp_fused_sum_column(unsigned lane, unsigned r)
{
    return lane % 4 * 2 + r % 2;
}

/* How many of a tile's 128 rows or columns from `first` on are below `limit`. */
LP_HD unsigned lp_fused_within(size_t first, size_t limit)
{
    if (first >= limit)
        return 0;
    return limit - first < 128 ? (unsigned)(limit - first) : 128u;
}

/* Bytes of a vector of 8 features from `feature` on that lie below `limit`. */
LP_HD unsigned lp_fused_valid(size_t feature, size_t limit)
{
    if (feature >= limit)
        return 0;
    return limit - feature >= 8 ? 16u : (unsigned)(limit - feature) * 2u;
}

#endif
