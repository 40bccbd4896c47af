"""Ratios, allocations, protection, rounding, scope, and what cannot be done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sized_graph import Decoder, SizedGraph, decoder

from llmprune.errors import InputError, PlanError
from llmprune.planning.allocation import Candidate, layer_of, protected, rank, stacks
from llmprune.planning.plan import plan

PLAN: Any = plan  # the stand-in graph is no llmprune.tracing.graph.Graph


def scored(g: SizedGraph, seed: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {axis.id: rng.random(axis.size) for axis in g.axes}


def largest_group(g: SizedGraph, axes: list[int]) -> int:
    return max(g.numel({}) - g.numel({axis: 1}) for axis in axes)


def test_ranking_is_stable() -> None:
    assert rank(np.array([2.0, 1.0, 2.0, 0.0, 1.0])).tolist() == [3, 1, 4, 0, 2]


def test_the_layer_is_the_first_number_in_a_gapless_stack() -> None:
    names = ["h.0.a.weight", "h.1.a.weight", "net.0.weight", "net.2.weight", "wte.weight", "h.1.experts.0.w"]
    known = stacks(names)
    assert known == {"h": 2, "h.1.experts": 1}
    assert layer_of(["h.1.a.weight", "h.1.experts.0.w"], known) == ("h", 1)
    assert layer_of(["h.0.a.weight", "h.1.a.weight"], known) is None
    assert layer_of(["net.2.weight"], known) is None


def test_protection_scales_the_papers_choice() -> None:
    def left_whole(depth: int, first: int | None = None, last: int | None = None) -> list[int]:
        return [n for n in range(depth) if protected(("h", n), {"h": depth}, first, last)]

    assert left_whole(32) == [0, 1, 2, 3, 30, 31]
    assert left_whole(80) == [*range(10), *range(75, 80)]
    assert left_whole(5) == [0]
    assert left_whole(2) == []
    assert left_whole(4, first=0, last=1) == [3]
    assert not protected(None, {}, 9, 9)


@settings(deadline=None, max_examples=40)
@given(
    ratio=st.floats(0.02, 0.5),
    allocation=st.sampled_from(["uniform", "global"]),
    layers=st.integers(1, 4),
    kv=st.integers(2, 4),
    ffn=st.integers(8, 40),
    seed=st.integers(0, 3),
)
def test_the_ratio_is_met_within_one_group(
    ratio: float, allocation: str, layers: int, kv: int, ffn: int, seed: int
) -> None:
    g = decoder(layers=layers, kv=kv, ffn=ffn)
    axes = [*g.heads, *g.ffn]
    total = g.numel({})
    reach = total - g.numel({a: g.axes[a].size - 1 for a in axes})
    target = ratio * total
    arguments = {"allocation": allocation, "protect_first": 0, "protect_last": 0}
    if target > reach + largest_group(g, axes):
        with pytest.raises(PlanError, match=f"{reach / total:.4f}"):
            PLAN(g, scored(g, seed), ratio, **arguments)
        return
    if target > reach:  # less than one group short: either answer is right
        return
    p = PLAN(g, scored(g, seed), ratio, **arguments)
    counts = {a: len(i) for a, i in p.removed.items()}
    assert (p.parameters_before, p.parameters_after) == (total, g.numel(counts))
    assert p.ratio == 1 - p.parameters_after / total
    assert all(0 < n < g.axes[a].size for a, n in counts.items())

    def freed(axis: int, by: int) -> int:
        return total - g.numel({**counts, axis: counts.get(axis, 0) + by})

    if total - p.parameters_after <= target:
        assert all(freed(a, 1) > target - 1 for a in axes if counts.get(a, 0) < g.axes[a].size - 1)
    else:
        assert any(freed(a, -1) <= target for a in counts)


def test_the_lowest_scores_go_and_ties_go_by_index() -> None:
    g = decoder(layers=1, ffn=10)
    scores = scored(g)
    scores[g.ffn[0]] = np.array([1, 0, 1, 0, 0, 5, 5, 5, 5, 5.0])
    p = PLAN(g, scores, {"ffn": 0.4})
    assert p.removed[g.ffn[0]].tolist() == [0, 1, 3, 4]


def test_uniform_takes_the_same_share_of_every_layer() -> None:
    g = decoder(layers=4, ffn=64)
    scores = scored(g)
    scores[g.ffn[2]] *= 1000
    p = PLAN(g, scores, 0.3, protect_first=0, protect_last=0)
    removed = [len(p.removed[a]) for a in g.ffn]
    assert max(removed) - min(removed) <= 1 + largest_group(g, g.heads) // largest_group(g, g.ffn)


def test_global_spares_the_layers_that_matter() -> None:
    g = decoder(layers=4, ffn=64)
    scores = {axis.id: np.ones(axis.size) for axis in g.axes}
    scores[g.ffn[2]] *= 1000
    p = PLAN(g, scores, 0.2, kinds=("ffn",), allocation="global", protect_first=0, protect_last=0)
    assert len(p.removed) > 0
    assert set(p.removed) <= {g.ffn[0], g.ffn[1], g.ffn[3]}


def test_global_does_not_depend_on_the_scale_of_a_kind() -> None:
    g = decoder(layers=3)
    scores = scored(g)
    p = PLAN(g, scores, 0.25, allocation="global", protect_first=0, protect_last=0)
    for axis in g.heads:
        scores[axis] = scores[axis] * 1e6
    assert PLAN(g, scores, 0.25, allocation="global", protect_first=0, protect_last=0) == p


def test_protected_layers_stay_whole() -> None:
    g = decoder(layers=4)
    p = PLAN(g, scored(g), 0.2, protect_first=1, protect_last=2)
    assert set(p.removed) <= {g.heads[1], g.ffn[1]}
    assert p.axes[g.ffn[1]]["layer"] == "model.layers.1"


def test_a_share_per_kind_is_rounded_down_in_every_layer() -> None:
    g = decoder(layers=3, kv=3, ffn=56)
    p = PLAN(g, scored(g), {"ffn": 0.2, "head": 0.34}, protect_first=0, protect_last=0)
    assert [len(p.removed[a]) for a in g.ffn] == [11, 11, 11]
    assert [len(p.removed[a]) for a in g.heads] == [1, 1, 1]
    assert Candidate(0, "ffn", 100, np.zeros(100)).share(0.29) == 29  # 0.29 * 100 is a little less in binary


@pytest.mark.parametrize("multiple", [8, 16])
def test_kept_channels_are_a_multiple(multiple: int) -> None:
    g = decoder(layers=3, ffn=60)
    for ratio in (0.3, {"ffn": 0.3}):
        p = PLAN(g, scored(g), ratio, round_to=multiple, protect_first=0, protect_last=0)
        kept = [60 - len(p.removed.get(a, ())) for a in g.ffn]
        assert all(k % multiple == 0 or k == 60 for k in kept)
        assert any(k < 60 for k in kept)


def test_only_what_lies_in_the_scope_is_pruned() -> None:
    g = decoder(layers=3)
    p = PLAN(g, scored(g), 0.1, scope="model.layers.1", protect_first=0, protect_last=0)
    assert set(p.removed) <= {g.heads[1], g.ffn[1]}
    p = PLAN(g, scored(g), {"ffn": 0.5}, scope="model.layers.2.mlp", protect_first=0, protect_last=0)
    assert set(p.removed) == {g.ffn[2]}


def test_a_tied_kind_meets_the_ratio_with_what_it_drags_along() -> None:
    g = decoder(layers=2, pairs=16, hidden=24)
    axes = [g.pairs, *g.values]
    p = PLAN(g, scored(g), 0.1, kinds=("value_dim",), protect_first=0, protect_last=0)
    counts = {a: len(p.removed[a]) for a in axes}
    assert counts[g.values[0]] == counts[g.values[1]] == 2 * counts[g.pairs]
    one = g.numel({}) - g.numel({g.pairs: 1, g.values[0]: 2, g.values[1]: 2})
    assert abs(p.ratio - 0.1) * p.parameters_before <= one
    width = {(a.module, a.name): a.new for a in p.attributes}
    assert width["model.layers.0.attn", "head_dim"] == 32 - counts[g.values[0]]


def test_plans_are_deterministic() -> None:
    g = decoder(layers=3)
    scores = {axis.id: np.ones(axis.size) for axis in g.axes}
    one, two = (PLAN(g, scores, 0.2, protect_first=0, protect_last=0) for _ in range(2))
    assert one == two
    for indices in one.removed.values():
        assert indices.tolist() == list(range(len(indices)))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"ratio": 0.0}, InputError, "strictly between 0 and 1, not 0"),
        ({"ratio": 1.0}, InputError, "strictly between 0 and 1"),
        ({"ratio": float("nan")}, InputError, "strictly between 0 and 1"),
        ({"ratio": {"ffn": 1.0}}, InputError, r"share of ffn to remove must lie in \[0, 1\)"),
        ({"ratio": {"fnn": 0.5}}, InputError, "unknown kind 'fnn': the kinds are head, query, ffn"),
        ({"ratio": {"expert": 0.5}}, PlanError, "no prunable axis of kind expert: it has head"),
        ({"kinds": ()}, InputError, "no kind"),
        ({"kinds": ("state",)}, PlanError, "no prunable axis of kind state"),
        ({"allocation": "even"}, InputError, "unknown allocation 'even': there are auto, uniform, global"),
        ({"round_to": 0}, InputError, "round_to must be an integer of at least 1"),
        ({"protect_first": -1}, InputError, "protect_first"),
        ({"scope": "model.layer"}, InputError, "no parameter lies under the scope 'model.layer'"),
        ({"scope": "model.embed"}, PlanError, "largest reachable ratio is 0"),
        ({"protect_first": 3}, PlanError, "largest reachable ratio is 0"),
        ({"ratio": 0.99}, PlanError, r"ratio 0.99 cannot be reached .* largest reachable ratio is 0\.\d+"),
        ({"ratio": 0.5, "round_to": 128, "kinds": ("ffn",)}, PlanError, "largest reachable ratio is 0.0000"),
        ({"scores": None}, InputError, "needs scores"),
        ({"removed": {0: [1]}}, InputError, "not both"),
        ({"ratio": None}, InputError, "either"),
    ],
)
def test_bad_demands_are_one_sentence(change: dict[str, Any], error: type[Exception], text: str) -> None:
    g = decoder(layers=3)
    arguments = {"scores": scored(g), "ratio": 0.2, **change}
    with pytest.raises(error, match=text) as caught:
        PLAN(g, arguments.pop("scores"), arguments.pop("ratio"), **arguments)
    assert "\n" not in str(caught.value)


def test_scores_must_be_of_this_graph() -> None:
    g: Decoder = decoder(layers=3)
    scores = scored(g)

    class Foreign(dict[int, np.ndarray]):
        fingerprint = "another"

    with pytest.raises(PlanError, match="another model"):
        PLAN(g, Foreign(scores), 0.2)
    missing = {a: s for a, s in scores.items() if a != g.ffn[1]}
    with pytest.raises(PlanError, match=r"axis \d+ \(ffn, size 56 of model.layers.1.* has no scores"):
        PLAN(g, missing, 0.2)
    with pytest.raises(PlanError, match="scores of shape"):
        PLAN(g, {**scores, g.ffn[1]: np.zeros(3)}, 0.2)
    broken = scores[g.ffn[1]].copy()
    broken[7] = np.nan
    with pytest.raises(PlanError, match="not finite at index 7"):
        PLAN(g, {**scores, g.ffn[1]: broken}, 0.2)
    with pytest.raises(PlanError, match="name axis 999"):
        PLAN(g, {**scores, 999: np.zeros(3)}, 0.2)


class Nested(dict[int, np.ndarray]):
    """Scores that know each query head apart."""

    def __init__(self, flat: dict[int, np.ndarray], nested: dict[int, np.ndarray]) -> None:
        super().__init__(flat)
        self.nested = nested


def test_query_heads_go_by_their_own_scores_in_each_group() -> None:
    g = decoder(layers=2, kv=3, group=4, pairs=2)
    table = np.random.default_rng(3).random((3, 4))
    scores = Nested(scored(g), dict.fromkeys(g.groups, table))
    p = PLAN(g, scores, {"query": 0.5}, protect_first=0, protect_last=0)
    for axis in g.groups:
        assert p.removed[axis].tolist() == np.sort(np.argsort(table, axis=1)[:, :2], axis=1).tolist()
        assert p.axes[axis]["removed"] == 2
    rows = p.kept["model.layers.0.attn.o.weight"][1].reshape(3, 2, 4)  # kv x kept heads x head_dim
    assert [sorted({int(r) // 4 % 4 for r in group.ravel()}) for group in rows] == [
        sorted(set(range(4)) - set(row)) for row in p.removed[g.groups[0]].tolist()
    ]
    assert {(a.name, a.new) for a in p.attributes} == {("num_key_value_groups", 2)}
    with_budget = PLAN(g, scores, 0.15, kinds=("query", "ffn"), protect_first=0, protect_last=0)
    assert all(with_budget.removed[axis].shape[0] == 3 for axis in g.groups if axis in with_budget.removed)
    assert p == PLAN(g, scores, {"query": 0.5}, protect_first=0, protect_last=0)
