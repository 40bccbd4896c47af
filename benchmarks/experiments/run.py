"""The paper's questions, and a few of its readers', on every model at hand: all experiments of ``llmprune sweep``.

    python benchmarks/experiments/run.py [--data DIR] [--only NAME ...] [--models NAME ...] [--windows N] [--output DIR]

Heads lose 25 % and FFN channels 20 % in every layer, unless the experiment varies that. Without ``--data`` (or
LLMPRUNE_DATA) it runs on the demo model with the demo's texts; with it on every model folder below DIR/models as well,
calibrated on the head of TinyStories' training text and judged on its validation text. Sweeps go on where they stopped.
Tables, plots and rows go to results/experiments/MODEL/EXPERIMENT.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from llmprune.experiments.experiments import EXPERIMENTS
from llmprune.experiments.sweep import Inputs, Sweep

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent.parent / "demo"
RESULTS = HERE.parent / "results" / "experiments"
SETTINGS = {"ratio": {"head": 0.25, "ffn": 0.2}, "protect_first": 0, "protect_last": 0}
CUT = {"tinystories_train_head.txt": 200_000, "tinystories_valid_a.txt": 100_000}
KEPT = ("results.json", "table.md", "plot.png", "plot.svg")


def models(data: Path | None, cut: Path) -> dict[str, tuple[Path, Path, Path, dict[str, Path]]]:
    """Name -> model, calibration, evaluation, further calibration texts."""
    found = {"demo": (DEMO / "model", DEMO / "calibration.txt", DEMO / "eval.txt", dict[str, Path]())}
    if data is None:
        return found
    for name, length in CUT.items():
        (cut / name).write_text((data / "text" / name).read_text()[:length])
    train, valid = (cut / name for name in CUT)
    others = {"books": data / "text/books.jsonl", "wikitext": data / "text/wikitext2_raw_test_a.txt"}
    stories = {
        path.name: (path, train, valid, others)
        for path in sorted((data / "models").iterdir())
        if path.is_dir()
    }
    return stories | found


def main() -> int:
    """Run what is left of every sweep; keep what is to be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("LLMPRUNE_DATA"))
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument(
        "--output", type=Path, default=Path("out/experiments"), help="where unfinished sweeps lie"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cut:
        for experiment in args.only:
            for name, (model, train, valid, texts) in models(args.data, Path(cut)).items():
                if args.models and name not in args.models:
                    continue
                start = time.perf_counter()
                inputs = Inputs(
                    model, train, valid, texts if experiment == "calibration" else {}, args.windows
                )
                sweep = Sweep(EXPERIMENTS[experiment], inputs, args.output / name / experiment, SETTINGS)
                sweep.prepare()
                sweep.run()
                keep = RESULTS / name / experiment
                keep.mkdir(parents=True, exist_ok=True)
                for file in KEPT:
                    shutil.copyfile(sweep.folder / file, keep / file)
                print(
                    f"{name} {experiment}: {len(sweep.jobs)} jobs, {time.perf_counter() - start:.0f} s",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
