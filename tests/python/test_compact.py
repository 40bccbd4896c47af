"""Compaction: the same model object, smaller, and equal to the original with the removed positions zeroed."""

from __future__ import annotations

import copy
import importlib
import pickle
import signal
from typing import Any

import numpy as np
import pytest
import torch
from compact_plans import FFN, GROUPS, HEADS, attribute, ids, keep, llama, llama_plan, zeroed_logits
from torch import nn

from llmprune.checkpoints.record import Compaction, fingerprint
from llmprune.compaction.compact import compact, compacted_copy, gather, squeeze
from llmprune.errors import PlanError, TensorError

FFN_CUT = {0: [1, 5, 18], 1: [0, 2, 3]}
HEAD_CUT = {0: [1], 1: [0]}


def test_pruned_model_equals_its_masked_reference() -> None:
    model = llama().double()
    plan = llama_plan(model, FFN_CUT, HEAD_CUT)
    expected = zeroed_logits(model, plan, ids())
    count = sum(p.numel() for p in model.parameters())
    weights = {name: id(p) for name, p in model.named_parameters()}
    assert compact(model, plan) is model
    assert {name: id(p) for name, p in model.named_parameters()} == weights
    assert sum(p.numel() for p in model.parameters()) < count
    torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_pruned_model_generates_with_a_cache(attention: str) -> None:
    model = llama()
    model.set_attn_implementation(attention)
    compact(model, llama_plan(model, FFN_CUT, HEAD_CUT))
    prompt = ids(rows=1, length=5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(prompt, use_cache=True, **options)
    torch.testing.assert_close(cached, model.generate(prompt, use_cache=False, **options))
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), prompt], 1)
    mask = (torch.arange(7) >= 2).long()[None]
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[:, 2:], model(prompt).logits, rtol=1e-4, atol=1e-4
    )


def test_pruned_model_trains_while_an_earlier_graph_lives() -> None:
    model = llama()
    held = model(ids(), labels=ids()).loss  # keeps autograd's accumulators of the old shapes alive
    held.backward(retain_graph=True)
    compact(model, llama_plan(model, FFN_CUT, HEAD_CUT))
    gate = model.model.layers[0].mlp.gate_proj.weight
    assert gate.grad is None
    assert model.model.norm.weight.grad is not None, "an uncut parameter keeps its gradient"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert gate.grad is not None
    assert gate.grad.shape == gate.shape == (FFN - 3, 24)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tie", [False, True])
def test_every_dtype_and_tied_weights_survive(dtype: torch.dtype, tie: bool) -> None:
    model = llama(tie=tie).to(dtype)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    plan = llama_plan(model, FFN_CUT)
    rows = keep(61, [4, 60])
    plan.kept["model.embed_tokens.weight"] = {0: rows}
    before = model.model.embed_tokens.weight.detach().clone()
    compact(model, plan)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tie
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.model.layers[1].mlp.up_proj.weight.requires_grad
    assert torch.equal(model.model.embed_tokens.weight, before[rows])
    assert model.model.embed_tokens.num_embeddings == 59
    assert model.lm_head.out_features == (59 if tie else 61)


def test_sizes_of_builtin_modules_follow() -> None:
    model = llama()
    compact(model, llama_plan(model, FFN_CUT))
    mlp = model.model.layers[0].mlp
    assert (mlp.up_proj.out_features, mlp.down_proj.in_features) == (FFN - 3, FFN - 3)
    assert "out_features=17" in repr(mlp.up_proj)
    values = {(a.module, a.name): a.value for a in model.llmprune.attributes}
    assert values["model.layers.1.mlp.down_proj", "in_features"] == FFN - 3


def test_gather_of_every_shape_and_layout_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    for shape in [(7,), (5, 9), (4, 3, 6), (3, 4, 2, 5)]:
        for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.int64):
            whole = torch.from_numpy(rng.integers(0, 2, shape)).to(dtype)
            if dtype not in (torch.bool, torch.int8):
                whole = torch.from_numpy(rng.integers(0, 99, shape)).to(dtype)
            layouts = [whole, whole.transpose(0, -1).contiguous().transpose(0, -1)]
            layouts.append(torch.stack([whole, whole], -1)[..., 0])
            for tensor in layouts:
                kept = {
                    d: np.sort(rng.choice(n, rng.integers(1, n + 1), replace=False))
                    for d, n in enumerate(shape)
                    if rng.random() < 0.7
                }
                got = gather(tensor, kept)
                expected = whole
                for d, positions in kept.items():
                    expected = expected[(slice(None),) * d + (torch.as_tensor(positions),)]
                assert torch.equal(got, expected)
                assert torch.equal(tensor, whole), "the source is left alone"
                assert got.is_contiguous()
                assert got.untyped_storage().nbytes() == got.numel() * got.element_size()


