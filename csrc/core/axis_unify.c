/* Unification with proofs, and what is noted of an axis: reasons, marks and roles. */
#include "axis_internal.h"

#define NOTES_PER_AXIS 8

lp_status lp_axes_later(lp_axes *axes, lp_expr a, lp_expr b, lp_rule rule, lp_error *err)
{
    void *block = axes->work;
    LP_TRY(lp_grow(&axes->allocator, &block, &axes->work_capacity, axes->work_count + 1, sizeof *axes->work,
                   err));
    axes->work = block;
    axes->work[axes->work_count++] = (lp_pair){a, b, (uint8_t)rule};
    return LP_OK;
}

/* Apply flags and notes to every leaf below an expression. */
static lp_status apply(lp_axes *axes, lp_expr expr, uint32_t flags, uint32_t notes, lp_error *err);

static lp_status add_note(lp_axes *axes, lp_atom root, uint32_t op, uint8_t reason, lp_error *err)
{
    void *block = axes->notes;
    unsigned length = 0;

    for (uint32_t i = axes->atoms[root].notes; i != 0; i = axes->notes[i].next) {
        if (axes->notes[i].reason == reason)
            return LP_OK;
        if (++length == NOTES_PER_AXIS)
            return LP_OK;
    }
    if (axes->note_count == 0)
        axes->note_count = 1; /* index 0 ends a list */
    LP_TRY(lp_grow(&axes->allocator, &block, &axes->note_capacity, axes->note_count + 1, sizeof *axes->notes,
                   err));
    axes->notes = block;
    axes->notes[axes->note_count] = (lp_note){op, axes->atoms[root].notes, reason};
    axes->atoms[root].notes = (uint32_t)axes->note_count++;
    return LP_OK;
}

static lp_status add_notes(lp_axes *axes, lp_atom root, uint32_t list, lp_error *err)
{
    for (uint32_t i = list; i != 0; i = axes->notes[i].next)
        LP_TRY(add_note(axes, root, axes->notes[i].op, axes->notes[i].reason, err));
    return LP_OK;
}

static lp_status apply(lp_axes *axes, lp_expr expr, uint32_t flags, uint32_t notes, lp_error *err)
{
    size_t base = axes->stack_count;

    if (flags == 0 && notes == 0)
        return LP_OK;
    LP_TRY(lp_axes_push_expr(axes, expr, err));
    while (axes->stack_count > base) {
        lp_atom root = lp_axes_find(axes, axes->stack[--axes->stack_count]);
        if (axes->atoms[root].definition != LP_LEAF) {
            LP_TRY(lp_axes_push_expr(axes, axes->atoms[root].parts, err));
        } else {
            axes->atoms[root].flags |= flags;
            LP_TRY(add_notes(axes, root, notes, err));
        }
    }
    return LP_OK;
}

static void prove(lp_axes *axes, lp_atom loser, lp_atom winner, lp_rule rule)
{
    /* Turn the proof tree of the smaller class so that `loser` is its root, then hang it below `winner`. */
    lp_atom_node *atoms = axes->atoms;
    lp_atom at = loser, above = winner;
    uint32_t op = axes->op;
    uint8_t label = (uint8_t)rule;

    for (;;) {
        lp_atom next = atoms[at].proof_parent;
        uint32_t next_op = atoms[at].proof_op;
        uint8_t next_rule = atoms[at].proof_rule;
        atoms[at].proof_parent = above;
        atoms[at].proof_op = op;
        atoms[at].proof_rule = label;
        if (next == at)
            return;
        above = at;
        at = next;
        op = next_op;
        label = next_rule;
    }
}

/* Merge the classes of two atoms of equal size, each a leaf or a sum; pairs of parts that follow go on the work list.
 * The proof joins the atoms themselves, since it is those that the operation met. */
