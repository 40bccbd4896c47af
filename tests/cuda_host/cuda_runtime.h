/* What csrc/kernels/cuda takes from CUDA, on the CPU: the .cu files are compiled as C++ with this header in the place of the
 * real one, and their kernels run thread by thread, each thread a fiber of its own (simt.cpp).
 *
 * Thread blocks, or clusters of them, run one after the other in a random order, threads of a block in a random order between the points where
 * they wait for each other.  Asynchronous copies land when they are waited for, no sooner.  Warp-wide instructions follow
 * the PTX ISA's tables of fragments, and end the program when the lanes of a warp do not meet in them.  Shared memory that is
 * asked for at launch is filled with NaN before each block. */
#ifndef LP_TESTS_CUDA_RUNTIME_H
#define LP_TESTS_CUDA_RUNTIME_H

#define LP_SIMT

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>

extern "C" {
#include "core/backend.h"
}

/* --- the language --------------------------------------------------------------------------------------------------- */

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static /* one block runs at a time */

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_)
    {
    }
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

extern dim3 gridDim, blockDim;
extern const dim3 &simt_thread_index(), &simt_block_index();
#define threadIdx (simt_thread_index())
#define blockIdx (simt_block_index())

void simt_launch(dim3 blocks, unsigned threads, size_t shared, const std::function<void()> &kernel,
                 unsigned cluster = 1);
unsigned char *simt_shared();
#define LP_LAUNCH(kernel, blocks, threads, shared, stream, ...)                                              \
    ((void)(stream), simt_launch((blocks), (threads), (shared), [&] { kernel(__VA_ARGS__); }))
#define LP_DYNAMIC_SHARED(name) unsigned char *name = simt_shared()
#define LP_GRID_CONSTANT

void __syncthreads();
double simt_shuffle_xor(double value, unsigned step);
static inline double __shfl_xor_sync(unsigned, double value, unsigned step)
{
    return simt_shuffle_xor(value, step);
}

static inline float __shfl_xor_sync(unsigned, float value, unsigned step)
{
    return (float)simt_shuffle_xor(value, step);
}

static inline float __uint_as_float(uint32_t bits)
{
    float value;

    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline uint32_t __float_as_uint(float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* --- device.cuh's instructions ---------------------------------------------------------------------------------------- */

void lp_copy16(unsigned char *shared, const void *global, unsigned valid);
void lp_copy_commit();
void simt_copy_wait(unsigned pending);
template <int pending> static inline void lp_copy_wait()
{
    simt_copy_wait(pending);
}
void lp_load_transposed(uint32_t (&fragment)[4], const unsigned char *row);
void simt_multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool brain);
template <lp_dtype dtype>
static inline void lp_multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    simt_multiply_add(c, a, b0, b1, dtype == LP_BF16);
}

/* Products of warpgroups are done when they are waited for, no sooner; what they read must not change meanwhile, and what
 * they write is NaN until then.  Shared memory begins at an address that only 128 divides. */
#define LP_WARPGROUPS 1
enum { SIMT_SHARED_BEGINS = 128 };
unsigned lp_shared_address(const void *shared);
void lp_sync_workers();
static inline void lp_prefetch(const void *)
{
}
void lp_warpgroup_arrive();
void lp_warpgroup_commit();
void simt_warpgroup_wait(unsigned pending);
template <int pending> static inline void lp_warpgroup_wait()
{
    simt_warpgroup_wait(pending);
}
static inline void lp_warpgroup_have(float (&)[16][4])
{
}
void simt_warpgroup_multiply_add(float (&d)[16][4], uint64_t a, uint64_t b, bool add, bool brain);
template <lp_dtype dtype>
static inline void lp_warpgroup_multiply_add(float (&d)[16][4], uint64_t a, uint64_t b, bool add)
{
    simt_warpgroup_multiply_add(d, a, b, add, dtype == LP_BF16);
}

/* Blocks of a cluster run together.  What a tensor copy brings is NaN until it lands, at some time of its own. */
unsigned lp_cluster_rank();
void lp_cluster_sync();
void lp_barrier_init(uint64_t *barrier, unsigned count);
static inline void lp_barriers_ready()
{
}
void lp_barrier_expect(uint64_t *barrier, unsigned bytes);
void lp_barrier_wait(uint64_t *barrier, unsigned parity);
void lp_barrier_arrive_at(uint64_t *barrier, unsigned rank);
template <int count> static inline void lp_registers_fewer()
{
}
template <int count> static inline void lp_registers_more()
{
}

struct lp_tensor_map {
    const uint16_t *values;
    size_t features, tokens, samples, stride;
    unsigned box_features, box_tokens;
};
void lp_tensor_copy(unsigned char *to, const lp_tensor_map *map, uint64_t *barrier, int feature, int token,
                    int sample, uint16_t blocks);
void *lp_tensor_map_encoder();
bool lp_tensor_map_make(lp_tensor_map *map, void *encode, const void *values, lp_dtype dtype, size_t features,
                        size_t tokens, size_t samples, size_t stride, unsigned box_features,
                        unsigned box_tokens);

/* --- the runtime: device memory is memory ------------------------------------------------------------------------------ */

typedef enum {
    cudaSuccess = 0,
    cudaErrorMemoryAllocation = 2,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101
} cudaError_t;
typedef struct simt_stream *cudaStream_t;
typedef enum { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 } cudaStreamCaptureStatus;
enum { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor, cudaDevAttrMultiProcessorCount };

/* What the device is, and what goes wrong next; tests set them. */
typedef struct {
    int devices, major, minor, processors;
    cudaError_t fail; /* of the next call that can fail, once */
    bool capturing;
    size_t launches;
    int clusters;    /* that run at once */
    bool maps;       /* the driver describes tensors */
    size_t products; /* of warpgroups */
} simt_device_state;
extern simt_device_state simt_device;

extern "C" {
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaDeviceGetAttribute(int *value, int attribute, int device);
cudaError_t cudaGetLastError(void);
const char *cudaGetErrorName(cudaError_t error);
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status);
cudaError_t cudaMalloc(void **memory, size_t bytes);
cudaError_t cudaFree(void *memory);
cudaError_t cudaMemcpy(void *target, const void *source, size_t bytes, int kind);
cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t bytes, int kind, cudaStream_t stream);
}
template <typename kernel_t> static inline cudaError_t cudaFuncSetAttribute(kernel_t, int, int)
{
    return cudaSuccess;
}
template <typename kernel_t>
static inline cudaError_t lp_cluster_prepare(kernel_t, unsigned, size_t, unsigned, int *at_once)
{
    *at_once = simt_device.clusters;
    return cudaSuccess;
}
template <typename job_t>
static inline cudaError_t lp_launch_cluster(void (*kernel)(const job_t), unsigned blocks, unsigned threads,
                                            size_t shared, unsigned cluster, cudaStream_t, const job_t &job)
{
    simt_launch(blocks, threads, shared, [&] { kernel(job); }, cluster);
    return cudaSuccess;
}

#endif
