NOTEBOOK = "07_evaluate_and_reward_hacking"

CHEAT = """
def cheat(frames):
    fakes = torch.zeros_like(frames)
    half = frames.shape[-1] // 2
    {}
    return fakes
"""
HALVES = CHEAT.format("fakes[..., 0, :, :half] = 1.0; fakes[..., 2, :, half:] = 1.0")

INTERVAL = """
def interval(before, after):
    difference = (after - before).mean(0)
    count = len(difference)
    random = torch.Generator().manual_seed(0)
    chosen = torch.randint(count, (2000, count), generator=random)
    means = difference.cpu()[chosen].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975]))
    return difference.mean(), low, high
"""
IN_A_LOOP = """
def interval(before, after):
    import random

    values = (after - before).mean(0).tolist()
    draw = random.Random(1)
    means = sorted(sum(draw.choices(values, k=len(values))) / len(values) for _ in range(4000))
    return sum(values) / len(values), means[100], means[-101]
"""
BASIC = INTERVAL.replace(
    "return difference.mean(), low, high",
    "mean = difference.mean(); return mean, 2 * mean - high, 2 * mean - low",
)
BOTH_RESAMPLED_ALIKE = """
def interval(before, after):
    import numpy as np

    a, b = before.mean(0).numpy(), after.mean(0).numpy()
    chosen = np.random.default_rng(3).integers(len(a), size=(3000, len(a)))
    means = b[chosen].mean(1) - a[chosen].mean(1)
    return (b - a).mean(), *np.percentile(means, [2.5, 97.5])
"""
STUDENT = """
def interval(before, after):
    import scipy.stats

    d = (after - before).mean(0).double()
    return d.mean(), *scipy.stats.t.interval(0.95, len(d) - 1, d.mean(), d.std() / len(d) ** 0.5)
"""
UNPAIRED = INTERVAL.replace(
    "    means = difference.cpu()[chosen].mean(1)",
    "    other = torch.randint(count, (2000, count), generator=random)\n"
    "    means = after.mean(0)[chosen].mean(1) - before.mean(0)[other].mean(1)",
)

STOP = """
def stop(scores, patience):
    {}
"""
BY_INDEX = STOP.format(
    "best = scores.index(max(scores))\n"
    "    return best if len(scores) - 1 - best >= patience else None"
)
IN_A_WALK = STOP.format(
    "best = since = 0\n"
    "    for i, score in enumerate(scores):\n"
    "        best, since = (i, 0) if score > scores[best] else (best, i - best)\n"
    "    if since >= patience:\n"
    "        return best"
)

ANSWERS = {
    "cheat": (
        [
            HALVES,
            CHEAT.format(
                "fakes[..., 1, :half, :] = 1.0; fakes[..., 0, half:, :] = fakes[..., 2, half:, :] = 1.0"
            ),
            CHEAT.format("fakes[..., 0, :, ::2] = 1.0; fakes[..., 2, :, 1::2] = 1.0"),
            "def cheat(frames): return torch.rand_like(frames[:, :1]).round().expand_as(frames)",
        ],
        {
            "def cheat(frames): return frames": "scores",
            "def cheat(frames): return torch.zeros_like(frames)": "your worst",
            CHEAT.format("fakes = frames * 3"): "between 0 and 1",
            HALVES.replace("return fakes", "return fakes[:, :1]"): "shape",
            HALVES.replace(
                "return fakes", "fakes[:, ::2] = fakes[:, ::2].flip(-1); return fakes"
            ): "moves",
        },
    ),
    "interval": (
        [INTERVAL, IN_A_LOOP, BASIC, BOTH_RESAMPLED_ALIKE, STUDENT],
        {
            "def interval(before, after): return [(after - before).mean()] * 3": "does not hold",
            INTERVAL.replace("after - before", "before - after"): "mean difference",
            INTERVAL.replace("low, high\n", "high, low\n"): "does not hold",
            INTERVAL.replace(", generator=random", ""): "a second time",
            UNPAIRED: "are these pairs",
            INTERVAL.replace("means.quantile", "difference.quantile"): "spread of the *mean*",
            INTERVAL.replace(".mean(0)\n    count", ".flatten()\n    count"): "independent draws",
            INTERVAL.replace("[0.025, 0.975]", "[0.05, 0.95]"): "95% of what",
            INTERVAL.replace(
                "torch.randint(count, (2000, count), generator=random)",
                "torch.arange(count).expand(2000, count)",
            ): "does not hold",
            INTERVAL.replace("(2000, count)", "(2000, 50)"): "nine prompts",
        },
    ),
    "stop": (
        [BY_INDEX, IN_A_WALK],
        {
            STOP.format(
                "fell = len(scores) > 1 and scores[-1] < scores[-2]\n"
                "    return len(scores) - 1 if fell else None"
            ): "one worse score",
            STOP.format("return scores.index(max(scores))"): "one worse score",
            BY_INDEX.replace(">=", ">"): "two were no better",
            BY_INDEX.replace("len(scores) - 1 - best", "len(scores) - best"): "one worse score",
            STOP.format(
                "if len(scores) > patience and all(b < a for a, b in zip(scores[-patience - 1 :], scores[-patience:])):\n"
                "        return len(scores) - 1 - patience"
            ): "better than the best",
            BY_INDEX.replace(
                "scores.index(max(scores))", "len(scores) - 1 - scores[::-1].index(max(scores))"
            ): "earliest",
        },
    ),
}
