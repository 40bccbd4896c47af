"""A trace as a whole: blocks of a kind, the second form of attention, and trial forwards."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build
from torch import nn

import llmprune
from llmprune.tracing.blocks import find_excerpt
from llmprune.tracing.trace import record


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
