"""What people and libraries put around a model: compilation, hooks, offloading, packed weights.

Recording, scoring, verification and compaction all want the modules as they were written. Nothing here knows a library
by name beyond ``torch``; the others are recognised by what they leave on a module.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from llmprune.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


# Compilation


def _is_compiled(module: object) -> bool:
    frames = sys.modules.get("torch._dynamo.eval_frame")  # not there: nothing can be compiled
    return frames is not None and isinstance(module, frames.OptimizedModule)


@contextmanager
def uncompiled(model: Any) -> Iterator[Any]:
    """The model that ``torch.compile`` was given, inside the block without compiled parts, which run eagerly.

    Parameters have their own names in it, so a plan made of a compiled model fits the plain one and the other way
    round. Compiled code sees by its own guards that sizes have changed.
    """
    while _is_compiled(model):
        model = model._orig_mod
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in list(model.modules()) if isinstance(model, nn.Module) else ():
            for name, child in module._modules.items():
                if _is_compiled(child):
                    swapped.append((module._modules, name, child))
        for table, name, child in swapped:
            while _is_compiled(child):
                child = child._orig_mod
            table[name] = child
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            yield model
    finally:
        for table, name, child in swapped:
            table[name] = child


def on_uncompiled(function: F) -> F:
    """Make a function of a model see the model that was compiled; what it returns of that is what it was given."""

    @wraps(function)
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        with uncompiled(model) as inner:
            result = function(inner, *args, **kwargs)
        return model if result is inner else result

    return cast(F, call)


# Hooks


def leave_out_hooks(model: nn.Module) -> list[str]:
    """Take the hooks of the model's user off its modules, for as long as someone else restores ``__dict__``.

    They are there to see or change real activations; stand-ins, trial runs and masked references are none. Hooks of
    torch itself (an older weight norm computes its weight in one) and of the package that the model's classes are from
    (transformers collects hidden states by such) belong to the model and stay.

    Returns:
        Paths of the modules that had some.
    """
    found = []
    packages = {"torch", "llmprune"} | {_package(type(module).__module__) for module in model.modules()} - {
        ""
    }
    for path, module in model.named_modules():
        for table in _HOOKS:
            hooks = module.__dict__.get(table)
            if not hooks:
                continue
            own = OrderedDict((key, hook) for key, hook in hooks.items() if _origin(hook) in packages)
            if len(own) != len(hooks):
                module.__dict__[table] = own
                found.append(path)
    return list(dict.fromkeys(found))


def _origin(hook: Any) -> str:
    """The package a hook was written in."""
    while isinstance(hook, partial):
        hook = hook.func
    return _package(getattr(hook, "__module__", None) or type(hook).__module__)


def _package(module: str) -> str:
    """The outermost package of a module; "" for one in none (a script, a notebook)."""
    package, dot, _ = module.partition(".")
    return package if dot or package == "torch" else ""


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """:func:`leave_out_hooks` inside the block."""
    saved = [
        (module.__dict__, table, module.__dict__.get(table)) for module in model.modules() for table in _HOOKS
    ]
    leave_out_hooks(model)
    try:
        yield
    finally:
        for attributes, table, hooks in saved:
            if hooks is not None:
                attributes[table] = hooks


# Placement


def bypass_placement(model: nn.Module) -> None:
    """Run modules without the wrapper that moves weights and inputs between devices (where ``__dict__`` is restored).

    Such wrappers keep what they wrapped as ``_old_forward`` beside the hook that they run.
    """
    for module in model.modules():
        attributes = module.__dict__
        if "_hf_hook" in attributes and "_old_forward" in attributes:
            attributes["forward"] = attributes["_old_forward"]


def check_present(model: nn.Module) -> None:
    """Raise InputError where a weight is elsewhere (on the disk, or in another memory) and comes in only to run."""
    tensors = sys.modules.get("torch.distributed.tensor")  # not there: nothing can be in pieces
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            place = f"{path + '.' if path else ''}{name}"
            if tensors is not None and isinstance(tensor, tensors.DTensor):
                raise InputError(
                    f"{place} is in pieces on several processes: llmprune.gather(model, plan) gives the pruned model "
                    "whole"
                )
            if tensor.is_meta and "_hf_hook" in module.__dict__:
                raise InputError(
                    f"{place} is offloaded by a device_map, so there is nothing to cut or measure: llmprune.gather("
                    "model, plan) gives the pruned model of a model of transformers; else load the model whole "
                    "(from_pretrained without device_map, or device_map='cpu'), or leave it in its folder "
                    "(llmprune.score(FOLDER, ..., stream=True), then llmprune.apply)"
                )


# Packed weights


def check_unpacked(model: nn.Module) -> None:
    """Raise InputError for a model whose weights are packed or quantised, with the way out.

    Recognised by what they are: parameters of integers, of 8-bit floats or of a wrapping tensor type; and modules that
    hold a matrix of integers instead of the float matrix their ``in_features`` and ``out_features`` call for.
    """
    for path, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        for name, tensor in parameters.items():
            packing = _packing(tensor)
            if packing is not None:
                raise _packed(model, f"{path}.{name}".lstrip("."), packing)
        matrices = [
            (name, tensor)
            for name, tensor in (*parameters.items(), *module.named_buffers(recurse=False))
            if tensor.dim() >= 2
        ]
        sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
        floats = [t for _, t in matrices if t.is_floating_point()]
        packed = [
            (name, t) for name, t in matrices if not t.is_floating_point() and t.dtype is not torch.bool
        ]
        if packed and all(isinstance(size, int) for size in sizes):
            whole = sizes[0] * sizes[1]  # type: ignore[operator]
            if not any(t.numel() >= whole for t in floats):
                name, tensor = packed[0]
                raise _packed(model, f"{path}.{name}".lstrip("."), f"packed {_short(tensor.dtype)}")
    if getattr(model, "is_quantized", False) is True:
        raise _packed(model, "the model", "quantised")


def _packing(tensor: torch.Tensor) -> str | None:
    """How a parameter is packed; None for a plain float (or complex) tensor."""
    data = tensor.data
    if is_traceable_wrapper_subclass(data):
        return f"a {type(data).__name__}"
    if data.is_quantized or not (data.is_floating_point() or data.is_complex()):
        return _short(data.dtype)
    if data.is_floating_point() and torch.finfo(data.dtype).bits <= 8:
        return _short(data.dtype)
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _packed(model: nn.Module, name: str, packing: str) -> InputError:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    how = f" by {getattr(method, 'value', method)}" if method else ""
    return InputError(
        f"{name} is {packing}: quantised weights{how} cannot be pruned; load the model in float32 or bfloat16 (or call "
        "its dequantize()), prune it, and quantise the result"
    )
