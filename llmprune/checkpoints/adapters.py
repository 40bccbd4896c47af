"""Adapter folders of PEFT: a few small matrices beside a base model that lies elsewhere."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llmprune.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_folder(folder: Path) -> Path:
    """Where the base model of an adapter lies; a relative path is tried from the adapter's folder, then as it is.

    Raises:
        CheckpointError: the adapter's config cannot be read, or names no folder that is there.
    """
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        base = values["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read ({error!r}): copy it again") from error
    for place in (folder / str(base), Path(str(base))):
        if base and place.is_dir():
            return place
    raise CheckpointError(
        f"the base model {base!r} of the adapter {folder} is not there: put its folder there, or name its place as "
        f"base_model_name_or_path in {CONFIG}"
    )


def merged(model: Any, folder: Path) -> Any:
    """``model`` with the adapter of ``folder`` added to its weights, in place.

    Raises:
        CheckpointError: the extra is missing, the adapter's files cannot be read, or it belongs to another model.
    """
    try:
        import peft
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"{folder} is an adapter, and reading one needs an extra: pip install 'llmprune[recover]'"
        ) from error
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder / WEIGHTS} is missing: copy it again (pickled adapters are not read)")
    try:
        stored = load_file(folder / WEIGHTS)
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"the adapter {folder} cannot be read ({error}): copy it again") from error
    config.inference_mode = True
    config.base_model_name_or_path = None  # the base is here
    try:
        with quiet_peft():
            wrapped = peft.get_peft_model(model, config)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"the adapter {folder} belongs to another model ({_first(error)})") from error
    wanted = {name: tuple(t.shape) for name, t in peft.get_peft_model_state_dict(wrapped).items()}
    found = {name: tuple(t.shape) for name, t in stored.items()}
    if wanted != found:
        raise CheckpointError(f"the adapter {folder} belongs to another model: {_difference(found, wanted)}")
    peft.set_peft_model_state_dict(wrapped, stored)
    return wrapped.merge_and_unload()


@contextmanager
def quiet_peft() -> Iterator[None]:
    """No warnings inside the block about what PEFT calls of other libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings(
            "ignore", "fan_in_fan_out is set to"
        )  # PEFT sees GPT-2's transposed maps by itself
        yield


def _difference(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """The first thing in which an adapter and a model differ, a clause."""
    for name, shape in sorted(found.items()):
        if name not in wanted:
            return f"it has {name}, for which the base model has no place"
        if shape != wanted[name]:
            return f"its {name} has shape {shape}, and the base model asks for {wanted[name]}"
    return f"it lacks {min(set(wanted) - set(found))}, which the base model asks for"


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
