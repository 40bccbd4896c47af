/* Reductions and normalisations.  A sum over an axis loses the removed summands, as it should; a mean, a maximum or a
 * normalisation sees another denominator, so its axis is marked. */
#include "rules.h"

static lp_status effect_on(lp_run *run, const lp_op *op, lp_tensor *input, size_t dim, unsigned effect,
                           lp_error *err)
{
    switch (effect) {
    case LP_REDUCE_MEAN:
        return lp_mark_dim(run, op, input, dim, LP_MARK_MEAN, err);
    case LP_REDUCE_EXTREME:
        return lp_mark_dim(run, op, input, dim, LP_MARK_EXTREME, err);
    case LP_REDUCE_SOFT:
        return lp_mark_dim(run, op, input, dim, LP_MARK_SOFTMAX, err);
    case LP_REDUCE_NORM:
        return lp_mark_dim(run, op, input, dim, LP_MARK_NORM, err);
    case LP_REDUCE_ORDER:
        return lp_axes_note(run->axes, input->dims[dim], LP_REASON_ORDER, err);
    default:
        return LP_OK;
    }
}

static lp_status reduce(lp_run *run, const lp_op *op, lp_arg which, unsigned effect, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    bool gone[LP_MAX_DIMS], all = (which.tag != LP_ARG_INT && which.tag != LP_ARG_INTS) || which.count == 0;
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};
    size_t at = 0;

    for (size_t i = 1; out == NULL && i < op->output_count; i++)
        out = lp_op_output(run->graph, op, i);
    if (input == NULL || out == NULL)
        return lp_rule_unknown(run, op, err);
    for (size_t d = 0; d < input->ndim; d++)
        gone[d] = all;
    for (size_t i = 0; !all && i < which.count; i++)
        if (input->ndim > 0)
            gone[lp_wrap_dim(which.values[i], input->ndim)] = true;
    for (size_t d = 0; d < input->ndim; d++) {
        if (gone[d])
            LP_TRY(effect_on(run, op, input, d, effect, err));
        if (!gone[d] || out->ndim == input->ndim)
            dims[at++] = gone[d] ? LP_EMPTY : input->dims[d];
    }
    if (at != out->ndim)
        return lp_rule_unknown(run, op, err);
    for (size_t i = 0; i < op->output_count; i++)
        LP_TRY(lp_set_output(run, op, i, dims, err));
    return LP_OK;
}

lp_status lp_rule_reduce(lp_run *run, const lp_op *op, lp_error *err)
{
    return reduce(run, op, lp_op_arg(run->graph, op, op->detail >> 4), op->detail & 15u, err);
}

lp_status lp_rule_extreme(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_arg second = lp_op_arg(run->graph, op, 1);

    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *places = lp_op_output(run->graph, op, 1);

    if (second.tag == LP_ARG_TENSOR)
        return lp_rule_pointwise(run, op, err);
    if (input != NULL && places != NULL && places->integral && second.tag == LP_ARG_INT && input->ndim > 0) {
        places->has_values = true;
        places->values = input->dims[lp_wrap_dim(second.values[0], input->ndim)];
        if (places->live)
            LP_TRY(lp_axes_role(run->axes, places->values, LP_ROLE_ROUTED, err));
    }
    return reduce(run, op, second, LP_REDUCE_EXTREME, err);
}

lp_status lp_rule_argmax(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    lp_arg which = lp_op_arg(run->graph, op, 1);

    if (input != NULL && out != NULL && which.tag == LP_ARG_INT && input->ndim > 0) {
        out->has_values = true;
        out->values = input->dims[lp_wrap_dim(which.values[0], input->ndim)];
    }
    return reduce(run, op, which, LP_REDUCE_EXTREME, err);
}

lp_status lp_rule_softmax(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0);

    if (input == NULL)
        return lp_rule_unknown(run, op, err);
    LP_TRY(lp_mark_dim(run, op, input, lp_wrap_dim(lp_op_int(run->graph, op, 1, -1), input->ndim),
                       LP_MARK_SOFTMAX, err));
    return lp_set_output(run, op, 0, input->dims, err);
}

/* cumsum and its kin: each position depends on those before it. */
lp_status lp_rule_scan(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0);

    if (input == NULL)
        return lp_rule_unknown(run, op, err);
    if (input->ndim > 0)
        LP_TRY(lp_axes_note(run->axes, input->dims[lp_wrap_dim(lp_op_int(run->graph, op, 1, 0), input->ndim)],
                            LP_REASON_ORDER, err));
    for (size_t i = 0; i < op->output_count; i++)
        LP_TRY(lp_set_output(run, op, i, input->dims, err));
    return LP_OK;
}

lp_status lp_rule_triangle(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0);

    if (input == NULL || input->ndim < 2)
        return lp_rule_unknown(run, op, err);
    LP_TRY(lp_axes_note(run->axes, input->dims[input->ndim - 1], LP_REASON_ORDER, err));
    LP_TRY(lp_axes_note(run->axes, input->dims[input->ndim - 2], LP_REASON_ORDER, err));
    return lp_set_output(run, op, 0, input->dims, err);
}

