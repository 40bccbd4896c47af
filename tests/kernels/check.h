/* What the kernel tests share: checks, random inputs, allocators that poison or fail, and the levels to try.
 *
 * Each test_*.c here is a program over the whole CPU room:
 *     cc -std=c11 -D_GNU_SOURCE -O2 -pthread -Icsrc -Itests/kernels tests/kernels/check.c tests/kernels/test_linear.c \
 *        csrc/kernels/cpu/X.c csrc/core/status.c -lm          (X: every file there)
 * It prints how many checks it made and exits 1 if one failed.  With the argument "time" it times its cases instead.
 * LLMPRUNE_SIMD holds it to a level (valgrind knows no AVX-512); LLMPRUNE_SEED changes the random inputs. */
#ifndef LP_TESTS_KERNELS_CHECK_H
#define LP_TESTS_KERNELS_CHECK_H

#include "kernels/cpu/cpu.h"

#include <stdio.h>

/* Count a check; where it fails print the place and a printf-style description of the case. */
#define CHECK(condition, ...) check_that((condition), __FILE__, __LINE__, #condition, __VA_ARGS__)
LP_PRINTF(5, 6)
bool check_that(bool condition, const char *file, int line, const char *text, const char *format, ...);

/* Print the totals; the program's exit status. */
int check_finish(const char *name);

/* Uniform in [0, bound), and standard normal, from a generator seeded once for each program. */
uint64_t random_below(uint64_t bound);
double random_normal(void);

/* malloc'd `count` normal values of a dtype; value_at reads one back exactly. */
void *random_values(lp_dtype dtype, size_t count, double scale);
double value_at(const void *values, lp_dtype dtype, size_t index);
size_t value_width(lp_dtype dtype);
const char *value_name(lp_dtype dtype);

/* malloc that ends the program when there is none; free() gives it back. */
void *need(size_t bytes);

/* An allocator whose blocks are filled with 0xff (NaN in every float), that refuses the `fail_at`-th allocation (counted
 * from 1; 0: none), and that counts the bytes it has lent. */
typedef struct {
    size_t calls, fail_at, lent, peak;
} test_heap;
lp_allocator test_allocator(test_heap *heap);

/* The tables of this machine, worst first; returns how many (at most 4). */
int test_tables(const lp_backend *tables[4]);

/* Median seconds of process time of run(context), over enough repeats for about 0.3 s. */
double time_median(void (*run)(void *context), void *context);

#endif
