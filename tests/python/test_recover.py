"""Recovery: what is adapted, that it helps, that its forms agree, and what happens when it goes wrong."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import build
from folders import TEXT, make_folder, tokenizer
from test_cli import run

import llmprune
from llmprune.checkpoints.loading import load_model
from llmprune.errors import CheckpointError, InputError, RecoveryError
from llmprune.recovery import shards
from llmprune.recovery.recover import linear_maps, recover

pytest.importorskip("peft", reason="recovery needs peft (llmprune[recover])")
pytestmark = pytest.mark.filterwarnings("default")

WORDS = TEXT.split()
TEXTS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 2
SHORT: dict[str, Any] = {"cutoff": 24, "batch_size": 8, "micro_batch_size": 8, "validation": 8, "quiet": True}
RARELY = {**SHORT, "validate_every": 6}
IDS = torch.arange(4, 20)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_folder(tmp_path_factory.mktemp("recover"))
    (place.parent / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return place


@pytest.fixture(scope="module")
def pruned(folder: Path) -> Path:
    """A folder in universal form: the second layer lost channels, the first none."""
    out = folder.parent / "pruned"
    model = load_model(folder)
    llmprune.prune(
        model, tokenizer(), {"ffn": 0.25}, importance="l2", protect_first=1, protect_last=0, output=out
    )
    assert "llmprune" in json.loads((out / "config.json").read_text())
    return out


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What is adapted


def test_the_linear_maps_of_attention_and_feed_forward_are_found_on_the_graph() -> None:
    llama = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
    cases = {
        "llama_gqa": llama,
        "llama_tied": llama,
        "gemma": llama,
        "qwen2": llama,
        "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
        "opt": ["k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"],
        "mixtral": llama[:4],
    }
    for family, parts in cases.items():
        found = linear_maps(build(family))
        layers = [[path for path in found if f".{layer}." in path] for layer in (0, 1)]
        assert [*layers[0], *layers[1]] == found, family
        for paths in layers:
            assert len(paths) == len(parts), (family, paths)
            assert all(any(path.endswith(part) for path in paths) for part in parts), (family, paths)


def test_one_head_left_is_still_adapted(folder: Path) -> None:
    model = load_model(folder)
    whole = linear_maps(model)
    llmprune.prune(model, None, {"head": 0.67}, importance="l2", protect_first=0, protect_last=0)
    assert model.model.layers[0].self_attn.k_proj.weight.shape[0] == 8
    assert linear_maps(model) == whole


def test_a_model_without_such_maps_is_refused() -> None:
    with pytest.raises(InputError, match="no linear map of Sequential lies on heads"):
        linear_maps(
            torch.nn.Sequential(torch.nn.Linear(4, 4)),
            llmprune.trace(torch.nn.Sequential(torch.nn.Linear(4, 4)), {"input": torch.ones(2, 4)}),
        )


# That it works


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_recovery_lowers_the_loss_and_saves_what_is_in_memory(
    pruned: Path, tmp_path: Path, method: str
) -> None:
    model = load_model(pruned)
    before = logits(model)
    result = recover(
        model,
        tokenizer(),
        TEXTS,
        method=method,
        steps=12,
        learning_rate=3e-3,
        output=tmp_path / "out",
        **SHORT,
    )
    assert result.model is model
    assert result.validation is not None
    assert result.validation["best"] < 0.95 * result.validation["before"]
    assert not torch.allclose(logits(model), before, atol=1e-2)
    assert (result.form, result.steps) == ("universal", 12)
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not any("lora" in name for name, _ in model.named_modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.training
    assert json.loads(json.dumps(result.to_json()))["data"]["validation"] == 8
    assert "state of step 12 was taken" in str(result)
    llmprune.trace(model)  # it can be pruned on


def test_straight_after_pruning_and_twice_the_same(folder: Path) -> None:
    results = []
    for _ in range(2):
        model = load_model(folder)
        llmprune.prune(model, tokenizer(), {"ffn": 0.25}, importance="l2", protect_first=0, protect_last=0)
        result = recover(model, tokenizer(), TEXTS, steps=4, learning_rate=3e-3, **RARELY)
        results.append((weights(model), result.curve))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    other = load_model(folder)
    llmprune.prune(other, tokenizer(), {"ffn": 0.25}, importance="l2", protect_first=0, protect_last=0)
    recover(other, tokenizer(), TEXTS, steps=4, learning_rate=3e-3, seed=1, **RARELY)
    assert not same(weights(other), results[0][0])


def test_the_best_state_by_validation_is_taken(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation losses are replaced, so that the second checkpoint is the best of four."""
    from llmprune.recovery.training import Recoverer

    made = iter([9.0, 3.0, 1.0, 2.0, 4.0])
    states: list[dict[str, torch.Tensor]] = []
    real = Recoverer.evaluation_loop

    def loop(self: Any, *args: Any, **options: Any) -> Any:
        out = real(self, *args, **options)
        states.append({n: p.detach().clone() for n, p in self.model.named_parameters() if "lora" in n})
        out.metrics["eval_loss"] = next(made)
        return out

    monkeypatch.setattr(Recoverer, "evaluation_loop", loop)
    model = load_model(pruned)
    result = recover(
        model, tokenizer(), TEXTS, steps=8, validate_every=2, learning_rate=3e-3, merge=False, **SHORT
    )
    assert (result.steps, result.best_step) == (8, 4)
    assert result.validation == {"before": 9.0, "best": 1.0, "last": 4.0}
    found = {n: p for n, p in result.model.named_parameters() if "lora" in n}
    assert all(torch.equal(found[name], tensor) for name, tensor in states[2].items())
    assert not all(torch.equal(found[name], tensor) for name, tensor in states[4].items())

    made = iter([9.0, 3.0, 4.0, 5.0, 6.0])
    stopped = recover(
        load_model(pruned),
        tokenizer(),
        TEXTS,
        steps=8,
        validate_every=2,
        learning_rate=3e-3,
        patience=2,
        **SHORT,
    )
    assert (stopped.steps, stopped.best_step) == (6, 2)


