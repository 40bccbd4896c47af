"""Closing a removal over ties: what else must go so that every size equation can hold again.

One attribute that sizes two axes ties their sizes: Llama's ``head_dim`` is the width of a value head and twice the
number of rope pairs, so a value channel cannot go alone. The closure is the least fixpoint reached by shrinking every
dimension that is larger than its attribute allows by the fewest indices of one of its axes; where the sizes do not
divide, the removal is rounded up. It works on counts: which indices go is decided by :func:`llmprune.plan.plan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmprune.equations import Leaf, Lower, Shrink, System
from llmprune.errors import PlanError

_ATTEMPTS = 32
_Preference = tuple[bool, int, float, int]


def close(system: System, removed: Mapping[int, int]) -> tuple[dict[int, int], dict[Leaf, int]]:
    """The smallest removal found that contains ``removed`` and leaves every size equation solvable.

    Where a dimension can shrink along one axis only, the closure is the least there is. Where there are several (a
    partly rotary head, a fused projection), two strategies are followed and the one that removes fewer parameters
    wins: the axis that fits best (least overshoot, then in the fewest equations, then the lowest id), or index by
    index the axis that has given the smallest share of itself. A strategy that fails is tried again without the last
    choice it made.

    Args:
        system: the model's size equations.
        removed: axis id -> how many indices go; each less than the axis' size.

    Returns:
        Axis id -> count after closure (only positive counts), and the attributes that change with their new values.

    Raises:
        PlanError: a frozen axis, or one that would lose its last index, is in the way; the text names it.
    """
    start = {axis: count for axis, count in removed.items() if count}
    found: list[_Closure] = []
    error: PlanError | None = None
    for balanced in (False, True):
        banned: set[tuple[Leaf, int]] = set()
        for _ in range(_ATTEMPTS):
            attempt = _Closure(system, dict(start), banned, balanced)
            try:
                attempt.run()
            except PlanError as failure:
                error = error or failure
                if not attempt.choices:
                    break
                banned.add(attempt.choices[-1])
            else:
                found.append(attempt)
                break
        if found and not attempt.choices:  # the other strategy would do the same
            break
    if not found:
        assert error is not None
        raise error
    if len(found) > 1:
        found.sort(key=lambda run: (-system.sources[0].numel(run.counts), sum(run.counts.values())))
    return found[0].counts, found[0].values


@dataclass
class _Closure:
    """One run of the fixpoint.

    Attributes:
        counts: axis id -> removed count, growing.
        banned: (dimension, axis) that must not give.
        balanced: take from axes evenly, index by index, instead of from the one that fits best.
        choices: (dimension, axis) decisions that had an alternative, in order.
        values: the attributes that change, once the run has ended.
    """

    system: System
    counts: dict[int, int]
    banned: set[tuple[Leaf, int]]
    balanced: bool
    choices: list[tuple[Leaf, int]] = field(default_factory=list)
    values: dict[Leaf, int] = field(default_factory=dict)

    def run(self) -> None:
        """Shrink what the equations demand until they can all be met."""
        caps: dict[Leaf, int] = {}
        while True:
            outcome = self.system.solve(self.counts, caps)
            if isinstance(outcome, dict):
                self.values = outcome
                return
            for move in outcome:
                if isinstance(move, Lower):
                    caps[move.leaf] = min(move.bound, caps.get(move.leaf, move.bound))
                else:
                    self._shrink(move)

    def _shrink(self, move: Shrink) -> None:
        """Remove the fewest indices of one axis that bring a dimension down to the bound (or one, if balanced)."""
        if self._size(move) <= move.bound:  # an earlier move did it already
            return
        options: list[tuple[_Preference, int, int]] = []
        for axis in self.system.axes_of(move.leaf):
            if not self.system.axes[axis].prunable or (move.leaf, axis) in self.banned:
                continue
            count = self._count(move, axis)
            if count is not None:
                options.append((self._preference(move, axis, count), axis, count))
        if not options:
            raise PlanError(_in_the_way(self.system, self.counts, move))
        _, axis, count = min(options)
        if len(options) > 1:
            self.choices.append((move.leaf, axis))
        self.counts[axis] = count

    def _preference(self, move: Shrink, axis: int, count: int) -> _Preference:
        """How good a way to shrink it is: the lowest goes."""
        after = self._size(move, axis, count)
        share = self.counts.get(axis, 0) / self.system.axes[axis].size if self.balanced else 0.0
        short = after > move.bound and not self.balanced
        return short, max(0, move.bound - after), share, self.system.degree(axis)

    def _size(self, move: Shrink, axis: int | None = None, count: int = 0) -> int:
        return self.system.size(move.leaf, self.counts if axis is None else {**self.counts, axis: count})

    def _count(self, move: Shrink, axis: int) -> int | None:
        """How many indices of ``axis`` to remove in all; None if it has none to give.

        The fewest that bring the dimension down to the bound; one more than before if taken evenly; all but one if it
        needs the help of the dimension's other axes.
        """
        low, high = self.counts.get(axis, 0), self.system.axes[axis].size - 1
        several = len(self.system.axes_of(move.leaf)) > 1
        if high <= low:
            return None
        if self.balanced and several:
            return low + 1
        if self._size(move, axis, high) > move.bound:
            return high if several else None
        while high - low > 1:
            middle = (low + high) // 2
            if self._size(move, axis, middle) > move.bound:
                low = middle
            else:
                high = middle
        return high


def _in_the_way(system: System, counts: Mapping[int, int], move: Shrink) -> str:
    """Why no axis of the dimension can give."""
    found = []
    for axis_id in system.axes_of(move.leaf):
        axis = system.axes[axis_id]
        if not axis.prunable:
            reasons = "; ".join(axis.reasons) or "it is not prunable"
            found.append(f"axis {axis_id} ({axis.kind}, size {axis.size}) is frozen: {reasons}")
        else:
            left = axis.size - counts.get(axis_id, 0)
            found.append(
                f"axis {axis_id} ({axis.kind}, size {axis.size}) cannot give enough: {left} are left"
            )
    size = system.size(move.leaf, counts)
    return (
        f"this plan cannot close over its ties: the size at {move.equation} would have to come down "
        f"from {size} to {move.bound}, but " + ("; ".join(found) if found else "no axis is in that dimension")
    )
