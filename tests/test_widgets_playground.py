"""The page of all panels, and the page about each of them."""

import re
from pathlib import Path

import pytest
from transformers.utils import logging

from vader_nb import load, rewards, widgets
from vader_nb.widgets import Sampler, playground
from vader_nb.widgets.playground import TABS, Playground

PAGES = Path(__file__).parent.parent / "notebooks"
PANELS = {page.stem.removeprefix("panel_"): page for page in sorted(PAGES.glob("panel_*.md"))}


@pytest.fixture
def quick(tiny, monkeypatch):
    """The model "tiny", in two steps, and what was asked for by other names."""
    loaded = []
    monkeypatch.setattr(playground, "load", lambda name: loaded.append(name) or tiny)
    monkeypatch.setitem(tiny.defaults, "num_inference_steps", 2)
    return loaded


def test_a_panel_is_made_when_its_tab_is_opened(quick, tmp_path):
    page = Playground(run=tmp_path / "run")
    assert not quick
    page.bundles()
    ((key, panel),) = page.panels.items()
    assert key == ("Sample", "tiny") and isinstance(panel, Sampler)
    assert page.place.children == (panel.box,)
    assert "What does an adapter do" in page.question.value
    assert "<img" in page.to_html()
    assert type(page.open("Truncate")).__name__ == "TruncationExplorer"
    assert page.open("Sample") is panel
    assert page.place.children == (panel.box,)
    assert quick == ["tiny"]
    other = page.open("Sample", "tiny-i2v")
    assert other is not panel and quick == ["tiny", "tiny-i2v"]
    monitor = page.open("Watch a run")
    assert monitor.folder == tmp_path / "run"
    assert page.model.layout.display == "none"
    with pytest.raises(ValueError, match="tab must be one of Sample, .*; got 'Sampel'"):
        page.open("Sampel")


def test_every_panel_has_a_tab(quick, tmp_path):
    page = Playground(run=tmp_path / "run")
    made = {type(page._make(tab, "tiny")).__name__ for tab in TABS}
    assert made == set(widgets.__all__)


def test_two_pages_share_no_files(quick):
    first, second = Playground(), Playground()
    assert first.open("Sample").folder != second.open("Sample").folder
    assert first.open("Compare").folder != second.open("Compare").folder


def test_a_panel_that_cannot_be_made_says_why(monkeypatch):
    def missing(name):
        raise FileNotFoundError(f"no weights of {name}")

    monkeypatch.setattr(playground, "load", missing)
    page = Playground()
    widget, still = page.bundles()
    assert "no weights of tiny" in page.remark.value
    assert "no weights of tiny" in still["text/html"]


def test_no_progress_bar_of_what_loads_in_a_moment(capfd):
    logging.enable_progress_bar()
    load("tiny", check=False)
    rewards.action("tiny")
    assert "Loading weights" not in "".join(capfd.readouterr())
    assert logging.is_progress_bar_enabled()


# ------------------------------------------------------------------------------------------------------- the pages


def test_every_panel_has_a_page():
    titles = {page.read_text().splitlines()[0].split(":")[0] for page in PANELS.values()}
    assert titles == {f"# {getattr(widgets, name).title}" for name in widgets.__all__}


@pytest.mark.parametrize("name", PANELS)
def test_its_code_runs_and_its_picture_is_there(name, tmp_path, monkeypatch):
    text = PANELS[name].read_text()
    ((alt, picture),) = re.findall(r"!\[(.+?)\]\((.+?)\)", text)
    assert len(alt) > 40 and (PAGES / picture).is_file()
    monkeypatch.chdir(tmp_path)
    blocks, names = re.findall(r"```python\n(.*?)```", text, re.DOTALL), {}
    assert len(blocks) == 2 and "from vader_nb.widgets import" in blocks[0]
    for block in blocks:
        exec(block, names)
