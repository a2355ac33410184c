"""Bootstrap intervals of paired differences, over prompts: clips of one prompt are not independent."""

import math

import scipy.stats
import torch

RESAMPLES = 2000
# Fewer differences than this can all have one sign by chance more often than once in 20 (2 ** -4).
MIN_PROMPTS = 6


def paired_interval(differences: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """Bootstrap the 95 % interval of a mean difference.

    The percentiles of the resampled means are taken further out for few prompts (Hesterberg 2015,
    "What Teachers Should Know About the Bootstrap").

    Args:
        differences: One paired difference per prompt, shape `(N,)`.
        seed: Seed of the resampling.

    Returns:
        The bounds `(low, high)`, NaN where a difference is NaN.
    """
    count = len(differences)
    z = float(scipy.stats.norm.isf(0.025))
    tail = scipy.stats.norm.sf(expanded_quantile(z, count))
    means = differences.double()[_resamples(count, seed)].mean(1)
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def simultaneous_intervals(
    scores: torch.Tensor, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bootstrap intervals of all pairwise differences that hold together with 95 %.

    The best of many is partly the luckiest of many. Intervals for a single pair would therefore
    find that a reward "fell since" in runs in which nothing happened. These reach as far as the
    largest t statistic of all pairs, resampled over prompts. With 9 rows they hold together in
    94 % of cases for 32 prompts, 91 % for 16 and 77 % for 6.

    Args:
        scores: Scores of K candidates on the same N prompts, shape `(K, N)`.
        seed: Seed of the resampling.

    Returns:
        Lower and upper bounds of row minus column, each of shape `(K, K)`.
    """
    count = scores.shape[1]
    means = scores.mean(1)
    shift = scores[:, _resamples(count, seed)].mean(-1) - means[:, None]  # (K, RESAMPLES)
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


def _resamples(count: int, seed: int) -> torch.Tensor:
    """Indices of `RESAMPLES` draws with replacement, `(RESAMPLES, count)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (RESAMPLES, count), generator=generator)
