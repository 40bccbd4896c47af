/* tensor_scores, dot_columns and accumulate_square of the CUDA backend, run on the CPU, against the definition. */
#include "host.h"

#include <float.h>

static double element(const double v[3], lp_score_kind kind)
{
    double w = v[0], g = v[1], s = v[2];

    return kind == LP_SCORE_VECTOR     ? g * w
           : kind == LP_SCORE_ELEMENT1 ? fabs(g * w)
           : kind == LP_SCORE_ELEMENT2 ? fabs(g * w - 0.5 * w * s * w)
           : kind == LP_SCORE_L1       ? fabs(w)
                                       : w * w;
}

static void check_scores(const std::vector<size_t> &shape, lp_score_kind kind, size_t scratch)
{
    opened device(scratch);
    lp_error err = {};
    lp_dtype dtypes[3];
    void *values[3];
    std::vector<std::vector<double>> got(shape.size()), want(shape.size()), bound(shape.size());
    std::vector<double *> outs(shape.size());
    size_t count = 1, skipped = random_below(2 * shape.size());
    lp_status status;

    for (size_t size : shape)
        count *= size;
    for (int i = 0; i < 3; i++) {
        dtypes[i] = (lp_dtype)random_below(4);
        values[i] = random_values(dtypes[i], count, 1);
    }
    for (size_t d = 0; d < shape.size(); d++) {
        got[d].assign(shape[d], 2.0);
        want[d].assign(shape[d], 0.0);
        bound[d].assign(shape[d], DBL_MIN);
        outs[d] = d == skipped ? NULL : got[d].data();
    }
    for (size_t at = 0; at < count; at++) {
        double v[3] = {value_at(values[0], dtypes[0], at), value_at(values[1], dtypes[1], at),
                       value_at(values[2], dtypes[2], at)};
        double e = element(v, kind);
        size_t left = at;

        for (size_t d = shape.size(); d-- > 0; left /= shape[d]) {
            want[d][left % shape[d]] += e;
            bound[d][left % shape[d]] +=
                fabs(v[0] * v[1]) + fabs(v[0] * v[0] * v[2]) + fabs(v[0]) + v[0] * v[0];
        }
    }
    status = lp_cuda()->operations->tensor_scores({values[0], dtypes[0]}, {values[1], dtypes[1]},
                                                  {values[2], dtypes[2]}, shape.data(), shape.size(), kind,
                                                  outs.data(), &device.exec, &err);
    CHECK(status == LP_OK, "%s", err.message);
    for (size_t d = 0; d < shape.size(); d++)
        for (size_t i = 0; i < shape[d]; i++)
            CHECK(outs[d] == NULL ? got[d][i] == 2.0
                                  : fabs(got[d][i] - 2.0 - want[d][i]) <= 1e-13 * bound[d][i] + 1e-15,
                  "kind %d, %zu dimensions, index %zu of dimension %zu: %g, not %g", (int)kind, shape.size(),
                  i, d, got[d][i] - 2.0, want[d][i]);
    for (void *v : values)
        free(v);
}

static void check_dots(size_t rows, size_t columns, lp_dtype dtype)
{
    opened device(4096);
    lp_error err = {};
    void *a = random_values(dtype, rows * columns, 1), *b = random_values(dtype, rows * columns, 1);
    std::vector<double> out(columns, 1.0);

    CHECK(lp_cuda()->operations->dot_columns(a, b, dtype, rows, columns, out.data(), &device.exec, &err) ==
              LP_OK,
          "%s", err.message);
    for (size_t c = 0; c < columns; c++) {
        double want = 1.0, bound = 1.0;

        for (size_t r = 0; r < rows; r++) {
            double product = value_at(a, dtype, r * columns + c) * value_at(b, dtype, r * columns + c);

            want += product;
            bound += fabs(product);
        }
        CHECK(fabs(out[c] - want) <= 1e-13 * bound, "column %zu of %zu x %zu %s", c, rows, columns,
              value_name(dtype));
    }
    free(a);
    free(b);
}

static void check_squares(size_t count, lp_dtype acc_dtype, lp_dtype dtype)
{
    opened device(256);
    lp_error err = {};
    void *acc = random_values(acc_dtype, count, 1), *grad = random_values(dtype, count, 1);
    std::vector<double> want(count);

    for (size_t i = 0; i < count; i++)
        want[i] = value_at(acc, acc_dtype, i) + 0.3 * value_at(grad, dtype, i) * value_at(grad, dtype, i);
    CHECK(lp_cuda()->operations->accumulate_square(acc, acc_dtype, {grad, dtype}, 0.3, count, &device.exec,
                                                   &err) == LP_OK,
          "%s", err.message);
    for (size_t i = 0; i < count; i++)
        CHECK(fabs(value_at(acc, acc_dtype, i) - want[i]) <=
                  (acc_dtype == LP_F64 ? 1e-15 : 7e-8) * (fabs(want[i]) + 1),
              "square %zu of %zu", i, count);
    free(acc);
    free(grad);
}

int main(void)
{
    static const std::vector<size_t> shapes[] = {
        {1},
        {31},
        {32},
        {33},
        {5000},
        {1, 1},
        {7, 31},
        {7, 32},
        {33, 33},
        {300, 5},
        {2, 700},
        {3, 9000},
        {65, 40},
        {1000, 1},
        {4, 5, 6},
        {3, 2, 40},
        {8, 33, 31},
        {2, 64, 65},
        {6, 4, 3, 3},
        {5, 2, 40, 1},
        {2, 3, 2, 3, 2},
        {2, 2, 2, 2, 2, 2, 2, 2},
    };
    lp_error err = {};
    opened device(256);
    double sum = 0, *outs[1] = {&sum};
    size_t shape[1] = {1}, none[1] = {0};
    float w = 1;

    for (const std::vector<size_t> &s : shapes)
        for (int kind = LP_SCORE_VECTOR; kind <= LP_SCORE_L2; kind++)
            check_scores(s, (lp_score_kind)kind,
                         random_below(2) == 1 ? 1 << 16 : 256 + random_below(5) * 256);
    for (int dtype = LP_F32; dtype <= LP_BF16; dtype++) {
        check_dots(1, 1, (lp_dtype)dtype);
        check_dots(70, 33, (lp_dtype)dtype);
        check_dots(640, 9, (lp_dtype)dtype);
        check_dots(3, 600, (lp_dtype)dtype);
        for (lp_dtype acc : {LP_F32, LP_F64})
            for (size_t count : {(size_t)1, (size_t)255, (size_t)257, (size_t)30000})
                check_squares(count, acc, (lp_dtype)dtype);
    }
    CHECK(lp_cuda()->operations->accumulate_square(&w, LP_BF16, {&w, LP_F32}, 1, 1, &device.exec, &err) ==
              LP_ERR_ARGUMENT,
          "squares in bfloat16");
    CHECK(lp_cuda()->operations->tensor_scores({&w, LP_F32}, {NULL, LP_F32}, {NULL, LP_F32}, shape, 1,
                                               LP_SCORE_ELEMENT1, outs, &device.exec,
                                               &err) == LP_ERR_ARGUMENT,
          "no gradient");
    CHECK(lp_cuda()->operations->tensor_scores({&w, LP_F32}, {NULL, LP_F32}, {NULL, LP_F32}, none, 1,
                                               LP_SCORE_L1, outs, &device.exec, &err) == LP_ERR_ARGUMENT,
          "an empty dimension");
    return check_finish("cuda_host/test_reduce");
}
