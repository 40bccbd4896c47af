"""Pruning without the model in memory: scored block by block, cut from file to file, compared block by block."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmprune.checkpoints.atomic import published
from llmprune.compaction.verify import (
    TOLERANCE,
    Verification,
    compared_outputs,
    evaluating,
    narrowest,
    outputs_of,
)
from llmprune.errors import InputError, VerificationError
from llmprune.machine.budget import parse_bytes
from llmprune.out_of_core.apply import apply
from llmprune.out_of_core.block_forward import by_blocks
from llmprune.out_of_core.masked import on_masked
from llmprune.out_of_core.spill import Spill
from llmprune.out_of_core.stored import open_model, state_beside
from llmprune.pipeline.prune import Report, Size, announcer, check_options, model_bytes, traced_tokens
from llmprune.pipeline.stages import Stages
from llmprune.planning.plan import Plan
from llmprune.planning.plan import plan as make_plan
from llmprune.repair.repair import repair as repair_plan
from llmprune.scoring.importance import lookup
from llmprune.scoring.sampling import AUTO, best_importance, calibration_for, long_calibration
from llmprune.scoring.score import check_scoring, score
from llmprune.tracing.graph import Graph
from llmprune.tracing.inputs import example_inputs
from llmprune.tracing.scope import resolve
from llmprune.tracing.trace import trace


def prune_streamed(
    model: Any,
    directory: str | Path,
    output: str | Path,
    ratio: float | Mapping[str, float],
    calibration: Any = None,
    importance: str = "auto",
    aggregation: str = "sum",
    *,
    tokenizer: Any = None,
    samples: int | None = None,
    length: int | None = None,
    overwrite: bool = False,
    form: str = "auto",
    seed: int = 0,
    scope: str | None = None,
    kinds: Sequence[str] = ("head", "ffn"),
    memory_budget: int | str | None = None,
    repair: str = "auto",
    repair_calibration: Any = None,
    verify: bool = True,
    quiet: bool | None = None,
    stages: Stages | None = None,
    **choice: Any,
) -> Report:
    """Prune a checkpoint folder into another one, with no more of the model in memory than some of its blocks.

    Args:
        model: What :func:`llmprune.open_model` makes of ``directory``.
        directory: The checkpoint folder.
        output: The folder to write; it must not exist unless ``overwrite``. Its state, from which the same call goes on
            after a crash, lies beside it until it is there.
        ratio: This and what is not described here is as for :func:`llmprune.prune`.
        calibration: As there.
        importance: As there; ``auto`` is ``element1`` where a model has stacks of experts.
        aggregation: As there.
        tokenizer: For calibration texts.
        samples: How many samples of them to score by; as for :func:`llmprune.score`.
        length: Their length in tokens; likewise.
        overwrite: Whether ``output`` may be replaced.
        form: Of the checkpoint.
        seed: Of the importance ``random``.
        scope: Only what lies under this module may give.
        kinds: Kinds of axes that may give.
        memory_budget: As for :func:`llmprune.score`.
        repair: As there; not where each expert loses channels of its own.
        repair_calibration: As there.
        verify: Whether to compare with the masked reference, block by block, before the folder gets its name.
        quiet: Show no progress.
        stages: A stage clock to add to.
        choice: Further arguments of :func:`llmprune.planning.plan.plan`.

    Raises:
        InputError: An argument outside its domain.
        VerificationError: The pruned folder computes something else than the masked reference; nothing was written.
        LlmpruneError: What the single steps raise.
    """
    check_options(repair, repair_calibration, calibration, output, overwrite, form)
    wanted = tuple(ratio) if isinstance(ratio, Mapping) else tuple(kinds)
    asked, importance = importance, best_importance(importance, wanted)
    check_scoring(importance, aggregation, calibration, wanted)
    clock = Stages(announcer(quiet)) if stages is None else stages
    target = Path(output)
    with clock.stage("trace", "recording one forward pass"):
        graph = trace(model)
        scope = resolve(graph.parameters, scope) if scope else None
        if asked == AUTO and not _consumed(graph, wanted):
            importance = "element1"
    batch = data = None
    if calibration is not None:
        batch = calibration_for(importance, model, calibration, tokenizer, samples, length)
    if repair != "none" and (calibration is not None or repair_calibration is not None):
        text = calibration if repair_calibration is None else repair_calibration
        same = repair_calibration is None and lookup(importance).sort == "inputs"
        data = batch if same else long_calibration(model, text, tokenizer)
    with clock.stage("score", f"scoring coupled groups by {importance}, block by block"):
        scores = score(
            model,
            graph,
            batch,
            importance,
            aggregation,
            seed=seed,
            tokenizer=tokenizer,
            quiet=quiet,
            kinds=wanted,
            memory_budget=memory_budget,
            state=state_beside(target),
        )
    with clock.stage("plan", "choosing what to remove"):
        plan = make_plan(graph, scores, ratio, kinds=kinds, scope=scope, seed=seed, **choice)
    stacked = [name for name, dims in plan.kept.items() if any(np.ndim(kept) > 1 for kept in dims.values())]
    if stacked and repair == "ls":
        raise InputError(
            f"the experts of {stacked[0]} lose channels of their own, which are repaired in memory alone: load the "
            "model (--no-stream), or leave the repair out"
        )
    verification = repaired = None
    with published(target, overwrite) as folder:
        inner, spill = folder / target.name, folder / "repaired"
        if data is not None and not stacked:
            with clock.stage("repair", "fitting what stays to what goes, block by block"):
                budget = None if memory_budget is None else parse_bytes(memory_budget)
                repaired = repair_plan(model, plan, data, folder=spill, budget=budget)
        weights = repaired.weights if repaired is not None and isinstance(repaired.weights, Spill) else None
        with clock.stage("apply", f"cutting {directory} from file to file"):
            saved = apply(plan, directory, inner, form=form, quiet=quiet, weights=weights)
        twin = open_model(inner)
        after = sum(p.numel() for p in twin.parameters()), model_bytes(twin)
        if verify:
            with clock.stage("verify", "comparing with the masked reference, block by block"):
                verification = verify_by_blocks(model, plan, twin, {} if weights is None else weights)
        shutil.rmtree(spill, ignore_errors=True)
        for path in inner.iterdir():
            path.rename(folder / path.name)
        inner.rmdir()
    tokens = traced_tokens(graph) or 1
    counts = {axis: gone.shape[-1] for axis, gone in plan.removed.items() if axis < len(graph.axes)}
    return Report(
        model=type(model).__name__,
        before=Size(plan.parameters_before, model_bytes(model), graph.macs({}) // tokens),
        after=Size(*after, graph.macs(counts) // tokens),
        ratio=dict(ratio) if isinstance(ratio, Mapping) else ratio,
        plan=plan,
        verification=verification,
        stages=clock.done,
        importance=importance,
        aggregation=aggregation,
        seed=seed,
        calibration_hash=scores.calibration_hash,
        notes=[*graph.tape.notes, "weights stayed in their files"],
        repair=repaired,
        unknown_operations=graph.unknown_operations,
        target=plan.options.get("target"),
        output=str(output),
        form=saved.form,
        reason=saved.reason,
    )


def _consumed(graph: Graph, kinds: Sequence[str]) -> bool:
    """Whether every axis that may give is read by plain matrices, not by stacks of them."""
    members = (m for a in graph.axes if a.prunable and a.kind in kinds for m in a.members)
    return all(len(graph.parameters[m.parameter]) < 3 for m in members if m.parameter in graph.parameters)


def verify_by_blocks(
    model: Any, plan: Plan, pruned: Any, weights: Mapping[str, torch.Tensor] | None = None
) -> Verification:
    """Compare a pruned checkpoint with the masked reference; of both one block is in memory at a time.

    It is the comparison of :func:`llmprune.verify`, in the dtype of the files, on one batch: neither model is ever
    whole, so that neither can be widened.

    Args:
        model: The original, as :func:`llmprune.open_model` makes it.
        plan: The plan.
        pruned: What came out, opened likewise.
        weights: New values of repaired parameters.

    Raises:
        VerificationError: An output differs by more than the tolerance.
    """
    batch = example_inputs(model)
    samples = next(iter(batch.values())).shape[0]

    def run(one: Any) -> dict[str, torch.Tensor]:
        return outputs_of(one, batch)

    reference, mode = on_masked(
        model, plan, {} if weights is None else weights, lambda: run(model), samples, lambda: run(model)
    )
    if mode.missing:
        raise VerificationError(
            f"{mode.missing[0].name}, which normalises over a removed axis, did not run: the plan must not be applied"
        )
    with evaluating(pruned), by_blocks(pruned, lambda: run(pruned), samples):
        got = run(pruned)
    error, scale, names = compared_outputs(reference, got)
    dtype = narrowest(model)
    tolerance = max(TOLERANCE.get(dtype, 1e-5), TOLERANCE[torch.float32] if plan.rescaled else 0.0)
    relative = error / scale if scale else error
    if not relative <= tolerance:
        raise VerificationError(
            f"the pruned checkpoint differs from its masked reference: relative error {relative:.1e} in {dtype}, "
            f"allowed {tolerance:.0e}: nothing was written"
        )
    return Verification(
        max_error=error,
        relative_error=relative,
        scale=scale,
        tolerance=tolerance,
        dtype=str(dtype).removeprefix("torch."),
        inputs=1,
        masked_ops=mode.done,
        outputs=names,
    )
