"""Least-squares repair: what is left of a pruned layer takes over what the removed part did, as far as it can.

The consumers of the removed axes (output and down projections, fused, transposed or stacked forms, convolutions) are
the products in which a parameter is contracted along a dimension that the plan cuts: nothing names them. Each gets new
weights for the inputs it keeps (:mod:`llmprune.least_squares`), fitted on calibration tokens, in one of two orders:

``sequential``
    Every calibration sample runs twice in one batch: as the original model would have it, and with the plan carried
    out up to where the pass has come. At each consumer the inputs of the second stream are fitted to what the removed
    ones contribute there, plus half of the distance to the first stream's outputs: all of it would chase errors that
    this layer cannot mend, none would let them add up. Then the second stream goes on with the repaired outputs.
``one-shot``
    The original model's inputs alone, restricted to what stays, are fitted to what the removed ones contribute.

The last samples are held out. They choose each consumer's ridge, with no change among the candidates, and in the end
the whole repair is dropped if the held-out loss did not fall.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from llmprune.calibration import Batch
from llmprune.compact import compacted_copy, gather
from llmprune.consumers import Taps, Use
from llmprune.depth import bypassed
from llmprune.errors import InputError
from llmprune.least_squares import fit
from llmprune.loss import SampleLosses, logits_of
from llmprune.streaming import undisturbed
from llmprune.sublayers import silenced
from llmprune.verify import experts_computed_by

HELD_OUT = 8
"""One sample in so many is held out."""
ORDERS = ("sequential", "one-shot")
DRIFT = 0.5
"""How much of the distance to the original's outputs a sequential fit aims to make good. Over the three TinyStories
models of the project's own measurements 0.25 to 0.75 are equal to 2 %; 0 and 1 are up to 6 % worse in perplexity."""
_SKETCH = 8


