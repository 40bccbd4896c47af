"""Rules for operations llmprune does not know: what each dimension of a custom operation is, in a line of letters.

An operation without a rule freezes every axis that touches it. :func:`register_rule` says what it does instead, in the
notation of einsum and einops; the C core applies it like its own rules, keeps the proofs, and ``explain`` shows them::

    @torch.library.custom_op("mine::rms_norm", mutates_args=())
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    llmprune.register_rule("mine::rms_norm", "... d, d -> ... d", marks={"d": "norm"})
    llmprune.register_rule("mine::swiglu", "... f+f -> ... f", kinds={"f": "ffn"})
    llmprune.register_rule("mine::rotate", "b t (h d), _ -> b t (h d)", sizes={"h": "heads"}, freeze={"d": "rotated"})
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llmprune import _core
from llmprune.errors import InputError

if TYPE_CHECKING:
    from llmprune.tracing.tape import Tape

MARKS = {"mean": 2, "extreme": 3, "softmax": 4, "norm": 5}
"""What an operation may do over an axis that changes with its size -> code of the effect (``lp_graph_declare``)."""

KINDS = {
    "head": 1, "query": 1, "head_dim": 2, "value_dim": 3, "ffn": 4, "channel": 5, "expert": 6, "state": 7,
}  # fmt: skip
"""What an axis may be called -> code (``lp_graph_declare``)."""

Term = tuple[str, ...]
"""A product of axes, outer to inner."""
Dim = tuple[Term, ...]
"""A sum of products."""
Operand = tuple[Dim, ...]
"""The dimensions of a tensor. An ellipsis is the dimension ``(("...",),)``; an operand of no concern is None."""


@dataclass(frozen=True)
class Rule:
    """A registered rule; the arguments of :func:`register_rule`, parsed."""

    op: str
    notation: str
    marks: Mapping[str, str] = field(default_factory=dict)
    freeze: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)

    @property
    def operands(self) -> tuple[list[Operand | None], list[Operand | None]]:
        """The operands on the left and on the right of the arrow."""
        return parse(self.op, self.notation)

    def to_json(self) -> dict[str, Any]:
        """The rule as a JSON object."""
        return {
            "notation": self.notation,
            "marks": dict(self.marks),
            "freeze": dict(self.freeze),
            "kinds": dict(self.kinds),
            "sizes": dict(self.sizes),
        }


class Registration:
    """A rule in force. Leaving its ``with`` block, or :meth:`unregister`, takes it back."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def unregister(self) -> None:
        """Take the rule back; graphs traced with it keep it."""
        if _registered.get(self.rule.op) is self.rule:
            del _registered[self.rule.op]

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unregister()

    def __repr__(self) -> str:
        state = "in force" if _registered.get(self.rule.op) is self.rule else "taken back"
        return f"Registration({self.rule.op!r}, {self.rule.notation!r}, {state})"


_registered: dict[str, Rule] = {}


def find(op: str) -> Rule | None:
    """The rule in force for an operation (its schema name), or None."""
    return _registered.get(op)


def rule_of_call(function: Any) -> Rule | None:
    """The rule in force for what a function mode is handed: an operation of ``torch.ops``, or anything else."""
    return _registered.get(_name_or_none(function) or "") if _registered else None


