/* 12 x 32 tiles: 24 of the 32 ZMM registers accumulate, two hold x, one a broadcast of dy. */
#include "kernels/cpu/half.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/tile.h"

#ifdef LP_X86
#include <immintrin.h>

LP_TARGET_BEGIN(LP_TARGET_AVX512)

static inline __m512 widen_bf16(const uint16_t *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));

    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline __m512 widen_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

#define TILE_NAME(x) x##_f32
#define TILE_TABLE lp_tile_avx512
#define TILE_REAL float
#define TILE_DTYPE LP_F32
#define TILE_ROWS 12
#define TILE_VECTORS 2
#define TILE_LANES 16
#define TILE_V __m512
#define V_ZERO() _mm512_setzero_ps()
#define V_LOAD(p) _mm512_loadu_ps(p)
#define V_STORE(p, v) _mm512_storeu_ps((p), (v))
#define V_SET(x) _mm512_set1_ps(x)
#define V_ADD(a, b) _mm512_add_ps((a), (b))
#define V_SUB(a, b) _mm512_sub_ps((a), (b))
#define V_MUL(a, b) _mm512_mul_ps((a), (b))
#define V_ABS(v) _mm512_abs_ps(v)
#define V_FMA(a, b, c) _mm512_fmadd_ps((a), (b), (c))
#define V_SUM(v) _mm512_reduce_add_ps(v)
#define V_BF16(p) widen_bf16(p)
#define V_F16(p) widen_f16(p)
#include "kernels/cpu/tile_body.h"

#define TILE_NAME(x) x##_f64
#define TILE_TABLE lp_tile_avx512_f64
#define TILE_REAL double
#define TILE_DTYPE LP_F64
#define TILE_ROWS 12
#define TILE_VECTORS 2
#define TILE_LANES 8
#define TILE_V __m512d
#define V_ZERO() _mm512_setzero_pd()
#define V_LOAD(p) _mm512_loadu_pd(p)
#define V_STORE(p, v) _mm512_storeu_pd((p), (v))
#define V_SET(x) _mm512_set1_pd(x)
#define V_ADD(a, b) _mm512_add_pd((a), (b))
#define V_SUB(a, b) _mm512_sub_pd((a), (b))
#define V_MUL(a, b) _mm512_mul_pd((a), (b))
#define V_ABS(v) _mm512_abs_pd(v)
#define V_FMA(a, b, c) _mm512_fmadd_pd((a), (b), (c))
#define V_SUM(v) _mm512_reduce_add_pd(v)
#include "kernels/cpu/tile_body.h"

LP_TARGET_END
#else
typedef int lp_tile_avx512_unused; /* ISO C forbids an empty file */
#endif
