"""Trace a model: one recorded forward pass, and from it the graph of what can be pruned together."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from llmprune.borrow import borrowed, stand_in, substitute_integers, substitute_tensors
from llmprune.errors import InputError, LlmpruneError, TraceError
from llmprune.inputs import example_inputs
from llmprune.provenance import SizeMode
from llmprune.recorder import SHADOW_LIMIT, DataDependentError, Recorder
from llmprune.tape import Tape

if TYPE_CHECKING:
    from llmprune.graph import Graph

_META = torch.device("meta")


def record(
    model: nn.Module, inputs: Any = None, *, device_mode: str = "auto", attention: str | None = None
) -> Tape:
    """Run ``model`` forward once and write down every operation.

    Args:
        model: any module; neither its weights nor its state change.
        inputs: keyword arguments of ``model.forward`` (or a tensor, or a tuple of positional ones); None: made from the
            model's config.
        device_mode: ``meta``, ``real``, or ``auto``: meta, and where that fails the model's own device.
        attention: attention form to record under (``eager``, ``sdpa``); None: the model's own.

    Raises:
        TraceError: the model could not be run; says at which operation, module and line.
        InputError: ``inputs`` do not fit ``model.forward``.
    """
    keywords = bind_inputs(model, example_inputs(model) if inputs is None else inputs)
    tied = any(parameter.is_meta for parameter in model.parameters())
    if device_mode == "real" and tied:
        raise TraceError(
            "the model is on the meta device and cannot run with real values; load its weights first"
        )
    if device_mode != "real":
        try:
            return _Recording(model, keywords, True, attention).run()
        except TraceError as error:
            if device_mode == "meta" or tied:
                raise
            reason = str(error.__cause__ or error)
        tape = _Recording(model, keywords, False, attention).run()
        tape.notes.append(f"recorded on real tensors because the meta device did not do: {reason}")
        return tape
    return _Recording(model, keywords, False, attention).run()


def bind_inputs(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Inputs as keyword arguments of ``model.forward``.

    Raises:
        InputError: they do not fit; names the arguments that do not and those there are.
    """
    signature = inspect.signature(model.forward)
    names = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    try:
        if isinstance(inputs, Mapping):
            signature.bind(**inputs)
            return dict(inputs)
        return dict(signature.bind(*inputs).arguments)
    except TypeError as error:
        raise InputError(
            f"inputs do not fit {type(model).__name__}.forward ({error}); its arguments are {', '.join(names)}"
        ) from error


def find_outputs(result: Any) -> list[torch.Tensor]:
    """The tensors of a model's result that matter to a caller.

    A tensor itself; of a mapping the entries named after logits, else the last hidden state; else every tensor.
    """
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, Mapping):
        logits = [
            value for key, value in result.items() if "logits" in key and isinstance(value, torch.Tensor)
        ]
        if logits:
            return logits
        last = result.get("last_hidden_state")
        if isinstance(last, torch.Tensor):
            return [last]
    return list(_leaves(result))


def _leaves(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)


def trace(model: nn.Module, inputs: Any = None) -> Graph:
    """Find out which slices of which tensors of ``model`` live and die together.

    Runs the forward pass once, on the meta device where that will do, and changes nothing about the model.

    Args:
        model: any module whose forward pass is made of torch operations; on any device, meta included.
        inputs: keyword arguments for ``model.forward`` (tensors of any device); None: made from the model's config.

    Raises:
        TraceError: the model cannot be traced; says at which operation, module and line.
        InputError: the inputs do not fit, or none could be made.
    """
    from llmprune.graph import Graph

    return Graph.from_tape(record(model, inputs), model)


