"""The reward composer, the truncation explorer and the memory planner, as one uses them from Python."""

import asyncio
import shlex
from html.parser import HTMLParser
from types import SimpleNamespace

import ipywidgets
import pytest
import torch

import vader_nb
from vader_nb import (
    Frames,
    Last,
    lora,
    memory_planner,
    reward_gradient,
    rewards,
    stepwise,
    truncation,
)
from vader_nb.drawing import chain
from vader_nb.memory_planner import GIB, GPUS, MARGIN, STAGES, MemoryTracker, Step
from vader_nb.sampling import denoising_step, initial_noise
from vader_nb.truncation import Truncation
from vader_nb.widgets import (
    MemoryPlanner,
    RewardComposer,
    TruncationExplorer,
    composer,
    planner,
)
from vader_nb.widgets.controls import FRAMES
from vader_nb.widgets.truncation import EMPTY, ROWS

EVIL = "<script>alert(1)</script> \"quoted\" & 'so'"


class Tags(HTMLParser):
    """The tags of a page as a browser would find them, and their alternative texts."""

    def __init__(self, text):
        super().__init__()
        self.found, self.alts, self.kinds = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        self.alts += [value for name, value in attributes if name in ("alt", "aria-label")]
        self.kinds += [value for name, value in attributes if name == "class"]


def pages(widget):
    """Everything that is shown as HTML."""
    own = [widget.value] if isinstance(widget, ipywidgets.HTML) else []
    return own + [text for child in getattr(widget, "children", ()) for text in pages(child)]


def shown(panel):
    return " ".join(pages(panel.box))


def alive():
    return len(ipywidgets.widgets.widget._instances)


def carried(model):
    """What a denoiser consists of: the very modules and parameters, by name."""
    return {
        name: id(part)
        for name, part in [*model.denoiser.named_modules(), *model.denoiser.named_parameters()]
    }


def color(channel, name="color", per_frame=True):
    """A quick reward: how much of one color there is."""
    return rewards.reward(
        lambda frames, prompts: frames[:, :, channel].mean(dim=(1, 2, 3)), name, per_frame
    )


# ----------------------------------------------------------------------------------------------------- composer


@pytest.fixture(scope="module")
def composed(tiny):
    before = carried(tiny)
    made = RewardComposer(tiny)
    made.measure()
    assert carried(tiny) == before
    return made


@pytest.fixture(autouse=True)
def in_their_place(request):
    """Sliders go back to 1."""
    yield
    if "composed" in request.fixturenames:
        panel = request.getfixturevalue("composed")
        for slider in panel.weights.values():
            slider.value = 1.0
        panel.standardized.value = True


@pytest.fixture
def canned(monkeypatch):
    """Clips at once: clip i is red by i / 4, green by one less, and blue alike."""
    made = []

    def denoising(model, prompts, seeds):
        made.append(seeds)
        yield 0.5
        frames = torch.full((len(prompts), 2, 3, 4, 4), 0.5)
        for i in range(len(prompts)):
            frames[i, :, 0], frames[i, :, 1] = i / 4, 1 - i / 4
        return frames

    monkeypatch.setattr(stepwise, "denoising", denoising)
    return made


def test_the_clips_are_those_of_the_base_model(tiny, composed):
    assert composed.seeds == [0, 1, 2, 3]
    torch.testing.assert_close(composed.frames, vader_nb.sample(tiny, composed.prompts, seeds=0))


def test_scores_and_statistics_are_those_of_the_rewards(composed):
    for name in ("hps", "aesthetic", "action"):
        reward = rewards.parse(name, tiny=True)
        torch.testing.assert_close(
            composed.scores[name], reward(composed.frames, composed.prompts).detach()
        )
        exact = rewards.statistics(reward, composed.frames, composed.prompts)
        assert composed.statistics[name] == pytest.approx(exact, rel=1e-3)


