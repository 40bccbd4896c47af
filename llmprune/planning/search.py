"""Search: swap parameters between axes, at an equal number of them, as long as the predictions come nearer.

From a plan of another allocation, each step draws two axes, takes some more indices of the one and puts as many
parameters back into the other, and keeps the change if the divergence from the original's predictions, after repair,
is smaller (:class:`llmprune.planning.divergence.Divergence`). Steps are drawn from (seed, number of the step), so a
search is a function of its seed and of how many steps it got; ``seconds`` bounds them. After every step the state goes
to a file, if one is named, whole or not at all; a search that was killed goes on from there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from tqdm import tqdm

from llmprune.checkpoints.atomic import write_file
from llmprune.errors import InputError, PlanError
from llmprune.planning.allocation import Candidate
from llmprune.planning.divergence import Divergence
from llmprune.planning.plan import Plan
from llmprune.planning.plan import plan as make_plan
from llmprune.planning.selection import candidates_of, check_scores
from llmprune.scoring.calibration import Batch
from llmprune.scoring.scores import Scores
from llmprune.scoring.streaming import undisturbed

if TYPE_CHECKING:
    from llmprune.tracing.graph import Graph

SECONDS = 60.0
"""How long a search goes on unless asked otherwise."""
_LARGEST = 0.2
"""The largest share of an axis that a step moves."""
_FORMAT = "llmprune.search/1"


def search(
    model: nn.Module,
    graph: Graph,
    scores: Scores,
    plan: Plan,
    batch: Batch,
    *,
    seconds: float = SECONDS,
    steps: int | None = None,
    repair: bool = True,
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    quiet: bool | None = None,
) -> Plan:
    """A plan of as many parameters as ``plan``, within one group's size, and nearer predictions.

    Args:
        model: the traced model, left as it was.
        graph: its graph.
        scores: what ranks the indices of each axis.
        plan: where to begin: made of ``scores`` by :func:`llmprune.plan`, without layers or parts of them.
        batch: calibration samples.
        seconds: how long to go on, including what an earlier run of the same state file took.
        steps: the most steps; None: as many as there is time for.
        repair: whether the divergence is taken after repair.
        seed: of the steps.
        state: file to write after each step and to go on from.
        quiet: show no progress bar; None shows one on a terminal only.

    Raises:
        InputError: layers in the plan, or a state file of another search.
        PlanError: as :func:`llmprune.plan`.
    """
    if plan.layers or plan.sublayers:
        raise InputError("a search moves axes inside layers: choose uniform or global where layers go")
    checked = check_scores(graph, scores)
    found = candidates_of(graph, checked, plan.options)
    work = _Search(graph, found, plan, seed)
    path = None if state is None else Path(state)
    key = {
        "format": _FORMAT,
        "fingerprint": plan.fingerprint,
        "calibration": batch.hash,
        "seed": seed,
        "repair": repair,
        "start": {str(axis): int(gone.shape[-1]) for axis, gone in plan.removed.items()},
    }
    saved = _load(path, key)
    begun = time.monotonic()
    with undisturbed(model):
        cost = Divergence(model, batch, repair)
        if saved is None:
            counts, best, number, spent = dict(work.start), cost(plan), 0, 0.0
        else:
            counts = {int(axis): int(n) for axis, n in saved["counts"].items()}
            best, number, spent = float(saved["divergence"]), int(saved["steps"]), float(saved["seconds"])
        first = best
        with tqdm(total=seconds, desc="searching allocations", unit="s", disable=quiet) as bar:
            bar.update(min(spent, seconds))
            while spent + time.monotonic() - begun < seconds and (steps is None or number < steps):
                proposal = work.propose(counts, number)
                number += 1
                if proposal is not None:
                    try:
                        found_cost = cost(make_plan(graph, removed=work.removed(proposal)))
                    except PlanError:
                        found_cost = float("inf")  # it does not close over its ties
                    if found_cost < best:
                        counts, best = proposal, found_cost
                now = spent + time.monotonic() - begun
                if path is not None:
                    content = {**key, "counts": counts, "divergence": best, "steps": number, "seconds": now}
                    write_file(path, json.dumps(content).encode())
                bar.set_postfix_str(f"divergence {best:.4f} of {first:.4f}", refresh=False)
                bar.update(max(0.0, min(now, seconds) - bar.n))
    result = plan if counts == work.start else make_plan(graph, scores, removed=work.removed(counts))
    result.options = {
        **plan.options,
        "allocation": "search",
        "search": {"steps": number, "divergence": {"before": first, "after": best}, "seed": seed},
    }
    return result


def _load(path: Path | None, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of the same search; None where there is none yet.

    Raises:
        InputError: the file is something else, or of another search.
    """
    if path is None or not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no state of a search: {error}") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise InputError(f"{path} is no state of a search: give another file")
    different = [name for name, value in key.items() if data.get(name) != value]
    if different:
        raise InputError(
            f"{path} is the state of another search (its {', '.join(different)} differ): remove it or give another"
        )
    return data


class _Search:
    """Proposes changes of counts that keep the number of parameters.

    Args:
        graph: counts parameters.
        found: the axes that may give.
        plan: where the search begins.
        seed: of the proposals.
    """

    def __init__(self, graph: Graph, found: Sequence[Candidate], plan: Plan, seed: int) -> None:
        self._graph, self._seed = graph, seed
        self._by = {c.axis: c for c in found}
        self._steps = {c.axis: [0, *c.removals().tolist()] for c in found}
        self.start = {c.axis: int(plan.removed[c.axis].shape[-1]) for c in found if c.axis in plan.removed}
        self._extra = {axis: gone for axis, gone in plan.removed.items() if axis not in self._by}
        whole = graph.numel({})
        self._costs = {c.axis: max(1, whole - graph.numel({c.axis: 1})) for c in found}
        self._finest = min(self._costs[c.axis] * c.multiple for c in found)
        self._target = graph.numel(self.start)

    def removed(self, counts: Mapping[int, int]) -> dict[int, Any]:
        """Axis id -> the indices of the lowest scores."""
        chosen = {axis: self._by[axis].choose(count) for axis, count in counts.items() if count}
        return {**self._extra, **chosen}

    def propose(self, counts: Mapping[int, int], number: int) -> dict[int, int] | None:
        """Counts after one swap, of at most the parameters of the start and less than a group fewer; None: no luck."""
        rng = np.random.default_rng((self._seed, number))
        axes = sorted(self._by)
        if len(axes) < 2:
            return None
        more, less = (axes[i] for i in rng.choice(len(axes), 2, replace=False).tolist())
        size = self._by[more].size
        by = int(rng.integers(1, max(2, int(size * _LARGEST) + 1)))
        here = counts.get(more, 0)
        gone = [n for n in self._steps[more] if n > here]
        if not gone or not counts.get(less):
            return None
        taken = gone[min(len(gone) - 1, int(np.searchsorted(gone, here + by)))]
        proposal = {**counts, more: taken}
        # The fewest of the other axis that leave no more parameters than the start.
        back = [n for n in self._steps[less] if n < counts[less]]
        while back and self._graph.numel({**proposal, less: back[0]}) > self._target:
            back.pop(0)
        if not back:
            return None
        proposal[less] = back[0]
        left = self._graph.numel(proposal)
        if left <= self._target - max(self._finest, self._costs[less] * self._by[less].multiple):
            return None
        return {axis: n for axis, n in proposal.items() if n}
