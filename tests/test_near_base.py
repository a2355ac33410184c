"""What keeps a run near the base: each option acts, resumes, and costs nothing when off. And guidance without training."""

import json

import diffusers
import pytest
import torch

from vader_nb import checkpoints, evaluate, load, lora, sample
from vader_nb.checkpoints import list_checkpoints
from vader_nb.gradient import rolled_out
from vader_nb.guidance import RewardGuidance
from vader_nb.near_base import pull_to_base
from vader_nb.offload import recomputation
from vader_nb.rewards import brightness
from vader_nb.sampling import Sampling
from vader_nb.strategies import DirectAlign, DRaFTLV, DRTune, Last, LeapAlign, ReFL
from vader_nb.testing import adapted, take_gradient
from vader_nb.trainer import align

PROMPTS, SEEDS = ["a red star", "a blue circle growing"], [3, 8]
FAST = {"batch_size": 2, "rank": 2, "progress": False, "learning_rate": 1e-2}
TIMES = {"seconds", "clips_per_second", "peak_memory"}


@pytest.fixture
def fresh(micro_directory):
    def make():
        model = load(micro_directory, dtype=torch.float32)
        sizes = {"num_frames": 2, "height": 16, "width": 16}
        model.defaults |= sizes | {"num_inference_steps": 3, "guidance_scale": 3.0}
        return model

    return make


def run(model, folder, **options):
    options = FAST | {"checkpointing_steps": 1, "output_dir": folder} | options
    return align(model, brightness(), PROMPTS, **options)


def weights(adapter) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in adapter.parameters()])


def untimed(metrics):
    return [{name: row[name] for name in row.keys() - TIMES} for row in metrics]


def assert_resumes(fresh, folder, whole, **options):
    """The first 2 steps, and the rest in another call, are the whole; without a bit of difference."""
    run(fresh(), folder, **options | {"steps": 2})
    again = run(fresh(), folder, resume=True, **options)
    assert untimed(again.metrics) == untimed(whole.metrics)
    assert torch.equal(weights(again.adapter), weights(whole.adapter))
    saved = [(one.folder / "adapter.safetensors").read_bytes() for one in (again, whole)]
    assert saved[0] == saved[1]


# ------------------------------------------------------------------------------ the distance to the base


def mean_and_std(scheduler, t, eta) -> tuple[float, float]:
    """DDIM (arXiv 2010.02502, equation 12): how the step's mean moves with the predicted noise; its noise."""
    before = int(t) - 1000 // scheduler.num_inference_steps
    now = scheduler.alphas_cumprod[int(t)].double()
    then = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
    std = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
    moved = (1 - then - std**2).sqrt() - (then * (1 - now) / now).sqrt()
    return moved.item(), std.item()


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("strategy", [Last(1), Last(3), ReFL(0.6), DRTune(2), LeapAlign()], ids=str)
def test_the_distance_and_its_gradient_equal_plain_autograd(micro, strategy, eta):
    """The KL divergence of noisy steps, the squared difference of the others (of DDIM's steps the last has no noise)."""
    micro.scheduler = diffusers.DDIMScheduler.from_config(micro.scheduler.config)
    adapter, sampling = adapted(micro), Sampling(eta=eta).resolve(micro)
    plan = strategy.plan(5, torch.Generator().manual_seed(0))
    rollout = rolled_out(micro, adapter, PROMPTS, SEEDS, sampling, plan)
    context = recomputation(micro, True, False)
    found = pull_to_base(micro, adapter, rollout, plan, context, 0.7, torch.Tensor.backward)
    gradient, distances = take_gradient(adapter), []
    for i, (t, state) in enumerate(zip(rollout.timesteps, rollout.states)):
        if len(rollout.timesteps) - i + plan.stop in plan.active:
            setup = state, t, rollout.conditioning, sampling
            with adapter.disabled(), torch.no_grad():
                base = micro.guided(*setup)
            squared = (micro.guided(*setup) - base).square().mean(dim=(1, 2, 3, 4))
            moved, std = mean_and_std(rollout.scheduler, t, eta)
            distances.append(squared * moved**2 / (2 * std**2) if std else squared)
    expected = torch.stack(distances).mean(0)
    (0.7 * expected.mean()).backward()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=0)
    theirs = take_gradient(adapter)
    assert theirs.norm() > 1e-9 and (gradient - theirs).norm() < 1e-6 * theirs.norm()


