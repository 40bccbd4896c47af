"""Texts to evaluate on and to learn from, read from whatever they lie in."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from llmprune.errors import InputError
from llmprune.scoring.calibration import parse_rows

_SPLITS = ("test", "validation", "valid", "dev")


def read_text(path: str | Path, join_lines: bool = False) -> str:
    """One text from a file or a dataset folder.

    Args:
        path: a .txt file (taken as it is), a .jsonl file of rows with "text" or a folder that ``save_to_disk`` of
            datasets wrote, with a column "text" (rows are joined by blank lines; of several splits test is taken, else
            validation).
        join_lines: join the non-empty lines of the text by blank lines, as for WikiText2 and PTB.

    Raises:
        InputError: no such file, not UTF-8, rows without "text", or nothing but blank in it.
    """
    path = Path(path)
    text = "\n\n".join(dataset_texts(path)) if path.is_dir() else _read_file(path)
    if join_lines:
        text = "\n\n".join(line for line in text.split("\n") if line.strip())
    if not text.strip():
        raise InputError(f"{path} holds no text")
    return text


def _read_file(path: Path) -> str:
    content = read_utf8(path)
    return "\n\n".join(parse_rows(content, path)) if path.suffix == ".jsonl" else content


def read_utf8(path: Path) -> str:
    """The content of a file.

    Raises:
        InputError: it is not there, or not UTF-8.
    """
    if not path.is_file():
        raise InputError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: give a file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error


def dataset_texts(folder: Path) -> list[str]:
    """The column "text" of a dataset folder.

    Raises:
        InputError: it is no such folder, or has no text column.
    """
    splits = load_dataset_folder(folder)
    name = next((name for name in _SPLITS if name in splits), None)
    if name is None and len(splits) > 1:
        raise InputError(
            f"{folder} has the splits {', '.join(splits)}, none of them for testing: give the folder of one"
        )
    rows = splits[name or next(iter(splits))]
    if "text" not in rows.column_names:
        raise InputError(f'{folder} has the columns {", ".join(rows.column_names)} and no "text"')
    return [str(text) for text in rows["text"]]


def load_dataset_folder(folder: Path) -> dict[str, Any]:
    """Split -> dataset of a folder that ``save_to_disk`` wrote (one without splits is called "train").

    Raises:
        InputError: the extra is missing, or the folder is something else.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{folder} is a folder, and reading datasets needs an extra: pip install 'llmprune[recover]'"
        ) from error
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_from_disk(str(folder))
    except IndexError as error:  # what datasets makes of a split without rows
        raise InputError(f"a split of {folder} is empty, or its files are damaged: save it again") from error
    except (FileNotFoundError, ValueError, OSError) as error:
        raise InputError(
            f"{folder} is no dataset that save_to_disk wrote: give such a folder, or a .txt, .json or .jsonl file"
        ) from error
    return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}


def digest(path: str | Path) -> str:
    """The sha256 of a file, or of the names and contents of a folder's files."""
    path = Path(path)
    sha = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            sha.update(re.sub(r"[\\/]", "/", str(file.relative_to(path))).encode() + b"\0")
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()
