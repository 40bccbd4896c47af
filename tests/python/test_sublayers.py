"""Attention or the feed-forward dropped alone: found, scored, equal to the reference, with a cache, saved and again."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_depth import generated, logits
from test_layers import deep
from torch import nn

import llmprune
from llmprune.compaction.recheck import recheck
from llmprune.compaction.verify import check_cache
from llmprune.errors import InputError, PlanError, VerificationError
from llmprune.planning.plan import Plan
from llmprune.tracing.graph import Graph
from llmprune.tracing.inputs import example_inputs
from llmprune.tracing.sublayers import Part, silenced

IDS = torch.arange(5, 21).reshape(2, 8)
FREE: dict[str, Any] = {"protect_first": 0, "protect_last": 0}


def assert_equal(small: nn.Module, model: nn.Module, plan: Plan) -> None:
    inputs = example_inputs(model)
    with silenced(model, plan.sublayers):
        reference = logits(model, inputs)
    assert (logits(small, inputs) - reference).abs().max() <= 1e-6 * max(1.0, float(reference.abs().max()))


@pytest.mark.parametrize(
    ("family", "attention", "names"),
    [
        ("llama", "eager", {"attention": "self_attn", "feedforward": "mlp"}),
        ("llama", "sdpa", {"attention": "self_attn", "feedforward": "mlp"}),
        ("gpt2", "eager", {"attention": "attn", "feedforward": "mlp"}),
        ("qwen3", "sdpa", {"attention": "self_attn", "feedforward": "mlp"}),
        ("opt", "eager", {"attention": "self_attn"}),
        ("opt", "sdpa", {"attention": "self_attn"}),
        ("gpt_neox", "eager", {"attention": "attention", "feedforward": "mlp"}),
        ("falcon", "sdpa", {"attention": "self_attention", "feedforward": "mlp"}),
    ],
)
def test_decoders_without_attention_or_feedforward(
    family: str, attention: str, names: dict[str, str]
) -> None:
    model: Any = deep(family, attention=attention)
    graph = llmprune.trace(model)
    (stack,) = graph.layers
    assert {axis.kind: axis.parts[1].path for axis in graph.sublayers} == {
        kind: f"{stack.module}.1.{name}" for kind, name in names.items()
    }
    assert [axis.id for axis in graph.sublayers] == [stack.id + 1 + i for i in range(len(names))]
    removed = {axis.id: [1, 2] if axis.kind == "attention" else [0, 2] for axis in graph.sublayers}
    plan = llmprune.plan(graph, removed=removed)
    gone = [part.path for part in plan.sublayers]
    lost = sum(p.numel() for n, p in model.named_parameters() if n.startswith(tuple(f"{g}." for g in gone)))
    assert lost > 0
    assert plan.parameters_before - plan.parameters_after == lost
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    llmprune.verify(model, plan)
    small = llmprune.compact(copy.deepcopy(model), plan)
    assert sum(p.numel() for p in small.parameters()) == plan.parameters_after
    assert_equal(small, model, plan)
    with silenced(model, plan.sublayers):
        expected = generated(model, {"input_ids": IDS})
    assert torch.equal(generated(small, {"input_ids": IDS}), expected)
    assert torch.equal(generated(small, {"input_ids": IDS}, cache=False), expected)
    assert (logits(small, {"input_ids": IDS}) - logits(model, {"input_ids": IDS})).abs().max() > 1e-4


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return deep("llama")


@pytest.fixture(scope="module")
def graph(llama: nn.Module) -> Graph:
    return llmprune.trace(llama)


def test_a_branch_that_no_module_computes_whole_is_none() -> None:
    assert llmprune.trace(deep("bert", 2)).sublayers == []  # the stream is added inside
    assert [axis.kind for axis in llmprune.trace(deep("opt", 2)).sublayers] == ["attention"]


def test_where_a_block_has_two_kinds_of_attention_both_stay() -> None:
    encoder, *others = llmprune.trace(deep("whisper", 2)).sublayers
    assert (encoder.kind, encoder.module, list(encoder.pinned)) == ("attention", "model.encoder.layers", [0])
    assert others == []


def test_saved_loaded_without_llmprune_and_pruned_again(tmp_path: Path) -> None:
    attention = "sdpa"
    model: Any = deep("llama", attention=attention)
    graph = llmprune.trace(model)
    first, second = graph.sublayers
    heads = next(axis for axis in graph.axes if axis.kind == "head")
    plan = llmprune.plan(graph, removed={first.id: [2], second.id: [1], heads.id: [0]})
    small: Any = llmprune.compact(copy.deepcopy(model), plan)
    saved = llmprune.save_pretrained(small, tmp_path / "out")
    assert saved.form == "universal"
    assert "model.layers.1.mlp is gone" in saved.reason or "model.layers.2.self_attn is gone" in saved.reason
    expected = logits(small, {"input_ids": IDS})
    np.save(tmp_path / "expected.npy", expected.numpy())
    code = (
        "import sys; sys.modules['llmprune'] = None\n"
        "import numpy, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained('out', trust_remote_code=True, "
        f"attn_implementation={attention!r})\n"
        "with torch.no_grad(): found = model(torch.arange(5, 21).reshape(2, 8)).logits.numpy()\n"
        "assert numpy.abs(found - numpy.load('expected.npy')).max() == 0\n"
    )
    home = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=home, check=True)
    again: Any = llmprune.from_pretrained(tmp_path / "out", attn_implementation=attention)
    assert torch.equal(logits(again, {"input_ids": IDS}), expected)
    recheck(again, model)
    # Pruned again: another branch, and the block before.
    graph = llmprune.trace(again)
    (stack,) = graph.layers
    first, second = graph.sublayers
    assert "no direct child" in first.pinned[2]
    with pytest.raises(VerificationError, match="something else with a cache"):
        llmprune.verify(
            again, llmprune.plan(graph, removed={stack.id: [0, 1]})
        )  # the rest begins without attention
    plan = llmprune.plan(graph, removed={stack.id: [1], first.id: [3]})
    llmprune.verify(again, plan)
    twice: Any = llmprune.compact(again, plan)
    assert sorted(twice.llmprune.dropped) == [
        "model.layers.1.mlp",
        "model.layers.2.self_attn",
        "model.layers.3.self_attn",
    ]
    assert llmprune.save_pretrained(twice, tmp_path / "twice").form == "universal"
    last: Any = llmprune.from_pretrained(tmp_path / "twice", attn_implementation=attention)
    assert torch.equal(logits(last, {"input_ids": IDS}), logits(twice, {"input_ids": IDS}))
    assert last.config.num_hidden_layers == 3
    recheck(last, model)


def test_what_cannot_go_says_why(graph: Graph) -> None:
    attention, feedforward = graph.sublayers
    with pytest.raises(PlanError, match=r"block 0 of .*attention.* cannot go: .*length of a cache"):
        llmprune.plan(graph, removed={attention.id: [0]})
    with pytest.raises(PlanError, match="would lose every feedforward"):
        llmprune.plan(graph, removed={feedforward.id: [0, 1, 2, 3]})
    with pytest.raises(InputError, match="has no block 4"):
        llmprune.plan(graph, removed={feedforward.id: [4]})
    with pytest.raises(InputError, match="give a share for each"):
        llmprune.plan(graph, {}, 0.2, kinds=("layer", "attention"))
    with pytest.raises(PlanError, match="no prunable axis of kind feedforward"):
        llmprune.plan(llmprune.trace(deep("opt", 2)), {}, 0.2, kinds=("feedforward",))


def test_a_layer_takes_its_branches_along(llama: nn.Module, graph: Graph) -> None:
    (stack,), (attention, feedforward) = graph.layers, graph.sublayers
    scores = {stack.id: np.arange(4.0), attention.id: np.arange(4.0), feedforward.id: np.arange(4.0)}
    ratio = {"layer": 0.25, "attention": 0.34, "feedforward": 0.34}
    plan = llmprune.plan(graph, scores, ratio, **FREE)
    assert {axis: gone.tolist() for axis, gone in plan.removed.items()} == {
        stack.id: [0],
        attention.id: [2],
        feedforward.id: [1],
    }
    with pytest.raises(PlanError, match=r"layers\.1\.self_attn cannot go once the blocks before it are gone"):
        llmprune.plan(graph, removed={stack.id: [0], attention.id: [1]})
    llmprune.verify(llama, plan)
    given = llmprune.plan(graph, removed={stack.id: [1], attention.id: [1, 2]})
    assert [part.path for part in given.sublayers] == ["model.layers.2.self_attn"]
    assert given.parameters_after == sum(
        p.numel() for p in llmprune.compact(copy.deepcopy(llama), given).parameters()
    )
    axis = next(axis for axis in graph.axes if axis.places[0][0].startswith("model.layers.1.mlp"))
    both = llmprune.plan(graph, removed={feedforward.id: [1], axis.id: [0]})
    assert list(both.removed) == [feedforward.id]
    assert both.kept == {}


@pytest.mark.parametrize(
    ("kinds", "ratio"),
    [(("attention",), 0.1), (("feedforward", "attention"), 0.2), (("feedforward", "ffn"), 0.3)],
)
def test_a_share_of_the_parameters(graph: Graph, kinds: tuple[str, ...], ratio: float) -> None:
    scores = {axis.id: np.arange(float(axis.size)) for axis in (*graph.axes, *graph.stacks)}
    plan = llmprune.plan(graph, scores, ratio, kinds=kinds, **FREE)
    assert plan.ratio == pytest.approx(ratio, abs=0.05)
    assert plan.sublayers


@pytest.mark.parametrize("importance", ["block_influence", "vector", "element1", "l1", "random"])
def test_scores_are_those_of_the_branch(llama: nn.Module, graph: Graph, importance: str) -> None:
    scores = llmprune.score(
        llama, graph, IDS.numpy(), importance, kinds=("attention", "feedforward"), quiet=True
    )
    assert sorted(scores) == [axis.id for axis in graph.sublayers]
    attention, feedforward = graph.sublayers
    assert scores.kinds[attention.id] == "attention"
    assert all((scores[axis] > 0).all() for axis in scores)
    plan = llmprune.plan(graph, scores, {"attention": 0.5, "feedforward": 0.25}, **FREE)
    assert [len(plan.removed[axis]) for axis in sorted(scores)] == [2, 1]
    if importance not in ("block_influence", "vector"):
        return
    seen: list[torch.Tensor] = []
    block: Any = llama.get_submodule("model.layers.2")
    keep = [
        block.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: seen.append(args[0])),
        block.register_forward_hook(lambda _m, _args, out: seen.append(out)),
    ]
    try:
        with torch.enable_grad():
            model: Any = llama
            result = model(IDS, labels=IDS)
    finally:
        for handle in keep:
            handle.remove()
    into, out = seen
    if importance == "block_influence":
        expected = 1 - float(torch.cosine_similarity(into.double(), out.double(), dim=-1).mean().detach())
    else:
        (gradient,) = torch.autograd.grad(result.loss, out)  # the mean over samples of equal length
        expected = abs(float((gradient.double() * (out - into).detach().double()).sum()))
    assert scores[feedforward.id][2] == pytest.approx(expected, rel=1e-4)


def test_a_cache_that_nothing_fills_is_noticed(llama: nn.Module, graph: Graph) -> None:
    """What :func:`llmprune.verify` would say if the first attention went."""
    attention, _ = graph.sublayers
    part: Part = attention.parts[0]
    with silenced(llama, [part]):
        check_cache(llama, llama, {"input_ids": IDS})
    small = copy.deepcopy(llama)
    llmprune.checkpoints.modeling_llmprune.drop(
        small, {part.path: {"input": part.input, "output": part.output, "entries": part.entries}}
    )
    with pytest.raises(VerificationError, match="cache"):
        check_cache(small, llama, {"input_ids": IDS})


def test_the_graph_names_them(graph: Graph) -> None:
    assert "attention     3 of 4 in model.layers" in str(graph)
    again = Graph.from_json(json.loads(json.dumps(graph.to_json())))
    assert list(map(str, again.sublayers)) == list(map(str, graph.sublayers))
    assert [axis.parts for axis in again.sublayers] == [axis.parts for axis in graph.sublayers]


def test_repair_leaves_room_for_a_branch_that_goes(llama: nn.Module) -> None:
    model = copy.deepcopy(llama)
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 101, (8, 16)))
    report = llmprune.prune(
        model,
        ratio={"feedforward": 0.25, "ffn": 0.3},
        importance="element1",
        calibration=ids,
        repair="ls",
        quiet=True,
        **FREE,
    )
    assert report.verification is not None
    assert len(report.plan.sublayers) == 1
    assert sum(p.numel() for p in model.parameters()) == report.plan.parameters_after
