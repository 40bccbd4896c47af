"""Channels inside experts: each expert loses a choice of its own, as many as the others."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import llmprune
from llmprune.compaction.compact import gather, squeeze
from llmprune.compaction.recheck import recheck
from llmprune.errors import InputError, PlanError
from llmprune.planning.apart import cut_alike
from llmprune.planning.plan import Plan
from llmprune.repair.repair import repair
from llmprune.reporting.report import render_axes
from llmprune.scoring.calibration import load_calibration
from llmprune.tracing.graph import Axis, Graph

BASE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "intermediate_size": 22, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 14, "decoder_sparse_step": 1,
         "shared_expert_intermediate_size": 10},
    ),
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOss", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 16}),
    "deepseek_v3": (
        "DeepseekV3",
        {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 14, "n_shared_experts": 1,
         "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
         "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6, "num_key_value_heads": 4},
    ),
}  # fmt: skip
IDS = torch.randint(3, 61, (4, 11), generator=torch.Generator().manual_seed(8))


@cache
def original(family: str) -> tuple[nn.Module, Graph]:
    name, fields = FAMILIES[family]
    values = {**BASE, **fields}
    if family in ("qwen2_moe", "olmoe", "deepseek_v3"):
        values.pop("head_dim")
    config = getattr(transformers, f"{name}Config")(**values)
    config._attn_implementation, config._experts_implementation = "eager", "batched_mm"
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model, llmprune.trace(model, {"input_ids": IDS})


def inside(graph: Graph) -> list[Axis]:
    """The axes of channels inside stacked experts."""
    found = []
    for axis in graph.axes:
        if (
            axis.prunable
            and axis.kind == "ffn"
            and any(len(graph.parameters[n]) == 3 for n, _ in axis.places)
        ):
            assert graph.around(axis.id).stacked
            found.append(axis)
    assert found
    return found


def logits(model: nn.Module, way: str) -> torch.Tensor:
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = way
    with torch.no_grad():
        return model(input_ids=IDS).logits


def zeroed(model: nn.Module, graph: Graph, plan: Plan) -> nn.Module:
    """The original with the removed channels of each expert set to zero, by nothing but the axes' members."""
    twin = copy.deepcopy(model)
    parameters = dict(twin.named_parameters())
    for axis_id, removed in plan.removed.items():
        for member in graph.axes[axis_id].members:
            for expert, row in enumerate(removed) if removed.ndim == 2 else [(..., removed)]:
                part = parameters[member.parameter].data[expert]
                dim = member.dim - 1 if removed.ndim == 2 else member.dim
                part.index_fill_(dim, torch.as_tensor(member.positions[row].reshape(-1)), 0)
    return twin


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compacted_model_equals_the_one_with_each_experts_own_channels_zero(family: str) -> None:
    model, graph = original(family)
    scores = llmprune.score(model, graph, IDS, importance="element1", quiet=True)
    plan = llmprune.plan(graph, scores, {"ffn": 0.3}, protect_first=0, protect_last=0)
    for axis in inside(graph):
        rows = plan.removed[axis.id]
        count = int(0.3 * axis.size)
        assert rows.shape == (graph.around(axis.id).size, count)
        assert len({tuple(row) for row in rows}) > 1, "the choice differs between experts"
        for expert, row in enumerate(rows):
            order = np.argsort(scores.nested[axis.id][expert], kind="stable")
            if scores.nested[axis.id][expert].any():
                assert set(row) == set(order[:count])
    assert llmprune.verify(model, plan, {"input_ids": IDS}).relative_error < 1e-9
    small = llmprune.compact(copy.deepcopy(model), plan)
    assert (
        sum(p.numel() for p in small.parameters())
        == plan.parameters_after
        == graph.numel({axis: rows.shape[-1] for axis, rows in plan.removed.items()})
    )
    for way in ("batched_mm", "eager"):
        expected = logits(zeroed(model, graph, plan), way)
        torch.testing.assert_close(logits(small, way), expected, rtol=0, atol=1e-10)
    assert not torch.allclose(logits(small, "eager"), logits(model, "eager"), atol=1e-4)


