"""VADER on one page: the gradient of a reward through the last denoising steps (arXiv 2407.08737).

The chain is   adapter -> last K denoising steps -> latents -> decoder -> frames -> reward.
Backpropagating through all of it at once would keep the activations of every part in memory together.
`reward_gradient` works in three stages instead, and computes what plain autograd would:

1. *Roll out* every step without a graph, recording the latents and the denoiser's outputs of the steps
   inside the window (`sampling.roll_out`). Before the window the adapter is fused into the weights, so
   it costs nothing.
2. *Score*: decode and score a few frames at a time, backpropagating each chunk to the latents right away.
   Memory does not grow with the number of frames.
3. *Replay* the window: the scheduler's arithmetic is repeated on the recorded outputs, which is cheap, and
   a denoiser call is computed again, with a graph, only when the backward pass reaches it. Only one call's
   activations are in memory at a time, however many steps the window has.

Shapes: latents (B, C, F, H, W), frames (B, F, 3, H, W) in [0, 1], rewards (B,). Steps are counted from
the end wherever a user names them: step 1 is the last one, the one whose output is the video.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from . import experts
from .lora import Adapter, scale_for
from .models import VideoModel, exclusive
from .offload import kept_call, recomputation
from .prompts import Prompt
from .rewards import Reward, as_reward, pixel_gradient
from .sampling import (
    NonFiniteError,
    Rollout,
    Sampling,
    decode,
    finite,
    leap,
    next_latents,
    renoise,
    roll_out,
)
from .strategies import Frames, Last, Plan, Strategy


@dataclass
class Result:
    """Rewards (B,), final latents (B, C, F, H, W), indices of the scored frames, and the drawn plan."""

    rewards: torch.Tensor
    latents: torch.Tensor
    frames: list[int]
    plan: Plan


@exclusive
def reward_gradient(
    model: VideoModel,
    adapter: Adapter,
    reward: Reward | Callable,
    prompts: Sequence[str | Prompt],
    *,
    seeds: Sequence[int],
    strategy: Strategy = Last(1),
    frames: Frames = Frames.random(1),
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    **settings,
) -> Result:
    """Add the gradient of  -weight * mean(reward)  to `.grad` of the adapter's parameters.

    Args:
        model, adapter: from `load`, and the adapter on it.
        reward: differentiable in the frames.
        prompts, seeds: one per clip.
        strategy, frames: which steps learn, and which frames are scored.
        sampling: settings; default: the model's own.
        generator: draws the plan and the frames.
        **settings: arguments of `accumulate`.

    Raises:
        ValueError: before any work, if the adapter is not on the model or not on a denoiser of these steps, the
            window does not fit the steps, or the frames do not fit the clip; later, for a reward without a gradient
            or of the wrong shape.
        NonFiniteError: for numbers that are not finite, with the stage that they come from.
    """
    sampling = (sampling or Sampling()).resolve(model)
    adapter.check_attached(model)
    plan = experts.draw_plan(model, adapter, sampling, strategy, generator)
    chosen = frames.choose(sampling.num_frames, generator, model.given_frames(prompts))
    rollout = rolled_out(model, adapter, prompts, seeds, sampling, plan, **settings)
    return accumulate(model, adapter, as_reward(reward), rollout, plan, chosen, **settings)


def rolled_out(model, adapter, prompts, seeds, sampling, plan, start=None, **settings) -> Rollout:
    """Stage 1: what `accumulate`, with these settings, needs; `start` as for `roll_out`."""
    options = {"adapter": adapter, "start": start, **plan.rollout}
    last_call = kept_call(model, sampling, plan, **settings)
    return roll_out(model, prompts, seeds, sampling, last_call=last_call, **options)


def accumulate(
    model: VideoModel,
    adapter: Adapter,
    reward: Reward,
    rollout: Rollout,
    plan: Plan,
    frames: list[int],
    *,
    decode_chunk_size: int = 1,
    gradient_checkpointing: bool = True,
    activation_offload: bool = False,
    weight: float = 1.0,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
) -> Result:
    """Stages 2 and 3: score a roll-out and pull the reward's gradient back into the adapter.

    Args:
        model, adapter, reward: as for `reward_gradient`.
        rollout, plan, frames: from stage 1; indices of the frames to score.
        decode_chunk_size: frames decoded at once.
        gradient_checkpointing: recompute the denoiser's blocks in the backward pass.
        activation_offload: keep what the denoiser saves for the backward pass in CPU memory.
        weight: scales the gradient.
        backward: a function such as `accelerator.backward`; gets a scalar whose gradient is the adapter's.
    """
    recomputed = recomputation(model, gradient_checkpointing, activation_offload)

    @contextlib.contextmanager
    def denoiser_call(active: bool):
        with recomputed(), contextlib.nullcontext() if active else adapter.frozen():
            yield

    rewards, problem, count = [], None, max(1, plan.renoise)
    for _ in range(count):
        scored = renoise(model, rollout, plan.stop) if plan.renoise else rollout
        try:
            scored.check()
            value, gradient = score(
                model, scored.latents, reward, scored.prompts, frames, decode_chunk_size
            )
            rewards.append(value)
        except NonFiniteError as error:
            # Replayed all the same: where FSDP shards the weights, the other processes wait for this one.
            problem, gradient = error, torch.zeros_like(scored.latents)
        latents = replay(model, scored, plan, denoiser_call)
        with adapter.scaled(gradient) as direction:
            backward((latents * direction).sum() * (-weight / (len(scored.prompts) * count)))
    if problem:
        raise problem
    return Result(torch.stack(rewards).mean(0), rollout.latents, frames, plan)


# ------------------------------------------------------------------------ stage 2: the reward's gradient


def score(
    model: VideoModel,
    latents: torch.Tensor,
    reward: Reward,
    prompts: Sequence[str | Prompt],
    frames: list[int],
    decode_chunk_size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards (B,) of some frames, and the gradient of their sum with respect to the latents.

    A reward on single frames streams decode -> reward -> backward, `decode_chunk_size` frames at a time.
    A reward on the whole clip gets all frames, decoded without a graph, and its gradient is then
    streamed back through the decoder. In float16 the gradient is scaled to about 1.
    """
    model.onload(*model.decoders(), *reward.networks)
    dtype = torch.promote_types(latents.dtype, torch.float32)  # of a sum over frames
    size = decode_chunk_size if model.independent_frames else len(frames)
    chunks = [frames[i : i + size] for i in range(0, len(frames), size)]
    if reward.per_frame and model.independent_frames:
        leaf = latents.detach().requires_grad_()
        rewards = torch.zeros(len(latents), device=latents.device)
        gradient = torch.zeros_like(latents, dtype=dtype)
        for chunk in chunks:
            with torch.enable_grad():
                clip = decode(model, leaf, chunk)
            share, pixels = pixel_gradient(reward, clip, list(prompts), len(chunk) / len(frames))
            scale = scale_for(pixels, clip.dtype)
            (pulled,) = torch.autograd.grad(clip, leaf, (pixels * scale).to(clip.dtype))
            rewards, gradient = rewards + share, gradient + pulled.to(dtype) / scale
    else:
        with torch.no_grad():
            clip = torch.cat([decode(model, latents, chunk) for chunk in chunks], dim=1)
        rewards, pixels = pixel_gradient(reward, clip, list(prompts))
        scale = scale_for(pixels, clip.dtype)
        pixels = (pixels * scale).to(clip.dtype)
        gradient = model.decode_vjp(latents, frames, pixels, decode_chunk_size).to(dtype) / scale
    cause = "the reward (see vader_nb.check): a square root at zero or a division by zero"
    rewards = finite(rewards, f"rewards of {reward.name!r}", cause)
    return rewards, finite(gradient, f"gradients of {reward.name!r}", cause)


