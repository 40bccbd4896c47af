"""Everything by which a model is judged, in one object: perplexity, tasks, size, memory, speed, samples."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmprune.errors import InputError, LlmpruneError
from llmprune.evaluation.perplexity import PROTOCOLS
from llmprune.machine.packages import installed
from llmprune.pipeline.stages import Stages
from llmprune.tracing.wrapped import on_uncompiled


@dataclass
class Evaluation:
    """What :func:`evaluate` found; printed it is a few tables.

    Attributes:
        model: class name.
        parameters: parameters, tied ones once.
        macs: multiply-accumulates per token by the recorded graph; None where the model cannot be recorded (``notes``).
        memory: ``weights`` (parameters and buffers), ``kv_cache`` after ``kv_cache_tokens`` tokens and
            ``kv_cache_per_token`` of one sequence, and ``peak`` while the latency was measured, all in bytes.
        protocol: window and stride of the perplexities, as asked for.
        texts: name of a text -> :class:`llmprune.evaluation.perplexity.TextScore` as a mapping.
        tasks: task -> metric -> value, as lm-eval gives them.
        chosen: task -> the metric that enters the average.
        average: mean of the chosen metrics; None without tasks.
        latency: :meth:`llmprune.evaluation.latency.Latency.to_json`; None where it was not asked for.
        generation: prompt, text and (with another model) the text beside it.
        versions: of what computed it.
        stages: stage -> seconds.
        notes: what could not be measured and why.
    """

    model: str
    parameters: int
    macs: int | None
    memory: dict[str, int]
    protocol: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    average: float | None = None
    latency: dict[str, Any] | None = None
    generation: list[dict[str, str]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def perplexity(self) -> dict[str, float]:
        """Name of a text -> perplexity."""
        return {name: score["perplexity"] for name, score in self.texts.items()}

    @property
    def bits_per_character(self) -> dict[str, float]:
        """Name of a text -> bits per character."""
        return {name: score["bits_per_character"] for name, score in self.texts.items()}

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "macs_per_token": self.macs,
            "memory": self.memory,
            "perplexity": self.perplexity,
            "bits_per_character": self.bits_per_character,
            "protocol": self.protocol,
            "texts": self.texts,
            "tasks": self.tasks,
            "chosen": self.chosen,
            "average": self.average,
            "latency": self.latency,
            "generation": self.generation,
            "versions": self.versions,
            "seconds": self.stages,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        from llmprune.reporting.report import render_evaluation

        return render_evaluation(self)


@on_uncompiled
def evaluate(
    model: Any,
    tokenizer: Any = None,
    *,
    ppl: str | Path | Sequence[str | Path] | Mapping[str, str] = (),
    protocol: str = "llm-pruner",
    window: int | None = None,
    stride: int | None = None,
    join_lines: bool = False,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    latency: bool = True,
    prompts: Sequence[str] = (),
    beside: Any = None,
    quiet: bool | None = None,
    stages: Stages | None = None,
) -> Evaluation:
    """Judge a model, pruned or not, on the device it is on.

    Args:
        model: a transformers model, or the folder of one (dense, stock, universal or adapter form).
        tokenizer: its tokenizer; of a folder its own is taken.
        ppl: texts to foretell: paths (:func:`llmprune.evaluation.texts.read_text`), or name -> text.
        protocol: one of :data:`llmprune.evaluation.perplexity.PROTOCOLS`; where window or stride are given, these hold.
        window: tokens per window.
        stride: tokens from window to window, as for :func:`llmprune.evaluation.perplexity.score_text`.
        join_lines: join the non-empty lines of every text by blank lines.
        tasks: tasks of lm-eval by name, as for :func:`llmprune.evaluation.zeroshot.run_tasks`.
        include_path: a folder of further task files.
        num_fewshot: examples in front of each question; None leaves it to the task.
        limit: questions per task; None runs all.
        batch_size: questions at once.
        max_length: longest context of the tasks in tokens.
        latency: whether to measure prefill, decode and the cache (causal language models only).
        prompts: texts to be continued greedily.
        beside: another model (or folder) whose continuations stand beside.
        quiet: show no progress; None shows it on a terminal only.
        stages: an existing stage clock to add to.

    Returns:
        An :class:`Evaluation`.

    Raises:
        InputError: an argument outside its domain, unreadable texts, or texts and tasks without a tokenizer.
        CheckpointError: a folder that does not load.
    """
    from llmprune.evaluation.texts import read_text
    from llmprune.pipeline.prune import announcer, model_bytes, traced_tokens
    from llmprune.tracing.trace import trace

    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol {protocol!r}: there are {', '.join(PROTOCOLS)}")
    clock = Stages(announcer(quiet)) if stages is None else stages
    first = len(clock.done)
    if isinstance(ppl, (str, Path)):
        ppl = [ppl]
    texts = (
        dict(ppl) if isinstance(ppl, Mapping) else {str(path): read_text(path, join_lines) for path in ppl}
    )
    model, tokenizer = loaded(model, tokenizer, clock)
    if tokenizer is None and (texts or tasks or prompts):
        raise InputError(
            "texts, tasks and prompts need a tokenizer: give one, or copy its files to the model's folder"
        )
    model.eval()
    result = Evaluation(
        type(model).__name__,
        sum(p.numel() for p in model.parameters()),
        None,
        {"weights": model_bytes(model)},
    )
    with clock.stage("trace", "counting operations on one forward pass"):
        try:
            graph = trace(model)
            result.macs = graph.macs({}) // (traced_tokens(graph) or 1)
        except LlmpruneError as error:
            result.notes.append(f"no MACs: {error}")
    if texts:
        _score(result, model, tokenizer, texts, window or PROTOCOLS[protocol], stride, clock)
    if latency:
        _time(result, model, clock)
    if prompts:
        _write(result, model, tokenizer, prompts, beside, clock)
    if tasks:
        from llmprune.evaluation.zeroshot import chosen_metric, run_tasks

        with clock.stage("tasks", f"running {', '.join(tasks)} of lm-eval"):
            result.tasks = run_tasks(
                model,
                tokenizer,
                tasks,
                include_path=include_path,
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch_size,
                max_length=max_length,
                quiet=announcer(quiet) is None,
            )
        chosen = {task: chosen_metric(task, list(figures)) for task, figures in result.tasks.items()}
        result.chosen = {task: metric for task, metric in chosen.items() if metric is not None}
        values = [result.tasks[task][metric] for task, metric in result.chosen.items()]
        result.average = sum(values) / len(values) if values else None
    result.versions = _versions(bool(tasks))
    result.stages = {stage.name: stage.seconds for stage in clock.done[first:]}
    return result


def loaded(model: Any, tokenizer: Any, clock: Stages) -> tuple[Any, Any]:
    """A model and its tokenizer, read where a folder was given."""
    if not isinstance(model, (str, Path)):
        return model, tokenizer
    from llmprune.checkpoints.loading import load_model, load_tokenizer

    with clock.stage("load", f"reading {model}"):
        return load_model(model), load_tokenizer(model) if tokenizer is None else tokenizer


def place(model: Any, device: str | None) -> Any:
    """The model on the device that was named, or on a GPU where there is one.

    Raises:
        InputError: there is no such device, or no room on it.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(torch.device(name))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the model cannot be put on the device {name!r} ({reason}): choose another"
        ) from error


