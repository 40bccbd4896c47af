"""The masked reference of a model whose weights stay in their files, one block of it in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from llmprune.compaction.masked_ops import KeptPositions, kept_positions
from llmprune.compaction.verify import evaluating, masked_values
from llmprune.out_of_core.block_forward import Change, by_blocks
from llmprune.out_of_core.block_taps import SKETCH_TOKENS
from llmprune.scoring.calibration import Batch
from llmprune.scoring.loss import SampleLosses, logits_of

T = TypeVar("T")
_TOKENS = 1024
"""Tokens of a forward pass."""


def masking(kept: Mapping[str, Mapping[int, Any]], weights: Mapping[str, torch.Tensor]) -> Change:
    """What makes a parameter the masked reference's as it comes into memory.

    Zeros where the plan removes, and the new values of repaired ones where it does not.
    """

    def change(name: str, values: torch.Tensor) -> None:
        if name in weights:
            new = weights[name].to(values.dtype)
            places = [
                torch.as_tensor(kept.get(name, {}).get(dim, range(size)))
                for dim, size in enumerate(values.shape)
            ]
            values.zero_()
            values[torch.meshgrid(*places, indexing="ij")] = new
            return
        for view, index in masked_values(values, kept.get(name, {})):
            view[index] = 0

    return change


def on_masked(
    model: Any,
    plan: Any,
    weights: Mapping[str, torch.Tensor],
    sketch: Callable[[], Any],
    samples: int,
    run: Callable[[], T],
) -> tuple[T, KeptPositions]:
    """What ``run`` gives where ``model`` is the masked reference, and what restricted its operations.

    Args:
        model: As :func:`llmprune.open_model` makes it.
        plan: What is masked.
        weights: New values of repaired parameters, in their shapes after compaction.
        sketch: Runs the model on ``samples`` samples, by which its blocks are found.
        samples: How many.
        run: Runs it.
    """
    whole = set(plan.kept) | set(weights)
    with (
        evaluating(model),
        by_blocks(model, sketch, samples, masking(plan.kept, weights), whole),
        kept_positions(plan.marked) as mode,
    ):
        return run(), mode


def judge_by_blocks(
    model: Any, plan: Any, repaired: Mapping[str, torch.Tensor], batch: Batch
) -> tuple[float, float] | None:
    """The masked reference's mean loss without the repaired weights and with them."""
    sketch = batch.sketch(SKETCH_TOKENS)
    losses = SampleLosses(model, None, batch)
    step = max(1, _TOKENS * batch.samples // batch.tokens)

    def mean() -> float:
        losses.find_shift(sketch)
        parts = (batch.take(i, min(i + step, batch.samples)) for i in range(0, batch.samples, step))
        return sum(float(losses(part).double().sum()) for part in parts) / batch.samples

    before, after = (
        on_masked(model, plan, weights, lambda: logits_of(model, sketch.inputs), sketch.samples, mean)[0]
        for weights in ({}, repaired)
    )
    return before, after
