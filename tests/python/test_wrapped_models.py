"""Models with something around them: compiled, hooked, placed on devices, offloaded, packed, wrapped for LoRA."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.modules.module as torch_module
import transformers
from plain_modules import Around, Feed, features
from tiny_models import build
from torch import nn
from zeroed_reference import check_axes, difference, output, removals, seeded, sizes

import llmprune
from llmprune.errors import InputError


def feed() -> nn.Module:
    return Around(Feed(), 12)


X = {"x": features()[0]}


def cut(model: nn.Module, inputs: dict[str, Any] = X, size: int = 20) -> tuple[llmprune.Graph, llmprune.Plan]:
    graph = llmprune.trace(model, inputs)
    axis = next(axis for axis in graph.axes if axis.prunable and axis.size == size)
    return graph, llmprune.plan(graph, removed={axis.id: [1, 4, 7]})


# torch.compile


def compiled_whole(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compiled_part(model: Any) -> Any:
    model.inner = torch.compile(model.inner, backend="eager")
    model.last.compile(backend="eager")
    return model


@pytest.mark.parametrize("compile_", [compiled_whole, compiled_part])
def test_compiled_models_are_pruned_as_what_they_were(compile_: Callable[[nn.Module], Any]) -> None:
    plain = seeded(feed).float()
    model = compile_(copy.deepcopy(plain))
    before = output(model, X)
    graph, plan = cut(model)
    assert [str(a) for a in graph.axes] == [str(a) for a in llmprune.trace(plain, X).axes]  # plans fit either
    assert llmprune.verify(model, plan, X).relative_error < 1e-5
    assert llmprune.verify(plain, plan, X).relative_error < 1e-5
    kind = type(model), type(model._modules.get("inner"))
    assert llmprune.compact(model, plan) is model
    assert (type(model), type(model._modules.get("inner"))) == kind
    got = output(model, X)  # compiled code notices the new sizes
    assert torch.allclose(got, output(llmprune.compact(plain, plan), X), atol=1e-6)
    assert not torch.allclose(got, before)
    assert not torch_module._has_any_global_hook()


def test_a_compiled_language_model_is_scored_and_pruned() -> None:
    model = build("llama")
    ids = torch.arange(3, 35).view(4, 8)
    expected = llmprune.score(model, llmprune.trace(model), ids)
    compiled = torch.compile(model, backend="eager")
    scores = llmprune.score(compiled, llmprune.trace(compiled), ids)
    assert all((scores[axis] == expected[axis]).all() for axis in expected)
    report = llmprune.prune(compiled, ratio=0.1, importance="l2")
    assert report.model == "LlamaForCausalLM"
    assert compiled._orig_mod is model
    assert model(ids).logits.shape == (4, 8, 101)
    assert not torch_module._has_any_global_hook()


# Hooks and training mode


def test_hooks_are_kept_and_see_nothing_of_a_trace_or_a_check() -> None:
    model, seen = seeded(feed).float(), []
    model.inner.register_forward_hook(lambda module, args, result: seen.append(result.detach().cpu().numpy()))
    model.inner.up.register_forward_pre_hook(lambda module, args: seen.append(args[0].sum().item()))
    model.inner.register_full_backward_hook(lambda module, got, given: seen.append(given[0]))
    model.last.weight.register_hook(lambda gradient: seen.append(gradient))
    graph, plan = cut(model)
    assert graph.tape.device_mode == "meta"
    assert graph.tape.notes == ["hooks of 2 modules were left out of the trace (inner, inner.up)"]
    llmprune.verify(model, plan, X)
    assert seen == []
    llmprune.compact(model, plan)
    model(**X).sum().backward()
    assert len(seen) == 4
    assert seen[1].shape == (2, 7, 12)


def test_scores_of_a_model_with_hooks_are_those_without() -> None:
    model, ids, seen = build("llama"), torch.arange(3, 35).view(4, 8), []
    graph = llmprune.trace(model)
    expected = llmprune.score(model, graph, ids)
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, result: seen.append(result.shape[-1])
    )
    model.model.layers[1].register_full_backward_hook(
        lambda module, got, given: seen.append(given[0].shape[-1])
    )
    scores = llmprune.score(model, graph, ids)
    assert all((scores[axis] == expected[axis]).all() for axis in expected)
    assert len(model.model.layers[0].mlp._forward_hooks) == len(model.model.layers[1]._backward_hooks) == 1


def test_training_mode_is_left_and_restored() -> None:
    class Dropped(Feed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.up(x))
            y = nn.functional.dropout(y, 0.5, self.training)
            result: torch.Tensor = self.down(y * (0.0 if self.training else 1.0))
            return result

    model = Around(nn.Sequential(Dropped(), nn.Dropout(0.9)), 12).train()
    model.first.eval()
    graph, plan = cut(model)
    assert not any("dropout" in op[0] or "bernoulli" in op[0] for op in graph.tape.ops)
    llmprune.verify(model, plan, X)
    assert [module.training for module in model.children()] == [False, True, True]
    assert all(module.training for module in model.inner.modules())


# Devices


def offload(model: nn.Module) -> nn.Module:
    """Weights in a dictionary, on meta until a module runs: what a device_map with cpu or disk parts makes."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.cpu_offload(model, torch.device("cpu"))
    return model


