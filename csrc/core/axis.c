#include "axis.h"

#include <string.h>

/* Sums nested in products nested in sums deeper than this are treated as misaligned, so that the C stack is never the
 * caller's to exhaust. */
#define MAX_NESTING 64

#define NOTES_PER_AXIS 8

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        lp_status try_status_ = (call);                                                                                \
        if (try_status_ != LP_OK)                                                                                      \
            return try_status_;                                                                                        \
    } while (0)

void lp_axes_init(lp_axes *axes, lp_allocator allocator)
{
    memset(axes, 0, sizeof *axes);
    axes->allocator = allocator;
    axes->op = LP_NO_OP;
}

void lp_axes_free(lp_axes *axes)
{
    lp_release(&axes->allocator, axes->atoms, axes->atom_capacity, sizeof *axes->atoms);
    lp_release(&axes->allocator, axes->factors, axes->factor_capacity, sizeof *axes->factors);
    lp_release(&axes->allocator, axes->notes, axes->note_capacity, sizeof *axes->notes);
    lp_release(&axes->allocator, axes->work, axes->work_capacity, sizeof *axes->work);
    lp_release(&axes->allocator, axes->stack, axes->stack_capacity, sizeof *axes->stack);
    lp_release(&axes->allocator, axes->gather, axes->gather_capacity, sizeof *axes->gather);
    lp_axes_init(axes, axes->allocator);
}

static lp_status push(const lp_axes *axes, lp_atom **list, size_t *count, size_t *capacity, lp_atom atom, lp_error *err)
{
    void *block = *list;
    lp_status status = lp_grow(&axes->allocator, &block, capacity, *count + 1, sizeof **list, err);
    if (status == LP_OK) {
        *list = block;
        (*list)[(*count)++] = atom;
    }
    return status;
}

static lp_status push_stack(lp_axes *axes, lp_atom atom, lp_error *err)
{
    return push(axes, &axes->stack, &axes->stack_count, &axes->stack_capacity, atom, err);
}

/* Factors in reverse, so that they pop outer to inner. */
static lp_status push_expr(lp_axes *axes, lp_expr expr, lp_error *err)
{
    for (uint32_t i = expr.len; i-- > 0;)
        TRY(push_stack(axes, axes->factors[expr.off + i], err));
    return LP_OK;
}

static lp_status push_gather(lp_axes *axes, lp_atom atom, lp_error *err)
{
    return push(axes, &axes->gather, &axes->gather_count, &axes->gather_capacity, atom, err);
}

/* Move what was gathered since `base` into the arena as one expression. */
static lp_status seal(lp_axes *axes, size_t base, lp_expr *out, lp_error *err)
{
    size_t length = axes->gather_count - base;
    void *block = axes->factors;

    axes->gather_count = base;
    if (axes->factor_count + length > UINT32_MAX)
        return lp_error_set(err, LP_ERR_OVERFLOW, "the axis expressions of this model exceed 2^32 factors");
    TRY(lp_grow(&axes->allocator, &block, &axes->factor_capacity, axes->factor_count + length, sizeof *axes->factors,
                err));
    axes->factors = block;
    if (length > 0)
        memcpy(axes->factors + axes->factor_count, axes->gather + base, length * sizeof *axes->factors);
    *out = (lp_expr){(uint32_t)axes->factor_count, (uint32_t)length};
    axes->factor_count += length;
    return LP_OK;
}

lp_status lp_axes_atom(lp_axes *axes, int64_t size, lp_atom *out, lp_error *err)
{
    void *block = axes->atoms;
    lp_atom_node *node;

    if (size < 1)
        return lp_error_set(err, LP_ERR_ARGUMENT, "an axis of size %lld cannot be described: give inputs that leave no "
                                                  "dimension empty",
                            (long long)size);
    if (axes->atom_count >= LP_NO_ATOM)
        return lp_error_set(err, LP_ERR_OVERFLOW, "the model has more than 2^32 axes");
    TRY(lp_grow(&axes->allocator, &block, &axes->atom_capacity, axes->atom_count + 1, sizeof *axes->atoms, err));
    axes->atoms = block;
    node = &axes->atoms[axes->atom_count];
    memset(node, 0, sizeof *node);
    node->size = size;
    node->parent = node->proof_parent = (lp_atom)axes->atom_count;
    node->weight = 1;
    node->refined_by = node->proof_op = LP_NO_OP;
    *out = (lp_atom)axes->atom_count++;
    return LP_OK;
}

