"""Importances read off the inputs of the weights that consume an axis, in one forward pass and with no gradient.

An axis is consumed where a parameter is contracted along it (:mod:`llmprune.consumers`). With ``W`` (out x in) such a
parameter and ``x`` its inputs over the calibration tokens, what the removal of inputs ``P`` does to its outputs is

``obs``
    ``tr(W_P [(H^-1)_PP]^-1 W_P^T)`` with ``H = E[x x^T]`` plus a ridge: the squared output error that is left after the
    weights of the inputs that stay have made good what they can (optimal brain surgeon, Hassibi & Stork 1993; for
    groups: OBC, Frantar & Alistarh 2022, eq. 3; ZipLM, Kurtic et al. 2023, eq. 3). Groups go in rounds, each round the
    least of what is left; after each, ``H^-1`` and ``W`` become those of the smaller layer. A group's score is its
    error when it went, and always more than that of one which went before it.
``fluctuation``
    ``Var(x_i) |W_:i|^2``, summed over the group's inputs (FLAP, An et al. 2023, eq. 5).
``activation``
    ``sqrt(sum E[x_i^2])`` over the group's inputs (Minitron, Muralidharan et al. 2024, section 2.2, with the L2 norm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from llmprune.calibration import Batch
from llmprune.consumers import Taps, Use
from llmprune.errors import CalibrationError
from llmprune.loss import logits_of

if TYPE_CHECKING:
    from llmprune.apart import Around
    from llmprune.graph import Axis, Graph

RIDGE = 0.01
"""Added to the Gram matrix, in units of its mean diagonal."""
ROUNDS = 32
"""A round of ``obs`` takes one in so many of the groups that are left, at least one."""

Positions = np.ndarray


@dataclass
class _Moments:
    """Sums over the tokens that a use saw."""

    count: int = 0
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    square: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    """Elementwise, or whole (in x in) where it is needed."""

    def add(self, x: torch.Tensor, whole: bool) -> None:
        """Count more tokens in, x (tokens, in)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.count += len(x)
        self.total = self.total + x.sum(0).double()
        self.square = self.square + (x.t() @ x if whole else x.square().sum(0)).double()


