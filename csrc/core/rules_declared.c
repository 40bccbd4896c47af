/* Rules declared from outside (llmprune/tracing/rules.py) for operations the table does not know: each dimension is written in
 * letters, and a letter is one axis wherever it stands. */
#include "rules.h"

#include <string.h>

/* Walks the declaration; a number past its end reads as -1, which no check below accepts. */
typedef struct {
    const int64_t *at, *end;
} lp_reader;

static int64_t next(lp_reader *reader)
{
    return reader->at < reader->end ? *reader->at++ : -1;
}

/* What a letter has met so far. */
typedef struct {
    int64_t size;
    lp_expr expr;
    const lp_tensor *first; /* the tensor that gave `expr`; NULL: none yet */
    int64_t effect, role;
    bool mixed;    /* lies in a weight and in an activation */
    bool returned; /* lies in an output */
} lp_letter;

typedef struct {
    lp_letter letters[LP_MAX_LETTERS];
    size_t count;
    bool aligned;
} lp_letters;

static const lp_reason effects[] = {LP_REASON_NONE,  LP_REASON_DECLARED, LP_MARK_MEAN,
                                    LP_MARK_EXTREME, LP_MARK_SOFTMAX,    LP_MARK_NORM};
static const uint32_t roles[] = {0,
                                 LP_ROLE_BATCH,
                                 LP_ROLE_CONTRACT,
                                 LP_ROLE_VALUE,
                                 LP_ROLE_GATED | LP_ROLE_LINEAR_OUT | LP_ROLE_LINEAR_IN,
                                 LP_ROLE_JOINED,
                                 LP_ROLE_ROUTED,
                                 LP_ROLE_CONTRACT | LP_ROLE_SCALE};

#define COUNT_OF(array) (sizeof(array) / sizeof((array)[0]))

static lp_status damaged(lp_error *err, size_t op)
{
    return lp_error_set(err, LP_ERR_TRACE, "the rule declared for operation %zu is malformed", op);
}

static lp_status read_letters(lp_reader *reader, lp_letters *out, size_t op, lp_error *err)
{
    int64_t count = next(reader);

    memset(out, 0, sizeof *out);
    if (count < 0 || count > LP_MAX_LETTERS)
        return damaged(err, op);
    out->count = (size_t)count;
    out->aligned = true;
    for (size_t i = 0; i < out->count; i++) {
        lp_letter *letter = &out->letters[i];
        letter->size = next(reader);
        letter->effect = next(reader);
        letter->role = next(reader);
        if (letter->size < 1 || letter->effect < 0 || (size_t)letter->effect >= COUNT_OF(effects) ||
            letter->role < 0 || (size_t)letter->role >= COUNT_OF(roles))
            return damaged(err, op);
    }
    return LP_OK;
}

/* Sizes of the terms of one dimension, and of the whole; the reader is left behind it. */
static lp_status read_dim(lp_reader *reader, const lp_letters *letters, int64_t *whole, size_t op,
                          lp_error *err)
{
    int64_t terms = next(reader);

    *whole = 0;
    if (terms < 1 || terms > LP_MAX_LETTERS)
        return damaged(err, op);
    for (int64_t t = 0; t < terms; t++) {
        int64_t factors = next(reader), size = 1;
        if (factors < 1 || factors > LP_MAX_LETTERS)
            return damaged(err, op);
        for (int64_t f = 0; f < factors; f++) {
            int64_t letter = next(reader);
            if (letter < 0 || (size_t)letter >= letters->count ||
                !lp_mul_i64(size, letters->letters[letter].size, &size))
                return damaged(err, op);
        }
        if (size > INT64_MAX - *whole)
            return damaged(err, op);
        *whole += size;
    }
    return LP_OK;
}

