/* The register tile, written once for every instruction set.  The including file defines
 *   TILE_NAME(x)         decorates the static functions and the table
 *   TILE_TABLE           the lp_tile to define
 *   TILE_REAL            float or double, and TILE_DTYPE the lp_dtype stored that way
 *   TILE_ROWS            output features of the tile
 *   TILE_VECTORS         vectors of TILE_LANES reals across it (input features = TILE_VECTORS * TILE_LANES)
 *   TILE_V               the vector type; V_ZERO() V_LOAD(p) V_STORE(p, v) V_SET(x) V_ADD V_SUB V_MUL V_ABS
 *   V_FMA(a, b, c)       a * b + c;  V_SUM(v) the sum of its lanes
 *   V_BF16(p) V_F16(p)   TILE_LANES 16-bit floats widened (float tiles only)
 * and may include this file again after redefining them: it undefines them all. */

#define TILE_COLUMNS (TILE_VECTORS * TILE_LANES)
#define TILE_SIZE (TILE_ROWS * TILE_COLUMNS)

/* `count` elements of any supported dtype, converted. */
static inline void TILE_NAME(convert)(TILE_REAL *target, const void *source, lp_dtype dtype, size_t count)
{
    if (dtype == TILE_DTYPE) {
        memcpy(target, source, count * sizeof *target);
        return;
    }
#ifdef V_F16
    const uint16_t *half = source;
    size_t whole = count / TILE_LANES * TILE_LANES;

    if (dtype == LP_BF16) {
        for (size_t i = 0; i < whole; i += TILE_LANES)
            V_STORE(target + i, V_BF16(half + i));
        for (size_t i = whole; i < count; i++)
            target[i] = lp_float_from_bf16(half[i]);
    } else {
        for (size_t i = 0; i < whole; i += TILE_LANES)
            V_STORE(target + i, V_F16(half + i));
        for (size_t i = whole; i < count; i++)
            target[i] = lp_float_from_f16(half[i]);
    }
#endif
}

static void TILE_NAME(pack_x)(void *target, const void *source, lp_dtype dtype, size_t stride, size_t tokens,
                              size_t columns)
{
    const char *from = source;
    TILE_REAL *to = target;
    size_t step = stride * lp_dtype_width(dtype);

    if (columns == TILE_COLUMNS) {
        /* A constant count lets the compiler turn the conversion into a few vector moves. */
        for (size_t t = 0; t < tokens; t++, from += step, to += TILE_COLUMNS)
            TILE_NAME(convert)(to, from, dtype, TILE_COLUMNS);
        return;
    }
    for (size_t t = 0; t < tokens; t++, from += step, to += TILE_COLUMNS) {
        TILE_NAME(convert)(to, from, dtype, columns);
        memset(to + columns, 0, (TILE_COLUMNS - columns) * sizeof *to);
    }
}

static void TILE_NAME(pack_dy)(void *target, const void *source, lp_dtype dtype, size_t stride, size_t tokens,
                               size_t columns)
{
    size_t width = lp_dtype_width(dtype), whole = columns / TILE_ROWS, rest = columns % TILE_ROWS;
    const char *from = source;
    TILE_REAL *to = target;

    /* Token by token, so that a line of memory is read once: the tiles are as many streams of writes. */
    for (size_t t = 0; t < tokens; t++, from += stride * width, to += TILE_ROWS) {
        const char *part = from;
        TILE_REAL *tile = to;

        for (size_t k = 0; k < whole; k++, part += TILE_ROWS * width, tile += TILE_ROWS * tokens)
            TILE_NAME(convert)(tile, part, dtype, TILE_ROWS);
        if (rest > 0) {
            TILE_NAME(convert)(tile, part, dtype, rest);
            memset(tile + rest, 0, (TILE_ROWS - rest) * sizeof *tile);
        }
    }
}

