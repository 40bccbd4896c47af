/* dot_columns, tensor_scores and accumulate_square: every instruction set against the definitions, term by term. */
#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const lp_exec alone = {.threads = 1};

/* A zero ends a shape. */
static const size_t shapes[][6] = {
    {1},
    {7},
    {8},
    {255},
    {256},
    {257},
    {1000},
    {1, 1},
    {1, 300},
    {300, 1},
    {17, 9},
    {31, 515},
    {2, 3, 4},
    {5, 1, 40},
    {3, 3, 3, 3},
    {2, 5, 1, 33},
    {2, 3, 2, 3, 5},
    {64, 3, 7},
    {1, 2, 1, 2, 1},
    {12, 256},
};

static double pick(const void *values, lp_dtype dtype, size_t index, bool used)
{
    return used ? value_at(values, dtype, index) : 0.0;
}

static void check_scores(const lp_backend *table, size_t c, lp_score_kind kind, const lp_dtype dtypes[3],
                         bool skip)
{
    size_t ndim = 0, total = 1;
    double *outs[5] = {NULL}, *want[5], *bound[5];
    void *values[3];
    lp_error err = {0};

    while (shapes[c][ndim] > 0)
        total *= shapes[c][ndim++];
    for (int i = 0; i < 3; i++)
        values[i] = random_values(dtypes[i], total, 1.0);
    for (size_t d = 0; d < ndim; d++) {
        size_t bytes = shapes[c][d] * sizeof(double);

        outs[d] = need(bytes);
        want[d] = need(bytes);
        bound[d] = need(bytes);
        for (size_t i = 0; i < shapes[c][d]; i++) {
            outs[d][i] = want[d][i] = random_normal();
            bound[d][i] = fabs(want[d][i]);
        }
    }
    for (size_t n = 0; n < total; n++) {
        double w = value_at(values[0], dtypes[0], n),
               g = pick(values[1], dtypes[1], n, kind <= LP_SCORE_ELEMENT2);
        double s = pick(values[2], dtypes[2], n, kind == LP_SCORE_ELEMENT2), e = 0, size;
        size_t rest = n;

        switch (kind) {
        case LP_SCORE_VECTOR:
            e = g * w;
            break;
        case LP_SCORE_ELEMENT1:
            e = fabs(g * w);
            break;
        case LP_SCORE_ELEMENT2:
            e = fabs(g * w - w * s * w / 2);
            break;
        case LP_SCORE_L1:
            e = fabs(w);
            break;
        case LP_SCORE_L2:
            e = w * w;
            break;
        }
        size = fabs(g * w) + fabs(w * s * w) + fabs(e);
        for (size_t d = ndim; d-- > 0; rest /= shapes[c][d]) {
            want[d][rest % shapes[c][d]] += e;
            bound[d][rest % shapes[c][d]] += size;
        }
    }
    if (skip) {
        free(outs[0]);
        outs[0] = NULL;
    }
    CHECK(table->tensor_scores((lp_values){values[0], dtypes[0]},
                               (lp_values){kind <= LP_SCORE_ELEMENT2 ? values[1] : NULL, dtypes[1]},
                               (lp_values){kind == LP_SCORE_ELEMENT2 ? values[2] : NULL, dtypes[2]},
                               shapes[c], ndim, kind, outs, &alone, &err) == LP_OK,
          "%s", err.message);
    for (size_t d = 0; d < ndim; d++) {
        double worst = 0;

        for (size_t i = 0; outs[d] != NULL && i < shapes[c][d]; i++)
            worst = fmax(worst, fabs(outs[d][i] - want[d][i]) / bound[d][i]);
        CHECK(worst < 1e-13, "%s kind %d shape %zu dimension %zu: relative error %.2g", table->name,
              (int)kind, c, d, worst);
        free(outs[d]), free(want[d]), free(bound[d]);
    }
    for (int i = 0; i < 3; i++)
        free(values[i]);
}

