"""The frame that all controls share, the sampler and the training monitor, as one uses them from Python."""

import asyncio
import json
import os
import re
import threading
from html.parser import HTMLParser

import ipywidgets
import pytest
import torch

from vader_nb import Sampling, align, load, lora, prompts, rewards, run_data, sample, stepwise, zoo
from vader_nb.clip_request import NONE, Request
from vader_nb.drawing import Series, chart
from vader_nb.models import MODEL_LOCK
from vader_nb.video import load as load_video
from vader_nb.widgets import Sampler, TrainingMonitor, jobs
from vader_nb.widgets.controls import disable
from vader_nb.widgets.panel import VIEW, Panel
from vader_nb.widgets.player import Player
from vader_nb.widgets.sampler import HISTORY

EVIL = "<script>alert(1)</script> \"quoted\" & 'so'"
QUICK = {"num_inference_steps": 2}


class Tags(HTMLParser):
    """The tags of a page as a browser would find them, and their alternative texts."""

    def __init__(self, text):
        super().__init__()
        self.found, self.alts, self.handlers = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        self.alts += [value for name, value in attributes if name == "alt"]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]


def pages(widget):
    """Everything that is shown as HTML."""
    own = [widget.value] if isinstance(widget, ipywidgets.HTML) else []
    return own + [text for child in getattr(widget, "children", ()) for text in pages(child)]


def alive():
    return len(ipywidgets.widgets.widget._instances)


@pytest.fixture(scope="module")
def sampler(tiny, tmp_path_factory):
    made = Sampler(tiny, folder=tmp_path_factory.mktemp("clips"))
    made.run(**QUICK)
    return made


# --------------------------------------------------------------------------------------------------------- jobs


class Log:
    def __init__(self):
        self.done, self.progress, self.waits, self.errors = [], [], [], []
        self.jobs = jobs.Jobs(self.progress.append, self.waits.append, self.errors.append)

    def job(self, name, steps=20):
        def make():
            for i in range(steps):
                self.done.append((name, i))
                yield (i + 1) / steps

        return make


def test_a_newer_request_takes_over_at_the_next_step():
    log = Log()

    async def page():
        log.jobs.submit(log.job("old"), debounce=0)
        while len(log.done) < 3:
            await asyncio.sleep(0.001)
        log.jobs.submit(log.job("new"), debounce=0)
        await log.jobs.task

    asyncio.run(page())
    names = [name for name, _ in log.done]
    assert names.count("new") == 20
    assert 3 <= names.count("old") < 20
    assert names == sorted(names, reverse=True)  # never again the old one after the new one began
    assert log.progress[-1] is None


def test_a_control_that_moves_often_starts_one_job():
    log = Log()

    async def page():
        for i in range(10):
            log.jobs.submit(log.job(i), debounce=0.05)
        await log.jobs.task

    asyncio.run(page())
    assert {name for name, _ in log.done} == {9}


def test_a_job_that_is_given_up_is_closed():
    log, closed = Log(), []

    def make():
        try:
            while True:
                yield 0.5
        finally:
            closed.append(True)

    async def page():
        log.jobs.submit(make, debounce=0)
        await asyncio.sleep(0.05)
        log.jobs.give_up()
        await log.jobs.task

    asyncio.run(page())
    assert closed == [True]


def test_what_is_asked_for_in_a_cell_takes_the_place_of_what_a_control_had_asked_for():
    log, closed = Log(), []

    def make():
        try:
            yield from log.job("old")()
        finally:
            closed.append(len(log.done))

    async def page():
        log.jobs.submit(make, debounce=0)
        while len(log.done) < 3:
            await asyncio.sleep(0.001)
        old = log.jobs.task
        log.jobs.finish(log.job("cell", 5))
        await old

    asyncio.run(page())
    assert closed == [len(log.done) - 5]  # before the other one began
    assert [name for name, _ in log.done[-5:]] == ["cell"] * 5
    assert log.progress[-1] is None


