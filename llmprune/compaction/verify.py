"""Verification: a compacted model must compute what its masked reference computes.

The masked reference is the original model with the removed positions of the same parameters set to zero, in which
every operation that normalises over a removed axis sees the kept positions only
(:mod:`llmprune.compaction.masked_ops`), and every removed block hands the stream on as it gets it
(:func:`llmprune.compaction.depth.bypassed`), and every removed branch is times zero
(:func:`llmprune.tracing.sublayers.silenced`). It shares no code with compaction: it moves nothing, resizes nothing and
sets no attribute, so a slip in any of these shows as a difference.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from llmprune.checkpoints.modeling_llmprune import Nothing
from llmprune.compaction.compact import compacted_copy, shared_tensors
from llmprune.compaction.depth import bypassed
from llmprune.compaction.masked_ops import KeptPositions, kept_positions
from llmprune.errors import InputError, LlmpruneError, VerificationError
from llmprune.machine.interrupts import deferred_interrupts
from llmprune.tracing.borrow import forget, is_config
from llmprune.tracing.layers import renamed
from llmprune.tracing.sublayers import silenced
from llmprune.tracing.wrapped import check_present, on_uncompiled, without_hooks

log = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest error relative to the reference's largest output, by the dtype that was computed in.

float64 models are not given less: their norms and softmaxes round to float32 inside.
"""

FAINT = 100
"""A difference up to so many tolerances may be rounding that the model makes much of: it is looked into."""

ROUNDINGS = 8
"""How many times as far as the outputs move by themselves (:func:`_unrest`) such a difference may reach."""

WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
"""Where rounding could hide or fake a difference, models small enough are compared in this dtype instead."""

WIDEN_LIMIT = 4 << 30
"""Bytes that the widened copies of a model may take."""


@dataclass(frozen=True)
class Verification:
    """How far a compacted model is from its masked reference.

    Attributes:
        max_error: largest absolute difference of any output element.
        relative_error: the same over ``scale``.
        scale: largest absolute value of the reference's outputs that matter (logits, or the last hidden state).
        tolerance: what ``relative_error`` had to stay below.
        dtype: the dtype that was computed in.
        inputs: batches compared (the given one, and the same with its last token masked where there is a mask).
        masked_ops: operations that were restricted to the kept positions, per batch.
        outputs: names of the outputs compared.
    """

    max_error: float
    relative_error: float
    scale: float
    tolerance: float
    dtype: str
    inputs: int
    masked_ops: int
    outputs: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"equal to the masked reference: relative error {self.relative_error:.1e} (allowed {self.tolerance:.0e}) "
            f"in {self.dtype} on {self.inputs} batches, {self.masked_ops} operations over kept positions only"
        )

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {**asdict(self), "outputs": list(self.outputs)}


@on_uncompiled
def verify(
    model: nn.Module,
    plan: Any,
    inputs: Mapping[str, Any] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Verification:
    """Compare what ``plan`` would make of ``model`` with the masked reference; ``model`` is left as it was.

    The parameters are masked in place and put back bit for bit, so that the extra memory is that of the pruned matrices
    (and of their removed slices). float32 and float64 models are compared as they are; a float32 model that differs by
    more than rounding should is compared again in float64, and bfloat16 and float16 ones in float32, as long as the
    copies stay below ``WIDEN_LIMIT`` bytes.

    Args:
        model: the model the plan was made for, not yet compacted.
        plan: a :class:`llmprune.planning.plan.Plan`.
        inputs: keyword arguments of ``model.forward``; None makes them from the model's config.
        weights: new values that the compaction is to give, as for :func:`llmprune.compact`; both sides have them.

    Returns:
        The :class:`Verification`.

    Raises:
        VerificationError: an output differs by more than the tolerance or is not finite, or the compacted model does
            not run; the message says by how much and in which module it begins.
        PlanError, TensorError: as :func:`llmprune.compact`.
    """
    with holding(model, plan.kept, weights or {}):
        done = compare(model, plan, inputs, lambda original: compacted_copy(original, plan))
        if getattr(plan, "sublayers", ()) or (
            getattr(plan, "layers", ()) and any(isinstance(m, Nothing) for m in model.modules())
        ):
            check_cache(compacted_copy(model, plan), model, inputs)
        return done


def check_cache(model: nn.Module, original: nn.Module, inputs: Mapping[str, Any] | None) -> None:
    """Compare a pass with a cache, token by token at its end, with one without; nothing for models without a cache.

    Args:
        model: a compacted model that lacks attention: a cache may be read where nothing fills it any more.
        original: the model before.
        inputs: as for :func:`verify`; only ``input_ids`` are used.

    Raises:
        VerificationError: it does not run, or computes something else, where the original does neither.
    """
    if inputs is None:
        from llmprune.tracing.inputs import example_inputs

        inputs = example_inputs(original)
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] < 4:
        return
    tolerance = 10 * TOLERANCE.get(narrowest(model), 1e-5)  # other kernels for other lengths
    if _cache_error(model, ids) > tolerance and _cache_error(original, ids) <= tolerance:
        raise VerificationError(
            "without these layers, or parts of layers, the model computes something else with a cache than without, or "
            "does not run with one: keep others"
        )


