"""The notebook runs from a clean kernel, and the outputs stored in it came from the code as it is.

    python tests/test_notebook.py        # execute it, store its outputs and README's figure
"""

import base64
import hashlib
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent


def read():
    notebook = nbformat.read(ROOT / "walkthrough.ipynb", as_version=4)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def origin(notebook) -> str:  # a hash of what outputs depend on: batchtopk.py and the sources of all cells
    sources = [(ROOT / "batchtopk.py").read_text(encoding="utf-8"), *(cell.source for cell in notebook.cells)]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def execute():
    notebook, cells = read()
    options = {"timeout": 1800, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}, **options).execute()
    return notebook, cells


@pytest.mark.slow
def test_the_notebook_runs_from_a_clean_kernel():
    _, cells = execute()  # raises where a cell does, and cells assert the numbers they quote
    assert all(cell.outputs or "hide-input" in cell.metadata.get("tags", []) for cell in cells[1:])


def test_stored_outputs_are_those_of_the_code_as_it_is():
    notebook, cells = read()
    assert notebook.metadata["origin"] == origin(notebook), "run: python tests/test_notebook.py"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    alt = [o.metadata["image/png"]["alt"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(alt) >= 10 and all(alt), "pictures with descriptions"
    assert not re.search(r"/(home|root|work|Users)/|/tmp/tmp", str(outputs)), "a path of some machine"
    assert max(len(line) for o in outputs for line in o.get("text", "").splitlines() or [""]) <= 100


def test_the_notebook_is_of_a_length_one_reads_and_shows_short_cells():
    notebook, cells = read()
    nbformat.validate(notebook)
    assert 2000 <= sum(len(c.source.split()) for c in notebook.cells if c.cell_type == "markdown") <= 4000
    code = [cell.source.splitlines() for cell in cells]
    assert max(map(len, code)) <= 25 and max(len(line) for lines in code for line in lines) <= 100


if __name__ == "__main__":
    notebook, cells = execute()
    [cell] = [cell for cell in cells if "Error of BatchTopK / error of TopK" in cell.source]
    (ROOT / ".figures/why.png").write_bytes(base64.b64decode(cell.outputs[0].data["image/png"]))
    notebook.metadata["origin"] = origin(notebook)
    nbformat.write(notebook, ROOT / "walkthrough.ipynb")
