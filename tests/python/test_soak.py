"""Pruning, saving and loading over and over takes no more memory than doing it once."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from folders import make_folder, tokenizer

import llmprune
from llmprune.machine.budget import resident_memory

CYCLES, WARM = 200, 60
GROWTH = 4 << 20
"""Bytes that the heap's own raggedness may add between cycle WARM and the last (half a MiB was seen); a leak of one
model's weights a cycle, 50 KiB, is more."""


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("LLMPRUNE_SOAK") != "1", reason="takes four minutes: `make soak` runs it")
def test_memory_stays_flat(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    ids = torch.arange(96).reshape(4, 24) % 61
    resident = []
    for cycle in range(CYCLES):
        model = llmprune.from_pretrained(folder)
        llmprune.prune(model, tokenizer(), ratio=0.2, calibration=ids, importance="element2", quiet=True)
        out = tmp_path / "out"
        llmprune.save_pretrained(model, out, tokenizer(), overwrite=True)
        again = llmprune.from_pretrained(out)
        assert again.num_parameters() == model.num_parameters()
        del model, again
        if cycle % 10 == 0:
            gc.collect()
            resident.append(resident_memory())
    flat = min(resident[WARM // 10 : WARM // 10 + 4])
    last = min(resident[-4:])
    assert last - flat < GROWTH, [f"{size / 2**20:.1f} MiB" for size in resident]
