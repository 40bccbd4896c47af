"""The stock checkpoint form: find the config from which the stock class builds exactly the pruned model.

Nothing is known about any architecture. The solver changes one integer of the config at a time, builds the model on the
meta device (no memory, milliseconds) and sees which tensor sizes and module attributes move; then it solves for the
sizes that pruning left. Sizes are sums of products of fields, so a few Newton steps on integers end exactly.

What it finds has the right shapes. That is no proof: a proposal counts only once the reloaded model's outputs are equal
(:mod:`llmprune.checkpoint` sees to that), so proposals come in order, the one that changes the fewest fields first.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from llmprune.record import AttributeValue, Compaction
from llmprune.universal import build_on_meta, stock_class, tensors_of

Key = tuple[str | int, ...]
"""What is observed: (tensor, dim), or (module, attribute, index or -1)."""

Field = tuple[str | int, ...]
"""A place in a config's dictionary: names, and positions in lists."""

MAX_FIELDS = 5
"""Fields that one proposal may change."""

STEPS = 4
"""Newton steps before a choice of fields is given up; two are enough for products of two changed fields."""

# What building with an unusual integer may raise: a config's own checks, or a module that cannot be made that way.
_REFUSALS = (
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


def proposals(model: Any, record: Compaction, base: Any) -> Iterator[Any]:
    """Configs from which the stock class builds a model with the tensors and recorded attributes of ``model``.

    Args:
        model: the compacted model.
        record: its record.
        base: the config it is to be built from before cutting.

    Yields:
        Complete configs, those that change fewer fields first; none where pruning left layers of different sizes and
        the config has no list for them.
    """
    kind = stock_class(model)
    target = _observe(model, record.attributes)
    for attribute in record.attributes:
        target[_key(attribute)] = attribute.value
    whole = _Builder(kind, base, record.attributes)
    start = whole.observe({})
    if start is None or start.keys() != target.keys():
        return
    if start == target:
        yield whole.config({})
        return
    if not _ragged(start, target):
        small = _reduced(whole, start)
    elif any(len(field) > 1 and isinstance(field[-1], int) for field in whole.fields()):
        small = whole  # the config lists sizes for each layer or stage
    else:
        return
    values, given = whole.fields(), set()
    for solution in _solutions(small, target):
        changes = {field: value for field, value in solution.items() if values.get(field) != value}
        if frozenset(changes.items()) not in given and whole.observe(changes) == target:
            given.add(frozenset(changes.items()))
            yield whole.config(changes)


@dataclass
class _Builder:
    """Builds a class from a config with some integers changed."""

    kind: type[Any]
    base: Any
    attributes: Iterable[AttributeValue]
    depth: tuple[Field, int, int] | None = None
    """A field to set lower, its value, and the lower value: a model with fewer layers shows the same."""

    def __post_init__(self) -> None:
        self.values: dict[str, Any] = self.base.to_dict()
        self.nested = _nested_configs(self.base)
        if self.depth is not None:
            field, old, new = self.depth
            _put(self.values, field, new)
            _truncate(self.values, old, new)

    def stating(self, values: Mapping[Field, int]) -> _Builder:
        """A builder whose config says what it left to the class."""
        other = copy.copy(self)
        other.values = copy.deepcopy(self.values)
        for field, value in values.items():
            _put(other.values, field, value)
        return other

    def config(self, changes: Mapping[Field, int]) -> Any:
        """The config with ``changes``, as it would be read from a file."""
        values = copy.deepcopy(self.values)
        for field, value in changes.items():
            _put(values, field, value)
        return type(self.base).from_dict(values)

    def build(self, changes: Mapping[Field, int]) -> Any | None:
        """A model on the meta device; None where the config or the class refuses the values."""
        try:
            return build_on_meta(self.kind, self.config(changes))
        except _REFUSALS:
            return None

    def observe(self, changes: Mapping[Field, int]) -> dict[Key, int] | None:
        """Sizes and attributes of :meth:`build`."""
        model = self.build(changes)
        return None if model is None else _observe(model, self.attributes)

    def fields(self) -> dict[Field, int]:
        """Every integer of the config and of the configs inside it."""
        return dict(_integers(self.values, self.nested))


def _solutions(builder: _Builder, target: Mapping[Key, int]) -> Iterator[dict[Field, int]]:
    """Changes that give the target in a (shallower) model, by rising number of fields.

    First of the fields that the config states. Then also of those it leaves open: a head width that follows from the
    number of heads moves the wrong sizes, until it is stated.
    """
    start = builder.observe({})
    if start is None:
        return
    wrong = {key for key in start if start[key] != target[key]}
    if not wrong:
        yield {}
        return
    values = builder.fields()
    yield from _choices(builder, values, {}, start, target, wrong)
    stated = _unset_fields(builder, start, wrong)
    if stated:
        yield from _choices(builder.stating(stated), {**values, **stated}, stated, start, target, wrong)


def _choices(
    builder: _Builder,
    values: Mapping[Field, int],
    stated: Mapping[Field, int],
    start: Mapping[Key, int],
    target: Mapping[Key, int],
    wrong: set[Key],
) -> Iterator[dict[Field, int]]:
    """Solutions that change few fields, ``stated`` ones included."""
    effects = _effects(builder, values, start)
    useful = [field for field, moved in effects.items() if moved & wrong]
    for number in range(1, min(MAX_FIELDS, len(useful)) + 1):
        for chosen in itertools.combinations(useful, number):
            if wrong <= set().union(*(effects[field] for field in chosen)):
                solved = _solve(builder, {field: values[field] for field in chosen}, start, target)
                if solved is not None:
                    yield {**stated, **solved}


def _effects(
    builder: _Builder, values: Mapping[Field, int], start: Mapping[Key, int]
) -> dict[Field, set[Key]]:
    """Field -> what it moves; fields that move nothing, or add and remove tensors (depths), are left out."""
    effects = {}
    for field, value in values.items():
        moved = _moved(builder, {}, field, value, start)
        if moved:
            effects[field] = set(moved)
    return effects


def _moved(
    builder: _Builder, at: Mapping[Field, int], field: Field, value: int, start: Mapping[Key, int]
) -> dict[Key, float]:
    """Slope of every size that moves with one field, by the nearest value that can be built."""
    for other in _nearby(value):
        seen = builder.observe({**at, field: other})
        if seen is not None:
            if seen.keys() != start.keys():
                return {}
            return {key: (seen[key] - n) / (other - value) for key, n in start.items() if seen[key] != n}
    return {}


def _nearby(value: int) -> list[int]:
    """Values to try in place of ``value``: near ones show slopes best, multiples and divisors pass checks."""
    divisors = [value // d for d in (2, 3, 5, 7) if value > d and value % d == 0]
    return [
        other for other in (value + 1, value - 1, 2 * value, *divisors, 3 * value, value + 2) if other > 0
    ]


def _solve(
    builder: _Builder, chosen: Mapping[Field, int], start: Mapping[Key, int], target: Mapping[Key, int]
) -> dict[Field, int] | None:
    """Integer values of the chosen fields that give the target, by Newton's method; None if there are none near."""
    at, seen = dict(chosen), start
    for _ in range(STEPS):
        slopes = [_moved(builder, at, field, value, seen) for field, value in at.items()]
        keys = sorted(
            {key for slope in slopes for key in slope} | {k for k in seen if seen[k] != target[k]}, key=str
        )
        matrix = np.array([[slope.get(key, 0.0) for slope in slopes] for key in keys])
        missing = np.array([target[key] - seen[key] for key in keys], dtype=np.float64)
        step = np.linalg.lstsq(matrix, missing, rcond=None)[0]
        moved = {f: max(1, round(v + float(d))) for (f, v), d in zip(at.items(), step, strict=True)}
        if moved == at:
            return None
        now = builder.observe(moved)
        if now is None or now.keys() != start.keys():
            return None
        at, seen = moved, now
        if all(seen[key] == target[key] for key in seen):
            return at
    return None


def _unset_fields(builder: _Builder, start: Mapping[Key, int], wrong: Iterable[Key]) -> dict[Field, int]:
    """Fields that the config leaves out or None, and the class fills in itself, with the value it fills in.

    Found by building with a config that notes which names were asked for in vain. The value is that of a module
    attribute of the same name, or a size that has to change; it is right if building with it changes nothing.
    """
    names = _missing_names(builder)
    model = builder.build({})
    sizes = sorted({start[key] for key in wrong})
    found = {}
    for field in names:
        attributes = {vars(module).get(str(field[-1])) for module in model.modules()} if model else set()
        for value in (*sorted(v for v in attributes if type(v) is int and v > 0), *sizes):
            if builder.observe({field: value}) == start and _moved(builder, {}, field, value, start):
                found[field] = value
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
    except _REFUSALS:
        return []
    return sorted((field for field in asked if not str(field[-1]).startswith("_")), key=str)


def _watching(kind: type[Any], prefix: Field, asked: set[Field]) -> type[Any]:
    """A config class that notes the names it has no value for."""

    def note(self: Any, name: str) -> Any:
        asked.add((*prefix, name))
        raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")

    return type(kind.__name__, (kind,), {"__getattr__": note})


def _reduced(whole: _Builder, start: Mapping[Key, int]) -> _Builder:
    """A builder of a shallower model in which every kind of tensor still occurs; ``whole`` where there is none.

    Layers of a real model are many and alike. A field is a depth if setting it lower only takes tensors away.
    """
    model = whole.build({})
    lengths = {len(m) for m in model.modules() if isinstance(m, nn.ModuleList)} if model else set()
    kinds = {_pattern(key) for key in start}
    best = whole
    for field, value in whole.fields().items():
        if value not in lengths or value <= 2:
            continue
        for depth in (2, 4, 8):
            if depth >= value:
                break
            smaller = _Builder(whole.kind, best.base, whole.attributes, (field, value, depth))
            seen = smaller.observe({})
            if seen is None or any(start.get(key) != n for key, n in seen.items()):
                break
            if {_pattern(key) for key in seen} == kinds:
                return smaller
    return best


def _ragged(start: Mapping[Key, int], target: Mapping[Key, int]) -> bool:
    """Whether sizes that were alike in layers of one kind are no longer alike."""
    before: dict[Key, set[int]] = {}
    after: dict[Key, set[int]] = {}
    for key, size in start.items():
        before.setdefault(_pattern(key), set()).add(size)
        after.setdefault(_pattern(key), set()).add(target[key])
    return any(len(sizes) < len(after[pattern]) for pattern, sizes in before.items())


def _pattern(key: Key) -> Key:
    """A key with layer numbers taken out of the names."""
    return tuple(re.sub(r"\d+", "*", part) if isinstance(part, str) else part for part in key)


def _observe(model: nn.Module, attributes: Iterable[AttributeValue]) -> dict[Key, int]:
    seen: dict[Key, int] = {}
    for name, tensor in tensors_of(model).items():
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
        seen[_key(attribute)] = value if isinstance(value, int) else -1
    return seen


def _key(attribute: AttributeValue) -> Key:
    return (attribute.module, attribute.name, -1 if attribute.index is None else attribute.index)


def _nested_configs(config: Any) -> list[str]:
    return [
        name
        for name, value in vars(config).items()
        if hasattr(value, "to_dict") and hasattr(value, "model_type")
    ]


def _integers(values: Mapping[str, Any], nested: Iterable[str]) -> Iterator[tuple[Field, int]]:
    for name, value in values.items():
        if type(value) is int and value > 0:
            yield (name,), value
        elif isinstance(value, list) and all(type(v) is int for v in value):
            yield from (((name, i), v) for i, v in enumerate(value) if v > 0)
        elif name in nested and isinstance(value, dict):
            yield from (((name, *field), v) for field, v in _integers(value, ()))


def _put(values: Any, field: Field, value: int) -> None:
    for part in field[:-1]:
        values = values[part]
    values[field[-1]] = value


def _truncate(values: dict[str, Any], old: int, new: int) -> None:
    """Shorten the lists that state something for each layer."""
    for name, value in values.items():
        if isinstance(value, list) and len(value) == old:
            values[name] = value[:new]
        elif isinstance(value, dict):
            _truncate(value, old, new)
