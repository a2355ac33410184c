"""Estimators without the reward's gradient: their updates are the papers' formulas, and they learn."""

import json
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from vader_nb import evaluate, load, lora
from vader_nb.distributed import launch
from vader_nb.estimators import DDPO, DPO, GRPO, Batch, BestOf, parse_estimator
from vader_nb.models import Conditioning, VideoModel
from vader_nb.rewards import Reward, brightness, colorfulness
from vader_nb.sampling import Sampling, derived_seed
from vader_nb.strategies import Frames, Last
from vader_nb.train_config import TrainConfig
from vader_nb.trainer import align
from vader_nb.transitions import transition

from .test_align import FAST, PROMPTS, untimed
from .test_parallel import assert_same, left, train

WIDTH = 3


class Toy(VideoModel):
    """A clip is a vector of three numbers, and the denoiser a matrix: output = M x, M = W + B A."""

    name, world, takes_image = "toy", None, False

    def __init__(self, scheduler, steps=1):
        self.scheduler = scheduler
        network = torch.nn.Module()
        network.to_q = torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        with torch.no_grad():
            network.to_q.weight.copy_(torch.randn(WIDTH, WIDTH, generator=seeded(1)))
        self.denoisers, self.targets = {"unet": network.requires_grad_(False)}, {"unet": ("to_q",)}
        self.defaults = {"num_inference_steps": steps, "guidance_scale": 1.0, "num_frames": 1}
        self.defaults |= {"height": 8, "width": 8, "fps": 8}

    def modules(self):
        return list(self.denoisers.values())

    def decoders(self):
        return []

    def blocks(self):
        return []

    def latent_shape(self, sampling):
        return 1, 1, 1, WIDTH

    def encode(self, prompts, sampling=None, generators=None):
        return Conditioning({"prompt": {"states": torch.zeros(len(prompts), 1)}})

    def predict(self, latents, t, inputs):
        return self.denoiser.to_q(latents)

    def decode(self, latents, frames=None):
        return latents.sigmoid()[..., :1].expand(-1, 1, 3, 8, 8)

    def pipeline(self):
        raise NotImplementedError

    from_config = from_pretrained = pipeline

    def effective(self, adapter):
        """M, and A and B, whose product it holds."""
        a, b = adapter.parameters()
        return self.denoiser.to_q.get_base_layer().weight + b @ a, a, b


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class First(Reward):
    """The first number of a clip: no gradient leaves it."""

    name, differentiable, per_frame = "first", False, True

    def scores(self, frames, prompts):
        return frames.detach()[:, :, 0, 0, 0]


class Middle(First):
    """How near to gray it is."""

    name = "middle"

    def scores(self, frames, prompts):
        return -((super().scores(frames, prompts) - 0.5) ** 2)


def ddim(prediction="epsilon", **options):
    options |= {"timestep_spacing": "trailing", "clip_sample": False, "beta_end": 0.005}
    scheduler = DDIMScheduler(prediction_type=prediction, **options)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def flow():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


def learner(estimator, scheduler, steps=2, batch_size=8):
    """The estimator on a toy whose adapter does something; one of its two steps has noise."""
    model = Toy(scheduler, steps)
    adapter = lora.add(model, 2)
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=seeded(p.numel()))
    config = TrainConfig(batch_size=batch_size, frames=Frames.all(), gradient_checkpointing=False)
    config.sampling = Sampling().resolve(model)
    estimator.setup(model, adapter, First(), config)
    return model, adapter


def collected(estimator):
    batch = Batch(list("aabbccdd"), list(range(8)), seeded(0))
    found = [estimator.collect(batch)]
    estimator.advantages(found, lambda value: [value])
    return found


def gradients(estimator, adapter, parts):
    for p in adapter.parameters():
        p.grad = None
    rows = [estimator.accumulate(part, 1 / len(parts), torch.Tensor.backward) for part in parts]
    return [p.grad for p in adapter.parameters()], rows


def outer(x, y):
    return torch.einsum("bi,bj->ij", x, y)


def of_matrix(gradient, a, b):
    """The gradient on A and B from that on M."""
    return [b.T @ gradient, gradient @ a.T]


