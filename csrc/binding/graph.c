/* _core.Graph: the dependency graph for llmprune/graph.py, which gives it its Python face. */
#include "binding.h"

#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#include <numpy/arrayobject.h>

#include "core/graph.h"

typedef struct {
    PyObject_HEAD
    lp_graph *graph;
} GraphObject;

static PyObject *raise_status(PyObject *self, const lp_error *err)
{
    return lp_raise((const lp_module_state *)PyType_GetModuleState(Py_TYPE(self)), err);
}

/* ---- reading the tape ------------------------------------------------------------------------------------------------ */

typedef struct {
    int64_t *items;
    size_t count, capacity;
} IntList;

/* Read a sequence of ints into `list`, replacing what it held.  -1 with an exception set. */
static int read_ints(PyObject *object, IntList *list, const char *what)
{
    PyObject *fast = PySequence_Fast(object, what);
    Py_ssize_t length;

    if (fast == NULL)
        return -1;
    length = PySequence_Fast_GET_SIZE(fast);
    if ((size_t)length > list->capacity) {
        int64_t *grown = PyMem_Resize(list->items, int64_t, (size_t)length * 2);
        if (grown == NULL) {
            Py_DECREF(fast);
            PyErr_NoMemory();
            return -1;
        }
        list->items = grown;
        list->capacity = (size_t)length * 2;
    }
    for (Py_ssize_t i = 0; i < length; i++) {
        list->items[i] = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(fast, i));
        if (list->items[i] == -1 && PyErr_Occurred()) {
            Py_DECREF(fast);
            return -1;
        }
    }
    list->count = (size_t)length;
    Py_DECREF(fast);
    return 0;
}

static int read_role(PyObject *object, lp_tensor_role *role)
{
    static const char *const names[] = {"value", "parameter", "buffer", "input", "constant"};
    static const lp_tensor_role roles[] = {LP_TENSOR_VALUE, LP_TENSOR_PARAMETER, LP_TENSOR_BUFFER,
                                           LP_TENSOR_INPUT, LP_TENSOR_CONSTANT};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, names[i]) == 0) {
            *role = roles[i];
            return 0;
        }
    PyErr_Format(PyExc_ValueError,
                 "a tensor's role is one of value, parameter, buffer, input and constant, not %R", object);
    return -1;
}

/* [sizes, dtype class, storage, role, ...] */
static int read_tensor(PyObject *self, PyObject *entry, IntList *sizes)
{
    PyObject *fast = PySequence_Fast(entry, "a tensor of the tape is a list");
    lp_tensor_role role;
    const char *class;
    uint64_t storage;
    lp_error err = {0};
    int result = -1;

    if (fast == NULL)
        return -1;
    if (PySequence_Fast_GET_SIZE(fast) < 4) {
        PyErr_SetString(PyExc_ValueError,
                        "a tensor of the tape has sizes, dtype class, storage, role and name");
        goto done;
    }
    if (read_ints(PySequence_Fast_GET_ITEM(fast, 0), sizes, "a tensor's sizes are a list of ints") < 0)
        goto done;
    class = PyUnicode_AsUTF8(PySequence_Fast_GET_ITEM(fast, 1));
    if (class == NULL)
        goto done;
    storage = PyLong_AsUnsignedLongLongMask(PySequence_Fast_GET_ITEM(fast, 2));
    if (PyErr_Occurred() || read_role(PySequence_Fast_GET_ITEM(fast, 3), &role) < 0)
        goto done;
    if (lp_graph_add_tensor(((GraphObject *)self)->graph, sizes->items, sizes->count, role,
                            class[0] == 'i' || class[0] == 'b', storage, &err) != LP_OK)
        raise_status(self, &err);
    else
        result = 0;
done:
    Py_DECREF(fast);
    return result;
}

