"""Builds the C extension ``llmprune._core``; everything else about the package is declared in pyproject.toml.

Environment:
    LLMPRUNE_WERROR=1   warnings of the C compiler are errors (the project's own checks build this way)
    CC                  the compiler, gcc or clang
"""

from __future__ import annotations

import os
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import numpy
from setuptools import Extension, setup

SOURCES = ("csrc/core/*.c", "csrc/kernels/cpu/*.c", "csrc/binding/*.c")
HEADERS = ("csrc/core/*.h", "csrc/kernels/cpu/*.h", "csrc/binding/*.h")
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion"]


def matching(patterns: tuple[str, ...]) -> list[str]:
    return sorted(path for pattern in patterns for path in glob(pattern))


def package_directory(name: str) -> Path | None:
    """Directory of an installed package, found without importing it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def dlpack_define() -> tuple[str, str]:
    """The macro that tells the sources which installed ``dlpack.h`` to include, as a quoted absolute path."""
    for package, header in (("tvm_ffi", "include/dlpack/dlpack.h"), ("torch", "include/ATen/dlpack.h")):
        directory = package_directory(package)
        if directory is not None and (directory / header).is_file():
            return ("LLMPRUNE_DLPACK_H", f'"{(directory / header).as_posix()}"')
    raise SystemExit(
        "llmprune needs dlpack.h to build and neither apache-tvm-ffi nor torch is installed: pip install apache-tvm-ffi"
    )


flags = ["-std=c11", "-O3", "-fvisibility=hidden", *WARNINGS]
if os.environ.get("LLMPRUNE_WERROR") == "1":
    flags.append("-Werror")

setup(
    ext_modules=[
        Extension(
            "llmprune._core",
            sources=matching(SOURCES),
            depends=[*matching(HEADERS), "setup.py"],
            include_dirs=["csrc", numpy.get_include()],
            define_macros=[("_GNU_SOURCE", "1"), dlpack_define()],
            extra_compile_args=[*flags, "-pthread"],
            extra_link_args=["-pthread"],
        )
    ]
)
