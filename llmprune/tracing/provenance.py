"""Where integers come from: sizes that a forward pass reads from module attributes, configs and shapes.

ATen sees ``view(2, 7, 12, 64)``; after pruning we must know that 12 was ``attn.num_heads``. While a model is traced,
every integer attribute of its modules and every size read from a tensor is a :class:`PInt`, an ``int`` that remembers
its origin through arithmetic; :class:`SizeMode` sees the functions that make or view tensors and notes, for each size
argument with a known origin, an equation *origin = size of that dimension of the result*.

Origins are trees: an ``int``, ``("attr", module path, name, value)``, ``("shape", tensor id, dim)``, ``(op, a, b)``
with ``op`` one of ``+ - * // % max min``, or ``("neg", a)``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch._C import _functorch
from torch.overrides import TorchFunctionMode

from llmprune.tracing.declared import size_equations
from llmprune.tracing.rules import rule_of_call

Tree = Any
"""An origin: ``int | tuple`` as described above (recursive, so not spelt out for the type checker)."""


class Watcher(Protocol):
    """What integers with an origin report to."""

    def spent(self, tree: Tree) -> None:
        """The value of ``tree`` entered floating-point arithmetic."""

    def met(self, a: Tree, b: Tree) -> None:
        """Two integers were compared and found equal."""


class PInt(int):
    """An ``int`` with an origin. It behaves as an ``int`` everywhere; copies and pickles are plain ints.

    Attributes:
        tree: the origin.
        watcher: is told when the value itself enters floating-point arithmetic, and when it equals another.
    """

    tree: Tree
    watcher: Watcher

    def __new__(cls, value: int, tree: Tree, watcher: Watcher) -> PInt:
        """An integer equal to ``value`` that came from ``tree``."""
        self = int.__new__(cls, value)
        self.tree = tree
        self.watcher = watcher
        return self

    def spent(self) -> None:
        """Report that the value has been used as a number."""
        self.watcher.spent(self.tree)

    def __float__(self) -> float:
        """The value as a number: whatever this integer sizes can no longer change."""
        self.spent()
        return float(int(self))

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        if equal is True and type(other) is PInt:
            self.watcher.met(self.tree, other.tree)
        return equal

    def __ne__(self, other: object) -> bool:
        unequal = int.__ne__(self, other)
        if unequal is False and type(other) is PInt:
            self.watcher.met(self.tree, other.tree)
        return unequal

    __hash__ = int.__hash__

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """``numpy.sqrt(size)``: NumPy reads an integer's value without asking for it as a float."""
        for value in inputs:
            if type(value) is PInt:
                value.spent()
        plain = (int(value) if type(value) is PInt else value for value in inputs)
        return getattr(ufunc, method)(*plain, **kwargs)

    def __neg__(self) -> PInt:
        return PInt(-int(self), ("neg", self.tree), self.watcher)

    def __pos__(self) -> PInt:
        return self

    def __abs__(self) -> PInt:
        return self if self >= 0 else -self

    def __round__(self, ndigits: Any = None) -> PInt:
        return self

    __floor__ = __ceil__ = __trunc__ = __pos__

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __copy__(self) -> int:
        return int(self)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return int, (int(self),)


def tree_of(value: int) -> Tree:
    """The origin of an integer: its tree, or the constant it is."""
    return value.tree if type(value) is PInt else int(value)


def _exact(symbol: str, operate: Callable[[Any, Any], Any], swapped: bool) -> Callable[[PInt, Any], Any]:
    """An operator that keeps the origin when the other operand is an integer."""

    def method(self: PInt, other: Any) -> Any:
        if not isinstance(other, int):
            if isinstance(other, float):
                self.spent()
                mine = float(int(self))
                return operate(other, mine) if swapped else operate(mine, other)
            return NotImplemented
        a, b = (other, self) if swapped else (self, other)
        value = operate(int(a), int(b))
        left, right = tree_of(a), tree_of(b)
        if (right == 0 and symbol in "+-") or (right == 1 and symbol in ("*", "//")):
            return PInt(value, left, self.watcher)
        if (left == 0 and symbol == "+") or (left == 1 and symbol == "*"):
            return PInt(value, right, self.watcher)
        return PInt(value, (symbol, left, right), self.watcher)

    return method


