"""How tensors and arrays cross into C: what is refused, with which words, and that nothing leaks or is taken twice."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from dlpack_producer import COPIED, CUDA, READ_ONLY, Producer, Versioned, name_of

from llmprune import _core
from llmprune.errors import LlmpruneError, TensorError


def read(tensor: Any) -> np.ndarray:
    """Row sums of |w| of a (3, 4) tensor: a call that only reads."""
    rows = np.zeros(3)
    _core.tensor_scores(tensor, None, None, "l1", [rows, None])
    return rows


def write(tensor: Any) -> _core.Block:
    """A call that writes, and changes nothing: every column stays."""
    return _core.compact(tensor, {1: np.arange(4)})


def matrix(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(12, dtype=torch.float32).reshape(3, 4).to(dtype)


ROWS = [6.0, 22.0, 38.0]


# --- what is accepted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floating_types_are_read(dtype: torch.dtype) -> None:
    assert read(matrix(dtype)).tolist() == ROWS


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.bfloat16,
        torch.float64,
    ],
)
def test_compaction_takes_every_element_type(dtype: torch.dtype) -> None:
    tensor = matrix(dtype)
    expected = tensor[:, [0, 3]].clone()
    assert _core.compact(tensor, {1: np.array([0, 3])}).shape == (3, 2)
    assert torch.equal(tensor.flatten()[:6].reshape(3, 2), expected)


def test_numpy_arrays_are_tensors_too() -> None:
    assert read(matrix().numpy()).tolist() == ROWS


def test_a_producer_is_asked_for_a_versioned_capsule_on_no_stream() -> None:
    producer = Producer(matrix())
    assert read(producer).tolist() == ROWS
    assert producer.asked == [{"stream": None, "max_version": (1, 0), "copy": False}]
    assert [name_of(capsule) for capsule in producer.capsules] == ["used_dltensor_versioned"]


def test_a_producer_from_before_dlpack_1_is_asked_again() -> None:
    producer = Producer(matrix(), legacy=True)
    assert read(producer).tolist() == ROWS
    assert producer.asked[1] == {"stream": None}
    assert [name_of(capsule) for capsule in producer.capsules] == ["used_dltensor"]


def test_missing_strides_mean_row_major() -> None:
    def drop(managed: Versioned) -> None:
        managed.tensor.strides = None

    assert read(Producer(matrix(), drop)).tolist() == ROWS


def test_the_byte_offset_is_applied() -> None:
    def shift(managed: Versioned) -> None:
        managed.tensor.data -= 16
        managed.tensor.byte_offset += 16

    assert read(Producer(matrix(), shift)).tolist() == ROWS


def test_read_only_is_fine_for_reading() -> None:
    array = matrix().numpy().copy()
    array.flags.writeable = False
    assert read(array).tolist() == ROWS


def test_strides_of_dimensions_of_size_one_do_not_matter() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)[:, None, :].as_strided((3, 1, 4), (4, 999, 1))
    outs: list[np.ndarray | None] = [np.zeros(3), None, None]
    _core.tensor_scores(tensor, None, None, "l1", outs)
    assert outs[0] is not None
    assert outs[0].tolist() == ROWS


# --- what is refused --------------------------------------------------------------------------------------------


def read_only(managed: Versioned) -> None:
    managed.flags |= READ_ONLY


def copied(managed: Versioned) -> None:
    managed.flags |= COPIED


def major_2(managed: Versioned) -> None:
    managed.major = 2


def two_lanes(managed: Versioned) -> None:
    managed.tensor.lanes = 2


def on_cuda(managed: Versioned) -> None:
    managed.tensor.device_type = CUDA


def unaligned(managed: Versioned) -> None:
    managed.tensor.byte_offset += 1


def negative_size(managed: Versioned) -> None:
    managed.tensor.shape[0] = -3


def no_sizes(managed: Versioned) -> None:
    managed.tensor.shape = None


def far_stride(managed: Versioned) -> None:
    managed.tensor.strides[0] = 1 << 62


def lowest_stride(managed: Versioned) -> None:
    managed.tensor.strides[1] = -(1 << 63)


def back_stride(managed: Versioned) -> None:
    managed.tensor.strides[0] = -(1 << 59)


def far_offset(managed: Versioned) -> None:
    managed.tensor.byte_offset = (1 << 64) - 4


def frozen_array() -> np.ndarray:
    array = matrix().numpy().copy()
    array.flags.writeable = False
    return array


REFUSED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "no tensor": (
        lambda: [[1.0]],
        read,
        r"weight: expected a tensor \(an object with __dlpack__\), got list",
    ),
    "meta device": (
        lambda: matrix().to("meta"),
        read,
        "weight: the tensor is on device meta; move it to the CPU",
    ),
    "cuda on the CPU's own": (
        lambda: Producer(matrix(), device=(CUDA, 0)),
        write,
        "tensor: the tensor is on device cuda",
    ),
    "cuda by capsule": (lambda: Producer(matrix(), on_cuda), read, "the capsule's tensor is on device cuda"),
    "odd device": (lambda: Producer(matrix(), device=None), read, "must return a .type, index. pair"),
    "nameless device": (lambda: Producer(matrix(), device=("x", 0)), read, "does not say which device"),
    "gradient": (
        lambda: matrix().requires_grad_(),
        read,
        r"requires gradients; hand over tensor\.detach\(\)",
    ),
    "sparse": (lambda: matrix().to_sparse(), read, "weight: "),
    "complex": (lambda: matrix(torch.complex64), read, r"unsupported element type \(DLPack code 5, 64 bits"),
    "float8": (lambda: matrix(torch.float8_e4m3fn), read, "unsupported element type"),
    "lanes": (lambda: Producer(matrix(), two_lanes), read, "2 lanes"),
    "integers": (lambda: matrix(torch.int32), read, "weight: expected floating-point numbers, got int32"),
    "version": (lambda: Producer(matrix(), major_2), read, r"speaks DLPack 2\.\d+ and llmprune speaks 1\.x"),
    "unaligned": (lambda: Producer(matrix(), unaligned), read, "not aligned to its 4-byte elements"),
    "negative size": (
        lambda: Producer(matrix(), negative_size),
        read,
        "dimension 0 has the impossible size -3",
    ),
    "no sizes": (lambda: Producer(matrix(), no_sizes), read, "has 2 dimensions and gives no sizes"),
    "far stride": (
        lambda: Producer(matrix(), far_stride),
        write,
        "dimension 0 has the impossible stride 4611686018427387904",
    ),
    "lowest stride": (lambda: Producer(matrix(), lowest_stride), write, "the impossible stride -9223372036"),
    "before address 0": (lambda: Producer(matrix(), back_stride), write, "strides lead beyond the address"),
    "behind the last address": (lambda: Producer(matrix(), far_offset), read, "begins beyond the address"),
    "device -1": (
        lambda: Producer(matrix(), device=(CUDA, -1)),
        read,
        "on the impossible device number -1",
    ),
    "device 2^32": (
        lambda: Producer(matrix(), device=(CUDA, 1 << 32)),
        read,
        "on the impossible device number 4294967296",
    ),
    "nine dimensions": (lambda: torch.zeros([1] * 9), read, "has 9 dimensions; at most 8"),
    "transposed": (
        lambda: matrix().reshape(4, 3).t(),
        read,
        r"not contiguous; hand over tensor\.contiguous\(\)",
    ),
    "empty": (lambda: torch.zeros(3, 0), read, "weight: the tensor has no elements"),
    "scalar": (lambda: torch.zeros(()), read, "weight: the tensor has no dimensions"),
    "read-only flag": (lambda: Producer(matrix(), read_only), write, "tensor: the tensor is read-only"),
    "read-only array": (frozen_array, write, "tensor: .*read-?only"),
    "copy": (lambda: Producer(matrix(), copied), write, "handed over a copy"),
    "slice": (lambda: torch.zeros(3, 8)[:, :4], write, "do not fill one dense block"),
    "expanded": (lambda: torch.zeros(3, 1).expand(3, 4), write, "do not fill one dense block"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_sentence(case: str) -> None:
    make, call, sentence = REFUSED[case]
    tensor = make()
    with pytest.raises(TensorError, match=sentence) as caught:
        call(tensor)
    assert isinstance(caught.value, LlmpruneError)
    assert "\n" not in str(caught.value)


def test_a_list_may_change_while_what_stands_in_it_is_adopted() -> None:
    rows, columns = np.zeros(3), np.zeros(4)
    outs: list[Any] = [rows, columns]
    _core.tensor_scores(Producer(matrix(), lambda tensor: outs.clear()), None, None, "l1", outs)
    assert outs == []
    np.testing.assert_array_equal(rows, matrix().abs().sum(1).numpy())
    np.testing.assert_array_equal(columns, matrix().abs().sum(0).numpy())


def test_a_dimension_listed_twice_is_refused() -> None:
    class Key:
        def __index__(self) -> int:
            return 1

    first, second = np.array([0, 1]), np.array([0, 2])
    counts = [sys.getrefcount(array) for array in (first, second)]
    with pytest.raises(TensorError, match="kept: dimension 1 is listed twice"):
        _core.compact(matrix(), {Key(): first, Key(): second})  # type: ignore[dict-item]
    assert [sys.getrefcount(array) for array in (first, second)] == counts


def test_a_refused_capsule_is_given_back_once_and_not_marked_as_used() -> None:
    producer = Producer(matrix(), major_2)
    with pytest.raises(TensorError):
        read(producer)
    assert [name_of(capsule) for capsule in producer.capsules] == ["dltensor_versioned"]
    producer.capsules.clear()
    gc.collect()
    assert producer.deleted == 1


def test_an_adopted_capsule_is_given_back_once() -> None:
    producer = Producer(matrix())
    read(producer)
    assert producer.deleted == 1
    producer.capsules.clear()
    gc.collect()
    assert producer.deleted == 1


def test_a_capsule_is_consumed_once() -> None:
    producer = Producer(matrix())
    read(producer)
    used = producer.capsules[0]

    class Again:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

        def __dlpack__(self, **keywords: Any) -> Any:
            return used

    with pytest.raises(TensorError, match="no DLPack capsule that is still unused"):
        read(Again())
    assert producer.deleted == 1


def test_the_producers_own_exception_is_the_cause() -> None:
    with pytest.raises(TensorError, match=r"without a copy \(conjugated\)") as caught:
        read(Producer(matrix(), error=BufferError("conjugated")))
    assert isinstance(caught.value.__cause__, BufferError)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_what_is_no_refusal_passes_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)):
        read(Producer(matrix(), error=error))


# --- NumPy arrays -----------------------------------------------------------------------------------------------


def locked(size: int) -> np.ndarray:
    array = np.zeros(size)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([0.0, 0.0, 0.0], r"outs\[0\]: expected a NumPy array of float64, got list"),
        (np.zeros(3, np.float32), r"expected an array of float64, got one of buffer format 'f'"),
        (np.zeros(3, ">f8"), "expected an array of float64"),
        (np.zeros((3, 1)), "expected an array of 1 dimension, got 2"),
        (np.zeros(4), r"dimension 0 has 4 elements, expected 3"),
        (np.zeros(6)[::2], r"not contiguous; pass numpy\.ascontiguousarray"),
        (locked(3), "the array is read-only"),
        (np.frombuffer(bytearray(25), np.uint8)[1:].view(np.float64), "not aligned"),
    ],
)
def test_score_arrays_are_checked(rows: Any, sentence: str) -> None:
    with pytest.raises(TensorError, match=sentence):
        _core.tensor_scores(matrix(), None, None, "l1", [rows, None])


@pytest.mark.parametrize(
    ("positions", "sentence"),
    [
        (np.array([0, 4]), r"kept\[1\]: position 4 is outside 0\.\.3"),
        (np.array([-1, 2]), "position -1 is outside"),
        (np.array([2, 1]), "position 1 follows 2; positions must be sorted and unique"),
        (np.array([1, 1]), "position 1 follows 1"),
        (np.array([], np.int64), "no position is kept"),
        (np.array([0, 1], np.int32), "expected an array of int64"),
        (np.array([0.0, 1.0]), "expected an array of int64"),
        ([0, 1], "expected a NumPy array of int64, got list"),
    ],
)
def test_positions_are_checked_before_anything_moves(positions: Any, sentence: str) -> None:
    tensor = matrix()
    with pytest.raises(TensorError, match=sentence):
        _core.compact(tensor, {1: positions})
    assert torch.equal(tensor, matrix())


def test_nothing_leaks() -> None:
    tensor, rows, kept = matrix().numpy(), np.zeros(3), np.arange(4)
    bad = np.array([3, 1])
    counts = [sys.getrefcount(item) for item in (tensor, rows, kept, bad)]
    for _ in range(200):
        _core.tensor_scores(tensor, None, None, "l1", [rows, None])
        _core.compact(tensor, {1: kept})
        with pytest.raises(TensorError):
            _core.compact(tensor, {1: bad})
        with pytest.raises(TensorError):
            _core.tensor_scores(tensor, None, None, "l1", [rows, rows])
        with pytest.raises(TensorError):
            _core.tensor_scores(tensor, tensor[:2], None, "vector", [rows, None])
    gc.collect()
    assert [sys.getrefcount(item) for item in (tensor, rows, kept, bad)] == counts
    rows.resize(5)  # would raise if a buffer were still held
