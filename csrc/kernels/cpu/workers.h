/* Threads made for one call and joined before it returns.
 *
 * No pool and no OpenMP: a second pool beside the framework's would fight it for the cores.  Nothing ever spins. */
#ifndef LP_KERNELS_CPU_WORKERS_H
#define LP_KERNELS_CPU_WORKERS_H

#include <stddef.h>

#define LP_MAX_WORKERS 64

/* How many workers a call should use: `threads` (0: as many as are online), no more than `items` pieces of work and
 * LP_MAX_WORKERS, at least 1. */
int lp_workers_count(int threads, size_t items);

/* Call run(context, worker) once for each worker 0 .. count - 1 (worker 0 on the caller's thread) and wait for all.
 * Where the system refuses a thread its worker is left out, so `run` must take its work from a shared counter. */
void lp_workers_run(int count, void (*run)(void *context, int worker), void *context);

#endif
