"""A model recorded under a second form of attention: what it adds to the first graph's size equations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmprune.tracing.tape import leaves

if TYPE_CHECKING:
    from llmprune.tracing.graph import Graph


class SecondForm:
    """The same model recorded under another form of attention, spoken of in the first graph's axis ids.

    The recording may hold one block of each kind only; each block that is like it then counts as a variant of it, and
    ``tensor`` numbers in :attr:`equations` are those of the second tape plus the variant times the tape's length.
    """

    def __init__(self, first: Graph, graph: Graph) -> None:
        self.graph = graph
        self._first = first
        self._length = len(graph.tape.tensors)
        self._places: dict[tuple[str, int, tuple[int, int], int], int] = {}
        for axis in first.axes:
            for (name, dim), start in zip(axis.places, axis.starts, strict=True):
                self._places[name, dim, start, axis.size] = axis.id
        told = [
            equation for equation in graph.equations if any(leaf[0] == "attr" for leaf in leaves(equation[2]))
        ]
        self.equations: list[list[Any]] = [list(equation) for equation in told]
        self._ids = [self._match("", "")]
        for kept, other in graph.tape.replicas:
            number = len(self._ids)
            self._ids.append(self._match(kept, other))
            for tensor, dim, tree, where in told:
                if any(leaf[0] == "attr" and f"{leaf[1]}.".startswith(kept) for leaf in leaves(tree)):
                    tree = _moved(tree, kept, other, number * self._length)
                    self.equations.append(
                        [tensor + number * self._length, dim, tree, where.replace(kept, other)]
                    )

    def _match(self, kept: str, other: str) -> dict[int, int]:
        """Axis of the second graph -> axis of the first, with blocks named ``kept`` standing for ``other``."""
        ids: dict[int, int] = {}
        form = self.graph.tape.attention
        for axis in self.graph.axes:
            names = [
                other + name[len(kept) :] if kept and name.startswith(kept) else name
                for name, _ in axis.places
            ]
            found = {
                self._places.get((name, dim, start, axis.size))
                for name, (_, dim), start in zip(names, axis.places, axis.starts, strict=True)
            }
            if len(found) == 1 and None not in found:
                (number,) = found
                assert number is not None
                ids[axis.id] = number
                if not axis.prunable and self._first.axes[number].prunable:
                    self._first.freeze(number, f"under {form} attention: {'; '.join(axis.reasons)}", "fixed")
                continue
            for number in found - {None}:
                assert number is not None
                if self._first.axes[number].prunable:
                    self._first.freeze(
                        number, f"under {form} attention it is not one axis of its own", "fixed"
                    )
        return ids

    def everywhere(self, axis: int) -> list[int]:
        """The first graph's axes that an axis of the second stands for, in its own block and those like it."""
        return sorted({ids[axis] for ids in self._ids if axis in ids})

    def _split(self, dims: Sequence[tuple[int, int]]) -> dict[int, list[tuple[int, int, int]]]:
        """Variant -> (place in ``dims``, tensor, dim)."""
        parts: dict[int, list[tuple[int, int, int]]] = {}
        for place, (tensor, dim) in enumerate(dims):
            parts.setdefault(tensor // self._length, []).append((place, tensor % self._length, dim))
        return parts

    def _removed(self, removed: Mapping[int, int], variant: int) -> dict[int, int]:
        return {second: removed[first] for second, first in self._ids[variant].items() if first in removed}

    def new_sizes(self, removed: Mapping[int, int], dims: Sequence[tuple[int, int]]) -> list[int]:
        """As :meth:`Graph.new_sizes`, ``removed`` by the first graph's axis ids."""
        result = [0] * len(dims)
        for variant, entries in self._split(dims).items():
            pairs = [(tensor, dim) for _, tensor, dim in entries]
            sizes = self.graph.new_sizes(self._removed(removed, variant), pairs)
            for (place, _, _), size in zip(entries, sizes, strict=True):
                result[place] = size
        return result

    def dim_axes(self, tensor: int, dim: int) -> list[int]:
        """As :meth:`Graph.dim_axes`, in the first graph's axis ids."""
        ids = self._ids[tensor // self._length]
        return [ids[i] for i in self.graph.dim_axes(tensor % self._length, dim) if i in ids]

    def numel(self, removed: Mapping[int, int]) -> int:
        """As :meth:`Graph.numel`."""
        return self._first.numel(removed)


def _moved(tree: Any, kept: str, other: str, shift: int) -> Any:
    """An equation tree read for another block and another numbering of tensors."""
    if isinstance(tree, int):
        return tree
    if tree[0] == "shape":
        return ["shape", tree[1] + shift, tree[2]]
    if tree[0] == "attr":
        module = f"{tree[1]}."
        moved = (other + module[len(kept) :])[:-1] if module.startswith(kept) else tree[1]
        return ["attr", moved, *tree[2:]]  # the recorded value too: blocks that are alike have the same
    return [tree[0], *(_moved(part, kept, other, shift) for part in tree[1:])]
