/* select.h: ranking and merging against plain quadratic oracles, ties, refused input, and an allocator that fails. */
#include "core/select.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int until_failure;   /* calls that still succeed */
    size_t bytes_in_use; /* what has been handed out and not given back */
} meter;

static void *metered(void *ctx, void *block, size_t old_size, size_t new_size)
{
    meter *m = ctx;

    if (new_size > 0 && m->until_failure-- == 0)
        return NULL;
    m->bytes_in_use += new_size - old_size;
    return lp_allocator_default().resize(NULL, block, old_size, new_size);
}

static uint64_t state = 0x9e3779b97f4a7c15u;

static uint64_t draw(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

/* How many elements come before i: lower score, or the same score at a lower index. */
static size_t place(const double *scores, size_t count, size_t i)
{
    size_t n = 0;

    for (size_t j = 0; j < count; ++j)
        n += scores[j] < scores[i] || (scores[j] == scores[i] && j < i);
    return n;
}

static void test_rank(void)
{
    lp_allocator heap = lp_allocator_default();
    lp_error err = {0};

    for (size_t count = 0; count < 130; ++count) {
        double *scores = malloc((count + 1) * sizeof *scores);
        int64_t *order = malloc((count + 1) * sizeof *order);

        for (size_t i = 0; i < count; ++i) /* few distinct values: ties everywhere */
            scores[i] = (double)(draw() % 7) - 3.0;
        assert(lp_select_rank(&heap, scores, count, order, &err) == LP_OK);
        for (size_t i = 0; i < count; ++i)
            assert(order[place(scores, count, i)] == (int64_t)i);
        free(order);
        free(scores);
    }
}

static void test_rank_special_values(void)
{
    lp_allocator heap = lp_allocator_default();
    lp_error err = {0};
    const double scores[] = {0.0, INFINITY, -0.0, -INFINITY, 0.0};
    const int64_t expected[] = {3, 0, 2, 4, 1};
    const double broken[] = {1.0, NAN};
    int64_t order[5];

    assert(lp_select_rank(&heap, scores, 5, order, &err) == LP_OK);
    assert(memcmp(order, expected, sizeof expected) == 0);
    assert(lp_select_rank(&heap, broken, 2, order, &err) == LP_ERR_ARGUMENT);
    assert(strstr(err.message, "index 1 is not a number") != NULL);
}

/* Take the open step of the lowest key, the lower axis on equal keys, by looking at all of them. */
static void merge_slowly(const double *keys, const int64_t *offsets, size_t axes, int64_t *sequence)
{
    int64_t taken[8] = {0};

    for (int64_t step = 0; step < offsets[axes]; ++step) {
        size_t best = axes;

        for (size_t a = 0; a < axes; ++a)
            if (offsets[a] + taken[a] < offsets[a + 1] &&
                (best == axes || keys[offsets[a] + taken[a]] < keys[offsets[best] + taken[best]]))
                best = a;
        sequence[step] = (int64_t)best;
        ++taken[best];
    }
}

static void test_merge(void)
{
    lp_allocator heap = lp_allocator_default();
    lp_error err = {0};

    for (int round = 0; round < 300; ++round) {
        size_t axes = draw() % 8;
        int64_t offsets[9] = {0}, sequence[80], expected[80];
        double keys[80];

        for (size_t a = 0; a < axes; ++a) /* empty axes included */
            offsets[a + 1] = offsets[a] + (int64_t)(draw() % 10);
        for (int64_t i = 0; i < offsets[axes];
             ++i) /* not sorted within an axis: a later step may have a lower key */
            keys[i] = (double)(draw() % 5);
        merge_slowly(keys, offsets, axes, expected);
        assert(lp_select_merge(&heap, keys, offsets, axes, sequence, &err) == LP_OK);
        assert(memcmp(sequence, expected, (size_t)offsets[axes] * sizeof *sequence) == 0);
    }
}

static void test_merge_refuses(void)
{
    lp_allocator heap = lp_allocator_default();
    lp_error err = {0};
    const double keys[] = {1.0, NAN};
    const int64_t good[] = {0, 2}, backwards[] = {0, 2, 1}, late[] = {1, 2};
    int64_t sequence[2];

    assert(lp_select_merge(&heap, keys, good, 1, sequence, &err) == LP_ERR_ARGUMENT);
    assert(strstr(err.message, "step 1") != NULL);
    assert(lp_select_merge(&heap, keys, backwards, 2, sequence, &err) == LP_ERR_ARGUMENT);
    assert(lp_select_merge(&heap, keys, late, 1, sequence, &err) == LP_ERR_ARGUMENT);
}

static void test_failing_allocator(void)
{
    const double keys[] = {3.0, 1.0, 2.0};
    const int64_t offsets[] = {0, 1, 3};
    int64_t out[3];

    for (int n = 0; n < 2; ++n) { /* each function allocates once: fail it, then let it pass */
        meter m = {.until_failure = n};
        lp_allocator allocator = {.resize = metered, .ctx = &m};
        lp_error err = {0};

        assert(lp_select_rank(&allocator, keys, 3, out, &err) == (n == 0 ? LP_ERR_NOMEM : LP_OK));
        m.until_failure = n;
        assert(lp_select_merge(&allocator, keys, offsets, 2, out, &err) == (n == 0 ? LP_ERR_NOMEM : LP_OK));
        assert(m.bytes_in_use == 0);
        assert(n != 0 || strstr(err.message, "out of memory") != NULL);
    }
}

int main(void)
{
    test_rank();
    test_rank_special_values();
    test_merge();
    test_merge_refuses();
    test_failing_allocator();
    return 0;
}
