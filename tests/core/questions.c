#include "questions.h"
#include "check.h"

#include <stdlib.h>

enum { MOST_POSITIONS = 65536, MOST_FLAGS = 4096 }; /* of one answer; larger ones are not asked for */

static lp_status claim(tape *t, bool truth, const char *what)
{
    return truth ? LP_OK : lp_error_set(&t->err, LP_ERR_INTERNAL, "%s", what);
}

/* Rows of positions ascend and lie in the dimension. */
static lp_status ask_positions(tape *t, const lp_axis *axis, size_t member)
{
    size_t per_index;
    int64_t size, start, stride, *positions;
    lp_status status = lp_graph_positions(t->graph, axis, member, NULL, &per_index, &t->err);

    lp_graph_member_place(t->graph, &axis->members[member], &start, &stride);
    if (status == LP_OK)
        status = lp_graph_new_size(t->graph, axis->members[member].tensor, axis->members[member].dim, NULL,
                                   &size, &t->err);
    if (status != LP_OK || per_index > MOST_POSITIONS || axis->size > MOST_POSITIONS / (int64_t)per_index)
        return status;
    positions = need(per_index * (size_t)axis->size * sizeof *positions);
    status = lp_graph_positions(t->graph, axis, member, positions, &per_index, &t->err);
    for (size_t i = 0; status == LP_OK && i < per_index * (size_t)axis->size; i++)
        status = claim(t,
                       positions[i] >= 0 && positions[i] < size &&
                           (i % per_index == 0 || positions[i] > positions[i - 1]),
                       "positions do not ascend inside their dimension");
    if (status == LP_OK)
        status = claim(t, start == positions[0], "a member does not begin at its first position");
    free(positions);
    return status;
}

static lp_status ask_ragged(tape *t, const lp_axis *axis, size_t member, const lp_axis *outer)
{
    uint8_t flags[MOST_FLAGS] = {0};
    int64_t size, *chosen;
    lp_status status;

    if (outer->size > MOST_POSITIONS)
        return LP_OK;
    status = lp_graph_new_size(t->graph, axis->members[member].tensor, axis->members[member].dim, NULL, &size,
                               &t->err);
    if (status != LP_OK || size > MOST_FLAGS)
        return status;
    chosen = need((size_t)outer->size * sizeof *chosen);
    for (int64_t i = 0; i < outer->size; i++)
        chosen[i] = i % axis->size;
    status = lp_graph_mark_ragged(t->graph, axis, member, outer, chosen, 1, flags, &t->err);
    free(chosen);
    return status == LP_ERR_PLAN ? LP_OK : status; /* not nested: a fair answer */
}

static lp_status ask_axis(tape *t, size_t id)
{
    const lp_axis *axis = lp_graph_axis(t->graph, id);
    uint32_t cursor = axis->notes, op;
    lp_reason reason;
    lp_status status = claim(t, axis->member_count > 0 && axis->size > 0, "an axis lies nowhere");

    while (lp_graph_note(t->graph, &cursor, &reason, &op))
        if (status == LP_OK)
            status = claim(t, lp_reason_text(reason) != NULL, "a reason has no text");
    if (status == LP_OK)
        status = claim(t, lp_kind_name(axis->kind) != NULL, "a kind has no name");
    for (size_t m = 0; m < axis->member_count && status == LP_OK; m++) {
        lp_steps steps = {NULL, 0, 0};
        uint32_t tensor, dim;

        status = ask_positions(t, axis, m);
        if (status == LP_OK)
            status = ask_ragged(t, axis, m, lp_graph_axis(t->graph, id == 0 ? 0 : id - 1));
        if (status == LP_OK)
            status = lp_graph_explain(t->graph, id, 0, m, &steps, &t->err);
        for (size_t i = 0; i < steps.count; i++) {
            (void)lp_graph_atom_dim(t->graph, steps.items[i].from, &tensor, &dim);
            if (status == LP_OK)
                status = claim(t, lp_rule_label((lp_rule)steps.items[i].rule) != NULL, "a rule has no label");
        }
        lp_steps_free(lp_graph_allocator(t->graph), &steps);
    }
    return status;
}

