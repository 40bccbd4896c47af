/* What the axis algebra's own files share: scratch lists, construction, and the steps of unification.
 *
 * Walks keep their pending atoms on two scratch lists of the lp_axes, each from a base the walk notes on entry.
 */
#ifndef LP_CORE_AXIS_INTERNAL_H
#define LP_CORE_AXIS_INTERNAL_H

#include "axis.h"

#define LP_TRY(call)                                                                                         \
    do {                                                                                                     \
        lp_status try_status_ = (call);                                                                      \
        if (try_status_ != LP_OK)                                                                            \
            return try_status_;                                                                              \
    } while (0)

/* Push an atom, or the factors of an expression in reverse, so that they pop outer to inner. */
lp_status lp_axes_push(lp_axes *axes, lp_atom atom, lp_error *err);
lp_status lp_axes_push_expr(lp_axes *axes, lp_expr expr, lp_error *err);

/* Append to the gather list; move what was gathered since `base` into the arena as one expression. */
lp_status lp_axes_gather(lp_axes *axes, lp_atom atom, lp_error *err);
lp_status lp_axes_seal(lp_axes *axes, size_t base, lp_expr *out, lp_error *err);

/* An expression of one atom; one atom that stands for an expression: itself, a unit, or a fresh product. */
lp_status lp_axes_single(lp_axes *axes, lp_atom atom, lp_expr *out, lp_error *err);
lp_status lp_axes_as_atom(lp_axes *axes, lp_expr expr, lp_atom *out, lp_error *err);

/* Refine a root into a product or sum of `parts`. */
void lp_axes_define(lp_axes *axes, lp_atom root, lp_definition definition, lp_expr parts);

/* The terms of a sum with nested sums flattened: roots that are leaves or products. */
lp_status lp_axes_terms(lp_axes *axes, lp_atom sum, lp_expr *out, lp_error *err);

/* Refine a leaf or sum root into outer (of size `outer`, which divides its size) x inner.  A sum factors when every term
 * does: (a x p) + (b x p) = (a + b) x p, which makes the inner parts one axis. */
lp_status lp_axes_factor(lp_axes *axes, lp_atom root, int64_t outer, bool *aligned, int depth, lp_error *err);

/* lp_axes_cut without the unifications it entails, which wait on the work list. */
lp_status lp_axes_cut_at(lp_axes *axes, lp_expr expr, const int64_t *offsets, size_t count, lp_expr *out,
                         bool *aligned, lp_error *err);

/* Put a pair on the work list; unify until the list is empty. */
lp_status lp_axes_later(lp_axes *axes, lp_expr a, lp_expr b, lp_rule rule, lp_error *err);
lp_status lp_axes_drain(lp_axes *axes, lp_error *err);

#endif
