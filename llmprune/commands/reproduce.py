"""``llmprune reproduce``: the paper's tables on given weights and data."""

from __future__ import annotations

import argparse
from typing import Any

from llmprune.commands.common import names_argument, path_argument, print_json
from llmprune.errors import InputError


def register(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    text = "measure the paper's table: every importance, tuned or not"
    parser = commands.add_parser("reproduce", help=text, description=text)
    parser.add_argument("preset", help="llama-7b, llama-13b, vicuna-7b or chatglm-6b")
    parser.add_argument(
        "--model", required=True, type=path_argument, metavar="DIR", help="the unpruned model"
    )
    parser.add_argument(
        "--data",
        required=True,
        type=path_argument,
        metavar="DIR",
        help="folder with text/ (books, WikiText2, PTB), instruct/ and, for tasks without a network, zeroshot/",
    )
    parser.add_argument(
        "--output", required=True, type=path_argument, metavar="DIR", help="folder for results"
    )
    parser.add_argument("--rows", type=names_argument, metavar="A,B", help="only these rows (all)")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a further model in the table; repeatable",
    )
    parser.add_argument(
        "--no-experiments", action="store_true", help="leave out recovery steps and data amounts"
    )
    parser.add_argument("--no-tasks", action="store_true", help="leave out the zero-shot tasks")
    parser.add_argument("--limit", type=int, metavar="N", help="questions per task (all)")
    parser.add_argument("--steps", type=int, help="recovery steps (two epochs)")
    parser.add_argument("--tuning-rows", type=int, metavar="N", help="rows of the recovery data (all)")
    parser.add_argument("--learning-rate", type=float, help="of the recovery (1e-4)")
    parser.add_argument("--device", help="where to run (a GPU where there is one)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random row and the recovery (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from llmprune.experiments.reproduce import reproduce

    also = {}
    for text in options.also:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise InputError(f"--also takes NAME=DIR, not {text!r}")
        also[name] = folder
    given = {"steps": options.steps, "rows": options.tuning_rows, "learning_rate": options.learning_rate}
    result = reproduce(
        options.preset,
        options.model,
        options.data,
        options.output,
        rows=options.rows,
        also=also,
        experiments=not options.no_experiments,
        tasks=not options.no_tasks,
        limit=options.limit,
        tuning={name: value for name, value in given.items() if value is not None},
        device=options.device,
        seed=options.seed,
        quiet=options.quiet or None,
    )
    if options.json:
        print_json(
            {"preset": result.preset, "rows": result.rows, "steps": result.steps, "amounts": result.amounts}
        )
    else:
        print(result)
        print(f"\nresults: {result.output}/table.md, table.json, report.html")
