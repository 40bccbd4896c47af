"""Reading checkpoint folders: every way in which one can be unusable has its own sentence."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.utils import logging as transformers_logging

from llmprune.checkpoints import adapters, universal
from llmprune.checkpoints.record import Compaction, config_snapshot
from llmprune.errors import CheckpointError
from llmprune.out_of_core.shards import DTYPES, find_tensors, is_file_name, read_json, sha256

log = logging.getLogger(__name__)

RECORD = "llmprune.json"
"""File with the record of a pruned checkpoint (:class:`llmprune.checkpoints.record.Compaction`)."""

_CONFIG = "config.json"
_FLOATS = {kind: DTYPES[kind] for kind in ("F64", "F32", "F16", "BF16")}
LOADING = (
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    AttributeError,
    ImportError,
    StrictDataclassError,
)
"""What loading with transformers may raise."""

_CHUNK = 1 << 24  # elements looked at in one go for NaN


def load_model(
    directory: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model from a checkpoint folder, pruned by llmprune or not.

    A pruned one carries its record again (``model.llmprune``), so that it can be pruned further. llmprune's own
    universal form needs no remote code: the class is built here, the modeling file in the folder is not run. An adapter
    of PEFT is merged into the base model that it names.

    Args:
        directory: a local folder with ``config.json`` and safetensors weights, or an adapter's.
        dtype: dtype of the parameters; ``auto`` takes the checkpoint's.
        attn_implementation: as in transformers' ``from_pretrained``.
        trust_remote_code: run modeling code that the folder brings along, where transformers has no such model.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        CheckpointError: the folder or a file is missing, truncated or contradicts another; weights are pickled, packed,
            quantised, missing or not finite; the model needs code that may not be run.
    """
    folder = Path(directory)
    if adapters.is_adapter(folder):
        base = load_model(
            adapters.base_folder(folder),
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        return adapters.merged(base, folder).eval()
    values = read_config(folder)
    kinds = {name: place.kind for name, place in find_tensors(folder).items()}
    kind, own = model_class(folder, values, trust_remote_code)
    # Said either way: where nothing is said, transformers asks on the terminal whether to run a folder's code.
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code and not own}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with load_errors(folder, kind), quiet_transformers(), torch.random.fork_rng(devices=[]):
        model, info = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    check_loaded(folder, model, info, kinds)
    attach_record(folder, model, own)
    return model.eval()


from_pretrained = load_model


def load_tokenizer(directory: str | Path) -> Any | None:
    """The tokenizer of a checkpoint folder; None where it has none (an adapter without one has its base model's).

    Raises:
        CheckpointError: its files cannot be read.
    """
    folder = Path(directory)
    if (
        not any(folder.glob("tokenizer*"))
        and not any(folder.glob("vocab*"))
        and not any(folder.glob("*.model"))
    ):
        return load_tokenizer(adapters.base_folder(folder)) if adapters.is_adapter(folder) else None
    try:
        with quiet_transformers():
            return transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except LOADING as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error


