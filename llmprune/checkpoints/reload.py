"""Loading again what was saved, and whether it is the same model: its tensors, and what it computes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmprune.checkpoints import universal
from llmprune.checkpoints.loading import quiet_transformers
from llmprune.compaction.verify import TOLERANCE, WIDER, cast, evaluating, fits, outputs_of
from llmprune.errors import CheckpointError, LlmpruneError

log = logging.getLogger(__name__)


def compare(
    model: nn.Module, twin: nn.Module, inputs: Mapping[str, Any] | None = None, must_run: bool = False
) -> float | None:
    """The largest difference of ``twin``'s outputs from ``model``'s, relative to the largest output.

    Buffers that a class computes when it is built come in float32 from one and in the model's dtype from the other:
    where they differ by that rounding, the outputs may do so too, and must not differ once the buffers are made equal.

    Args:
        model: the model that was saved.
        twin: what was loaded.
        inputs: keyword arguments of forward; None makes them from the model's config.
        must_run: refuse a comparison of tensors alone.

    Returns:
        The error, or None where no input could be made and all tensors were compared instead.

    Raises:
        CheckpointError: it is more than rounding, or a tensor differs; or with ``must_run``, no input can be made.
    """
    rounded = _compare_tensors(model, twin)
    try:
        inputs = _runnable(model) if inputs is None else dict(inputs)
    except LlmpruneError as error:
        if must_run:
            raise CheckpointError(f"no input to compare the outputs of two forms ({error})") from error
        log.warning("the reloaded model's outputs were not compared (its tensors were): %s", error)
        return None
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    if dtype in (torch.bfloat16, torch.float16) and fits(model, WIDER[dtype]):
        # Rounding of sixteen bits could hide a difference.
        dtype = WIDER[dtype]
        model, twin, inputs = copy.deepcopy(model).to(dtype), twin.to(dtype), cast(inputs, dtype)
    expected = _outputs(model, inputs)
    worst = _difference(expected, _outputs(twin, inputs))
    tolerance = strict = TOLERANCE.get(dtype, 1e-5)
    if rounded:
        tolerance = max(strict, TOLERANCE[torch.float32])
        with _lent(model, twin, rounded):
            if not _difference(expected, _outputs(twin, inputs)) <= strict:
                tolerance = 0.0
    if not worst <= tolerance:
        raise CheckpointError(f"the reloaded model computes something else (relative error {worst:.1e})")
    return worst


def stated(model: Any, config: Any, kind: type[Any]) -> Any:
    """A copy of ``config`` that names the class and the dtype of the model's weights."""
    config = copy.deepcopy(config)
    config.architectures = [kind.__name__]
    config.dtype = model.dtype
    return config


def loaded(model: Any, kind: type[Any], source: Path | None, **given: Any) -> Any:
    """What transformers makes of a checkpoint of ``model``, on the model's device and for the same kind of attention.

    Args:
        model: the model that was saved.
        kind: the class to load.
        source: the folder; None for ``config`` and ``state_dict`` among ``given``.
        given: further arguments of ``from_pretrained``.

    Raises:
        CheckpointError: it does not load, or not whole.
    """
    options = {}
    for name in ("attn_implementation", "experts_implementation"):
        chosen = getattr(model.config, f"_{name}", None)
        if isinstance(chosen, str):
            options[name] = chosen
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            twin, info = kind.from_pretrained(
                source, dtype=model.dtype, output_loading_info=True, **given, **options
            )
    except (OSError, ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"what was written does not load ({str(error)[:300]})") from error
    for trouble in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := info.get(trouble):
            raise CheckpointError(
                f"what was written does not load whole ({trouble}: {sorted(map(str, names))[0]})"
            )
    return twin.to(model.device).eval()


def same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal values, in the dtype that was loaded."""
    return mine.shape == theirs.shape and torch.equal(mine.detach().to(theirs), theirs.detach())


def close(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal up to the rounding of float32."""
    if not mine.is_floating_point():
        return same(mine, theirs)
    return mine.shape == theirs.shape and torch.allclose(mine.double(), theirs.double(), rtol=1e-6, atol=0.0)


def _compare_tensors(model: nn.Module, twin: nn.Module) -> list[str]:
    """Compare all tensors: stored ones must be the same, computed ones equal up to rounding.

    Returns:
        The computed ones that are not the same bit for bit.

    Raises:
        CheckpointError: another one.
    """
    mine, theirs = universal.tensors_of(model), universal.tensors_of(twin)
    computed = {name for name, _ in universal.non_persistent_buffers(twin)}
    rounded = []
    for name in sorted(mine.keys() | theirs.keys()):
        equal = name in mine and name in theirs and same(mine[name], theirs[name])
        if equal:
            continue
        if name in computed and name in mine and close(mine[name], theirs[name]):
            rounded.append(name)
            continue
        raise CheckpointError(
            f"{name} is computed from the config and comes out otherwise than in the pruned model"
            if name in computed
            else f"{name} is not the same after loading"
        )
    return rounded


@contextmanager
def _lent(model: nn.Module, twin: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """``twin`` with the buffers ``names`` of ``model`` inside the block."""
    held = []
    try:
        for full in names:
            prefix, _, name = full.rpartition(".")
            buffers = twin.get_submodule(prefix)._buffers
            held.append((buffers, name, buffers[name]))
            buffers[name] = model.get_buffer(full)
        yield
    finally:
        for buffers, name, tensor in held:
            buffers[name] = tensor


def _difference(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> float:
    """Largest difference, relative to the largest value of the output (or to 1, if that is larger)."""
    errors = [0.0]
    for name, tensor in expected.items():
        other = found.get(name)
        if other is None or other.shape != tensor.shape:
            raise CheckpointError(f"the reloaded model's output {name} has another shape")
        scale = max(1.0, float(tensor.abs().max())) if tensor.numel() else 1.0
        gap = torch.where(tensor == other, 0.0, (tensor.double() - other.double()).abs())
        errors.append(float(gap.max()) / scale if tensor.numel() else 0.0)
    return float(np.max(errors))  # keeps NaN, unlike max()


def _runnable(model: nn.Module) -> dict[str, Any]:
    """Inputs made from the model's config, on which it does run."""
    from llmprune.tracing.inputs import example_inputs

    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in example_inputs(model).items()}
    _outputs(model, inputs)
    return inputs


def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Outputs in evaluation mode; modes and random state are put back."""
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return outputs_of(model, inputs)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"the model does not run on the inputs of the check ({error})") from error
