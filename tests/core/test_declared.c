/* graph.h: rules declared from outside, and declarations that do not fit. */
#include "check.h"
#include "tape.h"

#include <string.h>

static tape t;

/* letters n: 6 (marked), b: 2; x (b, 2n) as n+n, w (n), y (b, n) */
static const int64_t gated[] = {2,
                                6,
                                5,
                                4,
                                2,
                                0,
                                0,
                                /* inputs */ 2,
                                0,
                                2,
                                1,
                                1,
                                1,
                                2,
                                1,
                                0,
                                1,
                                0,
                                1,
                                1,
                                1,
                                1,
                                0,
                                /* outputs */ 1,
                                0,
                                2,
                                1,
                                1,
                                1,
                                1,
                                1,
                                0};
enum { X = 8, W = 18 }; /* where the inputs' ids stand */

/* x = produce(12); w (6); y (2, 6) = op(x, w); output = consume(y) */
static size_t begin(int64_t *made, int64_t *w, int64_t *output)
{
    int64_t x, y, wo;

    tape_begin(&t, lp_allocator_default());
    x = tape_produce(&t, 12, made);
    *w = tape_parameter(&t, SHAPE(6));
    y = tape_op(&t, "mine::gated", ARGS(T(x), T(*w)), SHAPE(2, 6));
    *output = tape_consume(&t, y, 2, 6, &wo);
    return 1; /* the operation's number: produce has one */
}

static void fill(int64_t *code, int64_t x, int64_t w)
{
    memcpy(code, gated, sizeof gated);
    code[X] = x;
    code[W] = w;
}

static void test_a_declared_rule_is_applied(void)
{
    int64_t made, w, y, code[sizeof gated / sizeof gated[0]];
    size_t op = begin(&made, &w, &y), length = sizeof gated / sizeof gated[0];

    fill(code, w - 1, w);
    CHECK(!lp_graph_knows("mine::gated") && lp_graph_knows("aten::linear"), "names");
    CHECK(lp_graph_declare(t.graph, op, code, length, &t.err) == LP_OK, "%s", t.err.message);
    if (CHECK(tape_build(&t, y) == LP_OK, "%s", t.err.message)) {
        const lp_axis *axis = tape_axis(&t, made, 0, 0);
        CHECK(tape_same(&t, made, 0, 0, w, 0, 0) && tape_new_size(&t, made, 0, axis, 2) == 8, "one axis");
        CHECK(axis != NULL && axis->size == 6 && axis->prunable && axis->kind == LP_KIND_FFN, "ffn");
        CHECK(tape_marked(&t, w, 0, LP_MARK_NORM) && lp_graph_marked_count(t.graph) == 2, "marked");
        CHECK(lp_graph_unknown_count(t.graph) == 0, "known");
        CHECK(lp_graph_declare(t.graph, op, code, length, &t.err) == LP_ERR_ARGUMENT, "too late");
    }
    tape_end(&t);
}

static void test_dimensions_that_do_not_align_freeze(void)
{
    int64_t made, w, wo, x, y, code[sizeof gated / sizeof gated[0]];

    tape_begin(&t, lp_allocator_default());
    x = tape_produce(&t, 12, &made);
    x = tape_op(&t, "view", ARGS(T(x), IS(2, 4, 3)), SHAPE(2, 4, 3)); /* 12 is 4 x 3 already */
    x = tape_op(&t, "view", ARGS(T(x), IS(2, 12)), SHAPE(2, 12));
    w = tape_parameter(&t, SHAPE(5));
    y = tape_op(&t, "mine::odd", ARGS(T(x), T(w)), SHAPE(2, 5));
    fill(code, x, w); /* as 5 + 7: letter 0 of size 5, letter 2 of size 7 */
    y = tape_consume(&t, y, 2, 5, &wo);
    {
        const int64_t odd[] = {3, 5, 0, 0, 2, 0, 0, 7, 0, 0, 2, x, 2, 1, 1, 1, 2, 1,
                               0, 1, 2, w, 1, 1, 1, 0, 1, 0, 2, 1, 1, 1, 1, 1, 0};
        CHECK(lp_graph_declare(t.graph, 3, odd, sizeof odd / sizeof odd[0], &t.err) == LP_OK, "%s",
              t.err.message);
    }
    if (CHECK(tape_build(&t, y) == LP_OK, "%s", t.err.message))
        CHECK(tape_frozen(&t, made, 0, 0, LP_REASON_MISALIGNED) &&
                  tape_frozen(&t, w, 0, 0, LP_REASON_MISALIGNED),
              "both sides");
    tape_end(&t);
}

static void test_declarations_that_do_not_fit_are_refused(void)
{
    int64_t made, w, y, code[sizeof gated / sizeof gated[0] + 1];
    size_t op = begin(&made, &w, &y), length = sizeof gated / sizeof gated[0];

    fill(code, w - 1, w);
    for (size_t n = 0; n < length; n++)
        CHECK(lp_graph_declare(t.graph, op, code, n, &t.err) == LP_ERR_TRACE, "cut off after %zu", n);
    code[length] = 0;
    CHECK(lp_graph_declare(t.graph, op, code, length + 1, &t.err) == LP_ERR_TRACE, "too long");
    for (size_t i = 0; i < length; i++) { /* no number may be anything */
        const int64_t wrong[] = {-1, 65, INT64_MAX};
        for (size_t k = 0; k < 3; k++) {
            int64_t before = code[i];
            code[i] = wrong[k];
            CHECK(lp_graph_declare(t.graph, op, code, length, &t.err) == LP_ERR_TRACE, "number %zu", i);
            code[i] = before;
        }
    }
    CHECK(lp_graph_declare(t.graph, 99, code, length, &t.err) == LP_ERR_ARGUMENT, "no such operation");
    CHECK(lp_graph_declare(t.graph, op, code, length, &t.err) == LP_OK, "and as it was: %s", t.err.message);
    CHECK(tape_build(&t, y) == LP_OK, "%s", t.err.message);
    tape_end(&t);
}

int main(void)
{
    test_a_declared_rule_is_applied();
    test_dimensions_that_do_not_align_freeze();
    test_declarations_that_do_not_fit_are_refused();
    return check_finish("declared");
}
