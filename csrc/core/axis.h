/* The axis algebra: every dimension of every tensor as an expression over atomic axes.
 *
 * An atom is a union-find node of a fixed size.  It is a leaf, or it has been refined into a product (outer to inner,
 * 4096 = heads 32 x dim 128) or a sum (2I = gate I + up I) of other atoms.  Refinement is global: whoever refers to the
 * atom sees its parts from then on.  An expression is a list of factors, outer to inner; the empty expression has size 1.
 *
 * A union keeps its proof (the operation and the rule that demanded it), so that lp_axes_path can say why two atoms are
 * one axis.  A unification that does not align never guesses: both sides are frozen with the reason.
 */
#ifndef LP_CORE_AXIS_H
#define LP_CORE_AXIS_H

#include "status.h"

typedef uint32_t lp_atom;
#define LP_NO_ATOM UINT32_MAX
#define LP_NO_OP UINT32_MAX

typedef enum { LP_LEAF = 0, LP_PRODUCT = 1, LP_SUM = 2 } lp_definition;

/* Why two atoms became one axis.  The first three are the dependency rules of LLM-Pruner (Ma et al. 2023, section 3.1):
 * forward (an operation carries a neuron on), backward (a consumer contracts with its producer), and the coupling of
 * operands of equal shape. */
typedef enum {
    LP_RULE_NONE = 0,
    LP_RULE_FORWARD,
    LP_RULE_BACKWARD,
    LP_RULE_EQUAL,
    LP_RULE_VALUE, /* an index tensor whose values name positions of the axis */
    LP_RULE_PART   /* a refinement: the atom is one factor or term of a larger dimension */
} lp_rule;

/* Why an atom may not lose an index. */
typedef enum {
    LP_REASON_NONE = 0,
    LP_REASON_INPUT,
    LP_REASON_OUTPUT,
    LP_REASON_CONSTANT,
    LP_REASON_POSITION,
    LP_REASON_INDEXED,
    LP_REASON_SPATIAL,
    LP_REASON_SELECT,
    LP_REASON_COMPLEX,
    LP_REASON_SLOTS,
    LP_REASON_PADDING,
    LP_REASON_UNKNOWN_OP,
    LP_REASON_MISALIGNED,
    LP_REASON_ORDER, /* order along the axis matters: cumsum, sort, tril, flip */
    LP_REASON_VALUE, /* the size is used as a number */
    LP_REASON_RANDOM,
    LP_REASON_UNUSED,    /* no operation the outputs depend on uses it */
    LP_REASON_FIXED,     /* a size written as a literal in the model's code */
    LP_REASON_TRIAL,     /* the trial forward failed */
    LP_REASON_GROUPED,   /* normalised within groups of a fixed size */
    LP_REASON_SCALE,     /* attention scales by the size of this axis unless told otherwise */
    LP_REASON_DECLARED,  /* a rule declared from outside says so */
    LP_REASON_NUMBERED,  /* integers that name its positions are used as numbers */
    LP_REASON_REMAINS,   /* a value that does not vanish with the weights is summed over it */
    LP_REASON_EMPTY,     /* an operation took an empty part of it, or of what it meets */
    LP_REASON_MARK_BASE, /* from here on: marks, which do not freeze */
    LP_MARK_MEAN = LP_REASON_MARK_BASE,
    LP_MARK_EXTREME,
    LP_MARK_SOFTMAX,
    LP_MARK_NORM,
    LP_MARK_TOPK,
    LP_MARK_REMAINS, /* a mean over it is of values that do not vanish with the weights */
    LP_REASON_COUNT
} lp_reason;

