"""Importances read off the inputs of the weights that consume an axis, in one forward pass and with no gradient.

An axis is consumed where a parameter is contracted along it (:mod:`llmprune.repair.consumers`). The formulas stand in
:mod:`llmprune.scoring.importance`; this is the pass that gathers the moments of the inputs they need. Where whole Gram
matrices are needed, an axis is scored as soon as its consumers have seen every token, so that no more than a few are
held.

Their scores are in units of the loss where the model has one: a backward pass over a few samples finds the gradient at
each consumer's outputs. Nothing hooks into autograd for it: what backward multiplies by a weight, along the dimension
that forward does not contract, is that gradient.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from llmprune.errors import CalibrationError, InputError
from llmprune.out_of_core.block_forward import Memory
from llmprune.out_of_core.block_taps import check_room, tapping
from llmprune.out_of_core.boundaries import Journal, signature
from llmprune.out_of_core.stored import source_of
from llmprune.repair.consumers import Taps, Use
from llmprune.repair.moments import Consumer, Moments
from llmprune.scoring.calibration import Batch
from llmprune.scoring.importance import Importance, lookup
from llmprune.scoring.loss import SampleLosses, check_losses, logits_of
from llmprune.scoring.reduction import Sums

if TYPE_CHECKING:
    from llmprune.out_of_core.stored import Streaming
    from llmprune.planning.apart import Around
    from llmprune.tracing.graph import Axis, Graph

GRADIENT_TOKENS = 640
"""How many tokens, in whole samples, the gradients at the outputs are taken over."""
_SKETCH = 8


def activation_scores(
    model: nn.Module,
    graph: Graph,
    axes: Sequence[Axis],
    outer: Mapping[int, Around],
    batch: Batch,
    rule: Importance,
    losses_of: SampleLosses | None,
    batch_size: int | None,
    tick: Callable[[int], object],
    streaming: Streaming | None = None,
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Scores of the axes that a parameter consumes; the others have none.

    Args:
        model: the model, lent out with gradients off.
        graph: its graph.
        axes: the axes to score.
        outer: axis id -> what lies around it, for the indices of which it may be cut apart. A slice of a stack that saw
            no token has the scores of the whole axis.
        batch: calibration samples.
        rule: an importance of sort ``inputs``.
        losses_of: the loss whose curvature weighs the consumers; None: they weigh the same.
        batch_size: samples that run at a time; None: all.
        tick: called with the number of samples done.
        streaming: how, of a model whose weights are in their files: all samples pass block by block.

    Returns:
        Axis id -> (size,), and axis id -> (outer size, size), both float64.

    Raises:
        CalibrationError: a consumer's inputs, or a sample's loss, are not finite.
        InputError: streaming does not apply, or its budget is too small.
    """
    inner: dict[str, set[int]] = {}
    for axis in axes:
        for member in axis.members:
            inner.setdefault(member.parameter, set()).add(member.dim)
    weights = {n: p.data for n, p in model.named_parameters() if n in inner}
    step = batch.samples if streaming is not None else batch_size or batch.samples
    parts = [batch.take(i, min(i + step, batch.samples)) for i in range(0, batch.samples, step)]
    expected: Counter[Use] = Counter()
    curvature: dict[Use, float] = {}
    if streaming is not None:
        widest = max((w.shape[dim] for name, w in weights.items() for dim in inner[name]), default=0)
        check_room(model, batch.tokens, 4 * 8 * widest**2, streaming.budget, f"scoring by {rule.name}")
    journal = _journal(model, axes, outer, batch, rule, streaming)
    noted = None if journal is None else journal.noted("uses")
    if noted is not None:
        expected = Counter({Use(*fields): count for fields, count in noted["expected"]})
        curvature = {Use(*fields): value for fields, value in noted["curvature"]}
    else:
        if rule.gram or streaming is not None:
            taps = Taps(weights, inner, lambda use, _x, _y: expected.update([use]))
            with torch.no_grad(), tapping(model, taps, batch):
                logits_of(model, batch.sketch(_SKETCH).inputs)
        if rule.gram and losses_of is not None:
            if streaming is None:
                curvature = _curvature(model, weights, inner, batch, losses_of)
            else:
                curvature = _streamed_curvature(
                    model, sorted(weights), inner, set(expected), batch, losses_of, streaming
                )
        if journal is not None:
            told: dict[str, Mapping[Use, float]] = {"expected": expected, "curvature": curvature}
            journal.note("uses", {k: [[astuple(use), n] for use, n in v.items()] for k, v in told.items()})
    for counts in (expected, Counter[Use]()):
        work = _Scorer(graph, weights, axes, outer, rule, curvature, counts, len(parts))
        memory = None if journal is None else Memory(journal, work.restore, work.since)
        with torch.no_grad(), tapping(model, Taps(weights, inner, work.see), batch, memory=memory):
            for part in parts:
                work.begin()
                with contextlib.suppress(_Done):
                    logits_of(model, part.inputs)
                if not work.late:
                    tick(part.samples)
        if not work.late:  # else which experts are met depends on the tokens: hold every sum until the end
            break
        if streaming is not None:
            raise InputError(
                f"which parts of {type(model).__name__} run depends on the tokens, so that {rule.name} needs all of it "
                "in memory: load the model, or score by gradients"
            )
    work.finish()
    if journal is not None:
        journal.remove()
    return work.flat, work.nested


