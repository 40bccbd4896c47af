/* _core.Graph: the dependency graph for llmprune/tracing/graph.py, which gives it its Python face. */
#include "tape.h"

#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#include <numpy/arrayobject.h>

typedef struct {
    PyObject_HEAD
    lp_graph *graph;
} GraphObject;

static const lp_module_state *state_of(PyObject *self)
{
    return (const lp_module_state *)PyType_GetModuleState(Py_TYPE(self));
}

static PyObject *raise_status(PyObject *self, const lp_error *err)
{
    return lp_raise(state_of(self), err);
}

static PyObject *graph_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"tensors", "ops", "outputs", "rules", NULL};
    PyObject *tensors, *ops, *outputs, *rules = NULL, *self;
    lp_error err = {0};
    lp_status status;
    lp_graph *graph;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|O:Graph", keywords, &tensors, &ops, &outputs, &rules))
        return NULL;
    self = type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    status = lp_graph_new(&((GraphObject *)self)->graph, lp_allocator_default(), &err);
    graph = ((GraphObject *)self)->graph;
    if (status == LP_OK && (lp_binding_read_tape(graph, state_of(self), tensors, ops, outputs) < 0 ||
                            (rules != NULL && lp_binding_read_rules(graph, state_of(self), rules) < 0))) {
        Py_DECREF(self);
        return NULL;
    }
    if (status == LP_OK) {
        Py_BEGIN_ALLOW_THREADS
        status = lp_graph_build(graph, &err);
        Py_END_ALLOW_THREADS
    }
    if (status != LP_OK) {
        (void)raise_status(self, &err);
        Py_DECREF(self);
        return NULL;
    }
    return self;
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

/* A list of `count` items, each a new reference made by `make`, or NULL with its exception. */
static PyObject *list_of(size_t count, PyObject *(*make)(const void *source, size_t i), const void *source)
{
    PyObject *list = PyList_New((Py_ssize_t)count);

    for (size_t i = 0; list != NULL && i < count; i++) {
        PyObject *item = make(source, i);
        if (item == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, item);
    }
    return list;
}

/* What the items of a list are made from. */
typedef struct {
    const lp_graph *graph;
    const lp_axis *axis;
    const lp_steps *steps;
} Source;

static PyObject *make_member(const void *source, size_t i)
{
    const Source *from = source;
    const lp_member *member = &from->axis->members[i];
    int64_t start, stride;

    lp_graph_member_place(from->graph, member, &start, &stride);
    return Py_BuildValue("(IILL)", member->tensor, member->dim, (long long)start, (long long)stride);
}

static PyObject *make_axis(const void *source, size_t i)
{
    const lp_graph *graph = ((const Source *)source)->graph;
    const lp_axis *axis = lp_graph_axis(graph, i);
    const Source from = {graph, axis, NULL};
    PyObject *notes = notes_of(graph, axis), *members = list_of(axis->member_count, make_member, &from);
    PyObject *entry = NULL;

    if (notes != NULL && members != NULL)
        entry = Py_BuildValue("(LsOOO)", (long long)axis->size, lp_kind_name(axis->kind),
                              axis->prunable ? Py_True : Py_False, notes, members);
    Py_XDECREF(notes);
    Py_XDECREF(members);
    return entry;
}