def oracle(model: nn.Module, axis: Axis, importance: str, experts: int) -> np.ndarray:
    """Scores for each expert from whole gradients, in float64: a loop for every structure."""
    gradients: list[dict[str, torch.Tensor]] = []
    for ids in IDS:
        model.zero_grad()
        out = model(input_ids=ids[None]).logits[0, :-1]
        nn.functional.cross_entropy(out, ids[1:]).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    total = np.zeros((experts, axis.size))
    for member in axis.members:
        w = model.get_parameter(member.parameter).detach()
        each = [g.get(member.parameter, torch.zeros_like(w)) for g in gradients]
        g, s = sum(each) / len(each), sum(one**2 for one in each) / len(each)
        for expert in range(experts):
            for index in range(axis.size):
                for position in member.positions[index]:
                    a, b, c = (t[expert].select(member.dim - 1, int(position)) for t in (w, g, s))
                    total[expert, index] += float(
                        {
                            "vector": lambda a=a, b=b: (b * a).sum().abs(),
                            "element1": lambda a=a, b=b: (b * a).abs().sum(),
                            "element2": lambda a=a, b=b, c=c: (b * a - a * c * a / 2).abs().sum(),
                            "l1": lambda a=a: a.abs().sum(),
                            "l2": lambda a=a: (a * a).sum().sqrt(),
                        }[importance]()
                    )
    return total


@pytest.mark.parametrize("importance", ["vector", "element1", "element2", "l1", "l2"])
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_scores_of_each_expert_are_those_of_whole_gradients(family: str, importance: str) -> None:
    model, graph = original(family)
    logits(model, "eager")
    axis = inside(graph)[-1]
    want = oracle(model, axis, importance, graph.around(axis.id).size)
    for batch_size, checkpointing in (
        ((None, False), (2, True)) if importance == "element2" else ((None, None),)
    ):
        scores = llmprune.score(
            model, graph, IDS, importance, batch_size=batch_size, checkpointing=checkpointing, quiet=True
        )
        np.testing.assert_allclose(scores.nested[axis.id], want, rtol=1e-5, atol=1e-7)
        if importance not in ("vector", "l2"):
            np.testing.assert_allclose(scores[axis.id], want.sum(0), rtol=1e-5)


