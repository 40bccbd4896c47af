"""Checkpoints: a pruned model as a folder that transformers, and what builds on it, loads.

Two forms. *Stock*: a config under which the stock class has exactly the pruned sizes; the folder is like any other.
*Universal*: the original config, what differs, and a small modeling file (:mod:`llmprune.universal`). Either way the
folder is read back and compared with the model before it appears under its name, whole (:mod:`llmprune.atomic`).
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from llmprune import universal
from llmprune.atomic import published
from llmprune.card import model_card
from llmprune.config_solver import proposals
from llmprune.errors import CheckpointError, InputError, LlmpruneError
from llmprune.loading import RECORD, from_pretrained, load_model, load_tokenizer, quiet_transformers
from llmprune.record import Compaction
from llmprune.verify import TOLERANCE, WIDER, cast, evaluating, fits, outputs_of

__all__ = ["FORMS", "Saved", "from_pretrained", "load_model", "load_tokenizer", "save_pretrained"]

log = logging.getLogger(__name__)

FORMS = ("auto", "stock", "universal")
"""``auto``: stock where a config can state the pruned sizes, universal otherwise."""

SHARD_SIZE = "5GB"
"""Largest safetensors file."""

_MAX_PROPOSALS = 3
_BESIDES = 1 << 20  # bytes allowed for everything but the weights


@dataclass(frozen=True)
class Saved:
    """What :func:`save_pretrained` wrote.

    Attributes:
        directory: the folder.
        form: ``stock`` or ``universal``.
        bytes: size of all its files.
        max_error: largest difference of the reloaded model's outputs from the model's, relative to the largest output;
            None where no input could be made and all tensors were compared instead.
    """

    directory: str
    form: str
    bytes: int
    max_error: float | None


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
    with published(directory, overwrite, sum(sizes.values()) + _BESIDES) as folder:
        writer = _Writer(model, record, folder, inputs, max_shard_size)
        if record is None:
            written, error = "stock", writer.stock(model.config)
        else:
            written, error = writer.best(form)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if record is not None:
            _write_record(folder, record, written)
            name, kind = Path(directory).resolve().name, universal.stock_class(model)
            auto = universal.auto_classes(kind, type(model.config))
            parameters = sum(p.numel() for p in model.parameters())
            source = str(model.config.name_or_path)
            text = model_card(record, parameters, written, name, max(auto, key=len), source, figures)
            (folder / "README.md").write_text(text, encoding="utf-8")
        total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Saved(str(directory), written, total, error)


@dataclass
class _Writer:
    """Writes one model into a temporary folder, in one form or the other, and reads it back."""

    model: Any
    record: Compaction | None
    folder: Path
    inputs: Mapping[str, Any] | None
    max_shard_size: int | str

    def best(self, form: str) -> tuple[str, float | None]:
        """The asked form, or the first that holds; what was written and the error of the reloaded model."""
        record = self.record
        if record is None:
            raise TypeError("only a pruned model has more than one form")
        base = universal.base_config(self.model, record)
        refused = "no config of its class states its sizes"
        if form != "universal":
            with quiet_transformers():  # odd sizes that are tried out make it talk
                for config in itertools.islice(proposals(self.model, record, base), _MAX_PROPOSALS):
                    try:
                        return "stock", self.stock(config, must_run=True)
                    except CheckpointError as error:
                        refused = str(error)
                        log.info("a config with the right sizes was given up: %s", error)
                        self.clear()
        if form == "stock":
            raise CheckpointError(
                f"the pruned model has no stock form ({refused}): save it in the universal form"
            )
        return "universal", self.universal(record, base)

    def stock(self, config: Any, must_run: bool = False) -> float | None:
        """Write the stock form with this config; the reloaded model's error."""
        kind = universal.stock_class(self.model)
        config = self._stated(config, kind)
        self._weights(kind, config, self.model.state_dict(), original_format=True)
        config.save_pretrained(self.folder)
        twin = self._reload(kind)
        return self._compare(twin, must_run)

    def universal(self, record: Compaction, base: Any) -> float | None:
        """Write the universal form; the reloaded model's error."""
        kind = universal.stock_class(self.model)
        base = self._stated(base, kind)
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
                if name not in spec["buffers"] and not _same(buffer, twin.get_buffer(name))
            ]
            if not other:
                break
            spec["buffers"] += other
            self.clear()
        return self._compare(twin)

    def clear(self) -> None:
        """Empty the temporary folder."""
        for file in self.folder.iterdir():
            file.unlink()

    def _stated(self, config: Any, kind: type[Any]) -> Any:
        """A copy of ``config`` that names the class and the dtype of the weights."""
        config = copy.deepcopy(config)
        config.architectures = [kind.__name__]
        config.dtype = str(self.model.dtype).removeprefix("torch.")
        return config

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

    def _written_class(self, kind: type[Any]) -> type[Any]:
        """The class that the modeling file in the folder defines."""
        module = ModuleType(universal.FILE.removesuffix(".py"))
        file = self.folder / universal.FILE
        exec(compile(file.read_text(encoding="utf-8"), universal.FILE, "exec"), module.__dict__)
        found: type[Any] = getattr(module, kind.__name__)
        return found

    def _reload(self, kind: type[Any]) -> Any:
        """A model of class ``kind`` from the folder, on the model's device, for the same kind of attention."""
        options = {}
        for name in ("attn_implementation", "experts_implementation"):
            chosen = getattr(self.model.config, f"_{name}", None)
            if isinstance(chosen, str):
                options[name] = chosen
        try:
            with quiet_transformers(), torch.random.fork_rng(devices=[]):
                twin, info = kind.from_pretrained(
                    self.folder,
                    dtype=self.model.dtype,
                    local_files_only=True,
                    output_loading_info=True,
                    **options,
                )
        except (OSError, ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
            raise CheckpointError(
                f"what was written does not load ({str(error)[:300]}): nothing was saved"
            ) from error
        for trouble in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if names := info.get(trouble):
                raise CheckpointError(
                    f"what was written does not load whole ({trouble}: {sorted(map(str, names))[0]}): nothing was saved"
                )
        return twin.to(self.model.device).eval()

    def _compare(self, twin: Any, must_run: bool = False) -> float | None:
        """The largest difference of outputs, relative to the largest output.

        Raises:
            CheckpointError: it is more than rounding, or a tensor differs; or with ``must_run``, no input can be made.
        """
        self._compare_tensors(twin)
        try:
            inputs = self._runnable() if self.inputs is None else dict(self.inputs)
        except LlmpruneError as error:
            if must_run:
                raise CheckpointError(f"no input to compare the outputs of two forms ({error})") from error
            log.warning("the reloaded model's outputs were not compared (its tensors were): %s", error)
            return None
        model, dtype = self.model, self.model.dtype
        if dtype in (torch.bfloat16, torch.float16) and fits(model, WIDER[dtype]):
            # Rounding of sixteen bits could hide a difference.
            dtype = WIDER[dtype]
            model, twin, inputs = copy.deepcopy(model).to(dtype), twin.to(dtype), cast(inputs, dtype)
        expected, found = _outputs(model, inputs), _outputs(twin, inputs)
        worst = 0.0
        for name, tensor in expected.items():
            other = found.get(name)
            if other is None or other.shape != tensor.shape:
                raise CheckpointError(
                    f"the reloaded model's output {name} has another shape: nothing was saved"
                )
            scale = max(1.0, float(tensor.abs().max())) if tensor.numel() else 1.0
            gap = torch.where(tensor == other, 0.0, (tensor.double() - other.double()).abs())
            worst = max(worst, float(gap.max()) / scale if tensor.numel() else 0.0)
        if not worst <= TOLERANCE.get(dtype, 1e-5):
            raise CheckpointError(
                f"the reloaded model computes something else (relative error {worst:.1e}): nothing was saved"
            )
        return worst

    def _compare_tensors(self, twin: Any) -> None:
        """Raise CheckpointError unless all stored tensors are the same, and the computed ones up to rounding."""
        mine, theirs = universal.tensors_of(self.model), universal.tensors_of(twin)
        computed = {name for name, _ in universal.non_persistent_buffers(twin)}
        for name in sorted(mine.keys() | theirs.keys()):
            same = _close if name in computed else _same
            if name not in mine or name not in theirs or not same(mine[name], theirs[name]):
                raise CheckpointError(
                    f"{name} is not the same after loading what was written: nothing was saved"
                )

    def _runnable(self) -> dict[str, Any]:
        """Inputs made from the model's config, on which it does run."""
        from llmprune.inputs import example_inputs

        inputs = example_inputs(self.model)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        _outputs(self.model, inputs)
        return inputs


def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Outputs in evaluation mode; modes and random state are put back."""
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return outputs_of(model, inputs)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"the model does not run on the inputs of the check ({error}): nothing was saved"
        ) from error


def _same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal values, in the dtype that was loaded."""
    return mine.shape == theirs.shape and torch.equal(mine.detach().to(theirs), theirs.detach())


def _close(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal up to the rounding of float32."""
    if not mine.is_floating_point():
        return _same(mine, theirs)
    return mine.shape == theirs.shape and torch.allclose(mine.double(), theirs.double(), rtol=1e-6, atol=0.0)


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


def _write_record(folder: Path, record: Compaction, form: str) -> None:
    text = json.dumps({"format": universal.FORMAT, "form": form, **record.to_json()})
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")
