"""Passes over activations hold one block of a model, however many it has.

The first blocks of a 1B-shaped checkpoint, four of them and eight, are pruned from folder to folder under a memory
budget, by ``obs`` without repair and by ``element1`` with it, each in a process of its own, comparison included. Kept
are wall and processor time, peak memory as the system counts it, and bytes read. Twice the blocks must not take more
memory.

usage: python benchmarks/streamed_passes.py [--budget 4GB] [--samples 32] [--length 128] [--place DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _measure import Claim, machine, save
from scale import SHAPES, uncached, write_checkpoint

from llmprune.machine.budget import parse_bytes

STEPS = ("obs", "repair")
BLOCKS = (4, 8)
SCRIPT = """
import json, sys, time
import torch
from llmprune.out_of_core.stored import open_model
from llmprune.pipeline.prune_stream import prune_streamed
folder, output, what, budget, samples, length = sys.argv[1:7]
def read():
    with open("/proc/self/io") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))
begun, used, before = time.perf_counter(), time.process_time(), read()
ids = torch.randint(0, 32000, (int(samples), int(length)), generator=torch.Generator().manual_seed(0))
model = open_model(folder)
ratio = {"head": 0.25, "ffn": 0.2}
importance, repair = ("obs", "none") if what == "obs" else ("element1", "ls")
report = prune_streamed(model, folder, output + "/" + what, ratio, ids, importance, memory_budget=budget, repair=repair,
                        protect_first=0, protect_last=0, quiet=True)
print(json.dumps({"seconds": time.perf_counter() - begun, "CPU seconds": time.process_time() - used,
                  "peak": max(stage.peak for stage in report.stages), "bytes read": read() - before,
                  "stages": {stage.name: [stage.seconds, stage.peak] for stage in report.stages}}))
"""


def measured(count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Write a checkpoint of so many blocks, and pass over it in every way."""
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        folder = Path(place) / "model"
        entry: dict[str, Any] = {
            "parameters": write_checkpoint(folder, {**SHAPES["1B"], "num_hidden_layers": count}),
            "stored bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        }
        for step in STEPS:
            uncached(folder)
            words = [sys.executable, "-W", "ignore", "-c", SCRIPT, folder, place, step, options.budget]
            words += [options.samples, options.length]
            done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, text=True, check=True)
            entry[step] = json.loads(done.stdout.splitlines()[-1])
            print(f"{count} blocks, {step}: {entry[step]}", flush=True)
    return entry


def main() -> int:
    """Measure, print, save; exit status 1 when a claim fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", default="4GB")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--place", type=Path, help="folder on the disk to measure")
    options = parser.parse_args()
    found = {count: measured(count, options) for count in BLOCKS}
    few, more = (found[count] for count in BLOCKS)
    claims = [
        claim
        for step in STEPS
        for claim in (
            Claim(
                f"{step}: peak memory over the budget", more[step]["peak"] / parse_bytes(options.budget), 1.0
            ),
            Claim(f"{step}: peak memory with twice the blocks", more[step]["peak"] / few[step]["peak"], 1.1),
        )
    ]
    how = {"budget": options.budget, "samples": options.samples, "length": options.length}
    save("streamed_passes", claims, how=how, machine=machine(), blocks=found)
    print("\n".join(map(str, claims)))
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
