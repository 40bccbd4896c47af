"""Compaction: take a plan's slices out of a model, in place.

The model object, its modules and its ``Parameter`` objects stay the same; each parameter gets a smaller tensor, and the
memory of the old one goes back before the next is touched, so the peak is the model and one matrix.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.dlpack import from_dlpack

from llmprune import _core
from llmprune.checkpoints import modeling_llmprune, record
from llmprune.checkpoints.record import AttributeValue, Compaction, Positions
from llmprune.compaction import depth
from llmprune.compaction.norms import Rescale
from llmprune.errors import PlanError, TensorError
from llmprune.machine import cuda
from llmprune.machine.budget import return_memory
from llmprune.machine.interrupts import deferred_interrupts
from llmprune.tracing.borrow import forget
from llmprune.tracing.sublayers import check_parts
from llmprune.tracing.wrapped import check_present, on_uncompiled

log = logging.getLogger(__name__)

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by element size: compaction moves bits, so every dtype travels as one that DLPack knows."""

_RETURNED = 1 << 20
"""Bytes of a tensor from which on its old memory is returned to the driver by itself."""

# Sizes that torch.nn's own modules keep beside their parameters: attribute -> dimension of ``weight``. Nothing computes
# with them, but code that inspects a model (and its printed form) reads them.
_BUILTIN_SIZES: tuple[tuple[type[nn.Module], dict[str, int]], ...] = (
    (nn.Linear, {"out_features": 0, "in_features": 1}),
    (nn.Embedding, {"num_embeddings": 0, "embedding_dim": 1}),
    (nn.modules.batchnorm._BatchNorm, {"num_features": 0}),
    (nn.GroupNorm, {"num_channels": 0}),
)


