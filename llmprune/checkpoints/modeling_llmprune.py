"""A pruned model, built from the stock class that computes it.

``config.llmprune`` says in what the pruned model differs from the stock one: the shapes of its tensors, and the sizes
its modules keep as attributes. The class below calls the stock ``__init__``, makes the listed tensors smaller and sets
the attributes; ``from_pretrained`` then fills the tensors from the safetensors files as for any other model. Nothing
else happens here: no other file is read, and no package but torch and transformers is needed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class Pruned:
    """Mixed in before a stock model class: builds that class, then makes it smaller."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        for path, original, _ in config.llmprune["config"]:
            _assign(config, path, original)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        shrink(self, config.llmprune)


def shrink(model: Any, spec: dict[str, Any]) -> None:
    """Make ``model`` the pruned one, tensors' values excepted.

    Args:
        model: a stock model as its class builds it, on any device.
        spec: ``shapes``: parameter or buffer -> new shape, no size larger than before (tied parameters under the first
            of their names). ``buffers``: buffers whose values are stored in the checkpoint rather than computed anew.
            ``attributes``: module -> attribute -> value, ``name[2]`` for an entry of a list or tuple; of a dotted name
            the objects on the way (a config) become the module's own. ``config``: ``[path, original, value]`` in the
            model's own config. ``dropped``: module -> the arguments of the :class:`Nothing` in its place.
    """
    drop(model, spec.get("dropped", {}))
    # Keyed by id, and held with the tensor it replaces, so that the id stays its own.
    smaller: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for prefix, module in model.named_modules():
        tensors = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        tensors.update(module.named_buffers(recurse=False, remove_duplicate=False))
        for name, tensor in tensors.items():
            shape = spec["shapes"].get(f"{prefix}.{name}".lstrip("."))
            if shape is not None and id(tensor) not in smaller:
                smaller[id(tensor)] = tensor, _narrowed(tensor, shape)
            if id(tensor) in smaller:
                setattr(module, name, smaller[id(tensor)][1])
    for full in spec["buffers"]:
        prefix, _, name = full.rpartition(".")
        module = model.get_submodule(prefix)
        module.register_buffer(name, getattr(module, name), persistent=True)
    copied: set[tuple[int, str]] = set()
    for prefix, attributes in spec["attributes"].items():
        for attribute, value in attributes.items():
            owner = model.get_submodule(prefix)
            *path, name = attribute.split(".")
            for part in path:
                if (id(owner), part) not in copied:
                    setattr(owner, part, copy.copy(getattr(owner, part)))
                    copied.add((id(owner), part))
                owner = getattr(owner, part)
            _assign(owner, name, value)
    for path, _, value in spec["config"]:
        _assign(model.config, path, value)


class Nothing(nn.Module):
    """Stands where attention or a feed-forward was: what it adds to the stream is zero.

    Args:
        input: the argument that has the shape of the result (place or keyword).
        output: which entry of the result is added to the stream; None: the result itself.
        entries: how many entries there are, None for all others; None: the result is a tensor.
    """

    def __init__(self, input: int | str, output: int | None, entries: int | None) -> None:
        super().__init__()
        self.input, self.output, self.entries = input, output, entries

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros, as the module that was here returned its result."""
        zeros = torch.zeros_like(args[self.input] if isinstance(self.input, int) else kwargs[self.input])
        if self.entries is None:
            return zeros
        return tuple(zeros if place == self.output else None for place in range(self.entries))


def drop(model: Any, dropped: dict[str, dict[str, Any]]) -> None:
    """Put :class:`Nothing` in the place of modules."""
    for path, how in dropped.items():
        home, _, name = path.rpartition(".")
        setattr(model.get_submodule(home), name, Nothing(**how))


def _narrowed(tensor: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """The leading part of ``tensor`` as a tensor (or parameter) of its own."""
    part = tensor.detach()[tuple(slice(size) for size in shape)].clone()
    return (
        nn.Parameter(part, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part
    )


def _assign(owner: Any, path: str, value: Any) -> None:
    """``owner.path = value``; the path may end in ``[i]``."""
    *parts, name = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    name, _, index = name.partition("[")
    if index:
        sequence = getattr(owner, name)
        items = [value if i == int(index[:-1]) else item for i, item in enumerate(sequence)]
        value = items if isinstance(sequence, list) else type(sequence)(items)
    setattr(owner, name, value)
