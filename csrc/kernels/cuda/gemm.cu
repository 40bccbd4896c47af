/* Matrix products by cuBLAS. */
#include "kernels/cuda/internal.h"

#include <cublas_v2.h>
#include <limits.h>
#include <pthread.h>

typedef struct {
    cublasHandle_t handle;
    pthread_mutex_t lock; /* a handle has one stream and one workspace at a time */
    lp_allocator allocator;
} blas_state;

static lp_status failed(lp_error *err, cublasStatus_t status, const char *doing)
{
    (void)cudaGetLastError();
    return lp_error_set(err, status == CUBLAS_STATUS_ALLOC_FAILED ? LP_ERR_NOMEM : LP_ERR_DEVICE,
                        "%s: %s (%s)", doing, cublasGetStatusName(status), cublasGetStatusString(status));
}

lp_status lp_gemm_open(void **out, const lp_allocator *allocator, lp_error *err)
{
    blas_state *state = (blas_state *)allocator->resize(allocator->ctx, NULL, 0, sizeof *state);
    cublasStatus_t status;

    if (state == NULL)
        return lp_error_set(err, LP_ERR_NOMEM, "no memory for cuBLAS' handle");
    state->allocator = *allocator;
    status = cublasCreate(&state->handle);
    if (status != CUBLAS_STATUS_SUCCESS) {
        (void)allocator->resize(allocator->ctx, state, sizeof *state, 0);
        return failed(err, status, "starting cuBLAS");
    }
    /* No TF32, which the default mode excludes, and no 16-bit partial sums, which it allows. */
    status =
        cublasSetMathMode(state->handle, (cublasMath_t)(CUBLAS_DEFAULT_MATH |
                                                        CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
    if (status != CUBLAS_STATUS_SUCCESS || pthread_mutex_init(&state->lock, NULL) != 0) {
        (void)cublasDestroy(state->handle);
        (void)allocator->resize(allocator->ctx, state, sizeof *state, 0);
        return failed(err, status, "setting cuBLAS' precision");
    }
    *out = state;
    return LP_OK;
}

void lp_gemm_close(void *blas)
{
    blas_state *state = (blas_state *)blas;
    lp_allocator allocator;

    if (state == NULL)
        return;
    allocator = state->allocator;
    (void)cublasDestroy(state->handle);
    (void)pthread_mutex_destroy(&state->lock);
    (void)allocator.resize(allocator.ctx, state, sizeof *state, 0);
}

static cudaDataType_t type_of(lp_dtype dtype)
{
    switch (dtype) {
    case LP_F64:
        return CUDA_R_64F;
    case LP_F32:
        return CUDA_R_32F;
    case LP_BF16:
        return CUDA_R_16BF;
    default:
        return CUDA_R_16F;
    }
}

static cublasStatus_t run(blas_state *state, const lp_gemm *g, cudaStream_t stream)
{
    bool wide = g->dtype == LP_F64;
    float scale = (float)g->scale, none = 0;
    double wide_scale = g->scale, wide_none = 0;
    cudaDataType_t type = type_of(g->dtype);
    cublasStatus_t status = cublasSetStream(state->handle, stream);

    if (status == CUBLAS_STATUS_SUCCESS && g->workspace_bytes > 0)
        status = cublasSetWorkspace(state->handle, g->workspace, g->workspace_bytes);
    if (status != CUBLAS_STATUS_SUCCESS)
        return status;
    /* cuBLAS counts columns first: its g is our g transposed, (columns, rows) = x^T dy, of x (columns, tokens) and dy
     * (rows, tokens) as it sees them. */
    return cublasGemmStridedBatchedEx(
        state->handle, CUBLAS_OP_N, CUBLAS_OP_T, (int)g->columns, (int)g->rows, (int)g->tokens,
        wide ? (const void *)&wide_scale : (const void *)&scale, g->x, type, (int)g->x_stride,
        (long long)(g->tokens * g->x_stride), g->dy, type, (int)g->dy_stride,
        (long long)(g->tokens * g->dy_stride), wide ? (const void *)&wide_none : (const void *)&none, g->g,
        wide ? CUDA_R_64F : CUDA_R_32F, (int)g->columns, (long long)(g->rows * g->columns), (int)g->group,
        wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

lp_status lp_gemm_run(void *blas, const lp_gemm *gemm, cudaStream_t stream, lp_error *err)
{
    blas_state *state = (blas_state *)blas;
    cublasStatus_t status;

    if (gemm->tokens > INT_MAX || gemm->x_stride > INT_MAX || gemm->dy_stride > INT_MAX ||
        gemm->rows > INT_MAX || gemm->columns > INT_MAX)
        return lp_error_set(err, LP_ERR_UNSUPPORTED,
                            "a linear layer of %zu x %zu with %zu tokens is too large for cuBLAS", gemm->rows,
                            gemm->columns, gemm->tokens);
    (void)pthread_mutex_lock(&state->lock);
    status = run(state, gemm, stream);
    (void)pthread_mutex_unlock(&state->lock);
    return status == CUBLAS_STATUS_SUCCESS ? LP_OK : failed(err, status, "multiplying by cuBLAS");
}
