"""Taking whole blocks out of a model, and what has to follow: numbers, configs, caches.

A block that leaves its list moves the later ones up, and with them everything that counts layers: the index by which a
block finds its part of a cache, the config's depth, its lists with an entry for each layer. Nothing is known of any of
these. The model's class is built on the meta device from its config, then from configs that state fewer layers, until
one gives exactly the tensors that are left, and blocks that differ from the kept ones in nothing but their number. What
changed between the two builds is then changed in the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmprune.checkpoints import modeling_llmprune
from llmprune.checkpoints.config_solver import REFUSALS
from llmprune.checkpoints.record import AttributeValue, Compaction, config_snapshot
from llmprune.checkpoints.universal import base_config, non_persistent_buffers, tensors_of
from llmprune.errors import PlanError
from llmprune.tracing.borrow import is_config
from llmprune.tracing.layers import Drop, renamed
from llmprune.tracing.sublayers import Meeting

Path = tuple[str | int, ...]
"""A place in a config's dictionary: names, and positions in lists."""

Edit = Callable[[Any], Any]

Join = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

Odd = list[tuple[str, str, Any]]
"""(module path, attribute, value) of what kept blocks have and blocks built at their new places have not."""

_PLAIN = (int, float, bool, str, type(None))


@dataclass
class Follow:
    """What has to change in a model besides the lists of blocks.

    Attributes:
        drops: the blocks that go.
        settings: attributes to set: (id of the object, name) -> (object, value).
        config: the model's config for building its class at the new depth, as :func:`config_snapshot` has it; None for
            a model without a config.
        vanished: (module, buffer name) of buffers that the class computes for a kind of layer, none of which is left.
        attributes: attributes of kept blocks in which they differ from what the class builds at their new place; by
            the modules' new paths.
    """

    drops: Sequence[Drop]
    settings: dict[tuple[int, str], tuple[Any, Any]] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    vanished: list[tuple[nn.Module, str]] = field(default_factory=list)
    attributes: list[AttributeValue] = field(default_factory=list)

    def settle(self) -> None:
        """Set what follows (before modules get configs of their own, which are copies)."""
        for (_, name), (owner, value) in self.settings.items():
            setattr(owner, name, value)

    def remove(self, model: nn.Module) -> None:
        """Take the blocks out."""
        for drop in self.drops:
            blocks: Any = model.get_submodule(drop.module)
            for position in reversed(drop.removed.tolist()):
                del blocks[position]
        for owner, name in self.vanished:
            delattr(owner, name)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Note a setting."""
        self.settings[id(owner), name] = owner, value

    def value(self, owner: Any, name: str) -> Any:
        """What an attribute will be by the settings so far."""
        found = self.settings.get((id(owner), name))
        return vars(owner)[name] if found is None else found[1]


def follow(model: nn.Module, drops: Sequence[Drop], record: Compaction) -> Follow:
    """Find what has to change in ``model`` when blocks go; nothing is changed.

    Args:
        model: the model as it is.
        drops: the blocks that go.
        record: its record, with names as the model has them now.

    Raises:
        PlanError: the blocks are not there, are used elsewhere, or no config states the depth that would be left.
    """
    result = Follow(drops)
    if not drops:
        return result
    for drop in drops:
        _check_blocks(model, drop)
    config = getattr(model, "config", None)
    if not (hasattr(config, "to_dict") and hasattr(config, "model_type")):
        for drop in drops:
            _own_numbers(model, drop, result)
        return result
    base = base_config(model, record)
    values = base.to_dict()
    gone = record.dropped
    before = _build(model, base, values, gone)
    if before is None or tensors_of(before).keys() != tensors_of(model).keys():
        raise PlanError(
            f"layers of this {type(model).__name__} cannot go: its class does not build it from its config alone; "
            "merge adapters and undo other changes first"
        )
    for place, drop in enumerate(drops):
        gone = {now: how for path, how in gone.items() if (now := renamed(path, [drop])) is not None}
        values, edits, odd = _shallower(model, base, values, before, drop, gone)
        after = _build(model, base, values, gone)
        if after is None:
            raise PlanError(f"{type(model).__name__} is not built twice alike from its config")
        _collect(model, before, after, drops[:place], drop, odd, result)
        for name in _vanished(before, after, drop):
            home, _, buffer = name.rpartition(".")
            result.vanished.append((model.get_submodule(home), buffer))
        for path, edit in edits.items():
            if edit is not _leave_out:
                _set_in_config(model.config, path, edit, result)
        result.attributes += [AttributeValue(path, name, None, value) for path, name, value in odd]
        before = after
    result.config = config_snapshot(type(base).from_dict(copy.deepcopy(values)))
    return result


@contextmanager
def bypassed(model: nn.Module, drops: Sequence[Drop], join: Join | None = None) -> Iterator[None]:
    """Inside the block, the removed blocks hand the stream on as they got it; what else they return stays.

    Args:
        model: the model, with all its blocks.
        drops: the blocks that go.
        join: makes what is handed on of the stream before and after a block; None: that before.
    """
    handles = []
    try:
        for drop in drops:
            for position in drop.removed.tolist():
                block = model.get_submodule(f"{drop.module}.{position}")
                # Before hooks of others: transformers collects hidden states by such.
                hook = _Bypass(drop, join)
                handles.append(block.register_forward_hook(hook, prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Bypass:
    drop: Drop
    join: Join | None

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        into, out = stream_of(self.drop, args, kwargs, result)
        return with_stream(self.drop, into if self.join is None else self.join(into, out), result)


def stream_of(drop: Drop, args: Any, kwargs: Any, result: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream's tensors into and out of a block, from its call."""
    into = args[drop.input] if isinstance(drop.input, int) else kwargs[drop.input]
    return into, result if drop.output is None else result[drop.output]


