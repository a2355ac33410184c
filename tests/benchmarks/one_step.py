"""Where K = 1 is not enough: python -m tests.benchmarks.one_step [seed …]

The embedded `tiny-wan`, with one denoiser for all steps and with two: a second, equal one for the last three of ten
steps, as Wan 2.2 A14B has them. REWARD depends on the layout, which the first steps decide. Prints, for
`measured.one_step` of vader_nb/course.yaml, what STEPS optimizer steps of each strategy add to it on held-out captions
(each clip and its twin without the adapter from the same noise), and their seconds on one core.
"""

import copy
import sys
import time

import torch

from vader_nb import Frames, Sampling, load, lora, reward, reward_gradient, sample
from vader_nb import prompts as prompt_sets
from vader_nb.strategies import parse_strategy

CASES = [("one", "Last(1)"), ("two", "Last(1)"), ("two", "DRTune(2)"), ("two", "Last(10)")]
STEPS, BATCH, RATE, CAPTIONS = 16, 4, 5e-3, 16
SAMPLING = Sampling(num_inference_steps=10)


def x_of_the_shape(frames, prompts):
    """Where the shape is, 0 at the left edge and 1 at the right, of clips (B, F, 3, H, W): (B,)."""
    border = torch.cat([frames[..., :3, :].flatten(-2), frames[..., -3:, :].flatten(-2)], -1)
    mass = (frames - border.mean(-1)[..., None, None].detach()).square().sum(dim=(2, 3))
    place = torch.linspace(0, 1, frames.shape[-1], device=frames.device)
    return ((mass * place).sum(-1) / mass.sum(-1).clamp(min=1e-3)).mean(dim=1)


REWARD = reward(lambda frames, prompts: -x_of_the_shape(frames, prompts), "left", per_frame=True)


def trained(model, strategy, seed: int):
    """An adapter after STEPS steps of AdamW, and their seconds."""
    adapter, captions = lora.add(model, rank=8, seed=seed), prompt_sets.get("tiny")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=RATE, weight_decay=0)
    generator, began = torch.Generator().manual_seed(seed), time.perf_counter()
    for step in range(STEPS):
        chosen = torch.randint(len(captions), (BATCH,), generator=generator).tolist()
        seeds = [10_000 * seed + BATCH * step + i for i in range(BATCH)]
        optimizer.zero_grad()
        reward_gradient(
            model,
            adapter,
            REWARD,
            [captions[i] for i in chosen],
            seeds=seeds,
            strategy=strategy,
            frames=Frames.random(1),
            sampling=SAMPLING,
            generator=generator,
        )
        optimizer.step()
    return adapter, time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)
    model = load("tiny-wan", device="cpu")
    first = model.denoiser
    captions = prompt_sets.get("tiny_held_out")[:CAPTIONS]

    def judged(adapter=None):
        return REWARD(
            sample(model, captions, seeds=500, sampling=SAMPLING, adapter=adapter), captions
        )

    base = judged()
    for seed in map(int, sys.argv[1:] or ("0", "1", "2")):
        for denoisers, strategy in CASES:
            second = {"transformer_2": copy.deepcopy(first)} if denoisers == "two" else {}
            model.denoisers = {"transformer": first, **second}
            model.boundary_ratio = 0.6 if second else None
            adapter, seconds = trained(model, parse_strategy(strategy), seed)
            added = (judged(adapter) - base).mean().item()
            adapter.remove()
            row = f"denoisers: {denoisers}, strategy: {strategy}, seed: {seed}"
            print(f"    - {{{row}, added: {added:.4f}, seconds: {seconds:.0f}}}", flush=True)


if __name__ == "__main__":
    main()
