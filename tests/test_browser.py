"""The playground in a real browser: pressed, typed into and looked at.

One JupyterLab server, one Voila server and one browser serve all tests of a session; a second
JupyterLab has ipywidgets 7, with the page's part of it. Needs Debian's chromium (`make test` installs
it where it can).
"""

import json
import re
import sys
from pathlib import Path

import pytest

from vader_nb import zoo
from vader_nb.race_results import LINES
from vader_nb.widgets.playground import TABS

from . import browser
from .browser import expect
from .test_race import CURVES, made_up

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))
import build  # noqa: E402

EVIL = "a <script>document.title = 'hacked'</script> star"

SAMPLER = """
import vader_nb
from vader_nb.widgets import Sampler, TrainingMonitor
model = vader_nb.load("tiny")
model.defaults["num_inference_steps"] = 4
sampler = Sampler(model, folder="saved")
sampler
"""
COMPARISON = """
import shutil
from pathlib import Path
import vader_nb
from vader_nb import BestOf, Sampling, prompts, rewards, zoo
from vader_nb.widgets import RewardComparison
model = vader_nb.load("tiny")
shown = prompts.get("tiny_held_out")[:3]
mine = Path("mine")
for step in (10, 20):
    checkpoint = mine / "checkpoints" / f"step-{step:06d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    shutil.copy(zoo.adapters()["aesthetic"], checkpoint / "adapter.safetensors")
contestants = {"hps": zoo.adapters()["hps"], "mine": mine, "best of 2": BestOf(2, rewards.hps("tiny"))}
RewardComparison(model, contestants, prompts=shown, sampling=Sampling(num_inference_steps=3), folder="votes")
"""
MONITOR = """
from vader_nb import Sampling, align, prompts, rewards
quick = Sampling(num_inference_steps=2)
monitor = TrainingMonitor("run", model, held_out=rewards.hps("tiny"), prompts=prompts.get("tiny_held_out")[:2], sampling=quick, every=2)
monitor
"""
TRAIN = """
run = align(model, rewards.aesthetic("tiny"), prompts.get("tiny"), steps=500, batch_size=1, sampling=quick,
            output_dir=monitor.folder, **monitor.hooks)
run.adapter.remove()
print("stopped" if run.stopped else "not stopped", "after", len(run.metrics))
"""
AGAIN = """
from vader_nb.widgets import TrainingMonitor
TrainingMonitor("run")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def address(folder):
    with browser.lab(folder) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as chromium:
        yield chromium


@pytest.fixture
def page(chromium):
    with browser.window(chromium) as page:
        yield page


@pytest.fixture(scope="module")
def sampled(address, folder, chromium):
    """A page with a sampler that has its first clip."""
    browser.notebook(folder / "sampler.ipynb", SAMPLER)
    with browser.window(chromium) as page:
        browser.open_notebook(page, address, "sampler.ipynb")
        browser.run_all(page)
        page.locator(".vader img.vader-frame").first.wait_for()
        yield page


def wait_until(true, page):
    for _ in range(browser.SECONDS * 10):
        if true():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it did not come about")


def caption(page):
    return page.locator(".widget-html-content:has(b)").first


def test_one_types_a_prompt(sampled):
    box = sampled.get_by_label("prompt", exact=True)
    box.fill("a red circle moving up on a sand background")
    box.press("Enter")
    expect(caption(sampled)).to_contain_text("a red circle moving up on a sand background")
    expect(sampled.get_by_role("button", name="back to this")).to_have_count(2)


def test_a_prompt_is_a_text_whatever_it_says(sampled):
    box = sampled.get_by_label("prompt", exact=True)
    box.fill(EVIL)
    box.press("Enter")
    expect(caption(sampled)).to_contain_text(EVIL)
    assert "hacked" not in sampled.title()


def test_a_slider_is_moved_by_keyboard(sampled):
    handle = sampled.locator(".widget-slider", has_text=re.compile("^scale")).locator(
        ".noUi-handle"
    )
    handle.focus()
    handle.press("ArrowLeft")
    handle.press("ArrowLeft")
    expect(caption(sampled)).to_contain_text("0.9 × ")


def test_the_scrubber_shows_one_frame_without_the_kernel(sampled):
    handle = sampled.locator(".widget-slider", has_text=re.compile("^frame")).locator(
        ".noUi-handle"
    )
    handle.focus()
    for _ in range(3):
        handle.press("ArrowRight")
    expect(sampled.locator(".vader-frames img[alt$='frame 3']")).to_be_visible()
    expect(sampled.locator(".vader-frames img[alt$='frame 2']")).to_be_hidden()
    for _ in range(3):
        handle.press("ArrowLeft")


def test_an_error_says_what_to_do(sampled):
    box = sampled.get_by_label("prompt", exact=True)
    before = box.input_value()
    box.fill("  ")
    box.press("Enter")
    expect(sampled.locator(".vader [role=alert]")).to_contain_text("type what the clip should show")
    box.fill(before)
    box.press("Enter")
    expect(sampled.locator(".vader [role=alert]")).to_have_count(0)


def test_one_goes_back_to_an_older_clip(sampled):
    shown = sampled.get_by_role("button", name="back to this")
    prompt, how = shown.nth(2).locator("xpath=following-sibling::*").inner_text().split(" · ", 1)
    shown.nth(2).click()
    expect(caption(sampled)).to_contain_text(prompt)
    expect(caption(sampled)).to_contain_text(how)


def test_a_clip_is_saved(sampled, folder):
    sampled.get_by_label("save as").select_option(".gif")
    sampled.get_by_role("button", name=re.compile("save$")).click()
    expect(sampled.get_by_role("link", name="download")).to_be_visible()
    assert (folder / "saved" / "clip-001.gif").stat().st_size > 1000


def test_controls_that_cannot_act_are_disabled(sampled):
    sampled.get_by_label("adapter", exact=True).select_option("none (base model)")
    expect(
        sampled.get_by_text("Without an adapter there is nothing to scale or to mix.")
    ).to_be_visible()
    expect(sampled.get_by_label("mixed with")).to_be_disabled()


def test_a_run_is_watched_stopped_and_found_again_after_a_restart(address, folder, page):
    browser.notebook(folder / "training.ipynb", SAMPLER, MONITOR, TRAIN, AGAIN)
    browser.open_notebook(page, address, "training.ipynb")
    browser.run_all(page)
    state = page.locator(".vader", has_text="Training monitor").first
    expect(state).to_contain_text("running")
    expect(state).to_contain_text("press ■ in the toolbar")
    expect(state.locator("img[alt^='clips of step']").first).to_be_visible()
    page.get_by_role("button", name="Interrupt the kernel").click()
    expect(
        page.locator(".jp-OutputArea-output", has_text=re.compile("^stopped after"))
    ).to_be_visible()
    expect(page.locator(".vader", has_text="Training monitor").last).to_contain_text("stopped")
    rows = [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert (folder / "run" / "adapter.safetensors").is_file()

    browser.menu(page, "Kernel", "^Restart Kernel and Clear Outputs of All Cells")
    page.locator(".jp-Dialog .jp-mod-accept").click()
    page.locator(".vader").first.wait_for(state="detached")
    page.locator(".jp-CodeCell .cm-content").last.click()
    page.keyboard.press("Shift+Enter")
    again = page.locator(".vader", has_text="Training monitor").first
    expect(again).to_contain_text(f"stopped · step {rows[-1]['step']} of 500")
    expect(again.locator("svg[aria-label^='trained reward']")).to_be_visible()


def test_a_run_is_stopped_from_another_notebook(address, folder, page, chromium):
    (folder / "run").rename(folder / "first")
    browser.notebook(folder / "training.ipynb", SAMPLER, MONITOR, TRAIN)
    browser.notebook(folder / "watching.ipynb", AGAIN)
    browser.open_notebook(page, address, "training.ipynb")
    browser.run_all(page)
    expect(page.locator(".vader", has_text="Training monitor").first).to_contain_text("running")
    with browser.window(chromium) as other:
        browser.open_notebook(other, address, "watching.ipynb")
        browser.run_all(other)
        other.get_by_role("button", name="stop and keep").click()
        expect(other.locator(".vader")).to_contain_text("stopped")
    expect(
        page.locator(".jp-OutputArea-output", has_text=re.compile("^stopped after"))
    ).to_be_visible()


@pytest.fixture(scope="module")
def compared(address, folder, chromium):
    """A page with a comparison that has its first clips."""
    browser.notebook(folder / "comparison.ipynb", COMPARISON)
    with browser.window(chromium) as page:
        browser.open_notebook(page, address, "comparison.ipynb")
        browser.run_all(page)
        page.locator(".vader img.vader-frame").first.wait_for()
        yield page


def test_one_compares(compared):
    panel = compared.locator(".vader")
    expect(panel).to_contain_text(re.compile(r"base.*hps.*mine.*best of 2", re.DOTALL))
    handle = panel.locator(".widget-slider", has_text=re.compile("^frame")).locator(".noUi-handle")
    handle.focus()
    handle.press("ArrowRight")
    handle.press("ArrowRight")
    expect(
        panel.get_by_text("hps at frame 2")
    ).to_be_visible()  # the curve's marker goes with the frame
    panel.get_by_label("gradient heat map").check()
    expect(panel.get_by_text("Heat map:").locator("visible=true")).to_have_count(1)
    panel.get_by_label("gradient heat map").uncheck()
    panel.get_by_role("button", name="compare all prompts").click()
    expect(panel.get_by_label("sort prompts")).to_be_enabled()
    panel.get_by_label("sort prompts").select_option("hurts most first")
    expect(panel.get_by_label("prompt", exact=True).locator("option").first).to_contain_text("·")
    handle.press("Home")


def test_one_sees_an_adapter_at_several_scales_and_a_run_along_its_checkpoints(compared):
    panel = compared.locator(".vader")
    panel.get_by_label("show", exact=True).select_option("scales of hps")
    expect(panel.get_by_text("1.5 × hps").locator("visible=true")).to_have_count(3)  # prompts
    expect(panel.locator("svg[aria-label^='hps by scale, mean of these 3']:visible")).to_have_count(
        1
    )
    expect(panel.locator("td:visible", has_text="…")).to_have_count(0)
    step = panel.locator(".widget-slider", has_text=re.compile("^step"))
    expect(step).to_be_hidden()
    panel.get_by_label("show", exact=True).select_option("checkpoints by step")
    expect(step).to_be_visible()
    expect(panel.locator("th:visible", has_text="mine, step 20")).to_be_visible()
    for key, shown in (("ArrowLeft", "mine, step 10"), ("ArrowRight", "mine, step 20")):
        step.locator(".noUi-handle").press(key)
        expect(panel.locator("th:visible", has_text=shown)).to_be_visible()
        expect(panel.locator("td:visible", has_text="…")).to_have_count(0)
    panel.get_by_label("show", exact=True).select_option("contestants")


def test_one_votes_by_name_on_any_two(compared, folder):
    page, panel = compared, compared.locator(".vader")
    panel.get_by_label("compare", exact=True).select_option("mine")
    panel.get_by_label("with", exact=True).select_option("best of 2")
    panel.get_by_role("button", name="blind vote: mine or best of 2?").click()
    name = panel.get_by_label("your name")
    name.fill("ann")
    name.press("Enter")
    votes = folder / "votes" / "votes-ann.jsonl"
    for number in (1, 2):
        button = panel.get_by_role("button", name="A is better")
        expect(button).to_be_enabled()
        for hidden in ("mine", "best of 2", "hps"):
            expect(panel.get_by_text(hidden).locator("visible=true")).to_have_count(0)
        button.click()
        wait_until(
            lambda number=number: (
                len(votes.read_text().splitlines() if votes.exists() else []) == number
            ),
            page,
        )
    panel.get_by_role("button", name="show tally").click()
    expect(panel).to_contain_text("Win rate")
    expect(panel).to_contain_text("agrees with the votes")
    expect(panel).to_contain_text("voters: ann")
    panel.get_by_role("button", name="leave the blind vote").click()


def test_the_export_plays_without_a_server(compared, folder, chromium):
    panel = compared.locator(".vader")
    panel.get_by_role("button", name="export as HTML").click()
    expect(panel.get_by_role("link")).to_be_visible()
    for width in (1280, 400):
        with browser.window(chromium, width) as page:
            page.context.set_offline(True)
            page.goto((folder / "votes" / "comparison.html").as_uri())
            expect(page.locator("h1")).to_have_text("Base against hps, mine, best of 2")
            clips = page.locator("section img")
            assert clips.count() >= 3 + 3 + 1  # contestants, scales, checkpoints
            for clip in clips.all():
                clip.scroll_into_view_if_needed()
                assert clip.evaluate("e => e.decode().then(() => e.naturalWidth)") >= 64
            before, after = (page_after(clips.first, wait) for wait in (0, 1100))
            assert before != after  # it moves
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            expect(page.get_by_text("voters: ann")).to_be_visible()


def page_after(clip, milliseconds):
    clip.page.wait_for_timeout(milliseconds)
    return clip.screenshot()


SCROLLING = """panel => [panel, ...panel.querySelectorAll('*')].filter(e => e.clientWidth
    && /auto|scroll/.test(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth + 1
    && !e.classList.contains('vader-scroll')).map(e => e.className)"""


def handles(panel):
    return panel.locator(".noUi-handle:visible").all()


@pytest.fixture(scope="module")
def app(folder):
    """The playground as `make app` serves it."""
    target = folder / "app" / "playground.ipynb"
    build.app(target)
    with browser.voila(target) as address:
        yield address


@pytest.fixture(scope="module")
def visited(app, chromium):
    """The playground's page, opened once; tests go on where the one before left it."""
    with browser.window(chromium) as page:
        page.goto(app)
        page.locator(".vader img.vader-frame").first.wait_for()
        yield page


def panel_of(page, title):
    return page.locator(".vader", has=page.locator(".vader-title", has_text=title)).last


def tab(page, name):
    page.get_by_role("button", name=name, exact=True).press("Enter")  # by keyboard alone
    expect(page.get_by_text(TABS[name])).to_be_visible()
    page.wait_for_timeout(300)  # until the panel of the tab before is gone
    expect(page.locator(".vader-title")).to_have_count(2)


def test_the_playground_is_a_page_of_its_own(visited):
    page = visited
    assert page.title() == "vader_nb playground"
    expect(page.locator(".vader-title")).to_have_text(
        ["Video models that learn from rewards", "Sampler"]
    )
    expect(page.get_by_text("the same noise with an adapter")).to_be_visible()
    box = page.get_by_label("prompt", exact=True)
    box.fill("a cat")
    box.press("Enter")
    expect(page.locator(".vader-remark")).to_contain_text("knows none of these words")
    box.fill("a red circle moving up on a sand background")
    box.press("Enter")
    expect(page.locator(".vader-remark")).to_have_count(0)
    expect(caption(panel_of(page, "Sampler"))).to_contain_text("a red circle moving up")
    assert not page.locator(".vader [role=alert]").count()
    assert not page.get_by_text("Loading weights").count()
    assert not page.locator("[data-mime-type='application/vnd.jupyter.error']").count()


def test_an_error_and_the_progress_stand_directly_under_the_hint(visited):
    panel = panel_of(visited, "Sampler")
    box = panel.get_by_label("prompt", exact=True)
    before = box.input_value()
    box.fill(" ")
    box.press("Enter")
    alert = panel.locator("[role=alert]")
    expect(alert).to_be_visible()
    top = panel.locator(".vader-title").bounding_box()["y"]
    assert top < alert.bounding_box()["y"] < top + 90 < box.bounding_box()["y"] + 60
    assert panel.locator(".widget-hprogress").bounding_box()["y"] < top + 70
    box.fill(before)
    box.press("Enter")
    expect(alert).to_have_count(0)


def test_more_settings_are_reached_by_keyboard(visited):
    panel = panel_of(visited, "Sampler")
    mixing = panel.get_by_label("mixed with")
    expect(mixing).to_be_hidden()
    panel.get_by_role("button", name="more settings").press("Enter")
    expect(mixing).to_be_visible()
    negative = panel.get_by_label("negative", exact=True)
    negative.fill("a sand background")
    negative.press("Enter")
    expect(caption(panel)).to_contain_text("not “a sand background”")
    named = [handle.get_attribute("aria-label") for handle in handles(panel)]
    assert named[:4] == ["frame", "steps", "guidance", "scale"]
    assert all(named) and named.count("adapter acts") == 2
    end = panel.locator(".vader-range")
    handle, readout = end.locator(".noUi-handle").last, end.locator(".widget-readout")
    right = handle.bounding_box()
    assert right["x"] + right["width"] <= readout.bounding_box()["x"] + 1
    assert readout.evaluate("e => e.scrollWidth <= e.clientWidth")


def test_a_clip_starts_from_an_uploaded_image_and_goes_on_in_segments(visited):
    page = visited
    page.get_by_label("model", exact=True).select_option("tiny-i2v")
    upload = page.get_by_role("button", name=re.compile("start from an image"))
    expect(upload).to_be_visible()
    panel = panel_of(page, "Sampler")
    panel.locator("img.vader-frame").first.wait_for()
    with page.expect_file_chooser() as chooser:
        upload.press("Enter")
    chooser.value.set_files(ROOT / "notebooks" / "images" / "panel_sampler.png")
    expect(caption(panel)).to_contain_text("from your image")
    expect(panel.get_by_alt_text("the image that the clip starts from")).to_be_visible()
    panel.get_by_role("button", name="from the last frame").press("Enter")
    expect(panel.get_by_role("button", name="back to this")).to_have_count(3)
    panel.get_by_role("button", name="no image").press("Enter")
    expect(caption(panel)).not_to_contain_text("from your image")
    panel.get_by_role("button", name="more settings").press("Enter")
    handle = panel.locator(".widget-slider", has_text=re.compile("^segments")).locator(
        ".noUi-handle"
    )
    expect(handle).to_be_visible()  # the kernel opens the fold; a key before that is nobody's
    handle.press("ArrowRight")
    expect(panel.get_by_text("segment 2, to frame 15").locator("visible=true")).to_be_visible()
    handle = panel.locator(".widget-slider", has_text=re.compile("^frame")).locator(".noUi-handle")
    handle.press("PageUp")
    expect(panel.locator(".vader-segments b:visible")).to_have_count(1)


def test_its_studies_answer(visited):
    """Weights re-sort the clips at once; a measurement has its row; a simulation its verdict; a mistake its remedy."""
    page = visited
    page.get_by_label("model", exact=True).select_option("tiny")
    tab(page, "Compose")
    composer = panel_of(page, "Reward composer")
    composer.locator("img.vader-frame").first.wait_for()
    handle = composer.locator(".widget-slider", has_text=re.compile("^hps")).locator(".noUi-handle")
    handle.press("ArrowRight")
    expect(composer.locator(".vader-code")).to_contain_text("1.05 * hps.normalized(")
    assert not re.search(r"[-−]0\.00(?!\d)", composer.inner_text())

    tab(page, "Truncate")
    explorer = panel_of(page, "Truncation")
    explorer.get_by_role("button", name="measure").press("Enter")
    expect(explorer).to_contain_text(re.compile(r"\d MB"))

    tab(page, "Plan memory")
    planner = panel_of(page, "Memory planner")
    reward = planner.get_by_label("reward", exact=True)
    reward.fill("hsp")
    reward.press("Enter")
    expect(planner.get_by_role("button", name="simulate")).to_be_disabled()
    expect(planner.locator("[role=alert]")).to_contain_text("hps")


def test_a_race_is_looked_at_while_it_runs(visited, folder):
    """A dot is clicked and its clips play; the axis is chosen by keyboard; a new evaluation appears by itself."""
    page, race = visited, folder / "race"
    tab(page, "Compare runs")
    viewer = panel_of(page, "Run viewer")
    expect(viewer).to_contain_text("waiting for an evaluation")
    made_up(race, {key: CURVES[key] for key in list(CURVES)[:2]})
    job = race / "1"
    (job / "config.json").write_text(json.dumps({"sampling": {"num_inference_steps": 2}}))
    (job / "adapter.safetensors").write_bytes(zoo.adapters()["hps"].read_bytes())
    (job / "metrics.jsonl").write_text("")
    (job / "adapter.safetensors").touch()
    expect(viewer).to_contain_text("learning rate 0.001, 1 seed")
    dots = viewer.locator("svg[aria-label^='reward against motion'] .vader-point")
    expect(dots).to_have_count(3)
    dots.nth(0).click()
    menu = viewer.get_by_label("clips of", exact=True)
    expect(menu).to_have_value("A · evaluation 1")
    expect(viewer).to_contain_text("its adapter was not kept")
    dots.nth(1).click()
    expect(viewer.locator("img[alt^='clips of A · evaluation 2']").first).to_be_visible()
    menu.select_option("base")
    expect(viewer.locator("img[alt^='clips of base']").first).to_be_visible()
    viewer.get_by_label("metric", exact=True).select_option("held-out reward")
    viewer.get_by_label("x axis", exact=True).select_option("seconds")
    expect(viewer.locator("svg[aria-label^='held-out reward over seconds']")).to_be_visible()
    lines = (job / LINES).read_text()
    new = lines.splitlines()[-1].replace('"part": 2', '"part": 3')
    (job / LINES).write_text(f"{lines}{new}\n")
    expect(menu.locator("option")).to_have_count(4)
    expect(menu).to_have_value("base")
    assert not viewer.locator("[role=alert]").count()


@pytest.mark.parametrize("width", [1280, 400])
def test_the_playground_fits_its_page(visited, width):
    """No panel wider than the page, nothing that scrolls sideways but tables, every slider named; a clip is in sight."""
    page = visited
    page.set_viewport_size({"width": width, "height": 800})
    for name in TABS:
        tab(page, name)
        panel = page.locator(".vader").last
        expect(panel).to_be_visible()
        page.wait_for_timeout(300)
        wide, seen = panel.evaluate("e => [e.scrollWidth, e.clientWidth]")
        assert wide <= seen + 1, f"{name} is {wide} pixels wide, of which {seen} are seen"
        assert min(300, width) < seen <= 1000
        assert panel.evaluate(SCROLLING) == [], name
        assert all(handle.get_attribute("aria-label") for handle in handles(panel)), name
    tab(page, "Sample")
    panel = panel_of(page, "Sampler")
    image = panel.locator("img.vader-frame:visible").first
    steps = panel.locator(".widget-slider", has_text=re.compile("^steps"))

    def clip_in_sight() -> bool:
        clip, slider = image.bounding_box(), steps.bounding_box()
        above = width > 1000 or clip["y"] < slider["y"]
        return above and clip["y"] + clip["height"] < 800 - 50

    wait_until(clip_in_sight, page)  # the page may still be settling


def test_two_visitors_do_not_see_each_other_s_clips(app, visited, chromium):
    tab(visited, "Sample")
    with browser.window(chromium) as other:
        other.goto(app)
        other.locator(".vader img.vader-frame").first.wait_for()
        mine, its = (panel_of(page, "Sampler") for page in (visited, other))
        box = its.get_by_label("prompt", exact=True)
        box.fill("a purple star spinning on a black background")
        box.press("Enter")
        expect(caption(its)).to_contain_text("a purple star")
        links = []
        for panel in (its, mine):
            panel.get_by_role("button", name=re.compile("save$")).click()
            expect(panel.get_by_role("link", name="download")).to_be_visible()
            links.append(panel.get_by_text("saved as").inner_text())
        assert "a purple star" not in mine.inner_text()
        assert all("clip-001" in link for link in links)  # in folders of their own
        assert links[0] != links[1]


def test_after_a_restart_a_panel_says_so_and_after_a_reload_its_picture_is_there(
    address, folder, page
):
    browser.notebook(folder / "restart.ipynb", SAMPLER)
    browser.open_notebook(page, address, "restart.ipynb")
    browser.run_all(page)
    panel = page.locator(".vader")
    panel.locator("img.vader-frame").first.wait_for()
    still = page.locator(".vader-still")
    expect(still).to_be_hidden()
    before = "e => getComputedStyle(e, '::before').content"
    assert panel.evaluate(before) == "none"
    browser.menu(page, "Kernel", r"^Restart Kernel…$")
    page.locator(".jp-Dialog .jp-mod-accept").click()
    wait_until(lambda: "run this cell again" in panel.evaluate(before), page)
    inside = panel.locator(".jupyter-widgets-disconnected")
    assert inside.count() > 10
    assert {e.evaluate(before) for e in inside.all()} == {"none"}  # no broken link on each control
    expect(still).to_be_hidden()

    page.locator(".jp-Notebook").click(position={"x": 5, "y": 5})
    page.keyboard.press("Control+s")
    wait_until(lambda: "vader-still" in (folder / "restart.ipynb").read_text(), page)
    # Not page.reload(), which brings back the notebooks of earlier tests, too.
    browser.open_notebook(page, address, "restart.ipynb")
    expect(still).to_be_visible()
    expect(still).to_contain_text("Run this cell again")
    expect(still.get_by_alt_text("a blue square shrinking on a gray background")).to_be_visible()
    assert still.locator("img").bounding_box()["width"] > 300  # enlarged without the panel's style
    expect(page.get_by_text("Error displaying widget")).to_be_hidden()
    browser.run_all(page)
    page.locator(".vader img.vader-frame").first.wait_for()
    expect(still).to_be_hidden()


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """A JupyterLab whose kernel and page have ipywidgets 7.7."""
    place = tmp_path_factory.mktemp("seven")
    python = browser.environment(
        place / "venv", "ipywidgets==7.7.5", "jupyterlab_widgets==1.1.11", "ipython_genutils"
    )
    lab_files = Path(sys.prefix) / "share" / "jupyter" / "lab"
    with browser.lab(place, python, f"--app-dir={lab_files}") as address:
        yield place, address


def test_ipywidgets_7_does_the_same(seven, page):
    folder, address = seven
    browser.notebook(
        folder / "sampler.ipynb",
        "import ipywidgets; print(ipywidgets.__version__)",
        SAMPLER,
        COMPARISON,
    )
    browser.open_notebook(page, address, "sampler.ipynb")
    browser.run_all(page)
    expect(page.locator(".jp-OutputArea-output", has_text="7.7.5")).to_be_visible()
    sampler = panel_of(page, "Sampler")
    sampler.locator("img.vader-frame").first.wait_for()
    box = sampler.get_by_label("prompt", exact=True)
    box.fill(EVIL)
    box.press("Enter")
    expect(caption(page)).to_contain_text(EVIL)
    handle = sampler.locator(".widget-slider", has_text=re.compile("^frame")).locator(
        ".ui-slider-handle, .noUi-handle"
    )
    handle.focus()
    handle.press("ArrowRight")
    expect(sampler.locator(".vader-frames img[alt$='frame 1']")).to_be_visible()
    expect(sampler.locator(".vader-frames img[alt$='frame 2']")).to_be_hidden()
    named = sampler.locator(".ui-slider-handle:visible, .noUi-handle:visible").all()
    assert [h.get_attribute("aria-label") for h in named][:4] == [
        "frame",
        "steps",
        "guidance",
        "scale",
    ]
    assert not page.locator(".vader-still:visible").count()
    comparison = panel_of(page, "Reward comparison")
    comparison.get_by_label("show", exact=True).select_option("checkpoints by step")
    expect(comparison.locator("th:visible", has_text="mine, step 20")).to_be_visible()
    comparison.get_by_role("button", name=re.compile("blind vote")).click()
    button = comparison.get_by_role("button", name="B is better")
    expect(button).to_be_enabled()
    button.click()
    comparison.get_by_role("button", name="show tally").click()
    expect(comparison).to_contain_text("Win rate")
