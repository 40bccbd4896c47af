"""One test or more for each pitfall of the design, by its number there: what it was and that it is answered."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from plain_modules import Around, Classifier, Feed, features, image
from torch import nn
from zeroed_reference import cast, check_axes, difference, output, removals, seeded, sizes

import llmprune
from llmprune.errors import PlanError, VerificationError
from llmprune.tracing.graph import Axis, Graph
from llmprune.tracing.tape import leaves
from llmprune.tracing.trace import record

IDS = torch.arange(10).reshape(2, 5) + 3


@pytest.fixture(scope="module")
def graph() -> Graph:
    return llmprune.trace(tiny_models.build("llama"), {"input_ids": IDS})


def prunable(graph: Graph, kind: str) -> list[Axis]:
    return [axis for axis in graph.axes if axis.prunable and axis.kind == kind]


# 1. ATen gives axes; which integers of the modules size them needs provenance.


@dataclass(frozen=True)
class Settings:
    heads: int
    size: int


class Sized(nn.Module):
    """Sizes in an attribute, a tuple, a frozen config, a namespace, and as arithmetic of two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.splits = 20, (7, 13)
        self.config, self.more = Settings(4, 6), SimpleNamespace(joint=10)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.qkv, self.o = nn.Linear(12, 3 * 24), nn.Linear(24, 12)
        self.twin, self.back = nn.Linear(12, 20), nn.Linear(10, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.up(x)).view(-1, self.width)
        a, b = y.split(self.splits, -1)
        x = x + self.down(torch.cat((torch.tanh(a), b), -1)).view_as(x)
        heads, size = self.config.heads, self.config.size
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, heads, size).permute(2, 0, 3, 1, 4)
        y = torch.softmax(q @ k.mT * 0.4, -1) @ v
        x = x + self.o(y.transpose(1, 2).reshape(*x.shape[:2], heads * size))
        y = self.twin(x).unflatten(-1, (2, self.more.joint))
        result: torch.Tensor = x + self.back(y[:, :, 0] * y[:, :, 1])
        return result


def test_pitfall_1_two_tiers() -> None:
    model = seeded(lambda: Around(Sized(), 12))
    graph = check_axes(model, features())
    assert sizes(graph) == [4, 6, 7, 10, 12, 13]
    removed = {axis.id: [1] for axis in graph.axes if axis.prunable and axis.size in (4, 7, 10)}
    shared, settings, namespace = model.inner, model.inner.config, model.inner.more
    small = llmprune.compact(model, llmprune.plan(graph, removed=removed)).inner
    assert small is shared
    assert (small.width, small.splits) == (19, (6, 13))
    assert (small.config, small.more.joint) == (Settings(3, 6), 9)
    assert (settings, namespace.joint) == (Settings(4, 6), 10)  # someone else may hold these


# 2. One attribute that sizes two axes ties their sizes.


def test_pitfall_2_ties_of_sizes(graph: Graph) -> None:
    """Llama's head_dim sizes rope pairs twice over and value dims once: a plan takes both."""
    (pairs,), values = prunable(graph, "head_dim"), prunable(graph, "value_dim")
    plan = llmprune.plan(graph, removed={values[0].id: [1, 6]})
    counts = {axis: len(indices) for axis, indices in plan.removed.items()}
    assert counts == {pairs.id: 1, **{value.id: 2 for value in values}}


# 3. An integer used as a number would change values silently.


class Scaled(nn.Module):
    """Attention-like scores divided by the root of an attribute that sizes an axis, or by a constant."""

    def __init__(self, spend: bool) -> None:
        super().__init__()
        self.width, self.spend = 6, spend
        self.q, self.k = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).view(-1, self.width)
        k = self.k(x).view(-1, self.width)
        return (q * k).sum(-1) * (self.width**-0.5 if self.spend else 0.4)


