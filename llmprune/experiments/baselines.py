"""What structured pruning by coupled groups is compared with: the same without the groups, and zeros without structure.

None of these makes a checkpoint. They answer questions: what the dependency groups are worth (Ma et al. 2023, table 6),
and what zeros that no dense kernel can skip cost and gain at the same number of parameters.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llmprune.compaction.compact import compacted_copy
from llmprune.errors import PlanError
from llmprune.scoring.calibration import Batch

if TYPE_CHECKING:
    from llmprune.planning.plan import Plan
    from llmprune.tracing.graph import Graph

MAGNITUDES = ("l1", "l2")


def weight_scores(
    model: nn.Module, importance: str, batch: Batch | None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Parameter -> the importance of each of its elements, float64, in the parameter's shape.

    ``|w|`` for l1 and l2; a draw for random; for activation ``|w|`` times the Euclidean norm of the input it meets, of
    linear layers (Wanda, Sun et al. 2024, arXiv:2306.11695); ``|g w|`` of the mean gradient for everything else.
    """
    named = dict(model.named_parameters())
    if importance in MAGNITUDES:
        return {name: p.detach().double().abs() for name, p in named.items()}
    if importance == "random":
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.rand(p.shape, generator=generator, dtype=torch.float64) for name, p in named.items()
        }
    if batch is None:
        raise PlanError(f"elements cannot be scored by {importance!r} without calibration")
    if importance == "activation":
        return _met_by_inputs(model, batch)
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    ids = batch.inputs["input_ids"]
    for sample in ids:
        logits = twin(sample[None], use_cache=False).logits[0, :-1]
        torch.autograd.backward(F.cross_entropy(logits, sample[1:]) / len(ids))
    return {
        name: torch.zeros_like(p, dtype=torch.float64)
        if p.grad is None
        else (p.grad.double() * p.detach().double()).abs()
        for name, p in twin.named_parameters()
    }


