"""Rows of paired differences with interval and test, over prompts: one prompt's clips are not independent.

Share of 4000 samples whose 95% interval contains the truth (`paired_interval`, n prompts):

    differences                        n = 6     8    16    32
    normal                              0.97  0.96  0.96  0.96
    heavy-tailed (Student's t, 3)       0.97  0.97  0.96  0.96
    skewed (lognormal, sigma 0.5)       0.94  0.94  0.96  0.96
    exponential                         0.93  0.94  0.95  0.96
    very skewed (lognormal, sigma 1)    0.90  0.90  0.93  0.94
"""

import math
from dataclasses import dataclass
from typing import Any

import scipy.optimize
import scipy.stats
import torch

RESAMPLES = 2000
Z = float(scipy.stats.norm.isf(0.025))
# Fewer differences than this can all have one sign by chance more often than once in 20 (2 ** -4).
MIN_PROMPTS = 6
# What a table of `Row` says of its star, its intervals and p.
NOTES = (
    "the interval excludes zero and p < 0.05, row by row: of 20 rows without any effect, one may do so by chance",
    "interval: over prompts; Tango's for paired proportions where all scores are 0 or 1, else",
    "Student's t or, beyond it, the bootstrap-t. p: exact sign-flip test (McNemar's for 0 and 1)",
)


