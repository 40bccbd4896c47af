"""Plots and cells of a sweep's results."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.errors import InputError
from llmprune.experiments.experiments import DEFAULTS, Experiment
from llmprune.reporting.drawings import COLOURS

Row = Mapping[str, Any]

MARKERS = "os^DvPX*<>"
NAMES = {
    "removed": "share of parameters removed",
    "perplexity": "perplexity",
    "latency": "time of a request, ms (128 tokens read, 32 written)",
    "samples": "calibration samples",
    "scope": "layer",
    "form": "what is removed",
}


def shown(name: str, value: Any) -> str:
    """A setting or figure as text."""
    if value is None:
        return "default" if name in DEFAULTS else "-"
    if name == "text":
        return str(value) or "own text"
    if name == "scope":
        return str(value).rpartition(".")[2] or str(value)
    if name == "latency":
        return f"{value * 1e3:.4g} ms"
    if name == "removed":
        return f"{value:.1%}"
    if name == "parameters":
        return f"{value:,}"
    if name == "perplexity":
        return f"{value:.4g}" if value < 1e4 else f"{value:.2e}"
    if isinstance(value, Mapping):
        return ", ".join(f"{share:.0%} of {kind}" for kind, share in value.items())
    if isinstance(value, (list, tuple)):
        return " + ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def differing(rows: Sequence[Row]) -> list[str]:
    """The settings that not all jobs share."""
    return [name for name in DEFAULTS if len({repr(row.get(name)) for row in rows}) > 1]


def draw(experiment: Experiment, rows: Sequence[Row], model: str) -> dict[str, bytes]:
    """File suffix (``png``, ``svg``) -> the plot: a panel for each result, a colour for each series.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "plots need matplotlib: pip install matplotlib, and run the same command again"
        ) from error

    done = [row for row in rows if "infeasible" not in row]
    style: Any = {"font.size": 11, "svg.fonttype": "none", "svg.hashsalt": "llmprune", "axes.spines.top": False,
             "axes.spines.right": False}  # fmt: skip
    with rc_context(style):
        panels = [name for name in experiment.y if any(name in row and row[name] is not None for row in done)]
        figure = Figure(figsize=(7.2 * max(1, len(panels)) + 1.5, 5.2), layout="constrained")
        for place, name in enumerate(panels, 1):
            axes = figure.add_subplot(1, len(panels), place)
            (_lines if experiment.lines else _bars)(axes, experiment, done, name)
            axes.set_ylabel(NAMES.get(name, name))
            dense = next((row["dense perplexity"] for row in done), None)
            if name == "perplexity":
                axes.set_yscale("log")
                _plain_ticks(axes)
                if dense is not None:
                    axes.axhline(dense, color="black", linewidth=1, linestyle=":", label="unpruned")
        handles: dict[str, Any] = {}
        for axes in figure.axes:
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        if handles:
            figure.legend(
                handles.values(), handles.keys(), loc="outside right center", fontsize=9, frameon=False
            )
        title = textwrap.fill(f"{experiment.question} ({model})", 78 * max(1, len(panels)))
        figure.suptitle(title, fontsize=11, x=0.02, ha="left")
        files = {}
        for suffix in ("png", "svg"):
            file = io.BytesIO()
            dateless: Any = {"Date": None} if suffix == "svg" else {}
            figure.savefig(file, format=suffix, dpi=130, metadata=dateless)
            files[suffix] = file.getvalue()
    return files


def _plain_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / max(low, 1e-9) < 1e3 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label(row: Row, names: Sequence[str]) -> str:
    form, parts = row.get("form"), []
    for name in names:
        text = shown(name, row.get(name))
        if name == "repair":
            text = {"none": "", "ls": "repaired", "one-shot": "repaired one-shot"}.get(text, text)
        if "form" in names:  # of groups their kinds are named, of other forms how elements are chosen
            if name == "form" and form == "groups" and "kinds" in names:
                continue
            if name != "form" and (
                form == "dense" or name == ("importance" if form == "groups" else "kinds")
            ):
                continue
        parts.append(text)
    return ", ".join(filter(None, parts)) or ("not repaired" if "repair" in names else "groups")


def _grouped(experiment: Experiment, rows: Sequence[Row], y: str) -> dict[str, list[tuple[Any, float]]]:
    """Series -> (x, y); several rows of one series and x (seeds) by their median."""
    series: dict[str, dict[Any, list[float]]] = {}
    varying = [name for name in experiment.series if name in differing(rows)]
    for row in rows:
        if row.get(y) is None:
            continue
        x = row.get(experiment.x)
        x = x if experiment.lines else shown(experiment.x, x)
        scale = 1e3 if y == "latency" else 1.0
        series.setdefault(_label(row, varying), {}).setdefault(x, []).append(row[y] * scale)
    return {
        label: [(x, sorted(values)[len(values) // 2]) for x, values in points.items()]
        for label, points in series.items()
    }


def _lines(axes: Any, experiment: Experiment, rows: Sequence[Row], y: str) -> None:
    for number, (label, points) in enumerate(_grouped(experiment, rows, y).items()):
        points = sorted(points)
        axes.plot(
            [x for x, _ in points],
            [value for _, value in points],
            label=label,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle=("-", "--", "-.")[number // len(COLOURS) % 3],
            markersize=5,
        )
    axes.set_xlabel(NAMES.get(experiment.x, experiment.x))
    if experiment.x == "removed":
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    elif experiment.x == "samples":
        axes.set_xscale("log")
        values = sorted({row["samples"] for row in rows})
        axes.set_xticks(values, [str(value) for value in values])
        axes.xaxis.minorticks_off()


def _bars(axes: Any, experiment: Experiment, rows: Sequence[Row], y: str) -> None:
    series = _grouped(experiment, rows, y)
    places = list(dict.fromkeys(x for points in series.values() for x, _ in points))
    width = 0.8 / max(1, len(series))
    for number, (label, points) in enumerate(series.items()):
        axes.bar(
            [places.index(x) + (number - (len(series) - 1) / 2) * width for x, _ in points],
            [value for _, value in points],
            width,
            label=label,
            color=COLOURS[number % len(COLOURS)],
        )
    axes.set_xticks(range(len(places)), places, rotation=30 if max(map(len, places), default=0) > 8 else 0)
    axes.set_xlabel(NAMES.get(experiment.x, experiment.x))
