"""Builds the C extensions ``llmprune._core`` and, where nvcc is, ``llmprune._cuda``; the rest is in pyproject.toml.

Environment:
    LLMPRUNE_WERROR=1     warnings of the compilers are errors (the project's own checks build this way)
    CC                    the C compiler, gcc or clang
    LLMPRUNE_CUDA         auto (the default): build _cuda where nvcc and cuBLAS are found, else say why not; 0: do not;
                          1: build it or fail
    LLMPRUNE_CUDA_ARCHS   targets, "80;90" or "80,90"; the last one's PTX is added for newer devices
    NVCC                  the CUDA compiler; else CUDA_HOME or CUDA_PATH, then the PATH, then /usr/local/cuda
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ("csrc/core/*.c", "csrc/kernels/cpu/*.c", "csrc/binding/*.c")
HEADERS = ("csrc/core/*.h", "csrc/kernels/cpu/*.h", "csrc/kernels/cuda/*.h", "csrc/binding/*.h")
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion"]
CUDA_SOURCES = ("csrc/core/status.c", "csrc/kernels/cuda/*.c", "csrc/binding/cuda/*.c")
CUDA_KERNELS = ("csrc/kernels/cuda/*.cu",)
CUDA_HEADERS = ("csrc/core/*.h", "csrc/kernels/cuda/*.h", "csrc/kernels/cuda/*.cuh")
HOPPER = "hopper.cu"
CUDA_ARCHS = "75;80;86;89;90;100;120"


def matching(patterns: tuple[str, ...]) -> list[str]:
    return sorted(path for pattern in patterns for path in glob(pattern))


def package_directory(name: str) -> Path | None:
    """Directory of an installed package, found without importing it."""
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:  # its parent package is not there either
        return None
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


class NoCuda(Exception):
    """Why the CUDA kernels cannot be built here."""


class Toolkit:
    """nvcc and the headers and libraries the CUDA kernels need.

    Raises:
        NoCuda: something is missing; the message says what.
    """

    def __init__(self) -> None:
        self.nvcc = self._find_nvcc()
        release = re.search(r"release (\d+)\.", self._output("--version"))
        self.major = int(release.group(1)) if release else 0
        if self.major < 12:
            raise NoCuda(f"{self.nvcc} is of CUDA {self.major}, and 12 or newer is needed")
        # What nvcc itself would use: its own folder's, wherever a wrapper on the PATH leads.
        top = re.search(
            r"^#\$ TOP=(.*)$", self._output("--dryrun", "-E", "-x", "cu", os.devnull), re.MULTILINE
        )
        self.root = Path(top.group(1)).resolve() if top else Path(self.nvcc).resolve().parent.parent
        self.compresses = "--compress-mode" in self._output("--help")
        roots = [self.root, *self._packages()]
        self.cublas_header = self._find(roots, ["include"], "cublas_v2.h", "cuBLAS' headers")
        library = f"libcublas.so.{self.major}"
        self.cublas_library = self._find(roots, ["lib64", "lib"], library, library)
        self.cudart = self._find(roots, ["lib64", "lib"], "libcudart_static.a", "the static CUDA runtime")

    @staticmethod
    def _find_nvcc() -> str:
        wished = os.environ.get("NVCC")
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
        candidates = [
            wished,
            *(f"{home}/bin/nvcc" for home in homes if home),
            "nvcc",
            "/usr/local/cuda/bin/nvcc",
        ]
        for candidate in filter(None, candidates):
            found = shutil.which(candidate)
            if found:
                return found
            if candidate == wished:
                raise NoCuda(f"NVCC is {wished}, which is no program")
        raise NoCuda("there is no nvcc: install a CUDA toolkit, or set CUDA_HOME or NVCC")

    def _output(self, *arguments: str) -> str:
        try:
            done = subprocess.run([self.nvcc, *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NoCuda(f"{self.nvcc} does not run: {error}") from error
        return done.stdout + done.stderr

    def _packages(self) -> list[Path]:
        """Folders of NVIDIA's own Python packages: cuBLAS and the runtime as pip installs them."""
        roots = []
        if find_spec("cuda") is not None and package_directory("cuda.pathfinder") is not None:
            from cuda import pathfinder  # type: ignore[import-not-found,unused-ignore]

            finder = getattr(pathfinder, "find_nvidia_header_directory", None)
            directory = finder("cublas") if finder is not None else None
            if directory:
                roots.append(Path(directory).parent)
        nvidia = package_directory("nvidia")
        if nvidia is not None:
            roots += [nvidia / f"cu{self.major}", nvidia / "cublas", nvidia / "cuda_runtime"]
        return roots

    def _find(self, roots: list[Path], folders: list[str], name: str, what: str) -> Path:
        for root in roots:
            for folder in folders:
                if (root / folder / name).exists():
                    return root / folder
        raise NoCuda(
            f"{what} ({name}) is neither under {self.root} nor among the installed packages: "
            f'pip install "nvidia-cublas=={self.major}.*" "nvidia-cuda-runtime=={self.major}.*"'
        )


