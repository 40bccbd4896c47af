/* Refinement: an atom becomes a product where a view cuts its size, a sum where a slice cuts its positions. */
#include "axis_internal.h"

/* Sums nested in products nested in sums deeper than this are treated as misaligned, so that the C stack is never the
 * caller's to exhaust. */
#define MAX_NESTING 64

/* A leaf that begins with what is known of the leaf it is a part of. */
static lp_status part_of(lp_axes *axes, lp_atom whole, int64_t size, lp_atom *out, lp_error *err)
{
    LP_TRY(lp_axes_atom(axes, size, out, err));
    axes->atoms[*out].flags = axes->atoms[whole].flags;
    axes->atoms[*out].notes = axes->atoms[whole].notes;
    return LP_OK;
}

static lp_status split(lp_axes *axes, lp_expr expr, const int64_t *sizes, size_t count, lp_expr *out,
                       bool *aligned, int depth, lp_error *err);

lp_status lp_axes_factor(lp_axes *axes, lp_atom root, int64_t outer, bool *aligned, int depth, lp_error *err)
{
    int64_t inner = axes->atoms[root].size / outer;
    lp_expr terms, inner_expr = LP_EMPTY, sum, parts;
    size_t base;

    *aligned = true;
    if (axes->atoms[root].definition == LP_LEAF) {
        lp_atom a, b;
        LP_TRY(part_of(axes, root, outer, &a, err));
        LP_TRY(part_of(axes, root, inner, &b, err));
        base = axes->gather_count;
        LP_TRY(lp_axes_gather(axes, a, err));
        LP_TRY(lp_axes_gather(axes, b, err));
        LP_TRY(lp_axes_seal(axes, base, &parts, err));
        lp_axes_define(axes, root, LP_PRODUCT, parts);
        return LP_OK;
    }
    LP_TRY(lp_axes_terms(axes, root, &terms, err));
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
        LP_TRY(lp_axes_single(axes, term, &one, err));
        LP_TRY(split(axes, one, sizes, 2, pair, aligned, depth + 1, err));
        if (!*aligned) {
            axes->gather_count = base;
            return LP_OK;
        }
        LP_TRY(lp_axes_as_atom(axes, pair[0], &outer_atom, err));
        LP_TRY(lp_axes_gather(axes, outer_atom, err));
        if (i == 0)
            inner_expr = pair[1];
        else
            LP_TRY(lp_axes_later(axes, inner_expr, pair[1], LP_RULE_FORWARD, err));
    }
    LP_TRY(lp_axes_seal(axes, base, &parts, err));
    {
        lp_atom atom;
        LP_TRY(lp_axes_atom(axes, outer, &atom, err));
        lp_axes_define(axes, atom, LP_SUM, parts);
        LP_TRY(lp_axes_single(axes, atom, &sum, err));
    }
    LP_TRY(lp_axes_concat(axes, sum, inner_expr, &parts, err));
    lp_axes_define(axes, root, LP_PRODUCT, parts);
    return LP_OK;
}

static lp_status split(lp_axes *axes, lp_expr expr, const int64_t *sizes, size_t count, lp_expr *out,
                       bool *aligned, int depth, lp_error *err)
{
    size_t base = axes->stack_count;

    *aligned = true;
    LP_TRY(lp_axes_push_expr(axes, expr, err));
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
                LP_TRY(lp_axes_push_expr(axes, axes->atoms[root].parts, err));
            } else if (size == 1) {
                continue;
            } else if (need % size == 0) {
                LP_TRY(lp_axes_gather(axes, root, err));
                need /= size;
            } else if (size % need == 0) {
                LP_TRY(lp_axes_factor(axes, root, need, aligned, depth, err));
                if (!*aligned)
                    break;
                LP_TRY(lp_axes_push(axes, root, err));
            } else {
                *aligned = false;
                break;
            }
        }
        if (*aligned)
            LP_TRY(lp_axes_seal(axes, gathered, &out[t], err));
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
static lp_status cut_once(lp_axes *axes, lp_expr expr, int64_t offset, lp_expr *left, lp_expr *right,
                          bool *aligned, int depth, lp_error *err)
{
    lp_expr factors, tail, head, l, r;
    lp_atom root;
    int64_t stride;

    *aligned = depth < MAX_NESTING;
    if (!*aligned)
        return LP_OK;
    LP_TRY(lp_axes_resolve(axes, expr, &factors, err));
    tail = (lp_expr){factors.off + 1, factors.len - 1};
    head = (lp_expr){factors.off, 1};
    stride = lp_axes_size(axes, tail);
    root = axes->factors[factors.off];
    if (offset % stride != 0) {
        *aligned = false;
        return LP_OK;
    }
    if (tail.len > 0) {
        LP_TRY(cut_once(axes, head, offset / stride, &l, &r, aligned, depth + 1, err));
        if (!*aligned)
            return LP_OK;
        LP_TRY(lp_axes_concat(axes, l, tail, left, err));
        return lp_axes_concat(axes, r, tail, right, err);
    }
    if (axes->atoms[root].definition == LP_LEAF) {
        lp_atom a, b;
        lp_expr parts;
        size_t base = axes->gather_count;
        LP_TRY(part_of(axes, root, offset, &a, err));
        LP_TRY(part_of(axes, root, axes->atoms[root].size - offset, &b, err));
        LP_TRY(lp_axes_gather(axes, a, err));
        LP_TRY(lp_axes_gather(axes, b, err));
        LP_TRY(lp_axes_seal(axes, base, &parts, err));
        lp_axes_define(axes, root, LP_SUM, parts);
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

        LP_TRY(lp_axes_terms(axes, root, &terms, err));
        while (at + (size = axes->atoms[axes->factors[terms.off + before]].size) <= offset) {
            at += size;
            before++;
        }
        inside = at < offset;
        if (inside) {
            lp_expr term = {(uint32_t)(terms.off + before), 1};
            LP_TRY(cut_once(axes, term, offset - at, &sides[0], &sides[1], aligned, depth + 1, err));
            if (!*aligned)
                return LP_OK;
        }
        LP_TRY(lp_grow(&axes->allocator, &block, &capacity, terms.len + 2u, sizeof *pieces, err));
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

lp_status lp_axes_cut_at(lp_axes *axes, lp_expr expr, const int64_t *offsets, size_t count, lp_expr *out,
                         bool *aligned, lp_error *err)
{
    int64_t at = 0;

    *aligned = true;
    for (size_t i = 0; i < count; i++) {
        lp_expr left, right;
        LP_TRY(cut_once(axes, expr, offsets[i] - at, &left, &right, aligned, 0, err));
        if (!*aligned)
            return LP_OK;
        out[i] = left;
        expr = right;
        at = offsets[i];
    }
    out[count] = expr;
    return LP_OK;
}

lp_status lp_axes_split(lp_axes *axes, lp_expr expr, const int64_t *sizes, size_t count, lp_expr *out,
                        bool *aligned, lp_error *err)
{
    LP_TRY(split(axes, expr, sizes, count, out, aligned, 0, err));
    return lp_axes_drain(axes, err);
}

lp_status lp_axes_cut(lp_axes *axes, lp_expr expr, const int64_t *offsets, size_t count, lp_expr *out,
                      bool *aligned, lp_error *err)
{
    LP_TRY(lp_axes_cut_at(axes, expr, offsets, count, out, aligned, err));
    return lp_axes_drain(axes, err);
}
