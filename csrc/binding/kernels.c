/* The kernels' operation table as functions of the module. Each has the same shape: adopt and check the arguments,
 * release the GIL, call the table on plain pointers, take the GIL back, hand the memory back, raise. */
#include "block.h"
#include "device.h"
#include "kept.h"

#include "kernels/cpu/cpu.h"

#include <stdlib.h>
#include <string.h>

/* --- arguments shared by several functions ----------------------------------------------------------------------- */

static int make_exec(lp_exec *exec, int threads)
{
    if (threads < 0) {
        PyErr_Format(PyExc_ValueError, "threads is %d; pass 0 for all processors or a positive number",
                     threads);
        return -1;
    }
    *exec = (lp_exec){.allocator = lp_allocator_default(), .threads = threads, .stream = NULL};
    return 0;
}

static int check_ndim(const lp_module_state *state, const lp_view *view, int ndim)
{
    if (view->ndim == ndim)
        return 0;
    PyErr_Format(state->TensorError, "%s: expected %d dimensions, got %d", view->name, ndim, view->ndim);
    return -1;
}

/* A matrix of floating-point numbers whose rows are dense: adopted, checked, and its row stride in elements. */
static int adopt_matrix(lp_view *view, const lp_module_state *state, lp_place *place, PyObject *object,
                        const char *name, lp_dtype *dtype, size_t *stride)
{
    if (lp_view_adopt(view, state, place, object, name, 0) < 0 || check_ndim(state, view, 2) < 0 ||
        lp_view_filled(state, view) < 0 || lp_view_float(state, view, dtype) < 0)
        return -1;
    if ((view->shape[1] > 1 && view->strides[1] != 1) ||
        (view->shape[0] > 1 && view->strides[0] < view->shape[1])) {
        PyErr_Format(state->TensorError, "%s: the rows are not contiguous; hand over tensor.contiguous()",
                     name);
        return -1;
    }
    *stride = (size_t)(view->shape[0] > 1 ? view->strides[0] : view->shape[1]);
    return 0;
}

/* An output of `size` float64 sums that shares no memory with the `others` views at `other`: a NumPy array, or a tensor
 * where the inputs are on a device. */
static int adopt_sums(lp_view *view, const lp_module_state *state, lp_place *place, PyObject *object,
                      const char *name, int64_t size, const char *meaning, const lp_view *other,
                      size_t others)
{
    if (place->device < 0) {
        if (lp_view_adopt_array(view, state, object, name, LP_ELEMENT_F64, 1, LP_VIEW_WRITABLE) < 0)
            return -1;
    } else if (lp_view_adopt(view, state, place, object, name, LP_VIEW_WRITABLE | LP_VIEW_CONTIGUOUS) < 0 ||
               check_ndim(state, view, 1) < 0) {
        return -1;
    } else if (view->element != LP_ELEMENT_F64) {
        PyErr_Format(state->TensorError, "%s: sums are float64, not %s", name,
                     lp_element_name(view->element));
        return -1;
    }
    if (lp_view_has_size(state, view, 0, size, meaning) < 0)
        return -1;
    for (size_t i = 0; i < others; i++)
        if (lp_view_apart(state, view, &other[i]) < 0)
            return -1;
    return 0;
}

/* --- importance -------------------------------------------------------------------------------------------------- */

