/* What the .cu files of this folder offer each other.  All sizes and domains have been checked by then. */
#ifndef LP_KERNELS_CUDA_INTERNAL_H
#define LP_KERNELS_CUDA_INTERNAL_H

#include <cuda_runtime.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "kernels/cuda/cuda.h"

struct lp_cuda_context {
    int device;
    int major, minor; /* compute capability */
    int processors;   /* multiprocessors */
    int clusters;     /* of hopper.cu's that run at once; 0: it cannot, or is not to */
    void *encode;     /* the driver's way to describe a tensor to it */
    void *blas;       /* gemm.cu's */
    lp_allocator allocator;
};

/* context.cu: turn a CUDA error into a status with its name: "moving a tensor: cudaErrorX (text)"; clears it in the runtime. */
lp_status lp_cuda_failed(lp_error *err, cudaError_t error, const char *doing);

/* context.cu: make the context's device current, and the one that was current before again. */
lp_status lp_cuda_enter(const lp_exec *exec, int *before, lp_error *err);
lp_status lp_cuda_leave(const lp_exec *exec, int before, lp_status status, lp_error *err);

/* context.cu: what became of the launches since the last call. */
lp_status lp_cuda_launched(lp_error *err, const char *doing);

/* context.cu: LP_ERR_DEVICE if the stream is being captured, which `operation` cannot take part in. */
lp_status lp_cuda_not_capturing(const lp_exec *exec, const char *operation, lp_error *err);

/* context.cu: whether an operation has the scratch it needs, aligned. */
lp_status lp_cuda_check_scratch(const lp_exec *exec, size_t need, const char *operation, lp_error *err);

static inline lp_cuda_context *lp_cuda_context_of(const lp_exec *exec)
{
    return (lp_cuda_context *)exec->context;
}

/* gemm.cu, the only user of cuBLAS: its handle for the current device. */
lp_status lp_gemm_open(void **out, const lp_allocator *allocator, lp_error *err);
void lp_gemm_close(void *blas);

/* One batch of products of which nothing is copied: g[j] (rows, columns) = scale * dy[j]^T x[j], for `group` samples j of
 * `tokens` tokens, dy (tokens, rows) with rows `dy_stride` apart, x (tokens, columns) likewise, samples adjacent, g
 * contiguous in float32 (float64 for F64).  No reduced precision (TF32) is used. */
typedef struct {
    const void *dy, *x;
    void *g;
    size_t rows, columns, tokens, group;
    size_t dy_stride, x_stride;
    lp_dtype dtype;
    double scale;
    void *workspace;
    size_t workspace_bytes;
} lp_gemm;
lp_status lp_gemm_run(void *blas, const lp_gemm *gemm, cudaStream_t stream, lp_error *err);

/* fused.cu: whether it scores a layer on the device, and one strip of rows through it; see plan.h. */
bool lp_fused_takes(const lp_cuda_context *context, const lp_linear *linear);
lp_status lp_fused_prepare(lp_cuda_context *context, lp_error *err);
lp_status lp_fused_scores(const lp_linear *linear, double *row, double *col, const lp_exec *exec, bool *done,
                          lp_error *err);

/* linear.cu: sums[i] += the sum over parts p of parts[p * stride + i], i < count, in the order of p. */
void lp_add_parts(double *sums, const double *parts, size_t count, size_t part_count, size_t stride,
                  cudaStream_t stream);

/* The operations of the table. */
lp_status lp_cuda_linear_scores(const lp_linear *linear, double *row, double *col, const lp_exec *exec,
                                lp_error *err);
lp_status lp_cuda_dot_columns(const void *a, const void *b, lp_dtype dtype, size_t rows, size_t columns,
                              double *out, const lp_exec *exec, lp_error *err);
lp_status lp_cuda_tensor_scores(lp_values weight, lp_values grad, lp_values square, const size_t *shape,
                                size_t ndim, lp_score_kind kind, double *const *outs, const lp_exec *exec,
                                lp_error *err);
lp_status lp_cuda_accumulate_square(void *acc, lp_dtype acc_dtype, lp_values grad, double scale, size_t count,
                                    const lp_exec *exec, lp_error *err);
lp_status lp_cuda_compact(void *data, size_t width, const size_t *shape, size_t ndim, const lp_kept *kept,
                          const lp_exec *exec, lp_error *err);
lp_status lp_cuda_compact_into(void *target, const void *source, size_t width, const size_t *shape,
                               size_t ndim, const lp_kept *kept, const lp_exec *exec, lp_error *err);
lp_status lp_cuda_compact_many(const lp_cuda_tensor *tensors, size_t count, const lp_exec *exec,
                               lp_error *err);

#ifdef __cplusplus
}
#endif

#endif
