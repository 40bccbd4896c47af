/* Every public call that allocates, under an allocator that refuses the n-th allocation, for every n: LP_ERR_NOMEM each time,
 * nothing leaked, nothing broken.  test_allocator_cases.py reads the headers and fails where one of their calls has no case
 * here. */
#include "check.h"
#include "tape.h"

#include "core/select.h"

#include <stdlib.h>

/* One run of a case. */
typedef struct {
    test_heap heap;
    lp_allocator allocator;
    size_t within; /* allocations asked for by the call the case is about */
    lp_error err;
    lp_status status;
} run;

/* The call the case is about; the rest of the case is its setting. */
#define ENTRY(call)                                                                                          \
    do {                                                                                                     \
        size_t before_ = r->heap.calls;                                                                      \
        r->status = (call);                                                                                  \
        r->within += r->heap.calls - before_;                                                                \
    } while (0)
#define GOES_ON (r->status == LP_OK)

/* ---- status.h, select.h ----------------------------------------------------------------------------------------- */

static void case_lp_grow(run *r)
{
    void *block = NULL;
    size_t capacity = 0;

    for (size_t need_now = 1; GOES_ON && need_now < 100; need_now *= 3) {
        size_t was = capacity;
        ENTRY(lp_grow(&r->allocator, &block, &capacity, need_now, 24, &r->err));
        CHECK(GOES_ON || capacity == was, "a refused growth changes nothing");
    }
    lp_release(&r->allocator, block, capacity, 24);
}

static void case_lp_select_rank(run *r)
{
    int64_t order[3];
    ENTRY(lp_select_rank(&r->allocator, (const double[]){3, 1, 2}, 3, order, &r->err));
}

static void case_lp_select_merge(run *r)
{
    int64_t sequence[3];
    ENTRY(lp_select_merge(&r->allocator, (const double[]){3, 1, 2}, (const int64_t[]){0, 1, 3}, 2, sequence,
                          &r->err));
}

/* ---- axis.h ----------------------------------------------------------------------------------------------------- */

enum { LEAVES = 40 };

/* Axes of size 12; the arenas are small, so that repeating any call makes them grow. */
static void begin_axes(run *r, lp_axes *axes, lp_expr leaves[LEAVES])
{
    lp_axes_init(axes, r->allocator);
    for (size_t i = 0; GOES_ON && i < LEAVES; i++)
        r->status = lp_axes_fresh(axes, 12, &leaves[i], &r->err);
}

#define AXES_CASE(name, ...)                                                                                 \
    static void case_##name(run *r)                                                                          \
    {                                                                                                        \
        lp_axes axes;                                                                                        \
        lp_expr x[LEAVES] = {{0, 0}};                                                                        \
                                                                                                             \
        begin_axes(r, &axes, x);                                                                             \
        for (size_t i = 0; GOES_ON && i + 1 < LEAVES; i++) {                                                 \
            __VA_ARGS__                                                                                      \
        }                                                                                                    \
        lp_axes_free(&axes);                                                                                 \
    }

AXES_CASE(lp_axes_atom, lp_atom atom; ENTRY(lp_axes_atom(&axes, 5, &atom, &r->err));)
AXES_CASE(lp_axes_fresh, ENTRY(lp_axes_fresh(&axes, 5, &x[i], &r->err));)
AXES_CASE(lp_axes_resolve, lp_expr out; ENTRY(lp_axes_resolve(&axes, x[i], &out, &r->err));)
AXES_CASE(lp_axes_concat, ENTRY(lp_axes_concat(&axes, x[i], x[i + 1], &x[i + 1], &r->err));)
AXES_CASE(lp_axes_sum, lp_expr out; ENTRY(lp_axes_sum(&axes, &x[i], 2, &out, &r->err));)
AXES_CASE(lp_axes_split, lp_expr out[2]; bool aligned; const int64_t sizes[] = {3, 4};
          ENTRY(lp_axes_split(&axes, x[i], sizes, 2, out, &aligned, &r->err));)
AXES_CASE(lp_axes_cut, lp_expr out[2]; bool aligned; const int64_t at = 5;
          ENTRY(lp_axes_cut(&axes, x[i], &at, 1, out, &aligned, &r->err));)