static lp_status single(lp_axes *axes, lp_atom atom, lp_expr *out, lp_error *err)
{
    size_t base = axes->gather_count;
    TRY(push_gather(axes, atom, err));
    return seal(axes, base, out, err);
}

lp_status lp_axes_fresh(lp_axes *axes, int64_t size, lp_expr *out, lp_error *err)
{
    lp_atom atom = LP_NO_ATOM;

    *out = LP_EMPTY;
    if (size == 1)
        return LP_OK;
    TRY(lp_axes_atom(axes, size, &atom, err));
    return single(axes, atom, out, err);
}

lp_atom lp_axes_find(lp_axes *axes, lp_atom atom)
{
    lp_atom_node *atoms = axes->atoms;
    while (atoms[atom].parent != atom) {
        atoms[atom].parent = atoms[atoms[atom].parent].parent;
        atom = atoms[atom].parent;
    }
    return atom;
}

int64_t lp_axes_size(const lp_axes *axes, lp_expr expr)
{
    int64_t size = 1;
    for (uint32_t i = 0; i < expr.len; i++)
        size *= axes->atoms[axes->factors[expr.off + i]].size;
    return size;
}

lp_status lp_axes_resolve(lp_axes *axes, lp_expr expr, lp_expr *out, lp_error *err)
{
    size_t base = axes->stack_count, gathered = axes->gather_count;

    TRY(push_expr(axes, expr, err));
    while (axes->stack_count > base) {
        lp_atom root = lp_axes_find(axes, axes->stack[--axes->stack_count]);
        if (axes->atoms[root].definition == LP_PRODUCT)
            TRY(push_expr(axes, axes->atoms[root].parts, err));
        else if (axes->atoms[root].size != 1)
            TRY(push_gather(axes, root, err));
    }
    return seal(axes, gathered, out, err);
}

lp_status lp_axes_concat(lp_axes *axes, lp_expr outer, lp_expr inner, lp_expr *out, lp_error *err)
{
    size_t base = axes->gather_count;

    for (uint32_t i = 0; i < outer.len; i++)
        TRY(push_gather(axes, axes->factors[outer.off + i], err));
    for (uint32_t i = 0; i < inner.len; i++)
        TRY(push_gather(axes, axes->factors[inner.off + i], err));
    return seal(axes, base, out, err);
}

/* One atom that stands for the expression: itself, a unit, or a fresh product. */
static lp_status as_atom(lp_axes *axes, lp_expr expr, lp_atom *out, lp_error *err)
{
    lp_atom_node *node;

    if (expr.len == 1) {
        *out = axes->factors[expr.off];
        return LP_OK;
    }
    TRY(lp_axes_atom(axes, lp_axes_size(axes, expr), out, err));
    if (expr.len > 1) {
        node = &axes->atoms[*out];
        node->definition = LP_PRODUCT;
        node->parts = expr;
        node->refined_by = axes->op;
    }
    return LP_OK;
}

lp_status lp_axes_sum(lp_axes *axes, const lp_expr *terms, size_t count, lp_expr *out, lp_error *err)
{
    size_t base = axes->gather_count;
    int64_t size = 0;
    lp_expr parts;
    lp_atom atom;

    for (size_t i = 0; i < count; i++) {
        TRY(as_atom(axes, terms[i], &atom, err));
        TRY(push_gather(axes, atom, err));
        size += axes->atoms[atom].size;
    }
    TRY(seal(axes, base, &parts, err));
    if (count <= 1) {
        *out = count == 1 && axes->atoms[axes->factors[parts.off]].size != 1 ? parts : LP_EMPTY;
        return LP_OK;
    }
    TRY(lp_axes_atom(axes, size, &atom, err));
    axes->atoms[atom].definition = LP_SUM;
    axes->atoms[atom].parts = parts;
    axes->atoms[atom].refined_by = axes->op;
    return single(axes, atom, out, err);
}

