/* graph.h: operations that address by data, reduce, normalise, convolve or write in place; liveness; unknown ones. */
#include "check.h"
#include "tape.h"

#define same(...) tape_same(&t, __VA_ARGS__)
#define prunable(...) tape_prunable(&t, __VA_ARGS__)
#define frozen(...) tape_frozen(&t, __VA_ARGS__)
#define marked(...) tape_marked(&t, __VA_ARGS__)
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

static void test_embedding_and_residual(void)
{
    int64_t ids, table, wo, bo, h, x, y, head;

    begin(); /* tied head: the vocabulary is addressed by data and is an output; the channel is a residual stream */
    ids = tape_ids(&t, SHAPE(2, 3));
    table = tape_parameter(&t, SHAPE(11, 6)), wo = tape_parameter(&t, SHAPE(6, 6)),
    bo = tape_parameter(&t, SHAPE(6));
    x = tape_op(&t, "embedding", ARGS(T(table), T(ids), I(-1), B(0), B(0)), SHAPE(2, 3, 6));
    h = tape_op(&t, "linear", ARGS(T(x), T(wo), T(bo)), SHAPE(2, 3, 6));
    x = tape_op(&t, "add", ARGS(T(x), T(h), F), SHAPE(2, 3, 6));
    head = tape_op(&t, "t", ARGS(T(table)), SHAPE(6, 11));
    y = tape_op(&t, "matmul", ARGS(T(x), T(head)), SHAPE(2, 3, 11));
    if (build(y)) {
        CHECK(same(table, 1, 0, wo, 0, 0) && same(table, 1, 0, wo, 1, 0) && same(table, 1, 0, bo, 0, 0),
              "one stream");
        CHECK(prunable(table, 1, 0) && tape_axis(&t, table, 1, 0)->kind == LP_KIND_CHANNEL,
              "hidden channels");
        CHECK(frozen(table, 0, 0, LP_REASON_INDEXED) && frozen(table, 0, 0, LP_REASON_OUTPUT), "vocabulary");
    }
    end();
}

/* Scores over 4 experts, top 2 of them; `expert` reads the indices. */
static int64_t route(int64_t *router, int64_t *indices)
{
    int64_t scores = produce(4, router), values;
    scores = tape_op(&t, "_softmax", ARGS(T(scores), I(-1), B(0)), SHAPE(2, 4));
    values = tape_value(&t, false, SHAPE(2, 2));
    *indices = tape_value(&t, true, SHAPE(2, 2));
    tape_call(&t, "topk", 0, ARGS(T(scores), I(2), I(-1), B(1), B(1)), IDS(values, *indices));
    return values;
}

static void test_topk_values_tie_the_experts(void)
{
    int64_t router, indices, weights, experts, flat, chosen, y;

    begin();
    weights = route(&router, &indices);
    experts = tape_parameter(&t, SHAPE(4, 7, 3));
    flat = tape_int_op(&t, "view", ARGS(T(indices), IS(4)), SHAPE(4));
    chosen = tape_op(&t, "index", ARGS(T(experts), TS(flat)), SHAPE(4, 7, 3));
    weights = tape_op(&t, "view", ARGS(T(weights), IS(4, 1, 1)), SHAPE(4, 1, 1));
    chosen = tape_op(&t, "mul", ARGS(T(chosen), T(weights)), SHAPE(4, 7, 3));
    y = tape_op(&t, "sum", ARGS(T(chosen), IS(0, 1), B(0), NO), SHAPE(3));
    if (build(y)) {
        CHECK(same(router, 0, 0, experts, 0, 0),
              "router rows and experts are one axis, by the values of the indices");
        CHECK(marked(router, 0, LP_MARK_TOPK) && marked(router, 0, LP_MARK_SOFTMAX),
              "normalised over, not frozen");
        CHECK(tape_axis(&t, router, 0, 0)->kind == LP_KIND_EXPERT, "experts");
        CHECK(prunable(experts, 1, 0) && frozen(experts, 2, 0, LP_REASON_OUTPUT), "the others");
        CHECK(lp_graph_marked_count(t.graph) == 2, "two operations normalise");
    }
    end();

    begin(); /* the same indices after arithmetic, in place or not, name nothing any more */
    for (int in_place = 0; in_place < 2; in_place++) {
        if (in_place)
            begin();
        (void)route(&router, &indices);
        experts = tape_parameter(&t, SHAPE(4, 3));
        if (in_place)
            flat = tape_write(&t, "add_", ARGS(T(indices), I(1), I(1)), indices);
        else
            flat = tape_int_op(&t, "zeros_like", ARGS(T(indices), NO, NO, NO, NO, NO), SHAPE(2, 2));
        y = tape_op(&t, "index", ARGS(T(experts), TS(flat)), SHAPE(2, 2, 3));
        if (build(y))
            CHECK(frozen(experts, 0, 0, LP_REASON_INDEXED) && !same(router, 0, 0, experts, 0, 0),
                  "in place: %d", in_place);
        end();
    }
}

