"""Trial forward: run the model with an index of each axis gone, and freeze the axes it does not survive.

The algebra and the size equations explain what they saw. Code that hides a size from both (a number written in the
code, a module whose function mode is off, an assertion) shows itself here: the model is run cut, on the meta device,
one block of each kind, under each form of attention, and with a padded batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llmprune.checkpoints.record import AttributeValue
from llmprune.errors import PlanError, TraceError
from llmprune.planning.plan import Plan, plan
from llmprune.tracing.blocks import Excerpt
from llmprune.tracing.graph import Graph
from llmprune.tracing.recording import Recording, Setup
from llmprune.tracing.second_form import SecondForm

log = logging.getLogger(__name__)


class Trial:
    """Trial forwards of one model.

    Args:
        model: the traced model; borrowed for each run and given back as it was.
        inputs: keyword arguments of its forward.
        setup: how it was recorded.
        forms: forms of attention to run under (None: its own).
        excerpt: the blocks that stand for all.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        setup: Setup,
        forms: Sequence[str | None],
        excerpt: Excerpt,
    ) -> None:
        self.model = model
        batches = [inputs, *_padded(inputs)]
        # The other form is told apart by the batch that takes more of its paths.
        self.runs = [(forms[0], batch) for batch in batches] + [(form, batches[-1]) for form in forms[1:]]
        self.setup = replace(setup, blocks=excerpt.kept)

    def failures(self, graph: Graph) -> dict[int, str]:
        """Axes of ``graph`` (recorded from the same blocks) that cannot lose an index, with the reason."""
        axes = [axis.id for axis in graph.axes if axis.prunable and axis.size > 1]
        shapes = [graph.tape.tensors[tensor][0] for tensor in graph.tape.outputs]
        found: dict[int, str] = {}
        self._search(graph, axes, shapes, found)
        return found

    def _search(self, graph: Graph, axes: list[int], shapes: list[list[int]], found: dict[int, str]) -> None:
        """Halve a set of axes that fails together until the ones that fail alone are known."""
        reason = self._failure(graph, axes, shapes) if axes else None
        if reason is None:
            return
        if len(axes) == 1:
            found[axes[0]] = reason
            return
        before = len(found)
        self._search(graph, axes[: len(axes) // 2], shapes, found)
        self._search(graph, axes[len(axes) // 2 :], shapes, found)
        if len(found) == before:
            log.debug("axes %s fail together and not apart: %s", axes, reason)

    def _failure(self, graph: Graph, axes: Iterable[int], shapes: list[list[int]]) -> str | None:
        """Why the model does not run without one index of each of these axes; None if it does."""
        try:
            cut = plan(graph, removed={axis: [0] for axis in axes})
        except PlanError as error:
            return f"no plan removes an index of it alone: {error}"
        for form, batch in self.runs:
            reason = self._run(cut, form, batch, shapes)
            if reason is not None:
                return f"trial forward failed: {reason}"
        return None

    def _run(
        self, cut: Plan, form: str | None, inputs: dict[str, Any], shapes: list[list[int]]
    ) -> str | None:
        attributes = [AttributeValue(a.module, a.name, a.index, a.new) for a in cut.attributes]
        setup = replace(self.setup, attention=form, kept=cut.kept, attributes=attributes)
        try:
            tape = Recording(self.model, inputs, setup).run()
        except TraceError as error:
            return f"{error.__cause__ or error} ({getattr(error, 'place', 'before any operation')})"
        got = [tape.tensors[tensor][0] for tensor in tape.outputs]
        return None if got == shapes else f"its outputs have shapes {got} instead of {shapes}"


def unclosable(graph: Graph) -> dict[int, str]:
    """Axes of which no plan removes an index, with the reason."""
    found = {}
    for axis in [axis.id for axis in graph.axes if axis.prunable and axis.size > 1]:
        try:
            plan(graph, removed={axis: [0]})
        except PlanError as error:
            found[axis] = f"no plan removes an index of it alone: {error}"
    return found


def freeze_as_in(excerpt_graph: Graph, graph: Graph) -> None:
    """Freeze in an excerpt what is frozen in the whole model."""
    whole = SecondForm(graph, excerpt_graph)
    for axis in [axis.id for axis in excerpt_graph.axes if axis.prunable]:
        frozen = [graph.axes[n] for n in whole.everywhere(axis) if not graph.axes[n].prunable]
        if frozen and frozen[0].reasons:
            excerpt_graph.freeze(axis, frozen[0].reasons[0])


def freeze_failures(graph: Graph, excerpt_graph: Graph, failures: Mapping[int, str]) -> None:
    """Freeze what failed in an excerpt, in the whole model: in the blocks that ran and in those that are like them."""
    if not failures:
        return
    whole = SecondForm(graph, excerpt_graph)
    for axis, reason in failures.items():
        for number in whole.everywhere(axis):
            if graph.axes[number].prunable:
                graph.freeze(number, reason)


def _padded(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The same batch with its last token masked, which takes other paths through attention."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.is_meta or mask.dim() != 2 or mask.shape[1] < 2:
        return []
    padded = mask.clone()
    padded[0, -1] = 0
    return [{**inputs, "attention_mask": padded}]