/* [name, flags, code, outputs, ...] */
static int read_op(PyObject *self, PyObject *entry, IntList *code, IntList *outputs)
{
    PyObject *fast = PySequence_Fast(entry, "an operation of the tape is a list");
    const char *name;
    unsigned long flags;
    lp_error err = {0};
    int result = -1;

    if (fast == NULL)
        return -1;
    if (PySequence_Fast_GET_SIZE(fast) < 4) {
        PyErr_SetString(PyExc_ValueError,
                        "an operation of the tape has name, flags, code, outputs and scope");
        goto done;
    }
    name = PyUnicode_AsUTF8(PySequence_Fast_GET_ITEM(fast, 0));
    if (name == NULL)
        goto done;
    flags = PyLong_AsUnsignedLong(PySequence_Fast_GET_ITEM(fast, 1));
    if (PyErr_Occurred() ||
        read_ints(PySequence_Fast_GET_ITEM(fast, 2), code, "an operation's code is a list of ints") < 0 ||
        read_ints(PySequence_Fast_GET_ITEM(fast, 3), outputs, "an operation's outputs are a list of ints") <
            0)
        goto done;
    if (lp_graph_add_op(((GraphObject *)self)->graph, name, (uint32_t)flags, code->items, code->count,
                        outputs->items, outputs->count, &err) != LP_OK)
        raise_status(self, &err);
    else
        result = 0;
done:
    Py_DECREF(fast);
    return result;
}

static int each(PyObject *list, const char *what, int (*read)(PyObject *, PyObject *, IntList *, IntList *),
                PyObject *self, IntList *first, IntList *second)
{
    PyObject *fast = PySequence_Fast(list, what);
    int result = 0;

    if (fast == NULL)
        return -1;
    for (Py_ssize_t i = 0; result == 0 && i < PySequence_Fast_GET_SIZE(fast); i++)
        result = read(self, PySequence_Fast_GET_ITEM(fast, i), first, second);
    Py_DECREF(fast);
    return result;
}

static int read_tensor_entry(PyObject *self, PyObject *entry, IntList *sizes, IntList *unused)
{
    (void)unused;
    return read_tensor(self, entry, sizes);
}

static PyObject *graph_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"tensors", "ops", "outputs", NULL};
    PyObject *tensors, *ops, *outputs, *self;
    IntList first = {NULL, 0, 0}, second = {NULL, 0, 0};
    lp_error err = {0};
    lp_status status;
    lp_graph *graph;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO:Graph", keywords, &tensors, &ops, &outputs))
        return NULL;
    self = type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    if (lp_graph_new(&((GraphObject *)self)->graph, lp_allocator_default(), &err) != LP_OK) {
        raise_status(self, &err);
        goto fail;
    }
    graph = ((GraphObject *)self)->graph;
    if (each(tensors, "the tape's tensors are a list", read_tensor_entry, self, &first, &second) < 0 ||
        each(ops, "the tape's operations are a list", read_op, self, &first, &second) < 0 ||
        read_ints(outputs, &first, "the tape's outputs are a list of ints") < 0)
        goto fail;
    status = lp_graph_set_outputs(graph, first.items, first.count, &err);
    if (status == LP_OK) {
        Py_BEGIN_ALLOW_THREADS
        status = lp_graph_build(graph, &err);
        Py_END_ALLOW_THREADS
    }
    if (status != LP_OK) {
        raise_status(self, &err);
        goto fail;
    }
    PyMem_Free(first.items);
    PyMem_Free(second.items);
    return self;
fail:
    PyMem_Free(first.items);
    PyMem_Free(second.items);
    Py_DECREF(self);
    return NULL;
}

static void graph_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    lp_graph_free(((GraphObject *)self)->graph);
    type->tp_free(self);
    Py_DECREF(type);
}

static int graph_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

/* ---- queries ---------------------------------------------------------------------------------------------------------- */

static lp_graph *graph_of(PyObject *self)
{
    return ((GraphObject *)self)->graph;
}

