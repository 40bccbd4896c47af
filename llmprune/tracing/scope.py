"""Scopes: the part of a model that a plan may take from, named by the path of a module or the end of one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from llmprune.errors import InputError


def under(name: str, scope: str) -> bool:
    """Whether a parameter or module lies at or below the module ``scope``."""
    return name == scope or name.startswith(scope + ".")


def resolve(names: Iterable[str], scope: str) -> str:
    """The full path of the module that ``scope`` names: a path, or the end of just one (``vision_tower``).

    Args:
        names: the model's parameters.
        scope: what the user wrote.

    Raises:
        InputError: no module with parameters has such a path, or several do; the nearest are named.
    """
    if not isinstance(scope, str):
        raise InputError(f"scope must be the path of a module, not {scope!r}")
    paths: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        paths |= dict.fromkeys(".".join(parts[:length]) for length in range(1, len(parts) + 1))
    if scope in paths:
        return scope
    ends = [path for path in paths if path.endswith("." + scope)]
    if len(ends) == 1:
        return ends[0]
    if ends:
        shown = ", ".join(ends[:4]) + (", ..." if len(ends) > 4 else "")
        raise InputError(
            f"the scope {scope!r} names {len(ends)} modules ({shown}): give one module's full path"
        )
    last = {path.rpartition(".")[2]: path for path in reversed(paths)}
    near = get_close_matches(scope, paths, 3) or [last[end] for end in get_close_matches(scope, last, 3)]
    near = near or [path for path in paths if "." not in path][:3]
    raise InputError(
        f"no parameter lies under the scope {scope!r}: the nearest modules are {', '.join(near)}"
    )
