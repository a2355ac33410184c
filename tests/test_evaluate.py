"""The comparison is paired, its intervals are honest, and it grades what can be graded."""

import json
import math
import random
import sys
from dataclasses import asdict

import numpy as np
import pytest
import scipy.stats
import torch

from vader_nb import (
    Sampling,
    Validation,
    best_checkpoint,
    cli,
    load,
    lora,
    prompts,
    report,
    rewards,
    sample,
)
from vader_nb.best import choose
from vader_nb.checkpoints import random_states, set_random_states
from vader_nb.distributed import launch
from vader_nb.evaluation import (
    BASE,
    evaluate,
    motion,
    named_adapters,
    paired_row,
    thumbnails,
    unique_metrics,
    videomae_features,
)
from vader_nb.stats import (
    expanded_quantile,
    paired_interval,
    proportions_interval,
    sign_flip_p,
)
from vader_nb.trainer import Run
from vader_nb.widgets import Sampler

from .test_gradient import adapted

QUICK = Sampling(num_inference_steps=2)
GROUPS = {"training": ["a red star", "a blue circle"], "held-out": ["a green square growing"] * 3}


def test_prompts_that_a_judge_cannot_read_are_found_before_the_work(micro):
    judge, unreadable = rewards.action("tiny"), {"held-out": ["a cat asleep"]}
    with pytest.raises(ValueError, match="no action .*'a cat asleep'"):
        evaluate(micro, None, rewards.brightness(), unreadable, held_out=[judge])
    with pytest.raises(ValueError, match="no action .*'a cat asleep'"):
        Validation(micro, judge, ["a cat asleep"])


@pytest.mark.parametrize("start", [evaluate, sample, Sampler], ids=lambda f: f.__name__)
def test_a_models_name_is_no_model(start):
    given = {evaluate: (None, rewards.brightness(), ["a"]), sample: ("a",)}.get(start, ())
    with pytest.raises(TypeError, match=r"'tiny' is only a name: pass vader_nb.load\('tiny'\)"):
        start("tiny", *given)


def test_an_adapter_that_does_nothing_makes_no_difference(micro):
    adapter = lora.add(micro, rank=2)
    evaluation = evaluate(micro, adapter, rewards.brightness(), GROUPS, progress=False)
    assert {row.metric for row in evaluation.rows} == {"brightness", "motion", "diversity"}
    assert evaluation.row("held-out", "motion").label == "motion"
    assert evaluation.row("held-out", "diversity").label == "diversity (8x8 pixels)"
    assert "diversity (8x8 pixels)" in str(evaluation)
    for row in evaluation.rows:
        assert row.difference == row.low == row.high == 0 and not row.significant
    one = evaluate(micro, adapter, rewards.brightness(), ["a red star"], progress=False)
    assert one.row("prompts", "brightness").texts()[3:5] == [
        "",
        "",
    ]  # of one prompt nothing is known
    assert evaluation.row("held-out", "motion").prompts == 3
    assert all(row.win_rate == 0.5 for row in evaluation.rows)  # ties
    with pytest.raises(KeyError, match="'training', 'brightness'"):
        evaluation.row("training", "hps")


def test_base_and_adapter_are_what_sampling_gives(micro):
    adapter = adapted(micro)
    evaluation = evaluate(
        micro,
        adapter,
        rewards.brightness(),
        {"all": GROUPS["training"]},
        seeds_per_prompt=1,
        seed=7,
        progress=False,
    )
    prompts, base, after = evaluation.clips["all"]
    assert prompts == GROUPS["training"]
    torch.testing.assert_close(after, sample(micro, prompts, seeds=7, adapter=adapter))
    with adapter.disabled():
        torch.testing.assert_close(base, sample(micro, prompts, seeds=7))
    row = evaluation.row("all", "brightness")
    assert row.adapter - row.base == pytest.approx(row.difference, abs=1e-6)
    assert row.base == pytest.approx(base.mean().item(), abs=1e-5)
    assert "brightness" in str(evaluation)
    assert not any(r.metric == "diversity" for r in evaluation.rows)  # one seed has none


