"""Sizes that devices can share evenly: every layer's, or the plan is refused with the axis and a way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from checkpoint_models import SIZES

import llmprune
from llmprune.errors import InputError, PlanError


def llama(heads: int = 8, channels: int = 40) -> Any:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2 * heads, "num_key_value_heads": heads, "intermediate_size": channels}
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(**{**SIZES, "hidden_size": 48, "num_hidden_layers": 3, **sizes})
    ).eval()


@pytest.fixture(scope="module")
def graph() -> Any:
    return llmprune.trace(llama())


def scores(graph: Any) -> Any:
    return llmprune.score(llama(), graph, importance="random", quiet=True)


def left(graph: Any, plan: Any) -> set[tuple[str, int]]:
    """What stays of every axis that is split, in layers that lose nothing too."""
    gone = {axis: indices.shape[-1] for axis, indices in plan.removed.items()}
    return {
        (a.kind, a.size - gone.get(a.id, 0)) for a in graph.axes if a.kind in ("head", "ffn") and a.prunable
    }


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize(("tp", "round_to"), [(2, 1), (4, 1), (4, 6)])
def test_what_stays_is_a_multiple_in_every_layer(graph: Any, allocation: str, tp: int, round_to: int) -> None:
    options: dict[str, Any] = {"allocation": allocation, "protect_first": 0, "protect_last": 1}
    if round_to > 1:  # 40 channels are no multiple of 6: those of the protected layer stay
        options |= {"round_to": round_to}
    plan = llmprune.plan(graph, scores(graph), ratio=0.25, tp=tp, **options)
    sizes = left(graph, plan)
    assert len(sizes) > 2
    assert all(size % tp == 0 for _, size in sizes)
    if round_to > 1:
        assert {size for kind, size in sizes if kind == "ffn"} <= {12, 24, 36, 40}
    assert plan.options["tp"] == tp
    free = llmprune.plan(graph, scores(graph), ratio=0.25, **options)
    assert any(size % 4 for _, size in left(graph, free))
    assert "tp" not in free.options


def test_a_share_of_each_kind(graph: Any) -> None:
    plan = llmprune.plan(
        graph, scores(graph), ratio={"head": 0.5, "ffn": 0.33}, tp=4, protect_first=0, protect_last=0
    )
    assert left(graph, plan) == {("head", 4), ("ffn", 28)}


def test_the_pruned_model_splits(graph: Any) -> None:
    """A stock config whose sizes are shared evenly."""
    model = llama()
    llmprune.prune(
        model, ratio={"head": 0.5, "ffn": 0.33}, importance="random", tp=4, protect_first=0, protect_last=0
    )
    for layer in model.model.layers:
        assert layer.self_attn.k_proj.out_features == 4 * 8
        assert layer.self_attn.q_proj.out_features == 8 * 8
        assert layer.mlp.up_proj.out_features == 28


def test_what_cannot_be_shared_is_refused(graph: Any) -> None:
    ffn = next(axis for axis in graph.axes if axis.kind == "ffn" and axis.prunable)
    with pytest.raises(
        PlanError, match=r"axis \d+ \(ffn, .*would keep 38, which 4 devices .*: remove 2 more"
    ):
        llmprune.plan(graph, removed={ffn.id: [3, 5]}, tp=4)
    assert llmprune.plan(graph, removed={ffn.id: [3, 5]}, tp=2).removed
    odd = llama(heads=6)
    of_odd = llmprune.trace(odd)
    chance = llmprune.score(odd, of_odd, importance="random", quiet=True)
    with pytest.raises(PlanError, match=r"\(head, size 6.*would keep 6, which 4 devices"):
        llmprune.plan(of_odd, chance, ratio={"ffn": 0.1}, tp=4)  # its heads are not asked for
    few = llama(heads=2)
    of_few = llmprune.trace(few)
    chance = llmprune.score(few, of_few, importance="random", quiet=True)
    with pytest.raises(PlanError, match="it takes 4 at least"):
        llmprune.plan(of_few, chance, ratio={"ffn": 0.1}, tp=4)
    for wrong in (0, -2, 1.5):
        with pytest.raises(InputError, match="tp must be an integer of at least 1"):
            llmprune.plan(graph, scores(graph), ratio=0.1, tp=wrong)  # type: ignore[arg-type]
