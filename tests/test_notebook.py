"""The example notebook runs from the first cell to the last and says what it should."""

from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"

pytestmark = pytest.mark.slow


def texts(cell: Any) -> str:
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def test_the_notebook_runs() -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # Raises where a cell does.
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    said = [texts(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert "openvino" in said[1] or "torch" in said[1]
    assert [line.split()[0] for line in said[3].splitlines()] == ["liver", "kidney", "spleen", "pancreas"]
    liver_ml = float(said[3].split()[1])
    assert 500 < liver_ml < 3000
    kinds = {kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})}
    assert "image/jpeg" in kinds


def test_the_stored_outputs_hold_no_path_of_a_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not any(part in text for part in ("/home/", "/tmp/", "/root/", "/Users/", "Traceback"))
