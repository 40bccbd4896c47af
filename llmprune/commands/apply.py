"""``llmprune apply``: a plan carried out on the files of a checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from llmprune.commands.common import check_file, path_argument, print_json


def register(commands: Any) -> None:
    """Add the command."""
    text = "carry a plan out on files, without loading the model"
    parser: argparse.ArgumentParser = commands.add_parser("apply", help=text, description=text)
    parser.add_argument("plan", type=path_argument, metavar="PLAN", help="plan as --save-plan wrote it")
    parser.add_argument("model", type=path_argument, metavar="MODEL_DIR", help="the model it was made for")
    parser.add_argument("output", type=path_argument, metavar="OUT_DIR", help="folder for the pruned model")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    parser.add_argument(
        "--form", default="auto", help="of the checkpoint: auto, stock or universal (%(default)s)"
    )
    parser.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="largest safetensors file (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Do what the options say."""
    from llmprune.out_of_core.apply import apply
    from llmprune.pipeline.prune import announcer, check_options
    from llmprune.pipeline.stages import Stages
    from llmprune.planning.plan import Plan
    from llmprune.reporting.report import memory

    check_options(output=options.output, overwrite=options.overwrite, form=options.form)
    check_file(options.plan, "plan")
    plan = Plan.load(options.plan)
    clock = Stages(announcer(bool(options.quiet)))
    with clock.stage("apply", f"from {options.model} to {options.output}"):
        saved = apply(
            plan,
            options.model,
            options.output,
            options.overwrite,
            form=options.form,
            max_shard_size=options.shard_size,
            quiet=True if options.quiet else None,
        )
    (stage,) = clock.done
    if options.json:
        counts = {"before": plan.parameters_before, "after": plan.parameters_after}
        print_json({**asdict(saved), "parameters": counts, "seconds": stage.seconds, "peak": stage.peak})
        return
    print(
        f"checkpoint: {saved.directory} ({saved.form} form, {memory(saved.bytes)}), "
        f"{plan.parameters_before:,} -> {plan.parameters_after:,} parameters"
    )
    if saved.max_error is None:
        print("no forward pass could be recorded: names and shapes were compared, not what is computed")
    if saved.reason:
        print(f"not in stock form: {saved.reason}")
