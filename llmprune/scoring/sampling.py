"""Which calibration samples a job takes from what the caller has: as many, and as long, as it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llmprune.planning.layer_choice import DEPTHS
from llmprune.scoring.calibration import LENGTH, LONG_LENGTH, LONG_SAMPLES, SAMPLES, Batch, load_calibration
from llmprune.scoring.importance import lookup
from llmprune.scoring.loss import config_value

AUTO = "auto"


def best_importance(name: str, kinds: Sequence[str], alone: bool = True) -> str:
    """What ``auto`` stands for: ``obs``, which with repair is the best of all, or ``element1`` where layers go.

    It is ``element1`` as well for processes that share the samples or a model that is streamed, ``alone`` false.
    """
    if name != AUTO:
        return name
    return "obs" if alone and not set(kinds) & set(DEPTHS) else "element1"


def calibration_for(
    importance: str,
    model: nn.Module,
    source: Any,
    tokenizer: Any,
    samples: int | None = None,
    length: int | None = None,
) -> Batch:
    """The calibration samples that :func:`score` takes from ``source`` for an importance.

    Raises:
        CalibrationError, InputError: as :func:`llmprune.scoring.calibration.load_calibration`.
    """
    if lookup(importance).sort == "inputs":
        return long_calibration(model, source, tokenizer, samples, length)
    batch = load_calibration(
        source,
        tokenizer,
        samples=SAMPLES if samples is None else samples,
        length=LENGTH if length is None else length,
        vocabulary=vocabulary_size(model),
    )
    return batch.to(_device(model))


def _device(model: nn.Module) -> torch.device:
    """Where a model's inputs go; the CPU where its weights are in their files."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def long_calibration(
    model: nn.Module, source: Any, tokenizer: Any, samples: int | None = None, length: int | None = None
) -> Batch:
    """Calibration for what is fitted to activations: of texts 16 samples of 128 tokens, or as many as they have.

    Samples are no longer than the model's positions.

    Raises:
        CalibrationError, InputError: as :func:`llmprune.scoring.calibration.load_calibration`.
    """
    if length is None:
        positions = config_value(model, "max_position_embeddings")
        length = min(LONG_LENGTH, positions) if isinstance(positions, int) and positions > 1 else LONG_LENGTH
    batch = load_calibration(
        source,
        tokenizer,
        samples=LONG_SAMPLES if samples is None else samples,
        length=length,
        vocabulary=vocabulary_size(model),
        fewer=samples is None,
    )
    return batch.to(_device(model))


def vocabulary_size(model: nn.Module) -> int | None:
    """How many token ids the model takes."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except NotImplementedError:
        embedding = None
    if isinstance(embedding, nn.Embedding):
        return embedding.num_embeddings
    size = config_value(model, "vocab_size")
    return size if isinstance(size, int) else None