def test_non_contiguous_and_expanded_parameters_are_cut() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model[0].weight = nn.Parameter(torch.randn(4, 6).t())
    model[0].bias = nn.Parameter(torch.tensor([0.5]).expand(6))
    whole = model[0].weight.detach().clone()
    plan = llama_plan(model)
    rows = np.array([0, 3, 4])
    plan.kept = {"0.weight": {0: rows}, "0.bias": {0: rows}, "1.weight": {1: rows}}
    compact(model, plan)
    assert torch.equal(model[0].weight, whole[rows])
    assert torch.equal(model[0].bias, torch.full((3,), 0.5))
    assert model(torch.ones(2, 4)).shape == (2, 3)


def test_parameters_that_share_memory_are_refused_unchanged() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    plan = llama_plan(model)
    plan.kept = {"0.weight": {0: np.array([0, 2])}}
    with pytest.raises(TensorError, match="different parameters in the same memory"):
        compact(model, plan)
    assert model[0].weight.shape == (4, 4)


def test_disjoint_parts_of_one_storage_are_cut() -> None:
    flat = torch.randn(32)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for i, layer in enumerate(model):
        layer.weight = nn.Parameter(flat[16 * i : 16 * i + 16].view(4, 4))
    plan = llama_plan(model)
    plan.kept = {"0.weight": {0: np.array([0, 2])}, "1.weight": {1: np.array([0, 2])}}
    compact(model, plan)
    assert torch.equal(model[0].weight, flat[:16].view(4, 4)[[0, 2]])
    assert torch.equal(model[1].weight, flat[16:].view(4, 4)[:, [0, 2]])


def test_meta_models_are_cut_without_memory() -> None:
    with torch.device("meta"):
        model = llama()
    compact(model, llama_plan(model, FFN_CUT))
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.shape == (FFN - 3, 24)
    assert weight.is_meta


def test_buffers_are_cut_and_stay_the_same_object() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 5)
            self.register_buffer("scale", torch.arange(5.0))
            self.alias = self.scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.scale

    model = Scaled()
    plan = llama_plan(model)
    rows = np.array([1, 4])
    plan.kept = {"linear.weight": {0: rows}, "linear.bias": {0: rows}, "scale": {0: rows}}
    expected = model(torch.ones(1, 3))[:, rows]
    compact(model, plan)
    assert model.alias is model.scale
    torch.testing.assert_close(model(torch.ones(1, 3)), expected)


class TestAttributes:
    def test_plain_tuple_and_list(self) -> None:
        model = nn.Sequential(nn.Linear(2, 6), nn.Linear(6, 2))
        model[0].sizes, model[0].widths, model[0].heads = (6, 2), [1, 6], 3
        shared = model[0].widths
        plan = llama_plan(model)
        plan.attributes = [
            attribute("0", "sizes", 6, 4, index=0),
            attribute("0", "widths", 6, 4, index=1),
            attribute("0", "heads", 3, 2),
        ]
        compact(model, plan)
        assert (model[0].sizes, model[0].widths, model[0].heads) == ((4, 2), [1, 4], 2)
        assert shared == [1, 6], "a list another object may hold is replaced, not changed"

    @pytest.mark.parametrize("values", [(2, 2), (2, 1), (2, None), (None, 2)])
    def test_a_config_field_changes_for_the_modules_that_need_it(
        self, values: tuple[int | None, ...]
    ) -> None:
        model = llama()
        plan = llama_plan(model)
        plan.attributes = [
            attribute(f"model.layers.{i}.self_attn", "config.num_key_value_heads", GROUPS, value)
            for i, value in enumerate(values)
            if value
        ]
        compact(model, plan)
        assert model.config.num_key_value_heads == GROUPS
        seen = [layer.self_attn.config.num_key_value_heads for layer in model.model.layers]
        assert seen == [value or GROUPS for value in values]
        assert model.model.layers[0].mlp.config is model.config
        assert model.model.rotary_emb.config is model.config

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (attribute("nowhere", "x", 1, 2), "does not have"),
            (attribute("model", "config.no_such", 1, 2), "does not have"),
            (attribute("model", "config.num_key_value_heads", 99, 2), "from 99"),
            (attribute("", "dtype", 1, 2), "read-only"),
        ],
    )
    def test_an_attribute_that_does_not_fit_is_refused(self, bad: object, message: str) -> None:
        model = llama()
        plan = llama_plan(model, FFN_CUT, attributes=[bad])
        with pytest.raises(PlanError, match=message):
            compact(model, plan)
        assert fingerprint(model) == plan.fingerprint


