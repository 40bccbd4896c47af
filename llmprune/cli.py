"""The command line: ``llmprune COMMAND``; ``llmprune --help`` lists the commands.

Results go to stdout, progress and errors to stderr. Exit code 0: done; 1: the reader of stdout has gone; 2: an error
that one sentence on stderr names; 130: interrupted by Ctrl-C, with no file left behind.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llmprune import __version__
from llmprune.commands import apply, completion, evaluate, export, recover, reproduce, sweep
from llmprune.commands import report as report_command
from llmprune.commands import score as score_command
from llmprune.commands.common import (
    check_file,
    check_run,
    check_tokenizer,
    command,
    load,
    multiple_argument,
    names_argument,
    note_run,
    path_argument,
    print_json,
    processes,
    ratio_argument,
    read_text,
    run_argument,
)
from llmprune.commands.streamed import prune_files
from llmprune.errors import InputError, LlmpruneError, VerificationError

if TYPE_CHECKING:
    from llmprune.pipeline.stages import Stages
    from llmprune.scoring.ranks import Ranks


EXAMPLES = {
    "prune": "MODEL_DIR --ratio 0.2 --calibration TEXT --output OUT_DIR",
    "score": "MODEL_DIR --importance element2 --calibration TEXT --output scores.npz",
    "trace": "MODEL_DIR --explain model.layers.0.mlp.up_proj.weight:0:17",
    "verify": "OUT_DIR --original MODEL_DIR",
    "apply": "plan.json MODEL_DIR OUT_DIR",
    "export": "OUT_DIR --gguf smaller.gguf --type q8_0",
    "recover": "OUT_DIR --data alpaca.json --output BETTER_DIR",
    "evaluate": "OUT_DIR --ppl TEXT --beside MODEL_DIR",
    "sweep": "MODEL_DIR --experiment ratio --calibration TEXT --eval OTHER_TEXT --output DIR",
    "report": "RUN_DIR --output report",
    "reproduce": "llama-7b --model MODEL_DIR --data DATA_DIR --output OUT_DIR",
    "doctor": "--json",
    "completion": "bash > ~/.local/share/bash-completion/completions/llmprune",
}
"""Command -> words of a call that makes sense."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence; the usage is a ``--help`` away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words of the command line without the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    _quieten()
    try:
        options.run(options)
    except LlmpruneError as error:
        print(f"llmprune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("llmprune: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout has gone (| head): nothing to say, and nothing to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        print(f"llmprune: the system refused: {error.strerror or error}{place}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="llmprune",
        description="Structured pruning for any Hugging Face model.",
        epilog="""examples:
  llmprune prune MODEL_DIR --ratio 0.2 --calibration TEXT --output OUT_DIR
  llmprune evaluate OUT_DIR --ppl TEXT --beside MODEL_DIR
  llmprune recover OUT_DIR --data TEXT --output BETTER_DIR
llmprune COMMAND --help says more of each""",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=17, width=80
        ),
    )
    parser.add_argument("--version", action="version", version=f"llmprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)

    prune = command(commands, "prune", _prune, "remove groups of a model and save what is left")
    prune.add_argument(
        "--ratio",
        type=ratio_argument,
        help="share of the parameters to remove, or head=0.25,ffn=0.2 (0.2)",
    )
    prune.add_argument(
        "--params", metavar="N", help="in place of the ratio: parameters to be left, 5.4B or 0.8x"
    )
    prune.add_argument(
        "--memory", metavar="N", help="or bytes of weights and, with --context, cache: 10GB, 10GiB or 0.8x"
    )
    prune.add_argument("--macs", metavar="N", help="or multiply-accumulates per token: 3.2G or 0.8x")
    prune.add_argument(
        "--latency", metavar="T", help="or the time of a request on this machine, measured: 35ms or 0.8x"
    )
    prune.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="for --memory: tokens in the cache; for --latency: of the prompt (128)",
    )
    prune.add_argument("--batch", type=int, metavar="N", help="for these two: sequences (1)")
    prune.add_argument(
        "--new-tokens", type=int, metavar="N", help="for --latency: steps after the prompt (32)"
    )
    prune.add_argument(
        "--importance",
        default="auto",
        help="obs fluctuation activation element1 element2 vector l1 l2 random, or block_influence for --kinds layer, "
        "attention or feedforward; auto: obs, or element1 for such kinds (%(default)s)",
    )
    prune.add_argument("--aggregation", default="sum", help="sum max product last (%(default)s)")
    prune.add_argument(
        "--calibration", type=path_argument, metavar="FILE", help=".txt or .jsonl to score the groups on"
    )
    prune.add_argument("--samples", type=int, help="calibration samples (16; 10 for gradients' importances)")
    prune.add_argument("--length", type=int, help="tokens in each (128; 64 for those)")
    prune.add_argument(
        "--output",
        type=path_argument,
        metavar="DIR",
        help="folder for the pruned model; without it none is written",
    )
    prune.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    prune.add_argument(
        "--form", default="auto", help="of the checkpoint: auto, stock or universal (%(default)s)"
    )
    prune.add_argument(
        "--eval", type=path_argument, metavar="FILE", help="text to measure perplexity on, before and after"
    )
    prune.add_argument("--generate", metavar="PROMPT", help="continue this text greedily, before and after")
    prune.add_argument(
        "--kinds",
        type=names_argument,
        default=("head", "ffn"),
        help="kinds of axes to prune; layer drops whole layers, attention and feedforward these alone (head,ffn)",
    )
    prune.add_argument(
        "--allocation", default="auto", help="auto uniform global sensitivity search (%(default)s)"
    )
    prune.add_argument(
        "--search-seconds", type=float, default=60.0, metavar="S", help="how long to search (%(default)s)"
    )
    prune.add_argument(
        "--search-state",
        type=path_argument,
        metavar="FILE",
        help="state of the search, written and gone on from",
    )
    prune.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="choose in rounds, with new scores before each"
    )
    prune.add_argument("--schedule", default="linear", help="of the rounds: linear or cubic (%(default)s)")
    prune.add_argument(
        "--protect-first", type=int, metavar="N", help="layers left whole at the start (4 of 32)"
    )
    prune.add_argument("--protect-last", type=int, metavar="N", help="layers left whole at the end (2 of 32)")
    prune.add_argument(
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="keep numbers of key-value heads and FFN channels that N devices can share evenly (%(default)s)",
    )
    prune.add_argument(
        "--round-to",
        type=multiple_argument,
        default=1,
        metavar="N",
        help="keep FFN channels in multiples of this; auto: of what is fast on this machine",
    )
    prune.add_argument(
        "--norms", default="rescaled", help="RMS norms over removed channels: rescaled or kept (%(default)s)"
    )
    prune.add_argument("--scope", metavar="MODULE", help="prune only below this module (vision_tower)")
    prune.add_argument(
        "--repair", default="auto", help="ls (least squares), none, or auto: ls if there is calibration"
    )
    prune.add_argument(
        "--repair-calibration",
        type=path_argument,
        metavar="FILE",
        help="text to repair on (that of --calibration)",
    )
    prune.add_argument("--seed", type=int, default=0, help="of the importance random (%(default)s)")
    run_argument(prune)
    prune.add_argument(
        "--no-verify", action="store_true", help="do not compare with the masked reference first"
    )
    prune.add_argument(
        "--save-plan", type=path_argument, metavar="FILE", help="write the plan as JSON as well"
    )

    score_command.add_streaming(prune)
    score_command.add(commands)

    trace = command(commands, "trace", _trace, "show what can be pruned, by kind")
    trace.add_argument(
        "--explain", metavar="PARAM:DIM:INDEX", help="why this slice is tied to each other one"
    )
    trace.add_argument("--frozen", action="store_true", help="list what cannot be pruned, with reasons")

    verify = command(commands, "verify", _verify, "check a plan, or a pruned model, against the original")
    verify.add_argument(
        "--plan",
        type=path_argument,
        metavar="FILE",
        help="a plan for MODEL_DIR, to compare with its masked form",
    )
    verify.add_argument(
        "--original", type=path_argument, metavar="DIR", help="what the pruned MODEL_DIR was made from"
    )

    apply.register(commands)
    export.register(commands)
    recover.register(commands)
    evaluate.register(commands)
    sweep.register(commands)
    report_command.register(commands)
    reproduce.register(commands)

    doctor = commands.add_parser("doctor", help="show versions and hardware, and test the C core")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)
    completion.add(commands, _parser)
    for name, words in EXAMPLES.items():
        commands.choices[name].epilog = f"example: llmprune {name} {words}"
    return parser


