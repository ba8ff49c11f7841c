"""The notebooks: stored without outputs, run from top to bottom in a kernel of their own, their figures in the cells."""

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import cifarlab

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed (pip install 'cifarlab[dev]')")
from nbclient import NotebookClient  # noqa: E402

PROJECT = Path(__file__).parent.parent
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
FIGURES = {"tour.ipynb": 9, "your_own_loop.ipynb": 3}
DRAWING = ("figures.draw_", "draw_calibration(", "Image(")  # what a cell that shows a figure calls


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            assert cell.metadata == {}
    assert path.stat().st_size < 30_000


def test_each_is_named_in_the_readme() -> None:
    readme = (PROJECT / "README.md").read_text()
    assert {path.name for path in NOTEBOOKS} == set(FIGURES)
    assert all(f"notebooks/{path.name}" in readme for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs_from_top_to_bottom_and_shows_its_figures(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each figure is a PNG in its cell's outputs, which Jupyter, Colab and GitHub show without a network."""
    monkeypatch.setenv("CIFARLAB_NOTEBOOK_QUICK", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(cifarlab.__file__).parent.parent))  # the kernel's is the one that is tested here
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # nothing goes to the home folder
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(path, as_version=4)
    place = tmp_path / "place"
    place.mkdir()
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(place)}}).execute()
    shown = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        pictures = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        if any(word in line for line in cell.source.splitlines() for word in DRAWING if "import" not in line):
            assert pictures, cell.source
        for picture in pictures:
            with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
                assert min(image.size) > 200
                assert len(set(image.convert("L").tobytes())) > 20  # something is drawn on it
        shown += len(pictures)
        assert not told(cell.outputs, "stderr"), cell.source
    assert shown == FIGURES[path.name]
    if path.name == "your_own_loop.ipynb":
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert "lower the learning rate" in told(outputs, "stdout")  # the alarm of the broken loop


def told(outputs: list[Any], stream: str) -> str:
    """What a cell wrote to that stream."""
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == stream)
