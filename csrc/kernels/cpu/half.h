/* Exact conversion of one 16-bit float to float, and of any element to double. */
#ifndef LP_KERNELS_CPU_HALF_H
#define LP_KERNELS_CPU_HALF_H

#include <string.h>

#include "core/backend.h"

static inline size_t lp_dtype_width(lp_dtype dtype)
{
    return dtype == LP_F64 ? 8 : dtype == LP_F32 ? 4 : 2;
}

static inline float lp_float_from_bits(uint32_t bits)
{
    float value;

    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float lp_float_from_bf16(uint16_t bits)
{
    return lp_float_from_bits((uint32_t)bits << 16);
}

static inline float lp_float_from_f16(uint16_t bits)
{
    /* Moving exponent and mantissa into a float's place leaves a value 2^-112 times the right one, subnormals
     * included; scaling by 2^112 is exact.  Infinities and NaNs need the float's own top exponent instead.  Both are
     * computed and one is chosen by a mask, so that loops over this vectorise. */
    uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, rest = (uint32_t)(bits & 0x7fffu) << 13;
    float magnitude = lp_float_from_bits(rest) * 0x1p112f;
    uint32_t special = 0u - (uint32_t)(rest >= 0x0f800000u), finite;

    memcpy(&finite, &magnitude, sizeof finite);
    return lp_float_from_bits(sign | (finite & ~special) | ((0x7f800000u | rest) & special));
}

#endif
