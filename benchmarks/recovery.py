"""What recovery is worth: how much of the perplexity that pruning cost comes back, in how much CPU time.

20 % of the FFN channels and 25 % of the key-value groups are removed in every layer by element1, without repair and
with it; then LoRA (rank 8) learns the training texts for a few dozen steps.

    python benchmarks/recovery.py [MODEL_DIR ...] [--data DIR] [--steps N] [--repair none|ls|both]

Protocol: calibration and repair on the training text's head; judged on the first 100,000 characters of the validation
text in windows of 128 tokens without overlap. Without arguments it runs on the demo model with the demo's texts; with
``--data`` (or LLMPRUNE_DATA) on stories260K and babyllama936K below DIR/models with the TinyStories texts of DIR/text.
Writes results/recovery.json (recovery_tinystories.json) and prints the table.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _measure import Claim, machine, save

import llmprune
from llmprune.checkpoints.loading import load_model, load_tokenizer
from llmprune.evaluation.perplexity import score_text

RATIO = {"ffn": 0.2, "head": 0.25}
SETTINGS: dict[str, Any] = {"learning_rate": 2e-3, "batch_size": 64, "micro_batch_size": 16, "validation": 64}
CHARACTERS = 100_000
DEMO = Path(__file__).resolve().parent.parent / "demo"
MODELS = ("stories260K", "babyllama936K")
SHARE, MINUTES = 0.5, 10
"""What is claimed on TinyStories; of the demo, with a few thousand tokens to learn from, only that recovery helps."""


def judge(
    folder: Path, calibration: Path, training: Path, text: str, repair: str, steps: int
) -> dict[str, Any]:
    """Perplexities before and after pruning and after recovery, and what the recovery took."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)

    def perplexity() -> float:
        return score_text(model, tokenizer, text).perplexity

    found: dict[str, Any] = {"dense": perplexity()}
    llmprune.prune(
        model, tokenizer, RATIO, calibration, protect_first=0, protect_last=0, repair=repair, quiet=True
    )
    found["pruned"] = perplexity()
    start, wall = time.process_time(), time.perf_counter()
    result = llmprune.recover(
        model, tokenizer, training, steps=steps, validate_every=max(1, steps // 4), quiet=True, **SETTINGS
    )
    found["cpu_seconds"] = time.process_time() - start
    found["wall_seconds"] = time.perf_counter() - wall
    found["recovered"] = perplexity()
    found["share"] = (found["pruned"] - found["recovered"]) / (found["pruned"] - found["dense"])
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["trained"] = result.trained
    found["validation"] = result.validation
    found["curve"] = result.curve
    return found


def main() -> int:
    """Run, print, write the result; exit status 1 when a claim fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="*")
    parser.add_argument("--data", type=Path, default=os.environ.get("LLMPRUNE_DATA"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repair", choices=("none", "ls", "both"), default="both")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.data is None:
        models = args.model or [str(DEMO / "model")]
        calibration = training = DEMO / "calibration.txt"
        text = (DEMO / "eval.txt").read_text()[:CHARACTERS]
    else:
        data = Path(args.data)
        models = args.model or [str(data / "models" / name) for name in MODELS]
        calibration = data / "text/tinystories_train_head.txt"
        training = data / "text/tinystories.jsonl"
        text = (data / "text/tinystories_valid_a.txt").read_text()[:CHARACTERS]
    claims, tables = [], {}
    for folder in map(Path, models):
        name = "demo" if folder == DEMO / "model" else folder.name
        tables[name] = {}
        for repair in ("none", "ls") if args.repair == "both" else (args.repair,):
            row = judge(folder, calibration, training, text, repair, args.steps)
            tables[name][repair] = row
            print(
                f"{name} ({row['parameters']:,} parameters after, repair {repair}): dense {row['dense']:.3f}, pruned "
                f"{row['pruned']:.3f}, recovered {row['recovered']:.3f} ({row['share']:.0%} of the gap) in "
                f"{row['cpu_seconds']:.0f} CPU seconds",
                flush=True,
            )
            if repair == "none":
                bound = 0.0 if args.data is None else SHARE
                claims.append(Claim(f"{name}: share of the gap that comes back", row["share"], bound, True))
            claims.append(Claim(f"{name}, repair {repair}: CPU minutes", row["cpu_seconds"] / 60, MINUTES))
            save(
                "recovery" if args.data is None else "recovery_tinystories",
                claims,
                ratio=RATIO,
                settings={**SETTINGS, "steps": args.steps},
                tables=tables,
            )
    for claim in claims:
        print(claim)
    print(machine()["load"], "was the machine's load at the end")
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
