#include "rules.h"

#include <string.h>

lp_status lp_graph_new(lp_graph **out, lp_allocator allocator, lp_error *err)
{
    lp_graph *graph = allocator.resize(allocator.ctx, NULL, 0, sizeof *graph);

    if (graph == NULL)
        return lp_error_set(err, LP_ERR_NOMEM, "out of memory: %zu bytes for the graph were refused",
                            sizeof *graph);
    memset(graph, 0, sizeof *graph);
    graph->allocator = allocator;
    lp_axes_init(&graph->axes, allocator);
    *out = graph;
    return LP_OK;
}

void lp_graph_free(lp_graph *graph)
{
    lp_allocator allocator;

    if (graph == NULL)
        return;
    allocator = graph->allocator;
    lp_axes_free(&graph->axes);
    lp_occurrences_free(&allocator, &graph->occurrences);
    lp_release(&allocator, graph->tensors, graph->tensor_capacity, sizeof *graph->tensors);
    lp_release(&allocator, graph->ops, graph->op_capacity, sizeof *graph->ops);
    lp_release(&allocator, graph->code, graph->code_capacity, sizeof *graph->code);
    lp_release(&allocator, graph->output_ids, graph->output_id_capacity, sizeof *graph->output_ids);
    lp_release(&allocator, graph->results, graph->result_capacity, sizeof *graph->results);
    lp_release(&allocator, graph->unknown, graph->unknown_capacity, sizeof *graph->unknown);
    lp_release(&allocator, graph->adopted, graph->adopted_capacity, sizeof *graph->adopted);
    lp_release(&allocator, graph->marked, graph->marked_capacity, sizeof *graph->marked);
    lp_release(&allocator, graph->macs, graph->macs_capacity, sizeof *graph->macs);
    lp_release(&allocator, graph->atom_dims, graph->atom_dim_capacity, sizeof *graph->atom_dims);
    lp_release(&allocator, graph->list, graph->axis_capacity, sizeof *graph->list);
    lp_release(&allocator, graph->members, graph->member_capacity, sizeof *graph->members);
    lp_release(&allocator, graph->axis_of, graph->axis_of_capacity, sizeof *graph->axis_of);
    lp_release(&allocator, graph->removed, graph->removed_capacity, sizeof *graph->removed);
    allocator.resize(allocator.ctx, graph, sizeof *graph, 0);
}

const lp_allocator *lp_graph_allocator(const lp_graph *graph)
{
    return &graph->allocator;
}

lp_status lp_graph_add_tensor(lp_graph *graph, const int64_t *sizes, size_t ndim, lp_tensor_role role,
                              bool integral, uint64_t storage, lp_error *err)
{
    void *block = graph->tensors;
    int64_t elements = 1;
    lp_tensor *tensor;

    if (ndim > LP_MAX_DIMS)
        return lp_error_set(err, LP_ERR_UNSUPPORTED,
                            "tensor %zu has %zu dimensions; at most %d are supported", graph->tensor_count,
                            ndim, LP_MAX_DIMS);
    if (graph->tensor_count >= LP_NO_OP / LP_MAX_DIMS)
        return lp_error_set(err, LP_ERR_OVERFLOW, "the tape has too many tensors");
    LP_TRY(lp_grow(&graph->allocator, &block, &graph->tensor_capacity, graph->tensor_count + 1,
                   sizeof *tensor, err));
    graph->tensors = block;
    tensor = &graph->tensors[graph->tensor_count];
    memset(tensor, 0, sizeof *tensor);
    for (size_t d = 0; d < ndim; d++) {
        if (sizes[d] < 0)
            return lp_error_set(err, LP_ERR_TRACE, "tensor %zu has size %lld in dimension %zu",
                                graph->tensor_count, (long long)sizes[d], d);
        if (!lp_mul_i64(elements, sizes[d] > 0 ? sizes[d] : 1, &elements))
            return lp_error_set(err, LP_ERR_OVERFLOW, "tensor %zu has more than 2^63 elements",
                                graph->tensor_count);
        tensor->sizes[d] = sizes[d];
    }
    tensor->ndim = (uint8_t)ndim;
    tensor->role = (uint8_t)role;
    tensor->integral = integral;
    tensor->storage = storage;
    tensor->values_of = LP_NO_OP;
    tensor->weight = role == LP_TENSOR_PARAMETER || role == LP_TENSOR_BUFFER;
    graph->tensor_count++;
    return LP_OK;
}

