/* The dependency graph of a model: one recorded forward pass, and the coupled axes the algebra finds in it.
 *
 * Use: lp_graph_new, lp_graph_add_tensor and lp_graph_add_op in execution order, lp_graph_set_outputs, lp_graph_build;
 * then the queries.  Nothing is added after lp_graph_build; queries work in the graph's own scratch, so a graph
 * belongs to one thread at a time.
 */
#ifndef LP_CORE_GRAPH_H
#define LP_CORE_GRAPH_H

#include "axis.h"

typedef struct lp_graph lp_graph;

typedef enum {
    LP_TENSOR_VALUE,
    LP_TENSOR_PARAMETER,
    LP_TENSOR_BUFFER,
    LP_TENSOR_INPUT,
    LP_TENSOR_CONSTANT
} lp_tensor_role;

/* Flags of an operation.  LITERAL: a slice or split whose borders are numbers in the model's code, so what lies before
 * a border keeps its size. */
enum { LP_OP_POINTWISE = 1u << 0, LP_OP_MUTATES = 1u << 1, LP_OP_LITERAL = 1u << 2 };

/* Tags of the encoded arguments (tape.py describes the code). */
enum {
    LP_ARG_NONE = 0,
    LP_ARG_TENSOR,
    LP_ARG_TENSORS,
    LP_ARG_INT,
    LP_ARG_INTS,
    LP_ARG_FLOAT,
    LP_ARG_BOOL,
    LP_ARG_OTHER,
    LP_ARG_BOOLS
};

/* What an axis is in the model, read off what operations do with it. */
typedef enum {
    LP_KIND_OTHER = 0,
    LP_KIND_HEAD,
    LP_KIND_QUERY,
    LP_KIND_FFN,
    LP_KIND_CHANNEL,
    LP_KIND_EXPERT,
    LP_KIND_HEAD_DIM,
    LP_KIND_VALUE_DIM,
    LP_KIND_RANK,
    LP_KIND_STATE
} lp_kind;

/* One occurrence of an axis in one dimension of a parameter or buffer. */
typedef struct {
    uint32_t tensor, dim;
    uint32_t occurrence; /* index for lp_graph_positions */
} lp_member;

typedef struct {
    lp_atom root;
    int64_t size;
    lp_kind kind;
    bool prunable;
    uint32_t flags;           /* LP_FROZEN, LP_MARKED and roles */
    uint32_t notes;           /* list of reasons and marks, see lp_graph_note */
    const lp_member *members; /* in order of first use, then dimension, then position */
    size_t member_count;
} lp_axis;

/* An operation that normalises over a dimension holding an axis that loses indices. */
typedef struct {
    uint32_t op;     /* index on the tape */
    uint32_t tensor; /* the normalised input */
    uint32_t dim;
} lp_marked;

/* err may be NULL throughout.  The graph keeps a copy of the allocator. */
lp_status lp_graph_new(lp_graph **out, lp_allocator allocator, lp_error *err);
void lp_graph_free(lp_graph *graph); /* NULL is fine */

/* Append a tensor; its id is the number of tensors before it.  sizes: ndim (<= 16) of them, each >= 0.  `storage` is
 * shared by views of one another.  `integral` says that the elements are integers or booleans. */
lp_status lp_graph_add_tensor(lp_graph *graph, const int64_t *sizes, size_t ndim, lp_tensor_role role,
                              bool integral, uint64_t storage, lp_error *err);

/* Append an operation.  name: ATen schema name with or without "aten::"; code: encoded arguments, copied; outputs:
 * tensor ids, -1 where an output is no tensor. */
lp_status lp_graph_add_op(lp_graph *graph, const char *name, uint32_t flags, const int64_t *code,
                          size_t code_length, const int64_t *outputs, size_t output_count, lp_error *err);

/* Give an operation the table does not know a rule, before the graph is built.  Axes are written as letters, the same
 * letter being the same axis wherever it stands.  The code, checked here and copied:
 *   count of letters (at most LP_MAX_LETTERS), then for each its size, effect (0 none, 1 frozen, 2 mean, 3 extreme,
 *   4 softmax, 5 norm) and kind (0 none, 1 head, 2 head_dim, 3 value_dim, 4 ffn, 5 channel, 6 expert, 7 state);
 *   count of inputs, then for each: tensor id, dimensions, and each dimension as a count of terms, each a count of
 *   factors, each a letter: a sum of products, outer to inner;
 *   count of outputs, then the same with the output's place for the tensor id.
 * A dimension has the size its letters make, or 1 (broadcast).  LP_ERR_TRACE: the code is malformed or does not fit. */
#define LP_MAX_LETTERS 64
lp_status lp_graph_declare(lp_graph *graph, size_t op, const int64_t *code, size_t length, lp_error *err);

/* Is there a rule for an operation of this name (as lp_graph_add_op takes it)? */
bool lp_graph_knows(const char *name);