def test_conflicts_are_those_of_the_rewards(composed):
    assert list(composed.cosines) == [
        ("hps", "aesthetic"),
        ("hps", "action"),
        ("aesthetic", "action"),
    ]
    pair = [rewards.parse(name, tiny=True) for name in ("hps", "aesthetic")]
    mean = rewards.conflict(*pair, composed.frames, composed.prompts).mean().item()
    assert composed.cosines["hps", "aesthetic"] == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize("standardized", [True, False])
@pytest.mark.parametrize("weights", [(1, 1, 1), (-0.35, 2, 0), (0, -1, 0.05), (0, -2, 0)])
def test_the_expression_is_read_back_to_the_same_reward(composed, weights, standardized):
    composed.standardized.value = standardized
    for slider, weight in zip(composed.weights.values(), weights):
        slider.value = weight
    assert composed.error is None
    read = rewards.parse(composed.expression, tiny=True)(composed.frames, composed.prompts)
    torch.testing.assert_close(read, composed.reward(composed.frames, composed.prompts))
    torch.testing.assert_close(read.detach(), composed.composed(), atol=1e-4, rtol=1e-4)
    assert composed.order == read.argsort(descending=True).tolist()
    assert composed.expression in " ".join(Text(page).text for page in pages(composed.box))


class Text(HTMLParser):
    """What a reader sees of a page."""

    def __init__(self, page):
        super().__init__()
        self.text = ""
        self.feed(page)

    def handle_data(self, data):
        self.text += data


def test_moving_a_slider_sorts_the_clips_and_asks_no_reward(composed, monkeypatch):
    def never(*_):
        raise AssertionError("a reward was asked")

    monkeypatch.setattr(rewards.Reward, "__call__", never)
    monkeypatch.setattr(composer, "conflict", never)
    before = alive()
    for i in range(200):
        composed.weights["hps"].value = round(-2 + 0.05 * (i % 80), 2)
    composed.weights["hps"].value = 0
    composed.weights["action"].value = 0
    assert composed.error is None
    assert composed.order == composed.scores["aesthetic"].argsort(descending=True).tolist()
    places = [int(slot.layout.order) for slot in composed.slots]
    assert [places[i] for i in composed.order] == [0, 1, 2, 3]
    assert "1. &nbsp;" in composed.captions[composed.order[0]].value
    assert alive() == before


def test_a_negative_weight_turns_a_conflict_round(composed):
    assert "hps and aesthetic</td><td>+" in composed.pairs.value
    assert "agree" in composed.pairs.value
    composed.weights["aesthetic"].value = -0.5
    assert "hps and −aesthetic</td><td>−" in composed.pairs.value
    assert "work against each other" in composed.pairs.value


@pytest.mark.parametrize(
    ("cosine", "words"),
    [(0.9, "agree"), (0.01, "are independent"), (-0.01, "are independent"), (-0.5, "work against")],
)
def test_a_cosine_in_words(cosine, words):
    assert composer.verdict(cosine).startswith(words)


def test_nothing_asked_for_is_said(composed):
    for slider in composed.weights.values():
        slider.value = 0
    assert composer.NO_WEIGHT in shown(composed)
    for get in (lambda: composed.expression, lambda: composed.reward):
        with pytest.raises(ValueError, match="all weights are 0|All weights are 0"):
            get()
    assert "All weights are 0" in composed.to_html()


def test_the_composer_s_picture(composed):
    tags = Tags(composed.to_html())
    assert tags.found.count("img") == 4
    assert all(alt.startswith("clip of: ") for alt in tags.alts)
    assert "agree" in composed.to_html()


def test_conflicts_are_measured_after_the_clips_are_shown(tiny, canned):
    panel = RewardComposer(tiny, {"red": color(0), "green": color(1)}, ["a", "b", "c"])
    assert "not made yet" in panel.code.value
    assert composer.UNKNOWN in panel.pairs.value

    async def page():
        panel.prepare()
        assert "1. &nbsp;" in shown(panel)
        assert not panel.cosines
        await panel.jobs.task

    asyncio.run(page())
    assert panel.cosines["red", "green"] == 0  # they look at different pixels
    assert "are independent" in panel.pairs.value
    panel.prepare()
    assert len(canned) == 1


