"""The report on runs: what :func:`compose` finds in their entries, as Markdown and as one HTML page without network."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmprune.checkpoints.atomic import write_file
from llmprune.errors import InputError
from llmprune.reporting import drawings, published
from llmprune.reporting.logbook import entries
from llmprune.reporting.report import memory, quantity

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows under a heading row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A picture, the name of its file, and what it shows in words."""

    name: str
    png: bytes
    shows: str


@dataclass
class Section:
    """A heading and what stands under it."""

    title: str
    parts: list[Table | Plot | str] = field(default_factory=list)


def report(runs: Sequence[str | Path], output: str | Path) -> Path:
    """Write ``report.html`` (one file, opens from disk), ``report.md`` and its pictures into a folder.

    Args:
        runs: Folders with a ``run.json``.
        output: The folder; what else lies there stays.

    Returns:
        The path of the HTML page.

    Raises:
        InputError: a folder is no run, there is nothing to show, the output is a file, or matplotlib is missing.
    """
    drawings.check_matplotlib()
    sections = compose({_name(path): entries(path) for path in runs})
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder for the report")
    folder.mkdir(parents=True, exist_ok=True)
    for plot in (part for section in sections for part in section.parts if isinstance(part, Plot)):
        write_file(folder / f"{plot.name}.png", plot.png)
    write_file(folder / "report.md", markdown(sections).encode())
    write_file(folder / "report.html", page(sections).encode())
    return folder / "report.html"


def _name(path: str | Path) -> str:
    return Path(os.path.abspath(path)).name


def compose(runs: Mapping[str, Sequence[Entry]]) -> list[Section]:
    """Everything that the entries of these runs have to show.

    Raises:
        InputError: they hold no pruning, recovery or evaluation.
    """
    evaluations = list(_of(runs, "evaluate"))
    prunings = list(_of(runs, "prune"))
    recoveries = list(_of(runs, "recover"))
    if not (evaluations or prunings or recoveries):
        raise InputError(f"{', '.join(runs)}: nothing was pruned, recovered or evaluated there")
    return [
        section
        for section in (
            _summary(prunings, recoveries, evaluations),
            _paper(evaluations),
            _perplexities(evaluations),
            _speed(evaluations),
            _trade_offs(prunings, evaluations),
            *(_structure(name, entry) for name, entry in prunings),
            *(_curve(name, entry) for name, entry in recoveries),
            _samples(prunings, evaluations),
            _provenance(runs),
        )
        if section.parts
    ]


def _of(runs: Mapping[str, Sequence[Entry]], command: str) -> Iterator[tuple[str, Entry]]:
    """Label and entry of each run of a command; where a run has several they are numbered."""
    for run, found in runs.items():
        of_command = [entry for entry in found if entry["command"] == command]
        for number, entry in enumerate(of_command, 1):
            label = Path(entry["figures"].get("directory") or run).name
            label = run if label == run or len(of_command) == 1 else f"{run}: {label}"
            same = [
                e for e in of_command if e["figures"].get("directory") == entry["figures"].get("directory")
            ]
            yield (label if len(same) == 1 else f"{label} ({number})"), entry


# Sections ----------------------------------------------------------------------------------------------------------


