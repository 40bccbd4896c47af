#include "block.h"

#include <string.h>

typedef struct {
    PyObject_HEAD
    lp_view view; /* shape and strides are those of the result; owner keeps the memory */
} BlockObject;

/* What a consumer of ours holds.  One allocation: the managed tensor, its sizes, and the Block that owns the memory. */
typedef struct {
    union {
        DLManagedTensorVersioned versioned;
        DLManagedTensor legacy;
    } managed;
    int64_t shape[LP_MAX_DIMS], strides[LP_MAX_DIMS];
    PyObject *block;
} lease;

/* A consumer may let go in any thread, without the GIL, and after the interpreter is gone: there is nothing left to
 * hand back to then, and the process takes the memory along. */
static void end_lease(lease *held)
{
    if (!Py_IsInitialized())
        return;
    PyGILState_STATE gil = PyGILState_Ensure();
    Py_DECREF(held->block);
    PyMem_Free(held);
    PyGILState_Release(gil);
}

static void delete_versioned(DLManagedTensorVersioned *managed)
{
    end_lease((lease *)managed->manager_ctx);
}

static void delete_legacy(DLManagedTensor *managed)
{
    end_lease((lease *)managed->manager_ctx);
}

/* A capsule that nobody adopted still holds its lease. */
static void drop_capsule(PyObject *capsule)
{
    PyObject *type, *value, *trace;

    PyErr_Fetch(&type, &value, &trace);
    if (PyCapsule_IsValid(capsule, "dltensor_versioned"))
        delete_versioned(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    else if (PyCapsule_IsValid(capsule, "dltensor"))
        delete_legacy(PyCapsule_GetPointer(capsule, "dltensor"));
    PyErr_Restore(type, value, trace);
}

static DLTensor describe(BlockObject *block, lease *held)
{
    const lp_view *view = &block->view;

    memcpy(held->shape, view->shape, sizeof held->shape);
    memcpy(held->strides, view->strides, sizeof held->strides);
    return (DLTensor){.data = view->data,
                      .device = {kDLCPU, 0},
                      .ndim = view->ndim,
                      .dtype = lp_element_dlpack(view->element),
                      .shape = held->shape,
                      .strides = held->strides,
                      .byte_offset = 0};
}

/* Raises BufferError, as the array API standard asks, for what a view of existing CPU memory cannot serve. */
static int check_request(PyObject *stream, PyObject *device, PyObject *copy)
{
    long type = kDLCPU, index = 0;

    if (stream != Py_None) {
        PyErr_SetString(PyExc_BufferError, "a block of CPU memory has no stream: pass stream=None");
        return -1;
    }
    if (device != Py_None && !PyArg_ParseTuple(device, "ll:dl_device", &type, &index))
        return -1;
    if (type != kDLCPU || index != 0) {
        PyErr_Format(PyExc_BufferError, "the block is in CPU memory, not on DLPack device (%ld, %ld)", type,
                     index);
        return -1;
    }
    if (copy != Py_None) {
        int wanted = PyObject_IsTrue(copy);
        if (wanted > 0)
            PyErr_SetString(PyExc_BufferError, "the block hands out its own memory: copy what you adopted");
        return wanted == 0 ? 0 : -1;
    }
    return 0;
}

/* 1 for a consumer of DLPack 1.0 or later, 0 for an older one, -1 with an exception set. */
static int wants_versioned(PyObject *max_version)
{
    long major, minor;

    if (max_version == Py_None)
        return 0;
    if (!PyTuple_Check(max_version)) {
        PyErr_SetString(PyExc_TypeError, "max_version must be a (major, minor) tuple");
        return -1;
    }
    if (!PyArg_ParseTuple(max_version, "ll:max_version", &major, &minor))
        return -1;
    return major >= 1;
}

static PyObject *block_dlpack(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    PyObject *stream = Py_None, *max_version = Py_None, *device = Py_None, *copy = Py_None, *capsule;
    BlockObject *block = (BlockObject *)self;
    lease *held;
    int versioned;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|$OOOO:__dlpack__", names, &stream, &max_version,
                                     &device, &copy) ||
        check_request(stream, device, copy) < 0 || (versioned = wants_versioned(max_version)) < 0)
        return NULL;
    held = PyMem_Calloc(1, sizeof *held);
    if (held == NULL)
        return PyErr_NoMemory();
    if (versioned)
        held->managed.versioned = (DLManagedTensorVersioned){.version = {1, 0},
                                                             .manager_ctx = held,
                                                             .deleter = delete_versioned,
                                                             .flags = 0,
                                                             .dl_tensor = describe(block, held)};
    else
        held->managed.legacy = (DLManagedTensor){
            .dl_tensor = describe(block, held), .manager_ctx = held, .deleter = delete_legacy};
    capsule = PyCapsule_New(&held->managed, versioned ? "dltensor_versioned" : "dltensor", drop_capsule);
    if (capsule == NULL) {
        PyMem_Free(held);
        return NULL;
    }
    held->block = Py_NewRef(self);
    return capsule;
}

static PyObject *block_device(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
    return Py_BuildValue("(ii)", (int)kDLCPU, 0);
}

static PyObject *block_shape(PyObject *self, void *unused)
{
    const lp_view *view = &((BlockObject *)self)->view;
    PyObject *shape = PyTuple_New(view->ndim);

    (void)unused;
    for (int d = 0; shape != NULL && d < view->ndim; d++) {
        PyObject *size = PyLong_FromLongLong(view->shape[d]);
        if (size == NULL)
            Py_CLEAR(shape);
        else
            PyTuple_SET_ITEM(shape, d, size);
    }
    return shape;
}

static int block_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static void block_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    PyObject_GC_UnTrack(self);
    lp_view_release(&((BlockObject *)self)->view);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyMethodDef block_methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))block_dlpack, METH_VARARGS | METH_KEYWORDS,
     "__dlpack__($self, /, *, stream=None, max_version=None, dl_device=None, copy=None)\n--\n\n"
     "A DLPack capsule of the block's memory, writable, never a copy."},
    {"__dlpack_device__", block_device, METH_NOARGS,
     "__dlpack_device__($self, /)\n--\n\nThe CPU's (device type, index)."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef block_fields[] = {
    {"shape", block_shape, NULL, "Sizes of the dimensions.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot block_slots[] = {
    {Py_tp_doc, "Memory that holds a result, for torch.from_dlpack and numpy.from_dlpack."},
    {Py_tp_dealloc, (void *)block_dealloc},
    {Py_tp_traverse, (void *)block_traverse},
    {Py_tp_methods, block_methods},
    {Py_tp_getset, block_fields},
    {0, NULL},
};

static PyType_Spec block_spec = {
    .name = "llmprune._core.Block",
    .basicsize = sizeof(BlockObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = block_slots,
};

PyObject *lp_block_new(const lp_module_state *state, lp_view *view, const int64_t *shape,
                       const int64_t *strides)
{
    BlockObject *block = PyObject_GC_New(BlockObject, state->block_type);

    if (block == NULL) {
        lp_view_release(view);
        return NULL;
    }
    block->view = *view;
    memset(view, 0, sizeof *view);
    block->view.numel = 1;
    for (int d = 0; d < block->view.ndim; d++) {
        block->view.shape[d] = shape[d];
        block->view.strides[d] = strides[d];
        block->view.numel *= shape[d];
    }
    PyObject_GC_Track(block);
    return (PyObject *)block;
}

int lp_binding_add_block(PyObject *module, lp_module_state *state)
{
    state->block_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &block_spec, NULL);
    if (state->block_type == NULL)
        return -1;
    return PyModule_AddType(module, state->block_type);
}
