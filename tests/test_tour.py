from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "experiments" / "tour.ipynb"


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.slow
def test_the_notebook_runs_and_shows_every_figure(notebook, tmp_path):
    """Each cell may take three minutes; the working directory is not the checkout."""
    NotebookClient(notebook, timeout=180, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    figures = [cell.id for cell in notebook.cells if any("image/png" in out.get("data", {}) for out in outputs(cell))]
    plotting = [cell.id for cell in notebook.cells if cell.cell_type == "code" and plots(cell.source)]
    assert figures == plotting and len(figures) > 10


def test_the_notebook_is_shipped_with_its_figures(notebook):
    plotting = [cell for cell in notebook.cells if cell.cell_type == "code" and plots(cell.source)]
    assert len(plotting) > 10 and all(any("image/png" in o.get("data", {}) for o in outputs(cell)) for cell in plotting)
    assert not any(out.output_type == "error" for cell in notebook.cells for out in outputs(cell))


def test_cells_are_short_and_contain_no_paths_of_the_machine(notebook):
    assert all(len(cell.source.splitlines()) <= 16 for cell in notebook.cells if cell.cell_type == "code")
    text = NOTEBOOK.read_text()
    assert len(text) < 1_600_000
    assert not [path for path in ("/work/", "/home/", "/root/", "/tmp/", "/Users/", "C:\\\\") if path in text]


def outputs(cell: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return cell.get("outputs", [])


def plots(source: str) -> bool:
    last = source.splitlines()[-1]
    return last.startswith(("grid(", "plt.show(", "film_strip(", "word_maps("))
