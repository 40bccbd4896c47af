"""Time as a cost: what a request takes on this machine, foreseen from timed shapes and measured on the model.

A request is a prompt of ``context`` tokens in ``batch`` sequences and ``new_tokens`` steps after it, one token each.
Its operations are those on the tape, with the recorded batch and length replaced; each takes what its shape takes in
the table of :mod:`llmprune.machine.timing`, interpolated between sizes that were timed. Matrix products with weights
are timed by [tokens, in, out], attention by its heads, batched products by their batch; convolutions and grouped
products take what as many multiply-accumulates take in a square product; everything else counts by the elements it
writes. What Python and the framework add around the operations shows in the whole model's time only, and is spread over
its operations evenly.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from llmprune.errors import InputError
from llmprune.machine.timing import Clock, Sample, Table
from llmprune.tracing.inputs import example_inputs
from llmprune.tracing.recording import cached_tensors
from llmprune.tracing.tape import MUTATES, TENSOR, arguments
from llmprune.tracing.wrapped import on_uncompiled

if TYPE_CHECKING:
    from llmprune.tracing.graph import Graph
    from llmprune.tracing.layers import Drop
    from llmprune.tracing.sublayers import Part

Array = npt.NDArray[np.float64]

CONTEXT, NEW_TOKENS = 128, 32
"""Of a request, where nothing else is asked for."""
REPEATS = 9
"""Measurements of a request; each measures the prompt once and eight steps."""
GRID = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Shares of a size that are timed where one size of a product varies; every other one where two do."""
MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128)
"""What ``round_to="auto"`` chooses from."""

_STEPS = 8
_FINER = 0.03  # what a coarser multiple has to gain for it to be taken
_ELEMENTS = tuple(4**power for power in range(2, 13))
_PRODUCTS = {
    "aten::mm": 0,
    "aten::addmm": 1,
    "aten::linear": 0,
    "aten::bmm": 0,
    "aten::baddbmm": 1,
    "aten::matmul": 0,
}
_ATTENTION = "aten::scaled_dot_product_attention"
_BY_MACS = ("aten::convolution", "aten::_grouped_mm")
_SQUARE = 512
_SHARES = (0.67, 0.73, 0.79, 0.86, 0.93)
_FEWEST = 8  # multiples an FFN axis has to hold for its sizes to be rounded to it


# --- measured -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What a model took, measured.

    Attributes:
        context: tokens of the prompt.
        batch: sequences.
        new_tokens: steps after it.
        prefill: the prompt's pass.
        decode: one step; None for a model without a cache, whose request is its pass alone.
    """

    context: int
    batch: int
    new_tokens: int
    prefill: Sample
    decode: Sample | None

    @property
    def seconds(self) -> float:
        """The whole request, of the processor times: what the prediction is held against."""
        return self.prefill.busy + (0.0 if self.decode is None else self.new_tokens * self.decode.busy)

    @property
    def noisy(self) -> bool:
        """Whether the measurements lie too far apart to be relied on."""
        return self.prefill.noisy or (self.decode is not None and self.decode.noisy)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, in seconds."""
        return {**asdict(self), "seconds": self.seconds, "noisy": self.noisy}


