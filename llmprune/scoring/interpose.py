"""What stands between a model and the calls that take its parameters, while importances stream.

An :class:`Interposer` is a ``TorchFunctionMode``: modules and their code stay as they are. ``linear``, ``addmm`` and
``embedding`` run through autograd functions that treat the weight as a constant and hand each use to a
:class:`llmprune.scoring.reduction.Reducer` when backward comes by. Parameters that scale or shift are replaced, where
asked, by one copy per sample, so that autograd itself yields a gradient per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from llmprune.out_of_core.reading import Sliced
from llmprune.scoring.reduction import Reducer, Reroute

_POINTWISE = {
    "add",
    "add_",
    "mul",
    "mul_",
    "sub",
    "sub_",
    "div",
    "div_",
    "true_divide",
    "__radd__",
    "__rmul__",
}
_UNARY = {"float", "double", "to", "type_as", "neg", "exp", "clone", "contiguous"}


class _Linear(torch.autograd.Function):
    """``y = x W^T + b`` with a constant weight; backward hands the use to the reducer.

    ``bias`` is differentiable: (out,), or (samples, out) with the same values in each row for per-sample gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, anchor: torch.Tensor, use: _LinearUse
    ) -> torch.Tensor:
        constant = bias[0] if bias is not None and bias.dim() == 2 else bias
        y = use.product(x, constant)
        ctx.save_for_backward(x)
        ctx.use, ctx.bias = use, bias
        if use.interposer.reducer.importance.additive:
            ctx.y, ctx.version = (
                y.detach(),
                y._version,
            )  # detach shares the version counter, and holds no graph
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (dy,) = gradients
        (x,) = ctx.saved_tensors
        use: _LinearUse = ctx.use
        bias: torch.Tensor | None = ctx.bias
        reducer = use.interposer.reducer
        wanted = ctx.needs_input_grad[0]
        dx = use.back(dy) if wanted or (reducer.importance.additive and use.name is not None) else None
        dbias = None
        if bias is not None and ctx.needs_input_grad[1]:
            shape = (len(bias), -1, bias.shape[1]) if bias.dim() == 2 else (-1, len(bias))
            dbias = dy.reshape(shape).sum(-2)
        if use.name is None:
            return dx, dbias, None, None
        flat = x.reshape(-1, x.shape[-1])
        dflat = dy.reshape(len(flat), -1)
        use.interposer.observe(use.name, dflat)
        if use.interposer.watch is not None:
            use.interposer.watch(use.name, dflat)
        if dx is not None and reducer.importance.additive:
            constant = bias[0] if bias is not None and bias.dim() == 2 else bias
            y = ctx.y
            if y._version != ctx.version:  # the model wrote into it
                y, constant = use.product(x, None), None
            reducer.linear_signed(
                use.name,
                flat,
                dx.reshape(flat.shape),
                dflat,
                y.reshape(dflat.shape),
                constant,
                use.transposed,
            )
        else:
            groups = reducer.groups
            reducer.linear(
                use.name,
                flat.reshape(groups, -1, flat.shape[1]),
                dflat.reshape(groups, -1, dflat.shape[1]),
                transposed=use.transposed,
            )
        return dx if wanted else None, dbias, None, None


@dataclass(frozen=True, eq=False)
class _LinearUse:
    interposer: Interposer
    name: str | None
    """None where the weight is not scored."""
    weight: torch.Tensor | Sliced
    transposed: bool

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What the use computes: x (..., in) -> (..., out)."""
        if isinstance(self.weight, Sliced):
            return self.weight.times(x, bias)
        return F.linear(x, self.weight.t() if self.transposed else self.weight, bias)

    def back(self, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of its input: (..., out) -> (..., in)."""
        if isinstance(self.weight, Sliced):
            return self.weight.back(dy)
        return dy @ (self.weight.t() if self.transposed else self.weight)


