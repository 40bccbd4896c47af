/* core/graph.h: any tape of any operations on any tensors, with declared rules.  Whatever is not refused answers every
 * question, truly. */
#include "input.h"
#include "questions.h"

#include <string.h>

enum { MOST_OPS = 16, MOST_TENSORS = 8 + 2 * MOST_OPS, MOST_CODE = 96 };

typedef struct {
    input in;
    tape t;
    size_t ndim[MOST_TENSORS];
    int64_t sizes[MOST_TENSORS][5];
} fuzzer;

static void add_tensor(fuzzer *f, bool made)
{
    static int64_t (*const makers[])(tape *, const int64_t *, size_t) = {
        tape_parameter, tape_input, tape_ids, tape_buffer, tape_constant, tape_parameter};
    static const int64_t common[] = {1, 2, 3, 4, 6, 12, 8, 24};
    uint8_t how = input_byte(&f->in);
    int64_t id = f->t.tensors;
    size_t ndim = how % 6;

    for (size_t d = 0; d < ndim; d++) {
        uint8_t size = input_byte(&f->in);
        f->sizes[id][d] = size < 192 ? common[size % 8] : size < 250 ? size % 64 : input_int(&f->in);
        if (f->sizes[id][d] < 0)
            f->sizes[id][d] = 0;
    }
    f->ndim[id] = ndim;
    if (!made)
        (void)makers[how / 6 % 6](&f->t, f->sizes[id], ndim);
    else if (how >= 224 && id > 0)
        (void)tape_view(&f->t, (int64_t)input_below(&f->in, (size_t)id), f->sizes[id], ndim);
    else
        (void)tape_value(&f->t, how / 6 % 4 == 0, f->sizes[id], ndim);
}

/* A tensor on the tape so far, or seldom none. */
static int64_t some_tensor(fuzzer *f)
{
    uint8_t byte = input_byte(&f->in);

    return byte < 250 ? (int64_t)byte % f->t.tensors : input_int(&f->in);
}

static size_t arguments(fuzzer *f, int64_t *code)
{
    size_t length = 0, count = input_below(&f->in, 8);

    for (size_t a = 0; a < count && length + 10 < MOST_CODE; a++) {
        uint8_t byte = input_byte(&f->in);
        int64_t tag = byte < 252 ? byte % 9 : input_int(&f->in);
        int64_t many = byte / 9 % 6;

        code[length++] = tag;
        if (tag == LP_ARG_TENSOR) {
            code[length++] = some_tensor(f);
        } else if (tag == LP_ARG_TENSORS || tag == LP_ARG_INTS || tag == LP_ARG_BOOLS) {
            code[length++] = byte < 250 ? many : input_int(&f->in);
            for (int64_t k = 0; k < many; k++)
                code[length++] = tag == LP_ARG_INTS    ? input_int(&f->in)
                                 : tag == LP_ARG_BOOLS ? input_byte(&f->in) & 1
                                                       : some_tensor(f);
        } else if (tag != LP_ARG_NONE && tag != LP_ARG_OTHER) {
            code[length++] = input_int(&f->in);
        }
    }
    return length;
}

static bool fair(lp_status status)
{
    return status == LP_OK || status == LP_ERR_TRACE || status == LP_ERR_ARGUMENT ||
           status == LP_ERR_OVERFLOW || status == LP_ERR_UNSUPPORTED;
}

/* An operation with up to two outputs. */
static void add_op(fuzzer *f)
{
    int64_t code[MOST_CODE], outputs[2] = {f->t.tensors, f->t.tensors + 1};
    uint8_t how = input_byte(&f->in);
    size_t rule = input_below(&f->in, 512), count = 1 + (how >> 6 & 1), length;
    const char *name = rule % 16 == 15 ? "mystery" : tape_rule_name(rule % tape_rule_count());

    length = arguments(f, code);
    for (size_t i = 0; i < count; i++)
        add_tensor(f, true);
    if (how & 128)
        outputs[0] = some_tensor(f); /* written in place, or nonsense */
    if (f->t.status == LP_OK)
        tape_call(&f->t, name, how & 7, code, length, outputs, count);
}

/* Letters for each dimension of an input and of the output, as a product of fresh ones of one size each; or nonsense. */
static void declare(fuzzer *f, size_t op)
{
    int64_t code[MOST_CODE], tensor = some_tensor(f);
    uint8_t how = input_byte(&f->in);
    size_t length = 0, places[2] = {0, (size_t)input_below(&f->in, (size_t)f->t.tensors)};
    lp_status status;

    if (how < 128 && tensor >= 0 && tensor < f->t.tensors) {
        const int64_t sizes[] = {how % 2 == 0 ? 2 : 3, how / 2 % 4 + 1, 4};
        places[0] = (size_t)tensor;
        code[length++] = 3;
        for (size_t i = 0; i < 3; i++) {
            code[length++] = sizes[i];
            code[length++] = input_byte(&f->in) % 6;
            code[length++] = input_byte(&f->in) % 8;
        }
        for (size_t side = 0; side < 2; side++) {
            code[length++] = 1;
            code[length++] = side == 0 ? tensor : 0;
            code[length++] = (int64_t)f->ndim[places[side]];
            for (size_t d = 0; d < f->ndim[places[side]] && length + 8 < MOST_CODE; d++) {
                uint8_t shape = input_byte(&f->in);
                code[length++] = 1 + (shape & 1); /* terms */
                for (int term = 0; term < 1 + (shape & 1); term++) {
                    code[length++] = 1 + (shape >> 1 & 1); /* factors */
                    for (int factor = 0; factor < 1 + (shape >> 1 & 1); factor++)
                        code[length++] = (shape >> (2 + 2 * factor)) % 3;
                }
            }
        }
    } else {
        length = input_below(&f->in, 40);
        for (size_t i = 0; i < length; i++)
            code[i] = input_int(&f->in);
    }
    status = lp_graph_declare(f->t.graph, op, code, length, &f->t.err);
    if (!fair(status))
        give_up("declare: status %d: %s", (int)status, f->t.err.message);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzzer f = {.in = {data, data + size}};
    size_t given, ops;
    lp_status status;

    tape_begin(&f.t, lp_allocator_default());
    given = 1 + input_below(&f.in, 7);
    ops = input_below(&f.in, MOST_OPS);
    for (size_t i = 0; i < given; i++)
        add_tensor(&f, false);
    for (size_t i = 0; i < ops && f.t.status == LP_OK && f.t.tensors + 2 <= MOST_TENSORS; i++)
        add_op(&f);
    if (f.t.status == LP_OK && input_byte(&f.in) < 64)
        declare(&f, input_below(&f.in, ops + 1));
    if (f.t.status == LP_OK)
        f.t.status = tape_build(&f.t, some_tensor(&f));
    if (f.t.status == LP_OK) {
        tape_ask_everything(&f.t);
        if (f.t.status != LP_OK && f.t.status != LP_ERR_OVERFLOW)
            give_up("a question: status %d: %s", (int)f.t.status, f.t.err.message);
    } else if (!fair(f.t.status) && strstr(f.t.err.message, "the rule gave dimension") == NULL) {
        /* a tape may say of an output what no forward pass would: that is told apart from a rule's bug only by the tape */
        give_up("the tape: status %d: %s", (int)f.t.status, f.t.err.message);
    }
    status = f.t.status;
    if (status != LP_OK && f.t.err.message[0] == '\0')
        give_up("a refusal without a sentence: status %d", (int)status);
    tape_end(&f.t);
    return 0;
}
