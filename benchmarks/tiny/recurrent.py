"""Recipes: state space, linear attention and recurrent models, and hybrids of these with attention or experts."""

from __future__ import annotations

from typing import Any

from tiny.recipe import Recipe, causal_lm

NAMES = (
    "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2",
    "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
)  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 24, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 10, "mamba_d_ssm": 40},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 24, "layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 24, "n_groups": 2},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 10, "n_groups": 2,
                   "moe_shared_expert_intermediate_size": 34},
    "recurrent_gemma": {"lru_width": 42, "block_types": ["recurrent", "attention"]},
    "rwkv": {"attention_hidden_size": 40},
    "xlstm": {"embedding_dim": 48, "num_blocks": 2, "num_heads": 4},
    "zamba": {"attention_hidden_size": 96, "attention_head_dim": 16, "num_key_value_heads": 6, "num_hidden_layers": 4,
              "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"attention_hidden_size": 96, "attention_head_dim": 16, "num_key_value_heads": 6, "mamba_headdim": 24,
               "n_mamba_heads": 4, "mamba_ngroups": 2, "adapter_rank": 9},
    "bailing_hybrid": {"num_expert_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
                       "mlp_layer_types": ["dense", "sparse"]},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 12, "indexer_budget": 4,
                       "indexer_compress_ratio": 2, "hc_lowrank": 9},
}  # fmt: skip

RECIPES: tuple[Recipe, ...] = tuple(causal_lm(name, **OVERRIDES.get(name, {})) for name in NAMES)