def register_rule(
    op: Any,
    notation: str,
    *,
    marks: Mapping[str, str] | None = None,
    freeze: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    sizes: Mapping[str, str] | None = None,
    replace: bool = False,
) -> Registration:
    """Say what the axes of a custom operation are, for every trace from now on.

    To the left of ``->`` stands an operand for each tensor argument in schema order (one for all tensors of a list; an
    optional tensor that a call leaves out is skipped), to the right one for each output (for an operation that returns
    nothing, one for each argument it writes to). An operand names its dimensions with words parted by spaces:

    - the same word is the same axis everywhere; one that no output has is contracted;
    - ``(h d)`` is a dimension that holds two axes, outer to inner;
    - ``f+f`` and ``(h d)+(h d)`` are dimensions made of parts one after the other;
    - ``3`` is a dimension of that size, which stays as it is;
    - ``...`` at the front stands for any number of leading dimensions, aligned at the right;
    - ``_`` is a tensor of no concern (indices, a mask): its axes are frozen.

    Dimensions of size 1 broadcast. The sizes of the parts follow from the tensors; where they do not, ``sizes`` names
    the integer argument that holds one, and that integer's own origin is then followed like the size of a view.

    Args:
        op: the operation: ``"space::name"``, what ``torch.library.custom_op`` gave, or an entry of ``torch.ops``.
        notation: what its dimensions are, ``"... d, d -> ... d"``.
        marks: axis -> ``norm``, ``mean``, ``softmax`` or ``extreme``: the operation does this over it, so its result
            changes with the axis' size. Verification then compares over the kept positions.
        freeze: axis -> why no index of it can go, for the reader of ``llmprune trace --frozen``.
        kinds: axis -> ``ffn``, ``head``, ``query``, ``head_dim``, ``value_dim``, ``channel``, ``expert`` or ``state``,
            where the operations around do not show it.
        sizes: axis, or axes whose sizes multiply (``"k g"``) -> name of the integer argument that holds its size.
        replace: take back a rule registered for this operation before.

    Returns:
        The :class:`Registration`; use it as a context manager to have the rule inside a block only.

    Raises:
        InputError: the notation cannot be read, names what the operation does not have, or the operation has a rule.
    """
    name = _name(op)
    rule = Rule(name, notation, dict(marks or {}), dict(freeze or {}), dict(kinds or {}), dict(sizes or {}))
    inputs, outputs = rule.operands
    words = {word for operand in (*inputs, *outputs) for word in _words(operand)}
    _check_words(rule, words)
    _check_schemas(rule, len(inputs), len(outputs))
    if name in _registered and not replace:
        raise InputError(
            f"{name} has the registered rule {_registered[name].notation!r}: unregister it first, or pass replace=True"
        )
    _registered[name] = rule
    return Registration(rule)


# Reading the notation -------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\s*(\.\.\.|->|[(),+]|_(?!\w)|\w+|\S)")


def parse(op: str, notation: str) -> tuple[list[Operand | None], list[Operand | None]]:
    """The operands of a notation.

    Raises:
        InputError: it cannot be read; quotes the place.
    """
    tokens = [match.group(1) for match in _TOKEN.finditer(notation)]
    if tokens.count("->") != 1:
        raise InputError(f"the rule {notation!r} for {op} needs one -> between inputs and outputs")
    arrow = tokens.index("->")
    return _operands(op, notation, tokens[:arrow]), _operands(op, notation, tokens[arrow + 1 :])


def _operands(op: str, notation: str, tokens: list[str]) -> list[Operand | None]:
    sides: list[list[str]] = [[]]
    for token in tokens:
        if token == ",":
            sides.append([])
        else:
            sides[-1].append(token)
    if sides == [[]]:
        return []
    return [None if side == ["_"] else _operand(op, notation, side) for side in sides]


def _operand(op: str, notation: str, tokens: list[str]) -> Operand:
    """``b t (h d)+f``: terms joined by ``+`` are one dimension."""
    dims: list[list[Term]] = []
    at, joined = 0, False

    def wrong(what: str) -> InputError:
        return InputError(f"the rule {notation!r} for {op} cannot be read at {what!r}")

    while at < len(tokens):
        token = tokens[at]
        if token == "+":
            if not dims or joined:
                raise wrong(token)
            joined, at = True, at + 1
            continue
        if token == "(":
            end = tokens.index(")", at) if ")" in tokens[at:] else len(tokens)
            term = tuple(tokens[at + 1 : end])
            if end == len(tokens) or not term or not all(_is_word(word) for word in term):
                raise wrong(" ".join(tokens[at : end + 1]))
            at = end + 1
        elif (token == "..." and not dims) or _is_word(token):
            term, at = (token,), at + 1
        else:
            raise wrong(token)
        if joined and dims[-1] != [("...",)]:
            dims[-1].append(term)
        elif joined:
            raise wrong("+")
        else:
            dims.append([term])
        joined = False
    if joined:
        raise wrong("+")
    return tuple(tuple(terms) for terms in dims)


def _is_word(token: str) -> bool:
    return token.isidentifier() or (token.isdecimal() and int(token) > 0)


