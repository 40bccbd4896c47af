"""Registered rules: custom operations take part in pruning, with proofs, or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from plain_modules import features
from torch import Tensor, nn
from zeroed_reference import check_axes, seeded, sizes

import llmprune
from llmprune.errors import InputError, TraceError
from llmprune.reporting.report import render_axes
from llmprune.tracing.graph import Graph


@torch.library.custom_op("rules_test::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


@torch.library.custom_op("rules_test::swiglu", mutates_args=())
def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@torch.library.custom_op("rules_test::rotate", mutates_args=())
def rotate(x: Tensor, positions: Tensor, heads: int) -> Tensor:
    y = x.unflatten(-1, (heads, -1))
    angle = positions[:, None, None] * 0.1
    first, second = y.chunk(2, -1)
    return torch.cat(
        (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1
    ).flatten(-2)


@torch.library.custom_op("rules_test::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, shared: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in ((q, heads), (k, shared), (v, shared)))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.4, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


@torch.library.custom_op("rules_test::pieces", mutates_args=())
def pieces(xs: list[Tensor], weight: Tensor) -> list[Tensor]:
    return [x @ weight.t() for x in xs]


@torch.library.custom_op("rules_test::scale", mutates_args={"x"})
def scale(x: Tensor, weight: Tensor) -> None:
    x.mul_(weight)


for op in (rms_norm, swiglu, rotate):
    op.register_fake(lambda x, *rest, **more: x.new_empty(*x.shape[:-1], x.shape[-1]))  # type: ignore[misc]
swiglu.register_fake(lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
attend.register_fake(
    lambda q, k, v, heads, shared: q.new_empty(*q.shape[:-1], heads * (v.shape[-1] // shared))
)
pieces.register_fake(lambda xs, weight: [x.new_empty(*x.shape[:-1], weight.shape[0]) for x in xs])

NORM = ("rules_test::rms_norm", "... d, d, d -> ... d")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    from llmprune.tracing import rules

    before = dict(rules._registered)
    yield
    assert rules._registered == before


class Block(nn.Module):
    """Attention, norm and feed-forward network in the hands of custom operations."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.shared = 4, 2
        self.first = nn.Linear(5, 12)
        self.gain, self.bias = nn.Parameter(torch.ones(12)), nn.Parameter(torch.zeros(12))
        self.q, self.k, self.v = nn.Linear(12, 24), nn.Linear(12, 12), nn.Linear(12, 10)
        self.o = nn.Linear(20, 12)
        self.up, self.down = nn.Linear(12, 2 * 9), nn.Linear(9, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = rms_norm(x, self.gain, self.bias)
        q = rotate(self.q(y), torch.arange(x.shape[1]), self.heads)
        k = rotate(self.k(y), torch.arange(x.shape[1]), self.shared)
        x = x + self.o(torch.ops.rules_test.attend(q, k, self.v(y), self.heads, shared=self.shared))
        x = x + self.down(swiglu(self.up(rms_norm(x, self.gain))))
        result: Tensor = self.last(x)
        return result


@contextmanager
def block_rules() -> Iterator[None]:
    with ExitStack() as stack:
        for rule in _rules():
            stack.enter_context(rule)
        yield


def _rules() -> list[llmprune.Registration]:
    return [
        llmprune.register_rule(rms_norm, NORM[1], marks={"d": "norm"}),
        llmprune.register_rule(torch.ops.rules_test.swiglu, "... f+f -> ... f", kinds={"f": "ffn"}),
        llmprune.register_rule(
            "rules_test::rotate", "b t (h d), _ -> b t (h d)",
            sizes={"h": "heads"}, freeze={"d": "the halves of a head are rotated against each other"},
        ),
        llmprune.register_rule(
            torch.ops.rules_test.attend.default, "b t (k g d), b s (k d), b s (k e) -> b t (k g e)",
            sizes={"k": "shared", "k g": "heads"}, kinds={"k": "head", "g": "query", "e": "value_dim"},
        ),
    ]  # fmt: skip


def graph_of(model: nn.Module, **inputs: Any) -> Graph:
    return llmprune.trace(model, inputs or {"x": features()[0]})


def test_custom_operations_take_part_in_every_kind_of_axis() -> None:
    with block_rules():
        graph = check_axes(seeded(Block), features())
    assert graph.unknown_operations == {}
    kinds = {axis.kind: axis.size for axis in graph.axes if axis.prunable}
    assert kinds == {"channel": 12, "head": 2, "query": 2, "value_dim": 5, "ffn": 9}
    [frozen] = [axis for axis in graph.axes if axis.size == 6]
    assert frozen.reasons == (
        "the halves of a head are rotated against each other (rules_test::rotate in the root module)",
    )
    chain = str(graph.explain("up.weight", dim=0, index=3))
    assert "equal shape (part) -> (part) by rules_test::swiglu in the root module" in chain


def test_verification_knows_marked_operations_and_plans_keep_what_it_needs() -> None:
    model, inputs = Block(), {"x": features()[0]}
    with block_rules():
        graph = llmprune.trace(model, inputs)
    channel = next(axis for axis in graph.axes if axis.kind == "channel")
    plan = llmprune.plan(graph, removed={channel.id: [0, 5, 6]})
    again = llmprune.Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert llmprune.verify(model, again, inputs).masked_ops == 5  # x and its weights, twice
    plan.marked = []
    with pytest.raises(llmprune.errors.VerificationError, match="differs"):
        llmprune.verify(model, plan, inputs)


def test_without_rules_they_freeze_what_they_touch_and_nothing_more() -> None:
    class Beside(Block):
        def __init__(self) -> None:
            super().__init__()
            self.aside, self.back = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.back(torch.relu(self.aside(x)))

    graph = graph_of(Beside())
    assert graph.unknown_operations == {
        "rules_test::rms_norm": 2, "rules_test::rotate": 2, "rules_test::attend": 1, "rules_test::swiglu": 1,
    }  # fmt: skip
    assert sizes(graph) == [8]
    reasons = [reason for axis in graph.axes for reason in axis.reasons if "rules_test::swiglu" in reason]
    assert reasons
    assert all(
        r == "an operation without a rule touches it (rules_test::swiglu in the root module)" for r in reasons
    )


def test_reports_count_operations_without_a_rule() -> None:
    graph = graph_of(Block())
    line = (
        "6 operations without a rule froze what they touch: rules_test::rms_norm (2), rules_test::rotate (2), "
        "rules_test::attend, rules_test::swiglu; llmprune.register_rule gives them one"
    )
    assert f"note: {line}" in render_axes(graph, frozen=False)
    frozen = render_axes(graph, frozen=True)
    assert "without a rule touches it (rules_test::rotate in the root module)" in frozen


def test_the_report_of_a_pruning_counts_them_too() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gain, self.second = nn.Linear(5, 8), nn.Parameter(torch.ones(6)), nn.Linear(8, 6)
            self.last = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(rms_norm(self.second(torch.relu(self.first(x))), self.gain))
            return result

    report = llmprune.prune(
        Partly(),
        ratio={"ffn": 0.25},
        importance="l1",
        inputs={"x": features()[0]},
        protect_first=0,
        protect_last=0,
    )
    assert "1 operation without a rule froze what they touch: rules_test::rms_norm;" in str(report)
    assert report.to_json()["unknown_operations"] == {"rules_test::rms_norm": 1}


def test_a_graph_keeps_its_rules_when_they_are_gone() -> None:
    with block_rules():
        graph = graph_of(Block())
    again = Graph.from_json(json.loads(json.dumps(graph.to_json())))
    assert [str(axis) for axis in again.axes] == [str(axis) for axis in graph.axes]


class Pieces(nn.Module):
    """A list of tensors in, a list out, and a write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 12), nn.Linear(5, 12)
        self.weight, self.gain = nn.Parameter(torch.randn(7, 12)), nn.Parameter(torch.randn(7))
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, other = pieces([torch.relu(self.first(x)), torch.relu(self.second(x))], self.weight)
        y = torch.relu(one) + torch.relu(other)
        scale(y, self.gain)
        result: Tensor = self.last(y)
        return result


def test_lists_contractions_and_writes_in_place() -> None:
    with (
        llmprune.register_rule(pieces, "... i, o i -> ... o"),
        llmprune.register_rule(scale, "... o, o -> ... o"),
    ):
        graph = check_axes(seeded(Pieces), features())
    assert sizes(graph) == [7, 12]
    assert {axis.size: axis.kind for axis in graph.axes if axis.prunable} == {7: "ffn", 12: "ffn"}


def test_an_operation_without_a_kernel_for_meta_is_recorded_on_real_tensors() -> None:
    @torch.library.custom_op("rules_test::no_meta", mutates_args=())
    def no_meta(x: Tensor) -> Tensor:
        return x * 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(no_meta(self.a(x)))
            return result

    with llmprune.register_rule(no_meta, "... d -> ... d"):
        graph = check_axes(seeded(Net), features())
    assert sizes(graph) == [6]
    assert "recorded on real tensors" in graph.tape.notes[0]


# Registering


def test_a_rule_is_in_force_inside_its_block_only() -> None:
    with llmprune.register_rule(rms_norm, NORM[1]) as rule:
        assert "in force" in repr(rule)
        with pytest.raises(InputError, match="unregister it first, or pass replace=True"):
            llmprune.register_rule(*NORM)
        other = llmprune.register_rule(*NORM, marks={"d": "norm"}, replace=True)
        assert "taken back" in repr(rule)
    assert "in force" in repr(other)  # the block took back its own rule, which was no longer there
    other.unregister()
    other.unregister()
    with llmprune.register_rule(*NORM):
        pass


BAD: list[Any] = [
    pytest.param(NORM[0], "... d, d", {}, "needs one ->", id="no-arrow"),
    pytest.param(NORM[0], "b t d, d -> b t d", {}, "has 2 inputs and 1 outputs; the operation has 3 tensor arguments",
                 id="too-few-inputs"),
    pytest.param(NORM[0], "... d, d, d -> ... d, d", {}, "and 2 outputs", id="too-many-outputs"),
    pytest.param(NORM[0], "b (t d, d, d -> b t d", {}, r"cannot be read at '\( t d'", id="bracket"),
    pytest.param(NORM[0], "b ... d, d, d -> b d", {}, "cannot be read at '...'", id="ellipsis-inside"),
    pytest.param(NORM[0], "b d+, d, d -> b d", {}, "cannot be read at '\\+'", id="dangling-sum"),
    pytest.param(NORM[0], "b d?, d, d -> b d", {}, "cannot be read at '\\?'", id="stray-sign"),
    pytest.param(*NORM, {"marks": {"e": "norm"}}, "names the axis 'e'", id="unknown-axis"),
    pytest.param(*NORM, {"marks": {"d": "mode"}}, "choose from mean, extreme, softmax, norm", id="unknown-mark"),
    pytest.param(*NORM, {"kinds": {"d": "width"}}, "choose from head", id="unknown-kind"),
    pytest.param(*NORM, {"sizes": {"d": "width"}}, "names the argument 'width'", id="unknown-argument"),
    pytest.param(*NORM, {"marks": {"d": "norm"}, "freeze": {"d": "x"}}, "needs no mark", id="marked-and-frozen"),
    pytest.param("rules_test::absent", "a -> a", {}, "torch knows no operation rules_test::absent", id="absent"),
    pytest.param("aten::linear", "a i, o i, o -> a o", {}, "a rule for aten::linear of its own", id="built-in"),
    pytest.param("aten::exp", "a -> a", {}, "a rule for aten::exp of its own", id="pointwise"),
    pytest.param("rms_norm", "a -> a", {}, "is no operation", id="no-namespace"),
    pytest.param(print, "a -> a", {}, "is no operation", id="no-operation"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "notation", "options", "sentence"), BAD)
def test_what_cannot_be_registered(op: Any, notation: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        llmprune.register_rule(op, notation, **options)


MISFITS: list[Any] = [
    ("b d, d, d -> b d", {}, "gives argument 'x' 2 dimensions, but it has 3"),
    ("b t d, t, d -> b t d", {}, r"makes a dimension 't' of size 7 \(t = 7\), but it has 12"),
    ("b t 4, d, d -> b t d", {}, "of size 4 .*, but it has 12"),
    ("b t (h d), (h d), _ -> b t (h d)", {}, "leaves the size of 'h' open: name the argument that holds it"),
    ("b t d+d+d+d+d, _, _ -> b t d", {}, "leaves the size of 'd' open|of size"),
    ("b t d, d, d -> b t d", {"sizes": {"d": "eps"}}, "takes the size of 'd' from 'eps', which holds none"),
]


@pytest.mark.parametrize(("notation", "options", "sentence"), MISFITS)
def test_a_rule_that_does_not_fit_names_the_operation_and_the_module(
    notation: str, options: dict[str, Any], sentence: str
) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.block(x)
            return result

    with (
        llmprune.register_rule(rms_norm, notation, **options),
        pytest.raises(TraceError, match=sentence) as error,
    ):
        graph_of(Outer())
    assert "(rules_test::rms_norm in block)" in str(error.value)
