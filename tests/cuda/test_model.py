"""A whole model on a CUDA device: the same scores, the same kept sets and the same pruned model as on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import llmprune

pytestmark = pytest.mark.cuda
DEMO = Path(__file__).resolve().parents[2] / "demo" / "model"


@pytest.fixture
def model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(DEMO).float().eval()


def ids(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (6, 24), generator=generator)


@pytest.mark.parametrize("importance", ["vector", "element1", "element2", "l1", "l2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_kept_sets_equal_the_cpus(model: torch.nn.Module, importance: str, checkpointing: bool) -> None:
    graph = llmprune.trace(model)
    tokens = ids(model)
    want = llmprune.score(model, graph, tokens, importance=importance, quiet=True)
    device = copy.deepcopy(model).cuda()
    got = llmprune.score(
        device,
        graph,
        tokens,
        importance=importance,
        checkpointing=checkpointing,
        pin_boundaries=checkpointing,
        quiet=True,
    )
    for axis in want:
        np.testing.assert_allclose(got[axis], want[axis], rtol=1e-3, atol=1e-7)
    chosen = [llmprune.plan(graph, scores, ratio=0.2) for scores in (want, got)]
    assert chosen[0].removed.keys() == chosen[1].removed.keys()
    for axis in chosen[0].removed:
        np.testing.assert_array_equal(
            np.asarray(chosen[0].removed[axis]), np.asarray(chosen[1].removed[axis])
        )


@pytest.mark.parametrize("release", [False, True])
def test_a_compacted_model_equals_the_cpus(model: torch.nn.Module, release: bool) -> None:
    graph = llmprune.trace(model)
    tokens = ids(model)
    plan = llmprune.plan(graph, llmprune.score(model, graph, importance="l2", quiet=True), ratio=0.2)
    device = copy.deepcopy(model).cuda()
    llmprune.compact(model, plan)
    llmprune.compact(device, plan, release=release)
    for (name, a), b in zip(model.named_parameters(), device.parameters(), strict=True):
        assert b.is_cuda
        assert torch.equal(a, b.cpu()), name
    with torch.no_grad():
        torch.testing.assert_close(
            device(tokens.cuda()).logits.cpu(), model(tokens).logits, rtol=1e-3, atol=1e-3
        )


def test_release_gives_memory_back_for_one_matrix_of_peak() -> None:
    layers = [torch.nn.Linear(2048, 2048, bias=False) for _ in range(12)]
    model = torch.nn.Sequential(*layers).cuda()
    graph = llmprune.trace(model, {"input": torch.randn(2, 2048, device="cuda")})
    scores = llmprune.score(model, graph, importance="l2", quiet=True)
    plan = llmprune.plan(
        graph, scores, ratio=0.3, kinds=sorted({axis.kind for axis in graph.axes if axis.prunable})
    )
    matrix = 2048 * 2048 * 4
    torch.cuda.empty_cache()
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    torch.cuda.reset_peak_memory_stats()
    llmprune.compact(model, plan, release=True)
    scratch = 64 << 20
    assert torch.cuda.max_memory_allocated() - before <= matrix + scratch
    assert before - torch.cuda.memory_allocated() >= 2 * matrix
    assert torch.cuda.mem_get_info()[0] - free >= 2 * matrix


def test_a_model_beyond_the_devices_memory_is_refused_before_it_starts(model: torch.nn.Module) -> None:
    graph = llmprune.trace(model)
    device = copy.deepcopy(model).cuda()
    room = torch.cuda.mem_get_info()[0] - (16 << 20)
    torch.cuda.empty_cache()
    hog = torch.empty(max(0, room), dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises((llmprune.errors.DeviceError, torch.OutOfMemoryError), match=r"GiB|memory"):
            llmprune.score(device, graph, ids(model), importance="element2", quiet=True)
    finally:
        del hog
        torch.cuda.empty_cache()
    assert all(parameter.grad is None for parameter in device.parameters())
    llmprune.score(device, graph, ids(model), importance="element2", quiet=True)


@pytest.mark.parametrize("release", [False, True])
def test_each_expert_loses_the_channels_that_it_loses_on_the_cpu(release: bool) -> None:
    config = MixtralConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=44, num_local_experts=5, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).float().eval()
    graph = llmprune.trace(model)
    tokens = ids(model)
    device = copy.deepcopy(model).cuda()
    plans = []
    for one in (model, device):
        scores = llmprune.score(one, graph, tokens, "element1", quiet=True)
        plans.append(llmprune.plan(graph, scores, {"ffn": 0.3}, protect_first=0, protect_last=0))
    assert any(removed.ndim == 2 for removed in plans[0].removed.values())
    for axis, removed in plans[0].removed.items():
        np.testing.assert_array_equal(removed, plans[1].removed[axis])
    llmprune.verify(device, plans[1], {"input_ids": tokens.cuda()})
    llmprune.compact(model, plans[0])
    llmprune.compact(device, plans[1], release=release)
    for name, parameter in device.named_parameters():
        assert torch.equal(parameter.cpu(), model.get_parameter(name)), name