@on_uncompiled
def measure_request(
    model: nn.Module,
    context: int | None = None,
    batch: int = 1,
    new_tokens: int | None = None,
    repeats: int = REPEATS,
) -> Request:
    """Time a request on a model, where it lies and with torch's present number of threads.

    Args:
        model: any model example inputs can be made for; run in evaluation mode and left in its own.
        context: tokens of the prompt; 128 by default, fewer where the model has fewer positions.
        batch: sequences.
        new_tokens: steps the request has; 32 by default.
        repeats: how often the prompt is timed, at least 2.

    Raises:
        InputError: the model has fewer positions, or no inputs can be made for it.
    """
    new_tokens = NEW_TOKENS if new_tokens is None else new_tokens
    context = fitting(getattr(model, "config", None), context)
    inputs = example_inputs(model, batch, context)
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    forward = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": True} if "use_cache" in forward and new_tokens else {}
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    prompts, steps = [], []
    try:
        with torch.inference_mode():
            for repeat in range(repeats + 1):  # the first one warms up
                clock = Clock(device)
                result = model(**inputs, **options)
                prompts.append(clock.read())
                cache = result.get("past_key_values") if options and isinstance(result, Mapping) else None
                if cache is None or next(cached_tensors(cache), None) is None:
                    continue
                told = {"past_key_values": cache, "use_cache": True}
                name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
                if "encoder_outputs" in forward and "encoder_last_hidden_state" in result:
                    told["encoder_outputs"] = (result["encoder_last_hidden_state"],)
                token = inputs[name][:, -1:]
                for _ in range(_STEPS if repeat else 1):
                    clock = Clock(device)
                    model(**{name: token}, **told)
                    steps.append(clock.read())
    finally:
        for module, mode in training:
            module.training = mode
    decode = Sample.of(steps[1:]) if len(steps) > 2 else None
    return Request(context, batch, new_tokens, Sample.of(prompts[1:]), decode)


def fitting(config: Any, context: int | None) -> int:
    """A context the model has positions for, with the steps that are timed after it."""
    most = getattr(config, "max_position_embeddings", None)
    room = most - _STEPS if isinstance(most, int) and most > 0 else None
    if context is None:
        return CONTEXT if room is None else max(1, min(CONTEXT, room))
    if room is not None and context > room:
        raise InputError(
            f"a context of {context} tokens is more than the model has positions for: it has {most}, and "
            f"{_STEPS} are needed for the steps after it"
        )
    return context