@pytest.mark.parametrize("how", [DDPO, GRPO])
@pytest.mark.parametrize("schedule", ["ddim", "flow"])
def test_policy_gradients_are_the_closed_form(how, schedule):
    """d/dM of mean(A log p), with log p = -|x' - mean|^2 / (2 std^2) / 3 and mean = c x + d M x."""
    options = {"clip_range": 0.05} | ({"group_size": 2, "beta": 0.5} if how is GRPO else {})
    estimator = how(minibatches=1, inner_epochs=2, **options)
    model, adapter = learner(estimator, ddim() if schedule == "ddim" else flow())
    found = collected(estimator)
    (one,) = estimator.minibatch(found, 0)
    assert one.steps == [0]
    x, after = (s.flatten(1) for s in [*one.rollout.states, one.rollout.latents][:2])
    matrix, a, b = model.effective(adapter)
    move = estimator.moves[0]
    if schedule == "ddim":
        c = move.alpha_next / move.alpha
        d = move.direction - c * move.sigma
    else:  # Flow-GRPO's equation 9, in its own letters
        t, dt = move.sigma, move.sigma - (1 - move.alpha_next)
        rate = move.std**2 / dt
        c, d = 1 - rate / (2 * t) * dt, -(1 + rate * (1 - t) / (2 * t)) * dt
    rewards = one.rewards
    if how is DDPO:
        wanted = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
    else:
        pairs = rewards.view(4, 2)
        spread = pairs.std(dim=1, correction=0, keepdim=True) + 1e-4
        wanted = ((pairs - pairs.mean(dim=1, keepdim=True)) / spread).flatten()
    torch.testing.assert_close(one.advantages, wanted, rtol=1e-12, atol=1e-12)

    def form(m, ratio, counts):
        left = after - c * x - d * x @ m.T
        weight = (counts * ratio * wanted)[:, None]
        pull = -outer(weight * left, x) * d / (WIDTH * move.std**2 * len(x))
        apart = d * x @ (m - model.denoiser.to_q.get_base_layer().weight).T
        return pull + estimator.beta * d * outer(apart, x) / (WIDTH * move.std**2 * len(x))

    one_of_each = torch.ones(len(x), dtype=torch.float64)
    found_gradients, rows = gradients(estimator, adapter, [one])
    expected = of_matrix(form(matrix, one_of_each, one_of_each), a, b)
    for got, want in zip(found_gradients, expected):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert rows[0].info["clip_fraction"] == 0
    # The second update of the roll-out: ratios, and clips that have moved enough.
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.1 * torch.randn(p.shape, generator=seeded(5), dtype=p.dtype)
    moved, a, b = model.effective(adapter)
    old, new = (after - c * x - d * x @ m.T for m in (matrix, moved))
    ratio = ((old**2 - new**2).mean(dim=1) / (2 * move.std**2)).exp()
    gone = ((ratio > 1.05) & (wanted > 0)) | ((ratio < 0.95) & (wanted < 0))
    assert 0 < gone.sum() < len(gone)
    found_gradients, rows = gradients(estimator, adapter, estimator.minibatch(found, 1))
    expected = of_matrix(form(moved, ratio, (~gone).double()), a, b)
    for got, want in zip(found_gradients, expected):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert rows[0].info["clip_fraction"] > 0


