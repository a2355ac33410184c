"""A weighted sum of rewards: how it ranks a few clips, and whether the rewards conflict.

composer = RewardComposer(model)                          in a notebook
composer.weights["aesthetic"].value = 0.5                 the same from Python
align(model, composer.reward, …)                          or rewards.parse(composer.expression)
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from ipywidgets import HTML

from .. import stepwise
from ..drawing import code, note, number, table
from ..models import VideoModel
from ..prompts import Prompt
from ..rewards import Reward, conflict, statistics
from ..stepwise import Job
from ..video import Video
from .controls import beside, column, disable, row, slider, switch
from .panel import Panel
from .player import moving

REWARDS = ("hps", "aesthetic", "action")
CLIPS = 4
NEUTRAL = 0.05  # smaller cosines happen by chance
UNKNOWN = "not measured yet"
NO_WEIGHT = "All weights are 0: nothing is asked for. Move a slider."
PLAIN = str.maketrans("<>&", "‹›+")  # labels are HTML in ipywidgets 7, plain text in 8
COSINE = (
    "Mean over the clips of the cosine between two rewards’ gradients on the pixels: 1 the same "
    "way, 0 at right angles, −1 what one gains the other loses."
)
CODE = (
    "The sum as code, for rewards.parse and reward= on the command line; in Python it is this "
    "panel’s reward. One click selects all of it."
)


class RewardComposer(Panel):
    """A weighted sum of rewards, and how it ranks a few clips of the base model, made once.

    Args:
        model: Makes the clips.
        rewards: Expressions for `rewards.parse`, or rewards and expressions by name. A reward that
            is not an expression needs a Python name, under which it appears in `expression`.
        prompts: Of the clips, two or more; `Prompt`s where the model starts from images.
        seed: Of the first clip; those of the others follow.

    Attributes:
        weights: A slider from -2 to 2 per reward.
        standardized: A checkbox: count rewards in standard deviations from their mean.
        scores: Of each reward, (B,).
        statistics: Mean and standard deviation of each reward over the clips, to 4 digits.
        cosines: Of each pair of rewards, the mean cosine of their gradients on the pixels.

    Raises:
        ValueError: Unknown rewards, fewer than two prompts, or an empty one.
    """

    title = "Reward composer"
    hint = "Move the weights: the best clip comes first, and the reward’s code is below."

    def __init__(
        self,
        model: VideoModel,
        rewards: Mapping[str, Reward | Callable | str] | Sequence[str] = REWARDS,
        prompts: Sequence[str | Prompt] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.model = model
        prompts = stepwise.examples(model, CLIPS) if prompts is None else prompts
        self.given = [prompts] if isinstance(prompts, str | Prompt) else list(prompts)
        self.prompts = [str(prompt) for prompt in self.given]
        self.seeds = list(range(seed, seed + len(self.prompts)))
        if len(self.prompts) < 2 or not all(prompt.strip() for prompt in self.prompts):
            needed = "rewards are compared on 2 or more clips, none with an empty prompt"
            raise ValueError(f"{needed}; got {self.prompts}")
        named = by_name(rewards)
        self.rewards = {
            n: stepwise.usable(value, model, self.prompts) for n, value in named.items()
        }
        # How they appear in the expression; those that are not expressions, by their names.
        self.sources = {n: v.strip() if isinstance(v, str) else n for n, v in named.items()}
        self.own = [name for name, value in named.items() if not isinstance(value, str)]
        self._pairs = [*itertools.combinations(self.rewards, 2)]
        self.frames: torch.Tensor  # (B, F, 3, H, W), made with the scores
        self.scores: dict[str, torch.Tensor] = {}
        self.statistics: dict[str, tuple[float, float]] = {}
        self.cosines: dict[tuple[str, str], float] = {}
        texts = {name: name.translate(PLAIN) for name in self.rewards}
        self.weights = {n: slider(text, 1.0, -2, 2, step=0.05) for n, text in texts.items()}
        self.standardized = switch("in standard deviations, so that units do not matter", True)
        self.on(self._show, *self.weights.values(), self.standardized)
        self.pairs, self.code = HTML(), HTML()
        self.pictures, self.captions = ([HTML() for _ in self.prompts] for _ in range(2))
        look = {"flex": "1 1 150px", "max_width": "243px"}
        self.slots = [column(*parts, **look) for parts in zip(self.pictures, self.captions)]
        sliders = column(*self.weights.values(), self.standardized, self.why, max_width="520px")
        strip = row(*self.slots, align="flex-start")
        self.assemble(beside(sliders, column(self.pairs)), strip, self.code)
        self._show()

    @property
    def used(self) -> dict[str, float]:
        """The weights that are not 0."""
        values = {name: round(item.value, 2) for name, item in self.weights.items()}
        return {name: weight for name, weight in values.items() if weight}

    def _terms(self) -> dict[str, float]:
        """Weights by name, once their statistics are known."""
        if not self.used:
            raise ValueError(NO_WEIGHT)
        self._sample()
        return self.used

    @property
    def expression(self) -> str:
        """The reward as text for `rewards.parse`. Raises ValueError if all weights are 0."""
        text = ""
        for name, weight in self._terms().items():
            factor = "" if abs(weight) == 1 else f"{abs(weight):g} * "
            source = self.sources[name]
            source = source if source.isidentifier() else f"({source})"
            units = f".normalized{self.statistics[name]!r}" if self.standardized.value else ""
            text += f" {'-' if weight < 0 else '+'} {factor}{source}{units}"
        return text.removeprefix(" + ").lstrip()

    @property
    def reward(self) -> Reward:
        """The reward, for `align`. Raises ValueError if all weights are 0."""
        terms, made = self._terms(), self.rewards
        if self.standardized.value:
            made = {name: made[name].normalized(*self.statistics[name]) for name in terms}
        return cast(Reward, sum(weight * made[name] for name, weight in terms.items()))

    def added(self, name: str) -> torch.Tensor:
        """What a reward adds to the sum of each clip, (B,)."""
        mean, std = self.statistics[name] if self.standardized.value else (0.0, 1.0)
        return self.used.get(name, 0.0) * (self.scores[name] - mean) / std

    def composed(self) -> torch.Tensor:
        """The weighted sum for each clip, (B,), from scores that were measured once."""
        self._sample()
        return torch.stack([self.added(name) for name in self.rewards]).sum(0)

    @property
    def order(self) -> list[int]:
        """Indices of the clips, the best first."""
        return self.composed().argsort(descending=True, stable=True).tolist()

    def measure(self) -> None:
        """Make and score the clips and compare the rewards' gradients, unless it is done."""
        self._sample()
        self.jobs.finish(self._comparing)

    def _sample(self) -> None:
        if not self.scores:
            self.jobs.finish(self._sampling)

    def _sampling(self) -> Job:
        self.frames = yield from stepwise.denoising(self.model, self.given, self.seeds)
        scores = {}
        for name, reward in self.rewards.items():
            with torch.no_grad():
                scores[name] = reward(self.frames, self.prompts).float().cpu()
            # Rounded, so that `reward` and `expression` have the same numbers.
            mean, std = statistics(reward, self.frames, self.prompts)
            self.statistics[name] = float(f"{mean:.4g}"), float(f"{std:.4g}")
        self.scores = scores
        for picture, clip, prompt in zip(self.pictures, self.frames, self.prompts):
            video = Video(clip, self.model.defaults["fps"], prompt)
            picture.value = moving(video, f"clip of: {prompt}")
        # One score for all clips, up to rounding, has no standard deviation.
        constant = [n for n, (mean, std) in self.statistics.items() if not std > 1e-6 * abs(mean)]
        if constant:
            self.standardized.value = False
            why = f"{', '.join(constant)} gives all clips the same score: no standard deviation."
            disable(why, self.standardized, remark=self.why)
        self._show()

    def _comparing(self) -> Job:
        """Compare clip by clip: it takes the memory of one clip, and can be stopped."""
        missing = [pair for pair in self._pairs if pair not in self.cosines]
        for done, pair in enumerate(missing):
            first, second = (self.rewards[name] for name in pair)
            cosines = []
            for i, prompt in enumerate(self.prompts):
                yield (done + i / len(self.prompts)) / len(missing)
                clip = self.frames[i : i + 1]
                cosines.append(conflict(first, second, clip, [prompt]).item())
            self.cosines[pair] = sum(cosines) / len(cosines)
            self.pairs.value = self._conflicts()

    def _show(self) -> None:
        self.pairs.value = self._conflicts()
        if not self.scores:
            self.code.value = note("The clips are not made yet.")
            return
        for rank, i in enumerate(self.order):
            rows = []
            for name, score in self.scores.items():
                shown = f"{score[i]:.3g}".replace("-", "−")
                rows.append((name, shown, number(self.added(name)[i].item(), "+", 2)))
            place = f"{rank + 1}. &nbsp; {number(self.composed()[i].item(), '+', 2)}"
            head = f"<b>{place if self.used else ''}</b>{note(self.prompts[i])}"
            self.captions[i].value = head + table(("", "score", "adds"), rows, "class=vader-note")
            self.slots[i].layout.order = str(rank)
        own = ", ".join(name for name in self.own if name in self.used)
        remark = f"{own} stands for the reward that was given under this name." if own else ""
        self.code.value = note(NO_WEIGHT)
        if self.used:
            self.code.value = note(CODE) + note(remark) + code(self.expression)

    def _conflicts(self) -> str:
        """Whether the weighted rewards conflict: one with a negative weight pulls the other way."""
        if not self._pairs:
            return note("One reward alone has no conflict.")
        negative = {name for name, item in self.weights.items() if item.value < 0}
        rows = []
        for pair in self._pairs:
            names = " and ".join(f"−{name}" if name in negative else name for name in pair)
            cells = "", UNKNOWN
            if pair in self.cosines:
                cosine = self.cosines[pair] * (-1 if len(negative & {*pair}) == 1 else 1)
                cells = number(cosine, "+", 2), verdict(cosine)
            rows.append((names, *cells))
        found = table(("gradients of", "cosine", "they"), rows)
        return f"<b>Do they pull the same way?</b>{found}{note(COSINE)}"

    def prepare(self) -> None:
        self._sample()
        self.jobs.submit(self._comparing, 0)

    def to_html(self) -> str:
        self._sample()
        weights = ", ".join(f"{name} {item.value:g}" for name, item in self.weights.items())
        head, page = f"Weights: {weights}. Clips in the order of the weighted sum:", ""
        for i in self.order:
            caption = f"<figcaption>{self.captions[i].value}</figcaption>"
            page += f"<figure>{self.pictures[i].value}{caption}</figure>"
        figures = f"<div style='display:flex;flex-wrap:wrap;gap:10px'>{page}</div>"
        return f"{note(head)}{figures}{self.pairs.value}{self.code.value}"


def by_name(rewards: Mapping | Sequence[str] | str) -> Mapping:
    """Rewards and expressions by name."""
    listed = [rewards] if isinstance(rewards, str) else rewards
    named = listed if isinstance(listed, Mapping) else {text: text for text in listed}
    if not named:
        raise ValueError("no rewards to compose: name at least one, such as 'hps'")
    if len(named) < len(listed):
        raise ValueError(f"name each reward only once, got {', '.join(listed)}")
    for name, value in named.items():
        if not isinstance(value, str) and not name.isidentifier():
            needed = "your own reward needs a Python name for the expression"
            raise ValueError(f"{needed}, got {name!r}")
    return named


def verdict(cosine: float) -> str:
    """A cosine in words."""
    if abs(cosine) <= NEUTRAL:
        return "are independent"
    return "agree" if cosine > 0 else "work against each other"
