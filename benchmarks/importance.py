"""Claims 2 and 3: streamed importances cost one forward and backward pass, and almost no memory.

A LLaMA of 16 layers (271M parameters), 10 samples of 64 tokens, float32, one thread, process CPU time, medians of
interleaved repeats. Beside ours run the procedures of LLM-Pruner (whole gradients; for second order one backward pass
a sample, Ma et al. 2023) and Torch-Pruning's GroupTaylorImportance. Each memory figure is the peak over the loaded
weights in a process of its own. The floor is the floating-point operations of one forward and backward pass over
every matrix, at the framework's measured matrix rate.

Streaming is measured on the same model written to a folder, in processes of their own: the peak of the whole process
against that of one which loads the model and runs plain forward and backward, and the CPU time of scoring, reading the
weights included, against that of the pass.

usage: python benchmarks/importance.py [--layers 16] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import torch
import transformers
from _measure import (
    Claim,
    cpu_seconds,
    in_own_process,
    interleaved,
    matmul_rate,
    medians,
    paired,
    peak_over,
    peak_resident,
    save,
)
from torch import nn

import llmprune

SAMPLES, LENGTH, VOCABULARY = 10, 64, 32000


def build(layers: int) -> nn.Module:
    """The model, random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=512,
    )
    return transformers.LlamaForCausalLM(config).eval()


def sample_ids() -> torch.Tensor:
    """Random token ids, samples x length."""
    return torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


def forward(model: nn.Module, ids: torch.Tensor) -> None:
    """One forward pass."""
    with torch.no_grad():
        model(input_ids=ids, labels=ids, use_cache=False)


def backward(model: nn.Module, ids: torch.Tensor) -> None:
    """A plain forward and backward pass: all gradients."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def plain(model: nn.Module, ids: torch.Tensor) -> None:
    """The measure of everything: forward, backward, gradients dropped."""
    backward(model, ids)
    model.zero_grad(set_to_none=True)


def _sums(elements: torch.Tensor) -> list[torch.Tensor]:
    return [
        elements.sum(tuple(d for d in range(elements.dim()) if d != dim)) for dim in range(elements.dim())
    ]


def llm_pruner_first(model: nn.Module, ids: torch.Tensor) -> list[list[torch.Tensor]]:
    """LLM-Pruner's param_first: |g*w| of whole gradients, summed over structures."""
    backward(model, ids)
    scores = [_sums((p.detach() * p.grad).abs()) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return scores


def llm_pruner_second(model: nn.Module, ids: torch.Tensor) -> list[list[torch.Tensor]]:
    """LLM-Pruner's param_mix: a backward pass a sample for the squares, one more for the gradient."""
    squares = {}
    for row in ids:
        backward(model, row[None])
        for parameter in model.parameters():
            share = parameter.grad * parameter.grad / len(ids)
            squares[parameter] = squares[parameter] + share if parameter in squares else share
        model.zero_grad(set_to_none=True)
    backward(model, ids)
    scores = []
    for p in model.parameters():
        w = p.detach()
        scores.append(_sums((w * p.grad - 0.5 * w * squares[p] * w).abs()))
    model.zero_grad(set_to_none=True)
    return scores


def torch_pruning(model: nn.Module, ids: torch.Tensor, groups: list) -> None:
    """Torch-Pruning's GroupTaylorImportance over its own groups (found beforehand, not timed)."""
    import torch_pruning

    importance = torch_pruning.importance.GroupTaylorImportance()
    backward(model, ids)
    for group in groups:
        importance(group)
    model.zero_grad(set_to_none=True)


def torch_pruning_groups(model: nn.Module, ids: torch.Tensor) -> list:
    """Torch-Pruning's dependency groups of the model."""
    import torch_pruning

    model.config.use_cache = False
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs={"input_ids": ids[:1]})
    return list(graph.get_all_groups(root_module_types=[nn.Linear], ignored_layers=[model.lm_head]))


def ours(
    model: nn.Module, graph: llmprune.Graph, ids: torch.Tensor, importance: str, checkpointing: bool
) -> None:
    """The public call."""
    llmprune.score(model, graph, ids, importance=importance, checkpointing=checkpointing, quiet=True)


