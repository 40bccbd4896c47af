"""What a model writes after a prompt."""

from __future__ import annotations

from typing import Any

import torch

from llmprune.errors import InputError

GENERATED = 40
"""Tokens generated unless asked otherwise."""


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int = GENERATED) -> str:
    """What the model writes after ``prompt``, greedily, without the prompt.

    Args:
        model: a causal language model.
        tokenizer: called as ``tokenizer(prompt, return_tensors="pt")``.
        prompt: at least one token of text.
        tokens: how many are written at most.

    Raises:
        InputError: the prompt has no tokens.
    """
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if encoded["input_ids"].shape[1] == 0:
        raise InputError("the prompt has no tokens: --generate needs at least one")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    encoded = encoded.to(model.device)
    ids = model.generate(**encoded, max_new_tokens=tokens, do_sample=False, pad_token_id=padding)
    whole: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    start: str = tokenizer.decode(encoded["input_ids"][0], skip_special_tokens=True)
    return whole.removeprefix(start) if whole.startswith(start) else " ... " + whole
