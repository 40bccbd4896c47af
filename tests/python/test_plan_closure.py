"""Closure over ties: sound, minimal on small models, and clear when something frozen is in the way."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sized_graph import Decoder, SizedGraph, decoder

from llmprune.errors import PlanError
from llmprune.planning.closure import close
from llmprune.tracing.equations import System, evaluate


def closed(g: SizedGraph, removed: dict[int, int]) -> dict[int, int]:
    """The closed counts, after checking that every equation holds with the attributes found."""
    system = System(g.axes, [g])
    counts, changed = close(system, removed)
    values = {**system.old, **changed}
    sizes = system.sizes(counts)
    for equation in system.equations:
        env = {leaf: sizes[leaf] if leaf[0] == "shape" else values[leaf] for leaf in equation.leaves}
        assert evaluate(equation.tree, env) == sizes[equation.target], str(equation)
    assert all(counts.get(axis, 0) >= n for axis, n in removed.items())
    assert all(0 < n < g.axes[axis].size for axis, n in counts.items())
    return counts


def test_a_value_channel_takes_a_rope_pair_and_every_layers_value_channels_along() -> None:
    g = decoder(layers=3)
    assert closed(g, {g.values[1]: 2}) == {g.pairs: 1, g.values[0]: 2, g.values[1]: 2, g.values[2]: 2}


def test_an_odd_removal_is_rounded_up() -> None:
    g = decoder()
    assert closed(g, {g.values[0]: 1}) == {g.pairs: 1, g.values[0]: 2, g.values[1]: 2}
    assert closed(g, {g.values[0]: 3, g.values[1]: 1}) == {g.pairs: 2, g.values[0]: 4, g.values[1]: 4}


def test_heads_and_channels_are_tied_to_nothing() -> None:
    g = decoder()
    wanted = {g.heads[0]: 2, g.ffn[1]: 30, g.groups[0]: 1}
    assert closed(g, wanted) == wanted


def test_fused_projections_close_over_their_chunks() -> None:
    """GPT-NeoX: 3 * head_size is one size, and chunk(3) cuts it into equal parts."""
    g = SizedGraph()
    q, k, v, heads = g.axis(8), g.axis(8), g.axis(8), g.axis(2)
    fused = g.tensor([(heads,)], [(q,), (k,), (v,)])
    g.equation(["*", 3, ["attr", "m", "head_size"]], [(q,), (k,), (v,)])
    for part in (q, k, v):
        g.equation(["//", ["+", ["shape", fused, 1], 2], 3], [(part,)], where="chunk")
    assert closed(g, {v: 2}) == {q: 2, k: 2, v: 2}


def test_a_fused_projection_of_partly_rotary_heads_leaves_the_shared_pairs_alone() -> None:
    """GPT-NeoX: query and key are two rope halves and a rest, tied to each other; value is an axis of its own."""
    g = SizedGraph()
    pairs = g.axis(2, "head_dim")
    rests, values = [g.axis(4), g.axis(4)], [g.axis(8), g.axis(8)]
    for layer, (rest, value) in enumerate(zip(rests, values, strict=True)):
        query: list[tuple[int, ...]] = [(pairs,), (pairs,), (rest,)]
        fused = g.tensor([*query, *query, (value,)], name=f"h.{layer}.weight")
        g.equation(["*", 3, ["attr", f"h.{layer}", "head_size"]], [*query, *query, (value,)])
        for part in (query, query, [(value,)]):
            g.equation(["//", ["shape", fused, 0], 3], part, where="chunk")
    assert closed(g, {values[0]: 2}) == {values[0]: 2, rests[0]: 2}
    assert closed(g, {rests[1]: 1}) == {values[1]: 1, rests[1]: 1}
    everywhere = closed(g, {pairs: 1})
    assert everywhere == {pairs: 1, values[0]: 2, values[1]: 2}


def test_more_choices_than_can_be_searched_still_close() -> None:
    g = SizedGraph()
    parts = [g.axis(200), g.axis(200), g.axis(200)]
    fused = g.tensor([(p,) for p in parts], name="weight")
    g.equation(["*", 3, ["attr", "m", "head_size"]], [(p,) for p in parts])
    for part in parts:
        g.equation(["//", ["shape", fused, 0], 3], [(part,)], where="chunk")
    assert closed(g, {parts[2]: 30}) == dict.fromkeys(parts, 30)


def test_a_product_lowers_the_attribute_that_names_the_axis() -> None:
    g = SizedGraph()
    heads, pairs, value = g.axis(6, "head"), g.axis(4), g.axis(8)
    count, width = ["attr", "m", "heads"], ["attr", "m", "head_dim"]
    g.equation(count, [(heads,)])
    g.equation(width, [(pairs,), (pairs,)])
    g.equation(["*", count, width], [(heads, value)])
    assert closed(g, {value: 1}) == {value: 2, pairs: 1}
    assert closed(g, {heads: 2}) == {heads: 2}


def test_the_axis_that_fits_exactly_gives() -> None:
    """Partial rotary: rope pairs (shared by the layers) count twice, a head's pass-through part once."""
    g = SizedGraph()
    pairs, rests, values = g.axis(2, "head_dim"), [], []
    for layer in ("m.0", "m.1"):
        rest, value = g.axis(4), g.axis(8)
        width, rotary = ["attr", layer, "head_dim"], ["attr", layer, "rotary"]
        whole = g.tensor([(pairs,), (pairs,), (rest,)], name=f"{layer}.weight")
        g.equation(width, [(pairs,), (pairs,), (rest,)])
        g.equation(width, [(value,)])
        g.equation(rotary, [(pairs,), (pairs,)], where="narrow")
        g.equation(["-", ["shape", whole, 0], rotary], [(rest,)], where="narrow")
        rests.append(rest)
        values.append(value)
    assert closed(g, {values[0]: 1}) == {values[0]: 1, rests[0]: 1}
    assert closed(g, {values[1]: 2}) == {values[1]: 2, rests[1]: 2}
    # A head's pass-through part cannot give more than three: the pairs must go along, in every layer.
    counts = closed(g, {values[0]: 5})
    assert counts[pairs] == 1


