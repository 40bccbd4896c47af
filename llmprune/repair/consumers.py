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


class Taps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls an observer at each use of some parameters.

    Args:
        weights: name -> parameter of the running model; those that are not contiguous are not seen.
        inner: name -> the dimensions whose contraction counts.
        observe: see :data:`Observer`.
        biases: name -> 1-D parameter that may be a use's bias.

    Attributes:
        elsewhere: names of the parameters that other operations read, noted where it is a set to begin with.
    """

    elsewhere: set[str] | None = None

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        inner: Mapping[str, Collection[int]],
        observe: Observer,
        biases: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = {
            weights[name].untyped_storage().data_ptr(): (name, weights[name])
            for name in inner
            if weights[name].is_contiguous()
        }
        self._biases = {id_of(bias): name for name, bias in (biases or {}).items()}
        self._inner = inner
        self._observe = observe

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
            found = (
                self._weights.get(arg.untyped_storage().data_ptr()) if isinstance(arg, torch.Tensor) else None
            )
            if found is None or self.elsewhere is None:
                continue
            if not isinstance(out, torch.Tensor) or out.untyped_storage().data_ptr() != id_of(found[1])[0]:
                self.elsewhere.add(found[0])

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
        if b.untyped_storage().data_ptr() not in self._weights:
            return
        if b.stride(0) == 0 or len(b) == 1:  # one matrix for the whole batch
            if (use := self._find(b[0])) is not None:
                self._observe(use, a, out)
            return
        for parts in zip(a, b, out, strict=True):
            self._product(*parts)

    def _convolution(self, args: tuple[Any, ...], out: torch.Tensor) -> None:
        x, weight, bias, stride, padding, dilation, transposed, _, groups = args
        found = self._weights.get(weight.untyped_storage().data_ptr())
        if found is None or 1 not in self._inner[found[0]] or transposed or groups != 1 or out.dim() > 4:
            return
        kernel = tuple(weight.shape[2:])
        if len(kernel) == 1:  # as an image of height 1
            x, kernel = x.unsqueeze(2), (1, *kernel)
            stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
        columns = F.unfold(x, kernel, dilation, padding, stride)
        use = Use(found[0], 1, 0, None, 0, len(weight), kernel[0] * kernel[1])
        self._observe(
            self._biased(use, bias), columns.transpose(1, 2), out.view(*out.shape[:2], -1).transpose(1, 2)
        )

    def _find(self, view: torch.Tensor) -> Use | None:
        """Which part of which parameter a matrix (inputs x outputs) is; None if it is none that counts."""
        found = self._weights.get(view.untyped_storage().data_ptr())
        if found is None:
            return None
        name, weight = found
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
