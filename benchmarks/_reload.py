"""Load checkpoint folders in a process that never imports llmprune; print for each how far its outputs are off.

python benchmarks/_reload.py JOBS.pt
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

JOBS = "jobs.pt"
"""Name of the file that says what is to be loaded: folders, inputs, and the outputs they are to give."""
TOLERANCE = 1e-5
"""Largest difference of the outputs, relative to the largest output."""


def difference(job: dict[str, Any], given: dict[str, Any]) -> float:
    """The largest difference relative to the largest output (or 1)."""
    folder = Path(job["folder"])
    auto = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
    names = [name for name in auto if name.startswith("AutoModel")]
    named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    kind = getattr(transformers, max(names, key=len) if names else named)
    model = kind.from_pretrained(
        folder, trust_remote_code=True, dtype=given["dtype"], attn_implementation=given["attention"]
    ).eval()
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "batched_mm"
    with torch.no_grad():
        out = model(**given["inputs"])
    worst = 0.0
    for name, expected in job["expected"].items():
        got = (out if isinstance(out, torch.Tensor) else out[name]).double()
        gap = torch.where(got == expected, 0.0, (got - expected).abs())
        finite = expected[expected.isfinite()]
        worst = max(worst, float(gap.max()) / max(1.0, float(finite.abs().max())))
    return worst


def answer_all(given_file: str, answers_file: str) -> None:
    """Every job of the file; job -> its error, or why there is none."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    given = torch.load(given_file, weights_only=False)
    answers: dict[str, str] = {}
    for job in given["jobs"]:
        try:
            answers[job["name"]] = f"{difference(job, given):.1e}"
        except Exception as error:  # noqa: BLE001  (the answer of this job)
            answers[job["name"]] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    if "llmprune" in sys.modules:
        raise SystemExit("llmprune was imported")
    Path(answers_file).write_text(json.dumps(answers), encoding="utf-8")
