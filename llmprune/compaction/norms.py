"""Root-mean-square norms over an axis that loses indices, scaled so that they compute what the masked ones do.

A norm ``y = (w + o) * x / sqrt(mean(x^2) + eps)`` over N positions, of which N' stay and the others are zero, has the
mean ``sum(x^2) / N``; cut to N' positions it has ``sum(x^2) / N'``. With ``(w' + o) = (w + o) * sqrt(N / N')`` and
``eps' = eps * N / N'`` both are equal, whatever x is. (o is 0, or 1 in models that store a norm's weight less one.)

Which modules are such norms is asked of the modules: of those in which the trace saw a mean over an axis, a copy is run
on numbers, and counts if it computes this formula with an epsilon that is one of its attributes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from llmprune.tracing.tape import TENSOR, Tape, arguments

if TYPE_CHECKING:
    from llmprune.tracing.graph import Graph, MarkedOp

NORMS = ("rescaled", "kept")
"""What a norm becomes that loses positions: ``rescaled`` to the mean over all positions, removed ones being zero, or as
it is, with the mean over the ``kept`` positions."""

REMAINS = "a mean over it is of values that zero weights do not make zero"
"""The core's mark on an axis over which no factor makes good for what is missing: where queries are zero, attention
still gives the mean of the values."""

_MEANS = frozenset({"aten::mean", "aten::rms_norm", "aten::_fused_rms_norm"})
_ACCURACY = 1e-4  # norms compute in float32
_Found = tuple[float, str, float]


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm.

    Attributes:
        module: its path.
        parameter: canonical name of its weight.
        offset: what is added to the weight before it multiplies: 0 or 1.
        attribute: name of the attribute that holds its epsilon.
        epsilon: its value.
    """

    module: str
    parameter: str
    offset: float
    attribute: str
    epsilon: float


@dataclass(frozen=True)
class Rescale:
    """A norm's weight to be scaled when it is cut: ``(w + offset) * sqrt(before / after) - offset``."""

    parameter: str
    offset: float
    before: int
    after: int

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The scaled weight, in its own dtype."""
        factor = (self.before / self.after) ** 0.5
        scaled: torch.Tensor = (weight.double() + self.offset) * factor - self.offset
        return scaled.to(weight.dtype)


def find_norms(model: nn.Module, tape: Tape) -> list[list[Any]]:
    """The root-mean-square norms among the modules that took a mean on ``tape``; fields of :class:`Norm`, JSON values.

    A norm whose weight another module holds too is none: scaling it would change the other.
    """
    paths = dict.fromkeys(tape.scopes[op[4]] for op in tape.ops if op[0] in _MEANS)
    modules = dict(model.named_modules())
    names: dict[int, str] = {id(p): name for name, p in reversed(list(model.named_parameters()))}
    held: dict[int, int] = {}
    for module in modules.values():
        for parameter in module._parameters.values():
            held[id(parameter)] = held.get(id(parameter), 0) + 1
    known: dict[Any, _Found | None] = {}
    found = []
    for path in paths:
        module = modules.get(path)
        own = [] if module is None else [p for p in module.parameters() if p.dim() == 1]
        if module is None or len(own) != 1 or len(list(module.parameters())) != 1 or held[id(own[0])] != 1:
            continue
        key = (type(module), len(own[0]), tuple(sorted(_floats(module).items())))
        if key not in known:
            known[key] = _probe(module, len(own[0]))
        answer = known[key]
        if answer is not None:
            found.append([path, names[id(own[0])], *answer])
    return found


def _floats(module: nn.Module) -> dict[str, float]:
    return {name: value for name, value in vars(module).items() if type(value) is float}


def _probe(module: nn.Module, size: int) -> _Found | None:
    """(offset, attribute, epsilon) of the formula that a module computes; None if it is another.

    The module runs on numbers as small as its epsilon is, so that the formula is seen whole.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, size, generator=generator, dtype=torch.float64)
    weights = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
    try:
        twin = copy.deepcopy(module)
        twin = (
            (twin.to_empty(device="cpu") if next(twin.parameters()).is_meta else twin.to("cpu"))
            .double()
            .eval()
        )
        (weight,) = twin.parameters()
        weight.requires_grad_(False)

        def run(value: torch.Tensor, scale: float) -> torch.Tensor:
            weight.copy_(value)
            result: torch.Tensor = twin(x * scale)
            return result.double()

        matching = []
        for name, epsilon in _floats(module).items():
            if not 0 < epsilon < 1:
                continue
            scale = epsilon**0.5
            normed = x * scale / ((x * scale).square().mean(-1, keepdim=True) + epsilon).sqrt()
            for offset in (0.0, 1.0):
                got = run(weights, scale)
                if got.shape == x.shape and torch.allclose(
                    got, normed * (weights + offset), rtol=_ACCURACY, atol=_ACCURACY
                ):
                    matching.append((offset, name, epsilon))
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError):
        return None  # it wants other arguments: no plain norm
    return matching[0] if len(matching) == 1 else None


def rescales(
    graph: Graph, marked: Sequence[MarkedOp], removed: Mapping[int, npt.NDArray[np.int64]]
) -> tuple[list[MarkedOp], list[tuple[Norm, Rescale]]]:
    """Tell marked operations that a rescaled norm makes exact from those that remain.

    An axis is rescaled in all of the operations that normalise over it, or in none; in none where what goes would not
    have been zero (:data:`REMAINS`).

    Args:
        graph: the graph.
        marked: its operations that normalise over what a plan removes.
        removed: axis id -> removed indices.

    Returns:
        The operations that still need a masked form, and the norms to rescale.
    """
    norms = {norm.module: norm for norm in (Norm(*fields) for fields in graph.tape.norms)}
    axes = [_axes_of(graph, op) & removed.keys() for op in marked]
    fit = [
        op.module in norms
        and op.name in _MEANS
        and graph.parameters.get(norms[op.module].parameter) == (op.size,)
        for op in marked
    ]
    lasting = {axis for axis in removed if any(mark.startswith(REMAINS) for mark in graph.axes[axis].marks)}
    while True:
        stuck = lasting | {axis for fits, own in zip(fit, axes, strict=True) if not fits for axis in own}
        now = [fits and not own & stuck for fits, own in zip(fit, axes, strict=True)]
        if now == fit:
            break
        fit = now
    chosen = {op.module: op for op, fits in zip(marked, fit, strict=True) if fits}
    pairs = [
        (norms[path], Rescale(norms[path].parameter, norms[path].offset, op.size, len(op.kept)))
        for path, op in chosen.items()
    ]
    return [op for op, fits in zip(marked, fit, strict=True) if not fits], pairs


def _axes_of(graph: Graph, op: MarkedOp) -> set[int]:
    """The axes in the dimension that a marked operation normalises over."""
    number = graph.numbered(op.name, op.nth)
    values = arguments(graph.tape.ops[number][2])[op.arg]
    tensor = values[1][0] if values[0] == TENSOR else -1
    return set(graph.dim_axes(tensor, op.dim)) if tensor >= 0 else set()