static void test_gather_scatter(void)
{
    int64_t router, indices, table, zeros, mask, ones, h, w, y, wo;

    begin(); /* one-hot of the top-k by scatter, contracted with the experts' table */
    ones = route(&router, &indices);
    zeros = tape_op(&t, "zeros", ARGS(IS(2, 4), NO, NO, NO, NO), SHAPE(2, 4));
    mask = tape_op(&t, "scatter", ARGS(T(zeros), I(1), T(indices), T(ones)), SHAPE(2, 4));
    table = tape_parameter(&t, SHAPE(4, 3));
    y = tape_op(&t, "mm", ARGS(T(mask), T(table)), SHAPE(2, 3));
    if (build(y))
        CHECK(same(router, 0, 0, table, 0, 0) && prunable(table, 0, 0), "scatter by values");
    end();

    begin(); /* gather along a dimension by unknown indices freezes it, and only it */
    h = produce(6, &w);
    indices = tape_ids(&t, SHAPE(2, 4));
    h = tape_op(&t, "gather", ARGS(T(h), I(1), T(indices), B(0)), SHAPE(2, 4));
    y = consume(h, 2, 4, &wo);
    if (build(y))
        CHECK(frozen(w, 0, 0, LP_REASON_INDEXED) && frozen(wo, 1, 0, LP_REASON_INPUT), "gather");
    end();

    begin(); /* index_select of rows of a table: the columns pass */
    table = tape_parameter(&t, SHAPE(9, 6)), indices = tape_ids(&t, SHAPE(2));
    h = tape_op(&t, "index_select", ARGS(T(table), I(0), T(indices)), SHAPE(2, 6));
    y = consume(h, 2, 6, &wo);
    if (build(y))
        CHECK(frozen(table, 0, 0, LP_REASON_INDEXED) && same(table, 1, 0, wo, 1, 0) && prunable(table, 1, 0),
              "rows");
    end();

    begin(); /* index_add of expert outputs into a fresh buffer: features pass */
    h = produce(6, &w), indices = tape_ids(&t, SHAPE(2));
    zeros = tape_op(&t, "zeros", ARGS(IS(8, 6), NO, NO, NO, NO), SHAPE(8, 6));
    tape_write(&t, "index_add_", ARGS(T(zeros), I(0), T(indices), T(h), F), zeros);
    y = consume(zeros, 8, 6, &wo);
    if (build(y))
        CHECK(same(w, 0, 0, wo, 1, 0) && prunable(w, 0, 0), "index_add");
    end();
}

