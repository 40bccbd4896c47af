"""Several processes that calibrate together (torch.distributed): the scores are those of one process with all samples.

Every rank holds the model and runs its own samples. What is linear in gradients (``vector``) adds up in the end. For
the rest the gradients, and the mean squares of second order, are summed across ranks *before* the formula is applied:
parameter by parameter in one order that all keep, each rank receives the sum of its tile of rows (a reduce-scatter),
reduces that tile, and the sums over structures are added up last.

Before every exchange the ranks tell each other whether they can go on, so one that fails ends the others with its
sentence; one that dies closes its connections, which ends them too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from llmprune.checkpoints.record import versions
from llmprune.errors import InputError, RankError
from llmprune.scoring.calibration import Batch
from llmprune.scoring.importance import Importance
from llmprune.scoring.reduction import Reducer, Reroute, Sums

T = TypeVar("T")

# The older name of the same, for versions of torch that have no other.
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_LOOKED_AT = 1024  # elements of a parameter that tell models apart


class Stopped(Exception):
    """Another rank cannot go on; :meth:`Ranks.settle` says why."""


class Ranks:
    """The processes of one run.

    Args:
        group: a process group of torch.distributed; None for all processes.
    """

    def __init__(self, group: Any = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise InputError(
                "no process group: call torch.distributed.init_process_group first, or use torchrun"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def own(self, batch: Batch) -> Batch:
        """This rank's samples.

        Raises:
            InputError: there are fewer samples than ranks.
        """
        if batch.samples < self.size:
            raise InputError(
                f"{batch.samples} calibration samples are too few for {self.size} processes: each needs one"
            )
        return batch.take(
            self.rank * batch.samples // self.size, (self.rank + 1) * batch.samples // self.size
        )

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Refuse to go on unless all ranks state the same.

        Args:
            facts: what, as a noun in the singular -> its value, JSON values.

        Raises:
            RankError: two ranks differ, or one has gone.
        """
        everyone = self._gathered(json.dumps(dict(facts), sort_keys=True, default=str))
        first: dict[str, Any] = json.loads(everyone[0])
        for rank, text in enumerate(everyone[1:], start=1):
            other: dict[str, Any] = json.loads(text)
            for what in sorted(first.keys() | other.keys()):
                if first.get(what) != other.get(what):
                    raise RankError(
                        f"rank {rank} has another {what} than rank 0 ({_brief(other.get(what))}, not "
                        f"{_brief(first.get(what))}): start all processes alike"
                    )

    def agree_on_scoring(
        self,
        model: torch.nn.Module,
        fingerprint: str,
        importance: str,
        aggregation: str,
        seed: int,
        kinds: Sequence[str],
        data: str | None,
    ) -> None:
        """:meth:`agree` on versions, the model, some of its weights, the data's hash, and how to score."""
        sha = hashlib.sha256()
        for name, parameter in model.named_parameters():
            flat = parameter.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // _LOOKED_AT)].contiguous().cpu()
            sha.update(name.encode() + bytes(some.view(torch.uint8).numpy().data))
        self.agree(
            {
                "set of versions": versions(),
                "model": fingerprint,
                "set of weights": sha.hexdigest(),
                "importance": importance,
                "aggregation": aggregation,
                "seed": seed,
                "choice of kinds": list(kinds),
                "set of calibration data": data,
            }
        )

    def ready(self, can: bool = True) -> None:
        """Tell the others whether this rank goes on.

        Raises:
            Stopped: one does not.
        """
        flag = torch.tensor([0 if can else 1], dtype=torch.int32)
        with _connected():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        if can and flag.item():
            raise Stopped

    def together(self, work: Callable[[], T]) -> T:
        """Do ``work`` on every rank; all get their results, or none does.

        Raises:
            Reroute: the names that some rank could not have as was planned.
            RankError: another rank failed, or has gone.
            Exception: what this one raised.
        """
        problem: Exception | None = None
        try:
            result = work()
            self.ready()
        except RankError:
            raise
        except Exception as error:  # noqa: BLE001  (raised by settle, once all know)
            problem = error
            if not isinstance(error, Stopped):
                self.ready(False)
        names = self.settle(problem)
        if names:
            raise Reroute(names)
        return result

    def settle(self, error: Exception | None) -> set[str]:
        """After an attempt: what all of them do next.

        Args:
            error: what ended it on this rank; None: nothing.

        Returns:
            Names to reroute on all ranks; empty if the attempt holds.

        Raises:
            RankError: another rank failed.
            Exception: ``error``, if it was this one.
        """
        names = sorted(error.names) if isinstance(error, Reroute) else []
        failed = error is not None and not isinstance(error, (Reroute, Stopped))
        said = self._gathered((names, str(error) if failed else None))
        if failed:
            assert error is not None
            raise error
        for rank, (_, sentence) in enumerate(said):
            if sentence is not None:
                raise RankError(f"rank {rank} failed: {sentence}")
        return {name for names, _ in said for name in names}

    def add(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The sums of float64 arrays over all ranks, the same bit for bit on each."""
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])) if arrays else None
        if flat is None:
            return []
        with _connected():
            dist.all_reduce(flat, group=self.group)
            dist.broadcast(flat, group_src=0, group=self.group)
        borders = np.cumsum([array.size for array in arrays])[:-1]
        parts = np.split(flat.numpy(), borders)
        return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def tile(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of this rank's rows, :meth:`rows` of them."""
        each = -(-len(tensor) // self.size)
        if len(tensor) % self.size:
            whole = tensor.new_zeros((each * self.size, *tensor.shape[1:]))
            whole[: len(tensor)] = tensor
        else:
            whole = tensor.contiguous()
        mine = torch.empty_like(whole[:each])
        with _connected():
            _scatter(mine, whole, group=self.group)
        rows = self.rows(len(tensor))
        return mine[: len(rows)]

    def rows(self, count: int) -> range:
        """Which of ``count`` rows are this rank's."""
        each = -(-count // self.size)
        return range(min(self.rank * each, count), min((self.rank + 1) * each, count))

    def _gathered(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        with _connected():
            dist.all_gather_object(found, value, group=self.group)
        return found


@contextmanager
def _connected() -> Iterator[None]:
    """Say what a broken connection means."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise RankError(
            f"another process of this run has gone ({line}): nothing was written; its own output says why"
        ) from error


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class SharedReducer(Reducer):
    """A reducer of this rank's samples whose sums are those over the samples of all ranks.

    Args:
        ranks: the processes.
        total: samples of all ranks.
        order: names of the parameters, in the order of exchanges.
        importance, parameters, samples, uses, done, fold, stacks: as for :class:`llmprune.scoring.reduction.Reducer`;
            ``samples`` are this rank's.
    """

    def __init__(
        self,
        ranks: Ranks,
        total: int,
        order: Sequence[str],
        importance: Importance,
        parameters: Mapping[str, torch.Tensor],
        samples: int,
        uses: Mapping[str, int],
        done: Callable[[str], None],
        fold: bool = False,
        stacks: Collection[str] = (),
    ) -> None:
        super().__init__(importance, parameters, samples, uses, done, fold, stacks)
        self.ranks = ranks
        # Means over this rank's samples count by their number; sums (first-order kernels) as they are.
        self.share = samples / total if importance.order > 1 or importance.kernel is None else 1.0
        self._waiting: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        self._order = list(order)

    @property
    def sums(self) -> Sums:
        """What has been added up by all ranks (a collective: every rank asks at the same time)."""
        own = super().sums
        factor = self.share if self.importance.additive else 1.0
        flat = self.ranks.add([array * factor for arrays in own.values() for array in arrays])
        arrays = iter(flat)
        return {name: [next(arrays) for _ in own[name]] for name in own}

    def finish(self) -> None:
        """Exchange what is left; parameters that this rank's samples did not reach count as zeros."""
        if not self.importance.additive:
            for name in self._order:
                self._waiting.setdefault(name, (None, None))
            self._exchange()
        self.ranks.ready()

    def _reduce(self, name: str, pieces: Any) -> None:
        self._reduce_whole(name, *self._dense(name, pieces))

    def _reduce_whole(self, name: str, grad: torch.Tensor | None, square: torch.Tensor | None) -> None:
        if self.importance.additive:
            super()._reduce_whole(name, grad, square)
            return
        self._waiting[name] = (grad, square)
        self._exchange()

    def _exchange(self) -> None:
        """Exchange the parameters whose turn it is."""
        while self._order and self._order[0] in self._waiting:
            name = self._order.pop(0)
            self._exchange_one(name, *self._waiting.pop(name))

    def _exchange_one(self, name: str, grad: torch.Tensor | None, square: torch.Tensor | None) -> None:
        weight = self.parameters[name]
        if weight.dim() == 0 or weight.numel() == 0:
            return
        self.ranks.ready()
        tiles: list[torch.Tensor | None] = []
        for tensor in (grad, square)[: self.importance.order]:
            kind = torch.promote_types(weight.dtype, torch.float32)
            whole = torch.zeros(weight.shape, dtype=kind, device=weight.device)
            if tensor is not None:
                whole.add_(tensor, alpha=self.share)
            tiles.append(self.ranks.tile(whole))
        rows = self.ranks.rows(len(weight))
        if len(rows):
            self._reduce_rows(name, rows, tiles[0], tiles[1] if len(tiles) > 1 else None)
