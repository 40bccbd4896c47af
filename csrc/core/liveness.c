/* Which operations and tensors the outputs depend on. */
#include "graph_internal.h"

#include <string.h>

static lp_status mark_live(lp_graph *graph, lp_tensor *tensor, void *context, lp_error *err)
{
    bool *storages = context;
    (void)graph;
    (void)err;
    tensor->live = true;
    storages[tensor->storage_id] = true;
    return LP_OK;
}

/* Number the storages densely, so that liveness can keep an array by storage. */
static lp_status number_storages(lp_graph *graph, size_t *count, lp_error *err)
{
    size_t slots = 16, capacity = 0;
    void *block = NULL;
    uint32_t *table;

    *count = 0;
    while (slots < 2 * graph->tensor_count)
        slots *= 2;
    LP_TRY(lp_grow(&graph->allocator, &block, &capacity, slots, sizeof *table, err));
    table = block;
    for (size_t i = 0; i < slots; i++)
        table[i] = UINT32_MAX;
    for (size_t t = 0; t < graph->tensor_count; t++) {
        lp_tensor *tensor = &graph->tensors[t];
        size_t slot = (size_t)((tensor->storage * UINT64_C(0x9E3779B97F4A7C15)) >> 20) & (slots - 1);
        while (table[slot] != UINT32_MAX && graph->tensors[table[slot]].storage != tensor->storage)
            slot = (slot + 1) & (slots - 1);
        if (table[slot] == UINT32_MAX) {
            table[slot] = (uint32_t)t;
            tensor->storage_id = (uint32_t)(*count)++;
        } else {
            tensor->storage_id = graph->tensors[table[slot]].storage_id;
        }
    }
    lp_release(&graph->allocator, block, capacity, sizeof *table);
    return LP_OK;
}

/* Backwards over the tape: an operation is live when an output is read later by a live one, or, when it writes in place,
 * when any tensor of the written storage is. */
lp_status lp_graph_find_live(lp_graph *graph, lp_error *err)
{
    size_t storages, capacity = 0;
    void *block = NULL;
    bool *live_storage;
    lp_status status;

    LP_TRY(number_storages(graph, &storages, err));
    LP_TRY(lp_grow(&graph->allocator, &block, &capacity, storages + 1, sizeof *live_storage, err));
    live_storage = block;
    memset(live_storage, 0, capacity * sizeof *live_storage);
    status = LP_OK;
    for (size_t i = 0; i < graph->result_count; i++)
        (void)mark_live(graph, &graph->tensors[graph->results[i]], live_storage, NULL);
    for (size_t i = graph->op_count; status == LP_OK && i-- > 0;) {
        lp_op *op = &graph->ops[i];
        for (size_t o = 0; o < op->output_count && !op->live; o++) {
            lp_tensor *out = lp_op_output(graph, op, o);
            if (out != NULL)
                op->live = out->live || ((op->flags & LP_OP_MUTATES) != 0 && live_storage[out->storage_id]);
        }
        if (op->live)
            status = lp_visit_inputs(graph, op, mark_live, live_storage, err);
    }
    lp_release(&graph->allocator, block, capacity, sizeof *live_storage);
    return status;
}
