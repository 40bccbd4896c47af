"""Verification: passes for right plans, fails for wrong ones, and leaves the model bit for bit as it was."""

from __future__ import annotations

import importlib
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from compact_plans import FFN, GROUPS, attribute, ids, keep, llama, llama_plan
from torch import nn

from llmprune.checkpoints.reload import _difference
from llmprune.compaction.masked_ops import kept_positions
from llmprune.compaction.verify import compared_outputs, verify
from llmprune.errors import InputError, VerificationError

FFN_CUT = {0: [1, 5, 18], 1: [0, 2, 3]}
HEAD_CUT = {0: [1], 1: [0]}


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long), "use_cache": False}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = state(model)
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_right_plan_passes_and_the_model_is_untouched(dtype: torch.dtype, attention: str) -> None:
    model = llama().to(dtype).train()
    model.set_attn_implementation(attention)
    before = state(model)
    result = verify(model, llama_plan(model, FFN_CUT, HEAD_CUT), batch())
    assert result.relative_error <= result.tolerance <= 1e-5
    assert result.scale > 0.1
    assert result.inputs == 2
    assert result.outputs == ("logits",)
    assert result.dtype == ("float64" if dtype is torch.float64 else "float32")
    assert unchanged(model, before)
    assert all(m.training for m in model.modules())
    assert not hasattr(model, "llmprune")
    assert not any(m._forward_hooks for m in model.modules())
    assert json.loads(json.dumps(result.to_json()))["inputs"] == 2
    assert "relative error" in str(result)


def wrong_plans() -> list[Any]:
    mlp, attention = "model.layers.0.mlp.", "model.layers.1.self_attn."
    swapped = {mlp + "down_proj.weight": {1: keep(FFN, [1, 5, 17])}}
    queries = {
        attention + "q_proj.weight": {0: keep(48, range(16))},
        attention + "o_proj.weight": {1: keep(48, range(8, 24))},
    }
    return [
        pytest.param(swapped, "model.layers.0.mlp", id="ffn-channel-of-another-index"),
        pytest.param(queries, "model.layers.1.self_attn", id="query-heads-of-another-group"),
    ]