def _inexact(operate: Callable[[Any, Any], Any], swapped: bool) -> Callable[[PInt, Any], Any]:
    """An operator whose result is a number, no size: the value is spent."""

    def method(self: PInt, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        self.spent()
        if type(other) is PInt:
            other.spent()
            other = int(other)
        return operate(other, int(self)) if swapped else operate(int(self), other)

    return method


for _name, _symbol, _operate in (
    ("add", "+", operator.add),
    ("sub", "-", operator.sub),
    ("mul", "*", operator.mul),
    ("floordiv", "//", operator.floordiv),
    ("mod", "%", operator.mod),
):
    setattr(PInt, f"__{_name}__", _exact(_symbol, _operate, False))
    setattr(PInt, f"__r{_name}__", _exact(_symbol, _operate, True))
for _name, _operate in (("truediv", operator.truediv), ("pow", operator.pow)):
    setattr(PInt, f"__{_name}__", _inexact(_operate, False))
    setattr(PInt, f"__r{_name}__", _inexact(_operate, True))


class SizeMode(TorchFunctionMode):
    """Watches the Python-level torch functions of one forward pass.

    Args:
        tensor_id: tensor -> its number on the tape (numbering it if new).
        scope: () -> index of the module that is running.

    Attributes:
        equations: (tensor id, dim, tree, function name, scope index) in the order met, without duplicates.
        value_used: (tree, scope index, tensor id of what it went into or -1), in the order met, without duplicates.
        overrides: functions run differently during a trace (``torch.tensor`` on meta, fused attention): function ->
            replacement called as ``replacement(func, args, kwargs)``.
    """

    def __init__(self, tensor_id: Callable[[torch.Tensor], int], scope: Callable[[], int]) -> None:
        super().__init__()
        self.tensor_id = tensor_id
        self.scope = scope
        self.equations: dict[tuple[Any, ...], None] = {}
        self.value_used: dict[tuple[Any, ...], None] = {}
        self.overrides: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {}
        self._shapes: dict[int, tuple[torch.Size, torch.Size]] = {}

    def spent(self, tree: Tree, into: Any = None) -> None:
        """Note that the value of ``tree`` entered arithmetic as a number, giving the tensor ``into`` if known."""
        target = self.tensor_id(_inside(into)) if isinstance(into, torch.Tensor) else -1
        self.value_used[tree, self.scope(), target] = None

    def met(self, a: Tree, b: Tree) -> None:
        """Note the equation that a comparison of a size with a module's integers gives: code that checks, must pass."""
        for one, other in ((a, b), (b, a)):
            if _is_shape(one) and not isinstance(other, int) and not _is_shape(other):
                self.equations[one[1], one[2], other, "comparison", self.scope()] = None

    def attribute(self, value: int, module: str, name: str) -> PInt:
        """An integer that came from an attribute of a module."""
        return PInt(value, ("attr", module, name, value), self)

    def shape(self, tensor: torch.Tensor) -> torch.Size:
        """The sizes of a tensor, each remembering where it was read; plain ones inside vmap, whose dims no tape has."""
        if _functorch.is_functorch_wrapped_tensor(tensor):
            return tensor.shape
        tid = self.tensor_id(tensor)
        plain, known = self._shapes.get(tid, (None, None))
        sizes = tensor.shape
        if known is None or plain != sizes:  # in-place ops may resize
            known = torch.Size([PInt(n, ("shape", tid, d), self) for d, n in enumerate(sizes)])
            self._shapes[tid] = sizes, known
        return known

    def equate(self, tensor: Any, dim: int, size: Any, where: str) -> None:
        """Note that ``size`` (if its origin is known) gave ``tensor.shape[dim]``."""
        if _functorch.is_functorch_wrapped_tensor(tensor):
            return
        if type(size) is PInt and tensor.shape[dim] == size:
            self.equations[self.tensor_id(tensor), dim, size.tree, where, self.scope()] = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and note the equations its size arguments give."""
        if func == _SHAPE_GET:  # a method wrapper: equal, never identical
            return self.shape(args[0])
        kwargs = kwargs or {}
        override = self.overrides.get(func)
        out = func(*args, **kwargs) if override is None else override(func, args, kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None:
            answer = handler(self, func.__name__, args, kwargs, out)
            return out if answer is None else answer
        numbers: Any = (*args, *kwargs.values()) if kwargs else args
        rule = rule_of_call(func)
        if rule is not None:
            given, sized = size_equations(rule, func, args, kwargs, out, self.shape)
            for tensor, dim, size in sized.values():
                self.equate(tensor, dim, size, rule.op)
            numbers = [value for name, value in given.items() if name not in sized]
        for value in numbers:
            if type(value) is PInt:
                self.spent(value.tree, out)
            elif type(value) in (list, tuple) and override is not None:
                for size in _sizes_within(value):
                    self.spent(size.tree, out)
        return out


def _is_shape(tree: Tree) -> bool:
    return not isinstance(tree, int) and bool(tree[0] == "shape")


def without_dispatch(function: Callable[..., Any]) -> Callable[..., Any]:
    """A torch function written in Python that does not hand itself to the active function modes, though its parts do.

    A mode is off inside a function it was handed; what the function reads and compares there would go unseen.
    """
    assert isinstance(function, FunctionType)
    own = {**function.__globals__, "has_torch_function": lambda _tensors: False}
    twin = FunctionType(
        function.__code__, own, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _sizes_within(values: Sequence[Any]) -> Iterator[PInt]:
    """The sizes in nested lists of numbers that become a tensor."""
    for value in values:
        if type(value) is PInt:
            yield value
        elif type(value) in (list, tuple):
            yield from _sizes_within(value)


def _inside(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that a transformation (vmap) has wrapped."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


Handler = Callable[[SizeMode, str, Sequence[Any], Mapping[str, Any], Any], Any]
_HANDLERS: dict[Any, Handler] = {}
_SHAPE_GET = torch.Tensor.shape.__get__  # type: ignore[attr-defined]


def _handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for ``torch.Tensor.name``, ``torch.name`` and ``torch.nn.functional.name``."""

    def register(handler: Handler) -> Handler:
        for name in names:
            for owner in (torch.Tensor, torch, F):
                if hasattr(owner, name):
                    _HANDLERS[getattr(owner, name)] = handler
        return handler

    return register


def _flat(args: Sequence[Any], kwargs: Mapping[str, Any], *keys: str) -> Sequence[Any]:
    """Sizes given as ``f(2, 3)``, ``f((2, 3))`` or by keyword."""
    if not args:
        for key in keys:
            if key in kwargs:
                value = kwargs[key]
                return value if isinstance(value, (tuple, list)) else (value,)
        return ()
    return args[0] if isinstance(args[0], (tuple, list)) else args


def _argument(
    args: Sequence[Any], kwargs: Mapping[str, Any], place: int, key: str, default: Any = None
) -> Any:
    return args[place] if len(args) > place else kwargs.get(key, default)


@_handles("size")
def _size(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    dim = _argument(args, kwargs, 1, "dim")
    sizes = mode.shape(args[0])
    return sizes if dim is None else sizes[dim]


@_handles("numel", "nelement")
def _numel(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    total: Any = 1
    for size in mode.shape(args[0]):
        total = total * size
    return total


@_handles("__len__")
def _len(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    return None  # len() accepts exact ints only


@_handles(
    "view",
    "reshape",
    "expand",
    "broadcast_to",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "as_strided",
)
def _sizes_after_tensor(
    mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
) -> Any:
    sizes = _flat(args[1:], kwargs, "size", "shape")
    source: Any = None
    for dim, size in enumerate(sizes):
        if type(size) is not PInt:
            continue
        if source is None:
            source = ("shape", mode.tensor_id(args[0]))
        # The same leading dimension of the same tensor says nothing.
        if (
            size.tree[:2] == source
            and size.tree[2] == dim
            and args[0].shape[: dim + 1] == out.shape[: dim + 1]
        ):
            continue
        mode.equate(out, dim, size, where)


@_handles("zeros", "ones", "empty", "full", "rand", "randn")
def _sizes_first(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    for dim, size in enumerate(_flat(args, kwargs, "size")):
        mode.equate(out, dim, size, where)
    if where == "full":
        value = _argument(args, kwargs, 1, "fill_value")
        if type(value) is PInt:
            mode.spent(value.tree)


@_handles("view_as", "reshape_as", "expand_as")
def _like(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    for dim, size in enumerate(mode.shape(args[1])):
        mode.equate(out, dim, size, where)


@_handles("unflatten")
def _unflatten(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    dim = _argument(args, kwargs, 1, "dim")
    sizes = _argument(args, kwargs, 2, "sizes", ())
    first = dim % args[0].dim() if isinstance(dim, int) else 0
    for place, size in enumerate(sizes):
        mode.equate(out, first + place, size, where)


@_handles("split", "split_with_sizes", "tensor_split")
def _split(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    if where == "tensor_split":
        return _chunk(mode, where, args, kwargs, out)
    sizes = args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_size"))
    if not out or sizes is None:
        return None
    dim = _argument(args, kwargs, 2, "dim", 0) % args[0].dim()
    if isinstance(sizes, int):
        size = sizes
        for piece in out[:-1] if out[-1].shape[dim] != size else out:
            mode.equate(piece, dim, size, where)
        if out[-1].shape[dim] != size and type(size) is PInt:
            mode.equate(out[-1], dim, mode.shape(args[0])[dim] - size * (len(out) - 1), where)
        return None
    for piece, size in zip(out, sizes, strict=False):
        mode.equate(piece, dim, size, where)
    return None


@_handles("chunk")
def _chunk(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    count = args[1] if len(args) > 1 else kwargs.get("chunks", kwargs.get("indices_or_sections"))
    if not isinstance(count, int) or not out:
        return
    dim = _argument(args, kwargs, 2, "dim", 0) % args[0].dim()
    whole = mode.shape(args[0])[dim]
    if whole % int(count) == 0:
        for piece in out:
            mode.equate(piece, dim, whole // count, where)


@_handles("narrow")
def _narrow(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    dim = _argument(args, kwargs, 1, "dim", 0)
    mode.equate(out, dim % out.dim(), _argument(args, kwargs, 3, "length"), where)


@_handles("repeat", "tile")
def _repeat(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    times = _flat(args[1:], kwargs, "repeats", "dims")
    sizes = mode.shape(args[0])
    for back in range(1, min(len(times), len(sizes)) + 1):
        if type(times[-back]) is PInt:
            mode.equate(out, out.dim() - back, times[-back] * sizes[-back], where)
    for dim in range(len(times) - len(sizes)):
        mode.equate(out, dim, times[dim], where)


@_handles("repeat_interleave")
def _repeat_interleave(
    mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
) -> Any:
    times = _argument(args, kwargs, 1, "repeats")
    dim = _argument(args, kwargs, 2, "dim")
    if type(times) is PInt and isinstance(dim, int):
        mode.equate(out, dim % out.dim(), mode.shape(args[0])[dim] * times, where)


@_handles("unfold")
def _unfold(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    if len(args) == 4:  # Tensor.unfold(dim, size, step); F.unfold works on images only
        mode.equate(out, out.dim() - 1, args[2], where)


@_handles("pad")
def _pad(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    pads = _argument(args, kwargs, 1, "pad", ())
    sizes = mode.shape(args[0])
    for back in range(len(pads) // 2):
        before, after = pads[2 * back], pads[2 * back + 1]
        if type(before) is PInt or type(after) is PInt:
            mode.equate(out, out.dim() - 1 - back, sizes[-1 - back] + before + after, where)


@_handles("arange")
def _arange(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    start = args[0] if len(args) > 1 else kwargs.get("start", 0)
    stop = args[1] if len(args) > 1 else args[0] if args else kwargs.get("end")
    step = _argument(args, kwargs, 2, "step", 1)
    if not isinstance(step, int) or step != 1:
        for value in (start, stop, step):
            if type(value) is PInt:
                mode.spent(value.tree)
    elif isinstance(start, int) and isinstance(stop, int):
        mode.equate(out, 0, stop - start, where)


@_handles("layer_norm", "rms_norm")
def _norm(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    sizes = _argument(args, kwargs, 1, "normalized_shape", ())
    for place, size in enumerate(sizes):
        mode.equate(out, out.dim() - len(sizes) + place, size, where)


@_handles("group_norm")
def _group_norm(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    groups = _argument(args, kwargs, 1, "num_groups")
    if type(groups) is PInt:  # whole groups may go: a group keeps its channels
        mode.equate(out, 1, groups * (out.shape[1] // int(groups)), where)


@_handles("multi_head_attention_forward")
def _multi_head(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    return None  # its parts have been seen: see Recording._multi_head


@_handles("conv1d", "conv2d", "conv3d")
def _convolution(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    groups = _argument(args, kwargs, 6, "groups", 1)
    if type(groups) is PInt:
        x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
        channels = weight.dim() - 2
        mode.equate(x, x.dim() - 1 - channels, groups * mode.shape(weight)[1], where)


@_handles("__getitem__")
def _getitem(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    x, index = args
    items = index if isinstance(index, tuple) else (index,)
    sliced = False
    for item in items:
        kind = type(item)
        if kind is slice:
            if type(item.start) is PInt or type(item.stop) is PInt:
                sliced = True
        elif kind is PInt:
            mode.spent(item.tree)
        elif not (item is None or item is Ellipsis or kind is int):
            return None  # indexed by data: sizes come from there
    if not sliced:
        return None
    used = sum(1 for item in items if item is not None and item is not Ellipsis)
    source = target = 0
    for item in items:
        if item is None:
            target += 1
        elif item is Ellipsis:
            source += x.dim() - used
            target += x.dim() - used
        elif isinstance(item, int):
            source += 1
        else:
            if item.step is None or item.step == 1:
                mode.equate(out, target, _slice_size(mode.shape(x)[source], item.start, item.stop), "slice")
            source += 1
            target += 1
    return None


def _slice_size(whole: Any, start: Any, stop: Any) -> Any:
    """The size of ``whole[start:stop]`` with its origin; a plain int where it has none of its own."""
    if type(start) is not PInt and type(stop) is not PInt:
        return int(whole)
    begin = 0 if start is None else start if start >= 0 else whole + start
    end = whole if stop is None or int(stop) > int(whole) else stop if stop >= 0 else whole + stop
    return end - begin


@_handles("tensor", "as_tensor", "new_tensor")
def _data(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    stack = [*args, kwargs.get("data")]
    while stack:
        value = stack.pop()
        if type(value) is PInt:
            mode.spent(value.tree, out)
        elif type(value) in (tuple, list, torch.Size):
            stack.extend(value)


# Functions whose integer arguments name dimensions or leave sizes alone: nothing to note.
@_handles(
    "transpose", "permute", "unsqueeze", "squeeze", "flatten", "softmax", "dim", "stride", "is_contiguous"
)
def _nothing(mode: SizeMode, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    return None
