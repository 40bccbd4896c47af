"""Results made without the framework's meta kernels have the sizes, strides and type those kernels give."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.tracing.meta_results import KEEP_TYPE, concatenation, elementwise


@st.composite
def operand(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    """A meta tensor that broadcasts to ``shape``, laid out in some way."""
    dims = [draw(st.sampled_from((size, size, 1))) for size in shape][draw(st.integers(0, len(shape))) :]
    order = draw(st.permutations(range(len(dims))))
    tensor = torch.empty([dims[d] for d in order], device="meta").permute(
        [order.index(d) for d in range(len(dims))]
    )
    if dims and draw(st.booleans()):
        padded = torch.empty([n + 2 for n in tensor.shape], device="meta")
        tensor = padded[tuple(slice(1, n + 1) for n in tensor.shape)]
    return tensor


shapes = st.lists(st.sampled_from((1, 2, 3, 5)), min_size=1, max_size=5).map(tuple)


@settings(deadline=None, max_examples=300)
@given(st.data(), shapes)
def test_elementwise_results_are_the_frameworks(data: st.DataObject, shape: tuple[int, ...]) -> None:
    a, b = data.draw(operand(shape)), data.draw(operand(shape))
    for tensors, expected in (((a, b), lambda: a * b), ((a,), a.neg), ((b,), b.relu)):
        got = elementwise(tensors)
        if got is not None:
            want = expected()
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            assert [s for s, n in zip(got.stride(), got.shape, strict=True) if n > 1] == [
                s for s, n in zip(want.stride(), want.shape, strict=True) if n > 1
            ]


@settings(deadline=None, max_examples=200)
@given(st.data(), shapes)
def test_concatenations_are_the_frameworks(data: st.DataObject, shape: tuple[int, ...]) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    tensors = [data.draw(operand(shape)) for _ in range(data.draw(st.integers(1, 3)))]
    tensors = [
        tensor.expand(shape) if data.draw(st.booleans()) else tensor.expand(shape).contiguous()
        for tensor in tensors
    ]
    got = concatenation(tensors, dim)
    if got is not None:
        want = torch.cat(tensors, dim)
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


def test_the_plain_cases_are_taken() -> None:
    x, w = torch.empty(2, 7, 48, device="meta"), torch.empty(48, device="meta")
    assert elementwise((w, x)) is not None
    heads = x.view(2, 7, 6, 8).transpose(1, 2)
    turned = elementwise((heads, torch.empty(2, 1, 7, 8, device="meta")))
    assert turned is not None
    assert turned.stride() == heads.stride()
    assert elementwise((x.int(), w)) is None
    assert elementwise((x, w.double())) is None
    assert concatenation([heads[..., :4], heads[..., 4:]], -1) is not None
    assert concatenation([x, x.double()], -1) is None


@pytest.mark.parametrize("name", sorted(KEEP_TYPE))
def test_the_operations_keep_their_type(name: str) -> None:
    x = torch.rand(3, dtype=torch.bfloat16)
    function = getattr(torch, name.removeprefix("aten::"), None) or getattr(
        torch.nn.functional, name.removeprefix("aten::")
    )
    results = []
    for arguments in ((x,), (x, x), (x, 2)):
        with contextlib.suppress(RuntimeError, TypeError):  # that number of arguments is not for this one
            results.append(function(*arguments))
    assert results
    assert {result.dtype for result in results} == {torch.bfloat16}
