"""Which indices go: the axes that may give under a plan's options, ranked by their scores, and how much each gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmprune.errors import InputError, PlanError
from llmprune.planning.allocation import Budget, Candidate, CountedGraph, layer_of, protected, rank, rank_rows
from llmprune.planning.allocation import stacks as stacks_of
from llmprune.planning.choice import KINDS
from llmprune.planning.closure import close
from llmprune.planning.layer_choice import (
    DEPTHS,
    Chosen,
    Shallower,
    Stack,
    candidates,
    check_keys,
    drops_of,
    fit,
    index_array,
    sequence,
    share,
    with_axes,
    without_branches,
)
from llmprune.planning.targets import Goal, Target
from llmprune.tracing.equations import System
from llmprune.tracing.layers import Drop, LayerAxis
from llmprune.tracing.scope import under
from llmprune.tracing.sublayers import Part, PartAxis

if TYPE_CHECKING:
    from llmprune.planning.request import Request
    from llmprune.tracing.graph import Axis, Graph

Indices = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]

SPLIT = ("head", "ffn")
"""Kinds of axes along which tensor parallelism splits layers: key-value heads (query heads go along) and channels."""


@dataclass(frozen=True)
class Checked:
    """Scores that fit the graph: axis id -> (axis size,), and -> (outer size, axis size) where an axis has them."""

    flat: dict[int, Array]
    nested: dict[int, Array]
    pinned: Mapping[int, Mapping[int, str]] = field(default_factory=dict)
    comparable: bool = False
    curves: bool = False


def check_scores(graph: Graph, scores: Mapping[int, npt.ArrayLike]) -> Checked:
    """Scores as arrays of the graph's sizes, those of layers among the flat ones."""
    check_keys(scores, "scores")
    fingerprint = getattr(scores, "fingerprint", None)
    if fingerprint is not None and fingerprint != graph.fingerprint:
        raise PlanError(
            "these scores belong to another model or to this one before it was pruned: score it again"
        )
    axes: dict[int, Any] = {axis.id: axis for axis in graph.axes}
    if max(scores, default=0) >= len(graph.axes):
        axes |= {stack.id: stack for stack in graph.stacks}

    def checked(key: int, value: npt.ArrayLike, outer: tuple[int, ...]) -> Array:
        if key not in axes:
            raise PlanError(
                f"the scores name axis {key}, which this graph does not have: score the same graph"
            )
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"{describe(axes[key])} has scores that are no numbers ({error})") from error
        if array.shape != (*outer, axes[key].size):
            raise PlanError(f"{describe(axes[key])} has scores of shape {array.shape}: score the same graph")
        if not np.isfinite(array).all():
            bad = int(np.flatnonzero(~np.isfinite(array))[0]) % axes[key].size
            raise PlanError(f"{describe(axes[key])} has a score that is not finite at index {bad}")
        return array

    flat = {key: checked(key, value, ()) for key, value in scores.items()}
    nested = {
        key: checked(key, value, (graph.around(key).size,))
        for key, value in getattr(scores, "nested", {}).items()
    }
    comparable, curves = (bool(getattr(scores, name, False)) for name in ("comparable", "curves"))
    return Checked(flat, nested, getattr(scores, "pinned", {}), comparable, curves)


