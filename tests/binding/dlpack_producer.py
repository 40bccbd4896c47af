"""Producers of DLPack capsules that misbehave in one way each, for the tests beside."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

VERSIONED = b"dltensor_versioned"
CPU, CUDA = 1, 2
READ_ONLY, COPIED = 1, 2

_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_get_name = ctypes.pythonapi.PyCapsule_GetName
_get_name.restype = ctypes.c_char_p
_get_name.argtypes = [ctypes.py_object]


class Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


DELETER = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


def managed(capsule: Any) -> Versioned:
    """The structure inside an unused versioned capsule, to be changed in place."""
    return Versioned.from_address(_get_pointer(capsule, VERSIONED))


def name_of(capsule: Any) -> str:
    return str(_get_name(capsule).decode())


class Producer:
    """Hands out another tensor's capsules, each changed by ``edit`` first, and counts deletions."""

    def __init__(
        self,
        tensor: Any,
        edit: Callable[[Versioned], None] | None = None,
        *,
        device: Any = (CPU, 0),
        legacy: bool = False,
        error: BaseException | None = None,
    ) -> None:
        self.tensor, self.edit, self.device, self.legacy, self.error = tensor, edit, device, legacy, error
        self.capsules: list[Any] = []
        self.asked: list[dict[str, Any]] = []
        self.deleted = 0
        self._deleters: list[Any] = []

    def __dlpack_device__(self) -> Any:
        return self.device

    def __dlpack__(self, **keywords: Any) -> Any:
        self.asked.append(keywords)
        if self.error is not None:
            raise self.error
        if self.legacy:
            if "max_version" in keywords:
                raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
            capsule = self.tensor.__dlpack__()
        else:
            capsule = self.tensor.__dlpack__(max_version=(1, 0))
            self._count_deletions(managed(capsule))
            if self.edit is not None:
                self.edit(managed(capsule))
        self.capsules.append(capsule)
        return capsule

    def _count_deletions(self, tensor: Versioned) -> None:
        original = DELETER(tensor.deleter)

        def delete(address: int) -> None:
            self.deleted += 1
            original(address)

        counting = DELETER(delete)
        self._deleters += [original, counting]
        tensor.deleter = ctypes.cast(counting, ctypes.c_void_p).value