def with_stream(drop: Drop | Meeting, stream: torch.Tensor, result: Any) -> Any:
    """A block's result with another tensor for the stream."""
    target = drop.output
    if target is None:
        return stream
    if isinstance(target, str):
        changed = copy.copy(result)
        changed[target] = stream
        return changed
    items = [stream if place == target else item for place, item in enumerate(result)]
    return items if isinstance(result, list) else tuple(items)


def _check_blocks(model: nn.Module, drop: Drop) -> None:
    kind = type(model).__name__
    try:
        blocks: Any = model.get_submodule(drop.module)
    except AttributeError as error:
        raise PlanError(
            f"the plan takes blocks out of {drop.module}, which this {kind} does not have"
        ) from error
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or len(blocks) != drop.size:
        raise PlanError(
            f"{drop.module} of this {kind} is no list of the {drop.size} blocks that the plan was made for"
        )
    inside = drop.module + "."
    for position in drop.removed.tolist():
        own = {id(module) for module in blocks[position].modules()}
        for path, module in model.named_modules(remove_duplicate=False):
            if id(module) in own and not path.startswith(inside):
                raise PlanError(f"{inside}{position} cannot go: a part of it is also {path}")


def _own_numbers(model: nn.Module, drop: Drop, result: Follow) -> None:
    """Integers in which every block of a model without a config states its position, moved up."""
    blocks: Any = model.get_submodule(drop.module)
    seen: dict[tuple[str, str], dict[int, Any]] = {}
    for position, block in enumerate(blocks):
        for path, module in block.named_modules():
            for name, value in vars(module).items():
                if type(value) is int:
                    seen.setdefault((path, name), {})[position] = (module, value)
    for (_, name), found in seen.items():
        if len(found) > 1 and all(value == position for position, (_, value) in found.items()):
            for new, old in enumerate(drop.kept):
                if old in found and old != new:
                    result.set(found[old][0], name, new)


def _build(
    model: nn.Module, base: Any, values: Mapping[str, Any], gone: dict[str, dict[str, Any]]
) -> Any | None:
    """A model of ``model``'s class on the meta device; None where the config or the class refuses the values.

    ``gone`` are branches that were dropped before (:attr:`llmprune.checkpoints.record.Compaction.dropped`).
    """
    try:
        with torch.device("meta"):
            built = type(model)(type(base).from_dict(copy.deepcopy(dict(values))))
            modeling_llmprune.drop(built, gone)
            return built
    except REFUSALS:
        return None


def _shallower(
    model: nn.Module,
    base: Any,
    values: dict[str, Any],
    before: nn.Module,
    drop: Drop,
    gone: dict[str, dict[str, Any]],
) -> tuple[dict[str, Any], dict[Path, Edit], Odd]:
    """The config that gives the kept blocks.

    Returns:
        Its values, the edits that made it, and (path, attribute, value) of what the kept blocks have and blocks built
        at their new places have not.
    """
    best: tuple[dict[str, Any], dict[Path, Edit], Odd] | None = None

    def exact(edits: dict[Path, Edit]) -> bool:
        """Try a candidate, and keep it if it is the best so far."""
        nonlocal best
        changed = copy.deepcopy(values)
        for path, edit in edits.items():
            _put(changed, path, edit)
        after = _build(model, base, changed, gone)
        odd = None if after is None else _differences(before, after, drop)
        if odd is not None and (best is None or len(odd) < len(best[2])):
            best = changed, edits, odd
        return odd == []

    numbers = list(_integers(values))
    depths = [path for path, value in numbers if value == drop.size]
    if any(exact(edits) for depth in depths for edits in _variants(base, values, depth, drop)):
        return _found(best)
    # Numbers that count some of the layers, from the first or from the last: one of them at a time.
    starts = [next(_variants(base, values, depth, drop)) for depth in depths] if best is None else [best[1]]
    for edits in starts:
        home = next(iter(edits))[:-1]
        for path, value in numbers:
            if path in edits or path[:-1] != home or value > drop.size:
                continue
            counts = {_first(drop, value), _last(drop, value)} - {value}
            if any(exact({**edits, path: _SetTo(count)}) for count in sorted(counts)):
                return _found(best)
    if best is None:
        raise PlanError(
            f"layers of {drop.module} cannot go: no config of {type(model).__name__} states "
            f"{len(drop.kept)} of its {drop.size} blocks and leaves the rest as it is"
        )
    return best


