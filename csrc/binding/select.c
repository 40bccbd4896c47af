#include "binding.h"

#include "core/select.h"

/* Adopt a C-contiguous 1-D buffer of doubles ('d') or 8-byte signed integers ('i').  0, or -1 with an exception set. */
static int adopt(PyObject *object, Py_buffer *view, char kind, bool writable, const char *name)
{
    const char *format;
    bool matches;

    if (PyObject_GetBuffer(object, view, PyBUF_ND | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) < 0)
        return -1;
    format = view->format == NULL ? "B" : view->format;
    if (*format == '@' || *format == '=' || *format == '<')
        ++format;
    matches = format[0] != '\0' && format[1] == '\0' && view->itemsize == 8 &&
              (kind == 'd' ? format[0] == 'd' : format[0] == 'l' || format[0] == 'q');
    if (!matches || view->ndim != 1) {
        PyErr_Format(PyExc_ValueError, "%s must be a contiguous 1-D array of %s", name,
                     kind == 'd' ? "float64" : "int64");
        PyBuffer_Release(view);
        return -1;
    }
    return 0;
}

static PyObject *rank(PyObject *module, PyObject *args)
{
    PyObject *scores_object, *order_object, *result = NULL;
    Py_buffer scores, order;
    lp_allocator allocator = lp_allocator_default();
    lp_error err = {0};
    lp_status status;

    if (!PyArg_ParseTuple(args, "OO:rank", &scores_object, &order_object))
        return NULL;
    if (adopt(scores_object, &scores, 'd', false, "scores") < 0)
        return NULL;
    if (adopt(order_object, &order, 'i', true, "order") < 0)
        goto release_scores;
    if (order.shape[0] != scores.shape[0]) {
        PyErr_Format(PyExc_ValueError, "order has %zd entries for %zd scores", order.shape[0],
                     scores.shape[0]);
        goto release_order;
    }
    Py_BEGIN_ALLOW_THREADS
    status = lp_select_rank(&allocator, scores.buf, (size_t)scores.shape[0], order.buf, &err);
    Py_END_ALLOW_THREADS
    result = status == LP_OK ? Py_NewRef(Py_None) : lp_raise(lp_binding_state(module), &err);

release_order:
    PyBuffer_Release(&order);
release_scores:
    PyBuffer_Release(&scores);
    return result;
}

static PyObject *merge(PyObject *module, PyObject *args)
{
    PyObject *keys_object, *offsets_object, *sequence_object, *result = NULL;
    Py_buffer keys, offsets, sequence;
    lp_allocator allocator = lp_allocator_default();
    lp_error err = {0};
    lp_status status;
    Py_ssize_t axes;

    if (!PyArg_ParseTuple(args, "OOO:merge", &keys_object, &offsets_object, &sequence_object))
        return NULL;
    if (adopt(keys_object, &keys, 'd', false, "keys") < 0)
        return NULL;
    if (adopt(offsets_object, &offsets, 'i', false, "offsets") < 0)
        goto release_keys;
    if (adopt(sequence_object, &sequence, 'i', true, "sequence") < 0)
        goto release_offsets;
    axes = offsets.shape[0] - 1;
    if (axes < 0 || ((const int64_t *)offsets.buf)[axes] != keys.shape[0] ||
        sequence.shape[0] != keys.shape[0]) {
        PyErr_Format(PyExc_ValueError,
                     "offsets must end at the number of keys, %zd, which sequence must hold", keys.shape[0]);
        goto release_sequence;
    }
    Py_BEGIN_ALLOW_THREADS
    status = lp_select_merge(&allocator, keys.buf, offsets.buf, (size_t)axes, sequence.buf, &err);
    Py_END_ALLOW_THREADS
    result = status == LP_OK ? Py_NewRef(Py_None) : lp_raise(lp_binding_state(module), &err);

release_sequence:
    PyBuffer_Release(&sequence);
release_offsets:
    PyBuffer_Release(&offsets);
release_keys:
    PyBuffer_Release(&keys);
    return result;
}

static PyMethodDef methods[] = {
    {"rank", rank, METH_VARARGS,
     "rank(scores, order)\n--\n\n"
     "Write into order (int64) the indices of scores (float64) by ascending score, ties by index."},
    {"merge", merge, METH_VARARGS,
     "merge(keys, offsets, sequence)\n--\n\n"
     "Write into sequence (int64) the axis of each removal step: axis a takes the steps\n"
     "keys[offsets[a]:offsets[a + 1]] in that order, the lowest open key goes first, ties to the lower axis."},
    {NULL, NULL, 0, NULL},
};

int lp_binding_add_select(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
