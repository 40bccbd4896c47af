"""A checkpoint is pruned on the disk at the speed of copying what stays.

A LLaMA-shaped checkpoint of bfloat16 shards loses a random fifth of the FFN channels of every layer and a quarter of
its key-value heads, by `llmprune apply`. Beside it, in turn: `cp` of the finished folder's weights. Both read files
that are not in the page cache and end when the disk has what they wrote. The figure is the wall time of passing the
weights (reading, compacting, hashing, writing) over cp's in the same round, the median of rounds; what finding the form
takes before that does not grow with the widths, and is stated apart. Peak memory is that of the whole command.

usage: python benchmarks/apply.py [--width 2048] [--layers 12] [--repeats 5] [--place DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import transformers as tf
from _measure import Claim, save
from safetensors.torch import save_file

import llmprune
from llmprune.checkpoints import universal
from llmprune.out_of_core.apply import _Streamer
from llmprune.out_of_core.outline import load_outline

SHARD = 1 << 29  # bytes


def write_checkpoint(folder: Path, width: int, layers: int) -> None:
    """A LLaMA of grouped heads with random bits for weights."""
    config = tf.LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    model = universal.build_on_meta(tf.LlamaForCausalLM, config)
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map = {}
    for name, tensor in model.state_dict().items():
        if sum(t.nbytes for t in shards[-1].values()) > SHARD:
            shards.append({})
        bits = torch.randint(0, 1 << 15, tensor.shape, generator=generator, dtype=torch.int16)
        shards[-1][name] = bits.view(torch.bfloat16)
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def make_plan(folder: Path) -> Any:
    """A fifth of every layer's FFN channels and a quarter of its key-value heads, at random."""
    graph = llmprune.trace(load_outline(folder).model)
    rng = np.random.default_rng(0)
    shares = {"ffn": 0.2, "head": 0.25}
    removed = {
        axis.id: np.sort(rng.permutation(axis.size)[: int(shares[axis.kind] * axis.size)])
        for axis in graph.axes
        if axis.prunable and axis.kind in shares
    }
    return llmprune.plan(graph, removed=removed)


def uncached(folder: Path) -> None:
    """Have the disk hold a folder's files and the page cache none of them."""
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flush(folder: Path) -> None:
    """Have the disk hold a folder's files."""
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def children() -> float:
    """CPU seconds of the processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def timed_weights(seconds: list[float]) -> Iterator[None]:
    """Inside, note how long passing the weights takes until the disk has them, and CPU time."""
    finish = _Streamer.finish

    def timed(self: _Streamer) -> None:
        start, used = time.perf_counter(), time.process_time()
        finish(self)
        flush(self.folder)
        seconds.extend([time.perf_counter() - start, time.process_time() - used])

    _Streamer.finish = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        _Streamer.finish = finish  # type: ignore[method-assign]


def main() -> None:
    """Measure, print, write results/apply.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--place", type=Path, help="folder on the disk to measure")
    options = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory(dir=options.place) as temporary:
        place = Path(temporary)
        source, out, copy = place / "model", place / "out", place / "copy"
        source.mkdir()
        write_checkpoint(source, options.width, options.layers)
        plan = make_plan(source)
        llmprune.apply(
            plan, source, out, quiet=True
        )  # once, so that everything is loaded and cp has its source
        kept = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        rounds = []
        for _ in range(options.repeats):
            uncached(source)
            uncached(out)
            copy.mkdir()
            start, used = time.perf_counter(), children()
            subprocess.run(["cp", *sorted(map(str, out.glob("*.safetensors"))), str(copy)], check=True)
            flush(copy)
            copying, copying_cpu = time.perf_counter() - start, children() - used
            shutil.rmtree(copy)
            weights: list[float] = []
            start = time.perf_counter()
            with timed_weights(weights):
                llmprune.apply(plan, source, copy, quiet=True)
            whole = time.perf_counter() - start
            shutil.rmtree(copy)
            rounds.append(
                {
                    "cp": copying,
                    "weights": weights[0],
                    "whole": whole,
                    "cp, CPU": copying_cpu,
                    "weights, CPU": weights[1],
                }
            )
            print({name: round(value, 2) for name, value in rounds[-1].items()}, flush=True)
        plan.save(place / "plan.json")
        words = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "llmprune",
            "apply",
            place / "plan.json",
            source,
            copy,
            "--json",
        ]
        memory = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)["peak"]
        stored = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    ratio = statistics.median(one["weights"] / one["cp"] for one in rounds)
    rate = kept / statistics.median(one["weights"] for one in rounds)
    before = statistics.median(one["whole"] - one["weights"] for one in rounds)
    claims = [
        Claim("passing the weights over cp of the kept bytes", ratio, 1.5),
        Claim("peak memory of the command, MiB", memory / 2**20, 1024.0),
    ]
    print(
        f"{stored / 1e9:.2f} GB -> {kept / 1e9:.2f} GB; {rate / 1e6:.0f} MB/s; {before:.1f} s before the first byte"
    )
    print("\n".join(map(str, claims)))
    save(
        "apply",
        claims,
        width=options.width,
        layers=options.layers,
        bytes={"stored": stored, "kept": kept},
        rounds=rounds,
        seconds_before=before,
        bytes_per_second=rate,
        peak_memory=memory,
    )


if __name__ == "__main__":
    main()
