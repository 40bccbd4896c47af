/* Does a value vanish where the weights do?
 *
 * A removed index is compared with a model whose weights are zero there.  The two agree when whatever is summed over the
 * axis is zero at that index: then leaving the summand out changes nothing.  Mostly it is, since a weight is a factor of
 * it.  But sigmoid(0) is not zero, nor is a value that expand copied along the axis; where two such values are multiplied
 * and summed over it, removal changes the result, and nobody asked for that.  So each tensor's axes are followed through
 * the tape with one bit: is the tensor zero at an index where every parameter is?  Axes over which something is summed
 * that is not freeze (LP_REASON_REMAINS); where its mean is taken they are marked once more (LP_MARK_REMAINS), since no
 * factor then makes good for what is missing.  A masked normalisation counts as zero: that is what its mark promises. */
#include "rules.h"

#include <string.h>

enum {
    NEVER = 0,
    ALWAYS,
    FIRST,  /* as the first tensor */
    SECOND, /* as the second tensor */
    CARRY,  /* as every tensor that has the axis */
    ALL,    /* as every tensor, those without the axis included */
    FACTOR, /* as any tensor */
    TERM,   /* as all tensors together, with no scalar added */
    POWER,  /* as the base, where the exponent is positive */
    CLAMP,  /* as the first tensor, where zero is within the bounds */
    FILL,   /* as the first tensor, where it is filled with zero */
    PAD,    /* as CARRY, where it is padded with zero */
    ADDMUL, /* as the first tensor and one of the factors */
    ADDDIV  /* as the first tensor and the dividend */
};

typedef struct {
    const char *name;
    uint8_t how;
} named;

/* f(0) = 0, or the operands' way of meeting.  Other element-wise operations do not vanish. */
static const named pointwise[] = {
    {"abs", FIRST},          {"add", TERM},
    {"angle", FIRST},        {"arcsin", FIRST},
    {"arctan", FIRST},       {"arcsinh", FIRST},
    {"arctanh", FIRST},      {"asin", FIRST},
    {"asinh", FIRST},        {"atan", FIRST},
    {"atanh", FIRST},        {"celu", FIRST},
    {"ceil", FIRST},         {"clamp", CLAMP},
    {"copy", SECOND},        {"div", FIRST},
    {"elu", FIRST},          {"erf", FIRST},
    {"expm1", FIRST},        {"floor", FIRST},
    {"floor_divide", FIRST}, {"fmod", FIRST},
    {"frac", FIRST},         {"gelu", FIRST},
    {"hardshrink", FIRST},   {"hardswish", FIRST},
    {"hardtanh", CLAMP},     {"leaky_relu", FIRST},
    {"lerp", TERM},          {"log1p", FIRST},
    {"masked_fill", FILL},   {"mish", FIRST},
    {"mul", FACTOR},         {"nan_to_num", FIRST},
    {"neg", FIRST},          {"polar", FIRST},
    {"positive", FIRST},     {"pow", POWER},
    {"prelu", FIRST},        {"relu", FIRST},
    {"relu6", FIRST},        {"remainder", FIRST},
    {"round", FIRST},        {"rsub", TERM},
    {"selu", FIRST},         {"sgn", FIRST},
    {"sign", FIRST},         {"silu", FIRST},
    {"sin", FIRST},          {"sinh", FIRST},
    {"softshrink", FIRST},   {"softsign", FIRST},
    {"sqrt", FIRST},         {"square", FIRST},
    {"sub", TERM},           {"tan", FIRST},
    {"tanh", FIRST},         {"tanhshrink", FIRST},
    {"true_divide", FIRST},  {"trunc", FIRST},
    {"where", ALL},          {"_prelu_kernel", FIRST},
    {"addcmul", ADDMUL},     {"addcdiv", ADDDIV},
    {"zeros", ALWAYS},       {"zeros_like", ALWAYS},
    {"zero", ALWAYS},        {"new_zeros", ALWAYS},
    {"empty", ALWAYS},       {"empty_like", ALWAYS},
    {"new_empty", ALWAYS},
};

