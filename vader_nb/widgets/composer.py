"""A weighted sum of rewards: how it ranks a few clips, and whether the rewards conflict.

composer = RewardComposer(model)                          in a notebook
composer.weights["aesthetic"].value = 0.5                 the same from Python
align(model, composer.reward, …)                          or rewards.parse(composer.expression)
"""

import ast
import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from ipywidgets import HTML, HBox

from ..models import VideoModel
from ..rewards import Reward, as_reward, conflict, parse, statistics
from ..video import Video
from . import clips
from .controls import beside, column, slider, switch, template
from .panel import SIDE, Panel, disable, note
from .player import moving

REWARDS = ("hps", "aesthetic", "action")
CLIPS = 4
NEUTRAL = 0.05  # smaller cosines happen by chance
MEASURING, UNKNOWN = "measuring…", "not measured yet"
NO_WEIGHT = "All weights are 0: nothing is asked for. Move a slider."

CLIP = """
<div><b>{{ rank }}. &nbsp; {{ "%+.2f"|format(total) }}</b></div>
<div class=vader-note>{{ prompt }}</div>
<table class=vader-note><tr><th></th><th>score</th><th>adds</th></tr>
{% for name, score, added in rows %}
<tr><td>{{ name }}</td><td>{{ "%.3g"|format(score) }}</td><td>{{ "%+.2f"|format(added) }}</td></tr>
{% endfor %}
</table>
"""
PAIRS = """
{% if not rows %}
<div class=vader-note>One reward alone has no conflict.</div>
{% else %}
<b>Do they pull the same way?</b>
<table><tr><th>gradients of</th><th>cosine</th><th>they</th></tr>
{% for names, cosine, verdict in rows %}
<tr><td>{{ names }}</td><td>{{ cosine }}</td><td>{{ verdict }}</td></tr>
{% endfor %}
</table>
<div class=vader-note>Mean over the clips of the cosine between two rewards’ gradients on the
pixels: 1 the same way, 0 at right angles, −1 what one gains the other loses.</div>
{% endif %}
"""
CODE = """
<div class=vader-note>The sum as code, for <code>rewards.parse</code> and <code>reward=</code> on
the command line; in Python it is this panel’s <code>reward</code>.
{% if own %}In it, {{ own|join(", ") }} stands for the reward that was given by this name.
{% endif %}
One click selects all of it.</div>
<div class=vader-code>{{ expression }}</div>
"""
STILL = """
<div><p>Weights: {{ weights }}. Clips in the order of the weighted sum:</p>
<div style="display:flex;flex-wrap:wrap;gap:10px">
{% for clip, caption in figures %}
<figure>{{ clip|safe }}<figcaption>{{ caption|safe }}</figcaption></figure>
{% endfor %}
</div></div>
"""