def test_an_adapter_that_is_kept_computes_what_the_merged_model_does(pruned: Path, tmp_path: Path) -> None:
    merged = recover(pruned, dataset=TEXTS, steps=4, learning_rate=3e-3, **RARELY).model
    kept = recover(
        pruned, dataset=TEXTS, steps=4, learning_rate=3e-3, merge=False, output=tmp_path / "adapter", **RARELY
    )
    assert kept.form == "adapter"
    assert torch.allclose(logits(kept.model), logits(merged), atol=1e-4)
    assert torch.allclose(logits(load_model(tmp_path / "adapter")), logits(merged), atol=1e-4)
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors"))
    assert size < (pruned / "model.safetensors").stat().st_size
    result = llmprune.evaluate(tmp_path / "adapter", ppl={"text": TEXT * 3}, window=32, latency=False)
    assert result.parameters == sum(p.numel() for p in load_model(pruned).parameters())


def test_half_precision_stays_what_it_was(pruned: Path) -> None:
    for method in ("lora", "full"):
        model = load_model(pruned, dtype=torch.bfloat16)
        result = recover(model, tokenizer(), TEXTS, steps=6, learning_rate=3e-3, method=method, **RARELY)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert result.validation is not None
        assert result.validation["best"] < result.validation["before"]


def test_gradient_checkpointing_changes_nothing(pruned: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = load_model(pruned)
        recover(
            model,
            tokenizer(),
            TEXTS,
            steps=3,
            learning_rate=3e-3,
            dropout=0.0,
            gradient_checkpointing=checkpointing,
            **RARELY,
        )
        found.append(logits(model))
    assert torch.allclose(found[0], found[1], atol=1e-5)


def test_other_families(tmp_path: Path) -> None:
    """Conv1D maps, learned positions, and experts whose attention alone is adapted."""
    for family in ("gpt2", "opt", "mixtral"):
        model = build(family)
        result = recover(model, tokenizer(), TEXTS, steps=6, learning_rate=3e-3, **RARELY)
        assert result.validation is not None
        assert result.validation["best"] < result.validation["before"], family


# A teacher


def test_a_teachers_divergence() -> None:
    from llmprune.recovery.training import divergence

    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 11, generator=generator) for _ in range(2))
    p, q = (torch.softmax(t.double(), -1) for t in (teacher, student))
    assert float(divergence(student, teacher)) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)


