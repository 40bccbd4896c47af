#include "tape.h"

typedef struct {
    int64_t *items;
    size_t count, capacity;
} IntList;

/* Where what is read goes, and the room it is read in. */
typedef struct {
    lp_graph *graph;
    const lp_module_state *state;
    IntList first, second;
} Reader;

PyObject *lp_binding_items(PyObject *object, const char *what)
{
    PyObject *fast = PySequence_Fast(object, what), *items = NULL;

    if (fast != NULL) {
        items = PySequence_Tuple(fast);
        Py_DECREF(fast);
    }
    return items;
}

/* Read a sequence of ints into `list`, replacing what it held.  -1 with an exception set. */
static int read_ints(PyObject *object, IntList *list, const char *what)
{
    PyObject *items = lp_binding_items(object, what);
    Py_ssize_t length;

    if (items == NULL)
        return -1;
    length = PyTuple_GET_SIZE(items);
    if ((size_t)length > list->capacity) {
        int64_t *grown = PyMem_Resize(list->items, int64_t, (size_t)length * 2);
        if (grown == NULL) {
            Py_DECREF(items);
            PyErr_NoMemory();
            return -1;
        }
        list->items = grown;
        list->capacity = (size_t)length * 2;
    }
    for (Py_ssize_t i = 0; i < length; i++) {
        list->items[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(items, i));
        if (list->items[i] == -1 && PyErr_Occurred()) {
            Py_DECREF(items);
            return -1;
        }
    }
    list->count = (size_t)length;
    Py_DECREF(items);
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
static int read_tensor(Reader *reader, PyObject *entry)
{
    PyObject *items = lp_binding_items(entry, "a tensor of the tape is a list");
    lp_tensor_role role;
    const char *class;
    uint64_t storage;
    IntList *sizes = &reader->first;
    lp_error err = {0};
    int result = -1;

    if (items == NULL)
        return -1;
    if (PyTuple_GET_SIZE(items) < 4) {
        PyErr_SetString(PyExc_ValueError,
                        "a tensor of the tape has sizes, dtype class, storage, role and name");
        goto done;
    }
    if (read_ints(PyTuple_GET_ITEM(items, 0), sizes, "a tensor's sizes are a list of ints") < 0)
        goto done;
    class = PyUnicode_AsUTF8(PyTuple_GET_ITEM(items, 1));
    if (class == NULL)
        goto done;
    storage = PyLong_AsUnsignedLongLongMask(PyTuple_GET_ITEM(items, 2));
    if (PyErr_Occurred() || read_role(PyTuple_GET_ITEM(items, 3), &role) < 0)
        goto done;
    if (lp_graph_add_tensor(reader->graph, sizes->items, sizes->count, role,
                            class[0] == 'i' || class[0] == 'b', storage, &err) != LP_OK)
        (void)lp_raise(reader->state, &err);
    else
        result = 0;
done:
    Py_DECREF(items);
    return result;
}

/* [name, flags, code, outputs, ...] */
static int read_op(Reader *reader, PyObject *entry)
{
    PyObject *items = lp_binding_items(entry, "an operation of the tape is a list");
    const char *name;
    unsigned long flags;
    IntList *code = &reader->first, *outputs = &reader->second;
    lp_error err = {0};
    int result = -1;

    if (items == NULL)
        return -1;
    if (PyTuple_GET_SIZE(items) < 4) {
        PyErr_SetString(PyExc_ValueError,
                        "an operation of the tape has name, flags, code, outputs and scope");
        goto done;
    }
    name = PyUnicode_AsUTF8(PyTuple_GET_ITEM(items, 0));
    if (name == NULL)
        goto done;
    flags = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(items, 1));
    if (PyErr_Occurred() ||
        read_ints(PyTuple_GET_ITEM(items, 2), code, "an operation's code is a list of ints") < 0 ||
        read_ints(PyTuple_GET_ITEM(items, 3), outputs, "an operation's outputs are a list of ints") < 0)
        goto done;
    if (lp_graph_add_op(reader->graph, name, (uint32_t)flags, code->items, code->count, outputs->items,
                        outputs->count, &err) != LP_OK)
        (void)lp_raise(reader->state, &err);
    else
        result = 0;
done:
    Py_DECREF(items);
    return result;
}

static int each(Reader *reader, PyObject *list, const char *what, int (*read)(Reader *, PyObject *))
{
    PyObject *items = lp_binding_items(list, what);
    int result = 0;

    if (items == NULL)
        return -1;
    for (Py_ssize_t i = 0; result == 0 && i < PyTuple_GET_SIZE(items); i++)
        result = read(reader, PyTuple_GET_ITEM(items, i));
    Py_DECREF(items);
    return result;
}

int lp_binding_read_tape(lp_graph *graph, const lp_module_state *state, PyObject *tensors, PyObject *ops,
                         PyObject *outputs)
{
    Reader reader = {.graph = graph, .state = state};
    lp_error err = {0};
    int result = -1;

    if (each(&reader, tensors, "the tape's tensors are a list", read_tensor) < 0 ||
        each(&reader, ops, "the tape's operations are a list", read_op) < 0 ||
        read_ints(outputs, &reader.first, "the tape's outputs are a list of ints") < 0)
        goto done;
    if (lp_graph_set_outputs(graph, reader.first.items, reader.first.count, &err) != LP_OK)
        (void)lp_raise(state, &err);
    else
        result = 0;
done:
    PyMem_Free(reader.first.items);
    PyMem_Free(reader.second.items);
    return result;
}

/* (operation, code) */
static int read_rule(Reader *reader, PyObject *entry)
{
    Py_ssize_t op;
    PyObject *code;
    lp_error err = {0};

    if (!PyTuple_Check(entry)) {
        PyErr_SetString(PyExc_TypeError, "a declared rule is a tuple of an operation and a list of ints");
        return -1;
    }
    if (!PyArg_ParseTuple(entry, "nO", &op, &code) ||
        read_ints(code, &reader->first, "a declared rule is a list of ints") < 0)
        return -1;
    if (op < 0) {
        PyErr_SetString(PyExc_ValueError, "a declared rule names a negative operation");
        return -1;
    }
    if (lp_graph_declare(reader->graph, (size_t)op, reader->first.items, reader->first.count, &err) !=
        LP_OK) {
        (void)lp_raise(reader->state, &err);
        return -1;
    }
    return 0;
}

int lp_binding_read_rules(lp_graph *graph, const lp_module_state *state, PyObject *rules)
{
    Reader reader = {.graph = graph, .state = state};
    int result = each(&reader, rules, "declared rules are a list", read_rule);

    PyMem_Free(reader.first.items);
    return result;
}
