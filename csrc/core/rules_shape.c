/* Views, rearrangements, joins and cuts: the operations that refine axes. */
#include "rules.h"

static void copy_dims(const lp_tensor *from, lp_expr *dims)
{
    for (size_t d = 0; d < from->ndim; d++)
        dims[d] = from->dims[d];
}

/* A view of integers still names the same positions. */
static void keep_values(const lp_tensor *from, lp_tensor *to)
{
    if (from->integral && to->integral) {
        to->has_values = from->has_values;
        to->values = from->values;
    }
}

static lp_status freeze_through(lp_run *run, const lp_op *op, const lp_tensor *input, lp_reason reason,
                                lp_error *err)
{
    LP_TRY(lp_freeze_tensor(run, input, reason, err));
    for (size_t i = 0; i < op->output_count; i++)
        LP_TRY(lp_set_fresh(run, op, i, reason, err));
    return LP_OK;
}

/* The dimensions from..until of the input become as many elements of the output's, at..end; where no axes can say how
 * (the borders of a padded sequence cut into chunks), these and no others freeze. */
static lp_status regroup(lp_run *run, const lp_tensor *input, size_t from, size_t until, const lp_tensor *out,
                         size_t at, size_t end, lp_expr *dims, lp_error *err)
{
    lp_expr whole = LP_EMPTY;
    bool aligned;

    for (size_t d = from; d < until; d++)
        LP_TRY(lp_axes_concat(run->axes, whole, input->dims[d], &whole, err));
    LP_TRY(lp_axes_split(run->axes, whole, out->sizes + at, end - at, dims + at, &aligned, err));
    if (aligned)
        return LP_OK;
    LP_TRY(lp_axes_note(run->axes, whole, LP_REASON_MISALIGNED, err));
    for (size_t d = at; d < end; d++) {
        LP_TRY(lp_axes_fresh(run->axes, out->sizes[d], &dims[d], err));
        LP_TRY(lp_axes_note(run->axes, dims[d], LP_REASON_MISALIGNED, err));
    }
    return LP_OK;
}

lp_status lp_rule_view(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};
    int64_t before = 1, after = 1;
    size_t i = 0, o = 0;

    if (input == NULL || out == NULL)
        return lp_rule_unknown(run, op, err);
    for (size_t d = 0; d < input->ndim; d++)
        before *= input->sizes[d];
    for (size_t d = 0; d < out->ndim; d++)
        after *= out->sizes[d];
    if (before != after) /* a view under another element size */
        return freeze_through(run, op, input, LP_REASON_MISALIGNED, err);
    if (before == 0)
        return lp_set_fresh(run, op, 0, LP_REASON_CONSTANT, err);
    while (i < input->ndim ||
           o < out->ndim) { /* the shortest runs of dimensions that hold as many elements */
        size_t from = i, at = o;
        before = i < input->ndim ? input->sizes[i++] : 1;
        after = o < out->ndim ? out->sizes[o++] : 1;
        while (before != after)
            if (before < after ? i < input->ndim : o == out->ndim)
                before *= input->sizes[i++];
            else
                after *= out->sizes[o++];
        LP_TRY(regroup(run, input, from, i, out, at, o, dims, err));
    }
    keep_values(input, out);
    return lp_set_output(run, op, 0, dims, err);
}

/* squeeze and unsqueeze: the dimensions of size 1 come and go, the others keep their order. */
lp_status lp_rule_squeeze(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};
    size_t from = 0;

    if (input == NULL || out == NULL)
        return lp_rule_unknown(run, op, err);
    for (size_t d = 0; d < out->ndim; d++) {
        dims[d] = LP_EMPTY;
        if (out->sizes[d] == 1)
            continue;
        while (from < input->ndim && input->sizes[from] == 1)
            from++;
        if (from == input->ndim)
            return lp_rule_unknown(run, op, err);
        dims[d] = input->dims[from++];
    }
    keep_values(input, out);
    return lp_set_output(run, op, 0, dims, err);
}

