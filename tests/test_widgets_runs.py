"""The viewer of races and runs, as one uses it from Python."""

import asyncio
import base64
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from vader_nb import Sampling, align, prompts, rewards, run_data, sample, zoo
from vader_nb.drawing import Series, chart
from vader_nb.race_results import EVALUATED, LINES
from vader_nb.run_data import by_name
from vader_nb.video import grid
from vader_nb.widgets import RunViewer, TrainingMonitor
from vader_nb.widgets.watching import NONE

from .test_race import CURVES, made_up
from .test_widgets import EVIL, Tags, alive, pages

QUICK = {"sampling": {"num_inference_steps": 2}}


@pytest.fixture
def race(tmp_path):
    """A race of two seeds, whose first run of A has kept the adapters of both evaluations."""
    made_up(tmp_path / "race", CURVES)
    for part, name in enumerate(("hps", "aesthetic"), start=1):
        job = tmp_path / "race" / "1"
        shutil.copy(zoo.adapters()[name], job / EVALUATED.format(part))
        (job / "config.json").write_text(json.dumps(QUICK))
    return tmp_path / "race"


def text_of(viewer):
    return " ".join(pages(viewer.box))


def test_a_race_s_curves_are_means_over_seeds_with_a_band(race):
    viewer = RunViewer(race)
    assert viewer.error is None
    assert [name for _, name in viewer.x.options] == [*run_data.COSTS, "step"]
    assert viewer.x.options[0][0] == "reward queries"
    assert list(viewer.y.options) == ["reward", "held-out reward", "diversity", "motion"]
    named = {c.name: c for c in viewer.contestants}
    assert list(named) == ["base", "A", "B", "best of 8 (8 queries per clip)"]
    assert "learning rate 0.001, 2 seeds" in named["A"].remark  # that of the best reward
    curve = viewer._series(named["A"], "red", "seconds", "held-out reward")
    assert curve.points == [(100, pytest.approx(0.3)), (200, pytest.approx(0.5))]
    assert curve.lows == pytest.approx([0.2, 0.4]) and curve.highs == pytest.approx([0.4, 0.6])
    level = viewer._series(named["best of 8 (8 queries per clip)"], "red", "seconds", "reward")
    assert level.points == [(0.0, pytest.approx(0.3)), (200, pytest.approx(0.3))] and level.dashes
    viewer.set(x="seconds", y="held-out reward")
    assert list(viewer._charts()) == [
        "held-out reward over seconds",
        "held-out reward against diversity",
        "held-out reward against motion",
    ]
    assert viewer.curves.value.count("<polygon") == 2
    viewer.y.value = "motion"
    assert list(viewer._charts()) == ["motion over seconds", "motion against diversity"]


def test_a_pareto_curve_begins_at_the_base(race):
    viewer = RunViewer(race)
    a = next(c for c in viewer.contestants if c.name == "A")
    way = viewer._series(a, "red", "diversity", "held-out reward")
    assert way.points == [(pytest.approx(1 - h), pytest.approx(h)) for h in (0.0, 0.3, 0.5)]
    assert way.labels == ["", "A · evaluation 1", "A · evaluation 2"]
    drawn = viewer.curves.value
    assert drawn.count('data-label="A · evaluation 2"') == 3  # and in the curve
    assert drawn.count('data-label="base"') == 2


def test_the_clips_of_a_point_are_sampled_with_its_adapter(race, tiny):
    viewer = RunViewer(race, tiny)
    viewer.prepare()
    assert viewer.point.value == "A · evaluation 2"  # where the first one ended
    texts = viewer.prompts * 2
    given = {"seeds": 10_000, "sampling": Sampling(2)}
    for label, adapter in {
        "A · evaluation 1": zoo.adapters()["hps"],
        "A · evaluation 2": zoo.adapters()["aesthetic"],
        "base": None,
    }.items():
        viewer.set(point=label)
        assert viewer.error is None and f"clips of {label}" in text_of(viewer)
        frames = sample(tiny, texts, adapter=adapter, **given)
        png = re.search('base64,(.*?)"', viewer.player.pages.children[8].value)[1]
        shown = np.array(Image.open(io.BytesIO(base64.b64decode(png)))) / 255
        clip = grid(frames, 2)[7].permute(1, 2, 0)  # prompts beside each other
        np.testing.assert_allclose(shown, clip, atol=1.1 / 255)
    assert "clips of base" in viewer.to_html()
    before, widgets = dict(viewer._made), alive()
    for label in ("A · evaluation 1", "base") * 20:
        viewer.set(point=label)
    assert viewer._made == before and alive() == widgets


def test_what_is_missing_is_said(race, tiny):
    viewer = RunViewer(race)
    viewer.prepare()
    assert "RunViewer(folder, model) would make its clips" in viewer.caption.value
    viewer = RunViewer(race, tiny)
    viewer.set(point="B · evaluation 1")
    assert "its adapter was not kept" in viewer.caption.value
    viewer.set(point="best of 8")
    assert "has no adapter" in viewer.caption.value
    (race / "1" / "config.json").unlink()
    with pytest.raises(OSError, match="config.json"):
        viewer.set(point="A · evaluation 1")
    assert "config.json" in viewer.remark.value
    with pytest.raises(ValueError, match="point must be one of base, .*; got 'C'"):
        viewer.set(point="C")
    with pytest.raises(ValueError, match="prompts need a model"):
        RunViewer(race, prompts=["a"])


def test_another_choice_takes_over_from_sampling(race, tiny):
    viewer = RunViewer(race, tiny)

    async def page():
        viewer.prepare()
        await asyncio.sleep(0.05)
        viewer.point.value = "best of 8"
        await asyncio.sleep(0.05)
        assert "has no adapter" in viewer.caption.value and not viewer._made
        viewer.point.value = "A · evaluation 1"
        await viewer.jobs.task
        viewer.close()

    asyncio.run(page())
    assert "clips of A · evaluation 1" in text_of(viewer)


