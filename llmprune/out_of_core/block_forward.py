"""Forward passes of models whose weights stay in their files, one block in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from llmprune.out_of_core.block_weights import (
    Outside,
    Weights,
    exclusive,
    kinds_of,
    shells,
    stands,
    surrogates,
)
from llmprune.out_of_core.stored import source_of
from llmprune.scoring.importance import lookup
from llmprune.scoring.interpose import Interposer
from llmprune.scoring.recompute import Block, watch_blocks
from llmprune.scoring.reduction import Reducer

Change = Callable[[str, torch.Tensor], None]
"""Called with the name of a parameter and its values as they come into memory, which it may change."""


@contextlib.contextmanager
def by_blocks(
    model: nn.Module,
    run: Callable[[], Any],
    samples: int,
    change: Change | None = None,
    whole: set[str] | None = None,
) -> Iterator[None]:
    """Within the block ``model`` runs without gradients, and reads each repeated block when it comes to it.

    Args:
        model: As :func:`llmprune.out_of_core.stored.open_model` makes it.
        run: Runs the model once on ``samples`` samples; the repeated blocks are found by it. A model that has none is
            read whole.
        samples: How many samples ``run`` gives it.
        change: Changes parameters as they are read.
        whole: Names of parameters that are read whole, wherever they lie.
    """
    source = source_of(model)
    assert source is not None
    counter = Reducer(lookup("l1"), {}, 2, {}, lambda name: None)
    with shells(model) as parameters, torch.no_grad():
        outside = Outside(model, source, parameters)
        outside.keep(whole or set())
        kinds = kinds_of(model)
        mode = Interposer({}, set(), set(), counter, outside.stored)
        with surrogates(model, source, parameters, kinds):
            outside.load(kinds)
            with watch_blocks(model, samples) as found, mode:
                run()
            blocks = found()
        outside.load([[block.module] for block in blocks])
        for name in outside.names():
            if change is not None:
                change(name, parameters[name].data)
        if not blocks:
            with mode:
                yield
            return
        weights = Weights(source, parameters, exclusive(model, [block.module for block in blocks]), 2)
        numbers = {id(block.module): number for number, block in enumerate(blocks)}

        def call(block: Block, args: Any, kwargs: Any) -> Any:
            number = numbers[id(block.module)]
            following = number + 1 if number + 1 < len(blocks) else None
            with weights.present(number, following):
                if change is not None:
                    weights.change(number, change)
                return block.module(*args, **kwargs)

        try:
            with stands(model, blocks, call), mode:
                yield
        finally:
            weights.close()
