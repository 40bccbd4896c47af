"""A fixed sample of the table of architectures (``make architectures`` runs all of it), and the table itself."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

SAMPLE = (
    "llama", "gemma2", "gpt2", "gpt_neox", "opt", "falcon", "phi3", "glm4", "codegen", "diffllama", "mixtral", "phimoe",
    "deepseek_v2", "gpt_oss", "zaya", "hy_v4", "mamba", "rwkv", "lfm2", "recurrent_gemma",
)  # fmt: skip
"""Twenty that are cheap and unlike one another: attention forms, fusions, routers, state spaces."""


@pytest.fixture(scope="module")
def table() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("architectures")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("name", SAMPLE)
def test_every_prunable_axis_comes_out_whole(table: ModuleType, name: str, tmp_path: Path) -> None:
    row = table.examine(table.recipes()[name], "eager", tmp_path, quick=True)
    assert row["failures"] == []
    tally = row["equality"]
    assert tally["equal"] == tally["of"] == sum(row["axes"].values()) > 2
    assert tally["worst"] <= 1e-5
    assert {"head", "query", "ffn"} & row["axes"].keys()
    assert row["unknown"] == {}


def test_the_sample_of_the_command_line_is_the_same_each_time_and_has_every_task(table: ModuleType) -> None:
    recipes = list(table.recipes().values())
    chosen = table.sampled(recipes, 20)
    assert len(chosen) == 20
    assert chosen == table.sampled(recipes[::-1], 20)[::-1]
    assert {recipe.task for recipe in chosen} == {recipe.task for recipe in recipes}


def test_a_failure_is_a_row_with_its_reason(table: ModuleType, tmp_path: Path) -> None:
    def broken() -> Any:
        raise ValueError("no such size")

    recipe = table.Recipe("broken", "LlamaForCausalLM", "causal-lm", broken)
    row = table.examine(recipe, "eager", tmp_path, quick=True)
    assert row["failures"] == ["make: ValueError: no such size"]
    page = table.page([row])
    assert "| broken (failed) | LlamaForCausalLM | - | - | - | - | - |" in page
    assert "**broken** (LlamaForCausalLM): make: ValueError: no such size" in page