/* The terms of a sum with nested sums flattened: roots that are leaves or products. */
static lp_status terms_of(lp_axes *axes, lp_atom sum, lp_expr *out, lp_error *err)
{
    size_t base = axes->stack_count, gathered = axes->gather_count;

    TRY(push_stack(axes, sum, err));
    while (axes->stack_count > base) {
        lp_atom root = lp_axes_find(axes, axes->stack[--axes->stack_count]);
        if (axes->atoms[root].definition == LP_SUM)
            TRY(push_expr(axes, axes->atoms[root].parts, err));
        else
            TRY(push_gather(axes, root, err));
    }
    return seal(axes, gathered, out, err);
}

/* A leaf that begins with what is known of the leaf it is a part of. */
static lp_status part_of(lp_axes *axes, lp_atom whole, int64_t size, lp_atom *out, lp_error *err)
{
    TRY(lp_axes_atom(axes, size, out, err));
    axes->atoms[*out].flags = axes->atoms[whole].flags;
    axes->atoms[*out].notes = axes->atoms[whole].notes;
    return LP_OK;
}

static void define(lp_axes *axes, lp_atom root, lp_definition definition, lp_expr parts)
{
    axes->atoms[root].definition = (uint8_t)definition;
    axes->atoms[root].parts = parts;
    axes->atoms[root].refined_by = axes->op;
}

static lp_status later(lp_axes *axes, lp_expr a, lp_expr b, lp_rule rule, lp_error *err)
{
    void *block = axes->work;
    TRY(lp_grow(&axes->allocator, &block, &axes->work_capacity, axes->work_count + 1, sizeof *axes->work, err));
    axes->work = block;
    axes->work[axes->work_count++] = (lp_pair){a, b, (uint8_t)rule};
    return LP_OK;
}

static lp_status split(lp_axes *axes, lp_expr expr, const int64_t *sizes, size_t count, lp_expr *out, bool *aligned,
                       int depth, lp_error *err);

/* Refine a leaf or sum into outer (of size `outer`) x inner.  A sum factors when every term does:
 * (a x p) + (b x p) = (a + b) x p, which makes the inner parts one axis. */
static lp_status factor(lp_axes *axes, lp_atom root, int64_t outer, bool *aligned, int depth, lp_error *err)
{
    int64_t inner = axes->atoms[root].size / outer;
    lp_expr terms, inner_expr = LP_EMPTY, sum, parts;
    size_t base;

    *aligned = true;
    if (axes->atoms[root].definition == LP_LEAF) {
        lp_atom a, b;
        TRY(part_of(axes, root, outer, &a, err));
        TRY(part_of(axes, root, inner, &b, err));
        base = axes->gather_count;
        TRY(push_gather(axes, a, err));
        TRY(push_gather(axes, b, err));
        TRY(seal(axes, base, &parts, err));
        define(axes, root, LP_PRODUCT, parts);
        return LP_OK;
    }
    TRY(terms_of(axes, root, &terms, err));
    if (depth >= MAX_NESTING)
        *aligned = false;
    for (uint32_t i = 0; i < terms.len; i++)
        if (axes->atoms[axes->factors[terms.off + i]].size % inner != 0)
            *aligned = false;
    if (!*aligned)
        return LP_OK;
    base = axes->gather_count;
    for (uint32_t i = 0; i < terms.len; i++) {
        lp_atom term = axes->factors[terms.off + i], outer_atom;
        int64_t sizes[2] = {axes->atoms[term].size / inner, inner};
        lp_expr one, pair[2];
        TRY(single(axes, term, &one, err));
        TRY(split(axes, one, sizes, 2, pair, aligned, depth + 1, err));
        if (!*aligned) {
            axes->gather_count = base;
            return LP_OK;
        }
        TRY(as_atom(axes, pair[0], &outer_atom, err));
        TRY(push_gather(axes, outer_atom, err));
        if (i == 0)
            inner_expr = pair[1];
        else
            TRY(later(axes, inner_expr, pair[1], LP_RULE_FORWARD, err));
    }
    TRY(seal(axes, base, &parts, err));
    {
        lp_atom atom;
        TRY(lp_axes_atom(axes, outer, &atom, err));
        define(axes, atom, LP_SUM, parts);
        TRY(single(axes, atom, &sum, err));
    }
    TRY(lp_axes_concat(axes, sum, inner_expr, &parts, err));
    define(axes, root, LP_PRODUCT, parts);
    return LP_OK;
}