static lp_status merge(lp_axes *axes, lp_atom a_met, lp_atom b_met, lp_rule rule, bool *aligned,
                       lp_error *err)
{
    lp_atom_node *atoms = axes->atoms;
    lp_atom a = lp_axes_find(axes, a_met), b = lp_axes_find(axes, b_met), winner = a, loser = b;
    lp_expr a_parts = atoms[a].parts, b_parts = atoms[b].parts;
    bool a_sum = atoms[a].definition == LP_SUM, b_sum = atoms[b].definition == LP_SUM;

    *aligned = true;
    if (a_sum && b_sum) {
        /* Cut both sums at the borders of either, then the pieces pair up. */
        lp_expr a_terms, b_terms, one_a, one_b, *pieces;
        int64_t *offsets, at_a = 0, at_b = 0, size = atoms[a].size;
        size_t count = 0, capacity = 0, piece_capacity = 0, i = 0, j = 0;
        void *block = NULL, *piece_block = NULL;
        lp_status status;

        LP_TRY(lp_axes_terms(axes, a, &a_terms, err));
        LP_TRY(lp_axes_terms(axes, b, &b_terms, err));
        LP_TRY(lp_axes_single(axes, a, &one_a, err));
        LP_TRY(lp_axes_single(axes, b, &one_b, err));
        LP_TRY(lp_grow(&axes->allocator, &block, &capacity, (size_t)a_terms.len + b_terms.len,
                       sizeof *offsets, err));
        offsets = block;
        while (i < a_terms.len || j < b_terms.len) {
            int64_t next_a =
                i < a_terms.len ? at_a + axes->atoms[axes->factors[a_terms.off + i]].size : INT64_MAX;
            int64_t next_b =
                j < b_terms.len ? at_b + axes->atoms[axes->factors[b_terms.off + j]].size : INT64_MAX;
            int64_t next = next_a < next_b ? next_a : next_b;
            if (next_a == next)
                at_a = next, i++;
            if (next_b == next)
                at_b = next, j++;
            if (next < size)
                offsets[count++] = next;
        }
        status =
            lp_grow(&axes->allocator, &piece_block, &piece_capacity, 2 * (count + 1), sizeof *pieces, err);
        pieces = piece_block;
        if (status == LP_OK)
            status = lp_axes_cut_at(axes, one_a, offsets, count, pieces, aligned, err);
        if (status == LP_OK && *aligned)
            status = lp_axes_cut_at(axes, one_b, offsets, count, pieces + count + 1, aligned, err);
        for (size_t k = 0; status == LP_OK && *aligned && k <= count; k++)
            status = lp_axes_later(axes, pieces[k], pieces[count + 1 + k], rule, err);
        lp_release(&axes->allocator, block, capacity, sizeof *offsets);
        lp_release(&axes->allocator, piece_block, piece_capacity, sizeof *pieces);
        if (status != LP_OK || !*aligned)
            return status;
    }
    atoms = axes->atoms;
    if (atoms[b].weight > atoms[a].weight) {
        winner = b;
        loser = a;
    }
    prove(axes, loser == a ? a_met : b_met, loser == a ? b_met : a_met, rule);
    atoms[loser].parent = winner;
    atoms[winner].weight += atoms[loser].weight;
    if (atoms[winner].definition == LP_LEAF && atoms[loser].definition != LP_LEAF) {
        atoms[winner].definition = atoms[loser].definition;
        atoms[winner].parts = atoms[loser].parts;
        atoms[winner].refined_by = atoms[loser].refined_by;
    }
    if (!a_sum && !b_sum) {
        atoms[winner].flags |= atoms[loser].flags;
        return add_notes(axes, winner, atoms[loser].notes, err);
    }
    if (!a_sum)
        return apply(axes, b_parts, atoms[a].flags, atoms[a].notes, err);
    if (!b_sum)
        return apply(axes, a_parts, atoms[b].flags, atoms[b].notes, err);
    return LP_OK;
}

