/* Who handles what in the second-order kernel for compute capability 9.0: the same functions on the device and in the host's
 * tests.
 *
 * Two warpgroups score a tile of 128 rows (m, output features) x 128 columns (n, input features), 64 rows each.  dy and x
 * arrive as [tokens][features]: both operands of the products are "MN-major".  An operand's stage of 64 tokens lies in two
 * blocks of 64 features, [token][64 features], each token's 128 bytes in the order of the 128-byte swizzle. */
#ifndef LP_KERNELS_CUDA_HOPPER_INDEX_H
#define LP_KERNELS_CUDA_HOPPER_INDEX_H

#include "kernels/cuda/fused_index.h"

enum {
    LP_HOPPER_TOKENS = 64, /* of a pipeline stage */
    LP_HOPPER_STAGES = 4,
    LP_HOPPER_AHEAD =
        2, /* stages whose copies are under way; the others are being multiplied, or just were */
    LP_HOPPER_ROW = 128, /* bytes of 64 features of one token */
    LP_HOPPER_BLOCK = LP_HOPPER_TOKENS * LP_HOPPER_ROW,
    LP_HOPPER_OPERAND = 2 * LP_HOPPER_BLOCK,
    LP_HOPPER_STAGE = 2 * LP_HOPPER_OPERAND,
    LP_HOPPER_ALIGN = 1024, /* of what is swizzled: the pattern repeats after as many bytes */
    LP_HOPPER_N_TILES = 16, /* of a warp's products: 8 columns each */
    LP_HOPPER_STEP = 16     /* tokens of one product */
};

/* Byte within an operand's stage of features 8 chunk .. 8 chunk + 7 of a token. */
LP_HD unsigned lp_hopper_place(unsigned token, unsigned chunk)
{
    return chunk / 8 * LP_HOPPER_BLOCK + token * LP_HOPPER_ROW + (((chunk & 7u) ^ (token & 7u)) << 4);
}

/* The vector-th of the four copies of 16 bytes that a thread makes for each operand and stage. */
LP_HD unsigned lp_hopper_copy_token(unsigned thread, unsigned vector)
{
    return (thread + vector * LP_FUSED_THREADS) / 16;
}
LP_HD unsigned lp_hopper_copy_chunk(unsigned thread)
{
    return thread % 16;
}

/* Byte within a stage where step's 16 tokens of a warpgroup's rows begin, and of the columns. */
LP_HD unsigned lp_hopper_a_begin(unsigned warpgroup, unsigned step)
{
    return warpgroup * LP_HOPPER_BLOCK + step * LP_HOPPER_STEP * LP_HOPPER_ROW;
}
LP_HD unsigned lp_hopper_b_begin(unsigned step)
{
    return LP_HOPPER_OPERAND + step * LP_HOPPER_STEP * LP_HOPPER_ROW;
}

/* The matrix descriptor (PTX ISA, "Matrix descriptor" of wgmma) of an operand that begins at a shared address: the address,
 * the distance of blocks of 64 features ("leading"), that of 8 tokens ("stride"), each in 16 bytes, and the swizzle. */
LP_HD uint64_t lp_hopper_descriptor(unsigned address)
{
    return (uint64_t)(address >> 4 & 0x3fffu) | (uint64_t)(LP_HOPPER_BLOCK >> 4) << 16 |
           (uint64_t)(8 * LP_HOPPER_ROW >> 4) << 32 | (uint64_t)1 << 62;
}

/* First row, within the tile, of what a warp's accumulators hold. */
LP_HD unsigned lp_hopper_warp_row(unsigned warp)
{
    return warp * 16;
}

#endif
