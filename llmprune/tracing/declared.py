"""Registered rules (:mod:`llmprune.tracing.rules`) applied to a tape: words become numbers for the C core."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

from llmprune.errors import TraceError
from llmprune.tracing.rules import KINDS, MARKS, Dim, Operand, Rule, Term, tensor_places
from llmprune.tracing.tape import INT, TENSOR, TENSORS, Tape, arguments

DECLARED = "the rule registered for the operation freezes it"
"""The core's words for an axis that a registered rule freezes; the rule has better ones."""

RULE_KEYS = ("notation", "marks", "freeze", "kinds", "sizes")
_FROZEN = 1
_MAX_LETTERS = 64


def compile_rules(tape: Tape) -> list[tuple[int, list[int]]]:
    """For every operation with a rule: its number, and the rule as ``lp_graph_declare`` takes it.

    Raises:
        TraceError: a rule does not fit an operation it was registered for; names the operation and the module.
    """
    compiled = []
    for number, (name, _flags, _code, _outputs, scope) in enumerate(tape.ops) if tape.rules else ():
        if name not in tape.rules:
            continue
        place = f"{name} in {tape.scopes[scope] or 'the root module'}"
        code = _Application(*_stored(tape, name), tape, number, place).encode()
        if code is not None:
            compiled.append((number, code))
    return compiled


def frozen_by_rule(tape: Tape, number: int, holds: Callable[[int, int], bool]) -> list[str]:
    """What the rule of an operation says about the frozen axes in dimensions for which ``holds(tensor, dim)``."""
    rule, stored = _stored(tape, tape.ops[number][0])
    application = _Application(rule, stored, tape, number, "")
    outputs = ((application.outputs_of[i], operand) for i, operand in application.outputs)
    words = {
        word
        for tensor, operand in (*application.inputs, *outputs)
        for d, dim in enumerate(operand)
        if holds(tensor, d)
        for term in dim
        for word in term
    }
    return [reason for word, reason in rule.freeze.items() if word in words]