class TestRefusals:
    def test_a_plan_of_another_model(self) -> None:
        plan = llama_plan(llama(intermediate_size=FFN + 2), FFN_CUT)
        model = llama()
        with pytest.raises(PlanError, match="another model"):
            compact(model, plan)
        assert not hasattr(model, "llmprune")

    def test_an_old_plan_of_this_model(self) -> None:
        model = llama()
        plan = llama_plan(model, FFN_CUT)
        compact(model, plan)
        with pytest.raises(PlanError, match="pruned since"):
            compact(model, plan)

    @pytest.mark.parametrize(
        "positions",
        [[], [3, 1], [1, 1], [-1, 2], [0, FFN], [[1, 2]], [0.5, 1.0]],
        ids=["empty", "unsorted", "repeated", "negative", "outside", "2-d", "float"],
    )
    def test_positions_that_are_not_positions(self, positions: list[object]) -> None:
        model = llama()
        plan = llama_plan(model)
        plan.kept = {"model.layers.0.mlp.up_proj.weight": {0: np.array(positions)}}
        with pytest.raises(PlanError):
            compact(model, plan)

    def test_unknown_names_and_dimensions(self) -> None:
        model = llama()
        plan = llama_plan(model)
        for kept in ({"nothing.weight": {0: np.array([1])}}, {"model.norm.weight": {1: np.array([0])}}):
            plan.kept = kept
            with pytest.raises(PlanError):
                compact(model, plan)


class TestRecord:
    def test_positions_are_those_of_the_original_after_two_prunings(self) -> None:
        model = llama().double()
        original = copy.deepcopy(model)
        compact(model, llama_plan(model, {0: [0, 7]}))
        compact(model, llama_plan(model, {0: [0, 7]}, {1: [2]}))
        record = model.llmprune
        assert isinstance(record, Compaction)
        assert record.model_class == "LlamaForCausalLM"
        assert record.module == type(model).__module__
        assert len(record.history) == 2
        name = "model.layers.0.mlp.down_proj.weight"
        rows = record.kept[name][1]
        assert rows.tolist() == keep(FFN, [0, 1, 7, 9]).tolist()
        for name, dims in record.kept.items():
            expected = original.get_parameter(name).detach()
            for dim, positions in dims.items():
                expected = expected.index_select(dim, torch.as_tensor(positions))
            assert torch.equal(model.get_parameter(name), expected), name
            assert record.shapes()[name] == tuple(expected.shape)
            assert record.original_shapes[name] == tuple(original.get_parameter(name).shape)
        [down] = [
            a
            for a in record.attributes
            if (a.module, a.name) == ("model.layers.0.mlp.down_proj", "in_features")
        ]
        assert down.value == FFN - 4
        assert [entry["kind"] for entry in record.history[1].removed] == ["ffn", "head"]
        assert record.history[0].parameters_after == record.history[1].parameters_before
        assert record.history[1].parameters_after == sum(p.numel() for p in model.parameters())

    def test_it_is_copied_pickled_and_serialised(self) -> None:
        import json

        model = llama()
        compact(model, llama_plan(model, FFN_CUT, HEAD_CUT))
        text = json.dumps(model.llmprune.to_json())
        for other in (
            copy.deepcopy(model).llmprune,
            pickle.loads(pickle.dumps(model.llmprune)),
            Compaction.from_json(json.loads(text)),
        ):
            assert other is not model.llmprune
            assert json.dumps(other.to_json()) == text
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids()).logits, model(ids()).logits)


