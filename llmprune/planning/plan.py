"""Plans: which indices of which axes go, what is left of every parameter, and which attributes change with them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmprune.checkpoints.atomic import write_file
from llmprune.checkpoints.schema import Table, anything, mismatch, natural, number, positive
from llmprune.compaction.norms import Norm, Rescale, rescales
from llmprune.errors import InputError, PlanError
from llmprune.planning.allocation import layer_of
from llmprune.planning.allocation import stacks as stacks_of
from llmprune.planning.choice import check_choice, check_norms
from llmprune.planning.layer_choice import (
    Chosen,
    block_summaries,
    check_blocks,
    check_keys,
)
from llmprune.planning.request import fast_multiple
from llmprune.planning.runs import decode_indices, decode_rows, encode_indices, encode_rows
from llmprune.planning.selection import (
    Checked,
    check_removed,
    check_scores,
    check_split,
    choose,
    closed,
    extend,
    kind_order,
    names_of,
    reach,
)
from llmprune.planning.targets import target_of
from llmprune.tracing.equations import Attribute, System
from llmprune.tracing.layers import Drop
from llmprune.tracing.scope import resolve
from llmprune.tracing.sublayers import Part, split

if TYPE_CHECKING:
    from llmprune.planning.request import Request
    from llmprune.tracing.graph import Graph, Lost, MarkedOp

Indices = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]

_FORMAT = 1
_ROWS = [[anything]]  # what an operation with no masked form takes and gives: looked at as it is read
_MAKE = {
    "format": anything,
    "removed": Table(number, anything),
    "kept": Table(anything, Table(number, anything)),
    "attributes": [
        {"module": str, "name": str, "index": (int, None), "old": (float, None), "new": (float, None)}
    ],
    "marked": [
        {"name": str, "nth": natural, "arg": natural, "dim": natural, "kept": str, "size": natural}
        | {"module": str, "cuts": _ROWS, "spread": _ROWS}
    ],
    "axes": Table(number, {"kind": str, "size": positive, "removed": natural, "layer?": str, "module?": str}),
    "parameters_before": natural,
    "parameters_after": natural,
    "fingerprint": str,
    "options": Table(anything, anything),
    "layers?": [
        {"module": str, "size": natural, "removed": str, "input": (int, str), "output": (int, str, None)}
    ],
    "sublayers?": [
        {"path": str, "kind": str, "input": (int, str), "output": (int, None), "entries": (int, None)}
    ],
    "rescaled?": [{"parameter": str, "offset": float, "before": positive, "after": positive}],
}


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
        rescaled: weights of norms that are scaled when they are cut (:mod:`llmprune.compaction.norms`).
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
            "marked": [
                {
                    **vars(op),
                    "kept": encode_indices(op.kept),
                    **{key: _rows_of(getattr(op, key)) for key in ("cuts", "spread")},
                }
                for op in self.marked
            ],
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
        from llmprune.tracing.graph import MarkedOp

        if data.get("format") != _FORMAT:
            raise PlanError(f"this is no pruning plan of format {_FORMAT} (found {data.get('format')!r})")
        if (wrong := mismatch(dict(data), _MAKE)) is not None:
            raise PlanError(f"this pruning plan is damaged ({wrong})")
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
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise PlanError(f"this pruning plan is damaged ({type(error).__name__}: {error})") from error

    def digest(self) -> str:
        """The sha256 of the plan, by which two can be compared."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

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
        except (ValueError, RecursionError) as error:
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
        for kind in sorted({summary["kind"] for summary in self.axes.values()}, key=kind_order):
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


