"""The comparison of contestants: what it shows against what is computed again by hand, and every state of its controls."""

import asyncio
import html
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import ipywidgets
import pytest
import torch

from vader_nb import Sampling, comparison_html, lora, reward, sample, voting, zoo
from vader_nb import comparison as comparison_data
from vader_nb.drawing import Series, chart
from vader_nb.estimators import BestOf
from vader_nb.evaluation import BASE
from vader_nb.guidance import RewardGuidance
from vader_nb.rewards import action, aesthetic, hps
from vader_nb.sampling import derived_seed
from vader_nb.video import GAP
from vader_nb.widgets import RewardComparison

PROMPTS = [
    "a red circle moving up on a black background",
    "<script>alert('1')</script> & \"two\"",
    "a blue square",
]
FAST = Sampling(num_inference_steps=2, num_frames=4)
WIDGETS = getattr(ipywidgets.widgets.widget, "_instances", None)  # of ipywidgets 8


def brightness(frames, prompts):
    return frames.mean(dim=(1, 2, 3, 4))


def rewards():
    return [
        reward(brightness, per_frame=True),
        reward(
            lambda frames, prompts: (
                frames[:, 1:].sub(frames[:, :-1]).square().mean(dim=(1, 2, 3, 4))
            ),
            "<b>motion</b>",
        ),
    ]


def make(tiny, folder, **settings):
    contestants = {name: zoo.adapters()[name] for name in ("hps", "aesthetic")}
    settings = {
        "contestants": contestants,
        "rewards": rewards(),
        "prompts": PROMPTS,
        "sampling": FAST,
    } | settings
    return RewardComparison(tiny, folder=folder, **settings)


@pytest.fixture
def comparison(tiny, tmp_path):
    return make(tiny, tmp_path)


@pytest.fixture(scope="module")
def everything(tiny, tmp_path_factory):
    """A comparison of all prompts, for tests that only look."""
    made = make(tiny, tmp_path_factory.mktemp("all"), seed=3)
    made.run_all()
    return made


def by_hand(tiny, prompt, name, seed):
    """The clip (1, F, 3, H, W) by the plain functions."""
    if name == BASE:
        return sample(tiny, prompt, seeds=seed, sampling=FAST)
    adapter = lora.load(tiny, zoo.adapters()[name])
    try:
        return sample(tiny, prompt, seeds=seed, sampling=FAST, adapter=adapter)
    finally:
        adapter.remove()


