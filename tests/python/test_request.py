"""RequestTime: shapes read off the tape against the framework's own count, the table's cache, and what is reported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from torch.utils.flop_counter import FlopCounterMode

import llmprune
from llmprune.errors import InputError, PlanError
from llmprune.machine.timing import Sample, Table
from llmprune.planning import request as module
from llmprune.planning.request import Request, RequestTime, fast_multiple, fitting, measure_request
from llmprune.reporting.report import render
from llmprune.tracing.inputs import example_inputs

CPU = torch.device("cpu")


class Counting(Table):
    """A table in which an operation takes a nanosecond for each multiply-accumulate, and nothing else takes any."""

    def __init__(self, block: int = 1) -> None:
        super().__init__(torch.float32, CPU, 1 << 20)
        self.block = block

    def time(self, name: str, sizes: Any) -> float:
        if name in ("pointwise", "view"):
            return 0.0
        if name == "attention":
            batch, heads, _, queries, keys, width, value = sizes
            return batch * heads * queries * keys * (width + value) * 1e-9
        if name == "gemm" and self.block > 1:  # whole blocks of channels
            sizes = [sizes[0], *(math.ceil(size / self.block) * self.block for size in sizes[1:])]
        return math.prod(sizes) * 1e-9

    def save(self) -> None:
        pass


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    table = Counting()
    monkeypatch.setattr(module, "table_of", lambda graph: table)
    return table


def counted(work: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "falcon", "opt", "bloom", "gpt_neox", "phi3"])
def test_a_requests_operations_are_those_of_the_model(family: str) -> None:
    """Every matrix product of the prompt and of the steps, at another batch and length than were recorded."""
    model = tiny_models.build(family)
    graph = llmprune.trace(model)
    kinds = [kind for kind in ("head", "ffn") if any(a.prunable and a.kind == kind for a in graph.axes)]
    scores = llmprune.score(model, graph, None, importance="l2")
    plan = llmprune.plan(graph, scores, ratio=dict.fromkeys(kinds, 0.4), protect_first=0, protect_last=0)
    counts = {axis: gone.shape[-1] for axis, gone in plan.removed.items()}
    context, batch, steps = 19, 3, 5

    def prompt() -> Any:
        return model(**example_inputs(model, batch, context), use_cache=steps > 0)

    def step() -> None:
        with torch.no_grad():
            cache = prompt().past_key_values
        cache.crop(-1)
        token = torch.full((batch, 1), 5)
        spent.append(counted(lambda: model(input_ids=token, past_key_values=cache)))

    for removed in ({}, counts):
        if removed:
            llmprune.compact(model, plan)
        alone = RequestTime(graph, kinds, context, batch, 0, table=Counting())
        if (
            family == "t5"
        ):  # its decoder reads two tokens fewer than its encoder here, so it has no one context
            assert alone(removed) > 0
            continue
        assert alone(removed) == counted(prompt)
        spent: list[int] = []
        step()
        whole = RequestTime(graph, kinds, context, batch, steps, table=Counting())
        assert whole(removed) - alone(removed) == steps * spent[0]


def test_fused_attention_counts_by_its_heads() -> None:
    fused, eager = (llmprune.trace(tiny_models.build("llama", form)) for form in ("sdpa", "eager"))
    head = next(axis.id for axis in eager.axes if axis.kind == "head")
    costs = [RequestTime(graph, ("head",), 19, 3, 4, table=Counting()) for graph in (fused, eager)]
    assert costs[0]({}) == costs[1]({})
    assert costs[0]({head: 1}) == costs[1]({head: 1}) < costs[0]({})


def test_blocks_take_their_share_along() -> None:
    model = tiny_models.build("llama", num_hidden_layers=4)
    graph = llmprune.trace(model)
    measured = Request(19, 1, 4, Sample(1.0, 0.0, 1.0, 9), Sample(0.5, 0.0, 0.5, 9))
    cost = RequestTime(graph, ("layer",), 19, 1, 4, measured, Counting())
    assert cost({}) == pytest.approx(3e9, rel=1e-6)
    half = cost({}, graph.layers[0].drops([0, 2]))
    assert 1.5e9 < half < 2.2e9  # half of the blocks' operations, and all of the rest


def test_what_the_table_overrates_is_scaled_down() -> None:
    graph = llmprune.trace(tiny_models.build("llama"))
    alone = RequestTime(graph, ("ffn",), 19, 1, 0, table=Counting())({}) / 1e9
    measured = Request(19, 1, 0, Sample(alone / 4, 0.0, alone / 4, 9), None)
    assert RequestTime(graph, ("ffn",), 19, 1, 0, measured, Counting())({}) == pytest.approx(
        alone / 4 * 1e9, abs=2
    )


@pytest.mark.parametrize("asked", ["0.8x", "0.6x"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_target_of_latency_is_kept(asked: str, allocation: str, counting: Counting) -> None:
    model = tiny_models.build("llama", num_hidden_layers=4)
    graph = llmprune.trace(model)
    scores = llmprune.score(model, graph, None, importance="l2")
    options: dict[str, Any] = {"protect_first": 0, "protect_last": 0, "allocation": allocation}
    plan = llmprune.plan(graph, scores, latency=asked, context=20, new_tokens=3, **options)
    told = plan.options["target"]
    counts = {axis: gone.shape[-1] for axis, gone in plan.removed.items()}
    assert told["reached"] * 1e9 == pytest.approx(RequestTime(graph, ("head", "ffn"), 20, 1, 3)(counts))
    assert (
        0.97 * told["limit"]
        < told["reached"]
        <= told["limit"]
        == pytest.approx(float(asked[:-1]) * told["before"], rel=1e-6)
    )
    assert llmprune.Plan.from_json(json.loads(json.dumps(plan.to_json()))).options["target"] == told
    fixed = llmprune.plan(
        graph, scores, latency=f"{told['limit'] * 1e3}ms", context=20, new_tokens=3, **options
    )
    assert fixed.removed.keys() == plan.removed.keys()
    with pytest.raises(PlanError, match=r"latency 0.01x cannot be reached: the nearest that can is .* ms of"):
        llmprune.plan(graph, scores, latency="0.01x", **options)


def test_auto_rounds_to_what_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama", num_hidden_layers=4, intermediate_size=160, hidden_size=96)
    graph = llmprune.trace(model)
    assert fast_multiple(graph, table=Counting()) == 1
    assert fast_multiple(graph, table=Counting(block=16)) == 16
    monkeypatch.setattr(module, "table_of", lambda graph: Counting(block=8))
    scores = llmprune.score(model, graph, None, importance="l2")
    plan = llmprune.plan(graph, scores, ratio=0.2, round_to="auto", protect_first=0, protect_last=0)
    assert plan.options["round_to"] == 8
    left = [s["size"] - s["removed"] for s in plan.axes.values() if s["kind"] == "ffn"]
    assert left
    assert all(size % 8 == 0 for size in left)
    with pytest.raises(InputError, match="at least 1 or 'auto'"):
        llmprune.plan(graph, scores, ratio=0.2, round_to="fast")
    headless = llmprune.trace(tiny_models.build("llama"))
    for axis in headless.axes:
        if axis.kind == "ffn":
            headless.freeze(axis.id, "for a test")
    with pytest.raises(InputError, match="no prunable one"):
        fast_multiple(headless, table=Counting())


def test_shapes_are_timed_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "kept"))
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("gemm", (4, 8, 16)),
        ("bmm", (2, 3, 4, 5)),
        ("attention", (1, 4, 2, 1, 9, 8, 6)),
        ("attention", (1, 4, 4, 9, 9, 8, 8)),
        ("pointwise", (64,)),
        ("view", ()),
    ]
    table = Table.load(torch.float32, CPU, 5 << 20)
    assert table.around == 4 << 20
    times = [table.time(*shape) for shape in shapes]
    assert min(times) > 0
    assert table.measured == len(shapes)
    table.save()
    again = Table.load(torch.float32, CPU, 5 << 20)
    assert [again.time(*shape) for shape in shapes] == times
    assert again.measured == 0
    other = Table.load(torch.bfloat16, CPU, 5 << 20)
    assert other.path != table.path
    assert other.seconds == {}
    table.path.write_text("{broken")
    assert Table.load(torch.float32, CPU, 5 << 20).seconds == {}
    assert "is not used" in caplog.text
    monkeypatch.setenv("LLMPRUNE_CACHE", str(table.path / "below"))  # a file is no folder
    lost = Table.load(torch.float32, CPU, 5 << 20)
    lost.time("view", ())
    lost.save()
    assert "could not be kept" in caplog.text
    with pytest.raises(InputError, match="no operation 'knead'"):
        table.time("knead", (1,))


def test_a_request_is_measured() -> None:
    model = tiny_models.build("llama")
    model.train()
    request = measure_request(model, 9, 2, 4, repeats=2)
    assert model.training
    assert request.prefill.repeats == 2
    assert request.decode is not None
    assert request.decode.repeats == 16
    assert request.seconds == request.prefill.busy + 4 * request.decode.busy > 0
    assert measure_request(tiny_models.build("bert"), 9, repeats=2).decode is None
    assert measure_request(tiny_models.build("whisper"), 9, repeats=2).decode is not None
    with pytest.raises(InputError, match="it has 64"):
        measure_request(model, 60)
    assert fitting(model.config, None) == 56
    assert fitting(None, None) == 128


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    readings = [SimpleNamespace(wall=wall, busy=wall / 2) for wall in (1.0, 2.0, 3.0, 4.0, 5.0)]
    sample = Sample.of(readings)  # type: ignore[arg-type]
    assert (sample.median, sample.spread, sample.busy, sample.repeats) == (3.0, pytest.approx(2 / 3), 0.5, 5)
    assert sample.noisy
    assert not Sample(1.0, 0.05, 1.0, 9).noisy


def test_prune_reports_the_prediction_beside_the_measurement(counting: Counting) -> None:
    model = tiny_models.build("llama", num_hidden_layers=4)
    report = llmprune.prune(
        model, latency="0.97x", importance="l2", context=12, new_tokens=2, kinds=("layer",), protect_first=0
    )
    assert report.target is not None
    assert report.latency is not None
    before, after = report.latency
    assert report.target["before"] == pytest.approx(before.seconds, rel=1e-6)
    assert report.target["reached"] <= report.target["limit"]
    data = report.to_json()["latency"]
    assert data["before"]["seconds"] == before.seconds
    assert data["after"]["decode"]["spread"] == after.decode.spread  # type: ignore[union-attr]
    text = render(report)
    assert f"foreseen {report.target['reached'] / report.target['before']:.3f}x, measured" in text
    assert "prompt of 12" in text
    quiet, loud = Sample(1.0, 0.01, 1.0, 9), Sample(1.0, 0.4, 1.0, 9)
    report.latency = (Request(12, 1, 2, quiet, quiet), Request(12, 1, 2, quiet, quiet))
    assert "noisy" not in render(report)
    report.latency = (Request(12, 1, 2, quiet, quiet), Request(12, 1, 2, quiet, loud))
    assert "the machine is noisy (times spread over 40% of their median)" in render(report)