def cases(model: nn.Module, ids: torch.Tensor, peer: bool) -> tuple[dict, dict]:
    """Name -> call; and what was left out, with the reason."""
    graph = llmprune.trace(model)
    found = {
        "forward": lambda: forward(model, ids),
        "plain": lambda: plain(model, ids),
        "llm-pruner first": lambda: llm_pruner_first(model, ids),
        "llm-pruner second": lambda: llm_pruner_second(model, ids),
        "vector": lambda: ours(model, graph, ids, "vector", False),
        "element1": lambda: ours(model, graph, ids, "element1", False),
        "element2": lambda: ours(model, graph, ids, "element2", False),
        "element2 checkpointed": lambda: ours(model, graph, ids, "element2", True),
    }
    skipped = {}
    if peer:
        try:
            groups = torch_pruning_groups(model, ids)
            found["torch-pruning"] = lambda: torch_pruning(model, ids, groups)
        except Exception as error:  # noqa: BLE001 - whatever a peer fails with is a result
            skipped["torch-pruning"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return found, skipped


def matrix_flops(model: nn.Module) -> float:
    """Operations of one forward and backward pass over every linear map: y, dX and dW, two each."""
    return sum(6.0 * m.weight.numel() * SAMPLES * LENGTH for m in model.modules() if isinstance(m, nn.Linear))


def memory_of(name: str, layers: int) -> int:
    """Peak bytes over the weights of one case, in this process."""
    model, ids = build(layers), sample_ids()
    found, _ = cases(model, ids, name == "torch-pruning")
    forward(model, ids[:1, :8])  # libraries' own buffers
    return peak_over(found[name])


def whole_process(name: str, folder: str) -> dict:
    """Peak bytes of this process and CPU seconds of one case on the model in a folder: plain, or an importance."""
    ids = sample_ids()
    if name == "plain":
        model = llmprune.from_pretrained(folder)
        seconds = [cpu_seconds(lambda: plain(model, ids)) for _ in range(2)]
    else:
        model = llmprune.open_model(folder)
        graph = llmprune.trace(model)
        seconds = [
            cpu_seconds(lambda: llmprune.score(model, graph, ids, importance=name, quiet=True))
            for _ in range(2)
        ]
    return {"peak": peak_resident(), "seconds": seconds}


def streamed(layers: int, repeats: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """CPU seconds and peak bytes of plain and of the streamed importances, each in processes of its own, in turn."""
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = str(Path(place) / "model")
        in_own_process(__file__, "--write", folder, "--layers", str(layers))
        for _ in range(repeats):
            for name in ("plain", "element1", "element2"):
                found = in_own_process(__file__, "--whole", name, "--folder", folder)
                seconds.setdefault(name, []).extend(found["seconds"])
                peaks[name] = max(peaks.get(name, 0), found["peak"])
                print(f"streamed, {name}: {found}", file=sys.stderr, flush=True)
    return seconds, peaks


def streamed_claims(seconds: dict[str, list[float]], peaks: dict[str, int]) -> list[Claim]:
    """What streaming costs beside plain forward and backward."""
    worst = max(peaks["element1"], peaks["element2"])
    slowest = max(paired(seconds, name, "plain") for name in ("element1", "element2"))
    return [
        Claim("streamed / plain, peak memory of the whole process", worst / peaks["plain"], 0.35),
        Claim("streamed / plain forward and backward, CPU time", slowest, 1.6),
    ]


def main() -> int:
    """Measure, print, save; 1 if a claim fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", metavar="CASE", help="measure one case's memory and print it (internal)")
    parser.add_argument("--write", metavar="DIR", help="write the model there (internal)")
    parser.add_argument("--whole", metavar="CASE", help="measure a whole process on --folder (internal)")
    parser.add_argument("--folder", metavar="DIR", help="a model that --write has written (internal)")
    parser.add_argument(
        "--only-streamed", action="store_true", help="measure streaming alone; nothing is saved"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.write:
        build(options.layers).save_pretrained(options.write)
        print("0")
        return 0
    if options.whole:
        print(json.dumps(whole_process(options.whole, options.folder)))
        return 0
    if options.only_streamed:
        claims = streamed_claims(*streamed(options.layers, options.repeats))
        print(*claims, sep="\n")
        return 0 if all(claim.holds for claim in claims) else 1
    if options.memory:
        print(json.dumps(memory_of(options.memory, options.layers)))
        return 0
    model, ids = build(options.layers), sample_ids()
    found, skipped = cases(model, ids, True)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rate = matmul_rate()
    seconds = interleaved(found, options.repeats)
    middle = medians(seconds)
    floor = matrix_flops(model) / rate
    del model, found
    memory = {}
    for name in middle:
        if name != "forward":
            memory[name] = in_own_process(__file__, "--memory", name, "--layers", str(options.layers))
    of_streaming = streamed(options.layers, options.repeats)
    print(f"{weights / 1e6:.0f} MB of weights; floor {floor:.2f} s at {rate / 1e9:.0f} GFLOP/s")
    print(f"{'case':24s} {'CPU s':>8s} {'x plain':>8s} {'x floor':>8s} {'MB over the weights':>20s}")
    for name, value in middle.items():
        held = f"{memory[name] / 1e6:20.0f}" if name in memory else ""
        print(f"{name:24s} {value:8.2f} {value / middle['plain']:8.2f} {value / floor:8.2f} {held}")
    for name, reason in skipped.items():
        print(f"{name:24s} did not run: {reason}")
    claims = [
        Claim(
            "second order / plain forward and backward, CPU time", middle["element2"] / middle["plain"], 1.1
        ),
        Claim(
            "N-pass second order / ours, CPU time",
            middle["llm-pruner second"] / middle["element2"],
            3.0,
            True,
        ),
        Claim(
            "checkpointed second order / plain, extra memory",
            memory["element2 checkpointed"] / memory["plain"],
            0.15,
        ),
        *streamed_claims(*of_streaming),
    ]
    print(*claims, sep="\n")
    path = save(
        "importance",
        claims,
        layers=options.layers,
        weights_bytes=weights,
        floor_seconds=floor,
        matmul_flops=rate,
        seconds=seconds,
        median_seconds=middle,
        memory_bytes=memory,
        streamed_seconds=of_streaming[0],
        streamed_peak_bytes=of_streaming[1],
        skipped=skipped,
    )
    print(f"written to {path.name}")
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
