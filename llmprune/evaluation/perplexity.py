"""Perplexity and bits per character of a causal language model on a text, over windows of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmprune.errors import InputError
from llmprune.tracing.wrapped import on_uncompiled

WINDOW = 128
"""Tokens per window."""

PROTOCOLS = {"llm-pruner": WINDOW, "2048": 2048}
"""Name -> tokens per window: that of the paper's code, and that of most later work. In both, windows do not overlap and
what is left over at the end is dropped."""

_LOGITS = 1 << 26
"""Logits held at once: batches are cut so that windows x tokens x vocabulary stays below it."""


@dataclass(frozen=True)
class TextScore:
    """How well a model foretells a text.

    Attributes:
        perplexity: exponential of the mean next-token loss.
        bits_per_character: that loss in bits, times tokens per character of the whole text; unlike perplexity it can be
            compared between vocabularies.
        tokens: tokens of the whole text.
        characters: its characters.
        windows: windows that were scored.
        window: tokens in each, after the cut to the model's positions.
        stride: tokens from the start of one to that of the next.
    """

    perplexity: float
    bits_per_character: float
    tokens: int
    characters: int
    windows: int
    window: int
    stride: int


def score_text(
    model: nn.Module, tokenizer: Any, text: str, window: int = WINDOW, stride: int | None = None
) -> TextScore:
    """Perplexity and bits per character of ``text``, encoded as the tokenizer does by default.

    Windows of ``window`` tokens begin every ``stride`` tokens; each scores the tokens that no earlier one has scored
    and that have a token before them in it. An incomplete window at the end is dropped. With ``stride`` equal to
    ``window`` and 128 tokens this is the protocol of LLM-Pruner's evaluation (arXiv:2305.11627, section 4.1).

    Args:
        model: a causal language model; it is run in evaluation mode and left in its own.
        tokenizer: called as ``tokenizer(text)["input_ids"]``.
        text: at least one window of tokens.
        window: tokens per window, at least 2; cut to the model's ``max_position_embeddings``.
        stride: 1 to ``window``; None takes ``window``.

    Raises:
        InputError: the text is shorter than one window, or window or stride are outside their range.
    """
    window = _fitting(model, window)
    stride = window if stride is None else min(stride, window)
    if stride < 1:
        raise InputError(f"a stride of {stride} tokens goes nowhere: 1 is the least")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    loss, windows = _mean_loss(model, ids, window, stride)
    bits = loss / math.log(2) * len(ids) / len(text)
    return TextScore(_exponential(loss), bits, len(ids), len(text), windows, window, stride)


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str | torch.Tensor,
    window: int = WINDOW,
    max_windows: int | None = None,
) -> float:
    """The exponential of the mean next-token loss over consecutive, non-overlapping windows.

    The first token of a window has nothing before it and is not scored; what is left over at the end is dropped; no
    special token is added.

    Args:
        model: a causal language model; it is run in evaluation mode and left in its own.
        tokenizer: called as ``tokenizer(text, add_special_tokens=False)["input_ids"]``.
        text: at least ``window`` tokens of text, or their ids (int64, 1-D; the tokenizer is then not used).
        window: tokens per window, at least 2; cut to the model's ``max_position_embeddings``.
        max_windows: use only the first so many.

    Raises:
        InputError: the text is shorter than one window.
    """
    window = _fitting(model, window)
    if isinstance(text, str):
        text = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return _exponential(_mean_loss(model, text.to(torch.int64), window, window, max_windows)[0])


def positions(model: Any) -> int | None:
    """The longest sequence the model's config allows; None where it does not say."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 1 else None


def _fitting(model: nn.Module, window: int) -> int:
    window = min(window, positions(model) or window)
    if window < 2:
        raise InputError(f"a window of {window} tokens scores nothing: 2 is the least")
    return window


def _exponential(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


@on_uncompiled
@torch.no_grad()
def _mean_loss(
    model: nn.Module, ids: torch.Tensor, window: int, stride: int, max_windows: int | None = None
) -> tuple[float, int]:
    """Mean next-token loss (nats) over the scored tokens of ``ids`` (1-D), and how many windows there were."""
    if len(ids) < window or max_windows == 0:
        raise InputError(f"the evaluation text has {len(ids)} tokens, fewer than one window of {window}")
    windows = ids.unfold(0, window, stride)[:max_windows]
    device = next(model.parameters()).device
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    total, tokens, start, step = 0.0, 0, 0, 1
    try:
        while start < len(windows):
            batch = windows[start : start + step].to(device)
            # Only the first window scores all its tokens; the others those that the one before did not have.
            new = window if start == 0 else stride
            targets = batch[:, 1:][:, -new:]
            logits = model(batch, use_cache=False).logits[:, :-1][:, -new:]
            loss = nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), reduction="sum"
            )
            total += float(loss)
            tokens += targets.numel()
            start += step
            step = max(1, min(64, _LOGITS // (window * logits.shape[-1])))
    finally:
        for module, mode in training:
            module.training = mode
    return total / tokens, len(windows)