/* Roles: what operations do with an axis; groups.c reads the kind (head, ffn, ...) off them. */
enum {
    LP_FROZEN = 1u << 0,
    LP_MARKED = 1u << 1,
    LP_ROLE_EMBEDDING = 1u << 2,  /* feature dimension of a lookup table */
    LP_ROLE_LINEAR_OUT = 1u << 3, /* free dimension of a weight in a matrix product */
    LP_ROLE_LINEAR_IN = 1u << 4,  /* dimension in which a weight is contracted */
    LP_ROLE_BATCH = 1u << 5,      /* batch dimension of a product of two activations */
    LP_ROLE_CONTRACT = 1u << 6,   /* contracted between two activations */
    LP_ROLE_VALUE = 1u << 7,      /* free dimension of the second of two activations */
    LP_ROLE_NONLINEAR = 1u << 8,  /* passed through a non-linear function */
    LP_ROLE_GATED = 1u << 9,      /* two activations multiplied */
    LP_ROLE_JOINED = 1u << 10,    /* two different linear outputs added: a residual stream */
    LP_ROLE_ROUTED = 1u << 11,    /* chosen from by top-k */
    LP_ROLE_SCALE = 1u << 12,     /* multiplied by a parameter of two or more dimensions */
    LP_ROLE_CONVOLVED = 1u << 13  /* channel of a convolution */
};

typedef struct {
    uint32_t off, len; /* a span of the factor arena */
} lp_expr;

#define LP_EMPTY ((lp_expr){0, 0})

typedef struct {
    int64_t size;
    lp_atom parent;       /* union-find; itself at the root */
    uint32_t weight;      /* atoms in the class (roots) */
    lp_expr parts;        /* of a product or sum (roots) */
    uint32_t flags;       /* LP_FROZEN, LP_MARKED, roles (roots) */
    uint32_t notes;       /* head of the list of reasons and marks (roots) */
    uint32_t refined_by;  /* operation that refined the class (roots) */
    lp_atom proof_parent; /* proof forest, independent of `parent` */
    uint32_t proof_op;
    uint8_t proof_rule;
    uint8_t definition; /* lp_definition (roots) */
} lp_atom_node;

typedef struct {
    uint32_t op;
    uint32_t next; /* 0 ends a list */
    uint8_t reason;
} lp_note;

/* A pair of expressions awaiting unification. */
typedef struct {
    lp_expr a, b;
    uint8_t rule;
} lp_pair;

typedef struct {
    lp_allocator allocator;
    lp_atom_node *atoms;
    size_t atom_count, atom_capacity;
    lp_atom *factors;
    size_t factor_count, factor_capacity;
    lp_note *notes;
    size_t note_count, note_capacity;
    lp_pair *work;
    size_t work_count, work_capacity;
    lp_atom *stack; /* scratch of the walks */
    size_t stack_count, stack_capacity;
    lp_atom *gather;
    size_t gather_count, gather_capacity;
    uint32_t op; /* operation at work, recorded in proofs and notes */
    bool quiet;  /* the operation's result is unused: unify, but neither freeze nor mark */
} lp_axes;

void lp_axes_init(lp_axes *axes, lp_allocator allocator);
void lp_axes_free(lp_axes *axes);

/* A fresh leaf of the given size (>= 1). */
lp_status lp_axes_atom(lp_axes *axes, int64_t size, lp_atom *out, lp_error *err);

/* An expression of one fresh leaf, or the empty expression when size is 1. */
lp_status lp_axes_fresh(lp_axes *axes, int64_t size, lp_expr *out, lp_error *err);

/* The representative of an atom's class. */
lp_atom lp_axes_find(lp_axes *axes, lp_atom atom);

/* The product of an expression's factors. */
int64_t lp_axes_size(const lp_axes *axes, lp_expr expr);

/* Expand products: *out lists roots that are leaves or sums, none of size 1. */
lp_status lp_axes_resolve(lp_axes *axes, lp_expr expr, lp_expr *out, lp_error *err);

/* outer x inner. */
lp_status lp_axes_concat(lp_axes *axes, lp_expr outer, lp_expr inner, lp_expr *out, lp_error *err);

