"""Checkpoints: a pruned model as a folder that transformers, and what builds on it, loads.

Two forms. *Stock*: a config under which the stock class has exactly the pruned sizes; the folder is like any other.
*Universal*: the original config, what differs, and a small modeling file (:mod:`llmprune.checkpoints.universal`).
    Either way the
folder is read back and compared with the model before it appears under its name, whole
(:mod:`llmprune.checkpoints.atomic`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from llmprune.checkpoints import universal
from llmprune.checkpoints.atomic import published
from llmprune.checkpoints.card import model_card
from llmprune.checkpoints.loading import (
    RECORD,
    from_pretrained,
    load_model,
    load_tokenizer,
    quiet_transformers,
)
from llmprune.checkpoints.record import Compaction
from llmprune.checkpoints.reload import compare, loaded, same, stated
from llmprune.checkpoints.stock_form import Accept, find, proof
from llmprune.errors import CheckpointError, InputError
from llmprune.out_of_core.shards import sha256
from llmprune.tracing.wrapped import on_uncompiled

__all__ = ["FORMS", "Saved", "from_pretrained", "load_model", "load_tokenizer", "save_pretrained"]

FORMS = ("auto", "stock", "universal")
"""``auto``: stock where a config of the model's own class can state the pruned sizes, universal otherwise. ``stock``:
also where only the config of another class can, one that computes the same (a Llama saved as a Mistral)."""

SHARD_SIZE = "5GB"
"""Largest safetensors file."""

BESIDES = 1 << 20
"""Bytes allowed for everything but the weights."""


@dataclass(frozen=True)
class Saved:
    """What :func:`save_pretrained` wrote.

    Attributes:
        directory: the folder.
        form: ``stock`` or ``universal``.
        bytes: size of all its files.
        max_error: largest difference of the reloaded model's outputs from the model's, relative to the largest output;
            None where no input could be made and all tensors were compared instead.
        reason: why the form is not ``stock``, a clause; empty where it is, or where ``universal`` was asked for.
    """

    directory: str
    form: str
    bytes: int
    max_error: float | None
    reason: str = ""


@on_uncompiled
def save_pretrained(
    model: Any,
    directory: str | Path,
    tokenizer: Any = None,
    overwrite: bool = False,
    *,
    form: str = "auto",
    inputs: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
    max_shard_size: int | str = SHARD_SIZE,
) -> Saved:
    """Write a model, pruned by :func:`llmprune.compact` or not, as a checkpoint folder.

    Before the folder gets its name, it is loaded again from what was written and must compute what ``model`` computes.
    A crash, Ctrl-C or a full disk leaves nothing new behind, and an overwritten checkpoint in place.

    Args:
        model: a transformers model.
        directory: the folder to make; it must not exist (or be empty), unless ``overwrite``.
        tokenizer: a tokenizer or processor to be saved with it.
        overwrite: replace the checkpoint that is there.
        form: one of :data:`FORMS`; a model that was not pruned is always saved in stock form.
        inputs: keyword arguments of ``model.forward`` for the comparison; None makes them from the model's config.
        figures: further rows for the model card's table: what -> value, or -> (before, after).
        max_shard_size: bytes (or ``"5GB"``) after which another safetensors file begins.

    Returns:
        :class:`Saved`.

    Raises:
        CheckpointError: the model cannot be saved, the folder exists or cannot be written, no config states the sizes
            (``form="stock"``), or what was written does not load as the same model.
        InputError: an unknown form.
    """
    if form not in FORMS:
        raise InputError(f"unknown checkpoint form {form!r}: choose one of {', '.join(FORMS)}")
    record = getattr(model, "llmprune", None)
    record = record if isinstance(record, Compaction) else None
    _check_model(model, record)
    sizes = {t.data_ptr(): t.numel() * t.element_size() for t in universal.tensors_of(model).values()}
    with published(directory, overwrite, sum(sizes.values()) + BESIDES) as folder:
        writer = Writer(model, None if record is None else record.current(), folder, inputs, max_shard_size)
        return fill(writer, record, directory, tokenizer, form, figures)


def fill(
    writer: Writer,
    record: Compaction | None,
    directory: str | Path,
    tokenizer: Any,
    form: str,
    figures: Mapping[str, Any] | None = None,
) -> Saved:
    """Have a writer write all that a checkpoint folder holds; arguments and errors as :func:`save_pretrained`."""
    model, folder = writer.model, writer.folder
    if record is None:
        try:
            written, error, reason = "stock", writer.stock(model.config), ""
        except CheckpointError as failure:
            raise CheckpointError(_unrecorded(model) or str(failure)) from failure
    else:
        written, error, reason = writer.best(form)
    writer.finish()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if record is not None:
        _write_record(folder, record, written, writer.checksums)
        name = Path(directory).resolve().name
        auto = universal.auto_classes(universal.stock_class(model), type(model.config))
        parameters = sum(p.numel() for p in model.parameters())
        source = str(model.config.name_or_path)
        text = model_card(record, parameters, written, name, max(auto, key=len), source, figures)
        (folder / "README.md").write_text(text, encoding="utf-8")
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Saved(str(directory), written, total, error, reason)


@dataclass
class Writer:
    """Writes one model into a temporary folder, in one form or the other, and reads it back."""

    model: Any
    record: Compaction | None
    folder: Path
    inputs: Mapping[str, Any] | None
    max_shard_size: int | str
    checksums: dict[str, str] = field(default_factory=dict)
    """File of weights -> its sha256, hexadecimal; once :meth:`finish` has been called."""

    def best(self, form: str) -> tuple[str, float | None, str]:
        """The asked form, or the first that holds; what was written, the reloaded model's error, and why not stock."""
        record = self.record
        if record is None:
            raise TypeError("only a pruned model has more than one form")
        base = universal.base_config(self.model, record)
        reason = ""
        if form != "universal":
            found, reason = find(self.model, record, base, self.proof(), any_class=form == "stock")
            if found is not None:
                return "stock", self.stock(found.config, found.kind, must_run=True), ""
        if form == "stock":
            raise CheckpointError(
                f"the pruned model has no stock form ({reason}): save it in the universal form"
            )
        return "universal", self.universal(record, base), reason

    def stock(self, config: Any, kind: type[Any] | None = None, must_run: bool = False) -> float | None:
        """Write the stock form with this config, for this class; the reloaded model's error."""
        kind = kind or universal.stock_class(self.model)
        config = stated(self.model, config, kind)
        self._weights(kind, config, self.model.state_dict(), original_format=True)
        config.save_pretrained(self.folder)
        twin = self._reload(kind)
        return self._compared(twin, must_run)

    def universal(self, record: Compaction, base: Any) -> float | None:
        """Write the universal form; the reloaded model's error."""
        kind = universal.stock_class(self.model)
        base = stated(self.model, base, kind)
        spec = universal.difference(self.model, record, base)
        for _ in range(2):
            stored = {name: self.model.get_buffer(name) for name in spec["buffers"]}
            self._weights(kind, base, {**self.model.state_dict(), **stored}, original_format=False)
            universal.write_config(self.folder, self.model, base, spec)
            twin = self._reload(self._written_class(kind))
            # Buffers that are computed when a model is built, but not to what the pruned model has: store them.
            other = [
                name
                for name, buffer in universal.non_persistent_buffers(self.model)
                if name not in spec["buffers"] and not same(buffer, twin.get_buffer(name))
            ]
            if not other:
                break
            spec["buffers"] += other
            self.clear()
        return self._compared(twin)

    def proof(self) -> Accept:
        """What a stock form has to stand."""
        return proof(self.model, self.inputs)

    def finish(self) -> None:
        """After the form has been settled: note what the files of weights are."""
        for file in sorted(self.folder.glob("*.safetensors")):
            self.checksums[file.name] = sha256(file)

    def clear(self) -> None:
        """Empty the temporary folder."""
        for file in self.folder.iterdir():
            file.unlink()

    def _weights(
        self, kind: type[Any], config: Any, state: dict[str, torch.Tensor], original_format: bool
    ) -> None:
        """Have transformers write the tensors and the generation config (and a config, which is written over)."""
        shell = copy.copy(self.model)  # shares the tensors; class and config are its own
        shell.__class__ = kind
        shell.config = config
        try:
            with quiet_transformers():
                shell.save_pretrained(
                    self.folder,
                    state_dict=state,
                    max_shard_size=self.max_shard_size,
                    save_original_format=original_format,
                )
        except (ValueError, RuntimeError, TypeError, LookupError) as error:
            raise CheckpointError(f"transformers cannot write this {kind.__name__} ({error})") from error

    def _compared(self, twin: Any, must_run: bool = False) -> float | None:
        """The reloaded model's error; CheckpointError if it is not the same model."""
        try:
            return compare(self.model, twin, self.inputs, must_run)
        except CheckpointError as error:
            raise CheckpointError(f"{error}: nothing was saved") from error

    def _written_class(self, kind: type[Any]) -> type[Any]:
        """The class that the modeling file in the folder defines."""
        module = ModuleType(universal.FILE.removesuffix(".py"))
        file = self.folder / universal.FILE
        exec(compile(file.read_text(encoding="utf-8"), universal.FILE, "exec"), module.__dict__)
        found: type[Any] = getattr(module, kind.__name__)
        return found

    def _reload(self, kind: type[Any]) -> Any:
        """A model of class ``kind`` from the folder, on the model's device, for the same kind of attention."""
        try:
            return loaded(self.model, kind, self.folder, local_files_only=True)
        except CheckpointError as error:
            raise CheckpointError(f"{error}: nothing was saved") from error


