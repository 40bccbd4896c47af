"""The CUDA kernels of ``llmprune._cuda``: loaded when the first tensor on a CUDA device asks for them.

``import llmprune`` touches no device. A failure to load is remembered: later calls raise it again, with its reason, and
``llmprune doctor`` prints it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llmprune import _core
from llmprune.errors import DeviceError, InputError

log = logging.getLogger(__name__)

SCRATCH_BYTES = 64 << 20
"""Device memory that one kernel call may use beside its arguments."""

Positions = Any
"""Kept positions of one dimension: a sorted int64 array."""


@functools.cache
def unavailable() -> str | None:
    """Why there is no usable CUDA backend, as one sentence; None if there is one. Loads it the first time.

    The answer holds for the rest of the process: a driver does not appear in it.
    """
    if find_spec("llmprune._cuda") is None:
        return "this installation of llmprune was built without CUDA (LLMPRUNE_CUDA=1 builds it)"
    try:
        _preload_cublas()
        extension = importlib.import_module("llmprune._cuda")
        _core.register_cuda(extension.table)
    except (ImportError, OSError) as error:
        return f"llmprune._cuda cannot be loaded: {error}"
    except (DeviceError, MemoryError) as error:
        return str(error)
    return None


def load(name: str) -> None:
    """See that the backend is there, for the argument ``name``, which lies on a CUDA device; ``_core`` calls this.

    Raises:
        DeviceError: it is not; the message says why.
    """
    reason = unavailable()
    if reason is not None:
        raise DeviceError(f"{name}: the tensor is on device cuda, where llmprune cannot work: {reason}")


def _preload_cublas() -> None:
    """Load the cuBLAS that pip installed, where it is: the dynamic linker does not look there by itself.

    Where it is not, or a CUDA build of torch has loaded its own already, the linker finds what there is.
    """
    if find_spec("cuda") is not None and _has("cuda.pathfinder"):
        from cuda import pathfinder  # type: ignore[import-not-found,import-untyped,unused-ignore]

        try:
            pathfinder.load_nvidia_dynamic_lib("cublas")
        except Exception as error:  # noqa: BLE001  # a class of pathfinder's own; the linker has the last word
            log.debug("cuda-pathfinder finds no cuBLAS: %s", error)
        else:
            return
    spec = find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec is not None else ():
        for library in sorted(Path(place).glob("cu*/lib/libcublas.so.*")):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def usable_device(device: str | torch.device) -> torch.device:
    """The CPU, or a CUDA device with its number.

    Raises:
        InputError: it is neither.
        DeviceError: llmprune cannot use it.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"{device!r} is no device: say cpu, cuda, or cuda:1") from error
    if found.type == "cpu":
        return found
    if found.type != "cuda":
        raise InputError(f"blocks can run on the CPU or on a CUDA device, not on {device}")
    reason = unavailable()
    if reason is not None:
        raise DeviceError(f"blocks cannot run on {device}: {reason}")
    count = torch.cuda.device_count()
    if (found.index or 0) >= count:
        raise DeviceError(f"there is no {device}: torch sees {count} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def options(tensor: torch.Tensor, *, scratch: bool = True) -> dict[str, Any]:
    """The keyword arguments by which a kernel of ``_core`` runs where ``tensor`` lies.

    On the CPU torch's number of threads; on a CUDA device torch's current stream and, unless ``scratch`` is off, memory
    from torch's allocator, which gives it out again in the stream's order.
    """
    if tensor.device.type != "cuda":
        return {"threads": torch.get_num_threads()}
    chosen: dict[str, Any] = {"stream": torch.cuda.current_stream(tensor.device).cuda_stream}
    if scratch:
        chosen["scratch"] = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=tensor.device)
    return chosen


def free_memory(device: torch.device) -> int:
    """Bytes of device memory that tensors can have: what the driver has, and what torch's allocator holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def compact_many(tensors: Sequence[torch.Tensor], kept: Sequence[dict[int, Positions]]) -> None:
    """Compact dense tensors on one CUDA device, each in its own memory, all together (``_core.compact_many``).

    Raises:
        DeviceError, MemoryError: the device refused; nothing has moved.
    """
    most = 1024  # tensors of a call, each of which gets its part of the scratch
    for start in range(0, len(tensors), most):
        part, cuts = list(tensors[start : start + most]), list(kept[start : start + most])
        positions = sum(len(where) for cut in cuts for where in cut.values())
        device = part[0].device
        # Half of it describes the moves: 4 bytes a position.
        scratch = torch.empty(SCRATCH_BYTES + 8 * positions, dtype=torch.uint8, device=device)
        _core.compact_many(part, cuts, scratch, stream=torch.cuda.current_stream(device).cuda_stream)
