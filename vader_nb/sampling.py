"""Sampling videos from noise: the settings, the loop, and what it records for a gradient.

    clips = sample(model, ["a red star growing on a black background"], seeds=0, adapter="runs/mine")

Shapes: latents (B, C, F, H, W), frames (B, F, 3, H, W) in [0, 1].
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch

from . import lora
from .lora import Adapter
from .models import Conditioning, VideoModel, check_loaded, exclusive
from .prompts import Prompt

T = TypeVar("T")
Callback = Callable[[int, torch.Tensor, torch.Tensor], None]  # (step index, timestep, latents)
# (step index, guided output, latents, a generator per clip) -> next latents
Step = Callable[[int, torch.Tensor, torch.Tensor, list[torch.Generator]], torch.Tensor]


def setting(default: Any, help: str, may_change: bool = False) -> Any:
    """A dataclass field with a help text. may_change: whether a resumed run may change it."""
    metadata = {"help": help, "may_change": may_change}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


SAMPLING_BOUNDS = {
    "num_inference_steps": (1, 1000),
    "guidance_scale": (0, 1000),
    "guidance_rescale": (0, 1),
    "num_frames": (1, 10_000),
    "height": (1, 16_384),
    "width": (1, 16_384),
    "eta": (0, 1),
    "extend": (1, 1000),
}


def check_bounds(settings: Any, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Raise ValueError for a setting that is not a number within its bounds (NaN is not); None is skipped."""
    for name, (least, most) in bounds.items():
        value = settings[name] if isinstance(settings, dict) else getattr(settings, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if value is not None and value > most:
            raise ValueError(f"{name} must be at most {most}, got {value}")


def with_help(cls: type[T]) -> type[T]:
    """Lists a settings class's fields and their help texts in its docstring, for Shift-Tab."""
    settings: Any = cls
    lines = [f"    {f.name}: {f.metadata.get('help', 'see `Sampling`')}." for f in fields(settings)]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:", *lines])
    return cls


@with_help
@dataclass
class Sampling:
    """How videos are made. None means the model's own default. The names are diffusers'."""

    num_inference_steps: int = setting(None, "denoising steps; default: the model's")
    guidance_scale: float = setting(None, "classifier-free guidance, 1: off; default: the model's")
    guidance_rescale: float = setting(
        0.0, "keep the contrast of strong guidance down, 0 to 1 (arXiv 2305.08891)"
    )
    num_frames: int = setting(None, "frames per clip; default: the model's")
    height: int = setting(None, "pixels; default: the model's")
    width: int = setting(None, "pixels; default: the model's")
    eta: float = setting(None, "DDIM's noise: 0 deterministic, 1 like DDPM; default: the model's")
    unconditional_gradient: bool = setting(
        True, "false: no gradient through the guidance's negative branch, half the memory"
    )
    sequential_guidance: bool = setting(
        False, "the guidance's branches one after the other: half the memory, same gradient"
    )
    extend: int = setting(
        1,
        "segments of a clip, each continuing the last frame of the one before; for models that start from an image",
    )
    options: dict = setting({}, "settings that only the model's family has")

    @property
    def total_frames(self) -> int:
        """Frames of a whole clip; a segment's first one repeats the last one before it."""
        return self.num_frames + (self.extend - 1) * (self.num_frames - 1)

    def resolve(self, model: VideoModel) -> "Sampling":
        """A copy with the model's defaults in the place of None.

        Raises:
            ValueError: for a number out of bounds, an eta that the scheduler does not have, or an option that
                the model's family does not have.
            TypeError: for a model's name in the place of the model.
        """
        check_loaded(model)
        unknown = self.options.keys() - model.sampling_options.keys()
        if unknown:
            known = ", ".join(model.sampling_options) or "none"
            raise ValueError(
                f"{model.name!r} has no sampling option {min(unknown)!r}; it has: {known}"
            )
        defaults = {
            f.name: model.defaults[f.name]
            for f in fields(self)
            if getattr(self, f.name) is None and f.name in model.defaults
        }
        has_eta = "eta" in inspect.signature(model.scheduler.step).parameters
        if self.eta is None:  # the default is for the model's own scheduler, which may be replaced
            defaults["eta"] = model.defaults.get("eta", 0.0) if has_eta else 0.0
        settings = replace(self, **defaults, options=model.sampling_options | self.options)
        check_bounds(settings, SAMPLING_BOUNDS)
        check_bounds(settings.options, model.option_bounds)
        if settings.eta and not has_eta:
            raise ValueError(
                f"eta={settings.eta} has no effect with {type(model.scheduler).__name__}: set it to 0"
            )
        if settings.extend > 1 and not model.takes_image:
            raise ValueError(
                f"extend={settings.extend}: {model.name!r} makes videos from text alone and cannot continue a frame"
            )
        return settings


class NonFiniteError(ValueError):
    """Latents, frames, a reward or a gradient hold NaN or infinity; training skips the step."""


def finite(values: torch.Tensor | None, what: str, cause: str = "") -> torch.Tensor:
    """The values. Raises NonFiniteError, with a likely cause, if one is NaN or infinite."""
    if values is None:
        raise ValueError(f"there are no {what}: it does not depend on the frames")
    if not values.detach().isfinite().all():
        shown = f": {values.tolist()}" if values.ndim == 1 else ""
        hint = f"; a likely cause: {cause}" if cause else ""
        raise NonFiniteError(f"the {what} are not finite{shown}{hint}")
    return values


def decode(
    model: VideoModel, latents: torch.Tensor, frames: list[int] | None = None
) -> torch.Tensor:
    """Frames (B, F, 3, H, W) as `VideoModel.decode`. Raises NonFiniteError."""
    cause = "the decoder overflows in half precision (load with dtype={'vae': torch.float32})"
    return finite(model.decode(latents, frames), "decoded frames", cause)


@dataclass
class Rollout:
    """What sampling a batch records. Lists have one entry per step of the window, in sampling order.

    Attributes:
        prompts, conditioning, sampling: what was sampled, and how.
        latents: the final ones, (B, C, F, H, W).
        generators: of the sampler's noise, one per clip, as they are after the last step.
        timesteps: of the window.
        states: the latents before each step.
        outputs: the denoiser's outputs at each step, by branch of the guidance.
        scheduler: a copy from the beginning of the window, so that multistep solvers replay exactly.
        window_generators: copies from there, so that the sampler's noise replays exactly.
        finite: whether all numbers are finite, for the text's states and for the latents after each step.
        kept: the last call's input and its outputs by branch, with their graph, if requested.
        known: for Direct-Align, the clean latents that were noised, and their share of what is left without the noise.
    """

    prompts: Sequence[str | Prompt]
    conditioning: Conditioning
    sampling: Sampling
    latents: torch.Tensor
    generators: list[torch.Generator]
    timesteps: list[torch.Tensor] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)
    outputs: list[dict[str, torch.Tensor]] = field(default_factory=list)
    scheduler: Any = None
    window_generators: list[torch.Generator] = field(default_factory=list)
    finite: list[torch.Tensor] = field(default_factory=list)
    kept: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None
    known: tuple[torch.Tensor, torch.Tensor] | None = None

    def without_noise(self, clean: torch.Tensor) -> torch.Tensor:
        """The predicted clean latents or, for Direct-Align, what is left of its step without the known noise.

        By the prediction, the step ends at  alpha' * clean + sigma' * noise. Minus sigma' times the known noise,
        and divided by alpha', that is a mixture of the predicted and the known clean latents.
        """
        if self.known is None:
            return clean
        known, part = self.known
        return clean + part.to(clean.device) * (known - clean)

    def begin_window(self, scheduler) -> None:
        """Copy the scheduler and the generators here, for an exact replay."""
        self.scheduler = copy.deepcopy(scheduler)
        self.window_generators = clone(self.generators)

    def note(self, t: torch.Tensor, state: torch.Tensor, outputs: dict) -> None:
        """One more step of the window."""
        self.timesteps.append(t)
        self.states.append(state)
        self.outputs.append(outputs)

    def at_window(self) -> tuple[Any, list[torch.Generator]]:
        """Copies of the scheduler and the generators as they were at the beginning of the window."""
        return copy.deepcopy(self.scheduler), clone(self.window_generators)

    def check(self) -> None:
        """Raise NonFiniteError with the first stage whose numbers were not finite. Waits for the GPU once."""
        flags = torch.stack(self.finite)
        if flags.all():
            return
        first = flags.tolist().index(False)
        cause = "float16 overflows (load with dtype=torch.bfloat16)"
        if self.latents.dtype != torch.float16:
            cause = "weights that are too large (lower learning_rate), or the scheduler's settings"
        stage = (
            f"latents after step {first} of {len(flags) - 1}" if first else "text encoder's states"
        )
        raise NonFiniteError(f"the {stage} are not finite; a likely cause: {cause}")


