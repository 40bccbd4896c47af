"""Calibration data: token ids from whatever the caller has (ids, texts, a file), checked and hashed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmprune.arguments import is_whole
from llmprune.errors import CalibrationError, InputError

SAMPLES = 10
"""Samples taken from texts unless asked otherwise (the paper's code)."""
LENGTH = 64
"""Tokens per sample taken from texts unless asked otherwise (the paper's code)."""
LONG_SAMPLES, LONG_LENGTH = 16, 128
"""The same for what is fitted to activations, which takes more of them than gradients do."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Calibration samples: tensors whose first dimension is the sample.

    ``inputs`` holds either ``input_ids`` alone (int64, samples x length: the next-token loss applies) or whatever a
    user's ``loss`` reads. ``hash`` is the sha256 of names, shapes and contents.
    """

    inputs: dict[str, torch.Tensor]
    hash: str

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return next(iter(self.inputs.values())).shape[0]

    @property
    def tokens(self) -> int:
        """Samples x length, for whatever input is longest per sample in its second dimension."""
        return max(t.shape[0] * (t.shape[1] if t.dim() > 1 else 1) for t in self.inputs.values())

    def take(self, start: int, stop: int) -> Batch:
        """Samples ``start`` to ``stop``, as views."""
        return Batch({name: t[start:stop] for name, t in self.inputs.items()}, self.hash)

    def to(self, device: torch.device) -> Batch:
        """The same samples on ``device``."""
        return Batch({name: t.to(device) for name, t in self.inputs.items()}, self.hash)

    def sketch(self, length: int) -> Batch:
        """Two samples for a trial run (the only one twice), cut to ``length`` tokens where they are plain ids."""
        chosen = [0, min(1, self.samples - 1)]
        inputs = {name: t[chosen] for name, t in self.inputs.items()}
        if set(inputs) == {"input_ids"}:
            inputs = {"input_ids": inputs["input_ids"][:, :length]}
        return Batch(inputs, self.hash)


def _digest(inputs: Mapping[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(inputs):
        tensor = inputs[name].detach().cpu().contiguous()
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return sha.hexdigest()


def load_calibration(
    source: Any,
    tokenizer: Any = None,
    *,
    samples: int = SAMPLES,
    length: int = LENGTH,
    vocabulary: int | None = None,
    fewer: bool = False,
) -> Batch:
    """Turn what the caller has into a :class:`Batch`.

    Args:
        source: An integer tensor (or NumPy array) of token ids, samples x length; a list of texts; a path to a .txt
            file (one text) or a .jsonl file (rows with "text"); or a mapping of tensors whose first dimension is the
            sample, for models that are no causal language models.
        tokenizer: What turns texts into ids: called as ``tokenizer(text)["input_ids"]``.
        samples: How many samples to take from texts.
        length: How many tokens each has. Texts of at least ``length`` tokens give one sample each, from their start;
            if these are too few, all texts are joined and cut into consecutive samples.
        vocabulary: The number of token ids the model knows; None leaves them unchecked.
        fewer: Whether fewer samples will do, at least two, where the texts have no more tokens.

    Raises:
        CalibrationError: no usable data (missing file, rows without "text", too few tokens, ids out of range).
        InputError: the wrong kind of argument (a float tensor, texts without a tokenizer).
    """
    if isinstance(source, Batch):
        return source
    if isinstance(source, Mapping):
        return _from_mapping(source)
    if isinstance(source, np.ndarray):
        source = torch.from_numpy(source)
    if isinstance(source, (str, os.PathLike)):
        source = _read(Path(source))
    elif isinstance(source, (bytes, bytearray)) or not isinstance(source, (torch.Tensor, Iterable)):
        raise InputError(
            f"calibration is a {type(source).__name__}: give a tensor of token ids (samples x length), a list of "
            "texts with a tokenizer, or a path to a .txt or .jsonl file"
        )
    if not isinstance(source, torch.Tensor):
        source = _tokenize(list(source), tokenizer, samples, length, fewer)
    return _from_ids(source, vocabulary)


def _from_ids(ids: torch.Tensor, vocabulary: int | None) -> Batch:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(
            f"calibration ids have dtype {ids.dtype}: an integer tensor (samples x length) is expected"
        )
    if ids.dim() != 2:
        raise InputError(f"calibration ids have shape {tuple(ids.shape)}: samples x length is expected")
    count, length = ids.shape
    if count < 1 or length < 2:
        raise CalibrationError(
            f"calibration has {count} samples of {length} tokens: at least 1 sample of 2 tokens is needed for a "
            "next-token loss"
        )
    ids = ids.to(torch.int64)
    _check_range(ids, vocabulary)
    inputs = {"input_ids": ids}
    return Batch(inputs, _digest(inputs))


def _check_range(ids: torch.Tensor, vocabulary: int | None) -> None:
    if ids.is_meta:
        raise InputError("calibration ids are on the meta device and have no values: give real ones")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        bad = low if low < 0 else high
        sample = int((ids == bad).nonzero()[0, 0])
        limit = f" of {vocabulary} tokens" if vocabulary is not None else ""
        raise CalibrationError(
            f"token id {bad} in calibration sample {sample} is outside the model's vocabulary{limit}: was another "
            "model's tokenizer used?"
        )


def _from_mapping(source: Mapping[str, Any]) -> Batch:
    inputs: dict[str, torch.Tensor] = {}
    for name, value in source.items():
        tensor = torch.as_tensor(value)
        if tensor.dim() < 1:
            raise InputError(
                f"calibration input {name!r} is a scalar: its first dimension must be the sample"
            )
        inputs[str(name)] = tensor
    counts = {name: tensor.shape[0] for name, tensor in inputs.items()}
    if not counts or len(set(counts.values())) != 1 or 0 in counts.values():
        raise CalibrationError(f"calibration inputs disagree on, or lack, samples (name: samples): {counts}")
    return Batch(inputs, _digest(inputs))


def _read(path: Path) -> list[str]:
    if not path.is_file():
        raise CalibrationError(f"calibration file {str(path)!r} does not exist or is no file")
    if path.suffix not in {".txt", ".jsonl"}:
        raise InputError(f"calibration file {str(path)!r} ends neither in .txt nor in .jsonl")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"calibration file {str(path)!r} is not UTF-8 text: {error}") from error
    if path.suffix == ".txt":
        return [content]
    return parse_rows(content, path)


def parse_rows(content: str, path: Path) -> list[str]:
    """The texts of a .jsonl file: one JSON object with a string under "text" on each line that is not blank.

    Raises:
        CalibrationError: a line that is something else; the message names it.
    """
    texts = []
    # Not splitlines(), which also parts at characters that JSON strings may hold (U+2028).
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"line {number} of {str(path)!r} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise CalibrationError(
                f'line {number} of {str(path)!r} is not an object with a string under "text"'
            )
        texts.append(row["text"])
    return texts


_CHARACTERS = 1 << 16
"""How many characters of a text are tokenised at first: a whole book is not read for ten samples."""


def _encode(text: str, tokenizer: Any, enough: int) -> list[int]:
    """The ids of ``text``, or of a head of it that gives at least ``enough`` ids."""
    size = max(_CHARACTERS, 8 * enough)
    while True:
        ids = tokenizer(text[:size])["input_ids"]
        ids = [int(i) for i in ids]
        if size >= len(text) or len(ids) > enough:
            return ids[:enough] if size < len(text) else ids
        size *= 4


def _tokenize(texts: Sequence[Any], tokenizer: Any, samples: int, length: int, fewer: bool) -> torch.Tensor:
    """Int64 ids, ``samples`` x ``length``, from ``texts`` by the rule of :func:`load_calibration`."""
    if not is_whole(samples, 1) or not is_whole(length, 2):
        raise InputError(
            f"{samples} samples of {length} tokens were asked for: at least 1 of 2 tokens is possible"
        )
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"calibration texts hold a {type(text).__name__}: each must be a string")
    if tokenizer is None:
        raise InputError("calibration texts need a tokenizer: pass tokenizer=, or a tensor of token ids")
    if not callable(tokenizer):
        raise InputError(
            f"the tokenizer is a {type(tokenizer).__name__}: give an object, as AutoTokenizer.from_pretrained makes it"
        )
    needed = samples * length
    rows: list[list[int]] = []
    joined: list[int] = []
    for text in texts:
        ids = _encode(text, tokenizer, needed)
        if len(ids) >= length:
            rows.append(ids[:length])
        joined.extend(ids)
        if len(rows) == samples:
            return torch.tensor(rows, dtype=torch.int64)
        if len(texts) == 1:
            break
    if fewer and len(joined) >= 2 * length:
        samples = min(samples, len(joined) // length)
        needed = samples * length
    if len(joined) < needed:
        raise CalibrationError(
            f"calibration text has {len(joined)} tokens, {needed} are needed ({samples} samples of {length}): "
            "give more text, or ask for fewer or shorter samples"
        )
    return torch.tensor(joined[:needed], dtype=torch.int64).view(samples, length)
