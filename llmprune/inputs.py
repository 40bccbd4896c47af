"""Example inputs for a forward pass, made from a model's own config and the names of its forward's arguments.

The values hardly matter to a trace, their kinds and sizes do: token ids that are no special tokens, images of the size
the config states, as many image tokens as the image gives features. General rules only; where none fits, ask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from llmprune.errors import InputError

BATCH = 2
LENGTH = 7  # a small prime: it divides no size by accident


def example_inputs(model: nn.Module, batch: int = BATCH, length: int = LENGTH) -> dict[str, Any]:
    """Keyword arguments for one forward pass of ``model`` (CPU tensors; global seeds play no part).

    Args:
        model: a module with a transformers-like ``config``.
        batch: sequences or images.
        length: text tokens in each sequence, beside those that stand for an image.

    Raises:
        InputError: nothing in the config or the forward's arguments says what the model takes.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise InputError(
            f"{type(model).__name__} has no config to make example inputs from; give inputs= (a dict for its forward)"
        )
    names = set(inspect.signature(model.forward).parameters)
    maker = _Maker(config, names, batch, length)
    inputs = maker.make(getattr(model, "main_input_name", "input_ids"))
    if not inputs:
        raise InputError(
            f"no rule makes example inputs for {type(model).__name__}.forward({', '.join(sorted(names))}); give inputs="
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


class _Maker:
    """The rules, over one config and one set of argument names."""

    def __init__(self, config: Any, names: set[str], batch: int, length: int) -> None:
        self.config = config
        self.names = names
        self.batch = batch
        self.length = length
        self.generator = torch.Generator().manual_seed(7)

    def make(self, main: str) -> dict[str, torch.Tensor]:
        """Inputs, beginning with the model's main one."""
        names, inputs = self.names, dict[str, torch.Tensor]()
        vision = _nested(self.config, "vision_config")
        tokens = 0
        if "pixel_values" in names and (main == "pixel_values" or vision is not None):
            tokens = self._images(inputs, self.config if vision is None else vision)
        if "input_features" in names and main == "input_features":
            inputs["input_features"] = self._spectrum()
        if "input_values" in names and main == "input_values":
            inputs["input_values"] = self._waveform()
        if "input_ids" in names and main not in ("input_features", "input_values"):
            self._text(inputs, tokens)
        if "decoder_input_ids" in names and _get(self.config, "is_encoder_decoder", default=False):
            inputs["decoder_input_ids"] = self._ids(_text_config(self.config), max(2, self.length - 2))
        return inputs

    # Text

    def _text(self, inputs: dict[str, torch.Tensor], image_tokens: int) -> None:
        text = _text_config(self.config)
        ids = self._ids(text, self.length)
        image = _get(self.config, "image_token_id", "image_token_index")
        if image_tokens and image is not None:
            block = torch.full((self.batch, image_tokens), image)
            start = _get(self.config, "vision_start_token_id")
            if start is not None:
                ids[:, 0] = start
            ids = torch.cat((ids[:, :1], block, ids[:, 1:]), dim=1)
        end = _get(text, "eos_token_id")
        usable = isinstance(end, int) and 0 <= end < _get(text, "vocab_size", default=0)
        if "pixel_values" in inputs and image is None and usable:
            ids[:, -1] = end  # two towers: the text's vector is read where it ends
        inputs["input_ids"] = ids
        if "attention_mask" in self.names:
            inputs["attention_mask"] = torch.ones_like(ids)
        if "mm_token_type_ids" in self.names and image is not None:
            inputs["mm_token_type_ids"] = (ids == image).long()
        if "bbox" in self.names:
            inputs["bbox"] = torch.zeros((*ids.shape, 4), dtype=torch.long)
        if "image_attention_mask" in self.names and "pixel_values" in inputs:
            inputs["image_attention_mask"] = torch.ones((*ids.shape, 1), dtype=torch.long)

    def _ids(self, config: Any, length: int) -> torch.Tensor:
        """Token ids that are no special tokens, (batch, length)."""
        size = _get(config, "vocab_size", default=None) or _get(self.config, "vocab_size", default=None)
        if not isinstance(size, int):
            raise InputError("the config states no vocab_size to draw token ids from; give inputs=")
        special = set(_special(self.config))
        usual = [token for token in range(min(size, 4096)) if token not in special] or [0]
        positions = _get(
            config, "max_position_embeddings", "n_positions", "max_target_positions", default=None
        )
        if isinstance(positions, int) and positions > 3:
            length = min(length, positions - 2)  # some models keep two positions for themselves
        draws = torch.randint(len(usual), (self.batch, length), generator=self.generator)
        return torch.tensor(usual)[draws]

    # Images

    def _images(self, inputs: dict[str, torch.Tensor], vision: Any) -> int:
        """Add the image arguments; how many tokens each image takes in the text."""
        if "image_grid_thw" in self.names:
            return self._patches(inputs, vision)
        channels = _get(vision, "num_channels", "in_channels", "in_chans", default=3)
        height, width = _pair(_get(vision, "image_size", default=224))
        shape: tuple[int, ...] = (self.batch, channels, height, width)
        if "image_attention_mask" in self.names:
            shape = (self.batch, 1, *shape[1:])  # interleaved: a number of images for each text
        inputs["pixel_values"] = self._floats(*shape)
        fixed = _get(self.config, "mm_tokens_per_image", default=None)
        if isinstance(fixed, int):
            return fixed
        patch = _get(vision, "patch_size", default=None)
        if patch is None:
            return int(_get(self.config, "image_seq_length", default=0) or 0)
        rows, columns = _pair(patch)
        whole = _get(self.config, "vision_feature_select_strategy", default="default") == "full"
        return (height // rows) * (width // columns) + int(whole)

    def _patches(self, inputs: dict[str, torch.Tensor], vision: Any) -> int:
        """Images of any size as rows of flattened patches with a (time, height, width) grid for each."""
        merge = int(_get(vision, "spatial_merge_size", default=1))
        patch = int(_get(vision, "patch_size", default=14))
        frames = int(_get(vision, "temporal_patch_size", default=1))
        channels = int(_get(vision, "in_channels", "in_chans", "num_channels", default=3))
        side = 2 * merge
        grid = torch.tensor([[1, side, side]] * self.batch)
        inputs["pixel_values"] = self._floats(self.batch * side * side, channels * frames * patch * patch)
        inputs["image_grid_thw"] = grid
        return 4

    # Sound

    def _spectrum(self) -> torch.Tensor:
        bins = _get(self.config, "num_mel_bins", "input_feat_per_channel", default=80)
        positions = _get(self.config, "max_source_positions", default=None)
        frames = (
            2 * positions if "decoder_input_ids" in self.names and positions and positions <= 1500 else 64
        )
        shape = (bins, frames) if _get(self.config, "num_mel_bins") is not None else (frames, bins)
        return self._floats(self.batch, *shape)

    def _waveform(self) -> torch.Tensor:
        samples = self.length
        strides = _get(self.config, "conv_stride", default=())
        kernels = _get(self.config, "conv_kernel", default=())
        for stride, kernel in zip(reversed(strides), reversed(kernels), strict=True):
            samples = (samples - 1) * stride + kernel
        return self._floats(self.batch, samples if strides else 1600)

    def _floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)


def _get(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that a config has and that is not None."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return default


def _nested(config: Any, name: str) -> Any:
    value = getattr(config, name, None)
    return value if value is not None and not isinstance(value, Mapping) else None


def _text_config(config: Any) -> Any:
    for name in ("text_config", "llm_config", "decoder"):
        nested = _nested(config, name)
        if nested is not None:
            return nested
    return config


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    return int(size[0]), int(size[-1])


def _special(config: Any) -> Iterator[int]:
    """Every token id a config or a config inside it names."""
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index", "_token_ids")):
            yield from [value] if isinstance(value, int) else [v for v in value or () if isinstance(v, int)]
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _special(value)
