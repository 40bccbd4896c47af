/* The table, devices and errors. */
#include "kernels/cuda/internal.h"

#include <stdlib.h>
#include <string.h>

enum { MAJOR_MIN = 7, MINOR_MIN = 5 };

lp_status lp_cuda_failed(lp_error *err, cudaError_t error, const char *doing)
{
    (void)cudaGetLastError(); /* not to be found by the next call */
    return lp_error_set(err, error == cudaErrorMemoryAllocation ? LP_ERR_NOMEM : LP_ERR_DEVICE, "%s: %s (%s)",
                        doing, cudaGetErrorName(error), cudaGetErrorString(error));
}

lp_status lp_cuda_launched(lp_error *err, const char *doing)
{
    cudaError_t error = cudaGetLastError();

    return error == cudaSuccess ? LP_OK : lp_cuda_failed(err, error, doing);
}

lp_status lp_cuda_enter(const lp_exec *exec, int *before, lp_error *err)
{
    cudaError_t error;

    if (exec == NULL || exec->context == NULL)
        return lp_error_set(err, LP_ERR_ARGUMENT, "a CUDA operation was called without an open device");
    error = cudaGetDevice(before);
    if (error == cudaSuccess && *before != lp_cuda_context_of(exec)->device)
        error = cudaSetDevice(lp_cuda_context_of(exec)->device);
    if (error != cudaSuccess)
        return lp_cuda_failed(err, error, "selecting the CUDA device");
    (void)cudaGetLastError();
    return LP_OK;
}

lp_status lp_cuda_leave(const lp_exec *exec, int before, lp_status status, lp_error *err)
{
    cudaError_t error = cudaSuccess;

    if (before != lp_cuda_context_of(exec)->device)
        error = cudaSetDevice(before);
    if (error != cudaSuccess && status == LP_OK)
        return lp_cuda_failed(err, error, "returning to the CUDA device that was current");
    return status;
}

lp_status lp_cuda_not_capturing(const lp_exec *exec, const char *operation, lp_error *err)
{
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    cudaError_t error = cudaStreamIsCapturing((cudaStream_t)exec->stream, &capture);

    if (error != cudaSuccess)
        return lp_cuda_failed(err, error, operation);
    if (capture != cudaStreamCaptureStatusNone)
        return lp_error_set(err, LP_ERR_DEVICE,
                            "%s cannot be captured into a graph (cudaErrorStreamCaptureUnsupported): run it "
                            "outside of the capture",
                            operation);
    return LP_OK;
}

lp_status lp_cuda_check_scratch(const lp_exec *exec, size_t need, const char *operation, lp_error *err)
{
    if (exec->scratch_bytes < need || exec->scratch == NULL)
        return lp_error_set(err, LP_ERR_NOMEM,
                            "%s needs %zu bytes of scratch on the device and was given %zu", operation, need,
                            exec->scratch == NULL ? 0 : exec->scratch_bytes);
    if ((uintptr_t)exec->scratch % 256 != 0)
        return lp_error_set(err, LP_ERR_ARGUMENT, "%s was given scratch that is not aligned to 256 bytes",
                            operation);
    return LP_OK;
}

static lp_status probe(int *count, lp_error *err)
{
    cudaError_t error = cudaGetDeviceCount(count);

    if (error == cudaSuccess && *count > 0)
        return LP_OK;
    (void)cudaGetLastError();
    *count = 0;
    if (error == cudaSuccess)
        error = cudaErrorNoDevice;
    return lp_error_set(err, LP_ERR_DEVICE, "no usable CUDA device: %s (%s)", cudaGetErrorName(error),
                        cudaGetErrorString(error));
}

/* LLMPRUNE_CUDA_WGMMA=0 leaves every layer to the kernels that older devices run, to compare with. */
static lp_status choose_kernels(lp_cuda_context *context, lp_error *err)
{
    const char *wish = getenv("LLMPRUNE_CUDA_WGMMA");

    if (wish == NULL || strcmp(wish, "") == 0 || strcmp(wish, "1") == 0)
        return LP_OK;
    if (strcmp(wish, "0") != 0)
        return lp_error_set(err, LP_ERR_DEVICE, "LLMPRUNE_CUDA_WGMMA is \"%s\"; 0 and 1 are known", wish);
    context->clusters = 0;
    return LP_OK;
}

static lp_status open_device(lp_cuda_context *context, lp_error *err)
{
    lp_status status;
    cudaError_t error =
        cudaDeviceGetAttribute(&context->major, cudaDevAttrComputeCapabilityMajor, context->device);

    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&context->minor, cudaDevAttrComputeCapabilityMinor, context->device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&context->processors, cudaDevAttrMultiProcessorCount, context->device);
    if (error != cudaSuccess)
        return lp_cuda_failed(err, error, "reading the CUDA device's properties");
    if (context->major < MAJOR_MIN || (context->major == MAJOR_MIN && context->minor < MINOR_MIN))
        return lp_error_set(
            err, LP_ERR_DEVICE,
            "CUDA device %d has compute capability %d.%d, and llmprune's kernels need %d.%d or newer",
            context->device, context->major, context->minor, MAJOR_MIN, MINOR_MIN);
    status = lp_fused_prepare(context, err);
    if (status == LP_OK)
        status = choose_kernels(context, err);
    return status == LP_OK ? lp_gemm_open(&context->blas, &context->allocator, err) : status;
}

static lp_status open(lp_cuda_context **out, int device, const lp_allocator *allocator, lp_error *err)
{
    lp_cuda_context *context;
    lp_exec exec = {};
    lp_status status;
    int count, before;

    *out = NULL;
    status = probe(&count, err);
    if (status != LP_OK)
        return status;
    if (device < 0 || device >= count)
        return lp_error_set(err, LP_ERR_DEVICE, "there is no CUDA device %d: this machine has %d", device,
                            count);
    context = (lp_cuda_context *)allocator->resize(allocator->ctx, NULL, 0, sizeof *context);
    if (context == NULL)
        return lp_error_set(err, LP_ERR_NOMEM, "no memory to open CUDA device %d", device);
    *context = {};
    context->device = device;
    context->allocator = *allocator;
    exec.context = context;
    status = lp_cuda_enter(&exec, &before, err);
    if (status == LP_OK)
        status = lp_cuda_leave(&exec, before, open_device(context, err), err);
    if (status == LP_OK)
        *out = context;
    else
        (void)allocator->resize(allocator->ctx, context, sizeof *context, 0);
    return status;
}

static void close(lp_cuda_context *context)
{
    lp_allocator allocator;

    if (context == NULL)
        return;
    allocator = context->allocator;
    lp_gemm_close(context->blas);
    (void)allocator.resize(allocator.ctx, context, sizeof *context, 0);
}

static const lp_backend operations = {
    LP_BACKEND_VERSION,
    (uint32_t)sizeof(lp_backend),
    "cuda",
    lp_cuda_linear_scores,
    lp_cuda_dot_columns,
    lp_cuda_tensor_scores,
    lp_cuda_accumulate_square,
    lp_cuda_compact,
    lp_cuda_compact_into,
};

static const lp_cuda_table table = {
    LP_CUDA_VERSION, (uint32_t)sizeof(lp_cuda_table), &operations, probe, open, close, lp_cuda_compact_many,
};

const lp_cuda_table *lp_cuda(void)
{
    return &table;
}