@pytest.mark.parametrize("schedule", ["epsilon", "v_prediction", "flow"])
def test_dpos_gradient_is_the_closed_form(schedule):
    """-log sigmoid(-beta/2 ((e_w - ref_w) - (e_l - ref_l))), where e = |M x_t - target|^2 / 3."""
    estimator = DPO(beta=3.0, draws=2)
    model, adapter = learner(estimator, flow() if schedule == "flow" else ddim(schedule))
    (one,) = estimator.minibatch(collected(estimator), 0)
    rewards = one.advantages.view(4, 2)
    assert (rewards[:, 0] > rewards[:, 1]).all()  # the best first
    matrix, a, b = model.effective(adapter)
    draws = torch.Generator().set_state(one.batch.generator.get_state())
    total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for pair in one.rollout.latents.view(4, 2, 3):
        for _ in range(2):
            k = int(torch.randint(1000, (), generator=draws))
            noise = torch.randn(1, 1, 1, 1, 3, generator=draws, dtype=torch.float64).view(1, 3)
            if schedule == "flow":
                sigma = float(model.new_scheduler(Sampling(num_inference_steps=1000)).sigmas[k])
                alpha, target = 1 - sigma, noise - pair
            else:
                alpha = float(model.scheduler.alphas_cumprod[k] ** 0.5)
                sigma = (1 - alpha**2) ** 0.5
                target = noise.expand(2, 3)
                if schedule == "v_prediction":
                    target = alpha * noise - sigma * pair
            x = alpha * pair + sigma * noise
            base = model.denoiser.to_q.get_base_layer().weight
            gained = ((x @ base.T - target) ** 2 - (x @ matrix.T - target) ** 2).mean(dim=1)
            margin = 1.5 * (gained[0] - gained[1])
            signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
            pull = outer(signs * (x @ matrix.T - target), x) * 2 / WIDTH
            total += torch.sigmoid(-margin) * 1.5 * pull / 8
    found, rows = gradients(estimator, adapter, [one])
    for got, want in zip(found, of_matrix(total, a, b)):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    assert 0 <= rows[0].info["preferred"] <= 1


def test_a_tie_teaches_dpo_nothing():
    estimator = DPO()
    _, adapter = learner(estimator, ddim())
    found = collected(estimator)
    found[0].rewards = torch.zeros(8)
    pulled, _ = gradients(estimator, adapter, estimator.minibatch(found, 0))
    assert not any(gradient.any() for gradient in pulled)


# ------------------------------------------------------------------------------------- transitions


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_steps_are_diffusers_ddim(prediction, eta):
    model = Toy(ddim(prediction, set_alpha_to_one=False), 7)
    sampling = Sampling().resolve(model)
    for i in range(7):
        scheduler = model.new_scheduler(sampling)
        t, x, output = scheduler.timesteps[i], *torch.randn(2, 2, 1, 1, 1, 3).double()
        move = transition(model, sampling, i, eta)
        theirs = model.step(scheduler, output, t, x, eta=eta, generators=[seeded(1), seeded(2)])
        ours = move.sample(output, x, [seeded(1), seeded(2)])
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        normal = torch.distributions.Normal(move.mean(output, x), move.std)
        density = normal.log_prob(ours).mean(dim=(1, 2, 3, 4))
        torch.testing.assert_close(move.log_prob(move.mean(output, x), ours), density)


def test_steps_of_a_flow_are_flow_grpos():
    """Equation 9 of arXiv 2505.05470: x + (v + s^2 / 2t (x + (1 - t) v)) dt + s sqrt(dt) noise."""
    model = Toy(flow(), 5)
    sampling = Sampling().resolve(model)
    sigmas = model.new_scheduler(sampling).sigmas.double().tolist()
    for i in range(4):
        t, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
        s = 0.7 * math.sqrt(t / (1 - (t if i else sigmas[1])))
        x, v = torch.randn(2, 2, 1, 1, 1, 3).double()
        move = transition(model, sampling, i)
        mean = x + (v + s**2 / (2 * t) * (x + (1 - t) * v)) * dt
        torch.testing.assert_close(move.mean(v, x), mean, rtol=1e-10, atol=1e-10)
        assert move.std == pytest.approx(s * math.sqrt(-dt))
        scheduler = model.new_scheduler(sampling)
        without = model.step(scheduler, v, scheduler.timesteps[i], x)
        close = {"rtol": 1e-5, "atol": 1e-6}  # diffusers' step is in float32
        torch.testing.assert_close(transition(model, sampling, i, 0.0).mean(v, x), without, **close)
    assert transition(model, sampling, 4).std == 0  # the last one goes to clean latents


def test_schedulers_without_a_density_are_refused():
    from diffusers import HeunDiscreteScheduler

    model = Toy(HeunDiscreteScheduler(), 3)
    with pytest.raises(
        ValueError, match="the steps of HeunDiscreteScheduler have no known probability"
    ):
        transition(model, Sampling().resolve(model), 0)


