"""Plans of real (tiny, random) models: counted exactly, closed over their real ties, equal when carried out."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import llmprune
from llmprune.errors import PlanError
from llmprune.planning.plan import Plan

SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 32,
}


def built(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).double().eval()


def llama(**changes: Any) -> Any:
    return built(transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 3, "head_dim": 8, **changes}))


def neox() -> Any:
    return built(transformers.GPTNeoXConfig(**SIZES, rotary_pct=0.5))


def gpt2() -> Any:
    return built(
        transformers.GPT2Config(vocab_size=37, n_embd=24, n_layer=2, n_head=6, n_inner=40, n_positions=32)
    )


IDS = torch.arange(14).view(2, 7) % 37


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def masked(model: Any, plan: Plan) -> Any:
    """The model with every removed position of every parameter set to zero."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            for dim, kept in plan.kept.get(name, {}).items():
                gone = np.setdiff1d(np.arange(parameter.shape[dim]), kept)
                parameter.index_fill_(dim, torch.as_tensor(gone), 0.0)
    return twin


def carried_out(model: Any, plan: Plan) -> Any:
    """A compacted copy, after checking that it has the plan's size and computes what the masked model computes."""
    small = copy.deepcopy(model)
    llmprune.compact(small, plan)
    assert sum(p.numel() for p in small.parameters()) == plan.parameters_after
    torch.testing.assert_close(logits(small), logits(masked(model, plan)), rtol=1e-9, atol=1e-9)
    return small


def random_scores(graph: Any, seed: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {axis.id: rng.random(axis.size) for axis in graph.axes}


def of_kind(graph: Any, kind: str) -> list[Any]:
    return [axis for axis in graph.axes if axis.prunable and axis.kind == kind]


@pytest.mark.parametrize("make", [llama, neox, gpt2])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_ratio_is_reached_within_one_group(make: Any, allocation: str) -> None:
    model = make()
    graph = llmprune.trace(model)
    before = sum(p.numel() for p in model.parameters())
    plan = llmprune.plan(graph, random_scores(graph), 0.2, allocation=allocation)
    assert plan.parameters_before == before
    channel = before - graph.numel({of_kind(graph, "ffn")[0].id: 1})
    assert abs((before - plan.parameters_after) - 0.2 * before) <= channel
    carried_out(model, plan)


@pytest.mark.parametrize("make", [llama, neox, gpt2])
def test_every_axis_alone_and_its_ties(make: Any) -> None:
    model = make()
    graph = llmprune.trace(model)
    tied = False
    for axis in graph.axes:
        if not axis.prunable or axis.marks or axis.size == 1:
            continue
        plan = llmprune.plan(graph, removed={axis.id: [0]})
        assert 0 in plan.removed[axis.id]
        tied |= len(plan.removed) > 1
        carried_out(model, plan)
    assert tied  # head_dim and value_dim of one attribute


def test_llamas_value_channels_are_tied_to_the_rope_pairs_of_all_layers() -> None:
    graph = llmprune.trace(llama())
    values = of_kind(graph, "value_dim")
    plan = llmprune.plan(graph, removed={values[2].id: [5]})
    assert {axis: len(indices) for axis, indices in plan.removed.items()} == {
        of_kind(graph, "head_dim")[0].id: 1,
        **{axis.id: 2 for axis in values},
    }
    assert 5 in plan.removed[values[2].id]
    assert {(a.module, a.name, a.old, a.new) for a in plan.attributes} >= {
        (f"model.layers.{i}.self_attn", "head_dim", 8, 6) for i in range(4)
    }


def test_the_first_and_last_layers_are_protected_by_default() -> None:
    graph = llmprune.trace(llama(num_hidden_layers=16))
    plan = llmprune.plan(graph, random_scores(graph), 0.1)
    layers = {summary["layer"] for summary in plan.axes.values()}
    assert layers == {f"model.layers.{i}" for i in range(2, 15)}


def test_query_heads_of_their_own_in_every_key_value_head() -> None:
    model = llama(num_attention_heads=12)
    graph = llmprune.trace(model)
    axes = of_kind(graph, "query")
    assert [axis.size for axis in axes] == [4] * 4  # as many as rope pairs: told apart all the same
    rows = [[0, 3], [1, 2], [0, 2]]
    plan = llmprune.plan(graph, removed={axis.id: rows for axis in axes})
    assert plan.parameters_after == graph.numel({axis.id: 2 for axis in axes})
    small = carried_out(model, plan)
    assert small.model.layers[0].self_attn.q_proj.weight.shape == (6 * 8, 24)
    assert small.model.layers[0].self_attn.num_key_value_groups == 2
    flat = llmprune.plan(graph, removed={axis.id: [0, 3] for axis in axes})
    assert Plan.from_json(plan.to_json()) == plan != flat


def test_query_heads_are_scored_in_their_own_key_value_head(tmp_path: Any) -> None:
    model = llama(num_attention_heads=12)
    graph = llmprune.trace(model)
    axis = of_kind(graph, "query")[1]
    scores = llmprune.score(model, graph, importance="l1", aggregation="sum")
    attention = model.model.layers[1].self_attn
    heads = attention.q_proj.weight.detach().abs().sum(1).view(3, 4, 8).sum(2)
    heads = heads + attention.o_proj.weight.detach().abs().sum(0).view(3, 4, 8).sum(2)
    np.testing.assert_allclose(scores.nested[axis.id], heads.numpy(), rtol=1e-9)
    np.testing.assert_allclose(scores.nested[axis.id].sum(0), scores[axis.id], rtol=1e-9)
    scores.save(tmp_path / "scores.npz")
    read = llmprune.Scores.load(tmp_path / "scores.npz")
    again = llmprune.Scores.from_json(read.to_json())
    np.testing.assert_array_equal(again.nested[axis.id], scores.nested[axis.id])
    plan = llmprune.plan(graph, again, {"query": 0.5}, protect_first=0, protect_last=0)
    lowest = np.sort(np.argsort(heads.numpy(), axis=1)[:, :2], axis=1)
    np.testing.assert_array_equal(plan.removed[axis.id], lowest)
    carried_out(model, plan)


def test_json_holds_everything(tmp_path: Any) -> None:
    model = llama()
    graph = llmprune.trace(model)
    channel = of_kind(graph, "channel")[0]
    for norms in ("rescaled", "kept"):
        plan = llmprune.plan(graph, random_scores(graph), removed={channel.id: [3, 4]}, norms=norms)
        assert bool(plan.marked) == (norms == "kept")
        assert bool(plan.rescaled) == (norms == "rescaled")
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan


def test_a_frozen_axis_says_why() -> None:
    graph = llmprune.trace(llama())
    frozen = next(axis for axis in graph.axes if not axis.prunable and axis.size > 1 and axis.members)
    with pytest.raises(PlanError, match="is frozen: "):
        llmprune.plan(graph, removed={frozen.id: [0]})
