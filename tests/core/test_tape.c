/* graph.h against tapes that describe no forward pass, random ones among them, and against an allocator that fails. */
#include "check.h"
#include "questions.h"

#include <stdlib.h>
#include <string.h>

static void test_malformed_tapes(void)
{
    static const struct {
        int64_t code[4];
        size_t length;
    } codes[] = {
        {{LP_ARG_TENSOR}, 1},
        {{LP_ARG_INTS, 3, 1}, 3},
        {{LP_ARG_INTS}, 1},
        {{LP_ARG_INTS, -1}, 2},
        {{77, 0}, 2},
        {{-1}, 1},
        {{LP_ARG_TENSOR, 9}, 2},
        {{LP_ARG_TENSOR, -2}, 2},
        {{LP_ARG_TENSORS, 1, 5}, 3},
        {{LP_ARG_TENSORS, INT64_MAX}, 2},
        {{LP_ARG_INT, 1, LP_ARG_FLOAT}, 3},
    };
    lp_allocator heap = lp_allocator_default();
    tape t;
    int64_t out, many[17] = {0};
    lp_error err;

    for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
        tape_begin(&t, heap);
        out = tape_input(&t, SHAPE(2));
        tape_call(&t, "relu", 0, codes[i].code, codes[i].length, &out, 1);
        CHECK(t.status == LP_ERR_TRACE, "code %zu: status %d", i, (int)t.status);
        tape_end(&t);
    }
    tape_begin(&t, heap);
    out = tape_input(&t, SHAPE(2));
    CHECK(lp_graph_add_op(t.graph, "relu", 0, ARGS(T(out)), IDS(4), &err) == LP_ERR_TRACE, "no such output");
    CHECK(strstr(err.message, "tensor 4") != NULL, "%s", err.message);
    CHECK(lp_graph_add_op(t.graph, "", 0, ARGS(T(out)), IDS(0), &err) == LP_ERR_TRACE, "no name");
    CHECK(lp_graph_set_outputs(t.graph, IDS(3), &err) == LP_ERR_TRACE, "no such result");
    CHECK(lp_graph_set_outputs(t.graph, IDS(-1), &err) == LP_ERR_TRACE, "no result -1");
    CHECK(lp_graph_add_tensor(t.graph, SHAPE(-3), LP_TENSOR_VALUE, false, 0, &err) == LP_ERR_TRACE,
          "negative size");
    CHECK(lp_graph_add_tensor(t.graph, many, 17, LP_TENSOR_VALUE, false, 0, &err) == LP_ERR_UNSUPPORTED,
          "17 dims");
    CHECK(lp_graph_add_tensor(t.graph, SHAPE(INT64_MAX, 2), LP_TENSOR_VALUE, false, 0, &err) ==
              LP_ERR_OVERFLOW,
          "too many elements");
    tape_end(&t);

    tape_begin(&t, heap); /* pieces that do not cover what they are pieces of */
    out = tape_input(&t, SHAPE(2, 6));
    many[0] = tape_value(&t, false, SHAPE(2, 4)), many[1] = tape_value(&t, false, SHAPE(2, 4));
    tape_call(&t, "split", 0, ARGS(T(out), I(4), I(1)), many, 2);
    CHECK(tape_build(&t, many[0]) == LP_ERR_TRACE, "%d", (int)t.status);
    tape_end(&t);
    tape_begin(&t, heap); /* a piece larger than the whole beside one that is the whole */
    out = tape_input(&t, SHAPE(2, 6));
    many[0] = tape_value(&t, false, SHAPE(2, 6)), many[1] = tape_value(&t, false, SHAPE(2, INT64_MAX / 2));
    tape_call(&t, "split", 0, ARGS(T(out), I(6), I(1)), many, 2);
    CHECK(tape_build(&t, many[0]) == LP_ERR_TRACE, "%d", (int)t.status);
    tape_end(&t);
    tape_begin(&t, heap); /* nothing at all */
    CHECK(lp_graph_build(t.graph, &err) == LP_OK && lp_graph_axis_count(t.graph) == 0, "the empty tape");
    tape_end(&t);
}

