/* Compiling part of a file for an instruction set the build as a whole does not assume, with GCC or Clang. */
#ifndef LP_KERNELS_CPU_SIMD_H
#define LP_KERNELS_CPU_SIMD_H

#if defined(__x86_64__) || defined(_M_X64)
#define LP_X86 1
#endif
#if defined(__aarch64__)
#define LP_ARM 1
#endif

#define LP_PRAGMA(text) _Pragma(#text)

/* Every function between LP_TARGET_BEGIN("avx2,fma") and LP_TARGET_END may use those instructions. */
#if defined(__clang__)
#define LP_TARGET_BEGIN(features)                                                                            \
    LP_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LP_TARGET_END LP_PRAGMA(clang attribute pop)
#define LP_UNROLL LP_PRAGMA(clang loop unroll(full))
#else
#define LP_TARGET_BEGIN(features) LP_PRAGMA(GCC push_options) LP_PRAGMA(GCC target(features))
#define LP_TARGET_END LP_PRAGMA(GCC pop_options)
#define LP_UNROLL LP_PRAGMA(GCC unroll 16)
#endif

#define LP_TARGET_AVX2 "avx2,fma,f16c,popcnt,bmi,bmi2"
#define LP_TARGET_AVX512 "avx2,fma,f16c,popcnt,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl"
#define LP_TARGET_VBMI2 "avx2,fma,f16c,popcnt,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2"

#endif