def _met_by_inputs(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """``|w|`` of linear layers times the norm of their inputs over all tokens; of other parameters ``|w|``."""
    squares: dict[str, torch.Tensor] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def note(_: nn.Module, given: Any, name: str = f"{path}.weight") -> None:
                flat = given[0].detach().reshape(-1, given[0].shape[-1]).double()
                squares[name] = squares.get(name, 0) + flat.square().sum(0)

            handles.append(module.register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            model(batch.inputs["input_ids"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: p.detach().double().abs() * (squares[name].sqrt() if name in squares else 1.0)
        for name, p in model.named_parameters()
    }


def independent_positions(
    graph: Graph, plan: Plan, elements: Mapping[str, torch.Tensor]
) -> dict[str, dict[int, np.ndarray]]:
    """Positions every member loses when it loses as many indices as under the plan, but those *it* needs least.

    Args:
        graph: the traced model.
        plan: axes cut alike everywhere, no layers.
        elements: importance of each element (:func:`weight_scores`).

    Returns:
        Parameter -> dimension -> sorted positions that go. Buffers lose what the plan takes from them.

    Raises:
        PlanError: the plan drops layers, or cuts an axis differently within another.
    """
    if plan.layers or plan.sublayers:
        raise PlanError("whole layers have no members to remove independently")
    gone: dict[str, dict[int, set[int]]] = {}
    for axis, indices in plan.removed.items():
        if indices.ndim != 1:
            raise PlanError("query heads of a choice of their own cannot be removed independently")
        for member in graph.axes[axis].occurrences:
            if member.parameter in elements:
                values = elements[member.parameter]
                sums = values.movedim(member.dim, 0).reshape(values.shape[member.dim], -1).sum(1).numpy()
                order = np.argsort(sums[member.positions].sum(1), kind="stable")[: len(indices)]
            else:
                order = indices
            places = gone.setdefault(member.parameter, {}).setdefault(member.dim, set())
            places.update(member.positions[order].reshape(-1).tolist())
    return {
        name: {dim: np.array(sorted(places), dtype=np.int64) for dim, places in dims.items()}
        for name, dims in gone.items()
    }


def cut_independently(
    model: nn.Module, graph: Graph, plan: Plan, elements: Mapping[str, torch.Tensor]
) -> nn.Module:
    """A copy with the plan's sizes, every parameter having lost the slices that it needs least by itself."""
    lost = independent_positions(graph, plan, elements)
    sizes = {**graph.parameters, **graph.buffers}
    loose = copy.copy(plan)
    loose.kept = {
        name: {dim: np.setdiff1d(np.arange(sizes[name][dim]), places) for dim, places in dims.items()}
        for name, dims in lost.items()
    }
    return compacted_copy(model, loose)


def zero_independently(
    model: nn.Module, graph: Graph, plan: Plan, elements: Mapping[str, torch.Tensor]
) -> nn.Module:
    """A copy of full size in which the same slices are zeros instead."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, dims in independent_positions(graph, plan, elements).items():
            if name in elements:
                for dim, places in dims.items():
                    twin.get_parameter(name).index_fill_(dim, torch.from_numpy(places), 0)
    return twin


def cut_matrices(graph: Graph, plan: Plan) -> list[str]:
    """The matrices of the layers the plan cuts: where zeros without structure are put for comparison."""
    cut = {name for axis in plan.removed if axis < len(graph.axes) for name, _ in graph.axes[axis].places}
    return sorted(name for name in cut if len(graph.parameters.get(name, ())) == 2)


def zero_elements(
    model: nn.Module,
    names: list[str],
    elements: Mapping[str, torch.Tensor],
    count: int,
    pattern: str = "",
    by_row: bool = False,
) -> nn.Module:
    """A copy with ``count`` zeros in the named matrices.

    Args:
        model: the model.
        names: matrices that may have zeros.
        elements: importance of each element.
        count: how many elements are to be zero.
        pattern: empty for the least important wherever they lie, ranked within each matrix (every matrix has the same
            share of zeros); ``2:4`` for two of every four along a row, in as many whole rows as that takes, the rows
            whose lost elements matter least first.
        by_row: without a pattern, rank within each row.

    Raises:
        PlanError: the matrices hold fewer elements (with ``2:4``, half of them).
    """
    twin = copy.deepcopy(model)
    matrices = {name: twin.get_parameter(name) for name in names}
    room = sum(matrix.numel() for matrix in matrices.values()) // (2 if pattern else 1)
    if count > room:
        raise PlanError(f"{count:,} zeros do not fit: the matrices have room for {room:,}")
    with torch.no_grad():
        if not pattern:
            share = count / room
            for name, matrix in matrices.items():
                ranked = elements[name] if by_row else elements[name].reshape(1, -1)
                least = ranked.argsort(dim=-1, stable=True)[:, : round(share * ranked.shape[1])]
                matrix.view(ranked.shape).scatter_(1, least, 0)
            return twin
        rows = []
        for name, matrix in matrices.items():
            width = matrix.shape[1] // 4 * 4
            fours = elements[name][:, :width].reshape(len(matrix), -1, 4)
            away = fours.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True) < 2
            loss = (fours * away).sum((1, 2))
            rows += [(float(loss[i]) / (width // 2), name, i, away[i]) for i in range(len(matrix))]
        left = count
        for _, name, i, away in sorted(rows, key=lambda row: row[:3]):
            matrix, mask = matrices[name], away.reshape(-1)
            mask = mask & (mask.cumsum(0) <= left)
            matrix[i, : len(mask)].masked_fill_(mask, 0)
            left -= int(mask.sum())
            if left <= 0:
                break
    return twin


class SparseLinear(nn.Module):
    """A linear layer whose weight is kept compressed by rows (CSR) and multiplied by the framework's sparse kernel."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that sparse rows are in beta
            self.weight = dense.weight.detach().to_sparse_csr()
        self.bias = dense.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As :class:`torch.nn.Linear`."""
        flat: torch.Tensor = torch.sparse.mm(self.weight, x.reshape(-1, x.shape[-1]).t()).t()
        out = flat.reshape(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def with_sparse_kernels(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy whose named linear layers run on compressed rows: what their zeros gain on a CPU."""
    twin = copy.deepcopy(model)
    for name in names:
        path = name.rpartition(".")[0]
        module = twin.get_submodule(path)
        if isinstance(module, nn.Linear):
            parent, _, child = path.rpartition(".")
            setattr(twin.get_submodule(parent), child, SparseLinear(module))
    return twin