def _cache_error(model: nn.Module, ids: torch.Tensor) -> float:
    """Error of the last token's output with a cache, relative to the largest; infinite if it does not run so."""
    taken = inspect.signature(model.forward).parameters
    if "use_cache" not in taken or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return 0.0
    with evaluating(model), without_hooks(model), torch.no_grad():
        whole = outputs_of(model, {"input_ids": ids})
        name = _principal(list(whole))[0]
        past: dict[str, Any] = {}
        try:
            for part in (ids[:, :-2], ids[:, -2:-1], ids[:, -1:]):
                result = model(input_ids=part, use_cache=True, **past)
                past = {k: v for k, v in result.items() if k in taken and not isinstance(v, torch.Tensor)}
                if not past:
                    return 0.0
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            log.debug("with a cache %s does not run: %s", type(model).__name__, error)
            return float("inf")
        expected = whole[name][:, -1]
        error_found = _error(expected, result[name][:, -1]) / (float(expected.abs().max()) or 1.0)
        return error_found if error_found == error_found else float("inf")


def compare(
    model: nn.Module, plan: Any, inputs: Mapping[str, Any] | None, pruned: Callable[[nn.Module], nn.Module]
) -> Verification:
    """Compare the masked reference with ``pruned(model)``; the dtypes and errors of :func:`verify`.

    Args:
        model: the original.
        plan: ``kept`` and ``marked`` of a plan.
        inputs: as for :func:`verify`.
        pruned: gives the pruned model that belongs to the original (or to its widened copy, in the copy's dtype).
    """
    check_present(model)
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise InputError("a model on the meta device has no values to verify: load its weights")
    if inputs is None:
        from llmprune.tracing.inputs import example_inputs

        inputs = example_inputs(model)
    dtype = narrowest(model)
    wider = WIDER.get(dtype)
    if wider is None or not fits(model, wider):
        return _compare_in(model, pruned(model), plan, inputs, dtype)
    if dtype is torch.float32:
        try:
            return _compare_in(model, pruned(model), plan, inputs, dtype)
        except VerificationError as error:
            log.debug("comparing again in float64: %s", error)
    forget(model)
    computed = {i: t for i, t in shared_tensors(model).items() if t.grad_fn is not None}
    copied = copy.deepcopy(model, computed).to(wider)
    return _compare_in(copied, pruned(copied), plan, cast(inputs, wider), wider)


