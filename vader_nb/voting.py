"""Blind votes: which of two clips is better, without knowing who made it; of one voter or of several.

votes = read("runs/comparison/votes-ann.jsonl", "bob.jsonl")      of two people, as one list
print(tally(votes, "hps", "base"), agreement(votes)["hps"].rate)
"""

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path

from .evaluation import BASE
from .stats import proportions_interval

CHOICES = {"A": 1.0, "=": 0.5, "B": 0.0}  # and how much of a win each is for the left clip


@dataclass(frozen=True)
class Pair:
    """Two clips of a prompt from the same noise.

    Attributes:
        left, right: Who made them; the left one is A.
        rewards: By name, of the left clip minus of the right one.
    """

    prompt: str
    seed: int
    left: str
    right: str
    rewards: dict[str, float] = field(default_factory=dict)

    @property
    def clips(self) -> tuple:
        """What is the same for all voters, whatever side they see it on."""
        return self.prompt, self.seed, *sorted((self.left, self.right))


@dataclass(frozen=True)
class Vote(Pair):
    choice: str = ""  # one of `CHOICES`
    voter: str = ""

    def __post_init__(self):
        if self.choice not in CHOICES:
            raise ValueError(f"a vote must be one of {', '.join(CHOICES)}, got {self.choice!r}")

    def value(self, name: str) -> float:
        """1 if it is for the clip of this contestant, 0 if against, 0.5 for no difference."""
        value = CHOICES[self.choice]
        return value if name == self.left else 1 - value


@dataclass(frozen=True)
class Tally:
    """What was won and lost, and the share that was won: ties half, with its 95% interval, over pairs of clips."""

    wins: int
    losses: int
    ties: int
    pairs: int  # several people may have voted on one
    rate: float  # NaN without votes
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[tuple[Vote, float]]) -> "Tally":
        """Count values: 1 won, 0 lost, 0.5 neither. Votes on the same clips are one draw, of shares."""
        draws = defaultdict(list)
        for vote, value in values:
            draws[vote.clips].append(value)
        counts = [[draw.count(value) for value in (1, 0, 0.5)] for draw in draws.values()]
        if not counts:
            return cls(0, 0, 0, 0, float("nan"), 0.0, 1.0)
        gained, lost = (sum(count[i] / sum(count) for count in counts) for i in (0, 1))
        bounds = proportions_interval(gained, lost, len(counts))  # without ties that is Wilson's
        share, low, high = (0.5 + x / 2 for x in ((gained - lost) / len(counts), *bounds))
        wins, losses, ties = map(sum, zip(*counts))
        return cls(wins, losses, ties, len(counts), share, low, high)

    @property
    def votes(self) -> int:
        return self.wins + self.losses + self.ties

    @property
    def interval(self) -> str:
        return f"{self.low:.0%} to {self.high:.0%}"

    def __str__(self) -> str:
        if not self.votes:
            return "no votes yet"
        verdict = "better" if self.low > 0.5 else "worse" if self.high < 0.5 else "not clear yet"
        return (
            f"{self.wins} won, {self.losses} lost, {self.ties} with no difference. "
            f"Win rate {self.rate:.0%}, 95% interval {self.interval}: {verdict}"
        )


def read(*paths: str | Path) -> list[Vote]:
    """The votes of files, in their order. Raises ValueError for a line that is not a vote."""
    votes = []
    for path in paths:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
            try:
                if line:
                    values = json.loads(line)
                    if "adapter" in values:  # as files once named who is compared with the base
                        sides = {BASE, values.pop("adapter")}
                        (values["right"],) = sides - {values["left"]}
                    votes.append(Vote(**values))
            except (TypeError, ValueError, KeyError) as error:
                message = f"{path}, line {number} is not a vote ({error}); delete the line"
                raise ValueError(message) from error
    return votes


def between(votes: Iterable[Vote], one: str, other: str) -> list[Vote]:
    return [vote for vote in votes if {vote.left, vote.right} == {one, other}]


def tally(votes: Iterable[Vote], one: str, other: str) -> Tally:
    """The votes for and against `one`, on pairs with `other`."""
    return Tally.of((vote, vote.value(one)) for vote in between(votes, one, other))


def agreement(votes: Iterable[Vote]) -> dict[str, Tally]:
    """Of the votes that prefer a clip, those that each reward agrees with: it is higher there.

    Under "another voter": how often two people agree on the same clips, which no reward need exceed.
    """
    clear = [vote for vote in votes if vote.choice != "="]
    told, seen = defaultdict(list), defaultdict(list)
    for vote in clear:
        seen[vote.clips].append(vote)
        for reward, difference in vote.rewards.items():
            if abs(difference) > 0:
                told[reward].append((vote, float((difference > 0) == (vote.choice == "A"))))
    for one, other in (pair for same in seen.values() for pair in combinations(same, 2)):
        if one.voter != other.voter:
            agreed = one.value(one.left) == other.value(one.left)
            told["another voter"].append((one, float(agreed)))
    return {name: Tally.of(values) for name, values in told.items()}


class Votes:
    """The votes in a folder, read each time, so that two panels on it agree.

    Each voter has a file, `votes.jsonl` or `votes-NAME.jsonl`; those of all count. To merge votes
    from elsewhere, put their file there.
    """

    def __init__(self, folder: str | Path, voter: str = ""):
        if not re.fullmatch(r"[\w-]{0,40}", voter):  # it becomes a file name
            raise ValueError(f"a voter's name has up to 40 letters, digits, - or _; got {voter!r}")
        self.voter = voter
        self.path = Path(folder) / f"votes{'-' * bool(voter)}{voter}.jsonl"

    def read(self) -> list[Vote]:
        return read(*sorted(self.path.parent.glob("votes*.jsonl")))

    def add(self, pair: Pair, choice: str) -> Vote:
        vote = Vote(**asdict(pair), choice=choice, voter=self.voter)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(vote)) + "\n")
        return vote

    def next(self, one: str, other: str, prompts: list[str], seed: int) -> Pair:
        """The pair after this voter's last on these two; with a new seed, since clips of `seed` are shown by name."""
        mine = [vote for vote in between(self.read(), one, other) if vote.voter == self.voter]
        # The same clips for all voters; which side a clip is on is drawn for each voter.
        chance = random.Random(f"{seed} {self.voter} {sorted((one, other))} {len(mine)}")
        left, right = chance.sample(sorted((one, other)), 2)
        return Pair(prompts[len(mine) % len(prompts)], seed + 1 + len(mine), left, right)
