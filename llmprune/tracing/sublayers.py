"""Attention or the feed-forward alone as something to prune: the branches of the blocks of a stack.

A branch may go if one direct child of its block computes it whole, from the stream to what is added to the stream, and
nothing else that the child makes is used. All of this is read off the tape, as for whole blocks
(:mod:`llmprune.tracing.layers`). In the child's place comes a module without parameters that returns zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmprune.checkpoints.modeling_llmprune import Nothing
from llmprune.errors import PlanError
from llmprune.tracing.layers import Drop, LayerAxis, Pinned, Slot, View, joins, mixes
from llmprune.tracing.tape import MUTATES

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmprune.tracing.tape import Tape

PARTS = ("attention", "feedforward")
"""Kinds of branches. ``attention`` multiplies activations with one another, ``feedforward`` with weights only."""

HELD = "it is the first of its kind, off which the length of a cache is read"
"""Why attention has to stay where it is the first."""

# What makes nothing but zeros of a first operand that is zero, whatever the others are.
_VIEWS = ("view", "_unsafe_view", "reshape", "transpose", "permute", "t", "contiguous", "clone", "_to_copy", "to",
          "slice", "select", "unsqueeze", "squeeze", "expand", "alias", "detach")  # fmt: skip
_ODD = ("dropout", "native_dropout", "neg", "div", "div_", "pow", "mean", "sum", "square", "abs", "rms_norm",
        "_fused_rms_norm")  # fmt: skip
_ZERO_STAYS = frozenset(f"aten::{name}" for name in (*_VIEWS, *_ODD))
_EITHER_ZERO = frozenset({"aten::mul", "aten::mul_"})
_PRODUCTS = ("matmul", "bmm", "addbmm", "einsum", "attention")


@dataclass(frozen=True)
class Part:
    """A branch of a block that goes, as the module that computes it.

    Attributes:
        path: path of the module.
        kind: ``attention`` or ``feedforward``.
        input: which of its arguments has the shape of what it adds (place or keyword).
        output: which entry of its result is added; None: the result itself.
        entries: how many entries its result has; None: it is a tensor.
    """

    path: str
    kind: str
    input: Slot
    output: int | None
    entries: int | None

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The beginning of all names below it."""
        return (f"{self.path}.",)


@dataclass(frozen=True)
class Meeting:
    """Where a branch joins the stream, for its score.

    Attributes:
        module: path of a module that gets the stream as it is before.
        input: which argument that is.
        added: path of the module whose result is added.
        output: which entry of it.
    """

    module: str
    input: Slot
    added: str
    output: Slot | None


@dataclass(eq=False)
class PartAxis(Pinned):
    """The branches of one kind of a stack; one index is the branch of one block.

    Attributes:
        id: number in the graph, after those of its stacks.
        size: number of blocks.
        module: path of the list of blocks.
        kind: ``attention`` or ``feedforward``.
        pinned: position -> why that branch has to stay.
        parts: position -> the branch.
        meetings: position -> where it joins the stream.
        given: position -> the masks and tables that it gets from outside of the blocks, as tensors on the tape.
        marks: nothing normalises over branches.
    """

    id: int
    size: int
    module: str
    kind: str
    pinned: dict[int, str]
    parts: dict[int, Part]
    meetings: dict[int, Meeting]
    given: dict[int, frozenset[int]]
    marks: tuple[str, ...] = field(default=(), repr=False)

    @property
    def groups(self) -> int:
        """How many branches there are."""
        return len(self.parts)

    def held(self, gone: Iterable[int] = ()) -> set[int]:
        """Positions that have to stay once blocks are gone: where caches are read, the first of each kind of mask."""
        if self.kind != "attention":
            return set()
        first: dict[frozenset[int], int] = {}
        for position in sorted(set(self.parts) - set(gone)):
            first.setdefault(self.given[position], position)
        return set(first.values())

    def drops(self, removed: Iterable[int]) -> list[Part]:
        """The removal of some branches."""
        return [self.parts[position] for position in removed]

    def prefix(self, position: int) -> str:
        """The beginning of all names below one branch; one that is no name where there is none."""
        return f"{self.parts[position].path}." if position in self.parts else "\0"

    def __str__(self) -> str:
        state = "prunable" if self.prunable else "frozen"
        return "; ".join([f"axis {self.id} {self.kind}({self.size}) {state}, {self.module}", *self.reasons])


