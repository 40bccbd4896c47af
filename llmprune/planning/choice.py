"""The arguments that say what may go, checked for any graph before anybody pays for a graph and scores."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from numbers import Real

from llmprune.arguments import is_whole
from llmprune.compaction.norms import NORMS
from llmprune.errors import InputError
from llmprune.planning.allocation import ALLOCATIONS
from llmprune.tracing.sublayers import PARTS

KINDS = (
    "head",
    "query",
    "ffn",
    "channel",
    "expert",
    "layer",
    *PARTS,
    "head_dim",
    "value_dim",
    "rank",
    "state",
    "other",
)
"""Every kind an axis can have."""


def check_choice(
    ratio: float | Mapping[str, float] | None,
    *,
    kinds: Sequence[str] = ("head", "ffn"),
    allocation: str = "auto",
    protect_first: int | None = None,
    protect_last: int | None = None,
    round_to: int | str = 1,
    norms: str = "rescaled",
    tp: int = 1,
) -> None:
    """Refuse what :func:`llmprune.plan` refuses of these arguments for any graph.

    Args:
        ratio: as there, like the others; None where a target of another kind stands in its place.
        kinds: kinds of axes that may give.
        allocation: how the budget is shared out.
        protect_first: layers left whole at the start.
        protect_last: layers left whole at the end.
        round_to: kept FFN channels per layer are a multiple of this, or ``auto``.
        norms: what a norm becomes that loses positions.
        tp: devices that a layer is to be split over.

    Raises:
        InputError: an argument outside its domain.
    """
    check_kinds(list(ratio) if isinstance(ratio, Mapping) and not isinstance(kinds, str) else kinds)
    if isinstance(ratio, Mapping):
        for kind, share in ratio.items():
            if not isinstance(share, Real) or not 0 <= share < 1:
                raise InputError(f"the share of {kind} to remove must lie in [0, 1), not {share!r}")
    elif ratio is not None and not isinstance(ratio, Real):
        raise InputError(f"ratio must be a number, or a mapping from kinds to numbers, not {ratio!r}")
    elif ratio is not None and not 0 < ratio < 1:
        raise InputError(f"ratio must lie strictly between 0 and 1, not {ratio}")
    if isinstance(ratio, Mapping) and allocation in ("sensitivity", "search"):
        raise InputError(
            f"allocation {allocation!r} shares out a budget of parameters, but shares of each kind leave nothing to "
            "share out: give one ratio"
        )
    if allocation not in ALLOCATIONS:
        raise InputError(f"unknown allocation {allocation!r}: there are {', '.join(ALLOCATIONS)}")
    if not isinstance(ratio, Mapping) and "layer" in kinds and set(kinds) & set(PARTS):
        raise InputError(
            "whole layers and parts of layers compete for one ratio: give a share for each of these kinds, as in "
            "{'layer': 0.1, 'attention': 0.2}"
        )
    check_norms(norms)
    for name, value, least in (
        ("protect_first", protect_first, 0),
        ("protect_last", protect_last, 0),
        ("round_to", 1 if round_to == "auto" else round_to, 1),
        ("tp", tp, 1),
    ):
        missing = value is None and name.startswith("protect")  # the paper's, scaled
        if not missing and not is_whole(value, least):
            other = " or 'auto'" if name == "round_to" else ""
            raise InputError(f"{name} must be an integer of at least {least}{other}, not {value!r}")


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise InputError unless these are kinds of axes, one at least."""
    if isinstance(kinds, str):
        raise InputError(f"kinds must be a sequence of names like ({kinds!r},), not the string {kinds!r}")
    if not isinstance(kinds, Collection):
        raise InputError(f"kinds must be a sequence of names, not {kinds!r}")
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"unknown kind {kind!r}: the kinds are {', '.join(KINDS)}")
    if not list(kinds):
        raise InputError(f"no kind of axis to prune was named: the kinds are {', '.join(KINDS)}")


def check_norms(norms: str) -> None:
    """Raise InputError unless this is a treatment of norms."""
    if norms not in NORMS:
        raise InputError(f"unknown treatment of norms {norms!r}: there are {' and '.join(NORMS)}")
