"""Pruning from folder to folder: the same files as with the model in memory, and proved before they get their name."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build

import llmprune
from llmprune.checkpoints.loading import load_model
from llmprune.cli import main
from llmprune.errors import InputError, LlmpruneError, VerificationError
from llmprune.out_of_core import block_memory, block_stream
from llmprune.out_of_core.stored import open_model
from llmprune.pipeline import prune_stream
from llmprune.pipeline.prune_stream import prune_streamed
from llmprune.repair.repair import _Repairer

DEMO = Path(__file__).parents[2] / "demo"


def ids_of(samples: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 99, (samples, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"ratio": 0.2}),
        ("llama", {"ratio": {"channel": 0.2, "ffn": 0.3}}),
        ("qwen3", {"ratio": {"query": 0.5, "ffn": 0.3}}),
        ("mixtral", {"ratio": {"ffn": 0.25}}),
        ("mixtral", {"ratio": {"expert": 0.4}}),
        ("gpt2", {"ratio": 0.2, "importance": "element2"}),
        ("opt", {"ratio": 0.2, "importance": "l2"}),
        ("mamba", {"ratio": {"ffn": 0.2, "state": 0.1, "rank": 0.2}}),
    ],
)
def test_the_files_are_those_of_pruning_in_memory(tmp_path, family, options):
    build(family).save_pretrained(tmp_path / "m", max_shard_size="30KB")
    common = {"importance": "element1", "protect_first": 0, "protect_last": 0, **options}
    if isinstance(options["ratio"], dict):
        common["kinds"] = tuple(options["ratio"])
    model = load_model(tmp_path / "m")
    llmprune.prune(
        model, None, calibration=ids_of(), repair="none", output=tmp_path / "a", quiet=True, **common
    )
    ratio = common.pop("ratio")
    report = prune_streamed(
        open_model(tmp_path / "m"),
        tmp_path / "m",
        tmp_path / "b",
        ratio,
        ids_of(),
        quiet=True,
        repair="none",
        **common,
    )
    assert report.verification is not None
    assert report.verification.relative_error <= 1e-5
    assert report.output == str(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "m"]
    first, second = (
        {k: v for f in (tmp_path / n).glob("*.safetensors") for k, v in load_file(f).items()} for n in "ab"
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert report.after.parameters == sum(p.numel() for p in load_model(tmp_path / "b").parameters())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"ratio": 0.2}),
        ("qwen3", {"ratio": {"query": 0.5, "ffn": 0.3}}),
        ("gpt2", {"ratio": 0.25}),
        ("opt", {"ratio": 0.2, "importance": "fluctuation"}),
        ("llama", {"ratio": {"channel": 0.2, "ffn": 0.3}, "importance": "element1"}),
        ("mixtral", {"ratio": {"head": 0.5}, "importance": "element1"}),
    ],
)
def test_repair_by_blocks_is_that_in_memory(tmp_path, family, options):
    """By default obs and sequential repair, as in memory: the same kept sets, the same new weights to rounding."""
    build(family).save_pretrained(tmp_path / "m", max_shard_size="30KB")
    common = {"protect_first": 0, "protect_last": 0, "repair": "ls", **options}
    if isinstance(options["ratio"], dict):
        common["kinds"] = tuple(options["ratio"])
    data = ids_of(12, 24)
    model = load_model(tmp_path / "m")
    want = llmprune.prune(model, None, calibration=data, output=tmp_path / "a", quiet=True, **common)
    ratio = common.pop("ratio")
    got = prune_streamed(
        open_model(tmp_path / "m"), tmp_path / "m", tmp_path / "b", ratio, data, quiet=True, **common
    )
    assert got.importance == want.importance
    assert got.plan.digest() == want.plan.digest()
    assert want.repair.loss == pytest.approx(got.repair.loss, rel=1e-5)
    assert want.repair.kept is got.repair.kept
    assert want.repair.ridges == got.repair.ridges
    assert want.repair.biases == got.repair.biases
    assert got.verification.relative_error <= 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "m"]
    assert {path.name for path in (tmp_path / "b").iterdir()} == {p.name for p in (tmp_path / "a").iterdir()}
    first, second = (
        {k: v for f in (tmp_path / n).glob("*.safetensors") for k, v in load_file(f).items()} for n in "ab"
    )
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)
    records = [json.loads((tmp_path / n / "llmprune.json").read_text()) for n in "ab"]
    assert records[0]["history"][-1]["repaired"] == records[1]["history"][-1]["repaired"]
    loaded = load_model(tmp_path / "b")
    assert sum(p.numel() for p in loaded.parameters()) == got.after.parameters


def test_a_repair_forgets_the_blocks_that_are_done(tmp_path, monkeypatch):
    """What one block's weights change by is let go with it: else memory grows with the number of blocks."""
    build("llama").save_pretrained(tmp_path / "m")
    held = []
    flush, meet = _Repairer.flush, _Repairer._meet

    def watch_meet(self, use, x, y):
        meet(self, use, x, y)
        held.append({int(u.name.split(".layers.")[1].split(".")[0]) for u in self._changes})

    def watch_flush(self):
        flush(self)
        held.append({-1} if self._changes else set())

    monkeypatch.setattr(_Repairer, "_meet", watch_meet)
    monkeypatch.setattr(_Repairer, "flush", watch_flush)
    report = prune_streamed(
        open_model(tmp_path / "m"), tmp_path / "m", tmp_path / "b", {"ffn": 0.3}, ids_of(12, 24), "l2",
        protect_first=0, protect_last=0, repair="ls", quiet=True,
    )  # fmt: skip
    assert report.repair.ridges
    assert set().union(*held) == set(range(len(report.repair.ridges)))
    assert max(map(len, held)) == 1