/* terms[0] + terms[1] + ...  A term of size 1 becomes a unit atom; LP_ERR_OVERFLOW past 2^63. */
lp_status lp_axes_sum(lp_axes *axes, const lp_expr *terms, size_t count, lp_expr *out, lp_error *err);

/* Regroup the factors into expressions of the given sizes (their product is the expression's size), refining where a
 * border falls inside a factor.  *aligned is false when it cannot be done; `out` is then unspecified. */
lp_status lp_axes_split(lp_axes *axes, lp_expr expr, const int64_t *sizes, size_t count, lp_expr *out,
                        bool *aligned, lp_error *err);

/* Cut at ascending offsets 0 < o_1 < ... < size into count + 1 pieces; LP_ERR_ARGUMENT when they are not.  *aligned as
 * above. */
lp_status lp_axes_cut(lp_axes *axes, lp_expr expr, const int64_t *offsets, size_t count, lp_expr *out,
                      bool *aligned, lp_error *err);

/* Make two expressions of equal size the same axis.  Where they do not align, or differ in size, both are frozen with
 * LP_REASON_MISALIGNED. */
lp_status lp_axes_unify(lp_axes *axes, lp_expr a, lp_expr b, lp_rule rule, lp_error *err);

/* Freeze (reason below LP_REASON_MARK_BASE) or mark every leaf of an expression; silent while axes->quiet. */
lp_status lp_axes_note(lp_axes *axes, lp_expr expr, lp_reason reason, lp_error *err);

/* The same for one leaf root, whatever axes->quiet says. */
lp_status lp_axes_note_atom(lp_axes *axes, lp_atom root, lp_reason reason, lp_error *err);

/* Set role bits on every leaf of an expression; silent while axes->quiet. */
lp_status lp_axes_role(lp_axes *axes, lp_expr expr, uint32_t roles, lp_error *err);

/* The bits that all leaves (any = false) or some leaf (any = true) carry; 0 for the empty expression. */
lp_status lp_axes_flags(lp_axes *axes, lp_expr expr, bool any, uint32_t *out, lp_error *err);

/* Append the leaf roots of an expression, left to right with repetitions, to a fresh span of the factor arena. */
lp_status lp_axes_leaves(lp_axes *axes, lp_expr expr, lp_expr *out, lp_error *err);

/* Size of an expression when leaf root r loses removed[r] indices (NULL: none); a class without an entry keeps all. */
lp_status lp_axes_new_size(lp_axes *axes, lp_expr expr, const int64_t *removed, int64_t *out, lp_error *err);

/* One factor that varies while an axis index stays fixed. */
typedef struct {
    int64_t count, stride;
    lp_atom atom; /* root of the factor, leaf or sum */
} lp_loop;

/* Positions of index i of a leaf inside a dimension: offset + i * stride + any combination of the loops. */
typedef struct {
    lp_atom leaf;
    int64_t offset, stride;
    uint32_t loop_first, loop_count;
} lp_occurrence;

typedef struct {
    lp_occurrence *items;
    size_t count, capacity;
    lp_loop *loops;
    size_t loop_count, loop_capacity;
} lp_occurrences;

/* Append every occurrence of every leaf in a dimension, in order of position. */
lp_status lp_axes_occurrences(lp_axes *axes, lp_expr expr, lp_occurrences *out, lp_error *err);
void lp_occurrences_free(const lp_allocator *allocator, lp_occurrences *list);

/* One step of a proof: two atoms are one axis by `rule` at operation `op`. */
typedef struct {
    lp_atom from, to;
    uint32_t op;
    uint8_t rule;
} lp_step;

typedef struct {
    lp_step *items;
    size_t count, capacity;
} lp_steps;

/* The chain of unions that makes a and b one class; LP_ERR_ARGUMENT when they are not. */
lp_status lp_axes_path(lp_axes *axes, lp_atom a, lp_atom b, lp_steps *out, lp_error *err);
void lp_steps_free(const lp_allocator *allocator, lp_steps *steps);

#endif
