/* Why two slices of two parameters are one group: the chain of dependencies, read off the proofs. */
#include "graph_internal.h"

#include <string.h>

/* The way from a parameter dimension down to the axis: at each level the atom met and the part taken. */
typedef struct {
    lp_atom atom, root;
    uint32_t part; /* index among the root's parts; UINT32_MAX at the axis itself */
} lp_level;

typedef struct {
    lp_level *items;
    size_t count, capacity;
} lp_levels;

static lp_status add_level(lp_graph *graph, lp_levels *levels, lp_level level, lp_error *err)
{
    void *block = levels->items;
    LP_TRY(
        lp_grow(&graph->allocator, &block, &levels->capacity, levels->count + 1, sizeof *levels->items, err));
    levels->items = block;
    levels->items[levels->count++] = level;
    return LP_OK;
}

static lp_status contains(lp_graph *graph, lp_atom atom, lp_atom leaf, bool *out, lp_error *err)
{
    lp_expr leaves, one = {(uint32_t)graph->axes.factor_count, 1};
    void *block = graph->axes.factors;

    LP_TRY(lp_grow(&graph->allocator, &block, &graph->axes.factor_capacity, graph->axes.factor_count + 1,
                   sizeof *graph->axes.factors, err));
    graph->axes.factors = block;
    graph->axes.factors[graph->axes.factor_count++] = atom;
    LP_TRY(lp_axes_leaves(&graph->axes, one, &leaves, err));
    *out = false;
    for (uint32_t i = 0; i < leaves.len; i++)
        *out |= graph->axes.factors[leaves.off + i] == leaf;
    return LP_OK;
}

/* Position p of a dimension lies in one term of every sum; of a product, the factor that holds the axis is taken. */
static lp_status descend(lp_graph *graph, lp_atom atom, lp_atom leaf, int64_t position, lp_levels *out,
                         lp_error *err)
{
    for (;;) {
        lp_atom root = lp_axes_find(&graph->axes, atom);
        lp_expr parts = graph->axes.atoms[root].parts;
        lp_level level = {atom, root, UINT32_MAX};
        int64_t inner = graph->axes.atoms[root].size;
        bool sum = graph->axes.atoms[root].definition == LP_SUM;

        if (root == leaf)
            return add_level(graph, out, level, err);
        if (graph->axes.atoms[root].definition == LP_LEAF)
            return lp_error_set(err, LP_ERR_INTERNAL,
                                "an axis is not where its member says; please report this model");
        for (uint32_t i = 0; i < parts.len && level.part == UINT32_MAX; i++) {
            lp_atom part = graph->axes.factors[parts.off + i];
            int64_t size = graph->axes.atoms[part].size;
            bool here;
            inner /= sum ? 1 : size;
            if (sum && position >= size) {
                position -= size;
                continue;
            }
            LP_TRY(contains(graph, part, leaf, &here, err));
            if (!here)
                continue;
            level.part = i;
            position = sum ? position : position / inner % size;
            atom = part;
        }
        LP_TRY(add_level(graph, out, level, err));
        if (level.part == UINT32_MAX)
            return lp_error_set(err, LP_ERR_INTERNAL,
                                "an axis is not where its member says; please report this model");
    }
}

static lp_status add_step(lp_graph *graph, lp_steps *out, lp_step step, lp_error *err)
{
    void *block = out->items;
    LP_TRY(lp_grow(&graph->allocator, &block, &out->capacity, out->count + 1, sizeof *out->items, err));
    out->items = block;
    out->items[out->count++] = step;
    return LP_OK;
}

/* Do both ways take the same parts from here on? */
static bool same_rest(const lp_levels *a, size_t i, const lp_levels *b, size_t j)
{
    if (a->count - i != b->count - j)
        return false;
    for (; i < a->count; i++, j++)
        if (a->items[i].root != b->items[j].root || a->items[i].part != b->items[j].part)
            return false;
    return true;
}

static lp_status member_levels(lp_graph *graph, const lp_axis *axis, size_t member, lp_levels *out,
                               lp_error *err)
{
    const lp_member *at = &axis->members[member];
    lp_expr dim = graph->tensors[at->tensor].dims[at->dim];

    return descend(graph, graph->axes.factors[dim.off], axis->root,
                   graph->occurrences.items[at->occurrence].offset, out, err);
}

lp_status lp_graph_explain(lp_graph *graph, size_t id, size_t from_member, size_t to_member, lp_steps *out,
                           lp_error *err)
{
    const lp_axis *axis = lp_graph_axis(graph, id);
    lp_levels from = {NULL, 0, 0}, to = {NULL, 0, 0};
    size_t arena = graph->axes.factor_count, i = 0, j = 0;
    bool found = false;
    lp_status status;

    if (axis == NULL || from_member >= axis->member_count || to_member >= axis->member_count)
        return lp_error_set(err, LP_ERR_ARGUMENT, "axis %zu has no such member", id);
    status = member_levels(graph, axis, from_member, &from, err);
    if (status == LP_OK)
        status = member_levels(graph, axis, to_member, &to, err);
    for (size_t a = 0; status == LP_OK && a < from.count && !found; a++)
        for (size_t b = 0; b < to.count && !found; b++)
            if (same_rest(&from, a, &to, b)) {
                i = a;
                j = b;
                found = true;
            }
    for (size_t k = 0; status == LP_OK && k < i; k++)
        status = add_step(graph, out,
                          (lp_step){from.items[k].atom, from.items[k + 1].atom,
                                    graph->axes.atoms[from.items[k].root].refined_by, LP_RULE_PART},
                          err);
    if (status == LP_OK)
        status = lp_axes_path(&graph->axes, from.items[i].atom, to.items[j].atom, out, err);
    for (size_t k = j; status == LP_OK && k-- > 0;)
        status = add_step(graph, out,
                          (lp_step){to.items[k + 1].atom, to.items[k].atom,
                                    graph->axes.atoms[to.items[k].root].refined_by, LP_RULE_PART},
                          err);
    lp_release(&graph->allocator, from.items, from.capacity, sizeof *from.items);
    lp_release(&graph->allocator, to.items, to.capacity, sizeof *to.items);
    graph->axes.factor_count = arena;
    return status;
}

bool lp_graph_atom_dim(const lp_graph *graph, lp_atom atom, uint32_t *tensor, uint32_t *dim)
{
    if (atom >= graph->atom_dim_capacity || graph->atom_dims[atom] == UINT32_MAX)
        return false;
    *tensor = graph->atom_dims[atom] / LP_MAX_DIMS;
    *dim = graph->atom_dims[atom] % LP_MAX_DIMS;
    return true;
}
