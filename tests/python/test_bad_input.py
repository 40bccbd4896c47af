"""What users get wrong, by command line and from Python: one sentence, a typed error, and nothing changed or written.

What one function refuses on its own is tested beside that function (folders in ``test_checkpoint_loading``, calibration
in ``test_score_errors``, tensors in ``tests/binding``); here the whole path is walked.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compact_plans import llama
from folders import TEXT, make_folder, tokenizer
from torch import nn

import llmprune
from llmprune import _core, cli
from llmprune.errors import CalibrationError, InputError, LlmpruneError, PlanError, TensorError, TraceError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("bad"))


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command."""
    capsys.readouterr()
    try:
        code = cli.main([*words, "--quiet"])
    except SystemExit as error:
        code = int(error.code or 0)
    return (code, *capsys.readouterr())


def files(place: Path) -> dict[str, bytes]:
    """Every file below a folder with its contents."""
    return {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before: dict[str, torch.Tensor], model: nn.Module) -> bool:
    after = model.state_dict()
    return before.keys() == after.keys() and all(
        torch.equal(torch.nan_to_num(before[name]), torch.nan_to_num(after[name])) for name in before
    )


# --- the model's folder -----------------------------------------------------------------------------------------------


def _config(change: dict[str, Any]) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        values = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**values, **change}))

    return write


def _without(pattern: str) -> Callable[[Path], None]:
    def remove(model: Path) -> None:
        for path in model.glob(pattern):
            path.unlink()

    return remove


def _pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _torn(model: Path) -> None:
    os.truncate(model / "model.safetensors", 5000)


