#include "device.h"

#include <string.h>

static const struct {
    uint8_t code, bits;
    lp_element element;
} elements[] = {
    {kDLFloat, 64, LP_ELEMENT_F64},   {kDLFloat, 32, LP_ELEMENT_F32}, {kDLFloat, 16, LP_ELEMENT_F16},
    {kDLBfloat, 16, LP_ELEMENT_BF16}, {kDLInt, 8, LP_ELEMENT_I8},     {kDLUInt, 8, LP_ELEMENT_U8},
    {kDLInt, 16, LP_ELEMENT_I16},     {kDLInt, 32, LP_ELEMENT_I32},   {kDLInt, 64, LP_ELEMENT_I64},
    {kDLBool, 8, LP_ELEMENT_BOOL},
};
enum { ELEMENTS = sizeof elements / sizeof elements[0] };

DLDataType lp_element_dlpack(lp_element element)
{
    size_t i = 0;

    while (i + 1 < ELEMENTS && elements[i].element != element)
        i++;
    return (DLDataType){elements[i].code, elements[i].bits, 1};
}

static const char *device_name(long type)
{
    switch (type) {
    case kDLCPU:
        return "cpu";
    case kDLCUDA:
        return "cuda";
    case kDLCUDAHost:
        return "cuda_host";
    case kDLCUDAManaged:
        return "cuda_managed";
    case kDLROCM:
        return "rocm";
    case kDLMetal:
        return "mps";
    case kDLOneAPI:
        return "xpu";
    default:
        return "an accelerator";
    }
}

static bool on_cpu(long type)
{
    return type == kDLCPU || type == kDLCUDAHost;
}

/* --- refusals raised by the producer --------------------------------------------------------------------------- */

/* The pending exception becomes the cause of a TensorError with the sentence `format % (name, detail)`; exceptions that
 * are no refusal of this tensor (MemoryError, KeyboardInterrupt, ...) pass unchanged. */
static int refuse_because(const lp_module_state *state, const char *format, const char *name,
                          PyObject *detail)
{
    PyObject *type, *value, *trace, *sentence, *error = NULL;

    if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError))
        return -1;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (trace != NULL)
        (void)PyException_SetTraceback(value, trace);
    sentence = PyUnicode_FromFormat(format, name, detail != NULL ? detail : value);
    if (sentence != NULL)
        error = PyObject_CallOneArg(state->TensorError, sentence);
    Py_XDECREF(sentence);
    if (error != NULL) {
        PyException_SetCause(error, Py_NewRef(value));
        PyErr_SetObject(state->TensorError, error);
        Py_DECREF(error);
    }
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return -1;
}

/* An attribute's value, or NULL without an exception where it is missing or its getter raises. */
static PyObject *attribute_or_null(PyObject *object, const char *name)
{
    PyObject *value = PyObject_GetAttrString(object, name);

    if (value == NULL)
        PyErr_Clear();
    return value;
}

static int refuse_device(const lp_module_state *state, PyObject *object, const char *name)
{
    PyObject *type, *value, *trace, *device;
    int result;

    PyErr_Fetch(&type, &value, &trace);
    device = attribute_or_null(object, "device");
    PyErr_Restore(type, value, trace);
    result =
        device != NULL
            ? refuse_because(state, "%s: the tensor is on device %S; move it to the CPU first", name, device)
            : refuse_because(state, "%s: the tensor does not say which device it is on (%S)", name, NULL);
    Py_XDECREF(device);
    return result;
}

static int refuse_export(const lp_module_state *state, PyObject *object, const char *name)
{
    PyObject *type, *value, *trace, *flag;
    int grad;

    PyErr_Fetch(&type, &value, &trace);
    flag = attribute_or_null(object, "requires_grad");
    grad = flag == Py_True;
    Py_XDECREF(flag);
    PyErr_Restore(type, value, trace);
    if (grad)
        return refuse_because(state, "%s: the tensor requires gradients; hand over tensor.detach()", name,
                              NULL);
    return refuse_because(state, "%s: the tensor cannot be handed over without a copy (%S)", name, NULL);
}

