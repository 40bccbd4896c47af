"""``llmprune prune --stream``: a folder into a smaller one, with a few blocks of the model in memory."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmprune.commands.common import check_tokenizer, note_run, print_json
from llmprune.errors import InputError

if TYPE_CHECKING:
    from llmprune.pipeline.stages import Stages


def prune_files(options: argparse.Namespace, goals: Mapping[str, Any], clock: Stages) -> None:
    """Do what the options of ``llmprune prune`` say, which have been checked.

    Args:
        options: The options.
        goals: Those of a target: its kind -> what was asked for.
        clock: Gets the stages.

    Raises:
        InputError: options that need the model in memory, or no output.
    """
    from llmprune.checkpoints.loading import load_tokenizer
    from llmprune.out_of_core.stored import open_model
    from llmprune.pipeline.prune_stream import prune_streamed

    _check(options, goals)
    with clock.stage("open", f"reading the names of {options.model}"):
        model = open_model(options.model, trust_remote_code=options.trust_remote_code)
        tokenizer = load_tokenizer(options.model)
    if options.calibration is not None or options.repair_calibration is not None:
        check_tokenizer(tokenizer, options.model)
    report = prune_streamed(
        model,
        options.model,
        options.output,
        options.ratio,
        options.calibration,
        options.importance,
        options.aggregation,
        tokenizer=tokenizer,
        samples=options.samples,
        length=options.length,
        repair=options.repair,
        repair_calibration=options.repair_calibration,
        overwrite=options.overwrite,
        form=options.form,
        seed=options.seed,
        scope=options.scope,
        kinds=options.kinds,
        memory_budget=options.memory_budget,
        verify=not options.no_verify,
        quiet=True if options.quiet else None,
        stages=clock,
        allocation=options.allocation,
        protect_first=options.protect_first,
        protect_last=options.protect_last,
        round_to=options.round_to,
        tp=options.tp,
        norms=options.norms,
        context=options.context,
        batch=options.batch,
        new_tokens=options.new_tokens,
        **goals,
    )
    if options.save_plan is not None:
        report.plan.save(options.save_plan)
    note_run(options, report.to_json(), [options.calibration])
    if options.json:
        print_json(report.to_json())
    else:
        print(report)


def _check(options: argparse.Namespace, goals: Mapping[str, Any]) -> None:
    """Refuse what needs the model in memory."""
    if options.output is None:
        raise InputError("streaming writes a folder: give --output DIR, or --no-stream")
    wanting = {
        "--eval": options.eval is not None,
        "--generate": options.generate is not None,
        "a latency": goals.get("latency") is not None,
    }
    for what, given in wanting.items():
        if given:
            raise InputError(
                f"{what} needs the whole model in memory, and this one is streamed: leave it out, or give --no-stream"
            )