static PyObject *notes_of(const lp_graph *graph, const lp_axis *axis)
{
    PyObject *list = PyList_New(0);
    uint32_t cursor = axis->notes, op;
    lp_reason reason;

    while (list != NULL && lp_graph_note(graph, &cursor, &reason, &op)) {
        PyObject *entry =
            Py_BuildValue("(sLO)", lp_reason_text(reason), op == LP_NO_OP ? -1LL : (long long)op,
                          reason >= LP_REASON_MARK_BASE ? Py_True : Py_False);
        if (entry == NULL || PyList_Append(list, entry) < 0)
            Py_CLEAR(list);
        Py_XDECREF(entry);
    }
    return list;
}

static PyObject *members_of(const lp_graph *graph, const lp_axis *axis)
{
    PyObject *list = PyList_New((Py_ssize_t)axis->member_count);

    for (size_t m = 0; list != NULL && m < axis->member_count; m++) {
        const lp_member *member = &axis->members[m];
        int64_t start, stride;
        PyObject *entry;
        lp_graph_member_place(graph, member, &start, &stride);
        entry = Py_BuildValue("(IILL)", member->tensor, member->dim, (long long)start, (long long)stride);
        if (entry == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)m, entry);
    }
    return list;
}

static PyObject *graph_axes(PyObject *self, PyObject *unused)
{
    const lp_graph *graph = graph_of(self);
    size_t count = lp_graph_axis_count(graph);
    PyObject *list = PyList_New((Py_ssize_t)count);

    (void)unused;
    for (size_t i = 0; list != NULL && i < count; i++) {
        const lp_axis *axis = lp_graph_axis(graph, i);
        PyObject *notes = notes_of(graph, axis), *members = members_of(graph, axis), *entry = NULL;
        if (notes != NULL && members != NULL)
            entry = Py_BuildValue("(LsOOO)", (long long)axis->size, lp_kind_name(axis->kind),
                                  axis->prunable ? Py_True : Py_False, notes, members);
        Py_XDECREF(notes);
        Py_XDECREF(members);
        if (entry == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, entry);
    }
    return list;
}

static const lp_axis *axis_or_error(PyObject *self, Py_ssize_t id)
{
    const lp_axis *axis = id < 0 ? NULL : lp_graph_axis(graph_of(self), (size_t)id);
    if (axis == NULL)
        PyErr_Format(PyExc_IndexError, "axis %zd does not exist; the graph has %zu", id,
                     lp_graph_axis_count(graph_of(self)));
    return axis;
}

static PyObject *graph_positions(PyObject *self, PyObject *args)
{
    Py_ssize_t id, member;
    const lp_axis *axis;
    PyObject *array;
    npy_intp shape[2];
    size_t per_index;
    lp_error err = {0};

    if (!PyArg_ParseTuple(args, "nn:positions", &id, &member) || (axis = axis_or_error(self, id)) == NULL)
        return NULL;
    if (lp_graph_positions(graph_of(self), axis, (size_t)member, NULL, &per_index, &err) != LP_OK)
        return raise_status(self, &err);
    shape[0] = (npy_intp)axis->size;
    shape[1] = (npy_intp)per_index;
    array = PyArray_SimpleNew(2, shape, NPY_INT64);
    if (array == NULL)
        return NULL;
    if (lp_graph_positions(graph_of(self), axis, (size_t)member, PyArray_DATA((PyArrayObject *)array),
                           &per_index, &err) != LP_OK) {
        Py_DECREF(array);
        return raise_status(self, &err);
    }
    return array;
}

/* A contiguous int64 array of ndim dimensions, new reference. */
static PyArrayObject *int_array(PyObject *object, int ndim)
{
    return (PyArrayObject *)PyArray_FROMANY(object, NPY_INT64, ndim, ndim, NPY_ARRAY_IN_ARRAY);
}

