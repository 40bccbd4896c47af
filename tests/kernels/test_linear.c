/* linear_scores: every instruction set against the definition in double precision, at sizes around every edge of the
 * blocking; and that threads, allocators and a transposed weight change nothing they should not. */
#include "check.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* One list for correctness and speed; `timed` cases are large and only checked against each other. */
static const struct {
    size_t out, in, samples, tokens;
    bool timed;
} cases[] = {
    {1, 1, 1, 1, false},         {1, 1, 3, 2, false},         {5, 15, 2, 3, false},
    {6, 16, 1, 4, false},        {7, 17, 2, 1, false},        {11, 31, 3, 5, false},
    {12, 32, 2, 7, false},       {13, 33, 4, 2, false},       {8, 12, 5, 3, false},
    {9, 13, 2, 3, false},        {1, 600, 2, 9, false},       {600, 1, 2, 9, false},
    {97, 65, 3, 17, false},      {193, 40, 2, 6, false},      {200, 513, 2, 3, false},
    {30, 1030, 3, 4, false},     {26, 70, 1, 767, false},     {26, 70, 1, 768, false},
    {26, 70, 1, 769, false},     {14, 300, 2, 800, false},    {14, 37, 3, 400, false},
    {25, 35, 800, 1, false},     {100, 290, 17, 50, false},   {110, 33, 1, 1700, false},
    {4096, 1024, 10, 64, true},  {1024, 4096, 10, 64, true},  {1024, 1024, 40, 16, true},
    {1024, 1024, 4, 2048, true}, {1024, 1024, 10, 128, true},
};

typedef struct {
    lp_linear linear;
    void *weight, *x, *dy;
} inputs;

static inputs make_inputs(size_t out, size_t in, size_t samples, size_t tokens, lp_dtype dtype, size_t slack,
                          bool transposed)
{
    inputs i = {.linear = {.out = out,
                           .in = in,
                           .samples = samples,
                           .tokens = tokens,
                           .weight_stride = (transposed ? out : in) + slack,
                           .x_stride = in + slack,
                           .dy_stride = out + 2 * slack,
                           .dtype = dtype,
                           .transposed = transposed}};
    /* Exactly the elements the strides span, so that a checker sees the first byte read beyond them. */
    i.weight = random_values(
        dtype, ((transposed ? in : out) - 1) * i.linear.weight_stride + (transposed ? out : in), 1);
    i.x = random_values(dtype, (samples * tokens - 1) * i.linear.x_stride + in, 1);
    i.dy = random_values(dtype, (samples * tokens - 1) * i.linear.dy_stride + out, 0.1);
    i.linear.weight = i.weight;
    i.linear.x = i.x;
    i.linear.dy = i.dy;
    return i;
}

static void free_inputs(inputs *i)
{
    free(i->weight);
    free(i->x);
    free(i->dy);
}

/* The definition.  bound: what the same sums are when no term cancels, the scale rounding errors are measured on. */
static void oracle(const lp_linear *l, double *row, double *col, double *row_bound, double *col_bound)
{
    for (size_t o = 0; o < l->out; o++) {
        for (size_t i = 0; i < l->in; i++) {
            size_t at = l->transposed ? i * l->weight_stride + o : o * l->weight_stride + i;
            double w = value_at(l->weight, l->dtype, at), g = 0, s = 0, g_abs = 0, s_abs = 0, e, bound;

            for (size_t j = 0; j < l->samples; j++) {
                double dot = 0, dot_abs = 0;

                for (size_t t = j * l->tokens; t < (j + 1) * l->tokens; t++) {
                    double product = value_at(l->dy, l->dtype, t * l->dy_stride + o) *
                                     value_at(l->x, l->dtype, t * l->x_stride + i);
                    dot += product;
                    dot_abs += fabs(product);
                }
                g += dot / (double)l->samples;
                s += dot * dot / (double)l->samples;
                g_abs += dot_abs / (double)l->samples;
                s_abs += dot_abs * dot_abs / (double)l->samples;
            }
            e = l->order == 1 ? fabs(g * w) : fabs(g * w - 0.5 * w * s * w);
            bound = fabs(w) * g_abs + (l->order == 1 ? 0.0 : 0.5 * w * w * s_abs);
            row[o] += e;
            col[i] += e;
            row_bound[o] += bound;
            col_bound[i] += bound;
        }
    }
}

