"""Evaluation: perplexity against a naive oracle, tasks against lm-eval itself, and every kind of model folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import TEXT, make_folder, tokenizer
from real_data import DATA, needs_data
from test_cli import run

import llmprune
from llmprune.checkpoints.adapters import quiet_peft
from llmprune.checkpoints.loading import load_model, load_tokenizer
from llmprune.errors import CheckpointError, InputError
from llmprune.evaluation.perplexity import score_text
from llmprune.evaluation.texts import read_text
from llmprune.evaluation.zeroshot import chosen_metric

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: "{{{{[one, two]}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks")
    words = TEXT.split()
    rows = [
        {
            "question": " ".join(words[:n]),
            "one": " " + words[n],
            "two": " " + words[n + 1][::-1],
            "label": n % 2,
        }
        for n in range(1, 13)
    ]
    (place / "next.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "next.yaml").write_text(TASK.format(name="next_word", file="next.jsonl"))
    (place / "lost.yaml").write_text(TASK.format(name="lost_word", file="nowhere.jsonl"))
    return place


def naive(model: Any, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """Mean loss in float64, one window after the other, each token scored once."""
    model = model.double()
    losses = []
    for start in range(0, len(ids) - window + 1, stride):
        part = torch.tensor(ids[start : start + window])
        with torch.no_grad():
            logs = torch.log_softmax(model(part[None]).logits[0], -1)
        first = 1 if start == 0 else max(1, window - stride)
        losses += [-float(logs[t - 1, part[t]]) for t in range(first, window)]
    model.float()
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 16), (16, 5), (24, 23), (8, 1)])
def test_perplexity_is_the_mean_loss_of_the_tokens_that_no_earlier_window_scored(
    folder: Path, window: int, stride: int | None
) -> None:
    model, text = load_model(folder), TEXT * 2
    found = score_text(model, tokenizer(), text, window, stride)
    loss, _ = naive(model, tokenizer()(text)["input_ids"], window, stride or window)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.bits_per_character == pytest.approx(loss / math.log(2) * found.tokens / len(text), rel=1e-5)
    assert (found.characters, found.stride) == (len(text), stride or window)


def test_windows_are_cut_to_the_positions_and_refused_when_senseless(folder: Path) -> None:
    model = load_model(folder)
    limit = model.config.max_position_embeddings
    assert score_text(model, tokenizer(), TEXT * 40, limit * 2).window == limit
    for window, stride, what in (
        (1, None, "a window of 1"),
        (16, 0, "a stride of 0"),
        (64, None, "fewer than one"),
    ):
        with pytest.raises(InputError, match=what):
            score_text(model, tokenizer(), "a cat", window, stride)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "text", "join", "perplexity", "bits"),
    [
        ("stories260K", "tinystories_valid_a.txt", False, 5.314, 1.192),
        ("stories260K", "ptb_test_a.txt", True, 119.80, 4.013),
    ],
)
def test_dense_figures_of_real_models(
    model: str, text: str, join: bool, perplexity: float, bits: float
) -> None:
    place = DATA / "models" / model
    found = score_text(load_model(place), load_tokenizer(place), read_text(DATA / "text" / text, join))
    assert found.perplexity == pytest.approx(perplexity, rel=2e-4)
    assert found.bits_per_character == pytest.approx(bits, rel=3e-4)


def test_the_command_prints_one_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = folder.parent / "eval.txt"
    code, out, err = run(
        capsys,
        "evaluate",
        folder,
        "--ppl",
        text,
        "--window",
        32,
        "--generate",
        "Once",
        "--beside",
        folder,
        "--json",
    )
    assert code == 0, err
    found = json.loads(out)
    model = load_model(folder)
    config = model.config
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["perplexity"] == {str(text): score_text(model, tokenizer(), text.read_text(), 32).perplexity}
    graph = llmprune.trace(model)
    assert found["macs_per_token"] == pytest.approx(graph.macs({}) / 14, rel=1e-3)
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert found["memory"]["kv_cache_per_token"] == cache
    assert found["memory"]["kv_cache"] == cache * found["memory"]["kv_cache_tokens"]
    low, high = found["latency"]["decode"]["quartiles"]
    assert 0 < low <= found["latency"]["decode"]["median"] <= high
    (sample,) = found["generation"]
    assert sample["prompt"] == "Once"
    assert sample["text"] == sample["beside"] != ""
    assert found["tasks"] == {}


@pytest.fixture
def lm_eval() -> Any:
    return pytest.importorskip("lm_eval", reason="tasks need lm-eval (llmprune[eval])")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_tasks_equal_a_plain_run(
    folder: Path,
    task_folder: Path,
    lm_eval: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "evaluate",
        folder,
        "--tasks",
        "next_word",
        "--include-path",
        task_folder,
        "--no-latency",
        "--json",
    ]
    code, out, err = run(capsys, *words, "--limit", 10, "--quiet")
    assert code == 0, err
    found = json.loads(out)
    monkeypatch.chdir(task_folder)
    plain = lm_eval.simple_evaluate(
        "hf",
        {"pretrained": str(folder), "dtype": "float32", "max_length": 2048},
        ["next_word"],
        batch_size=16,
        limit=10,
        device="cpu",
        task_manager=lm_eval.tasks.TaskManager(include_path=str(task_folder)),
    )["results"]["next_word"]
    ours = found["tasks"]["next_word"]
    for metric in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert ours[metric] == plain[f"{metric},none"]
    assert ours["samples"] == 10
    assert found["chosen"] == {"next_word": "acc_norm"}
    assert found["average"] == ours["acc_norm"]


@pytest.mark.filterwarnings("default")
def test_a_task_that_is_not_there(folder: Path, task_folder: Path, lm_eval: Any) -> None:
    model = load_model(folder)

    def tasks(*names: str, **options: Any) -> None:
        llmprune.evaluate(model, tokenizer(), tasks=names, include_path=task_folder, latency=False, **options)

    with pytest.raises(InputError, match=r"knows no task 'next_wort' and .* did you mean next_word"):
        tasks("next_wort")
    with pytest.raises(
        InputError, match=r"'lost_word' cannot be loaded .*tasks0?.*nowhere.* \(--include-path"
    ):
        tasks("lost_word")
    with pytest.raises(InputError, match=r"with 3 tokens of context: .* greater --max-length"):
        tasks("next_word", max_length=3)
    with pytest.raises(InputError, match="a limit of 0"):
        tasks("next_word", limit=0)
    with pytest.raises(InputError, match="is no folder"):
        llmprune.evaluate(model, tokenizer(), tasks=["piqa"], include_path=task_folder / "no", latency=False)


def test_the_papers_metrics() -> None:
    both = ["acc", "acc_stderr", "acc_norm"]
    assert [
        chosen_metric(task, both)
        for task in ("piqa", "piqa_local", "arc_easy", "arc_challenge_local", "lambada")
    ] == [
        "acc",
        "acc",
        "acc",
        "acc_norm",
        "acc_norm",
    ]
    assert chosen_metric("boolq", ["acc"]) == "acc"
    assert chosen_metric("openbookqa", ["acc"]) == "acc"
    assert chosen_metric("gsm8k", ["exact_match"]) is None


def test_texts_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \nthree\n")
    assert read_text(tmp_path / "a.txt") == "one\n\n two \nthree\n"
    assert read_text(tmp_path / "a.txt", join_lines=True) == "one\n\n two \n\nthree"
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert read_text(tmp_path / "a.jsonl") == "one\n\ntwo"
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(InputError, match="holds no text"):
        read_text(tmp_path / "blank.txt")
    with pytest.raises(InputError, match="does not exist"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_text(tmp_path / "odd.txt")


@pytest.mark.filterwarnings("default")
def test_texts_of_a_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    other = datasets.Dataset.from_dict({"text": ["three"]})
    rows.save_to_disk(tmp_path / "plain")
    assert read_text(tmp_path / "plain") == "one\n\ntwo"
    datasets.DatasetDict(train=rows, validation=other).save_to_disk(tmp_path / "split")
    assert read_text(tmp_path / "split") == "three"
    datasets.DatasetDict(here=rows, there=other).save_to_disk(tmp_path / "unknown")
    with pytest.raises(InputError, match="the splits here, there"):
        read_text(tmp_path / "unknown")
    rows.rename_column("text", "words").save_to_disk(tmp_path / "untitled")
    with pytest.raises(InputError, match='columns words and no "text"'):
        read_text(tmp_path / "untitled")
    with pytest.raises(InputError, match="no dataset that save_to_disk wrote"):
        read_text(tmp_path)


# Folders


@pytest.mark.parametrize("form", ["stock", "universal"])
def test_a_pruned_folder_is_judged_as_the_model_in_memory(folder: Path, tmp_path: Path, form: str) -> None:
    model = load_model(folder)
    llmprune.prune(
        model,
        None,
        {"ffn": 0.25},
        importance="l2",
        protect_first=0,
        protect_last=0,
        output=tmp_path / "out",
        form=form,
    )
    text = {"text": TEXT * 3}
    inside = llmprune.evaluate(model, tokenizer(), ppl=text, window=32, latency=False)
    outside = llmprune.evaluate(tmp_path / "out", tokenizer(), ppl=text, window=32)
    assert outside.perplexity == inside.perplexity
    assert (outside.parameters, outside.macs) == (inside.parameters, inside.macs)
    assert outside.latency is not None
    assert "perplexity" in str(outside)


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """A LoRA beside the model, with weights that change what it computes."""
    peft = pytest.importorskip("peft")
    model = load_model(folder)
    with quiet_peft():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    place = folder.parent / "adapter"
    wrapped.peft_config["default"].base_model_name_or_path = str(folder)
    wrapped.save_pretrained(place)
    return place


def test_an_adapter_folder_is_its_base_with_the_adapter_added(folder: Path, adapter: Path) -> None:
    import peft

    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        with quiet_peft():
            expected = peft.PeftModel.from_pretrained(load_model(folder), adapter)(input_ids=ids).logits
        found = load_model(adapter)(input_ids=ids).logits
        dense = load_model(folder)(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, dense, atol=1e-2)
    result = llmprune.evaluate(adapter, ppl={"text": TEXT * 3}, latency=False)  # the tokenizer is the base's
    assert result.parameters == sum(p.numel() for p in load_model(folder).parameters())


def test_an_adapter_of_another_model_is_refused(folder: Path, adapter: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    llmprune.prune(
        model,
        None,
        {"ffn": 0.25},
        importance="l2",
        protect_first=0,
        protect_last=0,
        output=tmp_path / "small",
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = (adapter / "adapter_model.safetensors").read_bytes()

    def written(name: str, base: str, **changes: Any) -> Path:
        place = tmp_path / name
        place.mkdir()
        (place / "adapter_model.safetensors").write_bytes(weights)
        (place / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": base, **changes})
        )
        return place

    with pytest.raises(
        CheckpointError, match=r"belongs to another model: its .*down_proj.* has shape .* asks for"
    ):
        load_model(written("shape", "../small"))
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_model(written("names", str(folder), target_modules=["c_attn"]))
    with pytest.raises(CheckpointError, match=r"it lacks .*up_proj"):
        load_model(written("fewer", str(folder), target_modules=["q_proj", "down_proj", "up_proj"]))
    with pytest.raises(CheckpointError, match=r"base model 'gone' of the adapter .* is not there"):
        load_model(written("gone", "gone"))
    broken = written("broken", str(folder))
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_model(broken)
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(broken)
