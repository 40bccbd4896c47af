"""``llmprune evaluate``: judge a model folder."""

from __future__ import annotations

import argparse
from typing import Any

from llmprune.commands.common import (
    check_run,
    command,
    load,
    names_argument,
    note_run,
    path_argument,
    print_json,
    run_argument,
)


def register(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    parser = command(
        commands, "evaluate", _run, "measure perplexity, tasks, size, memory and speed of a model"
    )
    parser.add_argument(
        "--ppl",
        action="append",
        default=[],
        type=path_argument,
        metavar="FILE",
        help="text to measure perplexity on: .txt, .jsonl or a saved dataset's folder; may be repeated",
    )
    parser.add_argument(
        "--protocol",
        default="llm-pruner",
        help="llm-pruner (windows of 128 tokens) or 2048, without overlap, the tail dropped (%(default)s)",
    )
    parser.add_argument("--window", type=int, help="tokens in a window, instead of the protocol's")
    parser.add_argument("--stride", type=int, help="tokens from window to window (the window's length)")
    parser.add_argument(
        "--join-lines", action="store_true", help="join each text's non-empty lines by blank lines first"
    )
    parser.add_argument(
        "--tasks",
        type=names_argument,
        default=(),
        metavar="A,B",
        help="tasks of lm-eval by name; paper stands for the paper's seven",
    )
    parser.add_argument(
        "--include-path", type=path_argument, metavar="DIR", help="folder of further task files"
    )
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question (the task's)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="questions per task (all)")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="questions at once (%(default)s)"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="longest context of the tasks in tokens (the model's, or 2048)",
    )
    parser.add_argument("--no-latency", action="store_true", help="do not measure speed and cache")
    parser.add_argument(
        "--generate",
        action="append",
        default=[],
        metavar="PROMPT",
        help="continue this text; may be repeated",
    )
    parser.add_argument(
        "--beside", type=path_argument, metavar="DIR", help="a model whose continuations stand beside"
    )
    run_argument(parser)
    parser.add_argument("--device", help="where to run: cpu, cuda, cuda:1 (a GPU where there is one)")


def _run(options: argparse.Namespace) -> None:
    from llmprune.evaluation.evaluate import evaluate, place
    from llmprune.pipeline.prune import announcer
    from llmprune.pipeline.stages import Stages

    check_run(options)
    clock = Stages(announcer(bool(options.quiet)))
    model, tokenizer = load(options.model, clock, options.trust_remote_code)
    result = evaluate(
        place(model, options.device),
        tokenizer,
        ppl=options.ppl,
        protocol=options.protocol,
        window=options.window,
        stride=options.stride,
        join_lines=options.join_lines,
        tasks=options.tasks,
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        batch_size=options.batch_size,
        max_length=options.max_length,
        latency=not options.no_latency,
        prompts=options.generate,
        beside=options.beside,
        quiet=options.quiet or None,
        stages=clock,
    )
    figures = {"directory": str(options.model), **result.to_json()}
    note_run(options, figures, options.ppl)
    if options.json:
        print_json(figures)
    else:
        print(result)
