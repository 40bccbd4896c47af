"""A stand-in for llmprune.tracing.graph.Graph whose axis algebra is written out by hand: sums of products of axes.

It lets the plan's tests state a model's sizes and equations directly, and check them by counting labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

import numpy as np

from llmprune.errors import PlanError
from llmprune.planning.apart import Around

Expression = list[tuple[int, ...]]
"""A dimension: terms one after the other, each a product of axes, outer to inner."""


@dataclass
class Member:
    parameter: str
    dim: int
    positions: np.ndarray


@dataclass
class Axis:
    id: int
    size: int
    kind: str = "other"
    prunable: bool = True
    reasons: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    members: tuple[Member, ...] = ()

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        return tuple((member.parameter, member.dim) for member in self.members)


@dataclass
class SizedGraph:
    axes: list[Axis] = field(default_factory=list)
    tensors: list[list[Expression]] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    equations: list[list[Any]] = field(default_factory=list)
    fingerprint: str = "sized"

    def axis(self, size: int, kind: str = "other", frozen: str | None = None) -> int:
        self.axes.append(
            Axis(len(self.axes), size, kind, frozen is None, () if frozen is None else (frozen,))
        )
        return len(self.axes) - 1

    def tensor(self, *dims: Expression, name: str | None = None) -> int:
        self.tensors.append(list(dims))
        tensor = len(self.tensors) - 1
        if name is not None:
            self.names[name] = tensor
            for dim, expression in enumerate(dims):
                for axis in sorted({a for term in expression for a in term}):
                    rows: list[list[int]] = [[] for _ in range(self.axes[axis].size)]
                    for position, labels in enumerate(self.labels(expression)):
                        for a, index in labels:
                            if a == axis:
                                rows[index].append(position)
                    member = Member(name, dim, np.array(rows))
                    self.axes[axis].members = (*self.axes[axis].members, member)
        return tensor

    def equation(self, tree: Any, *dims: Expression, dim: int = 0, where: str = "view") -> None:
        """``tree`` gave the size of dimension ``dim`` of a new tensor."""
        self.equations.append([self.tensor(*dims), dim, tree, where])

    def labels(self, expression: Expression) -> Iterator[tuple[tuple[int, int], ...]]:
        for term in expression:
            for indices in product(*(range(self.axes[a].size) for a in term)):
                yield tuple(zip(term, indices, strict=True))

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        return {name: self._shape(tensor, {}) for name, tensor in self.names.items()}

    def _size(self, expression: Expression, removed: Mapping[int, int]) -> int:
        return sum(prod(self.axes[a].size - removed.get(a, 0) for a in term) for term in expression)

    def _shape(self, tensor: int, removed: Mapping[int, int]) -> tuple[int, ...]:
        return tuple(self._size(expression, removed) for expression in self.tensors[tensor])

    def new_sizes(self, removed: Mapping[int, int], dims: Sequence[tuple[int, int]]) -> list[int]:
        return [self._size(self.tensors[tensor][dim], removed) for tensor, dim in dims]

    def dim_axes(self, tensor: int, dim: int) -> list[int]:
        return [axis for term in self.tensors[tensor][dim] for axis in term]

    @property
    def stacks(self) -> list[Any]:
        return self.layers

    @property
    def layers(self) -> list[Any]:
        return []  # depth is tested on recorded models

    def numel(self, removed: Mapping[int, int], drops: Sequence[Any] = ()) -> int:
        assert not drops
        return sum(prod(self._shape(tensor, removed)) for tensor in self.names.values())

    def around(self, axis: int) -> Around:
        for expression in (dim for dims in self.tensors for dim in dims):
            for term in expression:
                if axis in term[1:]:
                    outer = term[term.index(axis) - 1]
                    return Around((outer,), self.axes[outer].size, False)
        raise PlanError(f"axis {axis} is not nested in one outer axis")

    def kept(self, removed: Mapping[int, np.ndarray]) -> dict[str, dict[int, np.ndarray]]:
        flat = {axis: indices for axis, indices in removed.items() if indices.ndim == 1}
        gone = {(axis, int(index)) for axis, indices in flat.items() for index in indices}

        def goes(label: tuple[tuple[int, int], ...]) -> bool:
            at = dict(label)
            ragged = (a for a in at if a in removed and a not in flat)
            return bool(gone.intersection(label)) or any(
                at[a] in removed[a][at[self.around(a).axes[0]]] for a in ragged
            )

        out: dict[str, dict[int, np.ndarray]] = {}
        for name, tensor in self.names.items():
            for dim, expression in enumerate(self.tensors[tensor]):
                labels = list(self.labels(expression))
                kept = [p for p, label in enumerate(labels) if not goes(label)]
                if len(kept) < len(labels):
                    out.setdefault(name, {})[dim] = np.array(kept)
        return out

    def marked_ops(self, removed: Mapping[int, np.ndarray]) -> list[Any]:
        return []

    def least(self, axis_id: int) -> int:
        return 1

    def check_choices(self, removed: Mapping[int, int]) -> None:
        """Nothing is chosen from."""


@dataclass
class Decoder(SizedGraph):
    """A Llama-like decoder: head_dim sizes the shared rope pairs (twice) and every layer's value channels."""

    hidden: int = -1
    pairs: int = -1
    heads: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    values: list[int] = field(default_factory=list)
    ffn: list[int] = field(default_factory=list)


def decoder(
    layers: int = 2,
    kv: int = 3,
    group: int = 2,
    pairs: int = 4,
    ffn: int = 56,
    hidden: int = 12,
    vocab: int = 19,
) -> Decoder:
    g = Decoder()
    vocabulary = g.axis(vocab, "other", "the model's output")
    g.hidden = g.axis(hidden, "channel")
    g.pairs = g.axis(pairs, "head_dim")
    p, h = g.pairs, g.hidden
    g.tensor([(vocabulary,)], [(h,)], name="model.embed.weight")
    g.tensor([(p,)], name="model.rope")
    g.names.pop("model.rope")  # a buffer: it moves with the axis but is no parameter
    for i in range(layers):
        axis = g.axis(kv, "head"), g.axis(group, "query"), g.axis(2 * pairs, "value_dim"), g.axis(ffn, "ffn")
        k, q, v, f = axis
        for one, every in zip(axis, (g.heads, g.groups, g.values, g.ffn), strict=True):
            every.append(one)
        at = f"model.layers.{i}"
        g.tensor([(k, q, p), (k, q, p)], [(h,)], name=f"{at}.attn.q.weight")
        g.tensor([(k, p), (k, p)], [(h,)], name=f"{at}.attn.k.weight")
        g.tensor([(k, v)], [(h,)], name=f"{at}.attn.v.weight")
        g.tensor([(h,)], [(k, q, v)], name=f"{at}.attn.o.weight")
        for name in ("gate", "up"):
            g.tensor([(f,)], [(h,)], name=f"{at}.mlp.{name}.weight")
        g.tensor([(h,)], [(f,)], name=f"{at}.mlp.down.weight")
        head_dim = ["attr", f"{at}.attn", "head_dim"]
        g.equation(head_dim, [(p,), (p,)], where=f"view in {at}.attn")
        g.equation(head_dim, [(v,)], where=f"view in {at}.attn")
        g.equation(["attr", f"{at}.attn", "num_key_value_groups"], [(q,)], where=f"expand in {at}.attn")
    return g
