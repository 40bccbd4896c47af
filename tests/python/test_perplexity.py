"""Perplexity: against the probabilities themselves, and the protocol's edges."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compact_plans import llama
from torch import nn

from llmprune.errors import InputError
from llmprune.evaluation.perplexity import perplexity


class Letters:
    """One character, one token; a special token in front unless told not to."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [3 + ord(c) % 50 for c in text]}


class Bigram(nn.Module):
    """Logits of the next token from the last one alone, by a table."""

    def __init__(self, size: int = 61) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))
        self.batches: list[int] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> SimpleNamespace:
        assert not use_cache
        assert not self.training
        self.batches.append(len(input_ids))
        return SimpleNamespace(logits=self.table[input_ids])


TEXT = "the cat sat on the mat and looked at the moon" * 5


def test_equals_the_probabilities_of_the_bigrams() -> None:
    model = Bigram().train()
    ids = Letters()(TEXT, add_special_tokens=False)["input_ids"]
    log_p = model.table.detach().double().log_softmax(-1)
    window, losses = 16, []
    for start in range(0, len(ids) - window + 1, window):
        part = ids[start : start + window]
        losses += [-float(log_p[a, b]) for a, b in itertools.pairwise(part)]
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(model, Letters(), TEXT, window=window) == pytest.approx(expected, rel=1e-5)
    assert model.training
    assert sum(model.batches) == len(ids) // window


def test_the_number_of_windows_can_be_bounded_and_the_context_bounds_the_window() -> None:
    model = llama(max_position_embeddings=16)
    value = perplexity(model, Letters(), TEXT, window=128)
    assert value == perplexity(model, Letters(), TEXT, window=16)
    assert perplexity(model, Letters(), TEXT, max_windows=1) == perplexity(model, Letters(), TEXT[:16])
    assert math.isfinite(value)


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(InputError, match="20 tokens, fewer than one window of 64"):
        perplexity(Bigram(), Letters(), "a" * 20, window=64)
    with pytest.raises(InputError, match="2 is the least"):
        perplexity(Bigram(), Letters(), TEXT, window=1)


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    model = Bigram()
    with torch.no_grad():
        model.table.copy_(torch.eye(61) * 1e4)
    assert perplexity(model, Letters(), "ab" * 60, window=32) == math.inf
