"""A whole model on a CUDA device: the same scores, the same kept sets and the same pruned model as on the CPU."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import llmprune

pytestmark = pytest.mark.cuda
DEMO = Path(__file__).resolve().parents[2] / "demo" / "model"


@pytest.fixture
def model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(DEMO).float().eval()


def ids(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (6, 24), generator=generator)


@pytest.mark.parametrize("importance", ["vector", "element1", "element2", "l1", "l2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_kept_sets_equal_the_cpus(model: torch.nn.Module, importance: str, checkpointing: bool) -> None:
    graph = llmprune.trace(model)
    tokens = ids(model)
    want = llmprune.score(model, graph, tokens, importance=importance, quiet=True)
    device = copy.deepcopy(model).cuda()
    got = llmprune.score(
        device,
        graph,
        tokens,
        importance=importance,
        checkpointing=checkpointing,
        pin_boundaries=checkpointing,
        quiet=True,
    )
    for axis in want:
        np.testing.assert_allclose(got[axis], want[axis], rtol=1e-3, atol=1e-7)
    chosen = [llmprune.plan(graph, scores, ratio=0.2) for scores in (want, got)]
    assert chosen[0].removed.keys() == chosen[1].removed.keys()
    for axis in chosen[0].removed:
        np.testing.assert_array_equal(
            np.asarray(chosen[0].removed[axis]), np.asarray(chosen[1].removed[axis])
        )


@pytest.mark.parametrize("release", [False, True])
def test_a_compacted_model_equals_the_cpus(model: torch.nn.Module, release: bool) -> None:
    graph = llmprune.trace(model)
    tokens = ids(model)
    plan = llmprune.plan(graph, llmprune.score(model, graph, importance="l2", quiet=True), ratio=0.2)
    device = copy.deepcopy(model).cuda()
    llmprune.compact(model, plan)
    llmprune.compact(device, plan, release=release)
    for (name, a), b in zip(model.named_parameters(), device.parameters(), strict=True):
        assert b.is_cuda
        assert torch.equal(a, b.cpu()), name
    with torch.no_grad():
        torch.testing.assert_close(
            device(tokens.cuda()).logits.cpu(), model(tokens).logits, rtol=1e-3, atol=1e-3
        )


def test_release_gives_memory_back_for_one_matrix_of_peak() -> None:
    layers = [torch.nn.Linear(4096, 4096, bias=False) for _ in range(12)]
    model = torch.nn.Sequential(*layers).cuda()
    graph = llmprune.trace(model, {"input": torch.randn(2, 4096, device="cuda")})
    scores = llmprune.score(model, graph, importance="l2", quiet=True)
    plan = llmprune.plan(
        graph, scores, ratio=0.3, kinds=sorted({axis.kind for axis in graph.axes if axis.prunable})
    )
    matrix = 4096 * 4096 * 4
    torch.cuda.empty_cache()
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    torch.cuda.reset_peak_memory_stats()
    llmprune.compact(model, plan, release=True)
    scratch = 64 << 20
    assert torch.cuda.max_memory_allocated() - before <= matrix + scratch
    assert before - torch.cuda.memory_allocated() >= 2 * matrix
    assert torch.cuda.mem_get_info()[0] - free >= 2 * matrix


def test_a_model_beyond_the_devices_memory_is_refused_before_it_starts(model: torch.nn.Module) -> None:
    graph = llmprune.trace(model)
    device = copy.deepcopy(model).cuda()
    torch.cuda.empty_cache()
    room = torch.cuda.mem_get_info()[0] - (16 << 20)
    hog = torch.empty(max(0, room), dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises((llmprune.errors.DeviceError, torch.OutOfMemoryError), match=r"GiB|memory"):
            llmprune.score(device, graph, ids(model), importance="element2", quiet=True)
    finally:
        del hog
        torch.cuda.empty_cache()
    assert all(parameter.grad is None for parameter in device.parameters())
    llmprune.score(device, graph, ids(model), importance="element2", quiet=True)


@pytest.mark.parametrize("release", [False, True])
def test_each_expert_loses_the_channels_that_it_loses_on_the_cpu(release: bool) -> None:
    config = MixtralConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=44, num_local_experts=5, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).float().eval()
    graph = llmprune.trace(model)
    tokens = ids(model)
    device = copy.deepcopy(model).cuda()
    plans = []
    for one in (model, device):
        scores = llmprune.score(one, graph, tokens, "element1", quiet=True)
        plans.append(llmprune.plan(graph, scores, {"ffn": 0.3}, protect_first=0, protect_last=0))
    assert any(removed.ndim == 2 for removed in plans[0].removed.values())
    for axis, removed in plans[0].removed.items():
        np.testing.assert_array_equal(removed, plans[1].removed[axis])
    llmprune.verify(device, plans[1], {"input_ids": tokens.cuda()})
    llmprune.compact(model, plans[0])
    llmprune.compact(device, plans[1], release=release)
    for name, parameter in device.named_parameters():
        assert torch.equal(parameter.cpu(), model.get_parameter(name)), name


@pytest.mark.parametrize("importance", ["element1", "element2"])
def test_blocks_that_come_from_files_score_as_in_memory(
    model: torch.nn.Module, importance: str, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "m")
    graph = llmprune.trace(model)
    want = llmprune.score(model, graph, ids(model), importance=importance, quiet=True)
    for size in (None, 2):
        opened = llmprune.open_model(tmp_path / "m")
        got = llmprune.score(
            opened, graph, ids(model), importance=importance, batch_size=size, quiet=True, device="cuda"
        )
        for axis in want:
            np.testing.assert_allclose(got[axis], want[axis], rtol=1e-3, atol=1e-7)
        assert all(parameter.is_meta for parameter in opened.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_on_two_devices_is_scored_cut_and_saved_in_place(
    model: torch.nn.Module, checkpointing: bool, tmp_path: Path
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("it needs two CUDA devices")
    from accelerate import dispatch_model

    graph = llmprune.trace(model)
    want = llmprune.score(model, graph, ids(model), "element1", quiet=True)
    layers = {f"model.layers.{i}": i % 2 for i in range(model.config.num_hidden_layers)}
    places = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1, **layers}
    spread = dispatch_model(copy.deepcopy(model), device_map=places)
    got = llmprune.score(spread, graph, ids(model), "element1", checkpointing=checkpointing, quiet=True)
    for axis in want:
        np.testing.assert_allclose(got[axis], want[axis], rtol=1e-3, atol=1e-7)
    plan = llmprune.plan(graph, want, ratio=0.2)
    llmprune.compact(spread, plan)
    llmprune.compact(model, plan)
    saved = llmprune.save_pretrained(spread, tmp_path / "pruned", None)
    again = llmprune.from_pretrained(saved.directory)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def alone(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Code in a process of its own, whose device may be ruined."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


PRELUDE = """
import numpy as np, torch
from llmprune import _core
from llmprune.errors import DeviceError
from llmprune.machine import cuda
def score():
    w, x, dy = (torch.randn(n, m, device="cuda") for n, m in ((64, 32), (16, 32), (16, 64)))
    row, col = (torch.zeros(n, dtype=torch.float64, device="cuda") for n in (64, 32))
    _core.linear_scores(w, x, dy, 2, 1, row, col, **cuda.options(w))
    return row