def parts(widget):
    """A widget and all within."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from parts(child)


def pages(comparison):
    return [page.value for page in comparison.player.pages.children]


def why(control):
    return control.tooltip if control.has_trait("tooltip") else control.description_tooltip


# ------------------------------------------------------------------------------------------------- what is computed


def test_all_contestants_start_from_the_same_noise_and_are_what_sample_makes(everything, tiny):
    for name in (BASE, "hps"):
        expected = by_hand(tiny, PROMPTS[0], name, seed=3)[0]
        got = everything.data.clips[PROMPTS[0], name].pixels()
        assert (got - expected).abs().max() <= 0.5 / 255 + 1e-5  # kept in 256 levels


def test_scores_and_differences_are_those_of_the_rewards_on_these_clips(everything, tiny):
    found = everything.run(PROMPTS[0])
    assert list(found) == [BASE, "hps", "aesthetic"]
    before, after = by_hand(tiny, PROMPTS[0], BASE, 3), by_hand(tiny, PROMPTS[0], "aesthetic", 3)
    for metric in rewards():
        base, adapter = metric(before, PROMPTS[:1]).item(), metric(after, PROMPTS[:1]).item()
        assert found[BASE][metric.name] == pytest.approx(base, abs=1e-6)
        assert found["aesthetic"][metric.name] == pytest.approx(adapter, abs=1e-6)
        change = everything.data.difference(PROMPTS[0], "aesthetic", metric.name)
        assert change == pytest.approx(adapter - base, abs=1e-6)
        assert comparison_html.signed(adapter - base) in pages(everything)[0]


@pytest.mark.parametrize(
    ("difference", "shown"),
    [
        (0.5, "<span class=vader-up>+0.500</span>"),
        (-0.5, "<span class=vader-down>−0.500</span>"),
        (1e-5, "±0.000"),
    ],
)
def test_a_difference_has_its_sign_and_not_only_a_color(difference, shown):
    assert comparison_html.signed(difference) == shown
    assert "−0.000" not in comparison_html.number(difference)


@pytest.mark.parametrize("metric", [hps, aesthetic, action])
def test_the_heat_map_is_the_gradient_that_autograd_gives(metric, everything):
    metric, frames = metric("tiny"), everything.data.clips[PROMPTS[0], BASE].pixels()
    leaf = frames.clone().requires_grad_()
    metric(leaf[None], PROMPTS[:1]).sum().backward()
    expected = leaf.grad.abs().sum(1)
    found = comparison_data.heat_map(metric, frames, PROMPTS[0])
    assert found.shape == (4, 64, 64)
    assert found.max() == 1
    torch.testing.assert_close(found.float(), expected / expected.max(), atol=1e-3, rtol=1e-2)


def test_a_heat_map_of_a_reward_that_does_not_care_is_zero(everything):
    frames = everything.data.clips[PROMPTS[0], BASE].pixels()
    flat = reward(lambda frames, prompts: 0 * frames.sum(dim=(1, 2, 3, 4)), "flat")
    assert not comparison_data.heat_map(flat, frames, "").any()


def test_the_overlay_leaves_cold_pixels_gray_and_paints_hot_ones():
    clip = comparison_data.Clip(
        torch.full((2, 3, 4, 4), 200, dtype=torch.uint8), {"r": torch.zeros(2, 4, 4).half()}
    )
    clip.heat_maps["r"][1, 2, 3] = 1
    frames = comparison_html.heat_overlay(clip, "r")
    assert frames.shape == (2, 3, 4, 4)
    assert frames[0].std() < 1e-6
    torch.testing.assert_close(
        frames[1, :, 2, 3], torch.tensor(comparison_html.HEAT(1.0)[:3]).float(), atol=1e-3, rtol=0
    )


def test_what_is_known_is_not_made_again(everything, monkeypatch):
    monkeypatch.setattr(everything.data, "add", lambda *_: pytest.fail("sampled again"))
    everything.run_all()
    for prompt in [*PROMPTS, PROMPTS[0]]:
        everything.prompt.value = prompt
    assert everything.error is None


def test_clips_of_old_prompts_are_let_go_and_made_again_when_they_are_looked_at(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(comparison_data, "MEMORY", 2.5 * 4 * 3 * 64 * 64)
    comparison = make(tiny, tmp_path, contestants={}, rewards=[brightness])
    comparison.run_all()
    kept = {(PROMPTS[0], BASE), (PROMPTS[2], BASE)}
    assert set(comparison.data.clips) == kept  # the one that is shown stays
    assert not comparison.data.lacks([BASE])
    comparison.prompt.value = PROMPTS[1]
    assert comparison.error is None
    assert "img" in pages(comparison)[0]
    assert (PROMPTS[1], BASE) in comparison.data.clips


# ----------------------------------------------------------------------------------------------------- what is shown


def test_the_first_page_plays_all_in_one_picture_and_page_i_is_frame_i(everything):
    everything.run(PROMPTS[0])
    everything.reward.value = "brightness"
    first, *rest = pages(everything)
    assert first.count("<img") == 1
    assert "image/gif" in first
    assert "vader-marker" not in first
    assert len(rest) == 4
    values = everything.data.scores[PROMPTS[0]][BASE]["brightness"]
    places = []
    for i, page in enumerate(rest):
        assert page.count("<img") == 1
        assert f"frame {i + 1}" in page
        assert comparison_html.number(values[i].item()) in page  # the legend tells the values there
        places.append(float(re.search(r'd="M([\d.]+)[^>]*vader-marker', page)[1]))
    assert places == sorted(set(places))  # the marker moves with the frame
    ((video, _),) = everything._draw().values()
    assert video.frames.shape == (4, 3, 64, 3 * 64 + 2 * GAP)


def test_a_curve_has_a_line_for_each_contestant_and_a_reward_on_clips_says_it_has_none(everything):
    everything.run(PROMPTS[0])
    everything.reward.value = "brightness"
    assert pages(everything)[0].count('class="curve"') == 3
    everything.reward.value = "<b>motion</b>"
    assert 'class="curve"' not in pages(everything)[0]
    assert "one score per clip" in pages(everything)[0]
    assert "<b>motion" not in "".join(pages(everything))
    everything.reward.value = "brightness"


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [-1e9, 1e9], [0.0] * 40])
def test_any_scores_can_be_drawn(values):
    drawn = chart([Series([*enumerate(values)], "base")], label="r", marker=0)
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_the_heat_map_is_an_overlay_with_a_legend(comparison):
    comparison.run()
    plain = pages(comparison)[3]
    comparison.heat.value = True
    assert comparison.error is None
    assert "Heat map" in pages(comparison)[3]
    assert "heat maps of brightness" in pages(comparison)[3]
    comparison.heat.value = False
    assert pages(comparison)[3] == plain


def test_prompts_and_names_are_shown_as_text(tiny, tmp_path):
    name = "<img src=x onerror=alert(1)>\"'"
    comparison = make(
        tiny, tmp_path, contestants={name: zoo.adapters()["hps"]}, prompts=PROMPTS[1:2]
    )
    comparison.run()
    comparison.heat.value = True
    comparison.export()
    shown = [part.value for part in parts(comparison.box) if isinstance(part, ipywidgets.HTML)]
    for text in (*shown, comparison.to_html(), (tmp_path / "comparison.html").read_text()):
        assert "<script>" not in text
        assert "<img src=x" not in text
    assert "&lt;script&gt;" in pages(comparison)[0]
    # What breaks out of an attribute is a quote.
    for alt in re.findall(r'alt="([^"]*)"', comparison.to_html() + "".join(shown)):
        assert alt.endswith(("&quot;two&quot;", "of brightness")) or ", frame " in alt


def test_sorting_is_by_the_adapters_difference(everything):
    everything.run(PROMPTS[1])
    for metric in rewards():
        change = {
            p: everything.run(p)["aesthetic"][metric.name] - everything.run(p)[BASE][metric.name]
            for p in PROMPTS
        }
        everything.one.value, everything.reward.value = "aesthetic", metric.name
        everything.order.value = "helps most first"
        listed = [value for _, value in everything.prompt.options]
        assert listed == sorted(PROMPTS, key=lambda p: -change[p])
        assert everything.prompt.value == listed[0]
        everything.order.value = "hurts most first"
        assert [value for _, value in everything.prompt.options] == listed[::-1]
        label = everything.prompt.options[0][0]
        assert label == f"{comparison_html.number(change[listed[-1]], '+')} · {listed[-1]}"
        everything.order.value = "as given"
        assert [value for _, value in everything.prompt.options] == PROMPTS


def test_another_adapter_sorts_anew_but_keeps_the_prompt(everything):
    everything.order.value = "helps most first"
    everything.prompt.value = kept = everything.prompt.options[1][1]
    everything.one.value = "hps"
    assert everything.prompt.value == kept
    change = [
        everything.data.difference(p, "hps", everything.reward.value)
        for _, p in everything.prompt.options
    ]
    assert change == sorted(change, reverse=True)
    everything.order.value = "as given"


@pytest.mark.skipif(
    "google.colab" in sys.modules, reason="on Colab all is done while a click is answered"
)
def test_before_it_is_shown_only_two_contestants_are_awaited(tiny, tmp_path):
    async def notebook():
        comparison = make(tiny, tmp_path)
        bundle = comparison.bundles()[1]
        there = list(comparison.data.clips)
        await comparison.jobs.task
        return comparison, bundle, there

    comparison, bundle, there = asyncio.run(notebook())
    assert there == [(PROMPTS[0], BASE), (PROMPTS[0], "hps")]
    assert "<img" in bundle["text/html"]
    everyone = [BASE, "hps", "aesthetic"]
    assert sorted(comparison.data.clips) == sorted((PROMPTS[0], name) for name in everyone)
    assert "aesthetic" in comparison.to_html()


@pytest.mark.skipif(
    "google.colab" in sys.modules, reason="on Colab all is done while a click is answered"
)
def test_a_newer_request_takes_over_and_stop_stops(tiny, tmp_path):
    async def notebook():
        comparison = make(tiny, tmp_path)
        comparison.all_button.click()
        while not any(comparison.data.scores.values()):
            await asyncio.sleep(0.01)
        assert not comparison.stop_button.disabled
        assert "under way" in why(comparison.all_button)
        comparison.stop_button.click()
        await comparison.jobs.task
        stopped = sum(map(len, comparison.data.scores.values()))
        assert comparison.stop_button.disabled
        assert not comparison.all_button.disabled
        comparison.prompt.value = PROMPTS[1]
        first = comparison.jobs.task
        comparison.prompt.value = PROMPTS[2]
        await asyncio.gather(first, comparison.jobs.task)
        return comparison, stopped

    comparison, stopped = asyncio.run(notebook())
    assert stopped < 9
    assert comparison.error is None
    assert not comparison.data.scores[PROMPTS[1]]
    assert PROMPTS[2] not in comparison.data.lacks(["hps", "aesthetic"])
    assert "a blue square" in pages(comparison)[0]


def test_the_picture_for_readers_has_an_alternative_text_and_the_scores(everything):
    everything.run(PROMPTS[0])
    picture = everything.to_html()
    assert f'alt="base, hps, aesthetic: {PROMPTS[0]}"' in picture
    for scores in everything.run(PROMPTS[0]).values():
        for value in scores.values():
            assert comparison_html.number(value) in picture


# --------------------------------------------------------------------------------------- contestants of every kind


class Still:
    """Somebody's own sampler: every clip is of one gray."""

    def __init__(self, gray):
        self.gray = gray

    def sample(self, model, prompts, *, seeds, sampling, adapter=None):
        size = sampling.total_frames, 3, sampling.height, sampling.width
        return torch.full((len(prompts), *size), self.gray)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run's folder with three checkpoints, whose last is its adapter."""
    folder = tmp_path_factory.mktemp("run")
    for step, name in {10: "hps", 20: "action", 30: "aesthetic"}.items():
        checkpoint = folder / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        shutil.copy(zoo.adapters()[name], checkpoint / "adapter.safetensors")
    shutil.copy(zoo.adapters()["aesthetic"], folder / "adapter.safetensors")
    return folder


