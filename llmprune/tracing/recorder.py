"""The recorder: a dispatch mode that writes every ATen operation of a forward pass onto a tape.

On the meta device nothing is computed, so a forward pass of any size is a matter of milliseconds; but models look at
small integer tensors (is this mask all ones? how long is the longest sequence?). Such tensors get a *shadow*: a real
tensor on the CPU that is computed alongside, for every operation whose tensor arguments all have one, and that answers
the questions that need values.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmprune.tracing.meta_results import KEEP_TYPE, concatenation, elementwise
from llmprune.tracing.rules import note_rule
from llmprune.tracing.tape import (
    BOOL,
    BOOLS,
    FLOAT,
    INT,
    INTS,
    MUTATES,
    NONE,
    OTHER,
    POINTWISE,
    TENSOR,
    TENSORS,
    Tape,
)

SHADOW_LIMIT = 1 << 20
"""Largest shadow kept, in elements."""

_META = torch.device("meta")
_CPU = torch.device("cpu")
_TO_THE_END = (1 << 63) - 1  # what ATen has for an open slice
_PURGE_EVERY = 64  # operations between two sweeps for dead tensors (real device only)


@dataclass(frozen=True)
class Operator:
    """What the schema of an ATen overload says, looked up once per trace."""

    name: str
    flags: int
    names: tuple[str, ...]
    defaults: tuple[tuple[int, ...], ...]
    views: tuple[int, ...]  # for each return: index of the argument it aliases, or -1
    mutated: tuple[int, ...]  # indices of the arguments written to
    dynamic: bool  # output sizes or values depend on data
    keeps_type: bool  # elementwise, and the result is of the floating inputs' type
    reshapes: bool = False  # written as the view it makes, but changes the tensor's own sizes (transpose_)

    def argument(self, place: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """An argument by its place in the schema; None where it is left to its default."""
        return args[place] if place < len(args) else kwargs.get(self.names[place])


def _dtype_class(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "f"
    if dtype.is_complex:
        return "c"
    return "b" if dtype is torch.bool else "i"


class Recorder(TorchDispatchMode):
    """Records onto ``tape`` while active.

    Args:
        tape: receives tensors and operations.
        meta: whether the pass runs on meta tensors with shadows (else on the model's own device).
        scope: () -> index into ``tape.scopes`` of the module that is running.
    """

    def __init__(self, tape: Tape, meta: bool, scope: Callable[[], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = tape
        self.meta = meta
        self.scope = scope
        self.last = ""  # the operation being executed
        self._ids: dict[int, int] = {}  # id(tensor) -> tensor id, while the tensor is in _alive
        self._alive: list[torch.Tensor] = []
        self._shadows: dict[int, torch.Tensor] = {}
        self._shadowed: dict[int, list[int]] = {}  # storage id -> tensor ids that have a shadow
        self._twins: dict[int, torch.Tensor] = {}  # tensor id of a CPU tensor -> its meta twin
        self._paused = False
        self._storages: dict[int, int] = {}  # storage pointer of a tensor from outside -> storage id
        self._storage_count = 0
        self._operators: dict[Any, Operator] = {}
        self._originals: dict[
            int, tuple[torch.Tensor, torch.Tensor]
        ] = {}  # storage id -> (tensor, value before)
        self._outside: dict[int, torch.Tensor] = {}  # storage id -> real tensor that is not ours to change

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """A recording is never compiled: no need for the framework to guard each operation against it."""
        return False

    # Tensors -----------------------------------------------------------------------------------------------------

    def tensor_id(self, tensor: torch.Tensor) -> int:
        """The number of a tensor; one not met before is a constant from outside the recorded operations."""
        tid = self._ids.get(id(tensor))
        return self.adopt(tensor, "constant", "") if tid is None else tid

    def numbered(self, tensor: torch.Tensor) -> int:
        """The number of a tensor, or -1 if it was never met."""
        return self._ids.get(id(tensor), -1)

    def adopt(
        self, tensor: torch.Tensor, role: str, name: str, shadow: torch.Tensor | None = None, key: Any = None
    ) -> int:
        """Number a tensor that no recorded operation made.

        Args:
            tensor: the tensor the model will use.
            role: ``parameter``, ``buffer``, ``input`` or ``constant``.
            name: canonical name.
            shadow: its value (CPU), if known and worth keeping.
            key: what identifies its storage, where that is not its own (a stand-in for tensors that share one).
        """
        if key is None:
            key = tensor.untyped_storage()._cdata
        storage = self._storages.get(key)
        if storage is None:
            storage = self._storages[key] = self._new_storage()
        tid = self._number(tensor, storage, role, name)
        if not tensor.is_meta and role != "input":
            self._outside.setdefault(storage, tensor)
        if shadow is None and self.meta and not tensor.is_meta and tensor.numel() <= SHADOW_LIMIT:
            with self.paused():
                shadow = tensor.detach().to(_CPU, copy=True)
        if shadow is not None:
            self._know(tid, shadow)
        return tid

    def constant(self, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A constant the model made from Python numbers, on ``device`` (meta, with its value as shadow)."""
        if not (self.meta and device.type == "meta"):
            with self.paused():
                value = value.to(device)
            self.adopt(value, "constant", "")
            return value
        with self.paused():
            twin = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=_META)
        self.adopt(twin, "constant", "", shadow=value)
        return twin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Operations inside run as they are and are not recorded."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def shadow(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The value of a meta tensor, where known."""
        return self._shadows.get(self._ids.get(id(tensor), -1))

    def constants(self) -> dict[int, torch.Tensor | None]:
        """The tensors that came from outside, parameters, buffers and inputs excepted: id -> value, where known."""
        roles = enumerate(entry[3] for entry in self.tape.tensors)
        return {tid: self._shadows.get(tid) for tid, role in roles if role == "constant"}

    def undo_writes(self) -> None:
        """Write back what parameters and buffers held before the pass wrote into them (real device)."""
        for tensor, before in self._originals.values():
            tensor.detach().copy_(before)
        self._originals.clear()

    def _new_storage(self) -> int:
        self._storage_count += 1
        return self._storage_count - 1

    def _number(self, tensor: torch.Tensor, storage: int, role: str, name: str) -> int:
        tensors = self.tape.tensors
        tid = len(tensors)
        tensors.append([list(tensor.shape), _dtype_class(tensor.dtype), storage, role, name])
        self._ids[id(tensor)] = tid
        self._alive.append(tensor)
        return tid

    def _purge(self) -> None:
        """Let go of values that nothing but this recorder holds."""
        kept = []
        tensors, ids = self.tape.tensors, self._ids
        while self._alive:
            tensor = self._alive.pop()
            # Held by the variable here and the call's argument only, and by no C++ code.
            unused = sys.getrefcount(tensor) == 2 and tensor._use_count() == 1  # type: ignore[attr-defined]
            if unused and tensors[ids[id(tensor)]][3] == "value":
                del ids[id(tensor)]
            else:
                kept.append(tensor)
        self._alive = kept[::-1]

    def _know(self, tid: int, shadow: torch.Tensor) -> None:
        self._shadows[tid] = shadow
        self._shadowed.setdefault(self.tape.tensors[tid][2], []).append(tid)

    # Operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and write it down."""
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        operator = self.operator(func)
        if operator.name == "aten::lift_fresh":  # a constant comes in as it is; adopted where it is used
            return func(*args, **kwargs)
        if operator.name == "aten::as_strided_" and _same_layout(*args, **kwargs):
            return func(*args, **kwargs)
        self.last = operator.name
        code, tids, tensors = self._encode(operator, args, kwargs)
        if operator.reshapes:
            return self._run_reshaping(func, operator, code, args, kwargs)
        shadows: list[torch.Tensor | None] | None = None
        if self.meta:
            out, shadows = self._run_meta(func, operator, args, kwargs, tids, tensors)
        else:
            if operator.mutated:
                self._save_original(operator, args, kwargs)
            out = func(*args, **kwargs)
        outputs = self._write(operator, code, args, kwargs, out)
        if shadows is not None:
            for tid, shadow in zip(outputs, shadows, strict=True):
                if shadow is not None and tid >= 0 and tid not in self._shadows:
                    self._know(tid, shadow)
        if not self.meta and len(self.tape.ops) % _PURGE_EVERY == 0:
            self._purge()
        return out

    def _run_reshaping(
        self, func: Any, operator: Operator, code: list[int], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """An operation that gives its tensor other sizes, as the view it is: the tensor gets a new number."""
        tensor = args[0]
        before = self._ids[id(tensor)]
        shadow = self._shadows.get(before)
        out = func(*args, **kwargs)
        after = self._number(tensor, self.tape.tensors[before][2], "value", "")
        if shadow is not None and tensor.is_meta:
            with self.paused():
                self._know(after, func(shadow.view_as(shadow), *args[1:], **kwargs))
        self.tape.ops.append([operator.name, operator.flags, code, [after], self.scope()])
        return out

    def operator(self, func: Any) -> Operator:
        """The schema of an overload, read once."""
        operator = self._operators.get(func)
        if operator is None:
            operator = self._operators[func] = read_schema(func)
            note_rule(self.tape, func._schema)
        return operator

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
        """Write down an operation that was run elsewhere, as if it had been ``func``."""
        operator = self.operator(func)
        self._write(operator, self._encode(operator, args, kwargs)[0], args, kwargs, out)

    def _encode(
        self, operator: Operator, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[list[int], list[int], list[torch.Tensor]]:
        """The arguments in schema order as tagged integers; the ids of the tensors among them; these tensors."""
        code: list[int] = []
        tids: list[int] = []
        tensors: list[torch.Tensor] = []
        ids = self._ids
        given = len(args)
        for place, name in enumerate(operator.names):
            if place < given:
                value = args[place]
            elif name in kwargs:
                value = kwargs[name]
            else:
                code += operator.defaults[place]
                continue
            if isinstance(value, torch.Tensor):
                tid = ids.get(id(value))
                if tid is None:
                    tid = self.adopt(value, "constant", "")
                code += (TENSOR, tid)
                tids.append(tid)
                tensors.append(value)
            elif type(value) is int:
                code += (INT, value)
            elif isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
                code += (TENSORS, len(value))
                for item in value:
                    tid = -1
                    if item is not None:
                        tid = self.tensor_id(item)
                        tids.append(tid)
                        tensors.append(item)
                    code.append(tid)
            else:
                code += encode_plain(value)
        return code, tids, tensors

    def _write(
        self, operator: Operator, code: list[int], args: Sequence[Any], kwargs: dict[str, Any], out: Any
    ) -> list[int]:
        """Put an executed operation on the tape; the ids of its results."""
        if operator.name == "aten::index":
            piece = self._constant_slice(args)
            if piece is not None:
                operator, code = piece
        outputs: list[int] = []
        if isinstance(out, torch.Tensor):
            outputs.append(self._result(out, operator, 0, 0, args, kwargs))
        elif isinstance(out, (tuple, list)):
            for place, item in enumerate(out):
                if isinstance(item, torch.Tensor):
                    outputs.append(self._result(item, operator, place, place, args, kwargs))
                elif isinstance(item, (tuple, list)):
                    parts = enumerate(item)
                    outputs.extend(
                        self._result(part, operator, place, nth, args, kwargs) for nth, part in parts
                    )
                else:
                    outputs.append(-1)
        elif out is not None:
            outputs.append(-1)
        elif operator.mutated:
            for place in operator.mutated:
                outputs.extend(self._ids[id(item)] for item in _each(operator.argument(place, args, kwargs)))
        self.tape.ops.append([operator.name, operator.flags, code, outputs, self.scope()])
        return outputs

    def _result(
        self,
        tensor: torch.Tensor,
        operator: Operator,
        place: int,
        nth: int,
        args: Any,
        kwargs: dict[str, Any],
    ) -> int:
        tid = self._ids.get(id(tensor))
        if tid is not None:
            return tid  # written in place, or an argument handed back
        source = operator.views[min(place, len(operator.views) - 1)]
        if source < 0:
            return self._number(tensor, self._new_storage(), "value", "")
        base = operator.argument(source, args, kwargs)
        if isinstance(base, (list, tuple)):
            base = base[nth]
        return self._number(tensor, self.tape.tensors[self._ids[id(base)]][2], "value", "")

    def _constant_slice(self, args: Sequence[Any]) -> tuple[Operator, list[int]] | None:
        """``x[:, [4, 5]]`` with numbers written in the code is the slice ``x[:, 4:6]``; None for other indexing."""
        given = [(dim, index) for dim, index in enumerate(args[1]) if index is not None]
        if len(given) != 1:
            return None
        dim, index = given[0]
        tid = self._ids[id(index)]
        if index.dim() != 1 or index.dtype != torch.int64 or self.tape.tensors[tid][3] != "constant":
            return None
        values = self._shadows.get(tid, index)
        if values.is_meta or values.numel() == 0:
            return None
        with self.paused():
            places = values.tolist()
        first, last = places[0], places[-1]
        if places != list(range(first, last + 1)) or first < 0 <= last:
            return None
        stop = _TO_THE_END if last == -1 else last + 1  # counted from the end where the code did
        operator = self.operator(torch.ops.aten.slice.Tensor)
        code = [TENSOR, self._ids[id(args[0])]]
        for value in (dim, first, stop, 1):
            code += encode_plain(value)
        return replace(operator, views=(-1,)), code

    def _save_original(self, operator: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Before a write into a parameter's or buffer's storage: keep what it held."""
        for place in operator.mutated:
            for item in _each(operator.argument(place, args, kwargs)):
                storage = self.tape.tensors[self._ids[id(item)]][2]
                owner = self._outside.get(storage)
                if owner is not None and storage not in self._originals:
                    self._originals[storage] = (owner, owner.detach().clone())

    # On meta -----------------------------------------------------------------------------------------------------

    def _run_meta(
        self,
        func: Any,
        operator: Operator,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tids: list[int],
        tensors: list[torch.Tensor],
    ) -> tuple[Any, list[torch.Tensor | None] | None]:
        """Run an operation on meta tensors and, where all of them have one, on their shadows.

        Returns:
            The result, and the shadows of its tensors in order (None: it has none).
        """
        known = all(map(self._shadows.__contains__, tids))
        device = kwargs.get("device")
        if not tensors and "device" in operator.names:  # a model is on one device, which is meta for now
            kwargs = {**kwargs, "device": _META}
            device = _META
        on_meta = [tensor.is_meta for tensor in tensors]
        if not any(on_meta) and (device is None or device.type != "meta"):
            if operator.mutated:
                self._save_original(operator, args, kwargs)
            out = func(*args, **kwargs)
            return out, list(_tensors(out))  # all on the CPU: each is its own shadow
        if device is not None and device.type != "meta" and tensors:
            if known and operator.name == "aten::_to_copy":
                out = func(self._real(args[0]), **kwargs)  # asked for the values: here they are
                return out, [out]
            kwargs = {**kwargs, "device": _META}
        if operator.dynamic:
            return self._run_dynamic(func, operator, args, kwargs, known)
        if not all(on_meta):
            args, kwargs = _replace(args, self._twin), {k: _replace(v, self._twin) for k, v in kwargs.items()}
        if not known:
            return self._run_unknown(func, operator, args, kwargs, tensors, all(on_meta)), None
        try:
            out = func(*args, **kwargs)
        except NotImplementedError:  # no meta kernel: the values tell the sizes
            real = self._run_real(func, args, kwargs)
            return _replace(real, self._as_meta), list(_tensors(real))
        if sum(tensor.numel() for tensor in _tensors(out) if tensor is not None) > SHADOW_LIMIT:
            if operator.mutated:
                self._forget(operator, args, kwargs)
            return out, None
        real = self._run_real(func, args, kwargs)
        if operator.name.startswith(("aten::empty", "aten::new_empty")):
            real.zero_()
        return out, list(_tensors(real))

    def _run_unknown(
        self,
        func: Any,
        operator: Operator,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
        on_meta: bool,
    ) -> Any:
        """Run an operation of whose inputs not all have shadows: on meta alone, by a shortcut where one knows how."""
        out = None
        if operator.mutated:
            self._forget(operator, args, kwargs)
        elif operator.keeps_type:
            out = elementwise(tensors)
        elif operator.name == "aten::cat" and on_meta:
            out = concatenation(tensors, args[1] if len(args) > 1 else kwargs.get("dim", 0))
        return func(*args, **kwargs) if out is None else out

    def _run_dynamic(
        self, func: Any, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], known: bool
    ) -> tuple[Any, list[torch.Tensor | None] | None]:
        """Run an operation whose result's sizes, or whose result, depend on values."""
        if known:
            real = self._run_real(func, args, kwargs)
            return _replace(real, self._as_meta), list(_tensors(real))
        if operator.name == "aten::index":
            indices: list[torch.Tensor | None] = []
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    indices.extend(self._as_meta(part) for part in self._real(index).nonzero(as_tuple=True))
                else:
                    indices.append(index if index is None else self._twin(index))
            return func(self._twin(args[0]), indices), None
        if operator.name == "aten::masked_select":
            mask = self._real(args[1])
            shape = torch.broadcast_shapes(args[0].shape, mask.shape)  # type: ignore[no-untyped-call]
            return args[0].new_empty(int(mask.expand(shape).sum())), None
        raise DataDependentError(f"{operator.name} depends on computed values")

    def _run_real(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on the shadows."""
        if kwargs:
            kwargs = {k: _CPU if k == "device" else _replace(v, self._real) for k, v in kwargs.items()}
        return func(*_replace(args, self._real), **kwargs)

    def _real(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            original = self._ids.get(id(tensor))
            return tensor if original is None else self._shadows.get(original, tensor)
        shadow = self.shadow(tensor)
        if shadow is None:
            raise DataDependentError("the values of a computed tensor are asked for")
        return shadow

    def _as_meta(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=_META)

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor on meta, under the same number."""
        if tensor.is_meta:
            return tensor
        tid = self._ids[id(tensor)]
        twin = self._twins.get(tid)
        if twin is None:
            twin = self._twins[tid] = self._as_meta(tensor)
            self._ids[id(twin)] = tid
        return twin

    def _forget(self, operator: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Something unknown is written: everything on that storage loses its shadow."""
        for place in operator.mutated:
            for item in _each(operator.argument(place, args, kwargs)):
                for tid in self._shadowed.pop(self.tape.tensors[self._ids[id(item)]][2], ()):
                    self._shadows.pop(tid, None)


class DataDependentError(RuntimeError):
    """The forward pass asks for values that are not known on the meta device."""


def read_schema(func: Any) -> Operator:
    """What the tape needs to know of an overload."""
    schema = func._schema
    names = tuple(argument.name for argument in schema.arguments)
    defaults = tuple(
        tuple(encode_plain(argument.default_value if argument.has_default_value() else None))
        for argument in schema.arguments
    )
    sets = [argument.alias_info for argument in schema.arguments]
    # A list of views ("Tensor(a -> *) self" to "Tensor(a)[]") comes with empty sets: it aliases the first that may be.
    views = tuple(
        -1
        if ret.alias_info is None
        else next(
            place
            for place, info in enumerate(sets)
            if info and (not ret.alias_info.before_set or info.before_set & ret.alias_info.before_set)
        )
        for ret in schema.returns
    )
    mutated = tuple(place for place, info in enumerate(sets) if info is not None and info.is_write)
    reshapes = torch.Tag.inplace_view in func.tags and schema.name.endswith("_")
    mutates = bool(mutated) and not reshapes
    flags = (POINTWISE if torch.Tag.pointwise in func.tags else 0) | (MUTATES if mutates else 0)
    dynamic = torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags
    keeps_type = schema.name in KEEP_TYPE and not mutated
    name = schema.name[:-1] if reshapes else schema.name
    return Operator(name, flags, names, defaults, views, mutated, dynamic, keeps_type, reshapes)


def encode_plain(value: Any) -> Sequence[int]:
    """An argument that is no tensor as a tag and its payload."""
    if value is None:
        return (NONE,)
    if isinstance(value, bool):
        return (BOOL, int(value))
    if isinstance(value, int):
        return (INT, int(value))
    if isinstance(value, float):
        return (FLOAT, struct.unpack("<q", struct.pack("<d", value))[0])
    if isinstance(value, (list, tuple)):
        if all(isinstance(item, bool) for item in value) and value:
            return (BOOLS, len(value), *map(int, value))
        if all(isinstance(item, int) for item in value):
            return (INTS, len(value), *map(int, value))
        if all(item is None for item in value):
            return (TENSORS, len(value), *(-1 for _ in value))
    return (OTHER,)


def _same_layout(tensor: torch.Tensor, size: Any, stride: Any, storage_offset: Any = None) -> bool:
    """Whether as_strided_ with these arguments leaves every element where it is."""
    return (
        list(tensor.size()) == list(size)
        and storage_offset in (None, tensor.storage_offset())
        and all(n == 1 or a == b for n, a, b in zip(size, tensor.stride(), stride, strict=True))
    )


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else () if value is None else (value,)


def _replace(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with every tensor in it (one list or tuple deep, as in ATen schemas) changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_replace(item, change) for item in value])
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor | None]:
    """The results of an operation in the order of its outputs on the tape."""
    if isinstance(value, torch.Tensor) or not isinstance(value, (list, tuple)):
        if value is not None:
            yield value if isinstance(value, torch.Tensor) else None
        return
    for item in value:
        if isinstance(item, (list, tuple)):
            yield from item
        else:
            yield item if isinstance(item, torch.Tensor) else None