def test_giving_up_takes_the_bar_away():
    log = Log()

    async def page():
        log.jobs.submit(log.job("old"), debounce=0)
        while len(log.done) < 3:
            await asyncio.sleep(0.001)
        log.jobs.give_up()
        assert log.progress[-1] is None

    asyncio.run(page())
    assert log.progress[-1] is None


def test_what_a_job_raises_is_told():
    log = Log()

    def make():
        yield 0.1
        raise ValueError("what went wrong")

    async def page():
        log.jobs.submit(make, debounce=0)
        await log.jobs.task

    asyncio.run(page())
    assert [str(error) for error in log.errors] == ["what went wrong"]
    assert log.progress[-1] is None


def test_a_job_waits_for_a_model_that_another_thread_uses():
    log, held, release = Log(), threading.Event(), threading.Event()

    def cell():
        with MODEL_LOCK:
            held.set()
            release.wait(10)

    async def page():
        thread = threading.Thread(target=cell)
        thread.start()
        held.wait(10)
        log.jobs.submit(log.job("waits", 3), debounce=0)
        await asyncio.sleep(0.05)
        assert not log.done
        assert log.waits == [True]
        release.set()
        await log.jobs.task
        thread.join()

    asyncio.run(page())
    assert len(log.done) == 3


def test_without_a_page_or_on_colab_a_job_is_done_when_it_was_asked_for(monkeypatch):
    log = Log()
    log.jobs.submit(log.job("at once", 3))
    assert len(log.done) == 3
    monkeypatch.setitem(jobs.sys.modules, "google.colab", jobs)

    async def page():
        log.jobs.submit(log.job("colab", 3))
        assert len(log.done) == 6

    asyncio.run(page())


# -------------------------------------------------------------------------------------------------------- the frame


class Counter(Panel):
    title, hint = "a <b>title</b>", "do something"

    def __init__(self):
        super().__init__()
        self.number = ipywidgets.IntText(0, description="number")
        self.on(self.count, self.number)
        self.assemble(self.number)

    def count(self):
        if self.number.value < 0:
            raise KeyError("no <negative> numbers")

    def to_html(self):
        return f'<img alt="the number {self.number.value}">'


def test_an_error_in_a_handler_is_shown_until_the_next_change():
    panel = Counter()
    panel.number.value = -1
    assert isinstance(panel.error, KeyError)
    assert "no &lt;negative&gt; numbers" in panel.remark.value
    assert "role=alert" in panel.remark.value
    panel.number.value = 1
    assert panel.error is None
    assert not panel.remark.value


def test_a_panel_is_shown_as_a_widget_over_a_picture_that_the_widget_hides(monkeypatch):
    panel, shown = Counter(), []
    widget, still = panel.bundles()
    assert list(widget) == [VIEW]
    assert widget[VIEW]["model_id"] == panel.box.model_id
    assert Tags(still["text/html"]).alts == ["the number 0"]
    assert "Run this cell again" in still["text/html"]
    assert f".vader-still-{panel.box.model_id} {{ display: none }}" in pages(panel.box)[0]
    assert f"vader-still-{panel.box.model_id}'" in still["text/html"]
    monkeypatch.setattr(
        "vader_nb.widgets.panel.display", lambda bundle, raw: shown.append(list(bundle))
    )
    panel._ipython_display_()
    assert shown == [[VIEW], ["text/plain", "text/html"]]
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5.13")
    panel._ipython_display_()
    assert shown[2:] == [[VIEW]]


def test_progress_and_errors_stand_under_the_hint():
    head, progress, remark, *_ = (panel := Counter()).box.children
    assert panel.hint in head.value
    assert (progress, remark) == (panel.progress, panel.remark)


def test_a_panel_whose_first_picture_fails_is_there_and_says_why(tiny):
    panel = Sampler(tiny, prompt=" ")
    widget, still = panel.bundles()
    assert widget[VIEW]["model_id"] == panel.box.model_id
    assert "the prompt is empty" in still["text/html"]
    assert "the prompt is empty" in panel.remark.value


def test_titles_are_texts():
    assert "a &lt;b&gt;title" in pages(Counter().box)[0]


