"""What an installation consists of and whether its C core computes what it should, for bug reports."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np

import llmprune
from llmprune import _core
from llmprune.machine import cuda
from llmprune.machine.budget import told_memory
from llmprune.machine.packages import installed_version

PACKAGES = ("torch", "transformers", "safetensors", "numpy")
"""The run-time dependencies whose versions are reported."""

EXTRAS = (
    "peft",
    "accelerate",
    "datasets",
    "lm-eval",
    "gguf",
    "matplotlib",
    "pyarrow",
    "ray",
    "nvidia-cublas",
)
"""What single commands need besides; ``pip install llmprune[recover]`` and the other extras bring them."""


def doctor(quiet: bool = False) -> dict[str, Any]:
    """Collect versions, hardware and a self-test of the C core; print them unless ``quiet``.

    Returns:
        ``llmprune``, ``python``, ``platform``; ``packages`` and ``extras`` (name -> version, None where it is not
        installed); ``simd`` (instruction set of the kernels); ``cpus`` (usable by this process); ``free_memory``
        (bytes, None where the system does not say); ``free_disk`` (bytes where checkpoints would be written from
        here, None where the folder has gone); ``cuda`` (``built``, ``usable`` and, where it is not,
        ``reason``); ``self_test`` (``ok`` and ``detail``).
    """
    report: dict[str, Any] = {
        "llmprune": llmprune.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "extras": {name: installed_version(name) for name in EXTRAS},
        "simd": _core.simd_level(),
        "cpus": usable_cpus(),
        "free_memory": told_memory(),
        "free_disk": free_disk(),
        "cuda": cuda_state(),
        "self_test": self_test(),
    }
    if not quiet:
        sys.stdout.write(render(report))
    return report


def usable_cpus() -> int:
    """Processors this process may run on, which containers and batch systems set lower than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_disk() -> int | None:
    """Bytes that this user may still write in the working directory; None where there is no such folder."""
    try:
        return shutil.disk_usage(os.curdir).free
    except OSError:
        return None


def cuda_state() -> dict[str, Any]:
    """Whether the CUDA kernels were built, whether they can run here, and why not; this loads them."""
    reason = cuda.unavailable()
    return {"built": find_spec("llmprune._cuda") is not None, "usable": reason is None, "reason": reason}


def self_test() -> dict[str, Any]:
    """Score a random linear layer with the C kernel and compare with NumPy in float64.

    Returns:
        ``ok`` and ``detail``, the largest relative difference of a second-order score.
    """
    rng = np.random.default_rng(0)
    samples, tokens, features_in, features_out = 3, 7, 37, 29
    weight = rng.standard_normal((features_out, features_in))
    x = rng.standard_normal((samples * tokens, features_in))
    dy = rng.standard_normal((samples * tokens, features_out))
    row, col = np.zeros(features_out), np.zeros(features_in)
    _core.linear_scores(weight, x, dy, samples, 2, row, col)

    gradients = np.stack(
        [dy[i : i + tokens].T @ x[i : i + tokens] for i in range(0, samples * tokens, tokens)]
    )
    g, s = gradients.mean(axis=0), (gradients**2).mean(axis=0)
    expected = np.abs(g * weight - 0.5 * weight * s * weight)
    difference = max(
        float(np.max(np.abs(row / expected.sum(axis=1) - 1))),
        float(np.max(np.abs(col / expected.sum(axis=0) - 1))),
    )
    return {"ok": difference < 1e-9, "detail": f"second-order scores differ from NumPy's by {difference:.1e}"}


def render(report: dict[str, Any]) -> str:
    """The report as aligned lines of text."""
    extras = [f"{name} {found}" for name, found in report["extras"].items() if found]
    device, test = report["cuda"], report["self_test"]
    rows = [
        ("llmprune", report["llmprune"]),
        ("python", f"{report['python']} on {report['platform']}"),
        *((name, found or "not installed") for name, found in report["packages"].items()),
        ("extras", ", ".join(extras) or "none"),
        ("simd", report["simd"]),
        ("cpus", str(report["cpus"])),
        ("free memory", _gibibytes(report["free_memory"])),
        ("free disk", _gibibytes(report["free_disk"])),
        ("cuda", "usable" if device["usable"] else f"not usable: {device['reason']}"),
        ("self-test", f"{'ok' if test['ok'] else 'FAILED'}: {test['detail']}"),
    ]
    return "".join(f"{name:<14}{value}\n" for name, value in rows)


def _gibibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