def test_pitfall_3_an_integer_used_as_a_number() -> None:
    for spend in (True, False):
        graph = llmprune.trace(Scaled(spend), {"x": torch.ones(3, 4)})
        (axis,) = [axis for axis in graph.axes if axis.size == 6]
        assert axis.prunable is not spend
        assert any("used as a number" in reason for reason in axis.reasons) is spend


def test_pitfall_3_the_recorder_reports_it() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 6
            self.inner = nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x).view(-1, self.width)
            assert y.shape[0] * 7 == 21  # compared, not used
            return y * self.width**-0.5

    tape = record(Root(), (torch.ones(3, 4),))
    assert [tree for tree, _ in tape.value_used] == [["attr", "", "width", 6]]


# 4. Ops whose result is unused must unify, but neither freeze nor mark.


class Dead(nn.Module):
    """A gate that scales, and a statistic of it that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)
        self.gate = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        gated = h * self.gate
        gated.softmax(-1).cumsum(-1)
        return self.down(h)


def test_pitfall_4_dead_values() -> None:
    graph = llmprune.trace(Dead(), {"x": torch.ones(3, 4)})
    (axis,) = [axis for axis in graph.axes if axis.size == 6]
    assert axis.prunable
    assert not axis.marks
    assert "gate" in {name for name, _ in axis.places}


# 5. Eager experts route by data: the trace asks for the form that does not, and gives the model back as it was.


def test_pitfall_5_experts() -> None:
    model = tiny_models.build("mixtral")
    before = copy.deepcopy(model.config.to_dict())
    graph = llmprune.trace(model)
    assert graph.tape.device_mode == "meta"
    assert model.config.to_dict() == before
    experts = prunable(graph, "expert")
    assert [axis.size for axis in experts] == [5, 5]
    ranks = {name: len(shape) for name, shape in graph.parameters.items()}
    assert {ranks[name] for name, _ in experts[0].places if "experts" in name} == {3}
    assert any("gate" in name for name, _ in experts[0].places)  # the router's rows go along
    plan = llmprune.plan(graph, removed={experts[0].id: [1]})
    llmprune.verify(model, plan)


# 6. Extra operations appear now and then: operations are matched by name and number.


class Holding(nn.Module):
    """Keeps its outputs on every second call, and rescales itself once; then normalises over a hidden axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 9), nn.LayerNorm(9), nn.Linear(9, 4)
        self.calls, self.held = 0, list[torch.Tensor]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = self.a(x)
        if self.calls % 2:
            self.held.append(y.detach().clone().detach())
        result: torch.Tensor = self.b(self.norm(y))
        return result


@pytest.mark.parametrize("warm", [0, 1])
def test_pitfall_6_operations_by_name_and_number(warm: int) -> None:
    model, (x,) = seeded(Holding), cast(features())
    for _ in range(warm):
        model(x)
    calls, held = model.calls, list(model.held)
    graph = llmprune.trace(model, (x,))
    assert (model.calls, len(model.held)) == (calls, len(held))
    (axis,) = [axis for axis in graph.axes if axis.prunable]
    assert axis.marks
    plan = llmprune.plan(graph, removed={axis.id: [2, 3]})
    for _ in range(2):
        assert llmprune.verify(model, plan, {"x": x}).masked_ops == 1
        model(x)


# 7. A function mode is off inside the framework's own attention: its inside is watched all the same, and each axis is
# tried.