static lp_status check_tensor(const lp_graph *graph, int64_t id, const char *name, lp_error *err)
{
    if (id >= -1 && (id == -1 || (uint64_t)id < graph->tensor_count))
        return LP_OK;
    return lp_error_set(err, LP_ERR_TRACE, "operation %zu (%s) names tensor %lld, which is not on the tape",
                        graph->op_count, name, (long long)id);
}

/* Walk the encoding once, so that no rule meets a truncated argument. */
static lp_status check_code(const lp_graph *graph, const char *name, const int64_t *code, size_t length,
                            lp_error *err)
{
    size_t at = 0;

    while (at < length) {
        int64_t tag = code[at++], count = 1;
        if (tag < LP_ARG_NONE || tag > LP_ARG_BOOLS)
            break;
        if (tag == LP_ARG_NONE || tag == LP_ARG_OTHER)
            continue;
        if (tag == LP_ARG_TENSORS || tag == LP_ARG_INTS || tag == LP_ARG_BOOLS) {
            if (at >= length)
                break;
            count = code[at++];
        }
        if (count < 0 || (uint64_t)count > length - at)
            break;
        for (int64_t i = 0; i < count; i++)
            if (tag == LP_ARG_TENSOR || tag == LP_ARG_TENSORS)
                LP_TRY(check_tensor(graph, code[at + (size_t)i], name, err));
        at += (size_t)count;
        if (at == length)
            return LP_OK;
    }
    if (at == length && (length == 0 || code[length - 1] == LP_ARG_NONE || code[length - 1] == LP_ARG_OTHER))
        return LP_OK;
    return lp_error_set(err, LP_ERR_TRACE, "operation %zu (%s) has malformed arguments", graph->op_count,
                        name);
}

static lp_status append_ints(lp_graph *graph, int64_t **list, size_t *count, size_t *capacity,
                             const int64_t *values, size_t n, lp_error *err)
{
    void *block = *list;
    size_t need;

    if (!lp_add_size(*count, n, &need) || need > UINT32_MAX)
        return lp_error_set(err, LP_ERR_OVERFLOW, "the tape has too many arguments");
    LP_TRY(lp_grow(&graph->allocator, &block, capacity, need, sizeof **list, err));
    *list = block;
    if (n > 0)
        memcpy(*list + *count, values, n * sizeof **list);
    *count = need;
    return LP_OK;
}

static lp_status append_index(lp_graph *graph, uint32_t **list, size_t *count, size_t *capacity,
                              uint32_t value, lp_error *err)
{
    void *block = *list;
    LP_TRY(lp_grow(&graph->allocator, &block, capacity, *count + 1, sizeof **list, err));
    *list = block;
    (*list)[(*count)++] = value;
    return LP_OK;
}

lp_status lp_graph_append_code(lp_graph *graph, const int64_t *code, size_t length, lp_error *err)
{
    return append_ints(graph, &graph->code, &graph->code_count, &graph->code_capacity, code, length, err);
}

/* ATen's in-place twin of an operation ends in an underscore; `_` alone begins private names and stays. */
static lp_status find_rule(const char *name, lp_op *op, lp_error *err)
{
    char base[96];
    size_t length;

    if (strncmp(name, "aten::", 6) == 0)
        name += 6;
    length = strlen(name);
    if (length == 0 || length >= sizeof base)
        return lp_error_set(err, LP_ERR_TRACE,
                            "an operation's name has %zu characters; 1 to %zu are expected", length,
                            sizeof base - 1);
    memcpy(base, name, length + 1);
    if (length > 1 && base[length - 1] == '_')
        base[length - 1] = '\0';
    op->rule = NULL;
    op->detail = 0;
    if (!lp_rule_find(base, &op->rule, &op->detail) && (op->flags & LP_OP_POINTWISE) != 0)
        op->rule = lp_rule_pointwise;
    op->vanish = lp_vanish_find(base, op->rule, op->detail);
    return LP_OK;
}

