"""One of two processes that hold a model in pieces, for test_scattered.py: ``python sharded_worker.py FOLDER``.

It prints one line of JSON: what came out, or for each unlucky run the error's class and sentence.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import build
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import llmprune
from llmprune.errors import LlmpruneError

FAMILIES = ("llama", "gpt2")
IMPORTANCES = ("element1", "element2", "obs", "l2")


def ids() -> torch.Tensor:
    return torch.randint(3, 90, (5, 12), generator=torch.Generator().manual_seed(4))


def refusal(work: Any) -> str:
    try:
        work()
    except LlmpruneError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def sharded(family: str) -> Any:
    model = build(family).eval()
    for block in next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1):
        fully_shard(block)
    return fully_shard(model)


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    said: dict[str, Any] = {}
    for family in FAMILIES:
        model = sharded(family)
        graph = llmprune.trace(model)
        for importance in IMPORTANCES:
            scores = llmprune.score(
                model,
                graph,
                None if importance == "l2" else ids(),
                importance,
                quiet=True,
                kinds=("head", "ffn"),
            )
            scores.save(folder / f"{family}-{importance}-{rank}.npz")
        plan = llmprune.plan(graph, scores, 0.2, protect_first=0, protect_last=0)
        whole: list[int] = []
        full = DTensor.full_tensor

        def counted(self: DTensor, whole: list[int] = whole, full: Any = full) -> torch.Tensor:
            whole.append(self.numel())
            return full(self)

        DTensor.full_tensor = counted
        pruned = llmprune.gather(model, plan, keep=rank == 0)
        DTensor.full_tensor = full
        if rank == 0:
            llmprune.save_pretrained(pruned, folder / family)
        else:
            assert pruned is None
        said[family] = {
            "digest": plan.digest(),
            "gathered": len(whole),
            "still in pieces": all(isinstance(p, DTensor) for p in model.parameters()),
            "compact": refusal(lambda model=model, plan=plan: llmprune.compact(model, plan)),
            "budget": refusal(
                lambda model=model, graph=graph: llmprune.score(
                    model, graph, ids(), memory_budget="1MB" if rank else "20GB", quiet=True
                )
            ),
            "state": refusal(
                lambda model=model, graph=graph: llmprune.score(
                    model, graph, ids(), state=folder / "state", quiet=True
                )
            ),
        }
    print(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
