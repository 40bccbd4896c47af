"""Claim 4: cutting a tensor in place runs at the speed of memory.

A 4096 x 4096 tensor loses a random fifth of its rows, its columns, or both. Beside the in-place cut, on one thread and
in turn: memcpy (NumPy's copy of contiguous bytes), torch.index_select and numpy.take, each into memory of its own that
is already mapped, and index_select as it is commonly called, into a fresh tensor. Process CPU time, medians of rounds.

Figures are throughput over memcpy's: bytes that have to be read and written, over seconds. A cut of rows reads what
stays; one of columns reads whole rows, because a fifth of random columns leaves no cache line untouched. The floor of
each cut is that traffic at memcpy's rate, so the figure is also the share of the floor reached.

usage: python benchmarks/compaction.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from _measure import Claim, interleaved, medians, save

from llmprune import _core

ROWS, COLUMNS = 4096, 4096
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
CUTS = {"rows": (0,), "columns": (1,), "rows and columns": (0, 1)}


def chain(
    tensor: torch.Tensor, kept: dict[int, np.ndarray], outs: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """index_select over each dimension, rows first, so that the second pass has less to read."""
    for step, (dim, positions) in enumerate(sorted(kept.items())):
        index = torch.from_numpy(positions)
        if outs is None:
            tensor = torch.index_select(tensor, dim, index)
        else:
            tensor = torch.index_select(tensor, dim, index, out=outs[step])
    return tensor


def take(array: np.ndarray, kept: dict[int, np.ndarray], outs: list[np.ndarray]) -> np.ndarray:
    """The same by numpy.take; mode "clip" is the one that writes to `out` without a buffer between."""
    for step, (dim, positions) in enumerate(sorted(kept.items())):
        array = np.take(array, positions, axis=dim, out=outs[step], mode="clip")
    return array


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same memory as an array of integers of the element's width: NumPy has no bfloat16."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    array: np.ndarray = tensor.view(width).numpy()
    return array


def measure(dtype: torch.dtype, cut: str, repeats: int) -> dict[str, Any]:
    """One dtype and cut: seconds, and throughput over memcpy's."""
    rng = np.random.default_rng(0)
    kept = {
        dim: np.sort(rng.permutation(size)[: size - size // 5])
        for dim, size in enumerate((ROWS, COLUMNS))
        if dim in CUTS[cut]
    }
    source = torch.randint(-100, 100, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0)).to(dtype)
    want = chain(source, kept)
    outs = [chain(source, dict(sorted(kept.items())[: step + 1])) for step in range(len(kept))]
    arrays = [as_numpy(out) for out in outs]
    work, copied = source.clone(), torch.empty_like(source)
    bytes_in, bytes_out = (as_numpy(tensor).reshape(-1).view(np.uint8) for tensor in (source, copied))

    _core.compact(work, kept, 1)
    assert torch.equal(work.flatten()[: want.numel()].reshape(want.shape), want)
    cases: dict[str, Callable[[], Any]] = {
        "memcpy": lambda: np.copyto(bytes_out, bytes_in),
        # The bytes in memory do not change the work, so one tensor is cut again and again.
        "in place": lambda: _core.compact(work, kept, 1),
        "index_select": lambda: chain(source, kept, outs),
        "index_select, fresh": lambda: chain(source, kept),
        "numpy.take": lambda: take(as_numpy(source), kept, arrays),
    }
    for call in cases.values():
        call()
    typical = medians(interleaved(cases, repeats, show=False))
    rows_left = len(kept[0]) if 0 in kept else ROWS
    traffic = (rows_left * COLUMNS + want.numel()) * source.element_size()
    rate = 2 * len(bytes_in) / typical["memcpy"]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "cut": cut,
        "seconds": typical,
        "memcpy bytes/s": rate,
        "of memcpy": {name: traffic / typical[name] / rate for name in cases if name != "memcpy"},
        "over index_select": typical["index_select"] / typical["in place"],
        "over index_select, fresh": typical["index_select, fresh"] / typical["in place"],
        "over numpy.take": typical["numpy.take"] / typical["in place"],
    }


def main() -> None:
    """Measure, print, write results/compaction.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)

    print(f"instruction set {_core.simd_level()}; throughput over memcpy's\n")
    print(
        f"{'tensor and cut':28} {'memcpy':>10} {'in place':>9} {'index_select':>13} {'fresh':>7} {'take':>7}"
    )
    rows = []
    for dtype in DTYPES:
        for cut in CUTS:
            row = measure(dtype, cut, repeats)
            rows.append(row)
            share = row["of memcpy"]
            print(
                f"{row['dtype'] + ' ' + cut:28} {row['memcpy bytes/s'] / 1e9:5.1f} GB/s {share['in place']:9.2f}"
                f" {share['index_select']:13.2f} {share['index_select, fresh']:7.2f} {share['numpy.take']:7.2f}",
                flush=True,
            )
    floats = [row for row in rows if row["dtype"] != "int8"]
    claims = [
        Claim(
            "in-place cut over memcpy's throughput, worst float case",
            min(row["of memcpy"]["in place"] for row in floats),
            0.8,
            at_least=True,
        ),
        Claim(
            "in-place cut of columns over torch.index_select into a fresh tensor, worst float case",
            min(row["over index_select, fresh"] for row in floats if "columns" in row["cut"]),
            4.0,
            at_least=True,
        ),
    ]
    print("\n" + "\n".join(map(str, claims)))
    save("compaction", claims, simd=_core.simd_level(), repeats=repeats, cuts=rows)


if __name__ == "__main__":
    main()
