"""Recipes: text decoders of the plain kind (attention and an FFN in every layer)."""

from __future__ import annotations

from typing import Any

import torch

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

_PART = {
    "vocab_size": 101, "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 6,
    "max_position_embeddings": 64,
}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 8, "n_embd": 80, "rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "diffllama": {"num_key_value_heads": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "intermediate_size": [56] * 4, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "vocab_size_per_layer_input": 101, "hidden_size_per_layer_input": 10, "laurel_rank": 9,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "openai-gpt": {"afn": "gelu"},
    "trocr": {"decoder_layers": 2},
    "xglm": {"dtype": torch.float32},
    "xlnet": {"dtype": torch.float32},
    "blt": {
        "dtype": torch.float32,
        "vocab_size": 101, "encoder_hash_byte_group_size": [3, 4], "encoder_hash_byte_group_vocab": 61,
        "patcher_config": {**_PART, "hidden_size": 48, "intermediate_size": 56, "head_dim": 8},
        "encoder_config": {**_PART, "hidden_size": 48, "intermediate_size": 56, "hidden_size_global": 72},
        "decoder_config": {**_PART, "hidden_size": 48, "intermediate_size": 58, "hidden_size_global": 72,
                           "head_dim": 8},
        "global_config": {**_PART, "hidden_size": 72, "intermediate_size": 62, "head_dim": 12},
    },
}  # fmt: skip

RECIPES: tuple[Recipe, ...] = tuple(causal_lm(name, **OVERRIDES.get(name, {})) for name in NAMES)
