"""Two experts by noise level: which one a strategy teaches, adapters in either, one on the device at a time."""

import warnings
from dataclasses import dataclass

import pytest
import torch

from vader_nb import align, experts, load, lora, memory_planner, models, rewards
from vader_nb.estimators import RewardGradient
from vader_nb.gradient import reward_gradient
from vader_nb.sampling import Sampling, sample
from vader_nb.strategies import DRaFTLV, DRTune, Frames, Last, Plan, Random, ReFL, Step
from vader_nb.testing import PROMPTS, REWARDS, SEEDS, apart, plain_autograd, staged

from .test_wan import SMALL, pipeline, transformer

# With the shift of 3, the first two of 5 steps are the high-noise expert's (`transformer`): steps 4 and 5 from the end.
SAMPLING = Sampling(**SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("experts")
    second = transformer(4, seed=1)
    pipeline(transformer_2=second, boundary_ratio=0.875).save_pretrained(made)
    return made


@pytest.fixture
def model(folder):
    return load(folder, dtype=torch.float64)


def spread(model, targets=None):
    """An adapter that acts."""
    adapter = lora.add(model, 2, targets=targets)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return adapter


def train(model, tmp_path, **settings):
    options = {"steps": 1, "batch_size": 1, "rank": 2, "sampling": SAMPLING, "progress": False}
    options |= {"output_dir": tmp_path / "run", **settings}
    return align(model, rewards.brightness(), list(PROMPTS), **options)


# ------------------------------------------------------------------------------------ which steps are whose


def test_the_experts_of_wan_have_the_steps_that_the_schedule_gives_them():
    """With 40 steps: 27 of low noise with the hub's shift of 3, and 14 with the authors' 12."""
    with memory_planner.FakeMode() as fake:
        fake.truth = False
        model = models.from_config("wan2.2-a14b")
    for shift, low in ((3.0, 27), (12.0, 14)):
        sampling = Sampling(options={"flow_shift": shift}).resolve(model)
        assert experts.by_step(model, sampling) == ["transformer_2"] * low + ["transformer"] * (
            40 - low
        )
        for strategy, learning in (
            (Last(low), ["transformer_2"]),
            (Last(low + 1), ["transformer", "transformer_2"]),
            (Step(low), ["transformer_2"]),
            (Step(low + 1), ["transformer"]),
            (Random(low), ["transformer_2"]),
            (Random(), ["transformer", "transformer_2"]),
            (DRTune(1), ["transformer", "transformer_2"]),
            (DRaFTLV(2), ["transformer_2"]),
            (ReFL(0.25), ["transformer_2"]),
            (ReFL(1.0), ["transformer", "transformer_2"]),
            (None, ["transformer", "transformer_2"]),
        ):
            assert experts.Reach(model, sampling, strategy).learning == learning, strategy


HIGH, LOW = "transformer", "transformer_2"


@pytest.mark.parametrize(
    "targets, strategy, learning",
    [
        ("transformer.attention", Step(5), {HIGH}),
        ("transformer.attention", Last(5), {HIGH}),  # the later steps only pass the gradient on
        ("transformer.attention+transformer.ffn", DRTune(5), {HIGH}),
        ("transformer_2.attention", Last(5), {LOW}),
        ("transformer_2.attention", Random(), {LOW}),
        ("attention", Step(5), {HIGH}),
        ("attention+ffn", Last(5), {HIGH, LOW}),
        ("attention", DRTune(5), {HIGH, LOW}),
    ],
)
def test_the_gradient_in_either_expert_is_autograds(model, targets, strategy, learning):
    adapter = spread(model, targets)
    setup = PROMPTS, SEEDS, SAMPLING, strategy, Frames.all()
    for scored in REWARDS.values():
        ours, gradient = staged(model, adapter, scored, *setup)
        theirs, expected = plain_autograd(model, adapter, scored, *setup)
        assert apart(gradient, expected) < 1e-9 and apart(ours, theirs) < 1e-9
    sizes = [sum(p.numel() for p in adapter.parameters([key])) for key in adapter.denoisers]
    parts = dict(zip(adapter.denoisers, gradient.split(sizes), strict=True))
    assert {key for key, part in parts.items() if part.any()} == learning


def test_steps_without_an_adapter_are_not_replayed(model, monkeypatch):
    """Steps 4 and 5 are not of the low-noise expert: the window does not reach them."""
    adapter, plans = spread(model, "transformer_2.attention"), []
    monkeypatch.setattr(experts, "replace", lambda plan, **new: plans.append(new) or plan)
    experts.draw_plan(model, adapter, SAMPLING.resolve(model), Last(5), None)
    assert plans == [{"active": frozenset({1, 2, 3})}]


def test_a_gradient_that_nothing_takes_is_an_error_before_the_work(model, monkeypatch):
    adapter = spread(model, "transformer.attention")
    monkeypatch.setattr(model, "predict", None)
    message = (
        "some draws train nothing, with an adapter in transformer alone: .* transformer_2 has "
    )
    with pytest.raises(
        ValueError, match=message + r"steps 1 to 3 and transformer has steps 4 to 5"
    ):
        reward_gradient(model, adapter, REWARDS["clip"], PROMPTS, seeds=SEEDS, sampling=SAMPLING)


# ------------------------------------------------------------------------------------ before training


def test_the_expert_that_is_not_reached_gets_no_adapter_and_a_warning(model, tmp_path):
    message = (
        r"gets an adapter in transformer_2 alone: counted from the end, transformer_2 has steps 1 to 3 and "
        r"transformer has steps 4 to 5; Last\(K=1\) reaches transformer_2 alone. strategy=Step\(4\) trains "
        r"the other, DRTune\(3\) both"
    )
    with pytest.warns(UserWarning, match=message):
        run = train(model, tmp_path, targets="attention+ffn")
    assert run.adapter.denoisers == [LOW] and run.metrics[0]["grad_norm"] > 0
    assert run.adapter.targets == ("transformer_2.attention", "transformer_2.ffn")
    before = sample(model, PROMPTS, seeds=SEEDS, sampling=SAMPLING, adapter=run)
    run.adapter.remove()
    after = sample(model, PROMPTS, seeds=SEEDS, sampling=SAMPLING, adapter=tmp_path / "run")
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    "strategy, targets, found",
    [
        (Step(5), None, [HIGH]),
        (DRTune(5), None, [HIGH, LOW]),
        (Last(5), ["transformer.to_q"], [HIGH]),
        (Last(5), ["transformer.to_q", "transformer_2.ffn"], [HIGH, LOW]),
        (Last(1), ["transformer_2.to_q"], [LOW]),
    ],
)
def test_adapters_where_the_strategy_or_the_user_says(model, tmp_path, strategy, targets, found):
    """Without a warning where the user names the expert, or both are reached."""
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strategy != Step(5) else "ignore", UserWarning)
        run = train(model, tmp_path, strategy=strategy, targets=targets)
    assert run.adapter.denoisers == found
    trained = [p for p in run.adapter.parameters() if p.any()]
    assert len(trained) == len(run.adapter.parameters())  # B was zero
    run.adapter.remove()


