"""Scores of whole blocks.

- ``block_influence``: one minus the cosine of a token's stream before and after the block, averaged over the
  calibration tokens (ShortGPT, Men et al. 2024, arXiv:2403.03853, eq. 1). Forward passes only.
- The first- and second-order importances, of the block's contribution: with a gate ``m`` of one entry per channel in
  ``out = in + m * (out - in)``, the block is removed by ``m = 0``, so the gate takes the place of the weight in the
  formulas of :mod:`llmprune.scoring.importance` (Ma et al. 2023, eqs. 3 and 5): ``w = 1``, ``g`` the mean over samples
  of
  ``dL_j/dm = sum over tokens of dL_j/dout * (out - in)``, ``s`` the mean of its square.
Of a branch that may go alone (:mod:`llmprune.tracing.sublayers`), ``in`` is the stream before it is added and ``out``
the sum.

- ``l1``, ``l2``: the magnitude of all the block's parameters together; ``random``: one draw per block.

A block's gate is its only member, so aggregation plays no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from llmprune.checkpoints.record import fresh
from llmprune.compaction import depth
from llmprune.errors import CalibrationError, InputError, PlanError
from llmprune.machine.budget import available_memory
from llmprune.scoring.calibration import Batch
from llmprune.scoring.importance import Importance
from llmprune.scoring.loss import SampleLosses, check_losses, config_value, run
from llmprune.scoring.streaming import measured
from llmprune.tracing.layers import Drop, LayerAxis
from llmprune.tracing.sublayers import Meeting, PartAxis

Array = npt.NDArray[np.float64]
StackAxis = LayerAxis | PartAxis
Streams = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor | None]

_FORWARD_TOKENS = 4096  # tokens in one forward pass without gradients
_SKETCH_TOKENS = 4


def magnitudes(model: nn.Module, stacks: Sequence[StackAxis], rule: Importance) -> dict[int, Array]:
    """Scores by an importance that needs the weights alone: axis id -> (size,)."""
    parameters = dict(model.named_parameters())
    out = {}
    for stack in stacks:
        sums = np.zeros(stack.size)
        for position in range(stack.size):
            for name, p in parameters.items():
                if name.startswith(stack.prefix(position)):
                    w = p.detach()
                    sums[position] += float(rule.element(w, w, w).double().sum())
        out[stack.id] = rule.finish(sums)
    return out


def influences(
    model: nn.Module,
    stacks: Sequence[StackAxis],
    batch: Batch,
    rule: Importance,
    progress: Callable[[int], object],
) -> dict[int, Array]:
    """Scores read off the stream around every block, averaged over tokens: axis id -> (size,).

    Args:
        model: the model, lent out by :func:`llmprune.scoring.streaming.undisturbed`.
        stacks: the stacks.
        batch: calibration samples; tokens that an attention mask leaves out do not count.
        rule: an importance of sort ``layers``.
        progress: called with the number of samples done.

    Raises:
        InputError: plain ids for an encoder-decoder.
    """
    if set(batch.inputs) == {"input_ids"} and config_value(model, "is_encoder_decoder"):
        raise InputError(
            f"{type(model).__name__} is an encoder-decoder: pass a mapping with decoder_input_ids as calibration"
        )
    sums = {stack.id: np.zeros((stack.size, 2)) for stack in stacks}
    at_a_time = max(1, _FORWARD_TOKENS // max(1, batch.tokens // batch.samples))
    for part in _parts(batch, at_a_time):
        mask = part.inputs.get("attention_mask")

        def note(axis: int, position: int, into: torch.Tensor, out: torch.Tensor) -> None:
            value = rule.function(into.double(), out.double())
            weight = torch.ones_like(value)
            if mask is not None and mask.shape == value.shape:  # noqa: B023
                weight = mask.to(value)  # noqa: B023
            sums[axis][position] += float((value * weight).sum()), float(weight.sum())

        with torch.no_grad(), _watched(model, stacks, note, streams=True):
            run(model, part.inputs)
        progress(part.samples)
    return {axis: both[:, 0] / np.maximum(both[:, 1], 1) for axis, both in sums.items()}


def contributions(
    model: nn.Module,
    stacks: Sequence[StackAxis],
    batch: Batch,
    losses_of: SampleLosses,
    rule: Importance,
    batch_size: int | None,
    progress: Callable[[int], object],
) -> dict[int, Array]:
    """Scores of every block by the gradient at its contribution: axis id -> (size,); the module has the formula.

    Args:
        model: the model, lent out by :func:`llmprune.scoring.streaming.undisturbed`.
        stacks: the stacks.
        batch: calibration samples.
        losses_of: the loss of each sample.
        rule: an importance of first or second order.
        batch_size: samples at a time; None: as many as fit in half the memory.
        progress: called with the number of samples done.

    Raises:
        CalibrationError: a sample's loss is not finite.
    """
    sketch = batch.sketch(_SKETCH_TOKENS)
    losses_of.find_shift(sketch)
    losses_of.check_causal(sketch)
    gates = _Gates(stacks)
    if batch_size is None:
        with measured(model) as kept, _watched(model, stacks, gates.note):
            losses_of(sketch)
        needed = kept() / max(1, sketch.tokens) * batch.tokens
        room = available_memory() // 2
        batch_size = batch.samples if needed <= room else max(1, int(batch.samples * room / needed))
        gates.clear()

    def run_part(part: Batch, first: int) -> None:
        with _watched(model, stacks, gates.note):
            losses = losses_of(part)
        check_losses(losses, first)
        if losses.requires_grad:
            torch.autograd.backward(losses.sum())

    done = 0
    for part in _parts(batch, batch_size):
        run_part(part, done)
        if not gates.add(part.samples):  # samples are not the stream's first dimension
            for number, sample in enumerate(_parts(part, 1)):
                run_part(sample, done + number)
                gates.add(1)
        done += part.samples
        progress(part.samples)
    return gates.scores(rule, done)


class _Gates:
    """Gradients at the gates of all blocks, sample by sample."""

    def __init__(self, stacks: Sequence[StackAxis]) -> None:
        self.stacks = stacks
        self.first: dict[tuple[int, int], torch.Tensor] = {}  # sums over samples of dL_j/dm
        self.second: dict[tuple[int, int], torch.Tensor] = {}  # and of its square
        self._seen: list[tuple[tuple[int, int], torch.Tensor, torch.Tensor]] = []

    def note(self, axis: int, position: int, into: torch.Tensor, out: torch.Tensor) -> torch.Tensor | None:
        """Remember a block's contribution; its output, made a place where the gradient is kept."""
        replaced = None
        if not out.requires_grad:  # nothing before it does: the gradient ends here
            out = replaced = out.detach().requires_grad_().clone()
        out.retain_grad()
        self._seen.append(((axis, position), out, (out - into).detach()))
        return replaced

    def clear(self) -> None:
        """Forget the passes so far."""
        self._seen.clear()

    def add(self, samples: int) -> bool:
        """Add a pass that has run backward; False, and nothing added, where its samples cannot be told apart."""
        if samples > 1 and any(out.shape[0] != samples or out.dim() < 2 for _, out, _ in self._seen):
            self.clear()
            return False
        for key, out, contribution in self._seen:
            if out.grad is None:
                continue
            product = (out.grad.double() * contribution.double()).reshape(samples, -1, out.shape[-1]).sum(1)
            total, squares = product.sum(0), product.square().sum(0)
            self.first[key] = self.first[key] + total if key in self.first else total
            self.second[key] = self.second[key] + squares if key in self.second else squares
        self.clear()
        return True

    def scores(self, rule: Importance, samples: int) -> dict[int, Array]:
        """Axis id -> (size,); zero for a block that no gradient reaches."""
        out = {}
        for stack in self.stacks:
            sums = np.zeros(stack.size)
            for position in range(stack.size):
                g = self.first.get((stack.id, position))
                if g is not None:
                    s = self.second[stack.id, position]
                    sums[position] = float(rule.element(torch.ones_like(g), g / samples, s / samples).sum())
            out[stack.id] = rule.finish(sums)
        return out