# ------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "how", [DDPO(), GRPO(), DPO(beta=20.0, draws=4)], ids=["ddpo", "grpo", "dpo"]
)
def test_the_reward_rises(how, tmp_path):
    """On held-out seeds, by an interval of the paired differences."""
    model = Toy(flow() if isinstance(how, GRPO) else ddim(), 4)
    options = {"steps": 25, "batch_size": 16, "learning_rate": 2e-2, "rank": 3, "progress": False}
    run = align(model, Middle(), ["a", "b"], estimator=how, output_dir=tmp_path / "run", **options)
    assert len(run.rewards) == 25 and run.metrics[-1]["learning_rate"] == 2e-2
    texts = [f"clip {i}" for i in range(48)]
    options = {"seeds_per_prompt": 1, "batch_size": 48, "progress": False}
    row = evaluate(model, run, Middle(), texts, **options).row("prompts", "middle")
    assert row.low is not None and row.low > 0


def micro_model(directory):
    model = load(directory, dtype=torch.float32)
    model.defaults |= {"num_inference_steps": 3, "num_frames": 3, "height": 16, "width": 16}
    return model


LEARNERS = [
    DDPO(min_count=2, buffer_size=3),
    GRPO(group_size=4, beta=0.1, timestep_fraction=0.5),
    DPO(group_size=2),
]
NAMES = ["ddpo", "grpo", "dpo"]


@pytest.mark.parametrize("how", LEARNERS, ids=NAMES)
def test_resume_is_bit_equal_to_an_uninterrupted_run(how, micro_directory, tmp_path):
    options = FAST | {"estimator": how, "gradient_accumulation_steps": 2, "lr_scheduler": "cosine"}

    def run(name, **more):
        more |= {"output_dir": tmp_path / name, **options}
        return align(micro_model(micro_directory), First(), PROMPTS, steps=4, **more)

    def stop(row):
        if row["step"] == 2:
            raise KeyboardInterrupt

    whole = run("whole")
    run("parts", callback=stop)
    again = run("parts", resume=True)
    assert untimed(again.metrics) == untimed(whole.metrics)
    for a, b in zip(whole.adapter.parameters(), again.adapter.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(p.any() for p in whole.adapter.parameters()[1::2])
    kept = json.loads((tmp_path / "parts" / "config.json").read_text())["estimator"]
    assert kept == repr(how) and repr(parse_estimator(kept)) == kept
    options["estimator"] = DDPO(clip_range=0.5)
    with pytest.raises(ValueError, match="estimator was .*, now 'DDPO.*clip_range=0.5"):
        run("parts", resume=True)


def every_learner(directory, folder):
    for name, how in zip(NAMES, LEARNERS):
        train(directory, folder / name, {"estimator": how, "steps": 2})


def test_two_processes_are_one_with_twice_the_group(micro_directory, tmp_path):
    launch(every_learner, micro_directory, tmp_path)
    for name, how in zip(NAMES, LEARNERS):
        shared = {"estimator": how, "steps": 2}
        assert_same(left(tmp_path / name, 0), left(tmp_path / name, 1))
        for twice in ("gradient_accumulation_steps", "batch_size"):
            if twice == "batch_size" and isinstance(how, (GRPO, DPO)):
                continue  # which draw steps for each batch
            one = tmp_path / f"{name}-{twice}"
            train(micro_directory, one, shared | {twice: 2 if twice[0] == "g" else 4})
            assert_same(left(tmp_path / name), left(one), rtol=1e-10, atol=1e-10)


class Saved:
    """A tensor that autograd keeps for a backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


def prepared(model, **options):
    """An estimator on the micro model, and a roll-out to learn from."""
    estimator, adapter = GRPO(group_size=2), lora.add(model, 2)
    config = TrainConfig(batch_size=2, frames=Frames.all(), gradient_checkpointing=False)
    config.sampling = Sampling(guidance_scale=3.0, **options).resolve(model)
    estimator.setup(model, adapter, First(), config)
    found = [estimator.collect(Batch(["a red star"] * 2, [0, 1], seeded(0)))]
    estimator.advantages(found, lambda value: [value])
    return estimator, adapter, estimator.minibatch(found, 0)


@pytest.mark.parametrize("sequential", [False, True])
def test_one_calls_graph_is_in_memory_at_a_time(micro, sequential, monkeypatch):
    """What a call saved for its backward pass is gone when the next one begins."""
    estimator, adapter, (one,) = prepared(micro, sequential_guidance=sequential)
    assert not any(state.requires_grad for state in [*one.rollout.states, one.rollout.latents])
    predict, saved, counts = micro.predict, weakref.WeakSet(), []

    def pack(tensor):
        saved.add(holder := Saved(tensor))
        return holder

    def watched(latents, t, inputs):
        before, output = len(saved), predict(latents, t, inputs)
        counts.append((before, len(saved)))
        return output

    monkeypatch.setattr(micro, "predict", watched)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        gradients(estimator, adapter, [one])
    assert all(before == 0 for before, _ in counts)
    with_graph = sum(after > 0 for _, after in counts)
    assert with_graph == len(one.steps) * (2 if sequential else 1)


def test_guidances_branches_one_by_one_give_the_same_gradient(micro):
    found = []
    for sequential in (False, True):
        estimator, adapter, parts = prepared(micro, sequential_guidance=sequential)
        found.append(gradients(estimator, adapter, parts)[0])
        adapter.remove()
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


def test_micro_batches_draw_each_for_itself():
    """torch's CPU generator reads 32 bits of a seed."""
    draws = [torch.randn(4, generator=seeded(derived_seed(2**31, k))) for k in range(50)]
    assert len({tuple(x.tolist()) for x in draws}) == 50
    assert derived_seed(7, 0) == 7


def test_ddpo_compares_with_a_prompts_history():
    estimator = DDPO(min_count=3, buffer_size=4)
    learner(estimator, ddim())
    first = estimator.compare(["a", "b", "a"], torch.tensor([1.0, 2.0, 3.0]))
    assert first.tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5], rel=1e-4)  # the step's
    second = estimator.compare(["a", "b"], torch.tensor([5.0, 4.0]))
    assert second[0] == pytest.approx(2 / (8 / 3) ** 0.5, rel=1e-4)  # of 1, 3, 5
    assert second[1] == pytest.approx(-1, rel=1e-4)  # of 5, 4: there are two of its own
    estimator.restore(json.loads(json.dumps(estimator.state())))
    estimator.compare(["a", "a"], torch.tensor([7.0, 9.0]))
    assert estimator.state()["a"] == [3.0, 5.0, 7.0, 9.0]


