"""Stacks of whole blocks: found on the tape, and chosen from for a share of layers or of parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import TEXT, VISION, build
from torch import nn

import llmprune
from llmprune.errors import InputError, PlanError
from llmprune.planning.plan import Plan
from llmprune.tracing.graph import Graph
from llmprune.tracing.layers import renamed

DEPTH = {"gpt2": "n_layer", "bloom": "n_layer", "t5": "num_layers"}


def deep(family: str, layers: int = 4, **changes: Any) -> nn.Module:
    return build(family, **{DEPTH.get(family, "num_hidden_layers"): layers, **changes})


def llava(layers: int = 3, **changes: Any) -> nn.Module:
    text = transformers.LlamaConfig(**{**TEXT, "num_hidden_layers": layers + 1})
    vision = transformers.CLIPVisionConfig(
        **{**VISION, "hidden_size": 40, "num_attention_heads": 5, "num_hidden_layers": layers}
    )
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=99, image_seq_length=4, **changes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def llama() -> Graph:
    return llmprune.trace(deep("llama", 6))


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("llama", "model.layers"),
        ("gpt2", "transformer.h"),
        ("opt", "model.decoder.layers"),
        ("mixtral", "model.layers"),
        ("gpt_neox", "gpt_neox.layers"),
        ("mamba", "backbone.layers"),
        ("bert", "bert.encoder.layer"),
        ("vit", "vit.layers"),
    ],
)
def test_every_block_of_a_plain_stack_may_go(family: str, module: str) -> None:
    graph = llmprune.trace(deep(family, 3))
    (stack,) = graph.layers
    assert (stack.id, stack.kind, stack.size, stack.module) == (len(graph.axes), "layer", 3, module)
    assert stack.prunable
    assert stack.pinned == {}
    assert all(axis.kind != "layer" for axis in graph.axes)
    assert f"3 of 3 in {module}" in str(graph)


def test_the_blocks_of_t5_that_make_the_position_bias_stay() -> None:
    encoder, decoder = llmprune.trace(deep("t5", 3)).layers
    for stack, module in ((encoder, "encoder.block"), (decoder, "decoder.block")):
        assert stack.module == module
        assert list(stack.pinned) == [0]
        assert "more than its output is used elsewhere (aten::add in" in stack.reasons[0]


def test_a_multimodal_model_has_a_stack_for_each_tower() -> None:
    graph = llmprune.trace(llava(vision_feature_layer=-2))
    vision, text = graph.layers
    assert (vision.module, vision.size) == ("model.vision_tower.encoder.layers", 3)
    assert vision.pinned == {2: "its output does not reach the model's outputs"}
    assert (text.module, text.size, text.pinned) == ("model.language_model.layers", 4, {})
    scores = {vision.id: np.arange(3.0), text.id: np.arange(4.0)}
    options: dict[str, Any] = {"kinds": ("layer",), "protect_first": 0, "protect_last": 0}
    both = llmprune.plan(graph, scores, {"layer": 0.34}, **options)
    assert {axis: gone.tolist() for axis, gone in both.removed.items()} == {vision.id: [0], text.id: [0]}
    one = llmprune.plan(graph, scores, {"layer": 0.34}, scope="model.vision_tower", **options)
    assert list(one.removed) == [vision.id]


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 12)
        self.outer = nn.Linear(12, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(self.inner(x).relu())


class Stack(nn.Module):
    """Blocks on a stream, run by ``how``."""

    def __init__(self, how: Callable[[nn.ModuleList, torch.Tensor], torch.Tensor], count: int = 4) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.how(self.blocks, x))


def one_after_another(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


def one_twice(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    return one_after_another(blocks, blocks[2](x))


def changed_between(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for number, block in enumerate(blocks):
        x = block(x)
        if number < 1:
            x = x * 2
    return x


def one_unused(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    blocks[3](x)
    return one_after_another(blocks[:3], x)


def inner_used(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    handle = blocks[1].inner.register_forward_hook(lambda _m, _a, out: kept.append(out))
    x = one_after_another(blocks, x)
    handle.remove()
    return x + kept[0][..., :8]


@pytest.mark.parametrize(
    ("how", "pinned"),
    [
        (one_after_another, {}),
        (one_twice, {2: "it runs 2 times in a forward pass"}),
        (changed_between, dict.fromkeys((0, 1), "the stream is changed between block 0 and the next")),
        (
            one_unused,
            {
                **dict.fromkeys((0, 1, 2), "the stream is changed between block 2 and the next"),
                3: "its output does not reach the model's outputs",
            },
        ),
        (inner_used, {1: "more than its output is used elsewhere (aten::slice in the root module)"}),
    ],
)
def test_a_block_that_has_to_stay_says_why(
    how: Callable[[nn.ModuleList, torch.Tensor], torch.Tensor], pinned: dict[int, str]
) -> None:
    (stack,) = llmprune.trace(Stack(how), {"x": torch.randn(2, 3, 8)}).layers
    assert stack.pinned == pinned
    assert stack.prunable == (len(pinned) < 4)


def test_blocks_that_share_weights_stay() -> None:
    model = Stack(one_after_another)
    model.blocks[1].inner.weight = model.blocks[0].inner.weight  # type: ignore[union-attr]
    (stack,) = llmprune.trace(model, {"x": torch.randn(2, 3, 8)}).layers
    assert stack.pinned == dict.fromkeys((0, 1), "it shares blocks.1.inner.weight")


def test_a_module_without_weights_that_blocks_share_is_no_tie() -> None:
    shared = nn.ReLU()

    class Sharing(Block):
        def __init__(self) -> None:
            super().__init__()
            self.act = shared

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.outer(self.act(self.inner(x)))

    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(Sharing(), Sharing(), Sharing()), nn.Linear(8, 4))
    (stack,) = llmprune.trace(model, {"input": torch.randn(2, 6)}).layers
    assert (stack.module, stack.pinned) == ("1", {})


def test_lists_that_are_no_stacks_are_left_out() -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    assert llmprune.trace(plain, {"input": torch.randn(2, 8)}).layers == []
    assert llmprune.trace(build("convnext")).layers == []


def test_a_stack_of_sequential_blocks_is_found_below_stages() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(Block(), Block(), Block()), nn.Linear(8, 4))
    (stack,) = llmprune.trace(model, {"input": torch.randn(2, 6)}).layers
    assert (stack.module, stack.size, stack.pinned) == ("1", 3, {})


def test_names_move_up_where_blocks_have_gone(llama: Graph) -> None:
    drop = llama.layers[0].drop([1, 4])
    assert drop.kept == [0, 2, 3, 5]
    assert renamed("model.layers.5.mlp.up_proj.weight", [drop]) == "model.layers.3.mlp.up_proj.weight"
    assert renamed("model.layers.4.mlp", [drop]) is None
    assert renamed("model.layers", [drop]) == "model.layers"
    assert renamed("model.norm.weight", [drop]) == "model.norm.weight"


# Plans


def test_a_share_of_the_layers_is_rounded_down_and_goes_by_score(llama: Graph) -> None:
    (stack,) = llama.layers
    scores = {stack.id: np.array([0.0, 5, 1, 4, 2, 3])}
    for share, gone in ((0.16, []), (0.17, [0]), (0.5, [0, 2, 4]), (0.9, [0, 2, 3, 4, 5])):
        plan = llmprune.plan(llama, scores, {"layer": share}, protect_first=0, protect_last=0)
        assert plan.removed.get(stack.id, np.empty(0)).tolist() == gone
    plan = llmprune.plan(llama, scores, {"layer": 0.5}, protect_first=1, protect_last=1)
    assert plan.removed[stack.id].tolist() == [2, 3, 4]
    plan = llmprune.plan(llama, scores, {"layer": 0.5}, protect_first=0, protect_last=5)
    assert plan.removed[stack.id].tolist() == [0]


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
def test_a_share_of_the_parameters_is_reached_within_a_layer(llama: Graph, ratio: float) -> None:
    (stack,) = llama.layers
    scores = {stack.id: np.arange(6.0)}
    plan = llmprune.plan(llama, scores, ratio, kinds=("layer",), protect_first=0, protect_last=0)
    layer = llama.numel({}) - llama.numel({}, [stack.drop([0])])
    assert abs(plan.ratio - ratio) <= layer / llama.numel({})
    assert plan.parameters_after == llama.numel({}) - len(plan.removed[stack.id]) * layer


def test_layers_and_channels_share_a_budget_and_no_parameter_counts_twice() -> None:
    model = deep("llama", 6)
    graph = llmprune.trace(model)
    scores = llmprune.score(model, graph, importance="l2", kinds=("layer", "ffn"))
    options: dict[str, Any] = {"protect_first": 0, "protect_last": 0}
    for allocation in ("uniform", "global"):
        plan = llmprune.plan(
            graph, scores, 0.4, kinds=("layer", "ffn", "head"), allocation=allocation, **options
        )
        assert plan.layers
        assert abs(plan.ratio - 0.4) < 0.01
        kinds = {summary["kind"] for summary in plan.axes.values()}
        assert kinds >= {"layer", "ffn"}
        gone = plan.layers[0].prefixes
        assert not any(name.startswith(gone) for name in plan.kept)
        for axis in plan.removed:
            if axis < len(graph.axes):
                assert not all(name.startswith(gone) for name, _ in graph.axes[axis].places)
        twin = llmprune.compact(deep("llama", 6), plan)
        assert sum(p.numel() for p in twin.parameters()) == plan.parameters_after
    by_kind = llmprune.plan(graph, scores, {"layer": 0.34, "ffn": 0.5}, **options)
    assert len(by_kind.layers[0].removed) == 2
    assert {s["removed"] for s in by_kind.axes.values() if s["kind"] == "ffn"} == {28}
    assert sum(s["kind"] == "ffn" for s in by_kind.axes.values()) == 4


def test_a_channel_that_runs_through_a_layer_counts_once() -> None:
    graph = llmprune.trace(deep("llama", 3))
    channel = next(axis for axis in graph.axes if axis.kind == "channel" and axis.prunable)
    plan = llmprune.plan(graph, removed={channel.id: [3, 7], graph.layers[0].id: [1]})
    twin = llmprune.compact(deep("llama", 3), plan)
    assert sum(p.numel() for p in twin.parameters()) == plan.parameters_after


def test_explicit_layers_are_checked(llama: Graph) -> None:
    (stack,) = llama.layers
    for removed, kind, message in (
        ([6], InputError, "has no layer 6"),
        ([-1], InputError, "has no layer -1"),
        ([[1]], InputError, "flat list of integers"),
        ([0.5], InputError, "flat list of integers"),
        (range(6), PlanError, "would lose every layer"),
    ):
        with pytest.raises(kind, match=message):
            llmprune.plan(llama, removed={stack.id: removed})
    with pytest.raises(InputError, match=rf"its layers and parts of layers \[{stack.id}, "):
        llmprune.plan(llama, removed={stack.id + 3: [0]})
    graph = llmprune.trace(deep("t5", 3))
    with pytest.raises(PlanError, match=r"layer 0 of .* cannot go: more than its output"):
        llmprune.plan(graph, removed={graph.layers[1].id: [0]})


def test_ratios_that_layers_cannot_reach_are_refused(llama: Graph) -> None:
    (stack,) = llama.layers
    scores = {stack.id: np.arange(6.0)}
    with pytest.raises(PlanError, match="cannot be reached by dropping layers: the largest reachable"):
        llmprune.plan(llama, scores, 0.95, kinds=("layer",), protect_first=0, protect_last=0)
    with pytest.raises(PlanError, match="no layer is left to prune"):
        llmprune.plan(llama, scores, 0.2, kinds=("layer",), protect_first=6)
    with pytest.raises(PlanError, match="has no scores: score the graph with kinds"):
        llmprune.plan(llama, {}, 0.2, kinds=("layer",), protect_first=0)
    graph = llmprune.trace(build("convnext"))
    with pytest.raises(PlanError, match="no prunable axis of kind layer: no stack of blocks"):
        llmprune.plan(graph, {}, 0.2, kinds=("layer",))


def test_graphs_and_plans_with_layers_are_read_back(llama: Graph) -> None:
    again = Graph.from_json(json.loads(json.dumps(llama.to_json())))
    assert [str(stack) for stack in again.layers] == [str(stack) for stack in llama.layers]
    (stack,) = llama.layers
    plan = llmprune.plan(again, removed={stack.id: [2, 0]})
    assert plan.removed[stack.id].tolist() == [0, 2]
    assert plan.axes[stack.id] == {"kind": "layer", "size": 6, "removed": 2, "module": "model.layers"}
    back = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert back == plan
    assert back.layers[0].kept == [1, 3, 4, 5]
    assert "layer" in str(back)


def test_multiply_accumulates_of_dropped_layers_go() -> None:
    counted = {layers: llmprune.trace(deep("llama", layers)) for layers in (2, 3)}
    drop = counted[3].layers[0].drop([1])
    assert counted[3].macs({}, [drop]) == counted[2].macs({})
    ffn = {n: next(a.id for a in g.axes if a.kind == "ffn") for n, g in counted.items()}
    assert counted[3].macs({ffn[3]: 5}, [drop]) == counted[2].macs({ffn[2]: 5})