/* Sizes that fit one by one and not together. */
static void test_totals_that_overflow(void)
{
    const int64_t large = INT64_C(1) << 21, half = INT64_C(1) << 62;
    tape t;
    int64_t x, y, total;

    tape_begin(&t, lp_allocator_default());
    for (int i = 0; i < 2; i++)
        (void)tape_parameter(&t, SHAPE(half));
    x = tape_input(&t, SHAPE(1));
    CHECK(tape_build(&t, x) == LP_OK, "%s", t.err.message);
    CHECK(lp_graph_numel(t.graph, NULL, &total, &t.err) == LP_ERR_OVERFLOW, "%lld elements",
          (long long)total);
    tape_end(&t);

    tape_begin(&t, lp_allocator_default());
    x = tape_input(&t, SHAPE(large, large / 2));
    for (int i = 0; i < 2; i++)
        y = tape_linear(&t, x, tape_parameter(&t, SHAPE(large, large / 2)), large, large);
    CHECK(tape_build(&t, y) == LP_OK, "%s", t.err.message);
    CHECK(lp_graph_macs(t.graph, NULL, &total, &t.err) == LP_ERR_OVERFLOW, "%lld products", (long long)total);
    tape_end(&t);
}

/* Any operation of the table on any tensors with any arguments: a status or a graph that answers, never a crash. */
static void test_random_tapes(void)
{
    static const int64_t sizes[] = {1, 2, 3, 4, 6, 12, 0, 1, 2, 4};
    size_t built = 0;

    for (int round = 0; round < 6000; round++) {
        tape t;
        int64_t made = 0;
        size_t ops = 1 + random_below(4);

        tape_begin(&t, lp_allocator_default());
        for (size_t i = 0; i < 5 + ops * 2; i++) {
            int64_t shape[4];
            size_t ndim = random_below(5);
            for (size_t d = 0; d < ndim; d++)
                shape[d] = sizes[random_below(random_below(8) == 0 ? 10 : 6)];
            if (i < 5) {
                static int64_t (*const makers[])(tape *, const int64_t *, size_t) = {
                    tape_parameter, tape_parameter, tape_input, tape_ids, tape_buffer};
                (void)makers[i](&t, shape, ndim);
            } else {
                made = tape_value(&t, random_below(3) == 0, shape, ndim);
            }
        }
        for (size_t i = 0; i < ops; i++) {
            int64_t code[64], outputs[2] = {5 + (int64_t)i * 2, random_below(2) ? 6 + (int64_t)i * 2 : -1};
            size_t length = 0, arguments = random_below(10);
            for (size_t a = 0; a < arguments; a++) {
                int64_t tag =
                    a == 0 ? random_below(6) == 0 ? LP_ARG_TENSORS : LP_ARG_TENSOR : (int64_t)random_below(9);
                code[length++] = tag;
                if (tag == LP_ARG_TENSOR) {
                    code[length++] = (int64_t)random_below(6 + i * 2) - (random_below(20) == 0);
                } else if (tag == LP_ARG_TENSORS || tag == LP_ARG_INTS || tag == LP_ARG_BOOLS) {
                    int64_t n = (int64_t)random_below(4);
                    code[length++] = n;
                    for (int64_t k = 0; k < n; k++)
                        code[length++] = tag == LP_ARG_INTS      ? (int64_t)random_below(9) - 3
                                         : tag == LP_ARG_TENSORS ? (int64_t)random_below(6 + i * 2) - 1
                                                                 : 1;
                } else if (tag != LP_ARG_NONE && tag != LP_ARG_OTHER) {
                    static const int64_t odd[] = {INT64_MIN, INT64_MAX, -1, 0};
                    code[length++] =
                        random_below(12) == 0 ? odd[random_below(4)] : (int64_t)random_below(9) - 3;
                }
            }
            tape_call(&t, tape_rule_name(random_below(tape_rule_count())), (uint32_t)random_below(8), code,
                      length, outputs, 1 + random_below(2));
        }
        if (CHECK(t.status == LP_OK, "%s", t.err.message) && tape_build(&t, made) == LP_OK) {
            built++;
            tape_ask_everything(&t);
            CHECK(t.status == LP_OK, "round %d: %s", round, t.err.message);
        } else {
            CHECK(t.status == LP_ERR_TRACE || t.status == LP_ERR_INTERNAL || t.status == LP_ERR_ARGUMENT ||
                      t.status == LP_ERR_OVERFLOW,
                  "round %d: status %d", round, (int)t.status);
            CHECK(t.err.message[0] != '\0', "a refusal says why");
        }
        tape_end(&t);
    }
    CHECK(built > 1000, "only %zu of the tapes could be built", built);
}