def _compare_in(
    model: nn.Module, twin: nn.Module, plan: Any, inputs: Mapping[str, Any], dtype: torch.dtype
) -> Verification:
    """Compare ``twin`` with the masked form of ``model``, both in ``dtype``."""
    tolerance = TOLERANCE.get(dtype, 1e-5)
    if getattr(plan, "rescaled", ()):  # norms round to float32 inside, and differently where they are scaled
        tolerance = max(tolerance, TOLERANCE[torch.float32])
    worst, worst_relative, worst_scale = 0.0, 0.0, 0.0
    names: tuple[str, ...] = ()
    batches = _batches(inputs)
    compared = replaced = 0
    counts: dict[str, int] = {}
    with evaluating(model), evaluating(twin), without_hooks(model), without_hooks(twin), torch.no_grad():
        for number, batch in enumerate(batches):
            with masked(model, plan):
                try:
                    reference, mode = _reference(model, plan, batch)
                except (LlmpruneError, RuntimeError, ValueError, TypeError, IndexError):
                    if number == 0:
                        raise
                    continue  # the model itself, or its marked operations, cannot be had on a padded batch
            seen = {op.name: mode.counts[op.name] for op in plan.marked}
            if number and (seen != counts or not all(torch.isfinite(t).all() for t in reference.values())):
                continue  # other operations than the plan's run here, or not even the reference is finite
            counts = seen
            try:
                got = outputs_of(twin, batch)
            except Exception as error:
                raise VerificationError(
                    f"the compacted model does not run ({type(error).__name__}: {error}): the plan must not be applied"
                ) from error
            error_now, scale, names = compared_outputs(reference, got)
            compared, replaced = compared + 1, mode.done
            relative = error_now / scale if scale else error_now
            if tolerance < relative <= FAINT * tolerance:
                with masked(model, plan):
                    tolerance = max(tolerance, ROUNDINGS * _unrest(model, plan, batch, reference))
            if not relative <= tolerance:
                where = _first_difference(model, twin, plan, batch, tolerance)
                raise VerificationError(
                    f"the compacted model differs from its masked reference: relative error {relative:.1e} in {dtype}, "
                    f"allowed {tolerance:.0e}{where}: the plan must not be applied"
                )
            if relative >= worst_relative:
                worst, worst_relative, worst_scale = error_now, relative, scale
    return Verification(
        max_error=worst,
        relative_error=worst_relative,
        scale=worst_scale,
        tolerance=tolerance,
        dtype=str(dtype).removeprefix("torch."),
        inputs=compared,
        masked_ops=replaced,
        outputs=names,
    )


def outputs_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Floating point outputs of one forward pass, by name (or number, where the model returns a tuple)."""
    keywords = copy.deepcopy(dict(batch))
    if "use_cache" in inspect.signature(model.forward).parameters:
        keywords["use_cache"] = False
    result = model(**keywords)
    if isinstance(result, torch.Tensor):
        items: list[tuple[str, Any]] = [("output", result)]
    elif isinstance(result, Mapping):
        items = list(result.items())
    elif isinstance(result, tuple | list):
        items = [(str(i), item) for i, item in enumerate(result)]
    else:
        raise InputError(
            f"{type(model).__name__}.forward returns a {type(result).__name__}: no tensors to compare"
        )
    return {name: t.detach() for name, t in items if isinstance(t, torch.Tensor) and t.is_floating_point()}


def _reference(
    model: nn.Module, plan: Any, batch: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], KeptPositions]:
    """Outputs of the masked reference; ``model``'s parameters are masked already."""
    with kept_positions(plan.marked) as mode:
        try:
            reference = outputs_of(model, batch)
        except IndexError as error:
            raise InputError(
                f"{type(model).__name__} does not run on the inputs of the check ({error}): are token ids outside "
                "its vocabulary?"
            ) from error
    if mode.missing:
        op = mode.missing[0]
        raise VerificationError(
            f"{op.name} number {op.nth} in {op.module or 'the model'}, which normalises over a removed axis, did "
            "not run: verify with inputs like those of the trace"
        )
    return reference, mode


