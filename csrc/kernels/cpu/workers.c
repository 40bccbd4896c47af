#include "kernels/cpu/workers.h"

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/threads.h"

int lp_cpu_threads(void)
{
    long online = lp_processors();

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

void lp_workers_run(int count, void (*run)(void *context, int worker), void *context)
{
    lp_thread threads[LP_MAX_WORKERS];
    lp_job jobs[LP_MAX_WORKERS];
    int started = 1;

    for (; started < count && started < LP_MAX_WORKERS; started++) {
        jobs[started] = (lp_job){.run = run, .context = context, .worker = started};
        if (!lp_thread_start(&threads[started], &jobs[started]))
            break;
    }
    run(context, 0);
    for (int i = 1; i < started; i++)
        lp_thread_join(threads[i]);
}
