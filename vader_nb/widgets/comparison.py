"""Base and adapters on the same prompts and noise: clips in step, rewards, where they come from, and blind votes.

comparison = RewardComparison(model, adapters={"hps": "runs/hps"}, rewards=[hps()])     in a notebook
comparison.run(prompt="…")                    the same from Python: scores by contestant and reward
comparison.run_all(); comparison.export()     every prompt's scores, and clips of the last, as one HTML file
"""

import base64
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from ipywidgets import HTML, Button, Checkbox, Dropdown, HBox, Layout, ToggleButton, VBox

from ..checkpoints import write
from ..evaluate import BASE, named
from ..gradient import Sampling
from ..models import VideoModel
from ..rewards import Reward
from ..video import Video
from . import clips
from .comparison_page import document
from .contest import Contest, chosen, judges, part_of
from .panel import LABEL, ROW, WIDE, Panel, disable, escape
from .player import EMPTY, Player, moving, still
from .side_by_side import (
    composed,
    curve,
    halves,
    heated,
    legend,
    number,
    score_rows,
    table,
    under_names,
)
from .voting import Pair, Tally, Vote, Votes

GIVEN, HELPS, HURTS = "as given", "helps most first", "hurts most first"
BALLOT = {"A": "A is better", "=": "no difference", "B": "B is better"}
LINKED = 5_000_000  # bytes of an export up to which the panel carries it as a link