static void TILE_NAME(run)(void *state, const void *x, const void *dy, size_t tokens, size_t samples,
                           unsigned flags, uintptr_t ahead, size_t ahead_step)
{
    TILE_REAL *carry = state, *g = carry + TILE_SIZE, *s = g + TILE_SIZE;
    const TILE_REAL *in = x, *out = dy;

    for (size_t j = 0; j < samples; j++) {
        TILE_V acc[TILE_ROWS][TILE_VECTORS];

        if (flags & LP_TILE_CARRY_IN) {
            LP_UNROLL
            for (int r = 0; r < TILE_ROWS; r++)
                LP_UNROLL
            for (int v = 0; v < TILE_VECTORS; v++)
                acc[r][v] = V_LOAD(carry + r * TILE_COLUMNS + v * TILE_LANES);
        } else {
            LP_UNROLL
            for (int r = 0; r < TILE_ROWS; r++)
                LP_UNROLL
            for (int v = 0; v < TILE_VECTORS; v++)
                acc[r][v] = V_ZERO();
        }

        for (size_t t = 0; t < tokens; t++, in += TILE_COLUMNS, out += TILE_ROWS) {
            TILE_V across[TILE_VECTORS];

            __builtin_prefetch((const void *)ahead, 0, 2);
            ahead += ahead_step;
            LP_UNROLL
            for (int v = 0; v < TILE_VECTORS; v++)
                across[v] = V_LOAD(in + v * TILE_LANES);
            LP_UNROLL
            for (int r = 0; r < TILE_ROWS; r++) {
                TILE_V down = V_SET(out[r]);

                LP_UNROLL
                for (int v = 0; v < TILE_VECTORS; v++)
                    acc[r][v] = V_FMA(down, across[v], acc[r][v]);
            }
        }

        if (flags & LP_TILE_CARRY_OUT) {
            LP_UNROLL
            for (int r = 0; r < TILE_ROWS; r++)
                LP_UNROLL
            for (int v = 0; v < TILE_VECTORS; v++)
                V_STORE(carry + r * TILE_COLUMNS + v * TILE_LANES, acc[r][v]);
            continue;
        }
        LP_UNROLL
        for (int r = 0; r < TILE_ROWS; r++) {
            LP_UNROLL
            for (int v = 0; v < TILE_VECTORS; v++) {
                TILE_REAL *at = g + r * TILE_COLUMNS + v * TILE_LANES;
                V_STORE(at, V_ADD(V_LOAD(at), acc[r][v]));
            }
        }
        if (flags & LP_TILE_SQUARE) {
            LP_UNROLL
            for (int r = 0; r < TILE_ROWS; r++) {
                LP_UNROLL
                for (int v = 0; v < TILE_VECTORS; v++) {
                    TILE_REAL *at = s + r * TILE_COLUMNS + v * TILE_LANES;
                    V_STORE(at, V_FMA(acc[r][v], acc[r][v], V_LOAD(at)));
                }
            }
        }
    }
}

static void TILE_NAME(reduce)(const void *state, const void *weight, lp_dtype dtype, size_t stride,
                              size_t rows, size_t columns, size_t samples, unsigned flags, double *row,
                              double *column)
{
    const TILE_REAL *g = (const TILE_REAL *)state + TILE_SIZE, *s = g + TILE_SIZE;
    TILE_REAL mean = (TILE_REAL)(1.0 / (double)samples), padded[TILE_COLUMNS] = {0}, sums[TILE_COLUMNS];
    TILE_V down[TILE_VECTORS];
    bool direct = dtype == TILE_DTYPE && columns == TILE_COLUMNS;
    size_t width = lp_dtype_width(dtype);

    for (int v = 0; v < TILE_VECTORS; v++)
        down[v] = V_ZERO();
    for (size_t r = 0; r < rows; r++) {
        const char *from = (const char *)weight + r * stride * width;
        const TILE_REAL *w = padded;
        TILE_V across = V_ZERO();

        if (direct)
            w = (const TILE_REAL *)(const void *)from;
        else
            TILE_NAME(convert)(padded, from, dtype, columns);
        for (int v = 0; v < TILE_VECTORS; v++) {
            size_t at = r * TILE_COLUMNS + (size_t)v * TILE_LANES;
            TILE_V value = V_LOAD(w + v * TILE_LANES),
                   first = V_MUL(V_MUL(V_LOAD(g + at), V_SET(mean)), value), e;

            if (flags & LP_TILE_SQUARE) {
                TILE_V half = V_MUL(V_SET((TILE_REAL)0.5 * mean), V_LOAD(s + at));
                first = V_SUB(first, V_MUL(V_MUL(value, half), value));
            }
            e = V_ABS(first);
            across = V_ADD(across, e);
            down[v] = V_ADD(down[v], e);
        }
        row[r] += (double)V_SUM(across);
    }
    for (int v = 0; v < TILE_VECTORS; v++)
        V_STORE(sums + v * TILE_LANES, down[v]);
    for (size_t c = 0; c < columns; c++)
        column[c] += (double)sums[c];
}

const lp_tile TILE_TABLE = {
    .rows = TILE_ROWS,
    .columns = TILE_COLUMNS,
    .real = sizeof(TILE_REAL),
    .pack_x = TILE_NAME(pack_x),
    .pack_dy = TILE_NAME(pack_dy),
    .run = TILE_NAME(run),
    .reduce = TILE_NAME(reduce),
};

#undef TILE_NAME
#undef TILE_TABLE
#undef TILE_REAL
#undef TILE_DTYPE
#undef TILE_ROWS
#undef TILE_VECTORS
#undef TILE_LANES
#undef TILE_V
#undef TILE_COLUMNS
#undef TILE_SIZE
#undef V_ZERO
#undef V_LOAD
#undef V_STORE
#undef V_SET
#undef V_ADD
#undef V_SUB
#undef V_MUL
#undef V_ABS
#undef V_FMA
#undef V_SUM
#undef V_BF16
#undef V_F16
