/* Contractions: the contracted dimensions unify, batch dimensions unify, free dimensions pass. */
#include "rules.h"

/* What a product of a and b makes of its contracted, free and batch dimensions. */
static lp_status note_roles(lp_run *run, const lp_tensor *a, const lp_tensor *b, lp_expr batch,
                            lp_expr contracted, lp_expr free_a, lp_expr free_b, lp_error *err)
{
    if (a->weight != b->weight) {
        LP_TRY(lp_axes_role(run->axes, contracted, LP_ROLE_LINEAR_IN, err));
        return lp_axes_role(run->axes, a->weight ? free_a : free_b, LP_ROLE_LINEAR_OUT, err);
    }
    if (a->weight)
        return LP_OK;
    LP_TRY(lp_axes_role(run->axes, batch, LP_ROLE_BATCH, err));
    LP_TRY(lp_axes_role(run->axes, contracted, LP_ROLE_CONTRACT, err));
    return lp_axes_role(run->axes, free_b, LP_ROLE_VALUE, err);
}

static lp_status count_macs(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_graph *graph = run->graph;
    void *block = graph->macs;
    LP_TRY(lp_grow(&graph->allocator, &block, &graph->macs_capacity, graph->macs_count + 1,
                   sizeof *graph->macs, err));
    graph->macs = block;
    graph->macs[graph->macs_count++] = op->index;
    return LP_OK;
}

static lp_status too_many(lp_error *err)
{
    return lp_error_set(err, LP_ERR_OVERFLOW, "an operation has more than 2^63 multiply-accumulates");
}

lp_status lp_op_macs(lp_graph *graph, const lp_op *op, int64_t *out, lp_error *err)
{
    const lp_tensor *result = lp_op_output(graph, op, 0), *left = lp_op_tensor(graph, op, 0), *right;
    int64_t count, inner = 1, size;

    if (op->rule == lp_rule_matmul)
        left = lp_op_tensor(graph, op, op->detail);
    LP_TRY(lp_tensor_numel(graph, result, &count, err));
    if (op->rule == lp_rule_attention) { /* scores: q against S keys; values: S terms for each result */
        int64_t queries;
        right = lp_op_tensor(graph, op, 1);
        LP_TRY(lp_tensor_numel(graph, left, &queries, err));
        LP_TRY(lp_axes_new_size(&graph->axes, right->dims[right->ndim - 2], graph->removed, &inner, err));
        if (!lp_add_i64(count, queries, &count))
            return too_many(err);
    } else if (op->rule == lp_rule_convolution) {
        right = lp_op_tensor(graph, op, 1);
        if (lp_op_int(graph, op, 6, 0) != 0) /* transposed: each input element meets the kernel */
            LP_TRY(lp_tensor_numel(graph, left, &count, err));
        for (size_t d = 1; d < right->ndim; d++) {
            LP_TRY(lp_axes_new_size(&graph->axes, right->dims[d], graph->removed, &size, err));
            if (!lp_mul_i64(inner, size, &inner))
                return too_many(err);
        }
    } else {
        LP_TRY(lp_axes_new_size(&graph->axes, left->dims[left->ndim - 1], graph->removed, &inner, err));
    }
    return lp_mul_i64(count, inner, out) ? LP_OK : too_many(err);
}

/* A contraction with its producer is the paper's backward dependency, one with another activation a coupling. */
static lp_rule contraction(const lp_tensor *a, const lp_tensor *b)
{
    return a->weight != b->weight ? LP_RULE_BACKWARD : LP_RULE_EQUAL;
}

