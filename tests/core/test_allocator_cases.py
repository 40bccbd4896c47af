"""Every public C call that can lack memory has a case in test_allocator.c, which refuses each of its allocations."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ("core/status.h", "core/select.h", "core/axis.h", "core/graph.h")
CALL = re.compile(r"^lp_status (lp_\w+)\(([^;]*)\);", re.MULTILINE)
OPERATION = re.compile(r"lp_status \(\*(\w+)\)\(([^;]*)\);")
MEMORY = re.compile(r"lp_allocator|\blp_axes \*|\blp_graph \*|\blp_exec \*")
"""What a call reaches an allocator by: itself, an object that keeps one, or the way an operation runs."""


def entries() -> set[str]:
    """The calls of the public headers that are handed an allocator or something that holds one."""
    found = set()
    for header in HEADERS:
        text = (ROOT / "csrc" / header).read_text("utf-8")
        found |= {name for name, parameters in CALL.findall(text) if MEMORY.search(parameters)}
    table = (ROOT / "csrc/core/backend.h").read_text("utf-8")
    found |= {name for name, parameters in OPERATION.findall(table) if MEMORY.search(parameters)}
    return found


def test_each_entry_has_a_case_that_calls_it() -> None:
    source = (ROOT / "tests/core/test_allocator.c").read_text("utf-8")
    called = set(re.findall(r"ENTRY\((?:table->)?(\w+)\(", source))
    listed = re.findall(r"^    CASE\((\w+), \w+\),$", source, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == entries()
    assert set(listed) <= called


def test_every_header_of_the_core_that_is_public_is_read() -> None:
    internal = {"axis_internal.h", "graph_internal.h", "rules.h", "backend.h"}
    there = {f"core/{path.name}" for path in (ROOT / "csrc/core").glob("*.h") if path.name not in internal}
    assert there == set(HEADERS)
    assert len(entries()) > 35
