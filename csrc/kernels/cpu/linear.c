/* linear_scores: the weight's rows and columns are scored block by block while dW = dY^T X passes through registers.
 *
 * Blocking.  A block of output features has its dy packed [tile][tokens][rows] into L2, a panel of input features has
 * its x packed [tokens][columns] just before use; every register tile of the block then runs over the panel, and is
 * reduced against the weight while its state is still in L1.  More tokens than a block holds are taken in several
 * passes, for which the states of a group of panels stay in L2.
 *
 * The block grid is cut into at most 16 x 4 pieces whose partial sums are added up in a fixed order at the end, so the
 * result does not depend on how many threads took pieces. */
#include "kernels/cpu/half.h"
#include "kernels/cpu/tile.h"
#include "kernels/cpu/workers.h"

#include <stdatomic.h>

enum {
    BLOCK_TOKENS = 768,     /* tokens packed at a time */
    BLOCK_DY = 768 * 192,   /* reals of packed dy: 576 KiB of floats; half, where states need the room */
    BLOCK_OUT_MAX = 384,    /* output features of a block, when there are few tokens */
    GROUP_COLUMNS = 256,    /* input features whose states are kept between passes over the tokens */
    ROW_PIECES = 16,        /* pieces of the output features, */
    COLUMN_PIECES = 4,      /* and of the input features where each still has */
    PIECE_COLUMNS_MIN = 512 /* this many */
};

/* Below this many multiply-adds a second thread costs more than it brings. */
static const double THREAD_WORK = 2e6;

typedef struct {
    const lp_tile *tile;
    const lp_linear *linear;
    size_t out, in; /* after a transposed weight has swapped the roles */
    const void *x, *dy;
    size_t x_stride, dy_stride;
    size_t sample_tokens; /* order 1 is one sample of all tokens */
    size_t sample_count;
    size_t width; /* bytes of an element */
    unsigned flags;

    size_t block_out;    /* output features of a block, a multiple of the tile's rows */
    size_t block_tokens; /* tokens of a pass: whole samples, or a part of one */
    size_t passes;
    size_t group_panels; /* panels whose states are kept at once */
    size_t out_blocks, panels;
    size_t row_pieces, column_pieces;

    unsigned char *scratch; /* of all workers */
    size_t scratch_each, x_bytes, dy_bytes, state_bytes;
    double *row_parts;    /* (column_pieces, out) */
    double *column_parts; /* (row_pieces, in) */
    atomic_size_t next;
} job;

static size_t at_most(size_t a, size_t b)
{
    return a < b ? a : b;
}

static size_t ceil_div(size_t a, size_t b)
{
    return a / b + (a % b != 0);
}

static size_t round_up(size_t a, size_t unit)
{
    return ceil_div(a, unit) * unit;
}

static size_t piece_begin(size_t total, size_t pieces, size_t index)
{
    /* total and pieces are far below the square root of SIZE_MAX: blocks and panels of an existing tensor. */
    return total / pieces * index + at_most(index, total % pieces);
}

/* The tokens of one pass. */
typedef struct {
    size_t first, tokens;
    size_t samples, each; /* each * samples == tokens */
    unsigned flags;
} span;

static span span_of(const job *j, size_t pass)
{
    size_t total = j->sample_tokens * j->sample_count, parts, part;
    span s = {.flags = j->flags};

    if (j->block_tokens >= j->sample_tokens) {
        s.first = pass * j->block_tokens;
        s.tokens = at_most(j->block_tokens, total - s.first);
        s.each = j->sample_tokens;
        s.samples = s.tokens / s.each;
        return s;
    }
    /* Passes do not cross samples. */
    parts = ceil_div(j->sample_tokens, j->block_tokens);
    part = pass % parts;
    s.first = part * j->block_tokens;
    s.each = s.tokens = at_most(j->block_tokens, j->sample_tokens - s.first);
    s.first += pass / parts * j->sample_tokens;
    s.samples = 1;
    if (part > 0)
        s.flags |= LP_TILE_CARRY_IN;
    if (part + 1 < parts)
        s.flags |= LP_TILE_CARRY_OUT;
    return s;
}