/* mm, bmm, mv, dot, matmul, and with a leading summand addmm, baddbmm, addmv, addbmm. */
lp_status lp_rule_matmul(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *a = lp_op_tensor(run->graph, op, op->detail),
              *b = lp_op_tensor(run->graph, op, op->detail + 1u);
    lp_tensor *out = lp_op_output(run->graph, op, 0),
              *bias = op->detail == 1 ? lp_op_tensor(run->graph, op, 0) : NULL;
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}}, batch = LP_EMPTY, free_a, free_b, k_a, k_b;
    size_t na, nb, batches_a, batches_b, batches, at = 0;

    if (a == NULL || b == NULL || out == NULL || a->ndim == 0 || b->ndim == 0)
        return lp_rule_unknown(run, op, err);
    na = a->ndim;
    nb = b->ndim;
    batches_a = na > 2 ? na - 2u : 0;
    batches_b = nb > 2 ? nb - 2u : 0;
    batches = batches_a > batches_b ? batches_a : batches_b;
    for (size_t d = 0; d < batches; d++) {
        size_t back = batches - d;
        const lp_expr *da = back <= batches_a ? &a->dims[batches_a - back] : NULL;
        const lp_expr *db = back <= batches_b ? &b->dims[batches_b - back] : NULL;
        lp_expr dim = da != NULL && da->len > 0 ? *da : db != NULL ? *db : LP_EMPTY;
        if (da != NULL && db != NULL && da->len > 0 && db->len > 0)
            LP_TRY(lp_unify_dims(run, *da, *db, lp_rule_between(a, b), err));
        LP_TRY(lp_axes_concat(run->axes, batch, dim, &batch, err));
        if (at < out->ndim)
            dims[at++] = dim;
    }
    if (out->ndim < batches) /* addbmm sums over the batch */
        at = 0;
    free_a = na > 1 ? a->dims[na - 2] : LP_EMPTY;
    free_b = nb > 1 ? b->dims[nb - 1] : LP_EMPTY;
    k_a = a->dims[na - 1];
    k_b = nb > 1 ? b->dims[nb - 2] : b->dims[0];
    LP_TRY(lp_unify_dims(run, k_a, k_b, contraction(a, b), err));
    LP_TRY(note_roles(run, a, b, batch, k_a, free_a, free_b, err));
    if (na > 1 && at < out->ndim)
        dims[at++] = free_a;
    if (nb > 1 && at < out->ndim)
        dims[at++] = free_b;
    if (at != out->ndim)
        return lp_rule_unknown(run, op, err);
    if (bias != NULL)
        LP_TRY(lp_broadcast(run, bias, dims, out->sizes, out->ndim,
                            bias->weight ? LP_RULE_FORWARD : LP_RULE_EQUAL, err));
    LP_TRY(count_macs(run, op, err));
    return lp_set_output(run, op, 0, dims, err);
}

lp_status lp_rule_linear(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *x = lp_op_tensor(run->graph, op, 0), *w = lp_op_tensor(run->graph, op, 1);
    lp_tensor *bias = lp_op_tensor(run->graph, op, 2), *out = lp_op_output(run->graph, op, 0);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};
    size_t last;

    if (x == NULL || w == NULL || out == NULL || w->ndim != 2 || x->ndim == 0)
        return lp_rule_unknown(run, op, err);
    last = x->ndim - 1u;
    for (size_t d = 0; d < last; d++)
        dims[d] = x->dims[d];
    dims[last] = w->dims[0];
    LP_TRY(lp_unify_dims(run, x->dims[last], w->dims[1], contraction(x, w), err));
    LP_TRY(note_roles(run, x, w, LP_EMPTY, w->dims[1], LP_EMPTY, w->dims[0], err));
    if (bias != NULL)
        LP_TRY(lp_broadcast(run, bias, dims, out->sizes, out->ndim, LP_RULE_FORWARD, err));
    LP_TRY(count_macs(run, op, err));
    return lp_set_output(run, op, 0, dims, err);
}

/* (tokens, k) x (experts, k, n), the tokens grouped by expert: like bmm over the experts. */
lp_status lp_rule_grouped_mm(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *a = lp_op_tensor(run->graph, op, 0), *b = lp_op_tensor(run->graph, op, 1);
    lp_tensor *offsets = lp_op_tensor(run->graph, op, 2), *out = lp_op_output(run->graph, op, 0);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};

    if (a == NULL || b == NULL || out == NULL || a->ndim != 2 || b->ndim != 3 || out->ndim != 2)
        return lp_rule_unknown(run, op, err);
    LP_TRY(lp_unify_dims(run, a->dims[1], b->dims[1], contraction(a, b), err));
    if (offsets != NULL && offsets->ndim == 1)
        LP_TRY(lp_unify_dims(run, offsets->dims[0], b->dims[0], LP_RULE_EQUAL, err));
    LP_TRY(note_roles(run, a, b, LP_EMPTY, b->dims[1], LP_EMPTY, b->dims[2], err));
    LP_TRY(count_macs(run, op, err));
    dims[0] = a->dims[0];
    dims[1] = b->dims[2];
    return lp_set_output(run, op, 0, dims, err);
}