class _Lookup(torch.autograd.Function):
    """``y = W[ids]`` with a constant weight; backward hands the use to the reducer."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: torch.Tensor,
        anchor: torch.Tensor,
        interposer: Interposer,
        name: str,
        weight: torch.Tensor | Sliced,
        padding: int | None,
    ) -> torch.Tensor:
        ctx.interposer, ctx.name, ctx.padding = interposer, name, padding
        ctx.save_for_backward(ids)
        return weight[ids] if isinstance(weight, Sliced) else F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (dy,) = gradients
        (ids,) = ctx.saved_tensors
        reducer = ctx.interposer.reducer
        groups = reducer.groups
        ctx.interposer.observe(ctx.name, dy.reshape(-1, dy.shape[-1]))
        reducer.lookup(ctx.name, ids.reshape(groups, -1), dy.reshape(groups, -1, dy.shape[-1]), ctx.padding)
        return None, None, None, None, None, None


_linear_use: Callable[..., torch.Tensor] = _Linear.apply
_lookup_use: Callable[..., torch.Tensor] = _Lookup.apply


class Interposer(TorchFunctionMode):
    """Sends the calls that take a scored parameter through the autograd functions above.

    Args:
        parameters: Name -> scored parameter.
        streamed: Names to interpose on.
        copied: Names to replace by one copy per sample.
        reducer: What receives the uses.
        stored: id of a parameter on the meta device, scored or not -> its values, which stay in a file. It may be
            looked up and multiplied by, and nothing else.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        streamed: set[str],
        copied: set[str],
        reducer: Reducer,
        stored: Mapping[int, Sliced] | None = None,
    ):
        super().__init__()
        self._stored = stored or {}
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self.streamed, self.copied, self.reducer = streamed, copied, reducer
        self.copies: dict[str, torch.Tensor] = {}
        """Name -> its copies, (samples, n), a leaf."""
        self._marked: dict[int, tuple[torch.Tensor, frozenset[str]]] = {}
        """id of a tensor -> (the tensor, (samples, n), what copies it was computed from)."""
        self.head: torch.Tensor | None = None
        """The weight of the final projection: its product is not formed, its input is kept in ``hidden``."""
        self.hidden: torch.Tensor | None = None
        self.head_bias: torch.Tensor | None = None
        self.anchor = torch.zeros((), requires_grad=True)
        self.projections: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """id of each product -> (product, weight), kept only while surveying."""
        self.surveying = False
        self.lookups: set[str] = set()
        self.transposed: set[str] = set()
        self.mixed: set[str] = set()
        self.densities: dict[str, set[Fraction]] = {}
        """Name -> rows for each token that its uses may have, where samples are told apart; noted while surveying."""
        self.length = 1
        """Tokens of a sample."""
        self.watch: Callable[[str, torch.Tensor], None] | None = None
        """Called with the name of each scored product's weight and the gradient (rows, out) at its outputs."""
        self.looks_ahead = False
        """While surveying: whether a use at a last token had a gradient."""

    def observe(self, name: str, dy: torch.Tensor) -> None:
        """While surveying, look at the gradient (rows, ...) of a use; of two samples the first's loss counts as NaN.

        The uses' rows are told apart by sample if the first half has NaN or nothing and the second no NaN. And a last
        token, which no next-token loss is about, has no gradient unless the model looks ahead.
        """
        if not self.surveying:
            return
        if len(dy) == 2 * self.length:
            self.looks_ahead |= bool(dy[-1].any())
        if not self.reducer.grouped:
            return
        if len(dy) % 2:
            self.mixed.add(name)
            return
        first, second = dy.reshape(2, -1)
        if bool(first.nan_to_num(0.0).any()) or bool(second.isnan().any()):
            self.mixed.add(name)

    def _divides(self, name: str, rows: int) -> bool:
        """Whether ``rows`` of a use can be the samples' rows, one sample after the other; else it takes no part."""
        reducer = self.reducer
        if rows and not reducer.grouped:
            return True
        if self.surveying:
            self.densities.setdefault(name, set()).add(Fraction(rows, reducer.here * self.length))
            if rows == 0 or rows % reducer.here:
                self.mixed.add(name)
                return False
        elif rows == 0 or rows % reducer.here or not self._as_surveyed(name, rows):
            raise Reroute({name})
        return True

    def _as_surveyed(self, name: str, rows: int) -> bool:
        return Fraction(rows, self.reducer.here * self.length) in self.densities.get(name, ())

    def _name(self, tensor: Any, among: set[str]) -> str | None:
        name = self._names.get(id(tensor))
        return name if name in among else None

    def copy(self, tensor: Any) -> torch.Tensor | None:
        """What stands in, per sample, for a copied parameter or for what was computed from some: (samples, n)."""
        marked = self._marked.get(id(tensor))
        if marked is not None:
            return marked[0]
        name = self._name(tensor, self.copied)
        if name is None or tensor.dim() != 1:
            return None
        reducer = self.reducer
        if name not in self.copies:
            leaf = tensor.detach().expand(reducer.samples, *tensor.shape).clone()
            self.copies[name] = leaf.requires_grad_()
        whole = self.copies[name]
        return (
            whole if reducer.here == reducer.samples else whole[reducer.start : reducer.start + reducer.here]
        )

    def mark(self, result: torch.Tensor, *sources: Any) -> torch.Tensor:
        """Remember that ``result`` stands for a 1-D tensor per sample: it may meet activations, nothing else."""
        self._marked[id(result)] = (result, frozenset().union(*map(self._sources, sources)))
        return result

    def _sources(self, tensor: Any) -> frozenset[str]:
        if id(tensor) in self._marked:
            return self._marked[id(tensor)][1]
        name = self._name(tensor, self.copied)
        return frozenset() if name is None else frozenset({name})

    def forget(self) -> None:
        """Let go of what one forward pass left behind."""
        self._marked.clear()
        self.projections.clear()
        self.hidden = self.head_bias = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, through one of ours where a scored parameter takes part."""
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            name = getattr(func, "__name__", "")
            result = NotImplemented
            if name in _HANDLERS:
                result = _HANDLERS[name](self, *args, **kwargs)
            elif self.copied and name in _WHOLE_CALL_HANDLERS:
                result = _WHOLE_CALL_HANDLERS[name](self, func, args, kwargs)
            if result is not NotImplemented:
                return result
            if self._marked:
                self._check_strays(args, kwargs)
        elif self._stored:
            result = self._from_file(getattr(func, "__name__", ""), *args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)

    def _from_file(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A call without gradients that takes a stored parameter, or NotImplemented."""
        if name not in ("linear", "embedding"):
            return NotImplemented
        first, weight, bias = (
            (*args, kwargs.get("weight"), kwargs.get("bias"), None)[:3] if args else (None,) * 3
        )
        stored = self._stored.get(id(weight))
        if stored is None:
            return NotImplemented
        return stored.times(first, bias) if name == "linear" else stored[first]

    def _check_strays(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See that no marked tensor goes where its extra dimension would be taken for something else."""
        given = [*args, *kwargs.values()]
        given += [part for arg in given if isinstance(arg, (list, tuple)) for part in arg]
        strays = [self._marked[id(arg)][1] for arg in given if id(arg) in self._marked]
        if strays:
            raise Reroute(set().union(*strays))

    def project(self, x: torch.Tensor, weight: torch.Tensor, bias: Any, transposed: bool) -> Any:
        """``x W^T + b`` for a scored weight, or NotImplemented."""
        if weight is self.head and self.hidden is None:
            self.hidden, self.head_bias = x, bias
            return x.new_empty(()).expand(*x.shape[:-1], len(weight))
        name = self._name(weight, self.streamed)
        stored = self._stored.get(id(weight))
        unscored = stored is not None and id(weight) not in self._names
        if (name is None and not unscored) or weight.dim() != 2 or x.dtype != weight.dtype or x.dim() < 2:
            if self.surveying and not transposed:
                return self._noted(F.linear(x, weight, bias), weight, bias)
            return NotImplemented
        if name is not None and not self._divides(name, x[..., 0].numel()):
            return NotImplemented
        if transposed and name is not None:
            self.transposed.add(name)
        after = None
        constant = bias
        if (bias is not None and bias.requires_grad) or self._name(bias, self.copied) is not None:
            copied = self.copy(bias)
            if copied is not None:
                constant = copied
            elif not bias.is_leaf:
                constant, after = None, bias
        elif bias is not None:
            constant = bias.detach()  # its gradient, if any, is had elsewhere
        y = _linear_use(
            x, constant, self.anchor, _LinearUse(self, name, stored or weight.detach(), transposed)
        )
        if self.surveying and not transposed and after is None:
            return self._noted(y, weight, bias)
        return y if after is None else y + after

    def _noted(self, product: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        """Remember a product that may turn out to be the logits; one with a scored bias is never fused."""
        if id(bias) not in self._names:
            self.projections[id(product)] = (product, weight)
        return product


def _linear(mode: Interposer, input: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> Any:
    return mode.project(input, weight, bias, False)


def _addmm(
    mode: Interposer, input: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, **options: Any
) -> Any:
    if options or mode._name(mat2, mode.streamed) is None or input.shape != mat2.shape[1:]:
        return NotImplemented
    return mode.project(mat1, mat2, input, True)


def _embedding(
    mode: Interposer,
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    name = mode._name(weight, mode.streamed)
    stored = mode._stored.get(id(weight))
    if stored is not None and id(weight) not in mode._names and max_norm is None:
        return stored[input]
    if name is None or max_norm is not None or scale_grad_by_freq or sparse or weight.dim() != 2:
        return NotImplemented
    groups = mode.reducer.groups
    if groups > 1 and input.dim() == 2 and input.shape[0] == 1:
        input = input.expand(groups, -1)
    if not mode._divides(name, input.numel()):
        return NotImplemented
    mode.lookups.add(name)
    mode.reducer.ids.setdefault(name, []).append(input)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    return _lookup_use(input, mode.anchor, mode, name, stored or weight.detach(), padding_idx)


def _fitted(copy: torch.Tensor, x: torch.Tensor, samples: int) -> torch.Tensor | None:
    """A (samples, n) copy shaped to broadcast against an activation x (samples, ..., n) or (samples * tokens, n)."""
    if x.dim() < 2 or x.shape[-1] != copy.shape[1] or x.shape[0] % samples:
        return None
    if x.shape[0] == samples:
        return copy.view(samples, *[1] * (x.dim() - 2), copy.shape[1])
    if x.dim() == 2:
        return copy.repeat_interleave(x.shape[0] // samples, 0)
    return None


def _pointwise(mode: Interposer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 2:
        return NotImplemented
    copies = [mode.copy(arg) for arg in args]
    if copies[0] is not None and copies[1] is not None:
        return mode.mark(func(*copies, **kwargs), *args)
    side = 0 if copies[0] is not None else 1
    copy, other = copies[side], args[1 - side]
    if copy is None:
        return NotImplemented
    if not isinstance(other, torch.Tensor) or other.dim() == 0:
        fitted, marked = copy, True
    else:
        shaped = _fitted(copy, other, mode.reducer.here)
        if shaped is None:
            return NotImplemented
        fitted, marked = shaped, False
    result = func(fitted, other, **kwargs) if side == 0 else func(other, fitted, **kwargs)
    return mode.mark(result, args[side]) if marked else result


def _unary(mode: Interposer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    copy = mode.copy(args[0]) if args else None
    return NotImplemented if copy is None else mode.mark(func(copy, *args[1:], **kwargs), args[0])


def _normalised(
    mode: Interposer, x: torch.Tensor, plain: Callable[[], torch.Tensor], weight: Any, bias: Any
) -> Any:
    """A norm as its plain form, then scale and shift with copies per sample."""
    operands: list[torch.Tensor | None] = []
    for parameter in (weight, bias):
        copy = mode.copy(parameter)
        fitted = None if copy is None else _fitted(copy, x, mode.reducer.here)
        if copy is not None and fitted is None:
            return NotImplemented
        operands.append(parameter if fitted is None else fitted)
    if operands[0] is weight and operands[1] is bias:
        return NotImplemented
    y = plain()
    if operands[0] is not None:
        y = y * operands[0]
    return y if operands[1] is None else y + operands[1]


def _layer_norm(
    mode: Interposer,
    input: torch.Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    **options: Any,
) -> Any:
    return _normalised(
        mode, input, lambda: F.layer_norm(input, normalized_shape, None, None, eps), weight, bias
    )


def _rms_norm(
    mode: Interposer,
    input: torch.Tensor,
    normalized_shape: Any,
    weight: Any = None,
    eps: float | None = None,
) -> Any:
    return _normalised(mode, input, lambda: F.rms_norm(input, normalized_shape, None, eps), weight, None)


_HANDLERS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "addmm": _addmm,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
}
_WHOLE_CALL_HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(_UNARY, _unary),
}
