/* The CUDA backend as the binding sees it: the operation table of core/backend.h with what only a device has.
 *
 * Devices of compute capability 7.5 and newer.  Everything is queued on the caller's stream, nothing synchronises, and
 * every operation but compact, compact_into and compact_many (which upload positions) may be captured into a graph once
 * a call like it has run outside of one: the device is then open, and its kernels are loaded.  No error is left behind in the runtime: a failing call clears it, where CUDA can. */
#ifndef LP_KERNELS_CUDA_CUDA_H
#define LP_KERNELS_CUDA_CUDA_H

#include "core/backend.h"

/* Raised by one whenever a member of lp_cuda_table changes its meaning or place. */
#define LP_CUDA_VERSION 1u

/* Name of the capsule `_cuda.table` that holds a const lp_cuda_table *. */
#define LP_CUDA_CAPSULE "llmprune._cuda.table"

/* One device, opened: its limits and its cuBLAS handle.  Calls on one context may come from several threads. */
typedef struct lp_cuda_context lp_cuda_context;

/* One tensor of compact_many: as the arguments of compact. */
typedef struct {
    void *data;
    size_t width; /* bytes of an element: 1, 2, 4 or 8 */
    size_t ndim;
    const size_t *shape;
    const lp_kept *kept;
} lp_cuda_tensor;

typedef struct {
    uint32_t version;             /* LP_CUDA_VERSION */
    uint32_t size;                /* sizeof(lp_cuda_table) */
    const lp_backend *operations; /* exec->context is an open context of the tensors' device */

    /* How many devices there are: at least one, or LP_ERR_DEVICE with the reason there is none. */
    lp_status (*probe)(int *count, lp_error *err);

    /* Open device `device` for use.  LP_ERR_DEVICE: there is none of that number, it is too old, or CUDA failed;
     * LP_ERR_NOMEM.  Must not run while a stream of this thread is being captured.  `allocator` is kept by value. */
    lp_status (*open)(lp_cuda_context **out, int device, const lp_allocator *allocator, lp_error *err);

    /* NULL is fine.  The context's work must be done. */
    void (*close)(lp_cuda_context *context);

    /* compact for `count` tensors at once, which share no memory: they move together, wave by wave.
     * Scratch: half of it holds 4 bytes a kept position and the moves' description, the other half stages the parts that
     * cannot move in one go; LP_ERR_NOMEM says how much is missing, before anything has moved. */
    lp_status (*compact_many)(const lp_cuda_tensor *tensors, size_t count, const lp_exec *exec,
                              lp_error *err);
} lp_cuda_table;

/* The table of this library. */
const lp_cuda_table *lp_cuda(void);

#endif
