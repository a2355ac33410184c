"""A reward of several rewards: weights by sliders, what they do to the order of some clips, and whether they get along.

composer = RewardComposer(model)                          in a notebook
composer.weights["aesthetic"].value = 0.5                 the same from Python
align(model, composer.reward, …)                          or rewards.parse(composer.expression, tiny=True)
"""

import ast
from collections.abc import Callable, Mapping, Sequence

import torch
from ipywidgets import HTML, Checkbox, FloatSlider, HBox, Layout, VBox

from ..models import VideoModel
from ..rewards import Reward, as_reward, conflict, parse, statistics
from ..video import Video
from . import clips
from .panel import LABEL, SIDE, WIDE, Panel, disable, escape
from .player import moving

REWARDS = ("hps", "aesthetic", "action")
CLIPS = 4
CARE = 0.05  # cosines nearer to 0 count as "do not care": of pictures' gradients, chance makes hundredths
MEASURING, UNKNOWN = "measuring…", "not measured yet"
NOTHING = "All weights are 0: nothing is asked for. Move a slider."


class RewardComposer(Panel):
    """A weighted sum of rewards, with its effect on a few clips of the base model, which are made once.

    rewards: a list of expressions for `rewards.parse`, or name -> Reward or expression; default hps, aesthetic and
    action. A Reward needs a Python name, by which `expression` calls it. prompts: of the clips, two or more; their seeds
    begin with `seed`. Attributes: `weights`, a slider (-2 to 2) for each reward; `standardised`, a Checkbox: rewards count
    in standard deviations from their mean over the clips, each by `statistics`, rounded to 4 digits; `scores`, of each
    reward its scores (B,); `cosines`, of pairs of rewards the mean cosine between their gradients on the clips' pixels.
    Raises ValueError for rewards or prompts that cannot be, before any clip is made.
    """

    title = "Reward composer"
    hint = "Move the weights: the clips are sorted anew, the best first, and the reward’s code is below them."

    def __init__(
        self,
        model: VideoModel,
        rewards: Mapping[str, Reward | Callable | str] | Sequence[str] | None = None,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.model = model
        self.prompts = list(
            clips.examples(model, CLIPS)
            if prompts is None
            else [prompts]
            if isinstance(prompts, str)
            else prompts
        )
        self.seeds = list(range(seed, seed + len(self.prompts)))
        if len(self.prompts) < 2 or not all(prompt.strip() for prompt in self.prompts):
            raise ValueError(
                f"rewards are compared on 2 or more clips, none with an empty prompt; got {self.prompts}"
            )
        self.rewards, self.sources, self.own = read(
            REWARDS if rewards is None else rewards, model.name == "tiny"
        )
        for reward in self.rewards.values():
            reward.check_prompts(self.prompts)
            reward.to(model.device)
        self.frames: torch.Tensor | None = None  # (B, F, 3, H, W)
        self.scores: dict[str, torch.Tensor] = {}
        self.statistics: dict[str, tuple[float, float]] = {}
        self.cosines: dict[tuple[str, str], float] = {}
        self._controls()
        self._slots = [Slot() for _ in self.prompts]
        self.pairs, self.code = HTML(), HTML()
        sliders = VBox(
            [*self.weights.values(), self.standardised, self.why],
            layout=Layout(flex="1 1 330px", max_width="520px", min_width="0"),
        )
        pairs = VBox([self.pairs], layout=Layout(flex="1 1 300px", min_width="0"))
        strip = HBox(
            [slot.box for slot in self._slots], layout={**SIDE, "justify_content": "flex-start"}
        )
        self.assemble(HBox([sliders, pairs], layout=SIDE), strip, self.code)
        self._show()

    def _controls(self) -> None:
        self.weights = {
            name: FloatSlider(
                1.0, min=-2, max=2, step=0.05, description=plain(name), style=LABEL, layout=WIDE
            )
            for name in self.rewards
        }
        self.standardised = Checkbox(
            True, description="in standard deviations, so that units do not matter", indent=False
        )
        self.standardised.layout.width = "auto"
        self.why = HTML()
        self.on(self._show, *self.weights.values(), self.standardised)

    # ------------------------------------------------------------------------------------------ the reward

    @property
    def used(self) -> dict[str, float]:
        """Weights that are not 0."""
        values = {name: round(slider.value, 2) for name, slider in self.weights.items()}
        return {name: weight for name, weight in values.items() if weight}

    @property
    def expression(self) -> str:
        """The reward as text, which `rewards.parse` reads. Raises ValueError if all weights are 0."""
        self._need()
        text = ""
        for name, weight in self.used.items():
            size = f"{abs(weight):g} * " if abs(weight) != 1 else ""
            sign = (" - " if weight < 0 else " + ") if text else "-" if weight < 0 else ""
            text += sign + size + self._spelled(name)
        return text

    def _spelled(self, name: str) -> str:
        if not self.standardised.value:
            return self.sources[name]
        mean, std = self.statistics[name]
        return f"{self.sources[name]}.normalized({mean!r}, {std!r})"

    @property
    def reward(self) -> Reward:
        """The reward, ready for `align`. Raises ValueError if all weights are 0."""
        self._need()
        terms = []
        for name, weight in self.used.items():
            reward = self.rewards[name]
            terms.append(
                weight
                * (reward.normalized(*self.statistics[name]) if self.standardised.value else reward)
            )
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def _need(self) -> None:
        if not self.used:
            raise ValueError(NOTHING)
        self._sample()

    def _sample(self) -> None:
        if self.frames is None:
            self.jobs.finish(self._sampling)

    # ------------------------------------------------------------------------------------------- the clips

    def measure(self) -> None:
        """Make the clips, score them and compare the rewards' gradients now, what of it has not been done."""
        self._sample()
        if self._missing:
            self.jobs.finish(self._comparing)

    def _sampling(self):
        frames = yield from clips.denoising(self.model, self.prompts, self.seeds)
        for name, reward in self.rewards.items():
            with torch.no_grad():
                self.scores[name] = reward(frames, self.prompts).float().cpu()
            # Rounded, so that the sum and its expression have the same numbers.
            self.statistics[name] = tuple(
                float(f"{x:.4g}") for x in statistics(reward, frames, self.prompts)
            )
        self.frames = frames
        for slot, clip, prompt in zip(self._slots, frames, self.prompts):
            slot.picture.value = moving(
                Video(clip, self.model.defaults["fps"], prompt), f"clip of: {prompt}"
            )
        if self._alike:
            self.standardised.value = False
        self._show()

    @property
    def _alike(self) -> list[str]:
        """Rewards that say the same of all clips, but for rounding."""
        return [name for name, (mean, std) in self.statistics.items() if not std > 1e-6 * abs(mean)]

    @property
    def _pairs(self) -> list[tuple[str, str]]:
        names = list(self.rewards)
        return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]

    @property
    def _missing(self) -> list[tuple[str, str]]:
        return [pair for pair in self._pairs if pair not in self.cosines]

    def _comparing(self):
        """Clip by clip: so it can be given up, and takes the memory of one clip."""
        missing, count = self._missing, len(self.prompts)
        try:
            for done, pair in enumerate(missing):
                self._conflicts(MEASURING)
                total = 0.0
                for i in range(count):
                    yield (done + i / count) / len(missing)
                    rewards = (self.rewards[name] for name in pair)
                    total += conflict(
                        *rewards, self.frames[i : i + 1], self.prompts[i : i + 1]
                    ).item()
                self.cosines[pair] = total / count
        finally:
            self._conflicts()

    def composed(self) -> torch.Tensor:
        """The composed score of each clip, (B,), from the scores that were measured once."""
        self._sample()
        total = torch.zeros(len(self.prompts))
        for name, weight in self.used.items():
            total += weight * self._counted(name)
        return total

    def _counted(self, name: str) -> torch.Tensor:
        """A reward's scores in the units in which they count."""
        mean, std = self.statistics[name] if self.standardised.value else (0.0, 1.0)
        return (self.scores[name] - mean) / std

    @property
    def order(self) -> list[int]:
        """Indices of the clips, the best first."""
        return self.composed().argsort(descending=True, stable=True).tolist()

    # --------------------------------------------------------------------------------------------- showing

    def _show(self) -> None:
        alike = ", ".join(self._alike)
        why = (
            f"{alike} says the same of all clips: there is no standard deviation to count in."
            if alike
            else ""
        )
        disable(why, self.standardised, remark=self.why)
        self._conflicts()
        if self.frames is None:
            self.code.value = "<div class=vader-note>The clips are not made yet.</div>"
            return
        for rank, i in enumerate(self.order):
            self._slots[i].box.layout.order = str(rank)
            self._slots[i].text.value = self._judged(i, rank)
        self.code.value = self._code()

    def _judged(self, i: int, rank: int) -> str:
        """What is under a clip: its place, the sum, and what each reward adds to it."""
        used, total = self.used, self.composed()[i].item()
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{self.scores[name][i].item():.3g}</td>"
            f"<td>{used.get(name, 0.0) * self._counted(name)[i].item():+.2f}</td></tr>"
            for name in self.rewards
        )
        return (
            f"<div><b>{rank + 1}. &nbsp; {total:+.2f}</b></div><div class=vader-note>{escape(self.prompts[i])}</div>"
            f"<table class=vader-note><tr><th></th><th>score</th><th>adds</th></tr>{rows}</table>"
        )

    def _conflicts(self, otherwise: str = UNKNOWN) -> None:
        self.pairs.value = self._table(otherwise)

    def _table(self, otherwise: str = UNKNOWN) -> str:
        """Do the rewards get along, as they are weighed now? A reward with a negative weight pulls the other way."""
        values = {name: slider.value for name, slider in self.weights.items()}
        rows = []
        for pair in self._pairs:
            names = " and ".join(f"−{name}" if values[name] < 0 else name for name in pair)
            if pair in self.cosines:
                cosine = self.cosines[pair] * (-1 if values[pair[0]] * values[pair[1]] < 0 else 1)
                told = f"<td>{round(cosine, 2) + 0.0:+.2f}</td><td>{verdict(cosine)}</td>"
            else:
                told = f"<td></td><td>{otherwise}</td>"
            rows.append(f"<tr><td>{escape(names)}</td>{told}</tr>")
        if not rows:
            return "<div class=vader-note>One reward alone: there is nothing that it could work against.</div>"
        return (
            "<b>Do they pull the same way?</b><table><tr><th>gradients of</th><th>cosine</th><th>they</th></tr>"
            f"{''.join(rows)}</table><div class=vader-note>Mean over the clips of the cosine between two rewards’ gradients "
            "on the pixels: 1 the same way, 0 at right angles, −1 what one gains the other loses.</div>"
        )

    def _code(self) -> str:
        if not self.used:
            return f"<div class=vader-note>{escape(NOTHING)}</div>"
        own = ", ".join(name for name in self.own if name in self.used)
        note = f" In it, {own} stands for the reward that was given by this name." if own else ""
        return (
            "<div class=vader-note>The sum as code, for <code>rewards.parse</code> and <code>reward=</code> on the command "
            f"line; in Python it is this panel’s <code>reward</code>.{escape(note)} One click selects all of it.</div>"
            f"<div class=vader-code>{escape(self.expression)}</div>"
        )

    def prepare(self) -> None:
        self._sample()
        if self._missing:
            self.jobs.submit(self._comparing, settle=0)

    def to_html(self) -> str:
        self._sample()
        figures = "".join(
            f"<figure>{self._slots[i].picture.value}<figcaption>{self._judged(i, rank)}</figcaption></figure>"
            for rank, i in enumerate(self.order)
        )
        weights = ", ".join(f"{name} {slider.value:g}" for name, slider in self.weights.items())
        return (
            f"<div><p>Weights: {escape(weights)}. Clips in the order of the weighted sum:</p>"
            f"<div style='display:flex;flex-wrap:wrap;gap:10px'>{figures}</div>{self._table()}{self._code()}</div>"
        )