def wanted_toolkit() -> Toolkit | None:
    """The toolkit to build _cuda with, or None with a word on why it is not built."""
    mode = os.environ.get("LLMPRUNE_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"LLMPRUNE_CUDA is {mode!r}; auto, 0 and 1 are known")
    if mode == "0":
        return None
    try:
        return Toolkit()
    except NoCuda as reason:
        if mode == "1":
            raise SystemExit(f"LLMPRUNE_CUDA=1, but the CUDA kernels cannot be built: {reason}") from reason
        print(f"llmprune: the CUDA kernels are not built: {reason}", file=sys.stderr)
        return None


def archs() -> list[str]:
    """Targets as nvcc numbers them."""
    wished = os.environ.get("LLMPRUNE_CUDA_ARCHS", CUDA_ARCHS)
    targets = [part.strip().removeprefix("sm_") for part in re.split(r"[;,\s]+", wished) if part.strip()]
    if not targets or not all(re.fullmatch(r"\d{2,3}[af]?", target) for target in targets):
        raise SystemExit(f'LLMPRUNE_CUDA_ARCHS is {wished!r}; say "80;90" for sm_80 and sm_90')
    return targets


class BuildExtensions(build_ext):
    """setuptools' own, with .cu files compiled by nvcc first and handed to the linker as objects."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension."""
        if ext is CUDA_EXTENSION and TOOLKIT is not None:
            at_once = max(1, (os.cpu_count() or 1) // len(archs()))  # nvcc has a thread for each target
            with ThreadPoolExecutor(at_once) as workers:
                ext.extra_objects = list(
                    workers.map(lambda source: self._compile_kernel(source, TOOLKIT), matching(CUDA_KERNELS))
                )
        super().build_extension(ext)

    def _compile_kernel(self, source: str, toolkit: Toolkit) -> str:
        target = Path(self.build_temp) / Path(source).with_suffix(".o")
        command = [
            toolkit.nvcc,
            "-std=c++17",
            "-O3",
            "-Icsrc",
            f"-I{toolkit.cublas_header}",
            "-c",
            source,
            "-o",
            str(target),
        ]
        command += ["-Xcompiler", ",".join(["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wshadow"])]
        if WERROR:
            command += ["-Werror", "all-warnings", "-Xcompiler", "-Werror"]
        targets = archs()
        if Path(source).name == HOPPER:  # what it uses is in this target alone, and in no newer one
            targets = ["90a"] if {"90", "90a"} & set(targets) else targets
            command += [] if targets == ["90a"] else ["-DLP_NO_HOPPER"]
        for arch in targets:
            command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        if targets[-1].isdigit():
            command += ["-gencode", f"arch=compute_{targets[-1]},code=compute_{targets[-1]}"]
        command += ["--threads", "0"]
        if toolkit.compresses:
            command += ["--compress-mode=size"]
        stamp = target.with_suffix(".command")
        depends = [source, *matching(CUDA_HEADERS), "setup.py"]
        if (
            not self.force
            and target.exists()
            and stamp.exists()
            and stamp.read_text() == "\n".join(command)
            and all(os.path.getmtime(path) <= target.stat().st_mtime for path in depends)
        ):
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.announce(f"nvcc {source} for {', '.join(f'sm_{arch}' for arch in targets)}", level=2)
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"nvcc could not compile {source}; LLMPRUNE_CUDA=0 builds llmprune without CUDA")
        stamp.write_text("\n".join(command))
        return str(target)


def cuda_extension(toolkit: Toolkit) -> Extension:
    return Extension(
        "llmprune._cuda",
        sources=matching(CUDA_SOURCES),
        depends=[*matching(CUDA_KERNELS), *matching(CUDA_HEADERS), "setup.py"],
        include_dirs=["csrc"],
        define_macros=[("_GNU_SOURCE", "1")],
        extra_compile_args=[*flags, "-pthread"],
        library_dirs=[str(toolkit.cudart), str(toolkit.cublas_library)],
        # PyPI's package has no unversioned name to link with, and a toolkit has this one too.
        libraries=["cudart_static", f":libcublas.so.{toolkit.major}", "rt", "dl"],
        extra_link_args=["-pthread", f"-Wl,-rpath-link,{toolkit.cublas_library}"],
        language="c++",
    )


WERROR = os.environ.get("LLMPRUNE_WERROR") == "1"
flags = ["-std=c11", "-O3", "-fvisibility=hidden", *WARNINGS]
if WERROR:
    flags.append("-Werror")

core = Extension(
    "llmprune._core",
    sources=matching(SOURCES),
    depends=[*matching(HEADERS), "setup.py"],
    include_dirs=["csrc", numpy.get_include()],
    define_macros=[("_GNU_SOURCE", "1"), dlpack_define()],
    extra_compile_args=[*flags, "-pthread"],
    extra_link_args=["-pthread"],
)
TOOLKIT = wanted_toolkit()
CUDA_EXTENSION: Any = cuda_extension(TOOLKIT) if TOOLKIT is not None else None

setup(
    ext_modules=[core, *([CUDA_EXTENSION] if CUDA_EXTENSION is not None else [])],
    cmdclass={"build_ext": BuildExtensions},
)
