"""Recipes: encoders that are trained to fill in masked tokens."""

from __future__ import annotations

from typing import Any

from tiny.nested import masked_lm
from tiny.recipe import Recipe

NAMES = (
    "albert", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2", "distilbert",
    "electra", "ernie", "esm", "esmc", "eurobert", "flaubert", "fnet", "funnel", "gte", "ibert", "jina_embeddings_v3",
    "layoutlm", "longformer", "luke", "megatron-bert", "mobilebert", "modernbert", "mpnet", "neomme",
    "nomic_bert", "nystromformer", "perceiver", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert",
    "roformer", "squeezebert", "tapas", "ultrabert", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso",
)  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 22},
    "convbert": {"embedding_size": 22, "conv_kernel_size": 5},
    "deberta-v2": {
        "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    },
    "electra": {"embedding_size": 22},
    "esmc": {"num_key_value_heads": 6},
    "flaubert": {"emb_dim": 48},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_head": 10, "d_inner": 56},
    "jina_embeddings_v3": {"position_embedding_type": "rotary"},
    "layoutlm": {"max_2d_position_embeddings": 34},
    "longformer": {"attention_window": [4, 4]},
    "luke": {"entity_vocab_size": 17, "entity_emb_size": 22},
    "mobilebert": {"embedding_size": 22, "intra_bottleneck_size": 36, "true_hidden_size": 36,
                   "num_feedforward_networks": 2},
    "neomme": {"head_dim": 16},
    "perceiver": {
        "num_latents": 5, "d_latents": 44, "d_model": 48, "num_blocks": 1, "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "qk_channels": 40, "v_channels": 44,
    },
    "reformer": {
        "axial_pos_shape": [4, 16], "axial_pos_embds_dim": [20, 28], "attn_layers": ["local", "lsh"],
        "feed_forward_size": 56, "attention_head_size": 8, "lsh_attn_chunk_length": 7, "local_attn_chunk_length": 7,
        "num_buckets": 2, "num_hashes": 1, "is_decoder": False,
    },
    "rembert": {"input_embedding_size": 22, "output_embedding_size": 26},
    "roc_bert": {
        "pronunciation_vocab_size": 17, "shape_vocab_size": 19, "pronunciation_embed_dim": 22, "shape_embed_dim": 26,
    },
    "roformer": {"embedding_size": 22},
    "squeezebert": {"embedding_size": 48, "q_groups": 2, "k_groups": 2, "v_groups": 2, "post_attention_groups": 1,
                    "intermediate_groups": 2, "output_groups": 2},
    "xlm": {"emb_dim": 48},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}  # fmt: skip

RECIPES: tuple[Recipe, ...] = tuple(masked_lm(name, **OVERRIDES.get(name, {})) for name in NAMES)
