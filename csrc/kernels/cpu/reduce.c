#include "kernels/cpu/reduce.h"

#include <math.h>

#include "kernels/cpu/half.h"
#include "kernels/cpu/simd.h"

#define REDUCE_NAME(x) x##_plain
#define REDUCE_TABLE lp_reduce_plain
#include "kernels/cpu/reduce_body.h"

#ifdef LP_X86
LP_TARGET_BEGIN(LP_TARGET_AVX2)
#define REDUCE_NAME(x) x##_avx2
#define REDUCE_TABLE lp_reduce_avx2
#include "kernels/cpu/reduce_body.h"
LP_TARGET_END

LP_TARGET_BEGIN(LP_TARGET_AVX512)
#define REDUCE_NAME(x) x##_avx512
#define REDUCE_TABLE lp_reduce_avx512
#include "kernels/cpu/reduce_body.h"
LP_TARGET_END
#endif

static bool known(lp_dtype dtype)
{
    return (unsigned)dtype <= LP_BF16;
}

static lp_status check_count(const char *operation, size_t count, lp_error *err)
{
    size_t bytes;

    return lp_mul_size(count, 8, &bytes)
               ? LP_OK
               : lp_error_set(err, LP_ERR_OVERFLOW, "%s was given a tensor that fits no memory", operation);
}

lp_status lp_reduce_dot_columns(const lp_reduce *reduce, const void *a, const void *b, lp_dtype dtype,
                                size_t rows, size_t columns, double *out, lp_error *err)
{
    size_t count;
    lp_status status;

    if (a == NULL || b == NULL || out == NULL)
        return lp_error_set(err, LP_ERR_ARGUMENT, "dot_columns was given a NULL tensor");
    if (rows < 1 || columns < 1 || !known(dtype))
        return lp_error_set(err, LP_ERR_ARGUMENT, "dot_columns cannot take %zu x %zu values of dtype %d",
                            rows, columns, (int)dtype);
    if (!lp_mul_size(rows, columns, &count))
        count = SIZE_MAX;
    status = check_count("dot_columns", count, err);
    if (status == LP_OK)
        reduce->dot_columns(a, b, dtype, rows, columns, out);
    return status;
}

lp_status lp_reduce_tensor_scores(const lp_reduce *reduce, lp_values weight, lp_values grad, lp_values square,
                                  const size_t *shape, size_t ndim, lp_score_kind kind, double *const *outs,
                                  lp_error *err)
{
    bool needs_grad = kind <= LP_SCORE_ELEMENT2, needs_square = kind == LP_SCORE_ELEMENT2;
    size_t count = 1;
    lp_status status;

    if (shape == NULL || outs == NULL || ndim < 1 || ndim > LP_MAX_DIMS)
        return lp_error_set(err, LP_ERR_ARGUMENT,
                            "tensor_scores takes tensors of 1 to %d dimensions, not %zu", LP_MAX_DIMS, ndim);
    if ((unsigned)kind > LP_SCORE_L2)
        return lp_error_set(err, LP_ERR_ARGUMENT, "tensor_scores does not know importance %d", (int)kind);
    if (weight.data == NULL || !known(weight.dtype) ||
        (needs_grad && (grad.data == NULL || !known(grad.dtype))) ||
        (needs_square && (square.data == NULL || !known(square.dtype))))
        return lp_error_set(
            err, LP_ERR_ARGUMENT,
            "tensor_scores lacks the weight, gradient or squared gradient its importance needs");
    for (size_t d = 0; d < ndim; d++) {
        if (shape[d] < 1)
            return lp_error_set(err, LP_ERR_ARGUMENT,
                                "tensor_scores was given a tensor whose dimension %zu is empty", d);
        if (!lp_mul_size(count, shape[d], &count))
            count = SIZE_MAX;
    }
    status = check_count("tensor_scores", count, err);
    if (status == LP_OK)
        reduce->tensor_scores(weight, grad, square, shape, ndim, kind, outs);
    return status;
}

lp_status lp_reduce_accumulate_square(const lp_reduce *reduce, void *acc, lp_dtype acc_dtype, lp_values grad,
                                      double scale, size_t count, lp_error *err)
{
    lp_status status;

    if (acc == NULL || grad.data == NULL)
        return lp_error_set(err, LP_ERR_ARGUMENT, "accumulate_square was given a NULL tensor");
    if ((acc_dtype != LP_F32 && acc_dtype != LP_F64) || !known(grad.dtype))
        return lp_error_set(err, LP_ERR_ARGUMENT,
                            "accumulate_square sums into float32 or float64, not dtype %d", (int)acc_dtype);
    status = check_count("accumulate_square", count, err);
    if (status == LP_OK)
        reduce->accumulate_square(acc, acc_dtype, grad, scale, count);
    return status;
}
