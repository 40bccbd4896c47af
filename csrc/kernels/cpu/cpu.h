/* The CPU's operation tables: one per instruction set, chosen at run time. */
#ifndef LP_KERNELS_CPU_H
#define LP_KERNELS_CPU_H

#include "core/backend.h"

/* Levels in rising order of preference within one architecture; a machine has PLAIN and either AVX2/AVX512 or NEON.
 * AVX2 asks for FMA and F16C too; AVX512 for F, BW, DQ and VL (and uses VBMI2 where present). */
typedef enum { LP_SIMD_PLAIN = 0, LP_SIMD_NEON, LP_SIMD_AVX2, LP_SIMD_AVX512 } lp_simd;

/* The best level this build and this machine can run. */
lp_simd lp_cpu_best(void);

/* The table for `level`, or for the best level below it where the machine lacks it.  Never NULL; constant, static. */
const lp_backend *lp_cpu_table(lp_simd level);

/* *level from "plain", "neon", "avx2" or "avx512"; false (and *level untouched) for any other text. */
bool lp_simd_parse(const char *text, lp_simd *level);

/* Processors online, at least 1: what exec->threads == 0 stands for. */
int lp_cpu_threads(void);

#endif
