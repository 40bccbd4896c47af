/* What the kernels need of the device beyond CUDA C++ itself, in one place: launches, values, and the warp-wide
 * instructions of the tensor cores.  tests/cuda_host supplies the same names on the CPU, so that the kernels' own source
 * runs there thread by thread. */
#ifndef LP_KERNELS_CUDA_DEVICE_CUH
#define LP_KERNELS_CUDA_DEVICE_CUH

#include <cuda_runtime.h>

extern "C" {
#include "core/backend.h"
}

#ifndef LP_SIMT /* the real thing */

#define LP_LAUNCH(kernel, blocks, threads, shared, stream, ...)                                              \
    kernel<<<(blocks), (threads), (shared), (stream)>>>(__VA_ARGS__)
#define LP_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

/* 16 bytes from global to shared memory, without registers; the last 16 - valid of them become zeros. */
static __device__ __forceinline__ void lp_copy16(unsigned char *shared, const void *global, unsigned valid)
{
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    unsigned address = (unsigned)__cvta_generic_to_shared(shared);

    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid)
                 : "memory");
#endif
}

static __device__ __forceinline__ void lp_copy_commit()
{
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/* Wait until all but the `pending` newest groups of this thread's copies have landed. */
template <int pending> static __device__ __forceinline__ void lp_copy_wait()
{
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

/* Four 8 x 8 matrices of 16-bit values, transposed: lane l gives the address of row l % 8 of matrix l / 8, and gets of
 * each matrix the elements (2 (l % 4), l / 4) in the low half and (2 (l % 4) + 1, l / 4) in the high half. */
static __device__ __forceinline__ void lp_load_transposed(uint32_t (&fragment)[4], const unsigned char *row)
{
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    unsigned address = (unsigned)__cvta_generic_to_shared(row);

    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
#endif
}

/* c (16 x 8, f32) += a (16 x 16) b (16 x 8).  Of lane l, with g = l / 4 and t = l % 4: a[r] holds row g + 8 (r % 2), columns
 * 2 t + 8 (r / 2) and the next; b[r] rows 2 t + 8 r and the next, column g; c[r] row g + 8 (r / 2), column 2 t + r % 2. */
template <lp_dtype dtype>
static __device__ __forceinline__ void lp_multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1)
{
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    if (dtype == LP_BF16)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                     "{%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/* Asynchronous products of a warpgroup, 4 warps beginning at a multiple of 4, which only compute capability 9.0 has. */
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define LP_WARPGROUPS 1
#else
#define LP_WARPGROUPS 0
#endif

#if LP_WARPGROUPS

static __device__ __forceinline__ unsigned lp_shared_address(const void *shared)
{
    return (unsigned)__cvta_generic_to_shared(shared);
}

/* This thread's finished copies become visible to products that are queued behind the next barrier. */
static __device__ __forceinline__ void lp_copies_for_products()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Before products whose accumulators were read or written otherwise. */
static __device__ __forceinline__ void lp_warpgroup_arrive()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void lp_warpgroup_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Wait until all but the `pending` newest groups of this warpgroup's products are done. */
template <int pending> static __device__ __forceinline__ void lp_warpgroup_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/* The sums may be read: no read of them moves to before this. */
static __device__ __forceinline__ void lp_warpgroup_have(float (&d)[16][4])
{
#pragma unroll
    for (int n = 0; n < 16; n++)
#pragma unroll
        for (int r = 0; r < 4; r++)
            asm volatile("" : "+f"(d[n][r])::"memory");
}

#define LP_SUMS4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define LP_SUMS16(n) LP_SUMS4(n), LP_SUMS4(n + 1), LP_SUMS4(n + 2), LP_SUMS4(n + 3)
#define LP_PRODUCT(type)                                                                                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {"                           \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                    \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "          \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "          \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "         \
                 "%64, %65, p, 1, 1, 1, 1;\n}\n"                                                             \
                 : LP_SUMS16(0), LP_SUMS16(4), LP_SUMS16(8), LP_SUMS16(12)                                   \
                 : "l"(a), "l"(b), "r"((int)add)                                                             \
                 : "memory")

/* Queue d (64 x 128, f32) = a (64 x 16) b (16 x 128), added to d where `add`; a and b, described by descriptors, lie with
 * their 16 tokens apart and their features side by side.  Warp w has rows 16 w on; in them d[n] is, as c of lp_multiply_add,
 * of the columns from 8 n on. */
template <lp_dtype dtype>
static __device__ __forceinline__ void lp_warpgroup_multiply_add(float (&d)[16][4], uint64_t a, uint64_t b,
                                                                 bool add)
{
    if (dtype == LP_BF16)
        LP_PRODUCT("bf16");
    else
        LP_PRODUCT("f16");
}

#undef LP_PRODUCT
#undef LP_SUMS16
#undef LP_SUMS4

#endif /* LP_WARPGROUPS */

#endif /* LP_SIMT */

/* --- values -------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ float lp_half_to_float(uint16_t bits)
{
    /* As csrc/kernels/cpu/half.h: exponent and mantissa in a float's place are 2^-112 times the value. */
    uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, rest = (uint32_t)(bits & 0x7fffu) << 13;
    float magnitude = __uint_as_float(rest) * 5.192296858534828e33f;

    if (rest >= 0x0f800000u)
        return __uint_as_float(sign | 0x7f800000u | rest);
    return __uint_as_float(sign | __float_as_uint(magnitude));
}

/* The type a dtype computes in, and its elements as that. */
template <lp_dtype dtype> struct lp_element_of {
    typedef float real;
    typedef uint16_t stored;
    static __device__ __forceinline__ float load(const void *values, size_t i)
    {
        uint16_t bits = ((const uint16_t *)values)[i];

        return dtype == LP_BF16 ? __uint_as_float((uint32_t)bits << 16) : lp_half_to_float(bits);
    }
};
template <> struct lp_element_of<LP_F32> {
    typedef float real;
    typedef float stored;
    static __device__ __forceinline__ float load(const void *values, size_t i)
    {
        return ((const float *)values)[i];
    }
};
template <> struct lp_element_of<LP_F64> {
    typedef double real;
    typedef double stored;
    static __device__ __forceinline__ double load(const void *values, size_t i)
    {
        return ((const double *)values)[i];
    }
};

/* Element i of values of a dtype known only at run time; the branch is the same for all threads. */
static __device__ __forceinline__ double lp_load(const void *values, lp_dtype dtype, size_t i)
{
    switch (dtype) {
    case LP_F64:
        return lp_element_of<LP_F64>::load(values, i);
    case LP_F32:
        return (double)lp_element_of<LP_F32>::load(values, i);
    case LP_BF16:
        return (double)lp_element_of<LP_BF16>::load(values, i);
    default:
        return (double)lp_element_of<LP_F16>::load(values, i);
    }
}

static __device__ __forceinline__ float lp_abs(float x)
{
    return fabsf(x);
}
static __device__ __forceinline__ double lp_abs(double x)
{
    return fabs(x);
}

/* The sum over a warp of each lane's x, on every lane, always added in one order. */
static __device__ __forceinline__ double lp_warp_sum(double x)
{
    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

#endif