def compared_outputs(
    reference: dict[str, torch.Tensor], got: dict[str, torch.Tensor]
) -> tuple[float, float, tuple[str, ...]]:
    """Largest error over all outputs of equal shape, the scale of those that matter, and the names compared."""
    principal = _principal(list(reference))
    if not principal or any(name not in got for name in principal):
        raise VerificationError("the model's output holds no floating point tensor to compare")
    for name in principal:
        if reference[name].shape != got[name].shape:
            raise VerificationError(
                f"the compacted model's {name} has shape {tuple(got[name].shape)}, the original's "
                f"{tuple(reference[name].shape)}: the plan cuts an output"
            )
    # Other outputs may legitimately be smaller (an encoder's hidden states after its hidden channels were cut).
    names = tuple(n for n, t in reference.items() if n in got and got[n].shape == t.shape)
    error = float(np.max([_error(reference[name], got[name]) for name in names]))  # keeps NaN, unlike max()
    scale = max(float(reference[name].abs().max()) if reference[name].numel() else 0.0 for name in principal)
    return error, scale, names


def _principal(names: list[str]) -> list[str]:
    """The outputs that matter to a caller, as for a trace: all named after logits, the last hidden state, or all."""
    logits = [name for name in names if "logits" in name]
    return logits or ["last_hidden_state"] * ("last_hidden_state" in names) or names


def _error(reference: torch.Tensor, got: torch.Tensor) -> float:
    """Largest absolute difference; NaN anywhere is an error of NaN, equal infinities (masked logits) are equal."""
    if not reference.numel():
        return 0.0
    difference = (reference.double() - got.double()).abs()
    return float(torch.where(reference == got, 0.0, difference).max())


def masked_values(
    data: torch.Tensor, dims: Mapping[int, Any]
) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
    """Where a parameter's values are not in ``dims`` (a plan's kept positions): views of it, and indices into them."""
    for dim, kept in dims.items():
        gone = np.stack([np.setdiff1d(np.arange(data.shape[dim]), row) for row in np.atleast_2d(kept)])
        slices = dims.get(0, np.arange(data.shape[0]))[:, None]
        places = (gone[0],) if kept.ndim == 1 else (slices, gone)
        view = data.movedim(dim, kept.ndim - 1)
        yield view, tuple(torch.as_tensor(place, device=data.device) for place in places)


@contextmanager
def masked(model: nn.Module, plan: Any) -> Iterator[None]:
    """The masked reference inside the block; afterwards every bit is as it was.

    Removed positions of the parameters are zero, and removed blocks hand on what they get.
    """
    parameters = dict(model.named_parameters())
    undo: list[tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]] = []
    try:
        with deferred_interrupts():
            for name, dims in plan.kept.items():
                if name not in parameters:
                    continue  # a buffer: what it scales or shifts is zero already
                data = parameters[name].data  # not a new version for autograd: the values will be back
                for view, index in masked_values(data, dims):
                    undo.append((view, index, view[index]))
                    view[index] = 0
        forget(model)
        with bypassed(model, getattr(plan, "layers", ())), silenced(model, getattr(plan, "sublayers", ())):
            yield
    finally:
        with deferred_interrupts():
            for view, index, values in reversed(undo):
                view[index] = values
            forget(model)


