/* axis.h: each operation of the algebra, on its own and against positions counted by hand. */
#include "algebra.h"

static void test_fresh_concat_resolve(void)
{
    lp_expr a, b, ab, resolved = LP_EMPTY;
    lp_atom atom;

    begin();
    a = fresh(3), b = fresh(4);
    CHECK(fresh(1).len == 0, "size 1 is the empty expression");
    CHECK(lp_axes_atom(&axes, 0, &atom, &err) == LP_ERR_ARGUMENT, "no atom is empty");
    CHECK(strstr(err.message, "size 0") != NULL, "%s", err.message);
    ab = concat(a, b);
    CHECK(lp_axes_size(&axes, ab) == 12 && lp_axes_size(&axes, LP_EMPTY) == 1, "sizes multiply");
    CHECK(sizes_are(ab, SIZES(3, 4)), "outer first");
    CHECK(same_leaves(concat(LP_EMPTY, a), a) && same_leaves(concat(a, LP_EMPTY), a), "1 is neutral");
    OK(lp_axes_resolve(&axes, sum2(ab, LP_EMPTY), &resolved, &err));
    CHECK(resolved.len == 1 && lp_axes_size(&axes, resolved) == 13, "a sum stays one factor");
    end();
}

static void test_sum(void)
{
    lp_expr gate, up, fused, unit;

    begin();
    gate = fresh(5), up = fresh(7), fused = sum2(gate, up);
    CHECK(lp_axes_size(&axes, fused) == 12 && sizes_are(fused, SIZES(5, 7)), "2I = gate + up");
    CHECK(takes(fused, leaf_of(up, 0), 2, SIZES(7)), "the second term starts behind the first");
    CHECK(same_leaves(sum(&gate, 1), gate), "a sum of one term is that term");
    CHECK(sum(NULL, 0).len == 0, "a sum of no terms is empty");
    unit = sum2(LP_EMPTY, gate);
    CHECK(lp_axes_size(&axes, unit) == 6 && sizes_are(unit, SIZES(1, 5)), "a term of size 1 is a unit atom");
    CHECK(new_size(fused, leaf_of(gate, 0), 2) == 10, "what a term loses, the sum loses");
    fused = sum2(LP_EMPTY, LP_EMPTY);
    CHECK(lp_axes_size(&axes, fused) == 2, "1 + 1");
    end();
}

static void test_split(void)
{
    lp_expr hidden, pair[2], three[3], again[2];
    bool aligned;

    begin();
    hidden = fresh(24);
    CHECK(split2(hidden, 4, 6, pair), "24 = 4 x 6");
    CHECK(lp_axes_size(&axes, pair[0]) == 4 && lp_axes_size(&axes, pair[1]) == 6, "outer, inner");
    CHECK(split2(hidden, 4, 6, again) && same_leaves(pair[0], again[0]),
          "the same split finds the same parts");
    OK(lp_axes_split(&axes, hidden, (int64_t[]){2, 2, 6}, 3, three, &aligned, &err));
    CHECK(aligned && sizes_are(hidden, SIZES(2, 2, 6)), "a finer split refines");
    CHECK(sizes_are(pair[0], SIZES(2, 2)), "whoever refers to the atom sees its parts");
    CHECK(!split2(hidden, 3, 8, again), "3 does not align with 2 x 2 x 6");
    CHECK(!split2(hidden, 4, 5, again) && !split2(hidden, 0, 24, again), "sizes that do not multiply to 24");
    OK(lp_axes_split(&axes, hidden, (int64_t[]){1, 24, 1}, 3, three, &aligned, &err));
    CHECK(aligned && three[0].len == 0 && three[2].len == 0 && same_leaves(three[1], hidden),
          "ones are free");
    CHECK(takes(hidden, leaf_of(pair[1], 0), 5, SIZES(5, 11, 17, 23)),
          "inner index: one position in each block");
    CHECK(takes(hidden, leaf_of(three[1], 0), 1, SIZES(12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)),
          "outer index: a block");
    CHECK(new_size(hidden, leaf_of(pair[1], 0), 2) == 16, "4 x (6 - 2)");
    CHECK(free_of_notes(hidden), "a split that fails freezes nothing by itself");
    end();
}

