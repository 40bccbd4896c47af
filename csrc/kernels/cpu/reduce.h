/* The streaming reductions of the operation table, compiled once for each instruction set from reduce_body.h. */
#ifndef LP_KERNELS_CPU_REDUCE_H
#define LP_KERNELS_CPU_REDUCE_H

#include "core/backend.h"

/* Semantics and domains: core/backend.h.  These check nothing: the lp_reduce_* functions do. */
typedef struct {
    void (*dot_columns)(const void *a, const void *b, lp_dtype dtype, size_t rows, size_t columns,
                        double *out);
    void (*tensor_scores)(lp_values weight, lp_values grad, lp_values square, const size_t *shape,
                          size_t ndim, lp_score_kind kind, double *const *outs);
    void (*accumulate_square)(void *acc, lp_dtype acc_dtype, lp_values grad, double scale, size_t count);
} lp_reduce;

extern const lp_reduce lp_reduce_plain, lp_reduce_avx2, lp_reduce_avx512;

lp_status lp_reduce_dot_columns(const lp_reduce *reduce, const void *a, const void *b, lp_dtype dtype,
                                size_t rows, size_t columns, double *out, lp_error *err);
lp_status lp_reduce_tensor_scores(const lp_reduce *reduce, lp_values weight, lp_values grad, lp_values square,
                                  const size_t *shape, size_t ndim, lp_score_kind kind, double *const *outs,
                                  lp_error *err);
lp_status lp_reduce_accumulate_square(const lp_reduce *reduce, void *acc, lp_dtype acc_dtype, lp_values grad,
                                      double scale, size_t count, lp_error *err);

#endif
