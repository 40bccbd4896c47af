"""Tensors that are not there: what is done to stored tensors is noted, and done when a part of the result is wanted.

Checkpoints do not hold a model's parameters as they are: experts lie apart, projections together, names differ. What
loading makes of the files, what a plan cuts, and what saving makes of the result are mostly such that every element of
the result is one of a stored tensor. So a :class:`Value` is a set of boxes, each a choice of positions of one stored
tensor, and cutting, joining and splitting change the choices alone. What is no such thing (a rotation's halves put in
another order) is computed when it is read, whole.

A :class:`Lazy` is a value dressed as a tensor: libraries load and save with it, and nothing is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_map

from llmprune.errors import CheckpointError
from llmprune.out_of_core.shards import Stored

Index = range | npt.NDArray[np.int64]
"""Positions in a dimension, strictly rising; a range where it can be one, since most dimensions are whole."""


@dataclass(frozen=True, eq=False)
class Computed:
    """A tensor that has to be computed: ``make`` does it, given what reads a value."""

    make: Callable[[Callable[[Value], torch.Tensor]], torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype


Source = Stored | Computed | torch.Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """A box of a value, taken from one source.

    Attributes:
        source: where its elements are.
        index: of each dimension of the source, the positions that are in the box.
        axes: of each dimension of the source, the dimension of the value that it is; -1: none (it has one position).
        start: the box's first position in each dimension of the value.
    """

    source: Source
    index: tuple[Index, ...]
    axes: tuple[int, ...]
    start: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes, in the dimensions of the value."""
        sizes = [1] * len(self.start)
        for axis, index in zip(self.axes, self.index, strict=True):
            if axis >= 0:
                sizes[axis] = len(index)
        return tuple(sizes)


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor as boxes of sources; together they fill it, and none overlaps another."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[Block, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, source: Source) -> Value:
        """A source, whole."""
        shape = tuple(source.shape)
        whole = Block(source, tuple(map(range, shape)), tuple(range(len(shape))), (0,) * len(shape))
        return cls(shape, source.dtype, (whole,))

    def take(self, dim: int, positions: Index) -> Value:
        """The positions of one dimension, strictly rising."""
        if isinstance(positions, range) and positions.step != 1:
            positions = np.arange(positions.start, positions.stop, positions.step, dtype=np.int64)
        blocks = []
        for block in self.blocks:
            first, last = block.start[dim], block.start[dim] + block.shape[dim]
            if isinstance(positions, range):
                low = max(first, positions.start)
                inside: Index = range(low - first, min(last, positions.stop) - first)
                begin = low - positions.start
            else:
                begin, end = np.searchsorted(positions, (first, last)).tolist()
                inside = positions[begin:end] - first
            if len(inside):
                index = tuple(
                    _choose(own, inside) if axis == dim else own
                    for axis, own in zip(block.axes, block.index, strict=True)
                )
                blocks.append(replace(block, index=index, start=_set(block.start, dim, begin)))
        return Value(_set(self.shape, dim, len(positions)), self.dtype, tuple(blocks))

    def keep(self, kept: Mapping[int, npt.NDArray[np.int64]]) -> Value:
        """What a plan keeps: dimension -> positions, or a row of them for each slice of dimension 0 that stays."""
        value = self
        for dim, positions in sorted(kept.items()):  # dimension 0 first: rows are of what is left of it
            if positions.ndim == 1:
                value = value.take(dim, positions)
                continue
            slices = [value.take(0, range(i, i + 1)).take(dim, row) for i, row in enumerate(positions)]
            joined = join(slices, 0)
            assert joined is not None, "slices of one value have its dtype"
            value = joined
        return value

    def permute(self, dims: Sequence[int]) -> Value:
        """As :func:`torch.permute`."""
        blocks = [
            replace(
                block,
                axes=tuple(axis if axis < 0 else dims.index(axis) for axis in block.axes),
                start=tuple(block.start[dim] for dim in dims),
            )
            for block in self.blocks
        ]
        return Value(tuple(self.shape[dim] for dim in dims), self.dtype, tuple(blocks))

    def unsqueeze(self, dim: int) -> Value:
        """A dimension of size 1 before ``dim``."""
        blocks = [
            replace(
                block,
                axes=tuple(axis + (axis >= dim) for axis in block.axes),
                start=(*block.start[:dim], 0, *block.start[dim:]),
            )
            for block in self.blocks
        ]
        return Value((*self.shape[:dim], 1, *self.shape[dim:]), self.dtype, tuple(blocks))

    def squeeze(self, dim: int) -> Value:
        """Without a dimension of size 1."""
        blocks = [
            replace(
                block,
                axes=tuple(-1 if axis == dim else axis - (axis > dim) for axis in block.axes),
                start=(*block.start[:dim], *block.start[dim + 1 :]),
            )
            for block in self.blocks
        ]
        return Value((*self.shape[:dim], *self.shape[dim + 1 :]), self.dtype, tuple(blocks))

    def reshape(self, shape: Sequence[int]) -> Value | None:
        """As :func:`torch.reshape` where sizes of 1 come or go and nothing else; else None."""
        if [n for n in shape if n != 1] != [n for n in self.shape if n != 1]:
            return None
        value = self
        for dim in reversed(range(len(self.shape))):
            if self.shape[dim] == 1:
                value = value.squeeze(dim)
        for dim, size in enumerate(shape):
            if size == 1:
                value = value.unsqueeze(dim)
        return value