def size_equations(
    rule: Rule,
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out: Any,
    shape: Callable[[Any], Sequence[Any]],
) -> tuple[dict[str, Any], dict[str, tuple[Any, int, Any]]]:
    """What the integer arguments of a call say about sizes.

    Args:
        rule: the operation's rule.
        func: the operation, an overload or all of them.
        args: positional arguments of the call.
        kwargs: its keyword arguments.
        out: its result.
        shape: the sizes of a tensor, with their origins.

    Returns:
        Every argument by name; and for those that a rule calls sizes (tensor, dimension, size of that dimension).
    """
    schema = getattr(func, "_schema", None) or getattr(func, func.overloads()[0])._schema
    names = [argument.name for argument in schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    left, right = rule.operands
    tensors = [given.get(name) for name in tensor_places(schema).values()]
    results = list(out) if isinstance(out, (tuple, list)) else [out]
    terms = [
        (tensor, tensor.dim() - len(operand) + d, dim[0])
        for operand, value in (*zip(left, tensors, strict=False), *zip(right, results, strict=False))
        for tensor in (value if isinstance(value, (tuple, list)) else [value])
        if operand is not None and tensor is not None
        for d, dim in enumerate(operand)
        if len(dim) == 1 and dim[0] != ("...",)
    ]

    def without(term: Term, words: Iterable[str]) -> list[str] | None:
        """The axes of a product beside these; None where it does not hold them all."""
        left = list(term)
        for word in words:
            if word not in left:
                return None
            left.remove(word)
        return left

    def named(words: list[str]) -> list[Any]:
        """Sizes whose product is that of these axes, from arguments and dimensions of their own; None where open."""
        for key, argument in sorted(rule.sizes.items(), key=lambda item: -len(item[0].split())):
            left = without(tuple(words), key.split())
            if left is not None:
                return [given.get(argument), *named(left)]
        alone = {
            term[0]: (tensor, dim) for tensor, dim, term in terms if len(term) == 1 and tensor.shape[dim] > 1
        }
        return [shape(alone[word][0])[alone[word][1]] if word in alone else None for word in words]

    def size_of(word: str, here: tuple[Any, int]) -> Any:
        """The size of one axis, also as what the axes beside it leave it of another dimension."""
        if word in rule.freeze or word.isdecimal():
            return None
        [size] = named([word])
        for tensor, dim, term in terms if size is None else ():
            left = without(term, [word])
            others = [None] if left is None else named(left)
            if (tensor is not here[0] or dim != here[1]) and None not in others and tensor.shape[dim] > 1:
                return shape(tensor)[dim] // _product(others)
        return size

    sized: dict[str, tuple[Any, int, Any]] = {}
    for words, argument in rule.sizes.items():
        for tensor, dim, term in terms:
            others = without(term, words.split())
            if others is None or tensor.shape[dim] == 1 or not isinstance(given.get(argument), int):
                continue
            factors = [size_of(other, (tensor, dim)) for other in others]
            unknown = [other for other, size in zip(others, factors, strict=True) if size is None]
            if len(unknown) > 1 or not all(w in rule.freeze or w.isdecimal() for w in unknown):
                continue  # a size that nothing names may change as well
            size = given[argument] * _product(factor for factor in factors if factor is not None)
            if unknown:
                size = size * (tensor.shape[dim] // int(size))
            sized.setdefault(argument, (tensor, dim, size))
    return given, sized


def _product(factors: Iterable[Any]) -> Any:
    """A product that keeps the origins of its factors."""
    result: Any = 1
    for factor in factors:
        result = result * factor
    return result


def _stored(tape: Tape, name: str) -> tuple[Rule, Mapping[str, Any]]:
    stored = tape.rules[name]
    return Rule(name, **{key: stored[key] for key in RULE_KEYS}), stored


class _Application:
    """A rule met by one operation on the tape: which word is which dimension of which tensor."""

    def __init__(self, rule: Rule, stored: Mapping[str, Any], tape: Tape, number: int, place: str) -> None:
        self.rule, self.tape, self.place = rule, tape, place
        self.names = stored["names"]
        _, _, code, self.outputs_of, _ = tape.ops[number]
        self.arguments = arguments(code)
        self.frozen: set[str] = set(rule.freeze)
        self._fresh = 0
        left, right = rule.operands
        self.inputs: list[tuple[int, Operand]] = []
        for operand, place_of in zip(left, stored["places"], strict=False):
            tag, payload = self.arguments[place_of]
            if tag in (TENSOR, TENSORS):
                what = f"argument {self.names[place_of]!r}"
                self.inputs += [(t, self._fitted(operand, t, what)) for t in payload if t >= 0]
        several = len(right) == 1 and len(self.outputs_of) > 1  # a list of tensors: one operand for all
        spread = right * len(self.outputs_of) if several else right
        self.outputs: list[tuple[int, Operand]] = [
            (i, self._fitted(operand, self.outputs_of[i], f"output {i}"))
            for i, operand in enumerate(spread)
            if i < len(self.outputs_of) and self.outputs_of[i] >= 0
        ]

    def _shape(self, tensor: int) -> list[int]:
        shape: list[int] = self.tape.tensors[tensor][0]
        return shape

    def _fitted(self, operand: Operand | None, tensor: int, what: str) -> Operand:
        """The operand with a word for each dimension: the ellipsis spelt out, numbers and ``_`` as frozen axes."""
        shape = self._shape(tensor)
        if operand is None:
            return tuple(((self._number(size),),) for size in shape)
        dims = list(operand)
        if dims and dims[0] == (("...",),):
            leading = len(shape) - len(dims) + 1
            dims = [((f"...{back}",),) for back in range(leading, 0, -1)] + dims[1:]
        if len(dims) != len(shape):
            raise self._error(f"gives {what} {len(dims)} dimensions, but it has {len(shape)}: {tuple(shape)}")
        return tuple(
            tuple(tuple(self._number(int(w)) if w.isdecimal() else w for w in term) for term in dim)
            for dim in dims
        )

    def _number(self, size: int) -> str:
        """A frozen axis of its own, of a size that is written in its name."""
        self._fresh += 1
        word = f"{size}#{self._fresh}"
        self.frozen.add(word)
        return word

    def _error(self, what: str) -> TraceError:
        return TraceError(f"the rule {self.rule.notation!r} {what} ({self.place})")

    def encode(self) -> list[int] | None:
        """The rule with numbers for words; None where a tensor is empty, which nothing passes through."""
        dims = [
            (dim, self._shape(tensor)[d])
            for tensor, operand in (*self.inputs, *((self.outputs_of[i], o) for i, o in self.outputs))
            for d, dim in enumerate(operand)
        ]
        if any(size == 0 for _, size in dims):
            return None
        sizes = self._sizes(dims)
        words = list(dict.fromkeys(word for dim, _ in dims for term in dim for word in term))
        if len(words) > _MAX_LETTERS:
            raise self._error(f"has more than {_MAX_LETTERS} axes")
        number = {word: i for i, word in enumerate(words)}
        code = [len(words)]
        for word in words:
            effect = _FROZEN if word in self.frozen else MARKS.get(self.rule.marks.get(word, ""), 0)
            code += (sizes[word], effect, KINDS.get(self.rule.kinds.get(word, ""), 0))
        for side in (self.inputs, self.outputs):
            code.append(len(side))
            for tensor, operand in side:
                code += (tensor, len(operand))
                for dim in operand:
                    code.append(len(dim))
                    for term in dim:
                        code += (len(term), *(number[word] for word in term))
        return code

    def _sizes(self, dims: Sequence[tuple[Dim, int]]) -> dict[str, int]:
        """The size of every word, from the dimensions it alone explains; then every dimension is checked."""
        known: dict[str, int] = {}
        products: list[tuple[Dim, int]] = []
        for words, argument in self.rule.sizes.items():
            tag, payload = self.arguments[self.names.index(argument)]
            if tag != INT or payload[0] < 1:
                raise self._error(f"takes the size of {words!r} from {argument!r}, which holds none here")
            products.append(((tuple(words.split()),), payload[0]))
        for dim, _ in dims:
            known.update({w: int(w.partition("#")[0]) for term in dim for w in term if "#" in w})
        moved = True
        while moved:
            moved = False
            for dim, size in (*products, *dims):
                unknown = {word for term in dim for word in term if word not in known}
                if len(unknown) != 1 or (size == 1 and (dim, size) not in products):
                    continue
                [word] = unknown
                value = _solve(dim, size, word, known)
                if value is not None:
                    known[word] = value
                    moved = True
        for dim, size in dims:  # what only dimensions of size 1 show has that size
            known.update({word: 1 for term in dim for word in term if word not in known and size == 1})
        for dim, size in (*products, *dims):
            missing = [word for term in dim for word in term if word not in known]
            if missing:
                raise self._error(
                    f"leaves the size of {missing[0]!r} open: name the argument that holds it in sizes="
                )
            made = sum(prod(known[word] for word in term) for term in dim)
            if made != size and (size != 1 or (dim, size) in products):
                text = "+".join(" ".join(term) for term in dim)
                given = ", ".join(f"{w} = {known[w]}" for w in dict.fromkeys(w for term in dim for w in term))
                raise self._error(f"makes a dimension {text!r} of size {made} ({given}), but it has {size}")
        return known


def _solve(dim: Dim, size: int, word: str, known: Mapping[str, int]) -> int | None:
    """The size of the one unknown word of a dimension; None where it is not to the first power or does not divide."""
    rest, slope = size, 0
    for term in dim:
        value = prod(known[w] for w in term if w != word)
        count = term.count(word)
        if count > 1:
            return None
        if count:
            slope += value
        else:
            rest -= value
    return rest // slope if slope and rest > 0 and rest % slope == 0 else None
