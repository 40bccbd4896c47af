/* Packing by permutes whose controls come from the selection's lane numbers, eight elements at a time. */
#include "kernels/cpu/pack.h"
#include "kernels/cpu/simd.h"

#include <string.h>

#ifdef LP_X86
#include <immintrin.h>

LP_TARGET_BEGIN(LP_TARGET_AVX2)

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

/* The first `bytes` bytes of a vector at `target`, as a whole vector where the limit allows. */
static inline void store_16(unsigned char *target, __m128i v, size_t bytes, const unsigned char *limit)
{
    if (limit - target >= 16) {
        _mm_storeu_si128((__m128i *)(void *)target, v);
    } else {
        unsigned char rest[16];

        _mm_storeu_si128((__m128i *)(void *)rest, v);
        memcpy(target, rest, bytes);
    }
}

static inline void store_32(unsigned char *target, __m256i v, size_t bytes, const unsigned char *limit)
{
    if (limit - target >= 32) {
        _mm256_storeu_si256((__m256i *)(void *)target, v);
    } else {
        unsigned char rest[32];

        _mm256_storeu_si256((__m256i *)(void *)rest, v);
        memcpy(target, rest, bytes);
    }
}

static inline __m128i load_lanes(const uint8_t *p)
{
    return _mm_loadl_epi64((const __m128i *)(const void *)p);
}

static unsigned char *pack_1(unsigned char *target, const unsigned char *source, const lp_selection *s,
                             const unsigned char *limit)
{
    for (size_t i = 0; i + 8 <= s->size; i += 8) {
        __m128i v = _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)(const void *)(source + i)),
                                     load_lanes(s->lanes + i));
        size_t count = (size_t)__builtin_popcount(s->bits[i / 8]);
        uint64_t packed = (uint64_t)_mm_cvtsi128_si64(v);

        memcpy(target, &packed, limit - target >= 8 ? 8 : count);
        target += count;
    }
    return pack_tail(target, source, s, 1);
}

static unsigned char *pack_2(unsigned char *target, const unsigned char *source, const lp_selection *s,
                             const unsigned char *limit)
{
    const __m128i odd = _mm_set1_epi16(0x0100);

    for (size_t i = 0; i + 8 <= s->size; i += 8) {
        __m128i lanes = load_lanes(s->lanes + i), bytes = _mm_unpacklo_epi8(lanes, lanes);
        __m128i control = _mm_add_epi8(_mm_add_epi8(bytes, bytes), odd);
        __m128i v =
            _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(const void *)(source + i * 2)), control);
        size_t count = (size_t)__builtin_popcount(s->bits[i / 8]);

        store_16(target, v, count * 2, limit);
        target += count * 2;
    }
    return pack_tail(target, source, s, 2);
}

static unsigned char *pack_4(unsigned char *target, const unsigned char *source, const lp_selection *s,
                             const unsigned char *limit)
{
    for (size_t i = 0; i + 8 <= s->size; i += 8) {
        __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)(source + i * 4));
        size_t count = (size_t)__builtin_popcount(s->bits[i / 8]);

        v = _mm256_permutevar8x32_epi32(v, _mm256_cvtepu8_epi32(load_lanes(s->lanes + i)));
        store_32(target, v, count * 4, limit);
        target += count * 4;
    }
    return pack_tail(target, source, s, 4);
}

/* Four 8-byte elements by the lane numbers in the low half of `lanes`, of which the permute sees the low two bits. */
static inline __m256i permute_8(__m256i v, __m128i lanes)
{
    __m256i low = _mm256_cvtepu8_epi64(lanes), control;

    low = _mm256_add_epi64(low, low);
    control = _mm256_or_si256(low, _mm256_slli_epi64(low, 32));
    control = _mm256_add_epi32(control, _mm256_set1_epi64x(INT64_C(1) << 32));
    return _mm256_permutevar8x32_epi32(v, control);
}

static unsigned char *pack_8(unsigned char *target, const unsigned char *source, const lp_selection *s,
                             const unsigned char *limit)
{
    for (size_t i = 0; i + 8 <= s->size; i += 8) {
        __m256i low = _mm256_loadu_si256((const __m256i *)(const void *)(source + i * 8));
        __m256i high = _mm256_loadu_si256((const __m256i *)(const void *)(source + i * 8 + 32));
        size_t below = (size_t)__builtin_popcount(s->bits[i / 8] & 15u);
        size_t count = (size_t)__builtin_popcount(s->bits[i / 8] >> 4);

        store_32(target, permute_8(low, load_lanes(s->lanes + i)), below * 8, limit);
        target += below * 8;
        store_32(target, permute_8(high, load_lanes(s->lanes + i + below)), count * 8, limit);
        target += count * 8;
    }
    return pack_tail(target, source, s, 8);
}

/* Not memmove: between about 1 and 16 KiB, at odd distances, glibc's choice of `rep movsb` costs a factor of two. */
static void copy(unsigned char *target, const unsigned char *source, size_t bytes)
{
    for (; bytes >= 128; bytes -= 128, target += 128, source += 128) {
        __m256i v[4];

        for (int i = 0; i < 4; i++)
            v[i] = _mm256_loadu_si256((const __m256i *)(const void *)(source + i * 32));
        for (int i = 0; i < 4; i++)
            _mm256_storeu_si256((__m256i *)(void *)(target + i * 32), v[i]);
    }
    for (; bytes >= 16; bytes -= 16, target += 16, source += 16)
        _mm_storeu_si128((__m128i *)(void *)target, _mm_loadu_si128((const __m128i *)(const void *)source));
    memmove(target, source, bytes);
}

LP_TARGET_END

const lp_pack lp_pack_avx2 = {.row = {pack_1, pack_2, pack_4, pack_8}, .copy = copy, .run_bytes = 256};

#else
typedef int lp_pack_avx2_unused; /* ISO C forbids an empty file */
#endif
