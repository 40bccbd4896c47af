"""Scores of checkpoints that are read block by block: equal to those in memory, whatever the schedule."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scoring import AGGREGATIONS, IMPORTANCES, ids_of, model_of, whole_graph, worst
from tiny_models import FAMILIES, build

import llmprune
from llmprune.checkpoints.loading import load_model
from llmprune.checkpoints.record import fingerprint
from llmprune.cli import main
from llmprune.errors import CheckpointError, InputError
from llmprune.machine.budget import parse_bytes, resident_memory, spell_bytes
from llmprune.out_of_core import block_memory, block_stream
from llmprune.out_of_core.block_weights import Weights
from llmprune.out_of_core.stored import open_model, opened, source_of
from llmprune.scoring import loss
from llmprune.scoring.score import score

ARCHITECTURES = (
    "llama_mha",
    "llama_gqa",
    "llama_tied",
    "qwen2",
    "qwen3",
    "gemma2",
    "cohere",
    "gpt2",
    "opt",
    "phi",
    "mixtral",
    "mamba",
)
DERIVED = ("vector", "element1", "element2")


@functools.cache
def folder_of(name: str, place: Path) -> Path:
    folder = place / name
    # torch multiplies by stacks of experts in single precision at most.
    model_of(name, torch.float32 if name == "mixtral" else torch.float64).save_pretrained(
        folder, max_shard_size="20KB"
    )
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_equal_those_in_memory(place, name):
    folder = folder_of(name, place)
    whole, apart = load_model(folder), open_model(folder)
    graph = whole_graph(whole)
    for importance in (*IMPORTANCES, "random"):
        want = score(whole, graph, ids_of(), importance=importance)
        sizes = (1, 2, 5) if importance in DERIVED else (None,)
        for size in sizes:
            got = score(apart, graph, ids_of(), importance=importance, batch_size=size)
            assert worst(got, want) < 1e-6, (importance, size)
            assert got.calibration_hash == want.calibration_hash
    assert all(parameter.is_meta for parameter in apart.parameters())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", ["llama_tied", "mixtral"])
def test_every_aggregation(place, name, aggregation):
    folder = folder_of(name, place)
    model = load_model(folder)
    graph = llmprune.trace(model)
    for importance in IMPORTANCES:
        want = score(model, graph, ids_of(), importance=importance, aggregation=aggregation)
        got = score(folder, None, ids_of(), importance=importance, aggregation=aggregation, stream=True)
        assert got.fingerprint == want.fingerprint
        assert worst(got, want) < 1e-5, importance


@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "gemma2"])
@pytest.mark.parametrize("importance", DERIVED)
def test_no_schedule_changes_the_scores(monkeypatch, place, name, importance):
    """Small slices of everything; accumulators instead of pieces; borders on disk; one buffer."""
    folder = folder_of(name, place)
    whole = load_model(folder)
    graph = whole_graph(whole)
    want = score(whole, graph, ids_of(), importance=importance)
    monkeypatch.setattr(loss, "SLICE_BYTES", 1)
    monkeypatch.setattr(loss, "SLICE_ROWS", 9)
    monkeypatch.setattr("llmprune.out_of_core.reading.SLICE_BYTES", 1000)
    monkeypatch.setattr("llmprune.scoring.reduction.SLICE_BYTES", 1000)
    for size, buffers, on_disk, fold in ((2, 1, True, True), (1, 2, True, False), (5, 1, False, True)):
        schedule = block_memory.Schedule(size, buffers, on_disk, fold, on_disk, 0, 0)
        monkeypatch.setattr(block_stream, "choose", lambda *_, device, schedule=schedule: schedule)
        got = score(open_model(folder), graph, ids_of(), importance=importance)
        assert worst(got, want) < 1e-6, schedule


@pytest.mark.parametrize("name", ["llama_gqa", "llama_tied", "gpt2", "qwen3", "gemma2", "phi", "mixtral"])
def test_importances_read_off_activations(place, name):
    """Every axis, the ones that cross blocks too; of obs the curvature comes from a pass block by block."""
    folder = folder_of(name, place)
    whole = load_model(folder)
    graph = whole_graph(whole)
    for importance in ("activation", "fluctuation", "obs"):
        if (name, importance) == ("mixtral", "obs"):
            with pytest.raises(
                InputError, match="stacks of experts, whose curvature is taken of models in memory"
            ):
                score(open_model(folder), graph, ids_of(), importance=importance)
            continue
        want = score(whole, graph, ids_of(), importance=importance)
        got = score(open_model(folder), graph, ids_of(), importance=importance)
        assert set(got) == set(want)
        assert got.comparable is want.comparable
        assert worst(got, want) < 1e-6, importance


def test_activations_are_read_with_a_few_blocks_in_memory(tmp_path, monkeypatch):
    layers = 6
    model = build("llama", num_hidden_layers=layers)
    model.save_pretrained(tmp_path / "m")
    held: dict[int, set[int]] = {}
    read = Weights.present

    @contextlib.contextmanager
    def watched(self, number, following):
        with read(self, number, following):
            yield
            inside = {n: p for n, p in self._parameters.items() if ".layers." in n}
            real = [n for n, p in inside.items() if p.untyped_storage().nbytes() >= p.nbytes]
            held.setdefault(number, set()).update(int(n.split(".layers.")[1].split(".")[0]) for n in real)

    monkeypatch.setattr(Weights, "present", watched)
    score(tmp_path / "m", None, ids_of(), importance="fluctuation", kinds=("head", "ffn"), stream=True)
    assert sorted(held) == list(range(layers))
    assert all(blocks == {number} for number, blocks in held.items()), held


@pytest.mark.parametrize("family", ["t5", "whisper", "bert"])
def test_other_kinds_of_models_by_a_mapping_with_labels(tmp_path, family):
    """Encoder-decoders and encoders to first order; where a second order needs whole passes it says so."""
    model = build(family)
    model.save_pretrained(tmp_path / "m")
    model, apart = load_model(tmp_path / "m"), open_model(tmp_path / "m")
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(3, 90, (3, 6), generator=generator)
    data = {"input_ids": torch.randint(3, 90, (3, 6), generator=generator), "labels": labels}
    if family == "whisper":
        data = {"input_features": torch.randn(3, 16, 26, generator=generator), "labels": labels}
    graph = whole_graph(model)
    for importance in ("vector", "element1"):
        want = score(model, graph, data, importance=importance)
        for size in (1, 2, 3):
            assert worst(score(apart, graph, data, importance=importance, batch_size=size), want) < 1e-4, size
    if family != "bert":
        with pytest.raises(InputError, match="take an importance of first order"):
            score(apart, graph, data, importance="element2")
    else:
        got = score(apart, graph, data, importance="element2")
        assert worst(got, score(model, graph, data, importance="element2")) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_an_opened_model_is_the_loaded_one(tmp_path, family):
    build(family).save_pretrained(tmp_path / "m", max_shard_size="40KB")
    loaded, apart = load_model(tmp_path / "m"), open_model(tmp_path / "m")
    assert fingerprint(loaded) == fingerprint(apart)
    values = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in apart.named_parameters()}
    source = source_of(apart)
    assert source is not None
    source.fill(values)
    assert all(torch.equal(values[name], p) for name, p in loaded.named_parameters())
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffers[name], b) for name, b in apart.named_buffers())
    assert (source.missing, source.unexpected, source.mismatched) == ([], [], [])


def test_a_pruned_checkpoint_in_universal_form_can_be_opened(tmp_path):
    model = build("llama")
    graph = llmprune.trace(model)
    axis = next(a for a in graph.axes if a.kind == "ffn" and a.prunable)
    llmprune.compact(model, llmprune.plan(graph, removed={axis.id: [1, 7]}))
    llmprune.save_pretrained(model, tmp_path / "m", form="universal")
    loaded = load_model(tmp_path / "m")
    graph = llmprune.trace(loaded)
    want = score(loaded, graph, ids_of(), importance="element2")
    assert worst(score(open_model(tmp_path / "m"), graph, ids_of(), importance="element2"), want) < 1e-5


# The budget


def test_amounts_of_memory():
    assert [parse_bytes(t) for t in ("4GB", "1.5 gb", "512MiB", "10", 10, "2k", "3B")] == [
        4_000_000_000, 1_500_000_000, 512 << 20, 10, 10, 2000, 3,
    ]  # fmt: skip
    for wrong in ("", "4 apples", "-1", 0, -5, "GB", True, "1iB"):
        with pytest.raises(InputError, match="no amount of memory"):
            parse_bytes(wrong)
    for size in (1, 999_999, 10**9, 1_234_567_890):
        assert parse_bytes(spell_bytes(size)) >= size


def test_a_budget_that_is_too_small_is_refused_with_one_that_would_do(place):
    folder = folder_of("llama_gqa", place)
    with pytest.raises(InputError, match=r"takes \S+ of memory at the least.*raise it to") as caught:
        score(folder, None, ids_of(), stream=True, memory_budget="1MB")
    enough = str(caught.value).split("raise it to ")[1].split(",")[0]
    more = parse_bytes(enough) + (100 << 20)  # what the refused call itself has left behind
    assert len(score(folder, None, ids_of(), stream=True, memory_budget=more))


def test_what_does_not_fit_is_streamed_by_itself(place):
    folder = folder_of("llama_gqa", place)
    assert source_of(opened(folder)) is None
    assert source_of(opened(folder, memory_budget=resident_memory() + 1000)) is not None
    assert source_of(opened(folder, stream=True)) is not None
    assert source_of(opened(folder, stream=False, memory_budget=1)) is None


# What is refused


def test_a_folder_that_is_no_state_is_left_alone(place, tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(InputError, match="holds no state of llmprune"):
        score(folder_of("llama_gqa", place), None, ids_of(), stream=True, state=tmp_path)
    assert (tmp_path / "precious").read_text() == "mine"


def test_no_chain_of_blocks(tmp_path):
    build("llama", num_hidden_layers=1).save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="no chain of repeated blocks"):
        score(tmp_path / "m", None, ids_of(), stream=True)


def test_what_is_taken_of_models_in_memory_alone(place):
    folder = folder_of("llama_gqa", place)
    with pytest.raises(InputError, match="in memory alone"):
        score(folder, None, ids_of(), importance="block_influence", stream=True)
    with pytest.raises(InputError, match="in memory alone"):
        score(folder, None, ids_of(), kinds=("layer",), stream=True)
    model = load_model(folder)
    with pytest.raises(InputError, match="give its folder"):
        score(model, llmprune.trace(model), ids_of(), memory_budget="4GB")
    with pytest.raises(InputError, match="load it"):
        score(open_model(folder), None, ids_of(), stream=False)


def test_weights_that_are_not_finite(place, tmp_path):
    model = model_of("llama_gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN values"):
        score(tmp_path / "m", None, ids_of(), stream=True)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    model_of("llama_gqa").save_pretrained(tmp_path / "m")
    model = open_model(tmp_path / "m")
    graph = llmprune.trace(model)
    file = tmp_path / "m" / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends too early"):
        score(model, graph, ids_of())
    assert all(p.is_meta for p in model.parameters())


def test_stored_twice_under_tied_names(tmp_path):
    model_of("llama_tied").save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    want = score(load_model(tmp_path / "m"), None, ids_of())
    assert worst(score(open_model(tmp_path / "m"), None, ids_of()), want) < 1e-6
    tensors["lm_head.weight"] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="differ, but its config ties them"):
        open_model(tmp_path / "m")


def test_the_command(place, tmp_path, capsys):
    demo = Path(__file__).parents[2] / "demo"
    words = ["score", str(demo / "model"), "--calibration", str(demo / "calibration.txt"), "--quiet"]
    assert main([*words, "--output", str(tmp_path / "a.npz"), "--stream", "--memory-budget", "20GB"]) == 0
    assert "streamed; written to" in capsys.readouterr().out
    assert main([*words, "--output", str(tmp_path / "b.npz"), "--no-stream"]) == 0
    first, second = (llmprune.Scores.load(tmp_path / f"{name}.npz") for name in "ab")
    assert worst(first, second) < 1e-5
    assert np.isfinite(first[next(iter(first))]).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]
    assert main([*words, "--output", str(tmp_path / "a.txt")]) == 2
    assert main([*words, "--output", str(tmp_path / "c.npz"), "--stream", "--memory-budget", "1MB"]) == 2
    assert "raise it to" in capsys.readouterr().err


# Mixed dtypes, and a disk that fills


def test_each_tensor_in_a_dtype_of_its_own(place, tmp_path):
    """Norms stored in single precision between matrices of sixteen bits: loaded as the config says, both ways."""
    model_of("llama_gqa").bfloat16().save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    wider = {name: t.float() * 1.001 if t.dim() == 1 else t for name, t in tensors.items()}
    assert len({t.dtype for t in wider.values()}) == 2
    save_file(wider, file, {"format": "pt"})
    whole = load_model(tmp_path / "m")
    for importance in ("l2", *DERIVED):
        want = score(whole, None, ids_of(), importance=importance)
        got = score(open_model(tmp_path / "m"), None, ids_of(), importance=importance)
        assert worst(got, want) < 1e-5, importance


@pytest.fixture
def scored_from_disk(place, monkeypatch):
    """Scores one checkpoint, what passes between blocks being on disk; takes a folder of state, or None."""
    schedule = block_memory.Schedule(2, 1, True, False, True, 0, 0)
    monkeypatch.setattr(block_stream, "choose", lambda *_, device: schedule)
    folder = folder_of("llama_gqa", place)
    return lambda state=None: score(
        folder, None, ids_of(8, 16), importance="element2", stream=True, state=state, quiet=True
    )


@pytest.mark.parametrize("kept", [False, True], ids=["borders", "state"])
def test_no_file_can_grow(tmp_path, monkeypatch, scored_from_disk, kept):
    """Every size of a file: a sentence, no half of a file, and what was done before is gone on from."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    want, state = scored_from_disk(), tmp_path / "state" if kept else None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = []
    for limit in (0, 300, 700, 1500, 3000, 5000, 9000, 15000):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            scored_from_disk(state)
        except CheckpointError as error:
            said.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path for path in tmp_path.rglob("*") if path.suffix == ".partial"] == []
        assert {path.name for path in tmp_path.iterdir()} <= {"state"}
    assert len(said) > 2
    assert all("free some space there" in sentence for sentence in said)
    got = scored_from_disk(state)
    assert all((got[axis] == want[axis]).all() for axis in want)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def disk(tmp_path):
    """Mounts a file system of so many KiB, with none of the earlier one's files."""
    library = ctypes.CDLL(None, use_errno=True)
    places = []

    def mount(size):
        place = tmp_path / f"disk{size}"
        place.mkdir()
        if library.mount(b"tmpfs", bytes(place), b"tmpfs", 0, b"size=%dk" % size):
            pytest.skip("a tmpfs cannot be mounted here (needs Linux and CAP_SYS_ADMIN)")
        places.append(place)
        return place

    yield mount
    for place in places:
        library.umount2(bytes(place), 2)


