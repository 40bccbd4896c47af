"""_core.Graph writes into arrays it is given and reads counts it is given: sizes and ranges are checked first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmprune import _core
from llmprune.errors import TraceError

INPUT, UP, HIDDEN, DOWN, OUTPUT = range(5)
FFN = 0
"""The one prunable axis: 4 hidden features, rows of UP and columns of DOWN."""

TENSORS: list[list[Any]] = [
    [[2, 3], "f", 0, "input", "x"],
    [[4, 3], "f", 1, "parameter", "up"],
    [[2, 4], "f", 2, "value", ""],
    [[5, 4], "f", 3, "parameter", "down"],
    [[2, 5], "f", 4, "value", ""],
]
LINEARS: list[list[Any]] = [
    ["aten::linear", 0, [1, INPUT, 1, UP, 0], [HIDDEN], 0],
    ["aten::linear", 0, [1, HIDDEN, 1, DOWN, 0], [OUTPUT], 0],
]


@pytest.fixture
def graph() -> Any:
    return _core.Graph(TENSORS, LINEARS, [OUTPUT])


def axis_count(graph: Any) -> int:
    return len(graph.axes())


def test_the_graph_is_what_the_other_tests_take_it_for(graph: Any) -> None:
    size, _kind, prunable, _notes, members = graph.axes()[FFN]
    assert (size, prunable) == (4, True)
    assert [(tensor, dim) for tensor, dim, _, _ in members] == [(UP, 0), (DOWN, 1)]
    assert graph.removed_positions(DOWN, 1, 4, {FFN: [1, 3]}).tolist() == [False, True, False, True]


@pytest.mark.parametrize("size", [-1, 0, 3, 5, 1 << 40])
def test_removed_positions_refuses_another_size_than_the_dimensions(graph: Any, size: int) -> None:
    with pytest.raises(ValueError, match="has 4 positions"):
        graph.removed_positions(DOWN, 1, size, {FFN: [3]})


@pytest.mark.parametrize("place", [(99, 0), (DOWN, 2)])
def test_removed_positions_refuses_a_dimension_that_is_not_there(graph: Any, place: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not on the tape"):
        graph.removed_positions(*place, 4, {FFN: [0]})


def test_removed_positions_holds_on_to_the_dict_while_it_converts_its_values(graph: Any) -> None:
    removed: dict[int, Any] = {}

    class Emptying:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            removed.clear()
            return np.array([2], dtype=np.int64)

    removed[FFN] = Emptying()
    assert graph.removed_positions(UP, 0, 4, removed).tolist() == [False, False, True, False]


@pytest.mark.parametrize("size", [0, 3, 5])
def test_mark_ragged_refuses_flags_of_another_size(graph: Any, size: int) -> None:
    with pytest.raises(ValueError, match="has 4 positions"):
        graph.mark_ragged(FFN, 0, FFN, np.zeros((4, 1), dtype=np.int64), np.zeros(size, dtype=np.bool_))


def test_a_dimension_names_its_atoms_axes_or_not(graph: Any) -> None:
    atoms = graph.atoms()
    assert len(set(atoms)) == axis_count(graph)
    assert graph.dim_atoms(UP, 0) == [atoms[FFN]]
    with pytest.raises(ValueError, match="not on the tape"):
        graph.dim_atoms(UP, 2)


@pytest.mark.parametrize("count", [-1, 5, np.iinfo(np.int64).min, np.iinfo(np.int64).max])
def test_an_axis_cannot_lose_fewer_than_none_or_more_than_all(graph: Any, count: int) -> None:
    removed = np.zeros(axis_count(graph), dtype=np.int64)
    removed[FFN] = count
    for query in (
        graph.numel,
        graph.macs,
        graph.macs_each,
        lambda counts: graph.new_sizes(counts, np.array([[UP, 0]])),
    ):
        with pytest.raises(ValueError, match=f"cannot lose {count} indices"):
            query(removed)
    removed[FFN] = 4
    assert graph.new_sizes(removed, np.array([[UP, 0]])).tolist() == [0]


def test_a_pad_of_more_dimensions_than_there_are_freezes_what_it_touches() -> None:
    tensors = [*TENSORS, [[2, 4], "f", 5, "value", ""]]
    pad = ["aten::constant_pad_nd", 0, [1, HIDDEN, 4, 40, *[0] * 40, 3, 0], [5], 0]
    into_down = ["aten::linear", 0, [1, 5, 1, DOWN, 0], [OUTPUT], 0]
    axes = _core.Graph(tensors, [LINEARS[0], pad, into_down], [OUTPUT]).axes()
    assert not any(prunable for _, _, prunable, _, _ in axes)


class Clearing:
    """An int that empties the list it stands in when it is read."""

    def __init__(self, target: list[Any], value: int) -> None:
        self.target, self.value = target, value

    def __index__(self) -> int:
        self.target.clear()
        return self.value


def test_a_tape_may_change_while_it_is_read() -> None:
    sizes: list[Any] = [2, 3]
    tensor: list[Any] = [sizes, "f", 0, "input", "x"]
    code: list[Any] = [1, INPUT, 1, UP, 0]
    op: list[Any] = ["aten::linear", 0, code, [HIDDEN], 0]
    outputs: list[Any] = [HIDDEN, OUTPUT]
    sizes[0], tensor[2] = Clearing(sizes, 2), Clearing(tensor, 0)
    code[0], code[1] = Clearing(code, 1), Clearing(op, INPUT)
    outputs[0] = Clearing(outputs, HIDDEN)
    graph = _core.Graph([tensor, *TENSORS[1:]], [op, LINEARS[1]], outputs)
    assert (sizes, tensor, code, op, outputs) == ([], [], [], [], [])
    assert graph.dim_axes(UP, 0) == graph.dim_axes(DOWN, 1)


def test_an_axis_listed_twice_is_refused(graph: Any) -> None:
    class Odd(int):
        __hash__ = int.__hash__

        def __eq__(self, other: object) -> bool:
            return self is other

    with pytest.raises(ValueError, match="axis 0 is listed twice"):
        graph.removed_positions(UP, 0, 4, {Odd(FFN): [1], Odd(FFN): [2]})


@pytest.mark.parametrize(
    ("tensors", "ops", "outputs", "error"),
    [
        ([["no sizes"]], [], [], ValueError),
        ([[[2], "f", 0, "friend", ""]], [], [], ValueError),
        ([[["2"], "f", 0, "input", ""]], [], [], TypeError),
        (TENSORS, [["aten::linear"]], [], ValueError),
        (TENSORS, [["aten::linear", 0, [1], [], 0]], [], TraceError),
        (TENSORS, LINEARS, [5], TraceError),
        (TENSORS, LINEARS, "x", TypeError),
        (None, [], [], TypeError),
    ],
)
def test_a_malformed_tape_is_refused(tensors: Any, ops: Any, outputs: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        _core.Graph(tensors, ops, outputs)