def find_parts(
    tape: Tape, stacks: Sequence[LayerAxis], first_id: int, tied: Mapping[str, str]
) -> list[PartAxis]:
    """The branches of the blocks of ``stacks``: an axis for each stack and kind that has any.

    Args:
        tape: the recorded model.
        stacks: its stacks of blocks.
        first_id: the id of the first axis.
        tied: other name -> canonical name of tied parameters.
    """
    found: list[PartAxis] = []
    if not stacks:
        return found
    view = View(tape)
    calls: dict[str, list[list[Any]]] = {}
    for call in tape.calls:
        calls.setdefault(tape.scopes[call[0]], []).append(call)
    below: dict[str, list[int]] = {}  # path -> the operations in it
    for number, op in enumerate(tape.ops):
        parts = tape.scopes[op[4]].split(".")
        for end in range(1, len(parts) + 1):
            below.setdefault(".".join(parts[:end]), []).append(number)
    readers: dict[int, list[int]] = {}
    for number, tids in enumerate(view.reads):
        for tid in tids:
            readers.setdefault(tid, []).append(number)
    for stack in stacks:
        blocks = [_Block(view, stack, i, calls, below, readers) for i in range(stack.size)]
        for kind in PARTS:
            axis = PartAxis(first_id + len(found), stack.size, stack.module, kind, {}, {}, {}, {})
            _fill(axis, blocks, tied)
            if axis.parts:
                found.append(axis)
    return found


def _fill(axis: PartAxis, blocks: Sequence[_Block], tied: Mapping[str, str]) -> None:
    for position, block in enumerate(blocks):
        parts = [branch for branch in block.branches if branch[0].kind == axis.kind]
        if len(parts) != 1:
            some = "no" if not parts else "more than one"
            axis.pinned[position] = f"{some} direct child of it computes a whole branch of that kind"
            continue
        part, meeting, given = parts[0]
        axis.parts[position], axis.meetings[position], axis.given[position] = part, meeting, given
        (start,) = part.prefixes
        for other, name in tied.items():
            if other.startswith(start) != name.startswith(start):
                axis.pinned[position] = f"it shares {other if other.startswith(start) else name}"
    axis.pinned |= dict.fromkeys(axis.held(), HELD)


