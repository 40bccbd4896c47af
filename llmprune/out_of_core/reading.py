"""Parts of stored tensors, read by ``pread`` into memory of the caller's, and the weights that stay in their files.

Reading through a memory map leaves the whole checkpoint in the page cache, and in the process's resident memory for as
long as the map lives. Here bytes go where they are wanted, and the kernel is told to forget them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from llmprune.errors import CheckpointError
from llmprune.out_of_core.shards import Stored

SLICE_BYTES = 1 << 24
"""Of a weight that is multiplied while it lies in its file, so much is in memory at a time."""

_STEP = 1 << 24
"""Bytes of one read: a reader in another thread is never far from looking up."""


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class Files:
    """Reads parts of stored tensors.

    Attributes:
        bytes_read: How much has been read so far.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self._open: dict[Path, int] = {}

    def read(self, stored: Stored, start: int, target: memoryview) -> None:
        """Fill ``target`` from byte ``start`` of a tensor on.

        Raises:
            CheckpointError: the file has become shorter, or cannot be read.
        """
        try:
            descriptor = self._open.get(stored.file)
            if descriptor is None:
                descriptor = self._open[stored.file] = os.open(stored.file, os.O_RDONLY)
            done = 0
            while done < len(target):
                place = stored.offset + start + done
                got = os.preadv(descriptor, [target[done : done + _STEP]], place)
                if got == 0:
                    raise CheckpointError(f"{stored.file} ends too early: copy it again")
                done += got
                forget(descriptor, place, got)
        except OSError as error:
            raise CheckpointError(
                f"{stored.file} cannot be read ({error.strerror}): copy it again"
            ) from error
        self.bytes_read += len(target)

    def tensor(self, stored: Stored) -> torch.Tensor:
        """A whole tensor in memory of its own."""
        out = torch.empty(stored.shape, dtype=stored.dtype)
        if out.numel():
            self.read(stored, 0, bytes_of(out))
        return out

    def rows(self, stored: Stored, start: int, stop: int) -> torch.Tensor:
        """Indices ``start`` to ``stop`` of a tensor's first dimension."""
        out = torch.empty((stop - start, *stored.shape[1:]), dtype=stored.dtype)
        if out.numel():
            self.read(stored, start * (stored.bytes // stored.shape[0]), bytes_of(out))
        return out

    def gather(self, stored: Stored, rows: torch.Tensor) -> torch.Tensor:
        """Some indices, (n,), of a tensor's first dimension; runs of neighbours are read in one go."""
        wanted, places = np.unique(rows.numpy(), return_inverse=True)
        out = torch.empty((len(wanted), *stored.shape[1:]), dtype=stored.dtype)
        if not out.numel():
            return out
        width = stored.bytes // stored.shape[0]
        memory = bytes_of(out)
        breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
        for begin, end in zip([0, *breaks], [*breaks, len(wanted)], strict=True):
            self.read(stored, int(wanted[begin]) * width, memory[begin * width : end * width])
        return (
            out
            if len(wanted) == len(places) and bool((np.diff(places) == 1).all())
            else out[torch.from_numpy(places)]
        )

    def close(self) -> None:
        """Close the files; reading opens them again."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


class Sliced:
    """A parameter that stays in its file; what is asked for is read, in the dtype of the model.

    Stands for a weight of two dimensions where it is looked up, multiplied or reduced slice by slice.
    """

    def __init__(self, files: Files, stored: Stored, dtype: torch.dtype):
        self._files, self._stored = files, stored
        self.dtype, self.shape, self.device = dtype, torch.Size(stored.shape), torch.device("cpu")

    def __len__(self) -> int:
        """The number of rows."""
        return self.shape[0]

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """A slice of rows, or those with the numbers in a tensor (n,)."""
        if isinstance(rows, torch.Tensor):
            return self._files.gather(self._stored, rows.reshape(-1)).to(self.dtype).view(*rows.shape, -1)
        start, stop, _ = rows.indices(len(self))
        return self._files.rows(self._stored, start, stop).to(self.dtype)

    def slices(self) -> Iterator[tuple[int, int]]:
        """Rows to read at a time: (first, past the last)."""
        step = max(1, SLICE_BYTES * len(self) // max(1, self._stored.bytes))
        for start in range(0, len(self), step):
            yield start, min(start + step, len(self))

    def dim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """The number of elements."""
        return self.shape.numel()

    def detach(self) -> Sliced:
        """Itself: it takes no part in autograd."""
        return self

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """As :func:`torch.nn.functional.embedding`."""
        return self[ids]

    def times(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As :func:`torch.nn.functional.linear`."""
        y = torch.cat([F.linear(x, self[start:stop]) for start, stop in self.slices()], -1)
        return y if bias is None else y + bias

    def back(self, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of the input of :meth:`times`: (..., rows) -> (..., columns)."""
        parts = (dy[..., start:stop] @ self[start:stop] for start, stop in self.slices())
        total = next(iter(parts))
        for part in parts:
            total += part
        return total


def forget(descriptor: int, offset: int, length: int) -> None:
    """Tell the kernel that these bytes of a file will not be needed again, where it takes advice."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
