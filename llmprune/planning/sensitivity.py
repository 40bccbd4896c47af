"""Sensitivity: what pruning each axis alone costs, measured at a few shares, as scores that compare across layers.

For every axis that may give and a few shares of it, the lowest-scored indices are taken out of a copy, the consumer is
repaired, and the divergence from the original's predictions is measured on the calibration samples
(:class:`llmprune.planning.divergence.Divergence`). Between the measured points the axis' own scores say how the cost
rises: within each segment they are scaled to add up to what was measured there, and behind the last one as in the last.
    The
result is in units of the loss, so that ``plan(..., allocation="sensitivity")`` solves the budget over all layers and
kinds at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import nn
from tqdm import tqdm

from llmprune.errors import InputError
from llmprune.planning.divergence import Divergence
from llmprune.planning.layer_choice import DEPTHS
from llmprune.planning.plan import plan as make_plan
from llmprune.planning.selection import candidates_of, check_scores
from llmprune.scoring.sampling import long_calibration
from llmprune.scoring.scores import Scores
from llmprune.scoring.streaming import undisturbed

if TYPE_CHECKING:
    from llmprune.tracing.graph import Graph

Array = npt.NDArray[np.float64]

SHARES = (0.1, 0.3, 0.6)
"""Shares of an axis that are measured, each rounded to a whole number of indices, at least one."""


def sensitivity(
    model: nn.Module,
    graph: Graph,
    scores: Scores,
    calibration: Any,
    *,
    kinds: Sequence[str] = ("head", "ffn"),
    protect_first: int | None = None,
    protect_last: int | None = None,
    round_to: int = 1,
    scope: str | None = None,
    tp: int = 1,
    repair: bool = True,
    tokenizer: Any = None,
    quiet: bool | None = None,
    shares: Sequence[float] = SHARES,
) -> Scores:
    """Scores like ``scores``, ranked alike in every axis, whose sums are the measured cost of pruning that axis.

    Args:
        model: the traced model, left as it was.
        graph: its graph.
        scores: what ranks the indices of each axis.
        calibration: as for :func:`llmprune.score`; of texts 16 samples of 128 tokens.
        kinds: kinds of axes that may give; whole layers and parts of layers have no sensitivity here.
        protect_first: layers left whole at the start; None: none.
        protect_last: layers left whole at the end; None: none.
        round_to: kept FFN channels are a multiple of this.
        scope: path of the module below which axes may give.
        tp: devices to split each layer over, as for :func:`llmprune.plan`.
        repair: whether consumers are repaired before it is measured.
        tokenizer: for texts.
        quiet: show no progress bar; None shows one on a terminal only.
        shares: the shares to measure, ascending.

    Returns:
        Scores of the axes that may give, with ``comparable`` set and the measured points in ``curves``.

    Raises:
        InputError: kinds without a sensitivity, or a model without logits.
        CalibrationError, PlanError: as :func:`llmprune.score` and :func:`llmprune.plan`.
    """
    if set(kinds) & set(DEPTHS):
        raise InputError(
            "allocation by sensitivity is for axes inside layers: prune whole layers or parts of them in a call of "
            "their own, or choose uniform or global"
        )
    checked = check_scores(graph, scores)
    options = {
        "kinds": tuple(kinds),
        "ratio": None,
        "scope": scope,
        "protect_first": protect_first or 0,
        "protect_last": protect_last or 0,
        "round_to": round_to,
        "tp": tp,
    }
    batch = long_calibration(model, calibration, tokenizer)
    found = candidates_of(graph, checked, options)
    values: dict[int, Array] = {}
    nested: dict[int, Array] = {}
    curves: dict[int, list[tuple[int, float]]] = {}
    with (
        undisturbed(model),
        tqdm(total=len(found) * len(shares), desc="measuring sensitivity", unit="plan", disable=quiet) as bar,
    ):
        cost = Divergence(model, batch, repair)
        for candidate in found:
            steps = candidate.removals()
            wanted = [max(1, round(share * candidate.size)) for share in shares]
            places: Array = (
                np.minimum(np.searchsorted(steps, wanted), len(steps) - 1) if len(steps) else np.empty(0)
            )
            counts = sorted({int(steps[int(place)]) for place in places})
            points = []
            for count in counts:
                removed = {candidate.axis: candidate.choose(count)}
                points.append((count, max(0.0, cost(make_plan(graph, removed=removed)))))
            bar.update(len(shares))
            curves[candidate.axis] = points
            ranked = _measured(candidate.scores, candidate.order, points)
            if candidate.nested is None:
                values[candidate.axis] = ranked
            else:  # what counts is apart for each index around it
                values[candidate.axis] = checked.flat[candidate.axis]
                nested[candidate.axis] = _rows(candidate.nested, ranked)
    return Scores(
        values,
        importance=scores.importance,
        aggregation=scores.aggregation,
        seed=scores.seed,
        calibration_hash=batch.hash,
        fingerprint=scores.fingerprint,
        kinds={axis: scores.kinds[axis] for axis in values},
        nested=nested,
        comparable=True,
        curves=curves,
    )


def _measured(scores: Array, order: npt.NDArray[np.int64], points: Sequence[tuple[int, float]]) -> Array:
    """Scores in the same order, whose sums over the lowest are the measured costs.

    A cost that falls is taken for the one before it; where segments overlap, the higher score holds.
    """
    ordered = scores[order]
    out = np.empty_like(ordered)
    start, reached, factor = 0, 0.0, 1.0
    for count, cost in points:
        total = float(ordered[start:count].sum())
        rise = max(0.0, cost - reached)
        factor = rise / total if total > 0 else 0.0
        out[start:count] = factor
        start, reached = count, max(reached, cost)
    out[start:] = factor
    # The ranking stays what it was: no index is cheaper than one before it.
    scaled = np.maximum.accumulate(ordered * out)
    for place in range(1, len(scaled)):
        scaled[place] = max(scaled[place], np.nextafter(scaled[place - 1], np.inf))
    ranked = np.empty_like(scaled)
    ranked[order] = scaled
    return ranked


def _rows(table: Array, sums: Array) -> Array:
    """Scores of an axis apart for each index around it, so that the sums of their lowest, ... are ``sums``."""
    out = np.empty_like(table)
    for row, scores in enumerate(table):
        order = np.argsort(scores, kind="stable")
        out[row, order] = sums / len(table)
    return out
