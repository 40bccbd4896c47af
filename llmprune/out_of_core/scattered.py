"""Models whose weights are not where their modules are: in pieces on several processes, or kept away by a device_map.

FSDP2 and tensor parallelism leave ``DTensor`` parameters; accelerate's offloading leaves parameters on the meta device
and a hook that fetches them. Either model has a twin on the meta device, built from its config, with a
:class:`Fetched` in the place of files: tracing, scoring and planning work on the twin as on an opened checkpoint, and
of the weights one block at a time is whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from llmprune.errors import InputError, LlmpruneError
from llmprune.out_of_core.reading import Files
from llmprune.out_of_core.stored import Source, source_of

T = TypeVar("T")
Fetch = Callable[[], torch.Tensor]
"""Gives a parameter whole."""


class Fetched(Source):
    """Where the parameters of a twin come from.

    Args:
        fetches: Name -> what gives it; tied parameters under each of their names.
        together: Whether several processes fetch together: then all have to in the same order.
    """

    def __init__(self, fetches: Mapping[str, Fetch], sizes: Mapping[str, int], together: bool):
        self.folder, self.tensors, self.files = Path(), {}, Files()
        self._fetches, self._sizes, self._together = fetches, sizes, together
        self.missing, self.unexpected, self.mismatched = [], [], []

    def fetch(self, name: str) -> torch.Tensor:
        """A parameter, whole."""
        with torch.no_grad():
            return self._fetches[name]().detach()

    def extra_bytes(self, name: str, dtype: torch.dtype) -> int:
        """As :meth:`Source.extra_bytes`: the pieces and the whole."""
        return 2 * self._sizes[name]

    def stored(self, name: str) -> None:
        """None: nothing lies in a file."""

    def value(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """As :meth:`Source.value`."""
        return self.fetch(name).to(device="cpu", dtype=dtype)

    def parts(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """As :meth:`Source.parts`, in one."""
        yield self.value(name, dtype)

    def fill(self, targets: dict[str, torch.Tensor]) -> None:
        """As :meth:`Source.fill`."""
        for name, target in targets.items():
            target.copy_(self.fetch(name))

    def agreed(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in the first process, or the first error of any."""
        if not self._together:
            return work()
        from torch import distributed

        result: T | LlmpruneError
        try:
            result = work()
        except LlmpruneError as error:
            result = error
        results: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(results, result)
        for one in results:
            if isinstance(one, LlmpruneError):
                raise one
        first: T = results[0]
        return first


def _is_piece(parameter: torch.Tensor) -> bool:
    tensors = sys.modules.get("torch.distributed.tensor")  # not there: nothing can be a DTensor
    return tensors is not None and isinstance(parameter, tensors.DTensor)


def is_in_pieces(model: object) -> bool:
    """Whether weights of a model are in pieces on several processes."""
    return isinstance(model, nn.Module) and any(map(_is_piece, model.parameters()))


def is_scattered(model: object) -> bool:
    """Whether weights of a model are in pieces, or kept away by a hook."""
    if not isinstance(model, nn.Module) or source_of(model) is not None:
        return False
    return is_in_pieces(model) or any(
        parameter is not None and parameter.is_meta and _kept_away(module) is not None
        for module in model.modules()
        for parameter in module._parameters.values()
    )


