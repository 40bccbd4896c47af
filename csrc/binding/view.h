/* What a producer says of a tensor's memory, checked: a view with plain pointers and sizes.
 *
 * No Python and no DLPack here (tensor.h adopts tensors from Python through this), so the C tests and the fuzzer run it
 * alone.  Nothing a producer says is believed before lp_view_read has passed it: afterwards every element lies at an
 * address, and no product or sum of sizes and strides overflows. */
#ifndef LP_BINDING_VIEW_H
#define LP_BINDING_VIEW_H

#include "core/backend.h"

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
    LP_ELEMENT_BOOL,
    LP_ELEMENT_COUNT
} lp_element;

typedef enum { LP_OWNER_NONE = 0, LP_OWNER_DLPACK, LP_OWNER_DLPACK_LEGACY, LP_OWNER_BUFFER } lp_owner;

typedef struct {
    void *data; /* first element, byte offset applied; may be NULL when numel is 0 */
    int ndim;
    int64_t shape[LP_MAX_DIMS];
    int64_t strides[LP_MAX_DIMS]; /* in elements; filled in even where the producer gave none */
    int64_t numel;                /* product of shape */
    lp_element element;
    size_t itemsize;  /* bytes of one element */
    bool readonly;    /* always false after a reading that asked for LP_VIEW_WRITABLE */
    int device;       /* CUDA device whose memory this is; -1: the CPU's */
    const char *name; /* the argument's name in messages; not owned, a literal */
    lp_owner owner;
    void *managed; /* the producer's DLManagedTensor, DLManagedTensorVersioned, or our Py_buffer */
} lp_view;

/* What the caller needs of a tensor, or-ed together. */
enum {
    LP_VIEW_WRITABLE = 1,  /* refuse a read-only tensor: we are about to write */
    LP_VIEW_CONTIGUOUS = 2 /* refuse anything but dense row-major order */
};

/* Name of an element type as torch spells it ("bfloat16"), and its bytes. */
const char *lp_element_name(lp_element element);
size_t lp_element_size(lp_element element);

/* Fill *view (its name, device and readonly are set already) from what a producer says: `ndim` sizes and strides, in elements
 * (NULL: row-major), and the first element at data + byte_offset.
 * LP_ERR_TENSOR, with a sentence that begins with the name: more than LP_MAX_DIMS dimensions, an impossible size or stride,
 * memory that is missing, misaligned, or beyond the address space, or something `need` asks for and the tensor lacks. */
lp_status lp_view_read(lp_view *view, lp_element element, int ndim, const int64_t *shape,
                       const int64_t *strides, const void *data, uint64_t byte_offset, unsigned need,
                       lp_error *err);

/* True when `view` is dense and row-major; dimensions of size 1 and empty tensors do not matter. */
bool lp_view_is_contiguous(const lp_view *view);

/* True when the elements fill a dense block in some order of dimensions: order[0..ndim) then lists them outermost
 * first.  False for slices, expanded (stride 0), or overlapping layouts. */
bool lp_view_dense_order(const lp_view *view, int order[LP_MAX_DIMS]);

/* True when the two views' byte ranges meet. Interleaved strides that never touch count as meeting. */
bool lp_view_overlaps(const lp_view *a, const lp_view *b);

#endif
