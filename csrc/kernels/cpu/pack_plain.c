/* Packing in portable C: a gather by position, which upwards is safe in place. */
#include "kernels/cpu/pack.h"

#include <string.h>

#define PACK(width)                                                                                          \
    static unsigned char *pack_##width(unsigned char *target, const unsigned char *source,                   \
                                       const lp_selection *s, const unsigned char *limit)                    \
    {                                                                                                        \
        (void)limit;                                                                                         \
        for (size_t k = 0; k < s->count; k++, target += width) {                                             \
            unsigned char element[width];                                                                    \
                                                                                                             \
            memcpy(element, source + (size_t)s->position[k] * width, width);                                 \
            memcpy(target, element, width);                                                                  \
        }                                                                                                    \
        return target;                                                                                       \
    }

PACK(1)
PACK(2)
PACK(4)
PACK(8)

static void copy(unsigned char *target, const unsigned char *source, size_t bytes)
{
    memmove(target, source, bytes);
}

const lp_pack lp_pack_plain = {.row = {pack_1, pack_2, pack_4, pack_8}, .copy = copy, .run_bytes = 64};
