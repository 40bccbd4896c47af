"""CUDA tensors as ``_core`` takes them: the bad-input list and the results, on a simulated device.

Each test is a script of its own process, since a backend is registered once for all.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "build" / "c" / "plain" / "libcuda_host.so"

PREAMBLE = """
import sys
sys.path.insert(0, {folder!r})
import numpy as np, torch
from simulated import OnDevice, Simulated, scratch
from llmprune import _core
from llmprune.errors import DeviceError, LlmpruneError, TensorError
simulated = Simulated({library!r})

def fails(error, sentence, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except error as caught:
        assert sentence in str(caught), str(caught)
        assert chr(10) not in str(caught)
    else:
        raise AssertionError("no error: " + sentence)

def layer(dtype=torch.float32, out=14, features=20, tokens=15):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype) for s in ((out, features), (tokens, features), (tokens, out))]

def zeros(*sizes):
    return OnDevice(torch.zeros(*sizes, dtype=torch.float64))
"""


@pytest.fixture(scope="module")
def library() -> Path:
    if shutil.which("make") is None or shutil.which("c++") is None:
        pytest.skip("the simulated device needs make and a C++ compiler")
    done = subprocess.run(
        ["make", "--no-print-directory", str(LIBRARY.relative_to(ROOT))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return LIBRARY


def run(library: Path, script: str) -> None:
    preamble = PREAMBLE.format(folder=str(Path(__file__).parent), library=str(library))
    done = subprocess.run(
        [sys.executable, "-c", preamble + script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_results_equal_the_cpus(library: Path) -> None:
    run(
        library,
        """
simulated.register()
kept = {0: np.array([0, 3, 4, 9]), 1: np.arange(0, 20, 3)}
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for order in (1, 2):
        weight, x, dy = layer(dtype)
        row, col = np.zeros(14), np.zeros(20)
        _core.linear_scores(weight, x, dy, 3, order, row, col)
        sums = zeros(14), zeros(20)
        on = [OnDevice(t) for t in (weight, x, dy)]
        _core.linear_scores(*on, 3, order, *sums, scratch=scratch(), stream=77)
        for got, want in zip(sums, (row, col)):
            np.testing.assert_allclose(got.tensor.numpy(), want, rtol=2e-5)
        assert [t.asked for t in on] == [[77]] * 3
        turned = zeros(14), zeros(20)
        _core.linear_scores(OnDevice(weight.t().contiguous()), *on[1:], 3, order, *turned, True, scratch=scratch())
        assert on[1].asked == [77, 1]  # the legacy default stream
        np.testing.assert_allclose(turned[0].tensor.numpy(), row, rtol=2e-5)
    rows, columns = np.zeros(14), np.zeros(20)
    _core.tensor_scores(weight, weight, None, "element1", [rows, columns])
    got = [zeros(14), zeros(20)]
    _core.tensor_scores(OnDevice(weight), OnDevice(weight), None, "element1", got, scratch=scratch())
    np.testing.assert_allclose(got[0].tensor.numpy(), rows, rtol=1e-12)
    np.testing.assert_allclose(got[1].tensor.numpy(), columns, rtol=1e-12)
    out, got = np.zeros(20), zeros(20)
    _core.dot_columns(x, x, out)
    _core.dot_columns(OnDevice(x), OnDevice(x), got, scratch=scratch())
    np.testing.assert_allclose(got.tensor.numpy(), out, rtol=1e-12)
    acc = torch.ones(14, 20)
    _core.accumulate_square(OnDevice(acc), OnDevice(weight), 0.5)
    torch.testing.assert_close(acc, 1 + 0.5 * weight.float().square(), rtol=1e-6, atol=0)
    target, want = torch.empty(4, 7, dtype=dtype), weight[kept[0]][:, kept[1]]
    _core.compact_into(OnDevice(target), OnDevice(weight), kept, scratch=scratch())
    assert torch.equal(target, want)
    turned = weight.clone().t()
    _core.compact_many(
        [OnDevice(weight), OnDevice(turned)], [kept, {0: kept[1], 1: kept[0]}], scratch(), stream=5
    )
    assert torch.equal(weight.flatten()[:28].view(4, 7), want)
    assert torch.equal(turned.as_strided((7, 4), (1, 7)), want.t())
""",
    )


def test_bad_input_is_refused_in_a_sentence(library: Path) -> None:
    run(
        library,
        """
simulated.register()
weight, x, dy = layer()
on = [OnDevice(t) for t in (weight, x, dy)]
row, col = zeros(14), zeros(20)
score = _core.linear_scores
fails(TensorError, "x: the tensor is on device cuda:1 but weight is on cuda:0; all must be on one device",
      score, on[0], OnDevice(x, 1), on[2], 3, 1, row, col, scratch=scratch())
fails(TensorError, "x: the tensor is on device cpu:0 but weight is on cuda:0",
      score, on[0], x, on[2], 3, 1, row, col, scratch=scratch())
fails(TensorError, "x: the tensor is on device cuda:0 but weight is on cpu:0",
      score, weight, on[1], dy, 3, 1, np.zeros(14), np.zeros(20))
