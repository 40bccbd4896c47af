"""GGUF, the file of llama.cpp: a checkpoint folder of the LLaMA kind written by the ``gguf`` package.

Layers that are alike go under the architecture's own name. Where they differ there are two architectures of llama.cpp
that state sizes layer by layer: ``deci``, which rotates queries and keys in neighbouring pairs as ``llama`` does (so
that their rows are put in another order than transformers', biases too), and ``openelm``, which has fused projections,
norms of queries and keys, and an embedding that is the output projection as well (Qwen3). One tensor is in memory at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmprune.checkpoints.atomic import write_whole
from llmprune.errors import InputError
from llmprune.export.vocabulary import add_vocabulary
from llmprune.out_of_core.stored import open_model, source_of

TYPES = ("f32", "f16", "q8_0")
UNIFORM = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""model_type of transformers -> architecture of llama.cpp."""
_PAIRED = ("llama", "deci")
"""Architectures that rotate neighbouring pairs; the others rotate halves, as transformers does."""
_BLOCK = 32
"""Elements of a row that q8_0 quantises together."""


@dataclass(frozen=True)
class Layer:
    """The sizes of a block, 0 where it has no attention or no feed-forward."""

    heads: int
    groups: int
    inner: int


@dataclass
class Exported:
    """What was written.

    Attributes:
        path: The file.
        architecture: Its name in llama.cpp.
        type: Of the matrices.
        wider: Matrices that are kept in float16, since their rows are no multiple of 32 elements.
        bytes: Size of the file.
    """

    path: str
    architecture: str
    type: str
    wider: list[str]
    bytes: int

    def __str__(self) -> str:
        more = (
            f"; {len(self.wider)} matrices in f16, whose rows are no multiple of {_BLOCK}"
            if self.wider
            else ""
        )
        return f"{self.path}: {self.architecture}, {self.type}, {self.bytes:,} bytes{more}"


