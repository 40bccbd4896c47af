"""What passes the borders of blocks while a model is scored block by block: in memory, or apart from it.

Apart is on disk, or for blocks that run on a device in pinned host memory.

With a :class:`Journal`, what every block gave, forward and backward, is on disk before the next one begins, so that a
process that is killed can be followed by another that goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from llmprune import __version__
from llmprune.checkpoints.atomic import write_file
from llmprune.errors import CheckpointError, InputError
from llmprune.out_of_core.reading import forget
from llmprune.out_of_core.shards import UNREADABLE
from llmprune.out_of_core.stored import Source
from llmprune.scoring.calibration import Batch
from llmprune.scoring.importance import Importance
from llmprune.scoring.reduction import Sums

_SIGNATURE = "signature.json"
CPU = torch.device("cpu")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file whole and have the disk hold it; the page cache is not filled with it.

    Raises:
        CheckpointError: it cannot be written.
    """
    temporary = path.with_suffix(".partial")
    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            forget(descriptor, 0, 0)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise _unwritten(path.parent, error) from error


def _unwritten(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"what passes between blocks cannot be written to {folder} ({error}): free some space there"
    )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What :func:`write_tensors` wrote."""
    with safe_open(path, framework="pt", backend="pread") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


class Boundaries:
    """Tensors that autograd keeps at the borders of blocks: as they are, or apart.

    Args:
        apart: Whether in files of a folder of their own, or of a device's in pinned host memory.
        journal: Where blocks' results are on disk already; these are not written again.
        device: Where they are made.
    """

    def __init__(self, apart: bool, journal: Journal | None, device: torch.device = CPU):
        self._apart, self._journal, self._device = apart, journal, device
        self._folder: Path | None = None
        self._count = 0

    def keeping(self) -> contextlib.AbstractContextManager[Any]:
        """Within this, what autograd saves is kept here."""
        if self._device.type == "cuda":
            pinned = torch.autograd.graph.save_on_cpu(pin_memory=True)
            return pinned if self._apart else contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: torch.Tensor) -> Any:
        """Put a tensor away."""
        if not self._apart:
            return tensor
        held = None if self._journal is None else self._journal.place_of(tensor)
        if held is not None:
            return held
        if self._folder is None:
            try:
                self._folder = Path(tempfile.mkdtemp(prefix="llmprune-blocks-"))
            except OSError as error:
                raise _unwritten(Path(tempfile.gettempdir()), error) from error
        path = self._folder / f"{self._count}.safetensors"
        self._count += 1
        write_tensors(path, {"0": tensor})
        return path, "0", True

    @staticmethod
    def unpack(kept: Any) -> torch.Tensor:
        """Get it back; a file that nobody else reads goes."""
        if isinstance(kept, torch.Tensor):
            return kept
        path, name, own = kept
        tensor = read_tensors(path)[name] if own else _read_one(path, name)
        if own:
            path.unlink()
        return tensor

    def close(self) -> None:
        """Remove the folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _read_one(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt", backend="pread") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def signature(
    model: nn.Module, source: Source, batch: Batch, importance: Importance, **further: Any
) -> dict[str, Any]:
    """What the results of single blocks depend on, as JSON; ``further`` is what else they do."""
    files = sorted({stored.file for stored in source.tensors.values()})
    return {
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "class": type(model).__name__,
        "config": hashlib.sha256((source.folder / "config.json").read_bytes()).hexdigest(),
        "calibration": batch.hash,
        "importance": importance.name,
        "versions": [__version__, torch.__version__],
        **further,
    }


