"""Models whose weights stay in their files: built on the meta device from the config, tensors read when asked for.

:func:`open_model` gives a module that can be traced and planned for like any other, and carries a :class:`Source`, from
which :mod:`llmprune.out_of_core.block_stream` reads one block at a time. Names in files are translated by transformers'
own rules, which also say how tensors that it keeps in another form (experts stacked, projections fused) are made from
stored ones.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping

from llmprune.checkpoints import adapters, loading
from llmprune.errors import CheckpointError, InputError
from llmprune.machine import cuda
from llmprune.machine.budget import available_memory, parse_bytes, resident_memory
from llmprune.out_of_core.reading import SLICE_BYTES, Files, Sliced, bytes_of
from llmprune.out_of_core.shards import Stored, find_tensors

log = logging.getLogger(__name__)

T = TypeVar("T")
_IN_MEMORY = 1.5
"""What loading and scoring a model in memory takes, with checkpointing, in units of its weights."""


@dataclass(eq=False)
class _Conversion:
    """One tensor or several, made from stored ones by transformers' rule for it."""

    first: str
    rule: Any
    parts: list[tuple[str, str]] = field(default_factory=list)
    """(stored name, pattern of the rule that it met), in the rule's order."""


class Source:
    """Where the tensors of a model come from.

    Args:
        folder: The checkpoint.
        model: The model, on the meta device.
        tensors: The checkpoint's tensors, by their names there.

    Attributes:
        tensors: As given.
        files: What reads them.
        missing: Parameters and persistent buffers that no file holds.
        unexpected: Stored tensors that the model has no use for.
        mismatched: (name, stored shape, the model's shape).
        device: where blocks run unless something else is asked for.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path, model: nn.Module, tensors: dict[str, Stored]):
        self.folder, self.tensors, self.files = folder, tensors, Files()
        self._config = getattr(model, "config", None)
        self._direct: dict[str, Stored] = {}
        self._made: dict[str, _Conversion] = {}
        self.unexpected: list[str] = []
        self._map(model)
        own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(_persistent(model))}
        found = {**self._direct, **dict.fromkeys(self._made)}
        held = {id(own[name]) for name in found}
        self.missing = sorted(n for n, tensor in own.items() if n not in found and id(tensor) not in held)
        self.mismatched = [
            (name, stored.shape, tuple(own[name].shape))
            for name, stored in self._direct.items()
            if stored.shape != tuple(own[name].shape)
        ]
        self._alias(model)

    def _map(self, model: Any) -> None:
        state = model.state_dict()
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, core_model_loading.WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        conversions: dict[str, _Conversion] = {}
        for name in sorted(self.tensors, key=core_model_loading.dot_natural_key):
            prefix = model.base_model_prefix
            key, pattern = core_model_loading.rename_source_key(name, renamings, converters, prefix, state)
            if key not in state and name in state:
                key, pattern = core_model_loading.rename_source_key(name, [], [], prefix, state)
            if key not in state:
                self.unexpected.append(name)
            elif pattern is None:
                self._direct[key] = self.tensors[name]
            else:
                made = conversions.setdefault(key, _Conversion(key, by_pattern[pattern]))
                made.parts.append((name, pattern))
        for made in conversions.values():
            for target in self._targets(made, state):
                self._made[target] = made

    @staticmethod
    def _targets(made: _Conversion, state: dict[str, Any]) -> list[str]:
        """The model's tensors that a conversion gives, by the places of the rule's targets in their names."""
        patterns = made.rule.target_patterns
        inside = next((pattern for pattern in patterns if pattern in made.first), None)
        if inside is None:
            return [made.first]
        names = [made.first.replace(inside, pattern) for pattern in patterns]
        return [name for name in names if name in state]

    def _alias(self, model: nn.Module) -> None:
        """Let every name of a tied parameter lead to the one that is stored; two stored ones have to be alike."""
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for alike in names.values():
            stored = [name for name in alike if name in self._direct]
            for other in stored[1:]:
                if not self._equal(self._direct[stored[0]], self._direct[other]):
                    raise CheckpointError(
                        f"{stored[0]} and {other} in {self.folder} differ, but its config ties them: load it and save "
                        "it again with transformers first"
                    )
            for name in alike:
                if stored and name not in self._direct:
                    self._direct[name] = self._direct[stored[0]]

    def _equal(self, one: Stored, other: Stored) -> bool:
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        step = max(1, SLICE_BYTES * one.shape[0] // max(1, one.bytes)) if one.shape else 1
        return all(
            torch.equal(self.files.rows(one, start, stop), self.files.rows(other, start, stop))
            for start in range(0, one.shape[0], step)
            for stop in [min(start + step, one.shape[0])]
        )

    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of the stored tensors."""
        return {stored.dtype for stored in self.tensors.values()}

    def extra_bytes(self, name: str, dtype: torch.dtype) -> int:
        """What reading a parameter takes besides the parameter itself."""
        made = self._made.get(name)
        if made is not None:
            return 3 * sum(self.tensors[part].bytes for part, _ in made.parts)
        stored = self._direct[name]
        return 0 if stored.dtype == dtype else stored.bytes

    def agreed(self, work: Callable[[], T]) -> T:
        """What ``work`` gives; where several processes read together, what it gives in all of them."""
        return work()

    def stored(self, name: str) -> Stored | None:
        """Where a parameter lies as it is; None if it is made from others."""
        return self._direct.get(name)

    def value(self, name: str, dtype: torch.dtype) -> torch.Tensor | Sliced:
        """A parameter that is read slice by slice as it is asked for; whole, where it is made from others."""
        stored = self._direct.get(name)
        if stored is not None and stored.shape:
            return Sliced(self.files, stored, dtype)
        if stored is not None:
            return self.files.tensor(stored).to(dtype)
        return self._make(self._made[name])[name].to(dtype)

    def parts(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A parameter in slices of its first dimension, one after the other."""
        value = self.value(name, dtype)
        if isinstance(value, Sliced):
            yield from (value[start:stop] for start, stop in value.slices())
        else:
            yield value

    def fill(self, targets: dict[str, torch.Tensor]) -> None:
        """Read parameters or buffers into contiguous tensors of their shapes, whatever the dtypes."""
        done: set[int] = set()
        for name, target in targets.items():
            stored = self._direct.get(name)
            if stored is not None:
                if target.numel() == 0:
                    continue
                if stored.dtype == target.dtype:
                    self.files.read(stored, 0, bytes_of(target))
                else:
                    target.copy_(self.files.tensor(stored))
                continue
            made = self._made[name]
            if id(made) in done:
                continue
            done.add(id(made))
            for key, value in self._make(made).items():
                if key in targets:
                    targets[key].copy_(value)

    def _make(self, made: _Conversion) -> dict[str, torch.Tensor]:
        rule = copy.deepcopy(made.rule)
        for name, pattern in made.parts:
            tensor = self.files.tensor(self.tensors[name])
            rule.add_tensor(made.first, name, pattern, lambda tensor=tensor: tensor)
        values = rule.convert(made.first, model=None, config=self._config)
        return {key: value[0] if isinstance(value, list) else value for key, value in values.items()}


def _persistent(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def open_model(
    directory: str | Path, *, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> Any:
    """A model whose parameters stay in its checkpoint folder; they are on the meta device, buffers in memory.

    :func:`llmprune.trace` and :func:`llmprune.plan` take it as any other model, and :func:`llmprune.score` reads its
    blocks one after the other.

    Args:
        directory: a local folder with ``config.json`` and safetensors weights.
        attn_implementation: as in transformers' ``from_pretrained``.
        trust_remote_code: as there.

    Raises:
        CheckpointError: as :func:`llmprune.from_pretrained`; NaN in weights shows when they are read.
    """
    folder = Path(directory)
    values = loading.read_config(folder)
    tensors = find_tensors(folder)
    kinds = {name: place.kind for name, place in tensors.items()}
    kind, own = loading.model_class(folder, values, trust_remote_code)
    with loading.load_errors(folder, kind), loading.quiet_transformers(), torch.random.fork_rng(devices=[]):
        options: dict[str, Any] = {}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        model = _build(folder, kind, _dtype(values, tensors), trust_remote_code and not own, options)
    source = Source(folder, model, tensors)
    info = {
        "missing_keys": [name for name in source.missing if name not in dict(_persistent(model))],
        "mismatched_keys": source.mismatched,
        "unexpected_keys": source.unexpected,
    }
    loading.check_loaded(folder, model, info, kinds)
    _fill_buffers(model, source)
    loading.attach_record(folder, model, own)
    model.llmprune_source = source
    return model.eval()


def source_of(model: Any) -> Source | None:
    """Where the weights of a model on the meta device come from; None for any other model."""
    found = getattr(model, "llmprune_source", None)
    return found if isinstance(found, Source) else None


@dataclass(frozen=True)
class Streaming:
    """How a model whose weights stay in their files is to be scored.

    Attributes:
        budget: Bytes of memory that the process may have at most.
        state: Folder for what another process could go on from; None for none.
        device: Where blocks run.
    """

    budget: int
    state: Path | None
    device: torch.device


def streaming_of(
    model: nn.Module,
    stream: bool | None,
    memory_budget: int | str | None,
    state: str | Path | None,
    device: str | torch.device | None = None,
) -> Streaming | None:
    """How to score a model block by block; None for one that is in memory.

    Raises:
        InputError: streaming, a budget, a state or a device is asked for, and the model is in memory; or the other way
            round; or the device is neither the CPU nor a CUDA device.
        DeviceError: a CUDA device that cannot be used.
    """
    if source_of(model) is None:
        if stream or memory_budget is not None or state is not None or device is not None:
            raise InputError(
                "stream, memory_budget, state and device are for weights that stay in their files, and this model is "
                "in memory: give its folder, or what llmprune.open_model makes of it"
            )
        return None
    source = source_of(model)
    assert source is not None
    if state is not None and not source.tensors:
        raise InputError(
            "state is for weights in files, and this model's are fetched from elsewhere: leave it out"
        )
    if stream is False:
        raise InputError("stream is False, but this model's weights are in their files: load it")
    budget = resident_memory() + available_memory() * 9 // 10
    if memory_budget is not None:
        budget = parse_bytes(memory_budget)
    return Streaming(
        budget, None if state is None else Path(state), cuda.usable_device(device or source.device)
    )


def state_beside(output: Path) -> Path:
    """Where a streamed job for an output keeps what it has done so far."""
    return output.absolute().parent / f".{output.name}.blocks"


def opened(
    directory: str | Path,
    stream: bool | None = None,
    memory_budget: int | str | None = None,
    state: str | Path | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model of a folder: with its weights in their files if ``stream``, or if memory would not do.

    Args:
        directory: The folder.
        stream: Whether weights are to stay there; None: where loading and scoring would not fit into the budget.
        memory_budget: Bytes, or text like ``4GB``; None: what the machine has free.
        state: As for :func:`llmprune.score`; it is for streaming only.
        trust_remote_code: As for :func:`open_model`.
    """
    streamed = state is not None or must_stream(directory, stream, memory_budget)
    read = open_model if streamed else loading.load_model
    model: nn.Module = read(directory, trust_remote_code=trust_remote_code)
    return model


def must_stream(
    directory: str | Path, stream: bool | None = None, memory_budget: int | str | None = None
) -> bool:
    """Whether the weights of a folder are to stay there; see :func:`opened`."""
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    if not isinstance(directory, str | Path):
        raise InputError(
            f"{type(directory).__name__} is no model: give a torch.nn.Module or the path of its folder"
        )
    if stream is not None or adapters.is_adapter(Path(directory)):
        return bool(stream)
    loading.read_config(Path(directory))
    weights = sum(stored.bytes for stored in find_tensors(Path(directory)).values())
    here = resident_memory()
    room = (here + available_memory() * 9 // 10) if budget is None else budget
    log.info("%s: %d bytes of weights, %d of memory", directory, weights, room)
    return here + int(_IN_MEMORY * weights) > room


def _dtype(values: dict[str, Any], tensors: dict[str, Stored]) -> torch.dtype:
    """What transformers calls ``auto``: the config's dtype, else that of the first stored tensor in float."""
    stated = values.get("dtype", values.get("torch_dtype"))
    if isinstance(stated, str) and stated != "auto":
        dtype: torch.dtype = getattr(torch, stated)
        return dtype
    return next((s.dtype for s in tensors.values() if s.dtype.is_floating_point), torch.float32)


def _build(folder: Path, kind: Any, dtype: torch.dtype, remote: bool, options: dict[str, Any]) -> Any:
    trust: dict[str, Any] = {"trust_remote_code": True} if remote else {}
    reader = transformers.AutoConfig if remote else kind.config_class
    config = reader.from_pretrained(folder, local_files_only=True, **trust)
    build = kind.from_config if remote else kind._from_config
    with torch.device("meta"):
        return build(config, dtype=dtype, **trust, **options)


def _fill_buffers(model: Any, source: Source) -> None:
    """Give buffers their values: stored ones from the files, computed ones by the model's own initialisation."""
    stored: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            module._buffers[name] = value = torch.empty_like(buffer, device="cpu")
            full = f"{path}.{name}" if path else name
            if name not in module._non_persistent_buffers_set and full not in source.missing:
                stored[full] = value
                value._is_hf_initialized = True  # type: ignore[attr-defined]
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    source.fill(stored)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model.initialize_weights()