uint8_t lp_vanish_find(const char *name, lp_rule_fn rule, uint8_t detail)
{
    for (size_t i = 0; i < sizeof pointwise / sizeof pointwise[0]; i++)
        if (strcmp(name, pointwise[i].name) == 0)
            return pointwise[i].how;
    if (rule == lp_rule_keep)
        return detail == LP_KEEP_ALL ? CARRY : NEVER;
    if (rule == lp_rule_index || rule == lp_rule_index_select || rule == lp_rule_gather ||
        rule == lp_rule_embedding || rule == lp_rule_topk || rule == lp_rule_sort)
        return FIRST;
    if (rule == lp_rule_triangular)
        return SECOND;
    if (rule == lp_rule_weight_norm)
        return FACTOR;
    if (rule == lp_rule_pad)
        return PAD;
    if (rule == lp_rule_view || rule == lp_rule_squeeze || rule == lp_rule_permute ||
        rule == lp_rule_expand || rule == lp_rule_repeat || rule == lp_rule_cat || rule == lp_rule_stack ||
        rule == lp_rule_slice || rule == lp_rule_pieces || rule == lp_rule_select ||
        rule == lp_rule_reorder || rule == lp_rule_unfold || rule == lp_rule_as_strided ||
        rule == lp_rule_as_complex || rule == lp_rule_as_real || rule == lp_rule_scatter ||
        rule == lp_rule_index_add || rule == lp_rule_index_put || rule == lp_rule_masked_scatter ||
        rule == lp_rule_scan || rule == lp_rule_triangle || rule == lp_rule_glu || rule == lp_rule_pool ||
        rule == lp_rule_extreme)
        return CARRY;
    return NEVER;
}

/* One axis of a tensor and whether the tensor vanishes with it. */
typedef struct {
    lp_atom leaf;
    bool zero;
} entry;

typedef struct {
    size_t first, count;
} span;

typedef struct {
    lp_graph *graph;
    entry *entries;
    size_t count, capacity;
    span *spans; /* by tensor */
    size_t span_capacity;
} vanish;

static const entry *find(const vanish *v, const lp_tensor *tensor, lp_atom leaf)
{
    if (tensor != NULL) {
        span at = v->spans[lp_tensor_id(v->graph, tensor)];
        for (size_t i = 0; i < at.count; i++)
            if (v->entries[at.first + i].leaf == leaf)
                return &v->entries[at.first + i];
    }
    return NULL;
}

static bool zero(const vanish *v, const lp_tensor *tensor, lp_atom leaf)
{
    const entry *found = find(v, tensor, leaf);
    return found != NULL && found->zero;
}

/* Every floating point tensor among the arguments, in turn: NULL after the last. */
static lp_tensor *each_operand(const vanish *v, const lp_op *op, size_t *argument, size_t *item)
{
    size_t arguments = lp_op_arg_count(v->graph, op);

    for (; *argument < arguments; (*argument)++, *item = 0) {
        lp_arg arg = lp_op_arg(v->graph, op, *argument);
        if (arg.tag != LP_ARG_TENSOR && arg.tag != LP_ARG_TENSORS)
            continue;
        while (*item < arg.count) {
            int64_t id = arg.values[(*item)++];
            if (id >= 0 && !v->graph->tensors[id].integral)
                return &v->graph->tensors[id];
        }
    }
    return NULL;
}

/* Whether an argument is a number or absent: not a tensor, whose values nobody knows. */
static bool plain(const vanish *v, const lp_op *op, size_t argument)
{
    uint8_t tag = (uint8_t)lp_op_arg(v->graph, op, argument).tag;
    return tag == LP_ARG_NONE || tag == LP_ARG_INT || tag == LP_ARG_FLOAT || tag == LP_ARG_BOOL;
}

/* The sign of a number among the arguments (a double's bits have it where an integer has), 0 where there is none. */
static int sign(const vanish *v, const lp_op *op, size_t argument)
{
    lp_arg arg = lp_op_arg(v->graph, op, argument);
    if (arg.tag != LP_ARG_INT && arg.tag != LP_ARG_FLOAT)
        return 0;
    return (arg.values[0] > 0) - (arg.values[0] < 0);
}

static bool combined(const vanish *v, const lp_op *op, lp_atom leaf)
{
    size_t argument = 0, item = 0, operands = 0, having = 0, zeros = 0, first = 0;
    lp_tensor *operand;

    while ((operand = each_operand(v, op, &argument, &item)) != NULL) {
        const entry *found = find(v, operand, leaf);
        having += found != NULL;
        zeros += found != NULL && found->zero;
        if (operands++ < 2 && found != NULL && found->zero)
            first |= operands; /* bit 0: the first operand, bit 1: the second */
    }
    /* of an operation declared from outside only the axes are known: it is trusted to vanish with an operand */
    switch (op->rule == lp_rule_declared ? FACTOR : op->vanish) {
    case ALWAYS:
        return true;
    case FIRST:
        return (first & 1u) != 0;
    case SECOND:
        return (first & 2u) != 0;
    case CARRY:
        return having > 0 && zeros == having;
    case ALL:
        return operands > 0 && zeros == operands;
    case FACTOR:
        return zeros > 0;
    case TERM:
        return operands > 0 && zeros == operands && sign(v, op, 1) == 0;
    case POWER:
        return (first & 1u) != 0 && lp_op_tensor(v->graph, op, 0) != NULL && sign(v, op, 1) > 0;
    case CLAMP:
        return (first & 1u) != 0 && plain(v, op, 1) && plain(v, op, 2) && sign(v, op, 1) <= 0 &&
               sign(v, op, 2) >= 0;
    case FILL:
        return (first & 1u) != 0 && plain(v, op, 2) && sign(v, op, 2) == 0;
    case PAD:
        return having > 0 && zeros == having && sign(v, op, 2) == 0;
    case ADDMUL:
        return (first & 1u) != 0 &&
               (zero(v, lp_op_tensor(v->graph, op, 1), leaf) || zero(v, lp_op_tensor(v->graph, op, 2), leaf));
    case ADDDIV:
        return (first & 1u) != 0 && zero(v, lp_op_tensor(v->graph, op, 1), leaf);
    default:
        return false;
    }
}

