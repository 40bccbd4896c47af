"""Root-mean-square norms that lose channels: found by what they compute, and rescaled so that equality is plain."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from checkpoint_models import FAMILIES, build, expect, inputs, logits, read_without_llmprune
from torch import nn

import llmprune
from llmprune.checkpoints.checkpoint import load_model, save_pretrained
from llmprune.compaction.norms import find_norms
from llmprune.compaction.recheck import recheck
from llmprune.errors import InputError
from llmprune.planning.plan import Plan
from llmprune.tracing.trace import record


def removal(graph: Any, kind: str = "channel") -> dict[int, list[int]]:
    return {axis.id: [1, 2, 7, 11, 14, 17] for axis in graph.axes if axis.prunable and axis.kind == kind}


def zeroed(model: Any, plan: Plan) -> Any:
    """A copy with the removed positions zeroed, and nothing else."""
    masked = copy.deepcopy(model)
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        for name, dims in plan.kept.items():
            for dim, kept in dims.items():
                gone = np.setdiff1d(np.arange(parameters[name].shape[dim]), kept)
                parameters[name].index_fill_(dim, torch.as_tensor(gone), 0)
    return masked


@pytest.mark.parametrize("family", ["llama_gqa", "qwen3", "gemma", "t5"])
def test_a_pruned_channel_is_a_zeroed_channel(family: str) -> None:
    """Weights with and without the one that Gemma adds, with a large epsilon that would show."""
    model = build(family, torch.float64)
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.3)
    graph = llmprune.trace(model, inputs(model))
    plan = llmprune.plan(graph, removed=removal(graph))
    assert plan.rescaled
    assert not any(op.name == "aten::mean" for op in plan.marked)
    small = llmprune.compact(copy.deepcopy(model), plan)
    reference = logits(zeroed(model, plan))
    error = float((logits(small) - reference).abs().max() / reference.abs().max())
    assert error <= 5e-6, "norms round to float32 inside, and no more than that may show"
    llmprune.verify(model, plan, inputs(model))


def test_kept_norms_take_the_mean_over_what_stays() -> None:
    model = build("llama_gqa", torch.float64)
    graph = llmprune.trace(model, inputs(model))
    plan = llmprune.plan(graph, removed=removal(graph), norms="kept")
    assert plan.rescaled == []
    assert plan.marked
    small = llmprune.compact(copy.deepcopy(model), plan)
    norm = small.model.norm
    assert norm.variance_epsilon == model.model.norm.variance_epsilon
    kept = torch.as_tensor(plan.kept["model.norm.weight"][0])
    assert torch.equal(norm.weight, model.model.norm.weight[kept])
    llmprune.verify(model, plan, inputs(model))


def test_layer_norms_are_left_to_the_masked_reference() -> None:
    model = build("gpt2")
    graph = llmprune.trace(model, inputs(model))
    plan = llmprune.plan(graph, removed=removal(graph))
    assert plan.rescaled == []
    assert plan.marked
    assert "norms" not in plan.options


def test_the_scaling_is_in_the_plan_the_record_and_the_checkpoint(tmp_path: Path) -> None:
    model = build("llama_gqa")
    graph = llmprune.trace(model, inputs(model))
    plan = llmprune.plan(graph, removed=removal(graph))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    small = llmprune.compact(copy.deepcopy(model), plan)
    weight = model.model.norm.weight[torch.as_tensor(plan.kept["model.norm.weight"][0])]
    torch.testing.assert_close(small.model.norm.weight, weight * (24 / 18) ** 0.5)
    assert small.model.norm.variance_epsilon == model.config.rms_norm_eps * 24 / 18
    saved = save_pretrained(small, tmp_path / "auto", inputs=inputs(model))
    assert saved.form == "stock"
    config = json.loads((tmp_path / "auto" / "config.json").read_text())
    assert (config["hidden_size"], config["rms_norm_eps"]) == (18, small.model.norm.variance_epsilon)
    save_pretrained(small, tmp_path / "universal", form="universal", inputs=inputs(model))
    for name in ("auto", "universal"):
        expect(small, tmp_path / name)
    read_without_llmprune([tmp_path / "auto", tmp_path / "universal"], tmp_path)
    again = load_model(tmp_path / "universal")
    assert recheck(again, model, inputs(model)).verification is not None
    second = llmprune.trace(again, inputs(model))
    twice = llmprune.compact(again, llmprune.plan(second, removed=removal(second)))
    assert recheck(twice, model, inputs(model)).verification is not None


class Doubled(nn.Module):
    """Not a root-mean-square norm, though it takes a mean of squares."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + 2 * self.eps)


