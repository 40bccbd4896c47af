/* Compaction by waves (waves.h): one launch moves a wave of every tensor of the call whose words are as wide.
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
    BLOCKS_MIN = 3, /* at a time on a multiprocessor, which bounds the registers */
    TILE_ROWS = 32, /* of a block, where rows are long and cut: */
    TILE_EACH = 4,  /* a thread has this many columns in each of them, and reads their positions once */
    TILE_COLUMNS = THREADS * TILE_EACH,
    LINE_EACH = 16, /* words of a thread, where rows are short or words adjacent */
    LINE_WORDS = THREADS * LINE_EACH,
    HINT = 16,       /* blocks that share a hint to their segment */
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

/* Words a thread reads before it writes any, so that many reads are under way. */
template <typename word_t> struct at_once {
    enum { LINE = sizeof(word_t) > 8 ? 4 : 8, ROWS = sizeof(word_t) > 8 ? 1 : sizeof(word_t) > 4 ? 2 : 4 };
};

template <typename word_t>
__device__ __forceinline__ void move_line(const move_tensor &tensor, const move_segment &segment,
                                          uint64_t block)
{
    enum { AT_ONCE = at_once<word_t>::LINE };
    const uint64_t first = segment.begin + block * LINE_WORDS + threadIdx.x;
    const move_dim &inner = tensor.dim[tensor.ndim - 1];
    const bool gathers = segment.kind != COPY_FROM_STAGE;
    const word_t *source = (const word_t *)(gathers ? tensor.source : tensor.stage);
    word_t *target = (word_t *)(segment.kind == GATHER_TO_STAGE ? tensor.stage : tensor.target);
    const uint64_t back = segment.kind == GATHER_TO_STAGE ? segment.begin : 0, width = inner.count;
    uint64_t row = 0, column = 0, begin = 0;

    if (first >= segment.end)
        return;
    if (gathers) {
        row = first / width;
        column = first - row * width;
        begin = row_source(tensor, row);
    }
    for (int i = 0; i < LINE_EACH; i += AT_ONCE) {
        word_t words[AT_ONCE];

#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            uint64_t p = first + (uint64_t)(i + k) * THREADS;

            if (p >= segment.end)
                continue;
            if (!gathers) {
                words[k] = source[p - segment.begin];
                continue;
            }
            words[k] = source[begin + position_of(inner, column)];
            column += THREADS;
            if (column >= width && p + THREADS < segment.end) {
                if (width >= THREADS) {
                    column -= width;
                    ++row;
                } else {
                    row += column / width;
                    column %= width;
                }
                begin = row_source(tensor, row);
            }
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            uint64_t p = first + (uint64_t)(i + k) * THREADS;

            if (p < segment.end)
                target[p - back] = words[k];
        }
    }
}

template <typename word_t>
__device__ __forceinline__ void move_tile(const move_tensor &tensor, const move_segment &segment,
                                          uint64_t block)
{
    enum { AT_ONCE = at_once<word_t>::ROWS };
    const move_dim &inner = tensor.dim[tensor.ndim - 1];
    const uint64_t width = inner.count, row_block = block / segment.column_blocks;
    const uint64_t first_row = segment.begin / width + row_block * TILE_ROWS;
    const uint64_t first_column = (block - row_block * segment.column_blocks) * TILE_COLUMNS + threadIdx.x;
    const word_t *source = (const word_t *)tensor.source;
    word_t *target = (word_t *)(segment.kind == GATHER_TO_STAGE ? tensor.stage : tensor.target);
    const uint64_t back = segment.kind == GATHER_TO_STAGE ? segment.begin : 0;
    uint32_t from[TILE_EACH];

#pragma unroll
    for (int k = 0; k < TILE_EACH; k++) {
        uint64_t column = first_column + (uint64_t)k * THREADS;

        from[k] = column < width ? inner.position[column] : 0;
    }
#pragma unroll 1
    for (int r = 0; r < TILE_ROWS && (first_row + (uint64_t)r) * width < segment.end; r += AT_ONCE) {
        word_t words[AT_ONCE][TILE_EACH];

#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            uint64_t row = first_row + (uint64_t)(r + i), p = row * width + first_column;
            const word_t *begin = source + (p - first_column < segment.end ? row_source(tensor, row) : 0);

#pragma unroll
            for (int k = 0; k < TILE_EACH; k++) {
                uint64_t column = first_column + (uint64_t)k * THREADS, at = p + (uint64_t)k * THREADS;

                if (column < width && at >= segment.begin && at < segment.end)
                    words[i][k] = begin[from[k]];
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            uint64_t row = first_row + (uint64_t)(r + i), p = row * width + first_column;

#pragma unroll
            for (int k = 0; k < TILE_EACH; k++) {
                uint64_t column = first_column + (uint64_t)k * THREADS, at = p + (uint64_t)k * THREADS;

                if (column < width && at >= segment.begin && at < segment.end)
                    target[at - back] = words[i][k];
            }
        }
    }
}