@pytest.mark.parametrize("kept", [False, True], ids=["borders", "state"])
def test_the_disk_fills(disk, monkeypatch, scored_from_disk, kept):
    """All files together outgrow it, at one block or another; with more space the same call goes on."""
    want = scored_from_disk()
    said = []
    for size in (4, 8, 16, 32, 64):
        place = disk(size)
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        state, tries = place / "state" if kept else None, len(said)
        try:
            got = scored_from_disk(state)
        except CheckpointError as error:
            said.append(str(error))
        if len(said) > tries:
            assert [path for path in place.rglob("*") if path.suffix == ".partial"] == []
            assert {path.name for path in place.iterdir()} <= {"state"}
            ctypes.CDLL(None).mount(b"tmpfs", bytes(place), b"tmpfs", 32, b"size=4m")  # MS_REMOUNT
            got = scored_from_disk(state)
        assert all((got[axis] == want[axis]).all() for axis in want)
        assert list(place.iterdir()) == []
    assert len(said) > 1
    assert all("free some space there" in sentence for sentence in said)


def test_no_folder_can_be_made(tmp_path, monkeypatch, scored_from_disk):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match=r"what passes between blocks cannot be written to .*absent"):
        scored_from_disk()


def test_scores_that_cannot_be_written(tmp_path, capsys):
    demo = Path(__file__).parents[2] / "demo"
    words = ["score", str(demo / "model"), "--importance", "l2", "--quiet", "--stream"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "a.npz").write_bytes(b"old")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        code = main([*words, "--output", str(tmp_path / "a.npz")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert (tmp_path / "a.npz").read_bytes() == b"old"
    assert main([*words, "--output", str(tmp_path / "a.npz")]) == 0
