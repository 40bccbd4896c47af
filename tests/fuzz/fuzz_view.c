/* binding/view.h: whatever a producer says of its memory is refused, or describes elements that all lie where it says. */
#include "input.h"

#include "binding/view.h"

#include <string.h>

enum { MOST_BYTES = 1 << 14 };

typedef struct {
    int ndim;
    int64_t shape[10], strides[10];
    bool dense; /* no strides given */
    lp_element element;
    unsigned need;
} claim;

static claim read_claim(input *in)
{
    claim said = {.ndim = (int)input_below(in, 5), .element = (lp_element)input_below(in, LP_ELEMENT_COUNT)};
    uint8_t how = input_byte(in);

    if (how >= 250)
        said.ndim = (int)input_byte(in) - 100;
    said.dense = how & 1;
    said.need = how >> 1 & 3;
    for (int d = 0; d < said.ndim && d < 10; d++) {
        said.shape[d] = input_int(in);
        said.strides[d] = input_int(in);
    }
    if (how & 8) { /* what a producer of dense tensors says, in some order of dimensions */
        int64_t stride = 1;
        for (int i = 0, at = said.ndim > 0 ? (how >> 4) % said.ndim : 0; i < said.ndim && i < 10; i++) {
            int d = (at + i) % said.ndim;
            if (d >= 10)
                continue;
            said.strides[d] = stride;
            if (said.shape[d] < 1 || said.shape[d] > 64)
                said.shape[d] = 2;
            if (!lp_mul_i64(stride, said.shape[d], &stride))
                return said;
        }
    }
    return said;
}

/* Bytes before and behind the first element that the claim needs, by walking over every element; false where they are more
 * than MOST_BYTES. */
static bool extent(const lp_view *view, int64_t *below, int64_t *above)
{
    int64_t low = 0, high = 0, width = (int64_t)view->itemsize;

    for (int d = 0; d < view->ndim; d++) {
        int64_t steps = view->shape[d] - 1, reach;
        if (steps == 0)
            continue;
        if (view->strides[d] > MOST_BYTES || view->strides[d] < -MOST_BYTES || steps > MOST_BYTES)
            return false;
        reach = steps * view->strides[d];
        *(reach < 0 ? &low : &high) += reach;
    }
    *below = -low * width;
    *above = (high + 1) * width;
    return *below <= MOST_BYTES && *above <= MOST_BYTES;
}

/* Visit every element of an adopted view: it must lie in the memory, which is only as large as it has to be, and the layout
 * must be what the questions say. */
static void walk(const lp_view *view, unsigned char *memory, int64_t below, int64_t above)
{
    size_t bytes = (size_t)(below + above), width = view->itemsize;
    int64_t index[LP_MAX_DIMS] = {0}, expected = 0;
    int order[LP_MAX_DIMS];
    bool contiguous = true, ordered = lp_view_dense_order(view, order), twice = false;
    size_t touched = 0;

    memset(memory, 0, bytes);
    for (int64_t n = 0; n < view->numel; n++) {
        unsigned char *element = view->data;
        for (int d = 0; d < view->ndim; d++)
            element += index[d] * view->strides[d] * (int64_t)width;
        if (element < memory || element + width > memory + bytes)
            give_up("an element outside the memory");
        contiguous &= element == (unsigned char *)view->data + expected++ * (int64_t)width;
        twice |= *element != 0;
        touched += *element == 0;
        memset(element, 1, width);
        for (int d = view->ndim; d-- > 0 && ++index[d] == view->shape[d];)
            index[d] = 0;
    }
    if (contiguous != lp_view_is_contiguous(view))
        give_up("contiguous or not?");
    /* dense in some order: the elements fill a block that begins at the first of them */
    if (ordered != (!twice && touched * width == bytes && below == 0))
        give_up("dense or not?");
    if (ordered) {
        bool seen[LP_MAX_DIMS] = {false};
        for (int i = 0; i < view->ndim; i++) {
            if (order[i] < 0 || order[i] >= view->ndim || seen[order[i]])
                give_up("no order of the dimensions");
            seen[order[i]] = true;
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static union {
        int64_t align;
        unsigned char bytes[4 * MOST_BYTES];
    } pool;
    input in = {data, data + size};
    claim said = read_claim(&in);
    lp_view view = {.name = "tensor", .device = -1, .readonly = input_byte(&in) & 1};
    lp_view far_away = view;
    lp_error err = {.message = ""};
    int64_t below = 0, above = 0;
    uint64_t offset = (uint64_t)input_int(&in);
    lp_status status;

    /* once anywhere in the address space, where nothing is read */
    status = lp_view_read(&far_away, said.element, said.ndim, input_byte(&in) < 240 ? said.shape : NULL,
                          said.dense ? NULL : said.strides, (void *)(uintptr_t)input_int(&in), offset,
                          said.need, &err);
    if (status != LP_OK && (status != LP_ERR_TENSOR || strncmp(err.message, "tensor: the tensor", 6) != 0))
        give_up("status %d: %s", (int)status, err.message);
    if (status == LP_OK && lp_view_overlaps(&far_away, &far_away) != (far_away.numel > 0))
        give_up("a tensor shares memory with itself");

    /* and once on memory that has what was said, and no more */
    status = lp_view_read(&view, said.element, said.ndim, said.shape, said.dense ? NULL : said.strides,
                          pool.bytes + 2 * MOST_BYTES, 0, said.need, &err);
    if (status != LP_OK || view.numel == 0 || view.numel > MOST_BYTES || !extent(&view, &below, &above))
        return 0;
    walk(&view, pool.bytes + 2 * MOST_BYTES - below, below, above);
    if (view.readonly && (said.need & LP_VIEW_WRITABLE))
        give_up("read-only, and to be written to");
    if ((said.need & LP_VIEW_CONTIGUOUS) && !lp_view_is_contiguous(&view))
        give_up("not contiguous");
    return 0;
}