def test_a_disabled_control_says_why():
    control, remark = ipywidgets.IntSlider(), ipywidgets.HTML()
    disable("not <now>", control, remark=remark)
    assert control.disabled
    assert control.tooltip == "not <now>"
    assert "not &lt;now&gt;" in remark.value
    disable("", control, remark=remark)
    assert not control.disabled


# -------------------------------------------------------------------------------------------------------- the player


def test_the_pages_of_a_player_are_turned_in_the_browser():
    player = Player(3)
    player.show(["all", "1", "2", "3"])
    assert [page.value for page in player.pages.children] == ["all", "1", "2", "3"]
    assert list(player.scrubber.options) == ["▶ all", "1 of 3", "2 of 3", "3 of 3"]


def test_a_player_takes_clips_of_another_length_and_closes_what_it_does_not_need():
    player = Player(8)
    before = alive()
    player.scrubber.index = 7
    player.show(["all", "1", "2"])
    assert len(player.pages.children) == 3
    assert player.scrubber.index == 0
    assert alive() == before - 18  # six pages, each with its layout and style
    player.show(["all", *"12345678"])
    assert alive() == before
    assert [page.value for page in player.pages.children][-1] == "8"


# ----------------------------------------------------------------------------------------------------------- curves


def test_a_chart_has_its_points_and_says_what_it_shows():
    def drawn(points, **options):
        return chart([Series(points)], width=230, height=104, **options)

    rising = drawn([(0, 1.0), (1, 2.0), (2, float("nan"))], label="reward <x>", x_range=(0, 2))
    (points,) = re.findall(r'd="([^"]*)" fill="none" class="curve"', rising)
    assert points == "M42.0 84.0h0L131.0 22.0"  # left at the bottom; in the middle on top
    assert 'aria-label="reward &lt;x&gt;: from 1 to 2"' in rising
    assert "nan" not in rising
    assert "nothing yet" in drawn([], label="empty", x_range=(0, 1))
    assert 'class="curve"' in drawn([(1, 1.0)], label="one point", x_range=(0, 1))


def test_a_chart_has_gaps_dashes_and_a_marker():
    gap = [(1, 1.0), (2, float("nan")), (3, 3.0), (4, 2.0)]
    drawn = chart([Series(gap, "a"), Series([(1, 0.0), (4, 1.0)], "b", "red", "2 3")], label="two")
    first, second = re.findall(r'd="([^"]*)" fill="none" class="curve"', drawn)
    assert (first.count("M"), second.count("M")) == (2, 1)  # a line begins anew after the gap
    assert 'stroke-dasharray="2 3"' in drawn
    assert 'aria-label="two: a from 1 to 2; b from 0 to 1"' in drawn
    assert "vader-marker" not in drawn
    assert drawn.count("<circle") == 2
    marked = chart([Series(gap)], label="one", marker=2)
    assert "vader-marker" in marked
    assert "<circle" not in marked  # there is nothing at 2


# ------------------------------------------------------------------------------------------------------ the sampler


def test_its_clip_is_that_of_sample(sampler, tiny):
    video = sampler.run(
        prompt="a red star growing on a gray background", seed=3, adapter=NONE, **QUICK
    )
    frames = sample(
        tiny, "a red star growing on a gray background", seeds=3, sampling=Sampling(2, 2.0)
    )
    torch.testing.assert_close(video.frames, frames[0], rtol=0, atol=0)


def test_a_model_that_starts_from_an_image_makes_one_from_a_caption():
    """And is offered no adapter of another model."""
    sampler = Sampler(load("tiny-i2v"))
    assert list(sampler.adapter.options) == [NONE]
    video = sampler.run(prompt="a red star growing on a gray background", seed=3, **QUICK)
    assert video.frames.shape == (8, 3, 64, 64)


def test_each_step_tells_how_far_it_is(tiny):
    job, fractions = stepwise.denoising(tiny, ["a", "b"], [0, 1], Sampling(3)), []
    try:
        while True:
            fractions.append(next(job))
    except StopIteration as end:
        frames = end.value
    assert fractions == [0.25, 0.5, 0.75]
    assert frames.shape == (2, 8, 3, 64, 64)