def activation_scores(
    model: nn.Module,
    graph: Graph,
    axes: Sequence[Axis],
    outer: Mapping[int, Around],
    batch: Batch,
    name: str,
    batch_size: int | None,
    tick: Callable[[int], object],
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Scores of the axes that a parameter consumes; the others have none.

    Args:
        model: the model, lent out with gradients off.
        graph: its graph.
        axes: the axes to score.
        outer: axis id -> what lies around it, for the indices of which it may be cut apart. A slice of a stack that saw
            no token has the scores of the whole axis.
        batch: calibration samples.
        name: ``obs``, ``fluctuation`` or ``activation``.
        batch_size: samples that run at a time; None: all.
        tick: called with the number of samples done.

    Returns:
        Axis id -> (size,), and axis id -> (outer size, size), both float64.

    Raises:
        CalibrationError: a consumer's inputs are not finite.
    """
    inner: dict[str, set[int]] = {}
    for axis in axes:
        for member in axis.members:
            inner.setdefault(member.parameter, set()).add(member.dim)
    weights = {n: p.data for n, p in model.named_parameters() if n in inner}
    moments: dict[Use, _Moments] = {}

    def see(use: Use, x: torch.Tensor, _y: torch.Tensor) -> None:
        if use.taps == 1:
            moments.setdefault(use, _Moments()).add(x.reshape(-1, x.shape[-1]), name == "obs")

    step = batch_size or batch.samples
    with torch.no_grad(), Taps(weights, inner, see):
        for start in range(0, batch.samples, step):
            part = batch.take(start, min(start + step, batch.samples))
            logits_of(model, part.inputs)
            tick(part.samples)
    for use, seen in moments.items():
        if not bool(torch.isfinite(seen.square).all()):
            raise CalibrationError(
                f"the inputs of {use.name} are not finite on the calibration samples: run the model in float32, or "
                "look for damaged weights"
            )
    flat, nested = {}, {}
    for axis in axes:
        consumers = [
            _Consumer(
                use.matrix(weights[use.name]), seen, np.asarray(member.positions).reshape(axis.size, -1), use
            )
            for member in axis.members
            for use, seen in moments.items()
            if (use.name, use.inner) == (member.parameter, member.dim)
        ]
        if not consumers:
            continue
        flat[axis.id] = _SCORES[name](consumers)
        if axis.id in outer and outer[axis.id].stacked:
            slices: dict[int, list[_Consumer]] = {}
            for consumer in consumers:
                if consumer.use.lead is not None:
                    slices.setdefault(consumer.use.lead, []).append(consumer)
            nested[axis.id] = np.stack(
                [
                    _SCORES[name](slices[number]) if number in slices else flat[axis.id]
                    for number in range(outer[axis.id].size)
                ]
            )
        elif axis.id in outer:
            around = graph.axes[outer[axis.id].axes[0]]
            nested[axis.id] = _SCORES[name]([_apart(consumer, around) for consumer in consumers]).reshape(
                around.size, axis.size
            )
    return flat, nested


@dataclass
class _Consumer:
    """A use with what it saw, and for each group which of its inputs are the group's."""

    matrix: torch.Tensor
    """(inputs, outputs), a view of the weight."""
    seen: _Moments
    groups: Positions
    """(groups, inputs of each)."""
    use: Use


def _apart(consumer: _Consumer, around: Axis) -> _Consumer:
    """The same with a group for each pair of an outer index and an index, outer first."""
    owner = np.zeros(len(consumer.matrix), dtype=np.int64)
    for member in around.members:
        if (member.parameter, member.dim) == (consumer.use.name, consumer.use.inner):
            owner[member.positions] = np.arange(around.size)[:, None]
    rows = [row[owner[row] == index] for index in range(around.size) for row in consumer.groups]
    return _Consumer(consumer.matrix, consumer.seen, np.stack(rows), consumer.use)


def _activation(consumers: Iterable[_Consumer]) -> np.ndarray:
    sums = [(c.seen.square / c.seen.count).cpu().numpy()[c.groups].sum(1) for c in consumers]
    return np.asarray(np.sqrt(np.sum(sums, axis=0)))


def _fluctuation(consumers: Iterable[_Consumer]) -> np.ndarray:
    sums = []
    for c in consumers:
        mean = c.seen.total / c.seen.count
        variance = (c.seen.square / c.seen.count - mean.square()).clamp(min=0)
        norms = c.matrix.double().square().sum(1)
        sums.append((variance * norms).cpu().numpy()[c.groups].sum(1))
    return np.asarray(np.sum(sums, axis=0))


class _Shrinking:
    """One consumer while its groups go: the inverse Gram matrix and the weight over the inputs that are left."""

    def __init__(self, consumer: _Consumer) -> None:
        gram = consumer.seen.square / consumer.seen.count
        scale = float(gram.diagonal().mean()) or 1.0
        gram.diagonal().add_(RIDGE * scale)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        self.weight = consumer.matrix.double().t()
        self.groups = torch.as_tensor(consumer.groups, device=gram.device)

    def errors(self, alive: torch.Tensor) -> torch.Tensor:
        """The output error of removing each group of ``alive``."""
        groups = self.groups[alive]
        if groups.shape[1] == 1:
            column = groups[:, 0]
            return self.weight[:, column].square().sum(0) / self.inverse.diagonal()[column]
        blocks = self.inverse[groups[:, :, None], groups[:, None, :]]
        parts = self.weight[:, groups].permute(1, 2, 0)
        solved: torch.Tensor = torch.linalg.solve(blocks, parts)
        return (parts * solved).sum((1, 2))

    def remove(self, gone: torch.Tensor) -> None:
        """Take groups out: what is left of the weight makes good for them."""
        out = self.groups[gone].flatten()
        left = torch.ones(len(self.inverse), dtype=torch.bool, device=out.device).index_fill_(0, out, False)
        change = torch.linalg.solve(self.inverse[out][:, out], self.inverse[out][:, left])
        self.weight = self.weight[:, left] - self.weight[:, out] @ change
        self.inverse = self.inverse[left][:, left] - self.inverse[left][:, out] @ change
        self.groups = (left.cumsum(0) - 1)[self.groups]


def _obs(consumers: Iterable[_Consumer]) -> np.ndarray:
    layers = [_Shrinking(consumer) for consumer in consumers]
    count = len(layers[0].groups)
    scores = np.zeros(count)
    alive = torch.arange(count, device=layers[0].groups.device)
    highest = 0.0
    while len(alive):
        errors = torch.stack([layer.errors(alive) for layer in layers]).sum(0)
        order = torch.argsort(errors, stable=True)[: max(1, len(alive) // ROUNDS)]
        for place in order.tolist():
            highest = max(
                np.nextafter(highest, np.inf), float(errors[place])
            )  # the order is told by the scores
            scores[int(alive[place])] = highest
        gone = alive[order]
        if len(gone) < len(alive):
            for layer in layers:
                layer.remove(gone)
        stays = torch.ones(len(alive), dtype=torch.bool, device=alive.device).index_fill_(0, order, False)
        alive = alive[stays]
    return scores


_SCORES: dict[str, Callable[[list[_Consumer]], np.ndarray]] = {
    "obs": _obs,
    "fluctuation": _fluctuation,
    "activation": _activation,
}
