"""The importances, one function each: how much a group matters. One registry holds them all, of four sorts.

``weights`` (:func:`register`)
    From a weight's value and its gradient, element by element. With ``kernel`` left out the formula takes the general
    path, where the function itself is evaluated on one parameter at a time.
``draw`` (:func:`register_draw`)
    From a random generator.
``inputs`` (:func:`register_inputs`)
    From what the weights that consume an axis see (:mod:`llmprune.scoring.activation_scores` runs the pass).
``layers`` (:func:`register_layers`)
    From the stream before and after a block (:mod:`llmprune.scoring.layer_scores` runs the pass); nothing smaller has
    one.

To add one, write one function here, with formula and source in its docstring, under the decorator of its sort. It then
works in ``score``, on the command line and, for ``weights``, with every aggregation.

Notation, as in ``score``: ``w`` a parameter, ``g`` the mean over the calibration samples of the gradient ``g_j`` of a
sample's mean next-token loss, ``s`` the mean over the samples of ``g_j ** 2``; all of one shape. Such a function gives
the importance of each element. A structure (one index of one dimension) gets ``finish`` of the sum over its elements.
For ``inputs``, ``W`` (out x in) is the consuming weight, ``x`` its inputs over the calibration tokens and ``P`` the
inputs of a group; the function gets the axis' consumers and returns one number per group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from llmprune.errors import InputError
from llmprune.repair.moments import ROUNDS, Consumer, Shrinking

Element = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``w``, ``g``, ``s`` to the importance of each element; arguments a formula does not need are passed as ``w``."""
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
"""A generator and a shape to scores of that shape."""
OfInputs = Callable[[Sequence[Consumer]], np.ndarray]
"""The consumers of an axis to the scores of its groups, float64."""
OfStream = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The stream before and after a block, (..., channels) in float64, to the score of each token, (...)."""
Finish = Callable[[np.ndarray], np.ndarray]

SORTS = ("weights", "draw", "inputs", "layers")


@dataclass(frozen=True)
class Importance:
    """A registered importance.

    Attributes:
        name: What users write.
        sort: What it is computed from, one of :data:`SORTS`.
        function: The formula: an :data:`Element`, :data:`Draw`, :data:`OfInputs` or :data:`OfStream` by its sort.
        order: 0 needs the weights alone, 1 also ``g``, 2 also ``s`` (of sort ``weights``).
        finish: From the sums over structures to their importances.
        kernel: The name by which ``_core`` knows the formula, or None for the general path.
        additive: The elementwise value is linear in ``g``, so that contributions of batches and uses simply add up.
        gram: Of sort ``inputs``: ``E[x x^T]`` is needed whole, not its diagonal alone, and each consumer's curvature.
    """

    name: str
    sort: str
    function: Callable[..., Any]
    order: int = 0
    finish: Finish = lambda sums: sums
    kernel: str | None = None
    additive: bool = False
    gram: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration data."""
        return self.order > 0 or self.sort in ("inputs", "layers")

    def element(self, w: torch.Tensor, g: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The formula of an importance of sort ``weights``."""
        value: torch.Tensor = self.function(w, g, s)
        return value


_REGISTRY: dict[str, Importance] = {}


def _same(sums: np.ndarray) -> np.ndarray:
    return sums


def register(
    order: int, *, kernel: str | None = None, additive: bool = False, finish: Finish = _same
) -> Callable[[Element], Element]:
    """Make the decorated elementwise formula an importance under its own name; see :class:`Importance`."""

    def add(function: Element) -> Element:
        name = function.__name__
        _REGISTRY[name] = Importance(name, "weights", function, order, finish, kernel, additive)
        return function

    return add


def register_draw(function: Draw) -> Draw:
    """Make the decorated function of a random generator an importance under its own name."""
    _REGISTRY[function.__name__] = Importance(function.__name__, "draw", function)
    return function


def register_inputs(*, gram: bool = False) -> Callable[[OfInputs], OfInputs]:
    """Make the decorated function of an axis' consumers an importance; ``gram``: see :class:`Importance`."""

    def add(function: OfInputs) -> OfInputs:
        _REGISTRY[function.__name__] = Importance(function.__name__, "inputs", function, gram=gram)
        return function

    return add


def register_layers(function: OfStream) -> OfStream:
    """Make the decorated function of a block's stream an importance of layers; its mean over tokens is the score."""
    _REGISTRY[function.__name__] = Importance(function.__name__, "layers", function)
    return function


def known() -> list[str]:
    """The names of all importances."""
    return list(_REGISTRY)


def lookup(name: str) -> Importance:
    """The importance called ``name``.

    Raises:
        InputError: there is none; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in _REGISTRY:
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


@register_draw
def random(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform in [0, 1), one generator per axis seeded by (seed, axis id): the baseline that knows nothing."""
    return generator.random(shape)


@register_layers
def block_influence(into: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``1 - cos(in, out)`` of a block, averaged over tokens (ShortGPT, Men et al. 2024, eq. 1): of layers only."""
    return 1 - F.cosine_similarity(into, out, dim=-1)


@register_inputs()
def activation(consumers: Sequence[Consumer]) -> np.ndarray:
    """``sqrt(sum E[x_i^2])``: the L2 norm of the group's activations (Minitron, Muralidharan et al. 2024, sec. 2.2)."""
    return np.asarray(np.sqrt(np.sum([c.grouped(c.seen.mean_square) for c in consumers], axis=0)))


@register_inputs()
def fluctuation(consumers: Sequence[Consumer]) -> np.ndarray:
    """``Var(x_i) |W_:i|^2``, summed over the group's inputs: how far from constant what it contributes is.

    FLAP, An et al. 2023, eq. 5.
    """
    norms = (c.matrix.double().square().sum(1) for c in consumers)
    sums = [c.grouped(c.seen.variance * norm) for c, norm in zip(consumers, norms, strict=True)]
    return np.asarray(np.sum(sums, axis=0))


@register_inputs(gram=True)
def obs(consumers: Sequence[Consumer]) -> np.ndarray:
    """``c tr(W_P [(H^-1)_PP]^-1 W_P^T)`` with ``H = E[x x^T]`` plus a ridge: the loss that repair cannot make good.

    The trace is the squared output error that is left, ``c`` half the mean square of the loss' gradient at an output:
    the Hessian by its Kronecker factors (Martens & Grosse 2015), that of the outputs a multiple of the identity.
    Repair: the weights of the inputs that stay make good what they can (optimal brain surgeon, Hassibi & Stork 1993;
    for groups: OBC, Frantar & Alistarh 2022, eq. 3; ZipLM, Kurtic et al. 2023, eq. 3). Groups go in rounds, each round
    the least of what is left; after each, ``H^-1`` and ``W`` become those of the smaller layer. A group's score is its
    error when it went, and always more than that of one which went before it.
    """
    layers = [Shrinking(consumer) for consumer in consumers]
    count = len(consumers[0].groups)
    scores = np.zeros(count)
    alive = torch.arange(count, device=layers[0].groups.device)
    highest = 0.0
    while len(alive):
        errors = torch.stack([layer.errors(alive) for layer in layers]).sum(0)
        order = torch.argsort(errors, stable=True)[: max(1, len(alive) // ROUNDS)]
        for place in order.tolist():
            # The order is told by the scores.
            highest = max(np.nextafter(highest, np.inf), float(errors[place]))
            scores[int(alive[place])] = highest
        gone = alive[order]
        if len(gone) < len(alive):
            for layer in layers:
                layer.remove(gone)
        stays = torch.ones(len(alive), dtype=torch.bool, device=alive.device).index_fill_(0, order, False)
        alive = alive[stays]
    return scores
