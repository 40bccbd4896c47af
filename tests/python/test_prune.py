"""The whole path in one call, on a model whose parts are all real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compact_plans import ids, llama, zeroed_logits
from folders import TEXT, tokenizer

import llmprune
from llmprune.errors import InputError, LlmpruneError, VerificationError
from llmprune.pipeline.prune import traced_tokens


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def unchanged(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("importance", ["element1", "l2", "random"])
def test_report_and_model_agree(importance: str) -> None:
    model = llama(num_hidden_layers=4).double()
    twin = llama(num_hidden_layers=4).double()
    report = llmprune.prune(
        model,
        tokenizer(),
        0.15,
        [TEXT * 10],
        importance,
        protect_first=0,
        protect_last=0,
        repair="none",
        quiet=True,
    )
    count = sum(p.numel() for p in model.parameters())
    assert report.after.parameters == count == report.plan.parameters_after
    assert report.before.parameters == sum(p.numel() for p in twin.parameters())
    assert report.after.bytes < report.before.bytes
    assert 0 < report.after.macs < report.before.macs
    assert abs(report.removed - 0.15) < 0.03
    assert report.verification is not None
    assert report.verification.relative_error < 1e-6
    assert [s.name for s in report.stages] == ["trace", "score", "plan", "verify", "compact"]
    assert (report.calibration_hash is None) == (importance != "element1")
    torch.testing.assert_close(
        model(ids()).logits, zeroed_logits(twin, report.plan, ids()), rtol=0, atol=1e-9
    )
    data = json.loads(json.dumps(report.to_json()))
    assert data["after"]["parameters"] == count
    assert data["ratio"] == {"asked": 0.15, "parameters": report.removed}
    text = str(report)
    for piece in ("parameters", "MACs per token", "peak memory", f"{count:,}", "relative error"):
        assert piece in text


def test_macs_of_a_llama_are_its_matrix_products() -> None:
    """Per token: every linear weight once, and queries with keys and weights with values over the traced length."""
    model = llama()
    graph = llmprune.trace(model)
    tokens = traced_tokens(graph)
    assert tokens is not None
    length = 7
    linear = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    attention = (
        2 * 6 * length * 2 * 8
    )  # layers x heads x keys x (queries with keys, weights with values) x width
    assert graph.macs({}) / tokens == linear + attention


def test_ratios_by_kind() -> None:
    model = llama(num_hidden_layers=3)
    report = llmprune.prune(
        model, ratio={"ffn": 0.2, "head": 0.34}, importance="l1", protect_first=0, protect_last=0, quiet=True
    )
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [16, 16, 16]
    assert [layer.self_attn.k_proj.out_features for layer in model.model.layers] == [16, 16, 16]
    assert "20% of ffn" in str(report)


def test_a_pruned_model_can_be_pruned_again() -> None:
    model = llama(num_hidden_layers=3)
    options: dict[str, Any] = {"importance": "l1", "protect_first": 0, "protect_last": 0, "quiet": True}
    first = llmprune.prune(model, ratio=0.1, **options)
    second = llmprune.prune(model, ratio=0.1, **options)
    assert second.before.parameters == first.after.parameters
    assert len(model.llmprune.history) == 2
    original = dict(llama(num_hidden_layers=3).named_parameters())
    for name, dims in model.llmprune.kept.items():
        expected = original[name].detach()
        for dim, kept in dims.items():
            expected = expected.index_select(dim, torch.as_tensor(kept))
        assert torch.equal(model.get_parameter(name), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repair": "ls"}, "repair 'ls' needs calibration"),
        ({"repair": "magic"}, "unknown repair"),
        ({"repair": "none", "repair_calibration": [1]}, "leave one of them out"),
        ({"ratio": 0}, "ratio"),
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"ratio": 0.99}, "reach"),
        ({"importance": "psychic"}, "importance"),
        ({"aggregation": "median"}, "aggregation"),
        ({"kinds": ("wheels",)}, "kind"),
        ({"allocation": "fair"}, "allocation"),
        ({"round_to": 0}, "round_to"),
        ({"importance": "element1", "calibration": None}, "calibration"),
        ({"importance": "element1", "calibration": torch.full((2, 8), 99)}, "99"),
        ({"importance": "element1", "calibration": [""]}, "0 tokens"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(options: dict[str, Any], message: str) -> None:
    model = llama()
    before = state(model)
    arguments: dict[str, Any] = {
        "importance": "l2",
        "protect_first": 0,
        "protect_last": 0,
        "quiet": True,
        **options,
    }
    with pytest.raises(LlmpruneError, match=message):
        llmprune.prune(model, tokenizer(), **arguments)
    assert unchanged(model, before)
    assert not hasattr(model, "llmprune")


def test_an_output_that_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    model = llama()
    with pytest.raises(InputError, match="exists"):
        llmprune.prune(model, importance="l1", output=tmp_path, quiet=True)
    assert (tmp_path / "precious").read_text() == "x"
    assert not hasattr(model, "llmprune")


def test_a_plan_that_fails_verification_is_not_applied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import importlib

    planning = importlib.import_module("llmprune.planning.plan")
    real = planning.plan

    def wrong(*args: Any, **kwargs: Any) -> Any:
        plan = real(*args, **kwargs)
        name = next(n for n in plan.kept if "down_proj" in n)
        plan.kept[name] = {1: (plan.kept[name][1][::-1] * -1 + 19).copy()}
        return plan

    monkeypatch.setattr(planning, "plan", wrong)
    model = llama()
    before = state(model)
    with pytest.raises(VerificationError, match="must not be applied"):
        llmprune.prune(
            model,
            ratio=0.1,
            importance="l1",
            protect_first=0,
            protect_last=0,
            output=tmp_path / "out",
            quiet=True,
        )
    assert unchanged(model, before)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["trace", "score", "plan", "verify"])
def test_an_interrupt_in_a_stage_leaves_the_model_as_it_was(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C somewhere inside the stage: in the model's own forward pass where it runs, else as it begins."""
    from llmprune.pipeline.stages import Stages

    class Interrupting(Stages):
        def stage(self, name: str, doing: str = "") -> Any:
            if name == stage:
                active.append(name)
            return super().stage(name, doing)

    active: list[str] = []
    model = llama()
    before = state(model)

    def interrupt(*_: Any) -> None:
        if active:
            raise KeyboardInterrupt

    if stage == "plan":
        import importlib

        planning = importlib.import_module("llmprune.planning.selection")
        real = planning.close
        monkeypatch.setattr(planning, "close", lambda *args: interrupt() or real(*args))
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: interrupt() or own(x)
    with pytest.raises(KeyboardInterrupt):
        llmprune.prune(
            model,
            tokenizer(),
            0.1,
            [TEXT * 10],
            protect_first=0,
            protect_last=0,
            quiet=True,
            stages=Interrupting(),
        )
    del mlp.forward
    assert unchanged(model, before)
    assert not hasattr(model, "llmprune")
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
