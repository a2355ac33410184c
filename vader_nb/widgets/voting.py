"""Blind votes: which of two clips is better, without knowing which model made it."""

import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from ..evaluation import BASE

CHOICES = ("A", "B", "=")


@dataclass(frozen=True)
class Pair:
    """Two clips of a prompt from the same noise. left: the base or the adapter, which is A."""

    prompt: str
    seed: int
    adapter: str
    left: str

    @property
    def sides(self) -> tuple[str, str]:
        return (BASE, self.adapter) if self.left == BASE else (self.adapter, BASE)


@dataclass(frozen=True)
class Vote(Pair):
    choice: str  # "A", "B" or "=", no difference

    def __post_init__(self):
        if self.choice not in CHOICES or self.left not in (BASE, self.adapter):
            raise ValueError(f"a vote is one of {', '.join(CHOICES)}, got {self.choice!r}")

    @property
    def value(self) -> float:
        """1 for the adapter, 0 for the base, 0.5 for neither."""
        return 0.5 if self.choice == "=" else float((self.choice == "A") != (self.left == BASE))


@dataclass(frozen=True)
class Tally:
    """Votes on an adapter, and the 95 % interval of its win rate."""

    adapter: str
    wins: int
    losses: int
    ties: int
    rate: float  # ties counted half; NaN without votes
    low: float
    high: float

    @property
    def votes(self) -> int:
        return self.wins + self.losses + self.ties

    def __str__(self) -> str:
        if not self.votes:
            return f"{self.adapter}: no votes yet"
        verdict = "better" if self.low > 0.5 else "worse" if self.high < 0.5 else "not clear yet"
        return (
            f"{self.adapter}: {self.wins} won, {self.losses} lost, {self.ties} without difference. "
            f"Win rate {self.rate:.0%}, 95 % interval {self.low:.0%} to {self.high:.0%}: {verdict}"
        )


class Votes:
    """The votes in a folder's `votes.jsonl`, read each time, so that two panels on it agree."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "votes.jsonl"

    def read(self) -> list[Vote]:
        """All votes. Raises ValueError for a line that is none."""
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []
        votes = []
        for number, line in enumerate(lines, 1):
            try:
                if line:
                    votes.append(Vote(**json.loads(line)))
            except (TypeError, ValueError) as error:
                message = f"{self.path}, line {number} is not a vote ({error}); delete the line"
                raise ValueError(message) from error
        return votes

    def add(self, pair: Pair, choice: str) -> Vote:
        vote = Vote(**asdict(pair), choice=choice)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(vote)) + "\n")
        return vote

    def next(self, adapter: str, prompts: list[str], seed: int) -> Pair:
        """The pair after the last vote on this adapter; of a new seed, as `seed` is seen by name."""
        number = self.tally(adapter).votes
        left = random.Random(f"{seed} {adapter} {number}").choice([BASE, adapter])
        return Pair(prompts[number % len(prompts)], seed + 1 + number, adapter, left)

    def tally(self, adapter: str) -> Tally:
        values = [vote.value for vote in self.read() if vote.adapter == adapter]
        wins, losses, ties = (values.count(value) for value in (1.0, 0.0, 0.5))
        rate = sum(values) / len(values) if values else math.nan
        return Tally(adapter, wins, losses, ties, rate, *wilson_interval(sum(values), len(values)))


def wilson_interval(wins: float, votes: int) -> tuple[float, float]:
    """The 95 % score interval of a win rate; (0, 1) without votes.

    Unlike a bootstrap it does not shrink to a point when a few votes agree. For half a win, a tie,
    it covers the intervals of both whole numbers next to it.
    """
    from scipy.stats import binomtest

    if not votes:
        return 0.0, 1.0
    low = binomtest(math.floor(wins), votes).proportion_ci(method="wilson").low
    high = binomtest(math.ceil(wins), votes).proportion_ci(method="wilson").high
    return float(low), float(high)
