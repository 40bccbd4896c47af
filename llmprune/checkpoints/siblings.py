"""Other classes of transformers that compute the same model, for sizes that a class's own config cannot state.

Llama's config wants a hidden size that its heads divide; Mistral's does not, and builds the same layers. Which classes
are alike is looked up nowhere: it is found, for any class, in two steps. The sources of the classes that the same Auto
classes load are compared as text, without importing them, and ranked by the lines they share; the likeliest are then
given the same values. Whoever asks has to prove that a sibling builds the same tensors and computes the same outputs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

from llmprune.checkpoints.config_solver import REFUSALS
from llmprune.checkpoints.universal import auto_classes

log = logging.getLogger(__name__)

MAX_SIBLINGS = 8
"""Classes that are built and looked at."""

ALIKE = 0.3
"""The least share of lines that a sibling's source has in common with the class's own."""

_CONSIDERED = 16  # classes whose configs are looked at, the likeliest by their source

# What a config says about itself and not about the model.
_OWN = frozenset(
    {"model_type", "architectures", "transformers_version", "auto_map", "llmprune", "_name_or_path"}
)


def siblings(kind: type[Any], base: Any, names: Iterable[str]) -> Iterator[tuple[type[Any], Any]]:
    """Classes whose source mentions all that the names of ``kind``'s tensors consist of, each with its config.

    What a sibling's config knows and ``base`` does not is switched off (None) wherever that is allowed: a default such
    as a sliding window would change what the model computes on inputs longer than any that a check runs. A sibling in
    which a whole number of its own stays on is left out. Those with the fewest settings of their own come first, then
    those whose source is most alike.

    Args:
        kind: a model class of transformers.
        base: its config.
        names: names of its parameters and buffers.

    Yields:
        (class, ``base`` as a config of that class).
    """
    found = []
    for alike, model_type, name in _alike(kind, base, names)[:_CONSIDERED]:
        try:
            config, extra = _translated(base, CONFIG_MAPPING[model_type])
        except REFUSALS as error:
            log.debug("%s cannot state the config of %s: %s", name, kind.__name__, error)
            continue
        if config is not None:
            found.append((extra, -alike, name, config))
    found.sort(key=lambda one: one[:3])
    for _, _, name, config in found[:MAX_SIBLINGS]:
        yield getattr(transformers, name), config


def _alike(kind: type[Any], base: Any, names: Iterable[str]) -> list[tuple[float, str, str]]:
    """(share of lines in common, model type, class name) of the classes with such tensors, the most alike first."""
    own = _lines(_source(base.model_type), _prefix(kind.__name__))
    parts = {part for name in names for part in name.split(".") if not part.isdigit()} - {"weight", "bias"}
    wanted = [re.compile(rf"\bself\.{re.escape(part)}\b") for part in sorted(parts)]
    found = set()
    for automatic in auto_classes(kind, type(base)):
        mapping = getattr(getattr(modeling_auto, automatic), "_model_mapping", None)
        for model_type, entry in getattr(mapping, "_model_mapping", {}).items():
            text = "" if model_type == base.model_type else _source(model_type)
            if not text or not all(pattern.search(text) for pattern in wanted):
                continue
            for name in entry if isinstance(entry, tuple) else (entry,):
                lines = _lines(text, _prefix(name))
                alike = len(own & lines) / len(own | lines)
                if alike >= ALIKE and hasattr(transformers, name):
                    found.add((alike, model_type, name))
    return sorted(found, key=lambda one: (-one[0], one[1:]))


def _source(model_type: str) -> str:
    """The text of the modeling file of a model type; empty where there is none."""
    module = model_type_to_module_name(model_type)
    file = Path(transformers.__file__).parent / "models" / module / f"modeling_{module}.py"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _prefix(name: str) -> str:
    """What a class name begins with before it says what the class is for."""
    return re.split(r"For[A-Z]|Model|LMHead", name, maxsplit=1)[0]


def _lines(text: str, prefix: str) -> set[str]:
    """The lines of a source, with the name of the model in them replaced."""
    return {line.strip().replace(prefix, "X") for line in text.splitlines() if len(line.strip()) > 8}


def _translated(base: Any, config_class: type[Any]) -> tuple[Any | None, int]:
    """``base`` as a config of another class, and how many settings that class has of its own.

    The config is None where a whole number of the class's own stays on.
    """
    values = {name: value for name, value in base.to_dict().items() if name not in _OWN}
    known = config_class().to_dict()
    stated = {name: value for name, value in values.items() if name in known}
    extra = sorted(known.keys() - values.keys() - _OWN)
    for name in extra:
        if known[name] is None:
            continue
        try:
            config_class.from_dict({**stated, name: None})
            stated[name] = None
        except REFUSALS:
            if type(known[name]) is int:
                return None, len(extra)
    return config_class.from_dict(stated), len(extra)
