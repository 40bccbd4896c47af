"""The tape: one forward pass as a flat list of operations on numbered tensors.

Python records it (:mod:`llmprune.tracing.trace`); everything else reads it. Plain lists only, so a tape is JSON as it
stands.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# Argument tags of an operation's ``code``: every schema argument in schema order, as a tag and its payload of ints.
NONE, TENSOR, TENSORS, INT, INTS, FLOAT, BOOL, OTHER, BOOLS = range(9)

# Operation flags.
POINTWISE = 1
"""``torch.Tag.pointwise``: the output's elements depend on the broadcast inputs' elements at the same place only."""
MUTATES = 2
"""Writes into its first tensor argument (in-place or ``out=``), which appears again among the outputs."""

LITERAL = 4
"""A slice or split whose borders are numbers in the model's code."""


@dataclass
class Tape:
    """One recorded forward pass.

    Attributes:
        tensors: id -> ``[sizes, dtype_class, storage_id, role, name]``; ``dtype_class`` is one of ``f i b c`` (float,
            integer, bool, complex); ``role`` one of ``value parameter buffer input constant``; ``name`` the canonical
            parameter or buffer name, or the input's keyword (empty for values).
        ops: ``[name, flags, code, outputs, scope]``; ``name`` is the ATen schema name without overload
            (``aten::view``), ``code`` the encoded arguments, ``outputs`` tensor ids (-1 where an output is not a
            tensor), ``scope`` an index into ``scopes``.
        scopes: module paths (the root is the empty string).
        outputs: ids of the tensors that matter to a caller (logits, or the last hidden state).
        calls: ``[scope, inputs, outputs]`` for each run of a member of a list of modules, or of a child of one;
            ``inputs`` and ``outputs`` are ``[slot, tensor_id]``, an input's slot its place or keyword, an output's its
            place or key (None: the result is that tensor), and -1 for an output that is no tensor.
        equations: ``[tensor_id, dim, tree, where]``: the integer expression ``tree`` gave the size of that dimension.
        value_used: ``[tree, where]``: an integer whose value entered the arithmetic as a number.
        model: class name of the traced model.
        attention: attention implementation the tape was recorded under.
        device_mode: ``meta`` or ``real``.
        second: the same model recorded under another form of attention, cut down to one block of each kind, where that
            form reads attributes the first does not; its equations hold for the model as well.
        replicas: ``[prefix, prefix of another block]``: for every block left out of a cut-down recording, the block it
            is like.
        rules: operations recorded with a registered rule: name -> the rule, and the ``places`` and ``names`` of its
            arguments (:mod:`llmprune.tracing.rules`).
        norms: root-mean-square norms among the modules, as fields of :class:`llmprune.compaction.norms.Norm`.
        notes: what the recording had to do (fallbacks), for the report.
        cached: ``[tensor_id, most tokens it keeps or -1, bytes per element]`` of what generation would keep of this
            pass; of a recording with the cache on only.
    """

    tensors: list[list[Any]] = field(default_factory=list)
    ops: list[list[Any]] = field(default_factory=list)
    scopes: list[str] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    calls: list[list[Any]] = field(default_factory=list)
    equations: list[list[Any]] = field(default_factory=list)
    value_used: list[list[Any]] = field(default_factory=list)
    model: str = ""
    attention: str = ""
    device_mode: str = "meta"
    second: Tape | None = None
    replicas: list[list[str]] = field(default_factory=list)
    rules: dict[str, dict[str, Any]] = field(default_factory=dict)
    norms: list[list[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cached: list[list[int]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The tape as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Tape:
        """The inverse of :meth:`to_json`."""
        second = data.get("second")
        return cls(**{**data, "second": None if second is None else cls.from_json(second)})


def arguments(code: list[int]) -> list[tuple[int, list[int]]]:
    """Decode an operation's ``code`` into (tag, payload) pairs, one for each schema argument."""
    result, at = [], 0
    while at < len(code):
        tag = code[at]
        at += 1
        if tag in (NONE, OTHER):
            count = 0
        elif tag in (TENSORS, INTS, BOOLS):
            count = code[at]
            at += 1
        else:
            count = 1
        result.append((tag, code[at : at + count]))
        at += count
    return result


def leaves(tree: Any) -> list[list[Any]]:
    """The ``["attr", module, name]`` and ``["shape", tensor, dim]`` leaves of an equation tree."""
    if isinstance(tree, int):
        return []
    if tree[0] in ("attr", "shape"):
        return [tree]
    return [leaf for part in tree[1:] for leaf in leaves(part)]
