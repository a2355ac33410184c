"""The staged gradient equals plain autograd, for every strategy, scheduler, frame choice and setting."""

import copy

import diffusers
import pytest
import torch

from vader_nb import testing
from vader_nb.gradient import score
from vader_nb.rewards import as_reward, hps, reward
from vader_nb.sampling import NonFiniteError, Sampling, roll_out, sample
from vader_nb.strategies import (
    DirectAlign,
    DRaFTLV,
    DRTune,
    Frames,
    Last,
    LeapAlign,
    Random,
    ReFL,
    Step,
)
from vader_nb.testing import REWARDS, adapted

PROMPTS, SEEDS = ["a red star", "a blue circle growing"], [3, 8]
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, 0.0),
    "ddim eta": (diffusers.DDIMScheduler, 1.0),
    "dpm++": (diffusers.DPMSolverMultistepScheduler, 0.0),
    "euler": (diffusers.EulerDiscreteScheduler, 0.0),
    "unipc": (diffusers.UniPCMultistepScheduler, 0.0),
}
STRATEGIES = [
    Last(1),
    Last(3),
    Last(5),
    Random(),
    Step(1),
    Step(3),
    ReFL(0.6),
    DRTune(2),
    DRTune(2, stop=2),
    DRaFTLV(2),
    DirectAlign(2),
    LeapAlign(0.3),
]


def plain_autograd(model, adapter, reward, sampling, strategy, frames):
    setup = as_reward(reward), PROMPTS, SEEDS, sampling, strategy, frames
    return testing.plain_autograd(model, adapter, *setup)


def staged(model, adapter, reward, sampling, strategy, frames, **options):
    setup = reward, PROMPTS, SEEDS, sampling, strategy, frames
    return testing.staged(model, adapter, *setup, **options)


