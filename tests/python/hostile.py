"""What the tests of hostile input share: odd values, and JSON documents with something odd in them."""

from __future__ import annotations

import copy
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# The suite tries the same few every time; LLMPRUNE_EXAMPLES=2000 tries others.
WISHED = os.environ.get("LLMPRUNE_EXAMPLES")
EXAMPLES = settings(
    max_examples=int(WISHED or 40),
    deadline=None,
    derandomize=WISHED is None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 7, 10**6, 2**31, 2**63, 2**64, -(2**63), 10**30])
TEXTS = st.sampled_from(
    [
        "",
        "0",
        "-1",
        "0-4",
        "5-2",
        "0-99999999999",
        "1,1",
        "x",
        "../x",
        "/etc/hostname",
        "a\0b",
        "é" * 40,
        "cuda:7",
    ]
)
FLOATS = st.sampled_from([0.0, -0.0, 0.5, -2.5, 1e308, float("inf"), float("-inf"), float("nan")])
ODD = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    TEXTS,
    FLOATS,
    st.sampled_from([[], {}, [[]], [1, 2], ["x"], {"x": 1}, {"0": "0-3"}, [[0, 1], [2]], {"": {"": None}}]),
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, entry in entries:
        found += _places(entry, (*path, key))
    return found


@st.composite
def spoilt(draw: st.DrawFn, document: dict[str, Any]) -> Any:
    """A copy of a JSON document in which one to three entries are gone, doubled, exchanged or odd."""
    value = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(value)
        if not places:
            break
        *path, last = draw(st.sampled_from(places))
        owner = value
        for key in path:
            owner = owner[key]
        act = draw(st.sampled_from(["odd", "odd", "gone", "exchanged", "more"]))
        if act == "odd":
            owner[last] = copy.deepcopy(draw(ODD))
        elif act == "gone":
            del owner[last]
        elif act == "exchanged":
            other = draw(st.sampled_from(places))
            taken: Any = document
            for key in other:
                taken = taken[key] if isinstance(taken, dict | list) and _has(taken, key) else None
            owner[last] = copy.deepcopy(taken)
        elif isinstance(owner, dict):
            owner[draw(TEXTS)] = copy.deepcopy(draw(ODD))
        else:
            owner.append(copy.deepcopy(draw(ODD)))
    return value


def _has(owner: Any, key: Any) -> bool:
    return key in owner if isinstance(owner, dict) else isinstance(key, int) and key < len(owner)


def torn(data: bytes) -> st.SearchStrategy[bytes]:
    """Bytes with one of them changed, or an end cut off, or more behind."""
    place = st.integers(0, len(data) - 1)
    return st.one_of(
        st.tuples(place, st.integers(0, 255)).map(
            lambda at: data[: at[0]] + bytes([at[1]]) + data[at[0] + 1 :]
        ),
        place.map(lambda at: data[:at]),
        st.binary(min_size=1, max_size=9).map(lambda more: data + more),
        st.binary(max_size=40),
    )
