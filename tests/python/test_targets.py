"""Targets in place of a ratio: what they count, that they are kept, and what is said where they cannot be."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import llmprune
from llmprune.errors import InputError, PlanError
from llmprune.pipeline.prune import model_bytes, traced_tokens
from llmprune.planning.footprint import Memory
from llmprune.planning.targets import target_of
from llmprune.tracing.graph import Graph
from llmprune.tracing.inputs import example_inputs
from llmprune.tracing.recording import cached_tensors

CACHING = ("llama", "qwen3", "gpt2", "falcon", "bloom", "gpt_neox", "mamba", "t5", "whisper")
COUNTED = ("llama", "qwen3", "phi3", "gpt2", "falcon", "opt", "bert", "t5", "vit", "convnext", "whisper")


def pruned(model: nn.Module, graph: Graph, share: float = 0.4) -> tuple[nn.Module, dict[int, int]]:
    """The model without some groups of every kind it has among heads and FFN channels, and the counts by axis."""
    kinds = [kind for kind in ("head", "ffn") if any(a.prunable and a.kind == kind for a in graph.axes)]
    scores = llmprune.score(model, graph, None, importance="l2")
    plan = llmprune.plan(graph, scores, ratio=dict.fromkeys(kinds, share), protect_first=0, protect_last=0)
    assert plan.removed
    llmprune.compact(model, plan)
    return model, {axis: gone.shape[-1] for axis, gone in plan.removed.items()}


def kept_cache(model: nn.Module, context: int, batch: int) -> int:
    """Bytes of the cache after a real forward pass."""
    inputs = example_inputs(model, batch, context)
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :1].repeat(1, context)
    with torch.no_grad():
        result = model(**inputs, use_cache=True)
    tensors = [pair[0] for value in result.values() for pair in cached_tensors(value)]
    assert tensors
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("family", COUNTED)
def test_macs_are_those_of_the_frameworks_counter(family: str) -> None:
    model = tiny_models.build(family)  # eager: the counter does not know the CPU's fused attention

    def counted() -> int:
        arguments = inspect.signature(model.forward).parameters
        off = {"use_cache": False} if "use_cache" in arguments else {}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**example_inputs(model), **off)
        return counter.get_total_flops() // 2

    graph = llmprune.trace(model)
    assert graph.macs({}) == counted() > 0
    _, counts = pruned(model, graph)
    assert graph.macs(counts) == counted()


def test_fused_attention_counts_as_much_as_the_eager_one() -> None:
    eager, fused = (llmprune.trace(tiny_models.build("llama", form)) for form in ("eager", "sdpa"))
    head = next(axis.id for axis in eager.axes if axis.kind == "head")
    assert fused.axes[head].kind == "head"
    assert fused.macs({head: 1}) == eager.macs({head: 1}) < eager.macs({})


@pytest.mark.parametrize("family", CACHING)
def test_memory_is_what_weights_buffers_and_cache_take(family: str) -> None:
    model = tiny_models.build(family)
    model.get_output_embeddings().to(torch.bfloat16) if family == "gpt_neox" else None  # two types of weights
    graph = llmprune.trace(model, cache=True)
    graph = Graph.from_json(json.loads(json.dumps(graph.to_json())))
    memory = Memory(graph, context=20, batch=3)
    mixed = family == "gpt_neox"
    assert Memory(graph)({}) == model_bytes(model)
    if not mixed:
        assert memory.cache({}) == kept_cache(model, 20, 3)
    _, counts = pruned(model, graph)
    assert Memory(graph)(counts) == model_bytes(model)
    if not mixed:
        assert memory.cache(counts) == kept_cache(model, 20, 3)
        assert memory(counts) == model_bytes(model) + kept_cache(model, 20, 3)


def test_a_window_bounds_the_cache() -> None:
    config = transformers.MistralConfig(**tiny_models.TEXT, sliding_window=16)
    model = transformers.MistralForCausalLM(config).eval()
    graph = llmprune.trace(model, cache=True)
    assert Memory(graph, 5, 1).cache({}) == kept_cache(model, 5, 1)
    # It holds window - 1 tokens between two steps, and all of the window during one.
    assert Memory(graph, 40, 1).cache({}) * 15 == kept_cache(model, 40, 1) * 16


def test_blocks_take_their_cache_along() -> None:
    model = tiny_models.build("llama", num_hidden_layers=4)
    graph = llmprune.trace(model, cache=True)
    memory = Memory(graph, 30, 2)
    drops = graph.layers[0].drops([1, 2])
    assert memory.cache({}, tuple(p for drop in drops for p in drop.prefixes)) * 2 == memory.cache({})


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"params": "0.8x"}, {}),
        ({"params": 15_000}, {"allocation": "global"}),
        ({"macs": "0.75x"}, {}),
        ({"macs": "0.8x"}, {"kinds": ("ffn",), "round_to": 4}),
        ({"memory": "0.8x"}, {"kinds": ("head", "ffn", "query")}),
        ({"memory": "0.7x", "context": 40, "batch": 4}, {"allocation": "global"}),
        ({"memory": "0.6x", "context": 40}, {"kinds": ("layer", "ffn")}),
        ({"params": "0.6x"}, {"kinds": ("layer",)}),
    ],
)
def test_a_target_is_kept_and_not_by_much(asked: dict[str, Any], options: dict[str, Any]) -> None:
    model = tiny_models.build("llama", num_hidden_layers=4, vocab_size=31)
    graph = llmprune.trace(model, cache=True)
    kinds: Sequence[str] = options.get("kinds", ("head", "ffn"))
    scores = llmprune.score(model, graph, None, importance="l2", kinds=kinds)
    plan = llmprune.plan(graph, scores, **asked, **options, protect_first=0, protect_last=0)
    told = plan.options["target"]
    kind = told["kind"]
    counts = {axis: gone.shape[-1] for axis, gone in plan.removed.items() if axis < len(graph.axes)}
    if kind == "params":
        cost: Any = graph.numel
    elif kind == "macs":
        cost = graph.macs
    else:
        cost = Memory(graph, asked.get("context", 0), asked.get("batch", 1))
    tokens = traced_tokens(graph) or 1
    per = tokens if kind == "macs" else 1
    reached = cost(counts, plan.layers)
    assert told["reached"] == reached / per <= told["limit"]
    # The dearest single step bounds what a plan may keep below its limit.
    steps = [
        cost({}, []) - cost({a.id: options.get("round_to", 1)}, []) for a in graph.axes if a.kind in kinds
    ]
    steps += [cost({}, []) - cost({}, graph.layers[0].drops([0])) for _ in range("layer" in kinds)]
    assert told["limit"] * per - reached <= max(steps)
    assert llmprune.Plan.from_json(json.loads(json.dumps(plan.to_json()))).options["target"] == told
    llmprune.verify(model, plan)
    llmprune.compact(model, plan)
    if kind == "params":
        assert sum(p.numel() for p in model.parameters()) == told["reached"]
    elif kind == "memory":
        cache = kept_cache(model, 40, asked.get("batch", 1)) if "context" in asked else 0
        assert model_bytes(model) + cache == told["reached"]


@pytest.mark.parametrize(
    ("asked", "options", "text"),
    [
        ({"params": "0.1x"}, {}, "what cannot be pruned binds"),
        (
            {"params": "0.62x"},
            {"protect_first": 3},
            r"what binds is protect_first and protect_last \(down to",
        ),
        ({"macs": "0.6x"}, {"scope": "layers.0"}, r"what binds is scope \(down to"),
        (
            {"params": "0.67x"},
            {"kinds": ("ffn",), "round_to": 40},
            r"what binds is round_to \(down to",
        ),
        ({"memory": 60_000, "context": 500}, {}, r"of it the cache of 1 x 500 tokens"),
        ({"params": 10**9}, {}, "nothing has to go for params 1000000000"),
    ],
)
def test_what_binds_is_said(asked: dict[str, Any], options: dict[str, Any], text: str) -> None:
    model = tiny_models.build("llama", num_hidden_layers=4, vocab_size=31)
    graph = llmprune.trace(model, cache=True)
    scores = llmprune.score(model, graph, None, importance="l2")
    with pytest.raises(PlanError, match=text):
        llmprune.plan(graph, scores, **asked, **{"protect_first": 0, "protect_last": 0, **options})


def test_the_nearest_that_is_said_can_be_reached() -> None:
    model = tiny_models.build("llama", num_hidden_layers=4, vocab_size=31)
    graph = llmprune.trace(model)
    scores = llmprune.score(model, graph, None, importance="l2")
    with pytest.raises(PlanError) as refused:
        llmprune.plan(graph, scores, params="0.1x", protect_first=1, protect_last=0)
    nearest = str(refused.value).split("the nearest that can is ")[1].split(" of ")[0].replace(" ", "")
    plan = llmprune.plan(graph, scores, params=nearest, protect_first=1, protect_last=0)
    assert plan.parameters_after <= float(nearest[:-1]) * 1e3


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"params": "many"}, "params is a number like 5.4B or 0.8x"),
        ({"params": "5MB"}, "suffixes: k, m, b, g, t, x"),
        ({"memory": "10Gbit"}, "memory is a number like 10GB"),
        ({"memory": -4}, "memory is a number"),
        ({"macs": "1.2x"}, "between 0x and 1x"),
        ({"macs": 0}, "macs must be at least 1"),
        ({"params": 5, "macs": 5}, "params and macs are given: give one target"),
        ({"params": 5, "batch": 2}, "batch counts for a target of memory or latency only"),
        ({"memory": 5, "context": 1.5}, "context must be an integer"),
    ],
)
def test_targets_that_are_none(asked: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        target_of(**asked)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("params", "5.4B", 5.4e9),
        ("params", 1000, 1000),
        ("macs", "3.2 g", 3.2e9),
        ("memory", "10GB", 10e9),
        ("memory", "10GiB", 10 * 2**30),
        ("memory", "1e3", 1000),
        ("memory", "512B", 512),
    ],
)
def test_numbers_with_suffixes(kind: str, text: Any, value: float) -> None:
    target = target_of(**{kind: text})
    assert target is not None
    assert (target.kind, target.value, target.relative) == (kind, pytest.approx(value), False)


def test_a_context_needs_the_cache_on_record() -> None:
    model = tiny_models.build("llama")
    graph = llmprune.trace(model)
    scores = llmprune.score(model, graph, None, importance="l2")
    with pytest.raises(InputError, match="trace\\(model, cache=True\\)"):
        llmprune.plan(graph, scores, memory="0.9x", context=10)


def test_prune_takes_one_of_ratio_and_target() -> None:
    model = tiny_models.build("llama", num_hidden_layers=4)
    before = model_bytes(model)
    with pytest.raises(InputError, match="a ratio and memory are given"):
        llmprune.prune(model, ratio=0.2, memory="0.9x", importance="l2")
    report = llmprune.prune(model, memory="0.9x", importance="l2", protect_first=0, context=30)
    assert report.ratio is None
    assert report.target is not None
    assert report.target["reached"] == model_bytes(model) + kept_cache(model, 30, 1) <= report.target["limit"]
    assert report.target["before"] > before
    assert "size with cache" in str(report)
    assert "memory 0.9x asked" in str(report)
    assert report.to_json()["target"] == report.target
