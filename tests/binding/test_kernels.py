"""The kernels as Python calls them: shapes and aliases checked, the GIL released, results added to what is there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from llmprune import _core
from llmprune.errors import TensorError

SAMPLES, TOKENS, IN, OUT = 3, 5, 20, 14


def layer(
    dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((OUT, IN), (SAMPLES * TOKENS, IN), (SAMPLES * TOKENS, OUT))
    )


def expected(weight: torch.Tensor, x: torch.Tensor, dy: torch.Tensor, order: int) -> torch.Tensor:
    w, x, dy = (tensor.double() for tensor in (weight, x, dy))
    each = torch.stack([dy_j.T @ x_j for dy_j, x_j in zip(dy.split(TOKENS), x.split(TOKENS), strict=True)])
    g, s = each.mean(0), each.square().mean(0)
    return (g * w).abs() if order == 1 else (g * w - 0.5 * w * s * w).abs()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_linear_scores_are_added(order: int, transposed: bool, strided: bool) -> None:
    weight, x, dy = layer()
    e = expected(weight, x, dy, order)
    stored = weight.t().contiguous() if transposed else weight
    if strided:
        stored, x, dy = (torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]] for tensor in (stored, x, dy))
        assert not x.is_contiguous()
    row, col = np.ones(OUT), np.full(IN, 2.0)
    _core.linear_scores(stored, x, dy, SAMPLES, order, row, col, transposed=transposed)
    np.testing.assert_allclose(row, 1 + e.sum(1).numpy(), rtol=1e-9)
    np.testing.assert_allclose(col, 2 + e.sum(0).numpy(), rtol=1e-9)


def test_dot_columns_are_added() -> None:
    _, a, b = layer()
    b = torch.cat([b, b], 1)[:, :IN].contiguous()
    out = np.ones(IN)
    _core.dot_columns(a, b, out)
    np.testing.assert_allclose(out, 1 + (a * b).sum(0).numpy(), rtol=1e-12)


def test_squares_accumulate_in_place() -> None:
    acc, grad = torch.ones(3, 4), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    _core.accumulate_square(acc, grad, 0.5)
    torch.testing.assert_close(acc, 1 + 0.5 * grad.square())
    _core.accumulate_square(torch.empty(0), torch.empty(0), 1.0)


def test_compaction_follows_the_physical_layout() -> None:
    whole = torch.arange(60.0).reshape(3, 4, 5)
    turned = whole.clone().permute(2, 0, 1)  # (5, 3, 4) over memory (3, 4, 5)
    want = turned[[1, 2, 4]][:, :, [0, 3]].clone()
    got = torch.from_dlpack(_core.compact(turned, {0: np.array([1, 2, 4]), 2: np.array([0, 3])}))
    assert got.stride() == (1, 6, 3)
    assert got.data_ptr() == turned.data_ptr()
    assert torch.equal(got, want)


def test_compaction_into_another_tensor() -> None:
    source = torch.arange(24.0).reshape(2, 3, 4)
    target = torch.empty(2, 2, 4)
    _core.compact_into(target, source, {1: np.array([0, 2])})
    assert torch.equal(target, source[:, [0, 2]])


def good() -> dict[str, Any]:
    weight, x, dy = layer()
    return {
        "weight": weight,
        "x": x,
        "dy": dy,
        "samples": SAMPLES,
        "order": 2,
        "row": np.zeros(OUT),
        "col": np.zeros(IN),
    }


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"x": torch.zeros(15, IN)}, TensorError, "weight is float64 but x is float32"),
        ({"x": torch.zeros(15, IN + 1).double()}, TensorError, "x: dimension 1 has 21 elements, expected 20"),
        ({"dy": torch.zeros(15, IN).double()}, TensorError, "dy: dimension 1 has 20 elements, expected 14"),
        ({"dy": torch.zeros(12, OUT).double()}, TensorError, "dy: dimension 0 has 12 elements, expected 15"),
        ({"x": torch.zeros(3, 5, IN).double()}, TensorError, "x: expected 2 dimensions, got 3"),
        ({"x": torch.zeros(IN, 15).double().t()}, TensorError, "x: the rows are not contiguous"),
        ({"x": torch.zeros(1, IN).double().expand(15, IN)}, TensorError, "x: the rows are not contiguous"),
        ({"transposed": True}, TensorError, "x: dimension 1 has 20 elements, expected 14"),
        ({"samples": 4}, ValueError, "samples is 4, which does not divide the 15 tokens"),
        ({"samples": 0}, ValueError, "samples is 0"),
        ({"order": 3}, ValueError, "order is 3"),
        ({"threads": -1}, ValueError, "threads is -1"),
        ({"row": np.zeros(IN)}, TensorError, "row: dimension 0 has 20 elements, expected 14"),
    ],
)
def test_linear_scores_checks_its_arguments(change: dict[str, Any], error: type, sentence: str) -> None:
    arguments = good() | change
    with pytest.raises(error, match=sentence):
        _core.linear_scores(**arguments)
    assert not arguments["row"].any()
    assert not arguments["col"].any()


def test_outputs_have_memory_of_their_own() -> None:
    both = np.zeros(OUT + IN)
    with pytest.raises(TensorError, match="col shares memory with row"):
        _core.linear_scores(**(good() | {"row": both[:OUT], "col": both[OUT - 1 : -1]}))
    weight = torch.zeros(OUT, IN, dtype=torch.float64)
    with pytest.raises(TensorError, match="row shares memory with weight"):
        _core.linear_scores(**(good() | {"weight": weight, "row": weight.numpy()[0, :OUT]}))
    square = torch.ones(4)
    with pytest.raises(TensorError, match="acc shares memory with grad"):
        _core.accumulate_square(square, square, 1.0)
    shared = torch.zeros(40)
    with pytest.raises(TensorError, match="target shares memory with source"):
        _core.compact_into(shared[:10], shared[5:25], {0: np.arange(10)})
    index = torch.arange(10)
    with pytest.raises(TensorError, match=r"tensor shares memory with kept\[0\]"):
        _core.compact(index, {0: index.numpy()[2:5]})
    assert index.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda w, o: _core.tensor_scores(w, None, None, "l3", o), ValueError, "kind is 'l3'"),
        (
            lambda w, o: _core.tensor_scores(w, None, None, "vector", o),
            TensorError,
            "grad: this kind .* needs it",
        ),
        (lambda w, o: _core.tensor_scores(w, w, None, "element2", o), TensorError, "square: this kind"),
        (
            lambda w, o: _core.tensor_scores(w, w[:1], None, "vector", o),
            TensorError,
            "dimension 0 of weight has 2",
        ),
        (
            lambda w, o: _core.tensor_scores(w, w[0], None, "vector", o),
            TensorError,
            "weight has 2 dimensions but grad",
        ),
        (lambda w, o: _core.tensor_scores(w, w, None, "vector", o[:1]), TensorError, "outs has 1 entries"),
        (lambda w, o: _core.tensor_scores(w, w, None, "vector", 3), TypeError, "outs must be a sequence"),
        (
            lambda w, o: _core.dot_columns(w, w[:1], o[1]),
            TensorError,
            "dimension 0 of a has 2 elements but that of b",
        ),
        (
            lambda w, o: _core.accumulate_square(w.half(), w, 1.0),
            TensorError,
            "float32 or float64, not float16",
        ),
        (
            lambda w, o: _core.compact(w, {2: np.arange(1)}),
            TensorError,
            "dimension 2 is outside the 2 dimensions",
        ),
        (lambda w, o: _core.compact(w, {-1: np.arange(1)}), TensorError, "dimension -1 is outside"),
        (lambda w, o: _core.compact(w, {"a": np.arange(1)}), TypeError, "integer"),
        (lambda w, o: _core.compact(w, [np.arange(1)]), TypeError, "dict"),
        (
            lambda w, o: _core.compact_into(w.clone(), w, {1: np.arange(2)}),
            TensorError,
            "target: dimension 1 has 3 elements, expected 2",
        ),
        (
            lambda w, o: _core.compact_into(w.double(), w, {}),
            TensorError,
            "target is float64 but source is float32",
        ),
    ],
)
def test_other_calls_check_their_arguments(call: Any, error: type, sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call(torch.ones(2, 3), [np.zeros(2), np.zeros(3)])


def test_threads_share_the_kernels_without_disturbing_each_other() -> None:
    cases = [layer(torch.float32, seed) for seed in range(4)]

    def scores(case: tuple[torch.Tensor, ...]) -> np.ndarray:
        row, col = np.zeros(OUT), np.zeros(IN)
        for _ in range(50):
            _core.linear_scores(*case, SAMPLES, 2, row, col)
        return np.concatenate([row, col])

    serial = [scores(case) for case in cases]
    found: list[np.ndarray | None] = [None] * len(cases)

    def work(place: int) -> None:
        found[place] = scores(cases[place])

    workers = [threading.Thread(target=work, args=(place,)) for place in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for one, other in zip(serial, found, strict=True):
        assert other is not None
        np.testing.assert_array_equal(one, other)


def test_the_gil_is_released_while_a_kernel_runs() -> None:
    size, tokens = 1024, 1024
    weight, x, dy = torch.ones(size, size), torch.ones(tokens, size), torch.ones(tokens, size)
    span: list[float] = []

    def work() -> None:
        row, col = np.zeros(size), np.zeros(size)
        span.append(time.perf_counter())
        _core.linear_scores(weight, x, dy, 4, 2, row, col, threads=1)
        span.append(time.perf_counter())

    worker = threading.Thread(target=work)
    seen: list[float] = []
    worker.start()
    while worker.is_alive():
        seen.append(time.perf_counter())
        time.sleep(0.0005)
    begin, end = span
    assert sum(begin < moment < end for moment in seen) >= 3, f"the call took {end - begin:.4f} s"


@pytest.mark.parametrize("level", ["plain", "avx2", "neon", "avx512"])
def test_a_lower_instruction_set_can_be_asked_for(level: str) -> None:
    code = "from llmprune import _core; print(_core.simd_level())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LLMPRUNE_SIMD": level},
        capture_output=True,
        text=True,
        check=True,
    )
    order = ["plain", "neon", "avx2", "avx512"]
    assert run.stdout.strip() in order[: order.index(level) + 1]
    if level == "plain":
        assert run.stdout.strip() == "plain"


def test_an_unknown_instruction_set_is_an_error() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from llmprune import _core"],
        env={**os.environ, "LLMPRUNE_SIMD": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "LLMPRUNE_SIMD is 'sse9'" in run.stderr