def test_the_measuring_of_conflicts_can_be_given_up(tiny, canned):
    panel = RewardComposer(tiny, {"red": color(0), "green": color(1)}, ["a", "b"])
    panel._sample()
    job = panel._comparing()
    next(job)
    job.close()
    assert composer.UNKNOWN in panel.pairs.value
    panel.measure()
    assert "are independent" in panel.pairs.value


def test_a_reward_with_one_score_for_all_clips_cannot_be_standardized(tiny, canned):
    panel = RewardComposer(tiny, {"red": color(0), "blue": color(2)}, ["a", "b"])
    panel._sample()
    assert panel.standardized.disabled
    assert panel.standardized.value is False
    assert "blue gives all clips the same score" in panel.why.value
    assert panel.expression == "red + blue"
    assert panel.order == [1, 0]


def test_a_reward_without_a_gradient_is_told_and_the_rest_goes_on(tiny, canned):
    stuck = rewards.reward(lambda frames, prompts: frames.detach().mean((1, 2, 3, 4)), "stuck")
    panel = RewardComposer(tiny, {"red": color(0), "stuck": stuck}, ["a", "b"])
    with pytest.raises(ValueError, match="has no gradient"):
        panel.measure()
    assert "has no gradient" in panel.remark.value
    assert composer.UNKNOWN in panel.pairs.value
    assert panel.order == [1, 0]


def test_own_rewards_are_named_in_the_expression_and_other_expressions_put_in_parentheses(
    tiny, canned
):
    panel = RewardComposer(
        tiny, {"mine": color(0), "sum": "hps - 0.5 * aesthetic"}, ["a red circle", "b"]
    )
    panel.standardized.value = False
    panel.weights["sum"].value = -0.5
    assert panel.expression == "mine - 0.5 * (hps - 0.5 * aesthetic)"
    assert "mine stands for the reward that was given" in panel.code.value
    panel.weights["mine"].value = 0
    parsed = rewards.parse(panel.expression, tiny=True)
    torch.testing.assert_close(
        parsed(panel.frames, panel.prompts).detach(), panel.composed(), atol=1e-4, rtol=1e-4
    )
    assert "stands for" not in panel.code.value


def test_one_reward_has_no_conflict(tiny, canned):
    panel = RewardComposer(tiny, ["hps"], ["a", "b"])
    panel.measure()
    assert "One reward alone" in panel.pairs.value


def test_names_and_prompts_are_texts_in_the_composer(tiny, canned):
    name = f"action(label='spinning') + 0 * hps.capped({1e9})"
    panel = RewardComposer(tiny, {EVIL: "hps", name: "aesthetic"}, [EVIL, "b"])
    panel.measure()
    assert "script" not in Tags(shown(panel) + panel.to_html()).found
    assert "<" not in panel.weights[EVIL].description  # which ipywidgets 7 would take for a tag


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": []}, "no rewards to compose"),
        ({"rewards": ["hps", "hps"]}, "name each reward only once"),
        ({"rewards": ["hpss"]}, "unknown reward 'hpss'"),
        ({"rewards": {"my own": color(0)}}, "needs a Python name"),
        ({"prompts": ["only one"]}, "2 or more clips"),
        ({"prompts": ["a", " "]}, "none with an empty prompt"),
        (
            {"rewards": ["action"], "prompts": ["nothing happens", "nor here"]},
            "no action of the classifier",
        ),
    ],
)
def test_what_cannot_be_composed(tiny, canned, arguments, message):
    with pytest.raises(ValueError, match=message):
        RewardComposer(tiny, **arguments)
    assert not canned


# --------------------------------------------------------------------------------------------------- truncation


def by_hand(explorer, K, frames):
    """The gradient of -reward by plain autograd: one graph through the last K steps, the decoder and the reward."""
    model, settings = explorer.study.model, explorer.sampling
    prompts, steps = [explorer.prompt], settings.num_inference_steps
    noise, _ = initial_noise(model, [explorer.study.seed], settings)
    with lora.use_adapter(model, explorer.study.adapter):
        scheduler, x, text = model.new_scheduler(settings), noise, model.encode(prompts, settings)
        for i, t in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(i >= steps - K):
                x = denoising_step(model, scheduler, x, t, text, settings)
        loss = -explorer.reward(model.decode(x, list(frames)), prompts).mean()
        found = torch.autograd.grad(loss, explorer.study.adapter.parameters())
    return torch.cat([part.flatten().double() for part in found])


