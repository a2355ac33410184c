"""Execute the notebooks and store them light: `python notebooks/build.py [NN_name …]` (or `make notebooks`).

Each `NN_name.py` is run from top to bottom in a fresh kernel and written as `NN_name.ipynb` beside it, with its
pictures and texts, without widget state (which GitHub and Colab stumble over), progress bars and timings.
"""

import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"


def clean(output: dict) -> bool:
    """Whether an output is worth storing: not a progress bar, not a library's remark on stderr."""
    return not (output.get("name") == "stderr" or WIDGET in output.get("data", {}))


def build(source: Path) -> None:
    notebook = jupytext.read(source)
    began = time.time()
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": HERE}},
        record_timing=False,
        store_widget_state=False,
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if clean(output)]
            cell.metadata.pop("execution", None)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    # Cell ids from the position: random ones would change every line of every build.
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:03d}"
    target = source.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    print(f"{target.name}: {time.time() - began:.0f} s, {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for path in sorted(HERE.glob("[0-9][0-9]_*.py")):
        if not wanted or path.stem in wanted:
            build(path)
