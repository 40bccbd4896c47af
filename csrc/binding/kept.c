#include "kept.h"

int lp_kept_adopt(lp_kept_set *set, const lp_module_state *state, PyObject *dict, const lp_view *tensor,
                  const lp_view *written)
{
    static const char *const names[LP_MAX_DIMS] = {"kept[0]", "kept[1]", "kept[2]", "kept[3]",
                                                   "kept[4]", "kept[5]", "kept[6]", "kept[7]"};
    PyObject *key, *value,
        *copy = PyDict_Copy(dict); /* adopting an array may run code that changes the dict */
    Py_ssize_t place = 0;
    int result = -1;

    if (copy == NULL)
        return -1;
    for (int d = 0; d < tensor->ndim; d++)
        set->shape[d] = tensor->shape[d];
    while (PyDict_Next(copy, &place, &key, &value)) {
        long d = PyLong_AsLong(key);
        if (d == -1 && PyErr_Occurred())
            goto done;
        if (d < 0 || d >= tensor->ndim) {
            PyErr_Format(state->TensorError, "kept: dimension %ld is outside the %d dimensions of %s", d,
                         tensor->ndim, tensor->name);
            goto done;
        }
        if (set->views[d].owner != LP_OWNER_NONE) { /* by a key that is no int, or an odd one */
            PyErr_Format(state->TensorError, "kept: dimension %ld is listed twice", d);
            goto done;
        }
        if (lp_view_adopt_array(&set->views[d], state, value, names[d], LP_ELEMENT_I64, 1, 0) < 0 ||
            lp_view_positions(state, &set->views[d], tensor->shape[d]) < 0 ||
            lp_view_apart(state, written, &set->views[d]) < 0)
            goto done;
        set->kept[d] = (lp_kept){.position = set->views[d].data, .count = (size_t)set->views[d].numel};
        set->shape[d] = set->views[d].numel;
    }
    result = 0;
done:
    Py_DECREF(copy);
    return result;
}