def test_stored_logits_are_the_teachers(folder: Path, tmp_path: Path) -> None:
    from llmprune.recovery.examples import load_data
    from llmprune.recovery.training import Collator, Examples, StoredLogits, divergence

    teacher, student = load_model(folder), load_model(folder)
    torch.manual_seed(5)
    with torch.no_grad():
        student.lm_head.weight.add_(0.2 * torch.randn_like(student.lm_head.weight))
    examples = Examples(load_data(TEXTS[:6], tokenizer(), cutoff=24, validation=0).train)
    collator = Collator(0)
    rows = collator([examples[i] for i in (4, 1)])
    kept = rows["labels"][:, 1:] != -100
    with torch.no_grad():
        wanted, found = (
            m(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1][kept]
            for m in (teacher, student)
        )
    p, q = (torch.softmax(t.double(), -1) for t in (wanted, found))
    for k in (61, 8):
        stored = StoredLogits.write(tmp_path / str(k), teacher, examples, collator, k, 4)
        value = float(stored.divergence(found, rows["row"]))
        ids = p.topk(k).indices
        near, far = p.gather(-1, ids), q.gather(-1, ids)
        expected = float((near * (near / far).log()).sum())
        if k < 61:
            rest, other = 1 - near.sum(-1), 1 - far.sum(-1)
            expected += float((rest * (rest / other).log()).sum())
        else:
            assert expected == pytest.approx(float(divergence(found, wanted)), rel=1e-4)
        assert value == pytest.approx(expected, rel=5e-3)
    with pytest.raises(InputError, match=r"62 logits .* 1 to 61"):
        StoredLogits.write(tmp_path / "62", teacher, examples, collator, 62, 4)


def test_distillation_brings_the_student_towards_the_teacher(folder: Path, pruned: Path) -> None:
    ids = torch.tensor([tokenizer()(text)["input_ids"][:24] for text in TEXTS[:8]])

    @torch.no_grad()
    def logs(model: Any) -> torch.Tensor:
        return torch.log_softmax(model(input_ids=ids).logits, -1)

    wanted = logs(load_model(folder))

    def distance(model: Any) -> float:
        return float(torch.nn.functional.kl_div(logs(model), wanted, log_target=True, reduction="batchmean"))

    options: dict[str, Any] = {"steps": 12, "learning_rate": 3e-3, **RARELY, "validation": 0}
    taught = {"distill": True, "distill_weight": 1.0, "teacher": folder}
    plain = recover(load_model(pruned), tokenizer(), TEXTS, **options).model
    in_memory = recover(load_model(pruned), tokenizer(), TEXTS, **options, **taught).model
    on_disk = recover(load_model(pruned), tokenizer(), TEXTS, **options, **taught, top_k=61).model
    assert distance(in_memory) < 0.9 * distance(load_model(pruned))
    assert distance(in_memory) < distance(plain)
    assert torch.allclose(logs(in_memory), logs(on_disk), atol=0.05)
    model = load_model(pruned)
    with pytest.raises(InputError, match="the teacher is the model itself"):
        recover(model, tokenizer(), TEXTS, distill=True, teacher=model, steps=1, **SHORT)


# When it goes wrong


OVERFLOWING = 1e25
"""A learning rate after whose first steps queries times keys are beyond float32, on whatever processor."""


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_loss_that_is_none_stops_and_leaves_the_model_as_it_was(
    pruned: Path, tmp_path: Path, method: str
) -> None:
    model = load_model(pruned)
    before = weights(model)
    place = tmp_path / method
    options: dict[str, Any] = {
        "steps": 40,
        "warmup": 0,
        "learning_rate": OVERFLOWING,
        "method": method,
        **SHORT,
    }
    with pytest.raises(RecoveryError, match=r"(loss|gradient) became .* at step \d+: .* lower learning rate"):
        recover(model, tokenizer(), TEXTS, output=place, **options)
    assert same(weights(model), before)
    assert not place.exists()
    assert all(p.grad is None for p in model.parameters())
    if method == "lora":
        assert (tmp_path / "lora.training" / "last-good" / "adapter_model.safetensors").is_file()


