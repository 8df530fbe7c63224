"""The notebook of queries shows what it computes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import nbclient
import nbformat

NOTEBOOK = Path(__file__).parents[2] / "examples" / "query.ipynb"


def shown(notebook: Any) -> list[list[str]]:
    """What each cell prints or shows as text; of a figure, that there is one."""
    cells = []
    for cell in notebook.cells:
        outputs = [output.get("data") or {"text/plain": output["text"]} for output in cell.get("outputs", ())]
        cells.append(["a figure" if "image/png" in output else output["text/plain"] for output in outputs])
    return cells


def test_the_notebook_shows_what_it_computes(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    before = shown(notebook)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter's own machinery; the notebook runs in another process
        where = {"metadata": {"path": tmp_path}}
        nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    assert shown(notebook) == before
    assert sum(cell == ["a figure"] for cell in before) == 2
    assert sum(map(bool, before)) > 7
    assert not any("torch" in cell.source for cell in notebook.cells if cell.cell_type == "code")
