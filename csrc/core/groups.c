/* Axes read off the built graph: which slices of which parameters live and die together, and what they are. */
#include "graph_internal.h"

#include <stdlib.h>
#include <string.h>

/* ---- gathering ----------------------------------------------------------------------------------------------------- */

typedef struct {
    lp_atom root;
    uint32_t tensor, dim, occurrence;
} lp_found;

static int by_axis(const void *left, const void *right)
{
    const lp_found *a = left, *b = right;
    if (a->root != b->root)
        return a->root < b->root ? -1 : 1;
    return a->occurrence < b->occurrence ? -1 : a->occurrence > b->occurrence;
}

static int by_first_use(const void *left, const void *right)
{
    const lp_axis *a = left, *b = right;
    if (a->prunable != b->prunable)
        return a->prunable ? -1 : 1;
    /* members point into one array; the first occurrence orders axes by parameter, dimension and position */
    return a->members[0].occurrence < b->members[0].occurrence
               ? -1
               : a->members[0].occurrence > b->members[0].occurrence;
}

static int64_t spread(const lp_graph *graph, uint32_t occurrence)
{
    const lp_occurrence *item = &graph->occurrences.items[occurrence];
    int64_t count = 1;
    for (uint32_t i = 0; i < item->loop_count; i++)
        count *= graph->occurrences.loops[item->loop_first + i].count;
    return count;
}

static int64_t coverage(const lp_graph *graph, const lp_axis *axis)
{
    int64_t total = 0;
    for (size_t m = 0; m < axis->member_count; m++)
        if (!lp_add_i64(total, axis->size * spread(graph, axis->members[m].occurrence), &total))
            return INT64_MAX;
    return total;
}

/* The axis nested with every occurrence (all) or some occurrence (!all) of `axis` that carries the given role. */
static const lp_axis *partner(lp_graph *graph, const lp_axis *axis, uint32_t role, bool all)
{
    for (size_t m = 0; m < axis->member_count; m++) {
        const lp_occurrence *item = &graph->occurrences.items[axis->members[m].occurrence];
        for (uint32_t i = 0; i < item->loop_count; i++) {
            lp_atom root = lp_axes_find(&graph->axes, graph->occurrences.loops[item->loop_first + i].atom);
            uint32_t id = graph->axis_of[root];
            bool everywhere = true;
            if (id == LP_NO_ATOM || (graph->axes.atoms[root].flags & role) == 0)
                continue;
            for (size_t k = 0; all && everywhere && k < axis->member_count; k++) {
                const lp_occurrence *other = &graph->occurrences.items[axis->members[k].occurrence];
                everywhere = false;
                for (uint32_t l = 0; l < other->loop_count; l++)
                    everywhere |= lp_axes_find(&graph->axes,
                                               graph->occurrences.loops[other->loop_first + l].atom) == root;
            }
            if (everywhere)
                return &graph->list[id];
        }
    }
    return NULL;
}

static lp_kind classify(lp_graph *graph, const lp_axis *axis)
{
    uint32_t flags = axis->flags;
    const lp_axis *around;

    if (flags & LP_ROLE_ROUTED)
        return LP_KIND_EXPERT;
    if (flags & LP_ROLE_BATCH) {
        around = partner(graph, axis, LP_ROLE_BATCH, true);
        return around != NULL && coverage(graph, around) > coverage(graph, axis) ? LP_KIND_QUERY
                                                                                 : LP_KIND_HEAD;
    }
    if ((flags & LP_ROLE_CONTRACT) != 0 && (flags & LP_ROLE_SCALE) != 0)
        return LP_KIND_STATE;
    if ((flags & (LP_ROLE_CONTRACT | LP_ROLE_VALUE)) != 0 &&
        partner(graph, axis, LP_ROLE_BATCH, false) != NULL)
        return flags & LP_ROLE_CONTRACT ? LP_KIND_HEAD_DIM : LP_KIND_VALUE_DIM;
    if (flags & (LP_ROLE_EMBEDDING | LP_ROLE_JOINED))
        return LP_KIND_CHANNEL;
    if ((flags & LP_ROLE_LINEAR_OUT) != 0 && (flags & LP_ROLE_LINEAR_IN) != 0)
        return flags & (LP_ROLE_NONLINEAR | LP_ROLE_GATED) ? LP_KIND_FFN : LP_KIND_RANK;
    return LP_KIND_OTHER;
}

