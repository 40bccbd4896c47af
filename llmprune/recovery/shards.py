"""Recovery of a model whose frozen weights no process has whole: FSDP2 keeps a share of every block's on each.

Adapters are small and what is trained: every process has them, and their gradients are averaged as without sharding
(DistributedDataParallel). The weights below them are read alone. torch's ``fully_shard`` gathers a block's when it runs
and lets go of them after, so that a process holds its share of the model, one block, and the adapters.

What is sharded is a twin of the model that shares its parameters; the model itself is left empty meanwhile, and is
filled again at the end.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmprune.compaction.compact import shared_tensors
from llmprune.errors import InputError

_WISH = "ACCELERATE_USE_FSDP"
"""What ``accelerate launch --use_fsdp`` and a config of it tell the processes they start."""


def wanted(fsdp: bool | None, method: str, watched: bool) -> bool:
    """Whether to shard: as asked for, or as accelerate's config says.

    Raises:
        InputError: it was asked for and cannot be had; the message says what can.
    """
    asked = os.environ.get(_WISH, "").lower() in ("1", "true") if fsdp is None else fsdp
    if not asked:
        return False
    if method == "full":
        raise InputError(
            "full training under FSDP is not offered, only that of adapters (--method lora or dora): take one of them, "
            "or launch without FSDP"
        )
    if watched:
        raise InputError(
            "watch= runs the model in one process alone, which under FSDP cannot: leave one of the two out"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return True
    if fsdp:
        raise InputError("fsdp spreads a model over processes, and there is one: start several with torchrun")
    return False  # a config for many machines, used on one


@contextmanager
def without_accelerates() -> Iterator[None]:
    """Keep accelerate from sharding as well."""
    before = os.environ.get(_WISH)
    os.environ[_WISH] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WISH]
        else:
            os.environ[_WISH] = before


class Shards:
    """A model's twin, sharded; made before adapters are put into it.

    Args:
        model: whole, the same on every process.

    Attributes:
        twin: to be given adapters, then to :meth:`shard`, and trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self.twin: Any = copy.deepcopy(model, shared_tensors(model))
        self._homes = [
            (module, key, parameter)
            for module in self.twin.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]

    def shard(self, wrapped: nn.Module) -> None:
        """Spread the frozen weights of the twin, which ``wrapped`` holds with its adapters, over the processes."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        trained = {p for p in wrapped.parameters() if p.requires_grad}
        # A group of its own: in the backward pass weights are gathered while gradients of adapters are averaged, and
        # the two meet in another order on each process.
        mesh = DeviceMesh.from_group(
            torch.distributed.new_group(), "cuda" if torch.cuda.is_available() else "cpu"
        )
        for part in (*_blocks(self.twin), self.twin):
            # Let go of after forward, the outermost's too, which torch would keep: saving a checkpoint, which one
            # process does alone, lets go of them there, and then that one would gather them and the others not.
            fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
            held = {id(p) for p in part.parameters()}
            for module, key, parameter in self._homes:
                if parameter.numel() and id(module._parameters[key]) in held:
                    parameter.data = parameter.data.new_empty(0)
        ours = {id(p) for p in trained}
        everything = (*wrapped.named_parameters(), *wrapped.named_buffers())
        # DistributedDataParallel is to look after the adapters alone; it asks the module for this.
        rest: Any = [name for name, tensor in everything if id(tensor) not in ours]
        wrapped._ddp_params_and_buffers_to_ignore = rest

    @torch.no_grad()
    def gather(self) -> None:
        """Fill the model again. Every process has to call this."""
        filled: set[int] = set()
        for module, key, parameter in self._homes:
            if id(parameter) not in filled:
                piece: Any = module._parameters[key]
                parameter.data = piece.full_tensor().to(parameter.device)
                filled.add(id(parameter))


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The members of its lists of modules, of nested ones the outermost."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            inside |= {id(m) for m in module.modules()}
            found += [block for block in module if any(True for _ in block.parameters())]
    return found
