"""Modules nobody has described to llmprune: every prunable axis, cut, equals the model with zeros in its place."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_modules import Around, Classifier, Feed, Gpt, Mixer, ResidualNetwork, features, ids, image
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from zeroed_reference import cast, check_axes, difference, output, seeded, sizes

import llmprune
from llmprune.tracing.graph import Graph

Make = Callable[[], nn.Module]


def self_attention(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = attention(x, x, x)[0]
    return result


def without_weights(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = attention(x, x, x, need_weights=False)[0]
    return result


def first(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module(x)[0]
    return result


def twice(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module(x, x)
    return result


def encoder(heads: int, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, heads, 20, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(12, 3, 20, batch_first=True), 1)


class Fused(nn.Module):
    """Fused attention over query heads that share key-value heads."""

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.heads, self.shared = 6, 2 if grouped else 6
        self.q, self.k, self.v = (nn.Linear(12, 4 * n) for n in (self.heads, self.shared, self.shared))
        self.out = nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (part(x).unflatten(-1, (self.shared, -1)).transpose(1, 2) for part in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)
        result: torch.Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


CASES: dict[str, tuple[Make, Any, list[int]]] = {
    "cnn": (Classifier, image(), [10, 14, 22]),
    "residual network": (ResidualNetwork, image(16), [3, 4, 4, 5, 6, 6, 10, 12]),
    "mixer": (Mixer, image(), [11, 11, 14, 26, 26]),
    "gpt, chunked": (lambda: Gpt("chunk"), ids(), [4, 4, 24, 40, 40]),
    "gpt, split": (lambda: Gpt("split"), ids(), [4, 4, 24, 40, 40]),
    "gpt, viewed": (lambda: Gpt("view"), ids(), [4, 4, 24, 40, 40]),
    "gpt, interleaved": (lambda: Gpt("unflatten"), ids(), [4, 4, 24, 40, 40]),
    "gpt, einsum": (lambda: Gpt("einsum"), ids(), [4, 4, 24, 40, 40]),
    "gpt, untied": (lambda: Gpt("view", tied=False), ids(), [4, 4, 24, 40, 40]),
    "fused attention": (lambda: Around(Fused(False), 12), features(), [4, 4, 6, 12, 12]),
    "grouped queries": (lambda: Around(Fused(True), 12), features(), [2, 3, 4, 4, 12, 12]),
    "multi-head attention": (
        lambda: Around(nn.MultiheadAttention(12, 3, batch_first=True), 12, self_attention), features(), [3, 12, 12],
    ),
    "multi-head attention, fused": (
        lambda: Around(nn.MultiheadAttention(12, 3, bias=False), 12, without_weights), features(), [3, 12, 12],
    ),
    "encoder, post-norm": (lambda: Around(encoder(4), 12), features(), [4, 4, 12, 20, 20]),
    "encoder, pre-norm": (lambda: Around(encoder(3, norm_first=True), 12), features(), [3, 3, 12, 20, 20]),
    "decoder": (lambda: Around(decoder(), 12, twice), features(), [3, 3, 12, 20]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_prunable_axis_comes_out_whole(name: str) -> None:
    make, inputs, expected = CASES[name]
    graph = check_axes(seeded(make), inputs)
    assert sizes(graph) == expected
    assert graph.unknown_operations == {}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("layers", [1, 2])
def test_recurrent_modules(kind: Any, layers: int) -> None:
    """One attribute, ``hidden_size``, is the width of every layer: it shrinks in all of them."""
    graph = check_axes(seeded(lambda: Around(kind(12, 12, layers, batch_first=True), 12, first)), features())
    assert sizes(graph) == [12, 12]


def test_the_encoders_fast_path_is_taken_and_equals_the_reference() -> None:
    """One fused kernel that gets the sizes as arguments: the attributes must have followed."""
    layer = nn.TransformerEncoderLayer(12, 6, 20, batch_first=True)
    model, inputs = seeded(lambda: Around(layer, 12)), cast(features())
    graph = llmprune.trace(model, inputs)
    heads = next(axis for axis in graph.axes if axis.kind == "head")
    ffn = next(axis for axis in graph.axes if axis.size == 20)
    plan = llmprune.plan(graph, removed={ffn.id: [3, 11], heads.id: [1, 4]})
    small = llmprune.compact(copy.deepcopy(model), plan)
    assert (small.inner.self_attn.embed_dim, small.inner.self_attn.num_heads) == (8, 4)
    names: list[str] = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Names():
        got = output(small, inputs)
    assert "aten::_transformer_encoder_layer_fwd" in names
    assert difference(model, plan, inputs) < 1e-9
    with torch.enable_grad():  # the slow path
        assert torch.allclose(got, small(*inputs).detach(), rtol=1e-9, atol=1e-9)


PLACED = re.compile(r"\((?:aten::\w+ in |.*, in module ').+\)$| in [\w.]+$|at \w+ in [\w.]+")


@pytest.mark.parametrize("name", CASES)
def test_every_frozen_axis_says_where(name: str) -> None:
    """A reason names the operation and the module, or the module that used a size as a number."""
    make, inputs, _ = CASES[name]
    frozen = [axis for axis in llmprune.trace(make(), inputs).axes if not axis.prunable]
    assert frozen
    for axis in frozen:
        assert axis.reasons
        assert all(PLACED.search(reason) for reason in axis.reasons), axis


# Weight tying and parametrisation


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder transposed, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(12, 18)
        self.once, self.again = nn.Linear(18, 18), nn.Linear(18, 18)
        self.again.weight = self.once.weight
        self.bias = nn.Parameter(torch.zeros(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.encode(x))
        y = y + torch.relu(self.again(torch.relu(self.once(y))))
        return F.linear(y, self.encode.weight.t(), self.bias)


def test_tied_weights_are_cut_once_and_stay_tied() -> None:
    model = seeded(lambda: Around(Tied(), 12))
    graph = check_axes(model, features())
    assert sizes(graph) == [12, 18]
    axis = next(axis for axis in graph.axes if axis.size == 18)
    small = llmprune.compact(model, llmprune.plan(graph, removed={axis.id: [2, 9]}))
    assert small.inner.once.weight is small.inner.again.weight
    assert small.inner.once.weight.shape == (16, 16)


class Doubled(nn.Module):
    """A parametrisation written by hand."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + weight.abs()


