"""The experiments of ``llmprune sweep``: which questions there are, as lists of independent jobs, and how to show them.

A job is a plain mapping of settings; what it leaves out is :data:`DEFAULTS`. Nothing here runs anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.errors import InputError

Job = dict[str, Any]

DEFAULTS: Job = {
    "form": "groups",
    "importance": "element1",
    "aggregation": "sum",
    "ratio": 0.2,
    "kinds": ["head", "ffn"],
    "allocation": "uniform",
    "protect_first": None,
    "protect_last": None,
    "round_to": 1,
    "scope": None,
    "repair": "none",
    "seed": 0,
    "text": "",
    "samples": None,
    "length": None,
    "timed": False,
}
"""Settings of a job. ``form``: ``dense``; ``groups``; ``independent`` (each member loses the slices it needs least) and
``independent zeros`` (the same as zeros); ``zeros`` and ``2:4`` (zeros without structure, as many as ``groups`` would
remove), and these two ``on sparse kernels``. ``text``: name of a calibration text, empty for the sweep's own.
``timed``: whether a request is timed as well."""

FORMS = (
    "dense",
    "groups",
    "independent",
    "independent zeros",
    "zeros",
    "2:4",
    "zeros on sparse kernels",
    "2:4 on sparse kernels",
)
IMPORTANCES = ("random", "l1", "l2", "vector", "element1", "element2")
ACTIVATIONS = ("activation", "fluctuation", "obs")
AGGREGATIONS = ("sum", "max", "product", "last")
SEEDS = (0, 1, 2)
RATIOS = tuple(round(0.05 * step, 2) for step in range(1, 13))
SAMPLES = (1, 2, 5, 10, 20, 50)
SHARE = 0.5
"""Of a single layer's heads and channels, in the experiment ``layers``."""


@dataclass(frozen=True)
class Facts:
    """What an experiment is made for.

    Attributes:
        settings: the sweep's own settings, over :data:`DEFAULTS`.
        layers: paths of the model's layers, in order.
        texts: names of calibration texts besides the sweep's own.
    """

    settings: Mapping[str, Any]
    layers: Sequence[str] = ()
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class Experiment:
    """One question.

    Attributes:
        name: on the command line.
        question: in a sentence.
        make: the jobs for some facts.
        x: setting along the horizontal axis.
        series: settings that tell the lines, or groups of bars, apart.
        y: results that are drawn, a panel each.
        lines: whether points are joined (``x`` is a number).
    """

    name: str
    question: str
    make: Callable[[Facts], list[Job]]
    x: str
    series: tuple[str, ...] = ()
    y: tuple[str, ...] = ("perplexity",)
    lines: bool = False


def settled(job: Mapping[str, Any], facts: Facts) -> Job:
    """A job with every setting."""
    return {**DEFAULTS, **facts.settings, **job}


def _importance(facts: Facts) -> list[Job]:
    jobs: list[Job] = [{"importance": "random", "seed": seed} for seed in SEEDS]
    jobs += [
        {"importance": importance, "aggregation": aggregation}
        for importance in IMPORTANCES[1:]
        for aggregation in AGGREGATIONS
    ]
    return jobs + [{"importance": importance} for importance in ACTIVATIONS]


def _groups(facts: Facts) -> list[Job]:
    forms = ("groups", "independent", "independent zeros")
    return [{"form": form, "importance": importance} for importance in ("l2", "element1") for form in forms]


def _layers(facts: Facts) -> list[Job]:
    if not facts.layers:
        raise InputError("this model has no stack of layers on record: there is no layer to be sensitive")
    kinds = [kind for kind in facts.settings.get("kinds", DEFAULTS["kinds"]) if kind != "layer"]
    share = dict.fromkeys(kinds, SHARE)
    return [
        {"scope": path, "ratio": share, "repair": repair, "protect_first": 0, "protect_last": 0}
        for path in facts.layers
        for repair in ("none", "ls")
    ]


def _ratio(facts: Facts) -> list[Job]:
    pairs = [(importance, "none") for importance in (*IMPORTANCES, "obs")] + [
        ("element1", "ls"),
        ("obs", "ls"),
    ]
    return [
        {"importance": importance, "repair": repair, "ratio": ratio}
        for importance, repair in pairs
        for ratio in RATIOS
    ]