static double worst(const double *got, const double *base, const double *want, const double *bound,
                    size_t count)
{
    double largest = 0;

    for (size_t i = 0; i < count; i++) {
        double error = fabs(got[i] - base[i] - want[i]) / (bound[i] + DBL_MIN);

        if (!(error <= largest) && largest == largest) /* a NaN wins, and stays */
            largest = error;
    }
    return largest;
}

static double *zeros(size_t count)
{
    double *values = need(count * sizeof *values);

    memset(values, 0, count * sizeof *values);
    return values;
}

static void check_case(const lp_backend *table, size_t c, lp_dtype dtype, int order, bool transposed,
                       size_t slack)
{
    inputs in =
        make_inputs(cases[c].out, cases[c].in, cases[c].samples, cases[c].tokens, dtype, slack, transposed);
    lp_linear *l = &in.linear;
    double *want_row = zeros(l->out), *want_col = zeros(l->in), *row_bound = zeros(l->out),
           *col_bound = zeros(l->in);
    double *base_row = need(l->out * 8), *base_col = need(l->in * 8);
    double *row = need(l->out * 8), *col = need(l->in * 8), *row_2 = need(l->out * 8),
           *col_2 = need(l->in * 8);
    double tolerance = dtype == LP_F64 ? 1e-13 : 2e-6, row_error, col_error;
    test_heap heap = {0};
    lp_exec exec = {.allocator = test_allocator(&heap), .threads = 1};
    lp_error err = {0};

    l->order = order;
    oracle(l, want_row, want_col, row_bound, col_bound);
    for (size_t i = 0; i < l->out; i++)
        base_row[i] = random_normal() * row_bound[i];
    for (size_t i = 0; i < l->in; i++)
        base_col[i] = random_normal() * col_bound[i];

    memcpy(row, base_row, l->out * 8);
    memcpy(col, base_col, l->in * 8);
    CHECK(table->linear_scores(l, row, col, &exec, &err) == LP_OK, "%s", err.message);
    row_error = worst(row, base_row, want_row, row_bound, l->out);
    col_error = worst(col, base_col, want_col, col_bound, l->in);
    CHECK(row_error <= tolerance && col_error <= tolerance,
          "%s %s order %d%s (%zu, %zu), %zu x %zu tokens: relative errors %.2g in rows, %.2g in columns",
          table->name, value_name(dtype), order, transposed ? " transposed" : "", l->out, l->in, l->samples,
          l->tokens, row_error, col_error);
    CHECK(heap.lent == 0 && heap.peak <= (2u << 20) + 128 * (l->out + l->in), "%zu bytes of scratch",
          heap.peak);

    /* Three threads, and the same bits. */
    exec.threads = 3;
    memcpy(row_2, base_row, l->out * 8);
    memcpy(col_2, base_col, l->in * 8);
    CHECK(table->linear_scores(l, row_2, col_2, &exec, &err) == LP_OK, "%s", err.message);
    CHECK(memcmp(row, row_2, l->out * 8) == 0 && memcmp(col, col_2, l->in * 8) == 0,
          "%s: threads change the result of case %zu", table->name, c);

    free(want_row), free(want_col), free(row_bound), free(col_bound), free(base_row), free(base_col);
    free(row), free(col), free(row_2), free(col_2);
    free_inputs(&in);
}

/* Large enough for threads to start: every thread count gives the same bits. */
static void check_threads(const lp_backend *table)
{
    inputs in = make_inputs(300, 1100, 3, 21, LP_F32, 0, false);
    lp_linear *l = &in.linear;
    double row[2][300], col[2][1100];
    test_heap heap = {0};
    lp_exec exec = {.allocator = test_allocator(&heap)};

    l->order = 2;
    for (int threads = 1; threads <= 7; threads += 2) {
        int to = threads > 1;

        memset(row[to], 0, sizeof row[to]);
        memset(col[to], 0, sizeof col[to]);
        exec.threads = threads;
        CHECK(table->linear_scores(l, row[to], col[to], &exec, NULL) == LP_OK, "%d threads", threads);
        CHECK(!to ||
                  (memcmp(row[0], row[1], sizeof row[0]) == 0 && memcmp(col[0], col[1], sizeof col[0]) == 0),
              "%s: %d threads change the result", table->name, threads);
    }
    free_inputs(&in);
}

