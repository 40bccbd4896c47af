"""A size that enters the arithmetic as a number freezes its axis, whichever library reads the number."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import llmprune


class Scaled(nn.Module):
    """One hidden width, by whose value the output is scaled in some way."""

    def __init__(self, scale: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.width = 12
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 3)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, 5)."""
        hidden = torch.relu(self.up(x)).view(x.shape[0], 1, self.width)
        return self.down(self.scale(self.width, hidden))


@pytest.mark.parametrize(
    ("scale", "spent"),
    [
        (lambda size, h: h / np.sqrt(size), True),
        (lambda size, h: h / np.power(size, 2).item(), True),
        (lambda size, h: h / math.sqrt(size), True),
        (lambda size, h: h / torch.sqrt(torch.tensor(size, dtype=h.dtype)), True),
        (lambda size, h: h * torch.tensor([[1, size]], dtype=h.dtype).sum(), True),
        (lambda size, h: h * 0.5, False),
    ],
    ids=["numpy", "numpy-power", "math", "tensor", "list-of-numbers", "not-at-all"],
)
def test_a_width_that_scales_the_output(
    scale: Callable[[int, torch.Tensor], torch.Tensor], spent: bool
) -> None:
    model = Scaled(scale).double()
    graph = llmprune.trace(model, {"x": torch.randn(2, 5, dtype=torch.float64)})
    axis = next(axis for axis in graph.axes if axis.size == 12)
    assert axis.prunable is not spent
    assert spent == any("used as a number" in reason for reason in axis.reasons)


class Standardised(nn.Module):
    """A layer whose weight is standardised over its inputs at every call, as batch norm in training does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, 5)."""
        rows = self.down.weight[None]
        weight = nn.functional.batch_norm(rows, None, None, training=True)[0]
        return torch.relu(self.up(x)) @ weight.T


def test_statistics_of_what_is_there_are_a_norm_over_it() -> None:
    torch.manual_seed(0)
    model = Standardised().double()
    inputs = {"x": torch.randn(4, 5, dtype=torch.float64)}
    graph = llmprune.trace(model, inputs)
    axis = next(axis for axis in graph.axes if axis.size == 12)
    assert axis.prunable
    assert any("normalisation" in mark for mark in axis.marks)
    plan = llmprune.plan(graph, removed={axis.id: [2, 7]})
    assert llmprune.verify(model, plan, inputs).masked_ops == 1
