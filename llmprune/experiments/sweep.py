"""Sweeps: many prunings of one model, each judged, in a folder that a later run goes on with.

A sweep is a manifest of independent jobs. Each job's result is a file of its own that appears whole or not at all, so a
sweep that was killed is started again with the same words and does what is left; jobs may run in any order, and on a
Ray cluster at once. When all are done, one table of them is written as JSON (and Parquet, with pyarrow), as Markdown
and as a plot.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmprune.checkpoints.atomic import write_file
from llmprune.errors import InputError, LlmpruneError
from llmprune.experiments.baselines import (
    cut_independently,
    cut_matrices,
    weight_scores,
    with_sparse_kernels,
    zero_elements,
    zero_independently,
)
from llmprune.experiments.experiments import Experiment, Facts, Job, settled
from llmprune.machine.timing import hardware

if TYPE_CHECKING:
    from llmprune.planning.plan import Plan
    from llmprune.planning.request import Request
    from llmprune.scoring.calibration import Batch
    from llmprune.scoring.scores import Scores
    from llmprune.tracing.graph import Graph

log = logging.getLogger(__name__)

WINDOWS = 100
"""Windows of 128 tokens that perplexity is measured on."""

_FORMAT = 1


@dataclass(frozen=True)
class Inputs:
    """What all jobs of a sweep share.

    Attributes:
        model: folder of the model.
        calibration: file of the calibration text.
        evaluation: file of the text that perplexity is measured on.
        texts: name -> file of further calibration texts.
        windows: the most windows of the evaluation text.
        trust: whether the model's folder may bring code along.
    """

    model: Path
    calibration: Path
    evaluation: Path
    texts: Mapping[str, Path] = field(default_factory=dict)
    windows: int = WINDOWS
    trust: bool = False

    def digest(self) -> dict[str, Any]:
        """What identifies the inputs: names and hashes, no places."""
        weights = hashlib.sha256()
        for path in sorted(self.model.iterdir()):
            if path.is_file():
                weights.update(f"{path.name} {path.stat().st_size}\n".encode())
                with path.open("rb") as file:  # the head of a weights' file changes with every training run
                    weights.update(file.read(1 << 20))
        texts = {"": self.calibration, **self.texts}
        return {
            "model": self.model.resolve().name,
            "weights": weights.hexdigest(),
            "evaluation": _hash(self.evaluation),
            "texts": {name: _hash(path) for name, path in texts.items()},
            "windows": self.windows,
        }


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Bench:
    """One process's model and texts, read once, for any number of jobs."""

    def __init__(self, inputs: Inputs) -> None:
        from llmprune.checkpoints.checkpoint import load_model, load_tokenizer
        from llmprune.commands.common import read_text
        from llmprune.tracing.trace import trace

        self.inputs = inputs
        self.model: nn.Module = load_model(inputs.model, trust_remote_code=inputs.trust).eval()
        self.tokenizer = load_tokenizer(inputs.model)
        if self.tokenizer is None:
            raise InputError(f"a sweep reads texts and {inputs.model} has no tokenizer: copy its files there")
        text = read_text(inputs.evaluation)
        self.evaluation = torch.tensor(self.tokenizer(text, verbose=False)["input_ids"])
        self.graph: Graph = trace(self.model)
        self.parameters = self.graph.numel({})
        self.dense = self.perplexity(self.model)
        self._scores: tuple[tuple[Any, ...], Scores] | None = None

    @property
    def layers(self) -> list[str]:
        """Paths of the layers, stack after stack."""
        return [f"{stack.module}.{i}" for stack in self.graph.layers for i in range(stack.size)]

    def perplexity(self, model: nn.Module) -> float:
        """On the evaluation text."""
        from llmprune.evaluation.perplexity import perplexity

        return perplexity(model, self.tokenizer, self.evaluation, max_windows=self.inputs.windows)

    def calibration(self, job: Job) -> Batch | None:
        """The samples a job scores by."""
        from llmprune.scoring.importance import lookup
        from llmprune.scoring.sampling import calibration_for

        if not lookup(job["importance"]).calibrated:
            return None
        source = self._text(job)
        return calibration_for(
            job["importance"], self.model, source, self.tokenizer, job["samples"], job["length"]
        )

    def _text(self, job: Job) -> str:
        texts = {"": self.inputs.calibration, **self.inputs.texts}
        if job["text"] not in texts:
            raise InputError(f"there is no calibration text {job['text']!r}: there are {', '.join(texts)}")
        return str(texts[job["text"]])

    def run(self, job: Job) -> dict[str, Any]:
        """The figures of a job (every setting given); of one that cannot be done the reason, as ``infeasible``."""
        if job["form"] == "dense":
            return self._judge(self.model, {}, job)
        try:
            return self._run(job)
        except LlmpruneError as error:
            return {"infeasible": str(error)}

    def _run(self, job: Job) -> dict[str, Any]:
        from llmprune.compaction.compact import compacted_copy
        from llmprune.scoring.sampling import long_calibration

        model, graph = self.model, self.graph
        batch = self.calibration(job)
        plan = self._plan(job, batch)
        form = job["form"]
        figures: dict[str, Any] = {
            "removed": plan.ratio,
            "parameters": plan.parameters_after,
            "macs": graph.macs(
                {axis: gone.shape[-1] for axis, gone in plan.removed.items() if axis < len(graph.axes)},
                [*plan.layers, *plan.sublayers],
            ),
        }
        weights = None
        if job["repair"] != "none":
            from llmprune.repair.repair import repair

            if form != "groups":
                raise InputError(f"repair goes with groups, not with {form}")
            data = long_calibration(model, self._text(job), self.tokenizer, job["samples"])
            order = "one-shot" if job["repair"] == "one-shot" else "sequential"
            found = repair(model, plan, data, order=order)
            weights = found.weights
            figures["repair tokens"] = found.tokens
        if form == "groups":
            return self._judge(compacted_copy(model, plan, weights), figures, job)
        elements = weight_scores(model, job["importance"], batch, job["seed"])
        if form.startswith("independent"):
            make = cut_independently if form == "independent" else zero_independently
            return self._judge(make(model, graph, plan, elements), figures, job)
        names = cut_matrices(graph, plan)
        count = plan.parameters_before - plan.parameters_after
        pattern = "2:4" if form.startswith("2:4") else ""
        other = zero_elements(model, names, elements, count, pattern, job["importance"] == "activation")
        if form.endswith("on sparse kernels"):
            other = with_sparse_kernels(other, names)
        return self._judge(other, figures, job)

    def _plan(self, job: Job, batch: Batch | None) -> Plan:
        from llmprune.planning.plan import plan
        from llmprune.scoring.score import score

        ratio = job["ratio"]
        kinds = tuple(ratio) if isinstance(ratio, Mapping) else tuple(job["kinds"])
        what = (job["importance"], job["aggregation"], job["seed"], kinds, batch.hash if batch else None)
        if (
            self._scores is None or self._scores[0] != what
        ):  # neighbouring jobs often differ in nothing but the ratio
            scores = score(
                self.model,
                self.graph,
                batch,
                job["importance"],
                job["aggregation"],
                seed=job["seed"],
                quiet=True,
                kinds=kinds,
            )
            self._scores = (what, scores)
        return plan(
            self.graph,
            self._scores[1],
            ratio,
            kinds=kinds,
            allocation=job["allocation"],
            protect_first=job["protect_first"],
            protect_last=job["protect_last"],
            round_to=job["round_to"],
            scope=job["scope"],
            seed=job["seed"],
        )

    def _judge(self, model: nn.Module, figures: dict[str, Any], job: Job) -> dict[str, Any]:
        result = {"removed": 0.0, "parameters": self.parameters, **figures, "dense perplexity": self.dense}
        result["perplexity"] = self.perplexity(model)
        if job["timed"]:
            from llmprune.planning.request import measure_request

            request: Request = measure_request(model)
            result["latency"] = request.seconds
            result["request"] = request.to_json()
        return result