lp_status lp_rule_permute(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    lp_arg order = lp_op_arg(run->graph, op, 1);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}}, swap;
    size_t n, a, b;

    if (input == NULL || out == NULL || out->ndim != input->ndim)
        return lp_rule_unknown(run, op, err);
    n = input->ndim;
    copy_dims(input, dims);
    switch (op->detail) {
    case LP_PERMUTE_LIST:
        for (size_t d = 0; d < n && d < order.count; d++)
            dims[d] = input->dims[lp_wrap_dim(order.values[d], n)];
        break;
    case LP_PERMUTE_REVERSE:
        for (size_t d = 0; d < n; d++)
            dims[d] = input->dims[n - 1 - d];
        break;
    default:
        if (n < 2)
            break;
        a = op->detail == LP_PERMUTE_TWO ? lp_wrap_dim(lp_op_int(run->graph, op, 1, 0), n) : n - 2;
        b = op->detail == LP_PERMUTE_TWO ? lp_wrap_dim(lp_op_int(run->graph, op, 2, 1), n) : n - 1;
        swap = dims[a];
        dims[a] = dims[b];
        dims[b] = swap;
    }
    keep_values(input, out);
    return lp_set_output(run, op, 0, dims, err);
}

lp_status lp_rule_expand(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};

    if (input == NULL || out == NULL || out->ndim < input->ndim)
        return lp_rule_unknown(run, op, err);
    for (size_t d = 0; d < out->ndim; d++) {
        size_t lead = out->ndim - input->ndim;
        if (d >= lead && input->sizes[d - lead] == out->sizes[d])
            dims[d] = input->dims[d - lead];
        else
            LP_TRY(lp_axes_fresh(run->axes, out->sizes[d], &dims[d], err));
    }
    keep_values(input, out);
    return lp_set_output(run, op, 0, dims, err);
}

lp_status lp_rule_repeat(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}}, times;

    if (input == NULL || out == NULL || out->ndim < input->ndim)
        return lp_rule_unknown(run, op, err);
    for (size_t d = 0; d < out->ndim; d++) {
        size_t lead = out->ndim - input->ndim;
        lp_expr inner = d >= lead ? input->dims[d - lead] : LP_EMPTY;
        int64_t size = d >= lead ? input->sizes[d - lead] : 1;
        if (size == 0)
            return lp_rule_unknown(run, op, err);
        LP_TRY(lp_axes_fresh(run->axes, out->sizes[d] / size, &times, err));
        LP_TRY(lp_axes_concat(run->axes, times, inner, &dims[d], err));
    }
    keep_values(input, out);
    return lp_set_output(run, op, 0, dims, err);
}

/* Joined integers name positions of one axis if every part does. */
static lp_status join_values(lp_run *run, lp_arg list, lp_tensor *out, lp_error *err)
{
    const lp_tensor *first = NULL;

    for (size_t i = 0; i < list.count; i++) {
        const lp_tensor *part = list.values[i] >= 0 ? &run->graph->tensors[list.values[i]] : NULL;
        if (part == NULL || !part->integral || !part->has_values ||
            (first != NULL &&
             lp_axes_size(run->axes, first->values) != lp_axes_size(run->axes, part->values)))
            return LP_OK;
        if (first == NULL)
            first = part;
        else
            LP_TRY(lp_unify_dims(run, first->values, part->values, LP_RULE_VALUE, err));
    }
    if (first != NULL)
        keep_values(first, out);
    return LP_OK;
}

