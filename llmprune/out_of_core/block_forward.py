"""Forward passes of models whose weights stay in their files, one block in memory at a time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from llmprune.out_of_core.block_weights import (
    Outside,
    Weights,
    exclusive,
    kinds_of,
    shells,
    stands,
    surrogates,
)
from llmprune.out_of_core.boundaries import Journal
from llmprune.out_of_core.stored import source_of
from llmprune.scoring.importance import lookup
from llmprune.scoring.interpose import Interposer
from llmprune.scoring.recompute import Block, floating, watch_blocks
from llmprune.scoring.reduction import Reducer, Sums

log = logging.getLogger(__name__)

Change = Callable[[str, torch.Tensor], None]
"""Called with the name of a parameter and its values as they come into memory, which it may change."""

_LAST = "forward"


class Memory:
    """What blocks came to is on disk before the next one runs, so that a killed process can be followed by another.

    Args:
        journal: Where it is put.
        restore: Given what an earlier process had found in the blocks that it had done.
        found: What has been found since it was last asked; None where that is not all of what the blocks so far are
            for, after which nothing is put down any more.

    Attributes:
        done: How many blocks are not to be run again.
    """

    def __init__(
        self, journal: Journal, restore: Callable[[Sums], object], found: Callable[[], Sums | None]
    ) -> None:
        self.done = 0
        self._journal, self._restore, self._found = journal, restore, found
        self._last: list[torch.Tensor] = []
        self._writes = False

    def recall(self, blocks: Sequence[Block]) -> None:
        """Look for what is there. A result that holds other tensors than floating-point ones is not put down."""
        self._writes = not any(isinstance(leaf, torch.Tensor) for block in blocks for leaf in block.result[0])
        for number in reversed(range(len(blocks) if self._writes else 0)):
            last = self._journal.get(_LAST, number, len(blocks[number].returned))
            sums = [self._journal.get_sums(n) for n in range(number + 1)]
            if last is None or any(one is None for one in sums):
                continue
            self._last = [tensor for tensor in last if tensor is not None]
            self.done = number + 1
            self._restore({name: values for one in sums if one for name, values in one.items()})
            return

    def output(self, block: Block) -> Any:
        """A block's that is done: the last one's, of the others too, which none but those before it ask for."""
        tensors = iter(self._last)
        rest, spec = block.result
        leaves = [next(tensors) if real else leaf for leaf, real in zip(rest, block.floats, strict=True)]
        return pytree.tree_unflatten(leaves, spec)

    def keep(self, number: int, output: Any) -> None:
        """A block has run."""
        sums = self._found() if self._writes else None
        self._writes = sums is not None
        if sums is None:
            log.info("block %d: its results span blocks, and are not put down", number)
            return
        self._journal.put_sums(number, sums)
        self._journal.put(_LAST, number, floating(pytree.tree_leaves(output)))
        if number:
            self._journal.drop(_LAST, number - 1)


@contextlib.contextmanager
def by_blocks(
    model: nn.Module,
    run: Callable[[], Any],
    samples: int,
    change: Change | None = None,
    whole: set[str] | None = None,
    memory: Memory | None = None,
) -> Iterator[None]:
    """Within the block ``model`` runs without gradients, and reads each repeated block when it comes to it.

    Args:
        model: As :func:`llmprune.out_of_core.stored.open_model` makes it.
        run: Runs the model once on ``samples`` samples; the repeated blocks are found by it. A model that has none is
            read whole.
        samples: How many samples ``run`` gives it.
        change: Changes parameters as they are read.
        whole: Names of parameters that are read whole, wherever they lie.
        memory: Of an earlier process that was killed: blocks that are done are not run again.
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
                blocks = found()  # the calls are forgotten at the end
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
        if memory is not None:
            memory.recall(blocks)

        def call(block: Block, args: Any, kwargs: Any) -> Any:
            number = numbers[id(block.module)]
            if memory is not None and number < memory.done:
                return memory.output(block)
            following = number + 1 if number + 1 < len(blocks) else None
            with weights.present(number, following):
                if change is not None:
                    weights.change(number, change)
                output = block.module(*args, **kwargs)
            if memory is not None:
                memory.keep(number, output)
            return output

        try:
            with stands(model, blocks, call), mode:
                yield
        finally:
            weights.close()