/* --- asking -------------------------------------------------------------------------------------------------------- */

/* Whether a call at `place` may use memory of DLPack's device (type, index), which view->device then names. */
static int check_place(lp_view *view, const lp_module_state *state, lp_place *place, long type, long index)
{
    if (type == kDLCUDA && (index < 0 || index > INT_MAX)) {
        PyErr_Format(state->TensorError, "%s: the tensor is on the impossible device number %ld", view->name,
                     index);
        return -1;
    }
    view->device = type == kDLCUDA ? (int)index : -1;
    if (!on_cpu(type) && (type != kDLCUDA || place == NULL)) {
        PyErr_Format(state->TensorError,
                     "%s: the tensor is on device %s (DLPack type %ld); move it to the CPU first", view->name,
                     device_name(type), type);
        return -1;
    }
    if (place == NULL)
        return 0;
    if (!place->decided) {
        if (view->device >= 0 && lp_device_load(state, view->name, view->device) < 0)
            return -1;
        place->decided = true;
        place->device = view->device;
        place->name = view->name;
        return 0;
    }
    if (place->device == view->device)
        return 0;
    PyErr_Format(state->TensorError,
                 "%s: the tensor is on device %s:%d but %s is on %s:%d; all must be on one device",
                 view->name, view->device < 0 ? "cpu" : "cuda", view->device < 0 ? 0 : view->device,
                 place->name, place->device < 0 ? "cpu" : "cuda", place->device < 0 ? 0 : place->device);
    return -1;
}

static int check_device(lp_view *view, const lp_module_state *state, lp_place *place, PyObject *object,
                        const char *name)
{
    PyObject *pair;
    long type, index;

    pair = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    if (pair == NULL)
        return refuse_device(state, object, name);
    if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2) {
        Py_DECREF(pair);
        PyErr_Format(state->TensorError, "%s: __dlpack_device__ must return a (type, index) pair", name);
        return -1;
    }
    type = PyLong_AsLong(PyTuple_GET_ITEM(pair, 0));
    index = type == -1 && PyErr_Occurred() ? -1 : PyLong_AsLong(PyTuple_GET_ITEM(pair, 1));
    Py_DECREF(pair);
    if (PyErr_Occurred())
        return refuse_because(state, "%s: the tensor does not say which device it is on (%S)", name, NULL);
    return check_place(view, state, place, type, index);
}

/* object.__dlpack__(stream=S, max_version=(1, 0), copy=False), else __dlpack__(stream=S) for producers that predate DLPack
 * 1.0 and know neither keyword.  S is None on the CPU; on a device, where 0 would be ambiguous, the legacy stream is 1. */
static PyObject *export_capsule(const lp_view *view, const lp_module_state *state, const lp_place *place,
                                PyObject *object, const char *name)
{
    PyObject *method, *none = NULL, *keywords = NULL, *capsule = NULL, *stream;

    method = PyObject_GetAttrString(object, "__dlpack__");
    if (method == NULL) {
        (void)refuse_export(state, object, name);
        return NULL;
    }
    none = PyTuple_New(0);
    stream = view->device < 0 ? Py_NewRef(Py_None)
                              : PyLong_FromUnsignedLongLong(place->stream == 0 ? 1 : place->stream);
    if (stream != NULL)
        keywords = Py_BuildValue("{s:N,s:(ii),s:O}", "stream", stream, "max_version", 1, 0, "copy", Py_False);
    if (none == NULL || keywords == NULL)
        goto done;
    capsule = PyObject_Call(method, none, keywords);
    if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        if (PyDict_DelItemString(keywords, "max_version") < 0 || PyDict_DelItemString(keywords, "copy") < 0)
            goto done;
        capsule = PyObject_Call(method, none, keywords);
    }
    if (capsule == NULL)
        (void)refuse_export(state, object, name);
done:
    Py_DECREF(method);
    Py_XDECREF(none);
    Py_XDECREF(keywords);
    return capsule;
}

