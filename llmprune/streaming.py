"""Streamed importances: one forward and backward pass over the calibration samples, with no gradient kept.

While the model runs, a :class:`Interposer` (a ``TorchFunctionMode``: the model's modules and code stay as they are) sees
the calls that take a scored parameter. ``linear``, ``addmm`` and ``embedding`` run through autograd functions of our
own, which treat the weight as a constant and hand each use to a :class:`llmprune.reduction.Reducer` when backward comes
by. For second order, parameters that scale or shift (norms, biases) are replaced by one copy per sample, so that
autograd itself yields a gradient per sample. Every other parameter takes the general path: autograd's own gradient,
one parameter at a time; one sample at a time for second order.

Which path a parameter takes is found by trying, on two samples of a few tokens (:func:`_survey`): a parameter is
streamed only if no gradient reaches it by another way and, for second order, if each half of its uses' rows carries
the gradient of its own sample alone. The real pass checks the same counts and starts over where a parameter behaves
differently there.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from llmprune import _core
from llmprune.calibration import Batch
from llmprune.importance import Importance
from llmprune.loss import FusedLoss, SampleLosses, check_losses
from llmprune.reduction import HeadRows, Reducer, Reroute, Sums

log = logging.getLogger(__name__)

FUSE_BYTES = 1 << 25
"""Whole float32 logits of at least this size are not formed: the final projection is fused into the loss."""
_SKETCH_TOKENS = 7
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


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Lend out ``model`` in eval mode, with no gradients and nothing requiring any; give it back exactly as it was.

    Restored however the block ends: each module's training flag, each parameter's ``requires_grad`` and ``grad``, and
    the random number generators of the CPU and of the model's devices.
    """
    parameters = list(model.parameters())
    modes = [(module, module.training) for module in model.modules()]
    states = [(p, p.requires_grad, p.grad) for p in parameters]
    cuda = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    try:
        for module, _ in modes:
            module.training = False
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
        with torch.random.fork_rng(devices=cuda), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, grad in states:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


class _Linear(torch.autograd.Function):
    """``y = x W^T + b`` with a constant weight; backward hands the use to the reducer.

    ``bias`` is differentiable: (out,), or (samples, out) with the same values in each row for per-sample gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, anchor: torch.Tensor, use: _LinearUse
    ) -> torch.Tensor:
        constant = bias[0] if bias is not None and bias.dim() == 2 else bias
        matrix = use.weight.t() if use.transposed else use.weight
        y = F.linear(x, matrix, constant)
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
        matrix = use.weight.t() if use.transposed else use.weight
        wanted = ctx.needs_input_grad[0]
        dx = dy @ matrix if wanted or reducer.importance.additive else None
        dbias = None
        if bias is not None and ctx.needs_input_grad[1]:
            shape = (len(bias), -1, bias.shape[1]) if bias.dim() == 2 else (-1, len(bias))
            dbias = dy.reshape(shape).sum(-2)
        flat = x.reshape(-1, x.shape[-1])
        dflat = dy.reshape(len(flat), -1)
        if dx is not None and reducer.importance.additive:
            constant = bias[0] if bias is not None and bias.dim() == 2 else bias
            y = ctx.y
            if y._version != ctx.version:  # the model wrote into it
                y, constant = F.linear(x, matrix), None
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
            samples = reducer.here
            use.interposer.observe(use.name, dflat)
            reducer.linear(
                use.name,
                flat.reshape(samples, -1, flat.shape[1]),
                dflat.reshape(samples, -1, dflat.shape[1]),
                transposed=use.transposed,
            )
        return dx if wanted else None, dbias, None, None


@dataclass(frozen=True, eq=False)
class _LinearUse:
    interposer: Interposer
    name: str
    weight: torch.Tensor
    transposed: bool


class _Lookup(torch.autograd.Function):
    """``y = W[ids]`` with a constant weight; backward hands the use to the reducer."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: torch.Tensor,
        anchor: torch.Tensor,
        interposer: Interposer,
        name: str,
        weight: torch.Tensor,
        padding: int | None,
    ) -> torch.Tensor:
        ctx.interposer, ctx.name, ctx.padding = interposer, name, padding
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (dy,) = gradients
        (ids,) = ctx.saved_tensors
        reducer = ctx.interposer.reducer
        samples = 1 if reducer.importance.additive else reducer.here
        ctx.interposer.observe(ctx.name, dy.reshape(-1, dy.shape[-1]))
        reducer.lookup(ctx.name, ids.reshape(samples, -1), dy.reshape(samples, -1, dy.shape[-1]), ctx.padding)
        return None, None, None, None, None, None


