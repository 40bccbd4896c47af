#include "axis_internal.h"

#include <string.h>

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

static lp_status push(const lp_axes *axes, lp_atom **list, size_t *count, size_t *capacity, lp_atom atom,
                      lp_error *err)
{
    void *block = *list;
    lp_status status = lp_grow(&axes->allocator, &block, capacity, *count + 1, sizeof **list, err);
    if (status == LP_OK) {
        *list = block;
        (*list)[(*count)++] = atom;
    }
    return status;
}

lp_status lp_axes_push(lp_axes *axes, lp_atom atom, lp_error *err)
{
    return push(axes, &axes->stack, &axes->stack_count, &axes->stack_capacity, atom, err);
}

lp_status lp_axes_push_expr(lp_axes *axes, lp_expr expr, lp_error *err)
{
    for (uint32_t i = expr.len; i-- > 0;)
        LP_TRY(lp_axes_push(axes, axes->factors[expr.off + i], err));
    return LP_OK;
}

lp_status lp_axes_gather(lp_axes *axes, lp_atom atom, lp_error *err)
{
    return push(axes, &axes->gather, &axes->gather_count, &axes->gather_capacity, atom, err);
}

lp_status lp_axes_seal(lp_axes *axes, size_t base, lp_expr *out, lp_error *err)
{
    size_t length = axes->gather_count - base;
    void *block = axes->factors;

    axes->gather_count = base;
    if (axes->factor_count + length > UINT32_MAX)
        return lp_error_set(err, LP_ERR_OVERFLOW, "the axis expressions of this model exceed 2^32 factors");
    LP_TRY(lp_grow(&axes->allocator, &block, &axes->factor_capacity, axes->factor_count + length,
                   sizeof *axes->factors, err));
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
        return lp_error_set(err, LP_ERR_ARGUMENT,
                            "an axis of size %lld cannot be described: give inputs that leave no "
                            "dimension empty",
                            (long long)size);
    if (axes->atom_count >= LP_NO_ATOM)
        return lp_error_set(err, LP_ERR_OVERFLOW, "the model has more than 2^32 axes");
    LP_TRY(lp_grow(&axes->allocator, &block, &axes->atom_capacity, axes->atom_count + 1, sizeof *axes->atoms,
                   err));
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

lp_status lp_axes_single(lp_axes *axes, lp_atom atom, lp_expr *out, lp_error *err)
{
    size_t base = axes->gather_count;
    LP_TRY(lp_axes_gather(axes, atom, err));
    return lp_axes_seal(axes, base, out, err);
}

lp_status lp_axes_fresh(lp_axes *axes, int64_t size, lp_expr *out, lp_error *err)
{
    lp_atom atom = LP_NO_ATOM;

    *out = LP_EMPTY;
    if (size == 1)
        return LP_OK;
    LP_TRY(lp_axes_atom(axes, size, &atom, err));
    return lp_axes_single(axes, atom, out, err);
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

    LP_TRY(lp_axes_push_expr(axes, expr, err));
    while (axes->stack_count > base) {
        lp_atom root = lp_axes_find(axes, axes->stack[--axes->stack_count]);
        if (axes->atoms[root].definition == LP_PRODUCT)
            LP_TRY(lp_axes_push_expr(axes, axes->atoms[root].parts, err));
        else if (axes->atoms[root].size != 1)
            LP_TRY(lp_axes_gather(axes, root, err));
    }
    return lp_axes_seal(axes, gathered, out, err);
}

lp_status lp_axes_concat(lp_axes *axes, lp_expr outer, lp_expr inner, lp_expr *out, lp_error *err)
{
    size_t base = axes->gather_count;

    for (uint32_t i = 0; i < outer.len; i++)
        LP_TRY(lp_axes_gather(axes, axes->factors[outer.off + i], err));
    for (uint32_t i = 0; i < inner.len; i++)
        LP_TRY(lp_axes_gather(axes, axes->factors[inner.off + i], err));
    return lp_axes_seal(axes, base, out, err);
}

lp_status lp_axes_as_atom(lp_axes *axes, lp_expr expr, lp_atom *out, lp_error *err)
{
    lp_atom_node *node;

    if (expr.len == 1) {
        *out = axes->factors[expr.off];
        return LP_OK;
    }
    LP_TRY(lp_axes_atom(axes, lp_axes_size(axes, expr), out, err));
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
        LP_TRY(lp_axes_as_atom(axes, terms[i], &atom, err));
        LP_TRY(lp_axes_gather(axes, atom, err));
        if (axes->atoms[atom].size > INT64_MAX - size)
            return lp_error_set(err, LP_ERR_OVERFLOW, "the parts of a dimension add up to more than 2^63");
        size += axes->atoms[atom].size;
    }
    LP_TRY(lp_axes_seal(axes, base, &parts, err));
    if (count <= 1) {
        *out = count == 1 && axes->atoms[axes->factors[parts.off]].size != 1 ? parts : LP_EMPTY;
        return LP_OK;
    }
    LP_TRY(lp_axes_atom(axes, size, &atom, err));
    axes->atoms[atom].definition = LP_SUM;
    axes->atoms[atom].parts = parts;
    axes->atoms[atom].refined_by = axes->op;
    return lp_axes_single(axes, atom, out, err);
}

lp_status lp_axes_terms(lp_axes *axes, lp_atom sum, lp_expr *out, lp_error *err)
{
    size_t base = axes->stack_count, gathered = axes->gather_count;

    LP_TRY(lp_axes_push(axes, sum, err));
    while (axes->stack_count > base) {
        lp_atom root = lp_axes_find(axes, axes->stack[--axes->stack_count]);
        if (axes->atoms[root].definition == LP_SUM)
            LP_TRY(lp_axes_push_expr(axes, axes->atoms[root].parts, err));
        else
            LP_TRY(lp_axes_gather(axes, root, err));
    }
    return lp_axes_seal(axes, gathered, out, err);
}

void lp_axes_define(lp_axes *axes, lp_atom root, lp_definition definition, lp_expr parts)
{
    axes->atoms[root].definition = (uint8_t)definition;
    axes->atoms[root].parts = parts;
    axes->atoms[root].refined_by = axes->op;
}

lp_status lp_axes_leaves(lp_axes *axes, lp_expr expr, lp_expr *out, lp_error *err)
{
    size_t base = axes->stack_count, gathered = axes->gather_count;

    LP_TRY(lp_axes_push_expr(axes, expr, err));
    while (axes->stack_count > base) {
        lp_atom root = lp_axes_find(axes, axes->stack[--axes->stack_count]);
        if (axes->atoms[root].definition != LP_LEAF)
            LP_TRY(lp_axes_push_expr(axes, axes->atoms[root].parts, err));
        else
            LP_TRY(lp_axes_gather(axes, root, err));
    }
    return lp_axes_seal(axes, gathered, out, err);
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
