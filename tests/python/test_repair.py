"""Least-squares repair: the fit itself, which weights it finds, and that it never makes held-out text worse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from torch import nn

import llmprune
from llmprune.compaction.recheck import recheck
from llmprune.errors import InputError, PlanError
from llmprune.repair.consumers import Taps, Use
from llmprune.repair.least_squares import fit
from llmprune.repair.repair import repair
from llmprune.scoring.calibration import Batch, load_calibration
from llmprune.scoring.sampling import long_calibration

DEMO = Path(__file__).parents[2] / "demo"


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ids(samples: int, length: int = 12, seed: int = 0) -> Batch:
    return load_calibration(
        torch.randint(3, 90, (samples, length), generator=torch.Generator().manual_seed(seed))
    )


def plan_for(model: nn.Module, kinds: tuple[str, ...] = ("head", "ffn"), inputs: Any = None) -> Any:
    """A plan that removes a random third of some kinds, never only the last indices."""
    graph = llmprune.trace(model, inputs)
    scores = llmprune.score(model, graph, importance="random")
    return llmprune.plan(graph, scores, ratio=dict.fromkeys(kinds, 0.34), protect_first=0, protect_last=0)


# --- the fit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [200, 25], ids=["more tokens than inputs", "fewer"])
def test_the_change_is_the_ridge_solution(tokens: int) -> None:
    x, removed = rows(tokens, 30, 0), rows(tokens, 7, 1)
    x[:, :7] += removed  # so that there is something to take over
    r, held = removed @ rows(7, 5, 2), 5
    found = fit(x, r, held, ridges=(0.1,))
    learn, missing = x[:-held], r[:-held]
    ridge = 0.1 * learn.square().sum() / 30
    want = torch.linalg.solve(
        learn.t() @ learn + ridge * torch.eye(30, dtype=torch.float64), learn.t() @ missing
    )
    assert found.change is not None
    torch.testing.assert_close(found.change, want)
    assert found.after == pytest.approx(float((r[-held:] - x[-held:] @ want).square().sum()))
    assert found.after < found.before == pytest.approx(float(r[-held:].square().sum()))


def test_what_cannot_be_learned_is_left_alone() -> None:
    assert fit(rows(40, 60, 0), rows(40, 3, 1), 20).change is None  # noise does not carry over to other rows


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_dead_or_broken_inputs_are_left_alone(value: float) -> None:
    found = fit(torch.full((20, 4), value), torch.ones(20, 2), 4)
    assert (found.change, found.ridge) == (None, None)


def test_a_singular_gram_matrix_is_no_obstacle() -> None:
    x = rows(50, 3, 0)
    twice = torch.cat([x, x, torch.zeros(50, 2, dtype=torch.float64)], 1)
    found = fit(twice, x @ rows(3, 4, 1), 10)
    assert found.change is not None
    assert bool(torch.isfinite(found.change).all())
    assert found.after < 0.01 * found.before


# --- which weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "endings"),
    [
        ("llama", {"o_proj.weight", "down_proj.weight"}),
        ("phi3", {"o_proj.weight", "down_proj.weight"}),
        ("gpt2", {"c_proj.weight"}),
        ("opt", {"out_proj.weight", "fc2.weight"}),
        ("gpt_neox", {"dense.weight", "dense_4h_to_h.weight"}),
        ("mixtral", {"o_proj.weight", "experts.down_proj"}),
    ],
)
def test_consumers_are_found_by_what_they_contract(family: str, endings: set[str]) -> None:
    model = build(family)
    found = repair(model, plan_for(model), ids(16))
    names = {name.partition("[")[0] for name in found.ridges}
    assert {end for end in endings if any(name.endswith(end) for name in names)} == endings
    assert all(name.endswith(tuple(endings)) for name in names)
    if family == "mixtral":  # five experts in each of two layers, as far as a token reached them
        assert 6 <= sum("experts" in name for name in found.ridges) <= 10


def test_convolutions_are_consumers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv1d(3, 12, 3, padding=1)
            self.second = nn.Conv1d(12, 5, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu())

    torch.manual_seed(0)
    model, x = Net(), torch.randn(40, 3, 9)
    graph = llmprune.trace(model, {"x": x[:2]})
    (axis,) = (axis for axis in graph.axes if axis.prunable)
    plan = llmprune.plan(graph, removed={axis.id: [0, 4, 7]})
    found = repair(model, plan, load_calibration({"x": x}))
    assert found.ridges.keys() == {"second.weight"}
    assert found.kept
    before, after = (llmprune.compact(copy.deepcopy(model), plan, w) for w in (None, found.weights))
    fresh = torch.randn(64, 3, 9)
    with torch.no_grad():
        want = model(fresh)
        assert (after(fresh) - want).square().sum() < 0.8 * (before(fresh) - want).square().sum()


def test_products_by_other_tensors_are_not_seen() -> None:
    seen: list[Use] = []
    weight, other = torch.randn(4, 6), torch.randn(4, 6)
    with Taps({"w": weight}, {"w": {1}}, lambda use, x, y: seen.append(use)):
        torch.randn(3, 6) @ weight.t()
        torch.randn(3, 6) @ other.t()
        torch.randn(3, 4) @ weight  # contracts dimension 0
        torch.randn(3, 6) @ weight[1:3].t()
    assert seen == [Use("w", 1, 0, None, 0, 4), Use("w", 1, 0, None, 1, 2)]


# --- what becomes of it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["sequential", "one-shot"])
def test_the_model_stays_as_it_was(order: str) -> None:
    model = build("llama").train()
    before = copy.deepcopy(model.state_dict())
    repair(model, plan_for(model), ids(8), order=order)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("seed", range(4))
def test_too_few_tokens_never_make_held_out_text_worse(seed: int) -> None:
    model = build("llama")
    plan, batch = plan_for(model), ids(2, 4, seed)
    found = repair(model, plan, batch)
    judged = batch.take(1, 2).inputs["input_ids"]

    def loss(weights: Any) -> float:
        small = llmprune.compact(copy.deepcopy(model), plan, weights)
        with torch.no_grad():
            return float(small(input_ids=judged, labels=judged).loss)

    assert loss(found.weights) <= loss(None)
    assert found.kept == bool(found.weights)


def test_the_demo_model_keeps_more_of_what_it_knew() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmprune.evaluation.perplexity import perplexity

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    text = (DEMO / "eval.txt").read_text(encoding="utf-8")[:20000]
    figures = {}
    for way in ("none", "auto"):
        model = AutoModelForCausalLM.from_pretrained(DEMO / "model")
        report = llmprune.prune(
            model, tokenizer, 0.2, DEMO / "calibration.txt", repair=way, verify=True, quiet=True
        )
        assert (report.repair is None) == (way == "none")
        assert report.verification is not None
        figures[way] = perplexity(model, tokenizer, text)
    assert report.repair is not None
    assert report.repair.loss is not None
    assert report.repair.loss[1] < report.repair.loss[0]
    assert model.llmprune.repaired == set(report.repair.weights)
    assert figures["auto"] < figures["none"]


def test_verification_and_compaction_take_the_new_weights() -> None:
    model = build("llama").double()
    plan = plan_for(model)
    found = repair(model, plan, ids(64))
    assert found.kept
    before = copy.deepcopy(model.state_dict())
    assert llmprune.verify(model, plan, weights=found.weights).relative_error < 1e-9
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    llmprune.compact(model, plan, found.weights)
    for name, values in found.weights.items():
        assert torch.equal(model.get_parameter(name), values)
        assert model.get_parameter(name).data_ptr() != values.data_ptr()
    wrong = {name: values[:1] for name, values in found.weights.items()}
    with pytest.raises(PlanError, match="but the plan leaves"):
        llmprune.compact(build("llama").double(), plan, wrong)
    with pytest.raises(PlanError, match="does not have"):
        llmprune.compact(build("llama").double(), plan, {"model.nothing.weight": torch.ones(48)})


def test_a_repair_beside_dropped_layers_is_checked_against_the_original(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    original, model = (AutoModelForCausalLM.from_pretrained(DEMO / "model") for _ in range(2))
    report = llmprune.prune(
        model,
        tokenizer,
        {"layer": 0.2, "ffn": 0.3},
        DEMO / "calibration.txt",
        protect_first=1,
        protect_last=1,
        output=tmp_path / "out",
        quiet=True,
    )
    assert report.repair is not None
    assert report.repair.kept
    numbers = {int(name.split(".")[2]) for name in model.llmprune.repaired}
    assert numbers < set(
        model.llmprune.layers["model.layers"]
    )  # the original's numbers, of layers that are left
    again = llmprune.from_pretrained(tmp_path / "out")
    for pruned in (model, again):
        found = recheck(pruned, original).verification
        assert found is not None
        assert found.relative_error < 1e-5


def test_bad_input() -> None:
    model = build("llama")
    plan = plan_for(model)
    with pytest.raises(InputError, match="unknown order"):
        repair(model, plan, ids(4), order="backwards")
    with pytest.raises(InputError, match="at least two"):
        repair(model, plan, ids(1))


def test_short_texts_give_fewer_samples() -> None:
    model = build("gpt2")
    batch = long_calibration(model, ["a" * 700], lambda text: {"input_ids": [5] * len(text)})
    assert (batch.samples, batch.tokens) == (10, 640)  # of the 64 positions that the model has


# --- biases, and what else changes ------------------------------------------------------------------------------------


def test_a_bias_is_fitted_with_the_weights() -> None:
    x, removed = rows(300, 12, 0), rows(300, 4, 1)
    removed[:, 0] += x[:, 0] + 3  # a mean of its own
    r, held = removed @ rows(4, 5, 2), 60
    found = fit(x, r, held, ridges=(1e-6,), bias=True)
    ones = torch.cat([x, torch.ones(300, 1, dtype=torch.float64)], 1)
    want = torch.linalg.lstsq(ones[:-held], r[:-held]).solution
    assert found.change is not None
    assert found.shift is not None
    torch.testing.assert_close(found.change, want[:-1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.shift, want[-1], rtol=1e-3, atol=1e-4)
    assert found.after < fit(x, r, held, ridges=(1e-6,)).after


def test_a_mean_alone_goes_into_the_bias() -> None:
    r = torch.ones(40, 3, dtype=torch.float64) * 2
    for x in (torch.zeros(40, 4, dtype=torch.float64), rows(40, 60, 0)):  # dead inputs; noise
        found = fit(x, r + 0.1 * rows(40, 3, 1), 10, bias=True)
        assert found.change is None
        assert found.shift is not None
        torch.testing.assert_close(found.shift, torch.full((3,), 2.0, dtype=torch.float64), atol=0.1, rtol=0)
    assert fit(rows(40, 60, 0), rows(40, 3, 1) * torch.linspace(-1, 1, 40)[:, None], 10, bias=True).after <= (
        fit(rows(40, 60, 0), rows(40, 3, 1) * torch.linspace(-1, 1, 40)[:, None], 10).before
    )


def test_biases_of_consumers_are_repaired_saved_and_checked(tmp_path: Path) -> None:
    model = build("opt")
    with torch.no_grad():  # channels that always fire: their mean is what can be had
        for layer in model.model.decoder.layers:
            layer.fc1.bias.add_(2)
    plan = plan_for(model, ("ffn",))
    found = repair(model, plan, ids(48), judged=False)
    assert found.biases
    assert all(name.endswith("fc2.bias") or name in found.weights for name in found.biases)
    assert all(name not in plan.kept for name in found.biases if name.endswith("fc2.bias"))
    original = copy.deepcopy(model)
    assert llmprune.verify(model, plan, weights=found.weights).relative_error < 1e-5
    llmprune.compact(model, plan, found.weights)
    for name in found.biases:
        assert torch.equal(model.get_parameter(name), found.weights[name])
        assert not torch.equal(model.get_parameter(name)[:3], original.get_parameter(name)[:3])
    llmprune.save_pretrained(model, tmp_path / "out")
    checked = recheck(llmprune.from_pretrained(tmp_path / "out"), original).verification
    assert checked is not None
    assert checked.relative_error < 1e-5


def test_weights_whose_inputs_changed_are_adjusted_and_tied_ones_never() -> None:
    model = build("llama")
    model.tie_weights()
    found = repair(model, plan_for(model), ids(64), judged=False)
    assert found.adjusted
    assert not any("embed" in name or "lm_head" in name for name in found.adjusted)
    assert not any(".layers.0.self_attn" in name for name in found.adjusted)  # nothing has changed before it
    assert repair(model, plan_for(model), ids(64), order="one-shot").adjusted == []


def test_few_tokens_are_named_with_how_many_would_do(caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")
    found = repair(model, plan_for(model), ids(4))
    assert found.warning is not None
    assert f"{found.tokens:,} tokens" in found.warning
    assert f"{10 * found.width:,} tokens would do better" in found.warning
    assert found.warning in caplog.text
    assert repair(model, plan_for(model), ids(80)).warning is None


def test_dead_channels_and_copies_of_channels_do_no_harm() -> None:
    model = build("llama")
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        mlp.gate_proj.weight[:8] = 0
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight[8:16] = weight[16:24]
    found = repair(model, plan_for(model), ids(64))
    assert all(bool(torch.isfinite(values).all()) for values in found.weights.values())
    assert found.loss is not None
    assert found.kept == (found.loss[1] < found.loss[0])
