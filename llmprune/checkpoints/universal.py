"""The universal checkpoint form: the original config, what differs, and one small modeling file beside the weights.

It holds whatever was cut, ragged layers included, and loads wherever transformers' Auto classes do
(``trust_remote_code=True``), without llmprune.
"""

from __future__ import annotations

import copy
from importlib import resources
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from llmprune.checkpoints import modeling_llmprune
from llmprune.checkpoints.record import AttributeValue, Compaction
from llmprune.errors import CheckpointError

FILE = "modeling_llmprune.py"
"""Name of the modeling file, in this package (what it says there is what a checkpoint carries) and in checkpoints."""

FORMAT = 1
"""Version of ``config.llmprune``; a reader refuses a newer one."""


def stock_class(model: nn.Module) -> type[Any]:
    """The class that transformers defines for ``model``: its own, or the one a pruned class is built on.

    Raises:
        CheckpointError: the model is none of transformers'.
    """
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.") and issubclass(kind, transformers.PreTrainedModel):
            if kind is transformers.PreTrainedModel:
                break
            return kind
    raise CheckpointError(
        f"{type(model).__name__} is no model class of transformers, so no checkpoint of it can say how to build it: "
        "save its state_dict, and its code beside it"
    )


def build_on_meta(kind: type[Any], config: Any) -> Any:
    """A model of class ``kind`` without memory for its tensors; ``config`` is copied first."""
    with torch.device("meta"):
        return kind(copy.deepcopy(config))


def base_config(model: Any, record: Compaction) -> Any:
    """A copy of the model's config with the values its class has to be built from, before anything is cut.

    Compaction changes a config that all modules share in place; those fields get their recorded values back.
    """
    config = copy.deepcopy(model.config)
    for path, original, _ in _config_changes(model, record):
        set_field(config, path, original)
    for name in ("llmprune", "auto_map"):
        if hasattr(config, name):
            delattr(config, name)
    return config


def difference(model: Any, record: Compaction, base: Any) -> dict[str, Any]:
    """What ``shrink`` of the modeling file needs to make ``model`` from the stock class and ``base``.

    Raises:
        CheckpointError: the model has other tensors than its class, or larger ones.
    """
    built = build_on_meta(stock_class(model), base)
    modeling_llmprune.drop(built, record.dropped)
    before, after = tensors_of(built), tensors_of(model)
    if odd := sorted(before.keys() ^ after.keys()):
        where = "lacks" if odd[0] in before else "has"
        raise CheckpointError(
            f"the model {where} {odd[0]}, unlike a {type(built).__name__} built from its config: merge or remove "
            "adapters and other changes before saving"
        )
    shapes = {}
    for name, tensor in after.items():
        old = tuple(before[name].shape)
        if old == tuple(tensor.shape):
            continue
        if tensor.dim() != len(old) or any(new > size for new, size in zip(tensor.shape, old, strict=True)):
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}, which is no part of the {old} that its config asks for"
            )
        shapes[name] = list(tensor.shape)
    changes = _config_changes(model, record)
    attributes: dict[str, dict[str, int | float]] = {}
    for attribute in record.attributes:
        if _config_path(model, attribute) is None and _get(built, attribute) != attribute.value:
            entry = attribute.name if attribute.index is None else f"{attribute.name}[{attribute.index}]"
            attributes.setdefault(attribute.module, {})[entry] = attribute.value
    passing = {name for name, _ in non_persistent_buffers(built)}
    # A model loaded from the universal form already stores some that its stock class computes.
    stored = shapes.keys() | model.state_dict().keys()
    return {
        "format": FORMAT,
        "shapes": shapes,
        "buffers": [name for name in after if name in passing and name in stored],
        "attributes": attributes,
        "config": [list(change) for change in changes],
        **({"dropped": record.dropped} if record.dropped else {}),
    }