def check_files(directory: str | Path) -> None:
    """Raise CheckpointError where a file is not the one that a pruned folder's record describes by its sha256."""
    folder = Path(directory)
    if not (folder / RECORD).is_file():
        return
    listed = read_json(folder / RECORD).get("sha256", {})
    if not isinstance(listed, dict):
        raise CheckpointError(f"{folder / RECORD} is damaged (its sha256 is no object): copy it again")
    for name, expected in listed.items():
        if not is_file_name(name) or not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing, but {RECORD} names it: copy it again")
        if sha256(folder / name) != expected:
            raise CheckpointError(
                f"{folder / name} is not the file that was saved (another sha256 than {RECORD} says): copy it again"
            )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings from transformers inside the block: what matters is checked and raised here."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def load_errors(folder: Path, kind: type[Any]) -> Iterator[None]:
    """Turn what transformers raises while it builds or fills a model into CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except LOADING as error:
        raise CheckpointError(
            f"{folder} cannot be loaded as a {kind.__name__}: {first_line(error)}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config, as far as it speaks of what can be loaded."""
    if not folder.exists():
        raise CheckpointError(
            f"{folder} does not exist: give a local checkpoint folder (download the model first)"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: give the folder it lies in")
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {_CONFIG}: it is no checkpoint folder of transformers")
    values = read_json(folder / _CONFIG)
    quantised = values.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise CheckpointError(
            f"{folder} holds quantised weights ({method}): pruning needs them in float; load the model it was made from"
        )
    if (elsewhere := values.get("transformers_weights")) is not None:
        # transformers would read that file, which may be a pickle, in place of those that are checked here.
        raise CheckpointError(
            f"{folder / _CONFIG} names a file of weights of its own ({elsewhere!r}): remove its transformers_weights "
            "and name the file model.safetensors"
        )
    if (fetched := _fetched_code(values)) is not None:
        raise CheckpointError(
            f"{folder / _CONFIG} asks for attention code from elsewhere ({fetched}): remove its attn_implementation"
        )
    dtype = values.get("dtype", values.get("torch_dtype"))
    if isinstance(dtype, str) and dtype != "auto" and getattr(torch, dtype, None) not in _FLOATS.values():
        raise CheckpointError(
            f"{folder / _CONFIG} states dtype {dtype}: pruning needs float16, bfloat16, float32 or float64 weights"
        )
    return values


def _fetched_code(values: Any) -> str | None:
    """The repository from which a config, or one inside it, would have transformers fetch kernels; None for none."""
    pending = [values]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            for key, entry in value.items():
                if key.strip("_").startswith("attn_implementation") and "/" in str(entry):
                    return str(entry)
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return None


def model_class(folder: Path, values: dict[str, Any], trust_remote_code: bool) -> tuple[Any, bool]:
    """What to load with, and whether it is llmprune's own universal form."""
    names, remote = values.get("architectures") or [], values.get("auto_map") or {}
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
        or not isinstance(remote, dict)
    ):
        raise CheckpointError(f"{folder / _CONFIG} states architectures or an auto_map that are none")
    kind = getattr(transformers, names[0], None) if names else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        kind = None
    spec = values.get("llmprune")
    if isinstance(spec, dict):
        if not isinstance(spec.get("format", 0), int) or spec.get("format", 0) > universal.FORMAT:
            raise CheckpointError(f"{folder} was written by a newer llmprune: update llmprune")
        if kind is None:
            kind = _recorded_class(folder)
        return universal.pruned_class(kind), True
    if kind is not None:
        return kind, False
    automatic = [name for name in remote if name.startswith("AutoModel") and hasattr(transformers, name)]
    if automatic:
        if not trust_remote_code:
            raise CheckpointError(
                f"{folder} needs the code it brings along ({remote[automatic[0]]}): read that code, then allow it with "
                "trust_remote_code=True (--trust-remote-code)"
            )
        return getattr(transformers, max(automatic, key=len)), False
    if names:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no {names[0]}, which {folder} asks for"
        )
    raise CheckpointError(f"{folder / _CONFIG} names no architectures: add the model's class name")


