"""The paper's tables on given weights and data: every importance, with and without tuning, and two experiments."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmprune.checkpoints.atomic import write_file
from llmprune.errors import InputError
from llmprune.evaluation.zeroshot import PAPER
from llmprune.pipeline.stages import Stages
from llmprune.reporting.drawings import check_matplotlib
from llmprune.reporting.logbook import record
from llmprune.reporting.pages import report
from llmprune.reporting.published import LLAMA_7B

RATIO = 0.2
"""Share of the parameters that goes (the paper's tables)."""

SAMPLES, LENGTH = 10, 64
"""Calibration: samples and tokens of each (the paper's code)."""

AMOUNTS = (1000, 2000, 4000, 8000, 16000, 32000)
"""Rows of the recovery data in the experiment on their amount, besides all."""


@dataclass(frozen=True)
class Row:
    """One row of the table: what is pruned how, and whether it is tuned."""

    name: str
    importance: str | None = None
    kinds: tuple[str, ...] = ("head", "ffn")
    tuned: bool = False


ROWS = (
    Row("dense"),
    Row("l2", "l2"),
    Row("random", "random"),
    Row("channel", "element1", ("channel",)),
    Row("vector", "vector"),
    Row("element2", "element2"),
    Row("element1", "element1"),
    Row("channel tuned", "element1", ("channel",), True),
    Row("vector tuned", "vector", tuned=True),
    Row("element2 tuned", "element2", tuned=True),
    Row("element1 tuned", "element1", tuned=True),
)
"""The rows of the paper's table of LLaMA-7B. ``channel`` takes hidden channels, scored by element1."""

Published = Mapping[str, tuple[float | None, float | None, float | None]]

PRESETS: dict[str, tuple[str, Published]] = {
    "llama-7b": (
        "LLaMA-7B",
        {
            name.lower().replace(",", ""): (values[0], values[1], values[-1])
            for name, values in LLAMA_7B.items()
        },
    ),
    "llama-13b": (
        "LLaMA-13B",
        {
            "dense": (11.58, 20.24, 64.97),
            "l2": (61.15, 91.43, 51.08),
            "random": (19.24, 31.84, 57.09),
            "channel": (49.03, 106.48, 50.29),
            "element1": (16.01, 29.28, 61.79),
            "element1 tuned": (15.18, 28.08, 64.02),
        },
    ),
    "vicuna-7b": (
        "Vicuna-7B",
        {
            "dense": (16.11, 61.37, 62.78),
            "l2": (3539.98, 5882.21, None),
            "vector": (27.03, 92.51, None),
            "element2": (24.70, 94.34, 56.83),
            "element1": (25.74, 92.88, 56.25),
            "element1 tuned": (19.69, 78.25, 57.71),
        },
    ),
    "chatglm-6b": ("ChatGLM-6B", {}),
}
"""Name -> the model, and what the paper (arXiv:2305.11627) gives: row -> perplexity on WikiText2 and PTB, mean accuracy
in per cent. LLaMA-13B's "block" rows stand beside element1, whose kinds these are."""


@dataclass(frozen=True)
class Sources:
    """Where the data lie.

    Attributes:
        calibration: text/books.jsonl: what groups are scored on (the paper: BookCorpus).
        texts: heading -> text to measure perplexity on.
        instruct: records to recover on.
        tasks: folder of task files, or None: lm-eval's own, from its cache or the network.
        names: tasks of lm-eval, the paper's seven.
    """

    calibration: Path
    texts: dict[str, Path]
    instruct: Path
    tasks: Path | None
    names: tuple[str, ...]

    @classmethod
    def find(cls, data: str | Path) -> Sources:
        """Look through a data folder.

        Raises:
            InputError: something is not there; the message says what is looked for.
        """
        data = Path(data)

        def one(*patterns: str) -> Path:
            found = [path for pattern in patterns for path in sorted(data.glob(pattern))]
            if not found:
                raise InputError(f"{data} has no {' or '.join(patterns)}: the tables need it")
            return found[0]

        folder = data / "zeroshot"
        local = tuple(f"{name}_local" for name in PAPER)
        mine = folder.is_dir() and all((folder / f"{name}.yaml").is_file() for name in local)
        return cls(
            calibration=one("text/books.jsonl", "text/*book*.jsonl", "text/*book*.txt"),
            texts={
                "WikiText2": one("text/*wiki*test*.txt", "text/*wiki*.txt"),
                "PTB": one("text/*ptb*test*.txt", "text/*ptb*.txt"),
            },
            instruct=one("instruct/*.json", "instruct/*.jsonl"),
            tasks=folder if mine else None,
            names=local if mine else tuple(PAPER),
        )


@dataclass
class Reproduction:
    """What :func:`reproduce` measured; printed it is the table.

    Attributes:
        preset: its name.
        rows: name -> what :func:`llmprune.evaluate` found, with ``pruning`` and ``recovery`` beside it.
        steps: the experiment on recovery steps: one mapping per validation; empty if it was left out.
        amounts: the experiment on the amount of data: one mapping per amount; empty if it was left out.
        output: the folder.
    """

    preset: str
    rows: dict[str, dict[str, Any]]
    output: str
    steps: list[dict[str, float]] = field(default_factory=list)
    amounts: list[dict[str, float]] = field(default_factory=list)

    def table(self) -> list[list[str]]:
        """Heading and rows, measured figures beside the published ones (those in parentheses)."""
        title, published = PRESETS[self.preset]
        names = list(dict.fromkeys(t for row in self.rows.values() for t in row["evaluation"]["tasks"]))
        texts = list(dict.fromkeys(t for row in self.rows.values() for t in row["evaluation"]["perplexity"]))
        out = [[title, "parameters", *texts, *(name.removesuffix("_local") for name in names), "average"]]
        for name, row in self.rows.items():
            found, paper = row["evaluation"], published.get(name, (None, None, None))
            cells = [name, f"{found['parameters']:,}"]
            for text, given in zip(texts, (*paper[:2], *[None] * len(texts)), strict=False):
                cells.append(_beside(f"{found['perplexity'][text]:.2f}", given))
            for task in names:
                metric = found["chosen"].get(task)
                cells.append("" if metric is None else f"{100 * found['tasks'][task][metric]:.2f}")
            average = found["average"]
            cells.append(_beside("" if average is None else f"{100 * average:.2f}", paper[2]))
            out.append(cells)
        return out

    def __str__(self) -> str:
        from llmprune.reporting.report import table

        return table(self.table()) + "\n\nin parentheses: published (arXiv:2305.11627)"

    def markdown(self) -> str:
        """The table and the experiments as Markdown."""
        title, _ = PRESETS[self.preset]
        parts = [
            f"# {title}, {RATIO:.0%} removed",
            _markdown(self.table()),
            "In parentheses: published figures (LLM-Pruner, arXiv:2305.11627).",
        ]
        for heading, entries in (("Recovery steps", self.steps), ("Rows of recovery data", self.amounts)):
            if entries:
                columns = list(dict.fromkeys(name for entry in entries for name in entry))
                cells = [[f"{entry[c]:.6g}" if c in entry else "" for c in columns] for entry in entries]
                parts += [f"## {heading}", _markdown([columns, *cells])]
        return "\n\n".join(parts) + "\n"


def reproduce(
    preset: str,
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    rows: Sequence[str] | None = None,
    also: Mapping[str, str | Path] | None = None,
    experiments: bool = True,
    tasks: bool = True,
    limit: int | None = None,
    tuning: Mapping[str, Any] | None = None,
    device: str | None = None,
    seed: int = 0,
    quiet: bool | None = None,
) -> Reproduction:
    """Measure the paper's table, row after row; what an earlier call with the same settings has measured stands.

    Args:
        preset: one of :data:`PRESETS`.
        model: folder of the unpruned model.
        data: folder with the data (:class:`Sources`).
        output: folder for the results: ``table.json``, ``table.md``, plots of the experiments, a file and a run for
            each row, and :func:`llmprune.reporting.pages.report` on these.
        rows: names of rows to measure; None takes all of :data:`ROWS`.
        also: name -> folder of further models to stand in the table (others of the same size, a distilled one).
        experiments: whether to measure perplexity over recovery steps and over the amount of recovery data too.
        tasks: whether to run the seven tasks.
        limit: questions per task; None runs all.
        tuning: settings of :func:`llmprune.recover` that differ from its defaults.
        device: where to run; None takes a GPU where there is one.
        seed: of the random row and of the recovery.
        quiet: show no progress; None shows it on a terminal only.

    Raises:
        InputError: an unknown preset or row, data that is not there, or an output folder of other settings,
            or matplotlib is missing.
        LlmpruneError: what the single steps raise.
    """
    from llmprune.pipeline.prune import announcer

    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}: there are {', '.join(PRESETS)}")
    known = {row.name: row for row in ROWS}
    for name in rows or ():
        if name not in known:
            raise InputError(f"unknown row {name!r}: there are {', '.join(known)}")
    check_matplotlib()
    sources = Sources.find(data)
    bench = _Bench(
        Path(model),
        sources,
        Path(output),
        dict(tuning or {}),
        limit,
        tasks,
        device,
        seed,
        Stages(announcer(quiet)),
        quiet,
    )
    bench.claim(preset)
    measured = {name: bench.row(known[name]) for name in rows or known}
    for name, folder in (also or {}).items():
        measured[name] = bench.given(name, Path(folder))
    result = Reproduction(preset, measured, str(output))
    if experiments:
        result.steps, result.amounts = bench.steps(), bench.amounts()
    bench.publish(result)
    return result


