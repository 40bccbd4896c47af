#include "binding.h"

static int add_error(PyObject *module, PyObject **slot, const char *name, const char *doc, PyObject *base)
{
    char qualified[64];

    /* Named after the module users import them from, which is also where pickle looks for them. */
    (void)PyOS_snprintf(qualified, sizeof qualified, "llmprune.errors.%s", name);
    *slot = PyErr_NewExceptionWithDoc(qualified, doc, base, NULL);
    if (*slot == NULL)
        return -1;
    return PyModule_AddObjectRef(module, name, *slot);
}

int lp_binding_add_errors(PyObject *module, lp_module_state *state)
{
    if (add_error(
            module, &state->LlmpruneError, "LlmpruneError",
            "Base of every error this package raises on purpose; its text is one sentence for the user.",
            PyExc_Exception) < 0)
        return -1;
    if (add_error(module, &state->TraceError, "TraceError",
                  "The model's forward pass could not be recorded or does not make sense as a graph.",
                  state->LlmpruneError) < 0)
        return -1;
    if (add_error(module, &state->PlanError, "PlanError", "A pruning plan that cannot be carried out.",
                  state->LlmpruneError) < 0)
        return -1;
    if (add_error(module, &state->TensorError, "TensorError",
                  "A tensor of the wrong type, device, shape, layout or mutability.",
                  state->LlmpruneError) < 0)
        return -1;
    return add_error(module, &state->DeviceError, "DeviceError",
                     "An accelerator that is missing, unsupported, busy, full or failing; the text has the "
                     "CUDA error's name.",
                     state->LlmpruneError);
}

PyObject *lp_raise(const lp_module_state *state, const lp_error *err)
{
    PyObject *type = NULL;

    if (err != NULL) {
        switch (err->code) {
        case LP_OK:
            break;
        case LP_ERR_NOMEM:
            type = PyExc_MemoryError;
            break;
        case LP_ERR_ARGUMENT:
            type = PyExc_ValueError;
            break;
        case LP_ERR_OVERFLOW:
            type = PyExc_OverflowError;
            break;
        case LP_ERR_UNSUPPORTED:
            type = state->LlmpruneError;
            break;
        case LP_ERR_TRACE:
            type = state->TraceError;
            break;
        case LP_ERR_PLAN:
            type = state->PlanError;
            break;
        case LP_ERR_TENSOR:
            type = state->TensorError;
            break;
        case LP_ERR_DEVICE:
            type = state->DeviceError;
            break;
        case LP_ERR_INTERNAL:
            type = PyExc_SystemError;
            break;
        }
    }
    if (type == NULL)
        PyErr_SetString(PyExc_SystemError,
                        "an error was raised without a status; please report this as a bug");
    else
        PyErr_SetString(type, err->message);
    return NULL;
}

PyObject *lp_finish(const lp_module_state *state, lp_status status, const lp_error *err)
{
    if (PyErr_Occurred())
        return NULL;
    return status == LP_OK ? Py_NewRef(Py_None) : lp_raise(state, err);
}
