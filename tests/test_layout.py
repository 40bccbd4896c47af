"""The rules of the house that a reader could break without noticing."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for folder in ("csrc", "llmprune", "tests", "benchmarks", "demo")
    for suffix in ("*.c", "*.h", "*.cu", "*.cuh", "*.cpp", "*.py", "*.pyi")
    for path in (ROOT / folder).rglob(suffix)
)
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
MAX_LINES = 700


def includes(path: Path) -> set[str]:
    return set(INCLUDE.findall(path.read_text(encoding="utf-8")))


def c_files(folder: str) -> list[Path]:
    files = [
        path
        for path in SOURCES
        if path.is_relative_to(ROOT / "csrc" / folder) and path.suffix in (".c", ".h", ".cu", ".cuh")
    ]
    assert files, f"no C files under csrc/{folder}: has the room moved?"
    return files


def test_only_the_binding_includes_python() -> None:
    suffixes = (".c", ".h", ".cu", ".cuh", ".cpp")
    outside = [path for path in SOURCES if path.suffix in suffixes and "binding" not in path.parts]
    assert outside
    assert [str(path) for path in outside if "Python.h" in includes(path)] == []
    assert any("Python.h" in includes(path) for path in c_files("binding"))


def test_the_core_knows_nothing_of_the_binding() -> None:
    for path in c_files("core"):
        assert not any(name.startswith(("binding/", "numpy/")) for name in includes(path)), path


def test_kernels_include_nothing_of_the_graph() -> None:
    allowed = {"core/status.h", "core/backend.h"}
    for path in c_files("kernels"):
        assert {
            name for name in includes(path) if name.startswith(("core/", "../core", "binding/"))
        } <= allowed, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_no_exception_is_swallowed_unseen() -> None:
    swallowing = re.compile(r"except\s*:|except (Base)?Exception\s*:\s*pass")
    python = [path for path in SOURCES if path.suffix == ".py"]
    assert [str(path) for path in python if swallowing.search(path.read_text("utf-8"))] == []


def test_no_path_of_one_machine_is_committed() -> None:
    """Absolute home, root and temporary paths belong to whoever wrote them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout (a source distribution)")
    machine = re.compile(r"(?<![\w.])/(?:home|root|work|Users|tmp)/\w")
    offenders = []
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        if not path.is_file() or path.suffix in {".safetensors", ".png", ".bin"}:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        offenders += [f"{name}: {match.group()}" for match in machine.finditer(text)]
    assert offenders == []


def test_no_macro_of_the_compilers_fast_math() -> None:
    build = (ROOT / "setup.py").read_text("utf-8") + (ROOT / "tests" / "c.mk").read_text("utf-8")
    for flag in ("-ffast-math", "-Ofast", "-march=native", "-funsafe-math"):
        assert flag not in build