static void test_masks(void)
{
    int64_t h, w, wo, mask, rows, positions, value, y, token;

    begin(); /* h[mask] with a mask over rows: features pass */
    h = produce(6, &w);
    token = tape_ids(&t, SHAPE(2));
    mask = tape_int_op(&t, "eq", ARGS(T(token), I(3)), SHAPE(2));
    h = tape_op(&t, "index", ARGS(T(h), TS(mask)), SHAPE(1, 6));
    y = consume(h, 1, 6, &wo);
    if (build(y))
        CHECK(same(w, 0, 0, wo, 1, 0) && prunable(w, 0, 0), "a mask over rows");
    end();

    begin(); /* h[h > 0] = 0: the mask and what it covers are one, and stay prunable */
    h = produce(6, &w);
    mask = tape_value(&t, true, SHAPE(2, 6)), value = tape_constant(&t, SCALAR);
    tape_call(&t, "gt", LP_OP_POINTWISE, ARGS(T(h), F), IDS(mask));
    tape_write(&t, "index_put_", ARGS(T(h), TS(mask), T(value), B(0)), h);
    y = consume(h, 2, 6, &wo);
    if (build(y))
        CHECK(same(w, 0, 0, wo, 1, 0) && prunable(w, 0, 0), "a full mask written through");
    end();

    begin(); /* nonzero of an expert mask, one column of it, then index_put by rows */
    h = produce(6, &w);
    token = tape_ids(&t, SHAPE(2));
    mask = tape_int_op(&t, "ne", ARGS(T(token), I(0)), SHAPE(2));
    rows = tape_int_op(&t, "nonzero", ARGS(T(mask)), SHAPE(2, 1));
    positions = tape_int_op(&t, "select", ARGS(T(rows), I(1), I(0)), SHAPE(2));
    y = tape_op(&t, "zeros", ARGS(IS(2, 6), NO, NO, NO, NO), SHAPE(2, 6));
    y = tape_op(&t, "index_put", ARGS(T(y), TS(positions), T(h), B(0)), SHAPE(2, 6));
    y = consume(y, 2, 6, &wo);
    if (build(y))
        CHECK(same(w, 0, 0, wo, 1, 0) && prunable(w, 0, 0), "features pass through index_put");
    end();

    begin(); /* masked_scatter: image features into token embeddings, whole rows */
    h = produce(6, &w);
    value = tape_parameter(&t, SHAPE(4, 6));
    mask = tape_ids(&t, SHAPE(2, 1));
    y = tape_op(&t, "masked_scatter", ARGS(T(h), T(mask), T(value)), SHAPE(2, 6));
    y = consume(y, 2, 6, &wo);
    if (build(y)) {
        CHECK(same(w, 0, 0, value, 1, 0) && prunable(w, 0, 0), "features of both");
        CHECK(frozen(value, 0, 0, LP_REASON_INDEXED), "rows in order");
    }
    end();
}

static void test_reductions(void)
{
    static const struct {
        const char *name;
        lp_reason note; /* NONE: neither frozen nor marked */
    } cases[] = {{"sum", LP_REASON_NONE},     {"any", LP_REASON_NONE},       {"mean", LP_MARK_MEAN},
                 {"amax", LP_MARK_EXTREME},   {"var", LP_MARK_NORM},         {"logsumexp", LP_MARK_SOFTMAX},
                 {"argmax", LP_MARK_EXTREME}, {"prod", LP_REASON_ORDER},     {"cumsum", LP_REASON_ORDER},
                 {"sort", LP_REASON_ORDER},   {"_softmax", LP_MARK_SOFTMAX}, {"tril", LP_REASON_ORDER},
                 {"flip", LP_REASON_ORDER}};

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int64_t h, w, y;
        bool whole = i >= 8; /* the output has the input's shape */
        const lp_axis *axis;

        begin();
        h = produce(6, &w);
        y = whole ? tape_op(&t, cases[i].name, ARGS(T(h), I(1)), SHAPE(2, 6))
                  : tape_op(&t, cases[i].name, ARGS(T(h), I(1), B(1)), SHAPE(2, 1));
        if (whole)
            y = tape_op(&t, "sum", ARGS(T(y), IS(1), B(0), NO), SHAPE(2));
        if (build(y)) {
            axis = tape_axis(&t, w, 0, 0);
            if (cases[i].note == LP_REASON_NONE)
                CHECK(prunable(w, 0, 0) && tape_notes(&t, axis) == 0, "%s", cases[i].name);
            else if (cases[i].note < LP_REASON_MARK_BASE)
                CHECK(frozen(w, 0, 0, cases[i].note) && tape_notes(&t, axis) == 1, "%s", cases[i].name);
            else
                CHECK(marked(w, 0, cases[i].note) && tape_notes(&t, axis) == 1, "%s", cases[i].name);
            CHECK(lp_graph_marked_count(t.graph) == (cases[i].note >= LP_REASON_MARK_BASE), "%s",
                  cases[i].name);
        }
        end();
    }
}