fails(TensorError, "row: expected a tensor", score, *on, 3, 1, [0.0], col, scratch=scratch())
fails(TensorError, "row: the tensor is on device cpu:0", score, *on, 3, 1, np.zeros(14), col, scratch=scratch())
fails(TensorError, "row: sums are float64, not float32",
      score, *on, 3, 1, OnDevice(torch.zeros(14)), col, scratch=scratch())
fails(TensorError, "row: dimension 0 has 20 elements", score, *on, 3, 1, col, col, scratch=scratch())
fails(TensorError, "not contiguous", score, on[0], OnDevice(x.t().contiguous().t()), on[2], 3, 1, row, col,
      scratch=scratch())
fails(MemoryError, "needs 1 bytes of scratch", score, *on, 3, 1, row, col)
fails(MemoryError, "cannot work in 512 bytes of scratch", score, *on, 3, 1, row, col, scratch=scratch(512))
fails(ValueError, "tensors on the CPU need none", score, weight, x, dy, 3, 1, np.zeros(14), np.zeros(20),
      scratch=scratch())
fails(DeviceError, "there is no CUDA device 1", score, *[OnDevice(t, 1) for t in (weight, x, dy)], 3, 1,
      OnDevice(row.tensor, 1), OnDevice(col.tensor, 1), scratch=scratch(device=1))
fails(DeviceError, "beyond the 64", _core.dot_columns, OnDevice(x, 64), OnDevice(x, 64), col)
assert not row.tensor.any() and not col.tensor.any()
kept = {0: np.array([1, 2])}
before = weight.clone()
fails(TensorError, "tensor shares memory with tensor", _core.compact_many, [on[0], on[0]], [kept, kept], scratch())
fails(TensorError, "do not fill one dense block", _core.compact_many, [OnDevice(weight[:, ::2])], [kept], scratch())
fails(TensorError, "kept has 0 entries for 1 tensors", _core.compact_many, [on[0]], [], scratch())
fails(TensorError, "kept: expected a dict", _core.compact_many, [on[0]], [3], scratch())
fails(TensorError, "position 14 is outside", _core.compact_many, [on[0]], [{0: np.array([14])}], scratch())
fails(TensorError, "on the CPU call compact", _core.compact_many, [weight], [kept], scratch())
fails(TensorError, "move it to the CPU first", _core.compact, on[0], kept)
fails(MemoryError, "scratch", _core.compact_many, [on[0]], [kept], scratch(512))
simulated.device.capturing = True
fails(DeviceError, "cudaErrorStreamCaptureUnsupported", _core.compact_many, [on[0]], [kept], scratch())
simulated.device.capturing = False
simulated.device.fail = 2
fails(MemoryError, "cudaErrorMemoryAllocation", _core.compact_many, [on[0]], [kept], scratch())
assert torch.equal(weight, before)
_core.compact_many([], [], scratch())
_core.compact_many([on[0]], [kept], scratch())  # nothing sticks
assert torch.equal(weight.flatten()[:40].view(2, 20), before[[1, 2]])
""",
    )


def test_registration_is_checked_and_no_device_is_said_in_a_sentence(library: Path) -> None:
    run(
        library,
        """
import ctypes
fails(TypeError, "expected the capsule", _core.register_cuda, object())
version = ctypes.c_uint32.from_address(simulated.library.lp_cuda())
simulated.device.devices = 0
fails(DeviceError, "no usable CUDA device: cudaErrorNoDevice", simulated.register)
simulated.device.devices = 1
assert simulated.register() == 1
simulated.device.major, simulated.device.minor = 7, 0
x, out = OnDevice(torch.ones(2, 2)), zeros(2)
fails(DeviceError, "compute capability 7.0, and llmprune's kernels need 7.5", _core.dot_columns, x, x, out,
      scratch=scratch())
simulated.device.major = 9
_core.dot_columns(x, x, out, scratch=scratch())
assert out.tensor.tolist() == [2.0, 2.0]
""",
    )


def test_a_failure_to_load_is_remembered_and_doctor_tells_it(library: Path) -> None:
    run(
        library,
        """
import llmprune, types
from llmprune.machine import cuda
simulated.device.devices = 0
stand_in = types.ModuleType("llmprune._cuda")
stand_in.table = simulated.capsule()
stand_in.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("llmprune._cuda", None)
sys.modules["llmprune._cuda"] = stand_in
x, out = OnDevice(torch.ones(2, 2)), zeros(2)
reason = "a: the tensor is on device cuda, where llmprune cannot work: no usable CUDA device: cudaErrorNoDevice"
fails(DeviceError, reason, _core.dot_columns, x, x, out, scratch=scratch())
simulated.device.devices = 1
fails(DeviceError, reason, _core.dot_columns, x, x, out, scratch=scratch())
report = llmprune.doctor(quiet=True)["cuda"]
assert report["built"] and not report["usable"] and "no usable CUDA device" in report["reason"], report
cuda.unavailable.cache_clear()
_core.dot_columns(x, x, out, scratch=scratch())
assert out.tensor.tolist() == [2.0, 2.0]
""",
    )
