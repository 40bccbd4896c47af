"""Hand-made pruning plans for the tests of compaction and verification: no tracing, so their faults are their own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune.checkpoints.record import fingerprint

HIDDEN, HEADS, GROUPS, HEAD_DIM, FFN, LAYERS, VOCABULARY = 24, 6, 3, 8, 20, 2, 61


def llama(seed: int = 0, tie: bool = False, **config: Any) -> LlamaForCausalLM:
    """A small GQA Llama with weights large enough that a wrongly cut channel shows."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD_DIM,
        "intermediate_size": FFN,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tie,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**values, **config})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.dim() == 1))
    return model


def blocks(indices: Any, width: int) -> np.ndarray:
    """Positions of blocks of ``width``: [0, 2], 3 -> 0 1 2 6 7 8."""
    return (np.asarray(indices)[:, None] * width + np.arange(width)).reshape(-1)


def keep(size: int, removed: Any) -> np.ndarray:
    return np.setdiff1d(np.arange(size), np.asarray(removed))


def llama_plan(
    model: torch.nn.Module,
    ffn: dict[int, list[int]] | None = None,
    heads: dict[int, list[int]] | None = None,
    attributes: list[Any] | None = None,
    marked: list[Any] | None = None,
) -> SimpleNamespace:
    """A plan that removes, by layer, FFN channels and whole KV groups of :func:`llama`."""
    kept: dict[str, dict[int, np.ndarray]] = {}
    removed: dict[int, np.ndarray] = {}
    axes: dict[int, dict[str, Any]] = {}
    for layer, channels in (ffn or {}).items():
        block = f"model.layers.{layer}.mlp."
        size = model.get_submodule(block + "up_proj").out_features
        rows = keep(size, channels)
        kept.update({block + "gate_proj.weight": {0: rows}, block + "up_proj.weight": {0: rows}})
        kept[block + "down_proj.weight"] = {1: rows}
        removed[layer], axes[layer] = np.asarray(channels), {"kind": "ffn", "size": size}
    for layer, groups in (heads or {}).items():
        block = f"model.layers.{layer}.self_attn."
        size = model.get_submodule(block + "k_proj").out_features // HEAD_DIM
        left = keep(size, groups)
        query = blocks(left, HEADS // GROUPS * HEAD_DIM)
        kept.update(
            {block + name: {0: blocks(left, HEAD_DIM)} for name in ("k_proj.weight", "v_proj.weight")}
        )
        kept.update({block + "q_proj.weight": {0: query}, block + "o_proj.weight": {1: query}})
        removed[10 + layer], axes[10 + layer] = np.asarray(groups), {"kind": "head", "size": size}
    return SimpleNamespace(
        kept=kept,
        removed=removed,
        axes=axes,
        attributes=attributes or [],
        marked=marked or [],
        fingerprint=fingerprint(model),
        options={"ratio": None, "seed": 0},
    )


def attribute(module: str, name: str, old: int, new: int, index: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(module=module, name=name, index=index, old=old, new=new)


def ids(rows: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def zeroed_logits(model: torch.nn.Module, plan: Any, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits of a copy in which the removed positions of the parameters are zero (nothing of llmprune is used)."""
    import copy

    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, dims in plan.kept.items():
            p = twin.get_parameter(name)
            for dim, positions in dims.items():
                p.index_fill_(dim, torch.as_tensor(keep(p.shape[dim], positions)), 0.0)
        return twin(tokens, **inputs).logits