static void test_normalisations(void)
{
    int64_t h, w, gain, shift, mean, scale, wo, y;

    begin();
    h = produce(6, &w);
    gain = tape_parameter(&t, SHAPE(6)), shift = tape_parameter(&t, SHAPE(6));
    y = tape_value(&t, false, SHAPE(2, 6)), mean = tape_value(&t, false, SHAPE(2, 1)),
    scale = tape_value(&t, false, SHAPE(2, 1));
    tape_call(&t, "native_layer_norm", 0, ARGS(T(h), IS(6), T(gain), T(shift), F), IDS(y, mean, scale));
    y = consume(y, 2, 6, &wo);
    if (build(y)) {
        CHECK(same(w, 0, 0, gain, 0, 0) && same(w, 0, 0, shift, 0, 0) && same(w, 0, 0, wo, 1, 0),
              "layer_norm");
        CHECK(marked(w, 0, LP_MARK_NORM) && lp_graph_marked_count(t.graph) == 1, "marked");
        CHECK(lp_graph_marked(t.graph, 0)->tensor == h && lp_graph_marked(t.graph, 0)->dim == 1, "where");
    }
    end();

    begin(); /* group_norm of 6 channels in 3 groups: groups may go, channels within one may not */
    h = tape_input(&t, SHAPE(2, 5, 4)), w = tape_parameter(&t, SHAPE(6, 5, 1)),
    gain = tape_parameter(&t, SHAPE(6));
    y = tape_op(&t, "convolution", ARGS(T(h), T(w), NO, IS(1), IS(0), IS(1), B(0), IS(0), I(1)),
                SHAPE(2, 6, 4));
    y = tape_op(&t, "group_norm", ARGS(T(y), I(3), T(gain), NO, F), SHAPE(2, 6, 4));
    y = tape_op(&t, "sum", ARGS(T(y), IS(1), B(0), NO), SHAPE(2, 4));
    if (build(y)) {
        CHECK(same(w, 0, 0, gain, 0, 0) && prunable(w, 0, 0) && tape_axis(&t, w, 0, 0)->size == 3, "groups");
        CHECK(frozen(w, 0, 1, LP_REASON_GROUPED), "channels of a group");
    }
    end();

    begin(); /* batch_norm: statistics are buffers, cut along */
    h = tape_input(&t, SHAPE(2, 5, 4)), w = tape_parameter(&t, SHAPE(6, 5, 3)),
    gain = tape_parameter(&t, SHAPE(6));
    mean = tape_buffer(&t, SHAPE(6)), scale = tape_buffer(&t, SHAPE(6));
    y = tape_op(&t, "convolution", ARGS(T(h), T(w), NO, IS(1), IS(1), IS(1), B(0), IS(0), I(1)),
                SHAPE(2, 6, 4));
    y = tape_op(&t, "_native_batch_norm_legit_no_training", ARGS(T(y), T(gain), NO, T(mean), T(scale), F, F),
                SHAPE(2, 6, 4));
    y = tape_op(&t, "sum", ARGS(T(y), IS(1), B(0), NO), SHAPE(2, 4));
    if (build(y)) {
        CHECK(same(w, 0, 0, mean, 0, 0) && same(w, 0, 0, scale, 0, 0) && prunable(w, 0, 0), "batch_norm");
        CHECK(frozen(w, 2, 0, LP_REASON_SPATIAL) && tape_notes(&t, tape_axis(&t, w, 0, 0)) == 0,
              "kernel; no mark");
    }
    end();

    begin(); /* weight norm: a norm for each row; its sum over columns loses summands as it should */
    h = produce(6, &w);
    scale = tape_parameter(&t, SHAPE(8, 6)), gain = tape_parameter(&t, SHAPE(8, 1));
    y = tape_op(&t, "_weight_norm_interface", ARGS(T(scale), T(gain), I(0)), SHAPE(8, 6));
    y = tape_op(&t, "linear", ARGS(T(h), T(y), NO), SHAPE(2, 8));
    y = consume(y, 2, 8, &mean);
    if (build(y)) {
        CHECK(same(scale, 0, 0, gain, 0, 0) && same(scale, 1, 0, w, 0, 0), "weight_norm unifies");
        CHECK(prunable(w, 0, 0) && tape_notes(&t, tape_axis(&t, w, 0, 0)) == 0, "columns: no mark");
        CHECK(prunable(gain, 0, 0) && tape_notes(&t, tape_axis(&t, gain, 0, 0)) == 1, "rows: marked");
    }
    end();
}