def test_with_model_offload_a_judge_has_its_turn_and_leaves(micro):
    """Moved behind the model's back it would stay on the GPU beside the denoiser, through all the training."""

    class Judge(rewards.Reward):
        name, per_frame, networks = "judge", False, [torch.nn.Linear(1, 1).requires_grad_(False)]

        def to(self, *args):
            raise AssertionError("moved without the others' leaving")

        def __call__(self, frames, prompts):
            assert micro.offloader.loaded == self.networks
            return frames.mean(dim=(1, 2, 3, 4))

    micro.enable_model_cpu_offload()
    adapter = lora.add(micro, 2)
    assert evaluate(micro, adapter, Judge(), GROUPS, progress=False).row("held-out", "judge")
    assert Validation(micro, Judge(), GROUPS["training"])(adapter)["judge"] > 0
    sample(micro, "a red star", sampling=Sampling(num_inference_steps=1))  # whatever comes next
    assert not set(Judge.networks) & set(micro.offloader.loaded)


def test_oracles_join_in_for_captions_of_the_world(tiny):
    adapter = lora.add(tiny, rank=1)
    try:
        captions = [
            "a red star moving left on a white background",
            "a blue circle growing on a black background",
        ]
        evaluation = evaluate(
            tiny,
            adapter,
            rewards.brightness(),
            {"all": captions},
            sampling=Sampling(num_inference_steps=1),
            progress=False,
        )
    finally:
        adapter.remove()
    judged = {r.metric for r in evaluation.rows if r.held_out}
    assert {"oracle: color", "oracle: shape", "oracle: motion", "oracle: background"} <= judged
    assert not {"brightness", "motion", "diversity"} & judged


# ------------------------------------------------------------------------------------------- several adapters


@pytest.fixture
def weaker(micro, tmp_path):
    """The path of an adapter at half strength, and the strong one on the model."""
    strong = adapted(micro)
    with torch.no_grad():
        for a, b in zip(strong.parameters()[::2], strong.parameters()[1::2]):
            a.mul_(0.5), b.mul_(0.5)
    path = strong.save(tmp_path / "weak" / "adapter.safetensors")
    with torch.no_grad():
        for p in strong.parameters():
            p.mul_(2)
    return path.parent, strong


def test_several_adapters_are_each_what_it_is_alone(micro, weaker, tmp_path):
    folder, strong = weaker
    before = {name: value.clone() for name, value in micro.denoiser.state_dict().items()}
    options = {"sampling": QUICK, "progress": False, "batch_size": 2}
    both = evaluate(
        micro, {"weak": folder, "strong": strong}, rewards.brightness(), GROUPS, **options
    )
    assert {row.name for row in both.rows} == {"weak", "strong"}
    for name, entry in {"weak": folder / "adapter.safetensors", "strong": strong}.items():
        alone = evaluate(micro, {name: entry}, rewards.brightness(), GROUPS, **options)
        assert alone.rows == [row for row in both.rows if row.name == name]
    weak, strongest = (both.row("training", "brightness", name) for name in ("weak", "strong"))
    assert weak.base == strongest.base and weak.adapter != strongest.adapter
    nothing = evaluate(micro, None, rewards.brightness(), GROUPS, **options)
    assert (
        nothing.row("training", "brightness").base == weak.base
    )  # the adapter on the model has no part in it
    assert nothing.row("training", "brightness").difference is None
    assert "brightness" in str(nothing) and "difference" not in str(nothing)  # one column, no notes

    after = micro.denoiser.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    strong.remove()  # it was back on the model, the same object as ever
    assert not any("lora" in name for name in micro.denoiser.state_dict())

    prompts, *clips = both.clips["held-out"]
    assert (
        len(prompts) == 6
        and len(clips) == 3
        and list(both.gallery("held-out").rows) == [BASE, "weak", "strong"]
    )
    both.save(tmp_path)
    assert {"weak", "strong"} == {
        row["name"]
        for row in json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    }
    assert len(list((tmp_path / "clips").iterdir())) == 4
    nothing.save(tmp_path / "base")
    for evaluation in (both, nothing):
        evaluation.report(tmp_path / "report.html")
        assert "brightness" in str(evaluation)


def test_wrong_adapters_are_found_before_the_work(micro, weaker, tmp_path):
    folder, strong = weaker

    def never(frames, prompts):
        raise AssertionError("sampled before all adapters were looked at")

    def refused(adapter, error, match, **options):
        with pytest.raises(error, match=match):
            evaluate(micro, adapter, never, {"all": ["a red star"]}, progress=False, **options)

    refused({"there": folder, "missing": tmp_path / "none"}, FileNotFoundError, "no adapter file")
    refused({"base": folder}, ValueError, "without one")
    refused(folder, ValueError, "batch_size must be at least 1", batch_size=0)
    refused(folder, ValueError, "cannot be held out", held_out=[never])
    with pytest.raises(ValueError, match="no group of prompts"):
        evaluate(micro, folder, never, {}, progress=False)
    with pytest.raises(ValueError, match="'empty' has no prompts"):
        evaluate(micro, folder, never, {"empty": []}, progress=False)
    strong.remove()
    refused(strong, ValueError, "give its file")


