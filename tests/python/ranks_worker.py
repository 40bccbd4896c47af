"""One process of several, for test_ranks.py: ``python ranks_worker.py CASE FOLDER``; RANK and WORLD_SIZE say which.

It prints one line of JSON: what came out, or for each unlucky run the error's class and sentence.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from checkpoint_models import build
from torch import nn

import llmprune
from llmprune.errors import LlmpruneError
from llmprune.scoring import importance as importances
from llmprune.scoring.ranks import Ranks

SAMPLES = 7
FAMILIES = ("llama_tied", "gpt2", "mixtral")
IMPORTANCES = ("vector", "element1", "element2", "cubed", "blended", "l1")


@importances.register(1)
def cubed(w: torch.Tensor, g: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """First order, without a kernel."""
    return (g * w).abs() ** 3


@importances.register(2)
def blended(w: torch.Tensor, g: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Second order, without a kernel."""
    return g.abs() * w.abs() + s


def ids(seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 61, (SAMPLES, 12), generator=torch.Generator().manual_seed(seed))


class Forked(nn.Module):
    """Its second path runs only for samples that begin with an even number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(61, 8)
        self.one, self.other = nn.Linear(8, 12), nn.Linear(8, 12)
        self.last = nn.Linear(12, 61)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        wide = self.one(hidden).relu()
        even = input_ids[:, 0] % 2 == 0
        if torch.is_grad_enabled() and bool(even.any()):
            wide = wide + self.other(hidden).relu() * even[:, None, None]
        elif not torch.is_grad_enabled():
            wide = wide + self.other(hidden).relu()
        return self.last(wide)


def forked_loss(model: Any, batch: Any) -> torch.Tensor:
    tokens = batch["input_ids"]
    logits = model(tokens)[:, :-1].transpose(1, 2)
    return nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(1)


def forked_ids() -> torch.Tensor:
    """Even at the start of the last sample alone."""
    tokens = ids()
    tokens[:, 0] |= 1
    tokens[-1, 0] = 4
    return tokens


def scored(model: Any, graph: Any, data: Any, name: str, **options: Any) -> dict[int, np.ndarray]:
    return dict(llmprune.score(model, graph, data, name, quiet=True, **options))


def all_scores(ranks: Ranks | None) -> dict[str, np.ndarray]:
    """One family by every importance and by another schedule, others by two; of four ranks, the first alone."""
    found = {}
    options: dict[str, Any] = {} if ranks is None else {"ranks": ranks}
    for family in FAMILIES[: 1 if ranks is not None and ranks.size > 2 else None]:
        model = build(family)
        graph = llmprune.trace(model)
        for name in IMPORTANCES if family == "llama_tied" else ("element1", "element2"):
            for axis, values in scored(model, graph, ids(), name, **options).items():
                found[f"{family} {name} {axis}"] = values
        if family == "llama_tied":
            for name in ("element1", "element2"):
                for axis, values in scored(
                    model, graph, ids(), name, **options, batch_size=2, checkpointing=True
                ).items():
                    found[f"{family} {name} checkpointed {axis}"] = values
    forked = Forked()
    graph = llmprune.trace(forked, {"input_ids": ids()})
    data = {"input_ids": forked_ids()}
    for name in ("element1", "element2"):
        for axis, values in scored(forked, graph, data, name, **options, loss=forked_loss).items():
            found[f"forked {name} {axis}"] = values
    return found


def scores(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The largest relative difference from one process's, and what this rank would remove."""
    expected = dict(np.load(folder / "scores.npz"))
    found = all_scores(ranks)
    assert found.keys() == expected.keys() or ranks.size > 2
    worst = {
        name: float(np.abs(found[name] - values).max() / max(np.abs(values).max(), 1e-300))
        for name, values in expected.items()
        if name in found
    }
    bits = b"".join(found[name].tobytes() for name in sorted(found))
    model = build("llama_tied")
    graph = llmprune.trace(model)
    plan = llmprune.plan(
        graph, llmprune.score(model, graph, ids(), ranks=ranks, quiet=True), ratio=0.2, protect_first=0
    )
    return {
        "worst": max(worst.values()),
        "where": max(worst, key=worst.__getitem__),
        "bits": hashlib.sha256(bits).hexdigest(),
        "plan": hashlib.sha256(json.dumps(plan.to_json(), sort_keys=True).encode()).hexdigest(),
    }


def differing(ranks: Ranks, what: str) -> None:
    """Score with something other than rank 0 has."""
    odd = bool(ranks.rank)
    model = build("llama_mha" if odd and what == "model" else "llama_gqa")
    if odd and what == "weights":
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
    tokens = ids(4 if odd and what == "data" else 3)[: 1 if what == "few" else SAMPLES]
    importance = "element2" if odd and what == "importance" else "element1"
    llmprune.score(model, llmprune.trace(model), tokens, importance, ranks=ranks, quiet=True)


def unfinished(ranks: Ranks, dies: bool) -> None:
    """Rank 1 gets a loss that is not finite, or dies when its backward pass begins."""
    model = build("llama_gqa")
    graph = llmprune.trace(model)
    calls = 0

    def loss(model: Any, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        losses = forked_loss(lambda tokens: model(tokens).logits, batch)
        if ranks.rank == 1 and calls > 1:  # the first call is a trial run
            if not dies:
                return losses * torch.nan
            losses.register_hook(lambda grad: os._exit(9))
        return losses

    llmprune.score(model, graph, {"input_ids": ids()}, "element1", ranks=ranks, quiet=True, loss=loss)


def error_of(ranks: Ranks, what: str) -> dict[str, Any]:
    """The error of one unlucky run; the processes stay connected where none has died."""
    start = time.monotonic()
    try:
        if what in ("fails", "dies"):
            unfinished(ranks, what == "dies")
        else:
            differing(ranks, what)
    except LlmpruneError as error:
        return {"kind": type(error).__name__, "text": str(error), "seconds": time.monotonic() - start}
    return {"kind": None}


def main() -> None:
    """Do the case and say what came of it."""
    case, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    ranks = Ranks()
    result = (
        scores(ranks, folder) if case == "scores" else {what: error_of(ranks, what) for what in case.split()}
    )
    print(json.dumps(result))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
