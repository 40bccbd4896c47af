"""Is removing whole blocks a better use of a given cut in parameters than finer sparsity, on a CPU?

Time does not depend on what weights hold, so a LLaMA of random weights will do, large enough that arithmetic and
memory take the time and not Python: 8 layers of width 512, 26 million parameters. It loses the same share of them as
key-value heads, as FFN channels, as hidden channels, as layers, as zeros anywhere and as zeros two of four, the last
two on dense kernels and on the framework's compressed rows. Each is timed beside the unpruned model in turn, prompt
and steps apart, by the processor time of one thread. The other half of the answer, quality at the same cut, is the
experiment ``structure`` of run.py on trained models.

    python benchmarks/experiments/edge.py

Writes results/experiments/edge.json, .md, .png and .svg.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import llmprune
from llmprune.compaction.compact import compacted_copy
from llmprune.errors import PlanError
from llmprune.experiments.baselines import cut_matrices, weight_scores, with_sparse_kernels, zero_elements
from llmprune.experiments.sweep import machine
from llmprune.planning.request import measure_request

RATIOS = (0.1, 0.2, 0.3)
KINDS = {
    "heads": ("head",),
    "FFN channels": ("ffn",),
    "heads and FFN channels": ("head", "ffn"),
    "hidden channels": ("channel",),
    "layers": ("layer",),
}
ROUNDS, REPEATS = 2, 2
RESULTS = Path(__file__).resolve().parent.parent / "results" / "experiments"


def dense_model() -> nn.Module:
    """The model to cut, in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def variants(model: nn.Module, ratio: float) -> dict[str, tuple[float, Callable[[], nn.Module]]]:
    """Name -> share of the parameters that goes, and what makes the model without it."""
    graph = llmprune.trace(model)
    found: dict[str, tuple[float, Callable[[], nn.Module]]] = {}
    for name, kinds in KINDS.items():
        scores = llmprune.score(model, graph, None, importance="l2", kinds=kinds, quiet=True)
        try:
            plan = llmprune.plan(graph, scores, ratio, kinds=kinds, protect_first=0, protect_last=0)
        except PlanError:
            continue  # heads alone are no third of a model
        found[name] = (plan.ratio, lambda plan=plan: compacted_copy(model, plan))
        if name == "heads and FFN channels":
            names, count = cut_matrices(graph, plan), plan.parameters_before - plan.parameters_after
            elements = weight_scores(model, "l1", None)
            for pattern in ("", "2:4"):
                try:
                    sparse = zero_elements(model, names, elements, count, pattern)
                except PlanError:
                    continue  # two of four are half of these matrices at most
                label = pattern or "zeros"
                found[label] = (plan.ratio, lambda sparse=sparse: sparse)
                found[f"{label}, compressed rows"] = (
                    plan.ratio,
                    lambda sparse=sparse, names=names: with_sparse_kernels(sparse, names),
                )
    return found


def main() -> int:
    """Measure, print, write."""
    torch.set_num_threads(1)
    dense = dense_model()
    rows: list[dict[str, Any]] = []
    for ratio in RATIOS:
        for name, (share, make) in variants(dense, ratio).items():
            model = make()
            pairs: dict[str, list[float]] = {"prompt": [], "step": [], "request": []}
            for _ in range(ROUNDS):  # beside the unpruned model in turn, so that drift meets both alike
                before, after = (measure_request(m, repeats=REPEATS) for m in (dense, model))
                pairs["prompt"].append(after.prefill.busy / before.prefill.busy)
                pairs["step"].append(after.decode.busy / before.decode.busy)
                pairs["request"].append(after.seconds / before.seconds)
            row = {
                "removed": share,
                "what": name,
                **{key: statistics.median(value) for key, value in pairs.items()},
            }
            row["spread"] = max(pairs["request"]) - min(pairs["request"])
            rows.append(row)
            print(
                f"{share:6.1%} {name:28s} prompt {row['prompt']:.2f}x step {row['step']:.2f}x "
                f"request {row['request']:.2f}x (+-{row['spread'] / 2:.2f})",
                flush=True,
            )
    write(rows)
    return 0


def write(rows: list[dict[str, Any]]) -> None:
    """JSON, table and plot."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    data = {
        "machine": machine(),
        "parameters": sum(p.numel() for p in dense_model().parameters()),
        "rows": rows,
    }
    (RESULTS / "edge.json").write_text(json.dumps(data, indent=1) + "\n")
    lines = ["| removed | what | prompt of 128 | a step | request (32 steps) |", "|---:|---|---:|---:|---:|"]
    for row in rows:
        times = " | ".join(f"{row[key]:.2f} x" for key in ("prompt", "step", "request"))
        lines.append(f"| {row['removed']:.1%} | {row['what']} | {times} |")
    (RESULTS / "edge.md").write_text("\n".join(lines) + "\n")
    figure = Figure(figsize=(13, 5), layout="constrained")
    for place, (key, title) in enumerate((("prompt", "a prompt of 128 tokens"), ("step", "a step")), 1):
        axes = figure.add_subplot(1, 2, place)
        for number, name in enumerate(dict.fromkeys(row["what"] for row in rows)):
            points = sorted((row["removed"], row[key]) for row in rows if row["what"] == name)
            axes.plot(*zip(*points, strict=True), marker="os^DvPX*<"[number % 9], label=name)
        axes.axhline(1, color="black", linewidth=1, linestyle=":", label="unpruned")
        axes.plot([0, 0.3], [1, 0.7], color="grey", linewidth=1, linestyle="--", label="as many operations")
        axes.set_xlabel("share of parameters removed")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_ylabel(f"time of {title}, unpruned = 1")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    for suffix in ("png", "svg"):
        figure.savefig(
            RESULTS / f"edge.{suffix}", dpi=130, metadata={"Date": None} if suffix == "svg" else {}
        )


if __name__ == "__main__":
    sys.exit(main())
