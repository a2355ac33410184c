"""Execute the notebooks and store them light: `python notebooks/build.py [NN_name …]` (or `make notebooks`).

Each `NN_name.py` is run from top to bottom in a fresh kernel and written as `NN_name.ipynb` beside it, with its
pictures and texts, without widget state (which GitHub and Colab stumble over), progress bars and timings. The run
is measured, and the head cell (badges, cost) is written anew in both files.

`solved` makes of a notebook the copy in which every exercise is answered by its folded solution.
"""

import hashlib
import html
import re
import sys
import time
from copy import deepcopy
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter

HERE = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"
PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"  # kilobytes on Linux
SOLUTION = re.compile(r"<summary>A solution</summary>\s*```python\n(.*?)\n```", re.DOTALL)


def tagged(cell: dict, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def digest(notebook: dict) -> str:
    """A fingerprint of the code: outputs stored under another one are stale."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def repository() -> str:
    """owner/name, from the one place that names it: [project.urls] in pyproject.toml."""
    project = (HERE.parent / "pyproject.toml").read_text()
    return re.search(r'^Repository = "https://github.com/([^"]+)"', project, re.MULTILINE).group(1)


def badges(stem: str) -> str:
    colab = f"https://colab.research.google.com/github/{repository()}/blob/main/notebooks/{stem}.ipynb"
    binder = f"https://mybinder.org/v2/gh/{repository()}/main?labpath=notebooks/{stem}.ipynb"
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})\n"
        f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder})"
    )


def head(title: str, stem: str, seconds: float, megabytes: float) -> str:
    """The first cell: title, badges, and what the notebook costs, as measured by this run."""
    return (
        f"{title}\n\n{badges(stem)}\n\n"
        "| needs | two CPU cores | peak memory | GPU |\n|---|---|---|---|\n"
        f"| no GPU, no download, no account | {seconds / 60:.1f} minutes | {megabytes / 1000:.1f} GB | not measured |\n\n"
        "*Words and symbols: [notation and glossary](notation.md).*"
    )


def solved(notebook: dict) -> dict:
    """The same notebook with each exercise cell replaced by the solution that follows it."""
    notebook = deepcopy(notebook)
    for place, cell in enumerate(notebook.cells):
        if tagged(cell, "exercise"):
            following = (SOLUTION.search(c.source) for c in notebook.cells[place:] if c.cell_type == "markdown")
            cell.source = next(match for match in following if match).group(1)
    return notebook


def run(notebook: dict) -> tuple[float, float]:
    """Execute in place; returns seconds, and the kernel's peak memory in megabytes."""
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": HERE}},
        record_timing=False,
        store_widget_state=False,
    )
    probe = nbformat.v4.new_code_cell(PEAK)
    began = time.time()
    with client.setup_kernel():
        for place, cell in enumerate(notebook.cells):
            client.execute_cell(cell, place)
        seconds = time.time() - began
        notebook.cells.append(probe)
        client.execute_cell(probe, len(notebook.cells) - 1)
        notebook.cells.pop()
    return seconds, float(probe.outputs[0].text) / 1000


def worth_storing(output: dict) -> bool:
    """Not a progress bar, not a library's remark on stderr."""
    return not (output.get("name") == "stderr" or WIDGET in output.get("data", {}))


def build(source: Path) -> None:
    notebook = jupytext.read(source)
    seconds, megabytes = run(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if worth_storing(output)]
            cell.metadata.pop("execution", None)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["vader_nb"] = {"code": digest(notebook)}
    # Cell ids from the position: random ones would change every line of every build.
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:03d}"

    first = notebook.cells[0]
    old = first.source
    first.source = head(old.splitlines()[0], source.stem, seconds, megabytes)
    commented = ["\n".join(f"# {line}".rstrip() for line in text.splitlines()) for text in (old, first.source)]
    source.write_text(source.read_text().replace(*commented, 1))
    target = source.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    print(
        f"{target.name}: {seconds:.0f} s, {megabytes:.0f} MB, stored in {target.stat().st_size / 1e6:.2f} MB",
        flush=True,
    )


def contents(folder: Path) -> None:
    """The start page of the rendered series, and links between its pages instead of notebooks."""
    rows = []
    for page in sorted(folder.glob("[0-9][0-9]_*.html")):
        text = re.sub(r'(href="(?:[0-9]{2}_\w+|notation))\.(?:ipynb|md)"', r'\1.html"', page.read_text())
        page.write_text(text)
        title = jupytext.read(HERE / f"{page.stem}.py").cells[0].source.splitlines()[0].lstrip("# ")
        rows.append(f'<li><a href="{page.name}">{html.escape(title)}</a></li>')
    style = "body{font:18px/1.6 system-ui,sans-serif;max-width:40em;margin:3em auto;padding:0 1em}li{list-style:none}"
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    (folder / "index.html").write_text(
        f"{head}<title>vader_nb</title><style>{style}</style><h1>vader_nb</h1><p>Align video diffusion models to "
        f"differentiable rewards.</p><ul>{''.join(rows)}</ul></html>\n"
    )
    notation = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell((HERE / "notation.md").read_text())])
    (folder / "notation.html").write_text(HTMLExporter().from_notebook_node(notation)[0])
    print(f"look at: {folder / 'index.html'}")


if __name__ == "__main__":
    wanted = sys.argv[1:]
    if wanted[:1] == ["--contents"]:
        contents(Path(wanted[1]))
        sys.exit()
    for path in sorted(HERE.glob("[0-9][0-9]_*.py")):
        if not wanted or path.stem in wanted:
            build(path)
