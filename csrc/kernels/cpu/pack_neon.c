/* Packing by table lookups whose controls come from the selection's lane numbers, eight elements at a time. */
#include "kernels/cpu/pack.h"
#include "kernels/cpu/simd.h"

#include <string.h>

#ifdef LP_ARM
#include <arm_neon.h>

/* The row's last size % 8 elements. */
static inline unsigned char *pack_tail(unsigned char *target, const unsigned char *source,
                                       const lp_selection *s, size_t width)
{
    for (size_t k = s->tail; k < s->count; k++, target += width) {
        uint64_t element;

        memcpy(&element, source + (size_t)s->position[k] * width, width);
        memcpy(target, &element, width);
    }
    return target;
}

/* The first `bytes` bytes of v at `target`, as a whole vector where the limit allows. */
static inline void store(unsigned char *target, uint8x16_t v, size_t bytes, const unsigned char *limit)
{
    if (limit - target >= 16) {
        vst1q_u8(target, v);
    } else {
        unsigned char rest[16];

        vst1q_u8(rest, v);
        memcpy(target, rest, bytes);
    }
}

/* The 16 / width lane numbers of `lanes` from `first` on, turned into the numbers of their bytes. */
static inline uint8x16_t byte_numbers(uint8x8_t lanes, unsigned first, unsigned width)
{
    static const uint8_t step[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    uint8x16_t count = vld1q_u8(step), shift = vdupq_n_u8((uint8_t)(width - 1));
    uint8x16_t which = vshlq_u8(count, vdupq_n_s8(width == 2 ? -1 : width == 4 ? -2 : -3));
    uint8x16_t lane = vqtbl1q_u8(vcombine_u8(lanes, lanes), vaddq_u8(which, vdupq_n_u8((uint8_t)first)));

    return vaddq_u8(vmulq_u8(lane, vdupq_n_u8((uint8_t)width)), vandq_u8(count, shift));
}

static unsigned char *pack_1(unsigned char *target, const unsigned char *source, const lp_selection *s,
                             const unsigned char *limit)
{
    for (size_t i = 0; i + 8 <= s->size; i += 8) {
        uint8x8_t v = vtbl1_u8(vld1_u8(source + i), vld1_u8(s->lanes + i));
        size_t count = (size_t)__builtin_popcount(s->bits[i / 8]);
        unsigned char packed[8];

        vst1_u8(packed, v);
        memcpy(target, packed, limit - target >= 8 ? 8 : count);
        target += count;
    }
    return pack_tail(target, source, s, 1);
}

static unsigned char *pack_2(unsigned char *target, const unsigned char *source, const lp_selection *s,
                             const unsigned char *limit)
{
    for (size_t i = 0; i + 8 <= s->size; i += 8) {
        uint8x16_t control = byte_numbers(vld1_u8(s->lanes + i), 0, 2);
        size_t count = (size_t)__builtin_popcount(s->bits[i / 8]);

        store(target, vqtbl1q_u8(vld1q_u8(source + i * 2), control), count * 2, limit);
        target += count * 2;
    }
    return pack_tail(target, source, s, 2);
}

static unsigned char *pack_4(unsigned char *target, const unsigned char *source, const lp_selection *s,
                             const unsigned char *limit)
{
    for (size_t i = 0; i + 8 <= s->size; i += 8) {
        uint8x16x2_t v = {{vld1q_u8(source + i * 4), vld1q_u8(source + i * 4 + 16)}};
        uint8x8_t lanes = vld1_u8(s->lanes + i);
        size_t count = (size_t)__builtin_popcount(s->bits[i / 8]) * 4, head = count < 16 ? count : 16;

        store(target, vqtbl2q_u8(v, byte_numbers(lanes, 0, 4)), head, limit);
        target += head;
        if (count > head) {
            store(target, vqtbl2q_u8(v, byte_numbers(lanes, 4, 4)), count - head, limit);
            target += count - head;
        }
    }
    return pack_tail(target, source, s, 4);
}

static unsigned char *pack_8(unsigned char *target, const unsigned char *source, const lp_selection *s,
                             const unsigned char *limit)
{
    for (size_t i = 0; i + 8 <= s->size; i += 8) {
        uint8x16x4_t v = {{vld1q_u8(source + i * 8), vld1q_u8(source + i * 8 + 16),
                           vld1q_u8(source + i * 8 + 32), vld1q_u8(source + i * 8 + 48)}};
        uint8x8_t lanes = vld1_u8(s->lanes + i);
        size_t count = (size_t)__builtin_popcount(s->bits[i / 8]) * 8;

        for (unsigned first = 0; count > 0; first += 2) {
            size_t part = count < 16 ? count : 16;

            store(target, vqtbl4q_u8(v, byte_numbers(lanes, first, 8)), part, limit);
            target += part;
            count -= part;
        }
    }
    return pack_tail(target, source, s, 8);
}

static void copy(unsigned char *target, const unsigned char *source, size_t bytes)
{
    memmove(target, source, bytes);
}

const lp_pack lp_pack_neon = {.row = {pack_1, pack_2, pack_4, pack_8}, .copy = copy, .run_bytes = 256};

#else
typedef int lp_pack_neon_unused; /* ISO C forbids an empty file */
#endif
