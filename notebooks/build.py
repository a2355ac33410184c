"""Execute the notebooks and store them light: `python notebooks/build.py [NN_name …]` (or `make notebooks`).

Each `NN_name.py` is run from top to bottom in a fresh kernel and written as `NN_name.ipynb` beside it, with its
pictures and texts, without widget state (which GitHub and Colab stumble over), progress bars and timings. The run
is measured, and what all notebooks have alike (frame.py: head, setup, links) is written anew in both files.

`python notebooks/build.py --repository owner/name` (or `make notebooks REPOSITORY=owner/name`) runs nothing: it
changes the name of the repository wherever a file of the project has it.

`solved` makes of a notebook the copy in which every exercise is answered by its folded solution.
"""

import argparse
import html
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path

import frame
import jupytext
import nbformat
import pages
import psutil
from frame import digest, rename_repository, repository, tagged
from nbclient import NotebookClient
from nbconvert import HTMLExporter

HERE = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"
# Peak memory (kilobytes on Linux) of the kernel; seconds of computing, of its children too.
COST = """import resource
kernel, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(kernel.ru_maxrss, sum(used.ru_utime + used.ru_stime for used in (kernel, children)))"""
SOLUTION = re.compile(r"<summary>A solution</summary>\s*```python\n(.*?)\n```", re.DOTALL)


def solved(notebook: dict) -> dict:
    """The same notebook with each exercise cell replaced by the solution that follows it."""
    notebook = deepcopy(notebook)
    for place, cell in enumerate(notebook.cells):
        if tagged(cell, "exercise"):
            following = (
                SOLUTION.search(c.source)
                for c in notebook.cells[place:]
                if c.cell_type == "markdown"
            )
            cell.source = next(match for match in following if match).group(1)
    return notebook


@contextmanager
def watched_memory(pid: int) -> Iterator[list[float]]:
    """Inside, look at the memory of a process and of those that it starts. Yields the most so far, in a list, in megabytes;
    what they share counts once."""
    most, stop = [0.0], threading.Event()

    def look() -> None:
        parent = psutil.Process(pid)
        while not stop.wait(0.2):
            total = 0
            with suppress(psutil.NoSuchProcess):  # one that has just ended
                for process in (parent, *parent.children(recursive=True)):
                    total += process.memory_full_info().pss
            most[0] = max(most[0], total / 1e6)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


def run(notebook: dict, kernel_name: str = "python3", folder: Path = HERE) -> tuple[float, float]:
    """Execute in place, in a folder.

    Returns:
        Seconds, and the peak memory in megabytes of the kernel and what it starts. The seconds are those of computing
        where these are fewer than those on the clock: on a machine that is busy with something else, the clock says
        nothing about the notebook.
    """
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name=kernel_name,
        resources={"metadata": {"path": folder}},
        record_timing=False,
        store_widget_state=False,
    )
    probe = nbformat.v4.new_code_cell(COST)
    began = time.time()
    with client.setup_kernel(), watched_memory(client.km.provisioner.pid) as most:
        for place, cell in enumerate(notebook.cells):
            client.execute_cell(cell, place)
        seconds = time.time() - began
        notebook.cells.append(probe)
        client.execute_cell(probe, len(notebook.cells) - 1)
        notebook.cells.pop()
    kilobytes, computing = map(float, probe.outputs[0].text.split())
    return min(seconds, computing), max(kilobytes / 1000, *most)


def storable(output: dict) -> dict | None:
    """The output without its widget, which no page has without a kernel: of a panel its picture stays, of a progress bar
    nothing, nor of a library's remark on stderr."""
    data = output.get("data", {})
    widget = data.pop(WIDGET, None)
    if "text/html" in data:  # under the number of a widget
        data["text/html"] = re.sub(r"vader-still-\w+", "", data["text/html"])
    return (
        None if output.get("name") == "stderr" or (widget and "text/html" not in data) else output
    )


