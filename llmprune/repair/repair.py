"""Least-squares repair: what is left of a pruned layer takes over what the removed part did, as far as it can.

The consumers of the removed axes (output and down projections, fused, transposed or stacked forms, convolutions) are
the products in which a parameter is contracted along a dimension that the plan cuts: nothing names them. Each gets new
weights for the inputs it keeps (:mod:`llmprune.repair.least_squares`), and a new bias where it has one, fitted on
calibration tokens, in one of two orders:

``sequential``
    Every calibration sample runs twice in one batch: as the original model would have it, and with the plan carried
    out up to where the pass has come. At each consumer the inputs of the second stream are fitted to what the removed
    ones contribute there, plus half of the distance to the first stream's outputs: all of it would chase errors that
    this layer cannot mend, none would let them add up. Every other product on the way, whose inputs differ between the
    streams and whose weight is used once and nowhere else, is adjusted likewise to give the first stream's outputs.
    Then the second stream goes on with the repaired outputs.
``one-shot``
    The original model's inputs alone, restricted to what stays, are fitted to what the removed ones contribute.

A model whose weights are in their files runs block by block, and what a block's weights will be waits in a file of a
folder: of the fits one block's are in memory.

One sample in eight is held out. They choose each fit's ridge, with no change among the candidates, and in the end the
whole repair is dropped if the held-out loss did not fall.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmprune.compaction.compact import compacted_copy, gather
from llmprune.compaction.depth import bypassed
from llmprune.compaction.verify import experts_computed_by
from llmprune.errors import InputError
from llmprune.out_of_core.block_taps import check_room, inside_blocks, tapping
from llmprune.out_of_core.masked import judge_by_blocks
from llmprune.out_of_core.spill import Spill
from llmprune.out_of_core.stored import source_of
from llmprune.repair.consumers import Taps, Use, id_of
from llmprune.repair.least_squares import Fit, Inputs, fit
from llmprune.scoring.calibration import Batch
from llmprune.scoring.loss import SampleLosses, logits_of
from llmprune.scoring.streaming import undisturbed
from llmprune.tracing.scope import under
from llmprune.tracing.sublayers import silenced

log = logging.getLogger(__name__)

HELD_OUT = 8
"""One sample in so many is held out."""
ORDERS = ("sequential", "one-shot")
DRIFT = 0.5
"""How much of the distance to the original's outputs a sequential fit aims to make good. Over the three TinyStories
models of the project's own measurements 0.25 to 0.75 are equal to 2 %; 0 and 1 are up to 6 % worse in perplexity."""
ADJUST = 0.75
"""The same for the products that only get other inputs; on those models 0.5 to 1 are equal to 2 %."""
ADJUST_RIDGES = (0.1, 0.3, 1.0)
ENOUGH = 10
"""Tokens for each input of the widest consumer, below which a repair leaves much to be had."""
_SKETCH = 8
_JUDGED_TOKENS = 1024
"""Tokens of a forward pass when the held-out loss is taken."""
_SAME = 1e-6
"""Outputs of the streams that differ by less, relatively, are equal."""