bool lp_graph_knows(const char *name)
{
    lp_op op = {0};
    return find_rule(name, &op, NULL) == LP_OK && op.rule != NULL;
}

lp_status lp_graph_add_op(lp_graph *graph, const char *name, uint32_t flags, const int64_t *code,
                          size_t code_length, const int64_t *outputs, size_t output_count, lp_error *err)
{
    lp_op op = {.code = (uint32_t)graph->code_count,
                .code_length = (uint32_t)code_length,
                .outputs = (uint32_t)graph->output_id_count,
                .output_count = (uint32_t)output_count,
                .flags = flags,
                .index = (uint32_t)graph->op_count};
    void *block = graph->ops;

    LP_TRY(find_rule(name, &op, err));
    LP_TRY(check_code(graph, name, code, code_length, err));
    for (size_t i = 0; i < output_count; i++)
        LP_TRY(check_tensor(graph, outputs[i], name, err));
    LP_TRY(lp_grow(&graph->allocator, &block, &graph->op_capacity, graph->op_count + 1, sizeof op, err));
    graph->ops = block;
    LP_TRY(
        append_ints(graph, &graph->code, &graph->code_count, &graph->code_capacity, code, code_length, err));
    LP_TRY(append_ints(graph, &graph->output_ids, &graph->output_id_count, &graph->output_id_capacity,
                       outputs, output_count, err));
    graph->ops[graph->op_count++] = op;
    return LP_OK;
}

lp_status lp_graph_set_outputs(lp_graph *graph, const int64_t *tensors, size_t count, lp_error *err)
{
    for (size_t i = 0; i < count; i++)
        if (tensors[i] < 0 || (uint64_t)tensors[i] >= graph->tensor_count)
            return lp_error_set(err, LP_ERR_TRACE,
                                "the model's output %zu is tensor %lld, which is not on the tape", i,
                                (long long)tensors[i]);
    return append_ints(graph, &graph->results, &graph->result_count, &graph->result_capacity, tensors, count,
                       err);
}

/* ---- arguments ---------------------------------------------------------------------------------------------------- */

static size_t arg_width(const int64_t *code, lp_arg *arg)
{
    arg->tag = code[0];
    arg->values = code + 1;
    switch (arg->tag) {
    case LP_ARG_NONE:
    case LP_ARG_OTHER:
        arg->count = 0;
        return 1;
    case LP_ARG_TENSORS:
    case LP_ARG_INTS:
    case LP_ARG_BOOLS:
        arg->count = (size_t)code[1];
        arg->values = code + 2;
        return 2 + arg->count;
    default:
        arg->count = 1;
        return 2;
    }
}

/* The arguments' code.  Where no operation has any there is no list either, and a null pointer takes no offset. */
static const int64_t *code_of(const lp_graph *graph, const lp_op *op, const int64_t **end)
{
    const int64_t *code = op->code_length > 0 ? graph->code + op->code : NULL;

    *end = op->code_length > 0 ? code + op->code_length : NULL;
    return code;
}

lp_arg lp_op_arg(const lp_graph *graph, const lp_op *op, size_t i)
{
    const int64_t *end, *code = code_of(graph, op, &end);
    lp_arg arg = {LP_ARG_NONE, NULL, 0};

    while (code < end) {
        size_t width = arg_width(code, &arg);
        if (i-- == 0)
            return arg;
        code += width;
    }
    return (lp_arg){LP_ARG_NONE, NULL, 0};
}

