"""New values of parameters that wait in files until a checkpoint is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from llmprune.errors import CheckpointError
from llmprune.out_of_core.boundaries import write_tensors
from llmprune.out_of_core.reading import Files
from llmprune.out_of_core.shards import Stored, read_header


class Spill(Mapping[str, torch.Tensor]):
    """Name -> tensor, each read from its file when it is asked for.

    Args:
        folder: Where the files go; it is made, and its owner removes it.

    Raises:
        CheckpointError: it cannot be made.
    """

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be made ({error.strerror}): free some space there"
            ) from error
        self._folder, self._files = folder, Files()
        self._count = 0
        self.stored: dict[str, Stored] = {}

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write some down; a name that is here already gets the new value.

        Raises:
            CheckpointError: they cannot be written.
        """
        path = self._folder / f"values-{self._count:05}.safetensors"
        self._count += 1
        write_tensors(path, tensors)
        self.stored.update(read_header(path))

    def __getitem__(self, name: str) -> torch.Tensor:
        """One of them."""
        return self._files.tensor(self.stored[name])

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(sorted(self.stored))

    def __len__(self) -> int:
        """How many there are."""
        return len(self.stored)
