"""The solver finds the config of a model from its sizes alone."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as tf
from checkpoint_models import FAMILIES, SIZES

from llmprune.checkpoints import config_solver
from llmprune.checkpoints.config_solver import Solver
from llmprune.checkpoints.record import AttributeValue, Compaction, fresh
from llmprune.checkpoints.universal import build_on_meta


def solve(kind: type[Any], base: Any, wanted: dict[str, Any], record: Compaction | None = None) -> list[Any]:
    """Proposals for the model of the config ``base`` with the ``wanted`` values."""
    target = build_on_meta(kind, type(base).from_dict({**base.to_dict(), **wanted}))
    return list(Solver(target, record or fresh(build_on_meta(kind, base)), base).proposals())


def states(config: Any, wanted: dict[str, Any]) -> bool:
    return all(getattr(config, name) == value for name, value in wanted.items())


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("llama_gqa", {"intermediate_size": 13}),
        ("llama_gqa", {"num_attention_heads": 4, "num_key_value_heads": 2}),
        ("llama_gqa", {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 9}),
        ("llama_gqa", {"head_dim": 6, "hidden_size": 18, "vocab_size": 50}),
        ("llama_mha", {"num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 60}),
        ("t5", {"num_heads": 3, "d_ff": 7}),
        ("t5", {"num_heads": 4, "d_kv": 6}),
        ("mixtral", {"num_local_experts": 3, "intermediate_size": 8}),
        ("gpt2", {"n_inner": 11}),
        ("bert", {"intermediate_size": 11}),
        ("opt", {"ffn_dim": 19}),
    ],
)
def test_fields_are_found(family: str, wanted: dict[str, Any]) -> None:
    kind, base = FAMILIES[family]()
    found = solve(kind, base, wanted)
    assert states(found[0], wanted)
    same = {**base.to_dict(), **wanted}
    assert {name for name, value in found[0].to_dict().items() if value != same[name]} <= {
        "transformers_version"
    }


def test_a_width_that_followed_from_the_heads_is_stated() -> None:
    kind, base = FAMILIES["qwen2"]()
    assert not hasattr(base, "head_dim")
    found = solve(kind, base, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4})
    assert found[0].head_dim == 4
    assert found[0].num_attention_heads == 4


def test_a_field_that_was_none_is_stated() -> None:
    kind, base = FAMILIES["gpt2"]()
    base.n_inner = None
    assert solve(kind, base, {"n_inner": 90})[0].n_inner == 90


def test_a_module_may_hold_anything_under_the_name_of_an_open_field(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, base = FAMILIES["gpt2"]()
    base.n_inner = None
    build = kind.__init__

    def with_a_config(self: Any, config: Any) -> None:
        build(self, config)
        self.n_inner = {"unhashable": config}

    monkeypatch.setattr(kind, "__init__", with_a_config)
    assert solve(kind, base, {"n_inner": 90})[0].n_inner == 90


def test_sizes_that_are_products_of_two_changed_fields() -> None:
    """Newton's steps: a fused projection of (heads + 2 groups) x width."""
    base = tf.Phi3Config(**{**SIZES, "pad_token_id": 0})
    wanted = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 5}
    assert states(solve(tf.Phi3ForCausalLM, base, wanted)[0], wanted)


def test_configs_inside_configs() -> None:
    text = {**SIZES, "model_type": "llama"}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "intermediate_size": 34,
        "image_size": 16,
        "patch_size": 8,
    }
    base = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=60)
    changed = {**base.to_dict()["text_config"], "intermediate_size": 9}
    found = solve(tf.LlavaForConditionalGeneration, base, {"text_config": changed})
    assert found[0].text_config.intermediate_size == 9
    assert found[0].vision_config.intermediate_size == 34


def test_lists_of_sizes() -> None:
    base = tf.ConvNextConfig(hidden_sizes=[10, 22], depths=[1, 1], num_stages=2, image_size=32, num_labels=10)
    found = solve(tf.ConvNextForImageClassification, base, {"hidden_sizes": [10, 19]})
    assert found[0].hidden_sizes == [10, 19]


def test_ragged_layers_have_no_proposal() -> None:
    kind, base = FAMILIES["llama_gqa"]()
    target = build_on_meta(kind, base)
    target.model.layers[1].mlp = (
        build_on_meta(kind, type(base).from_dict({**base.to_dict(), "intermediate_size": 9}))
        .model.layers[1]
        .mlp
    )
    assert list(Solver(target, fresh(build_on_meta(kind, base)), base).proposals()) == []


def test_what_the_config_itself_refuses_has_no_proposal() -> None:
    """Llama wants a hidden size that its heads divide: five of six heads cannot be stated."""
    kind, base = FAMILIES["llama_mha"]()
    target = build_on_meta(kind, base)
    for layer in target.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight.data = getattr(layer.self_attn, name).weight[:40]
        layer.self_attn.o_proj.weight.data = layer.self_attn.o_proj.weight[:, :40]
    assert list(Solver(target, fresh(build_on_meta(kind, base)), base).proposals()) == []


def test_attributes_decide_between_equal_shapes() -> None:
    """Three heads of width 4 and four of width 3: the same shapes (rope has two pairs in each), not the same model."""
    kind, base = FAMILIES["llama_mha"]()
    record = fresh(build_on_meta(kind, base))
    wanted = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 4}
    shapes_only = solve(kind, base, wanted, record)
    record.attributes = [AttributeValue("model.layers.1.self_attn", "head_dim", None, 4)]
    found = solve(kind, base, wanted, record)
    assert [states(config, wanted) for config in found] == [True]
    assert not states(shapes_only[0], wanted)


def test_many_layers_are_learnt_from_few(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, base = FAMILIES["qwen3"]()
    base = type(base).from_dict({**base.to_dict(), "num_hidden_layers": 12, "layer_types": None})
    wanted = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 9}
    depths: list[int] = []

    def counted(kind: type[Any], config: Any) -> Any:
        depths.append(config.num_hidden_layers)
        return build_on_meta(kind, config)

    target = build_on_meta(kind, type(base).from_dict({**base.to_dict(), **wanted}))
    record = fresh(build_on_meta(kind, base))
    monkeypatch.setattr(config_solver, "build_on_meta", counted)
    found = next(Solver(target, record, base).proposals())
    assert states(found, {**wanted, "num_hidden_layers": 12})
    assert depths.count(12) <= 4
    assert depths.count(2) > 10