# --- foreseen -----------------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """Operations of one kind with the same dense sizes: what varies of each, and the times of it.

    Attributes:
        name: of the operation in the table.
        sizes: dense sizes.
        varies: which of them vary.
        weights: of each operation, how often a request runs it.
        scopes: of each operation, index of its module's path.
        factors: of each operation and varying size, what the product of ``refs`` is multiplied by.
        refs: of each operation and varying size, places among the sizes asked of the graph.
    """

    name: str
    sizes: tuple[int, ...]
    varies: tuple[int, ...]
    weights: list[float] = field(default_factory=list)
    scopes: list[int] = field(default_factory=list)
    factors: list[list[float]] = field(default_factory=list)
    refs: list[list[list[int]]] = field(default_factory=list)


class RequestTime:
    """Nanoseconds of a request under a removal; called like :meth:`Graph.numel`.

    Args:
        graph: the traced model.
        kinds: kinds of axes that may give; others count as whole.
        context: tokens of the prompt.
        batch: sequences.
        new_tokens: steps after it.
        measured: what the whole model took as it is; what its operations do not explain is spread over them.
        table: timed shapes; None takes those of this machine.
    """

    def __init__(
        self,
        graph: Graph,
        kinds: Sequence[str],
        context: int = CONTEXT,
        batch: int = 1,
        new_tokens: int = NEW_TOKENS,
        measured: Request | None = None,
        table: Table | None = None,
    ) -> None:
        self.graph = graph
        self.table = table_of(graph) if table is None else table
        self._varying = {axis.id for axis in graph.axes if axis.prunable and axis.kind in kinds}
        self._old = _recorded(graph)
        self._new = (batch, context) if self._old[1] else self._old
        self._refs: dict[tuple[int, int], int] = {}
        self._kinds: dict[tuple[Any, ...], Kind] = {}
        self._macs: dict[
            int, float
        ] = {}  # operation timed by its multiply-accumulates -> times a request counts them
        steps = new_tokens if self._old[1] and _generates(graph) else 0
        self._read(1.0, context)
        if steps and (measured is None or measured.decode is not None):
            self._read(float(steps), 1)
        self._arrays = [self._array(kind) for kind in self.kinds]
        self._around, self._scale = 0.0, 1.0
        if measured is not None:
            alone = self({}) / 1e9
            if measured.seconds > alone:
                self._around = (measured.seconds - alone) / sum(float(a[0].sum()) for a in self._arrays)
            else:
                self._scale = measured.seconds / alone

    @property
    def kinds(self) -> list[Kind]:
        """The operations of the request, by kind and dense sizes."""
        return list(self._kinds.values())

    @cached_property
    def _times(self) -> list[tuple[list[Array], Array]]:
        """The times of every kind, and the sizes they are of."""
        times = [self._timed(kind) for kind in self.kinds]
        self.table.save()
        return times

    @cached_property
    def _per_mac(self) -> float:
        return self.table.time("gemm", (_SQUARE,) * 3) / _SQUARE**3

    def __call__(self, removed: Mapping[int, int], drops: Sequence[Drop | Part] = ()) -> int:
        """Nanoseconds when axis i loses ``removed[i]`` indices and blocks go."""
        prefixes = tuple(prefix for drop in drops for prefix in drop.prefixes)
        scopes = self.graph.tape.scopes
        stays = np.array(
            [not (prefixes and f"{scope}.".startswith(prefixes)) for scope in scopes], dtype=float
        )
        sizes = np.ones(len(self._refs) + 1)
        sizes[:-1] = self.graph.new_sizes(removed, list(self._refs))
        total = 0.0
        for kind, (weights, places, factors, refs), timed in zip(
            self.kinds, self._arrays, self._times, strict=True
        ):
            often = weights * stays[places]
            seconds = _interpolated(kind, factors * sizes[refs].prod(axis=2), *timed)
            total += float(often @ seconds) + self._around * float(often.sum())
        if self._macs:
            each = self.graph.macs_each(removed)
            total += self._per_mac * sum(
                each[op] * times * stays[self.graph.tape.ops[op][4]] for op, times in self._macs.items()
            )
        return round(total * self._scale * 1e9)

    # Reading the tape

    def _read(self, weight: float, queries: int) -> None:
        """Put every operation of a pass under its kind; ``weight`` passes of ``queries`` tokens a sequence."""
        tape = self.graph.tape
        stored = {entry[2] for entry in tape.tensors if entry[3] == "parameter"}
        storage = [entry[2] for entry in tape.tensors]
        share = queries * self._new[0] / max(1, self._old[0] * self._old[1]) if self._old[1] else 1.0
        for number, (name, flags, code, outputs, scope) in enumerate(tape.ops):
            given = arguments(code)
            tensors = [value[0] for tag, value in given if tag == TENSOR and value and value[0] >= 0]
            out = next((tid for tid in outputs if tid >= 0), None)
            if out is None:
                continue
            slots: list[list[tuple[int, int]]] = [self._dims(out)]
            what = "pointwise"
            keys: tuple[int, ...] = ()
            if name == _ATTENTION:
                q, k, v = (self._dims(tid) for tid in tensors[:3])
                slots = [q[:-3], q[-3:-2], k[-3:-2], q[-2:-1], k[-2:-1], k[-1:], v[-1:]]
                what, keys = "attention", (4,)
            elif name in _PRODUCTS:
                left, right = (given[_PRODUCTS[name] + i][1][0] for i in (0, 1))
                a, c = self._dims(left), self._dims(out)
                if storage[right] in stored and len(self._dims(right)) <= 2:
                    what, slots = "gemm", [a[:-1], a[-1:], c[-1:]]
                else:
                    what, keys, slots = "bmm", (2, 3), [c[:-2], a[-2:-1], a[-1:], c[-1:]]
            elif name in _BY_MACS:
                self._macs[number] = self._macs.get(number, 0.0) + weight * share
            elif any(storage[tid] == storage[out] for tid in tensors) and not flags & MUTATES:
                what, slots = "view", []
            self._note(what, slots, keys, weight, scope, queries)

    def _dims(self, tensor: int) -> list[tuple[int, int]]:
        return [(tensor, dim) for dim in range(len(self.graph.tape.tensors[tensor][0]))]

    def _note(
        self,
        name: str,
        slots: Sequence[Sequence[tuple[int, int]]],
        keys: Sequence[int],
        weight: float,
        scope: int,
        queries: int,
    ) -> None:
        """One operation: its sizes as slots, each a product of dimensions; those of ``keys`` count keys."""
        dense, factors, refs = [], [], []
        for place, dims in enumerate(slots):
            tokens = [self._new[1]] if place in keys else [queries, self._new[1]]
            size, factor, found = 1.0, 1.0, []
            for tensor, dim in dims:
                old = self.graph.tape.tensors[tensor][0][dim]
                axes = self.graph.dim_axes(tensor, dim)
                grown = self._grown(old, axes, tokens, dim == 0)
                size *= old * grown
                if self._varying.isdisjoint(axes):
                    factor *= old * grown
                else:
                    factor *= grown
                    found.append(self._refs.setdefault((tensor, dim), len(self._refs)))
            dense.append(max(1, round(size)))
            factors.append(factor)
            refs.append(found)
        varies = tuple(place for place, found in enumerate(refs) if found)
        key: tuple[Any, ...] = (name, tuple(dense), varies)
        if name == "pointwise":
            varies, key = (0,), (name,)
        kind = self._kinds.setdefault(key, Kind(name, tuple(dense), varies))
        kind.weights.append(weight)
        kind.scopes.append(scope)
        kind.factors.append([factors[place] for place in varies])
        kind.refs.append([refs[place] for place in varies])

    def _grown(self, size: int, axes: Sequence[int], tokens: list[int], first: bool) -> float:
        """By what a recorded dimension is multiplied for this request; takes the first of ``tokens`` if it holds any.

        What is left of it beside its axes is the length (a small prime), the batch (in the first dimension, or beside
        the length), both or neither.
        """
        sizes = [self.graph.axes[axis].size for axis in axes]
        held = next(
            (n for n in (math.prod(sizes), sum(sizes)) if n and size % n == 0), 0
        )  # nested, or side by side
        batch, length = self._old
        if length == 0 or held == 0:
            return 1.0
        rest, grown = size // held, 1.0
        if rest % length == 0:
            grown = (tokens.pop(0) if len(tokens) > 1 else tokens[0]) / length
            rest, first = rest // length, True
        return grown * self._new[0] / batch if first and rest % batch == 0 else grown

    # Times

    def _array(self, kind: Kind) -> tuple[Array, npt.NDArray[np.int64], Array, npt.NDArray[np.int64]]:
        """Weights (n,), scopes (n,), factors (n, varying sizes) and refs (n, varying sizes, most refs) of a kind."""
        count, width = len(kind.weights), len(kind.varies)
        longest = max((len(found) for row in kind.refs for found in row), default=0)
        refs = np.full((count, width, longest), len(self._refs), dtype=np.int64)
        for i, row in enumerate(kind.refs):
            for j, found in enumerate(row):
                refs[i, j, : len(found)] = found
        return (
            np.array(kind.weights),
            np.array(kind.scopes, dtype=np.int64),
            np.array(kind.factors).reshape(count, width),
            refs,
        )

    def _timed(self, kind: Kind) -> tuple[list[Array], Array]:
        """The sizes that were timed, for each that is interpolated between, and their times."""
        name, sizes, time_of = kind.name, kind.sizes, self.table.time
        if name == "pointwise":
            return [np.array(_ELEMENTS, dtype=float)], np.array([time_of(name, (n,)) for n in _ELEMENTS])
        between = [place for place in _GRIDDED.get(name, ()) if place in kind.varies]
        shares = GRID if len(between) < 2 else GRID[1::2]
        grids = [sorted({max(1, round(sizes[place] * share)) for share in shares}) for place in between]
        times = np.empty([len(grid) for grid in grids])
        for index in np.ndindex(times.shape):
            now = list(sizes)
            for place, grid, i in zip(between, grids, index, strict=True):
                now[place] = grid[i]
            if name == "attention":
                now[1] = now[2] * max(1, sizes[1] // sizes[2])
            times[index] = time_of(name, now)
        for axis in range(times.ndim):  # more is never taken to be faster
            times = np.maximum.accumulate(times, axis=axis)
        return [np.array(grid, dtype=float) for grid in grids], times


_GRIDDED = {"gemm": (1, 2), "bmm": (0,), "attention": (2,)}
"""Of an operation in the table, the sizes that are interpolated between; in others it is linear."""


def _interpolated(kind: Kind, now: Array, grids: Sequence[Array], times: Array) -> Array:
    """Seconds of each operation of a kind; ``now`` (n, varying sizes)."""
    if kind.name == "pointwise":
        (grid,) = grids
        beyond = np.maximum(now[:, 0] / grid[-1], 1.0)
        return np.asarray(np.interp(now[:, 0], grid, times) * beyond)
    column = {place: now[:, i] for i, place in enumerate(kind.varies)}
    between = [place for place in _GRIDDED.get(kind.name, ()) if place in column]
    if not between:
        seconds = np.full(len(now), float(times))
    elif len(between) == 1:
        seconds = np.interp(column[between[0]], grids[0], times)
    else:
        first = np.array([np.interp(column[between[1]], grids[1], row) for row in times])
        seconds = np.array([np.interp(x, grids[0], first[:, i]) for i, x in enumerate(column[between[0]])])
    scale = np.ones(len(now))
    for place in set(column) - set(between):
        scale *= column[place] / kind.sizes[place]
    if (
        kind.name == "attention"
    ):  # heads go with the key-value heads they share, and one pass reads keys and values
        scale = np.ones(len(now))
        if 1 in column:
            shared = column.get(2, np.full(len(now), float(kind.sizes[2])))
            scale = column[1] / (shared * max(1, kind.sizes[1] // kind.sizes[2]))
        width = sum(column.get(place, np.full(len(now), float(kind.sizes[place]))) for place in (5, 6))
        scale = scale * width / (kind.sizes[5] + kind.sizes[6])
    return np.asarray(seconds * scale)


def _recorded(graph: Graph) -> tuple[int, int]:
    """Batch and length of the recorded pass; length 0 for a model that reads no tokens."""
    for sizes, _type, _storage, role, name in graph.tape.tensors:
        if role == "input" and name in ("decoder_input_ids", "input_ids") and len(sizes) == 2:
            return int(sizes[0]), int(sizes[1])
    return 1, 0


def _generates(graph: Graph) -> bool:
    return graph.footprint is None or graph.footprint.caches


def table_of(graph: Graph) -> Table:
    """The timed shapes of the machine, for the model's type, size and device."""
    found = graph.footprint
    dtype = getattr(torch, found.dtype) if found is not None else torch.float32
    device = torch.device(found.device if found is not None else "cpu")
    return Table.load(dtype, device, graph.numel({}) * dtype.itemsize)