def write_config(folder: Any, model: Any, base: Any, spec: dict[str, Any]) -> None:
    """Put the config and the modeling file of the universal form into ``folder``."""
    kind = stock_class(model)
    config = copy.deepcopy(base)
    config.llmprune = spec
    reference = f"{FILE.removesuffix('.py')}.{kind.__name__}"
    config.auto_map = dict.fromkeys(auto_classes(kind, type(config)), reference)
    config.save_pretrained(folder)
    (folder / FILE).write_text(source(kind), encoding="utf-8")


def source(kind: type[Any]) -> str:
    """The modeling file for a stock class: this package's, and a class statement."""
    home = "transformers" if getattr(transformers, kind.__name__, None) is kind else kind.__module__
    text = resources.files("llmprune.checkpoints").joinpath(FILE).read_text(encoding="utf-8")
    start = "import torch\nfrom torch import nn\n"
    name = kind.__name__
    return (
        text.replace(start, f"{start}from {home} import {name} as Stock\n", 1)
        + f'\n\nclass {name}(Pruned, Stock):  # type: ignore[misc]\n    """A pruned ``{name}``."""\n'
    )


def pruned_class(kind: type[Any]) -> type[Any]:
    """The class that the modeling file for ``kind`` defines, made from this package's own copy of it."""
    return type(
        kind.__name__, (modeling_llmprune.Pruned, kind), {"__doc__": f"A pruned ``{kind.__name__}``."}
    )


def auto_classes(kind: type[Any], config: type[Any]) -> list[str]:
    """Names of transformers' Auto classes that load ``kind`` for this config class; ``AutoModel`` if none does."""
    found = []
    for name, automatic in vars(modeling_auto).items():
        if not name.startswith("AutoModel") or not hasattr(transformers, name):
            continue
        mapping = getattr(automatic, "_model_mapping", None)
        if mapping is None or config not in mapping:
            continue
        kinds = mapping[config]
        if kind in (kinds if isinstance(kinds, tuple) else (kinds,)):
            found.append(name)
    usual = [name for name in found if name != "AutoModelForPreTraining"]
    return usual or found or ["AutoModel"]


def attributes_of(spec: dict[str, Any]) -> list[AttributeValue]:
    """The attributes that ``config.llmprune`` sets."""
    found = []
    for module, attributes in spec["attributes"].items():
        for entry, value in attributes.items():
            name, _, index = entry.partition("[")
            found.append(AttributeValue(module, name, int(index[:-1]) if index else None, value))
    return found


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def non_persistent_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Buffers that a state dict leaves out: they are computed anew when a model is built."""
    stored = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in stored]


def _config_changes(model: Any, record: Compaction) -> list[tuple[str, Any, Any]]:
    """Fields of the model's own config that compaction changed: (path, value before, value now)."""
    changes: dict[str, tuple[str, Any, Any]] = {}
    for attribute in record.attributes:
        path = _config_path(model, attribute)
        if path is None:
            continue
        original: Any = record.config
        for part in path.split("."):
            original = original[part]
        changes[path] = (path, original, _follow(model.config, path))
    return [change for change in changes.values() if change[1] != change[2]]


def _config_path(model: Any, attribute: AttributeValue) -> str | None:
    """Where the model's own config holds this attribute; None if a module owns it."""
    head, _, name = attribute.name.rpartition(".")
    if not head:
        return None
    owner = _follow(model.get_submodule(attribute.module), head)
    if owner is model.config:
        return name
    for inner, value in vars(model.config).items():
        if value is owner and isinstance(value, transformers.PretrainedConfig):
            return f"{inner}.{name}"
    return None


def _get(model: nn.Module, attribute: AttributeValue) -> Any:
    """The attribute's value in ``model``; None where it has none."""
    try:
        value = _follow(model.get_submodule(attribute.module), attribute.name)
        return value if attribute.index is None else value[attribute.index]
    except (AttributeError, IndexError, TypeError):
        return None


def _follow(start: Any, path: str) -> Any:
    for part in path.split("."):
        start = getattr(start, part)
    return start


def set_field(config: Any, path: str, value: Any) -> None:
    """``config.path = value`` for a dotted path."""
    head, _, name = path.rpartition(".")
    setattr(_follow(config, head) if head else config, name, value)
