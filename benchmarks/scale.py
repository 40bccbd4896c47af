"""The cost of pruning checkpoints larger than the memory they are given grows with their size, and with nothing else.

LLaMA-shaped checkpoints of bfloat16 at 1, 3 and 7 billion parameters are written to disk, scored to first and second
order block by block under a memory budget, planned for and cut shard by shard, each step in a process of its own. Kept
are wall and processor time, peak memory as the system counts it, bytes read, and the machine's load. Lines are fitted
through wall time, processor time and bytes against parameters, and extrapolated to the 70B shape; beside that stands
what the difference of four and two blocks of a 70B-shaped checkpoint says of its eighty.

Weights of one shape are the same random numbers in every layer: time does not depend on them. Sizes that are measured
already are kept when a run goes on (``--sizes``; none: only the lines are fitted); checkpoints are removed after use.

usage: python benchmarks/scale.py [--sizes 1B 3B 7B 70B] [--budget 4GB] [--samples 10] [--length 64] [--place DIR]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import RESULTS, Claim, machine, save
from matplotlib.figure import Figure
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune.checkpoints import universal
from llmprune.machine.budget import parse_bytes

SHAPES: dict[str, dict[str, int]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 22,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "3B": {
        "hidden_size": 3200,
        "intermediate_size": 8640,
        "num_hidden_layers": 26,
        "num_attention_heads": 25,
        "num_key_value_heads": 5,
    },
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
BLOCKS = (2, 4)
"""Of the 70B-shaped checkpoint, what is written."""
SHARD = 1 << 30
STEPS = ("element1", "element2", "apply")
QUANTITIES = ("seconds", "CPU seconds", "bytes read")
"""Through which lines are fitted; the first depends on what else the machine does (``load``), the last does not."""

SCRIPT = """
import json, sys, time
import torch
import llmprune
from llmprune.out_of_core.stored import open_model, source_of
folder, output, what, budget, samples, length = sys.argv[1:7]
def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
def read():
    with open("/proc/self/io") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))
loaded, begun, used, before = status("VmRSS"), time.perf_counter(), time.process_time(), read()
if what == "apply":
    llmprune.apply(output + "/plan.json", folder, output + "/smaller", quiet=True)
else:
    model = open_model(folder)
    graph = llmprune.trace(model)
    ids = torch.randint(0, 32000, (int(samples), int(length)), generator=torch.Generator().manual_seed(0))
    scores = llmprune.score(model, graph, ids, what, quiet=True, memory_budget=budget, kinds=("head", "ffn"))
    llmprune.plan(graph, scores, 0.2).save(output + "/plan.json")
print(json.dumps({"seconds": time.perf_counter() - begun, "CPU seconds": time.process_time() - used,
                  "peak": status("VmHWM"), "bytes read": read() - before}))
"""


def write_checkpoint(folder: Path, shape: dict[str, int]) -> int:
    """Write it, a shard at a time; how many parameters it has."""
    config = LlamaConfig(
        vocab_size=32000,
        max_position_embeddings=2048,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        **shape,
    )
    folder.mkdir()
    config.save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    values: dict[torch.Size, torch.Tensor] = {}
    files: list[dict[str, torch.Tensor]] = [{}]
    tensors = universal.build_on_meta(LlamaForCausalLM, config).state_dict()
    weight_map: dict[str, str] = {}

    def write() -> None:
        name = f"model-{len(set(weight_map.values())):05}.safetensors"
        save_file({key: t.clone() for key, t in files[0].items()}, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(files[0], name))
        files[0] = {}

    for name, tensor in tensors.items():
        if tensor.shape not in values:
            few = torch.randn(tensor.shape, generator=draw).mul_(0.02).to(torch.bfloat16)
            values[tensor.shape] = torch.ones_like(few) if tensor.dim() == 1 else few
        files[0][name] = values[tensor.shape]
        if sum(t.nbytes for t in files[0].values()) > SHARD:
            write()
    if files[0]:
        write()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(tensor.numel() for tensor in tensors.values())


def uncached(folder: Path) -> None:
    """Have the disk hold a folder's files and the page cache none of them."""
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(shape: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """Write a checkpoint, and do everything with it."""
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        folder = Path(place) / "model"
        start = time.perf_counter()
        entry: dict[str, Any] = {"parameters": write_checkpoint(folder, shape)}
        entry |= {
            "stored bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            "written in": time.perf_counter() - start,
        }
        for step in STEPS:
            uncached(folder)
            words = [sys.executable, "-W", "ignore", "-c", SCRIPT, folder, place, step, options.budget]
            words += [options.samples, options.length]
            done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, text=True, check=True)
            entry[step] = json.loads(done.stdout.splitlines()[-1]) | {"load": os.getloadavg()[0]}
            print(f"{entry['parameters']:,} {step}: {entry[step]}", flush=True)
        entry["kept bytes"] = sum(f.stat().st_size for f in Path(place, "smaller").glob("*.safetensors"))
    return entry


