"""The notebook pairs: in sync, freshly executed, light, and built alike; and each runs, solved, where Colab would run it."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import parse_qs, urlparse
from xml.etree import ElementTree

import jupytext
import nbformat
import pytest

import vader_nb
from vader_nb import course, course_drawings, course_sketches

from . import environments
from .answers import ANSWERS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))
import build  # noqa: E402
import frame  # noqa: E402
import pages  # noqa: E402

PAIRS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.py"))


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def printed(cell):
    return "".join(
        output.get("text", "") for output in cell.outputs if output.get("name") == "stdout"
    )


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if build.tagged(cell, tag)]


def is_current(source):
    """Whether the stored outputs are those of this code."""
    stored = json.loads(source.with_suffix(".ipynb").read_text())
    return stored["metadata"]["vader_nb"]["code"] == build.digest(jupytext.read(source))


def test_there_are_notebooks():
    assert PAIRS


@pytest.mark.parametrize("name", pages.PAGES)
def test_a_generated_page_says_what_the_package_says(name):
    stored = (ROOT / "notebooks" / name).read_text(encoding="utf-8")
    assert stored == pages.PAGES[name](), "write it again: python notebooks/pages.py"


def test_the_site_has_every_page_and_no_dead_link(tmp_path):
    for path in PAIRS:
        links = re.findall(r"(?<!!)\[[^\]]*\]\(([^):]+)\)", prose(jupytext.read(path)))
        body = "".join(f'<a href="{link}"></a>' for link in links)
        (tmp_path / f"{path.stem}.html").write_text(
            f"<html><head></head><body>{body}</body></html>"
        )
    build.contents(tmp_path)
    assert "<style>" in (tmp_path / f"{PAIRS[0].stem}.html").read_text()
    index = (tmp_path / "index.html").read_text()
    assert "$" not in index and "Exercises are" not in index  # goals, without formulas
    beside = [path.stem for path in (ROOT / "notebooks").glob("*.md")]
    direct = [stem for stem in beside if not stem.startswith("panel_")]
    assert all(f'href="{stem}.html"' in index for stem in [p.stem for p in PAIRS] + direct)
    for page in tmp_path.glob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#:]+)"', page.read_text()):
            assert (tmp_path / link).exists(), (page.name, link)


@pytest.fixture(params=PAIRS, ids=lambda path: path.stem)
def pair(request):
    return (
        request.param,
        jupytext.read(request.param),
        nbformat.read(request.param.with_suffix(".ipynb"), as_version=4),
    )


def test_the_two_files_say_the_same(pair):
    _, source, notebook = pair
    assert [(c.cell_type, c.source) for c in source.cells] == [
        (c.cell_type, c.source) for c in notebook.cells
    ]


def test_it_is_executed_in_order_without_errors(pair):
    _, _, notebook = pair
    assert [cell.execution_count for cell in code(notebook)] == list(
        range(1, len(code(notebook)) + 1)
    )
    assert not [o for cell in code(notebook) for o in cell.outputs if o.output_type == "error"]


def test_its_outputs_are_those_of_its_code(pair):
    path, _, _ = pair
    assert is_current(path), "changed since it was run: make notebooks"


def test_it_is_light_and_renders_everywhere(pair):
    path, _, notebook = pair
    assert path.with_suffix(".ipynb").stat().st_size < 1.5e6
    assert "widgets" not in notebook.metadata
    nbformat.validate(notebook)
    stored = path.with_suffix(".ipynb").read_text()
    for place in (ROOT, tempfile.gettempdir(), Path.home()):  # of the machine that built it
        assert f"{place}/" not in stored


def test_cells_are_short_and_pictures_have_alternatives(pair):
    _, _, notebook = pair
    lengths = sorted(
        len([line for line in cell.source.splitlines() if line.strip()]) for cell in code(notebook)
    )
    assert lengths[len(lengths) // 2] <= 8
    assert lengths[-1] <= 25
    for cell in code(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert output.metadata["image/png"]["alt"]
            for image in re.findall(
                r"<img[^>]*>", "".join(output.get("data", {}).get("text/html", ""))
            ):
                assert re.search(r'alt="[^"]', image), image[-80:]


def test_its_skeleton_is_that_of_the_series(pair):
    path, source, notebook = pair
    first = notebook.cells[0]
    assert build.tagged(first, "head")
    assert re.fullmatch(r"# \d+[ab]? · .+", first.source.splitlines()[0])
    cost = re.search(r"\| about ([\d.]+) minutes? \| ([\d.]+) GB \|", first.source)
    assert cost, "no cost box: make notebooks"
    assert float(cost[1]) <= (4 if path.stem == "10_other_models" else 3)
    assert 0 < float(cost[2]) <= 2, "Binder gives 2 GB"
    assert 3 <= len(re.findall(r"^- \*", prose(notebook), re.MULTILINE)) <= 5, (
        "you will be able to …: 3 to 5 verbs"
    )
    (parameters,) = tagged(notebook, "parameters")
    real = path.stem == "11_one_gpu"  # the one chapter that runs a real model, where there is a GPU
    assert parameters.source.startswith(('MODEL = "tiny"', 'MODEL = "modelscope"')[real])
    for title in ("## Recap", "Exercises", "**Next:**"):
        assert title in prose(notebook), title
    pictured = [
        place for place, cell in enumerate(code(notebook)) if any("data" in o for o in cell.outputs)
    ]
    assert pictured[0] <= 3, "the first picture stands within the first cells"


def test_badges_and_links_lead_somewhere(pair):
    path, _, notebook = pair
    assert f"]({frame.address(path.with_suffix('.ipynb').name)})" in notebook.cells[0].source
    for target in re.findall(r"\]\(([^)]+)\)", prose(notebook)):
        url = urlparse(target)
        if f"/{build.repository()}/blob/" in url.path:  # in Colab, or a page on GitHub
            assert (ROOT / url.path.split("/blob/main/")[1]).is_file(), target
            colab = f"colab.research.google.com/github/{build.repository()}"
            assert url.path.endswith(".md") or colab in target
        elif url.netloc == "mybinder.org" and url.query:
            assert (ROOT / parse_qs(url.query)["labpath"][0]) == path.with_suffix(".ipynb")
        elif not url.scheme:
            assert (path.parent / url.path).is_file(), target


def test_the_parts_that_all_notebooks_share_are_up_to_date(pair):
    path, source, notebook = pair
    dressed = nbformat.from_dict(json.loads(json.dumps(notebook)))
    frame.dress(dressed, path.stem)
    again = "write them again: python notebooks/frame.py"
    assert [cell.source for cell in notebook.cells] == [c.source for c in dressed.cells], again
    assert notebook.metadata == dressed.metadata, again
    (setup,) = tagged(notebook, "setup")
    assert frame.repository() in setup.source and vader_nb.__version__ in setup.source
    wants_gpu = notebook.metadata.get("accelerator") == "GPU"  # Colab then starts one
    assert wants_gpu == (path.stem == "11_one_gpu")


def test_numbers_and_links_are_those_of_the_series(pair):
    _, _, notebook = pair
    text = prose(notebook)
    for label, target in re.findall(r"\[(\w+) · [^\]]+\]\((\w+)\.ipynb\)", text):
        assert label == frame.number(target)
    twins = set(re.findall(r"\]\((https://[^)]+)\)", text))
    for name in frame.LINK.findall(text):  # from Colab relative links lead nowhere
        assert frame.address(name) in twins, name


def test_chapters_are_counted_in_the_order_of_their_files():
    numbers = [frame.number(path.stem) for path in PAIRS]
    assert numbers[:4] == ["0", "1a", "1b", "2"]
    assert numbers[3:] == [str(i) for i in range(2, len(numbers) - 1)]


def test_a_notebook_belongs_to_a_version(capsys):
    course.environment(stored_with=vader_nb.__version__)
    said = capsys.readouterr().out
    assert said.startswith(f"vader_nb {vader_nb.__version__}, torch ")
    assert "GPU" in said and said.count("\n") == 1
    course.environment(stored_with="0.0.9")
    assert "saved with vader_nb 0.0.9" in capsys.readouterr().out


def test_minutes_are_rounded_up_to_halves():
    for minutes, told in ((0.2, "0.5 minutes"), (0.9, "1 minute"), (1.0, "1 minute"), (1.3, "1.5")):
        head = frame.head("# 0 · Title", "00_quickstart", minutes, 1.0)
        assert f"| about {told} " in head
        assert frame.COST.search(head).groups() == (told.split()[0], "1.0")


def test_seconds_are_those_of_computing_also_in_processes(tmp_path):
    """On a busy machine a notebook waits, and the clock would tell how busy it was."""
    busy = "import time; end = time.process_time() + 1.5\nwhile time.process_time() < end: pass"
    code = [
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])",
        "import time; time.sleep(4)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, code)])
    seconds, megabytes = build.run(notebook, folder=tmp_path)
    assert 1.5 < seconds < 4
    assert megabytes > 20
    assert len(notebook.cells) == 2


def test_the_memory_of_a_notebook_is_that_of_its_processes_too():
    child = "import time; held = b'1' * 200_000_000; time.sleep(1)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", code])
    with build.watched_memory(process.pid) as most:
        process.wait()
    assert 200 < most[0] < 300


def test_it_asks_before_it_shows(pair):
    _, _, notebook = pair
    asked = prose(notebook).count("**Predict.**")
    assert asked >= 2
    # Each question has its cell for an answer, and a comparison that comes after it.
    sources = [cell.source for cell in code(notebook)]
    guesses = [i for i, text in enumerate(sources) if text.startswith("guess = None")]
    answers = [i for i, text in enumerate(sources) if re.search(r"course\.predict\(\s*guess", text)]
    assert len(guesses) == len(answers) == asked
    assert all(guess < answer for guess, answer in zip(guesses, answers))


def test_answers_and_alternatives_stay_in_the_package():
    """A notebook names them by keys, so that neither can be read beside the question; each is used, once."""
    known = course.texts()
    for kind, call in (
        ("answers", r"course\.predict\(\s*guess,\s*"),
        ("alternatives", r"course\.show\(\s*figure,\s*"),
    ):
        used = []
        for chapter in {key[:2] for key in known[kind]}:
            paths = [path for path in PAIRS if path.stem.startswith(chapter)]
            sources = "\n".join(cell.source for path in paths for cell in code(jupytext.read(path)))
            used += re.findall(rf'{call}"([^"]*)"', sources)
            assert len(re.findall(call, sources)) == len(re.findall(rf'{call}"{chapter}-', sources))
        assert sorted(used) == sorted(known[kind])


@pytest.mark.parametrize("drawing", [*course_drawings.DRAWINGS, *course_sketches.DRAWINGS])
def test_a_drawing_is_whole_and_its_texts_stay_inside(drawing):
    source, alternative = re.search(
        r'src="data:image/svg\+xml;base64,(.*?)" alt="(.+?)"', drawing()
    ).groups()
    drawing = ElementTree.fromstring(base64.b64decode(source))
    assert drawing.attrib["aria-label"] == alternative
    _, _, width, height = map(float, drawing.attrib["viewBox"].split())
    for text in drawing.iter("{http://www.w3.org/2000/svg}text"):
        x, y, size = (float(text.attrib[name]) for name in ("x", "y", "font-size"))
        reach = 0.6 * size * len(text.text or "")  # of the sans-serif fonts of browsers
        before = {"start": 0, "middle": reach / 2, "end": reach}[text.attrib["text-anchor"]]
        assert x - before >= 0
        assert x - before + reach <= width, text.text
        assert size <= y <= height


def test_every_exercise_is_open_and_its_check_says_what_is_missing(pair):
    _, _, notebook = pair
    stubs, checks = tagged(notebook, "exercise"), tagged(notebook, "check")
    assert len(stubs) == len(checks) >= 3
    for check in checks:
        assert printed(check).startswith("Not yet: "), check.source
        assert "your code raised" not in printed(check), printed(check)


@pytest.fixture(scope="module", params=ANSWERS)
def chapter(request):
    """A notebook, and the names that its checks need: what the cells tagged "for-checks" make."""
    notebook = jupytext.read(ROOT / "notebooks" / f"{request.param}.py")
    names = {"course": course}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VADER_NB_FAST", "1")
        for cell in code(notebook):
            if any(build.tagged(cell, tag) for tag in ("parameters", "for-checks")):
                exec(cell.source, names)
        yield notebook, names, ANSWERS[request.param]


def test_a_check_accepts_what_is_right_and_refuses_what_is_known_to_be_wrong(chapter, capsys):
    notebook, names, answers = chapter
    checks = {
        cell.source.split(", ")[-1].strip(" )\n"): cell.source for cell in tagged(notebook, "check")
    }
    assert checks.keys() == answers.keys()

    def said_of(answer, check):
        exec(answer, names)
        exec(check, names)
        return capsys.readouterr().out

    for name, (right, wrong) in answers.items():
        assert len(right) >= 2, "one right answer shows nothing"
        for answer in right:
            assert said_of(answer, checks[name]) == "Right.\n", answer
        for answer, reason in wrong.items():
            said = said_of(answer, checks[name])
            assert said.startswith("Not yet: "), answer
            assert reason in said, (said, answer)


# ------------------------------------------------------------------- the solved copies, where Colab would run them


@pytest.fixture(scope="session")
def colab():
    """The folder of an environment like Colab's: its old ipywidgets, ipykernel and IPython, and its `google.colab`."""
    requirements = (ROOT / "tests" / "colab.txt").read_text()
    return environments.cached("colab", requirements, imported="google.colab")


