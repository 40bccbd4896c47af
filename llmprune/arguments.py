"""What an argument has to be, where more than one function asks."""

from __future__ import annotations

from typing import TypeGuard


def is_whole(value: object, least: int) -> TypeGuard[int]:
    """Whether a value is an ``int`` of at least ``least``; ``True`` is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
