#include "kernels/cuda/waves.h"

static bool is_whole(const lp_kept *kept, size_t size)
{
    return kept->position == NULL || kept->count == size;
}

static unsigned widest_word(uint64_t bytes, uintptr_t address)
{
    unsigned word = 16;

    while ((bytes | (uint64_t)address) % word != 0)
        word /= 2;
    return word;
}

void lp_wave_layout_make(lp_wave_layout *layout, uintptr_t address, size_t width, const size_t *shape,
                         size_t ndim, const lp_kept *kept)
{
    uint64_t unit = width, stride;
    size_t d = ndim;
    lp_wave_dim reversed[LP_MAX_DIMS + 1];
    unsigned count = 0;

    while (d > 0 && is_whole(&kept[d - 1], shape[d - 1]))
        unit *= shape[--d];
    if (unit == width) {
        layout->word = (unsigned)width;
        stride = 1;
    } else {
        layout->word = widest_word(unit, address);
        stride = unit / layout->word;
        reversed[count++] = (lp_wave_dim){.count = stride, .stride = 1, .position = NULL};
    }
    while (d-- > 0) {
        bool whole = is_whole(&kept[d], shape[d]);

        if (whole && count > 0 && reversed[count - 1].position == NULL && reversed[count - 1].stride > 1) {
            reversed[count - 1].count *= shape[d]; /* two whole dimensions in a row, above a cut one */
        } else {
            reversed[count++] = (lp_wave_dim){.count = whole ? shape[d] : kept[d].count,
                                              .stride = stride,
                                              .position = whole ? NULL : kept[d].position};
        }
        stride *= shape[d];
    }
    if (count == 0)
        reversed[count++] = (lp_wave_dim){.count = 1, .stride = 1, .position = NULL};
    layout->ndim = count;
    layout->total = 1;
    for (unsigned i = 0; i < count; i++) {
        layout->dim[i] = reversed[count - 1 - i];
        layout->total *= layout->dim[i].count;
    }
}

uint64_t lp_wave_source(const lp_wave_layout *layout, uint64_t p)
{
    uint64_t source = 0;

    for (unsigned i = layout->ndim; i-- > 0;) {
        const lp_wave_dim *dim = &layout->dim[i];
        uint64_t index = p % dim->count;

        p /= dim->count;
        source += (dim->position != NULL ? (uint64_t)dim->position[index] : index) * dim->stride;
    }
    return source;
}

uint64_t lp_wave_start(const lp_wave_layout *layout)
{
    uint64_t low = 0, high = layout->total;

    /* S(p) - p never falls, since S rises by at least one. */
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;

        if (lp_wave_source(layout, middle) == middle)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

bool lp_wave_next(const lp_wave_layout *layout, uint64_t begin, uint64_t stage, lp_wave *wave)
{
    uint64_t room, left;

    if (begin >= layout->total)
        return false;
    left = layout->total - begin;
    room = lp_wave_source(layout, begin) - begin;
    wave->begin = begin;
    /* A staged wave moves its bytes twice: it must be twice as long to be worth that. */
    wave->staged = room < left && room < (stage < left ? stage : left) / 2;
    if (room == 0)
        wave->staged = true; /* only where the caller did not begin at lp_wave_start */
    if (wave->staged)
        room = stage;
    wave->end = begin + (room < left ? room : left);
    return true;
}
