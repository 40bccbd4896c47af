"""A tokenizer as llama.cpp wants it, from ``tokenizer.json``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from llmprune.checkpoints.loading import load_tokenizer
from llmprune.errors import InputError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_GPT2 = "gpt-2"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS + _REST: "qwen2", _WORDS + "{1,3}" + _REST: "llama-bpe"}
"""How text is split before byte pairs are merged -> llama.cpp's name for that."""
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens in GGUF."""
_NEVER = -1e9
"""The score of a token that no merge gives."""


def add_vocabulary(writer: Any, folder: Path, size: int) -> None:
    """Add the folder's tokenizer, with as many tokens as the embedding has rows.

    Raises:
        InputError: there is none, or llama.cpp has no tokenizer like it.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{folder} has no tokenizer.json: save the model's fast tokenizer there")
    values = json.loads(file.read_text(encoding="utf-8"))
    model = values["model"]
    if model["type"] != "BPE":
        raise InputError(
            f"a tokenizer of type {model['type']} has no GGUF form here: byte-pair encodings have one"
        )
    tokens = {number: text for text, number in model["vocab"].items()}
    added = {token["id"]: token for token in values.get("added_tokens", ())}
    tokens |= {number: token["content"] for number, token in added.items()}
    if tokens and max(tokens) >= size:
        raise InputError(f"the tokenizer of {folder} has token {max(tokens)}, and the embedding {size} rows")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    pieces = _is_sentencepiece(values)
    types, texts = [], []
    for number in range(size):
        text = tokens.get(number)
        texts.append(f"[unused{number}]" if text is None else text)
        types.append(_type(text, added.get(number), model.get("unk_token"), pieces))
    if pieces:
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(texts)
        writer.add_token_scores([-float(ranks[t]) if t in ranks else _NEVER for t in texts])
        writer.add_token_types(types)
        writer.add_add_space_prefix(_prepends(values))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(values))
        writer.add_token_list(texts)
        writer.add_token_types(types)
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
    _add_special(writer, folder, tokens, values)


def _type(text: str | None, added: Any, unknown: str | None, pieces: bool) -> int:
    if text is None:
        return UNUSED
    if text == unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.get("special") else USER
    return BYTE if pieces and _BYTE.fullmatch(text) else NORMAL


def _is_sentencepiece(values: Any) -> bool:
    """Whether spaces are written as SentencePiece does, and not as bytes."""
    return "\u2581" in json.dumps(values.get("normalizer") or {}, ensure_ascii=False) or (
        (values.get("pre_tokenizer") or {}).get("type") == "Metaspace"
    )


def _prepends(values: Any) -> bool:
    normalizer = json.dumps(values.get("normalizer") or {})
    before = values.get("pre_tokenizer") or {}
    return '"Prepend"' in normalizer or before.get("prepend_scheme") in ("always", "first")


def _split(values: Any) -> str:
    """llama.cpp's name for how text is split before merging.

    Raises:
        InputError: it knows none like that.
    """
    before = values.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    if len(steps) == 1 and steps[0].get("type") == "ByteLevel" and steps[0].get("use_regex", True):
        return _GPT2
    if len(steps) == 2 and steps[1].get("type") == "ByteLevel" and not steps[1].get("use_regex", True):
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        if pattern in _SPLITS:
            return _SPLITS[pattern]
    raise InputError(
        "llama.cpp knows no way of splitting text like this tokenizer's: GPT-2's, Qwen2's and Llama 3's have a GGUF "
        "form here"
    )


def _add_special(writer: Any, folder: Path, tokens: dict[int, str], values: Any) -> None:
    tokenizer: Any = load_tokenizer(folder)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    start = tokenizer("a").input_ids[:1]
    writer.add_add_bos_token(bool(start) and start[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer("a").input_ids[-1] == tokenizer.eos_token_id)
