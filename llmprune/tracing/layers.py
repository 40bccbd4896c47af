"""Whole blocks as something to prune: the stacks of blocks that a recorded model repeats along a residual stream.

A block may go if the model without it is still a model: it maps one tensor, the stream, to another of the same shape,
the stream passes around what the block computes and is added to it, and nothing else that the block makes is used
elsewhere. All of this is read off the tape; a block that fails says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llmprune.tracing.tape import MUTATES, TENSOR, TENSORS, Tape, arguments

Indices = npt.NDArray[np.int64]
Slot = int | str

# Operations that mix positions or channels by weights: what they make is no longer the stream itself.
_MIXING = ("mm", "linear", "matmul", "conv", "attention", "lstm", "gru", "embedding", "scan")
_JOINING = frozenset({"aten::add", "aten::add_", "aten::sub", "aten::sub_"})


@dataclass(frozen=True, eq=False)
class Drop:
    """Blocks that leave one stack.

    Attributes:
        module: path of the list of blocks.
        size: its length before.
        removed: sorted positions that go.
        input: which argument of a block is the stream (place or keyword).
        output: which entry of its result is the stream; None: the result itself.
    """

    module: str
    size: int
    removed: Indices
    input: Slot
    output: Slot | None

    @property
    def kept(self) -> list[int]:
        """The positions that stay."""
        gone = set(self.removed.tolist())
        return [i for i in range(self.size) if i not in gone]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The beginnings of all names below the blocks that go."""
        return tuple(f"{self.module}.{i}." for i in self.removed.tolist())


class Pinned:
    """What has a reason for each block that has to stay."""

    size: int
    pinned: dict[int, str]

    @property
    def prunable(self) -> bool:
        """Whether any block may go."""
        return len(self.pinned) < self.size

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why blocks have to stay, each reason once with the positions it holds for."""
        texts: dict[str, list[int]] = {}
        for position, reason in sorted(self.pinned.items()):
            texts.setdefault(reason, []).append(position)
        return tuple(f"block {', '.join(map(str, places))}: {text}" for text, places in texts.items())


@dataclass(eq=False)
class LayerAxis(Pinned):
    """A stack of blocks; one index of it is one block.

    Attributes:
        id: number in the graph, after those of its axes.
        size: number of blocks.
        module: path of the list of blocks.
        pinned: position -> why that block has to stay.
        input: which argument of a block is the stream (place or keyword).
        output: which entry of its result is the stream; None: the result itself.
        kind: ``layer``.
        marks: nothing normalises over layers.
    """

    id: int
    size: int
    module: str
    pinned: dict[int, str]
    input: Slot
    output: Slot | None
    kind: str = "layer"
    marks: tuple[str, ...] = field(default=(), repr=False)

    def drop(self, removed: Iterable[int]) -> Drop:
        """The removal of some of its blocks."""
        gone = np.array(sorted(removed), dtype=np.int64)
        return Drop(self.module, self.size, gone, self.input, self.output)

    @property
    def groups(self) -> int:
        """How many blocks there are."""
        return self.size

    def drops(self, removed: Iterable[int]) -> list[Drop]:
        """The removal of some of its blocks, as a list."""
        return [self.drop(removed)]

    def prefix(self, position: int) -> str:
        """The beginning of all names below one block."""
        return f"{self.module}.{position}."

    def __str__(self) -> str:
        state = "prunable" if self.prunable else "frozen"
        return "; ".join([f"axis {self.id} layer({self.size}) {state}, {self.module}", *self.reasons])


def renamed(name: str, drops: Iterable[Drop]) -> str | None:
    """What a module or tensor below a stack is called once blocks are gone; None if it is gone itself."""
    for drop in drops:
        if name.startswith(drop.module + "."):
            number, dot, rest = name[len(drop.module) + 1 :].partition(".")
            if number.isdecimal():
                if int(number) not in drop.kept:
                    return None
                name = f"{drop.module}.{drop.kept.index(int(number))}{dot}{rest}"
    return name


def find_layers(
    tape: Tape, first_id: int, parameters: Iterable[str], tied: Mapping[str, str]
) -> list[LayerAxis]:
    """The stacks from which blocks may go, in the order of their paths' first run; stacks inside a block left out.

    Args:
        tape: the recorded model.
        first_id: the id of the first of them.
        parameters: canonical names of the model's parameters.
        tied: other name -> canonical name.
    """
    lists: dict[str, dict[int, list[list[Any]]]] = {}
    for call in tape.calls:
        path, _, number = tape.scopes[call[0]].rpartition(".")
        if number.isdecimal():
            lists.setdefault(path, {}).setdefault(int(number), []).append(call)
    names = list(parameters)
    found: list[LayerAxis] = []
    view = View(tape) if lists else None
    for path in sorted(lists, key=lambda path: path.count(".")):
        size = 1 + max((int(part) for name in names if (part := _member(name, path)) is not None), default=-1)
        inside = any(path.startswith(axis.module + ".") for axis in found)
        if view is None or size < 2 or inside:
            continue
        axis = _Stack(view, path, size, lists[path], names, tied).axis()
        if axis is not None:
            found.append(axis)
    order = {path: place for place, path in enumerate(lists)}
    found.sort(key=lambda axis: order[axis.module])
    for number, axis in enumerate(found):
        axis.id = first_id + number
    return found


def mixes(name: str) -> bool:
    """Whether what an operation makes is no longer the stream itself."""
    short = name.partition("::")[2]
    return any(part in short for part in _MIXING)


def joins(name: str) -> bool:
    """Whether an operation adds two tensors."""
    return name in _JOINING


def _member(name: str, path: str) -> str | None:
    """The number of the member of the list at ``path`` that ``name`` lies in."""
    if not name.startswith(path + "."):
        return None
    number = name[len(path) + 1 :].partition(".")[0]
    return number if number.isdecimal() else None


class View:
    """What every stack asks of a tape: what each operation reads, and whether an output depends on it."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.reads = [
            [
                tid
                for tag, payload in arguments(op[2])
                if tag in (TENSOR, TENSORS)
                for tid in payload
                if tid >= 0
            ]
            for op in tape.ops
        ]
        live = {tape.tensors[tid][2] for tid in tape.outputs}
        self.holders: dict[int, list[int]] = {}  # storage -> the tensors in it
        for tid, tensor in enumerate(tape.tensors):
            self.holders.setdefault(tensor[2], []).append(tid)
        self.live = [False] * len(tape.ops)
        for number in range(len(tape.ops) - 1, -1, -1):
            if any(tid >= 0 and tape.tensors[tid][2] in live for tid in tape.ops[number][3]):
                self.live[number] = True
                live.update(tape.tensors[tid][2] for tid in self.reads[number])


