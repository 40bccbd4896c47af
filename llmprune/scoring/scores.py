"""Scores, one number per index of every scored axis: what a plan is made of, kept in a file or as JSON."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmprune.checkpoints.atomic import write_file
from llmprune.errors import InputError
from llmprune.out_of_core.shards import UNREADABLE

_FORMAT = "llmprune.scores/1"


class Scores(Mapping[int, np.ndarray]):
    """Axis id -> float64 scores, one per index of the axis; larger matters more. Ties go by index.

    Attributes:
        importance, aggregation, seed: What made them.
        calibration_hash: sha256 of the calibration samples; None where none were used.
        fingerprint: Of the graph they belong to.
        kinds: Axis id -> kind of axis.
        nested: Axis id -> float64 (size around it, axis size), for query heads and for channels inside experts: the
            score of each one in each key-value head, or expert, which can then lose a choice of its own.
        comparable: Whether scores are in units of the loss, so that those of all axes compare as they are.
        curves: Axis id -> what was measured of it (:mod:`llmprune.planning.sensitivity`): how many indices went, and
            the cost.
        pinned: Id of a stack of layers -> position -> why the model's class cannot build the rest without that block.
    """

    def __init__(
        self,
        values: Mapping[int, np.ndarray],
        *,
        importance: str,
        aggregation: str,
        seed: int,
        calibration_hash: str | None,
        fingerprint: str,
        kinds: Mapping[int, str],
        nested: Mapping[int, np.ndarray] | None = None,
        pinned: Mapping[int, Mapping[int, str]] | None = None,
        comparable: bool = False,
        curves: Mapping[int, Sequence[tuple[int, float]]] | None = None,
    ):
        self._values = {int(axis): np.asarray(array, dtype=np.float64) for axis, array in values.items()}
        self.nested = {
            int(axis): np.asarray(array, dtype=np.float64) for axis, array in (nested or {}).items()
        }
        self.pinned = {int(a): {int(i): w for i, w in why.items()} for a, why in (pinned or {}).items()}
        self.importance, self.aggregation, self.seed = importance, aggregation, seed
        self.comparable = comparable
        self.curves = {
            int(a): [(int(n), float(c)) for n, c in points] for a, points in (curves or {}).items()
        }
        self.calibration_hash, self.fingerprint, self.kinds = calibration_hash, fingerprint, dict(kinds)

    def __getitem__(self, axis: int) -> np.ndarray:
        """The scores of one axis, shape (axis size,)."""
        return self._values[axis]

    def __iter__(self) -> Iterator[int]:
        """The axes' ids, in the graph's order."""
        return iter(self._values)

    def __len__(self) -> int:
        """How many axes are scored."""
        return len(self._values)

    def __str__(self) -> str:
        """A table: per kind the number of axes and groups, and the least, median and greatest score."""
        rows = [("kind", "axes", "groups", "least", "median", "greatest")]
        for kind in dict.fromkeys(self.kinds[axis] for axis in self):
            arrays = [self[axis] for axis in self if self.kinds[axis] == kind]
            every = np.concatenate(arrays)
            figures = [f"{f(every):.3e}" for f in (np.min, np.median, np.max)] if every.size else ["", "", ""]
            rows.append((kind, str(len(arrays)), str(every.size), figures[0], figures[1], figures[2]))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [f"{self.importance}, {self.aggregation} over members, seed {self.seed}"]
        for row in rows:
            cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells))
        return "\n".join(lines)

    def __repr__(self) -> str:
        """A short form."""
        return f"Scores({len(self)} axes, importance={self.importance!r}, aggregation={self.aggregation!r})"

    def _header(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "importance": self.importance,
            "aggregation": self.aggregation,
            "seed": self.seed,
            "calibration_hash": self.calibration_hash,
            "fingerprint": self.fingerprint,
            "kinds": {str(axis): kind for axis, kind in self.kinds.items()},
            "pinned": self.pinned,
            "comparable": self.comparable,
            "curves": self.curves,
        }

    @classmethod
    def _made(
        cls, header: Mapping[str, Any], values: Mapping[int, np.ndarray], nested: Mapping[int, np.ndarray]
    ) -> Scores:
        if header.get("format") != _FORMAT:
            raise InputError(
                f"these are no scores of format {_FORMAT!r}: their format is {header.get('format')!r}"
            )
        return cls(
            values,
            importance=header["importance"],
            aggregation=header["aggregation"],
            seed=header["seed"],
            calibration_hash=header["calibration_hash"],
            fingerprint=header["fingerprint"],
            kinds={int(axis): kind for axis, kind in header["kinds"].items()},
            nested=nested,
            pinned=header.get("pinned"),
            comparable=header.get("comparable", False),
            curves=header.get("curves"),
        )

    def to_json(self) -> str:
        """JSON text that :meth:`from_json` reads back, bit for bit."""
        values = {str(axis): self[axis].tolist() for axis in self}
        nested = {str(axis): table.tolist() for axis, table in self.nested.items()}
        return json.dumps({**self._header(), "values": values, "nested": nested})

    @classmethod
    def from_json(cls, text: str) -> Scores:
        """What :meth:`to_json` wrote.

        Raises:
            InputError: the text is something else.
        """
        try:
            data = json.loads(text)
            values, nested = (
                {int(axis): np.array(v, dtype=np.float64) for axis, v in data[part].items()}
                for part in ("values", "nested")
            )
            return cls._made(data, values, nested)
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise InputError(f"this is not the JSON of scores: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path``: .npz (compressed) or .json; a crash leaves the old file or the new one.

        Raises:
            InputError: the path ends otherwise.
            OSError: it cannot be written.
        """
        path = Path(path)
        if path.suffix == ".json":
            write_file(path, self.to_json().encode())
        elif path.suffix == ".npz":
            header = np.array(json.dumps(self._header()))
            arrays = {f"axis_{axis}": self[axis] for axis in self}
            arrays |= {f"nested_{axis}": table for axis, table in self.nested.items()}
            file = io.BytesIO()
            np.savez_compressed(file, allow_pickle=False, header=header, **arrays)
            write_file(path, file.getvalue())
        else:
            raise InputError(f"scores are saved as .npz or .json, not as {str(path)!r}")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """What :meth:`save` wrote.

        Raises:
            InputError: there is no such file, or it holds something else.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"scores file {str(path)!r} does not exist")
        try:
            if path.suffix != ".npz":
                return cls.from_json(path.read_text(encoding="utf-8"))
            with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
                header = json.loads(str(data["header"]))
                values = {int(name[5:]): data[name] for name in data.files if name.startswith("axis_")}
                nested = {int(name[7:]): data[name] for name in data.files if name.startswith("nested_")}
            return cls._made(header, values, nested)
        except InputError:
            raise
        except UNREADABLE as error:
            raise InputError(f"{str(path)!r} holds no scores: {error!r}") from error
