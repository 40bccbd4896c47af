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
_PROJECTIONS = 64
"""Random directions in which candidates for the ridge are compared where outputs are many more."""


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
        if stay is not None and len(stay) < x.shape[1]:
            self.mean = None if self.mean is None else self.mean[stay]
            x = x[:, stay]
        self.learn, self.judge = x[:-held], x[-held:]
        width = x.shape[1]
        self.dual = len(self.learn) < width
        rows = self.learn if self.dual else self.learn.t()
        self.gram = (rows @ rows.t()).double()
        self.scale = float(self.gram.diagonal().sum()) / width
        self._factors: dict[float, torch.Tensor | None] = {}
        self._heard: torch.Tensor | None = None

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
        return r.double() if self.dual else (self.learn.t() @ r).double()

    def change(self, solution: torch.Tensor) -> torch.Tensor:
        """What a solution means for the kept inputs, (kept, out)."""
        return self.learn.t().double() @ solution if self.dual else solution

    def missed(self, r: torch.Tensor, solution: torch.Tensor) -> float:
        """Squared error that a solution leaves of the held-out outputs (held, out)."""
        if self._heard is None:
            self._heard = self.judge @ self.learn.t() if self.dual else self.judge
        return float((r - self._heard @ solution.to(r.dtype)).double().square().sum())


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
    ridge = _best_ridge(inputs, right, judge, ridges)
    if ridge is None:
        return best
    factor = inputs.factor(ridge)
    assert factor is not None
    solution = torch.cholesky_solve(right, factor)
    after = inputs.missed(judge, solution)
    if after < best.after:
        change, shift = inputs.change(solution), None
        if mean is not None and inputs.mean is not None:
            shift = mean.double() - inputs.mean.double() @ change
        best = Fit(change, ridge, before, after, shift)
    return best


def _best_ridge(
    inputs: Inputs, right: torch.Tensor, judge: torch.Tensor, ridges: Sequence[float]
) -> float | None:
    """The ridge of the least held-out error; None where no Gram matrix has a factor.

    Of many outputs random projections are compared: the sum of squares over them is that over the outputs times a
    number near one, which all candidates share (Johnson & Lindenstrauss 1984).
    """
    if judge.shape[1] > 2 * _PROJECTIONS:
        draw = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (judge.shape[1], _PROJECTIONS), generator=draw) * 2.0 - 1.0
        right, judge = right @ signs.to(right), judge @ signs.to(judge)
    best, last = None, float("inf")
    for ridge in ridges:
        factor = inputs.factor(ridge)
        if factor is None:
            continue
        after = inputs.missed(judge, torch.cholesky_solve(right, factor))
        if after >= last:
            break
        best, last = ridge, after
    return best
