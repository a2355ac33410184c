"""Work in steps, between which it can be stopped: sampling, and what interactive comparisons begin with."""

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import lora, prompts, zoo
from .lora import Adapter
from .models import VideoModel, check_loaded
from .models.modelscope import ModelScope
from .prompts import Prompt
from .rewards import Reward, as_reward, parse
from .sampling import (
    Sampling,
    adapter_active,
    continued,
    decode,
    denoising_step,
    initial_state,
    join,
    segment_settings,
)

# Work that yields the fraction done, after each denoising step or work of that size.
Job = Generator[float, None, object]


def denoising(
    model: VideoModel,
    prompts: Sequence[str | Prompt],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    adapter: Adapter | None = None,
    start: float = 0.0,
    end: float = 1.0,
) -> Generator[float, None, torch.Tensor]:
    """What `vader_nb.sample` returns; yields the fraction done after each denoising step.

    The adapter, from `merged`, is on the model only during a step: a cell that runs between two
    steps finds the model as it left it.
    """
    sampling, clips = (sampling or Sampling()).resolve(model), []
    for index in range(sampling.extend):
        one, own = segment_settings(sampling, seeds, index)
        conditioning, latents, generators = initial_state(model, prompts, own, one)
        scheduler: Any = model.new_scheduler(one)
        steps = len(scheduler.timesteps)
        for i, t in enumerate(scheduler.timesteps):
            active = adapter if adapter_active(i, steps, start, end) else None
            with torch.no_grad(), lora.use_adapter(model, active):
                latents = denoising_step(
                    model, scheduler, latents, t, conditioning, one, generators
                )
            yield (index + (i + 1) / (steps + 1)) / sampling.extend
        with torch.no_grad():
            clips.append(decode(model, model.with_given(latents, conditioning)))
        prompts = continued(prompts, clips[-1]) if sampling.extend > 1 else prompts
    return join(clips)


def merged(model: VideoModel, weights: Mapping[str | Path, float]) -> Adapter | None:
    """The weighted sum of adapter files, off the model; None if all weights are zero."""
    weights = {path: weight for path, weight in weights.items() if weight}
    with lora.use_adapter(model, None):
        return lora.combine(model, weights) if weights else None


def validate_adapters(
    model: VideoModel, adapters: Mapping[str, str | Path] | None
) -> dict[str, str | Path]:
    """The adapters by name, default: the shipped ones. Raises for one that does not fit."""
    check_loaded(model)
    adapters = shipped(model) if adapters is None else adapters
    for path in adapters.values():
        lora.check_fits(model, path)
    return dict(adapters)


def shipped(model: VideoModel) -> dict[str, Path]:
    """The adapters that come with "tiny", first the one that helps; of other models none."""
    if model.world != "tiny" or not isinstance(model, ModelScope):  # the family of "tiny"
        return {}
    return dict(sorted(zoo.adapters().items(), key=lambda item: item[0] != "hps"))


def adapter_of(which: Any) -> Any:
    """The adapter that a contestant is, or that it samples with; None for none."""
    return getattr(which, "adapter", None if hasattr(which, "sample") else which)


def usable(reward: Any, model: VideoModel, prompts: Sequence[str]) -> Reward:
    """A reward, a function or an expression as a reward on the model's device, which can judge these prompts."""
    tiny = model.world == "tiny"
    made = parse(reward, tiny=tiny) if isinstance(reward, str) else as_reward(reward)
    made.check_prompts(prompts)
    return made.to(model.device)


def examples(model: VideoModel, count: int) -> list[str]:
    """Prompts to begin with."""
    check_loaded(model)
    name = "tiny_held_out" if model.world == "tiny" else "hps_custom"
    return [str(prompt) for prompt in prompts.get(name)[:count]]


def remember(store: dict, key, value, most: int) -> None:
    """Put a value last in a dictionary, which forgets what is oldest beyond `most`."""
    store.pop(key, None)
    store[key] = value
    while len(store) > most:
        del store[next(iter(store))]
