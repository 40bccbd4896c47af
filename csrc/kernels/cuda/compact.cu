/* Compaction by waves (waves.h): one launch moves a wave of every tensor of the call.
 *
 * Within a launch thread blocks run in no order and need none: what is written is read by nobody in it.  A launch reads
 * either sources at or above everything it writes (waves that move directly), or writes only to the stage, or reads only the
 * stage; the stream orders the launches. */
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/internal.h"

#include <string.h>

extern "C" {
#include "kernels/cuda/plan.h"
#include "kernels/cuda/waves.h"
}

enum {
    THREADS = 256,
    TILE_ROWS = 8, /* of a block, where rows are long: */
    TILE_EACH = 4, /* a thread has this many columns in each of them, and reads their positions once */
    TILE_COLUMNS = THREADS * TILE_EACH,
    LINE_EACH = 16, /* words of a thread, where rows are short or words adjacent */
    LINE_WORDS = THREADS * LINE_EACH,
    STAGE_MIN = 1024 /* bytes of stage that a tensor should have at least */
};

namespace
{

struct move_dim {
    uint64_t count, stride;
    const uint32_t *position; /* NULL: all */
};

struct move_tensor {
    const unsigned char *source;
    unsigned char *target, *stage;
    uint32_t word, ndim;
    move_dim dim[LP_MAX_DIMS + 1];
};

enum move_kind { GATHER = 0, GATHER_TO_STAGE, COPY_FROM_STAGE };

/* Output words [begin, end) of a tensor, by the blocks from first_block on. */
struct move_segment {
    uint64_t begin, end;
    uint64_t column_blocks; /* blocks side by side in a row; 0: the words are taken as one line */
    uint32_t tensor, first_block;
    uint32_t kind, unused;
};

__device__ __forceinline__ uint64_t position_of(const move_dim &dim, uint64_t index)
{
    return dim.position != NULL ? (uint64_t)dim.position[index] : index;
}

/* The source word at which row `row` (an index over all dimensions but the last) begins. */
__device__ __forceinline__ uint64_t row_source(const move_tensor &tensor, uint64_t row)
{
    uint64_t source = 0;

    for (uint32_t d = tensor.ndim - 1; d-- > 0;) {
        const move_dim &dim = tensor.dim[d];
        uint64_t index = row;

        if (d > 0) {
            index = row % dim.count;
            row /= dim.count;
        }
        source += position_of(dim, index) * dim.stride;
    }
    return source;
}

template <typename word_t>
__device__ void move_line(const move_tensor &tensor, const move_segment &segment, uint64_t block)
{
    const uint64_t first = segment.begin + block * LINE_WORDS + threadIdx.x;
    const move_dim &inner = tensor.dim[tensor.ndim - 1];
    const word_t *source = (const word_t *)(segment.kind == COPY_FROM_STAGE ? tensor.stage : tensor.source);
    word_t *target = (word_t *)(segment.kind == GATHER_TO_STAGE ? tensor.stage : tensor.target);
    const uint64_t back = segment.kind == GATHER_TO_STAGE ? segment.begin : 0;
    uint64_t row = first / inner.count, column = first % inner.count, begin = 0;
    bool fresh = true;

    for (int i = 0; i < LINE_EACH; i++) {
        uint64_t p = first + (uint64_t)i * THREADS;

        if (p >= segment.end)
            return;
        if (segment.kind == COPY_FROM_STAGE) {
            target[p] = source[p - segment.begin];
            continue;
        }
        if (fresh)
            begin = row_source(tensor, row);
        target[p - back] = source[begin + position_of(inner, column)];
        column += THREADS;
        fresh = column >= inner.count;
        if (fresh) {
            row += column / inner.count;
            column %= inner.count;
        }
    }
}

template <typename word_t>
__device__ void move_tile(const move_tensor &tensor, const move_segment &segment, uint64_t block)
{
    enum { AT_ONCE = sizeof(word_t) > 8 ? 2 : sizeof(word_t) > 4 ? 4 : TILE_ROWS };
    const move_dim &inner = tensor.dim[tensor.ndim - 1];
    const uint64_t first_row = segment.begin / inner.count + block / segment.column_blocks * TILE_ROWS;
    const uint64_t first_column = block % segment.column_blocks * TILE_COLUMNS + threadIdx.x;
    const word_t *source = (const word_t *)tensor.source;
    word_t *target = (word_t *)(segment.kind == GATHER_TO_STAGE ? tensor.stage : tensor.target);
    const uint64_t back = segment.kind == GATHER_TO_STAGE ? segment.begin : 0;
    uint64_t from[TILE_EACH];

#pragma unroll
    for (int k = 0; k < TILE_EACH; k++) {
        uint64_t column = first_column + (uint64_t)k * THREADS;

        from[k] = column < inner.count ? position_of(inner, column) : 0;
    }
#pragma unroll
    for (int r = 0; r < TILE_ROWS; r += AT_ONCE) {
        word_t words[AT_ONCE][TILE_EACH];

        /* All reads before the first write, so that many are under way. */
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            uint64_t row = first_row + (uint64_t)(r + i), p = row * inner.count + first_column;
            uint64_t begin = p - first_column < segment.end ? row_source(tensor, row) : 0;

#pragma unroll
            for (int k = 0; k < TILE_EACH; k++) {
                uint64_t column = first_column + (uint64_t)k * THREADS, at = p + (uint64_t)k * THREADS;

                if (column < inner.count && at >= segment.begin && at < segment.end)
                    words[i][k] = source[begin + from[k]];
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            uint64_t row = first_row + (uint64_t)(r + i), p = row * inner.count + first_column;

#pragma unroll
            for (int k = 0; k < TILE_EACH; k++) {
                uint64_t column = first_column + (uint64_t)k * THREADS, at = p + (uint64_t)k * THREADS;

                if (column < inner.count && at >= segment.begin && at < segment.end)
                    target[at - back] = words[i][k];
            }
        }
    }
}

template <typename word_t>
__device__ __forceinline__ void move_words(const move_tensor &tensor, const move_segment &segment,
                                           uint64_t block)
{
    if (segment.column_blocks == 0)
        move_line<word_t>(tensor, segment, block);
    else
        move_tile<word_t>(tensor, segment, block);
}

__global__ void __launch_bounds__(THREADS)
    move(const move_tensor *tensors, const move_segment *segments, uint32_t count)
{
    uint32_t low = 0, high = count;

    /* The last segment that begins at or before this block. */
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;

        if (segments[middle].first_block <= blockIdx.x)
            low = middle;
        else
            high = middle;
    }
    const move_segment segment = segments[low];
    const move_tensor &tensor = tensors[segment.tensor];
    uint64_t block = blockIdx.x - segment.first_block;

