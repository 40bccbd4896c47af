"""The graph's Python face: axes, explanations, sizes, positions and JSON."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from torch import nn

import llmprune
from llmprune.errors import InputError, LlmpruneError, PlanError
from llmprune.planning.apart import Around
from llmprune.tracing.graph import Axis, Graph

IDS = torch.arange(10).reshape(2, 5) + 3
RULES = {"forward", "backward", "equal shape", "index value", "part"}


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny_models.build("llama")


@pytest.fixture(scope="module")
def graph(llama: nn.Module) -> Graph:
    return llmprune.trace(llama, {"input_ids": IDS})


def prunable(graph: Graph, kind: str) -> list[Axis]:
    return [axis for axis in graph.axes if axis.prunable and axis.kind == kind]


def test_axes_of_a_llama(graph: Graph) -> None:
    assert [axis.id for axis in graph.axes] == list(range(len(graph.axes)))
    states = [axis.prunable for axis in graph.axes]
    assert states == sorted(states, reverse=True), "prunable axes come first"
    found = {kind: [axis.size for axis in prunable(graph, kind)] for kind in {a.kind for a in graph.axes}}
    assert found["channel"] == [48]
    assert found["head"] == [3, 3]
    assert found["query"] == [2, 2]
    assert found["ffn"] == [56, 56]
    assert found["value_dim"] == [8, 8]
    assert found["head_dim"] == [4]
    assert not found["other"], "the vocabulary is frozen"
    assert all(axis.prunable == (not axis.reasons) for axis in graph.axes)
    assert all(mark in str(axis) for axis in graph.axes for mark in axis.marks)


def test_positions_of_members_are_a_partition_of_what_they_cover(graph: Graph) -> None:
    for axis in graph.axes:
        for member in (*axis.members, *axis.buffers):
            shape = {**graph.parameters, **graph.buffers}[member.parameter]
            assert member.positions.shape[0] == axis.size
            assert np.unique(member.positions).size == member.positions.size, "no position twice"
            assert 0 <= member.positions.min() <= member.positions.max() < shape[member.dim]
            assert (np.diff(member.positions, axis=1) > 0).all(), "ascending in a row"


@pytest.mark.parametrize(
    ("parameter", "dim", "index"),
    [
        ("model.layers.0.mlp.up_proj.weight", 0, 17),
        ("model.layers.1.self_attn.q_proj.weight", 0, 21),
        ("model.layers.0.self_attn.v_proj.weight", 0, 5),
        ("model.norm.weight", 0, 47),
        ("model.embed_tokens.weight", 1, 3),
    ],
)
def test_explanations_lead_from_the_trigger_to_the_member(
    graph: Graph, parameter: str, dim: int, index: int
) -> None:
    ran = {(op[0], graph.tape.scopes[op[4]]) for op in graph.tape.ops}
    explanation = graph.explain(parameter, dim, index)
    assert explanation.axes
    expected = {
        (axis.id, name, d)
        for axis in explanation.axes
        for name, d in axis.places
        if (name, d) != (parameter, dim)
    }
    reached = {(chain.axis, chain.parameter, chain.dim) for chain in explanation}
    assert expected <= reached, "a chain to each member"
    for chain in explanation:
        axis = graph.axes[chain.axis]
        sources = [m for m in axis.occurrences if (m.parameter, m.dim) == (parameter, dim)]
        assert any(index in m.positions[chain.index] for m in sources), "the trigger's index"
        assert chain.steps[0].source == f"{parameter}[dim {dim}]"
        assert chain.steps[-1].target == f"{chain.parameter}[dim {chain.dim}]"
        for step, following in zip(chain.steps, chain.steps[1:], strict=False):
            assert step.target == following.source
        for step in chain.steps:
            assert step.rule in RULES
            assert not step.operation or (step.operation, step.module) in ran
        assert any(
            m.parameter == chain.parameter
            and m.dim == chain.dim
            and tuple(m.positions[chain.index]) == chain.positions
            for m in axis.occurrences
        )
    assert f"{parameter}, dim {dim}, position {index}" in str(explanation)


def test_an_ffn_channel_is_explained_by_the_papers_rules(graph: Graph) -> None:
    chains = {
        chain.parameter: [step.rule for step in chain.steps]
        for chain in graph.explain("model.layers.0.mlp.up_proj.weight", 0, 17)
    }
    assert chains["model.layers.0.mlp.down_proj.weight"][-1] == "backward"
    assert "equal shape" in chains["model.layers.0.mlp.gate_proj.weight"]


@pytest.mark.parametrize(
    ("parameter", "dim", "index"),
    [
        ("no.such.weight", 0, 0),
        ("model.norm.weight", 1, 0),
        ("model.norm.weight", 0, 48),
        ("model.norm.weight", 0, -1),
    ],
)
def test_explaining_what_is_not_there(graph: Graph, parameter: str, dim: int, index: int) -> None:
    with pytest.raises(InputError):
        graph.explain(parameter, dim, index)


def test_sizes_and_positions_are_those_of_the_compacted_model(llama: nn.Module, graph: Graph) -> None:
    rng = np.random.default_rng(3)
    removed = {
        axis.id: sorted(rng.choice(axis.size - 1, size=1 + axis.size // 8, replace=False).tolist())
        for kind in ("head", "ffn")
        for axis in prunable(graph, kind)
    }
    model = copy.deepcopy(llama)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plan = llmprune.plan(graph, removed=removed)
    assert {axis: list(indices) for axis, indices in plan.removed.items()} == removed
    llmprune.compact(model, plan)
    counts = {axis: len(indices) for axis, indices in removed.items()}
    shapes, kept = graph.new_shapes(counts), graph.kept(removed)
    assert graph.numel({}) == sum(value.numel() for value in before.values())
    assert graph.numel(counts) == sum(parameter.numel() for parameter in model.parameters())
    assert graph.macs(counts) < graph.macs({})
    for name, parameter in model.named_parameters():
        assert tuple(parameter.shape) == shapes.get(name, tuple(before[name].shape))
        expected = before[name]
        for dim, positions in kept.get(name, {}).items():
            expected = expected.index_select(dim, torch.from_numpy(positions))
        assert torch.equal(parameter, expected), name
    tensors = {entry[4]: number for number, entry in enumerate(graph.tape.tensors) if entry[3] == "parameter"}
    for name, shape in shapes.items():
        if name in tensors:
            assert graph.new_sizes(counts, [(tensors[name], d) for d in range(len(shape))]) == list(shape)


def test_a_ragged_choice_takes_other_query_heads_from_each_key_value_head(graph: Graph) -> None:
    (query, *_), (head, *_) = prunable(graph, "query"), prunable(graph, "head")
    assert graph.around(query.id) == Around((head.id,), 3, False)
    kept = graph.kept({query.id: np.array([[0], [1], [0]])})
    rows = np.arange(48).reshape(3, 2, 8)
    expected = np.concatenate([rows[0, 1], rows[1, 0], rows[2, 1]])
    attention = "model.layers.0.self_attn"
    assert set(kept) == {f"{attention}.q_proj.weight", f"{attention}.o_proj.weight"}
    np.testing.assert_array_equal(kept[f"{attention}.q_proj.weight"][0], expected)
    np.testing.assert_array_equal(kept[f"{attention}.o_proj.weight"][1], expected)
    flat = graph.kept({query.id: [1]})
    np.testing.assert_array_equal(flat[f"{attention}.q_proj.weight"][0], rows[:, 0].reshape(-1))


def test_impossible_removals_are_refused(graph: Graph) -> None:
    (query, *_), (ffn, *_) = prunable(graph, "query"), prunable(graph, "ffn")
    with pytest.raises(PlanError, match="does not exist"):
        graph.kept({len(graph.axes): [0]})
    with pytest.raises(PlanError, match="indices 0 to 55"):
        graph.kept({ffn.id: [56]})
    with pytest.raises(PlanError, match="not nested"):
        graph.kept({ffn.id: np.array([[0], [1]])})
    with pytest.raises(PlanError, match="of 3 indices; the plan chooses for 2"):
        graph.kept({query.id: np.array([[0], [1]])})
    for wrong in ({-1: 1}, {len(graph.axes): 1}, {ffn.id: 57}, {ffn.id: -1}):
        for ask in (graph.numel, graph.new_shapes, graph.macs):
            with pytest.raises(PlanError):
                ask(wrong)


def test_freezing_and_json_go_together(graph: Graph) -> None:
    changed = Graph.from_json(json.loads(json.dumps(graph.to_json())))
    (first, *_) = prunable(changed, "ffn")
    changed.freeze(first.id, "a test says so")
    again = Graph.from_json(json.loads(json.dumps(changed.to_json())))
    assert not again.axes[first.id].prunable
    assert "a test says so" in again.axes[first.id].reasons
    assert graph.axes[first.id].prunable, "the other graph is untouched"
    assert again.fingerprint == graph.fingerprint
    assert again.tied == graph.tied
    assert again.parameters == graph.parameters
    for axis, other in zip(changed.axes, again.axes, strict=True):
        assert (axis.size, axis.kind, axis.prunable, axis.places, axis.starts) == (
            other.size,
            other.kind,
            other.prunable,
            other.places,
            other.starts,
        )
    assert again.to_json() == changed.to_json()


@pytest.mark.parametrize("damage", ["format", "tape", "tensor", "frozen", "list", "role", "storage", "code"])
def test_json_that_is_no_graph(graph: Graph, damage: str) -> None:
    data: Any = json.loads(json.dumps(graph.to_json()))
    if damage == "format":
        data["format"] = 99
    elif damage == "tape":
        del data["tape"]
    elif damage == "tensor":
        data["tape"]["tensors"][0] = ["what"]
    elif damage == "frozen":
        data["frozen"] = {"99999": ["no such axis"]}
    elif damage == "role":
        data["tape"]["tensors"][0][3] = "villain"
    elif damage == "storage":
        data["tape"]["ops"][0][3] = [10**9]
    elif damage == "code":
        data["tape"]["ops"][0][2] = [1]
    else:
        data = [1, 2]
    with pytest.raises(LlmpruneError):
        Graph.from_json(data)


def test_marked_operations_of_the_hidden_channel(graph: Graph) -> None:
    (channel,) = prunable(graph, "channel")
    assert channel.marks
    found = graph.marked_ops({channel.id: [2, 40]})
    means = [op for op in graph.tape.ops if op[0] == "aten::mean"]
    assert len(found) == len(means) == 5, "two norms in each layer and the last"
    assert [op.nth for op in found] == list(range(5))
    for op in found:
        assert (op.name, op.arg, op.dim, op.size) == ("aten::mean", 0, 2, 48)
        assert "norm" in op.module
        np.testing.assert_array_equal(op.kept, np.delete(np.arange(48), [2, 40]))
    assert graph.marked_ops({prunable(graph, "ffn")[0].id: [1]}) == []


class Odd(nn.Module):
    """Two branches of 6 channels; one meets an operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(4, 6)
        self.out = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = torch.linalg.qr(self.one(x))[1]
        return self.out(torch.cat([one, self.two(x)[: one.shape[0]]], -1))