def _summary(
    prunings: Sequence[tuple[str, Entry]],
    recoveries: Sequence[tuple[str, Entry]],
    evaluations: Sequence[tuple[str, Entry]],
) -> Section:
    section = Section("What was done")
    if prunings:
        rows: list[tuple[str, ...]] = []
        for label, entry in prunings:
            figures = entry["figures"]
            before, after = figures["before"], figures["after"]
            perplexity = figures.get("perplexity")
            rows.append(
                (
                    label,
                    figures["importance"],
                    f"{before['parameters']:,} → {after['parameters']:,}",
                    f"{1 - after['parameters'] / before['parameters']:.1%}",
                    f"{quantity(before['macs'])} → {quantity(after['macs'])}",
                    f"{memory(before['bytes'])} → {memory(after['bytes'])}",
                    "-" if perplexity is None else f"{perplexity['before']:.2f} → {perplexity['after']:.2f}",
                    _seconds(sum(stage["seconds"] for stage in figures["stages"])),
                )
            )
        head = (
            "pruned",
            "importance",
            "parameters",
            "removed",
            "MACs per token",
            "size",
            "perplexity",
            "time",
        )
        section.parts.append(Table(head, rows))
    if recoveries:
        learned: list[tuple[str, ...]] = []
        for label, entry in recoveries:
            figures = entry["figures"]
            checked = figures.get("validation") or {}
            learned.append(
                (
                    label,
                    figures["method"],
                    f"{figures['trained']:,}",
                    f"{figures['best_step']} of {figures['steps']}",
                    "-" if not checked else " → ".join(f"{checked[k]:.4f}" for k in ("before", "best")),
                    _seconds(sum(figures["seconds"].values())),
                )
            )
        header = ("recovered", "method", "trained parameters", "step taken", "validation loss", "time")
        section.parts.append(Table(header, learned))
    if not section.parts:
        section.parts.append(f"{len(evaluations)} evaluations.")
    return section


def _paper(evaluations: Sequence[tuple[str, Entry]]) -> Section:
    section = Section("The paper's table")
    rows = []
    for label, entry in evaluations:
        figures = entry["figures"]
        cells = [
            next((f"{v:.2f}" for n, v in figures["perplexity"].items() if key in Path(n).name.lower()), "-")
            for key in published.TEXTS
        ]
        shares = {
            name: figures["tasks"][task][metric]
            for task, metric in figures.get("chosen", {}).items()
            if (name := published.paper_task(task)) is not None
        }
        cells += [f"{100 * shares[task]:.2f}" if task in shares else "-" for task in published.TASKS]
        whole = len(shares) == len(published.TASKS)
        cells.append(f"{100 * sum(shares.values()) / len(shares):.2f}" if whole else "-")
        if any(cell != "-" for cell in cells):
            rows.append((f"**{label}**", *cells))
    if rows:
        rows += [
            (f"{name} (published)", *(f"{value:.2f}" for value in values))
            for name, values in published.LLAMA_7B.items()
        ]
        note = (
            "Perplexity on WikiText2 and PTB, accuracy in per cent on the seven tasks and their average (only "
            "where all seven were run). Rows marked published are LLaMA-7B with 20 % removed, from LLM-Pruner "
            "(NeurIPS 2023, table 1); rows in bold are these runs, of whatever model they name."
        )
        section.parts.append(Table(("", *published.COLUMNS), rows, note))
    return section


def _perplexities(evaluations: Sequence[tuple[str, Entry]]) -> Section:
    section = Section("Perplexity")
    rows = []
    for label, entry in evaluations:
        figures = entry["figures"]
        for name, value in figures["perplexity"].items():
            protocol = figures["protocol"]
            rows.append(
                (
                    label,
                    Path(name).name,
                    f"{value:.3f}",
                    f"{figures['bits_per_character'][name]:.4f}",
                    f"{protocol['window']} / {protocol['stride']}",
                )
            )
    if rows:
        head = ("model", "text", "perplexity", "bits per character", "window / stride")
        section.parts.append(Table(head, rows))
    return section


def _speed(evaluations: Sequence[tuple[str, Entry]]) -> Section:
    section = Section("Size and speed")
    rows = []
    for label, entry in evaluations:
        figures = entry["figures"]
        cells = [label, f"{figures['parameters']:,}"]
        cells.append("-" if figures.get("macs_per_token") is None else quantity(figures["macs_per_token"]))
        cells.append(memory(figures["memory"]["weights"]))
        timed = figures.get("latency")
        cells.append(memory(figures["memory"]["kv_cache"]) if "kv_cache" in figures["memory"] else "-")
        for part in ("prefill", "decode"):
            found = None if timed is None else timed.get(part)
            if found is None:
                cells.append("-")
            else:
                low, high = found["quartiles"]
                cells.append(
                    f"{1e3 * found['median']:.2f} ({1e3 * low:.2f}-{1e3 * high:.2f}), "
                    f"{found['tokens_per_second']:,.0f}/s"
                )
        rows.append(tuple(cells))
    if rows:
        head = (
            "model", "parameters", "MACs per token", "weights", "cache of the prompt",
            "prefill, ms (quartiles), tokens", "decode, ms (quartiles), tokens",
        )  # fmt: skip
        section.parts.append(Table(head, rows))
    return section


