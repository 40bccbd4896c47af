"""How many tokens a tower of a multimodal model makes of its input: asked of the tower itself, on the meta device."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import nn

from llmprune.errors import LlmpruneError

log = logging.getLogger(__name__)


class _Tower(nn.Module):
    """A model seen through one of its methods, so that it can be recorded as any other module.

    Args:
        model: the model.
        owner: the module that has the method.
        method: its name; gives features, alone or under the usual name in an output.
    """

    def __init__(self, model: nn.Module, owner: nn.Module, method: str) -> None:
        super().__init__()
        self.model = model
        self.config = getattr(model, "config", None)
        self._find = next(name for name, module in model.named_modules() if module is owner)
        self._method = method

    def forward(self, **inputs: Any) -> Any:
        """The features, in tensors (..., hidden)."""
        result = getattr(self.model.get_submodule(self._find), self._method)(**inputs)
        features = getattr(result, "pooler_output", None)
        return result if features is None else features


def token_count(model: nn.Module, method: str, inputs: Mapping[str, torch.Tensor], batch: int) -> int | None:
    """Feature vectors for each of ``batch`` samples.

    Args:
        model: a multimodal model.
        method: name of the method that makes features of an input: ``get_image_features``, ``get_audio_features``.
        inputs: arguments of the model's forward made so far; those that the method knows are given to it.
        batch: samples in them.

    Returns:
        The number, or None where the model has no such method or it does not run.
    """
    from llmprune.tracing.trace import record

    for owner in (model, *model.children()):
        function = getattr(owner, method, None)
        known = inspect.signature(function).parameters if callable(function) else {}
        if any(name in known for name in inputs):
            break
    else:
        return None
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    given = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
        if name in known
    }
    try:
        tape = record(_Tower(model, owner, method), given)
    except LlmpruneError as error:
        log.debug("%s does not say how many tokens it makes: %s", method, error)
        return None
    vectors = sum(prod(tape.tensors[tensor][0][:-1]) for tensor in tape.outputs)
    return vectors // batch if vectors and vectors % batch == 0 else None
