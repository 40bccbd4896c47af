"""How fast a model reads and writes, and what its cache weighs, measured by running it."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llmprune.evaluation.perplexity import positions
from llmprune.tracing.inputs import example_inputs
from llmprune.tracing.wrapped import on_uncompiled

PROMPT, GENERATED, REPEATS, WARM_UP = 128, 32, 7, 2
"""Tokens read, tokens written, measured repeats, and repeats before that are not."""


@dataclass(frozen=True)
class Timing:
    """One operation, repeated.

    Attributes:
        median: seconds.
        quartiles: seconds, the 25th and the 75th percentile.
        tokens_per_second: at the median.
        repeats: how often it was measured.
    """

    median: float
    quartiles: tuple[float, float]
    tokens_per_second: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float], tokens: int) -> Timing:
        """The figures of a list of times, each for ``tokens`` tokens."""
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(middle, (low, high), tokens / middle, len(seconds))


@dataclass(frozen=True)
class Latency:
    """Speed of one sequence on the model's device, and its cache.

    Attributes:
        device: where it ran.
        prompt: tokens read at once.
        generated: tokens written after them, one by one.
        prefill: reading the prompt.
        decode: one further token; None for a model that keeps no cache.
        cache_bytes: bytes of the cache after ``prompt`` tokens.
        cache_bytes_per_token: what one more token adds.
    """

    device: str
    prompt: int
    generated: int
    prefill: Timing
    decode: Timing | None
    cache_bytes: int
    cache_bytes_per_token: int

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@on_uncompiled
@torch.no_grad()
def latency(
    model: Any,
    prompt: int = PROMPT,
    generated: int = GENERATED,
    repeats: int = REPEATS,
    warm_up: int = WARM_UP,
) -> Latency:
    """Measure a causal language model on one made-up sequence.

    Times are wall time; on a CUDA device they are taken by its events. Each repeat reads the prompt and then writes
    token after token from the cache, so that decode has ``repeats * generated`` measurements.

    Args:
        model: a causal language model in evaluation mode.
        prompt: tokens to read; cut so that prompt and generated tokens fit the model's positions.
        generated: tokens to write.
        repeats: measured repeats.
        warm_up: unmeasured ones before.
    """
    limit = positions(model)
    if limit is not None:
        generated = max(1, min(generated, limit // 4))
        prompt = max(2, min(prompt, limit - generated))
    device = next(model.parameters()).device
    ids = example_inputs(model, batch=1, length=prompt)["input_ids"].to(device)
    prefill: list[float] = []
    decode: list[float] = []
    bytes_read = bytes_written = 0
    for repeat in range(warm_up + repeats):
        output, seconds = _timed(lambda: model(ids, use_cache=True), device)
        cache = _cache(model, output)
        if repeat >= warm_up:
            prefill.append(seconds)
        if cache is None:
            continue
        bytes_read = _bytes(cache)
        following = output.logits[:, -1:].argmax(-1)
        for _ in range(generated):
            step = {**cache, "input_ids": following, "use_cache": True}
            output, seconds = _timed(lambda step=step: model(**step), device)  # type: ignore[misc]
            cache = _cache(model, output) or cache
            following = output.logits[:, -1:].argmax(-1)
            if repeat >= warm_up:
                decode.append(seconds)
        bytes_written = _bytes(cache)
    return Latency(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        prompt=prompt,
        generated=generated,
        prefill=Timing.of(prefill, prompt),
        decode=Timing.of(decode, 1) if decode else None,
        cache_bytes=bytes_read,
        cache_bytes_per_token=round((bytes_written - bytes_read) / generated),
    )


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What the call returns, and its seconds."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        result = work()
        end.record()
        end.synchronize()
        return result, begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def _cache(model: Any, output: Any) -> dict[str, Any] | None:
    """What the forward pass returned to be handed to the next one: name -> value; None if there is nothing."""
    taken = set(inspect.signature(model.forward).parameters) - {"input_ids", "attention_mask", "logits"}
    found = {
        name: value
        for name, value in output.items()
        if name in taken and next(_tensors(value, set()), None) is not None
    }
    return found or None


def _bytes(value: Any) -> int:
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in _tensors(value, set())}.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor inside a cache, whatever it is made of."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    if isinstance(value, dict):
        parts: Any = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    else:
        parts = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, type) else ()
    for part in parts:
        yield from _tensors(part, seen)
