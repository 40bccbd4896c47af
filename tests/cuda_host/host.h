/* What the tests of the CUDA backend on the CPU share: the backend opened, with scratch whose end is watched. */
#ifndef LP_TESTS_CUDA_HOST_H
#define LP_TESTS_CUDA_HOST_H

#include "cuda_runtime.h"

extern "C" {
#include "check.h"
#include "kernels/cuda/cuda.h"
}

#include <vector>

/* Opens simulated device 0 as it is described by simt_device now. */
struct opened {
    lp_exec exec;
    unsigned char *block; /* malloc'd, so that a checker sees a byte beyond it */

    explicit opened(size_t scratch) : exec(), block()
    {
        lp_allocator allocator = lp_allocator_default();
        lp_cuda_context *context = NULL;
        lp_error err = {};

        CHECK(lp_cuda()->open(&context, 0, &allocator, &err) == LP_OK, "%s", err.message);
        exec.allocator = allocator;
        exec.context = context;
        exec.scratch_bytes = scratch;
        block = (unsigned char *)aligned_alloc(256, (scratch + 255) / 256 * 256);
        memset(block, 0xff, scratch);
        exec.scratch = block;
    }
    ~opened()
    {
        lp_cuda()->close((lp_cuda_context *)exec.context);
        free(block);
    }
    opened(const opened &) = delete;
    opened &operator=(const opened &) = delete;
};

#endif
