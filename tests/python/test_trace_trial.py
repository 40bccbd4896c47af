"""A trace as a whole: blocks of a kind, the second form of attention, and trial forwards."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build
from torch import nn

import llmprune
from llmprune.blocks import find_excerpt
from llmprune.tape import leaves
from llmprune.trace import record


def prunable(graph: llmprune.Graph) -> dict[str, list[int]]:
    """Kind -> sizes of the prunable axes."""
    found: dict[str, list[int]] = {}
    for axis in graph.axes:
        if axis.prunable:
            found.setdefault(axis.kind, []).append(axis.size)
    return found


def test_blocks_of_a_kind_stand_for_one_another() -> None:
    model = build("llama", num_hidden_layers=5)
    excerpt = find_excerpt(model, record(model))
    assert excerpt.kept == {"model.layers": [0]}
    assert excerpt.replicas == [("model.layers.0.", f"model.layers.{n}.") for n in range(1, 5)]
    model = build("t5", num_layers=4)  # the first block of each stack has a position bias of its own
    excerpt = find_excerpt(model, record(model))
    assert excerpt.kept == {"encoder.block": [0, 1], "decoder.block": [0, 1]}


def test_blocks_that_differ_are_all_kept() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(6, n) for n in (4, 5, 4))
            self.unused = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([block(x) for block in self.blocks], -1)

    model = Stack()
    excerpt = find_excerpt(model, record(model, (torch.ones(2, 6),)))
    assert excerpt.kept == {"blocks": [0, 1]}
    assert excerpt.replicas == [("blocks.0.", "blocks.2.")]
    # Only its first two blocks would give another output: the trial knows by the shape that they do not stand for all.
    graph = llmprune.trace(model, (torch.ones(2, 6),))
    assert prunable(graph) == {}  # inputs and outputs are frozen, and there is nothing between


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_both_forms_of_attention_give_their_attributes_for_every_layer(layers: int) -> None:
    model = build("llama", "sdpa", num_hidden_layers=layers)
    graph = llmprune.trace(model)
    assert graph.tape.attention == "sdpa"
    assert graph.second is not None
    own = {tuple(leaf[1:3]) for e in graph.tape.equations for leaf in leaves(e[2]) if leaf[0] == "attr"}
    other = {tuple(leaf[1:3]) for e in graph.second.equations for leaf in leaves(e[2]) if leaf[0] == "attr"}
    for layer in range(layers):
        attribute = (f"model.layers.{layer}.self_attn", "num_key_value_groups")
        assert attribute not in own
        assert attribute in other
    heads = [axis for axis in graph.axes if axis.kind == "query"]
    assert len(heads) == layers
    plan = llmprune.plan(graph, removed={heads[-1].id: [0]})
    changed = {(a.module, a.name): (a.old, a.new) for a in plan.attributes}
    assert changed[f"model.layers.{layers - 1}.self_attn", "num_key_value_groups"] == (2, 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral"])
def test_axes_are_the_same_under_both_forms_of_attention(family: str) -> None:
    eager, sdpa = (prunable(llmprune.trace(build(family, form))) for form in ("eager", "sdpa"))
    assert eager == sdpa


class Checked(nn.Module):
    """Two layers; the code of the first insists on its width in a way no equation shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        if x.size(-1) % 2:
            raise ValueError("an even width is needed")
        result: torch.Tensor = self.c(self.b(x).relu())
        return result


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_the_model_does_not_survive_is_frozen_with_its_words(device: str) -> None:
    graph = llmprune.trace(Checked().to(device), (torch.ones(3, 4),))
    axes = {axis.size: axis for axis in graph.axes}
    assert not axes[6].prunable
    [reason] = axes[6].reasons
    assert reason.startswith(
        "trial forward failed: an even width is needed (aten::addmm, in module 'the root'"
    )
    assert "raise ValueError" in reason
    assert axes[5].prunable


def test_a_failure_in_one_block_freezes_those_like_it() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Checked() for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    graph = llmprune.trace(Stack(), (torch.ones(3, 4),))
    assert [axis.prunable for axis in graph.axes if axis.size == 6] == [False] * 4
    assert [axis.prunable for axis in graph.axes if axis.size == 5] == [True] * 4


def test_a_model_that_needs_computed_values_is_tried_on_real_tensors() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            result: torch.Tensor = self.b(y if y.abs().max().item() < 1e6 else y * 0.5)
            return result

    model = Gate()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = llmprune.trace(model, (torch.ones(3, 4),))
    assert graph.tape.device_mode == "real"
    assert [axis.size for axis in graph.axes if axis.prunable] == [6]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
