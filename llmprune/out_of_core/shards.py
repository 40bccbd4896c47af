"""The weights of a checkpoint folder as places in its files: headers are read and checked, tensors are not.

Every way in which safetensors files and their index can be wrong has its own sentence, with the file. The format:
eight bytes of length, that many of JSON (name -> dtype, shape, offsets of first and last byte behind the header), data
without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch

from llmprune.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Dtypes by their names in safetensors files; the library puts those to the front of a file that stand last here."""

SPELT = {dtype: kind for kind, dtype in DTYPES.items()}

UNREADABLE = (
    BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,  # encrypted, compressed in an unknown way, nested too deeply
    MemoryError,  # an array whose header says that it is huge
)
"""What reading an .npz file that is damaged, or none, may raise."""

_HEADER_LIMIT = 100_000_000  # bytes; the format's own
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: ``bytes`` bytes at ``offset`` of ``file``, contiguous, in C order, little-endian."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    bytes: int

    @property
    def kind(self) -> str:
        """The dtype as safetensors spells it."""
        return SPELT[self.dtype]


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by its name in the files.

    Raises:
        CheckpointError: there are no safetensors weights; a file is missing, truncated or damaged; the index names a
            tensor that its file lacks, or a place outside of the folder; a tensor is there twice.
    """
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(_absent(folder))
        return read_header(folder / WEIGHTS)
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{folder / INDEX} has no weight_map: copy it again")
    for name, shard in index.items():
        if not is_file_name(shard):
            raise CheckpointError(
                f"{folder / INDEX} places {name} in {shard!r}, which is no file name: it must lie in the same folder"
            )
    found: dict[str, Stored] = {}
    for shard in sorted(set(index.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard} is missing, but {INDEX} names it: copy it again")
        if not _lies_in(folder, folder / shard):
            raise CheckpointError(
                f"{folder / shard} is a link to {(folder / shard).resolve()}, outside of the folder: put the file "
                "itself there, or give the folder it lies in"
            )
        tensors = read_header(folder / shard)
        lost = sorted(name for name, place in index.items() if place == shard and name not in tensors)
        if lost:
            raise CheckpointError(
                f"{folder / shard} lacks {lost[0]}, which {INDEX} places there: copy it again"
            )
        if twice := sorted(tensors.keys() & found.keys()):
            raise CheckpointError(
                f"{twice[0]} is both in {found[twice[0]].file.name} and in {shard} of {folder}: one of the two files "
                "belongs to another checkpoint"
            )
        found.update(tensors)
    return found


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, in the order of the data.

    Raises:
        CheckpointError: it is truncated or damaged; says how.
    """
    try:
        with open(file, "rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _damaged(file, "it is no regular file")
            start = opened.read(8)
            if len(start) < 8:
                raise _damaged(file, f"it has {status.st_size} bytes, fewer than the length of a header")
            (length,) = struct.unpack("<Q", start)
            if length > _HEADER_LIMIT or 8 + length > status.st_size:
                raise _damaged(file, f"its header would take {length} of its {status.st_size} bytes")
            header = _parse(file, opened.read(length))
    except OSError as error:
        raise _damaged(file, error.strerror or str(error)) from error
    header.pop("__metadata__", None)
    data = 8 + length
    found = [_stored(file, name, entry, data) for name, entry in header.items()]
    found.sort(key=lambda tensor: (tensor.offset, tensor.bytes))
    end = data
    for tensor in found:
        if tensor.offset != end:
            raise _damaged(file, f"the bytes of {tensor.name} do not follow those before it")
        end += tensor.bytes
    if end != status.st_size:
        raise _damaged(file, f"it has {status.st_size} bytes where its header says {end}")
    return {tensor.name: tensor for tensor in found}


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it cannot be read or holds something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): copy it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no JSON object: copy it again")
    return values


def is_file_name(name: object) -> bool:
    """Whether a name that stands in a file leads to a file beside it, and nowhere else."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and "\0" not in name
        and "\\" not in name
        and Path(name).name == name
    )


def _lies_in(folder: Path, file: Path) -> bool:
    """Whether a file that an index names is the folder's own, links followed.

    A snapshot in the hub's cache is a folder of links to ``blobs`` two levels above: those are the folder's own too.
    """
    home, place = folder.resolve(), file.resolve()
    return place.is_relative_to(home) or (
        home.parent.name == "snapshots" and place.parent == home.parent.parent / "blobs"
    )


def sha256(path: Path) -> str:
    """The sha256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    feed(digest, path)
    return digest.hexdigest()


def feed(digest: hashlib._Hash, path: Path) -> None:
    """Add a file's bytes to a digest."""
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise _damaged(file, f"its header names {name} twice")
            values[name] = value
        return values

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is no JSON, {error}") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header is no JSON object")
    return header


def _stored(file: Path, name: str, entry: Any, data: int) -> Stored:
    """One entry of a header; ``data`` is where the file's data begin."""
    try:
        kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"its header does not say where {name} lies") from error
    if not isinstance(kind, str):
        raise _damaged(file, f"its header does not say what {name} holds")
    if kind not in DTYPES:
        raise CheckpointError(
            f"{file} holds {name} as {kind}, which llmprune does not know: update llmprune, or convert the file"
        )
    if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
        raise _damaged(file, f"its header gives {name} an impossible shape or place")
    dtype = DTYPES[kind]
    size = math.prod(shape) * dtype.itemsize
    if last - first != size:
        raise _damaged(
            file, f"{name} of shape {shape} takes {size} bytes, and its header says {last - first}"
        )
    return Stored(name, file, dtype, shape, data + first, size)


def _damaged(file: Path, how: str) -> CheckpointError:
    return CheckpointError(f"{file} is truncated or damaged ({how}): copy it again")


def _absent(folder: Path) -> str:
    """The sentence for a folder without safetensors weights."""
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES)
    if pickles:
        return (
            f"{folder} has its weights as a pickle only ({pickles[0]}), which can run code when it is read: convert it "
            "with transformers' from_pretrained and save_pretrained (they write safetensors) if you trust it"
        )
    return f"{folder / WEIGHTS} is missing: copy it again"