/* --- reading a DLTensor -------------------------------------------------------------------------------------------- */

static int read_tensor(lp_view *view, const lp_module_state *state, const DLTensor *tensor, unsigned need)
{
    const DLDataType *dtype = &tensor->dtype;
    lp_error err = {0};
    size_t i = 0;

    if (view->device < 0
            ? !on_cpu((long)tensor->device.device_type)
            : tensor->device.device_type != kDLCUDA || tensor->device.device_id != view->device) {
        PyErr_Format(state->TensorError, "%s: the capsule's tensor is on device %s; move it to %s first",
                     view->name, device_name((long)tensor->device.device_type),
                     view->device < 0 ? "the CPU" : "the device it says it is on");
        return -1;
    }
    while (i < ELEMENTS && (elements[i].code != dtype->code || elements[i].bits != dtype->bits))
        i++;
    if (i == ELEMENTS || dtype->lanes != 1) {
        PyErr_Format(state->TensorError,
                     "%s: unsupported element type (DLPack code %d, %d bits, %d lanes); convert the tensor "
                     "to float64, float32, float16, bfloat16, bool or an integer type first",
                     view->name, (int)dtype->code, (int)dtype->bits, (int)dtype->lanes);
        return -1;
    }
    if (lp_view_read(view, elements[i].element, tensor->ndim, tensor->shape, tensor->strides, tensor->data,
                     tensor->byte_offset, need, &err) != LP_OK) {
        (void)lp_raise(state, &err);
        return -1;
    }
    return 0;
}

/* The capsule's tensor, all checks passed but nothing taken over yet. */
static int read_capsule(lp_view *view, const lp_module_state *state, PyObject *capsule, unsigned need)
{
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        DLManagedTensorVersioned *managed =
            (DLManagedTensorVersioned *)PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (managed->version.major != 1) {
            PyErr_Format(state->TensorError, "%s: the producer speaks DLPack %u.%u and llmprune speaks 1.x",
                         view->name, (unsigned)managed->version.major, (unsigned)managed->version.minor);
            return -1;
        }
        if ((managed->flags & DLPACK_FLAG_BITMASK_IS_COPIED) && (need & LP_VIEW_WRITABLE)) {
            PyErr_Format(state->TensorError,
                         "%s: the producer handed over a copy, so writing to it would be lost", view->name);
            return -1;
        }
        view->readonly = (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
        view->managed = managed;
        view->owner = LP_OWNER_DLPACK;
        return read_tensor(view, state, &managed->dl_tensor, need);
    }
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        DLManagedTensor *managed = (DLManagedTensor *)PyCapsule_GetPointer(capsule, "dltensor");
        view->managed = managed;
        view->owner = LP_OWNER_DLPACK_LEGACY;
        return read_tensor(view, state, &managed->dl_tensor, need);
    }
    PyErr_Format(state->TensorError, "%s: __dlpack__ returned no DLPack capsule that is still unused",
                 view->name);
    return -1;
}

int lp_view_adopt(lp_view *view, const lp_module_state *state, lp_place *place, PyObject *object,
                  const char *name, unsigned need)
{
    PyObject *capsule = NULL;

    memset(view, 0, sizeof *view);
    view->name = name;
    view->device = -1;
    if (!PyObject_HasAttrString(object, "__dlpack__") ||
        !PyObject_HasAttrString(object, "__dlpack_device__")) {
        PyErr_Format(state->TensorError, "%s: expected a tensor (an object with __dlpack__), got %.100s",
                     name, Py_TYPE(object)->tp_name);
        return -1;
    }
    if (check_device(view, state, place, object, name) < 0)
        return -1;
    capsule = export_capsule(view, state, place, object, name);
    if (capsule == NULL)
        return -1;
    if (read_capsule(view, state, capsule, need) < 0 ||
        PyCapsule_SetName(capsule,
                          view->owner == LP_OWNER_DLPACK ? "used_dltensor_versioned" : "used_dltensor") < 0) {
        /* Still unused: the capsule's own destructor hands the memory back. */
        memset(view, 0, sizeof *view);
        Py_DECREF(capsule);
        return -1;
    }
    Py_DECREF(capsule);
    return 0;
}

