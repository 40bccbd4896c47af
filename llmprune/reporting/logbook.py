"""Run folders: ``run.json`` lists what was run, with which data, on what machine, and what came of it.

Every command appends one entry; a folder collects the commands that belong together (prune, recover, evaluate of one
model). ``llmprune report`` reads them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from llmprune import __version__
from llmprune.checkpoints.atomic import write_file
from llmprune.errors import InputError
from llmprune.machine.packages import installed
from llmprune.out_of_core.shards import feed

FILE = "run.json"
_FORMAT = 1
_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "peft", "accelerate", "datasets", "lm_eval")


def record(
    folder: str | Path,
    command: str,
    figures: Mapping[str, Any],
    *,
    arguments: Sequence[str] = (),
    seed: int | None = None,
    data: Iterable[str | Path] = (),
) -> Path:
    """Append an entry to the run of a folder, which is made if there is none.

    Args:
        folder: The run's folder.
        command: ``prune``, ``recover``, ``evaluate``, or whatever was done.
        figures: What came of it: ``to_json()`` of a :class:`llmprune.Report`, :class:`llmprune.Evaluation`, ...
        arguments: The words of the command line.
        seed: The seed, where there is one.
        data: Files and folders that were read; each is noted with its sha256.

    Returns:
        The path of ``run.json``, which is replaced in one step.

    Raises:
        InputError: the folder cannot be used, or what its ``run.json`` holds is no run.
    """
    folder = Path(folder)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entry = {
        "command": command,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": list(arguments),
        "seed": seed,
        "data": {str(path): fingerprint(Path(path)) for path in data},
        "versions": versions(),
        "hardware": hardware(),
        "commit": commit(),
        "figures": dict(figures),
    }
    path = folder / FILE
    with _locked(folder):
        before = entries(folder) if path.exists() else []
        content = json.dumps({"format": _FORMAT, "entries": [*before, entry]}, indent=1)
        write_file(path, content.encode())
    return path


def check_folder(folder: Path) -> None:
    """Refuse a folder that no run can be kept in, before any work.

    Raises:
        InputError: it is a file, or holds a ``run.json`` that is no run.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder for the run")
    if (folder / FILE).exists():
        entries(folder)


def entries(folder: str | Path) -> list[dict[str, Any]]:
    """The entries of a run's folder, oldest first.

    Raises:
        InputError: there is no ``run.json``, or it is none of ours.
    """
    path = Path(folder) / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{folder} is no run: it has no {FILE}; prune, recover and evaluate make one with --run {folder}"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): take the run from a copy") from error
    found = content.get("entries") if isinstance(content, dict) else None
    if (
        not isinstance(found, list)
        or not all(isinstance(entry, dict) and {"command", "figures"} <= entry.keys() for entry in found)
        or content.get("format") != _FORMAT
    ):
        raise InputError(f"{path} is no run that this version of llmprune has written: name another folder")
    return found


def fingerprint(path: Path) -> str | None:
    """sha256 of a file, or of the names and contents of a folder's files; None where there is neither."""
    digest = hashlib.sha256()
    if path.is_file():
        feed(digest, path)
    elif path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(str(file.relative_to(path)).encode() + b"\0")
            feed(digest, file)
    else:
        return None
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of llmprune, Python and what else is installed of that which figures depend on."""
    return {"llmprune": __version__, "python": platform.python_version(), **installed(_PACKAGES)}


def hardware() -> dict[str, Any]:
    """The machine: processor, cores, memory in bytes, and the names of GPUs that torch sees."""
    found: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }
    with suppress(ValueError, OSError):
        found["memory"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def processor() -> str:
    """The processor's name."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that llmprune runs from, with a mark where it was changed; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time inside the block, for a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