static bool normalised(const vanish *v, const lp_tensor *input, const lp_tensor *weight,
                       const lp_tensor *bias, lp_atom leaf)
{
    if (find(v, weight, leaf) != NULL)
        return zero(v, weight, leaf) && (bias == NULL || zero(v, bias, leaf));
    return zero(v, input, leaf) && bias == NULL;
}

static lp_status has_leaf(vanish *v, lp_expr dim, lp_atom leaf, bool *has, lp_error *err)
{
    lp_expr leaves;
    *has = false;
    LP_TRY(lp_axes_leaves(&v->graph->axes, dim, &leaves, err));
    for (uint32_t i = 0; i < leaves.len; i++)
        *has = *has || v->graph->axes.factors[leaves.off + i] == leaf;
    return LP_OK;
}

/* Is output `out` zero at an index of `leaf` where all weights are? */
static lp_status vanishes(vanish *v, const lp_op *op, lp_atom leaf, bool *out, lp_error *err)
{
    lp_tensor *a = lp_op_tensor(v->graph, op, 0), *b = lp_op_tensor(v->graph, op, 1),
              *c = lp_op_tensor(v->graph, op, 2);
    bool native = op->rule == lp_rule_group_norm && op->detail == 1;

    if (op->rule == lp_rule_matmul && op->detail == 1)
        *out = (zero(v, b, leaf) || zero(v, c, leaf)) && zero(v, a, leaf);
    else if (op->rule == lp_rule_matmul || op->rule == lp_rule_grouped_mm)
        *out = zero(v, a, leaf) || zero(v, b, leaf);
    else if (op->rule == lp_rule_linear || op->rule == lp_rule_convolution)
        *out = (zero(v, a, leaf) || zero(v, b, leaf)) && (c == NULL || zero(v, c, leaf));
    else if (op->rule == lp_rule_attention)
        *out = zero(v, c, leaf);
    else if (op->rule == lp_rule_layer_norm)
        *out = normalised(v, a, c, lp_op_tensor(v->graph, op, 3), leaf);
    else if (op->rule == lp_rule_group_norm)
        *out = normalised(v, a, native ? b : c, native ? c : lp_op_tensor(v->graph, op, 3), leaf);
    else if (op->rule == lp_rule_batch_norm)
        *out = zero(v, b, leaf) && (c == NULL || zero(v, c, leaf));
    else if (op->rule == lp_rule_reduce)
        *out = (op->detail & 15u) != LP_REDUCE_SOFT && zero(v, a, leaf);
    else if (op->rule == lp_rule_softmax && a != NULL && a->ndim > 0) {
        size_t dim = lp_wrap_dim(lp_op_int(v->graph, op, 1, -1), a->ndim);
        return has_leaf(v, a->dims[dim], leaf, out, err);
    } else
        *out = combined(v, op, leaf);
    return LP_OK;
}

/* The leaves of every dimension of a tensor; op NULL: a parameter vanishes, whatever else comes from outside does not. */
static lp_status describe(vanish *v, lp_tensor *tensor, const lp_op *op, lp_error *err)
{
    span made = {v->count, 0};
    void *block = v->entries;

    for (size_t d = 0; d < tensor->ndim && tensor->known; d++) {
        size_t arena = v->graph->axes.factor_count;
        lp_expr leaves;
        LP_TRY(lp_axes_leaves(&v->graph->axes, tensor->dims[d], &leaves, err));
        for (uint32_t i = 0; i < leaves.len; i++) {
            entry one = {v->graph->axes.factors[leaves.off + i], tensor->role == LP_TENSOR_PARAMETER};
            if (op != NULL)
                LP_TRY(vanishes(v, op, one.leaf, &one.zero, err));
            LP_TRY(lp_grow(&v->graph->allocator, &block, &v->capacity, v->count + 1, sizeof one, err));
            v->entries = block;
            v->entries[v->count++] = one;
            made.count++;
        }
        v->graph->axes.factor_count = arena;
    }
    v->spans[lp_tensor_id(v->graph, tensor)] = made;
    return LP_OK;
}

