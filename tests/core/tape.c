#include "tape.h"

#include "core/rules.h"

#include <stdlib.h>
#include <string.h>

void tape_begin(tape *t, lp_allocator allocator)
{
    memset(t, 0, sizeof *t);
    t->status = lp_graph_new(&t->graph, allocator, &t->err);
}

void tape_end(tape *t)
{
    lp_graph_free(t->graph);
    t->graph = NULL;
}

static int64_t add(tape *t, lp_tensor_role role, bool integral, uint64_t storage, const int64_t *sizes,
                   size_t ndim)
{
    if (t->status == LP_OK)
        t->status = lp_graph_add_tensor(t->graph, sizes, ndim, role, integral, storage, &t->err);
    return t->status == LP_OK ? t->tensors++ : 0;
}

int64_t tape_parameter(tape *t, const int64_t *sizes, size_t ndim)
{
    return add(t, LP_TENSOR_PARAMETER, false, t->storages++, sizes, ndim);
}

int64_t tape_buffer(tape *t, const int64_t *sizes, size_t ndim)
{
    return add(t, LP_TENSOR_BUFFER, false, t->storages++, sizes, ndim);
}

int64_t tape_input(tape *t, const int64_t *sizes, size_t ndim)
{
    return add(t, LP_TENSOR_INPUT, false, t->storages++, sizes, ndim);
}

int64_t tape_ids(tape *t, const int64_t *sizes, size_t ndim)
{
    return add(t, LP_TENSOR_INPUT, true, t->storages++, sizes, ndim);
}

int64_t tape_constant(tape *t, const int64_t *sizes, size_t ndim)
{
    return add(t, LP_TENSOR_CONSTANT, false, t->storages++, sizes, ndim);
}

int64_t tape_value(tape *t, bool integral, const int64_t *sizes, size_t ndim)
{
    return add(t, LP_TENSOR_VALUE, integral, t->storages++, sizes, ndim);
}

int64_t tape_view(tape *t, int64_t base, const int64_t *sizes, size_t ndim)
{
    /* every tensor made above has a storage of its own, numbered as it was made; views are not viewed here */
    return add(t, LP_TENSOR_VALUE, false, (uint64_t)base, sizes, ndim);
}

void tape_call(tape *t, const char *name, uint32_t flags, const int64_t *code, size_t length,
               const int64_t *outputs, size_t count)
{
    if (t->status == LP_OK)
        t->status = lp_graph_add_op(t->graph, name, flags, code, length, outputs, count, &t->err);
    t->ops++;
}

int64_t tape_op(tape *t, const char *name, const int64_t *code, size_t length, const int64_t *sizes,
                size_t ndim)
{
    int64_t out = tape_value(t, false, sizes, ndim);
    tape_call(t, name, 0, code, length, &out, 1);
    return out;
}

int64_t tape_int_op(tape *t, const char *name, const int64_t *code, size_t length, const int64_t *sizes,
                    size_t ndim)
{
    int64_t out = tape_value(t, true, sizes, ndim);
    tape_call(t, name, 0, code, length, &out, 1);
    return out;
}

int64_t tape_point(tape *t, const char *name, const int64_t *code, size_t length, const int64_t *sizes,
                   size_t ndim)
{
    int64_t out = tape_value(t, false, sizes, ndim);
    tape_call(t, name, LP_OP_POINTWISE, code, length, &out, 1);
    return out;
}

int64_t tape_write(tape *t, const char *name, const int64_t *code, size_t length, int64_t out)
{
    tape_call(t, name, LP_OP_MUTATES, code, length, &out, 1);
    return out;
}

int64_t tape_linear(tape *t, int64_t x, int64_t weight, int64_t rows, int64_t features)
{
    return tape_op(t, "aten::linear", ARGS(T(x), T(weight), NO), SHAPE(rows, features));
}

lp_status tape_build(tape *t, int64_t output)
{
    if (t->status == LP_OK)
        t->status = lp_graph_set_outputs(t->graph, &output, 1, &t->err);
    if (t->status == LP_OK)
        t->status = lp_graph_build(t->graph, &t->err);
    return t->status;
}

