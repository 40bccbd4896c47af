"""``llmprune report``: a page about runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llmprune.commands.common import path_argument, print_json


def register(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    text = "write a page about runs: tables, what each layer keeps, curves"
    parser = commands.add_parser("report", help=text, description=text)
    parser.add_argument(
        "runs", nargs="+", type=path_argument, metavar="RUN", help="folders that commands filled with --run"
    )
    parser.add_argument(
        "--output",
        type=path_argument,
        default=Path("report"),
        metavar="DIR",
        help="folder for report.html, report.md and its pictures (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from llmprune.reporting.pages import report

    path = report(options.runs, options.output)
    if options.json:
        print_json({"html": str(path), "markdown": str(path.with_suffix(".md"))})
    else:
        print(f"report: {path}")
