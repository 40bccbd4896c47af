"""Normalising operations over part of an axis: the other half of a masked reference.

Zeroing the parameters of a removed slice makes its activations zero, which is the same as removing it everywhere
except where something divides by the axis' size or by a sum of exponentials over it. There the reference computes the
operation over the kept positions only. :class:`KeptPositions` does that, to operations given by name and number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llmprune.errors import VerificationError

# Operations in which a removed position has no say once it holds the worst possible value.
_WORST_LAST = {
    "_softmax",
    "_log_softmax",
    "_safe_softmax",
    "softmax",
    "log_softmax",
    "logsumexp",
    "amax",
    "max",
    "argmax",
}
_WORST_FIRST = {"amin", "min", "argmin"}
# Operations that reduce the axis away (or to 1): they just see fewer elements.
_REDUCTIONS = {
    "mean",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "sum",
    "norm",
    "linalg_vector_norm",
    "median",
    "nanmean",
}
# (input, normalized_shape, weight, [bias,] eps): the number of tensors that follow normalized_shape.
_LAST_DIMS = {"native_layer_norm": 2, "layer_norm": 2, "rms_norm": 1, "_fused_rms_norm": 1}
_GROUP_NORM = "native_group_norm"
_BATCH_NORMS = {"native_batch_norm", "_native_batch_norm_legit"}
_FUSED_ATTENTION = "scaled_dot_product_attention"
_OWN_FORM = {
    *_WORST_LAST,
    *_WORST_FIRST,
    "topk",
    *_REDUCTIONS,
    *_LAST_DIMS,
    *_BATCH_NORMS,
    _GROUP_NORM,
    _FUSED_ATTENTION,
}


def has_masked_form(name: str) -> bool:
    """Whether an ATen operation's masked form is written here; others run on cut operands, spread out afterwards."""
    space, _, base = name.partition("::")
    return space == "aten" and base in _OWN_FORM


