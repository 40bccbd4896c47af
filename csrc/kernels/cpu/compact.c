/* Compaction: keep some positions of some dimensions of a dense tensor, front-packed in row-major order.
 *
 * Any such cut is a walk over the kept index tuples of the outer dimensions (odometer) with one inner step for each:
 * copy a run of bytes, or pack the kept elements of one row.  Kept bytes only ever move towards the front, so walking
 * upwards in place never overwrites what is still to be read.
 *
 * Several threads in place: each takes the next chunk of tuples, packs it into a buffer of its own, waits its turn to
 * declare it read, and only then copies the buffer to its place.  A chunk's destination lies below the end of its source,
 * hence below the sources of chunks already declared read. */
#include "kernels/cpu/pack.h"
#include "kernels/cpu/threads.h"
#include "kernels/cpu/workers.h"

#include <string.h>

enum {
    COPY_UNIT =
        512, /* an inner unit of this many bytes is copied as a whole, element by element of the cut */
    COPY_SPLIT = 256 * 1024, /* larger units are split so that threads can share them */
    ROW_ELEMENTS = 256, /* shorter rows are joined with their neighbours where the outer dimension is whole */
    CHUNK_BYTES = 256 * 1024, /* destination bytes of a thread's chunk */
    ROW_BYTES_MAX = 1 << 20,  /* rows above this are left to one thread */
};

/* Destination bytes below which one thread does the work. */
static const size_t THREAD_BYTES = 2u << 20;

typedef struct {
    size_t first, length; /* bytes of the row */
} run;

typedef struct {
    size_t size, count, stride; /* stride in source bytes */
    const int64_t *position;    /* NULL: all */
} dimension;

typedef struct {
    dimension dim[LP_MAX_DIMS + 2];
    size_t ndim;            /* outer dimensions */
    size_t tuples;          /* product of their counts */
    size_t row_in, row_out; /* bytes of the inner row before and after */
    lp_pack_row pack;       /* NULL: runs */
    void (*copy)(unsigned char *target, const unsigned char *source, size_t bytes);
    lp_selection selection;
    const run *runs;
    size_t run_count;
    void *index; /* scratch behind selection or runs */
    size_t index_bytes;

    unsigned char *target;
    const unsigned char *source;
    bool in_place;
    size_t chunk; /* tuples of a chunk */
    unsigned char *stage;
    size_t stage_each;
    lp_lock lock;
    lp_condition turn;
    size_t next, declared; /* chunks handed out, and chunks declared read, under the lock */
} plan;

/* Odometer over the outer tuples. */
typedef struct {
    size_t index[LP_MAX_DIMS + 2];
    size_t offset; /* source byte of the current tuple */
} cursor;

static size_t position_of(const dimension *d, size_t index)
{
    return d->position != NULL ? (size_t)d->position[index] : index;
}

static cursor cursor_at(const plan *p, size_t tuple)
{
    cursor c = {.offset = 0};

    for (size_t k = p->ndim; k-- > 0;) {
        c.index[k] = tuple % p->dim[k].count;
        tuple /= p->dim[k].count;
        c.offset += position_of(&p->dim[k], c.index[k]) * p->dim[k].stride;
    }
    return c;
}

static void cursor_step(const plan *p, cursor *c)
{
    for (size_t k = p->ndim; k-- > 0;) {
        const dimension *d = &p->dim[k];
        size_t was = position_of(d, c->index[k]);

        if (++c->index[k] < d->count) {
            c->offset += (position_of(d, c->index[k]) - was) * d->stride;
            return;
        }
        c->index[k] = 0;
        c->offset -= (was - position_of(d, 0)) * d->stride;
    }
}

/* Pack the tuples [first, end) to `to`; every byte written lies below `limit`. */
static void walk(const plan *p, size_t first, size_t end, unsigned char *to, const unsigned char *limit)
{
    cursor c = cursor_at(p, first);

    for (size_t t = first; t < end; t++, cursor_step(p, &c)) {
        const unsigned char *from = p->source + c.offset;

        if (p->pack != NULL) {
            to = p->pack(to, from, &p->selection, limit);
            continue;
        }
        for (size_t r = 0; r < p->run_count; r++) {
            if (to != from + p->runs[r].first)
                p->copy(to, from + p->runs[r].first, p->runs[r].length);
            to += p->runs[r].length;
        }
    }
}