@pytest.fixture(scope="module")
def mixed(tiny, tmp_path_factory, run_folder):
    liked = rewards()[0]
    contestants = {
        "hps": zoo.adapters()["hps"],
        "mine": run_folder,
        "both": {zoo.adapters()["hps"]: 0.5, run_folder: 0.5},
        "best of 3": BestOf(3, liked),
        "guided": RewardGuidance(liked, strength=0.3),
        "still": Still(0.4),
    }
    folder = tmp_path_factory.mktemp("mixed")
    return make(tiny, folder, contestants=contestants, prompts=PROMPTS[:2])


def test_anything_with_sample_is_a_contestant(mixed, tiny):
    found = mixed.run(PROMPTS[0], view="contestants")
    assert list(found) == [BASE, "hps", "mine", "both", "best of 3", "guided", "still"]
    assert found["still"]["brightness"] == pytest.approx(0.4, abs=1e-3)
    assert found["guided"]["brightness"] > found[BASE]["brightness"]
    candidates = [
        rewards()[0](sample(tiny, PROMPTS[0], seeds=derived_seed(0, k), sampling=FAST), [""])
        for k in range(3)
    ]
    assert found["best of 3"]["brightness"] == pytest.approx(max(candidates).item(), abs=1e-6)
    weights = dict.fromkeys((zoo.adapters()["hps"], zoo.adapters()["aesthetic"]), 0.5)
    with lora.use_adapter(tiny, weights) as adapter:
        expected = sample(tiny, PROMPTS[0], sampling=FAST, adapter=adapter)[0]
    assert (mixed.data.clips[PROMPTS[0], "both"].pixels() - expected).abs().max() < 0.01
    assert pages(mixed)[0].count("<th>") == 7


