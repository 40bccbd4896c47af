"""What a recipe is, how a config class is shrunk by what its fields mean, and how the model is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

TASKS = ("causal-lm", "masked-lm", "seq2seq", "vision", "speech", "multimodal")

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """One model class of transformers and how to build a tiny one.

    Attributes:
        name: row of the table.
        model: name of the class in transformers.
        task: one of :data:`TASKS`.
        config: makes the config.
        inputs: makes the forward's keyword arguments for the built model; None: llmprune's own example
            inputs, which prove that nobody needs to give any.
        dtype: float64, unless the class's own code insists on another.
    """

    name: str
    model: str
    task: str
    config: Callable[[], Any]
    inputs: Callable[[nn.Module], Inputs] | None = None
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"{self.name}: {self.task} is none of {', '.join(TASKS)}")


# What a field means -> its tiny value. Sizes differ from one another, so that two axes are never equal by accident.
_HIDDEN = 48
_HEADS = 6
_LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"}
_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), _HIDDEN),
    **dict.fromkeys(_LAYERS, 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), _HEADS
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 3),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "d_ff"), 56
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "n_ctx"), 64),
    **dict.fromkeys(("sliding_window", "window_size", "attention_chunk_size", "attention_window_size"), 16),
    # Mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 5),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 26),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 34),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    # Latent attention, and the indexer of a sparse one
    "index_topk": 4,
    "index_n_heads": 4,
    "index_head_dim": 12,
    "q_lora_rank": 18,
    "kv_lora_rank": 22,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 14,
    # State space and linear attention
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 11),
    **dict.fromkeys(("conv_kernel", "mamba_d_conv", "linear_conv_kernel_dim"), 4),
    **dict.fromkeys(("expand", "mamba_expand"), 2),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 7),
    "mamba_chunk_size": 4,
    "chunk_size": 4,
    "linear_num_heads": 3,
    "linear_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 14,
    # The rest
    "vocab_size": 101,
    "vocab_size_per_layer_input": 101,
    "hidden_size_per_layer_input": 10,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_MAX_LAYERS = 4


def small(kind: str | type[Any], /, **overrides: Any) -> Any:
    """A config of class ``kind`` (or ``transformers.<kind>``) with every field it has shrunk by what it means.

    Args:
        kind: the config class.
        **overrides: fields with a value of their own; ``...`` leaves the class's default.
    """
    kind = getattr(transformers, kind) if isinstance(kind, str) else kind
    default = kind().to_dict()
    fields = {name: value for name, value in _SIZES.items() if name in default}
    if default.get("head_dim"):
        fields["head_dim"] = 8
    if "kv_lora_rank" in default:  # latent attention: a key for every head, made of two parts
        fields["num_key_value_heads"] = _HEADS
        fields |= dict.fromkeys({"head_dim"} & default.keys(), _SIZES["qk_rope_head_dim"])
    kinds = {name: value for name, value in default.items() if name in _LISTS and value}
    if kinds:  # one layer of each kind, two at least
        unique = {name: list(dict.fromkeys(value))[:_MAX_LAYERS] for name, value in kinds.items()}
        count = max(2, *map(len, unique.values()))
        fields |= {name: value + value[-1:] * (count - len(value)) for name, value in unique.items()}
        fields |= dict.fromkeys(_LAYERS & default.keys(), count)
    fields.update(overrides)
    return kind(**{name: value for name, value in fields.items() if value is not ...})


def build(recipe: Recipe, attention: str = "eager", seed: int = 0) -> nn.Module:
    """The recipe's model on the CPU, in evaluation mode, with weights of unit scale.

    Every parameter is random, those that classes set to zero or one too: a structure that contributes nothing proves
    nothing. Tables that are not trained (sines of positions) stay as their class computes them, as it does on loading.
    """
    config = recipe.config()
    for part in _configs(config):
        part._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, recipe.model)(config)
    model = model.to(recipe.dtype).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and parameter.requires_grad:
                draws = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                scale = 0.3 if parameter.dim() > 1 else 0.2
                one = parameter.dim() == 1 and "norm" in name.lower() and name.endswith("weight")
                parameter.copy_(draws * scale + float(one))
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = (
                    0.0  # as torch has it, and as some classes set it on loading
                )
    return model


def _configs(config: Any) -> list[Any]:
    """A config and every config inside it."""
    inside = [value for value in vars(config).values() if isinstance(value, transformers.PretrainedConfig)]
    return [config, *(part for value in inside for part in _configs(value))]


def token_ids(
    generator: torch.Generator, batch: int = 2, length: int = 7, low: int = 3, high: int = 90
) -> torch.Tensor:
    """Random token ids (batch, length) that are no special tokens."""
    return torch.randint(low, high, (batch, length), generator=generator)


def causal_lm(name: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Recipe:
    """The recipe of a model type in transformers' mapping of causal language models, shrunk with these overrides."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    return Recipe(name, model, "causal-lm", lambda: small(CONFIG_MAPPING[name], **overrides), dtype=dtype)