class Insisting(nn.Module):
    """Hides a check of its width from every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        with torch._C.DisableTorchFunction():
            if x.shape[-1] != 12:
                raise ValueError("twelve are needed")
        result: torch.Tensor = self.out(x)
        return result


def test_pitfall_7_inside_the_frameworks_attention() -> None:
    def call(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return attention(x, x, x, need_weights=False)[0]

    model = seeded(lambda: Around(nn.MultiheadAttention(12, 3, batch_first=True), 12, call))
    graph = check_axes(model, features())
    width = next(axis for axis in graph.axes if axis.prunable and ("first.weight", 0) in axis.places)
    plan = llmprune.plan(graph, removed={width.id: [0]})
    assert {graph.axes[axis].kind: len(gone) for axis, gone in plan.removed.items()} == {"ffn": 4, "head": 1}
    small = llmprune.compact(model, plan).inner
    assert (small.embed_dim, small.num_heads) == (8, 2)


def test_pitfall_7_what_stays_unseen_is_tried() -> None:
    graph = check_axes(seeded(lambda: Around(Insisting(), 12)), features())
    reasons = {name: axis.reasons for axis in graph.axes for name, dim in axis.places if dim == 0}
    assert reasons["inner.inner.weight"][0].startswith("trial forward failed: twelve are needed (aten::")
    assert reasons["first.weight"] == ()


# 8. Buffers are members too.


def test_pitfall_8_buffers() -> None:
    graph = check_axes(seeded(Classifier), image())
    buffers = {member.parameter for axis in graph.axes if axis.prunable for member in axis.buffers}
    assert buffers == {f"features.{i}.running_{what}" for i in (1, 5) for what in ("mean", "var")}
    model = tiny_models.build("llama").double()
    graph = llmprune.trace(model, {"input_ids": IDS})
    (pairs,) = prunable(graph, "head_dim")
    assert [member.parameter for member in pairs.buffers] == ["model.rotary_emb.inv_freq"] * len(
        pairs.buffers
    )
    assert difference(model, llmprune.plan(graph, removed={pairs.id: [1]}), {"input_ids": IDS}) < 1e-6


# 9. Ragged removal is exact.


def test_pitfall_9_ragged_removal() -> None:
    model = tiny_models.build("llama").double()
    graph = llmprune.trace(model, {"input_ids": IDS})
    queries = prunable(graph, "query")
    rows = {axis.id: [[0], [1], [0]] for axis in queries}
    flat = {axis.id: [0] for axis in queries}
    plan = llmprune.plan(graph, removed=rows)
    assert difference(model, plan, {"input_ids": IDS}) < 1e-9
    assert plan.parameters_after == llmprune.plan(graph, removed=flat).parameters_after
    assert plan != llmprune.plan(graph, removed=flat)


# 10. The same axes under either form of attention; tied weights are one parameter.


def signature(graph: Graph) -> set[Any]:
    return {
        (axis.kind, axis.size, frozenset(zip(axis.places, axis.starts, strict=True)))
        for axis in graph.axes
        if axis.prunable
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_pitfall_10_sdpa_and_eager_give_the_same_prunable_axes(family: str) -> None:
    forms = [llmprune.trace(tiny_models.build(family, form)) for form in ("sdpa", "eager")]
    assert signature(forms[0]) == signature(forms[1])
    assert len(signature(forms[0])) >= 5


def test_pitfall_10_tied_weights_are_one_parameter() -> None:
    model = tiny_models.build("llama", tie_word_embeddings=True)
    graph = llmprune.trace(model, {"input_ids": IDS})
    assert graph.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in graph.parameters
    assert graph.numel({}) == sum(parameter.numel() for parameter in model.parameters())
    through = graph.explain("lm_head.weight", 1, 7)
    assert [axis.id for axis in through.axes] == [
        axis.id for axis in graph.explain("model.embed_tokens.weight", 1, 7).axes
    ]


# 11. Under sdpa the trace never meets num_key_value_groups, yet a padded batch uses it.


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_pitfall_11_attributes_that_only_another_form_of_attention_reads(layers: int) -> None:
    model = tiny_models.build("llama", "sdpa", num_hidden_layers=layers)
    graph = llmprune.trace(model)
    assert graph.tape.attention == "sdpa"
    assert graph.second is not None
    own = {tuple(leaf[1:3]) for e in graph.tape.equations for leaf in leaves(e[2]) if leaf[0] == "attr"}
    other = {tuple(leaf[1:3]) for e in graph.second.equations for leaf in leaves(e[2]) if leaf[0] == "attr"}
    for layer in range(layers):
        attribute = (f"model.layers.{layer}.self_attn", "num_key_value_groups")
        assert attribute not in own
        assert attribute in other
    heads = [axis for axis in graph.axes if axis.kind == "query"]
    assert len(heads) == layers
    plan = llmprune.plan(graph, removed={heads[-1].id: [0]})
    changed = {(a.module, a.name): (a.old, a.new) for a in plan.attributes}
    assert changed[f"model.layers.{layers - 1}.self_attn", "num_key_value_groups"] == (2, 1)


def test_pitfall_11_a_padded_batch_takes_the_other_path() -> None:
    model = tiny_models.build("llama", "sdpa").double()
    graph = llmprune.trace(model)
    query = prunable(graph, "query")[0]
    plan = llmprune.plan(graph, removed={query.id: [0]})
    mask = torch.ones_like(IDS)
    assert difference(model, plan, {"input_ids": IDS, "attention_mask": mask}) < 1e-9
    mask[:, -1] = 0
    assert difference(model, plan, {"input_ids": IDS, "attention_mask": mask}) < 1e-9
    assert llmprune.verify(model, plan).inputs == 2


# 12. An axis can be tied to a frozen one: the plan's closure decides, not the axis alone.


class Bound(nn.Module):
    """One attribute sizes an axis that may shrink and one that may not."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.free, self.fixed = nn.Linear(5, 8), nn.Linear(5, 8)
        self.out, self.kernel = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        free = torch.relu(self.free(x)).view(*x.shape[:2], self.width)
        fixed = self.fixed(x).view(*x.shape[:2], self.width).cumsum(-1)
        result: torch.Tensor = self.out(free) + self.kernel(fixed)
        return result


