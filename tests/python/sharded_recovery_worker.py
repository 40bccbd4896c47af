"""One of two processes that recover a model whose frozen weights are spread over both, for test_recover.py.

It prints one line of JSON: what share of the weights it held, and what became of a run that diverged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.errors import LlmpruneError
from llmprune.recovery import shards

DEMO = Path(__file__).resolve().parents[2] / "demo" / "model"
ROWS = [f"Once there was a shy boy named Viggo. One day he went out for {i} pebbles." for i in range(24)]
SETTINGS: dict[str, Any] = {
    "steps": 3,
    "batch_size": 4,
    "micro_batch_size": 2,
    "validation": 4,
    "cutoff": 16,
    "fsdp": True,
    "quiet": True,
}


def main() -> None:
    dist.init_process_group("gloo")
    said: dict[str, Any] = {}
    shard = shards.Shards.shard

    def weighed(self: shards.Shards, wrapped: torch.nn.Module) -> None:
        whole = sum(p.numel() for _, _, p in self._homes)
        shard(self, wrapped)
        pieces: list[Any] = [module._parameters[key] for module, key, _ in self._homes]
        said["share"] = sum(p.to_local().numel() for p in pieces) / whole
        said["left"] = sum(p.numel() for _, _, p in self._homes)

    shards.Shards.shard = weighed  # type: ignore[method-assign]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(DEMO).eval(), AutoTokenizer.from_pretrained(DEMO)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    try:
        llmprune.recover(model, tokenizer, ROWS, learning_rate=1e25, **SETTINGS)
    except LlmpruneError as error:
        said["error"] = f"{type(error).__name__}: {error}"
    said["as before"] = all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    llmprune.recover(model, tokenizer, ROWS, learning_rate=1e-2, **SETTINGS)
    changed = [name for name, t in model.state_dict().items() if not torch.equal(t, before[name])]
    said["learned"] = bool(changed) and all("proj" in name for name in changed)
    sums = [torch.zeros(()) for _ in range(2)]
    dist.all_gather(sums, sum(p.double().sum() for p in model.parameters()).float())
    said["alike"] = bool(sums[0] == sums[1])
    if dist.get_rank() == 0:
        print(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
