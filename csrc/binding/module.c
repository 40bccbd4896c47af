#include "block.h"

static int module_exec(PyObject *module)
{
    lp_module_state *state = lp_binding_state(module);

    if (lp_binding_add_errors(module, state) < 0 || lp_binding_add_kernels(module, state) < 0)
        return -1;
    if (lp_binding_add_device(module) < 0 || lp_binding_add_block(module, state) < 0 ||
        lp_binding_add_graph(module, state) < 0)
        return -1;
    return lp_binding_add_select(module);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    lp_module_state *state = lp_binding_state(module);

    Py_VISIT(state->LlmpruneError);
    Py_VISIT(state->TraceError);
    Py_VISIT(state->PlanError);
    Py_VISIT(state->TensorError);
    Py_VISIT(state->DeviceError);
    Py_VISIT(state->graph_type);
    Py_VISIT(state->block_type);
    return 0;
}

static int module_clear(PyObject *module)
{
    lp_module_state *state = lp_binding_state(module);

    Py_CLEAR(state->LlmpruneError);
    Py_CLEAR(state->TraceError);
    Py_CLEAR(state->PlanError);
    Py_CLEAR(state->TensorError);
    Py_CLEAR(state->DeviceError);
    Py_CLEAR(state->graph_type);
    Py_CLEAR(state->block_type);
    return 0;
}

static void module_free(void *module)
{
    lp_binding_close_devices(lp_binding_state((PyObject *)module));
    (void)module_clear((PyObject *)module);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, (void *)module_exec},
#if PY_VERSION_HEX >= 0x030C0000
    /* All state is the module's own, but NumPy, which graph.c calls, wants interpreters to share one GIL. */
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "llmprune._core",
    .m_doc = "The C core: axis algebra, selection and CPU kernels. Use it through the package llmprune.",
    .m_size = sizeof(lp_module_state),
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__core(void);

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&module_def);
}
