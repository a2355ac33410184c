"""Sampling in steps, so that a page is heard between them: what `gradient.sample` returns, as a job."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from .. import lora, prompts, zoo
from ..gradient import Sampling, initial_noise
from ..lora import Adapter
from ..models import VideoModel


def denoising(
    model: VideoModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    adapter: Adapter | None = None,
    start: float = 0.0,
    end: float = 1.0,
) -> Generator[float, None, torch.Tensor]:
    """Videos (B, F, 3, H, W) of the prompts; yields the part that is done, 0 to 1, after each denoising step.

    adapter: one made inside `lora.bare`, which acts from `start` to `end` (see `lora.acting`). It is on the model only
    during a step: whatever a cell does between two of them finds the model as its own.
    """
    sampling = (sampling or Sampling()).filled(model)
    steps = sampling.num_inference_steps
    with torch.no_grad():
        latents, generators = initial_noise(model, list(seeds), sampling)
        conditioning, scheduler = model.encode(list(prompts)), model.new_scheduler(steps)
    with ExitStack() as stack:
        after = (
            stack.enter_context(lora.acting(adapter, start, end, num_inference_steps=steps))
            if adapter
            else None
        )
        for i, t in enumerate(scheduler.timesteps):
            with torch.no_grad(), lora.wearing(model, adapter):
                scaled = scheduler.scale_model_input(latents, t)
                output = model.predict(
                    scaled, t, conditioning, sampling.guidance_scale, sampling.sequential_guidance
                )
                latents = model.step(
                    scheduler, output, t, latents, eta=sampling.eta, generators=generators
                )
            if after is not None:
                after(i)
            yield (i + 1) / (steps + 1)
    with torch.no_grad():
        return torch.cat([model.decode(latents, [i]) for i in range(latents.shape[2])], dim=1)


def blended(model: VideoModel, weights: dict) -> Adapter | None:
    """The blend of these adapter files, off the model; None if nothing has a weight."""
    weights = {path: weight for path, weight in weights.items() if weight}
    if not weights:
        return None
    with lora.bare(model):
        return lora.blend(model, weights)


def fitting(model: VideoModel, adapters: Mapping[str, str | Path] | None) -> dict[str, str | Path]:
    """The adapters by name, each tried on once; without any, those that are shipped for "tiny".
    Raises FileNotFoundError or ValueError for one that does not fit."""
    if adapters is None:
        adapters = zoo.adapters() if model.name == "tiny" else {}
    for path in adapters.values():
        blended(model, {path: 1.0})
    return dict(adapters)


def examples(model: VideoModel, count: int) -> list[str]:
    """Prompts to begin with."""
    return list(prompts.get("tiny_held_out" if model.name == "tiny" else "hps_custom")[:count])
