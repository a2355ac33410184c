"""Sampling as a job: what `sampling.sample` returns, in steps between which the page is heard."""

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

import torch

from .. import lora, prompts, zoo
from ..lora import Adapter
from ..models import VideoModel
from ..sampling import Sampling, adapter_active, denoising_step, initial_noise


def denoising(
    model: VideoModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    adapter: Adapter | None = None,
    start: float = 0.0,
    end: float = 1.0,
) -> Generator[float, None, torch.Tensor]:
    """Sample videos; yield the fraction that is done after each denoising step.

    The adapter is on the model only during a step. A cell that runs between two steps finds the
    model as it left it.

    Args:
        model: The video model.
        prompts: One per clip.
        seeds: One per clip.
        sampling: Default: the model's settings.
        adapter: As `merged` returns it; None: the base model.
        start: Part of the denoising, 0 to 1, at which the adapter begins to act.
        end: Part of the denoising at which it ceases to act.

    Returns:
        The videos, (B, F, 3, H, W) in [0, 1].
    """
    sampling = (sampling or Sampling()).resolve(model)
    with torch.no_grad():
        latents, generators = initial_noise(model, list(seeds), sampling)
        conditioning = model.encode(list(prompts), sampling)
        scheduler = model.new_scheduler(sampling)
    steps = len(scheduler.timesteps)
    for i, t in enumerate(scheduler.timesteps):
        active = adapter if adapter_active(i, steps, start, end) else None
        with torch.no_grad(), lora.use_adapter(model, active):
            latents = denoising_step(
                model, scheduler, latents, t, conditioning, sampling, generators
            )
        yield (i + 1) / (steps + 1)
    with torch.no_grad():
        return model.decode(latents)


def merged(model: VideoModel, weights: Mapping[str | Path, float]) -> Adapter | None:
    """Return the weighted sum of adapter files, off the model; None if all weights are zero."""
    weights = {path: weight for path, weight in weights.items() if weight}
    with lora.use_adapter(model, weights or None) as adapter:
        return adapter


def validate_adapters(
    model: VideoModel, adapters: Mapping[str, str | Path] | None
) -> dict[str, str | Path]:
    """Return the adapters by name, after loading each once; default: those shipped for "tiny".

    Raises:
        FileNotFoundError: An adapter's file does not exist.
        ValueError: An adapter does not fit the model.
    """
    if adapters is None:
        adapters = zoo.adapters() if model.world == "tiny" else {}
    for path in adapters.values():
        merged(model, {path: 1.0})
    return dict(adapters)


def examples(model: VideoModel, count: int) -> list[str]:
    """Return prompts to begin with."""
    return list(prompts.get("tiny_held_out" if model.world == "tiny" else "hps_custom")[:count])
