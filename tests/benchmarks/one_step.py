"""Why K = 1 can teach all steps, and where it is not enough: python -m tests.benchmarks.one_step [parts] [seed …]

parts: the embedded adapter `aesthetic`, trained with K = 1, acts in a part of `tiny`'s steps only. Prints for
`measured.parts` what it adds to its reward on held-out prompts, with half of the 95% interval over clips, and in pairs how
much more the steps before the last add than the last one. Three minutes on one core.

The embedded `tiny-wan`, with one denoiser for all steps and with two: a second, equal one for the last three of ten
steps, as Wan 2.2 A14B has them. REWARD depends on the layout, which the first steps decide. Prints, for
`measured.one_step` of vader_nb/course.yaml, what STEPS optimizer steps of each strategy add to it on held-out captions
(each clip and its twin without the adapter from the same noise), and how many of the clips still show a shape that
the oracles can name.
"""

import copy
import sys

import torch

from vader_nb import Frames, Sampling, load, lora, reward, reward_gradient, rewards, sample, zoo
from vader_nb import prompts as prompt_sets
from vader_nb.strategies import parse_strategy
from vader_nb.zoo import oracles

CASES = [("one", "Last(1)"), ("two", "Last(1)"), ("two", "Last(10)")]
STEPS, BATCH, RATE, CAPTIONS = 12, 4, 3e-3, 16
RATED = 48
PARTS = {
    "last step": (0.9, 1.0),
    "nine before": (0.0, 0.9),
    "second half": (0.5, 1.0),
    "first half": (0.0, 0.5),
    "all": (0.0, 1.0),
}
SAMPLING = Sampling(num_inference_steps=10)


def x_of_the_shape(frames, prompts):
    """Where the shape is, 0 at the left edge and 1 at the right, of clips (B, F, 3, H, W): (B,)."""
    border = torch.cat([frames[..., :3, :].flatten(-2), frames[..., -3:, :].flatten(-2)], -1)
    mass = (frames - border.mean(-1)[..., None, None].detach()).square().sum(dim=(2, 3))
    place = torch.linspace(0, 1, frames.shape[-1], device=frames.device)
    return ((mass * place).sum(-1) / mass.sum(-1).clamp(min=1e-3)).mean(dim=1)


REWARD = reward(lambda frames, prompts: -x_of_the_shape(frames, prompts), "left", per_frame=True)


def trained(model, strategy, seed: int):
    """An adapter after STEPS steps of AdamW."""
    adapter, captions = lora.add(model, rank=8, seed=seed), prompt_sets.get("tiny")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=RATE, weight_decay=0)
    generator = torch.Generator().manual_seed(seed)
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
            gradient_checkpointing=False,
        )
        optimizer.step()
    return adapter


def parts() -> None:
    model, rate = load("tiny", device="cpu"), rewards.aesthetic("tiny")
    captions = prompt_sets.get("tiny_held_out")[::3][:RATED]

    def rated(**options):
        batches = range(0, RATED, 8)
        clips = [sample(model, captions[i : i + 8], seeds=i, **options) for i in batches]
        return rate(torch.cat(clips), captions)

    def show(name, values):
        interval = 1.96 * values.std().item() / RATED**0.5
        print(f"{name}: [{values.mean().item():.3f}, {interval:.3f}]", flush=True)

    base, added = rated(), {}
    for name, (start, end) in PARTS.items():
        options = {"adapter_start": start, "adapter_end": end}
        added[name] = rated(adapter=zoo.adapters()["aesthetic"], **options) - base
        show(f"      {name}", added[name])
    show("    more_before", added["nine before"] - added["last step"])


def main() -> None:
    torch.set_num_threads(1)
    if "parts" in sys.argv:
        parts()
        sys.argv.remove("parts")
    model = load("tiny-wan", device="cpu")
    first = model.denoiser
    captions = prompt_sets.get("tiny_held_out")[:CAPTIONS]

    def judged(adapter=None):
        clips = sample(model, captions, seeds=500, sampling=SAMPLING, adapter=adapter)
        shapes = sum(reading.shape is not None for reading in oracles.read(clips))
        return REWARD(clips, captions), shapes, clips

    base, shapes, clips = judged()
    print(f"# the base: {shapes} of {len(captions)} shapes", flush=True)
    for seed in map(int, sys.argv[1:] or ("0", "1", "2")):
        for denoisers, strategy in CASES:
            second = {"transformer_2": copy.deepcopy(first)} if denoisers == "two" else {}
            model.denoisers = {"transformer": first, **second}
            model.boundary_ratio = 0.6 if second else None
            adapter = trained(model, parse_strategy(strategy), seed)
            scores, shapes, clips = judged(adapter)
            added = (scores - base).mean().item()
            adapter.remove()
            row = f"denoisers: {denoisers}, strategy: {strategy}, seed: {seed}"
            print(
                f"    - {{{row}, added: {added:.4f}, shapes: {shapes}}}",
                flush=True,
            )


if __name__ == "__main__":
    main()
