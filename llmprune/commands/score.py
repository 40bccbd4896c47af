"""``llmprune score``: how much each coupled group of a model matters, written to a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llmprune.commands.common import (
    check_file,
    check_tokenizer,
    command,
    names_argument,
    path_argument,
    print_json,
)
from llmprune.errors import InputError


def add(commands: Any) -> None:
    """Add the command."""
    score = command(commands, "score", _score, "score the groups of a model, and save the scores")
    score.add_argument(
        "--importance",
        default="element1",
        help="element1 element2 vector obs fluctuation activation l1 l2 random (%(default)s)",
    )
    score.add_argument("--aggregation", default="sum", help="sum max product last (%(default)s)")
    score.add_argument(
        "--calibration", type=path_argument, metavar="FILE", help=".txt or .jsonl to score the groups on"
    )
    score.add_argument("--samples", type=int, help="calibration samples (10; 16 for obs and its kind)")
    score.add_argument("--length", type=int, help="tokens in each (64; 128 for those)")
    score.add_argument("--kinds", type=names_argument, help="kinds to score (all but whole layers)")
    score.add_argument("--seed", type=int, default=0, help="of the importance random (%(default)s)")
    score.add_argument(
        "--output", type=path_argument, required=True, metavar="FILE", help="the scores, .npz or .json"
    )
    score.add_argument(
        "--device", help="where the blocks of a streamed model run: cpu, cuda, cuda:1 (the CPU)"
    )
    add_streaming(score)


def add_streaming(parser: argparse.ArgumentParser) -> None:
    """Add the options of models larger than memory."""
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="leave the weights in their files, and read them block by block (where memory would not suffice)",
    )
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="most memory that streaming may take, as 4GB (what the machine has free)",
    )


def _score(options: argparse.Namespace) -> None:
    from llmprune.checkpoints.loading import load_tokenizer
    from llmprune.out_of_core.stored import opened, source_of, state_beside
    from llmprune.pipeline.prune import announcer
    from llmprune.pipeline.stages import Stages
    from llmprune.scoring.sampling import calibration_for
    from llmprune.scoring.score import check_scoring, score
    from llmprune.tracing.trace import trace

    check_scoring(options.importance, options.aggregation, options.calibration, options.kinds)
    check_file(options.calibration, "calibration file")
    _check_output(options.output)
    clock = Stages(announcer(bool(options.quiet)))
    with clock.stage("load", f"reading {options.model}"):
        model = opened(
            options.model,
            options.stream,
            options.memory_budget,
            trust_remote_code=options.trust_remote_code,
        )
        tokenizer = load_tokenizer(options.model)
    streamed = source_of(model) is not None
    batch = None
    if options.calibration is not None:
        check_tokenizer(tokenizer, options.model)
        batch = calibration_for(
            options.importance, model, options.calibration, tokenizer, options.samples, options.length
        )
    with clock.stage("trace", "recording one forward pass"):
        graph = trace(model)
    doing = f"scoring coupled groups by {options.importance}"
    with clock.stage("score", f"{doing}, block by block" if streamed else doing):
        scores = score(
            model,
            graph,
            batch,
            options.importance,
            options.aggregation,
            seed=options.seed,
            kinds=options.kinds,
            quiet=True if options.quiet else None,
            memory_budget=options.memory_budget if streamed else None,
            state=state_beside(options.output) if streamed else None,
            device=options.device if streamed else None,
        )
    scores.save(options.output)
    if options.json:
        stages = [{"name": s.name, "seconds": s.seconds, "peak": s.peak} for s in clock.done]
        print_json({"output": str(options.output), "streamed": streamed, "stages": stages})
    else:
        print(scores)
        print(f"\n{'streamed; ' if streamed else ''}written to {options.output}")


def _check_output(output: Path) -> None:
    """Refuse a file that could not be written, before any work."""
    if output.suffix not in (".npz", ".json"):
        raise InputError(f"scores are saved as .npz or .json, not as {str(output)!r}")
    if not output.absolute().parent.is_dir():
        raise InputError(f"the folder of {output} does not exist: make it, or give --output another place")