def test_an_adapter_is_seen_at_several_scales_on_several_prompts(mixed, tiny):
    found = mixed.run(PROMPTS[0], view="scales of hps", reward="brightness")
    assert list(found) == [BASE, "0.5 × hps", "hps", "1.5 × hps"]
    with lora.use_adapter(tiny, {zoo.adapters()["hps"]: 1.5}) as adapter:
        expected = sample(tiny, PROMPTS[1], seeds=0, sampling=FAST, adapter=adapter)
    shown = mixed.data.clips[PROMPTS[1], "1.5 × hps"].pixels()
    assert (shown - expected[0]).abs().max() <= 0.5 / 255 + 1e-5
    assert pages(mixed)[0].count("<section") == pages(mixed)[0].count("<img") == 2
    assert "brightness by scale, mean of these 2 prompts" in pages(mixed)[0]
    assert mixed.to_html().count("image/gif") == 2
    mixed.prompt.value = PROMPTS[1]  # becomes the first row
    first = pages(mixed)[2].partition("</section>")[0]
    assert html.escape(PROMPTS[1]) in first and ", frame 2" in first


def test_checkpoints_of_a_run_are_seen_along_a_slider(mixed):
    assert mixed.step.layout.display == "none"
    found = mixed.run(PROMPTS[0], view="checkpoints by step", reward="brightness", step=10)
    assert mixed.step.layout.display == "flex"
    assert list(found) == [BASE, "mine, step 10", "mine, step 20", "mine, step 30"]
    scored = mixed.data.scores[PROMPTS[0]]
    torch.testing.assert_close(scored["mine, step 30"], scored["mine"])
    torch.testing.assert_close(scored["mine, step 10"], scored["hps"])
    assert "mine, step 10</th>" in pages(mixed)[0]
    place = re.compile(r'd="M([\d.]+)[^>]*vader-marker')
    before = float(place.search(pages(mixed)[0])[1])
    mixed.step.value = 30
    assert "mine, step 30</th>" in pages(mixed)[0] and "step 10<" not in pages(mixed)[0]
    assert float(place.search(pages(mixed)[0])[1]) > before
    with pytest.raises(ValueError, match="step must be one of 10, 20, 30; got 25"):
        mixed.set(step=25)
    mixed.set(view="contestants")


def test_two_runs_share_the_slider_and_a_run_that_goes_on_is_its_newest_checkpoint(
    tiny, tmp_path, run_folder
):
    other = tmp_path / "other"
    for step in (5, 28):
        target = other / "checkpoints" / f"step-{step:06d}"
        shutil.copytree(run_folder / "checkpoints" / "step-000010", target)
    run = SimpleNamespace(folder=run_folder)  # as `align` returns one
    everyone, views = comparison_data.line_up({"mine": run, "other": other})
    assert everyone["mine"] == run_folder
    assert everyone["other"] == other / "checkpoints" / "step-000028"
    view = views["checkpoints by step"]
    assert view.steps == [5, 10, 20, 28, 30]
    assert view.shown(20) == [BASE, "mine, step 20", "other, step 28"]
    comparison = make(tiny, tmp_path, contestants={"other": other})
    assert comparison.step.value == 28


