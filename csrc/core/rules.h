/* The rules: what each ATen operation says about the axes of its operands.  rules_table.c maps names to them. */
#ifndef LP_CORE_RULES_H
#define LP_CORE_RULES_H

#include "graph_internal.h"

#define LP_DECLARE_RULE(name) lp_status name(lp_run *run, const lp_op *op, lp_error *err)

/* rules_point.c: element by element */
enum { LP_POINT_PLAIN = 0, LP_POINT_NONLINEAR, LP_POINT_PRODUCT, LP_POINT_SUM };
enum { LP_KEEP_ALL = 0, LP_KEEP_SHAPE };
LP_DECLARE_RULE(lp_rule_keep);    /* detail: do the elements stay, or is only the shape taken? */
LP_DECLARE_RULE(lp_rule_factory); /* detail: lp_reason or LP_REASON_NONE */
LP_DECLARE_RULE(lp_rule_nothing);
LP_DECLARE_RULE(lp_rule_glu);

/* rules_shape.c: views and rearrangements */
LP_DECLARE_RULE(lp_rule_view);
LP_DECLARE_RULE(lp_rule_squeeze);
LP_DECLARE_RULE(lp_rule_permute); /* detail: lp_permutation */
enum { LP_PERMUTE_LIST = 0, LP_PERMUTE_TWO, LP_PERMUTE_T, LP_PERMUTE_REVERSE, LP_PERMUTE_LAST };
LP_DECLARE_RULE(lp_rule_expand);
LP_DECLARE_RULE(lp_rule_repeat);
LP_DECLARE_RULE(lp_rule_cat);
LP_DECLARE_RULE(lp_rule_stack);
LP_DECLARE_RULE(lp_rule_pad);
LP_DECLARE_RULE(lp_rule_slice);
LP_DECLARE_RULE(lp_rule_pieces);
LP_DECLARE_RULE(lp_rule_select);  /* also unbind */
LP_DECLARE_RULE(lp_rule_reorder); /* flip, roll: order along the dims in argument `detail` */
LP_DECLARE_RULE(lp_rule_unfold);
LP_DECLARE_RULE(lp_rule_as_strided);
LP_DECLARE_RULE(lp_rule_as_complex);
LP_DECLARE_RULE(lp_rule_as_real);

/* rules_matmul.c: contractions.  detail: position of the first factor among the arguments */
LP_DECLARE_RULE(lp_rule_matmul);
LP_DECLARE_RULE(lp_rule_linear);
LP_DECLARE_RULE(lp_rule_grouped_mm);
LP_DECLARE_RULE(lp_rule_attention); /* detail: position of attn_mask, 0 where there is none */
LP_DECLARE_RULE(lp_rule_convolution);
LP_DECLARE_RULE(lp_rule_triangular);

/* rules_index.c: data-dependent addressing */
LP_DECLARE_RULE(lp_rule_embedding);
LP_DECLARE_RULE(lp_rule_index_select);
LP_DECLARE_RULE(lp_rule_gather);
LP_DECLARE_RULE(lp_rule_scatter);
LP_DECLARE_RULE(lp_rule_index_add); /* also index_copy, index_fill */
LP_DECLARE_RULE(lp_rule_index);
LP_DECLARE_RULE(lp_rule_index_put);
LP_DECLARE_RULE(lp_rule_masked_scatter);
LP_DECLARE_RULE(lp_rule_nonzero);
LP_DECLARE_RULE(lp_rule_topk);
LP_DECLARE_RULE(lp_rule_sort); /* detail 1: the only output is indices */
LP_DECLARE_RULE(lp_rule_count);
LP_DECLARE_RULE(lp_rule_search); /* detail: argument whose shape the output takes */

/* rules_reduce.c: reductions and normalisations.  detail: LP_REDUCE(effect, position of the dims argument) */
enum {
    LP_REDUCE_SUM = 0,
    LP_REDUCE_MEAN,
    LP_REDUCE_EXTREME,
    LP_REDUCE_SOFT,
    LP_REDUCE_NORM,
    LP_REDUCE_ORDER
};
#define LP_REDUCE(effect, argument) ((uint8_t)((effect) | ((argument) << 4)))
LP_DECLARE_RULE(lp_rule_reduce);
LP_DECLARE_RULE(lp_rule_extreme); /* max/min: a reduction over one dim, over all, or of two tensors */
LP_DECLARE_RULE(lp_rule_argmax);
LP_DECLARE_RULE(lp_rule_softmax);
LP_DECLARE_RULE(lp_rule_scan);
LP_DECLARE_RULE(lp_rule_triangle);
LP_DECLARE_RULE(lp_rule_layer_norm); /* detail: position of the first weight */
LP_DECLARE_RULE(lp_rule_group_norm);
LP_DECLARE_RULE(lp_rule_batch_norm);
LP_DECLARE_RULE(lp_rule_weight_norm);

/* rules_space.c: windows, padding, shuffles, transforms */
LP_DECLARE_RULE(lp_rule_pool);    /* detail: number of spatial dimensions */
LP_DECLARE_RULE(lp_rule_shuffle); /* detail: number of dimensions behind the channels */
LP_DECLARE_RULE(lp_rule_fourier);

/* rules_declared.c: what lp_graph_declare was given */
LP_DECLARE_RULE(lp_rule_declared);

/* The table, for its test: entries are sorted by name. */
size_t lp_rule_count_all(void);
const char *lp_rule_name(size_t i);

/* Unify the right-aligned dimensions of `tensor` that are not of size 1 with those of dims[ndim]; a size that differs
 * freezes both. */
lp_status lp_broadcast(lp_run *run, const lp_tensor *tensor, const lp_expr *dims, const int64_t *sizes,
                       size_t ndim, lp_rule rule, lp_error *err);

#endif