static void check_dot(const lp_backend *table, size_t rows, size_t columns, lp_dtype dtype)
{
    void *a = random_values(dtype, rows * columns, 1.0), *b = random_values(dtype, rows * columns, 1.0);
    double *out = need(columns * sizeof *out), worst = 0;
    lp_error err = {0};

    for (size_t c = 0; c < columns; c++)
        out[c] = (double)c;
    CHECK(table->dot_columns(a, b, dtype, rows, columns, out, &alone, &err) == LP_OK, "%s", err.message);
    for (size_t c = 0; c < columns; c++) {
        double sum = (double)c, bound = (double)c;

        for (size_t t = 0; t < rows; t++) {
            double product = value_at(a, dtype, t * columns + c) * value_at(b, dtype, t * columns + c);

            sum += product;
            bound += fabs(product);
        }
        worst = fmax(worst, fabs(out[c] - sum) / (bound + 1e-300));
    }
    CHECK(worst < 1e-13, "%s dot_columns %s (%zu, %zu): relative error %.2g", table->name, value_name(dtype),
          rows, columns, worst);
    free(a), free(b), free(out);
}

static void check_square(const lp_backend *table, size_t count, lp_dtype acc_dtype, lp_dtype dtype)
{
    void *acc = random_values(acc_dtype, count, 1.0), *grad = random_values(dtype, count, 1.0);
    void *before = need(count * value_width(acc_dtype));
    double worst = 0, allowed = acc_dtype == LP_F64 ? 1e-15 : 1e-7;
    lp_error err = {0};

    memcpy(before, acc, count * value_width(acc_dtype));
    CHECK(table->accumulate_square(acc, acc_dtype, (lp_values){grad, dtype}, 0.25, count, &alone, &err) ==
              LP_OK,
          "%s", err.message);
    for (size_t i = 0; i < count; i++) {
        double g = value_at(grad, dtype, i), was = value_at(before, acc_dtype, i), want = was + 0.25 * g * g;

        worst = fmax(worst, fabs(value_at(acc, acc_dtype, i) - want) / (fabs(was) + 0.25 * g * g));
    }
    CHECK(worst <= allowed, "%s accumulate_square %s += %s^2, %zu elements: relative error %.2g", table->name,
          value_name(acc_dtype), value_name(dtype), count, worst);
    free(acc), free(grad), free(before);
}

static void check_refusals(const lp_backend *table)
{
    size_t shape[2] = {2, 3}, empty[2] = {2, 0}, huge[2] = {SIZE_MAX / 2, 3};
    float values[6] = {0};
    double out[3] = {0}, *outs[2] = {out, out};
    lp_values v = {values, LP_F32}, none = {NULL, LP_F32}, odd = {values, (lp_dtype)7};
    lp_error err = {0};

#define SCORES(w, g, s, shape_, ndim, kind)                                                                  \
    table->tensor_scores(w, g, s, shape_, ndim, kind, outs, &alone, &err)
    CHECK(SCORES(v, none, none, shape, 2, LP_SCORE_ELEMENT1) == LP_ERR_ARGUMENT, "no gradient");
    CHECK(SCORES(v, v, none, shape, 2, LP_SCORE_ELEMENT2) == LP_ERR_ARGUMENT, "no square");
    CHECK(SCORES(none, v, v, shape, 2, LP_SCORE_L1) == LP_ERR_ARGUMENT, "no weight");
    CHECK(SCORES(odd, v, v, shape, 2, LP_SCORE_L1) == LP_ERR_ARGUMENT, "unknown dtype");
    CHECK(SCORES(v, v, v, shape, 2, (lp_score_kind)9) == LP_ERR_ARGUMENT, "unknown kind");
    CHECK(SCORES(v, v, v, shape, 0, LP_SCORE_L1) == LP_ERR_ARGUMENT, "no dimensions");
    CHECK(SCORES(v, v, v, empty, 2, LP_SCORE_L1) == LP_ERR_ARGUMENT, "an empty dimension");
    CHECK(SCORES(v, v, v, huge, 2, LP_SCORE_L1) == LP_ERR_OVERFLOW, "a huge dimension");
#undef SCORES
    CHECK(table->dot_columns(values, NULL, LP_F32, 2, 3, out, &alone, &err) == LP_ERR_ARGUMENT, "NULL");
    CHECK(table->dot_columns(values, values, LP_F32, 0, 3, out, &alone, &err) == LP_ERR_ARGUMENT, "no rows");
    CHECK(table->dot_columns(values, values, LP_F32, SIZE_MAX, 3, out, &alone, &err) == LP_ERR_OVERFLOW,
          "huge");
    CHECK(table->accumulate_square(values, LP_BF16, v, 1.0, 6, &alone, &err) == LP_ERR_ARGUMENT, "bf16 sums");
    CHECK(table->accumulate_square(NULL, LP_F32, v, 1.0, 6, &alone, &err) == LP_ERR_ARGUMENT, "NULL");
    CHECK(out[0] == 0.0 && err.code == LP_ERR_ARGUMENT, "a refused call writes nothing");
}

