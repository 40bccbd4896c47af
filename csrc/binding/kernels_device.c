/* Operations that only a device's backend has. */
#include "device.h"
#include "kept.h"

/* One tensor of compact_many: what Python handed over, in the order of its memory. */
typedef struct {
    lp_view view;
    lp_kept_set set;
    lp_kept kept[LP_MAX_DIMS];
    size_t shape[LP_MAX_DIMS];
} cut;

static int adopt_cut(cut *c, const lp_module_state *state, lp_place *place, PyObject *tensor, PyObject *dict)
{
    int order[LP_MAX_DIMS];

    if (!PyDict_Check(dict)) {
        PyErr_Format(state->TensorError, "kept: expected a dict dimension -> positions, got %.100s",
                     Py_TYPE(dict)->tp_name);
        return -1;
    }
    if (lp_view_adopt(&c->view, state, place, tensor, "tensor", LP_VIEW_WRITABLE) < 0 ||
        lp_view_filled(state, &c->view) < 0 || lp_kept_adopt(&c->set, state, dict, &c->view, &c->view) < 0)
        return -1;
    if (!lp_view_dense_order(&c->view, order)) {
        PyErr_SetString(state->TensorError,
                        "tensor: its elements do not fill one dense block, so it cannot be compacted "
                        "in place; hand over tensor.contiguous()");
        return -1;
    }
    for (int i = 0; i < c->view.ndim; i++) {
        c->shape[i] = (size_t)c->view.shape[order[i]];
        c->kept[i] = c->set.kept[order[i]];
    }
    return 0;
}

static int adopt_all(cut *cuts, const lp_module_state *state, lp_place *place, PyObject *tensors,
                     PyObject *kept, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        if (adopt_cut(&cuts[i], state, place, PyTuple_GET_ITEM(tensors, i), PyTuple_GET_ITEM(kept, i)) < 0)
            return -1;
        for (Py_ssize_t k = 0; k < i; k++)
            if (lp_view_apart(state, &cuts[i].view, &cuts[k].view) < 0)
                return -1;
    }
    if (count > 0 && place->device < 0) {
        PyErr_SetString(state->TensorError,
                        "tensor: compact_many moves tensors on a CUDA device; on the CPU call compact");
        return -1;
    }
    return 0;
}

static void release_all(cut *cuts, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; cuts != NULL && i < count; i++) {
        lp_view_release_all(cuts[i].set.views, LP_MAX_DIMS);
        lp_view_release(&cuts[i].view);
    }
}

static PyObject *compact_many(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"tensors", "kept", "scratch", "stream", NULL};
    const lp_module_state *state = lp_binding_state(module);
    PyObject *tensors, *kept, *scratch;
    unsigned long long stream = 0;
    lp_place place = {0};
    lp_view scratch_view = {0};
    cut *cuts = NULL;
    lp_cuda_tensor *moves = NULL;
    Py_ssize_t count = 0;
    lp_exec exec;
    lp_error err = {0};
    lp_status status = LP_OK;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOO|K:compact_many", names, &tensors, &kept, &scratch,
                                     &stream))
        return NULL;
    place.stream = (uintptr_t)stream;
    tensors = PySequence_Tuple(tensors); /* adopting a tensor may run code that changes a list */
    if (tensors == NULL)
        return NULL;
    kept = PySequence_Tuple(kept);
    if (kept == NULL)
        goto done;
    if (PyTuple_GET_SIZE(tensors) != PyTuple_GET_SIZE(kept)) {
        PyErr_Format(state->TensorError, "kept has %zd entries for %zd tensors", PyTuple_GET_SIZE(kept),
                     PyTuple_GET_SIZE(tensors));
        goto done;
    }
    count = PyTuple_GET_SIZE(tensors);
    cuts = PyMem_Calloc((size_t)count + 1, sizeof *cuts);
    moves = PyMem_Calloc((size_t)count + 1, sizeof *moves);
    if (cuts == NULL || moves == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    if (adopt_all(cuts, state, &place, tensors, kept, count) < 0 || count == 0 ||
        lp_device_backend(state, &place, 0, scratch, &scratch_view, &exec) == NULL)
        goto done;
    for (Py_ssize_t i = 0; i < count; i++)
        moves[i] = (lp_cuda_tensor){.data = cuts[i].view.data,
                                    .width = cuts[i].view.itemsize,
                                    .ndim = (size_t)cuts[i].view.ndim,
                                    .shape = cuts[i].shape,
                                    .kept = cuts[i].kept};

    Py_BEGIN_ALLOW_THREADS
    status = lp_device_table(state)->compact_many(moves, (size_t)count, &exec, &err);
    Py_END_ALLOW_THREADS
done:
    release_all(cuts, count);
    lp_view_release(&scratch_view);
    PyMem_Free(cuts);
    PyMem_Free(moves);
    Py_XDECREF(kept);
    Py_DECREF(tensors);
    return lp_finish(state, status, &err);
}

static PyMethodDef methods[] = {
    {"compact_many", (PyCFunction)(void (*)(void))compact_many, METH_VARARGS | METH_KEYWORDS,
     "compact_many(tensors, kept, scratch, stream=0)\n--\n\n"
     "Keep the positions kept[i][d] of each listed dimension d of each tensors[i] on one CUDA device, in place.\n\n"
     "All move together, in a few launches on the stream. What stays then lies at the front of each tensor's memory, in the\n"
     "order of dimensions it had there. scratch is a uint8 tensor on the device; the tensors share no memory."},
    {NULL, NULL, 0, NULL},
};

int lp_binding_add_device_kernels(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
