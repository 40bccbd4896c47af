"""Plans: which indices of which axes go, what is left of every parameter, and which attributes change with them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmprune.allocation import Budget, Candidate, layer_of, protected, rank, rank_rows
from llmprune.allocation import stacks as stacks_of
from llmprune.atomic import write_file
from llmprune.choice import KINDS, check_choice, check_norms
from llmprune.closure import close
from llmprune.equations import Attribute, System
from llmprune.errors import InputError, PlanError
from llmprune.layer_choice import (
    DEPTHS,
    Chosen,
    Shallower,
    Stack,
    block_summaries,
    candidates,
    check_blocks,
    drops_of,
    fit,
    sequence,
    share,
    with_axes,
    without_branches,
)
from llmprune.layers import Drop, LayerAxis
from llmprune.norms import Norm, Rescale, rescales
from llmprune.request import fast_multiple
from llmprune.runs import decode_indices, decode_rows, encode_indices, encode_rows
from llmprune.scope import resolve, under
from llmprune.sublayers import Part, PartAxis, split
from llmprune.targets import Goal, Target, target_of

if TYPE_CHECKING:
    from llmprune.graph import Axis, Graph, MarkedOp
    from llmprune.request import Request

Indices = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]

_FORMAT = 1


@dataclass(eq=False)
class Plan:
    """What one pruning removes.

    Attributes:
        removed: axis id -> sorted removed indices, after closure over ties; (outer size, k) where each index around the
            axis (:meth:`Graph.around`: key-value heads, experts) loses k indices of its own choice (query heads, the
            channels inside). Of a stack of layers (:attr:`Graph.layers`) the positions of the blocks that go.
        kept: canonical parameter or buffer name -> dimension -> sorted kept positions of the original; only what
            changes. Where slices along dimension 0 (experts) keep different ones, an array with a row for each slice
            that stays.
        attributes: module attributes that take a new value.
        marked: operations that normalise over a removed axis (what :func:`llmprune.verify` must mask).
        axes: axis id -> ``{"kind", "size", "removed"}`` for the axes in ``removed``, and ``"layer"`` where it has one
            (``"module"`` for a stack of layers).
        parameters_before: parameters of the model (tied ones once).
        parameters_after: parameters left.
        fingerprint: of the traced model; a plan fits no other.
        options: the arguments it was made with.
        layers: the blocks that leave each stack; their parameters are in no other list.
        sublayers: the attention and feed-forwards that go alone, from blocks that stay.
        rescaled: weights of norms that are scaled when they are cut (:mod:`llmprune.norms`).
    """

    removed: dict[int, Indices]
    kept: dict[str, dict[int, Indices]]
    attributes: list[Attribute]
    marked: list[MarkedOp]
    axes: dict[int, dict[str, Any]]
    parameters_before: int
    parameters_after: int
    fingerprint: str
    options: dict[str, Any] = field(default_factory=dict)
    layers: list[Drop] = field(default_factory=list)
    sublayers: list[Part] = field(default_factory=list)
    rescaled: list[Rescale] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The share of the model's parameters that goes."""
        return 1.0 - self.parameters_after / self.parameters_before if self.parameters_before else 0.0

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON object; index lists as runs."""
        return {
            "format": _FORMAT,
            "removed": {str(axis): encode_rows(indices) for axis, indices in self.removed.items()},
            "kept": {
                name: {str(dim): encode_rows(kept) for dim, kept in dims.items()}
                for name, dims in self.kept.items()
            },
            "attributes": [asdict(attribute) for attribute in self.attributes],
            "marked": [{**vars(op), "kept": encode_indices(op.kept)} for op in self.marked],
            "axes": {str(axis): summary for axis, summary in self.axes.items()},
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "fingerprint": self.fingerprint,
            "options": self.options,
            "layers": [{**vars(drop), "removed": encode_indices(drop.removed)} for drop in self.layers],
            "sublayers": [vars(part) for part in self.sublayers],
            "rescaled": [vars(one) for one in self.rescaled],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_json`.

        Raises:
            PlanError: the object is not a plan this version can read.
        """
        from llmprune.graph import MarkedOp

        if data.get("format") != _FORMAT:
            raise PlanError(f"this is no pruning plan of format {_FORMAT} (found {data.get('format')!r})")
        try:
            return cls(
                removed={int(axis): decode_rows(text) for axis, text in data["removed"].items()},
                kept={
                    name: {int(dim): decode_rows(text) for dim, text in dims.items()}
                    for name, dims in data["kept"].items()
                },
                attributes=[Attribute(**attribute) for attribute in data["attributes"]],
                marked=[
                    MarkedOp(
                        **{
                            **op,
                            "kept": decode_indices(op["kept"]),
                            **{
                                key: tuple((*row[:3], tuple(row[3])) for row in op[key])
                                for key in ("cuts", "spread")
                            },
                        }
                    )
                    for op in data["marked"]
                ],
                axes={int(axis): dict(summary) for axis, summary in data["axes"].items()},
                parameters_before=data["parameters_before"],
                parameters_after=data["parameters_after"],
                fingerprint=data["fingerprint"],
                options=dict(data["options"]),
                layers=[
                    Drop(**{**drop, "removed": decode_indices(drop["removed"])})
                    for drop in data.get("layers", [])
                ],
                sublayers=[Part(**part) for part in data.get("sublayers", ())],
                rescaled=[Rescale(**one) for one in data.get("rescaled", ())],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"this pruning plan is damaged ({type(error).__name__}: {error})") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; a crash leaves the old file or the new one, never half of one."""
        write_file(path, json.dumps(self.to_json()).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            PlanError: the file cannot be read or is not a plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"the plan {path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise PlanError(f"{path} is no pruning plan: {error}") from error
        if not isinstance(data, dict):
            raise PlanError(f"{path} is no pruning plan: it holds a {type(data).__name__}")
        try:
            return cls.from_json(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def __eq__(self, other: object) -> bool:
        return self.to_json() == other.to_json() if isinstance(other, Plan) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        """A table: per kind, how many axes lose how many of their groups."""
        rows = [("kind", "axes", "groups", "removed", "share")]
        for kind in sorted({summary["kind"] for summary in self.axes.values()}, key=_kind_order):
            chosen = [summary for summary in self.axes.values() if summary["kind"] == kind]
            groups, removed = sum(s["size"] for s in chosen), sum(s["removed"] for s in chosen)
            rows.append((kind, str(len(chosen)), str(groups), str(removed), f"{removed / groups:.1%}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
                ]
            )
            for row in rows
        ]
        lines.append(
            f"parameters {self.parameters_before:,} -> {self.parameters_after:,} ({self.ratio:.2%} removed)"
        )
        return "\n".join(lines)


def _kind_order(kind: str) -> tuple[int, str]:
    return (KINDS.index(kind) if kind in KINDS else len(KINDS), kind)


def plan(
    graph: Graph,
    scores: Mapping[int, npt.ArrayLike] | None = None,
    ratio: float | Mapping[str, float] | None = None,
    *,
    removed: Mapping[int, npt.ArrayLike] | None = None,
    kinds: Sequence[str] = ("head", "ffn"),
    allocation: str = "uniform",
    protect_first: int | None = None,
    protect_last: int | None = None,
    round_to: int | str = 1,
    scope: str | None = None,
    seed: int = 0,
    norms: str = "rescaled",
    params: float | str | None = None,
    memory: float | str | None = None,
    macs: float | str | None = None,
    latency: float | str | None = None,
    context: int | None = None,
    batch: int | None = None,
    new_tokens: int | None = None,
    measured: Request | None = None,
) -> Plan:
    """Choose what to remove.

    One of ``ratio``, a target (``params``, ``memory``, ``macs``, ``latency``; all with ``scores``) and ``removed`` is
    given. The choice is deterministic: equal scores go by index.

    Args:
        graph: the traced model.
        scores: axis id -> float64 (axis.size,), lower goes first; of the same graph. An attribute ``nested`` (axis id
            -> float64 (outer size, axis size)) makes those axes lose a different choice for each outer index.
        ratio: share of the whole model's parameters that is to go, in (0, 1), reached within one group's size (one
            multiple of ``round_to``, for FFN axes). Or kind -> share of that kind's groups to remove in every layer,
            rounded down (of ``layer``, ``attention`` and ``feedforward``: of every stack's blocks); ``kinds`` and
            ``allocation`` then do not matter.
        removed: axis id -> indices to remove. All of them go, and what their ties demand. For an axis with something
            around it (:meth:`Graph.around`: query heads in key-value heads, channels in experts) an array (size around
            it, k) removes different ones in each.
        kinds: kinds of axes that may give.
        allocation: ``uniform`` (every axis loses the same share) or ``global`` (ranked across layers and kinds by
            normalised score; the formula is in :mod:`llmprune.allocation`).
        protect_first: layers left whole at the start of each stack of layers; None scales the paper's 4 of 32.
        protect_last: layers left whole at its end; None scales the paper's 2 of 32.
        round_to: kept FFN channels per layer must be a multiple of this; ``auto`` takes the one that is fast on this
            machine (:func:`llmprune.request.fast_multiple`).
        scope: path of a module, or the end of just one (``vision_tower``); only axes all of whose parameters lie under
            it may give.
        seed: recorded in the plan; nothing here is random.
        norms: what a root-mean-square norm becomes that loses positions (hidden channels). ``rescaled``: its weight and
            epsilon are scaled, and the pruned model equals the original with the removed parameters set to zero.
            ``kept``: weight and epsilon stay, and it equals that model with the mean taken over the kept positions.
            Other norms are always as with ``kept``.
        params: the most parameters the model may have left, a number or ``5.4B``; or ``0.8x``. Like every target in
            place of a ratio it is kept, to within one group's size.
        memory: the most bytes of weights, buffers and cache, a number or ``10GB``, ``10GiB``; or ``0.8x``.
        macs: the most multiply-accumulates per token of the recorded pass (:meth:`Graph.macs`), a number or ``3.2G``;
            or ``0.8x``.
        latency: the most time of a request on this machine, a number of milliseconds, ``35ms``, or ``0.8x``; foreseen
            from timed shapes (:mod:`llmprune.request`).
        context: for ``memory``, tokens of each sequence in the cache (of a graph traced with ``cache=True``); without
            it weights and buffers alone count. For ``latency``, tokens of the prompt; 128 by default.
        batch: for ``memory`` and ``latency``, sequences; 1 by default.
        new_tokens: for ``latency``, steps after the prompt; 32 by default.
        measured: for ``latency``, what :func:`llmprune.measure_request` found for the same request.

    Returns:
        The plan, closed over ties: it may remove more than asked where sizes are tied, and never fewer.

    Raises:
        InputError: an argument outside its domain.
        PlanError: an impossible demand, a frozen axis, or scores of another model.
    """
    target = target_of(context, batch, new_tokens, params=params, memory=memory, macs=macs, latency=latency)
    if [ratio, removed, target].count(None) != 2:
        raise InputError(
            "plan needs either a ratio or one target (with scores), or explicit indices in removed, not both"
        )
    check_norms(norms)
    axes = {axis.id: axis for axis in graph.axes}
    chosen: Chosen = {}
    system = System(graph.axes, _sources(graph))
    checked = _check_scores(graph, scores) if scores is not None else _Checked({}, {})
    options: dict[str, Any] = {"seed": int(seed)}
    for name in ("importance", "aggregation", "calibration_hash"):
        value = getattr(scores, name, None)
        if value is not None:
            options[name] = value
    if removed is not None:
        whole = (
            {} if max(removed, default=0) < len(graph.axes) else {stack.id: stack for stack in graph.stacks}
        )
        chosen = check_blocks({key: removed[key] for key in removed if key in whole}, whole)
        wanted = _check_removed(graph, {key: removed[key] for key in removed if key not in whole})
    else:
        check_choice(
            ratio,
            kinds=kinds,
            allocation=allocation,
            protect_first=protect_first,
            protect_last=protect_last,
            round_to=round_to,
            norms=norms,
        )
        if round_to == "auto":
            round_to = fast_multiple(graph)
        options |= {
            "ratio": dict(ratio) if isinstance(ratio, Mapping) else None if ratio is None else float(ratio),
            "kinds": list(ratio) if isinstance(ratio, Mapping) else list(kinds),
            "allocation": allocation,
            "protect_first": protect_first,
            "protect_last": protect_last,
            "round_to": round_to,
            "scope": resolve(graph.parameters, scope) if scope else None,
        }
        if scores is None:
            raise InputError(
                "plan needs scores to choose by: llmprune.score(model, graph, calibration) makes them"
            )
        if target is None:
            wanted, chosen = _choose(graph, system, checked, options)
        else:
            wanted, chosen, options["target"] = _reach(graph, system, checked, options, target, measured)
    chosen, drops, wanted, counts, changed = _closed(graph, system, wanted, chosen)
    layers, parts = split(drops)
    prefixes = tuple(prefix for drop in drops for prefix in drop.prefixes)
    graph.check_choices(counts)
    final = {
        axis: _extend(axes[axis], wanted.get(axis), count, checked) for axis, count in sorted(counts.items())
    }
    attributes = [Attribute.of(leaf, system.old[leaf], new) for leaf, new in sorted(changed.items())]
    blocks = {axis: np.array(gone, dtype=np.int64) for axis, gone in chosen.items() if gone}
    marked = list(graph.marked_ops(final))
    scaled: list[tuple[Norm, Rescale]] = []
    if norms == "rescaled" and marked:
        marked, scaled = rescales(graph, marked, final)
        scaled = [pair for pair in scaled if not (prefixes and f"{pair[0].module}.".startswith(prefixes))]
        if scaled:
            options["norms"] = norms
    for norm, by in scaled:
        grown = norm.epsilon * by.before / by.after
        attributes.append(Attribute(norm.module, norm.attribute, None, norm.epsilon, grown))
    return Plan(
        removed={**final, **blocks},
        kept={n: dims for n, dims in graph.kept(final).items() if not (prefixes and n.startswith(prefixes))},
        attributes=[a for a in attributes if not (prefixes and f"{a.module}.".startswith(prefixes))],
        marked=marked,
        axes=_summaries(graph, final) | block_summaries(graph, blocks),
        parameters_before=graph.numel({}),
        parameters_after=graph.numel(counts, drops),
        fingerprint=graph.fingerprint,
        options=options,
        layers=layers,
        sublayers=parts,
        rescaled=[by for _, by in scaled],
    )


def _closed(
    graph: Graph, system: System, wanted: Mapping[int, Indices], chosen: Chosen
) -> tuple[Chosen, list[Drop | Part], dict[int, Indices], dict[int, int], dict[Any, Any]]:
    """A choice with what it demands: blocks, as drops, the axes outside of them, the counts, attributes' values."""
    axes = graph.axes
    chosen = without_branches(graph, chosen)
    drops = drops_of(graph, chosen)
    prefixes = tuple(prefix for drop in drops for prefix in drop.prefixes)
    # What goes with its block goes once.
    wanted = {key: gone for key, gone in wanted.items() if not (prefixes and _inside(axes[key], prefixes))}
    counts, changed = close(system, {axis: indices.shape[-1] for axis, indices in wanted.items()})
    if prefixes:
        counts = {axis: count for axis, count in counts.items() if not _inside(axes[axis], prefixes)}
    return chosen, drops, wanted, counts, changed


def _inside(axis: Axis, prefixes: tuple[str, ...]) -> bool:
    """Whether all of an axis lies in blocks that go."""
    return all(name.startswith(prefixes) for name in _names(axis))


def _sources(graph: Graph) -> list[Any]:
    """The graph, and the same model recorded under another form of attention where there is one."""
    second = getattr(graph, "second", None)
    return [graph] if second is None else [graph, second]


def _names(axis: Axis) -> list[str]:
    """The parameters and buffers it cuts, in execution order (no positions are built for this)."""
    return [name for name, _ in axis.places]


def _describe(axis: Axis | LayerAxis | PartAxis) -> str:
    names = [axis.module] if isinstance(axis, (LayerAxis, PartAxis)) else _names(axis)
    place = f" of {names[0]}" if names else ""
    return f"axis {axis.id} ({axis.kind}, size {axis.size}{place})"


@dataclass(frozen=True)
class _Checked:
    """Scores that fit the graph: axis id -> (axis size,), and -> (outer size, axis size) where an axis has them."""

    flat: dict[int, Array]
    nested: dict[int, Array]
    pinned: Mapping[int, Mapping[int, str]] = field(default_factory=dict)


def _check_scores(graph: Graph, scores: Mapping[int, npt.ArrayLike]) -> _Checked:
    """Scores as arrays of the graph's sizes, those of layers among the flat ones."""
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
        array = np.asarray(value, dtype=np.float64)
        if array.shape != (*outer, axes[key].size):
            raise PlanError(f"{_describe(axes[key])} has scores of shape {array.shape}: score the same graph")
        if not np.isfinite(array).all():
            bad = int(np.flatnonzero(~np.isfinite(array))[0]) % axes[key].size
            raise PlanError(f"{_describe(axes[key])} has a score that is not finite at index {bad}")
        return array

    flat = {key: checked(key, value, ()) for key, value in scores.items()}
    nested = {
        key: checked(key, value, (graph.around(key).size,))
        for key, value in getattr(scores, "nested", {}).items()
    }
    return _Checked(flat, nested, getattr(scores, "pinned", {}))


def _check_removed(graph: Graph, removed: Mapping[int, npt.ArrayLike]) -> dict[int, Indices]:
    axes = {axis.id: axis for axis in graph.axes}
    out = {}
    for key, indices in removed.items():
        if key not in axes:
            stacks = (
                f", its layers and parts of layers {[s.id for s in graph.stacks]}" if graph.layers else ""
            )
            raise InputError(f"there is no axis {key}: this graph's axes are 0..{len(axes) - 1}{stacks}")
        axis = axes[key]
        values = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices))  # type: ignore[arg-type]
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
            raise InputError(f"{_describe(axis)} has no index {wrong}")
        if not axis.prunable:
            raise PlanError(f"{_describe(axis)} is frozen: {'; '.join(axis.reasons) or 'it is not prunable'}")
        if values.ndim == 2:
            rows = graph.around(key).size
            if len(values) != rows or (np.diff(values, axis=1) == 0).any():
                raise InputError(
                    f"{_describe(axis)} needs a row of different indices for each of the {rows} indices around it"
                )
        if values.shape[-1] == axis.size:
            raise PlanError(f"{_describe(axis)} would lose every index: keep at least one")
        out[key] = values
    return out