size_t lp_op_arg_count(const lp_graph *graph, const lp_op *op)
{
    const int64_t *end, *code = code_of(graph, op, &end);
    size_t count = 0;

    for (; code < end; count++) {
        lp_arg arg;
        code += arg_width(code, &arg);
    }
    return count;
}

lp_tensor *lp_op_tensor(lp_graph *graph, const lp_op *op, size_t i)
{
    lp_arg arg = lp_op_arg(graph, op, i);
    return arg.tag == LP_ARG_TENSOR && arg.values[0] >= 0 ? &graph->tensors[arg.values[0]] : NULL;
}

int64_t lp_op_int(const lp_graph *graph, const lp_op *op, size_t i, int64_t otherwise)
{
    lp_arg arg = lp_op_arg(graph, op, i);
    bool usable =
        (arg.tag == LP_ARG_INT || arg.tag == LP_ARG_BOOL) || (arg.tag == LP_ARG_INTS && arg.count == 1);
    return usable ? arg.values[0] : otherwise;
}

lp_tensor *lp_op_output(lp_graph *graph, const lp_op *op, size_t i)
{
    int64_t id = i < op->output_count ? graph->output_ids[op->outputs + i] : -1;
    return id >= 0 ? &graph->tensors[id] : NULL;
}

size_t lp_wrap_dim(int64_t dim, size_t ndim)
{
    int64_t n = ndim == 0 ? 1 : (int64_t)ndim;
    int64_t wrapped = dim < 0 ? dim + n : dim;
    return (size_t)(wrapped < 0 || wrapped >= n ? 0 : wrapped);
}

uint32_t lp_tensor_id(const lp_graph *graph, const lp_tensor *tensor)
{
    return (uint32_t)(tensor - graph->tensors);
}

lp_status lp_visit_inputs(lp_graph *graph, const lp_op *op, lp_tensor_visit visit, void *context,
                          lp_error *err)
{
    const int64_t *end, *code = code_of(graph, op, &end);

    while (code < end) {
        lp_arg arg;
        code += arg_width(code, &arg);
        if (arg.tag != LP_ARG_TENSOR && arg.tag != LP_ARG_TENSORS)
            continue;
        for (size_t i = 0; i < arg.count; i++)
            if (arg.values[i] >= 0)
                LP_TRY(visit(graph, &graph->tensors[arg.values[i]], context, err));
    }
    return LP_OK;
}

/* ---- helpers of the rules ------------------------------------------------------------------------------------------ */

lp_status lp_unify_dims(lp_run *run, lp_expr a, lp_expr b, lp_rule rule, lp_error *err)
{
    if (a.len == 0 && b.len == 0)
        return LP_OK;
    return lp_axes_unify(run->axes, a, b, rule, err);
}

lp_status lp_set_output(lp_run *run, const lp_op *op, size_t i, const lp_expr *dims, lp_error *err)
{
    lp_tensor *out = lp_op_output(run->graph, op, i);

    if (out == NULL)
        return LP_OK;
    for (size_t d = 0; d < out->ndim; d++) {
        if (out->known)
            LP_TRY(lp_unify_dims(run, out->dims[d], dims[d], LP_RULE_EQUAL, err));
        else if (out->sizes[d] == 0)
            out->dims[d] = LP_EMPTY;
        else if (lp_axes_size(run->axes, dims[d]) != out->sizes[d])
            return lp_error_set(
                err, LP_ERR_INTERNAL,
                "operation %u: the rule gave dimension %zu of its output size %lld where the forward "
                "pass had %lld; please report this model",
                op->index, d, (long long)lp_axes_size(run->axes, dims[d]), (long long)out->sizes[d]);
        else
            out->dims[d] = dims[d];
    }
    out->known = true;
    return LP_OK;
}

