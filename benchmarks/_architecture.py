"""One architecture put to every test: what is prunable, whether it comes out whole, and what loads it again.

The equality check: every prunable axis loses one or two random indices (never the last, so that what follows has to
move up), a copy is compacted, and its outputs are compared with those of the original in which exactly the removed
positions of the same parameters are zero. That reference is built here and shares nothing with llmprune but the kept
positions of the plan. Where an operation normalises over what was removed, zeros are no reference, and the masked one
of llmprune.compaction.verify stands in.
"""

from __future__ import annotations

import copy
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _reload import JOBS, TOLERANCE
from tiny import Recipe, build
from torch import nn

import llmprune
from llmprune.errors import CheckpointError, LlmpruneError
from llmprune.tracing.inputs import example_inputs

EVERYTHING = ("head", "query", "ffn")
"""Kinds of which a quarter goes at once."""

STOCK_KINDS = ("head", "query", "ffn", "expert", "channel")
"""Kinds tried in stock form."""


def outputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a caller reads: the logits, or the last hidden state, or every floating point output."""
    with torch.no_grad():
        out = model(**copy.deepcopy(inputs))
    items = {"output": out} if isinstance(out, torch.Tensor) else dict(out.items())
    floats = {k: v for k, v in items.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    found = {k: v for k, v in floats.items() if "logits" in k}
    if not found and "last_hidden_state" in floats:
        found = {"last_hidden_state": floats["last_hidden_state"]}
    found = found or floats
    if not found:
        raise RuntimeError("the model's output holds no floating point tensor")
    return {k: v.detach().double() for k, v in found.items()}


def difference(reference: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> float:
    """Largest difference over the largest reference value (or over 1); infinite where a shape differs."""
    worst = 0.0
    for name, tensor in reference.items():
        if name not in got or got[name].shape != tensor.shape:
            return float("inf")
        gap = torch.where(tensor == got[name], 0.0, (tensor - got[name]).abs())
        finite = tensor[tensor.isfinite()]
        scale = max(1.0, float(finite.abs().max()) if finite.numel() else 1.0)
        error = float(gap.max()) / scale if gap.numel() else 0.0
        worst = float("inf") if error != error else max(worst, error)
    return worst


def zeroed(model: nn.Module, plan: llmprune.Plan) -> nn.Module:
    """A copy with the removed positions of every parameter set to zero."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in masked.named_parameters(remove_duplicate=False):
            dims = plan.kept.get(name, {})
            for dim, kept in dims.items():
                if kept.ndim == 1:
                    parameter.index_fill_(dim, gone(kept, parameter.shape[dim]), 0.0)
                    continue
                slices = dims.get(0, range(len(parameter)))  # each keeps other positions
                for number, row in zip(slices, kept, strict=True):
                    parameter[int(number)].index_fill_(dim - 1, gone(row, parameter.shape[dim]), 0.0)
    return masked


def gone(kept: np.ndarray[Any, Any], size: int) -> torch.Tensor:
    """The positions that are not kept."""
    return torch.as_tensor(np.setdiff1d(np.arange(size), kept))


def compacted(model: nn.Module, plan: llmprune.Plan) -> nn.Module:
    """A compacted copy."""
    small = copy.deepcopy(model)
    llmprune.compact(small, plan)
    return small


