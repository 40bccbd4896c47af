"""Reading parts of stored tensors, and writing safetensors files from them, through buffers of a fixed size.

No file is mapped: what is read goes through one buffer, what is kept is moved together by the C kernels, and a second
thread hashes and writes while the next part is read. Pages that have been used are given back to the system.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from llmprune import _core
from llmprune.compaction.compact import WORDS, gather
from llmprune.errors import CheckpointError
from llmprune.out_of_core.lazy import Block, Computed, Index, Value
from llmprune.out_of_core.shards import DTYPES, SPELT, Stored

BUFFER = 16 << 20
"""Bytes of a buffer: one for what is read, :data:`_PARTS` for what is written."""

_PARTS = 3  # one filled, one written, one waiting
_GAP = 1 << 20  # bytes between kept positions that are not read along
_FORGET = 64 << 20  # bytes after which used pages are given back
_ALIGNED = 8  # a header's length is a multiple of this
_ORDER = {kind: place for place, kind in enumerate(reversed(DTYPES))}


class Reader:
    """Reads boxes of stored tensors; a context manager that closes the files in the end."""

    def __init__(self) -> None:
        self._bytes = torch.empty(BUFFER, dtype=torch.uint8)  # what is read and partly kept
        self._files: dict[Path, int] = {}
        self._closing = ExitStack()
        self._unused: dict[int, int] = {}  # descriptor -> bytes read since its pages were given back
        self._computed: tuple[Computed, torch.Tensor] | None = None

    def __enter__(self) -> Reader:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        self._closing.close()
        self._files.clear()
        self._computed = None

    def fill(self, out: torch.Tensor, value: Value) -> None:
        """Put a value into a tensor of its shape and dtype."""
        for block in value.blocks:
            shape = block.shape
            target = out[tuple(slice(at, at + n) for at, n in zip(block.start, shape, strict=True))]
            order = [axis for axis in block.axes if axis >= 0]
            box = torch.Size(map(len, block.index))
            if order == sorted(order) and target.is_contiguous():
                self._box(target.view(box), block)
            else:
                part = torch.empty(box, dtype=out.dtype)
                self._box(part, block)
                part = part.view(
                    [len(i) for i, axis in zip(block.index, block.axes, strict=True) if axis >= 0]
                )
                # To the value's order of dimensions, those of size 1 that no source has put in.
                part = part.permute(sorted(range(len(order)), key=order.__getitem__))
                target.copy_(part.reshape(shape))

    def tensor(self, value: Value) -> torch.Tensor:
        """A value as a tensor of its own."""
        out = torch.empty(value.shape, dtype=value.dtype)
        self.fill(out, value)
        return out

    def _box(self, target: torch.Tensor, block: Block) -> None:
        """Put a block into a contiguous tensor that has the dimensions of its source."""
        source = block.source
        if isinstance(source, Stored):
            if target.numel():
                self._level(target, source, block.index, 0, source.offset)
            return
        if isinstance(source, Computed):
            if self._computed is None or self._computed[0] is not source:
                self._computed = source, source.make(self.tensor)
            source = self._computed[1]
        kept = {
            dim: np.asarray(index, dtype=np.int64)
            for dim, index in enumerate(block.index)
            if len(index) != source.shape[dim]
        }
        target.copy_(gather(source, kept) if kept else source)

    def _level(
        self, target: torch.Tensor, source: Stored, index: tuple[Index, ...], dim: int, at: int
    ) -> None:
        """Positions ``index[dim:]`` of what begins at byte ``at``, into ``target`` (which has these dimensions)."""
        if dim == len(index):
            self._read(source, at, target)
            return
        positions, sizes = index[dim], source.shape[dim:]
        each = math.prod(sizes[1:]) * source.dtype.itemsize
        whole = [len(i) == n for i, n in zip(index[dim:], sizes, strict=True)]
        if all(whole[1:]) and isinstance(positions, range):
            self._read(source, at + positions.start * each, target)
            return
        for low, high in _groups(positions, each, self._bytes.numel()):
            first, last = int(positions[low]), int(positions[high - 1])
            span = (last - first + 1) * each
            if span > self._bytes.numel():  # one position, larger than the buffer
                self._level(target[low], source, index, dim + 1, at + first * each)
                continue
            read = self._bytes[:span]
            self._read(source, at + first * each, read)
            # The buffer's start is aligned for every dtype.
            part = read.view(source.dtype).view(last - first + 1, *sizes[1:])
            kept = {
                place: np.asarray(i, dtype=np.int64)
                for place, (i, n) in enumerate(zip(index[dim + 1 :], sizes[1:], strict=True), start=1)
                if len(i) != n
            }
            if high - low != last - first + 1:
                kept[0] = np.asarray(positions[low:high], dtype=np.int64) - first
            if kept:
                word = WORDS[source.dtype.itemsize]
                _core.compact_into(target[low:high].view(word), part.view(word), kept)
            else:
                target[low:high].copy_(part)

    def _read(self, source: Stored, at: int, target: torch.Tensor) -> None:
        """Fill a contiguous tensor with the bytes at ``at`` of the file."""
        descriptor = self._files.get(source.file)
        if descriptor is None:
            descriptor = self._files[source.file] = os.open(source.file, os.O_RDONLY | os.O_CLOEXEC)
            self._closing.callback(os.close, descriptor)
        view = _bytes(target)
        while len(view):
            done = os.preadv(descriptor, [view], at)
            if not done:
                raise CheckpointError(
                    f"{source.file} ends within {source.name}: it was cut short while it was read; copy it again"
                )
            view, at = view[done:], at + done
        self._unused[descriptor] = self._unused.get(descriptor, 0) + target.numel() * target.element_size()
        if self._unused[descriptor] >= _FORGET:
            _forget(descriptor, at)
            self._unused[descriptor] = 0


def write_shard(
    path: Path,
    values: Mapping[str, Value],
    reader: Reader,
    metadata: Mapping[str, str],
    progress: Callable[[int], object] = lambda count: None,
) -> str:
    """Write a safetensors file, byte for byte as the library does.

    Args:
        path: the file, which must not exist.
        values: what it is to hold.
        reader: reads it.
        metadata: the header's own entry.
        progress: called with the bytes of tensors that have been handed on.

    Returns:
        The file's sha256, hexadecimal.

    Raises:
        OSError: it cannot be written.
        CheckpointError: what is read cannot be.
    """
    names = sorted(values, key=lambda name: (_ORDER[SPELT[values[name].dtype]], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        value = values[name]
        header[name] = {
            "dtype": SPELT[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [end, end + value.bytes],
        }
        end += value.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with open(path, "xb", buffering=0) as file, _Output(file.fileno()) as output:
        output.put(struct.pack("<Q", len(text)) + text)
        for name in names:
            for part in _parts(values[name], output.size):
                buffer = output.buffer()
                room = buffer[: part.bytes].view(part.dtype).view(part.shape)
                reader.fill(room, part)
                output.give(part.bytes)
                progress(part.bytes)
        return output.finish()


class _Output:
    """Hashes and writes in a thread of its own what is put into its buffers in turn."""

    def __init__(self, descriptor: int) -> None:
        self.size = BUFFER
        self._descriptor = descriptor
        self._buffers = [torch.empty(self.size, dtype=torch.uint8) for _ in range(_PARTS)]
        self._tasks: list[Future[None] | None] = [None] * _PARTS
        self._at = 0
        self._unwritten = 0
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> _Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def buffer(self) -> torch.Tensor:
        """A free buffer, as bytes; :meth:`give` sends it."""
        task = self._tasks[self._at]
        if task is not None:
            task.result()
            self._tasks[self._at] = None
        return self._buffers[self._at]

    def give(self, count: int) -> None:
        """Have the first ``count`` bytes of the last buffer written."""
        data = _bytes(self._buffers[self._at])[:count]
        self._tasks[self._at] = self._thread.submit(self._write, data)
        self._at = (self._at + 1) % _PARTS

    def put(self, data: bytes) -> None:
        """Have other bytes written."""
        self.buffer()
        self._tasks[self._at] = self._thread.submit(self._write, memoryview(data))
        self._at = (self._at + 1) % _PARTS

    def finish(self) -> str:
        """Wait for all; the sha256."""
        for _ in range(_PARTS):
            self.buffer()
            self._at = (self._at + 1) % _PARTS
        return self._hash.hexdigest()

    def _write(self, data: memoryview) -> None:
        self._hash.update(data)
        while len(data):
            done = os.write(self._descriptor, data)
            data = data[done:]
            self._unwritten += done
        if self._unwritten >= _FORGET:
            _forget(self._descriptor, 0)  # begins to write out what is not yet on the disk
            self._unwritten = 0


def _parts(value: Value, most: int) -> Iterator[Value]:
    """A value in pieces that follow each other in memory, each of at most ``most`` bytes."""
    if value.bytes <= most:
        if value.bytes:
            yield value
        return
    each = value.dtype.itemsize
    dim = len(value.shape) - 1
    while each * value.shape[dim] <= most:
        each *= value.shape[dim]
        dim -= 1
    step = most // each
    for outer in itertools.product(*map(range, value.shape[:dim])):
        row = value
        for place, position in enumerate(outer):
            row = row.take(place, range(position, position + 1))
        for low in range(0, value.shape[dim], step):
            yield row.take(dim, range(low, min(low + step, value.shape[dim])))


def _groups(positions: Index, each: int, most: int) -> Iterator[tuple[int, int]]:
    """Runs of ``positions`` to be read together, as (first, end): close enough, and at most ``most`` bytes apart."""
    places = np.asarray(positions, dtype=np.int64)
    far = np.flatnonzero(np.diff(places) > 1 + _GAP // max(each, 1)) + 1
    for low, high in itertools.pairwise([0, *far.tolist(), len(places)]):
        while low < high:
            end = int(np.searchsorted(places[:high], places[low] + max(most // max(each, 1), 1)))
            yield low, end
            low = end


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    flat: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _forget(descriptor: int, end: int) -> None:
    """Tell the system that a file's pages up to ``end`` (0: all) are not needed again, where it wants to know."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, end, os.POSIX_FADV_DONTNEED)
