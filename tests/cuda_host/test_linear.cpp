/* linear_scores of the CUDA backend, its kernels run on the CPU: both ways, every dtype and order, at sizes around every
 * tile's edge, unaligned and with scratch from too little to plenty, against the definition in float64. */
#include "host.h"

#include <algorithm>

extern "C" {
#include "kernels/cuda/hopper_index.h"
#include "kernels/cuda/plan.h"
}

typedef struct {
    size_t out, in, samples, tokens;
} sizes;

/* A layer whose rows lie some elements farther apart than they must; memory ends with the last element. */
struct layer {
    lp_linear linear;
    void *weight, *x, *dy;

    layer(sizes s, lp_dtype dtype, int order, bool transposed, size_t slack, size_t dy_slack) : linear()
    {
        size_t rows = transposed ? s.in : s.out, columns = transposed ? s.out : s.in;

        linear.out = s.out;
        linear.in = s.in;
        linear.samples = s.samples;
        linear.tokens = s.tokens;
        linear.weight_stride = columns + slack;
        linear.x_stride = s.in + slack;
        linear.dy_stride = s.out + dy_slack;
        linear.dtype = dtype;
        linear.order = order;
        linear.transposed = transposed;
        weight = random_values(dtype, (rows - 1) * linear.weight_stride + columns, 1);
        x = random_values(dtype, (s.samples * s.tokens - 1) * linear.x_stride + s.in, 1);
        dy = random_values(dtype, (s.samples * s.tokens - 1) * linear.dy_stride + s.out, 0.1);
        linear.weight = weight;
        linear.x = x;
        linear.dy = dy;
    }
    ~layer()
    {
        free(weight);
        free(x);
        free(dy);
    }
    layer(const layer &) = delete;
    layer &operator=(const layer &) = delete;
};

typedef std::vector<double> sums;

