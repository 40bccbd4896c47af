"""Tiny configs of models in several parts (an encoder and a decoder, a vision tower and a language model)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from tiny.recipe import Inputs, Recipe, small

_WHOLE: dict[str, Any] = {
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 6),
    **dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads"), 6),
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 58,
    "d_kv": 8,
    "num_labels": 11,
}
"""What a field of a whole model means -> its tiny value, beside those every config has."""

_TOWER: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "dim"), 40),
    **dict.fromkeys(
        ("num_attention_heads", "num_heads", "encoder_attention_heads", "num_key_value_heads"), 5
    ),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "encoder_layers"), 2),
    **dict.fromkeys(
        ("intermediate_size", "mlp_dim", "ffn_dim", "encoder_ffn_dim", "encoder_ffn_hidden_size"), 34
    ),
}
"""The same for a tower of images or sound beside a language model: other sizes, so that a group that crosses shows."""

_PICTURE: dict[str, Any] = {"image_size": 24, "patch_size": 8, "num_mel_bins": 20, "max_source_positions": 30}


def nested(kind: str | type[Any], /, *, tower: bool = False, **overrides: Any) -> Any:
    """A config of class ``kind``, it and every config inside it shrunk by what the fields mean.

    Args:
        kind: the config class.
        tower: whether it describes a part for images or sound.
        **overrides: fields with a value of their own; for a config inside, a mapping of its overrides (or a config).
            ``...`` leaves the class's default.
    """
    kind = getattr(transformers, kind) if isinstance(kind, str) else kind
    default = kind()
    values = default.to_dict()
    fields: dict[str, Any] = {}
    for sizes in (_WHOLE, _PICTURE, _TOWER if tower else {}):
        fields |= {name: size for name, size in sizes.items() if name in values}
    lists = [name for name, value in values.items() if isinstance(value, list | tuple | dict)]
    fields |= dict.fromkeys((name for name in lists if name != "layer_types"), ...)
    for name in lists:
        if name in ("image_size", "patch_size"):
            fields[name] = [_PICTURE[name]] * len(values[name])
    fields |= _placeholders(values)
    for name, part in vars(default).items():
        if isinstance(part, transformers.PretrainedConfig):
            own = overrides.pop(name, {})
            is_tower = tower or not any(word in name for word in ("text", "decoder", "llm", "language"))
            fields[name] = nested(type(part), tower=is_tower, **own) if isinstance(own, Mapping) else own
    return small(kind, **(fields | overrides))


def _placeholders(values: Mapping[str, Any]) -> dict[str, int]:
    """Ids inside the tiny vocabulary for the tokens that stand for images and sounds."""
    own = ("pad_token_id", "bos_token_id", "eos_token_id")
    named = [name for name in values if name.endswith(("_token_id", "_token_index")) and name not in own]
    names = [name for name in named if isinstance(values[name], int) and values[name] > 90]
    return {name: 99 - place for place, name in enumerate(names)}


def of_type(name: str, /, **overrides: Any) -> Any:
    """The nested config of a model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return nested(CONFIG_MAPPING[name], **overrides)


def recipe(
    name: str,
    model: str,
    task: str,
    inputs: Callable[[nn.Module], Inputs] | None = None,
    /,
    kind: str = "",
    dtype: torch.dtype = torch.float64,
    **overrides: Any,
) -> Recipe:
    """The recipe of a class whose config has model type ``kind`` (or ``name``), shrunk with these overrides."""
    return Recipe(name, model, task, lambda: of_type(kind or name, **overrides), inputs, dtype)


def masked_lm(name: str, **overrides: Any) -> Recipe:
    """The recipe of a model type in transformers' mapping of masked language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as names

    return recipe(name, names[name], "masked-lm", **overrides)


def seq2seq(name: str, **overrides: Any) -> Recipe:
    """The recipe of a model type in transformers' mapping of sequence to sequence models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as names

    return recipe(name, names[name], "seq2seq", **overrides)
