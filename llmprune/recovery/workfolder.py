"""The folder in which a recovery keeps its checkpoints."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from llmprune.checkpoints.atomic import write_file
from llmprune.errors import CheckpointError, InputError
from llmprune.out_of_core.shards import read_json

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class WorkFolder:
    """The folder of checkpoints: made, recognised as the same run's, and taken away in the end."""

    def __init__(self, work: Any, output: Any, state: Any, settings: dict[str, Any], restart: bool) -> None:
        from accelerate.utils import broadcast_object_list

        self.lasting = work is not None or output is not None
        if work is None and output is not None:
            work = Path(output).with_name(Path(output).resolve().name + ".training")
        if work is None:
            made = [tempfile.mkdtemp(prefix="llmprune-") if state.is_main_process else ""]
            work = broadcast_object_list(made)[0]
        self.folder = Path(work)
        if state.is_main_process:
            self._claim(json.loads(json.dumps(settings)), restart)
        state.wait_for_everyone()

    def _claim(self, settings: dict[str, Any], restart: bool) -> None:
        file = self.folder / "settings.json"
        if restart and file.is_file():
            shutil.rmtree(self.folder)
        if file.is_file():
            before = read_json(file)
            for name in settings:
                if before.get(name) != settings[name]:
                    raise InputError(
                        f"{self.folder} holds a run with {name} {before.get(name)!r}, not {settings[name]!r}: take the "
                        "same settings to go on with it, begin anew (--restart), or choose another folder (--work)"
                    )
            return
        if self.folder.is_dir() and any(self.folder.iterdir()) and self.lasting:
            raise InputError(
                f"{self.folder} is not empty and holds no recovery: choose another folder (--work)"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(file, json.dumps(settings, indent=2).encode())
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be written ({error.strerror}): choose another (--work)"
            ) from error

    def last(self) -> Path | None:
        """The newest checkpoint that is complete: its state is what is written last."""
        found = [
            (int(path.name.rpartition("-")[2]), path)
            for path in self.folder.glob("checkpoint-*")
            if (path / "trainer_state.json").is_file() and _is_json(path / "trainer_state.json")
        ]
        return max(found)[1] if found else None

    def remove(self) -> None:
        """Take the folder away."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def is_full(error: BaseException) -> bool:
    """Whether an exception, or one that led to it, says that the disk is full (some libraries say so in words only)."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _NO_SPACE:
            return True
        if any(f"os error {code})" in str(seen) for code in _NO_SPACE) or "file write failed" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def signature(model: nn.Module) -> str:
    """Identifies a model by its weights' names, sizes and a few of their values."""
    sha = hashlib.sha256()
    for name, tensor in model.named_parameters():
        head = tensor.detach().reshape(-1)[:16].float().cpu().numpy().tobytes()
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + head)
    return sha.hexdigest()
