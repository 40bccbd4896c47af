"""Random programs of views, joins and cuts: the algebra's axes against marks that travel through the program.

Each program is a module whose forward arranges its parameters. The graph of its recorded tape says which positions of
which parameter dimensions one axis index stands for. The oracle knows no algebra: every element carries an integer
label (its parameter, and its place there), the program runs on the labels, and marking one index means following the
marked labels through every operation, with nothing but the operations' own results.

What is checked, for every prunable axis and a random index of it:

- soundness: in every tensor of the program, what goes is a set of whole slices, and where two tensors meet
  element by element, a marked element meets a marked one: the index can be removed;
- minimality: one marked slice spreads, across the meetings of elements and to whole slices, within the axis index, and
  to all of it unless what it spreads to could not be removed by itself: the algebra takes no more than it must;
- removal: the program on the sliced parameters, its sizes solved from the graph, gives the original output at the
  positions that are left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from llmprune.tracing.graph import Graph, Member
from llmprune.tracing.trace import record

Step = tuple[Any, ...]


@dataclass
class Script:
    """Parameters' shapes and the steps over a growing list of tensors."""

    shapes: list[tuple[int, ...]]
    steps: list[Step] = field(default_factory=list)


def apply(step: Step, values: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors a step makes."""
    name, source, *rest = step
    if name == "cat":
        return [torch.cat([values[i] for i in source], rest[0])]
    if name == "stack":
        return [torch.stack([values[i] for i in source], rest[0])]
    if name == "add":
        return [values[source] + values[rest[0]]]
    x = values[source]
    if name == "reshape":
        return [x.reshape(rest[0])]
    if name == "permute":
        return [x.permute(rest[0])]
    if name == "slice":
        return [x.narrow(rest[0], rest[1], rest[2])]
    if name == "chunk":
        return list(x.chunk(rest[1], rest[0]))
    if name == "split":
        return list(x.split(rest[1], rest[0]))
    if name == "expand":
        return [x.unsqueeze(rest[0]).expand(*x.shape[: rest[0]], rest[1], *x.shape[rest[0] :])]
    assert name == "repeat"
    return [x.repeat(rest[0])]


class Program(nn.Module):
    """Runs a script over its parameters, and sums up all it made: everything matters, no dimension is an output.

    How often a tensor is repeated is held fixed by constants: a copy has no elements of its own to mark.
    """

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in script.shapes])
        self.fixed = {count: torch.ones(count) for count in (2, 3)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values: list[torch.Tensor] = list(self.weights)
        for step in self.script.steps:
            made = apply(step, values)
            if step[0] == "expand":
                made = [made[0] * self.fixed[step[3]].reshape(-1, *[1] * (made[0].ndim - step[2] - 1))]
            elif step[0] == "repeat":
                dim = step[2].index(2)
                copies = made[0].unflatten(dim, (2, -1)) * self.fixed[2].reshape(
                    -1, *[1] * (made[0].ndim - dim)
                )
                made = [copies.flatten(dim, dim + 1)]
            values += made
        return torch.stack([value.sum() for value in values]).sum() * x


KINDS = (
    "reshape",
    "reshape",
    "permute",
    "cat",
    "stack",
    "add",
    "add",
    "slice",
    "chunk",
    "split",
    "expand",
    "repeat",
)


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    sizes = st.sampled_from([2, 3, 4, 6, 8, 12])
    script = Script([tuple(draw(st.lists(sizes, min_size=1, max_size=2)))])
    values = [torch.zeros(script.shapes[0])]
    for _ in range(draw(st.integers(2, 8))):
        # mostly go on from what was made last
        source = len(values) - 1 - draw(st.sampled_from([0, 0, 0, 1])) % len(values)
        x = values[source]
        dim = draw(st.integers(0, max(x.ndim - 1, 0)))
        kind = draw(st.sampled_from(KINDS))
        made: list[Step] = []
        if kind == "reshape":
            made = [("reshape", source, draw(reshapes(x.numel())))]
        elif kind == "permute" and x.ndim > 1:
            made = [("permute", source, tuple(draw(st.permutations(range(x.ndim)))))]
        elif kind == "cat" and x.ndim:
            if x.ndim <= 2 and draw(st.booleans()):
                size = draw(st.sampled_from([1, 2, 3, 4]))
                shape = tuple(size if d == dim else n for d, n in enumerate(x.shape))
                source += new_parameter(script, values, shape) <= source
            others = [i for i, v in enumerate(values) if v.ndim == x.ndim and _alike(v, x, dim)]
            made = [("cat", (source, *draw(st.lists(st.sampled_from(others), min_size=1, max_size=2))), dim)]
        elif kind == "stack":
            others = [i for i, v in enumerate(values) if v.shape == x.shape]
            made = [("stack", (source, draw(st.sampled_from(others))), dim)]
        elif kind == "add" and 1 < x.numel() <= 144:
            others = [i for i, v in enumerate(values) if v.numel() == x.numel() and i != source]
            if draw(st.booleans()) or not others:  # a parameter of its own, of another shape
                source += new_parameter(script, values, draw(reshapes(x.numel(), most=2))) <= source
                others = [len(script.shapes) - 1]
            made = [("reshape", draw(st.sampled_from(others)), tuple(x.shape)), ("add", source, len(values))]
        elif kind == "slice" and x.ndim and x.shape[dim] > 1:
            start = draw(st.integers(0, x.shape[dim] - 1))
            made = [("slice", source, dim, start, draw(st.integers(1, x.shape[dim] - start)))]
        elif kind == "chunk" and x.ndim and x.shape[dim] % 2 == 0:
            made = [("chunk", source, dim, 2)]
        elif kind == "split" and x.ndim and x.shape[dim] > 1:
            at = draw(st.integers(1, x.shape[dim] - 1))
            made = [("split", source, dim, [at, x.shape[dim] - at])]
        elif kind == "expand":
            made = [("expand", source, dim, draw(st.integers(2, 3)))]
        elif kind == "repeat" and x.ndim:
            made = [("repeat", source, tuple(2 if d == dim else 1 for d in range(x.ndim)))]
        if x.ndim < 6 and x.numel() <= 512:
            for step in made:
                script.steps.append(step)
                values += apply(step, values)
    return script


def new_parameter(script: Script, values: list[torch.Tensor], shape: tuple[int, ...]) -> int:
    """Append a parameter and give its number; the numbers of what the steps made, from there on, move up by one."""
    place = len(script.shapes)

    def moved(number: int) -> int:
        return number + (number >= place)

    for i, (name, source, *rest) in enumerate(script.steps):
        source = tuple(map(moved, source)) if isinstance(source, tuple) else moved(source)
        script.steps[i] = (name, source, *(map(moved, rest) if name == "add" else rest))
    script.shapes.append(shape)
    values.insert(place, torch.zeros(shape))
    return place


@st.composite
def reshapes(draw: st.DrawFn, count: int, most: int = 4) -> tuple[int, ...]:
    """A shape of so many elements."""
    shape: list[int] = []
    while count > 1 and len(shape) < most - 1:
        shape.append(draw(st.sampled_from([d for d in range(2, count + 1) if count % d == 0])))
        count //= shape[-1]
    return (*shape, count) if count > 1 or not shape else tuple(shape)


def _alike(a: torch.Tensor, b: torch.Tensor, dim: int) -> bool:
    return all(d == dim or a.shape[d] == b.shape[d] for d in range(b.ndim))


def trace(script: Script) -> tuple[Program, Graph]:
    program = Program(script)
    tape = record(program, {"x": torch.ones(3)})
    tape.equations = [[t, d, 1, ""] for t, entry in enumerate(tape.tensors) for d in range(len(entry[0]))]
    return program, Graph.from_tape(tape, program)


def run(script: Script, labels: list[torch.Tensor]) -> list[torch.Tensor]:
    values = list(labels)
    for step in script.steps:
        values += apply(step, values)
    return values


def marks_of(graph: Graph, axis_id: int, index: int, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """The elements of each parameter that go with one axis index."""
    marks = [torch.zeros(shape, dtype=torch.bool) for shape in shapes]
    for member in graph.axes[axis_id].members:
        mark_slices(marks, member, index)
    return marks


def is_grid(marks: torch.Tensor) -> bool:
    """Whether the unmarked elements are a product of position sets: what is left after slices go."""
    keep = ~marks
    expected = torch.ones_like(keep)
    for dim in range(keep.ndim):
        others = [d for d in range(keep.ndim) if d != dim]
        line = keep.any(dim=others) if others else keep
        expected &= line.reshape([-1 if d == dim else 1 for d in range(keep.ndim)])
    return bool((keep == expected).all())


EXAMPLES = settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@EXAMPLES
@given(scripts(), st.randoms(use_true_random=False))
def test_removal_leaves_a_grid_everywhere_and_meetings_agree(script: Script, random: Any) -> None:
    """What one index takes is a set of slices in every tensor of the program, and added tensors lose the same."""
    _, graph = trace(script)
    for axis in graph.axes:
        if not axis.prunable:
            continue
        values = run_marks(script, marks_of(graph, axis.id, random.randrange(axis.size), script.shapes))
        for number, (marks, agreed) in enumerate(values):
            assert agreed, f"tensor {number} adds kept to removed elements"
            assert is_grid(marks), f"tensor {number} is no grid after removal"


def run_marks(script: Script, marks: list[torch.Tensor]) -> list[tuple[torch.Tensor, bool]]:
    """Marks of every tensor, and whether its operands agreed about them."""
    values = [(mark, True) for mark in marks]
    for step in script.steps:
        plain = [mark for mark, _ in values]
        agreed = step[0] != "add" or bool((plain[step[1]] == plain[step[2]]).all())
        values += [(mark.bool(), agreed) for mark in apply(step, plain)]
    return values


@EXAMPLES
@given(scripts(), st.randoms(use_true_random=False))
def test_one_marked_slice_spreads_to_the_axis_index_and_nothing_less_can_go(
    script: Script, random: Any
) -> None:
    _, graph = trace(script)
    for axis in graph.axes:
        if not axis.prunable:
            continue
        index = random.randrange(axis.size)
        expected = marks_of(graph, axis.id, index, script.shapes)
        chosen = random.choice(axis.members)
        for whole in (True, False):  # all its occurrences in one dimension, or one of them
            seed = blank(script)
            for member in axis.members:
                if member is chosen or (
                    whole and (member.parameter, member.dim) == (chosen.parameter, chosen.dim)
                ):
                    mark_slices(seed, member, index)
            found = spread(script, seed)
            assert not any((mark & ~wanted).any() for mark, wanted in zip(found, expected, strict=True))
            assert same(found, expected) or not removable(script, found), "less would do"


def blank(script: Script) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=torch.bool) for shape in script.shapes]


def mark_slices(marks: list[torch.Tensor], member: Member, index: int) -> None:
    positions = torch.from_numpy(member.positions[index].copy())
    marks[int(member.parameter.split(".")[1])].index_fill_(member.dim, positions, True)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def removable(script: Script, marks: list[torch.Tensor]) -> bool:
    """Whether every tensor of the program loses whole slices and every meeting agrees."""
    return all(agreed and is_grid(mark) for mark, agreed in run_marks(script, marks))


class Labels:
    """Integer labels of all parameters' elements, and for each label the slices it lies in, one a dimension."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        self.tensors: list[torch.Tensor] = []
        owners, slices, start, first = [], [], 0, 0
        for number, shape in enumerate(shapes):
            self.tensors.append(torch.arange(start, start + prod(shape)).reshape(shape))
            start += prod(shape)
            owners.append(np.full(prod(shape), number))
            places = np.indices(shape).reshape(len(shape), -1)
            rows = [first + sum(shape[:d]) + places[min(d, len(shape) - 1)] for d in (0, 1)]
            rows[1] = rows[1] if len(shape) > 1 else rows[0]
            slices.append(np.stack(rows))
            first += sum(shape)
        self.owner = np.concatenate(owners)
        self.slices = np.concatenate(slices, axis=1)
        self.count = start


def full(keys: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """The keys all of whose elements are hit."""
    total = np.bincount(keys)
    return np.flatnonzero((total > 0) & (np.bincount(keys[hit], minlength=total.size) == total))


def spread(script: Script, seed: list[torch.Tensor]) -> list[torch.Tensor]:
    """The closure of marked elements under what removal demands.

    In each tensor a position is gone when all elements of one parameter on it are; then its other elements go too. A
    slice of a parameter is gone when all of its elements that a tensor holds are gone.
    """
    labels = Labels(script.shapes)
    marked = torch.cat([mark.reshape(-1) for mark in seed]).numpy()
    values: list[list[torch.Tensor]] = [[tensor] for tensor in labels.tensors]
    for step in script.steps:
        if step[0] == "add":  # its elements have the labels of both operands
            values.append([*values[step[1]], *values[step[2]]])
        elif step[0] in ("cat", "stack"):
            depth = max(len(values[i]) for i in step[1])
            filled = [(values[i] * depth)[:depth] for i in step[1]]
            dense = list(range(len(step[1])))
            values.append(
                [apply((step[0], dense, step[2]), list(layer))[0] for layer in zip(*filled, strict=True)]
            )
        else:
            layers = [apply((step[0], 0, *step[2:]), [layer]) for layer in values[step[1]]]
            values += [list(pieces) for pieces in zip(*layers, strict=True)]
    while True:
        before = int(marked.sum())
        for layers in values:
            flat = [layer.reshape(-1).numpy() for layer in layers]
            hit = np.logical_or.reduce([marked[layer] for layer in flat])
            places = np.indices(layers[0].shape).reshape(layers[0].ndim, -1)
            for layer in flat:
                for line in places:
                    gone = full(line * len(script.shapes) + labels.owner[layer], hit)
                    hit = hit | np.isin(line, gone // len(script.shapes))
            for layer in flat:
                marked[layer[hit]] = True
                for rows in labels.slices:
                    marked |= np.isin(rows, full(rows[layer], hit))
        if int(marked.sum()) == before:
            break
    parts = torch.from_numpy(marked).split([prod(shape) for shape in script.shapes])
    return [part.reshape(shape) for part, shape in zip(parts, script.shapes, strict=True)]


@EXAMPLES
@given(scripts(), st.randoms(use_true_random=False))
def test_the_compacted_program_is_the_original_at_the_positions_left(script: Script, random: Any) -> None:
    program, graph = trace(script)
    original = run(script, [weight.detach() for weight in program.weights])
    for axis in graph.axes:
        if not axis.prunable or axis.size < 2:
            continue
        index = random.randrange(axis.size)
        marks = [mark for mark, _ in run_marks(script, marks_of(graph, axis.id, index, script.shapes))]
        kept = graph.kept({axis.id: [index]})
        values = []
        for number, weight in enumerate(program.weights):
            value = weight.detach()
            for dim, positions in kept.get(f"weights.{number}", {}).items():
                value = value.index_select(dim, torch.from_numpy(positions))
            values.append(value)
        shapes = graph.new_shapes({axis.id: 1})
        for number, value in enumerate(values):
            assert tuple(value.shape) == shapes.get(f"weights.{number}", script.shapes[number])
        assert sum(value.numel() for value in values) == graph.numel({axis.id: 1})
        at = len(values)
        for step in script.steps:
            count = len(apply(step, original))
            wanted = [compacted(original[at + i], marks[at + i]) for i in range(count)]
            for value, expected in zip(resized(step, values, wanted, marks), wanted, strict=True):
                torch.testing.assert_close(value, expected, rtol=0, atol=0)
                values.append(value)
            at += count


def compacted(value: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """A tensor without the slices that are marked throughout."""
    for dim in range(value.ndim):
        others = [d for d in range(value.ndim) if d != dim]
        gone = marks.all(dim=others) if others else marks
        stays = torch.from_numpy(np.flatnonzero(~gone.numpy()))
        # a dimension that is marked everywhere shows it in every dimension: only lines that differ from others go
        if stays.numel():
            value, marks = value.index_select(dim, stays), marks.index_select(dim, stays)
    return value


def resized(
    step: Step, values: list[torch.Tensor], wanted: list[torch.Tensor], marks: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The step with its numbers read off the sizes that are left."""
    name, source, *rest = step
    if name == "reshape":
        return apply((name, source, tuple(wanted[0].shape)), values)
    if name in ("chunk", "split"):
        return apply(("split", source, rest[0], [piece.shape[rest[0]] for piece in wanted]), values)
    if name == "slice":
        dim, start, _ = rest
        before = marks[source].narrow(dim, 0, start)
        others = [d for d in range(before.ndim) if d != dim]
        gone = before.all(dim=others) if others else before
        return apply((name, source, dim, start - int(gone.sum()), wanted[0].shape[dim]), values)
    return apply(step, values)
