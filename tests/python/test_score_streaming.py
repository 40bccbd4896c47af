"""How scores come about: which path a parameter takes, what is held in memory, and that no schedule changes them."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from scoring import VOCABULARY, ids_of, model_of, whole_graph, worst
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llmprune.scoring import loss, recompute, reduction, streaming
from llmprune.scoring.score import score

DERIVED = ("vector", "element1", "element2")


@functools.cache
def reference(name: str, importance: str):
    model = model_of(name)
    graph = whole_graph(model)
    return model, graph, score(model, graph, ids_of(), importance=importance)


SCHEDULES = {
    "batches": {"batch_size": 2, "checkpointing": False},
    "checkpoints": {"checkpointing": True},
    "checkpoints in parts": {"batch_size": 2},
    "checkpoints one by one": {"batch_size": 1, "checkpointing": True},
}


@pytest.mark.parametrize(
    ("fuse", "store"),
    [(streaming.FUSE_BYTES, streaming.STORE_TOKENS), (0, 10)],
    ids=["whole logits, stored", "fused loss, folded"],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "gpt2", "mixtral"])
def test_no_schedule_changes_the_scores(monkeypatch, name, schedule, fuse, store):
    monkeypatch.setattr(streaming, "STORE_TOKENS", store)
    monkeypatch.setattr(streaming, "FUSE_BYTES", fuse)
    monkeypatch.setattr(loss, "SLICE_BYTES", 1)
    monkeypatch.setattr(loss, "SLICE_ROWS", 9)
    for importance in DERIVED:
        model, graph, want = reference(name, importance)
        got = score(model, graph, ids_of(), importance=importance, **SCHEDULES[schedule])
        assert worst(got, want) < 1e-6, importance


def counted(monkeypatch, owner, name):
    calls = []
    original = getattr(owner, name)

    def count(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, count)
    return calls


def test_the_schedules_do_what_they_say(monkeypatch):
    model, graph, _ = reference("llama_gqa", "element2")
    folds = counted(monkeypatch, reduction.Reducer, "_fold")
    slices = counted(monkeypatch, reduction.Reducer, "row_slice")
    blocks = counted(monkeypatch, recompute, "run_part")
    score(model, graph, ids_of(), importance="element2")
    assert folds == slices == blocks == []
    monkeypatch.setattr(streaming, "FUSE_BYTES", 0)
    monkeypatch.setattr(streaming, "STORE_TOKENS", 10)
    monkeypatch.setattr(loss, "SLICE_ROWS", 9)
    monkeypatch.setattr(loss, "SLICE_BYTES", 1)
    score(model, graph, ids_of(samples=5), importance="element2", batch_size=2)
    assert len(blocks) == 2 * 3  # two blocks, three parts
    assert len(folds) == 2 * 7 * 3  # seven matrices in each; the embedding comes whole
    assert len(slices) == -(-VOCABULARY // 9)


def routes(caplog, model, graph, importance, **options):
    with caplog.at_level(logging.INFO, logger="llmprune.scoring.streaming"):
        caplog.clear()
        score(model, graph, ids_of(), importance=importance, **options)
    (line,) = [r for r in caplog.records if "parameters streamed" in r.message]
    return line.args


@pytest.mark.parametrize(
    ("name", "streamed", "copied", "general"),
    [
        ("llama_mha", 16, 5, 0),
        ("llama_tied", 15, 5, 0),
        ("qwen2", 16, 11, 0),
        ("gemma2", 15, 9, 0),  # norms scale by 1 + weight
        ("gpt2", 10, 18, 0),
        ("opt", 14, 22, 0),
        ("mixtral", 12, 5, 4),  # experts' 3-D weights
    ],
)
def test_second_order_needs_one_pass_wherever_it_can(caplog, name, streamed, copied, general):
    model = model_of(name)
    assert routes(caplog, model, whole_graph(model), "element2")[:4] == (streamed, copied, general, 2)


class Shapes(TorchDispatchMode):
    """Notes the shape of every new memory."""

    def __init__(self, model):
        super().__init__()
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.own:
                self.seen.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("importance", DERIVED)
@pytest.mark.parametrize("name", ["llama_mha", "llama_tied", "gpt2"])
def test_no_gradient_of_a_matrix_is_ever_formed(monkeypatch, name, importance, checkpointing):
    monkeypatch.setattr(streaming, "_SKETCH_TOKENS", 5)  # ten rows: no matrix has so many
    model = model_of(name)
    graph = whole_graph(model)
    ids = ids_of(samples=3, length=11) % 20 + 3  # at most 20 rows looked up: no matrix has so few
    with Shapes(model) as shapes:
        score(model, graph, ids, importance=importance, checkpointing=checkpointing)
    matrices = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
    transposed = {shape[::-1] for shape in matrices}
    assert shapes.seen
    assert not shapes.seen & (matrices | transposed)


def test_naive_scoring_would_have_failed_that():
    model = model_of("llama_mha")
    with Shapes(model) as shapes:
        model(input_ids=ids_of(), labels=ids_of(), use_cache=False).loss.backward()
    assert {tuple(p.shape) for p in model.parameters()} <= shapes.seen


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.bend = nn.Parameter(torch.ones(12, 12))

    def forward(self, x):
        return x + torch.tanh(self.inner(x) @ self.bend)


class Oddities(nn.Module):
    """A causal model that uses parameters in ways a language model seldom does."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12, padding_idx=3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.shared = nn.Linear(12, 12)  # called twice
        self.rearranged = nn.Linear(12, 12, bias=False)  # sees tokens before samples
        self.reused = nn.Linear(12, 12)  # also multiplied with itself
        self.routed = nn.Linear(12, 12)  # sees some tokens only
        self.never = nn.Linear(12, 12)
        self.scale = nn.Parameter(torch.ones(12))
        self.gain = nn.Parameter(torch.ones(1))
        self.stray = nn.Parameter(torch.ones(12))  # 1-D, reshaped before use
        self.head = nn.Linear(12, VOCABULARY)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        x = x + self.blocks[0].inner(x)  # inside a block and outside
        x = x + self.shared(torch.tanh(self.shared(x)))
        x = x + self.rearranged(x.transpose(0, 1)).transpose(0, 1)
        x = x + self.reused(x) @ (self.reused.weight * self.reused.weight)
        chosen = input_ids % 3 == 0
        y = torch.zeros_like(x)
        y[chosen] = self.routed(x[chosen])
        x = (x + y) * self.scale.exp() * self.gain
        x = x * self.stray.view(3, 4).t().reshape(12)
        return self.head(x)


