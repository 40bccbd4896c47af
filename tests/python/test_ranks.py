"""Several processes that calibrate together: the scores of one, the same on each; and how they end when one cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from folders import make_folder
from ranks_worker import all_scores

from llmprune.cli import main
from llmprune.planning.plan import Plan

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo to connect processes with", allow_module_level=True)

HERE = Path(__file__).parent


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        **more,
    }


def together(size: int, case: str, folder: Path) -> tuple[list[Any], list[int]]:
    """What each of ``size`` processes printed (None: nothing), and their exit codes."""
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", HERE / "ranks_worker.py", case, folder],
            env=environment(RANK=str(rank), WORLD_SIZE=str(size)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    said, codes = [], []
    for process in started:
        out, err = process.communicate(timeout=240)
        lines = out.strip().splitlines()
        assert lines or process.returncode, err[-3000:]
        said.append(json.loads(lines[-1]) if lines else None)
        codes.append(process.returncode)
    return said, codes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process's scores lie."""
    place = tmp_path_factory.mktemp("ranks")
    np.savez(place / "scores.npz", **all_scores(None))
    return place


@pytest.mark.parametrize("size", [2, 4])
def test_the_scores_are_one_process_s_and_the_plan_is_the_same_on_all(
    folder: Path, size: int, tmp_path: Path
) -> None:
    (tmp_path / "scores.npz").write_bytes((folder / "scores.npz").read_bytes())
    said, codes = together(size, "scores", tmp_path)
    assert codes == [0] * size
    assert all(one["worst"] < 1e-5 for one in said), said
    assert len({one["bits"] for one in said}) == 1
    assert len({one["plan"] for one in said}) == 1


NOUNS = {
    "data": "set of calibration data",
    "weights": "set of weights",
    "model": "model",
    "importance": "importance",
}


def test_processes_that_differ_or_fail_say_so(tmp_path: Path) -> None:
    said, codes = together(2, f"{' '.join(NOUNS)} few fails", tmp_path)
    assert codes == [0, 0]
    for one in said:
        for what, noun in NOUNS.items():
            assert one[what]["kind"] == "RankError"
            assert f"rank 1 has another {noun} than rank 0" in one[what]["text"]
        assert one["few"]["kind"] == "InputError"
        assert "1 calibration samples are too few for 2 processes" in one["few"]["text"]
    assert said[1]["fails"]["kind"] == "CalibrationError"
    assert said[0]["fails"]["kind"] == "RankError"
    assert said[0]["fails"]["text"] == f"rank 1 failed: {said[1]['fails']['text']}"


def test_one_that_dies_ends_the_others_within_a_minute(tmp_path: Path) -> None:
    said, codes = together(3, "dies", tmp_path)
    assert codes == [0, 9, 0]
    for rank in (0, 2):
        assert said[rank]["dies"]["kind"] == "RankError"
        assert "another process of this run has gone" in said[rank]["dies"]["text"]
        assert said[rank]["dies"]["seconds"] < 60


def launch(*words: object) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    return subprocess.run(
        [*command, "-m", "llmprune", *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_torchrun_prunes_as_one_process_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_folder(tmp_path)
    words: list[object] = [
        "prune",
        model,
        "--ratio",
        0.15,
        "--protect-first",
        0,
        "--protect-last",
        0,
        "--length",
        32,
    ]
    words += ["--calibration", tmp_path / "calibration.txt", "--samples", 5, "--json"]
    words += ["--importance", "element1"]  # what several processes share
    assert main([*map(str, words), "--output", str(tmp_path / "one")]) == 0
    alone = json.loads(capsys.readouterr().out)
    run = launch(*words, "--output", tmp_path / "two", "--save-plan", tmp_path / "plan.json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)  # one process alone prints
    assert report["axes"] == alone["axes"]
    assert report["calibration_hash"] == alone["calibration_hash"]
    one, two = (json.loads((tmp_path / name / "llmprune.json").read_text()) for name in ("one", "two"))
    assert one["kept"] == two["kept"]
    assert Plan.load(tmp_path / "plan.json").removed
    names = {"model", "calibration.txt", "eval.txt", "one", "two", "plan.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    # And a refusal is one on every rank, with nothing written.
    run = launch(*words, "--samples", 1, "--output", tmp_path / "three")
    assert run.returncode
    assert "1 calibration samples are too few for 2 processes" in run.stderr
    assert "llmprune/cli.py" not in run.stderr  # the launcher's trace may be there, but none of ours
    assert {path.name for path in tmp_path.iterdir()} == names