def test_a_model_placed_on_devices_is_pruned_where_it_lies() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    plain = seeded(feed).float()
    model = copy.deepcopy(plain)
    for module in model.children():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
    graph, plan = cut(model)
    assert [str(a) for a in graph.axes] == [str(a) for a in llmprune.trace(plain, X).axes]
    llmprune.verify(model, plan, X)
    llmprune.compact(model, plan)
    assert torch.equal(model(**X), llmprune.compact(plain, plan)(**X))
    assert hasattr(model.inner, "_hf_hook")


def test_an_offloaded_model_is_traced_but_not_cut() -> None:
    plain = seeded(feed).float()
    expected = plain(**X)
    model = offload(copy.deepcopy(plain))
    assert model.inner.up.weight.is_meta
    graph, plan = cut(model)
    assert [str(a) for a in graph.axes] == [str(a) for a in llmprune.trace(plain, X).axes]
    for refused in (
        lambda: llmprune.verify(model, plan, X),
        lambda: llmprune.compact(model, plan),
        lambda: llmprune.score(model, graph, importance="l2"),
    ):
        with pytest.raises(
            InputError,
            match=r"(first.weight is offloaded by a device_map|or offloaded).* load (the model|it) whole",
        ):
            refused()
    assert torch.equal(model(**X), expected)