static PyObject *linear_scores(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"weight", "x",          "dy",      "samples", "order",  "row",
                            "col",    "transposed", "threads", "scratch", "stream", NULL};
    enum { WEIGHT, X, DY, ROW, COL, SCRATCH, VIEWS };
    const lp_module_state *state = lp_binding_state(module);
    PyObject *weight, *x, *dy, *row, *col, *scratch = Py_None;
    const lp_backend *backend;
    lp_view views[VIEWS] = {0};
    lp_place place = {0};
    unsigned long long stream = 0;
    Py_ssize_t samples;
    int order, transposed = 0, threads = 0;
    lp_linear linear = {0};
    lp_dtype dtype;
    lp_exec exec;
    lp_error err = {0};
    lp_status status = LP_OK;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOniOO|piOK:linear_scores", names, &weight, &x, &dy,
                                     &samples, &order, &row, &col, &transposed, &threads, &scratch, &stream))
        return NULL;
    place.stream = (uintptr_t)stream;
    if (order != 1 && order != 2) {
        PyErr_Format(PyExc_ValueError, "order is %d; first (1) and second (2) order are known", order);
        return NULL;
    }
    if (adopt_matrix(&views[WEIGHT], state, &place, weight, "weight", &linear.dtype, &linear.weight_stride) <
            0 ||
        adopt_matrix(&views[X], state, &place, x, "x", &dtype, &linear.x_stride) < 0 ||
        adopt_matrix(&views[DY], state, &place, dy, "dy", &dtype, &linear.dy_stride) < 0 ||
        lp_view_same_element(state, &views[WEIGHT], &views[X]) < 0 ||
        lp_view_same_element(state, &views[WEIGHT], &views[DY]) < 0)
        goto done;
    linear.transposed = transposed != 0;
    linear.out = (size_t)views[WEIGHT].shape[linear.transposed ? 1 : 0];
    linear.in = (size_t)views[WEIGHT].shape[linear.transposed ? 0 : 1];
    if (lp_view_has_size(state, &views[X], 1, (int64_t)linear.in, "input features of weight") < 0 ||
        lp_view_has_size(state, &views[DY], 1, (int64_t)linear.out, "output features of weight") < 0 ||
        lp_view_has_size(state, &views[DY], 0, views[X].shape[0], "tokens of x") < 0)
        goto done;
    if (samples < 1 || views[X].shape[0] % samples != 0) {
        PyErr_Format(PyExc_ValueError, "samples is %zd, which does not divide the %lld tokens of x", samples,
                     (long long)views[X].shape[0]);
        goto done;
    }
    if (adopt_sums(&views[ROW], state, &place, row, "row", (int64_t)linear.out, "output features", views,
                   ROW) < 0 ||
        adopt_sums(&views[COL], state, &place, col, "col", (int64_t)linear.in, "input features", views, COL) <
            0)
        goto done;
    backend = lp_device_backend(state, &place, threads, scratch, &views[SCRATCH], &exec);
    if (backend == NULL)
        goto done;
    linear.weight = views[WEIGHT].data;
    linear.x = views[X].data;
    linear.dy = views[DY].data;
    linear.samples = (size_t)samples;
    linear.tokens = (size_t)(views[X].shape[0] / samples);
    linear.order = order;

    Py_BEGIN_ALLOW_THREADS
    status = backend->linear_scores(&linear, views[ROW].data, views[COL].data, &exec, &err);
    Py_END_ALLOW_THREADS
done:
    lp_view_release_all(views, VIEWS);
    return lp_finish(state, status, &err);
}

static PyObject *dot_columns(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"a", "b", "out", "threads", "scratch", "stream", NULL};
    enum { A, B, OUT, SCRATCH, VIEWS };
    const lp_module_state *state = lp_binding_state(module);
    PyObject *a, *b, *out, *scratch = Py_None;
    const lp_backend *backend;
    lp_view views[VIEWS] = {0};
    lp_place place = {0};
    unsigned long long stream = 0;
    int threads = 0;
    lp_dtype dtype;
    lp_exec exec;
    lp_error err = {0};
    lp_status status = LP_OK;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOO|iOK:dot_columns", names, &a, &b, &out, &threads,
                                     &scratch, &stream))
        return NULL;
    place.stream = (uintptr_t)stream;
    if (lp_view_adopt(&views[A], state, &place, a, "a", LP_VIEW_CONTIGUOUS) < 0 ||
        lp_view_adopt(&views[B], state, &place, b, "b", LP_VIEW_CONTIGUOUS) < 0 ||
        check_ndim(state, &views[A], 2) < 0 || lp_view_filled(state, &views[A]) < 0 ||
        lp_view_float(state, &views[A], &dtype) < 0 ||
        lp_view_same_element(state, &views[A], &views[B]) < 0 ||
        lp_view_same_shape(state, &views[A], &views[B]) < 0 ||
        adopt_sums(&views[OUT], state, &place, out, "out", views[A].shape[1], "columns of a", views, OUT) < 0)
        goto done;
    backend = lp_device_backend(state, &place, threads, scratch, &views[SCRATCH], &exec);
    if (backend == NULL)
        goto done;

    Py_BEGIN_ALLOW_THREADS
    status = backend->dot_columns(views[A].data, views[B].data, dtype, (size_t)views[A].shape[0],
                                  (size_t)views[A].shape[1], views[OUT].data, &exec, &err);
    Py_END_ALLOW_THREADS
