/* 8 x 12 tiles: 24 of the 32 vector registers accumulate, three hold x, one a broadcast of dy. */
#include "kernels/cpu/half.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/tile.h"

#ifdef LP_ARM
#include <arm_neon.h>

static inline float32x4_t widen_bf16(const uint16_t *p)
{
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}

static inline float32x4_t widen_f16(const uint16_t *p)
{
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

#define TILE_NAME(x) x##_f32
#define TILE_TABLE lp_tile_neon
#define TILE_REAL float
#define TILE_DTYPE LP_F32
#define TILE_ROWS 8
#define TILE_VECTORS 3
#define TILE_LANES 4
#define TILE_V float32x4_t
#define V_ZERO() vdupq_n_f32(0.0f)
#define V_LOAD(p) vld1q_f32(p)
#define V_STORE(p, v) vst1q_f32((p), (v))
#define V_SET(x) vdupq_n_f32(x)
#define V_ADD(a, b) vaddq_f32((a), (b))
#define V_SUB(a, b) vsubq_f32((a), (b))
#define V_MUL(a, b) vmulq_f32((a), (b))
#define V_ABS(v) vabsq_f32(v)
#define V_FMA(a, b, c) vfmaq_f32((c), (a), (b))
#define V_SUM(v) vaddvq_f32(v)
#define V_BF16(p) widen_bf16(p)
#define V_F16(p) widen_f16(p)
#include "kernels/cpu/tile_body.h"

#define TILE_NAME(x) x##_f64
#define TILE_TABLE lp_tile_neon_f64
#define TILE_REAL double
#define TILE_DTYPE LP_F64
#define TILE_ROWS 8
#define TILE_VECTORS 3
#define TILE_LANES 2
#define TILE_V float64x2_t
#define V_ZERO() vdupq_n_f64(0.0)
#define V_LOAD(p) vld1q_f64(p)
#define V_STORE(p, v) vst1q_f64((p), (v))
#define V_SET(x) vdupq_n_f64(x)
#define V_ADD(a, b) vaddq_f64((a), (b))
#define V_SUB(a, b) vsubq_f64((a), (b))
#define V_MUL(a, b) vmulq_f64((a), (b))
#define V_ABS(v) vabsq_f64(v)
#define V_FMA(a, b, c) vfmaq_f64((c), (a), (b))
#define V_SUM(v) vaddvq_f64(v)
#include "kernels/cpu/tile_body.h"

#else
typedef int lp_tile_neon_unused; /* ISO C forbids an empty file */
#endif
