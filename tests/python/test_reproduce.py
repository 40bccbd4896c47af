"""The paper's tables by one command: what is measured, that it goes on after a stop, and what is published beside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compact_plans import llama
from folders import TEXT, tokenizer
from real_data import DATA, needs_data
from test_cli import run
from transformers import GlmConfig, GlmForCausalLM

from llmprune.checkpoints.loading import load_model
from llmprune.errors import InputError
from llmprune.evaluation.perplexity import score_text
from llmprune.evaluation.texts import read_text
from llmprune.experiments.reproduce import PRESETS, ROWS, Reproduction, Sources, reproduce

pytest.importorskip("peft", reason="the tuned rows need peft (llmprune[recover])")
pytestmark = pytest.mark.filterwarnings("default")

TUNING = {"steps": 2, "batch_size": 4, "learning_rate": 3e-3, "validation": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reproduce") / "model"
    model = llama(num_hidden_layers=2, max_position_embeddings=512)
    model.generation_config.eos_token_id = None
    model.save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data")
    for name in ("text", "instruct"):
        (place / name).mkdir()
    (place / "text" / "books.jsonl").write_text(
        "".join(json.dumps({"text": TEXT[i:] * 2}) + "\n" for i in range(12))
    )
    (place / "text" / "wiki_test.txt").write_text((TEXT + "\n") * 4)
    (place / "text" / "ptb_test.txt").write_text((TEXT[::-1] + "\n") * 4)
    records = [{"instruction": f"Say {n}.", "input": "", "output": TEXT[n : n + 20]} for n in range(24)]
    (place / "instruct" / "records.json").write_text(json.dumps(records))
    return place


def test_the_table_and_the_experiments(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    rows = ["dense", "l2", "channel", "element1", "element1 tuned"]
    options: dict[str, Any] = {"rows": rows, "tasks": False, "tuning": TUNING, "quiet": True}
    monkeypatch.setattr("llmprune.experiments.reproduce.AMOUNTS", (12, 100))
    result = reproduce("llama-7b", folder, data, out, also={"a twin": folder}, **options)
    figures = {name: row["evaluation"] for name, row in result.rows.items()}
    assert list(figures) == [*rows, "a twin"]
    assert figures["a twin"]["perplexity"] == figures["dense"]["perplexity"]
    text = read_text(data / "text" / "wiki_test.txt", join_lines=True)
    assert (
        figures["dense"]["perplexity"]["WikiText2"]
        == score_text(load_model(folder), tokenizer(), text).perplexity
    )
    dense = figures["dense"]["parameters"]
    for name in rows[1:]:
        assert figures[name]["parameters"] == pytest.approx(0.8 * dense, rel=0.05), name
    assert figures["l2"]["perplexity"] != figures["element1"]["perplexity"]
    assert figures["element1 tuned"]["perplexity"] != figures["element1"]["perplexity"]
    assert result.rows["element1"]["recovery"] is None
    assert result.rows["channel"]["pruning"]["axes"][0]["kind"] == "channel"

    assert [entry["step"] for entry in result.steps] == [0, 1, 2]
    assert result.steps[0]["WikiText2"] == pytest.approx(
        figures["element1"]["perplexity"]["WikiText2"], rel=1e-5
    )
    assert [entry["rows"] for entry in result.amounts] == [12, 24]
    assert result.amounts[-1]["PTB"] == pytest.approx(
        figures["element1 tuned"]["perplexity"]["PTB"], rel=1e-5
    )

    table = (out / "table.md").read_text()
    assert "(12.62)" in table
    assert "(34.21)" in table
    assert json.loads((out / "table.json").read_text())["rows"] == result.rows
    for name in ("steps.png", "amounts.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.training"))
    page = (out / "report.html").read_text()
    assert all(name.replace(" ", "_") in page for name in rows)
    noted = json.loads((out / "runs" / "element1_tuned" / "run.json").read_text())["entries"]
    assert [entry["command"] for entry in noted] == ["prune", "recover", "evaluate"]

    # Another call measures nothing that is there, and only what is not.
    (out / "rows" / "l2.json").unlink()
    measured: list[str] = []

    monkeypatch.setattr(
        "llmprune.experiments.reproduce._Bench._measure",
        lambda self, row: (measured.append(row.name), result.rows["l2"])[1],
    )
    again = reproduce("llama-7b", folder, data, out, **options)
    assert measured == ["l2"]
    assert again.rows == {name: result.rows[name] for name in rows}
    with pytest.raises(InputError, match=r"holds results with seed 0, not 1"):
        reproduce("llama-7b", folder, data, out, **options, seed=1)


@needs_data
@pytest.mark.slow
def test_a_small_glm_on_real_data_with_all_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="tasks need lm-eval (llmprune[eval])")
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=None,
    )
    GlmForCausalLM(config).save_pretrained(tmp_path / "glm")
    tokenizer().save_pretrained(tmp_path / "glm")
    data = tmp_path / "data"
    shutil.copytree(DATA / "zeroshot", data / "zeroshot")
    for part, size in (("wikitext2_raw_test_a.txt", 2000), ("ptb_test_a.txt", 2000), ("books.jsonl", None)):
        (data / "text").mkdir(exist_ok=True)
        (data / "text" / part).write_text((DATA / "text" / part).read_text()[:size])
    (data / "instruct").mkdir()
    records = json.loads((DATA / "instruct" / "alpaca_8k.json").read_text())[:40]
    (data / "instruct" / "alpaca.json").write_text(json.dumps(records))
    words = [
        "reproduce",
        "chatglm-6b",
        "--model",
        tmp_path / "glm",
        "--data",
        data,
        "--output",
        tmp_path / "out",
    ]
    words += [
        "--rows",
        "dense,element2 tuned",
        "--limit",
        2,
        "--steps",
        2,
        "--tuning-rows",
        30,
        "--no-experiments",
    ]
    code, out, err = run(capsys, *words, "--json", "--quiet")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert len(rows["dense"]["evaluation"]["tasks"]) == 7
    assert rows["element2 tuned"]["evaluation"]["parameters"] < rows["dense"]["evaluation"]["parameters"]
    assert rows["element2 tuned"]["recovery"]["steps"] == 2
    code, out, err = run(capsys, *words, "--quiet")
    assert code == 0, err
    assert "hellaswag" in out


def test_published_figures_stand_beside() -> None:
    for title, published in PRESETS.values():
        assert title
        assert set(published) <= {row.name for row in ROWS}
    evaluation = {
        "parameters": 5_000,
        "perplexity": {"WikiText2": 20.0, "PTB": 30.0},
        "tasks": {"piqa": {"acc": 0.75, "acc_norm": 0.5}},
        "chosen": {"piqa": "acc"},
        "average": 0.75,
    }
    table = Reproduction("vicuna-7b", {"vector": {"evaluation": evaluation}}, "out").table()
    assert table[0] == ["Vicuna-7B", "parameters", "WikiText2", "PTB", "piqa", "average"]
    assert table[1] == ["vector", "5,000", "20.00 (27.03)", "30.00 (92.51)", "75.00", "75.00"]


def test_bad_requests(folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for preset, rows, message in (
        ("llama-8b", None, "unknown preset 'llama-8b'"),
        ("llama-7b", ["element3"], "unknown row 'element3'"),
    ):
        with pytest.raises(InputError, match=message):
            reproduce(preset, folder, data, tmp_path / "out", rows=rows)
    (tmp_path / "data" / "text").mkdir(parents=True)
    shutil.copy(data / "text" / "books.jsonl", tmp_path / "data" / "text" / "books.jsonl")
    with pytest.raises(InputError, match=r"has no text/\*wiki\*test\*\.txt or"):
        Sources.find(tmp_path / "data")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(InputError, match="is not empty and holds no results"):
        reproduce("llama-7b", folder, data, tmp_path / "mine", rows=["dense"])
    words = ["reproduce", "llama-7b", "--model", folder, "--data", data, "--output", tmp_path / "out"]
    code, _, err = run(capsys, *words, "--also", "twin")
    assert code == 2
    assert "--also takes NAME=DIR" in err