@pytest.mark.parametrize(
    "strategy, targets, message",
    [
        (
            Last(3),
            ["transformer.to_q"],
            "targets='transformer.to_q' would never learn: counted from",
        ),
        (Last(1), ["to_q", "transformer.to_k"], "targets='transformer.to_k' would never learn"),
        (
            Random(),
            ["transformer.attention"],
            r"some draws train nothing.*Random\(max_K=None\) reach",
        ),
        (
            ReFL(1.0),
            ["transformer.attention"],
            "some draws train nothing, with an adapter in transf",
        ),
    ],
)
def test_what_cannot_learn_is_refused(model, tmp_path, strategy, targets, message):
    with pytest.raises(ValueError, match=message):
        train(model, tmp_path, strategy=strategy, targets=targets)
    assert not list(tmp_path.iterdir()) and not lora._layers(model)


def test_a_part_that_is_not_reached_stays_as_it_is(model, tmp_path):
    """A start adapter of both experts: said, kept in the file, and not moved, by weight decay either."""
    adapter = spread(model)
    before = {name: x.clone() for name, x in adapter.state_dict().items()}
    with pytest.warns(
        UserWarning, match="the adapter's part in transformer stays as it is: counted"
    ):
        train(model, tmp_path, adapter=adapter, weight_decay=0.5)
    state, _ = lora.read(tmp_path / "run")
    for name, value in before.items():
        assert torch.equal(state[name], value) == name.startswith("transformer.")
    adapter.remove()
    only = spread(model, "transformer.attention")
    with pytest.raises(
        ValueError, match="some draws train nothing, with an adapter in transformer a"
    ):
        train(model, tmp_path, adapter=only, output_dir=tmp_path / "other")