def test_an_operation_without_a_rule_freezes_what_it_touches() -> None:
    graph = llmprune.trace(Odd(), {"x": torch.ones(3, 4)})
    assert list(graph.unknown_operations.values()) == [1]
    states = {axis.places[0][0]: axis.prunable for axis in graph.axes if axis.size == 6}
    assert states == {"one.weight": False, "two.weight": True, "out.weight": False}
    (frozen,) = [axis for axis in graph.axes if axis.places[0][0] == "one.weight" and axis.size == 6]
    assert any("without a rule" in reason for reason in frozen.reasons)


def test_the_second_form_speaks_in_the_first_ones_axes() -> None:
    graph = llmprune.trace(tiny_models.build("llama", "sdpa"), {"input_ids": IDS})
    second = graph.second
    assert second is not None, "eager reads num_key_value_groups, which sdpa does not"
    attributes = {leaf[2] for equation in second.equations for leaf in _attributes(equation[2])}
    assert "num_key_value_groups" in attributes
    modules = {leaf[1] for equation in second.equations for leaf in _attributes(equation[2])}
    assert {"model.layers.0.self_attn", "model.layers.1.self_attn"} <= modules, (
        "one block stands for its likes"
    )
    assert all(len(leaf) == 4 for equation in second.equations for leaf in _attributes(equation[2])), (
        "a block that stands for another hands on the values that were recorded"
    )
    (query, *_) = prunable(graph, "query")
    changed = set()
    for tensor, dim, tree, _where in second.equations:
        (old,) = second.new_sizes({}, [(tensor, dim)])
        (new,) = second.new_sizes({query.id: 1}, [(tensor, dim)])
        assert set(second.dim_axes(tensor, dim)) <= set(range(len(graph.axes)))
        if old != new:
            assert query.id in second.dim_axes(tensor, dim)
            changed |= {leaf[1] for leaf in _attributes(tree) if leaf[2] == "num_key_value_groups"}
    assert changed == {"model.layers.0.self_attn"}, (
        "the query heads of the first layer are not those of the second"
    )
    assert second.numel({query.id: 1}) == graph.numel({query.id: 1})


def _attributes(tree: Any) -> list[list[Any]]:
    if isinstance(tree, int):
        return []
    return [tree] if tree[0] == "attr" else [leaf for part in tree[1:] for leaf in _attributes(part)]
