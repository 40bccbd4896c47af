"""Borrow a model for a trace and give it back exactly as it was.

While borrowed, a model is in evaluation mode, its parameters and buffers may be stand-ins on the meta device, its
integer attributes are provenance integers and each module has configs of its own. Only the modules' ``__dict__``
entries are swapped: no weight is copied or written, no hook is left, and everything returns on exit, whatever
happened inside.
"""

from __future__ import annotations

import dataclasses
import gc
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from llmprune.machine.interrupts import deferred_interrupts
from llmprune.tracing.provenance import SizeMode

_INTERNAL = frozenset({"_parameters", "_buffers", "_modules"})
_CONTAINERS = frozenset({dict, OrderedDict, list, set})
_NO_SIZES = frozenset(
    {bool, str, float, type(None), dict, OrderedDict, set, torch.dtype, torch.device, FunctionType}
)


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Whatever happens to the attributes of ``model``'s modules inside, they are restored on exit.

    Covers every module's attributes, one level into its own dicts, lists and sets (parameters, buffers, submodules and
    hooks among them), and the random states of torch, NumPy and Python.
    """
    # remove_duplicate matters not: a module met twice is saved once.
    saved = [(module.__dict__, dict(module.__dict__)) for module in model.modules()]
    # Most of a module's own containers are empty: for those, None says enough.
    inner = [
        (value, value.copy() if value else None)
        for _, attributes in saved
        for value in attributes.values()
        if type(value) in _CONTAINERS
    ]
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    device_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        with deferred_interrupts():
            for attributes, before in saved:
                attributes.clear()
                attributes.update(before)
            for container, before_copy in inner:
                if not container and not before_copy:
                    continue
                container.clear()
                if before_copy is None:
                    continue
                if isinstance(container, list):
                    container.extend(before_copy)
                else:
                    container.update(before_copy)
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])
            if device_states:
                torch.cuda.set_rng_state_all(device_states)


def forget(model: nn.Module) -> None:
    """Drop what modules have computed from their weights and kept; modes are as before.

    A module that keeps such a thing (LeViT its attention biases, by device) has to drop it when training begins.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, mode in modes:
        module.training = mode


@contextmanager
def no_collection() -> Iterator[None]:
    """No cycle collection inside: a trace makes many small objects that stay, which each collection would walk anew."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def keep_blocks(model: nn.Module, blocks: Mapping[str, Sequence[int]]) -> None:
    """Leave only the blocks at some positions in lists of blocks (inside :func:`borrowed`)."""
    for path, positions in blocks.items():
        table = model.get_submodule(path)._modules
        for name in [name for place, name in enumerate(table) if place not in positions]:
            del table[name]


def stand_in(
    tensor: torch.Tensor, device: torch.device, sizes: Mapping[int, int] | None = None
) -> torch.Tensor:
    """An empty tensor like ``tensor`` (sizes, strides, type, and whether it is a parameter) on ``device``.

    Args:
        tensor: what it stands for.
        device: where it is.
        sizes: dimension -> another size; the result is then contiguous.
    """
    if sizes:
        shape = [sizes.get(dim, size) for dim, size in enumerate(tensor.size())]
        twin = torch.empty(shape, dtype=tensor.dtype, device=device)
    else:
        twin = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    # requires_grad decides which kernels matmul chooses, even where no gradient is recorded
    return (
        nn.Parameter(twin, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    )


def substitute_tensors(model: nn.Module, replace: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put ``replace(tensor)`` in the place of every parameter and buffer (inside :func:`borrowed`)."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = replace(tensor)  # type: ignore[assignment]


def substitute_integers(model: nn.Module, mode: SizeMode, config_changes: Mapping[str, Any]) -> None:
    """Give every module provenance integers and configs of its own (inside :func:`borrowed`).

    Args:
        model: the borrowed model.
        mode: where the integers report to.
        config_changes: settings of the copied configs during the trace, for the fields they have.
    """
    for path, module in model.named_modules():
        attributes = module.__dict__
        copies: dict[int, Any] = {}
        for name, value in list(attributes.items()):
            kind = type(value)
            if kind in _NO_SIZES or name in _INTERNAL:
                continue
            if kind is int:
                attributes[name] = mode.attribute(value, path, name)
            elif kind is tuple or kind is list or kind is torch.Size:
                if any(type(item) is int for item in value):
                    attributes[name] = _sequence(value, mode, path, name)
            elif is_config(value):
                attributes[name] = _config(value, mode, path, name, config_changes, copies)


def is_config(value: Any) -> bool:
    """Whether an attribute holds settings: a transformers config, a dataclass instance or a namespace."""
    if isinstance(value, (nn.Module, torch.Tensor, type)) or not hasattr(value, "__dict__"):
        return False
    if isinstance(value, SimpleNamespace):
        return True
    if dataclasses.is_dataclass(value):
        return True
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def _sequence(value: Any, mode: SizeMode, path: str, name: str) -> Any:
    items = [
        mode.attribute(item, path, f"{name}[{place}]") if type(item) is int else item
        for place, item in enumerate(value)
    ]
    return type(value)(items)


def _config(
    config: Any, mode: SizeMode, path: str, name: str, changes: Mapping[str, Any], copies: dict[int, Any]
) -> Any:
    """A shallow copy of a config with provenance integers, nested configs included."""
    if id(config) in copies:
        return copies[id(config)]
    made: Any = type(config)
    twin = made.__new__(made)
    copies[id(config)] = twin
    fields = twin.__dict__
    fields.update(config.__dict__)
    for key, value in config.__dict__.items():
        kind = type(value)
        if kind in _NO_SIZES:
            continue
        if kind is int:
            fields[key] = mode.attribute(value, path, f"{name}.{key}")
        elif kind is tuple or kind is list:
            if any(type(item) is int for item in value):
                fields[key] = _sequence(value, mode, path, f"{name}.{key}")
        elif is_config(value):
            fields[key] = _config(value, mode, path, f"{name}.{key}", changes, copies)
    for key, value in changes.items():
        if key in fields or hasattr(type(config), key):  # a field or a property: a setting this config knows
            setattr(twin, key, value)
    return twin
