"""Where a reward gradient's variance comes from: python -m tests.benchmarks.variance [tiny] ["Last(1)" …]

One clip's gradient is a random vector: it depends on the prompt, the seed, the scored frame, and what the strategy
draws (steps, noise). For each strategy prints, as a Markdown table, the share of each source in the variance, each
source within those before it (a nested analysis of variance, summed over the adapter's entries; one near zero may come out
below it), and how many clips a batch needs until the mean gradient is as long as its noise: variance / squared length
of the mean gradient, with two standard errors of that length (jackknife over prompts).
"""

import itertools
import sys

import torch

from vader_nb import Sampling, load, lora, rewards
from vader_nb import prompts as prompt_sets
from vader_nb.gradient import accumulate, rolled_out
from vader_nb.strategies import parse_strategy
from vader_nb.testing import take_gradient

# Draws of each, within those before it; of the strategy one if it draws nothing.
SOURCES = {"prompt": 12, "seed": 2, "frame": 2, "strategy": 2}
STRATEGIES = (
    "Last(1)",
    "Last(3)",
    "DRaFTLV(1)",
    "ReFL(0.4)",
    "DRTune(2)",
    "DirectAlign(1)",
    "LeapAlign",
)


def components(values: torch.Tensor) -> tuple[list[float], float]:
    """Variance of each source, and the squared length of the mean, both without bias.

    Args:
        values: one axis for each source, and last the vector's entries.
    """
    found, below = [], 0.0
    for count in reversed(values.shape[:-1]):
        means = values  # over all that lies below
        spread = means.var(dim=-2).sum(-1).mean().item() if count > 1 else 0.0
        found.append(spread - below)
        below, values = spread / count, values.mean(dim=-2)
    return found[::-1], values.square().sum().item() - below


def clips_needed(values: torch.Tensor) -> str:
    """Variance / squared length of the mean, and its range; "more than …" where the length may be zero."""
    parts, signal = components(values)
    without = [torch.cat([values[:i], values[i + 1 :]]) for i in range(len(values))]
    signals = torch.tensor([components(rest)[1] for rest in without])
    error = 2 * ((len(values) - 1) * signals.var(correction=0)).sqrt().item()
    low = sum(parts) / max(signal + error, 1e-300)
    if signal <= error:
        return f"more than {low:.0f}"
    return f"{sum(parts) / signal:.0f} ({low:.0f} to {sum(parts) / (signal - error):.0f})"


def gradients(model, adapter, reward, strategy) -> torch.Tensor:
    """One clip's gradient for every draw of every source."""
    sampling = Sampling(num_inference_steps=5).resolve(model)  # as in the races
    captions, steps = prompt_sets.get("tiny"), model.num_steps(sampling)
    generator, found = torch.Generator().manual_seed(0), []
    plans = [strategy.plan(steps, torch.Generator().manual_seed(i)) for i in range(20)]
    draws = any(plan != plans[0] or plan.renoise for plan in plans)
    counts = [*SOURCES.values()][:-1] + [SOURCES["strategy"] if draws else 1]
    for places in itertools.product(*map(range, counts)):
        if not any(places[1:]):
            prompt = captions[int(torch.randint(len(captions), (), generator=generator))]
        if not any(places[2:]):
            seed = int(torch.randint(2**31, (), generator=generator))
        if not any(places[3:]):
            frame = int(torch.randint(sampling.num_frames, (), generator=generator))
        plan = strategy.plan(steps, generator)
        rollout = rolled_out(model, adapter, [prompt], [seed], sampling, plan)
        rollout.generators[0].manual_seed(
            len(found)
        )  # else a seed's fresh noise is always the same
        accumulate(model, adapter, reward, rollout, plan, [frame])
        found.append(take_gradient(adapter))
    return torch.stack(found).double().unflatten(0, counts)


def main(name: str = "tiny", *strategies: str) -> None:
    model, reward = load(name), rewards.hps("tiny") + 0.02 * rewards.aesthetic("tiny")
    adapter = lora.add(model, rank=8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    print(f"| `{name}` | {' | '.join(SOURCES)} | clips |")
    print("|---" * (len(SOURCES) + 2) + "|")
    for text in strategies or STRATEGIES:
        values = gradients(model, adapter, reward, parse_strategy(text))
        parts, _ = components(values)
        shares = " | ".join(f"{part / sum(parts):.0%}" for part in parts)
        print(f"| {text} | {shares} | {clips_needed(values)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
