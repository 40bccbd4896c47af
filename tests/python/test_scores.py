"""The Scores type, and importances added to the registry."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scoring import gradients, ids_of, model_of, whole_graph, worst

from llmprune.errors import InputError
from llmprune.scoring import importance as registry
from llmprune.scoring.score import AGGREGATIONS, score
from llmprune.scoring.scores import Scores


@pytest.fixture(scope="module")
def case():
    model = model_of("llama_tied")
    graph = whole_graph(model)
    return model, graph, score(model, graph, ids_of(), importance="element1", seed=4)


def assert_equal(first: Scores, second: Scores):
    assert list(first) == list(second)
    for axis in first:
        assert second[axis].dtype == np.float64
        assert np.array_equal(first[axis], second[axis])
    assert list(first.nested) == list(second.nested)
    for name in ("importance", "aggregation", "seed", "calibration_hash", "fingerprint", "kinds"):
        assert getattr(first, name) == getattr(second, name)


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_saved_scores_come_back_to_the_bit(case, tmp_path, suffix):
    _, _, scores = case
    scores.save(tmp_path / f"scores{suffix}")
    assert_equal(scores, Scores.load(tmp_path / f"scores{suffix}"))


def test_json_is_a_round_trip(case):
    _, _, scores = case
    assert_equal(scores, Scores.from_json(scores.to_json()))


def test_what_is_no_scores_is_refused(case, tmp_path):
    _, _, scores = case
    for text in (
        "{",
        "[]",
        "{}",
        json.dumps({**json.loads(scores.to_json()), "format": "llmprune.plan/1"}),
        '{"values": {"x": []}, "nested": {}}',
    ):
        with pytest.raises(InputError, match="scores"):
            Scores.from_json(text)
    with pytest.raises(InputError, match="does not exist"):
        Scores.load(tmp_path / "nowhere.npz")
    with pytest.raises(InputError, match=r"\.npz or \.json"):
        scores.save(tmp_path / "scores.bin")
    scores.save(tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    np.savez(tmp_path / "header.npz", header=np.array("{}"))
    np.savez(tmp_path / "axes.npz", header=np.array(json.dumps(scores._header())), axis_x=np.zeros(1))
    (tmp_path / "text.json").write_bytes(b"\xff\xfe")
    for name, content in (("nothing.npz", b"nothing"), ("empty.npz", b""), ("torn.npz", whole[:-40])):
        (tmp_path / name).write_bytes(content)
    for name in ("nothing.npz", "empty.npz", "torn.npz", "header.npz", "axes.npz", "text.json"):
        with pytest.raises(InputError, match="scores"):
            Scores.load(tmp_path / name)


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_a_failed_save_leaves_the_old_file(case, tmp_path, suffix, monkeypatch):
    _, _, scores = case
    path = tmp_path / f"scores{suffix}"
    path.write_text("old")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        scores.save(path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_printing_shows_a_row_for_each_kind(case):
    _, graph, scores = case
    lines = str(scores).splitlines()
    assert lines[0] == "element1, sum over members, seed 4"
    assert [line.split()[0] for line in lines[2:]] == list(dict.fromkeys(a.kind for a in graph.axes))
    heads = [a for a in graph.axes if a.kind == "head"]
    row = next(line for line in lines if line.startswith("head")).split()
    assert row[1:3] == [str(len(heads)), str(sum(a.size for a in heads))]
    assert repr(scores) == f"Scores({len(scores)} axes, importance='element1', aggregation='sum')"


def test_the_graph_and_the_data_are_on_record(case):
    model, graph, scores = case
    assert scores.fingerprint == graph.fingerprint
    assert scores.calibration_hash is not None
    assert score(model, graph, importance="l1").calibration_hash is None


def test_axes_of_buffers_alone_score_zero(case):
    model, graph, _ = case
    axis = type(graph.axes[0])(len(graph.axes), 3, "other", (_buffer(graph),))
    extended = type(graph)(graph.parameters, [*graph.axes, axis])
    np.testing.assert_array_equal(score(model, extended, importance="l2")[axis.id], np.zeros(3))


def _buffer(graph):
    return type(graph.axes[0].members[0])("rotary.inv_freq", 0, np.arange(3)[:, None])


def test_frozen_axes_are_left_out(case):
    model, graph, _ = case
    frozen = graph.axes[0]
    frozen.prunable = False
    try:
        assert frozen.id not in score(model, graph, importance="l2")
    finally:
        frozen.prunable = True


def test_aggregations_do_what_their_names_say():
    members = np.array([[1.0, 4.0], [3.0, 2.0], [2.0, 0.5]])
    want = {"sum": [6.0, 6.5], "max": [3.0, 4.0], "product": [6.0, 4.0], "last": [2.0, 0.5]}
    assert {name: list(aggregate(members)) for name, aggregate in AGGREGATIONS.items()} == want


@pytest.fixture
def added():
    """An importance of each order, registered for one test: one function each."""

    @registry.register(1)
    def own_element1(w, g, s):
        return (g * w).abs()

    @registry.register(2)
    def own_element2(w, g, s):
        return (g * w - 0.5 * w * s * w).abs()

    @registry.register(0, finish=np.sqrt)
    def own_l2(w, g, s):
        return w * w

    @registry.register(1)
    def gradient_norm(w, g, s):
        return g.square()

    names = ("own_element1", "own_element2", "own_l2", "gradient_norm")
    yield names
    for name in names:
        del registry._REGISTRY[name]


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"checkpointing": True}])
def test_an_importance_is_added_by_one_function(case, added, options):
    model, graph, _ = case
    for name in ("element1", "element2", "l2"):
        want = score(model, graph, ids_of(), importance=name)
        assert worst(score(model, graph, ids_of(), importance=f"own_{name}", **options), want) < 1e-6
    got = score(model, graph, ids_of(), importance="gradient_norm", **options)
    grads = gradients(model, ids_of())
    axis = graph.axes[3]
    (member,) = axis.members
    mean = torch.stack(grads[member.parameter]).mean(0).square()
    want = mean.movedim(member.dim, 0).reshape(axis.size, -1).sum(1).numpy()
    np.testing.assert_allclose(got[axis.id], want, rtol=1e-5)
    assert set(added) < set(registry.known())


def test_every_importance_says_where_it_comes_from():
    for name in registry.known():
        assert len(registry.lookup(name).function.__doc__ or "") > 20