def sentence(error: BaseException) -> str:
    """An error in one line of a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}" if text else type(error).__name__


class Examination:
    """Puts one recipe to every test; ``row`` holds what is known so far, ``tell`` is called whenever it grows.

    Checkpoints are written below ``folder``, with ``JOBS`` for the process that loads them.
    """

    def __init__(
        self, recipe: Recipe, attention: str, row: dict[str, Any], tell: Callable[[], None], folder: Path
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.attention = attention
        self.row = row
        self.tell = tell
        self.random = random.Random(0)
        self.failures: list[str] = row.setdefault("failures", [])

    def run(self, quick: bool = False) -> None:
        """All stages (without checkpoints where it has to be quick); one that raises is a failure and ends it."""
        self.row["seconds"] = {}
        stages = (self.make, self.trace, self.each_axis, self.all_at_once, self.checkpoints)
        for stage in stages[:-1] if quick else stages:
            self.row["stage"] = stage.__name__
            self.tell()
            start = time.perf_counter()
            try:
                stage()
            except Exception as error:  # noqa: BLE001  (whatever it is, it is the row's reason)
                self.failures.append(f"{stage.__name__}: {sentence(error)}")
                return
            finally:
                self.row["seconds"][stage.__name__] = round(time.perf_counter() - start, 2)
        del self.row["stage"]

    # Stages ------------------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Build the model and its inputs, and run it."""
        self.model = build(self.recipe, self.attention)
        inputs = self.recipe.inputs
        self.inputs = example_inputs(self.model) if inputs is None else inputs(self.model)
        for module in self.model.modules():
            config = getattr(module, "config", None)
            if hasattr(config, "_experts_implementation"):
                config._experts_implementation = "batched_mm"  # as a trace and a verification do
        outputs(self.model, self.inputs)  # some models rescale their weights once
        self.base = outputs(self.model, self.inputs)
        if not all(bool(tensor.isfinite().any()) for tensor in self.base.values()):
            raise RuntimeError("the random model computes nothing finite")
        self.row["parameters"] = sum(p.numel() for p in self.model.parameters())

    def trace(self) -> None:
        """Find the axes."""
        given = None if self.recipe.inputs is None else self.inputs
        self.graph = llmprune.trace(self.model, given)
        axes = self.graph.axes
        self.axes = [axis for axis in axes if axis.prunable]
        self.row |= {
            "ops": len(self.graph.tape.ops),
            "unknown": self.graph.unknown_operations,
            "device": self.graph.tape.device_mode,
            "notes": list(self.graph.tape.notes),
            "axes": dict(Counter(axis.kind for axis in self.axes)),
            "frozen": [f"{a.kind}({a.size}) {a.places[0][0]}[{a.places[0][1]}]: {'; '.join(a.reasons)}"
                       for a in axes if not a.prunable and a.places],
        }  # fmt: skip
        if not self.axes:
            raise RuntimeError("no axis is prunable")

    def each_axis(self) -> None:
        """Each prunable axis alone."""
        tally = self.row["equality"] = {
            "equal": 0,
            "of": len(self.axes),
            "worst": 0.0,
            "masked": 0,
            "unmoved": 0,
        }
        for axis in self.axes:
            if axis.size < 2:
                tally["equal"] += 1
                continue
            count = min(1 if axis.marks else 2, axis.size - 1)
            removed = sorted(self.random.sample(range(axis.size - 1), count))
            try:
                error = self.compare({axis.id: removed}, axis.id)
            except Exception as problem:  # noqa: BLE001
                self.failures.append(f"{axis.kind}({axis.size}) {axis.places[0][0]}: {sentence(problem)}")
                continue
            tally["worst"] = max(tally["worst"], error)
            if error <= TOLERANCE:
                tally["equal"] += 1
            else:
                self.failures.append(f"{axis.kind}({axis.size}) {axis.places[0][0]}: differs by {error:.1e}")

    def all_at_once(self) -> None:
        """A quarter of every unmarked head, query and ffn axis, also with padding; and one expert of each axis."""
        self.plan = self.quarter()
        if self.plan is not None:
            batches = {"": self.inputs}
            mask = self.inputs.get("attention_mask")
            if mask is not None and mask.dim() == 2:
                padded = mask.clone()
                padded[:, -1] = 0
                batches[" padded"] = {**self.inputs, "attention_mask": padded}
            if self.marked(self.plan):
                llmprune.verify(self.model, self.plan, self.inputs)
            else:
                small, masked = compacted(self.model, self.plan), zeroed(self.model, self.plan)
                for what, batch in batches.items():
                    error = difference(outputs(masked, batch), outputs(small, batch))
                    self.row["equality"]["worst"] = max(self.row["equality"]["worst"], error)
                    if not error <= TOLERANCE:
                        self.failures.append(f"all at once{what}: differs by {error:.1e}")
        experts = {
            a.id: [self.random.randrange(a.size - 1)] for a in self.axes if a.kind == "expert" and a.size > 2
        }
        if experts:
            removed = {**(self.plan.removed if self.plan else {}), **experts}
            self.plan = llmprune.plan(self.graph, removed=removed)
            llmprune.verify(self.model, self.plan, self.inputs)

    def checkpoints(self) -> None:
        """Save what was pruned at once in universal form and each kind alone in stock form."""
        self.row["stock"] = {}
        jobs: list[dict[str, Any]] = []
        if self.plan is not None:
            self.save(jobs, "universal", self.plan)
        for kind in (kind for kind in STOCK_KINDS if kind in self.row["axes"]):
            plan = self.uniform(kind)
            if plan is None:
                self.row["stock"][kind] = "no plan of uniform counts closes"
                continue
            try:
                self.save(jobs, kind, plan)
                self.row["stock"][kind] = "yes"
                del jobs[
                    2:
                ]  # one of each form is read in the other process; saving has read this one already
            except CheckpointError as error:
                self.row["stock"][kind] = " ".join(str(error).split())
            self.tell()
        given = {"inputs": self.inputs, "dtype": self.recipe.dtype, "attention": self.attention}
        torch.save({"jobs": jobs, **given}, self.folder / JOBS)

    # Helpers -----------------------------------------------------------------------------------------------------

    def compare(self, removed: dict[int, Any], axis: int) -> float:
        """The difference of the compacted model from its reference when these indices go."""
        plan = llmprune.plan(self.graph, removed=removed)
        lost = np.asarray(plan.removed[axis]).ravel()
        if not np.isin(np.asarray(removed[axis]), lost).all():
            raise RuntimeError("the plan leaves out an index it was asked to remove")
        small, masked = compacted(self.model, plan), zeroed(self.model, plan)
        shapes = dict(small.named_parameters(remove_duplicate=False))
        for name, dims in plan.kept.items():
            for dim, kept in dims.items():
                if name in shapes and shapes[name].shape[dim] != len(kept):
                    raise RuntimeError(
                        f"{name} has {shapes[name].shape[dim]} positions in {dim}, not {len(kept)}"
                    )
        reference = outputs(masked, self.inputs)
        if difference(self.base, reference) < 1e-12:
            self.row["equality"]["unmoved"] += 1
        error = difference(reference, outputs(small, self.inputs))
        if self.marked(plan):
            try:
                verified = llmprune.verify(self.model, plan, self.inputs)
            except LlmpruneError:
                if error <= TOLERANCE:
                    raise RuntimeError("verify refuses what equals the zeroed reference") from None
                raise
            if not error <= TOLERANCE:
                self.row["equality"]["masked"] += 1
                error = verified.relative_error
                if TOLERANCE < error <= verified.tolerance:
                    self.row["notes"].append(
                        f"axis {axis} differs by {error:.1e}, of which rounding inside its norms explains all: as much "
                        f"as {verified.tolerance:.0e}"
                    )
                    return 0.0
        return error

    def marked(self, plan: llmprune.Plan) -> bool:
        """Whether something normalises over what the plan removes."""
        return any(self.graph.axes[axis].marks for axis in plan.removed)

    def quarter(self) -> llmprune.Plan | None:
        """The plan that takes a quarter of every unmarked head, query and ffn axis, another of each expert's."""
        removed: dict[int, Any] = {}
        for axis in self.axes:
            if axis.kind not in EVERYTHING or axis.marks or axis.size < 2:
                continue
            slices = self.slices(axis.id)
            rows = [
                sorted(self.random.sample(range(axis.size), max(1, axis.size // 4)))
                for _ in range(slices or 1)
            ]
            removed[axis.id] = np.array(rows) if slices else rows[0]
        if not removed:  # none of these kinds: one of whatever there is
            removed = {axis.id: [0] for axis in self.axes[:1] if axis.size > 1}
        return llmprune.plan(self.graph, removed=removed) if removed else None

    def slices(self, axis: int) -> int:
        """Of how many slices (experts) each may lose other indices of an axis; 0: all lose the same."""
        try:
            around = self.graph.around(axis)
        except LlmpruneError:
            return 0
        return around.size if around.stacked else 0

    def uniform(self, kind: str) -> llmprune.Plan | None:
        """A plan that takes the same small number of indices of every axis of a kind, of one that closes."""
        axes = [axis for axis in self.axes if axis.kind == kind and axis.size > 1]
        for share in (2, 1, 4) if axes else ():
            removed = {
                a.id: list(range(max(1, a.size // 8) if share == 2 else min(share, a.size - 1))) for a in axes
            }
            try:
                return llmprune.plan(self.graph, removed=removed)
            except LlmpruneError:
                continue
        return None

    def save(self, jobs: list[dict[str, Any]], name: str, plan: llmprune.Plan) -> None:
        """Save a compacted copy, universal or stock, as one more job of the process that loads it."""
        small = compacted(self.model, plan)
        form = "universal" if name == "universal" else "stock"
        saved = llmprune.save_pretrained(small, self.folder / name, form=form, inputs=self.inputs)
        jobs.append({"name": name, "folder": saved.directory, "expected": outputs(small, self.inputs)})


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny tensors are no work for many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
