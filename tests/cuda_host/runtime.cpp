/* The CUDA runtime's functions that the kernels' host side calls; see cuda_runtime.h. */
#include "cuda_runtime.h"

#include <stdlib.h>

static int device_now;
static cudaError_t last_error;

static cudaError_t outcome(void)
{
    cudaError_t error = simt_device.fail;

    simt_device.fail = cudaSuccess;
    last_error = error;
    return error;
}

extern "C" cudaError_t cudaGetDevice(int *device)
{
    *device = device_now;
    return cudaSuccess;
}

extern "C" cudaError_t cudaSetDevice(int device)
{
    device_now = device;
    return outcome();
}

extern "C" cudaError_t cudaGetDeviceCount(int *count)
{
    *count = simt_device.devices;
    return outcome();
}

extern "C" cudaError_t cudaDeviceGetAttribute(int *value, int attribute, int)
{
    *value = attribute == cudaDevAttrComputeCapabilityMajor   ? simt_device.major
             : attribute == cudaDevAttrComputeCapabilityMinor ? simt_device.minor
                                                              : simt_device.processors;
    return outcome();
}

extern "C" cudaError_t cudaGetLastError(void)
{
    cudaError_t error = last_error;

    last_error = cudaSuccess;
    return error;
}

extern "C" const char *cudaGetErrorName(cudaError_t error)
{
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation"
           : error == cudaErrorNoDevice       ? "cudaErrorNoDevice"
           : error == cudaErrorInvalidDevice  ? "cudaErrorInvalidDevice"
                                              : "cudaSuccess";
}

extern "C" const char *cudaGetErrorString(cudaError_t)
{
    return "as the test wished";
}

extern "C" cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status)
{
    *status = simt_device.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

extern "C" cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t bytes, int, cudaStream_t)
{
    cudaError_t error = outcome();

    if (error == cudaSuccess)
        memcpy(target, source, bytes);
    return error;
}

extern "C" cudaError_t cudaMalloc(void **memory, size_t bytes)
{
    cudaError_t error = outcome();

    *memory = error == cudaSuccess ? aligned_alloc(256, (bytes + 255) / 256 * 256) : NULL;
    return error;
}

extern "C" cudaError_t cudaFree(void *memory)
{
    free(memory);
    return outcome();
}

extern "C" cudaError_t cudaMemcpy(void *target, const void *source, size_t bytes, int kind)
{
    return cudaMemcpyAsync(target, source, bytes, kind, NULL);
}