static lp_status ask_dim(tape *t, uint32_t tensor, uint32_t dim, const int64_t *removed,
                         const uint8_t *const *gone)
{
    uint8_t flags[MOST_FLAGS] = {0};
    int64_t whole, left, flagged = 0;
    uint32_t ids[8];
    size_t count;
    lp_status status = lp_graph_dim_axes(t->graph, tensor, dim, ids, 8, &count, &t->err);

    if (status == LP_ERR_ARGUMENT)
        return LP_OK; /* no such dimension, or nothing used the tensor */
    if (status == LP_OK)
        status = lp_graph_dim_atoms(t->graph, tensor, dim, ids, 8, &count, &t->err);
    if (status == LP_OK)
        status = lp_graph_new_size(t->graph, tensor, dim, NULL, &whole, &t->err);
    if (status == LP_OK)
        status = lp_graph_new_size(t->graph, tensor, dim, removed, &left, &t->err);
    if (status == LP_OK)
        status = claim(t, left >= 0 && left <= whole, "a dimension grows by removal");
    if (status != LP_OK || whole > MOST_FLAGS)
        return status;
    status = lp_graph_mark_removed(t->graph, tensor, dim, gone, flags, &t->err);
    for (int64_t i = 0; i < whole; i++)
        flagged += flags[i];
    return status == LP_OK ? claim(t, flagged <= whole - left, "more is marked than goes") : status;
}

void tape_ask_everything(tape *t)
{
    size_t axes = lp_graph_axis_count(t->graph), ops = lp_graph_op_count(t->graph);
    int64_t *removed = need((axes + 1) * sizeof *removed), *each = need((ops + 1) * sizeof *each), total;
    const uint8_t **gone = need((axes + 1) * sizeof *gone);
    uint8_t first[MOST_FLAGS] = {1};
    lp_status status = LP_OK;

    for (size_t i = 0; i < axes; i++) {
        removed[i] = 1;
        gone[i] = i % 2 == 0 && lp_graph_axis(t->graph, i)->size <= MOST_FLAGS ? first : NULL;
    }
    for (size_t i = 0; i < axes && status == LP_OK; i++)
        status = ask_axis(t, i);
    for (int64_t tensor = 0; tensor < t->tensors && status == LP_OK; tensor++)
        for (uint32_t dim = 0; dim < 5 && status == LP_OK; dim++)
            status = ask_dim(t, (uint32_t)tensor, dim, removed, gone);
    for (size_t i = 0; i < lp_graph_unknown_count(t->graph) && status == LP_OK; i++)
        status = claim(t, lp_graph_unknown_op(t->graph, i) < ops, "an unknown operation is not on the tape");
    for (size_t i = 0; i < lp_graph_marked_count(t->graph) && status == LP_OK; i++)
        status =
            claim(t, lp_graph_marked(t->graph, i)->op < ops, "a normalising operation is not on the tape");
    if (status == LP_OK)
        status = lp_graph_numel(t->graph, removed, &total, &t->err);
    if (status == LP_OK)
        status = lp_graph_macs_each(t->graph, removed, each, &t->err);
    if (status == LP_OK)
        status = lp_graph_macs(t->graph, removed, &total, &t->err);
    for (size_t i = 0; i < ops && status == LP_OK; i++)
        total -= each[i];
    if (status == LP_OK)
        status = claim(t, total == 0, "the operations' products do not add up");
    for (size_t i = 0; i < axes && status == LP_OK; i++)
        status = lp_graph_freeze(t->graph, i, LP_REASON_TRIAL, LP_NO_OP, &t->err);
    t->status = status;
    free(removed);
    free(each);
    free(gone);
}