@dataclass(frozen=True)
class Cut:
    """One tensor to be cut: its name, the tensor, and dimension -> kept positions (sorted, unique, int64).

    Where slices along dimension 0 keep different positions of a dimension, these are a row for each slice that stays.
    ``scale`` is set for the weight of a norm that is scaled besides.
    """

    name: str
    tensor: torch.Tensor
    kept: dict[int, Positions]
    values: torch.Tensor | None = None
    """What it is to hold after the cut; None: what it held."""
    scale: Rescale | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape after the cut."""
        return _shape(self.tensor, self.kept)


@on_uncompiled
def compact(
    model: nn.Module,
    plan: Any,
    weights: Mapping[str, torch.Tensor] | None = None,
    release: bool = False,
) -> nn.Module:
    """Remove what ``plan`` removes from ``model``, in place.

    Afterwards the same model object runs, trains and generates, ``sum(p.numel())`` and the process's memory have
    shrunk, and ``model.llmprune`` holds the :class:`~llmprune.checkpoints.record.Compaction` record. Parameter objects,
    dtypes, devices, ``requires_grad`` and ties stay; ``.grad`` of a cut parameter is dropped (its shape would be
    wrong). An optimizer's own state for it has the old shape too: make optimizers after pruning.

    Everything that can be wrong with the plan or the tensors is found before the first change. From there on Ctrl-C is
    held back until the model is whole again (then raised). A matrix for whose smaller copy there is no memory is
    compacted inside its own; should something fail all the same, the model is left unusable and says so when called.

    On a CUDA device all matrices are compacted inside their own memory at once, and each becomes the front of it: what
    else views that memory (a state dict taken before) holds nothing of use afterwards, and the memory stays taken. With
    ``release`` they are copied one at a time and the old memory goes back to the driver, for one matrix of extra peak.

    Args:
        model: the model the plan was made for.
        plan: a :class:`llmprune.planning.plan.Plan`.
        weights: new values of some of the parameters, in the shape they have afterwards
            (:attr:`llmprune.repair.repair.Repair.weights`).
        release: on a CUDA device, give memory back; on the CPU that is always done.

    Returns:
        ``model``.

    Raises:
        PlanError: the plan belongs to another model, or to this one before it was pruned.
        TensorError: a tensor that cannot be cut: two parameters overlap in memory, or a parameter is not a plain
            dense tensor. Nothing has been changed.
        DeviceError, MemoryError: a CUDA device refused, before anything was changed.
    """
    cuts, attributes = prepare(model, plan, weights)
    old = record.fresh(model)
    follow = _follow(model, plan, old)
    before = sum(p.numel() for p in model.parameters())
    freed = sum(c.tensor.numel() - math.prod(c.shape) for c in cuts if isinstance(c.tensor, nn.Parameter))
    dropped = _dropped(plan)
    prefixes = (*(prefix for drop in follow.drops for prefix in drop.prefixes), *(f"{p}." for p in dropped))
    if prefixes:
        freed += sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))
    step = record.Step(
        options=dict(getattr(plan, "options", {})),
        removed=_removed(plan),
        parameters_before=before,
        parameters_after=before - freed,
        versions=record.versions(),
        repaired=sorted(map(old.name_then, weights or {})),
    )
    left = {drop.module: drop.kept for drop in follow.drops}
    kept = {cut.name: cut.kept for cut in cuts}
    done = old.compose(kept, attributes, step, left, follow.config, follow.attributes, dropped)
    on_device = [] if release else _movable(cuts)
    if release:
        cuts.sort(key=lambda cut: cut.tensor.data_ptr(), reverse=True)  # so that what is freed joins
    with deferred_interrupts():
        started = not on_device
        try:
            for group in on_device:
                _move(group)
                started = True
                done_here = {id(cut) for cut in group}
                cuts = [cut for cut in cuts if id(cut) not in done_here]
            while cuts:
                # The list is emptied as it is worked off: it would hold the old tensors.
                size, on_cuda = cuts[-1].tensor.nbytes, cuts[-1].tensor.is_cuda
                _replace(cuts.pop())
                if release and on_cuda and size >= _RETURNED:
                    torch.cuda.empty_cache()  # else the next copy is cut out of it, and none of it is ever whole
            follow.settle()
            set_attributes(model, attributes)
            modeling_llmprune.drop(model, dropped)
            follow.remove(model)
            forget(model)
        except BaseException as error:
            if started:
                _break(model, old, error)
            raise
        model.llmprune = done  # type: ignore[assignment]
        return_memory()
        if release and torch.cuda.is_available():
            torch.cuda.empty_cache()
    return model


def compacted_copy(
    model: nn.Module, plan: Any, weights: Mapping[str, torch.Tensor] | None = None
) -> nn.Module:
    """A copy of ``model``, pruned by ``plan``; ``model`` is left as it is.

    The copy shares the parameters that the plan does not cut with ``model`` (they are only to be read), so it costs the
    memory of the pruned matrices alone. It carries no record.

    Raises:
        PlanError, TensorError: as :func:`compact`.
    """
    cuts, attributes = prepare(model, plan, weights)
    forget(model)
    memo = shared_tensors(model)
    for cut in cuts:
        smaller = _smaller(cut)
        if isinstance(cut.tensor, nn.Parameter):
            smaller = nn.Parameter(smaller, requires_grad=cut.tensor.requires_grad)
        memo[id(cut.tensor)] = smaller
    memo[id(getattr(model, "llmprune", None))] = None
    twin = copy.deepcopy(model, memo)
    follow = _follow(twin, plan, record.fresh(model))  # of the copy's own objects
    follow.settle()
    set_attributes(twin, attributes)
    modeling_llmprune.drop(twin, _dropped(plan))
    follow.remove(twin)
    forget(twin)
    return twin


def shared_tensors(model: nn.Module) -> dict[int, Any]:
    """A memo for :func:`copy.deepcopy` under which a copy shares every tensor with ``model``.

    Tensors that are plain attributes take part: what a hook computed there (an older weight norm) cannot be copied.
    """
    plain = (v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor))
    return {id(t): t for t in (*model.parameters(), *model.buffers(), *plain)}


def prepare(
    model: nn.Module, plan: Any, weights: Mapping[str, torch.Tensor] | None = None
) -> tuple[list[Cut], list[AttributeValue]]:
    """Check ``plan`` against ``model`` and lay out the work; changes nothing.

    Returns:
        The tensors to cut, and every attribute to set: the plan's, and the sizes torch.nn's modules keep.

    Raises:
        PlanError, TensorError: as :func:`compact`.
    """
    old = getattr(model, "llmprune", None)
    if isinstance(old, Compaction) and old.state != "complete":
        raise TensorError("this model was left half pruned by an earlier compaction: load it again")
    check_present(model)
    expected = record.fingerprint(model)
    if plan.fingerprint and plan.fingerprint != expected:
        why = (
            "this model has been pruned since"
            if isinstance(old, Compaction)
            else "it was made for another model"
        )
        raise PlanError(
            f"the plan does not fit this {type(model).__name__}: {why}; trace the model and plan again"
        )
    tensors: dict[str, torch.Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    scales = {scale.parameter: scale for scale in getattr(plan, "rescaled", ())}
    cuts = []
    for name, dims in plan.kept.items():
        if name not in tensors:
            raise PlanError(f"the plan cuts {name!r}, which this {type(model).__name__} does not have")
        kept = _checked_positions(name, tensors[name], dims)
        cuts.append(Cut(name, tensors[name], kept, scale=scales.get(name)))
    cuts = _with_values(model, cuts, weights or {})
    _check_tensors(tensors, cuts)
    attributes = [AttributeValue(a.module, a.name, a.index, a.new) for a in plan.attributes]
    for attribute in plan.attributes:
        _check_attribute(model, attribute)
    check_parts(model, getattr(plan, "sublayers", ()))
    return cuts, attributes + _builtin_sizes(model, cuts, attributes)


def _dropped(plan: Any) -> dict[str, dict[str, Any]]:
    """The branches that go: path of the module -> arguments of what comes in its place."""
    return {
        part.path: {"input": part.input, "output": part.output, "entries": part.entries}
        for part in getattr(plan, "sublayers", ())
    }


def _follow(model: nn.Module, plan: Any, done: Compaction) -> depth.Follow:
    return depth.follow(model, list(getattr(plan, "layers", ())), done.current())


def _with_values(model: nn.Module, cuts: list[Cut], weights: Mapping[str, torch.Tensor]) -> list[Cut]:
    """The cuts with the values they are to end with; parameters that get values and are not cut join them."""
    there, own = {cut.name for cut in cuts}, dict(model.named_parameters()) if weights else {}
    for name in weights:
        if name not in own:
            raise PlanError(
                f"there are new values of {name!r}, which this {type(model).__name__} does not have"
            )
    cuts = cuts + [Cut(name, own[name], {}) for name in weights if name not in there]
    for cut in cuts:
        if cut.name in weights and cut.shape != tuple(weights[cut.name].shape):
            raise PlanError(
                f"new values of {cut.name} have shape {tuple(weights[cut.name].shape)}, but the plan leaves {cut.shape}"
            )
    return [replace(cut, values=weights.get(cut.name)) for cut in cuts]


def _smaller(cut: Cut) -> torch.Tensor:
    """What a cut's tensor is to hold, as a tensor of its own."""
    if cut.values is None:
        smaller = gather(cut.tensor, cut.kept)
        return smaller if cut.scale is None else cut.scale.apply(smaller)
    return cut.values.detach().to(cut.tensor.device, cut.tensor.dtype, copy=True).contiguous()


