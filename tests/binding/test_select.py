"""_core.rank and _core.merge: what they accept, what they refuse, and numpy as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprune import _core
from llmprune.errors import TensorError


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, 1.5, float("inf"), -2.0]), max_size=50))
def test_rank_is_a_stable_sort(values: list[float]) -> None:
    scores = np.array(values, dtype=np.float64)
    order = np.empty(len(scores), dtype=np.int64)
    _core.rank(scores, order)
    assert order.tolist() == np.argsort(scores, kind="stable").tolist()


@given(st.lists(st.lists(st.integers(0, 5).map(float), max_size=8), min_size=1, max_size=6))
def test_merging_sorted_axes_is_a_stable_sort_of_their_keys(axes: list[list[float]]) -> None:
    keys = np.concatenate([np.empty(0), *(np.sort(axis) for axis in axes)])
    offsets = np.cumsum([0, *map(len, axes)]).astype(np.int64)
    sequence = np.empty(len(keys), dtype=np.int64)
    _core.merge(keys, offsets, sequence)
    owner = np.repeat(np.arange(len(axes)), [len(axis) for axis in axes])
    assert sequence.tolist() == owner[np.argsort(keys, kind="stable")].tolist()


def test_what_is_no_array_of_numbers_is_refused() -> None:
    scores, order = np.zeros(3), np.empty(3, dtype=np.int64)
    with pytest.raises(TensorError, match="scores: expected an array of float64"):
        _core.rank(scores.astype(np.float32), order)  # type: ignore[arg-type]
    with pytest.raises(TensorError, match="order: expected an array of int64"):
        _core.rank(scores, order.astype(np.int32))  # type: ignore[arg-type]
    with pytest.raises(TensorError, match="expected an array of 1 dimension, got 2"):
        _core.rank(np.zeros((3, 1)), order)
    with pytest.raises(
        TensorError, match=r"order: dimension 0 has 3 elements, expected 2 \(one for each score\)"
    ):
        _core.rank(scores[:2], order)
    with pytest.raises(TensorError, match="order shares memory with scores"):
        _core.rank(order.view(np.float64), order)
    with pytest.raises(ValueError, match="not a number"):
        _core.rank(np.array([0.0, np.nan, 0.0]), order)
    with pytest.raises(TensorError, match="not contiguous"):
        _core.rank(np.zeros(6)[::2], order)
    order.flags.writeable = False
    with pytest.raises(TensorError, match="order: the array is read-only"):
        _core.rank(scores, order)
    with pytest.raises(TensorError, match="got list"):
        _core.rank([0.0], order)  # type: ignore[arg-type]


def test_offsets_must_span_the_keys() -> None:
    keys, sequence = np.zeros(3), np.empty(3, dtype=np.int64)
    for wrong in ([0, 2], [], [0, 4]):
        with pytest.raises(ValueError, match="offsets must end at the number of keys"):
            _core.merge(keys, np.array(wrong, dtype=np.int64), sequence)
    with pytest.raises(ValueError, match="end before they begin"):
        _core.merge(keys, np.array([0, 5, 3], dtype=np.int64), sequence)