@pytest.fixture
def explorer(micro):
    micro.defaults["num_inference_steps"] = 3
    return TruncationExplorer(micro, color(0), "a prompt", seed=3, rank=2)


def test_the_exact_setting_is_the_exact_gradient(explorer):
    result = explorer.measure(K=3, frames="all", gradient_checkpointing=False, streaming=False)
    assert result.cosine == pytest.approx(1, abs=1e-6)
    assert result.frames == (0, 1, 2)
    torch.testing.assert_close(
        explorer.study.exact, by_hand(explorer, 3, range(3)), rtol=1e-6, atol=1e-12
    )


def test_a_shortened_gradient_is_compared_with_the_exact_one(explorer):
    result = explorer.measure(K=2, frames="ends")
    cosine = torch.cosine_similarity(
        by_hand(explorer, 2, [0, 1, 2]), by_hand(explorer, 3, range(3)), dim=0
    )
    assert result.cosine == pytest.approx(cosine.item(), abs=1e-6)
    assert -1 <= result.cosine < 0.9999999


def test_the_exact_setting_of_the_tiny_model(tiny):
    explorer = TruncationExplorer(tiny)
    assert explorer.sampling.num_inference_steps == explorer.K.max == 5
    assert explorer.measure(K=5, frames="all").cosine == pytest.approx(1, abs=1e-6)
    cosine = torch.cosine_similarity(explorer.study.exact, by_hand(explorer, 5, range(8)), dim=0)
    assert cosine.item() == pytest.approx(1, abs=1e-6)


def test_the_memory_is_what_the_tracker_counts(explorer):
    setting = Truncation(2, "every:2", True, False)
    result = explorer.measure(K=2, frames="every:2", gradient_checkpointing=True, streaming=False)
    assert explorer.setting == setting
    with lora.use_adapter(explorer.study.model, explorer.study.adapter), MemoryTracker() as peak:
        reward_gradient(
            explorer.study.model,
            explorer.study.adapter,
            explorer.reward,
            ["a prompt"],
            seeds=[3],
            strategy=Last(2),
            frames=Frames.every(2),
            sampling=explorer.sampling,
            decode_chunk_size=3,
        )
    assert result.bytes == peak.bytes
    assert result.seconds > 0
    more = explorer.measure(gradient_checkpointing=False)
    assert more.bytes > result.bytes
    assert more.cosine == pytest.approx(result.cosine, abs=1e-9)