@contextmanager
def holding(
    model: nn.Module, kept: Mapping[str, Mapping[int, Any]], weights: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Put new values at the kept positions of parameters inside the block; afterwards every bit is as it was."""
    parameters = dict(model.named_parameters())
    undo: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        with deferred_interrupts():
            for name, values in weights.items():
                data, dims = parameters[name].data, kept.get(name, {})
                undo.append((data, data.clone()))
                _put(data, dims, values)
        yield
    finally:
        with deferred_interrupts():
            for data, values in undo:
                data.copy_(values)


def _put(data: torch.Tensor, kept: Mapping[int, Any], values: torch.Tensor) -> None:
    """Write ``values`` at the kept positions, which may be a row for each kept slice along dimension 0."""
    if any(positions.ndim == 2 for positions in kept.values()):
        for place, number in enumerate(kept.get(0, range(len(data)))):
            inside = {dim - 1: p if p.ndim == 1 else p[place] for dim, p in kept.items() if dim}
            _put(data[int(number)], inside, values[place])
        return
    places = np.ix_(*(kept.get(dim, np.arange(size)) for dim, size in enumerate(data.shape)))
    data[tuple(torch.as_tensor(place, device=data.device) for place in places)] = values


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and experts computed as a trace does, inside the block; afterwards as it was."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with experts_computed_by("batched_mm", model):
            yield
    finally:
        with deferred_interrupts():
            for module, mode in training:
                module.training = mode


@contextmanager
def experts_computed_by(implementation: str, model: nn.Module) -> Iterator[None]:
    """One of transformers' ways to compute a mixture of experts, inside the block; afterwards as it was."""
    held = (value for module in model.modules() for value in vars(module).values() if is_config(value))
    configs = {id(c): c for c in held if hasattr(c, "_experts_implementation")}.values()
    experts = [(config, config._experts_implementation) for config in configs]
    try:
        for config in configs:
            config._experts_implementation = implementation
        yield
    finally:
        with deferred_interrupts():
            for config, name in experts:
                config._experts_implementation = name


def _batches(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The given batch, and where there is an attention mask the same with its last token masked.

    A padded batch takes other paths through attention (sdpa with a mask, repeated keys).
    """
    batches = [dict(inputs)]
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] > 1:
        padded = mask.clone()
        padded[:, -1] = 0
        batches.append({**inputs, "attention_mask": padded})
    return batches


def _unrest(
    model: nn.Module, plan: Any, batch: Mapping[str, Any], reference: dict[str, torch.Tensor]
) -> float:
    """How far the reference's outputs move, relatively, when gains and biases change by half a unit of float32.

    Norms and softmax round to float32 inside in models of every dtype, and many layers can make much of it.
    """
    vectors = [p for p in model.parameters() if p.dim() == 1 and p.is_floating_point()]
    before = [p.detach().clone() for p in vectors]
    generator = torch.Generator().manual_seed(0)
    try:
        for vector in vectors:
            signs = torch.randint(2, vector.shape, generator=generator) * 2 - 1
            vector.mul_(1 + signs.to(vector.device, vector.dtype) * 2.0**-24)
        moved, _ = _reference(model, plan, batch)
    finally:
        for vector, values in zip(vectors, before, strict=True):
            vector.copy_(values)
    error, scale, _ = compared_outputs(reference, moved)
    return error / scale if scale else error


def _first_difference(
    model: nn.Module, twin: nn.Module, plan: Any, batch: Mapping[str, Any], tolerance: float
) -> str:
    """Where the two begin to differ: the first module whose output has the same shape in both, but other values."""
    with masked(model, plan):
        expected = _module_outputs(model, lambda: _reference(model, plan, batch))
    found = _module_outputs(twin, lambda: outputs_of(twin, batch))
    for name, tensor in expected.items():
        other = found.get(renamed(name, getattr(plan, "layers", ())) or "")
        if name and other is not None and other.shape == tensor.shape and tensor.numel():
            scale = float(tensor.abs().max()) or 1.0
            if not _error(tensor, other) / scale <= tolerance:
                return f", beginning in {name}"
    return ""


def _module_outputs(model: nn.Module, run: Any) -> dict[str, torch.Tensor]:
    """Module path -> the first floating point tensor of its (last) output, in the order the modules finish."""
    seen: dict[str, torch.Tensor] = {}

    def remember(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, result: Any) -> None:
            tensor = result[0] if isinstance(result, tuple) and result else result
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                seen[name] = tensor.detach().clone()

        return hook

    handles = [module.register_forward_hook(remember(name)) for name, module in model.named_modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def narrowest(model: nn.Module) -> torch.dtype:
    """The floating point dtype of the model's parameters with the fewest bits."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return min(dtypes, key=lambda d: (torch.finfo(d).bits, -torch.finfo(d).eps), default=torch.float32)


def fits(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a copy of the model in ``dtype`` and its compacted twin stay below the limit."""
    elements = sum(p.numel() for p in model.parameters())
    return 2 * elements * torch.finfo(dtype).bits // 8 <= WIDEN_LIMIT


def cast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Floating point inputs (pixels, features) in ``dtype``."""
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