/* The query heads of one key-value head are an axis of their own: H = KV x G. */
static lp_status group_heads(lp_run *run, const lp_tensor *q, const lp_tensor *k, size_t dim, lp_error *err)
{
    int64_t sizes[2] = {k->sizes[dim], q->sizes[dim] / (k->sizes[dim] == 0 ? 1 : k->sizes[dim])};
    lp_expr pair[2];
    bool aligned = sizes[0] * sizes[1] == q->sizes[dim];

    if (q->sizes[dim] == k->sizes[dim])
        return lp_unify_dims(run, q->dims[dim], k->dims[dim], LP_RULE_EQUAL, err);
    if (aligned)
        LP_TRY(lp_axes_split(run->axes, q->dims[dim], sizes, 2, pair, &aligned, err));
    if (aligned)
        return lp_unify_dims(run, pair[0], k->dims[dim], LP_RULE_EQUAL, err);
    LP_TRY(lp_axes_note(run->axes, q->dims[dim], LP_REASON_MISALIGNED, err));
    return lp_axes_note(run->axes, k->dims[dim], LP_REASON_MISALIGNED, err);
}

/* scaled_dot_product_attention and its kernels: q (..., T, D), k (..., S, D), v (..., S, E), mask to (..., T, S). */
lp_status lp_rule_attention(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *q = lp_op_tensor(run->graph, op, 0), *k = lp_op_tensor(run->graph, op, 1);
    lp_tensor *v = lp_op_tensor(run->graph, op, 2), *out = lp_op_output(run->graph, op, 0);
    lp_tensor *mask = op->detail != 0 ? lp_op_tensor(run->graph, op, op->detail) : NULL;
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}}, scores[LP_MAX_DIMS] = {{0, 0}}, batch = LP_EMPTY;
    int64_t sizes[LP_MAX_DIMS];
    bool scaled = false, causal = false;
    size_t n, arguments = lp_op_arg_count(run->graph, op);

    if (q == NULL || k == NULL || v == NULL || out == NULL || q->ndim < 2 || k->ndim != q->ndim ||
        v->ndim != q->ndim)
        return lp_rule_unknown(run, op, err);
    n = q->ndim;
    for (size_t i = 3; i < arguments; i++) {
        /* dropout_p is argument 3 to 5 of every kernel, is_causal 4 to 6, the scale comes later */
        lp_arg arg = lp_op_arg(run->graph, op, i);
        scaled |= arg.tag == LP_ARG_FLOAT && i > 5;
        causal |= arg.tag == LP_ARG_BOOL && i > 3 && i < 7 && arg.values[0] != 0;
    }
    for (size_t d = 0; d + 2 < n; d++) {
        LP_TRY(group_heads(run, q, k, d, err));
        LP_TRY(lp_unify_dims(run, k->dims[d], v->dims[d], LP_RULE_EQUAL, err));
        LP_TRY(lp_axes_concat(run->axes, batch, q->dims[d], &batch, err));
        dims[d] = scores[d] = q->dims[d];
        sizes[d] = q->sizes[d];
    }
    LP_TRY(lp_unify_dims(run, q->dims[n - 1], k->dims[n - 1], LP_RULE_EQUAL, err));
    LP_TRY(lp_unify_dims(run, k->dims[n - 2], v->dims[n - 2], LP_RULE_EQUAL, err));
    if (!scaled)
        LP_TRY(lp_axes_note(run->axes, q->dims[n - 1], LP_REASON_SCALE, err));
    if (causal)
        LP_TRY(lp_axes_note(run->axes, k->dims[n - 2], LP_REASON_ORDER, err));
    LP_TRY(lp_mark_dim(run, op, k, n - 2, LP_MARK_SOFTMAX, err));
    LP_TRY(lp_axes_role(run->axes, batch, LP_ROLE_BATCH, err));
    LP_TRY(lp_axes_role(run->axes, q->dims[n - 1], LP_ROLE_CONTRACT, err));
    LP_TRY(lp_axes_role(run->axes, v->dims[n - 1], LP_ROLE_VALUE, err));
    LP_TRY(count_macs(run, op, err));
    scores[n - 2] = q->dims[n - 2];
    scores[n - 1] = k->dims[n - 2];
    sizes[n - 2] = q->sizes[n - 2];
    sizes[n - 1] = k->sizes[n - 2];
    if (mask != NULL)
        LP_TRY(lp_broadcast(run, mask, scores, sizes, n, LP_RULE_EQUAL, err));
    dims[n - 2] = q->dims[n - 2];
    dims[n - 1] = v->dims[n - 1];
    LP_TRY(lp_set_output(run, op, 0, dims, err));
    for (size_t i = 1; i < op->output_count; i++)
        LP_TRY(
            lp_set_fresh(run, op, i, LP_REASON_OUTPUT, err)); /* logsumexp and seeds, for the backward pass */
    return LP_OK;
}