def clone(generators: list[torch.Generator]) -> list[torch.Generator]:
    """Generators that will draw the same numbers as these."""
    return [torch.Generator(g.device).set_state(g.get_state()) for g in generators]


def derived_seed(seed: int, k: int) -> int:
    """The k-th seed derived from one; the 0th is itself. Within the 32 bits that torch's CPU generator reads."""
    return (seed + k * 2_654_435_761) % 2**32 if k else seed


def initial_noise(
    model: VideoModel, seeds: Sequence[int], sampling: Sampling
) -> tuple[torch.Tensor, list[torch.Generator]]:
    """The latents (B, C, F, H, W) that sampling starts from, by resolved settings; one seed per clip.

    Also returns the generators that go on to draw the sampler's noise, one per clip, on the CPU, so that a
    clip depends on its seed alone and not on its batch or device. For text-to-video models; others draw for their
    conditioning first, see `initial_state`.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = model.initial_latents(sampling, generators)
    return model.start(noise, model.new_scheduler(sampling)), generators


@torch.no_grad()
def initial_state(
    model: VideoModel, prompts: Sequence[str | Prompt], seeds: Sequence[int], sampling: Sampling
) -> tuple[Conditioning, torch.Tensor, list[torch.Generator]]:
    """What sampling starts from: the conditioning, and `initial_noise`'s latents and generators.

    Raises:
        ValueError: for settings of several segments, because each has its own start.
    """
    if sampling.extend > 1:
        raise ValueError(
            f"a roll-out is one segment, and extend={sampling.extend} takes several: use sample or align"
        )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # A text that is known already must not depend on whether it was first seen under autocast.
    with torch.autocast(model.device.type, enabled=False):
        conditioning = model.encode(prompts, sampling, generators)
    noise = model.initial_latents(sampling, generators)
    return conditioning, model.start(noise, model.new_scheduler(sampling)), generators


def denoising_step(
    model: VideoModel,
    scheduler,
    latents: torch.Tensor,
    t,
    conditioning: Conditioning,
    sampling: Sampling,
    generators: list[torch.Generator] | None = None,
) -> torch.Tensor:
    """One step of sampling: the next latents (B, C, F, H, W)."""
    output = model.guided(model.scale_input(scheduler, latents, t), t, conditioning, sampling)
    return model.step(scheduler, output, t, latents, eta=sampling.eta, generators=generators)


def adapter_active(step: int, num_inference_steps: int, start: float, end: float) -> bool:
    """Whether an adapter acts in this step, counted from 0, of a chain.

    `start` and `end` lie in 0 (the noise) to 1 (the video). The rule is that of diffusers'
    `control_guidance_start` and `control_guidance_end`.
    """
    return step / num_inference_steps >= start and (step + 1) / num_inference_steps <= end


@torch.no_grad()
def roll_out(
    model: VideoModel,
    prompts: Sequence[str | Prompt],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    adapter: Adapter | None = None,
    adapter_range: tuple[float, float] = (0.0, 1.0),
    window: int = 0,
    stop: int = 0,
    last_call: Callable[[], contextlib.AbstractContextManager] | None = None,
    start: Rollout | None = None,
    step: Step | None = None,
    callback: Callback | None = None,
) -> Rollout:
    """Sample a batch without a graph, and record the last `window` steps.

    Args:
        model, prompts, seeds, sampling: as for `sample`; one per clip, and resolved.
        adapter: on the model. Before the window it is fused into the weights, where it costs nothing;
            None leaves whatever is on the model as it is.
        adapter_range: the part of the chain in which the adapter acts, see `adapter_active`.
        window, stop: how many last steps to record, and how many to skip for the clean latents predicted there.
        last_call: keep the graph of the last denoiser call, made in this context.
        start: a roll-out with the same arguments, whose window is repeated: from its latents before the
            window, with the adapter as it is now, and fresh noise where the sampler draws any.
        step: takes the steps in place of the scheduler.
        callback: as for `sample`.
    """
    scheduler, rollout = _beginning(model, prompts, seeds, sampling, start)
    conditioning, latents, generators = rollout.conditioning, rollout.latents, rollout.generators
    timesteps = list(scheduler.timesteps)
    cut, end = len(timesteps) - window, len(timesteps) - stop
    rollout.finite += start.finite[: cut + 1] if start else [conditioning.all_finite()]
    with _adapter_modes(adapter, cut, len(timesteps), adapter_range) as enter_mode:
        for i, t in list(enumerate(timesteps[:end]))[cut if start else 0 :]:
            enter_mode(i, model.denoiser_at(t))
            if i == cut:
                rollout.begin_window(scheduler)
            # A scheduler that is not asked to step does not count the steps.
            own = model.new_scheduler(sampling) if step else scheduler
            scaled = model.scale_input(own, latents, t)
            if i == end - 1 and last_call is not None:
                outputs = _kept_outputs(model, rollout, scaled, t, window - stop > 1, last_call)
            else:
                outputs = model.all_branches(scaled, t, conditioning, sampling)
            if i >= cut:
                rollout.note(t, latents, outputs)
            output = model.combine(outputs, t, sampling)
            if stop and i == end - 1:
                latents = model.x0(scheduler, output, t, latents)
            elif step is not None:
                latents = step(i, output, latents, generators)
            else:
                latents = next_latents(model, scheduler, output, t, latents, rollout)
            rollout.finite.append(latents.isfinite().all())
            if callback is not None:
                callback(i, t, latents)
    rollout.latents = model.with_given(latents, conditioning)
    return rollout


def _beginning(model, prompts, seeds, sampling: Sampling, start: Rollout | None) -> tuple:
    """The scheduler and an empty roll-out: from noise, or at another's window."""
    if start is None:
        conditioning, latents, generators = initial_state(model, prompts, seeds, sampling)
        scheduler = model.new_scheduler(sampling)
    else:
        conditioning, latents, generators = start.conditioning, start.states[0], start.generators
        scheduler = copy.deepcopy(start.scheduler)
    return scheduler, Rollout(prompts, conditioning, sampling, latents, generators)