static lp_status note_dim_atom(lp_graph *graph, uint32_t tensor, uint32_t dim, lp_error *err)
{
    void *block = graph->atom_dims;
    size_t before = graph->atom_dim_capacity;
    lp_expr expr = graph->tensors[tensor].dims[dim];
    lp_atom atom;

    if (expr.len == 0)
        return LP_OK;
    atom = graph->axes.factors[expr.off];
    LP_TRY(lp_grow(&graph->allocator, &block, &graph->atom_dim_capacity, (size_t)atom + 1, sizeof(uint32_t),
                   err));
    graph->atom_dims = block;
    for (size_t i = before; i < graph->atom_dim_capacity; i++)
        graph->atom_dims[i] = UINT32_MAX;
    graph->atom_dims[atom] = tensor * LP_MAX_DIMS + dim;
    return LP_OK;
}

lp_status lp_set_fresh(lp_run *run, const lp_op *op, size_t i, lp_reason reason, lp_error *err)
{
    lp_tensor *out = lp_op_output(run->graph, op, i);
    lp_expr dims[LP_MAX_DIMS] = {{0, 0}};

    if (out == NULL)
        return LP_OK;
    for (size_t d = 0; d < out->ndim; d++) {
        dims[d] = LP_EMPTY;
        if (out->sizes[d] == 0)
            continue;
        LP_TRY(lp_axes_fresh(run->axes, out->sizes[d], &dims[d], err));
        if (reason != LP_REASON_NONE)
            LP_TRY(lp_axes_note(run->axes, dims[d], reason, err));
    }
    return lp_set_output(run, op, i, dims, err);
}

lp_status lp_freeze_tensor(lp_run *run, const lp_tensor *tensor, lp_reason reason, lp_error *err)
{
    for (size_t d = 0; d < tensor->ndim; d++)
        LP_TRY(lp_axes_note(run->axes, tensor->dims[d], reason, err));
    return LP_OK;
}

lp_status lp_mark_dim(lp_run *run, const lp_op *op, lp_tensor *tensor, size_t dim, lp_reason mark,
                      lp_error *err)
{
    if (run->axes->quiet || tensor->ndim == 0)
        return LP_OK;
    LP_TRY(lp_axes_note(run->axes, tensor->dims[dim], mark, err));
    return lp_add_marked(run, op, tensor, dim, err);
}

lp_status lp_add_marked(lp_run *run, const lp_op *op, const lp_tensor *tensor, size_t dim, lp_error *err)
{
    lp_graph *graph = run->graph;
    void *block = graph->marked;

    if (run->axes->quiet)
        return LP_OK;
    LP_TRY(lp_grow(&graph->allocator, &block, &graph->marked_capacity, graph->marked_count + 1,
                   sizeof *graph->marked, err));
    graph->marked = block;
    graph->marked[graph->marked_count++] = (lp_marked){op->index, lp_tensor_id(graph, tensor), (uint32_t)dim};
    return LP_OK;
}

lp_status lp_index_dim(lp_run *run, const lp_tensor *index, lp_expr dim, lp_error *err)
{
    if (index->has_values && lp_axes_size(run->axes, index->values) == lp_axes_size(run->axes, dim))
        return lp_unify_dims(run, index->values, dim, LP_RULE_VALUE, err);
    if (index->has_values)
        LP_TRY(lp_axes_note(run->axes, index->values, LP_REASON_NUMBERED, err));
    return lp_axes_note(run->axes, dim, LP_REASON_INDEXED, err);
}

lp_rule lp_rule_between(const lp_tensor *a, const lp_tensor *b)
{
    return a->weight != b->weight ? LP_RULE_FORWARD : LP_RULE_EQUAL;
}

/* ---- build -------------------------------------------------------------------------------------------------------- */