def test_between_two_steps_the_model_is_its_owners(tiny):
    """A cell that runs while a clip is being made finds its own adapter, and no other."""
    mine = lora.load(tiny, zoo.adapters()["hps"])
    try:
        other = stepwise.merged(tiny, {zoo.adapters()["aesthetic"]: 1.0})
        job = stepwise.denoising(tiny, ["a"], [0], Sampling(3), other)
        next(job)
        on_model = {f"unet.{name}": layer for name, layer in tiny.denoiser.named_modules()}
        assert all(on_model[name] is layer for name, layer in mine.layers.items())
        job.close()
    finally:
        mine.remove()


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": NONE},
        {"adapter": "hps", "scale": 0.7},
        {"adapter": "hps", "scale": 0.5, "second": "aesthetic", "second_scale": 0.4},
        {"adapter": "aesthetic", "scale": 1.5, "start": 0.5, "end": 1.0},
        {"adapter": NONE, "second": "hps"},
    ],
)
def test_the_code_that_it_shows_makes_the_same_clip(sampler, settings):
    video = sampler.run(
        **{"second": NONE, "start": 0.0, "end": 1.0, "seed": 5, "num_inference_steps": 4} | settings
    )
    names = {}
    *lines, last = sampler.code.splitlines()
    exec("\n".join([*lines, f"made = {last}"]), names)
    torch.testing.assert_close(names["made"].frames, video.frames, rtol=0, atol=2e-4)
    if settings["adapter"] != NONE:
        base = sampler.run(adapter=NONE)
        assert (base.frames - video.frames).abs().max() > 0.01


def test_a_slider_makes_the_clip_anew(sampler):
    before = sampler.run(adapter="aesthetic", scale=1.0, **QUICK)
    sampler.scale.value = 0.3
    assert sampler.history[0][0].scale == 0.3
    assert not torch.equal(sampler.video.frames, before.frames)


def test_the_seed_stays_until_another_one_is_asked_for(sampler):
    sampler.set(seed=4)
    sampler.prompt.value = "a green circle moving up on a white background"
    assert sampler.video.caption == sampler.prompt.value
    assert sampler.seed.value == 4
    sampler.dice.click()
    assert sampler.history[0][0].seed == sampler.seed.value
    sampler.seed.value = 2**31 + 5
    assert sampler.history[0][0].seed == 2**31 - 1  # the largest


def test_what_cannot_act_is_disabled_and_says_why(sampler, tiny):
    sampler.set(adapter=NONE, second=NONE)
    for control in (sampler.scale, sampler.second, sampler.second_scale, sampler.part):
        assert control.disabled
        assert control.tooltip
    assert "Without an adapter" in sampler.why.value
    sampler.set(adapter="hps")
    assert not sampler.scale.disabled
    assert sampler.second_scale.disabled
    sampler.set(second="hps")
    assert sampler.second_scale.disabled
    assert "two different adapters" in sampler.why.value
    sampler.set(second="action")
    assert not sampler.second_scale.disabled
    assert not sampler.why.value
    sampler.set(second=NONE)
    alone = Sampler(tiny, adapters={})
    assert alone.adapter.disabled
    assert "No adapters were given" in alone.why.value


def test_an_empty_prompt_is_shown_as_the_error_it_is(sampler):
    kept = sampler.prompt.value
    sampler.prompt.value = " "
    assert "the prompt is empty" in sampler.remark.value
    sampler.prompt.value = kept
    assert sampler.error is None
    assert not sampler.remark.value


@pytest.mark.parametrize(
    "change, said",
    [
        ({"scale": 2.0}, r"scale must lie in 0\.\.1\.5, got 2"),
        ({"adapter": "nobody"}, r"adapter must be one of none \(base model\), .*; got 'nobody'"),
        ({"sed": 1}, "unknown setting 'sed'; choose one of prompt, seed"),
    ],
)
def test_settings_that_do_not_exist_are_errors(sampler, change, said):
    with pytest.raises(ValueError, match=said):
        sampler.run(**change)