static void test_split_of_a_sum_factors_its_terms(void)
{
    lp_expr a, b, fused, pair[2];

    begin(); /* fused q (6 heads) and k (2 heads) of dim 4: 32 = (6 + 2) x 4 */
    a = fresh(24), b = fresh(8), fused = sum2(a, b);
    CHECK(split2(fused, 8, 4, pair), "(6 x 4) + (2 x 4) = (6 + 2) x 4");
    CHECK(sizes_are(a, SIZES(6, 4)) && sizes_are(b, SIZES(2, 4)), "both terms factor");
    CHECK(leaf_of(a, 1) == leaf_of(b, 1) && leaf_of(a, 0) != leaf_of(b, 0), "their inner parts are one axis");
    CHECK(sizes_are(pair[0], SIZES(6, 2)), "the outer part is a sum");
    CHECK(takes(fused, leaf_of(b, 0), 1, SIZES(28, 29, 30, 31)), "the last head");
    CHECK(takes(fused, leaf_of(a, 1), 3, SIZES(3, 7, 11, 15, 19, 23, 27, 31)), "one dimension of all heads");
    end();
    begin();
    fused = sum2(fresh(6), fresh(4));
    CHECK(split2(fused, 5, 2, pair) && sizes_are(fused, SIZES(3, 2, 2)), "6 + 4 = (3 + 2) x 2 aligns");
    end();
    begin();
    fused = sum2(fresh(5), fresh(4));
    CHECK(!split2(fused, 3, 3, pair), "5 + 4 has no factor 3 in each term");
    CHECK(sizes_are(fused, SIZES(5, 4)), "and stays as it was");
    end();
}

static void test_cut(void)
{
    lp_expr whole, parts[3], halves[2], product;
    bool aligned;

    begin();
    whole = fresh(12);
    OK(lp_axes_cut(&axes, whole, (int64_t[]){3, 7}, 2, parts, &aligned, &err));
    CHECK(aligned && sizes_are(whole, SIZES(3, 4, 5)), "two cuts make three pieces");
    CHECK(cut1(whole, 3, halves) && same_leaves(halves[0], parts[0]), "an old border is found again");
    CHECK(sizes_are(halves[1], SIZES(4, 5)), "behind it the rest");
    CHECK(cut1(whole, 5, halves) && sizes_are(whole, SIZES(3, 2, 2, 5)),
          "a cut inside a term refines the term");
    CHECK(takes(whole, leaf_of(whole, 3), 0, SIZES(7)), "positions do not move");
    CHECK(cut1(whole, 11, halves) && lp_axes_size(&axes, halves[1]) == 1, "a piece of size 1");
    product = concat(fresh(3), fresh(5));
    CHECK(cut1(product, 10, halves), "a cut between blocks");
    CHECK(sizes_are(product, SIZES(2, 1, 5)) && sizes_are(halves[0], SIZES(2, 5)), "cuts the outer factor");
    CHECK(!cut1(product, 7, halves), "a cut within a block does not align");
    OK(lp_axes_cut(&axes, whole, NULL, 0, parts, &aligned, &err));
    CHECK(aligned && same_leaves(parts[0], whole), "no cut leaves the whole");
    end();
}

static void test_cut_refuses_borders_outside(void)
{
    const int64_t borders[][2] = {{0, 3}, {3, 3}, {5, 3}, {3, 6}, {3, 7}, {-1, 2}};
    lp_expr parts[3];
    bool aligned;

    begin();
    for (size_t i = 0; i < sizeof borders / sizeof borders[0]; i++) {
        lp_expr whole = sum2(fresh(2), fresh(4));
        lp_status status = lp_axes_cut(&axes, whole, borders[i], 2, parts, &aligned, &err);
        CHECK(status == LP_ERR_ARGUMENT, "borders %lld, %lld: status %d", (long long)borders[i][0],
              (long long)borders[i][1], (int)status);
    }
    CHECK(lp_axes_cut(&axes, LP_EMPTY, (int64_t[]){1}, 1, parts, &aligned, &err) == LP_ERR_ARGUMENT,
          "size 1");
    end();
}