def _kept_away(module: nn.Module) -> Any:
    """The mapping from which a hook fetches a module's parameters; None where there is none."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        found = getattr(one, "weights_map", None)
        if found is not None:
            return found
    return None


def _is_torchs_wrapper(kind: type) -> bool:
    return kind.__module__.startswith("torch.distributed")


def within_reach(model: Any) -> Any:
    """A twin on the meta device of a model whose weights are elsewhere; any other model as it is.

    Raises:
        InputError: the model's class cannot be built from its config, or not with these tensors.
    """
    if not is_scattered(model):
        return model
    from llmprune.checkpoints.universal import build_on_meta

    if not hasattr(model, "config") or getattr(model, "llmprune", None) is not None:
        raise InputError(
            f"weights of this {type(model).__name__} are in pieces or offloaded, and it is no model of transformers as "
            "its config builds it: load it whole, or prune its checkpoint folder with --stream"
        )
    # FSDP2 gives each module a class that it makes of its own.
    plain = [c for c in type(model).__mro__ if not any(map(_is_torchs_wrapper, c.__mro__))]
    kind = plain[0]
    twin = build_on_meta(kind, model.config).eval()
    theirs = dict(model.named_parameters(remove_duplicate=False))
    own = dict(twin.named_parameters(remove_duplicate=False))
    shapes = [{name: tuple(p.shape) for name, p in some.items()} for some in (theirs, own)]
    if shapes[0] != shapes[1]:
        odd = sorted(dict(shapes[0].items() ^ shapes[1].items()))[0]
        raise InputError(
            f"{odd} of this {type(model).__name__} is not what {kind.__name__} has by its config: load the model whole"
        )
    for name, parameter in own.items():
        parameter.data = parameter.data.to(theirs[name].dtype)
    modules = dict(twin.named_modules())
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                modules[path]._buffers[name] = buffer.detach().to("cpu").clone()
    fetches, together = _fetches(model)
    pieces = [p for p in theirs.values() if _is_piece(p)]
    sizes = {name: p.numel() * p.element_size() for name, p in theirs.items()}
    twin.llmprune_source = Fetched(fetches, sizes, together)
    if pieces and pieces[0].device.type == "cuda":  # the blocks run where the pieces lie
        twin.llmprune_source.device = pieces[0].device
    return twin


def _fetches(model: nn.Module) -> tuple[dict[str, Fetch], bool]:
    fetches: dict[str, Fetch] = {}
    together = False
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{key}" if path else key
            if _is_piece(parameter):
                together = True
                fetches[name] = parameter.full_tensor
            elif parameter.is_meta:
                fetches[name] = _from_map(name, _kept_away(module), key)
            else:
                fetches[name] = partial(_held, parameter)
    return fetches, together


def _held(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


def _from_map(name: str, kept: Any, key: str) -> Fetch:
    if kept is None:
        raise InputError(f"{name} is on the meta device, and no hook fetches it: load the model's weights")
    return lambda: torch.as_tensor(kept[key])


def gather(model: Any, plan: Any, keep: bool = True) -> Any:
    """The pruned model, whole and on the CPU, of a model whose weights are in pieces on several processes or offloaded.

    One parameter is whole at a time, and is cut before the next one is fetched: memory is the pruned model and its
    largest weight before pruning. Of a sharded model every process has to call this; afterwards the result can be saved
    (:func:`llmprune.save_pretrained`) by one of them, or sharded anew by all.

    Args:
        model: The model that the plan was made for; it stays as it is.
        plan: A plan that takes no layers out.
        keep: Whether this process keeps the result; else it only takes part.

    Returns:
        The pruned model; None where it is not kept.

    Raises:
        InputError: the model is in memory, or the plan takes layers out.
        PlanError: the plan was made for another model.
    """
    from llmprune.compaction import compact as compaction

    if not is_scattered(model):
        raise InputError(
            "this model's weights are in memory, whole: llmprune.compact(model, plan) prunes it in place"
        )
    if plan.layers or plan.sublayers:
        raise InputError("a plan that takes layers out is for models in memory: load this one whole")
    twin = within_reach(model)
    source = twin.llmprune_source
    del twin.llmprune_source
    compaction.compact(twin, plan)
    scales = {scale.parameter: scale for scale in plan.rescaled}
    done: dict[int, nn.Parameter] = {}
    for path, module in list(twin.named_modules()):
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            name = f"{path}.{key}" if path else key
            if id(parameter) not in done:
                value = source.fetch(name).cpu()
                value = compaction.gather(value, plan.kept.get(name, {})) if keep else value
                if keep and name in scales:
                    value = scales[name].apply(value)
                done[id(parameter)] = nn.Parameter(
                    value.clone() if keep else parameter.data, requires_grad=False
                )
            if keep:
                module._parameters[key] = done[id(parameter)]
    return twin if keep else None
