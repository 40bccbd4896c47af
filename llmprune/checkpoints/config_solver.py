"""The stock checkpoint form: find the config from which the stock class builds exactly the pruned model.

Nothing is known about any architecture. The solver changes one number of the config at a time, builds the model on the
meta device (no memory, milliseconds) and sees which tensor sizes and module attributes move; then it solves for the
sizes that pruning left. Sizes are sums of products of fields, so a few Newton steps on integers end exactly. Fields
that are ratios (``mlp_ratio``) or values (a norm's epsilon) are solved for in floating point.

Fields that move nothing in common (those of a text and of a vision tower) are solved for apart. Where there is no
solution, :attr:`Solver.obstacle` says what stood in the way.

What it finds has the right shapes. That is no proof: a proposal counts only once the reloaded model's outputs are equal
(:mod:`llmprune.checkpoints.stock_form` sees to that), so proposals come in order, the one that changes the fewest
fields first.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from llmprune.checkpoints.record import AttributeValue, Compaction
from llmprune.checkpoints.universal import build_on_meta, non_persistent_buffers, stock_class, tensors_of

Key = tuple[str | int, ...]
"""What is observed: (tensor, dim), or (module, attribute, index or -1)."""

Field = tuple[Any, ...]
"""A place in a config's dictionary: names, and positions in lists. Or several places that hold the same number."""

Number = int | float

MAX_FIELDS = 5
"""Fields of one kind of size that one proposal may change."""

STEPS = 4
"""Newton steps before a choice of fields is given up; two are enough for products of two changed fields."""

_SOLUTIONS = 3  # of each independent part of a config
_RATIO = 8  # integer fields up to this size may be ratios that do not stay whole (an expansion of 2)

REFUSALS = (
    ValueError,
    TypeError,
    RuntimeError,
    AssertionError,
    ArithmeticError,
    LookupError,
    AttributeError,
    NotImplementedError,
    StrictDataclassError,
)
"""What building with an unusual number may raise: a config's own checks, or a module that cannot be made that way."""


