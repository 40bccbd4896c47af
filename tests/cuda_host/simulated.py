"""Stands in for a CUDA device: the CUDA backend's own sources run on the CPU, registered with ``_core``.

Registration is for the whole process, so what uses this runs in one of its own (``tests/cuda_host/test_binding.py``).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from llmprune import _core

CAPSULE = b"llmprune._cuda.table"
CUDA = 2

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class State(ctypes.Structure):
    """simt_device_state of cuda_runtime.h."""

    _fields_ = [
        ("devices", ctypes.c_int),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
        ("processors", ctypes.c_int),
        ("fail", ctypes.c_int),
        ("capturing", ctypes.c_bool),
        ("launches", ctypes.c_size_t),
        ("clusters", ctypes.c_int),
        ("maps", ctypes.c_bool),
        ("products", ctypes.c_size_t),
    ]


class Simulated:
    """The library, its table as a capsule, and what the simulated device does next."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.lp_cuda.restype = ctypes.c_void_p
        self.device = State.in_dll(self.library, "simt_device")

    def capsule(self) -> Any:
        return _new_capsule(self.library.lp_cuda(), CAPSULE, None)

    def register(self) -> int:
        return _core.register_cuda(self.capsule())


class OnDevice:
    """A CPU tensor that says it lies on a CUDA device; ``asked`` are the streams its capsules were asked for."""

    def __init__(self, tensor: torch.Tensor, device: int = 0):
        self.tensor, self.device = tensor, device
        self.asked: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return (CUDA, self.device)

    def __dlpack__(self, *, stream: Any = None, **keywords: Any) -> Any:
        self.asked.append(stream)
        capsule = self.tensor.__dlpack__(max_version=(1, 0))
        # DLManagedTensorVersioned: version, context, deleter, flags, then the tensor's data pointer and device.
        device = (ctypes.c_int32 * 2).from_address(_get_pointer(capsule, b"dltensor_versioned") + 40)
        device[0], device[1] = CUDA, self.device
        return capsule


def scratch(nbytes: int = 1 << 20, device: int = 0) -> OnDevice:
    """Scratch filled with NaN, aligned as the device's allocator aligns."""
    whole = torch.full((nbytes + 256,), 255, dtype=torch.uint8)
    start = -whole.data_ptr() % 256
    return OnDevice(whole[start : start + nbytes], device)
