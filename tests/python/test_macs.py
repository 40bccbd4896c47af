"""Multiply-accumulates of operations on a tape written by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llmprune.pipeline.prune import traced_tokens
from llmprune.tracing import tape as codes
from llmprune.tracing.graph import Graph
from llmprune.tracing.tape import Tape


def tensors(*shapes: tuple[int, ...]) -> list[list[Any]]:
    return [[list(shape), "f", i, "value", ""] for i, shape in enumerate(shapes)]


def args(*values: Any) -> list[int]:
    """Tensor ids as t0, t1; None; lists of ints; bools."""
    out: list[int] = []
    for value in values:
        if value is None:
            out.append(codes.NONE)
        elif isinstance(value, str):
            out += [codes.TENSOR, int(value[1:])]
        elif isinstance(value, bool):
            out += [codes.BOOL, int(value)]
        elif isinstance(value, list):
            out += [codes.INTS, len(value), *value]
        else:
            out += [codes.INT, value]
    return out


def graph(name: str, code: list[int], outputs: list[int], *shapes: tuple[int, ...]) -> Graph:
    tape = Tape(
        tensors=tensors(*shapes), ops=[[f"aten::{name}", 0, code, outputs, 0]], scopes=[""], outputs=outputs
    )
    return Graph(tape, fingerprint="")


CASES = [
    ("mm", args("t0", "t1"), [2], [(3, 5), (5, 7), (3, 7)], 3 * 5 * 7),
    ("addmm", args("t3", "t0", "t1", None, None), [2], [(3, 5), (5, 7), (3, 7), (7,)], 3 * 5 * 7),
    ("bmm", args("t0", "t1"), [2], [(2, 3, 5), (2, 5, 7), (2, 3, 7)], 2 * 3 * 5 * 7),
    (
        "baddbmm",
        args("t3", "t0", "t1", 1, 1),
        [2],
        [(2, 3, 5), (2, 5, 7), (2, 3, 7), (2, 3, 7)],
        2 * 3 * 5 * 7,
    ),
    ("linear", args("t0", "t1", None), [2], [(2, 3, 5), (7, 5), (2, 3, 7)], 2 * 3 * 5 * 7),
    ("mv", args("t0", "t1"), [2], [(3, 5), (5,), (3,)], 15),
    ("_grouped_mm", args("t0", "t1", "t3", None, None), [2], [(6, 5), (4, 5, 7), (6, 7), (4,)], 6 * 5 * 7),
    (
        "scaled_dot_product_attention",
        args("t0", "t1", "t2", None, 0, False),
        [3],
        [(2, 4, 3, 8), (2, 2, 9, 8), (2, 2, 9, 6), (2, 4, 3, 6)],
        2 * 4 * 3 * 9 * (8 + 6),
    ),
    (
        "convolution",
        args("t0", "t1", None, [1], [0], [1], False, [0], 2),
        [2],
        [(2, 6, 10), (4, 3, 5), (2, 4, 6)],
        2 * 4 * 6 * 3 * 5,
    ),
    (
        "convolution",
        args("t0", "t1", None, [1], [0], [1], True, [0], 1),
        [2],
        [(2, 6, 10), (6, 3, 5), (2, 3, 14)],
        2 * 6 * 10 * 3 * 5,
    ),
    ("add", args("t0", "t0", 1), [1], [(3, 5), (3, 5)], 0),
]


@pytest.mark.parametrize(("name", "code", "outputs", "shapes", "expected"), CASES)
def test_one_operation(name: str, code: list[int], outputs: list[int], shapes: Any, expected: int) -> None:
    assert graph(name, code, outputs, *shapes).macs({}) == expected


def test_tokens_of_the_traced_pass() -> None:
    tape = Tape(tensors=[[[2, 7], "i", 0, "input", "input_ids"]])
    assert traced_tokens(SimpleNamespace(tape=tape)) == 14
    assert traced_tokens(SimpleNamespace(tape=Tape())) is None
