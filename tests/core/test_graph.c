/* graph.h: the rule of each family of operations, on tapes of a few operations whose axes are known by hand. */
#include "check.h"
#include "tape.h"

#include <string.h>

#define same(...) tape_same(&t, __VA_ARGS__)
#define prunable(...) tape_prunable(&t, __VA_ARGS__)
#define frozen(...) tape_frozen(&t, __VA_ARGS__)
#define produce(...) tape_produce(&t, __VA_ARGS__)
#define consume(...) tape_consume(&t, __VA_ARGS__)

static tape t;

static void begin(void)
{
    tape_begin(&t, lp_allocator_default());
}

static bool build(int64_t output)
{
    return CHECK(tape_build(&t, output) == LP_OK, "%s", t.err.message);
}

static void end(void)
{
    tape_end(&t);
}

static bool at(int64_t owner, uint32_t owner_dim, size_t nth, int64_t tensor, uint32_t dim,
               const int64_t *expected, size_t count)
{
    return tape_positions(&t, tape_axis(&t, owner, owner_dim, nth), tensor, dim, 0, expected, count);
}

static void test_linear_chain(void)
{
    int64_t up, down, bias = 0, x, h, y, out;
    const lp_axis *axis;
    int64_t macs = 0, numel = 0, removed[8] = {0}, each[3] = {-1, -1, -1}, start, stride;

    begin();
    x = tape_input(&t, SHAPE(2, 5));
    up = tape_parameter(&t, SHAPE(7, 5)), bias = tape_parameter(&t, SHAPE(7));
    h = tape_op(&t, "aten::linear", ARGS(T(x), T(up), T(bias)), SHAPE(2, 7));
    y = tape_op(&t, "relu", ARGS(T(h)), SHAPE(2, 7));
    out = consume(y, 2, 7, &down);
    if (build(out)) {
        axis = tape_axis(&t, up, 0, 0);
        CHECK(axis != NULL && axis->prunable && axis->size == 7 && axis->kind == LP_KIND_FFN, "one FFN axis");
        CHECK(axis->member_count == 3 && axis->members[0].tensor == up && axis->members[1].tensor == bias &&
                  axis->members[2].tensor == down && axis->members[2].dim == 1,
              "its members in order of use");
        lp_graph_member_place(t.graph, &axis->members[0], &start, &stride);
        CHECK(start == 0 && stride == 1, "where it begins");
        CHECK(frozen(up, 1, 0, LP_REASON_INPUT) && frozen(down, 0, 0, LP_REASON_OUTPUT), "input and output");
        CHECK(lp_graph_axis_count(t.graph) == 3 && lp_graph_axis(t.graph, 0) == axis,
              "prunable axes come first");
        CHECK(lp_graph_axis(t.graph, 3) == NULL, "no axis past the end");
        CHECK(lp_graph_macs(t.graph, NULL, &macs, &t.err) == LP_OK && macs == 2 * 7 * 5 + 2 * 3 * 7, "macs");
        removed[0] = 3;
        CHECK(lp_graph_macs(t.graph, removed, &macs, &t.err) == LP_OK && macs == 2 * 4 * 5 + 2 * 3 * 4,
              "after");
        CHECK(lp_graph_op_count(t.graph) == 3 &&
                  lp_graph_macs_each(t.graph, removed, each, &t.err) == LP_OK && each[0] == 2 * 4 * 5 &&
                  each[1] == 0 && each[2] == 2 * 3 * 4,
              "of each operation");
        CHECK(lp_graph_numel(t.graph, removed, &numel, &t.err) == LP_OK && numel == 4 * 5 + 4 + 3 * 4,
              "numel");
        CHECK(tape_new_size(&t, h, 1, axis, 3) == 4 && tape_new_size(&t, h, 0, axis, 3) == 2,
              "sizes of values");
        CHECK(lp_graph_freeze(t.graph, 0, LP_REASON_TRIAL, LP_NO_OP, &t.err) == LP_OK, "freeze afterwards");
        CHECK(frozen(up, 0, 0, LP_REASON_TRIAL), "with the reason");
        CHECK(lp_graph_freeze(t.graph, 9, LP_REASON_TRIAL, LP_NO_OP, &t.err) == LP_ERR_ARGUMENT,
              "no such axis");
        CHECK(lp_graph_freeze(t.graph, 0, LP_MARK_MEAN, LP_NO_OP, &t.err) == LP_ERR_ARGUMENT,
              "a mark is no reason");
        CHECK(lp_graph_build(t.graph, &t.err) == LP_ERR_ARGUMENT, "a graph is built once");
    }
    end();
}

