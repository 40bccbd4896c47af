"""Headers of safetensors files and their index: read as the library reads them; each damage has its own sentence."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmprune.errors import CheckpointError
from llmprune.out_of_core.shards import DTYPES, INDEX, find_tensors, read_header


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with tensors of every dtype, and an index."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{part}.{kind}": torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
        for part in "ab"
        for kind, dtype in DTYPES.items()
    }
    weight_map = {}
    for part in "ab":
        file = f"model-{part}.safetensors"
        mine = {name: tensor for name, tensor in tensors.items() if name.startswith(part)}
        save_file(mine, tmp_path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def test_every_tensor_is_where_the_library_finds_it(folder: Path) -> None:
    found = find_tensors(folder)
    expected = load_file(folder / "model-a.safetensors") | load_file(folder / "model-b.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        place = found[name]
        data = place.file.read_bytes()[place.offset : place.offset + place.bytes]
        assert (place.dtype, place.shape) == (tensor.dtype, tuple(tensor.shape))
        assert data == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_files_hold_dtypes_in_the_order_of_the_table(folder: Path) -> None:
    kinds = [place.kind for place in read_header(folder / "model-a.safetensors").values()]
    assert kinds == list(DTYPES)[::-1]


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a header, and leave the data."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def place_in(folder: Path, shard: Any, name: str = "a.F32") -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = shard
    (folder / INDEX).write_text(json.dumps(index))


A = "model-a.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard missing": (lambda f: (f / A).unlink(), rf"{A} is missing, but {INDEX} names it"),
    "shard truncated": (
        lambda f: (f / A).write_bytes((f / A).read_bytes()[:-1]),
        rf"{A} is truncated or damaged \(it has \d+ bytes where its header says",
    ),
    "shard too long": (
        lambda f: (f / A).write_bytes((f / A).read_bytes() + b"\0"),
        rf"{A} is truncated or damaged \(it has",
    ),
    "cut in the header": (
        lambda f: (f / A).write_bytes((f / A).read_bytes()[:100]),
        rf"{A} is truncated or damaged \(its header would take",
    ),
    "seven bytes": (lambda f: (f / A).write_bytes(bytes(7)), rf"{A} is truncated or damaged \(it has 7"),
    "no JSON": (
        lambda f: (f / A).write_bytes(struct.pack("<Q", 8) + b"not JSON"),
        rf"{A} is truncated or damaged \(its header is no JSON",
    ),
    "a list": (
        lambda f: (f / A).write_bytes(struct.pack("<Q", 2) + b"[]"),
        rf"{A} is truncated or damaged \(its header is no JSON object",
    ),
    "named twice": (
        lambda f: (f / A).write_bytes(struct.pack("<Q", 15) + b'{"x":{},"x":{}}'),
        rf"{A} is truncated or damaged \(its header names x twice",
    ),
    "shape that does not fit": (
        lambda f: rewrite(f / A, lambda h: h["a.F32"].update(shape=[3, 6])),
        rf"{A} is truncated or damaged \(a.F32 of shape \(3, 6\) takes 72 bytes, and its header says 60",
    ),
    "negative shape": (
        lambda f: rewrite(f / A, lambda h: h["a.F32"].update(shape=[-3, -5])),
        rf"{A} .*its header gives a.F32 an impossible shape",
    ),
    "overlapping bytes": (
        lambda f: rewrite(f / A, lambda h: h["a.F32"].update(data_offsets=h["a.U32"]["data_offsets"])),
        rf"{A} .*the bytes of a\.\w+ do not follow those before it",
    ),
    "no offsets": (
        lambda f: rewrite(f / A, lambda h: h["a.F32"].pop("data_offsets")),
        rf"{A} .*its header does not say where a.F32 lies",
    ),
    "unknown dtype": (
        lambda f: rewrite(f / A, lambda h: h["a.F32"].update(dtype="F3")),
        rf"{A} holds a.F32 as F3, which llmprune does not know",
    ),
    "absent tensor": (lambda f: place_in(f, A, "c"), rf"{A} lacks c, which {INDEX} places there"),
    "folder in the way": (
        lambda f: ((f / A).unlink(), (f / A).mkdir()),
        rf"{A} is missing",
    ),
    **{
        f"outside: {shard!r}": (lambda f, s=shard: place_in(f, s), "which is no file name")
        for shard in ("../model-a.safetensors", "/etc/passwd", "sub/x", "..", "", 3, None, "a\0b")
    },
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_its_file(folder: Path, damage: str) -> None:
    harm, sentence = DAMAGE[damage]
    harm(folder)
    with pytest.raises(CheckpointError, match=sentence):
        find_tensors(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    both = load_file(folder / "model-b.safetensors") | {"a.F32": torch.zeros(1)}
    save_file(both, folder / "model-b.safetensors")
    with pytest.raises(
        CheckpointError, match=r"a.F32 is both in model-a.safetensors and in model-b.safetensors"
    ):
        find_tensors(folder)
