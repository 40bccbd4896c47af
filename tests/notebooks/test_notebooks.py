"""Every notebook runs from top to bottom, and what is committed in it is what it gives today."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from refresh import NOTEBOOKS, execute

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
def test_notebook_gives_what_it_shows(path: Path) -> None:
    committed = outputs(nbformat.read(path, as_version=4))
    assert outputs(execute(path)) == committed, "if the change is meant: python tests/notebooks/refresh.py"
