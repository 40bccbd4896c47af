#include "select.h"

#include <string.h>

/* One pass of a bottom-up merge sort: runs of `width` in `from` become runs of 2 * width in `to`.  Taking the left run's
 * element on equal scores keeps it stable, and the indices start out ascending. */
static void merge_runs(const double *scores, const int64_t *from, int64_t *to, size_t count, size_t width)
{
    for (size_t begin = 0; begin < count;) {
        size_t middle = count - begin > width ? begin + width : count;
        size_t end = count - middle > width ? middle + width : count;
        size_t left = begin, right = middle;

        for (size_t k = begin; k < end; ++k) {
            if (left < middle && (right >= end || scores[from[left]] <= scores[from[right]]))
                to[k] = from[left++];
            else
                to[k] = from[right++];
        }
        begin = end;
    }
}

lp_status lp_select_rank(const lp_allocator *allocator, const double *scores, size_t count, int64_t *order,
                         lp_error *err)
{
    int64_t *scratch, *from = order, *to;
    size_t bytes;

    for (size_t i = 0; i < count; ++i) {
        if (scores[i] != scores[i])
            return lp_error_set(err, LP_ERR_ARGUMENT, "the score at index %zu is not a number", i);
        order[i] = (int64_t)i;
    }
    if (count < 2)
        return LP_OK;
    if (!lp_mul_size(count, sizeof *order, &bytes))
        return lp_error_set(err, LP_ERR_OVERFLOW, "%zu scores do not fit in memory", count);
    scratch = allocator->resize(allocator->ctx, NULL, 0, bytes);
    if (scratch == NULL)
        return lp_error_set(err, LP_ERR_NOMEM, "out of memory: %zu bytes to rank the scores were refused",
                            bytes);
    to = scratch;
    for (size_t width = 1; width < count; width *= 2) {
        int64_t *swap = from;

        merge_runs(scores, from, to, count, width);
        from = to;
        to = swap;
    }
    if (from != order)
        memcpy(order, from, bytes);
    (void)allocator->resize(allocator->ctx, scratch, bytes, 0);
    return LP_OK;
}

typedef struct {
    double key; /* of the axis' open step */
    int64_t axis;
} entry;

static bool before(entry a, entry b)
{
    return a.key < b.key || (a.key == b.key && a.axis < b.axis);
}

/* Let the entry at `at` sink to its place in the binary heap (lowest first). */
static void sink(entry *heap, size_t count, size_t at)
{
    entry moving = heap[at];

    for (;;) {
        size_t child = 2 * at + 1;

        if (child >= count)
            break;
        if (child + 1 < count && before(heap[child + 1], heap[child]))
            ++child;
        if (!before(heap[child], moving))
            break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = moving;
}

lp_status lp_select_merge(const lp_allocator *allocator, const double *keys, const int64_t *offsets,
                          size_t axes, int64_t *sequence, lp_error *err)
{
    entry *heap;
    int64_t *next;
    size_t row, bytes, count = 0, step = 0;

    if (offsets[0] != 0)
        return lp_error_set(err, LP_ERR_ARGUMENT, "the first axis' steps begin at %lld, not at 0",
                            (long long)offsets[0]);
    for (size_t a = 0; a < axes; ++a)
        if (offsets[a + 1] < offsets[a])
            return lp_error_set(err, LP_ERR_ARGUMENT, "the steps of axis %zu end before they begin", a);
    for (int64_t i = 0; i < offsets[axes]; ++i)
        if (keys[i] != keys[i])
            return lp_error_set(err, LP_ERR_ARGUMENT, "the key of step %lld is not a number", (long long)i);
    if (offsets[axes] == 0)
        return LP_OK;

    row = sizeof *heap + sizeof *next; /* one block: the heap, then each axis' next step */
    if (!lp_mul_size(axes, row, &bytes))
        return lp_error_set(err, LP_ERR_OVERFLOW, "%zu axes do not fit in memory", axes);
    heap = allocator->resize(allocator->ctx, NULL, 0, bytes);
    if (heap == NULL)
        return lp_error_set(err, LP_ERR_NOMEM, "out of memory: %zu bytes to merge the axes were refused",
                            bytes);
    next = (int64_t *)(void *)(heap + axes);

    for (size_t a = 0; a < axes; ++a) {
        next[a] = offsets[a];
        if (offsets[a] < offsets[a + 1])
            heap[count++] = (entry){.key = keys[offsets[a]], .axis = (int64_t)a};
    }
    for (size_t at = count / 2; at-- > 0;)
        sink(heap, count, at);
    while (count > 0) {
        size_t axis = (size_t)heap[0].axis;

        sequence[step++] = heap[0].axis;
        if (++next[axis] < offsets[axis + 1])
            heap[0].key = keys[next[axis]];
        else
            heap[0] = heap[--count];
        if (count > 0)
            sink(heap, count, 0);
    }
    (void)allocator->resize(allocator->ctx, heap, bytes, 0);
    return LP_OK;
}
