"""How far a pruned model's predictions are from the original's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmprune.compaction.compact import compacted_copy
from llmprune.repair.repair import repair
from llmprune.scoring.calibration import Batch
from llmprune.scoring.loss import logits_of

_TOKENS = 1024
"""Tokens of a forward pass."""


class Divergence:
    """Mean over the calibration tokens of KL(original's prediction || pruned model's), in nats.

    Args:
        model: the original, lent out without gradients; its log-probabilities of all tokens are held.
        batch: calibration samples.
        repaired: whether the pruned model's consumers are repaired first, by least squares in one shot.

    Raises:
        InputError: the model has no logits.
    """

    def __init__(self, model: nn.Module, batch: Batch, repaired: bool) -> None:
        self._model, self._batch, self._repaired = model, batch, repaired and batch.samples > 1
        step = max(1, _TOKENS * batch.samples // max(1, batch.tokens))
        self._parts = [batch.take(i, min(i + step, batch.samples)) for i in range(0, batch.samples, step)]
        with torch.no_grad():
            self._original = [logits_of(model, part.inputs).float().log_softmax(-1) for part in self._parts]

    def __call__(self, plan: Any) -> float:
        """What a plan costs; the model is left as it is."""
        weights = None
        if self._repaired:
            weights = repair(self._model, plan, self._batch, order="one-shot", judged=False).weights
        small = compacted_copy(self._model, plan, weights).eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for part, original in zip(self._parts, self._original, strict=True):
                pruned = logits_of(small, part.inputs).float().log_softmax(-1)
                total += float((original.exp() * (original - pruned)).sum(dtype=torch.float64))
                count += original[..., 0].numel()
        return total / count
