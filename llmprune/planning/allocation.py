"""Allocation: how many indices each axis gives up for a share of the model's parameters.

Both allocations are one procedure. Every axis gives up its indices in steps, lowest scores first (a step is one index,
or as many as ``round_to`` demands). Each step has a key, rising within its axis:

- ``uniform``: the share of the axis that is gone half way through the step, so every axis loses the common share,
  rounded to its nearest step. Layers with equal sizes lose equal counts, but for one step of the finest kind.
- ``global``: the mean score per freed parameter of the step's indices, divided by the mean of that density over all
  axes of the same kind. The first division makes a head and a channel comparable as what they are, cost for benefit
  (Ma et al. 2023 rank within a kind only); the second makes the kinds comparable whatever the aggregation's scale is,
  and is left out where scores are in units of the loss (``obs``).

The merged sequence of steps is followed as far as the budget allows (found by bisection, since cost is monotone but not
additive: q and o share their heads with k and v), and what is left of the budget is filled by the next steps that fit.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llmprune import _core
from llmprune.errors import PlanError
from llmprune.planning.closure import close
from llmprune.tracing.equations import System

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Layer = tuple[str, int]

ALLOCATIONS = ("auto", "uniform", "global", "sensitivity", "search")
"""``auto`` is ``global`` of scores in units of the loss, and ``uniform`` of others. ``sensitivity`` is ``global`` of
measured scores (:mod:`llmprune.planning.sensitivity`), and ``search`` goes on from ``auto``
(:mod:`llmprune.planning.search`)."""


def rank(scores: Array) -> Indices:
    """Indices by ascending score; equal scores by index."""
    order = np.empty(len(scores), dtype=np.int64)
    _core.rank(np.ascontiguousarray(scores, dtype=np.float64), order)
    return order


def rank_rows(scores: Array) -> Indices:
    """For each row the indices by ascending score; equal scores by their column's sum, then by index.

    An expert that saw no token has no score of its own, and loses what the others can spare.
    """
    return np.stack([np.lexsort((scores.sum(0), row)) for row in scores])


def stacks(names: Sequence[str]) -> dict[str, int]:
    """Prefix -> number of layers, for every module path whose children are numbered 0, 1, ... without a gap."""
    children: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdecimal():
                children.setdefault(".".join(parts[:i]), set()).add(int(part))
    return {prefix: len(found) for prefix, found in children.items() if max(found) == len(found) - 1}


def layer_of(names: Iterable[str], known: Mapping[str, int]) -> Layer | None:
    """The layer all parameters lie in, as (stack prefix, number); None where they span layers or lie outside."""
    found = {_layer(name, known) for name in names}
    return found.pop() if len(found) == 1 else None


def _layer(name: str, known: Mapping[str, int]) -> Layer | None:
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and (prefix := ".".join(parts[:i])) in known:
            return prefix, int(part)
    return None


def protected(layer: Layer | None, known: Mapping[str, int], first: int | None, last: int | None) -> bool:
    """Whether a layer is left whole.

    ``None`` scales the paper's choice, the first 4 and the last 2 of 32 layers (Ma et al. 2023, section 4.1), to the
    depth of the stack, rounded to the nearest number of layers.
    """
    if layer is None:
        return False
    prefix, number = layer
    depth = known[prefix]
    head = (4 * depth + 16) // 32 if first is None else first
    tail = (2 * depth + 16) // 32 if last is None else last
    return number < head or number >= depth - tail


@dataclass(frozen=True, eq=False)
class Candidate:
    """An axis that may give up indices.

    Attributes:
        axis: its id.
        kind: its kind.
        size: its size.
        scores: float64 (size,), lower goes first.
        multiple: the number of kept indices must be a multiple of this.
        nested: float64 (outer size, size) for an axis that gives up a different choice for every index of the axis
            around it, as many each; ``scores`` are then the sums of the lowest, second lowest, ... of every row.
        least: how many indices have to stay.
    """

    axis: int
    kind: str
    size: int
    scores: Array
    multiple: int = 1
    nested: Array | None = None
    least: int = 1

    @cached_property
    def order(self) -> Indices:
        """The indices by ascending score, ties by index."""
        return rank(self.scores)

    def choose(self, count: int) -> Indices:
        """The ``count`` indices of the lowest scores, sorted; a row of them for each outer index if nested."""
        if self.nested is None:
            return np.sort(self.order[:count])
        return np.stack([np.sort(row[:count]) for row in rank_rows(self.nested)])

    def removals(self) -> Indices:
        """Removed counts after each step, ascending; empty where not even one step is possible."""
        kept = np.arange(self.size // self.multiple, 0, -1, dtype=np.int64) * self.multiple
        return self.size - kept[(kept < self.size) & (kept >= self.least)]

    def share(self, share: float) -> int:
        """The largest allowed removed count not above ``share`` of the axis."""
        removals = self.removals()
        # A product such as 0.29 * 100 = 28.999999999999996 means 29.
        steps = int(np.searchsorted(removals, share * self.size + 1e-9, side="right"))
        return int(removals[steps - 1]) if steps else 0


class CountedGraph(Protocol):
    """The part of :class:`llmprune.tracing.graph.Graph` that counts parameters."""

    def numel(self, removed: Mapping[int, int]) -> int:
        """Parameters left after the removal."""


@dataclass
class Budget:
    """Fits removal steps into a number of parameters.

    Args:
        graph: counts parameters.
        system: closes removals over ties.
        candidates: the axes that may give, each once.
        allocation: ``uniform`` or ``global``.
        comparable: whether the scores of all kinds are in one unit.
    """

    graph: CountedGraph
    system: System
    candidates: Sequence[Candidate]
    allocation: str
    comparable: bool = False

    def __post_init__(self) -> None:
        self.total = self.graph.numel({})
        self._removals = [c.removals() for c in self.candidates]
        self._means = [self._step_means(c, r) for c, r in zip(self.candidates, self._removals, strict=True)]
        self._normalise()
        if self.allocation == "uniform":
            self._keys = [
                (r + np.concatenate([[0], r[:-1]])) / (2 * c.size) if len(r) else np.empty(0)
                for c, r in zip(self.candidates, self._removals, strict=True)
            ]
        else:
            self._keys = self._means
        self._tied = False

    @staticmethod
    def _step_means(candidate: Candidate, removals: Indices) -> Array:
        """Mean score of the indices that go with each step."""
        ordered = candidate.scores[candidate.order]
        sums = np.concatenate([[0.0], np.cumsum(ordered)])[np.concatenate([[0], removals])]
        means = np.diff(sums) / np.diff(np.concatenate([[0], removals]))
        return np.maximum.accumulate(means) if len(means) else means

    def _normalise(self) -> None:
        """Divide by the parameters one index frees, and by the mean of that over a kind with a unit of its own."""
        self._costs = [max(1, self.total - self.graph.numel({c.axis: 1})) for c in self.candidates]
        density = [1.0 / cost for cost in self._costs]
        for kind in {c.kind for c in self.candidates}:
            chosen = [i for i, c in enumerate(self.candidates) if c.kind == kind]
            weight = sum(float(self.candidates[i].scores.sum()) * density[i] for i in chosen)
            mean = 1.0 if self.comparable else weight / sum(self.candidates[i].size for i in chosen)
            for i in chosen:
                self._means[i] = self._means[i] * (density[i] / mean if mean > 0 else 0.0)

    def solve(self, target: int) -> dict[int, int]:
        """Axis id -> removed count, freeing ``target`` parameters to within one step.

        Raises:
            PlanError: the demand is out of reach; the text names the largest reachable ratio.
        """
        steps = self._solve(target)
        counts = self._counts(steps)
        if close(self.system, counts)[0] != counts:
            # Ties make steps dearer than they look: count what they drag along from the start.
            self._tied = True
            counts = self._counts(self._solve(target))
        return counts

    def _solve(self, target: int) -> Indices:
        steps = self._follow(target)
        freed = self._freed(steps)
        if freed is None:
            raise PlanError("no removal of the chosen kinds closes over its ties: leave the tied kinds out")
        everything = range(len(self.candidates))
        if self.allocation == "uniform":
            freed = self._fill_rounds(steps, freed, target)
            least = [cost * c.multiple for cost, c in zip(self._costs, self.candidates, strict=True)]
            finest = self.candidates[int(np.argmin(least))].kind
            self._fill(steps, freed, target, [i for i in everything if self.candidates[i].kind == finest])
            freed = self._freed(steps) or 0
        if freed < target:
            self._land(steps, target, self._fill(steps, freed, target, everything))
        return steps

    def _follow(self, target: int) -> Indices:
        """The longest part of the merged sequence that fits; uniform: in whole rounds of equal shares."""
        offsets = np.concatenate([[0], np.cumsum([len(k) for k in self._keys])]).astype(np.int64)
        sequence = np.empty(offsets[-1], dtype=np.int64)
        _core.merge(np.concatenate([np.empty(0), *self._keys]), offsets, sequence)

        def taken(length: int) -> Indices:
            return np.bincount(sequence[:length], minlength=len(self.candidates)).astype(np.int64)

        low, high = 0, len(sequence)
        while low < high:
            middle = (low + high + 1) // 2
            freed = self._freed(taken(middle))
            if freed is not None and freed <= target:
                low = middle
            else:
                high = middle - 1
        if low == len(sequence) or self.allocation != "uniform":
            return taken(low)
        axis = int(sequence[low])
        key = self._keys[axis][int(taken(low)[axis])]
        return np.array([np.searchsorted(keys, key, side="left") for keys in self._keys], dtype=np.int64)

    def _fill_rounds(self, steps: Indices, freed: int, target: int) -> int:
        """Take rounds (the next step of all axes of a kind that have the same key) as long as any fits.

        ``steps`` changes in place. Returns the parameters freed.
        """
        queue: list[tuple[float, str, int]] = []

        def push(i: int) -> None:
            if steps[i] < len(self._keys[i]):
                heapq.heappush(queue, (float(self._keys[i][steps[i]]), self.candidates[i].kind, i))

        for i in range(len(self.candidates)):
            push(i)
        while queue:
            key, kind, first = heapq.heappop(queue)
            members = [first]
            while queue and queue[0][:2] == (key, kind):
                members.append(heapq.heappop(queue)[2])
            steps[members] += 1
            now = self._freed(steps)
            if now is not None and now <= target:
                freed = now
                for i in members:
                    push(i)
            else:
                steps[members] -= 1
        return freed

    def _fill(self, steps: Indices, freed: int, target: int, among: Sequence[int]) -> list[tuple[int, int]]:
        """Take single steps in order of key and score, skipping those that do not fit, until none does.

        ``steps`` changes in place. Returns what did not fit: (cost, candidate), each once.
        """
        queue: list[tuple[float, float, int]] = []
        blocked = []
        for i in among:
            self._push(queue, steps, i)
        while queue:
            i = heapq.heappop(queue)[2]
            steps[i] += 1
            now = self._freed(steps)
            if now is not None and now <= target:
                freed = now
                self._push(queue, steps, i)
            else:
                steps[i] -= 1
                if now is not None:
                    blocked.append((now - freed, i))
        return blocked

    def _land(self, steps: Indices, target: int, blocked: Sequence[tuple[int, int]]) -> None:
        """Overshoot by the cheapest step if that lands nearer, or if the plan would be empty without it."""
        freed = self._freed(steps) or 0
        if not blocked:
            self._refuse(steps, freed, target)
            return
        _, i = min(blocked)
        steps[i] += 1
        now = self._freed(steps)
        if now is None or (now - target >= target - freed and steps.sum() > 1):
            steps[i] -= 1

    def _push(self, queue: list[tuple[float, float, int]], steps: Indices, i: int) -> None:
        step = int(steps[i])
        if step < len(self._keys[i]):
            heapq.heappush(queue, (float(self._keys[i][step]), float(self._means[i][step]), i))

    def _refuse(self, steps: Indices, freed: int, target: int) -> None:
        """Raise unless the shortfall, with nothing left to take, is less than the last group taken."""
        last = []
        for i in np.flatnonzero(steps):
            steps[i] -= 1
            before = self._freed(steps)
            steps[i] += 1
            if before is not None:
                last.append(freed - before)
        if not last or target - freed >= min(last):
            raise PlanError(
                f"ratio {target / self.total:.4g} cannot be reached by what may be pruned here: the largest "
                f"reachable ratio is {freed / self.total:.4f}; prune more kinds, protect fewer layers, widen the scope "
                f"or round to a smaller multiple"
            )

    def _counts(self, steps: Indices) -> dict[int, int]:
        return {
            c.axis: int(r[step - 1])
            for c, r, step in zip(self.candidates, self._removals, steps, strict=True)
            if step
        }

    def _freed(self, steps: Indices) -> int | None:
        """Parameters freed by the first ``steps[i]`` steps of each axis; None if that cannot close over its ties."""
        counts = self._counts(steps)
        if self._tied:
            try:
                counts = close(self.system, counts)[0]
            except PlanError:
                return None
        return self.total - self.graph.numel(counts)
