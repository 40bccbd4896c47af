"""The Trainer that recovers a model: its loss, its guard against divergence, its progress, and a teacher's logits."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from llmprune.checkpoints.atomic import write_file
from llmprune.errors import InputError
from llmprune.recovery.examples import IGNORED, Example

_PAD_TO = 8
"""Batches are padded to a multiple of this length."""


class Divergence(Exception):
    """Raised inside training, before a step would be taken; :func:`llmprune.recover` turns it into a RecoveryError."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what)
        self.what, self.step = what, step


class Examples(torch.utils.data.Dataset[dict[str, Any]]):
    """Examples with their numbers.

    Args:
        examples: what is learned.
        first: number of the first one among all that a teacher was asked about.
    """

    def __init__(self, examples: Sequence[Example], first: int = 0) -> None:
        self._examples, self._first = examples, first

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._examples[index]
        return {"input_ids": example.ids, "labels": example.labels, "row": self._first + index}


class Collator:
    """Pads a batch on the right; padding is masked and has no label, so its id (0 if there is none) never counts."""

    def __init__(self, pad: int | None) -> None:
        self._pad = pad or 0

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // _PAD_TO) * _PAD_TO
        fills = {"input_ids": self._pad, "labels": IGNORED}
        out = {
            name: torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])
            for name, fill in fills.items()
        }
        out["attention_mask"] = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
        )
        out["row"] = torch.tensor([row["row"] for row in rows])
        return out