def test_pitfall_12_closure_over_what_is_frozen() -> None:
    graph = llmprune.trace(Bound(), features())
    free, fixed = (
        next(axis for axis in graph.axes if (name, 0) in axis.places)
        for name in ("free.weight", "fixed.weight")
    )
    assert not fixed.prunable
    assert not free.prunable
    assert "no plan removes an index of it alone" in free.reasons[0]
    assert "the order along it matters (aten::cumsum in the root module)" in free.reasons[0]
    with pytest.raises(PlanError, match="is frozen: no plan removes an index of it alone"):
        llmprune.plan(graph, removed={free.id: [0]})


def test_pitfall_12_routers_of_custom_code_give_their_rows() -> None:
    config = transformers.PhimoeConfig(
        **{**tiny_models.TEXT, "num_local_experts": 5, "num_experts_per_tok": 2}, attn_implementation="eager"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.PhimoeForCausalLM(config).eval()
    graph = llmprune.trace(model)
    for axis in prunable(graph, "expert"):
        assert any("router" in name or "gate" in name for name, _ in axis.places)
        llmprune.verify(model, llmprune.plan(graph, removed={axis.id: [1]}))


# 13. Removing the last indices hides a misalignment.


def test_pitfall_13_the_last_index_hides_a_misalignment() -> None:
    """A plan that keeps the wrong positions of one tensor passes as long as it is the last index that goes."""
    model, inputs = seeded(lambda: Around(Feed(), 12)), {"x": features()[0].double()}
    graph = llmprune.trace(model, inputs)
    axis = next(axis for axis in graph.axes if axis.size == 20)

    def misaligned(removed: list[int]) -> llmprune.Plan:
        plan = llmprune.plan(graph, removed={axis.id: removed})
        plan.kept["inner.down.weight"][1] = np.arange(20 - len(removed))
        return plan

    assert llmprune.verify(model, misaligned([18, 19]), inputs).relative_error < 1e-9
    with pytest.raises(VerificationError, match="beginning in inner"):
        llmprune.verify(model, misaligned([3, 11]), inputs)
    for seed in range(20):
        assert all(max(gone) < axis.size - 1 for axis, gone in removals(graph, seed))
    assert torch.isfinite(output(model, inputs)).all()
