"""A plan carried out on files: from a checkpoint folder to a pruned one, with no model in memory.

Tensors pass from shard to shard through buffers of a fixed size (:mod:`llmprune.out_of_core.stream_io`), in the dtypes
they are stored in. Everything else is what saving a pruned model does (:mod:`llmprune.checkpoints.checkpoint`): the
form is found by the same search, the files are the same byte for byte, and the folder appears whole or not at all.
Where that compares outputs, this compares recorded forward passes
(:func:`llmprune.out_of_core.outline.compare_outlines`), for which no weight is needed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from tqdm import tqdm
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from llmprune.checkpoints import record as records
from llmprune.checkpoints import universal
from llmprune.checkpoints.atomic import published
from llmprune.checkpoints.checkpoint import BESIDES, FORMS, SHARD_SIZE, Saved, Writer, fill
from llmprune.checkpoints.loading import load_tokenizer, quiet_transformers
from llmprune.checkpoints.record import Compaction
from llmprune.checkpoints.reload import stated
from llmprune.checkpoints.stock_form import Accept
from llmprune.compaction.compact import compact
from llmprune.errors import CheckpointError, InputError
from llmprune.out_of_core.lazy import Computed, Lazy, Value
from llmprune.out_of_core.outline import Outline, build, compare_outlines, load_outline
from llmprune.out_of_core.shards import INDEX, WEIGHTS, Stored, read_header
from llmprune.out_of_core.spill import Spill
from llmprune.out_of_core.stream_io import Reader, write_shard
from llmprune.planning.plan import Plan


def apply(
    plan: Plan | str | Path,
    model: str | Path,
    output: str | Path,
    overwrite: bool = False,
    *,
    form: str = "auto",
    inputs: Mapping[str, Any] | None = None,
    max_shard_size: int | str = SHARD_SIZE,
    quiet: bool | None = None,
    weights: Spill | None = None,
) -> Saved:
    """Carry a plan out on a checkpoint folder; the result is what loading, compacting and saving would write.

    No weight is loaded: memory is some buffers and the model's class on the meta device, whatever the model's size.
    What is stored in which dtype stays in it. Before anything is written, plan, checkpoint and result have been
    checked against each other; a crash, Ctrl-C or a full disk leaves nothing new behind.

    Args:
        plan: a plan, or a file that :meth:`llmprune.planning.plan.Plan.save` wrote.
        model: the checkpoint folder that the plan was made for.
        output: the folder to make; it must not exist (or be empty), unless ``overwrite``.
        overwrite: replace the checkpoint that is there.
        form: as for :func:`llmprune.save_pretrained`.
        inputs: keyword arguments of forward for the recorded passes; None makes them from the model's config.
        max_shard_size: bytes (or ``"5GB"``) after which another safetensors file begins.
        quiet: show no progress bar; None shows one on a terminal only.
        weights: new values of some parameters, in the shapes they have afterwards, as a streamed repair leaves them.

    Returns:
        :class:`llmprune.checkpoints.checkpoint.Saved`; its ``max_error`` is 0 where the recorded passes are the same.

    Raises:
        PlanError: the plan cannot be read, or was made for another model.
        CheckpointError: the checkpoint is damaged, or the output cannot be written.
        InputError: an unknown form, no size of shards, or an output that is the checkpoint itself.
    """
    if form not in FORMS:
        raise InputError(f"unknown checkpoint form {form!r}: choose one of {', '.join(FORMS)}")
    _check_size(max_shard_size)
    chosen = plan if isinstance(plan, Plan) else Plan.load(plan)
    source, target = Path(model), Path(output)
    if source.exists() and target.exists() and source.samefile(target):
        raise InputError(f"{output} is the checkpoint itself: choose another output folder")
    outline = load_outline(source)
    record, values = _compacted(outline, chosen, {} if weights is None else weights.stored)
    tokenizer = load_tokenizer(source)
    needed = sum(value.bytes for value in values.values()) + BESIDES
    with published(target, overwrite, needed) as folder:
        writer = _Streamer(
            outline.model, record.current(), folder, inputs, max_shard_size, values=values, quiet=quiet
        )
        return fill(writer, record, target, tokenizer, form)


def _check_size(size: int | str) -> None:
    try:
        split_state_dict_into_shards_factory(
            {}, get_storage_size=len, filename_pattern="{suffix}", max_shard_size=size
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"the shard size must be like 5GB or 500MB, not {size!r}") from error


def _compacted(
    outline: Outline, plan: Plan, repaired: Mapping[str, Stored]
) -> tuple[Compaction, dict[int, Value]]:
    """Compact the outline; the record, and what the tensors (by id: they stay the same objects) hold afterwards."""
    model, values = outline.model, outline.values
    scales = {scale.parameter: scale for scale in plan.rescaled}
    tensors = universal.tensors_of(model)
    compact(
        model,
        plan,
        {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in repaired.items()},
    )
    held = {}
    for name, value in values.items():
        value = value.keep(plan.kept.get(name, {}))
        if name in repaired:
            value = Value.of(repaired[name])
        if name in scales:
            value = _scaled(value, scales[name].apply)
        held[id(tensors[name])] = value
    left = {id(tensor) for tensor in universal.tensors_of(model).values()}
    return records.fresh(model), {key: value for key, value in held.items() if key in left}


def _scaled(value: Value, scale: Any) -> Value:
    return Value.of(Computed(lambda read: scale(read(value)), value.shape, value.dtype))


@dataclass
class _Streamer(Writer):
    """Writes a compacted outline: what a form's files would hold is settled first, and written last, once."""

    values: dict[int, Value] = field(default_factory=dict)
    """id of a parameter or stored buffer of the model -> what it holds."""

    stored: dict[str, Lazy] = field(default_factory=dict)
    """Name in the files -> what it will hold."""

    quiet: bool | None = None

    def proof(self) -> Accept:
        """Acceptance by comparing recorded passes."""

        def accept(kind: type[Any], config: Any) -> None:
            held = self._held(self.model.state_dict())
            twin = build(kind, self.folder, held, stated(self.model, config, kind), "the proposed config")
            compare_outlines(self.model, twin.model, self.inputs, must_run=True)

        return accept

    def finish(self) -> None:
        """Write the weights."""
        # As transformers' save_pretrained does it: what shares memory there, views of one stack, stays together.
        split = split_state_dict_into_shards_factory(
            self.stored,
            get_storage_size=lambda tensor: tensor.memory.bytes,
            get_storage_id=lambda tensor: tensor.memory,
            filename_pattern=WEIGHTS.replace(".safetensors", "{suffix}.safetensors"),
            max_shard_size=self.max_shard_size,
        )
        total = sum(tensor.value.bytes for tensor in self.stored.values())
        bar = tqdm(total=total, desc="writing", unit="B", unit_scale=True, disable=self.quiet)
        with bar, Reader() as reader:
            for file, names in split.filename_to_tensors.items():
                held = {name: self.stored[name].value for name in names}
                self.checksums[file] = write_shard(
                    self.folder / file, held, reader, {"format": "pt"}, bar.update
                )
                found = read_header(self.folder / file)
                if {n: (p.dtype, p.shape) for n, p in found.items()} != {
                    n: (v.dtype, v.shape) for n, v in held.items()
                }:
                    raise CheckpointError(f"{file} was not written as it should be: nothing was saved")
        if split.is_sharded:
            index = {
                "metadata": {"total_parameters": self.model.num_parameters(), **split.metadata},
                "weight_map": split.tensor_to_filename,
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / INDEX).write_text(text, encoding="utf-8")
        self.checksums = dict(sorted(self.checksums.items()))

    def _weights(
        self, kind: type[Any], config: Any, state: dict[str, torch.Tensor], original_format: bool
    ) -> None:
        """Settle what the files are to hold, as transformers' save_pretrained does, and write the generation config."""
        shell = copy.copy(self.model)
        shell.__class__ = kind
        shell.config = config
        try:
            with quiet_transformers():
                if shell.can_generate():
                    shell.generation_config.save_pretrained(self.folder)
                held: dict[str, Any] = {n: Lazy(value) for n, value in self._held(state, shell).items()}
                if original_format:
                    held = revert_weight_conversion(shell, held)
        except (ValueError, RuntimeError, TypeError, LookupError) as error:
            raise CheckpointError(f"transformers cannot write this {kind.__name__} ({error})") from error
        self.stored = held

    def _held(self, state: Mapping[str, torch.Tensor], shell: Any = None) -> dict[str, Value]:
        """What the tensors of a state dict hold; tied ones once, under the name that transformers keeps."""
        model = shell if shell is not None else self.model
        tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        # Which names are one tensor is read off memory: so each gets one element of it.
        memory = {id(tensor): torch.empty(1) for tensor in tensors.values()}
        ignored = set(model._keys_to_ignore_on_save or ())
        names = {name: memory[id(tensors[name])] for name in state if name not in ignored}
        with quiet_transformers():
            names = remove_tied_weights_from_state_dict(names, model)
        return {
            name: self.values.get(id(tensors[name])) or Value.of(tensors[name].detach()) for name in names
        }

    def _reload(self, kind: type[Any]) -> Any:
        """A model of class ``kind`` from what the files will hold."""
        held = {name: tensor.value for name, tensor in self.stored.items()}
        return build(kind, self.folder, held, source="what is to be written").model

    def _compared(self, twin: Any, must_run: bool = False) -> float | None:
        try:
            return compare_outlines(self.model, twin, self.inputs, must_run)
        except CheckpointError as error:
            raise CheckpointError(f"{error}: nothing was saved") from error