def test_any_two_are_sorted_by_and_voted_on_and_the_rewards_of_their_clips_are_kept(mixed):
    mixed.set(one="still", other="mine, step 10")
    mixed.run_all()
    assert not mixed.order.disabled
    mixed.blind.value = True
    mixed.voter.value = "no/name"
    assert "a voter's name" in str(mixed.error)
    assert mixed.pair is None
    mixed.voter.value = "ann"
    pair = mixed.pair
    assert {pair.left, pair.right} == {"still", "mine, step 10"}
    clips = mixed.video.frames.split([64, GAP, 64], dim=3)[::2]
    change = clips[0].mean() - clips[1].mean()
    assert pair.rewards["brightness"] == pytest.approx(change.item(), abs=1e-5)
    mixed.vote("A" if change > 0 else "B")
    assert mixed.votes.path.name == "votes-ann.jsonl"
    mixed.blind.value = False
    assert mixed.agreement()["brightness"].wins == 1
    assert "voters: ann" in mixed.counts.value
    mixed.set(other="still")
    assert "choose two that differ" in why(mixed.blind)
    page = mixed.export().read_text()
    for title in ("Contestants, 2 of 2", "Scales of hps, 2 of 2", "voters: ann"):
        assert title in page


def test_an_adapter_that_is_live_is_one_too(tiny, tmp_path):
    adapter = lora.load(tiny, zoo.adapters()["hps"])
    try:
        comparison = make(tiny, tmp_path, contestants={"live": adapter}, rewards=[brightness])
        found = comparison.run()
    finally:
        adapter.remove()
    expected = make(tiny, tmp_path, rewards=[brightness]).run()
    assert found["live"] == expected["hps"] and found[BASE] == expected[BASE]
    assert list(comparison.data.views) == ["contestants"]


def test_clips_of_another_size_are_told(tiny, tmp_path):
    class Small(Still):
        def sample(self, *args, **options):
            return super().sample(*args, **options)[..., :32]

    comparison = make(tiny, tmp_path, contestants={"small": Small(0.5)})
    with pytest.raises(ValueError, match="'small' made frames of shape .*32.*, but all clips"):
        comparison.run()


# --------------------------------------------------------------------------------------------------- disabled, errors


def test_controls_that_cannot_act_say_why(comparison):
    assert "compare all prompts first" in why(comparison.order)
    assert "compare all prompts first, 3 of 3" in comparison.why.value
    assert "nothing to export" in why(comparison.export_button)
    assert "under way" in why(comparison.stop_button)
    comparison.run()
    assert not comparison.export_button.disabled
    assert comparison.order.disabled
    comparison.run_all()
    assert not comparison.order.disabled
    assert not comparison.why.value
    assert "all prompts are compared" in why(comparison.all_button)


def test_without_adapters_there_is_a_base_and_the_way_to_more(tiny, tmp_path):
    comparison = make(tiny, tmp_path, contestants={})
    comparison.run_all()
    for control in (comparison.one, comparison.order, comparison.blind):
        assert control.disabled
        assert "RewardComparison(model, {" in why(control)
    assert "RewardComparison(model, {" in comparison.why.value.replace("&#x27;", "'")
    assert "<img" in comparison.export().read_text()


def test_an_error_stands_in_the_panel_and_goes_when_things_work(tiny, tmp_path):
    def fussy(frames, prompts):
        if "square" in prompts[0]:
            raise ZeroDivisionError("no <squares>")
        return brightness(frames, prompts)

    comparison = make(tiny, tmp_path, rewards=[fussy], contestants={})
    comparison.run()
    comparison.prompt.value = PROMPTS[2]
    assert "fussy" in str(comparison.error)
    assert "ZeroDivisionError: no &lt;squares&gt;" in comparison.remark.value
    assert "vader_nb.check(reward)" in comparison.remark.value
    with pytest.raises(ValueError, match="fussy"):
        comparison.run(PROMPTS[2])
    comparison.prompt.value = PROMPTS[0]
    assert comparison.error is None
    assert not comparison.remark.value


def test_a_reward_without_gradient_says_so_instead_of_a_heat_map(tiny, tmp_path):
    comparison = make(
        tiny,
        tmp_path,
        rewards=[reward(lambda f, p: brightness(f.detach(), p), "dull")],
        contestants={},
    )
    comparison.run()
    comparison.heat.value = True
    assert "dull&#x27; failed (reward &#x27;dull&#x27; has no gradient" in comparison.remark.value
    assert "<img" in pages(comparison)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": []}, "no rewards"),
        ({"rewards": [brightness, brightness]}, "different names"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": [" "]}, "no prompts"),
        ({"prompts": "tiny"}, "up to 200 prompts, got 668"),
        ({"contestants": {BASE: zoo.adapters()["hps"]}}, "no adapter can be named"),
        ({"sampling": Sampling(num_inference_steps=0)}, "num_inference_steps"),
    ],
)
def test_wrong_arguments_are_told_at_once(tiny, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tiny, tmp_path, **settings)