def test_an_expert_that_saw_no_token_loses_what_the_others_can_spare() -> None:
    _, graph = original("mixtral")
    scores = llmprune.score(*original("mixtral"), importance="random", quiet=True)
    axis = inside(graph)[0]
    scores.nested[axis.id][3] = 0.0
    plan = llmprune.plan(graph, scores, {"ffn": 0.5}, protect_first=0, protect_last=0)
    least = np.argsort(scores.nested[axis.id].sum(0))[: axis.size // 2]
    assert set(plan.removed[axis.id][3]) == set(least)


@pytest.mark.parametrize("importance", ["obs", "fluctuation", "activation"])
def test_activations_are_told_apart_and_a_repair_fits_each_expert(importance: str) -> None:
    model, graph = original("mixtral")
    ids = torch.randint(3, 61, (16, 24), generator=torch.Generator().manual_seed(9))
    scores = llmprune.score(model, graph, ids, importance, quiet=True)
    axis = inside(graph)[0]
    if importance == "activation":
        seen: dict[int, list[torch.Tensor]] = {}
        stack = model.get_submodule("model.layers.0.mlp.experts")
        into: dict[str, Any] = {}
        hook = stack.register_forward_pre_hook(lambda _m, args: into.update(x=args[0], chosen=args[1]))
        with torch.no_grad():
            model(input_ids=ids)
        hook.remove()
        for token, experts in zip(into["x"], into["chosen"], strict=True):
            for expert in experts.tolist():
                gate, up = (stack.gate_up_proj[expert] @ token).chunk(2)
                seen.setdefault(expert, []).append((stack.act_fn(gate) * up).detach())
        for expert, values in seen.items():
            want = torch.stack(values).square().mean(0).sqrt().numpy()
            np.testing.assert_allclose(scores.nested[axis.id][expert], want, rtol=1e-9)
    plan = llmprune.plan(graph, scores, {"ffn": 0.4}, protect_first=0, protect_last=0)
    fixed = repair(model, plan, load_calibration(ids))
    assert any(name.endswith("down_proj[4]") for name in fixed.ridges)
    assert llmprune.verify(model, plan, {"input_ids": IDS}, fixed.weights).relative_error < 1e-9
    if fixed.kept:
        assert fixed.loss is not None
        assert fixed.loss[1] < fixed.loss[0]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_whole_experts_go_together_with_channels_and_a_second_pruning_follows(family: str) -> None:
    model, graph = original(family)
    rng = np.random.default_rng(3)

    def removal(graph: Graph) -> dict[int, np.ndarray]:
        rows = {
            a.id: np.stack([np.sort(rng.permutation(a.size)[:5]) for _ in range(graph.around(a.id).size)])
            for a in inside(graph)
        }
        return rows | {a.id: np.array([1]) for a in graph.axes if a.kind == "expert" and a.prunable}

    small = copy.deepcopy(model)
    for _ in range(2):
        now = llmprune.trace(small, {"input_ids": IDS})
        plan = llmprune.plan(now, removed=removal(now))
        assert llmprune.verify(small, plan, {"input_ids": IDS}).relative_error < 1e-9
        llmprune.compact(small, plan)
    record = small.llmprune
    copied = type(record).from_json(json.loads(json.dumps(record.to_json())))
    parameters = dict(small.named_parameters())
    for name, dims in copied.kept.items():
        whole = model.get_parameter(name).detach()
        assert copied.shapes()[name] == tuple(parameters[name].shape)
        for place, slice_ in enumerate(dims.get(0, range(len(whole)))):
            part = whole[int(slice_)]
            for dim, positions in dims.items():
                if dim:
                    row = positions if positions.ndim == 1 else positions[place]
                    part = part.index_select(dim - 1, torch.as_tensor(row))
            assert torch.equal(parameters[name].detach()[place], part), name
    for axis in inside(graph):
        name = axis.members[0].parameter
        assert copied.kept[name][axis.members[0].dim].shape[0] == 3


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_a_ragged_model_is_saved_in_the_stock_form_and_rechecked(family: str, tmp_path: Path) -> None:
    model, graph = original(family)
    scores = llmprune.score(model, graph, importance="l2", quiet=True)
    plan = llmprune.plan(graph, scores, {"ffn": 0.3}, protect_first=0, protect_last=0)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert Plan.load(path).removed[inside(graph)[0].id].ndim == 2
    small = llmprune.compact(copy.deepcopy(model), Plan.load(path))
    report = llmprune.save_pretrained(small, tmp_path / "small")
    assert report.form == "stock"
    axes = [plan.axes[axis] for axis in plan.removed]
    totals = [len(axes), *(sum(axis[key] for axis in axes) for key in ("size", "removed"))]
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"| ffn | {' | '.join(map(str, totals))} |" in card
    again = (
        type(model)
        .from_pretrained(tmp_path / "small", dtype=torch.float64, attn_implementation="eager")
        .eval()
    )
    torch.testing.assert_close(logits(again, "eager"), logits(small, "eager"), rtol=0, atol=1e-12)
    ours = llmprune.from_pretrained(tmp_path / "small", dtype=torch.float64)
    ours.config._experts_implementation = "batched_mm"  # float64 has no other
    found = recheck(ours, copy.deepcopy(model), {"input_ids": IDS}).verification
    assert found is not None
    assert found.relative_error < 1e-6


def test_explain_says_that_experts_choose_apart() -> None:
    _, graph = original("mixtral")
    text = str(graph.explain("model.layers.0.mlp.experts.down_proj", 2, 3))
    assert "each of the 5 indices of axis" in text
    assert "(expert)" in text
    assert "may lose others" not in str(graph.explain("model.layers.0.self_attn.o_proj.weight", 0, 3))


def test_rows_are_refused_where_they_do_not_fit() -> None:
    _, graph = original("mixtral")
    axis = inside(graph)[0]
    with pytest.raises(InputError, match="each of the 5 indices around it"):
        llmprune.plan(graph, removed={axis.id: np.array([[0], [1]])})
    with pytest.raises(PlanError, match="of 5 indices; the plan chooses for 2"):
        graph.kept({axis.id: np.array([[0], [1]])})


class Stack(nn.Module):
    """Experts as a stack, with a choice of what a proof must refuse."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.router = nn.Linear(12, 4)
        self.up = nn.Parameter(torch.randn(4, 10, 12))
        self.down = nn.Parameter(torch.randn(4, 12, 10))
        self.shared = nn.Parameter(torch.randn(10))
        self.out = nn.Linear(12, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self.form == "dense":
            hidden = torch.einsum("td,efd->tef", flat, self.up).relu()
            return self.out(torch.einsum("tef,edf,te->td", hidden, self.down, self.router(flat).softmax(-1)))
        if self.form == "flat":
            hidden = (flat @ self.up.flatten(0, 1).t()).relu().view(len(flat), 4, -1)
            hidden = (hidden * self.router(flat).softmax(-1)[..., None]).flatten(1)
            return self.out(hidden @ self.down.transpose(1, 2).flatten(0, 1))
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        ids = chosen.reshape(-1)
        if self.form == "hash":  # by place: the stacks' own axes are not tied to the router's
            ids = torch.arange(2 * len(flat)) % 4
        other = chosen.flip(-1).reshape(-1) if self.form == "another index" else ids
        hidden = torch.bmm(self.up[ids], flat.repeat_interleave(2, 0)[..., None]).squeeze(-1).relu()
        if self.form == "shared bias":
            hidden = hidden + self.shared
        if self.form == "across tokens":
            hidden = hidden - hidden.sum(0, keepdim=True)
        if self.form == "moved":
            hidden = hidden[ids.argsort()]
        if self.form == "gram":
            hidden = (hidden @ hidden.t()).tanh() @ hidden
        if self.form == "normalised":
            hidden = hidden.softmax(-1)
        y = torch.bmm(self.down[other], hidden[..., None]).squeeze(-1) * weights.reshape(-1, 1)
        return self.out(x + y.view(-1, 2, y.shape[-1]).sum(1).view_as(x))


def traced(form: str) -> tuple[nn.Module, dict[str, torch.Tensor], Graph, Axis]:
    torch.manual_seed(0)
    model = Stack(form).double().eval()
    inputs = {"x": torch.randn(2, 5, 12, dtype=torch.float64)}
    graph = llmprune.trace(model, inputs)
    axis = next(a for a in graph.axes if ("down", 2) in a.places)
    return model, inputs, graph, axis


@pytest.mark.parametrize("form", ["plain", "dense", "flat", "hash"])
def test_a_proved_stack_of_any_module_is_cut_apart(form: str) -> None:
    model, inputs, graph, axis = traced(form)
    assert axis.prunable
    assert graph.around(axis.id).size == 4
    assert cut_alike(graph) == {}
    rows = np.array([[0, 9], [1, 2], [3, 7], [0, 4]])
    plan = llmprune.plan(graph, removed={axis.id: rows})
    assert llmprune.verify(model, plan, inputs).relative_error < 1e-12
    small = llmprune.compact(copy.deepcopy(model), plan)
    assert tuple(small.up.shape) == (4, 8, 12)
    torch.testing.assert_close(small(**inputs), zeroed(model, graph, plan)(**inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ("shared bias", "shared holds it"),
        ("another index", "aten::bmm"),
        ("across tokens", "aten::sum"),
        ("moved", "aten::index"),
        ("gram", "aten::mm"),
        ("normalised", "softmax"),
    ],
)
def test_what_cannot_be_told_apart_is_cut_alike_and_says_why(form: str, why: str) -> None:
    model, inputs, graph, axis = traced(form)
    with pytest.raises(PlanError, match=why):
        graph.around(axis.id)
    if axis.prunable:
        assert why in cut_alike(graph)[axis.id]
        assert "cut alike everywhere" in str(graph.explain("down", 2, 1))
        assert why in render_axes(graph, frozen=True)
    scores = llmprune.score(model, graph, importance="l2", quiet=True)
    assert axis.id not in scores.nested
    if axis.prunable:
        plan = llmprune.plan(graph, removed={axis.id: [2, 5]})
        assert llmprune.verify(model, plan, inputs).relative_error < 1e-9


def test_slices_of_a_stack_are_gathered_each_with_its_own_positions() -> None:
    rng = np.random.default_rng(0)
    for dtype in (torch.float32, torch.bfloat16, torch.complex128):
        whole = torch.randn(5, 7, 6, dtype=torch.float64).to(dtype)
        kept = {
            0: np.array([0, 2, 4]),
            1: np.stack([np.sort(rng.permutation(7)[:4]) for _ in range(3)]),
            2: np.array([1, 5]),
        }
        want = torch.stack(
            [whole[s][torch.as_tensor(r)][:, [1, 5]] for s, r in zip(kept[0], kept[1], strict=True)]
        )
        assert torch.equal(gather(whole, kept), want)
        if dtype is not torch.complex128:
            assert torch.equal(squeeze(whole.clone(), kept), want)