def assert_equal(one, other):
    (rewards, gradient), (expected_rewards, expected) = one, other
    assert expected.norm() > 1e-9
    assert (gradient - expected).norm() <= 1e-9 * expected.norm()
    torch.testing.assert_close(rewards, expected_rewards, rtol=1e-9, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_strategy_and_scheduler_equals_plain_autograd(micro, kind, strategy):
    cls, eta = SCHEDULERS[kind]
    micro.scheduler = cls.from_config(micro.scheduler.config)
    adapter, sampling = adapted(micro), Sampling(eta=eta)
    for name in REWARDS:
        setup = micro, adapter, REWARDS[name], sampling, strategy, Frames.all()
        assert_equal(staged(*setup), plain_autograd(*setup))


@pytest.mark.parametrize(
    "frames",
    [
        Frames.random(1),
        Frames.random(2),
        Frames.ends(),
        Frames.every(2),
        Frames.all(),
        Frames.at(0, -1),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", REWARDS)
def test_every_frame_choice_equals_plain_autograd(micro, name, frames):
    setup = micro, adapted(micro), REWARDS[name], Sampling(), Last(2), frames
    assert_equal(staged(*setup), plain_autograd(*setup))


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": False},
        {"activation_offload": True},
        {"decode_chunk_size": 2},
        {"decode_chunk_size": 3, "activation_offload": True, "gradient_checkpointing": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("strategy", [Last(2), Step(2)], ids=str)
@pytest.mark.parametrize("name", REWARDS)
def test_every_setting_gives_the_same_gradient(micro, name, strategy, options):
    setup = micro, adapted(micro), REWARDS[name], Sampling(), strategy, Frames.all()
    assert_equal(staged(*setup, **options), plain_autograd(*setup))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(guidance_scale=1.0),
        Sampling(guidance_scale=4.0),
        Sampling(guidance_scale=4.0, unconditional_gradient=False),
        Sampling(guidance_scale=4.0, sequential_guidance=True),
        Sampling(guidance_scale=4.0, sequential_guidance=True, unconditional_gradient=False),
        Sampling(guidance_scale=1.0, sequential_guidance=True),
    ],
    ids=[
        "off",
        "both branches",
        "unconditional without",
        "sequential",
        "sequential, without",
        "sequential, off",
    ],
)
def test_guidance_in_training(micro, sampling):
    setup = micro, adapted(micro), REWARDS["frames"], sampling, Last(2), Frames.all()
    assert_equal(staged(*setup), plain_autograd(*setup))


@pytest.mark.parametrize("strategy", [Last(1), Step(3), DRaFTLV(2)], ids=str)
def test_sequential_guidance_gives_the_gradient_of_batched_guidance(micro, strategy):
    setup, rest = (micro, adapted(micro), REWARDS["frames"]), (strategy, Frames.all())
    batched, sequential = (
        staged(*setup, Sampling(sequential_guidance=flag), *rest)[1] for flag in (False, True)
    )
    assert (batched - sequential).norm() <= 1e-10 * batched.norm()


def test_model_offload_gives_the_same_gradient_and_leaves_the_adapter_its_optimizer(micro):
    """On a CPU both devices are one, but the weights move as they do elsewhere."""
    adapter = adapted(micro)
    ours, weights = (
        adapter.parameters(),
        {n: p.clone() for n, p in micro.denoiser.named_parameters()},
    )
    setup = adapter, REWARDS["frames"], Sampling(), Last(2), Frames.all()
    before = staged(micro, *setup)
    micro.enable_model_cpu_offload()
    assert_equal(staged(micro, *setup), before)
    assert all(now is then for now, then in zip(adapter.parameters(), ours))
    for name, p in micro.denoiser.named_parameters():
        torch.testing.assert_close(p, weights[name], rtol=0, atol=0)
    assert sample(micro, "a red star").isfinite().all()


def test_guidance_without_the_unconditional_gradient_is_another_gradient(micro):
    adapter = adapted(micro)
    both, one = (
        staged(
            micro,
            adapter,
            REWARDS["frames"],
            Sampling(unconditional_gradient=flag),
            Last(1),
            Frames.all(),
        )[1]
        for flag in (True, False)
    )
    assert (both - one).norm() > 1e-3 * both.norm()


def test_a_mixed_sum_of_rewards(micro):
    mixed = REWARDS["frames"] + 0.5 * REWARDS["clip"] + REWARDS["frames"].towards(0.3)
    setup = micro, adapted(micro), mixed, Sampling(), Last(1), Frames.all()
    assert_equal(staged(*setup), plain_autograd(*setup))
    assert not mixed.per_frame


def test_full_backpropagation_matches_finite_differences(micro):
    """No autograd in the reference at all: the reward's slope along the gradient, by moving the adapter."""
    adapter, sampling = adapted(micro), Sampling()
    _, gradient = staged(micro, adapter, REWARDS["clip"], sampling, Last(5), Frames.all())
    direction = (gradient / gradient.norm()).split([p.numel() for p in adapter.parameters()])

    def value(size):
        with torch.no_grad():
            for p, d in zip(adapter.parameters(), direction):
                p.add_(size * d.view_as(p))
            result = REWARDS["clip"](
                sample(micro, PROMPTS, seeds=SEEDS, sampling=sampling, adapter=adapter), PROMPTS
            ).mean()
            for p, d in zip(adapter.parameters(), direction):
                p.sub_(size * d.view_as(p))
        return result

    slope = (value(-1e-4) - value(1e-4)) / 2e-4  # of minus the reward
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=1e-4)


def test_last_of_all_steps_is_step_plus_the_rest(micro):
    """The exact gradient is the sum over steps of each step's own part."""
    adapter = adapted(micro)
    setup = micro, adapter, REWARDS["frames"], Sampling()
    whole = staged(*setup, Last(5), Frames.all())[1]
    parts = sum(staged(*setup, Step(i), Frames.all())[1] for i in range(1, 6))
    assert (whole - parts).norm() <= 1e-9 * whole.norm()


# ------------------------------------------------------------------------------- what is promised besides


def test_base_weights_are_untouched_and_ask_for_nothing(micro):
    before = {n: p.detach().clone() for n, p in micro.denoiser.named_parameters()}
    flags = {n: p.requires_grad for n, p in micro.denoiser.named_parameters()}
    assert not any(flags.values())
    adapter = adapted(micro)
    staged(micro, adapter, REWARDS["frames"], Sampling(), Last(2), Frames.all())
    own = dict(micro.denoiser.named_parameters())
    for name, value in before.items():
        found = own.get(name)
        if found is None:  # peft moves an adapted layer's weight one level down
            parent, _, leaf = name.rpartition(".")
            found = own[f"{parent}.base_layer.{leaf}"]
        assert torch.equal(found, value), name
        assert not found.requires_grad, name


def test_no_graph_before_the_cut(micro):
    """Count the denoiser calls that run with gradients enabled: only the window's, once each."""
    adapter, calls = adapted(micro), []
    predict = micro.predict
    micro.predict = lambda *a, **k: (calls.append(torch.is_grad_enabled()), predict(*a, **k))[1]
    staged(micro, adapter, REWARDS["frames"], Sampling(), Last(2), Frames.all())
    assert calls.count(True) == 2
    assert calls.count(False) == 4  # the last one keeps its graph


def test_replayed_latents_are_the_rolled_out_ones(micro):
    """Bit for bit, noise included: what was scored is what is differentiated."""
    from vader_nb.gradient import replay
    from vader_nb.strategies import Plan

    micro.scheduler = diffusers.DDIMScheduler.from_config(micro.scheduler.config)
    adapter, sampling = adapted(micro), Sampling(eta=1.0).resolve(micro)
    rollout = roll_out(micro, PROMPTS, SEEDS, sampling, adapter=adapter, window=3)
    plan = Plan(frozenset([1, 2, 3]))
    again = replay(micro, rollout, plan, lambda active: torch.enable_grad())
    assert torch.equal(again, rollout.latents)
    # and recomputing the calls gives the noted outputs
    scheduler, x, t = copy.deepcopy(rollout.scheduler), rollout.states[0], rollout.timesteps[0]
    with torch.no_grad():
        outputs = micro.all_branches(
            micro.scale_input(scheduler, x, t), t, rollout.conditioning, sampling
        )
    assert outputs.keys() == rollout.outputs[0].keys() == {"negative", "prompt"}
    assert all(torch.equal(outputs[name], rollout.outputs[0][name]) for name in outputs)


def test_a_clip_depends_on_its_seed_and_not_on_its_batch(micro):
    together = sample(micro, PROMPTS, seeds=SEEDS, sampling=Sampling(eta=0.5))
    alone = sample(micro, PROMPTS[1], seeds=SEEDS[1], sampling=Sampling(eta=0.5))
    torch.testing.assert_close(together[1:], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["frames", "clip"])
def test_memory_of_scoring_does_not_grow_with_frames(tiny, kind):
    """The bytes that live at the worst moment of decoding, scoring and going back, 1 or 8 frames."""
    from vader_nb.memory_planner import MemoryTracker

    latents = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    reward = hps("tiny") if kind == "frames" else as_reward(bright)

    def peak(frames):
        with MemoryTracker() as peak:
            score(tiny, latents, reward, PROMPTS[:1], frames)
        return peak.bytes

    peak([3])  # the prompt's vector is kept
    assert peak(list(range(8))) <= 1.15 * peak([3])


def bright(frames, prompts):
    return frames.mean(dim=(1, 2, 3, 4))


@pytest.mark.parametrize("strategy", [Last(1), Last(2)], ids=str)
def test_half_precision_carries_gradients_that_are_too_small_for_it(micro_directory, strategy):
    """A reward of a size whose pixel gradients underflow float16: the direction must survive."""
    from vader_nb import load

    faint, found = 1e-4 * REWARDS["frames"], {}
    adapter_values = [
        0.1 * p.float() for p in adapted(load(micro_directory, dtype=torch.float64)).parameters()
    ]
    for dtype in (torch.float16, torch.float64):
        model = load(micro_directory, dtype=dtype)
        model.defaults |= {
            "num_inference_steps": 4,
            "num_frames": 2,
            "height": 32,
            "width": 32,
            "guidance_scale": 2.0,
        }
        # Noise drawn in half precision is other noise: both start from the same.
        noise = torch.randn(
            2, 4, 2, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        model.initial_latents = lambda *_, noise=noise.to(dtype): noise
        adapter = adapted(model)
        with torch.no_grad():
            for p, value in zip(adapter.parameters(), adapter_values):
                p.copy_(value)
        found[dtype] = staged(model, adapter, faint, Sampling(), strategy, Frames.all())[1].double()
    half, exact = found.values()
    assert half @ exact > 0.99 * half.norm() * exact.norm()
    assert half.norm() == pytest.approx(exact.norm().item(), rel=0.05)


# --------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "strategy",
    [
        Last(6),
        Last(0),
        Step(6),
        Random(9),
        DRTune(6),
        DRTune(1, stop=5),
        ReFL(0),
        DRaFTLV(0),
        DirectAlign(0),
        DirectAlign(fraction=2),
        LeapAlign(2),
    ],
    ids=str,
)
def test_windows_that_do_not_fit_are_refused_before_any_work(micro, strategy):
    micro.predict = None  # any work would fail otherwise
    adapter = adapted(micro)
    with pytest.raises(ValueError, match=r"must lie|>= 1"):
        staged(micro, adapter, REWARDS["frames"], Sampling(), strategy, Frames.all())


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (Frames.random(0), "cannot choose 0"),
        (Frames.random(4), "cannot choose 4"),
        (Frames.at(), "nothing to score"),
        (Frames.at(3), "index 3 is out of range"),
        (Frames.at(-4), "index -4 is out of range"),
        (Frames.every(0), "n >= 1"),
        (Frames("some"), "unknown frame choice"),
    ],
    ids=str,
)
def test_frames_that_do_not_exist_are_refused(micro, frames, message):
    adapter = adapted(micro)
    with pytest.raises(ValueError, match=message):
        staged(micro, adapter, REWARDS["frames"], Sampling(), Last(1), frames)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda frames, prompts: frames.mean(), ValueError, "one score per clip"),
        (lambda frames, prompts: frames.mean(dim=(2, 3, 4)), ValueError, "one score per clip"),
        (lambda frames, prompts: 1.0, ValueError, "one score per clip"),
        (lambda frames, prompts: frames.detach().mean(dim=(1, 2, 3, 4)), ValueError, "no gradient"),
        (
            lambda frames, prompts: frames.mean(dim=(1, 2, 3, 4)) * float("nan"),
            NonFiniteError,
            "not finite",
        ),
    ],
    ids=["scalar", "a score a frame", "a number", "detached", "nan"],
)
def test_bad_rewards_are_named(micro, function, error, message):
    adapter = adapted(micro)
    with pytest.raises(error, match=message):
        staged(micro, adapter, function, Sampling(), Last(1), Frames.all())