def check_removed(graph: Graph, removed: Mapping[int, npt.ArrayLike]) -> dict[int, Indices]:
    axes = {axis.id: axis for axis in graph.axes}
    out = {}
    for key, indices in removed.items():
        if key not in axes:
            stacks = (
                f", its layers and parts of layers {[s.id for s in graph.stacks]}" if graph.layers else ""
            )
            raise InputError(f"there is no axis {key}: this graph's axes are 0..{len(axes) - 1}{stacks}")
        axis = axes[key]
        values = index_array(indices, key)
        if values.size == 0:
            continue
        if values.ndim > 2 or not np.issubdtype(values.dtype, np.integer):
            raise InputError(f"the removed indices of axis {key} must be integers")
        values = (
            np.unique(values.astype(np.int64))
            if values.ndim == 1
            else np.sort(values.astype(np.int64), axis=1)
        )
        if values.min() < 0 or values.max() >= axis.size:
            wrong = values.min() if values.min() < 0 else values.max()
            raise InputError(f"{describe(axis)} has no index {wrong}")
        if not axis.prunable:
            raise PlanError(f"{describe(axis)} is frozen: {'; '.join(axis.reasons) or 'it is not prunable'}")
        if values.ndim == 2:
            rows = graph.around(key).size
            if len(values) != rows or (np.diff(values, axis=1) == 0).any():
                raise InputError(
                    f"{describe(axis)} needs a row of different indices for each of the {rows} indices around it"
                )
        if values.shape[-1] == axis.size:
            raise PlanError(f"{describe(axis)} would lose every index: keep at least one")
        out[key] = values
    return out


def closed(
    graph: Graph, system: System, wanted: Mapping[int, Indices], chosen: Chosen
) -> tuple[Chosen, list[Drop | Part], dict[int, Indices], dict[int, int], dict[Any, Any]]:
    """A choice with what it demands: blocks, as drops, the axes outside of them, the counts, attributes' values."""
    axes = graph.axes
    chosen = without_branches(graph, chosen)
    drops = drops_of(graph, chosen)
    prefixes = tuple(prefix for drop in drops for prefix in drop.prefixes)
    # What goes with its block goes once.
    wanted = {key: gone for key, gone in wanted.items() if not (prefixes and inside(axes[key], prefixes))}
    counts, changed = close(system, {axis: indices.shape[-1] for axis, indices in wanted.items()})
    if prefixes:
        counts = {axis: count for axis, count in counts.items() if not inside(axes[axis], prefixes)}
    return chosen, drops, wanted, counts, changed


def reach(
    graph: Graph,
    system: System,
    scores: Checked,
    options: Mapping[str, Any],
    target: Target,
    measured: Request | None,
) -> tuple[dict[int, Indices], Chosen, dict[str, Any]]:
    """What to remove for a target, as :func:`choose` has it, and what the plan says of the target."""
    goal = Goal(graph, target, options["kinds"], measured)
    weighed = goal.graph

    def cost(choice: tuple[dict[int, Indices], Chosen]) -> int:
        _, drops, _, counts, _ = closed(weighed, system, *choice)
        return weighed.numel(counts, drops)

    floor = _floor(weighed, system, scores, options)
    found = None
    if floor is not None and floor <= goal.limit:
        found = goal.reach(lambda freed: choose(weighed, system, scores, options, freed), cost)
    if found is None:
        loose: dict[str, dict[str, Any]] = {
            "protect_first and protect_last": {"protect_first": 0, "protect_last": 0},
            "scope": {"scope": None},
            "round_to": {"round_to": 1},
            "tp": {"tp": 1},
            "kinds": {"kinds": [kind for kind in KINDS if kind in options["kinds"] or kind not in DEPTHS]},
        }
        relaxed = {name: _floor(weighed, system, scores, {**options, **new}) for name, new in loose.items()}
        raise goal.refuse(
            goal.before if floor is None else floor,
            {name: least for name, least in relaxed.items() if least is not None and least != floor},
        )
    per = goal.per
    told = {**target.to_json(), "before": goal.before / per, "limit": goal.limit / per}
    return *found, {**told, "reached": cost(found) / per}


def _floor(graph: Graph, system: System, scores: Checked, options: Mapping[str, Any]) -> int | None:
    """What is left when all goes that may go under the options; None where nothing may, or it cannot be told."""
    try:
        chosen = {stack.axis.id: sorted(stack.order) for stack in _stacks(graph, scores, options)}
        drops = drops_of(graph, without_branches(graph, chosen))
        narrow = set(options["kinds"]) - set(DEPTHS)
        found = candidates_of(graph, scores, options, drops) if narrow else []
        most = {c.axis: int(steps[-1]) for c in found if len(steps := c.removals())}
        return graph.numel(close(system, most)[0], drops)
    except PlanError:
        return None


