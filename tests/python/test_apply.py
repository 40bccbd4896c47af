"""A plan applied to files: byte for byte what loading, compacting and saving write, in little memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from checkpoint_models import PLAIN, SIZES, build, evenly
from folders import tokenizer
from safetensors.torch import load_file, save_file

import llmprune
from llmprune.checkpoints.checkpoint import load_model, load_tokenizer, save_pretrained
from llmprune.cli import main
from llmprune.errors import CheckpointError, InputError, LlmpruneError, PlanError
from llmprune.out_of_core import outline, stream_io
from llmprune.out_of_core.shards import INDEX

MARK = "model-00001-of-0000"


def ragged(axis: Any) -> list[int]:
    """Layers that lose unlike numbers of FFN channels, the first fewer."""
    if axis.kind == "ffn" and ".0." not in axis.members[0].parameter:
        return [1, 2, 3, 4, 7, 8, 10, 11]
    return evenly(axis)


def plan_for(model: Any, remove: Callable[[Any], list[int]] = evenly, **options: Any) -> Any:
    graph = llmprune.trace(model)
    removed = {axis.id: remove(axis) for axis in graph.axes if axis.prunable and remove(axis)}
    return llmprune.plan(graph, removed=removed, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_alike(source: Path, plan: Any, place: Path, **options: Any) -> Any:
    """Prune ``source`` in memory and on files, into folders of one name, and compare every byte; what was saved."""
    model = load_model(source)
    llmprune.compact(model, plan)
    plan.save(place / "plan.json")
    expected = save_pretrained(model, place / "memory" / "out", load_tokenizer(source), **options)
    saved = llmprune.apply(place / "plan.json", source, place / "files" / "out", **options)
    one, other = contents(place / "memory" / "out"), contents(place / "files" / "out")
    assert sorted(other) == sorted(one)
    assert [name for name in one if one[name] != other[name]] == []
    assert (saved.form, saved.bytes, saved.reason) == (expected.form, expected.bytes, expected.reason)
    assert saved.max_error == 0.0
    return saved


@pytest.mark.parametrize(
    ("family", "remove"),
    [
        *((family, evenly) for family in ("llama_gqa", "llama_tied", "gpt2", "opt", "mixtral", "t5")),
        *((family, ragged) for family in ("llama_tied", "mixtral", "bert")),
    ],
)
def test_the_result_is_that_of_pruning_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, remove: Any
) -> None:
    monkeypatch.setattr(stream_io, "BUFFER", 1000)  # less than any matrix
    build(family).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    plan = plan_for(load_model(tmp_path / "model"), remove)
    saved = check_alike(tmp_path / "model", plan, tmp_path, max_shard_size=15000)
    if remove is ragged:
        assert saved.form == "universal"
    assert (tmp_path / "files/out" / INDEX).exists()
    load_model(tmp_path / "files/out")


def test_each_expert_loses_channels_of_its_own(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model")
    graph = llmprune.trace(model)
    scores = llmprune.score(model, graph, importance="l1")
    plan = llmprune.plan(graph, scores, {"ffn": 0.3, "expert": 0.4}, protect_first=0, protect_last=0)
    experts = [dims for name, dims in plan.kept.items() if name.endswith("experts.down_proj")]
    assert {len(dims[0]) for dims in experts} == {len(dims[2]) for dims in experts}
    assert all(len({tuple(row) for row in dims[2]}) > 1 for dims in experts)
    assert check_alike(tmp_path / "model", plan, tmp_path).form == "stock"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_sixteen_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    build("llama_gqa", dtype).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    check_alike(tmp_path / "model", plan_for(load_model(tmp_path / "model")), tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "files/out/model.safetensors").values()} == {dtype}


def test_each_tensor_keeps_its_own_dtype(tmp_path: Path) -> None:
    """Norms in float32, one matrix in int8, one in float64, the rest in bfloat16."""
    model = build("llama_gqa", torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = {name: t.float() if "norm" in name else t for name, t in load_file(file).items()}
    int8, wide = "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    tensors[int8] = (tensors[int8] * 40).to(torch.int8)
    tensors[wide] = tensors[wide].double()
    save_file(tensors, file, metadata={"format": "pt"})
    plan = plan_for(model)
    llmprune.apply(plan, tmp_path / "model", tmp_path / "out")
    result = load_file(tmp_path / "out/model.safetensors")
    assert result.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for dim, kept in plan.kept.get(name, {}).items():
            tensor = tensor.index_select(dim, torch.from_numpy(kept))
        assert result[name].dtype == tensor.dtype
        assert torch.equal(result[name], tensor)
    assert result[int8].dtype == torch.int8


def test_layers_parts_and_channels(tmp_path: Path) -> None:
    """Blocks that go, attention that goes alone, and norms that are scaled because hidden channels go."""
    config = tf.LlamaConfig(**{**SIZES, "num_hidden_layers": 5})
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    graph = llmprune.trace(model)
    layers = next(stack.id for stack in graph.stacks if stack.kind == "layer")
    attention = next(stack.id for stack in graph.stacks if stack.kind == "attention")
    channel = next(axis.id for axis in graph.axes if axis.kind == "channel" and axis.prunable)
    ffn = next(axis.id for axis in graph.axes if axis.kind == "ffn" and axis.prunable)
    for number, removed in enumerate(
        ({layers: [1, 3], ffn: [0]}, {attention: [2]}, {channel: [3, 7, 20], ffn: [1, 2]})
    ):
        place = tmp_path / str(number)
        place.mkdir()
        plan = llmprune.plan(graph, removed=removed)
        assert bool(plan.rescaled) == (channel in removed)
        check_alike(tmp_path / "model", plan, place)


@pytest.mark.parametrize("remove", [evenly, ragged])
def test_what_has_been_pruned_can_be_pruned_again(tmp_path: Path, remove: Any) -> None:
    build("llama_gqa").save_pretrained(tmp_path / "model")
    first = tmp_path / "first"
    llmprune.apply(plan_for(load_model(tmp_path / "model"), remove), tmp_path / "model", first)
    again = plan_for(load_model(first), lambda axis: [2] if axis.kind == "ffn" else [])
    check_alike(first, again, tmp_path)
    assert len(load_model(tmp_path / "files/out").llmprune.history) == 2


def test_computed_buffers_that_were_cut_are_stored(tmp_path: Path) -> None:
    """Rotary pairs that go are in no config: the tables come along, as in memory."""
    build("llama_gqa").save_pretrained(tmp_path / "model")
    plan = plan_for(load_model(tmp_path / "model"), lambda axis: [1] if axis.kind == "head_dim" else [])
    check_alike(tmp_path / "model", plan, tmp_path, form="universal")


def test_buffers_of_the_checkpoint_come_along(tmp_path: Path) -> None:
    """Batch norms keep running figures that are no parameters."""
    config = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_channels=3, layer_type="basic"
    )
    torch.manual_seed(0)
    model = tf.ResNetForImageClassification(config).eval()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + ("var" in name))
    model.save_pretrained(tmp_path / "model")
    plan = plan_for(load_model(tmp_path / "model"), lambda axis: [0] if axis.kind == "channel" else [])
    assert any("running_var" in name for name in plan.kept)
    check_alike(tmp_path / "model", plan, tmp_path)


def test_a_model_left_on_the_disk_is_scored_planned_and_pruned_there(tmp_path: Path) -> None:
    """The whole way without its weights in memory ends in the folder that the way with them ends in."""
    build("llama_gqa").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    ids = torch.randint(3, 61, (4, 12), generator=torch.Generator().manual_seed(0))
    model = llmprune.open_model(tmp_path / "model")
    graph = llmprune.trace(model)
    scores = llmprune.score(model, graph, ids, "element2", stream=True, quiet=True)
    plan = llmprune.plan(graph, scores, ratio={"ffn": 0.2, "head": 0.34}, protect_first=0, protect_last=0)
    assert {summary["kind"] for summary in plan.axes.values()} == {"ffn", "head"}
    check_alike(tmp_path / "model", plan, tmp_path)


LITTLE = """
import sys, resource
from llmprune.out_of_core.apply import apply
from llmprune.planning.plan import Plan
from pathlib import Path
place = Path(sys.argv[1])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
plan = Plan.load(place / "plan.json")
apply(plan, place / "small", place / "warm")
before = peak()
apply(Plan.load(place / "big.json"), place / "big", place / "out")
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """400 MiB of weights pass through buffers of 64 MiB in all."""
    for name, width in (("small", 24), ("big", 1020)):
        config = tf.LlamaConfig(
            **{**SIZES, "hidden_size": width, "intermediate_size": 16 * width, "num_attention_heads": 3}
        )
        torch.manual_seed(0)
        model = tf.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / name)
        plan_for(model).save(tmp_path / ("plan.json" if name == "small" else "big.json"))
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LITTLE, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    size = (tmp_path / "big/model.safetensors").stat().st_size
    assert size > 380 << 20
    assert int(run.stdout) < 110 << 20


