"""VADER on one page: the gradient of a reward through the last denoising steps (arXiv 2407.08737).

The chain is   adapter -> last K denoising steps -> latents -> decoder -> frames -> reward.
Backpropagating through all of it at once would keep the activations of every part in memory together.
`reward_gradient` takes it in three stages instead, and returns what plain autograd would:

1. *Roll out* every step without a graph, noting the latents and the model's outputs of the steps
   inside the window. Before the window the adapter is fused into the weights, so it costs nothing.
2. *Score*: decode and score a few frames at a time, each chunk backpropagated to the latents at once.
   Memory does not grow with the number of frames.
3. *Replay* the window: the scheduler's arithmetic is repeated on the noted outputs, which is cheap, and
   a denoiser call is computed again, with a graph, only when the backward pass reaches it. One call's
   activations are in memory at any time, however many steps the window has.

Shapes: latents (B, C, F, H, W), frames (B, F, 3, H, W) in [0, 1], rewards (B,). Steps are counted from
the end wherever a user names them: step 1 is the last one, the one whose output is the video.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.utils.checkpoint import checkpoint

from .lora import Adapter
from .models import Conditioning, VideoModel, alone
from .offload import saved_at
from .rewards import Reward, as_reward

# --------------------------------------------------------------------------- which steps get a gradient


@dataclass(frozen=True)
class Plan:
    """One iteration's choice, drawn by a strategy: the four fields in which the estimators differ."""

    active: frozenset[int]  # steps, counted from the end, whose adapter gradient is kept
    linear: bool = (
        False  # the path from step to step: F(sg(x)) instead of F(x), DRTune's stop-gradient
    )
    stop: int = 0  # stop before this many last steps and score the clean video predicted there
    renoise: int = (
        0  # DRaFT-LV: this many fresh noisings of the final latents instead of one replay
    )


@dataclass(frozen=True)
class Last:
    """DRaFT-K (arXiv 2309.17400): the last K steps; VADER's setting is K = 1."""

    K: int = 1

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        return Plan(frozenset(range(1, within(self.K, steps, "K") + 1)))


@dataclass(frozen=True)
class Random:
    """AlignProp (arXiv 2310.03739): the last K steps with K drawn from 1 to `most` (None: all) each time."""

    most: int | None = None

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        most = steps if self.most is None else within(self.most, steps, "most")
        return Plan(
            frozenset(range(1, 1 + int(torch.randint(1, most + 1, (), generator=generator))))
        )


@dataclass(frozen=True)
class Step:
    """Only step i learns; the gradient reaches it through all later steps, whose own is left out."""

    i: int

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        return Plan(frozenset([within(self.i, steps, "i")]))


@dataclass(frozen=True)
class DRaFTLV:
    """DRaFT-LV (arXiv 2309.17400): noise the final latents n times to the last step's level, denoise each
    once, average the gradients. A lower variance than K = 1 for one roll-out."""

    n: int = 2

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        if self.n < 1:
            raise ValueError(f"DRaFT-LV needs n >= 1 noisings, got n={self.n}")
        return Plan(frozenset([1]), renoise=self.n)


@dataclass(frozen=True)
class ReFL:
    """ReFL (arXiv 2304.05977): stop at a random step of the last `part` of the chain and score the clean
    video predicted there in one go. The paper draws among the last 10 of 40 steps: a quarter."""

    part: float = 0.25

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        if not 0 < self.part <= 1:
            raise ValueError(f"ReFL's part of the chain must lie in (0, 1], got {self.part}")
        late = max(1, round(self.part * steps))
        i = int(torch.randint(1, late + 1, (), generator=generator))
        return Plan(frozenset([i]), stop=i - 1)


@dataclass(frozen=True)
class DRTune:
    """DRTune (arXiv 2405.00760): K steps evenly spread over the chain from a random offset; the gradient
    skips from step to step without passing through the denoiser, so it reaches early steps unexploded.
    With `stop` > 0 the chain ends at a random one of the last `stop` + 1 steps, on its clean prediction."""

    K: int = 1
    stop: int = 0

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        if not 0 <= self.stop < steps:
            raise ValueError(
                f"DRTune's stop must lie in 0..{steps - 1} for {steps} steps, got {self.stop}"
            )
        stop = int(torch.randint(self.stop + 1, (), generator=generator))
        every = (steps - stop) // within(self.K, steps - stop, "K")
        offset = int(torch.randint(1, every + 1, (), generator=generator))
        return Plan(
            frozenset(stop + offset + every * k for k in range(self.K)), linear=True, stop=stop
        )