static void test_unify_products(void)
{
    lp_expr kv, group, heads, dim, q, hidden, parts[2];

    begin(); /* GQA: repeat_kv makes H = KV x G, o_proj reads H x D as one hidden dimension */
    kv = fresh(2), group = fresh(3), heads = fresh(6), dim = fresh(4);
    unify(heads, concat(kv, group));
    CHECK(sizes_are(heads, SIZES(2, 3)), "H = KV x G");
    q = fresh(24), hidden = concat(heads, dim);
    unify(hidden, q);
    CHECK(leaf_of(q, 0) == leaf_of(kv, 0) && leaf_of(q, 1) == leaf_of(group, 0) &&
              leaf_of(q, 2) == leaf_of(dim, 0),
          "q's rows are KV x G x D");
    CHECK(takes(q, leaf_of(group, 0), 1, SIZES(4, 5, 6, 7, 16, 17, 18, 19)), "a query head of each KV head");
    CHECK(takes(q, leaf_of(kv, 0), 1, SIZES(12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)),
          "a whole KV head");
    end();

    begin(); /* two products whose borders nest: 24 = 4 x 6 and 24 = 2 x 12 give 2 x 2 x 6 */
    q = concat(fresh(4), fresh(6)), hidden = concat(fresh(2), fresh(12));
    unify(q, hidden);
    CHECK(sizes_are(q, SIZES(2, 2, 6)) && same_leaves(q, hidden), "common refinement");
    CHECK(free_of_notes(q), "nothing freezes");
    end();

    begin(); /* 6 x 4 against 4 x 6: no border in common */
    q = concat(fresh(6), fresh(4)), hidden = concat(fresh(4), fresh(6));
    axes.op = 3;
    unify(q, hidden);
    CHECK(frozen(q, LP_REASON_MISALIGNED) && frozen(hidden, LP_REASON_MISALIGNED), "both sides freeze");
    CHECK(axes.notes[axes.atoms[leaf_of(q, 0)].notes].op == 3, "the note names the operation");
    end();

    begin();
    q = fresh(6), hidden = fresh(7);
    unify(q, hidden);
    CHECK(frozen(q, LP_REASON_MISALIGNED) && frozen(hidden, LP_REASON_MISALIGNED), "sizes differ");
    CHECK(!same_leaves(q, hidden), "and nothing is united");
    axes.quiet = true;
    q = fresh(6);
    unify(q, hidden);
    CHECK(free_of_notes(q), "a dead operation freezes nothing");
    axes.quiet = false;
    CHECK(split2(fresh(6), 2, 3, parts), "splitting is untouched");
    end();
}

static void test_unify_sums(void)
{
    lp_expr a, b, p, rotated, dim, halves[2], half;

    begin(); /* 3 + 5 and 4 + 4 refine each other to 3 + 1 + 4 */
    a = sum2(fresh(3), fresh(5)), b = sum2(fresh(4), fresh(4));
    unify(a, b);
    CHECK(sizes_are(a, SIZES(3, 1, 4)) && same_leaves(a, b), "both borders cut both sums");
    CHECK(free_of_notes(a), "nothing freezes");
    end();

    begin(); /* rotate_half: cat(-x[half:], x[:half]) added to x makes both halves one axis */
    dim = fresh(8);
    CHECK(cut1(dim, 4, halves), "chunk(2)");
    rotated = sum2(halves[1], halves[0]);
    unify(dim, rotated);
    CHECK(leaf_of(dim, 0) == leaf_of(dim, 1) && sizes_are(dim, SIZES(4, 4)), "D = P + P");
    CHECK(takes(dim, leaf_of(dim, 0), 1, SIZES(1, 5)), "a rope pair");
    CHECK(new_size(dim, leaf_of(dim, 0), 1) == 6, "each index counts twice");
    half = fresh(4);
    unify(half, halves[0]);
    CHECK(leaf_of(half, 0) == leaf_of(dim, 1), "the cosine table's axis is the same");
    p = fresh(8);
    unify(p, dim);
    CHECK(same_leaves(p, dim), "a leaf takes the sum on");
    end();

    begin(); /* a leaf that carries notes hands them to the terms of the sum it meets */
    a = fresh(8);
    OK(lp_axes_note(&axes, a, LP_REASON_VALUE, &err));
    OK(lp_axes_role(&axes, a, LP_ROLE_LINEAR_OUT, &err));
    b = sum2(fresh(3), fresh(5));
    unify(a, b);
    CHECK(frozen(b, LP_REASON_VALUE), "every term is frozen");
    CHECK((axes.atoms[leaf_of(b, 1)].flags & LP_ROLE_LINEAR_OUT) != 0, "and has the role");
    end();

    begin(); /* (a x p) + (b x p) against c x p */
    a = concat(fresh(3), fresh(2)), b = concat(fresh(4), fresh(2));
    p = concat(fresh(7), fresh(2));
    unify(sum2(a, b), p);
    CHECK(leaf_of(a, 1) == leaf_of(p, 2) && leaf_of(b, 1) == leaf_of(p, 2), "one p");
    CHECK(sizes_are(p, SIZES(3, 4, 2)), "c = a + b");
    CHECK(free_of_notes(p), "nothing freezes");
    end();

    begin(); /* 5 + 4 against 3 x 3 */
    a = sum2(fresh(5), fresh(4)), b = concat(fresh(3), fresh(3));
    unify(a, b);
    CHECK(frozen(a, LP_REASON_MISALIGNED) && frozen(b, LP_REASON_MISALIGNED), "no common refinement");
    end();
}

