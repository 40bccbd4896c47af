"""Taps on a model whose weights may be in their files: they are told where parameters are as each block comes in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmprune.errors import InputError
from llmprune.machine.budget import available_memory, resident_memory, return_memory, spell_bytes
from llmprune.out_of_core.block_forward import Memory, by_blocks
from llmprune.out_of_core.block_weights import exclusive, kinds_of
from llmprune.out_of_core.stored import source_of
from llmprune.repair.consumers import Taps
from llmprune.scoring.calibration import Batch
from llmprune.scoring.loss import logits_of

SKETCH_TOKENS = 8
_SLACK = 64 << 20
_LIVE = 10
"""Activations of a block that are alive at a time, in units of its widest one: its own, and a product's in float32."""


@contextmanager
def tapping(
    model: Any,
    taps: Taps,
    batch: Batch,
    arrived: Callable[[str], object] = lambda name: None,
    memory: Memory | None = None,
) -> Iterator[None]:
    """Within the block ``taps`` see ``model`` at work; one whose weights are in their files runs block by block.

    Args:
        model: The model.
        taps: What is to see it.
        batch: Samples like those it will be run on.
        arrived: Called with the name of each parameter before it comes into memory, where that is only now.
        memory: Of the blocks that an earlier process has done; they are not run, and not seen.
    """
    if source_of(model) is None:
        with taps:
            yield
        return

    def place(name: str, values: torch.Tensor) -> None:
        arrived(name)
        taps.place(name, values)

    sketch = batch.sketch(SKETCH_TOKENS)
    run = by_blocks(model, lambda: logits_of(model, sketch.inputs), sketch.samples, place, taps.names, memory)
    with run, taps:
        yield


def inside_blocks(model: Any) -> set[str]:
    """Names of the parameters that lie in one of the model's repeated modules alone."""
    members = [member for kind in kinds_of(model) for member in kind]
    return {name for names in exclusive(model, members) for name in names}


def check_room(model: Any, tokens: int, solving: int, budget: int | None, doing: str) -> None:
    """Refuse a pass over activations that a budget has no room for, before anything is read.

    Args:
        model: The model, its weights in their files.
        tokens: How many tokens pass at a time.
        solving: Bytes that what is done with one product's inputs takes at most.
        budget: Bytes that the process may have; None: what the machine has free.
        doing: What is done, for the message.

    Raises:
        InputError: with the smallest budget that would do.
    """
    source = source_of(model)
    assert source is not None
    parameters = dict(model.named_parameters())
    members = [member for kind in kinds_of(model) for member in kind]
    own = [names for names in exclusive(model, members) if names]
    block = max(sum(parameters[n].numel() * parameters[n].element_size() for n in names) for names in own)
    extra = max(sum(source.extra_bytes(n, parameters[n].dtype) for n in names) for names in own)
    widest = max(max(parameters[n].shape) for names in own for n in names)

    def check() -> None:
        return_memory()  # what the steps before have freed is not in use
        need = resident_memory() + 2 * block + extra + _LIVE * 4 * tokens * widest + solving + _SLACK
        room = resident_memory() + available_memory() * 9 // 10 if budget is None else budget
        if need > room:
            raise InputError(
                f"{doing} block by block takes {spell_bytes(need)} of memory, and the budget is {spell_bytes(room)}: "
                f"raise it to {spell_bytes(need)}, take fewer or shorter samples, or choose element1 without repair"
            )

    source.agreed(check)