class Journal:
    """A folder with the results of blocks that are done.

    Args:
        folder: Made if it does not exist. One that holds anything but a journal is refused.
        signature: What the results depend on (JSON values); results of another signature are removed.
        device: Where results are wanted.

    Attributes:
        found: How many results an earlier process has left.

    Raises:
        InputError: the folder holds something else.
        CheckpointError: it cannot be made.
    """

    def __init__(self, folder: Path, signature: Mapping[str, Any], device: torch.device = CPU):
        self.folder, self._device = folder, device
        text = json.dumps(signature, sort_keys=True)
        here = sorted(folder.iterdir()) if folder.is_dir() else []
        if here and not (folder / _SIGNATURE).is_file():
            raise InputError(f"{folder} holds no state of llmprune: give another folder for it")
        if not here or (folder / _SIGNATURE).read_text(encoding="utf-8") != text:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True)
                write_file(folder / _SIGNATURE, text.encode())
            except OSError as error:
                shutil.rmtree(folder, ignore_errors=True)
                raise CheckpointError(
                    f"the state of a streamed job cannot be written to {folder} ({error}): free some space there"
                ) from error
        self.found = sum(path.suffix == ".npz" or path.suffix == ".safetensors" for path in folder.iterdir())
        self._last: list[tuple[int, int, str]] = []
        self._path = folder

    def _tensors(self, kind: str, number: int | str) -> Path:
        return self.folder / f"{kind}-{number}.safetensors"

    def put(self, kind: str, number: int | str, tensors: Sequence[torch.Tensor | None]) -> None:
        """Write down a result; None entries stay None."""
        path = self._tensors(kind, number)
        write_tensors(path, {str(i): t for i, t in enumerate(tensors) if t is not None})
        self._last = [(t.data_ptr(), t.numel(), str(i)) for i, t in enumerate(tensors) if t is not None]
        self._path = path

    def get(self, kind: str, number: int | str, count: int) -> list[torch.Tensor | None] | None:
        """A result of ``count`` tensors; None if it has not been written down."""
        path = self._tensors(kind, number)
        if not path.is_file():
            return None
        tensors = read_tensors(path)
        self._last = [(t.data_ptr(), t.numel(), name) for name, t in tensors.items()]
        self._path = path
        found = [tensors.get(str(i)) for i in range(count)]
        return [None if tensor is None else tensor.to(self._device) for tensor in found]

    def drop(self, kind: str, number: int | str) -> None:
        """Take a result away that nobody will ask for."""
        self._tensors(kind, number).unlink(missing_ok=True)

    def note(self, name: str, value: Any) -> None:
        """Write down a JSON value.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            write_file(self.folder / f"{name}.json", json.dumps(value).encode())
        except OSError as error:
            raise CheckpointError(
                f"the state of a streamed job cannot be written to {self.folder} ({error}): free some space there"
            ) from error

    def noted(self, name: str) -> Any:
        """What :meth:`note` wrote; None if it has not."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def place_of(self, tensor: torch.Tensor) -> tuple[Path, str, bool] | None:
        """Where a tensor lies if it is part of the latest result."""
        for address, length, name in self._last:
            if (tensor.data_ptr(), tensor.numel()) == (address, length):
                return self._path, name, False
        return None

    def put_sums(self, number: int | str, sums: Sums) -> None:
        """Write down what a block's parameters came to."""
        target = self.folder / f"sums-{number}.npz"
        temporary = target.with_suffix(".partial")
        try:
            with temporary.open("wb") as file:
                arrays = {f"{name}/{dim}": a for name, dims in sums.items() for dim, a in enumerate(dims)}
                np.savez(file, allow_pickle=False, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"the sums of a block cannot be written to {self.folder} ({error}): free some space there"
            ) from error

    def get_sums(self, number: int | str) -> Sums | None:
        """What :meth:`put_sums` wrote; None if it has not."""
        path = self.folder / f"sums-{number}.npz"
        if not path.is_file():
            return None
        sums: Sums = {}
        try:
            with np.load(path, allow_pickle=False) as data:
                for key in data.files:
                    sums.setdefault(key.rpartition("/")[0], []).append(data[key])
        except UNREADABLE as error:
            raise CheckpointError(
                f"{path} is damaged ({error}): remove {self.folder}, which begins the job anew"
            ) from error
        return sums

    def remove(self) -> None:
        """The job is done: take the folder away."""
        shutil.rmtree(self.folder, ignore_errors=True)
