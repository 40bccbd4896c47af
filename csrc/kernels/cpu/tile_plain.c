/* The tiles in portable C: vectors of 16 bytes, which GCC and Clang lower to
 * whatever the build's baseline has (SSE2, NEON, or scalars). */
#include "kernels/cpu/half.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/tile.h"

typedef float lanes_f32 __attribute__((vector_size(16)));
typedef double lanes_f64 __attribute__((vector_size(16)));

static inline lanes_f32 load_f32(const float *p)
{
    lanes_f32 v;

    memcpy(&v, p, sizeof v);
    return v;
}

static inline lanes_f64 load_f64(const double *p)
{
    lanes_f64 v;

    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store_f32(float *p, lanes_f32 v)
{
    memcpy(p, &v, sizeof v);
}

static inline void store_f64(double *p, lanes_f64 v)
{
    memcpy(p, &v, sizeof v);
}

static inline lanes_f32 widen_bf16(const uint16_t *p)
{
    return (lanes_f32){lp_float_from_bf16(p[0]), lp_float_from_bf16(p[1]), lp_float_from_bf16(p[2]),
                       lp_float_from_bf16(p[3])};
}

static inline lanes_f32 widen_f16(const uint16_t *p)
{
    return (lanes_f32){lp_float_from_f16(p[0]), lp_float_from_f16(p[1]), lp_float_from_f16(p[2]),
                       lp_float_from_f16(p[3])};
}

static inline lanes_f32 magnitude_f32(lanes_f32 v)
{
    typedef int32_t bits __attribute__((vector_size(16)));
    const bits mask = {INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX};

    return (lanes_f32)((bits)v & mask);
}

static inline lanes_f64 magnitude_f64(lanes_f64 v)
{
    typedef int64_t bits __attribute__((vector_size(16)));
    const bits mask = {INT64_MAX, INT64_MAX};

    return (lanes_f64)((bits)v & mask);
}

#define TILE_NAME(x) x##_f32
#define TILE_TABLE lp_tile_plain
#define TILE_REAL float
#define TILE_DTYPE LP_F32
#define TILE_ROWS 4
#define TILE_VECTORS 2
#define TILE_LANES 4
#define TILE_V lanes_f32
#define V_ZERO() ((lanes_f32){0})
#define V_LOAD(p) load_f32(p)
#define V_STORE(p, v) store_f32((p), (v))
#define V_SET(x) ((lanes_f32){(x), (x), (x), (x)})
#define V_ADD(a, b) ((a) + (b))
#define V_SUB(a, b) ((a) - (b))
#define V_MUL(a, b) ((a) * (b))
#define V_ABS(v) magnitude_f32(v)
#define V_FMA(a, b, c) ((a) * (b) + (c))
#define V_SUM(v) (((v)[0] + (v)[1]) + ((v)[2] + (v)[3]))
#define V_BF16(p) widen_bf16(p)
#define V_F16(p) widen_f16(p)
#include "kernels/cpu/tile_body.h"

#define TILE_NAME(x) x##_f64
#define TILE_TABLE lp_tile_plain_f64
#define TILE_REAL double
#define TILE_DTYPE LP_F64
#define TILE_ROWS 4
#define TILE_VECTORS 2
#define TILE_LANES 2
#define TILE_V lanes_f64
#define V_ZERO() ((lanes_f64){0})
#define V_LOAD(p) load_f64(p)
#define V_STORE(p, v) store_f64((p), (v))
#define V_SET(x) ((lanes_f64){(x), (x)})
#define V_ADD(a, b) ((a) + (b))
#define V_SUB(a, b) ((a) - (b))
#define V_MUL(a, b) ((a) * (b))
#define V_ABS(v) magnitude_f64(v)
#define V_FMA(a, b, c) ((a) * (b) + (c))
#define V_SUM(v) ((v)[0] + (v)[1])
#include "kernels/cpu/tile_body.h"