static void test_products_of_matrices(void)
{
    int64_t x, a, b, c, bias, h, y, z, weight, macs;

    begin(); /* addmm(bias, x, a): a stored (in, out) as GPT-2 does; mm; a 3-d weight by bmm and baddbmm */
    x = tape_input(&t, SHAPE(2, 5));
    a = tape_parameter(&t, SHAPE(5, 8)), bias = tape_parameter(&t, SHAPE(8)),
    b = tape_parameter(&t, SHAPE(8, 6));
    h = tape_op(&t, "aten::addmm", ARGS(T(bias), T(x), T(a), F, F), SHAPE(2, 8));
    y = tape_op(&t, "aten::mm", ARGS(T(h), T(b)), SHAPE(2, 6));
    c = tape_parameter(&t, SHAPE(6));
    z = tape_op(&t, "aten::mv", ARGS(T(y), T(c)), SHAPE(2));
    if (build(z)) {
        CHECK(same(a, 1, 0, bias, 0, 0) && same(a, 1, 0, b, 0, 0) && prunable(a, 1, 0), "h: a, bias, b");
        CHECK(same(b, 1, 0, c, 0, 0) && prunable(b, 1, 0), "y: b, c");
        CHECK(frozen(a, 0, 0, LP_REASON_INPUT), "x");
        CHECK(lp_graph_macs(t.graph, NULL, &macs, &t.err) == LP_OK && macs == 80 + 96 + 12, "macs %lld",
              (long long)macs);
    }
    end();

    begin(); /* experts: (E, tokens, in) x (E, in, h), baddbmm with a bias per expert */
    x = tape_input(&t, SHAPE(4, 3, 5));
    a = tape_parameter(&t, SHAPE(4, 5, 8)), b = tape_parameter(&t, SHAPE(4, 8, 2)),
    bias = tape_parameter(&t, SHAPE(4, 1, 2));
    h = tape_op(&t, "bmm", ARGS(T(x), T(a)), SHAPE(4, 3, 8));
    y = tape_op(&t, "baddbmm", ARGS(T(bias), T(h), T(b), F, F), SHAPE(4, 3, 2));
    if (build(y)) {
        CHECK(same(a, 2, 0, b, 1, 0) && prunable(a, 2, 0), "hidden channel of every expert");
        CHECK(same(a, 0, 0, b, 0, 0) && same(a, 0, 0, bias, 0, 0) && frozen(a, 0, 0, LP_REASON_INPUT),
              "batch");
        CHECK(same(bias, 2, 0, b, 2, 0), "the bias meets the free dimension");
    }
    end();

    begin(); /* _grouped_mm: like bmm over experts, tokens sorted by expert */
    x = tape_input(&t, SHAPE(6, 5)), a = tape_parameter(&t, SHAPE(4, 5, 8)),
    b = tape_parameter(&t, SHAPE(4, 8, 3));
    c = tape_ids(&t, SHAPE(4));
    h = tape_op(&t, "_grouped_mm", ARGS(T(x), T(a), T(c)), SHAPE(6, 8));
    y = tape_op(&t, "_grouped_mm", ARGS(T(h), T(b), T(c)), SHAPE(6, 3));
    if (build(y))
        CHECK(same(a, 2, 0, b, 1, 0) && prunable(a, 2, 0) && same(a, 0, 0, b, 0, 0),
              "experts and their channels");
    end();

    begin(); /* two weights multiplied: LoRA's merged product; then used on an activation */
    a = tape_parameter(&t, SHAPE(6, 4)), b = tape_parameter(&t, SHAPE(4, 5)), x = tape_input(&t, SHAPE(2, 5));
    weight = tape_op(&t, "mm", ARGS(T(a), T(b)), SHAPE(6, 5));
    h = tape_linear(&t, x, weight, 2, 6);
    y = consume(h, 2, 6, &c);
    if (build(y)) {
        CHECK(same(a, 1, 0, b, 0, 0) && prunable(a, 1, 0), "the rank");
        CHECK(same(a, 0, 0, c, 1, 0) && prunable(a, 0, 0), "rows of the product");
    }
    end();
}

