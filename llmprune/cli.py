"""The command line: ``llmprune prune | trace | verify | doctor``.

Results go to stdout, progress and errors to stderr. Exit code 0: done; 1: the reader of stdout has gone; 2: an error
that one sentence on stderr names; 130: interrupted by Ctrl-C, with no file left behind.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llmprune import __version__
from llmprune.errors import InputError, LlmpruneError

if TYPE_CHECKING:
    from llmprune.stages import Stages

GENERATED = 40
"""Tokens generated for ``--generate``."""


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
    parser = _Parser(prog="llmprune", description="Structured pruning for any Hugging Face model.")
    parser.add_argument("--version", action="version", version=f"llmprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)

    prune = _command(commands, "prune", _prune, "remove groups of a model and save what is left")
    prune.add_argument(
        "--ratio",
        type=_ratio,
        default=0.2,
        help="share of the parameters, or head=0.25,ffn=0.2 (%(default)s)",
    )
    prune.add_argument(
        "--importance",
        default="element1",
        help="element1 element2 vector obs fluctuation activation l1 l2 random, or block_influence for "
        "--kinds layer, attention or feedforward (%(default)s)",
    )
    prune.add_argument("--aggregation", default="sum", help="sum max product last (%(default)s)")
    prune.add_argument(
        "--calibration", type=_path, metavar="FILE", help=".txt or .jsonl to score the groups on"
    )
    prune.add_argument(
        "--samples", type=int, help="calibration samples (10; 32 for obs, fluctuation, activation)"
    )
    prune.add_argument("--length", type=int, help="tokens in each (64; 128 for those)")
    prune.add_argument(
        "--output", type=_path, metavar="DIR", help="folder for the pruned model; without it none is written"
    )
    prune.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    prune.add_argument(
        "--form", default="auto", help="of the checkpoint: auto, stock or universal (%(default)s)"
    )
    prune.add_argument(
        "--eval", type=_path, metavar="FILE", help="text to measure perplexity on, before and after"
    )
    prune.add_argument("--generate", metavar="PROMPT", help="continue this text greedily, before and after")
    prune.add_argument(
        "--kinds",
        type=_names,
        default=("head", "ffn"),
        help="kinds of axes to prune; layer drops whole layers, attention and feedforward these alone (head,ffn)",
    )
    prune.add_argument("--allocation", default="uniform", help="uniform or global (%(default)s)")
    prune.add_argument(
        "--protect-first", type=int, metavar="N", help="layers left whole at the start (4 of 32)"
    )
    prune.add_argument("--protect-last", type=int, metavar="N", help="layers left whole at the end (2 of 32)")
    prune.add_argument(
        "--round-to", type=int, default=1, metavar="N", help="keep FFN channels in multiples of this"
    )
    prune.add_argument(
        "--norms", default="rescaled", help="RMS norms over removed channels: rescaled or kept (%(default)s)"
    )
    prune.add_argument("--scope", metavar="MODULE", help="prune only below this module (vision_tower)")
    prune.add_argument(
        "--repair", default="auto", help="ls (least squares), none, or auto: ls if there is calibration"
    )
    prune.add_argument(
        "--repair-calibration", type=_path, metavar="FILE", help="text to repair on (that of --calibration)"
    )
    prune.add_argument("--seed", type=int, default=0, help="of the importance random (%(default)s)")
    prune.add_argument(
        "--no-verify", action="store_true", help="do not compare with the masked reference first"
    )
    prune.add_argument("--save-plan", type=_path, metavar="FILE", help="write the plan as JSON as well")

    trace = _command(commands, "trace", _trace, "show what can be pruned, by kind")
    trace.add_argument(
        "--explain", metavar="PARAM:DIM:INDEX", help="why this slice is tied to each other one"
    )
    trace.add_argument("--frozen", action="store_true", help="list what cannot be pruned, with reasons")

    verify = _command(commands, "verify", _verify, "check a plan, or a pruned model, against the original")
    verify.add_argument(
        "--plan", type=_path, metavar="FILE", help="a plan for MODEL_DIR, to compare with its masked form"
    )
    verify.add_argument(
        "--original", type=_path, metavar="DIR", help="what the pruned MODEL_DIR was made from"
    )

    doctor = commands.add_parser("doctor", help="show versions and hardware, and test the C core")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _command(commands: Any, name: str, run: Callable[[Any], None], text: str) -> argparse.ArgumentParser:
    """A subcommand with what all that read a model share."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.add_argument("model", type=_path, metavar="MODEL_DIR", help="folder of a Hugging Face model")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run modeling code that the model's folder brings along",
    )
    command.add_argument("--quiet", action="store_true", help="no progress on stderr")
    command.set_defaults(run=run)
    return command


