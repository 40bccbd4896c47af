"""Size equations: what a module's integers must become when its axes lose indices.

The recorder writes down every integer that sized a dimension as an equation ``value(tree) == size``. The leaves of a
tree are constants, module attributes (``self.num_heads``) and sizes of other tensors; inner nodes are integer
arithmetic. After a removal the sizes on the right are known from the axes, and this module finds attribute values under
which every equation holds again, or says which equations stand in the way and by how much
(:mod:`llmprune.planning.closure` then removes more until none does).

Attributes whose equations all still hold keep their values. The others are found by inverting equations with one
unknown left, as exact sets of integers, until nothing moves; where two unknowns are bound only by each other
(``num_heads * head_dim``), the axes in that dimension tell them apart, and every choice is checked by evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmprune.errors import PlanError, TraceError

Leaf = tuple[Any, ...]
"""``("attr", module, name)`` or ``("shape", source, tensor, dim)``."""
Interval = tuple[int, int]
Domain = list[Interval]
"""A set of integers: disjoint closed intervals, ascending."""

LIMIT = 1 << 62
EVERYTHING: Domain = [(-LIMIT, LIMIT)]
_GUESSES = 256
_SCAN = 1 << 16


class SizeSource(Protocol):
    """What the equations need of a graph. ``removed`` maps axis ids of the *primary* graph to removed counts."""

    @property
    def equations(self) -> Sequence[Sequence[Any]]:
        """``[tensor, dim, tree, where]`` each."""

    def new_sizes(self, removed: Mapping[int, int], dims: Sequence[tuple[int, int]]) -> list[int]:
        """Sizes of ``(tensor, dim)`` after the removal."""

    def dim_axes(self, tensor: int, dim: int) -> list[int]:
        """Ids of the axes in a dimension's expression."""

    def numel(self, removed: Mapping[int, int]) -> int:
        """Parameters left after the removal."""


