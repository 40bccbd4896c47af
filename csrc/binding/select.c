#include "tensor.h"

#include "core/select.h"

static PyObject *rank(PyObject *module, PyObject *args)
{
    enum { SCORES, ORDER, VIEWS };
    const lp_module_state *state = lp_binding_state(module);
    PyObject *scores, *order;
    lp_view views[VIEWS] = {0};
    lp_allocator allocator = lp_allocator_default();
    lp_error err = {0};
    lp_status status = LP_OK;

    if (!PyArg_ParseTuple(args, "OO:rank", &scores, &order))
        return NULL;
    if (lp_view_adopt_array(&views[SCORES], state, scores, "scores", LP_ELEMENT_F64, 1, 0) < 0 ||
        lp_view_adopt_array(&views[ORDER], state, order, "order", LP_ELEMENT_I64, 1, LP_VIEW_WRITABLE) < 0 ||
        lp_view_has_size(state, &views[ORDER], 0, views[SCORES].numel, "one for each score") < 0 ||
        lp_view_apart(state, &views[ORDER], &views[SCORES]) < 0)
        goto done;

    Py_BEGIN_ALLOW_THREADS
    status =
        lp_select_rank(&allocator, views[SCORES].data, (size_t)views[SCORES].numel, views[ORDER].data, &err);
    Py_END_ALLOW_THREADS
done:
    lp_view_release_all(views, VIEWS);
    return lp_finish(state, status, &err);
}

static PyObject *merge(PyObject *module, PyObject *args)
{
    enum { KEYS, OFFSETS, SEQUENCE, VIEWS };
    const lp_module_state *state = lp_binding_state(module);
    PyObject *keys, *offsets, *sequence;
    lp_view views[VIEWS] = {0};
    lp_allocator allocator = lp_allocator_default();
    lp_error err = {0};
    lp_status status = LP_OK;
    int64_t axes;

    if (!PyArg_ParseTuple(args, "OOO:merge", &keys, &offsets, &sequence))
        return NULL;
    if (lp_view_adopt_array(&views[KEYS], state, keys, "keys", LP_ELEMENT_F64, 1, 0) < 0 ||
        lp_view_adopt_array(&views[OFFSETS], state, offsets, "offsets", LP_ELEMENT_I64, 1, 0) < 0 ||
        lp_view_adopt_array(&views[SEQUENCE], state, sequence, "sequence", LP_ELEMENT_I64, 1,
                            LP_VIEW_WRITABLE) < 0 ||
        lp_view_has_size(state, &views[SEQUENCE], 0, views[KEYS].numel, "one for each key") < 0 ||
        lp_view_apart(state, &views[SEQUENCE], &views[KEYS]) < 0 ||
        lp_view_apart(state, &views[SEQUENCE], &views[OFFSETS]) < 0)
        goto done;
    axes = views[OFFSETS].numel - 1;
    if (axes < 0 || ((const int64_t *)views[OFFSETS].data)[axes] != views[KEYS].numel) {
        PyErr_Format(PyExc_ValueError, "offsets must end at the number of keys, %lld",
                     (long long)views[KEYS].numel);
        goto done;
    }

    Py_BEGIN_ALLOW_THREADS
    status = lp_select_merge(&allocator, views[KEYS].data, views[OFFSETS].data, (size_t)axes,
                             views[SEQUENCE].data, &err);
    Py_END_ALLOW_THREADS
done:
    lp_view_release_all(views, VIEWS);
    return lp_finish(state, status, &err);
}

static PyMethodDef methods[] = {
    {"rank", rank, METH_VARARGS,
     "rank(scores, order, /)\n--\n\n"
     "Write into order (int64) the indices of scores (float64) by ascending score, ties by index."},
    {"merge", merge, METH_VARARGS,
     "merge(keys, offsets, sequence, /)\n--\n\n"
     "Write into sequence (int64) the axis of each removal step: axis a takes the steps\n"
     "keys[offsets[a]:offsets[a + 1]] in that order, the lowest open key goes first, ties to the lower axis."},
    {NULL, NULL, 0, NULL},
};

int lp_binding_add_select(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