done:
    lp_view_release_all(views, VIEWS);
    return lp_finish(state, status, &err);
}

static int parse_kind(const char *text, lp_score_kind *kind)
{
    static const char *const kinds[] = {
        [LP_SCORE_VECTOR] = "vector",
        [LP_SCORE_ELEMENT1] = "element1",
        [LP_SCORE_ELEMENT2] = "element2",
        [LP_SCORE_L1] = "l1",
        [LP_SCORE_L2] = "l2",
    };

    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        if (strcmp(text, kinds[i]) == 0) {
            *kind = (lp_score_kind)i;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "kind is '%.50s'; vector, element1, element2, l1 and l2 are known", text);
    return -1;
}

/* The tensor `object` beside `weight` (its gradient or squared gradient), which the kind may need or not. */
static int adopt_beside(lp_view *view, const lp_module_state *state, lp_place *place, PyObject *object,
                        const char *name, bool needed, const lp_view *weight, lp_values *values)
{
    if (object == Py_None) {
        if (!needed)
            return 0;
        PyErr_Format(state->TensorError, "%s: this kind of importance needs it and None was given", name);
        return -1;
    }
    if (lp_view_adopt(view, state, place, object, name, LP_VIEW_CONTIGUOUS) < 0 ||
        lp_view_same_shape(state, weight, view) < 0 || lp_view_float(state, view, &values->dtype) < 0)
        return -1;
    values->data = view->data;
    return 0;
}

static PyObject *tensor_scores(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"weight", "grad", "square", "kind", "outs", "threads", "scratch", "stream", NULL};
    static const char *const out_names[LP_MAX_DIMS] = {"outs[0]", "outs[1]", "outs[2]", "outs[3]",
                                                       "outs[4]", "outs[5]", "outs[6]", "outs[7]"};
    enum { WEIGHT, GRAD, SQUARE, OUTS, SCRATCH = OUTS + LP_MAX_DIMS, VIEWS };
    const lp_module_state *state = lp_binding_state(module);
    PyObject *weight, *grad, *square, *outs, *entries = NULL, *scratch = Py_None;
    const char *kind_text;
    const lp_backend *backend;
    lp_place place = {0};
    unsigned long long stream = 0;
    lp_view views[VIEWS] = {0};
    lp_values values[OUTS] = {0};
    size_t shape[LP_MAX_DIMS];
    double *sums[LP_MAX_DIMS] = {0};
    lp_score_kind kind = LP_SCORE_VECTOR;
    int threads = 0;
    lp_exec exec;
    lp_error err = {0};
    lp_status status = LP_OK;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOsO|iOK:tensor_scores", names, &weight, &grad,
                                     &square, &kind_text, &outs, &threads, &scratch, &stream) ||
        parse_kind(kind_text, &kind) < 0)
        return NULL;
    place.stream = (uintptr_t)stream;
    entries = lp_binding_items(outs, "outs must be a sequence with one array (or None) for each dimension");
    if (entries == NULL)
        return NULL;
    if (lp_view_adopt(&views[WEIGHT], state, &place, weight, "weight", LP_VIEW_CONTIGUOUS) < 0 ||
        lp_view_filled(state, &views[WEIGHT]) < 0 ||
        lp_view_float(state, &views[WEIGHT], &values[WEIGHT].dtype) < 0)
        goto done;
    values[WEIGHT].data = views[WEIGHT].data;
    if (adopt_beside(&views[GRAD], state, &place, grad, "grad", kind <= LP_SCORE_ELEMENT2, &views[WEIGHT],
                     &values[GRAD]) < 0 ||
        adopt_beside(&views[SQUARE], state, &place, square, "square", kind == LP_SCORE_ELEMENT2,
                     &views[WEIGHT], &values[SQUARE]) < 0)
        goto done;
    if (PyTuple_GET_SIZE(entries) != views[WEIGHT].ndim) {
        PyErr_Format(state->TensorError, "outs has %zd entries for the %d dimensions of weight",
                     PyTuple_GET_SIZE(entries), views[WEIGHT].ndim);
        goto done;
    }
    for (int d = 0; d < views[WEIGHT].ndim; d++) {
        PyObject *entry = PyTuple_GET_ITEM(entries, d);
        shape[d] = (size_t)views[WEIGHT].shape[d];
        if (entry == Py_None)
            continue;
        if (adopt_sums(&views[OUTS + d], state, &place, entry, out_names[d], views[WEIGHT].shape[d],
                       "that dimension's size", views, (size_t)(OUTS + d)) < 0)
            goto done;
        sums[d] = views[OUTS + d].data;
    }
    backend = lp_device_backend(state, &place, threads, scratch, &views[SCRATCH], &exec);
    if (backend == NULL)
        goto done;

    Py_BEGIN_ALLOW_THREADS
    status = backend->tensor_scores(values[WEIGHT], values[GRAD], values[SQUARE], shape,
                                    (size_t)views[WEIGHT].ndim, kind, sums, &exec, &err);
    Py_END_ALLOW_THREADS