static void test_fused_projections(void)
{
    lp_expr fused, parts[3], gate, up, down, heads[3], q, k, v;
    bool aligned;

    begin(); /* gate_up: chunk(2), silu(gate) * up, down */
    fused = fresh(12), down = fresh(6);
    CHECK(cut1(fused, 6, parts), "chunk");
    gate = parts[0], up = parts[1];
    unify(gate, up);
    unify(gate, down);
    CHECK(takes(fused, leaf_of(down, 0), 2, SIZES(2, 8)), "a channel is a gate row and an up row");
    CHECK(new_size(fused, leaf_of(down, 0), 2) == 8, "the fused weight loses both");
    end();

    begin(); /* qkv of 4 query heads and 2 key-value heads of dim 3: 12 + 6 + 6 */
    fused = fresh(24);
    OK(lp_axes_cut(&axes, fused, (int64_t[]){12, 18}, 2, parts, &aligned, &err));
    CHECK(aligned, "split into q, k, v");
    CHECK(split2(parts[0], 4, 3, heads), "q by heads");
    q = heads[0];
    CHECK(split2(parts[1], 2, 3, heads), "k by heads");
    k = heads[0];
    CHECK(split2(parts[2], 2, 3, heads), "v by heads");
    v = heads[0];
    unify(k, v);
    unify(q, concat(k, fresh(2)));
    CHECK(sizes_are(fused, SIZES(2, 2, 3, 2, 3, 2, 3)), "24 = (KV x G x D) + (KV x D) + (KV x E)");
    CHECK(takes(fused, leaf_of(k, 0), 1, SIZES(6, 7, 8, 9, 10, 11, 15, 16, 17, 21, 22, 23)), "a KV head");
    end();
}

static void test_parts_inherit(void)
{
    lp_expr whole, pair[2], halves[2];

    begin();
    whole = fresh(12);
    axes.op = 5;
    OK(lp_axes_note(&axes, whole, LP_REASON_INDEXED, &err));
    OK(lp_axes_note(&axes, whole, LP_MARK_NORM, &err));
    OK(lp_axes_role(&axes, whole, LP_ROLE_EMBEDDING, &err));
    CHECK(split2(whole, 3, 4, pair) && cut1(pair[1], 1, halves), "refine");
    CHECK(frozen(whole, LP_REASON_INDEXED), "parts of a frozen axis are frozen");
    for (size_t i = 0; i < 3; i++)
        CHECK((axes.atoms[leaf_of(whole, i)].flags & (LP_MARKED | LP_ROLE_EMBEDDING)) ==
                  (LP_MARKED | LP_ROLE_EMBEDDING),
              "part %zu has the mark and the role", i);
    OK(lp_axes_note(&axes, pair[0], LP_REASON_OUTPUT, &err));
    CHECK(!frozen(pair[1], LP_REASON_OUTPUT), "what is noted later of one part is not of the other");
    end();
}

