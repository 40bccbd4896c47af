/* Questions to the axis algebra: where an axis lies in a dimension, and why two atoms are one axis. */
#include "axis_internal.h"

#include <string.h>

/* A part of a dimension still to be walked. */
typedef struct {
    lp_expr expr;
    int64_t offset, stride;
    uint32_t loop_first, loop_count;
} lp_pending;

static lp_status add_loop(lp_axes *axes, lp_occurrences *list, lp_loop loop, lp_error *err)
{
    void *block = list->loops;
    LP_TRY(lp_grow(&axes->allocator, &block, &list->loop_capacity, list->loop_count + 1, sizeof *list->loops,
                   err));
    list->loops = block;
    list->loops[list->loop_count++] = loop;
    return LP_OK;
}

static lp_status add_occurrence(lp_axes *axes, lp_occurrences *list, lp_occurrence item, lp_error *err)
{
    void *block = list->items;
    LP_TRY(lp_grow(&axes->allocator, &block, &list->capacity, list->count + 1, sizeof *list->items, err));
    list->items = block;
    list->items[list->count++] = item;
    return LP_OK;
}

/* The context of factor j of a product: its stride, and the loops of its siblings after the inherited ones. */
static lp_status enter_factor(lp_axes *axes, lp_occurrences *list, lp_pending from, lp_expr factors,
                              uint32_t j, lp_pending *to, lp_error *err)
{
    int64_t inner = from.stride;

    *to = from;
    to->loop_first = (uint32_t)list->loop_count;
    for (uint32_t k = 0; k < from.loop_count; k++)
        LP_TRY(add_loop(axes, list, list->loops[from.loop_first + k], err));
    for (uint32_t k = factors.len; k-- > 0;) {
        lp_atom atom = axes->factors[factors.off + k];
        int64_t size = axes->atoms[atom].size;
        if (k == j)
            to->stride = inner;
        else
            LP_TRY(add_loop(axes, list, (lp_loop){size, inner, atom}, err));
        inner *= size;
    }
    to->loop_count = (uint32_t)(list->loop_count - to->loop_first);
    return LP_OK;
}

lp_status lp_axes_occurrences(lp_axes *axes, lp_expr expr, lp_occurrences *out, lp_error *err)
{
    lp_pending *pending;
    size_t count = 0, capacity = 0;
    void *block = NULL;
    lp_status status = lp_grow(&axes->allocator, &block, &capacity, 1, sizeof *pending, err);

    if (status != LP_OK)
        return status;
    pending = block;
    pending[count++] = (lp_pending){expr, 0, 1, 0, 0};
    while (count > 0 && status == LP_OK) {
        lp_pending at = pending[--count];
        size_t first_child = count;
        lp_expr factors;

        status = lp_axes_resolve(axes, at.expr, &factors, err);
        for (uint32_t j = 0; status == LP_OK && j < factors.len; j++) {
            lp_atom root = axes->factors[factors.off + j];
            lp_pending child;
            status = enter_factor(axes, out, at, factors, j, &child, err);
            if (status != LP_OK)
                break;
            if (axes->atoms[root].definition == LP_LEAF) {
                status = add_occurrence(
                    axes, out,
                    (lp_occurrence){root, child.offset, child.stride, child.loop_first, child.loop_count},
                    err);
                continue;
            }
            for (uint32_t t = 0; status == LP_OK && t < axes->atoms[root].parts.len; t++) {
                lp_expr term = {axes->atoms[root].parts.off + t, 1};
                status = lp_grow(&axes->allocator, &block, &capacity, count + 1, sizeof *pending, err);
                if (status != LP_OK)
                    break;
                pending = block;
                pending[count] = child;
                pending[count++].expr = term;
                child.offset += child.stride * axes->atoms[axes->factors[term.off]].size;
            }
        }
        /* The list is a stack: turn the new entries, so that the walk meets them in order of position. */
        for (size_t i = first_child, j = count; i + 1 < j; i++) {
            lp_pending swap = pending[i];
            pending[i] = pending[--j];
            pending[j] = swap;
        }
    }
    lp_release(&axes->allocator, block, capacity, sizeof *pending);
    return status;
}

void lp_occurrences_free(const lp_allocator *allocator, lp_occurrences *list)
{
    lp_release(allocator, list->items, list->capacity, sizeof *list->items);
    lp_release(allocator, list->loops, list->loop_capacity, sizeof *list->loops);
    memset(list, 0, sizeof *list);
}

static size_t proof_depth(const lp_axes *axes, lp_atom atom)
{
    size_t depth = 0;
    while (axes->atoms[atom].proof_parent != atom) {
        atom = axes->atoms[atom].proof_parent;
        depth++;
    }
    return depth;
}

static lp_status add_step(const lp_axes *axes, lp_steps *out, lp_step step, lp_error *err)
{
    void *block = out->items;
    LP_TRY(lp_grow(&axes->allocator, &block, &out->capacity, out->count + 1, sizeof *out->items, err));
    out->items = block;
    out->items[out->count++] = step;
    return LP_OK;
}

lp_status lp_axes_path(lp_axes *axes, lp_atom a, lp_atom b, lp_steps *out, lp_error *err)
{
    size_t depth_a = proof_depth(axes, a), depth_b = proof_depth(axes, b);
    lp_steps back = {NULL, 0, 0};
    lp_status status = LP_OK;

    if (lp_axes_find(axes, a) != lp_axes_find(axes, b))
        return lp_error_set(err, LP_ERR_ARGUMENT, "the two positions do not belong to one axis");
    /* Climb from the deeper end until the two meet; the half that starts at b is then turned. */
    while (a != b && status == LP_OK) {
        bool from_a = depth_a >= depth_b;
        const lp_atom_node *node = &axes->atoms[from_a ? a : b];
        if (from_a) {
            status =
                add_step(axes, out, (lp_step){a, node->proof_parent, node->proof_op, node->proof_rule}, err);
            a = node->proof_parent;
            depth_a--;
        } else {
            status = add_step(axes, &back, (lp_step){node->proof_parent, b, node->proof_op, node->proof_rule},
                              err);
            b = node->proof_parent;
            depth_b--;
        }
    }
    for (size_t i = back.count; status == LP_OK && i-- > 0;)
        status = add_step(axes, out, back.items[i], err);
    lp_steps_free(&axes->allocator, &back);
    return status;
}

void lp_steps_free(const lp_allocator *allocator, lp_steps *steps)
{
    lp_release(allocator, steps->items, steps->capacity, sizeof *steps->items);
    memset(steps, 0, sizeof *steps);
}