done:
    lp_view_release_all(views, VIEWS);
    Py_DECREF(entries);
    return lp_finish(state, status, &err);
}

static PyObject *accumulate_square(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"acc", "grad", "scale", "threads", "stream", NULL};
    enum { ACC, GRAD, VIEWS };
    const lp_module_state *state = lp_binding_state(module);
    PyObject *acc, *grad;
    const lp_backend *backend;
    lp_view views[VIEWS] = {0}, no_scratch = {0};
    lp_place place = {0};
    unsigned long long stream = 0;
    lp_dtype dtype;
    lp_values values = {0};
    double scale;
    int threads = 0;
    lp_exec exec;
    lp_error err = {0};
    lp_status status = LP_OK;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOd|iK:accumulate_square", names, &acc, &grad, &scale,
                                     &threads, &stream))
        return NULL;
    place.stream = (uintptr_t)stream;
    if (lp_view_adopt(&views[ACC], state, &place, acc, "acc", LP_VIEW_WRITABLE | LP_VIEW_CONTIGUOUS) < 0 ||
        lp_view_adopt(&views[GRAD], state, &place, grad, "grad", LP_VIEW_CONTIGUOUS) < 0 ||
        lp_view_float(state, &views[ACC], &dtype) < 0 ||
        lp_view_float(state, &views[GRAD], &values.dtype) < 0 ||
        lp_view_same_shape(state, &views[ACC], &views[GRAD]) < 0 ||
        lp_view_apart(state, &views[ACC], &views[GRAD]) < 0)
        goto done;
    if (dtype != LP_F32 && dtype != LP_F64) {
        PyErr_Format(state->TensorError, "acc: squares are summed in float32 or float64, not %s",
                     lp_element_name(views[ACC].element));
        goto done;
    }
    if (views[ACC].numel == 0)
        goto done;
    values.data = views[GRAD].data;
    backend = lp_device_backend(state, &place, threads, Py_None, &no_scratch, &exec);
    if (backend == NULL)
        goto done;

    Py_BEGIN_ALLOW_THREADS
    status = backend->accumulate_square(views[ACC].data, dtype, values, scale, (size_t)views[ACC].numel,
                                        &exec, &err);
    Py_END_ALLOW_THREADS
done:
    lp_view_release_all(views, VIEWS);
    return lp_finish(state, status, &err);
}

/* --- compaction -------------------------------------------------------------------------------------------------- */

