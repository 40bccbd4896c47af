/* vanish.c: what is summed over an axis must be zero where the weights are; and integers that name an axis's positions
 * must not be computed with. */
#include "check.h"
#include "tape.h"

#define prunable(...) tape_prunable(&t, __VA_ARGS__)
#define frozen(...) tape_frozen(&t, __VA_ARGS__)
#define same(...) tape_same(&t, __VA_ARGS__)
#define FLOAT_ARG(bits) LP_ARG_FLOAT, (bits)
#define ONE 0x3FF0000000000000 /* the bits of 1.0 */

static tape t;

static void begin(void)
{
    tape_begin(&t, lp_allocator_default());
}

static bool build(int64_t output)
{
    return CHECK(tape_build(&t, output) == LP_OK, "%s", t.err.message);
}

/* Streams: a value copied along an axis of 4, gated by one number for each stream, and summed. */
static void test_copies_gated_by_what_is_not_zero_at_zero(void)
{
    const char *gates[] = {"sigmoid", "tanh"};

    for (int zero_at_zero = 0; zero_at_zero < 2; zero_at_zero++) {
        int64_t w, x, streams, gate, y;
        tape_begin(&t, lp_allocator_default());
        gate = tape_produce(&t, 4, &w);
        gate = tape_op(&t, gates[zero_at_zero], ARGS(T(gate)), SHAPE(2, 4));
        gate = tape_op(&t, "unsqueeze", ARGS(T(gate), I(-1)), SHAPE(2, 4, 1));
        x = tape_input(&t, SHAPE(2, 1, 3));
        streams = tape_op(&t, "expand", ARGS(T(x), IS(2, 4, 3), B(0)), SHAPE(2, 4, 3));
        y = tape_op(&t, "mul", ARGS(T(gate), T(streams)), SHAPE(2, 4, 3));
        y = tape_op(&t, "sum", ARGS(T(y), IS(1), B(0), NO), SHAPE(2, 3));
        if (build(y)) {
            if (zero_at_zero)
                CHECK(prunable(w, 0, 0), "tanh(0) is zero: the copies fall with their gates");
            else
                CHECK(frozen(w, 0, 0, LP_REASON_REMAINS), "sigmoid(0) is not: the copies remain");
        }
        tape_end(&t);
    }
}

/* (f(h) * sigmoid(h)).sum(-1): whether an index of h can go is whether f(0) is zero there. */
static void test_what_is_put_in_place_of_zero_remains(void)
{
    enum { FILLED, FILLED_WITH_ZERO, CHOSEN, BOUNDED, BOUNDED_ABOVE_ZERO, BOUNDED_BY_TENSOR, ADDED, CASES };
    const char *const names[CASES] = {"masked_fill with 1", "masked_fill with 0",  "where with a constant",
                                      "hardtanh",           "hardtanh above zero", "clamp by a tensor",
                                      "addcmul of sigmoids"};

    for (int which = 0; which < CASES; which++) {
        int64_t w, h, gate, other, mask, f, y;
        begin();
        h = tape_produce(&t, 6, &w);
        gate = tape_point(&t, "sigmoid", ARGS(T(h)), SHAPE(2, 6));
        mask = tape_value(&t, true, SHAPE(2, 6));
        tape_call(&t, "gt", LP_OP_POINTWISE, ARGS(T(h), I(0)), IDS(mask));
        other = tape_input(&t, SHAPE(1));
        if (which == FILLED || which == FILLED_WITH_ZERO)
            f = tape_point(&t, "masked_fill", ARGS(T(h), T(mask), I(which == FILLED)), SHAPE(2, 6));
        else if (which == CHOSEN)
            f = tape_point(&t, "where", ARGS(T(mask), T(h), T(other)), SHAPE(2, 6));
        else if (which == BOUNDED || which == BOUNDED_ABOVE_ZERO)
            f = tape_point(&t, "hardtanh", ARGS(T(h), I(which == BOUNDED ? -1 : 1), I(2)), SHAPE(2, 6));
        else if (which == BOUNDED_BY_TENSOR)
            f = tape_point(&t, "clamp", ARGS(T(h), T(other), NO), SHAPE(2, 6));
        else
            f = tape_point(&t, "addcmul", ARGS(T(h), T(gate), T(gate), I(1)), SHAPE(2, 6));
        y = tape_point(&t, "mul", ARGS(T(f), T(gate)), SHAPE(2, 6));
        y = tape_op(&t, "sum", ARGS(T(y), IS(1), B(0), NO), SHAPE(2));
        if (build(y)) {
            if (which == FILLED_WITH_ZERO || which == BOUNDED)
                CHECK(prunable(w, 0, 0), "%s", names[which]);
            else
                CHECK(frozen(w, 0, 0, LP_REASON_REMAINS), "%s", names[which]);
        }
        tape_end(&t);
    }
}

