"""One recorded forward pass over one model."""

from __future__ import annotations

import inspect
import os
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers.cache_utils import Cache, EncoderDecoderCache

import llmprune
from llmprune.compaction.compact import gather, set_attributes
from llmprune.errors import LlmpruneError, TraceError
from llmprune.tracing.borrow import (
    borrowed,
    forget,
    keep_blocks,
    stand_in,
    substitute_integers,
    substitute_tensors,
)
from llmprune.tracing.provenance import SizeMode, without_dispatch
from llmprune.tracing.recorder import SHADOW_LIMIT, DataDependentError, Recorder
from llmprune.tracing.tape import TENSOR, TENSORS, Tape, arguments
from llmprune.tracing.wrapped import bypass_placement, leave_out_hooks

_META = torch.device("meta")
_MULTI_HEAD = without_dispatch(F.multi_head_attention_forward)


@dataclass(frozen=True)
class Setup:
    """How to run a model for a recording.

    Attributes:
        meta: on the meta device (else on the model's own).
        attention: form of attention (``eager``, ``sdpa``); None: the model's own.
        blocks: lists of blocks to run in part: path -> positions that stay.
        kept: parameters and buffers to run cut: name -> dimension -> kept positions.
        attributes: module attributes to set, as :func:`llmprune.compaction.compact.set_attributes` takes them.
        cache: whether generation's cache is filled, and noted in :attr:`Tape.cached`.
    """

    meta: bool = True
    attention: str | None = None
    blocks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    kept: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)
    attributes: Sequence[Any] = ()
    cache: bool = False


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


def cached_tensors(value: Any) -> Iterator[tuple[torch.Tensor, int]]:
    """The tensors that a cache of the transformers library holds, each with the most tokens it keeps (-1: all)."""
    if isinstance(value, EncoderDecoderCache):
        yield from cached_tensors(value.self_attention_cache)
        yield from cached_tensors(value.cross_attention_cache)
    elif isinstance(value, Cache):
        for layer in value.layers:
            for held in vars(layer).values():
                for tensor in _leaves(held):
                    if tensor.dim() > 0:
                        yield tensor, int(layer.get_max_length())


