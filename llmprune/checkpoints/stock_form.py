"""Finding a pruned model's stock form: a class of transformers and a config that compute it with nothing else.

First the model's own class (:mod:`llmprune.checkpoints.config_solver`); where no config of it can state the sizes,
classes like it (:mod:`llmprune.checkpoints.siblings`). A config with the right sizes counts only once a model built
from it, with the pruned model's tensors, computes the same outputs.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmprune.checkpoints.config_solver import Solver, pattern_of
from llmprune.checkpoints.loading import quiet_transformers
from llmprune.checkpoints.record import Compaction
from llmprune.checkpoints.reload import compare, loaded, stated
from llmprune.checkpoints.siblings import siblings
from llmprune.checkpoints.universal import base_config, stock_class
from llmprune.errors import CheckpointError, LlmpruneError

if TYPE_CHECKING:
    from llmprune.tracing.graph import Axis, Graph

log = logging.getLogger(__name__)

MAX_PROPOSALS = 3
"""Configs of one class whose outputs are compared before it is given up."""

SHARES = (0.25, 0.5, 1 / 3)
"""Shares of an axis that :func:`stock_kinds` tries to remove: sizes that are products of others must divide."""

Accept = Callable[[type[Any], Any], None]
"""Raises CheckpointError unless a class computes, from a config, what the pruned model computes."""


@dataclass(frozen=True)
class StockForm:
    """A class of transformers and its config."""

    kind: type[Any]
    config: Any


def find(
    model: Any, record: Compaction, base: Any, accept: Accept, any_class: bool = False
) -> tuple[StockForm | None, str]:
    """The stock form of a pruned model.

    Args:
        model: the compacted model.
        record: its record.
        base: the config its class was built from before cutting.
        accept: the proof of a proposal.
        any_class: look among other classes too where its own class has none.

    Returns:
        The form and an empty string; or None and a clause that says why there is none.
    """
    if record.dropped:
        return None, f"no config can state that {next(iter(record.dropped))} is gone"
    kind = stock_class(model)
    with quiet_transformers():  # odd sizes that are tried out make it talk
        solver = Solver(model, record, base)
        found, refused = _proven(kind, solver, accept)
        if found is not None:
            return found, ""
        if refused:
            return None, f"{type(base).__name__} can state the sizes, but then {refused}"
        obstacle = solver.obstacle
        if solver.ragged:
            return None, obstacle
        if not any_class:
            obstacle += "; form='stock' also looks for another class that can"
        else:
            for other, config in siblings(kind, base, record.original_shapes):
                found, refused = _proven(other, Solver(model, record, config, other), accept)
                if found is not None:
                    return found, ""
    return None, obstacle


def _proven(kind: type[Any], solver: Solver, accept: Accept) -> tuple[StockForm | None, str]:
    """The first proposal that is accepted; else why the first was not, empty if there was none."""
    refused = ""
    for config in itertools.islice(solver.proposals(), MAX_PROPOSALS):
        try:
            accept(kind, config)
        except CheckpointError as error:
            log.info("a %s with the right sizes was given up: %s", type(config).__name__, error)
            refused = refused or str(error)
        else:
            return StockForm(kind, config), ""
    return None, refused


def stock_kinds(
    model: Any, inputs: Mapping[str, Any] | None = None, graph: Graph | None = None
) -> dict[str, str]:
    """Which kinds of axes, pruned alone and alike in every layer, save in stock form.

    Each kind is pruned by the shares :data:`SHARES` of every of its axes, until one has a stock form; nothing is
    written. Where axes of a kind lie in different parts of a model (towers, experts and shared experts) and not all
    together have one, the parts are tried alone.

    Args:
        model: a transformers model with its weights; it is left as it is.
        inputs: keyword arguments of its forward; None makes them from its config.
        graph: its graph; None traces it.

    Returns:
        Kind -> ``yes``; ``yes, as CLASS`` where another class has it; ``in part: ...`` with the parts that have it;
        else why there is none.
    """
    from llmprune.tracing.trace import trace

    graph = trace(model, inputs) if graph is None else graph
    kinds: dict[str, list[Axis]] = {}
    for axis in graph.axes:
        if axis.prunable and axis.size > 1:
            kinds.setdefault(axis.kind, []).append(axis)
    answers = {}
    for kind, axes in kinds.items():
        answers[kind] = _stock_of(model, graph, axes, inputs)
        parts: dict[str, list[Axis]] = {}
        for axis in axes:
            parts.setdefault(str(pattern_of(axis.places[0])[0]), []).append(axis)
        if not answers[kind].startswith("yes") and len(parts) > 1:
            good = [
                name for name, part in parts.items() if _stock_of(model, graph, part, inputs)[:3] == "yes"
            ]
            if good:
                answers[kind] = f"in part: {', '.join(good)}"
    return answers


def _stock_of(model: Any, graph: Graph, axes: list[Axis], inputs: Mapping[str, Any] | None) -> str:
    """Whether these axes, pruned by equal shares, have a stock form; an entry of :func:`stock_kinds`."""
    from llmprune.compaction.compact import compact
    from llmprune.planning.plan import plan

    why = "no equal share of it can be removed"
    tried: list[dict[int, int]] = []
    for share in SHARES:
        counts = {axis.id: int(axis.size * share + 1e-9) for axis in axes}
        if counts in tried or not all(counts.values()):
            continue
        tried.append(counts)
        removed = {
            axis.id: np.linspace(0, axis.size - 1, counts[axis.id], endpoint=False, dtype=np.int64)
            for axis in axes
        }
        try:
            small = compact(copy.deepcopy(model), plan(graph, removed=removed))
            record: Any = small.llmprune
            found, why = find(small, record, base_config(small, record), proof(small, inputs), any_class=True)
        except LlmpruneError as error:
            why = str(error)
            continue
        if found is not None:
            other = found.kind.__name__
            return "yes" if found.kind is stock_class(model) else f"yes, as {other}"
    return why


def proof(model: Any, inputs: Mapping[str, Any] | None) -> Accept:
    """Acceptance by comparing outputs in memory."""

    def accept(kind: type[Any], config: Any) -> None:
        twin = loaded(model, kind, None, config=stated(model, config, kind), state_dict=model.state_dict())
        compare(model, twin, inputs, must_run=True)

    return accept