static lp_status find_occurrences(lp_graph *graph, lp_found **found, size_t *count, size_t *capacity,
                                  lp_error *err)
{
    for (size_t i = 0; i < graph->adopted_count; i++) {
        uint32_t t = graph->adopted[i];
        lp_tensor *tensor = &graph->tensors[t];
        if (tensor->role != LP_TENSOR_PARAMETER && tensor->role != LP_TENSOR_BUFFER)
            continue;
        for (uint32_t d = 0; d < tensor->ndim; d++) {
            size_t from = graph->occurrences.count;
            void *block = *found;
            LP_TRY(lp_axes_occurrences(&graph->axes, tensor->dims[d], &graph->occurrences, err));
            LP_TRY(lp_grow(&graph->allocator, &block, capacity, *count + graph->occurrences.count - from,
                           sizeof **found, err));
            *found = block;
            for (size_t k = from; k < graph->occurrences.count; k++)
                (*found)[(*count)++] = (lp_found){graph->occurrences.items[k].leaf, t, d, (uint32_t)k};
        }
    }
    return LP_OK;
}

/* One axis for each run of `found` with the same root. */
static lp_status make_axes(lp_graph *graph, const lp_found *found, size_t count, lp_error *err)
{
    void *block = graph->members;

    LP_TRY(
        lp_grow(&graph->allocator, &block, &graph->member_capacity, count + 1, sizeof *graph->members, err));
    graph->members = block;
    for (size_t i = 0, end; i < count; i = end) {
        bool parameter = false, live = false;
        lp_atom root = found[i].root;
        lp_axis axis = {.root = root,
                        .size = graph->axes.atoms[root].size,
                        .members = graph->members + graph->member_count};

        for (end = i; end < count && found[end].root == root; end++) {
            const lp_tensor *tensor = &graph->tensors[found[end].tensor];
            parameter |= tensor->role == LP_TENSOR_PARAMETER;
            live |= tensor->role == LP_TENSOR_PARAMETER && tensor->live;
        }
        if (!parameter || axis.size < 2)
            continue;
        for (size_t k = i; k < end; k++)
            graph->members[graph->member_count++] =
                (lp_member){found[k].tensor, found[k].dim, found[k].occurrence};
        axis.member_count = end - i;
        if (!live)
            LP_TRY(lp_axes_note_atom(&graph->axes, root, LP_REASON_UNUSED, err));
        axis.flags = graph->axes.atoms[root].flags;
        axis.notes = graph->axes.atoms[root].notes;
        axis.prunable = (axis.flags & LP_FROZEN) == 0;
        block = graph->list;
        LP_TRY(lp_grow(&graph->allocator, &block, &graph->axis_capacity, graph->axis_count + 1,
                       sizeof *graph->list, err));
        graph->list = block;
        graph->list[graph->axis_count++] = axis;
    }
    return LP_OK;
}

lp_status lp_graph_collect(lp_graph *graph, lp_error *err)
{
    lp_found *found = NULL;
    size_t count = 0, capacity = 0;
    void *block;
    lp_status status = find_occurrences(graph, &found, &count, &capacity, err);

    if (status == LP_OK && count > 0) {
        qsort(found, count, sizeof *found, by_axis);
        status = make_axes(graph, found, count, err);
    }
    lp_release(&graph->allocator, found, capacity, sizeof *found);
    if (status != LP_OK)
        return status;
    if (graph->axis_count > 0)
        qsort(graph->list, graph->axis_count, sizeof *graph->list, by_first_use);
    block = graph->axis_of;
    LP_TRY(lp_grow(&graph->allocator, &block, &graph->axis_of_capacity, graph->axes.atom_count + 1,
                   sizeof *graph->axis_of, err));
    graph->axis_of = block;
    for (size_t i = 0; i < graph->axis_of_capacity; i++)
        graph->axis_of[i] = LP_NO_ATOM;
    for (size_t i = 0; i < graph->axis_count; i++)
        graph->axis_of[graph->list[i].root] = (uint32_t)i;
    for (size_t i = 0; i < graph->axis_count; i++)
        graph->list[i].kind = classify(graph, &graph->list[i]);
    block = graph->removed;
    LP_TRY(lp_grow(&graph->allocator, &block, &graph->removed_capacity, graph->axes.atom_count + 1,
                   sizeof *graph->removed, err));
    graph->removed = block;
    memset(graph->removed, 0, graph->removed_capacity * sizeof *graph->removed);
    return LP_OK;
}