def obstacles(model: nn.Module, stacks: Sequence[LayerAxis]) -> dict[int, dict[int, str]]:
    """Blocks without which the model's class cannot build the rest: axis id -> position -> why.

    One block of each kind (parameters of the same names and shapes) is tried, and stands for all of them.
    """
    record = fresh(model).current()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found: dict[int, dict[int, str]] = {}
    for stack in stacks:
        kinds: dict[Any, list[int]] = {}
        for position in range(stack.size):
            start = stack.prefix(position)
            own = tuple((n[len(start) :], s) for n, s in shapes.items() if n.startswith(start))
            if position not in stack.pinned:
                kinds.setdefault(own, []).append(position)
        for alike in kinds.values():
            try:
                depth.follow(model, [stack.drop(alike[:1])], record)
            except PlanError as error:
                found.setdefault(stack.id, {}).update(dict.fromkeys(alike, str(error)))
    return found


def check_finite(stacks: Sequence[StackAxis], values: Mapping[int, Array], importance: str) -> None:
    """Raise CalibrationError where activations or gradients left the range of their dtype."""
    for stack in stacks:
        bad = np.flatnonzero(~np.isfinite(values[stack.id]))
        if bad.size:
            raise CalibrationError(
                f"the {importance} score of {stack.module}.{bad[0]} is not finite: look for extreme weights or use a "
                "wider dtype"
            )