static void walk_chunks(void *context, int worker)
{
    plan *p = context;
    unsigned char *stage = p->in_place ? p->stage + (size_t)worker * p->stage_each : NULL;

    for (;;) {
        size_t chunk, first, end, bytes;
        unsigned char *to;

        lp_lock_take(&p->lock);
        chunk = p->next++;
        lp_lock_give(&p->lock);
        first = chunk * p->chunk;
        if (first >= p->tuples)
            return;
        end = p->tuples - first < p->chunk ? p->tuples : first + p->chunk;
        bytes = (end - first) * p->row_out;
        to = p->target + first * p->row_out;
        if (!p->in_place) {
            walk(p, first, end, to, to + bytes);
            continue;
        }
        walk(p, first, end, stage, stage + p->stage_each);
        lp_lock_take(&p->lock);
        while (p->declared != chunk)
            lp_condition_wait(&p->turn, &p->lock);
        p->declared++;
        lp_condition_wake_all(&p->turn);
        lp_lock_give(&p->lock);
        memcpy(to, stage, bytes);
    }
}

static lp_status check(const char *operation, const void *data, size_t width, const size_t *shape,
                       size_t ndim, const lp_kept *kept, const lp_exec *exec, lp_error *err)
{
    size_t bytes = width;

    if (data == NULL || shape == NULL || kept == NULL || exec == NULL)
        return lp_error_set(err, LP_ERR_ARGUMENT, "%s was given a NULL tensor", operation);
    if (width != 1 && width != 2 && width != 4 && width != 8)
        return lp_error_set(err, LP_ERR_ARGUMENT, "%s moves elements of 1, 2, 4 or 8 bytes, not %zu",
                            operation, width);
    if (ndim < 1 || ndim > LP_MAX_DIMS)
        return lp_error_set(err, LP_ERR_ARGUMENT, "%s takes tensors of 1 to %d dimensions, not %zu",
                            operation, LP_MAX_DIMS, ndim);
    for (size_t d = 0; d < ndim; d++) {
        if (shape[d] < 1)
            return lp_error_set(err, LP_ERR_ARGUMENT, "%s was given a tensor whose dimension %zu is empty",
                                operation, d);
        if (!lp_mul_size(bytes, shape[d], &bytes) || bytes > SIZE_MAX / 2)
            return lp_error_set(err, LP_ERR_OVERFLOW, "%s was given a tensor that fits no memory", operation);
        if (kept[d].position == NULL)
            continue;
        if (kept[d].count < 1)
            return lp_error_set(err, LP_ERR_ARGUMENT,
                                "%s would leave dimension %zu empty: keep at least one position", operation,
                                d);
        for (size_t i = 0; i < kept[d].count; i++)
            if (kept[d].position[i] < 0 || (uint64_t)kept[d].position[i] >= shape[d] ||
                (i > 0 && kept[d].position[i] <= kept[d].position[i - 1]))
                return lp_error_set(
                    err, LP_ERR_ARGUMENT,
                    "%s needs strictly increasing positions below %zu in dimension %zu, not %lld at %zu",
                    operation, shape[d], d, (long long)kept[d].position[i], i);
    }
    return LP_OK;
}

static size_t count_runs(const dimension *d)
{
    size_t runs = 1;

    for (size_t i = 1; i < d->count; i++)
        runs += d->position[i] != d->position[i - 1] + 1;
    return runs;
}

static lp_status make_runs(plan *p, const dimension *d, size_t unit, size_t runs,
                           const lp_allocator *allocator, lp_error *err)
{
    run *list;

    p->index_bytes = runs * sizeof *list; /* runs is at most one for every two positions */
    list = p->index = allocator->resize(allocator->ctx, NULL, 0, p->index_bytes);
    if (list == NULL)
        return lp_error_set(err, LP_ERR_NOMEM, "out of memory: %zu bytes for the runs of a cut were refused",
                            p->index_bytes);
    p->runs = list;
    p->run_count = runs;
    for (size_t i = 0, r = 0; i < d->count; r++) {
        size_t first = i;

        while (++i < d->count && d->position[i] == d->position[i - 1] + 1)
            ;
        list[r] = (run){.first = (size_t)d->position[first] * unit, .length = (i - first) * unit};
    }
    return LP_OK;
}

