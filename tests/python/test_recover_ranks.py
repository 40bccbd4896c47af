"""Several processes that recover together: refused where they differ, and ended with a sentence when one dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from llmprune.checkpoints.loading import load_model

pytest.importorskip("peft", reason="recovery needs peft (llmprune[recover])")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo to connect processes with", allow_module_level=True)

HERE = Path(__file__).parent


def together(case: str, folder: Path) -> tuple[list[Any], list[int]]:
    """What each of two processes said (None: nothing), and their exit codes."""
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + (os.getpid() + sum(map(ord, case))) % 20000),
        "WORLD_SIZE": "2",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", HERE / "recover_worker.py", case, folder],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said, codes = [], []
    for process in started:
        out, err = process.communicate(timeout=240)
        lines = out.strip().splitlines()
        assert lines or process.returncode == 9, err[-3000:]
        said.append(json.loads(lines[-1]) if lines else None)
        codes.append(process.returncode)
    return said, codes


@pytest.mark.parametrize(
    ("case", "noun"),
    [("data", "set of recovery data"), ("weights", "set of weights"), ("settings", "set of settings")],
)
def test_processes_that_differ_are_refused_before_anything_is_written(
    tmp_path: Path, case: str, noun: str
) -> None:
    said, codes = together(case, tmp_path)
    assert codes == [0, 0]
    for one in said:
        assert one["kind"] == "RankError", one
        assert f"rank 1 has another {noun} than rank 0" in one["text"]
    assert not list(tmp_path.iterdir())


def test_one_that_dies_ends_the_other_and_the_same_call_goes_on(tmp_path: Path) -> None:
    said, codes = together("dies", tmp_path)
    assert codes == [0, 9]
    assert said[0]["kind"] == "RankError", said[0]
    assert "another process of this recovery has gone" in said[0]["text"]
    assert said[0]["seconds"] < 60
    assert [path.name for path in tmp_path.iterdir()] == ["out.training"]
    assert (tmp_path / "out.training" / "checkpoint-2" / "trainer_state.json").is_file()
    said, codes = together("none", tmp_path)
    assert (said, codes) == ([{"kind": None, "steps": 8}] * 2, [0, 0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert load_model(tmp_path / "out").config.vocab_size == 61
