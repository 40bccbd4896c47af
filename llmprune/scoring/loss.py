"""The loss of each calibration sample, and the same over a vocabulary too large for whole logits.

The default is the mean next-token cross entropy of a causal language model. Over a large vocabulary the logits
(samples x length x vocabulary) would outweigh everything else in memory, so the final projection and the cross entropy
are fused: slices of its rows, an online logsumexp forward, the same slices again backward.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from llmprune.errors import CalibrationError, InputError
from llmprune.out_of_core.reading import Sliced
from llmprune.scoring.calibration import Batch

UserLoss = Callable[[nn.Module, Mapping[str, torch.Tensor]], torch.Tensor]
SLICE_BYTES = 1 << 23
"""Size of one float32 slice of logits in the fused loss."""
SLICE_ROWS = 256
"""Rows of the final projection in a slice, at least."""


def config_value(model: nn.Module, name: str) -> Any:
    """``model.config.<name>``, or None where the model has no such thing."""
    return getattr(getattr(model, "config", None), name, None)


def _accepted(model: nn.Module) -> tuple[set[str], bool]:
    parameters = inspect.signature(model.forward).parameters
    return set(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def run(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Any:
    """Call ``model`` on ``inputs`` without a cache; plain ids go by place where it has another name for them."""
    names, anything = _accepted(model)
    options = {"use_cache": False} if "use_cache" in names else {}
    if set(inputs) == {"input_ids"} and "input_ids" not in names and not anything:
        return model(inputs["input_ids"], **options)
    return model(**inputs, **options)


def logits_of(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Call ``model`` on ``inputs`` without a cache and return its logits (the first output if it names none).

    Raises:
        InputError: the model returns no floating-point tensor there.
    """
    output = run(model, inputs)
    if not isinstance(output, torch.Tensor):
        logits = getattr(output, "logits", None)
        output = logits if logits is not None else (output[0] if isinstance(output, (tuple, list)) else None)
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        raise InputError(
            f"{type(model).__name__} returns no logits: pass loss=, a callable (model, batch) -> losses"
        )
    return output


def next_token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy of each sample: logits (S, T, V), ids (S, T) -> (S,).

    In float32 whatever the model's precision, as in transformers' own loss, and so with the same gradients.
    """
    pairs = zip(logits[:, :-1], ids[:, 1:], strict=True)
    return torch.stack([F.cross_entropy(row.float(), targets) for row, targets in pairs])


def label_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each sample: logits (S, ..., V), labels (S, ...) with -100 where nothing is predicted."""
    losses = F.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none", ignore_index=-100
    )
    counted = (labels != -100).reshape(len(labels), -1)
    return losses.view(len(labels), -1).sum(1) / counted.sum(1).clamp(min=1)


log = logging.getLogger(__name__)

_SKETCH_TOKENS = 8