def build(source: Path) -> None:
    frame.write_source(source)
    notebook = jupytext.read(source)
    seconds, megabytes = run(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(storable, cell.outputs) if output]
            cell.metadata.pop("execution", None)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["vader_nb"] = {"code": digest(notebook)}
    # Cell ids from the position: random ones would change every line of every build.
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:03d}"

    cost = seconds / 60, megabytes / 1000
    frame.write_source(source, cost)
    frame.dress(notebook, source.stem, cost)
    target = source.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    print(
        f"{target.name}: {seconds:.0f} s, {megabytes:.0f} MB, stored in {target.stat().st_size / 1e6:.2f} MB",
        flush=True,
    )


def app(target: Path) -> None:
    """The notebook that `make app` serves as a page of its own. In runs/app, its neighbors are the runs."""
    source = "from vader_nb.widgets.playground import Playground\n\nPlayground(run='../playground')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    notebook.metadata["title"] = "vader_nb playground"
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


PAGE_STYLE = """<style>
/* On narrow screens code and tables scroll inside their own boxes, and nothing is cut off. */
.jp-InputArea-editor, .jp-RenderedHTMLCommon > table { overflow-x: auto }
.jp-RenderedHTMLCommon > table { display: block; max-width: 100% }
.jp-OutputArea-output pre { white-space: pre; overflow-x: auto }
details { margin-bottom: 1.5em }
nav { font: 16px/1.6 system-ui, sans-serif; padding: .6em 1em; display: flex; gap: 1.5em; flex-wrap: wrap }
</style>"""


def introduction(notebook: dict) -> tuple[str, str]:
    """Title of a notebook, and what its reader will be able to do."""
    title, text = (notebook.cells[place].source for place in (0, 1))
    items = re.findall(r"^- (.+?)[;.]?(?=\n- |\n\n|\n*\Z)", text, re.MULTILINE | re.DOTALL)
    goals = "; ".join(items)
    return title.splitlines()[0].lstrip("# "), " ".join(re.sub(r"[*`]", "", goals).split())


def links(place: int, pages: list[str]) -> str:
    """The bar on top of a page: where it stands in the series."""
    around = {"←": place - 1, "→": place + 1}
    ends = {arrow: pages[i] for arrow, i in around.items() if place >= 0 and 0 <= i < len(pages)}
    named = {"Contents": "index", "Notation": "notation"} | {
        f"{arrow} {frame.number(stem)}": stem for arrow, stem in ends.items()
    }
    return (
        "<nav>"
        + "".join(f'<a href="{stem}.html">{text}</a>' for text, stem in named.items())
        + "</nav>"
    )


def finish(page: Path, bar: str, alternatives: list[str]) -> None:
    """Bar, style and the figures' alternative texts (which the exporter does not take over) into a rendered page."""
    text = re.sub(r'href="(\w+)\.(?:ipynb|md)"', r'href="\1.html"', page.read_text())
    for alternative in alternatives:
        told = html.escape(alternative, quote=True)
        text = text.replace(
            'alt="No description has been provided for this image"', f'alt="{told}"', 1
        )
    text = text.replace("</head>", f"{PAGE_STYLE}</head>", 1)
    page.write_text(re.sub(r"(<body[^>]*>)", lambda body: body.group(1) + bar, text, count=1))