def test_the_random_frame_is_the_one_that_is_drawn(explorer, monkeypatch):
    results = []

    def noted(*args, **kwargs):
        results.append(reward_gradient(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(truncation, "reward_gradient", noted)
    assert explorer.measure(K=1, frames="random:1").frames == tuple(results[-1].frames)
    assert list(results[0].frames) == [0, 1, 2]  # the exact one, first


def test_the_model_keeps_its_own_adapter(micro):
    adapter = lora.add(micro, 3)
    for p in adapter.parameters():
        p.grad = torch.ones_like(p)
    before, prompts = carried(micro), ["a prompt"]
    explorer = TruncationExplorer(micro, color(0), prompts[0], rank=2)
    explorer.measure(K=2)
    assert carried(micro) == before
    assert micro.denoiser.peft_config
    assert all((p.grad == 1).all() for p in adapter.parameters())
    assert all(p.grad is None for p in explorer.study.adapter.parameters())


def test_both_halves_of_the_adapter_get_a_gradient(explorer):
    with lora.use_adapter(explorer.study.model, explorer.study.adapter):
        reward_gradient(
            explorer.study.model,
            explorer.study.adapter,
            explorer.reward,
            ["a prompt"],
            seeds=[0],
            sampling=explorer.sampling,
        )
    # Attention over a single token or frame hands nothing on to queries and keys.
    halves = [
        sum(bool(p.grad.any()) for p in explorer.study.adapter.parameters()[half::2])
        for half in (0, 1)
    ]
    assert all(halves)
    assert (
        TruncationExplorer(explorer.study.model, color(0), "a prompt", seed=1).study.exact is None
    )


def test_the_diagram_follows_the_controls(explorer):
    def count(kind):
        return Tags(explorer.drawing.value).kinds.count(kind)

    explorer.set(K=1, frames="random:1")
    assert (count("step marked"), count("step"), count("frame marked")) == (1, 2, 1)
    assert not explorer.measured
    explorer.K.value = 2
    assert (count("step marked"), count("step")) == (2, 1)
    explorer.frames.value = "all"
    assert (count("frame marked"), count("frame")) == (3, 0)
    assert (
        "through 3 of 3 frames (1, 2, 3), one by one, and the last 2 of 3 steps"
        in explorer.drawing.value
    )
    explorer.streaming.value = False
    explorer.gradient_checkpointing.value = False
    assert "all at once" in explorer.drawing.value
    assert "everything is kept" in explorer.drawing.value
    explorer.K.value = 3
    assert "all 3 steps to the adapter" in Tags(explorer.drawing.value).alts[0]
    assert EMPTY in explorer.table.value


@pytest.mark.parametrize(("steps", "frames"), [(1, 1), (25, 16), (50, 64)])
def test_diagrams_of_longer_chains(steps, frames):
    for K in (1, steps):
        names = {"adapter": "adapter", "reward": EVIL, "label": EVIL}
        drawing = chain(steps, K, frames, range(frames), recompute=True, stream=True, **names)
        assert Tags(drawing).kinds.count("step marked") == K
        assert "script" not in Tags(drawing).found


def test_each_setting_has_one_row_and_the_table_ends(explorer, monkeypatch):

    def gradient(setting, meter):
        with meter:
            return torch.zeros(4, dtype=torch.float64) + 1

    monkeypatch.setattr(explorer.study, "gradient", gradient)
    settings = [(K, frames, on) for K in range(1, 4) for frames in FRAMES for on in (True, False)]
    before = alive()
    for K, frames, on in settings:
        explorer.measure(K=K, frames=frames, gradient_checkpointing=on)
        assert ("turned off" in explorer.table.value) == (len(explorer.measured) > 1)
    assert len(explorer.measured) == ROWS
    assert explorer.table.value.count("<tr>") == ROWS + 1
    again = Truncation(*settings[-3])
    explorer.measure(
        K=again.K, frames=again.frames, gradient_checkpointing=again.gradient_checkpointing
    )
    assert len(explorer.measured) == ROWS
    assert list(explorer.measured)[-1] == again
    assert alive() == before


def test_what_has_no_effect_is_disabled_and_says_why(micro):
    explorer = TruncationExplorer(micro, color(0), "a prompt")
    assert explorer.streaming.disabled
    assert "nothing to stream" in explorer.why.value
    explorer.streaming.value = False
    assert explorer.setting.streaming  # one frame is measured once, however the switch stands
    explorer.frames.value = "all"
    assert not explorer.streaming.disabled
    assert explorer.why.value == ""
    whole = TruncationExplorer(micro, color(0, EVIL, per_frame=False), EVIL)
    assert whole.frames.disabled
    assert whole.frames.value == "all"
    assert "scores the whole clip" in whole.why.value
    with pytest.raises(ValueError, match="frames must be one of all"):
        whole.measure(frames="ends")
    whole.measure(K=1)
    assert "script" not in Tags(shown(whole) + whole.to_html()).found


def test_pressing_measure_in_a_page(explorer):
    said = []
    explorer.remark.observe(lambda change: said.append(change["new"]), "value")

    async def page():
        explorer.measure_button.click()
        await explorer.jobs.task

    asyncio.run(page())
    assert explorer.setting in explorer.measured
    assert any("cannot be stopped midway" in text for text in said)
    assert explorer.remark.value == ""


def test_an_error_while_measuring_is_shown(micro):
    stuck = rewards.reward(
        lambda frames, prompts: frames.detach().mean((1, 2, 3, 4)), EVIL, per_frame=True
    )
    explorer = TruncationExplorer(micro, stuck, "a prompt")
    with pytest.raises(ValueError, match="has no gradient"):
        explorer.measure()
    assert "has no gradient" in explorer.remark.value
    assert "script" not in Tags(shown(explorer)).found
    assert not explorer.measured


def test_the_explorer_s_picture(explorer):
    explorer.measure(K=2, frames="all")
    tags = Tags(explorer.to_html())
    assert tags.found.count("img") == 1
    assert "3 of 3 frames" in tags.alts[0]
    assert "svg" not in tags.found  # which viewers of saved notebooks would throw away
    assert "<td>2</td><td>all</td>" in explorer.to_html()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward": "hpss"}, "unknown reward"),
        ({"prompt": " "}, "prompt is empty"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"reward": "action", "prompt": "nothing"}, "no action of the classifier"),
    ],
)
def test_what_cannot_be_explored(tiny, arguments, message):
    before = carried(tiny)
    with pytest.raises(ValueError, match=message):
        TruncationExplorer(tiny, **arguments)
    assert carried(tiny) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"K": 4}, "K must lie in 1..3"),
        ({"frames": "some"}, "frames must be one of random:1, ends, every:2, all"),
        ({"k": 1}, "unknown setting"),
    ],
)
def test_settings_the_explorer_does_not_know(explorer, changes, message):
    with pytest.raises(ValueError, match=message):
        explorer.measure(**changes)


