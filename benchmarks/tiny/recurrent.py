"""Recipes: state space, linear attention and recurrent models, and hybrids of these with attention or experts."""

from __future__ import annotations

from typing import Any

from tiny.recipe import Recipe, causal_lm

NAMES = (
    "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2",
    "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
)  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {}

RECIPES: tuple[Recipe, ...] = tuple(causal_lm(name, **OVERRIDES.get(name, {})) for name in NAMES)
