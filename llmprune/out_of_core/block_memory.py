"""How much memory scoring block by block takes, and the schedule that keeps within a budget.

Nothing is guessed from names: activations are gauged on one short sample and a longer one, under the same stand-in
weights as the survey. Bytes of a sample are ``a T + b T^2`` for ``T`` tokens (``b`` where attention is not fused).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from llmprune.errors import DeviceError, InputError
from llmprune.machine import cuda
from llmprune.machine.budget import resident_memory, spell_bytes
from llmprune.out_of_core.reading import SLICE_BYTES
from llmprune.scoring.calibration import Batch
from llmprune.scoring.interpose import Interposer
from llmprune.scoring.loss import SLICE_BYTES as LOSS_SLICE
from llmprune.scoring.loss import SLICE_ROWS
from llmprune.scoring.recompute import Block, floating
from llmprune.scoring.reduction import Reducer
from llmprune.scoring.streaming import Route, Task, measured

log = logging.getLogger(__name__)

CPU = torch.device("cpu")

_LENGTHS = (4, 8)
_BACKWARD = 1.5
"""What a block's backward has at its peak, in units of what autograd keeps for it: gradients come, activations go."""
_SLACK = 48 << 20
"""Bytes that the C library, libraries' own buffers and Python may take beside what is counted."""


@dataclass(frozen=True)
class Gauge:
    """Bytes of one sample.

    Attributes:
        kept: What autograd keeps for one block, at most.
        border: What enters a block and gradients are wanted of, at most.
    """

    kept: float
    border: float


@dataclass(frozen=True)
class Schedule:
    """How to run.

    Attributes:
        batch_size: Samples at a time inside a block.
        buffers: Blocks whose weights are in memory at a time.
        apart: Whether what enters blocks is kept on disk, or of a device's in the host's memory.
        fold: Whether gradients are added up in accumulators, instead of keeping what they are made of.
        logits: Whether the fused loss keeps its logits for backward.
        peak: Bytes that the process will have at most.
        settled: Bytes above which free pages are handed back between blocks.
    """

    batch_size: int
    buffers: int
    apart: bool
    fold: bool
    logits: bool
    peak: int
    settled: int


def gauge(task: Task, model: nn.Module, blocks: list[Block]) -> Gauge:
    """Gauge the blocks; every parameter must have values, of whatever kind."""
    inputs = task.batch.inputs
    plain = set(inputs) == {"input_ids"}
    length = inputs["input_ids"].shape[1] if plain else 1
    lengths = sorted({min(n, length) for n in _LENGTHS}) if plain else [1]
    points = []
    for tokens in lengths:
        part = {name: t[:1, :tokens] if plain else t[:1] for name, t in inputs.items()}
        points.append((tokens, *_gauged(task, model, blocks, Batch(part, task.batch.hash))))
    return Gauge(*(_extended([(n, both[i]) for n, *both in points], length) for i in range(2)))


def _extended(points: list[tuple[int, float]], length: int) -> float:
    """The value at ``length`` of ``a T + b T^2`` through one point (``b = 0``) or two, and through zero."""
    (first, low), (last, high) = points[0], points[-1]
    if first == last:
        return low * length / first
    square = max(0.0, (high / last - low / first) / (last - first))
    return (high / last + square * (length - last)) * length


class _Enough(Exception):
    """Every kind of block has run."""


