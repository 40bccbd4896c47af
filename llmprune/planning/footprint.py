"""Bytes a model takes to run: its weights, and the cache that generation keeps.

Nothing is known of architectures here. The model runs with its cache on, on the meta device, and the tensors the cache
then holds are outputs of a recorded pass like any other: the axis algebra says what a removal makes of their sizes, and
two more passes, over another batch and another length, which of their dimensions grow with these.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from llmprune.errors import InputError, TraceError
from llmprune.tracing.inputs import BATCH, LENGTH, example_inputs
from llmprune.tracing.recording import Recording, Setup
from llmprune.tracing.tape import Tape

if TYPE_CHECKING:
    from llmprune.tracing.graph import Graph
    from llmprune.tracing.layers import Drop
    from llmprune.tracing.sublayers import Part

_MORE = 4  # what a second recording is longer by


@dataclass(frozen=True)
class Held:
    """One tensor of the cache.

    Attributes:
        tensor: its number on the cache's tape.
        limit: the most tokens it keeps; -1 for all.
        itemsize: bytes per element.
        scope: path of the module that made it.
        batch: dimensions that grow with the batch.
        length: ``(dimension, tokens per token of context, tokens besides)`` of those that grow with the context.
    """

    tensor: int
    limit: int
    itemsize: int
    scope: str
    batch: tuple[int, ...]
    length: tuple[tuple[int, int, int], ...]


@dataclass
class Footprint:
    """What is known of a model's bytes besides its graph.

    Attributes:
        itemsizes: parameter or buffer -> bytes per element.
        dtype: the commonest type of the parameters, as torch names it (``bfloat16``).
        device: the kind of device they lie on; ``cpu`` for a model on the meta device.
        caches: whether the model can keep a cache.
        tape: the recording with the cache on; None where that was not asked for, or the model keeps no cache.
        held: the cache's tensors.
        recorded: whether a cache was looked for.
    """

    itemsizes: dict[str, int]
    dtype: str
    device: str
    caches: bool
    tape: Tape | None = None
    held: list[Held] = field(default_factory=list)
    recorded: bool = False

    def to_json(self) -> dict[str, Any]:
        """The footprint as a JSON object."""
        return {**asdict(self), "held": [asdict(one) for one in self.held]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Footprint:
        """The inverse of :meth:`to_json`."""
        held = [
            Held(**{**one, "batch": tuple(one["batch"]), "length": tuple(map(tuple, one["length"]))})
            for one in data["held"]
        ]
        tape = None if data["tape"] is None else Tape.from_json(data["tape"])
        return cls(**{**data, "itemsizes": dict(data["itemsizes"]), "tape": tape, "held": held})


def footprint_of(model: nn.Module, cache: bool) -> Footprint:
    """Look at a model's types and, with ``cache``, at what it keeps while generating.

    Raises:
        TraceError: the model cannot be run with its cache on.
        InputError: no inputs can be made from its config.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    counts: dict[str, int] = {}
    for parameter in model.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + parameter.numel()
    found = Footprint(
        {name: tensor.element_size() for name, tensor in tensors.items()},
        max(counts, key=lambda name: counts[name]) if counts else "float32",
        next((p.device.type for p in model.parameters() if not p.is_meta), "cpu"),
        "use_cache" in inspect.signature(model.forward).parameters,
        recorded=cache,
    )
    if not cache or not found.caches:
        return found
    tape, wider, longer = (
        _record(model, batch, length)
        for batch, length in ((BATCH, LENGTH), (BATCH + 1, LENGTH), (BATCH, LENGTH + _MORE))
    )
    if not len(tape.cached) == len(wider.cached) == len(longer.cached):
        raise TraceError(
            f"{tape.model} keeps another cache for another length: its memory cannot be foreseen"
        )
    makers = {tid: op[4] for op in tape.ops for tid in op[3] if tid >= 0}
    for (tensor, limit, itemsize), (broad, *_), (long, *_) in zip(
        tape.cached, wider.cached, longer.cached, strict=True
    ):
        sizes = tape.tensors[tensor][0]
        batch = tuple(d for d, size in enumerate(wider.tensors[broad][0]) if size != sizes[d])
        length = []
        for d, size in enumerate(longer.tensors[long][0]):
            slope = (size - sizes[d]) // _MORE
            if slope:
                length.append((d, slope, max(0, sizes[d] - slope * LENGTH)))
        scope = tape.scopes[makers[tensor]] if tensor in makers else ""
        found.held.append(Held(tensor, limit, itemsize, scope, batch, tuple(length)))
    found.tape = tape if found.held else None
    return found


