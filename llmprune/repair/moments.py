"""What the consumers of an axis saw of it over the calibration tokens, and how one shrinks while groups go."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from llmprune.repair.consumers import Use

RIDGE = 0.01
"""Added to the Gram matrix, in units of its mean diagonal."""
ROUNDS = 8
"""A round of ``obs`` takes one in so many of the groups that are left, at least one."""
WORTH = 0.8
"""The share of the inputs that is left when those that went are dropped."""

Positions = np.ndarray


@dataclass
class Moments:
    """Sums over the tokens that a use saw."""

    count: int = 0
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    square: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    """Elementwise, or whole (in x in) where it is needed."""

    def add(self, x: torch.Tensor, whole: bool) -> None:
        """Count more tokens in, x (tokens, in)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.count += len(x)
        self.total = self.total + x.sum(0).double()
        self.square = self.square + (x.t() @ x if whole else x.square().sum(0)).double()

    @property
    def mean_square(self) -> torch.Tensor:
        """``E[x^2]``, or ``E[x x^T]``, float64."""
        mean: torch.Tensor = self.square / self.count
        return mean

    @property
    def variance(self) -> torch.Tensor:
        """Of each input, (in,), float64; of elementwise sums."""
        variance: torch.Tensor = self.mean_square - (self.total / self.count).square()
        return variance.clamp(min=0)


@dataclass
class Consumer:
    """A weight that contracts an axis, with what it saw, and for each group which of its inputs are the group's."""

    matrix: torch.Tensor
    """(inputs, outputs), a view of the weight."""
    seen: Moments
    groups: Positions
    """(groups, inputs of each)."""
    use: Use
    curvature: float = 1.0
    """What a squared error of one output costs: half the mean square of the loss' gradient there; 1 if unknown."""

    def grouped(self, values: torch.Tensor) -> np.ndarray:
        """Sums over the inputs of each group: (in,) to (groups,)."""
        sums: np.ndarray = values.cpu().numpy()[self.groups].sum(1)
        return sums


class Shrinking:
    """One consumer while its groups go: the inverse Gram matrix and the weight over the inputs that are left."""

    def __init__(self, consumer: Consumer) -> None:
        gram = consumer.seen.mean_square
        scale = float(gram.diagonal().mean()) or 1.0
        gram.diagonal().add_(RIDGE * scale)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        self.weight: torch.Tensor = consumer.matrix.t().double() * consumer.curvature**0.5
        self.groups = torch.as_tensor(consumer.groups, device=gram.device)
        self.left = torch.ones(len(gram), dtype=torch.bool, device=gram.device)

    def errors(self, alive: torch.Tensor) -> torch.Tensor:
        """The output error of removing each group of ``alive``."""
        groups = self.groups[alive]
        if groups.shape[1] == 1:
            column = groups[:, 0]
            return self.weight[:, column].square().sum(0) / self.inverse.diagonal()[column]
        blocks = self.inverse[groups[:, :, None], groups[:, None, :]]
        parts = self.weight[:, groups].permute(1, 2, 0)
        solved: torch.Tensor = torch.linalg.solve(blocks, parts)
        return (parts * solved).sum((1, 2))

    def remove(self, gone: torch.Tensor) -> None:
        """Take groups out: what is left of the weight makes good for them.

        What went is zero from then on, and is dropped once it is worth a copy of the rest.
        """
        out = self.groups[gone].flatten()
        rows = self.inverse[out]
        change = torch.linalg.solve(rows[:, out], rows)
        self.weight.addmm_(self.weight[:, out], change, alpha=-1)
        self.inverse.addmm_(rows.t(), change, alpha=-1)  # symmetric: a column that goes is its row
        self.left[out] = False
        stays = self.left.nonzero().squeeze(1)
        if len(stays) < WORTH * len(self.left):
            self.groups = (self.left.cumsum(0) - 1)[self.groups]
            self.left = self.left[stays]
            self.weight, self.inverse = self.weight[:, stays], self.inverse[stays[:, None], stays]
