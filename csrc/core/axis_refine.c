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
        *aligned = need > 0;
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

static lp_status cut(lp_axes *axes, lp_expr expr, const int64_t *offsets, size_t count, lp_expr *out,
                     bool *aligned, int depth, lp_error *err);

/* A leaf becomes the sum of its pieces. */
static lp_status cut_leaf(lp_axes *axes, lp_atom root, const int64_t *offsets, size_t count, lp_expr *out,
                          lp_error *err)
{
    int64_t size = axes->atoms[root].size, at = 0;
    size_t base = axes->gather_count;
    lp_expr parts;

    for (size_t i = 0; i <= count; i++) {
        int64_t end = i < count ? offsets[i] : size;
        lp_atom part;
        LP_TRY(part_of(axes, root, end - at, &part, err));
        LP_TRY(lp_axes_gather(axes, part, err));
        at = end;
    }
    LP_TRY(lp_axes_seal(axes, base, &parts, err));
    lp_axes_define(axes, root, LP_SUM, parts);
    for (uint32_t i = 0; i < parts.len; i++)
        out[i] = axes->atoms[axes->factors[parts.off + i]].size == 1 ? LP_EMPTY : (lp_expr){parts.off + i, 1};
    return LP_OK;
}

/* A product is cut between the blocks of its outer factor. */
static lp_status cut_product(lp_axes *axes, lp_expr head, lp_expr tail, const int64_t *offsets, size_t count,
                             lp_expr *out, bool *aligned, int depth, lp_error *err)
{
    int64_t stride = lp_axes_size(axes, tail), *scaled;
    size_t capacity = 0;
    void *block = NULL;
    lp_status status;

    for (size_t i = 0; i < count; i++)
        if (offsets[i] % stride != 0) {
            *aligned = false;
            return LP_OK;
        }
    LP_TRY(lp_grow(&axes->allocator, &block, &capacity, count, sizeof *scaled, err));
    scaled = block;
    for (size_t i = 0; i < count; i++)
        scaled[i] = offsets[i] / stride;
    status = cut(axes, head, scaled, count, out, aligned, depth + 1, err);
    for (size_t i = 0; status == LP_OK && *aligned && i <= count; i++)
        status = lp_axes_concat(axes, out[i], tail, &out[i], err);
    lp_release(&axes->allocator, block, capacity, sizeof *scaled);
    return status;
}

/* A sum is cut between its terms, and within a term where a border falls there: one walk over the terms. */
static lp_status cut_sum(lp_axes *axes, lp_atom root, const int64_t *offsets, size_t count, lp_expr *out,
                         bool *aligned, int depth, lp_error *err)
{
    lp_expr terms, *piece, *sides;
    int64_t *inside, at = 0;
    size_t capacity = 0, inside_capacity = 0, length = 0, next = 0, done = 0;
    void *block = NULL, *inside_block = NULL;
    lp_status status;

    LP_TRY(lp_axes_terms(axes, root, &terms, err));
    LP_TRY(lp_grow(&axes->allocator, &block, &capacity, terms.len + count + 2, sizeof *piece, err));
    status = lp_grow(&axes->allocator, &inside_block, &inside_capacity, count, sizeof *inside, err);
    piece = block;
    sides = piece + terms.len + 1;
    inside = inside_block;
    for (uint32_t t = 0; status == LP_OK && t < terms.len; t++) {
        lp_expr term = {terms.off + t, 1};
        int64_t end = at + axes->atoms[axes->factors[term.off]].size;
        size_t borders = 0;
        if (next < count && offsets[next] == at) {
            status = lp_axes_sum(axes, piece, length, &out[done++], err);
            length = 0;
            next++;
        }
        for (; next < count && offsets[next] < end; next++)
            inside[borders++] = offsets[next] - at;
        at = end;
        if (borders == 0 || status != LP_OK) {
            piece[length++] = term;
            continue;
        }
        status = cut(axes, term, inside, borders, sides, aligned, depth + 1, err);
        if (status != LP_OK || !*aligned)
            break;
        piece[length++] = sides[0];
        status = lp_axes_sum(axes, piece, length, &out[done++], err);
        for (size_t i = 1; i < borders; i++)
            out[done++] = sides[i];
        piece[0] = sides[borders];
        length = 1;
    }
    if (status == LP_OK && *aligned)
        status = lp_axes_sum(axes, piece, length, &out[done], err);
    lp_release(&axes->allocator, block, capacity, sizeof *piece);
    lp_release(&axes->allocator, inside_block, inside_capacity, sizeof *inside);
    return status;
}

static lp_status cut(lp_axes *axes, lp_expr expr, const int64_t *offsets, size_t count, lp_expr *out,
                     bool *aligned, int depth, lp_error *err)
{
    lp_expr factors, head, tail;
    lp_atom root;

    *aligned = depth < MAX_NESTING;
    if (!*aligned)
        return LP_OK;
    LP_TRY(lp_axes_resolve(axes, expr, &factors, err));
    head = (lp_expr){factors.off, 1};
    tail = (lp_expr){factors.off + 1, factors.len - 1};
    root = axes->factors[factors.off];
    if (tail.len > 0)
        return cut_product(axes, head, tail, offsets, count, out, aligned, depth, err);
    if (axes->atoms[root].definition == LP_LEAF)
        return cut_leaf(axes, root, offsets, count, out, err);
    return cut_sum(axes, root, offsets, count, out, aligned, depth, err);
}

lp_status lp_axes_cut_at(lp_axes *axes, lp_expr expr, const int64_t *offsets, size_t count, lp_expr *out,
                         bool *aligned, lp_error *err)
{
    int64_t size = lp_axes_size(axes, expr);

    *aligned = true;
    for (size_t i = 0; i < count; i++)
        if (offsets[i] <= (i > 0 ? offsets[i - 1] : 0) || offsets[i] >= size)
            return lp_error_set(err, LP_ERR_ARGUMENT, "a dimension of size %lld cannot be cut at %lld",
                                (long long)size, (long long)offsets[i]);
    if (count == 0) {
        out[0] = expr;
        return LP_OK;
    }
    return cut(axes, expr, offsets, count, out, aligned, 0, err);
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