    switch (tensor.word) {
    case 1:
        move_words<uint8_t>(tensor, segment, block);
        break;
    case 2:
        move_words<uint16_t>(tensor, segment, block);
        break;
    case 4:
        move_words<uint32_t>(tensor, segment, block);
        break;
    case 8:
        move_words<uint64_t>(tensor, segment, block);
        break;
    default:
        move_words<uint4>(tensor, segment, block);
        break;
    }
}

/* --- the host's side ------------------------------------------------------------------------------------------------ */

struct launch {
    size_t first, count; /* segments */
    uint32_t blocks;
};

struct array {
    void *data;
    size_t count, capacity, width;
};

/* The whole call: laid out on the host, then uploaded to the front of the scratch as it is. */
struct moves {
    const lp_exec *exec;
    size_t count;
    lp_wave_layout *layouts;
    array tensors, positions, segments, launches;
    uint64_t *done;                    /* output words of each tensor */
    lp_wave *waves;                    /* of the current step */
    size_t scratch_bytes, stage_bytes; /* all of it; of each tensor, at the scratch's end */
};

lp_status push(moves *m, array *a, const void *element, lp_error *err)
{
    lp_status status = lp_grow(&m->exec->allocator, &a->data, &a->capacity, a->count + 1, a->width, err);

    if (status == LP_OK)
        memcpy((char *)a->data + a->count++ * a->width, element, a->width);
    return status;
}

