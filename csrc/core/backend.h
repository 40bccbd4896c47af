/* The operation table: everything llmprune computes on tensor memory, as a versioned struct of function pointers.
 *
 * A backend (csrc/kernels/cpu, csrc/kernels/cuda) fills one constant table per instruction set or device; the
 * binding checks `version` and calls through it.  Nothing here knows of Python, graphs or models.
 *
 * Conventions for every operation
 *   - Tensors are row-major ("C order"); dimension 0 is the outermost.  Pointers need only the alignment of one element.
 *   - Inputs are const and may overlap each other, never an output.  Nothing is kept after the call returns.
 *   - Scratch comes from exec->allocator and is given back before the call returns; each operation states its bound.
 *     On a device every pointer to tensors, sums and scratch is a device pointer, the scratch is exec->scratch, and the
 *     call returns when its work is queued on exec->stream: whoever lent the memory keeps it until that work is done.
 *   - Results depend on the table chosen but never on the number of threads: the order of every sum is fixed.
 *   - Failure codes: LP_ERR_ARGUMENT (a size, dtype or pointer outside the stated domain), LP_ERR_OVERFLOW (a size that
 *     does not fit), LP_ERR_NOMEM (scratch refused), LP_ERR_DEVICE (the device refused or failed).  A failing call has
 *     written nothing to its outputs, except where a device fails in the middle of its work.
 */
#ifndef LP_CORE_BACKEND_H
#define LP_CORE_BACKEND_H

#include "core/status.h"

/* Raised by one whenever a member below changes its meaning or place. */
#define LP_BACKEND_VERSION 2u

/* Most dimensions a tensor may have in tensor_scores, compact and compact_into. */
#define LP_MAX_DIMS 8

/* Floating-point element types.  BF16 and F16 are 16-bit brain and IEEE half floats in host byte order. */
typedef enum { LP_F32 = 0, LP_F64, LP_F16, LP_BF16 } lp_dtype;

/* How an operation may run. */
typedef struct {
    lp_allocator allocator; /* host scratch; called on the caller's thread only */
    int threads;   /* most CPU threads to use, the caller's included; 0: as many as the machine has online */
    void *stream;  /* CUDA stream; NULL is the legacy default one.  Unused on the CPU, like what follows */
    void *context; /* what the device's backend keeps for the device (kernels/cuda/cuda.h) */
    void *scratch; /* device memory, aligned to 256 bytes */
    size_t scratch_bytes; /* more than an operation's least only makes it faster */
} lp_exec;

/* One linear layer's weight and what streamed past it: y = x W^T. */
typedef struct {
    const void *weight;   /* (out, in); (in, out) when transposed */
    const void *x;        /* (samples * tokens, in): inputs, the tokens of a sample adjacent */
    const void *dy;       /* (samples * tokens, out): gradient of each sample's own loss with respect to y */
    size_t out, in;       /* >= 1 */
    size_t samples;       /* N >= 1 */
    size_t tokens;        /* T >= 1, per sample */
    size_t weight_stride; /* elements from one row to the next: >= in, >= out when transposed */
    size_t x_stride;      /* >= in */
    size_t dy_stride;     /* >= out */
    lp_dtype dtype;       /* of weight, x and dy */
    int order;            /* 1 or 2 */
    bool transposed;
} lp_linear;

/* Elementwise importance of a weight w with mean gradient g and mean squared gradient s (LLM-Pruner, arXiv:2305.11627,
 * equations 3 to 5, with the diagonal Fisher approximation of the Hessian). */
typedef enum {
    LP_SCORE_VECTOR = 0, /* g w, signed: the caller takes the absolute value of a whole structure's sum */
    LP_SCORE_ELEMENT1,   /* |g w| */
    LP_SCORE_ELEMENT2,   /* |g w - w s w / 2| */
    LP_SCORE_L1,         /* |w| */
    LP_SCORE_L2          /* w^2: the caller takes the square root of a whole structure's sum */
} lp_score_kind;

/* One tensor's values, contiguous.  data is NULL where an operation does not use it. */
typedef struct {
    const void *data;
    lp_dtype dtype;
} lp_values;

/* The positions of one dimension that stay: strictly increasing, each below the dimension's size.  position NULL: all of
 * them stay, and count is ignored. */
typedef struct {
    const int64_t *position; /* (count), borrowed for the call */
    size_t count;            /* >= 1 */
} lp_kept;

typedef struct {
    uint32_t version; /* LP_BACKEND_VERSION */
    uint32_t size;    /* sizeof(lp_backend) */
    const char *name; /* "plain", "avx2", "avx512", "neon", "cuda" */

    /* Importance of every row and column of a linear layer, with no gradient stored.  With g_j = dy_j^T x_j for sample
     * j, g = mean_j g_j and s = mean_j g_j^2, the elementwise importance e (out, in) is |g w| (order 1) or
     * |g w - w s w / 2| (order 2), and
     *     row[o] += sum_i e[o, i]        row (out), float64
     *     col[i] += sum_o e[o, i]        col (in),  float64
     * F32, BF16 and F16 compute in float32, F64 in float64; sums over tiles are float64.
     * Scratch: at most 1 MiB a thread (2 for F64) and 16 float64 per row and column; on a device at least 64 KiB. */
    lp_status (*linear_scores)(const lp_linear *linear, double *row, double *col, const lp_exec *exec,
                               lp_error *err);

    /* out[c] += sum_t a[t, c] * b[t, c] in float64; a, b (rows, columns) contiguous, out (columns).  With a = dy, b = y
     * (or x and dx) this is a linear layer's signed vector importance without any weight gradient.  No scratch. */
    lp_status (*dot_columns)(const void *a, const void *b, lp_dtype dtype, size_t rows, size_t columns,
                             double *out, const lp_exec *exec, lp_error *err);

    /* For each dimension d: outs[d][i] += sum of the elementwise importance over all elements with index i in d, in
     * float64.  weight, grad and square have the same shape (ndim sizes, 1 <= ndim <= LP_MAX_DIMS, each >= 1); grad is
     * used by VECTOR and ELEMENT*, square by ELEMENT2.  outs (ndim) of (shape[d]) each; a NULL entry is skipped.
     * No scratch. */
    lp_status (*tensor_scores)(lp_values weight, lp_values grad, lp_values square, const size_t *shape,
                               size_t ndim, lp_score_kind kind, double *const *outs, const lp_exec *exec,
                               lp_error *err);

    /* acc[i] += scale * grad[i]^2 for count elements, each computed in float64 and rounded once.  acc is F32 or F64. */
    lp_status (*accumulate_square)(void *acc, lp_dtype acc_dtype, lp_values grad, double scale, size_t count,
                                   const lp_exec *exec, lp_error *err);

    /* In place: keep kept[d] of every dimension d of the contiguous tensor `data` (shape (ndim), elements of `width`
     * bytes: 1, 2, 4 or 8).  Afterwards the first prod(count_d) elements hold the smaller tensor, row-major; what lies
     * behind them is unspecified.  ndim 1..LP_MAX_DIMS.
     * Scratch: 10 bytes per position of one dimension and 4 KiB, and at most 1.25 MiB a thread when there are several. */
    lp_status (*compact)(void *data, size_t width, const size_t *shape, size_t ndim, const lp_kept *kept,
                         const lp_exec *exec, lp_error *err);

    /* The same into other memory: target (prod(count_d) elements) must not overlap source. */
    lp_status (*compact_into)(void *target, const void *source, size_t width, const size_t *shape,
                              size_t ndim, const lp_kept *kept, const lp_exec *exec, lp_error *err);
} lp_backend;

#endif
