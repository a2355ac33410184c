"""What K does in a UNet and in a transformer: python -m tests.benchmarks.truncation

Both embedded text-to-video models on the same prompts, seeds and reward: `tiny`, a UNet that predicts v and is sampled
by DDIM, and `tiny-wan`, a transformer that predicts the velocity of a flow and is sampled by Euler steps. For
each K prints, as a Markdown table:

- gain: how far the final latents move with the last denoiser output, by the schedule alone.
- cosine: of the gradient of `Last(K)` to that through all steps, the median over batches.
- step: CPU seconds of a training step, the median.
- held-out: what STEPS training steps add to the reward on held-out captions, with its 95% interval over captions, and
  that per CPU minute of training. Each model trains with the settings of its recipe.
"""

import statistics
import sys
import tempfile
import time

import torch

from vader_nb import Sampling, align, evaluate, load, lora, rewards
from vader_nb import prompts as prompt_sets
from vader_nb.gradient import reward_gradient
from vader_nb.strategies import Frames, Last

MODELS = {"tiny": "UNet, v, DDIM", "tiny-wan": "transformer, flow, Euler"}
RECIPES = {"tiny-wan": {"batch_size": 8, "learning_rate": 2e-3, "frames": Frames.all()}}
WINDOWS, BATCHES, BATCH, STEPS, CAPTIONS = (1, 2, 5, 10), 8, 4, 40, 48


def gradient(model, adapter, reward, prompts, seed: int, K: int) -> torch.Tensor:
    for parameter in adapter.parameters():
        parameter.grad = None
    seeds = range(seed * BATCH, (seed + 1) * BATCH)
    options = {"strategy": Last(K), "frames": Frames.all()}
    reward_gradient(model, adapter, reward, prompts, seeds=seeds, **options)
    return torch.cat([p.grad.flatten() for p in adapter.parameters()])


def cosines(model, reward, windows) -> dict[int, float]:
    """Of each window's gradient to the exact one, which the last window is.

    The adapter is random, so that both its factors have a gradient.
    """
    prompts = prompt_sets.get("tiny")
    adapter = lora.add(model, rank=8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    found = {K: [] for K in windows}
    for seed in range(BATCHES):
        batch = [prompts[(seed * BATCH + i) % len(prompts)] for i in range(BATCH)]
        parts = {K: gradient(model, adapter, reward, batch, seed, K) for K in windows}
        exact = parts[max(windows)]
        for K, part in parts.items():
            found[K].append(torch.cosine_similarity(part, exact, dim=0).item())
    adapter.remove()
    return {K: statistics.median(values) for K, values in found.items()}


def trained(model, reward, K: int, recipe: dict) -> tuple[float, float, object]:
    """CPU seconds of a step, CPU minutes of the training, and the held-out reward's row."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        run = align(
            model,
            reward,
            "tiny",
            steps=STEPS,
            strategy=Last(K),
            output_dir=f"{folder}/run",
            callback=lambda row: times.append(time.process_time()),
            **recipe,
        )
        captions = prompt_sets.get("tiny_held_out")[:CAPTIONS]
        result = evaluate(
            model, run, reward, {"held-out": captions}, seeds_per_prompt=1, progress=False
        )
        run.adapter.remove()
    steps = [after - before for before, after in zip(times, times[1:])]
    step = statistics.median(steps)
    return step, step * STEPS / 60, result.row("held-out", reward.name)


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    print("| model | K | gain | cosine | step, CPU s | held-out reward | per CPU minute |")
    print("|---|---|---|---|---|---|---|")
    for name, kind in MODELS.items():
        model = load(name)
        reward = rewards.hps("tiny") + 0.02 * rewards.aesthetic("tiny")
        gain = model.last_step_gain(Sampling().resolve(model))
        steps = model.num_steps(Sampling().resolve(model))
        windows = [K for K in WINDOWS if steps >= K]
        close = cosines(model, reward, windows)
        for K in windows:
            step, minutes, row = trained(model, reward, K, RECIPES.get(name, {}))
            change = f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
            print(
                f"| `{name}`: {kind} | {K} | {gain:.2f} | {close[K]:.2f} | {step:.2f} | {change} | "
                f"{row.difference / minutes:+.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