static lp_status split(lp_axes *axes, lp_expr expr, const int64_t *sizes, size_t count, lp_expr *out, bool *aligned,
                       int depth, lp_error *err)
{
    size_t base = axes->stack_count;

    *aligned = true;
    TRY(push_expr(axes, expr, err));
    for (size_t t = 0; t < count && *aligned; t++) {
        int64_t need = sizes[t];
        size_t gathered = axes->gather_count;
        while (need > 1) {
            lp_atom root;
            int64_t size;
            if (axes->stack_count == base) {
                *aligned = false;
                break;
            }
            root = lp_axes_find(axes, axes->stack[--axes->stack_count]);
            size = axes->atoms[root].size;
            if (axes->atoms[root].definition == LP_PRODUCT) {
                TRY(push_expr(axes, axes->atoms[root].parts, err));
            } else if (size == 1) {
                continue;
            } else if (need % size == 0) {
                TRY(push_gather(axes, root, err));
                need /= size;
            } else if (size % need == 0) {
                TRY(factor(axes, root, need, aligned, depth, err));
                if (!*aligned)
                    break;
                TRY(push_stack(axes, root, err));
            } else {
                *aligned = false;
                break;
            }
        }
        if (*aligned)
            TRY(seal(axes, gathered, &out[t], err));
        else
            axes->gather_count = gathered;
    }
    while (*aligned && axes->stack_count > base)
        if (axes->atoms[axes->stack[--axes->stack_count]].size != 1)
            *aligned = false;
    axes->stack_count = base;
    return LP_OK;
}

/* Cut once at 0 < offset < size. */
static lp_status cut_once(lp_axes *axes, lp_expr expr, int64_t offset, lp_expr *left, lp_expr *right, bool *aligned,
                          int depth, lp_error *err)
{
    lp_expr factors, tail, head, l, r;
    lp_atom root;
    int64_t stride;

    *aligned = depth < MAX_NESTING;
    if (!*aligned)
        return LP_OK;
    TRY(lp_axes_resolve(axes, expr, &factors, err));
    tail = (lp_expr){factors.off + 1, factors.len - 1};
    head = (lp_expr){factors.off, 1};
    stride = lp_axes_size(axes, tail);
    root = axes->factors[factors.off];
    if (offset % stride != 0) {
        *aligned = false;
        return LP_OK;
    }
    if (tail.len > 0) {
        TRY(cut_once(axes, head, offset / stride, &l, &r, aligned, depth + 1, err));
        if (!*aligned)
            return LP_OK;
        TRY(lp_axes_concat(axes, l, tail, left, err));
        return lp_axes_concat(axes, r, tail, right, err);
    }
    if (axes->atoms[root].definition == LP_LEAF) {
        lp_atom a, b;
        lp_expr parts;
        size_t base = axes->gather_count;
        TRY(part_of(axes, root, offset, &a, err));
        TRY(part_of(axes, root, axes->atoms[root].size - offset, &b, err));
        TRY(push_gather(axes, a, err));
        TRY(push_gather(axes, b, err));
        TRY(seal(axes, base, &parts, err));
        define(axes, root, LP_SUM, parts);
        *left = axes->atoms[a].size == 1 ? LP_EMPTY : (lp_expr){parts.off, 1};
        *right = axes->atoms[b].size == 1 ? LP_EMPTY : (lp_expr){parts.off + 1, 1};
        return LP_OK;
    }
    {
        lp_expr terms, sides[2], *pieces;
        size_t before = 0, capacity = 0;
        int64_t at = 0, size;
        void *block = NULL;
        lp_status status;
        bool inside;

        TRY(terms_of(axes, root, &terms, err));
        while (at + (size = axes->atoms[axes->factors[terms.off + before]].size) <= offset) {
            at += size;
            before++;
        }
        inside = at < offset;
        if (inside) {
            lp_expr term = {(uint32_t)(terms.off + before), 1};
            TRY(cut_once(axes, term, offset - at, &sides[0], &sides[1], aligned, depth + 1, err));
            if (!*aligned)
                return LP_OK;
        }
        TRY(lp_grow(&axes->allocator, &block, &capacity, terms.len + 2u, sizeof *pieces, err));
        pieces = block;
        for (size_t i = 0; i < before; i++)
            pieces[i] = (lp_expr){(uint32_t)(terms.off + i), 1};
        if (inside)
            pieces[before] = sides[0];
        status = lp_axes_sum(axes, pieces, before + inside, left, err);
        if (inside)
            pieces[0] = sides[1];
        for (size_t i = before + inside; i < terms.len; i++)
            pieces[i - before] = (lp_expr){(uint32_t)(terms.off + i), 1};
        if (status == LP_OK)
            status = lp_axes_sum(axes, pieces, terms.len - before, right, err);
        lp_release(&axes->allocator, block, capacity, sizeof *pieces);
        return status;
    }
}