def _parts(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, batch.samples, size):
        yield batch.take(start, min(start + size, batch.samples))


@contextmanager
def _watched(
    model: nn.Module, stacks: Sequence[StackAxis], note: Streams, streams: bool = False
) -> Iterator[None]:
    """Call ``note(axis, position, stream in, stream out)`` for each block that runs; what it returns is handed on.

    Of a branch it gets the stream before and after with ``streams``, else zeros and what is added.
    """

    def hook(
        stack: LayerAxis, drop: Drop, position: int, _module: nn.Module, args: Any, kwargs: Any, result: Any
    ) -> Any:
        changed = note(stack.id, position, *depth.stream_of(drop, args, kwargs, result))
        return None if changed is None else depth.with_stream(drop, changed, result)

    handles = []
    try:
        for stack in stacks:
            if isinstance(stack, PartAxis):
                for position, meeting in stack.meetings.items():
                    handles += _watch_branch(model, meeting, partial(note, stack.id, position), streams)
                continue
            drop = stack.drop(())
            for position in range(stack.size):
                block = model.get_submodule(f"{stack.module}.{position}")
                call = partial(hook, stack, drop, position)
                handles.append(block.register_forward_hook(call, prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_branch(
    model: nn.Module,
    meeting: Meeting,
    note: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None],
    streams: bool,
) -> list[Any]:
    """Hooks that call ``note`` when a branch has run; their handles."""
    held: list[torch.Tensor] = []

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        held[:] = [args[meeting.input] if isinstance(meeting.input, int) else kwargs[meeting.input]]

    def after(_module: nn.Module, _args: Any, result: Any) -> Any:
        added = result if meeting.output is None else result[meeting.output]
        if streams:
            stream = held.pop()
            note(stream, stream + added)
            return None
        changed = note(torch.zeros_like(added), added)
        return None if changed is None else depth.with_stream(meeting, changed, result)

    handles: list[Any] = []
    if streams:
        module = model.get_submodule(meeting.module)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    handles.append(model.get_submodule(meeting.added).register_forward_hook(after, prepend=True))
    return handles
