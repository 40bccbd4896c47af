/* The CUDA backend as this room keeps it: registered by llmprune.machine.cuda when the first tensor on a CUDA device comes by. */
#ifndef LP_BINDING_DEVICE_H
#define LP_BINDING_DEVICE_H

#include "tensor.h"

#include "kernels/cuda/cuda.h"

/* See that the backend is registered and knows the device: 0, or -1 with DeviceError set, which says why not.  `name` is the
 * argument that lies there. */
int lp_device_load(const lp_module_state *state, const char *name, int device);

/* The operations for tensors at `place`, and *exec for them.  `scratch` is None or device memory, which *view adopts; the
 * device is opened where it was not.  NULL with an exception set on failure. */
const lp_backend *lp_device_backend(const lp_module_state *state, lp_place *place, int threads,
                                    PyObject *scratch, lp_view *view, lp_exec *exec);

/* The table registered; only after lp_device_load. */
const lp_cuda_table *lp_device_table(const lp_module_state *state);

/* kernels_device.c: add compact_many to `module`.  -1 with an exception set on failure. */
int lp_binding_add_device_kernels(PyObject *module);

#endif