def _quieten() -> None:
    """Keep other libraries' chatter off stderr: it belongs to progress and to our one sentence."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="llmprune: %(message)s")


# --- prune ------------------------------------------------------------------------------------------------------------


def _prune(options: argparse.Namespace) -> None:
    with processes() as ranks:
        if ranks is not None and ranks.rank:
            # It scores its samples; what is done with the plan is the first process's to do and to show.
            options.quiet, options.no_verify, options.repair = True, True, "none"
            options.repair_calibration = options.eval = options.generate = None
            options.output = options.save_plan = None
        _prune_by(options, ranks)


def _prune_by(options: argparse.Namespace, ranks: Ranks | None) -> None:
    from llmprune.out_of_core.stored import must_stream
    from llmprune.pipeline.prune import announcer, check_options, prune, save
    from llmprune.pipeline.stages import Stages
    from llmprune.planning.choice import check_choice
    from llmprune.planning.targets import UNITS, ratio_of, target_of
    from llmprune.scoring.importance import lookup
    from llmprune.scoring.sampling import best_importance, calibration_for
    from llmprune.scoring.score import check_scoring

    check_options(
        options.repair,
        options.repair_calibration,
        options.calibration,
        options.output,
        options.overwrite,
        options.form,
    )
    goals = {kind: getattr(options, kind) for kind in UNITS}
    target = target_of(options.context, options.batch, options.new_tokens, **goals)
    options.ratio = ratio_of(options.ratio, target)
    wanted = tuple(options.ratio) if isinstance(options.ratio, dict) else options.kinds
    importance = best_importance(options.importance, wanted, ranks is None)
    check_scoring(importance, options.aggregation, options.calibration, wanted)
    check_choice(
        options.ratio,
        kinds=options.kinds,
        allocation=options.allocation,
        protect_first=options.protect_first,
        protect_last=options.protect_last,
        round_to=options.round_to,
        tp=options.tp,
        norms=options.norms,
    )
    check_file(options.calibration, "calibration file")
    check_file(options.repair_calibration, "repair calibration file")
    text = None
    if options.eval is not None:
        check_file(options.eval, "evaluation file")
        text = read_text(options.eval)
    _check_plan_file(options.save_plan)
    check_run(options)
    clock = Stages(announcer(bool(options.quiet)))
    if must_stream(options.model, options.stream, options.memory_budget):
        if ranks is not None:
            raise InputError("streaming runs in one process: start it without torchrun, or give --no-stream")
        prune_files(options, goals, clock)
        return
    model, tokenizer = load(options.model, clock, options.trust_remote_code)
    calibration = None
    repair_text = options.repair_calibration or options.calibration
    if repair_text is not None:
        check_tokenizer(tokenizer, options.model)
    if options.calibration is not None:
        calibration = calibration_for(
            importance, model, options.calibration, tokenizer, options.samples, options.length
        )
        if lookup(importance).sort == "inputs" and options.repair_calibration is None:
            repair_text = None  # the same samples
    before = _judge(model, tokenizer, text, options.generate, clock, "before")
    report = prune(
        model,
        tokenizer,
        options.ratio,
        calibration,
        options.importance,
        options.aggregation,
        kinds=options.kinds,
        allocation=options.allocation,
        protect_first=options.protect_first,
        protect_last=options.protect_last,
        round_to=options.round_to,
        tp=options.tp,
        norms=options.norms,
        **goals,
        rounds=options.rounds,
        schedule=options.schedule,
        search_seconds=options.search_seconds,
        search_state=options.search_state,
        context=options.context,
        batch=options.batch,
        new_tokens=options.new_tokens,
        scope=options.scope,
        seed=options.seed,
        repair=options.repair,
        repair_calibration=None if options.repair == "none" else repair_text,
        verify=not options.no_verify,
        quiet=True if options.quiet else None,
        stages=clock,
        ranks=ranks,
    )
    if ranks is not None and ranks.rank:
        return
    after = _judge(model, tokenizer, text, options.generate, clock, "after")
    if before[0] is not None and after[0] is not None:
        report.perplexity = (before[0], after[0])
    if before[1] is not None and after[1] is not None:
        report.generation = (options.generate, before[1], after[1])
    if options.output is not None:
        save(model, report, tokenizer, options.output, options.overwrite, clock, form=options.form)
    if options.save_plan is not None:
        report.plan.save(options.save_plan)
    note_run(options, report.to_json(), [options.calibration, repair_text, options.eval])
    if options.json:
        print_json(report.to_json())
    else:
        print(report)


def _judge(
    model: Any, tokenizer: Any, text: str | None, prompt: str | None, clock: Stages, when: str
) -> tuple[float | None, str | None]:
    """Perplexity on ``text`` and a continuation of ``prompt``, where they are asked for."""
    if (text is not None or prompt is not None) and tokenizer is None:
        raise InputError("--eval and --generate need a tokenizer, and the model's folder has none")
    value = written = None
    if text is not None:
        from llmprune.evaluation.perplexity import perplexity

        with clock.stage(f"eval {when}", f"perplexity {when}"):
            value = perplexity(model, tokenizer, text)
    if prompt is not None:
        from llmprune.evaluation.generation import continuation

        written = continuation(model, tokenizer, prompt)
    return value, written


def _check_plan_file(path: Path | None) -> None:
    """Refuse a place for the plan before any work."""
    if path is None:
        return
    parent = path.absolute().parent
    if path.is_dir():
        raise InputError(f"{path} is a folder: give --save-plan a file")
    if not parent.is_dir():
        raise InputError(f"the folder of {path} does not exist: make it, or give --save-plan another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"the folder of {path} cannot be written to: give --save-plan another place")


# --- trace, verify, doctor --------------------------------------------------------------------------------------------


def _trace(options: argparse.Namespace) -> None:
    from llmprune.pipeline.prune import announcer
    from llmprune.pipeline.stages import Stages
    from llmprune.planning.apart import cut_alike
    from llmprune.reporting.report import axes_summary, render_axes
    from llmprune.tracing.trace import trace

    target = _explained(options.explain) if options.explain else None
    clock = Stages(announcer(bool(options.quiet)))
    model, _ = load(options.model, clock, options.trust_remote_code)
    with clock.stage("trace", "recording one forward pass"):
        graph = trace(model)
    if target is not None:
        name, dim, index = target
        explanation = str(graph.explain(name, dim=dim, index=index))
        if options.json:
            print_json(
                {"parameter": name, "dim": dim, "index": index, "explanation": explanation.splitlines()}
            )
        else:
            print(explanation)
    elif options.json:
        frozen = [
            {"axis": a.id, "size": a.size, "parameter": a.places[0][0], "reasons": list(a.reasons)}
            for a in graph.axes
            if not a.prunable
        ]
        frozen += [
            {"axis": s.id, "size": s.size, "module": s.module, "reasons": list(s.reasons)}
            for s in graph.stacks
            if s.pinned
        ]
        print_json(
            {
                "kinds": axes_summary(graph),
                "frozen": frozen,
                "alike": [{"axis": axis, "reason": reason} for axis, reason in cut_alike(graph).items()],
                "unknown_operations": graph.unknown_operations,
                "notes": list(graph.tape.notes),
            }
        )
    else:
        print(render_axes(graph, options.frozen))


def _explained(text: str) -> tuple[str, int, int]:
    name, _, rest = text.partition(":")
    dim, _, index = rest.partition(":")
    if not (name and dim.isdecimal() and index.isdecimal()):
        raise InputError(
            f"--explain takes PARAM:DIM:INDEX, like model.layers.0.mlp.up_proj.weight:0:17, not {text!r}"
        )
    return name, int(dim), int(index)


def _verify(options: argparse.Namespace) -> None:
    from llmprune.pipeline.prune import announcer
    from llmprune.pipeline.stages import Stages

    if options.plan is not None and options.original is not None:
        raise InputError("give --plan (for an original model) or --original (for a pruned one), not both")
    clock = Stages(announcer(bool(options.quiet)))
    if options.plan is not None:
        from llmprune.compaction.verify import verify
        from llmprune.planning.plan import Plan

        check_file(options.plan, "plan")
        plan = Plan.load(options.plan)
        model, _ = load(options.model, clock, options.trust_remote_code)
        with clock.stage("verify", "comparing with the masked reference"):
            result: Any = verify(model, plan)
    else:
        from llmprune.checkpoints.loading import check_files
        from llmprune.compaction.recheck import recheck

        model, _ = load(options.model, clock, options.trust_remote_code)
        check_files(options.model)
        original = (
            None if options.original is None else load(options.original, clock, options.trust_remote_code)[0]
        )
        with clock.stage(
            "verify", "comparing with the original" if original is not None else "running the model"
        ):
            result = recheck(model, original)
    if options.json:
        print_json(result.to_json())
    else:
        print(result)


def _doctor(options: argparse.Namespace) -> None:
    from llmprune.machine.doctor import doctor

    report = doctor(quiet=options.json)
    if options.json:
        print_json(report)
    if not (test := report["self_test"])["ok"]:
        raise VerificationError(
            f"the C core computes wrong numbers here ({test['detail']}): install llmprune anew with "
            "`pip install --force-reinstall --no-cache-dir llmprune`, and report this with what doctor printed"
        )


if __name__ == "__main__":
    sys.exit(main())
