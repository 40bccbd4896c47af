"""obs, fluctuation and activation against plain formulas on recorded inputs, and what they are worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build
from torch import nn

import llmprune
from llmprune.errors import InputError
from llmprune.repair.moments import RIDGE, ROUNDS


def ids(samples: int = 6, length: int = 10) -> torch.Tensor:
    return torch.randint(3, 90, (samples, length), generator=torch.Generator().manual_seed(0))


def inputs_of(model: nn.Module, name: str) -> torch.Tensor:
    """What a linear module gets over the calibration tokens, (tokens, in)."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids(), use_cache=False)
    handle.remove()
    return seen[0].flatten(0, -2)


def consumer(axis: Any) -> tuple[str, np.ndarray]:
    """The linear module that contracts an axis, with the inputs of each index."""
    (member,) = (m for m in axis.members if m.parameter.endswith(("o_proj.weight", "down_proj.weight")))
    return member.parameter.removesuffix(".weight"), np.asarray(member.positions).reshape(axis.size, -1)


def left_over(x: torch.Tensor, weight: torch.Tensor, gone: np.ndarray) -> float:
    """The ridge-regularised output error after the best repair, by solving for it: no inverse is downdated here."""
    h = x.t() @ x / len(x)
    h += RIDGE * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    stays = np.setdiff1d(np.arange(len(h)), gone)
    change = torch.linalg.solve(h[stays][:, stays], h[stays][:, gone] @ weight[:, gone].t())
    delta = torch.zeros_like(weight)
    delta[:, stays], delta[:, gone] = change.t(), -weight[:, gone]
    return float((delta @ h * delta).sum())