def _calibration(facts: Facts) -> list[Job]:
    return [
        {"samples": samples, "text": text, "repair": repair}
        for text in ("", *facts.texts)
        for repair in ("none", "ls")
        for samples in SAMPLES
        if repair == "none" or samples > 1  # a repair holds one sample out
    ]


def _repair(facts: Facts) -> list[Job]:
    return [
        {"importance": importance, "repair": repair}
        for importance in ("random", "l2", *IMPORTANCES[3:], *ACTIVATIONS)
        for repair in ("none", "one-shot", "ls")
    ]


def _structure(facts: Facts) -> list[Job]:
    loose = {"kinds": ["head", "ffn"]}
    jobs: list[Job] = [{"form": "dense"}]
    for ratio in (0.1, 0.2, 0.3):
        for kinds in (["head"], ["ffn"], ["head", "ffn"], ["channel"]):
            jobs += [{"kinds": kinds, "ratio": ratio, "repair": repair} for repair in ("none", "ls")]
        jobs.append({"kinds": ["layer"], "ratio": ratio})
        jobs += [{"form": form, "ratio": ratio, "importance": "activation", **loose} for form in FORMS[4:]]
    return [{"timed": True, **job} for job in jobs]


EXPERIMENTS = {
    one.name: one
    for one in (
        Experiment(
            "importance",
            "Which importance, and which aggregation of a group's members?",
            _importance,
            "importance",
            ("aggregation",),
        ),
        Experiment(
            "groups",
            "What are the dependency groups worth? The same number of slices, removed from each member independently",
            _groups,
            "form",
            ("importance",),
        ),
        Experiment(
            "layers",
            f"How sensitive is each layer? It alone loses {SHARE:.0%} of its heads and FFN channels",
            _layers,
            "scope",
            ("repair",),
        ),
        Experiment(
            "ratio",
            "How does quality fall with the share of parameters removed?",
            _ratio,
            "removed",
            ("importance", "repair"),
            lines=True,
        ),
        Experiment(
            "calibration",
            "How much calibration text, and of which kind?",
            _calibration,
            "samples",
            ("text", "repair"),
            lines=True,
        ),
        Experiment("repair", "What is repair worth?", _repair, "importance", ("repair",)),
        Experiment(
            "structure",
            "Heads, channels, layers or zeros, at equal parameters: quality and time on this processor",
            _structure,
            "removed",
            ("form", "kinds", "repair"),
            ("perplexity", "latency"),
            lines=True,
        ),
    )
}


def grid(axes: Sequence[str]) -> Experiment:
    """The product of ``name=value,value`` axes.

    Raises:
        InputError: an axis that is none, or a setting that there is not.
    """
    values: dict[str, list[Any]] = {}
    for axis in axes:
        name, _, given = axis.partition("=")
        name = name.strip()
        if name not in DEFAULTS or not given:
            raise InputError(
                f"{axis!r} is no axis of a grid: give NAME=VALUE,VALUE with one of {', '.join(DEFAULTS)}"
            )
        if name in values:
            raise InputError(f"the grid names {name} twice")
        values[name] = [_value(name, text.strip()) for text in given.split(",")]
    names = list(values)
    numeric = [name for name in names if all(isinstance(value, (int, float)) for value in values[name])]
    x = numeric[0] if numeric else names[0]

    def make(facts: Facts) -> list[Job]:
        return [dict(zip(names, row, strict=True)) for row in itertools.product(*values.values())]

    series = tuple(name for name in names if name != x)
    y = ("perplexity", "latency") if True in values.get("timed", ()) else ("perplexity",)
    return Experiment("grid", "Every combination of " + ", ".join(names), make, x, series, y, bool(numeric))


def _value(name: str, text: str) -> Any:
    default = DEFAULTS[name]
    if name == "kinds":
        return text.split("+")
    if name == "form" and text not in FORMS:
        raise InputError(f"unknown form {text!r}: there are {', '.join(FORMS)}")
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise InputError(f"{name} is true or false, not {text!r}")
        return text == "true"
    if isinstance(default, (int, float)) or name in ("samples", "length", "protect_first", "protect_last"):
        try:
            return float(text) if name == "ratio" else int(text)
        except ValueError:
            raise InputError(f"{name} is a number, not {text!r}") from None
    return text
