"""What the benchmarks of tracing share: the bare forward pass on meta tensors, and the memory a trace adds to it."""

from __future__ import annotations

import torch
from _measure import peak_over
from torch import nn

import llmprune

BATCH, LENGTH = 2, 7


def bare(model: nn.Module) -> None:
    """One forward pass on meta tensors, with a mask of four dimensions: no meta tensor is asked for a value."""
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long, device="meta")
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH, device="meta")
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)


def extra_bytes(model: nn.Module, small: nn.Module) -> dict[str, int]:
    """Bytes that a bare forward and a trace add to this process, which holds the built model.

    ``small`` is run first: what is loaded once is not the model's.
    """
    bare(small)
    llmprune.trace(small)
    return {"bare": peak_over(lambda: bare(model)), "trace": peak_over(lambda: llmprune.trace(model))}
