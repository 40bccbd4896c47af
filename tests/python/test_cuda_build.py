"""CUDA that is not there: at build time, at load time, and as a device too full; no device is needed for any of it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmprune.errors import DeviceError
from llmprune.machine import cuda
from llmprune.scoring import streaming

ROOT = Path(__file__).resolve().parents[2]


def setup(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_build_says_why_it_has_no_cuda() -> None:
    asked = setup(LLMPRUNE_CUDA="1", NVCC="/nowhere/nvcc")
    assert asked.returncode == 1
    assert (
        "LLMPRUNE_CUDA=1, but the CUDA kernels cannot be built: NVCC is /nowhere/nvcc, which is no program"
        in asked.stderr
    )
    auto = setup(LLMPRUNE_CUDA="auto", NVCC="/nowhere/nvcc")
    assert auto.returncode == 0
    assert "the CUDA kernels are not built: NVCC is /nowhere/nvcc" in auto.stderr
    off = setup(LLMPRUNE_CUDA="0", NVCC="/nowhere/nvcc")
    assert off.returncode == 0
    assert "CUDA" not in off.stderr
    assert "'yes'; auto, 0 and 1 are known" in setup(LLMPRUNE_CUDA="yes").stderr


@pytest.fixture
def _fresh() -> Any:
    cuda.unavailable.cache_clear()
    yield
    cuda.unavailable.cache_clear()


@pytest.mark.usefixtures("_fresh")
def test_missing_cublas_is_said_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def load(name: str) -> Any:
        tried.append(name)
        raise ImportError("libcublas.so.13: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=None))
        patch.setattr(cuda, "_has", lambda name: False)
        patch.setattr(importlib, "import_module", load)
        for _ in range(2):
            with pytest.raises(
                DeviceError, match=r"weight: .* cannot be loaded: libcublas\.so\.13"
            ) as caught:
                cuda.load("weight")
            assert "\n" not in str(caught.value)
    assert tried == ["llmprune._cuda"]


def test_a_device_too_full_is_refused_before_anything_runs() -> None:
    place = SimpleNamespace(device=torch.device("cuda", 0))
    task: Any = SimpleNamespace(parameters={"w": place}, batch=SimpleNamespace(tokens=640, samples=10))
    route: Any = SimpleNamespace(bytes_per_token=1 << 24, blocks=[object()] * 4)
    with pytest.raises(DeviceError, match=r"needs about 1\.1 GiB .* on cuda:0, where 0\.5 GiB are free"):
        streaming._check_device_memory(task, route, False, 1 << 29)
    streaming._check_device_memory(task, route, True, 1 << 29)  # a block at a time fits
    with pytest.raises(DeviceError, match=r"take shorter samples$"):
        streaming._check_device_memory(task, route, True, 1 << 27)


def test_kernels_run_where_the_tensor_lies() -> None:
    assert cuda.options(torch.zeros(1)) == {"threads": torch.get_num_threads()}