static void test_convolutions(void)
{
    int64_t x, w1, w2, w3, bias, h, y, macs;

    begin(); /* conv, depthwise, grouped */
    x = tape_input(&t, SHAPE(2, 5, 9));
    w1 = tape_parameter(&t, SHAPE(6, 5, 3)), w2 = tape_parameter(&t, SHAPE(6, 1, 3)),
    w3 = tape_parameter(&t, SHAPE(8, 3, 1));
    bias = tape_parameter(&t, SHAPE(6));
    h = tape_op(&t, "convolution", ARGS(T(x), T(w1), T(bias), IS(1), IS(0), IS(1), B(0), IS(0), I(1)),
                SHAPE(2, 6, 7));
    h = tape_op(&t, "convolution", ARGS(T(h), T(w2), NO, IS(1), IS(0), IS(1), B(0), IS(0), I(6)),
                SHAPE(2, 6, 5));
    h = tape_op(&t, "convolution", ARGS(T(h), T(w3), NO, IS(1), IS(0), IS(1), B(0), IS(0), I(2)),
                SHAPE(2, 8, 5));
    y = tape_op(&t, "sum", ARGS(T(h), IS(1), B(0), NO), SHAPE(2, 5));
    if (build(y)) {
        CHECK(same(w1, 0, 0, w2, 0, 0) && same(w1, 0, 1, w2, 0, 1) && same(w1, 0, 0, bias, 0, 0),
              "depthwise");
        CHECK(same(w1, 0, 0, w3, 0, 0) && tape_axis(&t, w3, 0, 0)->size == 2 && prunable(w3, 0, 0),
              "the groups");
        CHECK(same(w1, 0, 1, w3, 1, 0) && prunable(w3, 1, 0), "inputs of a group");
        CHECK(prunable(w3, 0, 1) && !same(w3, 0, 1, w1, 0, 1), "outputs of a group");
        CHECK(lp_graph_macs(t.graph, NULL, &macs, &t.err) == LP_OK &&
                  macs == 2 * 6 * 7 * 15 + 2 * 6 * 5 * 3 + 2 * 8 * 5 * 3,
              "macs %lld", (long long)macs);
    }
    end();

    begin(); /* transposed: weight (in, out / groups, kernel), in two groups */
    x = tape_input(&t, SHAPE(2, 5, 4)), w1 = tape_parameter(&t, SHAPE(6, 5, 1)),
    w2 = tape_parameter(&t, SHAPE(6, 4, 2));
    h = tape_op(&t, "convolution", ARGS(T(x), T(w1), NO, IS(1), IS(0), IS(1), B(0), IS(0), I(1)),
                SHAPE(2, 6, 4));
    h = tape_op(&t, "convolution", ARGS(T(h), T(w2), NO, IS(2), IS(0), IS(1), B(1), IS(0), I(2)),
                SHAPE(2, 8, 8));
    y = tape_op(&t, "sum", ARGS(T(h), IS(1), B(0), NO), SHAPE(2, 8));
    if (build(y)) {
        CHECK(same(w1, 0, 0, w2, 0, 0) && same(w1, 0, 1, w2, 0, 1) && prunable(w2, 0, 1), "inputs");
        CHECK(prunable(w2, 1, 0) && tape_new_size(&t, h, 1, tape_axis(&t, w2, 1, 0), 1) == 6,
              "outputs: one a group");
        CHECK(lp_graph_macs(t.graph, NULL, &macs, &t.err) == LP_OK && macs == 2 * 6 * 4 * 5 + 2 * 6 * 4 * 8,
              "macs");
    }
    end();
}

