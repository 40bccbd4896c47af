"""What a plan leaves of every layer, and how the scores lay in each: small enough to be kept with every run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmprune.planning.allocation import layer_of, stacks

if TYPE_CHECKING:
    from llmprune.planning.plan import Plan
    from llmprune.scoring.scores import Scores
    from llmprune.tracing.graph import Graph

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Of the scores of an axis, in this order."""


def structure(graph: Graph, plan: Plan, scores: Scores) -> list[dict[str, Any]]:
    """One row for each prunable axis of the kinds that the plan may touch, in the graph's order.

    Each has ``axis`` (id), ``kind``, ``layer`` (path of the layer; None for an axis that spans several), ``size``,
    ``removed`` (of an axis inside another: in each of its places) and ``scores``, the :data:`QUANTILES` of its scores
    (None where it has none).
    """
    known = stacks(list(graph.parameters))
    kinds = {summary["kind"] for summary in plan.axes.values()} | set(plan.options.get("kinds", ()))
    rows = []
    for axis in graph.axes:
        if not axis.prunable or axis.kind not in kinds:
            continue
        names = [member.parameter for member in axis.members if member.parameter in graph.parameters]
        layer = layer_of(names, known)
        values = scores[axis.id] if axis.id in scores else np.empty(0)
        rows.append(
            {
                "axis": axis.id,
                "kind": axis.kind,
                "layer": None if layer is None else ".".join(filter(None, (layer[0], str(layer[1])))),
                "size": axis.size,
                "removed": int(plan.removed[axis.id].shape[-1]) if axis.id in plan.removed else 0,
                "scores": [float(q) for q in np.quantile(values, QUANTILES)] if values.size else None,
            }
        )
    return rows
