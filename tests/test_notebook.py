"""The notebook runs from a clean kernel, and the outputs stored in it came from the code as it is.

    python tests/test_notebook.py        # execute it and store its outputs, with a hash of what they came from
"""

import hashlib
import re
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "walkthrough.ipynb"


def origin(notebook) -> str:
    """A hash of what outputs depend on: batchtopk.py and the sources of all cells."""
    parts = [(ROOT / "batchtopk.py").read_bytes(), *(cell.source.encode() for cell in notebook.cells)]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def execute():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    return notebook


def test_the_notebook_runs_from_a_clean_kernel():
    executed = execute()  # raises where a cell does, and cells assert the numbers they quote
    assert all(cell.outputs for cell in executed.cells[2:] if cell.cell_type == "code"), "every section shows something"


def test_stored_outputs_are_those_of_the_code_as_it_is():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata["origin"] == origin(notebook), "outputs are older than the code; run: python tests/test_notebook.py"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 10 and any("text/html" in output.get("data", {}) for output in outputs)
    assert not re.search(r"/(home|root|work|tmp|Users)/", "".join(str(output) for output in outputs)), "a path of some machine"


def test_the_notebook_is_of_a_length_one_reads_and_shows_short_cells():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    words = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    longest = max(len(cell.source.splitlines()) for cell in notebook.cells if cell.cell_type == "code")
    assert 2000 <= words <= 4000 and longest <= 25, (words, longest)


if __name__ == "__main__":
    notebook = execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
    notebook.metadata["origin"] = origin(notebook)
    nbformat.write(notebook, NOTEBOOK)