def _recorded_class(folder: Path) -> type[Any]:
    """The stock class that the record names by its module (one that transformers does not export)."""
    data = read_json(folder / RECORD)
    home, name = str(data.get("module", "")), str(data.get("model_class", ""))
    if home.startswith("transformers."):
        try:
            found = getattr(__import__(home, fromlist=[name]), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise CheckpointError(f"transformers {transformers.__version__} has no {home}.{name}") from error
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    raise CheckpointError(f"{folder / RECORD} names {home}.{name}, which is no class of transformers")


def check_loaded(folder: Path, model: nn.Module, info: dict[str, Any], kinds: dict[str, str]) -> None:
    """Raise CheckpointError unless every parameter came from the files, in float, with finite values."""
    _check_floats(folder, model, kinds, info)
    check_keys(folder, model, info)
    _check_finite(folder, model)


def _check_floats(folder: Path, model: nn.Module, kinds: dict[str, str], info: dict[str, Any]) -> None:
    """Raise CheckpointError for parameters that are stored as integers, or that others stand for (packed weights)."""
    packed = sorted(name for name, kind in kinds.items() if kind not in _FLOATS)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wrong = next((name for name in packed if name in parameters), None)
    if wrong is not None:
        raise CheckpointError(
            f"{wrong} in {folder} holds {kinds[wrong]} values: pruning needs float weights; load the model it was "
            "made from"
        )
    missing = sorted(info.get("missing_keys", ()))
    if missing and packed:
        raise CheckpointError(
            f"{_lacking(folder, model, missing)}; {packed[0]} is {kinds[packed[0]]}: are the weights packed?"
        )


def check_keys(folder: str | Path, model: nn.Module, info: dict[str, Any]) -> None:
    """Raise CheckpointError unless every parameter came from the files, in its shape."""
    if missing := sorted(info.get("missing_keys", ())):
        raise CheckpointError(_lacking(folder, model, missing))
    if mismatched := info.get("mismatched_keys"):
        name, stored, wanted = min(mismatched)
        raise CheckpointError(
            f"{name} in {folder} has shape {tuple(stored)}, but the folder's config asks for {tuple(wanted)}: one of "
            "the two is another model's; copy both again"
        )
    if unexpected := sorted(info.get("unexpected_keys", ())):
        log.warning(
            "%s holds tensors that its model does not use: %s%s", folder, unexpected[0], _others(unexpected)
        )


def _lacking(folder: str | Path, model: nn.Module, missing: list[str]) -> str:
    return f"{folder} lacks {missing[0]}{_others(missing)} of the {type(model).__name__} its config describes"


def _check_finite(folder: Path, model: nn.Module) -> None:
    """Raise CheckpointError where a parameter holds NaN or an infinite value."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not _finite(parameter):
            kind = "NaN" if bool(torch.isnan(parameter).any()) else "infinite"
            raise CheckpointError(
                f"{name} in {folder} holds {kind} values: the checkpoint is damaged; copy it again"
            )


def _finite(tensor: torch.Tensor) -> bool:
    flat = tensor.detach().reshape(-1)
    return all(bool(torch.isfinite(flat[i : i + _CHUNK]).all()) for i in range(0, flat.numel(), _CHUNK))


def attach_record(folder: Path, model: Any, own: bool) -> None:
    """Give a pruned model its record back, and the stock class and config that a compacted model has."""
    spec: dict[str, Any] = {"config": [], "attributes": {}}
    if own:
        spec = model.config.llmprune
        model.__class__ = universal.stock_class(model)
        for name in ("llmprune", "auto_map"):
            if hasattr(model.config, name):
                delattr(model.config, name)
    if (folder / RECORD).is_file():
        try:
            record = Compaction.from_json(read_json(folder / RECORD))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{folder / RECORD} is damaged ({error!r}): copy it again") from error
    elif own:
        # Saved again by other hands, without the record: what was removed is forgotten, what is left is known.
        shapes = {name: tuple(tensor.shape) for name, tensor in universal.tensors_of(model).items()}
        attributes = universal.attributes_of(spec)
        kind = type(model)
        dropped = spec.get("dropped", {})
        record = Compaction(kind.__name__, kind.__module__, shapes, attributes=attributes, dropped=dropped)
    else:
        return
    before = copy.deepcopy(model.config)
    for path, original, _ in spec["config"]:
        universal.set_field(before, path, original)
    record.config = config_snapshot(before)
    model.llmprune = record


def _others(names: list[str]) -> str:
    return f" and {len(names) - 1} others" if len(names) > 1 else ""


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A first line that ends in a colon announces what the second says.
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])[:300]
    # The text of a LookupError is the key alone, and some errors have none.
    return (
        f"{type(error).__name__}: {text}" if isinstance(error, LookupError) else text or type(error).__name__
    )