static void test_attention(void)
{
    /* q (1, 4, 3, 6), k (1, 2, 3, 6), v (1, 2, 3, 5), as grouped-query attention has them; with and without scale */
    for (int scaled = 0; scaled < 2; scaled++) {
        int64_t x, wq, wk, wv, wo, q, k, v, o, y;
        static const char *const names[] = {"scaled_dot_product_attention",
                                            "_scaled_dot_product_flash_attention_for_cpu"};

        begin();
        x = tape_input(&t, SHAPE(1, 3, 7));
        wq = tape_parameter(&t, SHAPE(24, 7)), wk = tape_parameter(&t, SHAPE(12, 7)),
        wv = tape_parameter(&t, SHAPE(10, 7));
        q = tape_op(&t, "linear", ARGS(T(x), T(wq), NO), SHAPE(1, 3, 24));
        q = tape_op(&t, "view", ARGS(T(q), IS(1, 3, 4, 6)), SHAPE(1, 3, 4, 6));
        q = tape_op(&t, "transpose", ARGS(T(q), I(1), I(2)), SHAPE(1, 4, 3, 6));
        k = tape_op(&t, "linear", ARGS(T(x), T(wk), NO), SHAPE(1, 3, 12));
        k = tape_op(&t, "view", ARGS(T(k), IS(1, 3, 2, 6)), SHAPE(1, 3, 2, 6));
        k = tape_op(&t, "transpose", ARGS(T(k), I(1), I(2)), SHAPE(1, 2, 3, 6));
        v = tape_op(&t, "linear", ARGS(T(x), T(wv), NO), SHAPE(1, 3, 10));
        v = tape_op(&t, "view", ARGS(T(v), IS(1, 3, 2, 5)), SHAPE(1, 3, 2, 5));
        v = tape_op(&t, "transpose", ARGS(T(v), I(1), I(2)), SHAPE(1, 2, 3, 5));
        if (scaled) /* q, k, v, mask, dropout, causal, scale */
            o = tape_op(&t, names[0], ARGS(T(q), T(k), T(v), NO, F, B(1), F, B(1)), SHAPE(1, 4, 3, 5));
        else
            o = tape_op(&t, names[1], ARGS(T(q), T(k), T(v), F, B(1), NO, NO), SHAPE(1, 4, 3, 5));
        o = tape_op(&t, "transpose", ARGS(T(o), I(1), I(2)), SHAPE(1, 3, 4, 5));
        o = tape_op(&t, "reshape", ARGS(T(o), IS(1, 3, 20)), SHAPE(1, 3, 20));
        wo = tape_parameter(&t, SHAPE(7, 20));
        y = tape_op(&t, "linear", ARGS(T(o), T(wo), NO), SHAPE(1, 3, 7));
        if (build(y)) {
            const lp_axis *kv = tape_axis(&t, wk, 0, 0), *group = tape_axis(&t, wq, 0, 1);
            CHECK(kv != NULL && kv->kind == LP_KIND_HEAD && kv->size == 2 && kv->prunable, "KV heads");
            CHECK(group != NULL && group->kind == LP_KIND_QUERY && group->size == 2 && group->prunable,
                  "query heads");
            CHECK(same(wq, 0, 0, wk, 0, 0) && same(wv, 0, 0, wk, 0, 0) && same(wo, 1, 0, wk, 0, 0),
                  "k, v, q, o");
            CHECK(same(wq, 0, 1, wo, 1, 1), "G ties q and o");
            CHECK(same(wq, 0, 2, wk, 0, 1) && same(wv, 0, 1, wo, 1, 2), "head_dim and value_dim");
            CHECK(tape_axis(&t, wv, 0, 1)->kind == LP_KIND_VALUE_DIM && prunable(wv, 0, 1), "value_dim");
            if (scaled)
                CHECK(prunable(wk, 0, 1) && tape_axis(&t, wk, 0, 1)->kind == LP_KIND_HEAD_DIM,
                      "head_dim is free");
            else
                CHECK(frozen(wk, 0, 1, LP_REASON_SCALE), "the scale follows from head_dim");
            CHECK(at(wq, 0, 1, wo, 1,
                     SHAPE(0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 5, 6, 7, 8, 9, 15, 16, 17, 18, 19)),
                  "a query head is a block of o's columns in each KV head");
            if (group != NULL &&
                kv != NULL) { /* ragged: query head 1 of KV head 0, query head 0 of KV head 1 */
                uint8_t flags[24] = {0};
                const int64_t chosen[] = {1, 0};
                CHECK(lp_graph_mark_ragged(t.graph, group, 0, kv, chosen, 1, flags, &t.err) == LP_OK,
                      "ragged");
                for (int p = 0; p < 24; p++)
                    CHECK(flags[p] == (p >= 6 && p < 18), "position %d", p);
                CHECK(lp_graph_mark_ragged(t.graph, kv, 1, group, chosen, 1, flags, &t.err) == LP_ERR_PLAN,
                      "k's rows do not nest in query heads");
                CHECK(lp_graph_mark_ragged(t.graph, group, 7, kv, chosen, 1, flags, &t.err) ==
                          LP_ERR_ARGUMENT,
                      "no such member");
            }
        }
        end();
    }
}