def _poisoned(model: Path) -> None:
    """A NaN as the last weight in the file."""
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-4] + np.float32("nan").tobytes())


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (_without("*.safetensors"), "model.safetensors is missing: copy it again"),
    "truncated weights": (_torn, "is truncated or damaged"),
    "pickle only": (_pickled, "weights as a pickle only"),
    "quantised": (_config({"quantization_config": {"quant_method": "gptq"}}), "quantised weights (gptq)"),
    "packed": (_config({"dtype": "int8"}), "states dtype int8"),
    "NaN weights": (_poisoned, "holds NaN values"),
    "no config": (_without("config.json"), "no checkpoint folder"),
    "unknown class": (_config({"architectures": ["FancyForCausalLM"]}), "has no FancyForCausalLM"),
    "a word for a number": (_config({"num_attention_heads": "many"}), "expected int, got str"),
    "unknown activation": (_config({"hidden_act": "sillu"}), "KeyError: 'sillu'"),
    "sizes that do not fit": (
        _config({"intermediate_size": 28}),
        "has shape (24, 20), but the folder's config asks for (24, 28)",
    ),
    "no tokenizer": (_without("tokenizer*"), "needs a tokenizer"),
    "torn tokenizer": (lambda model: (model / "tokenizer.json").write_text("{") and None, "tokenizer in"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_be_used(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, sentence = FOLDERS[case]
    model = tmp_path / "model"
    model.mkdir()
    for source in folder.iterdir():
        (model / source.name).write_bytes(source.read_bytes())
    damage(model)
    before = files(tmp_path)
    calibration = str(folder.parent / "calibration.txt")
    words = ["prune", str(model), "--calibration", calibration, "--output", str(tmp_path / "out")]
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert files(tmp_path) == before


# --- options ----------------------------------------------------------------------------------------------------------

OPTIONS = {
    "--ratio=0": "strictly between 0 and 1, not 0",
    "--ratio=1": "strictly between 0 and 1, not 1",
    "--ratio=-1": "strictly between 0 and 1, not -1",
    "--ratio=nan": "strictly between 0 and 1, not nan",
    "--ratio=head=nan": "share of head to remove must lie in [0, 1), not nan",
    "--ratio=head=0.1,head=0.2": "names a kind twice",
    "--ratio=wheel=0.1": "unknown kind 'wheel'",
    "--importance=psychic": "the known ones are vector",
    "--aggregation=mean": "the known ones are sum",
    "--allocation=local": "there are auto, uniform, global",
    "--kinds=,": "no kind of axis to prune was named",
    "--round-to=0": "round_to must be an integer of at least 1",
    "--protect-first=-1": "protect_first must be an integer of at least 0",
    "--importance=element1": "needs calibration data",
    "--output=": "the path is empty",
    "--save-plan={tmp}": "is a folder: give --save-plan a file",
    "--save-plan={tmp}/no/plan.json": "does not exist: make it",
    "--eval={tmp}": "is a folder: give a file",
    "--calibration={tmp}": "is a folder: give a file",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_bad_option_is_refused_before_the_model_is_read(
    option: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "load", lambda *_: pytest.fail("the model was read"))
    code, out, err = run(capsys, "prune", str(folder), "--importance=l1", option.format(tmp=tmp_path))
    assert (code, out) == (2, "")
    assert OPTIONS[option] in err
    assert len(err.splitlines()) == 1
    assert files(tmp_path) == {}


TEXTS = {
    "empty.txt": (b"", "0 tokens, 1024 are needed"),
    "short.txt": (b"Once upon a time", "give more text, or ask for fewer or shorter samples"),
    "latin.txt": ("caf\xe9 ".encode("latin-1") * 400, "is not UTF-8 text"),
    "torn.jsonl": (b'{"text": "a"}\n\n{"text": \n', "line 3 of"),
    "other.jsonl": (b'{"text": "a"}\n{"story": "b"}\n', "line 2 of"),
    "table.csv": (TEXT.encode() * 12, "ends neither in .txt nor in .jsonl"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_calibration_file_that_cannot_be_used(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, sentence = TEXTS[name]
    (tmp_path / name).write_bytes(content)
    words = ["prune", str(folder), "--calibration", str(tmp_path / name), "--output", str(tmp_path / "out")]
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert files(tmp_path) == {name: content}


@pytest.mark.parametrize("name", ["torn.jsonl", "other.jsonl", "latin.txt"])
def test_an_evaluation_file_that_cannot_be_used(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, sentence = TEXTS[name]
    (tmp_path / name).write_bytes(content)
    code, _, err = run(capsys, "prune", str(folder), "--importance", "l1", "--eval", str(tmp_path / name))
    assert code == 2
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_rows_may_hold_any_character_of_json(folder: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{TEXT}\u2028\x85{TEXT}"}, ensure_ascii=False) for _ in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    from llmprune.scoring.calibration import load_calibration

    assert load_calibration(tmp_path / "rows.jsonl", tokenizer()).samples == 10


# --- from Python ------------------------------------------------------------------------------------------------------

IDS = torch.arange(48).reshape(2, 24)
CALLS: dict[str, tuple[dict[str, Any], type[LlmpruneError], str]] = {
    "ratio as text": ({"ratio": "most"}, InputError, "ratio must be a number"),
    "ratio text": ({"ratio": "much"}, InputError, "ratio must be a number"),
    "share as text": ({"ratio": {"head": "x"}}, InputError, "share of head"),
    "no kind": ({"ratio": {}}, InputError, "no kind"),
    "a string for kinds": ({"kinds": "head"}, InputError, "sequence of names"),
    "no calibration": ({"importance": "element1"}, InputError, "needs calibration"),
    "ids beyond the vocabulary": (
        {"importance": "element1", "calibration": IDS + 1000},
        CalibrationError,
        "outside the model's vocabulary",
    ),
    "ids beyond it in a mapping": (
        {"importance": "element1", "calibration": {"input_ids": IDS + 1000, "labels": IDS}},
        CalibrationError,
        "outside its vocabulary",
    ),
    "ids without values": (
        {"importance": "element1", "calibration": IDS.to("meta")},
        InputError,
        "meta device",
    ),
    "inputs beyond the vocabulary": ({"inputs": {"input_ids": IDS + 1000}}, InputError, "vocabulary"),
    "inputs of another kind": ({"inputs": {"input_ids": "abc"}}, TraceError, "embed_tokens"),
    "a name for a tokenizer": (
        {"importance": "element1", "calibration": [TEXT], "tokenizer": "gpt2"},
        InputError,
        "the tokenizer is a str",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_bad_argument_leaves_the_model_as_it_was(case: str) -> None:
    options, kind, sentence = CALLS[case]
    model = llama()
    before = state(model)
    with pytest.raises(kind) as caught:
        llmprune.prune(model, **{"importance": "l1", **options})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same(before, model)
    assert not hasattr(model, "llmprune")


def test_what_is_no_model() -> None:
    for thing in (None, "demo/model"):
        with pytest.raises(InputError, match=r"give a torch\.nn\.Module"):
            llmprune.trace(thing)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scale", "importance", "sentence"),
    [
        (1e36, "element2", "scores of axis"),  # gradients squared leave float32
        (3e38, "element1", "the loss of calibration sample 0 is"),  # and so do the logits
    ],
)
def test_what_overflows_gives_no_scores(scale: float, importance: str, sentence: str) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    before = state(model)
    with pytest.raises(CalibrationError, match=sentence):
        llmprune.prune(model, None, 0.2, IDS, importance)
    assert same(before, model)


def test_a_plan_of_another_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = llama(intermediate_size=28)
    graph = llmprune.trace(other)
    plan = llmprune.plan(graph, llmprune.score(other, graph, importance="l1"), ratio=0.1)
    model = llama()
    before = state(model)
    for use in (llmprune.compact, llmprune.verify):
        with pytest.raises(PlanError, match="another model"):
            use(model, plan)
    assert same(before, model)
    plan.save(tmp_path / "plan.json")
    code, out, err = run(capsys, "verify", str(folder), "--plan", str(tmp_path / "plan.json"))
    assert (code, out) == (2, "")
    assert "another model" in err
    (tmp_path / "plan.json").write_text("{}")
    code, _, err = run(capsys, "verify", str(folder), "--plan", str(tmp_path / "plan.json"))
    assert code == 2
    assert "plan.json: this is no pruning plan" in err


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).no_such_method()  # type: ignore[no-any-return]


def test_a_model_that_cannot_be_traced_says_where() -> None:
    with pytest.raises(TraceError) as caught:
        llmprune.trace(Untraceable(), {"x": torch.ones(2, 8)})
    for part in ("operation 2, aten::addmm", "test_bad_input.py:", "no_such_method"):
        assert part in str(caught.value)
    assert str(caught.value).count("object has no attribute") == 1


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, *, flag: bool = False) -> torch.Tensor:
        result: torch.Tensor = self.inner(x) * mask
        return result


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"x": torch.ones(2, 8)}, "missing a required argument: 'mask'"),
        ({"x": torch.ones(2, 8), "masks": torch.ones(8)}, "missing a required argument: 'mask'"),
        ({"x": torch.ones(2, 8), "mask": torch.ones(8), "y": 1}, "unexpected keyword argument 'y'"),
        ((torch.ones(2, 8), torch.ones(8), True), "too many positional arguments"),
        (torch.ones(2, 8), "missing a required argument: 'mask'"),
    ],
)
def test_inputs_that_do_not_match_the_forward_name_its_arguments(inputs: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        llmprune.trace(Picky(), inputs)
    assert "inputs do not fit Picky.forward" in str(caught.value)
    assert "its arguments are x, mask, flag" in str(caught.value)


class Branching(nn.Module):
    """Asks a computed value which way to go: no stand-in knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        result: torch.Tensor = self.out(y if y.sum().item() < 1e9 else -y)
        return result


def test_control_flow_that_depends_on_data_is_followed_on_real_tensors_and_says_so() -> None:
    model, inputs = Branching(), {"x": torch.ones(2, 8)}
    graph = llmprune.trace(model, inputs)
    [note] = graph.tape.notes
    assert note.startswith("recorded on real tensors because the meta device did not do: ")
    assert "aten::_local_scalar_dense" in note
    report = llmprune.prune(
        model, ratio={"rank": 0.25}, importance="l1", inputs=inputs, protect_first=0, protect_last=0
    )
    assert note in str(report)
    assert model.inner.out_features == 9
    with pytest.raises(TraceError, match="_local_scalar_dense"):
        llmprune.trace(Branching().to("meta"), inputs)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 8)[:, ::2],
        torch.zeros(4).expand(4, 4),
        torch.zeros(4, 4, device="meta"),
        torch.zeros(4, 4).numpy()[::-1],
        np.frombuffer(bytes(64), dtype=np.float32).reshape(4, 4),
    ],
    ids=["strided", "expanded", "meta", "reversed", "read-only"],
)
def test_tensors_the_core_cannot_cut(tensor: Any) -> None:
    with pytest.raises(TensorError):
        _core.compact(tensor, {0: np.array([0, 2])})


# --- interrupts and full disks ----------------------------------------------------------------------------------------

STAGES = {
    "load": ("llmprune.checkpoints.loading", "check_loaded"),
    "score": ("llmprune.scoring.score", "_grouped"),
    "verify": ("llmprune.compaction.verify", "_compare_in"),
    "compact": ("llmprune.compaction.compact", "_replace"),
    "save": ("llmprune.checkpoints.checkpoint", "_write_record"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_in_each_stage_leaves_no_file(
    stage: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, name = STAGES[stage]
    original = getattr(importlib.import_module(module), name)
    reached = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        reached.append(name)
        if len(reached) == 1:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(sys.modules[module], name, interrupted)
    words = ["--calibration", str(folder.parent / "calibration.txt"), "--samples", "2", "--length", "16"]
    words += ["--importance", "element1"]
    words += ["--output", str(tmp_path / "out"), "--save-plan", str(tmp_path / "plan.json")]
    code, out, err = run(capsys, "prune", str(folder), *words)
    assert reached
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "llmprune: interrupted"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "mount") or library.mount(b"tmpfs", bytes(place), b"tmpfs", 0, b"size=64k"):
        pytest.skip("a tmpfs cannot be mounted here (needs Linux and CAP_SYS_ADMIN)")
    try:
        yield place
    finally:
        library.umount2(bytes(place), 2)


def test_a_full_disk_leaves_nothing(
    small_disk: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", str(folder), "--importance", "l1", "--output", str(small_disk / "out")]
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert "no space left" in err
    assert len(err.splitlines()) == 1
    assert list(small_disk.iterdir()) == []


# --- the ways round that bad input had hidden -------------------------------------------------------------------------


def test_query_heads_alone_are_pruned_and_counted() -> None:
    report = llmprune.prune(llama(), None, {"query": 0.5}, importance="l1")
    assert report.after.macs < report.before.macs
    assert report.verification is not None


def test_a_half_precision_model_is_pruned_saved_loaded_and_pruned_again(tmp_path: Path) -> None:
    """Its rotary frequencies were rounded with it, so the checkpoint stores them; so must the next."""
    model = llama().to(torch.bfloat16)
    llmprune.prune(model, None, {"ffn": 0.25}, importance="l1", output=tmp_path / "once", protect_first=1)
    again = llmprune.from_pretrained(tmp_path / "once")
    report = llmprune.prune(again, None, {"query": 0.5}, importance="l1", output=tmp_path / "twice")
    assert report.form == "universal"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "twice", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, again(IDS).logits)


def test_an_explanation_can_be_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = "model.layers.0.mlp.up_proj.weight:0:1"
    code, out, _ = run(capsys, "trace", str(folder), "--json", "--explain", target)
    assert code == 0
    value = json.loads(out)
    assert (value["parameter"], value["dim"], value["index"]) == (target.split(":")[0], 0, 1)
    assert any("down_proj" in line for line in value["explanation"])