def test_held_out_rewards_are_marked(micro, weaker, tmp_path):
    evaluation = evaluate(
        micro,
        weaker[0],
        2.0 * rewards.brightness(),
        GROUPS,
        held_out=[rewards.colorfulness()],
        progress=False,
        sampling=QUICK,
        keep=2,
    )
    assert {row.metric for row in evaluation.rows if row.held_out} == {"colorfulness"}
    assert "colorfulness †" in str(evaluation) and "† not trained on" in str(evaluation)
    page = evaluation.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("not trained on</span>") == 2  # once a group


def test_rows_as_a_data_frame(micro, monkeypatch):
    options = {"sampling": QUICK, "progress": False}
    evaluation = evaluate(micro, lora.add(micro, 2), rewards.brightness(), GROUPS, **options)
    table = evaluation.to_pandas()
    assert len(table) == len(evaluation.rows) == 6
    assert table.to_dict("records") == [
        asdict(row) | {"significant": row.significant} for row in evaluation.rows
    ]
    assert {"group", "metric", "base", "adapter", "low", "high", "prompts"} <= set(table.columns)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        evaluation.to_pandas()


@pytest.mark.filterwarnings("ignore:left out")
def test_a_text_is_a_set_or_a_file_of_prompts_not_letters(micro, tmp_path):
    """It was taken for a list of prompts, each a letter."""
    shown = []

    def spy(frames, texts):
        shown.extend(texts)
        return frames.mean(dim=(1, 2, 3, 4))

    captions = prompts.get("tiny_held_out")
    path = tmp_path / "mine.txt"
    path.write_text("a red star\na blue circle\n", encoding="utf-8")
    options = {"sampling": Sampling(num_inference_steps=1), "seeds_per_prompt": 1}
    options |= {"progress": False, "keep": 1, "batch_size": 100}
    result = evaluate(micro, None, spy, {"held-out": "tiny_held_out", "file": path}, **options)
    assert shown == [*captions, "a red star", "a blue circle"]
    assert result.row("held-out", "spy").prompts == len(captions) == 200
    for one in (str(path), ["a red star", "a blue circle"]):  # a single group needs no name
        assert evaluate(micro, None, spy, one, **options).row("prompts", "spy").prompts == 2
    with pytest.raises(FileNotFoundError, match="'tiny'"):
        evaluate(micro, None, spy, "tinny", **options)
    shown.clear()
    Validation(micro, spy, path, sampling=options["sampling"])(lora.add(micro, 2))
    assert shown == ["a red star", "a blue circle"]


def dark(frames, prompts):
    return -frames.mean(dim=(1, 2, 3, 4))


def bright(frames, prompts):
    return frames.mean(dim=(1, 2, 3, 4))


def test_rewards_are_told_apart_by_what_they_are_not_by_their_names(micro):
    """Of two rewards of one name one was missing, and a held-out one was called trained on."""
    one, other = rewards.reward(bright, "score"), rewards.reward(dark, "score")
    options = {"sampling": QUICK, "progress": False}

    def run(trained, **more):
        return evaluate(micro, None, trained, {"all": ["a red star"]}, **options, **more)

    for trained, held_out in (([one, other], []), (one, [other]), ([], [one, other])):
        with pytest.raises(ValueError, match="two rewards are named 'score'") as error:
            run(trained, held_out=held_out)
        assert one.fingerprint in str(error.value) and other.fingerprint in str(error.value)
    result = run(one, held_out=[other.renamed("darkness")])
    assert result.row("all", "score").base == pytest.approx(-result.row("all", "darkness").base)
    assert result.row("all", "darkness").held_out and not result.row("all", "score").held_out
    metrics = [row.metric for row in run([one, rewards.reward(bright, "score")]).rows]
    assert metrics == ["score", "motion", "diversity"]
    with pytest.raises(ValueError, match="cannot be held out"):
        run(one, held_out=[one.renamed("another")])