/* phi(q) phi(k)^T of linear attention: elu(0) = 0, elu(0) + 1 is not. */
static void test_feature_maps_of_linear_attention(void)
{
    for (int shifted = 0; shifted < 2; shifted++) {
        int64_t wq, wk, q, k, y;
        begin();
        q = tape_produce(&t, 6, &wq);
        k = tape_produce(&t, 6, &wk);
        q = tape_op(&t, "elu", ARGS(T(q), I(1), I(1), I(1)), SHAPE(2, 6));
        k = tape_op(&t, "elu", ARGS(T(k), I(1), I(1), I(1)), SHAPE(2, 6));
        if (shifted) {
            q = tape_op(&t, "add", ARGS(T(q), FLOAT_ARG(ONE), I(1)), SHAPE(2, 6));
            k = tape_op(&t, "add", ARGS(T(k), FLOAT_ARG(ONE), I(1)), SHAPE(2, 6));
        }
        k = tape_op(&t, "t", ARGS(T(k)), SHAPE(6, 2));
        y = tape_op(&t, "mm", ARGS(T(q), T(k)), SHAPE(2, 2));
        if (build(y)) {
            CHECK(same(wq, 0, 0, wk, 0, 0), "contracted");
            if (shifted)
                CHECK(frozen(wq, 0, 0, LP_REASON_REMAINS), "1 x 1 remains in the sum");
            else
                CHECK(prunable(wq, 0, 0), "0 x 0 does not");
        }
        tape_end(&t);
    }
}

/* A weight makes the hidden feature's contribution zero, whatever the activation is. */
static void test_a_weight_is_factor_enough(void)
{
    int64_t w, wo, h, y;

    begin();
    h = tape_produce(&t, 6, &w);
    h = tape_op(&t, "sigmoid", ARGS(T(h)), SHAPE(2, 6));
    y = tape_consume(&t, h, 2, 6, &wo);
    if (build(y))
        CHECK(prunable(w, 0, 0) && prunable(wo, 1, 0), "the second matrix is zero there");
    tape_end(&t);
}

/* Softmax over keys of a head without weights is uniform, but its values are zero. */
static void test_attention_of_a_silent_head(void)
{
    int64_t wv, scores, q, v, y, wq;

    begin();
    q = tape_produce(&t, 12, &wq);
    q = tape_op(&t, "view", ARGS(T(q), IS(4, 2, 3)), SHAPE(4, 2, 3));
    scores = tape_op(&t, "_softmax", ARGS(T(q), I(-1), B(0)), SHAPE(4, 2, 3));
    wv = tape_parameter(&t, SHAPE(4, 3, 5));
    v = tape_op(&t, "relu", ARGS(T(wv)), SHAPE(4, 3, 5));
    y = tape_op(&t, "bmm", ARGS(T(scores), T(v)), SHAPE(4, 2, 5));
    y = tape_op(&t, "sum", ARGS(T(y), IS(0), B(0), NO), SHAPE(2, 5));
    if (build(y))
        CHECK(!frozen(wv, 0, 0, LP_REASON_REMAINS), "heads that are summed vanish by their values");
    tape_end(&t);
}

