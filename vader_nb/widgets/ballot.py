"""The blind vote of a comparison: two clips, without names or numbers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ipywidgets import HTML, ToggleButton

from .. import voting
from ..comparison import Comparison
from ..comparison_html import results
from ..drawing import columns, note
from ..stepwise import Job
from ..video import Video, joined
from ..voting import Tally, Vote, Votes
from .controls import disable, row, text
from .panel import Panel
from .player import EMPTY, Player, pictures

LABELS = {"A": "A is better", "=": "no difference", "B": "B is better"}


class BlindVote(Panel):
    """A panel with the clips of `data` in `player`, which `blind` switches to a vote on `one` and `other`."""

    data: Comparison
    player: Player
    one: Any
    other: Any

    def __init__(self, folder: str | Path, voter: str, **settings):
        self.folder, self.pair = Path(folder), None  # a pair waits for a vote
        Votes(folder, voter).read()  # raises for a damaged file now, not after the first vote
        super().__init__(**settings, voter=text("your name", voter))
        self.caption, self.counts, self.saved = HTML(), HTML(), HTML()
        self.blind = ToggleButton(icon="eye-slash", layout={"width": "auto"})
        self.on(self._switch, self.blind)
        self.on(self._next_pair, self.voter)
        self.ballot = {}
        for side, label in LABELS.items():  # a second click can come too late
            press = lambda side=side: self.pair and self.vote(side)  # noqa: E731
            self.ballot[side] = self.button(label, "", 120, press)
        self.tally_button = self.button("show tally", "", 110, self._show_tally)
        self.ballot_box = row(*self.ballot.values(), self.tally_button, self.voter)

    @property
    def votes(self) -> Votes:
        return Votes(self.folder, self.voter.value)

    def changed(self) -> None:
        blind, pair = self.blind.value, f"{self.one.value} or {self.other.value}"
        self.blind.description = "leave the blind vote" if blind else f"blind vote: {pair}?"
        self.ballot_box.layout.display = "flex" if blind else "none"
        disable("" if self.pair else "the next pair is being made", *self.ballot.values())

    def draw(self, frames: Sequence[torch.Tensor | None], alt: str) -> tuple[Video, list[str]]:
        """Clips side by side, as a video and as elements: playing, and frame by frame."""
        video = joined(frames, self.data.model.defaults["fps"], alt)
        return video, pictures(video, alt)

    def _switch(self) -> None:
        """Enter or leave blind mode: nothing of the other view stays on the page or goes on."""
        self.jobs.give_up()
        self.pair = None
        self.player.show([EMPTY for _ in self.player.pages.children])
        self.caption.value = self.counts.value = self.saved.value = ""
        self.changed()
        if self.blind.value:
            self.jobs.submit(self._next_pair, 0)
        else:
            self._show_tally()
            self.update()

    def update(self) -> None:
        """Show the open view again."""

    def _next_pair(self) -> Job:
        """Make the next pair, in an order that does not tell which side is whose."""
        self.pair, data, made = None, self.data, {}
        pair = self.votes.next(self.one.value, self.other.value, data.prompts, data.seed)
        self.changed()
        for name in sorted((pair.left, pair.right)):
            made[name] = yield from data.sample(name, pair.prompt, pair.seed)
        left, right = (data.score(made[name], pair.prompt) for name in (pair.left, pair.right))
        change = {name: (left[name].mean() - right[name].mean()).item() for name in left}
        frames = [made[name].float().cpu() for name in (pair.left, pair.right)]
        self.video, images = self.draw(frames, f"A and B: {pair.prompt}")
        self.player.show([note(pair.prompt) + columns("AB", image) for image in images])
        self.caption.value = "Which clip is better?"
        self.pair = replace(pair, rewards=change)
        self.changed()

    def vote(self, choice: str) -> Vote:
        """Vote "A", "B" or "=", no difference, on the pair that is shown; then make the next pair.

        Raises:
            ValueError: Another choice, or there is no pair.
        """
        if self.pair is None:
            raise ValueError(
                "no pair is waiting for a vote; comparison.blind.value = True shows one"
            )
        vote = self.votes.add(self.pair, choice)
        self.pair, self.counts.value = None, ""
        self.changed()
        self.jobs.submit(self._next_pair, 0)
        return vote

    def tally(self) -> Tally:
        """Count all votes in the folder on the chosen pair: how often `one` won."""
        return voting.tally(self.votes.read(), self.one.value, self.other.value)

    def agreement(self) -> dict[str, Tally]:
        """How often each reward agrees with the votes in the folder, see `voting.agreement`."""
        return voting.agreement(self.votes.read())

    def _show_tally(self) -> None:
        self.counts.value = results(self.votes.read())