static void test_attention_with_an_empty_logsumexp(void)
{
    int64_t wq, wo, q, o, lse, flat, y;

    begin(); /* kernels leave logsumexp empty when no gradient is wanted; the output must stay tied all the same */
    q = produce(12, &wq);
    q = tape_op(&t, "view", ARGS(T(q), IS(1, 2, 3, 4)), SHAPE(1, 2, 3, 4));
    q = tape_op(&t, "transpose", ARGS(T(q), I(1), I(2)), SHAPE(1, 3, 2, 4));
    o = tape_value(&t, false, SHAPE(1, 3, 2, 4)), lse = tape_value(&t, false, SHAPE(1, 3, 0));
    tape_call(&t, "_scaled_dot_product_efficient_attention", 0, ARGS(T(q), T(q), T(q), NO, B(0), F, B(0), F),
              IDS(o, lse, -1, -1));
    flat = tape_op(&t, "transpose", ARGS(T(o), I(1), I(2)), SHAPE(1, 2, 3, 4));
    flat = tape_op(&t, "reshape", ARGS(T(flat), IS(2, 12)), SHAPE(2, 12));
    y = consume(flat, 2, 12, &wo);
    if (build(y))
        CHECK(same(wq, 0, 0, wo, 1, 0) && prunable(wq, 0, 0) && same(wq, 0, 1, wo, 1, 1),
              "heads and dims pass");
    end();
}

/* A sequence padded from 7 to 8 and cut into 2 chunks of 4, as state space models do: 7 + 1 has no such factors, but the
 * heads beside it are whole. */
static void test_a_view_that_does_not_align_freezes_no_other_dimension(void)
{
    int64_t w, wo, x, h, y;

    begin();
    x = tape_input(&t, SHAPE(1, 7, 5)), w = tape_parameter(&t, SHAPE(12, 5));
    h = tape_op(&t, "linear", ARGS(T(x), T(w), NO), SHAPE(1, 7, 12));
    h = tape_op(&t, "view", ARGS(T(h), IS(1, 7, 3, 4)), SHAPE(1, 7, 3, 4));
    h = tape_op(&t, "constant_pad_nd", ARGS(T(h), IS(0, 0, 0, 0, 0, 1), I(0)), SHAPE(1, 8, 3, 4));
    h = tape_op(&t, "view", ARGS(T(h), IS(1, 2, 4, 3, 4)), SHAPE(1, 2, 4, 3, 4));
    h = tape_op(&t, "view", ARGS(T(h), IS(8, 12)), SHAPE(8, 12));
    y = consume(h, 8, 12, &wo);
    if (build(y)) {
        CHECK(prunable(w, 0, 0) && prunable(w, 0, 1), "heads and their width");
        CHECK(same(w, 0, 0, wo, 1, 0) && same(w, 0, 1, wo, 1, 1), "and they arrive");
    }
    end();
}

static void test_views_and_permutations(void)
{
    int64_t w, out, h, y;

    begin(); /* (2, 24) -> (2, 2, 3, 4) -> (2, 4, 3, 2) -> (2, 24): positions follow */
    h = produce(24, &w);
    h = tape_op(&t, "view", ARGS(T(h), IS(2, 2, 3, 4)), SHAPE(2, 2, 3, 4));
    h = tape_op(&t, "permute", ARGS(T(h), IS(0, 3, -2, 1)), SHAPE(2, 4, 3, 2));
    h = tape_op(&t, "_unsafe_view", ARGS(T(h), IS(2, 24)), SHAPE(2, 24));
    y = consume(h, 2, 24, &out);
    if (build(y)) {
        CHECK(same(w, 0, 0, out, 1, 2) && same(w, 0, 1, out, 1, 1) && same(w, 0, 2, out, 1, 0),
              "order turned");
        CHECK(at(w, 0, 0, w, 0,
                 SHAPE(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)),
              "outer in the producer");
        CHECK(at(w, 0, 0, out, 1,
                 SHAPE(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23)),
              "inner in the consumer");
    }
    end();

    begin(); /* t, numpy_T, unsqueeze, squeeze, transpose of a weight */
    w = tape_parameter(&t, SHAPE(5, 6)), h = tape_input(&t, SHAPE(2, 5));
    out = tape_op(&t, "t", ARGS(T(w)), SHAPE(6, 5));
    out = tape_op(&t, "numpy_T", ARGS(T(out)), SHAPE(5, 6));
    y = tape_op(&t, "mm", ARGS(T(h), T(out)), SHAPE(2, 6));
    y = tape_op(&t, "unsqueeze", ARGS(T(y), I(1)), SHAPE(2, 1, 6));
    y = tape_op(&t, "squeeze", ARGS(T(y), I(1)), SHAPE(2, 6));
    y = consume(y, 2, 6, &out);
    if (build(y))
        CHECK(same(w, 1, 0, out, 1, 0) && prunable(w, 1, 0), "through t, T and unit dimensions");
    end();

    begin(); /* a view whose border falls across: 6 x 4 read as 4 x 6 of an axis already split otherwise */
    h = produce(24, &w);
    out = tape_op(&t, "view", ARGS(T(h), IS(2, 6, 4)), SHAPE(2, 6, 4));
    y = tape_op(&t, "view", ARGS(T(h), IS(2, 4, 6)), SHAPE(2, 4, 6));
    y = tape_op(&t, "reshape", ARGS(T(y), IS(2, 24)), SHAPE(2, 24));
    out = tape_op(&t, "reshape", ARGS(T(out), IS(2, 24)), SHAPE(2, 24));
    y = tape_point(&t, "mul", ARGS(T(y), T(out)), SHAPE(2, 24));
    y = consume(y, 2, 24, &out);
    if (build(y))
        CHECK(frozen(w, 0, 0, LP_REASON_MISALIGNED) && frozen(w, 0, 1, LP_REASON_MISALIGNED), "misaligned");
    end();
}

