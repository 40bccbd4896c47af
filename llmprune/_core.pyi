from collections.abc import Sequence
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt

class _Tensor(Protocol):
    """What DLPack asks of a tensor: torch.Tensor, numpy.ndarray and others have it."""
    def __dlpack__(self, *, stream: Any = ...) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, int]: ...

_Sums = npt.NDArray[np.float64] | _Tensor
"""Sums are NumPy arrays beside tensors on the CPU, and float64 tensors beside tensors on a CUDA device."""

class LlmpruneError(Exception): ...
class TraceError(LlmpruneError): ...
class PlanError(LlmpruneError): ...
class TensorError(LlmpruneError): ...
class DeviceError(LlmpruneError): ...

def rank(scores: npt.NDArray[np.float64], order: npt.NDArray[np.int64], /) -> None: ...
def merge(
    keys: npt.NDArray[np.float64], offsets: npt.NDArray[np.int64], sequence: npt.NDArray[np.int64], /
) -> None: ...
def simd_level() -> str: ...
def linear_scores(
    weight: _Tensor,
    x: _Tensor,
    dy: _Tensor,
    samples: int,
    order: int,
    row: _Sums,
    col: _Sums,
    transposed: bool = False,
    threads: int = 0,
    scratch: _Tensor | None = None,
    stream: int = 0,
) -> None: ...
def dot_columns(
    a: _Tensor, b: _Tensor, out: _Sums, threads: int = 0, scratch: _Tensor | None = None, stream: int = 0
) -> None: ...
def tensor_scores(
    weight: _Tensor,
    grad: _Tensor | None,
    square: _Tensor | None,
    kind: str,
    outs: Sequence[_Sums | None],
    threads: int = 0,
    scratch: _Tensor | None = None,
    stream: int = 0,
) -> None: ...
def accumulate_square(
    acc: _Tensor, grad: _Tensor, scale: float, threads: int = 0, stream: int = 0
) -> None: ...
def compact(tensor: _Tensor, kept: dict[int, npt.NDArray[np.int64]], threads: int = 0) -> Block: ...
def compact_into(
    target: _Tensor,
    source: _Tensor,
    kept: dict[int, npt.NDArray[np.int64]],
    threads: int = 0,
    scratch: _Tensor | None = None,
    stream: int = 0,
) -> None: ...
def compact_many(
    tensors: Sequence[_Tensor],
    kept: Sequence[dict[int, npt.NDArray[np.int64]]],
    scratch: _Tensor,
    stream: int = 0,
) -> None: ...
def register_cuda(table: Any, /) -> int: ...

@final
class Block:
    """Memory that holds a result, for ``torch.from_dlpack`` and ``numpy.from_dlpack``."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __dlpack__(
        self,
        *,
        stream: None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

@final
class Graph:
    """The dependency graph of a recorded forward pass; llmprune.tracing.graph.Graph is its public face."""

    def __new__(
        cls,
        tensors: Sequence[Sequence[Any]],
        ops: Sequence[Sequence[Any]],
        outputs: Sequence[int],
        rules: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> Graph: ...
    @staticmethod
    def knows(name: str, /) -> bool: ...
    def axes(
        self,
    ) -> list[tuple[int, str, bool, list[tuple[str, int, bool]], list[tuple[int, int, int, int]]]]: ...
    def positions(self, axis: int, member: int, /) -> npt.NDArray[np.int64]: ...
    def new_sizes(
        self, removed: npt.NDArray[np.int64], dims: npt.NDArray[np.int64], /
    ) -> npt.NDArray[np.int64]: ...
    def numel(self, removed: npt.NDArray[np.int64], /) -> int: ...
    def macs(self, removed: npt.NDArray[np.int64], /) -> int: ...
    def macs_each(self, removed: npt.NDArray[np.int64], /) -> npt.NDArray[np.int64]: ...
    def removed_positions(
        self, tensor: int, dim: int, size: int, removed: dict[int, npt.NDArray[np.int64]], /
    ) -> npt.NDArray[np.bool_]: ...
    def mark_ragged(
        self,
        axis: int,
        member: int,
        outer: int,
        chosen: npt.NDArray[np.int64],
        flags: npt.NDArray[np.bool_],
        /,
    ) -> None: ...
    def dim_axes(self, tensor: int, dim: int, /) -> list[int]: ...
    def dim_atoms(self, tensor: int, dim: int, /) -> list[int]: ...
    def atoms(self) -> list[int]: ...
    def marked(self) -> list[tuple[int, int, int]]: ...
    def unknown(self) -> list[int]: ...
    def freeze(self, axis: int, reason: str, /) -> None: ...
    def explain(
        self, axis: int, from_member: int, to_member: int, /
    ) -> list[tuple[str, int, tuple[int, int] | None, tuple[int, int] | None]]: ...