/* --- NumPy arrays -------------------------------------------------------------------------------------------------- */

static bool format_is(const char *format, lp_element element)
{
    if (format == NULL)
        return false;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    if (*format == '<')
        format++;
#endif
    if (*format == '@' || *format == '=')
        format++;
    if (format[0] == '\0' || format[1] != '\0')
        return false;
    return element == LP_ELEMENT_F64 ? format[0] == 'd' : format[0] == 'l' || format[0] == 'q';
}

int lp_view_adopt_array(lp_view *view, const lp_module_state *state, PyObject *object, const char *name,
                        lp_element element, int ndim, unsigned need)
{
    int64_t shape[LP_MAX_DIMS];
    Py_buffer *buffer;
    lp_error err = {0};

    memset(view, 0, sizeof *view);
    view->name = name;
    view->device = -1;
    if (!PyObject_CheckBuffer(object)) {
        PyErr_Format(state->TensorError, "%s: expected a NumPy array of %s, got %.100s", name,
                     lp_element_name(element), Py_TYPE(object)->tp_name);
        return -1;
    }
    buffer = PyMem_Calloc(1, sizeof *buffer);
    if (buffer == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    /* Strides are asked for only to be able to say what is wrong with them. */
    if (PyObject_GetBuffer(object, buffer, PyBUF_STRIDES | PyBUF_FORMAT) < 0) {
        PyMem_Free(buffer);
        return refuse_because(state, "%s: the array cannot be used in place (%S)", name, NULL);
    }
    view->owner = LP_OWNER_BUFFER;
    view->managed = buffer;
    if (!format_is(buffer->format, element) || buffer->itemsize != (Py_ssize_t)lp_element_size(element)) {
        PyErr_Format(state->TensorError, "%s: expected an array of %s, got one of buffer format '%.20s'",
                     name, lp_element_name(element), buffer->format != NULL ? buffer->format : "B");
        goto refused;
    }
    if (buffer->ndim != ndim) {
        PyErr_Format(state->TensorError, "%s: expected an array of %d dimension%s, got %d", name, ndim,
                     ndim == 1 ? "" : "s", buffer->ndim);
        goto refused;
    }
    if (buffer->readonly && (need & LP_VIEW_WRITABLE)) {
        PyErr_Format(state->TensorError,
                     "%s: the array is read-only and would be written to; pass a writable one", name);
        goto refused;
    }
    if (!PyBuffer_IsContiguous(buffer, 'C')) {
        PyErr_Format(state->TensorError, "%s: the array is not contiguous; pass numpy.ascontiguousarray(...)",
                     name);
        goto refused;
    }
    for (int d = 0; d < ndim; d++)
        shape[d] = buffer->shape[d];
    view->readonly = buffer->readonly != 0;
    if (lp_view_read(view, element, ndim, shape, NULL, buffer->buf, 0, need, &err) != LP_OK) {
        (void)lp_raise(state, &err);
        goto refused;
    }
    return 0;
refused:
    lp_view_release(view);
    return -1;
}

void lp_view_release(lp_view *view)
{
    PyObject *type, *value, *trace;
    lp_owner owner = view->owner;

    if (owner == LP_OWNER_NONE)
        return;
    view->owner = LP_OWNER_NONE;
    PyErr_Fetch(&type, &value, &trace);
    if (owner == LP_OWNER_BUFFER) {
        PyBuffer_Release(view->managed);
        PyMem_Free(view->managed);
    } else if (owner == LP_OWNER_DLPACK) {
        DLManagedTensorVersioned *managed = (DLManagedTensorVersioned *)view->managed;
        if (managed->deleter != NULL)
            managed->deleter(managed);
    } else {
        DLManagedTensor *managed = (DLManagedTensor *)view->managed;
        if (managed->deleter != NULL)
            managed->deleter(managed);
    }
    memset(view, 0, sizeof *view);
    PyErr_Restore(type, value, trace);
}

void lp_view_release_all(lp_view *views, size_t count)
{
    for (size_t i = 0; i < count; i++)
        lp_view_release(&views[i]);
}

/* --- checks -------------------------------------------------------------------------------------------------------- */

int lp_view_filled(const lp_module_state *state, const lp_view *view)
{
    if (view->ndim > 0 && view->numel > 0)
        return 0;
    PyErr_Format(state->TensorError, "%s: the tensor %s", view->name,
                 view->ndim == 0 ? "has no dimensions" : "has no elements");
    return -1;
}

int lp_view_float(const lp_module_state *state, const lp_view *view, lp_dtype *dtype)
{
    switch (view->element) {
    case LP_ELEMENT_F32:
        *dtype = LP_F32;
        return 0;
    case LP_ELEMENT_F64:
        *dtype = LP_F64;
        return 0;
    case LP_ELEMENT_F16:
        *dtype = LP_F16;
        return 0;
    case LP_ELEMENT_BF16:
        *dtype = LP_BF16;
        return 0;
    default:
        PyErr_Format(state->TensorError, "%s: expected floating-point numbers, got %s", view->name,
                     lp_element_name(view->element));
        return -1;
    }
}

int lp_view_same_element(const lp_module_state *state, const lp_view *a, const lp_view *b)
{
    if (a->element == b->element)
        return 0;
    PyErr_Format(state->TensorError, "%s is %s but %s is %s; they must have one element type", a->name,
                 lp_element_name(a->element), b->name, lp_element_name(b->element));
    return -1;
}

int lp_view_same_shape(const lp_module_state *state, const lp_view *a, const lp_view *b)
{
    if (a->ndim != b->ndim) {
        PyErr_Format(state->TensorError, "%s has %d dimensions but %s has %d; they must have one shape",
                     a->name, a->ndim, b->name, b->ndim);
        return -1;
    }
    for (int d = 0; d < a->ndim; d++) {
        if (a->shape[d] != b->shape[d]) {
            PyErr_Format(state->TensorError, "dimension %d of %s has %lld elements but that of %s has %lld",
                         d, a->name, (long long)a->shape[d], b->name, (long long)b->shape[d]);
            return -1;
        }
    }
    return 0;
}

int lp_view_has_size(const lp_module_state *state, const lp_view *view, int dim, int64_t size,
                     const char *meaning)
{
    if (view->shape[dim] == size)
        return 0;
    PyErr_Format(state->TensorError, "%s: dimension %d has %lld elements, expected %lld (%s)", view->name,
                 dim, (long long)view->shape[dim], (long long)size, meaning);
    return -1;
}

int lp_view_apart(const lp_module_state *state, const lp_view *out, const lp_view *other)
{
    if (!lp_view_overlaps(out, other))
        return 0;
    PyErr_Format(state->TensorError, "%s shares memory with %s; an output must have memory of its own",
                 out->name, other->name);
    return -1;
}

int lp_view_positions(const lp_module_state *state, const lp_view *view, int64_t size)
{
    const int64_t *positions = (const int64_t *)view->data;

    if (view->numel == 0) {
        PyErr_Format(state->TensorError, "%s: no position is kept; at least one must stay", view->name);
        return -1;
    }
    for (int64_t i = 0; i < view->numel; i++) {
        if (positions[i] < 0 || positions[i] >= size) {
            PyErr_Format(state->TensorError, "%s: position %lld is outside 0..%lld", view->name,
                         (long long)positions[i], (long long)size - 1);
            return -1;
        }
        if (i > 0 && positions[i] <= positions[i - 1]) {
            PyErr_Format(state->TensorError,
                         "%s: position %lld follows %lld; positions must be sorted and unique", view->name,
                         (long long)positions[i], (long long)positions[i - 1]);
            return -1;
        }
    }
    return 0;
}