class Slot:
    """A clip's place: made once. `box.layout.order` is where it stands."""

    def __init__(self):
        self.picture, self.text = HTML(), HTML()
        self.box = VBox(
            [self.picture, self.text],
            layout=Layout(flex="1 1 150px", max_width="230px", min_width="0"),
        )


def read(
    given: Mapping | Sequence[str], tiny: bool
) -> tuple[dict[str, Reward], dict[str, str], list[str]]:
    """Rewards and their spelling in an expression, by name; and the names of those that were given as objects."""
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, Mapping):
        if len(set(given)) != len(given):
            raise ValueError(f"each reward once, got {', '.join(map(str, given))}")
        given = {str(text): text for text in given}
    if not given:
        raise ValueError("no rewards to compose: name at least one, such as 'hps'")
    own = [name for name, value in given.items() if not isinstance(value, str)]
    for name in own:
        if not name.isidentifier():
            raise ValueError(
                f"a reward of your own needs a Python name to stand in the expression, got {name!r}"
            )
    rewards = {
        n: as_reward(value) if n in own else parse(value, tiny=tiny) for n, value in given.items()
    }
    return rewards, {n: n if n in own else grouped(value) for n, value in given.items()}, own


def grouped(expression: str) -> str:
    """In parentheses, unless it is a name or a call, so that a method or a factor takes all of it."""
    alone = isinstance(ast.parse(expression.strip(), mode="eval").body, (ast.Name, ast.Call))
    return expression.strip() if alone else f"({expression.strip()})"


def plain(name: str) -> str:
    """For a control's label, which ipywidgets 7 takes for HTML and 8 for text."""
    return name.translate(str.maketrans("<>&", "‹›+"))


def verdict(cosine: float) -> str:
    return (
        "agree" if cosine > CARE else "work against each other" if cosine < -CARE else "do not care"
    )