@dataclass
class Row:
    """One metric of one adapter on one group of prompts: means over prompts, and their difference.

    Where only the base was evaluated, there is no name and only `base` and `prompts` have values.
    """

    group: str
    metric: str
    base: float
    adapter: float | None
    difference: float | None  # paired: same prompt, same seed
    low: float | None  # the difference's 95% interval over prompts, from two prompts on
    high: float | None
    prompts: int
    name: str | None = "adapter"
    win_rate: float | None = (
        None  # share of clips on which the adapter scores higher; ties count half
    )
    held_out: bool = False  # not trained on
    p: float | None = None  # of the sign-flip test over prompts; see `sign_flip_p`
    unit: str = ""  # of what is measured, where the metric's name does not say it

    @property
    def label(self) -> str:
        """The metric with its unit, as it stands in tables."""
        return f"{self.metric} ({self.unit})" if self.unit else self.metric

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero and p, as printed, is below 0.05: from six prompts on."""
        if self.low is None or self.high is None or self.p is None:
            return False
        return round(self.p, 3) < 0.05 and (self.low > 0 or self.high < 0)

    @property
    def decimals(self) -> int:
        """Digits that show two leading ones of the interval, and that it excludes zero; 3 to 6."""
        bounds = sorted(abs(v) for v in (self.low, self.high) if v and math.isfinite(v))
        digits = [1 - math.floor(math.log10(bound)) for bound in bounds[-1:]]
        if self.significant:
            digits.append(-math.floor(math.log10(bounds[0])))
        return min(6, max(3, *digits, 0))

    def texts(self) -> list[str]:
        """Base, adapter, difference, interval, p and win rate as they stand in tables."""

        def text(value: float | None, sign: str = "") -> str:
            if value is None:
                return ""
            return "nan" if math.isnan(value) else f"{value:{sign}.{self.decimals}f}"

        interval = "" if self.low is None else f"{text(self.low, '+')} to {text(self.high, '+')}"
        p = "" if self.p is None else "<0.001" if self.p < 0.001 else f"{self.p:.3f}"
        wins = "" if self.win_rate is None else f"{self.win_rate:.0%}"
        values = [text(self.base), text(self.adapter), text(self.difference, "+")]
        return [*values, interval, p, wins]


def paired_row(
    group: str,
    metric: str,
    base: torch.Tensor,
    after: torch.Tensor | None,
    name: str | None,
    held_out: bool,
    unit: str = "",
) -> Row:
    """Make a row from scores `(seeds, prompts)`; prompts, not seeds, are the independent draws."""
    before = base.mean(0).double()
    mean, prompts, unknown = before.mean().item(), len(before), (None, None)
    if after is None:
        return Row(
            group, metric, mean, *unknown, *unknown, prompts, None, held_out=held_out, unit=unit
        )
    change = after.mean(0).double() - before
    adapter, difference = (before + change).mean().item(), change.mean().item()
    up, down = (after > base).double(), (after < base).double()
    wins, bounds, p = 0.5 + (up - down).mean().item() / 2, unknown, None
    if prompts > 1:
        p, zero_one = sign_flip_p(change), all(((x == 0) | (x == 1)).all() for x in (base, after))
        # The clips of a prompt may all agree: each prompt counts as one draw, of shares of its clips.
        counts = up.mean(0).sum().item(), down.mean(0).sum().item(), prompts
        bounds = proportions_interval(*counts) if zero_one else paired_interval(change)
    row = Row(group, metric, mean, adapter, difference, *bounds, prompts, name, wins, held_out, p)
    row.unit = unit
    return row


def paired_interval(differences: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """Return the 95% interval of a mean difference: Student's t, or the bootstrap-t where it reaches further.

    Student's t misses the long tail of skewed differences; the bootstrap-t (Efron and
    Tibshirani 1993, section 12.5), which sees it, is too short for heavy tails on both sides.

    Args:
        differences: One paired difference per prompt, shape `(N,)`, at least two.
        seed: Seed of the resampling.

    Returns:
        The bounds `(low, high)`, NaN where a difference is NaN.
    """
    values = differences.double()
    mean, std = values.mean(), values.std()
    draws = values[resamples(len(values), seed)]
    # A resample that repeats a few values has a spread near zero, and could give any interval.
    spread = draws.std(1).clamp(min=0.2 * std.item() + 1e-300)
    levels = torch.tensor([0.975, 0.025], dtype=torch.float64)
    reach = ((draws.mean(1) - mean) / spread).quantile(levels)  # of the truth, as seen from here
    student = float(scipy.stats.t.isf(0.025, len(values) - 1)) / math.sqrt(len(values))
    low, high = mean - std * reach[0].clamp(min=student), mean - std * reach[1].clamp(max=-student)
    return low.item(), high.item()


def proportions_interval(gained: float, lost: float, count: int) -> tuple[float, float]:
    """Return the 95% score interval of a difference of paired proportions, (gained - lost) / count.

    Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17, 891-908.

    Args:
        gained: Number of pairs that went from 0 to 1.
        lost: Number of pairs that went from 1 to 0.
        count: Number of all pairs.
    """

    def score(d: float) -> float:
        b = (2 * count - gained + lost) * d - gained - lost
        q = (math.sqrt(max(0.0, b * b + 8 * count * lost * d * (1 - d))) - b) / (4 * count)
        variance = count * (2 * q + d * (1 - d))
        return (gained - lost - count * d) / math.sqrt(max(variance, 1e-12))

    difference, edge = (gained - lost) / count, 1 - 1e-9
    bounds = []
    for end, z in ((-edge, Z), (edge, -Z)):
        root: Any = end
        if abs(score(end)) > Z:
            root = scipy.optimize.brentq(lambda d, z=z: score(d) - z, end, difference)
        bounds.append(round(root, 8))
    return bounds[0], bounds[1]


def sign_flip_p(differences: torch.Tensor) -> float:
    """Return how often a mean this far from zero occurs if each difference's sign is chance.

    Two-sided and, up to 13 differences other than zero, exact; for differences of -1, 0 and 1 it
    is McNemar's exact test.
    """
    if differences.isnan().any():
        return math.nan
    changed = differences[differences != 0].double().numpy()
    if not len(changed):
        return 1.0
    if abs(changed).min() == abs(changed).max():
        return float(scipy.stats.binomtest(int((changed > 0).sum()), len(changed)).pvalue)
    options: Any = {"permutation_type": "samples", "vectorized": True, "random_state": 0}
    test = scipy.stats.permutation_test((changed,), lambda x, axis: x.mean(axis), **options)
    return float(test.pvalue)


def simultaneous_intervals(
    scores: torch.Tensor, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bootstrap intervals of all pairwise differences that hold jointly at 95%.

    The best of many is partly the luckiest of many. Intervals for a single pair would therefore
    find that a reward "has fallen since" in runs in which nothing happened. These reach as far as the
    largest t statistic of all pairs, resampled over prompts. With 9 rows they hold jointly in
    94% of cases for 32 prompts, 91% for 16 and 77% for 6.

    Args:
        scores: Scores of K candidates on the same N prompts, shape `(K, N)`.
        seed: Seed of the resampling.

    Returns:
        Lower and upper bounds of row minus column, each of shape `(K, K)`.
    """
    count = scores.shape[1]
    means = scores.mean(1)
    shift = scores[:, resamples(count, seed)].mean(-1) - means[:, None]  # (K, RESAMPLES)
    error = (scores[:, None] - scores[None]).std(-1) / math.sqrt(count)  # (K, K)
    t = (shift[:, None] - shift[None]).abs() / error[..., None].clamp(min=1e-12)
    largest = t.nan_to_num(0).flatten(0, 1).amax(0)  # (RESAMPLES,)
    reach = expanded_quantile(largest.quantile(0.95).item(), count) * error
    difference = means[:, None] - means[None]
    return difference - reach, difference + reach


def expanded_quantile(z: float, count: int) -> float:
    """Translate a normal quantile into standard errors of a bootstrap over `count` draws.

    The bootstrap's variance lacks the factor N / (N - 1), and its tails are lighter than those of
    Student's t.
    """
    freedom = max(1, count - 1)
    t = scipy.stats.t.isf(scipy.stats.norm.sf(z), freedom)
    return float(t) * math.sqrt(count / freedom)


def resamples(count: int, seed: int) -> torch.Tensor:
    """Indices of `RESAMPLES` draws with replacement, `(RESAMPLES, count)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (RESAMPLES, count), generator=generator)