def gather(tensor: torch.Tensor, kept: Mapping[int, Positions]) -> torch.Tensor:
    """The kept positions of ``tensor`` as a new contiguous tensor of its own; ``tensor`` is not changed."""
    if any(positions.ndim == 2 for positions in kept.values()):
        out = torch.empty(_shape(tensor, kept), dtype=tensor.dtype, device=tensor.device)
        for place, (number, inside) in enumerate(_slices(tensor, kept)):
            out[place] = gather(tensor[number], inside)
        return out
    source, word = tensor.detach(), _kernel_word(tensor)
    if word is None or not source.numel() or not kept:
        # Other devices and element sizes have no kernel of ours: a copy for each dimension.
        for dim, positions in kept.items():
            source = source.index_select(dim, torch.as_tensor(positions, device=source.device))
        return source.clone(memory_format=torch.contiguous_format) if not kept else source.contiguous()
    source = source.contiguous()
    out = torch.empty(_shape(source, kept), dtype=source.dtype, device=source.device)
    _core.compact_into(out.view(word), source.view(word), dict(kept), **cuda.options(source))
    return out


def squeeze(tensor: torch.Tensor, kept: Mapping[int, Positions]) -> torch.Tensor:
    """The kept positions of a dense tensor, moved together at the front of its own memory, on the CPU or a CUDA device.

    Returns:
        That front, which shares (and keeps alive) the memory of ``tensor``. What ``tensor`` held is gone, and the
        memory behind the front stays taken.

    Raises:
        TensorError: not a contiguous tensor of elements of 1, 2, 4 or 8 bytes, on the CPU or a usable CUDA device.
    """
    whole, word = tensor.detach(), _kernel_word(tensor)
    if word is None or not whole.is_contiguous():
        raise TensorError(
            f"a tensor of {tensor.dtype} on {tensor.device} cannot be compacted in its own memory"
        )
    if any(positions.ndim == 2 for positions in kept.values()):
        front = _front(whole, kept)  # no slice is written before those at and behind it have been read
        for place, (number, inside) in enumerate(_slices(whole, kept)):
            front[place] = gather(whole[number], inside)
        return front
    if whole.is_cuda:
        cuda.compact_many([whole.view(word)], [dict(kept)])
        return _front(whole, kept)
    smaller: torch.Tensor = from_dlpack(_core.compact(whole.view(word), dict(kept)))
    return smaller.view(tensor.dtype)