static void test_notes_roles_flags(void)
{
    lp_expr a, b, both;
    uint32_t flags;

    begin();
    a = fresh(3), b = fresh(4), both = concat(a, b);
    OK(lp_axes_note(&axes, a, LP_MARK_MEAN, &err));
    CHECK(!frozen(a, LP_MARK_MEAN) && (axes.atoms[leaf_of(a, 0)].flags & LP_MARKED) != 0,
          "a mark does not freeze");
    OK(lp_axes_role(&axes, b, LP_ROLE_GATED, &err));
    OK(lp_axes_flags(&axes, both, false, &flags, &err));
    CHECK(flags == 0, "no bit is on all leaves");
    OK(lp_axes_flags(&axes, both, true, &flags, &err));
    CHECK(flags == (LP_MARKED | LP_ROLE_GATED), "two bits are on some");
    OK(lp_axes_flags(&axes, LP_EMPTY, true, &flags, &err));
    CHECK(flags == 0, "none on the empty expression");
    for (int i = 0; i < 3; i++)
        OK(lp_axes_note(&axes, a, LP_REASON_OUTPUT, &err));
    CHECK(axes.notes[axes.atoms[leaf_of(a, 0)].notes].reason == LP_REASON_OUTPUT &&
              axes.notes[axes.notes[axes.atoms[leaf_of(a, 0)].notes].next].next == 0,
          "a reason is noted once");
    axes.quiet = true;
    OK(lp_axes_note(&axes, b, LP_REASON_OUTPUT, &err));
    OK(lp_axes_role(&axes, b, LP_ROLE_ROUTED, &err));
    CHECK(!frozen(b, LP_REASON_OUTPUT) && (axes.atoms[leaf_of(b, 0)].flags & LP_ROLE_ROUTED) == 0, "quiet");
    axes.quiet = false;
    unify(a, fresh(3));
    CHECK(frozen(a, LP_REASON_OUTPUT), "a union keeps the notes of both");
    for (int reason = LP_REASON_INPUT; reason < LP_REASON_MARK_BASE; reason++)
        OK(lp_axes_note(&axes, b, (lp_reason)reason, &err));
    CHECK(frozen(b, LP_REASON_INPUT), "the first reasons stay when there are many");
    end();
}

static void test_occurrences_are_in_order(void)
{
    lp_expr p, q, dim;
    lp_occurrences list = {NULL, 0, 0, NULL, 0, 0};

    begin(); /* 2 x (p + q + p): strides, offsets and loops */
    p = fresh(3), q = fresh(2);
    dim = concat(fresh(2), sum((lp_expr[]){p, q, p}, 3));
    OK(lp_axes_occurrences(&axes, dim, &list, &err));
    CHECK(list.count == 4, "%zu occurrences", list.count);
    if (list.count == 4) {
        CHECK(list.items[0].stride == 8 && list.items[0].loop_count == 1, "the outer factor");
        CHECK(list.items[1].leaf == leaf_of(p, 0) && list.items[1].offset == 0, "p");
        CHECK(list.items[2].leaf == leaf_of(q, 0) && list.items[2].offset == 3, "q");
        CHECK(list.items[3].leaf == leaf_of(p, 0) && list.items[3].offset == 5, "p again");
    }
    CHECK(takes(dim, leaf_of(p, 0), 2, SIZES(2, 7, 10, 15)), "an index of p: four positions");
    lp_occurrences_free(&axes.allocator, &list);
    end();
}

/* Random programs: whatever is refined and united, removing one index of a leaf takes as many positions as the size
 * equation says, and two dimensions that were united lose the same ones. */
static void test_sizes_agree_with_positions(void)
{
    for (int round = 0; round < 300; round++) {
        static const int64_t sizes[] = {4, 6, 8, 12, 24};
        lp_expr dims[12];
        int64_t size = sizes[random_below(5)];

        begin();
        for (size_t i = 0; i < 12; i++)
            dims[i] = fresh(size);
        for (int step = 0; step < 14; step++) {
            size_t i = random_below(12), j = random_below(12);
            lp_expr parts[2], other;
            int64_t at;
            switch (random_below(4)) {
            case 0:
                unify(dims[i], dims[j]);
                break;
            case 1:
                at = 1 + (int64_t)random_below((uint64_t)size - 1);
                if (cut1(dims[i], at, parts)) {
                    other = sum2(parts[1], parts[0]);
                    unify(dims[j], other);
                }
                break;
            case 2:
                at = 2 + (int64_t)random_below(3);
                if (size % at == 0 && split2(dims[i], at, size / at, parts))
                    unify(dims[j], concat(parts[1], parts[0]));
                break;
            default:
                unify(dims[i], dims[(i + 1) % 12]);
            }
        }
        for (size_t i = 0; i < 12; i++) {
            lp_atom list[64];
            size_t count = leaves(dims[i], list, 64);
            CHECK(lp_axes_size(&axes, dims[i]) == size && new_size(dims[i], LP_NO_ATOM, 0) == size, "size");
            for (size_t l = 0; l < count && l < 64; l++) {
                int64_t n = axes.atoms[list[l]].size, loss = size - new_size(dims[i], list[l], 1), total = 0;
                uint8_t taken[32] = {0};
                if (n == 1)
                    continue; /* a unit is no axis: nothing can be taken from it */
                take(dims[i], list[l], n - 1, taken);
                for (int64_t p = 0; p < size; p++)
                    total += taken[p];
                CHECK(total == loss && total > 0,
                      "an index takes %lld positions, its size equation says %lld", (long long)total,
                      (long long)loss);
            }
        }
        end();
    }
}

