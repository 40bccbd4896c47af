"""On a CUDA device: what tracing, scoring, planning and compacting a LLaMA-shaped model cost, beside their floors.

Floors are measured in the same run: a device-to-device copy, a bf16 matrix product, a pinned copy from the host. Beside
ours run plain autograd (whole gradients, for second order one backward pass a sample) with torch.index_select, and
Torch-Pruning's GroupTaylorImportance where it is installed. Random weights in bf16; times are medians of CUDA events.

A 70B-shaped model does not fit with its gradients: a few blocks of one are written to files and scored block by block
from there, as the page cache holds them, beside the time of their way to the device and that of their products.

What is measured is written after each section; none is begun that would end after the budget by the time the ones
before it took. The file is not called cuda.py: torch imports a package of that name, and would find it here.

usage: python benchmarks/gpu.py [--layers 32] [--repeats 5] [--budget 540] [--only SECTION ...]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _measure import Claim, save
from torch import nn

import llmprune
from llmprune import _core
from llmprune.machine import cuda as backend
from llmprune.out_of_core import block_weights
from llmprune.out_of_core.transfer import Staged, Way

SHAPES = {
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "13B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
TOKENS = {"10 x 64": (10, 64), "128 x 128": (128, 128)}
KEEP = 0.8


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median time of a call on the device, after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def wall(work: Callable[[], Any]) -> tuple[Any, float]:
    """A call's result and its time, everything the device does for it included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return result, time.perf_counter() - start


def floors(repeats: int) -> dict[str, float]:
    """Copy bandwidth (bytes read and written), matrix rate and host-to-device rate of this machine, per second."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_(256)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds(lambda: target.copy_(source), repeats)
    host = torch.empty(1 << 28, dtype=torch.uint8).pin_memory()
    upload = host.numel() / seconds(lambda: source[: host.numel()].copy_(host, non_blocking=True), repeats)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / seconds(lambda: a @ b, repeats)
    return {"copy": copy, "upload": upload, "matmul": matmul}


def kernels(rate: float, repeats: int) -> list[dict[str, Any]]:
    """linear_scores of single matrices, beside the products it has to form and the framework's own."""
    rows = []
    for out, features in ((4096, 4096), (11008, 4096), (28672, 8192)):
        for label, (samples, length) in TOKENS.items():
            weight = torch.randn(out, features, device="cuda", dtype=torch.bfloat16)
            x = torch.randn(samples * length, features, device="cuda", dtype=torch.bfloat16)
            dy = torch.randn(samples * length, out, device="cuda", dtype=torch.bfloat16)
            sums = [torch.zeros(n, dtype=torch.float64, device="cuda") for n in (out, features)]
            options = backend.options(weight)
            work = 2 * out * features * samples * length
            entry: dict[str, Any] = {"shape": [out, features], "tokens": label, "floor": work / rate}
            for order in (1, 2):

                def ours(
                    w: torch.Tensor = weight,
                    a: torch.Tensor = x,
                    b: torch.Tensor = dy,
                    n: int = samples,
                    k: int = order,
                    into: list[torch.Tensor] = sums,
                    given: dict[str, Any] = options,
                ) -> None:
                    _core.linear_scores(w, a, b, n, k, *into, **given)

                entry[f"order {order}"] = seconds(ours, repeats)
            entry["framework's dW"] = seconds(lambda a=x, b=dy: b.t() @ a, repeats)
            entry["share of the matrix rate"] = entry["floor"] / entry["order 2"]
            rows.append(entry)
    return rows