def test_the_strategies_draw_what_their_papers_say():
    generator = torch.Generator().manual_seed(0)
    windows = [max(Random().plan(10, generator).active) for _ in range(500)]
    assert set(windows) == set(range(1, 11))
    for _ in range(200):
        plan = DRTune(3).plan(10, generator)
        steps = sorted(plan.active)
        assert len(steps) == 3
        assert steps[1] - steps[0] == steps[2] - steps[1] == 3
        assert 1 <= steps[0] <= steps[-1] <= 10  # VideoX-Fun's open interval loses the last one
        assert max(ReFL().plan(40, generator).active) <= 10


@pytest.mark.parametrize("strategy", [LeapAlign(0.3), DirectAlign(2), DRaFTLV(2)], ids=str)
def test_strategies_made_for_flows_equal_plain_autograd_on_one(micro, strategy):
    micro.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    setup = micro, adapted(micro), REWARDS["clip"], Sampling(eta=0.0), strategy, Frames.all()
    assert_equal(staged(*setup), plain_autograd(*setup))


def test_the_leaps_of_a_flow_are_the_papers(micro):
    """LeapAlign: x_j = x_k - (k - j) v, with the roll-out's values; its steps are drawn over the whole chain."""
    from vader_nb.sampling import leap

    micro.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampling = Sampling().resolve(micro)
    rollout = roll_out(micro, PROMPTS, SEEDS, sampling, window=5)
    sigmas = micro.new_scheduler(sampling).sigmas
    v = torch.zeros_like(rollout.states[1]).requires_grad_()
    for active, later in (({4, 2}, 3), ({4}, 5)):
        landed = leap(micro, rollout, 1, active, v, rollout.states[1])
        assert torch.equal(landed, [*rollout.states, rollout.latents][later])
        (slope,) = torch.autograd.grad(landed.sum(), v)
        expected = (sigmas[later] - sigmas[1]).double()
        torch.testing.assert_close(slope, expected.expand_as(slope), rtol=1e-6, atol=0)
    generator = torch.Generator().manual_seed(0)
    drawn = [LeapAlign().plan(10, generator).active for _ in range(200)]
    assert {len(active) for active in drawn} == {2} and set().union(*drawn) == set(range(1, 11))
    with pytest.raises(ValueError, match="LeapAlign needs at least 2 steps"):
        LeapAlign().plan(1, generator)


