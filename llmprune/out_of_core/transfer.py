"""The way of a block's weights from their files to where the block runs: straight there, or through pinned host memory.

On the CPU files are read into the memory the block runs from. For a device a block is read into pinned host memory, and
copied from there on a stream of its own while the device computes on another: three blocks are then on their way, one
being read, one being copied and one being used. Memory is used again only when the event behind its last use has come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Fill = Callable[[torch.Tensor], None]
"""Writes a block into host memory (bytes,) from its beginning on."""


class Way(Protocol):
    """How blocks get to where they run; ``bring`` is called by the reading thread, all else by the computing one."""

    def memory(self, size: int) -> torch.Tensor:
        """Memory (bytes,) that a block runs from."""

    def bring(self, fill: Fill, target: torch.Tensor, length: int) -> Any:
        """Have the first ``length`` bytes of ``target`` be what ``fill`` writes; what :meth:`arrive` takes."""

    def arrive(self, ticket: Any) -> None:
        """What is queued from now on finds the block there."""

    def leave(self, target: torch.Tensor) -> None:
        """What has been queued so far is the last that uses ``target``."""


class Direct:
    """Into the CPU's memory."""

    def memory(self, size: int) -> torch.Tensor:
        """As :class:`Way`."""
        return torch.empty(size, dtype=torch.uint8)

    def bring(self, fill: Fill, target: torch.Tensor, length: int) -> None:
        """As :class:`Way`."""
        fill(target)

    def arrive(self, ticket: None) -> None:
        """As :class:`Way`."""

    def leave(self, target: torch.Tensor) -> None:
        """As :class:`Way`."""


class Cuda:
    """What :class:`Staged` needs of a CUDA device; the tests have a stand-in that checks the order of events."""

    def __init__(self, device: torch.device):
        self.device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def memory(self, size: int) -> torch.Tensor:
        """Device memory."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def pinned(self, size: int) -> torch.Tensor:
        """Host memory that the device copies from by itself."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def used(self) -> Any:
        """An event behind what has been queued on the computing thread's stream."""
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        """Queue a copy behind an event (None: at once) on the stream of copies; the event behind it."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._copies.record_event()

    def wait(self, event: Any) -> None:
        """Queue nothing on the computing thread's stream to run before the event."""
        torch.cuda.current_stream(self.device).wait_event(event)

    @staticmethod
    def synchronize(event: Any) -> None:
        """Have the calling thread wait for the event."""
        event.synchronize()


@dataclass
class _Host:
    memory: torch.Tensor
    copied: Any = None
    """The event behind the last copy from here."""


class Staged:
    """Through pinned host memory onto a device.

    Args:
        device: A :class:`Cuda`, or what stands in for one.
        size: Bytes of the largest block.
        hosts: How many blocks may be in host memory at a time.

    Attributes:
        bytes_copied: How much has been copied to the device so far.
    """

    def __init__(self, device: Any, size: int, hosts: int = 2):
        self._device = device
        self._hosts = [_Host(device.pinned(size)) for _ in range(hosts)]
        self._next = 0
        self._last_use: dict[int, Any] = {}
        self.bytes_copied = 0

    def memory(self, size: int) -> torch.Tensor:
        """As :class:`Way`."""
        memory: torch.Tensor = self._device.memory(size)
        # Torch's allocator may hand out memory that work queued earlier still uses; the copies run on another stream.
        self._last_use[memory.data_ptr()] = self._device.used()
        return memory

    def bring(self, fill: Fill, target: torch.Tensor, length: int) -> Any:
        """As :class:`Way`."""
        host = self._hosts[self._next]
        self._next = (self._next + 1) % len(self._hosts)
        if host.copied is not None:
            self._device.synchronize(host.copied)
        fill(host.memory)
        after = self._last_use.pop(target.data_ptr(), None)
        host.copied = self._device.copy(target[:length], host.memory[:length], after)
        self.bytes_copied += length
        return host.copied

    def arrive(self, ticket: Any) -> None:
        """As :class:`Way`."""
        self._device.wait(ticket)

    def leave(self, target: torch.Tensor) -> None:
        """As :class:`Way`."""
        self._last_use[target.data_ptr()] = self._device.used()


def way_to(device: torch.device, size: int) -> Way:
    """The way to a device, for blocks of at most ``size`` bytes."""
    return Staged(Cuda(device), size) if device.type == "cuda" else Direct()