def _journal(
    model: nn.Module,
    axes: Sequence[Axis],
    outer: Mapping[int, Around],
    batch: Batch,
    rule: Importance,
    streaming: Streaming | None,
) -> Journal | None:
    """Where a streamed pass keeps what its blocks came to, if it is to."""
    source = source_of(model)
    if streaming is None or streaming.state is None or source is None:
        return None
    of = {"axes": sorted([axis.id, axis.size] for axis in axes), "apart": sorted(outer)}
    return Journal(streaming.state, signature(model, source, batch, rule, **of))


def _curvature(
    model: nn.Module,
    weights: dict[str, torch.Tensor],
    inner: Mapping[str, set[int]],
    batch: Batch,
    losses_of: SampleLosses,
) -> dict[Use, float]:
    """Half the mean square of the gradient at each use's outputs, of the loss summed over a sample's tokens.

    Uses whose gradient is not met have the mean of the others.
    """
    length = max(1, batch.tokens // batch.samples)
    part = batch.take(0, min(batch.samples, -(-GRADIENT_TOKENS // length)))
    tokens: dict[Use, int] = {}
    squares: dict[Use, float] = {}
    uses: set[Use] = set()
    backward = False

    def see(use: Use, x: torch.Tensor, _y: torch.Tensor) -> None:
        if not backward:
            if use.inner in inner[use.name]:
                uses.add(use)
            return
        tokens[use] = tokens.get(use, 0) + x[..., 0].numel()
        squares[use] = squares.get(use, 0.0) + float(x.double().square().sum())

    # Norms and biases let the gradient through to every product, and cost next to nothing themselves.
    small = [p for p in model.parameters() if p.dim() < 2 and p.is_floating_point()]
    small = small or [p for p in model.parameters() if p.is_floating_point()]
    dims = {name: set(range(weight.dim())) for name, weight in weights.items()}
    try:
        for parameter in small:
            parameter.requires_grad_(True)
        with Taps(weights, dims, see):
            losses = losses_of(part)
            check_losses(losses)
            backward = True
            if losses.requires_grad:
                losses.sum().backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter in small:
            parameter.requires_grad_(False)
            parameter.grad = None
    summed = {}
    for use in uses:
        there = [u for u in squares if (u.name, u.lead, u.inner) == (use.name, use.lead, use.outer)]
        if there:
            summed[use] = sum(squares[u] for u in there)
    return _per_output(uses, summed, part)


def _streamed_curvature(
    model: nn.Module,
    names: list[str],
    inner: Mapping[str, set[int]],
    uses: set[Use],
    batch: Batch,
    losses_of: SampleLosses,
    streaming: Streaming,
) -> dict[Use, float]:
    """The same, from a first-order pass block by block."""
    from llmprune.out_of_core.block_stream import block_streamed_sums

    length = max(1, batch.tokens // batch.samples)
    part = batch.take(0, min(batch.samples, -(-GRADIENT_TOKENS // length)))
    squares: dict[str, float] = {}

    def watch(name: str, dy: torch.Tensor) -> None:
        squares[name] = squares.get(name, 0.0) + float(dy.double().square().sum())

    if any(use.lead is not None for use in uses):
        raise InputError(
            f"{type(model).__name__} has stacks of experts, whose curvature is taken of models in memory alone: load "
            "the model, or score by gradients or by fluctuation"
        )
    block_streamed_sums(
        *(model, part, losses_of, names, lookup("vector"), replace(streaming, state=None)),
        progress=lambda name: None,
        watch=watch,
    )
    summed = {use: squares[use.name] for use in uses if use.name in squares}
    return _per_output({use for use in uses if use.inner in inner[use.name]}, summed, part)


def _per_output(uses: set[Use], squares: Mapping[Use, float], part: Batch) -> dict[Use, float]:
    """Half the mean square of one output's gradient, from the sums of squares over all outputs of a use and tokens.

    The mean is over all tokens, of what those have that come by the use; losses are means over their samples.
    """
    length = max(1, part.tokens // part.samples)
    found = {
        use: 0.5 * squares[use] / (part.samples * length) * length**2 / max(1, use.count)
        for use in uses
        if use in squares and use.taps == 1
    }
    mean = float(np.mean(list(found.values()))) if found else 1.0
    return {use: found.get(use, mean) or np.finfo(np.float64).tiny for use in uses}


class _Done(Exception):
    """Every consumer has been met: the rest of the forward pass is not needed."""


class _Scorer:
    """Gathers moments while the passes run, and scores an axis once its consumers have been met as often as expected.

    Args:
        graph: the model's graph.
        weights: name -> parameter.
        axes, outer, rule: as for :func:`activation_scores`.
        curvature: of each use; those that are missing have 1.
        expected: how often each use will be met in a pass; empty: nothing is scored before :meth:`finish`.
        passes: how many passes there are.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, torch.Tensor],
        axes: Sequence[Axis],
        outer: Mapping[int, Around],
        rule: Importance,
        curvature: Mapping[Use, float],
        expected: Counter[Use],
        passes: int,
    ) -> None:
        self._graph, self._weights, self._outer, self._rule = graph, weights, outer, rule
        self._axes = {axis.id: axis for axis in axes}
        self._places = {axis.id: {(m.parameter, m.dim) for m in axis.members} for axis in axes}
        self._curvature = curvature
        self._left = Counter({use: count * passes for use, count in expected.items()})
        self._expected, self._here = expected.total(), 0
        self._moments: dict[Use, Moments] = {}
        self._scored: set[int] = set()
        self._told: set[int] = set()
        self.late = False
        self.flat: dict[int, np.ndarray] = {}
        self.nested: dict[int, np.ndarray] = {}

    def begin(self) -> None:
        """Another pass begins."""
        self._here = 0

    def see(self, use: Use, x: torch.Tensor, _y: torch.Tensor) -> None:
        """Count a use's inputs in."""
        if self.late:
            raise _Done
        if use.taps == 1:
            self._moments.setdefault(use, Moments()).add(x.reshape(-1, x.shape[-1]), self._rule.gram)
        if not self._expected:
            return
        self._left[use] -= 1
        self._here += 1
        self.late = self._left[use] < 0
        if not self.late and not self._left[use]:
            place = (use.name, use.inner)
            for axis in [axis for axis, places in self._places.items() if place in places]:
                if all(not n for u, n in self._left.items() if (u.name, u.inner) in self._places[axis]):
                    self._score(axis)
            self._release()
        if self.late or self._here == self._expected:
            raise _Done

    def since(self) -> Sums | None:
        """What has been scored since this was last asked; None while moments of something unscored are held."""
        if self._moments or self.late:
            return None
        new = self._scored - self._told
        self._told |= new
        found = {"flat": self.flat, "nested": self.nested}
        return {f"{kind}-{n}": [of[n]] for kind, of in found.items() for n in sorted(new) if n in of}

    def restore(self, sums: Sums) -> None:
        """Take over what an earlier process had scored; its consumers will not be met again."""
        for name, (values,) in sums.items():
            kind, _, number = name.rpartition("-")
            (self.flat if kind == "flat" else self.nested)[int(number)] = values
            self._scored.add(int(number))
        self._told |= self._scored
        waiting = self._waiting()
        for use, count in self._left.items():
            if (use.name, use.inner) not in waiting:
                self._expected -= count
                self._left[use] = 0

    def finish(self) -> None:
        """Score what is left."""
        for axis in self._axes:
            if axis not in self._scored:
                self._score(axis)
        self._moments.clear()
        self.flat = {axis: self.flat[axis] for axis in self._axes if axis in self.flat}
        self.nested = {axis: self.nested[axis] for axis in self._axes if axis in self.nested}

    def _waiting(self) -> set[tuple[str, int]]:
        """The places of axes that are not scored yet."""
        return {
            place for axis, places in self._places.items() if axis not in self._scored for place in places
        }

    def _release(self) -> None:
        """Let go of moments that no axis waits for."""
        waiting = self._waiting()
        for use in [use for use in self._moments if (use.name, use.inner) not in waiting]:
            del self._moments[use]

    def _score(self, number: int) -> None:
        self._scored.add(number)
        axis = self._axes[number]
        consumers = []
        for member in axis.members:
            for use, seen in self._moments.items():
                if (use.name, use.inner) != (member.parameter, member.dim):
                    continue
                if not bool(torch.isfinite(seen.square).all()):
                    raise CalibrationError(
                        f"the inputs of {use.name} are not finite on the calibration samples: run the model in "
                        "float32, or look for damaged weights"
                    )
                groups = np.asarray(member.positions).reshape(axis.size, -1)
                curvature = self._curvature.get(use, 1.0)
                consumers.append(Consumer(use.matrix(self._weights[use.name]), seen, groups, use, curvature))
        if not consumers:
            return
        self.flat[number] = self._rule.function(consumers)
        if number not in self._outer:
            return
        if self._outer[number].stacked:
            slices: dict[int, list[Consumer]] = {}
            for consumer in consumers:
                if consumer.use.lead is not None:
                    slices.setdefault(consumer.use.lead, []).append(consumer)
            self.nested[number] = np.stack(
                [
                    self._rule.function(slices[place]) if place in slices else self.flat[number]
                    for place in range(self._outer[number].size)
                ]
            )
        else:
            around = self._graph.axes[self._outer[number].axes[0]]
            apart = [_apart(consumer, around) for consumer in consumers]
            self.nested[number] = self._rule.function(apart).reshape(around.size, axis.size)


def _apart(consumer: Consumer, around: Axis) -> Consumer:
    """The same with a group for each pair of an outer index and an index, outer first."""
    owner = np.zeros(len(consumer.matrix), dtype=np.int64)
    for member in around.members:
        if (member.parameter, member.dim) == (consumer.use.name, consumer.use.inner):
            owner[member.positions] = np.arange(around.size)[:, None]
    rows = [row[owner[row] == index] for index in range(around.size) for row in consumer.groups]
    return replace(consumer, groups=np.stack(rows))
