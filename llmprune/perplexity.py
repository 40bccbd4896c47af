"""Perplexity of a causal language model on a text, by the windows of the paper's code."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from llmprune.errors import InputError
from llmprune.wrapped import on_uncompiled

WINDOW = 128
"""Tokens per window."""

_LOGITS = 1 << 26
"""Logits held at once: batches are cut so that windows x tokens x vocabulary stays below it."""


@on_uncompiled
@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str | torch.Tensor,
    window: int = WINDOW,
    max_windows: int | None = None,
) -> float:
    """The exponential of the mean next-token loss over consecutive, non-overlapping windows.

    The first token of a window has nothing before it and is not scored; what is left over at the end is dropped; no
    special token is added. This is the protocol of LLM-Pruner's evaluation (arXiv:2305.11627, section 4.1).

    Args:
        model: a causal language model; it is run in evaluation mode and left in its own.
        tokenizer: called as ``tokenizer(text, add_special_tokens=False)["input_ids"]``.
        text: at least ``window`` tokens of text, or their ids (int64, 1-D; the tokenizer is then not used).
        window: tokens per window, at least 2; cut to the model's ``max_position_embeddings``.
        max_windows: use only the first so many.

    Raises:
        InputError: the text is shorter than one window.
    """
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    window = min(window, limit) if isinstance(limit, int) and limit > 1 else window
    if window < 2:
        raise InputError(f"a window of {window} tokens scores nothing: 2 is the least")
    if isinstance(text, str):
        text = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    ids = text.to(torch.int64)
    count = len(ids) // window
    if max_windows is not None:
        count = min(count, max_windows)
    if count == 0:
        raise InputError(f"the evaluation text has {len(ids)} tokens, fewer than one window of {window}")
    windows = ids[: count * window].view(count, window)
    device = next(model.parameters()).device
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    total, step = 0.0, 1
    try:
        start = 0
        while start < count:
            batch = windows[start : start + step].to(device)
            logits = model(batch, use_cache=False).logits[:, :-1]
            loss = nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]).float(), batch[:, 1:].reshape(-1), reduction="sum"
            )
            total += float(loss)
            start += step
            step = max(1, min(64, _LOGITS // (window * logits.shape[-1])))
    finally:
        for module, mode in training:
            module.training = mode
    mean = total / (count * (window - 1))
    return math.exp(mean) if mean < 700 else math.inf