lp_status lp_rule_cat(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_arg list = lp_op_arg(run->graph, op, 0);
    lp_tensor *out = lp_op_output(run->graph, op, 0), *first = NULL;
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}}, *terms;
    size_t dim, count = 0, capacity = 0;
    void *block = NULL;
    lp_status status;

    if (list.tag != LP_ARG_TENSORS || out == NULL || out->ndim == 0)
        return lp_rule_unknown(run, op, err);
    dim = lp_wrap_dim(lp_op_int(run->graph, op, 1, 0), out->ndim);
    LP_TRY(join_values(run, list, out, err));
    LP_TRY(lp_grow(&run->graph->allocator, &block, &capacity, list.count + 1, sizeof *terms, err));
    terms = block;
    status = LP_OK;
    for (size_t i = 0; status == LP_OK && i < list.count; i++) {
        lp_tensor *tensor = list.values[i] >= 0 ? &run->graph->tensors[list.values[i]] : NULL;
        if (tensor == NULL || tensor->ndim != out->ndim || tensor->sizes[dim] == 0)
            continue; /* cat skips empty tensors */
        terms[count++] = tensor->dims[dim];
        if (first == NULL) {
            first = tensor;
            continue;
        }
        for (size_t d = 0; status == LP_OK && d < out->ndim; d++)
            if (d != dim)
                status =
                    lp_unify_dims(run, first->dims[d], tensor->dims[d], lp_rule_between(first, tensor), err);
    }
    if (status == LP_OK && first != NULL) {
        copy_dims(first, dims);
        status = lp_axes_sum(run->axes, terms, count, &dims[dim], err);
    }
    lp_release(&run->graph->allocator, block, capacity, sizeof *terms);
    if (status != LP_OK)
        return status;
    return first == NULL ? lp_set_fresh(run, op, 0, LP_REASON_UNKNOWN_OP, err)
                         : lp_set_output(run, op, 0, dims, err);
}

lp_status lp_rule_stack(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_arg list = lp_op_arg(run->graph, op, 0);
    lp_tensor *out = lp_op_output(run->graph, op, 0), *first;
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};
    size_t dim;

    if (list.tag != LP_ARG_TENSORS || list.count == 0 || list.values[0] < 0 || out == NULL || out->ndim == 0)
        return lp_rule_unknown(run, op, err);
    dim = lp_wrap_dim(lp_op_int(run->graph, op, 1, 0), out->ndim);
    LP_TRY(join_values(run, list, out, err));
    first = &run->graph->tensors[list.values[0]];
    if (out->ndim != first->ndim + 1u)
        return lp_rule_unknown(run, op, err);
    for (size_t d = 0; d < out->ndim; d++)
        dims[d] = d == dim ? LP_EMPTY : first->dims[d < dim ? d : d - 1];
    for (size_t i = 1; i < list.count; i++) {
        const lp_tensor *tensor = list.values[i] >= 0 ? &run->graph->tensors[list.values[i]] : NULL;
        if (tensor == NULL || tensor->ndim != first->ndim)
            return lp_rule_unknown(run, op, err);
        for (size_t d = 0; d < first->ndim; d++)
            LP_TRY(lp_unify_dims(run, first->dims[d], tensor->dims[d], lp_rule_between(first, tensor), err));
    }
    LP_TRY(lp_axes_fresh(run->axes, (int64_t)list.count, &dims[dim], err));
    LP_TRY(lp_axes_note(run->axes, dims[dim], LP_REASON_FIXED, err));
    return lp_set_output(run, op, 0, dims, err);
}

lp_status lp_rule_pad(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    lp_arg pad = lp_op_arg(run->graph, op, 1);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};

    if (input == NULL || out == NULL || pad.tag != LP_ARG_INTS || out->ndim != input->ndim ||
        pad.count > 2u * input->ndim)
        return lp_rule_unknown(run, op, err);
    copy_dims(input, dims);
    for (size_t k = 0; 2 * k + 1 < pad.count; k++) {
        size_t d = input->ndim - 1 - k, count = 0;
        int64_t left = pad.values[2 * k], right = pad.values[2 * k + 1], offsets[2];
        lp_expr pieces[3], terms[3];
        bool aligned;
        if (left < 0 || right < 0) {
            int64_t size = input->sizes[d];
            if (left < 0)
                offsets[count++] = -left;
            if (right < 0)
                offsets[count++] = size + right;
            LP_TRY(lp_axes_note(run->axes, dims[d], LP_REASON_PADDING, err));
            LP_TRY(lp_axes_cut(run->axes, dims[d], offsets, count, pieces, &aligned, err));
            if (!aligned)
                return freeze_through(run, op, input, LP_REASON_MISALIGNED, err);
            dims[d] = pieces[left < 0 ? 1 : 0];
        }
        count = 0;
        if (left > 0) {
            LP_TRY(lp_axes_fresh(run->axes, left, &terms[count], err));
            LP_TRY(lp_axes_note(run->axes, terms[count++], LP_REASON_PADDING, err));
        }
        terms[count++] = dims[d];
        if (right > 0) {
            LP_TRY(lp_axes_fresh(run->axes, right, &terms[count], err));
            LP_TRY(lp_axes_note(run->axes, terms[count++], LP_REASON_PADDING, err));
        }
        if (count > 1)
            LP_TRY(lp_axes_sum(run->axes, terms, count, &dims[d], err));
    }
    return lp_set_output(run, op, 0, dims, err);
}