lp_status add_segment(moves *m, launch *l, uint32_t tensor, const lp_wave *wave, move_kind kind,
                      lp_error *err)
{
    const lp_wave_layout *layout = &m->layouts[tensor];
    uint64_t row = layout->dim[layout->ndim - 1].count, blocks;
    move_segment segment = {wave->begin, wave->end, 0, tensor, l->blocks, (uint32_t)kind, 0};

    if (kind != COPY_FROM_STAGE && row >= TILE_COLUMNS) {
        uint64_t rows = (wave->end - 1) / row - wave->begin / row + 1;

        segment.column_blocks = (row + TILE_COLUMNS - 1) / TILE_COLUMNS;
        blocks = segment.column_blocks * ((rows + TILE_ROWS - 1) / TILE_ROWS);
    } else {
        blocks = (wave->end - wave->begin + LINE_WORDS - 1) / LINE_WORDS;
    }
    if (blocks > INT32_MAX - l->blocks)
        return lp_error_set(err, LP_ERR_UNSUPPORTED,
                            "too much to compact in one call: %llu blocks of threads",
                            (unsigned long long)blocks);
    l->blocks += (uint32_t)blocks;
    l->count++;
    return push(m, &m->segments, &segment, err);
}

/* The next step of every tensor that is not in place yet; *any says whether there was one. */
lp_status add_step(moves *m, bool in_place, bool *any, lp_error *err)
{
    launch staged = {m->segments.count, 0, 0}, direct;
    lp_status status = LP_OK;

    *any = false;
    for (size_t i = 0; i < m->count; i++) {
        const lp_wave_layout *layout = &m->layouts[i];

        m->waves[i] = {m->done[i], layout->total, false};
        if (m->done[i] >= layout->total ||
            (in_place && !lp_wave_next(layout, m->done[i], m->stage_bytes / layout->word, &m->waves[i])))
            continue;
        *any = true;
        if (m->waves[i].staged)
            status = add_segment(m, &staged, (uint32_t)i, &m->waves[i], GATHER_TO_STAGE, err);
        if (status != LP_OK)
            return status;
    }
    direct = {m->segments.count, 0, 0};
    for (size_t i = 0; i < m->count && status == LP_OK; i++) {
        if (m->done[i] >= m->layouts[i].total)
            continue;
        status = add_segment(m, &direct, (uint32_t)i, &m->waves[i],
                             m->waves[i].staged ? COPY_FROM_STAGE : GATHER, err);
        m->done[i] = m->waves[i].end;
    }
    if (status == LP_OK && staged.count > 0)
        status = push(m, &m->launches, &staged, err);
    if (status == LP_OK && direct.count > 0)
        status = push(m, &m->launches, &direct, err);
    return status;
}

lp_status add_positions(moves *m, const lp_wave_dim *dim, lp_error *err)
{
    for (uint64_t k = 0; k < dim->count; k++) {
        uint32_t position = (uint32_t)dim->position[k];
        lp_status status;

        if ((int64_t)position != dim->position[k])
            return lp_error_set(err, LP_ERR_UNSUPPORTED,
                                "a dimension of more than 2^32 elements cannot be compacted");
        status = push(m, &m->positions, &position, err);
        if (status != LP_OK)
            return status;
    }
    return LP_OK;
}

/* Describe tensor i; its positions' addresses are offsets into m->positions (plus one) until everything is placed. */
lp_status add_tensor(moves *m, size_t i, const lp_cuda_tensor *t, unsigned char *target,
                     const unsigned char *source, lp_error *err)
{
    lp_wave_layout *layout = &m->layouts[i];
    move_tensor tensor = {};

    lp_wave_layout_make(layout, (uintptr_t)target | (uintptr_t)source, t->width, t->shape, t->ndim, t->kept);
    tensor.source = source;
    tensor.target = target;
    tensor.stage = (unsigned char *)m->exec->scratch + m->scratch_bytes - (m->count - i) * m->stage_bytes;
    tensor.word = layout->word;
    tensor.ndim = layout->ndim;
    m->done[i] = source == target ? lp_wave_start(layout) : 0;
    for (unsigned d = 0; d < layout->ndim; d++) {
        tensor.dim[d].count = layout->dim[d].count;
        tensor.dim[d].stride = layout->dim[d].stride;
        if (layout->dim[d].position != NULL && m->done[i] < layout->total) {
            lp_status status;

            tensor.dim[d].position = (const uint32_t *)(m->positions.count * sizeof(uint32_t) + 1);
            status = add_positions(m, &layout->dim[d], err);
            if (status != LP_OK)
                return status;
        }
    }
    return push(m, &m->tensors, &tensor, err);
}

size_t aligned(size_t bytes)
{
    return lp_ceil_div(bytes, LP_ALIGN) * LP_ALIGN;
}