def test_a_race_is_followed_while_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("vader_nb.widgets.watching.POLL", 0.01)
    viewer = RunViewer(tmp_path / "race")
    assert "waiting" in viewer.state.value and viewer.point.value == NONE
    assert viewer.to_html().startswith("<div><b>waiting</b>") and not viewer.over
    seen = []

    async def page():
        viewer.prepare()
        for curves in (dict([*CURVES.items()][:1]), dict([*CURVES.items()][:3])):
            shutil.rmtree(tmp_path / "race", ignore_errors=True)
            made_up(tmp_path / "race", curves)
            await asyncio.sleep(0.1)
            seen.append(list(viewer.points))
        lines = tmp_path / "race" / "1" / LINES
        lines.write_text(lines.read_text()[:-9])  # a second evaluation that is not whole yet
        await asyncio.sleep(0.1)
        seen.append(list(viewer.points))
        viewer.close()

    asyncio.run(page())
    one = ["base", "A · evaluation 1"]
    assert seen == [["base"], [*one, "A · evaluation 2"], one]
    assert viewer.error is None
    monkeypatch.setattr("vader_nb.widgets.run_viewer.IDLE", -1)
    assert viewer.over


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Two runs, of which the second was watched, in one folder."""
    folder = tmp_path_factory.mktemp("runs")
    watching = {"prompts": prompts.get("tiny_held_out")[:1], "every": 1, "sampling": Sampling(1)}
    for name in ("plain", "watched"):
        monitor = TrainingMonitor(folder / name, tiny, **watching)
        options = {"batch_size": 1, "sampling": Sampling(1), "progress": False, "steps": 2}
        options |= {"output_dir": monitor.folder} | (monitor.hooks if name == "watched" else {})
        align(tiny, rewards.aesthetic("tiny"), ["a", "b"], **options).adapter.remove()
    return folder


def test_runs_stand_beside_each_other(runs, tiny):
    viewer = RunViewer(runs)
    assert viewer.error is None
    assert [c.name for c in viewer.contestants] == ["plain", "watched"]
    assert [name for _, name in viewer.x.options] == ["seconds", "step"]
    assert list(viewer.y.options) == ["trained reward", "gradient norm", "diversity", "motion"]
    assert list(viewer.point.options) == [
        "plain · step 2",
        "watched · step 1",
        "watched · step 2",
    ]
    spent = [p.mean("seconds") for p in viewer.contestants[0].points]
    rows = [json.loads(line) for line in (runs / "plain" / "metrics.jsonl").open()]
    assert spent == [rows[0]["seconds"], rows[0]["seconds"] + rows[1]["seconds"]]
    for title in ("trained reward over seconds", "trained reward against diversity"):
        assert title in viewer.curves.value
    viewer.set(point="watched · step 1")
    assert "clips of watched · step 1" in text_of(viewer)  # without a model
    with_model = RunViewer({"one": runs / "plain", "two": runs / "watched"}, tiny, ["a red star"])
    assert [c.name for c in with_model.contestants] == ["one", "two"]
    with_model.set(point="one · step 2")
    assert "clips of one · step 2: a red star" in text_of(with_model)


def test_a_contestant_that_was_not_finite_is_told(race):
    with (race / "5" / LINES).open("a") as file:
        line = {"contestant": "B", "learning_rate": 1e-3, "seed": 0, "part": 2, "failed": "nan"}
        file.write(json.dumps(line | dict.fromkeys(run_data.COSTS, 0)) + "\n")
    viewer = RunViewer(race)
    assert viewer.error is None and "not finite at any learning rate" in viewer.state.value
    assert not any("B" in label for label in viewer.points)


def test_names_are_texts(tmp_path):
    race = made_up(tmp_path / "race", {("base", None, None): [(0, 0)], (EVIL, 1, 0): [(1, 1)]})
    viewer = RunViewer([race.folder, tmp_path / "nothing"])
    found = Tags(text_of(viewer) + viewer.to_html())
    assert viewer.error is None and "script" not in found.found
    assert set(found.handlers) <= {"onload", "onclick"}


def test_two_contestants_of_one_name_are_an_error(race):
    viewer = RunViewer({"a": race, "b": race})
    assert "have the same name" in viewer.remark.value


def test_an_odd_folder_makes_a_viewer_that_says_so(tmp_path):
    (tmp_path / "race.json").write_text("{")
    viewer = RunViewer(tmp_path)
    assert "vader-error" in viewer.remark.value
    (tmp_path / "race.json").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": null}\n{"step": 2, "rew')
    viewer = RunViewer(tmp_path)
    assert viewer.error is None and math.isnan(viewer.contestants[0].points[0].mean("reward"))


def test_folders_are_named_by_their_ends_unless_two_are_alike(tmp_path):
    assert list(by_name("runs/a")) == ["a"]
    assert list(by_name(["x/a", "y/a", "b"])) == ["x/a", "y/a", "b"]
    assert by_name({"mine": tmp_path}) == {"mine": tmp_path}


def test_a_dot_that_can_be_clicked_has_its_label():
    curve = Series(
        [(0, 1), (1, 2), (2, math.nan)],
        labels=["<a>", "b", "c"],
        lows=[0, 1, math.nan],
        highs=[1, 2, 3],
    )
    drawn = chart([curve], label="x", chosen="b")
    assert 'data-label="&lt;a&gt;"' in drawn and "<title>b</title>" in drawn
    assert drawn.count('class="vader-point"') == 2 and drawn.count('r="6"') == 1
    assert "polygon" not in drawn  # whose corners are not known