/* Unify one pair; further pairs go on the work list. */
static lp_status unify_pair(lp_axes *axes, lp_pair pair, bool *aligned, lp_error *err)
{
    size_t base = axes->stack_count, b_base;

    /* a's pending factors lie on the stack, b's on the gather list, the next one on top; both are looked up anew at each
     * step, since a merge or refinement may have changed them. */
    *aligned = lp_axes_size(axes, pair.a) == lp_axes_size(axes, pair.b);
    if (!*aligned)
        return LP_OK;
    LP_TRY(lp_axes_push_expr(axes, pair.a, err));
    b_base = axes->gather_count;
    for (uint32_t i = pair.b.len; i-- > 0;)
        LP_TRY(lp_axes_gather(axes, axes->factors[pair.b.off + i], err));
    while (*aligned && axes->stack_count > base) {
        lp_atom a_met = axes->stack[axes->stack_count - 1], a = lp_axes_find(axes, a_met), b_met, b;
        int64_t a_size = axes->atoms[a].size, b_size;
        if (axes->atoms[a].definition == LP_PRODUCT || a_size == 1) {
            axes->stack_count--;
            if (a_size != 1)
                LP_TRY(lp_axes_push_expr(axes, axes->atoms[a].parts, err));
            continue;
        }
        if (axes->gather_count == b_base) {
            *aligned = false;
            break;
        }
        b_met = axes->gather[axes->gather_count - 1];
        b = lp_axes_find(axes, b_met);
        b_size = axes->atoms[b].size;
        if (axes->atoms[b].definition == LP_PRODUCT || b_size == 1) {
            lp_expr parts = axes->atoms[b].parts;
            axes->gather_count--;
            for (uint32_t i = b_size == 1 ? 0 : parts.len; i-- > 0;)
                LP_TRY(lp_axes_gather(axes, axes->factors[parts.off + i], err));
            continue;
        }
        if (a == b) {
            axes->stack_count--;
            axes->gather_count--;
        } else if (a_size == b_size) {
            axes->stack_count--;
            axes->gather_count--;
            LP_TRY(merge(axes, a_met, b_met, (lp_rule)pair.rule, aligned, err));
        } else if (a_size % b_size == 0) {
            LP_TRY(lp_axes_factor(axes, a, b_size, aligned, 0, err));
        } else if (b_size % a_size == 0) {
            LP_TRY(lp_axes_factor(axes, b, a_size, aligned, 0, err));
        } else {
            *aligned = false;
        }
    }
    axes->stack_count = base;
    axes->gather_count = b_base;
    return LP_OK;
}

lp_status lp_axes_drain(lp_axes *axes, lp_error *err)
{
    while (axes->work_count > 0) {
        lp_pair pair = axes->work[--axes->work_count];
        bool aligned;
        LP_TRY(unify_pair(axes, pair, &aligned, err));
        if (!aligned) {
            LP_TRY(lp_axes_note(axes, pair.a, LP_REASON_MISALIGNED, err));
            LP_TRY(lp_axes_note(axes, pair.b, LP_REASON_MISALIGNED, err));
        }
    }
    return LP_OK;
}

lp_status lp_axes_unify(lp_axes *axes, lp_expr a, lp_expr b, lp_rule rule, lp_error *err)
{
    LP_TRY(lp_axes_later(axes, a, b, rule, err));
    return lp_axes_drain(axes, err);
}

lp_status lp_axes_note(lp_axes *axes, lp_expr expr, lp_reason reason, lp_error *err)
{
    lp_expr leaves;

    if (axes->quiet)
        return LP_OK;
    LP_TRY(lp_axes_leaves(axes, expr, &leaves, err));
    for (uint32_t i = 0; i < leaves.len; i++)
        LP_TRY(lp_axes_note_atom(axes, axes->factors[leaves.off + i], reason, err));
    return LP_OK;
}

lp_status lp_axes_note_atom(lp_axes *axes, lp_atom root, lp_reason reason, lp_error *err)
{
    axes->atoms[root].flags |= reason < LP_REASON_MARK_BASE ? LP_FROZEN : LP_MARKED;
    return add_note(axes, root, axes->op, (uint8_t)reason, err);
}

lp_status lp_axes_role(lp_axes *axes, lp_expr expr, uint32_t roles, lp_error *err)
{
    return axes->quiet ? LP_OK : apply(axes, expr, roles, 0, err);
}

lp_status lp_axes_flags(lp_axes *axes, lp_expr expr, bool any, uint32_t *out, lp_error *err)
{
    lp_expr leaves;

    *out = 0;
    LP_TRY(lp_axes_leaves(axes, expr, &leaves, err));
    for (uint32_t i = 0; i < leaves.len; i++) {
        uint32_t flags = axes->atoms[axes->factors[leaves.off + i]].flags;
        *out = any ? *out | flags : i == 0 ? flags : *out & flags;
    }
    return LP_OK;
}