static lp_status cut(lp_axes *axes, lp_expr expr, const int64_t *offsets, size_t count, lp_expr *out, bool *aligned,
                     lp_error *err)
{
    int64_t at = 0;

    *aligned = true;
    for (size_t i = 0; i < count; i++) {
        lp_expr left, right;
        TRY(cut_once(axes, expr, offsets[i] - at, &left, &right, aligned, 0, err));
        if (!*aligned)
            return LP_OK;
        out[i] = left;
        expr = right;
        at = offsets[i];
    }
    out[count] = expr;
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
    TRY(lp_grow(&axes->allocator, &block, &axes->note_capacity, axes->note_count + 1, sizeof *axes->notes, err));
    axes->notes = block;
    axes->notes[axes->note_count] = (lp_note){op, axes->atoms[root].notes, reason};
    axes->atoms[root].notes = (uint32_t)axes->note_count++;
    return LP_OK;
}

static lp_status add_notes(lp_axes *axes, lp_atom root, uint32_t list, lp_error *err)
{
    for (uint32_t i = list; i != 0; i = axes->notes[i].next)
        TRY(add_note(axes, root, axes->notes[i].op, axes->notes[i].reason, err));
    return LP_OK;
}

static lp_status apply(lp_axes *axes, lp_expr expr, uint32_t flags, uint32_t notes, lp_error *err)
{
    size_t base = axes->stack_count;

    if (flags == 0 && notes == 0)
        return LP_OK;
    TRY(push_expr(axes, expr, err));
    while (axes->stack_count > base) {
        lp_atom root = lp_axes_find(axes, axes->stack[--axes->stack_count]);
        if (axes->atoms[root].definition != LP_LEAF) {
            TRY(push_expr(axes, axes->atoms[root].parts, err));
        } else {
            axes->atoms[root].flags |= flags;
            TRY(add_notes(axes, root, notes, err));
        }
    }
    return LP_OK;
}