def test_direct_align_shows_the_reward_almost_clean_latents(micro):
    """At every level, as its paper says; a ReFL that stopped there would see a blur. At the last step it is DRaFT-LV."""
    from vader_nb.gradient import rolled_out
    from vader_nb.sampling import renoise

    adapter, sampling = adapted(micro), Sampling().resolve(micro)
    plan = DirectAlign().plan(5, torch.Generator().manual_seed(0))
    rollout = rolled_out(micro, adapter, PROMPTS, SEEDS, sampling, plan)
    final, scheduler = rollout.latents, micro.new_scheduler(sampling)
    for stop in (2, 3):
        again = renoise(micro, rollout, stop)
        output = micro.guided(again.states[0], again.timesteps[0], rollout.conditioning, sampling)
        blurred = micro.x0(scheduler, output, again.timesteps[0], again.states[0])
        assert (again.latents - final).norm() < 0.7 * (blurred - final).norm()
        # As the paper writes it, with the scheduler's own step.
        levels = [
            micro.signal_and_noise(scheduler, t) for t in scheduler.timesteps[-1 - stop :][:2]
        ]
        (alpha, sigma), (alpha_next, sigma_next) = levels
        noise = (again.states[0] - alpha * final) / sigma
        after = micro.step(
            micro.new_scheduler(sampling), output, again.timesteps[0], again.states[0]
        )
        recovered = (after - sigma_next * noise) / alpha_next
        torch.testing.assert_close(again.latents, recovered, rtol=1e-5, atol=1e-5)
    setup = micro, adapter, REWARDS["clip"], sampling
    pairs = [staged(*setup, one, Frames.all()) for one in (DirectAlign(2, 0.1), DRaFTLV(2))]
    assert_equal(*pairs)