def test_an_export_is_offered_once_a_view_is_whole(comparison):
    first, *_ = comparison.data.prompts
    comparison.data.scores[first]["base"] = {}  # one of a view's contestants
    comparison.changed()
    assert "nothing to export" in why(comparison.export_button)


def test_other_wrong_arguments(tiny, tmp_path, comparison):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make(tiny, tmp_path, contestants={"a": "nowhere"})
    with pytest.raises(TypeError, match="a reward is"):
        make(tiny, tmp_path, rewards=[3])
    with pytest.raises(ValueError, match="prompt must be one of .*; got 'a dog'"):
        comparison.run("a dog")
    with pytest.raises(ValueError, match="nothing to export"):
        comparison.export()
    with pytest.raises(ValueError, match="no pair"):
        comparison.vote("A")


def test_defaults_are_those_of_the_tiny_world(tiny, tmp_path):
    comparison = RewardComparison(tiny, folder=tmp_path)
    assert comparison.data.views["contestants"].names == [
        BASE,
        "hps",
        "aesthetic",
        "action",
    ]  # first the one that helps
    assert list(comparison.data.rewards) == ["hps", "aesthetic", "action"]
    assert len(comparison.prompts) == 6
    assert comparison.data.sampling.num_inference_steps == tiny.defaults["num_inference_steps"]
    assert not comparison.data.clips  # nothing is made before it is shown


def test_every_control_has_a_label(comparison):
    for part in parts(comparison.box):
        if hasattr(part, "disabled"):
            assert part.description


def test_widgets_do_not_pile_up(everything):
    registry = ipywidgets.Widget.widgets if WIDGETS is None else WIDGETS
    everything.run(PROMPTS[0], view="scales of hps")
    before, kept = len(registry), len(everything.data.clips)
    for i in range(25):
        everything.view.value = ("contestants", "scales of hps")[i % 2]
        everything.prompt.value = PROMPTS[i % 3]
        everything.reward.value = rewards()[i % 2].name
    assert everything.error is None
    assert (len(registry), len(everything.data.clips)) == (before, kept)
    assert len(everything._drawn) <= 3  # pictures of what is in sight
    everything.set(view="contestants")


# --------------------------------------------------------------------------------------------------------- blind votes


def test_blind_mode_reveals_nothing(comparison):
    comparison.run()
    comparison.export()
    comparison.one.value = "aesthetic"
    comparison.blind.value = True
    hidden = {*parts(comparison.open_box), comparison.view}
    for part in (comparison.open_box, comparison.prompt, comparison.view):
        assert part.layout.display == "none"
    for part in set(parts(comparison.box)) - hidden:
        said = " ".join(
            str(getattr(part, name, "")) for name in ("value", "description", "tooltip")
        )
        said = re.sub('data:image/[a-z]+;base64,[^"]*', "", said)
        for word in (BASE, "aesthetic", "hps", "brightness", "motion"):
            assert word not in said
    for control in (
        comparison.prompt,
        comparison.one,
        comparison.order,
        comparison.heat,
        comparison.reward,
    ):
        assert control.disabled
        assert "blind vote" in why(control)
    assert all(
        "vader-note>…" not in page and "<svg" not in page and "<img" in page
        for page in pages(comparison)
    )
    alts = {re.search(r'alt="([^",]*)', page)[1] for page in pages(comparison)}
    assert alts == {f"A and B: {PROMPTS[0]}"}
    assert "aesthetic" not in re.sub("base64,[^\"']*", "", str(comparison.bundles()))


def test_a_pair_is_base_and_adapter_from_one_new_seed(comparison, tiny):
    comparison.blind.value = True
    pair = comparison.pair
    assert pair.seed != comparison.data.seed
    assert {pair.left, pair.right} == {BASE, "hps"}
    halves = comparison.video.frames.split([64, GAP, 64], dim=3)
    for shown, name in zip(halves[::2], (pair.left, pair.right)):
        torch.testing.assert_close(
            shown, by_hand(tiny, pair.prompt, name, pair.seed)[0], atol=1e-5, rtol=0
        )


def test_sides_are_drawn_evenly_and_pairs_differ(tmp_path):
    votes = voting.Votes(tmp_path)
    pairs = []
    for _ in range(60):
        pairs.append(votes.next("hps", BASE, PROMPTS, seed=0))
        votes.add(pairs[-1], "A")
    assert 18 <= sum(pair.left == BASE for pair in pairs) <= 42
    assert len({(pair.prompt, pair.seed) for pair in pairs}) == 60
    assert 0 not in {pair.seed for pair in pairs}  # whose clips are shown with names
    assert votes.next("aesthetic", BASE, PROMPTS, 0).seed == 1  # any two have pairs of their own
    assert votes.next(BASE, "hps", PROMPTS, 0).seed == 61  # whoever is named first
    other = [voting.Votes(tmp_path, "bob").next("hps", BASE, PROMPTS, 0)]
    assert other[0].clips == pairs[0].clips  # another voter sees the same clips


