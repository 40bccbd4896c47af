/* Packing by masked compress.  The result goes to memory by an ordinary store: compressing straight to memory is
 * microcoded on Zen 4. */
#include "kernels/cpu/pack.h"
#include "kernels/cpu/simd.h"

#include <string.h>

#ifdef LP_X86
#include <immintrin.h>

/* Elements [i, i + 64 / width) of the row, one after the other; only the last, partial vector masks its load. */
#define PACK(width, lanes, mask_t, tail_mask, load, compress, store, popcount)                               \
    static unsigned char *pack_##width(unsigned char *target, const unsigned char *source,                   \
                                       const lp_selection *s, const unsigned char *limit)                    \
    {                                                                                                        \
        size_t i = 0;                                                                                        \
                                                                                                             \
        for (; i + lanes <= s->size; i += lanes) {                                                           \
            mask_t mask;                                                                                     \
            __m512i packed;                                                                                  \
            size_t bytes;                                                                                    \
                                                                                                             \
            memcpy(&mask, s->bits + i / 8, sizeof mask);                                                     \
            packed = compress(mask, _mm512_loadu_si512(source + i * width));                                 \
            bytes = (size_t)popcount(mask) * width;                                                          \
            if (limit - target >= 64)                                                                        \
                _mm512_storeu_si512(target, packed);                                                         \
            else                                                                                             \
                store(target, tail_mask(bytes / width), packed);                                             \
            target += bytes;                                                                                 \
        }                                                                                                    \
        if (i < s->size) {                                                                                   \
            mask_t mask;                                                                                     \
            __m512i packed;                                                                                  \
            size_t count;                                                                                    \
                                                                                                             \
            memcpy(&mask, s->bits + i / 8, sizeof mask);                                                     \
            mask = mask & tail_mask(s->size - i);                                                            \
            packed = compress(mask, load(tail_mask(s->size - i), source + i * width));                       \
            count = (size_t)popcount(mask);                                                                  \
            store(target, tail_mask(count), packed);                                                         \
            target += count * width;                                                                         \
        }                                                                                                    \
        return target;                                                                                       \
    }

LP_TARGET_BEGIN(LP_TARGET_VBMI2)

static inline uint64_t low_bits(size_t count)
{
    return _bzhi_u64(~UINT64_C(0), (unsigned)count);
}

#define TAIL8(n) ((__mmask8)low_bits(n))
#define TAIL16(n) ((__mmask16)low_bits(n))
#define TAIL32(n) ((__mmask32)low_bits(n))
#define TAIL64(n) ((__mmask64)low_bits(n))

PACK(1, 64, __mmask64, TAIL64, _mm512_maskz_loadu_epi8, _mm512_maskz_compress_epi8, _mm512_mask_storeu_epi8,
     __builtin_popcountll)
PACK(2, 32, __mmask32, TAIL32, _mm512_maskz_loadu_epi16, _mm512_maskz_compress_epi16,
     _mm512_mask_storeu_epi16, __builtin_popcount)
PACK(4, 16, __mmask16, TAIL16, _mm512_maskz_loadu_epi32, _mm512_maskz_compress_epi32,
     _mm512_mask_storeu_epi32, __builtin_popcount)
PACK(8, 8, __mmask8, TAIL8, _mm512_maskz_loadu_epi64, _mm512_maskz_compress_epi64, _mm512_mask_storeu_epi64,
     __builtin_popcount)

/* Not memmove: between about 1 and 16 KiB, at odd distances, glibc's choice of `rep movsb` costs a factor of two. */
static void copy(unsigned char *target, const unsigned char *source, size_t bytes)
{
    for (; bytes >= 256; bytes -= 256, target += 256, source += 256) {
        __m512i v[4];

        for (int i = 0; i < 4; i++)
            v[i] = _mm512_loadu_si512(source + i * 64);
        for (int i = 0; i < 4; i++)
            _mm512_storeu_si512(target + i * 64, v[i]);
    }
    for (; bytes >= 64; bytes -= 64, target += 64, source += 64)
        _mm512_storeu_si512(target, _mm512_loadu_si512(source));
    if (bytes > 0)
        _mm512_mask_storeu_epi8(target, TAIL64(bytes), _mm512_maskz_loadu_epi8(TAIL64(bytes), source));
}

LP_TARGET_END

const lp_pack lp_pack_vbmi2 = {.row = {pack_1, pack_2, pack_4, pack_8}, .copy = copy, .run_bytes = 1024};

#else
typedef int lp_pack_avx512_unused; /* ISO C forbids an empty file */
#endif
