#include "kernels/cpu/workers.h"

#include <pthread.h>
#include <unistd.h>

#include "kernels/cpu/cpu.h"

int lp_cpu_threads(void)
{
    long online = sysconf(_SC_NPROCESSORS_ONLN);

    return online < 1 ? 1 : online > LP_MAX_WORKERS ? LP_MAX_WORKERS : (int)online;
}

int lp_workers_count(int threads, size_t items)
{
    int count = threads > 0 ? threads : lp_cpu_threads();

    if (count > LP_MAX_WORKERS)
        count = LP_MAX_WORKERS;
    if ((size_t)count > items)
        count = items > 0 ? (int)items : 1;
    return count;
}

typedef struct {
    void (*run)(void *context, int worker);
    void *context;
    int worker;
} lp_worker;

static void *worker_main(void *argument)
{
    const lp_worker *self = argument;

    self->run(self->context, self->worker);
    return NULL;
}

void lp_workers_run(int count, void (*run)(void *context, int worker), void *context)
{
    pthread_t threads[LP_MAX_WORKERS];
    lp_worker workers[LP_MAX_WORKERS];
    int started = 1;

    for (; started < count && started < LP_MAX_WORKERS; started++) {
        workers[started] = (lp_worker){.run = run, .context = context, .worker = started};
        if (pthread_create(&threads[started], NULL, worker_main, &workers[started]) != 0)
            break;
    }
    run(context, 0);
    for (int i = 1; i < started; i++)
        (void)pthread_join(threads[i], NULL);
}
