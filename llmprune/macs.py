"""Multiply-accumulates of one forward pass, read off a tape, before and after a plan.

Counted are the operations a matrix unit would do: matrix products, attention and convolutions, each as the product of
the sizes of its dimensions. Attention is counted whole, without a discount for causality; pointwise operations, norms
and look-ups are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmprune import tape as codes

Dimension = tuple[int, int]


def arguments(code: Sequence[int]) -> list[Any]:
    """Decode an operation's arguments: tensors as ``("t", id)``, lists as lists, anything opaque as None."""
    out: list[Any] = []
    i = 0
    while i < len(code):
        tag = code[i]
        if tag in (codes.NONE, codes.OTHER):
            out.append(None)
            i += 1
        elif tag in (codes.TENSORS, codes.INTS, codes.BOOLS):
            n = code[i + 1]
            items = list(code[i + 2 : i + 2 + n])
            out.append([("t", item) for item in items] if tag == codes.TENSORS else items)
            i += 2 + n
        else:
            out.append(("t", code[i + 1]) if tag == codes.TENSOR else code[i + 1])
            i += 2
    return out


def products(tape: codes.Tape) -> Iterator[list[Dimension]]:
    """Of each counted operation the (tensor id, dim) whose sizes multiply to its multiply-accumulates.

    Attention yields two products: queries with keys, and weights with values.
    """
    for name, _flags, code, outputs, _scope in tape.ops:
        args = [a[1] if isinstance(a, tuple) else a for a in arguments(code)]
        yield from _products(name.removeprefix("aten::"), args, outputs, tape.tensors)


def _products(
    name: str, args: list[Any], outputs: list[int], tensors: list[list[Any]]
) -> Iterator[list[Dimension]]:
    def whole(tensor: int) -> list[Dimension]:
        return [(tensor, dim) for dim in range(len(tensors[tensor][0]))]

    if name in ("mm", "bmm", "_grouped_mm", "mv", "dot"):
        last = len(tensors[args[1]][0]) - 1
        yield [*whole(args[0]), *([(args[1], last)] if name in ("mm", "bmm", "_grouped_mm") else [])]
    elif name in ("addmm", "baddbmm", "addbmm", "addmv"):
        last = len(tensors[args[2]][0]) - 1
        yield [*whole(args[1]), *([(args[2], last)] if name != "addmv" else [])]
    elif name == "linear":
        yield [*whole(args[0]), *([(args[1], 0)] if len(tensors[args[1]][0]) == 2 else [])]
    elif "scaled_dot_product" in name and not name.endswith("_backward"):
        query, key, value = args[:3]
        rank = len(tensors[query][0])
        yield [*whole(query), (key, rank - 2)]
        yield [*((query, dim) for dim in range(rank - 1)), (value, rank - 2), (value, rank - 1)]
    elif name in ("convolution", "_convolution", "conv1d", "conv2d", "conv3d"):
        transposed = bool(args[6]) if name.endswith("convolution") else False
        kernel = [(args[1], dim) for dim in range(1, len(tensors[args[1]][0]))]
        yield [*whole(args[0] if transposed else outputs[0]), *kernel]


def count_macs(graph: Any, removed: Mapping[int, Any] | None = None) -> int:
    """Multiply-accumulates of the traced forward pass after ``removed`` (axis id -> removed indices)."""
    groups = list(products(graph.tape))
    dims = sorted({dim for group in groups for dim in group})
    counts = {axis: len(indices) for axis, indices in (removed or {}).items()}
    if counts:
        sizes = dict(zip(dims, graph.new_sizes(counts, dims), strict=True))
    else:
        sizes = {(tensor, dim): graph.tape.tensors[tensor][0][dim] for tensor, dim in dims}
    return sum(math.prod(sizes[dim] for dim in group) for group in groups)


def traced_tokens(graph: Any) -> int | None:
    """Tokens of the traced forward pass (batch x length of ``input_ids``); None for a model without them."""
    for sizes, _dtype, _storage, role, name in graph.tape.tensors:
        if role == "input" and name in ("input_ids", "decoder_input_ids") and len(sizes) == 2:
            return int(sizes[0] * sizes[1])
    return None
