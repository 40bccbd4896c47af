"""Trees, their inverses, and attribute values solved from equations."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sized_graph import SizedGraph, decoder

from llmprune.errors import PlanError, TraceError
from llmprune.tracing.equations import LIMIT, Attribute, System, describe, evaluate, intersect, invert

A, B = ["attr", "m", "a"], ["attr", "m", "b"]
LEAF_A, LEAF_B = ("attr", "m", "a"), ("attr", "m", "b")


def trees(leaf: Any) -> st.SearchStrategy[Any]:
    """Trees in which one leaf occurs at most once, the rest being constants."""
    return st.recursive(
        st.just(leaf),
        lambda inner: st.one_of(
            st.tuples(
                st.sampled_from(["+", "-", "*", "//", "%", "max", "min"]), inner, st.integers(-4, 9)
            ).map(list),
            st.tuples(st.sampled_from(["+", "-", "*", "//", "max", "min"]), st.integers(-4, 40), inner).map(
                list
            ),
            st.tuples(st.just("neg"), inner).map(list),
        ),
        max_leaves=6,
    )


@settings(deadline=None)
@given(trees(A), st.integers(-20, 60), st.integers(0, 10))
def test_the_inverse_is_exactly_the_set_of_solutions(tree: Any, low: int, width: int) -> None:
    domain = invert(tree, LEAF_A, [(low, low + width)], {LEAF_A: 100})
    for value in range(100):
        try:
            inside = low <= evaluate(tree, {LEAF_A: value}) <= low + width
        except ZeroDivisionError:
            continue
        assert inside == any(lo <= value <= hi for lo, hi in domain), (tree, value, domain)


def test_a_leaf_that_occurs_twice_is_inverted_by_trying() -> None:
    assert invert(["-", A, ["//", A, 2]], LEAF_A, [(4, 4)], {LEAF_A: 20}) == [(7, 8)]
    assert invert(["*", A, A], LEAF_A, [(49, 49)], {LEAF_A: 20}) == [(7, 7)]


def test_intersection_of_domains() -> None:
    assert intersect([(0, 5), (8, LIMIT)], [(-3, 1), (4, 9)]) == [(0, 1), (4, 5), (8, 9)]


def test_trees_read_as_code() -> None:
    assert describe(["*", A, ["//", ["shape", 3, 1], 2]]) == "(m.a * (size(1) // 2))"


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(TraceError, match=r"'\*\*'"):
        evaluate(["**", A, 2], {LEAF_A: 3})


def one_axis(*trees_: Any, size: int = 8) -> tuple[SizedGraph, int]:
    g = SizedGraph()
    axis = g.axis(size)
    for tree in trees_:
        g.equation(tree, [(axis,)])
    return g, axis


def solve(g: SizedGraph, removed: dict[int, int]) -> Any:
    return System(g.axes, [g]).solve(removed)


def test_a_direct_equation_gives_the_value_and_an_untouched_attribute_keeps_its_own() -> None:
    g, axis = one_axis(A)
    other = g.axis(5)
    g.equation(B, [(other,)])
    assert solve(g, {axis: 3}) == {LEAF_A: 5}
    assert System(g.axes, [g]).old == {LEAF_A: 8, LEAF_B: 5}


def test_a_product_is_solved_once_one_factor_is_known() -> None:
    g = SizedGraph()
    heads, width = g.axis(6), g.axis(8)
    g.equation(["*", A, B], [(heads, width)])
    g.equation(B, [(width,)])
    assert solve(g, {heads: 2}) == {LEAF_A: 4}
    assert solve(g, {heads: 2, width: 3}) == {LEAF_A: 4, LEAF_B: 5}


def test_a_product_of_two_unknowns_is_told_apart_by_the_axes() -> None:
    g = SizedGraph()
    heads, width = g.axis(6), g.axis(8)
    g.equation(["*", ["attr", "m", "a", 6], ["attr", "m", "b", 8]], [(heads, width)])
    assert solve(g, {heads: 3}) == {LEAF_A: 3}  # b = 4 would fit as well
    assert solve(g, {width: 4}) == {LEAF_B: 4}


def test_a_division_keeps_the_remainder() -> None:
    g, axis = one_axis(["//", ["attr", "m", "a", 17], 2])
    assert solve(g, {axis: 3}) == {LEAF_A: 11}


def test_groups_follow_heads() -> None:
    g = SizedGraph()
    kv, group = g.axis(3), g.axis(2)
    g.equation(A, [(kv, group)])
    g.equation(["//", A, B], [(group,)])
    g.equation(B, [(kv,)])
    assert solve(g, {kv: 1}) == {LEAF_A: 4, LEAF_B: 2}
    assert solve(g, {group: 1}) == {LEAF_A: 3}


def test_entries_of_tuples_are_attributes_too() -> None:
    assert Attribute.of(("attr", "m", "sizes[2]"), 4, 3) == Attribute("m", "sizes", 2, 4, 3)
    assert str(Attribute("m", "sizes", 2, 4, 3)) == "m.sizes[2]: 4 -> 3"
    assert str(Attribute("", "config.n", None, 4, 3)) == "config.n: 4 -> 3"


def test_a_recorded_value_that_does_not_fit_is_refused() -> None:
    g, _ = one_axis(["+", ["attr", "m", "a", 5], 1])
    with pytest.raises(TraceError, match=r"\(m\.a \+ 1\)"):
        System(g.axes, [g])


def test_missing_values_are_inferred_from_the_unpruned_sizes() -> None:
    g = SizedGraph()
    heads, width = g.axis(6), g.axis(8)
    g.equation(["*", A, B], [(heads, width)])
    g.equation(["*", 2, A], [(heads,), (heads,)])
    assert System(g.axes, [g]).old == {LEAF_A: 6, LEAF_B: 8}


def test_a_decoder_without_ties_touched_changes_only_the_groups() -> None:
    g = decoder()
    assert solve(g, {g.heads[0]: 1, g.ffn[1]: 7}) == {}
    assert solve(g, {g.groups[0]: 1}) == {("attr", "model.layers.0.attn", "num_key_value_groups"): 1}


def test_an_equation_without_attributes_that_cannot_hold_is_reported() -> None:
    g = SizedGraph()
    axis, fixed = g.axis(8), g.axis(4, frozen="a model input")
    base = g.tensor([(axis,)])
    g.equation(["//", ["shape", base, 0], 2], [(fixed,)], where="narrow in m")
    moves = solve(g, {axis: 2})
    assert [(m.bound, m.leaf[2]) for (m,) in moves] == [(3, 1)]


def test_no_solution_names_the_equation() -> None:
    g = SizedGraph()
    x, y = g.axis(6), g.axis(4)
    g.equation(["//", 24, A], [(x,)], where="view in m")  # a = 4; fewer x needs a larger a
    g.equation(["//", 24, ["+", A, 2]], [(y,)], where="view in n")
    with pytest.raises(PlanError, match="view in"):
        solve(g, {x: 3})