class Recoverer(Trainer):  # type: ignore[misc, unused-ignore]
    """A Trainer whose loss is the next-token loss, mixed with the distance to a teacher where there is one.

    Args:
        teacher: a model in memory, :class:`StoredLogits`, or None.
        weight: share of the teacher's part in the loss.
        arguments: those of Trainer.
    """

    def __init__(self, *, teacher: Any = None, weight: float = 0.5, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = True  # the loss below divides by the tokens of the whole step
        self._loss_shifts_labels = True
        self.label_names = ["labels"]
        self._teacher, self._weight = teacher, weight
        self.micro_losses: list[torch.Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum over the labelled tokens, divided by how many the whole step has (over all processes)."""
        ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"][:, 1:]
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=False)
        kept = labels != IGNORED
        logits = outputs.logits[:, :-1][kept].float()
        loss = nn.functional.cross_entropy(logits, labels[kept], reduction="sum")
        if self._teacher is not None and model.training:
            if isinstance(self._teacher, StoredLogits):
                distance = self._teacher.divergence(logits, inputs["row"])
            else:
                with torch.no_grad():
                    wanted = self._teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits[
                        :, :-1
                    ][kept]
                distance = divergence(logits, wanted.float())
            loss = (1 - self._weight) * loss + self._weight * distance
        tokens = kept.sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / tokens
        if model.training:
            self.micro_losses.append(loss.detach())
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # which averages gradients, where the sum is meant
        return (loss, outputs) if return_outputs else loss

    def step_loss(self) -> float:
        """Mean loss of the step whose micro batches have all been seen, over all processes."""
        loss = torch.stack(self.micro_losses).sum()
        self.micro_losses.clear()
        if self.accelerator.num_processes > 1:
            loss = self.accelerator.reduce(loss, "sum")
        return float(loss)


class Guard(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Stops before a step that a loss or a gradient without sense would make.

    A loss is without sense if it is not finite, or more than twice both what training began with and what guessing
    costs (the logarithm of the vocabulary).

    Args:
        vocabulary: how many tokens the model knows.
        snapshots: keep a copy of the trained weights from the last step whose loss made sense.
    """

    def __init__(self, vocabulary: int, snapshots: bool) -> None:
        self._bound = 2 * math.log(max(2, vocabulary))
        self._begun = False
        self._snapshots = snapshots
        self._good: tuple[int, list[tuple[nn.Parameter, torch.Tensor]]] | None = None
        self.trainer: Recoverer | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the step's loss, which its weights made, and at the gradients, which would change them."""
        if self.trainer is None:
            raise TypeError("the guard has no trainer to ask")
        loss, step = self.trainer.step_loss(), state.global_step + 1
        if not math.isfinite(loss):
            raise Divergence(f"the loss became {loss}", step)
        if not self._begun:
            self._bound, self._begun = max(self._bound, 2 * loss), True
        if loss > self._bound:
            raise Divergence(f"the loss exploded to {loss:.4g}", step)
        trained = [p for p in kwargs["model"].parameters() if p.requires_grad]
        if self._snapshots:
            self._good = state.global_step, [(p, p.detach().clone()) for p in trained]
        norms = torch._foreach_norm([p.grad for p in trained if p.grad is not None])
        if not all(bool(torch.isfinite(norm)) for norm in norms):
            raise Divergence(f"a gradient became infinite or NaN at a loss of {loss:.4g}", step)

    @torch.no_grad()
    def restore(self) -> int | None:
        """Put back the last weights whose loss made sense; the steps that had been taken, None without a copy."""
        if self._good is None:
            return None
        step, weights = self._good
        for parameter, copy in weights:
            parameter.copy_(copy)
        return step


class Progress(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """A bar on stderr with the newest losses."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open it."""
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="recovering",
                unit="step",
                file=sys.stderr,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move on."""
        if self._bar is not None:
            self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show losses."""
        for name, shown in (("loss", "loss"), ("eval_loss", "validation")):
            if logs and name in logs:
                self._shown[shown] = f"{float(logs[name]):.4g}"
        if self._bar is not None:
            self._bar.set_postfix(self._shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close it."""
        if self._bar is not None:
            self._bar.close()


class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Writes further figures beside each validation loss.

    Args:
        figures: called with the model; what it returns is kept as JSON with the trainer's history.
    """

    def __init__(self, figures: Callable[[Any], Mapping[str, float]]) -> None:
        self._figures = figures

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for them."""
        if state.is_world_process_zero:
            found = {name: float(value) for name, value in self._figures(kwargs["model"]).items()}
            entry = next(e for e in reversed(state.log_history) if "eval_loss" in e)
            entry["watched"] = found


def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of a student from a teacher, summed over tokens.

    Args:
        logits: the student's, tokens x vocabulary.
        wanted: the teacher's, of the same shape.
    """
    return nn.functional.kl_div(
        logits.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True
    )


class StoredLogits:
    """A teacher's most likely tokens at each labelled place, on the disk.

    Their log probabilities are kept as float16 with their ids as int32, k of each a place; what is left of the
    probability counts as one further token.
    """

    def __init__(self, folder: Path) -> None:
        self.starts = np.load(folder / "starts.npy", allow_pickle=False)
        self.ids = np.load(folder / "ids.npy", mmap_mode="r", allow_pickle=False)
        self.logs = np.load(folder / "logs.npy", mmap_mode="r", allow_pickle=False)

    @classmethod
    @torch.no_grad()
    def write(
        cls, folder: Path, teacher: Any, examples: Examples, collator: Collator, k: int, batch: int
    ) -> StoredLogits:
        """Run the teacher once over all examples; what is written there already, by the same k, is taken as it is."""
        done = folder / "done.json"
        if done.is_file() and json.loads(done.read_text()) == {"k": k, "examples": len(examples)}:
            return cls(folder)
        vocabulary = teacher.get_output_embeddings().weight.shape[0]
        if not 1 <= k <= vocabulary:
            raise InputError(
                f"{k} logits a token were asked for: 1 to {vocabulary} (the vocabulary) are possible"
            )
        folder.mkdir(parents=True, exist_ok=True)
        counts = [sum(label != IGNORED for label in examples[i]["labels"]) for i in range(len(examples))]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        shape = (int(starts[-1]), k)
        ids = np.lib.format.open_memmap(folder / "ids.npy", "w+", np.int32, shape)
        logs = np.lib.format.open_memmap(folder / "logs.npy", "w+", np.float16, shape)
        device = next(teacher.parameters()).device
        for start in range(0, len(examples), batch):
            rows = collator([examples[i] for i in range(start, min(start + batch, len(examples)))])
            kept = (rows["labels"][:, 1:] != IGNORED).to(device)
            moved = {name: rows[name].to(device) for name in ("input_ids", "attention_mask")}
            best = teacher(**moved, use_cache=False).logits[:, :-1][kept].float().log_softmax(-1).topk(k)
            place = slice(int(starts[start]), int(starts[min(start + batch, len(examples))]))
            ids[place], logs[place] = best.indices.cpu().numpy(), best.values.cpu().numpy()
        ids.flush()
        logs.flush()
        np.save(folder / "starts.npy", starts)
        write_file(done, json.dumps({"k": k, "examples": len(examples)}).encode())
        return cls(folder)

    def divergence(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """As :func:`divergence`, for the labelled places of the examples with these numbers, in order."""
        places = np.concatenate([np.arange(self.starts[row], self.starts[row + 1]) for row in rows.tolist()])
        ids = torch.from_numpy(self.ids[places].astype(np.int64)).to(logits.device)
        wanted = torch.from_numpy(self.logs[places].astype(np.float32)).to(logits.device)
        found = logits.log_softmax(-1).gather(-1, ids)
        near = (wanted.exp() * (wanted - found)).sum()
        return near + (_rest(wanted).exp() * (_rest(wanted) - _rest(found))).sum()


def _rest(logs: torch.Tensor) -> torch.Tensor:
    """Log of the probability that the given tokens leave to all others."""
    return torch.log1p(-logs.exp().sum(-1).clamp(max=1 - 1e-6))
