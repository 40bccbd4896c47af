"""What a pruned model recovers on: instruction records and plain texts, turned into tokens and labels."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.errors import InputError
from llmprune.evaluation.texts import digest, load_dataset_folder, read_utf8

CUTOFF = 256
"""Tokens per example (the paper's code)."""

IGNORED = -100
"""Label of a token that no loss is taken on."""

WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""
WITHOUT_INPUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""
"""Alpaca's prompts; the answer follows at once."""

LOSSES = ("answer", "all")

_VALIDATION = ("validation", "valid", "dev", "test")


@dataclass(frozen=True)
class Example:
    """One sequence to learn.

    Attributes:
        ids: token ids.
        labels: the same, or :data:`IGNORED` where no loss is taken; the first always is (nothing foretells it).
    """

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Data:
    """Examples and where they come from.

    Attributes:
        train: to learn from.
        validation: to choose the best checkpoint by.
        rows: records that were read.
        dropped: records of which nothing is left to learn (the prompt alone fills the cutoff, or the text is empty).
        hash: sha256 of the source (of the rows' JSON for what was given in memory).
    """

    train: list[Example]
    validation: list[Example]
    rows: int
    dropped: int
    hash: str


def load_data(
    source: Any,
    tokenizer: Any,
    *,
    cutoff: int = CUTOFF,
    loss_on: str = "answer",
    eos: bool = False,
    validation: int | float | None = None,
    seed: int = 0,
    rows: int | None = None,
) -> Data:
    """Read, encode and split.

    Args:
        source: a .json or .jsonl file of records, a .txt file (one text), a folder that ``save_to_disk`` of datasets
            wrote (its validation or test split, if it has one, is what is validated on), or a list of records. A record
            is a mapping with "instruction" and "output" (and "input", which may be empty) as Alpaca's, one with "text",
            or a string.
        tokenizer: what turns text into ids, as it does by default (with its begin-of-sequence token).
        cutoff: tokens per example. Instruction records are cut off there; texts go on in further examples.
        loss_on: ``answer`` takes the loss of an instruction record on its output alone, ``all`` on the prompt as well.
            Texts are learned whole.
        eos: end each record with the tokenizer's end-of-sequence token, where there is room.
        validation: examples to keep for validation, as a number or a share; 0 keeps none. None takes 2000 (the paper's
            code), but at most a tenth.
        seed: of the split and of the order before it.
        rows: use only so many records, chosen by the seed.

    Raises:
        InputError: a source that cannot be read, a record of the wrong form (the message names its row and field), or
            nothing to learn from or to validate on.
    """
    if loss_on not in LOSSES:
        raise InputError(f"unknown loss_on {loss_on!r}: there are {', '.join(LOSSES)}")
    if cutoff < 2:
        raise InputError(f"a cutoff of {cutoff} tokens leaves nothing to foretell: 2 is the least")
    records, held, name, hashed = read_records(source)
    if rows is not None:
        if rows < 1:
            raise InputError(f"{rows} rows were asked for: 1 is the least")
        if rows < len(records):
            records = random.Random(seed).sample(records, rows)
    encoder = _Encoder(tokenizer, cutoff, loss_on, eos, name)
    train, dropped = encoder.all(records)
    if not train:
        raise InputError(
            f"{name} has nothing to learn from: each of its {len(records)} rows is empty or all prompt"
        )
    if held is not None and validation != 0:
        kept, lost = encoder.all(held)
        if not kept:
            raise InputError(f"the validation split of {name} is empty")
        return Data(train, kept, len(records) + len(held), dropped + lost, hashed)
    random.Random(seed).shuffle(train)
    count = _validation_count(validation, len(train), name)
    return Data(train[count:], train[:count], len(records), dropped, hashed)


def _validation_count(validation: int | float | None, examples: int, name: str) -> int:
    if validation is None:
        count = min(2000, examples // 10)
    elif isinstance(validation, float) and not validation.is_integer():
        count = round(validation * examples)
        if not 0 < validation < 1 or count == 0:
            raise InputError(
                f"a validation share of {validation} of {examples} examples keeps none or all of them"
            )
    else:
        count = int(validation)
    if not 0 <= count < examples:
        raise InputError(
            f"{count} examples for validation were asked for and {name} gives {examples}: leave some to learn from"
        )
    return count


@dataclass(frozen=True)
class _Encoder:
    tokenizer: Any
    cutoff: int
    loss_on: str
    eos: bool
    name: str

    def all(self, records: Sequence[Any]) -> tuple[list[Example], int]:
        """The examples of the records, and how many of these gave none."""
        if self.tokenizer is None:
            raise InputError(
                f"{self.name} needs a tokenizer: give one, or copy its files to the model's folder"
            )
        out: list[Example] = []
        dropped = 0
        for number, record in enumerate(records, 1):
            found = self._one(record, number)
            out += found
            dropped += not found
        return out, dropped

    def _one(self, record: Any, number: int) -> list[Example]:
        if isinstance(record, str):
            return self._text(record)
        if not isinstance(record, Mapping):
            raise InputError(
                f"row {number} of {self.name} is a {type(record).__name__}: each must be an object or a string"
            )
        if "text" in record and "instruction" not in record:
            return self._text(self._field(record, "text", number))
        instruction, output = (self._field(record, field, number) for field in ("instruction", "output"))
        context = self._field(record, "input", number) if record.get("input") else ""
        template = WITH_INPUT if context else WITHOUT_INPUT
        return self._instruction(template.format(instruction=instruction, input=context), output)

    def _field(self, record: Mapping[str, Any], field: str, number: int) -> str:
        if field not in record:
            known = ", ".join(map(str, record)) or "none"
            raise InputError(
                f'row {number} of {self.name} has no "{field}" (its fields: {known}): a row needs "instruction" and '
                '"output", or "text"'
            )
        if not isinstance(record[field], str):
            raise InputError(
                f'"{field}" of row {number} of {self.name} is a {type(record[field]).__name__}: it must be a string'
            )
        return str(record[field])

    def _encode(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer(text, verbose=False)["input_ids"]]

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [*ids, end] if self.eos and end is not None and ids[-1:] != [end] else ids

    def _text(self, text: str) -> list[Example]:
        ids = self._ended(self._encode(text)) if text.strip() else []
        pieces = [ids[i : i + self.cutoff] for i in range(0, len(ids), self.cutoff)]
        return [Example(piece, [IGNORED, *piece[1:]]) for piece in pieces if len(piece) > 1]

    def _instruction(self, prompt: str, answer: str) -> list[Example]:
        ids = self._ended(self._encode(prompt + answer))[: self.cutoff]
        first = 1
        if self.loss_on == "answer":
            # A token may reach over the border: what the two encodings share is prompt, the rest is answer.
            alone = self._encode(prompt)
            pairs = zip(ids, alone, strict=False)
            first = max(1, next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(alone))))
        if first >= len(ids):
            return []
        return [Example(ids, [IGNORED] * first + ids[first:])]


