"""Explicit removals, and the plan as a value: kept positions, JSON, files, its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sized_graph import decoder

from llmprune.errors import InputError, PlanError
from llmprune.planning.plan import Plan, plan
from llmprune.planning.runs import decode_indices, encode_indices

PLAN: Any = plan  # the stand-in graph is no llmprune.tracing.graph.Graph


@given(st.sets(st.integers(0, 60)))
def test_index_lists_survive_as_runs(indices: set[int]) -> None:
    text = encode_indices(sorted(indices))
    assert decode_indices(text).tolist() == sorted(indices)
    assert decode_indices(text).dtype == np.int64


def test_runs_are_short() -> None:
    assert encode_indices([0, 1, 2, 3, 7, 9, 10]) == "0-3,7,9-10"


def test_what_was_asked_for_goes_and_positions_are_the_originals() -> None:
    g = decoder(ffn=6)
    f = g.ffn[1]
    p = PLAN(g, removed={f: [4, 1, 4]})
    assert p.removed[f].tolist() == [1, 4]
    assert p.kept["model.layers.1.mlp.up.weight"][0].tolist() == [0, 2, 3, 5]
    assert p.kept["model.layers.1.mlp.down.weight"][1].tolist() == [0, 2, 3, 5]
    assert set(p.kept) == {f"model.layers.1.mlp.{n}.weight" for n in ("gate", "up", "down")}
    assert p.parameters_before - p.parameters_after == 3 * 2 * 12
    assert p.attributes == []


def test_the_closure_adds_the_lowest_scores_or_else_the_lowest_indices() -> None:
    g = decoder()
    p = PLAN(g, removed={g.values[0]: [0, 5]})
    assert p.removed[g.values[0]].tolist() == [0, 5]
    assert p.removed[g.values[1]].tolist() == [0, 1]
    assert p.removed[g.pairs].tolist() == [0]
    scores = {axis.id: np.arange(axis.size, 0, -1.0) for axis in g.axes}
    p = PLAN(g, scores, removed={g.values[0]: [0]})
    assert p.removed[g.values[0]].tolist() == [0, 7]
    assert p.removed[g.pairs].tolist() == [3]
    assert [(a.module, a.old, a.new) for a in p.attributes] == [
        ("model.layers.0.attn", 8, 6),
        ("model.layers.1.attn", 8, 6),
    ]


def test_removing_nothing_is_an_empty_plan() -> None:
    g = decoder()
    p = PLAN(g, removed={g.ffn[0]: []})
    assert (p.removed, p.kept, p.ratio) == ({}, {}, 0.0)
    assert PLAN(g, removed={}) == p


@pytest.mark.parametrize(
    ("removed", "error", "text"),
    [
        ({99: [0]}, InputError, "no axis 99"),
        (
            {0: [0]},
            PlanError,
            r"axis 0 \(other, size 19 of model.embed.weight\) is frozen: the model's output",
        ),
        ({1: [12]}, InputError, "has no index 12"),
        ({1: [-1]}, InputError, "has no index -1"),
        ({1: list(range(12))}, PlanError, "would lose every index"),
        ({1: [0.5]}, InputError, "must be integers"),
        ({1: [[[0]]]}, InputError, "must be integers"),
        ({0: [[0]]}, PlanError, "is frozen"),
        ({4: [[0], [1]]}, InputError, "a row of different indices for each of the 3 indices around it"),
        ({4: [[0, 0], [1, 1], [0, 1]]}, InputError, "a row of different indices"),
        ({4: [[0, 1], [0, 1], [0, 1]]}, PlanError, "would lose every index"),
    ],
)
def test_bad_removals_are_one_sentence(removed: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        PLAN(decoder(), removed=removed)


def test_each_group_may_lose_query_heads_of_its_own() -> None:
    g = decoder(layers=1, kv=3, group=2, pairs=1, hidden=2)
    axis = g.groups[0]
    p = PLAN(g, removed={axis: [[0], [1], [0]]})
    assert p.removed[axis].tolist() == [[0], [1], [0]]
    # o's columns: kv x group x value; q's rows: both rope halves, each kv x group x pair.
    assert p.kept["model.layers.0.attn.o.weight"][1].tolist() == [2, 3, 4, 5, 10, 11]
    assert p.kept["model.layers.0.attn.q.weight"][0].tolist() == [1, 2, 5, 7, 8, 11]
    assert p.parameters_after == g.numel({axis: 1})


def made() -> Plan:
    g = decoder()
    scores = {axis.id: np.arange(axis.size, dtype=float) for axis in g.axes}
    return PLAN(g, scores, {"ffn": 0.2, "head": 0.4, "query": 0.5}, protect_first=0, protect_last=0)


def test_a_plan_survives_json_and_files(tmp_path: Path) -> None:
    pytest.importorskip("llmprune.tracing.graph")
    p = made()
    assert Plan.from_json(json.loads(json.dumps(p.to_json()))) == p
    path = tmp_path / "plan.json"
    path.write_text("old")
    p.save(path)
    assert Plan.load(path) == p
    assert [f.name for f in tmp_path.iterdir()] == ["plan.json"]
    (tmp_path / "other").write_text("a new file has the usual permissions")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert p != made().removed
    with pytest.raises(TypeError):
        hash(p)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    p = made()
    p.options["unserialisable"] = object()
    with pytest.raises(TypeError):
        p.save(path)
    assert path.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "removed": {"a": "0"}}'])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    pytest.importorskip("llmprune.tracing.graph")
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match="plan"):
        Plan.load(path)


def test_the_table_says_what_goes() -> None:
    p = made()
    lines = str(p).splitlines()
    assert lines[0].split() == ["kind", "axes", "groups", "removed", "share"]
    assert [line.split()[0] for line in lines[1:-1]] == ["head", "query", "ffn"]
    assert (
        lines[-1] == f"parameters {p.parameters_before:,} -> {p.parameters_after:,} ({p.ratio:.2%} removed)"
    )