def matrices(layers: int) -> list[torch.Tensor]:
    """The weights of a 7B-shaped model's blocks."""
    hidden, inner = 4096, 11008
    shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    return [
        torch.empty(s, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(layers) for s in shapes
    ]


def cut(tensor: torch.Tensor, number: int) -> dict[int, np.ndarray]:
    """A random fifth of rows or of columns goes, as pruning heads and FFN channels does."""
    dim = 1 if number % 7 in (3, 6) else 0
    size = tensor.shape[dim]
    chosen = np.random.default_rng(number).permutation(size)[: int(KEEP * size)]
    return {dim: np.sort(chosen).astype(np.int64)}


def device_time(work: Callable[[], Any]) -> float:
    """Seconds that the device itself is busy with a call: its kernels and copies, as the profiler sees them."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def compaction(copy: float, layers: int) -> dict[str, Any]:
    """All matrices in their own memory, beside index_select of the same: the whole call, and the device's part."""
    backend.compact_many([torch.zeros(64, 64, device="cuda", dtype=torch.int16)], [{0: np.arange(0, 64, 2)}])
    tensors = matrices(layers)
    kepts = [cut(t, i) for i, t in enumerate(tensors)]
    places = [{d: torch.as_tensor(k, device="cuda") for d, k in kept.items()} for kept in kepts]

    def select() -> None:
        for tensor, place in zip(tensors, places, strict=True):
            for dim, positions in place.items():
                tensor.index_select(dim, positions)

    peer = seconds(select, 3)
    words = [t.view(torch.int16) for t in tensors]
    _, ours = wall(lambda: backend.compact_many(words, kepts))
    # The matrices keep their sizes here, so that the same can be cut again.
    busy = device_time(lambda: backend.compact_many(words, kepts))
    # What is kept is written. Of rows it is read, too; of columns everything is: every 32 bytes hold some of them.
    moved = sum(
        t.numel() * 2 * (KEEP + (KEEP if 0 in kept else 1)) for t, kept in zip(tensors, kepts, strict=True)
    )
    return {
        "bytes": moved,
        "floor": moved / copy,
        "in place": ours,
        "in place, on the device": busy,
        "index_select": peer,
        "rate on the device": moved / busy,
    }


def build(shape: str, layers: int) -> nn.Module:
    """A LLaMA of random weights on the device."""
    config = transformers.LlamaConfig(
        vocab_size=32000, num_hidden_layers=layers, max_position_embeddings=2048, **SHAPES[shape]
    )
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM._from_config(config, torch_dtype=torch.bfloat16)
    return model.eval()


def plain(model: nn.Module, ids: torch.Tensor, order: int) -> None:
    """Whole gradients by autograd; for second order one backward pass a sample and accumulated squares.

    For first order as many samples at a time as keep the activations of 4096 tokens.
    """
    squares = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()] if order == 2 else []
    for part in ids.split(1 if order == 2 else max(1, 4096 // ids.shape[1])):
        model(input_ids=part, labels=part, use_cache=False).loss.backward()
        for square, parameter in zip(squares, model.parameters(), strict=False):
            square.addcmul_(parameter.grad, parameter.grad)
    for parameter in model.parameters():
        _ = (parameter.grad * parameter).abs().sum() if parameter.grad is not None else None
        parameter.grad = None


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """Time and peak memory over what is allocated already; or why it failed."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        _, took = wall(work)
    except (torch.OutOfMemoryError, MemoryError, llmprune.errors.DeviceError) as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    return {"seconds": took, "peak": torch.cuda.max_memory_allocated() - before}


def whole(shape: str, layers: int, label: str) -> dict[str, Any]:
    """Trace to compacted model, with each step's time; and the peer's scores."""
    samples, length = TOKENS[label]
    model = build(shape, layers)
    weights = torch.cuda.memory_allocated()
    ids = torch.randint(0, 32000, (samples, length), device="cuda")
    entry: dict[str, Any] = {"shape": shape, "layers": layers, "tokens": label, "weights": weights}
    for order in (1, 2):
        entry[f"plain order {order}"] = measured(lambda k=order: plain(model, ids, k))
    graph, entry["trace"] = wall(lambda: llmprune.trace(model))
    scores: dict[str, llmprune.Scores] = {}
    entry["element1, the process's first"] = measured(
        lambda: llmprune.score(model, graph, ids, importance="element1", quiet=True)
    )
    for importance in ("element1", "element2"):
        for kept in (None, False):
            entry[importance + (", activations kept" if kept is False else "")] = measured(
                lambda name=importance, kept=kept: scores.update(
                    {name: llmprune.score(model, graph, ids, importance=name, checkpointing=kept, quiet=True)}
                )
            )
    plan, entry["plan"] = wall(lambda: llmprune.plan(graph, scores["element1"], ratio=0.2))
    _, entry["compact"] = wall(lambda: llmprune.compact(model, plan))
    entry["end to end"] = sum(entry[k] for k in ("trace", "plan", "compact")) + entry["element1"].get(
        "seconds", 0
    )
    return entry


def torch_pruning(label: str) -> dict[str, Any]:
    """GroupTaylorImportance's gradients and dependency graph on a small model of the same kind, where it runs."""
    if find_spec("torch_pruning") is None:
        return {"failed": "torch-pruning is not installed"}
    import torch_pruning as tp

    samples, length = TOKENS[label]
    model = build("7B", 2)
    ids = torch.randint(0, 32000, (samples, length), device="cuda")

    def work() -> None:
        pruner = tp.pruner.BasePruner(
            model,
            {"input_ids": ids[:1], "use_cache": False},
            importance=tp.importance.GroupTaylorImportance(),
            pruning_ratio=0.2,
            ignored_layers=[model.lm_head],
            output_transform=lambda out: out.logits.sum(),
        )
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        pruner.step()

    try:
        return measured(work)
    except Exception as error:  # noqa: BLE001  # whatever another library raises is its result here
        return {"failed": f"{type(error).__name__}: {error}"}


def streamed(shape: dict[str, int], blocks: int, label: str, device: str, place: Path) -> dict[str, Any]:
    """First and second order of a few blocks that come from files, and how many bytes went to the device for it."""
    samples, length = TOKENS[label]
    config = transformers.LlamaConfig(
        vocab_size=32000, num_hidden_layers=blocks, max_position_embeddings=2048, **shape
    )
    folder = place / f"{shape['hidden_size']}x{blocks}"
    if not folder.is_dir():
        with torch.device(device):
            model = transformers.LlamaForCausalLM._from_config(config, torch_dtype=torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="2GB")
        del model
    model = llmprune.open_model(folder)
    graph = llmprune.trace(model)
    ids = torch.randint(0, 32000, (samples, length))
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    entry: dict[str, Any] = {
        "blocks": blocks,
        "parameters of a block": block,
        "tokens": label,
        # Forward, forward again, and backward twice: for the weights and for the inputs.
        "operations": 2 * 4 * blocks * block * samples * length,
    }
    ways: list[Way] = []
    real = block_weights.way_to

    def counted(where: torch.device, size: int) -> Way:
        ways.append(real(where, size))
        return ways[-1]

    block_weights.way_to = counted
    try:
        for importance in ("element1", "element2"):
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            llmprune.score(model, graph, ids, importance=importance, quiet=True, device=device)
            entry[importance] = {"seconds": time.perf_counter() - start}
            way = ways[-1]
            if isinstance(way, Staged):
                entry[importance] |= {
                    "bytes": way.bytes_copied,
                    "peak on the device": torch.cuda.max_memory_allocated(),
                }
    finally:
        block_weights.way_to = real
    return entry


def by_older_instructions(rate: float, repeats: int) -> list[dict[str, Any]] | dict[str, str]:
    """The kernels again in a process that leaves what only compute capability 9.0 has alone."""
    if torch.cuda.get_device_capability() != (9, 0):
        return {"failed": "the kernels above are those already"}
    words = [sys.executable, __file__, "--kernels-alone", str(rate), "--repeats", str(repeats)]
    environment = {**os.environ, "LLMPRUNE_CUDA_WGMMA": "0"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=180)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no word"}
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def claims_of(found: dict[str, Any]) -> list[Claim]:
    """What the sections that have run must hold."""
    claims = []
    if "kernels" in found:
        long = [row["share of the matrix rate"] for row in found["kernels"] if row["tokens"] == "128 x 128"]
        claims.append(Claim("second-order kernel: share of the matrix rate at T = 128", min(long), 0.6, True))
    if "compaction" in found:
        share = found["compaction"]["rate on the device"] / found["floors"]["copy"]
        claims.append(Claim("in-place compaction: share of the copy's rate", share, 0.8, at_least=True))
    for model in (*found.get("models", []), *found.get("long", [])):
        if model["shape"] != "7B" or "seconds" not in model["element1"]:
            continue
        if model["tokens"] == "10 x 64":
            claims.append(
                Claim("7B, trace to compacted model on a warmed-up device, seconds", model["end to end"], 2.0)
            )
            extra = 1 + model["element1"]["peak"] / model["weights"]
            claims.append(Claim("7B, peak memory of first order over the weights", extra, 1.15))
        times = [
            model[f"element2{how}"]["seconds"]
            for how in ("", ", activations kept")
            if "seconds" in model[f"element2{how}"]
        ]
        if times and "seconds" in model["plain order 1"]:
            over = min(times) / model["plain order 1"]["seconds"]
            what = f"7B, second order over plain forward and backward, {model['tokens']}"
            claims.append(Claim(what, over, 1.3))
    for entry in found.get("streamed", []):
        for importance in ("element1", "element2"):
            one = entry[importance]
            upload = one["bytes"] / found["floors"]["upload"]
            compute = entry["operations"] / found["floors"]["matmul"]
            what = f"70B-shaped blocks from files, {importance}, {entry['tokens']}: share of the floor"
            claims.append(Claim(what, max(upload, compute) / one["seconds"], 0.6, at_least=True))
    return claims


def main() -> int:
    """Measure, print and save; exit status 1 when a claim fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=540, help="seconds (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="SECTION")
    parser.add_argument("--kernels-alone", type=float, metavar="RATE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    begun = time.perf_counter()
    reason = backend.unavailable()
    if reason is not None:
        raise SystemExit(f"nothing to measure: {reason}")
    if options.kernels_alone is not None:
        print(json.dumps(kernels(options.kernels_alone, options.repeats)))
        return 0
    found: dict[str, Any] = {"floors": floors(options.repeats)}
    rate, copy = found["floors"]["matmul"], found["floors"]["copy"]
    repeats, layers = options.repeats, options.layers
    with tempfile.TemporaryDirectory() as place:
        sections: dict[str, Callable[[], Any]] = {
            "kernels": lambda: kernels(rate, repeats),
            "compaction": lambda: compaction(copy, layers),
            "models": lambda: [whole("7B", layers, "10 x 64")],
            "long": lambda: [whole("7B", layers, "128 x 128")],
            "streamed": lambda: [streamed(SHAPES["70B"], 4, label, "cuda", Path(place)) for label in TOKENS],
            "torch_pruning": lambda: torch_pruning("10 x 64"),
            "kernels by older instructions": lambda: by_older_instructions(rate, repeats),
            "blocks": lambda: [whole(shape, 1, label) for shape in ("13B", "70B") for label in TOKENS],
        }
        took = 0.0
        for name, section in sections.items():
            left = options.budget - (time.perf_counter() - begun)
            if options.only and name not in options.only:
                continue
            if left < took:
                print(f"{name}: left out, {left:.0f} s are left", file=sys.stderr)
                continue
            start = time.perf_counter()
            found[name] = section()
            took = time.perf_counter() - start
            gc.collect()
            torch.cuda.empty_cache()
            print(f"{name}: {took:.0f} s", file=sys.stderr, flush=True)
            save("cuda", claims_of(found), gpu=torch.cuda.get_device_name(), **found)
    claims = claims_of(found)
    for claim in claims:
        print(claim)
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
