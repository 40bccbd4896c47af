"""What can be asked of a recovery, and what is refused before any work."""

from __future__ import annotations

import math
from typing import Any

from llmprune.arguments import is_whole
from llmprune.errors import InputError
from llmprune.evaluation.perplexity import positions
from llmprune.recovery.examples import CUTOFF, Data

METHODS = ("lora", "dora", "full")
OPTIMIZERS = ("adamw", "lamb")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")

RATES = {"lora": 1e-4, "dora": 1e-4, "full": 2e-5}
"""Method -> learning rate (the paper's code for LoRA)."""


def check(settings: dict[str, Any], teacher: Any, dataset: Any) -> None:
    """Refuse before any work what could not be carried out."""
    if dataset is None:
        raise InputError("recovery needs data: a path or a list of records")
    for name, known in (("method", METHODS), ("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        if settings[name] not in known:
            raise InputError(f"unknown {name} {settings[name]!r}: there are {', '.join(known)}")
    for name in (
        "rank",
        "alpha",
        "batch_size",
        "micro_batch_size",
        "steps",
        "validate_every",
        "patience",
        "top_k",
    ):
        value = settings[name]
        if value is not None and not is_whole(value, 1):
            raise InputError(f"{name} is {value!r}: it must be a whole number of at least 1")
    for name in ("learning_rate", "epochs"):
        if not (settings[name] > 0 and math.isfinite(settings[name])):
            raise InputError(f"{name} is {settings[name]}: it must be positive")
    for name in ("dropout", "distill_weight"):
        if not 0 <= settings[name] <= 1:
            raise InputError(f"{name} is {settings[name]}: it must lie between 0 and 1")
    if settings["warmup"] is not None and settings["warmup"] < 0:
        raise InputError(f"warmup is {settings['warmup']}: it cannot be negative")
    if settings["patience"] is not None and settings["validation"] == 0:
        raise InputError("patience needs validation: keep some examples for it")
    if settings["distill"] and teacher is None:
        raise InputError(
            "distillation needs a teacher: give the unpruned model, or its folder (--teacher DIR)"
        )
    if teacher is not None and not settings["distill"]:
        raise InputError(
            "a teacher is given and distillation is off: switch it on (--distill) or leave the teacher out"
        )
    if settings["optimizer"] == "lamb":
        lamb()


def lamb() -> Any:
    try:
        from pytorch_optimizer import Lamb
    except ImportError as error:
        raise InputError(
            "the optimizer lamb is in another package: pip install pytorch_optimizer, or take adamw"
        ) from error
    return Lamb


def cutoff_of(model: Any, cutoff: int | None) -> int:
    limit = positions(model)
    if cutoff is None:
        return min(CUTOFF, limit or CUTOFF)
    if limit is not None and cutoff > limit:
        raise InputError(
            f"a cutoff of {cutoff} tokens is beyond the {limit} positions of {type(model).__name__}"
        )
    return cutoff


def check_vocabulary(model: Any, data: Data) -> None:
    """Raise InputError for ids that the embedding does not have: the tokenizer is another model's."""
    embedding = model.get_input_embeddings()
    known = getattr(embedding, "num_embeddings", None)
    largest = max(max(example.ids) for example in (*data.train, *data.validation))
    if known is not None and largest >= known:
        raise InputError(
            f"the data has the token id {largest} and {type(model).__name__} knows {known}: the tokenizer is another "
            "model's"
        )