@dataclass
class _Bench:
    """Measures rows and experiments, each kept in a file of its own."""

    model: Path
    sources: Sources
    output: Path
    tuning: dict[str, Any]
    limit: int | None
    tasks: bool
    device: str | None
    seed: int
    clock: Stages
    quiet: bool | None

    def claim(self, preset: str) -> None:
        """Make the output folder, or go on in it."""
        settings = json.loads(
            json.dumps(
                {
                    "preset": preset,
                    "model": str(self.model.resolve()),
                    "tuning": self.tuning,
                    "limit": self.limit,
                    "tasks": self.tasks,
                    "seed": self.seed,
                }
            )
        )
        file = self.output / "settings.json"
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            for name, value in settings.items():
                if before.get(name) != value:
                    raise InputError(
                        f"{self.output} holds results with {name} {before.get(name)!r}, not {value!r}: choose "
                        "another folder"
                    )
            return
        if self.output.is_dir() and any(self.output.iterdir()):
            raise InputError(f"{self.output} is not empty and holds no results: choose another output folder")
        (self.output / "rows").mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(settings, indent=1).encode())

    def row(self, row: Row) -> dict[str, Any]:
        """One row of the table."""
        return self._kept(f"rows/{_slug(row.name)}", lambda: self._measure(row))

    def given(self, name: str, folder: Path) -> dict[str, Any]:
        """A row of a model as it is."""

        def measure() -> dict[str, Any]:
            found = {"evaluation": self._judge(*self._load(folder))}
            self._note(f"given {name}", found)
            return found

        return self._kept(f"rows/{_slug(f'given {name}')}", measure)

    def steps(self) -> list[dict[str, float]]:
        """Perplexity on the texts over recovery steps, at each validation of a tuned element1."""

        def measure() -> dict[str, Any]:
            model, tokenizer, _ = self._pruned(ROWS[-1])
            result = self._tune(
                model, tokenizer, "steps", watch=lambda inner: self._perplexities(inner, tokenizer)
            )
            return {"entries": [entry for entry in result["curve"] if "validation_loss" in entry]}

        entries: list[dict[str, float]] = self._kept("steps", measure)["entries"]
        return entries

    def amounts(self) -> list[dict[str, float]]:
        """Perplexity on the texts after recovery on more and more rows of the data."""
        from llmprune.recovery.examples import read_records

        count = len(read_records(self.sources.instruct)[0])
        total = min(count, self.tuning.get("rows") or count)

        def measure(amount: int) -> dict[str, Any]:
            model, tokenizer, _ = self._pruned(ROWS[-1])
            self._tune(model, tokenizer, f"amount_{amount}", rows=amount)
            return {"rows": amount, **self._perplexities(model, tokenizer)}

        chosen = [*(a for a in AMOUNTS if a < total), total]
        return [self._kept(f"amount_{a}", lambda a=a: measure(a)) for a in chosen]  # type: ignore[misc]

    def publish(self, result: Reproduction) -> None:
        """Write table, plots and report."""
        content = {
            "preset": result.preset,
            "rows": result.rows,
            "steps": result.steps,
            "amounts": result.amounts,
        }
        write_file(self.output / "table.json", json.dumps(content, indent=1).encode())
        write_file(self.output / "table.md", result.markdown().encode())
        for name, x, label, entries in (
            ("steps", "step", "recovery steps", result.steps),
            ("amounts", "rows", "rows of recovery data", result.amounts),
        ):
            if entries:
                _plot(self.output / f"{name}.png", entries, x, label, list(self.sources.texts))
        runs = [self.output / "runs" / path.stem for path in sorted((self.output / "rows").glob("*.json"))]
        report(runs, self.output)

    def _kept(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the file of this name holds, or what is measured now."""
        file = self.output / f"{name}.json"
        if file.is_file():
            kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return kept
        with self.clock.stage(name, "measuring"):
            found = json.loads(json.dumps(measure()))
        write_file(file, json.dumps(found, indent=1).encode())
        return dict(found)

    def _load(self, folder: Path) -> tuple[Any, Any]:
        from llmprune.evaluation.evaluate import loaded, place

        model, tokenizer = loaded(folder, None, self.clock)
        return place(model, self.device), tokenizer

    def _pruned(self, row: Row) -> tuple[Any, Any, dict[str, Any] | None]:
        from llmprune.pipeline.prune import prune
        from llmprune.scoring.sampling import calibration_for

        model, tokenizer = self._load(self.model)
        if row.importance is None:
            return model, tokenizer, None
        calibration = None
        if row.importance not in ("l1", "l2", "random"):
            calibration = calibration_for(
                row.importance, model, self.sources.calibration, tokenizer, SAMPLES, LENGTH
            )
        report = prune(
            model,
            tokenizer,
            RATIO,
            calibration,
            row.importance,
            kinds=row.kinds,
            repair="none",
            seed=self.seed,
            quiet=self.quiet,
        )
        return model, tokenizer, report.to_json()

    def _measure(self, row: Row) -> dict[str, Any]:
        model, tokenizer, pruning = self._pruned(row)
        recovery = self._tune(model, tokenizer, _slug(row.name)) if row.tuned else None
        found = {"evaluation": self._judge(model, tokenizer), "pruning": pruning, "recovery": recovery}
        self._note(row.name, found)
        return found

    def _note(self, name: str, found: Mapping[str, Any]) -> None:
        """Make the row a run of its own, for the report."""
        folder = self.output / "runs" / _slug(name)
        shutil.rmtree(folder, ignore_errors=True)  # of a row that was stopped in the middle
        for part, command, data in (
            ("pruning", "prune", [self.sources.calibration]),
            ("recovery", "recover", [self.sources.instruct]),
            ("evaluation", "evaluate", list(self.sources.texts.values())),
        ):
            if found.get(part) is not None:
                record(folder, command, found[part], seed=self.seed, data=data)

    def _tune(self, model: Any, tokenizer: Any, name: str, **options: Any) -> dict[str, Any]:
        from llmprune.recovery.recover import recover

        settings = {"seed": self.seed, "quiet": self.quiet, **self.tuning, **options}
        return recover(
            model, tokenizer, self.sources.instruct, work=self.output / f"{name}.training", **settings
        ).to_json()

    def _judge(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        from llmprune.evaluation.evaluate import evaluate
        from llmprune.evaluation.texts import read_text

        return evaluate(
            model,
            tokenizer,
            ppl={name: read_text(path, join_lines=True) for name, path in self.sources.texts.items()},
            tasks=self.sources.names if self.tasks else (),
            include_path=self.sources.tasks,
            limit=self.limit,
            quiet=self.quiet,
        ).to_json()

    def _perplexities(self, model: Any, tokenizer: Any) -> dict[str, float]:
        from llmprune.evaluation.perplexity import score_text
        from llmprune.evaluation.texts import read_text

        return {
            name: score_text(model, tokenizer, read_text(path, join_lines=True)).perplexity
            for name, path in self.sources.texts.items()
        }


def _beside(found: str, published: float | None) -> str:
    return found if published is None else f"{found} ({published:.2f})"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name)


def _plot(
    file: Path, entries: Sequence[Mapping[str, float]], x: str, label: str, series: Sequence[str]
) -> None:
    """A line for each series over ``x``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in series:
        axes.plot([e[x] for e in entries], [e[name] for e in entries], marker="o", label=name)
    axes.set_xlabel(label)
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
    axes.legend()
    axes.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_file(file, content.getvalue())