/* Removed counts by axis: an int64 array with one entry for each. */
static PyArrayObject *removed_array(PyObject *self, PyObject *object)
{
    PyArrayObject *array = int_array(object, 1);
    if (array != NULL && (size_t)PyArray_SIZE(array) != lp_graph_axis_count(graph_of(self))) {
        PyErr_Format(PyExc_ValueError, "removed has %zd entries; the graph has %zu axes",
                     (Py_ssize_t)PyArray_SIZE(array), lp_graph_axis_count(graph_of(self)));
        Py_CLEAR(array);
    }
    return array;
}

static PyObject *graph_new_sizes(PyObject *self, PyObject *args)
{
    PyObject *removed_object, *dims_object, *result = NULL;
    PyArrayObject *removed = NULL, *dims = NULL;
    npy_intp count;
    lp_error err = {0};

    if (!PyArg_ParseTuple(args, "OO:new_sizes", &removed_object, &dims_object))
        return NULL;
    removed = removed_array(self, removed_object);
    dims = removed == NULL ? NULL : int_array(dims_object, 2);
    if (dims == NULL)
        goto done;
    if (PyArray_DIM(dims, 1) != 2) {
        PyErr_SetString(PyExc_ValueError, "dims is an array of (tensor, dimension) pairs");
        goto done;
    }
    count = PyArray_DIM(dims, 0);
    result = PyArray_SimpleNew(1, &count, NPY_INT64);
    for (npy_intp i = 0; result != NULL && i < count; i++) {
        const int64_t *pair = (const int64_t *)PyArray_DATA(dims) + 2 * i;
        int64_t *out = (int64_t *)PyArray_DATA((PyArrayObject *)result) + i;
        if (pair[0] < 0 || pair[1] < 0 || pair[0] > UINT32_MAX || pair[1] > UINT32_MAX) {
            PyErr_SetString(PyExc_ValueError, "dims names a negative tensor or dimension");
            Py_CLEAR(result);
        } else if (lp_graph_new_size(graph_of(self), (uint32_t)pair[0], (uint32_t)pair[1],
                                     PyArray_DATA(removed), out, &err) != LP_OK) {
            Py_CLEAR(result);
            raise_status(self, &err);
        }
    }
done:
    Py_XDECREF(removed);
    Py_XDECREF(dims);
    return result;
}

static PyObject *count_of(PyObject *self, PyObject *object,
                          lp_status (*query)(lp_graph *, const int64_t *, int64_t *, lp_error *))
{
    PyArrayObject *removed = removed_array(self, object);
    lp_error err = {0};
    lp_status status;
    int64_t count = 0;

    if (removed == NULL)
        return NULL;
    status = query(graph_of(self), PyArray_DATA(removed), &count, &err);
    Py_DECREF(removed);
    return status == LP_OK ? PyLong_FromLongLong(count) : raise_status(self, &err);
}

static PyObject *graph_numel(PyObject *self, PyObject *removed)
{
    return count_of(self, removed, lp_graph_numel);
}

static PyObject *graph_macs(PyObject *self, PyObject *removed)
{
    return count_of(self, removed, lp_graph_macs);
}