def _kept_outputs(model, rollout: Rollout, scaled, t, passes_on: bool, last_call) -> dict:
    leaf = scaled.detach().requires_grad_(passes_on)
    with torch.enable_grad(), last_call():
        outputs = model.all_branches(leaf, t, rollout.conditioning, rollout.sampling)
    rollout.kept = leaf, outputs
    return {name: output.detach() for name, output in outputs.items()}


@torch.no_grad()
def renoise(model: VideoModel, rollout: Rollout, stop: int = 0) -> Rollout:
    """Noise the final latents to the level of the last step, or an earlier one, and repeat that step (DRaFT-LV)."""
    sampling = rollout.sampling
    # A fresh scheduler: a multistep solver's memory belongs to another trajectory than the new one.
    scheduler = model.new_scheduler(sampling)
    t = scheduler.timesteps[-1 - stop]
    state = model.add_noise(scheduler, rollout.latents, t, rollout.generators)
    again = replace(rollout, timesteps=[t], states=[state], scheduler=copy.deepcopy(scheduler))
    again.window_generators = clone(rollout.generators)
    if stop:
        levels = [model.signal_and_noise(scheduler, at) for at in (t, scheduler.timesteps[-stop])]
        alpha, sigma, alpha_next, sigma_next = (x.double() for level in levels for x in level)
        again.known = rollout.latents, sigma_next * alpha / (alpha_next * sigma)
    scaled = model.scale_input(scheduler, state, t)
    again.outputs = [model.all_branches(scaled, t, rollout.conditioning, sampling)]
    output = model.combine(again.outputs[0], t, sampling)
    if stop:
        latents = again.without_noise(model.x0(scheduler, output, t, state))
    else:
        latents = next_latents(model, scheduler, output, t, state, rollout)
    again.latents = model.with_given(latents, rollout.conditioning)
    again.finite = [*rollout.finite, again.latents.isfinite().all()]
    return again


