"""From uses of parameters, as a backward pass streams them by, to sums over structures.

A parameter's gradient is the sum over its uses. Each use in a linear map is a pair of matrices, inputs ``x`` and
outputs' gradients ``dy``, with gradient ``dy^T x``; a lookup in an embedding is the same with one-hot ``dy``'s in the
place of inputs to the rows. So uses of one parameter concatenate along tokens, and a kernel that reduces
``dy^T x`` while it is in cache never stores a gradient, however often and in whatever ways the parameter is used.
Pieces wait here until all uses of a parameter are in; then they are reduced and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from llmprune import _core
from llmprune.machine import cuda
from llmprune.out_of_core.reading import SLICE_BYTES, Sliced
from llmprune.scoring.importance import Importance

Sums = dict[str, list[np.ndarray]]
"""Parameter name -> for each dimension float64 sums of the elementwise importance, one per index. Of a stack whose
slices are told apart, dimension 0 has these; the others have them for each slice, (slices, indices)."""


def _out(sums: torch.Tensor) -> Any:
    """Sums as a kernel takes them: NumPy's view of the same memory on the CPU, the tensor itself on a device."""
    return sums.numpy() if sums.device.type == "cpu" else sums


def _add_rows(target: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """``target[rows] += values`` where rows repeat; always in one order, which index_add_ has on the CPU only."""
    if target.device.type == "cpu":
        target.index_add_(0, rows, values)
    else:
        target.index_put_((rows,), values, accumulate=True)


class Reroute(Exception):
    """Parameters turned out to be used in a way the streamed path does not cover; they take the general path."""

    def __init__(self, names: set[str]):
        super().__init__(", ".join(sorted(names)))
        self.names = names


@dataclass
class _Pieces:
    """What has come in for one parameter: per group of samples (keyed by its first sample) tokens of its uses."""

    linear: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    lookup: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    rows: torch.Tensor | None = None
    """The rows of the weight that ``linear``'s dy stand for; None for all."""
    transposed: bool = False
    count: int = 0
    """Uses times samples so far."""
    sizes: dict[int, int] = field(default_factory=dict)
    """First sample of a group of samples -> how many it has."""


def _joined(groups: dict[int, list[tuple[torch.Tensor, torch.Tensor]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of a group's uses side by side, then groups of samples one below the other: (S, T, ...) each."""
    parts = []
    for start in sorted(groups):
        uses = groups[start]
        parts.append(
            uses[0] if len(uses) == 1 else tuple(torch.cat(side, 1) for side in zip(*uses, strict=True))
        )
    if len(parts) == 1:
        return parts[0][0], parts[0][1]
    first, second = (torch.cat(side, 0) for side in zip(*parts, strict=True))
    return first, second


class Reducer:
    """Reduces uses of parameters to sums over structures.

    Args:
        importance: Which elementwise importance.
        parameters: Name -> the parameter whose structures are scored.
        samples: How many there are. The loss that runs backward is their sum.
        uses: Name -> how many uses in one pass make a parameter's gradient complete.
        done: Called with the name of each parameter that is complete.
        fold: Add gradients up in accumulators of the weight's size instead of keeping what passes: for more tokens
            than a weight has rows and columns.
        stacks: Names of parameters whose slices along dimension 0 are told apart; they take the general path.

    Attributes:
        grouped: Whether samples are told apart: for second order, whose ``s`` is a mean of squares over them.
        groups: In how many groups the rows of the current uses fall: one a sample where these are told apart.
    """

    def __init__(
        self,
        importance: Importance,
        parameters: Mapping[str, torch.Tensor | Sliced],
        samples: int,
        uses: Mapping[str, int],
        done: Callable[[str], None],
        fold: bool = False,
        stacks: Collection[str] = (),
    ):
        self.importance, self.parameters, self.samples = importance, parameters, samples
        self.uses, self.done, self.fold = uses, done, fold
        self.grouped = importance.order > 1
        self.stacks = stacks
        self._sums = {
            name: [
                torch.zeros(
                    (len(p), n) if dim and name in stacks else n, dtype=torch.float64, device=p.device
                )
                for dim, n in enumerate(p.shape)
            ]
            for name, p in parameters.items()
        }
        self.ids: dict[str, list[torch.Tensor]] = {}
        """Embedding name -> the ids it has looked up so far, (S, T) each."""
        self._pieces: dict[str, _Pieces] = {}
        self.complete: set[str] = set()
        """Names of the parameters that are reduced."""
        self._accumulators: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self.start, self.here = 0, samples

    @property
    def sums(self) -> Sums:
        """What has been added up so far."""
        return {name: [out.cpu().numpy() for out in outs] for name, outs in self._sums.items()}

    def begin(self, start: int, stop: int) -> None:
        """Uses from now on belong to samples ``start`` to ``stop``."""
        self.start, self.here = start, stop - start

    @property
    def groups(self) -> int:
        """See the class."""
        return self.here if self.grouped else 1

    def _scored(self, name: str) -> torch.Tensor | Sliced:
        return self.parameters[name].detach()

    # What the backward pass calls -----------------------------------------------------------------------------------

    def linear(
        self,
        name: str,
        x: torch.Tensor,
        dy: torch.Tensor,
        *,
        transposed: bool = False,
        rows: torch.Tensor | None = None,
    ) -> None:
        """A use as ``y = x W^T``: x (S, T, in), dy (S, T, out), samples in order; ``rows`` limits out to these."""
        pieces = self._pieces.setdefault(name, _Pieces())
        pieces.transposed, pieces.rows = transposed, rows
        self._add(name, pieces, pieces.linear, x, dy)
        self._count(name)

    def lookup(self, name: str, ids: torch.Tensor, dy: torch.Tensor, padding: int | None) -> None:
        """A use as ``y = W[ids]``: ids (S, T), dy (S, T, width); row ``padding`` gets no gradient."""
        if padding is not None:
            dy = dy.masked_fill((ids == padding)[..., None], 0)
        pieces = self._pieces.setdefault(name, _Pieces())
        if self.importance.additive:
            self._lookup_signed(name, ids, dy)
        else:
            self._add(name, pieces, pieces.lookup, ids, dy)
        self._count(name)

    def linear_signed(
        self,
        name: str,
        x: torch.Tensor,
        dx: torch.Tensor,
        dy: torch.Tensor,
        y: torch.Tensor,
        bias: torch.Tensor | None,
        transposed: bool,
        count: bool = True,
        start: int = 0,
    ) -> None:
        """A use for an additive importance, all (tokens, ...): no weight gradient is formed.

        Row sums of ``g*w`` are ``sum_t dy*(y - bias)``, column sums ``sum_t x*dx``. ``start`` is the first row of the
        weight that dy and y stand for; with ``count`` off, :meth:`inputs_signed` is to follow.
        """
        rows = self._sums[name][1 if transposed else 0][start : start + dy.shape[1]]
        self._dots(dy, y, rows)
        if bias is not None:
            rows -= dy.sum(0, dtype=torch.float64) * bias.detach().double()[start : start + dy.shape[1]]
        if count:
            self.inputs_signed(name, x, dx, transposed)

    def inputs_signed(self, name: str, x: torch.Tensor, dx: torch.Tensor, transposed: bool = False) -> None:
        """The inputs' side of a use for an additive importance, and with it the use's end."""
        self._dots(x, dx, self._sums[name][0 if transposed else 1])
        self._count(name)

    def row_slice(self, name: str, start: int, stop: int, x: torch.Tensor, dy: torch.Tensor) -> None:
        """All uses of rows ``start:stop`` of a weight at once: x (S, T, in), dy (S, T, stop - start)."""
        row, col = self._sums[name]
        self._reduce_linear(self._scored(name)[start:stop], x, dy, row[start:stop], col)

    def reduced(self, name: str) -> None:
        """All row slices of a weight have been reduced."""
        self.complete.add(name)
        self.done(name)

    @staticmethod
    def _dots(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        _core.dot_columns(a.detach().contiguous(), b.detach().contiguous(), _out(out), **cuda.options(a))

    def per_sample(self, name: str, gradients: torch.Tensor) -> None:
        """Gradients of a parameter for each sample, (samples, *shape)."""
        double = gradients.detach().double()
        self.whole(name, double.mean(0), double.square().mean(0))

    def whole(self, name: str, grad: torch.Tensor | None, square: torch.Tensor | None = None) -> None:
        """A parameter's whole mean gradient, and mean square where the importance needs it; None for zeros."""
        self._reduce_whole(name, grad, square)
        self.complete.add(name)
        self.done(name)

    def _reduce_whole(self, name: str, grad: torch.Tensor | None, square: torch.Tensor | None) -> None:
        weight = self._scored(name)
        if isinstance(weight, Sliced):
            for start, stop in weight.slices():
                g, s = (None if t is None else t[start:stop] for t in (grad, square))
                self._reduce_rows(name, range(start, stop), g, s)
        elif weight.dim():
            self._reduce_rows(name, range(len(weight)), grad, square)

    def _reduce_rows(
        self, name: str, rows: range, grad: torch.Tensor | None, square: torch.Tensor | None
    ) -> None:
        """Some rows of a parameter, with their gradient."""
        weight, (first, *others) = self._scored(name), self._sums[name]
        if name not in self.stacks:
            here = slice(rows.start, rows.stop)
            self._reduce_tensor(weight[here], grad, square, [first[here], *others])
            return
        for place, number in enumerate(rows):
            outs = [out[number] for out in others]
            before = outs[0].sum()
            mean, mean_square = (None if t is None else t[place] for t in (grad, square))
            self._reduce_tensor(weight[number : number + 1][0], mean, mean_square, outs)
            first[number] += outs[0].sum() - before

    @property
    def _key(self) -> int:
        """Under what to keep the current uses."""
        return self.start if self.grouped else 0

    def _add(
        self,
        name: str,
        pieces: _Pieces,
        groups: dict[int, list[tuple[torch.Tensor, torch.Tensor]]],
        first: torch.Tensor,
        second: torch.Tensor,
    ) -> None:
        """Keep a use. Uses of one parameter in differently cut groups of samples cannot be put side by side."""
        groups.setdefault(self._key, []).append((first.detach(), second.detach()))
        if self.grouped:
            size = pieces.sizes.setdefault(self.start, self.here)
            if size != self.here or sum(pieces.sizes.values()) > self.samples:
                raise Reroute({name})

    # Completion -----------------------------------------------------------------------------------------------------

    def _count(self, name: str) -> None:
        pieces = self._pieces.setdefault(name, _Pieces())
        pieces.count += self.here
        expected = self.uses.get(name, 0) * self.samples
        if pieces.count > expected:
            raise Reroute({name})
        parts = self.here < self.samples or name in self._accumulators
        if self.fold and parts and not self.importance.additive:
            self._fold(name, pieces)
        if pieces.count < expected:
            return
        if name in self._accumulators:
            self._reduce_whole(name, *self._accumulators.pop(name))
        elif not self.importance.additive:
            self._reduce(name, pieces)
        self._pieces[name] = _Pieces(count=pieces.count)
        self.complete.add(name)
        self.done(name)

    def _fold(self, name: str, pieces: _Pieces) -> None:
        """Move what has come in for the current samples, once it is all there, into accumulators."""
        key = self._key
        here = [len(groups.get(key, ())) for groups in (pieces.linear, pieces.lookup)]
        if self.grouped and sum(here) < self.uses[name]:
            return
        if name not in self._accumulators:
            self._accumulators[name] = self._zeros(name)
        linear, lookup = pieces.linear.pop(key, []), pieces.lookup.pop(key, [])
        self._accumulate(*self._accumulators[name], linear, lookup, self.groups, pieces.transposed)

    def _zeros(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Accumulators of a parameter's gradient, and of its square where that is needed."""
        weight = self._scored(name)
        kind = torch.promote_types(weight.dtype, torch.float32)
        zeros = torch.zeros(weight.shape, dtype=kind, device=weight.device)
        return zeros, torch.zeros_like(zeros) if self.grouped else None

    def _accumulate(
        self,
        mean: torch.Tensor,
        square: torch.Tensor | None,
        linear: list[tuple[torch.Tensor, torch.Tensor]],
        lookup: list[tuple[torch.Tensor, torch.Tensor]],
        groups: int,
        transposed: bool,
    ) -> None:
        """Add the gradients of some uses, one for each group of samples where these are told apart."""
        for group in range(groups):
            grad = torch.zeros_like(mean) if self.grouped else mean
            for x, dy in linear:
                pair = (x[group], dy[group]) if transposed else (dy[group], x[group])
                grad.addmm_(pair[0].to(grad.dtype).t(), pair[1].to(grad.dtype))
            for ids, dy in lookup:
                _add_rows(grad, ids[group], dy[group].to(grad.dtype))
            if square is not None:
                mean.add_(grad, alpha=1 / self.samples)
                _core.accumulate_square(square, grad, 1 / self.samples, **cuda.options(grad, scratch=False))

    def _dense(self, name: str, pieces: _Pieces) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The whole gradient of a parameter (and mean square), formed of the uses that have come in."""
        mean, square = self._zeros(name)
        for key in sorted(pieces.linear.keys() | pieces.lookup.keys()):
            linear, lookup = pieces.linear.get(key, []), pieces.lookup.get(key, [])
            groups = len((linear or lookup)[0][0]) if self.grouped else 1
            self._accumulate(mean, square, linear, lookup, groups, pieces.transposed)
        return mean, square

    def check_complete(self) -> None:
        """See that every streamed parameter had the expected uses.

        Raises:
            Reroute: the ones that had fewer, such as a layer this batch did not reach.
        """
        short = {name for name in self.uses if name not in self.complete}
        if short:
            raise Reroute(short)

    def _reduce(self, name: str, pieces: _Pieces) -> None:
        weight, sums = self._scored(name), self._sums[name]
        if not pieces.lookup:
            x, dy = _joined(pieces.linear)
            out, inner = (1, 0) if pieces.transposed else (0, 1)
            if isinstance(weight, Sliced):
                for start, stop in weight.slices():
                    self._reduce_linear(
                        weight[start:stop], x, dy[..., start:stop], sums[0][start:stop], sums[1]
                    )
                return
            self._reduce_linear(weight, x, dy, sums[out], sums[inner], pieces.transposed)
            return
        ids, dlookup = _joined(pieces.lookup)
        if not pieces.linear:
            self._reduce_lookup(weight, ids, dlookup, sums)
            return
        x, dy = _joined(pieces.linear)
        used = ids.unique()  # type: ignore[no-untyped-call]
        if pieces.rows is None:
            step = SLICE_BYTES // (4 * weight.shape[1]) + 1 if isinstance(weight, Sliced) else len(weight)
            for start in range(0, len(weight), step):
                self.unused_rows(name, start, used, x, dy[..., start : start + step])
            dy = dy[..., used]
        self._reduce_tied(weight, used, x, dy, ids, dlookup, sums)

    # Kernels --------------------------------------------------------------------------------------------------------

    def _reduce_linear(
        self,
        weight: torch.Tensor,
        x: torch.Tensor,
        dy: torch.Tensor,
        row: torch.Tensor,
        col: torch.Tensor,
        transposed: bool = False,
    ) -> None:
        """Weight (out, in), x (S, T, in), dy (S, T, out) -> added to row (out) and col (in)."""
        _core.linear_scores(
            weight,
            x.detach().reshape(-1, x.shape[-1]).contiguous(),
            dy.detach().reshape(-1, dy.shape[-1]).contiguous(),
            len(x),
            self.importance.order,
            _out(row),
            _out(col),
            transposed=transposed,
            **cuda.options(weight),
        )

    def _reduce_tensor(
        self,
        weight: torch.Tensor,
        grad: torch.Tensor | None,
        square: torch.Tensor | None,
        outs: list[torch.Tensor],
    ) -> None:
        """Any tensor and its whole gradient; ``outs`` as in :data:`Sums`. A scalar has no structures."""
        if weight.dim() == 0 or weight.numel() == 0:
            return
        if grad is None and self.importance.order > 0:
            grad = torch.zeros_like(weight)
        if square is None and self.importance.order > 1:
            square = torch.zeros_like(weight)
        if self.importance.kernel is not None:
            _core.tensor_scores(
                weight.detach().contiguous(),
                None if grad is None else grad.detach().contiguous(),
                None if square is None else square.detach().contiguous(),
                self.importance.kernel,
                [_out(out) for out in outs],
                **cuda.options(weight),
            )
            return
        double = [weight.double() if t is None else t.detach().double() for t in (weight, grad, square)]
        element = self.importance.element(double[0], double[1], double[2])
        for dim, out in enumerate(outs):
            out += element.movedim(dim, 0).reshape(len(out), -1).sum(1)

    def _lookup_signed(self, name: str, ids: torch.Tensor, dy: torch.Tensor) -> None:
        flat = ids.reshape(-1)
        product = dy.reshape(len(flat), -1).double() * self._scored(name)[flat].double()
        _add_rows(self._sums[name][0], flat, product.sum(1))
        self._sums[name][1] += product.sum(0)

    def _reduce_lookup(
        self, weight: torch.Tensor | Sliced, ids: torch.Tensor, dy: torch.Tensor, sums: list[torch.Tensor]
    ) -> None:
        """An embedding's rows: only those looked up have a gradient."""
        used, place = ids.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        kind = torch.promote_types(dy.dtype, torch.float32)
        grad = torch.zeros((len(used), weight.shape[1]), dtype=kind, device=weight.device)
        square = torch.zeros_like(grad) if self.importance.order > 1 else None
        for sample in range(len(ids)):
            mine, where = place[sample].unique(return_inverse=True)
            part = torch.zeros((len(mine), weight.shape[1]), dtype=kind, device=weight.device)
            _add_rows(part, where, dy[sample].to(kind))
            grad[mine] += part / len(ids)
            if square is not None:
                square[mine] += part.square() / len(ids)
        row = torch.zeros(len(used), dtype=torch.float64, device=weight.device)
        self._reduce_tensor(weight[used], grad, square, [row, sums[1]])
        sums[0][used] += row

    def unused_rows(
        self, name: str, start: int, used: torch.Tensor, x: torch.Tensor, dy: torch.Tensor
    ) -> torch.Tensor:
        """Reduce those rows of a tied weight, from ``start`` on, that were never looked up; the places of the others.

        x (S, T, in), dy (S, T, rows here). Returns the places, within these rows, of the ones looked up.
        """
        rows = dy.shape[-1]
        looked_up = torch.zeros(rows, dtype=torch.bool, device=dy.device)
        looked_up[used[(used >= start) & (used < start + rows)] - start] = True
        free = (~looked_up).nonzero()[:, 0]
        if len(free):
            row = torch.zeros(len(free), dtype=torch.float64, device=dy.device)
            weight = self._scored(name)[start : start + rows]
            self._reduce_linear(weight[free], x, dy[..., free], row, self._sums[name][1])
            self._sums[name][0][start + free] += row
        return looked_up.nonzero()[:, 0]

    def _reduce_tied(
        self,
        weight: torch.Tensor | Sliced,
        used: torch.Tensor,
        x: torch.Tensor,
        dy: torch.Tensor,
        ids: torch.Tensor,
        dlookup: torch.Tensor,
        sums: list[torch.Tensor],
        step: int = 1024,
    ) -> None:
        """Rows that were both looked up and projected onto: the lookups are tokens with a one-hot ``dy``."""
        inputs = torch.cat([x, dlookup.to(x.dtype)], 1)
        for begin in range(0, len(used), step):
            part = used[begin : begin + step]
            one_hot = (ids[..., None] == part).to(dy.dtype)
            row = torch.zeros(len(part), dtype=torch.float64, device=weight.device)
            outputs = torch.cat([dy[..., begin : begin + step], one_hot], 1)
            self._reduce_linear(weight[part], inputs, outputs, row, sums[1])
            sums[0][part] += row


@dataclass
class HeadRows:
    """What :mod:`llmprune.scoring.loss` tells of the final projection, passed on to a reducer.

    A weight tied to the embedding is reduced in two parts: rows no sample looked up at once, the others when the
    embedding's own gradient is in.
    """

    reducer: Reducer
    name: str
    bias: torch.Tensor | None
    _held: list[torch.Tensor] = field(default_factory=list)
    _used: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Note which rows the embedding has looked up, if the weight is one."""
        looked_up = self.reducer.ids.get(self.name)
        if looked_up and not self.reducer.importance.additive:
            self._used = torch.cat([ids.reshape(-1) for ids in looked_up]).unique()  # type: ignore[no-untyped-call]

    def rows(self, start: int, stop: int, x: torch.Tensor, dy: torch.Tensor, y: torch.Tensor) -> None:
        """Reduce rows ``start:stop``; see :class:`llmprune.scoring.loss.HeadUse`."""
        reducer = self.reducer
        if reducer.importance.additive:
            reducer.linear_signed(self.name, x, x, dy, y, self.bias, False, count=False, start=start)
            return
        x, dy = (t.view(reducer.groups, -1, t.shape[-1]) for t in (x, dy))
        if self._used is not None:
            self._held.append(dy[..., reducer.unused_rows(self.name, start, self._used, x, dy)])
        else:
            reducer.row_slice(self.name, start, stop, x, dy)

    def inputs(self, x: torch.Tensor, dx: torch.Tensor) -> None:
        """All rows are done; see :class:`llmprune.scoring.loss.HeadUse`."""
        reducer = self.reducer
        if reducer.importance.additive:
            reducer.inputs_signed(self.name, x, dx)
        elif self._used is not None:
            rows = torch.cat(self._held, -1)
            reducer.linear(self.name, x.view(reducer.groups, -1, x.shape[-1]), rows, rows=self._used)
        else:
            reducer.reduced(self.name)
