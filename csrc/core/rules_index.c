/* Addressing by data: the indexed axis freezes, unless the index tensor carries that axis as what its values name. */
#include "rules.h"

lp_status lp_rule_embedding(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *table = lp_op_tensor(run->graph, op, 0), *index = lp_op_tensor(run->graph, op, 1);
    lp_tensor *out = lp_op_output(run->graph, op, 0);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};

    if (table == NULL || index == NULL || out == NULL || table->ndim != 2 || index->ndim + 1 != out->ndim)
        return lp_rule_unknown(run, op, err);
    LP_TRY(lp_index_dim(run, index, table->dims[0], err));
    for (size_t d = 0; d < index->ndim; d++)
        dims[d] = index->dims[d];
    dims[index->ndim] = table->dims[1];
    LP_TRY(lp_axes_role(run->axes, table->dims[1], LP_ROLE_EMBEDDING, err));
    return lp_set_output(run, op, 0, dims, err);
}

lp_status lp_rule_index_select(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *self = lp_op_tensor(run->graph, op, 0), *index = lp_op_tensor(run->graph, op, 2);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};
    size_t dim;

    if (self == NULL || index == NULL || self->ndim == 0)
        return lp_rule_unknown(run, op, err);
    dim = lp_wrap_dim(lp_op_int(run->graph, op, 1, 0), self->ndim);
    LP_TRY(lp_index_dim(run, index, self->dims[dim], err));
    for (size_t d = 0; d < self->ndim; d++)
        dims[d] = d != dim ? self->dims[d] : index->ndim > 0 ? index->dims[0] : LP_EMPTY;
    return lp_set_output(run, op, 0, dims, err);
}

/* Dimensions other than `dim` of an index or source that must cover those of self. */
static lp_status cover(lp_run *run, const lp_tensor *self, const lp_tensor *other, size_t dim, lp_error *err)
{
    for (size_t d = 0; d < self->ndim && d < other->ndim; d++) {
        if (d == dim)
            continue;
        if (self->sizes[d] == other->sizes[d]) {
            LP_TRY(lp_unify_dims(run, self->dims[d], other->dims[d], LP_RULE_EQUAL, err));
        } else {
            LP_TRY(lp_axes_note(run->axes, self->dims[d], LP_REASON_INDEXED, err));
            LP_TRY(lp_axes_note(run->axes, other->dims[d], LP_REASON_INDEXED, err));
        }
    }
    return LP_OK;
}

lp_status lp_rule_gather(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *self = lp_op_tensor(run->graph, op, 0), *index = lp_op_tensor(run->graph, op, 2);
    lp_tensor *out = lp_op_output(run->graph, op, 0);
    size_t dim;

    if (self == NULL || index == NULL || out == NULL || self->ndim != index->ndim || self->ndim == 0)
        return lp_rule_unknown(run, op, err);
    dim = lp_wrap_dim(lp_op_int(run->graph, op, 1, 0), self->ndim);
    LP_TRY(lp_index_dim(run, index, self->dims[dim], err));
    LP_TRY(cover(run, self, index, dim, err));
    if (out->integral) {
        out->has_values = self->has_values;
        out->values = self->values;
    }
    return lp_set_output(run, op, 0, index->dims, err);
}

lp_status lp_rule_scatter(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *self = lp_op_tensor(run->graph, op, 0), *index = lp_op_tensor(run->graph, op, 2);
    lp_tensor *source = lp_op_tensor(run->graph, op, 3);
    size_t dim;

    if (self == NULL || index == NULL || self->ndim != index->ndim || self->ndim == 0)
        return lp_rule_unknown(run, op, err);
    dim = lp_wrap_dim(lp_op_int(run->graph, op, 1, 0), self->ndim);
    LP_TRY(lp_index_dim(run, index, self->dims[dim], err));
    LP_TRY(cover(run, self, index, dim, err));
    if (source != NULL && source->ndim == index->ndim)
        LP_TRY(cover(run, index, source, LP_MAX_DIMS, err));
    return lp_set_output(run, op, 0, self->dims, err);
}