/* The tensors whose values matter to a caller. */
lp_status lp_graph_set_outputs(lp_graph *graph, const int64_t *tensors, size_t count, lp_error *err);

/* Run liveness and the rules, and gather the axes. */
lp_status lp_graph_build(lp_graph *graph, lp_error *err);

/* Operations no rule knows; they froze what they touched. */
size_t lp_graph_unknown_count(const lp_graph *graph);
uint32_t lp_graph_unknown_op(const lp_graph *graph, size_t i);

size_t lp_graph_axis_count(const lp_graph *graph);
const lp_axis *lp_graph_axis(const lp_graph *graph, size_t id);

/* First position of the axis' index 0 in a member's dimension, and the distance from one index to the next. */
void lp_graph_member_place(const lp_graph *graph, const lp_member *member, int64_t *start, int64_t *stride);

/* Walk an axis' notes: *cursor begins as axis->notes; false at the end. */
bool lp_graph_note(const lp_graph *graph, uint32_t *cursor, lp_reason *reason, uint32_t *op);

/* Freeze the axis after the fact (a trial forward failed, its size is used as a number, ...). */
lp_status lp_graph_freeze(lp_graph *graph, size_t id, lp_reason reason, uint32_t op, lp_error *err);

/* Positions along the member's dimension, axis.size rows of *per_index each, ascending within a row.  `out` NULL: only
 * *per_index is set. */
lp_status lp_graph_positions(const lp_graph *graph, const lp_axis *axis, size_t member, int64_t *out,
                             size_t *per_index, lp_error *err);

/* The same for a ragged choice: the removed positions when, for each index o of the axis `outer`, the indices
 * chosen[o * per_outer .. + per_outer) of `axis` go.  Sets flags[position] = 1.  LP_ERR_PLAN when this member does not
 * nest `axis` inside `outer`. */
lp_status lp_graph_mark_ragged(const lp_graph *graph, const lp_axis *axis, size_t member,
                               const lp_axis *outer, const int64_t *chosen, size_t per_outer, uint8_t *flags,
                               lp_error *err);

/* Size of tensor dimension (tensor, dim) when axis i loses removed[i] indices. */
lp_status lp_graph_new_size(lp_graph *graph, uint32_t tensor, uint32_t dim, const int64_t *removed,
                            int64_t *out, lp_error *err);

/* Elements of all parameters then. */
lp_status lp_graph_numel(lp_graph *graph, const int64_t *removed, int64_t *out, lp_error *err);

/* Set flags[position] = 1 for each position of (tensor, dim) that goes when the indices with gone[axis][index] go;
 * gone[axis] NULL keeps the axis whole.  flags has the dimension's old size. */
lp_status lp_graph_mark_removed(lp_graph *graph, uint32_t tensor, uint32_t dim, const uint8_t *const *gone,
                                uint8_t *flags, lp_error *err);

/* Axis ids in the dimension (each once), at most `capacity` of them; *count is the full number. */
lp_status lp_graph_dim_axes(lp_graph *graph, uint32_t tensor, uint32_t dim, uint32_t *out, size_t capacity,
                            size_t *count, lp_error *err);

/* The same for all atoms, axes or not, outer to inner and as often as they occur.  Comparable with lp_axis.root. */
lp_status lp_graph_dim_atoms(lp_graph *graph, uint32_t tensor, uint32_t dim, uint32_t *out, size_t capacity,
                             size_t *count, lp_error *err);

size_t lp_graph_marked_count(const lp_graph *graph);
const lp_marked *lp_graph_marked(const lp_graph *graph, size_t i);

/* Multiply-accumulates of the matrix products and convolutions on the tape, after removal (NULL: none). */
lp_status lp_graph_macs(lp_graph *graph, const int64_t *removed, int64_t *out, lp_error *err);

/* The same for each operation: out[op] for every operation on the tape, 0 where it multiplies no matrices. */
lp_status lp_graph_macs_each(lp_graph *graph, const int64_t *removed, int64_t *out, lp_error *err);

size_t lp_graph_op_count(const lp_graph *graph);

/* The chain from one parameter dimension to another through an axis: steps of rule LP_RULE_PART lead from a dimension
 * to a part of it and back.  Atoms name dimensions: see lp_graph_atom_dim. */
lp_status lp_graph_explain(lp_graph *graph, size_t axis, size_t from_member, size_t to_member, lp_steps *out,
                           lp_error *err);

/* The dimension an atom was made for: false when it is a part of another. */
bool lp_graph_atom_dim(const lp_graph *graph, lp_atom atom, uint32_t *tensor, uint32_t *dim);

/* Names for people. */
const char *lp_kind_name(lp_kind kind);
const char *lp_rule_label(lp_rule rule);
const char *lp_reason_text(lp_reason reason);

const lp_allocator *lp_graph_allocator(const lp_graph *graph);

#endif