class RewardComposer(Panel):
    """A weighted sum of rewards, and how it ranks a few clips of the base model, made once.

    Args:
        model: makes the clips.
        rewards: expressions for `rewards.parse`, or rewards and expressions by name. A reward that
            is not an expression needs a Python name, under which it stands in `expression`.
        prompts: of the clips, two or more.
        seed: of the first clip; those of the others follow.

    Attributes:
        weights: a slider from -2 to 2 per reward.
        standardized: a checkbox: count rewards in standard deviations from their mean.
        scores: of each reward, (B,).
        statistics: mean and standard deviation of each reward over the clips, to 4 digits.
        cosines: of each pair of rewards, the mean cosine of their gradients on the pixels.

    Raises:
        ValueError: unknown rewards, fewer than two prompts, or an empty one.
    """

    title = "Reward composer"
    hint = "Move the weights: the best clip comes first, and the reward’s code is below."

    def __init__(
        self,
        model: VideoModel,
        rewards: Mapping[str, Reward | Callable | str] | Sequence[str] = REWARDS,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.model = model
        prompts = clips.examples(model, CLIPS) if prompts is None else prompts
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.seeds = list(range(seed, seed + len(self.prompts)))
        if len(self.prompts) < 2 or not all(prompt.strip() for prompt in self.prompts):
            raise ValueError(
                "rewards are compared on 2 or more clips, none with an empty prompt; "
                f"got {self.prompts}"
            )
        given = by_name(rewards)
        self.own = [name for name, value in given.items() if not isinstance(value, str)]
        self.rewards: dict[str, Reward] = {}
        for name, value in given.items():
            tiny = model.world == "tiny"
            reward = as_reward(value) if name in self.own else parse(value, tiny=tiny)
            reward.check_prompts(self.prompts)
            reward.to(model.device)
            self.rewards[name] = reward
        self.sources = {n: n if n in self.own else grouped(value) for n, value in given.items()}
        self.frames: torch.Tensor | None = None  # (B, F, 3, H, W)
        self.scores: dict[str, torch.Tensor] = {}
        self.statistics: dict[str, tuple[float, float]] = {}
        self.cosines: dict[tuple[str, str], float] = {}
        self._build()
        self._show()

    def _build(self) -> None:
        self.weights = {n: slider(plain(n), 1.0, -2, 2, step=0.05) for n in self.rewards}
        self.standardized = switch("in standard deviations, so that units do not matter", True)
        self.why, self.pairs, self.code = HTML(), HTML(), HTML()
        self.on(self._show, *self.weights.values(), self.standardized)
        self._slots = [Slot() for _ in self.prompts]
        sliders = column(*self.weights.values(), self.standardized, self.why, max_width="520px")
        strip = HBox([slot.box for slot in self._slots], layout=SIDE)
        self.assemble(beside(sliders, column(self.pairs)), strip, self.code)

    # --------------------------------------------------------------------------------- the reward

    @property
    def used(self) -> dict[str, float]:
        """The weights that are not 0."""
        values = {name: round(item.value, 2) for name, item in self.weights.items()}
        return {name: weight for name, weight in values.items() if weight}

    @property
    def expression(self) -> str:
        """The reward as text for `rewards.parse`. Raises ValueError if all weights are 0."""
        self._require_weight()
        terms = []
        for name, weight in self.used.items():
            factor = "" if abs(weight) == 1 else f"{abs(weight):g} * "
            mean, std = self.statistics[name]
            units = f".normalized({mean!r}, {std!r})" if self.standardized.value else ""
            terms.append(f"{'-' if weight < 0 else '+'} {factor}{self.sources[name]}{units}")
        return " ".join(terms).removeprefix("+ ")

    @property
    def reward(self) -> Reward:
        """The reward, for `align`. Raises ValueError if all weights are 0."""
        self._require_weight()
        terms = []
        for name, weight in self.used.items():
            reward = self.rewards[name]
            if self.standardized.value:
                reward = reward.normalized(*self.statistics[name])
            terms.append(weight * reward)
        return functools.reduce(operator.add, terms)

    def _require_weight(self) -> None:
        if not self.used:
            raise ValueError(NO_WEIGHT)
        self._sample()

    # ---------------------------------------------------------------------------------- the clips

    def measure(self) -> None:
        """Make and score the clips and compare the rewards' gradients, unless it is done."""
        self._sample()
        if self._missing:
            self.jobs.finish(self._comparing)

    def _sample(self) -> None:
        if self.frames is None:
            self.jobs.finish(self._sampling)

    def _sampling(self):
        frames = yield from clips.denoising(self.model, self.prompts, self.seeds)
        for name, reward in self.rewards.items():
            with torch.no_grad():
                self.scores[name] = reward(frames, self.prompts).float().cpu()
            # Rounded, so that `reward` and `expression` have the same numbers.
            exact = statistics(reward, frames, self.prompts)
            self.statistics[name] = tuple(float(f"{value:.4g}") for value in exact)
        self.frames = frames
        for slot, clip, prompt in zip(self._slots, frames, self.prompts):
            video = Video(clip, self.model.defaults["fps"], prompt)
            slot.picture.value = moving(video, f"clip of: {prompt}")
        if self._constant:
            self.standardized.value = False
        self._show()

    @property
    def _constant(self) -> list[str]:
        """Rewards with one score for all clips, up to rounding."""
        return [name for name, (mean, std) in self.statistics.items() if not std > 1e-6 * abs(mean)]

    @property
    def _missing(self) -> list[tuple[str, str]]:
        pairs = itertools.combinations(self.rewards, 2)
        return [pair for pair in pairs if pair not in self.cosines]

    def _comparing(self):
        """Compare clip by clip: it takes the memory of one clip, and can be stopped."""
        missing, count = self._missing, len(self.prompts)
        try:
            for done, pair in enumerate(missing):
                self.pairs.value = self._table(MEASURING)
                first, second = (self.rewards[name] for name in pair)
                cosines = []
                for i in range(count):
                    yield (done + i / count) / len(missing)
                    clip, prompt = self.frames[i : i + 1], self.prompts[i : i + 1]
                    cosines.append(conflict(first, second, clip, prompt).item())
                self.cosines[pair] = sum(cosines) / count
        finally:
            self.pairs.value = self._table()

    def composed(self) -> torch.Tensor:
        """The weighted sum for each clip, (B,), from scores that were measured once."""
        self._sample()
        parts = [weight * self._in_units(name) for name, weight in self.used.items()]
        return sum(parts, torch.zeros(len(self.prompts)))

    def _in_units(self, name: str) -> torch.Tensor:
        mean, std = self.statistics[name] if self.standardized.value else (0.0, 1.0)
        return (self.scores[name] - mean) / std

    @property
    def order(self) -> list[int]:
        """Indices of the clips, the best first."""
        return self.composed().argsort(descending=True, stable=True).tolist()

    # ------------------------------------------------------------------------------------ display

    def _show(self) -> None:
        constant = ", ".join(self._constant)
        reason = f"{constant} gives all clips one score: there is no standard deviation."
        disable(reason if constant else "", self.standardized, remark=self.why)
        self.pairs.value = self._table()
        if self.frames is None:
            self.code.value = note("The clips are not made yet.")
            return
        for rank, i in enumerate(self.order):
            self._slots[i].box.layout.order = str(rank)
            self._slots[i].text.value = self._caption(i, rank)
        self.code.value = self._code()

    def _caption(self, i: int, rank: int) -> str:
        """A clip's rank and sum, and what each reward adds to it."""
        rows = [
            (name, score[i].item(), self.used.get(name, 0.0) * self._in_units(name)[i].item())
            for name, score in self.scores.items()
        ]
        total, prompt = self.composed()[i].item(), self.prompts[i]
        return template(CLIP).render(rank=rank + 1, total=total, prompt=prompt, rows=rows)

    def _table(self, unknown: str = UNKNOWN) -> str:
        """Whether the weighted rewards conflict: one with a negative weight pulls the other way."""
        negative = {name for name, item in self.weights.items() if item.value < 0}
        rows = []
        for pair in itertools.combinations(self.rewards, 2):
            names = " and ".join(f"−{name}" if name in negative else name for name in pair)
            if pair not in self.cosines:
                rows.append((names, "", unknown))
                continue
            cosine = self.cosines[pair] * (-1 if len(negative & {*pair}) == 1 else 1)
            rows.append((names, f"{round(cosine, 2) + 0.0:+.2f}", verdict(cosine)))
        return template(PAIRS).render(rows=rows)

    def _code(self) -> str:
        if not self.used:
            return note(NO_WEIGHT)
        own = [name for name in self.own if name in self.used]
        return template(CODE).render(own=own, expression=self.expression)

    def prepare(self) -> None:
        self._sample()
        if self._missing:
            self.jobs.submit(self._comparing, 0)

    def to_html(self) -> str:
        self._sample()
        weights = ", ".join(f"{name} {item.value:g}" for name, item in self.weights.items())
        clips = [(self._slots[i].picture.value, self._slots[i].text.value) for i in self.order]
        page = template(STILL).render(weights=weights, figures=clips)
        return f"{page}{self._table()}{self._code()}"


class Slot:
    """The place of a clip, which is shown at `box.layout.order`."""

    def __init__(self):
        self.picture, self.text = HTML(), HTML()
        self.box = column(self.picture, self.text, flex="1 1 150px", max_width="230px")


def by_name(rewards: Mapping | Sequence[str] | str) -> dict:
    """Rewards and expressions by name. Raises ValueError for names that cannot be used."""
    if isinstance(rewards, str):
        rewards = [rewards]
    if not isinstance(rewards, Mapping):
        if len(set(rewards)) != len(rewards):
            raise ValueError(f"each reward once, got {', '.join(rewards)}")
        rewards = {text: text for text in rewards}
    if not rewards:
        raise ValueError("no rewards to compose: name at least one, such as 'hps'")
    for name, value in rewards.items():
        if not isinstance(value, str) and not name.isidentifier():
            raise ValueError(
                f"your own reward needs a Python name for the expression, got {name!r}"
            )
    return dict(rewards)


def grouped(expression: str) -> str:
    """The expression, in parentheses unless it is a name or a call."""
    text = expression.strip()
    try:
        atom = isinstance(ast.parse(text, mode="eval").body, (ast.Name, ast.Call))
    except SyntaxError:  # a function of a file
        atom = False
    return text if atom else f"({text})"


def plain(name: str) -> str:
    """For the label of a control, which ipywidgets 7 takes for HTML and 8 for text."""
    return name.translate(str.maketrans("<>&", "‹›+"))


def verdict(cosine: float) -> str:
    """A cosine in words."""
    if abs(cosine) <= NEUTRAL:
        return "do not care"
    return "agree" if cosine > 0 else "work against each other"
