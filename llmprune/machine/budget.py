"""How much memory a job may take: sizes as people write them, and what the process and the machine have now."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
from contextlib import suppress

from llmprune.errors import InputError

log = logging.getLogger(__name__)

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(size: int | str) -> int:
    """Bytes: an integer, or text like ``4GB`` (10^9), ``512MiB`` (2^20).

    Raises:
        InputError: it is neither, or not positive.
    """
    value = size if isinstance(size, int) and not isinstance(size, bool) else None
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", size, re.IGNORECASE)
        if found is not None and not (found[3] and not found[2]):
            value = int(float(found[1]) * (_BINARY if found[3] else _UNITS)[found[2].lower()])
    if value is None or value <= 0:
        raise InputError(f"{size!r} is no amount of memory: give bytes, or text like 4GB or 512MiB")
    return value


def spell_bytes(size: float) -> str:
    """Bytes as text that :func:`parse_bytes` reads as no less."""
    unit, text = (10**9, "GB") if size >= 10**9 else (10**6, "MB")
    return f"{-(-size * 100 // unit) / 100:.2f}{text}" if unit == 10**9 else f"{-(-size // unit):.0f}{text}"


def resident_memory() -> int:
    """Bytes of memory that the process has now; 0 where the system does not tell."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def told_memory() -> int | None:
    """Bytes of host memory that can be had without swapping; None where the system does not tell."""
    with suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def available_memory() -> int:
    """Bytes of host memory that can be had without swapping, by guess where the system does not tell."""
    told = told_memory()
    if told is None:
        log.debug("no /proc/meminfo: taking half the physical memory as available")
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return told


def return_memory() -> None:
    """Hand pages that are free inside the C library's heap back to the system, where it is glibc; else do nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