def read_records(source: Any) -> tuple[list[Any], list[Any] | None, str, str]:
    """Of a source as :func:`load_data` takes it: records, those to validate on (or None), its name, and its hash."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            splits = load_dataset_folder(path)
            train = splits.get("train") if len(splits) > 1 else next(iter(splits.values()))
            if train is None:
                raise InputError(f'{path} has the splits {", ".join(splits)} and no "train"')
            held = next((splits[name] for name in _VALIDATION if len(splits) > 1 and name in splits), None)
            return list(train), None if held is None else list(held), str(path), digest(path)
        records = _records(path)
        if not records:
            raise InputError(f"{path} has no rows")
        return records, None, str(path), digest(path)
    if isinstance(source, Mapping) or not hasattr(source, "__iter__"):
        raise InputError(
            f"the dataset is a {type(source).__name__}: give a path or a list of records (mappings or strings)"
        )
    import hashlib

    records = list(source)
    if not records:
        raise InputError("the dataset has no rows")
    text = json.dumps(records, sort_keys=True, default=str)
    return records, None, "the dataset", hashlib.sha256(text.encode()).hexdigest()


def _records(path: Path) -> list[Any]:
    content = read_utf8(path)
    if path.suffix == ".txt":
        return [content]
    if path.suffix == ".jsonl":
        out = []
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                try:
                    out.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise InputError(f"line {number} of {path} is not JSON: {error}") from error
        return out
    if path.suffix == ".json":
        try:
            found = json.loads(content)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON: {error}") from error
        if not isinstance(found, list):
            raise InputError(f"{path} holds a {type(found).__name__}: a list of records is expected")
        return found
    raise InputError(
        f"{path} has an unknown ending: .json, .jsonl and .txt files and saved datasets are read"
    )
