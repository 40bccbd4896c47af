"""Scores of a model larger than memory: its blocks are read from their files one at a time, and dropped after use.

The model is on the meta device (:mod:`llmprune.out_of_core.stored`). Its forward runs once, over all samples: where it
calls a block, that block's weights are read, the block runs a few samples at a time, and only what enters it is kept,
in memory or on disk. Backward is autograd's over the rest of the model: where it reaches a block, the block is read
again, run again with recording (Chen et al. 2016), and every gradient inside is reduced to scores before the next one
is read. The next block is read by another thread while one runs. The embedding's rows are read as they are looked up,
and the final projection is fused into the loss, slice by slice. What else lies outside the blocks stays in memory.
On a CUDA device all of that is in its memory but the blocks, which come through pinned host memory
(:mod:`llmprune.out_of_core.transfer`), and what enters them, which may wait there.

How each parameter is to be treated is found as in memory (:func:`llmprune.scoring.streaming.find_route`), on a model in
which all blocks of a kind share the weights of the first: the survey asks who uses what how often, not for values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from llmprune.errors import InputError
from llmprune.machine.budget import resident_memory, return_memory
from llmprune.out_of_core.block_memory import Gauge, Schedule, choose, gauge, sizes_of
from llmprune.out_of_core.block_weights import (
    Outside,
    Weights,
    exclusive,
    kinds_of,
    shells,
    stands,
    surrogates,
)
from llmprune.out_of_core.boundaries import Boundaries, Journal, signature
from llmprune.out_of_core.stored import Streaming, source_of
from llmprune.scoring.calibration import Batch
from llmprune.scoring.importance import Importance
from llmprune.scoring.interpose import Interposer
from llmprune.scoring.loss import SampleLosses, check_losses
from llmprune.scoring.recompute import Block, Run, cut, floating, run_part
from llmprune.scoring.reduction import Reducer, Reroute, Sums
from llmprune.scoring.streaming import (
    Route,
    Task,
    accumulate,
    find_route,
    fused_losses,
    requiring_grad,
    undisturbed,
)

log = logging.getLogger(__name__)

_SKETCH_TOKENS = 4


def block_streamed_sums(
    model: nn.Module,
    batch: Batch,
    losses_of: SampleLosses,
    names: list[str],
    importance: Importance,
    streaming: Streaming,
    *,
    progress: Callable[[str], None],
    batch_size: int | None = None,
    stacks: Collection[str] = (),
    watch: Callable[[str, torch.Tensor], None] | None = None,
) -> Sums:
    """As :func:`llmprune.scoring.streaming.streamed_sums`, of a model on the meta device.

    Args:
        model: The model, as :func:`llmprune.out_of_core.stored.open_model` makes it.
        batch: The calibration samples.
        losses_of: The loss.
        names: The parameters to score.
        importance: Which importance, of order 1 or 2.
        streaming: The budget, and where the results of blocks that are done are kept until the end.
        progress: Called with the name of each parameter as it is done.
        batch_size: How many samples run at a time inside a block; None for as many as fit.
        stacks: Names of parameters whose slices along dimension 0 are told apart.
        watch: Called with the name of a scored parameter of a block and the gradient (rows, out) of each product with
            it, of the losses' sum.

    Raises:
        InputError: The model is no chain of repeated blocks, or needs what only whole passes can give, or the budget
            is too small.
        CalibrationError: A sample's loss is not finite.
    """
    source = source_of(model)
    assert source is not None
    device = streaming.device
    batch = batch.to(device)
    with shells(model, device) as parameters, undisturbed(model):
        scored = {name: parameters[name] for name in names}
        outside = Outside(model, source, parameters)
        task = Task(model, batch, losses_of, scored, importance, progress, stacks, outside.stored)
        kinds = kinds_of(model)
        with surrogates(model, source, parameters, kinds):
            outside.load(kinds)
            route = _surveyed(task, outside)
            blocks = route.blocks
            of_sample = gauge(task, model, blocks) if blocks else Gauge(0, 0)
        if not blocks:
            raise InputError(
                f"{type(model).__name__} is no chain of repeated blocks, each of which takes what the one before it "
                "gives: it cannot be scored block by block; load it into memory"
            )
        _check_route(task, route)
        outside.load([[block.module] for block in blocks])
        own = exclusive(model, [block.module for block in blocks])
        return_memory()
        each = [Weights.bytes_of(parameters, alone) for alone in own]
        extra = max(sum(source.extra_bytes(n, parameters[n].dtype) for n in alone) for alone in own)
        sizes = sizes_of(task, route, own, max(each), extra, of_sample.border)
        schedule = source.agreed(
            lambda: choose(
                *(sizes, of_sample, len(blocks), batch.samples, streaming.budget, batch_size), device=device
            )
        )
        journal = None
        if streaming.state is not None:
            depends = signature(
                *(model, source, batch, importance),
                scored=sorted(task.parameters),
                stacks=sorted(task.stacks),
                blocks=len(blocks),
            )
            journal = Journal(streaming.state, depends, device)
        weights = Weights(source, parameters, own, schedule.buffers, device)
        boundaries = Boundaries(schedule.apart, journal, device)
        try:
            while True:
                try:
                    sums = _BlockPass(task, route, weights, schedule, boundaries, journal, watch).run()
                    break
                except Reroute as reroute:
                    if reroute.names <= route.general:
                        raise InputError(
                            f"gradients of {reroute} come in parts that no schedule by blocks covers: load the model "
                            "into memory"
                        ) from reroute
                    route = route.without(reroute.names, scored)
                    _check_route(task, route)
        finally:
            weights.close()
            boundaries.close()
        if journal is not None:
            journal.remove()
        return sums


def _surveyed(task: Task, outside: Outside) -> Route:
    """The route; a stored parameter that is used in other ways than by lookups and products is read whole."""
    sketch = task.batch.sketch(_SKETCH_TOKENS)
    while True:
        counter = Reducer(task.importance, {}, 2, {}, lambda name: None)
        with Interposer({}, set(), set(), counter, task.stored):
            task.losses_of.find_shift(sketch)
        route = find_route(task).without(set(task.stacks), task.parameters)
        whole = {n for n in route.general if id(task.parameters[n]) in task.stored}
        if not whole:
            return route
        outside.keep(whole)
        outside.load(kinds_of(task.model))


def _check_route(task: Task, route: Route) -> None:
    """Refuse what block streaming cannot give.

    Raises:
        InputError: second order of parameters whose gradients per sample only whole passes give.
    """
    if task.importance.order < 2:
        return
    inside = {key for block in route.blocks for key in block.exclusive}
    outer = sorted(n for n in route.general if id(task.parameters[n]) not in inside)
    which = f"which {task.importance.name} needs: take an importance of first order, or load the model into memory"
    if outer:
        raise InputError(
            f"{outer[0]} lies outside the blocks of {type(task.model).__name__} and has no gradient of its own for "
            f"each sample, {which}"
        )
    if any(block.mixes for block in route.blocks):
        raise InputError(
            f"blocks of {type(task.model).__name__} hand on a tensor that all samples share, so that there are no "
            f"gradients for each sample, {which}"
        )


class _BlockPass:
    """One forward and backward pass, with every parameter's route fixed."""

    def __init__(
        self,
        task: Task,
        route: Route,
        weights: Weights,
        schedule: Schedule,
        boundaries: Boundaries,
        journal: Journal | None,
        watch: Callable[[str, torch.Tensor], None] | None = None,
    ):
        self.watch = watch
        self.task, self.route, self.weights, self.schedule = task, route, weights, schedule
        self.boundaries, self.journal = boundaries, journal
        self.batch_size = schedule.batch_size
        self.samples = task.batch.samples
        self.numbers = {id(block.module): number for number, block in enumerate(route.blocks)}
        self.sums: Sums = {}
        self.anchor = torch.zeros((), requires_grad=True)
        self.factor = 1 if task.importance.kernel is not None else 1 / self.samples
        inside = {name for own in weights.names for name in own}
        self.outer = {name: p for name, p in task.parameters.items() if name not in inside}
        self.general = set(route.general)

    def run(self) -> Sums:
        """Everything, by the routes."""
        task = self.task
        values = {name: task.stored.get(id(p), p) for name, p in self.outer.items()}
        streamed = {name: count for name, count in self.route.streamed.items() if name in self.outer}
        reducer = Reducer(task.importance, values, self.samples, streamed, task.progress, stacks=task.stacks)
        copied = self.route.copied & set(self.outer)
        mode = Interposer(self.outer, set(streamed), copied, reducer, task.stored)
        mode.densities, mode.length = self.route.densities, task.batch.tokens // self.samples
        if self.watch is not None:
            mode.watch = self._watched
        reducer.begin(0, self.samples)
        with requiring_grad(p for p in self.outer.values() if id(p) not in task.stored):
            with stands(task.model, self.route.blocks, self._call), mode:
                losses = self._losses(mode)
            mode.forget()
            check_losses(losses)
            self._give_back()
            if losses.requires_grad:
                (losses.sum() * self.factor).backward()  # type: ignore[no-untyped-call]
            self._finish(self.outer, mode, reducer)
        self.sums |= reducer.sums
        if task.importance.order == 1:
            for array in (array for arrays in self.sums.values() for array in arrays):
                array *= 1 / (self.samples * self.factor)
        return {name: self.sums[name] for name in task.parameters}

    def _losses(self, mode: Interposer) -> torch.Tensor:
        task = self.task
        if self.route.head is None or not task.losses_of.plain or self.watch is not None:
            return task.losses_of(task.batch)
        return fused_losses(task, self.route, task.batch, mode, self.schedule.logits)

    def _finish(self, parameters: Mapping[str, torch.Tensor], mode: Interposer, reducer: Reducer) -> None:
        """Reduce what autograd has summed up, and see that all is there."""
        for name, parameter in parameters.items():
            if name in self.general and parameter.grad is not None:
                reducer.whole(name, parameter.grad)
                parameter.grad = None
        leaked = {name for name, parameter in parameters.items() if parameter.grad is not None}
        if leaked:
            raise Reroute(leaked)
        reducer.check_complete()
        for name, copy in mode.copies.items():
            if copy.grad is not None:
                reducer.per_sample(name, copy.grad)

    def _give_back(self) -> None:
        """Hand free pages back where holes have grown beyond the plan; the next block could use most of them."""
        if resident_memory() > self.schedule.settled:
            return_memory()

    def _parts(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.samples, self.batch_size):
            yield start, min(start + self.batch_size, self.samples)

    def _call(self, block: Block, args: Any, kwargs: Any) -> Any:
        """A block's forward: without recording, a few samples at a time."""
        number = self.numbers[id(block.module)]
        leaves, spec = pytree.tree_flatten((args, kwargs))
        done = self._forward_done(block, number)
        output, whole = self._forward(block, leaves, spec) if done is None else done
        if done is None and self.journal is not None:
            self.journal.put("forward", number, whole)
        self._give_back()
        with self.boundaries.keeping():
            return Run(self, block, leaves, spec, whole).result(output, self.anchor)

    def _forward_done(self, block: Block, number: int) -> tuple[Any, list[torch.Tensor]] | None:
        """What an earlier process has left of a block's forward, as :meth:`_forward` gives it."""
        rest, structure = block.result
        if self.journal is None or any(isinstance(leaf, torch.Tensor) for leaf in rest):
            return None
        found = self.journal.get("forward", number, len(block.returned))
        if found is None:
            return None
        whole = [tensor for tensor in found if tensor is not None]
        tensors = iter(whole)
        leaves = [next(tensors) if real else leaf for leaf, real in zip(rest, block.floats, strict=True)]
        return pytree.tree_unflatten(leaves, structure), whole

    def _forward(self, block: Block, leaves: list[Any], spec: Any) -> tuple[Any, list[torch.Tensor]]:
        """A result of the block (of some samples), and its floating-point tensors for all samples."""
        number = self.numbers[id(block.module)]
        following = number + 1 if number + 1 < len(self.route.blocks) else max(0, number - 1)
        parts: list[list[torch.Tensor]] = []
        output: Any = None
        with torch.no_grad(), self.weights.present(number, following):
            for start, stop in self._parts():
                few = [
                    cut(leaf, block.batched[i], start, stop, self.samples)
                    if isinstance(leaf, torch.Tensor)
                    else leaf
                    for i, leaf in enumerate(leaves)
                ]
                some_args, some_kwargs = pytree.tree_unflatten(few, spec)
                output = block.module(*some_args, **some_kwargs)
                parts.append(floating(pytree.tree_leaves(output)))
        return output, [
            torch.cat(tensors) if apart and len(tensors) > 1 else tensors[0]
            for apart, tensors in zip(block.returned, zip(*parts, strict=True), strict=True)
        ]

    def again(
        self, run: Run, inputs: tuple[torch.Tensor, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """A block's backward: run again, every gradient inside reduced; the gradients of its inputs."""
        number = self.numbers[id(run.block.module)]
        names = [name for name in self.weights.names[number] if name in self.task.parameters]
        if self.journal is not None:
            done, sums = self.journal.get("backward", number, len(inputs)), self.journal.get_sums(number)
            if done is not None and sums is not None:
                self.sums |= sums
                for name in names:
                    self.task.progress(name)
                return done
        with self.weights.present(number, number - 1 if number else None), torch.enable_grad():
            while True:
                try:
                    totals, sums = self._reduced(run, inputs, gradients, names)
                    break
                except Reroute as reroute:
                    if reroute.names <= self.general:
                        raise
                    log.info("block %d again: %s cannot be had as was planned", number, reroute)
                    self.general |= reroute.names
        self.sums |= sums
        if self.journal is not None:
            self.journal.put_sums(number, sums)
            self.journal.put("backward", number, totals)
        self._give_back()
        return totals

    def _watched(self, name: str, dy: torch.Tensor) -> None:
        assert self.watch is not None
        self.watch(name, dy if self.factor == 1 else dy / self.factor)

    def _reduced(
        self,
        run: Run,
        inputs: tuple[torch.Tensor, ...],
        gradients: tuple[torch.Tensor | None, ...],
        names: list[str],
    ) -> tuple[list[torch.Tensor | None], Sums]:
        task, route = self.task, self.route
        own = {name: task.parameters[name] for name in names}
        streamed = {n: route.streamed[n] for n in names if n in route.streamed and n not in self.general}
        later = {n for n in names if n in self.general} if task.importance.order > 1 else set()
        reducer = Reducer(
            task.importance,
            own,
            self.samples,
            streamed,
            task.progress,
            fold=self.schedule.fold,
            stacks=task.stacks,
        )
        mode = Interposer(own, set(streamed), (route.copied & set(names)) - self.general, reducer)
        mode.densities, mode.length = route.densities, task.batch.tokens // self.samples
        if self.watch is not None:
            mode.watch = self._watched
        totals: list[torch.Tensor | None] = [None] * len(inputs)
        active = {name: p for name, p in own.items() if name not in later}
        with requiring_grad(active.values()):
            for start, stop in self._parts():
                reducer.begin(start, stop)
                with mode:
                    run_part(run, inputs, gradients, start, stop, self.samples, totals)
                mode.forget()
            self._finish(active, mode, reducer)
        if later:

            def alone(sample: int) -> None:
                run_part(run, inputs, gradients, sample, sample + 1, self.samples, None)

            accumulate({name: own[name] for name in sorted(later)}, self.samples, alone, reducer)
        return totals, reducer.sums