def _trade_offs(prunings: Sequence[tuple[str, Entry]], evaluations: Sequence[tuple[str, Entry]]) -> Section:
    """Perplexity against the share removed, and latency against parameters, where there are two points at least."""
    section = Section("What a size costs and brings")
    largest = max((entry["figures"]["parameters"] for _, entry in evaluations), default=0)
    series: dict[str, list[tuple[float, float]]] = {}
    for _, entry in evaluations:
        figures = entry["figures"]
        for name, value in figures["perplexity"].items():
            share = 1 - figures["parameters"] / largest
            series.setdefault(Path(name).name, []).append((share, value))
    if not series:
        for _, entry in prunings:
            figures = entry["figures"]
            if figures.get("perplexity") is not None:
                share = 1 - figures["after"]["parameters"] / figures["before"]["parameters"]
                points = series.setdefault(figures["importance"], [(0.0, figures["perplexity"]["before"])])
                points.append((share, figures["perplexity"]["after"]))
    series = {name: points for name, points in series.items() if len({x for x, _ in points}) > 1}
    if series:
        picture = drawings.lines(series, "share of parameters removed", "perplexity", percent=True)
        section.parts.append(
            Plot("perplexity", picture, "Perplexity against the share of parameters removed.")
        )
    speeds = {
        label: (
            entry["figures"]["parameters"] / 1e6,
            1e3 * (entry["figures"]["latency"]["decode"] or entry["figures"]["latency"]["prefill"])["median"],
        )
        for label, entry in evaluations
        if entry["figures"].get("latency")
    }
    if len(speeds) > 1:
        picture = drawings.scatter(speeds, "parameters, millions", "ms per token")
        section.parts.append(Plot("latency", picture, "Time per token against parameters."))
    return section


def _structure(label: str, entry: Entry) -> Section:
    """What each layer keeps, and how its scores lay."""
    section = Section(f"{label}: what each layer keeps")
    rows = [row for row in entry["figures"].get("structure", []) if row["layer"] is not None]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    if not rows:
        return section
    short = [layer.rsplit(".", 1)[-1] for layer in layers]
    if len({layer.rpartition(".")[0] for layer in layers}) > 1:
        short = layers
    kept: dict[str, list[float | None]] = {}
    for kind in kinds:
        shares: list[float | None] = []
        for layer in layers:
            here = [row for row in rows if (row["kind"], row["layer"]) == (kind, layer)]
            size = sum(row["size"] for row in here)
            shares.append(1 - sum(row["removed"] for row in here) / size if size else None)
        kept[kind] = shares
    slug = _slug(label)
    section.parts.append(
        Plot(
            f"{slug}-kept",
            drawings.heat_map(kept, short),
            f"Share that each layer of {label} keeps, by kind.",
        )
    )
    names = dict(zip(layers, short, strict=True))
    for kind in kinds:
        found = [
            (names[row["layer"]], row["scores"]) for row in rows if row["kind"] == kind and row.get("scores")
        ]
        if found:
            section.parts.append(
                Plot(
                    f"{slug}-{kind}",
                    drawings.boxes(found, f"{entry['figures']['importance']} of {kind}"),
                    f"Importance of each layer's groups of kind {kind}: median, quartiles, 5th and 95th percentile.",
                )
            )
    return section


def _curve(label: str, entry: Entry) -> Section:
    section = Section(f"{label}: recovery")
    names = {"loss": "training loss", "validation_loss": "validation loss"}
    series = {
        names[key]: [(record["step"], record[key]) for record in entry["figures"]["curve"] if key in record]
        for key in names
    }
    series = {name: points for name, points in series.items() if points}
    if series:
        picture = drawings.lines(series, "step", "loss", marked=max(map(len, series.values())) < 60)
        shows = f"Loss while {label} recovered; step {entry['figures']['best_step']} was taken."
        section.parts.append(Plot(f"{_slug(label)}-loss", picture, shows))
    return section


