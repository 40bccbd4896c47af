#include "check.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static size_t checks, failures;
static uint64_t state;

bool check_that(bool condition, const char *file, int line, const char *text, const char *format, ...)
{
    checks++;
    if (!condition) {
        va_list args;

        if (++failures <= 20) {
            fprintf(stderr, "%s:%d: %s: ", file, line, text);
            va_start(args, format);
            vfprintf(stderr, format, args);
            va_end(args);
            fputc('\n', stderr);
        }
    }
    return condition;
}

int check_finish(const char *name)
{
    printf("%s: %zu checks, %zu failed\n", name, checks, failures);
    return failures > 0 || checks == 0;
}

static uint64_t random_bits(void)
{
    /* splitmix64 */
    uint64_t z;

    if (state == 0) {
        const char *seed = getenv("LLMPRUNE_SEED");

        state = seed != NULL ? strtoull(seed, NULL, 10) : (uint64_t)time(NULL);
        printf("LLMPRUNE_SEED=%llu\n", (unsigned long long)state);
        state = state * 2 + 1;
    }
    z = state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

uint64_t random_below(uint64_t bound)
{
    return random_bits() % bound;
}

double random_normal(void)
{
    double u = ((double)(random_bits() >> 11) + 0.5) * 0x1p-53, v = (double)(random_bits() >> 11) * 0x1p-53;

    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

size_t value_width(lp_dtype dtype)
{
    return dtype == LP_F64 ? 8 : dtype == LP_F32 ? 4 : 2;
}

const char *value_name(lp_dtype dtype)
{
    return dtype == LP_F64 ? "f64" : dtype == LP_F32 ? "f32" : dtype == LP_F16 ? "f16" : "bf16";
}

void *need(size_t bytes)
{
    void *block = malloc(bytes > 0 ? bytes : 1);

    if (block == NULL) {
        fprintf(stderr, "the test itself is out of memory\n");
        exit(2);
    }
    return block;
}

/* The half float's value from its definition, as the kernels' bit tricks do not compute it. */
static double half_value(uint16_t bits)
{
    int exponent = bits >> 10 & 31;
    double sign = bits & 0x8000 ? -1.0 : 1.0, fraction = (double)(bits & 1023) / 1024.0;

    if (exponent == 31)
        return fraction > 0 ? (double)NAN : sign * (double)INFINITY;
    return exponent == 0 ? sign * ldexp(fraction, -14) : sign * ldexp(1.0 + fraction, exponent - 15);
}

void *random_values(lp_dtype dtype, size_t count, double scale)
{
    unsigned char *values = need(count * value_width(dtype));

    for (size_t i = 0; i < count; i++) {
        double value = random_normal() * scale;
        float single = (float)value;

        if (dtype == LP_F64) {
            memcpy(values + i * 8, &value, 8);
        } else if (dtype == LP_F32) {
            memcpy(values + i * 4, &single, 4);
        } else if (dtype == LP_BF16) {
            uint32_t bits;
            uint16_t high;

            memcpy(&bits, &single, 4);
            high = (uint16_t)(bits >> 16);
            memcpy(values + i * 2, &high, 2);
        } else {
            /* Any finite half float of moderate size, subnormals among them. */
            uint16_t half = (uint16_t)(random_below(0x4200) | (random_below(2) << 15));

            memcpy(values + i * 2, &half, 2);
        }
    }
    return values;
}

double value_at(const void *values, lp_dtype dtype, size_t index)
{
    const unsigned char *at = (const unsigned char *)values + index * value_width(dtype);
    double value;
    float single;
    uint16_t half;
    uint32_t bits;

    switch (dtype) {
    case LP_F64:
        memcpy(&value, at, 8);
        return value;
    case LP_F32:
        memcpy(&single, at, 4);
        return (double)single;
    case LP_F16:
        memcpy(&half, at, 2);
        return half_value(half);
    case LP_BF16:
        memcpy(&half, at, 2);
        bits = (uint32_t)half << 16;
        memcpy(&single, &bits, 4);
        return (double)single;
    }
    return NAN;
}

static void *test_resize(void *ctx, void *block, size_t old_size, size_t new_size)
{
    test_heap *heap = ctx;
    void *moved;

    if (new_size == 0) {
        heap->lent -= old_size;
        free(block);
        return NULL;
    }
    if (++heap->calls == heap->fail_at)
        return NULL;
    moved = malloc(new_size);
    if (moved == NULL)
        return NULL;
    memset(moved, 0xff, new_size);
    if (block != NULL) {
        memcpy(moved, block, old_size < new_size ? old_size : new_size);
        free(block);
    }
    heap->lent += new_size - old_size;
    if (heap->lent > heap->peak)
        heap->peak = heap->lent;
    return moved;
}

lp_allocator test_allocator(test_heap *heap)
{
    return (lp_allocator){.resize = test_resize, .ctx = heap};
}

int test_tables(const lp_backend *tables[4])
{
    const char *text = getenv("LLMPRUNE_SIMD");
    lp_simd best = lp_cpu_best(), level;
    int count = 0;

    if (text != NULL && lp_simd_parse(text, &level) && level < best)
        best = level;
    for (int i = 0; i <= (int)best; i++) {
        const lp_backend *table = lp_cpu_table((lp_simd)i);

        if (count == 0 || tables[count - 1] != table)
            tables[count++] = table;
    }
    return count;
}

static double seconds(void)
{
    struct timespec now;

    (void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

double time_median(void (*run)(void *context), void *context)
{
    double times[101], total = 0.0;
    size_t count = 0;

    while (count < 101 && (count < 5 || total < 0.3)) {
        double start = seconds();

        run(context);
        times[count] = seconds() - start;
        total += times[count++];
    }
    qsort(times, count, sizeof *times, by_value);
    return times[count / 2];
}