def _reach(
    graph: Graph,
    system: System,
    scores: _Checked,
    options: Mapping[str, Any],
    target: Target,
    measured: Request | None,
) -> tuple[dict[int, Indices], Chosen, dict[str, Any]]:
    """What to remove for a target, as :func:`_choose` has it, and what the plan says of the target."""
    goal = Goal(graph, target, options["kinds"], measured)
    weighed = goal.graph

    def cost(choice: tuple[dict[int, Indices], Chosen]) -> int:
        _, drops, _, counts, _ = _closed(weighed, system, *choice)
        return weighed.numel(counts, drops)

    floor = _floor(weighed, system, scores, options)
    found = None
    if floor is not None and floor <= goal.limit:
        found = goal.reach(lambda freed: _choose(weighed, system, scores, options, freed), cost)
    if found is None:
        loose: dict[str, dict[str, Any]] = {
            "protect_first and protect_last": {"protect_first": 0, "protect_last": 0},
            "scope": {"scope": None},
            "round_to": {"round_to": 1},
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


def _floor(graph: Graph, system: System, scores: _Checked, options: Mapping[str, Any]) -> int | None:
    """What is left when all goes that may go under the options; None where nothing may, or it cannot be told."""
    try:
        chosen = {stack.axis.id: sorted(stack.order) for stack in _stacks(graph, scores, options)}
        drops = drops_of(graph, without_branches(graph, chosen))
        narrow = set(options["kinds"]) - set(DEPTHS)
        found = _candidates(graph, scores, options, drops) if narrow else []
        most = {c.axis: int(steps[-1]) for c in found if len(steps := c.removals())}
        return graph.numel(close(system, most)[0], drops)
    except PlanError:
        return None


def _stacks(graph: Graph, scores: _Checked, options: Mapping[str, Any]) -> list[Stack]:
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


def _choose(
    graph: Graph, system: System, scores: _Checked, options: Mapping[str, Any], freed: int | None = None
) -> tuple[dict[int, Indices], Chosen]:
    """Axis id -> indices to remove for a ratio or a cost to free, and stack id -> blocks to remove."""
    ratio = options["ratio"]
    stacks = _stacks(graph, scores, options)
    if isinstance(ratio, dict):
        chosen = share(stacks, ratio)
        narrower = set(ratio) - set(DEPTHS)
        found = _candidates(graph, scores, options, drops_of(graph, chosen)) if narrower else []
        return _indices(found, {c.axis: c.share(ratio[c.kind]) for c in found}), chosen
    total = graph.numel({})
    target = round(ratio * total) if freed is None else freed
    ratio = target / total if freed is not None else ratio
    if not stacks:
        found = _candidates(graph, scores, options)
        return _indices(found, Budget(graph, system, found, options["allocation"]).solve(target)), {}
    steps = sequence(stacks, options["allocation"])
    if set(options["kinds"]) <= set(DEPTHS):
        return {}, fit(steps, target, ratio, total)

    def reach(chosen: Chosen) -> int:
        drops = drops_of(graph, chosen)
        whole = Shallower(graph, drops)
        return sum(
            whole.numel({}) - whole.numel({c.axis: int(most[-1])})
            for c in _candidates(graph, scores, options, drops)
            if len(most := c.removals())
        )

    failure: PlanError | None = None
    for chosen in with_axes(steps, target, reach):
        drops = drops_of(graph, chosen)
        found, whole = _candidates(graph, scores, options, drops), Shallower(graph, drops)
        rest = target - (total - whole.numel({}))
        try:
            counts = Budget(whole, system, found, options["allocation"]).solve(rest) if rest > 0 else {}
        except PlanError as error:
            failure = error
            continue
        return _indices(found, counts), chosen
    raise PlanError(
        f"ratio {ratio:.4g} cannot be reached with layers and "
        f"{len(set(options['kinds']) - set(DEPTHS))} other kinds: {failure}"
    )


def _indices(found: Sequence[Candidate], counts: Mapping[int, int]) -> dict[int, Indices]:
    return {c.axis: c.choose(counts[c.axis]) for c in found if counts.get(c.axis)}


def _candidates(
    graph: Graph, scores: _Checked, options: Mapping[str, Any], drops: Sequence[Drop | Part] = ()
) -> list[Candidate]:
    """The axes that may give under the options and lie outside of blocks that go, in order of id."""
    kinds, scope = options["kinds"], options["scope"]
    chosen = [axis for axis in graph.axes if axis.prunable and axis.kind in kinds and axis.size > 1]
    missing = sorted(set(kinds) - {axis.kind for axis in chosen} - set(DEPTHS), key=_kind_order)
    if not chosen or (missing and isinstance(options["ratio"], dict)):
        there = sorted({axis.kind for axis in graph.axes if axis.prunable}, key=_kind_order)
        raise PlanError(
            f"this model has no prunable axis of kind {' or '.join(missing)}: "
            + (f"it has {', '.join(there)}" if there else "none of its axes is prunable")
        )
    known = stacks_of(list(graph.parameters))
    prefixes = tuple(prefix for drop in drops for prefix in drop.prefixes)
    out = []
    for axis in chosen:
        if prefixes and _inside(axis, prefixes):
            continue
        if scope and not all(under(name, scope) for name in _names(axis)):
            continue
        layer = layer_of(filter(graph.parameters.__contains__, _names(axis)), known)
        if protected(layer, known, options["protect_first"], options["protect_last"]):
            continue
        if axis.id not in scores.flat:
            raise PlanError(
                f"{_describe(axis)} has no scores: score the same graph, with this kind among its axes"
            )
        multiple = options["round_to"] if axis.kind == "ffn" else 1
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


def _extend(axis: Axis, wanted: Indices | None, count: int, scores: _Checked) -> Indices:
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


def _summaries(graph: Graph, removed: Mapping[int, Indices]) -> dict[int, dict[str, Any]]:
    known = stacks_of(list(graph.parameters))
    axes = {axis.id: axis for axis in graph.axes}
    out: dict[int, dict[str, Any]] = {}
    for key, indices in removed.items():
        axis = axes[key]
        out[key] = {"kind": axis.kind, "size": axis.size, "removed": indices.shape[-1]}
        layer = layer_of(filter(graph.parameters.__contains__, _names(axis)), known)
        if layer is not None:
            out[key]["layer"] = ".".join(part for part in (layer[0], str(layer[1])) if part)
    return out
