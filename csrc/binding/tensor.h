/* Tensors and arrays from Python as plain pointers: weights by DLPack, scores and indices as NumPy arrays (through the
 * buffer protocol, so that no NumPy header or version is built in).
 *
 * A view is adopted with the GIL held, used with or without it, and released with it held.  While it is adopted the
 * producer keeps the memory alive; nothing is ever copied.  A zeroed lp_view is a valid, empty view: releasing it does
 * nothing, so one cleanup label can release every view of a call whether or not it was reached.
 */
#ifndef LP_BINDING_TENSOR_H
#define LP_BINDING_TENSOR_H

#include "binding.h"
#include "view.h"

#include LLMPRUNE_DLPACK_H

/* Where the tensors of one call lie: the first one adopted decides, and the others must follow. */
typedef struct {
    bool decided;
    int device;       /* CUDA device; -1: the CPU */
    uintptr_t stream; /* CUDA stream of the call; 0 and 1 are the legacy default one */
    const char *name; /* of the argument that decided */
} lp_place;

/* Adopt `object`, which has __dlpack__, of one of the element types above and at most LP_MAX_DIMS dimensions.  It lies at
 * `place`, which it may decide, or in CPU memory where place is NULL (pinned memory counts as that).  The first tensor on a
 * CUDA device loads the CUDA backend.  Asks for the device before the capsule and for a versioned capsule before a legacy
 * one; a capsule is renamed, and so taken over, only after every check has passed.
 * 0, or -1 with TensorError (one sentence that begins with `name`), DeviceError or MemoryError set and *view empty. */
int lp_view_adopt(lp_view *view, const lp_module_state *state, lp_place *place, PyObject *object,
                  const char *name, unsigned need);

/* Adopt the NumPy array `object` (or anything else with the buffer protocol) of native type LP_ELEMENT_F64 or
 * LP_ELEMENT_I64 and `ndim` dimensions, row-major.  Result as lp_view_adopt. */
int lp_view_adopt_array(lp_view *view, const lp_module_state *state, PyObject *object, const char *name,
                        lp_element element, int ndim, unsigned need);

/* Hand the memory back to its producer and empty the view.  GIL held; a pending exception survives. */
void lp_view_release(lp_view *view);
void lp_view_release_all(lp_view *views, size_t count);

/* The element type as DLPack spells it. */
DLDataType lp_element_dlpack(lp_element element);

/* Each check below: 0, or -1 with TensorError set. */

/* `view` has dimensions and elements. */
int lp_view_filled(const lp_module_state *state, const lp_view *view);

/* `view` holds floating-point numbers: *dtype is the backend's name for them. */
int lp_view_float(const lp_module_state *state, const lp_view *view, lp_dtype *dtype);

/* `a` and `b` have one element type. */
int lp_view_same_element(const lp_module_state *state, const lp_view *a, const lp_view *b);

/* `a` and `b` have one shape. */
int lp_view_same_shape(const lp_module_state *state, const lp_view *a, const lp_view *b);

/* Dimension `dim` of `view` has `size` elements; `meaning` says what those are ("input features"). */
int lp_view_has_size(const lp_module_state *state, const lp_view *view, int dim, int64_t size,
                     const char *meaning);

/* The output `out` shares no memory with `other`. */
int lp_view_apart(const lp_module_state *state, const lp_view *out, const lp_view *other);

/* The 1-D LP_ELEMENT_I64 view lists strictly increasing positions in [0, size), at least one. */
int lp_view_positions(const lp_module_state *state, const lp_view *view, int64_t size);

#endif
