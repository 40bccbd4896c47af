/* Whether hopper.cu may do its work.  No machine of its capability has run it yet, so the user has to ask for it
 * (LLMPRUNE_CUDA_WGMMA=1), and when a device is opened its sums are compared with those of fused.cu once. */
#include "kernels/cuda/fused_job.cuh"

#include <stddef.h>
#include <stdlib.h>

namespace
{

/* Odd on purpose: several tiles with edges, a sample of one stage and a part of the next. */
enum { ROWS = 200, COLUMNS = 264, SAMPLES = 3, TOKENS = 100, SCRATCH = 1 << 17 };
enum { WEIGHT = ROWS * COLUMNS, X = SAMPLES * TOKENS * COLUMNS, DY = SAMPLES * TOKENS * ROWS };
const double TOLERANCE = 1e-4; /* relative; both add in float32, in their own order */

/* What lies on the device during the comparison. */
struct trial_memory {
    double sums[2][ROWS + COLUMNS];
    unsigned char scratch[SCRATCH];
    uint16_t weight[WEIGHT], x[X], dy[DY];
};

/* Random bfloat16 of magnitude 1/2 to 1, and of both signs. */
void fill(uint16_t *values, size_t count, uint32_t *state)
{
    for (size_t i = 0; i < count; i++) {
        *state = *state * 1664525u + 1013904223u;
        values[i] = (uint16_t)(0x3f00u | (*state >> 9 & 0x807fu));
    }
}

static_assert(offsetof(trial_memory, scratch) % 256 == 0 && offsetof(trial_memory, weight) % 16 == 0 &&
                  offsetof(trial_memory, x) % 16 == 0 && offsetof(trial_memory, dy) % 16 == 0,
              "what the kernels read lies as they need it");

lp_status compare(lp_cuda_context *context, trial_memory *host, trial_memory *device, lp_error *err)
{
    lp_exec exec = {};
    lp_linear linear = {};
    uint32_t state = 1;
    double worst = 0;
    cudaError_t error;

    memset(host, 0, sizeof *host);
    fill(host->weight, WEIGHT, &state);
    fill(host->x, X, &state);
    fill(host->dy, DY, &state);
    error = cudaMemcpy(device, host, sizeof *host, cudaMemcpyHostToDevice);
    if (error != cudaSuccess)
        return lp_cuda_failed(err, error, "trying the wgmma kernel");
    exec.context = context;
    exec.allocator = context->allocator;
    exec.scratch = device->scratch;
    exec.scratch_bytes = SCRATCH;
    linear.weight = device->weight;
    linear.x = device->x;
    linear.dy = device->dy;
    linear.out = ROWS;
    linear.in = COLUMNS;
    linear.samples = SAMPLES;
    linear.tokens = TOKENS;
    linear.weight_stride = linear.x_stride = COLUMNS;
    linear.dy_stride = ROWS;
    linear.dtype = LP_BF16;
    linear.order = 2;
    for (int i = 0; i < 2; i++) {
        bool done = false;
        lp_status status;

        context->warpgroups = i == 1;
        status = lp_fused_scores(&linear, device->sums[i], device->sums[i] + ROWS, &exec, &done, err);
        context->warpgroups = false;
        if (status != LP_OK || !done)
            return status != LP_OK ? status : lp_error_set(err, LP_ERR_DEVICE, "the trial has no scratch");
    }
    error = cudaMemcpy(host->sums, device->sums, sizeof host->sums, cudaMemcpyDeviceToHost);
    if (error != cudaSuccess)
        return lp_cuda_failed(err, error, "trying the wgmma kernel");
    for (int i = 0; i < ROWS + COLUMNS; i++) {
        double off = fabs(host->sums[1][i] / host->sums[0][i] - 1);

        worst = off > worst || isnan(off) ? off : worst;
    }
    if (!(worst <= TOLERANCE))
        return lp_error_set(
            err, LP_ERR_DEVICE,
            "LLMPRUNE_CUDA_WGMMA=1, but on CUDA device %d the wgmma kernel's sums are off by %.1e "
            "from the mma kernel's: unset it, and please report this",
            context->device, worst);
    context->warpgroups = true;
    return LP_OK;
}

} // namespace

extern "C" lp_status lp_hopper_admit(lp_cuda_context *context, lp_error *err)
{
    const char *wish = getenv("LLMPRUNE_CUDA_WGMMA");
    trial_memory *host;
    void *device = NULL;
    cudaError_t error;
    lp_status status;

    context->warpgroups = false;
    if (wish == NULL || strcmp(wish, "") == 0 || strcmp(wish, "0") == 0)
        return LP_OK;
    if (strcmp(wish, "1") != 0)
        return lp_error_set(err, LP_ERR_DEVICE, "LLMPRUNE_CUDA_WGMMA is \"%s\"; 0 and 1 are known", wish);
    if (context->major != 9 || context->minor != 0 || !lp_hopper_built())
        return LP_OK;
    error = lp_hopper_prepare();
    if (error != cudaSuccess)
        return lp_cuda_failed(err, error, "loading the wgmma kernel");
    host = (trial_memory *)context->allocator.resize(context->allocator.ctx, NULL, 0, sizeof *host);
    if (host == NULL)
        return lp_error_set(err, LP_ERR_NOMEM, "no memory to try the wgmma kernel");
    error = cudaMalloc(&device, sizeof *host);
    if (error == cudaSuccess)
        status = compare(context, host, (trial_memory *)device, err);
    else
        status = lp_cuda_failed(err, error, "trying the wgmma kernel");
    if (device != NULL)
        (void)cudaFree(device);
    (void)context->allocator.resize(context->allocator.ctx, host, sizeof *host, 0);
    return status;
}
