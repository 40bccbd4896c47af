"""Iterative pruning: choose in rounds, each on scores of what the rounds before have left.

Nothing is cut between the rounds. What is gone so far is zero in the model, and its consumers hold their repaired
weights, while it is scored again, with gradients, their squares and Gram matrices fresh; so the indices stay those of
the original, and the last plan is one plan of the original model, verified, repaired and compacted like any other. With
one round this is the ordinary choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from llmprune.arguments import is_whole
from llmprune.compaction.verify import holding, masked
from llmprune.errors import InputError
from llmprune.scoring.scores import Scores

if TYPE_CHECKING:
    from llmprune.planning.plan import Plan

SCHEDULES = ("linear", "cubic")
"""How the share that is gone grows: ``i / n`` after round i of n, or ``1 - (1 - i / n)^3`` (Zhu & Gupta 2017)."""

Ratio = float | dict[str, float]


def check_rounds(rounds: int, schedule: str) -> None:
    """Refuse what :func:`shares` cannot make anything of.

    Raises:
        InputError: no rounds, or an unknown schedule.
    """
    if not is_whole(rounds, 1):
        raise InputError(f"rounds must be an integer of at least 1, not {rounds!r}")
    if schedule not in SCHEDULES:
        raise InputError(f"unknown schedule {schedule!r}: there are {' and '.join(SCHEDULES)}")


def shares(rounds: int, schedule: str) -> list[float]:
    """The share of what is to go in the end that is gone after each round; the last is 1."""
    check_rounds(rounds, schedule)
    done = [(i + 1) / rounds for i in range(rounds)]
    return done if schedule == "linear" else [1 - (1 - share) ** 3 for share in done]


def part_of(ratio: float | Mapping[str, float], share: float) -> Ratio:
    """A share of a ratio."""
    if isinstance(ratio, Mapping):
        return {kind: value * share for kind, value in ratio.items()}
    return ratio * share


def chosen(
    model: nn.Module,
    ratio: float | Mapping[str, float] | None,
    done: list[float],
    scores: Scores,
    score: Callable[[], Scores],
    plan: Callable[[Scores, Ratio | None], Plan],
    repair: Callable[[Plan], Mapping[str, torch.Tensor]],
) -> tuple[Scores, Plan]:
    """Choose in rounds.

    Args:
        model: the model, left as it was.
        ratio: what is to go in the end; None where another target says so.
        done: :func:`shares`.
        scores: of the model as it is.
        score: scores the model as it is then.
        plan: a plan for a ratio, or for the target itself with None.
        repair: new weights under a plan, of the whole model.

    Returns:
        The last round's scores and plan.
    """
    whole = ratio
    for share in done[:-1]:
        if whole is None:
            whole = plan(scores, None).ratio  # about what the target comes to
        now = plan(scores, part_of(whole, share))
        weights = repair(now)
        with _without(model, now, weights):
            scores = settled(score(), now)
    return scores, plan(scores, None)


@contextmanager
def _without(model: nn.Module, plan: Plan, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    with holding(model, plan.kept, weights), masked(model, plan):
        yield


def settled(scores: Scores, plan: Plan) -> Scores:
    """Scores under which what a plan removes goes first: its scores are 0, and all others above."""

    def lowered(values: np.ndarray, gone: np.ndarray) -> np.ndarray:
        out: np.ndarray = np.maximum(values, np.nextafter(max(0.0, float(values.max())) * 1e-300, 1.0))
        np.put_along_axis(out, gone, 0.0, axis=-1)
        return out

    values, nested = dict(scores.items()), dict(scores.nested)
    for axis, gone in plan.removed.items():
        if gone.ndim == 1 and axis in values:
            values[axis] = lowered(values[axis], gone)
            if axis in nested:
                nested[axis] = lowered(nested[axis], np.broadcast_to(gone, (len(nested[axis]), len(gone))))
        elif axis in nested:
            nested[axis] = lowered(nested[axis], gone)
    return Scores(
        values,
        importance=scores.importance,
        aggregation=scores.aggregation,
        seed=scores.seed,
        calibration_hash=scores.calibration_hash,
        fingerprint=scores.fingerprint,
        kinds=scores.kinds,
        nested=nested,
        pinned=scores.pinned,
        comparable=scores.comparable,
    )