/* bound: what the sums are when no term cancels. */
static void oracle(const lp_linear *l, sums &row, sums &col, sums &row_bound, sums &col_bound)
{
    for (size_t o = 0; o < l->out; o++)
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

static double worst(const sums &got, double base, const sums &want, const sums &bound)
{
    double largest = 0;

    for (size_t i = 0; i < got.size(); i++) {
        /* What is added to loses digits beyond 2^-52 of it. */
        double error = fmax(0, fabs(got[i] - base - want[i]) - 1e-14) / (bound[i] + 1e-300);

        largest = error > largest || isnan(error) ? error : largest;
    }
    return largest;
}

static void check_case(sizes s, lp_dtype dtype, int order, bool transposed, size_t slack, size_t dy_slack,
                       size_t scratch)
{
    layer in(s, dtype, order, transposed, slack, dy_slack);
    opened device(scratch);
    sums row(s.out, 0.0), col(s.in, 0.0), row_bound(row), col_bound(col), got_row(s.out, 3.0),
        got_col(s.in, 5.0);
    sums again_row(got_row), again_col(got_col);
    lp_error err = {};
    double tolerance = dtype == LP_F64 ? 1e-12 : 1e-6, error;
    lp_status status =
        lp_cuda()->operations->linear_scores(&in.linear, got_row.data(), got_col.data(), &device.exec, &err);

    if (!CHECK(status == LP_OK, "%zu x %zu, scratch %zu: %s", s.out, s.in, scratch, err.message))
        return;
    oracle(&in.linear, row, col, row_bound, col_bound);
    error = worst(got_row, 3.0, row, row_bound);
    CHECK(error <= tolerance,
          "rows off by %.1e: %zu x %zu, %zu samples of %zu, %s, order %d, transposed %d, slack %zu", error,
          s.out, s.in, s.samples, s.tokens, value_name(dtype), order, transposed, slack);
    error = worst(got_col, 5.0, col, col_bound);
    CHECK(error <= tolerance,
          "columns off by %.1e: %zu x %zu, %zu samples of %zu, %s, order %d, transposed %d, slack %zu", error,
          s.out, s.in, s.samples, s.tokens, value_name(dtype), order, transposed, slack);
    (void)lp_cuda()->operations->linear_scores(&in.linear, again_row.data(), again_col.data(), &device.exec,
                                               &err);
    CHECK(again_row == got_row && again_col == got_col,
          "the order of blocks and threads changes the sums: %zu x %zu", s.out, s.in);
}

/* By products and reduction: every edge of the reduction's blocks, in scratch that makes one tile or many. */
static void check_products(void)
{
    static const sizes cases[] = {
        {1, 1, 1, 1},    {1, 1, 3, 2},    {31, 7, 2, 3},   {32, 33, 2, 2}, {33, 255, 1, 3}, {5, 256, 2, 2},
        {7, 1023, 1, 2}, {3, 1024, 2, 1}, {2, 1025, 2, 1}, {65, 40, 5, 1}, {2, 2, 300, 1},
    };
    static const lp_dtype dtypes[] = {LP_F32, LP_F64, LP_BF16, LP_F16};

    simt_device.major = 7;
    simt_device.minor = 5;
    for (const sizes &s : cases)
        for (lp_dtype dtype : dtypes)
            for (int order = 1; order <= 2; order++)
                check_case(s, dtype, order, random_below(2) == 1, random_below(4), random_below(4),
                           random_below(2) == 1 ? 1 << 20 : 16384 + random_below(8) * 256);
    simt_device.major = 9;
    simt_device.minor = 0;
    check_case({33, 40, 3, 4}, LP_F32, 2, false, 0, 0,
               1 << 20); /* float32 and odd rows take it on every device */
    check_case({33, 40, 3, 4}, LP_BF16, 2, false, 1, 0, 1 << 20);
    check_case({33, 40, 3, 4}, LP_BF16, 1, false, 8, 8, 1 << 20);
}

/* By the fused kernel, which takes rows that begin on 16 bytes. */
static void check_fused(sizes s, lp_dtype dtype, int order, bool transposed, size_t scratch)
{
    size_t slack = (8 - s.in % 8) % 8, dy_slack = (8 - s.out % 8) % 8;
    lp_linear l = {};

    l.dtype = dtype;
    l.x_stride = s.in + slack;
    l.dy_stride = s.out + dy_slack;
    CHECK(lp_fused_fits(&l), "%zu x %zu is not for the fused kernel", s.out, s.in);
    check_case(s, dtype, order, transposed, slack, dy_slack, scratch);
}

/* By the instructions of capability 8.0. */
static void check_all_fused(void)
{
    static const sizes cases[] = {
        {8, 8, 1, 1},     {1, 8, 2, 3},     {126, 120, 2, 5}, {128, 128, 1, 16}, {130, 136, 2, 17},
        {16, 256, 3, 31}, {264, 24, 1, 32}, {40, 37, 2, 33},  {126, 129, 2, 64}, {72, 50, 1, 65},
        {8, 16, 6, 2},    {24, 8, 2, 129},  {258, 136, 2, 4}, {34, 3, 3, 96},
    };
    size_t before = simt_device.products;

    CHECK(setenv("LLMPRUNE_CUDA_WGMMA", "0", 1) == 0, "no environment");
    for (const sizes &s : cases)
        for (lp_dtype dtype : {LP_BF16, LP_F16})
            check_fused(s, dtype, 2, dtype == LP_F16 && random_below(2) == 1,
                        random_below(2) == 1 ? 1 << 20 : 8192);
    check_fused({40, 37, 2, 33}, LP_BF16, 1, false, 1 << 20);
    (void)unsetenv("LLMPRUNE_CUDA_WGMMA");
    simt_device.minor = 3;
    check_fused({40, 37, 2, 33}, LP_BF16, 2, false, 1 << 20);
    simt_device.minor = 0;
    simt_device.maps = false;
    check_fused({40, 37, 2, 33}, LP_BF16, 2, false, 1 << 20);
    simt_device.maps = true;
    simt_device.clusters = 0;
    check_fused({40, 37, 2, 33}, LP_F16, 2, false, 1 << 20);
    simt_device.clusters = 2;
    CHECK(simt_device.products == before, "products of warpgroups that nobody asked for, or that cannot be");
}

/* By the kernel of capability 9.0: edges of tiles, clusters, stages and samples; more tiles than clusters. */
static void check_warpgroups(void)
{
    static const sizes cases[] = {
        {8, 8, 1, 1},     {126, 120, 2, 5}, {128, 128, 1, 16},  {130, 136, 2, 17}, {16, 256, 3, 63},
        {264, 24, 2, 64}, {40, 37, 2, 65},  {126, 129, 2, 128}, {72, 50, 1, 129},  {8, 16, 9, 2},
        {24, 8, 2, 193},  {258, 136, 2, 4}, {34, 3, 3, 320},    {600, 520, 2, 33}, {300, 1100, 1, 70},
    };
    lp_allocator allocator = lp_allocator_default();
    lp_cuda_context *context = NULL;
    lp_error err = {};

    for (const sizes &s : cases)
        for (lp_dtype dtype : {LP_BF16, LP_F16}) {
            size_t before = simt_device.products;

            simt_device.clusters = 1 + (int)random_below(3);
            check_fused(s, dtype, 1 + (int)random_below(2), dtype == LP_F16 && random_below(2) == 1,
                        random_below(2) == 1 ? 1 << 20
                        : s.out < 300        ? 8192
                                             : 65536);
            CHECK(simt_device.products > before, "the warpgroups were not asked");
        }
    CHECK(setenv("LLMPRUNE_CUDA_WGMMA", "yes", 1) == 0, "no environment");
    CHECK(lp_cuda()->open(&context, 0, &allocator, &err) == LP_ERR_DEVICE &&
              strstr(err.message, "LLMPRUNE_CUDA_WGMMA is \"yes\"") != NULL,
          "%s", err.message);
    (void)unsetenv("LLMPRUNE_CUDA_WGMMA");
}

/* The bands take every tile once, and blocks' roles fit together. */
static void check_hopper_places(void)
{
    for (unsigned rows = 1; rows < 12; rows++)
        for (unsigned columns = 1; columns < 30; columns++) {
            std::vector<int> taken(rows * columns, 0);

            for (unsigned index = 0; index < rows * columns; index++) {
                unsigned row = ~0u, column = ~0u;

                lp_hopper_place(index, rows, columns, &row, &column);
                if (CHECK(row < rows && column < columns, "tile %u of %u x %u lies at %u, %u", index, rows,
                          columns, row, column))
                    ++taken[row * columns + column];
            }
            CHECK(std::all_of(taken.begin(), taken.end(), [](int times) { return times == 1; }),
                  "not every tile of %u x %u once", rows, columns);
        }
    for (unsigned reader = 0; reader < LP_HOPPER_CLUSTER; reader++) {
        unsigned dy_panels = 0, x_panels = 0, feeders = 0, named = 0;

        for (unsigned rank = 0; rank < LP_HOPPER_CLUSTER; rank++) {
            bool dy = lp_hopper_dy_readers(rank) >> reader & 1, x = lp_hopper_x_readers(rank) >> reader & 1;

            CHECK(!dy || lp_hopper_block_row(rank) == lp_hopper_block_row(reader), "dy of other rows");
            CHECK(!x || lp_hopper_block_column(rank) == lp_hopper_block_column(reader), "x of other columns");
            dy_panels |= dy ? 1u << lp_hopper_dy_panel(rank) : 0;
            x_panels |= x ? 1u << lp_hopper_x_panel(rank) : 0;
            feeders |= dy || x ? 1u << rank : 0;
        }
        for (unsigned i = 0; i < LP_HOPPER_READERS / 8; i++)
            named |= 1u << lp_hopper_feeder(reader, i);
        CHECK(dy_panels == 3 && x_panels == 3 && feeders == named, "block %u of a cluster is not fed whole",
              reader);
    }
}

static void check_refusals(void)
{
    sums row(4, 0.0), col(4, 0.0);
    lp_error err = {};
    layer in({4, 4, 1, 2}, LP_F32, 1, false, 0, 0);
    opened device(1 << 16);
    lp_linear bad = in.linear;
    lp_exec none = device.exec;
    const lp_backend *operations = lp_cuda()->operations;

    bad.order = 3;
    CHECK(operations->linear_scores(&bad, row.data(), col.data(), &device.exec, &err) == LP_ERR_ARGUMENT,
          "order 3");
    bad = in.linear;
    bad.x_stride = 3;
    CHECK(operations->linear_scores(&bad, row.data(), col.data(), &device.exec, &err) == LP_ERR_ARGUMENT,
          "x's stride");
    none.scratch_bytes = 100;
    CHECK(operations->linear_scores(&in.linear, row.data(), col.data(), &none, &err) == LP_ERR_NOMEM &&
              strstr(err.message, "scratch") != NULL,
          "%s", err.message);
    none = device.exec;
    none.context = NULL;
    CHECK(operations->linear_scores(&in.linear, row.data(), col.data(), &none, &err) == LP_ERR_ARGUMENT,
          "no device");
    none = device.exec;
    none.scratch = (unsigned char *)none.scratch + 16;
    CHECK(operations->linear_scores(&in.linear, row.data(), col.data(), &none, &err) == LP_ERR_ARGUMENT,
          "odd scratch");
    for (double value : row)
        CHECK(value == 0.0, "a refused call wrote");
}

static void check_devices(void)
{
    lp_allocator allocator = lp_allocator_default();
    lp_cuda_context *context = NULL;
    lp_error err = {};
    int count = -1;

    simt_device.devices = 0;
    CHECK(lp_cuda()->probe(&count, &err) == LP_ERR_DEVICE && count == 0 &&
              strstr(err.message, "no usable CUDA device: cudaErrorNoDevice") != NULL,
          "%s", err.message);
    simt_device.devices = 1;
    CHECK(lp_cuda()->open(&context, 1, &allocator, &err) == LP_ERR_DEVICE && context == NULL,
          "device 1 of 1");
    simt_device.major = 7;
    simt_device.minor = 0;
    CHECK(lp_cuda()->open(&context, 0, &allocator, &err) == LP_ERR_DEVICE &&
              strstr(err.message, "compute capability 7.0") != NULL,
          "%s", err.message);
    simt_device.major = 9;
    simt_device.fail = cudaErrorMemoryAllocation;
    CHECK(lp_cuda()->probe(&count, &err) == LP_ERR_DEVICE &&
              strstr(err.message, "cudaErrorMemoryAllocation") != NULL,
          "%s", err.message);
    CHECK(cudaGetLastError() == cudaSuccess, "an error is left behind");
    lp_cuda()->close(NULL);
}

int main(void)
{
    check_devices();
    check_refusals();
    check_products();
    check_all_fused();
    check_hopper_places();
    check_warpgroups();
    return check_finish("cuda_host/test_linear");
}