def _stacks(graph: Graph, scores: Checked, options: Mapping[str, Any]) -> list[Stack]:
    """The stacks that may lose blocks under the options."""
    depths, scope = [kind for kind in DEPTHS if kind in options["kinds"]], options["scope"]
    if not depths:
        return []
    return candidates(
        graph,
        depths,
        scores.flat,
        scores.pinned,
        options["protect_first"],
        options["protect_last"],
        lambda path: not scope or under(path, scope),
    )


def choose(
    graph: Graph, system: System, scores: Checked, options: Mapping[str, Any], freed: int | None = None
) -> tuple[dict[int, Indices], Chosen]:
    """Axis id -> indices to remove for a ratio or a cost to free, and stack id -> blocks to remove."""
    ratio = options["ratio"]
    stacks = _stacks(graph, scores, options)
    if isinstance(ratio, dict):
        chosen = share(stacks, ratio)
        narrower = set(ratio) - set(DEPTHS)
        found = candidates_of(graph, scores, options, drops_of(graph, chosen)) if narrower else []
        return _indices(found, {c.axis: c.share(ratio[c.kind]) for c in found}), chosen
    total = graph.numel({})
    target = round(ratio * total) if freed is None else freed
    ratio = target / total if freed is not None else ratio
    if not stacks:
        found = candidates_of(graph, scores, options)
        return _indices(found, _budget(graph, system, found, scores, options).solve(target)), {}
    steps = sequence(stacks, options["allocation"])
    if set(options["kinds"]) <= set(DEPTHS):
        return {}, fit(steps, target, ratio, total)

    def room(chosen: Chosen) -> int:
        drops = drops_of(graph, chosen)
        whole = Shallower(graph, drops)
        return sum(
            whole.numel({}) - whole.numel({c.axis: int(most[-1])})
            for c in candidates_of(graph, scores, options, drops)
            if len(most := c.removals())
        )

    failure: PlanError | None = None
    for chosen in with_axes(steps, target, room):
        drops = drops_of(graph, chosen)
        found, whole = candidates_of(graph, scores, options, drops), Shallower(graph, drops)
        rest = target - (total - whole.numel({}))
        try:
            counts = _budget(whole, system, found, scores, options).solve(rest) if rest > 0 else {}
        except PlanError as error:
            failure = error
            continue
        return _indices(found, counts), chosen
    raise PlanError(
        f"ratio {ratio:.4g} cannot be reached with layers and "
        f"{len(set(options['kinds']) - set(DEPTHS))} other kinds: {failure}"
    )


def _budget(
    graph: CountedGraph,
    system: System,
    found: Sequence[Candidate],
    scores: Checked,
    options: Mapping[str, Any],
) -> Budget:
    return Budget(graph, system, found, options["allocation"], scores.comparable)


def _indices(found: Sequence[Candidate], counts: Mapping[int, int]) -> dict[int, Indices]:
    return {c.axis: c.choose(counts[c.axis]) for c in found if counts.get(c.axis)}


def check_split(graph: Graph, counts: Mapping[int, int], drops: Sequence[Drop | Part], tp: int) -> None:
    """Raise PlanError unless what is left of every axis of :data:`SPLIT` can be shared out evenly.

    Args:
        graph: the graph.
        counts: axis id -> removed indices.
        drops: blocks that go.
        tp: devices to share them out to.
    """
    prefixes = tuple(prefix for drop in drops for prefix in drop.prefixes)
    for axis in graph.axes:
        if axis.kind not in SPLIT or not axis.prunable or (prefixes and inside(axis, prefixes)):
            continue
        left = axis.size - counts.get(axis.id, 0)
        if left % tp:
            nearest = left // tp * tp
            raise PlanError(
                f"{describe(axis)} would keep {left}, which {tp} devices cannot share evenly: "
                + (f"remove {left - nearest} more" if nearest else f"it takes {tp} at least")
                + " or choose a smaller tp"
            )


