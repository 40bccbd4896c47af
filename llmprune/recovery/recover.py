"""Recovery: the quality that pruning cost, brought back by a little training (LoRA by PEFT, transformers' Trainer)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from llmprune.checkpoints.adapters import quiet_peft
from llmprune.checkpoints.atomic import published
from llmprune.errors import CheckpointError, InputError, RecoveryError
from llmprune.out_of_core.scattered import is_scattered
from llmprune.pipeline.stages import Stages
from llmprune.recovery import shards
from llmprune.recovery.company import agree, losing_no_one
from llmprune.recovery.examples import Data, load_data
from llmprune.recovery.settings import RATES, check, check_vocabulary, cutoff_of, lamb
from llmprune.recovery.workfolder import WorkFolder, is_full, signature
from llmprune.tracing.wrapped import on_uncompiled

if TYPE_CHECKING:
    from llmprune.tracing.graph import Graph

WARM_UP, EVERY = 100, 100
"""Warm-up steps and steps from one validation to the next (the paper's code), in runs that are long enough."""

ADAPTED = ("head", "query", "head_dim", "value_dim", "rank", "ffn")
"""Kinds of axes whose linear maps are adapted: those of attention and of feed-forwards."""


@dataclass
class Recovery:
    """What :func:`recover` did; printed it is a table.

    Attributes:
        model: the recovered model: the one that was given, with merged weights, or PEFT's wrapper of it where the
            adapter was kept apart.
        method: ``lora``, ``dora`` or ``full``.
        targets: paths of the modules that were adapted; empty for ``full``.
        trained: parameters that were trained.
        steps: optimizer steps that were taken.
        best_step: the step whose state was taken: the one of the lowest validation loss, or the last.
        curve: one mapping per record: ``step`` with ``loss``, ``learning_rate``, or ``validation_loss``.
        validation: mean validation loss before, at best, and at the end; None without validation.
        data: rows read and dropped, examples to learn from and to validate on, sha256 of the source.
        settings: every setting, defaults filled in.
        output: where the result lies; None if none was written.
        form: ``stock``, ``universal`` or ``adapter``.
        seconds: stage -> wall time.
        notes: what a reader should know.
        main_process: whether this process is the first of a distributed run (or the only one).
    """

    model: Any
    method: str
    targets: list[str]
    trained: int
    steps: int
    best_step: int
    curve: list[dict[str, float]]
    validation: dict[str, float] | None
    data: dict[str, Any]
    settings: dict[str, Any]
    output: str | None = None
    form: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    main_process: bool = True

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, without the model."""
        return {
            "model": type(self.model).__name__,
            **{name: value for name, value in vars(self).items() if name not in ("model", "main_process")},
        }

    def __str__(self) -> str:
        from llmprune.reporting.report import render_recovery

        return render_recovery(self)


@on_uncompiled
@losing_no_one()
def recover(
    model: Any,
    tokenizer: Any = None,
    dataset: Any = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    merge: bool = True,
    form: str = "auto",
    base: str | Path | None = None,
    method: str = "lora",
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.05,
    targets: Sequence[str] | None = None,
    learning_rate: float | None = None,
    epochs: float = 2.0,
    steps: int | None = None,
    batch_size: int = 64,
    micro_batch_size: int = 4,
    warmup: int | None = None,
    scheduler: str = "cosine",
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    cutoff: int | None = None,
    loss_on: str = "answer",
    eos: bool = False,
    rows: int | None = None,
    validation: int | float | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    distill: bool = False,
    teacher: Any = None,
    distill_weight: float = 0.5,
    top_k: int | None = None,
    gradient_checkpointing: bool = False,
    fsdp: bool | None = None,
    seed: int = 0,
    work: str | Path | None = None,
    restart: bool = False,
    watch: Callable[[Any], Mapping[str, float]] | None = None,
    quiet: bool | None = None,
    stages: Stages | None = None,
) -> Recovery:
    """Train a pruned model a little, on a GPU if there is one; the defaults are those of the paper's code.

    With ``output``, checkpoints lie in ``work`` (``output`` with ``.training`` added) while it runs. A run that was
    killed goes on from the last of them when it is started again with the same settings; a finished one takes the
    folder away. Under ``torchrun`` or ``accelerate launch`` every process calls this; the first writes.

    Args:
        model: a causal language model, pruned or not; or the folder of one.
        tokenizer: its tokenizer; of a folder its own is taken.
        dataset: as for :func:`llmprune.recovery.examples.load_data`.
        output: folder to write the result to.
        overwrite: whether ``output`` may be replaced.
        merge: add what was learned to the weights; False writes the adapter alone and leaves ``model`` wrapped by PEFT.
        form: of the checkpoint, as for :func:`llmprune.save_pretrained`.
        base: the folder that an adapter names as its base; of a folder that was given it is that.
        method: ``lora`` (arXiv:2106.09685), ``dora`` (arXiv:2402.09353) or ``full`` (all weights).
        rank: of the adapters.
        alpha: their scale is ``alpha / rank``.
        dropout: on their input.
        targets: paths of the modules to adapt; None: every linear map that reads or writes heads or feed-forward
            channels, found on the model's graph (:func:`linear_maps`).
        learning_rate: its peak; None takes :data:`RATES`.
        epochs: passes over the data.
        steps: optimizer steps, instead of ``epochs``.
        batch_size: examples per step, over all processes.
        micro_batch_size: examples at once in a process; the rest of a step is accumulated.
        warmup: steps to the peak; None takes 100, but at most a tenth of the run.
        scheduler: one of ``cosine``, ``linear``, ``constant``, ``constant_with_warmup``.
        optimizer: ``adamw``, or ``lamb`` where the package pytorch_optimizer is installed.
        weight_decay: of the optimizer.
        cutoff: tokens per example; None takes 256, or the model's positions where these are fewer.
        loss_on: ``answer`` or ``all``, for instruction data.
        eos: end records with the end-of-sequence token.
        rows: use only so many records of the data.
        validation: examples to validate on, as a number or a share; 0 keeps none, None at most 2000 and a tenth.
        validate_every: steps from one validation (and checkpoint) to the next; None takes 100, but at least ten in all.
        patience: stop after so many validations without improvement; None goes on to the end.
        distill: mix the loss with the Kullback-Leibler divergence from ``teacher``.
        teacher: the unpruned model (or its folder), of the same vocabulary.
        distill_weight: share of the divergence in the loss.
        top_k: run the teacher once, before training, and keep so many logits of each token on the disk; None keeps the
            teacher in memory.
        gradient_checkpointing: recompute activations.
        fsdp: keep on each process a share of the frozen weights alone (FSDP2), for ``lora`` and ``dora``; None does if
            accelerate's config asks for FSDP. The weights are whole again at the end; another error than those below
            leaves ``model`` without them.
        seed: of the split, the order, the adapters and dropout.
        work: folder for checkpoints.
        restart: begin anew where ``work`` holds another run.
        watch: called with the model at each validation; the figures it returns enter the curve.
        quiet: show no progress; None shows it on a terminal only.
        stages: an existing stage clock to add to.

    Returns:
        A :class:`Recovery`. The best state by validation loss is taken, the last one without validation.

    Raises:
        InputError: an argument outside its domain, data of the wrong form, the extra is missing.
        RecoveryError: the loss diverged; the last good state is kept and named, and ``model`` is as it was before.
        CheckpointError: the disk is full, or the result cannot be written.
        RankError: the processes of the run differ in data, weights, settings or versions, or one has gone.
    """
    try:
        import accelerate
        import peft  # noqa: F401
    except ImportError as error:
        raise InputError("recovery needs an extra: pip install 'llmprune[recover]'") from error
    from llmprune.pipeline.prune import announcer, check_options

    check_options(output=output, overwrite=overwrite, form=form)
    settings: dict[str, Any] = {
        "method": method,
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "learning_rate": RATES.get(method) if learning_rate is None else learning_rate,
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "micro_batch_size": min(micro_batch_size, batch_size),
        "warmup": warmup,
        "scheduler": scheduler,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "cutoff": cutoff,
        "loss_on": loss_on,
        "eos": eos,
        "rows": rows,
        "validation": validation,
        "validate_every": validate_every,
        "patience": patience,
        "distill": distill,
        "distill_weight": distill_weight,
        "top_k": top_k,
        "gradient_checkpointing": gradient_checkpointing,
        "seed": seed,
    }
    check(settings, teacher, dataset)
    sharded = shards.wanted(fsdp, method, watch is not None)
    folder = model if isinstance(model, (str, Path)) else None
    base = folder if base is None else base
    if not merge and method == "full":
        raise InputError("method 'full' has no adapter to keep: merge it")
    if not merge and output is not None and base is None:
        raise InputError("an adapter names the folder of its base: save the model first and give it as base=")
    clock = Stages(announcer(quiet)) if stages is None else stages
    first = len(clock.done)
    if folder is not None:
        from llmprune.evaluation.evaluate import loaded

        model, tokenizer = loaded(folder, tokenizer, clock)
    if is_scattered(model):
        raise InputError(
            "this model's weights are in pieces or offloaded: recover the folder it came from, with fsdp=True to have "
            "its weights spread over the processes"
        )
    settings["cutoff"] = cutoff_of(model, cutoff)
    with clock.stage("data", "reading and encoding"):
        data = load_data(
            dataset,
            tokenizer,
            cutoff=settings["cutoff"],
            loss_on=loss_on,
            eos=eos,
            validation=validation,
            seed=seed,
            rows=rows,
        )
    check_vocabulary(model, data)
    state = accelerate.PartialState(cpu=not torch.cuda.is_available())
    with clock.stage("targets", "finding linear maps on the graph"):
        paths = [] if method == "full" else list(targets) if targets is not None else linear_maps(model)
    settings["targets"] = None if targets is None else paths
    agree(settings, data.hash, signature(model))
    place = WorkFolder(
        work, output, state, {**settings, "data": data.hash, "model": signature(model)}, restart
    )
    run = _Run(model, tokenizer, data, settings, paths, place, clock, announcer(quiet) is not None, watch)
    run.sharded = sharded
    with shards.without_accelerates() if sharded else nullcontext():
        result = run.train(teacher)
    result.notes += (
        [] if not data.dropped else [f"{data.dropped} of {data.rows} rows had nothing to learn from"]
    )
    if output is not None and state.is_main_process:
        with clock.stage("save", f"writing {output}"):
            if merge:
                result.model = run.merge()
                _save(result, tokenizer, Path(output), overwrite, form)
            else:
                _save_adapter(result, tokenizer, Path(output), overwrite, Path(str(base)))
    elif merge:
        result.model = run.merge()
    state.wait_for_everyone()
    if state.is_main_process:
        place.remove()
    result.main_process = state.is_main_process
    result.seconds = {stage.name: stage.seconds for stage in clock.done[first:]}
    return result


def linear_maps(model: nn.Module, graph: Graph | None = None) -> list[str]:
    """Paths of the modules with a matrix on an axis of heads or of feed-forward channels, in the model's order.

    Raises:
        InputError: there is none.
    """
    if graph is None:
        from llmprune.tracing.trace import trace

        graph = trace(model)
    names = {name for axis in graph.axes if axis.kind in ADAPTED for name, _ in axis.places}
    found = [
        path
        for path, module in model.named_modules()
        if f"{path}.weight" in names and not isinstance(module, nn.Embedding) and module.weight.dim() == 2
    ]
    if not found:
        raise InputError(
            f"no linear map of {type(model).__name__} lies on heads or feed-forward channels: name modules as targets="
        )
    return found


@dataclass
class _Run:
    """One training: the model is wrapped, trained, and either merged or put back as it was."""

    model: Any
    tokenizer: Any
    data: Data
    settings: dict[str, Any]
    paths: list[str]
    work: WorkFolder
    clock: Stages
    show: bool
    watch: Callable[[Any], Mapping[str, float]] | None = None
    wrapped: Any = None
    sharded: bool = False
    pieces: shards.Shards | None = None

    def train(self, teacher: Any) -> Recovery:
        """Train, and take the best state."""
        from transformers.utils import logging as transformers_logging

        from llmprune.checkpoints.loading import quiet_transformers

        device = next(self.model.parameters()).device
        dtype = next(self.model.parameters()).dtype
        gradients = [(p, p.requires_grad) for p in self.model.parameters()]
        copies = (
            {name: t.detach().clone() for name, t in self.model.state_dict().items()}
            if self.settings["method"] == "full"
            else {}
        )
        done = False
        torch.manual_seed(self.settings["seed"])
        try:
            with quiet_transformers(), quiet_peft():
                transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
                self._wrap()
                trainer, guard = self._trainer(teacher)
                with self.clock.stage(
                    "train", f"{trainer.args.max_steps} steps of {self.settings['batch_size']} examples"
                ):
                    self._carry_out(trainer, guard)
                self._make_whole()
            done = True
        except RecoveryError:
            if self.pieces is not None:  # every process is here
                self.pieces.gather()
            raise
        finally:
            if not done:
                self._put_back(copies)
            self.model.to(device=device, dtype=dtype)
            self.model.eval()
            for parameter, wanted in gradients:
                parameter.requires_grad_(wanted)
                parameter.grad = None
            if not done and not self.work.lasting and not any(self.work.folder.glob("last-good")):
                self.work.remove()
        return self._result(trainer, guard)

    def merge(self) -> Any:
        """The model with what was learned in its weights."""
        if self.wrapped is not None:
            with quiet_peft():
                self.wrapped.merge_and_unload()
            self.wrapped = None
        return self.model

    def _wrap(self) -> None:
        settings = self.settings
        if settings["method"] == "full":
            self.model.float()  # half precision loses small steps
            self.model.requires_grad_(True)
            return
        import peft

        config = peft.LoraConfig(
            r=settings["rank"],
            lora_alpha=settings["alpha"],
            lora_dropout=settings["dropout"],
            target_modules=self.paths,
            use_dora=settings["method"] == "dora",
            bias="none",
            task_type="CAUSAL_LM",
        )
        if self.sharded:
            self.pieces = shards.Shards(self.model)
        try:
            with quiet_peft():
                self.wrapped = peft.get_peft_model(
                    self.model if self.pieces is None else self.pieces.twin, config
                )
        except ValueError as error:
            raise InputError(
                f"the targets cannot be adapted ({str(error).splitlines()[0][:200]}): name others"
            ) from error
        if self.pieces is not None:
            self.pieces.shard(self.wrapped)

    def _make_whole(self) -> None:
        """Of a sharded twin's training: the model filled again, and the trained adapters put into it."""
        if self.pieces is None:
            return
        import peft

        trained = peft.get_peft_model_state_dict(self.wrapped)
        config = self.wrapped.peft_config["default"]
        self.pieces.gather()
        self.pieces = None
        self.wrapped = peft.get_peft_model(self.model, config)
        peft.set_peft_model_state_dict(self.wrapped, {name: value.cpu() for name, value in trained.items()})

    def _trainer(self, teacher: Any) -> tuple[Any, Any]:
        from transformers import EarlyStoppingCallback, TrainingArguments
        from transformers.trainer_callback import PrinterCallback, ProgressCallback

        from llmprune.recovery.training import Collator, Examples, Guard, Progress, Recoverer, Watch

        settings, data = self.settings, self.data
        world = int(os.environ.get("WORLD_SIZE", "1"))
        accumulate = max(1, settings["batch_size"] // (settings["micro_batch_size"] * world))
        per_epoch = math.ceil(len(data.train) / (settings["micro_batch_size"] * world * accumulate))
        steps = settings["steps"] or max(1, math.ceil(per_epoch * settings["epochs"]))
        every = settings["validate_every"] or max(1, min(EVERY, steps // 10))
        validated = bool(data.validation)
        cuda = torch.cuda.is_available()
        half = cuda and torch.cuda.is_bf16_supported()
        train, valid = Examples(data.train), Examples(data.validation, len(data.train))
        collator = Collator(getattr(self.tokenizer, "pad_token_id", None))
        arguments = TrainingArguments(
            output_dir=str(self.work.folder),
            max_steps=steps,
            per_device_train_batch_size=settings["micro_batch_size"],
            per_device_eval_batch_size=4 * settings["micro_batch_size"],
            gradient_accumulation_steps=accumulate,
            learning_rate=settings["learning_rate"],
            weight_decay=settings["weight_decay"],
            lr_scheduler_type=settings["scheduler"],
            warmup_steps=min(WARM_UP, steps // 10) if settings["warmup"] is None else settings["warmup"],
            optim="adamw_torch",
            bf16=half,
            fp16=cuda and not half and next(self.model.parameters()).dtype is torch.float16,
            gradient_checkpointing=settings["gradient_checkpointing"],
            gradient_checkpointing_kwargs={"use_reentrant": False}
            if settings["gradient_checkpointing"]
            else None,
            logging_steps=max(1, min(10, every)),
            logging_nan_inf_filter=False,
            eval_strategy="steps" if validated else "no",
            eval_steps=every,
            eval_on_start=validated,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=2,
            load_best_model_at_end=validated,
            metric_for_best_model="eval_loss" if validated else None,
            greater_is_better=False if validated else None,
            prediction_loss_only=True,
            remove_unused_columns=False,
            dataloader_pin_memory=cuda,
            use_cpu=not cuda,
            ddp_backend="gloo" if world > 1 and not cuda else None,
            ddp_find_unused_parameters=False if world > 1 else None,
            report_to="none",
            disable_tqdm=True,
            seed=settings["seed"],
            data_seed=settings["seed"],
        )
        stored = (
            None if teacher is None else self._teacher(teacher, (train, valid), collator, arguments.device)
        )
        guard = Guard(
            self.model.get_input_embeddings().weight.shape[0], snapshots=settings["method"] != "full"
        )
        callbacks = [guard, *([Progress()] if self.show else [])]
        if self.watch is not None:
            callbacks.append(Watch(self.watch))
        if settings["patience"] is not None:
            callbacks.append(EarlyStoppingCallback(settings["patience"]))
        trainer = Recoverer(
            teacher=stored,
            weight=settings["distill_weight"],
            model=self.model if self.wrapped is None else self.wrapped,
            args=arguments,
            train_dataset=train,
            eval_dataset=valid if validated else None,
            data_collator=collator,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=None
            if settings["optimizer"] == "adamw"
            else (lamb(), {"lr": settings["learning_rate"], "weight_decay": settings["weight_decay"]}),
        )
        guard.trainer = trainer
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        return trainer, guard

    def _teacher(self, teacher: Any, examples: tuple[Any, Any], collator: Any, device: torch.device) -> Any:
        """What the student is compared with: the teacher on the device, or its stored logits."""
        from llmprune.evaluation.evaluate import loaded
        from llmprune.recovery.training import StoredLogits

        model, _ = loaded(teacher, self.tokenizer, self.clock)
        own = self.model.get_input_embeddings().weight.shape[0]
        other = model.get_input_embeddings().weight.shape[0]
        if own != other:
            raise InputError(
                f"the teacher knows {other} tokens and the model {own}: it must have the same vocabulary"
            )
        if model is self.model:
            raise InputError("the teacher is the model itself: give the unpruned one (load it again)")
        model = model.to(device).eval()
        if self.settings["top_k"] is None:
            return model
        with self.clock.stage("teacher", "keeping its logits on the disk"):
            from accelerate import PartialState

            with PartialState().main_process_first():
                return StoredLogits.write(
                    self.work.folder / "teacher",
                    model,
                    examples[0],
                    collator,
                    self.settings["top_k"],
                    4 * self.settings["micro_batch_size"],
                )

    def _carry_out(self, trainer: Any, guard: Any) -> None:
        from llmprune.recovery.training import Divergence

        last = self.work.last()
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except Divergence as error:
            good = self._last_good(trainer, guard)
            raise RecoveryError(
                f"{error.what} at step {error.step}: {good}; try again with a lower learning rate than "
                f"{self.settings['learning_rate']:g} (--learning-rate), or a longer warm-up"
            ) from error
        except (OSError, SafetensorError, RuntimeError) as error:
            if not is_full(error):
                raise
            kept = self.work.last()
            where = (
                "no checkpoint had been finished"
                if kept is None
                else f"the last finished checkpoint is {kept}"
            )
            raise CheckpointError(
                f"no space left in {self.work.folder} while writing a checkpoint: {where}; free some and run the same "
                "again to go on"
            ) from error

    def _last_good(self, trainer: Any, guard: Any) -> str:
        """Where the last state is whose loss made sense."""
        step = guard.restore()
        if step is not None:
            target = self.work.folder / "last-good"
            if trainer.is_world_process_zero():
                trainer.save_model(str(target))
            return f"the state of step {step} is kept in {target}"
        kept = self.work.last()
        return "nothing was learned before" if kept is None else f"the last checkpoint is kept in {kept}"

    def _put_back(self, copies: dict[str, torch.Tensor]) -> None:
        """The model as it was before training."""
        if self.wrapped is not None:
            if self.pieces is None:
                self.wrapped.unload()
            self.wrapped = None
        if copies:
            self.model.load_state_dict(copies)

    def _result(self, trainer: Any, guard: Any) -> Recovery:
        names = {"loss": "loss", "eval_loss": "validation_loss", "learning_rate": "learning_rate"}
        curve = [
            {
                "step": entry["step"],
                **{new: float(entry[old]) for old, new in names.items() if old in entry},
                **entry.get("watched", {}),
            }
            for entry in trainer.state.log_history
            if "loss" in entry or "eval_loss" in entry
        ]
        checked = [(entry["validation_loss"], entry["step"]) for entry in curve if "validation_loss" in entry]
        taken = trainer.state.global_step
        validation, notes = None, []
        if checked:
            # The start is validated as well, but has no checkpoint.
            best, step = min(pair for pair in checked if pair[1] > 0)
            taken = int(step)
            validation = {"before": checked[0][0], "best": best, "last": checked[-1][0]}
            if best >= checked[0][0]:
                notes.append("validation loss is no lower than before: the recovery did not help")
        model = self.model if self.wrapped is None else self.wrapped
        return Recovery(
            model=model,
            method=self.settings["method"],
            targets=self.paths,
            trained=trainer.get_num_trainable_parameters()
            if self.wrapped is None
            else sum(p.numel() for n, p in self.wrapped.named_parameters() if "lora_" in n),
            steps=trainer.state.global_step,
            best_step=taken,
            curve=curve,
            validation=validation,
            data={
                "rows": self.data.rows,
                "dropped": self.data.dropped,
                "train": len(self.data.train),
                "validation": len(self.data.validation),
                "sha256": self.data.hash,
            },
            settings=self.settings,
            notes=notes,
        )


def _save(result: Recovery, tokenizer: Any, output: Path, overwrite: bool, form: str) -> None:
    from llmprune.checkpoints.checkpoint import save_pretrained

    figures: dict[str, Any] = {}
    if result.validation is not None:
        figures["validation loss of the recovery"] = (result.validation["before"], result.validation["best"])
    saved = save_pretrained(result.model, output, tokenizer, overwrite, form=form, figures=figures)
    result.output, result.form = saved.directory, saved.form


def _save_adapter(result: Recovery, tokenizer: Any, output: Path, overwrite: bool, base: Path) -> None:
    config = result.model.peft_config["default"]
    config.base_model_name_or_path = os.path.abspath(base)
    with published(output, overwrite) as folder:
        result.model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    result.output, result.form = str(output), "adapter"