def test_the_environment_is_like_colabs(colab, from_wheel, tmp_path):
    probe = (
        "import sys; assert 'google.colab' in sys.modules; import IPython, ipykernel, ipywidgets, vader_nb; "
        "print(IPython.__version__, ipykernel.__version__, ipywidgets.__version__, vader_nb.__file__)"
    )
    versions = subprocess.run(
        [colab / "bin" / "python", "-c", probe],
        cwd=tmp_path,
        env=from_wheel,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert versions.startswith("7.34.0 6.17.1 7.7.1 ")
    assert str(ROOT) not in versions.split()[-1]


def test_every_cell_runs_and_every_exercise_is_solved(pair, colab, from_wheel, tmp_path):
    """nbval runs the solved copy, from the wheel, in an empty folder, with Colab's versions and the fast setting; it
    compares what the checks and the tagged cells print."""
    path, _, stored = pair
    notebook = build.solved(stored)
    for check in tagged(notebook, "check"):
        check.metadata["tags"].append("nbval-check-output")
        check.outputs = [nbformat.v4.new_output("stream", name="stdout", text="Right.\n")]
    copy = tmp_path / f"{path.stem}.ipynb"
    nbformat.write(notebook, copy)
    options = ["--nbval-lax", "--nbval-kernel-name", "colab", "--nbval-cell-timeout", "300"]
    plain = ["-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, "--rootdir", tmp_path]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--color=no", *plain, *options, copy],
        cwd=tmp_path,
        env=from_wheel | {"JUPYTER_PATH": str(colab / "share" / "jupyter"), "VADER_NB_FAST": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(code(notebook))} passed" in result.stdout


def test_the_chapter_on_one_gpu_runs_with_its_other_model(monkeypatch, capsys):
    monkeypatch.setenv("VADER_NB_FAST", "1")
    names = {"course": course}
    for cell in code(jupytext.read(ROOT / "notebooks" / "11_one_gpu.py")):
        if not build.tagged(cell, "setup"):
            exec(cell.source.replace('MODEL = "modelscope"', 'MODEL = "wan"'), names)
    assert "chosen: wan; run here: tiny-wan" in capsys.readouterr().out


def test_colab_lacks_no_more_than_the_setup_cell_installs():
    """Colab's packages (with torch and torchvision, which it has) and the setup cell's are all that we depend on."""
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'"([\w-]+)', project.split("dependencies = [")[1].split("]")[0])
    there = re.findall(r"^([\w-]+)==", (ROOT / "tests" / "colab.txt").read_text(), re.MULTILINE)
    setup = frame.SETUP
    installed = re.search(r"%pip install -q ((?:\w+ ?)+)$", setup, re.MULTILINE)[1].split()
    assert set(wanted) - set(there) - {"torch", "torchvision"} == set(installed)