def _found(
    best: tuple[dict[str, Any], dict[Path, Edit], Odd] | None,
) -> tuple[dict[str, Any], dict[Path, Edit], Odd]:
    assert best is not None
    return best


def _variants(base: Any, values: dict[str, Any], depth: Path, drop: Drop) -> Iterator[dict[Path, Edit]]:
    """Ways to state the smaller depth.

    With lists beside it cut along, numbers of layers in lists moved up, or not; or lists left out that the class fills
    in by itself.
    """
    beside = _at(values, depth[:-1])
    lists = (
        {name: v for name, v in beside.items() if isinstance(v, (list, tuple))}
        if isinstance(beside, dict)
        else {}
    )
    cut: dict[Path, Edit] = {
        (*depth[:-1], name): _Cut(drop) for name, v in lists.items() if len(v) == drop.size
    }
    moved: dict[Path, Edit] = {
        (*depth[:-1], name): _Move(drop) for name, v in lists.items() if _positions(v, drop.size)
    }
    smaller: dict[Path, Edit] = {depth: _SetTo(len(drop.kept))}
    seen: list[dict[Path, Edit]] = []
    for edits in ({**moved, **cut}, {**cut, **moved}, cut, moved, {}):
        whole = {**smaller, **edits}
        if not any(whole == other for other in seen):
            seen.append(whole)
            yield whole
    own: dict[Path, Edit] = dict.fromkeys(_filled_in(base, values, depth[:-1], lists), _leave_out)
    if own:
        yield {**smaller, **cut, **own}


def _filled_in(base: Any, values: dict[str, Any], home: Path, names: Iterable[str]) -> list[Path]:
    """Those of a config's lists that the class gives the same values when they are left out together."""
    without = copy.deepcopy(values)
    for name in names:
        del _at(without, home)[name]
    try:
        made = _at(type(base).from_dict(without).to_dict(), home)
    except REFUSALS:
        return []
    return [(*home, name) for name in names if _same(made.get(name), _at(values, home)[name])]


def _positions(values: Sequence[Any], size: int) -> bool:
    """Whether a list may be one of layers' numbers."""
    ints = all(type(v) is int for v in values)
    return bool(values) and ints and all(0 <= v < size for v in values) and len(set(values)) == len(values)


def _first(drop: Drop, count: int) -> int:
    """How many of the first ``count`` blocks stay."""
    return sum(position < count for position in drop.kept)


def _last(drop: Drop, count: int) -> int:
    """How many of the last ``count`` blocks stay."""
    return sum(position >= drop.size - count for position in drop.kept)


@dataclass(frozen=True)
class _SetTo:
    value: int

    def __call__(self, _: Any) -> int:
        return self.value


@dataclass(frozen=True)
class _Cut:
    drop: Drop

    def __call__(self, values: Any) -> Any:
        return type(values)([values[position] for position in self.drop.kept])


@dataclass(frozen=True)
class _Move:
    drop: Drop

    def __call__(self, values: Any) -> Any:
        kept = self.drop.kept
        return type(values)([kept.index(position) for position in values if position in kept])


def _integers(values: Any, at: Path = ()) -> Iterator[tuple[Path, int]]:
    """Every positive integer of a config, of the configs and the lists of integers inside it."""
    if isinstance(values, dict):
        for name, value in values.items():
            if isinstance(name, str):
                yield from _integers(value, (*at, name))
    elif isinstance(values, list) and all(type(v) is int for v in values):
        for place, value in enumerate(values):
            if value > 0:
                yield (*at, place), value
    elif type(values) is int and values > 0:
        yield at, values


def _at(values: Any, path: Path) -> Any:
    for part in path:
        values = values[part]
    return values


def _put(values: Any, path: Path, edit: Edit) -> None:
    """Edit a place; one that is left out is gone."""
    home = _at(values, path[:-1])
    if edit is _leave_out:
        del home[path[-1]]
    else:
        home[path[-1]] = edit(home[path[-1]])


def _leave_out(value: Any) -> Any:
    """The edit by which a field is left to the class."""
    return value