def figures(notebook: dict) -> list[str]:
    """The alternative texts of a notebook's figures, in order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [
        output.metadata["image/png"]["alt"]
        for output in outputs
        if "image/png" in output.get("data", {})
    ]


STYLE = """
:root{color-scheme:light dark;--link:#2457a6;--quiet:#667}
@media(prefers-color-scheme:dark){:root{--link:#8ab4f8;--quiet:#9aa}}
body{font:18px/1.6 system-ui,sans-serif;max-width:44em;margin:3em auto;padding:0 1em}
a{color:var(--link)}h1{margin-bottom:0}p.lead{font-size:1.2em;margin-top:0}figure{margin:2em 0}
img{max-width:100%;border-radius:6px}figcaption,.goal{color:var(--quiet);font-size:.9em}
ol,ul{padding:0}li{list-style:none;margin:.9em 0}
"""
# Title and what one finds there, of the pages beside the course.
SHELF = {
    "package": "load, reward, align, sample; the map of the code",
    "gpus": "in a shell: processes, memory, resuming, adapters for other tools",
    "recipes": "settings by model and card",
    "models": "Wan, CogVideoX, HunyuanVideo, LTX, ModelScope, SVD and more",
    "rewards": "HPSv2, PickScore, ImageReward, VideoReward and more",
    "races": "VADER against DDPO, GRPO and DPO",
    "controls": "sample, compare, compose and watch",
    "add_a_model": "in under a hundred lines",
    "arguments": "of VADER, VideoX-Fun and TRL",
    "notation": "words and symbols",
}


def contents(folder: Path) -> None:
    """The start page of the rendered series, links between its pages, and what a narrow screen needs."""
    rows, stems = [], sorted(page.stem for page in folder.glob("[0-9][0-9]_*.html"))
    for place, stem in enumerate(stems):
        notebook = nbformat.read(HERE / f"{stem}.ipynb", as_version=4)
        finish(folder / f"{stem}.html", links(place, stems), figures(notebook))
        title, goals = (html.escape(text) for text in introduction(notebook))
        rows.append(
            f'<li><a href="{stem}.html">{title}</a><br><span class="goal">{goals}</span></li>'
        )
    shelf = []
    for path in sorted(HERE.glob("*.md"), key=lambda path: [*SHELF, path.stem].index(path.stem)):
        text = path.read_text().replace("](../", f"](https://github.com/{repository()}/blob/main/")
        text = re.sub(r"\]\((\w+)\.(ipynb|md)\)", r"](\1.html)", text)
        page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
        (folder / f"{path.stem}.html").write_text(HTMLExporter().from_notebook_node(page)[0])
        finish(folder / f"{path.stem}.html", links(-1, stems), [])
        title = text.splitlines()[0].lstrip("# ")
        if path.stem in SHELF:  # the panels' pages are found from controls.md
            link = f'<a href="{path.stem}.html">{title}</a>'
            shelf.append(f'<li>{link}: <span class="goal">{SHELF[path.stem]}</span></li>')
    shutil.copytree(HERE / "images", folder / "images", dirs_exist_ok=True)
    readme = (HERE.parent / "README.md").read_text()
    picture, caption = re.search(
        r"!\[(.*?)\]\(notebooks/images.*?\)\n\n\*(.*?)\*\n", readme, re.S
    ).groups()
    (folder / "index.html").write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>vader_nb: reward gradients for video diffusion</title><style>{STYLE}</style>"
        '<h1>vader_nb</h1><p class="lead">Teach a text-to-video model what you like, by the gradient of a reward.</p>'
        f'<figure><img src="images/before_after.gif" alt="{html.escape(picture)}">'
        f"<figcaption>{html.escape(caption.replace('`', ''))}</figcaption></figure>"
        f"<h2>The course</h2><ol>{''.join(rows)}</ol>"
        f"<h2>Beside it</h2><ul>{''.join(shelf)}</ul>"
        f'<p><a href="https://github.com/{repository()}">Code, and two commands to run it</a> · Apache-2.0</p></html>\n'
    )
    print(f"look at: {folder / 'index.html'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names",
        nargs="*",
        help="notebooks to run, such as 03_differentiable_rewards (default: all)",
    )
    parser.add_argument("--repository", help="owner/name: write it everywhere, and run nothing")
    parser.add_argument("--app", type=Path, help="write the playground as a page without code")
    parser.add_argument("--contents", type=Path, help="finish the pages rendered into this folder")
    chosen = parser.parse_args()
    if chosen.repository:
        for path in rename_repository(chosen.repository):
            print(path.relative_to(HERE.parent))
    elif chosen.app:
        app(chosen.app)
    elif chosen.contents:
        contents(chosen.contents)
    else:
        pages.write(HERE)
        for path in sorted(HERE.glob("[0-9][0-9]_*.py")):
            if not chosen.names or path.stem in chosen.names:
                build(path)


if __name__ == "__main__":
    main()
