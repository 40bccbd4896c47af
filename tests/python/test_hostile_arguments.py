"""Arguments that make no sense: trace, score, plan, verify and prune refuse them with typed errors, or take them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from compact_plans import llama
from hostile import EXAMPLES, FLOATS, NUMBERS, ODD, TEXTS
from hypothesis import given
from hypothesis import strategies as st

import llmprune
from llmprune.errors import LlmpruneError

MODEL = llama()
GRAPH = llmprune.trace(MODEL)
IDS = torch.arange(12).reshape(2, 6) % 61
SCORES = llmprune.score(MODEL, GRAPH, IDS, importance="element1")

KINDS = st.lists(st.sampled_from(["head", "ffn", "query", "channel", "layer", "other", "x", ""]), max_size=3)
SHARES = st.one_of(FLOATS, st.floats(0, 1), ODD)
COUNTS = st.one_of(st.integers(-2, 5), ODD)


def refused_or_sound(call: Callable[[], Any]) -> Any | None:
    """The result of a call; None where it was refused in one sentence."""
    error: LlmpruneError | None = None
    try:
        return call()
    except LlmpruneError as caught:
        error = caught
    assert len(str(error).splitlines()) == 1, repr(error)
    return None


def sound(plan: Any) -> None:
    """A plan that was made can be carried out."""
    if plan is not None:
        assert 0 <= plan.parameters_after <= plan.parameters_before
        smaller = llmprune.compact(copy.deepcopy(MODEL), plan)
        assert sum(p.numel() for p in smaller.parameters()) == plan.parameters_after


@EXAMPLES
@given(
    st.one_of(SHARES, st.dictionaries(st.sampled_from(["head", "ffn", "layer", "x"]), SHARES, max_size=2)),
    st.fixed_dictionaries(
        {},
        optional={
            "kinds": st.one_of(KINDS, ODD),
            "allocation": st.one_of(
                st.sampled_from(["auto", "uniform", "global", "search", "sensitivity"]), ODD
            ),
            "protect_first": COUNTS,
            "protect_last": COUNTS,
            "round_to": COUNTS,
            "tp": COUNTS,
            "scope": st.one_of(st.sampled_from(["model", "model.layers.0", "mlp"]), ODD),
            "norms": st.one_of(st.sampled_from(["kept", "rescaled"]), ODD),
            "seed": NUMBERS,
        },
    ),
)
def test_plans_by_ratio(ratio: Any, options: dict[str, Any]) -> None:
    sound(refused_or_sound(lambda: llmprune.plan(GRAPH, SCORES, ratio, **options)))


@EXAMPLES
@given(
    st.sampled_from(["params", "memory", "macs"]),
    st.one_of(SHARES, NUMBERS, st.sampled_from(["0.8x", "10K", "40KB", "5.4B", "-1", "1e400", "nanx", "x"])),
    st.fixed_dictionaries({}, optional={"context": COUNTS, "batch": COUNTS}),
)
def test_plans_by_target(name: str, target: Any, options: dict[str, Any]) -> None:
    sound(refused_or_sound(lambda: llmprune.plan(GRAPH, SCORES, **{name: target}, **options)))


@EXAMPLES
@given(
    st.dictionaries(
        st.one_of(st.integers(-1, 12), TEXTS),
        st.one_of(
            st.lists(st.integers(-2, 25), max_size=6),
            st.lists(st.lists(st.integers(-1, 3), max_size=2), max_size=3),
            ODD,
        ),
        max_size=3,
    )
)
def test_plans_by_indices(removed: dict[Any, Any]) -> None:
    sound(refused_or_sound(lambda: llmprune.plan(GRAPH, removed=removed)))


@EXAMPLES
@given(
    st.one_of(ODD, st.dictionaries(st.integers(-1, 9), ODD, max_size=3), st.sampled_from([{0: np.ones(3)}]))
)
def test_plans_by_odd_scores(scores: Any) -> None:
    sound(refused_or_sound(lambda: llmprune.plan(GRAPH, scores, ratio=0.2)))


CALIBRATIONS: list[Any] = [
    IDS, IDS.float(), IDS.to(torch.int32), IDS[:, ::2], IDS[:0], IDS[:, :0], IDS - 5, IDS + 999, IDS.unsqueeze(0),
    IDS[0], IDS.numpy(), IDS.tolist(), IDS.bool(), IDS.to("meta"), IDS.expand(2, 6), IDS.t(), [IDS, IDS], [], [""],
    ["text"], "no such file", 3, None, {}, b"bytes", [None], [[1, 2], [3]],
]  # fmt: skip


@EXAMPLES
@given(
    st.sampled_from(range(len(CALIBRATIONS))),
    st.one_of(st.sampled_from(["element1", "element2", "vector", "l1", "l2", "random", "obs"]), ODD),
    st.one_of(st.sampled_from(["sum", "max", "product", "last"]), ODD),
    st.fixed_dictionaries({}, optional={"batch_size": COUNTS, "samples": COUNTS, "length": COUNTS}),
)
def test_scores(number: int, importance: Any, aggregation: Any, options: dict[str, Any]) -> None:
    found = refused_or_sound(
        lambda: llmprune.score(MODEL, GRAPH, CALIBRATIONS[number], importance, aggregation, **options)
    )
    assert found is None or all(np.isfinite(found[axis]).all() for axis in found)


@EXAMPLES
@given(
    st.integers(-2, 12),
    st.integers(-3, 3),
    st.integers(-2, 60),
    st.one_of(TEXTS, st.just("model.norm.weight")),
)
def test_explanations(number: int, dim: int, index: int, name: str) -> None:
    names = list(GRAPH.parameters)
    refused_or_sound(lambda: GRAPH.explain(names[number] if number >= 0 else name, dim, index))
    assert len(GRAPH.axes) > 4


@pytest.mark.parametrize("odd", [None, 3, "model", [], torch.zeros(3), torch.nn.Linear])
def test_what_is_no_model_or_graph(odd: Any) -> None:
    for call in (lambda: llmprune.trace(odd), lambda: llmprune.score(odd, GRAPH, IDS)):
        assert refused_or_sound(call) is None
