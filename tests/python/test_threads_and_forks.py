"""Scoring in two threads at once, and in a forked child, gives what it gives alone."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from compact_plans import llama

import llmprune
from llmprune import _core

HERE = Path(__file__).resolve().parent


def scored(
    model: torch.nn.Module, seed: int, importance: str, start: Barrier | None = None
) -> dict[int, np.ndarray]:
    """Trace and score a model."""
    ids = torch.randint(0, 61, (6, 16), generator=torch.Generator().manual_seed(seed))
    if start is not None:
        start.wait(60)
    graph = llmprune.trace(model)
    return dict(llmprune.score(model, graph, ids, importance=importance))


@pytest.mark.parametrize("importance", ["element1", "element2", "obs", "l2"])
def test_two_scoring_runs_in_two_threads_agree_with_themselves_alone(importance: str) -> None:
    models = [llama(0), llama(1)]  # by torch's one random generator, which all threads share
    alone = [scored(models[seed], seed, importance) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            start = Barrier(2)
            runs = [pool.submit(scored, models[seed], seed, importance, start) for seed in (0, 1)]
            for run, expected in zip(runs, alone, strict=True):
                found = run.result(120)
                assert found.keys() == expected.keys()
                for axis in expected:
                    np.testing.assert_array_equal(found[axis], expected[axis])


def test_one_graph_is_asked_by_many_threads() -> None:
    model = llama()
    graph = llmprune.trace(model)
    axes = [axis for axis in graph.axes if axis.prunable]
    expected = [
        (graph.numel({axis.id: 1}), str(graph.explain(axis.members[0].parameter, 0, 0))) for axis in axes
    ]

    def ask(_: int) -> list[Any]:
        return [
            (graph.numel({axis.id: 1}), str(graph.explain(axis.members[0].parameter, 0, 0))) for axis in axes
        ]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(ask, range(40)):
            assert found == expected


def test_kernels_run_in_many_threads_on_their_own_outputs() -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    expected = weight.abs().double().sum(1).numpy()

    def work(_: int) -> np.ndarray:
        rows = np.zeros(96)
        _core.tensor_scores(weight, None, None, "l1", [rows, None], threads=2)
        return rows

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(work, range(200)):
            np.testing.assert_allclose(found, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_children_forked_before_and_after_scoring_score_alike() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", str(HERE / "fork_worker.py")],
        capture_output=True,
        text=True,
        timeout=400,
        env={**environment, "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    children = ("before any work", "kernels before", "after scoring", "kernels after")
    assert done.stdout.splitlines() == [f"{name}: equal" for name in children], done.stderr