# --- what can be wrong ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three shards, ``model``, and a plan for it, ``plan.json``."""
    place = tmp_path_factory.mktemp("apply")
    build("llama_gqa").save_pretrained(place / "model", max_shard_size="15KB")
    plan_for(load_model(place / "model")).save(place / "plan.json")
    return place


def first_shard(folder: Path) -> Path:
    return next(folder.glob(f"{MARK}*.safetensors"))


def other_config(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "intermediate_size": 40}))


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(first_shard(folder))
    index = json.loads((folder / INDEX).read_text())
    gone = next(iter(tensors))
    save_file({name: t for name, t in tensors.items() if name != gone}, first_shard(folder))
    del index["weight_map"][gone]
    (folder / INDEX).write_text(json.dumps(index))


def index_names(tensor: str, shard: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][tensor] = shard
        (folder / INDEX).write_text(json.dumps(index))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard missing": (lambda f: first_shard(f).unlink(), f"{MARK}.*is missing"),
    "shard truncated": (lambda f: os.truncate(first_shard(f), 5000), f"{MARK}.*is truncated or damaged"),
    "header wrong": (
        lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes().replace(b"F32", b"F64", 1)),
        f"{MARK}.*is truncated or damaged .*takes",
    ),
    "index names absent tensors": (
        lambda f: index_names("absent", first_shard(f).name)(f),
        f"{MARK}.*lacks absent, which {INDEX} places there",
    ),
    "index leads outside": (index_names("x", "../secret.safetensors"), "which is no file name"),
    "tensor twice": (
        lambda f: save_file(load_file(first_shard(f)), sorted(f.glob("model-*"))[1]),
        "lacks|is both in",
    ),
    "a tensor of the model is nowhere": (without_a_tensor, r"lacks .*of the LlamaForCausalLM"),
    "another model's config": (other_config, r"has shape .* but the folder's config asks for"),
    "quantised": (
        lambda f: (f / "config.json").write_text(
            json.dumps({**json.loads((f / "config.json").read_text()), "quantization_config": {"bits": 4}})
        ),
        "quantised weights",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_with_the_file_and_nothing_is_written(
    made: Path, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    harm, sentence = DAMAGE[damage]
    harm(tmp_path / "model")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=sentence):
        llmprune.apply(made / "plan.json", tmp_path / "model", tmp_path / "out")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_plan_that_does_not_fit(made: Path, tmp_path: Path) -> None:
    for other in (
        build("mistral"),
        tf.LlamaForCausalLM(tf.LlamaConfig(**{**PLAIN, "num_hidden_layers": 3})),
    ):
        plan = plan_for(other)
        with pytest.raises(PlanError, match="the plan does not fit this LlamaForCausalLM"):
            llmprune.apply(plan, made / "model", tmp_path / "out")
    first = tmp_path / "first"
    llmprune.apply(made / "plan.json", made / "model", first)
    with pytest.raises(PlanError, match="does not fit"):  # the pruned one, again
        llmprune.apply(made / "plan.json", first, tmp_path / "out")
    damaged = json.loads((made / "plan.json").read_text())
    name = next(iter(damaged["kept"]))
    damaged["kept"][name] = {"0": "0-99999"}
    (tmp_path / "plan.json").write_text(json.dumps(damaged))
    with pytest.raises(PlanError, match="must rise strictly within"):
        llmprune.apply(tmp_path / "plan.json", made / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arguments(made: Path, tmp_path: Path) -> None:
    for options, sentence in (
        ({"form": "fancy"}, "unknown checkpoint form"),
        ({"max_shard_size": "huge"}, "the shard size must be like 5GB"),
        ({"output": made / "model", "overwrite": True}, "is the checkpoint itself"),
    ):
        with pytest.raises(InputError, match=sentence):
            llmprune.apply(
                **{"plan": made / "plan.json", "model": made / "model", "output": tmp_path / "o", **options}
            )


def test_a_class_that_computes_something_else_is_found_out(made: Path) -> None:
    """The recorded passes of two classes of the same tensors differ where these compute otherwise."""
    whole = outline.load_outline(made / "model")
    model, config = whole.model, whole.model.config

    def other(**changes: Any) -> Any:
        changed = type(config).from_dict({**config.to_dict(), **changes})
        return outline.build(type(model), made / "model", whole.values, changed).model

    for changes in (
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ):
        with pytest.raises(CheckpointError, match=r"computes something else|computed from the config"):
            outline.compare_outlines(model, other(**changes))
    assert outline.compare_outlines(model, other()) == 0.0


def test_the_disk_fills_at_any_point(made: Path, tmp_path: Path) -> None:
    """Every size to which a file may grow, short of what the largest needs."""
    llmprune.apply(made / "plan.json", made / "model", tmp_path / "whole", max_shard_size="10KB")
    sizes = sorted(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    shutil.rmtree(tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in {0, *sizes[:-1:2], sizes[-1] - 1}:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(LlmpruneError, match="no space left"):
                llmprune.apply(made / "plan.json", made / "model", tmp_path / "out", max_shard_size="10KB")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_keeps_the_old_checkpoint(
    made: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    (mounted / "out").mkdir()
    (mounted / "out/config.json").write_text("{}")
    free = os.statvfs(mounted).f_bavail * os.statvfs(mounted).f_bsize
    (mounted / "ballast").write_bytes(bytes(free - (40 << 10)))
    before = contents(mounted)
    with pytest.raises(CheckpointError, match="no space left"):
        llmprune.apply(made / "plan.json", made / "model", mounted / "out", overwrite=True)
    assert contents(mounted) == before


def test_too_little_space_is_said_before_writing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 0, 1000))
    with pytest.raises(CheckpointError, match="nothing was written"):
        llmprune.apply(made / "plan.json", made / "model", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code, text, error = run(capsys, "apply", made / "plan.json", made / "model", out, "--shard-size", "20KB")
    assert code == 0, error
    assert f"checkpoint: {out} (stock form" in text
    assert load_model(out).config.intermediate_size == 16
    code, text, error = run(capsys, "apply", made / "plan.json", made / "model", out, "--json", "--quiet")
    assert (code, text) == (2, "")
    assert "exists" in error
    code, text, error = run(
        capsys, "apply", made / "plan.json", made / "model", out, "--json", "--quiet", "--overwrite"
    )
    assert (code, error) == (0, "")
    assert json.loads(text)["form"] == "stock"
    (tmp_path / "torn.json").write_text("{}")
    code, text, error = run(capsys, "apply", tmp_path / "torn.json", made / "model", tmp_path / "other")
    assert (code, text) == (2, "")
    assert "no pruning plan" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "torn.json"]


def test_verify_finds_a_file_that_has_changed(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llmprune.apply(made / "plan.json", made / "model", tmp_path / "out")
    assert run(capsys, "verify", tmp_path / "out")[0] == 0
    file = tmp_path / "out/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    code, _, error = run(capsys, "verify", tmp_path / "out")
    assert code == 2
    assert "model.safetensors is not the file that was saved" in error
