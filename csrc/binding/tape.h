/* A recorded forward pass as Python lists (llmprune/tracing/tape.py), read into the core's graph. */
#ifndef LP_BINDING_TAPE_H
#define LP_BINDING_TAPE_H

#include "binding.h"

#include "core/graph.h"

/* Add to an empty `graph` the tensors [sizes, dtype class, storage, role, name], the operations
 * [name, flags, code, outputs, scope] and the ids of the tensors that matter.  -1 with an exception set: TypeError or
 * ValueError for lists of another make, or what the core says of their content (TraceError, ...).  The graph is then
 * only good to be freed. */
int lp_binding_read_tape(lp_graph *graph, const lp_module_state *state, PyObject *tensors, PyObject *ops,
                         PyObject *outputs);

/* Declared rules: a list of (operation, list of ints as lp_graph_declare takes them).  Errors as above. */
int lp_binding_read_rules(lp_graph *graph, const lp_module_state *state, PyObject *rules);

#endif
