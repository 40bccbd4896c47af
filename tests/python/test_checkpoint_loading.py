"""Every way in which a checkpoint folder can be unusable has its own sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_models import build, logits
from folders import tokenizer
from safetensors.torch import load_file, save_file

from llmprune.checkpoints.checkpoint import load_model, load_tokenizer, save_pretrained
from llmprune.errors import CheckpointError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    build("llama_gqa").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    build("llama_gqa").save_pretrained(tmp_path / "model", max_shard_size=4000)
    return tmp_path / "model"


def edit_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refusal(folder: Path, **options: bool) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_whole_folder_loads(folder: Path) -> None:
    assert torch.equal(logits(load_model(folder)), logits(build("llama_gqa")))


def test_loading_draws_no_random_numbers_and_leaves_transformers_as_it_was(folder: Path) -> None:
    from transformers.utils import logging

    before, level, bars = torch.get_rng_state(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


def test_no_folder(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


def test_a_torn_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])
    assert "config.json cannot be read" in refusal(folder)
    (folder / "config.json").write_text("[]")
    assert "no JSON object" in refusal(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(folder)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(folder: Path, keep: float) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    message = refusal(folder)
    assert "model.safetensors is truncated or damaged" in message


def test_a_pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "as a pickle only (pytorch_model.bin)" in message
    assert "save_pretrained" in message


def test_an_absent_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"{shard.name} is missing" in refusal(sharded)


def test_a_tensor_that_is_not_where_the_index_says(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    assert f"{shard.name} lacks {name}" in refusal(sharded)


def test_an_index_without_a_map(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refusal(sharded)


def test_a_missing_tensor(folder: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]

    edit_weights(folder, drop)
    assert "lacks model.norm.weight of the LlamaForCausalLM" in refusal(folder)


def test_a_tensor_of_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=24)
    assert "has shape (24, 20), but the folder's config asks for (24, 24)" in refusal(folder)


def test_quantised_weights(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised weights (gptq)" in refusal(folder)


def test_packed_weights(folder: Path) -> None:
    def pack(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors.pop("model.layers.0.mlp.up_proj.weight")
        tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(
            weight.shape[0], weight.shape[1] // 8, dtype=torch.int32
        )

    edit_weights(folder, pack)
    message = refusal(folder)
    assert "lacks model.layers.0.mlp.up_proj.weight" in message
    assert "up_proj.qweight is I32: are the weights packed?" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_not_float(folder: Path, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    edit_weights(folder, change)
    assert f"{name} in {folder} holds" in refusal(folder)


def test_a_dtype_that_is_not_float(folder: Path) -> None:
    edit_config(folder, dtype="int8")
    assert "states dtype int8" in refusal(folder)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_weights_that_are_not_finite(folder: Path, value: float, word: str) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 4] = value

    edit_weights(folder, change)
    assert f"{name} in {folder} holds {word} values" in refusal(folder)


CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
raise RuntimeError("this must not run")
"""


def test_code_in_the_folder_runs_only_if_allowed(folder: Path) -> None:
    (folder / "modeling_own.py").write_text(CODE)
    edit_config(
        folder,
        architectures=["OwnForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    )
    message = refusal(folder)
    assert "trust_remote_code=True" in message
    assert "modeling_own.OwnForCausalLM" in message
    assert not (folder / "ran").exists()
    assert "this must not run" in refusal(folder, trust_remote_code=True)


def test_our_own_form_runs_no_code_of_the_folder(tmp_path: Path) -> None:
    from checkpoint_models import evenly, prune

    model = prune(build("gpt2"), evenly)
    save_pretrained(model, tmp_path / "out")
    (tmp_path / "out" / "modeling_llmprune.py").write_text(CODE)
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(model))
    assert not (tmp_path / "out" / "ran").exists()


def test_an_unknown_class(folder: Path) -> None:
    edit_config(folder, architectures=["TomorrowForCausalLM"])
    assert "has no TomorrowForCausalLM" in refusal(folder)
    edit_config(folder, architectures=[])
    assert "names no architectures" in refusal(folder)


def test_a_form_of_tomorrow(folder: Path) -> None:
    edit_config(folder, llmprune={"format": 99})
    assert "newer llmprune" in refusal(folder)


def test_a_torn_record(folder: Path) -> None:
    (folder / "llmprune.json").write_text('{"format": 1}')
    assert "llmprune.json is damaged" in refusal(folder)


def test_tokenizers(folder: Path) -> None:
    assert load_tokenizer(folder) is None
    tokenizer().save_pretrained(folder)
    loaded = load_tokenizer(folder)
    assert loaded is not None
    assert loaded("cat")["input_ids"] == tokenizer()("cat")["input_ids"]
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer in .* cannot be loaded"):
        load_tokenizer(folder)