static const unsigned char *x_at(const job *j, size_t token, size_t panel)
{
    return (const unsigned char *)j->x + (token * j->x_stride + panel * j->tile->columns) * j->width;
}

static const unsigned char *weight_at(const job *j, size_t o, size_t panel)
{
    return (const unsigned char *)j->linear->weight +
           (o * j->linear->weight_stride + panel * j->tile->columns) * j->width;
}

/* Ask for the corner of the weight that a tile is about to be reduced against: its rows lie far apart in memory that is
 * read once, so nothing else would. */
static void fetch_weight(const job *j, size_t o, size_t panel, size_t columns)
{
    for (size_t r = o; r < j->out && r < o + j->tile->rows; r++)
        for (size_t byte = 0; byte < columns * j->width; byte += 64)
            __builtin_prefetch(weight_at(j, r, panel) + byte, 0, 2);
}

/* Pass `pass` of one block of output features through the states of the panels [panel_first, panel_end). */
static void run_pass(const job *j, size_t pass, size_t out_first, size_t out_count, size_t panel_first,
                     size_t panel_end, bool pack_dy, unsigned char *x, unsigned char *dy,
                     unsigned char *states)
{
    const lp_tile *tile = j->tile;
    size_t tiles = ceil_div(out_count, tile->rows), step = j->x_stride * j->width;
    span s = span_of(j, pass);

    if (pack_dy)
        tile->pack_dy(dy, (const unsigned char *)j->dy + (s.first * j->dy_stride + out_first) * j->width,
                      j->linear->dtype, j->dy_stride, s.tokens, out_count);
    for (size_t p = panel_first; p < panel_end; p++) {
        size_t count = at_most(tile->columns, j->in - p * tile->columns), line = 0;
        const unsigned char *next = NULL;

        tile->pack_x(x, x_at(j, s.first, p), j->linear->dtype, j->x_stride, s.tokens, count);
        if (p + 1 < j->panels && (p + 1 < panel_end || j->passes == 1))
            next = x_at(j, s.first, p + 1);
        else if (pass + 1 < j->passes)
            next = x_at(j, span_of(j, pass + 1).first, panel_first);
        for (size_t k = 0; k < tiles; k++, line += 64, states += j->state_bytes) {
            /* Each tile fetches one cache line of every token of the panel to come. */
            bool fetch = next != NULL && line < tile->columns * j->width;

            if (pass + 1 == j->passes)
                fetch_weight(j, out_first + k * tile->rows, p, count);
            tile->run(states, x, dy + k * tile->rows * s.tokens * tile->real, s.each, s.samples, s.flags,
                      fetch ? (uintptr_t)next + line : (uintptr_t)x, fetch ? step : 0);
        }
    }
}

/* Score one block of output features against the panels [panel_first, panel_end). */
static void run_block(const job *j, size_t block, size_t panel_first, size_t panel_end, double *rows,
                      double *columns, unsigned char *scratch)
{
    const lp_tile *tile = j->tile;
    size_t out_first = block * j->block_out, out_count = at_most(j->block_out, j->out - out_first);
    size_t tiles = ceil_div(out_count, tile->rows);
    unsigned char *x = scratch, *dy = x + j->x_bytes, *states = dy + j->dy_bytes;

    for (size_t p = panel_first; p < panel_end; p += j->group_panels) {
        size_t group_end = at_most(p + j->group_panels, panel_end);
        const unsigned char *state = states;

        memset(states, 0, (group_end - p) * tiles * j->state_bytes);
        for (size_t pass = 0; pass < j->passes; pass++)
            run_pass(j, pass, out_first, out_count, p, group_end, j->passes > 1 || p == panel_first, x, dy,
                     states);
        for (size_t q = p; q < group_end; q++) {
            size_t in_first = q * tile->columns, in_count = at_most(tile->columns, j->in - in_first);

            for (size_t k = 0; k < tiles; k++, state += j->state_bytes) {
                size_t o = out_first + k * tile->rows;

                tile->reduce(state, weight_at(j, o, q), j->linear->dtype, j->linear->weight_stride,
                             at_most(tile->rows, j->out - o), in_count, j->linear->samples, j->flags,
                             rows + o, columns + in_first);
            }
        }
    }
}

