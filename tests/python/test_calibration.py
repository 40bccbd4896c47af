"""Calibration data: from ids, texts and files to samples."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.errors import CalibrationError
from llmprune.scoring.calibration import load_calibration


class Words:
    """A tokenizer: one id a word, its number in the order of appearance; counts the characters it was given."""

    def __init__(self):
        self.known: dict[str, int] = {}
        self.characters = 0

    def __call__(self, text):
        self.characters += len(text)
        return {"input_ids": [self.known.setdefault(word, len(self.known)) for word in text.split()]}


def text(words, start=0):
    return " ".join(f"w{start + i}" for i in range(words))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_ids_come_through(dtype):
    ids = torch.arange(12).reshape(3, 4)
    batch = load_calibration(ids.to(dtype))
    assert torch.equal(batch.inputs["input_ids"], ids)
    assert batch.inputs["input_ids"].dtype == torch.int64
    assert (batch.samples, batch.tokens) == (3, 12)
    assert batch.hash == load_calibration(ids.numpy()).hash != load_calibration(ids.flip(0)).hash
    assert load_calibration(batch) is batch


def test_the_hash_tells_shapes_apart():
    ids = torch.arange(12)
    assert load_calibration(ids.view(3, 4)).hash != load_calibration(ids.view(4, 3)).hash


def test_long_texts_give_a_sample_each():
    texts = [text(9, 100), text(3, 200), text(8, 300), text(20, 400)]
    tokenizer = Words()
    batch = load_calibration(texts, tokenizer, samples=3, length=8)
    words = {number: word for word, number in tokenizer.known.items()}
    starts = [words[int(row[0])] for row in batch.inputs["input_ids"]]
    assert starts == ["w100", "w300", "w400"]
    assert batch.inputs["input_ids"].shape == (3, 8)


def test_short_texts_are_joined():
    batch = load_calibration([text(3), text(5, 3), text(7, 8)], Words(), samples=3, length=5)
    assert torch.equal(batch.inputs["input_ids"], torch.arange(15).view(3, 5))


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    samples=st.integers(1, 4),
    length=st.integers(2, 6),
)
def test_texts_suffice_exactly_when_there_are_enough_tokens(lengths, samples, length):
    texts = [text(n) for n in lengths]
    long = [n for n in lengths if n >= length]
    enough = sum(lengths) >= samples * length or len(long) >= samples
    if enough:
        assert load_calibration(texts, Words(), samples=samples, length=length).samples == samples
    else:
        with pytest.raises(
            CalibrationError, match=f"has {sum(lengths)} tokens, {samples * length} are needed"
        ):
            load_calibration(texts, Words(), samples=samples, length=length)


def test_files(tmp_path):
    plain, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text(text(40))
    rows.write_text("\n".join(json.dumps({"text": text(10, 10 * i), "other": 1}) for i in range(4)) + "\n")
    for path in (plain, str(rows)):
        batch = load_calibration(path, Words(), samples=4, length=10)
        assert torch.equal(batch.inputs["input_ids"], torch.arange(40).view(4, 10))


def test_a_long_file_is_not_tokenised_whole(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(text(300_000))
    tokenizer = Words()
    load_calibration(path, tokenizer)
    assert tokenizer.characters < path.stat().st_size / 10


def test_mappings_keep_what_they_hold():
    inputs = {"pixel_values": np.zeros((2, 3, 4, 4), dtype=np.float32), "labels": [1, 0]}
    batch = load_calibration(inputs)
    assert batch.samples == 2
    assert batch.take(1, 2).inputs["labels"].tolist() == [0]


def test_sketches_are_two_short_samples():
    ids = torch.arange(40).view(4, 10)
    assert torch.equal(load_calibration(ids).sketch(7).inputs["input_ids"], ids[:2, :7])
    assert torch.equal(load_calibration(ids[:1]).sketch(70).inputs["input_ids"], ids[[0, 0]])
