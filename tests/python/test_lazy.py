"""Values that are not there: random programs on them, read from files part by part, are what torch computes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmprune.errors import CheckpointError
from llmprune.out_of_core import stream_io
from llmprune.out_of_core.lazy import Lazy, Value
from llmprune.out_of_core.shards import read_header
from llmprune.out_of_core.stream_io import Reader, write_shard

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.bool)


def step(rng: random.Random, tensors: list[torch.Tensor]) -> Any:
    """A random operation: a function of a list of tensors of equal shapes that gives such a list."""
    shape = tensors[0].shape
    dim = rng.randrange(len(shape))
    size = shape[dim]
    cut = rng.randint(1, size)
    start = rng.randrange(size)
    stride = rng.randint(1, 3)
    dims = rng.sample(range(len(shape)), len(shape))
    choices: list[Any] = [
        lambda ts: [torch.cat(ts, dim)] * len(ts),
        lambda ts: [torch.stack(ts, dim)] * len(ts),
        lambda ts: [t.narrow(dim, 0, cut) for t in ts],
        lambda ts: [t[(slice(None),) * dim + (slice(start, None, stride),)] for t in ts],
        lambda ts: [t.permute(dims) for t in ts],
        lambda ts: [t.permute(dims).contiguous() for t in ts],
        lambda ts: [t.unsqueeze(dim) for t in ts],
        lambda ts: [t.transpose(0, dim) for t in ts],
        lambda ts: [torch.chunk(t, cut, dim)[-1] for t in ts],
        lambda ts: [torch.split(t, cut, dim)[0].clone() for t in ts],
        lambda ts: [t.reshape(-1) for t in ts],
        lambda ts: [t.detach().to(torch.float32).to(t.dtype) for t in ts],
        lambda ts: [t.reshape(*reversed(t.shape)) for t in ts],
    ]
    if len(shape) > 1:
        choices.append(lambda ts: [t.select(dim, start) for t in ts])
        choices.append(lambda ts: [t.unbind(dim)[start] for t in ts])
        if size == 1:
            choices.append(lambda ts: [t.squeeze(dim) for t in ts])
    return rng.choice(choices)


@pytest.mark.parametrize("seed", range(60))
def test_random_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(stream_io, "BUFFER", 64)  # so that everything is read and written in many parts
    monkeypatch.setattr(stream_io, "_GAP", 16)
    rng = random.Random(seed)
    dtype = DTYPES[seed % len(DTYPES)]
    generator = torch.Generator().manual_seed(seed)
    shape = [rng.randint(1, 6) for _ in range(rng.randint(1, 3))]
    real = [torch.randint(-9, 9, shape, generator=generator).to(dtype) for _ in range(3)]
    save_file({str(i): t.contiguous() for i, t in enumerate(real)}, tmp_path / "in.safetensors")
    places = read_header(tmp_path / "in.safetensors")
    lazy: list[torch.Tensor] = [Lazy(Value.of(places[str(i)])) for i in range(3)]
    for _ in range(rng.randint(1, 6)):
        if real[0].dim() > 4 or real[0].numel() > 2000:
            break
        operation = step(rng, real)
        real, lazy = operation(real), operation(lazy)
        assert [t.shape for t in lazy] == [t.shape for t in real]
        for dim in range(real[0].dim()):  # and a cut, as a plan makes it
            if rng.random() < 0.3:
                size = real[0].shape[dim]
                kept = np.sort(rng.sample(range(size), rng.randint(1, size))).astype(np.int64)
                real = [t.index_select(dim, torch.from_numpy(kept)) for t in real]
                lazy = [Lazy(t.value.take(dim, kept)) for t in lazy]  # type: ignore[attr-defined]
    with Reader() as reader:
        values = {str(i): t.value for i, t in enumerate(lazy)}  # type: ignore[attr-defined]
        for i, t in enumerate(real):
            assert torch.equal(reader.tensor(values[str(i)]), t)
        write_shard(tmp_path / "out.safetensors", values, reader, {"format": "pt"})
    expected = {str(i): t.contiguous().clone() for i, t in enumerate(real)}
    save_file(expected, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_what_is_joined_and_split_again_is_read_from_where_it_was(tmp_path: Path) -> None:
    """Experts that are stacked on loading and parted on saving cost no more reading than they are long."""
    tensors = {str(i): torch.arange(12.0).view(3, 4) + 100 * i for i in range(4)}
    save_file(tensors, tmp_path / "in.safetensors")
    places = read_header(tmp_path / "in.safetensors")
    stacked = torch.stack([Lazy(Value.of(places[str(i)])) for i in range(4)])
    parted = [chunk.squeeze(0) for chunk in torch.chunk(stacked, 4)]
    for i, part in enumerate(parted):
        (block,) = part.value.blocks
        assert block.source is places[str(i)]
    assert all(part.memory is stacked.memory for part in parted)  # views of one tensor


def test_a_changed_dtype_leaves_what_is_stored(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3, dtype=torch.float16)}, tmp_path / "in.safetensors")
    wide = Lazy(Value.of(read_header(tmp_path / "in.safetensors")["x"])).to(torch.float32)
    assert (wide.dtype, wide.value.dtype) == (torch.float32, torch.float16)


def test_writing_into_one_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "in.safetensors")
    lazy = Lazy(Value.of(read_header(tmp_path / "in.safetensors")["x"]))
    with pytest.raises(CheckpointError, match="only read from files"):
        lazy.zero_()


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path: Path) -> None:
    save_file({"x": torch.ones(100)}, tmp_path / "in.safetensors")
    value = Value.of(read_header(tmp_path / "in.safetensors")["x"])
    data = (tmp_path / "in.safetensors").read_bytes()
    (tmp_path / "in.safetensors").write_bytes(data[:-40])
    with Reader() as reader, pytest.raises(CheckpointError, match=r"in.safetensors ends within x"):
        reader.tensor(value)


def test_the_file_is_the_librarys_and_its_sum_right(tmp_path: Path) -> None:
    import hashlib

    tensors = {f"{name}ü": torch.randn(5, 3).to(d) for name, d in zip("dbca", DTYPES[:4], strict=True)}
    tensors["empty"], tensors["scalar"] = torch.empty(0, 4), torch.tensor(3.0)
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    with Reader() as reader:
        values = {name: Value.of(tensor) for name, tensor in tensors.items()}
        sha = write_shard(tmp_path / "out.safetensors", values, reader, {"format": "pt"})
    data = (tmp_path / "out.safetensors").read_bytes()
    assert data == (tmp_path / "expected.safetensors").read_bytes()
    assert sha == hashlib.sha256(data).hexdigest()
    assert load_file(tmp_path / "out.safetensors")["scalar"] == 3
