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

#include <cuda.h>

typedef CUtensorMap lp_tensor_map;

#define LP_LAUNCH(kernel, blocks, threads, shared, stream, ...)                                              \
    kernel<<<(blocks), (threads), (shared), (stream)>>>(__VA_ARGS__)
#define LP_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define LP_GRID_CONSTANT __grid_constant__

static __device__ __forceinline__ unsigned lp_shared_address(const void *shared)
{
    return (unsigned)__cvta_generic_to_shared(shared);
}

/* All of a block's first 256 threads meet; others have no part in it. */
static __device__ __forceinline__ void lp_sync_workers()
{
    asm volatile("bar.sync 1, 256;" ::: "memory");
}

/* Have the line at an address of global memory brought to the L2 cache. */
static __device__ __forceinline__ void lp_prefetch(const void *global)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

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

/* --- clusters of blocks, their barriers and tensor copies (PTX ISA: mbarrier, cp.async.bulk.tensor, setmaxnreg) --- */

static __device__ __forceinline__ unsigned lp_cluster_rank()
{
    unsigned rank;

    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* All threads of a cluster meet. */
static __device__ __forceinline__ void lp_cluster_sync()
{
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}

/* A barrier's phase ends when `count` have arrived and all bytes that it expects have. */
static __device__ __forceinline__ void lp_barrier_init(uint64_t *barrier, unsigned count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(lp_shared_address(barrier)), "r"(count)
                 : "memory");
}

/* What this thread has initialised is seen by the cluster, and by copies, after the next lp_cluster_sync. */
static __device__ __forceinline__ void lp_barriers_ready()
{
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

/* Arrive, and let the phase last until as many bytes more have come. */
static __device__ __forceinline__ void lp_barrier_expect(uint64_t *barrier, unsigned bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(lp_shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

/* Wait for the end of the phase of this parity; of the phase before the first, which is odd, nobody waits. */
static __device__ __forceinline__ void lp_barrier_wait(uint64_t *barrier, unsigned parity)
{
    asm volatile("{\n.reg .pred done;\nwaiting:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra waiting;\n}\n" ::"r"(lp_shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

/* Arrive at the barrier that lies at the same place in another block of the cluster.  It orders no stores: what is told so is
 * that products are done reading. */
static __device__ __forceinline__ void lp_barrier_arrive_at(uint64_t *barrier, unsigned rank)
{
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(lp_shared_address(barrier)),
                 "r"(rank)
                 : "memory");
}

/* Copy the box at (feature, token, sample) of a tensor to the same place in each block whose bit is set, whose barriers at
 * `barrier` count its bytes. */
static __device__ __forceinline__ void lp_tensor_copy(unsigned char *to, const lp_tensor_map *map,
                                                      uint64_t *barrier, int feature, int token, int sample,
                                                      uint16_t blocks)
{
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(lp_shared_address(to)),
        "l"(map), "r"(lp_shared_address(barrier)), "r"(feature), "r"(token), "r"(sample), "h"(blocks)
        : "memory");
}

/* A warpgroup gives registers up, or takes what others gave. */
template <int count> static __device__ __forceinline__ void lp_registers_fewer()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count> static __device__ __forceinline__ void lp_registers_more()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

#endif /* LP_WARPGROUPS */

/* --- the host's side of clusters and tensor copies --- */

/* The driver's function that encodes tensor maps; NULL where it has none. */
static inline void *lp_tensor_map_encoder()
{
    cudaDriverEntryPointQueryResult found;
    void *encode = NULL;

    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault,
                                         &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess) {
        (void)cudaGetLastError();
        return NULL;
    }
    return encode;
}

/* Describe 16-bit values (samples, tokens, features), whose tokens are `stride` elements apart, for copies of boxes of
 * `box_tokens` x `box_features` (128 bytes) that lie in the 128-byte swizzle; beyond the tensor are zeros. */
static inline bool lp_tensor_map_make(lp_tensor_map *map, void *encode, const void *values, lp_dtype dtype,
                                      size_t features, size_t tokens, size_t samples, size_t stride,
                                      unsigned box_features, unsigned box_tokens)
{
    typedef CUresult (*encode_t)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                 const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);
    const cuuint64_t sizes[3] = {features, tokens, samples}, strides[2] = {stride * 2, tokens * stride * 2};
    const cuuint32_t box[3] = {box_features, box_tokens, 1}, steps[3] = {1, 1, 1};

    return ((encode_t)encode)(
               map, dtype == LP_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
               (void *)values, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename job_t>
static inline cudaLaunchConfig_t lp_cluster_config(cudaLaunchAttribute *attribute, unsigned blocks,
                                                   unsigned threads, size_t shared, unsigned cluster,
                                                   cudaStream_t stream)
{
    cudaLaunchConfig_t config = {};

    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim.x = cluster;
    attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attribute;
    config.numAttrs = 1;
    return config;
}

/* Allow a kernel its shared memory, and count the clusters of its blocks that the device runs at once. */
template <typename job_t>
static inline cudaError_t lp_cluster_prepare(void (*kernel)(const job_t), unsigned threads, size_t shared,
                                             unsigned cluster, int *at_once)
{
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = lp_cluster_config<job_t>(&attribute, cluster, threads, shared, cluster, NULL);
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);

    return error == cudaSuccess ? cudaOccupancyMaxActiveClusters(at_once, kernel, &config) : error;
}

template <typename job_t>
static inline cudaError_t lp_launch_cluster(void (*kernel)(const job_t), unsigned blocks, unsigned threads,
                                            size_t shared, unsigned cluster, cudaStream_t stream,
                                            const job_t &job)
{
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config =
        lp_cluster_config<job_t>(&attribute, blocks, threads, shared, cluster, stream);

    return cudaLaunchKernelEx(&config, kernel, job);
}

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
    static __device__ __forceinline__ float of(uint16_t bits)
    {
        return dtype == LP_BF16 ? __uint_as_float((uint32_t)bits << 16) : lp_half_to_float(bits);
    }
    static __device__ __forceinline__ float load(const void *values, size_t i)
    {
        return of(((const uint16_t *)values)[i]);
    }
};
template <> struct lp_element_of<LP_F32> {
    typedef float real;
    typedef float stored;
    static __device__ __forceinline__ float of(float value)
    {
        return value;
    }
    static __device__ __forceinline__ float load(const void *values, size_t i)
    {
        return ((const float *)values)[i];
    }
};
template <> struct lp_element_of<LP_F64> {
    typedef double real;
    typedef double stored;
    static __device__ __forceinline__ double of(double value)
    {
        return value;
    }
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