class Solver:
    """Looks for configs from which a class builds the tensors and recorded attributes of a pruned model.

    Args:
        model: the compacted model.
        record: its record.
        base: the config it is to be built from before cutting.
        kind: the class to build; None: the stock class of ``model``.

    Attributes:
        obstacle: after :meth:`proposals` has ended: why there were none (or no more), a clause that names the tensor.
        ragged: whether pruning left layers unlike that were alike, and no config lists their sizes.
    """

    def __init__(self, model: Any, record: Compaction, base: Any, kind: type[Any] | None = None) -> None:
        self.obstacle, self.ragged = "", False
        self._config = type(base).__name__
        ignored = _unreached(model, record)
        self._target = _observe(model, record.attributes, ignored)
        for attribute in record.attributes:
            self._target[_key(attribute)] = attribute.value
        self._whole = _Builder(kind or stock_class(model), base, record.attributes, ignored=ignored)

    def proposals(self) -> Iterator[Any]:
        """Complete configs, those that change fewer fields first."""
        target, whole = self._target, self._whole
        start = whole.observe({})
        if start is None or start.keys() != target.keys():
            odd = [] if start is None else sorted(map(str, start.keys() ^ target.keys()))
            self.obstacle = f"its class builds other tensors from {self._config}" + (
                f" ({odd[0]})" if odd else ""
            )
            return
        if start == target:
            yield whole.config({})
            return
        ragged = _ragged(start, target)
        small = whole
        if not ragged:
            small = _reduced(whole, start)
        elif not any(len(place) > 1 and isinstance(place[-1], int) for place in whole.fields()):
            self.obstacle, self.ragged = self._unequal(ragged, start), True
            return
        values, given = whole.fields(), set()
        for solution in self._solutions(small):
            changes = {place: value for place, value in solution.items() if values.get(place) != value}
            if frozenset(changes.items()) not in given and whole.observe(changes) == target:
                given.add(frozenset(changes.items()))
                yield whole.config(changes)
        if ragged and not given:
            self.obstacle, self.ragged = self._unequal(ragged, start), True

    def _unequal(self, keys: tuple[Key, Key], start: Mapping[Key, Number]) -> str:
        """The sentence for layers that pruning left unlike."""
        (one, dim), (other, _) = keys[0][:2], keys[1][:2]
        if len(keys[0]) > 2:
            return f"{one}.{dim} and {other}.{dim} differ, and {self._config} states one value for all"
        return (
            f"{one} keeps {self._target[keys[0]]} of {start[keys[0]]} in dimension {dim} and {other} keeps "
            f"{self._target[keys[1]]}, and {self._config} states one size for both: prune layers alike (a ratio for "
            "each kind, and protect_first and protect_last 0)"
        )

    def _solutions(self, builder: _Builder) -> Iterator[dict[Field, Number]]:
        """Changes that give the target in a (shallower) model, by rising number of fields.

        First of the fields that the config states. Then also of those it leaves open: a head width that follows from
        the number of heads moves the wrong sizes, until it is stated.
        """
        start = builder.observe({})
        if start is None:
            return
        target = {key: self._target[key] for key in start}
        wrong = {key for key in start if start[key] != target[key]}
        if not wrong:
            yield {}
            return
        values = builder.fields()
        yield from self._choices(builder, values, {}, start, target, wrong)
        stated = _unset_fields(builder, start, wrong)
        if stated:
            yield from self._choices(
                builder.stating(stated), {**values, **stated}, stated, start, target, wrong
            )

    def _choices(
        self,
        builder: _Builder,
        values: Mapping[Field, Number],
        stated: Mapping[Field, Number],
        start: Mapping[Key, Number],
        target: Mapping[Key, Number],
        wrong: set[Key],
    ) -> Iterator[dict[Field, Number]]:
        """Solutions that change few fields, ``stated`` ones included."""
        effects, silent, joint = _effects(builder, values, start)
        values = {**values, **joint}
        useful = {place: moved for place, moved in effects.items() if moved.keys() & wrong}
        if missed := sorted(wrong - {key for moved in useful.values() for key in moved}, key=str):
            self.obstacle = f"no field of {self._config} sizes {_told(missed[0], start, target)}"
            return
        # Apart first; but what moves no size in common may still be checked in common (a width that heads divide).
        for groups in (_independent(useful), [list(useful)]):
            parts = []
            for together in groups:
                keys = {key for place in together for key in useful[place]}
                own = {place: values[place] for place in together}
                found = _part_solutions(builder, own, silent, useful, start, target, wrong & keys)
                parts.append(list(itertools.islice(found, _SOLUTIONS)))
                if not parts[-1]:
                    self.obstacle = self._unsolved(builder, together, wrong & keys, start, target)
                    break
            if all(parts) or not builder.refusal:
                break
        for chosen in sorted(itertools.product(*parts), key=lambda part: sum(map(len, part))):
            solved = {place: value for part in chosen for place, value in part.items()}
            yield {**stated, **{one: value for place, value in solved.items() for one in _places(place)}}

    def _unsolved(
        self,
        builder: _Builder,
        together: Iterable[Field],
        wrong: set[Key],
        start: Mapping[Key, Number],
        target: Mapping[Key, Number],
    ) -> str:
        """The sentence for fields that size the wrong tensors, but cannot be given values that do."""
        if builder.refusal:
            return f"{self._config} cannot state it: {builder.refusal}"
        names = ", ".join(sorted({_spelt(place) for place in together}))
        told = _told(min(wrong, key=lambda key: (len(key) > 2, str(key))), start, target)
        return f"no values of {names} in {self._config} give {told} its size and leave the others theirs"