typedef struct {
    const lp_backend *table;
    lp_values weight, grad, square;
    double *out;
} timing;

static void run_scores(void *context)
{
    timing *t = context;
    const size_t shape[2] = {4096, 4096};
    double *const outs[2] = {t->out, t->out + 4096};

    (void)t->table->tensor_scores(t->weight, t->grad, t->square, shape, 2, LP_SCORE_ELEMENT2, outs, &alone,
                                  NULL);
}

static void run_dot(void *context)
{
    timing *t = context;

    (void)t->table->dot_columns(t->weight.data, t->grad.data, t->weight.dtype, 4096, 4096, t->out, &alone,
                                NULL);
}

static void time_cases(const lp_backend *table)
{
    for (int dtype = LP_F32; dtype <= LP_BF16; dtype++) {
        size_t count = 4096 * 4096, bytes = count * value_width((lp_dtype)dtype);
        unsigned char *values = need(3 * bytes);
        double *out = need(8192 * sizeof *out), scores, dot;
        timing t = {table,
                    {values, (lp_dtype)dtype},
                    {values + bytes, (lp_dtype)dtype},
                    {values + 2 * bytes, (lp_dtype)dtype},
                    out};

        memset(values, 0, 3 * bytes);
        memset(out, 0, 8192 * sizeof *out);
        scores = time_median(run_scores, &t);
        dot = time_median(run_dot, &t);
        printf("%-7s %-4s (4096, 4096): tensor_scores element2 %6.1f GB/s, dot_columns %6.1f GB/s\n",
               table->name, value_name((lp_dtype)dtype), 3e-9 * (double)bytes / scores,
               2e-9 * (double)bytes / dot);
        free(values), free(out);
    }
}

int main(int argc, char **argv)
{
    const lp_backend *tables[4];
    int count = test_tables(tables);

    for (int t = 0; t < count; t++) {
        if (argc > 1 && strcmp(argv[1], "time") == 0) {
            time_cases(tables[t]);
            continue;
        }
        for (size_t c = 0; c < sizeof shapes / sizeof *shapes; c++) {
            for (int kind = LP_SCORE_VECTOR; kind <= LP_SCORE_L2; kind++) {
                for (int dtype = LP_F32; dtype <= LP_BF16; dtype++) {
                    lp_dtype same[3] = {(lp_dtype)dtype, (lp_dtype)dtype, (lp_dtype)dtype};
                    lp_dtype mixed[3] = {(lp_dtype)dtype, (lp_dtype)random_below(4), LP_F32};

                    check_scores(tables[t], c, (lp_score_kind)kind, same, false);
                    check_scores(tables[t], c, (lp_score_kind)kind, mixed, true);
                }
            }
        }
        for (int dtype = LP_F32; dtype <= LP_BF16; dtype++) {
            check_dot(tables[t], 1, 1, (lp_dtype)dtype);
            check_dot(tables[t], 9, 7, (lp_dtype)dtype);
            check_dot(tables[t], 33, 256, (lp_dtype)dtype);
            check_dot(tables[t], 3, 2500, (lp_dtype)dtype);
            check_dot(tables[t], 5, 700, (lp_dtype)dtype);
            for (size_t n = 1; n < 600; n += 85) {
                check_square(tables[t], n, LP_F32, (lp_dtype)dtype);
                check_square(tables[t], n, LP_F64, (lp_dtype)dtype);
            }
        }
        check_refusals(tables[t]);
    }
    return argc > 1 ? 0 : check_finish("reduce");
}
