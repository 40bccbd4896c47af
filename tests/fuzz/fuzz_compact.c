/* core/backend.h: compact in place and compact_into, at every SIMD level, against an element at a time. */
#include "input.h"

#include "check.h"

#include <string.h>

enum { MOST_ELEMENTS = 4096 };

/* Positions of a dimension, ascending, at least one; NULL for all. */
static int64_t *some_positions(input *in, size_t size, lp_kept *kept)
{
    int64_t *positions = malloc(size * sizeof *positions);
    uint8_t mode = input_byte(in);

    kept->count = 0;
    if (positions == NULL)
        give_up("the fuzzer itself is out of memory");
    for (size_t i = 0; i < size; i++)
        if (mode < 64 ? i % (1u + mode % 5u) == 0 : mode < 128 ? i >= mode % size : input_byte(in) & 1)
            positions[kept->count++] = (int64_t)i;
    if (kept->count == 0)
        positions[kept->count++] = (int64_t)(mode % size);
    kept->position = mode >= 250 ? NULL : positions;
    if (kept->position == NULL)
        kept->count = size;
    return positions;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const size_t widths[] = {1, 2, 4, 8};
    input in = {data, data + size};
    const lp_backend *tables[4];
    size_t shape[LP_MAX_DIMS], ndim = 1 + input_below(&in, LP_MAX_DIMS), width = widths[input_below(&in, 4)];
    size_t elements = 1, left = 1;
    lp_kept kept[LP_MAX_DIMS];
    int64_t *positions[LP_MAX_DIMS];
    unsigned char *source, *expected;
    const lp_exec exec = {.allocator = lp_allocator_default(), .threads = 1 + (int)input_below(&in, 3)};
    lp_error err;

    for (size_t d = 0; d < ndim; d++) {
        shape[d] = 1 + input_below(&in, 70);
        if (elements * shape[d] > MOST_ELEMENTS)
            shape[d] = 1;
        elements *= shape[d];
        positions[d] = some_positions(&in, shape[d], &kept[d]);
        left *= kept[d].count;
    }
    source = need(elements * width);
    expected = need(left * width);
    for (size_t i = 0; i < elements * width; i++)
        source[i] = (unsigned char)(i * 167 / width + i);
    for (size_t n = 0; n < left; n++) {
        size_t rest = n, from = 0, step = 1;
        for (size_t d = ndim; d-- > 0; step *= shape[d]) {
            size_t i = rest % kept[d].count;
            from += step * (kept[d].position != NULL ? (size_t)kept[d].position[i] : i);
            rest /= kept[d].count;
        }
        memcpy(expected + n * width, source + from * width, width);
    }
    for (int t = 0, count = test_tables(tables); t < count; t++) {
        unsigned char *moved = need(elements * width), *target = need(left * width);

        memcpy(moved, source, elements * width);
        if (tables[t]->compact(moved, width, shape, ndim, kept, &exec, &err) != LP_OK ||
            tables[t]->compact_into(target, source, width, shape, ndim, kept, &exec, &err) != LP_OK)
            give_up("%s: %s", tables[t]->name, err.message);
        if (memcmp(moved, expected, left * width) != 0)
            give_up("%s: compact kept something else", tables[t]->name);
        if (memcmp(target, expected, left * width) != 0)
            give_up("%s: compact_into kept something else", tables[t]->name);
        free(moved);
        free(target);
    }
    for (size_t d = 0; d < ndim; d++)
        free(positions[d]);
    free(source);
    free(expected);
    return 0;
}
