"""Axes that may lose other indices for each index of what lies around them, as many each.

Two forms keep every tensor rectangular. An axis may be nested in another within one dimension (query heads in their
key-value head). Or all its tensors are stacks, one slice for each index of dimension 0, and no operation mixes slices:
the channels inside experts. The second is proved on the tape, from the atoms of the axis algebra. Every tensor that
holds the axis must say along other dimensions of it whose slice each part is: the stack's own dimension, or the
dimensions of the index that picked slices from it (a token's choice of experts). An operation passes if its inputs
agree on that, and each of its outputs still says it. One that the proof does not know ends it, and the axis is cut
alike in all slices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmprune.errors import PlanError
from llmprune.tracing.tape import POINTWISE, TENSOR, TENSORS, arguments

if TYPE_CHECKING:
    from llmprune.tracing.graph import Graph

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "linear", "matmul"}
_PASSING = {
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "t", "transpose", "permute", "movedim"),
    *("unsqueeze", "squeeze", "expand", "expand_as", "clone", "contiguous", "detach", "alias", "_to_copy"),
    *("slice", "split", "split_with_sizes", "chunk", "select", "unbind", "cat", "stack", "sum"),
    *_PRODUCTS,
}
"""Operations that only rearrange, add up or multiply; which of their dimensions are whose, the atoms tell."""
_PICKS = {"index": (0, 1), "index_select": (0, 2), "embedding": (0, 1)}
"""Operations that pick slices, with the places of what they pick from and of the index."""


@dataclass(frozen=True)
class Around:
    """What lies around an axis that may be cut apart for each index of it.

    Attributes:
        axes: the axes it consists of, outer to inner; just one where ``stacked`` is off. Stacks that are never met
            whole, and picked from by one and the same index, need not share them: then those of the first.
        size: how many indices it has.
        stacked: it is dimension 0 of every tensor that the axis occurs in; else it lies in the same dimension.
    """

    axes: tuple[int, ...]
    size: int
    stacked: bool


def find_around(graph: Graph, axis_id: int) -> Around:
    """What lies around an axis.

    Raises:
        PlanError: nothing, or nothing that the axis could be cut apart for; the message says why.
    """
    axis = graph.axes[axis_id]
    heads: set[int] | None = None
    for (tensor, dim), (name, _) in zip(axis.dims, axis.places, strict=True):
        if name in graph.parameters:
            here = {i for i in graph.dim_axes(tensor, dim) if i != axis_id and graph.axes[i].kind == "head"}
            heads = here if heads is None else heads & here
    if heads:
        return Around((min(heads),), graph.axes[min(heads)].size, False)
    return _stack(graph, axis_id)


def cut_alike(graph: Graph) -> dict[int, str]:
    """Axes inside the experts of a stack that are cut alike in all of them, with the reason."""
    found = {}
    for axis in graph.axes:
        if axis.prunable and axis.kind != "expert" and (reason := _within_experts(graph, axis.id)):
            found[axis.id] = reason
    return found


def _within_experts(graph: Graph, axis_id: int) -> str:
    """Why an axis all of whose matrices are stacks of experts is cut alike in them; empty for any other axis."""
    matrices = [tensor for tensor, _ in graph.axes[axis_id].dims if len(graph.tape.tensors[tensor][0]) > 1]
    kinds = [{graph.axes[i].kind for i in graph.dim_axes(tensor, 0)} for tensor in matrices]
    if not kinds or not all("expert" in found for found in kinds):
        return ""
    try:
        graph.around(axis_id)
    except PlanError as error:
        return str(error)
    return ""


def kept_positions(
    graph: Graph, removed: Mapping[int, NDArray[np.int64] | Sequence[int]]
) -> dict[str, dict[int, NDArray[np.int64]]]:
    """See :meth:`llmprune.tracing.graph.Graph.kept`."""
    gone: dict[tuple[str, int], NDArray[np.bool_]] = {}
    for axis_id, indices in removed.items():
        if not 0 <= axis_id < len(graph.axes):
            raise PlanError(f"axis {axis_id} does not exist; the graph has {len(graph.axes)}")
        axis, chosen = graph.axes[axis_id], np.asarray(indices, dtype=np.int64)
        if chosen.size == 0:
            continue
        if chosen.min() < 0 or chosen.max() >= axis.size:
            raise PlanError(
                f"axis {axis_id} has indices 0 to {axis.size - 1}; the plan removes {chosen.max()}"
            )
        around = graph.around(axis_id) if chosen.ndim == 2 else None
        if around is not None and len(chosen) != around.size:
            raise PlanError(
                f"axis {axis_id} lies in axis {' x '.join(map(str, around.axes))} of {around.size} indices; the plan "
                f"chooses for {len(chosen)}"
            )
        for number, (name, dim) in enumerate(axis.places):
            shape = graph.parameters.get(name) or graph.buffers[name]
            flags = gone.setdefault((name, dim), np.zeros((1, shape[dim]), dtype=np.bool_))
            if around is not None and around.stacked:
                flags = gone[name, dim] = np.broadcast_to(flags, (shape[0], shape[dim])).copy()
                places = axis.occurrences[number].positions[chosen].reshape(len(chosen), -1)
                np.put_along_axis(flags, places, True, axis=1)
            elif around is not None:
                for row in flags:
                    graph._core.mark_ragged(axis_id, number, around.axes[0], chosen, row)
            else:
                flags[:, axis.occurrences[number].positions[chosen].reshape(-1)] = True
    kept: dict[str, dict[int, NDArray[np.int64]]] = {name: {} for name, _ in gone}
    for name, dim in sorted(
        gone, key=lambda place: place[1]
    ):  # dimension 0 first: it decides which slices stay
        flags, slices = gone[name, dim], kept[name].get(0)
        rows = [
            np.flatnonzero(~row) for row in (flags if len(flags) == 1 or slices is None else flags[slices])
        ]
        if len({len(row) for row in rows}) != 1:
            raise PlanError(f"the slices of {name} would keep different numbers in dimension {dim}")
        kept[name][dim] = (rows[0] if len(flags) == 1 else np.stack(rows)).astype(np.int64)
    return kept


def describe(graph: Graph, axis_id: int) -> str:
    """In one sentence whether an axis may be cut apart for what lies around it; empty where nothing does."""
    axis = graph.axes[axis_id]
    if not axis.prunable:
        return ""
    try:
        around = graph.around(axis_id)
    except PlanError:
        return _within_experts(graph, axis_id) if axis.kind != "expert" else ""
    if not around.stacked and axis.kind != "query":
        return ""
    names = " x ".join(f"axis {i} ({graph.axes[i].kind})" for i in around.axes)
    return (
        f"each of the {around.size} indices of {names} around it may lose others of its indices, as many each"
    )


def _stack(graph: Graph, axis_id: int) -> Around:
    axis = graph.axes[axis_id]
    alike = f"axis {axis_id} ({axis.kind}) is not nested in one outer axis: it is cut alike everywhere, by one list"
    stacks: dict[int, tuple[int, ...]] = {}
    for (tensor, dim), (name, _) in zip(axis.dims, axis.places, strict=True):
        atoms = graph.dim_atoms(tensor, 0) if dim else []
        inside = tuple(i for atom in atoms if (i := graph.axis_of_atom.get(atom)) is not None)
        size = math.prod(graph.axes[other].size for other in inside)
        if not inside or len(set(inside)) < len(atoms) or size != graph.tape.tensors[tensor][0][0]:
            raise PlanError(
                f"{alike}: {name} holds it, and is no stack of slices that each have one of their own"
            )
        stacks.setdefault(size, inside)
    if len(stacks) != 1:
        raise PlanError(f"{alike}: its tensors are stacks of {' and '.join(map(str, stacks))} slices")
    problem = _mixed(graph, axis_id)
    if problem:
        raise PlanError(f"{alike}: {problem}")
    return Around(stacks[size], size, True)


_Slices = tuple[int, tuple[int, ...]]
"""How a tensor says whose slice its parts are: the index that picked them (-1: the whole stack), and the atoms."""


def _mixed(graph: Graph, axis_id: int) -> str:
    """Why the slices of stacks cannot be told apart in every operation; empty where they can."""
    axis = graph.axes[axis_id]
    if axis.marks:
        return axis.marks[0]
    slices: dict[int, _Slices] = {t: (-1, tuple(sorted(graph.dim_atoms(t, 0)))) for t, _ in axis.dims}
    for number in graph.ops_with[axis_id]:
        name, flags, code, outputs, _scope = graph.tape.ops[number]
        given = [v for tag, value in arguments(code) if tag in (TENSOR, TENSORS) for v in value if v >= 0]
        inputs = [t for t in given if _holds(graph, t, graph.atoms[axis_id])]
        results = [t for t in outputs if t >= 0]
        known = {slices.get(t) for t in inputs}
        base = name.removeprefix("aten::")
        whose = known.pop() if len(known) == 1 else None
        if whose is not None and name in (f"aten::{pick}" for pick in _PICKS):
            whose = _picked(graph, base, code, inputs, whose)
        elif not (flags & POINTWISE or (name.startswith("aten::") and base in _PASSING)):
            whose = None
        if whose is not None:
            for tensor in results:
                inside = _holds(graph, tensor, graph.atoms[axis_id])
                atoms = _atoms(graph, tensor)
                found = {atoms.count(atom) for atom in whose[1]}
                # A product that adds up over the slices together with the axis pairs each with itself.
                if found != {1} and (inside or (len(inputs) > 1 and found != {0})):
                    whose = None
                    break
                if inside:
                    slices[tensor] = whose
        if whose is None:
            return f"an operation may take several slices together{graph.place(number)}"
    return ""


def _picked(graph: Graph, base: str, code: list[int], inputs: list[int], whose: _Slices) -> _Slices | None:
    """Whose slice is what once slices have been picked from a stack; None where it was not just these."""
    source, index = _PICKS[base]
    given = arguments(code)
    if inputs != [given[source][1][0]] or whose[0] != -1:
        return None
    sizes = graph.tape.tensors[inputs[0]][0]
    stacked = [d for d in range(len(sizes)) if sorted(graph.dim_atoms(inputs[0], d)) == list(whose[1])]
    indices = given[index][1]
    if base == "index":
        picked = [d for d, tensor in enumerate(indices) if tensor >= 0]
    elif base == "index_select":
        picked = [given[1][1][0] % len(sizes)]
    else:
        picked = [0]
    if len(stacked) != 1 or picked != stacked:
        return None
    chosen = indices[picked[0]] if base == "index" else indices[0]
    return chosen, tuple(sorted(_atoms(graph, chosen)))


def _atoms(graph: Graph, tensor: int) -> list[int]:
    return [
        atom for dim in range(len(graph.tape.tensors[tensor][0])) for atom in graph.dim_atoms(tensor, dim)
    ]


def _holds(graph: Graph, tensor: int, atom: int) -> bool:
    return atom in _atoms(graph, tensor)