class _Block:
    """The branches of one block."""

    def __init__(
        self,
        view: View,
        stack: LayerAxis,
        position: int,
        calls: Mapping[str, list[list[Any]]],
        below: Mapping[str, list[int]],
        readers: Mapping[int, list[int]],
    ) -> None:
        self.view, self.tape, self.readers = view, view.tape, readers
        self.branches: list[tuple[Part, Meeting, frozenset[int]]] = []
        path = f"{stack.module}.{position}"
        runs = calls.get(path, [])
        if len(runs) != 1:
            return
        into = next((tid for slot, tid in runs[0][1] if slot == stack.input), -1)
        out = next((tid for slot, tid in runs[0][2] if slot == stack.output), -1)
        if into < 0 or out < 0:
            return
        self.ops, self.path = below.get(path, []), path
        children = {
            name: runs
            for name, runs in calls.items()
            if name.startswith(path + ".") and "." not in name[len(path) + 1 :]
        }
        self.inputs = {
            tid: (name, slot) for name, (run, *_) in reversed(children.items()) for slot, tid in run[1]
        }
        self.inputs[into] = path, stack.input
        self.results = {tid: (name, slot) for name, (run, *_) in children.items() for slot, tid in run[2]}
        for name, runs in children.items():
            if len(runs) == 1 and below.get(name):
                self._try(name, runs[0], below[name], into, out)

    def _try(self, name: str, call: list[Any], ops: Sequence[int], into: int, out: int) -> None:
        tensors, inside = self.tape.tensors, set(ops)
        made = {tid for number in ops for tid in self.tape.ops[number][3] if tid >= 0}
        used = {
            tid
            for tid in made
            if any(self.view.live[n] and n not in inside for n in self.readers.get(tid, ()))
        }
        if len(used) != 1 or used & set(self.tape.outputs):
            return
        (main,) = used
        slot = next((slot for slot, tid in call[2] if tid == main), "")
        if isinstance(slot, str) or tensors[main][1] != "f":
            return
        written = {
            tensors[tid][2] for n in ops if self.tape.ops[n][1] & MUTATES for tid in self.tape.ops[n][3]
        }
        if any(tid not in made for storage in written for tid in self.view.holders.get(storage, ())):
            return
        like = [s for s, tid in call[1] if tid >= 0 and tensors[tid][:2] == tensors[main][:2]]
        if not like or not any(mixes(self.tape.ops[n][0]) for n in ops):
            return
        met = self._joins(main, inside, into, out)
        if met is None:
            return
        stream, added = met
        kind, given = self._kind(ops)
        module, argument = self.inputs.get(stream, (self.path, self.inputs[into][1]))
        last, entry = self.results.get(added, (name, slot))
        part = Part(name, kind, like[0], slot, None if slot is None else len(call[2]))
        self.branches.append((part, Meeting(module, argument, last, entry), given))

    def _joins(self, main: int, inside: set[int], into: int, out: int) -> tuple[int, int] | None:
        """The stream and what is added to it, if zeros for ``main`` change nothing but that; else None.

        Follows the stream (which nothing mixes), what is zero, and sums in which zeros took part already.
        """
        walk = _Walk(self.tape, self.tape.tensors[main][0], into)
        for number in self.ops:
            name, _, _, outputs, _ = self.tape.ops[number]
            reads = self.view.reads[number]
            if number in inside:  # what the child gets must come from the stream by norms alone
                if any(tid in walk.mixed for tid in reads):
                    return None
                if main in outputs:
                    walk.zero.add(main)
            elif self.view.live[number] and not walk.follow(name, reads, outputs):
                return None
        return walk.found if out in walk.clean else None

    def _kind(self, ops: Sequence[int]) -> tuple[str, frozenset[int]]:
        """The kind of a branch, and what it reads that no block made: masks, rotary tables."""
        tape = self.tape
        active: set[int] = set()
        made: set[int] = set()
        given: set[int] = set()
        kind = "feedforward"
        block = self._made_here()
        for number in ops:
            name, _, _, outputs, _ = tape.ops[number]
            floats = [tid for tid in self.view.reads[number] if tape.tensors[tid][1] == "f"]
            outer = [
                tid for tid in self.view.reads[number] if tid not in made and tape.tensors[tid][3] == "value"
            ]
            given.update(tid for tid in outer if tid not in block)
            active.update(tid for tid in outer if tape.tensors[tid][1] == "f")  # an encoder's output too
            hot = [tid for tid in floats if tid in active]
            if len(hot) > 1 and any(part in name for part in _PRODUCTS):
                kind = "attention"
            made.update(outputs)
            if hot:
                active.update(outputs)
        return kind, frozenset(given)

    def _made_here(self) -> set[int]:
        return {tid for number in self.ops for tid in self.tape.ops[number][3]}


# In a model