@pytest.mark.parametrize(("wrong", "where"), wrong_plans())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_wrong_plan_fails_and_names_where(wrong: Any, where: str, dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    before = state(model)
    plan = llama_plan(model, FFN_CUT, HEAD_CUT)
    plan.kept.update(wrong)
    with pytest.raises(VerificationError, match=f"differs from its masked reference.*beginning in {where}"):
        verify(model, plan, batch())
    assert unchanged(model, before)


def test_a_plan_whose_sizes_do_not_fit_together_fails() -> None:
    model = llama()
    plan = llama_plan(model, FFN_CUT)
    del plan.kept["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(VerificationError, match="does not run"):
        verify(model, plan, batch())


def test_a_wrong_attribute_fails() -> None:
    model = llama()
    plan = llama_plan(model, heads=HEAD_CUT)
    plan.attributes = [
        attribute(f"model.layers.{i}.self_attn", "num_key_value_groups", 2, 4) for i in range(2)
    ]
    with pytest.raises(VerificationError):
        verify(model, plan, batch())


def test_a_plan_that_cuts_the_logits_fails() -> None:
    model = llama()
    plan = llama_plan(model)
    plan.kept = {"lm_head.weight": {0: keep(61, [3])}}
    with pytest.raises(VerificationError, match="cuts an output"):
        verify(model, plan, batch())


def test_nan_in_a_later_output_is_an_error() -> None:
    good = {"start_logits": torch.ones(2), "end_logits": torch.ones(2)}
    bad = {**good, "end_logits": torch.tensor([1.0, float("nan")])}
    assert compared_outputs(good, good)[0] == 0
    assert math.isnan(compared_outputs(good, bad)[0])
    assert math.isnan(_difference(good, bad))


def test_nan_weights_fail() -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(VerificationError, match="nan"):
        verify(model, llama_plan(model, FFN_CUT), batch())


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = llama()
    with pytest.raises(InputError, match="meta"):
        verify(model, llama_plan(model, FFN_CUT), batch())


def test_an_interrupted_or_failing_forward_restores_the_weights() -> None:
    model = llama()
    before = state(model)
    plan = llama_plan(model, FFN_CUT, HEAD_CUT)
    for error in (KeyboardInterrupt, RuntimeError):

        def stop(*_: Any, raised: type[BaseException] = error, **__: Any) -> None:
            raise raised

        model.model.layers[1].forward = stop
        with pytest.raises(error):
            verify(model, plan, batch())
        del model.model.layers[1].forward
        assert unchanged(model, before)


class Net(nn.Module):
    """Features -> ``norm`` over them -> logits: whatever ``norm`` divides by depends on how many there are."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(5, 12), norm, nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.norm(self.inner(x)))


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Spread(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.var(-1, keepdim=True) + torch.amax(x, -1, keepdim=True) + 9)


class Top(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, places = torch.topk(x.softmax(-1), 3, -1)
        return torch.zeros_like(x).scatter(-1, places, values)


class Grouped(nn.Module):
    """GroupNorm over 4 groups of 3 channels; torch's own wants (N, C, ...)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GroupNorm(4, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def mark(name: str, nth: int = 0, dim: int = 1, kept: Any = None, size: int = 12) -> SimpleNamespace:
    return SimpleNamespace(name=f"aten::{name}", nth=nth, arg=0, dim=dim, kept=kept, size=size, module="norm")


NORMS: list[Any] = [
    pytest.param(
        lambda: nn.LayerNorm(12), ["native_layer_norm"], {"norm.weight": 0, "norm.bias": 0}, id="layer-norm"
    ),
    pytest.param(Mean, ["mean"], {}, id="mean"),
    pytest.param(Spread, ["var", "amax"], {}, id="var-amax"),
    pytest.param(lambda: nn.Softmax(-1), ["_softmax"], {}, id="softmax"),
    pytest.param(lambda: nn.LogSoftmax(-1), ["_log_softmax"], {}, id="log-softmax"),
    pytest.param(Top, ["_softmax", "topk"], {}, id="topk"),
]
KEPT = keep(12, [0, 3, 7])


def net_plan(
    model: nn.Module, marks: list[Any], affine: dict[str, int], kept: np.ndarray = KEPT
) -> SimpleNamespace:
    plan = llama_plan(model)
    plan.kept = {"inner.weight": {0: kept}, "inner.bias": {0: kept}, "outer.weight": {1: kept}}
    plan.kept.update({name: {dim: kept} for name, dim in affine.items()})
    plan.marked = marks
    return plan


def net(norm: Any) -> Net:
    torch.manual_seed(0)
    model = Net(norm()).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    return model


@pytest.mark.parametrize(("norm", "names", "affine"), NORMS)
def test_normalising_operations_are_compared_over_the_kept_positions(
    norm: Any, names: list[str], affine: Any
) -> None:
    model = net(norm)
    plan = net_plan(model, [mark(name, kept=KEPT) for name in names], affine)
    if affine:
        plan.attributes = [attribute("norm", "normalized_shape", 12, 9, index=0)]
    x = torch.randn(3, 5, dtype=torch.float64)
    result = verify(model, plan, {"x": x})
    assert result.masked_ops == len(names)
    assert result.relative_error < 1e-12
    plan.marked = []
    with pytest.raises(VerificationError, match="differs"):
        verify(model, plan, {"x": x})


@pytest.mark.parametrize("removed", [[0, 4, 8, 11], [3, 4, 5]], ids=["one-of-each-group", "a-whole-group"])
def test_group_norm_over_the_kept_channels(removed: list[int]) -> None:
    kept = keep(12, removed)
    model = net(Grouped)
    plan = net_plan(
        model, [mark("native_group_norm", kept=kept)], {"norm.inner.weight": 0, "norm.inner.bias": 0}, kept
    )
    plan.attributes = [attribute("norm.inner", "num_channels", 12, len(kept))]
    if len(removed) == 3:
        plan.attributes.append(attribute("norm.inner", "num_groups", 4, 3))
    result = verify(model, plan, {"x": torch.randn(3, 5, dtype=torch.float64)})
    assert result.masked_ops == 1
    assert result.relative_error < 1e-12


def test_uneven_group_norm_has_no_reference() -> None:
    model = net(Grouped)
    kept = keep(12, [0, 1, 2, 5])
    plan = net_plan(model, [mark("native_group_norm", kept=keep(12, [0, 1, 5]))], {}, kept)
    plan.kept.update({"norm.inner.weight": {0: kept}, "norm.inner.bias": {0: kept}})
    with pytest.raises(VerificationError, match="different numbers"):
        verify(model, plan, {"x": torch.randn(3, 5, dtype=torch.float64)})


def test_rms_norm_of_torch() -> None:
    x = torch.randn(3, 12, dtype=torch.float64)
    weight = torch.randn(12, dtype=torch.float64)
    names: list[str] = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Names():
        nn.functional.rms_norm(x, (12,), weight)
    [name] = {n for n in names if "rms_norm" in n or n == "aten::mean"}
    with torch.no_grad(), kept_positions([mark(name.removeprefix("aten::"), kept=KEPT)]) as mode:
        got = nn.functional.rms_norm(x, (12,), weight)
    assert mode.done == 1
    expected = nn.functional.rms_norm(x[:, KEPT], (9,), weight[KEPT])
    torch.testing.assert_close(got[:, KEPT], expected)


@pytest.mark.parametrize("nth", [1, 7])
def test_a_marked_operation_that_does_not_run_fails(nth: int) -> None:
    model = net(Mean)
    plan = net_plan(model, [mark("mean", nth=nth, kept=KEPT)], {})
    with pytest.raises(VerificationError, match="did not run"):
        verify(model, plan, {"x": torch.randn(3, 5, dtype=torch.float64)})


def test_a_marked_operation_of_another_size_fails() -> None:
    model = net(Mean)
    plan = net_plan(model, [mark("mean", kept=KEPT, size=13)], {})
    with pytest.raises(VerificationError, match="13 positions"):
        verify(model, plan, {"x": torch.randn(3, 5, dtype=torch.float64)})


def test_an_operation_without_a_masked_form_says_so() -> None:
    model = net(Mean)
    plan = net_plan(model, [mark("rsqrt", kept=[0], size=1)], {})
    with pytest.raises(VerificationError, match="no masked form"):
        verify(model, plan, {"x": torch.randn(3, 5, dtype=torch.float64)})


def test_hidden_channels_of_a_llama_go_with_masked_means() -> None:
    model = llama().double()
    hidden = keep(24, [2, 9])
    plan = llama_plan(model)
    for name, p in model.named_parameters():
        dims = {"embed_tokens": 1, "lm_head": 1, "o_proj": 0, "down_proj": 0}
        dim = next((d for part, d in dims.items() if part in name), p.dim() - 1)
        plan.kept[name] = {dim: hidden}
    plan.marked = [mark("mean", nth=n, dim=2, kept=hidden, size=24) for n in range(5)]
    result = verify(model, plan, {"input_ids": ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)})
    assert (result.masked_ops, result.inputs) == (5, 2)
    plan.marked = plan.marked[:-1]
    with pytest.raises(VerificationError, match="differs"):
        verify(model, plan, {"input_ids": ids()})


def test_groups_and_ffn_of_a_small_batch_without_a_mask() -> None:
    model = llama()
    assert GROUPS == 3
    assert verify(model, llama_plan(model, FFN_CUT, HEAD_CUT), {"input_ids": ids()}).inputs == 1


@pytest.mark.parametrize(("unrest", "passes"), [(1e-5, True), (1e-6, False)])
def test_a_faint_difference_passes_only_if_the_model_makes_as_much_of_rounding(
    unrest: float, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("llmprune.compaction.verify")
    real = module.outputs_of

    def blurred(*args: Any) -> Any:
        return {name: t + 3e-5 * t.abs().max() for name, t in real(*args).items()}

    monkeypatch.setattr(module, "outputs_of", blurred)
    monkeypatch.setattr(
        module,
        "_reference",
        lambda model, plan, batch: (real(model, batch), SimpleNamespace(counts={}, done=0)),
    )
    monkeypatch.setattr(module, "_unrest", lambda *_: unrest)
    model = llama()
    if passes:
        found = verify(model, llama_plan(model, FFN_CUT, HEAD_CUT), batch())
        assert found.relative_error == pytest.approx(3e-5, rel=0.01)
        assert found.tolerance == pytest.approx(8e-5)
    else:
        with pytest.raises(VerificationError, match=r"relative error 3\.0e-05"):
            verify(model, llama_plan(model, FFN_CUT, HEAD_CUT), batch())


def test_how_far_outputs_move_by_rounding_is_measured_and_leaves_the_model_alone() -> None:
    module = importlib.import_module("llmprune.compaction.verify")
    model = llama()
    before, plan, inputs = state(model), llama_plan(model, FFN_CUT, HEAD_CUT), batch()
    with torch.no_grad():
        reference, _ = module._reference(model, plan, inputs)
        moved = module._unrest(model, plan, inputs, reference)
    assert 1e-9 < moved < 1e-5
    assert unchanged(model, before)
