"""Equations from a second recording: another form of attention, or only one block of each kind.

A second tape numbers its own tensors and knows its own axes. What joins it to the first is the parameters: an axis of
the second graph is the axis of the first that has the same positions in the same dimension of the same parameter. A
block that was left out of the second tape is like a block that was kept, with another prefix to its names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from llmprune.graph import Graph


class SecondForm:
    """The size equations of a second graph, spoken of in the axes of the first.

    Tensors are numbered ``copy * tensors + id``: copy 0 is the second tape itself, the others are its blocks standing
    in for blocks that were left out.

    Args:
        primary: the model's graph.
        secondary: the graph of ``primary.tape.second``.
    """

    def __init__(self, primary: Graph, secondary: Graph) -> None:
        self.primary = primary
        self.secondary = secondary
        self._copies: list[tuple[str, str]] = [("", ""), *((a, b) for a, b in secondary.tape.replicas)]
        self._count = len(secondary.tape.tensors)
        self._tensor_ids = {
            name: tid
            for tid, (_, _, _, role, name) in enumerate(primary.tape.tensors)
            if role in ("parameter", "buffer")
        }
        self._translated: dict[tuple[int, int], int | None] = {}

    @cached_property
    def equations(self) -> list[list[Any]]:
        """``[tensor, dim, tree, where]`` of the second tape, repeated for every block that was left out."""
        out: list[list[Any]] = []
        for copy, (kept, other) in enumerate(self._copies):
            for tensor, dim, tree, where in self.secondary.tape.equations:
                if copy == 0 or any(f"{path}.".startswith(kept) for path in _modules(tree)):
                    moved = _moved(tree, copy * self._count, kept, other)
                    out.append(
                        [
                            copy * self._count + tensor,
                            dim,
                            moved,
                            where.replace(kept, other) if kept else where,
                        ]
                    )
        return out

    def dim_axes(self, tensor: int, dim: int) -> list[int]:
        """Axes of the first graph in a dimension's expression (those that occur in a parameter)."""
        copy, tensor = divmod(tensor, self._count)
        found = (self._axis(axis, copy) for axis in self.secondary.dim_axes(tensor, dim))
        return [axis for axis in found if axis is not None]

    def new_sizes(self, removed: Mapping[int, int], dims: Sequence[tuple[int, int]]) -> list[int]:
        """Sizes of ``(tensor, dim)`` after axes of the first graph lose ``removed`` indices."""
        by_copy: dict[int, list[int]] = {}
        for place, (tensor, _) in enumerate(dims):
            by_copy.setdefault(tensor // self._count, []).append(place)
        out = [0] * len(dims)
        for copy, places in by_copy.items():
            wanted = [(dims[place][0] % self._count, dims[place][1]) for place in places]
            axes = {axis for tensor, dim in wanted for axis in self.secondary.dim_axes(tensor, dim)}
            lost = {
                axis: removed.get(self._axis(axis, copy) or 0, 0)
                for axis in axes
                if self._axis(axis, copy) is not None
            }
            for place, size in zip(places, self.secondary.new_sizes(lost, wanted), strict=True):
                out[place] = size
        return out

    def numel(self, removed: Mapping[int, int]) -> int:
        """Parameters of the whole model after the removal."""
        return self.primary.numel(removed)

    def _axis(self, axis: int, copy: int) -> int | None:
        """The first graph's axis that this axis of the second is, in one of its copies."""
        key = axis, copy
        if key not in self._translated:
            self._translated[key] = self._find(axis, *self._copies[copy])
        return self._translated[key]

    def _find(self, axis: int, kept: str, other: str) -> int | None:
        for member in self.secondary.axes[axis].members:
            name = _renamed(member.parameter, kept, other)
            tensor = self._tensor_ids.get(name)
            if tensor is None:
                continue
            for candidate in self.primary.dim_axes(tensor, member.dim):
                for twin in self.primary.axes[candidate].members:
                    same = twin.parameter == name and twin.dim == member.dim
                    if same and np.array_equal(twin.positions, member.positions):
                        return candidate
        return None


def _modules(tree: Any) -> list[str]:
    """Module paths of the attributes in an equation's tree."""
    if isinstance(tree, int) or tree[0] == "shape":
        return []
    if tree[0] == "attr":
        return [tree[1]]
    return [path for part in tree[1:] for path in _modules(part)]


def _moved(tree: Any, offset: int, kept: str, other: str) -> Any:
    """A tree with tensor numbers shifted and attributes moved to the block that is stood in for."""
    if isinstance(tree, int):
        return tree
    head, *rest = tree
    if head == "shape":
        return [head, rest[0] + offset, rest[1]]
    if head == "attr":
        return [head, _renamed(rest[0], kept, other), *rest[1:]]
    return [head, *(_moved(part, offset, kept, other) for part in rest)]


def _renamed(path: str, kept: str, other: str) -> str:
    """A path inside the block ``kept`` (with its dot), as a path inside the block ``other``."""
    return (other + f"{path}."[len(kept) :])[:-1] if kept and f"{path}.".startswith(kept) else path
