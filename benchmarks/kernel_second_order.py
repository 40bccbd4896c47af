"""Claim 1: second-order importance of a linear layer costs what the framework's matrix product for its gradient costs.

`linear_scores` forms dW = dY^T X of every sample, accumulates g and s, and reduces |g*w - w*s*w/2| to row and column
sums without storing a gradient. Beside it, on one thread and in turn: torch's product of the same dW (all samples at
once, which is what any first-order method needs at least), and the direct second-order version (a batched product,
then reductions of what it stored). float32, process CPU time, medians of rounds. The floor is the product's
floating-point operations at the framework's measured matrix rate.

usage: python benchmarks/kernel_second_order.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np
import torch
from _measure import Claim, interleaved, matmul_rate, medians, paired, save

from llmprune import _core

# out, in, samples, tokens of a sample
SHAPES = [
    (1024, 1024, 10, 64),
    (2816, 1024, 10, 64),
    (1024, 2816, 10, 64),
    (4096, 1024, 10, 64),
    (1024, 1024, 10, 128),
    (1024, 1024, 4, 512),
    (1024, 1024, 40, 16),
]


def naive(
    w: torch.Tensor, x: torch.Tensor, dy: torch.Tensor, samples: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition as one would write it: every sample's gradient is stored, then reduced."""
    each = torch.bmm(dy.reshape(samples, -1, dy.shape[1]).mT, x.reshape(samples, -1, x.shape[1]))
    g, s = each.mean(0), each.square().mean(0)
    e = (g * w - 0.5 * w * s * w).abs()
    return e.sum(1), e.sum(0)


def measure(out: int, features: int, samples: int, tokens: int, repeats: int, rate: float) -> dict[str, Any]:
    """One shape: seconds, ratios and the error against float64."""
    generator = torch.Generator().manual_seed(0)
    w, x, dy = (
        torch.randn(shape, generator=generator)
        for shape in ((out, features), (samples * tokens, features), (samples * tokens, out))
    )
    gradient = torch.empty(out, features)

    def fused(order: int) -> tuple[np.ndarray, np.ndarray]:
        row, col = np.zeros(out), np.zeros(features)
        _core.linear_scores(w, x, dy, samples, order, row, col, threads=1)
        return row, col

    cases: dict[str, Callable[[], Any]] = {
        "matmul": lambda: torch.mm(dy.t(), x, out=gradient),
        "element2": lambda: fused(2),
        "element1": lambda: fused(1),
        "naive element2": lambda: naive(w, x, dy, samples),
    }
    for work in cases.values():
        work()
    seconds = interleaved(cases, repeats, show=False)
    flops = 2.0 * out * features * samples * tokens
    exact = naive(w.double(), x.double(), dy.double(), samples)
    error = max(
        float(np.abs(got / want.numpy() - 1).max()) for got, want in zip(fused(2), exact, strict=True)
    )
    typical = medians(seconds)
    return {
        "out": out,
        "in": features,
        "samples": samples,
        "tokens": tokens,
        "seconds": typical,
        "over matmul": {name: paired(seconds, name, "matmul") for name in cases if name != "matmul"},
        "over floor": {name: value * rate / flops for name, value in typical.items()},
        "relative error": error,
    }


def main() -> None:
    """Measure, print, write results/kernel_second_order.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)

    rate = matmul_rate()
    print(f"instruction set {_core.simd_level()}, matrix rate {rate / 1e9:.0f} GFLOP/s on one thread\n")
    print(
        f"{'out x in, samples x tokens':30} {'matmul':>9} {'element2':>9} {'x matmul':>9} {'x floor':>8}",
        end="",
    )
    print(f" {'element1':>9} {'naive':>9} {'error':>8}   (ms; naive and element1 as multiples of matmul)")
    rows = []
    for out, features, samples, tokens in SHAPES:
        row = measure(out, features, samples, tokens, repeats, rate)
        rows.append(row)
        ratio = row["over matmul"]
        print(
            f"{f'{out} x {features}, {samples} x {tokens}':30} {1e3 * row['seconds']['matmul']:9.2f}"
            f" {1e3 * row['seconds']['element2']:9.2f} {ratio['element2']:9.3f} {row['over floor']['element2']:8.3f}"
            f" {ratio['element1']:9.3f} {ratio['naive element2']:9.3f} {row['relative error']:8.1e}",
            flush=True,
        )
    claims = [
        Claim(
            "second-order kernel over torch's product of the same dW, worst shape with T >= 64",
            max(row["over matmul"]["element2"] for row in rows if row["tokens"] >= 64),
            1.15,
        ),
        Claim("largest relative error against float64", max(row["relative error"] for row in rows), 1e-5),
    ]
    print("\n" + "\n".join(map(str, claims)))
    save(
        "kernel_second_order", claims, simd=_core.simd_level(), repeats=repeats, matrix_rate=rate, shapes=rows
    )


if __name__ == "__main__":
    main()