def _slices(
    tensor: torch.Tensor, kept: Mapping[int, Positions]
) -> Iterator[tuple[int, dict[int, Positions]]]:
    """The slices along dimension 0 that stay: number, and dimension of the slice -> what it keeps."""
    for place, number in enumerate(kept.get(0, range(len(tensor)))):
        inside = {dim - 1: p if p.ndim == 1 else p[place] for dim, p in kept.items() if dim}
        yield int(number), inside


def _shape(tensor: torch.Tensor, kept: Mapping[int, Positions]) -> tuple[int, ...]:
    """The shape after a cut."""
    return tuple(kept[d].shape[-1] if d in kept else n for d, n in enumerate(tensor.shape))


def set_attributes(model: nn.Module, attributes: Iterable[AttributeValue]) -> None:
    """Set module attributes, entries of tuples and lists, and fields of configs.

    A config is usually one object that all modules of a model hold, and another module may derive something else from
    the same field (rotary embeddings a head's width from the number of heads). So a module that needs a new value gets
    a shallow copy of the config of its own, and the shared one keeps its values. Settings that are changed on the
    shared config later, such as the attention implementation, do not reach such a copy.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    copied: set[tuple[int, str]] = set()
    for attribute in attributes:
        owner: Any = modules[attribute.module]
        *path, name = attribute.name.split(".")
        for part in path:
            if (id(owner), part) not in copied:
                setattr(owner, part, copy.copy(getattr(owner, part)))
                copied.add((id(owner), part))
            owner = getattr(owner, part)
        _assign(owner, name, attribute)


def _assign(owner: Any, name: str, attribute: AttributeValue) -> None:
    value: Any = attribute.value
    if attribute.index is not None:
        sequence = getattr(owner, name)
        items = list(sequence)
        items[attribute.index] = value
        value = items if isinstance(sequence, list) else type(sequence)(items)
    try:
        setattr(owner, name, value)
    except FrozenInstanceError:  # a config that forbids changes: this is a copy of it
        object.__setattr__(owner, name, value)


def _check_attribute(model: nn.Module, attribute: Any) -> None:
    """Raise PlanError unless the attribute is there, can be set and has the value the plan was made from."""
    full = f"{attribute.module}.{attribute.name}".lstrip(".")
    try:
        owner: Any = model.get_submodule(attribute.module)
        *path, name = attribute.name.split(".")
        for part in path:
            owner = getattr(owner, part)
        value = getattr(owner, name)
        if attribute.index is not None:
            value = value[attribute.index]
    except (AttributeError, IndexError, TypeError) as error:
        raise PlanError(f"the plan sets {full}, which this {type(model).__name__} does not have") from error
    declared = getattr(type(owner), name, None)
    if isinstance(declared, property) and declared.fset is None:
        raise PlanError(f"the plan sets {full}, which is a read-only property")
    if value != attribute.old:
        raise PlanError(
            f"the plan changes {full} from {attribute.old}, but it is {value}: trace and plan again"
        )


def _builtin_sizes(model: nn.Module, cuts: list[Cut], planned: list[AttributeValue]) -> list[AttributeValue]:
    """The sizes torch.nn modules keep about a cut weight, unless the plan sets them itself."""
    taken = {(a.module, a.name) for a in planned}
    out = []
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if weight is not None:
            owners.setdefault(id(weight), []).append((name, module))
    for cut in cuts:
        for other, module in owners.get(id(cut.tensor), ()):
            for kind, sizes in _BUILTIN_SIZES:
                for name, dim in sizes.items() if isinstance(module, kind) else ():
                    if dim in cut.kept and (other, name) not in taken:
                        out.append(AttributeValue(other, name, None, cut.kept[dim].shape[-1]))
    return out


def _checked_positions(name: str, tensor: torch.Tensor, dims: Mapping[int, Any]) -> dict[int, Positions]:
    out = {}
    for dim, positions in dims.items():
        chosen = np.asarray(positions)
        if not 0 <= dim < tensor.dim():
            raise PlanError(f"the plan cuts dimension {dim} of {name}, which has {tensor.dim()}")
        size = tensor.shape[dim]
        slices = len(dims.get(0, range(tensor.shape[0])))
        valid = chosen.ndim == 1 or (chosen.ndim == 2 and dim > 0 and len(chosen) == slices)
        if not valid or chosen.size == 0 or not np.issubdtype(chosen.dtype, np.integer):
            raise PlanError(f"the plan keeps no valid list of positions of {name} dimension {dim}")
        if chosen.min() < 0 or chosen.max() >= size or (np.diff(chosen) <= 0).any():
            raise PlanError(
                f"kept positions of {name} dimension {dim} must rise strictly within 0..{size - 1}"
            )
        out[dim] = np.ascontiguousarray(chosen, dtype=np.int64)
    return out


def _check_tensors(tensors: Mapping[str, torch.Tensor], cuts: list[Cut]) -> None:
    """Raise TensorError for what cannot be cut without changing something else or losing what the tensor is."""
    for cut in cuts:
        t = cut.tensor
        if t.layout is not torch.strided or t.is_quantized or is_traceable_wrapper_subclass(t):
            raise TensorError(
                f"{cut.name} is no plain dense tensor: load the model without quantisation or sharding"
            )
        if t.is_inference():
            raise TensorError(
                f"{cut.name} was made in inference mode and cannot change: load the model outside of it"
            )
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + _extent(t), name)
        for name, t in tensors.items()
        if isinstance(t, nn.Parameter) and t.device.type != "meta" and t.numel()
    )
    names = {cut.name for cut in cuts}
    end, owner = 0, ""
    for start, stop, name in spans:
        if start < end and (name in names or owner in names):
            raise TensorError(
                f"{name} and {owner} are different parameters in the same memory: give each its own"
            )
        if stop > end:
            end, owner = stop, name


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first to past the last element."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _kernel_word(tensor: torch.Tensor) -> torch.dtype | None:
    """What a kernel of ours takes the tensor's elements for where it lies; None where there is none."""
    if tensor.device.type == "cpu" or (tensor.device.type == "cuda" and cuda.unavailable() is None):
        return WORDS.get(tensor.element_size())
    return None