def join(values: Sequence[Value], dim: int) -> Value | None:
    """As :func:`torch.cat`; None for values of different dtypes."""
    if len({value.dtype for value in values}) > 1:
        return None
    blocks, at = [], 0
    for value in values:
        blocks += [
            replace(block, start=_set(block.start, dim, block.start[dim] + at)) for block in value.blocks
        ]
        at += value.shape[dim]
    return Value(_set(values[0].shape, dim, at), values[0].dtype, tuple(blocks))


def _set(sizes: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*sizes[:dim], size, *sizes[dim + 1 :])


def _choose(index: Index, inside: Index) -> Index:
    """``index[inside]``."""
    if isinstance(inside, range):
        return index[inside.start : inside.stop]
    return inside + index.start if isinstance(index, range) else index[inside]


@dataclass(frozen=True, eq=False)
class Memory:
    """The memory that a tensor and its views would share; ``bytes`` of it."""

    bytes: int


class Lazy(torch.Tensor):
    """A :class:`Value` in a tensor's clothes: it has sizes, a dtype and a device (the CPU), and no memory.

    Operations on it give others. Its dtype is what the operations make it; the value keeps its own, so that loading
    into a model of another dtype changes nothing of what is stored.
    """

    value: Value
    memory: Memory

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: Value, like: torch.Tensor | None = None, memory: Memory | None = None) -> Lazy:
        """Dress ``value``; sizes, strides and dtype are those of ``like``, if given, as a view of ``memory``."""
        model = torch.empty(value.shape, dtype=value.dtype, device="meta") if like is None else like
        tensor: Lazy = torch.Tensor._make_wrapper_subclass(
            cls, model.shape, strides=model.stride(), dtype=model.dtype, device=torch.device("cpu")
        )
        tensor.value = value
        tensor.memory = Memory(value.bytes) if memory is None else memory
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        """Sizes only: there are no elements to print."""
        return f"Lazy({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Sizes by running the operation on the meta device, values by :data:`_FOLLOWED`."""
        kwargs = kwargs or {}
        if any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments):
            raise CheckpointError(
                f"{func} writes into a tensor that is only read from files: this model cannot be pruned by apply; "
                "load it and use prune"
            )
        out = func(*tree_map(_meta, args), **_on_meta(kwargs))
        values = None
        follow = _FOLLOWED.get(func._schema.name)
        if follow is not None:
            values = follow(out, *args, **kwargs)
        if values is None:
            values = _computed(func, args, kwargs)
        view = any(result.alias_info is not None for result in func._schema.returns)
        memory = next((item.memory for item in args if isinstance(item, Lazy)), None) if view else None
        if isinstance(out, torch.Tensor):
            return Lazy(values, out, memory)
        return type(out)(Lazy(value, one, memory) for value, one in zip(values, out, strict=True))


def _meta(item: Any) -> Any:
    """A tensor without memory in the place of one."""
    if not isinstance(item, torch.Tensor):
        return item
    return torch.empty_strided(item.size(), item.stride(), dtype=item.dtype, device="meta")


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = tree_map(_meta, kwargs)
    if changed.get("device") is not None:
        changed["device"] = torch.device("meta")
    changed.pop("pin_memory", None)
    return changed