def test_any_use_of_a_parameter_scores_right():
    from scoring import gradients, oracle

    def losses(model, ids):
        logits = model(ids)[:, :-1].float()
        return torch.stack([F.cross_entropy(row, one[1:]) for row, one in zip(logits, ids, strict=True)])

    torch.manual_seed(0)
    model = Oddities().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    ids, graph = ids_of(), whole_graph(model)
    grads = gradients(model, ids, losses)
    for importance in DERIVED:
        want = oracle(model, graph, grads, importance, "sum")
        for options in ({}, *SCHEDULES.values()):
            assert worst(score(model, graph, ids, importance=importance, **options), want) < 1e-9, importance


def test_few_accumulators_at_a_time_change_nothing(monkeypatch):
    model, graph, want = reference("mixtral", "element2")
    monkeypatch.setattr(streaming, "available_memory", lambda: 1 << 14)
    accumulate = counted(monkeypatch, streaming._Pass, "_accumulate")
    assert worst(score(model, graph, ids_of(), importance="element2", checkpointing=False), want) < 1e-6
    assert len(accumulate) > 1


def test_checkpointing_is_on_when_memory_would_not_fit(monkeypatch):
    model, graph, want = reference("llama_gqa", "element1")
    monkeypatch.setattr(streaming, "available_memory", lambda: 1 << 14)
    blocks = counted(monkeypatch, recompute, "run_part")
    assert worst(score(model, graph, ids_of(), importance="element1"), want) < 1e-6
    assert len(blocks) > 2