/* Two of four experts, chosen by top-k; `indices` name them. */
static int64_t choose(int64_t *router, int64_t *indices)
{
    int64_t scores = tape_produce(&t, 4, router), values = tape_value(&t, false, SHAPE(2, 2));
    *indices = tape_value(&t, true, SHAPE(2, 2));
    tape_call(&t, "topk", 0, ARGS(T(scores), I(2), I(-1), B(1), B(1)), IDS(values, *indices));
    return values;
}

static void test_indices_compared_with_a_number(void)
{
    int64_t router, indices, experts, skipped, y;

    begin(); /* `indices == 3` skips an expert: renumbered experts would skip another */
    (void)choose(&router, &indices);
    skipped = tape_value(&t, true, SHAPE(2, 2));
    tape_call(&t, "eq", LP_OP_POINTWISE, ARGS(T(indices), I(3)), IDS(skipped));
    experts = tape_parameter(&t, SHAPE(4, 3));
    y = tape_op(&t, "index", ARGS(T(experts), TS(indices)), SHAPE(2, 2, 3));
    skipped = tape_op(&t, "unsqueeze", ARGS(T(skipped), I(-1)), SHAPE(2, 2, 1));
    y = tape_point(&t, "masked_fill", ARGS(T(y), T(skipped), I(0)), SHAPE(2, 2, 3));
    if (build(y))
        CHECK(frozen(router, 0, 0, LP_REASON_NUMBERED), "an expert known by its number");
    tape_end(&t);
}

static void test_joined_indices_still_name_the_experts(void)
{
    int64_t router, scores, first, second, indices, experts, best, next, y;

    begin(); /* the best by max, the next by max again, joined: as a router written by hand does */
    scores = tape_produce(&t, 4, &router);
    best = tape_value(&t, false, SHAPE(2, 1)), first = tape_value(&t, true, SHAPE(2, 1));
    tape_call(&t, "max", 0, ARGS(T(scores), I(-1), B(1)), IDS(best, first));
    next = tape_value(&t, false, SHAPE(2, 1)), second = tape_value(&t, true, SHAPE(2, 1));
    tape_call(&t, "max", 0, ARGS(T(scores), I(-1), B(1)), IDS(next, second));
    indices = tape_int_op(&t, "cat", ARGS(TS(first, second), I(-1)), SHAPE(2, 2));
    experts = tape_parameter(&t, SHAPE(4, 3));
    y = tape_op(&t, "index", ARGS(T(experts), TS(indices)), SHAPE(2, 2, 3));
    if (build(y))
        CHECK(same(router, 0, 0, experts, 0, 0) && prunable(experts, 0, 0), "one axis through the join");
    tape_end(&t);
}

/* The mean over streams: of copies that a gate holds open at zero weights, or that fall with it. */
static void test_means_of_what_remains_are_marked_so(void)
{
    const char *gates[] = {"sigmoid", "tanh"};

    for (int zero_at_zero = 0; zero_at_zero < 2; zero_at_zero++) {
        int64_t w, gate, y;
        begin();
        gate = tape_produce(&t, 4, &w);
        gate = tape_op(&t, gates[zero_at_zero], ARGS(T(gate)), SHAPE(2, 4));
        y = tape_op(&t, "mean", ARGS(T(gate), IS(1), B(0), NO), SHAPE(2));
        if (build(y)) {
            CHECK(prunable(w, 0, 0) && tape_marked(&t, w, 0, LP_MARK_MEAN), "a mean is marked");
            CHECK(tape_marked(&t, w, 0, LP_MARK_REMAINS) == !zero_at_zero, "%s", gates[zero_at_zero]);
        }
        tape_end(&t);
    }
}

int main(void)
{
    test_means_of_what_remains_are_marked_so();
    test_copies_gated_by_what_is_not_zero_at_zero();
    test_what_is_put_in_place_of_zero_remains();
    test_feature_maps_of_linear_attention();
    test_a_weight_is_factor_enough();
    test_attention_of_a_silent_head();
    test_indices_compared_with_a_number();
    test_joined_indices_still_name_the_experts();
    return check_finish("vanish");
}
