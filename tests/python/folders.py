"""A model folder as users have them: a tiny Llama, a tokenizer of single characters, and texts."""

from __future__ import annotations

import string
from pathlib import Path

from compact_plans import llama
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

ALPHABET = string.ascii_lowercase + string.ascii_uppercase[:20] + " .,!?'-"
TEXT = "Once upon a time, a cat sat on a mat. It saw a dog! The dog ran, and the cat ran too. "


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, ids below the vocabulary of :func:`compact_plans.llama`."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *ALPHABET]
    inner = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = Split("", "isolated")
    inner.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_folder(path: Path, layers: int = 2) -> Path:
    """Save the model (a :func:`compact_plans.llama`) and its tokenizer under ``path``/model, texts beside them."""
    model = llama(num_hidden_layers=layers)
    model.generation_config.eos_token_id = None
    model.save_pretrained(path / "model")
    tokenizer().save_pretrained(path / "model")
    (path / "calibration.txt").write_text(TEXT * 12)
    (path / "eval.txt").write_text(TEXT[::-1] * 8)
    return path / "model"