class KeptPositions(TorchDispatchMode):
    """Runs a forward pass with the marked operations restricted to the positions a plan keeps.

    Args:
        marked: objects with ``name`` (``aten::mean``), ``nth`` (how many operations of that name come before),
            ``arg`` (position of the tensor argument), ``dim``, ``kept`` (positions), ``size`` (of the whole axis),
            ``module`` (a path, for messages), ``cuts`` and ``spread`` (:class:`llmprune.tracing.graph.MarkedOp`).

    Attributes:
        counts: operations met so far, by name.
        done: the marked operations met so far.
    """

    def __init__(self, marked: Iterable[Any] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.done = 0
        self.paused = False
        self._marked: dict[tuple[str, int], list[Any]] = {}
        for op in marked:
            self._marked.setdefault((op.name, op.nth), []).append(op)

    @property
    def missing(self) -> list[Any]:
        """Marked operations that the forward pass has not met."""
        return [op for (name, nth), ops in self._marked.items() if nth >= self.counts[name] for op in ops]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count the operation and run it, over the kept positions if it is a marked one."""
        if self.paused:
            return func(*args, **(kwargs or {}))
        ops = self.next(func._schema.name)
        if not ops:
            return func(*args, **(kwargs or {}))
        arguments = _bind(func, args, kwargs or {})
        for op in ops:
            _check(op, arguments[op.arg] if op.arg < len(arguments) else None)
        return _restricted(func, arguments, ops)

    def next(self, name: str) -> list[Any]:
        """Count one operation of this name; what is marked about it."""
        ops = self._marked.get((name, self.counts[name]), [])
        self.counts[name] += 1
        self.done += len(ops)
        return ops


class _FusedAttention(TorchFunctionMode):
    """Counts fused attention as one operation, as a trace does: which operations it is made of varies by device."""

    def __init__(self, counting: KeptPositions) -> None:
        super().__init__()
        self._counting = counting

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, over the kept keys if it is a marked fused attention."""
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        ops = self._counting.next(f"aten::{_FUSED_ATTENTION}")
        if ops:
            kwargs = {**dict(zip(_FUSED_ARGUMENTS, args, strict=False)), **kwargs}
            args = ()
        for op in ops:
            _check(op, kwargs["key"])
            for name in ("key", "value"):
                kwargs[name] = _select(kwargs[name], op.dim, op.kept)
            mask = kwargs.get("attn_mask")
            if mask is not None and mask.shape[-1] == op.size:
                kwargs["attn_mask"] = _select(mask, -1, op.kept)
        self._counting.paused = True
        try:
            return func(*args, **kwargs)
        finally:
            self._counting.paused = False


_FUSED_ARGUMENTS = (
    "query",
    "key",
    "value",
    "attn_mask",
    "dropout_p",
    "is_causal",
    "scale",
    "enable_gqa",
)


@contextmanager
def kept_positions(marked: Iterable[Any]) -> Iterator[KeptPositions]:
    """:class:`KeptPositions` with operations numbered as a trace numbers them."""
    with KeptPositions(marked) as mode, _FusedAttention(mode):
        yield mode


def _check(op: Any, tensor: Any) -> None:
    """The marked operation met the dimension it was traced with."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0 or tensor.shape[op.dim] != op.size:
        found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else tensor
        raise VerificationError(
            f"{op.name} number {op.nth} in {op.module or 'the model'} was traced over {op.size} positions of "
            f"dimension {op.dim}, but met {found}: verify with inputs like those of the trace"
        )


def _bind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments in schema order; those that are keyword-only stay at their places too."""
    values = list(args)
    for argument in func._schema.arguments[len(args) :]:
        if argument.name in kwargs:
            values.append(kwargs[argument.name])
        else:
            values.append(argument.default_value)
    return values


def _call(func: Any, arguments: list[Any]) -> Any:
    schema = func._schema.arguments
    first = next((i for i, a in enumerate(schema) if a.kwarg_only), len(schema))
    return func(
        *arguments[:first], **{a.name: v for a, v in zip(schema[first:], arguments[first:], strict=True)}
    )


def _restricted(func: Any, arguments: list[Any], ops: list[Any]) -> Any:
    """``func`` over the kept positions; its outputs have the shapes of the whole, zero where positions were removed."""
    name = func._schema.name.split("::")[1]
    if not has_masked_form(func._schema.name):
        if not getattr(ops[0], "spread", ()):
            raise VerificationError(
                f"{func._schema.name} normalises over a removed axis and has no masked form to compare with"
            )
        return _cut_and_spread(func, arguments, ops[0])
    cuts = {(op.arg, op.dim % arguments[op.arg].dim()): op.kept for op in ops}
    arguments = list(arguments)
    if name in _WORST_LAST | _WORST_FIRST | {"topk"}:
        lowest = name in _WORST_LAST or (name == "topk" and arguments[3] is not False)
        for (arg, dim), kept in cuts.items():
            arguments[arg] = _filled(arguments[arg], dim, kept, lowest)
        result = _call(func, arguments)
        if (
            "log_softmax" in name
        ):  # minus infinity where positions were removed: zero, like other removed activations
            for (_, dim), kept in cuts.items():
                result = _scatter(_select(result, dim, kept), dim, kept, result.shape[dim])
        return result
    if name in _REDUCTIONS:
        for (arg, dim), kept in cuts.items():
            arguments[arg] = _select(arguments[arg], dim, kept)
        return _call(func, arguments)
    if name in _LAST_DIMS:
        return _last_dims(func, arguments, {dim: kept for (_, dim), kept in cuts.items()}, _LAST_DIMS[name])
    if name in _BATCH_NORMS:
        whole = arguments[0]
        for (_, dim), kept in cuts.items():
            arguments[0] = _select(arguments[0], dim, kept)
        return _spread_first(_call(func, arguments), whole, {dim: kept for (_, dim), kept in cuts.items()})
    return _group_norm(func, arguments, {dim: kept for (_, dim), kept in cuts.items()})


def _cut_and_spread(func: Any, arguments: list[Any], op: Any) -> Any:
    """Any operation: over operands without the removed positions, its outputs spread out again."""
    for place, dim, _size, kept in op.cuts:
        arguments[place] = _select(arguments[place], dim, kept)
    result = _call(func, arguments)
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    for place, dim, size, kept in op.spread:
        outputs[place] = _scatter(outputs[place], dim, kept, size)
    return type(result)(outputs) if isinstance(result, (tuple, list)) else outputs[0]


def _select(tensor: torch.Tensor, dim: int, kept: Any) -> torch.Tensor:
    return tensor.index_select(dim, torch.as_tensor(kept, device=tensor.device))


def _scatter(tensor: torch.Tensor, dim: int, kept: Any, size: int) -> torch.Tensor:
    """Spread the kept positions out to ``size``; the others are zero."""
    shape = [*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]]
    return tensor.new_zeros(shape).index_copy_(dim, torch.as_tensor(kept, device=tensor.device), tensor)