lp_status lp_rule_index_add(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *self = lp_op_tensor(run->graph, op, 0), *index = lp_op_tensor(run->graph, op, 2);
    lp_tensor *source = lp_op_tensor(run->graph, op, 3);
    size_t dim;

    if (self == NULL || index == NULL || self->ndim == 0)
        return lp_rule_unknown(run, op, err);
    dim = lp_wrap_dim(lp_op_int(run->graph, op, 1, 0), self->ndim);
    LP_TRY(lp_index_dim(run, index, self->dims[dim], err));
    if (source != NULL && source->ndim == self->ndim) {
        LP_TRY(cover(run, self, source, dim, err));
        if (index->ndim == 1 && index->sizes[0] == source->sizes[dim])
            LP_TRY(lp_unify_dims(run, index->dims[0], source->dims[dim], LP_RULE_EQUAL, err));
    }
    return lp_set_output(run, op, 0, self->dims, err);
}

/* Dimensions of self[indices]: index tensors broadcast together stand where the first of them does when they are
 * adjacent, else in front.  A boolean mask takes as many dimensions as it has and leaves one of unknown length. */
static lp_status indexed_dims(lp_run *run, lp_tensor *self, lp_arg list, const int64_t *sizes,
                              size_t out_ndim, lp_expr *dims, bool *known, lp_error *err)
{
    lp_graph *graph = run->graph;
    lp_expr joint[LP_MAX_DIMS] = {{0, 0}}, kept[LP_MAX_DIMS] = {{0, 0}};
    size_t joint_ndim = 0, first = LP_MAX_DIMS, last = 0, used = 0, at = 0, kept_count = 0, before = 0;
    bool adjacent, masked = false;

    for (size_t i = 0; i < list.count; i++)
        if (list.values[i] >= 0 && graph->tensors[list.values[i]].ndim > joint_ndim)
            joint_ndim = graph->tensors[list.values[i]].ndim;
    for (size_t i = 0; i < list.count; i++) {
        const lp_tensor *index = list.values[i] >= 0 ? &graph->tensors[list.values[i]] : NULL;
        if (index == NULL) {
            if (at < self->ndim)
                kept[kept_count++] = self->dims[at++];
            continue;
        }
        /* a mask has the sizes of what it covers, and a joint dimension of data-dependent length */
        masked |= index->ndim > 0 && at + index->ndim <= self->ndim &&
                  out_ndim + index->ndim == self->ndim + 1u && list.count == 1 && index->integral &&
                  index->sizes[0] == self->sizes[at] && index->role == LP_TENSOR_VALUE &&
                  !index->has_values && sizes[0] != index->sizes[0];
        first = i < first ? i : first;
        last = i;
        used++;
        if (at < self->ndim)
            LP_TRY(lp_index_dim(run, index, self->dims[at++], err));
    }
    *known = !masked;
    if (masked)
        return LP_OK;
    for (; at < self->ndim; at++)
        kept[kept_count++] = self->dims[at];
    for (size_t d = 0; d < joint_ndim; d++) {
        const lp_tensor *source = NULL;
        joint[d] = LP_EMPTY;
        for (size_t i = 0; i < list.count; i++) {
            const lp_tensor *index = list.values[i] >= 0 ? &graph->tensors[list.values[i]] : NULL;
            size_t back = joint_ndim - d;
            if (index == NULL || index->ndim < back || index->sizes[index->ndim - back] == 1)
                continue;
            if (source != NULL)
                LP_TRY(lp_unify_dims(run, joint[d], index->dims[index->ndim - back], LP_RULE_EQUAL, err));
            else
                joint[d] = index->dims[index->ndim - back];
            source = index;
        }
    }
    adjacent = used > 0 && last - first + 1 == used;
    *known = joint_ndim + kept_count == out_ndim;
    if (!*known)
        return LP_OK;
    before = adjacent ? first : 0;
    for (size_t d = 0; d < out_ndim; d++)
        dims[d] = d < before ? kept[d] : d < before + joint_ndim ? joint[d - before] : kept[d - joint_ndim];
    return LP_OK;
}

