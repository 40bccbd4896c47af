"""Results of the commonest operations on meta tensors, without the framework's own meta kernels.

A meta kernel of an elementwise operation is Python that takes some hundred microseconds and decides one thing: sizes
and strides of the result. For the plain cases (one floating type, no surprise in the layout) that is a few
comparisons. What is not plain gives None here and goes the framework's way; a test compares the two on random layouts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

KEEP_TYPE = frozenset(
    f"aten::{name}"
    for name in (
        "add", "sub", "mul", "div", "neg", "pow", "rsqrt", "sqrt", "exp", "abs", "cos", "sin", "tanh", "sigmoid",
        "silu", "gelu", "relu", "leaky_relu", "elu", "softplus",
    )
)  # fmt: skip
"""Elementwise operations whose result has its floating inputs' type."""

_META = torch.device("meta")


def elementwise(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The result of an operation of ``KEEP_TYPE`` on meta tensors; None where it is not plain.

    Strides are TensorIterator's: those of the first operand where it alone decides, contiguous where all operands are.
    """
    first = tensors[0]
    dtype = first.dtype
    if not dtype.is_floating_point:
        return None
    shape = first.shape
    if len(tensors) > 1:
        for other in tensors[1:]:
            if other.dtype is not dtype:
                return None
            if other.shape != shape:
                wider = _broadcast(shape, other.shape)
                if wider is None:
                    return None
                shape = wider
    if all(tensor.is_contiguous() for tensor in tensors):
        return torch.empty(shape, dtype=dtype, device=_META)
    if first.shape == shape and _decides(first):
        return torch.empty_strided(shape, first.stride(), dtype=dtype, device=_META)
    return None


def concatenation(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor | None:
    """The result of ``cat``; None where it is not plain."""
    first = tensors[0]
    shape = list(first.shape)
    rank = len(shape)
    if rank == 0:
        return None
    dim %= rank
    total = 0
    for tensor in tensors:
        sizes = tensor.shape
        # 4-D and 5-D tensors may ask for channels-last, whose innermost stride is not the last dimension's
        if tensor.dtype is not first.dtype or len(sizes) != rank or tensor.stride(-1) != 1 or sizes[-1] < 2:
            return None
        total += sizes[dim]
        if any(a != b for d, (a, b) in enumerate(zip(sizes, shape, strict=True)) if d != dim):
            return None
    shape[dim] = total
    return torch.empty(shape, dtype=first.dtype, device=_META)


def _broadcast(a: torch.Size, b: torch.Size) -> torch.Size | None:
    """The wider of two sizes if the other broadcasts to it."""
    if len(a) < len(b):
        a, b = b, a
    offset = len(a) - len(b)
    if all(n in (1, a[offset + d]) for d, n in enumerate(b)):
        return a
    if offset == 0 and all(n in (1, b[d]) for d, n in enumerate(a)):
        return b
    return None


def _decides(tensor: torch.Tensor) -> bool:
    """Whether an operand is dense, has every dimension larger than one, and so orders the result's dimensions alone."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size < 2 or stride != expected:
            return False
        expected *= size
    return True
