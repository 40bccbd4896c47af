"""Tasks of lm-eval (the Language Model Evaluation Harness), through its own API, on a model that is in memory."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from llmprune.errors import InputError
from llmprune.evaluation.perplexity import positions
from llmprune.reporting.published import paper_task

PAPER = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
"""The paper's seven tasks, and which accuracy its table gives (it does not say; these are the ones that lie beside its
figures when its released models are measured: issue 25 of its repository)."""

_LONG = 2048
"""lm-eval's length for models that state none."""

_LOADING = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError)


def chosen_metric(task: str, metrics: Sequence[str]) -> str | None:
    """The accuracy that enters the average; None where there is none.

    For the paper's tasks, also under a name that begins with one of theirs, it is the paper's; else ``acc_norm`` or,
    where there is no such, ``acc``.
    """
    name = paper_task(task)
    wanted = None if name is None else PAPER[name]
    return next((m for m in (wanted, "acc_norm", "acc") if m is not None and m in metrics), None)


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-eval; the figures are those of its command line with the same settings.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: names lm-eval knows, or that the folder defines; ``paper`` stands for the paper's seven.
        include_path: a folder of further task files. A relative name under ``data_files`` is looked up beside its task
            file first, then in the working directory, as lm-eval does.
        num_fewshot: examples in front of each question; None leaves it to the task.
        limit: questions per task; None runs all.
        batch_size: sequences at once.
        max_length: longest context in tokens; None: the model's positions, or lm-eval's 2048 where the model has fewer
            and no table of positions (rotary embeddings go on). A continuation longer than it cannot be scored.
        quiet: show no progress.

    Returns:
        Task -> metric -> value, metrics as lm-eval names them, without ``,none``; and ``samples``, the
        questions there were.

    Raises:
        InputError: the extra is missing, a task is unknown, its data cannot be had, or an answer is too long.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError("tasks need an extra: pip install 'llmprune[eval]'") from error
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"{include_path} is no folder: give the folder with the task files")
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} questions leaves none: 1 is the least")
    with _hushed(quiet):
        names = [name for task in tasks for name in (PAPER if task == "paper" else [task])]
        manager = _manager(TaskManager, names, include_path)
        loaded = [part for name in names for part in _load(manager, name, include_path)]
        wrapped = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length or _length(model),
        )
        try:
            results = lm_eval.simple_evaluate(
                wrapped,
                tasks=loaded,
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                log_samples=False,
            )
        except AssertionError as error:
            raise InputError(
                f"lm-eval cannot score a continuation of these tasks with {wrapped.max_length} tokens of context: "
                "either it is longer (give a greater --max-length), or the tokenizer gives it no token of its own"
            ) from error
    if results is None:  # on other ranks than the first of a distributed run
        return {}
    out: dict[str, dict[str, Any]] = {}
    for name, figures in results["results"].items():
        out[name] = {
            key.removesuffix(",none"): value
            for key, value in figures.items()
            if key not in ("alias", "name", "sample_len")
        }
        counts = results.get("n-samples", {}).get(name)
        if counts is not None:
            out[name]["samples"] = counts["effective"]
    return out


def _manager(kind: Any, names: Sequence[str], include_path: str | Path | None) -> Any:
    """lm-eval's index of tasks; its own thousands of files are read only for what the folder does not define."""
    if include_path is not None:
        manager = kind(include_path=str(include_path), include_defaults=False)
        if all(name in manager.task_index for name in names):
            return manager
    return kind(include_path=None if include_path is None else str(include_path))


def _load(manager: Any, name: str, include_path: str | Path | None) -> list[Any]:
    """The tasks behind a name, with their data loaded."""
    entry = manager.task_index.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, manager.all_tasks, 3, 0.5)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        where = "" if include_path is None else f" and {include_path} defines none"
        raise InputError(f"lm-eval knows no task {name!r}{where}{hint}")
    if not entry.yaml_path and entry.tags:
        return [task for part in sorted(entry.tags) for task in _load(manager, part, include_path)]
    local = include_path and entry.yaml_path
    if local and Path(entry.yaml_path).resolve().is_relative_to(Path(include_path or "").resolve()):
        places = [Path(entry.yaml_path).parent, Path.cwd()]
    else:
        places = [Path.cwd()]
    failures: list[BaseException] = []
    for place in places:
        try:
            with _inside(place):
                found = manager.load([name])
            return [*found["groups"].values()] or [*found["tasks"].values()]
        except _LOADING as error:
            failures.append(error)
            if not isinstance(error, FileNotFoundError):
                break
    lines = str(failures[0]).strip().splitlines() or [type(failures[0]).__name__]
    raise InputError(
        f"the task {name!r} cannot be loaded ({lines[0][:200]}): without a network its data must be in the local cache "
        "of datasets, or in a folder of task files with local data (--include-path)"
    ) from failures[0]


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder: relative names of a task's data mean the working directory to lm-eval."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _length(model: Any) -> int | None:
    """The context length to use; None leaves it to lm-eval."""
    limit = positions(model)
    if limit is None or limit >= _LONG:
        return None
    vocabulary = {
        id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None
    }
    tensors = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in vocabulary]
    # A table of positions has as many rows, or a few more.
    table = any(limit <= size <= limit + 2 for t in tensors if t.dim() > 1 for size in t.shape)
    return None if table else _LONG


@contextmanager
def _hushed(quiet: bool) -> Iterator[None]:
    """Inside the block lm-eval and datasets speak of errors only, on stderr, and if quiet not at all."""
    names = ("lm_eval", "lm-eval", "datasets")
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    for logger, _ in levels:
        logger.setLevel(logging.ERROR)
    try:
        with ExitStack() as stack:
            target = stack.enter_context(open(os.devnull, "w")) if quiet else sys.stderr
            stack.enter_context(redirect_stdout(target))
            stack.enter_context(redirect_stderr(target))
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
