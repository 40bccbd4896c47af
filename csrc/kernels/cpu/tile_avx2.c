/* 6 x 16 tiles: 12 of the 16 YMM registers accumulate, two hold x, one a broadcast of dy. */
#include "kernels/cpu/half.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/tile.h"

#ifdef LP_X86
#include <immintrin.h>

LP_TARGET_BEGIN(LP_TARGET_AVX2)

static inline __m256 widen_bf16(const uint16_t *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));

    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

static inline __m256 widen_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}

static inline float sum_f32(__m256 v)
{
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));

    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    x = _mm_add_ss(x, _mm_movehdup_ps(x));
    return _mm_cvtss_f32(x);
}

static inline double sum_f64(__m256d v)
{
    __m128d x = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));

    return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}

#define TILE_NAME(x) x##_f32
#define TILE_TABLE lp_tile_avx2
#define TILE_REAL float
#define TILE_DTYPE LP_F32
#define TILE_ROWS 6
#define TILE_VECTORS 2
#define TILE_LANES 8
#define TILE_V __m256
#define V_ZERO() _mm256_setzero_ps()
#define V_LOAD(p) _mm256_loadu_ps(p)
#define V_STORE(p, v) _mm256_storeu_ps((p), (v))
#define V_SET(x) _mm256_set1_ps(x)
#define V_ADD(a, b) _mm256_add_ps((a), (b))
#define V_SUB(a, b) _mm256_sub_ps((a), (b))
#define V_MUL(a, b) _mm256_mul_ps((a), (b))
#define V_ABS(v) _mm256_andnot_ps(_mm256_set1_ps(-0.0f), (v))
#define V_FMA(a, b, c) _mm256_fmadd_ps((a), (b), (c))
#define V_SUM(v) sum_f32(v)
#define V_BF16(p) widen_bf16(p)
#define V_F16(p) widen_f16(p)
#include "kernels/cpu/tile_body.h"

#define TILE_NAME(x) x##_f64
#define TILE_TABLE lp_tile_avx2_f64
#define TILE_REAL double
#define TILE_DTYPE LP_F64
#define TILE_ROWS 6
#define TILE_VECTORS 2
#define TILE_LANES 4
#define TILE_V __m256d
#define V_ZERO() _mm256_setzero_pd()
#define V_LOAD(p) _mm256_loadu_pd(p)
#define V_STORE(p, v) _mm256_storeu_pd((p), (v))
#define V_SET(x) _mm256_set1_pd(x)
#define V_ADD(a, b) _mm256_add_pd((a), (b))
#define V_SUB(a, b) _mm256_sub_pd((a), (b))
#define V_MUL(a, b) _mm256_mul_pd((a), (b))
#define V_ABS(v) _mm256_andnot_pd(_mm256_set1_pd(-0.0), (v))
#define V_FMA(a, b, c) _mm256_fmadd_pd((a), (b), (c))
#define V_SUM(v) sum_f64(v)
#include "kernels/cpu/tile_body.h"

LP_TARGET_END
#else
typedef int lp_tile_avx2_unused; /* ISO C forbids an empty file */
#endif
