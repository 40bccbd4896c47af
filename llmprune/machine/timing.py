"""Times of single operations on the machine at hand, measured once for each shape and kept in the user's cache folder.

A file holds what one processor does with one number of threads and one element type: ``$LLMPRUNE_CACHE``, else
``$XDG_CACHE_HOME/llmprune``, else ``~/.cache/llmprune``. A file that cannot be read or written costs new measurements,
never a failure.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from llmprune.checkpoints.atomic import write_file
from llmprune.errors import InputError
from llmprune.reporting.logbook import processor

log = logging.getLogger(__name__)

ROUNDS = 5
"""Blocks of calls timed for each shape; the fastest counts."""
BLOCK = 2e-3
"""Seconds a block of calls takes at least."""
AROUND = 1 << 28
"""The most bytes of weights that a product is timed among: no cache holds more."""
NOISY = 0.1
"""Spread (interquartile range over median) from which a measurement is called noisy."""

_FORMAT = 1


@dataclass(frozen=True)
class Reading:
    """One measurement, in seconds: by the wall's clock, and of the calling thread's (see :class:`Sample`)."""

    wall: float
    busy: float


class Clock:
    """Reads both clocks from its making to :meth:`read`, with everything a device was given to do done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        synchronise(device)
        self._busy, self._wall = time.thread_time(), time.perf_counter()

    def read(self) -> Reading:
        """The time since."""
        synchronise(self.device)
        wall, busy = time.perf_counter() - self._wall, time.thread_time() - self._busy
        return Reading(wall, busy if self.device.type == "cpu" else wall)


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing, in seconds.

    Attributes:
        median: the middle one, by the wall's clock.
        spread: the interquartile range over the median.
        busy: the least processor time of the calling thread (on a GPU the fastest by the wall's clock): what other
            work on the machine takes away does not count.
        repeats: how many there are.
    """

    median: float
    spread: float
    busy: float
    repeats: int

    @classmethod
    def of(cls, readings: Sequence[Reading]) -> Sample:
        """Of at least two measurements."""
        low, middle, high = statistics.quantiles([one.wall for one in readings], n=4, method="inclusive")
        return cls(middle, (high - low) / middle, min(one.busy for one in readings), len(readings))

    @property
    def noisy(self) -> bool:
        """Whether the measurements lie too far apart to be relied on."""
        return self.spread > NOISY

    def __str__(self) -> str:
        return f"{self.median * 1e3:.3g} ms +-{self.spread / 2:.0%}"


def synchronise(device: torch.device) -> None:
    """Wait for what a device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hardware(device: torch.device) -> str:
    """The name of a device, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def cache_folder() -> Path:
    """Where timed shapes are kept."""
    own = os.environ.get("LLMPRUNE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmprune"


@dataclass
class Table:
    """Times of operations by their shapes.

    Attributes:
        dtype: element type of the operands.
        device: where they lie.
        around: bytes of weights that a product's weight lies among, one call after the other reading another: a
            model's weights are in no cache when their turn comes again. A power of two.
        seconds: operation and shape, ``gemm@64M 128 64 172`` -> seconds.
        measured: how many shapes were timed since it was made.
    """

    dtype: torch.dtype
    device: torch.device
    around: int
    seconds: dict[str, float] = field(default_factory=dict)
    measured: int = 0

    @classmethod
    def load(cls, dtype: torch.dtype, device: torch.device, weights: int) -> Table:
        """What is known of this machine, from the cache folder, for a model of so many bytes of weights."""
        table = cls(dtype, device, 1 << max(20, min(weights, AROUND).bit_length() - 1))
        try:
            data = json.loads(table.path.read_text(encoding="utf-8"))
            if data["format"] == _FORMAT and data["machine"] == table.machine:
                table.seconds = {str(name): float(value) for name, value in data["seconds"].items()}
        except FileNotFoundError:
            log.debug("no shapes have been timed on this machine yet")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("the table of timed shapes %s is not used (%s)", table.path, error)
        return table

    def __post_init__(self) -> None:
        """Nothing to read from yet."""
        self._pool = torch.empty(0, dtype=self.dtype, device=self.device)

    @property
    def machine(self) -> dict[str, Any]:
        """What the times depend on besides the shapes."""
        return {
            "hardware": hardware(self.device),
            "threads": torch.get_num_threads(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
        }

    @property
    def path(self) -> Path:
        """The file of this machine, threads and type."""
        digest = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode()).hexdigest()[:16]
        return cache_folder() / f"shapes-{digest}.json"

    def save(self) -> None:
        """Keep what was measured, beside what others have measured meanwhile."""
        if not self.measured:
            return
        merged = {**Table.load(self.dtype, self.device, self.around).seconds, **self.seconds}
        data = {"format": _FORMAT, "machine": self.machine, "seconds": dict(sorted(merged.items()))}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, json.dumps(data, indent=0).encode())
        except OSError as error:
            log.warning("the times of %d shapes could not be kept (%s)", self.measured, error)
        self.measured = 0

    def time(self, name: str, sizes: Sequence[int]) -> float:
        """Seconds of one operation, measured where it is not known.

        Args:
            name: ``gemm`` (tokens, in, out): a linear layer; ``bmm`` (batch, rows, inner, columns); ``attention``
                (batch, heads, key-value heads, queries, keys, width of keys, width of values); ``pointwise``
                (elements) or ``view`` ().
            sizes: of its operands, each at least 1.
        """
        where = f"{name}@{self.around >> 20}M" if name == "gemm" else name
        key = " ".join([where, *map(str, sizes)])
        if key not in self.seconds:
            self.seconds[key] = self._measure(self._work(name, sizes))
            self.measured += 1
        return self.seconds[key]

    def _work(self, name: str, sizes: Sequence[int]) -> Callable[[], Any]:
        def made(*shape: int) -> torch.Tensor:
            return torch.ones(shape, dtype=self.dtype, device=self.device)

        if name == "gemm":
            tokens, width, out = sizes
            x = made(tokens, width)
            count = max(1, self.around // (width * out * self.dtype.itemsize))
            if len(self._pool) < count * width * out:
                self._pool = made(count * width * out)
            weights = cycle(self._pool[: count * width * out].view(count, out, width))
            return lambda: F.linear(x, next(weights))
        if name == "bmm":
            batch, rows, inner, columns = sizes
            left, right = made(batch, rows, inner), made(batch, inner, columns)
            return lambda: torch.bmm(left, right)
        if name == "attention":
            batch, heads, shared, queries, keys, width, value_width = sizes
            q, k = made(batch, heads, queries, width), made(batch, shared, keys, width)
            v = made(batch, shared, keys, value_width)
            causal, grouped = queries == keys > 1, shared != heads
            return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        if name == "pointwise":
            x = made(*sizes)
            return lambda: x * x
        if name == "view":
            x = made(2, 2, 2)
            return lambda: x.transpose(1, 2)
        raise InputError(f"there is no operation {name!r} to time")

    def _measure(self, work: Callable[[], Any]) -> float:
        with torch.inference_mode():
            work()
            clock = Clock(self.device)
            work()
            calls = max(1, min(1000, round(BLOCK / max(clock.read().busy, 1e-7))))
            best = float("inf")
            for _ in range(ROUNDS):
                clock = Clock(self.device)
                for _ in range(calls):
                    work()
                best = min(best, clock.read().busy / calls)
        return best
