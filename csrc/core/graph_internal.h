/* What the graph's own files share: the tape in memory and the helpers rules are written with. */
#ifndef LP_CORE_GRAPH_INTERNAL_H
#define LP_CORE_GRAPH_INTERNAL_H

#include "axis_internal.h"
#include "graph.h"

#define LP_MAX_DIMS 16

typedef struct {
    int64_t sizes[LP_MAX_DIMS];
    lp_expr dims[LP_MAX_DIMS];
    uint64_t storage;
    uint32_t storage_id; /* dense number of the storage */
    lp_expr values;      /* axis that its integer values name positions of */
    uint32_t values_of;  /* nonzero: the tensor whose positions its columns name, else LP_NO_OP */
    uint8_t ndim, role;
    bool integral;
    bool known;      /* dims are set */
    bool has_values; /* `values` is set */
    bool weight;     /* computed from parameters alone */
    bool live;
} lp_tensor;

struct lp_op;
typedef struct lp_run lp_run;
typedef lp_status (*lp_rule_fn)(lp_run *run, const struct lp_op *op, lp_error *err);

typedef struct lp_op {
    lp_rule_fn rule; /* NULL: unknown */
    uint32_t code, code_length;
    uint32_t outputs, output_count;
    uint32_t declared, declared_length; /* a rule from outside, in `code` too */
    uint32_t flags;
    uint32_t index;
    uint8_t detail; /* the rule's variant, from the table */
    uint8_t vanish; /* how its result vanishes where the weights do (vanish.c) */
    bool live;
} lp_op;

struct lp_graph {
    lp_allocator allocator;
    lp_axes axes;
    lp_tensor *tensors;
    size_t tensor_count, tensor_capacity;
    lp_op *ops;
    size_t op_count, op_capacity;
    int64_t *code;
    size_t code_count, code_capacity;
    int64_t *output_ids; /* all operations' outputs */
    size_t output_id_count, output_id_capacity;
    int64_t *results; /* tensors that matter */
    size_t result_count, result_capacity;
    uint32_t *unknown;
    size_t unknown_count, unknown_capacity;
    uint32_t *adopted; /* tensors the tape did not make, in order of first use */
    size_t adopted_count, adopted_capacity;
    lp_marked *marked;
    size_t marked_count, marked_capacity;
    uint32_t *macs; /* operations that multiply matrices */
    size_t macs_count, macs_capacity;
    uint32_t *atom_dims; /* atom -> tensor * LP_MAX_DIMS + dim, for the atoms made for a dimension */
    size_t atom_dim_capacity;
    /* after build */
    lp_axis *list;
    size_t axis_count, axis_capacity;
    lp_member *members;
    size_t member_count, member_capacity;
    lp_occurrences occurrences;
    uint32_t *axis_of; /* root atom -> axis id or LP_NO_ATOM */
    size_t axis_of_capacity;
    int64_t *removed; /* scratch: by atom */
    size_t removed_capacity;
    bool built;
};

/* Rule of an operation by name (no namespace, no trailing underscore); false when unknown. */
bool lp_rule_find(const char *name, lp_rule_fn *rule, uint8_t *detail);

/* The rule of operations tagged pointwise that have no rule of their own. */
lp_status lp_rule_pointwise(lp_run *run, const lp_op *op, lp_error *err);
/* Freezes what the operation touches. */
lp_status lp_rule_unknown(lp_run *run, const lp_op *op, lp_error *err);
lp_status lp_freeze_op(lp_run *run, const lp_op *op, lp_reason reason, lp_error *err);
/* Append to the graph's encoded arguments. */
lp_status lp_graph_append_code(lp_graph *graph, const int64_t *code, size_t length, lp_error *err);

struct lp_run {
    lp_graph *graph;
    lp_axes *axes;
};

/* An argument of the operation at work. */
typedef struct {
    int64_t tag;
    const int64_t *values; /* payload: ids, ints, bits */
    size_t count;
} lp_arg;

/* Argument i; tag LP_ARG_NONE past the end. */
lp_arg lp_op_arg(const lp_graph *graph, const lp_op *op, size_t i);
size_t lp_op_arg_count(const lp_graph *graph, const lp_op *op);
/* The tensor in argument i, or NULL. */
lp_tensor *lp_op_tensor(lp_graph *graph, const lp_op *op, size_t i);
int64_t lp_op_int(const lp_graph *graph, const lp_op *op, size_t i, int64_t otherwise);
lp_tensor *lp_op_output(lp_graph *graph, const lp_op *op, size_t i);
/* -ndim <= dim < ndim made non-negative; a 0-d tensor counts as 1-d. */
size_t lp_wrap_dim(int64_t dim, size_t ndim);

/* Give output i its dimensions; a tensor that has some already (written in place) unifies with them. */
lp_status lp_set_output(lp_run *run, const lp_op *op, size_t i, const lp_expr *dims, lp_error *err);
/* An output with fresh dimensions, frozen for `reason` (LP_REASON_NONE: free). */
lp_status lp_set_fresh(lp_run *run, const lp_op *op, size_t i, lp_reason reason, lp_error *err);
lp_status lp_freeze_tensor(lp_run *run, const lp_tensor *tensor, lp_reason reason, lp_error *err);
/* The operation normalises over this dimension of its input. */
lp_status lp_mark_dim(lp_run *run, const lp_op *op, lp_tensor *tensor, size_t dim, lp_reason mark,
                      lp_error *err);
/* The same without the mark: where the masked reference has to look. */
lp_status lp_add_marked(lp_run *run, const lp_op *op, const lp_tensor *tensor, size_t dim, lp_error *err);
lp_status lp_unify_dims(lp_run *run, lp_expr a, lp_expr b, lp_rule rule, lp_error *err);
/* Index tensor meets the dimension it points into: its value axis unifies, else the dimension freezes. */
lp_status lp_index_dim(lp_run *run, const lp_tensor *index, lp_expr dim, lp_error *err);
/* FORWARD where one side is a weight, else EQUAL. */
lp_rule lp_rule_between(const lp_tensor *a, const lp_tensor *b);
/* Elements of a tensor, and multiply-accumulates of a product, with graph->removed gone. */
lp_status lp_tensor_numel(lp_graph *graph, const lp_tensor *tensor, int64_t *out, lp_error *err);
lp_status lp_op_macs(lp_graph *graph, const lp_op *op, int64_t *out, lp_error *err);
/* How the result of an operation vanishes where the weights do; then freeze the axes that are summed over where
 * something does not (vanish.c). */
uint8_t lp_vanish_find(const char *name, lp_rule_fn rule, uint8_t detail);
lp_status lp_graph_find_remains(lp_graph *graph, lp_error *err);
/* Number the storages and set `live` on what the outputs depend on (liveness.c). */
lp_status lp_graph_find_live(lp_graph *graph, lp_error *err);
typedef lp_status (*lp_tensor_visit)(lp_graph *graph, lp_tensor *tensor, void *context, lp_error *err);
/* Every tensor among the operation's arguments, in order. */
lp_status lp_visit_inputs(lp_graph *graph, const lp_op *op, lp_tensor_visit visit, void *context,
                          lp_error *err);
/* Gather the axes once the tape has run (groups.c). */
lp_status lp_graph_collect(lp_graph *graph, lp_error *err);
uint32_t lp_tensor_id(const lp_graph *graph, const lp_tensor *tensor);

#endif
