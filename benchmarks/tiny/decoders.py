"""Recipes: text decoders of the plain kind (attention and an FFN in every layer)."""

from __future__ import annotations

from typing import Any

from tiny.recipe import Recipe, causal_lm

NAMES = (
    "apertus", "arcee", "bert-generation", "biogpt", "bitnet", "bloom", "blt", "codegen", "cohere", "cohere2",
    "cohere_compass_text", "cpmant", "ctrl", "cwm", "diffllama", "ernie4_5", "exaone4", "falcon", "gemma", "gemma2",
    "gemma3_text", "gemma3n_text", "gemma4_unified_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
    "gpt_neox_japanese", "gptj", "granite", "granite_swa", "helium", "hrm_text", "hunyuan_v1_dense", "hyperclovax",
    "jais2", "llama", "minicpm3", "ministral", "ministral3", "mistral", "modernbert-decoder", "mpt", "nanochat",
    "nemotron", "olmo", "olmo2", "olmo3", "openai-gpt", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3",
    "seed_oss", "smollm3", "stablelm", "starcoder2", "trocr", "vaultgemma", "xglm", "xlnet", "youtu",
)  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {}

RECIPES: tuple[Recipe, ...] = tuple(causal_lm(name, **OVERRIDES.get(name, {})) for name in NAMES)
