"""The whole path in one call: trace, score, plan, verify, compact, and save if asked to."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from llmprune.checkpoints.atomic import is_checkpoint
from llmprune.errors import InputError
from llmprune.pipeline.stages import Stage, Stages
from llmprune.tracing.scope import resolve
from llmprune.tracing.wrapped import on_uncompiled

if TYPE_CHECKING:
    import torch

    from llmprune.compaction.verify import Verification
    from llmprune.planning.plan import Plan
    from llmprune.planning.request import Request
    from llmprune.repair.repair import Repair
    from llmprune.scoring.ranks import Ranks
    from llmprune.scoring.scores import Scores
    from llmprune.tracing.graph import Graph

REPAIRS = ("auto", "ls", "none")
"""``ls`` is least squares; ``auto`` is that wherever there is calibration data for it."""


@dataclass(frozen=True)
class Size:
    """What a model weighs.

    Attributes:
        parameters: parameters, tied ones once.
        bytes: bytes of parameters and buffers, shared ones once.
        macs: multiply-accumulates per token (per traced forward pass for a model without ``input_ids``).
    """

    parameters: int
    bytes: int
    macs: int


@dataclass
class Report:
    """What :func:`prune` did; printed it is a table.

    Attributes:
        model: class name of the model.
        before, after: its :class:`Size`.
        ratio: what was asked for: a share of the parameters, or kind -> share of its groups; None for a target.
        target: what was asked for instead, with what was reached (``kind``, ``asked``, ``limit``, ``before``,
            ``reached``, ...; :class:`llmprune.planning.targets.Target`).
        latency: a request before and after, measured; for a target of latency.
        plan: the :class:`llmprune.planning.plan.Plan` that was applied.
        verification: the comparison with the masked reference; None if it was switched off.
        repair: what the repair found; None if there was none.
        stages: wall time and peak memory, in order.
        importance, aggregation, seed: how groups were scored.
        calibration_hash: sha256 of the calibration samples; None where the importance needs none.
        notes: what the recording had to do besides the ordinary.
        unknown_operations: operations without a rule -> how often they ran; each froze what it touched.
        output: where the checkpoint lies; None if none was written.
        form: its form, ``stock`` or ``universal``.
        reason: why it is not ``stock``, a clause; empty where it is.
        perplexity: before and after, if it was measured.
        generation: prompt, and continuation before and after, if asked for.
        structure: what every layer keeps, and how its scores lay (:func:`llmprune.reporting.structure.structure`).
    """

    model: str
    before: Size
    after: Size
    ratio: float | dict[str, float] | None
    plan: Plan
    verification: Verification | None
    stages: list[Stage]
    importance: str
    aggregation: str
    seed: int
    calibration_hash: str | None
    target: dict[str, Any] | None = None
    latency: tuple[Request, Request] | None = None
    repair: Repair | None = None
    notes: list[str] = field(default_factory=list)
    unknown_operations: dict[str, int] = field(default_factory=dict)
    output: str | None = None
    form: str | None = None
    reason: str = ""
    perplexity: tuple[float, float] | None = None
    generation: tuple[str, str, str] | None = None
    structure: list[dict[str, Any]] = field(default_factory=list)

    @property
    def removed(self) -> float:
        """The share of the parameters that went."""
        return 1 - self.after.parameters / self.before.parameters

    def __str__(self) -> str:
        from llmprune.reporting.report import render

        return render(self)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object; of the plan its summary (the plan itself is saved with the checkpoint)."""
        return {
            "model": self.model,
            "ratio": {"asked": self.ratio, "parameters": self.removed},
            "target": self.target,
            "latency": None
            if self.latency is None
            else {when: one.to_json() for when, one in zip(("before", "after"), self.latency, strict=True)},
            "before": asdict(self.before),
            "after": asdict(self.after),
            "axes": [{"axis": axis, **summary} for axis, summary in self.plan.axes.items()],
            "importance": self.importance,
            "aggregation": self.aggregation,
            "seed": self.seed,
            "calibration_hash": self.calibration_hash,
            "options": self.plan.options,
            "verification": None if self.verification is None else self.verification.to_json(),
            "repair": None if self.repair is None else self.repair.to_json(),
            "perplexity": None
            if self.perplexity is None
            else dict(zip(("before", "after"), self.perplexity, strict=True)),
            "generation": None
            if self.generation is None
            else dict(zip(("prompt", "before", "after"), self.generation, strict=True)),
            "stages": [asdict(stage) for stage in self.stages],
            "structure": self.structure,
            "notes": self.notes,
            "unknown_operations": self.unknown_operations,
            "output": self.output,
            "form": self.form,
            "reason": self.reason,
        }


