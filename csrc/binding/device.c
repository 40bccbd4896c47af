#include "device.h"

enum { DEVICES_MAX = 64 };

struct lp_device_registry {
    PyObject *capsule; /* keeps the extension that holds the table */
    const lp_cuda_table *table;
    lp_cuda_context *open[DEVICES_MAX];
};

const lp_cuda_table *lp_device_table(const lp_module_state *state)
{
    return state->devices->table;
}

int lp_device_load(const lp_module_state *state, const char *name, int device)
{
    PyObject *loader, *done;

    if (device >= DEVICES_MAX) {
        PyErr_Format(state->DeviceError, "%s: device cuda:%d is beyond the %d that are supported", name,
                     device, (int)DEVICES_MAX);
        return -1;
    }
    if (state->devices != NULL)
        return 0;
    loader = PyImport_ImportModule("llmprune.machine.cuda");
    if (loader == NULL)
        return -1;
    done = PyObject_CallMethod(loader, "load", "s", name);
    Py_DECREF(loader);
    if (done == NULL)
        return -1;
    Py_DECREF(done);
    if (state->devices == NULL) {
        PyErr_SetString(PyExc_SystemError, "llmprune.machine.cuda.load registered no backend");
        return -1;
    }
    return 0;
}

static lp_cuda_context *open_device(const lp_module_state *state, int device)
{
    lp_cuda_context **slot = &state->devices->open[device];
    lp_allocator allocator = lp_allocator_default();
    lp_error err = {0};

    if (*slot == NULL && state->devices->table->open(slot, device, &allocator, &err) != LP_OK)
        (void)lp_raise(state, &err);
    return *slot;
}

const lp_backend *lp_device_backend(const lp_module_state *state, lp_place *place, int threads,
                                    PyObject *scratch, lp_view *view, lp_exec *exec)
{
    lp_cuda_context *context;

    if (threads < 0) {
        PyErr_Format(PyExc_ValueError, "threads is %d; pass 0 for all processors or a positive number",
                     threads);
        return NULL;
    }
    *exec = (lp_exec){.allocator = lp_allocator_default(), .threads = threads};
    if (place->device < 0) {
        if (scratch != Py_None) {
            PyErr_SetString(PyExc_ValueError, "scratch is memory of a device; tensors on the CPU need none");
            return NULL;
        }
        return state->backend;
    }
    if (scratch != Py_None) {
        if (lp_view_adopt(view, state, place, scratch, "scratch", LP_VIEW_WRITABLE | LP_VIEW_CONTIGUOUS) < 0)
            return NULL;
        exec->scratch = view->data;
        exec->scratch_bytes = (size_t)view->numel * view->itemsize;
    }
    context = open_device(state, place->device);
    if (context == NULL)
        return NULL;
    exec->stream = (void *)place->stream;
    exec->context = context;
    return state->devices->table->operations;
}

static PyObject *register_cuda(PyObject *module, PyObject *capsule)
{
    lp_module_state *state = lp_binding_state(module);
    const lp_cuda_table *table;
    lp_error err = {0};
    lp_status status;
    int count = 0;

    if (!PyCapsule_IsValid(capsule, LP_CUDA_CAPSULE)) {
        PyErr_SetString(PyExc_TypeError, "expected the capsule of llmprune._cuda");
        return NULL;
    }
    table = PyCapsule_GetPointer(capsule, LP_CUDA_CAPSULE);
    if (table->version != LP_CUDA_VERSION || table->size != sizeof *table ||
        table->operations->version != LP_BACKEND_VERSION ||
        table->operations->size != sizeof *table->operations) {
        PyErr_SetString(state->DeviceError,
                        "llmprune._cuda is of another build than llmprune._core; install llmprune afresh");
        return NULL;
    }
    if (state->devices != NULL)
        return PyLong_FromLong(0);
    Py_BEGIN_ALLOW_THREADS
    status = table->probe(&count, &err);
    Py_END_ALLOW_THREADS
    if (status != LP_OK)
        return lp_raise(state, &err);
    state->devices = PyMem_Calloc(1, sizeof *state->devices);
    if (state->devices == NULL)
        return PyErr_NoMemory();
    state->devices->capsule = Py_NewRef(capsule);
    state->devices->table = table;
    return PyLong_FromLong(count);
}

static bool finalizing(void)
{
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing() != 0;
#else
    return _Py_IsFinalizing() != 0;
#endif
}

void lp_binding_close_devices(lp_module_state *state)
{
    /* When the process ends the driver may have gone before us, and gives everything back itself. */
    if (state->devices == NULL || finalizing())
        return;
    for (int i = 0; i < DEVICES_MAX; i++)
        state->devices->table->close(state->devices->open[i]);
    Py_DECREF(state->devices->capsule);
    PyMem_Free(state->devices);
    state->devices = NULL;
}

static PyMethodDef methods[] = {
    {"register_cuda", register_cuda, METH_O,
     "register_cuda(table, /)\n--\n\n"
     "Take the CUDA kernels of llmprune._cuda.table into use; returns how many devices there are,\n"
     "or 0 where they are in use already.\n\n"
     "Called by llmprune.machine.cuda when the first tensor on a CUDA device comes by."},
    {NULL, NULL, 0, NULL},
};

int lp_binding_add_device(PyObject *module)
{
    if (PyModule_AddFunctions(module, methods) < 0)
        return -1;
    return lp_binding_add_device_kernels(module);
}
