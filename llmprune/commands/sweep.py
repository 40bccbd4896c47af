"""``llmprune sweep``: many prunings of one model, as a table and a plot."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmprune.commands.common import (
    check_file,
    command,
    multiple_argument,
    names_argument,
    path_argument,
    print_json,
    ratio_argument,
)
from llmprune.errors import InputError


def register(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    from llmprune.experiments.experiments import EXPERIMENTS

    parser = command(commands, "sweep", _run, "prune in many ways, and compare: a table, a plot and JSON")
    parser.add_argument(
        "--experiment",
        metavar="NAME",
        help="; ".join(f"{one.name}: {one.question}".replace("%", "%%") for one in EXPERIMENTS.values()),
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=A,B",
        help="instead: values of a setting, like ratio=0.1,0.2 or kinds=head,head+ffn; may be repeated",
    )
    parser.add_argument(
        "--calibration", type=path_argument, required=True, metavar="FILE", help=".txt or .jsonl"
    )
    parser.add_argument(
        "--eval", type=path_argument, required=True, metavar="FILE", help="text to measure perplexity on"
    )
    parser.add_argument(
        "--output",
        type=path_argument,
        required=True,
        metavar="DIR",
        help="folder; a sweep in it is gone on with",
    )
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a further calibration text, for calibration and text=NAME; may be repeated",
    )
    parser.add_argument("--windows", type=int, metavar="N", help="windows of the evaluation text (100)")
    parser.add_argument("--ratio", type=ratio_argument, help="where the experiment says nothing else (0.2)")
    parser.add_argument("--kinds", type=names_argument, help="likewise (head,ffn)")
    parser.add_argument("--importance", help="likewise (element1)")
    parser.add_argument("--repair", help="likewise: none, ls or one-shot (none)")
    parser.add_argument("--allocation", help="likewise (uniform)")
    parser.add_argument("--samples", type=int, metavar="N", help="likewise: calibration samples")
    parser.add_argument("--protect-first", type=int, metavar="N", help="likewise (4 of 32)")
    parser.add_argument("--protect-last", type=int, metavar="N", help="likewise (2 of 32)")
    parser.add_argument("--round-to", type=multiple_argument, metavar="N", help="likewise (1)")
    parser.add_argument("--timed", action="store_const", const=True, help="time a request in every job")
    parser.add_argument("--ray", action="store_true", help="run jobs by Ray")


_SETTINGS = (
    "ratio",
    "kinds",
    "importance",
    "repair",
    "allocation",
    "samples",
    "protect_first",
    "protect_last",
    "round_to",
    "timed",
)


def _run(options: argparse.Namespace) -> None:
    from llmprune.experiments.experiments import EXPERIMENTS, grid
    from llmprune.experiments.sweep import WINDOWS, Inputs, Sweep

    if (options.experiment is None) == (not options.grid):
        raise InputError("a sweep needs either --experiment or --grid")
    if options.experiment is not None and options.experiment not in EXPERIMENTS:
        raise InputError(f"unknown experiment {options.experiment!r}: there are {', '.join(EXPERIMENTS)}")
    experiment = grid(options.grid) if options.grid else EXPERIMENTS[options.experiment]
    check_file(options.calibration, "calibration file")
    check_file(options.eval, "evaluation file")
    texts = dict(_text(text) for text in options.text)
    for path in texts.values():
        check_file(path, "calibration file")
    if options.windows is not None and options.windows < 1:
        raise InputError(f"--windows must be at least 1, not {options.windows}")
    settings = {name: getattr(options, name) for name in _SETTINGS if getattr(options, name) is not None}
    if "kinds" in settings:
        settings["kinds"] = list(settings["kinds"])
    inputs = Inputs(
        options.model,
        options.calibration,
        options.eval,
        texts,
        WINDOWS if options.windows is None else options.windows,
        options.trust_remote_code,
    )
    sweep = Sweep(experiment, inputs, options.output, settings)
    sweep.prepare()
    sweep.run(options.ray, _progress(bool(options.quiet), len(sweep.pending)))
    if options.json:
        print_json({"directory": str(options.output), "rows": sweep.rows()})
    else:
        print(sweep.table())
        print(f"in {options.output}: results.json, table.md, plot.png, plot.svg")


def _text(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise InputError(f"--text takes NAME=FILE, not {text!r}")
    return name, Path(path)


def _progress(quiet: bool, total: int) -> Callable[[str], None]:
    import sys

    from tqdm import tqdm

    bar = tqdm(total=total, unit="job", disable=quiet or not sys.stderr.isatty(), file=sys.stderr)

    def step(_: str) -> None:
        bar.update()

    return step
