"""What is written loads as the same model: in both forms, for many families, where llmprune is not installed too."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_models import (
    FAMILIES,
    build,
    evenly,
    expect,
    generated,
    inputs,
    isolated,
    logits,
    prune,
    read_without_llmprune,
)
from safetensors.torch import load_file

import llmprune
from llmprune.checkpoints.checkpoint import load_model, save_pretrained
from llmprune.errors import CheckpointError, InputError

# Families whose config can state a smaller number of heads: those whose head width does not follow from it.
STOCK = {"llama_mha", "llama_gqa", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "t5", "mixtral"}
# Of six heads one less leaves five: what Llama's config and Qwen2's (by head_dim being absent) make of it.


def remove(family: str) -> Any:
    """Uniform removal that leaves a head count which divides the hidden size."""
    if family == "llama_mha":
        return lambda axis: {"head": [1, 4], "ffn": [0, 5, 6, 9]}.get(axis.kind, [])
    return evenly


def raggedly(axis: Any) -> list[int]:
    """One index of the first layer, two of the second."""
    if axis.kind not in ("ffn", "head"):
        return []
    return [1] if ".0." in axis.members[0].parameter else [0, 2]


def one_pair(axis: Any) -> list[int]:
    """One pair of rope's dimensions, which leaves other frequencies than a config asks for."""
    return [1] if axis.kind == "head_dim" else []


@pytest.fixture(scope="module")
def pruned() -> dict[str, Any]:
    models = {family: prune(build(family), remove(family)) for family in FAMILIES}
    models["ragged"] = prune(build("llama_tied"), raggedly)
    models["rope"] = prune(build("llama_gqa", torch.bfloat16), one_pair)
    return models


def test_every_family_reloads_without_llmprune(pruned: dict[str, Any], tmp_path: Path) -> None:
    folders, wanted = [], []
    for family, model in pruned.items():
        for form in ("auto", "universal"):
            folder = tmp_path / f"{family}-{form}"
            saved = save_pretrained(model, folder, form=form, inputs=inputs(model))
            assert saved.form == ("stock" if form == "auto" and family in STOCK else "universal"), family
            assert saved.max_error is not None
            assert saved.max_error <= 1e-6
            expect(model, folder)
            folders.append(folder)
            wanted.append(
                f"{folder.name} {type(model).__name__} {model.config.model_type} {saved.form == 'universal'}"
            )
    assert read_without_llmprune(folders, tmp_path) == wanted


def test_from_pretrained_gives_the_same_model_and_its_record(pruned: dict[str, Any], tmp_path: Path) -> None:
    for family in ("llama_gqa", "gpt2", "mixtral"):
        model = pruned[family]
        save_pretrained(model, tmp_path / family, inputs=inputs(model))
        again = llmprune.from_pretrained(tmp_path / family)
        assert type(again) is type(model)
        assert torch.equal(logits(again), logits(model))
        assert torch.equal(generated(again), generated(model))
        assert again.llmprune.kept.keys() == model.llmprune.kept.keys()
        for name, dims in model.llmprune.kept.items():
            for dim, positions in dims.items():
                np.testing.assert_array_equal(again.llmprune.kept[name][dim], positions)
        assert again.llmprune.attributes == model.llmprune.attributes
        assert again.llmprune.history == model.llmprune.history
        assert not hasattr(again.config, "llmprune")


@pytest.mark.parametrize("form", ["stock", "universal"])
def test_a_reloaded_model_can_be_pruned_and_saved_again(
    pruned: dict[str, Any], tmp_path: Path, form: str
) -> None:
    save_pretrained(pruned["llama_gqa"], tmp_path / "once", form=form)
    once = load_model(tmp_path / "once")
    twice = prune(once, lambda axis: {"ffn": [2], "head": [0]}.get(axis.kind, []))
    assert twice.llmprune.original_shapes == pruned["llama_gqa"].llmprune.original_shapes
    assert twice.config.num_key_value_heads == once.config.num_key_value_heads  # the file's, not the sizes'
    for second in ("auto", "universal"):
        save_pretrained(twice, tmp_path / second, form=second)
        thrice = load_model(tmp_path / second)
        assert torch.equal(logits(thrice), logits(twice))
        assert len(thrice.llmprune.history) == 2
        original = build("llama_gqa").state_dict()
        for name, dims in thrice.llmprune.kept.items():
            part = original[name]
            for dim, positions in dims.items():
                part = part.index_select(dim, torch.as_tensor(positions))
            assert torch.equal(part, thrice.state_dict()[name])


def test_ragged_layers_have_no_stock_form(pruned: dict[str, Any], tmp_path: Path) -> None:
    model = pruned["ragged"]
    assert len({layer.mlp.up_proj.out_features for layer in model.model.layers}) == 2
    with pytest.raises(CheckpointError, match="no stock form"):
        save_pretrained(model, tmp_path / "stock", form="stock")
    assert list(tmp_path.iterdir()) == []


