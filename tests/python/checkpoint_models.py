"""Small models of many families, pruned for the tests of checkpoints, and a reader that knows nothing of llmprune."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import llmprune

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
PLAIN = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}


def _gpt2() -> tuple[type[Any], Any]:
    return tf.GPT2LMHeadModel, tf.GPT2Config(
        vocab_size=61,
        n_positions=64,
        n_embd=24,
        n_layer=2,
        n_head=6,
        n_inner=20,
        bos_token_id=1,
        eos_token_id=None,
    )


def _t5() -> tuple[type[Any], Any]:
    return tf.T5ForConditionalGeneration, tf.T5Config(
        vocab_size=61,
        d_model=24,
        d_kv=8,
        d_ff=20,
        num_layers=2,
        num_heads=5,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
    )


FAMILIES: dict[str, Callable[[], tuple[type[Any], Any]]] = {
    "llama_mha": lambda: (tf.LlamaForCausalLM, tf.LlamaConfig(**{**SIZES, "num_key_value_heads": 6})),
    "llama_gqa": lambda: (tf.LlamaForCausalLM, tf.LlamaConfig(**SIZES)),
    "llama_tied": lambda: (tf.LlamaForCausalLM, tf.LlamaConfig(**{**SIZES, "tie_word_embeddings": True})),
    "mistral": lambda: (tf.MistralForCausalLM, tf.MistralConfig(**SIZES)),
    "qwen2": lambda: (tf.Qwen2ForCausalLM, tf.Qwen2Config(**{**PLAIN, "num_key_value_heads": 3})),
    "qwen3": lambda: (tf.Qwen3ForCausalLM, tf.Qwen3Config(**SIZES)),
    "gemma": lambda: (tf.GemmaForCausalLM, tf.GemmaConfig(**{**SIZES, "tie_word_embeddings": True})),
    "gpt2": _gpt2,
    "opt": lambda: (tf.OPTForCausalLM, tf.OPTConfig(**PLAIN, ffn_dim=20, word_embed_proj_dim=24)),
    "bert": lambda: (tf.BertForMaskedLM, tf.BertConfig(**PLAIN)),
    "t5": _t5,
    "mixtral": lambda: (
        tf.MixtralForCausalLM,
        tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    ),
}


def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with weights large enough that a wrongly placed channel shows."""
    kind, config = FAMILIES[family]()
    torch.manual_seed(0)
    model = kind(config).to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                torch.randn_like(p) * 0.3 + (p.dim() == 1 and "norm" in name.lower() and "bias" not in name)
            )
    return model


def inputs(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(1))
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def prune(model: Any, remove: Callable[[Any], list[int]]) -> Any:
    """A compacted copy without the indices that ``remove`` names of each axis."""
    graph = llmprune.trace(model, inputs(model))
    removed = {axis.id: remove(axis) for axis in graph.axes if axis.prunable and remove(axis)}
    small = copy.deepcopy(model)
    llmprune.compact(small, llmprune.plan(graph, removed=removed))
    return small


def evenly(axis: Any) -> list[int]:
    """One head and four FFN channels of every layer (experts want widths of whole 16 bytes)."""
    return {"head": [1], "ffn": [0, 5, 6, 9]}.get(axis.kind, [])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


def generated(model: Any) -> torch.Tensor:
    """Greedy continuation with a cache."""
    ids = {name: value for name, value in inputs(model).items() if not name.startswith("decoder")}
    return model.generate(**ids, do_sample=False, max_new_tokens=8)


READER = """
import json, sys
sys.modules["llmprune"] = None  # an import of it fails
import torch, transformers
from pathlib import Path

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
for folder in map(Path, sys.argv[1:]):
    config = json.loads((folder / "config.json").read_text())
    expected = torch.load(folder.parent / (folder.name + ".pt"))
    kinds = [getattr(transformers, name) for name in config.get("auto_map", {})]
    kinds = kinds or [getattr(transformers, config["architectures"][0])]
    for kind in kinds:
        model, info = kind.from_pretrained(
            folder, trust_remote_code=True, dtype=expected["dtype"], attn_implementation=expected["attention"],
            output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        inputs = expected["inputs"]
        with torch.no_grad():
            found = model(**inputs).logits
        scale = float(expected["logits"].abs().max())
        error = float((found - expected["logits"]).abs().max()) / scale
        assert error <= 1e-6, (folder.name, kind.__name__, error)
        if expected["generated"] is not None:
            ids = {name: value for name, value in inputs.items() if not name.startswith("decoder")}
            out = model.generate(**ids, do_sample=False, max_new_tokens=8)
            assert torch.equal(out, expected["generated"]), folder.name
    print(folder.name, type(model).__name__, config["model_type"], "auto_map" in config)
"""


def expect(model: Any, folder: Path) -> None:
    """Note beside ``folder`` what a model loaded from it must compute."""
    torch.save(
        {
            "inputs": inputs(model),
            "logits": logits(model),
            "generated": generated(model) if model.can_generate() else None,
            "dtype": model.dtype,
            "attention": model.config._attn_implementation,
        },
        folder.parent / f"{folder.name}.pt",
    )


def isolated(home: Path) -> dict[str, str]:
    """An environment in which transformers keeps to itself: no network, and a module cache of its own."""
    return {**os.environ, "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}


def read_without_llmprune(folders: list[Path], home: Path) -> list[str]:
    """Load the folders in a fresh process and compare with what was noted; its lines."""
    run = subprocess.run(
        [sys.executable, "-c", READER, *map(str, folders)],
        capture_output=True,
        text=True,
        cwd=home,
        env=isolated(home),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()