def _check_model(model: Any, record: Compaction | None) -> None:
    """Raise CheckpointError for a model that no folder can hold."""
    if record is not None and record.state != "complete":
        raise CheckpointError("this model was left half pruned by a compaction that failed: load it again")
    universal.stock_class(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CheckpointError("the model carries adapters: merge them before saving")
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise CheckpointError(
                f"{name} is on the meta device and has no values: load the weights before saving"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{name} is {tensor.dtype}: quantised models are not saved; prune the float model"
            )


def _unrecorded(model: Any) -> str | None:
    """What to say of a model whose sizes are not its config's though no record says that it was pruned, or None."""
    whole = universal.build_on_meta(type(model), model.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.named_parameters()}
    for name, tensor in model.named_parameters():
        if shapes.get(name, tensor.shape) != tuple(tensor.shape):
            return (
                f"{name} has shape {tuple(tensor.shape)} where the config says {shapes[name]}, and no record of a "
                "pruning says why: it was pruned inside a wrapper that has gone (merge adapters before pruning)"
            )
    return None


def _write_record(folder: Path, record: Compaction, form: str, checksums: Mapping[str, str]) -> None:
    values = {"format": universal.FORMAT, "form": form, **record.to_json(), "sha256": dict(checksums)}
    text = json.dumps(values)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")
