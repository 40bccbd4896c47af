"""The dependency graph of a model: its axes, and which slices of which parameters each of them cuts.

The C core (``llmprune._core.Graph``) finds the axes; this module gives them names, arrays and JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmprune import _core
from llmprune.checkpoints.record import fingerprint as fingerprint_of
from llmprune.compaction.masked_ops import has_masked_form
from llmprune.errors import InputError, PlanError
from llmprune.planning.apart import Around, describe, find_around, kept_positions
from llmprune.tracing.declared import DECLARED, compile_rules, frozen_by_rule
from llmprune.tracing.explanation import Chain, Explanation, Step
from llmprune.tracing.layers import LayerAxis, find_layers
from llmprune.tracing.sublayers import Part, PartAxis, find_parts
from llmprune.tracing.tape import LITERAL, TENSOR, TENSORS, Tape, arguments, leaves

if TYPE_CHECKING:
    from torch import nn

    from llmprune.planning.footprint import Footprint
    from llmprune.tracing.layers import Drop
    from llmprune.tracing.second_form import SecondForm

IntArray = NDArray[np.int64]
Removed = Mapping[int, "IntArray | Sequence[int]"]

Lost = tuple[int, int, int, tuple[int, ...]]
"""Of one tensor of an operation: its place, a dimension that loses positions, the size before, the positions kept."""

_PLAIN_WEIGHT = "; torch.nn.utils.parametrize.remove_parametrizations makes it a plain weight"
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Member:
    """One occurrence of an axis in one dimension of a parameter or buffer.

    Attributes:
        parameter: canonical name of the parameter or buffer.
        dim: dimension of that tensor.
        positions: int64 (axis size, positions per index): row i holds the positions that axis index i stands for.
    """

    parameter: str
    dim: int
    positions: IntArray

    def __repr__(self) -> str:
        return f"Member({self.parameter!r}, dim={self.dim}, positions per index={self.positions.shape[1]})"


@dataclass(eq=False)
class Axis:
    """A set of slices that live and die together; one index of it is one coupled group.

    Attributes:
        id: number in the graph; prunable axes come first, in order of use.
        size: number of indices.
        kind: ``head``, ``query``, ``ffn``, ``channel``, ``expert``, ``head_dim``, ``value_dim``, ``rank``, ``state`` or
            ``other``.
        prunable: whether an index may be removed.
        reasons: why not, one sentence each.
        marks: what normalises over the axis, one sentence each; removal changes its denominator.
    """

    id: int
    size: int
    kind: str
    prunable: bool
    reasons: tuple[str, ...]
    marks: tuple[str, ...]
    _graph: Graph = field(repr=False)
    dims: tuple[tuple[int, int], ...] = field(repr=False)
    """(tensor of the tape, its dimension) of each occurrence."""
    starts: tuple[tuple[int, int], ...] = field(repr=False)
    """First position of index 0 in each occurrence, and the distance from one index to the next."""

    @cached_property
    def occurrences(self) -> tuple[Member, ...]:
        """Every place of the axis in a parameter or buffer, in execution order, then by dimension and position."""
        names = self._graph.tape.tensors
        return tuple(
            Member(names[tensor][4], dim, self._graph._core.positions(self.id, number))
            for number, (tensor, dim) in enumerate(self.dims)
        )

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """The occurrences in parameters."""
        return tuple(member for member in self.occurrences if member.parameter in self._graph.parameters)

    @cached_property
    def buffers(self) -> tuple[Member, ...]:
        """The occurrences in buffers (rope tables), which are cut along but carry no score."""
        return tuple(member for member in self.occurrences if member.parameter in self._graph.buffers)

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        """(name, dim) of each occurrence, without building its positions."""
        names = self._graph.tape.tensors
        return tuple((names[tensor][4], dim) for tensor, dim in self.dims)

    @cached_property
    def choice(self) -> str:
        """Whether other indices may go for each index of what lies around the axis; empty where nothing does."""
        return describe(self._graph, self.id)

    def __str__(self) -> str:
        state = "prunable" if self.prunable else "frozen: " + "; ".join(self.reasons)
        marks = f" ({'; '.join(self.marks)})" if self.marks else ""
        return f"axis {self.id} {self.kind}({self.size}) {state}{marks}, {len(self.dims)} members"


@dataclass(frozen=True)
class MarkedOp:
    """An operation that normalises over an axis which loses indices.

    Attributes:
        name: ATen schema name, ``aten::mean``.
        nth: how many operations of that name come before it in the recorded pass.
        arg: which argument is the normalised tensor.
        dim: its normalised dimension.
        kept: int64, positions of that dimension that stay.
        size: the dimension's size before.
        module: path of the module it runs in.
        cuts: of an operation that has no masked form of its own: (argument, dimension, its size, kept positions) of
            every input dimension the removed axes lie in.
        spread: the same for its outputs.
    """

    name: str
    nth: int
    arg: int
    dim: int
    kept: IntArray
    size: int
    module: str
    cuts: tuple[Lost, ...] = ()
    spread: tuple[Lost, ...] = ()


class Graph:
    """The axes of a model and what removing their indices does to its tensors.

    Made by :func:`llmprune.trace`; saved and read back by :meth:`to_json` and :meth:`from_json`.
    """

    def __init__(
        self,
        tape: Tape,
        *,
        fingerprint: str,
        tied: Mapping[str, str] | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        complete: bool = True,
    ) -> None:
        """Build from a tape.

        Args:
            tape: the recorded forward pass.
            fingerprint: identifies the model (:func:`llmprune.checkpoints.record.fingerprint`).
            tied: other name -> canonical name of tied parameters.
            shapes: canonical name -> shape of every parameter; None: those on the tape.
            complete: whether the tape's equations explain every size that is not a number in the model's code. (Those
                of a second form of attention are only the ones that read attributes.)

        Raises:
            TraceError: the tape is malformed.
        """
        self.tape = tape
        self.fingerprint = fingerprint
        self.tied = dict(tied or {})
        self.second: SecondForm | None = None
        self.footprint: Footprint | None = None
        ops = _with_literals(tape) if complete else tape.ops
        self._core = _core.Graph(tape.tensors, ops, tape.outputs, compile_rules(tape))
        self._ids: dict[str, int] = {}
        self.parameters: dict[str, tuple[int, ...]] = {}
        self.buffers: dict[str, tuple[int, ...]] = {}
        for number, (sizes, _kind, _storage, role, name) in enumerate(tape.tensors):
            if role in ("parameter", "buffer") and name:
                self._ids[name] = number
                (self.parameters if role == "parameter" else self.buffers)[name] = tuple(sizes)
        unused = {name: tuple(shape) for name, shape in (shapes or {}).items() if name not in self.parameters}
        self.parameters.update(unused)
        self._unused = sum(int(np.prod(shape, dtype=np.int64)) for shape in unused.values())
        self._frozen_later: dict[int, list[str]] = {}
        self._dims_cache: dict[tuple[int, int], list[int]] = {}
        self._arounds: dict[int, Around | str] = {}
        self.axes: list[Axis] = []
        self._load_axes()
        self._freeze_spent_values()
        if tape.second is not None:
            from llmprune.tracing.second_form import SecondForm

            self.second = SecondForm(
                self,
                Graph(
                    tape.second, fingerprint=fingerprint, tied=tied, shapes=self.parameters, complete=False
                ),
            )

    @classmethod
    def from_tape(cls, tape: Tape, model: nn.Module) -> Graph:
        """The graph of a tape that was recorded from ``model``."""
        canonical: dict[int, str] = {}
        tied: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            first = canonical.setdefault(id(parameter), name)
            if first != name:
                tied[name] = first
            else:
                shapes[name] = tuple(parameter.shape)
        return cls(tape, fingerprint=fingerprint_of(model), tied=tied, shapes=shapes)

    def alongside(self, tape: Tape) -> Graph:
        """The graph of another recording of the same model, for the sizes on it alone."""
        return Graph(
            tape, fingerprint=self.fingerprint, tied=self.tied, shapes=self.parameters, complete=False
        )

    @cached_property
    def layers(self) -> list[LayerAxis]:
        """Stacks of whole blocks that may go (kind ``layer``); their ids continue after those of :attr:`axes`."""
        return find_layers(self.tape, len(self.axes), self.parameters, self.tied)

    @cached_property
    def sublayers(self) -> list[PartAxis]:
        """Attention and feed-forwards that may go alone (kinds ``attention`` and ``feedforward``); ids go on again."""
        return find_parts(self.tape, self.layers, len(self.axes) + len(self.layers), self.tied)

    @property
    def stacks(self) -> list[LayerAxis | PartAxis]:
        """What goes block by block: :attr:`layers`, then :attr:`sublayers`."""
        return [*self.layers, *self.sublayers]

    @property
    def equations(self) -> list[list[Any]]:
        """Recorded size equations ``[tensor, dim, tree, where]`` (:mod:`llmprune.tracing.equations`)."""
        return self.tape.equations

    @property
    def unknown_operations(self) -> dict[str, int]:
        """Operations without a rule, with how often they ran; each froze what it touched and nothing more."""
        counts: dict[str, int] = {}
        for op in self._core.unknown():
            name = self.tape.ops[op][0]
            counts[name] = counts.get(name, 0) + 1
        return counts

    def place(self, op: int) -> str:
        """Which operation it is, for messages."""
        if op < 0:
            return ""
        name, scope = self.tape.ops[op][0], self.tape.scopes[self.tape.ops[op][4]]
        way_out = _PLAIN_WEIGHT if ".parametrizations." in f".{scope}." else ""
        return f" ({name} in {scope or 'the root module'}{way_out})"

    def _reasons(self, axis: int, text: str, op: int) -> list[str]:
        """A reason as the core has it, or as the registered rule that gave it does."""
        if text != DECLARED:
            return [text]
        return frozen_by_rule(self.tape, op, lambda tensor, dim: axis in self.dim_axes(tensor, dim)) or [text]

    def _load_axes(self) -> None:
        for number, (size, kind, prunable, notes, members) in enumerate(self._core.axes()):
            reasons = [
                better + self.place(op)
                for text, op, is_mark in notes
                if not is_mark
                for better in self._reasons(number, text, op)
            ]
            marks = [text + self.place(op) for text, op, is_mark in notes if is_mark]
            dims = tuple((tensor, dim) for tensor, dim, _, _ in members)
            starts = tuple((start, stride) for _, _, start, stride in members)
            self.axes.append(
                Axis(number, size, kind, prunable, tuple(reasons), tuple(marks), self, dims, starts)
            )

    def freeze(self, axis_id: int, reason: str, kind: str = "trial") -> None:
        """Take an axis out of pruning.

        Args:
            axis_id: which.
            reason: one sentence for :attr:`Axis.reasons`.
            kind: ``trial`` (a forward without one index failed), ``value`` (its size is used as a number) or ``fixed``
                (its size is written in the model's code).
        """
        axis = self.axes[axis_id]
        axis.prunable = False
        if reason not in axis.reasons:
            axis.reasons += (reason,)
            self._frozen_later.setdefault(axis_id, []).append(reason)
        self._core.freeze(axis_id, kind)

    def _freeze_spent_values(self) -> None:
        """Axes whose size entered the arithmetic as a number would change values silently (architecture, pitfall 3)."""
        direct: dict[tuple[str, str], list[tuple[int, int]]] = {}
        within: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for tensor, dim, tree, _where in self.tape.equations:
            for leaf in leaves(tree):
                if leaf[0] == "attr":
                    (direct if leaf is tree else within).setdefault((leaf[1], leaf[2]), []).append(
                        (tensor, dim)
                    )
        for tree, where in self.tape.value_used:
            for leaf in leaves(tree):
                key = (leaf[1], leaf[2])
                dims = [key] if leaf[0] == "shape" else direct.get(key) or within.get(key, [])
                for tensor, dim in dims:
                    for axis_id in self.dim_axes(tensor, dim):
                        if self.axes[axis_id].prunable:
                            self.freeze(axis_id, f"its size is used as a number {where}", "value")

    # Sizes

    def _counts(self, removed: Mapping[int, int]) -> IntArray:
        counts = np.zeros(len(self.axes), dtype=np.int64)
        for axis_id, count in removed.items():
            if not 0 <= axis_id < len(self.axes):
                raise PlanError(f"axis {axis_id} does not exist; the graph has {len(self.axes)}")
            if not 0 <= count <= self.axes[axis_id].size:
                raise PlanError(f"axis {axis_id} has {self.axes[axis_id].size} indices; {count} cannot go")
            counts[axis_id] = count
        return counts

    def new_sizes(self, removed: Mapping[int, int], dims: Sequence[tuple[int, int]]) -> list[int]:
        """Sizes of ``(tensor, dim)`` pairs of the tape when axis i loses ``removed[i]`` indices."""
        if not dims:
            return []
        result: list[int] = self._core.new_sizes(
            self._counts(removed), np.asarray(dims, dtype=np.int64)
        ).tolist()
        return result

    def new_shapes(self, removed: Mapping[int, int]) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters and buffers that change."""
        self._counts(removed)
        affected = {
            self._ids[name] for axis_id, n in removed.items() if n for name, _ in self.axes[axis_id].places
        }
        dims = [
            (tensor, dim) for tensor in sorted(affected) for dim in range(len(self.tape.tensors[tensor][0]))
        ]
        sizes: dict[int, list[int]] = {}
        for (tensor, _dim), size in zip(dims, self.new_sizes(removed, dims), strict=True):
            sizes.setdefault(tensor, []).append(size)
        return {self.tape.tensors[tensor][4]: tuple(shape) for tensor, shape in sizes.items()}

    def numel(self, removed: Mapping[int, int], drops: Sequence[Drop | Part] = ()) -> int:
        """Elements of all parameters (tied ones once) when axis i loses ``removed[i]`` indices and blocks go."""
        total = int(self._core.numel(self._counts(removed))) + self._unused
        prefixes = tuple(prefix for drop in drops for prefix in drop.prefixes)
        if not prefixes:
            return total
        cut = self.new_shapes(removed)
        gone = (cut.get(name, shape) for name, shape in self.parameters.items() if name.startswith(prefixes))
        return total - sum(math.prod(shape) for shape in gone)

    def macs(self, removed: Mapping[int, int], drops: Sequence[Drop | Part] = ()) -> int:
        """Multiply-accumulates of the recorded forward pass then (its inputs' batch and length)."""
        prefixes = tuple(prefix for drop in drops for prefix in drop.prefixes)
        if not prefixes:
            return int(self._core.macs(self._counts(removed)))
        each = self.macs_each(removed)
        gone = [f"{scope}.".startswith(prefixes) for scope in self.tape.scopes]
        return int(sum(each[number] for number, op in enumerate(self.tape.ops) if not gone[op[4]]))

    def macs_each(self, removed: Mapping[int, int]) -> IntArray:
        """The same for each operation on the tape."""
        counts: IntArray = self._core.macs_each(self._counts(removed))
        return counts

    def tensor_of(self, name: str) -> int:
        """The number on the tape of a parameter or buffer, by its canonical name."""
        return self._ids[name]

    def dim_axes(self, tensor: int, dim: int) -> list[int]:
        """Ids of the axes in a dimension of a tensor on the tape."""
        key = (tensor, dim)
        if key not in self._dims_cache:
            self._dims_cache[key] = self._core.dim_axes(tensor, dim)
        return self._dims_cache[key]

    # Positions

    def kept(self, removed: Removed) -> dict[str, dict[int, IntArray]]:
        """Positions that stay, for each dimension of a parameter or buffer that changes.

        Args:
            removed: axis id -> indices that go: a flat list; or, for an axis with something around it
                (:meth:`around`), an array (size around it, k) with k indices to go for each index around it.

        Returns:
            Name -> dimension -> int64, sorted positions; or, where slices along dimension 0 keep different ones, a row
            of them for each slice that stays.

        Raises:
            PlanError: an index does not exist, or a ragged choice does not fit.
        """
        return kept_positions(self, removed)

    def around(self, axis_id: int) -> Around:
        """What an axis lies in and may be cut apart for each index of: key-value heads of query heads, experts.

        Raises:
            PlanError: there is nothing such; the message says why.
        """
        if axis_id not in self._arounds:
            try:
                self._arounds[axis_id] = find_around(self, axis_id)
            except PlanError as error:
                self._arounds[axis_id] = str(error)
        found = self._arounds[axis_id]
        if isinstance(found, str):
            raise PlanError(found)
        return found

    def dim_atoms(self, tensor: int, dim: int) -> list[int]:
        """The atoms in a dimension of a tensor on the tape, axes or not, outer to inner, as often as they occur."""
        atoms: list[int] = self._core.dim_atoms(tensor, dim)
        return atoms

    @cached_property
    def atoms(self) -> list[int]:
        """The atom of each axis."""
        atoms: list[int] = self._core.atoms()
        return atoms

    @cached_property
    def axis_of_atom(self) -> dict[int, int]:
        """Atom -> axis; other atoms occur in no parameter."""
        return {atom: axis for axis, atom in enumerate(self.atoms)}

    @cached_property
    def ops_with(self) -> dict[int, list[int]]:
        """Axis -> the operations, in order, with a tensor it occurs in; only axes in no dimension 0 of a parameter."""
        inside: dict[int, list[int]] = {axis.id: [] for axis in self.axes if all(dim for _, dim in axis.dims)}
        holding: dict[int, set[int]] = {-1: set()}

        def held(tensor: int) -> set[int]:
            if tensor not in holding:
                dims = range(len(self.tape.tensors[tensor][0]))
                holding[tensor] = {i for dim in dims for i in self.dim_axes(tensor, dim) if i in inside}
            return holding[tensor]

        for number, (_name, _flags, code, outputs, _scope) in enumerate(self.tape.ops):
            given = [v for tag, value in arguments(code) if tag in (TENSOR, TENSORS) for v in value]
            for axis_id in set().union(*map(held, (*given, *outputs))):
                inside[axis_id].append(number)
        return inside

    @cached_property
    def _numbers(self) -> dict[tuple[str, int], int]:
        """(name, how many of that name come before) -> the operation's place on the tape."""
        nth: dict[str, int] = {}
        numbers = {}
        for number, op in enumerate(self.tape.ops):
            numbers[op[0], nth.get(op[0], 0)] = number
            nth[op[0]] = nth.get(op[0], 0) + 1
        return numbers

    def numbered(self, name: str, nth: int) -> int:
        """The place on the tape of the ``nth`` operation (from 0) called ``name``."""
        return self._numbers[name, nth]

    @cached_property
    def choices(self) -> list[tuple[int, int, int, str]]:
        """``(tensor, dim, k, place)`` of every choice of the k best along a dimension: that many have to stay."""
        found = []
        for number, (name, _flags, code, _outputs, _scope) in enumerate(self.tape.ops):
            if name != "aten::topk":
                continue
            (_, (tensor,)), (_, (k,)), *rest = arguments(code)
            dim = rest[0][1][0] if rest and rest[0][1] else -1
            sizes = self.tape.tensors[tensor][0]
            if sizes and k < sizes[dim]:
                found.append((tensor, dim % len(sizes), k, self.place(number)))
        return found

    def least(self, axis_id: int) -> int:
        """How many indices of an axis have to stay, the others whole: as many as a router chooses experts, or one."""
        least = 1
        for tensor, dim, k, _ in self.choices:
            if axis_id in self.dim_axes(tensor, dim):
                around = self.tape.tensors[tensor][0][dim] // self.axes[axis_id].size
                least = max(least, -(-k // around))
        return least

    def check_choices(self, removed: Mapping[int, int]) -> None:
        """Raise PlanError where fewer positions would be left than are chosen from them."""
        for tensor, dim, k, place in self.choices:
            left = self.new_sizes(removed, [(tensor, dim)])[0]
            if left < k:
                raise PlanError(
                    f"{k} are chosen from a dimension that would keep {left}{place}: remove fewer"
                )

    def marked_ops(self, removed: Removed) -> list[MarkedOp]:
        """Operations that normalise over a dimension that loses positions."""
        flat = {i: np.unique(np.asarray(v, dtype=np.int64)) for i, v in removed.items() if np.size(v)}
        order = {number: nth for (_name, nth), number in self._numbers.items()}
        found = []
        for number, tensor, dim in self._core.marked():
            touched = {i: flat[i] for i in self.dim_axes(tensor, dim) if i in flat}
            if not touched:
                continue
            ragged = [i for i in touched if np.ndim(removed[i]) == 2]
            if ragged:
                raise PlanError(
                    f"axis {ragged[0]} is normalised over, so every outer index must lose the same indices"
                )
            size = self.tape.tensors[tensor][0][dim]
            away = self._core.removed_positions(tensor, dim, size, touched)
            name, _flags, code, outputs, scope = self.tape.ops[number]
            place = next(
                i for i, (tag, value) in enumerate(arguments(code)) if tag == TENSOR and value[0] == tensor
            )
            kept = np.flatnonzero(~away).astype(np.int64)
            cuts: tuple[Lost, ...] = ()
            spread: tuple[Lost, ...] = ()
            if not has_masked_form(name):
                given = [
                    (i, value[0]) for i, (tag, value) in enumerate(arguments(code)) if tag == TENSOR and value
                ]
                cuts = self._lost(given, flat)
                spread = self._lost(list(enumerate(outputs)), flat)
            found.append(
                MarkedOp(name, order[number], place, dim, kept, size, self.tape.scopes[scope], cuts, spread)
            )
        return found

    def _lost(self, tensors: Sequence[tuple[int, int]], removed: Mapping[int, IntArray]) -> tuple[Lost, ...]:
        """What tensors, given as (place, id), lose."""
        lost = []
        for place, tensor in tensors:
            if tensor < 0:
                continue
            for dim, size in enumerate(self.tape.tensors[tensor][0]):
                touched = {i: removed[i] for i in self.dim_axes(tensor, dim) if i in removed}
                if touched:
                    away = self._core.removed_positions(tensor, dim, size, touched)
                    lost.append((place, dim, size, tuple(np.flatnonzero(~away).tolist())))
        return tuple(lost)

    # Explanation

    def explain(self, parameter: str, dim: int, index: int) -> Explanation:
        """The groups that one position belongs to, and the chain of rules that ties it to each other member.

        This is the paper's trigger-and-traverse (Ma et al. 2023, section 3.1), read off the proofs that the core keeps.

        Args:
            parameter: name of a parameter or buffer.
            dim: its dimension.
            index: position along that dimension.

        Raises:
            InputError: no such parameter, dimension or position.
        """
        name = self.tied.get(parameter, parameter)
        shape = self.parameters.get(name, self.buffers.get(name))
        if shape is None:
            raise InputError(f"the model has no parameter {parameter!r}")
        if not 0 <= dim < len(shape) or not 0 <= index < shape[dim]:
            raise InputError(
                f"{parameter} has shape {shape}: dimension {dim}, position {index} is outside it"
            )
        axes, chains = [], []
        for axis in self.axes:
            for source, place in enumerate(axis.places):
                if place != (name, dim):
                    continue
                rows = np.flatnonzero((axis.occurrences[source].positions == index).any(axis=1))
                if rows.size == 0:
                    continue
                axes.append(axis)
                chains += [
                    self._chain(axis, int(rows[0]), source, other)
                    for other in range(len(axis.places))
                    if other != source
                ]
        return Explanation(parameter, dim, index, tuple(axes), tuple(chains))

    def _chain(self, axis: Axis, row: int, source: int, target: int) -> Chain:
        """Why index ``row`` takes along its positions in occurrence ``target``, beginning at ``source``."""

        def label(pair: tuple[int, int] | None) -> str:
            return "" if pair is None else f"{self.tape.tensors[pair[0]][4]}[dim {pair[1]}]"

        steps = []
        for rule, op, begin, end in self._core.explain(axis.id, source, target):
            name, module = (
                (self.tape.ops[op][0], self.tape.scopes[self.tape.ops[op][4]]) if op >= 0 else ("", "")
            )
            steps.append(Step(rule, label(begin), label(end), name, module))
        member = axis.occurrences[target]
        positions = tuple(int(position) for position in member.positions[row])
        return Chain(axis.id, axis.kind, row, member.parameter, member.dim, positions, tuple(steps))

    # Output

    def __str__(self) -> str:
        kinds: dict[str, list[Axis]] = {}
        for axis in self.axes:
            if axis.prunable:
                kinds.setdefault(axis.kind, []).append(axis)
        lines = [f"{self.tape.model}: {self.numel({}):,} parameters, {len(self.tape.ops)} operations"]
        for kind, axes in sorted(kinds.items()):
            sizes = sorted({axis.size for axis in axes})
            lines.append(f"  {kind:10s} {len(axes):4d} axes of size {', '.join(map(str, sizes))}")
        for stack in self.stacks:
            if stack.prunable:
                lines.append(
                    f"  {stack.kind:10s} {stack.size - len(stack.pinned):4d} of {stack.size} in {stack.module}"
                )
        lines.append(f"  {'frozen':10s} {sum(not axis.prunable for axis in self.axes):4d} axes")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The graph as a JSON object; :meth:`from_json` reads it back."""
        return {
            "format": _FORMAT,
            "tape": self.tape.to_json(),
            "fingerprint": self.fingerprint,
            "tied": self.tied,
            "shapes": {name: list(shape) for name, shape in self.parameters.items()},
            "frozen": {str(axis_id): reasons for axis_id, reasons in self._frozen_later.items()},
            "footprint": None if self.footprint is None else self.footprint.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Graph:
        """The inverse of :meth:`to_json`.

        Raises:
            InputError: the data is not a graph, of another format, or damaged.
            TraceError: its tape describes no forward pass.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise InputError(f"this is not a graph of format {_FORMAT}; trace the model again")
        try:
            graph = cls(
                Tape.from_json(data["tape"]),
                fingerprint=data["fingerprint"],
                tied=data["tied"],
                shapes=data["shapes"],
            )
            if data.get("footprint") is not None:
                from llmprune.planning.footprint import Footprint

                graph.footprint = Footprint.from_json(data["footprint"])
            for axis_id, reasons in data["frozen"].items():
                for reason in reasons:
                    graph.freeze(int(axis_id), reason)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"this graph is damaged ({error!r}); trace the model again") from error
        return graph


def _with_literals(tape: Tape) -> list[list[Any]]:
    """The operations, with the cuts and groupings flagged that no equation explains: numbers in the model's code."""
    explained = {(tensor, dim) for tensor, dim, _tree, _where in tape.equations}
    ops = []
    for op in tape.ops:
        name, flags, code, outputs, scope = op
        if name in _CUTS:
            place = _CUTS[name]
            given = arguments(code)[place][1]
            ndim = len(tape.tensors[outputs[0]][0])
            dim = (given[0] if given else 0) % max(ndim, 1)
            if not any((tensor, dim) in explained for tensor in outputs):
                op = [name, flags | LITERAL, code, outputs, scope]
        elif name in _GROUPINGS and (outputs[0], 1) not in explained:
            op = [name, flags | LITERAL, code, outputs, scope]
        ops.append(op)
    return ops


_CUTS = {"aten::slice": 1, "aten::split": 2, "aten::split_with_sizes": 2, "aten::chunk": 2}
"""Operations that cut a dimension, with the place of the dimension among their arguments."""

_GROUPINGS = ("aten::native_group_norm", "aten::group_norm")
"""Operations that divide dimension 1 into a number of groups."""