class _Stack:
    """One list of blocks and what the tape says of them."""

    def __init__(
        self,
        view: View,
        path: str,
        size: int,
        calls: Mapping[int, list[list[Any]]],
        names: Sequence[str],
        tied: Mapping[str, str],
    ) -> None:
        self.view, self.tape = view, view.tape
        self.path, self.size, self.calls = path, size, calls
        self.pinned: dict[int, str] = {}
        block_of = [self._block(scope) for scope in self.tape.scopes]
        self.owner = [block_of[op[4]] for op in self.tape.ops]
        self.ops: list[list[int]] = [[] for _ in range(size)]
        for number, block in enumerate(self.owner):
            if block is not None:
                self.ops[block].append(number)
        self._pin_ties(names, tied)

    def _block(self, scope: str) -> int | None:
        number = _member(scope, self.path)
        return int(number) if number is not None and int(number) < self.size else None

    def _pin(self, block: int, reason: str) -> None:
        self.pinned.setdefault(block, reason)

    def _pin_ties(self, names: Sequence[str], tied: Mapping[str, str]) -> None:
        for other, name in tied.items():
            blocks = {_member(other, self.path), _member(name, self.path)}
            if len(blocks) > 1:
                for block in blocks - {None}:
                    self._pin(int(str(block)), f"it shares {other if _member(other, self.path) else name}")

    def axis(self) -> LayerAxis | None:
        """The stack as an axis; None if its members are no blocks of a residual stream."""
        for block in range(self.size):
            runs = len(self.calls.get(block, ()))
            if runs != 1:
                self._pin(block, "it did not run" if not runs else f"it runs {runs} times in a forward pass")
        slots = self._slots()
        if slots is None:
            return None
        source, target = slots
        outs: dict[int, int] = {}
        for block in range(self.size):
            pair = self._pair(block, source, target)
            if pair is None:
                self._pin(block, "no tensor of the same shape goes in and comes out")
                continue
            outs[block] = pair[1]
            if not self._residual(block, *pair):
                self._pin(block, "its result is not added to a stream that passes around it")
        self._pin_uses(outs)
        self._pin_gaps(source, outs)
        return LayerAxis(-1, self.size, self.path, self.pinned, source, target)

    # The stream

    def _pair(self, block: int, source: Slot, target: Slot | None) -> tuple[int, int] | None:
        """The stream's tensors into and out of a block, where they are of one shape and floating."""
        if len(self.calls.get(block, ())) != 1:
            return None
        _, inputs, outputs = self.calls[block][0]
        into = next((tid for slot, tid in inputs if slot == source), -1)
        out = next((tid for slot, tid in outputs if slot == target), -1)
        if into < 0 or out < 0 or into == out:
            return None
        a, b = self.tape.tensors[into], self.tape.tensors[out]
        return (into, out) if a[0] == b[0] and a[1] == b[1] == "f" else None

    def _slots(self) -> tuple[Slot, Slot | None] | None:
        """The argument and the entry of the result that are the stream in most blocks; None unless in two at least."""
        best: tuple[int, tuple[Slot, Slot | None]] | None = None
        seen: dict[tuple[Slot, Slot | None], None] = {}
        for runs in self.calls.values():
            for _, inputs, outputs in runs:
                seen.update({(i, o): None for i, _ in inputs for o, _ in outputs})
        for source, target in seen:
            shapes: dict[tuple[int, ...], int] = {}
            for block in range(self.size):
                pair = self._pair(block, source, target)
                if pair is not None and self._residual(block, *pair):
                    shape = tuple(self.tape.tensors[pair[0]][0])
                    shapes[shape] = shapes.get(shape, 0) + 1
            count = max(shapes.values(), default=0)
            if count > 1 and (best is None or count > best[0]):
                best = count, (source, target)
        return None if best is None else best[1]

    def _residual(self, block: int, into: int, out: int) -> bool:
        """Whether the stream reaches the end of a block by a way that nothing mixes, joined by what is computed."""
        clean, worked, joined = {into}, set[int](), set[int]()
        for number in self.ops[block]:
            name, _, _, outputs, _ = self.tape.ops[number]
            reads = self.view.reads[number]
            is_clean = any(tid in clean for tid in reads)
            is_worked = any(tid in worked for tid in reads)
            if not is_clean and not is_worked:
                continue
            is_join = joins(name) and is_clean and is_worked
            if mixes(name) or (is_worked and not is_join):
                worked.update(outputs)
                clean.difference_update(outputs)
            else:
                clean.update(outputs)
                if is_join or any(tid in joined for tid in reads):
                    joined.update(outputs)
        return out in joined and out in clean

    # What else would be missing

    def _pin_uses(self, outs: Mapping[int, int]) -> None:
        """Pin the blocks of which something besides the stream is used elsewhere, or nothing at all."""
        tensors, ops = self.tape.tensors, self.tape.ops
        maker: dict[int, int | None] = {}
        first: dict[int, int | None] = {}  # storage -> the block that made it
        written: dict[int, set[int]] = {}  # storage from elsewhere -> the blocks that write into it
        used: set[int] = set()
        for number, op in enumerate(ops):
            block = self.owner[number]
            if self.view.live[number]:
                for tid in self.view.reads[number]:
                    at = maker.get(tid)
                    for other in {at, *written.get(tensors[tid][2], ())} - {None, block}:
                        assert other is not None
                        if tid == outs.get(other):
                            used.add(other)
                        else:
                            where = self.tape.scopes[op[4]] or "the root module"
                            self._pin(other, f"more than its output is used elsewhere ({op[0]} in {where})")
            for tid in op[3]:
                if tid < 0:
                    continue
                if tid not in maker and tensors[tid][3] == "value":
                    maker[tid] = block
                storage = tensors[tid][2]
                if tensors[tid][3] == "value":
                    first.setdefault(storage, block)
                if op[1] & MUTATES and block is not None and first.get(storage, -1) != block:
                    written.setdefault(storage, set()).add(block)
        for tid in self.tape.outputs:
            at = maker.get(tid)
            if at is not None and tid == outs.get(at):
                used.add(at)
            elif at is not None:
                self._pin(at, "more than its output belongs to the model's outputs")
        for block in range(self.size):
            if block in outs and block not in used:
                self._pin(block, "its output does not reach the model's outputs")

    def _pin_gaps(self, source: Slot, outs: Mapping[int, int]) -> None:
        """Pin the blocks up to the last one into which the stream goes changed: by its number, it may be."""
        last = -1
        for block in range(self.size - 1):
            into = None
            for run in self.calls.get(block + 1, ()):
                into = next((tid for slot, tid in run[1] if slot == source), None)
            if block in outs and block + 1 in outs and into != outs[block]:
                last = block
        for block in range(last + 2 if last >= 0 else 0):
            self._pin(block, f"the stream is changed between block {last} and the next")
