/* Short names for the axis algebra, on one lp_axes for the whole program: what test_axis.c and
 * test_proofs.c are written in. */
#ifndef TESTS_CORE_ALGEBRA_H
#define TESTS_CORE_ALGEBRA_H

#include "check.h"
#include "core/axis_internal.h"

#include <stdlib.h>
#include <string.h>

static lp_axes axes;
static lp_error err;

#define OK(call) CHECK((call) == LP_OK, "%s", err.message)

static inline lp_expr fresh(int64_t size)
{
    lp_expr out = LP_EMPTY;
    OK(lp_axes_fresh(&axes, size, &out, &err));
    return out;
}

static inline lp_expr concat(lp_expr outer, lp_expr inner)
{
    lp_expr out = LP_EMPTY;
    OK(lp_axes_concat(&axes, outer, inner, &out, &err));
    return out;
}

static inline lp_expr sum(const lp_expr *terms, size_t count)
{
    lp_expr out = LP_EMPTY;
    OK(lp_axes_sum(&axes, terms, count, &out, &err));
    return out;
}

static inline lp_expr sum2(lp_expr a, lp_expr b)
{
    return sum((lp_expr[]){a, b}, 2);
}

static inline bool split2(lp_expr expr, int64_t outer, int64_t inner, lp_expr out[2])
{
    bool aligned = false;
    OK(lp_axes_split(&axes, expr, (int64_t[]){outer, inner}, 2, out, &aligned, &err));
    return aligned;
}

static inline bool cut1(lp_expr expr, int64_t at, lp_expr out[2])
{
    bool aligned = false;
    OK(lp_axes_cut(&axes, expr, &at, 1, out, &aligned, &err));
    return aligned;
}

static inline void unify(lp_expr a, lp_expr b)
{
    OK(lp_axes_unify(&axes, a, b, LP_RULE_EQUAL, &err));
}

/* The leaves of an expression, left to right. */
static inline size_t leaves(lp_expr expr, lp_atom *out, size_t capacity)
{
    lp_expr list = LP_EMPTY;
    OK(lp_axes_leaves(&axes, expr, &list, &err));
    for (uint32_t i = 0; i < list.len && i < capacity; i++)
        out[i] = axes.factors[list.off + i];
    return list.len;
}

static inline bool same_leaves(lp_expr a, lp_expr b)
{
    lp_atom left[64], right[64];
    size_t n = leaves(a, left, 64);
    return n == leaves(b, right, 64) && n <= 64 && memcmp(left, right, n * sizeof *left) == 0;
}

static inline bool sizes_are(lp_expr expr, const int64_t *sizes, size_t count)
{
    lp_atom list[64];
    bool equal = leaves(expr, list, 64) == count;
    for (size_t i = 0; equal && i < count; i++)
        equal = axes.atoms[list[i]].size == sizes[i];
    return equal;
}

#define SIZES(...) (const int64_t[]){__VA_ARGS__}, sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)

static inline bool frozen(lp_expr expr, lp_reason reason)
{
    lp_atom list[64];
    size_t count = leaves(expr, list, 64);

    for (size_t i = 0; i < count; i++) {
        bool found = false;
        for (uint32_t n = axes.atoms[list[i]].notes; n != 0; n = axes.notes[n].next)
            found |= axes.notes[n].reason == reason;
        if (!found || (axes.atoms[list[i]].flags & LP_FROZEN) == 0)
            return false;
    }
    return count > 0;
}

static inline bool free_of_notes(lp_expr expr)
{
    lp_atom list[64];
    size_t count = leaves(expr, list, 64);

    for (size_t i = 0; i < count; i++)
        if (axes.atoms[list[i]].notes != 0 || (axes.atoms[list[i]].flags & (LP_FROZEN | LP_MARKED)) != 0)
            return false;
    return true;
}

/* Set taken[p] for every position p of an expression that goes with index `index` of a leaf. */
static inline void take(lp_expr expr, lp_atom leaf, int64_t index, uint8_t *taken)
{
    lp_occurrences list = {NULL, 0, 0, NULL, 0, 0};

    OK(lp_axes_occurrences(&axes, expr, &list, &err));
    for (size_t k = 0; k < list.count; k++) {
        const lp_occurrence *item = &list.items[k];
        int64_t combinations = 1;
        if (item->leaf != leaf)
            continue;
        for (uint32_t l = 0; l < item->loop_count; l++)
            combinations *= list.loops[item->loop_first + l].count;
        for (int64_t c = 0; c < combinations; c++) {
            int64_t rest = c, position = item->offset + index * item->stride;
            for (uint32_t l = 0; l < item->loop_count; l++) {
                const lp_loop *loop = &list.loops[item->loop_first + l];
                position += rest % loop->count * loop->stride;
                rest /= loop->count;
            }
            taken[position] = 1;
        }
    }
    lp_occurrences_free(&axes.allocator, &list);
}

static inline bool takes(lp_expr expr, lp_atom leaf, int64_t index, const int64_t *positions, size_t count)
{
    uint8_t taken[256] = {0};
    size_t found = 0, all = 0;

    take(expr, leaf, index, taken);
    for (size_t i = 0; i < count; i++)
        found += taken[positions[i]];
    for (size_t p = 0; p < sizeof taken; p++)
        all += taken[p];
    return found == count && all == count && count > 0;
}

static inline lp_atom leaf_of(lp_expr expr, size_t nth)
{
    lp_atom list[64];
    return nth < leaves(expr, list, 64) ? list[nth] : LP_NO_ATOM;
}

static inline int64_t new_size(lp_expr expr, lp_atom leaf, int64_t count)
{
    int64_t *removed = calloc(axes.atom_count, sizeof *removed), out = -1;

    if (removed != NULL && leaf != LP_NO_ATOM)
        removed[leaf] = count;
    OK(lp_axes_new_size(&axes, expr, removed, &out, &err));
    free(removed);
    return out;
}

static inline void begin(void)
{
    lp_axes_init(&axes, lp_allocator_default());
}

static inline void end(void)
{
    CHECK(axes.stack_count == 0 && axes.gather_count == 0 && axes.work_count == 0,
          "scratch lists are left empty");
    lp_axes_free(&axes);
}

#endif