class AxisLike(Protocol):
    """The part of :class:`llmprune.tracing.graph.Axis` that matters for sizes."""

    @property
    def id(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def prunable(self) -> bool: ...
    @property
    def reasons(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Attribute:
    """A module attribute that takes a new value.

    Attributes:
        module: path of the module (empty for the root).
        name: attribute name; ``config.x`` is a field of that module's config.
        index: position in a tuple or list, or None for a plain integer.
        old: value in the model the graph was traced from.
        new: value the compacted model needs.
    """

    module: str
    name: str
    index: int | None
    old: int | float
    new: int | float

    @classmethod
    def of(cls, leaf: Leaf, old: int, new: int) -> Attribute:
        """From an ``("attr", module, name)`` leaf, whose name may end in ``[index]``."""
        _, module, name = leaf
        if name.endswith("]"):
            name, _, index = name[:-1].rpartition("[")
            return cls(module, name, int(index), old, new)
        return cls(module, name, None, old, new)

    def __str__(self) -> str:
        place = self.name if self.index is None else f"{self.name}[{self.index}]"
        return f"{self.module}.{place}".lstrip(".") + f": {self.old} -> {self.new}"


@dataclass(frozen=True)
class Equation:
    """``value(tree) == size of dim of tensor`` in one source; ``leaves`` without repetition, in order."""

    source: int
    tensor: int
    dim: int
    tree: Any
    where: str
    leaves: tuple[Leaf, ...]

    @property
    def attributes(self) -> tuple[Leaf, ...]:
        """The attribute leaves."""
        return tuple(leaf for leaf in self.leaves if leaf[0] == "attr")

    @property
    def target(self) -> Leaf:
        """The sized dimension, as a leaf."""
        return ("shape", self.source, self.tensor, self.dim)

    def __str__(self) -> str:
        return f"{self.where or 'a recorded size'}: {describe(self.tree)}"


def _leaf_of(node: Sequence[Any], source: int) -> Leaf:
    """An attribute or shape node as a leaf; a recorded value in an attribute's fourth place is not part of it."""
    if node[0] == "attr":
        return ("attr", node[1], node[2])
    return ("shape", source, node[1], node[2])


def _walk(tree: Any) -> Iterator[Sequence[Any]]:
    """The attribute and shape nodes of a tree, left to right."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, int):
            continue
        if node[0] in ("attr", "shape"):
            yield node
        else:
            stack.extend(reversed(node[1:]))


def describe(tree: Any) -> str:
    """A tree as the arithmetic a reader of the model's code would recognise."""
    if isinstance(tree, int):
        return str(tree)
    if tree[0] == "attr":
        return f"{tree[1]}.{tree[2]}".lstrip(".")
    if tree[0] == "shape":
        return f"size({tree[2]})"
    if tree[0] == "neg":
        return f"-{describe(tree[1])}"
    if tree[0] in ("max", "min"):
        return f"{tree[0]}({describe(tree[1])}, {describe(tree[2])})"
    return f"({describe(tree[1])} {tree[0]} {describe(tree[2])})"


def evaluate(tree: Any, values: Mapping[Leaf, int], source: int = 0) -> int:
    """The value of a tree.

    Raises:
        ZeroDivisionError: a divisor is zero under ``values``.
        KeyError: a leaf has no value.
        TraceError: an operation that no recorder writes.
    """
    if isinstance(tree, int):
        return tree
    op = tree[0]
    if op in ("attr", "shape"):
        return values[_leaf_of(tree, source)]
    a = evaluate(tree[1], values, source)
    if op == "neg":
        return -a
    b = evaluate(tree[2], values, source)
    if op == "+":
        return a + b
    if op == "-":
        return a - b
    if op == "*":
        return a * b
    if op == "//":
        return a // b
    if op == "%":
        return a % b
    if op == "max":
        return max(a, b)
    if op == "min":
        return min(a, b)
    raise TraceError(f"a recorded size equation uses the operation {op!r}, which is not integer arithmetic")


def intersect(a: Domain, b: Domain) -> Domain:
    """The integers in both."""
    out, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        lo, hi = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if lo <= hi:
            out.append((lo, hi))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return out


def invert(tree: Any, leaf: Leaf, target: Domain, values: Mapping[Leaf, int], source: int = 0) -> Domain:
    """Every integer that ``leaf`` may be for the tree's value to lie in ``target``, the other leaves as in ``values``.

    Exact for non-negative integers where the leaf occurs once, not under ``%`` and not within a compound divisor;
    elsewhere the integers from 0 to twice the larger of the old value and the target (at most 65536) are tried.
    """
    occurrences = sum(_leaf_of(node, source) == leaf for node in _walk(tree))
    domain = _invert_once(tree, leaf, target, values, source) if occurrences == 1 else None
    if domain is not None:
        return domain
    out: Domain = []
    env = dict(values)
    highest = max((abs(bound) for interval in target for bound in interval if abs(bound) < LIMIT), default=0)
    for value in range(min(_SCAN, 2 * max(values.get(leaf, 0), highest)) + 1):
        env[leaf] = value
        try:
            result = evaluate(tree, env, source)
        except ZeroDivisionError:
            continue
        if any(lo <= result <= hi for lo, hi in target):
            if out and out[-1][1] == value - 1:
                out[-1] = (out[-1][0], value)
            else:
                out.append((value, value))
    return out


def _invert_once(
    tree: Any, leaf: Leaf, target: Domain, values: Mapping[Leaf, int], source: int
) -> Domain | None:
    """:func:`invert` for a leaf that occurs once; None where the operation has no interval inverse."""
    while tree[0] not in ("attr", "shape"):
        op = tree[0]
        if op == "neg":
            tree, target = tree[1], [(-hi, -lo) for lo, hi in reversed(target)]
            continue
        left = not isinstance(tree[1], int) and any(_leaf_of(n, source) == leaf for n in _walk(tree[1]))
        if op == "//" and not left and tree[2][0] not in ("attr", "shape"):
            return None  # the divisor's sign is not known
        try:
            known = evaluate(tree[2] if left else tree[1], values, source)
        except ZeroDivisionError:
            return []
        pieces = [_invert_step(op, left, known, lo, hi) for lo, hi in target]
        if any(piece is None for piece in pieces):
            return None
        target = _union(interval for piece in pieces if piece for interval in piece)
        if not target:
            return []
        tree = tree[1] if left else tree[2]
    return target


def _union(intervals: Iterable[Interval]) -> Domain:
    out: Domain = []
    for lo, hi in sorted((max(lo, -LIMIT), min(hi, LIMIT)) for lo, hi in intervals if lo <= hi):
        if out and lo <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(out[-1][1], hi))
        else:
            out.append((lo, hi))
    return out


def _invert_step(op: str, left: bool, k: int, lo: int, hi: int) -> Domain | None:
    """The x for which ``x op k`` (or ``k op x`` if not ``left``) lies in [lo, hi]; None if that is no interval."""
    if op == "+":
        return [(lo - k, hi - k)]
    if op == "-":
        return [(lo + k, hi + k)] if left else [(k - hi, k - lo)]
    if op == "*":
        if k == 0:
            return EVERYTHING if lo <= 0 <= hi else []
        if k < 0:
            k, lo, hi = -k, -hi, -lo
        return [(-(-lo // k), hi // k)]
    if op == "//" and left and k > 0:
        return [(lo * k, hi * k + k - 1)]
    if op == "//" and not left and k >= 0:
        # For x > 0: k // x <= hi  <=>  x >= k // (hi + 1) + 1, and k // x >= lo  <=>  x <= k // lo.
        if hi < 0:
            return []
        return [(k // (hi + 1) + 1, k // lo if lo > 0 else LIMIT)]
    if op == "max":
        return [] if hi < k else [(-LIMIT if lo <= k else lo, hi)]
    if op == "min":
        return [] if lo > k else [(lo, LIMIT if hi >= k else hi)]
    return None


@dataclass(frozen=True)
class Shrink:
    """A dimension that must come down to ``bound`` (or below) for an equation to be solvable."""

    leaf: Leaf
    bound: int
    equation: Equation


@dataclass(frozen=True)
class Lower:
    """An attribute that must come down to ``bound`` (or below)."""

    leaf: Leaf
    bound: int


Demand = tuple[Shrink | Lower, ...]
"""Alternatives, the likeliest first: one of them has to happen before the equations can hold."""


class _Conflict(Exception):
    def __init__(self, demands: Sequence[Demand], equations: Sequence[Equation]) -> None:
        super().__init__()
        self.demands = list(demands)
        self.equations = list(equations)


@dataclass
class System:
    """The size equations of a traced model, over all recorded attention forms.

    Args:
        axes: the primary graph's axes, ``axes[i].id == i``.
        sources: graphs whose equations count; the first is the primary graph.

    Raises:
        TraceError: an equation does not hold for the unpruned model: it was recorded wrongly.
    """

    axes: Sequence[AxisLike]
    sources: Sequence[SizeSource]
    equations: list[Equation] = field(init=False)
    old: dict[Leaf, int] = field(init=False)
    """Value of every attribute leaf in the unpruned model."""

    def __post_init__(self) -> None:
        recorded: dict[Leaf, int] = {}
        unique: dict[str, Equation] = {}
        for source, graph in enumerate(self.sources):
            for tensor, dim, tree, where in graph.equations:
                nodes = [] if isinstance(tree, int) else list(_walk(tree))
                leaves = tuple(dict.fromkeys(_leaf_of(node, source) for node in nodes))
                recorded.update((_leaf_of(n, source), n[3]) for n in nodes if n[0] == "attr" and len(n) > 3)
                equation = Equation(source, tensor, dim, tree, where, leaves)
                unique.setdefault(repr((source, tensor, dim, tree)), equation)
        self.equations = list(unique.values())
        self._by_leaf: dict[Leaf, list[int]] = {}
        dims: dict[Leaf, None] = {}
        for index, equation in enumerate(self.equations):
            for leaf in (*equation.leaves, equation.target):
                self._by_leaf.setdefault(leaf, []).append(index)
                if leaf[0] == "shape":
                    dims[leaf] = None
        self._dims = [[leaf for leaf in dims if leaf[1] == source] for source in range(len(self.sources))]
        self._base = self.sizes({})
        self._axes_of: dict[Leaf, list[int]] = {}
        self.old = recorded
        self._infer_old()

    def sizes(self, removed: Mapping[int, int]) -> dict[Leaf, int]:
        """Size of every dimension an equation speaks of, after the removal."""
        out: dict[Leaf, int] = {}
        for graph, leaves in zip(self.sources, self._dims, strict=True):
            out.update(
                zip(leaves, graph.new_sizes(removed, [(leaf[2], leaf[3]) for leaf in leaves]), strict=True)
            )
        return out

    def size(self, leaf: Leaf, removed: Mapping[int, int]) -> int:
        """Size of one dimension after the removal."""
        return self.sources[leaf[1]].new_sizes(removed, [(leaf[2], leaf[3])])[0]

    def axes_of(self, leaf: Leaf) -> list[int]:
        """Axes in the dimension, each once."""
        if leaf not in self._axes_of:
            self._axes_of[leaf] = list(dict.fromkeys(self.sources[leaf[1]].dim_axes(leaf[2], leaf[3])))
        return self._axes_of[leaf]

    def degree(self, axis: int) -> int:
        """In how many of the equations' dimensions an axis occurs."""
        return sum(axis in self.axes_of(leaf) for leaves in self._dims for leaf in leaves)

    def _infer_old(self) -> None:
        """Check the recorded values; find those the recorder left out as a solution of the unpruned model."""
        keys = {leaf for e in self.equations for leaf in e.attributes}
        missing = keys - self.old.keys()
        if missing:
            work = sorted({index for leaf in missing for index in self._by_leaf[leaf]})
            try:
                self.old.update(self._propagate(work, missing, {}, {}, self._base))
            except _Conflict as conflict:
                raise self._wrong(conflict.equations[0]) from None
        for equation in self.equations:
            if self._value(equation, self._base, self.old) != self._base[equation.target]:
                raise self._wrong(equation)

    def _wrong(self, equation: Equation) -> TraceError:
        size = self._base[equation.target]
        return TraceError(
            f"the size equation recorded at {equation} does not give {size}; trace the model again"
        )

    @staticmethod
    def _value(equation: Equation, sizes: Mapping[Leaf, int], values: Mapping[Leaf, int]) -> int | None:
        env = {leaf: sizes[leaf] if leaf[0] == "shape" else values[leaf] for leaf in equation.leaves}
        try:
            return evaluate(equation.tree, env, equation.source)
        except ZeroDivisionError:
            return None

    def solve(
        self, removed: Mapping[int, int], caps: Mapping[Leaf, int] | None = None
    ) -> dict[Leaf, int] | list[Demand]:
        """Attribute values under which every equation holds after the removal.

        Args:
            removed: axis id -> how many indices go.
            caps: attributes that may not exceed a value.

        Returns:
            The attributes that change, with their new values; or, where no values fit, everything that has to
            shrink first.

        Raises:
            PlanError: the equations cannot be met by removing more.
        """
        caps = caps or {}
        sizes = self.sizes(removed)
        touched = {
            index for leaf, size in sizes.items() if size != self._base[leaf] for index in self._by_leaf[leaf]
        }
        dirty = [i for i in sorted(touched) if not self._holds(self.equations[i], sizes)]
        released = {leaf for i in dirty for leaf in self.equations[i].attributes}
        released |= {leaf for leaf, cap in caps.items() if self.old[leaf] > cap}
        while True:
            work = sorted({i for leaf in released for i in self._by_leaf[leaf]} | set(dirty))
            try:
                found = self._propagate(work, released, removed, caps, sizes)
            except _Conflict as conflict:
                more = {leaf for e in conflict.equations for leaf in e.attributes} - released
                if more:
                    released |= more
                    continue
                if not conflict.demands:
                    raise PlanError(
                        f"no attribute values satisfy the size equation at {conflict.equations[0]}"
                    ) from None
                return conflict.demands
            else:
                return {leaf: value for leaf, value in found.items() if value != self.old[leaf]}

    def _holds(self, equation: Equation, sizes: Mapping[Leaf, int]) -> bool:
        return self._value(equation, sizes, self.old) == sizes[equation.target]

    def _propagate(
        self,
        work: Sequence[int],
        unknown: Iterable[Leaf],
        removed: Mapping[int, int],
        caps: Mapping[Leaf, int],
        sizes: Mapping[Leaf, int],
    ) -> dict[Leaf, int]:
        """Values for ``unknown`` that satisfy the equations ``work``; the other attributes keep their old values.

        A depth-first search whose branches are rare: deduction alone settles what real models record.
        """
        unknown = set(unknown)
        first: _Conflict | None = None
        budget = _GUESSES
        stack: list[dict[Leaf, int]] = [{}]
        while stack and budget:
            guesses = stack.pop()
            budget -= 1
            try:
                known, domains = self._deduce(work, unknown, guesses, caps, sizes)
            except _Conflict as conflict:
                first = first or conflict
                continue
            open_leaves = sorted(unknown - known.keys())
            if not open_leaves:
                return {leaf: known[leaf] for leaf in unknown}
            leaf = min(open_leaves, key=lambda k: (not self._evidence(k, removed), k))
            branches = self._candidates(leaf, domains[leaf], removed, sizes)
            if not branches and first is None:
                equations = [self.equations[i] for i in self._by_leaf[leaf]]
                raise PlanError(
                    f"no value of {'.'.join(leaf[1:])} can be derived from its size equations ({equations[0]})"
                )
            stack.extend({**guesses, leaf: value} for value in reversed(branches))
        if first is None:
            raise PlanError("the model's size equations have too many solutions to choose from")
        raise first

    def _deduce(
        self,
        work: Sequence[int],
        unknown: set[Leaf],
        guesses: Mapping[Leaf, int],
        caps: Mapping[Leaf, int],
        sizes: Mapping[Leaf, int],
    ) -> tuple[dict[Leaf, int], dict[Leaf, Domain]]:
        """What follows without guessing: values forced by equations with one unknown, and the domains of the rest."""
        known = dict(guesses)
        domains = {k: [(-LIMIT, caps[k])] if k in caps else EVERYTHING for k in unknown}
        evidence: dict[Leaf, list[Equation]] = {k: [] for k in unknown}
        waiting = [self.equations[i] for i in work]
        moved = True
        while moved:
            moved, later = False, []
            for equation in waiting:
                free = [k for k in equation.attributes if k in unknown and k not in known]
                if len(free) > 1:
                    later.append(equation)
                    continue
                moved = True
                env = self._environment(equation, sizes, known)
                if not free:
                    self._check(equation, env, sizes, known, unknown)
                    continue
                leaf, target = free[0], sizes[equation.target]
                evidence[leaf].append(equation)
                exact = invert(equation.tree, leaf, [(target, target)], env, equation.source)
                domains[leaf] = intersect(domains[leaf], exact)
                if not domains[leaf]:
                    raise self._clash(leaf, evidence[leaf], caps, sizes, known)
                lo, hi = domains[leaf][0][0], domains[leaf][-1][1]
                if lo == hi:
                    known[leaf] = lo
            waiting = later
        return known, domains

    def _environment(
        self, equation: Equation, sizes: Mapping[Leaf, int], known: Mapping[Leaf, int]
    ) -> dict[Leaf, int]:
        env = {}
        for leaf in equation.leaves:
            value = sizes[leaf] if leaf[0] == "shape" else known.get(leaf, self.old.get(leaf))
            if value is not None:
                env[leaf] = value
        return env

    def _clash(
        self,
        leaf: Leaf,
        equations: Sequence[Equation],
        caps: Mapping[Leaf, int],
        sizes: Mapping[Leaf, int],
        known: Mapping[Leaf, int],
    ) -> _Conflict:
        """Equations that want different values of one attribute: the smallest wins, the others' dimensions shrink."""
        value = caps.get(leaf, LIMIT)
        envs = [self._environment(e, sizes, known) for e in equations]
        for equation, env in zip(equations, envs, strict=True):
            target = sizes[equation.target]
            fits = invert(equation.tree, leaf, [(target, target)], env, equation.source) or invert(
                equation.tree, leaf, [(-LIMIT, target)], env, equation.source
            )
            if not fits or fits[-1][1] >= LIMIT:
                raise _Conflict([], [equation])
            value = min(value, fits[-1][1])
        demands: list[Demand] = []
        for equation, env in zip(equations, envs, strict=True):
            bound = evaluate(equation.tree, {**env, leaf: value}, equation.source)
            if bound < sizes[equation.target]:
                demands.append((Shrink(equation.target, bound, equation),))
        return _Conflict(demands, equations)

    def _check(
        self,
        equation: Equation,
        env: dict[Leaf, int],
        sizes: Mapping[Leaf, int],
        known: Mapping[Leaf, int],
        unknown: set[Leaf],
    ) -> None:
        """Raise the conflict of an equation whose leaves are all settled, if it does not hold."""
        target = sizes[equation.target]
        try:
            value = evaluate(equation.tree, env, equation.source)
        except ZeroDivisionError:
            raise _Conflict([], [equation]) from None
        if value == target:
            return
        if value < target:
            ways: list[Shrink | Lower] = [Shrink(equation.target, value, equation)]
            for leaf in equation.attributes:
                if leaf in unknown:  # a divisor that comes down lets the dimension keep its size
                    enough = invert(equation.tree, leaf, [(target, LIMIT)], env, equation.source)
                    enough = intersect(enough, [(1, env[leaf] - 1)])
                    ways += [Lower(leaf, enough[-1][1])] if enough else []
            raise _Conflict([tuple(ways)], [equation])
        # Prefer what fits exactly, then the attribute whose value is the size of an axis of the dimension.
        options: list[tuple[tuple[bool, ...], Shrink | Lower]] = []
        for leaf in equation.leaves:
            below: Domain = [(-LIMIT, env[leaf] - 1)]
            exact = intersect(invert(equation.tree, leaf, [(target, target)], env, equation.source), below)
            floor = exact or intersect(
                invert(equation.tree, leaf, [(-LIMIT, target)], env, equation.source), below
            )
            if not floor or floor[-1][1] < 1:
                continue
            bound = floor[-1][1]
            if leaf[0] == "shape":
                options.append(((not exact, True, True), Shrink(leaf, bound, equation)))
            elif leaf in unknown:
                named = any(self.axes[a].size == self.old.get(leaf) for a in self.axes_of(equation.target))
                options.append(((not exact, not named, False), Lower(leaf, bound)))
        options.sort(key=lambda option: option[0])
        raise _Conflict([tuple(move for _, move in options)] if options else [], [equation])

    def _evidence(self, leaf: Leaf, removed: Mapping[int, int]) -> list[int]:
        """New sizes of the axes (and whole dimensions) that an attribute's old value names, most telling first."""
        old = self.old.get(leaf)
        out: dict[int, None] = {}
        for index in self._by_leaf[leaf]:
            for axis in self.axes_of(self.equations[index].target):
                size = self.axes[axis].size
                if old is None or size == old:
                    out[size - removed.get(axis, 0)] = None
        return list(out)

    def _candidates(
        self, leaf: Leaf, domain: Domain, removed: Mapping[int, int], sizes: Mapping[Leaf, int]
    ) -> list[int]:
        """Values to try for an attribute that deduction left open, the likeliest first."""
        old = self.old.get(leaf)
        wanted = dict.fromkeys(self._evidence(leaf, removed))
        lo, hi = domain[0][0], domain[-1][1]
        if old is not None:
            wanted[old] = None
            if lo > -LIMIT and hi < LIMIT:  # keep the remainder that a division threw away
                wanted[lo + (old - lo) % (hi - lo + 1)] = None
        if hi < LIMIT:
            wanted[hi] = None
        if lo > -LIMIT:
            wanted[lo] = None
        if old is None or not wanted:
            for index in self._by_leaf[leaf]:
                target = sizes[self.equations[index].target]
                wanted.update(dict.fromkeys(d for d in range(target, 0, -1) if target % d == 0))
        return [value for value in wanted if any(a <= value <= b for a, b in domain)]
