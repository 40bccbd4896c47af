"""Models whose weights are in pieces on two processes, or kept away by a device_map: scored and pruned all the same."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sharded_worker import FAMILIES, IMPORTANCES, ids
from tiny_models import build

import llmprune
from llmprune.checkpoints.loading import load_model
from llmprune.errors import InputError
from llmprune.scoring.score import score
from llmprune.scoring.scores import Scores

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes came to, and the folder with what they wrote."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo to connect processes with")
    folder = tmp_path_factory.mktemp("sharded")
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "WORLD_SIZE": "2",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", HERE / "sharded_worker.py", folder],
            env={**common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = []
    for process in started:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
        found.append(json.loads(out.strip().splitlines()[-1]))
    return folder, found


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_models_have_the_scores_of_whole_ones(said: Any, family: str) -> None:
    folder, found = said
    model = build(family).eval()
    graph = llmprune.trace(model)
    for importance in IMPORTANCES:
        data = None if importance == "l2" else ids()
        want = score(model, graph, data, importance=importance, kinds=("head", "ffn"))
        for rank in range(2):
            got = Scores.load(folder / f"{family}-{importance}-{rank}.npz")
            assert got.fingerprint == want.fingerprint
            assert set(got) == set(want)
            for axis in want:
                np.testing.assert_allclose(got[axis], want[axis], rtol=1e-5, atol=1e-9)
    plan = llmprune.plan(graph, want, 0.2, protect_first=0, protect_last=0)
    assert [one[family]["digest"] for one in found] == [plan.digest()] * 2
    llmprune.compact(model, plan)
    loaded = load_model(folder / family)
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_weight_is_gathered_once_and_the_pieces_stay(said: Any, family: str) -> None:
    parameters = len(list(build(family).parameters()))
    for one in said[1]:
        assert one[family]["gathered"] == parameters
        assert one[family]["still in pieces"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_one_process_refuses_all_refuse(said: Any, family: str) -> None:
    for one in said[1]:
        assert "is in pieces on several processes: llmprune.gather" in one[family]["compact"]
        assert one[family]["budget"].startswith("InputError: scoring these 5 samples block by block takes")
        assert "state is for weights in files" in one[family]["state"]


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_models(tmp_path: Path, how: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = build("llama").eval()
    graph = llmprune.trace(plain)
    model = copy.deepcopy(plain)
    if how == "cpu":
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path / "off"), torch.device("cpu"))
    assert any(p.is_meta for p in model.parameters())
    with torch.no_grad():
        before = model(ids()).logits
    assert llmprune.trace(model).fingerprint == graph.fingerprint
    for importance in ("element1", "element2", "obs"):
        want = score(plain, graph, ids(), importance=importance, kinds=("head", "ffn"))
        got = score(model, graph, ids(), importance=importance, kinds=("head", "ffn"))
        for axis in want:
            np.testing.assert_allclose(got[axis], want[axis], rtol=1e-5, atol=1e-9)
    plan = llmprune.plan(graph, want, 0.2, protect_first=0, protect_last=0)
    pruned = llmprune.gather(model, plan)
    llmprune.compact(plain, plan)
    for (name, a), b in zip(plain.named_parameters(), pruned.named_parameters(), strict=True):
        assert torch.equal(a, b[1]), name
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids()).logits, plain(ids()).logits)
        assert torch.equal(model(ids()).logits, before)
    llmprune.save_pretrained(pruned, tmp_path / "out")
    with pytest.raises(InputError, match=r"offloaded by a device_map.*llmprune\.gather"):
        llmprune.compact(model, plan)
    with pytest.raises(InputError, match=r"in memory, whole: llmprune\.compact"):
        llmprune.gather(plain, plan)