def fitted(entries: list[dict[str, Any]], step: str, quantity: str, large: float) -> dict[str, float]:
    """A line through what a step takes against parameters: slope per billion, intercept, R^2, value at ``large``."""
    x = np.array([entry["parameters"] for entry in entries], dtype=float)
    y = np.array([entry[step][quantity] for entry in entries], dtype=float)
    slope, intercept = np.polyfit(x, y, 1)
    rest, spread = ((y - slope * x - intercept) ** 2).sum(), ((y - y.mean()) ** 2).sum()
    return {
        "per billion": float(slope * 1e9),
        "intercept": float(intercept),
        "R2": float(1 - rest / spread),
        "at 70B": float(slope * large + intercept),
    }


def by_blocks(few: float, more: float) -> float:
    """What two and four 70B-shaped blocks say of eighty."""
    each = (more - few) / (BLOCKS[1] - BLOCKS[0])
    return few + (SHAPES["70B"]["num_hidden_layers"] - BLOCKS[0]) * each


def draw(found: dict[str, Any], lines: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    """Time and peak memory against parameters."""
    entries = [found[name] for name in SHAPES if name in found]
    x = [entry["parameters"] / 1e9 for entry in entries]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for step in STEPS:
        dots = left.plot(x, [entry[step]["seconds"] for entry in entries], "o", label=step)[0]
        if step in lines:
            ends = np.array([0, max(x)])
            line = lines[step]["seconds"]
            left.plot(ends, line["per billion"] * ends + line["intercept"], color=dots.get_color())
        right.plot(x, [entry[step]["peak"] / 1e9 for entry in entries], "o-", label=step)
    left.set(xlabel="parameters, billions", ylabel="seconds", ylim=(0, None))
    right.set(xlabel="parameters, billions", ylabel="peak memory, GB", ylim=(0, None))
    left.legend()
    figure.savefig(file, dpi=120)


def main() -> int:
    """Measure what is missing, fit, print, save; exit status 1 when a claim fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", nargs="*", choices=list(SHAPES), default=list(SHAPES), help="to measure anew"
    )
    parser.add_argument("--budget", default="4GB")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--place", type=Path, help="folder on the disk to measure")
    options = parser.parse_args()
    path = RESULTS / "scale.json"
    found: dict[str, Any] = json.loads(path.read_text())["sizes"] if path.is_file() else {}
    how = {"budget": options.budget, "samples": options.samples, "length": options.length}

    def report() -> list[Claim]:
        entries = [found[name] for name in SHAPES if name in found]
        claims = [
            Claim(
                f"{name}, {step}: peak memory over the budget",
                found[name][step]["peak"] / parse_bytes(options.budget),
                1.0,
            )
            for name in found
            for step in STEPS
        ]
        lines: dict[str, dict[str, dict[str, float]]] = {}
        blocks = [found.get(f"70B, {count} blocks") for count in BLOCKS]
        if len(entries) > 2 and None not in blocks:
            few, more = (block or {} for block in blocks)
            large = by_blocks(few["parameters"], more["parameters"])
            for step, quantity in itertools.product(STEPS, QUANTITIES):
                line = fitted(entries, step, quantity, large)
                line["at 70B, by blocks"] = by_blocks(few[step][quantity], more[step][quantity])
                lines.setdefault(step, {})[quantity] = line
                off = abs(np.log(line["at 70B, by blocks"] / line["at 70B"]))
                claims += [
                    Claim(f"{step}, {quantity}: R^2 of the line", line["R2"], 0.98, at_least=True),
                    Claim(
                        f"{step}, {quantity} at 70B: line and blocks agree within a factor",
                        float(np.exp(off)),
                        1.5,
                    ),
                ]
        save("scale", claims, how=how, sizes=found, lines=lines)
        draw(found, lines, RESULTS / "scale.png")
        return claims

    for name in options.sizes:
        counts = BLOCKS if name == "70B" else (None,)
        for count in counts:
            key = name if count is None else f"{name}, {count} blocks"
            shape = SHAPES[name] if count is None else {**SHAPES[name], "num_hidden_layers": count}
            found[key] = measured(shape, options) | {"how": how, "machine": machine()}
            report()
    claims = report()
    print("\n".join(map(str, claims)))
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