def test_another_axis_is_tried_when_the_first_choice_meets_a_frozen_one() -> None:
    g = SizedGraph()
    easy, good, stuck, value = g.axis(4), g.axis(4), g.axis(4, frozen="a model input"), g.axis(8)
    g.equation(["attr", "m", "d"], [(value,)])
    g.equation(["attr", "m", "d"], [(easy,), (good,)])
    g.equation(["attr", "m", "e"], [(easy,)])
    g.equation(["attr", "m", "e"], [(stuck,)])
    for _ in range(3):  # the good axis is in more equations, so it is not the first choice
        g.equation(["shape", g.tensor([(good,)]), 0], [(good,)])
    assert closed(g, {value: 2}) == {value: 2, good: 2}


def test_a_frozen_axis_in_the_way_is_named_with_its_reason() -> None:
    g = decoder()
    g.axes[g.pairs].prunable, g.axes[g.pairs].reasons = False, ("rope tables are rebuilt on load",)
    with pytest.raises(PlanError, match=r"head_dim.*axis 2 .*is frozen: rope tables are rebuilt on load"):
        close(System(g.axes, [g]), {g.values[0]: 2})


def test_the_last_index_of_an_axis_stays() -> None:
    g = decoder(pairs=2)
    with pytest.raises(PlanError, match=r"cannot give enough: 1 are left|cannot give enough: 2 are left"):
        close(System(g.axes, [g]), {g.values[0]: 3})


def holds(g: SizedGraph, counts: dict[int, int]) -> bool:
    """Whether one head_dim per layer satisfies a decoder's equations: stated directly, not by the solver."""
    assert isinstance(g, Decoder)
    width = 2 * (g.axes[g.pairs].size - counts.get(g.pairs, 0))
    return all(g.axes[v].size - counts.get(v, 0) == width for v in g.values)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_closure_of_a_decoder_is_the_least_one(data: st.DataObject) -> None:
    g = decoder(layers=data.draw(st.integers(1, 2)), pairs=data.draw(st.integers(2, 3)))
    axes = [g.pairs, *g.values]
    removed = {a: data.draw(st.integers(0, g.axes[a].size - 1)) for a in axes}
    feasible = [
        dict(zip(axes, counts, strict=True))
        for counts in product(*(range(removed[a], g.axes[a].size) for a in axes))
        if holds(g, dict(zip(axes, counts, strict=True)))
    ]
    if not feasible:
        with pytest.raises(PlanError):
            close(System(g.axes, [g]), removed)
        return
    least = min(feasible, key=lambda counts: sum(counts.values()))
    assert closed(g, removed) == {a: n for a, n in least.items() if n}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_random_ties_between_multiples_close_to_the_least_fixpoint(data: st.DataObject) -> None:
    """Attributes that size multiples of several axes each: a chain of ties with parities."""
    g = SizedGraph()
    axes = [g.axis(data.draw(st.integers(2, 5))) for _ in range(data.draw(st.integers(2, 4)))]
    ties: list[tuple[int, int, int, int]] = []
    for number in range(data.draw(st.integers(1, 3))):
        a, b = data.draw(st.sampled_from(axes)), data.draw(st.sampled_from(axes))
        # p copies of a and q copies of b, of one common size
        p, q = g.axes[b].size, g.axes[a].size
        tree: Any = ["attr", "m", f"n{number}"]
        g.equation(tree, [(a,)] * p)
        g.equation(tree, [(b,)] * q)
        ties.append((a, p, b, q))
    removed = {a: data.draw(st.integers(0, g.axes[a].size - 1)) for a in axes}
    size = {a: g.axes[a].size for a in axes}
    feasible = [
        counts
        for values in product(*(range(removed[a], size[a]) for a in axes))
        if (counts := dict(zip(axes, values, strict=True)))
        and all(p * (size[a] - counts[a]) == q * (size[b] - counts[b]) for a, p, b, q in ties)
    ]
    if not feasible:
        with pytest.raises(PlanError):
            close(System(g.axes, [g]), removed)
        return
    least = {a: min(counts[a] for counts in feasible) for a in axes}
    assert closed(g, removed) == {a: n for a, n in least.items() if n}