static void run_worker(void *context, int worker)
{
    job *j = context;
    unsigned char *scratch = j->scratch + (size_t)worker * j->scratch_each;

    for (;;) {
        size_t piece = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed);
        size_t r = piece / j->column_pieces, c = piece % j->column_pieces;

        if (piece >= j->row_pieces * j->column_pieces)
            return;
        for (size_t b = piece_begin(j->out_blocks, j->row_pieces, r);
             b < piece_begin(j->out_blocks, j->row_pieces, r + 1); b++)
            run_block(j, b, piece_begin(j->panels, j->column_pieces, c),
                      piece_begin(j->panels, j->column_pieces, c + 1), j->row_parts + c * j->out,
                      j->column_parts + r * j->in, scratch);
    }
}

/* Sizes follow from the shapes alone, never from the number of threads. */
static void plan_blocks(job *j)
{
    const lp_tile *tile = j->tile;
    size_t total = j->sample_tokens * j->sample_count, states;

    if (j->sample_tokens <= BLOCK_TOKENS) {
        j->block_tokens = at_most(BLOCK_TOKENS / j->sample_tokens * j->sample_tokens, total);
        j->passes = ceil_div(total, j->block_tokens);
    } else {
        size_t per_sample = ceil_div(j->sample_tokens, BLOCK_TOKENS);

        j->block_tokens = ceil_div(j->sample_tokens, per_sample);
        j->passes = ceil_div(j->sample_tokens, j->block_tokens) * j->sample_count;
    }
    j->block_out = at_most(BLOCK_DY / j->block_tokens, BLOCK_OUT_MAX) / (j->passes > 1 ? 2 : 1);
    j->block_out = j->block_out / tile->rows * tile->rows;
    j->block_out = at_most(j->block_out, round_up(j->out, tile->rows));
    j->out_blocks = ceil_div(j->out, j->block_out);
    j->panels = ceil_div(j->in, tile->columns);
    j->group_panels = j->passes > 1 ? at_most(ceil_div(GROUP_COLUMNS, tile->columns), j->panels) : 1;
    j->row_pieces = at_most(j->out_blocks, ROW_PIECES);
    j->column_pieces = at_most(ceil_div(j->in, PIECE_COLUMNS_MIN), at_most(COLUMN_PIECES, j->panels));

    j->state_bytes = 3 * tile->rows * tile->columns * tile->real;
    j->x_bytes = round_up(j->block_tokens * tile->columns * tile->real, 64);
    j->dy_bytes = round_up(j->block_tokens * j->block_out * tile->real, 64);
    states = j->block_out / tile->rows * j->group_panels;
    j->scratch_each = round_up(j->x_bytes + j->dy_bytes + states * j->state_bytes, 64);
}

static lp_status check(const lp_linear *l, const double *row, const double *col, const lp_exec *exec,
                       lp_error *err)
{
    size_t tokens, elements;

    if (l == NULL || exec == NULL || row == NULL || col == NULL || l->weight == NULL || l->x == NULL ||
        l->dy == NULL)
        return lp_error_set(err, LP_ERR_ARGUMENT, "linear_scores was given a NULL tensor");
    if (l->out < 1 || l->in < 1 || l->samples < 1 || l->tokens < 1)
        return lp_error_set(
            err, LP_ERR_ARGUMENT,
            "linear_scores needs at least one row, column, sample and token, not %zu, %zu, %zu and %zu",
            l->out, l->in, l->samples, l->tokens);
    if ((unsigned)l->dtype > LP_BF16)
        return lp_error_set(err, LP_ERR_ARGUMENT, "linear_scores does not know dtype %d", (int)l->dtype);
    if (l->order != 1 && l->order != 2)
        return lp_error_set(err, LP_ERR_ARGUMENT, "linear_scores computes order 1 or 2, not %d", l->order);
    if (l->x_stride < l->in || l->dy_stride < l->out || l->weight_stride < (l->transposed ? l->out : l->in))
        return lp_error_set(err, LP_ERR_ARGUMENT,
                            "linear_scores was given rows that overlap their neighbours");
    if (!lp_mul_size(l->samples, l->tokens, &tokens) || !lp_mul_size(tokens, l->x_stride, &elements) ||
        !lp_mul_size(elements, 8, &elements) || !lp_mul_size(tokens, l->dy_stride, &elements) ||
        !lp_mul_size(elements, 8, &elements) ||
        !lp_mul_size(l->transposed ? l->in : l->out, l->weight_stride, &elements) ||
        !lp_mul_size(elements, 8, &elements))
        return lp_error_set(err, LP_ERR_OVERFLOW, "linear_scores was given a tensor that fits no memory");
    return LP_OK;
}