def _ratio(text: str) -> float | dict[str, float]:
    """``0.2``, or ``head=0.25,ffn=0.2``."""
    try:
        if "=" not in text:
            return float(text)
        pairs = [
            (kind.strip(), float(share)) for kind, share in (part.split("=") for part in text.split(","))
        ]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor kind=share,kind=share") from None
    if len(dict(pairs)) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names a kind twice")
    return dict(pairs)


def _path(text: str) -> Path:
    """A path; an empty one (an unset variable of a script) would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _quieten() -> None:
    """Keep other libraries' chatter off stderr: it belongs to progress and to our one sentence."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="llmprune: %(message)s")


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    print()


# --- prune ------------------------------------------------------------------------------------------------------------


def _prune(options: argparse.Namespace) -> None:
    from llmprune.plan import check_choice
    from llmprune.prune import announcer, check_options, prune, save
    from llmprune.score import calibration_for, check_scoring
    from llmprune.stages import Stages

    check_options(
        options.repair,
        options.repair_calibration,
        options.calibration,
        options.output,
        options.overwrite,
        options.form,
    )
    wanted = tuple(options.ratio) if isinstance(options.ratio, dict) else options.kinds
    check_scoring(options.importance, options.aggregation, options.calibration, wanted)
    check_choice(
        options.ratio,
        kinds=options.kinds,
        allocation=options.allocation,
        protect_first=options.protect_first,
        protect_last=options.protect_last,
        round_to=options.round_to,
        norms=options.norms,
    )
    _check_file(options.calibration, "calibration file")
    _check_file(options.repair_calibration, "repair calibration file")
    text = None
    if options.eval is not None:
        _check_file(options.eval, "evaluation file")
        text = _read_text(options.eval)
    _check_plan_file(options.save_plan)
    clock = Stages(announcer(bool(options.quiet)))
    model, tokenizer = _load(options.model, clock, options.trust_remote_code)
    calibration = None
    repair_text = options.repair_calibration or options.calibration
    if repair_text is not None and tokenizer is None:
        raise InputError(
            f"calibration text needs a tokenizer and {options.model} has none: copy the tokenizer's files there"
        )
    if options.calibration is not None:
        calibration = calibration_for(
            options.importance, model, options.calibration, tokenizer, options.samples, options.length
        )
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
        norms=options.norms,
        scope=options.scope,
        seed=options.seed,
        repair=options.repair,
        repair_calibration=None if options.repair == "none" else repair_text,
        verify=not options.no_verify,
        quiet=True if options.quiet else None,
        stages=clock,
    )
    after = _judge(model, tokenizer, text, options.generate, clock, "after")
    if before[0] is not None and after[0] is not None:
        report.perplexity = (before[0], after[0])
    if before[1] is not None and after[1] is not None:
        report.generation = (options.generate, before[1], after[1])
    if options.output is not None:
        save(model, report, tokenizer, options.output, options.overwrite, clock, form=options.form)
    if options.save_plan is not None:
        report.plan.save(options.save_plan)
    if options.json:
        _print_json(report.to_json())
    else:
        print(report)