# ------------------------------------------------------------------------------------------------------ planner


@pytest.fixture
def quick(monkeypatch):
    """Simulations at once: 20 GiB for a clip, half with sequential guidance. Lists what was simulated."""
    asked = []

    def simulate(model, reward, **settings):
        asked.append((model, reward, settings))
        halved = settings.get("sequential_guidance", False)
        peak = 20 * settings.get("batch_size", 1) / (2 if halved else 1)
        return {stage: int(GIB * (peak if stage == "replay" else 5)) for stage in STAGES}

    monkeypatch.setattr(planner, "simulate", simulate)
    monkeypatch.setattr(memory_planner, "simulate", simulate)
    return asked


def test_the_answer_is_memory_s():
    panel = MemoryPlanner("tiny", gpu_memory="L4")
    answer = panel.simulate()
    assert (
        answer.stages == vader_nb.memory("tiny", "hps", gpu_memory="L4", frames="random:1").stages
    )
    assert "<b>Fits:</b>" in panel.verdict.value
    assert panel.remark.value == ""


def test_nothing_is_simulated_before_it_is_asked_for(quick):
    panel = MemoryPlanner()
    panel.prepare()
    assert not quick
    assert panel.memory is None
    assert "Press “simulate”" in panel.verdict.value
    assert "not simulated yet" in panel.drawing.value
    assert "14.6 GiB" in panel.drawing.value
    assert "a margin of" not in panel.drawing.value
    assert not any(f"{number}.00" in panel.drawing.value for number in (5, 20))


def test_what_does_not_fit_is_told_with_the_way_out(quick):
    panel = MemoryPlanner(gpu_memory="T4")
    answer = panel.simulate()
    assert answer.bytes == 20 * GIB
    assert answer.suggestions == {"T4": {"sequential_guidance": True}}
    assert "<b>Does not fit:</b> 20.00 GiB" in panel.verdict.value
    assert "It fits with sequential_guidance=True" in panel.verdict.value
    assert Tags(panel.drawing.value).kinds.count("bar") == len(STAGES)
    assert panel.fit_button.layout.display == ""
    panel.fit_button.click()
    assert panel.sequential_guidance.value
    assert panel.memory.fits["T4"]
    assert "<b>Fits:</b>" in panel.verdict.value
    assert panel.fit_button.disabled
    assert panel.fit_button.layout.display == "none"


