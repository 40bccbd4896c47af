/* compact and compact_into: every instruction set against a naive gather, over widths, shapes, cuts and thread counts. */
#include "check.h"

#include <stdlib.h>
#include <string.h>

/* Which positions a case keeps in a dimension. */
typedef enum { ALL, ONE, RANDOM, SPARSE, HALF_FRONT, HALF_BACK, BLOCKS, ALL_BUT_ONE } cut;

/* One list for correctness and speed; a zero ends a shape. */
static const struct {
    size_t shape[6];
    cut cuts[5];
    bool timed;
} cases[] = {
    {{1}, {ALL}, false},
    {{2}, {ONE}, false},
    {{7}, {RANDOM}, false},
    {{8}, {RANDOM}, false},
    {{9}, {ALL_BUT_ONE}, false},
    {{64}, {ALL_BUT_ONE}, false},
    {{65}, {RANDOM}, false},
    {{1000}, {RANDOM}, false},
    {{1000}, {SPARSE}, false},
    {{5000}, {BLOCKS}, false},
    {{1, 1}, {ALL, ALL}, false},
    {{5, 3}, {ALL, RANDOM}, false},
    {{16, 2}, {ALL, ONE}, false},
    {{17, 31}, {RANDOM, RANDOM}, false},
    {{40, 16}, {ALL, RANDOM}, false},
    {{40, 33}, {RANDOM, ALL}, false},
    {{40, 33}, {ONE, RANDOM}, false},
    {{40, 63}, {HALF_BACK, HALF_FRONT}, false},
    {{40, 64}, {HALF_BACK, HALF_BACK}, false},
    {{40, 127}, {ALL, ALL_BUT_ONE}, false},
    {{21, 515}, {RANDOM, SPARSE}, false},
    {{21, 515}, {ALL, BLOCKS}, false},
    {{30, 700}, {RANDOM, ALL}, false},
    {{6, 10, 3}, {RANDOM, RANDOM, ALL}, false},
    {{6, 10, 3}, {RANDOM, ALL, RANDOM}, false},
    {{6, 10, 24}, {ALL, RANDOM, RANDOM}, false},
    {{6, 3, 9}, {ALL, ALL, RANDOM}, false},
    {{4, 50, 7}, {RANDOM, SPARSE, ALL}, false},
    {{3, 40, 200}, {ALL, RANDOM, ALL}, false},
    {{5, 6, 3, 3}, {RANDOM, RANDOM, ALL, ALL}, false},
    {{5, 6, 3, 3}, {RANDOM, RANDOM, RANDOM, RANDOM}, false},
    {{2, 6, 4, 5}, {ALL, RANDOM, ALL, RANDOM}, false},
    {{2, 3, 4, 5, 6}, {RANDOM, ALL, RANDOM, ALL, RANDOM}, false},
    {{600, 3000}, {RANDOM, RANDOM}, false},
    {{600, 3000}, {ALL, ALL_BUT_ONE}, false},
    {{3000, 600}, {ALL_BUT_ONE, ALL}, false},
    {{3, 5, 100000}, {RANDOM, RANDOM, ALL}, false},
    {{2, 800000}, {ALL, RANDOM}, false},
    {{4096, 4096}, {ALL, RANDOM}, true},
    {{4096, 4096}, {RANDOM, ALL}, true},
    {{4096, 4096}, {ALL, BLOCKS}, true},
    {{4096, 4096}, {BLOCKS, ALL}, true},
    {{4096, 4096}, {RANDOM, RANDOM}, true},
    {{512, 512, 3, 3}, {ALL, RANDOM, ALL, ALL}, true},
    {{1000000, 16}, {ALL, RANDOM}, true},
};

/* Fill `kept` (room for size) with the positions a cut keeps, at least one; returns how many. */
static size_t make_cut(cut kind, size_t size, int64_t *kept)
{
    size_t count = 0, one = (size_t)random_below(size), width = size / 16 > 0 ? size / 16 : 1, dropped;

    dropped = size / width < 2 ? size : (size_t)random_below(size / width);
    for (size_t i = 0; i < size; i++) {
        bool keep = kind == ALL || (kind == ONE && i == one) || (kind == RANDOM && random_below(5) > 0) ||
                    (kind == SPARSE && random_below(20) == 0) || (kind == HALF_FRONT && i < (size + 1) / 2) ||
                    (kind == HALF_BACK && i >= size / 2) ||
                    (kind == BLOCKS && i / width % 5 != dropped % 5) || (kind == ALL_BUT_ONE && i != one);
        if (keep)
            kept[count++] = (int64_t)i;
    }
    if (count == 0)
        kept[count++] = (int64_t)one;
    return count;
}

typedef struct {
    size_t shape[5], ndim, total, left;
    int64_t *position[5];
    lp_kept kept[5];
} cut_case;