/* The selection of `repeat` rows of dimension d, side by side. */
static lp_status make_selection(plan *p, const dimension *d, size_t repeat, const lp_allocator *allocator,
                                lp_error *err)
{
    lp_selection *s = &p->selection;
    size_t size = d->size * repeat, count = d->count * repeat, blocks = size / 8 + 1;
    size_t position_bytes = repeat > 1 ? count * sizeof(int64_t) : 0;
    unsigned char *block;
    uint8_t *bits, *lanes;
    int64_t *position;
    size_t fill = 0;

    p->index_bytes = position_bytes + blocks * 9 + 16;
    block = p->index = allocator->resize(allocator->ctx, NULL, 0, p->index_bytes);
    if (block == NULL)
        return lp_error_set(err, LP_ERR_NOMEM, "out of memory: %zu bytes for the masks of a cut were refused",
                            p->index_bytes);
    memset(block, 0, p->index_bytes);
    position = (int64_t *)(void *)block;
    bits = block + position_bytes;
    lanes = bits + blocks + 8;
    *s = (lp_selection){.size = size, .count = count, .position = d->position, .bits = bits, .lanes = lanes};
    for (size_t r = 0, k = 0; r < repeat; r++) {
        for (size_t i = 0; i < d->count; i++, k++) {
            size_t at = r * d->size + (size_t)d->position[i];

            if (k > 0 && bits[at / 8] == 0)
                fill = 0;
            bits[at / 8] = (uint8_t)(bits[at / 8] | 1u << at % 8);
            lanes[at / 8 * 8 + fill++] = (uint8_t)(at % 8);
            if (at < size / 8 * 8)
                s->tail = k + 1;
            if (repeat > 1)
                position[k] = (int64_t)at;
        }
    }
    if (repeat > 1)
        s->position = position;
    return LP_OK;
}

static unsigned log2_width(size_t width)
{
    return width == 1 ? 0u : width == 2 ? 1u : width == 4 ? 2u : 3u;
}

/* Bring the cut to its canonical form.  `whole` is set, and nothing allocated, when everything stays. */
static lp_status make_plan(plan *p, const lp_pack *pack, size_t width, const size_t *shape, size_t ndim,
                           const lp_kept *kept, const lp_allocator *allocator, bool *whole, lp_error *err)
{
    size_t unit = width, inner = ndim, stride;
    dimension last;
    lp_status status;

    /* What is whole at the end of the shape is one unit that never breaks. */
    while (inner > 0 && (kept[inner - 1].position == NULL || kept[inner - 1].count == shape[inner - 1]))
        unit *= shape[--inner];
    *whole = inner == 0;
    p->row_in = p->row_out = unit;
    if (*whole)
        return LP_OK;

    stride = unit;
    for (size_t d = inner; d-- > 0;) {
        bool full = kept[d].position == NULL || kept[d].count == shape[d];
        dimension *outer = p->dim + (LP_MAX_DIMS + 1 - p->ndim);

        if (full && p->ndim > 0 && outer[1].position == NULL) {
            outer[1].size = outer[1].count *= shape[d];
        } else {
            *outer = (dimension){.size = shape[d],
                                 .count = full ? shape[d] : kept[d].count,
                                 .stride = stride,
                                 .position = full ? NULL : kept[d].position};
            p->ndim++;
        }
        stride *= shape[d];
    }
    memmove(p->dim, p->dim + (LP_MAX_DIMS + 2 - p->ndim), p->ndim * sizeof *p->dim);

    if (unit >= COPY_UNIT) {
        size_t parts = 1;

        while (unit > COPY_SPLIT && unit % 2 == 0)
            unit /= 2, parts *= 2;
        if (parts > 1)
            p->dim[p->ndim++] = (dimension){.size = parts, .count = parts, .stride = unit, .position = NULL};
        last = (dimension){.size = 1, .count = 1, .stride = unit, .position = (const int64_t[]){0}};
        p->row_in = p->row_out = unit;
        status = make_runs(p, &last, unit, 1, allocator, err);
    } else {
        size_t runs;

        last = p->dim[--p->ndim];
        runs = count_runs(&last);
        p->row_in = last.size * unit;
        p->row_out = last.count * unit;
        if (unit > 8 || (unit & (unit - 1)) != 0 || p->row_out / runs >= pack->run_bytes) {
            status = make_runs(p, &last, unit, runs, allocator, err);
        } else {
            dimension *above = p->ndim > 0 ? &p->dim[p->ndim - 1] : NULL;
            size_t repeat = 1;

            if (above != NULL && above->position == NULL && last.size < ROW_ELEMENTS) {
                for (size_t r = ROW_ELEMENTS / last.size; r > 1 && repeat == 1; r--)
                    if (above->size % r == 0)
                        repeat = r;
                above->size = above->count /= repeat;
                above->stride *= repeat;
                p->row_in *= repeat;
                p->row_out *= repeat;
            }
            p->pack = pack->row[log2_width(unit)];
            status = make_selection(p, &last, repeat, allocator, err);
        }
    }
    p->tuples = 1;
    for (size_t k = 0; k < p->ndim; k++)
        p->tuples *= p->dim[k].count;
    return status;
}

