/* Who handles what in the kernel for compute capability 9.0: the same functions on the device and in the host's tests.
 *
 * A thread block scores a tile of 128 rows (m, output features) x 128 columns (n, input features): two warpgroups multiply, 64
 * rows each, and a third has the operands copied.  Four blocks are a cluster, which scores 2 x 2 tiles.  dy and x arrive as
 * [tokens][features]: both operands of the products are "MN-major".  An operand's stage of 64 tokens lies in two panels of 64
 * features, [token][64 features], each token's 128 bytes in the order of the 128-byte swizzle.  The two blocks that need an
 * operand copy one panel each, into both. */
#ifndef LP_KERNELS_CUDA_HOPPER_INDEX_H
#define LP_KERNELS_CUDA_HOPPER_INDEX_H

#include "kernels/cuda/fused_index.h"

enum {
    LP_HOPPER_THREADS = 384,
    LP_HOPPER_CLUSTER = 4, /* blocks: 2 x 2 */
    LP_HOPPER_TOKENS = 64, /* of a pipeline stage */
    LP_HOPPER_STAGES = 6,
    LP_HOPPER_PANEL_FEATURES = 64,
    LP_HOPPER_ROW = 128, /* bytes of 64 features of one token */
    LP_HOPPER_PANEL = LP_HOPPER_TOKENS * LP_HOPPER_ROW,
    LP_HOPPER_OPERAND = 2 * LP_HOPPER_PANEL,
    LP_HOPPER_STAGE = 2 * LP_HOPPER_OPERAND,
    LP_HOPPER_ALIGN = 1024, /* of what is swizzled: the pattern repeats after as many bytes */
    LP_HOPPER_STEP = 16,    /* tokens of one product */
    /* Arrivals that empty a stage: from each of 8 multiplying warps of each of 3 blocks. */
    LP_HOPPER_READERS = 8 * 3,
    LP_HOPPER_BAND =
        8 /* clusters side by side before the next row of them begins: their operands stay in the L2 cache */
};

/* Row and column, in tiles, of a block within its cluster. */
LP_HD unsigned lp_hopper_block_row(unsigned rank)
{
    return rank / 2;
}
LP_HD unsigned lp_hopper_block_column(unsigned rank)
{
    return rank % 2;
}

/* Blocks, as bits, that get the panels of dy, and of x, which a block has copied. */
LP_HD uint16_t lp_hopper_dy_readers(unsigned rank)
{
    return (uint16_t)(3u << (rank & 2u));
}
LP_HD uint16_t lp_hopper_x_readers(unsigned rank)
{
    return (uint16_t)(5u << (rank & 1u));
}

/* The panel that a block has copied, of dy and of x. */
LP_HD unsigned lp_hopper_dy_panel(unsigned rank)
{
    return rank % 2;
}
LP_HD unsigned lp_hopper_x_panel(unsigned rank)
{
    return rank / 2;
}

/* The i-th (of 3) block that copies something into a block's stages, and so waits for them to be read. */
LP_HD unsigned lp_hopper_feeder(unsigned rank, unsigned i)
{
    return rank ^ i;
}

/* Place, in tiles of 2 x 2, of the index-th of rows x columns of them: down the bands, across each. */
LP_HD void lp_hopper_place(unsigned index, unsigned rows, unsigned columns, unsigned *row, unsigned *column)
{
    unsigned band = index / (rows * LP_HOPPER_BAND), within = index % (rows * LP_HOPPER_BAND);
    unsigned left = columns - band * LP_HOPPER_BAND,
             width = left < LP_HOPPER_BAND ? left : (unsigned)LP_HOPPER_BAND;

    *row = within / width;
    *column = band * LP_HOPPER_BAND + within % width;
}

/* Byte within a stage where step's 16 tokens of a warpgroup's rows begin, and of the columns. */
LP_HD unsigned lp_hopper_a_begin(unsigned warpgroup, unsigned step)
{
    return warpgroup * LP_HOPPER_PANEL + step * LP_HOPPER_STEP * LP_HOPPER_ROW;
}
LP_HD unsigned lp_hopper_b_begin(unsigned step)
{
    return LP_HOPPER_OPERAND + step * LP_HOPPER_STEP * LP_HOPPER_ROW;
}

/* The matrix descriptor (PTX ISA, "Matrix descriptor" of wgmma) of an operand that begins at a shared address: the address,
 * the distance of panels of 64 features ("leading"), that of 8 tokens ("stride"), each in 16 bytes, and the swizzle. */
LP_HD uint64_t lp_hopper_descriptor(unsigned address)
{
    return (uint64_t)(address >> 4 & 0x3fffu) | (uint64_t)(LP_HOPPER_PANEL >> 4) << 16 |
           (uint64_t)(8 * LP_HOPPER_ROW >> 4) << 32 | (uint64_t)1 << 62;
}

/* First row, within the tile, of what a multiplying warp's accumulators hold. */
LP_HD unsigned lp_hopper_warp_row(unsigned warp)
{
    return warp * 16;
}

#endif