/* A tensor the tape did not make: a parameter, a buffer, an input or a constant. */
static lp_status adopt(lp_graph *graph, lp_tensor *tensor, uint32_t op, lp_error *err)
{
    lp_axes *axes = &graph->axes;

    axes->op = op;
    axes->quiet = false;
    for (uint32_t d = 0; d < tensor->ndim; d++) {
        tensor->dims[d] = LP_EMPTY;
        if (tensor->sizes[d] == 0)
            continue;
        LP_TRY(lp_axes_fresh(axes, tensor->sizes[d], &tensor->dims[d], err));
        if (tensor->role == LP_TENSOR_INPUT)
            LP_TRY(lp_axes_note(axes, tensor->dims[d], LP_REASON_INPUT, err));
        else if (tensor->role != LP_TENSOR_PARAMETER && tensor->role != LP_TENSOR_BUFFER)
            LP_TRY(lp_axes_note(axes, tensor->dims[d], LP_REASON_CONSTANT, err));
        LP_TRY(note_dim_atom(graph, lp_tensor_id(graph, tensor), d, err));
    }
    tensor->known = true;
    return append_index(graph, &graph->adopted, &graph->adopted_count, &graph->adopted_capacity,
                        lp_tensor_id(graph, tensor), err);
}

/* What the inputs of an operation make of its outputs: a weight when they are weights, whatever integers address it. */
typedef struct {
    bool weight, value;
    uint32_t op; /* the operation */
} lp_origin;

static lp_status adopt_input(lp_graph *graph, lp_tensor *tensor, void *context, lp_error *err)
{
    lp_origin *origin = context;
    if (!tensor->known)
        LP_TRY(adopt(graph, tensor, origin->op, err));
    if (tensor->weight)
        origin->weight = true;
    else if (!tensor->integral)
        origin->value = true;
    return LP_OK;
}

static lp_status freeze_input(lp_graph *graph, lp_tensor *tensor, void *context, lp_error *err)
{
    (void)graph;
    return lp_freeze_tensor(context, tensor, LP_REASON_EMPTY, err);
}

static int64_t elements(const lp_tensor *tensor)
{
    int64_t count = 1;
    for (size_t d = 0; tensor != NULL && d < tensor->ndim; d++)
        count *= tensor->sizes[d];
    return count;
}

/* A parameter repeated for each element of a batch (latent queries, class tokens) flows on as activations do. */
static bool repeats(lp_graph *graph, const lp_op *op)
{
    return (op->rule == lp_rule_expand || op->rule == lp_rule_repeat) &&
           elements(lp_op_output(graph, op, 0)) > elements(lp_op_tensor(graph, op, 0));
}

static bool has_no_elements(const lp_tensor *tensor)
{
    for (size_t d = 0; d < tensor->ndim; d++)
        if (tensor->sizes[d] == 0)
            return true;
    return false;
}

/* Integers written in place no longer name positions, through whichever view they are read. */
static void forget_values(lp_graph *graph, const lp_tensor *written)
{
    for (size_t t = 0; t < graph->tensor_count; t++)
        if (graph->tensors[t].storage_id == written->storage_id) {
            graph->tensors[t].has_values = false;
            graph->tensors[t].values_of = LP_NO_OP;
        }
}

/* Does the operation follow the positions its integers name, or only hand them on? */
static bool follows_values(lp_graph *graph, const lp_op *op)
{
    const lp_rule_fn follow[] = {lp_rule_index,     lp_rule_index_select, lp_rule_gather, lp_rule_scatter,
                                 lp_rule_index_add, lp_rule_index_put,    lp_rule_count,  lp_rule_keep,
                                 lp_rule_nothing,   lp_rule_grouped_mm,   lp_rule_factory};

    for (size_t i = 0; i < sizeof follow / sizeof follow[0]; i++)
        if (op->rule == follow[i])
            return true;
    for (size_t i = 0; i < op->output_count; i++) {
        const lp_tensor *out = lp_op_output(graph, op, i);
        if (out != NULL && out->has_values)
            return true;
    }
    return false;
}

/* Removal renumbers the positions of an axis: whoever computes with the old numbers holds it fast. */
static lp_status freeze_numbered(lp_graph *graph, lp_tensor *tensor, void *context, lp_error *err)
{
    lp_run *run = context;
    (void)graph;
    return tensor->integral && tensor->has_values
               ? lp_axes_note(run->axes, tensor->values, LP_REASON_NUMBERED, err)
               : LP_OK;
}