@pytest.mark.parametrize("saving", [{"quantize": "8bit"}, {"activation_offload": True}], ids=str)
def test_whatever_makes_it_fit_can_be_set(monkeypatch, saving):
    ((name, value),) = saving.items()

    def simulate(model, reward, **settings):
        return dict.fromkeys(STAGES, GIB if settings.get(name) == value else 20 * GIB)

    monkeypatch.setattr(planner, "simulate", simulate)
    monkeypatch.setattr(memory_planner, "simulate", simulate)
    panel = MemoryPlanner(gpu_memory="T4")
    assert panel.simulate().suggestions == {"T4": saving}
    panel.fit_button.click()
    assert panel.error is None and panel.memory.fits["T4"]
    assert name in panel.python


def test_what_never_fits_is_told_so(quick, monkeypatch):
    monkeypatch.setitem(GPUS, "T4", MARGIN)
    panel = MemoryPlanner(gpu_memory="T4")
    assert panel.simulate().suggestions == {"T4": None}
    assert "no setting is enough" in panel.verdict.value
    with pytest.raises(ValueError, match="no settings that fit are known"):
        panel.make_it_fit()


def test_another_gpu_needs_no_new_simulation(quick):
    panel = MemoryPlanner(gpu_memory="A100 40 GB")
    panel.simulate()
    panel.gpu_memory.value = "T4"
    assert len(quick) == 1
    assert "to search for settings that fit" in panel.verdict.value
    panel.batch_size.value = 2
    assert "Press “simulate”" in panel.verdict.value
    panel.batch_size.value = 1
    assert "<b>Does not fit:</b>" in panel.verdict.value


def test_pressing_simulate_in_a_page(quick):
    panel, said = MemoryPlanner(gpu_memory="T4"), []
    panel.remark.observe(lambda change: said.append(change["new"]), "value")

    async def page():
        panel.simulate_button.click()
        await panel.jobs.task

    asyncio.run(page())
    assert panel.memory
    assert any("cannot be stopped midway" in text for text in said)
    assert any("Searching, simulation 2" in text for text in said)
    assert panel.remark.value == ""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"K": 3, "frames": "all", "height": 320, "width": 576, "num_frames": 24},
        {
            "frames": "every:2",
            "batch_size": 4,
            "gradient_checkpointing": False,
            "sequential_guidance": True,
        },
        {"frames": "ends", "model_cpu_offload": True, "reward": "hps + 0.1 * aesthetic.towards(9)"},
    ],
)
def test_both_lines_of_code_ask_the_same(quick, monkeypatch, changes):
    panel = MemoryPlanner("zeroscope", gpu_memory="A100 80 GB")
    panel.set(**changes)
    asked = []

    def memory(model, reward, **settings):
        asked.append({"model": model, "reward": reward} | settings)

    monkeypatch.setattr(memory_planner, "memory", memory)
    eval(panel.python, {"vader_nb": SimpleNamespace(memory=memory)})
    words = shlex.split(panel.shell)
    assert words[:2] == ["vader-nb", "memory"]
    written = dict(word.split("=", 1) for word in words[2:])
    assert written == {name: str(value) for name, value in asked[0].items()}
    assert written["model"] == "zeroscope"
    assert written["reward"] == panel.reward.value
    assert written["gpu_memory"] == "A100 80 GB"
    step = Step.of(panel.model.value, panel.reward.value, panel.changes)
    by_hand = {name: value for name, value in changes.items() if name not in ("K", "reward")}
    by_hand = {"strategy": Last(changes.get("K", 1)), "frames": "random:1"} | by_hand
    assert step == Step.of("zeroscope", panel.reward.value, by_hand)


def test_a_type_of_numbers(quick):
    panel = MemoryPlanner()
    panel.dtype.value = "float32"
    assert Step.of("modelscope", "hps", panel.changes).dtype == torch.float32
    assert "dtype='float32'" in panel.python
    assert "dtype=float32" in panel.shell