lp_status lp_graph_declare(lp_graph *graph, size_t op, const int64_t *code, size_t length, lp_error *err)
{
    lp_reader reader = {code, code + length};
    lp_letters letters;
    lp_op *target;
    uint32_t offset = (uint32_t)graph->code_count;

    if (op >= graph->op_count || graph->built)
        return lp_error_set(err, LP_ERR_ARGUMENT, "there is no operation %zu to declare a rule for", op);
    target = &graph->ops[op];
    LP_TRY(read_letters(&reader, &letters, op, err));
    for (int side = 0; side < 2; side++) { /* inputs, by tensor; outputs, by place */
        int64_t tensors = next(&reader);
        if (tensors < 0)
            return damaged(err, op);
        for (int64_t i = 0; i < tensors; i++) {
            int64_t id = next(&reader), ndim = next(&reader), whole;
            const lp_tensor *tensor = NULL;
            if (side == 0 && id >= 0 && (uint64_t)id < graph->tensor_count)
                tensor = &graph->tensors[id];
            else if (side == 1 && id >= 0 && (uint64_t)id < target->output_count)
                tensor = lp_op_output(graph, target, (size_t)id);
            if (tensor == NULL || ndim != tensor->ndim)
                return damaged(err, op);
            for (size_t d = 0; d < tensor->ndim; d++) {
                LP_TRY(read_dim(&reader, &letters, &whole, op, err));
                if (whole != tensor->sizes[d] && tensor->sizes[d] != 1)
                    return damaged(err, op);
            }
        }
    }
    if (reader.at != reader.end)
        return damaged(err, op);
    LP_TRY(lp_graph_append_code(graph, code, length, err));
    target->rule = lp_rule_declared;
    target->declared = offset;
    target->declared_length = (uint32_t)length;
    return LP_OK;
}

/* ---- the rule itself ---------------------------------------------------------------------------------------------- */

static lp_status bind(lp_run *run, lp_letter *letter, lp_expr expr, const lp_tensor *tensor, lp_error *err)
{
    lp_rule why;

    if (expr.len == 0)
        return LP_OK;
    if (letter->first == NULL) {
        letter->first = tensor;
        letter->expr = expr;
        return LP_OK;
    }
    letter->mixed |= letter->first->weight != tensor->weight;
    why = lp_rule_between(letter->first, tensor);
    return lp_unify_dims(run, letter->expr, expr,
                         why == LP_RULE_FORWARD && !letter->returned ? LP_RULE_BACKWARD : why, err);
}

/* Take one input dimension apart and bind its letters; the reader is at the dimension. */
static lp_status bind_dim(lp_run *run, lp_letters *letters, lp_reader *reader, const lp_tensor *tensor,
                          size_t d, lp_error *err)
{
    int64_t terms = next(reader), offsets[LP_MAX_LETTERS], at = 0;
    lp_reader ahead = *reader;
    lp_expr pieces[LP_MAX_LETTERS + 1] = {tensor->dims[d]};
    bool whole = tensor->sizes[d] > 1, aligned = true;

    for (int64_t t = 0; t < terms; t++) {
        int64_t factors = next(&ahead), size = 1;
        for (int64_t f = 0; f < factors; f++)
            size *= letters->letters[next(&ahead)].size;
        at += size;
        offsets[t] = at;
    }
    if (whole && terms > 1)
        LP_TRY(lp_axes_cut(run->axes, tensor->dims[d], offsets, (size_t)terms - 1, pieces, &aligned, err));
    for (int64_t t = 0; t < terms; t++) {
        int64_t factors = next(reader), sizes[LP_MAX_LETTERS];
        size_t ids[LP_MAX_LETTERS];
        lp_expr parts[LP_MAX_LETTERS];
        for (int64_t f = 0; f < factors; f++) {
            ids[f] = (size_t)next(reader);
            sizes[f] = letters->letters[ids[f]].size;
        }
        parts[0] = pieces[t];
        if (whole && aligned && factors > 1)
            LP_TRY(lp_axes_split(run->axes, pieces[t], sizes, (size_t)factors, parts, &aligned, err));
        for (int64_t f = 0; whole && aligned && f < factors; f++)
            LP_TRY(bind(run, &letters->letters[ids[f]], parts[f], tensor, err));
    }
    letters->aligned &= aligned;
    return LP_OK;
}

/* An output dimension as its letters make it; the reader is at the dimension. */
static lp_status make_dim(lp_run *run, const lp_letters *letters, lp_reader *reader, lp_expr *out,
                          lp_error *err)
{
    int64_t terms = next(reader);
    lp_expr pieces[LP_MAX_LETTERS];

    for (int64_t t = 0; t < terms; t++) {
        int64_t factors = next(reader);
        pieces[t] = LP_EMPTY;
        for (int64_t f = 0; f < factors; f++)
            LP_TRY(
                lp_axes_concat(run->axes, pieces[t], letters->letters[next(reader)].expr, &pieces[t], err));
    }
    *out = pieces[0];
    return terms == 1 ? LP_OK : lp_axes_sum(run->axes, pieces, (size_t)terms, out, err);
}

static void skip_dim(lp_reader *reader)
{
    for (int64_t terms = next(reader); terms > 0; terms--)
        reader->at += next(reader);
}

