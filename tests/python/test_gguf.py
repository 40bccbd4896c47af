"""GGUF files: what they say and hold, by the package's reader; and llama.cpp's next tokens, where it is installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.checkpoints.loading import load_model
from llmprune.cli import main
from llmprune.errors import InputError
from llmprune.export.gguf import export_gguf

gguf = pytest.importorskip("gguf", reason="GGUF needs gguf (llmprune[gguf])")
DEMO = Path(__file__).resolve().parents[2] / "demo" / "model"
UNIFORM = {
    "ratio": {"ffn": 0.25, "head": 0.5},
    "protect_first": 0,
    "protect_last": 0,
    "allocation": "uniform",
}
UNEVEN = {"ratio": {"ffn": 0.25, "head": 0.5}, "protect_first": 1, "protect_last": 0, "allocation": "uniform"}


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The fields of a file, and its tensors as float32."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors
    }


def tiny(family: str, tied: bool | None = None) -> Any:
    config = AutoConfig.for_model(
        family, vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        tie_word_embeddings=family == "qwen3" if tied is None else tied,
    )  # fmt: skip
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).float().eval()


def pruned(place: Path, family: str, options: dict[str, Any]) -> Path:
    """A pruned tiny model with the demo's tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(DEMO) if family == "demo" else tiny(family)
    if options:
        llmprune.prune(model, importance="l2", quiet=True, **options)
    llmprune.save_pretrained(model, place / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, place / "model" / name)
    return place / "model"


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row 2 i + j of a head is its row j * half + i."""
    size = len(rows) // heads
    order = [h * size + j * (size // 2) + i for h in range(heads) for i in range(size // 2) for j in range(2)]
    return rows[order]


@pytest.mark.parametrize("options", [{}, UNIFORM, UNEVEN], ids=["whole", "uniform", "uneven"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_what_a_file_says_and_holds(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    folder = pruned(tmp_path, family, options)
    model = load_model(folder)
    tied = model.config.tie_word_embeddings
    done = export_gguf(folder, tmp_path / "m.gguf", "f32")
    fields, tensors = read(tmp_path / "m.gguf")
    own = dict(model.named_parameters())
    name = fields["general.architecture"]
    assert name == done.architecture
    heads = [len(own[f"model.layers.{i}.self_attn.q_proj.weight"]) for i in range(len(model.model.layers))]
    head = model.model.layers[0].self_attn.head_dim
    alike = len(set(heads)) == 1
    if alike and (family != "qwen2" or heads[0] == model.config.hidden_size):
        assert name == {"mistral": "llama"}.get(family, family)
        assert fields[f"{name}.attention.head_count"] == heads[0] // head
    else:
        assert name == ("openelm" if family == "qwen3" else "deci")
        assert fields[f"{name}.attention.head_count"] == [rows // head for rows in heads]
    expected = set()
    for key, parameter in own.items():
        parts = key.split(".")
        value = parameter.detach().numpy()
        if parts[1] != "layers":
            continue
        short = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}.get(parts[3])
        if short is None:
            short = ("ffn_" if parts[3] == "mlp" else "attn_") + parts[4].removesuffix("_proj")
            short = {"attn_o": "attn_output"}.get(short, short)
        theirs = f"blk.{parts[2]}.{short}.{parts[-1]}"
        if name == "openelm" and short in ("attn_q", "attn_k", "attn_v"):
            theirs = f"blk.{parts[2]}.attn_qkv.weight"
            value = np.concatenate(
                [own[f"model.layers.{parts[2]}.self_attn.{k}_proj.weight"].detach().numpy() for k in "qkv"]
            )
        if name in ("llama", "deci") and short in ("attn_q", "attn_k"):
            value = in_pairs(value, len(value) // head)
        np.testing.assert_array_equal(tensors[theirs], value, err_msg=theirs)
        expected.add(theirs)
    rest = {"token_embd.weight", "output_norm.weight"} | (set() if tied else {"output.weight"})
    assert set(tensors) == expected | rest
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = fields["tokenizer.ggml.tokens"]
    assert all(words[number] == word for word, number in tokenizer["model"]["vocab"].items())
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.bos_token_id"] == AutoTokenizer.from_pretrained(folder).bos_token_id


def test_types(tmp_path: Path) -> None:
    sizes = {}
    for kind in ("f32", "f16", "q8_0"):
        done = export_gguf(DEMO, tmp_path / f"{kind}.gguf", kind)
        sizes[kind] = done.bytes
        assert done.wider == []
        _, tensors = read(tmp_path / f"{kind}.gguf")
        if kind == "f32":
            exact = tensors
        for name, values in tensors.items():
            scale = np.abs(exact[name]).max()
            np.testing.assert_allclose(
                values, exact[name], atol={"f32": 0, "f16": 1e-3, "q8_0": 1e-2}[kind] * scale
            )
    assert sizes["f32"] > 1.9 * sizes["f16"] > 1.7 * 1.8 * sizes["q8_0"] / 1.8


def test_a_qwen3_with_a_projection_of_its_own_is_to_be_pruned_alike(tmp_path: Path) -> None:
    model = tiny("qwen3", tied=False)
    llmprune.prune(model, importance="l2", quiet=True, **UNEVEN)
    llmprune.save_pretrained(model, tmp_path / "model")
    shutil.copyfile(DEMO / "tokenizer.json", tmp_path / "model" / "tokenizer.json")
    with pytest.raises(InputError, match="embedding is its output projection only"):
        export_gguf(tmp_path / "model", tmp_path / "m.gguf")


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "m.gguf"
    with pytest.raises(InputError, match="unknown GGUF type 'q4'"):
        export_gguf(DEMO, target, "q4")
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="of type 'gpt2' has no GGUF form here"):
        export_gguf(tmp_path / "gpt2", target)
    build("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        export_gguf(tmp_path / "bare", target)
    values = json.loads((DEMO / "tokenizer.json").read_text())
    shutil.copytree(DEMO, tmp_path / "odd")
    values["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "odd" / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="no way of splitting text like this"):
        export_gguf(tmp_path / "odd", target)
    assert not target.exists()
    assert main(["export", str(DEMO), "--gguf", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "llama"
    assert main(["export", str(DEMO), "--gguf", str(target)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "gpt2", "m.gguf", "odd"]


def theirs(path: Path, ids: list[int], count: int) -> list[int]:
    """What llama.cpp goes on with, most likely token by most likely token."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = llama_cpp.Llama(str(path), n_ctx=128, verbose=False, logits_all=False, n_threads=1)
    out: list[int] = []
    for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        out.append(token)
        if len(out) == count:
            return out
    return out


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, UNIFORM, UNEVEN], ids=["whole", "uniform", "uneven"])
@pytest.mark.parametrize("family", ["demo", "llama", "qwen2", "qwen3"])
def test_llama_cpp_goes_on_as_transformers_does(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder = pruned(tmp_path, family, options)
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    model = load_model(folder)
    ids = AutoTokenizer.from_pretrained(folder)("Once upon a time there was").input_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
        want = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=-1)[
            0, len(ids) :
        ]
    assert torch.isfinite(logits).all()
    assert theirs(tmp_path / "m.gguf", ids, 16) == want.tolist()