/* Upload the description to the front of the scratch, and launch. */
lp_status carry_out(moves *m, lp_error *err)
{
    size_t tensor_bytes = aligned(m->tensors.count * m->tensors.width);
    size_t position_bytes = aligned(m->positions.count * m->positions.width);
    size_t bytes = tensor_bytes + position_bytes + m->segments.count * m->segments.width;
    size_t room = m->scratch_bytes - m->count * m->stage_bytes;
    unsigned char *device = (unsigned char *)m->exec->scratch, *host = NULL;
    cudaStream_t stream = (cudaStream_t)m->exec->stream;
    size_t capacity = 0;
    cudaError_t error;
    lp_status status;

    if (m->launches.count == 0)
        return LP_OK;
    if (bytes > room)
        return lp_error_set(
            err, LP_ERR_NOMEM,
            "compacting in place needs %zu bytes of scratch on the device to describe the moves, and "
            "has %zu",
            bytes, room);
    for (size_t i = 0; i < m->count; i++) {
        move_tensor *tensor = (move_tensor *)m->tensors.data + i;

        for (unsigned d = 0; d < tensor->ndim; d++)
            if (tensor->dim[d].position != NULL)
                tensor->dim[d].position =
                    (const uint32_t *)(device + tensor_bytes + ((uintptr_t)tensor->dim[d].position - 1));
    }
    status = lp_grow(&m->exec->allocator, (void **)&host, &capacity, bytes, 1, err);
    if (status != LP_OK)
        return status;
    memcpy(host, m->tensors.data, m->tensors.count * m->tensors.width);
    if (m->positions.count > 0)
        memcpy(host + tensor_bytes, m->positions.data, m->positions.count * m->positions.width);
    memcpy(host + tensor_bytes + position_bytes, m->segments.data, m->segments.count * m->segments.width);
    /* Pageable memory: the call returns when it has read it. */
    error = cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream);
    lp_release(&m->exec->allocator, host, capacity, 1);
    if (error != cudaSuccess)
        return lp_cuda_failed(err, error, "uploading what is kept");
    for (size_t i = 0; i < m->launches.count; i++) {
        const launch *l = (const launch *)m->launches.data + i;

        LP_LAUNCH(move, l->blocks, THREADS, 0, stream, (const move_tensor *)device,
                  (const move_segment *)(device + tensor_bytes + position_bytes) + l->first,
                  (uint32_t)l->count);
    }
    return lp_cuda_launched(err, "compacting");
}

lp_status plan_and_run(moves *m, const lp_cuda_tensor *tensors, const unsigned char *source, lp_error *err)
{
    bool any = true;
    lp_status status = LP_OK;

    for (size_t i = 0; i < m->count && status == LP_OK; i++) {
        unsigned char *target = (unsigned char *)tensors[i].data;

        status = add_tensor(m, i, &tensors[i], target, source != NULL ? source : target, err);
    }
    while (any && status == LP_OK)
        status = add_step(m, source == NULL, &any, err);
    return status == LP_OK ? carry_out(m, err) : status;
}

lp_status check_tensor(const char *operation, const void *data, size_t width, const size_t *shape,
                       size_t ndim, const lp_kept *kept, lp_error *err)
{
    size_t bytes = width;

    if (data == NULL || shape == NULL || kept == NULL)
        return lp_error_set(err, LP_ERR_ARGUMENT, "%s was given a NULL tensor", operation);
    if (ndim < 1 || ndim > LP_MAX_DIMS || (width != 1 && width != 2 && width != 4 && width != 8))
        return lp_error_set(err, LP_ERR_ARGUMENT, "%s cannot take %zu dimensions of %zu-byte elements",
                            operation, ndim, width);
    for (size_t d = 0; d < ndim; d++) {
        if (shape[d] < 1 || (kept[d].position != NULL && (kept[d].count < 1 || kept[d].count > shape[d])))
            return lp_error_set(err, LP_ERR_ARGUMENT,
                                "%s cannot keep %zu of the %zu positions of dimension %zu", operation,
                                kept[d].count, shape[d], d);
        if (!lp_mul_size(bytes, shape[d], &bytes))
            return lp_error_set(err, LP_ERR_OVERFLOW, "%s was given a tensor that fits no memory", operation);
        for (size_t k = 0; kept[d].position != NULL && k < kept[d].count; k++) {
            int64_t at = kept[d].position[k];

            if (at < 0 || (uint64_t)at >= shape[d] || (k > 0 && at <= kept[d].position[k - 1]))
                return lp_error_set(err, LP_ERR_ARGUMENT,
                                    "%s was given positions of dimension %zu that do not rise within 0..%zu",
                                    operation, d, shape[d] - 1);
        }
    }
    return LP_OK;
}

