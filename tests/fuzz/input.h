/* A fuzzer's bytes, read as numbers: each target below this folder reads its whole case from them, and past their end
 * everything is 0, so that every input is a case.
 *
 * A target is a file fuzz_NAME.c with LLVMFuzzerTestOneInput; it ends the program (give_up) where something is not as
 * promised.  `make fuzz` links it with libFuzzer; replay.c runs the committed seeds, seeds/NAME, through it in `make ctest`. */
#ifndef LP_TESTS_FUZZ_INPUT_H
#define LP_TESTS_FUZZ_INPUT_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
    const uint8_t *at, *end;
} input;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static inline uint8_t input_byte(input *in)
{
    return in->at < in->end ? *in->at++ : 0;
}

/* Below `bound` (at most 65536). */
static inline size_t input_below(input *in, size_t bound)
{
    size_t value = input_byte(in);

    if (bound > 256)
        value = value << 8 | input_byte(in);
    return value % bound;
}

/* Mostly small; now and then any int64, and its edges. */
static inline int64_t input_int(input *in)
{
    static const int64_t odd[] = {INT64_MIN, INT64_MAX, INT64_MIN + 1, INT64_MAX / 2,    -1,
                                  INT32_MAX, INT32_MIN, UINT32_MAX,    INT64_C(1) << 62, 1000003};
    uint8_t byte = input_byte(in);

    if (byte < 240)
        return (int64_t)byte % 24 - 4;
    if (byte < 250)
        return odd[byte - 240];
    for (int64_t value = 0, i = 0;; i++) {
        value = (int64_t)((uint64_t)value << 8 | input_byte(in));
        if (i == 7)
            return value;
    }
}

#define give_up(...)                                                                                         \
    do {                                                                                                     \
        fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);                                                      \
        fprintf(stderr, __VA_ARGS__);                                                                        \
        fputc('\n', stderr);                                                                                 \
        abort();                                                                                             \
    } while (0)

#endif