def fast_multiple(graph: Graph, context: int = CONTEXT, batch: int = 1, table: Table | None = None) -> int:
    """The multiple that FFN sizes are best kept to on this machine (``round_to="auto"``).

    Every product with a weight that reads or writes an FFN axis is timed, for the prompt and for a step, at sizes
    between 0.67 and 0.93 of the axis's. A coarser multiple is taken where its sizes are at least 3 % faster for each
    channel than those of the finer one taken before it; 1 where sizes do not matter.

    Raises:
        InputError: the model has no prunable FFN axis.
    """
    table = table_of(graph) if table is None else table
    axes = {axis.id: axis.size for axis in graph.axes if axis.prunable and axis.kind == "ffn"}
    if not axes:
        raise InputError("round_to 'auto' is for FFN axes and this model has no prunable one: leave it out")
    products = [
        (kind, place)
        for kind in RequestTime(graph, ("ffn",), context, batch, table=table).kinds
        for place in kind.varies
        if kind.name == "gemm"
    ]
    costs: dict[int, float] = {}
    for multiple in MULTIPLES:
        if any(size < _FEWEST * multiple for size in axes.values()):
            break
        costs[multiple] = 0.0
        for kind, place in products:
            for share in _SHARES:
                size = list(kind.sizes)
                # An odd number of multiples, so that it is no multiple of twice as much.
                size[place] = (int(size[place] * share / multiple - 1) // 2 * 2 + 1) * multiple
                per_channel = table.time("gemm", size) / size[place]
                costs[multiple] += per_channel * kind.sizes[place] * sum(kind.weights)
    table.save()
    best = 1
    for multiple, cost in costs.items():
        if cost < (1 - _FINER) * costs[best]:
            best = multiple
    return best