@pytest.mark.parametrize("strategy", [DRaFTLV(1), DirectAlign(fraction=0.8)], ids=str)
def test_the_distance_at_noised_latents(micro, strategy):
    """At the level of the step that learns; and none for an adapter that does nothing."""
    adapter, sampling = adapted(micro), Sampling().resolve(micro)
    plan = strategy.plan(5, torch.Generator().manual_seed(3))
    rollout = rolled_out(micro, adapter, PROMPTS, SEEDS, sampling, plan)
    asked, predict = [], micro.predict
    micro.predict = lambda x, t, inputs: (asked.append(int(t)), predict(x, t, inputs))[1]
    options = recomputation(micro, False, False), 1.0, torch.Tensor.backward
    assert (pull_to_base(micro, adapter, rollout, plan, *options) > 0).all()
    level = micro.new_scheduler(sampling).timesteps[-1 - plan.stop]
    assert set(asked) == {int(level)} and len(asked) == 3  # noised, by the base, with a graph
    with torch.no_grad():
        for p in adapter.parameters()[1::2]:
            p.zero_()
    take_gradient(adapter)
    assert not pull_to_base(micro, adapter, rollout, plan, *options).any()
    assert not take_gradient(adapter).any()


def test_a_run_that_is_pulled_stays_nearer_and_resumes(fresh, tmp_path):
    ends = []
    for weight in (1e-9, 3.0):
        options = {"steps": 4, "base_penalty": weight, "gradient_accumulation_steps": 2}
        whole = run(fresh(), tmp_path / str(weight), **options)
        ends.append(whole.metrics[-1]["base_distance"])
        assert whole.metrics[0]["base_distance"] == 0 < ends[-1]
    assert ends[1] < 0.8 * ends[0]
    assert_resumes(fresh, tmp_path / "parts", whole, **options)


def test_what_is_off_costs_nothing(fresh, tmp_path):
    model = fresh()
    calls, predict = [], model.predict
    model.predict = lambda *a: (calls.append(1), predict(*a))[1]
    plain = run(model, tmp_path / "plain", steps=2)
    assert len(calls) == 2 * (3 + 1)  # a roll-out, and one step with a graph
    assert "base_distance" not in plain.metrics[0]
    _, state = checkpoints.read(list_checkpoints(plain.folder)[2])
    assert "average" not in state
    decayed = run(fresh(), tmp_path / "decayed", steps=2, weight_decay=20.0)
    assert weights(decayed.adapter).norm() < 0.9 * weights(plain.adapter).norm()


@pytest.mark.parametrize("name", ["base_penalty", "rollout_reuse"])
def test_options_that_could_not_act_are_refused(fresh, tmp_path, name):
    from vader_nb.estimators import Estimator

    class Other(Estimator):
        collect = accumulate = None

    with pytest.raises(
        ValueError, match=f"{name}=2 works only with the reward's gradient: set it to"
    ):
        run(fresh(), tmp_path / "run", estimator=Other(), **{name: 2})
    with pytest.raises(ValueError, match="early_stopping=3 needs a validation: validate="):
        run(fresh(), tmp_path / "run", early_stopping=3)


# ------------------------------------------------------------------------------------ the moving average


def test_the_adapter_is_the_moving_average_of_its_weights(fresh, tmp_path):
    """What is validated, saved and returned; and training goes on with the weights themselves."""
    options = {"steps": 4, "validation_steps": 2, "ema_decay": 0.3}
    path, seen = [], []

    def validate(adapter):
        seen.append(weights(adapter))
        return {"judge": 0.0}

    plain = run(fresh(), tmp_path / "plain", steps=4)
    for step in list_checkpoints(plain.folder).values():
        tensors = lora.read(step / "adapter.safetensors")[0]
        path.append(torch.cat([tensors[name].flatten() for name in sorted(tensors)]))
    whole = run(fresh(), tmp_path / "whole", validate=validate, **options)
    rewards = [row["reward"] for row in plain.metrics]
    assert [row["reward"] for row in whole.metrics] == rewards  # it changes no update

    def expected(steps):
        average = torch.cat([x.flatten() for x in map(initial.get, sorted(initial))])
        for n, values in enumerate(path[:steps], start=1):
            average = average.lerp(values, 1 - min(0.3, n / (9 + n)))
        return average

    initial = lora.add(fresh(), 2).state_dict()
    for file, steps in {whole.folder: 4, list_checkpoints(whole.folder)[2]: 2}.items():
        tensors = lora.read(file / "adapter.safetensors")[0]
        found = torch.cat([tensors[name].flatten() for name in sorted(tensors)])
        torch.testing.assert_close(found, expected(steps))
        assert not torch.equal(found, path[steps - 1])
    assert torch.equal(weights(whole.adapter), seen[1]) and len(seen) == 2
    assert_resumes(fresh, tmp_path / "parts", whole, validate=validate, **options)


# ----------------------------------------------------------------------------------------- early stopping