AXES_CASE(lp_axes_unify, ENTRY(lp_axes_unify(&axes, x[i], x[i + 1], LP_RULE_EQUAL, &r->err));)
AXES_CASE(lp_axes_note, ENTRY(lp_axes_note(&axes, x[i], LP_REASON_INPUT, &r->err));)
AXES_CASE(lp_axes_note_atom, ENTRY(lp_axes_note_atom(&axes, (lp_atom)i, LP_REASON_INPUT, &r->err));)
AXES_CASE(lp_axes_role, ENTRY(lp_axes_role(&axes, x[i], LP_ROLE_GATED, &r->err));)
AXES_CASE(lp_axes_flags, uint32_t out; ENTRY(lp_axes_flags(&axes, x[i], true, &out, &r->err));)
AXES_CASE(lp_axes_leaves, lp_expr out; ENTRY(lp_axes_leaves(&axes, x[i], &out, &r->err));)
AXES_CASE(lp_axes_new_size, int64_t out; ENTRY(lp_axes_new_size(&axes, x[i], NULL, &out, &r->err));)
AXES_CASE(lp_axes_occurrences, lp_occurrences found = {NULL, 0, 0, NULL, 0, 0};
          ENTRY(lp_axes_occurrences(&axes, x[i], &found, &r->err));
          lp_occurrences_free(&r->allocator, &found);)
AXES_CASE(lp_axes_path, lp_steps steps = {NULL, 0, 0};
          r->status = lp_axes_unify(&axes, x[0], x[i + 1], LP_RULE_EQUAL, &r->err);
          if (GOES_ON) ENTRY(lp_axes_path(&axes, 0, (lp_atom)i + 1, &steps, &r->err));
          lp_steps_free(&r->allocator, &steps);)

/* ---- graph.h ---------------------------------------------------------------------------------------------------- */

/* A feed-forward layer of 2 x 3 features between two others, and a table of 5 x 6 that is looked up. */
static void begin_tape(run *r, tape *t)
{
    int64_t x, w, y = 0;

    tape_begin(t, r->allocator);
    x = tape_produce(t, 6, &w);
    x = tape_op(t, "view", ARGS(T(x), IS(2, 2, 3)), SHAPE(2, 2, 3));
    x = tape_op(t, "reshape", ARGS(T(x), IS(2, 6)), SHAPE(2, 6));
    y = tape_op(t, "mine", ARGS(T(x)), SHAPE(2, 6));
    (void)tape_consume(t, x, 2, 6, &w);
    (void)tape_consume(t, y, 2, 6, &w);
    r->status = t->status;
    r->err = t->err;
}

enum { W = 1, MADE = 2, OUTPUT = 7 }; /* tensors of begin_tape */

/* `call` on the graph before it is built (built: after), often enough for its lists to grow. */
#define GRAPH_CASE(name, built, ...)                                                                         \
    static void case_##name(run *r)                                                                          \
    {                                                                                                        \
        tape t;                                                                                              \
                                                                                                             \
        begin_tape(r, &t);                                                                                   \
        if ((built) && GOES_ON) {                                                                            \
            r->status = tape_build(&t, OUTPUT);                                                              \
            r->err = t.err;                                                                                  \
        }                                                                                                    \
        for (size_t i = 0; GOES_ON && i < 40; i++) {                                                         \
            __VA_ARGS__                                                                                      \
        }                                                                                                    \
        tape_end(&t);                                                                                        \
    }

static void case_lp_graph_new(run *r)
{
    lp_graph *graph = NULL;

    ENTRY(lp_graph_new(&graph, r->allocator, &r->err));
    lp_graph_free(graph);
}

GRAPH_CASE(lp_graph_add_tensor, false,
           ENTRY(lp_graph_add_tensor(t.graph, SHAPE(2, 6), LP_TENSOR_VALUE, false, 90, &r->err));)
GRAPH_CASE(lp_graph_add_op, false,
           ENTRY(lp_graph_add_op(t.graph, "relu", 0, ARGS(T(MADE)), IDS(MADE), &r->err));)
GRAPH_CASE(lp_graph_declare, false, ENTRY(lp_graph_declare(t.graph, 3, SHAPE(0, 0, 0), &r->err));)
GRAPH_CASE(lp_graph_set_outputs, false, ENTRY(lp_graph_set_outputs(t.graph, IDS(OUTPUT), &r->err));)
GRAPH_CASE(lp_graph_build, false, if (i > 0) break;
           r->status = lp_graph_set_outputs(t.graph, IDS(OUTPUT), &r->err);
           if (GOES_ON) ENTRY(lp_graph_build(t.graph, &r->err));)

#define AXIS lp_graph_axis(t.graph, 0)
#define PLACE AXIS->members[0].tensor, AXIS->members[0].dim

GRAPH_CASE(lp_graph_freeze, true,
           ENTRY(lp_graph_freeze(t.graph, i % lp_graph_axis_count(t.graph), (lp_reason)(1 + i / 4),
                                 (uint32_t)i, &r->err));)