lp_status lp_rule_index(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *self = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    lp_arg list = lp_op_arg(run->graph, op, 1);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};
    bool known;

    if (self == NULL || out == NULL || list.tag != LP_ARG_TENSORS)
        return lp_rule_unknown(run, op, err);
    LP_TRY(indexed_dims(run, self, list, out->sizes, out->ndim, dims, &known, err));
    for (size_t d = 0; known && d < out->ndim; d++)
        known = lp_axes_size(run->axes, dims[d]) == out->sizes[d];
    if (!known) {
        /* a boolean mask: its dimensions collapse into one; those behind it pass */
        size_t mask_ndim =
            list.count == 1 && list.values[0] >= 0 ? run->graph->tensors[list.values[0]].ndim : 0;
        if (mask_ndim == 0 || out->ndim + mask_ndim != self->ndim + 1u)
            return lp_rule_unknown(run, op, err);
        for (size_t d = 0; d < mask_ndim; d++) {
            LP_TRY(lp_axes_note(run->axes, self->dims[d], LP_REASON_INDEXED, err));
            LP_TRY(lp_unify_dims(run, self->dims[d], run->graph->tensors[list.values[0]].dims[d],
                                 LP_RULE_EQUAL, err));
        }
        LP_TRY(lp_axes_fresh(run->axes, out->sizes[0], &dims[0], err));
        LP_TRY(lp_axes_note(run->axes, dims[0], LP_REASON_INDEXED, err));
        for (size_t d = 1; d < out->ndim; d++)
            dims[d] = self->dims[d + mask_ndim - 1];
    }
    if (out->integral) {
        out->has_values = self->has_values;
        out->values = self->values;
    }
    return lp_set_output(run, op, 0, dims, err);
}

/* A boolean mask of two or more dimensions has the sizes of those it covers. */
static bool covers(lp_run *run, const lp_tensor *self, lp_arg list, const lp_tensor **mask)
{
    *mask = list.count == 1 && list.values[0] >= 0 ? &run->graph->tensors[list.values[0]] : NULL;
    if (*mask == NULL || (*mask)->ndim < 2 || (*mask)->ndim > self->ndim || (*mask)->has_values)
        return false;
    for (size_t d = 0; d < (*mask)->ndim; d++)
        if ((*mask)->sizes[d] != self->sizes[d])
            return false;
    return true;
}

lp_status lp_rule_index_put(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *self = lp_op_tensor(run->graph, op, 0), *values = lp_op_tensor(run->graph, op, 2);
    lp_arg list = lp_op_arg(run->graph, op, 1);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};
    int64_t sizes[LP_MAX_DIMS];
    size_t joint = 0, indexed = 0, ndim;
    const lp_tensor *mask;
    bool known;

    if (self == NULL || values == NULL || list.tag != LP_ARG_TENSORS)
        return lp_rule_unknown(run, op, err);
    if (covers(run, self, list, &mask)) {
        for (size_t d = 0; d < mask->ndim; d++)
            LP_TRY(lp_unify_dims(run, self->dims[d], mask->dims[d], LP_RULE_EQUAL, err));
        if (values->ndim > 0)
            return lp_rule_unknown(run, op, err);
        return lp_set_output(run, op, 0, self->dims, err);
    }
    for (size_t i = 0; i < list.count; i++) {
        const lp_tensor *index = list.values[i] >= 0 ? &run->graph->tensors[list.values[i]] : NULL;
        indexed += index != NULL;
        if (index != NULL && index->ndim > joint)
            joint = index->ndim;
    }
    ndim = self->ndim + joint - indexed;
    if (ndim > LP_MAX_DIMS)
        return lp_rule_unknown(run, op, err);
    for (size_t d = 0; d < ndim; d++)
        sizes[d] = -1;
    LP_TRY(indexed_dims(run, self, list, sizes, ndim, dims, &known, err));
    if (!known || values->ndim > ndim)
        return lp_rule_unknown(run, op, err);
    for (size_t d = 0; d < ndim; d++)
        sizes[d] = lp_axes_size(run->axes, dims[d]);
    LP_TRY(lp_broadcast(run, values, dims, sizes, ndim, LP_RULE_EQUAL, err));
    return lp_set_output(run, op, 0, self->dims, err);
}

/* self, mask broadcast to it, and a source read in order: only a shared last dimension keeps its meaning (features of
 * merged embeddings), and it must be covered whole. */
lp_status lp_rule_masked_scatter(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *self = lp_op_tensor(run->graph, op, 0), *mask = lp_op_tensor(run->graph, op, 1);
    lp_tensor *source = lp_op_tensor(run->graph, op, 2);

    if (self == NULL || mask == NULL || source == NULL || self->ndim == 0)
        return lp_rule_unknown(run, op, err);
    LP_TRY(lp_broadcast(run, mask, self->dims, self->sizes, self->ndim, LP_RULE_EQUAL, err));
    for (size_t d = 0; d < source->ndim; d++) {
        bool features = d + 1u == source->ndim && source->sizes[d] == self->sizes[self->ndim - 1];
        if (features)
            LP_TRY(lp_unify_dims(run, self->dims[self->ndim - 1], source->dims[d], LP_RULE_EQUAL, err));
        else
            LP_TRY(lp_axes_note(run->axes, source->dims[d], LP_REASON_INDEXED, err));
    }
    for (size_t d = 0; d + 1 < self->ndim; d++)
        LP_TRY(lp_axes_note(run->axes, self->dims[d], LP_REASON_INDEXED, err));
    return lp_set_output(run, op, 0, self->dims, err);
}

