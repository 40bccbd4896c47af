"""The least squares behind repair: weights of the inputs that stay, chosen so that outputs change least.

With inputs ``x`` (tokens x kept) that a consumer still gets, and ``r`` (tokens x out) what is missing from its outputs,
the change ``d`` (kept x out) of its transposed weight minimises ``|x d - r|^2 + l |d|^2``: ridge toward the weights as
they are, ``d = (x^T x + l)^-1 x^T r``. For ``r`` the contribution of the removed inputs this is the closed form of
OSSCAR (Meng et al., arXiv:2403.12983) and of SliceGPT's and ZipLM's relatives; ``l`` is a multiple of the mean of the
diagonal of ``x^T x``. With fewer tokens than inputs the same solution comes from the tokens' side, ``d = x^T (x x^T +
l)^-1 r``. A consumer with a bias has that fitted as well, without a ridge: ``x`` and ``r`` are then taken from their
means, and the bias changes by ``mean(r) - mean(x) d``; with ``d = 0`` that is FLAP's compensation (An et al. 2023,
eq. 7), which is a candidate of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Candidates for the ridge, in units of the mean diagonal of the Gram matrix; leaving the weights alone is another."""


@dataclass(frozen=True)
class Fit:
    """A consumer's repair.

    Attributes:
        change: what is added to the transposed weight, (kept, out), float64; None where nothing is better.
        ridge: the ridge chosen, in units of the mean diagonal; None with ``change`` None.
        before, after: squared output error on the held-out rows, without the change and with it.
        shift: what is added to the bias, (out,), float64; None where it stays.
    """

    change: torch.Tensor | None
    ridge: float | None
    before: float
    after: float
    shift: torch.Tensor | None = None


class Inputs:
    """What a consumer gets, with what fits of different outputs to it have in common.

    Args:
        x: inputs, (tokens, in), any floating dtype; products in float32 or better, factorisations in float64.
        held: how many of the last rows judge and take no part; 0 < held < tokens.
        stay: which of the inputs the consumer keeps; None: all.
        centred: whether a bias is fitted too.
    """

    def __init__(
        self, x: torch.Tensor, held: int, stay: torch.Tensor | None = None, centred: bool = False
    ) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.mean = x[:-held].mean(0) if centred else None
        x = x if self.mean is None else x - self.mean
        self.learn, self.judge = x[:-held], x[-held:]
        self.stay = stay if stay is not None and len(stay) < x.shape[1] else None
        width = x.shape[1] if self.stay is None else len(self.stay)
        self.dual = len(self.learn) < width
        if self.dual:  # few rows: the columns are cheap to pick
            rows = self._picked(self.learn.t())
            self.gram = (rows.t() @ rows).double()
        else:
            self.gram = self._picked(self._picked((self.learn.t() @ self.learn).double()).t())
        self.scale = float(self.gram.diagonal().sum()) / width
        self._factors: dict[float, torch.Tensor | None] = {}

    def _picked(self, rows: torch.Tensor) -> torch.Tensor:
        """Of a row for each input, those of the inputs that stay."""
        return rows if self.stay is None else rows[self.stay]

    def spread(self, change: torch.Tensor) -> torch.Tensor:
        """A change (kept, out) as one of all inputs, (in, out)."""
        if self.stay is None:
            return change
        full = change.new_zeros((self.learn.shape[1], change.shape[1]))
        return full.index_copy_(0, self.stay, change)

    def factor(self, ridge: float) -> torch.Tensor | None:
        """The Cholesky factor of the Gram matrix with a ridge; None where there is none."""
        if ridge not in self._factors:
            shifted = self.gram.clone()
            shifted.diagonal().add_(ridge * self.scale)
            factor, info = torch.linalg.cholesky_ex(shifted)
            self._factors[ridge] = None if int(info) else factor
        return self._factors[ridge]

    def right(self, r: torch.Tensor) -> torch.Tensor:
        """The right-hand side for outputs (tokens, out), float64."""
        return r.double() if self.dual else self._picked(self.learn.t() @ r).double()

    def change(self, solution: torch.Tensor) -> torch.Tensor:
        """What a solution means for the kept inputs, (kept, out)."""
        return self._picked(self.learn.t()).double() @ solution if self.dual else solution


def fit(
    x: torch.Tensor | Inputs,
    r: torch.Tensor,
    held: int,
    ridges: Sequence[float] = RIDGES,
    bias: bool = False,
) -> Fit:
    """Choose the change of least error on rows that it was not computed from.

    Args:
        x: inputs, (tokens, kept), or these prepared.
        r: what their outputs lack, (tokens, out).
        held: how many of the last rows judge and take no part; 0 < held < tokens.
        ridges: candidates, ascending, in units of the mean diagonal of ``x^T x``; they end where the error rises.
        bias: whether the outputs have a bias that may change.

    Returns:
        The best of the candidates and of no change at all; no change where rows are not finite or all zero.
    """
    inputs = x if isinstance(x, Inputs) else Inputs(x, held, centred=bias)
    r = r.to(inputs.learn.dtype)
    before = float(r[-held:].double().square().sum())
    best = Fit(None, None, before, before)
    mean = r[:-held].mean(0) if bias else None
    learn, judge = (r[:-held], r[-held:]) if mean is None else (r[:-held] - mean, r[-held:] - mean)
    if mean is not None:
        after = float(judge.double().square().sum())
        if after < best.after:
            best = Fit(None, None, before, after, mean.double())
    right = inputs.right(learn)
    if not (0 < inputs.scale < float("inf") and bool(torch.isfinite(right).all())):
        return best
    last = float("inf")
    for ridge in ridges:
        factor = inputs.factor(ridge)
        if factor is None:
            continue
        change = inputs.change(torch.cholesky_solve(right, factor))
        full = inputs.spread(change)
        after = float((judge - inputs.judge @ full.to(judge.dtype)).double().square().sum())
        if after < best.after:
            shift = None
            if mean is not None and inputs.mean is not None:
                shift = mean.double() - inputs.mean.double() @ full
            best = Fit(change, ridge, before, after, shift)
        if after > last:
            break
        last = after
    return best