def _filled(tensor: torch.Tensor, dim: int, kept: Any, lowest: bool) -> torch.Tensor:
    """``tensor`` with the least (or greatest) value of its dtype at all positions of ``dim`` but the kept ones."""
    limits = torch.finfo if tensor.is_floating_point() else torch.iinfo
    worst = limits(tensor.dtype).min if lowest else limits(tensor.dtype).max
    if tensor.is_floating_point():
        worst = -float("inf") if lowest else float("inf")
    gone = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
    gone[torch.as_tensor(kept, device=tensor.device)] = False
    return tensor.index_fill(dim, gone.nonzero()[:, 0], worst)


def _last_dims(func: Any, arguments: list[Any], cuts: dict[int, Any], tensors: int) -> Any:
    """Layer and RMS norm: input, affine parameters and ``normalized_shape`` all lose the removed positions."""
    whole: torch.Tensor = arguments[0]
    lead = whole.dim() - len(arguments[1])
    shape = list(arguments[1])
    for dim, kept in cuts.items():
        arguments[0] = _select(arguments[0], dim, kept)
        shape[dim - lead] = len(kept)
        for i in range(2, 2 + tensors):
            if arguments[i] is not None:
                arguments[i] = _select(arguments[i], dim - lead, kept)
    arguments[1] = shape
    return _spread_first(_call(func, arguments), whole, cuts)


def _group_norm(func: Any, arguments: list[Any], cuts: dict[int, Any]) -> Any:
    """Group norm: ``(input, weight, bias, N, C, HxW, group, eps)``; each group must keep as many channels, or none."""
    whole: torch.Tensor = arguments[0]
    channels, groups = arguments[4], arguments[6]
    if set(cuts) != {1}:
        raise VerificationError("aten::native_group_norm can only lose channels")
    left = Counter(int(i) // (channels // groups) for i in cuts[1])
    if len(set(left.values())) != 1:
        raise VerificationError("aten::native_group_norm lost different numbers of channels in its groups")
    arguments[:3] = [
        a if a is None else _select(a, d, cuts[1]) for a, d in zip(arguments[:3], (1, 0, 0), strict=True)
    ]
    arguments[4], arguments[6] = len(cuts[1]), len(left)
    return _spread_first(_call(func, arguments), whole, cuts)


def _spread_first(result: Any, whole: torch.Tensor, cuts: dict[int, Any]) -> Any:
    """The first (or only) output at the size of the whole; statistics keep theirs."""
    first, *rest = result if isinstance(result, tuple) else (result,)
    for dim, kept in cuts.items():
        first = _scatter(first, dim, kept, whole.shape[dim])
    return (first, *rest) if isinstance(result, tuple) else first
