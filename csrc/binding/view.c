#include "view.h"

static const struct {
    const char *name;
    size_t size;
} elements[LP_ELEMENT_COUNT] = {
    [LP_ELEMENT_F32] = {"float32", 4}, [LP_ELEMENT_F64] = {"float64", 8},   [LP_ELEMENT_F16] = {"float16", 2},
    [LP_ELEMENT_I8] = {"int8", 1},     [LP_ELEMENT_BF16] = {"bfloat16", 2}, [LP_ELEMENT_U8] = {"uint8", 1},
    [LP_ELEMENT_I16] = {"int16", 2},   [LP_ELEMENT_I32] = {"int32", 4},     [LP_ELEMENT_I64] = {"int64", 8},
    [LP_ELEMENT_BOOL] = {"bool", 1},
};

const char *lp_element_name(lp_element element)
{
    return elements[element].name;
}

size_t lp_element_size(lp_element element)
{
    return elements[element].size;
}

/* Sizes whose bytes do not fit int64 are refused so that later products cannot overflow. */
static lp_status read_sizes(lp_view *view, int ndim, const int64_t *shape, lp_error *err)
{
    int64_t bound = (int64_t)view->itemsize;

    if (ndim < 0 || ndim > LP_MAX_DIMS)
        return lp_error_set(err, LP_ERR_TENSOR, "%s: the tensor has %d dimensions; at most %d are supported",
                            view->name, ndim, (int)LP_MAX_DIMS);
    if (ndim > 0 && shape == NULL)
        return lp_error_set(err, LP_ERR_TENSOR, "%s: the tensor has %d dimensions and gives no sizes",
                            view->name, ndim);
    view->ndim = ndim;
    view->numel = 1;
    for (int d = 0; d < ndim; d++) {
        if (shape[d] < 0 || !lp_mul_i64(bound, shape[d] > 0 ? shape[d] : 1, &bound))
            return lp_error_set(err, LP_ERR_TENSOR, "%s: dimension %d has the impossible size %lld",
                                view->name, d, (long long)shape[d]);
        view->shape[d] = shape[d];
        view->numel *= shape[d];
    }
    return LP_OK;
}

/* Strides, refused where the elements they lead to, `below` bytes before the first one and `above` behind it, lie further
 * apart than int64 can say.  Strides of a tensor with no elements, or of a dimension of size 1, lead nowhere. */
static lp_status read_strides(lp_view *view, const int64_t *strides, int64_t *below, int64_t *above,
                              lp_error *err)
{
    int64_t dense = 1;

    *below = 0;
    *above = (int64_t)view->itemsize;
    for (int d = view->ndim - 1; d >= 0; d--) {
        int64_t *side, reach, steps = view->shape[d] - 1;

        view->strides[d] = strides != NULL ? strides[d] : dense;
        dense *= view->shape[d] > 0 ? view->shape[d] : 1;
        if (view->numel == 0 || steps == 0)
            continue;
        side = view->strides[d] < 0 ? below : above;
        if (view->strides[d] == INT64_MIN ||
            !lp_mul_i64(view->strides[d] < 0 ? -view->strides[d] : view->strides[d], steps, &reach) ||
            !lp_mul_i64(reach, (int64_t)view->itemsize, &reach) || reach > INT64_MAX - *side)
            return lp_error_set(err, LP_ERR_TENSOR, "%s: dimension %d has the impossible stride %lld",
                                view->name, d, (long long)view->strides[d]);
        *side += reach;
    }
    return LP_OK;
}

lp_status lp_view_read(lp_view *view, lp_element element, int ndim, const int64_t *shape,
                       const int64_t *strides, const void *data, uint64_t byte_offset, unsigned need,
                       lp_error *err)
{
    int64_t below, above;
    lp_status status;
    uintptr_t first = (uintptr_t)data;

    view->element = element;
    view->itemsize = lp_element_size(element);
    status = read_sizes(view, ndim, shape, err);
    if (status == LP_OK)
        status = read_strides(view, strides, &below, &above, err);
    if (status != LP_OK)
        return status;
    if (data != NULL && byte_offset <= UINTPTR_MAX - first)
        first += (uintptr_t)byte_offset;
    else if (data != NULL && view->numel > 0)
        return lp_error_set(err, LP_ERR_TENSOR, "%s: the tensor begins beyond the address space", view->name);
    view->data = (void *)first;
    if (view->numel > 0 && (data == NULL || first % view->itemsize != 0))
        return lp_error_set(err, LP_ERR_TENSOR,
                            "%s: the tensor's data is not aligned to its %zu-byte elements; copy it first",
                            view->name, view->itemsize);
    if (view->numel > 0 && ((uint64_t)below > first || (uint64_t)above > UINTPTR_MAX - first))
        return lp_error_set(err, LP_ERR_TENSOR, "%s: the tensor's strides lead beyond the address space",
                            view->name);
    if (view->readonly && (need & LP_VIEW_WRITABLE))
        return lp_error_set(err, LP_ERR_TENSOR,
                            "%s: the tensor is read-only and would be written to; pass a writable one",
                            view->name);
    if ((need & LP_VIEW_CONTIGUOUS) && !lp_view_is_contiguous(view))
        return lp_error_set(err, LP_ERR_TENSOR,
                            "%s: the tensor is not contiguous; hand over tensor.contiguous()", view->name);
    return LP_OK;
}

bool lp_view_is_contiguous(const lp_view *view)
{
    int64_t stride = 1;

    if (view->numel == 0)
        return true;
    for (int d = view->ndim - 1; d >= 0; d--) {
        if (view->shape[d] == 1)
            continue;
        if (view->strides[d] != stride)
            return false;
        stride *= view->shape[d];
    }
    return true;
}

bool lp_view_dense_order(const lp_view *view, int order[LP_MAX_DIMS])
{
    int64_t stride = 1;
    int ones = 0;

    /* Dimensions of size 1, whose strides mean nothing, go outermost; the others by falling stride. */
    for (int d = 0; d < view->ndim; d++)
        if (view->shape[d] == 1)
            order[ones++] = d;
    for (int d = 0, placed = ones; d < view->ndim; d++) {
        int place = placed;
        if (view->shape[d] == 1)
            continue;
        for (; place > ones && view->strides[order[place - 1]] < view->strides[d]; place--)
            order[place] = order[place - 1];
        order[place] = d;
        placed++;
    }
    if (view->numel == 0)
        return true;
    for (int i = view->ndim - 1; i >= ones; i--) {
        int d = order[i];
        if (view->strides[d] != stride)
            return false;
        stride *= view->shape[d];
    }
    return true;
}

/* First byte and one past the last byte of a view that has elements. */
static void byte_range(const lp_view *view, uintptr_t *first, uintptr_t *end)
{
    int64_t low = 0, high = 0;

    for (int d = 0; d < view->ndim; d++) {
        int64_t reach = (view->shape[d] - 1) * view->strides[d];
        if (reach < 0)
            low += reach;
        else
            high += reach;
    }
    *first = (uintptr_t)view->data - (uintptr_t)(-low) * view->itemsize;
    *end = (uintptr_t)view->data + ((uintptr_t)high + 1) * view->itemsize;
}

bool lp_view_overlaps(const lp_view *a, const lp_view *b)
{
    uintptr_t a_first, a_end, b_first, b_end;

    if (a->numel == 0 || b->numel == 0 || a->device != b->device)
        return false;
    byte_range(a, &a_first, &a_end);
    byte_range(b, &b_first, &b_end);
    return a_first < b_end && b_first < a_end;
}