@on_uncompiled
def prune(
    model: nn.Module,
    tokenizer: Any = None,
    ratio: float | Mapping[str, float] | None = None,
    calibration: Any = None,
    importance: str = "auto",
    aggregation: str = "sum",
    *,
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
    rounds: int = 1,
    schedule: str = "linear",
    search_seconds: float = 60.0,
    search_state: str | Path | None = None,
    context: int | None = None,
    batch: int | None = None,
    new_tokens: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    repair: str = "auto",
    repair_calibration: Any = None,
    verify: bool = True,
    output: str | Path | None = None,
    overwrite: bool = False,
    form: str = "auto",
    quiet: bool | None = None,
    stages: Stages | None = None,
    ranks: Ranks | None = None,
) -> Report:
    """Prune ``model`` in place and, with ``output``, save it.

    Nothing is cut and nothing is written before the plan has been verified on a small input. Up to then an error or
    Ctrl-C leaves the model as it was; from then on see :func:`llmprune.compact`.

    Args:
        model: any model that :func:`llmprune.trace` can trace, with its weights.
        tokenizer: for calibration texts, and saved with the model.
        ratio: share of the parameters to remove, or kind -> share of that kind's groups in every layer; 0.2 where no
            target is given in its place.
        calibration: as for :func:`llmprune.score`; not needed for ``l1``, ``l2`` and ``random``.
        importance: ``auto``: ``obs``, the best there is with repair, or ``element1`` where layers or parts of them may
            go, or where something has no consumer that ``obs`` could be read off. Or
            ``vector``, ``element1``, ``element2``, ``obs``, ``fluctuation``, ``activation``, ``l1``, ``l2``,
            ``random``, or ``block_influence`` (with ``kinds=("layer",)`` and parts of layers).
        aggregation: ``sum``, ``max``, ``product`` or ``last``, over the members of a group.
        kinds: kinds of axes that may give; ``layer`` for whole layers, ``attention`` and ``feedforward`` for these
            parts of layers alone.
        allocation: ``auto``, ``uniform`` or ``global``, as for :func:`llmprune.plan`; ``sensitivity``, measured first
            (:func:`llmprune.sensitivity`); or ``search``, from where ``auto`` ends (:func:`llmprune.search`).
        protect_first: layers left whole at the start; None scales the paper's 4 of 32.
        protect_last: layers left whole at the end; None scales the paper's 2 of 32.
        tp: devices that tensor parallelism is to split each layer over, as for :func:`llmprune.plan`.
        round_to: kept FFN channels per layer are a multiple of this; ``auto`` takes what is fast on this machine.
        scope: path of a module, or the end of just one (``vision_tower``); only what lies under it may give.
        seed: of the importance ``random``.
        norms: ``rescaled`` or ``kept``, as for :func:`llmprune.plan`.
        params: a target in place of the ratio, as for :func:`llmprune.plan`: the most parameters to be left.
        memory: the most bytes of weights, buffers and cache.
        macs: the most multiply-accumulates per token.
        latency: the most time of a request on this machine. The request is measured before and after, too.
        context: for ``memory``, tokens of each sequence in the cache; for ``latency``, of the prompt.
        batch: for these two, sequences.
        new_tokens: for ``latency``, steps after the prompt.
        rounds: in how many rounds to choose, with new scores before each (:mod:`llmprune.pipeline.iterative`).
        schedule: of the rounds, ``linear`` or ``cubic``.
        search_seconds: how long to search.
        search_state: file that a search writes after each step and goes on from.
        inputs: as for :func:`llmprune.trace`.
        repair: ``ls`` gives what stays new weights by least squares (:mod:`llmprune.repair.repair`), ``none`` leaves
            them;
            ``auto`` is ``ls`` wherever there are calibration data.
        repair_calibration: calibration of the repair, in any form that ``calibration`` has; None takes that, of texts
            16 samples of 128 tokens. More is better: ten tokens for each input of the widest layer.
        verify: whether to compare with the masked reference first.
        output: folder to write; it must not exist unless ``overwrite``.
        overwrite: whether ``output`` may be replaced.
        form: of the checkpoint, as for :func:`llmprune.save_pretrained`.
        quiet: show no progress; None shows it on a terminal only.
        stages: an existing stage clock to add to.
        ranks: processes to share the calibration samples with, as for :func:`llmprune.score`. All get the same plan
            and carry it out; the first one alone writes.

    Returns:
        A :class:`Report`.

    Raises:
        InputError: an argument outside its domain.
        LlmpruneError: what the single steps raise.
    """
    from llmprune.compaction.compact import compact
    from llmprune.compaction.verify import verify as verify_plan
    from llmprune.pipeline.iterative import check_rounds, chosen, shares
    from llmprune.planning.choice import check_choice
    from llmprune.planning.plan import plan as make_plan
    from llmprune.planning.request import fast_multiple, fitting, measure_request
    from llmprune.planning.search import search
    from llmprune.planning.sensitivity import sensitivity
    from llmprune.planning.targets import ratio_of, target_of
    from llmprune.repair.repair import repair as repair_plan
    from llmprune.reporting.structure import structure
    from llmprune.scoring.importance import lookup
    from llmprune.scoring.sampling import AUTO, best_importance, calibration_for, long_calibration
    from llmprune.scoring.score import check_scoring, score
    from llmprune.tracing.trace import trace

    check_options(repair, repair_calibration, calibration, output, overwrite, form)
    target = target_of(context, batch, new_tokens, params=params, memory=memory, macs=macs, latency=latency)
    ratio = ratio_of(ratio, target)
    wanted = tuple(ratio) if isinstance(ratio, Mapping) else kinds
    asked, importance = importance, best_importance(importance, wanted, ranks is None)
    check_scoring(importance, aggregation, calibration, wanted)
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
    check_rounds(rounds, schedule)
    clock = Stages(announcer(quiet)) if stages is None else stages
    bytes_before = model_bytes(model)
    with clock.stage("trace", "recording one forward pass"):
        graph = trace(model, inputs, cache=bool(context and memory))
        scope = resolve(graph.parameters, scope) if scope else None
    measured = None
    if target is not None and target.kind == "latency":
        context = fitting(getattr(model, "config", None), context)
        request = (context, target.batch, target.new_tokens)
        with clock.stage("latency before", "timing a request to the whole model"):
            measured = measure_request(model, *request)
    if round_to == "auto":
        round_to = fast_multiple(graph)
    options: dict[str, Any] = {
        "kinds": kinds,
        "protect_first": protect_first,
        "protect_last": protect_last,
        "round_to": round_to,
        "scope": scope,
        "tp": tp,
    }
    goals: dict[str, Any] = {
        "params": params,
        "memory": memory,
        "macs": macs,
        "latency": latency,
        "context": context,
        "batch": batch,
        "new_tokens": new_tokens,
        "measured": measured,
    }

    def scored() -> Scores:
        how: dict[str, Any] = {
            "seed": seed,
            "tokenizer": tokenizer,
            "quiet": quiet,
            "kinds": wanted,
            "ranks": ranks,
        }
        return score(model, graph, calibration, importance, aggregation, **how)

    with clock.stage("score", f"scoring coupled groups by {importance}"):
        if lookup(importance).sort == "inputs":
            calibration = calibration_for(
                importance, model, calibration, tokenizer
            )  # once, also for the repair
        first = scored()
        if asked == AUTO and any(
            a.prunable and a.size > 1 and a.kind in wanted and a.id not in first for a in graph.axes
        ):
            importance = "element1"
            first = scored()
    data = None
    if repair != "none" and (calibration is not None or repair_calibration is not None):
        data = long_calibration(
            model, calibration if repair_calibration is None else repair_calibration, tokenizer
        )
    measuring = data
    if allocation in ("sensitivity", "search") and measuring is None:
        measuring = long_calibration(model, calibration, tokenizer)

    def planned(scores: Scores, part: float | dict[str, float] | None) -> Plan:
        asked_for = {"ratio": ratio, **goals} if part is None else {"ratio": part}
        return make_plan(graph, scores, **asked_for, **options, allocation=allocation, seed=seed, norms=norms)

    def weighed(scores: Scores) -> Scores:
        if allocation != "sensitivity":
            return scores
        return sensitivity(model, graph, scores, measuring, repair=data is not None, quiet=quiet, **options)

    if allocation == "sensitivity":
        with clock.stage("sensitivity", "measuring what pruning each axis costs"):
            first = weighed(first)
    with clock.stage("plan", "choosing what to remove"):
        scores, plan = chosen(
            model,
            ratio,
            shares(rounds, schedule),
            first,
            lambda: weighed(scored()),
            planned,
            lambda plan: {} if data is None else repair_plan(model, plan, data).weights,
        )
    if allocation == "search":
        assert measuring is not None
        with clock.stage("search", f"swapping parameters between axes for {search_seconds:.0f} s"):
            plan = search(
                model,
                graph,
                scores,
                plan,
                measuring,
                seconds=search_seconds,
                repair=data is not None,
                seed=seed,
                state=search_state,
                quiet=quiet,
            )
    if ranks is not None:
        ranks.agree({"plan": plan.digest()})
    repaired = None
    if data is not None:
        with clock.stage("repair", "fitting what stays to what goes, by least squares"):
            repaired = repair_plan(model, plan, data)
    weights = None if repaired is None else repaired.weights
    verification = None
    if verify:
        with clock.stage("verify", "comparing with the masked reference"):
            verification = verify_plan(model, plan, inputs, weights)
    tokens = traced_tokens(graph) or 1
    before = Size(plan.parameters_before, bytes_before, graph.macs({}) // tokens)
    counts = {axis: gone.shape[-1] for axis, gone in plan.removed.items() if axis < len(graph.axes)}
    macs = graph.macs(counts, [*plan.layers, *plan.sublayers]) // tokens
    with clock.stage("compact", "taking the slices out"):
        compact(model, plan, weights)
    timed = None
    if measured is not None:
        with clock.stage("latency after", "timing a request to the pruned model"):
            timed = (measured, measure_request(model, *request))
    report = Report(
        model=type(model).__name__,
        before=before,
        after=Size(sum(p.numel() for p in model.parameters()), model_bytes(model), macs),
        ratio=dict(ratio) if isinstance(ratio, Mapping) else ratio,
        plan=plan,
        verification=verification,
        stages=clock.done,
        importance=importance,
        aggregation=aggregation,
        seed=seed,
        calibration_hash=scores.calibration_hash,
        target=plan.options.get("target"),
        latency=timed,
        repair=repaired,
        notes=list(graph.tape.notes),
        unknown_operations=graph.unknown_operations,
        structure=structure(graph, plan, scores),
    )
    if output is not None and (ranks is None or not ranks.rank):
        save(model, report, tokenizer, output, overwrite, clock, inputs, form)
    return report


def save(
    model: nn.Module,
    report: Report,
    tokenizer: Any,
    output: str | Path,
    overwrite: bool,
    clock: Stages,
    inputs: Mapping[str, Any] | None = None,
    form: str = "auto",
) -> None:
    """Write the pruned model as a stage of its own and note the place in the report."""
    from llmprune.checkpoints.checkpoint import save_pretrained

    figures: dict[str, tuple[float, float]] = {"MACs per token": (report.before.macs, report.after.macs)}
    if report.perplexity is not None:
        figures["perplexity"] = report.perplexity
    with clock.stage("save", f"writing {output}"):
        saved = save_pretrained(
            model, output, tokenizer, overwrite, form=form, inputs=inputs, figures=figures
        )
    report.output, report.form, report.reason = saved.directory, saved.form, saved.reason


def check_options(
    repair: str = "none",
    repair_calibration: Any = None,
    calibration: Any = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    form: str = "auto",
) -> None:
    """Refuse before any work what would be refused after it.

    Raises:
        InputError: an unknown repair or form, a repair without calibration data or data without it, or an output that
            may not be replaced or cannot be made.
    """
    from llmprune.checkpoints.checkpoint import FORMS

    if form not in FORMS:
        raise InputError(f"unknown checkpoint form {form!r}: choose one of {', '.join(FORMS)}")
    if repair not in REPAIRS:
        raise InputError(f"unknown repair {repair!r}: there are {', '.join(REPAIRS)}")
    if repair == "ls" and calibration is None and repair_calibration is None:
        raise InputError(
            "repair 'ls' needs calibration data: token ids, texts or a path (--calibration FILE)"
        )
    if repair == "none" and repair_calibration is not None:
        raise InputError("repair calibration is given, but repair is 'none': leave one of them out")
    if output is not None:
        check_output(Path(output), overwrite)


def check_output(output: Path, overwrite: bool) -> None:
    """Raise InputError for an output folder that cannot be written in the end."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} exists and is no folder: choose another output folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise InputError(
                f"{output} exists: choose another output folder, or overwrite it with --overwrite"
            )
        if not is_checkpoint(output):
            raise InputError(
                f"{output} holds no checkpoint, so it is not overwritten: choose another output folder"
            )
    place = output.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise InputError(
            f"{output} cannot be made, since {place} cannot be written to: choose another output folder"
        )


def announcer(quiet: bool | None) -> Any:
    """What says on stderr which stage has begun; None if nothing is to be said."""
    if quiet or (quiet is None and not sys.stderr.isatty()):
        return None

    def announce(name: str, doing: str) -> None:
        print(f"{name}: {doing}" if doing else name, file=sys.stderr, flush=True)

    return announce


def traced_tokens(graph: Graph) -> int | None:
    """Tokens of the traced forward pass (batch x length of ``input_ids``); None for a model without them."""
    for sizes, _dtype, _storage, role, name in graph.tape.tensors:
        if role == "input" and name in ("input_ids", "decoder_input_ids") and len(sizes) == 2:
            return int(sizes[0] * sizes[1])
    return None


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once; of a quantised one those of what it is made of."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(_bytes_of(t) for t in tensors.values())


def _bytes_of(tensor: torch.Tensor) -> int:
    if is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "full_tensor"):  # torchao's; no DTensor
        return sum(_bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
