"""A checkpoint's model without its weights: its class on the meta device, and what each of its tensors would hold."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from llmprune.checkpoints import universal
from llmprune.checkpoints.loading import (
    LOADING,
    attach_record,
    check_keys,
    first_line,
    model_class,
    quiet_transformers,
    read_config,
)
from llmprune.checkpoints.reload import close, same
from llmprune.errors import CheckpointError, LlmpruneError
from llmprune.out_of_core.lazy import Lazy, Value
from llmprune.out_of_core.shards import find_tensors
from llmprune.out_of_core.stream_io import Reader
from llmprune.tracing.borrow import substitute_tensors
from llmprune.tracing.recording import Recording, Setup
from llmprune.tracing.trace import bind_inputs

log = logging.getLogger(__name__)

SMALL = 1 << 20
"""Elements of a buffer up to which its values are read: a forward pass may ask for them."""


@dataclass
class Outline:
    """A model whose parameters are on the meta device.

    Attributes:
        model: as :func:`llmprune.checkpoints.loading.load_model` would give it, on the meta device; what its class
            computes when it is built, and small stored buffers, are real.
        values: parameter or stored buffer (canonical name, tied ones once) -> what it holds.
    """

    model: Any
    values: dict[str, Value]


def load_outline(directory: str | Path) -> Outline:
    """The model of a checkpoint folder, pruned by llmprune or not, without its weights.

    transformers loads it as always, from tensors that are none (:class:`llmprune.out_of_core.lazy.Lazy`), so that
    names, experts and projections end up where they belong and nothing is known of them here.

    Raises:
        CheckpointError: as :func:`llmprune.checkpoints.loading.load_model`, values that are not finite excepted (none
            is read).
    """
    folder = Path(directory)
    settings = read_config(folder)
    tensors = find_tensors(folder)
    kind, own = model_class(folder, settings, False)
    outline = build(kind, folder, {name: Value.of(place) for name, place in tensors.items()})
    attach_record(folder, outline.model, own)
    return outline


def build(
    kind: type[Any], folder: Path, tensors: Mapping[str, Value], config: Any = None, source: Any = None
) -> Outline:
    """A model of class ``kind`` from stored tensors.

    Args:
        kind: the class.
        folder: where its config and generation config lie.
        tensors: name in the files -> what it holds.
        config: the config, where it is not that of the folder.
        source: what an error calls the place; None: the folder.

    Raises:
        CheckpointError: the tensors are not those of the class with that config.
    """
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            if config is None:
                config = kind.config_class.from_pretrained(folder, local_files_only=True)
            model, info = kind.from_pretrained(
                None,
                config=config,
                state_dict={name: Lazy(value) for name, value in tensors.items()},
                dtype="auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
            model.config.name_or_path = model.name_or_path = str(folder)
            _generation(model, folder)
    except LOADING as error:
        raise CheckpointError(
            f"{source or folder} cannot be loaded as a {kind.__name__}: {first_line(error)}"
        ) from error
    check_keys(source or folder, model, info)
    values = {name: t.value for name, t in universal.tensors_of(model).items() if isinstance(t, Lazy)}
    plain: dict[int, torch.Tensor] = {}
    held = []  # ids are of these

    def undressed(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, Lazy):
            return tensor
        held.append(tensor)
        if id(tensor) not in plain:
            twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            elif tensor.numel() <= SMALL:
                with Reader() as reader:
                    twin = reader.tensor(tensor.value).to(tensor.dtype)
            plain[id(tensor)] = twin
        return plain[id(tensor)]

    substitute_tensors(model, undressed)
    return Outline(model.eval(), values)


def _generation(model: Any, folder: Path) -> None:
    """The generation config as from_pretrained takes it from the folder."""
    if not model.can_generate():
        return
    read = transformers.GenerationConfig.from_pretrained
    try:
        model.generation_config = read(folder, local_files_only=True)
    except OSError:
        if (folder / "config.json").is_file():
            model.generation_config = read(
                folder, config_file_name="config.json", _from_model_config=True, local_files_only=True
            )


def compare_outlines(
    model: nn.Module, twin: nn.Module, inputs: Mapping[str, Any] | None = None, must_run: bool = False
) -> float | None:
    """Refuse ``twin`` unless it computes what ``model`` computes, both without weights.

    Tensors must have the same names, shapes and (where they are computed from the config) values. A forward pass of
    each is recorded; the two must be the same operations on the same tensors with the same numbers, in order.

    Returns:
        0.0; or None where no forward pass could be recorded, and only the tensors were compared.

    Raises:
        CheckpointError: they differ; or with ``must_run``, no forward pass can be recorded.
    """
    mine, theirs = universal.tensors_of(model), universal.tensors_of(twin)
    for name in sorted(mine.keys() | theirs.keys()):
        one, other = mine.get(name), theirs.get(name)
        if one is None or other is None or one.shape != other.shape:
            raise CheckpointError(f"{name} is not the same after loading")
        if not one.is_meta and not other.is_meta and not same(one, other) and not close(one, other):
            raise CheckpointError(
                f"{name} is computed from the config and comes out otherwise than in the pruned model"
            )
    try:
        keywords = bind_inputs(model, None if inputs is None else dict(inputs))
        recordings = [Recording(one, dict(keywords), Setup()) for one in (model, twin)]
        first, second = (recording.run() for recording in recordings)
    except LlmpruneError as error:
        if must_run:
            raise CheckpointError(f"no forward pass to compare two forms by ({error})") from error
        log.warning("what the written model computes was not compared (its tensors were): %s", error)
        return None
    if len(first.ops) != len(second.ops):
        raise CheckpointError(
            f"the written model computes something else ({len(second.ops)} operations instead of {len(first.ops)})"
        )
    for expected, found in zip(first.ops, second.ops, strict=True):
        if expected[:4] != found[:4]:
            raise CheckpointError(
                f"the written model computes something else ({found[0]} in {second.scopes[found[4]] or 'the root'})"
            )
    constants, others = (recording.recorder.constants() for recording in recordings)
    known = constants.keys() == others.keys() and all(
        _equal(value, others[key]) for key, value in constants.items()
    )
    if first.tensors != second.tensors or first.outputs != second.outputs or not known:
        raise CheckpointError("the written model computes something else (its operations take other tensors)")
    return 0.0


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two values are known and the same."""
    return one is not None and other is not None and same(one, other)