/* A dimension that a and b (or a alone, when NULL) are summed over, or that a mean is taken over: what it then has. */
static lp_status summed(vanish *v, lp_expr dim, const lp_tensor *a, const lp_tensor *b, lp_reason reason,
                        lp_error *err)
{
    lp_axes *axes = &v->graph->axes;
    size_t arena = axes->factor_count;
    lp_expr leaves;

    LP_TRY(lp_axes_leaves(axes, dim, &leaves, err));
    for (uint32_t i = 0; i < leaves.len; i++) {
        lp_atom leaf = axes->factors[leaves.off + i];
        if ((axes->atoms[leaf].flags & LP_FROZEN) == 0 && !zero(v, a, leaf) && !zero(v, b, leaf))
            LP_TRY(lp_axes_note_atom(axes, leaf, reason, err));
    }
    axes->factor_count = arena;
    return LP_OK;
}

static lp_status check_sums(vanish *v, const lp_op *op, lp_error *err)
{
    lp_tensor *a = lp_op_tensor(v->graph, op, op->rule == lp_rule_matmul ? op->detail : 0);
    lp_tensor *b = lp_op_tensor(v->graph, op, op->rule == lp_rule_matmul ? op->detail + 1u : 1);

    if (a == NULL || a->ndim == 0)
        return LP_OK;
    if (op->rule == lp_rule_layer_norm) {
        lp_arg shape = lp_op_arg(v->graph, op, 1);
        for (size_t i = 0; shape.tag == LP_ARG_INTS && i < shape.count && i < a->ndim; i++)
            LP_TRY(summed(v, a->dims[a->ndim - 1 - i], a, NULL, LP_MARK_REMAINS, err));
        return LP_OK;
    }
    if (op->rule == lp_rule_reduce && !a->integral &&
        ((op->detail & 15u) == LP_REDUCE_SUM || (op->detail & 15u) == LP_REDUCE_MEAN)) {
        lp_reason reason = (op->detail & 15u) == LP_REDUCE_SUM ? LP_REASON_REMAINS : LP_MARK_REMAINS;
        lp_arg which = lp_op_arg(v->graph, op, op->detail >> 4);
        bool all = (which.tag != LP_ARG_INT && which.tag != LP_ARG_INTS) || which.count == 0;
        for (size_t i = 0; i < (all ? a->ndim : which.count); i++)
            LP_TRY(summed(v, a->dims[all ? i : lp_wrap_dim(which.values[i], a->ndim)], a, NULL, reason, err));
    } else if (op->rule == lp_rule_matmul || op->rule == lp_rule_linear || op->rule == lp_rule_grouped_mm ||
               op->rule == lp_rule_attention) {
        LP_TRY(summed(v, a->dims[a->ndim - 1], a, b, LP_REASON_REMAINS, err));
    } else if (op->rule == lp_rule_convolution && b != NULL && b->ndim > 1) {
        bool transposed = lp_op_int(v->graph, op, 6, 0) != 0;
        LP_TRY(summed(v, transposed && lp_op_int(v->graph, op, 8, 1) == 1 ? b->dims[0] : b->dims[1], a, b,
                      LP_REASON_REMAINS, err));
    }
    return LP_OK;
}

lp_status lp_graph_find_remains(lp_graph *graph, lp_error *err)
{
    vanish v = {.graph = graph};
    void *block = NULL;
    lp_status status =
        lp_grow(&graph->allocator, &block, &v.span_capacity, graph->tensor_count + 1, sizeof(span), err);

    if (status != LP_OK)
        return status;
    v.spans = block;
    memset(v.spans, 0, v.span_capacity * sizeof(span));
    for (size_t t = 0; t < graph->tensor_count && status == LP_OK; t++)
        if (graph->tensors[t].role != LP_TENSOR_VALUE)
            status = describe(&v, &graph->tensors[t], NULL, err);
    for (size_t i = 0; i < graph->op_count && status == LP_OK; i++) {
        const lp_op *op = &graph->ops[i];
        graph->axes.op = op->index;
        if (op->live)
            status = check_sums(&v, op, err);
        for (size_t o = 0; o < op->output_count && status == LP_OK; o++) {
            lp_tensor *out = lp_op_output(graph, op, o);
            if (out != NULL)
                status = describe(&v, out, op, err);
        }
    }
    graph->axes.op = LP_NO_OP;
    lp_release(&graph->allocator, v.entries, v.capacity, sizeof(entry));
    lp_release(&graph->allocator, v.spans, v.span_capacity, sizeof(span));
    return status;
}