def candidates_of(
    graph: Graph, scores: Checked, options: Mapping[str, Any], drops: Sequence[Drop | Part] = ()
) -> list[Candidate]:
    """The axes that may give under the options and lie outside of blocks that go, in order of id."""
    kinds, scope = options["kinds"], options["scope"]
    chosen = [axis for axis in graph.axes if axis.prunable and axis.kind in kinds and axis.size > 1]
    missing = sorted(set(kinds) - {axis.kind for axis in chosen} - set(DEPTHS), key=kind_order)
    if not chosen or (missing and isinstance(options["ratio"], dict)):
        there = sorted({axis.kind for axis in graph.axes if axis.prunable}, key=kind_order)
        raise PlanError(
            f"this model has no prunable axis of kind {' or '.join(missing)}: "
            + (f"it has {', '.join(there)}" if there else "none of its axes is prunable")
        )
    known = stacks_of(list(graph.parameters))
    prefixes = tuple(prefix for drop in drops for prefix in drop.prefixes)
    out = []
    for axis in chosen:
        if prefixes and inside(axis, prefixes):
            continue
        if scope and not all(under(name, scope) for name in names_of(axis)):
            continue
        layer = layer_of(filter(graph.parameters.__contains__, names_of(axis)), known)
        if protected(layer, known, options["protect_first"], options["protect_last"]):
            continue
        if axis.id not in scores.flat:
            raise PlanError(
                f"{describe(axis)} has no scores: score the same graph, with this kind among its axes"
            )
        multiple = options["round_to"] if axis.kind == "ffn" else 1
        if axis.kind in SPLIT:
            multiple = math.lcm(multiple, options.get("tp", 1))
        # What something normalises over is cut alike everywhere.
        nested = None if axis.marks else scores.nested.get(axis.id)
        ranked = scores.flat[axis.id] if nested is None else np.sort(nested, axis=1).sum(0)
        out.append(Candidate(axis.id, axis.kind, axis.size, ranked, multiple, nested, graph.least(axis.id)))
    if not out:
        raise PlanError(
            f"nothing of kind {' or '.join(kinds)} is left to prune, so the largest reachable ratio is 0: "
            "protect fewer layers or widen the scope"
        )
    return out


def extend(axis: Axis, wanted: Indices | None, count: int, scores: Checked) -> Indices:
    """``count`` indices of an axis: those asked for, then those of the lowest score (or index); by row if ragged."""
    if wanted is None:
        wanted = np.empty(0, dtype=np.int64)
    if wanted.shape[-1] == count:
        return wanted
    flat = scores.flat.get(axis.id, np.arange(axis.size, dtype=np.float64))

    def extended(row: Indices, order: Indices) -> Indices:
        return np.sort(np.concatenate([row, order[~np.isin(order, row)][: count - len(row)]]))

    if wanted.ndim == 1:
        return extended(wanted, rank(flat))
    nested = scores.nested.get(axis.id, np.tile(flat, (len(wanted), 1)))
    return np.stack([extended(row, order) for row, order in zip(wanted, rank_rows(nested), strict=True)])


def inside(axis: Axis, prefixes: tuple[str, ...]) -> bool:
    """Whether all of an axis lies in blocks that go."""
    return all(name.startswith(prefixes) for name in names_of(axis))


def names_of(axis: Axis) -> list[str]:
    """The parameters and buffers it cuts, in execution order (no positions are built for this)."""
    return [name for name, _ in axis.places]


def describe(axis: Axis | LayerAxis | PartAxis) -> str:
    names = [axis.module] if isinstance(axis, (LayerAxis, PartAxis)) else names_of(axis)
    place = f" of {names[0]}" if names else ""
    return f"axis {axis.id} ({axis.kind}, size {axis.size}{place})"


def kind_order(kind: str) -> tuple[int, str]:
    return (KINDS.index(kind) if kind in KINDS else len(KINDS), kind)
