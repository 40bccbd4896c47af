"""linear_scores through the binding, against the definition in float64, at sizes around the edges of its blocking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune import _core

# Unit roundoff of the arithmetic, times what a few hundred accumulated terms may lose of it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make(out: int, features: int, tokens: int, dtype: torch.dtype, seed: int) -> Inputs:
    """Weight, x and dy of random values that the dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((out, features), (tokens, features), (tokens, out))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)  # type: ignore[return-value]


def importance(inputs: Inputs, samples: int, order: int, absolute: bool = False) -> torch.Tensor:
    """The elementwise importance; with ``absolute`` what it would be if no two terms cancelled."""
    weight, x, dy = (tensor.double().abs() if absolute else tensor.double() for tensor in inputs)
    each = torch.einsum("jto,jti->joi", dy.unflatten(0, (samples, -1)), x.unflatten(0, (samples, -1)))
    first, second = each.mean(0) * weight, 0.5 * weight * each.square().mean(0) * weight
    if order == 1:
        return first.abs()
    return first + second if absolute else (first - second).abs()


def scores(
    inputs: Inputs, samples: int, order: int, transposed: bool = False, threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    weight, x, dy = inputs
    row, col = np.zeros(dy.shape[1]), np.zeros(x.shape[1])
    stored = weight.t().contiguous() if transposed else weight
    _core.linear_scores(stored, x, dy, samples, order, row, col, transposed=transposed, threads=threads)
    return row, col


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 70) | st.sampled_from([95, 96, 97, 192, 193]),
    features=st.integers(1, 70) | st.sampled_from([255, 257, 511, 513]),
    samples=st.integers(1, 6),
    tokens=st.integers(1, 20) | st.sampled_from([128, 129]),
    dtype=st.sampled_from(list(TOLERANCE)),
    order=st.sampled_from([1, 2]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_definition(
    out: int,
    features: int,
    samples: int,
    tokens: int,
    dtype: torch.dtype,
    order: int,
    transposed: bool,
    seed: int,
) -> None:
    inputs = make(out, features, samples * tokens, dtype, seed)
    want, bound = importance(inputs, samples, order), importance(inputs, samples, order, absolute=True)
    for got, dim in zip(scores(inputs, samples, order, transposed), (1, 0), strict=True):
        error = np.abs(got - want.sum(dim).numpy())
        assert (error <= TOLERANCE[dtype] * bound.sum(dim).numpy()).all()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("tokens", [767, 769, 1601])
def test_samples_longer_than_a_block(order: int, tokens: int) -> None:
    inputs = make(30, 290, 2 * tokens, torch.float32, seed=tokens)
    want, bound = importance(inputs, 2, order), importance(inputs, 2, order, absolute=True)
    for got, dim in zip(scores(inputs, 2, order), (1, 0), strict=True):
        assert (np.abs(got - want.sum(dim).numpy()) <= 2e-6 * bound.sum(dim).numpy()).all()


@pytest.mark.parametrize("order", [1, 2])
def test_a_layer_of_ordinary_size_is_equal_to_two_parts_in_a_million(order: int) -> None:
    inputs = make(256, 512, 10 * 64, torch.float32, seed=3)
    want = importance(inputs, 10, order)
    for got, dim in zip(scores(inputs, 10, order), (1, 0), strict=True):
        np.testing.assert_allclose(got, want.sum(dim).numpy(), rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    inputs = make(400, 1100, 48, dtype, seed=5)
    alone = scores(inputs, 3, 2, threads=1)
    for threads in (2, 3, 8, 0):
        together = scores(inputs, 3, 2, threads=threads)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(alone, together, strict=True))


def test_order_of_samples_does_not_matter_but_their_border_does() -> None:
    weight, x, dy = make(9, 11, 12, torch.float64, seed=7)
    turned = (
        weight,
        x.unflatten(0, (3, 4)).flip(0).flatten(0, 1),
        dy.unflatten(0, (3, 4)).flip(0).flatten(0, 1),
    )
    for a, b in zip(scores((weight, x, dy), 3, 2), scores(turned, 3, 2), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert not np.allclose(scores((weight, x, dy), 3, 2)[0], scores((weight, x, dy), 4, 2)[0], rtol=1e-3)
