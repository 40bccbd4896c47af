"""Claim 5: a compacted model equals its masked reference to 1e-5 relative in float32; beside Torch-Pruning.

    python benchmarks/equality.py [FAMILY ...]

For randomly initialised decoders of eight families, under eager and sdpa attention, one key-value group and one
FFN channel of the first layer are removed, by llmprune and by Torch-Pruning's dependency graph from the same weight and
the same index. Each is compared with the original model in which exactly the slices it removed are zero: the figure
is the largest difference of the logits over the largest logit. What the peer cannot do is reported in its own words.
Writes results/equality.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from _measure import Claim, save
from torch import nn

import llmprune

TEXT: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3,
    "head_dim": 8, "intermediate_size": 56, "max_position_embeddings": 64, "use_cache": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PLAIN = {
    key: TEXT[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache")
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, multi-head": ("Llama", {**TEXT, "num_key_value_heads": 6}),
    "llama, grouped-query": ("Llama", TEXT),
    "mistral": ("Mistral", TEXT),
    "qwen2": ("Qwen2", {key: value for key, value in TEXT.items() if key != "head_dim"}),
    "qwen3": ("Qwen3", TEXT),
    "gemma": ("Gemma", TEXT),
    "gpt2": ("GPT2", {**PLAIN, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 56}),
    "opt": ("OPT", {**PLAIN, "hidden_size": 48, "word_embed_proj_dim": 48, "num_hidden_layers": 2,
                    "num_attention_heads": 6, "ffn_dim": 56, "max_position_embeddings": 64}),
}  # fmt: skip
KINDS = ("head", "ffn")
INDEX = 1
PEER_SECONDS = 30


def build(family: str, attention: str) -> nn.Module:
    """A tiny model of the family with weights of unit scale."""
    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**fields, attn_implementation=attention)
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    """The model's answer to a fixed batch."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (2, 7), generator=generator)
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids).logits)


def difference(got: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference relative to the largest logit."""
    return float((got - reference).abs().max() / reference.abs().max())


def ours(family: str, attention: str, kind: str) -> tuple[float, str, list[int]]:
    """Our difference, and the weight and rows that name the group to the peer."""
    model = build(family, attention)
    graph = llmprune.trace(model)
    axis = next(axis for axis in graph.axes if axis.prunable and axis.kind == kind)
    plan = llmprune.plan(graph, removed={axis.id: [INDEX]})
    masked, small = copy.deepcopy(model), copy.deepcopy(model)
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        for name, dims in plan.kept.items():
            for dim, kept in dims.items():
                gone = torch.ones(parameters[name].shape[dim], dtype=torch.bool)
                gone[torch.as_tensor(kept)] = False
                parameters[name].index_fill_(dim, gone.nonzero()[:, 0], 0.0)
    llmprune.compact(small, plan)
    if not difference(logits(masked), logits(model)) > 1e-3:
        raise RuntimeError(
            f"{family}: removing {kind} {INDEX} changes nothing, so the comparison shows nothing"
        )
    root = next(member for member in axis.members if member.dim == 0)
    if kind == "head":  # of grouped-query attention the keys' projection names the group
        root = next(
            (m for m in axis.members if m.dim == 0 and "k" in m.parameter.rsplit(".", 2)[-2][:2]), root
        )
    return difference(logits(small), logits(masked)), root.parameter, root.positions[INDEX].tolist()


def peer(family: str, attention: str, parameter: str, rows: list[int]) -> float:
    """Torch-Pruning's difference for the group that holds these rows of this weight."""
    import torch_pruning

    model = build(family, attention)
    ids = torch.randint(3, 90, (2, 7))
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs={"input_ids": ids, "use_cache": False}, output_transform=lambda out: out.logits
    )
    root = model.get_submodule(parameter.rsplit(".", 1)[0])
    group = graph.get_pruning_group(root, torch_pruning.prune_linear_out_channels, rows)
    masked = copy.deepcopy(model)
    names = {module: name for name, module in model.named_modules()}
    with torch.no_grad():
        for dependency, indices in group:
            module = dependency.target.module
            if not isinstance(module, nn.Linear):
                continue
            twin = masked.get_submodule(names[module])
            assert isinstance(twin, nn.Linear)
            if graph.is_out_channel_pruning_fn(dependency.handler):
                twin.weight[indices] = 0.0
                if twin.bias is not None:
                    twin.bias[indices] = 0.0
            else:
                twin.weight[:, indices] = 0.0
    group.prune()
    return difference(logits(model), logits(masked))


def ask_peer(family: str, attention: str, parameter: str, rows: list[int]) -> float | str:
    """:func:`peer` in a process of its own, as it may not return; its error's last line when it fails."""
    arguments = ["--peer", family, attention, parameter, json.dumps(rows)]
    try:
        run = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), *arguments],
            capture_output=True,
            text=True,
            timeout=PEER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {PEER_SECONDS} s"
    if run.returncode:
        return run.stderr.strip().splitlines()[-1][:160]
    return float(run.stdout.split()[-1])


def main() -> int:
    """Run, print, write the result; exit status 1 when the claim fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", nargs="*")
    parser.add_argument("--peer", nargs=4, metavar=("FAMILY", "ATTENTION", "PARAMETER", "ROWS"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.peer:
        family, attention, parameter, rows = args.peer
        print(peer(family, attention, parameter, json.loads(rows)))
        return 0
    rows_of_table, worst = [], 0.0
    print(f"{'family':22s}{'attention':10s}{'kind':6s}{'llmprune':>10s}  Torch-Pruning")
    for family in args.family or FAMILIES:
        for attention in ("eager", "sdpa"):
            for kind in KINDS:
                error, parameter, rows = ours(family, attention, kind)
                other = ask_peer(family, attention, parameter, rows)
                worst = max(worst, error)
                shown = f"{other:.1e}" if isinstance(other, float) else other
                print(f"{family:22s}{attention:10s}{kind:6s}{error:10.1e}  {shown}", flush=True)
                rows_of_table.append(
                    {
                        "family": family,
                        "attention": attention,
                        "kind": kind,
                        "llmprune": error,
                        "torch-pruning": other,
                    }
                )
    claims = [Claim("largest relative difference from the masked reference, float32", worst, 1e-5)]
    print(save("equality", claims, rows=rows_of_table))
    print(*claims, sep="\n")
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
