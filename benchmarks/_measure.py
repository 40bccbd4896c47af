"""What benchmarks share: process CPU time, interleaved repeats, peak memory in a process of its own, JSON results."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Claim:
    """A figure held against its bound: ``figure <= bound``, or ``>=`` when ``at_least``."""

    text: str
    figure: float
    bound: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the figure keeps the bound."""
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound

    def __str__(self) -> str:
        """One line."""
        sign = ">=" if self.at_least else "<="
        return f"{'holds' if self.holds else 'FAILS'}: {self.text}: {self.figure:.3g} (claim {sign} {self.bound:g})"


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Process CPU time of one call, all threads together: what others do on the machine counts little."""
    gc.collect()
    start = time.process_time()
    work()
    return time.process_time() - start


def interleaved(
    cases: Mapping[str, Callable[[], Any]], repeats: int, show: bool = True
) -> dict[str, list[float]]:
    """CPU seconds of each case, ``repeats`` times in turn, so that drift of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats):
        for name, work in cases.items():
            seconds[name].append(cpu_seconds(work))
            if show:
                print(
                    f"[{repeat + 1}/{repeats}] {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True
                )
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each case."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_resident() -> int:
    """The most bytes of resident memory that the process has had since it began (Linux)."""
    return _status("VmHWM")


def peak_over(work: Callable[[], Any]) -> int:
    """Bytes by which the process's resident memory rose, at most, above what it was before ``work`` (Linux)."""
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    work()
    return _status("VmHWM") - before


def in_own_process(script: str, *arguments: str) -> Any:
    """Run ``script`` with ``arguments`` in a new interpreter and read the JSON on its last line of output."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(script).name} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def matmul_rate(size: int = 1024, repeats: int = 9) -> float:
    """Measured float32 matrix rate of the framework, FLOP/s, at torch's present number of threads."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    return (
        2
        * size**3
        / statistics.median(cpu_seconds(lambda: a @ b) for _ in range(repeats))
        * torch.get_num_threads()
    )


def paired(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> float:
    """Median over the rounds of how many times longer ``name`` took than ``base`` in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def commit() -> str:
    """The commit measured, with a mark where the working tree differs from it.

    Of a copy without its history LLMPRUNE_COMMIT tells it.
    """
    if "LLMPRUNE_COMMIT" in os.environ:
        return os.environ["LLMPRUNE_COMMIT"]
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": Path("/proc/loadavg").read_text().split()[0],
        "commit": commit(),
    }


def save(name: str, claims: Sequence[Claim], **figures: Any) -> Path:
    """Write ``results/<name>.json``: the machine, the claims with their verdicts, and the figures."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    verdicts = [{**asdict(claim), "holds": claim.holds} for claim in claims]
    path.write_text(json.dumps({"machine": machine(), "claims": verdicts, **figures}, indent=1) + "\n")
    return path
