"""What `_core.compact` hands back: the smaller tensor, as a DLPack producer over the memory it was compacted in."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from dlpack_producer import managed, name_of

from llmprune import _core

EVEN = {1: np.array([0, 2])}


def matrix(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(12, dtype=torch.float32).reshape(3, 4).to(dtype)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool],
)
def test_torch_adopts_the_memory_itself(dtype: torch.dtype) -> None:
    tensor = matrix(dtype)
    want = tensor[:, ::2].clone()
    block = _core.compact(tensor, EVEN)
    got = torch.from_dlpack(block)
    assert block.shape == (3, 2)
    assert block.__dlpack_device__() == (1, 0)
    assert got.data_ptr() == tensor.data_ptr()
    assert got.dtype == dtype
    assert torch.equal(got, want)
    got.zero_()
    assert not tensor.flatten()[:6].any()


def test_numpy_adopts_it_too() -> None:
    array = np.from_dlpack(_core.compact(matrix(), EVEN))
    assert array.tolist() == [[0, 2], [4, 6], [8, 10]]


def test_the_memory_lives_as_long_as_anything_that_names_it() -> None:
    source = np.arange(12.0).reshape(3, 4)
    alive = weakref.ref(source)
    block = _core.compact(source, EVEN)
    del source
    got = np.from_dlpack(block)
    del block
    gc.collect()
    assert alive() is not None
    assert got.tolist() == [[0, 2], [4, 6], [8, 10]]
    del got
    gc.collect()
    assert alive() is None


def test_a_capsule_nobody_adopts_gives_the_memory_back() -> None:
    source = np.arange(12.0).reshape(3, 4)
    alive = weakref.ref(source)
    block = _core.compact(source, EVEN)
    capsules = [block.__dlpack__(), block.__dlpack__(max_version=(1, 0))]
    del source, block
    assert alive() is not None
    capsules.clear()
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({}, "dltensor"),
        ({"max_version": (0, 8)}, "dltensor"),
        ({"max_version": (1, 0)}, "dltensor_versioned"),
        ({"max_version": (2, 3), "dl_device": (1, 0), "copy": False, "stream": None}, "dltensor_versioned"),
    ],
)
def test_the_capsule_is_of_the_version_asked_for(asked: dict[str, Any], name: str) -> None:
    capsule = _core.compact(matrix(), EVEN).__dlpack__(**asked)
    assert name_of(capsule) == name
    if name == "dltensor_versioned":
        assert (managed(capsule).major, managed(capsule).flags) == (1, 0)


@pytest.mark.parametrize(
    ("asked", "error", "sentence"),
    [
        ({"stream": 1}, BufferError, "no stream"),
        ({"copy": True}, BufferError, "its own memory"),
        ({"dl_device": (2, 0)}, BufferError, r"not on DLPack device \(2, 0\)"),
        ({"max_version": 1}, TypeError, "max_version must be"),
        ({"max_version": (1, "a")}, TypeError, "integer"),
    ],
)
def test_what_it_cannot_serve_it_refuses(
    asked: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    block = _core.compact(matrix(), EVEN)
    with pytest.raises(error, match=sentence):
        block.__dlpack__(**asked)


def test_only_calls_of_ours_make_blocks() -> None:
    with pytest.raises(TypeError, match="cannot create"):
        _core.Block()  # type: ignore[call-arg]


def test_a_block_can_be_compacted_again() -> None:
    first = _core.compact(matrix(), EVEN)
    second = _core.compact(first, {0: np.array([0, 2])})
    assert torch.from_dlpack(second).tolist() == [[0, 2], [8, 10]]


def test_a_tensor_may_die_in_another_thread() -> None:
    source = np.arange(12.0).reshape(3, 4)
    alive = weakref.ref(source)
    held = [torch.from_dlpack(_core.compact(source, EVEN))]
    del source
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    gc.collect()
    assert alive() is None


def test_a_tensor_may_outlive_the_interpreter() -> None:
    code = (
        "import builtins, numpy as np, torch; from llmprune import _core;"
        "builtins.kept = torch.from_dlpack(_core.compact(torch.ones(3, 4), {1: np.array([0, 2])}));"
        "builtins.unused = _core.compact(torch.ones(3, 4), {}).__dlpack__(max_version=(1, 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
