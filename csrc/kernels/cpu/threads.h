/* Threads, a lock and a condition: all that the kernels ask of the system, on POSIX or on Windows.
 *
 * Locks and conditions are set up by their owner before any thread uses them and live where they were set up. */
#ifndef LP_KERNELS_CPU_THREADS_H
#define LP_KERNELS_CPU_THREADS_H

#include <stdbool.h>

/* What a thread runs; it outlives the thread, and belongs to whoever started it. */
typedef struct {
    void (*run)(void *context, int worker);
    void *context;
    int worker;
} lp_job;

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

typedef HANDLE lp_thread;
typedef SRWLOCK lp_lock;
typedef CONDITION_VARIABLE lp_condition;

static DWORD WINAPI lp_thread_main(LPVOID argument)
{
    const lp_job *job = argument;

    job->run(job->context, job->worker);
    return 0;
}

/* False where the system refuses a thread. */
static inline bool lp_thread_start(lp_thread *thread, lp_job *job)
{
    *thread = CreateThread(NULL, 0, lp_thread_main, job, 0, NULL);
    return *thread != NULL;
}

static inline void lp_thread_join(lp_thread thread)
{
    (void)WaitForSingleObject(thread, INFINITE);
    (void)CloseHandle(thread);
}

/* Processors that are online; below 1 where the system does not say. */
static inline long lp_processors(void)
{
    return (long)GetActiveProcessorCount(ALL_PROCESSOR_GROUPS);
}

static inline void lp_lock_init(lp_lock *lock)
{
    InitializeSRWLock(lock);
}

static inline void lp_lock_take(lp_lock *lock)
{
    AcquireSRWLockExclusive(lock);
}

static inline void lp_lock_give(lp_lock *lock)
{
    ReleaseSRWLockExclusive(lock);
}

static inline void lp_lock_free(lp_lock *lock)
{
    (void)lock;
}

static inline void lp_condition_init(lp_condition *condition)
{
    InitializeConditionVariable(condition);
}

/* Give the lock back, wait, and take it again; wakes may be spurious. */
static inline void lp_condition_wait(lp_condition *condition, lp_lock *lock)
{
    (void)SleepConditionVariableSRW(condition, lock, INFINITE, 0);
}

static inline void lp_condition_wake_all(lp_condition *condition)
{
    WakeAllConditionVariable(condition);
}

static inline void lp_condition_free(lp_condition *condition)
{
    (void)condition;
}

#else
#include <pthread.h>
#include <unistd.h>

typedef pthread_t lp_thread;
typedef pthread_mutex_t lp_lock;
typedef pthread_cond_t lp_condition;

static inline void *lp_thread_main(void *argument)
{
    const lp_job *job = argument;

    job->run(job->context, job->worker);
    return NULL;
}

/* False where the system refuses a thread. */
static inline bool lp_thread_start(lp_thread *thread, lp_job *job)
{
    return pthread_create(thread, NULL, lp_thread_main, job) == 0;
}

static inline void lp_thread_join(lp_thread thread)
{
    (void)pthread_join(thread, NULL);
}

/* Processors that are online; below 1 where the system does not say. */
static inline long lp_processors(void)
{
    return sysconf(_SC_NPROCESSORS_ONLN);
}

static inline void lp_lock_init(lp_lock *lock)
{
    (void)pthread_mutex_init(lock, NULL);
}

static inline void lp_lock_take(lp_lock *lock)
{
    (void)pthread_mutex_lock(lock);
}

static inline void lp_lock_give(lp_lock *lock)
{
    (void)pthread_mutex_unlock(lock);
}

static inline void lp_lock_free(lp_lock *lock)
{
    (void)pthread_mutex_destroy(lock);
}

static inline void lp_condition_init(lp_condition *condition)
{
    (void)pthread_cond_init(condition, NULL);
}

/* Give the lock back, wait, and take it again; wakes may be spurious. */
static inline void lp_condition_wait(lp_condition *condition, lp_lock *lock)
{
    (void)pthread_cond_wait(condition, lock);
}

static inline void lp_condition_wake_all(lp_condition *condition)
{
    (void)pthread_cond_broadcast(condition);
}

static inline void lp_condition_free(lp_condition *condition)
{
    (void)pthread_cond_destroy(condition);
}
#endif

#endif
