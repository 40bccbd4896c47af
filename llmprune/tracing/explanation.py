"""Why slices belong together: the chain of dependency rules between a position and the rest of its group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmprune.tracing.graph import Axis


@dataclass(frozen=True)
class Step:
    """One link of an explanation: how two dimensions come to share an axis.

    Attributes:
        rule: ``forward``, ``backward`` or ``equal shape`` (the paper's dependencies), ``index value``, or ``part`` (a
            dimension and one factor or term of it).
        source: parameter dimension it leads from; empty inside a dimension.
        target: parameter dimension it leads to; empty inside a dimension.
        operation: ATen name of the operation that made it necessary; empty where none did.
        module: path of the module that ran the operation.
    """

    rule: str
    source: str
    target: str
    operation: str
    module: str

    def __str__(self) -> str:
        where = f" by {self.operation} in {self.module or 'the root module'}" if self.operation else ""
        return f"{self.rule:11s} {self.source or '(part)'} -> {self.target or '(part)'}{where}"


@dataclass(frozen=True)
class Chain:
    """Why one axis index of the trigger takes positions of another parameter along."""

    axis: int
    kind: str
    index: int
    parameter: str
    dim: int
    positions: tuple[int, ...]
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.positions[:8])) + (", ..." if len(self.positions) > 8 else "")
        lines = [f"  {self.parameter} dim {self.dim}: positions {shown}"]
        lines += [f"      {step}" for step in self.steps]
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """The groups that a position of a parameter dimension belongs to, and the chain of rules to each other member.

    Iterating gives the :class:`Chain` objects; printing gives them in words.
    """

    parameter: str
    dim: int
    index: int
    axes: tuple[Axis, ...]
    chains: tuple[Chain, ...]

    def __iter__(self) -> Iterator[Chain]:
        return iter(self.chains)

    def __str__(self) -> str:
        lines = [f"{self.parameter}, dim {self.dim}, position {self.index}"]
        for axis in self.axes:
            own = [chain for chain in self.chains if chain.axis == axis.id]
            index = f", index {own[0].index}" if own else ""
            lines.append(f"{axis}{index}")
            lines += [f"  {axis.choice}"] if axis.choice else []
            lines += [str(chain) for chain in own]
        if not self.axes:
            lines.append("no axis: the position is fixed")
        return "\n".join(lines)