def test_votes_are_counted_kept_and_come_back(comparison, tiny, tmp_path):
    comparison.blind.value = True
    wins = losses = 0
    for choice in ("A", "B", "=", "A"):
        sides = {"A": comparison.pair.left, "B": comparison.pair.right}
        wins += sides.get(choice) == "hps"
        losses += sides.get(choice) == BASE
        vote = comparison.vote(choice)
        assert json.loads((tmp_path / "votes.jsonl").read_text().splitlines()[-1]) == vars(vote)
        assert not comparison.counts.value  # the tally is told when it is asked for
    tally = comparison.tally()
    assert (tally.wins, tally.losses, tally.ties, tally.votes) == (wins, losses, 1, 4)
    assert tally.rate == pytest.approx((wins + 0.5) / 4)
    assert tally.low < tally.rate < tally.high
    comparison.tally_button.click()
    assert (
        f"hps against base: {wins} won, {losses} lost, 1 with no difference"
        in comparison.counts.value
    )
    again = make(tiny, tmp_path)
    assert again.tally() == tally
    again.blind.value = True
    assert again.pair.seed == 5  # goes on where the votes ended
    again.one.value = "aesthetic"
    assert again.tally().votes == 0
    assert "no votes yet" in str(again.tally())


def test_leaving_blind_mode_shows_the_tally_and_the_comparison_again(comparison):
    comparison.run()
    before = pages(comparison)
    comparison.blind.value = True
    comparison.ballot["="].click()
    assert comparison.error is None
    assert comparison.pair is not None
    comparison.blind.value = False
    assert pages(comparison) == before
    assert "1 with no difference" in comparison.counts.value
    assert comparison.pair is None
    assert comparison.ballot_box.layout.display == "none"
    assert not comparison.prompt.disabled


def test_a_vote_has_three_choices(comparison):
    comparison.blind.value = True
    with pytest.raises(ValueError, match="A, =, B, got 'C'"):
        comparison.vote("C")
    assert comparison.pair is not None
    assert not comparison.votes.path.exists()


def test_a_damaged_file_of_votes_is_told_with_its_line(tiny, tmp_path):
    good = json.dumps({"prompt": "p", "seed": 1, "left": BASE, "right": "hps", "choice": "A"})
    for bad in ('{"prompt"', '{"prompt": "p"}', "3", good.replace('"A"', '"C"')):
        (tmp_path / "votes.jsonl").write_text(f"{good}\n{bad}\n")
        with pytest.raises(ValueError, match="line 2 is not a vote"):
            make(tiny, tmp_path)


def test_votes_of_before_there_were_any_two_contestants_count(tmp_path):
    old = {"prompt": "p", "seed": 1, "adapter": "hps", "left": BASE, "choice": "B"}
    (tmp_path / "votes.jsonl").write_text(json.dumps(old) + "\n")
    votes = voting.Votes(tmp_path).read()
    assert votes == [voting.Vote("p", 1, BASE, "hps", choice="B")]
    assert voting.tally(votes, "hps", BASE).wins == 1


def test_the_interval_of_a_share_is_wilsons_and_narrower_with_ties():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    def tally(wins, losses, ties=0):
        sides = "A" * wins + "B" * losses + "=" * ties
        votes = [voting.Vote("p", i, "x", "y", choice=side) for i, side in enumerate(sides)]
        return voting.tally(votes, "x", "y")

    for won, votes, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
    ]:
        found = tally(won, votes - won)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert tally(3, 0).low < 0.5  # three wins of three prove nothing
    none = tally(0, 0)
    assert (none.low, none.high, none.votes) == (0, 1, 0)
    assert "no votes" in str(none)
    assert tally(12, 3).low > 0.5 and "better" in str(tally(12, 3))
    half, tied = tally(5, 5), tally(0, 0, 10)
    assert half.rate == tied.rate == 0.5
    assert half.low < tied.low < 0.5 < tied.high < half.high


def vote(seed, left, choice, voter="", **rewards):
    right = "b" if left == "a" else "a"
    return voting.Vote("p", seed, left, right, rewards, choice, voter)


