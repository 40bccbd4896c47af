"""Weights of blocks that are in memory only while a block runs, and what stands in a model's places meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmprune.out_of_core.reading import Sliced
from llmprune.out_of_core.stored import Source
from llmprune.out_of_core.transfer import way_to
from llmprune.scoring.recompute import Block

_ALIGNED = 64
"""Where a tensor in a buffer may begin, in bytes."""


CPU = torch.device("cpu")


def _placeholder(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the same shape that takes no memory; NaN, so that nobody computes with it unseen."""
    fill = torch.nan if like.is_floating_point() else 0
    return torch.full((), fill, dtype=like.dtype, device=device).expand(like.shape)


@contextlib.contextmanager
def shells(model: nn.Module, device: torch.device = CPU) -> Iterator[dict[str, nn.Parameter]]:
    """Replace parameters on the meta device by ones on ``device`` that have no memory yet; put them back in the end.

    Buffers are on the device meanwhile, too. Yields every name, tied ones as well -> the parameter there now.
    """
    made: dict[int, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    buffers: list[tuple[nn.Module, str, torch.Tensor]] = []
    try:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != device:
                    buffers.append((module, name, buffer))
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    if id(parameter) not in made:
                        made[id(parameter)] = nn.Parameter(
                            _placeholder(parameter, device), requires_grad=False
                        )
                    replaced.append((module, name, parameter))
        for module, name, parameter in replaced:
            module._parameters[name] = made[id(parameter)]
        for module, name, buffer in buffers:
            module._buffers[name] = buffer.to(device)
        yield dict(model.named_parameters(remove_duplicate=False))
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


def _laid_out(
    memory: torch.Tensor, parameters: Mapping[str, nn.Parameter], names: list[str]
) -> dict[str, torch.Tensor]:
    """Parameters one after the other in memory (bytes,)."""
    views, offset = {}, 0
    for name in names:
        parameter = parameters[name]
        length = parameter.numel() * parameter.element_size()
        views[name] = memory[offset : offset + length].view(parameter.dtype).view(parameter.shape)
        offset += -(-length // _ALIGNED) * _ALIGNED
    return views


@dataclass
class _Buffer:
    memory: torch.Tensor
    holds: int = -1
    views: dict[str, torch.Tensor] = field(default_factory=dict)
    reading: Future[Any] | None = None


class Weights:
    """The parameters of blocks in memory, read ahead.

    Args:
        source: Where they come from.
        parameters: Name -> parameter, for all there are.
        names: For each block the names of the parameters that it alone has.
        buffers: How many blocks may be where they run at a time: with two, the next is read while one runs.
        device: Where the blocks run.
    """

    def __init__(
        self,
        source: Source,
        parameters: Mapping[str, nn.Parameter],
        names: list[list[str]],
        buffers: int,
        device: torch.device = CPU,
    ):
        self._source, self._parameters, self.names = source, parameters, names
        size = max(self.bytes_of(parameters, own) for own in names)
        self._way = way_to(device, size)
        self._buffers = [_Buffer(self._way.memory(size)) for _ in range(buffers)]
        self._thread = ThreadPoolExecutor(1, "llmprune-read")
        self._used: _Buffer | None = None

    @staticmethod
    def bytes_of(parameters: Mapping[str, nn.Parameter], names: list[str]) -> int:
        """Bytes that these take in a buffer."""
        return sum(
            -(-parameters[n].numel() * parameters[n].element_size() // _ALIGNED) * _ALIGNED for n in names
        )

    def _begin(self, block: int) -> _Buffer:
        """A buffer that holds the block, or will once its reading is done; never the one in use."""
        for buffer in self._buffers:
            if buffer.holds == block:
                return buffer
        buffer = next(b for b in self._buffers if b is not self._used)
        self._finish(buffer)
        names = self.names[block]
        buffer.holds, buffer.views = block, _laid_out(buffer.memory, self._parameters, names)

        def fill(memory: torch.Tensor) -> None:
            self._source.fill(_laid_out(memory, self._parameters, names))

        length = self.bytes_of(self._parameters, names)
        buffer.reading = self._thread.submit(self._way.bring, fill, buffer.memory, length)
        return buffer

    def _finish(self, buffer: _Buffer) -> None:
        reading, buffer.reading = buffer.reading, None
        if reading is not None:
            try:
                self._way.arrive(reading.result())
            except BaseException:
                buffer.holds = -1
                raise

    @contextlib.contextmanager
    def present(self, block: int, next_block: int | None) -> Iterator[None]:
        """Have a block's parameters in memory within the ``with``, and another block's read meanwhile."""
        buffer = self._begin(block)
        self._finish(buffer)
        self._used = buffer
        if next_block is not None and len(self._buffers) > 1:
            self._begin(next_block)
        try:
            for name, view in buffer.views.items():
                self._parameters[name].data = view
            yield
        finally:
            for name, view in buffer.views.items():
                self._parameters[name].data = _placeholder(self._parameters[name], view.device)
            self._way.leave(buffer.memory)
            self._used = None

    def change(self, block: int, change: Callable[[str, torch.Tensor], None]) -> None:
        """Have the values of a present block changed; they are read anew the next time."""
        buffer = next(b for b in self._buffers if b.holds == block)
        for name, view in buffer.views.items():
            change(name, view)
        buffer.holds = -1

    def close(self) -> None:
        """End the reading thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)


class _Stand(nn.Module):
    """What stands in a list of blocks in the place of one: it has the block run by the pass."""

    def __init__(self, block: Block, call: Callable[[Block, Any, Any], Any]):
        super().__init__()
        self.__dict__["block"], self.__dict__["call"] = block, call

    def __getattr__(self, name: str) -> Any:
        """What the block has."""
        return getattr(self.__dict__["block"].module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's result."""
        return self.__dict__["call"](self.__dict__["block"], args, kwargs)


@contextlib.contextmanager
def stands(model: nn.Module, blocks: list[Block], call: Callable[[Block, Any, Any], Any]) -> Iterator[None]:
    """Put stands in the places of blocks for a while."""
    by_id = {id(block.module): block for block in blocks}
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for module in list(model.modules()):
            for name, child in module._modules.items():
                if child is not None and id(child) in by_id:
                    swapped.append((module, name, child))
        for module, name, child in swapped:
            module._modules[name] = _Stand(by_id[id(child)], call)
        yield
    finally:
        for module, name, child in swapped:
            module._modules[name] = child


def kinds_of(model: nn.Module) -> list[list[nn.Module]]:
    """Members of the outermost lists of modules, those alike (class, names and shapes of parameters) together."""
    inside: set[int] = set()
    kinds: dict[Any, list[nn.Module]] = {}
    for module in model.modules():
        if (
            isinstance(module, (nn.ModuleList, nn.Sequential))
            and len(module) > 1
            and id(module) not in inside
        ):
            inside |= {id(inner) for inner in module.modules()}
            for child in module.children():
                shapes = tuple((n, tuple(p.shape), p.dtype) for n, p in child.named_parameters())
                kinds.setdefault((type(child), shapes), []).append(child)
    return list(kinds.values())


def exclusive(model: nn.Module, modules: list[nn.Module]) -> list[list[str]]:
    """For each module the names, in the model, of the parameters that lie in it and nowhere else."""
    home = {id(inner): number for number, module in enumerate(modules) for inner in module.modules()}
    owner: dict[int, int] = {}
    names: dict[int, str] = {}
    for path, module in model.named_modules():
        number = home.get(id(module), -1)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owner[id(parameter)] = number if owner.get(id(parameter), number) == number else -1
                names.setdefault(id(parameter), f"{path}.{name}" if path else name)
    out: list[list[str]] = [[] for _ in modules]
    for key, number in owner.items():
        if number >= 0:
            out[number].append(names[key])
    return out


@contextlib.contextmanager
def surrogates(
    model: nn.Module, source: Source, parameters: Mapping[str, nn.Parameter], kinds: list[list[nn.Module]]
) -> Iterator[None]:
    """Let every module of a kind have the first one's weights for a while."""
    members = [member for kind in kinds for member in kind]
    own = dict(zip(map(id, members), exclusive(model, members), strict=True))
    lent: list[str] = []
    try:
        for kind in kinds:
            values: list[torch.Tensor] = []
            for member in kind:
                names = own[id(member)]
                if [parameters[n].shape for n in names] != [value.shape for value in values]:
                    values = _filled(source, {n: parameters[n] for n in names})
                for name, value in zip(names, values, strict=True):
                    parameters[name].data = value
                    lent.append(name)
        yield
    finally:
        for name in lent:
            parameters[name].data = _placeholder(parameters[name], parameters[name].device)


def _filled(source: Source, parameters: Mapping[str, nn.Parameter]) -> list[torch.Tensor]:
    """Values of parameters, each in memory of its own where the parameter is to be."""
    values = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in parameters.items()}
    source.fill(values)
    return [value.to(parameters[name].device) for name, value in values.items()]


class Outside:
    """The parameters that lie in no block: in memory, or those of embedding and projection in their files.

    On a device all of them are in its memory.
    """

    def __init__(self, model: nn.Module, source: Source, parameters: Mapping[str, nn.Parameter]):
        self._model, self._source, self._parameters = model, source, parameters
        self.stored: dict[int, Sliced] = {}
        self._loaded: set[int] = set()
        tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.Linear))}
        inside = {id(p) for kind in kinds_of(model) for member in kind for p in member.parameters()}
        for name, parameter in parameters.items():
            place = source.stored(name)
            if place is None or parameter.device != CPU:
                continue
            if id(parameter) in tables and id(parameter) not in inside:
                self.stored[id(parameter)] = Sliced(source.files, place, parameter.dtype)

    def load(self, kinds: list[list[nn.Module]]) -> None:
        """Have in memory what lies in none of these modules, or in several, and is not stored."""
        members = [member for kind in kinds for member in kind]
        own = {name for names in exclusive(self._model, members) for name in names}
        wanted: dict[str, nn.Parameter] = {}
        for name, parameter in self._parameters.items():
            if name not in own and id(parameter) not in self.stored and id(parameter) not in self._loaded:
                self._loaded.add(id(parameter))
                wanted[name] = parameter
        for parameter, value in zip(wanted.values(), _filled(self._source, wanted), strict=True):
            parameter.data = value

    def names(self) -> list[str]:
        """Names of the parameters that are in memory."""
        return [name for name, p in self._parameters.items() if id(p) in self._loaded]

    def keep(self, names: set[str]) -> None:
        """Have these in memory whole, too; buffers are."""
        for name in names & set(self._parameters):
            self.stored.pop(id(self._parameters[name]), None)
