/* Small tapes written by hand, and questions to the graph built from them.
 *
 *     tape t;
 *     tape_begin(&t, lp_allocator_default());
 *     int64_t x = tape_input(&t, SHAPE(2, 6)), w = tape_parameter(&t, SHAPE(8, 6));
 *     int64_t y = tape_op(&t, "linear", ARGS(T(x), T(w), NO), SHAPE(2, 8));
 *     tape_build(&t, y);
 *     ... tape_axis(&t, w, 0, 0) ...
 *     tape_end(&t);
 *
 * The first failure sticks: later calls do nothing and give tensor 0, so that a test reads t.status once. */
#ifndef LP_TESTS_CORE_TAPE_H
#define LP_TESTS_CORE_TAPE_H

#include "core/graph.h"

typedef struct {
    lp_graph *graph;
    int64_t tensors;
    uint64_t storages;
    uint32_t ops;
    lp_status status;
    lp_error err;
} tape;

/* Lists of ints as two arguments: pointer, count. */
#define SHAPE(...) (const int64_t[]){__VA_ARGS__}, sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)
#define SCALAR (const int64_t *)NULL, (size_t)0
#define ARGS(...) SHAPE(__VA_ARGS__)
#define IDS(...) SHAPE(__VA_ARGS__)

/* Encoded arguments. */
#define NO LP_ARG_NONE
#define T(tensor) LP_ARG_TENSOR, (tensor)
#define TS(...) LP_ARG_TENSORS, (int64_t)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), __VA_ARGS__
#define I(value) LP_ARG_INT, (value)
#define IS(...) LP_ARG_INTS, (int64_t)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), __VA_ARGS__
#define F LP_ARG_FLOAT, 0
#define B(value) LP_ARG_BOOL, (value)

void tape_begin(tape *t, lp_allocator allocator);
void tape_end(tape *t);

/* Tensors; a value is what an operation makes, `ids` are integers. */
int64_t tape_parameter(tape *t, const int64_t *sizes, size_t ndim);
int64_t tape_buffer(tape *t, const int64_t *sizes, size_t ndim);
int64_t tape_input(tape *t, const int64_t *sizes, size_t ndim);
int64_t tape_ids(tape *t, const int64_t *sizes, size_t ndim);
int64_t tape_constant(tape *t, const int64_t *sizes, size_t ndim);
int64_t tape_value(tape *t, bool integral, const int64_t *sizes, size_t ndim);
/* A value that shares `base`'s storage. */
int64_t tape_view(tape *t, int64_t base, const int64_t *sizes, size_t ndim);

/* Operations.  tape_op makes one new float output; tape_int_op one of integers; tape_write writes into `out`, which it
 * gives back; tape_call has the flags and outputs given. */
int64_t tape_op(tape *t, const char *name, const int64_t *code, size_t length, const int64_t *sizes,
                size_t ndim);
int64_t tape_int_op(tape *t, const char *name, const int64_t *code, size_t length, const int64_t *sizes,
                    size_t ndim);
int64_t tape_point(tape *t, const char *name, const int64_t *code, size_t length, const int64_t *sizes,
                   size_t ndim); /* tagged pointwise */
int64_t tape_write(tape *t, const char *name, const int64_t *code, size_t length, int64_t out);
void tape_call(tape *t, const char *name, uint32_t flags, const int64_t *code, size_t length,
               const int64_t *outputs, size_t count);

/* (batch, in) x (out, in)^T, from a fresh weight. */
int64_t tape_linear(tape *t, int64_t x, int64_t weight, int64_t rows, int64_t features);

lp_status tape_build(tape *t, int64_t output);

/* The nth axis of a dimension, outer to inner, left to right; NULL where there are fewer. */
const lp_axis *tape_axis(tape *t, int64_t tensor, uint32_t dim, size_t nth);
bool tape_reason(const tape *t, const lp_axis *axis, lp_reason reason);
/* How many reasons and marks the axis has. */
size_t tape_notes(const tape *t, const lp_axis *axis);
/* Member `nth` of the axis in (tensor, dim) holds exactly these positions, row by row. */
bool tape_positions(tape *t, const lp_axis *axis, int64_t tensor, uint32_t dim, size_t nth,
                    const int64_t *expected, size_t count);
/* Size of a dimension when the axis loses `count` indices; -1 on failure. */
int64_t tape_new_size(tape *t, int64_t tensor, uint32_t dim, const lp_axis *axis, int64_t count);

/* Is the nth axis of one dimension the mth of another (and is there one)? */
bool tape_same(tape *t, int64_t a, uint32_t a_dim, size_t n, int64_t b, uint32_t b_dim, size_t m);
bool tape_prunable(tape *t, int64_t tensor, uint32_t dim, size_t nth);
bool tape_frozen(tape *t, int64_t tensor, uint32_t dim, size_t nth, lp_reason reason);
/* Prunable, and the first axis of the dimension carries the mark. */
bool tape_marked(tape *t, int64_t tensor, uint32_t dim, lp_reason mark);

/* x (2, 5) -> linear -> value (2, features) and its weight (features, 5); a value (rows, features) -> linear -> the
 * output (rows, 3) and its weight (3, features). */
int64_t tape_produce(tape *t, int64_t features, int64_t *weight);
int64_t tape_consume(tape *t, int64_t value, int64_t rows, int64_t features, int64_t *weight);

/* The table of rules. */
size_t tape_rule_count(void);
const char *tape_rule_name(size_t i);
bool tape_rule_known(const char *name);

#endif