/* Which letters lie in outputs: contracted ones do not. */
static void find_returned(lp_letters *letters, lp_reader reader)
{
    for (int64_t side = 0; side < 2; side++)
        for (int64_t tensors = next(&reader); tensors > 0; tensors--) {
            (void)next(&reader);
            for (int64_t ndim = next(&reader); ndim > 0; ndim--)
                for (int64_t terms = next(&reader); terms > 0; terms--)
                    for (int64_t factors = next(&reader); factors > 0; factors--) {
                        int64_t letter = next(&reader);
                        letters->letters[letter].returned |= side == 1;
                    }
        }
}

/* Freeze and mark what the declaration says, give a letter that only outputs have its axis, and note what it is. */
static lp_status apply_effects(lp_run *run, lp_letters *letters, lp_error *err)
{
    bool contracts = false;

    for (size_t i = 0; i < letters->count; i++)
        contracts |= letters->letters[i].mixed && !letters->letters[i].returned;
    for (size_t i = 0; i < letters->count; i++) {
        lp_letter *letter = &letters->letters[i];
        lp_reason reason = effects[letter->effect];
        if (letter->first == NULL) {
            LP_TRY(lp_axes_fresh(run->axes, letter->size, &letter->expr, err));
            reason = LP_REASON_FIXED;
        }
        if (reason != LP_REASON_NONE)
            LP_TRY(lp_axes_note(run->axes, letter->expr, reason, err));
        LP_TRY(lp_axes_role(run->axes, letter->expr, roles[letter->role], err));
        if (letter->mixed && !letter->returned)
            LP_TRY(lp_axes_role(run->axes, letter->expr, LP_ROLE_LINEAR_IN, err));
        else if (contracts && letter->returned && letter->first != NULL && letter->first->weight)
            LP_TRY(lp_axes_role(run->axes, letter->expr, LP_ROLE_LINEAR_OUT, err));
    }
    return LP_OK;
}

/* The marked letters' places, for the masked reference; the reader is at the dimension. */
static lp_status mark_dim(lp_run *run, const lp_op *op, const lp_letters *letters, lp_reader *reader,
                          const lp_tensor *tensor, size_t d, lp_error *err)
{
    bool found = false;

    for (int64_t terms = next(reader); terms > 0; terms--)
        for (int64_t factors = next(reader); factors > 0; factors--)
            found |= effects[letters->letters[next(reader)].effect] >= LP_REASON_MARK_BASE;
    return found && tensor->sizes[d] > 1 ? lp_add_marked(run, op, tensor, d, err) : LP_OK;
}

lp_status lp_rule_declared(lp_run *run, const lp_op *op, lp_error *err)
{
    lp_graph *graph = run->graph;
    const int64_t *code = graph->code + op->declared;
    lp_reader reader = {code, code + op->declared_length}, inputs;
    lp_letters letters;

    LP_TRY(read_letters(&reader, &letters, op->index, err));
    find_returned(&letters, reader);
    inputs = reader;
    for (int64_t tensors = next(&reader); tensors > 0; tensors--) {
        const lp_tensor *tensor = &graph->tensors[next(&reader)];
        (void)next(&reader);
        for (size_t d = 0; d < tensor->ndim; d++)
            LP_TRY(bind_dim(run, &letters, &reader, tensor, d, err));
    }
    if (!letters.aligned)
        return lp_freeze_op(run, op, LP_REASON_MISALIGNED, err);
    LP_TRY(apply_effects(run, &letters, err));
    for (int64_t tensors = next(&inputs); tensors > 0; tensors--) {
        const lp_tensor *tensor = &graph->tensors[next(&inputs)];
        (void)next(&inputs);
        for (size_t d = 0; d < tensor->ndim; d++)
            LP_TRY(mark_dim(run, op, &letters, &inputs, tensor, d, err));
    }
    for (int64_t tensors = next(&reader); tensors > 0; tensors--) {
        size_t place = (size_t)next(&reader);
        const lp_tensor *out = lp_op_output(graph, op, place);
        lp_expr dims[LP_MAX_DIMS] = {{0, 0}};
        (void)next(&reader);
        for (size_t d = 0; d < out->ndim; d++) {
            if (out->sizes[d] == 1)
                skip_dim(&reader);
            else
                LP_TRY(make_dim(run, &letters, &reader, &dims[d], err));
        }
        LP_TRY(lp_set_output(run, op, place, dims, err));
    }
    return LP_OK;
}
