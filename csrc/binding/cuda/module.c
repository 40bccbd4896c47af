/* llmprune._cuda: nothing but a capsule with the CUDA backend's operation table.  Importing it touches no device. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels/cuda/cuda.h"

static int module_exec(PyObject *module)
{
    PyObject *capsule = PyCapsule_New((void *)(uintptr_t)lp_cuda(), LP_CUDA_CAPSULE, NULL);
    int result;

    if (capsule == NULL)
        return -1;
    result = PyModule_AddObjectRef(module, "table", capsule);
    Py_DECREF(capsule);
    return result;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, (void *)module_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "llmprune._cuda",
    .m_doc = "The CUDA kernels, for llmprune.machine.cuda to hand to llmprune._core.",
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__cuda(void);

PyMODINIT_FUNC PyInit__cuda(void)
{
    return PyModuleDef_Init(&module_def);
}
