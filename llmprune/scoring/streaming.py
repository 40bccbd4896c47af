"""Streamed importances: one forward and backward pass over the calibration samples, with no gradient kept.

A parameter takes one of three paths.

- Streamed: its uses in linear maps and lookups go to a :class:`llmprune.scoring.reduction.Reducer` as backward comes by
  (:mod:`llmprune.scoring.interpose`), and no gradient of its size is formed.
- Copied, for second order: a parameter that scales or shifts (norms, biases) is replaced by one copy per sample, so
  that autograd yields a gradient per sample.
- General: autograd's own gradient, one parameter at a time; for second order one sample at a time, with accumulators
  for as many parameters as fit.

Which path it takes is found by trying, on two samples of a few tokens (:func:`_survey`): a parameter is streamed only
if no gradient reaches it by another way and, for second order, if each half of its uses' rows carries the gradient of
its own sample alone: the first sample's loss runs backward as NaN, and every row it touches shows. The real pass checks
that there are as many uses, of as many rows for a token, and starts over where a parameter behaves differently there.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import nn

from llmprune import _core
from llmprune.errors import CalibrationError, DeviceError
from llmprune.machine import cuda
from llmprune.machine.budget import available_memory
from llmprune.out_of_core.reading import Sliced
from llmprune.scoring.calibration import Batch
from llmprune.scoring.importance import Importance
from llmprune.scoring.interpose import Interposer
from llmprune.scoring.loss import SampleLosses, check_losses, fused_loss
from llmprune.scoring.ranks import Ranks, SharedReducer
from llmprune.scoring.recompute import Block, Checkpoints, give_back_memory, watch_blocks
from llmprune.scoring.reduction import HeadRows, Reducer, Reroute, Sums
from llmprune.tracing.borrow import forget

log = logging.getLogger(__name__)

FUSE_BYTES = 1 << 25
"""Whole float32 logits of at least this size are not formed: the final projection is fused into the loss."""
STORE_TOKENS = 12_288
"""Up to how many calibration tokens inputs and gradients are kept across batches; above, accumulators are."""
_SKETCH_TOKENS = 4


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Lend out ``model`` in eval mode, with no gradients and nothing requiring any; give it back exactly as it was.

    Restored however the block ends: each module's training flag, each parameter's ``requires_grad`` and ``grad``, and
    the random number generators of the CPU and of the model's devices.
    """
    parameters = list(model.parameters())
    modes = [(module, module.training) for module in model.modules()]
    states = [(p, p.requires_grad, p.grad) for p in parameters]
    cuda = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    try:
        forget(model)
        for module, _ in modes:
            module.training = False
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.random.fork_rng(devices=cuda), torch.enable_grad():
            yield
    finally:
        forget(model)
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, grad in states:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@dataclass
class Route:
    """How each scored parameter's gradient is had, and what else the survey found."""

    streamed: dict[str, int] = field(default_factory=dict)
    """Uses in linear maps and lookups: name -> how many make it complete."""
    copied: set[str] = field(default_factory=set)
    """One copy per sample (second order only)."""
    general: set[str] = field(default_factory=set)
    head: torch.Tensor | None = None
    """The weight whose product is the logits, where nothing else follows it."""
    densities: dict[str, set[Fraction]] = field(default_factory=dict)
    """Rows for each token that uses of a streamed parameter had, for second order."""
    blocks: list[Block] = field(default_factory=list)
    bytes_per_token: float = 0.0
    """What autograd keeps for backward, apart from parameters."""

    def without(self, names: set[str], parameters: Mapping[str, torch.Tensor]) -> Route:
        """The same with ``names`` on the general path."""
        return replace(
            self,
            streamed={name: count for name, count in self.streamed.items() if name not in names},
            copied=self.copied - names,
            general=self.general | names,
            head=None if any(parameters[name] is self.head for name in names) else self.head,
        )