/* Every s-th position: n = (n / s) x s, of which one inner position is taken. */
static lp_status stride(lp_run *run, const lp_op *op, lp_tensor *input, size_t dim, int64_t step,
                        lp_error *err)
{
    lp_tensor *out = lp_op_output(run->graph, op, 0);
    int64_t sizes[2] = {input->sizes[dim] / step, step};
    lp_expr pair[2], dims[LP_MAX_DIMS] = {{0, 0}};
    bool aligned = input->sizes[dim] % step == 0 && out->sizes[dim] == sizes[0];

    copy_dims(input, dims);
    if (aligned)
        LP_TRY(lp_axes_split(run->axes, input->dims[dim], sizes, 2, pair, &aligned, err));
    if (aligned) {
        dims[dim] = pair[0];
        LP_TRY(lp_axes_note(run->axes, pair[1], LP_REASON_SELECT, err));
    } else {
        LP_TRY(lp_axes_note(run->axes, input->dims[dim], LP_REASON_MISALIGNED, err));
        LP_TRY(lp_axes_fresh(run->axes, out->sizes[dim], &dims[dim], err));
        LP_TRY(lp_axes_note(run->axes, dims[dim], LP_REASON_MISALIGNED, err));
    }
    return lp_set_output(run, op, 0, dims, err);
}

/* Literal borders count from the front, negative ones from the end: the side they count from keeps its size. */
static lp_status fix_borders(lp_run *run, const lp_op *op, const lp_expr *pieces, size_t cuts, bool begins,
                             bool ends, lp_error *err)
{
    bool start_from_end = begins && lp_op_int(run->graph, op, 2, 0) < 0;
    bool end_from_end = ends && lp_op_int(run->graph, op, 3, 0) < 0;
    lp_expr piece = pieces[begins ? 1 : 0];

    if (begins && !start_from_end)
        LP_TRY(lp_axes_note(run->axes, pieces[0], LP_REASON_FIXED, err));
    if (ends && end_from_end)
        LP_TRY(lp_axes_note(run->axes, pieces[cuts], LP_REASON_FIXED, err));
    if (start_from_end && (end_from_end || !ends))
        LP_TRY(lp_axes_note(run->axes, piece, LP_REASON_FIXED, err));
    if (ends && !end_from_end)
        LP_TRY(lp_axes_note(run->axes, piece, LP_REASON_FIXED, err));
    return LP_OK;
}

