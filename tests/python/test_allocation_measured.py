"""Sensitivity, search and rounds: what is measured, what stays equal, and that they are worth it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build
from torch import nn

import llmprune
from llmprune.errors import InputError
from llmprune.pipeline.iterative import settled, shares
from llmprune.planning.divergence import Divergence
from llmprune.planning.search import _Search
from llmprune.planning.selection import candidates_of, check_scores
from llmprune.scoring.calibration import Batch, load_calibration


def ids(samples: int = 6, length: int = 12) -> Batch:
    return load_calibration(
        torch.randint(3, 90, (samples, length), generator=torch.Generator().manual_seed(0))
    )


def case(importance: str = "l2") -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = build("llama")
    with torch.no_grad():  # one feed-forward that does nothing, one that does much
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-3)
        model.model.layers[1].mlp.down_proj.weight.mul_(5)
    graph = llmprune.trace(model)
    scores = llmprune.score(model, graph, ids(), importance=importance, kinds=("head", "ffn"))
    return model, graph, scores


def ffn_axes(graph: Any) -> list[int]:
    return [axis.id for axis in graph.axes if axis.prunable and axis.kind == "ffn"]


def test_the_divergence_is_that_of_the_predictions() -> None:
    model, graph, scores = case()
    plan = llmprune.plan(graph, scores, ratio=0.1, protect_first=0, protect_last=0)
    with torch.no_grad():
        found = Divergence(model, ids(), False)(plan)
        small = llmprune.compact(copy.deepcopy(model), plan)
        p, q = (
            m(input_ids=ids().inputs["input_ids"], use_cache=False).logits.double().log_softmax(-1)
            for m in (model, small)
        )
        assert Divergence(model, ids(), False)(llmprune.plan(graph, removed={})) == pytest.approx(0, abs=1e-9)
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2)


def test_sensitivity_gives_scores_that_add_up_to_what_was_measured() -> None:
    model, graph, scores = case()
    before = copy.deepcopy(model.state_dict())
    found = llmprune.sensitivity(model, graph, scores, ids(), repair=False, quiet=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert found.comparable
    dead, alive = ffn_axes(graph)[:2]
    with torch.no_grad():
        cost = Divergence(model, ids(), False)
        for axis in (dead, alive):
            assert len(found.curves[axis]) == 3
            order = np.argsort(scores[axis], kind="stable")
            np.testing.assert_array_equal(np.argsort(found[axis], kind="stable"), order)
            for count, measured in found.curves[axis]:
                plan = llmprune.plan(graph, removed={axis: order[:count]})
                assert measured == pytest.approx(max(0.0, cost(plan)), rel=1e-5)
            count, measured = found.curves[axis][0]
            assert found[axis][order[:count]].sum() == pytest.approx(measured, rel=1e-6)
    assert found.curves[dead][-1][1] < 1e-2 * found.curves[alive][-1][1]
    plan = llmprune.plan(graph, found, ratio=0.1, allocation="sensitivity")
    assert plan.options["allocation"] == "sensitivity"
    gone = {axis: len(indices) for axis, indices in plan.removed.items()}
    assert gone.get(dead, 0) > gone.get(alive, 0)
    least = min(graph.numel({}) - graph.numel({axis: 1}) for axis in found)
    assert abs(plan.parameters_after - 0.9 * plan.parameters_before) <= least
    assert llmprune.verify(model, plan).relative_error < 1e-5
    again = llmprune.Scores.from_json(found.to_json())
    assert again.curves == found.curves


def test_a_search_keeps_the_parameters_and_comes_nearer() -> None:
    model, graph, scores = case()
    plan = llmprune.plan(graph, scores, ratio=0.15, allocation="search", protect_first=0, protect_last=0)
    before = copy.deepcopy(model.state_dict())
    found = llmprune.search(model, graph, scores, plan, ids(), seconds=600, steps=25, quiet=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    record = found.options["search"]
    assert record["steps"] == 25
    assert record["divergence"]["after"] < record["divergence"]["before"]
    cost = max(graph.numel({}) - graph.numel({axis: 1}) for axis in scores)
    assert plan.parameters_after - cost < found.parameters_after <= plan.parameters_after
    assert llmprune.verify(model, found).relative_error < 1e-5
    again = llmprune.search(model, graph, scores, plan, ids(), seconds=600, steps=25, quiet=True)
    assert again == found
    other = llmprune.search(model, graph, scores, plan, ids(), seconds=600, steps=25, seed=1, quiet=True)
    assert other.options["search"] != record


def test_no_time_means_no_change() -> None:
    model, graph, scores = case()
    plan = llmprune.plan(graph, scores, ratio=0.15, protect_first=0, protect_last=0)
    found = llmprune.search(model, graph, scores, plan, ids(), seconds=0, quiet=True)
    assert found.kept.keys() == plan.kept.keys()
    assert found.options["search"]["steps"] == 0


def test_proposals_never_cost_parameters() -> None:
    _, graph, scores = case()
    plan = llmprune.plan(graph, scores, ratio=0.15, protect_first=0, protect_last=0)
    work = _Search(graph, candidates_of(graph, check_scores(graph, scores), plan.options), plan, 3)
    target = graph.numel(work.start)
    proposals = [p for number in range(300) if (p := work.propose(work.start, number)) is not None]
    assert len(proposals) > 100
    cost = max(graph.numel({}) - graph.numel({axis: 1}) for axis in scores)
    assert all(target - cost < graph.numel(p) <= target for p in proposals)


def test_a_killed_search_goes_on_where_it_was(tmp_path: Path) -> None:
    model, graph, scores = case()
    plan = llmprune.plan(graph, scores, ratio=0.15, protect_first=0, protect_last=0)
    how: dict[str, Any] = {"seconds": 600.0, "quiet": True}
    whole = llmprune.search(model, graph, scores, plan, ids(), steps=20, **how)
    state = tmp_path / "state.json"
    real, calls = Divergence.__call__, []

    def dying(self: Any, plan: Any) -> float:
        calls.append(plan)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(self, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Divergence, "__call__", dying)
        with pytest.raises(KeyboardInterrupt):
            llmprune.search(model, graph, scores, plan, ids(), steps=20, state=state, **how)
    left = json.loads(state.read_text())
    assert 0 < left["steps"] < 20
    found = llmprune.search(model, graph, scores, plan, ids(), steps=20, state=state, **how)
    assert found.removed.keys() == whole.removed.keys()
    assert all(np.array_equal(found.removed[axis], whole.removed[axis]) for axis in whole.removed)
    assert json.loads(state.read_text())["steps"] == 20
    with pytest.raises(InputError, match=r"another search \(its seed differ\)"):
        llmprune.search(model, graph, scores, plan, ids(), seed=1, state=state, **how)
    state.write_text("{}")
    with pytest.raises(InputError, match="no state of a search"):
        llmprune.search(model, graph, scores, plan, ids(), state=state, **how)


@pytest.mark.parametrize("importance", ["obs", "element2"])
def test_rounds_score_what_is_left(importance: str) -> None:
    model, graph, _ = case()
    data = ids(16)
    twin = copy.deepcopy(model)
    how: dict[str, Any] = {"repair": "none", "protect_first": 0, "protect_last": 0, "quiet": True}
    report = llmprune.prune(twin, None, 0.2, data, importance, rounds=2, **how)
    # The same by hand: half of it is zeroed, what is left is scored afresh, and what went goes first.
    options: dict[str, Any] = {"protect_first": 0, "protect_last": 0}
    scores = llmprune.score(model, graph, data, importance, kinds=("head", "ffn"))
    half = llmprune.plan(graph, scores, 0.1, **options)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for axis, gone in half.removed.items():
            for member in graph.axes[axis].members:
                places = torch.from_numpy(member.positions.reshape(graph.axes[axis].size, -1)[gone].ravel())
                zeroed.get_parameter(member.parameter).index_fill_(member.dim, places, 0)
    again = llmprune.score(zeroed, graph, data, importance, kinds=("head", "ffn"))
    want = llmprune.plan(graph, settled(again, half), 0.2, **options)
    assert report.plan.removed.keys() == want.removed.keys()
    assert all(np.array_equal(report.plan.removed[axis], gone) for axis, gone in want.removed.items())
    assert report.verification is not None
    assert report.verification.relative_error < 1e-5
    for name, dims in report.plan.kept.items():  # positions of the original
        values = model.get_parameter(name)
        for dim, kept in dims.items():
            values = values.index_select(dim, torch.from_numpy(kept))
        assert torch.equal(twin.get_parameter(name), values)


def test_one_round_is_the_ordinary_choice() -> None:
    model, _, _ = case()
    plans = [
        llmprune.prune(copy.deepcopy(model), None, 0.2, ids(16), quiet=True, **options).plan
        for options in ({}, {"rounds": 1, "schedule": "cubic"})
    ]
    assert plans[0] == plans[1]


def test_what_went_stays_gone() -> None:
    model, graph, scores = case()
    plan = llmprune.plan(graph, scores, ratio=0.1, protect_first=0, protect_last=0)
    after = settled(scores, plan)
    for axis, gone in plan.removed.items():
        assert set(np.argsort(after[axis], kind="stable")[: len(gone)]) == set(gone.tolist())
        stays = np.setdiff1d(np.arange(len(scores[axis])), gone)
        np.testing.assert_array_equal(after[axis][stays], scores[axis][stays])
    further = llmprune.plan(graph, after, ratio=0.2, protect_first=0, protect_last=0)
    for axis, gone in plan.removed.items():  # whatever an axis gives, it gives these first
        now = set(further.removed[axis].tolist())
        assert now <= set(gone.tolist()) or set(gone.tolist()) <= now
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_schedules() -> None:
    assert shares(4, "linear") == [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_allclose(shares(2, "cubic"), [0.875, 1.0])
    assert shares(1, "cubic") == [1.0]


def test_bad_input() -> None:
    model, graph, scores = case()
    data = ids()
    for options, sentence in (
        ({"rounds": 0}, "rounds must be an integer of at least 1"),
        ({"schedule": "steep"}, "there are linear and cubic"),
        ({"allocation": "search", "ratio": {"ffn": 0.2}}, "shares out a budget"),
    ):
        with pytest.raises(InputError, match=sentence):
            llmprune.prune(model, None, **{"ratio": 0.1, "calibration": data, **options})
    with pytest.raises(InputError, match="needs measured scores"):
        llmprune.plan(graph, scores, 0.1, allocation="sensitivity")
    with pytest.raises(InputError, match="axes inside layers"):
        llmprune.sensitivity(model, graph, scores, data, kinds=("layer",))
