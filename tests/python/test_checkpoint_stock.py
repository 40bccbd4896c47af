"""The stock form where it takes more than one field: other classes, coupled fields, ratios; and why there is none."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from checkpoint_models import (
    FAMILIES,
    SIZES,
    build,
    evenly,
    expect,
    inputs,
    logits,
    prune,
    read_without_llmprune,
)

import llmprune
from llmprune.checkpoints.checkpoint import load_model, save_pretrained
from llmprune.checkpoints.config_solver import Solver
from llmprune.checkpoints.record import fresh
from llmprune.checkpoints.siblings import siblings
from llmprune.checkpoints.stock_form import stock_kinds
from llmprune.checkpoints.universal import build_on_meta
from llmprune.errors import CheckpointError


def solver_for(kind: type[Any], base: Any, wanted: dict[str, Any]) -> Solver:
    """A solver for the model of ``base`` with the ``wanted`` values."""
    target = build_on_meta(kind, type(base).from_dict({**base.to_dict(), **wanted}))
    return Solver(target, fresh(build_on_meta(kind, base)), base)


@pytest.fixture(scope="module")
def five_heads() -> Any:
    """A Llama of five heads, which its hidden size of 24 does not divide by."""
    return prune(build("llama_mha"), evenly)


def test_a_llama_whose_heads_do_not_divide_is_written_as_an_equal_mistral(
    five_heads: Any, tmp_path: Path
) -> None:
    saved = save_pretrained(five_heads, tmp_path / "out", form="stock", inputs=inputs(five_heads))
    assert saved.form == "stock"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["MistralForCausalLM"], "mistral")
    assert config["sliding_window"] is None
    assert (config["num_attention_heads"], config["head_dim"], config["hidden_size"]) == (5, 8, 24)
    assert "auto_map" not in config
    expect(five_heads, tmp_path / "out")
    assert read_without_llmprune([tmp_path / "out"], tmp_path) == ["out MistralForCausalLM mistral False"]
    again = load_model(tmp_path / "out")
    assert torch.equal(logits(again), logits(five_heads))
    twice = prune(again, lambda axis: [0] if axis.kind == "ffn" else [])
    assert save_pretrained(twice, tmp_path / "twice").form == "stock"


def test_the_automatic_form_keeps_the_class_and_says_what_stood_in_the_way(
    five_heads: Any, tmp_path: Path
) -> None:
    saved = save_pretrained(five_heads, tmp_path / "out")
    assert saved.form == "universal"
    assert "LlamaConfig cannot state it: The hidden size (24) is not a multiple" in saved.reason
    assert "form='stock'" in saved.reason


def test_siblings_switch_off_what_the_class_does_not_have() -> None:
    kind, base = FAMILIES["llama_gqa"]()
    names = fresh(build_on_meta(kind, base)).original_shapes
    found = dict(siblings(kind, base, names))
    assert tf.MistralForCausalLM in found
    assert found[tf.MistralForCausalLM].sliding_window is None
    assert kind not in found
    for config in found.values():
        assert config.hidden_size == base.hidden_size


def test_fields_that_are_ratios() -> None:
    base = tf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[3, 6], window_size=4
    )
    assert base.mlp_ratio == 4.0
    for ratio in (3.0, 2.75):
        solver = solver_for(tf.SwinForImageClassification, base, {"mlp_ratio": ratio})
        assert next(solver.proposals()).mlp_ratio == ratio


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("gpt2", {"n_embd": 20, "n_head": 5, "n_inner": 20}),
        ("opt", {"hidden_size": 20, "word_embed_proj_dim": 20, "num_attention_heads": 5}),
    ],
)
def test_fields_that_only_move_together(family: str, wanted: dict[str, Any], tmp_path: Path) -> None:
    """Hidden channels and heads in proportion, where a head's width follows from both."""
    model = prune(build(family), lambda axis: {"head": [1], "channel": [0, 3, 9, 17]}.get(axis.kind, []))
    saved = save_pretrained(model, tmp_path / "out", form="stock")
    assert saved.max_error == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: config[name] for name in wanted} == wanted


