"""Scores of whole layers against naive ones, and that nothing stays on the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import make_folder
from test_layers import deep
from torch import nn

import llmprune
from llmprune.cli import main
from llmprune.errors import InputError

IDS = torch.randint(3, 90, (5, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, llmprune.Graph]:
    model = deep("llama", 3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    return model, llmprune.trace(model)


def streams(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The hidden states before and after every layer of a llama."""
    with torch.no_grad():
        return [*model(input_ids=ids, output_hidden_states=True).hidden_states]


def gate_gradients(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(samples, layers, channels): gradients of each sample's loss at gates in the layers' contributions."""
    rows = []
    for row in ids:
        gates = torch.ones(3, 48, dtype=torch.float64, requires_grad=True)
        handles = [
            layer.register_forward_hook(lambda _m, a, out, i=i: a[0] + gates[i] * (out - a[0]))  # noqa: B023
            for i, layer in enumerate(model.model.layers)
        ]
        logits = model(input_ids=row[None], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], row[1:])
        for handle in handles:
            handle.remove()
        rows.append(torch.autograd.grad(loss, gates)[0])
    return torch.stack(rows)


def test_block_influence_is_one_minus_the_mean_cosine(case: Any) -> None:
    model, graph = case
    (stack,) = graph.layers
    inner: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _m, a, out: inner.extend((a[0], out)))
        for layer in model.model.layers
    ]
    streams(model, IDS)
    for handle in handles:
        handle.remove()
    want = [
        1 - float(torch.nn.functional.cosine_similarity(inner[2 * i], inner[2 * i + 1], dim=-1).mean())
        for i in range(3)
    ]
    scores = llmprune.score(model, graph, IDS, importance="block_influence")
    assert list(scores) == [stack.id]
    assert scores.kinds == {stack.id: "layer"}
    np.testing.assert_allclose(scores[stack.id], want, rtol=1e-9)
    again = llmprune.Scores.from_json(scores.to_json())
    np.testing.assert_array_equal(again[stack.id], scores[stack.id])


@pytest.mark.parametrize("batch_size", [None, 2])
def test_gradient_scores_are_those_of_a_gate_for_each_channel(case: Any, batch_size: int | None) -> None:
    model, graph = case
    (stack,) = graph.layers
    gradients = gate_gradients(model, IDS)
    g, s = gradients.mean(0), gradients.square().mean(0)
    want = {
        "vector": g.sum(1).abs(),
        "element1": g.abs().sum(1),
        "element2": (g - s / 2).abs().sum(1),
    }
    for importance, values in want.items():
        scores = llmprune.score(
            model, graph, IDS, importance=importance, kinds=("layer",), batch_size=batch_size
        )
        np.testing.assert_allclose(scores[stack.id], values.detach().numpy(), rtol=1e-5)
        assert list(scores) == [stack.id]


def test_magnitudes_and_draws(case: Any) -> None:
    model, graph = case
    (stack,) = graph.layers
    weights = [torch.cat([p.detach().flatten() for p in layer.parameters()]) for layer in model.model.layers]
    for importance, norm in (("l1", 1), ("l2", 2)):
        scores = llmprune.score(model, graph, importance=importance, kinds=("layer",))
        want = [float(torch.linalg.vector_norm(w, norm)) for w in weights]
        np.testing.assert_allclose(scores[stack.id], want)
    draws = [llmprune.score(model, graph, importance="random", kinds=("layer",), seed=s) for s in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0][stack.id], draws[1][stack.id])
    assert not np.array_equal(draws[0][stack.id], draws[2][stack.id])


def test_layers_are_scored_only_when_asked_for(case: Any) -> None:
    model, graph = case
    without = llmprune.score(model, graph, IDS)
    both = llmprune.score(model, graph, IDS, kinds=("layer", "ffn"))
    assert set(both) - set(without) == {graph.layers[0].id}
    for axis in without:
        np.testing.assert_array_equal(both[axis], without[axis])


def test_nothing_stays_on_the_model(case: Any) -> None:
    model, graph = case
    model.train()
    before = [p.detach().clone() for p in model.parameters()]
    hooks = [len(module._forward_hooks) for module in model.model.layers]
    llmprune.score(model, graph, IDS, importance="element2", kinds=("layer",))
    llmprune.score(model, graph, IDS, importance="block_influence")
    assert model.training
    model.eval()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [len(module._forward_hooks) for module in model.model.layers] == hooks


def test_an_encoder_needs_no_loss_and_masked_tokens_do_not_count() -> None:
    model = deep("bert", 3)
    graph = llmprune.trace(model)
    (stack,) = graph.layers
    mask = torch.ones_like(IDS)
    mask[:, 6:] = 0
    short = llmprune.score(model, graph, {"input_ids": IDS[:, :6]}, importance="block_influence")
    padded = {"input_ids": IDS, "attention_mask": mask}
    masked = llmprune.score(model, graph, padded, importance="block_influence")
    np.testing.assert_allclose(masked[stack.id], short[stack.id], rtol=1e-4)


def test_both_stacks_of_an_encoder_decoder() -> None:
    model = deep("t5", 3)
    graph = llmprune.trace(model)
    batch = {"input_ids": IDS, "labels": IDS[:, :6].contiguous()}
    for importance in ("block_influence", "element1"):
        scores = llmprune.score(model, graph, batch, importance=importance, kinds=("layer",))
        assert list(scores) == [stack.id for stack in graph.layers]
        assert all((scores[stack.id] > 0).all() for stack in graph.layers)
    with pytest.raises(InputError, match="is an encoder-decoder: pass a mapping"):
        llmprune.score(model, graph, IDS, importance="block_influence")


def test_block_influence_is_of_layers_only(case: Any) -> None:
    model, graph = case
    with pytest.raises(
        InputError, match="scores whole layers, attention or feed-forwards, and nothing smaller"
    ):
        llmprune.score(model, graph, IDS, importance="block_influence", kinds=("layer", "ffn"))
    with pytest.raises(
        InputError, match="scores whole layers, attention or feed-forwards, and nothing smaller"
    ):
        llmprune.prune(model, calibration=IDS, importance="block_influence")
    with pytest.raises(InputError, match="unknown kind 'block'"):
        llmprune.score(model, graph, IDS, kinds=("block",))


def test_the_command_line_lists_and_drops_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path, layers=4)
    assert main(["trace", str(folder)]) == 0
    assert re.search(r"^layer +1 +4 +4 ", capsys.readouterr().out, re.MULTILINE)
    words = [
        "prune",
        str(folder),
        "--kinds",
        "layer",
        "--ratio",
        "layer=0.5",
        "--output",
        str(tmp_path / "out"),
    ]
    words += [
        "--importance",
        "block_influence",
        "--calibration",
        str(tmp_path / "calibration.txt"),
        "--length",
        "32",
    ]
    assert main([*words, "--protect-first", "0", "--protect-last", "0", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "layer" in out
    assert "(stock form)" in out
    assert main(["verify", str(tmp_path / "out"), "--original", str(folder), "--quiet"]) == 0
    assert main([*words[:4], "--importance", "block_influence", "--kinds", "ffn"]) == 2
