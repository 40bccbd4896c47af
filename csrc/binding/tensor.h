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
#include "core/backend.h"

#include LLMPRUNE_DLPACK_H

/* Element types a view can have. */
typedef enum {
    LP_ELEMENT_F32 = 0,
    LP_ELEMENT_F64,
    LP_ELEMENT_F16,
    LP_ELEMENT_BF16,
    LP_ELEMENT_I8,
    LP_ELEMENT_U8,
    LP_ELEMENT_I16,
    LP_ELEMENT_I32,
    LP_ELEMENT_I64,
    LP_ELEMENT_BOOL
} lp_element;

/* Where the tensors of one call lie: the first one adopted decides, and the others must follow. */
typedef struct {
    bool decided;
    int device;       /* CUDA device; -1: the CPU */
    uintptr_t stream; /* CUDA stream of the call; 0 and 1 are the legacy default one */
    const char *name; /* of the argument that decided */
} lp_place;

typedef enum { LP_OWNER_NONE = 0, LP_OWNER_DLPACK, LP_OWNER_DLPACK_LEGACY, LP_OWNER_BUFFER } lp_owner;

typedef struct {
    void *data; /* first element, byte offset applied; may be NULL when numel is 0 */
    int ndim;
    int64_t shape[LP_MAX_DIMS];
    int64_t strides[LP_MAX_DIMS]; /* in elements; filled in even where the producer gave none */
    int64_t numel;                /* product of shape */
    lp_element element;
    size_t itemsize;  /* bytes of one element */
    bool readonly;    /* always false after an adoption that asked for LP_VIEW_WRITABLE */
    int device;       /* CUDA device whose memory this is; -1: the CPU's */
    const char *name; /* the argument's name in messages; not owned, a literal */
    lp_owner owner;
    void *managed;    /* the producer's DLManagedTensor or DLManagedTensorVersioned */
    Py_buffer buffer; /* held when owner is LP_OWNER_BUFFER */
} lp_view;

/* What the caller needs of a tensor, or-ed together. */
enum {
    LP_VIEW_WRITABLE = 1,  /* refuse a read-only tensor: we are about to write */
    LP_VIEW_CONTIGUOUS = 2 /* refuse anything but dense row-major order */
};

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

/* Name of an element type as torch spells it ("bfloat16"). */
const char *lp_element_name(lp_element element);

/* The element type as DLPack spells it. */
DLDataType lp_element_dlpack(lp_element element);

/* True when `view` is dense and row-major; dimensions of size 1 and empty tensors do not matter. */
bool lp_view_is_contiguous(const lp_view *view);

/* True when the elements fill a dense block in some order of dimensions: order[0..ndim) then lists them outermost
 * first.  False for slices, expanded (stride 0), or overlapping layouts. */
bool lp_view_dense_order(const lp_view *view, int order[LP_MAX_DIMS]);

/* True when the two views' byte ranges meet. Interleaved strides that never touch count as meeting. */
bool lp_view_overlaps(const lp_view *a, const lp_view *b);

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
