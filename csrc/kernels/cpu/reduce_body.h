/* Streaming reductions in plain C that compilers vectorise.  The including file defines REDUCE_NAME(x), which decorates
 * the functions, and REDUCE_TABLE, the lp_reduce to define; both are undefined again here.
 *
 * Values are widened to double in blocks that stay in L1, so every combination of dtypes takes one path. */

enum { REDUCE_NAME(BLOCK) = 256, REDUCE_NAME(STRIP) = 2048, REDUCE_NAME(LANES) = 8 };

static void REDUCE_NAME(widen)(double *restrict target, const void *source, lp_dtype dtype, size_t first,
                               size_t count)
{
    const float *single = (const float *)source + first;
    const uint16_t *half = (const uint16_t *)source + first;

    switch (dtype) {
    case LP_F32:
        for (size_t i = 0; i < count; i++)
            target[i] = (double)single[i];
        break;
    case LP_F64:
        memcpy(target, (const double *)source + first, count * sizeof *target);
        break;
    case LP_F16:
        for (size_t i = 0; i < count; i++)
            target[i] = (double)lp_float_from_f16(half[i]);
        break;
    case LP_BF16:
        for (size_t i = 0; i < count; i++)
            target[i] = (double)lp_float_from_bf16(half[i]);
        break;
    }
}

static void REDUCE_NAME(dot_columns)(const void *a, const void *b, lp_dtype dtype, size_t rows,
                                     size_t columns, double *out)
{
    double x[REDUCE_NAME(BLOCK)], y[REDUCE_NAME(BLOCK)], sum[REDUCE_NAME(STRIP)];

    /* Strips are wide, so that memory is read in long pieces, and narrow enough for their sums to stay in L1. */
    for (size_t first = 0; first < columns; first += REDUCE_NAME(STRIP)) {
        size_t width = columns - first < REDUCE_NAME(STRIP) ? columns - first : REDUCE_NAME(STRIP);

        memset(sum, 0, sizeof sum);
        for (size_t t = 0; t < rows; t++) {
            for (size_t c = 0; c < width; c += REDUCE_NAME(BLOCK)) {
                size_t count = width - c < REDUCE_NAME(BLOCK) ? width - c : REDUCE_NAME(BLOCK);
                size_t at = t * columns + first + c;

                REDUCE_NAME(widen)(x, a, dtype, at, count);
                REDUCE_NAME(widen)(y, b, dtype, at, count);
                for (size_t i = 0; i < count; i++)
                    sum[c + i] += x[i] * y[i];
            }
        }
        for (size_t i = 0; i < width; i++)
            out[first + i] += sum[i];
    }
}

/* Turn w into the elementwise importance of `count` elements. */
static void REDUCE_NAME(importance)(double *restrict w, const double *restrict g, const double *restrict s,
                                    lp_score_kind kind, size_t count)
{
    switch (kind) {
    case LP_SCORE_VECTOR:
        for (size_t i = 0; i < count; i++)
            w[i] = g[i] * w[i];
        break;
    case LP_SCORE_ELEMENT1:
        for (size_t i = 0; i < count; i++)
            w[i] = fabs(g[i] * w[i]);
        break;
    case LP_SCORE_ELEMENT2:
        for (size_t i = 0; i < count; i++)
            w[i] = fabs(g[i] * w[i] - 0.5 * w[i] * s[i] * w[i]);
        break;
    case LP_SCORE_L1:
        for (size_t i = 0; i < count; i++)
            w[i] = fabs(w[i]);
        break;
    case LP_SCORE_L2:
        for (size_t i = 0; i < count; i++)
            w[i] = w[i] * w[i];
        break;
    }
}

static void REDUCE_NAME(tensor_scores)(lp_values weight, lp_values grad, lp_values square,
                                       const size_t *shape, size_t ndim, lp_score_kind kind,
                                       double *const *outs)
{
    double w[REDUCE_NAME(BLOCK)], g[REDUCE_NAME(BLOCK)], s[REDUCE_NAME(BLOCK)];
    size_t index[LP_MAX_DIMS] = {0}, inner = shape[ndim - 1], rows = 1;
    bool needs_grad = kind <= LP_SCORE_ELEMENT2, needs_square = kind == LP_SCORE_ELEMENT2;

    for (size_t d = 0; d + 1 < ndim; d++)
        rows *= shape[d];
    for (size_t r = 0; r < rows; r++) {
        /* Independent partial sums, so that the sum vectorises without reassociating anything. */
        double lane[REDUCE_NAME(LANES)] = {0}, total = 0.0;

        for (size_t c = 0; c < inner; c += REDUCE_NAME(BLOCK)) {
            size_t count = inner - c < REDUCE_NAME(BLOCK) ? inner - c : REDUCE_NAME(BLOCK), i = 0;

            REDUCE_NAME(widen)(w, weight.data, weight.dtype, r * inner + c, count);
            if (needs_grad)
                REDUCE_NAME(widen)(g, grad.data, grad.dtype, r * inner + c, count);
            if (needs_square)
                REDUCE_NAME(widen)(s, square.data, square.dtype, r * inner + c, count);
            REDUCE_NAME(importance)(w, g, s, kind, count);
            if (outs[ndim - 1] != NULL) {
                double *out = outs[ndim - 1] + c;

                for (size_t k = 0; k < count; k++)
                    out[k] += w[k];
            }
            for (; i + REDUCE_NAME(LANES) <= count; i += REDUCE_NAME(LANES))
                for (size_t k = 0; k < REDUCE_NAME(LANES); k++)
                    lane[k] += w[i + k];
            for (size_t k = 0; i < count; i++, k++)
                lane[k] += w[i];
        }
        for (size_t k = 0; k < REDUCE_NAME(LANES); k++)
            total += lane[k];
        for (size_t d = 0; d + 1 < ndim; d++)
            if (outs[d] != NULL)
                outs[d][index[d]] += total;
        for (size_t d = ndim - 1; d-- > 0;) {
            if (++index[d] < shape[d])
                break;
            index[d] = 0;
        }
    }
}

static void REDUCE_NAME(accumulate_square)(void *acc, lp_dtype acc_dtype, lp_values grad, double scale,
                                           size_t count)
{
    double g[REDUCE_NAME(BLOCK)];

    for (size_t c = 0; c < count; c += REDUCE_NAME(BLOCK)) {
        size_t n = count - c < REDUCE_NAME(BLOCK) ? count - c : REDUCE_NAME(BLOCK);

        REDUCE_NAME(widen)(g, grad.data, grad.dtype, c, n);
        if (acc_dtype == LP_F64) {
            double *to = (double *)acc + c;

            for (size_t i = 0; i < n; i++)
                to[i] += scale * g[i] * g[i];
        } else {
            float *to = (float *)acc + c;

            for (size_t i = 0; i < n; i++)
                to[i] = (float)((double)to[i] + scale * g[i] * g[i]);
        }
    }
}

const lp_reduce REDUCE_TABLE = {
    .dot_columns = REDUCE_NAME(dot_columns),
    .tensor_scores = REDUCE_NAME(tensor_scores),
    .accumulate_square = REDUCE_NAME(accumulate_square),
};

#undef REDUCE_NAME
#undef REDUCE_TABLE
