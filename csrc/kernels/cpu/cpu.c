#include "kernels/cpu/cpu.h"

#include <string.h>

#include "kernels/cpu/pack.h"
#include "kernels/cpu/reduce.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/tile.h"

#ifdef LP_X86
#include <cpuid.h>
#endif

/* One table: its operations bind the generic drivers to one instruction set's parts. */
#define TABLE(label, text, tiles, tiles_f64, reduce, pack)                                                   \
    static lp_status linear_scores_##label(const lp_linear *linear, double *row, double *col,                \
                                           const lp_exec *exec, lp_error *err)                               \
    {                                                                                                        \
        return lp_linear_scores(&tiles, &tiles_f64, linear, row, col, exec, err);                            \
    }                                                                                                        \
    static lp_status dot_columns_##label(const void *a, const void *b, lp_dtype dtype, size_t rows,          \
                                         size_t columns, double *out, const lp_exec *exec, lp_error *err)    \
    {                                                                                                        \
        (void)exec;                                                                                          \
        return lp_reduce_dot_columns(&reduce, a, b, dtype, rows, columns, out, err);                         \
    }                                                                                                        \
    static lp_status tensor_scores_##label(lp_values weight, lp_values grad, lp_values square,               \
                                           const size_t *shape, size_t ndim, lp_score_kind kind,             \
                                           double *const *outs, const lp_exec *exec, lp_error *err)          \
    {                                                                                                        \
        (void)exec;                                                                                          \
        return lp_reduce_tensor_scores(&reduce, weight, grad, square, shape, ndim, kind, outs, err);         \
    }                                                                                                        \
    static lp_status accumulate_square_##label(void *acc, lp_dtype acc_dtype, lp_values grad, double scale,  \
                                               size_t count, const lp_exec *exec, lp_error *err)             \
    {                                                                                                        \
        (void)exec;                                                                                          \
        return lp_reduce_accumulate_square(&reduce, acc, acc_dtype, grad, scale, count, err);                \
    }                                                                                                        \
    static lp_status compact_##label(void *data, size_t width, const size_t *shape, size_t ndim,             \
                                     const lp_kept *kept, const lp_exec *exec, lp_error *err)                \
    {                                                                                                        \
        return lp_compact(&pack, data, width, shape, ndim, kept, exec, err);                                 \
    }                                                                                                        \
    static lp_status compact_into_##label(void *target, const void *source, size_t width,                    \
                                          const size_t *shape, size_t ndim, const lp_kept *kept,             \
                                          const lp_exec *exec, lp_error *err)                                \
    {                                                                                                        \
        return lp_compact_into(&pack, target, source, width, shape, ndim, kept, exec, err);                  \
    }                                                                                                        \
    static const lp_backend table_##label = {                                                                \
        .version = LP_BACKEND_VERSION,                                                                       \
        .size = sizeof(lp_backend),                                                                          \
        .name = text,                                                                                        \
        .linear_scores = linear_scores_##label,                                                              \
        .dot_columns = dot_columns_##label,                                                                  \
        .tensor_scores = tensor_scores_##label,                                                              \
        .accumulate_square = accumulate_square_##label,                                                      \
        .compact = compact_##label,                                                                          \
        .compact_into = compact_into_##label,                                                                \
    };

TABLE(plain, "plain", lp_tile_plain, lp_tile_plain_f64, lp_reduce_plain, lp_pack_plain)
#ifdef LP_X86
TABLE(avx2, "avx2", lp_tile_avx2, lp_tile_avx2_f64, lp_reduce_avx2, lp_pack_avx2)
TABLE(avx512, "avx512", lp_tile_avx512, lp_tile_avx512_f64, lp_reduce_avx512, lp_pack_avx2)
TABLE(vbmi2, "avx512", lp_tile_avx512, lp_tile_avx512_f64, lp_reduce_avx512, lp_pack_vbmi2)
#endif
#ifdef LP_ARM
/* The baseline of AArch64 has NEON, so the reductions are vectorised as they are. */
TABLE(neon, "neon", lp_tile_neon, lp_tile_neon_f64, lp_reduce_plain, lp_pack_neon)
#endif

#ifdef LP_X86
/* __builtin_cpu_supports knows no "f16c" in Clang 14.  That the system saves the registers is implied by AVX2. */
static bool has_f16c(void)
{
    unsigned eax, ebx, ecx, edx;

    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

lp_simd lp_cpu_best(void)
{
#ifdef LP_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() &&
        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt")) {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return LP_SIMD_AVX512;
        return LP_SIMD_AVX2;
    }
#elif defined(LP_ARM)
    return LP_SIMD_NEON;
#endif
    return LP_SIMD_PLAIN;
}

const lp_backend *lp_cpu_table(lp_simd level)
{
    lp_simd best = lp_cpu_best();

    if (level > best)
        level = best;
#ifdef LP_X86
    if (level == LP_SIMD_AVX512)
        return __builtin_cpu_supports("avx512vbmi2") ? &table_vbmi2 : &table_avx512;
    if (level == LP_SIMD_AVX2)
        return &table_avx2;
#elif defined(LP_ARM)
    if (level == LP_SIMD_NEON)
        return &table_neon;
#endif
    return &table_plain;
}

static const char *const names[] = {"plain", "neon", "avx2", "avx512"};

bool lp_simd_parse(const char *text, lp_simd *level)
{
    for (int i = 0; i < 4; i++) {
        if (strcmp(text, names[i]) == 0) {
            *level = (lp_simd)i;
            return true;
        }
    }
    return false;
}