class SampleLosses:
    """Callable (batch) -> the loss of each sample, shape (S,), for one model.

    Args:
        model: The model.
        loss: A user's ``loss(model, batch)``: a mapping of tensors in, one loss per sample out. None for the default:
            with plain ids the mean next-token loss; with "labels" among the inputs the mean cross entropy of the
            model's logits against these, each position against its own label, or, where labels have the ids' shape
            and the model is causal, against the next one.
        batch: The calibration samples; only which inputs there are matters here.

    Raises:
        InputError: the default does not apply to this model or these inputs.
    """

    def __init__(self, model: nn.Module, loss: UserLoss | None, batch: Batch):
        self.model, self.loss = model, loss
        self.plain = loss is None and set(batch.inputs) == {"input_ids"}
        """Whether this is the next-token loss over plain ids, and so the final projection may be fused into it."""
        self._shifted = False
        if loss is not None:
            return
        if self.plain and config_value(model, "is_encoder_decoder"):
            raise InputError(
                f"{type(model).__name__} is an encoder-decoder, which has no next-token loss over plain ids: pass a "
                "mapping with labels as calibration, or loss="
            )
        if not self.plain and "labels" not in batch.inputs:
            raise InputError(
                "calibration inputs without labels need loss=, a callable (model, batch) -> losses"
            )

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The losses of ``batch``'s samples, with their autograd graph."""
        if self.loss is not None:
            losses = self.loss(self.model, batch.inputs)
            if not isinstance(losses, torch.Tensor) or losses.shape != (batch.samples,):
                got = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
                raise InputError(
                    f"loss= returned {got}: one loss per sample, shape ({batch.samples},), is expected"
                )
            return losses
        if self.plain:
            return self.of_logits(self.logits(batch), batch)
        logits, labels = self.logits(batch), batch.inputs["labels"]
        if logits.shape[:-1] != labels.shape:
            raise InputError(
                f"{type(self.model).__name__} returns logits of shape {tuple(logits.shape)} for labels of shape "
                f"{tuple(labels.shape)}: pass loss=, a callable (model, batch) -> losses"
            )
        return label_losses(logits[:, :-1], labels[:, 1:]) if self._shifted else label_losses(logits, labels)

    def logits(self, batch: Batch) -> torch.Tensor:
        """The model's logits for ``batch``."""
        return logits_of(self.model, batch.inputs)

    def of_logits(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The next-token losses from logits (S, T, V).

        Raises:
            InputError: the logits are no next-token predictions by their shape.
        """
        ids = batch.inputs["input_ids"]
        if logits.dim() != 3 or logits.shape[:2] != ids.shape:
            raise InputError(
                f"{type(self.model).__name__} returns logits of shape {tuple(logits.shape)} for ids of shape "
                f"{tuple(ids.shape)}, no next-token predictions: pass loss=, a callable (model, batch) -> losses"
            )
        return next_token_losses(logits, ids)

    def check_causal(self, batch: Batch) -> None:
        """See on a few plain ids that the model predicts next tokens.

        Raises:
            InputError: what it says of a token depends on later ones.
        """
        if self.plain and not self._is_causal(batch):
            raise InputError(
                f"{type(self.model).__name__} is not causal (its logits depend on later tokens), so the next-token "
                "loss means nothing: pass loss=, or a mapping with labels as calibration"
            )

    def find_shift(self, batch: Batch) -> None:
        """Find out on a small batch with labels whether the model predicts next tokens."""
        if self.plain or self.loss is not None or config_value(self.model, "is_encoder_decoder"):
            return
        ids, labels = batch.inputs.get("input_ids"), batch.inputs["labels"]
        self._shifted = ids is not None and ids.shape == labels.shape and self._is_causal(batch)

    def _is_causal(self, batch: Batch) -> bool:
        """Whether logits at all tokens but the last stay where they are, but for rounding, when the last changes."""
        ids = batch.inputs["input_ids"]
        other = ids.clone()
        other[:, -1] = torch.where(ids[:, -1] == ids[:, 0], (ids[:, -1] - 1).abs(), ids[:, 0])
        with torch.no_grad():
            first = self.logits(batch)
            second = logits_of(self.model, {**batch.inputs, "input_ids": other})
        if first.dim() != 3 or first.shape[:2] != ids.shape:
            return False
        tolerance = 3e-2 if first.dtype in (torch.float16, torch.bfloat16) else 1e-4
        first, second = first[:, :-1].float(), second[:, :-1].float()
        # Of logits that are not finite the losses speak, which name the sample.
        finite = torch.isfinite(first) & torch.isfinite(second)
        gap = torch.where(finite, (first - second).abs(), 0.0)
        return float(gap.max()) <= tolerance * float(torch.where(finite, first.abs(), 0.0).max())


def loss_of(model: nn.Module, loss: UserLoss | None, batch: Batch) -> SampleLosses | None:
    """The loss of the samples; None for a model that has none of its own.

    Raises:
        InputError: the user's loss does not apply.
    """
    try:
        losses_of = SampleLosses(model, loss, batch)
        sketch = batch.sketch(_SKETCH_TOKENS)
        losses_of.find_shift(sketch)
        losses_of.check_causal(sketch)
    except InputError as error:
        if loss is not None:
            raise
        log.info("no loss of its own: %s", error)
        return None
    return losses_of


def check_losses(losses: torch.Tensor, first: int = 0) -> None:
    """See that every sample's loss is finite.

    Args:
        losses: One loss per sample.
        first: The number of the first of these samples in the calibration set.

    Raises:
        CalibrationError: one is not; the message names the sample.
    """
    bad = (~torch.isfinite(losses.detach())).nonzero()
    if len(bad):
        sample = int(bad[0])
        value = float(losses.detach()[sample])
        raise CalibrationError(
            f"the loss of calibration sample {first + sample} is {value}: the model's weights or "
            "its precision cannot carry this sample"
        )


class HeadUse(Protocol):
    """What the fused loss tells about the final projection while it runs backward."""

    samples: int

    def rows(self, start: int, stop: int, x: torch.Tensor, dy: torch.Tensor, y: torch.Tensor) -> None:
        """Rows ``start:stop`` of the weight saw inputs ``x`` (n, in), outputs' gradients ``dy`` and outputs ``y``."""

    def inputs(self, x: torch.Tensor, dx: torch.Tensor) -> None:
        """All rows are done: inputs ``x`` (n, in) and their gradients."""


def _slice_rows(tokens: int) -> int:
    return max(SLICE_ROWS, SLICE_BYTES // (4 * max(1, tokens)))


class FusedLoss(torch.autograd.Function):
    """Mean next-token losses from the final projection's input, without whole logits.

    ``apply(hidden (S, T, in), weight (V, in), bias (V,) or None, ids (S, T), use, anchor, keep)`` -> losses (S,). The
    weight and the bias are constants to autograd: what their gradients would be goes to ``use``, slice by slice, or
    nowhere when it is None. ``anchor`` is any tensor that requires grad. With ``keep`` the slices of logits are kept
    for backward, which otherwise forms them again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor | Sliced,
        bias: torch.Tensor | None,
        ids: torch.Tensor,
        use: HeadUse | None,
        anchor: torch.Tensor,
        keep: bool,
    ) -> torch.Tensor:
        """Online logsumexp over slices of rows (Milakov and Gimelshein 2018)."""
        samples, length = ids.shape
        x = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        targets = (
            ids[:, 1:].reshape(-1).to(x.device)
        )  # a device_map may have the projection on another device
        top = torch.full((len(x),), -torch.inf, dtype=torch.float32, device=x.device)
        total, picked = torch.zeros_like(top), torch.zeros_like(top)
        step = _slice_rows(len(x))
        kept: list[torch.Tensor] = []
        for start in range(0, len(weight), step):
            stop = min(start + step, len(weight))
            y = F.linear(x, weight[start:stop], None if bias is None else bias[start:stop])
            logits = y.float()
            now = torch.maximum(top, logits.amax(1))
            inside = (targets >= start) & (targets < stop)
            place = (targets - start).clamp(0, stop - start - 1)
            picked += torch.where(inside, logits.gather(1, place[:, None])[:, 0], 0)
            total = total * (top - now).exp() + (logits - now[:, None]).exp_().sum(1)
            top = now
            if keep:
                kept.append(y)
        logsum = top + total.log()
        ctx.save_for_backward(hidden, targets, logsum)
        ctx.weight, ctx.bias, ctx.use, ctx.kept = weight, bias, use, kept[::-1]
        return (logsum - picked).view(samples, length - 1).mean(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The same slices again: softmax minus one-hot, handed on and multiplied back."""
        (gradient,) = gradients
        hidden, targets, logsum = ctx.saved_tensors
        weight, bias, use = ctx.weight, ctx.bias, ctx.use
        samples, length = hidden.shape[0], hidden.shape[1] - 1
        x = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        scale = (gradient.to(logsum.dtype) / length).repeat_interleave(length)
        dx = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        step = _slice_rows(len(x))
        for start in range(0, len(weight), step):
            stop = min(start + step, len(weight))
            rows = weight[start:stop]
            if ctx.kept:
                y = ctx.kept.pop()
            else:
                y = F.linear(x, rows, None if bias is None else bias[start:stop])
            dy = (y.float() - logsum[:, None]).exp_().mul_(scale[:, None])
            inside = ((targets >= start) & (targets < stop)).nonzero()[:, 0]
            dy[inside, targets[inside] - start] -= scale[inside]
            dy = dy.to(x.dtype)
            dx += dy @ rows
            if use is not None:
                use.rows(start, stop, x, dy, y)
        dx = dx.to(x.dtype)
        if use is not None:
            use.inputs(x, dx)
        full = torch.zeros_like(hidden)
        full[:, :-1] = dx.view(samples, length, -1)
        return full, None, None, None, None, None, None


fused_loss: Callable[..., torch.Tensor] = FusedLoss.apply
"""Mean next-token losses by :class:`FusedLoss`."""
