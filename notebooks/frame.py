"""What all notebooks of the course have alike: the head with its badges and cost, the setup cell, links that work in Colab,
and what Colab reads from a notebook's metadata. `python notebooks/frame.py [NN_name …]` writes these parts anew in every
pair, and runs nothing.

Here, too, is the name of the repository, on which they all depend.
"""

import argparse
import contextlib
import hashlib
import io
import math
import re
from pathlib import Path

import jupytext
import nbformat

from vader_nb import __version__, course

HERE = Path(__file__).parent
COST = re.compile(r"\| (?:about )?([\d.]+) minutes? \| ([\d.]+) GB \|")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((\w+\.(?:ipynb|md))\)")
ELSEWHERE = "*The same links for Colab:"
# Never torch or numpy: Colab has them, and another version would break what is loaded.
SETUP = """\
import sys
from importlib.util import find_spec

if "google.colab" in sys.modules and not find_spec("vader_nb"):  # install what Colab lacks
    %pip install -q --no-deps git+https://github.com/{repository}
    %pip install -q open_clip_torch mediapy
    pass  # the newest version; for another, append @ and a tag or commit to the address

from vader_nb import course

course.environment(stored_with="{version}")"""


def tagged(cell: dict, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def digest(notebook: dict) -> str:
    """A fingerprint of the code, and of the answers and alternative texts that it shows: outputs stored under another one
    are stale."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    shown = [
        (key, text)
        for part in ("answers", "alternatives")
        for key, text in course.texts()[part].items()
        if f'"{key}"' in code
    ]
    return hashlib.sha256(f"{code}{shown}".encode()).hexdigest()[:16]


def repository(root: Path = HERE.parent) -> str:
    """owner/name, from the one place that names it: [project.urls] in pyproject.toml."""
    project = (root / "pyproject.toml").read_text()
    return re.search(r'^Repository = "https://github.com/([^"]+)"', project, re.MULTILINE).group(1)


def rename_repository(new: str, root: Path = HERE.parent) -> list[Path]:
    """Write another owner/name into pyproject.toml, README.md and the notebooks, without running these.

    Args:
        new: owner/name on GitHub.
        root: of the checkout.

    Returns:
        The files that changed.

    Raises:
        ValueError: `new` is no owner/name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9_.-]+", new):
        raise ValueError(f"{new!r} is no repository: owner/name, such as {repository(root)}")
    # In addresses of GitHub itself, of Colab (…/github/owner/name) and of Binder (…/gh/owner/name).
    name = re.compile(
        rf"(github\.com/|/github/|/gh/){re.escape(repository(root))}(?![A-Za-z0-9_-])"
    )
    changed = []
    notebooks = sorted((root / "notebooks").iterdir())
    for path in (root / "pyproject.toml", root / "README.md", *notebooks):
        if path.suffix not in (".toml", ".md", ".py", ".ipynb"):
            continue
        old = path.read_text()
        text = name.sub(rf"\g<1>{new}", old)
        if text == old:
            continue
        if (
            path.suffix == ".ipynb"
        ):  # the install line is code, and the stored outputs are not stale
            before, after = (digest(nbformat.reads(t, as_version=4)) for t in (old, text))
            text = text.replace(f'"code": "{before}"', f'"code": "{after}"')
        path.write_text(text)
        changed.append(path)
    return changed


def title(name: str) -> str:
    """The first heading of a notebook (its stem) or a page (with .md)."""
    path = HERE / (name if name.endswith(".md") else f"{name}.py")
    mark = "# " if path.suffix == ".md" else "# # "
    return re.search(f"^{mark}(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)[1]


def number(stem: str) -> str:
    """How the course counts a notebook: 0, 1a, 1b, 2, …"""
    return title(stem).split(" · ")[0]


def address(name: str) -> str:
    """Where a file of this folder opens from anywhere: a notebook in Colab, a page on GitHub."""
    colab = "colab.research.google.com/github" if name.endswith(".ipynb") else "github.com"
    return f"https://{colab}/{repository()}/blob/main/notebooks/{name}"


def badges(stem: str) -> str:
    binder = f"https://mybinder.org/v2/gh/{repository()}/main?labpath=notebooks/{stem}.ipynb"
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address(f'{stem}.ipynb')})\n"
        f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder})"
    )


def needs_gpu(stem: str) -> bool:
    """Of a chapter that has a use for a GPU: the one about full-size models."""
    return stem == "11_one_gpu"