/* removed_positions(tensor, dim, size, {axis: sorted indices}) -> bool array of the positions that go */
static PyObject *graph_removed_positions(PyObject *self, PyObject *args)
{
    unsigned int tensor, dim;
    Py_ssize_t size, at = 0;
    PyObject *removed, *key, *value, *result = NULL;
    size_t axes = lp_graph_axis_count(graph_of(self));
    uint8_t **gone;
    npy_intp length;
    lp_error err = {0};

    if (!PyArg_ParseTuple(args, "IInO!:removed_positions", &tensor, &dim, &size, &PyDict_Type, &removed))
        return NULL;
    gone = PyMem_Calloc(axes + 1, sizeof *gone);
    if (gone == NULL)
        return PyErr_NoMemory();
    while (PyDict_Next(removed, &at, &key, &value)) {
        Py_ssize_t id = PyLong_AsSsize_t(key);
        const lp_axis *axis;
        PyArrayObject *indices;
        if ((id == -1 && PyErr_Occurred()) || (axis = axis_or_error(self, id)) == NULL)
            goto done;
        indices = int_array(value, 1);
        if (indices == NULL)
            goto done;
        gone[id] = PyMem_Calloc((size_t)axis->size, 1);
        if (gone[id] == NULL) {
            Py_DECREF(indices);
            PyErr_NoMemory();
            goto done;
        }
        for (npy_intp i = 0; i < PyArray_SIZE(indices); i++) {
            int64_t index = ((const int64_t *)PyArray_DATA(indices))[i];
            if (index < 0 || index >= axis->size) {
                Py_DECREF(indices);
                PyErr_Format(PyExc_IndexError, "index %lld does not exist on axis %zd of size %lld",
                             (long long)index, id, (long long)axis->size);
                goto done;
            }
            gone[id][index] = 1;
        }
        Py_DECREF(indices);
    }
    length = (npy_intp)size;
    result = PyArray_ZEROS(1, &length, NPY_BOOL, 0);
    if (result != NULL && lp_graph_mark_removed(graph_of(self), tensor, dim, (const uint8_t *const *)gone,
                                                PyArray_DATA((PyArrayObject *)result), &err) != LP_OK) {
        Py_CLEAR(result);
        raise_status(self, &err);
    }
done:
    for (size_t i = 0; i < axes; i++)
        PyMem_Free(gone[i]);
    PyMem_Free(gone);
    return result;
}

/* mark_ragged(axis, member, outer, chosen, flags): chosen (outer.size, k) int64; flags bool of the dimension's size */
static PyObject *graph_mark_ragged(PyObject *self, PyObject *args)
{
    Py_ssize_t id, member, outer_id;
    PyObject *chosen_object, *flags;
    const lp_axis *axis, *outer;
    PyArrayObject *chosen;
    lp_error err = {0};
    lp_status status;

    if (!PyArg_ParseTuple(args, "nnnOO!:mark_ragged", &id, &member, &outer_id, &chosen_object, &PyArray_Type,
                          &flags) ||
        (axis = axis_or_error(self, id)) == NULL || (outer = axis_or_error(self, outer_id)) == NULL)
        return NULL;
    if (member < 0 || (size_t)member >= axis->member_count || !PyArray_ISCARRAY((PyArrayObject *)flags) ||
        PyArray_TYPE((PyArrayObject *)flags) != NPY_BOOL) {
        PyErr_SetString(PyExc_ValueError, "mark_ragged takes a member of the axis and a writable bool array");
        return NULL;
    }
    chosen = int_array(chosen_object, 2);
    if (chosen == NULL)
        return NULL;
    if (PyArray_DIM(chosen, 0) != outer->size) {
        PyErr_Format(PyExc_ValueError, "chosen has %zd rows; the outer axis has %lld indices",
                     (Py_ssize_t)PyArray_DIM(chosen, 0), (long long)outer->size);
        Py_DECREF(chosen);
        return NULL;
    }
    for (npy_intp i = 0; i < PyArray_SIZE(chosen); i++) {
        int64_t index = ((const int64_t *)PyArray_DATA(chosen))[i];
        if (index < 0 || index >= axis->size) {
            PyErr_Format(PyExc_IndexError, "index %lld does not exist on axis %zd of size %lld",
                         (long long)index, id, (long long)axis->size);
            Py_DECREF(chosen);
            return NULL;
        }
    }
    status = lp_graph_mark_ragged(graph_of(self), axis, (size_t)member, outer, PyArray_DATA(chosen),
                                  (size_t)PyArray_DIM(chosen, 1), PyArray_DATA((PyArrayObject *)flags), &err);
    Py_DECREF(chosen);
    if (status != LP_OK)
        return raise_status(self, &err);
    Py_RETURN_NONE;
}