@pytest.mark.parametrize("kind", [DDPO, GRPO])
def test_parts_of_a_reward_are_compared_each_by_itself(kind, micro):
    """A part of a thousand times the scale decides alone, unless the parts are compared apart."""
    reward = brightness() + 1000 * colorfulness()
    options = {"group_size": 4} if kind is GRPO else {}
    prompts = ["a", "a", "a", "a", "b", "b", "b", "b"]
    generator = torch.Generator().manual_seed(0)
    scores = {part.name: torch.rand(8, generator=generator) for part in reward.parts()}
    total = sum(w * x for w, x in zip((1, 1000), scores.values()))
    weights = {"colorfulness": 2.0, "brightness": -1.0}

    def advantages(**more):
        estimator = kind(**options | more)
        config = TrainConfig(sampling=Sampling(num_inference_steps=2).resolve(micro))
        adapter = lora.add(micro, 2)
        try:
            estimator.setup(micro, adapter, reward, config)
        finally:
            adapter.remove()
        one = SimpleNamespace(
            batch=Batch(prompts, [0] * 8, generator), rewards=total, parts=scores, problem=None
        )
        estimator.advantages([one], lambda value: [value])
        return one.advantages, estimator

    alone = {name: kind(**options) for name in scores}
    for estimator in alone.values():
        estimator.history = {}
    expected = sum(
        w * alone[name].compare(prompts, scores[name].double()) for name, w in weights.items()
    )
    got, estimator = advantages(reward_weights=weights)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        advantages()[0], alone["colorfulness"].compare(prompts, total.double()).to(got)
    )
    with pytest.raises(ValueError, match="names 'hps'; the reward's parts are brightness, colorfu"):
        advantages(reward_weights={"hps": 1.0})


