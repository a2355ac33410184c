"""Contestants on prompts, computed step by step and kept: the base model and adapters, each from the same noise."""

import contextlib
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import prompts as prompt_sets
from ..evaluate import BASE
from ..gradient import Sampling
from ..lora import Adapter
from ..models import VideoModel
from ..rewards import Reward, as_reward
from ..rewards.base import wide
from . import clips

KEPT = 24  # prompts whose clips stay in memory; scores are small, and stay of all prompts
MOST = 200  # prompts, of which each costs a clip a contestant


@dataclass
class Clip:
    """frames (F, 3, H, W) in 256 levels, as they are shown; heat: by reward (F, H, W), see `heat_map`."""

    frames: torch.Tensor
    heat: dict[str, torch.Tensor] = field(default_factory=dict)

    def pixels(self) -> torch.Tensor:
        """frames in [0, 1]."""
        return self.frames.float() / 255


class Contest:
    """`names`: the base, then the adapters. `scores[prompt][name][reward]`: (F,), or (1,) of a reward on whole clips."""

    def __init__(
        self,
        model: VideoModel,
        adapters: dict[str, str | Path],
        rewards: dict[str, Reward],
        sampling: Sampling,
        seed: int,
    ):
        self.model, self.adapters, self.rewards = model, adapters, rewards
        self.sampling, self.seed, self.names = sampling, seed, [BASE, *adapters]
        self.scores: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
        self.clips: OrderedDict[str, dict[str, Clip]] = OrderedDict()
        self._worn: dict[str, Adapter] = {}

    # ---------------------------------------------------------------------------------------- what is computed

    def sample(self, name: str, prompt: str, seed: int) -> Generator[float, None, torch.Tensor]:
        """A contestant's clip (F, 3, H, W) in [0, 1]; yields the part that is done."""
        if name != BASE and name not in self._worn:
            self._worn[name] = clips.blended(self.model, {self.adapters[name]: 1.0})
        made = yield from clips.denoising(
            self.model, [prompt], [seed], self.sampling, self._worn.get(name)
        )
        return made[0]

    def compare(self, prompt: str, name: str) -> Generator[float, None, None]:
        """Make a contestant's clip of a prompt, and score it."""
        frames = yield from self.sample(name, prompt, self.seed)
        scores = {}
        for reward in self.rewards.values():
            with torch.no_grad(), naming(reward):
                scores[reward.name] = reward.scores(wide(frames[None]), [prompt])[0].float().cpu()
        self.scores.setdefault(prompt, {})[name] = scores
        shelf = self.clips.setdefault(prompt, {})
        shelf[name] = Clip((frames.clamp(0, 1) * 255).round().byte().cpu())
        self.clips.move_to_end(prompt)
        while len(self.clips) > KEPT:
            self.clips.popitem(last=False)

    def warm(self, prompt: str, name: str, reward: str) -> None:
        """Compute the heat map of a clip that is there."""
        clip, judge = self.clips[prompt][name], self.rewards[reward]
        with naming(judge):
            clip.heat[reward] = heat_map(judge, clip.pixels().to(self.model.device), prompt)

    # -------------------------------------------------------------------------------------------- what is known

    def shelf(self, prompt: str) -> dict[str, Clip]:
        """The clips of a prompt that are there, by contestant."""
        if prompt in self.clips:
            self.clips.move_to_end(prompt)
        return self.clips.get(prompt, {})

    def scores_of(self, prompt: str) -> dict[str, dict[str, torch.Tensor]]:
        """What is known of a prompt, by contestant and reward."""
        return self.scores.get(prompt, {})

    def missing(self, prompt: str) -> list[str]:
        """Contestants without a clip of this prompt."""
        return [name for name in self.names if name not in self.clips.get(prompt, {})]

    def cold(self, prompt: str, reward: str) -> list[str]:
        """Contestants whose clip is there, but no heat map of it."""
        return [
            name for name, clip in self.clips.get(prompt, {}).items() if reward not in clip.heat
        ]

    def scored(self, prompt: str) -> bool:
        return len(self.scores_of(prompt)) == len(self.names)

    def mean(self, prompt: str, name: str, reward: str) -> float:
        return self.scores[prompt][name][reward].mean().item()

    def difference(self, prompt: str, name: str, reward: str) -> float:
        """Adapter minus base."""
        return self.mean(prompt, name, reward) - self.mean(prompt, BASE, reward)


def part_of(
    job: Generator[float, None, torch.Tensor | None], start: float, length: float
) -> Generator:
    """A job's steps as those of a longer one's part; returns what the job returns."""
    while True:
        try:
            fraction = next(job)
        except StopIteration as end:
            return end.value
        yield start + length * fraction


@contextlib.contextmanager
def naming(reward: Reward) -> Iterator[None]:
    """Inside, an error is told to be this reward's."""
    try:
        yield
    except Exception as error:
        what = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"reward {reward.name!r} failed ({what}). vader_nb.check(reward) tries it on its own"
        ) from error


def heat_map(reward: Reward, frames: torch.Tensor, prompt: str) -> torch.Tensor:
    """|∂ reward / ∂ pixel| summed over the channels of a clip (F, 3, H, W), as (F, H, W), 1 at the clip's largest.
    All zero if the reward does not care. Raises ValueError for a reward without a gradient."""
    with torch.enable_grad():
        leaf = wide(frames.detach())[None].requires_grad_()
        score = reward(leaf, [prompt]).sum()
        if not score.requires_grad:
            raise ValueError("it has no gradient")
        (gradient,) = torch.autograd.grad(score, leaf)
    heat = gradient[0].abs().sum(1)
    return (heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)).half().cpu()


def judges(model: VideoModel, rewards: Sequence | None) -> dict[str, Reward]:
    """The rewards by name, on the model's device; default those of the tiny world.
    Raises ValueError without any, or for a name that two share."""
    if rewards is None and model.name == "tiny":
        from ..rewards import action, aesthetic, hps

        rewards = [hps("tiny"), aesthetic("tiny"), action("tiny")]
    listed = [as_reward(reward) for reward in ([rewards] if callable(rewards) else rewards or [])]
    if not listed:
        raise ValueError(
            f"no rewards to compare by: RewardComparison(model, rewards=[hps()]) for {model.name!r}"
        )
    named = {reward.name: reward for reward in listed}
    if len(named) < len(listed):
        raise ValueError(
            f"rewards need different names, got {[r.name for r in listed]}; reward.named('…') gives one"
        )
    for reward in listed:
        reward.to(model.device)
    return named


def chosen(
    model: VideoModel, prompts: Sequence[str] | None, rewards: dict[str, Reward]
) -> list[str]:
    """The prompts, each once. Raises ValueError for none, too many, or one that a reward cannot judge."""
    prompts = prompt_sets.get(clips.examples(model, 6) if prompts is None else prompts)
    if len(prompts) > MOST:
        raise ValueError(
            f"a comparison takes up to {MOST} prompts, got {len(prompts)}: give it some of them"
        )
    listed = [*dict.fromkeys(prompt for prompt in prompts if prompt.strip())]
    for reward in rewards.values():
        reward.check_prompts(listed)
    return listed