def test_a_run_that_gets_no_better_ends_with_its_best_adapter(fresh, tmp_path):
    scores = {1: 1.0, 2: 3.0, 3: 2.0, 4: 2.9, 5: 9.0}

    def judge(calls):
        return lambda adapter: {"judge": scores[calls.pop(0)]}

    options = {"steps": 5, "validation_steps": 1, "early_stopping": 2}
    whole = run(fresh(), tmp_path / "whole", validate=judge([1, 2, 3, 4, 5]), **options)
    assert [row["step"] for row in whole.metrics] == [1, 2, 3, 4] and not whole.stopped
    best, metadata = lora.read(list_checkpoints(whole.folder)[2])
    assert metadata["steps"] == lora.read(whole.folder)[1]["steps"] == "2"
    assert all(torch.equal(best[n], x) for n, x in whole.adapter.state_dict().items())
    ended = run(
        fresh(), whole.folder, resume=True, validate=judge([]), **options
    )  # it is at its end
    assert torch.equal(weights(ended.adapter), weights(whole.adapter))
    patient = {"early_stopping": 3, "resume": True, "validate": judge([5])}
    assert len(run(fresh(), whole.folder, **options | patient).metrics) == 5
    run(fresh(), tmp_path / "parts", validate=judge([1, 2]), **options | {"steps": 2})
    again = run(fresh(), tmp_path / "parts", resume=True, validate=judge([3, 4]), **options)
    assert untimed(again.metrics) == untimed(whole.metrics)
    assert torch.equal(weights(again.adapter), weights(whole.adapter))
    config = json.loads((again.folder / "config.json").read_text())
    assert config["early_stopping"] == 2


# ------------------------------------------------------------------------------------------ reward guidance


def test_guidance_follows_the_reward_without_training(micro):
    def total(clips):
        return brightness()(clips, PROMPTS)

    base = sample(micro, PROMPTS, seeds=SEEDS)
    options = {"seeds": SEEDS, "sampling": None}
    none = RewardGuidance(brightness(), strength=0.0).sample(micro, PROMPTS, **options)
    torch.testing.assert_close(none, base, rtol=1e-9, atol=1e-9)
    late, every = (
        RewardGuidance(brightness(), 0.2, last).sample(micro, PROMPTS, **options)
        for last in (1, None)
    )
    assert (total(base) < total(late)).all() and (total(late) < total(every)).all()
    adapter = adapted(micro)  # it is the base that is guided
    again = RewardGuidance(brightness(), 0.2).sample(micro, PROMPTS, **options)
    torch.testing.assert_close(again, every, rtol=1e-9, atol=1e-9)
    alone = RewardGuidance(brightness(), 0.2).sample(micro, PROMPTS[1:], seeds=SEEDS[1:])
    torch.testing.assert_close(alone, every[1:], rtol=1e-9, atol=1e-9)
    assert adapter.attached


@pytest.mark.parametrize("kind", ["flow", "v_prediction", "sample"])
def test_the_moved_output_predicts_the_moved_clean_latents(micro, kind):
    """Whatever the denoiser predicts."""
    config = dict(micro.scheduler.config) | {"prediction_type": kind}
    micro.scheduler = diffusers.DDIMScheduler.from_config(config)
    if kind == "flow":
        micro.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    sampling = Sampling(eta=0.0).resolve(micro)
    scheduler = micro.new_scheduler(sampling)
    draws = torch.Generator().manual_seed(0)
    latents, output = (torch.randn(2, 4, 3, 8, 8, generator=draws).double() for _ in range(2))
    t = scheduler.timesteps[2]
    clean = micro.x0(scheduler, output, t, latents)
    guide = RewardGuidance(brightness(), 0.2)
    moved = guide.moved(micro, scheduler, output, t, latents, PROMPTS, sampling)
    change = micro.x0(scheduler, moved, t, latents) - clean
    size = change.flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1)
    torch.testing.assert_close(size, torch.full_like(size, 0.2), rtol=1e-4, atol=0)
    before, after = (brightness()(micro.decode(x), PROMPTS) for x in (clean, clean + change))
    assert (after > before).all()


def test_what_samples_by_itself_is_evaluated_like_an_adapter(micro):
    adapter = adapted(micro)
    contestants = {"guided": RewardGuidance(brightness(), 0.2), "trained": adapter}
    options = {"seeds_per_prompt": 1, "batch_size": 2, "progress": False}
    result = evaluate(micro, contestants, brightness(), {"all": PROMPTS}, **options)
    assert result.row("all", "brightness", "guided").difference > 0
    clips = result.clips["all"]
    assert torch.equal(
        clips[2], contestants["guided"].sample(micro, PROMPTS, seeds=[10_000, 10_001])
    )
    one = evaluate(micro, contestants["guided"], brightness(), {"all": PROMPTS}, **options)
    assert one.adapters == ["adapter"]
