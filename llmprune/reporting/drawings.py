"""The plots of a report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.errors import InputError
from llmprune.reporting.structure import QUANTILES

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#B8A800", "#882255")
"""Told apart by everybody (Okabe and Ito), and a few more."""

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Name -> points."""


def check_matplotlib() -> None:
    """Refuse, before any work, where nothing can be drawn.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "plots need matplotlib, which is not installed: pip install 'llmprune[report]'"
        ) from error


def lines(
    series: Series, x: str, y: str, *, logarithmic: bool = False, percent: bool = False, marked: bool = True
) -> bytes:
    """A curve for each series, its points in the order of x."""
    figure, plot = _figure(6.4, 3.6)
    for number, (name, points) in enumerate(series.items()):
        ordered = sorted(points)
        plot.plot(
            [p[0] for p in ordered],
            [p[1] for p in ordered],
            marker="o" if marked else None,
            markersize=4,
            color=COLOURS[number % len(COLOURS)],
            label=name,
        )
    plot.set(xlabel=x, ylabel=y)
    if logarithmic:
        plot.set_yscale("log")
    if percent:
        from matplotlib.ticker import PercentFormatter

        plot.xaxis.set_major_formatter(PercentFormatter(1.0))
    if len(series) > 1:
        plot.legend(fontsize=8)
    return _png(figure)


def scatter(points: Mapping[str, tuple[float, float]], x: str, y: str) -> bytes:
    """Named points."""
    figure, plot = _figure(6.4, 3.6)
    for number, (name, (at, value)) in enumerate(points.items()):
        plot.plot(at, value, "o", color=COLOURS[number % len(COLOURS)])
        plot.annotate(name, (at, value), textcoords="offset points", xytext=(6, 4), fontsize=8)
    plot.set(xlabel=x, ylabel=y)
    plot.margins(0.18)
    return _png(figure)


def heat_map(kept: Mapping[str, Sequence[float | None]], layers: Sequence[str]) -> bytes:
    """The share of each kind (a row) that each layer (a column) keeps; None where a layer has no such axis."""
    import numpy as np

    wide = max(5.0, 0.42 * len(layers) + 2)
    figure, plot = _figure(wide, 0.5 * len(kept) + 1.5)
    values = np.array(
        [[np.nan if share is None else share for share in row] for row in kept.values()], dtype=float
    )
    image = plot.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    plot.set_yticks(range(len(kept)), list(kept))
    step = max(1, len(layers) // 40)
    plot.set_xticks(range(0, len(layers), step), list(layers)[::step], fontsize=7)
    plot.set_xlabel("layer")
    if values.size <= 400:
        for row, column in np.ndindex(*values.shape):
            share = values[row, column]
            if share == share:
                ink = "black" if share > 0.6 else "white"
                plot.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=6, color=ink)
    figure.colorbar(image, label="kept")
    return _png(figure)


def boxes(rows: Sequence[tuple[str, Sequence[float]]], y: str) -> bytes:
    """A box for each layer: median, quartiles, and the 5th and 95th percentile, of :data:`QUANTILES`."""
    figure, plot = _figure(max(5.0, 0.32 * len(rows) + 2), 3.2)
    place = {q: i for i, q in enumerate(QUANTILES)}
    statistics: list[dict[str, Any]] = [
        {
            "label": name,
            "whislo": values[place[0.05]],
            "q1": values[place[0.25]],
            "med": values[place[0.5]],
            "q3": values[place[0.75]],
            "whishi": values[place[0.95]],
            "fliers": [],
        }
        for name, values in rows
    ]
    plot.bxp(statistics, showfliers=False, patch_artist=True, boxprops={"facecolor": COLOURS[5]})
    if min(row["whislo"] for row in statistics) > 0:
        plot.set_yscale("log")
    plot.set(xlabel="layer", ylabel=y)
    plot.tick_params(axis="x", labelsize=7)
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    plot = figure.add_subplot()
    plot.spines[["top", "right"]].set_visible(False)
    return figure, plot


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130, metadata={"Software": None})
    return out.getvalue()