class _Recording:
    """One recorded forward pass over one model."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], meta: bool, attention: str | None) -> None:
        self.model = model
        self.inputs = inputs
        self.meta = meta
        self.changes: dict[str, Any] = {
            "use_cache": False,
            "return_dict": True,
            "_experts_implementation": "batched_mm",
        }
        if attention is not None:
            self.changes["_attn_implementation"] = attention
        self.tape = Tape(model=type(model).__name__, device_mode="meta" if meta else "real")
        self.tape.attention = (
            attention or getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
        )
        self.paths: dict[int, int] = {}  # id(module) -> scope
        for path, module in model.named_modules():
            self.paths[id(module)] = len(self.tape.scopes)
            self.tape.scopes.append(path)
        self.stack = [0]
        self.recorder = Recorder(self.tape, meta, self.scope)
        self.sizes = SizeMode(self.recorder.tensor_id, self.scope)

    def scope(self) -> int:
        """The module that is running."""
        return self.stack[-1]

    def run(self) -> Tape:
        """Record; the model is as before, whatever happens."""
        model = self.model
        with borrowed(model), torch.no_grad():
            try:
                self._prepare()
                self._forward()
            except Exception as error:
                if isinstance(error, LlmpruneError):
                    raise
                raise TraceError(self._describe(error)) from error
            finally:
                self.recorder.undo_writes()
        self._finish()
        return self.tape

    def _prepare(self) -> None:
        """Put stand-ins, provenance integers and settings in place."""
        model, recorder = self.model, self.recorder
        for module in model.modules():
            module.training = False
        twins: dict[Any, torch.Tensor] = {}

        def replace(tensor: torch.Tensor, role: str, name: str) -> torch.Tensor:
            storage = tensor.untyped_storage()._cdata
            key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride())
            twin = twins.get(key)
            if twin is None:
                shadow = None
                if self.meta:
                    if role == "buffer" and not tensor.is_meta and tensor.numel() <= SHADOW_LIMIT:
                        shadow = tensor.detach().to("cpu", copy=True)
                    twin = stand_in(tensor, _META)
                else:
                    twin = tensor
                twins[key] = twin
                recorder.adopt(twin, role, name, shadow, storage)
            return twin

        for role, named in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
            for name, tensor in named(remove_duplicate=False):
                replace(tensor, role, name)
        if self.meta:
            substitute_tensors(model, lambda tensor: replace(tensor, "buffer", ""))
        substitute_integers(model, self.sizes, self.changes)
        overrides = self.sizes.overrides
        overrides[torch.tensor] = overrides[torch.as_tensor] = overrides[torch.Tensor.new_tensor] = (
            self._constant
        )
        overrides[F.scaled_dot_product_attention] = self._attention
        overrides[torch.Tensor.tolist] = overrides[torch.Tensor.numpy] = self._values
        overrides[torch.Tensor.__repr__] = overrides[torch.Tensor.__format__] = self._unrecorded

    def _forward(self) -> None:
        """The recorded pass itself."""
        inputs = {name: self._input(value, name) for name, value in self.inputs.items()}
        parameters = inspect.signature(self.model.forward).parameters
        if "use_cache" in parameters:
            inputs["use_cache"] = False
        with self._scopes(), self.sizes, self.recorder:
            result = self.model(**inputs)
        known = self.recorder.numbered
        self.tape.outputs = [known(tensor) for tensor in find_outputs(result) if known(tensor) >= 0]
        if not self.tape.outputs:
            raise TraceError(
                f"the forward pass of {self.tape.model} returned no tensor that an operation made"
            )

    def _input(self, value: Any, name: str) -> Any:
        """An input on the device of the pass, numbered."""
        if isinstance(value, torch.Tensor):
            if self.meta:
                twin = stand_in(value.detach(), _META)
                shadow = None if value.is_meta else value.detach().to("cpu", copy=True)
                self.recorder.adopt(twin, "input", name, shadow)
                return twin
            device = next((p.device for p in self.model.parameters()), value.device)
            copy = value.detach().to(device, copy=True)
            self.recorder.adopt(copy, "input", name)
            return copy
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return type(value)(self._input(item, name) for item in value)
        if type(value) is dict:
            return {key: self._input(item, f"{name}.{key}") for key, item in value.items()}
        return value

    @contextmanager
    def _scopes(self) -> Iterator[None]:
        """Follow which module runs."""

        def enter(module: nn.Module, args: Any) -> None:
            scope = self.paths.get(id(module))
            self.stack.append(self.stack[-1] if scope is None else scope)

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            self.stack.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # Functions that run differently during a trace

    def _constant(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``torch.tensor`` and its like: a constant whose value stays known."""
        if func is torch.as_tensor and isinstance(args[0] if args else kwargs.get("data"), torch.Tensor):
            return func(*args, **kwargs)
        device = kwargs.pop("device", None)
        if func is torch.Tensor.new_tensor:
            device = args[0].device if device is None else device
            kwargs.setdefault("dtype", args[0].dtype)
            func, args = torch.tensor, args[1:]
        device = torch.get_default_device() if device is None else torch.device(device)
        if self.meta:
            device = _META
        args = tuple(self._known(value) for value in args)
        with self.recorder.paused():
            value = func(*args, **{key: self._known(value) for key, value in kwargs.items()}, device="cpu")
        return self.recorder.constant(value, device)

    def _known(self, value: Any) -> Any:
        """Nested data with the meta tensors in it replaced by their values."""
        if isinstance(value, torch.Tensor) and value.is_meta:
            shadow = self.recorder.shadow(value)
            if shadow is None:
                raise DataDependentError("a constant is made from a computed tensor")
            return shadow
        if type(value) in (list, tuple):
            return type(value)(self._known(item) for item in value)
        return value

    def _attention(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Fused attention as the one operation it is, whichever kernels a device would choose."""
        with self.recorder.paused():
            query, _, value = _named(args, kwargs, ("query", "key", "value"))
            out: torch.Tensor
            if self.meta:
                out = query.new_empty((*query.shape[:-1], value.shape[-1]))
            else:
                out = func(*args, **kwargs).contiguous()
        overload = torch.ops.aten.scaled_dot_product_attention.default
        self.recorder.record(overload, args, kwargs, out)
        return out

    def _values(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``tolist`` and ``numpy`` of a meta tensor: those of its shadow."""
        tensor = args[0]
        if tensor.is_meta:
            tensor = self.recorder.shadow(tensor)
            if tensor is None:
                raise DataDependentError(f"Tensor.{func.__name__} of a computed tensor")
        with self.recorder.paused():
            return func(tensor, *args[1:], **kwargs)

    def _unrecorded(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Printing is no part of the forward pass."""
        with self.recorder.paused():
            return func(*args, **kwargs)

    # Afterwards

    def _describe(self, error: Exception) -> str:
        """Where a recording failed, in one sentence."""
        place = _source_line(error)
        path = self.tape.scopes[self.stack[-1]]
        operations = len(self.tape.ops)
        text = " ".join(str(error).split()) or type(error).__name__
        return (
            f"{self.tape.model} cannot be traced: {type(error).__name__}: {text} "
            f"(operation {operations}, {self.recorder.last or 'before the first'}, in module "
            f"'{path or 'the root'}'{', ' + place if place else ''})"
        )

    def _finish(self) -> None:
        """Equations and spent values as plain lists."""
        scopes = self.tape.scopes
        tensors = self.tape.tensors
        for tid, dim, tree, where, scope in self.sizes.equations:
            if tree == ("shape", tid, dim) or _constant_tree(tree, tensors):
                continue
            self.tape.equations.append([tid, dim, _listed(tree), f"{where} in {scopes[scope] or 'the root'}"])
        for tree, scope in self.sizes.value_used:
            self.tape.value_used.append([_listed(tree), f"in {scopes[scope] or 'the root'}"])


def _named(args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    return [args[place] if place < len(args) else kwargs[name] for place, name in enumerate(names)]


def _listed(tree: Any) -> Any:
    return [_listed(part) for part in tree] if isinstance(tree, tuple) else tree


def _constant_tree(tree: Any, tensors: list[list[Any]]) -> bool:
    """Whether an origin is made of nothing that pruning could change: numbers and sizes of inputs."""
    if isinstance(tree, int):
        return True
    if tree[0] == "attr":
        return False
    if tree[0] == "shape":
        return bool(tensors[tree[1]][3] == "input")
    return all(_constant_tree(part, tensors) for part in tree[1:])


_LIBRARIES = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)


def _source_line(error: BaseException) -> str:
    """File, line and text of the innermost line of the model's own code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_LIBRARIES)]
    if not frames:
        return ""
    frame = frames[-1]
    return f"{os.path.basename(frame.filename)}:{frame.lineno}: {frame.line}"
