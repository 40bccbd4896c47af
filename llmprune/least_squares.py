"""The least squares behind repair: weights of the inputs that stay, chosen so that outputs change least.

With inputs ``x`` (tokens x kept) that a consumer still gets, and ``r`` (tokens x out) what is missing from its outputs,
the change ``d`` (kept x out) of its transposed weight minimises ``|x d - r|^2 + l |d|^2``: ridge toward the weights as
they are, ``d = (x^T x + l)^-1 x^T r``. For ``r`` the contribution of the removed inputs this is the closed form of
OSSCAR (Meng et al., arXiv:2403.12983) and of SliceGPT's and ZipLM's relatives; ``l`` is a multiple of the mean of the
diagonal of ``x^T x``. With fewer tokens than inputs the same solution comes from the tokens' side, ``d = x^T (x x^T +
l)^-1 r``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """

    change: torch.Tensor | None
    ridge: float | None
    before: float
    after: float


def fit(x: torch.Tensor, r: torch.Tensor, held: int, ridges: Sequence[float] = RIDGES) -> Fit:
    """Choose the change of least error on rows that it was not computed from.

    Args:
        x: inputs, (tokens, kept), any floating dtype; products in float32 or better, factorisations in float64.
        r: what their outputs lack, (tokens, out).
        held: how many of the last rows judge and take no part; 0 < held < tokens.
        ridges: candidates, in units of the mean diagonal of ``x^T x``.

    Returns:
        The best of the candidates and of no change at all; no change where rows are not finite or all zero.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, r = x.to(wide), r.to(wide)
    learn, judge = slice(None, len(x) - held), slice(len(x) - held, None)
    before = float(r[judge].double().square().sum())
    gram, right, transform = _normal_equations(x[learn], r[learn])
    scale = float(gram.diagonal().sum()) / x.shape[1]
    best = Fit(None, None, before, before)
    if not (0 < scale < float("inf") and bool(torch.isfinite(right).all())):
        return best
    for ridge in ridges:
        shifted = gram.clone()
        shifted.diagonal().add_(ridge * scale)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info):
            continue
        change = transform(torch.cholesky_solve(right, factor))
        after = float((r[judge] - x[judge] @ change.to(wide)).double().square().sum())
        if after < best.after:
            best = Fit(change, ridge, before, after)
    return best


def _normal_equations(
    x: torch.Tensor, r: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Gram matrix, right-hand side, and what makes a solution of the two the change: of the smaller of both forms."""
    if len(x) >= x.shape[1]:
        return (x.t() @ x).double(), (x.t() @ r).double(), lambda solution: solution
    return (x @ x.t()).double(), r.double(), lambda solution: x.t().double() @ solution
