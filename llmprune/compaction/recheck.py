"""Checking a pruned model, loaded from a folder, against its record and (if that is there) against the original."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from llmprune.checkpoints.record import Compaction
from llmprune.compaction.norms import rescales
from llmprune.compaction.verify import Verification, compare, holding, outputs_of
from llmprune.errors import InputError, VerificationError
from llmprune.tracing.sublayers import Part


@dataclass(frozen=True)
class Recheck:
    """What was found of a pruned model.

    Attributes:
        tensors: parameters and buffers whose shapes were compared with the record.
        parameters: parameters of the model, tied ones once.
        prunings: how often it has been pruned.
        verification: the comparison with the original; None without one.
    """

    tensors: int
    parameters: int
    prunings: int
    verification: Verification | None

    def __str__(self) -> str:
        shapes = f"{self.tensors} cut tensors have the shapes of the record, " if self.tensors else ""
        lines = [
            f"{shapes}all weights are finite, and so are the outputs "
            f"({self.parameters:,} parameters, pruned {_times(self.prunings)})"
        ]
        if self.verification is None:
            lines.append("give --original to compare it with the model it was made from")
        else:
            lines.append(str(self.verification))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            **asdict(self),
            "verification": None if self.verification is None else self.verification.to_json(),
        }


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def recheck(
    model: nn.Module, original: nn.Module | None = None, inputs: Mapping[str, Any] | None = None
) -> Recheck:
    """Check a pruned model.

    Without the original: shapes against the record, weights and outputs finite. With it: the outputs too, against the
    original masked at the positions that the record says are gone.

    Raises:
        InputError: the model carries no record of a pruning, or ``original`` is not what it was made from.
        VerificationError: it is not what the record says, or does not compute what the masked original does.
    """
    record = getattr(model, "llmprune", None)
    if not isinstance(record, Compaction):
        raise InputError(
            "this model carries no record of a pruning (llmprune.json): give --plan to check a plan for it"
        )
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for name, shape in record.shapes().items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise VerificationError(
                f"{name} should have shape {shape} by the record, but the model has {found}"
            )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise VerificationError(f"{name} holds values that are not finite")
    if inputs is None:
        from llmprune.tracing.inputs import example_inputs

        inputs = example_inputs(model)
    with torch.no_grad():
        outputs = outputs_of(model.eval(), inputs)
    for name, tensor in outputs.items():
        if not bool(torch.isfinite(tensor).all()):
            raise VerificationError(f"the model's {name} are not finite on example inputs")
    verification = None if original is None else _against(model, original, record, inputs)
    count = sum(p.numel() for p in model.parameters())
    return Recheck(len(record.shapes()), count, len(record.history), verification)


def _against(
    model: nn.Module, original: nn.Module, record: Compaction, inputs: Mapping[str, Any]
) -> Verification:
    """Compare with the original, masked at what the record lacks."""
    from llmprune.tracing.trace import trace

    shapes = {name: tuple(t.shape) for name, t in (*original.named_parameters(), *original.named_buffers())}
    for name, shape in record.original_shapes.items():
        if shapes.get(name) != shape:
            found = f"has shape {shapes[name]} there" if name in shapes else "is not there"
            raise InputError(
                f"the model was not made from the original given: {name} had shape {shape}, and {found}"
            )
    graph = trace(original, inputs)
    drops = []
    for path, left in record.layers.items():
        stack = next((stack for stack in graph.layers if stack.module == path), None)
        if stack is None:
            raise InputError(
                f"blocks of {path} are gone by the record, but the original given has no such stack"
            )
        drops.append(stack.drop(set(range(stack.size)) - set(left)))
    parts = [Part(path, "", **how) for path, how in record.dropped.items()]
    removed = _removed(graph, record)
    marked = graph.marked_ops(removed)
    rescaled: list[Any] = []
    ways = {step.options.get("norms") for step in record.history}
    if "rescaled" in ways:
        marked, rescaled = rescales(graph, marked, removed)
    masked = SimpleNamespace(
        kept=record.kept, marked=marked, rescaled=rescaled, layers=drops, sublayers=parts
    )

    def counterpart(other: nn.Module) -> nn.Module:
        return model if other is original else copy.deepcopy(model).to(next(other.parameters()).dtype)

    # What a repair changed is what it is: the original gets it too, and the rest is compared.
    tensors = dict(model.named_parameters())
    there = {name: now for name in record.repaired if (now := record.name_now(name)) is not None}
    with holding(original, record.kept, {name: tensors[now].detach() for name, now in there.items()}):
        try:
            return compare(original, masked, inputs, counterpart)
        except VerificationError as error:
            if "rescaled" not in ways or len(ways) == 1:
                raise
            raise VerificationError(
                f"{error}; some of its prunings rescaled norms and some did not: if one of these took channels with "
                "norms kept, the record does not say enough to compare it with the original"
            ) from error


def _removed(graph: Any, record: Compaction) -> dict[int, np.ndarray]:
    """Axis id -> indices of which nothing is left anywhere, read off the record's kept positions."""
    out: dict[int, np.ndarray] = {}
    for axis in graph.axes:
        gone = np.zeros(axis.size, dtype=bool)
        for member in axis.members:
            kept = record.kept.get(member.parameter, {}).get(member.dim)
            if kept is not None:
                gone |= ~np.isin(member.positions.reshape(axis.size, -1), kept).any(axis=1)
        if gone.any():
            out[axis.id] = np.flatnonzero(gone)
    return out