/* 10^5 levels: every walk is iterative, so none of this needs C stack. */
static void test_deep_nesting(void)
{
    enum { LEVELS = 100000 };
    lp_expr chain, cuts, rest, pair[2], deep, list = LP_EMPTY;
    lp_occurrences found = {NULL, 0, 0, NULL, 0, 0};
    int64_t size;

    begin();
    chain = fresh(2);
    for (int i = 0; i < LEVELS; i++) /* left-deep: ((2 + 1) + 1) + ... */
        chain = sum2(chain, LP_EMPTY);
    CHECK(lp_axes_size(&axes, chain) == LEVELS + 2, "size of the chain");
    OK(lp_axes_leaves(&axes, chain, &list, &err));
    CHECK(list.len == LEVELS + 1, "leaves");
    OK(lp_axes_new_size(&axes, chain, NULL, &size, &err));
    CHECK(size == LEVELS + 2, "new size");
    OK(lp_axes_occurrences(&axes, chain, &found, &err));
    CHECK(found.count == 1 && found.items[0].offset == 0, "occurrences: units have none");
    lp_occurrences_free(&axes.allocator, &found);

    cuts = rest = fresh(LEVELS + 2); /* right-deep: each cut refines the rest */
    for (int i = 0; i < LEVELS; i++) {
        if (!CHECK(cut1(rest, 1, pair), "cut %d", i))
            break;
        rest = pair[1];
    }
    OK(lp_axes_leaves(&axes, cuts, &list, &err));
    CHECK(list.len == LEVELS + 1, "pieces: %u", list.len);
    unify(chain, cuts);
    CHECK(lp_axes_find(&axes, axes.factors[chain.off]) == lp_axes_find(&axes, axes.factors[cuts.off]),
          "united");
    OK(lp_axes_note(&axes, chain, LP_REASON_OUTPUT, &err));
    OK(lp_axes_new_size(&axes, cuts, NULL, &size, &err));
    CHECK(size == LEVELS + 2, "still the size");
    end();

    begin(); /* alternating sums and products, deeper than the recursion goes: misaligned, not a crash */
    deep = fresh(2);
    for (int i = 0; i < 40; i++) {
        deep = sum2(deep, deep);
        if (lp_axes_size(&axes, deep) < INT64_MAX / 8)
            deep = concat(fresh(2), deep);
        if (lp_axes_size(&axes, deep) > INT64_MAX / 16)
            break;
    }
    size = lp_axes_size(&axes, deep);
    (void)split2(deep, size / 2, 2, pair);
    (void)cut1(deep, size / 2 + 1, pair);
    end();

    begin(); /* a chain of unions: find and prove stay flat */
    chain = fresh(3);
    rest = chain;
    for (int i = 0; i < LEVELS; i++) {
        deep = fresh(3);
        unify(deep, rest);
        rest = deep;
    }
    CHECK(lp_axes_find(&axes, axes.factors[chain.off]) == lp_axes_find(&axes, axes.factors[rest.off]),
          "one class");
    end();
}

int main(void)
{
    test_fresh_concat_resolve();
    test_sum();
    test_split();
    test_split_of_a_sum_factors_its_terms();
    test_cut();
    test_cut_refuses_borders_outside();
    test_unify_products();
    test_unify_sums();
    test_fused_projections();
    test_parts_inherit();
    test_notes_roles_flags();
    test_occurrences_are_in_order();
    test_sizes_agree_with_positions();
    test_deep_nesting();
    return check_finish("axis");
}