const lp_axis *tape_axis(tape *t, int64_t tensor, uint32_t dim, size_t nth)
{
    uint32_t ids[16];
    size_t count = 0;

    if (t->status != LP_OK ||
        lp_graph_dim_axes(t->graph, (uint32_t)tensor, dim, ids, 16, &count, &t->err) != LP_OK)
        return NULL;
    return nth < count && nth < 16 ? lp_graph_axis(t->graph, ids[nth]) : NULL;
}

bool tape_reason(const tape *t, const lp_axis *axis, lp_reason reason)
{
    uint32_t cursor = axis != NULL ? axis->notes : 0, op;
    lp_reason found;

    while (lp_graph_note(t->graph, &cursor, &found, &op))
        if (found == reason)
            return true;
    return false;
}

size_t tape_notes(const tape *t, const lp_axis *axis)
{
    uint32_t cursor = axis != NULL ? axis->notes : 0, op;
    lp_reason found;
    size_t count = 0;

    while (lp_graph_note(t->graph, &cursor, &found, &op))
        count++;
    return count;
}

bool tape_positions(tape *t, const lp_axis *axis, int64_t tensor, uint32_t dim, size_t nth,
                    const int64_t *expected, size_t count)
{
    for (size_t m = 0; axis != NULL && m < axis->member_count; m++) {
        int64_t *found;
        size_t per_index;
        bool equal;

        if (axis->members[m].tensor != tensor || axis->members[m].dim != dim || nth-- > 0)
            continue;
        if (lp_graph_positions(t->graph, axis, m, NULL, &per_index, &t->err) != LP_OK ||
            per_index * (size_t)axis->size != count)
            return false;
        found = malloc(count * sizeof *found);
        equal = found != NULL && lp_graph_positions(t->graph, axis, m, found, &per_index, &t->err) == LP_OK &&
                memcmp(found, expected, count * sizeof *found) == 0;
        free(found);
        return equal;
    }
    return false;
}

int64_t tape_new_size(tape *t, int64_t tensor, uint32_t dim, const lp_axis *axis, int64_t count)
{
    size_t axes = lp_graph_axis_count(t->graph);
    int64_t *removed = calloc(axes + 1, sizeof *removed), size = -1;

    for (size_t i = 0; removed != NULL && i < axes; i++)
        if (lp_graph_axis(t->graph, i) == axis)
            removed[i] = count;
    if (removed == NULL ||
        lp_graph_new_size(t->graph, (uint32_t)tensor, dim, removed, &size, &t->err) != LP_OK)
        size = -1;
    free(removed);
    return size;
}

bool tape_same(tape *t, int64_t a, uint32_t a_dim, size_t n, int64_t b, uint32_t b_dim, size_t m)
{
    const lp_axis *axis = tape_axis(t, a, a_dim, n);
    return axis != NULL && axis == tape_axis(t, b, b_dim, m);
}

bool tape_prunable(tape *t, int64_t tensor, uint32_t dim, size_t nth)
{
    const lp_axis *axis = tape_axis(t, tensor, dim, nth);
    return axis != NULL && axis->prunable;
}

bool tape_frozen(tape *t, int64_t tensor, uint32_t dim, size_t nth, lp_reason reason)
{
    const lp_axis *axis = tape_axis(t, tensor, dim, nth);
    return axis != NULL && !axis->prunable && tape_reason(t, axis, reason);
}

bool tape_marked(tape *t, int64_t tensor, uint32_t dim, lp_reason mark)
{
    const lp_axis *axis = tape_axis(t, tensor, dim, 0);
    return axis != NULL && axis->prunable && (axis->flags & LP_MARKED) != 0 && tape_reason(t, axis, mark);
}

int64_t tape_produce(tape *t, int64_t features, int64_t *weight)
{
    int64_t x = tape_input(t, SHAPE(2, 5));
    *weight = tape_parameter(t, SHAPE(features, 5));
    return tape_linear(t, x, *weight, 2, features);
}

int64_t tape_consume(tape *t, int64_t value, int64_t rows, int64_t features, int64_t *weight)
{
    *weight = tape_parameter(t, SHAPE(3, features));
    return tape_linear(t, value, *weight, rows, 3);
}

size_t tape_rule_count(void)
{
    return lp_rule_count_all();
}

const char *tape_rule_name(size_t i)
{
    return lp_rule_name(i);
}

bool tape_rule_known(const char *name)
{
    lp_rule_fn rule;
    uint8_t detail;
    return lp_rule_find(name, &rule, &detail);
}