static cut_case make_case(size_t c)
{
    cut_case k = {.total = 1, .left = 1};

    for (; k.ndim < 5 && cases[c].shape[k.ndim] > 0; k.ndim++) {
        size_t d = k.ndim, size = cases[c].shape[d];

        k.shape[d] = size;
        k.position[d] = need(size * sizeof(int64_t));
        k.kept[d] =
            (lp_kept){.position = k.position[d], .count = make_cut(cases[c].cuts[d], size, k.position[d])};
        k.total *= size;
        k.left *= k.kept[d].count;
        if (k.kept[d].count == size && random_below(2) == 0)
            k.kept[d] = (lp_kept){.position = NULL, .count = 0};
    }
    return k;
}

static void free_case(cut_case *k)
{
    for (size_t d = 0; d < k->ndim; d++)
        free(k->position[d]);
}

static void naive(const cut_case *k, const unsigned char *from, unsigned char *to, size_t width)
{
    for (size_t n = 0; n < k->left; n++) {
        size_t rest = n, offset = 0, stride = 1;

        for (size_t d = k->ndim; d-- > 0;) {
            size_t count = k->kept[d].position != NULL ? k->kept[d].count : k->shape[d];

            offset +=
                (k->kept[d].position != NULL ? (size_t)k->kept[d].position[rest % count] : rest % count) *
                stride;
            stride *= k->shape[d];
            rest /= count;
        }
        memcpy(to + n * width, from + offset * width, width);
    }
}

static void check_case(const lp_backend *table, size_t c, size_t width, int threads)
{
    cut_case k = make_case(c);
    size_t bytes = k.total * width, left = k.left * width, longest = 0;
    unsigned char *source = need(bytes), *work = need(bytes), *want = need(left), *into = need(left);
    test_heap heap = {0};
    lp_exec exec = {.allocator = test_allocator(&heap), .threads = threads};
    lp_error err = {0};

    for (size_t d = 0; d < k.ndim; d++)
        longest = k.shape[d] > longest ? k.shape[d] : longest;
    for (size_t i = 0; i + 8 <= bytes; i += 8) {
        uint64_t value = random_below(UINT64_MAX);

        memcpy(source + i, &value, 8);
    }
    for (size_t i = bytes & ~(size_t)7; i < bytes; i++)
        source[i] = (unsigned char)random_below(256);
    naive(&k, source, want, width);

    memset(into, 0xa5, left);
    CHECK(table->compact_into(into, source, width, k.shape, k.ndim, k.kept, &exec, &err) == LP_OK, "%s",
          err.message);
    CHECK(memcmp(into, want, left) == 0, "%s: compact_into, case %zu, width %zu, %d threads", table->name, c,
          width, threads);
    memcpy(work, source, bytes);
    CHECK(table->compact(work, width, k.shape, k.ndim, k.kept, &exec, &err) == LP_OK, "%s", err.message);
    CHECK(memcmp(work, want, left) == 0, "%s: compact, case %zu, width %zu, %d threads", table->name, c,
          width, threads);
    CHECK(heap.lent == 0, "%zu bytes of scratch not given back", heap.lent);
    CHECK(heap.peak <= 10 * longest + 4096 + (size_t)threads * (threads > 1 ? 1310720 : 0),
          "%zu bytes of scratch for dimensions of at most %zu", heap.peak, longest);

    /* Every allocation refused in turn: a status, no leak, and the tensor as it was. */
    for (size_t n = 1; bytes < 100000; n++) {
        test_heap failing = {.fail_at = n};
        lp_status status;

        exec.allocator = test_allocator(&failing);
        memcpy(work, source, bytes);
        status = table->compact(work, width, k.shape, k.ndim, k.kept, &exec, &err);
        CHECK(failing.lent == 0, "allocation %zu of case %zu refused, and %zu bytes kept", n, c,
              failing.lent);
        if (failing.calls < n)
            break;
        CHECK(status == LP_ERR_NOMEM && memcmp(work, source, bytes) == 0,
              "allocation %zu of case %zu refused", n, c);
    }
    free(source), free(work), free(want), free(into);
    free_case(&k);
}

/* A refused staging buffer, which only threads ask for, leaves a large tensor alone too. */
static void check_stage_refused(const lp_backend *table)
{
    size_t shape[2] = {2000, 500}, bytes = 2000 * 500 * 4;
    int64_t kept[499];
    lp_kept cuts[2] = {{NULL, 0}, {kept, 499}};
    unsigned char *data = need(bytes);
    test_heap heap = {.fail_at = 2};
    lp_exec exec = {.allocator = test_allocator(&heap), .threads = 2};
    size_t changed = 0;

    for (int i = 0; i < 499; i++)
        kept[i] = i + 1;
    for (size_t i = 0; i < bytes; i++)
        data[i] = (unsigned char)(i * 7);
    CHECK(table->compact(data, 4, shape, 2, cuts, &exec, NULL) == LP_ERR_NOMEM,
          "the second allocation is refused");
    for (size_t i = 0; i < bytes; i++)
        changed += data[i] != (unsigned char)(i * 7);
    CHECK(heap.lent == 0 && changed == 0, "%zu bytes changed, %zu kept", changed, heap.lent);
    free(data);
}

