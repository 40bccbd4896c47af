/* gemm.cu's functions without cuBLAS: the definition, summed in float64 and rounded once. */
#include "cuda_runtime.h"

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/internal.h"

#include <stdlib.h>

extern "C" lp_status lp_gemm_open(void **out, const lp_allocator *allocator, lp_error *err)
{
    *out = allocator->resize(allocator->ctx, NULL, 0, 1);
    return *out != NULL ? LP_OK : lp_error_set(err, LP_ERR_NOMEM, "no memory");
}

extern "C" void lp_gemm_close(void *blas)
{
    free(blas);
}

extern "C" lp_status lp_gemm_run(void *, const lp_gemm *gemm, cudaStream_t, lp_error *)
{
    size_t tile = gemm->rows * gemm->columns;

    memset(gemm->workspace, 0xff, gemm->workspace_bytes); /* as cuBLAS may */
    for (size_t j = 0; j < gemm->group; j++)
        for (size_t r = 0; r < gemm->rows; r++)
            for (size_t c = 0; c < gemm->columns; c++) {
                double sum = 0;

                for (size_t t = j * gemm->tokens; t < (j + 1) * gemm->tokens; t++)
                    sum += lp_load(gemm->dy, gemm->dtype, t * gemm->dy_stride + r) *
                           lp_load(gemm->x, gemm->dtype, t * gemm->x_stride + c);
                sum *= gemm->scale;
                if (gemm->dtype == LP_F64)
                    ((double *)gemm->g)[j * tile + r * gemm->columns + c] = sum;
                else
                    ((float *)gemm->g)[j * tile + r * gemm->columns + c] = (float)sum;
            }
    return LP_OK;
}