/* Segments of one width of word; hints[b / HINT] is the segment of block b - b % HINT. */
template <typename word_t>
__global__ void __launch_bounds__(THREADS, BLOCKS_MIN)
    move(const move_tensor *tensors, const move_segment *segments, const uint32_t *hints, uint32_t count)
{
    uint32_t at = hints[blockIdx.x / HINT];

    while (at + 1 < count && segments[at + 1].first_block <= blockIdx.x)
        ++at;
    const move_segment segment = segments[at];
    const move_tensor &tensor = tensors[segment.tensor];
    uint64_t block = blockIdx.x - segment.first_block;

    if (segment.column_blocks == 0)
        move_line<word_t>(tensor, segment, block);
    else
        move_tile<word_t>(tensor, segment, block);
}

/* --- the host's side ------------------------------------------------------------------------------------------------ */

struct launch {
    size_t first, count; /* segments */
    size_t hint;         /* the first */
    uint32_t blocks, word;
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
    array tensors, positions, segments, hints, launches;
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
    const lp_wave_dim *inner = &layout->dim[layout->ndim - 1];
    uint64_t row = inner->count, blocks;
    move_segment segment = {wave->begin, wave->end, 0, tensor, l->blocks, (uint32_t)kind, 0};

    if (kind != COPY_FROM_STAGE && row >= TILE_COLUMNS && inner->position != NULL) {
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

/* A launch whose segments are there: with its hints, unless it has nothing to do. */
lp_status add_launch(moves *m, launch *l, lp_error *err)
{
    const move_segment *segments = (const move_segment *)m->segments.data + l->first;
    lp_status status = LP_OK;
    uint32_t at = 0;

    l->hint = m->hints.count;
    for (uint32_t block = 0; status == LP_OK && block < l->blocks; block += HINT) {
        while (at + 1 < l->count && segments[at + 1].first_block <= block)
            ++at;
        status = push(m, &m->hints, &at, err);
    }
    return status == LP_OK && l->count > 0 ? push(m, &m->launches, l, err) : status;
}

/* The tensors' waves, either the staged ones to the stage, or all to their places. */
lp_status add_waves(moves *m, bool to_stage, lp_error *err)
{
    lp_status status = LP_OK;

    for (uint32_t word = 16; status == LP_OK && word > 0; word /= 2) {
        launch l = {m->segments.count, 0, 0, 0, word};

        for (size_t i = 0; i < m->count && status == LP_OK; i++) {
            const lp_wave *wave = &m->waves[i];

            if (m->layouts[i].word != word || wave->begin == wave->end || (to_stage && !wave->staged))
                continue;
            status = add_segment(m, &l, (uint32_t)i, wave,
                                 to_stage       ? GATHER_TO_STAGE
                                 : wave->staged ? COPY_FROM_STAGE
                                                : GATHER,
                                 err);
        }
        if (status == LP_OK)
            status = add_launch(m, &l, err);
    }
    return status;
}

/* The next step of every tensor that is not in place yet; *any says whether there was one. */
lp_status add_step(moves *m, bool in_place, bool *any, lp_error *err)
{
    lp_status status;

    *any = false;
    for (size_t i = 0; i < m->count; i++) {
        const lp_wave_layout *layout = &m->layouts[i];

        m->waves[i] = {m->done[i], layout->total, false};
        if (m->done[i] >= layout->total ||
            (in_place && !lp_wave_next(layout, m->done[i], m->stage_bytes / layout->word, &m->waves[i])))
            m->waves[i] = {layout->total, layout->total, false};
        else
            *any = true;
        m->done[i] = m->waves[i].end;
    }
    status = add_waves(m, true, err);
    return status == LP_OK ? add_waves(m, false, err) : status;
}

lp_status add_positions(moves *m, const lp_wave_dim *dim, lp_error *err)
{
    array *all = &m->positions;
    lp_status status =
        lp_grow(&m->exec->allocator, &all->data, &all->capacity, all->count + dim->count, all->width, err);
    uint32_t *to;

    if (status != LP_OK)
        return status;
    if (dim->position[dim->count - 1] > (int64_t)UINT32_MAX) /* they rise */
        return lp_error_set(err, LP_ERR_UNSUPPORTED,
                            "a dimension of more than 2^32 elements cannot be compacted");
    to = (uint32_t *)all->data + all->count;
    for (uint64_t k = 0; k < dim->count; k++)
        to[k] = (uint32_t)dim->position[k];
    all->count += dim->count;
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

template <typename word_t>
void launch_moves(const launch *l, const move_tensor *tensors, const move_segment *segments,
                  const uint32_t *hints, cudaStream_t stream)
{
    LP_LAUNCH(move<word_t>, l->blocks, THREADS, 0, stream, tensors, segments + l->first, hints + l->hint,
              (uint32_t)l->count);
}

/* Upload the description to the front of the scratch, and launch. */
lp_status carry_out(moves *m, lp_error *err)
{
    array *const parts[] = {&m->tensors, &m->positions, &m->segments, &m->hints};
    size_t begin[4], bytes = 0, room = m->scratch_bytes - m->count * m->stage_bytes;
    unsigned char *device = (unsigned char *)m->exec->scratch, *host = NULL;
    cudaStream_t stream = (cudaStream_t)m->exec->stream;
    size_t capacity = 0;
    cudaError_t error;
    lp_status status;

    if (m->launches.count == 0)
        return LP_OK;
    for (int i = 0; i < 4; i++) {
        begin[i] = bytes;
        bytes += aligned(parts[i]->count * parts[i]->width);
    }
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
                    (const uint32_t *)(device + begin[1] + ((uintptr_t)tensor->dim[d].position - 1));
    }
    status = lp_grow(&m->exec->allocator, (void **)&host, &capacity, bytes, 1, err);
    if (status != LP_OK)
        return status;
    for (int i = 0; i < 4; i++)
        if (parts[i]->count > 0)
            memcpy(host + begin[i], parts[i]->data, parts[i]->count * parts[i]->width);
    /* Pageable memory: the call returns when it has read it. */
    error = cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream);
    lp_release(&m->exec->allocator, host, capacity, 1);
    if (error != cudaSuccess)
        return lp_cuda_failed(err, error, "uploading what is kept");
    for (size_t i = 0; i < m->launches.count; i++) {
        const launch *l = (const launch *)m->launches.data + i;
        const move_tensor *tensors = (const move_tensor *)device;
        const move_segment *segments = (const move_segment *)(device + begin[2]);
        const uint32_t *hints = (const uint32_t *)(device + begin[3]);

        if (l->word == 16)
            launch_moves<uint4>(l, tensors, segments, hints, stream);
        else if (l->word == 8)
            launch_moves<uint64_t>(l, tensors, segments, hints, stream);
        else if (l->word == 4)
            launch_moves<uint32_t>(l, tensors, segments, hints, stream);
        else if (l->word == 2)
            launch_moves<uint16_t>(l, tensors, segments, hints, stream);
        else
            launch_moves<uint8_t>(l, tensors, segments, hints, stream);
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
    m.hints.width = sizeof(uint32_t);
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
    lp_release(allocator, m.hints.data, m.hints.capacity, m.hints.width);
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
