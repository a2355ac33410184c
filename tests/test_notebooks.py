"""The notebook pairs: in sync, executed, light, and shown by any viewer. (nbval runs them: `make test`.)"""

import tempfile
from pathlib import Path

import jupytext
import nbformat
import pytest

PAIRS = sorted((Path(__file__).parent.parent / "notebooks").glob("[0-9][0-9]_*.py"))


def test_there_are_notebooks():
    assert PAIRS


@pytest.fixture(params=PAIRS, ids=lambda path: path.stem)
def pair(request):
    return request.param, jupytext.read(request.param), nbformat.read(request.param.with_suffix(".ipynb"), as_version=4)


def test_the_two_files_say_the_same(pair):
    _, source, notebook = pair
    assert [(c.cell_type, c.source) for c in source.cells] == [(c.cell_type, c.source) for c in notebook.cells]


def test_it_is_executed_in_order_without_errors(pair):
    _, _, notebook = pair
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]


def test_it_is_light_and_renders_everywhere(pair):
    path, _, notebook = pair
    assert path.with_suffix(".ipynb").stat().st_size < 1.5e6
    assert "widgets" not in notebook.metadata
    nbformat.validate(notebook)
    stored = path.with_suffix(".ipynb").read_text()
    for path in (PAIRS[0].parent.parent, tempfile.gettempdir(), Path.home()):  # of the machine that built it
        assert f"{path}/" not in stored


def test_cells_are_short_and_pictures_have_alternatives(pair):
    _, _, notebook = pair
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    lengths = sorted(len([line for line in cell.source.splitlines() if line.strip()]) for cell in cells)
    assert lengths[len(lengths) // 2] <= 8
    assert lengths[-1] <= 25
    for cell in cells:
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert output.metadata["image/png"]["alt"]
            assert "<img" not in output.get("data", {}).get("text/html", "") or "alt=" in output.data["text/html"]


def test_it_has_parameters_predictions_and_an_exercise(pair):
    _, _, notebook = pair
    assert [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert text.count("**Predict.**") >= 2
    assert "A solution" in text