def _front(whole: torch.Tensor, kept: Mapping[int, Positions]) -> torch.Tensor:
    """What a contiguous tensor that was compacted in its own memory now is."""
    shape = _shape(whole, kept)
    return whole.view(-1)[: math.prod(shape)].view(shape)


def _movable(cuts: list[Cut]) -> list[list[Cut]]:
    """The cuts to be made inside their tensors' own memory, by CUDA device."""
    groups: dict[torch.device, list[Cut]] = {}
    for cut in cuts:
        t = cut.tensor
        as_it_is = cut.values is None and cut.scale is None
        as_it_is = as_it_is and all(positions.ndim == 1 for positions in cut.kept.values())
        if as_it_is and t.is_cuda and t.numel() and t.is_contiguous() and _kernel_word(t):
            groups.setdefault(t.device, []).append(cut)
    return list(groups.values())


def _move(group: list[Cut]) -> None:
    """Compact tensors on one CUDA device together, each inside its own memory."""
    whole = [cut.tensor.detach() for cut in group]
    cuda.compact_many([t.view(WORDS[t.element_size()]) for t in whole], [cut.kept for cut in group])
    for cut, tensor in zip(group, whole, strict=True):
        _give(cut.tensor, _front(tensor, cut.kept))


def _replace(cut: Cut) -> None:
    """Give the cut's tensor object its smaller data; the old memory is free when this returns."""
    tensor = cut.tensor
    try:
        smaller = _smaller(cut)
    except (MemoryError, RuntimeError):  # torch reports exhausted memory as a RuntimeError
        smaller = squeeze(tensor, cut.kept)
        if cut.values is not None:
            smaller.copy_(cut.values)
        elif cut.scale is not None:
            smaller.copy_(cut.scale.apply(smaller))
        log.warning("no memory for a second %s: compacted in place, its old size stays taken", cut.name)
    _give(tensor, smaller)