static PyObject *compact(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"tensor", "kept", "threads", NULL};
    const lp_module_state *state = lp_binding_state(module);
    PyObject *tensor, *dict, *result = NULL;
    lp_view view = {0};
    lp_kept_set set = {0};
    lp_kept kept[LP_MAX_DIMS];
    size_t shape[LP_MAX_DIMS];
    int64_t strides[LP_MAX_DIMS];
    int order[LP_MAX_DIMS], threads = 0, ndim;
    lp_exec exec;
    lp_error err = {0};
    lp_status status;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO!|i:compact", names, &tensor, &PyDict_Type, &dict,
                                     &threads) ||
        make_exec(&exec, threads) < 0)
        return NULL;
    if (lp_view_adopt(&view, state, NULL, tensor, "tensor", LP_VIEW_WRITABLE) < 0 ||
        lp_view_filled(state, &view) < 0 || lp_kept_adopt(&set, state, dict, &view, &view) < 0)
        goto done;
    if (!lp_view_dense_order(&view, order)) {
        PyErr_SetString(state->TensorError,
                        "tensor: its elements do not fill one dense block, so it cannot be compacted "
                        "in place; hand over tensor.contiguous()");
        goto done;
    }
    ndim = view.ndim;
    for (int i = 0; i < ndim; i++) {
        shape[i] = (size_t)view.shape[order[i]];
        kept[i] = set.kept[order[i]];
    }

    Py_BEGIN_ALLOW_THREADS
    status = state->backend->compact(view.data, view.itemsize, shape, (size_t)ndim, kept, &exec, &err);
    Py_END_ALLOW_THREADS
    if (status != LP_OK) {
        (void)lp_raise(state, &err);
        goto done;
    }
    for (int64_t i = ndim - 1, stride = 1; i >= 0; i--) {
        strides[order[i]] = stride;
        stride *= set.shape[order[i]];
    }
    result = lp_block_new(state, &view, set.shape, strides);
done:
    lp_view_release_all(set.views, LP_MAX_DIMS);
    lp_view_release(&view);
    return result;
}

static PyObject *compact_into(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"target", "source", "kept", "threads", "scratch", "stream", NULL};
    enum { TARGET, SOURCE, SCRATCH, VIEWS };
    const lp_module_state *state = lp_binding_state(module);
    PyObject *target, *source, *dict, *scratch = Py_None;
    const lp_backend *backend;
    lp_view views[VIEWS] = {0};
    lp_place place = {0};
    unsigned long long stream = 0;
    lp_kept_set set = {0};
    size_t shape[LP_MAX_DIMS];
    int threads = 0;
    lp_exec exec;
    lp_error err = {0};
    lp_status status = LP_OK;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOO!|iOK:compact_into", names, &target, &source,
                                     &PyDict_Type, &dict, &threads, &scratch, &stream))
        return NULL;
    place.stream = (uintptr_t)stream;
    if (lp_view_adopt(&views[TARGET], state, &place, target, "target",
                      LP_VIEW_WRITABLE | LP_VIEW_CONTIGUOUS) < 0 ||
        lp_view_adopt(&views[SOURCE], state, &place, source, "source", LP_VIEW_CONTIGUOUS) < 0 ||
        lp_view_filled(state, &views[SOURCE]) < 0 ||
        lp_view_same_element(state, &views[TARGET], &views[SOURCE]) < 0 ||
        check_ndim(state, &views[TARGET], views[SOURCE].ndim) < 0 ||
        lp_kept_adopt(&set, state, dict, &views[SOURCE], &views[TARGET]) < 0 ||
        lp_view_apart(state, &views[TARGET], &views[SOURCE]) < 0)
        goto done;
    for (int d = 0; d < views[SOURCE].ndim; d++) {
        shape[d] = (size_t)views[SOURCE].shape[d];
        if (lp_view_has_size(state, &views[TARGET], d, set.shape[d], "what is kept of source") < 0)
            goto done;
    }
    backend = lp_device_backend(state, &place, threads, scratch, &views[SCRATCH], &exec);
    if (backend == NULL)
        goto done;

    Py_BEGIN_ALLOW_THREADS
    status = backend->compact_into(views[TARGET].data, views[SOURCE].data, views[SOURCE].itemsize, shape,
                                   (size_t)views[SOURCE].ndim, set.kept, &exec, &err);
    Py_END_ALLOW_THREADS
done:
    lp_view_release_all(set.views, LP_MAX_DIMS);
    lp_view_release_all(views, VIEWS);
    return lp_finish(state, status, &err);
}

/* --- the table --------------------------------------------------------------------------------------------------- */

static PyObject *simd_level(PyObject *module, PyObject *unused)
{
    (void)unused;
    return PyUnicode_FromString(lp_binding_state(module)->backend->name);
}