static void check_refusals(const lp_backend *table)
{
    size_t shape[2] = {4, 5}, empty[2] = {4, 0}, huge[2] = {SIZE_MAX / 2, 9};
    int64_t good[] = {0, 2}, repeated[] = {1, 1}, falling[] = {2, 0}, beyond[] = {1, 5}, negative[] = {-1, 2};
    unsigned char data[20] = {0};
    test_heap heap = {0};
    lp_exec exec = {.allocator = test_allocator(&heap), .threads = 1};
    lp_kept kept[2] = {{NULL, 0}, {good, 2}};
    lp_error err = {0};

    CHECK(table->compact(data, 3, shape, 2, kept, &exec, &err) == LP_ERR_ARGUMENT, "width 3");
    CHECK(table->compact(data, 1, shape, 0, kept, &exec, &err) == LP_ERR_ARGUMENT, "no dimensions");
    CHECK(table->compact(data, 1, shape, LP_MAX_DIMS + 1, kept, &exec, &err) == LP_ERR_ARGUMENT,
          "many dimensions");
    CHECK(table->compact(NULL, 1, shape, 2, kept, &exec, &err) == LP_ERR_ARGUMENT, "NULL data");
    CHECK(table->compact_into(NULL, data, 1, shape, 2, kept, &exec, &err) == LP_ERR_ARGUMENT, "NULL target");
    CHECK(table->compact(data, 1, empty, 2, kept, &exec, &err) == LP_ERR_ARGUMENT, "an empty dimension");
    CHECK(table->compact(data, 1, huge, 2, kept, &exec, &err) == LP_ERR_OVERFLOW, "%s", err.message);
    kept[1] = (lp_kept){good, 0};
    CHECK(table->compact(data, 1, shape, 2, kept, &exec, &err) == LP_ERR_ARGUMENT, "nothing kept");
    kept[1] = (lp_kept){repeated, 2};
    CHECK(table->compact(data, 1, shape, 2, kept, &exec, &err) == LP_ERR_ARGUMENT, "a repeated position");
    kept[1] = (lp_kept){falling, 2};
    CHECK(table->compact(data, 1, shape, 2, kept, &exec, &err) == LP_ERR_ARGUMENT, "falling positions");
    kept[1] = (lp_kept){beyond, 2};
    CHECK(table->compact(data, 1, shape, 2, kept, &exec, &err) == LP_ERR_ARGUMENT,
          "a position beyond the dimension");
    kept[1] = (lp_kept){negative, 2};
    CHECK(table->compact(data, 1, shape, 2, kept, &exec, &err) == LP_ERR_ARGUMENT, "a negative position");
    CHECK(heap.calls == 0 && data[0] == 0, "a refused call allocates and writes nothing");
}

typedef struct {
    const lp_backend *table;
    cut_case *cut;
    unsigned char *data, *target;
    size_t width;
    lp_exec exec;
} timing;

static void run_compact(void *context)
{
    timing *t = context;

    /* What lies in memory does not matter to the time, so the same tensor is cut again and again. */
    (void)t->table->compact(t->data, t->width, t->cut->shape, t->cut->ndim, t->cut->kept, &t->exec, NULL);
}

static void run_into(void *context)
{
    timing *t = context;

    (void)t->table->compact_into(t->target, t->data, t->width, t->cut->shape, t->cut->ndim, t->cut->kept,
                                 &t->exec, NULL);
}

static void run_memcpy(void *context)
{
    timing *t = context;

    memcpy(t->target, t->data, t->cut->left * t->width);
}

static void time_cases(const lp_backend *table)
{
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        for (size_t width = 1; cases[c].timed && width <= 8; width *= 2) {
            cut_case k = make_case(c);
            timing t = {.table = table,
                        .cut = &k,
                        .data = need(k.total * width),
                        .target = need(k.left * width),
                        .width = width,
                        .exec = {.allocator = lp_allocator_default(), .threads = 1}};
            double copy, in_place, into;

            memset(t.data, 1, k.total * width);
            memset(t.target, 1, k.left * width);
            copy = time_median(run_memcpy, &t);
            in_place = time_median(run_compact, &t);
            into = time_median(run_into, &t);
            printf(
                "%-7s case %2zu width %zu: %7.2f ms in place, %7.2f ms into, %7.2f ms memcpy of what stays\n",
                table->name, c, width, 1e3 * in_place, 1e3 * into, 1e3 * copy);
            free(t.data), free(t.target);
            free_case(&k);
        }
    }
}

int main(int argc, char **argv)
{
    const lp_backend *tables[4];
    int count = test_tables(tables);

    for (int t = 0; t < count; t++) {
        if (argc > 1 && strcmp(argv[1], "time") == 0) {
            time_cases(tables[t]);
            continue;
        }
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            for (size_t width = 1; !cases[c].timed && width <= 8; width *= 2) {
                check_case(tables[t], c, width, 1);
                check_case(tables[t], c, width, 4);
            }
        }
        check_stage_refused(tables[t]);
        check_refusals(tables[t]);
    }
    return argc > 1 ? 0 : check_finish("compact");
}