def test_what_cannot_be_met_is_said_before_the_work(micro_directory, tmp_path):
    model = micro_model(micro_directory)

    def refused(message, how, **options):
        with pytest.raises(ValueError, match=message):
            align(model, First(), PROMPTS, estimator=how, output_dir=tmp_path / "no", **options)
        assert not (tmp_path / "no" / "config.json").exists()

    refused("6 clips of a step .* groups of 4", GRPO(group_size=4), batch_size=6)
    refused("batch_size=3 must be a multiple of minibatches=2", DDPO(), batch_size=3)
    refused("batch_size=6 must be a multiple of group_size=4", "dpo(group_size=4)", batch_size=6)
    refused("group_size must be at least 2, got 1", "grpo(group_size=1)")
    refused("clip_range must be a number, got 'x'", "ddpo(clip_range='x')")
    refused(
        r"strategy=Last\(K=2\) chooses the steps of a reward's gradient", "ddpo", strategy=Last(2)
    )
    refused("'first' is not differentiable.*estimator=GRPO", None)
    refused("cannot read estimator 'gpro'", "gpro")
    refused("none of the 1 steps has both noise", "ddpo", num_inference_steps=1, batch_size=2)


def test_a_number_that_is_not_finite_skips_the_step_and_is_forgotten(micro_directory, tmp_path):
    calls = []

    class Moody(First):
        def scores(self, frames, prompts):
            calls.append(1)
            return super().scores(frames, prompts) * (math.nan if len(calls) == 2 else 1)

    how = DDPO()
    options = FAST | {"estimator": how, "output_dir": tmp_path / "run", "steps": 3}
    run = align(micro_model(micro_directory), Moody(), PROMPTS, **options)
    assert ["skipped" in row for row in run.metrics] == [False, True, False]
    assert sum(map(len, how.state().values())) == 4


def test_best_of_n_is_the_best_of_the_clips_that_it_samples(micro_directory):
    model = micro_model(micro_directory)
    options = {"seeds_per_prompt": 2, "progress": False}
    names = {"one": BestOf(1, First()), "three": BestOf(3, First())}
    found = evaluate(model, names, First(), PROMPTS, **options).scores["prompts"]
    assert torch.equal(found["one"]["first"], found["base"]["first"])
    assert (found["three"]["first"] >= found["base"]["first"]).all()
    assert found["three"]["first"].mean() > found["base"]["first"].mean()
    clips = BestOf(3, First()).sample(model, ["a red star"], seeds=[7])
    each = [
        BestOf(1, First()).sample(model, ["a red star"], seeds=[derived_seed(7, k)])
        for k in range(3)
    ]
    assert torch.equal(clips, max(each, key=lambda clip: clip[0, :, 0, 0, 0].mean()))


def test_a_flow_with_a_causal_decoder_learns(tmp_path):
    model = load("tiny-wan")
    options = FAST | {"num_inference_steps": 3, "num_frames": 5, "height": 32, "width": 32}
    for how in (GRPO(group_size=2, minibatches=1), DPO()):
        folder = tmp_path / type(how).__name__
        run = align(model, First(), PROMPTS, steps=1, estimator=how, output_dir=folder, **options)
        assert any(p.any() for p in run.adapter.parameters()[1::2])
        assert run.metrics[0].get("clip_fraction", 0) == 0  # the first update is on its own clips
        run.adapter.remove()


def test_in_a_shell(micro_directory, tmp_path, capsys):
    from vader_nb.cli import main

    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\n")
    words = f"model={micro_directory} prompts={tmp_path}/prompts.txt output_dir={tmp_path} name=run"
    words += " steps=1 batch_size=2 num_inference_steps=3 num_frames=2 height=16 width=16"
    words += " reward=jpeg_bytes evaluation=false progress=false"
    with pytest.raises(SystemExit):
        main(["align", *words.split()])
    assert "estimator=GRPO" in capsys.readouterr().err
    main(["align", *words.split(), "estimator=grpo(group_size=2, beta=0.01)"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["estimator"].startswith("GRPO(") and "group_size=2" in config["estimator"]