lp_status lp_linear_scores(const lp_tile *single, const lp_tile *twice, const lp_linear *linear, double *row,
                           double *col, const lp_exec *exec, lp_error *err)
{
    job j = {.linear = linear};
    size_t bytes, parts, row_bytes, column_bytes;
    lp_status status = check(linear, row, col, exec, err);
    unsigned char *block;
    double *row_out = row, *col_out = col;
    int workers;

    if (status != LP_OK)
        return status;
    j.tile = linear->dtype == LP_F64 ? twice : single;
    j.out = linear->out, j.dy = linear->dy, j.dy_stride = linear->dy_stride;
    j.in = linear->in, j.x = linear->x, j.x_stride = linear->x_stride;
    if (linear->transposed) {
        /* The transposed gradient is X^T dY and importance is elementwise, so the two sides change places. */
        j.out = linear->in, j.dy = linear->x, j.dy_stride = linear->x_stride;
        j.in = linear->out, j.x = linear->dy, j.x_stride = linear->dy_stride;
        row_out = col, col_out = row;
    }
    j.sample_tokens = linear->order == 1 ? linear->samples * linear->tokens : linear->tokens;
    j.sample_count = linear->order == 1 ? 1 : linear->samples;
    j.width = lp_dtype_width(linear->dtype);
    j.flags = linear->order == 2 ? LP_TILE_SQUARE : 0;
    plan_blocks(&j);

    workers = 1;
    if ((double)(linear->samples * linear->tokens) * (double)j.out * (double)j.in >= THREAD_WORK)
        workers = lp_workers_count(exec->threads, j.row_pieces * j.column_pieces);
    if (!lp_mul_size(j.column_pieces * sizeof(double), j.out, &row_bytes) ||
        !lp_mul_size(j.row_pieces * sizeof(double), j.in, &column_bytes) ||
        !lp_add_size(row_bytes, column_bytes, &parts) ||
        !lp_mul_size((size_t)workers, j.scratch_each, &bytes) || !lp_add_size(bytes, parts, &bytes) ||
        !lp_add_size(bytes, 64, &bytes))
        return lp_error_set(err, LP_ERR_OVERFLOW, "linear_scores cannot address scratch for %zu x %zu", j.out,
                            j.in);

    block = exec->allocator.resize(exec->allocator.ctx, NULL, 0, bytes);
    if (block == NULL)
        return lp_error_set(err, LP_ERR_NOMEM,
                            "out of memory: %zu bytes of scratch for a %zu x %zu layer were refused", bytes,
                            linear->out, linear->in);
    j.scratch = block + (64 - (uintptr_t)block % 64);
    j.row_parts = (double *)(void *)(j.scratch + (size_t)workers * j.scratch_each);
    j.column_parts = j.row_parts + j.column_pieces * j.out;
    memset(j.row_parts, 0, parts);
    atomic_init(&j.next, 0);

    lp_workers_run(workers, run_worker, &j);

    for (size_t c = 0; c < j.column_pieces; c++)
        for (size_t o = 0; o < j.out; o++)
            row_out[o] += j.row_parts[c * j.out + o];
    for (size_t r = 0; r < j.row_pieces; r++)
        for (size_t i = 0; i < j.in; i++)
            col_out[i] += j.column_parts[r * j.in + i];
    (void)exec->allocator.resize(exec->allocator.ctx, block, bytes, 0);
    return LP_OK;
}
