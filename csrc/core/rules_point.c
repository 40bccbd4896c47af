/* Operations that work element by element on operands broadcast against each other, and makers of new tensors. */
#include "rules.h"

lp_status lp_broadcast(lp_run *run, const lp_tensor *tensor, const lp_expr *dims, const int64_t *sizes,
                       size_t ndim, lp_rule rule, lp_error *err)
{
    for (size_t k = 1; k <= tensor->ndim && k <= ndim; k++) {
        size_t t = tensor->ndim - k, d = ndim - k;
        if (tensor->sizes[t] == 1)
            continue;
        if (tensor->sizes[t] == sizes[d]) {
            LP_TRY(lp_unify_dims(run, dims[d], tensor->dims[t], rule, err));
        } else {
            LP_TRY(lp_axes_note(run->axes, tensor->dims[t], LP_REASON_MISALIGNED, err));
            LP_TRY(lp_axes_note(run->axes, dims[d], LP_REASON_MISALIGNED, err));
        }
    }
    return LP_OK;
}

/* Before two activations are added: are their axes different outputs of weights, one of which has been read by another
 * weight, that is, does a residual begin?  (A low-rank update beside a projection is no residual.) */
static lp_status note_join(lp_run *run, lp_expr a, lp_expr b, bool *joined, lp_error *err)
{
    const uint32_t made = LP_ROLE_LINEAR_OUT | LP_ROLE_EMBEDDING | LP_ROLE_CONVOLVED;
    lp_expr la, lb;
    uint32_t fa, fb;

    *joined = false;
    LP_TRY(lp_axes_resolve(run->axes, a, &la, err));
    LP_TRY(lp_axes_resolve(run->axes, b, &lb, err));
    if (la.len != 1 || lb.len != 1 || run->axes->factors[la.off] == run->axes->factors[lb.off])
        return LP_OK;
    LP_TRY(lp_axes_flags(run->axes, a, false, &fa, err));
    LP_TRY(lp_axes_flags(run->axes, b, false, &fb, err));
    *joined = (fa & made) != 0 && (fb & made) != 0 && ((fa | fb) & LP_ROLE_LINEAR_IN) != 0;
    return LP_OK;
}

lp_status lp_rule_pointwise(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *inputs[LP_MAX_DIMS], *out = lp_op_output(run->graph, op, 0);
    size_t count = 0, arguments = lp_op_arg_count(run->graph, op);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};

    for (size_t i = 0; i < arguments && count < LP_MAX_DIMS; i++) {
        lp_tensor *input = lp_op_tensor(run->graph, op, i);
        if (input != NULL)
            inputs[count++] = input;
    }
    if (out == NULL)
        return LP_OK;
    for (size_t d = 0; d < out->ndim; d++) {
        lp_tensor *first = NULL;
        bool shared = false, activation = false;
        dims[d] = LP_EMPTY;
        for (size_t i = 0; i < count; i++) {
            lp_tensor *input = inputs[i];
            size_t back = out->ndim - d, at;
            if (input->ndim < back)
                continue;
            at = input->ndim - back;
            if (input->sizes[at] == 1 || input->sizes[at] != out->sizes[d])
                continue;
            if (first == NULL) {
                first = input;
                dims[d] = input->dims[at];
                continue;
            }
            if (!first->weight && !input->weight) {
                bool joined = false;
                shared = true;
                if (op->detail == LP_POINT_SUM)
                    LP_TRY(note_join(run, dims[d], input->dims[at], &joined, err));
                if (joined)
                    LP_TRY(lp_axes_role(run->axes, dims[d], LP_ROLE_JOINED, err));
            } else if (first->weight != input->weight) {
                const lp_tensor *weight = first->weight ? first : input;
                if (weight->ndim >= 2 && op->detail == LP_POINT_PRODUCT)
                    LP_TRY(lp_axes_role(run->axes, dims[d], LP_ROLE_SCALE, err));
            }
            LP_TRY(lp_unify_dims(run, dims[d], input->dims[at], lp_rule_between(first, input), err));
        }
        /* A matrix of parameters times an activation that has no such dimension: a state's own rates. */
        for (size_t i = 0; i < count; i++)
            activation |= !inputs[i]->weight;
        if (first != NULL && first->weight && activation && !shared && first->ndim >= 2 &&
            op->detail == LP_POINT_PRODUCT)
            LP_TRY(lp_axes_role(run->axes, dims[d], LP_ROLE_SCALE, err));
        if (first == NULL && out->sizes[d] != 1)
            LP_TRY(lp_axes_fresh(run->axes, out->sizes[d], &dims[d], err));
        if (op->detail == LP_POINT_NONLINEAR && first != NULL && !first->weight)
            LP_TRY(lp_axes_role(run->axes, dims[d], LP_ROLE_NONLINEAR, err));
        if (op->detail == LP_POINT_PRODUCT && shared)
            LP_TRY(lp_axes_role(run->axes, dims[d], LP_ROLE_GATED, err));
    }
    for (size_t i = 0; i < op->output_count; i++)
        LP_TRY(lp_set_output(run, op, i, dims, err));
    return LP_OK;
}