static void test_expand_and_repeat(void)
{
    int64_t w, out, h, y;

    begin(); /* repeat_kv by expand: (2, 3, 1, 4) -> (2, 3, 2, 4) -> (2, 24) */
    h = produce(12, &w);
    h = tape_op(&t, "view", ARGS(T(h), IS(2, 3, 1, 4)), SHAPE(2, 3, 1, 4));
    h = tape_op(&t, "expand", ARGS(T(h), IS(2, 3, 2, 4), B(0)), SHAPE(2, 3, 2, 4));
    h = tape_op(&t, "reshape", ARGS(T(h), IS(2, 24)), SHAPE(2, 24));
    y = consume(h, 2, 24, &out);
    if (build(y)) {
        CHECK(same(w, 0, 0, out, 1, 0) && same(w, 0, 1, out, 1, 2), "3 x 4 inside 3 x 2 x 4");
        CHECK(tape_axis(&t, out, 1, 1)->size == 2 && prunable(out, 1, 1),
              "the copies are an axis of the consumer's");
        CHECK(at(w, 0, 0, out, 1,
                 SHAPE(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)),
              "both copies of a block");
    }
    end();

    begin(); /* repeat: fresh x inner */
    h = produce(4, &w);
    h = tape_op(&t, "repeat", ARGS(T(h), IS(1, 3)), SHAPE(2, 12));
    y = consume(h, 2, 12, &out);
    if (build(y))
        CHECK(same(w, 0, 0, out, 1, 1) && at(w, 0, 0, out, 1, SHAPE(0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11)),
              "repeat");
    end();
}

static void test_latents_of_a_resampler(void)
{
    int64_t latents, wq, wk, wv, q, k, v, scores, y, out;

    begin(); /* latents repeated for each image attend to themselves in two heads: they are tokens, not a state */
    latents = tape_parameter(&t, SHAPE(4, 5)), wq = tape_parameter(&t, SHAPE(6, 5)),
    wk = tape_parameter(&t, SHAPE(6, 5)), wv = tape_parameter(&t, SHAPE(6, 5));
    y = tape_op(&t, "repeat", ARGS(T(latents), IS(3, 1, 1)), SHAPE(3, 4, 5));
    y = tape_op(&t, "add", ARGS(T(y), T(tape_parameter(&t, SHAPE(4, 5))), F), SHAPE(3, 4, 5));
    q = tape_op(&t, "linear", ARGS(T(y), T(wq), NO), SHAPE(3, 4, 6));
    q = tape_op(&t, "view", ARGS(T(q), IS(3, 4, 2, 3)), SHAPE(3, 4, 2, 3));
    q = tape_op(&t, "transpose", ARGS(T(q), I(1), I(2)), SHAPE(3, 2, 4, 3));
    k = tape_op(&t, "linear", ARGS(T(y), T(wk), NO), SHAPE(3, 4, 6));
    k = tape_op(&t, "view", ARGS(T(k), IS(3, 4, 2, 3)), SHAPE(3, 4, 2, 3));
    k = tape_op(&t, "permute", ARGS(T(k), IS(0, 2, 3, 1)), SHAPE(3, 2, 3, 4));
    v = tape_op(&t, "linear", ARGS(T(y), T(wv), NO), SHAPE(3, 4, 6));
    v = tape_op(&t, "view", ARGS(T(v), IS(3, 4, 2, 3)), SHAPE(3, 4, 2, 3));
    v = tape_op(&t, "transpose", ARGS(T(v), I(1), I(2)), SHAPE(3, 2, 4, 3));
    scores = tape_op(&t, "matmul", ARGS(T(q), T(k)), SHAPE(3, 2, 4, 4));
    scores = tape_op(&t, "_softmax", ARGS(T(scores), I(-1), B(0)), SHAPE(3, 2, 4, 4));
    y = tape_op(&t, "matmul", ARGS(T(scores), T(v)), SHAPE(3, 2, 4, 3));
    y = tape_op(&t, "transpose", ARGS(T(y), I(1), I(2)), SHAPE(3, 4, 2, 3));
    y = tape_op(&t, "reshape", ARGS(T(y), IS(12, 6)), SHAPE(12, 6));
    y = consume(y, 12, 6, &out);
    if (build(y)) {
        CHECK(tape_axis(&t, wq, 0, 0)->kind == LP_KIND_HEAD, "heads");
        CHECK(tape_axis(&t, wq, 0, 1)->kind == LP_KIND_HEAD_DIM, "queries of the latents are activations");
        CHECK(tape_axis(&t, latents, 0, 0)->kind == LP_KIND_OTHER, "the latents themselves");
    }
    end();
}