def _gauged(task: Task, model: nn.Module, blocks: list[Block], part: Batch) -> tuple[float, float]:
    ids = {id(block.module) for block in blocks}
    left = {_kind(block.module) for block in blocks}
    kept, border = 0.0, 0.0
    stack = contextlib.ExitStack()
    count: list[Callable[[], int]] = []

    def entering(module: nn.Module, args: Any) -> None:
        if id(module) in ids:
            count.append(stack.enter_context(measured(module)))

    def leaving(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal kept, border
        if id(module) in ids:
            kept = max(kept, count.pop()())
            stack.pop_all().close()
            leaves = floating(pytree.tree_leaves((args, kwargs)))
            border = max(border, sum(t.numel() * t.element_size() for t in leaves if t.requires_grad))
            left.discard(_kind(module))
            if not left:
                raise _Enough

    handles = [
        register_module_forward_pre_hook(entering),
        register_module_forward_hook(leaving, with_kwargs=True),
    ]
    counter = Reducer(task.importance, {}, 1, {}, lambda name: None)
    anchor = torch.zeros((), requires_grad=True)
    try:
        with _anchored(blocks[0].module, anchor), Interposer({}, set(), set(), counter, task.stored):
            task.losses_of(part)
    except _Enough:
        pass
    finally:
        stack.close()
        for handle in handles:
            handle.remove()
            torch.nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id, None)
    return kept, border


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """What blocks that take the same memory have in common."""
    return type(module), *(tuple(p.shape) for p in module.parameters())