def curvature(model: nn.Module, name: str) -> float:
    """Half the mean square of the gradient at a linear module's outputs, of the loss as the scores have it."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, out: seen.append(out))
    samples = ids()
    logits = model(input_ids=samples, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), samples[:, 1:], reduction="none").mean(1)
    handle.remove()
    (gradient,) = torch.autograd.grad(losses.sum() * samples.shape[1], seen)
    return float(0.5 * gradient.square().mean())


@pytest.mark.parametrize("kind", ["head", "ffn"])
def test_obs_is_the_error_that_repair_leaves(kind: str) -> None:
    model = build("llama").double()
    graph = llmprune.trace(model)
    scores = llmprune.score(model, graph, ids(), importance="obs")
    for axis in (a for a in graph.axes if a.prunable and a.kind == kind):
        name, groups = consumer(axis)
        x, weight = inputs_of(model, name), model.get_submodule(name).weight.detach()
        weight = weight * curvature(model, name) ** 0.5
        order = np.argsort(scores[axis.id], kind="stable")
        before, gone, highest = 0.0, np.empty(0, dtype=np.int64), 0.0
        for place, index in enumerate(order[:-1]):
            if axis.size - place >= 2 * ROUNDS:  # a round takes several
                highest = float(scores[axis.id][index])
                gone = np.concatenate([gone, groups[index]])
                before = left_over(x, weight, gone)
                continue
            candidates = {
                int(i): left_over(x, weight, np.concatenate([gone, groups[i]])) - before
                for i in order[place:]
            }
            least = min(candidates, key=candidates.__getitem__)
            assert candidates[int(index)] == pytest.approx(candidates[least], rel=1e-6)
            highest = max(float(np.nextafter(highest, np.inf)), candidates[least])
            assert scores[axis.id][index] == pytest.approx(highest, rel=1e-6)
            gone = np.concatenate([gone, groups[index]])
            before = left_over(x, weight, gone)


def test_fluctuation_and_activation_are_moments_of_the_inputs() -> None:
    model = build("llama").double()
    graph = llmprune.trace(model)
    fluctuation = llmprune.score(model, graph, ids(), importance="fluctuation", batch_size=4)
    activation = llmprune.score(model, graph, ids(), importance="activation")
    for axis in (a for a in graph.axes if a.prunable and a.kind in ("head", "ffn")):
        name, groups = consumer(axis)
        x, weight = inputs_of(model, name), model.get_submodule(name).weight.detach()
        norms = weight.square().sum(0)
        want = (x.var(0, correction=0) * norms).numpy()[groups].sum(1)
        np.testing.assert_allclose(fluctuation[axis.id], want, rtol=1e-9)
        np.testing.assert_allclose(
            activation[axis.id], x.square().mean(0).numpy()[groups].sum(1) ** 0.5, rtol=1e-9
        )


@pytest.mark.parametrize("importance", ["obs", "fluctuation", "activation"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "phi3", "t5"])
def test_other_architectures(family: str, importance: str) -> None:
    model = build(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = llmprune.trace(model)
    data: Any = ids()
    if family == "t5":
        data = {"input_ids": ids(), "decoder_input_ids": ids()}
    scores = llmprune.score(model, graph, data, importance=importance)
    again = llmprune.score(model, graph, data, importance=importance)
    assert {a.id for a in graph.axes if a.prunable and a.kind in ("head", "ffn")} <= set(scores)
    assert all(np.array_equal(scores[axis], again[axis]) for axis in scores)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    plan = llmprune.plan(graph, scores, ratio=0.1, protect_first=0, protect_last=0)
    assert llmprune.verify(model, plan).relative_error < 1e-5


def test_query_heads_are_ranked_apart_in_each_key_value_head() -> None:
    model = build("llama").double()
    graph = llmprune.trace(model)
    scores = llmprune.score(model, graph, ids(), importance="obs")
    (first, *_) = (a for a in graph.axes if a.prunable and a.kind == "query")
    assert scores.nested[first.id].shape == (3, first.size)
    plan = llmprune.plan(graph, scores, ratio={"query": 0.5}, protect_first=0, protect_last=0)
    assert llmprune.verify(model, plan).relative_error < 1e-9


def test_dead_channels_go_first() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[[5, 9]] = 0
    graph = llmprune.trace(model)
    (axis, *_) = (a for a in graph.axes if a.prunable and a.kind == "ffn")
    for importance in ("obs", "fluctuation", "activation"):
        scores = llmprune.score(model, graph, ids(), importance=importance)
        assert set(np.argsort(scores[axis.id])[:2]) == {5, 9}


def test_bad_input() -> None:
    model = build("llama")
    graph = llmprune.trace(model)
    with pytest.raises(InputError, match="needs calibration data"):
        llmprune.score(model, graph, importance="obs")
    with pytest.raises(InputError, match="no scores for whole layers"):
        llmprune.score(model, graph, ids(), importance="obs", kinds=("ffn", "layer"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        llmprune.score(model, graph, ids(), importance="obs")


def test_obs_compares_across_kinds_where_there_is_a_loss(tmp_path: Any) -> None:
    model = build("llama")
    graph = llmprune.trace(model)
    scores = llmprune.score(model, graph, ids(), importance="obs", kinds=("head", "ffn"))
    assert scores.comparable
    scores.save(tmp_path / "scores.npz")
    assert llmprune.Scores.load(tmp_path / "scores.npz").comparable
    plan = llmprune.plan(graph, scores, ratio=0.1)
    assert (plan.options["allocation"], plan.options["protect_first"]) == ("global", 0)
    # What it leaves has more to lose per parameter than what it takes: no common share, and no unit of a kind.
    axes = {axis.id: axis for axis in graph.axes}
    whole = graph.numel({})
    density = {a: scores[a] / (whole - graph.numel({a: 1})) for a in scores}
    taken = np.concatenate([density[a][gone] for a, gone in plan.removed.items()])
    left = min(np.delete(density[a], plan.removed.get(a, [])).min() for a in scores if axes[a].kind == "ffn")
    assert np.mean(taken <= left) > 0.95  # the rest filled up the budget
    assert not llmprune.score(model, graph, ids(), importance="fluctuation").comparable
    encoder = build("bert")
    graph = llmprune.trace(encoder)
    scores = llmprune.score(encoder, graph, ids(), importance="obs")
    assert not scores.comparable  # plain ids, and later tokens count: it has no loss of its own
    assert llmprune.plan(graph, scores, ratio=0.05).options["allocation"] == "uniform"