class Symmetric(nn.Module):
    """The one of PyTorch's tutorial."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


def parametrised(change: Callable[[Feed], Any], inner: int = 20) -> Make:
    def make() -> nn.Module:
        feed = Feed(12, inner)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the older forms still run in many models
            change(feed)
        return Around(feed, 12)

    return make


def both(wrap: Callable[..., Any], **second: Any) -> Callable[[Feed], Any]:
    def change(feed: Feed) -> None:
        wrap(feed.up)
        wrap(feed.down, **second)

    return change


PARAMETRISED: dict[str, tuple[Make, list[int]]] = {
    "weight norm": (parametrised(both(parametrizations.weight_norm, dim=1)), [12, 12, 20]),
    "weight norm of the whole": (parametrised(lambda f: parametrizations.weight_norm(f.up, dim=None)), [12, 12, 20]),
    "weight norm by a hook": (parametrised(both(torch.nn.utils.weight_norm, dim=1)), [12, 12, 20]),
    "spectral norm": (parametrised(both(parametrizations.spectral_norm)), [12, 12, 20]),
    "by hand": (parametrised(lambda f: parametrize.register_parametrization(f.up, "weight", Doubled())), [12, 12, 20]),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETRISED)
def test_parametrised_weights(name: str) -> None:
    make, expected = PARAMETRISED[name]
    model = seeded(make)
    output(
        model, cast(features())
    )  # a hook leaves a computed weight behind; one with a gradient cannot be copied
    graph = check_axes(model, features())
    assert sizes(graph) == expected


def frozen_reasons(graph: Graph, parameter: str) -> str:
    """Why the axes of a parameter are frozen."""
    found = [a for a in graph.axes if not a.prunable and any(name == parameter for name, _ in a.places)]
    return "; ".join(reason for axis in found for reason in axis.reasons)


REFUSED: dict[str, Callable[[Feed], Any]] = {
    "orthogonal": lambda feed: parametrizations.orthogonal(feed.up),
    "symmetric": lambda feed: parametrize.register_parametrization(feed.up, "weight", Symmetric()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parametrisations_that_fix_a_shape_are_frozen_with_the_way_out(name: str) -> None:
    graph = check_axes(seeded(parametrised(REFUSED[name], 12)), features())
    reasons = frozen_reasons(graph, "inner.up.parametrizations.weight.original")
    assert "in inner.up.parametrizations.weight.0" in reasons
    assert "remove_parametrizations" in reasons


def test_a_weight_that_a_hook_computes_does_not_hinder_verification() -> None:
    model = parametrised(both(torch.nn.utils.weight_norm, dim=1))()
    inputs = {"x": features()[0]}
    model(**inputs)  # now it has a gradient function, and no copy
    graph = llmprune.trace(model, inputs)
    axis = next(axis for axis in graph.axes if axis.size == 20)
    plan = llmprune.plan(graph, removed={axis.id: [0, 7]})
    assert plan.marked
    assert llmprune.Plan.from_json(plan.to_json()) == plan
    assert llmprune.verify(model, plan, inputs).masked_ops == 2
    assert llmprune.verify(model.bfloat16(), plan, {"x": inputs["x"].bfloat16()}).dtype == "float32"
