"""The streaming reductions through the binding: every kind on 1-D to 5-D tensors, vector importance without dW."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune import _core

KINDS = ("vector", "element1", "element2", "l1", "l2")


def elements(w: torch.Tensor, g: torch.Tensor, s: torch.Tensor, kind: str) -> torch.Tensor:
    w, g, s = w.double(), g.double(), s.double()
    values = {
        "vector": g * w,
        "element1": (g * w).abs(),
        "element2": (g * w - 0.5 * w * s * w).abs(),
        "l1": w.abs(),
        "l2": w * w,
    }
    return values[kind]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=5) | st.sampled_from([[300], [3, 257], [257, 3]]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_sums_over_every_dimension(shape: list[int], kind: str, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, g, s = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    s = s.abs().float()  # accumulators are float32 whatever the model is
    start = [np.random.default_rng(seed).normal(size=size) for size in shape]
    outs = [values.copy() for values in start]
    needs_grad, needs_square = kind in KINDS[:3], kind == "element2"
    _core.tensor_scores(w, g if needs_grad else None, s if needs_square else None, kind, outs)
    e = elements(w, g, s, kind)
    scale = max(1.0, float(e.abs().sum()))
    for dim, (before, after) in enumerate(zip(start, outs, strict=True)):
        want = e.transpose(0, dim).flatten(1).sum(1) if e.dim() > 1 else e
        np.testing.assert_allclose(after - before, want.numpy(), rtol=1e-12, atol=1e-14 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vector_importance_needs_no_weight_gradient(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, x, dy = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((70, 300), (90, 300), (90, 70))
    )
    whole = (dy.double().T @ x.double()) * weight.double()
    rows, columns = np.zeros(70), np.zeros(300)
    _core.dot_columns(dy.double(), x.double() @ weight.double().T, rows)
    _core.dot_columns(x.double(), dy.double() @ weight.double(), columns)
    np.testing.assert_allclose(rows, whole.sum(1).numpy(), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(columns, whole.sum(0).numpy(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_squares_of_samples_add_up(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    grads = [torch.randn(7, 65, generator=generator).to(dtype) for _ in range(5)]
    acc = torch.zeros(7, 65)
    for grad in grads:
        _core.accumulate_square(acc, grad, 1 / 5)
    want = torch.stack([grad.double().square() for grad in grads]).mean(0)
    torch.testing.assert_close(acc.double(), want, rtol=1e-6, atol=0)


def test_half_floats_keep_their_special_values() -> None:
    values = torch.tensor([0x0001, 0x03FF, 0x0400, 0x7BFF, 0x8001, 0xFC00, 0x7C00, 0x7E00], dtype=torch.int32)
    half = torch.from_numpy(values.numpy().astype(np.uint16).view(np.float16).copy())
    out = [np.zeros(8)]
    _core.tensor_scores(half, None, None, "l1", out)
    np.testing.assert_array_equal(out[0], half.double().abs().numpy())