def test_a_device_map_of_transformers(tmp_path: Path) -> None:
    """Part of a real checkpoint on the disk: traced, not cut; wholly on one device: pruned."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    build("llama").save_pretrained(tmp_path / "model")
    parts = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu"
    )
    options = {"device_map": {**parts, "model.layers.1": "disk"}, "offload_folder": tmp_path / "offload"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert len([axis for axis in llmprune.trace(model).axes if axis.prunable]) == 10
    with pytest.raises(InputError, match=r"model.layers.1.*is offloaded by a device_map"):
        llmprune.prune(model, ratio=0.2, importance="l2")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="cpu")
    assert llmprune.prune(model, ratio=0.2, importance="l2").verification is not None


# Packed weights: stand-ins with what the real ones show of themselves


def eight_bit() -> nn.Module:
    """Parameters of int8 with their scales beside them (bitsandbytes, 8 bit)."""
    linear = nn.Linear(12, 12)
    linear.weight = nn.Parameter(torch.ones(12, 12, dtype=torch.int8), requires_grad=False)
    linear.register_buffer("SCB", torch.ones(12))
    return linear


def four_bit() -> nn.Module:
    """Two values in a byte, in one long column, the subclass of Parameter included (bitsandbytes, 4 bit)."""

    class Packed(nn.Parameter):
        pass

    linear = nn.Linear(12, 12)
    linear.weight = Packed(torch.ones(72, 1, dtype=torch.uint8), requires_grad=False)
    return linear


def packed_buffers() -> nn.Module:
    """No weight at all, but matrices of int32 and their scales as buffers (GPTQ, AWQ)."""
    module = nn.Module()
    module.in_features = module.out_features = 32
    module.register_buffer("qweight", torch.ones(4, 32, dtype=torch.int32))
    module.register_buffer("qzeros", torch.ones(2, 4, dtype=torch.int32))
    module.register_buffer("scales", torch.ones(2, 32, dtype=torch.float16))
    return module


def wrapper_subclass() -> nn.Module:
    """A tensor type that holds other tensors (torchao)."""
    from torch.testing._internal.two_tensor import TwoTensor

    linear = nn.Linear(12, 12)
    linear.weight = nn.Parameter(TwoTensor(torch.ones(12, 12), torch.ones(12, 12)), requires_grad=False)
    return linear


def eight_bit_floats() -> nn.Module:
    linear = nn.Linear(12, 12)
    linear.weight = nn.Parameter(torch.ones(12, 12).to(torch.float8_e4m3fn), requires_grad=False)
    return linear


PACKED = {
    eight_bit: r"inner.weight is int8",
    four_bit: r"inner.weight is uint8",
    packed_buffers: r"inner.qweight is packed int32",
    wrapper_subclass: r"inner.weight is a TwoTensor",
    eight_bit_floats: r"inner.weight is float8_e4m3fn",
}


@pytest.mark.parametrize("pack", PACKED)
def test_packed_weights_are_refused_with_the_way_out(pack: Callable[[], nn.Module]) -> None:
    model = Around(pack(), 12)
    model.config = SimpleNamespace(quantization_config={"quant_method": "some"})
    with pytest.raises(
        InputError, match=rf"{PACKED[pack]}: quantised weights by some cannot be pruned; load"
    ) as error:
        llmprune.trace(model, X)
    assert "float32 or bfloat16" in str(error.value)


def test_a_model_that_says_it_is_quantised_is_believed_and_one_that_no_longer_is_passes() -> None:
    model = feed()
    model.config = SimpleNamespace(quantization_config={"quant_method": "some"})
    cut(model)  # dequantised: all weights are floats
    model.is_quantized = True
    with pytest.raises(InputError, match="the model is quantised"):
        llmprune.trace(model, X)


def test_integers_that_are_no_weights_are_none_of_this() -> None:
    model = feed()
    model.inner.in_features = model.inner.out_features = 3
    model.inner.register_buffer("table", torch.arange(12).view(3, 4))  # as relative positions are
    model.inner.scale = nn.Parameter(torch.ones(3, 3))
    model.register_buffer("mask", torch.ones(7, 7, dtype=torch.bool))
    assert sizes(cut(model)[0]) == [12, 12, 20]


# LoRA


@pytest.fixture
def lora() -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=3, lora_alpha=7, lora_dropout=0.1, task_type="CAUSAL_LM",
            target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        )  # fmt: skip
        return seeded(lambda: peft.get_peft_model(build("llama", num_hidden_layers=1), config))


ROUNDED = 1e-6
"""Llama's norms compute in float32, whatever the model's type."""

IDS = {"input_ids": torch.arange(3, 17).view(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}


def test_updates_come_along_with_their_base_weights(lora: Any) -> None:
    graph = check_axes(lora, IDS, tolerance=ROUNDED)
    kinds = {axis.kind for axis in graph.axes if axis.prunable}
    assert kinds == {"channel", "head", "query", "head_dim", "value_dim", "ffn", "rank"}
    assert [str(a) for a in llmprune.trace(lora).axes] == [
        str(a) for a in graph.axes
    ]  # it makes its own inputs
    for axis in graph.axes:
        if axis.kind == "ffn":
            names = [name.partition(".mlp.")[2] for name, _ in axis.places]
            assert "up_proj.base_layer.weight" in names
            assert "up_proj.lora_B.default.weight" in names
            assert "down_proj.lora_A.default.weight" in names


def test_a_pruned_adapter_merges_into_what_it_computed(lora: Any, tmp_path: Path) -> None:
    graph = llmprune.trace(lora, IDS)
    removed = {axis.id: gone[:1] for axis, gone in removals(graph)}
    plan = llmprune.plan(graph, removed=removed)
    assert difference(lora, plan, IDS) < ROUNDED
    small = llmprune.compact(lora, plan)
    expected = output(small, IDS)
    merged = small.merge_and_unload()
    assert torch.allclose(output(merged, IDS), expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(
        llmprune.errors.CheckpointError, match=r"has shape .* where the config says .*merge adapters"
    ):
        llmprune.save_pretrained(merged, tmp_path / "merged")  # its record went with the wrapper
    assert not (tmp_path / "merged").exists()
    up = merged.model.layers[0].mlp.up_proj
    assert (up.out_features, up.in_features) == tuple(up.weight.shape) == (55, 47)


def test_an_adapter_model_is_scored_and_pruned_by_default(lora: Any) -> None:
    report = llmprune.prune(lora.float(), ratio=0.1, calibration=torch.arange(3, 35).view(4, 8))
    assert {summary["kind"] for summary in report.plan.axes.values()} <= {"head", "ffn"}
    assert report.verification is not None


# What a module keeps of its weights


class Keeping(nn.Module):
    """Attention that keeps its bias table once it is spread out, and drops it when training begins (as LeViT does)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.qkv, self.out = nn.Linear(12, 3 * 3 * 4), nn.Linear(3 * 4, 12)
        self.biases = nn.Parameter(torch.randn(3, 7))
        self.kept: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> Keeping:
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if "bias" not in self.kept:
            place = torch.arange(x.shape[1])
            self.kept["bias"] = self.biases[:, (place[:, None] - place).abs()]
        weights = (q @ k.transpose(-2, -1) + self.kept["bias"]).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def test_what_a_module_has_computed_of_its_weights_and_kept_is_computed_anew() -> None:
    model = seeded(lambda: Around(Keeping(), 12)).float()
    before = model(**X)  # keeps a table that knows its gradient, and cannot be copied
    graph = llmprune.trace(model, X)
    axis = next(axis for axis in graph.axes if ("inner.biases", 0) in axis.places)
    assert axis.kind == "head"
    assert axis.prunable
    plan = llmprune.plan(graph, removed={axis.id: [1]})
    assert llmprune.verify(model, plan, X).relative_error < 1e-5
    assert torch.equal(model(**X), before)
    llmprune.compact(model, plan)
    assert tuple(model.inner.biases.shape) == (2, 7)
    assert model(**X).shape == before.shape
