"""The command line: what it prints, where, its exit codes, and that nothing is left behind when it fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folders import make_folder

from llmprune import _core
from llmprune.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("cli"))


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def prune_words(folder: Path, output: Path | None = None) -> list[object]:
    words: list[object] = ["prune", folder, "--ratio", 0.15, "--protect-first", 0, "--protect-last", 0]
    words += ["--calibration", folder.parent / "calibration.txt", "--length", 32]
    return words + (["--output", output] if output else [])


def test_prune_prints_the_table_and_writes_the_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plan = tmp_path / "out", tmp_path / "plan.json"
    words = [*prune_words(folder, output), "--eval", folder.parent / "eval.txt", "--generate", "Once upon"]
    code, out, err = run(capsys, *words, "--save-plan", plan)
    assert code == 0, err
    for piece in (
        "parameters",
        "MACs per token",
        "perplexity",
        "peak memory",
        "before: Once upon",
        str(output),
    ):
        assert piece in out
    assert "scor" in err
    assert "Traceback" not in err
    assert (output / "config.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "plan.json"]

    code, out, err = run(capsys, "verify", output, "--original", folder)
    assert code == 0, err
    assert "relative error" in out
    code, out, err = run(capsys, "verify", output, "--json", "--quiet")
    assert (code, err) == (0, "")
    assert json.loads(out)["prunings"] == 1
    code, out, err = run(capsys, "verify", folder, "--plan", plan, "--json", "--quiet")
    assert (code, err) == (0, "")
    assert json.loads(out)["relative_error"] <= 1e-5
    code, out, err = run(capsys, "verify", output, "--plan", plan, "--quiet")
    assert code == 2
    assert len(err.splitlines()) == 1


def test_json_goes_to_stdout_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *prune_words(folder), "--json", "--quiet", "--importance", "l2")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["after"]["parameters"] < data["before"]["parameters"]
    assert data["output"] is None
    assert [stage["name"] for stage in data["stages"]][:2] == ["load", "trace"]


def test_a_target_in_place_of_the_ratio(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "prune",
        folder,
        "--memory",
        "0.9x",
        "--context",
        32,
        "--batch",
        2,
        "--importance",
        "l1",
        "--json",
    ]
    code, out, _ = run(capsys, *words)
    assert code == 0
    target = json.loads(out)["target"]
    assert (target["kind"], target["context"], target["batch"]) == ("memory", 32, 2)
    assert 0.8 * target["before"] < target["reached"] <= target["limit"] == int(0.9 * target["before"])


def test_ratios_by_kind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "prune",
        folder,
        "--ratio",
        "ffn=0.25",
        "--importance",
        "l1",
        "--protect-first",
        0,
        "--protect-last",
        0,
    ]
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    assert {axis["kind"] for axis in json.loads(out)["axes"]} == {"ffn"}


def test_trace_shows_kinds_and_explains(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "trace", folder, "--frozen")
    assert code == 0, err
    assert "ffn" in out
    assert "head" in out
    assert "frozen" in out
    code, out, _ = run(capsys, "trace", folder, "--json")
    assert code == 0
    kinds = {entry["kind"]: entry for entry in json.loads(out)["kinds"]}
    assert kinds["ffn"]["axes"] == 2
    assert kinds["ffn"]["sizes"] == [20]
    code, out, _ = run(capsys, "trace", folder, "--explain", "model.layers.0.mlp.up_proj.weight:0:17")
    assert code == 0
    assert "down_proj" in out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["self_test"]["ok"]
    assert report["free_disk"] > 0
    assert report["extras"].keys() >= {"peft", "lm-eval"}
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert re.search(r"free disk +[\d.]+ GiB", out)


def test_a_doctor_whose_self_test_fails_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "linear_scores", lambda *_: None)  # a core that computes nothing
    code, out, err = run(capsys, "doctor")
    assert code == 2
    assert "FAILED" in out
    assert "install llmprune anew" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune", "{folder}", "--ratio", "1.5", "--importance", "l1"], "ratio"),
        (["prune", "{folder}", "--ratio", "most"], "neither a number"),
        (["prune", "{folder}", "--importance", "psychic"], "importance"),
        (["prune", "{folder}"], "calibration"),
        (["prune", "{folder}", "--calibration", "{tmp}/nothing.txt"], "does not exist"),
        (["prune", "{folder}", "--calibration", "{tmp}/empty.txt"], "tokens"),
        (["prune", "{folder}", "--importance", "l1", "--eval", "{tmp}/nothing.txt"], "does not exist"),
        (["prune", "{folder}", "--importance", "l1", "--eval", "{tmp}/empty.txt"], "window"),
        (["prune", "{folder}", "--importance", "l1", "--output", "{tmp}/taken"], "exists"),
        (
            ["prune", "{folder}", "--importance", "l1", "--output", "{tmp}/taken", "--overwrite"],
            "no checkpoint",
        ),
        (["prune", "{folder}", "--importance", "l1", "--output", "{tmp}/empty.txt"], "no folder"),
        (["prune", "{folder}", "--importance", "l1", "--output", "{tmp}/empty.txt/out"], "cannot be made"),
        (["prune", "{tmp}/nowhere", "--importance", "l1"], "nowhere"),
        (["prune", "{tmp}/taken", "--importance", "l1"], "taken"),
        (["prune", "{folder}", "--importance", "l1", "--kinds", "wheel"], "wheel"),
        (["prune", "{folder}", "--importance", "l1", "--repair", "ls"], "needs calibration"),
        (["prune", "{folder}", "--importance", "l1", "--params", "few"], "params is a number like 5.4B"),
        (["prune", "{folder}", "--importance", "l1", "--memory", "1kB"], "the nearest that can is"),
        (["prune", "{folder}", "--importance", "l1", "--macs", "0.5x", "--ratio", "0.2"], "give one of them"),
        (["trace", "{folder}", "--explain", "nonsense"], "PARAM:DIM:INDEX"),
        (["trace", "{folder}", "--explain", "no.weight:0:1"], "no parameter"),
        (["trace", "{folder}", "--explain", "model.norm.weight:0:99"], "position 99 is outside"),
        (["verify", "{folder}"], "record"),
        (["verify", "{folder}", "--plan", "{tmp}/nothing.json"], "does not exist"),
        (["verify", "{folder}", "--plan", "{tmp}/empty.txt"], "plan"),
        (["fly"], "invalid choice"),
        ([], "required"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_exit_code_2(
    words: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("x")
    filled = [word.format(folder=folder, tmp=tmp_path) for word in words]
    quiet = ["--quiet"] if words and words[0] != "fly" else []
    code, out, err = run(capsys, *filled, *quiet)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "taken"]
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["precious"]


def test_overwrite_replaces_the_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*prune_words(folder, tmp_path / "out"), "--importance", "l1", "--quiet"]
    assert run(capsys, *words)[0] == 0
    assert run(capsys, *words)[0] == 2
    code, _, err = run(capsys, *words, "--overwrite")
    assert code == 0, err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_ends_with_130_and_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    words = [str(word) for word in prune_words(folder, tmp_path / "out")]
    words += ["--samples", "400", "--length", "2"]
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "llmprune.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("score"):
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1] == "llmprune: interrupted"
    assert [p.name for p in tmp_path.iterdir()] == ["work"]
