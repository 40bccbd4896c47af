"""The code that a universal checkpoint brings along builds the model and loads its weights, and can do nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tiny_models import build

import llmprune

IMPORTS = {"__future__", "copy", "typing", "torch", "transformers"}
FORBIDDEN = {
    "open",
    "exec",
    "eval",
    "compile",
    "__import__",
    "breakpoint",
    "globals",
    "vars",
    "delattr",
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def code(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[ast.Module]:
    model = build(request.param)
    graph = llmprune.trace(model)
    scores = llmprune.score(model, graph, importance="l2", quiet=True)
    llmprune.compact(model, llmprune.plan(graph, scores, {"ffn": 0.3}, protect_first=1, protect_last=0))
    folder: Path = tmp_path_factory.mktemp("written") / "m"
    saved = llmprune.save_pretrained(model, folder, form="universal")
    files = sorted(Path(saved.directory).glob("*.py"))
    assert files
    return [ast.parse(file.read_text()) for file in files]


def test_it_imports_what_models_are_made_of_alone(code: list[ast.Module]) -> None:
    for module in code:
        for node in ast.walk(module):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= 1  # of the folder itself
                names = [] if node.level else [str(node.module)]
            assert {name.split(".")[0] for name in names} <= IMPORTS


def test_importing_it_runs_nothing(code: list[ast.Module]) -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign, ast.AnnAssign, ast.Expr)
    for module in code:
        for node in module.body:
            assert isinstance(node, allowed)
            if isinstance(node, ast.Expr):
                assert isinstance(node.value, ast.Constant)  # a docstring
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                assert not any(isinstance(inner, ast.Call) for inner in ast.walk(node))


def test_it_calls_nothing_that_reads_writes_or_runs(code: list[ast.Module]) -> None:
    for module in code:
        for node in ast.walk(module):
            if isinstance(node, ast.Name):
                assert node.id not in FORBIDDEN
            if isinstance(node, ast.Attribute):
                dunder = node.attr.startswith("__") and node.attr not in ("__init__", "__name__", "__class__")
                assert not dunder, node.attr
                assert node.attr not in ("load", "save", "system", "popen", "hub")
