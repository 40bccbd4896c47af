"""Models of 70 to 671 billion parameters, traced by their config alone: seconds, memory, and growth with depth.

Llama-3-70B, Qwen3-235B-A22B and DeepSeek-V3 with their published config values, on the meta device. A trace is held
against a bare forward of the same model on meta tensors (experts as one batched product, as a trace has them), and
against itself at a quarter, a half and three quarters of the layers: its time is to be linear in their number. One
thread, process CPU time, medians of interleaved repeats. Memory is the peak over the built model in a process of its
own.

usage: python benchmarks/trace_large.py [--repeats 5] [--models Llama-3-70B ...]
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np
import torch
import transformers
from _measure import Claim, in_own_process, interleaved, medians, save
from _meta import bare, extra_bytes
from torch import nn

import llmprune

SHARES = (0.25, 0.5, 0.75, 1.0)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3-70B": (
        "Llama",
        {
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "Qwen3-235B-A22B": (
        "Qwen3Moe",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        {
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_shared_experts": 1,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "routed_scaling_factor": 2.5,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "max_position_embeddings": 163840,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
}


def build(name: str, layers: int | None = None) -> nn.Module:
    """The model without weights, with all its layers or fewer."""
    family, values = MODELS[name]
    config = getattr(transformers, f"{family}Config")(
        **{**values, **({} if layers is None else {"num_hidden_layers": layers})}
    )
    config._experts_implementation = "batched_mm"
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    return model


def measure(name: str, repeats: int) -> dict[str, Any]:
    """One model's figures."""
    depth = MODELS[name][1]["num_hidden_layers"]
    models = {share: build(name, round(depth * share)) for share in SHARES}
    graph = llmprune.trace(models[1.0])
    bare(models[1.0])
    cases: dict[str, Callable[[], object]] = {"bare forward": lambda: bare(models[1.0])}
    for share, model in models.items():
        cases[f"trace of {round(depth * share)} layers"] = lambda model=model: llmprune.trace(model)
    seconds = interleaved(cases, repeats)
    middle = medians(seconds)
    layers = np.array([round(depth * share) for share in SHARES], dtype=np.float64)
    times = np.array([middle[f"trace of {int(n)} layers"] for n in layers])
    slope, intercept = np.polyfit(layers, times, 1)
    curve = np.polyfit(layers, times, 2)
    spread = float(np.sum((times - times.mean()) ** 2))
    linear = 1 - float(np.sum((times - (slope * layers + intercept)) ** 2)) / spread
    return {
        "parameters": sum(p.numel() for p in models[1.0].parameters()),
        "operations": len(graph.tape.ops),
        "axes": dict(Counter(axis.kind for axis in graph.axes if axis.prunable)),
        "frozen": sum(not axis.prunable for axis in graph.axes),
        "seconds": seconds,
        "medians": middle,
        "ratio": float(times[-1]) / middle["bare forward"],
        "fit": {
            "seconds per layer": float(slope),
            "seconds besides": float(intercept),
            "R2": linear,
            "doubling": float(times[-1] / times[1]),
            "quadratic share": float(curve[0] * layers[-1] ** 2 / times[-1]),
        },
        "extra bytes": in_own_process(__file__, "--memory-of", name),
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--memory-of", choices=list(MODELS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        name = arguments.memory_of
        print(json.dumps(extra_bytes(build(name), build(name, 4))))
        return
    claims, figures = [], {}
    for name in arguments.models:
        figures[name] = found = measure(name, arguments.repeats)
        print(
            f"{name}: {found['parameters'] / 1e9:.1f}B parameters, {found['operations']} operations, "
            f"axes {found['axes']}, {found['ratio'] * found['medians']['bare forward']:.2f} s"
        )
        claims += [
            Claim(f"{name}: trace over a bare meta forward", found["ratio"], 2.0),
            Claim(f"{name}: extra memory of a trace, GiB", found["extra bytes"]["trace"] / 2**30, 1.0),
            Claim(f"{name}: R2 of seconds = a + b x layers", found["fit"]["R2"], 0.98, at_least=True),
            Claim(f"{name}: seconds for all layers over half of them", found["fit"]["doubling"], 2.2),
        ]
    for claim in claims:
        print(claim)
    save("trace_large", claims, models=figures)


if __name__ == "__main__":
    main()