# ------------------------------------------------------------------------------------- the repository's name


def test_the_repository_is_renamed_everywhere_and_nothing_is_stale(tmp_path):
    old = build.repository()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    changed = build.rename_repository("Some-One/vader.nb", tmp_path)
    assert build.repository(tmp_path) == "Some-One/vader.nb"
    assert {path.name for path in PAIRS} <= {path.name for path in changed}
    for path in [*tmp_path.glob("*.*"), *(tmp_path / "notebooks").glob("*.*")]:
        if path.is_file():
            assert f"/{old}" not in path.read_text(), path
    for path in PAIRS:
        copy = tmp_path / "notebooks" / path.name
        setup = tagged(jupytext.read(copy), "setup")[0]
        assert "git+https://github.com/Some-One/vader.nb" in setup.source
        assert is_current(copy) == is_current(path)
    assert {path.name for path in build.rename_repository(old, tmp_path)} == {
        path.name for path in changed
    }
    for path in changed:
        assert path.read_bytes() == (ROOT / path.relative_to(tmp_path)).read_bytes(), path


@pytest.mark.parametrize("name", ["owner", "https://github.com/owner/name", "owner/name/more", ""])
def test_what_is_no_repository_is_refused_and_nothing_changes(name, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with pytest.raises(ValueError, match="owner/name"):
        build.rename_repository(name, tmp_path)
    assert build.repository(tmp_path) == build.repository()


# --------------------------------------------------------------------------------------- other environments


def test_conda_and_binder_install_what_pyproject_says():
    import yaml

    project = (ROOT / "pyproject.toml").read_text()
    lists = [
        yaml.safe_load((ROOT / path).read_text())
        for path in ("environment.yml", "binder/environment.yml")
    ]
    for listed in lists:
        plain = [entry for entry in listed["dependencies"] if isinstance(entry, str)]
        # conda brings Python and what is no Python package; the rest comes from pyproject, by pip.
        assert {entry.split("=")[0] for entry in plain} <= {
            "python",
            "pip",
            "ffmpeg",
            "pytorch-cpu",
            "torchvision",
        }
        (python,) = [entry.split("=")[1] for entry in plain if entry.startswith("python=")]
        lowest = re.search(r'requires-python = ">=([\d.]+)"', project)[1]
        assert tuple(map(int, python.split("."))) >= tuple(map(int, lowest.split(".")))
    assert lists[0]["dependencies"][-1] == {"pip": ["-e .[notebook]"]}
    post_build = (ROOT / "binder" / "postBuild").read_text().splitlines()
    assert "set -e" in post_build
    assert any("'.[notebook]'" in line for line in post_build)
    (executed,) = [line.split()[-1] for line in post_build if line.startswith("jupyter execute")]
    assert (ROOT / executed).is_file()


def test_every_control_has_a_picture_for_readers_without_a_kernel():
    from vader_nb import widgets

    notebook = nbformat.read(ROOT / "notebooks" / "09_playground.ipynb", as_version=4)
    shown = {}
    for output in (output for cell in code(notebook) for output in cell.outputs):
        name = output.get("data", {}).get("text/plain", "").split(":")[0]
        if name in widgets.__all__:
            assert build.WIDGET not in output.data
            shown[name] = output.data["text/html"]  # of two, the later
    assert sorted(shown) == widgets.__all__
    for name, page in shown.items():
        assert re.search(r'<img[^>]*alt="[^"]|<(svg|table)[^>]*aria-label=.[^"\']', page), name


def test_the_page_of_controls_is_the_playground(tmp_path):
    build.app(tmp_path / "app.ipynb")
    (cell,) = nbformat.read(tmp_path / "app.ipynb", as_version=4).cells
    assert "Playground(" in cell.source


def test_some_texts_are_compared_by_nbval():
    """Not only run: cells whose text is the same everywhere are tagged, and were executed (or nbval compares nothing)."""
    notebooks = [nbformat.read(path.with_suffix(".ipynb"), as_version=4) for path in PAIRS]
    compared = [cell for notebook in notebooks for cell in tagged(notebook, "nbval-check-output")]
    assert len(compared) >= 3
    assert all(cell.execution_count and printed(cell) for cell in compared)