def test_a_text_and_a_vision_tower_are_solved_for_apart() -> None:
    base = tf.CLIPConfig(
        text_config={"vocab_size": 61, "hidden_size": 20, "num_hidden_layers": 5, "num_attention_heads": 5,
                     "intermediate_size": 34, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 6,
                       "intermediate_size": 56, "image_size": 16, "patch_size": 8},
        projection_dim=22,
    )  # fmt: skip
    values = base.to_dict()
    wanted = {
        "text_config": {**values["text_config"], "intermediate_size": 30, "hidden_size": 15},
        "vision_config": {**values["vision_config"], "intermediate_size": 41},
        "projection_dim": 21,
    }  # fmt: skip
    found = next(solver_for(tf.CLIPModel, base, wanted).proposals())
    assert (found.text_config.intermediate_size, found.text_config.hidden_size) == (30, 15)
    assert (found.vision_config.intermediate_size, found.vision_config.hidden_size) == (41, 24)
    assert (found.text_config.num_hidden_layers, found.vision_config.num_hidden_layers) == (5, 4)
    assert found.projection_dim == 21


def raggedly(axis: Any) -> list[int]:
    """One FFN channel of the first layer, two of the second."""
    if axis.kind != "ffn":
        return []
    return [1] if ".0." in axis.members[0].parameter else [0, 2]


def test_the_reason_names_the_layers_that_differ(tmp_path: Path) -> None:
    saved = save_pretrained(prune(build("llama_gqa"), raggedly), tmp_path / "out")
    assert saved.form == "universal"
    assert "model.layers.0.mlp.gate_proj.weight keeps 19 of 20 in dimension 0" in saved.reason
    assert "model.layers.1.mlp.gate_proj.weight keeps 18" in saved.reason
    assert "protect_first and protect_last 0" in saved.reason


def test_the_reason_names_what_no_field_sizes(tmp_path: Path) -> None:
    model = prune(build("gpt2"), lambda axis: [1] if axis.kind == "head" else [])
    with pytest.raises(CheckpointError, match=r"n_embd.*GPT2Config.*transformer\.h\.0\.attn"):
        save_pretrained(model, tmp_path / "out", form="stock")


def test_a_computed_buffer_that_the_config_would_change_is_named(tmp_path: Path) -> None:
    """Gemma scales its embeddings by the root of the hidden size: fewer channels would be scaled by less."""
    model = prune(build("gemma"), lambda axis: [1, 5] if axis.kind == "channel" else [])
    saved = save_pretrained(model, tmp_path / "out")
    assert saved.form == "universal"
    assert "embed_scale" in saved.reason


def test_which_kinds_save_in_stock_form() -> None:
    model = build("llama_gqa")
    before = copy.deepcopy(model.state_dict())
    found = stock_kinds(model, inputs(model))
    assert {kind for kind, answer in found.items() if answer == "yes"} == {"head", "query", "ffn", "channel"}
    assert "inv_freq" in found["head_dim"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "llmprune")


def test_the_report_says_why(tmp_path: Path) -> None:
    model = build("llama_gqa")
    report = llmprune.prune(
        model, ratio=0.05, importance="random", protect_first=1, protect_last=0, output=tmp_path / "out"
    )
    assert report.form == "universal"
    assert "not in stock form: model.layers.0" in str(report)
    assert report.to_json()["reason"] == report.reason


def test_many_layers_of_two_towers_are_learnt_from_few(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmprune.checkpoints import config_solver

    base = tf.LlavaConfig(
        text_config={**SIZES, "model_type": "llama", "num_hidden_layers": 12},
        vision_config={"model_type": "clip_vision_model", "hidden_size": 20, "num_hidden_layers": 9,
                       "num_attention_heads": 5, "intermediate_size": 34, "image_size": 16, "patch_size": 8},
        image_token_id=60,
    )  # fmt: skip
    values = base.to_dict()["text_config"]
    solver = solver_for(
        tf.LlavaForConditionalGeneration, base, {"text_config": {**values, "intermediate_size": 9}}
    )
    built: list[tuple[int, int]] = []

    def counted(kind: type[Any], config: Any) -> Any:
        built.append((config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers))
        return build_on_meta(kind, config)

    monkeypatch.setattr(config_solver, "build_on_meta", counted)
    assert next(solver.proposals()).text_config.intermediate_size == 9
    assert built.count((12, 9)) <= 4
    assert built.count((2, 2)) > 10