def value_of(item: torch.Tensor) -> Value:
    """What a tensor holds, dressed or not."""
    return item.value if isinstance(item, Lazy) else Value.of(item)


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The values of an operation that is none of :data:`_FOLLOWED`: it is run when they are read."""

    def own(item: Any) -> Any:
        # Of the dtype that the value has, not of the one it is dressed in.
        return (
            torch.empty(item.value.shape, dtype=item.value.dtype, device="meta")
            if isinstance(item, Lazy)
            else item
        )

    def make(read: Callable[[Value], torch.Tensor], place: int | None = None) -> torch.Tensor:
        def real(item: Any) -> Any:
            return read(item.value) if isinstance(item, Lazy) else item

        result = func(*tree_map(real, args), **tree_map(real, kwargs))
        chosen: torch.Tensor = result if place is None else result[place]
        return chosen

    out = func(*tree_map(_meta, tree_map(own, args)), **_on_meta(tree_map(own, kwargs)))
    if isinstance(out, torch.Tensor):
        return Value.of(Computed(make, tuple(out.shape), out.dtype))
    return [
        Value.of(Computed(partial(make, place=place), tuple(one.shape), one.dtype))
        for place, one in enumerate(out)
    ]


def _same(_out: Any, item: torch.Tensor, *_args: Any, **_kwargs: Any) -> Value:
    return value_of(item)


def _cat(_out: Any, items: Sequence[torch.Tensor], dim: int = 0) -> Value | None:
    values = [value_of(item) for item in items]
    return join(values, dim % len(values[0].shape))


def _stack(out: torch.Tensor, items: Sequence[torch.Tensor], dim: int = 0) -> Value | None:
    dim %= out.dim()
    return join([value_of(item).unsqueeze(dim) for item in items], dim)


def _split(out: Sequence[torch.Tensor], item: torch.Tensor, _sizes: Any, dim: int = 0) -> list[Value]:
    value, at, found = value_of(item), 0, []
    for part in out:
        size = part.shape[dim]
        found.append(value.take(dim % item.dim(), range(at, at + size)))
        at += size
    return found


def _slice(
    out: torch.Tensor,
    item: torch.Tensor,
    dim: int = 0,
    start: int | None = None,
    _end: Any = None,
    step: int = 1,
) -> Value:
    first = range(item.shape[dim])[start:].start if start is not None else 0
    return value_of(item).take(dim % item.dim(), range(first, first + step * out.shape[dim], step))


def _select(_out: Any, item: torch.Tensor, dim: int, index: int) -> Value:
    place = index % item.shape[dim]
    return value_of(item).take(dim % item.dim(), range(place, place + 1)).squeeze(dim % item.dim())


def _unbind(out: Sequence[torch.Tensor], item: torch.Tensor, dim: int = 0) -> list[Value]:
    return [_select(None, item, dim, place) for place in range(len(out))]


def _transpose(_out: Any, item: torch.Tensor, dim0: int = 0, dim1: int = 1) -> Value:
    dims = list(range(item.dim()))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return value_of(item).permute(dims)


def _turn(_out: Any, item: torch.Tensor) -> Value:
    return value_of(item).permute(range(item.dim())[::-1])


def _permute(_out: Any, item: torch.Tensor, dims: Sequence[int]) -> Value:
    return value_of(item).permute([dim % item.dim() for dim in dims])


def _reshape(out: torch.Tensor, item: torch.Tensor, *_args: Any, **_kwargs: Any) -> Value | None:
    return value_of(item).reshape(tuple(out.shape))


_FOLLOWED: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        (
            "aten::alias",
            "aten::detach",
            "aten::clone",
            "aten::_to_copy",
            "aten::contiguous",
            "aten::lift_fresh",
        ),
        _same,
    ),
    **dict.fromkeys(
        ("aten::view", "aten::reshape", "aten::_unsafe_view", "aten::squeeze", "aten::unsqueeze"), _reshape
    ),
    "aten::cat": _cat,
    "aten::stack": _stack,
    "aten::split": _split,
    "aten::split_with_sizes": _split,
    "aten::slice": _slice,
    "aten::select": _select,
    "aten::unbind": _unbind,
    "aten::transpose": _transpose,
    "aten::t": _turn,
    "aten::permute": _permute,
}
"""Operations whose results are made of elements of their arguments, by schema name: (result on meta, arguments) ->
the value or values, or None where it is not so after all. Those that change the dtype alone keep what is stored."""