def leap(model: VideoModel, rollout: Rollout, i: int, active, output, latents) -> torch.Tensor:
    """From step i of the window straight to the next active one (counted from the end), or to the final latents.

    Their values are the roll-out's, and their gradient is that of one long deterministic step (LeapAlign).
    """
    scheduler = model.new_scheduler(rollout.sampling)  # which is at no step of its own
    t, target = rollout.timesteps[i], rollout.latents
    landed, steps = model.x0(scheduler, output, t, latents), len(rollout.timesteps)
    for later in [n for n in range(i + 1, steps) if steps - n in active][:1]:
        target = rollout.states[later]
        alpha, sigma = model.signal_and_noise(scheduler, t)
        alpha_next, sigma_next = model.signal_and_noise(scheduler, rollout.timesteps[later])
        landed = alpha_next * landed + sigma_next * (latents - alpha * landed) / sigma
    return target + (landed - landed.detach())


def next_latents(model, scheduler, output, t, latents, rollout, generators=None) -> torch.Tensor:
    """The scheduler's step, with the roll-out's noise or that of other generators."""
    return model.step(
        scheduler,
        output,
        t,
        latents,
        eta=rollout.sampling.eta,
        generators=generators or rollout.generators,
    )


@contextlib.contextmanager
def _adapter_modes(
    adapter: Adapter | None, cut: int, steps: int, adapter_range: tuple[float, float]
) -> Iterator[Callable[[int, torch.nn.Module], None]]:
    """A function that puts the adapter into the mode of a step: disabled outside its range, fused into the step's
    denoiser before the window; as it is in the window, which is replayed."""
    current = ()

    with contextlib.ExitStack() as acting:

        def enter(step: int, denoiser: torch.nn.Module) -> None:
            nonlocal current
            if not adapter_active(step, steps, *adapter_range):
                mode = ("disabled",)
            else:
                mode = ("fused", denoiser) if step < cut else ()
            if adapter is None or mode == current:
                return
            acting.close()
            if mode:
                acting.enter_context(getattr(adapter, mode[0])(*mode[1:]))
            current = mode

        yield enter


