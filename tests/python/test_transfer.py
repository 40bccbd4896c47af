"""Blocks on their way to a device: a stand-in for it copies as late as it may and spoils memory as early as it may."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from scoring import ids_of, model_of, whole_graph, worst
from test_score_blocks import folder_of

from llmprune.checkpoints.loading import load_model
from llmprune.errors import DeviceError, InputError
from llmprune.machine import cuda
from llmprune.out_of_core import block_memory, block_stream, block_weights
from llmprune.out_of_core.stored import open_model
from llmprune.out_of_core.transfer import Staged, way_to
from llmprune.scoring.score import score


@dataclass
class Event:
    """A point in the order of what has been queued; a copy's is reached when somebody waits for it."""

    copy: tuple[torch.Tensor, torch.Tensor] | None = None
    reached: bool = False


@dataclass
class Device:
    """CPU memory that is used like a device's; what was in use may be copied over once its last use is told."""

    in_use: set[int] = field(default_factory=set)
    arrived: dict[int, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def memory(self, size: int) -> torch.Tensor:
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    def pinned(self, size: int) -> torch.Tensor:
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    def used(self) -> Event:
        self.in_use.clear()  # the stand-in computes at once: nothing queued is left
        return Event(reached=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None) -> Event:
        assert target.data_ptr() not in self.in_use, "a copy over a block in use"
        if target.data_ptr() in self.arrived:
            assert after is not None, "a copy over what nobody said was done with"
            del self.arrived[target.data_ptr()]
        target.fill_(0xFF)
        self.log.append("copy")
        return Event(copy=(target, source))

    def wait(self, event: Event) -> None:
        assert event.copy is not None
        self.log.append("wait")
        self._reach(event)
        self.in_use.add(event.copy[0].data_ptr())
        self.arrived[event.copy[0].data_ptr()] = 1

    def synchronize(self, event: Event) -> None:
        self.log.append("synchronize")
        self._reach(event)

    @staticmethod
    def _reach(event: Event) -> None:
        if not event.reached and event.copy is not None:
            event.copy[0].copy_(event.copy[1])
            event.reached = True


def writing(value: int) -> Any:
    return lambda memory: memory.fill_(value)


def test_memory_is_used_again_only_behind_the_events() -> None:
    device = Device()
    staged = Staged(device, 8)
    first, second = staged.memory(8), staged.memory(8)
    a = staged.bring(writing(1), first, 8)
    b = staged.bring(writing(2), second, 4)
    staged.arrive(a)
    assert first.tolist() == [1] * 8
    with pytest.raises(AssertionError, match="in use"):
        staged.bring(writing(3), first, 8)
    staged.arrive(b)
    assert second.tolist() == [2] * 4 + [0xFF] * 4
    staged.leave(first)
    c = staged.bring(writing(4), first, 8)
    assert first.tolist() == [0xFF] * 8  # it may be overwritten from the moment it is left
    staged.arrive(c)
    assert first.tolist() == [4] * 8
    assert staged.bytes_copied == 8 + 4 + 8
    # The third and fourth time a host buffer is filled, its copy has been waited for.
    assert device.log.count("synchronize") == 2
    device.in_use.clear()
    with pytest.raises(AssertionError, match="done with"):
        staged.bring(writing(5), first, 8)


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "mixtral"])
def test_scores_of_staged_blocks_equal_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = folder_of(name, tmp_path)
    whole = load_model(folder)
    graph = whole_graph(whole)
    ways: list[Staged] = []

    def staged(_device: torch.device, size: int) -> Staged:
        ways.append(Staged(Device(), size))
        return ways[-1]

    monkeypatch.setattr(block_weights, "way_to", staged)
    for importance in ("vector", "element1", "element2"):
        want = score(whole, graph, ids_of(), importance=importance)
        for buffers in (1, 2):
            schedule = block_memory.Schedule(2, buffers, False, False, True, 0, 0)
            monkeypatch.setattr(block_stream, "choose", lambda *_, device, schedule=schedule: schedule)
            assert worst(score(open_model(folder), graph, ids_of(), importance=importance), want) < 1e-6
            model = model_of(name, torch.float32)
            blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1)
            width = 4 if name == "mixtral" else 8
            # Forward and backward take every block once; the last is still there when backward begins.
            each = [sum(-(-p.numel() * width // 64) * 64 for p in block.parameters()) for block in blocks]
            most = sum(each) + sum(each[:-1])
            assert ways[-1].bytes_copied == most - (each[-2] if buffers == 2 else 0)


def test_devices_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("llama_gqa", tmp_path)
    with pytest.raises(InputError, match="not on meta"):
        score(open_model(folder), None, ids_of(), device="meta")
    with pytest.raises(InputError, match="'somewhere' is no device"):
        score(open_model(folder), None, ids_of(), device="somewhere")
    with pytest.raises(InputError, match="state and device are for weights that stay in their files"):
        score(load_model(folder), None, ids_of(), device="cpu")
    monkeypatch.setattr(cuda, "unavailable", lambda: "no usable CUDA device: cudaErrorNoDevice (none)")
    with pytest.raises(DeviceError, match="blocks cannot run on cuda: no usable CUDA device"):
        score(open_model(folder), None, ids_of(), device="cuda")


def test_a_device_without_room_is_refused_with_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = block_memory.Sizes(10 << 20, 1 << 20, 5 << 20, 5 << 20, 1 << 20, 1 << 20, 1 << 20)
    gauge = block_memory.Gauge(1 << 20, 1 << 20)
    device = torch.device("cuda", 0)

    def choose(free: int, budget: int | None) -> block_memory.Schedule:
        monkeypatch.setattr(cuda, "free_memory", lambda _device: free)
        return block_memory.choose(sizes, gauge, 40, 8, budget, None, device=device)

    roomy = choose(1 << 30, None)
    assert (roomy.batch_size, roomy.buffers, roomy.apart) == (8, 2, False)
    tight = choose(300 << 20, None)
    assert tight.apart  # 40 borders of 8 MiB are not for the device
    assert tight.peak <= 300 << 20
    with pytest.raises(
        DeviceError, match=r"takes \d+MB of memory on cuda:0 at the least, where 53MB are free"
    ):
        choose(50 << 20, None)
    with pytest.raises(InputError, match=r"of the host's memory, and the budget is 10MB: raise it to"):
        choose(300 << 20, 10**7)


def test_the_benchmark_of_streamed_blocks_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny and on the CPU, so that what a device's few minutes are for does not break unseen."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu, "TOKENS", {"2 x 8": (2, 8)})
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    entry = gpu.streamed(shape, 2, "2 x 8", "cpu", tmp_path)
    block = 16 * (16 + 8 + 8 + 16) + 3 * 16 * 24 + 2 * 16
    assert entry["parameters of a block"] == block
    assert entry["operations"] == 2 * 4 * 2 * block * 16
    assert entry["element1"]["seconds"] > 0
    assert entry["element2"]["seconds"] > 0
    assert block_weights.way_to is way_to
    floors = {"copy": 2.0, "upload": 4.0, "matmul": 8.0}
    rows = [{"tokens": "128 x 128", "share of the matrix rate": share} for share in (0.7, 0.5)]
    found = {"floors": floors, "kernels": rows, "compaction": {"rate on the device": 1.8}}
    assert [claim.holds for claim in gpu.claims_of(found)] == [False, True]