class _Counter(Reducer):
    """What stands in for a reducer during the survey: it counts uses and reduces nothing."""

    def __init__(self, importance: Importance):
        super().__init__(importance, {}, 2, {}, lambda name: None)
        self.counts: dict[str, int] = {}

    def linear(self, name: str, *args: Any, **options: Any) -> None:
        """Count a use."""
        self.counts[name] = self.counts.get(name, 0) + 1

    linear_signed = linear
    lookup = linear


@contextlib.contextmanager
def requiring_grad(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Let ``parameters`` require gradients for a while; none of theirs is left afterwards."""
    parameters = list(parameters)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


@dataclass
class Task:
    """What there is to do, the same for the survey and every attempt."""

    model: nn.Module
    batch: Batch
    losses_of: SampleLosses
    parameters: Mapping[str, torch.Tensor]
    importance: Importance
    progress: Callable[[str], None]
    stacks: Collection[str] = ()
    stored: Mapping[int, Sliced] = field(default_factory=dict)
    """id of a parameter that is not in memory, scored or not -> its values in a file."""
    ranks: Ranks | None = None
    total: int = 0
    """Samples of all ranks."""


def _survey(task: Task, copied: set[str]) -> Route:
    """Run two short samples forward and backward and see how each parameter is used; see the module.

    Raises:
        RuntimeError, TypeError, ValueError, IndexError: what the model raises, perhaps because of a copy per sample.
        Reroute: the copies of these are used in ways that no copy can follow.
    """
    parameters, losses_of = task.parameters, task.losses_of
    grouped = task.importance.order > 1
    sketch = task.batch.sketch(_SKETCH_TOKENS)
    counter = _Counter(task.importance)
    mode = Interposer(parameters, set(parameters), copied, counter, task.stored)
    mode.surveying = True
    mode.length = sketch.tokens // sketch.samples
    route = Route()
    product = None
    leaked: set[str] = set()
    with requiring_grad(parameters.values()), _gradients_dropped(parameters, leaked):
        with watch_blocks(task.model, sketch.samples) as blocks, measured(task.model) as kept, mode:
            if losses_of.plain:
                logits = losses_of.logits(sketch)
                product = mode.projections.get(id(logits))
                losses = losses_of.of_logits(logits, sketch)
            else:
                losses = losses_of(sketch)
            route.blocks = blocks()
        route.bytes_per_token = kept() / max(1, sketch.tokens)
        mode.forget()
        if losses.requires_grad:
            seeds = torch.ones_like(losses)
            if grouped:
                seeds[0] = torch.nan
            with torch.autograd.set_detect_anomaly(False):
                torch.autograd.backward(losses, seeds)
            for name, copy in mode.copies.items():
                if copy.grad is not None:
                    mode.observe(name, copy.grad)
    bad = leaked | mode.mixed | (mode.lookups & mode.transposed)
    if mode.looks_ahead:
        with mode if task.stored else contextlib.nullcontext():
            losses_of.check_causal(sketch)
    route.streamed = {name: count for name, count in counter.counts.items() if name not in bad}
    route.densities = mode.densities
    route.copied = set(mode.copies) - bad
    route.general = set(parameters) - set(route.streamed) - route.copied
    if product is not None:
        head = next((name for name, p in parameters.items() if p is product[1]), None)
        ties = 1 + (len(counter.ids.get(head, ())) if head is not None else 0)
        if head is None or route.streamed.get(head) == ties:
            route.head = product[1]
    return route


@contextlib.contextmanager
def _gradients_dropped(parameters: Mapping[str, torch.Tensor], names: set[str]) -> Iterator[None]:
    """Note in ``names`` which parameters get a gradient, and drop each as soon as it is there."""

    def dropper(name: str) -> Callable[[torch.Tensor], None]:
        def drop(parameter: torch.Tensor) -> None:
            names.add(name)
            parameter.grad = None

        return drop

    handles = [
        parameter.register_post_accumulate_grad_hook(dropper(name))  # type: ignore[no-untyped-call]
        for name, parameter in parameters.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def measured(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Count the bytes autograd keeps for backward in the block, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(seen.values())


def find_route(task: Task) -> Route:
    """The survey's result, with a second try without copies where these break the model's forward."""
    if task.importance.kernel is None:
        task.losses_of.check_causal(task.batch.sketch(_SKETCH_TOKENS))
        return Route(general=set(task.parameters))
    copied = (
        {name for name, p in task.parameters.items() if p.dim() == 1} if task.importance.order > 1 else set()
    )
    while copied:
        try:
            return _survey(task, copied)
        except Reroute as reroute:
            copied -= reroute.names
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            log.info("no copies per sample: the model's forward does not take them (%s)", error)
            copied = set()
    return _survey(task, set())


def streamed_sums(
    model: nn.Module,
    batch: Batch,
    losses_of: SampleLosses,
    parameters: Mapping[str, nn.Parameter],
    importance: Importance,
    *,
    progress: Callable[[str], None],
    batch_size: int | None = None,
    checkpointing: bool | None = None,
    accumulator_bytes: int | None = None,
    pin_boundaries: bool = False,
    stacks: Collection[str] = (),
    ranks: Ranks | None = None,
    total: int = 0,
) -> Sums:
    """Sums of the elementwise importance over every structure of every parameter.

    Args:
        model: The model, lent out by :func:`undisturbed`.
        batch: The calibration samples, on the model's device.
        losses_of: The loss.
        parameters: Name -> parameter to score; floating point.
        importance: Which importance, of order 1 or 2.
        progress: Called with the name of each parameter as it is done.
        batch_size: How many samples run at a time; None for as many as fit in memory. With checkpointing this holds
            inside the blocks, and what passes their borders is kept for all samples.
        checkpointing: Whether the model's repeated blocks keep only their inputs and run again in the backward pass;
            None for only if what autograd would keep does not fit in half the memory available, or exceeds a tenth of
            the weights on a CUDA device, or ``batch_size`` asks for parts.
        accumulator_bytes: Most memory for the accumulators of the general path's second order at a time; None takes
            half of what is available.
        pin_boundaries: With checkpointing, keep what passes the blocks' borders in pinned host memory.
        stacks: Names of parameters whose slices along dimension 0 are told apart.
        ranks: Other processes that do the same with other samples; the sums are of all.
        total: Samples of all ranks.

    Raises:
        CalibrationError: a sample's loss is not finite, or the model cannot run on the samples.
        RankError: another process failed.
        DeviceError: a CUDA device has too little free memory; nothing has been computed.
    """
    task = Task(model, batch, losses_of, parameters, importance, progress, stacks, ranks=ranks, total=total)

    def prepare() -> Route:
        _check_scratch(task)
        losses_of.find_shift(batch.sketch(_SKETCH_TOKENS))
        return find_route(task).without(set(stacks), parameters)

    route = prepare() if ranks is None else ranks.together(prepare)
    if ranks is not None and not importance.additive:
        route = replace(route, head=None)  # its rows are reduced before those of other ranks are in
    while True:
        log.info(
            "%d parameters streamed, %d copied per sample, %d on the general path, %d blocks",
            len(route.streamed),
            len(route.copied),
            len(route.general),
            len(route.blocks),
        )
        attempt = partial(_attempt, task, route, batch_size, checkpointing, pin_boundaries, accumulator_bytes)
        try:
            return attempt() if ranks is None else ranks.together(attempt)
        except Reroute as reroute:
            if reroute.names <= route.general:  # used in a block and outside of it
                if not route.blocks and ranks is None:
                    raise RuntimeError(
                        f"gradients of {reroute} come in parts that fit no schedule"
                    ) from reroute
                route = replace(route, blocks=[])
            else:
                route = route.without(reroute.names, parameters)
            log.info("starting over: %s cannot be had as was planned", reroute)


def _attempt(
    task: Task,
    route: Route,
    batch_size: int | None,
    checkpointing: bool | None,
    pin_boundaries: bool,
    accumulator_bytes: int | None,
) -> Sums:
    checkpoint, at_a_time = _schedule(task, route, batch_size, checkpointing)
    try:
        return _Pass(task, route, checkpoint, at_a_time, pin_boundaries).run(accumulator_bytes)
    except IndexError as error:
        shapes = {name: tuple(t.shape) for name, t in task.batch.inputs.items()}
        raise CalibrationError(
            f"{type(task.model).__name__} cannot run on calibration samples of shapes {shapes} ({error}): are they "
            "longer than its positions?"
        ) from error


def _schedule(
    task: Task, route: Route, batch_size: int | None, checkpointing: bool | None
) -> tuple[bool, int]:
    """Whether to checkpoint, and how many samples to run at a time."""
    samples = task.batch.samples
    needed = route.bytes_per_token * task.batch.tokens
    free = _free_memory(task)
    room = free // 2
    if checkpointing is None:
        checkpointing = needed > min(room, _lean(task)) or (batch_size is not None and batch_size < samples)
    checkpointing = checkpointing and bool(route.blocks)
    if batch_size is None:
        share = needed / (len(route.blocks) if checkpointing else 1)
        batch_size = samples if share <= room else max(1, int(samples * room / share))
    _check_device_memory(task, route, checkpointing, free)
    log.info(
        "about %.0f MB of activations for %d samples, %.0f MB free: %s, %d samples at a time",
        needed / 1e6,
        samples,
        2 * room / 1e6,
        "checkpointing" if checkpointing else "no checkpointing",
        min(batch_size, samples),
    )
    return checkpointing, min(batch_size, samples)


def _lean(task: Task) -> float:
    """Bytes of activations to be kept by default.

    On a CUDA device a tenth of the model's, where blocks run again in little time; else as many as there is room for.
    """
    if _device(task).type != "cuda":
        return math.inf
    return sum(p.numel() * p.element_size() for p in task.model.parameters()) / 10


def _device(task: Task) -> torch.device:
    """Where the scored parameters lie; the first one's, if on several devices."""
    return next(iter(task.parameters.values())).device


def _free_memory(task: Task) -> int:
    """Bytes that tensors can have there."""
    device = _device(task)
    return cuda.free_memory(device) if device.type == "cuda" else available_memory()


def _check_scratch(task: Task) -> None:
    """See, before anything runs, that a CUDA device has room for what the libraries and our kernels work in.

    Raises:
        DeviceError: it has not.
    """
    device = _device(task)
    if device.type != "cuda":
        return
    free, least = cuda.free_memory(device), 2 * cuda.SCRATCH_BYTES
    if free < least:
        raise DeviceError(
            f"scoring needs at least {least >> 20} MiB of memory beside the weights on {device}, where {free >> 20} "
            "are free: free some, or score with the model on the CPU"
        )


def _check_device_memory(task: Task, route: Route, checkpointing: bool, free: int) -> None:
    """See, before anything runs, that a CUDA device has room for one sample and a kernel's scratch.

    Raises:
        DeviceError: it has not.
    """
    device = _device(task)
    if device.type != "cuda":
        return
    sample = route.bytes_per_token * task.batch.tokens / task.batch.samples
    least = sample / (len(route.blocks) if checkpointing else 1) + cuda.SCRATCH_BYTES
    if free < least:
        more = "" if checkpointing or not route.blocks else ", or checkpointing=True"
        raise DeviceError(
            f"scoring one sample needs about {least / 2**30:.1f} GiB beside the weights on {device}, where "
            f"{free / 2**30:.1f} GiB are free: take shorter samples{more}"
        )


@dataclass
class _Pass:
    """One attempt at :func:`streamed_sums`, with every parameter's route fixed."""

    task: Task
    route: Route
    checkpointing: bool
    batch_size: int
    pin_boundaries: bool = False

    def __post_init__(self) -> None:
        """Set up what the attempt adds to."""
        task, parts = self.task, self.batch_size < self.task.batch.samples
        self.samples = task.batch.samples
        self.total = task.total if task.ranks is not None else self.samples
        fold = parts and task.batch.tokens > STORE_TOKENS
        given = (task.importance, task.parameters, self.samples, self.route.streamed, task.progress)
        self.reducer = (
            Reducer(*given, fold=fold, stacks=task.stacks)
            if task.ranks is None
            else SharedReducer(task.ranks, task.total, self._order(), *given, fold=fold, stacks=task.stacks)
        )
        self.mode = Interposer(task.parameters, set(self.route.streamed), self.route.copied, self.reducer)
        self.mode.densities = self.route.densities
        self.mode.length = task.batch.tokens // self.samples
        self.factor = 1 if task.importance.kernel is not None else 1 / self.samples
        """Of the samples' summed loss. For second order each sample's own gradient is needed; the first-order kernels'
        formulas are homogeneous in ``g``, so that a factor 1/N at the end adds no rounding to every gradient."""

    def run(self, accumulator_bytes: int | None) -> Sums:
        """Everything, by the routes."""
        later = self.route.general if self.task.importance.order > 1 else set()
        active = {name: p for name, p in self.task.parameters.items() if name not in later}
        if active:
            with requiring_grad(active.values()):
                self._together(active)
        self._one_by_one(sorted(later), accumulator_bytes)
        if isinstance(self.reducer, SharedReducer):
            self.reducer.finish()
        sums = self.reducer.sums
        if self.task.importance.order == 1 and self.task.importance.kernel is not None:
            for array in (array for arrays in sums.values() for array in arrays):
                array *= 1 / self.total
        return sums

    def _order(self) -> list[str]:
        """The order in which ranks exchange gradients: about that of a backward pass, and of the routes after it."""
        names = {id(p): name for name, p in self.task.parameters.items()}
        backward = [names[id(p)] for p in reversed(list(self.task.model.parameters())) if id(p) in names]
        second = self.task.importance.order > 1
        one_dimensional = {name for name, p in self.task.parameters.items() if second and p.dim() == 1}
        return [n for n in backward if n not in one_dimensional] + [
            n for n in backward if n in one_dimensional
        ]

    def _together(self, active: Mapping[str, torch.Tensor]) -> None:
        """All samples' gradients of ``active`` parameters."""
        step = self.samples if self.checkpointing else self.batch_size
        handles = []
        try:
            if step == self.samples and not self.checkpointing:
                for name in self.route.general & set(active):
                    handles.append(active[name].register_post_accumulate_grad_hook(self._taker(name)))  # type: ignore[no-untyped-call]
            for start in range(0, self.samples, step):
                self._forward_backward(start, min(start + step, self.samples))
        finally:
            for handle in handles:
                handle.remove()
        for name in sorted(self.route.general & set(active)):
            self._take(name)
        leaked = {name for name, p in active.items() if p.grad is not None}
        if leaked:
            raise Reroute(leaked)
        self.reducer.check_complete()
        for name, copy in self.mode.copies.items():
            if copy.grad is not None:
                self.reducer.per_sample(name, copy.grad)

    def _forward_backward(self, start: int, stop: int) -> None:
        self.reducer.begin(start, stop)
        part = self.task.batch.take(start, stop)
        checkpoints: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.checkpointing:
            checkpoints = Checkpoints(
                self.route.blocks,
                self.samples,
                self.batch_size,
                self._recording,
                self._take_block,
                self.pin_boundaries,
            )
        with checkpoints, self.mode:
            if self.checkpointing:
                give_back_memory(_device(self.task))
            losses = self._losses(part)
        self.mode.forget()
        if self.checkpointing:
            give_back_memory(_device(self.task))
        check_losses(losses, start)
        if losses.requires_grad:
            (losses.sum() * self.factor).backward()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def _recording(self, start: int, stop: int) -> Iterator[None]:
        """A block's recomputation for samples ``start`` to ``stop``."""
        self.reducer.begin(start, stop)
        try:
            with torch.enable_grad(), self.mode:
                yield
        finally:
            self.mode.forget()
            self.reducer.begin(0, self.samples)

    def _take_block(self, block: Block) -> None:
        """Reduce the general gradients that this block alone makes, now that it is done."""
        for name in self.route.general:
            if id(self.task.parameters[name]) in block.exclusive:
                self._take(name)

    def _take(self, name: str) -> None:
        parameter = self.task.parameters[name]
        if parameter.grad is not None:
            if name in self.reducer.complete:
                raise Reroute({name})
            self.reducer.whole(name, parameter.grad)
            parameter.grad = None

    def _taker(self, name: str) -> Callable[[torch.Tensor], None]:
        return lambda parameter: self._take(name)

    def _losses(self, part: Batch) -> torch.Tensor:
        head, losses_of = self.route.head, self.task.losses_of
        fused = losses_of.plain and (part.samples == self.samples)
        if head is None or not fused or 4 * part.tokens * len(head) < FUSE_BYTES:
            return losses_of(part)
        return fused_losses(self.task, self.route, part, self.mode, not self.checkpointing)

    def _one_by_one(self, names: list[str], accumulator_bytes: int | None) -> None:
        """Second order on the general path: one sample at a time, as many parameters as accumulators fit."""
        budget = accumulator_bytes if accumulator_bytes is not None else _free_memory(self.task) // 2
        while names:
            taken: list[str] = []
            used = 0
            while names and (not taken or used + accumulators(self.task.parameters[names[0]]) <= budget):
                taken.append(names.pop(0))
                used += accumulators(self.task.parameters[taken[-1]])
            self._accumulate(taken)

    def _accumulate(self, names: list[str]) -> None:
        task = self.task

        def run(sample: int) -> None:
            losses = task.losses_of(task.batch.take(sample, sample + 1))
            check_losses(losses, sample)
            if losses.requires_grad:
                losses.sum().backward()  # type: ignore[no-untyped-call]

        accumulate({name: task.parameters[name] for name in names}, self.samples, run, self.reducer)


def accumulate(
    parameters: Mapping[str, torch.Tensor], samples: int, run: Callable[[int], None], reducer: Reducer
) -> None:
    """Reduce ``parameters`` from autograd's gradients, which ``run(sample)`` makes for one sample at a time."""
    share = 1 / samples
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def taker(name: str) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            if parameter.grad is None:
                return
            if name not in sums:
                kind = torch.promote_types(parameter.dtype, torch.float32)
                sums[name] = (
                    torch.zeros_like(parameter, dtype=kind),
                    torch.zeros_like(parameter, dtype=kind),
                )
            grad = parameter.grad.detach().contiguous()
            sums[name][0].add_(grad, alpha=share)
            _core.accumulate_square(sums[name][1], grad, share, **cuda.options(grad, scratch=False))
            parameter.grad = None

        return take

    handles = []
    try:
        with requiring_grad(parameters.values()):
            for name, parameter in parameters.items():
                handles.append(parameter.register_post_accumulate_grad_hook(taker(name)))  # type: ignore[no-untyped-call]
            for sample in range(samples):
                run(sample)
    finally:
        for handle in handles:
            handle.remove()
    for name in parameters:
        reducer.whole(name, *sums.pop(name, (None, None)))


def fused_losses(task: Task, route: Route, part: Batch, mode: Interposer, keep: bool) -> torch.Tensor:
    """The losses of a pass under ``mode`` whose final projection, ``route.head``, is fused into them.

    With ``keep`` the logits' slices are kept for backward.
    """
    losses_of, head = task.losses_of, route.head
    assert head is not None
    mode.head = head
    logits = losses_of.logits(part)
    name = next((n for n, p in task.parameters.items() if p is head and n in route.streamed), None)
    hidden, bias = mode.hidden, mode.head_bias
    if hidden is None:  # these samples went another way than the survey's
        return losses_of.of_logits(logits, part)
    constant = None if bias is None else bias.detach()
    use = None if name is None else HeadRows(mode.reducer, name, constant)
    ids = part.inputs["input_ids"]
    weight = task.stored.get(id(head)) or head.detach()
    return fused_loss(hidden, weight, constant, ids, use, mode.anchor, keep)


def accumulators(parameter: torch.Tensor) -> int:
    """Bytes of a parameter's two accumulators."""
    return 2 * parameter.numel() * max(4, parameter.element_size())