def _record(model: nn.Module, batch: int, length: int) -> Tape:
    inputs = example_inputs(model, batch, length)
    try:
        return Recording(model, inputs, Setup(cache=True)).run()
    except TraceError as error:
        try:
            return Recording(model, inputs, Setup(meta=False, cache=True)).run()
        except TraceError:
            raise error from None


class Memory:
    """Bytes of weights, buffers and cache under a removal; called like :meth:`Graph.numel`.

    Args:
        graph: the traced model.
        context: tokens of each sequence in the cache; 0 counts weights and buffers alone.
        batch: sequences.

    Raises:
        InputError: a context is given, and the graph was traced without ``cache=True``.
    """

    def __init__(self, graph: Graph, context: int = 0, batch: int = 1) -> None:
        found = graph.footprint
        if found is None or (context and not found.recorded):
            raise InputError(
                "memory with a context needs to know what generation keeps: llmprune.trace(model, cache=True) says it"
            )
        self.graph, self.context, self.batch = graph, context, batch
        self._bytes = found.itemsizes
        kinds = {self._bytes[name] for name in graph.parameters}
        self._uniform = kinds.pop() if len(kinds) == 1 else None
        cut = {name for axis in graph.axes for name, _ in axis.places}
        self._buffers = [
            (name, shape, [(graph.tensor_of(name), dim) for dim in range(len(shape))] if name in cut else [])
            for name, shape in graph.buffers.items()
        ]
        self._cache: Graph | None = None
        self._held: list[Held] = []
        if context and found.tape is not None:
            self._cache = graph.alongside(found.tape)
            self._ids = _same_axes(graph, self._cache)
            self._held = found.held
            self._ranks = [len(found.tape.tensors[one.tensor][0]) for one in found.held]

    def __call__(self, removed: Mapping[int, int], drops: Sequence[Drop | Part] = ()) -> int:
        """Bytes when axis i loses ``removed[i]`` indices and blocks go."""
        prefixes = tuple(prefix for drop in drops for prefix in drop.prefixes)
        return (
            self.weights(removed, drops) + self._of_buffers(removed, prefixes) + self.cache(removed, prefixes)
        )

    def weights(self, removed: Mapping[int, int], drops: Sequence[Drop | Part] = ()) -> int:
        """Bytes of the parameters, tied ones once."""
        if self._uniform is not None:
            return self.graph.numel(removed, drops) * self._uniform
        prefixes = tuple(prefix for drop in drops for prefix in drop.prefixes)
        cut = self.graph.new_shapes(removed)
        return sum(
            math.prod(cut.get(name, shape)) * self._bytes[name]
            for name, shape in self.graph.parameters.items()
            if not (prefixes and name.startswith(prefixes))
        )

    def _of_buffers(self, removed: Mapping[int, int], prefixes: tuple[str, ...]) -> int:
        left = iter(self.graph.new_sizes(removed, [pair for *_, pairs in self._buffers for pair in pairs]))
        total = 0
        for name, shape, pairs in self._buffers:
            count = math.prod(next(left) for _ in pairs) if pairs else math.prod(shape)
            if not (prefixes and name.startswith(prefixes)):
                total += count * self._bytes.get(name, 0)
        return total

    def cache(self, removed: Mapping[int, int], prefixes: tuple[str, ...] = ()) -> int:
        """Bytes of the cache, full to the context."""
        if self._cache is None:
            return 0
        gone = {mine: removed[theirs] for mine, theirs in self._ids.items() if theirs in removed}
        dims = [
            (one.tensor, dim)
            for one, rank in zip(self._held, self._ranks, strict=True)
            for dim in range(rank)
        ]
        left = iter(self._cache.new_sizes(gone, dims))
        total = 0
        for one, rank in zip(self._held, self._ranks, strict=True):
            sizes = [next(left) for _ in range(rank)]
            for dim in one.batch:
                sizes[dim] = sizes[dim] * self.batch // BATCH
            for dim, slope, besides in one.length:
                tokens = slope * self.context + besides
                sizes[dim] = tokens if one.limit < 0 else min(tokens, one.limit)
            if not (prefixes and f"{one.scope}.".startswith(prefixes)):
                total += math.prod(sizes) * one.itemsize
        return total


def _same_axes(first: Graph, second: Graph) -> dict[int, int]:
    """Axis of the second recording of a model -> the axis of the first that cuts the same positions."""
    places = {
        (*place, start, axis.size): axis.id
        for axis in first.axes
        for place, start in zip(axis.places, axis.starts, strict=True)
    }
    same = {}
    for axis in second.axes:
        found = {
            places.get((*place, start, axis.size))
            for place, start in zip(axis.places, axis.starts, strict=True)
        }
        if len(found) == 1 and (number := found.pop()) is not None:
            same[axis.id] = number
    return same