GRAPH_CASE(lp_graph_positions, true, int64_t out[64]; size_t per_index;
           ENTRY(lp_graph_positions(t.graph, AXIS, 0, out, &per_index, &r->err));)
GRAPH_CASE(lp_graph_mark_ragged, true, uint8_t flags[64]; int64_t chosen[8] = {0};
           ENTRY(lp_graph_mark_ragged(t.graph, AXIS, 0, lp_graph_axis(t.graph, 1), chosen, 1, flags,
                                      &r->err));
           if (r->status == LP_ERR_PLAN) /* not nested: an answer */
           r->status = LP_OK;)
GRAPH_CASE(lp_graph_new_size, true, int64_t out;
           ENTRY(lp_graph_new_size(t.graph, PLACE, NULL, &out, &r->err));)
GRAPH_CASE(lp_graph_numel, true, int64_t out; ENTRY(lp_graph_numel(t.graph, NULL, &out, &r->err));)
GRAPH_CASE(lp_graph_macs, true, int64_t out; ENTRY(lp_graph_macs(t.graph, NULL, &out, &r->err));)
GRAPH_CASE(lp_graph_macs_each, true, int64_t out[16]; ENTRY(lp_graph_macs_each(t.graph, NULL, out, &r->err));)
GRAPH_CASE(lp_graph_mark_removed, true, uint8_t flags[64]; const uint8_t *gone[16] = {NULL};
           ENTRY(lp_graph_mark_removed(t.graph, PLACE, gone, flags, &r->err));)
GRAPH_CASE(lp_graph_dim_axes, true, uint32_t ids[8]; size_t count;
           ENTRY(lp_graph_dim_axes(t.graph, PLACE, ids, 8, &count, &r->err));)
GRAPH_CASE(lp_graph_dim_atoms, true, uint32_t ids[8]; size_t count;
           ENTRY(lp_graph_dim_atoms(t.graph, PLACE, ids, 8, &count, &r->err));)
GRAPH_CASE(lp_graph_explain, true, lp_steps steps = {NULL, 0, 0};
           ENTRY(lp_graph_explain(t.graph, 0, 0, AXIS->member_count - 1, &steps, &r->err));
           lp_steps_free(&r->allocator, &steps);)

/* ---- backend.h: every table of this machine ---------------------------------------------------------------------- */

enum { ROWS = 48, COLUMNS = 32, ELEMENTS = ROWS * COLUMNS };

/* `call` with the table `table`, lp_exec `exec`, and float matrices a and b of ROWS x COLUMNS; sums of both sizes. */
#define KERNEL_CASE(name, ...)                                                                               \
    static void case_##name(run *r)                                                                          \
    {                                                                                                        \
        const lp_backend *tables[4];                                                                         \
        const lp_exec exec = {.allocator = r->allocator, .threads = 2};                                      \
        float *a = random_values(LP_F32, ELEMENTS, 1.0), *b = random_values(LP_F32, ELEMENTS, 1.0);          \
        double rows[ROWS] = {0.0}, columns[ROWS] = {0.0};                                                    \
        int count = test_tables(tables);                                                                     \
                                                                                                             \
        (void)rows, (void)columns;                                                                           \
        for (int i = 0; GOES_ON && i < count; i++) {                                                         \
            const lp_backend *table = tables[i];                                                             \
            __VA_ARGS__                                                                                      \
        }                                                                                                    \
        free(a);                                                                                             \
        free(b);                                                                                             \
    }

static const size_t matrix[] = {ROWS, COLUMNS};
static const int64_t positions[] = {1, 2, 5, 9, 20};
static const lp_kept kept[] = {{positions, 5}, {positions, 5}};

KERNEL_CASE(linear_scores, const lp_linear linear = {.weight = a,
                                                     .x = b,
                                                     .dy = b,
                                                     .out = COLUMNS,
                                                     .in = COLUMNS,
                                                     .samples = 2,
                                                     .tokens = ROWS / 2,
                                                     .weight_stride = COLUMNS,
                                                     .x_stride = COLUMNS,
                                                     .dy_stride = COLUMNS,
                                                     .dtype = LP_F32,
                                                     .order = 2};
            ENTRY(table->linear_scores(&linear, rows, columns, &exec, &r->err));)
KERNEL_CASE(dot_columns, ENTRY(table->dot_columns(a, b, LP_F32, ROWS, COLUMNS, columns, &exec, &r->err));)
KERNEL_CASE(tensor_scores, const lp_values weight = {a, LP_F32}; const lp_values grad = {b, LP_F32};
            double *outs[] = {rows, columns};
            ENTRY(table->tensor_scores(weight, grad, grad, matrix, 2, LP_SCORE_ELEMENT2, outs, &exec,
                                       &r->err));)
