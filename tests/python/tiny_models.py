"""Tiny, randomly initialised models for the tests: a few thousand parameters, sizes that differ from one another."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

TEXT: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {key: TEXT[key] for key in TEXT if not key.endswith("_id") and key != "num_key_value_heads"}
VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 56,
    "image_size": 16,
    "patch_size": 8,
}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", TEXT),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**TEXT, "head_dim": 10}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**TEXT, "head_dim": 10}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", TEXT),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**TEXT, "num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 101, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 56,
         "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {**{k: v for k, v in TEXT.items() if k != "num_key_value_heads"}, "rotary_pct": 0.5},
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {"vocab_size": 101, "hidden_size": 48, "word_embed_proj_dim": 48, "num_hidden_layers": 2,
         "num_attention_heads": 6, "ffn_dim": 56, "max_position_embeddings": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2},
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": 101, "hidden_size": 48, "n_layer": 2, "n_head": 6, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_kv_heads": 3,
         "new_decoder_architecture": True, "ffn_hidden_size": 56, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": 101, "hidden_size": 48, "state_size": 11, "num_hidden_layers": 2, "time_step_rank": 7},
    ),
    "rwkv": (
        "RwkvConfig",
        "RwkvForCausalLM",
        {"vocab_size": 101, "hidden_size": 48, "attention_hidden_size": 40, "num_hidden_layers": 2,
         "intermediate_size": 56, "context_length": 64, "use_cache": False},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", ENCODER),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": 101, "d_model": 48, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 5,
         "decoder_start_token_id": 0},
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", {**VISION, "num_labels": 10}),
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"hidden_sizes": [10, 22], "depths": [1, 1], "num_stages": 2, "image_size": 32, "num_labels": 10},
    ),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {"text_config": {**ENCODER, "hidden_size": 40, "num_attention_heads": 5, "eos_token_id": 2},
         "vision_config": VISION, "projection_dim": 22},
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {"vocab_size": 101, "num_mel_bins": 16, "encoder_layers": 2, "decoder_layers": 2, "d_model": 48,
         "encoder_attention_heads": 6, "decoder_attention_heads": 6, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56,
         "max_source_positions": 13, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "decoder_start_token_id": 1},
    ),
    "wav2vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        {**ENCODER, "conv_dim": [12, 14], "conv_kernel": [5, 3], "conv_stride": [3, 2],
         "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    ),
}  # fmt: skip


def build(family: str, attention: str = "eager", device: str = "cpu", **changes: Any) -> nn.Module:
    """A model of the family in float32, the same weights each time; the global seeds stay as they were."""
    config_class, model_class, settings = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**settings, **changes})
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, model_class)(config)
    return model.eval()
