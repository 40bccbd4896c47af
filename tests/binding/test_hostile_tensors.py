"""Any tensor, any list: the calls of _core refuse with a typed error, or compute what NumPy does on a copy."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_graph_arguments import LINEARS, OUTPUT, TENSORS

sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from hostile import EXAMPLES, ODD, spoilt

from llmprune import _core
from llmprune.errors import LlmpruneError, TensorError

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8,
    torch.bool, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A view of some memory: of any dtype, sliced, stepped, transposed, expanded, empty, requiring gradients."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=draw(st.sampled_from([2, 3, 9]))))
    dtype = draw(st.sampled_from(DTYPES))
    count = int(np.prod(shape))
    tensor = (torch.arange(count) % 7 - 3).to(dtype).reshape(shape)
    for _ in range(draw(st.integers(0, 2))):
        if not tensor.dim():
            break
        dim = draw(st.integers(0, tensor.dim() - 1))
        act = draw(st.sampled_from(["step", "transpose", "expand", "narrow", "grad", "square"]))
        if act == "step":
            tensor = tensor[(slice(None),) * dim + (slice(None, None, 2),)]
        elif act == "transpose":
            tensor = tensor.transpose(0, dim)
        elif act == "expand":
            tensor = tensor.unsqueeze(dim).expand(*tensor.shape[:dim], 2, *tensor.shape[dim:])
        elif act == "narrow" and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 1, tensor.shape[dim] - 1)
        elif act == "grad" and tensor.is_floating_point() and dtype is not torch.float8_e4m3fn:
            tensor = tensor.detach().requires_grad_()
        elif act == "square":
            tensor = tensor.flatten()[: 4 * (tensor.numel() // 4)].reshape(2, -1)
    return tensor


@st.composite
def arrays(draw: st.DrawFn, size: int) -> Any:
    """Sums to add to: right, or read-only, reversed, stepped, of another type or size."""
    good = np.zeros(size)
    locked = np.zeros(size)
    locked.flags.writeable = False
    odd = [good, locked, np.zeros(size)[::-1], np.zeros(2 * size)[::2], np.zeros(size, np.float32), None]
    odd += [
        np.zeros(size + 1),
        np.zeros((size, 1)),
        [0.0] * size,
        np.zeros(size, ">f8"),
        np.zeros(size),
        good,
    ]
    return draw(st.sampled_from(odd))


def values(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy()


@EXAMPLES
@given(tensors(), st.data())
def test_scores_of_any_tensor(tensor: torch.Tensor, data: st.DataObject) -> None:
    outs = [data.draw(arrays(size)) for size in tensor.shape]
    try:
        _core.tensor_scores(tensor, None, None, "l1", outs)
    except TensorError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    absolute = np.abs(values(tensor))
    for dim, out in enumerate(outs):
        if out is not None:
            others = tuple(d for d in range(tensor.dim()) if d != dim)
            np.testing.assert_allclose(out, absolute.sum(axis=others))


@EXAMPLES
@given(tensors(), tensors(), st.data())
def test_pairs_of_any_tensors(one: torch.Tensor, other: torch.Tensor, data: st.DataObject) -> None:
    width = one.shape[-1] if one.dim() else 1
    out, threads = data.draw(arrays(width)), data.draw(st.sampled_from([0, 1, 3, -1]))
    refused: tuple[type[Exception], ...] = (TensorError, ValueError) if threads < 0 else (TensorError,)
    try:
        _core.dot_columns(one, other, out, threads=threads)
    except refused:
        pass
    else:
        np.testing.assert_allclose(out, (values(one) * values(other)).sum(0))
    before = one.detach().clone()
    try:
        _core.accumulate_square(one, other, 0.5, threads=threads)
    except refused:
        assert torch.equal(before.to(torch.complex128), one.detach().to(torch.complex128))
    else:
        expected = values(before) + 0.5 * values(other) ** 2
        np.testing.assert_allclose(values(one), expected, rtol=1e-6)


@EXAMPLES
@given(tensors(), st.data())
def test_positions_of_any_tensor(tensor: torch.Tensor, data: st.DataObject) -> None:
    lists = st.lists(st.integers(-1, 5), max_size=5).map(lambda found: np.array(found, dtype=np.int64))
    kept = data.draw(st.dictionaries(st.integers(-1, 9), lists, max_size=3))
    try:
        expected = tensor.detach()
        for dim, positions in kept.items():
            expected = expected.index_select(dim, torch.from_numpy(positions))
    except (IndexError, RuntimeError):
        expected = None
    else:
        expected = expected.clone()
    try:
        block = _core.compact(tensor, kept)
    except TensorError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert expected is not None
    assert torch.equal(torch.from_dlpack(block), expected)  # type: ignore[attr-defined]


@EXAMPLES
@given(spoilt({"tensors": TENSORS, "ops": LINEARS, "outputs": [OUTPUT], "rules": []}))
def test_any_tape(tape: Any) -> None:
    try:
        graph = _core.Graph(*(tape.get(key, ()) for key in ("tensors", "ops", "outputs", "rules")))
    except (LlmpruneError, TypeError, ValueError, OverflowError):
        return
    except SystemError as error:  # the tape says of an output what no forward pass would
        if "please report this model" not in str(error):
            raise
        return
    for number, (size, _, _, _, members) in enumerate(graph.axes()):
        for member in range(len(members)):
            assert graph.positions(number, member).shape[0] == size


@EXAMPLES
@given(st.lists(ODD, min_size=3, max_size=3))
def test_questions_with_any_arguments(odd: list[Any]) -> None:
    graph = _core.Graph(TENSORS, LINEARS, [OUTPUT])
    for ask, count in (
        (graph.positions, 2),
        (graph.explain, 3),
        (graph.dim_axes, 2),
        (graph.freeze, 2),
        (graph.new_sizes, 2),
        (graph.numel, 1),
    ):
        with suppress(LlmpruneError, TypeError, ValueError, OverflowError, IndexError):
            ask(*odd[:count])
    assert len(graph.axes()) == 3
