"""One list of cases for both backends, against a float64 oracle: fresh random inputs, poisoned outputs, all edges.

float32 and float64 lie within 1e-5 of it, 16-bit inputs too: their products are exact in float32.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from llmprune import _core
from llmprune.errors import DeviceError, TensorError
from llmprune.machine import cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [1, 2, 7, 31, 33, 127, 128, 129, 257]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@functools.cache
def generator() -> np.random.Generator:
    return np.random.default_rng()


def values(*shape: int, dtype: torch.dtype, device: str, pitch: int = 0) -> torch.Tensor:
    """Random values whose rows lie ``pitch`` elements farther apart than they must."""
    whole = torch.from_numpy(generator().standard_normal((*shape[:-1], shape[-1] + pitch)))
    return whole.to(device, dtype)[..., : shape[-1]]


def sums(size: int, device: str) -> Any:
    """Where a kernel adds up, poisoned with something that is there already."""
    return (
        np.full(size, 3.0)
        if device == "cpu"
        else torch.full((size,), 3.0, dtype=torch.float64, device=device)
    )


def added(out: Any) -> torch.Tensor:
    return torch.as_tensor(out).double().cpu() - 3.0


def importance(
    weight: torch.Tensor, x: torch.Tensor, dy: torch.Tensor, samples: int, order: int, absolute: bool
) -> torch.Tensor:
    w, x, dy = (t.double().cpu().abs() if absolute else t.double().cpu() for t in (weight, x, dy))
    each = torch.einsum("jto,jti->joi", dy.unflatten(0, (samples, -1)), x.unflatten(0, (samples, -1)))
    first, second = each.mean(0) * w, 0.5 * w * each.square().mean(0) * w
    if order == 1:
        return first.abs()
    return first + second if absolute else (first - second).abs()


def check_linear(
    out: int,
    features: int,
    samples: int,
    tokens: int,
    dtype: torch.dtype,
    order: int,
    device: str,
    pitch: int,
) -> None:
    weight = values(out, features, dtype=dtype, device=device)
    x = values(samples * tokens, features, dtype=dtype, device=device, pitch=pitch)
    dy = values(samples * tokens, out, dtype=dtype, device=device, pitch=pitch)
    row, col = sums(out, device), sums(features, device)
    _core.linear_scores(weight, x, dy, samples, order, row, col, **cuda.options(weight))
    want = importance(weight, x, dy, samples, order, False)
    bound = importance(weight, x, dy, samples, order, True)
    for got, dim in ((row, 1), (col, 0)):
        assert bool(((added(got) - want.sum(dim)).abs() <= 1e-5 * bound.sum(dim) + 1e-12).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_scores(dtype: torch.dtype, order: int, device: str) -> None:
    for out in SIZES:
        features = int(generator().choice(SIZES))
        tokens = int(generator().choice([1, 15, 16, 17, 31, 33, 65]))
        aligned = -features % 8 if out % 8 == 0 else int(generator().integers(4))
        check_linear(out, features, int(generator().integers(1, 5)), tokens, dtype, order, device, aligned)
    for out, features in ((128, 256), (136, 120), (264, 8)):  # rows that begin on 16 bytes: the fused kernel
        check_linear(out, features, 3, 40, dtype, order, device, 0)


@pytest.mark.cuda
@pytest.mark.parametrize("order", [1, 2])
def test_linear_scores_of_a_large_layer_equal_the_cpus(order: int) -> None:
    weight = values(1024, 1536, dtype=torch.bfloat16, device="cuda")
    x = values(10 * 64, 1536, dtype=torch.bfloat16, device="cuda")
    dy = values(10 * 64, 1024, dtype=torch.bfloat16, device="cuda")
    got = sums(1024, "cuda"), sums(1536, "cuda")
    want = sums(1024, "cpu"), sums(1536, "cpu")
    _core.linear_scores(weight, x, dy, 10, order, *got, **cuda.options(weight))
    _core.linear_scores(weight.cpu(), x.cpu(), dy.cpu(), 10, order, *want)
    again = sums(1024, "cuda"), sums(1536, "cuda")
    _core.linear_scores(weight, x, dy, 10, order, *again, **cuda.options(weight))
    for a, b, c in zip(got, want, again, strict=True):
        torch.testing.assert_close(added(a), added(b), rtol=1e-5, atol=0)
        assert torch.equal(a, c), "two runs differ"


@pytest.mark.cuda
@pytest.mark.parametrize("order", [1, 2])
def test_the_products_of_warpgroups_give_the_same_sums(order: int) -> None:
    """In processes of their own: the kernel is chosen when the device is opened."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma needs compute capability 9.0")
    code = """
import sys, torch
from llmprune import _core
from llmprune.machine import cuda
for dtype in (torch.bfloat16, torch.float16):
    for out, features, samples, tokens in ((1024, 1536, 5, 128), (200, 264, 3, 100), (8, 8, 2, 17), (640, 128, 2, 193),
                                           (4096, 11008, 2, 64), (2560, 4104, 3, 65)):
        torch.manual_seed(0)
        w, x, dy = (torch.randn(n, m, device="cuda").to(dtype) for n, m in
                    ((out, features), (samples * tokens, features), (samples * tokens, out)))
        row, col = (torch.zeros(n, dtype=torch.float64, device="cuda") for n in (out, features))
        _core.linear_scores(w, x, dy, samples, ORDER, row, col, **cuda.options(w))
        print(*row.tolist(), *col.tolist())
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", code.replace("ORDER", str(order))],
            env={**os.environ, "LLMPRUNE_CUDA_WGMMA": way},
            capture_output=True,
            text=True,
            timeout=300,
        )
        for way in ("0", "1")
    ]
    for run in runs:
        assert run.returncode == 0, run.stderr
    plain, groups = (np.array(run.stdout.split(), dtype=np.float64) for run in runs)
    np.testing.assert_allclose(groups, plain, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_scores(dtype: torch.dtype, device: str) -> None:
    for shape in ((1,), (33,), (5000,), (7, 31), (129, 33), (3, 900), (700, 3), (4, 5, 40), (6, 4, 3, 3)):
        w, g, s = (values(*shape, dtype=dtype, device=device) for _ in range(3))
        for kind, formula in (
            ("vector", lambda w, g, s: g * w),
            ("element2", lambda w, g, s: (g * w - 0.5 * w * s * w).abs()),
            ("l2", lambda w, g, s: w * w),
        ):
            outs = [sums(n, device) for n in shape]
            _core.tensor_scores(w, g, s, kind, outs, **cuda.options(w))
            element = formula(*(t.double().cpu() for t in (w, g, s)))
            for dim, out in enumerate(outs):
                want = element.movedim(dim, 0).reshape(len(out), -1).sum(1)
                torch.testing.assert_close(added(out), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
def test_dots_and_squares(device: str) -> None:
    for rows, columns in ((1, 1), (63, 33), (640, 257)):
        a, b = (values(rows, columns, dtype=torch.float32, device=device) for _ in range(2))
        out = sums(columns, device)
        _core.dot_columns(a, b, out, **cuda.options(a))
        torch.testing.assert_close(added(out), (a.double() * b.double()).sum(0).cpu(), rtol=1e-9, atol=1e-9)
        acc = values(rows, columns, dtype=torch.float32, device=device)
        want = acc.double() + 0.25 * b.double().square()
        _core.accumulate_square(acc, b, 0.25, **cuda.options(acc, scratch=False))
        torch.testing.assert_close(acc.double(), want, rtol=1e-6, atol=1e-7)


def cut(shape: tuple[int, ...], share: float) -> dict[int, np.ndarray]:
    kept = {}
    for dim, size in enumerate(shape):
        stay = np.flatnonzero(generator().random(size) < share)
        if generator().random() < 0.8:
            kept[dim] = stay if len(stay) else np.array([int(generator().integers(size))])
    return kept


def picked(tensor: torch.Tensor, kept: dict[int, np.ndarray]) -> torch.Tensor:
    for dim, positions in kept.items():
        tensor = tensor.index_select(dim, torch.as_tensor(positions, device=tensor.device))
    return tensor.contiguous()


CUTS = [(1,), (5000,), (64, 64), (300, 1100), (7, 3000), (4096, 1024), (5, 6, 70), (12, 5, 3, 3)]


@pytest.mark.cuda
@pytest.mark.parametrize("share", [0.0, 0.2, 0.8, 0.999, 1.0])
def test_compaction_in_place_and_into_other_memory(share: float) -> None:
    dtypes = (torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors, kepts, wants = [], [], []
    for shape in CUTS:
        for dtype in dtypes:
            tensor = values(*shape, dtype=torch.float64, device="cuda").mul(50).to(dtype).contiguous()
            kept = cut(shape, share)
            want = picked(tensor, kept)
            word = words[tensor.element_size()]
            target = torch.full_like(want, 99)
            _core.compact_into(target.view(word), tensor.view(word), kept, **cuda.options(tensor))
            assert torch.equal(target, want)
            tensors.append(tensor)
            kepts.append(kept)
            wants.append(want)
    cuda.compact_many([t.view(words[t.element_size()]) for t in tensors], kepts)
    for tensor, want in zip(tensors, wants, strict=True):
        assert torch.equal(tensor.view(-1)[: want.numel()].view(want.shape), want)


@pytest.mark.cuda
def test_large_matrices_move_in_waves() -> None:
    tensors = [torch.randn(11008, 4096, device="cuda").bfloat16() for _ in range(3)]
    kepts = [cut(tuple(t.shape), share) for t, share in zip(tensors, (0.8, 0.99, 0.5), strict=True)]
    wants = [picked(t, kept) for t, kept in zip(tensors, kepts, strict=True)]
    cuda.compact_many([t.view(torch.int16) for t in tensors], kepts)
    for tensor, want in zip(tensors, wants, strict=True):
        assert torch.equal(tensor.view(-1)[: want.numel()].view(want.shape), want)


@pytest.fixture
def stream() -> Iterator[torch.cuda.Stream]:
    mine = torch.cuda.Stream()
    mine.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(mine):
        yield mine


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_in_a_captured_graph(dtype: torch.dtype, stream: torch.cuda.Stream) -> None:
    weight, x, dy = (values(*s, dtype=dtype, device="cuda") for s in ((128, 64), (96, 64), (96, 128)))
    row, col = sums(128, "cuda"), sums(64, "cuda")
    options = cuda.options(weight)  # opens the device, and lends the scratch beyond the capture
    _core.linear_scores(weight, x, dy, 3, 2, row, col, **options)
    want = row.clone() - 3.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        _core.linear_scores(weight, x, dy, 3, 2, row, col, **options)
        with pytest.raises(DeviceError, match="cudaErrorStreamCaptureUnsupported"):
            _core.compact_many([weight], [{0: np.array([1])}], options["scratch"], stream=options["stream"])
    row.fill_(0.0)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(row, want)


@pytest.mark.cuda
def test_tensors_on_different_devices_are_refused() -> None:
    x = torch.ones(2, 2, device="cuda")
    with pytest.raises(TensorError, match="all must be on one device"):
        _core.dot_columns(x, x.cpu(), sums(2, "cuda"), **cuda.options(x))
    with pytest.raises(MemoryError, match="scratch"):
        _core.dot_columns(x, x, sums(2, "cuda"))
    _core.dot_columns(x, x, sums(2, "cuda"), **cuda.options(x))  # nothing sticks
    torch.cuda.synchronize()