@dataclass
class _Builder:
    """Builds a class from a config with some numbers changed."""

    kind: type[Any]
    base: Any
    attributes: Iterable[AttributeValue]
    depths: tuple[tuple[Field, int, int], ...] = ()
    """Fields to set lower, their values, and the lower values: a model with fewer layers shows the same."""
    ignored: Set[str] = frozenset()
    """Tensors that are not observed."""
    refusal: str = ""
    """Why values that would have given the wanted sizes were refused, if any were."""
    seen: dict[frozenset[tuple[Field, Number]], dict[Key, Number] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values: dict[str, Any] = self.base.to_dict()
        self.nested = _nested_configs(self.base)
        for place, old, new in self.depths:
            _put(self.values, place, new)
            _truncate(self.values if len(place) == 1 else self.values[str(place[0])], old, new)

    def stating(self, values: Mapping[Field, Number]) -> _Builder:
        """A builder whose config says what it left to the class."""
        other = copy.copy(self)
        other.values, other.seen, other.refusal = copy.deepcopy(self.values), {}, ""
        for place, value in values.items():
            _put(other.values, place, value)
        return other

    def config(self, changes: Mapping[Field, Number]) -> Any:
        """The config with ``changes``, as it would be read from a file."""
        values = copy.deepcopy(self.values)
        for place, value in changes.items():
            _put(values, place, value)
        return type(self.base).from_dict(values)

    def build(self, changes: Mapping[Field, Number], wanted: bool = False) -> Any | None:
        """A model on the meta device; None where the config or the class refuses the values."""
        try:
            return build_on_meta(self.kind, self.config(changes))
        except REFUSALS as error:
            if wanted:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                said = re.sub(r"^\w+Error: ", "", lines[-1]) if lines else type(error).__name__
                self.refusal = self.refusal or said.rstrip(".")[:200]
            return None

    def observe(self, changes: Mapping[Field, Number], wanted: bool = False) -> dict[Key, Number] | None:
        """Sizes and attributes of :meth:`build`, each set of changes built once."""
        key = frozenset(changes.items())
        if key not in self.seen or (wanted and self.seen[key] is None):
            model = self.build(changes, wanted)
            self.seen[key] = None if model is None else _observe(model, self.attributes, self.ignored)
        return self.seen[key]

    def fields(self) -> dict[Field, Number]:
        """Every positive number of the config and of the configs inside it."""
        return dict(_numbers(self.values, self.nested))


def _part_solutions(
    builder: _Builder,
    values: Mapping[Field, Number],
    silent: Mapping[Field, Number],
    effects: Mapping[Field, Mapping[Key, float]],
    start: Mapping[Key, Number],
    target: Mapping[Key, Number],
    wrong: set[Key],
) -> Iterator[dict[Field, Number]]:
    """Values of a few of the fields ``values`` that give the target wherever these fields move anything."""
    keys = {key for place in values for key in effects[place]}
    for number in range(1, min(MAX_FIELDS, len(values)) + 1):
        for chosen in itertools.combinations(values, number):
            if not wrong <= {key for place in chosen for key in effects[place]}:
                continue
            at = {place: values[place] for place in chosen}
            whole = {place for place in chosen if isinstance(at[place], int)}
            solved = _solve(builder, at, whole, silent, effects, start, target, keys)
            ratios = {place for place in whole if at[place] <= _RATIO}
            if solved is None and ratios:
                solved = _solve(builder, at, whole - ratios, {}, effects, start, target, keys)
            if solved is not None:
                yield solved


def _effects(
    builder: _Builder, values: Mapping[Field, Number], start: Mapping[Key, Number]
) -> tuple[dict[Field, dict[Key, float]], dict[Field, Number], dict[Field, Number]]:
    """What every field moves.

    Returns:
        Field -> slopes of what it moves. Then the integer fields that move nothing. Then pairs of fields that add or
        take tensors away when one moves alone, and move sizes together (a hidden size and the embeddings' width), as
        one field; what else adds or takes tensors (a depth) is left out.
    """
    effects: dict[Field, dict[Key, float]] = {}
    silent: dict[Field, Number] = {}
    odd: dict[Field, Number] = {}
    for place, value in values.items():
        moved = _moved(builder, {}, place, value, start)
        if moved:
            effects[place] = moved
        elif isinstance(value, int):
            (odd if moved is None else silent)[place] = value
    joint: dict[Field, Number] = {}
    for one, other in itertools.combinations(odd, 2):
        if odd[one] == odd[other] and one[:-1] == other[:-1]:
            moved = _moved(builder, {}, (one, other), odd[one], start)
            if moved:
                effects[one, other], joint[one, other] = moved, odd[one]
    return effects, silent, joint


def _moved(
    builder: _Builder, at: Mapping[Field, Number], place: Field, value: Number, start: Mapping[Key, Number]
) -> dict[Key, float] | None:
    """Slope of every size that moves with one field, by the nearest value that can be built.

    None where that has other tensors.
    """
    for other in _nearby(value):
        seen = builder.observe({**at, place: other})
        if seen is not None:
            if seen.keys() != start.keys():
                return None
            return {key: (seen[key] - n) / (other - value) for key, n in start.items() if seen[key] != n}
    return {}


def _nearby(value: Number) -> list[Number]:
    """Values to try in place of ``value``: near ones show slopes best, multiples and divisors pass checks."""
    if isinstance(value, float):
        return [2 * value, value / 2, 1.5 * value]
    divisors = [value // d for d in (2, 3, 5, 7) if value > d and value % d == 0]
    return [
        other for other in (value + 1, value - 1, 2 * value, *divisors, 3 * value, value + 2) if other > 0
    ]


def _independent(effects: Mapping[Field, Mapping[Key, float]]) -> list[list[Field]]:
    """The fields in groups that have no moved size in common."""
    groups: list[tuple[set[Key], list[Field]]] = []
    for place, moved in effects.items():
        keys, members = set(moved), [place]
        apart = []
        for other, fields in groups:
            if other & keys:
                keys |= other
                members = fields + members
            else:
                apart.append((other, fields))
        groups = [*apart, (keys, members)]
    return [members for _, members in groups]


def _solve(
    builder: _Builder,
    chosen: Mapping[Field, Number],
    whole: set[Field],
    silent: Mapping[Field, Number],
    effects: Mapping[Field, Mapping[Key, float]],
    start: Mapping[Key, Number],
    target: Mapping[Key, Number],
    keys: set[Key],
) -> dict[Field, Number] | None:
    """Values of the chosen fields that give the target at ``keys``, by Newton's method; None if there are none near."""
    at, seen = dict(chosen), start
    exact = {value for value in target.values() if isinstance(value, float)}
    for step in range(STEPS):
        slopes = [effects[f] if step == 0 else _moved(builder, at, f, v, seen) or {} for f, v in at.items()]
        rows = sorted(
            {key for slope in slopes for key in slope} | {k for k in keys if seen[k] != target[k]}, key=str
        )
        matrix = np.array([[slope.get(key, 0.0) for slope in slopes] for key in rows])
        missing = np.array([target[key] - seen[key] for key in rows], dtype=np.float64)
        change = np.linalg.lstsq(matrix, missing, rcond=None)[0]
        now = None
        fits = bool(np.abs(matrix @ change - missing).max(initial=0.0) < 0.5) and len(whole) == len(at)
        # A value half way between two whole ones may have a neighbour that the config refuses.
        for integer in (round, math.floor, math.ceil):
            moved = {
                f: max(1, integer(v + float(by))) if f in whole else _clean(v + float(by), exact)
                for (f, v), by in zip(at.items(), change, strict=True)
            }
            if moved == at or any(value <= 0 for value in moved.values()):
                return None
            now = builder.observe(moved, wanted=fits)
            if now is not None:
                break
        if now is None and fits:
            moved = _accompanied(builder, at, moved, silent)
            now = builder.observe(moved)
        if now is None or now.keys() != start.keys():
            return None
        at, seen = moved, now
        if all(seen[key] == target[key] for key in keys):
            return at
    return None


def _accompanied(
    builder: _Builder, at: Mapping[Field, Number], moved: dict[Field, Number], silent: Mapping[Field, Number]
) -> dict[Field, Number]:
    """``moved``, which is refused, with a field that sizes nothing brought down in proportion, if that is not.

    A number of heads that only divides the hidden size shows in no tensor.
    """
    shares = {Fraction(int(moved[place]), int(value)) for place, value in at.items()} - {Fraction(1)}
    for place, value in silent.items():
        for share in shares:
            other = int(value) * share
            if other.denominator == 1 and builder.observe({**moved, place: int(other)}) is not None:
                return {**moved, place: int(other)}
    return moved


def _clean(value: float, exact: Iterable[float]) -> float:
    """``value`` without the rounding of its computation: a value asked for, or the shortest number beside it."""
    for wanted in exact:
        if math.isclose(value, wanted, rel_tol=1e-6):
            return wanted
    short = float(f"{value:.12g}")
    # A ratio that does not end is rounded up: a size is the integer part of its product.
    return short if len(repr(short)) < 12 else value * (1 + 1e-13)


def _unset_fields(
    builder: _Builder, start: Mapping[Key, Number], wrong: Iterable[Key]
) -> dict[Field, Number]:
    """Fields that the config leaves out or None, and the class fills in itself, with the value it fills in.

    Found by building with a config that notes which names were asked for in vain. The value is that of a module
    attribute of the same name, or a size that has to change; it is right if building with it changes nothing.
    """
    names = _missing_names(builder)
    model = builder.build({})
    sizes = sorted({start[key] for key in wrong if isinstance(start[key], int)})
    found: dict[Field, Number] = {}
    for place in names:
        if builder.observe({place: 3}) == builder.observe({place: 5}) == start:
            continue  # it sizes nothing
        attributes = [vars(module).get(str(place[-1])) for module in model.modules()] if model else []
        for value in (*sorted({v for v in attributes if type(v) is int and v > 0}), *sizes):
            if builder.observe({place: value}) == start and _moved(builder, {}, place, value, start):
                found[place] = value
                break
    return found


def _missing_names(builder: _Builder) -> list[Field]:
    """Fields that are None or absent and that the class asks for when it is built."""
    asked: set[Field] = set()
    config = builder.config({})
    for prefix, inner in [((), config), *(((name,), getattr(config, name)) for name in builder.nested)]:
        asked.update((*prefix, name) for name, value in vars(inner).items() if value is None)
        inner.__class__ = _watching(type(inner), prefix, asked)
    try:
        with torch.device("meta"):
            builder.kind(config)
    except REFUSALS:
        return []
    return sorted((place for place in asked if not str(place[-1]).startswith("_")), key=str)


def _watching(kind: type[Any], prefix: Field, asked: set[Field]) -> type[Any]:
    """A config class that notes the names it has no value for."""

    def note(self: Any, name: str) -> Any:
        asked.add((*prefix, name))
        raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")

    return type(kind.__name__, (kind,), {"__getattr__": note})


def _reduced(whole: _Builder, start: Mapping[Key, Number]) -> _Builder:
    """A builder of a shallower model in which every kind of tensor still occurs; ``whole`` where there is none.

    Layers of a real model are many and alike. A field is a depth if setting it lower only takes tensors away; a model
    with several stacks of layers has several.
    """
    model = whole.build({})
    lengths = {len(m) for m in model.modules() if isinstance(m, nn.ModuleList)} if model else set()
    kinds = {pattern_of(key) for key in start}
    best, count = whole, len(start)
    for place, value in whole.fields().items():
        if value not in lengths or not isinstance(value, int) or value <= 2:
            continue
        for depth in (2, 4, 8):
            if depth >= value:
                break
            depths = (*best.depths, (place, value, depth))
            smaller = _Builder(whole.kind, whole.base, whole.attributes, depths, whole.ignored)
            seen = smaller.observe({})
            if seen is None or len(seen) == count or any(start.get(key) != n for key, n in seen.items()):
                break  # no depth
            if {pattern_of(key) for key in seen} == kinds:
                best, count = smaller, len(seen)
                break
    return best


def _ragged(start: Mapping[Key, Number], target: Mapping[Key, Number]) -> tuple[Key, Key] | None:
    """Two sizes of layers of one kind that were alike and no longer are; None where there are none."""
    groups: dict[tuple[Key, Number], Key] = {}
    for key, size in start.items():
        first = groups.setdefault((pattern_of(key), size), key)
        if target[first] != target[key]:
            return first, key
    return None


def pattern_of(key: Key) -> Key:
    """A key with layer numbers taken out of the names."""
    return tuple(re.sub(r"\d+", "*", part) if isinstance(part, str) else part for part in key)


def _told(key: Key, start: Mapping[Key, Number], target: Mapping[Key, Number]) -> str:
    """A wrong size in words."""
    if len(key) == 2:
        return f"{key[0]} in dimension {key[1]} ({target[key]} instead of {start[key]})"
    return f"{key[0]}.{key[1]} ({target[key]} instead of {start[key]})"


def _places(place: Field) -> tuple[Field, ...]:
    """The single places of a field."""
    return place if isinstance(place[0], tuple) else (place,)


def _spelt(place: Field) -> str:
    return " and ".join(".".join(part for part in one if isinstance(part, str)) for one in _places(place))


def _unreached(model: nn.Module, record: Compaction) -> frozenset[str]:
    """Buffers that their class computes, of which pruning has cut others but not these: copies that nothing reads."""
    computed = {name for name, _ in non_persistent_buffers(model)}
    return frozenset(computed - record.kept.keys()) if computed & record.kept.keys() else frozenset()


def _observe(
    model: nn.Module, attributes: Iterable[AttributeValue], ignored: Set[str] = frozenset()
) -> dict[Key, Number]:
    """Sizes of tensors and values of attributes."""
    seen: dict[Key, Number] = {}
    for name, tensor in tensors_of(model).items():
        if name not in ignored:
            seen.update({(name, dim): size for dim, size in enumerate(tensor.shape)})
    modules = dict(model.named_modules(remove_duplicate=False))
    for attribute in attributes:
        value: Any = modules.get(attribute.module)
        if value is None:
            continue
        for part in attribute.name.split("."):
            value = getattr(value, part, None)
        if attribute.index is not None:
            value = (
                value[attribute.index]
                if isinstance(value, list | tuple) and len(value) > attribute.index
                else None
            )
        seen[_key(attribute)] = value if isinstance(value, int | float) else -1
    return seen


def _key(attribute: AttributeValue) -> Key:
    return (attribute.module, attribute.name, -1 if attribute.index is None else attribute.index)


def _nested_configs(config: Any) -> list[str]:
    return [
        name
        for name, value in vars(config).items()
        if hasattr(value, "to_dict") and hasattr(value, "model_type")
    ]


def _numbers(values: Mapping[str, Any], nested: Iterable[str]) -> Iterator[tuple[Field, Number]]:
    for name, value in values.items():
        if type(value) in (int, float) and 0 < value < math.inf:
            yield (name,), value
        elif isinstance(value, list) and all(type(v) is int for v in value):
            yield from (((name, i), v) for i, v in enumerate(value) if v > 0)
        elif name in nested and isinstance(value, dict):
            yield from (((name, *place), v) for place, v in _numbers(value, ()))


def _put(values: Any, place: Field, value: Number) -> None:
    for one in _places(place):
        owner = values
        for part in one[:-1]:
            owner = owner[part]
        owner[one[-1]] = value


def _truncate(values: Any, old: int, new: int) -> None:
    """Shorten the lists that state something for each layer; a field that is a list itself holds none."""
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, list) and len(value) == old:
            values[name] = value[:new]
        elif isinstance(value, dict):
            _truncate(value, old, new)
