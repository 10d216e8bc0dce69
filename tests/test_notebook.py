"""The notebook runs from its first cell to its last, and keeps small outputs of a real run."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason='needs pip install "openblip[docs]"')
nbformat = pytest.importorskip("nbformat", reason='needs pip install "openblip[docs]"')

NOTEBOOK = Path(__file__).parents[1] / "docs/loop.ipynb"
SIZES = "num_pairs, num_human, steps = 400, 400, 40"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (cell for cell in notebook.cells if SIZES in cell.source)
    cell.source = cell.source.replace(SIZES, "num_pairs, num_human, steps = 24, 12, 1")
    for cell in notebook.cells:
        cell.source = cell.source.replace("train blip-mini", "train blip-mini --training.batch-size 4")
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()


def test_its_outputs_are_kept_and_small() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert NOTEBOOK.stat().st_size < 200_000
    assert all(output.get("name") != "stderr" for cell in cells for output in cell.outputs)