static void test_complex_pairs(void)
{
    int64_t h, w, table, z, wo, y;

    begin(); /* view_as_complex(x.view(.., 3, 2)) * freqs, back again */
    h = produce(6, &w);
    h = tape_op(&t, "view", ARGS(T(h), IS(2, 3, 2)), SHAPE(2, 3, 2));
    z = tape_op(&t, "view_as_complex", ARGS(T(h)), SHAPE(2, 3));
    table = tape_buffer(&t, SHAPE(3));
    z = tape_op(&t, "mul", ARGS(T(z), T(table)), SHAPE(2, 3));
    h = tape_op(&t, "view_as_real", ARGS(T(z)), SHAPE(2, 3, 2));
    h = tape_op(&t, "view", ARGS(T(h), IS(2, 6)), SHAPE(2, 6));
    y = consume(h, 2, 6, &wo);
    if (build(y)) {
        CHECK(same(w, 0, 0, table, 0, 0) && same(w, 0, 0, wo, 1, 0) && prunable(w, 0, 0), "pairs");
        CHECK(frozen(w, 0, 1, LP_REASON_COMPLEX) && frozen(wo, 1, 1, LP_REASON_COMPLEX),
              "real and imaginary part");
    }
    end();
}

static void test_unknown_operations_freeze_what_they_touch(void)
{
    int64_t a, b, w1, w2, wo, y;

    begin();
    a = produce(6, &w1), b = produce(6, &w2);
    a = tape_op(&t, "fancy::operation", ARGS(T(a), F), SHAPE(2, 6));
    a = tape_op(&t, "cat", ARGS(TS(a, b), I(1)), SHAPE(2, 12));
    y = consume(a, 2, 12, &wo);
    if (build(y)) {
        CHECK(frozen(w1, 0, 0, LP_REASON_UNKNOWN_OP) && frozen(wo, 1, 0, LP_REASON_UNKNOWN_OP), "both sides");
        CHECK(prunable(w2, 0, 0) && same(w2, 0, 0, wo, 1, 1), "and nothing more");
        CHECK(lp_graph_unknown_count(t.graph) == 1 && lp_graph_unknown_op(t.graph, 0) == 2, "it is reported");
    }
    end();

    begin(); /* an unknown operation that is tagged pointwise is pointwise; its in-place twin as well */
    a = produce(6, &w1);
    a = tape_point(&t, "aten::fancy_activation", ARGS(T(a)), SHAPE(2, 6));
    tape_call(&t, "fancy_activation_", LP_OP_POINTWISE | LP_OP_MUTATES, ARGS(T(a)), IDS(a));
    y = consume(a, 2, 6, &wo);
    if (build(y))
        CHECK(same(w1, 0, 0, wo, 1, 0) && prunable(w1, 0, 0) && lp_graph_unknown_count(t.graph) == 0,
              "pointwise");
    end();
}

static void test_dead_values(void)
{
    int64_t a, w1, gate, dead, wo, y;

    begin(); /* pitfall 4: the dead branch unifies, but its mean, its unknown operation and its output are silent */
    a = produce(6, &w1);
    gate = tape_parameter(&t, SHAPE(6));
    dead = tape_op(&t, "mul", ARGS(T(a), T(gate)), SHAPE(2, 6));
    dead = tape_op(&t, "mean", ARGS(T(dead), IS(1), B(0), NO), SHAPE(2));
    (void)tape_op(&t, "unheard_of", ARGS(T(a), T(dead)), SHAPE(2, 6));
    y = consume(a, 2, 6, &wo);
    if (build(y)) {
        CHECK(same(w1, 0, 0, gate, 0, 0), "unified");
        CHECK(prunable(w1, 0, 0) && tape_notes(&t, tape_axis(&t, w1, 0, 0)) == 0,
              "neither frozen nor marked");
        CHECK(lp_graph_marked_count(t.graph) == 0 && lp_graph_unknown_count(t.graph) == 0, "nor reported");
    }
    end();

    begin(); /* a parameter that only dead values use is frozen */
    a = produce(6, &w1);
    gate = tape_parameter(&t, SHAPE(7));
    (void)tape_op(&t, "relu", ARGS(T(gate)), SHAPE(7));
    y = consume(a, 2, 6, &wo);
    if (build(y))
        CHECK(frozen(gate, 0, 0, LP_REASON_UNUSED), "unused");
    end();
}

