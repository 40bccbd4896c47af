"""Scores against the naive oracle: every importance and aggregation, on models of every make."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from scoring import AGGREGATIONS, IMPORTANCES, gradients, ids_of, model_of, oracle, whole_graph, worst

from llmprune.scoring.score import score

ARCHITECTURES = (
    "llama_mha",
    "llama_gqa",
    "llama_tied",
    "qwen2",
    "qwen3",
    "gemma2",
    "cohere",
    "gpt2",
    "opt",
    "phi",
    "mixtral",
    "mamba",
)


@functools.cache
def case(name: str):
    model, ids = model_of(name), ids_of()
    return model, ids, whole_graph(model), gradients(model, ids)


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sum_equals_the_oracle(name, importance):
    model, ids, graph, grads = case(name)
    want = oracle(model, graph, grads, importance, "sum")
    assert (
        worst(score(model, graph, ids, importance=importance), want) < 1e-6
    )  # float32 inside norms and softmaxes


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("name", ["llama_tied", "opt"])
def test_every_aggregation_equals_the_oracle(name, importance, aggregation):
    model, ids, graph, grads = case(name)
    want = oracle(model, graph, grads, importance, aggregation)
    got = score(model, graph, ids, importance=importance, aggregation=aggregation)
    assert list(got) == [axis.id for axis in graph.axes]
    assert all(got[a.id].shape == (a.size,) and got[a.id].dtype == np.float64 for a in graph.axes)
    assert worst(got, want) < 1e-5


@pytest.mark.parametrize("importance", ["vector", "element1", "element2"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_the_order_of_samples_does_not_matter(name, importance):
    model, ids, graph, _ = case(name)
    first = score(model, graph, ids, importance=importance)
    second = score(model, graph, ids.flip(0), importance=importance)
    assert worst(second, first) < 1e-6
    assert first.calibration_hash != second.calibration_hash


def test_one_sample_makes_the_fisher_term_the_square_of_the_gradient():
    model, ids, graph, _ = case("llama_gqa")
    got = score(model, graph, ids[:1], importance="element2")
    (g,) = gradients(model, ids[:1])["model.layers.1.mlp.down_proj.weight"]
    w = model.get_parameter("model.layers.1.mlp.down_proj.weight").detach()
    want = (g * w - 0.5 * (g * w) ** 2).abs().sum(0).numpy()
    axis = next(a for a in graph.axes if [(m.parameter, m.dim) for m in a.members] == [(_DOWN, 1)])
    np.testing.assert_allclose(got[axis.id], want, rtol=1e-9)


_DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("importance", ["vector", "element1", "element2"])
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
def test_lower_precisions_agree(name, importance):
    _, ids, graph, _ = case(name)
    want = score(case(name)[0], graph, ids, importance=importance)
    single = score(model_of(name, torch.float32), graph, ids, importance=importance)
    assert worst(single, want) < 2e-4
    half = score(model_of(name, torch.bfloat16), graph, ids, importance=importance)
    ranks = [np.corrcoef(half[a], want[a])[0, 1] for a in want if len(want[a]) > 8 and np.ptp(want[a]) > 0]
    assert np.median(ranks) > 0.98


@pytest.mark.parametrize("importance", ["vector", "element1", "element2"])
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
def test_attention_implementations_agree(name, importance):
    model, ids, graph, _ = case(name)
    fused = score(model_of(name, attention="sdpa"), graph, ids, importance=importance)
    assert worst(fused, score(model, graph, ids, importance=importance)) < 1e-5


@pytest.mark.parametrize("importance", [*IMPORTANCES, "random"])
def test_the_same_call_gives_the_same_bits(importance):
    model, ids, graph, _ = case("llama_tied")
    first, second = (score(model, graph, ids, importance=importance, seed=3) for _ in range(2))
    assert all(np.array_equal(first[a], second[a]) for a in first)


def test_random_depends_on_seed_and_axis_alone():
    model, _, graph, _ = case("llama_gqa")
    first, second = (score(model, graph, importance="random", seed=seed) for seed in (0, 1))
    for axis in graph.axes:
        np.testing.assert_array_equal(first[axis.id], np.random.default_rng((0, axis.id)).random(axis.size))
        assert not np.array_equal(first[axis.id], second[axis.id])
    assert first.calibration_hash is None