lp_status lp_rule_slice(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}}, pieces[3];
    int64_t size, start, end, step, offsets[2];
    size_t dim, count = 0;
    bool aligned;

    if (input == NULL || out == NULL || input->ndim == 0 || out->ndim != input->ndim ||
        lp_op_int(run->graph, op, 4, 1) < 1)
        return lp_rule_unknown(run, op, err);
    dim = lp_wrap_dim(lp_op_int(run->graph, op, 1, 0), input->ndim);
    size = input->sizes[dim];
    start = lp_op_int(run->graph, op, 2, 0);
    end = lp_op_int(run->graph, op, 3, size);
    step = lp_op_int(run->graph, op, 4, 1);
    start = start < 0 ? start + size : start;
    end = end < 0 ? end + size : end;
    start = start < 0 ? 0 : start > size ? size : start;
    end = end < start ? start : end > size ? size : end;
    copy_dims(input, dims);
    keep_values(input, out);
    if (step != 1)
        return stride(run, op, input, dim, step, err);
    if (start > 0)
        offsets[count++] = start;
    if (end < size)
        offsets[count++] = end;
    if (count > 0) {
        LP_TRY(lp_axes_cut(run->axes, input->dims[dim], offsets, count, pieces, &aligned, err));
        if (aligned) {
            dims[dim] = pieces[start > 0 ? 1 : 0];
            if (op->flags & LP_OP_LITERAL)
                LP_TRY(fix_borders(run, op, pieces, count, start > 0, end < size, err));
        } else {
            LP_TRY(lp_axes_note(run->axes, input->dims[dim], LP_REASON_MISALIGNED, err));
            LP_TRY(lp_axes_fresh(run->axes, end - start, &dims[dim], err));
            LP_TRY(lp_axes_note(run->axes, dims[dim], LP_REASON_MISALIGNED, err));
        }
    }
    return lp_set_output(run, op, 0, dims, err);
}

/* split, split_with_sizes, chunk: consecutive pieces that cover the dimension. */
lp_status lp_rule_pieces(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0);
    size_t dim, count = op->output_count, capacity = 0, piece_capacity = 0, cuts = 0, piece = 0;
    int64_t *offsets, at = 0, left = 0;
    lp_expr *pieces, dims[LP_MAX_DIMS] = {{0, 0}};
    void *block = NULL, *piece_block = NULL;
    lp_status status = LP_OK;
    bool aligned = true;

    if (input == NULL || input->ndim == 0 || count == 0)
        return lp_rule_unknown(run, op, err);
    dim = lp_wrap_dim(lp_op_int(run->graph, op, 2, 0), input->ndim);
    left = input->sizes[dim];
    for (size_t i = 0; i < count; i++) {
        const lp_tensor *out = lp_op_output(run->graph, op, i);
        if (out == NULL || out->ndim != input->ndim)
            return lp_rule_unknown(run, op, err);
        left = left >= 0 && out->sizes[dim] <= left ? left - out->sizes[dim] : -1;
    }
    if (left != 0)
        return lp_error_set(err, LP_ERR_TRACE,
                            "operation %u: the pieces do not cover dimension %zu of size %lld", op->index,
                            dim, (long long)input->sizes[dim]);
    LP_TRY(lp_grow(&run->graph->allocator, &block, &capacity, count, sizeof *offsets, err));
    offsets = block;
    status = lp_grow(&run->graph->allocator, &piece_block, &piece_capacity, count, sizeof *pieces, err);
    pieces = piece_block;
    for (size_t i = 0; i < count; i++) { /* pieces of size 0 make no border */
        int64_t size = lp_op_output(run->graph, op, i)->sizes[dim];
        if (at > 0 && size > 0)
            offsets[cuts++] = at;
        at += size;
    }
    if (status == LP_OK)
        status = lp_axes_cut(run->axes, input->dims[dim], offsets, cuts, pieces, &aligned, err);
    if (status == LP_OK && !aligned) {
        status = freeze_through(run, op, input, LP_REASON_MISALIGNED, err);
    } else if (status == LP_OK) {
        copy_dims(input, dims);
        for (size_t i = 0; status == LP_OK && i < count; i++) {
            bool empty = lp_op_output(run->graph, op, i)->sizes[dim] == 0;
            dims[dim] = empty ? LP_EMPTY : pieces[piece++];
            keep_values(input, lp_op_output(run->graph, op, i));
            if (op->flags & LP_OP_LITERAL)
                status = lp_axes_note(run->axes, dims[dim], LP_REASON_FIXED, err);
            if (status == LP_OK)
                status = lp_set_output(run, op, i, dims, err);
        }
    }
    lp_release(&run->graph->allocator, block, capacity, sizeof *offsets);
    lp_release(&run->graph->allocator, piece_block, piece_capacity, sizeof *pieces);
    return status;
}

