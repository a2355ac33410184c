"""The base model and adapters on prompts: clips, scores and heat maps, computed in steps and kept."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import prompts as prompt_sets
from ..evaluation import BASE, named_adapters
from ..lora import Adapter
from ..models import VideoModel
from ..prompts import Prompt
from ..rewards import Reward, as_reward, parse
from ..rewards.base import at_least_float32
from ..sampling import Sampling
from . import clips
from .jobs import Job
from .panel import remember

MAX_CLIPS = 24  # prompts whose clips stay in memory; scores are small, and stay for all prompts
MAX_PROMPTS = 200  # each costs a clip per contestant


@dataclass
class Clip:
    frames: torch.Tensor  # uint8 (F, 3, H, W), as they are shown
    heat_maps: dict[str, torch.Tensor] = field(default_factory=dict)  # reward -> (F, H, W)

    def pixels(self) -> torch.Tensor:
        return self.frames.float() / 255


class Comparison:
    """Contestants on prompts, each from the noise of `seed`: the base, then the adapters."""

    def __init__(
        self,
        model: VideoModel,
        adapters: Mapping[str, str | Path] | None,
        rewards: Sequence[Reward | Callable] | None,
        prompts: Sequence[str | Prompt] | None,
        sampling: Sampling | None,
        seed: int,
    ):
        self.model, self.seed = model, seed
        self.rewards = metrics(model, rewards)
        given = prompt_sets.get(clips.examples(model, 6) if prompts is None else prompts)
        if len(given) > MAX_PROMPTS:
            raise ValueError(
                f"a comparison takes up to {MAX_PROMPTS} prompts, got {len(given)}: give it fewer"
            )
        self.given = {str(prompt): prompt for prompt in given if str(prompt).strip()}
        self.prompts = [*self.given]
        for reward in self.rewards.values():
            reward.check_prompts(self.prompts)
        self.adapters = clips.validate_adapters(model, adapters and named_adapters(adapters))
        self.sampling = (sampling or Sampling()).resolve(model)
        self.names = [BASE, *self.adapters]
        # prompt -> contestant -> reward -> (F,), or (1,) for a reward on whole clips
        self.scores: dict[str, dict[str, dict[str, torch.Tensor]]] = {p: {} for p in self.prompts}
        # prompt -> contestant, of the prompts that were used last
        self.clips: dict[str, dict[str, Clip]] = {}
        self.merged: dict[str, Adapter | None] = {BASE: None}

    def sample(self, name: str, prompt: str, seed: int) -> Generator[float, None, torch.Tensor]:
        """Sample a contestant's clip (F, 3, H, W)."""
        if name not in self.merged:
            self.merged[name] = clips.merged(self.model, {self.adapters[name]: 1.0})
        adapter = self.merged[name]
        given = [self.given[prompt]]
        frames = yield from clips.denoising(self.model, given, [seed], self.sampling, adapter)
        return frames[0]

    def add(self, prompt: str, name: str) -> Job:
        """Sample and score a contestant's clip."""
        frames = yield from self.sample(name, prompt, self.seed)
        scores = {}
        for reward in self.rewards.values():
            with torch.no_grad(), _errors_named(reward):
                values = reward.scores(at_least_float32(frames[None]), [prompt])
                scores[reward.name] = values[0].float().cpu()
        self.scores[prompt][name] = scores
        clip = Clip((frames.clamp(0, 1) * 255).round().byte().cpu())
        remember(self.clips, prompt, self.clips_of(prompt) | {name: clip}, MAX_CLIPS)

    def add_heat_map(self, prompt: str, name: str, reward: str) -> None:
        clip, metric = self.clips[prompt][name], self.rewards[reward]
        with _errors_named(metric):
            frames = clip.pixels().to(self.model.device)
            clip.heat_maps[reward] = heat_map(metric, frames, prompt)

    def clips_of(self, prompt: str) -> dict[str, Clip]:
        """The clips of a prompt by contestant; it counts as used last."""
        if prompt in self.clips:
            remember(self.clips, prompt, self.clips[prompt], MAX_CLIPS)
        return self.clips.get(prompt, {})

    def missing_clips(self, prompt: str) -> list[str]:
        return [name for name in self.names if name not in self.clips.get(prompt, {})]

    def is_scored(self, prompt: str) -> bool:
        return len(self.scores[prompt]) == len(self.names)

    def mean(self, prompt: str, name: str, reward: str) -> float:
        return self.scores[prompt][name][reward].mean().item()

    def difference(self, prompt: str, name: str, reward: str) -> float:
        """An adapter's mean minus the base's."""
        return self.mean(prompt, name, reward) - self.mean(prompt, BASE, reward)


def heat_map(reward: Reward, frames: torch.Tensor, prompt: str) -> torch.Tensor:
    """|∂ reward / ∂ pixel| of a clip (F, 3, H, W), relative to its largest: (F, H, W) in [0, 1]."""
    with torch.enable_grad():
        leaf = at_least_float32(frames.detach())[None].requires_grad_()
        score = reward(leaf, [prompt]).sum()
        if not score.requires_grad:
            raise ValueError("it has no gradient")
        (gradient,) = torch.autograd.grad(score, leaf)
    heat = gradient[0].abs().sum(1)
    return (heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)).half().cpu()


@contextlib.contextmanager
def _errors_named(reward: Reward) -> Iterator[None]:
    """Inside, errors carry the reward's name."""
    try:
        yield
    except Exception as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        hint = "vader_nb.check(reward) tries it on its own"
        raise ValueError(f"reward {reward.name!r} failed ({what}). {hint}") from error


def metrics(model: VideoModel, rewards: Sequence | None) -> dict[str, Reward]:
    """The rewards by name, on the model's device; default: those of the tiny world."""
    if rewards is None and model.world == "tiny":
        rewards = [parse(name, tiny=True) for name in ("hps", "aesthetic", "action")]
    listed = [as_reward(reward) for reward in ([rewards] if callable(rewards) else rewards or [])]
    if not listed:
        raise ValueError(
            f"no rewards to compare by: RewardComparison(model, rewards=[hps()]) for {model.name!r}"
        )
    named = {reward.name: reward.to(model.device) for reward in listed}
    if len(named) < len(listed):
        raise ValueError(
            f"rewards need different names, got {[reward.name for reward in listed]}; "
            "reward.renamed('…') gives one"
        )
    return named