class RewardComparison(Panel):
    """Clips of the base and of each adapter, from the same noise, side by side.

    adapters: name -> file or a run's folder, default the shipped ones for the model "tiny". rewards: default those of the
    tiny world. prompts: a list, a set's name or a file, up to 200; default six. seed: of the noise. folder: where votes
    and exports go. sampling: default the model's. Raises FileNotFoundError or ValueError for an adapter that does not
    fit, no rewards or prompts, or two of one name.

    For the first picture only two contestants are awaited; `run()` before it is shown makes all.
    """

    title = "Reward comparison"
    hint = "Each prompt from the same noise, with and without adapters. Choose a prompt; drag “frame” to look closely."

    def __init__(
        self,
        model: VideoModel,
        adapters: Mapping[str, str | Path] | None = None,
        rewards: Sequence[Reward | Callable] | None = None,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        folder: str | Path = "runs/comparison",
        sampling: Sampling | None = None,
    ):
        super().__init__()
        self.folder, self.votes = Path(folder), Votes(folder)
        self.votes.read()  # a damaged file is told now, not after the first vote
        rewards = judges(model, rewards)
        self.prompts = chosen(model, prompts, rewards)
        adapters = clips.fitting(model, None if adapters is None else named(adapters))
        self.contest = Contest(
            model, adapters, rewards, (sampling or Sampling()).filled(model), seed
        )
        self.pair: Pair | None = None  # that waits for a vote
        self._picture: Video | None = None  # that is shown
        self._pages = (None, [])  # the picture's frames as <img>, and what they were made of
        self._filling = self._sweeping = False
        self.player = Player(self.contest.sampling.num_frames)
        self.caption, self.why, self.counts, self.saved = HTML(), HTML(), HTML(), HTML()
        self._controls()
        self.open_box = VBox(
            [
                self.prompt,
                HBox([self.reward, self.heat], layout=ROW),
                HBox([self.all_button, self.stop_button, self.order, self.adapter], layout=ROW),
                self.why,
            ],
            layout={"width": "100%"},
        )
        self.ballot_box = HBox([*self.ballot.values(), self.tally_button], layout=ROW)
        last = HBox([self.blind, self.export_button, self.saved], layout=ROW)
        self.assemble(
            self.open_box, self.player.box, self.caption, self.ballot_box, self.counts, last
        )
        self._explain()

    def _controls(self) -> None:
        names, width = self.contest.names[1:], {"width": "250px"}
        self.prompt = Dropdown(options=self.prompts, description="prompt", style=LABEL, layout=WIDE)
        self.reward = Dropdown(
            options=[*self.contest.rewards], description="reward", style=LABEL, layout=width
        )
        self.heat = Checkbox(
            False, description="gradient heat map", indent=False, layout={"width": "auto"}
        )
        self.all_button = Button(
            description="compare all prompts", icon="play", layout=Layout(width="170px")
        )
        self.stop_button = Button(description="stop", icon="stop", layout=Layout(width="80px"))
        self.order = Dropdown(
            options=[GIVEN, HELPS, HURTS], description="sort prompts", style=LABEL, layout=width
        )
        self.adapter = Dropdown(options=names, description="by adapter", style=LABEL, layout=width)
        self.blind = ToggleButton(icon="eye-slash", layout=Layout(width="auto"))
        self.tally_button = Button(description="show tally", layout=Layout(width="110px"))
        self.export_button = Button(
            description="export as HTML", icon="download", layout=Layout(width="150px")
        )
        self.ballot = {
            choice: Button(description=text, layout={"width": "120px"})
            for choice, text in BALLOT.items()
        }
        self.on(self._looked, self.prompt, self.reward, self.heat, self.adapter)
        self.on(lambda: self._looked(jump=True), self.order)
        self.on(lambda: self.jobs.submit(self._all, settle=0), self.all_button)
        self.on(self._stop, self.stop_button)
        self.on(self._switch, self.blind)
        self.on(self._count, self.tally_button)
        self.on(self.export, self.export_button)
        for choice, button in self.ballot.items():
            self.on(
                lambda choice=choice: self.pair and self.vote(choice), button
            )  # a second click comes too late

    def _explain(self) -> None:
        """Show what can act now; disable the rest, and say why."""
        alone = (
            ""
            if self.contest.adapters
            else "there is no adapter: RewardComparison(model, adapters={'name': 'runs/…'})"
        )
        missing = sum(not self.contest.scored(prompt) for prompt in self.prompts)
        unsorted = (
            f"compare all prompts first, {missing} of {len(self.prompts)} are missing"
            if missing
            else ""
        )
        hidden = "blind vote: leave it first" if self.blind.value else ""
        finished = "" if missing else "all prompts are compared"
        disable(hidden, self.prompt, self.reward, self.heat)
        disable(hidden or alone, self.adapter)
        disable(hidden or alone or unsorted, self.order)
        disable(
            hidden or finished or ("it is under way" if self._sweeping else ""), self.all_button
        )
        disable("" if self._sweeping else "nothing is under way", self.stop_button)
        disable(
            hidden or ("" if self.contest.scores else "there is nothing to export yet"),
            self.export_button,
        )
        disable(alone, self.blind)
        disable("" if self.pair else "the next pair is being made", *self.ballot.values())
        reason = alone or (unsorted and f"sorting: {unsorted}")
        self.why.value = f"<div class=vader-note>{escape(reason)}</div>" if reason else ""
        self.blind.description = (
            "leave the blind vote" if hidden else f"blind vote: base or {self.adapter.value}?"
        )
        self.open_box.layout.display = "none" if hidden else "flex"
        self.ballot_box.layout.display = "flex" if hidden else "none"

    # ---------------------------------------------------------------------------------------- computing in steps

    def _complete(self, prompts: Iterable[str], names: Sequence[str]) -> Iterator[float]:
        """Score what has no scores yet; of the prompt that is shown, make also clips that were let go."""
        work = [
            (prompt, name)
            for prompt in prompts
            for name in names
            if name
            not in (self.contest.shelf if prompt == self.prompt.value else self.contest.scores_of)(
                prompt
            )
        ]
        for i, (prompt, name) in enumerate(work):
            yield from part_of(self.contest.compare(prompt, name), i / len(work), 1 / len(work))
            self._explain()
            there = len(
                self.contest.shelf(self.prompt.value)
            )  # last used, so that these clips stay
            if prompt == self.prompt.value and there in (2, len(self.contest.names)):
                self._show()

    def _one(self) -> Iterator[float]:
        """What the controls ask for."""
        prompt, reward = self.prompt.value, self.reward.value
        yield from self._complete([prompt], self.contest.names)
        for name in self.contest.cold(prompt, reward) if self.heat.value else []:
            self.contest.warm(prompt, name, reward)
            yield 0.95
        self._explain()
        self._show()

    def _all(self) -> Iterator[float]:
        """Every prompt, the one that is shown first."""
        self._sweeping = True
        try:
            self._explain()
            yield from self._complete(
                dict.fromkeys([self.prompt.value, *self.prompts]), self.contest.names
            )
            yield from self._one()
        finally:  # stopped or done
            self._sweeping = False
            self._explain()

    def _stop(self) -> None:
        self.jobs.give_up()
        done = sum(map(self.contest.scored, self.prompts))
        self.say(
            f"stopped: {done} of {len(self.prompts)} prompts are compared; the same button goes on from there"
        )

    def run(self, prompt: str | None = None) -> dict[str, dict[str, float]]:
        """Compare on a prompt (default: the one that is chosen) now, and wait. Returns scores by contestant and reward.
        Raises ValueError for a prompt that is not among `prompts`."""
        if prompt is not None and prompt not in self.prompts:
            raise ValueError(
                f"unknown prompt {prompt!r}; there are {', '.join(map(repr, self.prompts))}"
            )
        with self._quietly():
            self.prompt.value = prompt or self.prompt.value
        self.jobs.finish(self._one)
        rewards, prompt = self.contest.rewards, self.prompt.value
        return {
            name: {r: self.contest.mean(prompt, name, r) for r in rewards}
            for name in self.contest.names
        }

    def run_all(self) -> None:
        """Compare on all prompts now, and wait."""
        self.jobs.finish(self._all)

    # ---------------------------------------------------------------------------------------------- the open view

    def _looked(self, jump: bool = False) -> None:
        if self._filling or self.blind.value:
            return
        self._arrange(jump)
        self._explain()
        if self.contest.missing(self.prompt.value) or (self.heat.value and self._cold()):
            self.jobs.submit(self._one)
        else:
            self._show()

    def _cold(self) -> list[str]:
        return self.contest.cold(self.prompt.value, self.reward.value)

    def _arrange(self, jump: bool) -> None:
        """Sort the prompts. jump: to the first; else the chosen one stays."""
        options = [(prompt, prompt) for prompt in self.prompts]
        if self.order.value != GIVEN:
            missing = [prompt for prompt in self.prompts if not self.contest.scored(prompt)]
            if missing:
                with self._quietly():
                    self.order.value = GIVEN
                raise ValueError(
                    f"sorting needs all prompts: compare all first, {len(missing)} are missing"
                )
            change = {
                p: self.contest.difference(p, self.adapter.value, self.reward.value)
                for p in self.prompts
            }
            ranked = sorted(self.prompts, key=change.get, reverse=self.order.value == HELPS)
            options = [(f"{number(change[prompt], '+')} · {prompt}", prompt) for prompt in ranked]
        stay = options[0][1] if jump else self.prompt.value
        with self._quietly():
            self.prompt.options = options
            self.prompt.value = stay

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        """Inside, controls are set without anything being made."""
        self._filling = True
        try:
            yield
        finally:
            self._filling = False

    def _show(self) -> None:
        prompt, reward, contest = self.prompt.value, self.reward.value, self.contest
        shelf = contest.shelf(prompt)
        if self.blind.value or not shelf:
            return
        hot = reward if self.heat.value and not self._cold() else None
        frames = [
            heated(shelf[n], hot) if hot else shelf[n].pixels() if n in shelf else None
            for n in contest.names
        ]
        text = f"{', '.join(contest.names)}: {prompt}" + (f", heat maps of {hot}" if hot else "")
        pictures = self._draw((prompt, *shelf, hot), frames, text)
        rows, below = score_rows(contest, prompt), legend(hot) if hot else ""
        self._turn(
            halves(
                under_names(contest.names, picture, *rows) + below,
                curve(contest, prompt, reward, frame),
            )
            for picture, frame in zip(pictures, [None, *range(len(pictures) - 1)])
        )
        s = contest.sampling
        how = f"seed {contest.seed} · {s.num_inference_steps} steps · guidance {s.guidance_scale:g}"
        self.caption.value = f"<b>{escape(prompt)}</b> <span class=vader-note>{escape(how)}</span>"

    def _draw(self, key: object, frames: Sequence[torch.Tensor | None], text: str) -> list[str]:
        """The clips side by side, at play and frame by frame; drawn again only if they are others."""
        if self._pages[0] != key:
            self._picture = composed(frames, self.contest.model.defaults["fps"], text)
            singles = [still(self._picture, i, text) for i in range(len(self._picture.frames))]
            self._pages = key, [moving(self._picture, text), *singles]
        return self._pages[1]

    def _turn(self, pages) -> None:
        playing, *singles = pages
        self.player.show(playing, singles)

    # ------------------------------------------------------------------------------------------------- blind votes

    def _switch(self) -> None:
        """Into blind mode, or out of it: nothing of the other one stays on the page, nor is made any more."""
        self.jobs.give_up()
        self.pair = self._picture = None
        self._pages = (None, [])
        self._turn([EMPTY] * (1 + self.player.num_frames))
        self.caption.value = self.saved.value = self.counts.value = ""
        self._explain()
        if self.blind.value:
            self.jobs.submit(self._next, settle=0)
        else:
            self._count()
            self._looked()

    def _next(self) -> Iterator[float]:
        """The next pair. The base always comes first, or the pace would tell which side it is."""
        contest, made = self.contest, {}
        pair = self.votes.next(self.adapter.value, self.prompts, contest.seed)
        for start, name in ((0.0, BASE), (0.5, pair.adapter)):
            made[name] = yield from part_of(
                contest.sample(name, pair.prompt, pair.seed), start, 0.5
            )
        text = f"A and B: {pair.prompt}"
        pictures = self._draw(pair, [made[name].float().cpu() for name in pair.sides], text)
        self._turn(under_names("AB", picture) for picture in pictures)
        self.caption.value = (
            f"<b>{escape(pair.prompt)}</b> <span class=vader-note>which clip is better?</span>"
        )
        self.pair = pair
        self._explain()

    def vote(self, choice: str) -> Vote:
        """Vote "A", "B" or "=" on the pair that is shown, and go on to the next. The vote is in the file when this
        returns. Raises ValueError for another choice, or if there is no pair."""
        if self.pair is None:
            raise ValueError("no pair waits for a vote; comparison.blind.value = True shows one")
        vote = self.votes.add(self.pair, choice)
        self.pair, self.counts.value = None, ""
        self._explain()
        self.jobs.submit(self._next, settle=0)
        return vote

    def tally(self) -> Tally:
        """Votes on the chosen adapter, of this panel and of earlier ones with this folder."""
        return self.votes.tally(self.adapter.value)

    def _count(self) -> None:
        self.counts.value = f"<div>{escape(str(self.tally()))}</div>"

    # ------------------------------------------------------------------------------------------------- showing

    def export(self, path: str | Path | None = None) -> Path:
        """Write what was compared as one HTML file, which needs no other: scores of all prompts, clips of the 24 that were
        looked at last; default `comparison.html` in the folder.
        Raises ValueError if nothing was compared yet."""
        path = Path(path or self.folder / "comparison.html")
        page = document(
            self.contest, self.prompts, [self.votes.tally(name) for name in self.contest.adapters]
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, page)
        data = base64.b64encode(page.encode()).decode()
        link = (
            f' · <a download="{escape(path.name)}" href="data:text/html;base64,{data}">download</a>'
        )
        link = link if len(data) < LINKED else ""
        self.saved.value = f"<span class=vader-note>exported to {escape(str(path))}{link}</span>"
        return path

    def prepare(self) -> None:
        prompt, names = self.prompt.value, self.contest.names
        if not self.blind.value and self.contest.missing(prompt):
            self.jobs.finish(lambda: self._complete([prompt], names[:2]))
            self.jobs.submit(self._one)

    def to_html(self) -> str:
        if self._picture is None:
            return "<p>nothing is compared yet</p>"
        # The picture of the first page, not encoded a second time; with a width of its own for pages that drop styles.
        wide = f"<img width={self._picture.frames.shape[-1] * 2} style='image-rendering:pixelated;max-width:100%'"
        picture = self._pages[1][0].replace("<img class=vader-frame", wide)
        scores = "" if self.blind.value else table(self.contest, self.prompt.value)
        return f"<div>{picture}{scores}</div>"