def head(first_line: str, stem: str, minutes: float, gigabytes: float) -> str:
    """The first cell: title, badges, and what the notebook costs, as measured. Minutes are rounded up to a half, so
    that a run on another day says the same."""
    rounded = max(1, math.ceil(2 * minutes - 0.01)) / 2
    runtime = (
        "In Colab, a runtime with a GPU runs the full-size model; one without runs its small twin."
        if needs_gpu(stem)
        else "Colab's default runtime, a CPU, is enough."
    )
    return (
        f"{first_line}\n\n{badges(stem)}\n\n"
        "| needs | two CPU cores | peak memory |\n|---|---|---|\n"
        f"| no GPU, no download, no account | about {rounded:g} minute{'s' * (rounded != 1)} | {gigabytes:.1f} GB |\n\n"
        f"*{runtime} Words and symbols: [notation and glossary](notation.md) ([in Colab]({address('notation.md')})).*"
    )


def elsewhere(notebook: dict) -> str:
    """A line with the absolute twin of each relative link in the notebook's texts: from Colab the relative ones lead nowhere."""
    prose = "\n".join(c.source for c in notebook.cells[1:] if c.cell_type == "markdown")
    twins = [
        f"[{title(name) if name.endswith('.md') else 'chapter ' + number(name.removesuffix('.ipynb'))}]({address(name)})"
        for name in sorted(set(LINK.findall(prose)))
    ]
    return f"{ELSEWHERE} {', '.join(twins)}.*"


def dress(notebook: dict, stem: str, cost: tuple[float, float] | None = None) -> None:
    """Write the common parts of a notebook anew, in place.

    Args:
        notebook: a jupytext or nbformat notebook.
        stem: of its files.
        cost: minutes and gigabytes; None: those in its head, or zeros in one that was never built.
    """
    first, last = notebook.cells[0], notebook.cells[-1]
    told = COST.search(first.source)
    minutes, gigabytes = cost or (map(float, told.groups()) if told else (0, 0))
    first.source = head(first.source.splitlines()[0], stem, minutes, gigabytes)
    (setup,) = (cell for cell in notebook.cells if tagged(cell, "setup"))
    setup.source = SETUP.format(repository=repository(), version=__version__)
    for cell in notebook.cells[1:]:
        if cell.cell_type == "markdown":  # 01 and 05 in a link's text: as the titles count
            cell.source = re.sub(
                r"\[\w+( · [^\]]+)\]\((\d\d_\w+)\.ipynb\)",
                lambda link: f"[{number(link[2])}{link[1]}]({link[2]}.ipynb)",
                cell.source,
            )
    last.source = f"{last.source.split(ELSEWHERE)[0].rstrip()}\n\n{elsewhere(notebook)}"
    notebook.metadata["colab"] = {"provenance": []}
    if needs_gpu(stem):
        notebook.metadata["accelerator"] = "GPU"
        notebook.metadata["colab"]["gpuType"] = "T4"


def commented(cell: dict) -> str:
    """A cell's source as it stands in the .py of a pair."""
    if cell.cell_type == "code":
        return re.sub(r"^( *)%", r"\1# %", cell.source, flags=re.MULTILINE)
    return "\n".join(f"# {line}".rstrip() for line in cell.source.splitlines())


def write_source(path: Path, cost: tuple[float, float] | None = None) -> None:
    """Write the common parts of a .py anew, and touch nothing else in it."""
    notebook, text = jupytext.read(path), path.read_text(encoding="utf-8")
    old = [commented(cell) for cell in notebook.cells]
    dress(notebook, path.stem, cost)
    for before, cell in zip(old, notebook.cells):
        if commented(cell) != before:
            assert text.count(before) == 1, before
            text = text.replace(before, commented(cell))
    path.write_text(text, encoding="utf-8")


def write_pair(path: Path) -> None:
    """Write the common parts of a pair anew. Outputs that were stale remain so, and no others become it."""
    write_source(path)
    target = path.with_suffix(".ipynb")
    notebook = nbformat.read(target, as_version=4)
    current = notebook.metadata["vader_nb"]["code"] == digest(notebook)
    dress(notebook, path.stem)
    (setup,) = (cell for cell in notebook.cells if tagged(cell, "setup"))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        course.environment(stored_with=__version__)
    setup.outputs = [nbformat.v4.new_output("stream", name="stdout", text=said.getvalue())]
    if current:
        notebook.metadata["vader_nb"]["code"] = digest(notebook)
    nbformat.write(notebook, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as 03_differentiable_rewards (default: all)")
    names = parser.parse_args().names
    for path in sorted(HERE.glob("[0-9][0-9]_*.py")):
        if not names or path.stem in names:
            write_pair(path)


if __name__ == "__main__":
    main()