def test_copy_shares_what_is_not_cut_and_leaves_the_model_alone() -> None:
    model = llama()
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = llama_plan(model, FFN_CUT)
    plan.attributes = [
        attribute("model.layers.0.self_attn", "config.num_key_value_heads", GROUPS, GROUPS + 1)
    ]
    twin = compacted_copy(model, plan)
    assert twin.model.layers[0].mlp.up_proj.weight.shape == (FFN - 3, 24)
    assert twin.model.layers[0].self_attn.q_proj.weight is model.model.layers[0].self_attn.q_proj.weight
    assert model.model.layers[0].self_attn.config.num_key_value_heads == GROUPS
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())
    assert not hasattr(model, "llmprune")


def test_interrupt_is_delivered_after_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("llmprune.compaction.compact")

    model = llama().double()
    plan = llama_plan(model, FFN_CUT, HEAD_CUT)
    expected = zeroed_logits(model, plan, ids())
    real = module.gather
    calls = []

    def interrupting(tensor: torch.Tensor, kept: dict[int, np.ndarray]) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(tensor, kept)

    monkeypatch.setattr(module, "gather", interrupting)
    with pytest.raises(KeyboardInterrupt):
        compact(model, plan)
    assert len(calls) == len(plan.kept)
    assert model.llmprune.state == "complete"
    torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=1e-12)


def fail_after(count: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the named functions of the compact module raise once ``count`` tensors have been gathered."""
    module = importlib.import_module("llmprune.compaction.compact")
    left = [count]

    def limited(real: Any) -> Any:
        def call(tensor: torch.Tensor, kept: dict[int, np.ndarray]) -> torch.Tensor:
            left[0] -= 1
            if left[0] < 0:
                raise error("no memory for a matrix")
            return real(tensor, kept)

        return call

    for name in names:
        monkeypatch.setattr(module, name, limited(getattr(module, name)))


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_without_memory_for_a_copy_tensors_are_compacted_in_place(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    plan = llama_plan(model, FFN_CUT, HEAD_CUT)
    expected = zeroed_logits(model, plan, ids())
    fail_after(3, error, monkeypatch, "gather")
    compact(model, plan)
    assert "compacted in place" in caplog.text
    assert model.llmprune.state == "complete"
    torch.testing.assert_close(model(ids()).logits, expected)


def test_failure_in_the_middle_leaves_a_model_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    plan = llama_plan(model, FFN_CUT, HEAD_CUT)
    fail_after(3, MemoryError, monkeypatch, "gather", "squeeze")
    with pytest.raises(MemoryError):
        compact(model, plan)
    assert model.llmprune.state == "broken"
    with pytest.raises(TensorError, match="half pruned"):
        model(ids())
    with pytest.raises(TensorError, match="half pruned"):
        compact(model, plan)


def test_a_record_that_cannot_take_the_plan_refuses_before_the_first_cut() -> None:
    model = llama()
    compact(model, llama_plan(model, {0: [0]}))
    plan = llama_plan(model, {0: [1]})
    forgotten = "model.layers.0.mlp.down_proj.weight"
    assert isinstance(model.llmprune, Compaction)
    del model.llmprune.original_shapes[forgotten]
    shapes = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(PlanError, match="another model"):
        compact(model, plan)
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert model.llmprune.state == "complete"
    assert torch.isfinite(model(ids()).logits).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_squeezing_in_place_equals_gathering(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    for shape in [(9,), (6, 11), (3, 5, 4), (2, 3, 4, 5)]:
        whole = torch.from_numpy(rng.integers(0, 2 if dtype is torch.bool else 100, shape)).to(dtype)
        kept = {d: np.sort(rng.choice(n, n // 2 + 1, replace=False)) for d, n in enumerate(shape) if n > 2}
        expected = gather(whole, kept)
        got = squeeze(whole, kept)
        assert torch.equal(got, expected)
        assert got.data_ptr() == whole.data_ptr()
    with pytest.raises(TensorError, match="in its own memory"):
        squeeze(torch.zeros(3, 4).t(), {0: np.array([1])})


def test_heads_keep_their_query_heads() -> None:
    """A cut KV group takes its own query heads along: the counts must stay in the ratio attention expects."""
    model = llama()
    compact(model, llama_plan(model, heads=HEAD_CUT))
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.out_features // attention.k_proj.out_features == HEADS // GROUPS