class Stream(nn.Module):
    """A residual stream with a norm of a given kind."""

    def __init__(self, norm: nn.Module, size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, size)
        self.norm = norm
        self.head = nn.Linear(size, 13, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(ids)))


def test_norms_are_known_by_what_they_compute() -> None:
    ids = {"ids": torch.arange(10).view(2, 5)}
    for norm, answer in (
        (nn.RMSNorm(12, eps=1e-5), [["norm", "norm.weight", 0.0, "eps", 1e-5]]),
        (Doubled(12), []),
        (nn.LayerNorm(12), []),
        (nn.RMSNorm(12), []),  # its epsilon is the dtype's and stands in no attribute
        (tf.models.gemma.modeling_gemma.GemmaRMSNorm(12), [["norm", "norm.weight", 1.0, "eps", 1e-6]]),
    ):
        model = Stream(norm, 12).eval()
        assert find_norms(model, record(model, ids)) == answer, norm
        graph = llmprune.trace(model, ids)
        axis = next(axis for axis in graph.axes if axis.prunable and axis.size == 12)
        plan = llmprune.plan(graph, removed={axis.id: [3, 8]})
        assert bool(plan.rescaled) == bool(answer)
        llmprune.verify(model, plan, ids)


def test_a_weight_that_two_norms_share_is_not_scaled() -> None:
    norm = nn.RMSNorm(12, eps=1e-5)
    model = Stream(nn.Sequential(norm, nn.RMSNorm(12, eps=1e-5)), 12).eval()
    model.norm[1].weight = norm.weight
    assert find_norms(model, record(model, {"ids": torch.arange(10).view(2, 5)})) == []


def test_the_meta_device_knows_them_too() -> None:
    kind, config = FAMILIES["gemma"]()
    with torch.device("meta"):
        model = kind(config)
    graph = llmprune.trace(model)
    assert {(offset, name) for _, _, offset, name, _ in graph.tape.norms} == {(1.0, "eps")}
    assert len(graph.tape.norms) == 5


def test_an_unknown_treatment_is_refused() -> None:
    model = build("llama_gqa")
    graph = llmprune.trace(model, inputs(model))
    with pytest.raises(InputError, match="unknown treatment of norms 'half': there are rescaled and kept"):
        llmprune.plan(graph, removed=removal(graph), norms="half")


@pytest.mark.parametrize(("kind", "rescaled"), [("head", True), ("query", False)])
def test_a_norm_over_heads_is_rescaled_only_where_what_goes_would_be_zero(kind: str, rescaled: bool) -> None:
    """A head whose values are zero adds nothing to the mean square; one whose query is zero still averages values."""
    torch.manual_seed(0)
    config = tf.BitNetConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=32,
    )
    model = tf.BitNetForCausalLM(config).double().eval()
    graph = llmprune.trace(model)
    axis = next(axis for axis in graph.axes if axis.prunable and axis.kind == kind)
    plan = llmprune.plan(graph, removed={axis.id: [0]})
    assert bool(plan.rescaled) == rescaled
    assert bool(plan.marked) != rescaled
    assert llmprune.verify(model, plan).relative_error < 1e-6
