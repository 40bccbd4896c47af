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
from llmprune.tracing.towers import token_count

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
    names = _argument_names(model, config)
    maker = _Maker(model, names, batch, length)
    inputs = maker.make(getattr(model, "main_input_name", "input_ids"))
    if not inputs:
        raise InputError(
            f"no rule makes example inputs for {type(model).__name__}.forward({', '.join(sorted(names))}); give inputs="
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _argument_names(model: nn.Module, config: Any) -> set[str]:
    """Names of the forward's arguments; of a wrapper that hands all of them on, those of what it wraps."""
    for module in model.modules():
        if module is model or getattr(module, "config", None) is config:
            parameters = inspect.signature(module.forward).parameters.values()
            names = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
            if names:
                return names
    return set(inspect.signature(model.forward).parameters)


class _Maker:
    """The rules, over one model's config, its modules and a set of argument names."""

    def __init__(self, model: nn.Module, names: set[str], batch: int, length: int) -> None:
        self.model = model
        self.config: Any = model.config
        self.names = names
        self.batch = batch
        self.length = length
        self.generator = torch.Generator().manual_seed(7)

    def make(self, main: str) -> dict[str, torch.Tensor]:
        """Inputs, beginning with the model's main one."""
        names, inputs = self.names, dict[str, torch.Tensor]()
        vision = _part(self.config, "vision_config")
        joint = vision is not None or main == "pixel_values" or _is_picture(self.config)
        blocks: list[tuple[int, int]] = []
        if "pixel_values" in names and joint:
            if "qformer_input_ids" in names:  # what the image is to be read for
                inputs["qformer_input_ids"] = self._ids(_nested(self.config, "qformer_config"), self.length)
            tokens = self._images(inputs, self.config if vision is None else vision)
            image = _get(self.config, "image_token_id", "image_token_index")
            if image is not None:
                blocks.append((image, self._count("get_image_features", inputs, tokens)))
        sound = _part(self.config, "audio_config")
        if "input_features" in names and (main == "input_features" or sound is not None):
            inputs["input_features"] = self._spectrum(self.config if sound is None else sound)
            audio = _get(self.config, "audio_token_id", "audio_token_index")
            if audio is not None and main != "input_features":
                self._lengths(inputs)
                blocks.append((audio, self._count("get_audio_features", inputs, 1)))
        if "input_values" in names and main == "input_values":
            inputs["input_values"] = self._waveform()
        if "input_ids" in names and main not in ("input_features", "input_values"):
            self._text(inputs, [block for block in blocks if block[1]])
        if "decoder_input_ids" in names and _get(self.config, "is_encoder_decoder", default=False):
            inputs["decoder_input_ids"] = self._ids(_text_config(self.config), max(2, self.length - 2))
        return inputs

    def _count(self, method: str, inputs: dict[str, torch.Tensor], otherwise: int) -> int:
        """How many tokens the tower makes of each sample; what the config lets one expect where it does not say."""
        count = token_count(self.model, method, inputs, self.batch)
        return otherwise if count is None else count

    # Text

    def _text(self, inputs: dict[str, torch.Tensor], blocks: list[tuple[int, int]]) -> None:
        """Token ids, with a block of placeholders (token, count) for each image and sound, and what goes with them."""
        text = _text_config(self.config)
        ids = self._ids(text, self.length)
        start = _get(self.config, "vision_start_token_id")
        if blocks and start is not None:
            ids[:, 0] = start
        for token, count in reversed(blocks):
            ids = torch.cat((ids[:, :1], torch.full((self.batch, count), token), ids[:, 1:]), dim=1)
        image = _get(self.config, "image_token_id", "image_token_index")
        end = _get(text, "eos_token_id")
        usable = isinstance(end, int) and 0 <= end < _get(text, "vocab_size", default=0)
        if "pixel_values" in inputs and image is None and usable:
            ids[:, -1] = end  # two towers: the text's vector is read where it ends
        inputs["input_ids"] = ids
        if "attention_mask" in self.names:
            inputs["attention_mask"] = torch.ones_like(ids)
        if "mm_token_type_ids" in self.names and image is not None:
            inputs["mm_token_type_ids"] = (ids == image).long()
        if "token_type_ids" in self.names and blocks and image is not None:
            inputs["token_type_ids"] = (ids == image).long()
        if "bbox" in self.names:
            inputs["bbox"] = torch.zeros((*ids.shape, 4), dtype=torch.long)
        if "pixel_values" not in inputs:
            return
        if "image_attention_mask" in self.names:
            inputs["image_attention_mask"] = torch.ones((*ids.shape, 1), dtype=torch.long)
        if "cross_attention_mask" in self.names:  # for each text token, image and tile
            tiles = inputs["pixel_values"].shape[1:3]
            inputs["cross_attention_mask"] = torch.ones((*ids.shape, *tiles), dtype=torch.long)

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
        """Add the image arguments; how many tokens each image should take in the text."""
        if "image_grid_thw" in self.names:
            return self._patches(inputs, vision)
        if "spatial_shapes" in self.names:
            return self._rows(inputs, vision)
        channels = _get(vision, "num_channels", "in_channels", "in_chans", default=3)
        height, width = _pair(_get(vision, "image_size", default=224))
        rows, columns = _pair(_get(vision, "patch_size", default=1))
        if "image_patches" in self.names:  # no convolution cuts the image: it comes as flattened patches
            count = (height // rows) * (width // columns)
            inputs["pixel_values"] = self._floats(self.batch, count, channels * rows * columns)
            return count
        lead: tuple[int, ...] = (self.batch,)
        if "aspect_ratio_ids" in self.names:  # one image for each text, of several tiles
            tiles = int(_get(vision, "max_num_tiles", default=1))
            lead = (self.batch, 1, tiles)
            inputs["aspect_ratio_ids"] = torch.ones((self.batch, 1), dtype=torch.long)
            inputs["aspect_ratio_mask"] = torch.ones(lead, dtype=torch.long)
        elif {"image_attention_mask", "pixel_attention_mask"} & self.names:
            lead = (self.batch, 1)  # interleaved: a number of images for each text
        elif "image_sizes" in self.names and self._any_size():
            grids = _get(self.config, "image_grid_pinpoints", default=None)
            if grids is None:  # of any size
                merge = int(_get(self.config, "spatial_merge_size", default=1))
                height, width = 2 * merge * rows, 2 * merge * columns
                sizes = (height, width)
            else:  # the whole image, and the parts that a grid of views cuts it into
                sizes = min(((int(h), int(w)) for h, w in grids), key=lambda size: size[0] * size[1])
                lead = (self.batch, 1 + -(-sizes[0] // height) * -(-sizes[1] // width))
            inputs["image_sizes"] = torch.tensor([sizes] * self.batch)
        elif isinstance(frames := _get(vision, "num_frames"), int):
            lead = (self.batch, frames)
        inputs["pixel_values"] = self._floats(*lead, channels, height, width)
        fixed = _get(self.config, "mm_tokens_per_image", default=None)
        if isinstance(fixed, int):
            return fixed
        if _get(vision, "patch_size") is None:
            return int(_get(self.config, "image_seq_length", default=0) or 0)
        whole = _get(self.config, "vision_feature_select_strategy", default="default") == "full"
        return (height // rows) * (width // columns) + int(whole)

    def _rows(self, inputs: dict[str, torch.Tensor], vision: Any) -> int:
        """Images of any size as rows of flattened patches, padded, with a (height, width) for each."""
        rows, columns = _pair(_get(vision, "patch_size", default=16))
        channels = int(_get(vision, "num_channels", default=3))
        side = 2 * int(_get(self.config, "downsample_factor", default=2))
        inputs["pixel_values"] = self._floats(self.batch, side * side, channels * rows * columns)
        inputs["spatial_shapes"] = torch.tensor([[side, side]] * self.batch)
        for name in ("pixel_attention_mask", "pixel_mask"):
            if name in self.names:
                inputs[name] = torch.ones((self.batch, side * side), dtype=torch.long)
        return side * side

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

    def _spectrum(self, sound: Any) -> torch.Tensor:
        """Bins of a spectrum over time; channels first where a convolution over time takes them so."""
        names = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "input_dim")
        bins = _get(sound, *names)
        if bins is None:
            bins = _get(_nested(sound, "encoder_config") or sound, *names, default=80)
        positions = _get(sound, "max_source_positions", default=None)
        kinds = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.LayerNorm)
        first = next((m for m in self.model.modules() if isinstance(m, kinds) and _takes(m, bins)), None)
        if not isinstance(first, nn.Conv1d) or _get(sound, "num_mel_bins") is None:
            return self._floats(self.batch, 64, bins)
        frames = 2 * positions if positions and positions <= 1500 else 64
        return self._floats(self.batch, bins, frames)

    def _lengths(self, inputs: dict[str, torch.Tensor]) -> None:
        """Masks of a sound that fills its frames."""
        frames = max(inputs["input_features"].shape[1:])
        for name in ("feature_attention_mask", "input_features_mask"):
            if name in self.names:
                inputs[name] = torch.ones((self.batch, frames), dtype=torch.long)

    def _waveform(self) -> torch.Tensor:
        bins, frames = _get(self.config, "num_mel_bins"), _get(self.config, "max_length")
        if bins is not None and isinstance(frames, int) and not hasattr(self.config, "conv_stride"):
            return self._floats(self.batch, frames, bins)  # a picture of the sound
        samples = self.length
        strides = _get(self.config, "conv_stride", default=())
        kernels = _get(self.config, "conv_kernel", default=())
        for stride, kernel in zip(reversed(strides), reversed(kernels), strict=True):
            samples = (samples - 1) * stride + kernel
        return self._floats(self.batch, samples if strides else 1600)

    def _any_size(self) -> bool:
        """Whether images may be of other sizes than the tower's own; where they may not, their sizes are not asked."""
        return _get(self.config, "image_grid_pinpoints", "spatial_merge_size") is not None

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


def _is_picture(config: Any) -> bool:
    """Whether a config without parts describes images beside its text."""
    return _get(config, "image_size") is not None and _get(config, "patch_size") is not None


def _part(config: Any, name: str) -> Any:
    """The config of a part: under its name, or an encoder that is described as that part is."""
    part = _nested(config, name)
    encoder = _nested(config, "encoder")
    mark = "image_size" if name == "vision_config" else "num_mel_bins"
    return encoder if part is None and hasattr(encoder, mark) else part


def _takes(module: nn.Module, bins: int) -> bool:
    """Whether a layer's input is a spectrum of so many bins."""
    for name in ("in_channels", "in_features", "normalized_shape"):
        size = getattr(module, name, None)
        if size is not None:
            return bool(size == bins or size == (bins,) or (name == "in_channels" and size == 1))
    return False


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