static PyObject *graph_axes(PyObject *self, PyObject *unused)
{
    const Source source = {graph_of(self), NULL, NULL};

    (void)unused;
    return list_of(lp_graph_axis_count(source.graph), make_axis, &source);
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
    for (npy_intp i = 0; array != NULL && i < PyArray_SIZE(array); i++) {
        int64_t count = ((const int64_t *)PyArray_DATA(array))[i];
        int64_t size = lp_graph_axis(graph_of(self), (size_t)i)->size;
        if (count < 0 || count > size) {
            PyErr_Format(PyExc_ValueError, "axis %zd of size %lld cannot lose %lld indices", (Py_ssize_t)i,
                         (long long)size, (long long)count);
            Py_CLEAR(array);
        }
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

static PyObject *graph_macs_each(PyObject *self, PyObject *object)
{
    PyArrayObject *removed = removed_array(self, object);
    npy_intp count = (npy_intp)lp_graph_op_count(graph_of(self));
    PyObject *result = removed == NULL ? NULL : PyArray_SimpleNew(1, &count, NPY_INT64);
    lp_error err = {0};

    if (result != NULL && lp_graph_macs_each(graph_of(self), PyArray_DATA(removed),
                                             PyArray_DATA((PyArrayObject *)result), &err) != LP_OK) {
        Py_CLEAR(result);
        raise_status(self, &err);
    }
    Py_XDECREF(removed);
    return result;
}

/* An array that positions of (tensor, dim) are written to must have that dimension's size. */
static int check_flags_size(PyObject *self, uint32_t tensor, uint32_t dim, Py_ssize_t size)
{
    lp_error err = {0};
    int64_t expected;

    if (lp_graph_new_size(graph_of(self), tensor, dim, NULL, &expected, &err) != LP_OK) {
        raise_status(self, &err);
        return -1;
    }
    if (size == expected)
        return 0;
    PyErr_Format(PyExc_ValueError, "dimension %u of tensor %u has %lld positions, not %zd", dim, tensor,
                 (long long)expected, size);
    return -1;
}

/* removed_positions(tensor, dim, size, {axis: sorted indices}) -> bool array of the positions that go */
static PyObject *graph_removed_positions(PyObject *self, PyObject *args)
{
    unsigned int tensor, dim;
    Py_ssize_t size, at = 0;
    PyObject *removed, *copy, *key, *value, *result = NULL;
    size_t axes = lp_graph_axis_count(graph_of(self));
    uint8_t **gone;
    npy_intp length;
    lp_error err = {0};

    if (!PyArg_ParseTuple(args, "IInO!:removed_positions", &tensor, &dim, &size, &PyDict_Type, &removed) ||
        check_flags_size(self, tensor, dim, size) < 0)
        return NULL;
    copy = PyDict_Copy(removed); /* making arrays of its values may run code that changes the dict */
    gone = PyMem_Calloc(axes + 1, sizeof *gone);
    if (copy == NULL || gone == NULL) {
        Py_XDECREF(copy);
        PyMem_Free(gone);
        return copy == NULL ? NULL : PyErr_NoMemory();
    }
    while (PyDict_Next(copy, &at, &key, &value)) {
        Py_ssize_t id = PyLong_AsSsize_t(key);
        const lp_axis *axis;
        PyArrayObject *indices;
        if ((id == -1 && PyErr_Occurred()) || (axis = axis_or_error(self, id)) == NULL)
            goto done;
        if (gone[id] != NULL) { /* by an int of a subclass that is not equal to itself */
            PyErr_Format(PyExc_ValueError, "axis %zd is listed twice", id);
            goto done;
        }
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
    Py_DECREF(copy);
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
    if (check_flags_size(self, axis->members[member].tensor, axis->members[member].dim,
                         (Py_ssize_t)PyArray_SIZE((PyArrayObject *)flags)) < 0)
        return NULL;
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

static PyObject *make_id(const void *source, size_t i)
{
    return PyLong_FromUnsignedLong(((const uint32_t *)source)[i]);
}

typedef lp_status (*dim_query)(lp_graph *, uint32_t, uint32_t, uint32_t *, size_t, size_t *, lp_error *);

static PyObject *ids_of_dim(PyObject *self, PyObject *args, const char *format, dim_query query)
{
    unsigned int tensor, dim;
    uint32_t few[32], *ids = few;
    size_t count;
    PyObject *list = NULL;
    lp_error err = {0};

    if (!PyArg_ParseTuple(args, format, &tensor, &dim))
        return NULL;
    if (query(graph_of(self), tensor, dim, ids, sizeof few / sizeof few[0], &count, &err) != LP_OK)
        return raise_status(self, &err);
    if (count > sizeof few / sizeof few[0]) {
        ids = PyMem_New(uint32_t, count);
        if (ids == NULL)
            return PyErr_NoMemory();
        if (query(graph_of(self), tensor, dim, ids, count, &count, &err) != LP_OK) {
            raise_status(self, &err);
            goto done;
        }
    }
    list = list_of(count, make_id, ids);
done:
    if (ids != few)
        PyMem_Free(ids);
    return list;
}

static PyObject *graph_dim_axes(PyObject *self, PyObject *args)
{
    return ids_of_dim(self, args, "II:dim_axes", lp_graph_dim_axes);
}

static PyObject *graph_dim_atoms(PyObject *self, PyObject *args)
{
    return ids_of_dim(self, args, "II:dim_atoms", lp_graph_dim_atoms);
}

static PyObject *make_root(const void *source, size_t i)
{
    return PyLong_FromUnsignedLong(lp_graph_axis(source, i)->root);
}

static PyObject *graph_atoms(PyObject *self, PyObject *Py_UNUSED(unused))
{
    return list_of(lp_graph_axis_count(graph_of(self)), make_root, graph_of(self));
}

static PyObject *make_marked(const void *source, size_t i)
{
    const lp_marked *marked = lp_graph_marked(((const Source *)source)->graph, i);

    return Py_BuildValue("(III)", marked->op, marked->tensor, marked->dim);
}

static PyObject *graph_marked(PyObject *self, PyObject *unused)
{
    const Source source = {graph_of(self), NULL, NULL};

    (void)unused;
    return list_of(lp_graph_marked_count(source.graph), make_marked, &source);
}

static PyObject *make_unknown(const void *source, size_t i)
{
    return PyLong_FromUnsignedLong(lp_graph_unknown_op(((const Source *)source)->graph, i));
}

static PyObject *graph_unknown(PyObject *self, PyObject *unused)
{
    const Source source = {graph_of(self), NULL, NULL};

    (void)unused;
    return list_of(lp_graph_unknown_count(source.graph), make_unknown, &source);
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

static PyObject *make_step(const void *source, size_t i)
{
    const Source *from = source;
    const lp_step *step = &from->steps->items[i];
    PyObject *begin = dim_or_none(from->graph, step->from), *end = dim_or_none(from->graph, step->to);
    PyObject *entry = NULL;

    if (begin != NULL && end != NULL)
        entry = Py_BuildValue("(sLOO)", lp_rule_label((lp_rule)step->rule),
                              step->op == LP_NO_OP ? -1LL : (long long)step->op, begin, end);
    Py_XDECREF(begin);
    Py_XDECREF(end);
    return entry;
}

static PyObject *graph_explain(PyObject *self, PyObject *args)
{
    Py_ssize_t id, from, to;
    lp_steps steps = {NULL, 0, 0};
    lp_graph *graph = graph_of(self);
    const Source source = {graph, NULL, &steps};
    lp_error err = {0};
    lp_status status;
    PyObject *list = NULL;

    if (!PyArg_ParseTuple(args, "nnn:explain", &id, &from, &to) || axis_or_error(self, id) == NULL)
        return NULL;
    status = lp_graph_explain(graph, (size_t)id, (size_t)from, (size_t)to, &steps, &err);
    if (status != LP_OK)
        raise_status(self, &err);
    else
        list = list_of(steps.count, make_step, &source);
    lp_steps_free(lp_graph_allocator(graph), &steps);
    return list;
}

static PyObject *graph_knows(PyObject *unused, PyObject *name)
{
    const char *text = PyUnicode_AsUTF8(name);

    (void)unused;
    return text == NULL ? NULL : PyBool_FromLong(lp_graph_knows(text));
}

static PyMethodDef graph_methods[] = {
    {"knows", graph_knows, METH_O | METH_STATIC,
     "knows(name, /)\n--\n\nIs there a rule for operations of this name?"},
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
    {"macs_each", graph_macs_each, METH_O,
     "macs_each($self, removed, /)\n--\n\nint64 (operations,): multiply-accumulates of each operation then."},
    {"removed_positions", graph_removed_positions, METH_VARARGS,
     "removed_positions($self, tensor, dim, size, removed, /)\n--\n\nbool (size,): positions that go with the removed indices."},
    {"mark_ragged", graph_mark_ragged, METH_VARARGS,
     "mark_ragged($self, axis, member, outer, chosen, flags, /)\n--\n\nSet flags where a choice of its own for each outer index goes."},
    {"dim_axes", graph_dim_axes, METH_VARARGS,
     "dim_axes($self, tensor, dim, /)\n--\n\nIds of the axes in a dimension."},
    {"dim_atoms", graph_dim_atoms, METH_VARARGS,
     "dim_atoms($self, tensor, dim, /)\n--\n\nAtoms of a dimension, axes or not, outer to inner, as often as they occur."},
    {"atoms", graph_atoms, METH_NOARGS, "atoms($self, /)\n--\n\nThe atom of each axis."},
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
    {Py_tp_doc,
     "Graph(tensors, ops, outputs, rules=())\n--\n\nThe dependency graph of a recorded forward pass."},
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