size_t lp_graph_axis_count(const lp_graph *graph)
{
    return graph->axis_count;
}

const lp_axis *lp_graph_axis(const lp_graph *graph, size_t id)
{
    return id < graph->axis_count ? &graph->list[id] : NULL;
}

void lp_graph_member_place(const lp_graph *graph, const lp_member *member, int64_t *start, int64_t *stride)
{
    *start = graph->occurrences.items[member->occurrence].offset;
    *stride = graph->occurrences.items[member->occurrence].stride;
}

bool lp_graph_note(const lp_graph *graph, uint32_t *cursor, lp_reason *reason, uint32_t *op)
{
    const lp_note *note;

    if (*cursor == 0)
        return false;
    note = &graph->axes.notes[*cursor];
    *reason = (lp_reason)note->reason;
    *op = note->op;
    *cursor = note->next;
    return true;
}

lp_status lp_graph_freeze(lp_graph *graph, size_t id, lp_reason reason, uint32_t op, lp_error *err)
{
    lp_axis *axis;

    if (id >= graph->axis_count || reason >= LP_REASON_MARK_BASE)
        return lp_error_set(err, LP_ERR_ARGUMENT, "axis %zu does not exist or the reason does not freeze",
                            id);
    axis = &graph->list[id];
    graph->axes.op = op;
    LP_TRY(lp_axes_note_atom(&graph->axes, axis->root, reason, err));
    axis->flags = graph->axes.atoms[axis->root].flags;
    axis->notes = graph->axes.atoms[axis->root].notes;
    axis->prunable = false;
    return LP_OK;
}

/* ---- positions ------------------------------------------------------------------------------------------------------ */

/* Visit offset + all combinations of the loops but `skip`, those of larger stride outermost. */
typedef struct {
    lp_loop loops[LP_MAX_DIMS * 2];
    int64_t at[LP_MAX_DIMS * 2];
    size_t count;
} lp_odometer;

static lp_status odometer(const lp_occurrences *list, const lp_occurrence *item, lp_atom skip,
                          lp_odometer *out, lp_error *err)
{
    out->count = 0;
    for (uint32_t i = 0; i < item->loop_count; i++) {
        lp_loop loop = list->loops[item->loop_first + i];
        size_t place = out->count;
        if (loop.atom == skip) {
            skip = LP_NO_ATOM;
            continue;
        }
        if (out->count == sizeof out->loops / sizeof out->loops[0])
            return lp_error_set(err, LP_ERR_UNSUPPORTED, "a dimension is nested in more than %zu factors",
                                out->count);
        while (place > 0 && out->loops[place - 1].stride < loop.stride) {
            out->loops[place] = out->loops[place - 1];
            place--;
        }
        out->loops[place] = loop;
        out->count++;
    }
    memset(out->at, 0, sizeof out->at);
    return LP_OK;
}

static int64_t odometer_value(const lp_odometer *odometer)
{
    int64_t value = 0;
    for (size_t i = 0; i < odometer->count; i++)
        value += odometer->at[i] * odometer->loops[i].stride;
    return value;
}

static bool odometer_next(lp_odometer *odometer)
{
    for (size_t i = odometer->count; i-- > 0;) {
        if (++odometer->at[i] < odometer->loops[i].count)
            return true;
        odometer->at[i] = 0;
    }
    return false;
}

lp_status lp_graph_positions(const lp_graph *graph, const lp_axis *axis, size_t member, int64_t *out,
                             size_t *per_index, lp_error *err)
{
    const lp_occurrence *item;
    lp_odometer wheel;

    if (member >= axis->member_count)
        return lp_error_set(err, LP_ERR_ARGUMENT, "the axis has %zu members, not %zu", axis->member_count,
                            member + 1);
    item = &graph->occurrences.items[axis->members[member].occurrence];
    *per_index = (size_t)spread(graph, axis->members[member].occurrence);
    if (out == NULL)
        return LP_OK;
    for (int64_t i = 0; i < axis->size; i++) {
        LP_TRY(odometer(&graph->occurrences, item, LP_NO_ATOM, &wheel, err));
        do
            *out++ = item->offset + i * item->stride + odometer_value(&wheel);
        while (odometer_next(&wheel));
    }
    return LP_OK;
}

