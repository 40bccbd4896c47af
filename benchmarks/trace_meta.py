"""Claim 6: tracing a model by its config alone costs at most twice a bare forward pass on the meta device.

Llama-3-8B and Llama-3-70B, built on the meta device. The bare pass is the model's own forward without a recorder, on
the same batch (2 x 7 tokens), with a four-dimensional attention mask so that it never asks a meta tensor for a value;
it is the floor, since every operation of a model has to run once. A trace records that pass, builds the graph in C,
looks at the model's other form of attention and runs it cut. One thread, process CPU time, medians of interleaved
repeats, garbage collection as in ordinary use. Memory is the peak over the built model in a process of its own.

usage: python benchmarks/trace_meta.py [--repeats 9] [--models 8B 70B]
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import torch
import transformers
from _measure import Claim, in_own_process, interleaved, medians, save
from _meta import bare, extra_bytes
from torch import nn

import llmprune

SIZES = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}


def build(size: str, **changes: int) -> nn.Module:
    """Llama 3 without weights."""
    config = transformers.LlamaConfig(
        vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, **{**SIZES[size], **changes}
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).eval()


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--memory-of", choices=list(SIZES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        size = arguments.memory_of
        print(json.dumps(extra_bytes(build(size), build("8B", num_hidden_layers=1))))
        return
    claims, figures = [], {}
    for size in arguments.models:
        model = build(size)
        graph = llmprune.trace(model)
        bare(model)
        cases = {
            "bare forward": lambda model=model: bare(model),
            "trace": lambda model=model: llmprune.trace(model),
        }
        seconds = interleaved(cases, arguments.repeats)
        middle = medians(seconds)
        extra = in_own_process(__file__, "--memory-of", size)
        ratio = middle["trace"] / middle["bare forward"]
        figures[f"Llama-3-{size}"] = {
            "operations": len(graph.tape.ops),
            "axes": sum(axis.prunable for axis in graph.axes),
            "seconds": seconds,
            "medians": middle,
            "ratio": ratio,
            "extra bytes": extra,
        }
        claims.append(Claim(f"Llama-3-{size}: trace over a bare meta forward", ratio, 2.0))
        if size == "70B":
            claims.append(Claim("Llama-3-70B: extra memory of a trace, GiB", extra["trace"] / 2**30, 1.0))
    for claim in claims:
        print(claim)
    save("trace_meta", claims, models=figures)


if __name__ == "__main__":
    main()