class _Walk:
    """What becomes of a block's stream where a branch gives zeros.

    Args:
        tape: the tape.
        shape: shape of the branch.
        into: the stream before the block.

    Attributes:
        clean: the stream, which nothing mixes.
        zero: what is zero.
        partly: sums in which zeros took part, not with the stream.
        mixed: what was mixed from the stream.
        found: what is added to what where the branch joins.
    """

    def __init__(self, tape: Tape, shape: Sequence[int], into: int) -> None:
        self._tape = tape
        self._shape = shape
        self._into = into
        self.clean, self.zero, self.partly, self.mixed = {into}, set[int](), set[int](), set[int]()
        self.found: tuple[int, int] | None = None

    def follow(self, name: str, reads: Sequence[int], outputs: Sequence[int]) -> bool:
        """Take one operation in; whether the branch's zeros still change nothing but the sum."""
        if any(tid in self.zero for tid in reads):
            return self._follow_zero(name, reads, outputs)
        from_clean = any(tid in self.clean for tid in reads)
        if any(tid in self.partly for tid in reads):
            if joins(name) and from_clean:
                self.clean.update(outputs)
            elif name in _ZERO_STAYS or joins(name):
                self.partly.update(outputs)
            else:
                return False
        elif any(tid in self.mixed for tid in reads) or (mixes(name) and from_clean):
            if joins(name) and from_clean:
                self.clean.update(outputs)  # another branch joins
                self.mixed.difference_update(outputs)
            else:
                self.clean.difference_update(outputs)
                self.mixed.update(outputs)
        elif from_clean:
            self.clean.update(outputs)
        return True

    def _follow_zero(self, name: str, reads: Sequence[int], outputs: Sequence[int]) -> bool:
        touched = [tid for tid in reads if tid in self.zero]
        others = [tid for tid in reads if tid not in self.zero]
        subtracted = name.startswith("aten::sub") and reads[0] in self.zero
        stays = name in _EITHER_ZERO or (name in _ZERO_STAYS and reads[0] in self.zero)
        self.zero.difference_update(outputs)
        if (
            joins(name)
            and len(touched) == len(others) == 1
            and self._tape.tensors[others[0]][0] == self._shape
        ):
            if subtracted:
                return False
            if others[0] in self.clean:
                self.found = others[0], touched[0]
                self.clean.update(outputs)
            else:
                self.partly.update(outputs)
                self.found = self.found or (self._into, touched[0])
        elif stays:
            self.zero.update(outputs)
        else:  # the scale of a norm: any finite number, by which zero is multiplied
            return name in ("aten::add", "aten::rsqrt", "aten::sqrt", "aten::reciprocal") and not others
        return True


def check_parts(model: nn.Module, parts: Iterable[Part]) -> None:
    """Raise PlanError unless every branch is there, and nowhere else."""
    places = list(model.named_modules(remove_duplicate=False))
    for part in parts:
        try:
            module = model.get_submodule(part.path)
        except AttributeError as error:
            raise PlanError(
                f"the plan drops {part.path}, which this {type(model).__name__} does not have"
            ) from error
        if isinstance(module, Nothing):
            raise PlanError(f"{part.path} is gone already")
        own = {id(m) for m in module.modules()}
        for path, other in places:
            if id(other) in own and path != part.path and not path.startswith(part.path + "."):
                raise PlanError(f"{part.path} cannot go: a part of it is also {path}")


@contextmanager
def silenced(
    model: nn.Module, parts: Iterable[Part], join: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Iterator[None]:
    """Inside the block, branches that go add nothing: what they make is multiplied by zero.

    Args:
        model: the model, with all its branches.
        parts: those that go.
        join: makes what is handed on of what the branch made; None: zero times that.
    """
    handles = []
    try:
        for part in parts:
            hook = partial(_silence, part, join)
            handles.append(model.get_submodule(part.path).register_forward_hook(hook, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _silence(
    part: Part,
    join: Callable[[torch.Tensor], torch.Tensor] | None,
    _module: nn.Module,
    _args: Any,
    result: Any,
) -> Any:
    out = result if part.output is None else result[part.output]
    changed = out * 0 if join is None else join(out)
    if part.output is None:
        return changed
    return tuple(changed if place == part.output else item for place, item in enumerate(result))


def split(drops: Iterable[Drop | Part]) -> tuple[list[Drop], list[Part]]:
    """Blocks that go, and the branches that go from blocks that stay."""
    blocks, parts = [], []
    for drop in drops:
        if isinstance(drop, Drop):
            blocks.append(drop)
        else:
            parts.append(drop)
    gone = tuple(prefix for drop in blocks for prefix in drop.prefixes)
    return blocks, [part for part in parts if not (gone and part.path.startswith(gone))]
