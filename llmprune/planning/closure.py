"""Closing a removal over ties: what else must go so that every size equation can hold again.

One attribute that sizes two axes ties their sizes: Llama's ``head_dim`` is the width of a value head and twice the
number of rope pairs, so a value channel cannot go alone. Every dimension that is larger than its equation allows has to
give indices of one of its axes, until nothing is too large; where the sizes do not divide, the removal is rounded up.
Mostly there is one axis to give and the closure is a least fixpoint; where there are several (a partly rotary head, a
fused projection cut into thirds), a search over the choices finds the closure that removes the fewest parameters.

This module works on counts; which indices go is decided by :func:`llmprune.planning.plan.plan`.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count

from llmprune.errors import PlanError
from llmprune.tracing.equations import Leaf, Lower, Shrink, System

_SEARCH = 128
_Changes = dict[Leaf, int]


def close(system: System, removed: Mapping[int, int]) -> tuple[dict[int, int], _Changes]:
    """The removal of the fewest parameters that contains ``removed`` and leaves every size equation solvable.

    The fewest where the choices can be searched through (128 decisions); beyond that, the better of two descents that
    decide greedily.

    Args:
        system: the model's size equations.
        removed: axis id -> how many indices go; each less than the axis' size.

    Returns:
        Axis id -> count after closure (only positive counts), and the attributes that change with their new values.

    Raises:
        PlanError: a frozen axis, or one that would lose its last index, is in the way; the text names it.
    """
    start = _State(system, {axis: n for axis, n in removed.items() if n})
    found, error = _search(start)
    if found is None and error is None:  # too many choices to look at them all
        descents = []
        for balanced in (False, True):
            try:
                descents.append(_descend(start, balanced))
            except PlanError as failure:
                error = error or failure
        found = min(descents, key=_State.cost, default=None)
    if found is None:
        assert error is not None
        raise error
    return found.counts, found.values


@dataclass
class _State:
    """A removal on its way to being closed.

    Attributes:
        counts: axis id -> removed count.
        caps: attributes that have been decided to come down, and to what.
        values: the attributes that change, once closed.
        closed: every equation can be met.
    """

    system: System
    counts: dict[int, int]
    caps: dict[Leaf, int] = field(default_factory=dict)
    values: _Changes = field(default_factory=dict)
    closed: bool = False

    def cost(self) -> tuple[int, int]:
        """Parameters removed, then indices removed."""
        return -self.system.sources[0].numel(self.counts), sum(self.counts.values())

    def key(self) -> tuple[object, ...]:
        """What makes two states the same."""
        return tuple(sorted(self.counts.items())), tuple(sorted(self.caps.items())), self.closed

    def giving(self, axis: int, removed: int) -> _State:
        """The state after an axis has given up more."""
        return replace(self, counts={**self.counts, axis: removed})

    def size(self, move: Shrink) -> int:
        """Size of the move's dimension."""
        return self.system.size(move.leaf, self.counts)

    def advance(self) -> list[tuple[Shrink | Lower, _State]]:
        """Do, in place, all that leaves no choice; then the choices of the next decision, none when closed.

        Raises:
            PlanError: something has to give that cannot.
        """
        while True:
            outcome = self.system.solve(self.counts, self.caps)
            if isinstance(outcome, dict):
                self.values, self.closed = outcome, True
                return []
            decision: list[tuple[Shrink | Lower, _State]] = []
            moved = False
            for demand in outcome:
                choices = [(move, state) for move in demand for state in self._ways(move)]
                if not choices:
                    raise PlanError(self._obstacle(demand[0]))
                if len(choices) == 1:
                    self.counts, self.caps = choices[0][1].counts, choices[0][1].caps
                    moved = True
                elif choices[0][1].key() != self.key():
                    decision = decision or choices
            if decision and not moved:
                return decision

    def _ways(self, move: Shrink | Lower) -> list[_State]:
        """The states one step into a move; a single way goes the whole distance."""
        if isinstance(move, Lower):
            return [replace(self, caps={**self.caps, move.leaf: move.bound})]
        if self.size(move) <= move.bound:  # another demand has brought it down already
            return [self]
        axes = [
            a for a in self.system.axes_of(move.leaf) if self._left(a) > 1 and self.system.axes[a].prunable
        ]
        if len(axes) > 1:
            return [self.giving(axis, self.counts.get(axis, 0) + 1) for axis in axes]
        return [state for axis in axes if (state := self.down_to(move, axis)) is not None]

    def _left(self, axis: int) -> int:
        return self.system.axes[axis].size - self.counts.get(axis, 0)

    def down_to(self, move: Shrink, axis: int) -> _State | None:
        """The state in which this axis alone has brought the dimension down to the bound; None if it cannot."""
        low, high = self.counts.get(axis, 0), self.system.axes[axis].size - 1
        if high <= low or self.giving(axis, high).size(move) > move.bound:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self.giving(axis, middle).size(move) > move.bound:
                low = middle
            else:
                high = middle
        return self.giving(axis, high)

    def _obstacle(self, move: Shrink | Lower) -> str:
        """Why no axis of a dimension can give."""
        assert isinstance(move, Shrink)
        found = []
        for axis_id in self.system.axes_of(move.leaf):
            axis = self.system.axes[axis_id]
            name = f"axis {axis_id} ({axis.kind}, size {axis.size})"
            if axis.prunable:
                found.append(f"{name} cannot give enough: {self._left(axis_id)} are left")
            else:
                found.append(f"{name} is frozen: {'; '.join(axis.reasons) or 'it is not prunable'}")
        return (
            f"this plan cannot close over its ties: the size at {move.equation} would have to come down "
            f"from {self.size(move)} to {move.bound}, but "
            + ("; ".join(found) if found else "no axis is in that dimension")
        )


def _search(start: _State) -> tuple[_State | None, PlanError | None]:
    """Uniform-cost search: the cheapest closed state, or the first error where there is none, or neither (gave up)."""
    order = count()
    queue = [(start.cost(), next(order), start)]
    seen = {start.key()}
    error: PlanError | None = None
    for _ in range(_SEARCH):
        if not queue:
            break
        state = heapq.heappop(queue)[2]
        if state.closed:
            return state, None
        try:
            following = [child for _, child in state.advance()]
        except PlanError as failure:
            error = error or failure
            continue
        if state.closed and not queue:
            return state, None
        for child in following or [state]:
            if child.key() not in seen:
                seen.add(child.key())
                heapq.heappush(queue, (child.cost(), next(order), child))
    return None, None if queue else error


def _descend(start: _State, balanced: bool) -> _State:
    """Decide greedily until closed: for the axis that fits best, or (balanced) that gave the smallest share so far.

    Raises:
        PlanError: a decision led into a dead end.
    """
    state = replace(start)
    while True:
        choices = state.advance()
        if state.closed:
            return state
        state = min(choices, key=lambda choice: _preference(state, choice, balanced))[1]


def _preference(
    state: _State, choice: tuple[Shrink | Lower, _State], balanced: bool
) -> tuple[bool, float, int, int]:
    """How good a choice is, lowest first; lowering an attribute comes before shrinking another dimension."""
    move, after = choice
    if isinstance(move, Lower):
        return False, -1.0, 0, 0
    system = state.system
    axis = next(a for a, n in after.counts.items() if n != state.counts.get(a, 0))
    if balanced:
        return False, state.counts.get(axis, 0) / system.axes[axis].size, system.degree(axis), axis
    alone = state.down_to(move, axis)
    overshoot = 0 if alone is None else move.bound - alone.size(move)
    return alone is None, float(overshoot), system.degree(axis), axis
