"""Does a model of your own keep the promises of `VideoModel`? `check_model(model)` tries them one by one.

    from vader_nb.testing import check_model
    print(check_model(load("my/directory", dtype=torch.float64), Sampling(num_frames=3, height=16, width=16)))

`plain_autograd` is what the staged gradient is compared with: the whole chain in one graph.
"""

import contextlib
import copy
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from . import checkpoints, lora, memory_planner
from .gradient import Result, replay, reward_gradient
from .models import VideoModel
from .models.causal_decoder import CausalDecoder
from .prompts import Prompt
from .rewards import Reward, pixel_gradient, reward
from .sampling import Sampling, initial_state, roll_out, sample
from .strategies import (
    DirectAlign,
    DRaFTLV,
    DRTune,
    Frames,
    Last,
    LeapAlign,
    Random,
    ReFL,
    Step,
    Strategy,
)
from .trainer import align

PROMPTS = (
    "a red star spinning on a white background",
    "a blue circle growing on a sand background",
)
SEEDS = (3, 8)
STRATEGIES = (
    Last(1),
    Last(3),
    Random(),
    Step(2),
    ReFL(0.6),
    DRTune(2),
    DRTune(2, stop=1),
    DRaFTLV(2),
    DirectAlign(2),
    LeapAlign(),
)
HALF = {torch.float16: 0.99, torch.bfloat16: 0.8}  # least cosine of the gradient to float64's


class Row(NamedTuple):
    """One promise: what was measured, its largest allowed value, and whether it held."""

    check: str
    measured: float
    limit: float

    @property
    def held(self) -> bool:
        return self.measured <= self.limit  # NaN does not


class Approximation(NamedTuple):
    """How far an approximation of the decoder's gradient is off, and what it costs; there is no limit to keep.

    Attributes:
        name: of `CausalDecoder.decoder_gradient`.
        reward: what the gradient is of.
        error: the relative distance of the latents' gradient to the exact one.
        cosine: of both.
        cost: floating point operations of `decode` and `decode_vjp`, as a fraction of the exact one's.
    """

    name: str
    reward: str
    error: float
    cosine: float
    cost: float


class Report(list[Row]):
    """The rows of a check, printed as a table, with the approximations of a causal decoder below."""

    def __init__(self, rows: Iterable[Row] = (), approximations: Iterable[Approximation] = ()):
        super().__init__(rows)
        self.approximations = list(approximations)

    def __str__(self) -> str:
        lines = [f"{'check':<44}{'measured':>10}{'limit':>10}"]
        for row in self:
            end = "" if row.held else "  FAILED"
            lines.append(f"{row.check:<44}{row.measured:>10.1e}{row.limit:>10.1e}{end}")
        if self.approximations:
            lines.append(
                f"{'decoder_gradient':<18}{'of':<26}{'error':>10}{'cosine':>10}{'cost':>8}"
            )
        for one in self.approximations:
            numbers = f"{one.error:>10.3f}{one.cosine:>10.3f}{one.cost:>8.2f}"
            lines.append(f"{one.name:<18}{one.reward:<26}{numbers}")
        return "\n".join(lines)


def check_model(
    model: VideoModel,
    sampling: Sampling | None = None,
    prompts: Sequence[str | Prompt] | None = None,
    strategies: Sequence[Strategy] = STRATEGIES,
) -> Report:
    """Check a model against everything that training expects of it.

    The gradient of each strategy against plain autograd; the replay; `decode` of some frames and `decode_vjp`;
    batches; adapters there and back; half precision; a resumed run against an uninterrupted one; the memory
    that the planner predicts, for a directory that the model was saved to, against what a step takes. For a causal
    decoder, the report also says how far off each approximation of its gradient is, which is not a promise.

    Args:
        model: small, in float64 on the CPU, with weights that act (random ones are fine).
        sampling: settings that take seconds, with at least 5 steps; by default the model's with 5 steps.
        prompts: two; by default captions, with random images for a model that starts from one.
        strategies: whose gradients are compared.

    Raises:
        AssertionError: with the table, if a promise is not kept.
        ValueError: for a model in less than float64, whose gradients cannot be compared.
    """
    if model.dtype != torch.float64:
        raise ValueError(
            f"{model.name!r} is in {model.dtype}: load it with dtype=torch.float64, or rounding hides errors"
        )
    sampling = (sampling or Sampling(num_inference_steps=5)).resolve(model)
    prompts = list(prompts or example_prompts(model, sampling))
    report = Report()
    with exactly(model):
        for check in CHECKS:
            report.extend(check(model, sampling, prompts, strategies))
        if isinstance(model, CausalDecoder):
            report.approximations.extend(approximations(model, sampling, prompts))
    assert all(row.held for row in report), f"{model.name!r} does not keep its promises\n{report}"
    return report


