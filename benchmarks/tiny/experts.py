"""Recipes: mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch

from tiny.recipe import Recipe, causal_lm

NAMES = (
    "afmoe", "aria_text", "axk1", "axk2", "beam", "cohere2_moe", "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v32",
    "deepseek_v4", "doge", "dots1", "dots3_note_text", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint",
    "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_text", "inkling_text", "jetmoe", "kolibri1",
    "laguna", "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text",
    "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open", "zaya",
)  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 3, "clip_qkv": 8, "rope_theta": 1e4}, "num_key_value_heads": ...,
        "ffn_config": {"hidden_size": 48, "ffn_hidden_size": 26, "moe_num_experts": 5, "moe_top_k": 2},
    },
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 9, "hc_mult": 4},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 26},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2},
    "inkling2_text": {"dtype": torch.float32},
    "jetmoe": {"kv_channels": 8, "num_attention_heads": ...},
    "longcat_flash": {"moe_topk": 2, "zero_expert_num": 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 9},
}  # fmt: skip

RECIPES: tuple[Recipe, ...] = tuple(causal_lm(name, **OVERRIDES.get(name, {})) for name in NAMES)