static void check_failures(const lp_backend *table)
{
    inputs in = make_inputs(40, 50, 2, 3, LP_F32, 0, false);
    double row[40] = {0}, col[50] = {0};
    test_heap heap = {.fail_at = 1};
    lp_exec exec = {.allocator = test_allocator(&heap), .threads = 1};
    lp_error err = {0};
    lp_linear bad;

    in.linear.order = 2;
    CHECK(table->linear_scores(&in.linear, row, col, &exec, &err) == LP_ERR_NOMEM, "%s", err.message);
    CHECK(err.code == LP_ERR_NOMEM && heap.lent == 0 && row[0] == 0.0,
          "a refused allocation leaves nothing behind");
    heap.fail_at = 0;
#define REFUSED(field, value, status)                                                                        \
    bad = in.linear, bad.field = value;                                                                      \
    CHECK(table->linear_scores(&bad, row, col, &exec, &err) == status && err.code == status, #field)
    REFUSED(order, 3, LP_ERR_ARGUMENT);
    REFUSED(out, 0, LP_ERR_ARGUMENT);
    REFUSED(in, 0, LP_ERR_ARGUMENT);
    REFUSED(samples, 0, LP_ERR_ARGUMENT);
    REFUSED(tokens, 0, LP_ERR_ARGUMENT);
    REFUSED(x_stride, 49, LP_ERR_ARGUMENT);
    REFUSED(weight, NULL, LP_ERR_ARGUMENT);
    REFUSED(dtype, (lp_dtype)9, LP_ERR_ARGUMENT);
    REFUSED(samples, SIZE_MAX / 2, LP_ERR_OVERFLOW);
#undef REFUSED
    CHECK(heap.calls == 1 && row[0] == 0.0 && col[0] == 0.0, "a refused call writes and allocates nothing");
    free_inputs(&in);
}

typedef struct {
    const lp_backend *table;
    const lp_linear *linear;
    double *row, *col;
    lp_exec exec;
} timing;

static void run_timing(void *context)
{
    timing *t = context;

    (void)t->table->linear_scores(t->linear, t->row, t->col, &t->exec, NULL);
}

static void time_cases(const lp_backend *table)
{
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        if (!cases[c].timed)
            continue;
        for (int dtype = LP_F32; dtype <= LP_BF16; dtype++) {
            inputs in = make_inputs(cases[c].out, cases[c].in, cases[c].samples, cases[c].tokens,
                                    (lp_dtype)dtype, 0, false);
            timing t = {.table = table,
                        .linear = &in.linear,
                        .row = zeros(cases[c].out),
                        .col = zeros(cases[c].in),
                        .exec = {.allocator = lp_allocator_default(), .threads = 1}};

            for (int order = 1; order <= 2; order++) {
                double work = 2e-9 * (double)(cases[c].out * cases[c].in) *
                              (double)(cases[c].samples * cases[c].tokens),
                       s;

                in.linear.order = order;
                s = time_median(run_timing, &t);
                printf("%-7s %-4s order %d (%4zu, %4zu) %2zu x %4zu tokens %8.2f ms %6.1f GFLOP/s\n",
                       table->name, value_name((lp_dtype)dtype), order, cases[c].out, cases[c].in,
                       cases[c].samples, cases[c].tokens, 1e3 * s, work / s);
            }
            free(t.row), free(t.col);
            free_inputs(&in);
        }
    }
}

int main(int argc, char **argv)
{
    const lp_backend *tables[4];
    int count = test_tables(tables);

    for (int k = 0; k < count; k++) {
        if (argc > 1 && strcmp(argv[1], "time") == 0) {
            time_cases(tables[k]);
            continue;
        }
        CHECK(tables[k]->version == LP_BACKEND_VERSION && tables[k]->size == sizeof(lp_backend), "%s",
              tables[k]->name);
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            if (cases[c].timed)
                continue;
            for (int order = 1; order <= 2; order++) {
                check_case(tables[k], c, LP_F32, order, false, 0);
                check_case(tables[k], c, (lp_dtype)random_below(4), order, random_below(2) == 1,
                           (size_t)random_below(4));
                if (cases[c].samples * cases[c].tokens < 100) {
                    check_case(tables[k], c, LP_F64, order, false, 0);
                    check_case(tables[k], c, LP_BF16, order, true, 1);
                    check_case(tables[k], c, LP_F16, order, false, 3);
                }
            }
        }
        check_threads(tables[k]);
        check_failures(tables[k]);
    }
    return argc > 1 ? 0 : check_finish("linear_scores");
}
