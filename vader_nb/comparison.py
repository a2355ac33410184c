"""Contestants on prompts: their clips, scores and heat maps, computed in steps and kept."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import lora, stepwise
from . import prompts as prompt_sets
from .checkpoints import list_checkpoints
from .evaluation import BASE, named_adapters
from .lora import Adapter
from .models import VideoModel
from .prompts import Prompt
from .rewards import Reward
from .rewards.base import at_least_float32, pixel_gradient
from .sampling import Sampling
from .stepwise import Job, remember

MEMORY = 2e9  # bytes of the clips that are kept; scores are small, and stay for all prompts
MAX_PROMPTS = 200  # each costs a clip per contestant
ALL, STEPS = "contestants", "checkpoints by step"
SCALES = (0.5, 1.0, 1.5)  # of an adapter, besides 0, the base
ROWS = 4  # prompts of a grid


@dataclass
class Clip:
    frames: torch.Tensor  # uint8 (F, 3, H, W), as they are shown
    heat_maps: dict[str, torch.Tensor] = field(default_factory=dict)  # reward -> (F, H, W)

    def pixels(self) -> torch.Tensor:
        return self.frames.float() / 255


@dataclass
class View:
    """Contestants that are shown together, the base first.

    Attributes:
        names: All of them.
        prompts: How many are in sight at once.
        axis: "scale" or "step", over which rewards are drawn; without one, over frames.
        curves: Name of a curve -> contestant -> its place on the axis.
    """

    names: list[str]
    prompts: int = 1
    axis: str = ""
    curves: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        """Steps to choose from."""
        places = [place for curve in self.curves.values() for place in curve.values()]
        return sorted({int(place) for place in places}) if self.axis == "step" else []

    def shown(self, step: int) -> list[str]:
        """Who is shown; for each run, the checkpoint nearest to the step."""
        if not self.steps:
            return self.names
        runs = self.curves.values()
        return [BASE, *(min(run, key=lambda name: abs(run[name] - step)) for run in runs)]


def line_up(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, View]]:
    """All contestants by name, with scaled adapters and checkpoints, and the views of them."""
    everyone: dict[str, Any] = {BASE: None}
    views, runs = {ALL: View([BASE, *given])}, {}
    for name, which in given.items():
        which, steps = getattr(which, "folder", which), {}  # of a run its folder
        if isinstance(which, str | Path):
            which = Path(which).expanduser()
            steps = list_checkpoints(which)
            if steps and not (which / "adapter.safetensors").is_file():  # it has not ended yet
                which = steps[max(steps)]
        everyone[name] = which
        if isinstance(which, Path | Mapping):
            weights = which if isinstance(which, Mapping) else {which: 1.0}
            labels = {scale: name if scale == 1 else f"{scale:g} × {name}" for scale in SCALES}
            for scale, label in labels.items():
                everyone.setdefault(label, {path: scale * w for path, w in weights.items()})
            places = {BASE: 0.0} | {label: scale for scale, label in labels.items()}
            views[f"scales of {name}"] = View([*places], ROWS, "scale", {name: places})
        if len(steps) > 1:
            runs[name] = {f"{name}, step {step}": float(step) for step in steps}
            everyone |= dict(zip(runs[name], steps.values()))
    if runs:
        names = [name for run in runs.values() for name in run]
        views[STEPS] = View([BASE, *names], 1, "step", runs)
    return everyone, views


class Comparison:
    """Contestants on prompts, each from the noise of `seed`; `views` say which are shown together."""

    def __init__(
        self,
        model: VideoModel,
        contestants: Any,
        rewards: Sequence[Reward | Callable] | None,
        prompts: Sequence[str | Prompt] | None,
        sampling: Sampling | None,
        seed: int,
    ):
        self.model, self.seed = model, seed
        self.sampling = (sampling or Sampling()).resolve(model)
        given = prompt_sets.get(stepwise.examples(model, 6) if prompts is None else prompts)
        if (count := len(given)) > MAX_PROMPTS:
            raise ValueError(
                f"a comparison takes up to {MAX_PROMPTS} prompts, got {count}: give it fewer"
            )
        self.given = {str(prompt): prompt for prompt in given if str(prompt).strip()}
        self.prompts = [*self.given]
        self.rewards = metrics(model, rewards, self.prompts)
        for reward in self.rewards.values():
            reward.check_frames(self.sampling.total_frames)
            reward.at_fps(model.defaults["fps"])
        named = stepwise.shipped(model) if contestants is None else named_adapters(contestants)
        self.contestants, self.views = line_up(named)
        for name in named:
            lora.check_fits(model, stepwise.adapter_of(self.contestants[name]))
        # prompt -> contestant -> reward -> (F,), or (1,) for a reward on whole clips
        self.scores: dict[str, dict[str, dict[str, torch.Tensor]]] = {p: {} for p in self.prompts}
        self.clips: dict[tuple[str, str], Clip] = {}  # by prompt and contestant, the last used last
        self.merged: dict[str, Adapter | None] = {BASE: None}

    def sample(self, name: str, prompt: str, seed: int) -> Generator[float, None, torch.Tensor]:
        """Sample a contestant's clip (F, 3, H, W)."""
        which, s, given = self.contestants[name], self.sampling, [self.given[prompt]]
        if hasattr(which, "sample"):
            yield 0.0
            with lora.use_adapter(self.model, stepwise.adapter_of(which)) as adapter:
                options = {"seeds": [seed], "sampling": s, "adapter": adapter}
                frames = which.sample(self.model, given, **options)
            wanted = (1, s.total_frames, 3, s.height, s.width)
            if frames.shape != wanted:
                got = f"{tuple(frames.shape)}, but all clips must have shape {wanted}"
                raise ValueError(f"contestant {name!r} made frames of shape {got}")
            return frames[0]
        if name not in self.merged:
            weights = which if isinstance(which, Mapping) else {which: 1.0}
            live = isinstance(which, Adapter)
            adapter = which if live else stepwise.merged(self.model, weights)
            remember(self.merged, name, adapter, ROWS * len(SCALES))
        adapter = self.merged[name]
        frames = yield from stepwise.denoising(self.model, given, [seed], s, adapter)
        return frames[0]

    def score(self, frames: torch.Tensor, prompt: str) -> dict[str, torch.Tensor]:
        """The scores of a clip (F, 3, H, W) by reward."""
        scores = {}
        for reward in self.rewards.values():
            with torch.no_grad(), _errors_named(reward):
                values = reward.scores(at_least_float32(frames[None]), [prompt])
                scores[reward.name] = values[0].float().cpu()
        return scores

    def add(self, prompt: str, name: str) -> Job:
        """Sample and score a contestant's clip."""
        frames = yield from self.sample(name, prompt, self.seed)
        self.scores[prompt][name] = self.score(frames, prompt)
        clip = Clip((frames.clamp(0, 1) * 255).round().byte().cpu())
        most = max(view.prompts * len(view.shown(0)) for view in self.views.values())
        remember(self.clips, (prompt, name), clip, max(most, int(MEMORY // clip.frames.nbytes)))

    def add_heat_map(self, prompt: str, name: str, reward: str) -> None:
        clip, metric = self.clips[prompt, name], self.rewards[reward]
        with _errors_named(metric):
            frames = clip.pixels().to(self.model.device)
            clip.heat_maps[reward] = heat_map(metric, frames, prompt)

    def clips_of(self, prompt: str, names: Iterable[str]) -> dict[str, Clip]:
        """The clips of contestants that are there; they count as used last."""
        found = {name: self.clips.pop((prompt, name), None) for name in names}
        made = {name: clip for name, clip in found.items() if clip}
        self.clips |= {(prompt, name): clip for name, clip in made.items()}
        return made

    def to_do(
        self, prompts: Iterable[str], names: Iterable[str], keep: bool = False
    ) -> list[tuple[str, str]]:
        """The clips to make: those without scores or, with `keep`, those not in memory."""
        asked = [(prompt, name) for prompt in prompts for name in names]
        return [
            (p, n) for p, n in asked if n not in self.scores[p] or keep and (p, n) not in self.clips
        ]

    def lacks(self, names: Iterable[str]) -> list[str]:
        """The prompts without scores of all of these contestants."""
        wanted = {*names}
        return [prompt for prompt in self.prompts if not wanted <= self.scores[prompt].keys()]

    def mean(self, prompt: str, name: str, reward: str) -> float:
        return self.scores[prompt][name][reward].mean().item()

    def difference(self, prompt: str, name: str, reward: str, other: str = BASE) -> float:
        """A contestant's mean minus that of another one."""
        return self.mean(prompt, name, reward) - self.mean(prompt, other, reward)


def heat_map(reward: Reward, frames: torch.Tensor, prompt: str) -> torch.Tensor:
    """|∂ reward / ∂ pixel| of a clip (F, 3, H, W), relative to its largest: (F, H, W) in [0, 1]."""
    heat = pixel_gradient(reward, frames[None], [prompt])[1][0].abs().sum(1)
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


def metrics(
    model: VideoModel, rewards: Sequence | None, prompts: Sequence[str]
) -> dict[str, Reward]:
    """The rewards by name, usable on these prompts; default: those of the tiny world."""
    default = ["hps", "aesthetic", "action"] if model.world == "tiny" else []
    given = default if rewards is None else [rewards] if callable(rewards) else rewards
    made = [stepwise.usable(reward, model, prompts) for reward in given]
    if not made:
        raise ValueError(
            f"no rewards to compare by: RewardComparison(model, rewards=[hps()]) for {model.name!r}"
        )
    named = {reward.name: reward for reward in made}
    if len(named) < len(made):
        names = [reward.name for reward in made]
        raise ValueError(
            f"rewards need different names, got {names}; reward.renamed('…') gives one"
        )
    return named