static void test_cat_stack_pad(void)
{
    int64_t w1, w2, out, a, b, h, y, positions;

    begin();
    a = produce(3, &w1), b = produce(4, &w2);
    h = tape_op(&t, "cat", ARGS(TS(a, b, a), I(-1)), SHAPE(2, 10));
    y = consume(h, 2, 10, &out);
    if (build(y)) {
        CHECK(same(w1, 0, 0, out, 1, 0) && same(w2, 0, 0, out, 1, 1) && prunable(w2, 0, 0),
              "two terms, one twice");
        CHECK(tape_axis(&t, w1, 0, 0)->member_count == 3, "an occurrence is a member of its own");
        CHECK(tape_positions(&t, tape_axis(&t, w1, 0, 0), out, 1, 1, SHAPE(7, 8, 9)), "the second");
        CHECK(at(w2, 0, 0, out, 1, SHAPE(3, 4, 5, 6)), "behind the first term");
        CHECK(tape_new_size(&t, out, 1, tape_axis(&t, w1, 0, 0), 1) == 8,
              "an index of the first counts twice");
    }
    end();

    begin(); /* stack: the new dimension is fixed, the others unify */
    a = produce(4, &w1), b = produce(4, &w2);
    h = tape_op(&t, "stack", ARGS(TS(a, b), I(2)), SHAPE(2, 4, 2));
    h = tape_op(&t, "view", ARGS(T(h), IS(2, 8)), SHAPE(2, 8));
    y = consume(h, 2, 8, &out);
    if (build(y)) {
        CHECK(same(w1, 0, 0, w2, 0, 0) && same(w1, 0, 0, out, 1, 0), "interleaved");
        CHECK(frozen(out, 1, 1, LP_REASON_FIXED), "two by the code");
        CHECK(at(w1, 0, 0, out, 1, SHAPE(0, 1, 2, 3, 4, 5, 6, 7)), "a pair each");
    }
    end();

    begin(); /* pad by 2 in front and 1 behind; then unpad */
    h = produce(4, &w1);
    h = tape_op(&t, "constant_pad_nd", ARGS(T(h), IS(2, 1), F), SHAPE(2, 7));
    positions = tape_parameter(&t, SHAPE(7));
    h = tape_op(&t, "add", ARGS(T(h), T(positions), F), SHAPE(2, 7));
    h = tape_op(&t, "constant_pad_nd", ARGS(T(h), IS(-2, -1), F), SHAPE(2, 4));
    y = consume(h, 2, 4, &out);
    if (build(y)) {
        CHECK(same(w1, 0, 0, positions, 0, 1) && same(w1, 0, 0, out, 1, 0),
              "the middle is the producer's axis");
        CHECK(frozen(positions, 0, 0, LP_REASON_PADDING), "the padding is fixed");
        CHECK(at(w1, 0, 0, positions, 0, SHAPE(2, 3, 4, 5)), "shifted by two");
    }
    end();
}