def test_adapters_that_do_not_fit_are_errors_at_once(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter file at"):
        Sampler(tiny, adapters={"gone": tmp_path / "gone.safetensors"})


def test_prompts_are_shown_as_text(sampler):
    sampler.run(prompt=EVIL, **QUICK)
    shown = pages(sampler.box)
    for text in [*shown, sampler.to_html()]:
        found = Tags(text)
        assert "script" not in found.found
        assert not found.handlers or found.found[0] == "style" and found.handlers == ["onload"]
    assert any(EVIL in alt for text in shown for alt in Tags(text).alts)


def test_one_can_go_back_in_the_history(sampler):
    first = sampler.run(prompt="a red star spinning on a gray background", seed=1, **QUICK)
    second = sampler.run(prompt="a blue star spinning on a gray background", seed=2, **QUICK)
    sampler._slots[1].children[1].click()
    assert sampler.video is first
    assert (sampler.prompt.value, sampler.seed.value) == (
        "a red star spinning on a gray background",
        1,
    )
    sampler.back(1)
    assert sampler.video is second


def test_parts_of_the_chain_are_set_as_a_whole(sampler):
    """Whatever they were before: one end after the other would cross."""
    late = sampler.run(adapter="aesthetic", start=0.5, end=1.0, **QUICK)
    sampler.run(start=0.0, end=0.5)
    sampler._slots[1].children[1].click()
    assert sampler.error is None
    assert sampler.video is late
    assert sampler.part.value == (0.5, 1.0)
    with pytest.raises(ValueError, match=r"got 0\.7, 0\.3"):
        sampler.run(start=0.7, end=0.3)
    assert sampler.video is late
    sampler.set(start=0.0, end=1.0)


def test_clips_are_saved_without_overwriting_and_with_what_made_them(sampler):
    sampler.run(prompt="../../" + EVIL, **QUICK)
    paths = []
    for suffix in (".gif", ".mp4", ".webp"):
        sampler.format.value = suffix
        sampler.save_button.click()
        assert sampler.error is None
        paths.append(max(sampler.folder.glob(f"*{suffix}")))
    assert [path.name for path in paths] == ["clip-001.gif", "clip-002.mp4", "clip-003.webp"]
    assert all(path.stat().st_size > 500 for path in paths)
    assert EVIL in paths[0].with_suffix(".txt").read_text()
    assert "clip-003.webp" in sampler.saved.value


def test_a_folder_that_cannot_be_written_is_said(sampler, tmp_path):
    (tmp_path / "file").touch()
    folder, sampler.folder = sampler.folder, tmp_path / "file" / "clips"
    sampler.save_button.click()
    assert isinstance(sampler.error, OSError)
    assert str(tmp_path) in sampler.remark.value
    sampler.folder = folder


def test_nothing_piles_up(sampler):
    for _ in range(HISTORY + 1):
        sampler.run(**QUICK)
    before = alive()
    for i in range(4):
        sampler.seed.value = 100 + i
    assert len(sampler.history) == HISTORY
    assert alive() == before


def test_the_panel_makes_its_first_clip_when_it_is_shown(tiny):
    panel = Sampler(tiny, adapters={})
    panel.set(**QUICK)
    assert panel.video is None
    _, still = panel.bundles()
    assert Tags(still["text/html"]).alts == [panel.prompt.value]


def test_a_request_reads_well():
    assert str(Request("x", adapter="a", scale=0.5, second="b", end=0.5)).startswith(
        "0.5 × a + 0.5 × b, acting 0% to 50%"
    )
    assert str(Request("x", adapter="a", scale=0.0)).startswith("base · seed 0")


# ------------------------------------------------------------------------------------------------------ the monitor


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A monitor, and the run it watched."""
    monitor = TrainingMonitor(
        tmp_path_factory.mktemp("runs") / "mine",
        tiny,
        held_out=rewards.hps("tiny"),
        prompts=[*prompts.get("tiny_held_out")[:1], EVIL],
        sampling=Sampling(2),
        every=2,
    )
    states = [monitor.status]
    hooks = monitor.hooks
    hooks["callback"] = lambda row, follow=hooks["callback"]: (
        follow(row),
        states.append(monitor.status),
    )
    run = align(
        tiny,
        rewards.aesthetic("tiny"),
        prompts.get("tiny"),
        steps=4,
        batch_size=1,
        sampling=Sampling(2),
        output_dir=monitor.folder,
        progress=False,
        **hooks,
    )
    run.adapter.remove()
    return monitor, run, states


def test_a_monitor_follows_a_run(trained):
    monitor, run, states = trained
    assert states[0] == "waiting"
    assert set(states[1:-1]) == {"running"}
    assert states[-1] == monitor.status == "finished"
    assert list(monitor.step.options) == ["2", "4"]
    assert "step 4 of 4" in monitor.state.value
    assert monitor.stop_button.disabled
    assert "The run is over" in monitor.why.value
    for title in ("trained reward", "gradient norm", "held out", "diversity", "motion"):
        assert title in monitor.curves.value


def test_its_numbers_are_those_of_the_clips_that_it_keeps(trained, tiny):
    monitor, run, _ = trained
    texts = monitor.prompts * 2
    seeds = [10_000, 10_001, 10_002, 10_003]
    frames = sample(tiny, texts, seeds=seeds, adapter=run.folder, sampling=Sampling(2))
    row = run.metrics[-1]
    assert row["validation/motion"] == pytest.approx(
        frames.diff(dim=1).abs().mean().item(), rel=1e-4
    )
    (held_out,) = [value for key, value in row.items() if "hps" in key]
    assert held_out == pytest.approx(rewards.hps("tiny")(frames, texts).mean().item(), rel=1e-4)
    kept = load_video(run.folder / "watched" / "step-000004.webp").frames
    assert kept.shape == (8, 3, 132, 132)
    # prompts from left to right, seeds below each other
    torch.testing.assert_close(kept[:, :, :64, 68:], frames[1], rtol=0, atol=1 / 255)
    torch.testing.assert_close(kept[:, :, 68:, :64], frames[2], rtol=0, atol=1 / 255)


def test_a_restarted_kernel_shows_the_same(trained):
    monitor, run, _ = trained
    for again in (TrainingMonitor(run.folder), TrainingMonitor(run)):
        assert again.status == "finished"
        assert again.curves.value == monitor.curves.value
        assert again.step.options == monitor.step.options
        assert [p.value for p in again.player.pages.children] == [
            p.value for p in monitor.player.pages.children
        ]
        assert "script" not in Tags(again.to_html()).found
        again.step.value = "2"
        assert "clips of step 2" in again.player.pages.children[0].value


def test_a_run_is_stopped_from_another_process_and_keeps_what_it_has(tiny, tmp_path):
    folder, seen = tmp_path / "mine", []

    def elsewhere(row):
        watcher = TrainingMonitor(folder)
        seen.append((watcher.status, watcher.stop_button.disabled))
        if row["step"] == 2:
            watcher.stop_button.click()
            assert watcher.error is None
            seen.append((watcher.status, watcher.stop_button.disabled))

    run = align(
        tiny,
        rewards.aesthetic("tiny"),
        prompts.get("tiny"),
        steps=6,
        batch_size=1,
        sampling=Sampling(2),
        output_dir=folder,
        progress=False,
        callback=elsewhere,
    )
    run.adapter.remove()
    assert seen == [("running", False), ("running", False), ("stopping", True)]
    assert run.stopped
    assert len(run.metrics) == 2
    after = TrainingMonitor(folder)
    assert after.status == "stopped"
    assert "resume=True" in after.state.value
    assert not (folder / "stop").exists()
    after.stop_button.click()  # a button can be pressed from Python though it is disabled
    assert "there is nothing to stop" in after.remark.value
    assert not (folder / "stop").exists()


def test_in_the_kernel_that_trains_the_button_says_what_to_press_instead(tiny, tmp_path):
    monitor, said = TrainingMonitor(tmp_path / "mine"), []
    hooks = {"callback": lambda row: (monitor.follow_step(row), said.append(monitor.why.value))}
    run = align(
        tiny,
        rewards.aesthetic("tiny"),
        ["a"],
        steps=2,
        batch_size=1,
        sampling=Sampling(2),
        output_dir=monitor.folder,
        progress=False,
        **hooks,
    )
    run.adapter.remove()
    assert "press ■ in the toolbar" in said[0]


def test_it_draws_no_more_often_than_a_page_can_take(tmp_path, monkeypatch):
    monitor, drawn, now = TrainingMonitor(tmp_path), [], [100.0]
    monkeypatch.setattr(monitor, "refresh", lambda: drawn.append(now[0]))
    monkeypatch.setattr("vader_nb.widgets.monitor.time.monotonic", lambda: now[0])
    (tmp_path / "config.json").write_text(json.dumps({"steps": 1000}))
    for i in range(100):  # ten seconds at ten steps a second
        now[0] = 100 + i / 10
        monitor.follow_step({"step": i})
    assert 25 <= len(drawn) <= 40


def test_it_watches_a_folder_that_another_process_writes_to(trained, tmp_path, monkeypatch):
    _, run, _ = trained
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text((run.folder / "config.json").read_text())
    monkeypatch.setattr("vader_nb.widgets.watching.POLL", 0.01)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    states = []

    async def page():
        monitor = TrainingMonitor(folder)
        monitor.prepare()
        for count in (1, 3, 4):
            # and half a line, as if it were being written
            (folder / "metrics.jsonl").write_text(
                "\n".join(lines[:count]) + ("\n" + lines[-1][:9] if count < 4 else "\n")
            )
            await asyncio.sleep(0.1)
            states.append((len(monitor.rows), monitor.status))
        await asyncio.wait_for(monitor._task, 5)  # it ends with the run

    asyncio.run(page())
    assert states == [(1, "running"), (3, "running"), (4, "finished")]


def test_a_run_that_ends_while_the_panel_is_drawn_is_told_as_ended_in_the_end(
    trained, tmp_path, monkeypatch
):
    """The state of a folder may change between two looks: what the panel tells is one look, and it looks again."""
    _, run, _ = trained
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_text(
            (run.folder / name).read_text().replace('"steps": 4', '"steps": 9')
        )
    looks = iter(["running", "stopping", "stopped"])
    monkeypatch.setattr("vader_nb.widgets.watching.POLL", 0.01)
    monkeypatch.setattr(TrainingMonitor, "status", property(lambda self: next(looks, "stopped")))

    async def page():
        monitor = TrainingMonitor(tmp_path)
        assert "<b>running</b>" in monitor.state.value
        assert not monitor.why.value.count("over")
        monitor.prepare()
        await asyncio.wait_for(monitor._task, 5)
        return monitor

    monitor = asyncio.run(page())
    assert "<b>stopped</b>" in monitor.state.value
    assert "The run is over" in monitor.why.value


def test_a_killed_run_is_silent_and_names_what_there_is(trained, tmp_path):
    _, run, _ = trained
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_text(
            (run.folder / name).read_text().replace('"steps": 4', '"steps": 9')
        )
    long_ago = (tmp_path / "metrics.jsonl").stat().st_mtime - 500
    os.utime(tmp_path / "metrics.jsonl", (long_ago, long_ago))
    monitor = TrainingMonitor(tmp_path)
    assert monitor.status == "silent"
    assert "kept" not in monitor.state.value
    assert "killed, or a step takes long" in monitor.state.value
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    monitor.refresh()
    assert str(tmp_path / "checkpoints" / "step-000002") in monitor.state.value
    monitor.stop_button.click()  # it may be at a long step
    assert (tmp_path / "stop").exists()
    assert monitor.status == "silent"


def test_when_a_run_goes_back_to_a_checkpoint_its_clips_do_too(tiny, tmp_path):
    def watched():
        return TrainingMonitor(tmp_path, tiny, prompts=["a", "b"], sampling=Sampling(1), every=1)

    def train(steps, **options):
        settings = {
            "batch_size": 1,
            "sampling": Sampling(1),
            "output_dir": tmp_path,
            "progress": False,
        }
        settings |= {"checkpointing_steps": 2, "steps": steps}
        run = align(
            tiny, rewards.aesthetic("tiny"), ["a"], **settings, **options, **watched().hooks
        )
        run.adapter.remove()

    train(5)
    assert list(run_data.watched(tmp_path)) == [1, 2, 3, 4, 5]
    old = (tmp_path / "watched" / "step-000003.webp").stat().st_mtime_ns
    train(4, resume=tmp_path / "checkpoints" / "step-000002")
    assert list(run_data.watched(tmp_path)) == [1, 2, 3, 4]
    assert (tmp_path / "watched" / "step-000003.webp").stat().st_mtime_ns > old


@pytest.mark.parametrize("trouble", ["a file in the way", "one frame"])
def test_watching_costs_nobody_the_run(tiny, tmp_path, trouble):
    sampling = Sampling(1, num_frames=1) if trouble == "one frame" else Sampling(1)
    monitor = TrainingMonitor(tmp_path / "mine", tiny, prompts=["a"], sampling=sampling, every=1)
    if trouble != "one frame":
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "watched").touch()
    settings = {"batch_size": 1, "sampling": Sampling(1), "progress": False, "steps": 2}
    run = align(
        tiny,
        rewards.aesthetic("tiny"),
        ["a"],
        output_dir=monitor.folder,
        **settings,
        **monitor.hooks,
    )
    run.adapter.remove()
    assert len(run.metrics) == 2
    assert (monitor.error is None) == (trouble == "one frame")


def test_an_error_stays_while_it_looks_again(trained, tmp_path, monkeypatch):
    _, run, _ = trained
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_text(
            (run.folder / name).read_text().replace('"steps": 4', '"steps": 9')
        )
    monkeypatch.setattr("vader_nb.widgets.watching.POLL", 0.01)

    async def page():
        monitor = TrainingMonitor(tmp_path)
        monitor.prepare()
        monitor.failed(ValueError("look at this"))
        await asyncio.sleep(0.1)
        monitor._task.cancel()
        return monitor

    assert "look at this" in asyncio.run(page()).remark.value


def test_a_monitor_that_cannot_make_clips_says_so(tiny, tmp_path):
    with pytest.raises(ValueError, match="clips need the model and prompts"):
        TrainingMonitor(tmp_path, held_out=rewards.hps("tiny"))
    with pytest.raises(ValueError, match="clips need the model and prompts"):
        TrainingMonitor(tmp_path, tiny)
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        TrainingMonitor(tmp_path, tiny, prompts=["a"], every=0)


ROW = '{"step": 1, "reward": 0.5, "grad_norm": 1.0}\n'


@pytest.mark.parametrize(
    "files",
    [
        {"metrics.jsonl": "null\n"},
        {"metrics.jsonl": "[]\n"},
        {"metrics.jsonl": "3\n"},
        {"metrics.jsonl": '{"reward": 1}\n'},
        {"metrics.jsonl": '{"step": 1, "reward": "x"}\n'},
        {"metrics.jsonl": "{\n"},
        {"metrics.jsonl": ROW, "config.json": '{"steps": 2'},
        {"metrics.jsonl": ROW, "config.json": "{}"},
        {"metrics.jsonl": ROW, "watched/step-x.webp": ""},
        {"metrics.jsonl": ROW, "watched/step-000001.webp": "no picture"},
    ],
    ids=str,
)
def test_an_odd_folder_makes_a_panel_that_says_so(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monitor = TrainingMonitor(tmp_path)
    assert "vader-error" in monitor.remark.value and monitor.error is not None
    monitor.close()
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    TrainingMonitor(tmp_path).close()


def test_a_reward_that_is_null_in_a_row_is_a_gap(tmp_path):
    text = ROW + '{"step": 2, "reward": null}\n' + ROW.replace("1,", "3,", 1)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    monitor = TrainingMonitor(tmp_path)
    assert len(monitor.rows) == 3 and monitor.error is None
    monitor.close()