def test_of_tied_weights_one_name_is_stored(pruned: dict[str, Any], tmp_path: Path) -> None:
    model = pruned["ragged"]
    save_pretrained(model, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    again = load_model(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_rope_frequencies_that_were_cut_are_stored(pruned: dict[str, Any], tmp_path: Path) -> None:
    model = pruned["rope"]
    save_pretrained(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "model.rotary_emb.inv_freq" in config["llmprune"]["buffers"]
    again = load_model(tmp_path / "out")
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq.float())
    assert torch.equal(logits(again), logits(model))


SAVED_ELSEWHERE = """
import sys
sys.modules["llmprune"] = None
import torch, transformers
first, second, noted = sys.argv[1:]
expected = torch.load(noted)
model = transformers.AutoModelForCausalLM.from_pretrained(first, trust_remote_code=True)
model.save_pretrained(second)
model = transformers.AutoModelForCausalLM.from_pretrained(second, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model(**expected["inputs"]).logits, expected["logits"])
"""


def test_it_survives_being_saved_by_transformers(pruned: dict[str, Any], tmp_path: Path) -> None:
    """Fine-tuning elsewhere ends in the stock save_pretrained."""
    model = pruned["gpt2"]
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    save_pretrained(model, first)
    expect(model, first)
    run = subprocess.run(
        [sys.executable, "-c", SAVED_ELSEWHERE, str(first), str(second), str(tmp_path / "first.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=isolated(tmp_path),
    )
    assert run.returncode == 0, run.stderr[-2000:]
    again = load_model(second)  # without llmprune.json: what was removed is forgotten, what is left is not
    assert torch.equal(logits(again), logits(model))
    save_pretrained(again, third)
    assert torch.equal(logits(load_model(third)), logits(model))


def test_shards_have_an_index(pruned: dict[str, Any], tmp_path: Path) -> None:
    model = pruned["opt"]
    save_pretrained(model, tmp_path / "out", max_shard_size=4000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(model))


def test_the_model_is_left_as_it_was(pruned: dict[str, Any], tmp_path: Path) -> None:
    model = copy.deepcopy(pruned["gpt2"]).train()
    before, state = model.config.to_dict(), torch.get_rng_state()
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_pretrained(model, tmp_path / "out")
    assert model.config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


def test_an_unpruned_model_is_saved_as_it_is(tmp_path: Path) -> None:
    model = build("llama_gqa")
    assert save_pretrained(model, tmp_path / "out").form == "stock"
    assert not (tmp_path / "out" / "llmprune.json").exists()
    again = load_model(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert not hasattr(again, "llmprune")


def test_the_folder_tells_what_was_done(pruned: dict[str, Any], tmp_path: Path) -> None:
    from folders import tokenizer

    model = pruned["llama_gqa"]
    model.generation_config.max_new_tokens = 17
    try:
        save_pretrained(
            model,
            tmp_path / "out",
            tokenizer=tokenizer(),
            figures={"perplexity": (3.25, 4.5)},
            form="universal",
        )
    finally:
        model.generation_config.max_new_tokens = None
    out = tmp_path / "out"
    record = json.loads((out / "llmprune.json").read_text())
    assert record["form"] == "universal"
    assert record["model_class"] == "LlamaForCausalLM"
    assert set(record["history"][0]["versions"]) >= {"python", "torch", "transformers", "numpy"}
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 17
    assert (out / "tokenizer.json").is_file()
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "trust_remote_code=True" in card
    assert "| perplexity | 3.25 | 4.5 | |" in card
    before, after = (
        sum(p.numel() for p in build("llama_gqa").parameters()),
        sum(p.numel() for p in model.parameters()),
    )
    assert f"| parameters | {before:,} | {after:,} |" in card
    for file in out.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_the_modeling_file_needs_nothing_else(pruned: dict[str, Any], tmp_path: Path) -> None:
    import ast

    save_pretrained(pruned["bert"], tmp_path / "out")
    tree = ast.parse((tmp_path / "out" / "modeling_llmprune.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules == {"__future__", "copy", "typing", "torch", "transformers"}
    assert not (tmp_path / "out" / "__pycache__").exists()


def test_a_form_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown checkpoint form 'onnx'"):
        save_pretrained(build("llama_gqa"), tmp_path / "out", form="onnx")


def test_a_plain_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Linear is no model class of transformers"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path / "out")


def test_a_record_that_lies_about_an_attribute_is_found_out(pruned: dict[str, Any], tmp_path: Path) -> None:
    from dataclasses import replace

    model = copy.deepcopy(pruned["gpt2"])
    wrong = [replace(a, value=21) if a.name == "split_size" else a for a in model.llmprune.attributes]
    assert wrong != model.llmprune.attributes
    model.llmprune.attributes = wrong
    with pytest.raises(CheckpointError, match="nothing was saved"):
        save_pretrained(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_half_pruned_model_is_refused(pruned: dict[str, Any], tmp_path: Path) -> None:
    model = copy.deepcopy(pruned["llama_gqa"])
    model.llmprune.state = "broken"
    with pytest.raises(CheckpointError, match="half pruned"):
        save_pretrained(model, tmp_path / "out")


def test_a_model_with_another_tensor_is_refused(pruned: dict[str, Any], tmp_path: Path) -> None:
    model = copy.deepcopy(pruned["llama_gqa"])
    model.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"has model\.layers\.0\.extra"):
        save_pretrained(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