class Recording:
    """Runs a model once and writes the tape.

    Args:
        model: the model; as before when :meth:`run` returns or raises.
        inputs: keyword arguments of its forward.
        setup: how to run it.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any], setup: Setup) -> None:
        self.model = model
        self.inputs = inputs
        self.setup = setup
        self.meta = meta = setup.meta
        attention = setup.attention
        self.changes: dict[str, Any] = {
            "return_dict": True,
            "_experts_implementation": "batched_mm",
        }
        if not setup.cache:
            self.changes["use_cache"] = False
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
        self.elsewhere: dict[int, list[int]] = {}  # id(module) -> scopes of a module's other places
        for path, module in model.named_modules(remove_duplicate=False):
            if path != self.tape.scopes[self.paths[id(module)]]:
                self.elsewhere.setdefault(id(module), []).append(len(self.tape.scopes))
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
                failure = TraceError(self._describe(error))
                failure.place = self._place(error)  # type: ignore[attr-defined]
                raise failure from error
            finally:
                self.recorder.undo_writes()
        self._finish()
        return self.tape

    def _prepare(self) -> None:
        """Put stand-ins, provenance integers and settings in place."""
        model, recorder, setup = self.model, self.recorder, self.setup
        hooked = leave_out_hooks(model)
        if hooked:
            places = ", ".join(path or "the root" for path in hooked[:3]) + (
                ", ..." if len(hooked) > 3 else ""
            )
            self.tape.notes.append(f"hooks of {len(hooked)} modules were left out of the trace ({places})")
        if self.meta:
            bypass_placement(model)
        keep_blocks(model, setup.blocks)
        forget(model)
        for module in model.modules():
            module.training = False
        twins: dict[Any, torch.Tensor] = {}

        def replace(tensor: torch.Tensor, role: str, name: str) -> torch.Tensor:
            storage = tensor.untyped_storage()._cdata
            key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride())
            twin = twins.get(key)
            if twin is None:
                shadow = None
                dims = setup.kept.get(name, {})
                if not self.meta:
                    twin = gather(tensor, dims) if dims else tensor
                else:
                    twin = stand_in(tensor, _META, {dim: len(kept) for dim, kept in dims.items()})
                    if role == "buffer" and not tensor.is_meta and tensor.numel() <= SHADOW_LIMIT:
                        shadow = gather(tensor.to("cpu", copy=True), dims)
                twins[key] = twin
                recorder.adopt(twin, role, name, shadow, storage)
            return twin

        for role, named in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
            for name, tensor in named(remove_duplicate=False):
                replace(tensor, role, name)
        if self.meta or setup.kept:
            substitute_tensors(model, lambda tensor: replace(tensor, "buffer", ""))
        substitute_integers(model, self.sizes, self.changes)
        set_attributes(model, setup.attributes)
        overrides = self.sizes.overrides
        overrides[torch.tensor] = overrides[torch.as_tensor] = overrides[torch.Tensor.new_tensor] = (
            self._constant
        )
        if not setup.kept:  # a trial of cut tensors is to meet every check the real function makes
            overrides[F.scaled_dot_product_attention] = self._attention
        overrides[F.multi_head_attention_forward] = self._multi_head
        overrides[torch.Tensor.tolist] = overrides[torch.Tensor.numpy] = self._values
        overrides[torch.Tensor.__getitem__] = self._index
        overrides[torch.Tensor.__repr__] = overrides[torch.Tensor.__format__] = self._unrecorded

    def _forward(self) -> None:
        """The recorded pass itself."""
        inputs = {name: self._input(value, name) for name, value in self.inputs.items()}
        parameters = inspect.signature(self.model.forward).parameters
        if "use_cache" in parameters:
            inputs["use_cache"] = self.setup.cache
        with self._scopes(), self.sizes, self.recorder:
            result = self.model(**inputs)
        known = self.recorder.numbered
        self.tape.outputs = [known(tensor) for tensor in find_outputs(result) if known(tensor) >= 0]
        if not self.tape.outputs:
            raise TraceError(
                f"the forward pass of {self.tape.model} returned no tensor that an operation made"
            )
        if self.setup.cache:
            self._note_cache(result)

    def _note_cache(self, result: Any) -> None:
        """Write down the tensors that generation would keep of this pass."""
        for value in result.values() if isinstance(result, Mapping) else ():
            for tensor, limit in cached_tensors(value):
                number = self.recorder.numbered(tensor)
                if number >= 0:
                    self.tape.cached.append([number, limit, tensor.element_size()])

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
        """Follow which module runs; what other threads run meanwhile is no part of it, and torch tells of that too."""
        own = threading.get_ident()

        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() != own:
                return
            scope = self.paths.get(id(module), self.stack[-1])
            if id(module) in self.elsewhere:  # of its places, the one below the module that calls it
                below = self.tape.scopes[self.stack[-1]] + "."
                places = [scope, *self.elsewhere[id(module)]]
                scope = next((s for s in places if self.tape.scopes[s].startswith(below)), scope)
            self.stack.append(scope)

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            if threading.get_ident() == own:
                self.stack.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        for module in noted_modules(self.model):
            note = partial(self._note_call, self.paths[id(module)])
            handles.append(module.register_forward_hook(note, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note_call(self, scope: int, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """Write down which tensors went into a module and came out of it."""
        items = (
            [(None, result)]
            if isinstance(result, torch.Tensor)
            else result.items()
            if isinstance(result, Mapping)
            else enumerate(result)
            if isinstance(result, (list, tuple))
            else ()
        )
        entry: list[Any] = [scope]
        given = [*enumerate(args), *kwargs.items()]
        entry.append([[slot, self.recorder.numbered(t)] for slot, t in given if isinstance(t, torch.Tensor)])
        entry.append(
            [[slot, self.recorder.numbered(t) if isinstance(t, torch.Tensor) else -1] for slot, t in items]
        )
        self.tape.calls.append(entry)

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

    def _index(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``x[:, [4, 5]]``: the numbers stay known."""
        tensor, index = args
        items = index if type(index) is tuple else (index,)
        if any(type(item) is list and all(isinstance(n, int) for n in item) for item in items):
            made = tuple(
                self._constant(torch.tensor, (item,), {"device": tensor.device})
                if type(item) is list
                else item
                for item in items
            )
            return func(tensor, made if type(index) is tuple else made[0])
        return func(tensor, index)

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

    def _multi_head(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The framework's attention with its inside watched as well: it is Python, and full of sizes."""
        with self.sizes:
            return _MULTI_HEAD(*args, **kwargs)

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
        text = " ".join(str(error).split()) or type(error).__name__
        return (
            f"{self.tape.model} cannot be traced: {type(error).__name__}: {text} "
            f"(operation {len(self.tape.ops)}, {self._place(error)})"
        )

    def _place(self, error: Exception) -> str:
        """The operation and module that an error came from, and the line of the model's code."""
        line = _source_line(error)
        module = self.tape.scopes[self.stack[-1]] or "the root"
        return (
            f"{self.recorder.last or 'before the first'}, in module '{module}'{', ' + line if line else ''}"
        )

    def _finish(self) -> None:
        """Equations and spent values as plain lists."""
        scopes = self.tape.scopes
        tensors = self.tape.tensors
        for tid, dim, tree, where, scope in self.sizes.equations:
            if tree == ("shape", tid, dim) or _constant_tree(tree, tensors):
                continue
            self.tape.equations.append([tid, dim, _listed(tree), f"{where} in {scopes[scope] or 'the root'}"])
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name, _, code, outputs, scope in self.tape.ops:
            module = modules.get(scopes[scope])
            if (
                name == "aten::convolution"
                and isinstance(module, nn.modules.conv._ConvNd)
                and code[0] == TENSOR
            ):
                for attribute, tid in (("in_channels", code[1]), ("out_channels", outputs[0])):
                    dim = len(tensors[tid][0]) - 1 - len(module.kernel_size)
                    size = getattr(module, attribute)
                    if tensors[tid][0][dim] == size:
                        tree = ["attr", scopes[self.paths[id(module)]], attribute, size]
                        self.tape.equations.append([tid, dim, tree, f"convolution in {scopes[scope]}"])
        if self.sizes.value_used:
            live = _live_storages(self.tape)
            used = self.sizes.value_used
            kept = dict.fromkeys(
                (tree, scope) for tree, scope, tid in used if tid < 0 or tensors[tid][2] in live
            )
            self.tape.value_used = [
                [_listed(tree), f"in {scopes[scope] or 'the root'}"] for tree, scope in kept
            ]


def list_members(model: nn.Module) -> list[nn.Module]:
    """The members of all lists of modules, each once."""
    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    return list({id(member): member for modules in lists for member in modules}.values())


def _named(args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    return [args[place] if place < len(args) else kwargs[name] for place, name in enumerate(names)]


def noted_modules(model: nn.Module) -> list[nn.Module]:
    """The members of all lists of modules, and the children of those that lie in no other member; each once."""
    members = list_members(model)
    inner = {id(below) for member in members for below in member.modules() if below is not member}
    children = [child for member in members if id(member) not in inner for child in member.children()]
    return list({id(module): module for module in (*members, *children)}.values())


def _listed(tree: Any) -> Any:
    return [_listed(part) for part in tree] if isinstance(tree, tuple) else tree


def _live_storages(tape: Tape) -> set[int]:
    """Storages that the outputs depend on."""
    tensors = tape.tensors
    live = {tensors[tid][2] for tid in tape.outputs}
    for _, _, code, outputs, _ in reversed(tape.ops):
        if any(tid >= 0 and tensors[tid][2] in live for tid in outputs):
            for tag, payload in arguments(code):
                if tag in (TENSOR, TENSORS):
                    live.update(tensors[tid][2] for tid in payload if tid >= 0)
    return live


def _constant_tree(tree: Any, tensors: list[list[Any]]) -> bool:
    """Whether an origin is made of nothing that pruning could change: numbers and sizes of inputs."""
    if isinstance(tree, int):
        return True
    if tree[0] == "attr":
        return False
    if tree[0] == "shape":
        return bool(tensors[tree[1]][3] == "input")
    return all(_constant_tree(part, tensors) for part in tree[1:])


_LIBRARIES = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(llmprune.__file__) + os.sep)


def _source_line(error: BaseException) -> str:
    """File, line and text of the innermost line of the model's own code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_LIBRARIES)]
    if not frames:
        return ""
    frame = frames[-1]
    return f"{os.path.basename(frame.filename)}:{frame.lineno}: {frame.line}"
