"""Blind votes: which of two clips is better, of which one does not know who made it."""

import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from ..evaluate import BASE

CHOICES = ("A", "B", "=")
Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Pair:
    """Two clips of a prompt from the same noise. left: who is A, the base or the adapter."""

    prompt: str
    seed: int
    adapter: str
    left: str

    @property
    def sides(self) -> tuple[str, str]:
        """Who made A, who made B."""
        return (BASE, self.adapter) if self.left == BASE else (self.adapter, BASE)


@dataclass(frozen=True)
class Vote(Pair):
    """choice: "A", "B" or "=", no difference."""

    choice: str

    def __post_init__(self):
        if self.choice not in CHOICES or self.left not in (BASE, self.adapter):
            raise ValueError(f"a vote is one of {', '.join(CHOICES)}, got {self.choice!r}")

    @property
    def worth(self) -> float:
        """1 for the adapter, 0 for the base, 0.5 for neither."""
        return (
            0.5
            if self.choice == "="
            else float(self.sides[CHOICES.index(self.choice)] == self.adapter)
        )


@dataclass(frozen=True)
class Tally:
    """Votes on one adapter. rate: its win rate, ties counted half; low, high: its 95 % interval."""

    adapter: str
    wins: int
    losses: int
    ties: int
    rate: float
    low: float
    high: float

    @property
    def votes(self) -> int:
        return self.wins + self.losses + self.ties

    def __str__(self) -> str:
        counts = (
            f"{self.adapter}: {self.wins} won, {self.losses} lost, {self.ties} without difference"
        )
        if not self.votes:
            return f"{self.adapter}: no votes yet"
        verdict = "better" if self.low > 0.5 else "worse" if self.high < 0.5 else "not clear yet"
        return f"{counts}. Win rate {self.rate:.0%}, 95 % interval {self.low:.0%} to {self.high:.0%}: {verdict}"


class Votes:
    """The votes of a folder, one a line of `votes.jsonl`. The file is all there is: it is read anew for each question, so
    that nothing is lost and two panels on one folder agree. Adapters go by name."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "votes.jsonl"

    def read(self) -> list[Vote]:
        """Raises ValueError for a line that is no vote."""
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []
        votes = []
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                votes.append(Vote(**json.loads(line)))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{self.path}, line {number} is not a vote ({error}); take it out"
                ) from error
        return votes

    def add(self, pair: Pair, choice: str) -> Vote:
        vote = Vote(**asdict(pair), choice=choice)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(vote)) + "\n")
        return vote

    def next(self, adapter: str, prompts: list[str], seed: int) -> Pair:
        """The pair after the last vote on this adapter: prompt by prompt, every time from a seed of its own, later than
        `seed`, whose clips are shown with names. Sides are drawn, the same in every run with this seed."""
        number = sum(vote.adapter == adapter for vote in self.read())
        left = random.Random(f"{seed} {adapter} {number}").choice([BASE, adapter])
        return Pair(prompts[number % len(prompts)], seed + 1 + number, adapter, left)

    def tally(self, adapter: str) -> Tally:
        worth = [vote.worth for vote in self.read() if vote.adapter == adapter]
        rate = sum(worth) / len(worth) if worth else math.nan
        counts = (worth.count(value) for value in (1.0, 0.0, 0.5))
        return Tally(adapter, *counts, rate, *wilson(rate, len(worth)))


def wilson(rate: float, votes: int) -> tuple[float, float]:
    """95 % score interval of a rate. Unlike a bootstrap it does not shrink to a point when all the few votes agree; with
    ties, which vary less than wins and losses, it is a little too wide. Without votes: anything, 0 to 1."""
    if not votes:
        return 0.0, 1.0
    share = Z**2 / votes
    center = (rate + share / 2) / (1 + share)
    half = math.sqrt(share * (rate * (1 - rate) + share / 4)) / (1 + share)
    return max(0.0, center - half), min(1.0, center + half)
