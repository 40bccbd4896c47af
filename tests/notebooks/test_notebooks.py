"""Every notebook runs from top to bottom, and what is committed in it is what it gives today."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MEASURED = re.compile(r"-?\d+\.\d+(e[+-]?\d+)?( [KMG]iB)?|-?\d+e[+-]?\d+")  # seconds, memory, errors
GENERATED = re.compile(
    r"(?<=There were once three friends named ).*", re.DOTALL
)  # rounding may turn a near tie
PADDING = re.compile(r" {2,}|-{3,}")


def outputs(notebook: nbformat.NotebookNode) -> list[tuple[str, list[str]]]:
    """For each code cell what it prints, without what a machine decides, and the types of what it displays."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        text = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        text = PADDING.sub(" ", MEASURED.sub("#", GENERATED.sub("(a story)", text)))
        cells.append((text, [kind for output in cell.outputs for kind in sorted(output.get("data", {}))]))
    return cells


def run(path: Path, monkeypatch: pytest.MonkeyPatch) -> nbformat.NotebookNode:
    """The notebook executed anew in its own folder, with this checkout's llmprune and one thread."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook: Any = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    return notebook


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_executed_and_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 200_000
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs or cell.source.startswith(("import", "from")), cell.source
            assert all(output.output_type != "error" for output in cell.outputs)
            assert all(output.get("name") != "stderr" for output in cell.outputs)


@pytest.mark.filterwarnings("default")  # of jupyter's own machinery
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_gives_what_it_shows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = outputs(nbformat.read(path, as_version=4))
    assert outputs(run(path, monkeypatch)) == committed
