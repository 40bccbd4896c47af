"""Is a JSON document of the make that we write?  What stands in a file that somebody hands over is not believed before.

A make is written with Python's own values: a type or a tuple of types (``int`` does not mean a bool, ``float`` allows
whole numbers, None means null), a function that says whether it takes a value, ``[make]`` for a list, :class:`Table`
for an object with any keys, and a dict for an object with just these keys, of which those that end in ``?`` may be
missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """An object with any keys: whether it takes a key, and the make of its values."""

    key: Callable[[str], bool]
    value: Any


def mismatch(document: Any, make: Any) -> str | None:
    """Where a document is first of another make, a clause (``axes.3.kind is missing``); None where it is not."""
    return _mismatch(document, make, "it")


def _mismatch(value: Any, make: Any, place: str) -> str | None:
    if isinstance(make, list):
        if not isinstance(value, list):
            return f"{place} is {_kind(value)}, not a list"
        return _first(_mismatch(item, make[0], _below(place, i)) for i, item in enumerate(value))
    if isinstance(make, Table | dict) and not isinstance(value, dict):
        return f"{place} is {_kind(value)}, not an object"
    if isinstance(make, Table):
        wrong = next((key for key in value if not make.key(key)), None)
        if wrong is not None:
            return f"{place} has the impossible entry {wrong!r}"
        return _first(_mismatch(entry, make.value, _below(place, key)) for key, entry in value.items())
    if isinstance(make, dict):
        names = {name.rstrip("?"): name for name in make}
        missing = next((key for key, name in names.items() if key == name and key not in value), None)
        if missing is not None:
            return f"{_below(place, missing)} is missing"
        unknown = next((key for key in value if key not in names), None)
        if unknown is not None:
            return f"{place} has the unknown entry {unknown!r}"
        return _first(_mismatch(value[key], make[names[key]], _below(place, key)) for key in value)
    if isinstance(make, type) or make is None or isinstance(make, tuple):
        kinds = make if isinstance(make, tuple) else (make,)
        fits = any(value is None if kind is None else _is(value, kind) for kind in kinds)
    else:
        fits = make(value)
    return None if fits else f"{place} is {_kind(value)}"


def _first(found: Any) -> str | None:
    return next((clause for clause in found if clause is not None), None)


def _below(place: str, name: object) -> str:
    return str(name) if place == "it" else f"{place}.{name}"


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def _kind(value: Any) -> str:
    """A value for people: short ones as they are."""
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"


def natural(value: Any) -> bool:
    """A whole number from 0 on that a size can be."""
    return type(value) is int and 0 <= value < 1 << 62


def positive(value: Any) -> bool:
    """A whole number from 1 on that a size can be."""
    return natural(value) and value > 0


def number(key: str) -> bool:
    """The key of a table by numbers, as we write it."""
    return key.isascii() and key.isdigit() and str(int(key)) == key if len(key) < 19 else False


def anything(key: Any) -> bool:
    """For names, and for values that are looked at elsewhere."""
    return True
