"""Whole blocks taken out: equal to the reference, with a cache, saved in stock form, and twice in a row."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_layers import deep, llava
from tiny_models import TEXT, VISION
from torch import nn

import llmprune
from llmprune.compaction.depth import bypassed
from llmprune.compaction.recheck import recheck
from llmprune.errors import PlanError, VerificationError
from llmprune.planning.plan import Plan
from llmprune.tracing.inputs import example_inputs


def made(config: Any, kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, kind)(config).eval()


def gemma3(kinds: str = "sffsf") -> nn.Module:
    names = {"s": "sliding_attention", "f": "full_attention"}
    config = transformers.Gemma3TextConfig(
        **{**TEXT, "num_hidden_layers": len(kinds), "head_dim": 8, "sliding_window": 4},
        layer_types=[names[kind] for kind in kinds],
    )
    return made(config, "Gemma3ForCausalLM")


def deepseek() -> nn.Module:
    config = transformers.DeepseekV2Config(
        **{**TEXT, "num_key_value_heads": 6, "num_hidden_layers": 4, "first_k_dense_replace": 2},
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_shared_experts=1,
        kv_lora_rank=22,
        q_lora_rank=18,
        qk_nope_head_dim=10,
        qk_rope_head_dim=4,
        v_head_dim=14,
        n_group=1,
        topk_group=1,
    )
    return made(config, "DeepseekV2ForCausalLM")


def logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**copy.deepcopy(inputs)).logits
    return out


def drop(model: nn.Module, removed: list[int], stack: int = 0) -> tuple[nn.Module, Plan]:
    """A compacted, verified copy, and its plan."""
    graph = llmprune.trace(model)
    plan = llmprune.plan(graph, removed={graph.layers[stack].id: removed})
    llmprune.verify(model, plan)
    return llmprune.compact(copy.deepcopy(model), plan), plan


def assert_equal(small: nn.Module, model: nn.Module, plan: Plan) -> None:
    inputs = example_inputs(model)
    with bypassed(model, plan.layers):
        reference = logits(model, inputs)
    assert (logits(small, inputs) - reference).abs().max() <= 1e-6 * max(1.0, float(reference.abs().max()))


def generated(model: Any, inputs: dict[str, torch.Tensor], cache: bool = True) -> torch.Tensor:
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "use_cache": cache}
    out: torch.Tensor = model.generate(**inputs, **options)
    return out


STACKS = [
    ("llama", {"num_key_value_heads": 6}, "num_hidden_layers"),
    ("llama", {}, "num_hidden_layers"),
    ("qwen3", {}, "num_hidden_layers"),
    ("gpt2", {}, "n_layer"),
    ("opt", {}, "num_hidden_layers"),
    ("mixtral", {}, "num_hidden_layers"),
    ("gpt_neox", {}, "num_hidden_layers"),
]


@pytest.mark.parametrize(
    ("family", "changes", "field", "attention"),
    [(*stack, "eager") for stack in STACKS] + [(*stack, "sdpa") for stack in STACKS[1:3]],
)
def test_decoders_without_layers(
    family: str, changes: dict[str, Any], field: str, attention: str, tmp_path: Path
) -> None:
    model: Any = deep(family, attention=attention, **changes)
    rng = np.random.default_rng(len(family) + len(attention))
    removed = sorted(rng.choice(3, 2, replace=False).tolist())  # not the last: the rest must move up
    small, plan = drop(model, removed)
    assert_equal(small, model, plan)
    assert getattr(small.config, field) == 2
    assert getattr(model.config, field) == 4
    indices = [m.layer_idx for m in small.modules() if hasattr(m, "layer_idx")]
    assert sorted(set(indices)) in ([], [0, 1])
    path = plan.layers[0].module
    kept = plan.layers[0].kept
    for name, tensor in small.named_parameters():
        if name.startswith(path + "."):
            number, _, rest = name[len(path) + 1 :].partition(".")
            assert torch.equal(tensor, model.get_parameter(f"{path}.{kept[int(number)]}.{rest}"))
    inputs = {"input_ids": torch.arange(5, 15).reshape(2, 5)}
    with bypassed(model, plan.layers):
        expected = generated(model, inputs)
    assert torch.equal(generated(small, inputs), expected)
    assert torch.equal(generated(small, inputs, cache=False), expected)
    if attention == "sdpa":
        return
    saved = llmprune.save_pretrained(small, tmp_path / "out")
    assert saved.form == "stock"
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation=attention
    ).eval()
    again.set_experts_implementation("batched_mm")
    small.set_experts_implementation("batched_mm")
    ids = example_inputs(model)
    assert (logits(again, ids) - logits(small, ids)).abs().max() <= 1e-6


def test_the_kinds_of_layers_that_a_config_lists_go_along(tmp_path: Path) -> None:
    model: Any = gemma3()
    small, plan = drop(model, [0, 2])
    assert_equal(small, model, plan)
    assert small.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    kinds = [m.layer_type for m in small.modules() if hasattr(m, "layer_type")]
    assert kinds == ["full_attention", "sliding_attention", "full_attention"]
    inputs = {"input_ids": torch.arange(5, 19).reshape(2, 7)}  # longer than the sliding window
    with bypassed(model, plan.layers):
        expected = generated(model, inputs)
    assert torch.equal(generated(small, inputs), expected)
    assert llmprune.save_pretrained(small, tmp_path / "out").form == "stock"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(generated(again, inputs), expected)


def test_what_was_computed_for_a_kind_of_layer_goes_with_the_last_of_it(tmp_path: Path) -> None:
    model: Any = gemma3("sff")
    small, plan = drop(model, [0])
    assert_equal(small, model, plan)
    tables = {name for name, _ in model.named_buffers()} - {name for name, _ in small.named_buffers()}
    assert {name.partition("sliding_attention")[0] for name in tables} == {"model.rotary_emb."}
    assert llmprune.save_pretrained(small, tmp_path / "out").form == "stock"


def test_a_number_that_counts_some_of_the_layers_goes_along(tmp_path: Path) -> None:
    model: Any = deepseek()
    small, plan = drop(model, [0, 3])
    assert_equal(small, model, plan)
    assert (small.config.num_hidden_layers, small.config.first_k_dense_replace) == (2, 1)
    assert llmprune.save_pretrained(small, tmp_path / "out").form == "stock"


@pytest.mark.parametrize(("family", "stack"), [("bert", 0), ("vit", 0), ("t5", 0), ("t5", 1)])
def test_encoders_without_layers(family: str, stack: int, tmp_path: Path) -> None:
    model = deep(family)
    small, plan = drop(model, [1, 2], stack)
    assert_equal(small, model, plan)
    saved = llmprune.save_pretrained(small, tmp_path / "out")
    assert (saved.form, saved.max_error) == ("stock", 0.0)
    if (family, stack) == ("t5", 1):
        inputs = {"input_ids": torch.arange(5, 15).reshape(2, 5)}
        with bypassed(model, plan.layers):
            expected = generated(model, inputs)
        assert torch.equal(generated(small, inputs), expected)


def test_lists_that_a_config_fills_in_by_itself_are_left_to_it(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(**{**VISION, "num_hidden_layers": 3}, num_labels=5)
    model: Any = made(config, "Dinov2ForImageClassification")
    small, plan = drop(model, [1])
    assert_equal(small, model, plan)
    assert (small.config.stage_names, small.config.out_features) == (["stem", "stage1", "stage2"], ["stage2"])
    assert llmprune.save_pretrained(small, tmp_path / "out").form == "stock"


@pytest.mark.parametrize("stack", [0, 1])
def test_towers_of_a_multimodal_model(stack: int, tmp_path: Path) -> None:
    model: Any = llava(vision_feature_layer=-1)
    small, plan = drop(model, [1], stack)
    assert_equal(small, model, plan)
    depths = (small.config.vision_config.num_hidden_layers, small.config.text_config.num_hidden_layers)
    assert depths == ((2, 4), (3, 3))[stack]
    inputs = example_inputs(model)
    with bypassed(model, plan.layers):
        expected = generated(model, inputs)
    assert torch.equal(generated(small, inputs), expected)
    assert llmprune.save_pretrained(small, tmp_path / "out").form == "stock"


def test_a_hidden_state_that_is_taken_by_number_from_the_front_is_noticed() -> None:
    model = llava(vision_feature_layer=1)
    graph = llmprune.trace(model)
    plan = llmprune.plan(graph, removed={graph.layers[0].id: [0]})
    with pytest.raises(VerificationError, match="differs from its masked reference"):
        llmprune.verify(model, plan)


def test_a_block_that_its_class_builds_at_one_place_only_stays() -> None:
    model = deep("rwkv", 3)
    graph = llmprune.trace(model)
    plan = llmprune.plan(graph, removed={graph.layers[0].id: [0]})
    names = list(model.state_dict())
    with pytest.raises(
        PlanError, match=r"layers of rwkv\.blocks cannot go: no config of RwkvForCausalLM states 2"
    ):
        llmprune.compact(model, plan)
    assert list(model.state_dict()) == names
    scores = llmprune.score(model, graph, importance="l1", kinds=("layer",))
    assert list(scores.pinned[graph.layers[0].id]) == [0]
    chosen = llmprune.plan(graph, scores, {"layer": 0.34}, protect_first=0)
    assert chosen.removed[graph.layers[0].id].tolist() != [0]
    again = llmprune.Scores.from_json(scores.to_json())
    assert again.pinned == scores.pinned
    small, plan = drop(model, [1])
    assert_equal(small, model, plan)


def test_twice_and_read_back_the_record_keeps_original_numbers(tmp_path: Path) -> None:
    model = deep("llama", 6)
    first, _ = drop(model, [1, 4])
    assert first.llmprune.layers == {"model.layers": [0, 2, 3, 5]}
    llmprune.save_pretrained(first, tmp_path / "first")
    loaded = llmprune.from_pretrained(tmp_path / "first")
    graph = llmprune.trace(loaded)
    ffn = [axis.id for axis in graph.axes if axis.kind == "ffn"]
    plan = llmprune.plan(graph, removed={graph.layers[0].id: [2], **{axis: [5, 9] for axis in ffn}})
    llmprune.compact(loaded, plan)
    assert loaded.llmprune.layers == {"model.layers": [0, 2, 5]}
    assert loaded.llmprune.name_now("model.layers.5.mlp") == "model.layers.2.mlp"
    assert loaded.llmprune.name_then("model.layers.2.mlp") == "model.layers.5.mlp"
    assert loaded.llmprune.name_now("model.layers.3.mlp") is None
    saved = llmprune.save_pretrained(loaded, tmp_path / "second")
    assert saved.form == "stock"
    written = json.loads((tmp_path / "second" / "llmprune.json").read_text())
    assert written["layers"] == {"model.layers": [0, 2, 5]}
    assert "model.layers.5.mlp.up_proj.weight" in written["kept"]
    assert [step["removed"][-1].get("module") for step in written["history"]] == ["model.layers"] * 2
    last = llmprune.from_pretrained(tmp_path / "second")
    result = recheck(last, model)
    assert result.prunings == 2
    assert result.verification is not None
    assert result.verification.relative_error <= 1e-5


@pytest.mark.parametrize("ragged", [False, True])
def test_layers_and_narrower_axes_at_once(ragged: bool, tmp_path: Path) -> None:
    model = deep("qwen3", 4)
    graph = llmprune.trace(model)
    narrow: dict[int, list[int]] = {}
    for place, axis in enumerate(a for a in graph.axes if a.kind in ("head", "ffn") and a.prunable):
        count = 1 + (place if ragged and axis.kind == "ffn" else 0)
        narrow[axis.id] = list(range(1, 1 + count))
    plan = llmprune.plan(graph, removed={**narrow, graph.layers[0].id: [1]})
    llmprune.verify(model, plan)
    small = llmprune.compact(copy.deepcopy(model), plan)
    saved = llmprune.save_pretrained(small, tmp_path / "out")
    assert saved.form == ("universal" if ragged else "stock")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3
    again = llmprune.from_pretrained(tmp_path / "out")
    inputs = {"input_ids": torch.arange(5, 15).reshape(2, 5)}
    assert torch.equal(generated(again, inputs), generated(small, inputs))
    result = recheck(again, model)
    assert result.verification is not None
    once_more, _ = drop(again, [0])
    assert once_more.llmprune.layers == {"model.layers": [2, 3]}
    assert llmprune.save_pretrained(once_more, tmp_path / "more").form == saved.form


class Numbered(nn.Module):
    """A block of nobody's library that finds its part of a cache by its number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.map = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
        assert len(cache) == self.number
        cache.append(x)
        return x + self.map(x).tanh()


class HandWritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Numbered, range(4)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cache: list[torch.Tensor] = []
        for block in self.blocks:
            x = block(x, cache)
        return self.head(x)


def test_a_hand_written_model_gets_its_numbers_right() -> None:
    model = HandWritten().eval()
    inputs = {"x": torch.randn(2, 5, 8)}
    graph = llmprune.trace(model, inputs)
    plan = llmprune.plan(graph, removed={graph.layers[0].id: [0, 2]})
    llmprune.verify(model, plan, inputs)
    with bypassed(model, plan.layers):
        reference = model(**inputs)
    llmprune.compact(model, plan)
    assert [block.number for block in model.blocks] == [0, 1]
    assert torch.allclose(model(**inputs), reference)
    assert model.llmprune.layers == {"blocks": [1, 3]}


def test_what_stands_in_the_way_is_named() -> None:
    model = HandWritten()
    graph = llmprune.trace(model, {"x": torch.randn(2, 5, 8)})
    plan = llmprune.plan(graph, removed={graph.layers[0].id: [1]})
    model.other = model.blocks[1].map
    with pytest.raises(PlanError, match=r"blocks.1 cannot go: a part of it is also other"):
        llmprune.compact(model, plan)
    del model.other
    del model.blocks[3]
    plan.fingerprint = ""
    with pytest.raises(PlanError, match="is no list of the 4 blocks that the plan was made for"):
        llmprune.compact(model, plan)


def test_a_stack_that_loses_the_wrong_block_is_found_out() -> None:
    model = deep("llama", 3)
    graph = llmprune.trace(model)
    plan = llmprune.plan(graph, removed={graph.layers[0].id: [0]})
    other = llmprune.plan(graph, removed={graph.layers[0].id: [1]})
    twin = llmprune.compact(copy.deepcopy(model), other)
    from llmprune.compaction.verify import compare

    with pytest.raises(VerificationError, match=r"beginning in model\.layers\.1"):
        compare(model, plan, None, lambda original: twin.to(next(original.parameters()).dtype))