@dataclass
class Sweep:
    """A folder of jobs.

    Args:
        experiment: the question.
        inputs: what all jobs share.
        folder: where everything goes; made if it is not there.
        settings: of all jobs, over :data:`llmprune.experiments.experiments.DEFAULTS`.

    Raises:
        InputError: the folder holds another sweep, or cannot be told from one.
    """

    experiment: Experiment
    inputs: Inputs
    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict, init=False)
    bench: Bench | None = field(default=None, init=False)

    def prepare(self) -> None:
        """Make the manifest, or see that the folder's is the same."""
        self.bench = Bench(self.inputs)
        facts = Facts(self.settings, self.bench.layers, list(self.inputs.texts))
        digest = self.inputs.digest()
        for short in self.experiment.make(facts):
            job = settled(short, facts)
            text = json.dumps([digest, job], sort_keys=True)
            self.jobs[hashlib.sha256(text.encode()).hexdigest()[:16]] = job
        manifest = {
            "format": _FORMAT,
            "experiment": self.experiment.name,
            "question": self.experiment.question,
            "inputs": digest,
            "jobs": self.jobs,
        }
        path = self.folder / "manifest.json"
        if path.is_file():
            found = _read(path)
            if found is None or found != json.loads(json.dumps(manifest)):
                what = "a damaged manifest" if found is None else f"another sweep ({found.get('experiment')})"
                raise InputError(f"{self.folder} holds {what}: choose another output folder")
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise InputError(f"{self.folder} exists and holds no sweep: choose another output folder")
        (self.folder / "jobs").mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(manifest, indent=1).encode())

    @property
    def pending(self) -> dict[str, Job]:
        """The jobs without a result, in order."""
        return {key: job for key, job in self.jobs.items() if _read(self._place(key)) is None}

    def _place(self, key: str) -> Path:
        return self.folder / "jobs" / f"{key}.json"

    def _done(self, key: str, result: dict[str, Any], seconds: float) -> None:
        self._place(key).parent.mkdir(exist_ok=True)
        data = {"settings": self.jobs[key], "result": result, "seconds": round(seconds, 3)}
        write_file(self._place(key), json.dumps(data, indent=1).encode())

    def run(self, ray: bool = False, progress: Callable[[str], None] = lambda text: None) -> None:
        """Do what is left, and write the tables and plots.

        Args:
            ray: on a Ray cluster (or this machine's processors by Ray), a job at a time on each processor.
            progress: told each finished job.

        Raises:
            InputError: Ray is asked for and not installed.
        """
        if ray and find_spec("ray") is None:
            raise InputError("Ray is not installed: pip install llmprune[ray], or leave out --ray")
        if not self.jobs:
            self.prepare()
        pending = self.pending
        results = _by_ray(self.inputs, pending) if ray else self._in_turn(pending)
        for number, (key, result, seconds) in enumerate(results, 1):
            self._done(key, result, seconds)
            progress(f"{number} of {len(pending)}")
        self.write()

    def _in_turn(self, pending: Mapping[str, Job]) -> Iterator[tuple[str, dict[str, Any], float]]:
        for key, job in pending.items():
            if self.bench is None:
                self.bench = Bench(self.inputs)
            start = time.perf_counter()
            result = self.bench.run(copy.deepcopy(job))
            yield key, result, time.perf_counter() - start

    def rows(self) -> list[dict[str, Any]]:
        """A flat row for each finished job, in the manifest's order."""
        rows = []
        for key in self.jobs:
            data = _read(self._place(key))
            if data is not None:
                rows.append({"job": key, **data["settings"], **data["result"], "seconds": data["seconds"]})
        return rows

    def write(self) -> None:
        """Write results.json, results.parquet (with pyarrow), table.md, plot.png and plot.svg."""
        from llmprune.reporting.plots import draw

        rows = self.rows()
        data = {
            "format": _FORMAT,
            "experiment": self.experiment.name,
            "question": self.experiment.question,
            "inputs": self.inputs.digest(),
            "machine": machine(),
            "rows": rows,
        }
        write_file(self.folder / "results.json", json.dumps(data, indent=1).encode())
        if find_spec("pyarrow") is not None:
            self._write_parquet(rows)
        write_file(self.folder / "table.md", self.table().encode())
        for suffix, content in draw(self.experiment, rows, self.inputs.model.resolve().name).items():
            write_file(self.folder / f"plot.{suffix}", content)

    def _write_parquet(self, rows: Sequence[Mapping[str, Any]]) -> None:
        import io

        import pyarrow
        import pyarrow.parquet

        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: _column([row.get(name) for row in rows]) for name in names}
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        write_file(self.folder / "results.parquet", file.getvalue())

    def table(self) -> str:
        """The results as Markdown: the settings that differ between jobs, and the figures."""
        from llmprune.reporting.plots import differing, shown

        rows = self.rows()
        settings = differing(rows)
        figures = [
            name
            for name in ("removed", "parameters", "perplexity", "latency")
            if any(name in r for r in rows)
        ]
        lines = [
            f"{self.experiment.question} ({self.inputs.model.resolve().name})",
            "",
            f"| {' | '.join([*settings, *figures])} |",
            f"|{'---|' * len(settings)}{'---:|' * len(figures)}",
        ]
        for row in rows:
            cells = [shown(name, row[name]) for name in settings]
            cells += [shown(name, row.get(name)) for name in figures]
            lines.append(f"| {' | '.join(cells)} |")
        infeasible = [row for row in rows if "infeasible" in row]
        if infeasible:
            lines += ["", "Not possible:", ""]
            lines += [
                "- " + ", ".join(shown(name, row[name]) for name in settings) + f": {row['infeasible']}"
                for row in infeasible
            ]
        return "\n".join(lines) + "\n"


def _column(values: Sequence[Any]) -> list[Any]:
    """Values of one type: numbers or booleans as they are, everything else as text (what is no text, as JSON)."""
    given = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in given):
        return list(values)
    if all(isinstance(value, (int, float)) for value in given):
        return [None if value is None else float(value) for value in values]
    return [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none yet, or not a whole one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        log.warning("%s is damaged and made again", path)
        return None
    return data if isinstance(data, dict) else None


def _by_ray(inputs: Inputs, pending: Mapping[str, Job]) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Results in the order they come; every worker process reads the model once."""
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        work = ray.remote(num_cpus=1)(_remote)
        waiting = {work.remote(inputs, job): key for key, job in pending.items()}
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            result, seconds = ray.get(done)
            yield waiting.pop(done), result, seconds
    finally:
        if started:
            ray.shutdown()


_benches: dict[str, Bench] = {}


def _remote(inputs: Inputs, job: Job) -> tuple[dict[str, Any], float]:
    torch.set_num_threads(1)
    key = repr(inputs)
    if key not in _benches:
        _benches[key] = Bench(inputs)
    start = time.perf_counter()
    return _benches[key].run(job), time.perf_counter() - start


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "hardware": hardware(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
