"""Repeated blocks of a model, found by watching a forward pass, and run without keeping what happens inside them.

With checkpointing, a block's forward keeps only the activation that enters it. When backward reaches the block it is
run again, a few samples at a time, now recording (Chen et al. 2016); what the parameters inside see streams to the
reducer as usual. Neither modules nor their hooks are touched: torch's global forward hooks are set for the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from llmprune.machine.budget import return_memory

_CPU = torch.device("cpu")


@dataclass(eq=False)
class Block:
    """A module whose input is another such module's output.

    ``batched`` tells, for each leaf of its (args, kwargs), whether the first dimension is the sample.
    """

    module: nn.Module
    batched: tuple[bool, ...]
    exclusive: frozenset[int] = frozenset()
    """ids of the parameters that no module outside this block has."""
    returned: tuple[bool, ...] = ()
    """The same of its results, floating-point tensors alone."""
    mixes: bool = False
    """Whether it makes of its samples a tensor that is not told apart by them, and that gradients pass."""
    result: Any = None
    """(leaves, spec) of a result."""
    floats: tuple[bool, ...] = ()
    """For each leaf of its result whether it is a floating-point tensor; these are None in ``result``."""


@dataclass(eq=False)
class _Call:
    module: nn.Module
    entered: torch.Tensor | None
    left: torch.Tensor | None
    batched: tuple[bool, ...]
    returned: tuple[bool, ...]
    mixes: bool
    result: Any
    floats: tuple[bool, ...]


def give_back_memory(device: torch.device = _CPU) -> None:
    """Hand pages that are free inside the C library's heap back to the system, where it is glibc; else do nothing.

    What a block allocates and frees leaves holes that the next one's tensors do not fit: without this the heap of a
    checkpointed pass grows to twice what is ever in use. Work on another device than the CPU leaves no such holes.
    """
    if device.type == "cpu":
        return_memory()


def floating(leaves: list[Any]) -> list[torch.Tensor]:
    """The floating-point tensors among leaves, in order."""
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _has_samples(tensor: torch.Tensor, samples: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == samples


def _first_tensor(leaves: list[Any]) -> torch.Tensor | None:
    return next(iter(floating(leaves)), None)


def _take_off(handle: Any) -> None:
    """Remove a global hook, also from the table of those with keywords, which ``remove`` overlooks (torch 2.13)."""
    handle.remove()
    torch.nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id, None)


@contextmanager
def watch_blocks(model: nn.Module, samples: int) -> Iterator[Callable[[], list[Block]]]:
    """Watch one forward pass with ``samples`` samples; the yielded function then tells the blocks found.

    Blocks are members of a ``ModuleList`` or ``Sequential`` that are called once each, two or more in a row, where
    each takes the previous one's output itself. Of nested chains the outermost counts.
    """
    members = {
        id(child)
        for module in model.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for child in module.children()
    }
    calls: list[_Call] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if id(module) in members:
            leaves = pytree.tree_leaves((args, kwargs))
            batched = tuple(isinstance(t, torch.Tensor) and _has_samples(t, samples) for t in leaves)
            results, spec = pytree.tree_flatten(output)
            parts = floating(results)
            floats = tuple(isinstance(t, torch.Tensor) and t.is_floating_point() for t in results)
            rest = [None if real else leaf for leaf, real in zip(results, floats, strict=True)]
            returned = tuple(_has_samples(t, samples) for t in parts)
            mixes = any(t.requires_grad and not apart for t, apart in zip(parts, returned, strict=True))
            calls.append(
                _Call(
                    module,
                    _first_tensor(leaves),
                    _first_tensor(results),
                    batched,
                    returned,
                    mixes,
                    (rest, spec),
                    floats,
                )
            )

    handle = register_module_forward_hook(note, with_kwargs=True)
    try:
        yield lambda: _chains(model, calls)
    finally:
        _take_off(handle)
        for call in calls:
            call.entered = call.left = None


def _chains(model: nn.Module, calls: list[_Call]) -> list[Block]:
    times: dict[int, int] = {}
    for call in calls:
        times[id(call.module)] = times.get(id(call.module), 0) + 1
    once = [call for call in calls if times[id(call.module)] == 1]
    producer = {id(call.left): call for call in once if call.left is not None}
    linked: set[int] = set()
    for call in once:
        before = producer.get(id(call.entered))
        if before is not None and before is not call:
            linked |= {id(before.module), id(call.module)}
    chosen = [call for call in once if id(call.module) in linked]
    inner = {id(m) for call in chosen for m in call.module.modules() if m is not call.module}
    blocks = [
        Block(
            call.module,
            call.batched,
            returned=call.returned,
            mixes=call.mixes,
            result=call.result,
            floats=call.floats,
        )
        for call in chosen
        if id(call.module) not in inner
    ]
    _find_exclusive(model, blocks)
    return blocks


def _find_exclusive(model: nn.Module, blocks: list[Block]) -> None:
    owner: dict[int, int] = {}
    home = {id(module): number for number, block in enumerate(blocks) for module in block.module.modules()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            number = home.get(id(module), -1)
            owner[id(parameter)] = number if owner.get(id(parameter), number) == number else -1
    for number, block in enumerate(blocks):
        block.exclusive = frozenset(key for key, where in owner.items() if where == number)


class Owner(Protocol):
    """What runs a block again."""

    def again(
        self, run: Run, inputs: tuple[torch.Tensor, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """Run a block forward and backward; the gradients of its differentiable inputs."""


@dataclass(eq=False)
class Run:
    """One block's call, to be repeated.

    Attributes:
        owner: What repeats it.
        block: The block.
        leaves: Its arguments, flat; None in the place of each differentiable one.
        spec: How they fold into (args, kwargs).
        outputs: Its floating-point results, until they are handed on.
        differentiable: The places of the arguments that gradients are wanted of.
    """

    owner: Owner
    block: Block
    leaves: list[Any]
    spec: Any
    outputs: list[torch.Tensor]
    differentiable: list[int] = field(default_factory=list)

    def result(self, output: Any, anchor: torch.Tensor) -> Any:
        """``output`` with its floating-point tensors (:attr:`outputs`) such that backward runs the block again."""
        parts, structure = pytree.tree_flatten(output)
        self.differentiable = [
            i for i, t in enumerate(self.leaves) if isinstance(t, torch.Tensor) and t.requires_grad
        ]
        inputs = [self.leaves[i] for i in self.differentiable]
        for i in self.differentiable:
            self.leaves[i] = None  # kept by autograd alone, which frees them in time
        results = iter(_recomputed(self, anchor, *inputs))
        whole = [
            next(results) if isinstance(part, torch.Tensor) and part.is_floating_point() else part
            for part in parts
        ]
        return pytree.tree_unflatten(whole, structure)


class _Recomputed(torch.autograd.Function):
    """Hands on outputs computed without recording; backward runs the block again with recording."""

    @staticmethod
    def forward(ctx: Any, run: Run, anchor: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs, run.outputs = run.outputs, []
        ctx.run = run
        ctx.save_for_backward(*inputs)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None, *ctx.run.owner.again(ctx.run, ctx.saved_tensors, gradients)


_recomputed: Callable[..., tuple[torch.Tensor, ...]] = _Recomputed.apply


class Checkpoints:
    """Runs blocks with recomputation for as long as it is entered.

    Args:
        blocks: Which modules.
        samples: How many samples the calls hold.
        batch_size: How many of them to recompute at a time.
        recording: Entered around each recomputation: (first sample, past the last) -> context.
        finished: Called with each block when its backward is done.
        pinned: Keep the blocks' inputs in pinned host memory until they are run again.
    """

    def __init__(
        self,
        blocks: list[Block],
        samples: int,
        batch_size: int,
        recording: Callable[[int, int], Any],
        finished: Callable[[Block], None],
        pinned: bool = False,
    ):
        self.pinned = pinned
        self._blocks = {id(block.module): block for block in blocks}
        self.samples, self.batch_size = samples, batch_size
        self.recording, self.finished = recording, finished
        self._anchor = torch.zeros((), requires_grad=True)
        self._handles: list[Any] = []

    def __enter__(self) -> Checkpoints:
        """Set the hooks."""
        self._handles = [
            register_module_forward_pre_hook(self._entering),
            register_module_forward_hook(self._leaving, with_kwargs=True),
        ]
        return self

    def __exit__(self, *exception: Any) -> None:
        """Remove them; recorded outputs can still run backward."""
        for handle in self._handles:
            _take_off(handle)
        self._handles = []
        torch.set_grad_enabled(True)  # a block that raised left it off

    def _entering(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._blocks:
            torch.set_grad_enabled(False)

    def _leaving(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        block = self._blocks.get(id(module))
        if block is None:
            return None
        torch.set_grad_enabled(True)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        run = Run(self, block, leaves, spec, floating(pytree.tree_leaves(output)))
        pinned = self.pinned and any(isinstance(t, torch.Tensor) and t.is_cuda for t in leaves)
        with torch.autograd.graph.save_on_cpu(pin_memory=True) if pinned else nullcontext():
            return run.result(output, self._anchor)

    def again(
        self, run: Run, inputs: tuple[torch.Tensor, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """Run a block forward and backward, ``batch_size`` samples at a time; the gradients of its inputs."""
        totals: list[torch.Tensor | None] = [None] * len(inputs)
        for start in range(0, self.samples, self.batch_size):
            stop = min(start + self.batch_size, self.samples)
            with self.recording(start, stop):
                run_part(run, inputs, gradients, start, stop, self.samples, totals)
        self.finished(run.block)
        give_back_memory(next((t.device for t in inputs), _CPU))
        return totals


def cut(tensor: torch.Tensor, batched: bool, start: int, stop: int, samples: int) -> torch.Tensor:
    """Samples ``start`` to ``stop`` of a tensor that has them in its first dimension; else the tensor."""
    whole = stop - start == samples
    return tensor[start:stop] if batched and not whole and tensor.shape[0] == samples else tensor


def run_part(
    run: Run,
    inputs: tuple[torch.Tensor, ...],
    gradients: tuple[torch.Tensor | None, ...],
    start: int,
    stop: int,
    samples: int,
    totals: list[torch.Tensor | None] | None,
) -> None:
    """Run a block again for some of ``samples`` samples, forward and backward.

    Args:
        run: Its call.
        inputs: The differentiable arguments, for all samples.
        gradients: Of its floating-point results, for all samples.
        start: The first sample.
        stop: Past the last.
        samples: How many there are.
        totals: Gets the gradients of ``inputs``; None where only the parameters' are wanted.
    """
    batched = run.block.batched
    leaves = [
        cut(leaf, batched[i], start, stop, samples) if isinstance(leaf, torch.Tensor) else leaf
        for i, leaf in enumerate(run.leaves)
    ]
    own = [
        cut(t.detach(), batched[i], start, stop, samples).detach().requires_grad_(totals is not None)
        for t, i in zip(inputs, run.differentiable, strict=True)
    ]
    for i, tensor in zip(run.differentiable, own, strict=True):
        leaves[i] = tensor
    args, kwargs = pytree.tree_unflatten(leaves, run.spec)
    parts = floating(pytree.tree_leaves(run.block.module(*args, **kwargs)))
    pairs = []
    for part, gradient, apart in zip(parts, gradients, run.block.returned, strict=True):
        # What all samples share has one gradient, which counts once.
        if gradient is not None and part.requires_grad and (apart or start == 0):
            pairs.append((part, cut(gradient, apart, start, stop, samples)))
    torch.autograd.backward([part for part, _ in pairs], [gradient for _, gradient in pairs])
    if totals is None:
        return
    for number, (tensor, index) in enumerate(zip(own, run.differentiable, strict=True)):
        if tensor.grad is None:
            continue
        if stop - start == samples:
            totals[number] = tensor.grad
            continue
        total = totals[number]
        if total is None:
            totals[number] = total = torch.zeros_like(inputs[number])
        cut(total, batched[index], start, stop, samples).add_(tensor.grad)
