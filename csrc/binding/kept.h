/* What stays of a tensor, as Python says it. */
#ifndef LP_BINDING_KEPT_H
#define LP_BINDING_KEPT_H

#include "tensor.h"

/* Which positions of each of a tensor's dimensions stay, by the tensor's own order of dimensions. */
typedef struct {
    lp_view views[LP_MAX_DIMS];
    lp_kept kept[LP_MAX_DIMS];
    int64_t shape[LP_MAX_DIMS]; /* what stays */
} lp_kept_set;

/* Fill the zeroed set from the dict dimension -> positions for `tensor`; `written` is the tensor the call writes to.  0, or -1
 * with TensorError set; the views are to be released either way. */
int lp_kept_adopt(lp_kept_set *set, const lp_module_state *state, PyObject *dict, const lp_view *tensor,
                  const lp_view *written);

#endif