@dataclass(frozen=True)
class Repair:
    """What a repair found.

    Attributes:
        weights: parameter -> its new values, in the shape it has after compaction.
        ridges: parameter (with the index in a stack) -> ridge chosen, None where it was left alone.
        order: ``sequential`` or ``one-shot``.
        tokens: calibration tokens that were fitted.
        width: the largest number of inputs a consumer keeps.
        loss: held-out loss of the pruned model without the repair and with it; None where the model has none.
        kept: whether the repair is used: without it, ``weights`` is empty.
    """

    weights: Mapping[str, torch.Tensor] = field(repr=False)
    ridges: Mapping[str, float | None] = field(repr=False)
    order: str
    tokens: int
    width: int
    loss: tuple[float, float] | None
    kept: bool

    def __str__(self) -> str:
        if not self.ridges:
            return "repair: the plan leaves nothing to repair"
        change = "" if self.loss is None else f"held-out loss {self.loss[0]:.4f} -> {self.loss[1]:.4f}"
        if not self.kept:
            return f"repair: none, since none is better on the held-out samples {change}".rstrip()
        done = sum(ridge is not None for ridge in self.ridges.values())
        return (
            f"repair: {done} of {len(self.ridges)} consumers by least squares "
            f"({', '.join(filter(None, (self.order, f'{self.tokens:,} tokens', change)))})"
        )

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object, without the weights."""
        return {
            "order": self.order,
            "tokens": self.tokens,
            "kept": self.kept,
            "loss": None if self.loss is None else dict(zip(("before", "after"), self.loss, strict=True)),
            "ridges": dict(self.ridges),
        }


def repair(model: nn.Module, plan: Any, batch: Batch, *, order: str = "sequential") -> Repair:
    """Fit the consumers of what ``plan`` removes; ``model`` is left as it was.

    Args:
        model: the model the plan was made for, not yet compacted, with its weights.
        plan: a :class:`llmprune.plan.Plan`.
        batch: calibration samples, at least two.
        order: ``sequential`` or ``one-shot``.

    Returns:
        The :class:`Repair`; its weights go to :func:`llmprune.compact.compact`.

    Raises:
        InputError: an unknown order, or a single sample.
        PlanError, TensorError: as :func:`llmprune.compact`.
    """
    if order not in ORDERS:
        raise InputError(f"unknown order of repair {order!r}: there are {' and '.join(ORDERS)}")
    if batch.samples < 2:
        raise InputError(
            "a repair needs at least two calibration samples: one of them is held out to judge it"
        )
    held = max(1, batch.samples // HELD_OUT)
    fitted, judged = batch.samples - held, batch.take(batch.samples - held, batch.samples)
    # A loop over the experts multiplies by parts of their stacks, which can be told; other ways copy them first.
    with undisturbed(model), experts_computed_by("eager", model), torch.no_grad():
        work = _Repairer(model, plan, batch.samples, held)
        work.run(batch, order == "sequential")
        loss = None
        if work.repaired:
            before = _loss(compacted_copy(model, plan), judged)
            after = _loss(compacted_copy(model, plan, work.repaired), judged)
            loss = None if before is None or after is None else (before, after)
    kept = bool(work.repaired) and (loss is None or loss[1] < loss[0])
    weights = {name: work.repaired[name] for name in sorted(work.repaired)} if kept else {}
    return Repair(weights, work.ridges, order, batch.take(0, fitted).tokens, work.width, loss, kept)


def _loss(model: nn.Module, batch: Batch) -> float | None:
    """The mean loss of the samples; None for a model without a loss of its own."""
    try:
        losses = SampleLosses(model.eval(), None, batch)
    except InputError:
        return None
    samples = (batch.take(number, number + 1) for number in range(batch.samples))
    return sum(float(losses(sample).double().sum()) for sample in samples) / batch.samples


class _Repairer:
    """Carries out a plan on the activations of a forward pass, and repairs each consumer when the pass meets it.

    Args:
        model: the model.
        plan: the plan.
        samples: calibration samples.
        held: how many of them, the last, are held out.
    """

    def __init__(self, model: nn.Module, plan: Any, samples: int, held: int) -> None:
        self._model, self._samples, self._held = model, samples, held
        self._weights = {name: p.data for name, p in model.named_parameters() if name in plan.kept}
        self._kept = {name: plan.kept[name] for name in self._weights}
        self._drops = list(getattr(plan, "layers", ()))
        self._parts = list(getattr(plan, "sublayers", ()))
        self._changes: dict[Use, torch.Tensor | None] = {}
        self._doubled = self._carry_out = False
        self._left = 0
        self.repaired: dict[str, torch.Tensor] = {}
        self.ridges: dict[str, float | None] = {}
        self.width = 0

    def run(self, batch: Batch, sequential: bool) -> None:
        """Repair every consumer that a pass over ``batch`` meets."""
        uses, apart = self._survey(batch.sketch(_SKETCH))
        self._carry_out, self._doubled = sequential, sequential and apart
        self._left = sum(uses.values())
        inputs = batch.inputs
        if self._doubled:
            inputs = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
        drops = self._drops if sequential else ()
        parts = self._parts if sequential else ()
        taps = Taps(self._weights, self._kept, self._meet)
        with taps, bypassed(self._model, drops, self._past), silenced(self._model, parts, self._quiet):
            _forward(self._model, Batch(inputs, batch.hash))

    def _past(self, into: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """What comes out of a block that goes: of the second stream, what went in."""
        return torch.cat([out.chunk(2)[0], into.chunk(2)[1]]) if self._doubled else into

    def _quiet(self, out: torch.Tensor) -> torch.Tensor:
        """What a branch that goes adds: to the second stream, nothing."""
        return torch.cat([out.chunk(2)[0], out.chunk(2)[1] * 0]) if self._doubled else out * 0

    def _survey(self, batch: Batch) -> tuple[Counter[Use], bool]:
        """How often a pass makes each use; and whether all keep the rows of two samples apart, one after the other."""
        uses: Counter[Use] = Counter()
        apart = True

        def see(use: Use, x: torch.Tensor, _y: torch.Tensor) -> None:
            nonlocal apart
            uses[use] += 1
            rows = x.reshape(-1, x.shape[-1])
            first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
            alike = len(first) == len(second) and torch.allclose(first, second, rtol=1e-3)
            apart = apart and alike and use.lead is None

        twice = {
            name: tensor[:1].repeat(2, *[1] * (tensor.dim() - 1)) for name, tensor in batch.inputs.items()
        }
        with Taps(self._weights, self._kept, see):
            _forward(self._model, Batch(twice, batch.hash))
        return uses, apart

    def _meet(self, use: Use, x: torch.Tensor, y: torch.Tensor) -> None:
        shape, x = y.shape, x.reshape(-1, x.shape[-1])
        flat = y.reshape(x.shape[0], -1)
        pruned = flat
        if self._doubled:
            original, pruned = flat.chunk(2)
            x = x.chunk(2)[1]
        matrix = use.matrix(self._weights[use.name])
        stay, outputs = self._inputs(use, x.device), self._outputs(use, x.device)
        gone = torch.ones(x.shape[1], dtype=torch.bool, device=x.device).index_fill_(0, stay, False)
        missing = x[:, gone] @ matrix[gone]
        x = x[:, stay]
        if use not in self._changes:
            wanted = missing + DRIFT * (original - pruned) if self._doubled else missing
            self._changes[use] = self._solve(use, x, wanted[:, outputs])
        if self._carry_out:
            pruned = pruned - missing
            change = self._changes[use]
            if change is not None:
                pruned[:, outputs] += x @ change.to(x.dtype)
            if len(outputs) < pruned.shape[1]:
                pruned = torch.zeros_like(pruned).index_copy_(1, outputs, pruned[:, outputs])
            y.copy_((torch.cat([original, pruned]) if self._doubled else pruned).view(shape))
        self._left -= 1
        if not self._left:
            raise _Done

    def _solve(self, use: Use, x: torch.Tensor, r: torch.Tensor) -> torch.Tensor | None:
        """Fit a use's change, and put it into what the parameter will be."""
        held = max(1, len(x) * self._held // self._samples)
        small = self._in_small(use)
        if small is None or held >= len(x):
            return None
        self.width = max(self.width, x.shape[1])
        found = fit(x, r, held)
        self.ridges[use.name if use.lead is None else f"{use.name}[{use.lead}]"] = found.ridge
        if found.change is not None:
            if use.name not in self.repaired:
                self.repaired[use.name] = gather(self._weights[use.name], self._kept[use.name])
            matrix = small.matrix(self.repaired[use.name])
            matrix += found.change.to(matrix.dtype)
        return found.change

    def _inputs(self, use: Use, device: torch.device) -> torch.Tensor:
        """Which of a use's inputs stay."""
        kept = torch.as_tensor(self._of_slice(use, use.inner), device=device)
        return (kept[:, None] * use.taps + torch.arange(use.taps, device=device)).flatten()

    def _outputs(self, use: Use, device: torch.device) -> torch.Tensor:
        """Which of a use's outputs stay, within its window."""
        if use.outer not in self._kept[use.name]:
            return torch.arange(use.count, device=device)
        kept = self._of_slice(use, use.outer)
        inside = kept[(kept >= use.first) & (kept < use.first + use.count)]
        return torch.as_tensor(inside - use.first, device=device)

    def _of_slice(self, use: Use, dim: int) -> np.ndarray:
        """What the use's slice of a stack keeps of a dimension; of a slice that goes, what another one keeps."""
        kept: np.ndarray = np.atleast_2d(self._kept[use.name][dim])
        row: np.ndarray = kept[(self._number(use) or 0) if len(kept) > 1 else 0]
        return row

    def _number(self, use: Use) -> int | None:
        """The number of the use's slice in the compacted stack; None for no stack, or a slice that goes."""
        slices = self._kept[use.name].get(0)
        if use.lead is None or slices is None:
            return use.lead
        return int(np.searchsorted(slices, use.lead)) if use.lead in slices else None

    def _in_small(self, use: Use) -> Use | None:
        """The same part of the compacted parameter; None where nothing of it stays."""
        lead, first, count = self._number(use), use.first, use.count
        if lead is None and use.lead is not None:
            return None
        if use.outer in self._kept[use.name]:
            first, end = np.searchsorted(self._of_slice(use, use.outer), [first, first + count]).tolist()
            count = end - first
        return replace(use, lead=lead, first=first, count=count) if count else None


class _Done(Exception):
    """Every consumer has been met: the rest of the forward pass is not needed."""


def _forward(model: nn.Module, batch: Batch) -> None:
    try:
        logits_of(model, batch.inputs)
    except _Done:
        return