static void prove(lp_axes *axes, lp_atom loser, lp_atom winner, lp_rule rule)
{
    /* Turn the loser's proof tree so that `loser` is its root, then hang it below `winner`. */
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

/* Merge two roots of equal size, each a leaf or a sum; pairs of parts that follow go on the work list. */
static lp_status merge(lp_axes *axes, lp_atom a, lp_atom b, lp_rule rule, bool *aligned, lp_error *err)
{
    lp_atom_node *atoms = axes->atoms;
    lp_atom winner = a, loser = b;
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

        TRY(terms_of(axes, a, &a_terms, err));
        TRY(terms_of(axes, b, &b_terms, err));
        TRY(single(axes, a, &one_a, err));
        TRY(single(axes, b, &one_b, err));
        TRY(lp_grow(&axes->allocator, &block, &capacity, (size_t)a_terms.len + b_terms.len, sizeof *offsets, err));
        offsets = block;
        while (i < a_terms.len || j < b_terms.len) {
            int64_t next_a = i < a_terms.len ? at_a + axes->atoms[axes->factors[a_terms.off + i]].size : INT64_MAX;
            int64_t next_b = j < b_terms.len ? at_b + axes->atoms[axes->factors[b_terms.off + j]].size : INT64_MAX;
            int64_t next = next_a < next_b ? next_a : next_b;
            if (next_a == next)
                at_a = next, i++;
            if (next_b == next)
                at_b = next, j++;
            if (next < size)
                offsets[count++] = next;
        }
        status = lp_grow(&axes->allocator, &piece_block, &piece_capacity, 2 * (count + 1), sizeof *pieces, err);
        pieces = piece_block;
        if (status == LP_OK)
            status = cut(axes, one_a, offsets, count, pieces, aligned, err);
        if (status == LP_OK && *aligned)
            status = cut(axes, one_b, offsets, count, pieces + count + 1, aligned, err);
        for (size_t k = 0; status == LP_OK && *aligned && k <= count; k++)
            status = later(axes, pieces[k], pieces[count + 1 + k], rule, err);
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
    prove(axes, loser, winner, rule);
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
    lp_expr b_list;
    lp_atom b;

    /* a's pending factors lie on the stack, b's on the gather list, the next one on top; both are looked up anew at each
     * step, since a merge or refinement may have changed them. */
    *aligned = lp_axes_size(axes, pair.a) == lp_axes_size(axes, pair.b);
    if (!*aligned)
        return LP_OK;
    TRY(lp_axes_resolve(axes, pair.b, &b_list, err));
    TRY(push_expr(axes, pair.a, err));
    b_base = axes->gather_count;
    for (uint32_t i = b_list.len; i-- > 0;)
        TRY(push_gather(axes, axes->factors[b_list.off + i], err));
    while (*aligned && axes->stack_count > base) {
        lp_atom a = lp_axes_find(axes, axes->stack[axes->stack_count - 1]);
        int64_t a_size = axes->atoms[a].size, b_size;
        if (axes->atoms[a].definition == LP_PRODUCT || a_size == 1) {
            axes->stack_count--;
            if (a_size != 1)
                TRY(push_expr(axes, axes->atoms[a].parts, err));
            continue;
        }
        if (axes->gather_count == b_base) {
            *aligned = false;
            break;
        }
        b = lp_axes_find(axes, axes->gather[axes->gather_count - 1]);
        b_size = axes->atoms[b].size;
        if (axes->atoms[b].definition == LP_PRODUCT || b_size == 1) {
            lp_expr parts = axes->atoms[b].parts;
            axes->gather_count--;
            for (uint32_t i = b_size == 1 ? 0 : parts.len; i-- > 0;)
                TRY(push_gather(axes, axes->factors[parts.off + i], err));
            continue;
        }
        if (a == b) {
            axes->stack_count--;
            axes->gather_count--;
        } else if (a_size == b_size) {
            axes->stack_count--;
            axes->gather_count--;
            TRY(merge(axes, a, b, (lp_rule)pair.rule, aligned, err));
        } else if (a_size % b_size == 0) {
            TRY(factor(axes, a, b_size, aligned, 0, err));
        } else if (b_size % a_size == 0) {
            TRY(factor(axes, b, a_size, aligned, 0, err));
        } else {
            *aligned = false;
        }
    }
    axes->stack_count = base;
    axes->gather_count = b_base;
    return LP_OK;
}

static lp_status drain(lp_axes *axes, lp_error *err)
{
    while (axes->work_count > 0) {
        lp_pair pair = axes->work[--axes->work_count];
        bool aligned;
        TRY(unify_pair(axes, pair, &aligned, err));
        if (!aligned) {
            TRY(lp_axes_note(axes, pair.a, LP_REASON_MISALIGNED, err));
            TRY(lp_axes_note(axes, pair.b, LP_REASON_MISALIGNED, err));
        }
    }
    return LP_OK;
}

lp_status lp_axes_unify(lp_axes *axes, lp_expr a, lp_expr b, lp_rule rule, lp_error *err)
{
    TRY(later(axes, a, b, rule, err));
    return drain(axes, err);
}

lp_status lp_axes_split(lp_axes *axes, lp_expr expr, const int64_t *sizes, size_t count, lp_expr *out, bool *aligned,
                        lp_error *err)
{
    TRY(split(axes, expr, sizes, count, out, aligned, 0, err));
    return drain(axes, err);
}

lp_status lp_axes_cut(lp_axes *axes, lp_expr expr, const int64_t *offsets, size_t count, lp_expr *out, bool *aligned,
                      lp_error *err)
{
    TRY(cut(axes, expr, offsets, count, out, aligned, err));
    return drain(axes, err);
}

lp_status lp_axes_leaves(lp_axes *axes, lp_expr expr, lp_expr *out, lp_error *err)
{
    size_t base = axes->stack_count, gathered = axes->gather_count;

    TRY(push_expr(axes, expr, err));
    while (axes->stack_count > base) {
        lp_atom root = lp_axes_find(axes, axes->stack[--axes->stack_count]);
        if (axes->atoms[root].definition != LP_LEAF)
            TRY(push_expr(axes, axes->atoms[root].parts, err));
        else
            TRY(push_gather(axes, root, err));
    }
    return seal(axes, gathered, out, err);
}

lp_status lp_axes_note(lp_axes *axes, lp_expr expr, lp_reason reason, lp_error *err)
{
    lp_expr leaves;

    if (axes->quiet)
        return LP_OK;
    TRY(lp_axes_leaves(axes, expr, &leaves, err));
    for (uint32_t i = 0; i < leaves.len; i++)
        TRY(lp_axes_note_atom(axes, axes->factors[leaves.off + i], reason, err));
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
    TRY(lp_axes_leaves(axes, expr, &leaves, err));
    for (uint32_t i = 0; i < leaves.len; i++) {
        uint32_t flags = axes->atoms[axes->factors[leaves.off + i]].flags;
        *out = any ? *out | flags : i == 0 ? flags : *out & flags;
    }
    return LP_OK;
}

/* A level of the walk of lp_axes_new_size. */
typedef struct {
    lp_expr parts;
    uint32_t at;
    bool sum;
    int64_t value;
} lp_level;

lp_status lp_axes_new_size(lp_axes *axes, lp_expr expr, const int64_t *removed, int64_t *out, lp_error *err)
{
    lp_level *levels;
    size_t depth = 1, capacity = 0;
    void *block = NULL;
    lp_status status = lp_grow(&axes->allocator, &block, &capacity, 16, sizeof *levels, err);

    if (status != LP_OK)
        return status;
    levels = block;
    levels[0] = (lp_level){expr, 0, false, 1};
    for (;;) {
        lp_level *level = &levels[depth - 1];
        int64_t value;
        if (level->at < level->parts.len) {
            lp_atom root = lp_axes_find(axes, axes->factors[level->parts.off + level->at++]);
            if (axes->atoms[root].definition != LP_LEAF) {
                bool sum = axes->atoms[root].definition == LP_SUM;
                status = lp_grow(&axes->allocator, &block, &capacity, depth + 1, sizeof *levels, err);
                if (status != LP_OK)
                    break;
                levels = block;
                levels[depth++] = (lp_level){axes->atoms[root].parts, 0, sum, sum ? 0 : 1};
                continue;
            }
            value = axes->atoms[root].size - (removed != NULL ? removed[root] : 0);
        } else {
            value = level->value;
            if (--depth == 0) {
                *out = value;
                break;
            }
            level = &levels[depth - 1];
        }
        if (level->sum)
            level->value += value;
        else
            level->value *= value;
    }
    lp_release(&axes->allocator, block, capacity, sizeof *levels);
    return status;
}