def test_an_adapter_that_is_not_on_the_model_is_refused(micro, micro_directory):
    """Its gradient would silently be another model's, or none."""
    from vader_nb import load

    other = adapted(load(micro_directory, dtype=torch.float64))
    removed = adapted(micro)
    removed.remove()
    for adapter in (other, removed):
        with pytest.raises(ValueError, match="the adapter is not on this"):
            staged(micro, adapter, REWARDS["frames"], Sampling(), Last(1), Frames.all())


# --------------------------------------------------------------------------------- numbers out of range


def spoiled(model, part):
    """The model with NaN or infinity in what one of its networks returns."""
    module = {"text": model.text_encoder, "denoiser": model.denoiser, "decoder": model.vae.decoder}
    return next(p for p in module[part].parameters() if p.ndim > 1)


@pytest.mark.parametrize(
    "part, message",
    [
        ("text", "text encoder's states are not finite"),
        ("denoiser", r"latents after step 1 of 5 are not finite; a likely cause: .*learning_rate"),
        ("decoder", "decoded frames are not finite; a likely cause: the decoder overflows"),
    ],
)
def test_numbers_that_are_not_finite_name_their_stage(micro, part, message):
    adapter = adapted(micro)
    with torch.no_grad():
        spoiled(micro, part).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=message):
        sample(micro, PROMPTS, seeds=SEEDS)
    with pytest.raises(NonFiniteError, match=message):
        staged(micro, adapter, REWARDS["frames"], Sampling(), Last(1), Frames.all())


LARGE = {
    "sum": lambda f, p: f.sum(dim=(1, 2, 3, 4)),
    "squared error in 0..255": lambda f, p: -((255 * f - 100) ** 2).mean(dim=(2, 3, 4)).sum(1),
    "tiny": lambda f, p: 1e-9 * f.mean(dim=(1, 2, 3, 4)),
}


