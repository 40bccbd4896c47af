"""Which whole blocks, or branches of blocks, go, for a share of the layers or a share of the model's parameters.

Blocks go one after another. ``uniform`` takes them so that every stack loses the same share, the lowest scores of a
stack first; ``global`` takes the lowest score per parameter of all stacks. Where narrower axes give as well, blocks and
axes lose a common share: the next block goes while the share of its stack that would be gone (half of it counted) is
not above the share that the axes would have to give for the rest of the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmprune.errors import InputError, PlanError
from llmprune.planning.allocation import Indices, protected, rank
from llmprune.tracing.layers import Drop, LayerAxis
from llmprune.tracing.sublayers import HELD, PARTS, Part, PartAxis

if TYPE_CHECKING:
    from llmprune.tracing.graph import Graph

Array = npt.NDArray[np.float64]
Chosen = dict[int, list[int]]

DEPTHS = ("layer", *PARTS)
"""Kinds that go block by block."""


@dataclass(frozen=True, eq=False)
class Stack:
    """A stack that may lose blocks.

    Attributes:
        axis: the stack.
        order: the blocks that may go, lowest score first; at most all but one of the stack.
        scores: float64 (size,).
        costs: parameters of each block.
    """

    axis: LayerAxis | PartAxis
    order: Sequence[int]
    scores: Array
    costs: Sequence[int]


def candidates(
    graph: Graph,
    kinds: Sequence[str],
    scores: Mapping[int, Array],
    pinned: Mapping[int, Mapping[int, str]],
    first: int | None,
    last: int | None,
    allowed: Callable[[str], bool],
) -> list[Stack]:
    """The stacks that may lose blocks.

    Args:
        graph: the traced model.
        kinds: those of :data:`DEPTHS` that may give.
        scores: axis id -> (size,), of every stack that may lose some.
        pinned: axis id -> position -> why the block has to stay, besides what the graph says.
        first: blocks left at the start of each stack; None scales the paper's 4 of 32.
        last: blocks left at its end; None scales the paper's 2 of 32.
        allowed: whether the block of this path may give.

    Raises:
        PlanError: no stack may lose any, or one has no scores.
    """
    axes = [axis for axis in graph.stacks if axis.kind in kinds]
    for kind in kinds:
        if not any(axis.prunable for axis in axes if axis.kind == kind):
            found = "; ".join(
                f"{axis.module}: {'; '.join(axis.reasons)}" for axis in axes if axis.kind == kind
            )
            missing = "no stack of blocks on a residual stream"
            if kind != "layer":
                missing += " has a direct child of its blocks that computes a whole branch"
            raise PlanError(f"this model has no prunable axis of kind {kind}: {found or missing}")
    out = []
    for axis in axes:
        depth = {axis.module: axis.size}
        free = [
            i
            for i in range(axis.size)
            if i not in axis.pinned
            and i not in pinned.get(axis.id, {})
            and allowed(f"{axis.module}.{i}")
            and not protected((axis.module, i), depth, first, last)
        ]
        if not free:
            continue
        if axis.id not in scores:
            raise PlanError(
                f"axis {axis.id} ({axis.kind}, {axis.module}) has no scores: score the graph with "
                f"kinds=({axis.kind!r},)"
            )
        order = [int(i) for i in rank(scores[axis.id]) if i in set(free)][: axis.groups - 1]
        costs = [
            graph.numel({}) - graph.numel({}, axis.drops([i])) if i in set(free) else 0
            for i in range(axis.size)
        ]
        out.append(Stack(axis, order, scores[axis.id], costs))
    if not out:
        why = next((text for texts in pinned.values() for text in texts.values()), "")
        raise PlanError(
            "no layer is left to prune, so the largest reachable ratio is 0: protect fewer layers or widen the scope"
            + (f" ({why})" if why else "")
        )
    return out


def share(stacks: Sequence[Stack], ratios: Mapping[str, float]) -> Chosen:
    """The lowest-scored blocks and branches, of each stack its kind's share, rounded down.

    Whole layers go first, and take their branches along; of the branches that are left their share goes.
    """
    chosen: Chosen = {}
    gone: dict[str, list[int]] = {}
    for stack in sorted(stacks, key=lambda s: s.axis.kind != "layer"):
        axis = stack.axis
        away = gone.get(axis.module, [])
        left, stay = axis.groups, set(away)
        if isinstance(axis, PartAxis):
            left, stay = len(set(axis.parts) - stay), stay | axis.held(away)
        order = [i for i in stack.order if i not in stay]
        # A product such as 0.29 * 100 = 28.999999999999996 means 29.
        chosen[axis.id] = sorted(order[: int(ratios[axis.kind] * left + 1e-9)])
        if axis.kind == "layer":
            gone[axis.module] = chosen[axis.id]
    return chosen


def without_branches(graph: Graph, chosen: Chosen) -> Chosen:
    """A choice less the branches of blocks that go whole.

    Raises:
        PlanError: of the blocks that are left, a branch goes that has to stay now.
    """
    if not chosen:
        return {}
    gone = {axis.module: set(chosen.get(axis.id, ())) for axis in graph.layers}
    of = {}
    for axis in graph.sublayers:
        if axis.id in chosen:
            of[axis.id] = gone[axis.module]
            for i in sorted(axis.held(gone[axis.module]) & set(chosen[axis.id])):
                raise PlanError(f"{axis.parts[i].path} cannot go once the blocks before it are gone: {HELD}")
    return {key: [i for i in positions if i not in of.get(key, ())] for key, positions in chosen.items()}


def sequence(stacks: Sequence[Stack], allocation: str) -> list[tuple[float, Stack, int]]:
    """The blocks in the order they go: (share of the stack half way through the step, stack, block)."""
    steps = []
    for place, stack in enumerate(stacks):
        worst = -np.inf
        for number, block in enumerate(stack.order):
            half = (number + 0.5) / stack.axis.groups
            worst = max(worst, float(stack.scores[block]) / max(1, stack.costs[block]))
            key = (half, worst) if allocation == "uniform" else (worst, half)
            steps.append((*key, place, number, half, stack, block))
    steps.sort(key=lambda step: step[:4])
    return [(half, stack, block) for *_, half, stack, block in steps]


def fit(steps: Sequence[tuple[float, Stack, int]], target: int, ratio: float, total: int) -> Chosen:
    """Blocks of about ``target`` parameters, to within one block.

    Raises:
        PlanError: all of them together fall short by more than the smallest of them.
    """
    chosen: Chosen = {}
    freed = 0
    rest = []
    for _, stack, block in steps:
        cost = stack.costs[block]
        if freed + cost <= target:
            chosen.setdefault(stack.axis.id, []).append(block)
            freed += cost
        else:
            rest.append((cost, stack, block))
    if rest:
        cost, stack, block = min(rest, key=lambda item: item[0])
        if not chosen or freed + cost - target < target - freed:
            chosen.setdefault(stack.axis.id, []).append(block)
    elif target - freed >= min(stack.costs[block] for _, stack, block in steps):
        raise PlanError(
            f"ratio {ratio:.4g} cannot be reached by dropping layers: the largest reachable ratio is "
            f"{freed / total:.4f}; prune more kinds or protect fewer layers"
        )
    return {axis: sorted(blocks) for axis, blocks in chosen.items()}


def with_axes(
    steps: Sequence[tuple[float, Stack, int]], target: int, reach: Callable[[Chosen], int]
) -> list[Chosen]:
    """Choices of blocks to be completed by narrower axes, the one with a common share first, then deeper ones.

    Args:
        steps: the blocks in the order they go.
        target: parameters to free.
        reach: of a choice, the parameters that axes of the blocks that are left could give.
    """
    found: list[Chosen] = []
    chosen: Chosen = {}
    freed = 0
    for half, stack, block in [*steps, (np.inf, None, -1)]:
        if stack is not None and freed + stack.costs[block] > target:
            continue
        room = reach(chosen)
        if stack is None or room <= 0 or half > (target - freed) / room:
            found.append({axis: sorted(blocks) for axis, blocks in chosen.items()})
        if stack is not None:
            chosen.setdefault(stack.axis.id, []).append(block)
            freed += stack.costs[block]
    return found


def drops_of(graph: Graph, chosen: Mapping[int, Sequence[int] | Indices]) -> list[Drop | Part]:
    """A choice as the removal of blocks and of branches."""
    if not chosen:
        return []
    return [
        drop for axis in graph.stacks if len(chosen.get(axis.id, ())) for drop in axis.drops(chosen[axis.id])
    ]


@dataclass
class Shallower:
    """A graph without some of its blocks, as the allocation of narrower axes sees it."""

    graph: Graph
    drops: Sequence[Drop | Part]

    def __post_init__(self) -> None:
        prefixes = tuple(prefix for drop in self.drops for prefix in drop.prefixes)
        self._reaching = {
            axis.id
            for axis in self.graph.axes
            if prefixes and any(name.startswith(prefixes) for name, _ in axis.places)
        }
        self._gone = self.graph.numel({}) - self.graph.numel({}, self.drops)

    def numel(self, removed: Mapping[int, int]) -> int:
        """Parameters left when axis i loses ``removed[i]`` indices as well."""
        if self._reaching.isdisjoint(removed):
            return self.graph.numel(removed) - self._gone
        return self.graph.numel(removed, self.drops)


def check_keys(given: object, what: str) -> None:
    """Raise InputError unless ``given`` maps ids of axes."""
    if not isinstance(given, Mapping) or not all(isinstance(key, int | np.integer) for key in given):
        raise InputError(f"{what} must be a mapping from ids of axes, whole numbers, not {given!r:.60}")


def index_array(indices: npt.ArrayLike, axis: int) -> npt.NDArray[Any]:
    """Indices of an axis as NumPy has them; InputError for what is no array."""
    try:
        return np.asarray(indices if isinstance(indices, np.ndarray) else list(indices))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise InputError(f"the removed indices of axis {axis} must be integers ({error})") from error


def check_blocks(removed: Mapping[int, npt.ArrayLike], stacks: Mapping[int, LayerAxis | PartAxis]) -> Chosen:
    """Positions of blocks to remove, checked and sorted."""
    out: Chosen = {}
    for key, indices in removed.items():
        stack = stacks[key]
        values = index_array(indices, key)
        what = "layer" if stack.kind == "layer" else "block"
        name = f"axis {key} ({stack.kind}, size {stack.size} of {stack.module})"
        if values.size == 0:
            continue
        if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
            raise InputError(f"the removed {what}s of {name} must be a flat list of integers")
        gone = sorted({int(value) for value in values})
        if gone[0] < 0 or gone[-1] >= stack.size:
            raise InputError(f"{name} has no {what} {gone[0] if gone[0] < 0 else gone[-1]}")
        for position in gone:
            if position in stack.pinned:
                raise PlanError(f"{what} {position} of {name} cannot go: {stack.pinned[position]}")
        if len(gone) == stack.groups:
            raise PlanError(f"{name} would lose every {stack.kind}: keep at least one")
        out[key] = gone
    return out


def block_summaries(graph: Graph, blocks: Mapping[int, Indices]) -> dict[int, dict[str, Any]]:
    """What a plan says of each stack that loses blocks."""
    return {
        stack.id: {
            "kind": stack.kind,
            "size": stack.size,
            "removed": len(blocks[stack.id]),
            "module": stack.module,
        }
        for stack in (graph.stacks if blocks else ())
        if stack.id in blocks
    }