static void test_slices_and_splits(void)
{
    int64_t w, out, a, b, c, h, y;

    begin(); /* fused gate and up: chunk, silu(gate) * up */
    h = produce(8, &w);
    a = tape_value(&t, false, SHAPE(2, 4)), b = tape_value(&t, false, SHAPE(2, 4));
    tape_call(&t, "split", 0, ARGS(T(h), I(4), I(-1)), IDS(a, b));
    a = tape_op(&t, "silu", ARGS(T(a)), SHAPE(2, 4));
    h = tape_op(&t, "mul", ARGS(T(a), T(b)), SHAPE(2, 4));
    y = consume(h, 2, 4, &out);
    if (build(y)) {
        const lp_axis *axis = tape_axis(&t, w, 0, 0);
        CHECK(same(w, 0, 0, out, 1, 0) && prunable(w, 0, 0) && axis->kind == LP_KIND_FFN, "one FFN axis");
        CHECK(axis->member_count == 3 && tape_positions(&t, axis, w, 0, 0, SHAPE(0, 1, 2, 3)) &&
                  tape_positions(&t, axis, w, 0, 1, SHAPE(4, 5, 6, 7)),
              "gate and up are members of their own");
    }
    end();

    begin(); /* a piece of size 0 (phi3's rest of a head) leaves the others as they are */
    h = produce(6, &w);
    a = tape_value(&t, false, SHAPE(2, 6)), b = tape_value(&t, false, SHAPE(2, 0));
    tape_call(&t, "split_with_sizes", 0, ARGS(T(h), IS(6, 0), I(1)), IDS(a, b));
    c = tape_op(&t, "cat", ARGS(TS(a, b), I(1)), SHAPE(2, 6));
    y = consume(c, 2, 6, &out);
    if (build(y))
        CHECK(same(w, 0, 0, out, 1, 0) && prunable(w, 0, 0), "the full piece is the whole");
    end();

    begin(); /* slices with borders that equations explain, and with borders written in the code */
    h = produce(10, &w);
    a = tape_op(&t, "slice", ARGS(T(h), I(1), I(0), I(4), I(1)), SHAPE(2, 4));
    b = tape_op(&t, "slice", ARGS(T(h), I(1), I(4), I(INT64_MAX), I(1)), SHAPE(2, 6));
    h = tape_op(&t, "cat", ARGS(TS(b, a), I(1)), SHAPE(2, 10));
    y = consume(h, 2, 10, &out);
    if (build(y)) {
        CHECK(prunable(w, 0, 0) && prunable(w, 0, 1), "both pieces");
        CHECK(same(w, 0, 0, out, 1, 1) && at(w, 0, 0, out, 1, SHAPE(6, 7, 8, 9)), "rolled");
    }
    end();

    for (int64_t from_end = 0; from_end < 2; from_end++) {
        begin();
        h = produce(10, &w);
        a = tape_value(&t, false, SHAPE(2, 7));
        tape_call(&t, "slice", LP_OP_LITERAL, ARGS(T(h), I(1), I(from_end ? -7 : 3), NO, I(1)), IDS(a));
        y = consume(a, 2, 7, &out);
        if (build(y)) {
            CHECK(frozen(w, 0, from_end ? 1 : 0, LP_REASON_FIXED),
                  "the side the literal counts from keeps its size");
            CHECK(prunable(w, 0, from_end ? 0 : 1), "the other may shrink");
        }
        end();
    }

    begin(); /* x[..., ::2] and x[..., 1::2]: pairs */
    h = produce(8, &w);
    a = tape_op(&t, "slice", ARGS(T(h), I(1), I(0), I(INT64_MAX), I(2)), SHAPE(2, 4));
    b = tape_op(&t, "slice", ARGS(T(h), I(1), I(1), I(INT64_MAX), I(2)), SHAPE(2, 4));
    h = tape_op(&t, "mul", ARGS(T(a), T(b)), SHAPE(2, 4));
    y = consume(h, 2, 4, &out);
    if (build(y)) {
        CHECK(same(w, 0, 0, out, 1, 0) && prunable(w, 0, 0) && frozen(w, 0, 1, LP_REASON_SELECT),
              "(n / 2) x 2");
        CHECK(at(w, 0, 0, w, 0, SHAPE(0, 1, 2, 3, 4, 5, 6, 7)), "pairs of neighbours");
    }
    end();

    begin(); /* select and unbind by a constant */
    w = tape_parameter(&t, SHAPE(3, 4)), h = tape_input(&t, SHAPE(2, 4));
    a = tape_op(&t, "select", ARGS(T(w), I(0), I(1)), SHAPE(4));
    y = tape_op(&t, "mul", ARGS(T(h), T(a)), SHAPE(2, 4));
    if (build(y))
        CHECK(frozen(w, 0, 0, LP_REASON_SELECT) && frozen(w, 1, 0, LP_REASON_INPUT), "picked from");
    end();
}

