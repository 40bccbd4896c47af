"""Axes of tokens that are parameters: latents of a resampler, which attention normalises over."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llmprune
from llmprune.errors import VerificationError


class Resampler(nn.Module):
    """Five latents read a sequence, and the sequence reads the latents (eagerly, or by fused attention)."""

    def __init__(self, fused: bool, causal: bool = False) -> None:
        super().__init__()
        self.fused, self.causal = fused, causal
        self.latents = nn.Parameter(torch.randn(5, 12))
        self.read, self.key, self.value = nn.Linear(7, 12), nn.Linear(12, 12), nn.Linear(12, 14)
        self.out = nn.Linear(14, 3)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """x (batch, T, 7), keep (batch, T, 1): which sequence elements may read at all."""
        latents = self.latents.repeat(x.shape[0], 1, 1)
        query, key, value = self.read(x), self.key(latents), self.value(latents)
        mask = keep.expand(-1, -1, key.shape[1])
        if self.fused:
            heads = [t.unsqueeze(1) for t in (query, key, value)]
            mixed = F.scaled_dot_product_attention(
                *heads, None if self.causal else mask[:, None], is_causal=self.causal, scale=0.3
            )
            return self.out(mixed[:, 0])
        scores = (query @ key.transpose(1, 2) * 0.3).masked_fill(~mask, -1e9)
        return self.out(scores.softmax(-1) @ value)


def built(fused: bool, causal: bool = False) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Resampler(fused, causal).double()
    keep = torch.ones(2, 4, 1, dtype=torch.bool)
    return model, {"x": torch.randn(2, 4, 7, dtype=torch.float64), "keep": keep}


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "sdpa"])
def test_latents_under_fused_attention_are_normalised_over_too(fused: bool) -> None:
    model, inputs = built(fused)
    graph = llmprune.trace(model, inputs)
    axis = next(a for a in graph.axes if a.places[0] == ("latents", 0))
    assert axis.prunable
    assert axis.kind == "other"
    assert any("softmax" in mark for mark in axis.marks)
    plan = llmprune.plan(graph, removed={axis.id: [1, 3]})
    assert [op.size for op in plan.marked] == [5]
    assert llmprune.verify(model, plan, inputs).masked_ops == 1
    plan.marked.clear()
    with pytest.raises(VerificationError, match="differs"):
        llmprune.verify(model, plan, inputs)


def test_keys_of_causal_fused_attention_keep_their_order() -> None:
    model, inputs = built(fused=True, causal=True)
    axis = next(a for a in llmprune.trace(model, inputs).axes if a.places[0] == ("latents", 0))
    assert not axis.prunable
    assert any("the order along it matters" in reason for reason in axis.reasons)