static void test_writes_in_place(void)
{
    int64_t a, w1, w2, buffer, view, wo, y;

    begin(); /* zeros, a view of them, copy_ through the view: alive, since the whole is read later */
    a = produce(4, &w1), w2 = tape_parameter(&t, SHAPE(6));
    buffer = tape_op(&t, "zeros", ARGS(IS(2, 6), NO, NO, NO, NO), SHAPE(2, 6));
    view = tape_view(&t, buffer, SHAPE(2, 4));
    tape_call(&t, "slice", 0, ARGS(T(buffer), I(1), I(0), I(4), I(1)), IDS(view));
    tape_write(&t, "copy_", ARGS(T(view), T(a), B(0)), view);
    y = tape_op(&t, "mul", ARGS(T(buffer), T(w2)), SHAPE(2, 6));
    y = consume(y, 2, 6, &wo);
    if (build(y)) {
        CHECK(same(w1, 0, 0, wo, 1, 0) && same(w1, 0, 0, w2, 0, 0) && prunable(w1, 0, 0),
              "tied through the view");
        CHECK(prunable(w2, 0, 1) && !same(w1, 0, 0, w2, 0, 1), "the rest is free");
    }
    end();

    begin(); /* residual += in place */
    a = produce(6, &w1), w2 = tape_parameter(&t, SHAPE(6, 6));
    y = tape_linear(&t, a, w2, 2, 6);
    tape_write(&t, "add_", ARGS(T(a), T(y), F), a);
    y = consume(a, 2, 6, &wo);
    if (build(y))
        CHECK(same(w1, 0, 0, w2, 0, 0) && same(w1, 0, 0, wo, 1, 0) &&
                  tape_axis(&t, w1, 0, 0)->kind == LP_KIND_CHANNEL,
              "add_");
    end();

    begin(); /* a low-rank update beside a projection: a sum, but no residual stream */
    a = produce(6, &w1), y = produce(4, &w2);
    buffer = tape_parameter(&t, SHAPE(6, 4));
    a = tape_op(&t, "add", ARGS(T(a), T(tape_linear(&t, y, buffer, 2, 6)), F), SHAPE(2, 6));
    a = tape_op(&t, "relu", ARGS(T(a)), SHAPE(2, 6));
    y = consume(a, 2, 6, &wo);
    if (build(y))
        CHECK(same(w1, 0, 0, buffer, 0, 0) && tape_axis(&t, w1, 0, 0)->kind == LP_KIND_FFN, "an update");
    end();
}

static void test_constants_and_positions(void)
{
    int64_t h, w, wo, constant, range, y;

    begin();
    h = produce(6, &w);
    constant = tape_constant(&t, SHAPE(6));
    h = tape_op(&t, "mul", ARGS(T(h), T(constant)), SHAPE(2, 6));
    y = consume(h, 2, 6, &wo);
    if (build(y))
        CHECK(frozen(w, 0, 0, LP_REASON_CONSTANT), "a constant brought along");
    end();

    begin(); /* arange has positions as values; zeros and ones have none */
    h = produce(6, &w);
    range = tape_op(&t, "arange", ARGS(I(6), NO, NO, NO, NO), SHAPE(6));
    h = tape_op(&t, "mul", ARGS(T(h), T(range)), SHAPE(2, 6));
    y = consume(h, 2, 6, &wo);
    if (build(y))
        CHECK(frozen(w, 0, 0, LP_REASON_POSITION), "arange");
    end();

    begin();
    h = produce(6, &w);
    range = tape_op(&t, "ones", ARGS(IS(6), NO, NO, NO, NO), SHAPE(6));
    h = tape_op(&t, "mul", ARGS(T(h), T(range)), SHAPE(2, 6));
    y = consume(h, 2, 6, &wo);
    if (build(y))
        CHECK(prunable(w, 0, 0), "ones");
    end();
}