@contextlib.contextmanager
def exactly(model: Any) -> Iterator[None]:
    """Inside, a causal decoder's gradient is the exact one, whichever approximation of it was chosen."""
    before = getattr(model, "decoder_gradient", None)
    if before is not None:
        model.decoder_gradient = "exact"
    try:
        yield
    finally:
        if before is not None:
            model.decoder_gradient = before


def example_prompts(model: VideoModel, sampling: Sampling) -> list[str | Prompt]:
    """Captions of the tiny world, with random images for a model that starts from one."""
    if not model.takes_image:
        return list(PROMPTS)
    size = 3, sampling.height, sampling.width
    images = (torch.rand(size, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS)
    return [Prompt(text, image=image) for text, image in zip(PROMPTS, images)]


def quick_check(model: VideoModel) -> Report:
    """The check of `load(..., check=True)`, in a few seconds: a wrong gradient is silent, and some decoders have one.

    On the smallest clip that the model makes, through two whole steps: the gradient against a finite difference
    along it, with and without gradient checkpointing, and `decode` of some frames against all.

    Args:
        model: of any size, where it will run. In half precision, whose finite differences are noise, only the
            other checks are made. Limits are wide, for TF32: errors of the kind looked for are tens of per cent.

    Raises:
        AssertionError: with the table, if something does not agree.
    """
    adapter = adapted(model, spread=0.03)  # so small that a line is a good approximation
    try:
        with exactly(model):
            report = Report(quick_rows(model, adapter))
    finally:
        adapter.remove()
    assert all(row.held for row in report), f"{model.name!r} is not as it should be\n{report}"
    return report


def quick_rows(model: VideoModel, adapter: lora.Adapter) -> Iterator[Row]:
    sampling = smallest(model)
    prompts = example_prompts(model, sampling)[:1]
    strategy = Last(model.num_steps(sampling))
    setup = REWARDS["clip"], prompts, SEEDS[:1], sampling, strategy, Frames.all()
    _, gradient = staged(model, adapter, *setup, gradient_checkpointing=False)
    _, again = staged(model, adapter, *setup, gradient_checkpointing=True)
    wide = model.dtype in (torch.float32, torch.float64)
    limit = 1e-3 if wide else 0.1
    yield Row("with checkpointing against without", apart(again, gradient), limit)
    if wide:
        loss = lambda: -staged(model, adapter, *setup)[0].mean().item()  # noqa: E731
        error = abs(slope_along(adapter, gradient, loss) / gradient.norm().item() - 1)
        yield Row("gradient against a finite difference", error, 0.1)
    if model.exact:
        with torch.no_grad():
            latents = roll_out(model, prompts, SEEDS[:1], sampling, adapter=adapter).latents
            frames = [sampling.num_frames - 1, 0]
            part, whole = model.decode(latents, frames), model.decode(latents)[:, frames]
        limit = 1e-4 if wide else 0.02
        yield Row("decode of some frames against all", apart(part, whole), limit)


def smallest(model: VideoModel) -> Sampling:
    """Two steps of a small clip, or of the default one where the model makes no other."""
    for num_frames, side in ((5, 32), (9, 32), (9, 64)):
        sampling = Sampling(2, num_frames=num_frames, height=side, width=side, eta=0.0).resolve(
            model
        )
        with contextlib.suppress(ValueError):
            model.latent_shape(sampling)
            return sampling
    return Sampling(num_inference_steps=2, eta=0.0).resolve(model)


def slope_along(adapter: lora.Adapter, direction: torch.Tensor, loss: Callable[[], float]) -> float:
    """The finite difference of a loss along a direction of the adapter's parameters, of unit length."""
    parameters = adapter.parameters()
    sizes = [p.numel() for p in parameters]
    unit = direction / direction.norm()
    step = 1e-3 * math.sqrt(sum(p.detach().square().sum().item() for p in parameters))
    values = []
    for sign in (1, -2):  # there, and from there to the other side
        for p, part in zip(parameters, unit.split(sizes)):
            p.data += sign * step * part.view_as(p).to(p.dtype)
        values.append(loss())
        take_gradient(adapter)
    for p, part in zip(parameters, unit.split(sizes)):
        p.data += step * part.view_as(p).to(p.dtype)
    return (values[0] - values[1]) / (2 * step)


# ------------------------------------------------------------------------------------------ two rewards


def of_frames(frames: torch.Tensor, prompts) -> torch.Tensor:
    """Nonlinear, so that a wrong mean over frames shows."""
    ramp = torch.linspace(0.5, 1.5, frames.shape[-1]).to(frames)
    return (frames.square() * ramp).mean(dim=(1, 2, 3, 4))


def of_clips(frames: torch.Tensor, prompts) -> torch.Tensor:
    jumps = frames.diff(dim=1).square().sum(dim=(1, 2, 3, 4)) / 100
    return frames.mean(dim=(1, 2, 3, 4)) ** 3 - jumps


REWARDS = {"frames": reward(of_frames, per_frame=True), "clip": reward(of_clips)}


def adapted(model: VideoModel, seed: int = 1, spread: float = 0.3) -> lora.Adapter:
    """An adapter that acts: with B = 0 a wrong path through A would not show."""
    adapter = lora.add(model, rank=2, seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(spread * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return adapter


def take_gradient(adapter: lora.Adapter) -> torch.Tensor:
    """The gradient as one vector; the adapter is left without one."""
    parameters = adapter.parameters()
    parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
    for p in parameters:
        p.grad = None
    return torch.cat(parts)


# --------------------------------------------------------------------------------------- plain autograd


def plain_autograd(
    model: VideoModel,
    adapter: lora.Adapter,
    reward: Reward,
    prompts: Sequence[str | Prompt],
    seeds: Sequence[int],
    sampling: Sampling,
    strategy: Strategy,
    frames: Frames,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards (B,) and the adapter's gradient as one vector, with every step in one graph and nothing staged.

    Follows the papers' definitions, not the package's plan: each branch detaches what its paper detaches.
    """
    sampling = sampling.resolve(model)
    generator = torch.Generator().manual_seed(0)
    plan = strategy.plan(model.num_steps(sampling), generator)  # only to draw the same numbers
    chosen = frames.choose(sampling.num_frames, generator, model.given_frames(prompts))
    conditioning, latents, generators = initial_state(model, prompts, seeds, sampling)
    scheduler = model.new_scheduler(sampling)
    denoise = partial(guided, model, conditioning, sampling)
    weights, states = adapter.parameters(), []
    for i, t in enumerate(scheduler.timesteps):
        n = len(scheduler.timesteps) - i  # counted from the end
        scaled = model.scale_input(scheduler, latents, t)
        states.append(latents)
        if isinstance(strategy, (Last, Random)):
            with torch.set_grad_enabled(n <= max(plan.active)):
                output = denoise(scaled, t)
        elif isinstance(strategy, Step):
            # Later steps pass the gradient on; their own parameters' part does not count.
            for p in weights:
                p.requires_grad_(n == strategy.i)
            with torch.set_grad_enabled(n <= strategy.i):
                output = denoise(scaled, t)
        elif isinstance(strategy, (ReFL, DRTune)):
            # sg(x) into the network; only the chosen steps' outputs keep their graph
            with torch.set_grad_enabled(n in plan.active):
                output = denoise(scaled.detach(), t)
            if n == plan.stop + 1 and plan.stop:
                latents = model.x0(scheduler, output, t, latents)
                break
        else:
            with torch.no_grad():
                output = denoise(scaled, t)
        latents = model.step(scheduler, output, t, latents, eta=sampling.eta, generators=generators)
    for p in weights:
        p.requires_grad_(True)
    finals = [latents]
    if isinstance(strategy, (DRaFTLV, DirectAlign)):
        clean = model.with_given(latents, conditioning).detach()
        options = plan.stop, clean, generators
        finals = [noised_again(model, sampling, denoise, *options) for _ in range(strategy.n)]
    if isinstance(strategy, LeapAlign):
        finals = [two_leaps(model, sampling, denoise, [*states, latents], plan)]
    texts: Any = list(prompts)
    clips = [model.decode(model.with_given(final, conditioning), chosen) for final in finals]
    value = torch.stack([reward(clip, texts) for clip in clips]).mean(0)
    (-value.mean()).backward()
    return value.detach(), take_gradient(adapter)


def guided(model, conditioning, sampling, latents, t) -> torch.Tensor:
    """The denoiser's output after guidance, branch by branch, with a graph through those that learn."""
    learning, outputs = model.learning_branches(sampling), {}
    for name in model.branches(sampling):
        with torch.set_grad_enabled(torch.is_grad_enabled() and name in learning):
            outputs |= model.predict_branches(latents, t, conditioning, [name])
    return model.combine(outputs, t, sampling)


def noised_again(model, sampling, denoise, stop, clean, generators) -> torch.Tensor:
    """DRaFT-LV: the final latents noised to the last step's level, and that step taken with a graph.

    Direct-Align: to that of the step before the last `stop` ones, whose noise is then taken off again.
    """
    scheduler = model.new_scheduler(sampling)
    t = scheduler.timesteps[-1 - stop]
    noised = model.add_noise(scheduler, clean, t, generators)
    output = denoise(model.scale_input(scheduler, noised, t), t)
    if not stop:
        return model.step(scheduler, output, t, noised, eta=sampling.eta, generators=generators)
    clean_then = model.x0(scheduler, output, t, noised)
    (alpha, sigma), (alpha_next, sigma_next) = (
        [float(x) for x in model.signal_and_noise(model.new_scheduler(sampling), at)]
        for at in scheduler.timesteps[-1 - stop :][:2]
    )
    known, found = ((noised - alpha * x) / sigma for x in (clean, clean_then))
    following = alpha_next * clean_then + sigma_next * found
    return (following - sigma_next * known) / alpha_next


def two_leaps(model, sampling, denoise, states, plan) -> torch.Tensor:
    """LeapAlign: from the earlier step's state to the later one's, and from there to the final latents."""
    (j, k), steps = sorted(plan.active), len(states) - 1
    latents = states[steps - k].detach()
    for n, landing in ((k, steps - j), (j, steps)):
        scheduler = model.new_scheduler(sampling)
        t = scheduler.timesteps[-n]
        levels = model.signal_and_noise(scheduler, t)
        passed = plan.leap * latents + (1 - plan.leap) * latents.detach()
        output = denoise(model.scale_input(scheduler, passed, t), t)
        clean = model.x0(scheduler, output, t, latents)
        noise, following = (latents - levels[0] * clean) / levels[1], (1.0, 0.0)
        if n == k:
            following = model.signal_and_noise(
                model.new_scheduler(sampling), scheduler.timesteps[-j]
            )
        landed = following[0] * clean + following[1] * noise
        latents = states[landing].detach() + landed - landed.detach()
    return latents


def staged(model, adapter, reward, prompts, seeds, sampling, strategy, frames, **options):
    """What `plain_autograd` returns, by `reward_gradient`."""
    settings = {"strategy": strategy, "frames": frames, "sampling": sampling}
    generator = torch.Generator().manual_seed(0)
    result: Result = reward_gradient(
        model, adapter, reward, prompts, seeds=seeds, generator=generator, **settings, **options
    )
    return result.rewards, take_gradient(adapter)


# --------------------------------------------------------------------------------------------- the checks


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The relative distance of two tensors; NaN if the second one is zero."""
    norm = other.norm().item()
    return (one - other).norm().item() / norm if norm else math.nan


def gradients(model, sampling, prompts, strategies) -> Iterator[Row]:
    adapter = adapted(model)
    for strategy in strategies:
        errors = []
        for scored in REWARDS.values():
            setup = model, adapter, scored, prompts, SEEDS, sampling, strategy, Frames.all()
            (ours, gradient), (theirs, expected) = staged(*setup), plain_autograd(*setup)
            errors += [apart(gradient, expected), apart(ours, theirs)]
        worst = math.nan if any(map(math.isnan, errors)) else max(errors)
        yield Row(f"gradient of {strategy} against autograd", worst, 1e-9)
    adapter.remove()


def replays(model, sampling, prompts, strategies) -> Iterator[Row]:
    adapter = adapted(model)
    plan = Last(3).plan(model.num_steps(sampling), None)
    rollout = roll_out(model, prompts, SEEDS, sampling, adapter=adapter, window=3)
    again = replay(model, rollout, plan, lambda active: torch.enable_grad())
    adapter.remove()
    yield Row(
        "replayed latents against the roll-out's", apart(again.detach(), rollout.latents), 0.0
    )


def decodings(model, sampling, prompts, strategies) -> Iterator[Row]:
    latents = roll_out(model, prompts, SEEDS, sampling).latents
    bounds = model.decode(latents)
    yield Row("frames outside 0 to 1", max(-bounds.min().item(), bounds.max().item() - 1), 0.0)
    if not model.exact:  # it declares that parts differ from the whole: nothing to check
        return
    frames = [0, sampling.num_frames // 2, sampling.num_frames - 1]
    leaf = latents.clone().requires_grad_()
    whole = model.decode(leaf)
    part = model.decode(latents, frames)
    error = (part - whole[:, frames]).abs().max().item()
    yield Row("decode of some frames against all", error, 1e-9)
    generator = torch.Generator().manual_seed(0)
    pulled = torch.randn(part.shape, generator=generator, dtype=part.dtype)
    (expected,) = torch.autograd.grad(whole[:, frames], leaf, pulled)
    found = model.decode_vjp(latents, frames, pulled, decode_chunk_size=2)
    yield Row("decode_vjp against autograd", apart(found, expected), 1e-9)


def batches(model, sampling, prompts, strategies) -> Iterator[Row]:
    both = sample(model, prompts, seeds=SEEDS, sampling=sampling)
    pairs = zip(prompts, SEEDS)
    alone = torch.cat([sample(model, p, seeds=[seed], sampling=sampling) for p, seed in pairs])
    yield Row("two clips at once against one by one", (both - alone).abs().max().item(), 1e-9)
    again = sample(model, prompts, seeds=SEEDS, sampling=sampling)
    yield Row("the same seeds twice", (both - again).abs().max().item(), 0.0)


def adapters(model, sampling, prompts, strategies) -> Iterator[Row]:
    make = partial(sample, model, prompts, seeds=SEEDS, sampling=sampling)
    base, adapter = make(), adapted(model)
    expected = make(adapter=adapter)
    with tempfile.TemporaryDirectory() as folder:
        path = adapter.save(Path(folder) / "adapter.safetensors")
        adapter.remove()
        found = make(adapter=path)
    yield Row("an adapter saved and loaded", (found - expected).abs().max().item(), 1e-9)
    yield Row("an adapter that does nothing", float(torch.equal(expected, base)), 0.0)
    yield Row("the base after an adapter was removed", (make() - base).abs().max().item(), 0.0)


def half_precision(model, sampling, prompts, strategies) -> Iterator[Row]:
    # Without the sampler's noise, which would be another one if drawn in half precision.
    quiet = replace(sampling, eta=0.0)
    setup = REWARDS["frames"], prompts, SEEDS, quiet, Last(1), Frames.at(0)
    adapter = adapted(model)
    _, expected = staged(model, adapter, *setup)
    adapter.remove()
    for dtype, least in HALF.items():
        twin = with_same_noise(model, dtype)
        _, found = staged(twin, adapted(twin), *setup)
        cosine = torch.cosine_similarity(found.double(), expected, dim=0).item()
        yield Row(f"1 - cosine of {str(dtype)[6:]}'s gradient", 1 - cosine, 1 - least)


def with_same_noise(model: VideoModel, dtype: torch.dtype) -> VideoModel:
    """A copy in half precision whose noise is the model's: drawn in half precision, it would be another."""
    twin = copy.deepcopy(model).to(dtype)
    drawn = model.initial_latents
    twin.initial_latents = lambda sampling, generators: drawn(sampling, generators).to(dtype)
    return twin


def resumed(model, sampling, prompts, strategies) -> Iterator[Row]:
    def train(resume: bool | Path = False) -> torch.Tensor:
        settings = {"steps": 2, "rank": 2, "batch_size": 1, "sampling": sampling, "progress": False}
        settings |= {"output_dir": folder, "checkpointing_steps": 1, "resume": resume}
        run = align(model, REWARDS["frames"], prompts, **settings)
        found = torch.cat([p.detach().flatten() for p in run.adapter.parameters()])
        run.adapter.remove()
        return found

    with tempfile.TemporaryDirectory() as folder:
        whole = train()
        again = train(resume=checkpoints.list_checkpoints(folder)[1])  # back to its first step
    yield Row("a resumed run against an uninterrupted one", (whole - again).abs().max().item(), 0.0)


def memory(model, sampling, prompts, strategies) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        saved = model.save_pretrained(Path(folder) / "model")
        settings = {f.name: getattr(sampling, f.name) for f in fields(Sampling)}
        step = memory_planner.Step.of(
            saved, "brightness", settings | {"batch_size": 2, "dtype": torch.float32}
        )
        simulated, real = step.simulate(), step.count()
    worst = max(abs(simulated[stage] / real[stage] - 1) for stage in real if stage)
    yield Row("peak memory, simulated against counted", worst, 0.1)


class OperationCounter(TorchDispatchMode):
    """Context that counts floating point operations. (torch's `FlopCounterMode` hooks modules, which
    `torch.autograd.grad` to leaves does not survive.)"""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if (operations := flop_registry.get(function._overloadpacket)) is not None:
            self.count += operations(*args, **(kwargs or {}), out_val=result)
        return result


def approximations(
    model: Any,
    sampling: Sampling,
    prompts: Sequence[str | Prompt],
    names: Sequence[str] = ("last_chunk", "window:2"),
) -> Iterator[Approximation]:
    """Of a causal decoder, on a clip of at least 25 frames: for a reward on the last one, and one that couples all."""
    sampling, prompts = replace(sampling, num_frames=max(25, sampling.num_frames)), prompts[:1]
    latents = roll_out(model, prompts, SEEDS[:1], sampling).latents
    late, every = [sampling.num_frames - 1], list(range(sampling.num_frames))

    def pulled(name: str, scored: Reward, frames: list[int]) -> tuple[torch.Tensor, int]:
        model.decoder_gradient = name
        with OperationCounter() as counter:
            with torch.no_grad():
                clip = model.decode(latents, frames)
            _, pixels = pixel_gradient(scored, clip, list(prompts))
            found = model.decode_vjp(latents, frames, pixels)
        return found.flatten(), counter.count

    with exactly(model):
        for label, scored, frames in (
            ("the last frame", REWARDS["frames"], late),
            ("all frames, coupled", REWARDS["clip"], every),
        ):
            exact, whole = pulled("exact", scored, frames)
            for name in names:
                found, part = pulled(name, scored, frames)
                cosine = torch.cosine_similarity(found, exact, dim=0).item()
                yield Approximation(name, label, apart(found, exact), cosine, part / whole)


CHECKS: tuple[Callable[..., Iterator[Row]], ...] = (
    gradients,
    replays,
    decodings,
    batches,
    adapters,
    half_precision,
    resumed,
    memory,
)
