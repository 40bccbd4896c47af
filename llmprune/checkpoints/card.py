"""The model card (README.md) of a pruned checkpoint: what it is, how to load it, what was cut, in figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

from llmprune.checkpoints.record import Compaction, Step

_OPTIONS = (
    ("ratio", "share of the parameters asked for"),
    ("kinds", "kinds of structures"),
    ("importance", "importance"),
    ("aggregation", "aggregation"),
    ("allocation", "allocation"),
    ("seed", "seed"),
    ("calibration_hash", "calibration (sha256)"),
)


def model_card(
    record: Compaction,
    parameters: int,
    form: str,
    name: str,
    auto_class: str,
    base: str = "",
    figures: Mapping[str, Any] | None = None,
) -> str:
    """The card's text.

    Args:
        record: the model's record; one without a history tells less.
        parameters: the model's parameter count, tied ones once.
        form: ``stock`` or ``universal``.
        name: the folder's name.
        auto_class: the Auto class that loads it.
        base: where the original came from; only a hub name (``owner/name``) is told.
        figures: further rows of the table: what -> value, or -> (before, after).
    """
    sizes = ("", f"{parameters:,}", "")
    if record.history:
        before = record.history[0].parameters_before
        sizes = (f"{before:,}", f"{parameters:,}", f"{(before - parameters) / before:.1%} fewer")
    remote = ", trust_remote_code=True" if form == "universal" else ""
    head = ["---", "library_name: transformers", "tags:", "- pruned", "- llmprune"]
    if _is_hub_name(base):
        head += [f"base_model: {base}", "base_model_relation: finetune"]
    lines = [
        *head,
        "---",
        "",
        f"# {name}",
        "",
        f"A {record.model_class} made smaller by structured pruning with llmprune: whole {_kinds(record)} are gone, "
        "and the matrices that are left are dense and smaller.",
        "",
        "| | before | after | |",
        "| --- | ---: | ---: | --- |",
        f"| parameters | {sizes[0]} | {sizes[1]} | {sizes[2]} |",
    ]
    for what, value in (figures or {}).items():
        pair = value if isinstance(value, tuple | list) and len(value) == 2 else ("", value)
        lines.append(f"| {what} | {_figure(pair[0])} | {_figure(pair[1])} | |")
    lines += [
        "",
        "```python",
        f"from transformers import {auto_class}",
        "",
        f'model = {auto_class}.from_pretrained("{name}"{remote})',
        "```",
        "",
    ]
    if form == "universal":
        lines += [
            "Its sizes differ from layer to layer, or in a way that no config of its class can state. "
            "`modeling_llmprune.py` builds the stock class of transformers with the sizes in `config.json` and does "
            "nothing else.",
            "",
        ]
    for number, step in enumerate(record.history, 1):
        lines += _step(step, f"Pruning {number}" if len(record.history) > 1 else "Pruning")
    lines += [
        "`llmprune.json` holds, for each parameter and buffer, which positions of the original were kept.",
        "",
    ]
    return "\n".join(lines)


def _step(step: Step, title: str) -> list[str]:
    lines = [
        f"## {title}",
        "",
        "| kind | axes | structures before | removed |",
        "| --- | ---: | ---: | ---: |",
    ]
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for axis in step.removed:
        row = totals[axis["kind"]]
        row[0], row[1], row[2] = row[0] + 1, row[1] + axis["size"], row[2] + np.shape(axis["removed"])[-1]
    lines += [f"| {kind} | {n} | {size:,} | {gone:,} |" for kind, (n, size, gone) in sorted(totals.items())]
    lines += ["", "| setting | value |", "| --- | --- |"]
    lines += [
        f"| {label} | {_figure(step.options[key])} |"
        for key, label in _OPTIONS
        if step.options.get(key) is not None
    ]
    if step.repaired:
        lines.append(f"| tensors repaired by least squares | {len(step.repaired)} |")
    lines += [f"| {package} | {version} |" for package, version in step.versions.items()]
    return [*lines, ""]


def _kinds(record: Compaction) -> str:
    kinds = sorted({axis["kind"] for step in record.history for axis in step.removed})
    return " and ".join(f"`{kind}` structures" for kind in kinds) or "structures"


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_figure(item)}" for key, item in value.items())
    if isinstance(value, tuple | list):
        return ", ".join(_figure(item) for item in value)
    return str(value).replace("|", "\\|")


def _is_hub_name(base: str) -> bool:
    parts = PurePath(base).parts
    return (
        len(parts) == 2
        and base.count("/") == 1
        and not any(part.startswith((".", "/", "~")) for part in parts)
    )