def test_names_and_rewards_in_conflict_are_found_before_the_work(micro):
    def refused(match, trained, *held_out):
        with pytest.raises(ValueError, match=match):
            evaluate(micro, None, trained, ["a red star"], held_out=held_out, progress=False)
        with pytest.raises(ValueError, match=match):
            unique_metrics(trained, held_out)

    def never(frames, prompts):
        raise AssertionError("sampled before the names were looked at")

    one = rewards.reward(never, "one")
    for name in ("motion", "diversity", "oracle: color"):
        refused(f"is named '{name}', like a metric that evaluate adds", one.renamed(name))
        refused(f"is named '{name}'", [], one.renamed(name))
    both = one + rewards.brightness()
    refused("brightness is trained on", both, rewards.brightness())
    refused("2 × brightness: brightness is trained on", both, 2 * rewards.brightness())
    refused("trained on", one, one.renamed("another"))
    with pytest.raises(ValueError, match="is named 'motion'"):
        Validation(micro, one.renamed("motion"), ["a red star"])


def test_the_shell_says_so_before_it_trains(tmp_path, capsys):
    words = f"align reward=brightness held_out_reward=brightness name=mine output_dir={tmp_path}"
    with pytest.raises(SystemExit) as ended:
        cli.main(words.split())
    assert ended.value.code == 2 and "cannot be held out" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_what_needs_more_frames_is_an_error_or_left_out(tiny):
    """Clips of one frame had motion nan, and an oracle of motion that said 0."""
    short = Sampling(num_inference_steps=1, num_frames=1)
    captions = ["a red star moving left on a white background"] * 2
    options = {"sampling": short, "progress": False, "features": videomae_features("tiny")}
    with pytest.warns(UserWarning, match="motion, oracle: motion, diversity; num_frames=1") as told:
        result = evaluate(tiny, None, rewards.brightness(), captions, **options)
    assert len([warning for warning in told if "left out" in str(warning.message)]) == 1
    metrics = [row.metric for row in result.rows]
    assert metrics == ["brightness"] + [
        f"oracle: {name}" for name in ("color", "shape", "background", "color and shape")
    ]
    action, smooth = rewards.action("tiny"), 0.5 * rewards.motion_smoothness()
    for reward, least in (
        (action, "action needs at least 2"),
        (smooth, "smoothness needs at least 3"),
    ):
        for start in (evaluate, lambda model, _, *rest, **more: Validation(model, *rest, **more)):
            with pytest.raises(ValueError, match=f"{least} frames, got 1"):
                start(tiny, None, reward, captions, sampling=short)


def test_draws_of_a_reward_change_none_outside(micro):
    def numbers():
        return torch.rand(1).item(), np.random.uniform(), random.random()  # noqa: NPY002

    def lucky(frames, prompts):
        return frames.mean(dim=(1, 2, 3, 4)) + sum(numbers())

    adapter = lora.add(micro, 2)
    validation = Validation(micro, lucky, ["a red star"], sampling=QUICK)

    states = random_states()
    expected = numbers()
    for draw in (
        lambda: validation(adapter),
        lambda: evaluate(micro, adapter, lucky, ["a red star"], sampling=QUICK, progress=False),
    ):
        set_random_states(states)
        draw()
        assert numbers() == expected


def test_adapters_are_whatever_a_model_can_use(micro, weaker, tmp_path):
    """A file at half its weight, a run and an adapter; each is what sampling with it gives."""
    folder, strong = weaker
    run = Run(strong, [], tmp_path)
    mixed = {folder / "adapter.safetensors": 0.5}
    assert named_adapters(mixed) == {"adapter": mixed}
    options = {"sampling": QUICK, "seeds_per_prompt": 1, "progress": False, "seed": 3}
    texts = GROUPS["training"]
    result = evaluate(micro, {"mixed": mixed, "run": run}, bright, texts, **options)
    assert evaluate(micro, mixed, bright, texts, **options).adapters == ["adapter"]
    for clips, which in zip(result.clips["prompts"][1:], (None, mixed, run)):
        expected = sample(micro, texts, seeds=3, sampling=QUICK, adapter=which)
        torch.testing.assert_close(clips, expected)


