/* The state of one `_core` module object, and what the files of this room offer each other.
 *
 * Only files under csrc/binding include Python.h.  Every public call of the module has the same shape: adopt and check
 * the arguments, release the GIL, run core code on plain pointers, take the GIL back, then raise (lp_raise).
 */
#ifndef LP_BINDING_BINDING_H
#define LP_BINDING_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "core/backend.h"
#include "core/status.h"

typedef struct {
    PyObject *LlmpruneError; /* Exception's child, parent of the others */
    PyObject *TraceError;
    PyObject *PlanError;
    PyObject *TensorError;
    PyObject *DeviceError;
    const lp_backend
        *backend; /* the CPU kernels this process uses; static, never NULL once the module is made */
    struct lp_device_registry *devices; /* the CUDA backend, if a tensor has asked for it (device.c) */
    PyTypeObject *graph_type;           /* _core.Graph; NULL until lp_binding_add_graph made it */
    PyTypeObject *block_type;           /* _core.Block; NULL until lp_binding_add_block made it */
} lp_module_state;

/* State of the module `module`; borrowed, lives as long as the module. */
static inline lp_module_state *lp_binding_state(PyObject *module)
{
    return (lp_module_state *)PyModule_GetState(module);
}

/* errors.c: create the exceptions, keep them in `state` and add them to `module`.  -1 with an exception set on failure. */
int lp_binding_add_errors(PyObject *module, lp_module_state *state);

/* errors.c: the one place where a status becomes an exception.  Sets the exception that belongs to err->code with its
 * sentence and returns NULL, so that a call can `return lp_raise(state, &err)`.  A NULL or LP_OK err is our own bug and
 * raises SystemError. */
PyObject *lp_raise(const lp_module_state *state, const lp_error *err);

/* errors.c: what a call without a result returns: NULL if an exception is set already, None for LP_OK, else lp_raise. */
PyObject *lp_finish(const lp_module_state *state, lp_status status, const lp_error *err);

/* tape.c: the items of a sequence as a new tuple, since reading one (__index__, __dlpack__) may run code that changes the list
 * it stands in.  NULL with TypeError, which says `what`, where `object` is no sequence. */
PyObject *lp_binding_items(PyObject *object, const char *what);

/* kernels.c: choose the CPU kernels (environment variable LLMPRUNE_SIMD, else the best) and add the functions that call
 * them to `module`.  -1 with an exception set on failure. */
int lp_binding_add_kernels(PyObject *module, lp_module_state *state);

/* device.c: add what registers the CUDA backend to `module`.  -1 with an exception set on failure. */
int lp_binding_add_device(PyObject *module);

/* device.c: close the devices, when the module goes. */
void lp_binding_close_devices(lp_module_state *state);

/* select.c: add rank and merge to `module`.  -1 with an exception set on failure. */
int lp_binding_add_select(PyObject *module);

/* graph.c: create _core.Graph, keep it in `state` and add it to `module`.  -1 with an exception set on failure. */
int lp_binding_add_graph(PyObject *module, lp_module_state *state);

#endif