def test_what_streaming_cannot_repair_and_a_budget_too_small(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=r"experts of .* lose channels of their own.*--no-stream"):
        prune_streamed(
            open_model(tmp_path / "m"), tmp_path / "m", tmp_path / "b", {"ffn": 0.25}, ids_of(), quiet=True,
            repair="ls", protect_first=0, protect_last=0,
        )  # fmt: skip
    build("llama").save_pretrained(tmp_path / "l")
    for importance, what in (("obs", "scoring by obs"), ("l2", "repairing")):
        with pytest.raises(
            InputError, match=rf"{what} block by block takes .* and the budget is 1MB: raise it to"
        ):
            prune_streamed(
                open_model(tmp_path / "l"), tmp_path / "l", tmp_path / "b", 0.2, ids_of(), importance,
                quiet=True, repair="ls", memory_budget="1MB",
            )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l", "m"]


@pytest.mark.parametrize("importance", ["element1", "obs"])
def test_the_disk_fills_at_any_point(tmp_path, monkeypatch, importance):
    """State, what passes between blocks, new weights, the checkpoint: a sentence, nothing half-written, on it goes."""
    build("llama").save_pretrained(tmp_path / "m", max_shard_size="30KB")
    schedule = block_memory.Schedule(2, 1, True, False, True, 0, 0)
    monkeypatch.setattr(block_stream, "choose", lambda *_, device: schedule)

    def run(name):
        return prune_streamed(
            open_model(tmp_path / "m"), tmp_path / "m", tmp_path / name, 0.2, ids_of(8, 16), importance,
            quiet=True, protect_first=0, protect_last=0,
        )  # fmt: skip

    run("want")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = set()
    for limit in (0, 300, 700, 1500, 3000, 5000, 9000, 15000, 25000):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(LlmpruneError, match="space") as caught:
                run("got")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        said.add(
            Path(re.findall(r"written to (\S+)", str(caught.value) + " written to checkpoint")[0]).name[:12]
        )
        assert {path.name for path in tmp_path.iterdir()} <= {"m", "want", ".got.blocks"}
    assert len(said) > 1, said  # more than one place was met
    run("got")
    assert not (tmp_path / ".got.blocks").exists()
    for file in (tmp_path / "want").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "got" / file.name).read_bytes()


def test_a_result_that_computes_something_else_is_not_published(monkeypatch, tmp_path):
    build("llama").save_pretrained(tmp_path / "m")
    original = prune_stream.apply

    def wrong(plan, source, target, **options):
        saved = original(plan, source, target, **options)
        from safetensors.torch import save_file

        file = target / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] += 0.5
        save_file(tensors, file, {"format": "pt"})
        return saved

    monkeypatch.setattr(prune_stream, "apply", wrong)
    with pytest.raises(VerificationError, match="nothing was written"):
        prune_streamed(
            open_model(tmp_path / "m"), tmp_path / "m", tmp_path / "b", {"ffn": 0.2}, ids_of(), quiet=True,
            kinds=("ffn",), protect_first=0, protect_last=0,
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_the_command_line(tmp_path, capsys):
    words = ["prune", str(DEMO / "model"), "--calibration", str(DEMO / "calibration.txt"), "--quiet"]
    assert main([*words, "--stream", "--memory-budget", "20GB", "--output", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "verified: equal to the masked reference" in said
    assert "weights stayed in their files" in said
    assert "pruned by obs (global allocation)" in said
    assert "consumers by least squares" in said
    load_model(tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give --output"),
        (
            ["--output", "{}/b", "--eval", str(DEMO / "calibration.txt")],
            "--eval needs the whole model in memory",
        ),
        (["--output", "{}/b", "--generate", "Once"], "--generate needs the whole model"),
        (["--output", "{}/b", "--kinds", "layer"], "of models in memory alone"),
        (["--output", "{}/b", "--memory-budget", "1MB"], "raise it to"),
        (["--output", "{}/b", "--memory-budget", "much"], "no amount of memory"),
    ],
)
def test_refused(tmp_path, capsys, words, sentence):
    start = [
        "prune",
        str(DEMO / "model"),
        "--calibration",
        str(DEMO / "calibration.txt"),
        "--quiet",
        "--stream",
    ]
    assert main([*start, *(word.format(tmp_path) for word in words)]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