static void test_windows_and_shuffles(void)
{
    int64_t w1, w2, x, y, out;

    begin(); /* unfold and fold: (1, 4, 6, 6) -> windows of 9 -> (1, 36, 16) -> (1, 4, 6, 6) */
    x = tape_input(&t, SHAPE(1, 3, 6, 6));
    w1 = tape_parameter(&t, SHAPE(4, 3, 1, 1)), w2 = tape_parameter(&t, SHAPE(2, 36));
    y = tape_op(&t, "convolution", ARGS(T(x), T(w1), NO, IS(1, 1), IS(0, 0), IS(1, 1), B(0), IS(0, 0), I(1)),
                SHAPE(1, 4, 6, 6));
    y = tape_op(&t, "im2col", ARGS(T(y), IS(3, 3), IS(1, 1), IS(0, 0), IS(1, 1)), SHAPE(1, 36, 16));
    out = tape_op(&t, "matmul", ARGS(T(w2), T(y)), SHAPE(1, 2, 16));
    if (build(out)) {
        CHECK(same(w1, 0, 0, w2, 1, 0) && prunable(w1, 0, 0), "a channel is a block of its window");
        CHECK(frozen(w2, 1, 1, LP_REASON_SPATIAL), "places in the window stay");
    }
    end();

    begin(); /* pixel_shuffle: channels 12 = 3 x (2 x 2), pixel_unshuffle back */
    x = tape_input(&t, SHAPE(1, 5, 4, 4));
    w1 = tape_parameter(&t, SHAPE(12, 5, 1, 1)), w2 = tape_parameter(&t, SHAPE(2, 12, 1, 1));
    y = tape_op(&t, "convolution", ARGS(T(x), T(w1), NO, IS(1, 1), IS(0, 0), IS(1, 1), B(0), IS(0, 0), I(1)),
                SHAPE(1, 12, 4, 4));
    y = tape_op(&t, "pixel_shuffle", ARGS(T(y), I(2)), SHAPE(1, 3, 8, 8));
    y = tape_op(&t, "reflection_pad2d", ARGS(T(y), IS(1, 1, 1, 1)), SHAPE(1, 3, 10, 10));
    y = tape_op(&t, "pixel_unshuffle", ARGS(T(y), I(2)), SHAPE(1, 12, 5, 5));
    out =
        tape_op(&t, "convolution", ARGS(T(y), T(w2), NO, IS(1, 1), IS(0, 0), IS(1, 1), B(0), IS(0, 0), I(1)),
                SHAPE(1, 2, 5, 5));
    if (build(out)) {
        CHECK(same(w1, 0, 0, w2, 1, 0) && prunable(w1, 0, 0), "three channels go through");
        CHECK(frozen(w1, 0, 1, LP_REASON_SPATIAL) && frozen(w2, 1, 1, LP_REASON_SPATIAL), "pixels do not");
    }
    end();

    begin(); /* a transform mixes what it runs over and nothing else */
    y = produce(6, &w1);
    y = tape_op(&t, "_fft_r2c", ARGS(T(y), IS(0), I(0), B(0)), SHAPE(2, 6));
    y = consume(y, 2, 6, &w2);
    if (build(y))
        CHECK(same(w1, 0, 0, w2, 1, 0) && prunable(w1, 0, 0), "over the batch");
    end();
    begin();
    y = produce(6, &w1);
    y = tape_op(&t, "_fft_r2c", ARGS(T(y), IS(1), I(0), B(1)), SHAPE(2, 4));
    y = consume(y, 2, 4, &w2);
    if (build(y))
        CHECK(frozen(w1, 0, 0, LP_REASON_ORDER) && frozen(w2, 1, 0, LP_REASON_ORDER), "over the features");
    end();
}

int main(void)
{
    test_windows_and_shuffles();
    test_embedding_and_residual();
    test_topk_values_tie_the_experts();
    test_gather_scatter();
    test_masks();
    test_reductions();
    test_normalisations();
    test_convolutions();
    test_complex_pairs();
    test_unknown_operations_freeze_what_they_touch();
    test_dead_values();
    test_writes_in_place();
    test_constants_and_positions();
    return check_finish("rules");
}
