"""What the commands share: the arguments of all that read a model, reading it, and printing."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.errors import InputError, RankError

if TYPE_CHECKING:
    from llmprune.pipeline.stages import Stages
    from llmprune.scoring.ranks import Ranks


def command(commands: Any, name: str, run: Callable[[Any], None], text: str) -> argparse.ArgumentParser:
    """A subcommand with what all that read a model share."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument(
        "model", type=path_argument, metavar="MODEL_DIR", help="folder of a Hugging Face model"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run modeling code that the model's folder brings along",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(run=run)
    return parser


def run_argument(parser: argparse.ArgumentParser) -> None:
    """``--run DIR``, of the commands whose results a report can show."""
    parser.add_argument(
        "--run", type=path_argument, metavar="DIR", dest="run_folder",
        help="append what was done and found to DIR/run.json, for llmprune report",
    )  # fmt: skip


def note_run(options: argparse.Namespace, figures: Mapping[str, Any], data: Iterable[Path | None]) -> None:
    """Append the command and its figures to the run that was named, if one was; ``data`` are the files it read."""
    if options.run_folder is None:
        return
    from llmprune.reporting.logbook import record

    read = [path for path in data if path is not None]
    seed = getattr(options, "seed", None)
    record(options.run_folder, options.command, figures, arguments=sys.argv[2:], seed=seed, data=read)


def check_run(options: argparse.Namespace) -> None:
    """Refuse a run's folder that cannot be used, before any work."""
    if options.run_folder is not None:
        from llmprune.reporting.logbook import check_folder

        check_folder(options.run_folder)


def path_argument(text: str) -> Path:
    """A path; an empty one (an unset variable of a script) would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def multiple_argument(text: str) -> int | str:
    """A number, or ``auto``."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def ratio_argument(text: str) -> float | dict[str, float]:
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


def names_argument(text: str) -> tuple[str, ...]:
    """Words parted by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def print_json(value: Any) -> None:
    """A value as JSON on stdout."""
    json.dump(value, sys.stdout, indent=2)
    print()


def load(directory: Path, clock: Stages, trust: bool) -> tuple[Any, Any]:
    """The model and its tokenizer (None where the folder has none)."""
    from llmprune.checkpoints.checkpoint import load_model, load_tokenizer

    with clock.stage("load", f"reading {directory}"):
        return load_model(directory, trust_remote_code=trust), load_tokenizer(directory)


@contextmanager
def processes() -> Iterator[Ranks | None]:
    """The processes that torchrun started, connected; None where this one is alone.

    Raises:
        RankError: they cannot be connected.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield None
        return
    import torch
    import torch.distributed as dist

    from llmprune.scoring.ranks import Ranks

    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        # Others may wait for long; one that dies is noticed by its connections.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=timedelta(days=1))
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"the processes of this run cannot be connected ({error}): start them with torchrun"
        ) from error
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()


def check_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Refuse calibration text for a model whose folder has no tokenizer."""
    if tokenizer is None:
        raise InputError(
            f"calibration text needs a tokenizer and {directory} has none: copy the tokenizer's files there"
        )


def check_file(path: Path | None, what: str) -> None:
    """Refuse a path that is no file; None passes."""
    if path is not None and not path.is_file():
        raise InputError(f"{what} {path} {'is a folder' if path.is_dir() else 'does not exist'}: give a file")


def read_text(path: Path) -> str:
    """A .txt file whole, or the texts of a .jsonl file parted by blank lines."""
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        return content
    from llmprune.scoring.calibration import parse_rows

    return "\n\n".join(parse_rows(content, path))
