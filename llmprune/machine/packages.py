"""Which packages are installed, told without importing them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str | None:
    """Version of an installed distribution; None if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = ((name, installed_version(name)) for name in packages)
    return {name: told for name, told in found if told is not None}
