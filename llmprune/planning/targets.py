"""Targets a person would set in place of a ratio: parameters, bytes, multiply-accumulates, time.

A target is a limit on a cost of the whole model. The allocation that fits removals into a number of parameters fits
them into any other cost as well: :class:`Weighed` is the graph with that cost in the place of its parameter count. A
limit is kept, never exceeded: of the plans the allocation lands on, the one that removes least and still keeps it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from llmprune.arguments import is_whole
from llmprune.errors import InputError, PlanError
from llmprune.planning.footprint import Memory
from llmprune.planning.request import CONTEXT, NEW_TOKENS, RequestTime
from llmprune.reporting.report import memory as in_bytes
from llmprune.reporting.report import quantity
from llmprune.tracing.graph import Graph

if TYPE_CHECKING:
    from llmprune.planning.request import Request
    from llmprune.tracing.layers import Drop
    from llmprune.tracing.sublayers import Part

Cost = Callable[[Mapping[int, int], "Sequence[Drop | Part]"], int]
Choice = TypeVar("Choice")

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_BYTES = {"": 1.0, "b": 1.0} | {
    f"{prefix}{unit}": float(base) ** power
    for power, prefix in enumerate("kmgt", 1)
    for unit, base in (("b", 1000), ("ib", 1024))
}
_TIMES = {"": 1e-3, "us": 1e-6, "ms": 1e-3, "s": 1.0}
UNITS: dict[str, dict[str, float]] = {
    "params": _COUNTS,
    "memory": _BYTES,
    "macs": _COUNTS,
    "latency": _TIMES,
}
"""Kind of target -> suffix (in lower case) -> what it multiplies by."""

_EXAMPLES = {"params": "5.4B", "memory": "10GB", "macs": "3.2G", "latency": "35ms"}
_TRIES = 24


@dataclass(frozen=True)
class Target:
    """A limit.

    Attributes:
        kind: ``params``; ``memory`` (bytes of weights, buffers and cache); ``macs`` (multiply-accumulates per token of
            the recorded pass, or of the whole pass for a model without ``input_ids``); ``latency`` (seconds of a
            request, :mod:`llmprune.planning.request`).
        asked: as it was given.
        value: the limit; a share of the unpruned model's cost where ``relative``.
        relative: whether it was given as ``0.8x``.
        context: tokens of each sequence.
        batch: sequences.
        new_tokens: of a request, steps after its prompt.
    """

    kind: str
    asked: str
    value: float
    relative: bool
    context: int
    batch: int
    new_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """The target as a JSON object."""
        return asdict(self)

    def show(self, cost: float) -> str:
        """A cost in the target's unit."""
        if self.kind == "latency":
            return f"{cost * 1e3:.4g} ms"
        return in_bytes(cost) if self.kind == "memory" else quantity(cost)


_MOST = float(1 << 62)


def target_of(
    context: int | None = None, batch: int | None = None, new_tokens: int | None = None, **given: Any
) -> Target | None:
    """The target among keyword arguments; None where all of them are None.

    Args:
        context: tokens in the cache, or of the prompt.
        batch: sequences in the cache, or in the request.
        new_tokens: steps of the request after its prompt.
        given: kind of target -> a number, or a number with a suffix (``5.4B``, ``10GB``, ``10GiB``, ``35ms``,
            ``0.8x``), or None.

    Raises:
        InputError: more than one, one that is no such number, or a context, batch or new_tokens that the target does
            not read.
    """
    named = {kind: value for kind, value in given.items() if value is not None}
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} are given: give one target")
    for name, size, least, readers in (
        ("context", context, 0, ("memory", "latency")),
        ("batch", batch, 1, ("memory", "latency")),
        ("new_tokens", new_tokens, 0, ("latency",)),
    ):
        if size is None:
            continue
        if not is_whole(size, least):
            raise InputError(f"{name} must be an integer of at least {least}, not {size!r}")
        if not set(readers) & set(named):
            raise InputError(
                f"{name} counts for a target of {' or '.join(readers)} only: give that as well, or leave it out"
            )
    if not named:
        return None
    ((kind, value),) = named.items()
    number, relative = _parse(kind, value)
    if kind == "latency":
        context = CONTEXT if context is None else max(1, context)
        new_tokens = NEW_TOKENS if new_tokens is None else new_tokens
    return Target(kind, str(value), number, relative, context or 0, batch or 1, new_tokens or 0)


def ratio_of(
    ratio: float | Mapping[str, float] | None, target: Target | None
) -> float | Mapping[str, float] | None:
    """The ratio to prune by: the paper's fifth where neither is given, None for a target.

    Raises:
        InputError: both are given.
    """
    if ratio is not None and target is not None:
        raise InputError(f"a ratio and {target.kind} are given: give one of them")
    return 0.2 if ratio is None and target is None else ratio


