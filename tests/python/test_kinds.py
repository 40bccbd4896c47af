"""Every kind of axis that a model has, alone and with others: planned by a ratio, verified, saved and reloaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from checkpoint_models import SIZES
from checkpoint_models import build as build_family

import llmprune
from llmprune.checkpoints.checkpoint import load_model, save_pretrained
from llmprune.compaction.verify import evaluating, outputs_of
from llmprune.errors import PlanError

NO_WIDTHS = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
MODELS: dict[str, Any] = {
    "llama_gqa": lambda: build_family("llama_gqa"),
    "mixtral": lambda: build_family("mixtral"),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **NO_WIDTHS, num_key_value_heads=6, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
            moe_intermediate_size=12, n_shared_experts=1, kv_lora_rank=10, q_lora_rank=14, qk_nope_head_dim=6,
            qk_rope_head_dim=4, v_head_dim=5, first_k_dense_replace=1,
        )
    ),
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=61, hidden_size=24, state_size=7, num_hidden_layers=2, time_step_rank=5)
    ),
    "mamba2": lambda: tf.Mamba2ForCausalLM(
        tf.Mamba2Config(
            vocab_size=61, hidden_size=24, state_size=7, num_hidden_layers=2, head_dim=4, num_heads=12, expand=2,
            n_groups=3, chunk_size=8,
        )
    ),
}  # fmt: skip
KINDS = {
    "llama_gqa": ("head", "query", "ffn", "channel", "head_dim", "value_dim"),
    "mixtral": ("expert", "channel"),
    "deepseek_v3": ("head", "ffn", "channel", "expert", "rank", "value_dim", "head_dim"),
    "mamba": ("ffn", "channel", "rank", "state"),
    "mamba2": ("channel",),
}
CASES = [(model, kind) for model, kinds in KINDS.items() for kind in kinds]


def inputs(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids}


@pytest.fixture(scope="module")
def traced() -> dict[str, Any]:
    """Model, graph and random scores of every family."""
    found = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make().eval()
        graph = llmprune.trace(model, inputs(model))
        found[name] = model, graph, llmprune.score(model, graph, importance="random")
    return found


def computes(model: Any) -> torch.Tensor:
    with evaluating(model), torch.no_grad():
        return outputs_of(model, inputs(model))["logits"]


def reachable(graph: Any, kinds: tuple[str, ...]) -> float:
    """About a third of the share of the parameters that these kinds hold."""
    counts = {a.id: (a.size - 1) // 3 for a in graph.axes if a.prunable and a.kind in kinds}
    return 1 - graph.numel({axis: n for axis, n in counts.items() if n}) / graph.numel({})


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_kind_alone(traced: dict[str, Any], name: str, kind: str, tmp_path: Path) -> None:
    model, graph, scores = traced[name]
    ratio = max(reachable(graph, (kind,)), 1e-4)
    plan = llmprune.plan(graph, scores, ratio, kinds=(kind,), protect_first=0, protect_last=0)
    assert any(summary["kind"] == kind for summary in plan.axes.values())
    llmprune.verify(model, plan, inputs(model))
    small = llmprune.compact(copy.deepcopy(model), plan)
    assert sum(p.numel() for p in small.parameters()) == plan.parameters_after < plan.parameters_before
    saved = save_pretrained(small, tmp_path / "out", inputs=inputs(model))
    assert saved.max_error == 0
    torch.testing.assert_close(computes(load_model(tmp_path / "out")), computes(small), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama_gqa", "deepseek_v3", "mamba"])
def test_kinds_together_meet_a_ratio(traced: dict[str, Any], name: str) -> None:
    """Of kinds that are not tied, the parameters that go are those asked for, to within a group."""
    model, graph, scores = traced[name]
    kinds = tuple(kind for kind in KINDS[name] if kind not in ("head_dim", "value_dim"))
    for allocation in ("uniform", "global"):
        plan = llmprune.plan(
            graph, scores, 0.2, kinds=kinds, allocation=allocation, protect_first=0, protect_last=0
        )
        group = max(graph.numel({}) - graph.numel({axis: 1}) for axis in plan.axes)
        assert abs(plan.parameters_before - plan.parameters_after - 0.2 * plan.parameters_before) <= group
        assert len({summary["kind"] for summary in plan.axes.values()}) > 1
        llmprune.verify(model, plan, inputs(model))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_a_router_keeps_as_many_experts_as_it_chooses(traced: dict[str, Any], name: str) -> None:
    """DeepSeek chooses one of two groups, and two experts in it."""
    model, graph, scores = traced[name]
    axis = [axis for axis in graph.axes if axis.prunable and axis.kind == "expert"][-1]
    assert graph.least(axis.id) == 2
    with pytest.raises(PlanError, match="2 are chosen from a dimension that would keep 1"):
        llmprune.plan(graph, removed={axis.id: list(range(axis.size - 1))})
    plan = llmprune.plan(graph, scores, {"expert": 0.9}, protect_first=0, protect_last=0)
    left = {s["size"] - s["removed"] for s in plan.axes.values() if s["size"] == axis.size}
    assert left == {2}
    llmprune.verify(model, plan, inputs(model))
    gate = next(name for name in plan.kept if name.endswith("gate.weight"))
    assert 0 in plan.kept[gate]