def test_a_report_escapes_names_too(micro, weaker, tmp_path):
    evil = "<script>alert(1)</script>"
    judge = rewards.reward(lambda frames, prompts: frames.mean(dim=(1, 2, 3, 4)), evil)
    evaluation = evaluate(
        micro,
        {evil: weaker[0], "&": weaker[1]},
        judge,
        {evil: [evil, "a red star"]},
        progress=False,
        sampling=QUICK,
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(evil, encoding="utf-8")
    row = {"step": 1, "reward": 0.1, "grad_norm": 1.0}
    choice = choose({0: None, 20: tmp_path}, torch.zeros(2, 3, dtype=torch.float64), {}, evil)
    choice.verdict += evil
    page = evaluation.report(
        tmp_path / "r.html", Run(weaker[1], [row, row], tmp_path / "run"), choice
    ).read_text(encoding="utf-8")
    assert evil not in page and page.count("&lt;script&gt;") > 5
    assert page.count("<svg") == 3


# ------------------------------------------------------------------------------------------- statistics


def test_win_rate_and_interval_of_a_known_case():
    base = torch.zeros(2, 8)
    after = torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, -1], [1, 1, 1, 1, 0, 0, 0, -1]])
    row = paired_row("all", "score", base, after, "adapter", False)
    assert row.win_rate == (11 + 3 / 2) / 16
    means = torch.tensor([1, 1, 1, 1, 0.5, 0.5, 0.5, -1])  # over the seeds of a prompt
    assert row.difference == pytest.approx(means.mean().item())
    assert (row.low, row.high) == paired_interval(means)
    reach = scipy.stats.t.isf(0.025, 7) * means.std().item() / 8**0.5
    assert row.high == pytest.approx(row.difference + reach)
    assert row.low < row.difference - reach  # where the tail is, the bootstrap-t reaches further


def test_intervals_of_zeros_and_ones():
    """Eight prompts without a change had the interval from 0 to 0."""
    for count in (8, 32):  # without a change Tango's interval is +-z^2 / (n + z^2)
        same = paired_row("all", "oracle", torch.ones(2, count), torch.ones(2, count), "a", True)
        reach = 1.959964**2 / (count + 1.959964**2)
        assert (same.low, same.high) == pytest.approx((-reach, reach), abs=1e-6)
        assert same.p == 1 and not same.significant and "+0.000 to" not in same.texts()[3]
    # Airway hyper-responsiveness before and after a transplantation (Fagerland et al. 2014)
    assert proportions_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=6e-4)
    assert proportions_interval(8, 0, 8)[1] == pytest.approx(1)
    base, after = torch.zeros(1, 8), torch.tensor([[1.0, 1, 1, 1, 1, 0, 0, 0]])
    row = paired_row("all", "oracle", base, after, "a", True)  # five of five: 2 / 2 ** 5
    assert row.low > 0 and row.p == pytest.approx(0.0625) and not row.significant
    assert row.texts()[4] == "0.062"
    row = paired_row("all", "oracle", base, torch.ones(1, 8), "a", True)
    assert row.p == pytest.approx(2**-7) and row.significant


def test_the_test_of_signs_is_exact():
    assert sign_flip_p(torch.tensor([1.0] * 6 + [0] * 20 + [-1])) == pytest.approx(16 / 128)
    assert sign_flip_p(torch.tensor([3.0, 2, 1])) == pytest.approx(2 / 8)
    assert sign_flip_p(torch.zeros(9)) == 1 and math.isnan(sign_flip_p(torch.tensor([1, math.nan])))
    strong = torch.linspace(0.1, 1, 40)
    assert sign_flip_p(strong) < 0.001
    assert paired_row("all", "x", 0 * strong[None], strong[None], "a", True).texts()[4] == "<0.001"