STRATEGIES = {
    "last": Last,
    "random": Random,
    "step": Step,
    "draft_lv": DRaFTLV,
    "refl": ReFL,
    "drtune": DRTune,
}
Strategy = Last | Random | Step | DRaFTLV | ReFL | DRTune


def within(value: int, steps: int, name: str) -> int:
    if not 1 <= value <= steps:
        raise ValueError(
            f"{name}={value} must lie in 1..{steps}: the sampler takes num_inference_steps={steps} steps"
        )
    return value


# ------------------------------------------------------------------------- which frames are scored


@dataclass(frozen=True)
class Frames:
    """Which frames the reward sees: `random` k of them (VADER: 1), `ends` (first, middle, last),
    every `nth`, `all`, or a list of indices (negative ones count from the end)."""

    how: str = "random"
    k: int = 1
    indices: tuple[int, ...] = ()

    def choose(self, num_frames: int, generator: torch.Generator) -> list[int]:
        if self.how == "random":
            if not 1 <= self.k <= num_frames:
                raise ValueError(
                    f"cannot choose {self.k} random frames: the clip has {num_frames}, choose 1..{num_frames}"
                )
            return sorted(torch.randperm(num_frames, generator=generator)[: self.k].tolist())
        if self.how == "ends":
            return sorted({0, num_frames // 2, num_frames - 1})
        if self.how == "nth":
            if self.k < 1:
                raise ValueError(f"every n-th frame needs n >= 1, got {self.k}")
            return list(range(0, num_frames, self.k))
        if self.how == "all":
            return list(range(num_frames))
        if self.how != "list":
            raise ValueError(
                f"unknown frame choice {self.how!r}; choose random, ends, nth, all or list"
            )
        if not self.indices:
            raise ValueError(
                "an empty list of frames leaves nothing to score; name at least one index"
            )
        outside = [i for i in self.indices if not -num_frames <= i < num_frames]
        if outside:
            raise ValueError(
                f"frame index {outside[0]} is out of range: the clip has {num_frames} frames"
            )
        return sorted({i % num_frames for i in self.indices})


# ---------------------------------------------------------------------------------------- sampling


@dataclass
class Sampling:
    """How videos are made; None means the model's own default. The names are diffusers'."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None  # 1 turns classifier-free guidance off
    num_frames: int | None = None
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    eta: float = 0.0  # DDIM's noise: 0 deterministic, 1 DDPM-like
    unconditional_gradient: bool = (
        True  # False: guidance's unconditional branch gets no gradient, half the memory
    )
    sequential_guidance: bool = (
        False  # guidance's two branches one after the other: the same gradient, half the memory
    )

    def filled(self, model: VideoModel) -> "Sampling":
        defaults = {
            name: value for name, value in model.defaults.items() if getattr(self, name, 0) is None
        }
        settings = Sampling(**(vars(self) | defaults))
        if settings.num_inference_steps < 1:
            raise ValueError(
                f"num_inference_steps must be at least 1, got {settings.num_inference_steps}"
            )
        return settings


@dataclass
class Rollout:
    """What stage 1 notes. Lists run over the steps of the window, in sampling order."""

    latents: torch.Tensor  # the final ones, (B, C, F, H, W)
    timesteps: list  # of the window
    outputs: list[torch.Tensor] = field(default_factory=list)  # the denoiser's, after guidance
    start: torch.Tensor | None = None  # latents at the cut
    scheduler: object = None  # its state at the cut, so that multistep solvers replay exactly
    generators: list[torch.Generator] | None = (
        None  # their state at the cut, so that noise replays exactly
    )


def clone(generators: list[torch.Generator] | None) -> list[torch.Generator] | None:
    return generators and [torch.Generator(g.device).set_state(g.get_state()) for g in generators]


def roll_out(
    model: VideoModel,
    conditioning: Conditioning,
    latents: torch.Tensor,
    sampling: Sampling,
    *,
    generators: list[torch.Generator] | None = None,
    adapter: Adapter | None = None,
    window: int = 0,
    stop: int = 0,
    callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> Rollout:
    """Denoise `latents` without a graph; note the last `window` steps; stop before the last `stop`
    steps and return the clean latents predicted there. callback(step index, timestep, latents) after each step."""
    scheduler = model.new_scheduler(sampling.num_inference_steps)
    timesteps = list(scheduler.timesteps)
    cut, end = len(timesteps) - window, len(timesteps) - stop
    rollout = Rollout(latents, timesteps[cut:end])
    with torch.no_grad(), contextlib.ExitStack() as before_window:
        if adapter is not None:
            before_window.enter_context(adapter.fused())
        for i, t in enumerate(timesteps[:end]):
            if i == cut:
                before_window.close()  # the window runs as it will be replayed, to the last bit
                rollout.start = latents
                rollout.scheduler, rollout.generators = copy.deepcopy(scheduler), clone(generators)
            scaled = scheduler.scale_model_input(latents, t)
            output = model.predict(
                scaled, t, conditioning, sampling.guidance_scale, sampling.sequential_guidance
            )
            if i >= cut:
                rollout.outputs.append(output)
            if i == end - 1 and stop:
                latents = model.predict_x0(scheduler, output, t, latents)
            else:
                latents = model.step(
                    scheduler, output, t, latents, eta=sampling.eta, generators=generators
                )
            if callback is not None:
                callback(i, t, latents)
    rollout.latents = latents
    return rollout


def initial_noise(
    model: VideoModel, seeds: list[int], sampling: Sampling
) -> tuple[torch.Tensor, list[torch.Generator]]:
    """Starting latents, and the generators that go on to draw the sampler's noise: one a clip, on the CPU,
    so that a clip depends on its seed alone and not on its batch or device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = model.initial_latents(sampling.num_frames, sampling.height, sampling.width, generators)
    # A sigma schedule starts at the scale of its first step, which depends on how many there are.
    return noise * model.new_scheduler(sampling.num_inference_steps).init_noise_sigma, generators


@alone
@torch.no_grad()
def sample(
    model: VideoModel,
    prompts: list[str] | str,
    *,
    seeds: list[int] | int = 0,
    adapter: Adapter | None = None,
    sampling: Sampling | None = None,
    callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Videos of the prompts, (B, F, 3, H, W) in [0, 1]. `seeds`: one a clip, or the first of a row."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = list(range(seeds, seeds + len(prompts))) if isinstance(seeds, int) else list(seeds)
    if len(seeds) != len(prompts) or not prompts:
        raise ValueError(
            f"{len(prompts)} prompts need as many seeds, and at least one; got {len(seeds)} seeds"
        )
    sampling = (sampling or Sampling()).filled(model)
    latents, generators = initial_noise(model, seeds, sampling)
    conditioning = model.encode(prompts)
    rollout = roll_out(
        model,
        conditioning,
        latents,
        sampling,
        generators=generators,
        adapter=adapter,
        callback=callback,
    )
    return torch.cat([model.decode(rollout.latents, [i]) for i in range(latents.shape[2])], dim=1)


# ------------------------------------------------------------------------ stage 2: the reward's gradient

# A reward's gradient on one pixel of many is below what float16 can hold; it is scaled on its way down.
HALF_SCALE = 2.0**12


def score(
    model: VideoModel,
    latents: torch.Tensor,
    reward: Reward,
    prompts: list[str],
    frames: list[int],
    chunk: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards (B,) and the gradient of their sum with respect to the latents, `chunk` frames at a time.

    A reward on single frames streams decode -> reward -> backward. A reward on the whole clip is given all
    frames, decoded without a graph, and its gradient is then streamed back through the decoder.
    """
    model.bring(*model.decoders(), *reward.networks)
    leaf = latents.detach().requires_grad_()
    scale = HALF_SCALE if latents.dtype == torch.float16 else 1.0
    chunks = [frames[i : i + chunk] for i in range(0, len(frames), chunk)]
    rewards = torch.zeros(len(latents), device=latents.device)
    with torch.enable_grad():
        if reward.per_frame:
            for part in chunks:
                share = checked(reward, model.decode(leaf, part), prompts) * (
                    len(part) / len(frames)
                )
                (share.sum() * scale).backward()
                rewards = rewards + share.detach()
        else:
            with torch.no_grad():
                clip = torch.cat([model.decode(latents, part) for part in chunks], dim=1)
            clip.requires_grad_()
            value = checked(reward, clip, prompts)
            (value.sum() * scale).backward()
            rewards = value.detach()
            for part, gradient in zip(chunks, clip.grad.split(chunk, dim=1)):
                model.decode(leaf, part).backward(gradient)
    return rewards, leaf.grad.to(torch.promote_types(leaf.dtype, torch.float32)) / scale


def checked(reward: Reward, frames: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    value = reward(frames, prompts)
    if not isinstance(value, torch.Tensor) or value.shape != (len(prompts),):
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(
            f"reward {reward.name!r} must return one score a clip, shape ({len(prompts)},); it returned {got}"
        )
    if not value.requires_grad:
        raise ValueError(
            f"reward {reward.name!r} has no gradient: somewhere it leaves the graph (no_grad, uint8, PIL, numpy, "
            f"argmax). vader_nb.check(reward) shows more"
        )
    return value


# ------------------------------------------------------------------------------- stage 3: the replay


class Replayed(torch.autograd.Function):
    """A denoiser call whose forward pass has been run already: forward hands out the noted output,
    backward computes the call again with a graph and passes the gradient on through it.

    `calls` are (weight, function of the latents): what the output is the sum of. They are gone through one by one."""

    @staticmethod
    def forward(ctx, latents, output, anchor, calls, context):
        # `anchor` asks for a gradient, so that autograd comes by even where the latents do not ask for one.
        ctx.save_for_backward(latents)
        ctx.calls, ctx.context, ctx.wants_latents = calls, context, latents.requires_grad
        return output.clone()

    @staticmethod
    def backward(ctx, gradient):
        latents = ctx.saved_tensors[0].detach().requires_grad_(ctx.wants_latents)
        with torch.enable_grad(), ctx.context():
            for weight, call in ctx.calls:
                torch.autograd.backward(call(latents), gradient * weight)
        return latents.grad, None, None, None, None


def denoiser_calls(
    model: VideoModel, t, conditioning: Conditioning, sampling: Sampling
) -> list[tuple[float, Callable]]:
    """(weight, function of the latents), whose sum is the denoiser's output with guidance, as far as it learns."""
    scale = sampling.guidance_scale
    if scale == 1 or (sampling.unconditional_gradient and not sampling.sequential_guidance):
        return [(1.0, lambda x: model.predict(x, t, conditioning, scale))]
    branches = model.branches(conditioning, scale)[: None if sampling.unconditional_gradient else 1]
    return [
        (weight, lambda x, text=text: model.predict(x, t, text, 1)) for weight, text in branches
    ]


def replay(
    model: VideoModel,
    conditioning: Conditioning,
    rollout: Rollout,
    plan: Plan,
    sampling: Sampling,
    context: Callable[[bool], contextlib.AbstractContextManager],
) -> torch.Tensor:
    """The final latents once more, the same values, now with a graph to the adapter over the window.
    context(active) surrounds each denoiser call that is computed again."""
    scheduler, generators = copy.deepcopy(rollout.scheduler), clone(rollout.generators)
    anchor = torch.zeros((), device=rollout.start.device, requires_grad=True)
    latents, window = rollout.start, len(rollout.timesteps) + plan.stop

    for i, (t, output) in enumerate(zip(rollout.timesteps, rollout.outputs)):
        active = window - i in plan.active
        scaled = scheduler.scale_model_input(latents, t)
        if active or (scaled.requires_grad and not plan.linear):
            before = scaled.detach() if plan.linear else scaled
            calls = denoiser_calls(model, t, conditioning, sampling)
            output = Replayed.apply(
                before, output, anchor, calls, functools.partial(context, active)
            )
        if i == len(rollout.timesteps) - 1 and plan.stop:
            return model.predict_x0(scheduler, output, t, latents)
        latents = model.step(scheduler, output, t, latents, eta=sampling.eta, generators=generators)
    return latents


@contextlib.contextmanager
def checkpointed(blocks: list[torch.nn.Module]) -> Iterator[None]:
    """Activation checkpointing of these blocks: keep their inputs only, compute the inside again in backward.

    The instances' `forward` is replaced for the duration. (A wrapper module would hide LoRA weights from
    `state_dict`, and `UNet3DConditionModel` has no checkpointing of its own.)
    """
    for block in blocks:
        block.forward = lambda *args, inner=block.forward, **kwargs: checkpoint(
            inner, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


# --------------------------------------------------------------------------------- all three stages


@dataclass
class Result:
    """rewards (B,) and what they were measured on: latents (B, C, F, H, W), the frames' indices, the plan."""

    rewards: torch.Tensor
    latents: torch.Tensor
    frames: list[int]
    plan: Plan


@alone
def reward_gradient(
    model: VideoModel,
    adapter: Adapter,
    reward: Reward | Callable,
    prompts: list[str],
    *,
    seeds: list[int],
    strategy: Strategy = Last(1),
    frames: Frames = Frames(),
    sampling: Sampling | None = None,
    chunk: int = 1,
    fuse: bool = True,
    checkpoint_blocks: bool = True,
    offload: bool = False,
    weight: float = 1.0,
    generator: torch.Generator | None = None,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
) -> Result:
    """Add the gradient of  -weight * mean(reward)  to `.grad` of the adapter's parameters.

    seeds: one a clip. strategy, frames: which steps learn and which frames are scored, drawn from `generator`.
    chunk: frames decoded together. fuse: run the steps before the window with the adapter fused into the
    weights. checkpoint_blocks: recompute the denoiser's blocks in backward. offload: keep what the denoiser
    saves for backward in CPU memory. backward: receives a scalar whose gradient is the adapter's
    (`accelerator.backward`, for loss scaling).

    Raises ValueError, before any work, if the window does not fit the steps or the frames do not fit the
    clip; and for a reward without a gradient, or of another shape than (B,), or not finite.
    """
    reward, sampling = as_reward(reward), (sampling or Sampling()).filled(model)
    plan = strategy.plan(sampling.num_inference_steps, generator)
    chosen = frames.choose(sampling.num_frames, generator)
    conditioning = model.encode(prompts)
    latents, generators = initial_noise(model, seeds, sampling)

    rollout = roll_out(
        model,
        conditioning,
        latents,
        sampling,
        generators=generators,
        adapter=adapter if fuse else None,
        window=max(plan.active),
        stop=plan.stop,
    )

    device = latents.device.type
    autocast = {
        "dtype": torch.get_autocast_dtype(device),
        "enabled": torch.is_autocast_enabled(device),
    }

    @contextlib.contextmanager
    def context(active):
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                torch.autocast(device, **autocast)
            )  # autograd's own threads do not inherit it
            if checkpoint_blocks:
                stack.enter_context(checkpointed(model.blocks()))
            if offload:
                stack.enter_context(saved_at(model.home, model.denoiser))
            if not active:
                stack.enter_context(adapter.frozen())
            yield

    rewards, trouble = [], ""
    for noised in renoised(model, rollout, plan, sampling, conditioning, generators):
        value, gradient = score(model, noised.latents, reward, prompts, chosen, chunk)
        if not (value.isfinite().all() and gradient.isfinite().all()):
            trouble = (
                f"reward {reward.name!r} or its gradient is not finite: rewards {value.tolist()}"
            )
            # Replayed all the same: where the weights are cut up over processes, the others wait for this one there.
            gradient = torch.zeros_like(gradient)
        final = replay(model, conditioning, noised, plan, sampling, context)
        with unscaled(adapter, gradient) as direction:
            backward((final * direction).sum() * (-weight / (len(prompts) * max(1, plan.renoise))))
        rewards.append(value)
    if trouble:
        raise NonFinite(trouble)
    return Result(torch.stack(rewards).mean(0), rollout.latents, chosen, plan)


@contextlib.contextmanager
def unscaled(adapter: Adapter, gradient: torch.Tensor) -> Iterator[torch.Tensor]:
    """The gradient as the denoiser's precision can carry it: for float16 scaled to about 1, and what reaches
    the adapter inside scaled back; for other precisions as it is."""
    if adapter.model.dtype != torch.float16 or not gradient.any():
        yield gradient
        return
    scale = 2.0 ** -math.floor(math.log2(gradient.abs().max().item()))
    before = [p.grad for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    yield gradient * scale
    for p, grad in zip(adapter.parameters(), before):
        if p.grad is not None:
            p.grad = p.grad / scale if grad is None else grad + p.grad / scale
        else:
            p.grad = grad


def renoised(model, rollout, plan, sampling, conditioning, generators) -> Iterator[Rollout]:
    """The roll-out itself; for DRaFT-LV instead its final latents, noised to the last step's level and
    denoised once, `plan.renoise` times."""
    if not plan.renoise:
        yield rollout
    t = rollout.timesteps[-1]
    for _ in range(plan.renoise):
        # A fresh scheduler: a multistep solver's memory belongs to another trajectory than the new one.
        scheduler = model.new_scheduler(sampling.num_inference_steps)
        start = model.add_noise(scheduler, rollout.latents, t, generators)
        with torch.no_grad():
            scheduler_now = copy.deepcopy(scheduler)
            scaled = scheduler.scale_model_input(start, t)
            output = model.predict(
                scaled, t, conditioning, sampling.guidance_scale, sampling.sequential_guidance
            )
            state = clone(generators)
            final = model.step(scheduler, output, t, start, eta=sampling.eta, generators=generators)
        yield Rollout(final, [t], [output], start, scheduler_now, state)


class NonFinite(ValueError):
    """A reward or a gradient is NaN or infinite; training skips the step."""
