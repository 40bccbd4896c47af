"""Repeated blocks: models stack many copies of few kinds of block, and one of each kind is enough for a second look.

Two blocks are of a kind when the tape shows the same operations on tensors of the same sizes in both, in the same
order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from llmprune.tracing.tape import TENSOR, TENSORS, Tape, arguments


@dataclass
class Excerpt:
    """Which blocks of a model stand for all of them.

    Attributes:
        kept: path of a list of blocks -> positions of those that stay, ascending.
        replicas: ``(prefix of a kept block, prefix of a block left out that is like it)``.
    """

    kept: dict[str, list[int]] = field(default_factory=dict)
    replicas: list[tuple[str, str]] = field(default_factory=list)


def find_excerpt(model: nn.Module, tape: Tape) -> Excerpt:
    """The first block of each kind in every outermost list of blocks that ran on ``tape``."""
    excerpt = Excerpt()
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    }
    owner = _owners(tape.scopes, list(lists))
    signatures: dict[tuple[str, int], list[int]] = {}
    sizes = [hash((tuple(sizes), kind)) for sizes, kind, *_ in tape.tensors]
    for name, flags, code, outputs, scope in tape.ops:
        block = owner[scope]
        if block is not None:
            entry = (name, flags, tuple(_anonymous(code, sizes)), tuple(sizes[t] for t in outputs if t >= 0))
            signatures.setdefault(block, []).append(hash(entry))
    for path, module in lists.items():
        first: dict[tuple[int, ...], int] = {}
        kept = []
        replicas = []
        for position in range(len(module)):
            signature = tuple(signatures.get((path, position), ()))
            like = first.setdefault(signature, position)
            if like == position:
                kept.append(position)
            else:
                replicas.append((f"{path}.{like}.", f"{path}.{position}."))
        if any((path, position) in signatures for position in kept) and replicas and () not in first:
            excerpt.kept[path] = kept
            excerpt.replicas += replicas
    return excerpt


def _owners(scopes: Sequence[str], lists: Sequence[str]) -> list[tuple[str, int] | None]:
    """For each scope the outermost list of blocks it lies in, and its position there."""
    known = set(lists)
    owners: list[tuple[str, int] | None] = []
    for scope in scopes:
        parts = scope.split(".")
        owner = None
        for depth in range(1, len(parts)):
            path = ".".join(parts[:depth])
            if path in known and parts[depth].isdigit():
                owner = path, int(parts[depth])
                break
        owners.append(owner)
    return owners


def _anonymous(code: list[int], sizes: Sequence[int]) -> Iterator[int]:
    """An operation's arguments with each tensor's number replaced by what it looks like."""
    for tag, payload in arguments(code):
        yield tag
        if tag in (TENSOR, TENSORS):
            yield from (sizes[tid] if tid >= 0 else -1 for tid in payload)
        else:
            yield from payload