static lp_status execute(plan *p, const lp_exec *exec, lp_error *err)
{
    size_t bytes = p->tuples * p->row_out, stage = 0;
    int workers = 1;

    if (bytes >= THREAD_BYTES && p->row_out <= ROW_BYTES_MAX) {
        p->chunk = p->row_out < CHUNK_BYTES ? CHUNK_BYTES / p->row_out : 1;
        workers = lp_workers_count(exec->threads, (p->tuples + p->chunk - 1) / p->chunk);
    }
    if (workers == 1) {
        walk(p, 0, p->tuples, p->target, p->target + bytes);
        return LP_OK;
    }
    if (p->in_place) {
        /* Spare bytes let every store but the tuple's last be a whole vector. */
        p->stage_each = p->chunk * p->row_out + 64;
        stage = p->stage_each * (size_t)workers;
        p->stage = exec->allocator.resize(exec->allocator.ctx, NULL, 0, stage);
        if (p->stage == NULL)
            return lp_error_set(err, LP_ERR_NOMEM,
                                "out of memory: %zu bytes to compact in place were refused", stage);
    }
    lp_lock_init(&p->lock);
    lp_condition_init(&p->turn);
    lp_workers_run(workers, walk_chunks, p);
    lp_condition_free(&p->turn);
    lp_lock_free(&p->lock);
    if (p->stage != NULL)
        (void)exec->allocator.resize(exec->allocator.ctx, p->stage, stage, 0);
    return LP_OK;
}

static lp_status compact(const lp_pack *pack, void *target, const void *source, bool in_place, size_t width,
                         const size_t *shape, size_t ndim, const lp_kept *kept, const lp_exec *exec,
                         lp_error *err)
{
    plan p = {.copy = pack->copy, .target = target, .source = source, .in_place = in_place};
    bool whole;
    lp_status status = make_plan(&p, pack, width, shape, ndim, kept, &exec->allocator, &whole, err);

    if (status == LP_OK && whole) {
        if (!in_place)
            memcpy(target, source, p.row_out);
    } else if (status == LP_OK) {
        status = execute(&p, exec, err);
    }
    if (p.index != NULL)
        (void)exec->allocator.resize(exec->allocator.ctx, p.index, p.index_bytes, 0);
    return status;
}

lp_status lp_compact(const lp_pack *pack, void *data, size_t width, const size_t *shape, size_t ndim,
                     const lp_kept *kept, const lp_exec *exec, lp_error *err)
{
    lp_status status = check("compact", data, width, shape, ndim, kept, exec, err);

    return status == LP_OK ? compact(pack, data, data, true, width, shape, ndim, kept, exec, err) : status;
}

lp_status lp_compact_into(const lp_pack *pack, void *target, const void *source, size_t width,
                          const size_t *shape, size_t ndim, const lp_kept *kept, const lp_exec *exec,
                          lp_error *err)
{
    lp_status status =
        check("compact_into", target != NULL ? source : NULL, width, shape, ndim, kept, exec, err);

    return status == LP_OK ? compact(pack, target, source, false, width, shape, ndim, kept, exec, err)
                           : status;
}