def test_an_estimators_own_strategy_counts(model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = train(model, tmp_path, estimator=RewardGradient(Step(5)))
    assert run.adapter.denoisers == [HIGH]


@dataclass(frozen=True)
class Rarely:
    """A user's own strategy: one draw in ten is of an early step."""

    def plan(self, steps, generator):
        early = torch.randint(10, (), generator=generator) == 0
        return Plan(frozenset([steps if early else 1]))


def test_a_strategy_of_ones_own_is_drawn_from(model):
    assert experts.Reach(model, SAMPLING.resolve(model), Rarely()).learning == [HIGH, LOW]


def test_the_planner_counts_the_same_adapter_and_says_so(folder):
    settings = SMALL | {"batch_size": 2, "dtype": torch.float32, "rank": 8}
    one, both = (
        memory_planner.Step.of(folder, "brightness", settings | {"strategy": strategy})
        for strategy in ("Last(1)", "Last(5)")
    )
    with pytest.warns(UserWarning, match="gets an adapter in transformer_2 alone"):
        found = one.simulate()
        assert one.count() == pytest.approx(found, rel=0.1)
    # weights, and two moments of the optimizer
    adapter = lora.add(load(folder), 8, targets="transformer.attention")
    size = sum(p.nbytes for p in adapter.parameters())
    more = both.simulate()["weights"] - found["weights"]
    assert more == pytest.approx(3 * size, rel=0.02)


# ------------------------------------------------------------------------------------ model offload


def test_one_expert_is_on_the_device_at_a_time(model):
    """While the adapter is fused, and while it is replayed; and the numbers are the same."""
    adapter, own = spread(model), list(model.denoisers.values())
    frozen = [p.clone() for denoiser in own for p in denoiser.parameters()]
    setup = REWARDS["clip"], PROMPTS, SEEDS, SAMPLING, Last(1), Frames.all()
    expected = staged(model, adapter, *setup)
    clip = sample(model, PROMPTS, seeds=SEEDS, sampling=SAMPLING, adapter=adapter)
    model.enable_model_cpu_offload()
    counts, at_work, onload = [], [], model.offloader.onload

    def counted(*modules):
        onload(*modules)
        counts.append(sum(module in own for module in model.offloader.loaded))

    model.offloader.onload = counted
    for denoiser in own:
        denoiser.register_forward_pre_hook(
            lambda module, args: at_work.append((module, list(model.offloader.loaded)))
        )
    found = staged(model, adapter, *setup)
    again = sample(model, PROMPTS, seeds=SEEDS, sampling=SAMPLING, adapter=adapter)
    assert max(counts) == 1 and {id(module) for module, _ in at_work} == {id(x) for x in own}
    assert all(loaded == [module] for module, loaded in at_work)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(again, clip)
    after = [p for denoiser in own for p in denoiser.parameters()]
    assert all(torch.equal(*pair) for pair in zip(after, frozen, strict=True))


def test_a_merged_pipeline_is_made_where_the_experts_wait(model, tmp_path):
    adapter = spread(model)
    expected = sample(model, PROMPTS, seeds=SEEDS, sampling=SAMPLING, adapter=adapter)
    model.enable_model_cpu_offload()
    adapter.merge(tmp_path / "merged")
    assert not model.offloader.loaded
    merged = load(tmp_path / "merged", dtype=torch.float64)
    found = sample(merged, PROMPTS, seeds=SEEDS, sampling=SAMPLING)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