KERNEL_CASE(accumulate_square, const lp_values grad = {b, LP_F32};
            ENTRY(table->accumulate_square(a, LP_F32, grad, 0.5, ELEMENTS, &exec, &r->err));)
KERNEL_CASE(compact, ENTRY(table->compact(a, 4, matrix, 2, kept, &exec, &r->err));)
KERNEL_CASE(compact_into, ENTRY(table->compact_into(b, a, 4, matrix, 2, kept, &exec, &r->err));)

/* ---- all of them ------------------------------------------------------------------------------------------------- */

/* The second: documented to work without memory, or in what the graph has already.  The third: give back what they take of the
 * graph's arena, and so ask only where the building left it full. */
enum { ALLOCATES, ASKS_NOTHING, ASKS_SELDOM };

static const struct {
    const char *name;
    void (*take)(run *r);
    int kind;
} cases[] = {
#define CASE(name, kind) {#name, case_##name, kind}
    CASE(lp_grow, ALLOCATES),
    CASE(lp_select_rank, ALLOCATES),
    CASE(lp_select_merge, ALLOCATES),
    CASE(lp_axes_atom, ALLOCATES),
    CASE(lp_axes_fresh, ALLOCATES),
    CASE(lp_axes_resolve, ALLOCATES),
    CASE(lp_axes_concat, ALLOCATES),
    CASE(lp_axes_sum, ALLOCATES),
    CASE(lp_axes_split, ALLOCATES),
    CASE(lp_axes_cut, ALLOCATES),
    CASE(lp_axes_unify, ALLOCATES),
    CASE(lp_axes_note, ALLOCATES),
    CASE(lp_axes_note_atom, ALLOCATES),
    CASE(lp_axes_role, ALLOCATES),
    CASE(lp_axes_flags, ALLOCATES),
    CASE(lp_axes_leaves, ALLOCATES),
    CASE(lp_axes_new_size, ALLOCATES),
    CASE(lp_axes_occurrences, ALLOCATES),
    CASE(lp_axes_path, ALLOCATES),
    CASE(lp_graph_new, ALLOCATES),
    CASE(lp_graph_add_tensor, ALLOCATES),
    CASE(lp_graph_add_op, ALLOCATES),
    CASE(lp_graph_declare, ALLOCATES),
    CASE(lp_graph_set_outputs, ALLOCATES),
    CASE(lp_graph_build, ALLOCATES),
    CASE(lp_graph_freeze, ALLOCATES),
    CASE(lp_graph_positions, ASKS_NOTHING),
    CASE(lp_graph_mark_ragged, ASKS_NOTHING),
    CASE(lp_graph_new_size, ALLOCATES),
    CASE(lp_graph_numel, ALLOCATES),
    CASE(lp_graph_macs, ALLOCATES),
    CASE(lp_graph_macs_each, ALLOCATES),
    CASE(lp_graph_mark_removed, ALLOCATES),
    CASE(lp_graph_dim_axes, ASKS_SELDOM),
    CASE(lp_graph_dim_atoms, ASKS_SELDOM),
    CASE(lp_graph_explain, ALLOCATES),
    CASE(linear_scores, ALLOCATES),
    CASE(dot_columns, ASKS_NOTHING),
    CASE(tensor_scores, ASKS_NOTHING),
    CASE(accumulate_square, ASKS_NOTHING),
    CASE(compact, ALLOCATES),
    CASE(compact_into, ALLOCATES),
};

int main(void)
{
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        bool done = false;

        for (size_t fail_at = 1; !done; fail_at++) {
            run r = {.heap = {.fail_at = fail_at}};

            r.allocator = test_allocator(&r.heap);
            cases[i].take(&r);
            CHECK(r.heap.lent == 0, "%s, allocation %zu: %zu bytes leaked", cases[i].name, fail_at,
                  r.heap.lent);
            done = r.heap.calls < fail_at;
            if (done) {
                CHECK(r.status == LP_OK, "%s: %s", cases[i].name, r.err.message);
                CHECK(cases[i].kind == ASKS_SELDOM || (r.within > 0) == (cases[i].kind == ALLOCATES),
                      "%s asks for memory %zu times", cases[i].name, r.within);
            } else {
                done =
                    !CHECK(r.status == LP_ERR_NOMEM && r.err.code == LP_ERR_NOMEM && r.err.message[0] != '\0',
                           "%s, allocation %zu: status %d", cases[i].name, fail_at, (int)r.status);
            }
        }
    }
    return check_finish("allocator");
}
