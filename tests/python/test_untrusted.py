"""A folder from a stranger: nothing in it is unpickled, none of its code runs unasked, its names lead nowhere else."""

from __future__ import annotations

import ast
import builtins
import inspect
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_models import build, evenly, prune
from compact_plans import llama
from folders import make_folder

import llmprune
from llmprune import cli
from llmprune.checkpoints import universal
from llmprune.checkpoints.loading import load_tokenizer
from llmprune.errors import CheckpointError, LlmpruneError
from llmprune.export.gguf import export_gguf
from llmprune.out_of_core.shards import INDEX, find_tensors

PACKAGE = Path(inspect.getfile(llmprune)).parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("untrusted"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for the model of the folders."""
    graph = llmprune.trace(llama())
    ffn = next(axis.id for axis in graph.axes if axis.kind == "ffn")
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    llmprune.plan(graph, removed={ffn: [1]}).save(path)
    return path


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def ways(plan: Path) -> dict[str, Callable[[Path], Any]]:
    """Every way in which a folder is read."""
    return {
        "load": llmprune.from_pretrained,
        "open_model": llmprune.open_model,
        "apply": lambda folder: llmprune.apply(plan, folder, folder.parent / "out"),
        "find_tensors": find_tensors,
        "streamed": lambda folder: _command(
            "score", str(folder), "--importance", "l1", "--stream", "--output", str(folder.parent / "s.json")
        ),
        "command": lambda folder: _command("trace", str(folder)),
        "export": lambda folder: export_gguf(folder, folder.parent / "m.gguf"),
    }


WAYS = [*ways(Path())]


def _command(*words: str) -> None:
    """A command that has to fail in one sentence, which is raised again."""
    errors: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr.write", errors.append, raising=True)
        code = cli.main([*words, "--quiet"])
    if code == 2:
        raise CheckpointError("".join(errors))
    assert code == 0


# --- pickles ---------------------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def plant(file: Path, mark: Path) -> None:
    """A pickle that runs the payload, in the plain form and in torch's."""
    torch.save({"weight": Payload(mark)}, file)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(file, weights_only=True)


def test_the_payload_works(tmp_path: Path) -> None:
    plant(tmp_path / "weights.bin", tmp_path / "ran")
    torch.load(tmp_path / "weights.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_and_not_read(folder: Path, plan: Path, way: str, name: str) -> None:
    (folder / "model.safetensors").unlink()
    plant(folder / name, folder / "ran")
    with pytest.raises(CheckpointError, match=f"as a pickle only .{name}.*can run code"):
        ways(plan)[way](folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("named", ["adapter_model.bin", "other.safetensors", "x/../../other.safetensors"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "find_tensors"])
def test_a_config_does_not_choose_the_file_of_weights(folder: Path, plan: Path, way: str, named: str) -> None:
    plant(folder / "adapter_model.bin", folder / "ran")
    edit(folder / "config.json", transformers_weights=named)
    with pytest.raises(CheckpointError, match="names a file of weights of its own"):
        ways(plan)[way](folder)
    assert not (folder / "ran").exists()


def test_pickles_beside_safetensors_are_left_alone(folder: Path, plan: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        plant(folder / name, folder / "ran")
    for way in ("load", "open_model", "apply", "streamed"):
        ways(plan)[way](folder)
    assert not (folder / "ran").exists()


def test_a_pickled_adapter_is_refused(folder: Path) -> None:
    adapter = folder.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder)})
    )
    plant(adapter / "adapter_model.bin", folder / "ran")
    with pytest.raises(CheckpointError, match="pickled adapters are not read"):
        llmprune.from_pretrained(adapter)
    assert not (folder / "ran").exists()


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    import numpy as np

    array = np.array([Payload(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "scores.npz", header=array, axis_0=array)
    with pytest.raises(LlmpruneError, match="holds no scores"):
        llmprune.Scores.load(tmp_path / "scores.npz")
    assert not (tmp_path / "ran").exists()


# --- code ------------------------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
raise RuntimeError("this must not run")
"""


@pytest.fixture
def coded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with modeling code of its own; whoever is asked at a terminal says yes."""
    (folder / "code.py").write_text(CODE)
    monkeypatch.setattr(builtins, "input", lambda *words: "y")
    return folder


@pytest.mark.parametrize(
    "name", ["OwnForCausalLM", "AutoModelForCausalLM", "AutoModel", "pipeline", "Trainer"]
)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "find_tensors"])
def test_modeling_code_runs_only_when_it_is_allowed(coded: Path, plan: Path, way: str, name: str) -> None:
    edit(
        coded / "config.json",
        architectures=[name],
        model_type="own",
        auto_map={"AutoConfig": "code.C", "AutoModel": "code.M", "AutoModelForCausalLM": "code.M"},
    )
    with pytest.raises(CheckpointError, match="needs the code it brings along"):
        ways(plan)[way](coded)
    assert not (coded / "ran").exists()


def test_a_stock_class_is_taken_from_transformers(coded: Path, plan: Path) -> None:
    code = {"AutoConfig": "code.C", "AutoModel": "code.M", "AutoModelForCausalLM": "code.M"}
    edit(coded / "config.json", auto_map=code)
    (coded / "generate.py").write_text(CODE)
    (coded / "custom_generate").mkdir()
    (coded / "custom_generate" / "generate.py").write_text(CODE)
    for way in ("load", "open_model", "apply", "streamed", "command"):
        ways(plan)[way](coded)
    assert not list(coded.rglob("ran"))


