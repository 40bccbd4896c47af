"""Seeing a model's weights at work: every product in which a given dimension of a parameter is contracted.

A :class:`Taps` is a ``TorchDispatchMode``, so it meets matrix products and convolutions whatever module, fused
projection, stack of experts or plain function they come from, and knows parameters by the memory their views lie in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Use:
    """The part of a parameter that one product reads, as a matrix (inputs x outputs).

    Attributes:
        name: the parameter.
        inner: its contracted dimension.
        outer: its dimension of outputs.
        lead: index in the first dimension of a stack of matrices; None for a parameter that is no stack.
        first, count: which outputs.
        taps: elements of a convolution's kernel for each input channel, 1 for matrices.
        bias: the 1-D parameter that the same operation adds to just these outputs; None where none was looked for.
    """

    name: str
    inner: int
    outer: int
    lead: int | None
    first: int
    count: int
    taps: int = 1
    bias: str | None = None

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The part as a view of ``weight``, (inputs * taps, outputs)."""
        if weight.dim() > 2 and self.lead is None:  # a convolution's
            return weight.view(len(weight), -1).t()
        part = weight if self.lead is None else weight[self.lead]
        part = part if self.inner < self.outer else part.t()
        return part[:, self.first : self.first + self.count]


Observer = Callable[[Use, torch.Tensor, torch.Tensor], None]
"""Called with a use, its inputs (..., inputs * taps) and its outputs (..., outputs), biases included, which it may
write: what it leaves there is what the model goes on with."""


def id_of(tensor: torch.Tensor) -> tuple[int, int]:
    """What two tensors that begin at the same element share."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())


@dataclass(frozen=True)
class _Placed:
    """A parameter in memory: bytes ``start`` to ``end`` of a storage."""

    name: str
    weight: torch.Tensor
    start: int
    end: int

    @classmethod
    def of(cls, name: str, weight: torch.Tensor) -> _Placed:
        start = int(weight.storage_offset()) * weight.element_size()
        return cls(name, weight, start, start + weight.numel() * weight.element_size())


class Taps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls an observer at each use of some parameters.

    Args:
        weights: name -> parameter of the running model; those that are not contiguous, or in no memory yet, are not
            seen. :meth:`place` replaces entries.
        inner: name -> the dimensions whose contraction counts.
        observe: see :data:`Observer`.
        biases: name -> 1-D parameter that may be a use's bias; likewise.

    Attributes:
        elsewhere: names of the parameters that other operations read, noted where it is a set to begin with.
    """

    elsewhere: set[str] | None = None

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        inner: Mapping[str, Collection[int]],
        observe: Observer,
        biases: dict[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inner = inner
        self._observe = observe
        self._all_weights, self._all_biases = weights, {} if biases is None else biases
        self._weights: dict[int, list[_Placed]] = {}
        self._biases: dict[tuple[int, int], str] = {}
        for name in {**dict.fromkeys(inner), **self._all_biases}:
            tensor = weights.get(name, self._all_biases.get(name))
            if tensor is not None and not tensor.is_meta:
                self.place(name, tensor)

    @property
    def names(self) -> set[str]:
        """The parameters that are looked for."""
        return set(self._inner) & set(self._all_weights)

    def place(self, name: str, tensor: torch.Tensor) -> None:
        """A parameter is in memory here from now on, in the place of whatever was."""
        if name in self._all_biases:
            self._all_biases[name] = tensor
            self._biases[id_of(tensor)] = name
        if name in self._all_weights:
            self._all_weights[name] = tensor
            if name in self._inner and tensor.is_contiguous() and tensor.numel():
                placed = _Placed.of(name, tensor)
                here = self._weights.setdefault(tensor.untyped_storage().data_ptr(), [])
                here[:] = [p for p in here if p.end <= placed.start or placed.end <= p.start] + [placed]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and show it to the observer if it is a use."""
        out = func(*args, **(kwargs or {}))
        if func is aten.mm.default or func is aten.addmm.default:
            self._product(args[-2], args[-1], out, args[0] if len(args) == 3 and not kwargs else None)
        elif func is aten.bmm.default or func is aten.baddbmm.default:
            self._products(args[-2], args[-1], out)
        elif func is aten.convolution.default:
            self._convolution(args, out)
        elif self.elsewhere is not None:
            self._note(args, out)
        return out

    def _note(self, args: tuple[Any, ...], out: Any) -> None:
        """Note the parameters that an operation reads, unless its result is but another view of them."""
        for arg in args:
            found = self._placed(arg) if isinstance(arg, torch.Tensor) else None
            if found is None or self.elsewhere is None:
                continue
            if not isinstance(out, torch.Tensor) or id_of(out)[0] != id_of(found.weight)[0]:
                self.elsewhere.add(found.name)

    def _biased(self, use: Use, bias: torch.Tensor | None) -> Use:
        """The use with its bias, where that is a whole parameter with one entry for each output."""
        if bias is None or not self._biases or bias.dim() != 1 or len(bias) != use.count:
            return use
        return replace(use, bias=self._biases.get(id_of(bias)))

    def _product(
        self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        if (use := self._find(b)) is not None:
            self._observe(self._biased(use, bias), a, out)
        elif (use := self._find(a.t())) is not None:
            self._observe(use, b.t(), out.t())

    def _products(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        if self._placed(b) is None:
            return
        if b.stride(0) == 0 or len(b) == 1:  # one matrix for the whole batch
            if (use := self._find(b[0])) is not None:
                self._observe(use, a, out)
            return
        for parts in zip(a, b, out, strict=True):
            self._product(*parts)

    def _convolution(self, args: tuple[Any, ...], out: torch.Tensor) -> None:
        x, weight, bias, stride, padding, dilation, transposed, _, groups = args
        found = self._placed(weight)
        if found is None or 1 not in self._inner[found.name] or transposed or groups != 1 or out.dim() > 4:
            return
        kernel = tuple(weight.shape[2:])
        if len(kernel) == 1:  # as an image of height 1
            x, kernel = x.unsqueeze(2), (1, *kernel)
            stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
        columns = F.unfold(x, kernel, dilation, padding, stride)
        use = Use(found.name, 1, 0, None, 0, len(weight), kernel[0] * kernel[1])
        self._observe(
            self._biased(use, bias), columns.transpose(1, 2), out.view(*out.shape[:2], -1).transpose(1, 2)
        )

    def _placed(self, view: torch.Tensor) -> _Placed | None:
        """The parameter that a view begins in."""
        start = int(view.storage_offset()) * view.element_size()
        for placed in self._weights.get(view.untyped_storage().data_ptr(), ()):
            if placed.start <= start < placed.end:
                return placed
        return None

    def _find(self, view: torch.Tensor) -> Use | None:
        """Which part of which parameter a matrix (inputs x outputs) is; None if it is none that counts."""
        found = self._placed(view)
        if found is None:
            return None
        name, weight = found.name, found.weight
        if weight.dim() not in (2, 3):
            return None
        rows, columns = weight.shape[-2:]
        offset, lead = int(view.storage_offset()) - int(weight.storage_offset()), None
        if weight.dim() == 3:
            lead, offset = divmod(offset, rows * columns)
        last = weight.dim() - 1
        inputs, outputs = view.shape
        strides = view.stride()
        if inputs == columns and strides == (1, columns) and offset % columns == 0:
            use = Use(name, last, last - 1, lead, offset // columns, outputs)
        elif inputs == rows and strides == (columns, 1) and offset + outputs <= columns:
            use = Use(name, last - 1, last, lead, offset, outputs)
        else:
            return None
        return use if use.inner in self._inner[name] else None