static lp_status run_op(lp_run *run, lp_op *op, lp_error *err)
{
    lp_graph *graph = run->graph;
    lp_origin origin = {false, false, op->index};
    bool empty = false, full = false, weight;

    LP_TRY(lp_visit_inputs(graph, op, adopt_input, &origin, err));
    weight = origin.weight && !origin.value && op->rule != lp_rule_embedding && !repeats(graph, op);
    run->axes->op = op->index;
    run->axes->quiet = !op->live;
    for (size_t i = 0; i < op->output_count; i++) {
        lp_tensor *out = lp_op_output(graph, op, i);
        if (out != NULL)
            *(has_no_elements(out) ? &empty : &full) = true;
    }
    if (empty && !full) { /* nothing passes through an empty result, but other inputs would fill it */
        if (origin.weight)
            LP_TRY(lp_visit_inputs(graph, op, freeze_input, run, err));
        for (size_t i = 0; i < op->output_count; i++)
            LP_TRY(lp_set_fresh(run, op, i, LP_REASON_CONSTANT, err));
    } else if (op->rule != NULL) {
        LP_TRY(op->rule(run, op, err));
        if (!follows_values(graph, op))
            LP_TRY(lp_visit_inputs(graph, op, freeze_numbered, run, err));
    } else {
        if (op->live)
            LP_TRY(append_index(graph, &graph->unknown, &graph->unknown_count, &graph->unknown_capacity,
                                op->index, err));
        LP_TRY(lp_rule_unknown(run, op, err));
    }
    for (size_t i = 0; i < op->output_count; i++) {
        lp_tensor *out = lp_op_output(graph, op, i);
        if (out != NULL && (op->flags & LP_OP_MUTATES) != 0 && out->integral)
            forget_values(graph, out);
        if (out != NULL && (op->flags & LP_OP_MUTATES) == 0 && out->role == LP_TENSOR_VALUE)
            out->weight = weight;
        else if (out != NULL && !weight)
            out->weight = false;
    }
    return LP_OK;
}

/* The last operation that gave a tensor; LP_NO_OP for one that none did. */
static uint32_t maker_of(const lp_graph *graph, int64_t tensor)
{
    for (size_t i = graph->op_count; i-- > 0;)
        for (uint32_t o = 0; o < graph->ops[i].output_count; o++)
            if (graph->output_ids[graph->ops[i].outputs + o] == tensor)
                return (uint32_t)i;
    return LP_NO_OP;
}

lp_status lp_graph_build(lp_graph *graph, lp_error *err)
{
    lp_run run = {graph, &graph->axes};

    if (graph->built)
        return lp_error_set(err, LP_ERR_ARGUMENT, "the graph has been built already");
    LP_TRY(lp_graph_find_live(graph, err));
    for (size_t i = 0; i < graph->op_count; i++)
        LP_TRY(run_op(&run, &graph->ops[i], err));
    graph->axes.quiet = false;
    for (size_t i = 0; i < graph->result_count; i++) {
        graph->axes.op = maker_of(graph, graph->results[i]);
        LP_TRY(lp_freeze_tensor(&run, &graph->tensors[graph->results[i]], LP_REASON_OUTPUT, err));
    }
    graph->axes.op = LP_NO_OP;
    LP_TRY(lp_graph_find_remains(graph, err));
    graph->built = true;
    return lp_graph_collect(graph, err);
}

size_t lp_graph_unknown_count(const lp_graph *graph)
{
    return graph->unknown_count;
}

uint32_t lp_graph_unknown_op(const lp_graph *graph, size_t i)
{
    return graph->unknown[i];
}

size_t lp_graph_marked_count(const lp_graph *graph)
{
    return graph->marked_count;
}

const lp_marked *lp_graph_marked(const lp_graph *graph, size_t i)
{
    return &graph->marked[i];
}