def test_code_of_a_tokenizer_does_not_run(coded: Path) -> None:
    edit(
        coded / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["code.T", "code.T"]},
    )
    try:
        assert isinstance(load_tokenizer(coded), transformers.PreTrainedTokenizerBase)
    except CheckpointError as error:
        assert "cannot be loaded" in str(error)  # noqa: PT017
    assert not (coded / "ran").exists()


@pytest.mark.parametrize("place", ["attn_implementation", "_attn_implementation"])
def test_attention_code_is_not_fetched(folder: Path, place: str) -> None:
    edit(folder / "config.json", text_config={place: {"": "someone/kernel@main:attention"}})
    for way in (llmprune.from_pretrained, llmprune.open_model):
        with pytest.raises(CheckpointError, match=r"asks for attention code from elsewhere"):
            way(folder)


def test_a_record_names_no_class_but_a_models(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    llmprune.save_pretrained(prune(build("llama_gqa"), evenly), folder, form="universal")
    edit(folder / "config.json", architectures=["Unknown"])
    for module, name in (
        ("os", "system"),
        ("transformers.utils.hub", "Path"),
        ("transformers.trainer", "Trainer"),
        ("transformers.", "x"),
    ):
        edit(folder / "llmprune.json", module=module, model_class=name)
        with pytest.raises(CheckpointError, match=r"no class of transformers|transformers .* has no"):
            llmprune.from_pretrained(folder)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder in shards, one of which is outside of it too, whole and good."""
    folder = tmp_path / "home" / "model"
    llama().save_pretrained(folder, max_shard_size=12_000)
    first = sorted(folder.glob("model-*.safetensors"))[0]
    shutil.copy(first, tmp_path / "home" / first.name)
    return folder


@pytest.mark.parametrize("how", ["above", "absolute", "below", "link", "link to a link", "backslashes"])
@pytest.mark.parametrize("way", WAYS)
def test_a_shard_outside_of_the_folder_is_refused(sharded: Path, plan: Path, way: str, how: str) -> None:
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    outside = sharded.parent / first.name
    named = {
        "above": f"../{first.name}",
        "absolute": str(outside),
        "below": f"sub/../../{first.name}",
        "backslashes": f"..\\{first.name}",
    }.get(how, first.name)
    if how == "link":
        first.unlink()
        first.symlink_to(outside)
    elif how == "link to a link":
        first.unlink()
        (sharded / "inner").symlink_to(outside)
        first.symlink_to("inner")
    index = json.loads((sharded / INDEX).read_text())
    places = {name: named if shard == first.name else shard for name, shard in index["weight_map"].items()}
    edit(sharded / INDEX, weight_map=places)
    with pytest.raises(CheckpointError, match=r"which is no file name|is a link to .*outside of the folder"):
        ways(plan)[way](sharded)


def test_links_inside_the_folder_and_in_the_hubs_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    before = find_tensors(sharded).keys()
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    first.rename(sharded / "there")
    first.symlink_to("there")
    assert find_tensors(sharded).keys() == before
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert find_tensors(snapshot).keys() == before
    assert isinstance(llmprune.from_pretrained(snapshot), torch.nn.Module)


@pytest.mark.parametrize("name", ["../config.json", "/etc/hostname", ".", ""])
def test_a_record_lists_files_of_its_folder_alone(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    llmprune.save_pretrained(prune(build("llama_gqa"), evenly), folder)
    edit(folder / "llmprune.json", sha256={name: "0"})
    with pytest.raises(CheckpointError, match=r"is missing, but llmprune\.json names it"):
        llmprune.checkpoints.loading.check_files(folder)


# --- our own code ----------------------------------------------------------------------------------------------------

IMPORTS = {"__future__", "copy", "typing", "torch", "transformers"}
CALLS = {
    *(
        "dict",
        "enumerate",
        "getattr",
        "id",
        "int",
        "isinstance",
        "len",
        "list",
        "range",
        "set",
        "setattr",
        "slice",
    ),
    *("super", "tuple", "type", "Nothing", "_assign", "_narrowed", "drop", "shrink"),
    *("__init__", "add", "clone", "copy", "detach", "empty_like", "get", "get_submodule", "items", "lstrip"),
    *("named_buffers", "named_modules", "named_parameters", "Parameter", "partition", "register_buffer"),
    *("rpartition", "split", "update", "zeros_like"),
}
"""What the modeling file may call: it builds a model, makes tensors smaller and sets attributes."""


def test_the_modeling_file_builds_and_does_nothing_else() -> None:
    tree = ast.parse(universal.source(transformers.LlamaForCausalLM))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {name.name for name in node.names} <= IMPORTS
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module in IMPORTS
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            # type(sequence)(items): another of the same kind
            assert called in CALLS or ast.unparse(node.func) == "type(sequence)", ast.unparse(node)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("__"):
            assert node.attr == "__init__"
        elif isinstance(node, ast.Name):
            assert not node.id.startswith("__"), node.id
        assert not isinstance(node, ast.Global | ast.Nonlocal | ast.AsyncFunctionDef | ast.With | ast.Try)
    statements = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Expr)
    for statement in tree.body:  # importing it defines names
        assert isinstance(statement, statements)
        assert not isinstance(statement, ast.Expr) or isinstance(statement.value, ast.Constant)


BUILTINS = {"eval", "exec", "compile"}
CALLED = {"system", "popen", "Unpickler", "load_module", "read_pickle"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_nothing_of_ours_unpickles_or_evaluates(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {name.name for name in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
        if not isinstance(node, ast.Call):
            continue
        text = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert text != "torch.load", "weights are read with safetensors"
        assert keywords.get("shell") != "True"
        if text in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle") == "False"
        # What save_pretrained has just written it runs once, to see that others can.
        assert text not in BUILTINS or path.name == "checkpoint.py"
        assert text.rpartition(".")[2] not in CALLED, text
