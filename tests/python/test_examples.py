"""Recovery data: what becomes of records, which tokens carry the loss, and what is said of bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from folders import tokenizer
from real_data import DATA, needs_data

from llmprune.errors import InputError
from llmprune.recovery.examples import IGNORED, WITH_INPUT, WITHOUT_INPUT, load_data

RECORDS = [
    {"instruction": "Name a cat.", "input": "", "output": "Felix"},
    {"instruction": "Add up.", "input": "one and two", "output": "three"},
]


def load(source: Any, **options: Any) -> Any:
    return load_data(source, tokenizer(), **{"cutoff": 400, "validation": 0, **options})


def learned(example: Any) -> str:
    """The text that the loss is taken on."""
    return tokenizer().decode([label for label in example.labels if label != IGNORED])


def test_the_answer_alone_is_learned_unless_asked_otherwise() -> None:
    with_input = WITH_INPUT.format(instruction="Add up.", input="one and two")
    without = WITHOUT_INPUT.format(instruction="Name a cat.")
    assert with_input.endswith("### Input:\none and two\n\n### Response:\n")
    assert without.endswith("### Instruction:\nName a cat.\n\n### Response:\n")
    found = load(RECORDS).train
    assert sorted(map(learned, found)) == ["Felix", "three"]
    lengths = {learned(example): len(example.ids) for example in found}
    assert lengths == {"three": len(with_input) + 5, "Felix": len(without) + 5}  # a token a character
    for example in found:
        assert len(example.ids) == len(example.labels)
    for example in load(RECORDS, loss_on="all").train:
        assert example.labels == [IGNORED, *example.ids[1:]]


def test_records_end_with_the_token_for_it_where_there_is_room() -> None:
    end = tokenizer().eos_token_id
    length = len(WITHOUT_INPUT.format(instruction="Name a cat.")) + 5
    assert load(RECORDS[:1], eos=True).train[0].ids[-1] == end
    assert load(RECORDS[:1], eos=True, cutoff=length).train[0].ids[-1] != end
    assert load(RECORDS[:1], eos=True, cutoff=length + 1).train[0].labels[-1] == end


def test_a_prompt_that_fills_the_cutoff_is_dropped() -> None:
    short = len(WITHOUT_INPUT.format(instruction="Name a cat."))
    found = load(RECORDS, cutoff=short + 1)
    assert (len(found.train), found.dropped, found.rows) == (1, 1, 2)
    assert learned(found.train[0]) == "F"
    with pytest.raises(InputError, match="nothing to learn from: each of its 2 rows"):
        load(RECORDS, cutoff=short)


class Merging:
    """A tokenizer with one token over the border of prompt and answer (of the last newline and an F)."""

    eos_token_id = None

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1, *map(ord, text.replace("\nF", "\x00"))]}


def test_a_token_over_the_border_is_part_of_the_answer() -> None:
    (example,) = load_data(RECORDS[:1], Merging(), cutoff=400, validation=0).train
    assert [label for label in example.labels if label != IGNORED] == [0, *map(ord, "elix")]


def test_texts_are_cut_into_examples(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghijk")
    found = load(tmp_path / "a.txt", cutoff=4).train
    assert sorted(tokenizer().decode(example.ids) for example in found) == ["abcd", "efgh", "ijk"]
    assert all(example.labels[0] == IGNORED and example.labels[1:] == example.ids[1:] for example in found)
    rows = ['{"text": "abc"}', '{"text": ""}', '"def"', json.dumps(RECORDS[0])]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found = load(tmp_path / "a.jsonl")
    assert sorted(map(learned, found.train)) == ["Felix", "bc", "ef"]
    assert found.dropped == 1
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    assert load(tmp_path / "a.json").hash != load(tmp_path / "a.jsonl").hash
    assert load(RECORDS).hash == load([dict(r) for r in RECORDS]).hash != load(RECORDS[:1]).hash


def test_the_split_is_the_seeds_and_keeps_every_example() -> None:
    texts = [f"text {chr(97 + i)}" for i in range(20)]

    def split(**options: Any) -> tuple[list[str], list[str]]:
        found = load(texts, **options)
        return [tokenizer().decode(e.ids) for e in found.train], [
            tokenizer().decode(e.ids) for e in found.validation
        ]

    train, valid = split(validation=0.25)
    assert len(valid) == 5
    assert sorted(train + valid) == texts
    assert split(validation=5) == (train, valid)
    assert split(validation=5, seed=1)[1] != valid
    assert len(split(validation=None)[1]) == 2
    assert len(split(rows=7, validation=0)[0]) == 7
    for amount, what in ((20, "20 examples for validation"), (0.01, "share of 0.01"), (-1, "-1 examples")):
        with pytest.raises(InputError, match=what):
            load(texts, validation=amount)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([RECORDS[0], {"instruction": "a"}], r'row 2 of .* has no "output" \(its fields: instruction\)'),
        ([{"prompt": "a", "output": "b"}], r'row 1 of .* has no "instruction"'),
        ([{"instruction": "a", "output": 3}], '"output" of row 1 of .* is a int'),
        ([{"instruction": "a", "output": "b", "input": ["c"]}], '"input" of row 1 .* is a list'),
        ([RECORDS[0], 7], "row 2 of .* is a int"),
        ([{"text": None}], '"text" of row 1 .* is a NoneType'),
        ([], "has no rows"),
        ({"instruction": "a"}, "holds a dict"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, rows: Any, message: str) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=message):
        load(tmp_path / "bad.json")


def test_bad_files_and_settings(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[")
    (tmp_path / "a.jsonl").write_text('{"text": "a b"}\n{')
    (tmp_path / "a.csv").write_text("a")
    for source, message in (
        (tmp_path / "a.json", "is not JSON"),
        (tmp_path / "a.jsonl", "line 2 of .* is not JSON"),
        (tmp_path / "a.csv", "unknown ending"),
        (tmp_path / "none.json", "does not exist"),
        ({"text": "a"}, "the dataset is a dict"),
        ([], "has no rows"),
        ([""], "nothing to learn"),
    ):
        with pytest.raises(InputError, match=message):
            load(source)
    with pytest.raises(InputError, match="unknown loss_on"):
        load(RECORDS, loss_on="some")
    with pytest.raises(InputError, match="a cutoff of 1"):
        load(RECORDS, cutoff=1)
    with pytest.raises(InputError, match="0 rows"):
        load(RECORDS, rows=0)
    with pytest.raises(InputError, match="needs a tokenizer"):
        load_data(RECORDS, None)


@pytest.mark.filterwarnings("default")
def test_a_saved_dataset_brings_its_own_validation(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    train, held = (
        datasets.Dataset.from_list([{"text": t} for t in texts]) for texts in (["abc", "def"], ["ghi"])
    )
    train.save_to_disk(tmp_path / "plain")
    assert len(load(tmp_path / "plain").train) == 2
    datasets.DatasetDict(train=train, test=held).save_to_disk(tmp_path / "split")
    found = load(tmp_path / "split", validation=None)
    assert (len(found.train), [learned(e) for e in found.validation]) == (2, ["hi"])
    datasets.DatasetDict(train=train, test=datasets.Dataset.from_dict({"text": []})).save_to_disk(
        tmp_path / "empty"
    )
    with pytest.raises(InputError, match=r"a split of .* is empty"):
        load(tmp_path / "empty", validation=None)
    blank = datasets.Dataset.from_dict({"text": [""]})
    datasets.DatasetDict(train=train, test=blank).save_to_disk(tmp_path / "blank")
    with pytest.raises(InputError, match=r"the validation split of .* is empty"):
        load(tmp_path / "blank", validation=None)
    datasets.DatasetDict(one=train, two=held).save_to_disk(tmp_path / "odd")
    with pytest.raises(InputError, match='the splits one, two and no "train"'):
        load(tmp_path / "odd")


@needs_data
def test_real_instruction_data() -> None:
    found = load_data(DATA / "instruct" / "alpaca_8k.json", tokenizer(), cutoff=900)
    assert found.rows == 8229
    assert len(found.validation) == (8229 - found.dropped) // 10
    assert len(found.train) + len(found.validation) + found.dropped == 8229