/* `source` NULL: in place. */
lp_status run(const char *operation, const lp_cuda_tensor *tensors, size_t count, const unsigned char *source,
              const lp_exec *exec, lp_error *err)
{
    moves m = {};
    const lp_allocator *allocator = &exec->allocator;
    size_t layouts = 0, done = 0, waves = 0;
    lp_status status = lp_cuda_not_capturing(exec, operation, err);

    if (status == LP_OK)
        status = lp_cuda_check_scratch(exec, 2 * count * STAGE_MIN, operation, err);
    if (status != LP_OK)
        return status;
    m.exec = exec;
    m.count = count;
    m.scratch_bytes = exec->scratch_bytes / LP_ALIGN * LP_ALIGN; /* so that the stages begin on it */
    m.stage_bytes = m.scratch_bytes / 2 / count / LP_ALIGN * LP_ALIGN;
    m.tensors.width = sizeof(move_tensor);
    m.positions.width = sizeof(uint32_t);
    m.segments.width = sizeof(move_segment);
    m.launches.width = sizeof(launch);
    status = lp_grow(allocator, (void **)&m.layouts, &layouts, count, sizeof *m.layouts, err);
    if (status == LP_OK)
        status = lp_grow(allocator, (void **)&m.done, &done, count, sizeof *m.done, err);
    if (status == LP_OK)
        status = lp_grow(allocator, (void **)&m.waves, &waves, count, sizeof *m.waves, err);
    if (status == LP_OK)
        status = plan_and_run(&m, tensors, source, err);
    lp_release(allocator, m.layouts, layouts, sizeof *m.layouts);
    lp_release(allocator, m.done, done, sizeof *m.done);
    lp_release(allocator, m.waves, waves, sizeof *m.waves);
    lp_release(allocator, m.tensors.data, m.tensors.capacity, m.tensors.width);
    lp_release(allocator, m.positions.data, m.positions.capacity, m.positions.width);
    lp_release(allocator, m.segments.data, m.segments.capacity, m.segments.width);
    lp_release(allocator, m.launches.data, m.launches.capacity, m.launches.width);
    return status;
}

lp_status enter_and_run(const char *operation, const lp_cuda_tensor *tensors, size_t count,
                        const unsigned char *source, const lp_exec *exec, lp_error *err)
{
    int before;
    lp_status status = LP_OK;

    if (count == 0)
        return LP_OK;
    if (tensors == NULL || count > INT32_MAX)
        return lp_error_set(err, LP_ERR_ARGUMENT, "%s was given no list of tensors", operation);
    for (size_t i = 0; i < count && status == LP_OK; i++)
        status = check_tensor(operation, tensors[i].data, tensors[i].width, tensors[i].shape, tensors[i].ndim,
                              tensors[i].kept, err);
    if (status == LP_OK)
        status = lp_cuda_enter(exec, &before, err);
    if (status != LP_OK)
        return status;
    return lp_cuda_leave(exec, before, run(operation, tensors, count, source, exec, err), err);
}

} // namespace

extern "C" lp_status lp_cuda_compact_many(const lp_cuda_tensor *tensors, size_t count, const lp_exec *exec,
                                          lp_error *err)
{
    return enter_and_run("compact_many", tensors, count, NULL, exec, err);
}

extern "C" lp_status lp_cuda_compact(void *data, size_t width, const size_t *shape, size_t ndim,
                                     const lp_kept *kept, const lp_exec *exec, lp_error *err)
{
    lp_cuda_tensor tensor = {data, width, ndim, shape, kept};

    return enter_and_run("compact", &tensor, 1, NULL, exec, err);
}

extern "C" lp_status lp_cuda_compact_into(void *target, const void *source, size_t width, const size_t *shape,
                                          size_t ndim, const lp_kept *kept, const lp_exec *exec,
                                          lp_error *err)
{
    lp_cuda_tensor tensor = {target, width, ndim, shape, kept};

    if (source == NULL)
        return lp_error_set(err, LP_ERR_ARGUMENT, "compact_into was given a NULL tensor");
    return enter_and_run("compact_into", &tensor, 1, (const unsigned char *)source, exec, err);
}
