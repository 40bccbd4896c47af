"""In-place and out-of-place compaction through the binding, against PyTorch's indexing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune import _core

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64]


def random_tensor(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-100, 100, shape, generator=generator).to(dtype)


def taken(tensor: torch.Tensor, kept: dict[int, np.ndarray]) -> torch.Tensor:
    for dim, positions in kept.items():
        tensor = tensor.index_select(dim, torch.from_numpy(positions))
    return tensor


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], dict[int, np.ndarray]]:
    """A shape and the kept positions of some of its dimensions: nearly all, few, one, or a run."""
    shape = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    if draw(st.booleans()):
        shape[-1] = draw(st.integers(1, 300))
    kept = {}
    for dim in draw(st.lists(st.integers(0, len(shape) - 1), unique=True)):
        size = shape[dim]
        share = draw(st.sampled_from([0.05, 0.5, 0.8, 0.97, 1.0]))
        mask = np.random.default_rng(draw(st.integers(0, 2**31))).random(size) < share
        if draw(st.booleans()):
            first = draw(st.integers(0, size - 1))
            mask[first : first + draw(st.integers(1, size))] = True
        if not mask.any():
            mask[draw(st.integers(0, size - 1))] = True
        kept[dim] = np.flatnonzero(mask)
    return shape, kept


@settings(max_examples=150, deadline=None)
@given(cut=cuts(), dtype=st.sampled_from(DTYPES), threads=st.sampled_from([1, 2]), seed=st.integers(0, 2**31))
def test_equals_indexing(
    cut: tuple[list[int], dict[int, np.ndarray]], dtype: torch.dtype, threads: int, seed: int
) -> None:
    shape, kept = cut
    tensor = random_tensor(shape, dtype, seed)
    before, want = tensor.clone(), taken(tensor, kept)
    into = random_tensor(list(want.shape), dtype, seed + 1)
    _core.compact_into(into, tensor, kept, threads)
    assert torch.equal(into, want)
    assert torch.equal(tensor, before)
    got = torch.from_dlpack(_core.compact(tensor, kept, threads))
    assert got.data_ptr() == tensor.data_ptr()
    assert torch.equal(got, want)


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_large_tensors_with_threads(dims: tuple[int, ...], threads: int, dtype: torch.dtype) -> None:
    tensor = random_tensor([3000, 1700], dtype, seed=threads)
    rng = np.random.default_rng(threads)
    kept = {dim: np.flatnonzero(rng.random(tensor.shape[dim]) < 0.8) for dim in dims}
    want = taken(tensor, kept)
    _core.compact(tensor, kept, threads)
    assert torch.equal(tensor.flatten()[: want.numel()].reshape(want.shape), want)


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_slices_of_a_larger_storage_leave_the_rest_alone(dims: tuple[int, ...]) -> None:
    storage = random_tensor([5000], torch.float32, seed=9)
    tensor = storage[1000:3400].view(20, 4, 30)
    rng = np.random.default_rng(0)
    kept = {dim: np.sort(rng.permutation(tensor.shape[dim])[: tensor.shape[dim] // 2]) for dim in dims}
    want, before, behind = taken(tensor, kept), storage[:1000].clone(), storage[3400:].clone()
    _core.compact(tensor, kept)
    assert torch.equal(tensor.flatten()[: want.numel()].reshape(want.shape), want)
    assert torch.equal(storage[:1000], before)
    assert torch.equal(storage[3400:], behind)


def _memory(field: str) -> int:
    """A field of this process's status in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def test_nothing_the_size_of_the_tensor_is_allocated() -> None:
    reset = Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        pytest.skip("the peak of resident memory can only be reset on Linux")
    tensor = torch.ones(4096, 8192)  # 128 MiB
    kept = {0: np.arange(0, 4096, 2), 1: np.flatnonzero(np.arange(8192) % 5 > 0)}
    before = _memory("VmRSS")
    reset.write_text("5", encoding="ascii")
    _core.compact(tensor, kept, 2)
    assert _memory("VmHWM") - before < 8 * 1024