static PyObject *graph_dim_axes(PyObject *self, PyObject *args)
{
    unsigned int tensor, dim;
    uint32_t few[32], *ids = few;
    size_t count;
    PyObject *list = NULL;
    lp_error err = {0};

    if (!PyArg_ParseTuple(args, "II:dim_axes", &tensor, &dim))
        return NULL;
    if (lp_graph_dim_axes(graph_of(self), tensor, dim, ids, sizeof few / sizeof few[0], &count, &err) !=
        LP_OK)
        return raise_status(self, &err);
    if (count > sizeof few / sizeof few[0]) {
        ids = PyMem_New(uint32_t, count);
        if (ids == NULL)
            return PyErr_NoMemory();
        if (lp_graph_dim_axes(graph_of(self), tensor, dim, ids, count, &count, &err) != LP_OK) {
            raise_status(self, &err);
            goto done;
        }
    }
    list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; list != NULL && i < count; i++) {
        PyObject *id = PyLong_FromUnsignedLong(ids[i]);
        if (id == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, id);
    }
done:
    if (ids != few)
        PyMem_Free(ids);
    return list;
}

static PyObject *graph_marked(PyObject *self, PyObject *unused)
{
    size_t count = lp_graph_marked_count(graph_of(self));
    PyObject *list = PyList_New((Py_ssize_t)count);

    (void)unused;
    for (size_t i = 0; list != NULL && i < count; i++) {
        const lp_marked *marked = lp_graph_marked(graph_of(self), i);
        PyObject *entry = Py_BuildValue("(III)", marked->op, marked->tensor, marked->dim);
        if (entry == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, entry);
    }
    return list;
}

static PyObject *graph_unknown(PyObject *self, PyObject *unused)
{
    size_t count = lp_graph_unknown_count(graph_of(self));
    PyObject *list = PyList_New((Py_ssize_t)count);

    (void)unused;
    for (size_t i = 0; list != NULL && i < count; i++) {
        PyObject *op = PyLong_FromUnsignedLong(lp_graph_unknown_op(graph_of(self), i));
        if (op == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, op);
    }
    return list;
}

static PyObject *graph_freeze(PyObject *self, PyObject *args)
{
    Py_ssize_t id;
    const char *why;
    lp_error err = {0};
    lp_reason reason;

    if (!PyArg_ParseTuple(args, "ns:freeze", &id, &why) || axis_or_error(self, id) == NULL)
        return NULL;
    reason = strcmp(why, "trial") == 0   ? LP_REASON_TRIAL
             : strcmp(why, "value") == 0 ? LP_REASON_VALUE
             : strcmp(why, "fixed") == 0 ? LP_REASON_FIXED
                                         : LP_REASON_NONE;
    if (reason == LP_REASON_NONE) {
        PyErr_Format(PyExc_ValueError, "freeze takes the reason trial, value or fixed, not %s", why);
        return NULL;
    }
    if (lp_graph_freeze(graph_of(self), (size_t)id, reason, LP_NO_OP, &err) != LP_OK)
        return raise_status(self, &err);
    Py_RETURN_NONE;
}

static PyObject *dim_or_none(const lp_graph *graph, lp_atom atom)
{
    uint32_t tensor, dim;
    if (lp_graph_atom_dim(graph, atom, &tensor, &dim))
        return Py_BuildValue("(II)", tensor, dim);
    return Py_NewRef(Py_None);
}