/* PyCFunctionWithKeywords by way of a type that every function pointer may be cast through. */
#define WITH_KEYWORDS(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef methods[] = {
    {"linear_scores", WITH_KEYWORDS(linear_scores), METH_VARARGS | METH_KEYWORDS,
     "linear_scores(weight, x, dy, samples, order, row, col, transposed=False, threads=0, scratch=None, stream=0)\n"
     "--\n\n"
     "Add the importance of each output (row) and input (col) feature of a linear layer.\n\n"
     "weight (out, in), or (in, out) when transposed; x (samples*T, in); dy (samples*T, out): one floating-point type,\n"
     "dense rows. row (out,) and col (in,) are float64 arrays that are added to. With g_j = dy_j^T x_j of sample j,\n"
     "g = mean g_j and s = mean g_j^2, an element counts |g w| (order 1) or |g w - w s w / 2| (order 2)."},
    {"dot_columns", WITH_KEYWORDS(dot_columns), METH_VARARGS | METH_KEYWORDS,
     "dot_columns(a, b, out, threads=0, scratch=None, stream=0)\n--\n\n"
     "out[c] += sum over t of a[t, c] * b[t, c], in float64. a and b (T, C) contiguous, out (C,) float64."},
    {"tensor_scores", WITH_KEYWORDS(tensor_scores), METH_VARARGS | METH_KEYWORDS,
     "tensor_scores(weight, grad, square, kind, outs, threads=0, scratch=None, stream=0)\n--\n\n"
     "Add to outs[d][i] the importance of all elements with index i in dimension d.\n\n"
     "kind: vector (signed sum of g w), element1, element2, l1, or l2 (sum of squares). grad and square have weight's\n"
     "shape, or are None where kind does not use them. outs holds one float64 array, or None, for each dimension."},
    {"accumulate_square", WITH_KEYWORDS(accumulate_square), METH_VARARGS | METH_KEYWORDS,
     "accumulate_square(acc, grad, scale, threads=0, stream=0)\n--\n\n"
     "acc += scale * grad * grad in place; one shape, contiguous, acc float32 or float64."},
    {"compact", WITH_KEYWORDS(compact), METH_VARARGS | METH_KEYWORDS,
     "compact(tensor, kept, threads=0)\n--\n\n"
     "Keep the positions kept[d] (sorted, unique, int64) of each listed dimension d, in place.\n\n"
     "Returns a Block: the smaller tensor, which shares the tensor's memory and keeps it alive (torch.from_dlpack adopts\n"
     "it). Its elements lie at the front of that memory, dense, in the order of dimensions the tensor had in memory\n"
     "(row-major for a contiguous tensor); what lies behind them is unspecified."},
    {"compact_into", WITH_KEYWORDS(compact_into), METH_VARARGS | METH_KEYWORDS,
     "compact_into(target, source, kept, threads=0, scratch=None, stream=0)\n--\n\n"
     "The same into the contiguous tensor target of the new shape, which shares no memory with source."},
    {"simd_level", simd_level, METH_NOARGS,
     "simd_level()\n--\n\n"
     "Instruction set of the kernels: 'avx512', 'avx2', 'neon' or 'plain'. The environment variable LLMPRUNE_SIMD, read\n"
     "when the module is imported, asks for a lower one."},
    {NULL, NULL, 0, NULL},
};

int lp_binding_add_kernels(PyObject *module, lp_module_state *state)
{
    const char *wish = getenv("LLMPRUNE_SIMD");
    lp_simd level = lp_cpu_best();

    if (wish != NULL && *wish != '\0' && !lp_simd_parse(wish, &level)) {
        PyErr_Format(PyExc_ImportError, "LLMPRUNE_SIMD is '%.50s'; plain, neon, avx2 and avx512 are known",
                     wish);
        return -1;
    }
    state->backend = lp_cpu_table(level);
    if (state->backend->version != LP_BACKEND_VERSION || state->backend->size != sizeof *state->backend) {
        PyErr_SetString(PyExc_ImportError,
                        "the CPU kernels are of another build of llmprune; install it afresh");
        return -1;
    }
    return PyModule_AddFunctions(module, methods);
}
