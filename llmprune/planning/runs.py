"""Lists of indices as text that people can read."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


_LARGEST = (1 << 28) - 1
"""The largest index that is read: a file of some bytes must not ask for more memory than the largest layers do."""


def encode_indices(indices: Iterable[int]) -> str:
    """Sorted non-negative integers as runs, ``"0-4,6,9-12"``."""
    values = np.asarray(list(indices) if not isinstance(indices, np.ndarray) else indices, dtype=np.int64)
    if not values.size:
        return ""
    breaks = np.flatnonzero(np.diff(values) != 1)
    first, last = values[np.r_[0, breaks + 1]], values[np.r_[breaks, values.size - 1]]
    return ",".join(
        str(a) if a == b else f"{a}-{b}" for a, b in zip(first.tolist(), last.tolist(), strict=True)
    )


def decode_indices(text: str) -> Indices:
    """The inverse of :func:`encode_indices`.

    Raises:
        ValueError: the text is none that it writes, or lists more than any tensor has.
    """
    runs = [part.partition("-") for part in text.split(",") if part]
    last = -1
    for a, _, b in runs:
        if not last < int(a) <= int(b or a) <= _LARGEST:
            raise ValueError(f"{a}-{b or a} is no run of rising indices")
        last = int(b or a)
    parts = [np.arange(int(a), int(b or a) + 1, dtype=np.int64) for a, _, b in runs]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def encode_rows(indices: Indices) -> str | list[str]:
    """Indices as runs; of an array of rows, each row's."""
    return encode_indices(indices) if indices.ndim == 1 else [encode_indices(row) for row in indices]


def decode_rows(text: str | list[str]) -> Indices:
    """The inverse of :func:`encode_rows`."""
    return decode_indices(text) if isinstance(text, str) else np.stack([*map(decode_indices, text)])