/* input (N, C, *), weight (O, C / groups, *) or transposed (C, O / groups, *), bias (O). */
lp_status lp_rule_convolution(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *x = lp_op_tensor(run->graph, op, 0), *w = lp_op_tensor(run->graph, op, 1);
    lp_tensor *bias = lp_op_tensor(run->graph, op, 2), *out = lp_op_output(run->graph, op, 0);
    bool transposed = lp_op_int(run->graph, op, 6, 0) != 0, aligned = true;
    int64_t groups = lp_op_int(run->graph, op, 8, 1);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}}, channels[2], features[2], made;

    if (x == NULL || w == NULL || out == NULL || x->ndim < 3 || w->ndim != x->ndim || groups < 1)
        return lp_rule_unknown(run, op, err);
    dims[0] = x->dims[0];
    for (size_t d = 2; d < x->ndim; d++) {
        LP_TRY(lp_axes_note(run->axes, w->dims[d], LP_REASON_SPATIAL, err));
        LP_TRY(lp_axes_note(run->axes, x->dims[d], LP_REASON_SPATIAL, err));
        LP_TRY(lp_axes_fresh(run->axes, out->sizes[d], &dims[d], err));
        LP_TRY(lp_axes_note(run->axes, dims[d], LP_REASON_SPATIAL, err));
    }
    if (groups == 1) {
        LP_TRY(lp_unify_dims(run, x->dims[1], w->dims[transposed ? 0 : 1], contraction(x, w), err));
        made = w->dims[transposed ? 1 : 0];
    } else {
        int64_t split_x[2] = {groups, x->sizes[1] / groups}, split_o[2] = {groups, out->sizes[1] / groups};
        lp_expr outer = w->dims[0];
        LP_TRY(lp_axes_split(run->axes, x->dims[1], split_x, 2, channels, &aligned, err));
        if (aligned)
            LP_TRY(
                lp_axes_split(run->axes, outer, transposed ? split_x : split_o, 2, features, &aligned, err));
        if (!aligned)
            return lp_rule_unknown(run, op, err);
        LP_TRY(lp_unify_dims(run, channels[0], features[0], LP_RULE_FORWARD, err));
        if (transposed) {
            LP_TRY(lp_unify_dims(run, channels[1], features[1], contraction(x, w), err));
            LP_TRY(lp_axes_concat(run->axes, features[0], w->dims[1], &made, err));
        } else {
            LP_TRY(lp_unify_dims(run, channels[1], w->dims[1], contraction(x, w), err));
            made = outer;
        }
    }
    dims[1] = made;
    LP_TRY(lp_axes_role(run->axes, x->dims[1], LP_ROLE_CONVOLVED | LP_ROLE_LINEAR_IN, err));
    LP_TRY(lp_axes_role(run->axes, made, LP_ROLE_CONVOLVED | LP_ROLE_LINEAR_OUT, err));
    if (bias != NULL)
        LP_TRY(lp_unify_dims(run, made, bias->dims[0], LP_RULE_FORWARD, err));
    LP_TRY(count_macs(run, op, err));
    return lp_set_output(run, op, 0, dims, err);
}

/* solve_triangular(A (*, n, n), B (*, n, k)): batch and right-hand columns pass, the system's order does not. */
lp_status lp_rule_triangular(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_tensor *a = lp_op_tensor(run->graph, op, 0), *b = lp_op_tensor(run->graph, op, 1);
    lp_tensor *out = lp_op_output(run->graph, op, 0);
    size_t n;

    if (a == NULL || b == NULL || out == NULL || a->ndim < 2 || b->ndim != a->ndim || out->ndim != b->ndim)
        return lp_rule_unknown(run, op, err);
    n = a->ndim;
    for (size_t d = 0; d + 2 < n; d++)
        if (a->sizes[d] != 1 && b->sizes[d] != 1)
            LP_TRY(lp_unify_dims(run, a->dims[d], b->dims[d], LP_RULE_EQUAL, err));
    LP_TRY(lp_axes_note(run->axes, a->dims[n - 1], LP_REASON_ORDER, err));
    LP_TRY(lp_axes_note(run->axes, a->dims[n - 2], LP_REASON_ORDER, err));
    LP_TRY(lp_axes_note(run->axes, b->dims[n - 2], LP_REASON_ORDER, err));
    {
        lp_expr dims[LP_MAX_DIMS] = {{0, 0}};
        for (size_t d = 0; d < n; d++)
            dims[d] = d + 2 < n && b->sizes[d] == 1 ? a->dims[d] : b->dims[d];
        return lp_set_output(run, op, 0, dims, err);
    }
}