@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("name", LARGE)
def test_float16_carries_gradients_of_any_size(micro_directory, name, per_frame):
    from vader_nb import load
    from vader_nb.gradient import score

    judge = reward(LARGE[name], per_frame=per_frame)
    latents = torch.randn(2, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    found = {}
    for dtype in (torch.float32, torch.float16):
        model = load(micro_directory, dtype=dtype)
        found[dtype] = score(model, latents.to(dtype), judge, PROMPTS, [0, 1])[1].double()
    full, half = found.values()
    assert half.isfinite().all() and half.any()
    assert (half - full).norm() < 0.02 * full.norm()


def test_a_network_that_overflows_at_the_usual_scale_is_asked_at_a_smaller_one():
    from vader_nb.rewards.base import Reward, pixel_gradient

    class Half(Reward):
        """Its pixels go through float16 with a factor of 1000."""

        def scores(self, frames, prompts):
            return (frames.half() * 1000).float().mean(dim=(2, 3, 4)) * frames[0, 0].numel()

    frames = torch.rand(1, 1, 3, 8, 8, dtype=torch.float16)
    _, gradient = pixel_gradient(Half(), frames, ["a cat"])
    torch.testing.assert_close(gradient, torch.full_like(gradient, 1000.0))


# ------------------------------------------------------------------------- the last call's kept graph


@pytest.mark.parametrize("strategy", [Last(1), Last(3), ReFL(0.6)], ids=str)
@pytest.mark.parametrize("kind", ["frames", "clip"])
def test_keeping_the_last_calls_graph_changes_no_bit(micro, strategy, kind, monkeypatch):
    from vader_nb import gradient

    adapter, found, calls = adapted(micro), [], []
    predict = micro.predict
    micro.predict = lambda *a, **k: (calls.append(torch.is_grad_enabled()), predict(*a, **k))[1]
    for keep in (True, False):
        if not keep:
            monkeypatch.setattr(gradient, "kept_call", lambda *a, **k: None)
        calls.clear()
        found.append(staged(micro, adapter, REWARDS[kind], Sampling(), strategy, Frames.all()))
        found[-1] = *found[-1], calls.count(True), len(calls)
    (*kept, with_graph, total), (*again, with_graph_again, total_again) = found
    for a, b in zip(kept, again):
        assert all(map(torch.equal, a, b)) if isinstance(a, list) else torch.equal(a, b)
    assert with_graph == with_graph_again and total == total_again - 1


# ------------------------------------------------------------------------------ a roll-out's window once more


@pytest.mark.parametrize("strategy", [Last(1), Last(3), Step(2), ReFL(0.6)], ids=str)
def test_a_window_taken_again_is_that_of_the_adapter_as_it_is_now(micro, strategy):
    """Against plain autograd from the same latents; and with the weights of before, bit for bit what it was."""
    from vader_nb.gradient import accumulate, rolled_out

    adapter, sampling = adapted(micro), Sampling().resolve(micro)
    plan = strategy.plan(5, torch.Generator().manual_seed(0))
    setup, calls, predict = (micro, adapter, PROMPTS, SEEDS, sampling, plan), [], micro.predict
    first = rolled_out(*setup)
    micro.predict = lambda *a, **k: (calls.append(1), predict(*a, **k))[1]
    again = rolled_out(*setup, start=first)
    assert len(calls) == max(plan.active) - plan.stop  # and not those before the window
    assert torch.equal(first.latents, again.latents)
    with torch.no_grad():
        for p in adapter.parameters():
            p.mul_(1.1)
    frames = [0, 1, 2]
    moved = rolled_out(*setup, start=first)
    assert torch.equal(moved.states[0], first.states[0])
    assert not torch.equal(moved.latents, first.latents)
    rewards = accumulate(micro, adapter, REWARDS["clip"], moved, plan, frames).rewards
    found = testing.take_gradient(adapter)
    scheduler, latents = copy.deepcopy(first.scheduler), first.states[0]
    for i, t in enumerate(first.timesteps):
        n = len(first.timesteps) - i + plan.stop
        for p in adapter.parameters():
            p.requires_grad_(n in plan.active)
        output = micro.guided(latents, t, first.conditioning, sampling)
        if n == plan.stop + 1 and plan.stop:
            latents = micro.x0(scheduler, output, t, latents)
        else:
            latents = micro.step(scheduler, output, t, latents)
    expected = REWARDS["clip"](micro.decode(latents), PROMPTS)
    for p in adapter.parameters():
        p.requires_grad_(True)
    (-expected.mean()).backward()
    assert_equal((rewards, found), (expected.detach(), testing.take_gradient(adapter)))


def test_a_window_taken_again_draws_fresh_noise(micro):
    """Where the sampler draws any; the same at every attempt."""
    from vader_nb.gradient import rolled_out

    micro.scheduler = diffusers.DDIMScheduler.from_config(micro.scheduler.config)
    adapter, sampling = adapted(micro), Sampling(eta=1.0).resolve(micro)
    plan, found = Last(3).plan(5, None), []
    for _ in range(2):
        first = rolled_out(micro, adapter, PROMPTS, SEEDS, sampling, plan)
        options = {"sampling": sampling, "plan": plan, "start": first}
        parts = [rolled_out(micro, adapter, PROMPTS, [], **options) for _ in range(2)]
        found.append([first.latents, *(part.latents for part in parts)])
    assert all(map(torch.equal, *found))
    assert not any(torch.equal(*pair) for pair in zip(found[0], found[0][1:]))