def _samples(prunings: Sequence[tuple[str, Entry]], evaluations: Sequence[tuple[str, Entry]]) -> Section:
    section = Section("Samples")
    for label, entry in prunings:
        sample = entry["figures"].get("generation")
        if sample:
            rows = [("before", sample["before"]), ("after", sample["after"])]
            section.parts.append(Table((label, sample["prompt"]), rows))
    for label, entry in evaluations:
        for sample in entry["figures"].get("generation", []):
            rows = [(label, sample["text"])]
            if "beside" in sample:
                rows.append(("beside", sample["beside"]))
            section.parts.append(Table(("model", sample["prompt"]), rows))
    return section


def _provenance(runs: Mapping[str, Sequence[Entry]]) -> Section:
    section = Section("How it was run")
    for run, found in runs.items():
        rows = []
        for entry in found:
            machine = entry.get("hardware", {})
            gpus = ", ".join(machine.get("gpus", []))
            data = [
                f"{name} ({(digest or 'missing')[:12]})" for name, digest in entry.get("data", {}).items()
            ]
            rows.append(
                (
                    entry.get("time", "-"),
                    f"`llmprune {entry['command']} {' '.join(entry.get('arguments', []))}`",
                    "-" if entry.get("seed") is None else str(entry["seed"]),
                    ", ".join(data) or "-",
                    ", ".join(f"{n} {v}" for n, v in entry.get("versions", {}).items()),
                    f"{machine.get('processor', '-')}, {machine.get('cores', '-')} cores"
                    + (f", {gpus}" if gpus else ""),
                    entry.get("commit") or "-",
                )
            )
        head = (run, "command", "seed", "data (sha256)", "versions", "machine", "commit")
        section.parts.append(Table(head, rows))
    return section


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in label)


# Forms -------------------------------------------------------------------------------------------------------------


def markdown(sections: Sequence[Section]) -> str:
    """The report as Markdown; pictures lie beside it."""
    lines = ["# Pruning report", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            if isinstance(part, Table):
                lines += ["| " + " | ".join(map(_cell, part.head)) + " |", "|---" * len(part.head) + "|"]
                lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in part.rows]
                lines += ["", *([part.note, ""] if part.note else [])]
            elif isinstance(part, Plot):
                lines += [f"![{part.shows}]({part.name}.png)", "", part.shows, ""]
            else:
                lines += [part, ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc }
div.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; margin: 0.8rem 0 }
th, td { border-bottom: 1px solid #e2e2e2; padding: 0.25rem 0.7rem; text-align: right; vertical-align: top }
th:first-child, td:first-child, table.words td, table.words th { text-align: left }
tr.published { color: #666 } figure { margin: 1rem 0 } img { max-width: 100% }
figcaption, p.note { color: #555; font-size: 13px }
code { font-size: 12px }
"""


def page(sections: Sequence[Section]) -> str:
    """The report as one HTML page: style and pictures are inside, nothing is fetched."""
    body = []
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        for part in section.parts:
            if isinstance(part, Table):
                body.append(_table(part))
            elif isinstance(part, Plot):
                data = base64.b64encode(part.png).decode()
                shows = html.escape(part.shows, quote=True)
                body.append(
                    f'<figure><img alt="{shows}" src="data:image/png;base64,{data}">'
                    f"<figcaption>{shows}</figcaption></figure>"
                )
            else:
                body.append(f"<p>{html.escape(part)}</p>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Pruning report</title>\n'
        '<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Pruning report</h1>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    words = any(len(cell) > 60 for row in table.rows for cell in row)
    rows = []
    for row in table.rows:
        mark = ' class="published"' if "(published)" in row[0] else ""
        rows.append(f"<tr{mark}>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>")
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    note = f'<p class="note">{_inline(table.note)}</p>' if table.note else ""
    kind = ' class="words"' if words else ""
    return (
        f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        + note
    )


def _inline(text: str) -> str:
    """Escaped; a cell that is bold or code as a whole in Markdown is so here."""
    for mark, tag in (("**", "b"), ("`", "code")):
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            return f"<{tag}>{html.escape(text[len(mark) : -len(mark)])}</{tag}>"
    return html.escape(text)