lp_status lp_rule_nonzero(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *self = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);

    if (self == NULL || out == NULL)
        return lp_rule_unknown(run, op, err);
    out->values_of = lp_tensor_id(run->graph, self);
    if (self->ndim == 1) {
        out->has_values = true;
        out->values = self->dims[0];
    }
    return lp_set_fresh(run, op, 0, LP_REASON_INDEXED, err);
}

lp_status lp_rule_topk(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *self = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    lp_tensor *indices = lp_op_output(run->graph, op, 1), *shape = out != NULL ? out : indices;
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};
    size_t dim;

    if (self == NULL || shape == NULL || self->ndim == 0)
        return lp_rule_unknown(run, op, err);
    dim = lp_wrap_dim(lp_op_int(run->graph, op, 2, -1), self->ndim);
    LP_TRY(lp_mark_dim(run, op, self, dim, LP_MARK_TOPK, err));
    LP_TRY(lp_axes_role(run->axes, self->dims[dim], LP_ROLE_ROUTED, err));
    for (size_t d = 0; d < self->ndim; d++)
        dims[d] = self->dims[d];
    LP_TRY(lp_axes_fresh(run->axes, shape->sizes[dim], &dims[dim], err));
    LP_TRY(lp_axes_note(run->axes, dims[dim], LP_REASON_SLOTS, err));
    if (indices != NULL) {
        indices->has_values = true;
        indices->values = self->dims[dim];
    }
    LP_TRY(lp_set_output(run, op, 0, dims, err));
    return lp_set_output(run, op, 1, dims, err);
}

lp_status lp_rule_sort(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *self = lp_op_tensor(run->graph, op, 0),
              *indices = lp_op_output(run->graph, op, op->detail == 1 ? 0 : 1);
    size_t dim, arguments = lp_op_arg_count(run->graph, op);
    int64_t which = -1;

    if (self == NULL)
        return lp_rule_unknown(run, op, err);
    for (size_t i = 1; i < arguments; i++)
        if (lp_op_arg(run->graph, op, i).tag == LP_ARG_INT) {
            which = lp_op_int(run->graph, op, i, -1);
            break;
        }
    dim = lp_wrap_dim(which, self->ndim);
    if (self->ndim > 0) {
        LP_TRY(lp_axes_note(run->axes, self->dims[dim], LP_REASON_ORDER, err));
        if (indices != NULL) {
            indices->has_values = true;
            indices->values = self->dims[dim];
        }
    }
    if (op->detail == 0 && lp_op_output(run->graph, op, 0) != NULL && self->integral) {
        lp_op_output(run->graph, op, 0)->has_values = self->has_values;
        lp_op_output(run->graph, op, 0)->values = self->values;
    }
    for (size_t i = 0; i < op->output_count; i++)
        LP_TRY(lp_set_output(run, op, i, self->dims, err));
    return LP_OK;
}

/* bincount, histc: one count for each position the values name. */
lp_status lp_rule_count(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *self = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);

    if (self == NULL || out == NULL || out->ndim != 1)
        return lp_rule_unknown(run, op, err);
    if (self->has_values && lp_axes_size(run->axes, self->values) == out->sizes[0])
        return lp_set_output(run, op, 0, &self->values, err);
    return lp_set_fresh(run, op, 0, LP_REASON_INDEXED, err);
}

lp_status lp_rule_search(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *shape = lp_op_tensor(run->graph, op, op->detail),
              *table = lp_op_tensor(run->graph, op, 1u - op->detail);
    lp_tensor *out = lp_op_output(run->graph, op, 0);

    if (shape == NULL || out == NULL || shape->ndim != out->ndim)
        return lp_rule_unknown(run, op, err);
    if (table != NULL)
        LP_TRY(lp_freeze_tensor(run, table, LP_REASON_ORDER, err));
    return lp_set_output(run, op, 0, shape->dims, err);
}