def _give(tensor: torch.Tensor, smaller: torch.Tensor) -> None:
    """Make ``smaller`` the data of the tensor object ``tensor``."""
    tensor.grad = None
    # Autograd keeps a gradient's expected shape while an earlier graph lives; a change of dtype makes it forget.
    other = torch.float32 if tensor.dtype is not torch.float32 else torch.float64
    if tensor.requires_grad:
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = smaller


def _break(model: nn.Module, old: Compaction, error: BaseException) -> None:
    """Make a half cut model say so instead of computing something."""
    reason = f"compaction failed ({type(error).__name__}: {error})"
    model.llmprune = replace(old, state="broken")  # type: ignore[assignment]
    model.forward = _Unusable(reason)


@dataclass(frozen=True)
class _Unusable:
    """Takes the place of ``forward`` in a model that must not run."""

    reason: str

    def __call__(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise TensorError(f"this model was left half pruned, {self.reason}: load it again")


def _removed(plan: Any) -> list[dict[str, Any]]:
    axes = getattr(plan, "axes", {})
    return [
        {
            "axis": int(axis),
            "kind": axes.get(axis, {}).get("kind", "other"),
            "size": int(axes.get(axis, {}).get("size", 0)),
            "removed": np.asarray(indices).tolist(),
            **{key: axes[axis][key] for key in ("module",) if key in axes.get(axis, {})},
        }
        for axis, indices in getattr(plan, "removed", {}).items()
    ]
