"""The importances, one function each: how much a weight matters, from its value and its gradient.

To add one, write one function here (formula and source in its docstring) under :func:`register`. It then works in
``score``, on the command line and with every aggregation; with ``kernel`` left out it takes the general path, where the
function itself is evaluated on one parameter at a time.

Notation, as in ``score``: ``w`` a parameter, ``g`` the mean over the calibration samples of the gradient ``g_j`` of a
sample's mean next-token loss, ``s`` the mean over the samples of ``g_j ** 2``; all of one shape. A function returns the
importance of each element. A structure (one index of one dimension) gets ``finish`` of the sum over its elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from llmprune.errors import InputError

Element = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Finish = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Importance:
    """A registered importance.

    Attributes:
        name: What users write.
        order: 0 needs the weights alone, 1 also ``g``, 2 also ``s``; -1 needs not even the weights (random).
        element: The formula, elementwise; arguments it does not need are passed as ``w``.
        finish: From the sums over structures to their importances.
        kernel: The name by which ``_core`` knows the formula, or None for the general path.
        additive: The elementwise value is linear in ``g``, so that contributions of batches and uses simply add up.
        layers: It scores whole blocks (:mod:`llmprune.layer_scores`) and nothing smaller.
        activations: It is read off the inputs of consumers (:mod:`llmprune.activation_scores`), and there are none of
            whole blocks.
    """

    name: str
    order: int
    element: Element
    finish: Finish
    kernel: str | None
    additive: bool
    layers: bool = False
    activations: bool = False


_REGISTRY: dict[str, Importance] = {}


def _same(sums: np.ndarray) -> np.ndarray:
    return sums


def register(
    order: int,
    *,
    kernel: str | None = None,
    additive: bool = False,
    finish: Finish = _same,
    layers: bool = False,
    activations: bool = False,
) -> Callable[[Element], Element]:
    """Make the decorated elementwise formula an importance under its own name; see :class:`Importance`."""

    def add(element: Element) -> Element:
        name = element.__name__
        _REGISTRY[name] = Importance(name, order, element, finish, kernel, additive, layers, activations)
        return element

    return add


def known() -> list[str]:
    """The names of all importances."""
    return list(_REGISTRY)


def lookup(name: str) -> Importance:
    """The importance called ``name``.

    Raises:
        InputError: there is none; the message lists the known ones.
    """
    if name not in _REGISTRY:
        raise InputError(f"unknown importance {name!r}: the known ones are {', '.join(_REGISTRY)}")
    return _REGISTRY[name]


@register(1, kernel="vector", additive=True, finish=np.abs)
def vector(w: torch.Tensor, g: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """``|sum g*w|``: the first-order change of the loss when the structure is zeroed (Ma et al. 2023, eq. 3)."""
    return g * w


@register(1, kernel="element1")
def element1(w: torch.Tensor, g: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """``sum |g*w|``: the same change taken element by element (Ma et al. 2023, eq. 5 to first order)."""
    return (g * w).abs()


@register(2, kernel="element2")
def element2(w: torch.Tensor, g: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """``sum |g*w - w*s*w/2|``: with the Hessian's diagonal by the Fisher information (Ma et al. 2023, eq. 5)."""
    return (g * w - 0.5 * w * s * w).abs()


@register(0, kernel="l1")
def l1(w: torch.Tensor, g: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """``sum |w|``: magnitude."""
    return w.abs()


@register(0, kernel="l2", finish=np.sqrt)
def l2(w: torch.Tensor, g: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """``sqrt(sum w*w)``: the structure's Euclidean norm (the L2 baseline of Ma et al. 2023, table 1)."""
    return w * w


@register(-1)
def random(w: torch.Tensor, g: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Uniform in [0, 1), one generator per axis seeded by (seed, axis id): the baseline that knows nothing."""
    raise NotImplementedError("random scores are drawn per axis and have no elementwise formula")


@register(1, layers=True)
def block_influence(w: torch.Tensor, g: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """``1 - cos(in, out)`` of a block, averaged over tokens (ShortGPT, Men et al. 2024, eq. 1): of layers only."""
    raise NotImplementedError("block influence is that of a block's stream and has no elementwise formula")


@register(1, activations=True)
def obs(w: torch.Tensor, g: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """``tr(W_P [(H^-1)_PP]^-1 W_P^T)``: the output error left after optimal repair, in rounds (OBC, 2022, eq. 3)."""
    raise NotImplementedError("obs scores whole groups of inputs and has no elementwise formula")


@register(1, activations=True)
def fluctuation(w: torch.Tensor, g: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """``Var(x_i) |W_:i|^2``: how far from constant what a group contributes is (FLAP, An et al. 2023, eq. 5)."""
    raise NotImplementedError("fluctuation is that of a consumer's inputs and has no elementwise formula")


@register(1, activations=True)
def activation(w: torch.Tensor, g: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """``sqrt(sum E[x_i^2])``: the L2 norm of the group's activations (Minitron, 2024, section 2.2)."""
    raise NotImplementedError("activation is that of a consumer's inputs and has no elementwise formula")