def _differences(before: nn.Module, after: nn.Module, drop: Drop) -> Odd | None:
    """What kept blocks have that ``after`` gives others at their places; None if not even the tensors are the same."""
    shapes = {}
    gone = set(_vanished(before, after, drop))
    for name, tensor in tensors_of(before).items():
        new = renamed(name, [drop])
        if new is not None and name not in gone:
            shapes[new] = tensor.shape
    if shapes != {name: tensor.shape for name, tensor in tensors_of(after).items()}:
        return None
    odd = []
    for place, old in enumerate(drop.kept):
        theirs = dict(after.get_submodule(f"{drop.module}.{place}").named_modules(remove_duplicate=False))
        for path, module in before.get_submodule(f"{drop.module}.{old}").named_modules(
            remove_duplicate=False
        ):
            other = theirs.get(path)
            if other is None or type(other) is not type(module):
                return None
            for name, value in _plain(module):
                now = getattr(other, name, None)
                if not _same(value, now) and not _follows(value, now, old, place, drop):
                    odd.append((f"{drop.module}.{place}.{path}".rstrip("."), name, value))
    return odd


def _vanished(before: nn.Module, after: nn.Module, drop: Drop) -> list[str]:
    """Computed buffers outside of the stack that ``after`` has not: rope tables of a kind of layer that is gone."""
    left = tensors_of(after).keys()
    inside = drop.module + "."
    names = [name for name, _ in non_persistent_buffers(before)]
    return [name for name in names if name not in left and not name.startswith(inside)]


def _follows(value: Any, now: Any, old: int, new: int, drop: Drop) -> bool:
    """Whether a value is that of a block's new place: its number, or a list with an entry for each layer."""
    if type(value) is int and type(now) is int:
        return value == old and now == new
    return _is_list(value, drop.size) and _same(now, _Cut(drop)(value))


def _plain(owner: Any) -> Iterator[tuple[str, Any]]:
    """Attributes that are numbers, texts, or made of these."""
    for name, value in vars(owner).items():
        if _is_plain(value):
            yield name, value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(isinstance(key, (str, int)) and _is_plain(item) for key, item in value.items())
    return isinstance(value, _PLAIN)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(one) == list(other)
    return type(one) is type(other) and bool(one == other or (one != one and other != other))


def _collect(
    model: nn.Module,
    before: nn.Module,
    after: nn.Module,
    done: Sequence[Drop],
    drop: Drop,
    odd: Odd,
    result: Follow,
) -> None:
    """Note what differs between two builds and is in ``model`` as in the first.

    Args:
        model: the model, nothing taken out of it.
        before: built with the blocks of ``done`` gone.
        after: built with those of ``drop`` gone as well.
        done: the drops before this one.
        drop: this one.
        odd: what ``model`` keeps.
        result: receives the settings.
    """
    theirs = dict(after.named_modules(remove_duplicate=False))
    earlier = dict(before.named_modules(remove_duplicate=False))
    seen: set[int] = set()
    for original, mine in model.named_modules(remove_duplicate=False):
        middle = renamed(original, done)
        new = None if middle is None else renamed(middle, [drop])
        if middle in earlier and new in theirs:
            assert middle is not None
            without = {name for path, name, _ in odd if path == new}
            _transfer(mine, earlier[middle], theirs[str(new)], drop, without, seen, result)


def _transfer(
    mine: Any, old: Any, new: Any, drop: Drop, without: set[str], seen: set[int], result: Follow
) -> None:
    """Changes of one module or config, and of the configs it holds."""
    if id(mine) in seen:
        return
    seen.add(id(mine))
    for name, value in list(vars(new).items()):
        if name not in vars(old) or name not in vars(mine) or name in without:
            continue
        was = vars(old)[name]
        if is_config(value) and is_config(was) and is_config(vars(mine)[name]):
            _transfer(vars(mine)[name], was, value, drop, set(), seen, result)
        elif _is_plain(value) and _is_plain(was) and not _same(value, was):
            now = result.value(mine, name)
            if _same(now, was):
                result.set(mine, name, copy.deepcopy(value))
            elif _is_list(now, drop.size) and _is_list(was, drop.size) and _same(value, _Cut(drop)(was)):
                result.set(mine, name, _Cut(drop)(now))  # its entries are not the first ones: pruned before


def _is_list(value: Any, size: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == size


def _set_in_config(config: Any, path: Path, edit: Edit, result: Follow) -> None:
    """Note an edit of a config's dictionary as a setting of the config object."""
    names = [part for part in path if isinstance(part, str)]
    owner = config
    for name in names[:-1]:
        owner = getattr(owner, name)
    value = getattr(owner, names[-1])
    if isinstance(path[-1], int):
        items = list(value)
        items[path[-1]] = edit(items[path[-1]])
        result.set(owner, names[-1], items if isinstance(value, list) else type(value)(items))
    else:
        result.set(owner, names[-1], edit(value))