/* A small transformer block, which touches most of the algebra. */
static int64_t block(tape *t)
{
    int64_t ids = tape_ids(t, SHAPE(2, 3)), table = tape_parameter(t, SHAPE(11, 8)), x, h, q, k, v, a, b, o,
            w;

    x = tape_op(t, "embedding", ARGS(T(table), T(ids), I(-1), B(0), B(0)), SHAPE(2, 3, 8));
    w = tape_parameter(t, SHAPE(8));
    h = tape_op(t, "native_layer_norm", ARGS(T(x), IS(8), T(w), NO, F), SHAPE(2, 3, 8));
    w = tape_parameter(t, SHAPE(16, 8)); /* fused: 2 query heads, 1 key, 1 value of dim 4 */
    h = tape_op(t, "linear", ARGS(T(h), T(w), NO), SHAPE(2, 3, 16));
    q = tape_value(t, false, SHAPE(2, 3, 8)), k = tape_value(t, false, SHAPE(2, 3, 4));
    v = tape_value(t, false, SHAPE(2, 3, 4));
    tape_call(t, "split_with_sizes", 0, ARGS(T(h), IS(8, 4, 4), I(2)), IDS(q, k, v));
    q = tape_op(t, "view", ARGS(T(q), IS(2, 3, 2, 4)), SHAPE(2, 3, 2, 4));
    q = tape_op(t, "transpose", ARGS(T(q), I(1), I(2)), SHAPE(2, 2, 3, 4));
    k = tape_op(t, "view", ARGS(T(k), IS(2, 1, 3, 4)), SHAPE(2, 1, 3, 4));
    v = tape_op(t, "view", ARGS(T(v), IS(2, 1, 3, 4)), SHAPE(2, 1, 3, 4));
    a = tape_op(t, "slice", ARGS(T(q), I(3), I(0), I(2), I(1)), SHAPE(2, 2, 3, 2));
    b = tape_op(t, "slice", ARGS(T(q), I(3), I(2), I(4), I(1)), SHAPE(2, 2, 3, 2));
    h = tape_op(t, "cat", ARGS(TS(b, a), I(3)), SHAPE(2, 2, 3, 4));
    q = tape_op(t, "add", ARGS(T(q), T(h), F), SHAPE(2, 2, 3, 4));
    o = tape_op(t, "scaled_dot_product_attention", ARGS(T(q), T(k), T(v), NO, F, B(1), F, B(1)),
                SHAPE(2, 2, 3, 4));
    o = tape_op(t, "transpose", ARGS(T(o), I(1), I(2)), SHAPE(2, 3, 2, 4));
    o = tape_op(t, "reshape", ARGS(T(o), IS(2, 3, 8)), SHAPE(2, 3, 8));
    w = tape_parameter(t, SHAPE(8, 8));
    o = tape_op(t, "linear", ARGS(T(o), T(w), NO), SHAPE(2, 3, 8));
    x = tape_op(t, "add", ARGS(T(x), T(o), F), SHAPE(2, 3, 8));
    w = tape_parameter(t, SHAPE(4, 8));
    h = tape_op(t, "linear", ARGS(T(x), T(w), NO), SHAPE(2, 3, 4));
    a = tape_value(t, false, SHAPE(2, 3, 2)), b = tape_value(t, true, SHAPE(2, 3, 2));
    tape_call(t, "topk", 0, ARGS(T(h), I(2), I(-1), B(1), B(1)), IDS(a, b));
    w = tape_parameter(t, SHAPE(4, 8));
    h = tape_op(t, "index", ARGS(T(w), TS(b)), SHAPE(2, 3, 2, 8));
    h = tape_op(t, "mystery", ARGS(T(h)), SHAPE(2, 3, 2, 8));
    h = tape_op(t, "sum", ARGS(T(h), IS(2), B(0), NO), SHAPE(2, 3, 8));
    x = tape_op(t, "add", ARGS(T(x), T(h), F), SHAPE(2, 3, 8));
    w = tape_op(t, "t", ARGS(T(table)), SHAPE(8, 11));
    return tape_op(t, "matmul", ARGS(T(x), T(w)), SHAPE(2, 3, 11));
}

static void test_failing_allocator(void)
{
    size_t failures = 0;

    for (size_t fail_at = 1;; fail_at++) {
        test_heap heap = {.fail_at = fail_at};
        tape t;
        int64_t out;

        tape_begin(&t, test_allocator(&heap));
        if (t.status == LP_OK) {
            out = block(&t);
            if (tape_build(&t, out) == LP_OK)
                tape_ask_everything(&t);
            tape_end(&t);
        }
        CHECK(heap.lent == 0, "allocation %zu failed: %zu bytes leaked", fail_at, heap.lent);
        if (heap.calls < fail_at) {
            CHECK(t.status == LP_OK, "nothing failed: %s", t.err.message);
            break;
        }
        failures++;
        CHECK(t.status == LP_ERR_NOMEM, "allocation %zu failed: status %d", fail_at, (int)t.status);
    }
    CHECK(failures > 100, "only %zu allocations", failures);
}

int main(void)
{
    test_malformed_tapes();
    test_totals_that_overflow();
    test_random_tapes();
    test_failing_allocator();
    return check_finish("tape");
}