def plan(
    graph: Graph,
    scores: Mapping[int, npt.ArrayLike] | None = None,
    ratio: float | Mapping[str, float] | None = None,
    *,
    removed: Mapping[int, npt.ArrayLike] | None = None,
    kinds: Sequence[str] = ("head", "ffn"),
    allocation: str = "auto",
    protect_first: int | None = None,
    protect_last: int | None = None,
    round_to: int | str = 1,
    tp: int = 1,
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
            score per parameter; the formula is in :mod:`llmprune.planning.allocation`). ``auto``: ``global`` where the
            scores are in units of the loss (of ``obs``), else ``uniform``. ``sensitivity``: ``global`` by what
            :func:`llmprune.sensitivity` measured. ``search`` is where :func:`llmprune.search` begins, like ``auto``.
        protect_first: layers left whole at the start of each stack of layers; None scales the paper's 4 of 32, and
            is 0 with ``global`` and scores in units of the loss, which say themselves what a layer is worth.
        protect_last: layers left whole at its end; None scales the paper's 2 of 32, or is 0 likewise.
        tp: devices that tensor parallelism is to split each layer over: numbers of key-value heads and of FFN channels
            that stay are multiples of it in every layer, or the plan is refused.
        round_to: kept FFN channels per layer must be a multiple of this; ``auto`` takes the one that is fast on this
            machine (:func:`llmprune.planning.request.fast_multiple`).
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
            from timed shapes (:mod:`llmprune.planning.request`).
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
    checked = check_scores(graph, scores) if scores is not None else Checked({}, {})
    options: dict[str, Any] = {"seed": int(seed)}
    for name in ("importance", "aggregation", "calibration_hash"):
        value = getattr(scores, name, None)
        if value is not None:
            options[name] = value
    if removed is not None:
        check_keys(removed, "removed")
        whole = (
            {} if max(removed, default=0) < len(graph.axes) else {stack.id: stack for stack in graph.stacks}
        )
        chosen = check_blocks({key: removed[key] for key in removed if key in whole}, whole)
        wanted = check_removed(graph, {key: removed[key] for key in removed if key not in whole})
    else:
        check_choice(
            ratio,
            kinds=kinds,
            allocation=allocation,
            protect_first=protect_first,
            protect_last=protect_last,
            round_to=round_to,
            norms=norms,
            tp=tp,
        )
        if round_to == "auto":
            round_to = fast_multiple(graph)
        if allocation == "sensitivity" and not checked.curves:
            raise InputError(
                "allocation by sensitivity needs measured scores, which "
                "llmprune.sensitivity(model, graph, scores, calibration) makes"
            )
        if allocation in ("auto", "search"):  # a search begins there
            allocation = "global" if checked.comparable else "uniform"
        if allocation in ("global", "sensitivity") and checked.comparable and not isinstance(ratio, Mapping):
            protect_first, protect_last = protect_first or 0, protect_last or 0
        options |= {
            "ratio": dict(ratio) if isinstance(ratio, Mapping) else None if ratio is None else float(ratio),
            "kinds": list(ratio) if isinstance(ratio, Mapping) else list(kinds),
            "allocation": allocation,
            "protect_first": protect_first,
            "protect_last": protect_last,
            "round_to": round_to,
            **({"tp": tp} if tp > 1 else {}),
            "scope": resolve(graph.parameters, scope) if scope else None,
        }
        if scores is None:
            raise InputError(
                "plan needs scores to choose by: llmprune.score(model, graph, calibration) makes them"
            )
        if target is None:
            wanted, chosen = choose(graph, system, checked, options)
        else:
            wanted, chosen, options["target"] = reach(graph, system, checked, options, target, measured)
    chosen, drops, wanted, counts, changed = closed(graph, system, wanted, chosen)
    layers, parts = split(drops)
    prefixes = tuple(prefix for drop in drops for prefix in drop.prefixes)
    graph.check_choices(counts)
    if tp > 1:
        check_split(graph, counts, drops, tp)
    final = {
        axis: extend(axes[axis], wanted.get(axis), count, checked) for axis, count in sorted(counts.items())
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


def _rows_of(lost: tuple[Lost, ...]) -> list[list[Any]]:
    return [[arg, dim, size, list(kept)] for arg, dim, size, kept in lost]


def _sources(graph: Graph) -> list[Any]:
    """The graph, and the same model recorded under another form of attention where there is one."""
    second = getattr(graph, "second", None)
    return [graph] if second is None else [graph, second]


def _summaries(graph: Graph, removed: Mapping[int, Indices]) -> dict[int, dict[str, Any]]:
    known = stacks_of(list(graph.parameters))
    axes = {axis.id: axis for axis in graph.axes}
    out: dict[int, dict[str, Any]] = {}
    for key, indices in removed.items():
        axis = axes[key]
        out[key] = {"kind": axis.kind, "size": axis.size, "removed": indices.shape[-1]}
        layer = layer_of(filter(graph.parameters.__contains__, names_of(axis)), known)
        if layer is not None:
            out[key]["layer"] = ".".join(part for part in (layer[0], str(layer[1])) if part)
    return out