static void test_rotary(void)
{
    int64_t w, out, h, a, b, r, cosine, y;

    begin(); /* rotate_half on (2, 3 heads, 8) */
    h = produce(24, &w);
    h = tape_op(&t, "view", ARGS(T(h), IS(2, 3, 8)), SHAPE(2, 3, 8));
    a = tape_op(&t, "slice", ARGS(T(h), I(2), I(0), I(4), I(1)), SHAPE(2, 3, 4));
    b = tape_op(&t, "slice", ARGS(T(h), I(2), I(4), I(8), I(1)), SHAPE(2, 3, 4));
    b = tape_point(&t, "neg", ARGS(T(b)), SHAPE(2, 3, 4));
    r = tape_op(&t, "cat", ARGS(TS(b, a), I(-1)), SHAPE(2, 3, 8));
    cosine = tape_buffer(&t, SHAPE(4));
    y = tape_op(&t, "cat", ARGS(TS(cosine, cosine), I(-1)), SHAPE(8));
    h = tape_op(&t, "mul", ARGS(T(h), T(y)), SHAPE(2, 3, 8));
    h = tape_op(&t, "add", ARGS(T(h), T(r), F), SHAPE(2, 3, 8));
    h = tape_op(&t, "view", ARGS(T(h), IS(2, 24)), SHAPE(2, 24));
    y = consume(h, 2, 24, &out);
    if (build(y)) {
        const lp_axis *pairs = tape_axis(&t, w, 0, 1);
        CHECK(pairs != NULL && pairs->size == 4 && pairs->prunable, "D = P + P");
        CHECK(same(w, 0, 1, cosine, 0, 0), "a buffer is a member too");
        CHECK(pairs->member_count == 5, "two in the producer, two in the consumer, one in the table");
        CHECK(tape_positions(&t, pairs, w, 0, 1, SHAPE(4, 12, 20, 5, 13, 21, 6, 14, 22, 7, 15, 23)),
              "the other half");
        CHECK(tape_new_size(&t, w, 0, pairs, 1) == 18, "3 x 2 x (4 - 1)");
    }
    end();
}

static void test_explain_joins_members(void)
{
    int64_t w, out, h, a, b, y;
    lp_steps steps = {NULL, 0, 0};
    uint32_t tensor, dim;

    begin();
    h = produce(8, &w);
    a = tape_value(&t, false, SHAPE(2, 4)), b = tape_value(&t, false, SHAPE(2, 4));
    tape_call(&t, "split", 0, ARGS(T(h), I(4), I(-1)), IDS(a, b));
    h = tape_op(&t, "mul", ARGS(T(a), T(b)), SHAPE(2, 4));
    y = consume(h, 2, 4, &out);
    if (build(y)) {
        const lp_axis *axis = lp_graph_axis(t.graph, 0);
        for (size_t i = 0; i < axis->member_count; i++)
            for (size_t j = 0; j < axis->member_count; j++) {
                steps.count = 0;
                CHECK(lp_graph_explain(t.graph, 0, i, j, &steps, &t.err) == LP_OK, "%s", t.err.message);
                for (size_t k = 1; k < steps.count; k++)
                    CHECK(steps.items[k].from == steps.items[k - 1].to, "%zu to %zu: step %zu", i, j, k);
                for (size_t k = 0; k < steps.count; k++)
                    CHECK(steps.items[k].op < t.ops && steps.items[k].rule != LP_RULE_NONE, "step %zu", k);
                if (i == j)
                    continue;
                if (!CHECK(steps.count > 0, "%zu to %zu has no steps", i, j))
                    continue;
                CHECK(lp_graph_atom_dim(t.graph, steps.items[0].from, &tensor, &dim) &&
                          tensor == axis->members[i].tensor && dim == axis->members[i].dim,
                      "%zu to %zu begins elsewhere", i, j);
                CHECK(lp_graph_atom_dim(t.graph, steps.items[steps.count - 1].to, &tensor, &dim) &&
                          tensor == axis->members[j].tensor && dim == axis->members[j].dim,
                      "%zu to %zu ends elsewhere", i, j);
            }
        CHECK(lp_graph_explain(t.graph, 0, 0, 99, &steps, &t.err) == LP_ERR_ARGUMENT, "no such member");
        CHECK(lp_graph_explain(t.graph, 99, 0, 0, &steps, &t.err) == LP_ERR_ARGUMENT, "no such axis");
        lp_steps_free(lp_graph_allocator(t.graph), &steps);
    }
    end();
}

static void test_table_is_sorted(void)
{
    for (size_t i = 0; i < tape_rule_count(); i++) {
        CHECK(i == 0 || strcmp(tape_rule_name(i - 1), tape_rule_name(i)) < 0, "%s is out of order",
              tape_rule_name(i));
        CHECK(tape_rule_known(tape_rule_name(i)), "%s is not found", tape_rule_name(i));
    }
    CHECK(!tape_rule_known("no_such_operation"), "an unknown name");
}

int main(void)
{
    test_linear_chain();
    test_products_of_matrices();
    test_attention();
    test_attention_with_an_empty_logsumexp();
    test_views_and_permutations();
    test_a_view_that_does_not_align_freezes_no_other_dimension();
    test_expand_and_repeat();
    test_latents_of_a_resampler();
    test_cat_stack_pad();
    test_slices_and_splits();
    test_rotary();
    test_explain_joins_members();
    test_table_is_sorted();
    return check_finish("graph");
}
