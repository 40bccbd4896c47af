/* axis.h: why two atoms are one axis, as chains of the unions that were made. */
#include "algebra.h"

static void test_unify_leaves_and_proofs(void)
{
    lp_expr a, b, c, d;
    lp_atom first, last;
    lp_steps steps = {NULL, 0, 0};

    begin();
    a = fresh(8), b = fresh(8), c = fresh(8), d = fresh(8);
    axes.op = 10;
    OK(lp_axes_unify(&axes, a, b, LP_RULE_FORWARD, &err));
    axes.op = 11;
    OK(lp_axes_unify(&axes, c, d, LP_RULE_BACKWARD, &err));
    axes.op = 12;
    unify(b, c);
    CHECK(lp_axes_find(&axes, axes.factors[a.off]) == lp_axes_find(&axes, axes.factors[d.off]), "transitive");
    axes.op = 13;
    unify(d, a);
    first = axes.factors[a.off], last = axes.factors[d.off];
    OK(lp_axes_path(&axes, first, last, &steps, &err));
    CHECK(steps.count == 3, "a needless union adds no step: %zu", steps.count);
    for (size_t i = 0; i < steps.count; i++) {
        static const uint32_t ops[] = {10, 12, 11};
        static const uint8_t rules[] = {LP_RULE_FORWARD, LP_RULE_EQUAL, LP_RULE_BACKWARD};
        CHECK(steps.items[i].op == ops[i] && steps.items[i].rule == rules[i], "step %zu", i);
        CHECK(steps.items[i].from == (i == 0 ? first : steps.items[i - 1].to), "step %zu joins the last", i);
    }
    CHECK(steps.count > 0 && steps.items[steps.count - 1].to == last, "the chain ends at d");
    steps.count = 0;
    OK(lp_axes_path(&axes, first, first, &steps, &err));
    CHECK(steps.count == 0, "no step from an atom to itself");
    CHECK(lp_axes_path(&axes, first, axes.factors[fresh(8).off], &steps, &err) == LP_ERR_ARGUMENT, "no path");
    lp_steps_free(&axes.allocator, &steps);
    end();
}

/* Proofs stay true whatever the order of unions: between any two members of a class there is a chain over atoms of that
 * class, each step one of the unions that were made. */
static void test_proofs_of_random_unions(void)
{
    enum { ATOMS = 60, UNIONS = 90 };
    lp_expr dims[ATOMS];
    uint32_t made[UNIONS][2];

    begin();
    for (size_t i = 0; i < ATOMS; i++)
        dims[i] = fresh(4);
    for (uint32_t u = 0; u < UNIONS; u++) {
        made[u][0] = (uint32_t)random_below(ATOMS), made[u][1] = (uint32_t)random_below(ATOMS);
        axes.op = u;
        unify(dims[made[u][0]], dims[made[u][1]]);
    }
    for (size_t i = 0; i < ATOMS; i++)
        for (size_t j = 0; j < ATOMS; j++) {
            lp_atom a = axes.factors[dims[i].off], b = axes.factors[dims[j].off], at = a, ends[2];
            lp_steps steps = {NULL, 0, 0};
            if (lp_axes_find(&axes, a) != lp_axes_find(&axes, b))
                continue;
            OK(lp_axes_path(&axes, a, b, &steps, &err));
            for (size_t k = 0; k < steps.count; k++) {
                const lp_step *step = &steps.items[k];
                CHECK(step->from == at && step->op < UNIONS, "step %zu of %zu", k, steps.count);
                CHECK(lp_axes_find(&axes, step->to) == lp_axes_find(&axes, a), "the step leaves the class");
                ends[0] = axes.factors[dims[made[step->op][0]].off];
                ends[1] = axes.factors[dims[made[step->op][1]].off];
                CHECK((step->from == ends[0] && step->to == ends[1]) ||
                          (step->from == ends[1] && step->to == ends[0]),
                      "step %zu is not the union that operation %u made", k, step->op);
                at = step->to;
            }
            CHECK(at == b, "the chain ends at %u, not %u", at, b);
            lp_steps_free(&axes.allocator, &steps);
        }
    end();
}

int main(void)
{
    test_unify_leaves_and_proofs();
    test_proofs_of_random_unions();
    return check_finish("proofs");
}