lp_status lp_rule_select(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};
    size_t dim;

    if (input == NULL || input->ndim == 0)
        return lp_rule_unknown(run, op, err);
    dim = lp_wrap_dim(lp_op_int(run->graph, op, 1, 0), input->ndim);
    LP_TRY(lp_axes_note(run->axes, input->dims[dim], LP_REASON_SELECT, err));
    for (size_t d = 0; d + 1 < input->ndim; d++)
        dims[d] = input->dims[d < dim ? d : d + 1];
    for (size_t i = 0; i < op->output_count; i++) {
        lp_tensor *out = lp_op_output(run->graph, op, i);
        if (out == NULL)
            continue;
        keep_values(input, out);
        if (input->values_of != LP_NO_OP && dim == 1) {
            /* a column of nonzero(): positions along one dimension of its argument */
            const lp_tensor *source = &run->graph->tensors[input->values_of];
            size_t column = op->output_count > 1
                                ? i
                                : lp_wrap_dim(lp_op_int(run->graph, op, 2, 0), (size_t)input->sizes[1]);
            if (column < source->ndim) {
                out->has_values = true;
                out->values = source->dims[column];
            }
        }
        LP_TRY(lp_set_output(run, op, i, dims, err));
    }
    return LP_OK;
}

lp_status lp_rule_reorder(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    lp_arg list = lp_op_arg(run->graph, op, op->detail);

    if (input == NULL || out == NULL || out->ndim != input->ndim)
        return lp_rule_unknown(run, op, err);
    if (list.count == 0)
        LP_TRY(lp_freeze_tensor(run, input, LP_REASON_ORDER, err));
    for (size_t i = 0; i < list.count; i++)
        LP_TRY(lp_axes_note(run->axes, input->dims[lp_wrap_dim(list.values[i], input->ndim)], LP_REASON_ORDER,
                            err));
    keep_values(input, out);
    return lp_set_output(run, op, 0, input->dims, err);
}

lp_status lp_rule_unfold(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};
    size_t dim;

    if (input == NULL || out == NULL || input->ndim == 0 || out->ndim != input->ndim + 1)
        return lp_rule_unknown(run, op, err);
    dim = lp_wrap_dim(lp_op_int(run->graph, op, 1, 0), input->ndim);
    copy_dims(input, dims);
    LP_TRY(lp_axes_note(run->axes, input->dims[dim], LP_REASON_SPATIAL, err));
    LP_TRY(lp_axes_fresh(run->axes, out->sizes[dim], &dims[dim], err));
    LP_TRY(lp_axes_note(run->axes, dims[dim], LP_REASON_SPATIAL, err));
    LP_TRY(lp_axes_fresh(run->axes, out->sizes[input->ndim], &dims[input->ndim], err));
    LP_TRY(lp_axes_note(run->axes, dims[input->ndim], LP_REASON_SPATIAL, err));
    return lp_set_output(run, op, 0, dims, err);
}

lp_status lp_rule_as_strided(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0), *out = lp_op_output(run->graph, op, 0);

    if (input == NULL || out == NULL)
        return lp_rule_unknown(run, op, err);
    return freeze_through(run, op, input, LP_REASON_MISALIGNED, err);
}

lp_status lp_rule_as_complex(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0);

    if (input == NULL || input->ndim == 0)
        return lp_rule_unknown(run, op, err);
    LP_TRY(lp_axes_note(run->axes, input->dims[input->ndim - 1], LP_REASON_COMPLEX, err));
    return lp_set_output(run, op, 0, input->dims, err);
}

lp_status lp_rule_as_real(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *input = lp_op_tensor(run->graph, op, 0);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};

    if (input == NULL || input->ndim + 1 > LP_MAX_DIMS)
        return lp_rule_unknown(run, op, err);
    copy_dims(input, dims);
    LP_TRY(lp_axes_fresh(run->axes, 2, &dims[input->ndim], err));
    LP_TRY(lp_axes_note(run->axes, dims[input->ndim], LP_REASON_COMPLEX, err));
    return lp_set_output(run, op, 0, dims, err);
}
