"""The record a pruned model carries: what it was, what is left of it, and how that was decided.

:func:`llmprune.compact` attaches a :class:`Compaction` as ``model.llmprune``; saving a checkpoint, verifying one and
pruning a second time read it. Positions in it are always those of the *original* model, however often it was pruned.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmprune.errors import PlanError
from llmprune.machine.packages import installed

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class AttributeValue:
    """A module attribute as the pruned model needs it.

    ``name`` may be dotted (``config.num_key_value_heads``); ``index`` is set when it is one entry of a tuple or list.
    ``value`` is an integer, or what a kept block has that a block built at its new place has not (any JSON value).
    """

    module: str
    name: str
    index: int | None
    value: Any


@dataclass(frozen=True)
class Step:
    """One pruning: its plan's options and what it took away.

    Attributes:
        options: the plan's options (ratio, kinds, importance, calibration hash, seed, ...), JSON values only.
        removed: per axis ``{"axis", "kind", "size", "removed"}``; ``removed`` are indices of the model as it was
            *before* this step.
        parameters_before: parameter count before this step.
        parameters_after: parameter count after it.
        versions: versions of Python and of the packages that took part.
        repaired: parameters, by their original names, whose remaining weights got new values
            (:mod:`llmprune.repair.repair`).
    """

    options: dict[str, Any]
    removed: list[dict[str, Any]]
    parameters_before: int
    parameters_after: int
    versions: dict[str, str]
    repaired: list[str] = field(default_factory=list)


@dataclass
class Compaction:
    """What has been cut from a model. It is copied with the model by :func:`copy.deepcopy` and pickled with it.

    Attributes:
        model_class: the model's class name.
        module: the Python module that defines the class.
        original_shapes: every parameter (canonical name, tied ones once) and buffer -> its shape before any pruning.
        kept: parameter or buffer name -> dimension -> kept positions of the original, sorted; only what changed. Where
            slices along dimension 0 keep different ones, a row for each slice that is left.
        attributes: the attributes that differ from the original model's, with their values now.
        history: the prunings, oldest first.
        layers: path of a list of blocks -> positions of the original that are left, where blocks have gone. All names
            in this record are the original model's: ``model.layers.5`` stays that, whatever its number is now.
        config: fields of the config from which the model's class is built before anything narrower is made of it, at
            the depth that is left; empty for a model without a config.
        dropped: path of a module that computed the attention or the feed-forward of one block -> the arguments of the
            :class:`llmprune.checkpoints.modeling_llmprune.Nothing` in its place.
        state: ``complete``, or ``broken`` after a compaction that did not reach its end: such a model is unusable.
    """

    model_class: str
    module: str
    original_shapes: dict[str, tuple[int, ...]]
    kept: dict[str, dict[int, Positions]] = field(default_factory=dict)
    attributes: list[AttributeValue] = field(default_factory=list)
    history: list[Step] = field(default_factory=list)
    layers: dict[str, list[int]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)
    state: str = "complete"

    @property
    def repaired(self) -> set[str]:
        """The parameters that a pruning gave new values."""
        return {name for step in self.history for name in step.repaired}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, both as they are now, for each parameter and buffer whose shape changed."""
        out = {}
        for name, dims in self.kept.items():
            shape = list(self.original_shapes[name])
            for dim, positions in dims.items():
                shape[dim] = positions.shape[-1]
            now = self.name_now(name)
            if now is not None:
                out[now] = tuple(shape)
        return out

    def name_now(self, original: str) -> str | None:
        """What a module or tensor of the original is called now; None if it has gone."""
        if any(f"{original}.".startswith(f"{path}.") for path in self.dropped):
            return None
        return self._place_now(original)

    def _place_now(self, original: str) -> str | None:
        """The same for the place of a module that was dropped itself."""
        parts = original.split(".")
        for place, part in enumerate(parts):
            left = self.layers.get(".".join(original.split(".")[:place]))
            if left is not None:
                if int(part) not in left:
                    return None
                parts[place] = str(left.index(int(part)))
        return ".".join(parts)

    def name_then(self, now: str) -> str:
        """What a module or tensor was called in the original."""
        parts = now.split(".")
        for place, part in enumerate(parts):
            left = self.layers.get(".".join(parts[:place]))
            if left is not None:
                parts[place] = str(left[int(part)])
        return ".".join(parts)

    def current(self) -> Compaction:
        """The same record as if the model had always had the blocks that are left, under their names now."""
        if not self.layers and not self.dropped:
            return self
        shapes = {
            now: s for name, s in self.original_shapes.items() if (now := self.name_now(name)) is not None
        }
        kept = {now: dims for name, dims in self.kept.items() if (now := self.name_now(name)) is not None}
        attributes = [
            replace(a, module=now) for a in self.attributes if (now := self.name_now(a.module)) is not None
        ]
        dropped = {
            now: how for path, how in self.dropped.items() if (now := self._place_now(path)) is not None
        }
        return replace(
            self, original_shapes=shapes, kept=kept, attributes=attributes, layers={}, dropped=dropped
        )

    def compose(
        self,
        kept: Mapping[str, Mapping[int, Positions]],
        attributes: Iterable[AttributeValue],
        step: Step,
        layers: Mapping[str, Sequence[int]] | None = None,
        config: dict[str, Any] | None = None,
        odd: Iterable[AttributeValue] = (),
        dropped: Mapping[str, dict[str, Any]] | None = None,
    ) -> Compaction:
        """The record after one more pruning.

        Args:
            kept: what the new plan keeps, as positions and names of the model *as it is now*.
            attributes: the attributes the new pruning sets.
            step: the new pruning's provenance.
            layers: path of a list of blocks -> the positions left of it, of the model as it is now.
            config: :attr:`config` at the new depth; None: as before.
            odd: attributes of kept blocks that are not those of their new places, under the names they get.
            dropped: what :attr:`dropped` gets, with paths of the model as it is now.

        Returns:
            A new record; this one is left as it was.

        Raises:
            PlanError: ``kept`` names a position that this record's model no longer has.
        """
        composed = {name: dict(dims) for name, dims in self.kept.items()}
        for now, dims in kept.items():
            name = self.name_then(now)
            if name not in self.original_shapes:
                raise PlanError(f"the record knows no parameter {name!r}: it belongs to another model")
            left = composed.setdefault(name, {})
            for dim, positions in sorted(dims.items(), reverse=True):  # dimension 0 last: it takes rows along
                size = self.original_shapes[name][dim]
                here = left.get(dim, np.arange(size, dtype=np.int64))
                chosen = np.asarray(positions, dtype=np.int64)
                if chosen.size and (chosen.min() < 0 or chosen.max() >= here.shape[-1]):
                    raise PlanError(
                        f"{name} dimension {dim} has {here.shape[-1]} positions left; the plan keeps position "
                        f"{chosen.max()}"
                    )
                if here.ndim == 2 and 0 in dims:
                    here = here[dims[0]]
                both = here.ndim == chosen.ndim == 2
                left[dim] = np.take_along_axis(here, chosen, 1) if both else here[..., chosen]
            for dim, rows in left.items():
                if 0 in dims and rows.ndim == 2 and dim not in dims:
                    left[dim] = rows[dims[0]]
        depths = dict(self.layers)
        for now, stay in (layers or {}).items():
            path = self.name_then(now)
            earlier = depths.get(path)
            depths[path] = [int(p) if earlier is None else earlier[p] for p in stay]
        done = replace(
            self,
            original_shapes=dict(self.original_shapes),
            kept=composed,
            history=[*self.history, step],
            layers=depths,
            config=self.config if config is None else config,
            dropped=self.dropped | {self.name_then(now): how for now, how in (dropped or {}).items()},
            state="complete",
        )
        original = [replace(a, module=self.name_then(a.module)) for a in attributes]
        original += [replace(a, module=done.name_then(a.module)) for a in odd]
        values = {(a.module, a.name, a.index): a for a in [*self.attributes, *original]}
        done.attributes = list(values.values())
        return done

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return {
            "model_class": self.model_class,
            "module": self.module,
            "original_shapes": {name: list(shape) for name, shape in self.original_shapes.items()},
            "kept": {
                name: {str(dim): positions.tolist() for dim, positions in dims.items()}
                for name, dims in self.kept.items()
            },
            "attributes": [vars(a) for a in self.attributes],
            "history": [vars(step) for step in self.history],
            "layers": self.layers,
            "config": self.config,
            "dropped": self.dropped,
            "state": self.state,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Compaction:
        """The inverse of :meth:`to_json`."""
        return cls(
            model_class=data["model_class"],
            module=data["module"],
            original_shapes={name: tuple(shape) for name, shape in data["original_shapes"].items()},
            kept={
                name: {int(dim): np.asarray(positions, dtype=np.int64) for dim, positions in dims.items()}
                for name, dims in data["kept"].items()
            },
            attributes=[AttributeValue(**a) for a in data["attributes"]],
            history=[Step(**step) for step in data["history"]],
            layers={path: [*map(int, left)] for path, left in data.get("layers", {}).items()},
            config=data.get("config", {}),
            dropped={path: dict(how) for path, how in data.get("dropped", {}).items()},
            state=data.get("state", "complete"),
        )


def fresh(model: torch.nn.Module) -> Compaction:
    """An empty record of an unpruned model (or the one it carries)."""
    record = getattr(model, "llmprune", None)
    if isinstance(record, Compaction):
        return record
    shapes = {name: tuple(p.shape) for name, p in (*model.named_parameters(), *model.named_buffers())}
    return Compaction(
        type(model).__name__,
        type(model).__module__,
        shapes,
        config=config_snapshot(getattr(model, "config", None)),
    )


def config_snapshot(config: object) -> dict[str, Any]:
    """The fields of a transformers config as JSON values; empty for anything else."""
    write = getattr(config, "to_json_string", None)
    if write is None:
        return {}
    snapshot: dict[str, Any] = json.loads(write(use_diff=False))
    return snapshot


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on; a package that is not installed is left out."""
    packages = ("llmprune", "torch", "transformers", "numpy", "safetensors")
    return {"python": platform.python_version(), **installed(packages)}


def fingerprint(model: torch.nn.Module) -> str:
    """What tells one model's plans from another's: sha256 of its class name and its tensors' names and shapes."""
    lines = [type(model).__name__]
    lines += sorted(
        f"{name} {tuple(t.shape)}" for name, t in (*model.named_parameters(), *model.named_buffers())
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
