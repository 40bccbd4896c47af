"""Recipes: text encoders with a decoder."""

from __future__ import annotations

from typing import Any

import torch

from tiny.nested import seq2seq
from tiny.recipe import Recipe

NAMES = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "encoder-decoder", "led", "longt5", "m2m_100",
    "marian", "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet", "seamless_m4t",
    "seamless_m4t_v2", "switch_transformers", "t5", "t5gemma", "umt5",
)  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "bigbird_pegasus": {"attention_type": "original_full"},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True, "hidden_size": 40,
                                    "num_attention_heads": 5, "intermediate_size": 34}, "decoder_start_token_id": 1},
    "led": {"attention_window": [4, 4], "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 62},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "pegasus_x": {"num_global_tokens": 3, "block_size": 4, "stagger_local_blocks": True},
    # its mask is float32 times the least number of the model's dtype: of float64, NaN
    "prophetnet": {"dtype": torch.float32, "num_encoder_layers": 2, "num_decoder_layers": 2,
                   "num_encoder_attention_heads": 6, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 56,
                   "decoder_ffn_dim": 58, "num_buckets": 8, "relative_max_distance": 16},
    "t5gemma": {"decoder": {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 58}},
}  # fmt: skip

RECIPES: tuple[Recipe, ...] = tuple(seq2seq(name, **OVERRIDES.get(name, {})) for name in NAMES)