# ------------------------------------------------------------------------------- stage 3: the replay


class Replayed(torch.autograd.Function):
    """A denoiser call whose forward pass has been run already.

    Forward returns the recorded outputs; backward computes the call again, with a graph (or takes the graph that
    was kept), and passes the gradients through it.
    """

    @staticmethod
    def forward(ctx, latents, anchor, call, context, *outputs):
        # `anchor` requires a gradient, so that backward runs even where the latents do not require one.
        ctx.save_for_backward(latents)
        ctx.call, ctx.context, ctx.wants_latents = call, context, latents.requires_grad
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx, *gradients):
        latents = ctx.saved_tensors[0].detach().requires_grad_(ctx.wants_latents)
        with torch.enable_grad(), ctx.context():
            latents, outputs = ctx.call(latents)
            torch.autograd.backward(list(outputs.values()), gradients)
        return latents.grad, *[None] * (3 + len(gradients))


def replay(
    model: VideoModel,
    rollout: Rollout,
    plan: Plan,
    context: Callable[[bool], contextlib.AbstractContextManager],
) -> torch.Tensor:
    """The final latents once more: the same values, now with a graph to the adapter over the window.
    `context(active)` surrounds each denoiser call that is computed again."""
    scheduler, generators = rollout.at_window()
    sampling, latents = rollout.sampling, rollout.states[0]
    anchor = torch.zeros((), device=latents.device, requires_grad=True)
    learning = model.learning_branches(sampling)
    groups = [[name] for name in learning] if sampling.sequential_guidance else [learning]

    for i, (t, outputs) in enumerate(zip(rollout.timesteps, rollout.outputs)):
        remaining = len(rollout.timesteps) - i  # of the window
        active = remaining + plan.stop in plan.active
        if plan.leap is not None and not active:
            continue
        scheduler = scheduler if plan.leap is None else model.new_scheduler(sampling)
        scaled = model.scale_input(scheduler, latents, t)
        if active or (scaled.requires_grad and plan.passes):
            before, outputs = scaled.detach(), dict(outputs)
            before = before.lerp(scaled, plan.passes) if plan.passes else before
            for group in groups:
                call = functools.partial(denoise, model, rollout, t, group, remaining == 1)
                noted = (outputs[name] for name in group)
                again = Replayed.apply(
                    before, anchor, call, functools.partial(context, active), *noted
                )
                outputs.update(zip(group, again))
        output = model.combine(outputs, t, sampling)
        if plan.leap is not None:
            latents = leap(model, rollout, i, plan.active, output, latents)
        elif remaining == 1 and plan.stop:
            latents = rollout.without_noise(model.x0(scheduler, output, t, latents))
        else:
            latents = next_latents(model, scheduler, output, t, latents, rollout, generators)
    return model.with_given(latents, rollout.conditioning)


def denoise(model, rollout, t, branches, last, latents) -> tuple[torch.Tensor, dict]:
    """Input and outputs of a call with a graph."""
    if last and rollout.kept:
        kept, rollout.kept = rollout.kept, None
        return kept
    return latents, model.predict_branches(latents, t, rollout.conditioning, branches)