def _score(
    result: Evaluation,
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, str],
    window: int,
    stride: int | None,
    clock: Stages,
) -> None:
    from llmprune.evaluation.perplexity import score_text

    result.protocol = {"window": window, "stride": window if stride is None else stride}
    for name, text in texts.items():
        with clock.stage(f"perplexity {name}", "scoring its windows"):
            result.texts[name] = vars(score_text(model, tokenizer, text, window, stride)).copy()


def _time(result: Evaluation, model: Any, clock: Stages) -> None:
    from llmprune.evaluation.latency import latency

    if not (callable(getattr(model, "can_generate", None)) and model.can_generate()) or getattr(
        model.config, "is_encoder_decoder", False
    ):
        result.notes.append(f"no latency: {type(model).__name__} is no causal language model")
        return
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with clock.stage("latency", "reading and writing, repeatedly"):
        measured = latency(model)
    result.latency = measured.to_json()
    result.memory.update(
        kv_cache=measured.cache_bytes,
        kv_cache_tokens=measured.prompt,
        kv_cache_per_token=measured.cache_bytes_per_token,
        peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else clock.done[-1].peak,
    )


def _write(
    result: Evaluation, model: Any, tokenizer: Any, prompts: Sequence[str], beside: Any, clock: Stages
) -> None:
    from llmprune.evaluation.generation import continuation

    other, words = (None, None) if beside is None else loaded(beside, None, clock)
    with clock.stage("generate", "continuing the prompts"):
        for prompt in prompts:
            sample = {"prompt": prompt, "text": continuation(model, tokenizer, prompt)}
            if other is not None:
                sample["beside"] = continuation(other, words or tokenizer, prompt)
            result.generation.append(sample)


def _versions(tasks: bool) -> dict[str, str]:
    import transformers

    from llmprune import __version__

    found = {
        "llmprune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if tasks:
        found |= installed(["lm_eval"])
    return found
