"""Pruning without the model in memory: scored block by block, cut from file to file, compared block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llmprune.checkpoints.atomic import published
from llmprune.compaction.masked_ops import KeptPositions, kept_positions
from llmprune.compaction.verify import (
    TOLERANCE,
    Verification,
    compared_outputs,
    evaluating,
    masked_values,
    narrowest,
    outputs_of,
)
from llmprune.errors import VerificationError
from llmprune.out_of_core.apply import apply
from llmprune.out_of_core.block_forward import Change, by_blocks
from llmprune.out_of_core.stored import open_model, state_beside
from llmprune.pipeline.prune import Report, Size, announcer, check_options, model_bytes, traced_tokens
from llmprune.pipeline.stages import Stages
from llmprune.planning.plan import Plan
from llmprune.planning.plan import plan as make_plan
from llmprune.scoring.score import check_scoring, score
from llmprune.tracing.inputs import example_inputs
from llmprune.tracing.scope import resolve
from llmprune.tracing.trace import trace


def prune_streamed(
    model: Any,
    directory: str | Path,
    output: str | Path,
    ratio: float | Mapping[str, float],
    calibration: Any = None,
    importance: str = "element1",
    aggregation: str = "sum",
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    form: str = "auto",
    seed: int = 0,
    scope: str | None = None,
    kinds: Sequence[str] = ("head", "ffn"),
    memory_budget: int | str | None = None,
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
        importance: As there; one that reads gradients or weights.
        aggregation: As there.
        tokenizer: For calibration texts.
        overwrite: Whether ``output`` may be replaced.
        form: Of the checkpoint.
        seed: Of the importance ``random``.
        scope: Only what lies under this module may give.
        kinds: Kinds of axes that may give.
        memory_budget: As for :func:`llmprune.score`.
        verify: Whether to compare with the masked reference, block by block, before the folder gets its name.
        quiet: Show no progress.
        stages: A stage clock to add to.
        choice: Further arguments of :func:`llmprune.planning.plan.plan`.

    Raises:
        InputError: An argument outside its domain.
        VerificationError: The pruned folder computes something else than the masked reference; nothing was written.
        LlmpruneError: What the single steps raise.
    """
    check_options(output=output, overwrite=overwrite, form=form)
    wanted = tuple(ratio) if isinstance(ratio, Mapping) else tuple(kinds)
    check_scoring(importance, aggregation, calibration, wanted)
    clock = Stages(announcer(quiet)) if stages is None else stages
    target = Path(output)
    with clock.stage("trace", "recording one forward pass"):
        graph = trace(model)
        scope = resolve(graph.parameters, scope) if scope else None
    with clock.stage("score", f"scoring coupled groups by {importance}, block by block"):
        scores = score(
            model,
            graph,
            calibration,
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
    verification = None
    with published(target, overwrite) as folder:
        inner = folder / target.name
        with clock.stage("apply", f"cutting {directory} from file to file"):
            saved = apply(plan, directory, inner, form=form, quiet=quiet)
        twin = open_model(inner)
        after = sum(p.numel() for p in twin.parameters()), model_bytes(twin)
        if verify:
            with clock.stage("verify", "comparing with the masked reference, block by block"):
                verification = verify_by_blocks(model, plan, twin)
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
        notes=[*graph.tape.notes, "weights stayed in their files; nothing was repaired"],
        unknown_operations=graph.unknown_operations,
        target=plan.options.get("target"),
        output=str(output),
        form=saved.form,
        reason=saved.reason,
    )


def verify_by_blocks(model: Any, plan: Plan, pruned: Any) -> Verification:
    """Compare a pruned checkpoint with the masked reference; of both one block is in memory at a time.

    It is the comparison of :func:`llmprune.verify`, in the dtype of the files, on one batch: neither model is ever
    whole, so that neither can be widened.

    Args:
        model: The original, as :func:`llmprune.open_model` makes it.
        plan: The plan.
        pruned: What came out, opened likewise.

    Raises:
        VerificationError: An output differs by more than the tolerance.
    """
    batch = example_inputs(model)
    samples = next(iter(batch.values())).shape[0]

    def mask(name: str, values: torch.Tensor) -> None:
        for view, index in masked_values(values, plan.kept.get(name, {})):
            view[index] = 0

    reference, mode = _outputs(model, batch, samples, plan.marked, mask, set(plan.kept))
    if mode.missing:
        raise VerificationError(
            f"{mode.missing[0].name}, which normalises over a removed axis, did not run: the plan must not be applied"
        )
    got, _ = _outputs(pruned, batch, samples)
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


def _outputs(
    model: Any,
    batch: Mapping[str, Any],
    samples: int,
    marked: Sequence[Any] = (),
    change: Change | None = None,
    whole: set[str] | None = None,
) -> tuple[dict[str, torch.Tensor], KeptPositions]:
    """Outputs of one pass, and what restricted its operations."""
    with (
        evaluating(model),
        by_blocks(model, lambda: outputs_of(model, batch), samples, change, whole),
        kept_positions(marked) as mode,
    ):
        return outputs_of(model, batch), mode