def _parse(kind: str, value: Any) -> tuple[float, bool]:
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*([a-z]*)\s*", str(value).lower())
    units = UNITS[kind]
    if found is None or not (found[2] in units or found[2] == "x"):
        suffixes = ", ".join(unit for unit in units if unit)
        raise InputError(
            f"{kind} is a number like {_EXAMPLES[kind]} or 0.8x (suffixes: {suffixes}, x), not {value!r}"
        )
    number = float(found[1])
    if found[2] == "x":
        if not 0 < number < 1:
            raise InputError(f"a relative target lies between 0x and 1x, not at {value}")
        return number, True
    if number * units[found[2]] < (1e-9 if kind == "latency" else 1):
        raise InputError(f"{kind} must be at least {'1ns' if kind == 'latency' else 1}, not {value!r}")
    if number * units[found[2]] > _MOST:
        raise InputError(f"{kind} must be a size that a model can have, not {value!r}")
    return number * units[found[2]], False


class Weighed(Graph):
    """A graph whose :meth:`numel` counts another cost than parameters."""

    def __init__(self, graph: Graph, cost: Cost) -> None:
        self.__dict__.update(vars(graph))
        self._cost = cost

    def numel(self, removed: Mapping[int, int], drops: Sequence[Drop | Part] = ()) -> int:
        """The cost when axis i loses ``removed[i]`` indices and blocks go."""
        return self._cost(removed, drops)


class Goal:
    """A target on one graph.

    Args:
        graph: the traced model.
        target: what was asked for.
        kinds: kinds of axes that may give.
        measured: for ``latency``, what the model takes as it is, where that was measured.

    Attributes:
        graph: the graph that counts the target's cost.
        before: the unpruned model's cost.
        limit: the most it may be.

    Raises:
        InputError: the graph does not know what the target needs.
        PlanError: the model keeps the limit as it is, or its fixed part alone exceeds it.
    """

    def __init__(
        self, graph: Graph, target: Target, kinds: Sequence[str] = (), measured: Request | None = None
    ) -> None:
        self.target = target
        self.per = 1
        self._parts = ""
        if target.kind == "memory":
            cost = Memory(graph, target.context, target.batch)
            cache = cost.cache({})
            if cache:
                self._parts = (
                    f", {in_bytes(cache)} of it the cache of {target.batch} x {target.context} tokens"
                )
            self.graph: Graph = Weighed(graph, cost)
        elif target.kind == "macs":
            from llmprune.pipeline.prune import traced_tokens

            self.per = traced_tokens(graph) or 1
            self.graph = Weighed(graph, graph.macs)
        elif target.kind == "latency":
            self.per = 10**9
            request = (target.context, target.batch, target.new_tokens)
            self.graph = Weighed(graph, RequestTime(graph, kinds, *request, measured))
        else:
            self.graph = graph
        self.before = self.graph.numel({})
        self.limit = int(target.value * (self.before if target.relative else self.per))
        if self.before <= self.limit:
            raise PlanError(
                f"nothing has to go for {target.kind} {target.asked}: the model has {self.show(self.before)} as it is"
            )

    def show(self, cost: float) -> str:
        """A cost as the target states it."""
        return self.target.show(cost / self.per)

    def reach(self, choose: Callable[[int], Choice], cost: Callable[[Choice], int]) -> Choice | None:
        """The first choice that keeps the limit, asking for more while one lands above it; None where none does.

        Args:
            choose: cost to free -> a choice that frees about that; raises PlanError where it cannot.
            cost: what a choice leaves.
        """
        ask, more = self.before - self.limit, 0
        for _ in range(_TRIES):
            choice = choose(min(ask + more, self.before - 1))
            over = cost(choice) - self.limit
            if over <= 0:
                return choice
            more = max(2 * more, over)
        return None

    def refuse(self, floor: int, relaxed: Mapping[str, int]) -> PlanError:
        """What to raise where not even ``floor`` keeps the limit.

        Args:
            floor: the least cost under the options.
            relaxed: option -> the least cost without it, for those that would change something.
        """
        target = self.target
        text = (
            f"{target.kind} {target.asked} cannot be reached: the nearest that can is {self.show(floor)} of "
            f"{self.show(self.before)}{self._parts}"
        )
        enough = {name: cost for name, cost in relaxed.items() if cost <= self.limit}
        if enough:
            ways = " or ".join(f"{name} (down to {self.show(cost)})" for name, cost in enough.items())
            return PlanError(f"{text}; what binds is {ways}")
        helping = {name: cost for name, cost in relaxed.items() if cost < floor}
        if helping:
            best = min(helping, key=lambda name: helping[name])
            return PlanError(
                f"{text}; without {best} it would be {self.show(helping[best])}, which is not enough either: what "
                "cannot be pruned binds"
            )
        return PlanError(f"{text}; what cannot be pruned binds")
