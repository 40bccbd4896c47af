"""Wall time and peak memory of the stages of a long job."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One finished stage.

    Attributes:
        name: what was done.
        seconds: wall time.
        peak: largest resident memory of the process during the stage, in bytes (where the system cannot start counting
            anew, the largest since the process began).
    """

    name: str
    seconds: float
    peak: int


class Stages:
    """Measures stages and announces each as it begins.

    Args:
        announce: called with the stage's name and a sentence about what it does; None announces nothing.
    """

    def __init__(self, announce: Callable[[str, str], None] | None = None) -> None:
        self.done: list[Stage] = []
        self._announce = announce

    @contextmanager
    def stage(self, name: str, doing: str = "") -> Iterator[None]:
        """Time the block; a stage that raises is recorded too."""
        if self._announce is not None:
            self._announce(name, doing)
        _reset_peak()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.done.append(Stage(name, time.perf_counter() - start, _peak()))


def _reset_peak() -> None:
    """Start counting the peak of resident memory anew (Linux; elsewhere and in some sandboxes not possible)."""
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as control:
        control.write("5")


def _peak() -> int:
    """Peak resident memory in bytes, since the last reset."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