@dataclass(frozen=True)
class Repair:
    """What a repair found.

    Attributes:
        weights: parameter -> its new values, in the shape it has after compaction.
        ridges: consumer (a parameter, with the index in a stack) -> ridge chosen, None where its weight was left alone.
        biases: names of the biases that were fitted.
        adjusted: names of the weights that were adjusted, because their inputs changed.
        order: ``sequential`` or ``one-shot``.
        tokens: calibration tokens that were fitted.
        width: the largest number of inputs a consumer keeps.
        loss: held-out loss of the pruned model without the repair and with it; None where the model has none.
        kept: whether the repair is used: without it, ``weights`` is empty.
    """

    weights: Mapping[str, torch.Tensor] = field(repr=False)
    ridges: Mapping[str, float | None] = field(repr=False)
    biases: list[str] = field(repr=False)
    adjusted: list[str] = field(repr=False)
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
        more = f" and {len(self.adjusted)} weights adjusted" if self.adjusted else ""
        return (
            f"repair: {done} of {len(self.ridges)} consumers by least squares{more} "
            f"({', '.join(filter(None, (self.order, f'{self.tokens:,} tokens', change)))})"
        )

    @property
    def warning(self) -> str | None:
        """One sentence where there were few tokens; else None."""
        if not self.ridges or self.tokens >= ENOUGH * self.width:
            return None
        return (
            f"the repair was fitted on {self.tokens:,} tokens, but its widest consumer keeps {self.width:,} inputs: "
            f"{ENOUGH * self.width:,} tokens would do better (--repair-calibration, --samples)"
        )

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object, without the weights."""
        return {
            "order": self.order,
            "tokens": self.tokens,
            "kept": self.kept,
            "loss": None if self.loss is None else dict(zip(("before", "after"), self.loss, strict=True)),
            "ridges": dict(self.ridges),
            "biases": self.biases,
            "adjusted": self.adjusted,
            "warning": self.warning,
        }


def repair(
    model: nn.Module,
    plan: Any,
    batch: Batch,
    *,
    order: str = "sequential",
    judged: bool = True,
    folder: Path | None = None,
    budget: int | None = None,
) -> Repair:
    """Fit the consumers of what ``plan`` removes; ``model`` is left as it was.

    Args:
        model: the model the plan was made for, not yet compacted, with its weights, or as
            :func:`llmprune.open_model` makes it.
        plan: a :class:`llmprune.planning.plan.Plan`.
        batch: calibration samples, at least two.
        order: ``sequential`` or ``one-shot``.
        judged: whether the whole repair is dropped if the held-out loss does not fall.
        folder: of a model whose weights are in their files, where new ones are put; the caller removes it.
        budget: bytes of memory that the process may have meanwhile; None: what the machine has free.

    Returns:
        The :class:`Repair`; its weights go to :func:`llmprune.compaction.compact.compact`.

    Raises:
        InputError: an unknown order, a single sample, or a budget that is too small.
        PlanError, TensorError: as :func:`llmprune.compact`.
    """
    if order not in ORDERS:
        raise InputError(f"unknown order of repair {order!r}: there are {' and '.join(ORDERS)}")
    if batch.samples < 2:
        raise InputError(
            "a repair needs at least two calibration samples: one of them is held out to judge it"
        )
    fitted = [i for i in range(batch.samples) if i % HELD_OUT != HELD_OUT - 1]
    if len(fitted) == batch.samples:
        fitted.pop()
    held = batch.samples - len(fitted)
    places = torch.tensor([*fitted, *sorted(set(range(batch.samples)) - set(fitted))])
    batch = Batch({name: t[places.to(t.device)] for name, t in batch.inputs.items()}, batch.hash)
    last = batch.take(len(fitted), batch.samples)
    streamed = source_of(model) is not None
    # A loop over the experts multiplies by parts of their stacks, which can be told; other ways copy them first.
    with undisturbed(model), experts_computed_by("eager", model), torch.no_grad():
        work = _Repairer(model, plan, batch.samples, held, Spill(folder) if folder is not None else None)
        if streamed:
            check_room(model, 2 * batch.tokens, work.solving(batch.tokens), budget, "repairing")
        work.run(batch, order == "sequential")
        repaired: Mapping[str, torch.Tensor] = work.repaired
        if work.spill is not None:
            work.flush()
            repaired = work.spill
        loss = None
        if repaired and judged:
            loss = (judge_by_blocks if streamed else _judge)(model, plan, repaired, last)
    kept = bool(repaired) and (loss is None or loss[1] < loss[0])
    weights: Mapping[str, torch.Tensor] = {}
    if kept:
        weights = repaired if streamed else {name: repaired[name] for name in sorted(repaired)}
    tokens = batch.take(0, len(fitted)).tokens
    found = Repair(
        weights,
        work.ridges,
        sorted(work.biased),
        sorted(work.adjusted),
        order,
        tokens,
        work.width,
        loss,
        kept,
    )
    if judged and found.warning is not None:
        log.warning("%s", found.warning)
    return found


def _judge(
    model: nn.Module, plan: Any, repaired: Mapping[str, torch.Tensor], batch: Batch
) -> tuple[float, float] | None:
    """The pruned model's mean loss before and after it gets the repaired weights; None for one without a loss."""
    small = compacted_copy(model, plan).eval()
    try:
        losses = SampleLosses(small, None, batch)
    except InputError:
        return None
    step = max(1, _JUDGED_TOKENS * batch.samples // batch.tokens)

    def mean() -> float:
        parts = (batch.take(i, min(i + step, batch.samples)) for i in range(0, batch.samples, step))
        return sum(float(losses(part).double().sum()) for part in parts) / batch.samples

    before = mean()
    if getattr(plan, "layers", ()):  # the names have changed with the layers' numbers
        del small
        losses = SampleLosses(compacted_copy(model, plan, repaired).eval(), None, batch)
        return before, mean()
    # The copy shares with the model what the plan does not cut: it gets parameters of its own.
    places = {id(p): name for name, p in small.named_parameters()}
    for module in small.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if (values := repaired.get(places[id(parameter)])) is not None:
                setattr(module, key, nn.Parameter(values, requires_grad=False))
    return before, mean()


class _Repairer:
    """Carries out a plan on the activations of a forward pass, and repairs each consumer when the pass meets it.

    Args:
        model: the model.
        plan: the plan.
        samples: calibration samples.
        held: how many of them, the last, are held out.
        spill: where what a block's weights will be goes when the next block comes; None: it stays in memory.
    """

    def __init__(
        self, model: nn.Module, plan: Any, samples: int, held: int, spill: Spill | None = None
    ) -> None:
        self._model, self._samples, self._held, self.spill = model, samples, held, spill
        self._kept = dict(plan.kept)
        self._cut = {name for name, p in model.named_parameters() if name in plan.kept}
        scope = getattr(plan, "options", {}).get("scope")
        self._drops = list(getattr(plan, "layers", ()))
        self._parts = list(getattr(plan, "sublayers", ()))
        gone = tuple(prefix for drop in [*self._drops, *self._parts] for prefix in drop.prefixes)
        named = {n: p.data for n, p in model.named_parameters() if not (gone and n.startswith(gone))}
        self._biases = {name: p for name, p in named.items() if p.dim() == 1}
        self._weights = {
            name: p
            for name, p in named.items()
            if name in self._cut
            or (p.dim() == 2 and p.is_floating_point() and (not scope or under(name, scope)))
        }
        if spill is not None:  # outside the blocks nothing is adjusted
            inside = inside_blocks(model)
            self._weights = {n: p for n, p in self._weights.items() if n in inside or n in self._cut}
        self._inner = {name: set(range(p.dim())) for name, p in self._weights.items()}
        self._changes: dict[Use, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        self._doubled = self._carry_out = False
        self._adjustable: set[str] = set()
        self._left = 0
        self._ahead: Counter[Use] = Counter()
        self._last: tuple[Any, torch.Tensor, Inputs] | None = None
        self.repaired: dict[str, torch.Tensor] = {}
        self.ridges: dict[str, float | None] = {}
        self.biased: set[str] = set()
        self.adjusted: set[str] = set()
        self.width = 0

    def run(self, batch: Batch, sequential: bool) -> None:
        """Repair every consumer that a pass over ``batch`` meets."""
        uses, apart, elsewhere = self._survey(batch.sketch(_SKETCH))
        self._carry_out, self._doubled = sequential, sequential and apart
        self._left = sum(count for use, count in uses.items() if self._consumes(use))
        self._ahead = uses.copy()
        if not self._left:
            return
        if self._doubled:
            often = Counter(use.name for use in uses.elements())
            self._adjustable = {
                use.name
                for use in uses
                if use.lead is None
                and not self._consumes(use)
                and often[use.name] == 1
                and use.name not in elsewhere
            }
        inner = {
            name: dims if name in self._adjustable else set(self._kept.get(name, {}))
            for name, dims in self._inner.items()
            if name in self._adjustable or name in self._cut
        }
        inputs = batch.inputs
        if self._doubled:
            inputs = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
        drops = self._drops if sequential else ()
        parts = self._parts if sequential else ()
        taps = Taps(self._weights, inner, self._meet, self._biases)
        with (
            self._tapping(taps, batch),
            bypassed(self._model, drops, self._past),
            silenced(self._model, parts, self._quiet),
        ):
            _forward(self._model, Batch(inputs, batch.hash))

    def _consumes(self, use: Use) -> bool:
        """Whether the plan cuts what a use contracts."""
        return use.name in self._cut and use.inner in self._kept[use.name]

    def _past(self, into: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """What comes out of a block that goes: of the second stream, what went in."""
        return torch.cat([out.chunk(2)[0], into.chunk(2)[1]]) if self._doubled else into

    def _quiet(self, out: torch.Tensor) -> torch.Tensor:
        """What a branch that goes adds: to the second stream, nothing."""
        return torch.cat([out.chunk(2)[0], out.chunk(2)[1] * 0]) if self._doubled else out * 0

    def _survey(self, batch: Batch) -> tuple[Counter[Use], bool, set[str]]:
        """How a pass uses the weights.

        Returns:
            How often it makes each use; whether all consumers keep the rows of two samples apart, one after the other;
            and which weights other operations read as well.
        """
        uses: Counter[Use] = Counter()
        apart = True

        def see(use: Use, x: torch.Tensor, _y: torch.Tensor) -> None:
            nonlocal apart
            uses[use] += 1
            if not self._consumes(use):
                return
            rows = x.reshape(-1, x.shape[-1])
            first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
            alike = len(first) == len(second) and torch.allclose(first, second, rtol=1e-3)
            apart = apart and alike and use.lead is None

        twice = {
            name: tensor[:1].repeat(2, *[1] * (tensor.dim() - 1)) for name, tensor in batch.inputs.items()
        }
        taps = Taps(self._weights, self._inner, see, self._biases)
        taps.elsewhere = set()
        with self._tapping(taps, batch):
            _forward(self._model, Batch(twice, batch.hash))
        return uses, apart, taps.elsewhere

    def _tapping(self, taps: Taps, batch: Batch) -> AbstractContextManager[None]:
        return tapping(self._model, taps, batch, lambda name: self.flush())

    def flush(self) -> None:
        """A block is done: put away what its weights will be, where they do not stay, and forget how they change."""
        if self.spill is not None and self.repaired:
            self.spill.put(self.repaired)
            self.repaired = {}
        self._changes = {use: change for use, change in self._changes.items() if self._ahead[use] > 0}

    def solving(self, tokens: int) -> int:
        """Bytes that the largest fit takes: Gram matrix and factors, the change, and what goes of the weight."""
        most = 0
        for name in self._cut:
            shape, gone = self._weights[name].shape, self._kept[name]
            for dim in gone:
                width = min(tokens, shape[dim])
                most = max(most, 3 * 8 * width**2 + 3 * 8 * self._weights[name].numel())
        return most

    def _meet(self, use: Use, x: torch.Tensor, y: torch.Tensor) -> None:
        consumes = self._consumes(use)
        self._ahead[use] -= 1
        if consumes:
            self._left -= 1
        rows = x.reshape(-1, x.shape[-1])
        flat = y.view(len(rows), -1) if y.is_contiguous() else y.reshape(len(rows), -1)
        first, second, pruned = rows, rows, flat
        if self._doubled:
            (first, second), (original, pruned) = rows.chunk(2), flat.chunk(2)
        stay, outputs = self._inputs(use, x.device) if consumes else None, self._outputs(use, x.device)
        matrix = use.matrix(self._weights[use.name])
        if use not in self._changes:
            wanted, leaves = first, None
            if stay is not None:
                leaves = matrix.index_fill(0, stay, 0)  # what goes
                wanted = first @ leaves
                if self._doubled:
                    wanted += DRIFT * (original - pruned + second @ leaves - wanted)
            else:
                wanted = ADJUST * (original - pruned)
            found = Fit(None, None, 0.0, 0.0)
            if consumes or float(wanted.norm()) > _SAME * float(original.norm()):
                found = self._solve(use, x, second, stay, wanted if outputs is None else wanted[:, outputs])
            change = torch.zeros_like(matrix) if leaves is None else -leaves
            if found.change is not None:
                rows_of = torch.arange(len(matrix), device=x.device) if stay is None else stay
                columns = torch.arange(use.count, device=x.device) if outputs is None else outputs
                change[rows_of[:, None], columns] += found.change.to(change.dtype)
            still = found.change is None and leaves is None
            self._changes[use] = (None if still else change, found.shift)
        if self._carry_out:
            change_, shift = self._changes[use]
            if change_ is not None:
                pruned.addmm_(second, change_)
            if shift is not None:
                added = shift.to(pruned.dtype)
                pruned += (
                    added if outputs is None else added.new_zeros(use.count).index_copy_(0, outputs, added)
                )
            if outputs is not None:
                out = torch.ones(use.count, dtype=torch.bool, device=x.device).index_fill_(0, outputs, False)
                pruned.masked_fill_(out, 0)
            if flat.data_ptr() != y.data_ptr():
                y.copy_(flat.view(y.shape))
        if not self._left:
            raise _Done

    def _solve(
        self, use: Use, given: torch.Tensor, x: torch.Tensor, stay: torch.Tensor | None, r: torch.Tensor
    ) -> Fit:
        """Fit a use's change and its bias', and put them into what the parameters will be."""
        held = max(1, len(x) * self._held // self._samples)
        small = self._in_small(use)
        if small is None or held >= len(x):
            return Fit(None, None, 0.0, 0.0)
        bias = use.bias is not None
        if stay is not None:
            self.width = max(self.width, len(stay))
            found = fit(Inputs(x, held, stay, bias), r, held, bias=bias)
            self.ridges[use.name if use.lead is None else f"{use.name}[{use.lead}]"] = found.ridge
        else:
            found = fit(self._prepared(given, x, held, bias), r, held, ADJUST_RIDGES, bias)
        if found.change is not None:
            matrix = small.matrix(self._own(use.name))
            matrix += found.change.to(matrix.dtype)
            if stay is None:
                self.adjusted.add(use.name)
        if found.shift is not None and use.bias is not None:
            own = self._own(use.bias)
            own += found.shift.to(own.dtype)
            self.biased.add(use.bias)
        return found

    def _own(self, name: str) -> torch.Tensor:
        """What a parameter will be, to be changed."""
        if name not in self.repaired:
            source = self._weights.get(name, self._biases.get(name))
            assert source is not None
            self.repaired[name] = gather(source, self._kept.get(name, {}))
        return self.repaired[name]

    def _prepared(self, given: torch.Tensor, x: torch.Tensor, held: int, bias: bool) -> Inputs:
        """Inputs that several products in a row get, with their Gram matrix."""
        key = (*id_of(given), given.shape, given.stride(), given._version, bias)
        if self._last is None or self._last[0] != key:
            self._last = None
            self._last = (key, given, Inputs(x, held, centred=bias))
        return self._last[2]

    def _inputs(self, use: Use, device: torch.device) -> torch.Tensor:
        """Which of a use's inputs stay."""
        kept = torch.as_tensor(self._of_slice(use, use.inner), device=device)
        return (kept[:, None] * use.taps + torch.arange(use.taps, device=device)).flatten()

    def _outputs(self, use: Use, device: torch.device) -> torch.Tensor | None:
        """Which of a use's outputs stay, within its window; None: all."""
        if use.outer not in self._kept.get(use.name, {}):
            return None
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
        slices = self._kept.get(use.name, {}).get(0)
        if use.lead is None or slices is None:
            return use.lead
        return int(np.searchsorted(slices, use.lead)) if use.lead in slices else None

    def _in_small(self, use: Use) -> Use | None:
        """The same part of the compacted parameter; None where nothing of it stays."""
        lead, first, count = self._number(use), use.first, use.count
        if lead is None and use.lead is not None:
            return None
        if use.outer in self._kept.get(use.name, {}):
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