def _load(directory: Path, clock: Stages, trust: bool) -> tuple[Any, Any]:
    """The model and its tokenizer (None where the folder has none)."""
    from llmprune.checkpoint import load_model, load_tokenizer

    with clock.stage("load", f"reading {directory}"):
        return load_model(directory, trust_remote_code=trust), load_tokenizer(directory)


def _judge(
    model: Any, tokenizer: Any, text: str | None, prompt: str | None, clock: Stages, when: str
) -> tuple[float | None, str | None]:
    """Perplexity on ``text`` and a continuation of ``prompt``, where they are asked for."""
    if (text is not None or prompt is not None) and tokenizer is None:
        raise InputError("--eval and --generate need a tokenizer, and the model's folder has none")
    value = continuation = None
    if text is not None:
        from llmprune.perplexity import perplexity

        with clock.stage(f"eval {when}", f"perplexity {when}"):
            value = perplexity(model, tokenizer, text)
    if prompt is not None:
        continuation = _continue(model, tokenizer, prompt)
    return value, continuation


def _continue(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model writes after ``prompt``, greedily, without the prompt."""
    import torch

    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if encoded["input_ids"].shape[1] == 0:
        raise InputError("the prompt has no tokens: --generate needs at least one")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        ids = model.generate(**encoded, max_new_tokens=GENERATED, do_sample=False, pad_token_id=padding)
    whole: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    start: str = tokenizer.decode(encoded["input_ids"][0], skip_special_tokens=True)
    return whole.removeprefix(start) if whole.startswith(start) else " ... " + whole


def _check_file(path: Path | None, what: str) -> None:
    if path is not None and not path.is_file():
        raise InputError(f"{what} {path} {'is a folder' if path.is_dir() else 'does not exist'}: give a file")


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


def _read_text(path: Path) -> str:
    """A .txt file whole, or the texts of a .jsonl file parted by blank lines."""
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        return content
    from llmprune.calibration import parse_rows

    return "\n\n".join(parse_rows(content, path))


# --- trace, verify, doctor --------------------------------------------------------------------------------------------


def _trace(options: argparse.Namespace) -> None:
    from llmprune.prune import announcer
    from llmprune.report import axes_summary, render_axes
    from llmprune.stages import Stages
    from llmprune.trace import trace

    target = _explained(options.explain) if options.explain else None
    clock = Stages(announcer(bool(options.quiet)))
    model, _ = _load(options.model, clock, options.trust_remote_code)
    with clock.stage("trace", "recording one forward pass"):
        graph = trace(model)
    if target is not None:
        name, dim, index = target
        explanation = str(graph.explain(name, dim=dim, index=index))
        if options.json:
            _print_json(
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
        _print_json(
            {
                "kinds": axes_summary(graph),
                "frozen": frozen,
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
    from llmprune.prune import announcer
    from llmprune.stages import Stages

    if options.plan is not None and options.original is not None:
        raise InputError("give --plan (for an original model) or --original (for a pruned one), not both")
    clock = Stages(announcer(bool(options.quiet)))
    if options.plan is not None:
        from llmprune.plan import Plan
        from llmprune.verify import verify

        _check_file(options.plan, "plan")
        plan = Plan.load(options.plan)
        model, _ = _load(options.model, clock, options.trust_remote_code)
        with clock.stage("verify", "comparing with the masked reference"):
            result: Any = verify(model, plan)
    else:
        from llmprune.recheck import recheck

        model, _ = _load(options.model, clock, options.trust_remote_code)
        original = (
            None if options.original is None else _load(options.original, clock, options.trust_remote_code)[0]
        )
        with clock.stage(
            "verify", "comparing with the original" if original is not None else "running the model"
        ):
            result = recheck(model, original)
    if options.json:
        _print_json(result.to_json())
    else:
        print(result)


def _doctor(options: argparse.Namespace) -> None:
    from llmprune.doctor import doctor

    report = doctor(quiet=options.json)
    if options.json:
        _print_json(report)


if __name__ == "__main__":
    sys.exit(main())