def test_a_loss_that_explodes_stops_before_it_is_taken_for_a_direction(
    pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmprune.recovery.training import Recoverer

    real = Recoverer.step_loss
    monkeypatch.setattr(
        Recoverer, "step_loss", lambda self: real(self) * (1 if self.state.global_step < 3 else 100)
    )
    model = load_model(pruned)
    before = weights(model)
    with pytest.raises(RecoveryError, match=r"the loss exploded to \d+.* at step 4: .* lower learning rate"):
        recover(model, tokenizer(), TEXTS, steps=6, learning_rate=1e-3, **SHORT)
    assert same(weights(model), before)


def test_a_gradient_that_is_not_finite_stops_before_the_step(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmprune.recovery.training import Guard

    real = Guard.on_pre_optimizer_step
    seen: dict[str, torch.Tensor] = {}

    def poisoned(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            trained = {n: p for n, p in kwargs["model"].named_parameters() if p.requires_grad}
            seen.update({n: p.detach().clone() for n, p in trained.items()})
            next(iter(trained.values())).grad[0, 0] = float("nan")
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(Guard, "on_pre_optimizer_step", poisoned)
    work = tmp_path / "work"
    with pytest.raises(
        RecoveryError, match=r"gradient became infinite or NaN .* at step 4: the state of step 3 is kept"
    ):
        recover(load_model(pruned), tokenizer(), TEXTS, steps=8, learning_rate=3e-3, work=work, **SHORT)
    from safetensors.torch import load_file

    kept = load_file(work / "last-good" / "adapter_model.safetensors")
    assert len(kept) == len(seen)
    for name, tensor in seen.items():
        assert torch.equal(kept[name.replace(".default", "")], tensor)


def test_a_full_disk_says_so_and_the_run_can_go_on(pruned: Path, tmp_path: Path) -> None:
    options = {"steps": 4, "validate_every": 2, "learning_rate": 3e-3, "output": tmp_path / "out", **SHORT}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = load_model(pruned)
    before = weights(model)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(CheckpointError, match=r"no space left in .*out.training .* run the same again"):
            recover(model, tokenizer(), TEXTS, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(weights(model), before)
    assert recover(model, tokenizer(), TEXTS, **options).steps == 4
    assert not (tmp_path / "out.training").exists()


def test_other_settings_in_the_same_folder_are_refused(pruned: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    options = {"steps": 6, "learning_rate": OVERFLOWING, "warmup": 0, "work": work, **SHORT}
    with pytest.raises(RecoveryError):
        recover(load_model(pruned), tokenizer(), TEXTS, **{**options, "steps": 40})
    options["learning_rate"] = 1e-3
    with pytest.raises(InputError, match=r"holds a run with learning_rate 1e\+25, not 0.001: .*--restart"):
        recover(load_model(pruned), tokenizer(), TEXTS, **{**options, "steps": 40})
    assert recover(load_model(pruned), tokenizer(), TEXTS, restart=True, **options).steps == 6
    assert not work.exists()
    work.mkdir()
    (work / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no recovery"):
        recover(load_model(pruned), tokenizer(), TEXTS, restart=True, **options)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_result(pruned: Path, tmp_path: Path) -> None:
    """SIGKILL after the second checkpoint; dropout is on, so that the random state must come back too."""
    words = [sys.executable, "-m", "llmprune.cli", "recover", pruned, "--data", pruned.parent / "texts.jsonl"]
    words += [
        "--steps",
        30,
        "--validate-every",
        3,
        "--learning-rate",
        3e-3,
        "--cutoff",
        24,
        "--batch-size",
        8,
    ]
    words += ["--micro-batch-size", 4, "--validation", 8, "--quiet", "--json", "--output"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(llmprune.__file__).parents[1]),
    }

    def start(name: str) -> Any:
        return subprocess.Popen(
            [*map(str, words), str(tmp_path / name)], env=environment, stdout=subprocess.PIPE, text=True
        )

    process = start("killed")
    second = tmp_path / "killed.training" / "checkpoint-6" / "trainer_state.json"
    deadline = time.time() + 120
    while not second.is_file() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert second.is_file()
    assert not (tmp_path / "killed").exists()
    for name in ("killed", "whole"):
        process = start(name)
        out, _ = process.communicate()
        assert process.returncode == 0
        assert json.loads(out)["steps"] == 30
    assert same(load_model(tmp_path / "killed").state_dict(), load_model(tmp_path / "whole").state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.mark.slow
def test_a_sharded_model_is_whole_again_whatever_happens() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            str(Path(__file__).parent / "sharded_recovery_worker.py"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(llmprune.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert 0.49 < said["share"] < 0.55
    assert said["left"] == 0
    assert said["error"].startswith("RecoveryError: ")
    assert said["as before"]
    assert said["learned"]
    assert said["alike"]


def test_fsdp_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert not shards.wanted(None, "full", True)
    with pytest.raises(InputError, match="start several with torchrun"):
        shards.wanted(True, "lora", False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not shards.wanted(None, "lora", False)  # a config for many machines
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert shards.wanted(None, "dora", False)
    assert not shards.wanted(False, "full", True)
    with pytest.raises(InputError, match="only that of adapters"):
        shards.wanted(None, "full", False)
    with pytest.raises(InputError, match="watch= runs the model in one process alone"):
        shards.wanted(None, "lora", True)
    with shards.without_accelerates():
        assert os.environ["ACCELERATE_USE_FSDP"] == "false"
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_two_processes_do_what_one_does_whole_or_sharded(pruned: Path, tmp_path: Path, method: str) -> None:
    words = [
        "recover",
        pruned,
        "--data",
        pruned.parent / "texts.jsonl",
        "--steps",
        6,
        "--learning-rate",
        3e-3,
    ]
    words += ["--cutoff", 24, "--batch-size", 8, "--micro-batch-size", 4, "--dropout", 0, "--validation", 8]
    words = [*map(str, words), "--method", method, "--quiet", "--json", "--output"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(llmprune.__file__).parents[1]),
    }
    launchers = {
        "one": [sys.executable, "-m", "llmprune.cli"],
        "two": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "llmprune.cli",
        ],
    }
    launchers["sharded"] = launchers["two"]
    for name, launcher in launchers.items():
        done = subprocess.run(
            [*launcher, *words, str(tmp_path / name)],
            env={**environment, **({"ACCELERATE_USE_FSDP": "true"} if name == "sharded" else {})},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["steps"] == 6  # one process prints
    one, two, sharded = (logits(load_model(tmp_path / name)) for name in launchers)
    assert torch.allclose(one, two, atol=1e-3)
    torch.testing.assert_close(sharded, two, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(launchers)


def test_the_command(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pruned.parent / "texts.jsonl"
    words = ["recover", pruned, "--data", data, "--output", tmp_path / "out", "--steps", 2, "--cutoff", 24]
    words += ["--batch-size", 4, "--validation", 0.1]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "state of step 2 was taken" in out
    assert "checkpoint: " in out
    assert "train: 2 steps of 4 examples" in err
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert "exists: choose another output folder" in err
    code, out, err = run(capsys, *words, "--overwrite", "--json", "--keep-adapter")
    assert code == 0, err
    assert json.loads(out)["form"] == "adapter"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lore"}, "unknown method 'lore'"),
        ({"optimizer": "sgd"}, "unknown optimizer"),
        ({"scheduler": "step"}, "unknown scheduler"),
        ({"rank": 0}, "rank is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"dropout": 2.0}, "dropout is 2.0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"patience": 1, "validation": 0}, "patience needs validation"),
        ({"distill": True}, "distillation needs a teacher"),
        ({"teacher": "here"}, "a teacher is given and distillation is off"),
        ({"cutoff": 65}, "a cutoff of 65 tokens is beyond the 64 positions"),
        ({"targets": ["model.norm"]}, "the targets cannot be adapted"),
        ({"targets": ["model.nothing"]}, "the targets cannot be adapted"),
        ({"merge": False, "method": "full"}, "has no adapter to keep"),
        ({"merge": False, "output": "out"}, "names the folder of its base"),
        ({"dataset": None}, "recovery needs data"),
        ({"form": "other"}, "unknown checkpoint form"),
    ],
)
def test_bad_settings(pruned: Path, options: dict[str, Any], message: str) -> None:
    model = load_model(pruned)
    before = weights(model)
    with pytest.raises(InputError, match=message):
        recover(model, tokenizer(), **{**SHORT, "dataset": TEXTS, "steps": 1, **options})
    assert same(weights(model), before)


def test_lamb_is_in_another_package(pruned: Path) -> None:
    model = load_model(pruned)
    try:
        import pytorch_optimizer  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="pip install pytorch_optimizer"):
            recover(model, tokenizer(), TEXTS, optimizer="lamb", steps=1, **SHORT)
    else:
        assert recover(model, tokenizer(), TEXTS, optimizer="lamb", steps=1, **SHORT).steps == 1


def test_a_tokenizer_without_padding_and_one_of_another_model(pruned: Path) -> None:
    words = tokenizer()
    words.pad_token = None
    assert recover(load_model(pruned), words, TEXTS, steps=1, **SHORT).steps == 1
    words.add_tokens([f"{word} {other}" for word in WORDS[:6] for other in WORDS[:6]])
    with pytest.raises(InputError, match="the tokenizer is another model's"):
        recover(load_model(pruned), words, TEXTS, steps=1, **SHORT)


def test_the_extra_is_named_where_it_is_missing(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'llmprune\[recover\]'"):
        recover(load_model(pruned), tokenizer(), TEXTS, steps=1, **SHORT)


def test_a_compiled_copy_and_the_given_model_are_one(pruned: Path) -> None:
    model = load_model(pruned)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager")
    recover(model, tokenizer(), TEXTS, steps=2, learning_rate=3e-3, **RARELY)
    recover(compiled, tokenizer(), TEXTS, steps=2, learning_rate=3e-3, **RARELY)
    assert torch.equal(logits(model), logits(twin))