def _words(operand: Operand | None) -> set[str]:
    return {
        word
        for dim in operand or ()
        for term in dim
        for word in term
        if not word.isdecimal() and word != "..."
    }


def _check_words(rule: Rule, words: set[str]) -> None:
    for option, mapping, allowed in (
        ("marks", rule.marks, MARKS), ("kinds", rule.kinds, KINDS), ("freeze", rule.freeze, None),
        ("sizes", rule.sizes, None),
    ):  # fmt: skip
        for word, value in mapping.items():
            named = set(word.split()) if option == "sizes" else {word}
            if not named or not named <= words:
                raise InputError(
                    f"{option} of the rule for {rule.op} names the axis {word!r}, which {rule.notation!r} lacks"
                )
            if allowed is not None and value not in allowed:
                raise InputError(
                    f"{option} of the rule for {rule.op} says {value!r}: choose from {', '.join(allowed)}"
                )
    both = set(rule.marks) & set(rule.freeze)
    if both:
        raise InputError(
            f"the rule for {rule.op} both marks and freezes the axis {min(both)!r}: a frozen one needs no mark"
        )


# The operation --------------------------------------------------------------------------------------------------------


def _name(op: Any) -> str:
    """The schema name of an operation given in any of its forms."""
    name = _name_or_none(op)
    if name is None and isinstance(op, str) and re.fullmatch(r"\w+::\w+", op):
        name = op
    if name is None:
        raise InputError(
            f"{op!r} is no operation: give its name, space::name, or what torch.library.custom_op returned"
        )
    return name


def _name_or_none(op: Any) -> str | None:
    for attribute in ("_qualname", "_qualified_op_name"):  # custom_op's result; an entry of torch.ops
        name = getattr(op, attribute, None)
        if isinstance(name, str):
            return name
    schema = getattr(op, "_schema", None)
    return None if schema is None else str(schema.name)


def _overloads(name: str) -> list[Any]:
    """Schemas and tags live on overloads; none where torch does not know the operation."""
    import torch

    space, _, base = name.partition("::")
    packet = getattr(getattr(torch.ops, space), base, None)
    return [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]


def _check_schemas(rule: Rule, inputs: int, outputs: int) -> None:
    """That the operation exists, has no rule of its own, and takes and gives as many tensors as the rule says."""
    import torch

    overloads = _overloads(rule.op)
    if not overloads:
        raise InputError(f"torch knows no operation {rule.op}: define it before its rule")
    if _core.Graph.knows(rule.op) or any(torch.Tag.pointwise in overload.tags for overload in overloads):
        raise InputError(f"llmprune has a rule for {rule.op} of its own")
    found = [(tensor_places(o._schema), len(_results(o._schema)), o._schema) for o in overloads]
    fits = [schema for places, results, schema in found if (len(places), results) == (inputs, outputs)]
    if not fits:
        places, results, _ = found[0]
        raise InputError(
            f"the rule {rule.notation!r} for {rule.op} has {inputs} inputs and {outputs} outputs; the operation has "
            f"{len(places)} tensor arguments ({', '.join(places.values())}) and {results} outputs"
        )
    names = {argument.name for schema in fits for argument in schema.arguments}
    for word, argument in rule.sizes.items():
        if argument not in names:
            raise InputError(
                f"sizes of the rule for {rule.op} names the argument {argument!r} for {word!r}, which it lacks"
            )


def tensor_places(schema: Any) -> dict[int, str]:
    """Place -> name of the arguments that are tensors, lists of them, or either one optionally."""
    return {place: a.name for place, a in enumerate(schema.arguments) if "Tensor" in str(a.type)}


def _results(schema: Any) -> Sequence[Any]:
    """What the tape has as outputs: the returns, or the arguments written to."""
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    returns: Sequence[Any] = schema.returns
    return returns or written


def note_rule(tape: Tape, schema: Any) -> None:
    """Keep the rule of an operation that is about to be recorded, with what the tape alone does not tell of it."""
    rule = _registered.get(schema.name)
    if rule is not None and schema.name not in tape.rules:
        names = [argument.name for argument in schema.arguments]
        tape.rules[schema.name] = {**rule.to_json(), "places": list(tensor_places(schema)), "names": names}