def test_a_reward_that_cannot_be_read_is_told(quick):
    panel = MemoryPlanner()
    panel.reward.value = EVIL
    assert "cannot read the reward" in panel.remark.value
    assert panel.simulate_button.disabled
    assert "“Simulate” waits" in panel.why.value
    assert "script" not in Tags(shown(panel) + panel.to_html()).found
    with pytest.raises(ValueError, match="cannot read the reward"):
        panel.simulate()
    panel.reward.value = "hpss"
    assert "unknown reward &#x27;hpss&#x27;" in panel.remark.value
    assert "known rewards" in panel.remark.value
    panel.reward.value = "hps"
    assert panel.remark.value == panel.why.value == ""
    assert not panel.simulate_button.disabled
    assert not quick


def test_what_a_simulation_raises_is_shown(monkeypatch):
    def simulate(model, reward, **settings):
        raise ValueError("the action reward needs at least 2 frames; score all frames")

    monkeypatch.setattr(planner, "simulate", simulate)
    panel = MemoryPlanner(reward="action")
    panel.simulate_button.click()
    assert "score all frames" in panel.remark.value
    assert panel.progress.layout.visibility == "hidden"
    assert "not simulated yet" in panel.drawing.value


def test_the_model_decides_how_many_steps_there_are(quick):
    panel = MemoryPlanner("modelscope")
    panel.K.value = 20
    panel.model.value = "tiny"
    assert panel.K.max == panel.K.value == 10
    assert panel.error is None
    panel.model.value = "modelscope"
    assert panel.K.max == 25


def test_what_was_set_before_a_mistake_is_shown(quick, explorer):
    panel = MemoryPlanner("tiny")
    panel.set(K=20, model="modelscope")  # which has so many steps
    with pytest.raises(ValueError, match="K must lie in"):
        panel.set(batch_size=2, K=26)
    assert "batch_size=2" in panel.code.value
    panel.batch_size.value = 3
    assert "batch_size=3" in panel.code.value
    with pytest.raises(ValueError, match="frames must be one of"):
        explorer.set(K=2, frames="some")
    assert "the last 2 of 3 steps" in explorer.drawing.value


def test_a_pipeline_directory_is_a_model(quick, micro_directory):
    panel = MemoryPlanner(micro_directory)
    assert panel.model.value == str(micro_directory)
    assert str(micro_directory) in shlex.split(panel.shell)[2]


def test_the_planner_s_picture(quick):
    panel = MemoryPlanner(gpu_memory="T4")
    assert "svg" not in Tags(panel.to_html()).found
    assert Tags(panel.to_html()).alts == ["A T4 has 14.6 GiB."]
    panel.simulate()
    assert "replay 20.00" in Tags(panel.to_html()).alts[0]
    assert "<table>" in panel.to_html()


def test_planning_for_long_leaves_nothing_behind(quick):
    panel = MemoryPlanner(gpu_memory="A100 80 GB")
    before = alive()
    for i in range(200):
        panel.set(batch_size=1 + i % 3, num_frames=planner.LENGTHS[i % 9], K=1 + i % 25)
        panel.jobs.finish(panel._job)
    assert alive() == before
    assert len(panel.answers) <= planner.KEPT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "modelscop"}, "unknown model"),
        ({"reward": "hpss"}, "unknown reward"),
        ({"reward": "hps +"}, "cannot read the reward"),
        ({"gpu_memory": "T5"}, "unknown GPU 'T5'; choose one of T4"),
    ],
)
def test_what_cannot_be_planned(arguments, message):
    with pytest.raises(ValueError, match=message):
        MemoryPlanner(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hight": 64}, "unknown setting 'hight'; choose one of model"),
        ({"height": 65}, "height must be one of 0, 64"),
        ({"K": 26}, "K must lie in 1..25"),
        ({"gpu_memory": "T5"}, "gpu_memory must be one of"),
    ],
)
def test_settings_the_planner_does_not_know(quick, changes, message):
    with pytest.raises(ValueError, match=message):
        MemoryPlanner().simulate(**changes)


def test_a_composer_that_was_never_shown_makes_its_clips_when_it_is_asked(tiny):
    panel = RewardComposer(tiny, ["aesthetic"], prompts=["a", "b"])
    assert sorted(panel.order) == [0, 1]