score()
"""


def test_a_context_that_was_destroyed_is_told_by_the_errors_name() -> None:
    """A kernel's assertion ruins the context for the process, and all that follows is told so in a sentence."""
    run = alone(
        PRELUDE
        + """
w = torch.zeros(8, 8, device="cuda")
options = cuda.options(w)
out = torch.zeros(8, dtype=torch.float64, device="cuda")
try:
    torch._assert_async(torch.zeros((), device="cuda"))
    torch.cuda.synchronize()
except RuntimeError:
    pass
try:
    for _ in range(3):
        _core.dot_columns(w, w, out, **options)
except DeviceError as error:
    print(error)
"""
    )
    assert run.returncode == 0, run.stderr
    assert "cudaError" in run.stdout


def test_a_refused_call_leaves_no_error_behind() -> None:
    run = alone(
        PRELUDE
        + """
w = torch.zeros(8, 8, device="cuda")
try:
    _core.linear_scores(w, w, w, 1, 2, *(torch.zeros(8, dtype=torch.float64, device="cuda") for _ in range(2)),
                        stream=torch.cuda.current_stream().cuda_stream)
except Exception as error:
    print(type(error).__name__, error)
torch.cuda.synchronize()
assert torch.isfinite(score()).all()
"""
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_scores_can_be_captured_into_a_graph_and_compaction_says_that_it_cannot() -> None:
    run = alone(
        PRELUDE
        + """
w, x, dy = (torch.randn(n, m, device="cuda", dtype=torch.bfloat16) for n, m in ((64, 32), (16, 32), (16, 64)))
row, col = (torch.zeros(n, dtype=torch.float64, device="cuda") for n in (64, 32))
scratch = torch.empty(cuda.SCRATCH_BYTES, dtype=torch.uint8, device="cuda")
def work():
    _core.linear_scores(w, x, dy, 2, 2, row, col, stream=torch.cuda.current_stream().cuda_stream, scratch=scratch)
work()
torch.cuda.synchronize()
want = row.clone()
row.zero_(); col.zero_()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    work()
row.zero_(); col.zero_()
for times in (1, 2, 3):
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(row, times * want, rtol=1e-12, atol=0)
other = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(other):
        cuda.compact_many([torch.zeros(8, 8, device="cuda")], [{0: np.arange(4)}])
except DeviceError as error:
    print(error)
"""
    )
    assert run.returncode == 0, run.stderr
    assert "cannot be captured into a graph (cudaErrorStreamCaptureUnsupported)" in run.stdout


@pytest.mark.parametrize("segments", ["True", "False"])
def test_release_gives_memory_back_with_expandable_segments_and_without(segments: str) -> None:
    run = alone(
        """
import torch, llmprune
model = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096, bias=False) for _ in range(12))).cuda()
graph = llmprune.trace(model, {"input": torch.randn(2, 4096, device="cuda")})
scores = llmprune.score(model, graph, importance="l2", quiet=True)
kinds = sorted({axis.kind for axis in graph.axes if axis.prunable})
plan = llmprune.plan(graph, scores, ratio=0.3, kinds=kinds)
torch.cuda.synchronize(); torch.cuda.empty_cache()
before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
torch.cuda.reset_peak_memory_stats()
llmprune.compact(model, plan, release=True)
torch.cuda.synchronize(); torch.cuda.empty_cache()
print(torch.cuda.max_memory_allocated() - before, before - torch.cuda.memory_allocated(),
      torch.cuda.mem_get_info()[0] - free)
""",
        PYTORCH_CUDA_ALLOC_CONF=f"expandable_segments:{segments}",
    )
    assert run.returncode == 0, run.stderr
    extra, returned, freed = map(int, run.stdout.split())
    matrix = 4096 * 4096 * 4
    assert extra <= matrix + (64 << 20)
    assert returned >= 2 * matrix
    assert freed >= 2 * matrix