/* layer_norm and rms_norm over the last dimensions, as many as normalized_shape has. */
lp_status lp_rule_layer_norm(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0);
    lp_arg shape = lp_op_arg(run->graph, op, 1);
    lp_expr reduced[LP_MAX_DIMS] = {{0, 0}};
    size_t kept;

    if (input == NULL || shape.tag != LP_ARG_INTS || shape.count > input->ndim)
        return lp_rule_unknown(run, op, err);
    kept = input->ndim - shape.count;
    for (size_t d = 0; d < input->ndim; d++) {
        reduced[d] = d < kept ? input->dims[d] : LP_EMPTY;
        if (d >= kept)
            LP_TRY(lp_mark_dim(run, op, input, d, LP_MARK_NORM, err));
    }
    for (size_t i = 2; i < 4; i++) {
        lp_tensor *weight = lp_op_tensor(run->graph, op, i);
        if (weight != NULL && weight->ndim == shape.count)
            LP_TRY(lp_broadcast(run, weight, input->dims, input->sizes, input->ndim, LP_RULE_FORWARD, err));
    }
    LP_TRY(lp_set_output(run, op, 0, input->dims, err));
    for (size_t i = 1; i < op->output_count; i++) {
        lp_tensor *out = lp_op_output(run->graph, op, i);
        if (out != NULL && out->ndim == input->ndim)
            LP_TRY(lp_set_output(run, op, i, reduced, err));
        else
            LP_TRY(lp_set_fresh(run, op, i, LP_REASON_OUTPUT, err));
    }
    return LP_OK;
}

/* native_group_norm(input, weight, bias, N, C, HxW, group, eps), group_norm(input, groups, weight, bias, eps): whole
 * groups may go, channels within a group may not. */
lp_status lp_rule_group_norm(lp_run *run, const lp_op *op, lp_error *err)
{
    bool native = op->detail == 1;
    lp_tensor *input = lp_op_tensor(run->graph, op, 0);
    int64_t groups = lp_op_int(run->graph, op, native ? 6 : 1, 0), sizes[2];
    lp_expr pair[2];
    bool aligned;

    if (input == NULL || input->ndim < 2 || groups < 1)
        return lp_rule_unknown(run, op, err);
    sizes[0] = groups;
    sizes[1] = input->sizes[1] / groups;
    LP_TRY(lp_axes_split(run->axes, input->dims[1], sizes, 2, pair, &aligned, err));
    if (!aligned)
        return lp_rule_unknown(run, op, err);
    LP_TRY(lp_axes_note(run->axes, pair[1], LP_REASON_GROUPED, err));
    if (op->flags & LP_OP_LITERAL)
        LP_TRY(lp_axes_note(run->axes, pair[0], LP_REASON_FIXED, err));
    for (size_t i = native ? 1 : 2; i < (native ? 3u : 4u); i++) {
        lp_tensor *weight = lp_op_tensor(run->graph, op, i);
        if (weight != NULL && weight->ndim == 1)
            LP_TRY(lp_unify_dims(run, input->dims[1], weight->dims[0], LP_RULE_FORWARD, err));
    }
    LP_TRY(lp_set_output(run, op, 0, input->dims, err));
    for (size_t i = 1; i < op->output_count; i++)
        LP_TRY(lp_set_fresh(run, op, i, LP_REASON_OUTPUT, err));
    return LP_OK;
}

/* In evaluation each channel is scaled and shifted by its own running statistics.  With the statistics of what is there
 * (standardised weights are written so), every other dimension is normalised over. */
lp_status lp_rule_batch_norm(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0);

    if (input == NULL || input->ndim < 2)
        return lp_rule_unknown(run, op, err);
    for (size_t i = 1; i < 5; i++) {
        lp_tensor *weight = lp_op_tensor(run->graph, op, i);
        if (weight != NULL && weight->ndim == 1 && weight->sizes[0] == input->sizes[1])
            LP_TRY(lp_unify_dims(run, input->dims[1], weight->dims[0], LP_RULE_FORWARD, err));
    }
    for (size_t i = 3; i < 6; i++) {
        lp_arg training = lp_op_arg(run->graph, op, i);
        if (training.tag != LP_ARG_BOOL || training.values[0] == 0)
            continue;
        for (size_t d = 0; d < input->ndim; d++)
            if (d != 1 && input->sizes[d] > 1)
                LP_TRY(lp_mark_dim(run, op, input, d, LP_MARK_NORM, err));
    }
    LP_TRY(lp_set_output(run, op, 0, input->dims, err));
    for (size_t i = 1; i < op->output_count; i++)
        LP_TRY(lp_set_fresh(run, op, i, LP_REASON_OUTPUT, err));
    return LP_OK;
}

/* _weight_norm_interface(v, g, dim): w = g v / |v|, a norm for each index of dim (-1: one of the whole).  The norm is a
 * sum over the other dimensions, which lose summands as they should; along dim a slice of zeros has no norm to divide
 * by, so that axis is marked. */
lp_status lp_rule_weight_norm(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *v = lp_op_tensor(run->graph, op, 0), *g = lp_op_tensor(run->graph, op, 1);
    int64_t dim = lp_op_int(run->graph, op, 2, 0);
    lp_expr norms[LP_MAX_DIMS] = {{0, 0}};

    if (v == NULL || g == NULL || g->ndim > v->ndim || dim < -1 || dim >= (int64_t)v->ndim)
        return lp_rule_unknown(run, op, err);
    if (dim >= 0) {
        size_t d = (size_t)dim;
        LP_TRY(lp_broadcast(run, g, v->dims, v->sizes, v->ndim, LP_RULE_FORWARD, err));
        LP_TRY(lp_mark_dim(run, op, v, d, LP_MARK_NORM, err));
        norms[d] = v->dims[d];
    }
    LP_TRY(lp_set_output(run, op, 0, v->dims, err));
    for (size_t i = 1; i < op->output_count; i++)
        LP_TRY(lp_set_output(run, op, i, norms, err));
    return LP_OK;
}