def export_gguf(
    directory: str | Path, output: str | Path, type: str = "f16", overwrite: bool = False
) -> Exported:
    """Write a checkpoint folder as GGUF.

    Args:
        directory: A folder of a LLaMA, Mistral, Qwen2 or Qwen3 model, pruned or not, in stock or universal form, with
            its tokenizer.
        output: The file; it appears when it is whole.
        type: Of the matrices: ``f32``, ``f16`` or ``q8_0``; vectors are float32.
        overwrite: Whether it may be replaced.

    Raises:
        InputError: an unknown type, an output that exists, a model or tokenizer that llama.cpp has no form for, or
            ``gguf`` is not installed.
        CheckpointError: the folder cannot be read, or the file not written.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError("GGUF is written by the gguf package: pip install 'llmprune[gguf]'") from error
    if type not in TYPES:
        raise InputError(f"unknown GGUF type {type!r}: there are {', '.join(TYPES)}")
    target = Path(output)
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists: choose another file, or overwrite it (--overwrite)")
    model = open_model(directory)
    config = model.config
    if config.model_type not in UNIFORM:
        raise InputError(
            f"a model of type {config.model_type!r} has no GGUF form here: llama, mistral, qwen2 and qwen3 have one"
        )
    layers = [_sizes(block, config) for block in model.model.layers]
    architecture = _architecture(config, layers, model)
    wider: list[str] = []

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(str(path), architecture)
        _add_sizes(writer, config, layers, architecture, model)
        add_vocabulary(writer, Path(directory), model.get_input_embeddings().weight.shape[0])
        tensors = list(_tensors(model, layers, architecture, config))
        plan = []
        for name, shape, read in tensors:
            kind = gguf.GGMLQuantizationType.F32
            if len(shape) > 1:
                kind = getattr(gguf.GGMLQuantizationType, type.upper())
                if type == "q8_0" and shape[-1] % _BLOCK:
                    kind = gguf.GGMLQuantizationType.F16
                    wider.append(name)
            plan.append((read, kind))
            size = int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind))) if kind.name == "Q8_0" else None
            bytes_of = size or int(np.prod(shape)) * (2 if kind.name == "F16" else 4)
            dtype = np.dtype(np.float16 if kind.name == "F16" else np.float32)
            writer.add_tensor_info(name, shape, dtype, bytes_of, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for read, kind in plan:
            writer.write_tensor_data(gguf.quants.quantize(read(), kind))
        writer.close()

    write_whole(target, write)
    return Exported(str(target), architecture, type, wider, target.stat().st_size)


def _sizes(block: Any, config: Any) -> Layer:
    parameters = dict(block.named_parameters())
    head = _head_dim(config)
    q, k = (parameters.get(f"self_attn.{name}_proj.weight") for name in "qk")
    up = parameters.get("mlp.up_proj.weight")
    return Layer(
        0 if q is None else q.shape[0] // head,
        0 if k is None else k.shape[0] // head,
        0 if up is None else up.shape[0],
    )


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _architecture(config: Any, layers: list[Layer], model: Any) -> str:
    """The architecture of llama.cpp that has room for these sizes."""
    own = UNIFORM[config.model_type]
    square = layers[0].heads * _head_dim(config) == model.get_input_embeddings().weight.shape[1]
    if all(layer == layers[0] and layer.heads and layer.inner for layer in layers) and (
        square or own != "qwen2"
    ):
        return own
    if config.model_type == "qwen3":
        if not config.tie_word_embeddings:
            raise InputError(
                "llama.cpp states sizes layer by layer for a Qwen3 whose embedding is its output projection only: "
                "prune the layers alike (a ratio for each kind, protect_first and protect_last 0)"
            )
        if any(not (layer.heads and layer.inner) for layer in layers):
            raise InputError(
                "llama.cpp has no form for a Qwen3 some of whose layers have no attention or feed-forward"
            )
        return "openelm"
    return "deci"


def _add_sizes(writer: Any, config: Any, layers: list[Layer], architecture: str, model: Any) -> None:
    head = _head_dim(config)
    alike = architecture not in ("deci", "openelm")

    def sizes(values: list[int]) -> Any:
        return values[0] if alike else values

    writer.add_name(f"{config.model_type}, pruned by llmprune")
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(model.get_input_embeddings().weight.shape[1])
    writer.add_block_count(len(layers))
    writer.add_head_count(sizes([layer.heads for layer in layers]))
    writer.add_head_count_kv(sizes([layer.groups for layer in layers]))
    writer.add_feed_forward_length(sizes([layer.inner for layer in layers]))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"rotary positions of type {rope['rope_type']!r} have no GGUF form here")
    writer.add_rope_freq_base(float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))))


Read = Callable[[], np.ndarray]


def _tensors(
    model: Any, layers: list[Layer], architecture: str, config: Any
) -> Iterator[tuple[str, tuple[int, ...], Read]]:
    """Name in the file, shape, and what reads it as float32."""
    parameters = dict(model.named_parameters())
    source = source_of(model)
    assert source is not None

    def read(name: str, heads: int = 0) -> Read:
        def now() -> np.ndarray:
            value = torch.cat(list(source.parts(name, torch.float32))).numpy()
            return _paired(value, heads) if heads and architecture in _PAIRED else value

        return now

    def whole(theirs: str, ours: str, heads: int = 0) -> Iterator[tuple[str, tuple[int, ...], Read]]:
        for kind in ("weight", "bias"):
            if (name := f"{ours}.{kind}") in parameters:
                yield f"{theirs}.{kind}", tuple(parameters[name].shape), read(name, heads)

    yield from whole("token_embd", "model.embed_tokens")
    yield from whole("output_norm", "model.norm")
    if not config.tie_word_embeddings:
        yield from whole("output", "lm_head")
    for number, layer in enumerate(layers):
        theirs, ours = f"blk.{number}", f"model.layers.{number}"
        if layer.heads:
            yield from whole(f"{theirs}.attn_norm", f"{ours}.input_layernorm")
            projections = [f"{ours}.self_attn.{name}_proj" for name in "qkv"]
            if architecture == "openelm":
                names = [f"{name}.weight" for name in projections]
                rows = sum(parameters[name].shape[0] for name in names)

                def fused(names: list[str] = names) -> np.ndarray:
                    return np.concatenate([read(name)() for name in names])

                yield f"{theirs}.attn_qkv.weight", (rows, parameters[names[0]].shape[1]), fused
            else:
                for short, name, heads in zip(
                    "qkv", projections, (layer.heads, layer.groups, 0), strict=True
                ):
                    yield from whole(f"{theirs}.attn_{short}", name, heads)
            for short in "qk":
                yield from whole(f"{theirs}.attn_{short}_norm", f"{ours}.self_attn.{short}_norm")
            yield from whole(f"{theirs}.attn_output", f"{ours}.self_attn.o_proj")
        if layer.inner:
            yield from whole(f"{theirs}.ffn_norm", f"{ours}.post_attention_layernorm")
            for short in ("gate", "up", "down"):
                yield from whole(f"{theirs}.ffn_{short}", f"{ours}.mlp.{short}_proj")


def _paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys, whose halves transformers rotates together, as neighbouring pairs."""
    apart = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    together: np.ndarray = apart.swapaxes(1, 2).reshape(rows.shape)
    return together