def test_one_clip_without_a_score_spoils_its_own_row_only(micro, tmp_path):
    """A reward that gave NaN, once: everything can still be printed, saved and reported."""

    def moody(frames, prompts):
        value = frames.mean(dim=(1, 2, 3, 4))
        return value * torch.tensor([1.0, float("nan"), *[1.0] * (len(value) - 2)])

    options = {"sampling": QUICK, "keep": 2, "progress": False}
    evaluation = evaluate(micro, adapted(micro), [moody, rewards.brightness()], GROUPS, **options)
    row = evaluation.row("training", "moody")
    assert row.texts()[1:4] == ["nan", "nan", "nan to nan"] and not row.significant
    assert (
        "nan to nan" in str(evaluation)
        and "nan" not in evaluation.row("training", "brightness").texts()
    )
    evaluation.save(tmp_path)
    text = (tmp_path / "evaluation.json").read_text(encoding="utf-8")
    assert "NaN" not in text and None in [row["base"] for row in json.loads(text)]
    assert "nan to nan" in evaluation.report(tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_checkpoint_without_a_score_is_not_the_best_and_hides_no_difference():
    means = judged(0, 1, 2, 1.5, 1)
    means[1, 3] = float("nan")
    choice = choose(STEPS, means, RISING, "pick")
    assert (
        choice.step == 40
        and choice.verdict
        == "the training reward still rises; the held-out reward has fallen since step 40"
    )


def test_a_few_prompts_make_nothing_significant():
    base = torch.zeros(1, 5)
    assert not paired_row("all", "score", base, base + 1, "adapter", False).significant
    base = torch.zeros(1, 6)
    assert paired_row("all", "score", base, base + 1, "adapter", False).significant


def test_students_quantiles():
    z = scipy.stats.norm.isf(0.025)
    for count, quantile in ((7, 2.447), (11, 2.228), (31, 2.042)):
        assert expanded_quantile(z, count) / (count / (count - 1)) ** 0.5 == pytest.approx(
            quantile, abs=0.02
        )


KINDS = {
    "normal": (lambda rng, n: rng.standard_normal(n), 0.0),
    "heavy-tailed": (lambda rng, n: rng.standard_t(3, n), 0.0),
    "skewed": (lambda rng, n: np.exp(rng.standard_normal(n) / 2), math.exp(1 / 8)),
    "exponential": (lambda rng, n: rng.exponential(size=n), 1.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_interval_covers_as_often_as_it_says(kind):
    draw, truth = KINDS[kind]
    rng, covered = np.random.default_rng(0), []
    for count in (6, 8, 16, 32):
        for seed in range(300):
            low, high = paired_interval(torch.tensor(draw(rng, count)), seed)
            covered.append(low <= truth <= high)
    assert 0.93 <= np.mean(covered) <= 0.98


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_the_interval_of_zeros_and_ones_covers_whatever_seeds_have_in_common(seeds):
    rng = np.random.default_rng(0)
    for gain, loss in ((0.02, 0.02), (0.05, 0), (0.1, 0.05), (0.25, 0), (0.3, 0.1)):
        for alike in (0, 0.5, 1) if seeds > 1 else (0,):  # chance that a prompt's clips all agree
            covered = []
            for count in (6, 8, 16, 32):
                for _ in range(40):
                    luck = rng.random((seeds, count))
                    luck = np.where(rng.random(count) < alike, luck[0], luck)
                    up, down = luck < gain, luck > 1 - loss
                    bounds = proportions_interval(up.mean(0).sum(), down.mean(0).sum(), count)
                    covered.append(bounds[0] <= gain - loss <= bounds[1])
            assert np.mean(covered) >= 0.93


def test_motion_and_features():
    still = torch.full((1, 4, 3, 16, 16), 0.3)
    moving = still + torch.arange(4).view(1, 4, 1, 1, 1) * 0.1
    assert motion(still).item() == 0
    assert motion(moving).item() == pytest.approx(0.1, abs=1e-6)
    assert thumbnails(still).shape == (1, 4 * 3 * 8 * 8)


def test_videomae_features_tell_clips_apart_and_take_any_number_of_frames():
    features = videomae_features("tiny")
    clips = torch.rand(2, 16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole, odd = features(clips), features(clips[:, :5])
    assert whole.shape == odd.shape and whole.shape[0] == 2 and whole.isfinite().all()
    assert not torch.allclose(whole[0], whole[1])


# ------------------------------------------------------------------------------------------- checkpoints

STEPS = {0: None, 20: "a", 40: "b", 60: "c", 80: "d"}
RISING = {step: step / 100 + (step % 3) / 500 for step in range(1, 81)}
FLAT = {step: 0.5 + (step % 3) / 500 for step in range(1, 81)}


def judged(*means, prompts=16, noise=0.1):
    """Held-out scores (checkpoints, prompts) with these means: prompts differ more than checkpoints do."""
    generator = torch.Generator().manual_seed(1)
    easy = torch.randn(1, prompts, generator=generator, dtype=torch.float64)
    own = noise * torch.randn(len(means), prompts, generator=generator, dtype=torch.float64)
    return (
        torch.tensor(means, dtype=torch.float64)[:, None] + easy + own - own.mean(1, keepdim=True)
    )


@pytest.mark.parametrize(
    ("means", "trained", "best", "verdict"),
    [
        (
            [0, 1, 2, 1.5, 1],
            RISING,
            40,
            "the training reward still rises; the held-out reward has fallen since step 40",
        ),
        (
            [0, 1, 2, 1.5, 1],
            FLAT,
            40,
            "the training reward stays about where it was; the held-out reward has fallen since step 40",
        ),
        (
            [0, 1, 2, 1.5, 1],
            {s: -r for s, r in RISING.items()},
            40,
            "the training reward falls too; the held-out reward has fallen since",
        ),
        (
            [0, 1, 2, 1.5, 1],
            {},
            40,
            "too few steps to tell what the training reward did; the held-out reward has fallen since step 40",
        ),
        (
            [0, 1, 2, 3, 4],
            RISING,
            80,
            "the held-out reward is highest at the last checkpoint, step 80",
        ),
        ([0, 1, 2.01, 2, 2], RISING, 40, "no clear difference between step 40, where"),
        ([0, 0, 0.01, 0, 0], RISING, 40, "step 40 is not clearly better than the base model"),
        (
            [3, 0, 2, 1.5, 1],
            RISING,
            40,
            "fallen since step 40; even there it is below the base model's",
        ),
    ],
)
def test_the_verdict_says_what_the_intervals_bear(means, trained, best, verdict):
    choice = choose(STEPS, judged(*means), trained, "pick")
    assert (choice.step, choice.path) == (best, STEPS[best])
    assert verdict in choice.verdict
    assert [point.step for point in choice.points] == list(STEPS)
    assert choice.best.difference == choice.best.low == choice.best.high == 0
    assert choice.points[0].reward is None and (choice.points[1].reward is None) == (not trained)
    assert "pick" in str(choice) and len(choice.plot().axes) == 2
    few = choose(STEPS, judged(*means, prompts=5), trained, "pick")
    assert "5 prompts are too few" in few.verdict


def test_nothing_fell_where_nothing_happened():
    """The luckiest of nine equal checkpoints is not "clearly better" than the last more often than it may be."""
    generator = torch.Generator().manual_seed(0)
    false = 0
    for _ in range(100):
        means = torch.randn(9, 12, generator=generator, dtype=torch.float64)
        false += "fell" in choose({20 * i: None for i in range(9)}, means, {}, "pick").verdict
    assert false <= 5


def killed_run(folder, adapter):
    """A run's folder with three checkpoints, half a fourth, and half a line of metrics."""
    adapter.scale = 1.0
    for step, scale in ((20, 0.5), (40, 1.0), (60, 0.25)):
        with torch.no_grad():
            for b in adapter.parameters()[1::2]:
                b.mul_(scale)
        adapter.save(folder / "checkpoints" / f"step-{step:06d}" / "adapter.safetensors")
        with torch.no_grad():
            for b in adapter.parameters()[1::2]:
                b.div_(scale)
    (folder / "checkpoints" / "step-000080.part").mkdir()
    rows = [{"step": step, "reward": RISING[step], "grad_norm": 1.0} for step in range(1, 61)]
    rows[10] = {"step": 11, "skipped": "not finite"}
    lines = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 61, "rew'
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def test_the_best_checkpoint_of_a_run(micro, weaker, tmp_path):
    """Real adapters of a real model; the held-out reward is what one of them does most of."""
    folder, strong = weaker
    groups = {
        "all": [
            f"a {color} {shape}"
            for color in ("red", "blue")
            for shape in ("star", "circle", "square")
        ]
    }
    options = {"seeds_per_prompt": 1, "progress": False, "sampling": QUICK}
    up = (
        evaluate(micro, strong, rewards.brightness(), groups, **options)
        .row("all", "brightness")
        .difference
        > 0
    )
    held_out = rewards.brightness() * (1.0 if up else -1.0)
    run = killed_run(tmp_path / "run", strong)

    choice = best_checkpoint(run, micro, held_out, groups["all"], **options)
    assert [point.step for point in choice.points] == [0, 20, 40, 60]
    direct = {"s": run / "checkpoints" / "step-000040"}
    row = evaluate(micro, direct, held_out, groups, **options).row("all", held_out.name)
    assert choice.points[2].held_out == pytest.approx(row.adapter, abs=1e-9)
    assert choice.points[0].held_out == pytest.approx(row.base, abs=1e-9)
    assert choice.best.held_out == max(point.held_out for point in choice.points[1:])
    assert choice.points[1].reward == pytest.approx(
        sum(RISING[s] for s in range(1, 21) if s != 11) / 19
    )
    assert (choice.path / "adapter.safetensors").is_file()

    # With the trained reward scored on the same clips; the choice is the same.
    colorful = rewards.colorfulness()
    same = best_checkpoint(run, micro, held_out, groups["all"], trained=colorful, **options)
    row = evaluate(micro, direct, colorful, groups, **options).row("all", colorful.name)
    assert same.points[2].reward == pytest.approx(row.adapter, abs=1e-9)
    assert same.points[0].reward == pytest.approx(row.base, abs=1e-9)
    assert same.step == choice.step and same.points[2].low == choice.points[2].low
    above, below = same.plot().axes
    assert "same prompts" in above.get_ylabel() and "batches" in choice.plot().axes[0].get_ylabel()
    (bars,) = below.containers  # of all but the best: one has no interval to itself
    others = [point for point in same.points if point is not same.best]
    assert list(bars.lines[0].get_ydata()) == [point.difference for point in others]
    assert strong.layers and any("lora" in name for name in micro.denoiser.state_dict())
    with pytest.raises(FileNotFoundError, match="is this a run's folder"):
        best_checkpoint(tmp_path, micro, held_out, groups["all"])


# ------------------------------------------------------------------------------------------- processes and size


def compare_and_write(directory, adapter, path):
    """Writes the rows and clips of an evaluation, per process."""
    model = load(directory, dtype=torch.float32)
    model.defaults |= {
        "num_inference_steps": 3,
        "num_frames": 2,
        "height": 16,
        "width": 16,
        "guidance_scale": 2.0,
    }
    groups = {
        "training": ["a red star"] * 7,
        "held-out": ["a blue circle", "a green square growing"],
    }
    options = {"batch_size": 3, "keep": 5, "progress": False}
    result = evaluate(model, {"a": adapter}, rewards.brightness(), groups, **options)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    path = path.with_name(f"{path.name}-rank{rank}")
    path.with_suffix(".json").write_text(json.dumps([asdict(row) for row in result.rows]))
    clips = [clip for _, *clips in result.clips.values() for clip in clips]
    torch.save(clips, path.with_suffix(".pt"))


def test_two_processes_find_what_one_does(micro_directory, weaker, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes, because sums round by their order
    try:
        compare_and_write(micro_directory, weaker[0], tmp_path / "one")
    finally:
        torch.set_num_threads(threads)
    launch(compare_and_write, micro_directory, weaker[0], tmp_path / "two")
    one, *both = (tmp_path / f"{name}.json" for name in ("one-rank0", "two-rank0", "two-rank1"))
    assert (
        one.read_text(encoding="utf-8")
        == both[0].read_text(encoding="utf-8")
        == both[1].read_text(encoding="utf-8")
    )
    clips = [torch.load(path.with_suffix(".pt"), weights_only=True) for path in (one, *both)]
    assert [len(clip) for clip in clips[0]] == [5, 5, 4, 4]
    for parts in zip(*clips):
        assert torch.equal(parts[0], parts[1]) and torch.equal(parts[0], parts[2])


def test_many_clips_are_not_kept(micro, monkeypatch):
    """Only `keep` of them, whatever their number; prompts come from a lazy sequence."""
    alive = []

    def spy(frames, prompts):
        alive.append(len(frames))
        return frames.mean(dim=(1, 2, 3, 4))

    texts = prompts.nouns_activities()[:40]
    options = {
        "sampling": Sampling(num_inference_steps=1),
        "seeds_per_prompt": 1,
        "keep": 3,
        "progress": False,
    }
    evaluation = evaluate(micro, None, spy, {"all": texts}, **options)
    assert sum(alive) == 40 and evaluation.row("all", "spy").prompts == 40
    assert [len(clips) for clips in evaluation.clips["all"]] == [3, 3]
    assert (
        evaluation.clips["all"][1].untyped_storage().nbytes() == evaluation.clips["all"][1].nbytes
    )


@pytest.mark.parametrize("steps", [[2], [1, 2]])
def test_the_axis_of_a_short_run_has_whole_steps(steps):
    rows = [{"step": step, "reward": 7.0, "grad_norm": 7.0} for step in steps]
    for curve in report.curves(rows):  # whose ticks have their text as a comment
        assert "<!-- 2 -->" in curve
        assert "<!-- 1." not in curve
