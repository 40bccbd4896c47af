"""Models in several parts: groups that cross from vision to text, the chain that says why, and towers pruned apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import llmprune
from llmprune.errors import InputError
from llmprune.tracing.inputs import example_inputs
from llmprune.tracing.scope import resolve

TEXT = {
    "vocab_size": 101, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3,
    "intermediate_size": 20, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 18, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=99, vision_feature_layer=-1, image_seq_length=4,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def paligemma() -> nn.Module:
    config = transformers.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma"}, projection_dim=24, hidden_size=24, image_token_index=99,
        vision_config={**VISION, "model_type": "siglip_vision_model", "projection_dim": 24, "vision_use_head": False},
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config)


def idefics() -> nn.Module:
    config = transformers.IdeficsConfig(
        vocab_size=101, additional_vocab_size=0, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=20, cross_layer_interval=1, use_resampler=True, qk_layer_norms=False, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, use_cache=False,
        vision_config={"embed_dim": 16, "image_size": 16, "patch_size": 8, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "intermediate_size": 18},
        perceiver_config={"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
                          "resampler_head_dim": 10, "use_resampler": True},
    )  # fmt: skip
    return transformers.IdeficsForVisionText2Text(config)


def made(build: Any) -> nn.Module:
    """The model in float64 with every parameter random."""
    torch.manual_seed(0)
    model = build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model


CROSSINGS = [
    # build, a parameter of the vision side, one of the text side, the operations of the chain from one to the other,
    # and the operation and module where the sides meet
    pytest.param(
        llava,
        ("model.multi_modal_projector.linear_2.weight", 0),
        ("model.language_model.layers.1.mlp.up_proj.weight", 1),
        {"aten::mm"},
        ("aten::masked_scatter", "model"),
        id="projector-rows-and-merged-embeddings",
    ),
    pytest.param(
        paligemma,
        ("model.multi_modal_projector.linear.weight", 0),
        ("model.language_model.layers.0.self_attn.q_proj.weight", 1),
        {"aten::mm"},
        ("aten::masked_scatter", "model"),
        id="merged-embeddings-of-paligemma",
    ),
    pytest.param(
        idefics,
        ("model.vision_model.post_layernorm.weight", 0),
        ("model.gated_cross_attn_layers.0.cross_attn.k_proj.weight", 1),
        {"aten::native_layer_norm", "aten::mm"},
        ("aten::mm", "model.gated_cross_attn_layers.0.cross_attn.k_proj"),
        id="cross-attention-keys",
    ),
]


@pytest.mark.parametrize(("build", "vision", "text", "by", "joins"), CROSSINGS)
def test_the_chain_crosses_from_vision_to_text(
    build: Any, vision: tuple[str, int], text: tuple[str, int], by: set[str], joins: tuple[str, str]
) -> None:
    model = made(build)
    graph = llmprune.trace(model)
    explanation = graph.explain(*vision, 3)
    chains = [chain for chain in explanation if (chain.parameter, chain.dim) == text]
    assert len(chains) == 1
    chain = chains[0]
    assert chain.positions == (3,)
    assert chain.steps[0].source.startswith(vision[0])
    assert chain.steps[-1].target.startswith(text[0])
    assert {step.operation for step in chain.steps} <= by
    joined = {(step.operation, step.module) for chain in explanation for step in chain.steps}
    assert joins in joined  # what makes the two sides one axis
    assert text[0] in str(explanation)
    axis = graph.axes[chain.axis]
    assert axis.prunable
    assert axis.kind == "channel"
    llmprune.verify(model, llmprune.plan(graph, removed={axis.id: [3]}))


def ratio_plan(model: nn.Module, graph: llmprune.Graph, ratio: float, scope: str | None) -> llmprune.Plan:
    scores = llmprune.score(model, graph, importance="l2", aggregation="sum")
    return llmprune.plan(graph, scores, ratio=ratio, scope=scope)


@pytest.mark.parametrize("scope", ["vision_tower", "model.language_model", None])
def test_towers_are_pruned_apart_or_together_and_reload(scope: str | None, tmp_path: Path) -> None:
    model = made(llava)
    inputs = example_inputs(model)
    graph = llmprune.trace(model)
    total = sum(p.numel() for p in model.parameters())
    plan = ratio_plan(model, graph, 0.05, scope)
    cut = {name for name, dims in plan.kept.items() if dims}
    sides = {"vision_tower" if ".vision_tower." in name else "language_model" for name in cut}
    assert sides == ({"vision_tower", "language_model"} if scope is None else {scope.rpartition(".")[2]})
    llmprune.verify(model, plan)
    llmprune.compact(model, plan)
    assert sum(p.numel() for p in model.parameters()) < total
    with torch.no_grad():
        expected = model(**inputs).logits
    llmprune.save_pretrained(model, tmp_path / "pruned")
    again = llmprune.from_pretrained(tmp_path / "pruned", dtype=torch.float64).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-12, atol=1e-12)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]


def test_a_scope_is_a_path_or_the_end_of_one() -> None:
    names = ["model.vision_tower.layers.0.mlp.weight", "model.text.layers.0.mlp.weight", "head.weight"]
    assert resolve(names, "model.vision_tower") == "model.vision_tower"
    assert resolve(names, "vision_tower") == "model.vision_tower"
    assert resolve(names, "text.layers") == "model.text.layers"
    with pytest.raises(
        InputError, match=r"names 2 modules \(model\.vision_tower\.layers, model\.text\.layers\)"
    ):
        resolve(names, "layers")
    with pytest.raises(InputError, match=r"'vision_towr': the nearest modules are model\.vision_tower"):
        resolve(names, "vision_towr")
    with pytest.raises(InputError, match=r"'zzz': the nearest modules are model, head"):
        resolve(names, "zzz")


def test_the_command_line_refuses_a_scope_of_nothing(tmp_path: Path) -> None:
    model = made(llava).float()
    model.save_pretrained(tmp_path / "llava")
    run = subprocess.run(
        [sys.executable, "-m", "llmprune.cli", "prune", str(tmp_path / "llava"), "--ratio", "0.05", "--importance",
         "l2", "--scope", "vision_towel", "--output", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert "vision_tower" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()
