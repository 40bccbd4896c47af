"""Pruning by llmprune's own choice (obs, repair) takes at most five times what pruning by element1 alone takes.

LLaMA-shaped checkpoints with random weights and the demo model's tokenizer, of several widths, pruned by the command
as a user gives it: `llmprune prune MODEL_DIR --ratio 0.2 --calibration TEXT --output DIR`, without further options and
with `--importance element1 --repair none`, in turn. The figure is the CPU time of the whole process (loading, tracing,
calibration at each one's own default, verification, saving), the median over rounds of the one over the other's. What
the stages take is kept beside it, and the same quotient of wall times.

usage: python benchmarks/own_choice.py [--repeats 3] [--widths 256,512,1024]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _measure import Claim, save
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "demo" / "calibration.txt"
WAYS: dict[str, list[str]] = {"own choice": [], "element1": ["--importance", "element1", "--repair", "none"]}
LAYERS = 6


def write_checkpoint(folder: Path, width: int) -> None:
    """A LLaMA of grouped heads whose feed-forward is 2.75 times as wide."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(folder: Path, output: Path, options: list[str]) -> dict[str, Any]:
    """One command: CPU and wall seconds of its process, and of its stages."""
    words = [sys.executable, "-m", "llmprune", "prune", folder, "--ratio", 0.2, "--calibration", TEXT]
    words += ["--output", output, "--json", *options]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(list(map(str, words)), check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    stages = {stage["name"]: round(stage["seconds"], 3) for stage in json.loads(done.stdout)["stages"]}
    return {"CPU seconds": cpu, "wall seconds": wall, "stages": stages}


def main() -> int:
    """Run, print, write the result; exit status 1 when a claim fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--widths", default="256,512,1024")
    args = parser.parse_args()
    threads = os.cpu_count() or 1
    claims, tables = [], {}
    for width in map(int, args.widths.split(",")):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            write_checkpoint(folder, width)
            rounds = [
                {way: run(folder, Path(place) / f"{way}{i}", options) for way, options in WAYS.items()}
                for i in range(args.repeats)
            ]
        quotients = {
            clock: statistics.median(one["own choice"][clock] / one["element1"][clock] for one in rounds)
            for clock in ("CPU seconds", "wall seconds")
        }
        tables[f"hidden {width}, feed-forward {width * 11 // 4}"] = {"over": quotients, "rounds": rounds}
        claims.append(
            Claim(
                f"hidden {width}, feed-forward {width * 11 // 4}: own choice over element1, CPU time of the command",
                quotients["CPU seconds"],
                5.0,
            )
        )
        print(claims[-1], flush=True)
    save("own_choice", claims, cpus=threads, layers=LAYERS, tables=tables)
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