lp_status lp_graph_mark_ragged(const lp_graph *graph, const lp_axis *axis, size_t member,
                               const lp_axis *outer, const int64_t *chosen, size_t per_outer, uint8_t *flags,
                               lp_error *err)
{
    const lp_occurrence *item;
    const lp_loop *around = NULL;
    lp_odometer wheel;

    if (member >= axis->member_count)
        return lp_error_set(err, LP_ERR_ARGUMENT, "the axis has %zu members, not %zu", axis->member_count,
                            member + 1);
    item = &graph->occurrences.items[axis->members[member].occurrence];
    for (uint32_t i = 0; i < item->loop_count && around == NULL; i++)
        if (graph->occurrences.loops[item->loop_first + i].atom == outer->root)
            around = &graph->occurrences.loops[item->loop_first + i];
    if (around == NULL)
        return lp_error_set(
            err, LP_ERR_PLAN,
            "a choice of its own for each index of the outer axis needs every member nested in it");
    for (int64_t o = 0; o < outer->size; o++)
        for (size_t k = 0; k < per_outer; k++) {
            int64_t base =
                item->offset + o * around->stride + chosen[(size_t)o * per_outer + k] * item->stride;
            LP_TRY(odometer(&graph->occurrences, item, outer->root, &wheel, err));
            do
                flags[base + odometer_value(&wheel)] = 1;
            while (odometer_next(&wheel));
        }
    return LP_OK;
}

static lp_status check_dim(const lp_graph *graph, uint32_t tensor, uint32_t dim, lp_error *err)
{
    if (tensor < graph->tensor_count && graph->tensors[tensor].known && dim < graph->tensors[tensor].ndim)
        return LP_OK;
    return lp_error_set(err, LP_ERR_ARGUMENT, "dimension %u of tensor %u is not on the tape", dim, tensor);
}

lp_status lp_graph_mark_removed(lp_graph *graph, uint32_t tensor, uint32_t dim, const uint8_t *const *gone,
                                uint8_t *flags, lp_error *err)
{
    lp_occurrences list = {NULL, 0, 0, NULL, 0, 0};
    size_t arena = graph->axes.factor_count; /* given back, so that it does not grow with every query */
    lp_status status;

    LP_TRY(check_dim(graph, tensor, dim, err));
    status = lp_axes_occurrences(&graph->axes, graph->tensors[tensor].dims[dim], &list, err);
    for (size_t k = 0; status == LP_OK && k < list.count; k++) {
        const lp_occurrence *item = &list.items[k];
        uint32_t id = item->leaf < graph->axis_of_capacity ? graph->axis_of[item->leaf] : LP_NO_ATOM;
        if (id == LP_NO_ATOM || gone[id] == NULL)
            continue;
        for (int64_t i = 0; status == LP_OK && i < graph->list[id].size; i++) {
            lp_odometer wheel;
            if (!gone[id][i])
                continue;
            status = odometer(&list, item, LP_NO_ATOM, &wheel, err);
            if (status != LP_OK)
                break;
            do
                flags[item->offset + i * item->stride + odometer_value(&wheel)] = 1;
            while (odometer_next(&wheel));
        }
    }
    lp_occurrences_free(&graph->allocator, &list);
    graph->axes.factor_count = arena;
    return status;
}

/* ---- sizes ---------------------------------------------------------------------------------------------------------- */

static void set_removed(lp_graph *graph, const int64_t *removed)
{
    for (size_t i = 0; i < graph->axis_count; i++)
        graph->removed[graph->list[i].root] = removed != NULL ? removed[i] : 0;
}

lp_status lp_graph_new_size(lp_graph *graph, uint32_t tensor, uint32_t dim, const int64_t *removed,
                            int64_t *out, lp_error *err)
{
    LP_TRY(check_dim(graph, tensor, dim, err));
    *out = 0;
    if (graph->tensors[tensor].sizes[dim] == 0)
        return LP_OK;
    set_removed(graph, removed);
    return lp_axes_new_size(&graph->axes, graph->tensors[tensor].dims[dim], graph->removed, out, err);
}

