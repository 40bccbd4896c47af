/* _core.Block: memory that a call of ours left a result in, handed back to Python by DLPack with no copy. */
#ifndef LP_BINDING_BLOCK_H
#define LP_BINDING_BLOCK_H

#include "tensor.h"

/* block.c: create _core.Block, keep it in `state` and add it to `module`.  -1 with an exception set on failure. */
int lp_binding_add_block(PyObject *module, lp_module_state *state);

/* A new Block of the elements of `view` (ndim sizes and strides, in elements, from view->data on), which takes the
 * adopted view over: the producer's memory stays alive as long as the Block or any capsule it made.  `view` is empty
 * afterwards, also on failure.  NULL with MemoryError set on failure. */
PyObject *lp_block_new(const lp_module_state *state, lp_view *view, const int64_t *shape,
                       const int64_t *strides);

#endif