def test_votes_of_several_people_are_merged_and_clips_that_both_saw_count_once(tmp_path):
    for voter, choices in {"ann": "AAB", "bob": "AB"}.items():
        votes = voting.Votes(tmp_path / voter, voter)
        for seed, choice in enumerate(choices):
            votes.add(voting.Pair("p", seed, "a", "b"), choice)
    files = [tmp_path / voter / f"votes-{voter}.jsonl" for voter in ("ann", "bob")]
    merged = voting.read(*files)
    assert [v.voter for v in merged] == ["ann"] * 3 + ["bob"] * 2
    tally = voting.tally(merged, "a", "b")
    assert (tally.wins, tally.losses, tally.votes, tally.pairs) == (3, 2, 5, 3)
    assert tally.rate == pytest.approx((1 + 0.5 + 0) / 3)
    assert voting.tally(merged, "b", "a").rate == pytest.approx(1 - tally.rate)
    files[1].rename(files[0].with_name(files[1].name))  # or put into one folder
    assert voting.Votes(tmp_path / "ann").read() == merged
    for name in ("a/b", "../x", "x" * 41, "a b"):
        with pytest.raises(ValueError, match="a voter's name has up to 40 letters"):
            voting.Votes(tmp_path, name)


def test_agreement_is_the_share_of_votes_where_the_reward_is_higher():
    votes = [
        vote(1, "a", "A", "ann", hps=0.2, dull=0.0),
        vote(2, "b", "B", "ann", hps=-0.1, flip=3.0),
        vote(3, "a", "A", "ann", hps=-0.3),
        vote(4, "a", "=", "ann", hps=-0.3),  # prefers none
        vote(1, "b", "B", "bob", hps=-0.2),  # the same clips on other sides, the same preference
        vote(2, "b", "A", "bob", hps=-0.1),
    ]
    found = voting.agreement(votes)
    assert list(found) == [
        "hps",
        "flip",
        "another voter",
    ]  # a reward without difference says nothing
    hps = found["hps"]
    assert (hps.wins, hps.losses, hps.pairs) == (3, 2, 3)
    assert hps.rate == pytest.approx((1 + 0.5 + 0) / 3)
    assert hps.low < hps.rate < hps.high
    assert (found["flip"].wins, found["flip"].losses) == (0, 1)
    assert (found["another voter"].wins, found["another voter"].losses) == (1, 1)


# --------------------------------------------------------------------------------------------------------------- export


def test_the_export_is_one_file_with_all_that_was_compared(everything, tmp_path):
    everything.votes.add(voting.Pair(PROMPTS[0], 9, "hps", BASE, {"brightness": -1}), "B")
    path = everything.export(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == [path]
    page = path.read_text(encoding="utf-8")
    views = page.count("3 of 3 prompts</h2>")  # contestants, and scales if a test has seen them
    clips = page.count('<img src="data:image/gif;base64,')
    assert page.count("<section") == clips == views * len(PROMPTS) > 0
    assert not re.search(r"""(src|href)=(?!["']?data:)|url\(|@import|<script""", page)
    for prompt in PROMPTS:
        assert html.escape(prompt) in page
        for name in ("hps", "aesthetic"):
            change = everything.data.difference(prompt, name, "brightness")
            assert comparison_html.signed(change) in page
    for text in (
        "0 won, 1 lost",
        "<td>brightness</td><td>100%</td>",
        "&#34;num_inference_steps&#34;: 2",
        "prefers-color-scheme: dark",
        "width=device-width",
    ):
        assert text in page
    everything.votes.path.unlink()


def test_the_button_exports_into_the_folder_and_offers_the_file(comparison):
    comparison.run()
    comparison.export_button.click()
    path = Path(comparison.folder) / "comparison.html"
    assert "Contestants, 1 of 3 prompts" in path.read_text()
    assert str(path) in comparison.saved.value
    assert 'download="comparison.html"' in comparison.saved.value


def test_an_export_tells_of_clips_that_were_let_go(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_data, "MEMORY", 2.5 * 4 * 3 * 64 * 64)
    comparison = make(tiny, tmp_path, contestants={}, rewards=[brightness])
    comparison.run_all()
    page = comparison.export().read_text()
    assert page.count("<section") == 3
    assert page.count("were not kept") == 1


def test_leaving_blind_mode_stops_the_pair_that_is_being_made(everything):
    """After a vote the next pair is under way; it must not come into the open view."""

    async def page():
        everything.blind.value = True
        await everything.jobs.task
        everything.vote("A")
        task = everything.jobs.task
        await asyncio.sleep(0)
        everything.blind.value = False
        await task
        await asyncio.sleep(0.1)

    before = pages(everything)
    asyncio.run(page())
    assert everything.pair is None
    assert pages(everything) == before
    assert "Which clip" not in everything.caption.value


def test_sorting_before_all_is_compared_says_what_to_do_first(comparison):
    comparison.order.value = "helps most first"
    assert "compare all prompts first" in comparison.remark.value
    assert comparison.order.value == "as given"


def test_votes_on_any_prompt_can_be_read_again(tmp_path):
    votes = voting.Votes(tmp_path)
    prompt = "two\u2028lines\u0085 or more"
    votes.add(voting.Pair(prompt, 1, "hps", "base"), "A")
    votes.add(voting.Pair("another", 2, "hps", "base"), "=")
    assert [vote.prompt for vote in votes.read()] == [prompt, "another"]