@dataclass
class _Route:
    """How each scored parameter's gradient is had."""

    streamed: dict[str, int] = field(default_factory=dict)
    """Uses in linear maps and lookups: name -> how many make it complete."""
    copied: set[str] = field(default_factory=set)
    """One copy per sample (second order only)."""
    general: set[str] = field(default_factory=set)
    head: torch.Tensor | None = None
    """The weight whose product is the logits, where nothing else follows it."""


class Interposer(TorchFunctionMode):
    """Sends the calls that take a scored parameter through the autograd functions above.

    Args:
        parameters: Name -> scored parameter.
        streamed: Names to interpose on.
        copied: Names to replace by one copy per sample.
        reducer: What receives the uses.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], streamed: set[str], copied: set[str], reducer: Reducer
    ):
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self.streamed, self.copied, self.reducer = streamed, copied, reducer
        self.copies: dict[str, torch.Tensor] = {}
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
        self.sample = 0
        """While surveying: whose loss runs backward now."""

    def observe(self, name: str, dy: torch.Tensor) -> None:
        """While surveying, see that only the current sample's half of the rows has a gradient."""
        if not self.surveying or self.reducer.importance.order < 2:
            return
        if len(dy) % 2 or bool(dy.reshape(2, -1)[1 - self.sample].any()):
            self.mixed.add(name)

    def _name(self, tensor: Any, among: set[str]) -> str | None:
        name = self._names.get(id(tensor))
        return name if name in among else None

    def _copy(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        if name not in self.copies:
            leaf = parameter.detach().expand(self.reducer.here, *parameter.shape).clone()
            self.copies[name] = leaf.requires_grad_()
        return self.copies[name]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, through one of ours where a scored parameter takes part."""
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            handler = _HANDLERS.get(getattr(func, "__name__", ""))
            if handler is not None:
                result = (
                    handler(self, *args, **kwargs)
                    if handler is not _pointwise
                    else handler(self, func, args, kwargs)
                )
                if result is not NotImplemented:
                    return result
        return func(*args, **kwargs)

    def project(self, x: torch.Tensor, weight: torch.Tensor, bias: Any, transposed: bool) -> Any:
        """``x W^T + b`` for a scored weight, or NotImplemented."""
        if weight is self.head and self.hidden is None:
            self.hidden, self.head_bias = x, bias
            return x.new_empty(()).expand(*x.shape[:-1], len(weight))
        name = self._name(weight, self.streamed)
        if name is None or weight.dim() != 2 or x.dtype != weight.dtype or x.dim() < 2:
            if self.surveying and not transposed:
                return self._noted(F.linear(x, weight, bias), weight, bias)
            return NotImplemented
        if x.numel() == 0 or (x.numel() // x.shape[-1]) % self.reducer.here:
            if not self.surveying:
                raise Reroute({name})
            self.mixed.add(name)
            return NotImplemented
        if transposed:
            self.transposed.add(name)
        after = None
        constant = bias
        if (bias is not None and bias.requires_grad) or self._name(bias, self.copied) is not None:
            copied = self._name(bias, self.copied)
            if copied is not None:
                constant = self._copy(copied, bias)
            elif not bias.is_leaf:
                constant, after = None, bias
        elif bias is not None:
            constant = bias.detach()
        y = _Linear.apply(x, constant, self.anchor, _LinearUse(self, name, weight.detach(), transposed))
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
    if name is None or max_norm is not None or scale_grad_by_freq or sparse or weight.dim() != 2:
        return NotImplemented
    samples = mode.reducer.here
    if mode.reducer.importance.order > 1 and input.dim() == 2 and input.shape[0] == 1:
        input = input.expand(samples, -1)
    if input.numel() == 0 or input.numel() % samples:
        if not mode.surveying:
            raise Reroute({name})
        mode.mixed.add(name)
        return NotImplemented
    mode.lookups.add(name)
    mode.reducer.ids.setdefault(name, []).append(input)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    return _Lookup.apply(input, mode.anchor, mode, name, weight.detach(), padding_idx)


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
    if not mode.copied or len(args) != 2:
        return NotImplemented
    names = [mode._name(arg, mode.copied) for arg in args]
    if (names[0] is None) == (names[1] is None):
        return NotImplemented
    side = 0 if names[0] is not None else 1
    name, parameter, other = names[side], args[side], args[1 - side]
    if name is None or parameter.dim() != 1 or not isinstance(other, torch.Tensor):
        return NotImplemented
    fitted = _fitted(mode._copy(name, parameter), other, mode.reducer.here)
    if fitted is None:
        return NotImplemented
    return func(fitted, other, **kwargs) if side == 0 else func(other, fitted, **kwargs)


def _normalised(
    mode: Interposer, x: torch.Tensor, plain: Callable[[], torch.Tensor], weight: Any, bias: Any
) -> Any:
    if mode._name(weight, mode.copied) is None and mode._name(bias, mode.copied) is None:
        return NotImplemented
    operands: list[torch.Tensor | None] = []
    for parameter in (weight, bias):
        name = mode._name(parameter, mode.copied)
        if name is not None:
            fitted = (
                _fitted(mode._copy(name, parameter), x, mode.reducer.here) if parameter.dim() == 1 else None
            )
            if fitted is None:
                return NotImplemented
            parameter = fitted
        operands.append(parameter)
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
    **dict.fromkeys(_POINTWISE, _pointwise),
}


class _Counter(Reducer):
    """What stands in for a reducer during the survey: it counts uses and reduces nothing."""

    def __init__(self, importance: Importance, samples: int):
        super().__init__(importance, {}, samples, {}, lambda name: None)
        self.counts: dict[str, int] = {}

    def linear(self, name: str, *args: Any, **options: Any) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    linear_signed = linear
    lookup = linear


def _survey(
    model: nn.Module,
    batch: Batch,
    losses_of: SampleLosses,
    parameters: Mapping[str, torch.Tensor],
    importance: Importance,
    copied: set[str],
) -> _Route:
    """Run two samples forward and backward and see how each parameter is used; see the module's docstring.

    Raises:
        RuntimeError, TypeError, ValueError, IndexError: what the model raises, perhaps because of a copy per sample.
    """
    second = importance.order > 1
    sketch = batch.sketch(_SKETCH_TOKENS)
    counter = _Counter(importance, 2 if second else 1)
    mode = Interposer(parameters, set(parameters), copied, counter)
    mode.surveying = True
    route = _Route()
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with mode:
            if losses_of.plain:
                logits = losses_of.logits(sketch)
                product = mode.projections.get(id(logits))
                losses = losses_of.of_logits(logits, sketch)
            else:
                product, losses = None, losses_of(sketch)
        mode.projections.clear()
        if losses.requires_grad:
            for sample in range(2) if second else ():
                mode.sample = sample
                for copy in mode.copies.values():
                    copy.grad = None
                losses[sample].backward(retain_graph=sample == 0)
                for name, copy in mode.copies.items():
                    if copy.grad is not None and bool(copy.grad[1 - sample].any()):
                        mode.mixed.add(name)
            if not second:
                losses.sum().backward()
        passes = 2 if second else 1
        leaked = {name for name, parameter in parameters.items() if parameter.grad is not None}
        bad = leaked | mode.mixed | (mode.lookups & mode.transposed)
        route.streamed = {name: count // passes for name, count in counter.counts.items() if name not in bad}
        route.copied = set(mode.copies) - bad
        route.general = set(parameters) - set(route.streamed) - route.copied
        if product is not None:
            head = next((name for name, p in parameters.items() if p is product[1]), None)
            ties = 1 + (len(counter.ids.get(head, ())) if head is not None else 0)
            if head is None or route.streamed.get(head) == ties:
                route.head = product[1]
    finally:
        for parameter in parameters.values():
            parameter.grad = None
            parameter.requires_grad_(False)
    return route


def _route(
    model: nn.Module,
    batch: Batch,
    losses_of: SampleLosses,
    parameters: Mapping[str, torch.Tensor],
    importance: Importance,
) -> _Route:
    """The survey's result, with a second try without copies where these break the model's forward."""
    if importance.kernel is None:
        return _Route(general=set(parameters))
    if importance.order > 1:
        try:
            return _survey(model, batch, losses_of, parameters, importance, _copyable(parameters))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            log.info("no copies per sample: the model's forward does not take them (%s)", error)
    return _survey(model, batch, losses_of, parameters, importance, set())


def _copyable(parameters: Mapping[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in parameters.items() if parameter.dim() == 1}


def streamed_sums(
    model: nn.Module,
    batch: Batch,
    losses_of: SampleLosses,
    parameters: Mapping[str, nn.Parameter],
    importance: Importance,
    *,
    progress: Callable[[str], None],
    fuse_bytes: int = FUSE_BYTES,
    accumulator_bytes: int | None = None,
) -> Sums:
    """Sums of the elementwise importance over every structure of every parameter.

    Args:
        model: The model, lent out by :func:`undisturbed`.
        batch: The calibration samples, on the model's device.
        losses_of: The loss.
        parameters: Name -> parameter to score; floating point.
        importance: Which importance, of order 1 or 2.
        progress: Called with the name of each parameter as it is done.
        fuse_bytes: From which size of the float32 logits on the final projection is fused into the loss.
        accumulator_bytes: Most memory for the accumulators of the general path's second order at a time; None takes
            half of what is available.

    Raises:
        CalibrationError: a sample's loss is not finite, or the model cannot run on the samples.
    """
    losses_of.check_causal(batch.sketch(_SKETCH_TOKENS))
    route = _route(model, batch, losses_of, parameters, importance)
    while True:
        log.info(
            "%d parameters streamed, %d copied per sample, %d on the general path",
            len(route.streamed),
            len(route.copied),
            len(route.general),
        )
        try:
            return _Pass(model, batch, losses_of, parameters, importance, route, progress).run(
                fuse_bytes, accumulator_bytes
            )
        except Reroute as reroute:
            log.info("starting over with the general path for %s", reroute)
            route = _Route(
                {name: count for name, count in route.streamed.items() if name not in reroute.names},
                route.copied - reroute.names,
                route.general | reroute.names,
                route.head if not any(parameters.get(n) is route.head for n in reroute.names) else None,
            )


@dataclass
class _Pass:
    """One attempt at :func:`streamed_sums`, with every parameter's route fixed."""

    model: nn.Module
    batch: Batch
    losses_of: SampleLosses
    parameters: Mapping[str, nn.Parameter]
    importance: Importance
    route: _Route
    progress: Callable[[str], None]

    def run(self, fuse_bytes: int, accumulator_bytes: int | None) -> Sums:
        samples = self.batch.samples if self.importance.order > 1 else 1
        reducer = Reducer(self.importance, self.parameters, samples, self.route.streamed, self.progress)
        later = self.route.general if self.importance.order > 1 else set()
        self._together(reducer, later, fuse_bytes)
        self._one_by_one(reducer, sorted(later), accumulator_bytes)
        if self._summed and self.importance.order == 1:
            for arrays in reducer.sums.values():
                for array in arrays:
                    array /= self.batch.samples
        return reducer.sums

    @property
    def _summed(self) -> bool:
        """Whether the loss that runs backward is the sum over samples, not their mean.

        It is for second order, which needs each sample's own gradient, and for the first-order kernels, whose formulas
        are homogeneous in ``g``: a factor 1/N in the gradients would only add rounding.
        """
        return self.importance.kernel is not None

    def _together(self, reducer: Reducer, later: set[str], fuse_bytes: int) -> None:
        """All samples in one pass: everything but ``later``."""
        active = {name: p for name, p in self.parameters.items() if name not in later}
        if not active:
            return
        mode = Interposer(self.parameters, set(self.route.streamed), self.route.copied, reducer)
        handles = []
        try:
            for name, parameter in active.items():
                parameter.requires_grad_(True)
                if name in self.route.general:
                    handles.append(parameter.register_post_accumulate_grad_hook(self._taker(reducer, name)))
            losses = self._losses(mode, fuse_bytes)
            check_losses(losses)
            if losses.requires_grad:
                (losses.sum() if self._summed else losses.mean()).backward()
            leaked = {name for name, p in active.items() if p.grad is not None}
            if leaked:
                raise Reroute(leaked)
            reducer.check_complete()
            for name, copy in mode.copies.items():
                if copy.grad is not None:
                    reducer.per_sample(name, copy.grad)
        finally:
            for handle in handles:
                handle.remove()
            for parameter in active.values():
                parameter.requires_grad_(False)
                parameter.grad = None

    @staticmethod
    def _taker(reducer: Reducer, name: str) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            reducer.whole(name, parameter.grad)
            parameter.grad = None

        return take

    def _losses(self, mode: Interposer, fuse_bytes: int) -> torch.Tensor:
        head = self.route.head
        if head is None or not self.losses_of.plain or 4 * self.batch.tokens * len(head) < fuse_bytes:
            with mode:
                return self.losses_of(self.batch)
        mode.head = head
        with mode:
            self.losses_of.logits(self.batch)
        name = next((n for n, p in self.parameters.items() if p is head and n in self.route.streamed), None)
        hidden, bias = mode.hidden, mode.head_bias
        if hidden is None:
            raise Reroute({name} if name is not None else set())
        constant = None if bias is None else bias.detach()
        use = None if name is None else HeadRows(mode.reducer, name, constant)
        losses: torch.Tensor = FusedLoss.apply(
            hidden, head.detach(), constant, self.batch.inputs["input_ids"], use, mode.anchor
        )
        return losses

    def _one_by_one(self, reducer: Reducer, names: list[str], accumulator_bytes: int | None) -> None:
        """Second order on the general path: one sample at a time, as many parameters as accumulators fit."""
        budget = accumulator_bytes if accumulator_bytes is not None else available_memory() // 2
        while names:
            taken: list[str] = []
            used = 0
            while names and (not taken or used + _accumulators(self.parameters[names[0]]) <= budget):
                taken.append(names.pop(0))
                used += _accumulators(self.parameters[taken[-1]])
            self._accumulate(reducer, taken)

    def _accumulate(self, reducer: Reducer, names: list[str]) -> None:
        chosen = {name: self.parameters[name] for name in names}
        sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def take(name: str) -> Callable[[torch.Tensor], None]:
            def hook(parameter: torch.Tensor) -> None:
                assert parameter.grad is not None
                if name not in sums:
                    kind = torch.promote_types(parameter.dtype, torch.float32)
                    zeros = torch.zeros(parameter.shape, dtype=kind, device=parameter.device)
                    sums[name] = (zeros, torch.zeros_like(zeros))
                mean, square = sums[name]
                grad = parameter.grad.contiguous()
                mean.add_(grad, alpha=1 / self.batch.samples)
                _core.accumulate_square(square, grad, 1 / self.batch.samples)
                parameter.grad = None

            return hook

        handles = []
        try:
            for name, parameter in chosen.items():
                parameter.requires_grad_(True)
                handles.append(parameter.register_post_accumulate_grad_hook(take(name)))
            for sample in range(self.batch.samples):
                losses = self.losses_of(self.batch.take(sample, sample + 1))
                check_losses(losses, sample)
                if losses.requires_grad:
                    losses.sum().backward()
        finally:
            for handle in handles:
                handle.remove()
            for parameter in chosen.values():
                parameter.requires_grad_(False)
                parameter.grad = None
        for name in names:
            reducer.whole(name, *sums.pop(name, (None, None)))


def _accumulators(parameter: torch.Tensor) -> int:
    """Bytes of a parameter's two accumulators."""
    return 2 * parameter.numel() * max(4, parameter.element_size())


def available_memory() -> int:
    """Bytes of host memory that can be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