@exclusive
@torch.no_grad()
def sample(
    model: VideoModel,
    prompts: Sequence[str | Prompt] | str | Prompt,
    *,
    seeds: Sequence[int] | int = 0,
    adapter=None,
    adapter_start: float = 0.0,
    adapter_end: float = 1.0,
    sampling: Sampling | None = None,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Make videos.

    Args:
        model: from `load`.
        prompts: one per clip, or a single one.
        seeds: one per clip, or the first of consecutive ones.
        adapter: None for the base model, whatever adapter is on it; an `Adapter` or `Run` of this
            model; a path of an adapter file, a run's folder or a checkpoint; or several with weights,
            {"runs/a": 0.7, "runs/b": 0.3}.
        adapter_start, adapter_end: the part of the denoising in which the adapter acts, 0 the noise and
            1 the video.
        sampling: settings; default: the model's own.
        callback: called after each step with (step index, timestep, latents).

    Returns:
        Frames (B, F, 3, H, W) in [0, 1].

    Raises:
        ValueError: if there are not as many seeds as prompts, for invalid settings, or for an
            adapter of another model.
        NonFiniteError: for latents or frames that are not finite.
        FileNotFoundError: for an adapter path that does not exist.
    """
    prompts = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
    seeds = list(range(seeds, seeds + len(prompts))) if isinstance(seeds, int) else list(seeds)
    if len(seeds) != len(prompts) or not prompts:
        raise ValueError(
            f"{len(prompts)} prompts need as many seeds, and at least one; got {len(seeds)} seeds"
        )
    if not 0 <= adapter_start < adapter_end <= 1:
        raise ValueError(
            f"an adapter acts from a start to a later end within 0..1, got {adapter_start} to {adapter_end}"
        )
    sampling, clips = (sampling or Sampling()).resolve(model), []
    with lora.use_adapter(model, adapter) as active:
        for index in range(sampling.extend):
            one, own = segment_settings(sampling, seeds, index)
            options = {"adapter": active, "adapter_range": (adapter_start, adapter_end)}
            rollout = roll_out(model, prompts, own, one, callback=callback, **options)
            rollout.check()
            clips.append(decode(model, rollout.latents))
            prompts = continued(prompts, clips[-1]) if sampling.extend > 1 else prompts
    return join(clips)


def segment_settings(sampling: Sampling, seeds: Sequence[int], index: int) -> tuple:
    """Settings and seeds of one segment of a long clip; the first has those of a clip by itself."""
    return replace(sampling, extend=1), [derived_seed(seed, index) for seed in seeds]


def continued(prompts: Sequence[str | Prompt], clips: torch.Tensor) -> list[Prompt]:
    """The prompts with the last frame of each clip (B, F, 3, H, W) as their image."""
    images = clips[:, -1].detach().float().cpu()
    negatives = [getattr(prompt, "negative_prompt", "") for prompt in prompts]
    return [Prompt(str(p), n, image) for p, n, image in zip(prompts, negatives, images)]


def join(clips: Sequence[torch.Tensor]) -> torch.Tensor:
    """Several clips (B, F, 3, H, W) as one; the first frame of a later one repeats the last one before it."""
    return torch.cat([clips[0], *(clip[:, 1:] for clip in clips[1:])], dim=1)
