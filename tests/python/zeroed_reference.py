"""Does every axis of a module come out whole?  The compacted copy against one whose removed positions are zero.

Nothing of :mod:`llmprune.compaction.verify` is used: the reference is a copy with zeros written into it. Only
operations that normalise over a removed axis run over the kept positions (:mod:`llmprune.compaction.masked_ops`), as
the definition wants.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

import llmprune
from llmprune.compaction.masked_ops import kept_positions

TOLERANCE = 1e-9


def seeded(make: Any, *args: Any, **kwargs: Any) -> Any:
    """A module in float64 and evaluation mode, its parameters random, statistics too; global seeds untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(*args, **kwargs).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms of a new module are zeros and ones
                parameter.add_(torch.randn_like(parameter) * 0.1)
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
    return model


def cast(inputs: Any) -> Any:
    """Floating point inputs in float64."""
    if isinstance(inputs, dict):
        return {
            name: value.double() if value.is_floating_point() else value for name, value in inputs.items()
        }
    return tuple(value.double() if value.is_floating_point() else value for value in inputs)


def zeroed(model: nn.Module, plan: llmprune.Plan) -> nn.Module:
    """A copy with the removed positions of its parameters set to zero."""
    reference = copy.deepcopy(model)
    parameters = dict(reference.named_parameters())
    with torch.no_grad():
        for name, dims in plan.kept.items():
            for dim, kept in dims.items() if name in parameters else ():
                gone = np.setdiff1d(np.arange(parameters[name].shape[dim]), kept)
                parameters[name].index_fill_(dim, torch.as_tensor(gone), 0.0)
    return reference


def output(model: nn.Module, inputs: Any) -> torch.Tensor:
    """What the model computes: its tensor, or the first of several."""
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    while not isinstance(result, torch.Tensor):
        result = result[0] if isinstance(result, (tuple, list)) else next(iter(result.values()))
    return result


def difference(model: nn.Module, plan: llmprune.Plan, inputs: Any) -> float:
    """Largest difference between the compacted and the zeroed model, relative to the largest output."""
    small = llmprune.compact(copy.deepcopy(model), plan)
    got = output(small, inputs)
    with kept_positions(plan.marked) if plan.marked else nullcontext():
        expected = output(zeroed(model, plan), inputs)
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def removals(graph: llmprune.Graph, seed: int = 0) -> Iterator[tuple[llmprune.Axis, list[int]]]:
    """For every prunable axis one or two random indices, never the last: what is behind them must move up."""
    rng = random.Random(seed)
    for axis in graph.axes:
        if axis.prunable and axis.size > 1:
            yield axis, sorted(rng.sample(range(axis.size - 1), 2 if axis.size > 4 else 1))


def check_axes(model: nn.Module, inputs: Any, seed: int = 0, tolerance: float = TOLERANCE) -> llmprune.Graph:
    """Trace, and compare for each prunable axis alone, then for a quarter of every axis at once.

    Returns:
        The graph, for what a test wants to know besides.
    """
    model, inputs = model.double(), cast(inputs)
    graph = llmprune.trace(model, inputs)
    everything = {}
    for axis, gone in removals(graph, seed):
        plan = llmprune.plan(graph, removed={axis.id: gone})
        assert set(gone) <= set(plan.removed[axis.id].tolist())
        error = difference(model, plan, inputs)
        assert error <= tolerance, f"{axis}: {error:.1e}"
        everything[axis.id] = gone[:1]
    if everything:
        plan = llmprune.plan(graph, removed=everything)
        error = difference(model, plan, inputs)
        assert error <= tolerance, f"all at once: {error:.1e}"
    return graph


def sizes(graph: llmprune.Graph) -> list[int]:
    """Sizes of the prunable axes, ascending."""
    return sorted(axis.size for axis in graph.axes if axis.prunable)