static PyObject *graph_explain(PyObject *self, PyObject *args)
{
    Py_ssize_t id, from, to;
    lp_steps steps = {NULL, 0, 0};
    lp_graph *graph = graph_of(self);
    lp_error err = {0};
    lp_status status;
    PyObject *list = NULL;

    if (!PyArg_ParseTuple(args, "nnn:explain", &id, &from, &to) || axis_or_error(self, id) == NULL)
        return NULL;
    status = lp_graph_explain(graph, (size_t)id, (size_t)from, (size_t)to, &steps, &err);
    if (status != LP_OK)
        raise_status(self, &err);
    else
        list = PyList_New((Py_ssize_t)steps.count);
    for (size_t i = 0; list != NULL && i < steps.count; i++) {
        const lp_step *step = &steps.items[i];
        PyObject *from_dim = dim_or_none(graph, step->from), *to_dim = dim_or_none(graph, step->to),
                 *entry = NULL;
        if (from_dim != NULL && to_dim != NULL)
            entry = Py_BuildValue("(sLOO)", lp_rule_label((lp_rule)step->rule),
                                  step->op == LP_NO_OP ? -1LL : (long long)step->op, from_dim, to_dim);
        Py_XDECREF(from_dim);
        Py_XDECREF(to_dim);
        if (entry == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, entry);
    }
    lp_steps_free(lp_graph_allocator(graph), &steps);
    return list;
}

static PyMethodDef graph_methods[] = {
    {"axes", graph_axes, METH_NOARGS,
     "axes($self, /)\n--\n\nEvery axis: (size, kind, prunable, [(reason, op or -1, is mark)], [(tensor, dim, start,\n"
     "stride) of each member])."},
    {"positions", graph_positions, METH_VARARGS,
     "positions($self, axis, member, /)\n--\n\nint64 (axis size, positions per index) along the member's dimension."},
    {"new_sizes", graph_new_sizes, METH_VARARGS,
     "new_sizes($self, removed, dims, /)\n--\n\nSizes of (tensor, dim) pairs when axis i loses removed[i] indices."},
    {"numel", graph_numel, METH_O, "numel($self, removed, /)\n--\n\nElements of all parameters then."},
    {"macs", graph_macs, METH_O,
     "macs($self, removed, /)\n--\n\nMultiply-accumulates of the recorded forward pass then."},
    {"removed_positions", graph_removed_positions, METH_VARARGS,
     "removed_positions($self, tensor, dim, size, removed, /)\n--\n\nbool (size,): positions that go with the removed indices."},
    {"mark_ragged", graph_mark_ragged, METH_VARARGS,
     "mark_ragged($self, axis, member, outer, chosen, flags, /)\n--\n\nSet flags where a choice of its own for each outer index goes."},
    {"dim_axes", graph_dim_axes, METH_VARARGS,
     "dim_axes($self, tensor, dim, /)\n--\n\nIds of the axes in a dimension."},
    {"marked", graph_marked, METH_NOARGS,
     "marked($self, /)\n--\n\n(op, tensor, dim) of every normalisation."},
    {"unknown", graph_unknown, METH_NOARGS, "unknown($self, /)\n--\n\nOperations no rule knows."},
    {"freeze", graph_freeze, METH_VARARGS,
     "freeze($self, axis, reason, /)\n--\n\nreason: trial, value or fixed."},
    {"explain", graph_explain, METH_VARARGS,
     "explain($self, axis, from_member, to_member, /)\n--\n\nSteps (rule, op, (tensor, dim) or None, (tensor, dim) or None)."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot graph_slots[] = {
    {Py_tp_doc, "Graph(tensors, ops, outputs)\n--\n\nThe dependency graph of a recorded forward pass."},
    {Py_tp_new, (void *)graph_new},
    {Py_tp_dealloc, (void *)graph_dealloc},
    {Py_tp_traverse, (void *)graph_traverse},
    {Py_tp_methods, graph_methods},
    {0, NULL},
};

static PyType_Spec graph_spec = {
    .name = "llmprune._core.Graph",
    .basicsize = sizeof(GraphObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = graph_slots,
};

int lp_binding_add_graph(PyObject *module, lp_module_state *state)
{
    if (PyArray_ImportNumPyAPI() < 0)
        return -1;
    state->graph_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &graph_spec, NULL);
    if (state->graph_type == NULL)
        return -1;
    return PyModule_AddType(module, state->graph_type);
}