lp_status lp_rule_keep(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);

    if (input == NULL || out == NULL)
        return lp_rule_unknown(run, op, err);
    for (size_t i = 0; i < op->output_count; i++) {
        out = lp_op_output(run->graph, op, i);
        if (out == NULL)
            continue;
        if (out->ndim != input->ndim) {
            LP_TRY(lp_set_fresh(run, op, i, LP_REASON_UNKNOWN_OP, err));
            continue;
        }
        if (out != input)
            LP_TRY(lp_set_output(run, op, i, input->dims, err));
        if (out->integral && input->integral && op->detail == LP_KEEP_ALL) {
            out->has_values = input->has_values;
            out->values = input->values;
            out->values_of = input->values_of;
        }
    }
    return LP_OK;
}

lp_status lp_rule_factory(lp_run *run, const lp_op *op, lp_error *err)
{
    for (size_t i = 0; i < op->output_count; i++)
        LP_TRY(lp_set_fresh(run, op, i, (lp_reason)op->detail, err));
    return LP_OK;
}

lp_status lp_rule_nothing(lp_run *run, const lp_op *op, lp_error *err)
{
    return lp_rule_factory(run, op, err);
}

lp_status lp_freeze_op(lp_run *run, const lp_op *op, lp_reason reason, lp_error *err)
{
    size_t arguments = lp_op_arg_count(run->graph, op);

    for (size_t i = 0; i < arguments; i++) {
        lp_arg arg = lp_op_arg(run->graph, op, i);
        if (arg.tag != LP_ARG_TENSOR && arg.tag != LP_ARG_TENSORS)
            continue;
        for (size_t k = 0; k < arg.count; k++)
            if (arg.values[k] >= 0)
                LP_TRY(lp_freeze_tensor(run, &run->graph->tensors[arg.values[k]], reason, err));
    }
    for (size_t i = 0; i < op->output_count; i++)
        LP_TRY(lp_set_fresh(run, op, i, reason, err));
    return LP_OK;
}

lp_status lp_rule_unknown(lp_run *run, const lp_op *op, lp_error *err)
{
    return lp_freeze_op(run, op, LP_REASON_UNKNOWN_OP, err);
}

lp_status lp_rule_glu(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}}, halves[2];
    size_t dim;
    int64_t half;
    bool aligned;

    if (input == NULL || out == NULL || input->ndim == 0)
        return lp_rule_unknown(run, op, err);
    dim = lp_wrap_dim(lp_op_int(run->graph, op, 1, -1), input->ndim);
    half = input->sizes[dim] / 2;
    if (half == 0 || out->ndim != input->ndim)
        return lp_rule_unknown(run, op, err);
    LP_TRY(lp_axes_cut(run->axes, input->dims[dim], &half, 1, halves, &aligned, err));
    if (!aligned)
        return lp_rule_unknown(run, op, err);
    for (size_t d = 0; d < input->ndim; d++)
        dims[d] = input->dims[d];
    dims[dim] = halves[0];
    LP_TRY(lp_unify_dims(run, halves[0], halves[1], LP_RULE_EQUAL, err));
    LP_TRY(lp_axes_role(run->axes, halves[0], LP_ROLE_GATED | LP_ROLE_NONLINEAR, err));
    return lp_set_output(run, op, 0, dims, err);
}