@contextlib.contextmanager
def _anchored(block: nn.Module, anchor: torch.Tensor) -> Iterator[None]:
    """Have gradients wanted from what enters a block on."""

    def add(module: nn.Module, args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                leaves[place] = leaf + anchor.to(leaf.dtype)
                break
        return pytree.tree_unflatten(leaves, spec)

    handle = block.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Sizes:
    """Bytes that do not depend on the schedule.

    Attributes:
        block: Weights of one block, at most, as they are read.
        extra: What reading them takes besides, at most.
        pieces: Inputs and gradients of one block's linear maps over all samples, at most.
        accumulators: Gradients of one block's weights in accumulators, at most.
        general: Gradients of one block's other parameters, at most.
        loss: What the loss and the final projection take, with their logits in slices where they are fused.
        logits: All logits, where they are fused.
    """

    block: int
    extra: int
    pieces: int
    accumulators: int
    general: int
    loss: int
    logits: int


def sizes_of(
    task: Task, route: Route, names: list[list[str]], block: int, extra: int, border: float
) -> Sizes:
    """The sizes, for blocks with parameters of these names; ``border`` as in :class:`Gauge`."""
    parameters, order = task.parameters, task.importance.order
    pieces, accumulators, general = 0, 0, 0
    for own in names:
        seen = whole = other = 0
        for name in own:
            parameter = parameters.get(name)
            if parameter is None:
                continue
            if name in route.streamed:
                density = float(max(route.densities.get(name, {1}), default=1))
                seen += (
                    int(sum(parameter.shape) * route.streamed[name] * density * task.batch.tokens)
                    * parameter.element_size()
                )
                whole += 4 * parameter.numel() * (3 if order > 1 else 1)
            elif name in route.general:
                other += parameter.numel() * (4 if order > 1 else 1) * max(4, parameter.element_size())
        pieces, accumulators, general = max(pieces, seen), max(accumulators, whole), max(general, other)
    head = route.head if task.losses_of.plain else None
    logits = 0 if head is None else task.batch.tokens * len(head) * head.element_size()
    return Sizes(block, extra, pieces, accumulators, general, _loss_bytes(task, route, border), logits)


def _loss_bytes(task: Task, route: Route, border: float) -> int:
    """The final norm and projection: some tensors of a border's size, and logits in slices or whole."""
    batch, head = task.batch, route.head
    hidden = 6 * int(border) * batch.samples
    if head is not None and task.losses_of.plain:
        rows = max(SLICE_ROWS, LOSS_SLICE // (4 * max(1, batch.tokens)))
        width = head.shape[1] * max(4, head.element_size())
        return hidden + 5 * 4 * rows * batch.tokens + 2 * rows * width + 3 * SLICE_BYTES
    rows = max((p.shape[0] for p in task.parameters.values() if id(p) in task.stored), default=0)
    return hidden + 4 * 4 * rows * batch.tokens + 3 * SLICE_BYTES


def choose(
    sizes: Sizes,
    measured: Gauge,
    blocks: int,
    samples: int,
    budget: int | None,
    batch_size: int | None,
    *,
    device: torch.device = CPU,
) -> Schedule:
    """The fastest schedule within a budget and, of blocks that run on a CUDA device, within its free memory.

    Args:
        sizes: What does not depend on it.
        measured: What one sample takes.
        blocks: How many blocks there are.
        samples: How many samples.
        budget: Bytes that the process may have at most; None: whatever the machine has free.
        batch_size: Samples at a time; None: as many as fit.
        device: Where the blocks run.

    Raises:
        InputError: none is; the message says what would do.
        DeviceError: nothing is that the device has room for.
    """
    if device.type == "cuda":
        return _choose_on(device, sizes, measured, blocks, samples, budget, batch_size)
    here = resident_memory()
    candidates = _candidates(here, sizes, measured, blocks, samples, batch_size)
    fitting = [c for c in candidates if budget is None or c.peak <= budget]
    if not fitting:
        least = min(c.peak for c in candidates)
        raise InputError(
            f"scoring these {samples} samples block by block takes {spell_bytes(least)} of memory at the least, and "
            f"the budget is {spell_bytes(budget or 0)}: raise it to {spell_bytes(least)}, or take fewer or shorter "
            "samples"
        )
    log.info("%s", fitting[0])
    return fitting[0]


def _choose_on(
    device: torch.device,
    sizes: Sizes,
    measured: Gauge,
    blocks: int,
    samples: int,
    budget: int | None,
    batch_size: int | None,
) -> Schedule:
    """The same on a device, from which the host's memory keeps two blocks on their way and what is kept apart."""
    free = cuda.free_memory(device)
    candidates = _candidates(cuda.SCRATCH_BYTES, sizes, measured, blocks, samples, batch_size)
    fitting = [c for c in candidates if c.peak <= free]
    if not fitting:
        least = min(c.peak for c in candidates)
        raise DeviceError(
            f"scoring these {samples} samples block by block takes {spell_bytes(least)} of memory on {device} at the "
            f"least, where {spell_bytes(free)} are free: take fewer or shorter samples, or run on the CPU"
        )
    base = resident_memory() + 2 * sizes.block + sizes.extra
    hosts = [base + (int(measured.border * samples * blocks) if c.apart else 0) for c in fitting]
    for schedule, host in zip(fitting, hosts, strict=True):
        if budget is None or host <= budget:
            log.info("%s on %s", schedule, device)
            return replace(schedule, settled=sys.maxsize)
    raise InputError(
        f"scoring block by block on {device} takes {spell_bytes(min(hosts))} of the host's memory, and the budget is "
        f"{spell_bytes(budget or 0)}: raise it to {spell_bytes(min(hosts))}"
    )


def _candidates(
    here: int, sizes: Sizes, measured: Gauge, blocks: int, samples: int, batch_size: int | None
) -> list[Schedule]:
    """All schedules, the fastest first."""
    counts = sorted({samples, *(samples >> n for n in range(1, 20))} - {0}, reverse=True)
    if batch_size is not None:
        counts = [min(batch_size, samples)]
    return [
        _scheduled(here, sizes, measured, blocks, samples, *each)
        for each in itertools.product((2, 1), (False, True), counts, (True, False), (False, True))
    ]


def _scheduled(
    here: int,
    sizes: Sizes,
    measured: Gauge,
    blocks: int,
    samples: int,
    buffers: int,
    apart: bool,
    size: int,
    logits: bool,
    fold: bool,
) -> Schedule:
    """A schedule with its peak, for a process that has ``here`` bytes before the first block is read."""
    border = measured.border * samples
    kept = 0.0 if apart else border * blocks
    forward = 2 * border + 1.2 * measured.kept * size
    loss = border + sizes.loss
    uses = sizes.accumulators if fold and size < samples else sizes.pieces
    backward = 4 * border + _BACKWARD * measured.kept * size + uses + sizes.general
    if logits:
        kept += sizes.logits  # gone when the blocks' backward begins, but it may leave holes
    steady = buffers * sizes.block + sizes.extra + kept
    passing = max(forward, loss, backward)
    peak = here + int(1.02 * (steady + passing)) + _SLACK
    settled = peak - int(passing / 4) - _SLACK // 2
    return Schedule(size, buffers, apart, fold, logits, peak, settled)