lp_status lp_tensor_numel(lp_graph *graph, const lp_tensor *tensor, int64_t *out, lp_error *err)
{
    *out = 1;
    for (size_t d = 0; d < tensor->ndim; d++) {
        int64_t size = tensor->sizes[d];
        if (tensor->known)
            LP_TRY(lp_axes_new_size(&graph->axes, tensor->dims[d], graph->removed, &size, err));
        if (!lp_mul_i64(*out, size, out))
            return lp_error_set(err, LP_ERR_OVERFLOW, "a tensor has more than 2^63 elements");
    }
    return LP_OK;
}

lp_status lp_graph_numel(lp_graph *graph, const int64_t *removed, int64_t *out, lp_error *err)
{
    int64_t total = 0;

    set_removed(graph, removed);
    for (size_t t = 0; t < graph->tensor_count; t++) {
        int64_t count;
        if (graph->tensors[t].role != LP_TENSOR_PARAMETER)
            continue;
        LP_TRY(lp_tensor_numel(graph, &graph->tensors[t], &count, err));
        if (!lp_add_i64(total, count, &total))
            return lp_error_set(err, LP_ERR_OVERFLOW, "the parameters have more than 2^63 elements");
    }
    *out = total;
    return LP_OK;
}

lp_status lp_graph_macs(lp_graph *graph, const int64_t *removed, int64_t *out, lp_error *err)
{
    int64_t total = 0;

    set_removed(graph, removed);
    for (size_t i = 0; i < graph->macs_count; i++) {
        int64_t count;
        LP_TRY(lp_op_macs(graph, &graph->ops[graph->macs[i]], &count, err));
        if (!lp_add_i64(total, count, &total))
            return lp_error_set(err, LP_ERR_OVERFLOW,
                                "the operations have more than 2^63 multiply-accumulates");
    }
    *out = total;
    return LP_OK;
}

lp_status lp_graph_macs_each(lp_graph *graph, const int64_t *removed, int64_t *out, lp_error *err)
{
    set_removed(graph, removed);
    for (size_t i = 0; i < graph->op_count; i++)
        out[i] = 0;
    for (size_t i = 0; i < graph->macs_count; i++)
        LP_TRY(lp_op_macs(graph, &graph->ops[graph->macs[i]], &out[graph->macs[i]], err));
    return LP_OK;
}

size_t lp_graph_op_count(const lp_graph *graph)
{
    return graph->op_count;
}

lp_status lp_graph_dim_axes(lp_graph *graph, uint32_t tensor, uint32_t dim, uint32_t *out, size_t capacity,
                            size_t *count, lp_error *err)
{
    size_t arena = graph->axes.factor_count;
    lp_expr leaves;

    LP_TRY(check_dim(graph, tensor, dim, err));
    LP_TRY(lp_axes_leaves(&graph->axes, graph->tensors[tensor].dims[dim], &leaves, err));
    *count = 0;
    for (uint32_t i = 0; i < leaves.len; i++) {
        lp_atom root = graph->axes.factors[leaves.off + i];
        uint32_t id = root < graph->axis_of_capacity ? graph->axis_of[root] : LP_NO_ATOM;
        bool seen = id == LP_NO_ATOM;
        for (uint32_t k = 0; k < i && !seen; k++)
            seen = graph->axes.factors[leaves.off + k] == root;
        if (seen)
            continue;
        if (*count < capacity)
            out[*count] = id;
        (*count)++;
    }
    graph->axes.factor_count = arena;
    return LP_OK;
}

lp_status lp_graph_dim_atoms(lp_graph *graph, uint32_t tensor, uint32_t dim, uint32_t *out, size_t capacity,
                             size_t *count, lp_error *err)
{
    size_t arena = graph->axes.factor_count;
    lp_expr leaves;

    LP_TRY(check_dim(graph, tensor, dim, err));
    LP_TRY(lp_axes_leaves(&graph->axes, graph->tensors[tensor].dims[dim], &leaves, err));
    *count = leaves.len;
    for (uint32_t i = 0; i < leaves.len && i < capacity; i++)
        out[i] = graph->axes.factors[leaves.off + i];
    graph->axes.factor_count = arena;
    return LP_OK;
}
