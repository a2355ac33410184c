"""Align the tiny model to three rewards; the adapters are shipped, so that comparisons have something to show at once.
`python -m vader_nb.zoo.scripts.train_adapters [name …]` (four minutes each on two cores)

Short runs with few parameters: rank 4, 217 kB per file. Each resumes from its checkpoint if it was interrupted.
"""

import sys
from pathlib import Path

import torch

from vader_nb import align, evaluate, load, lora, prompts, rewards

from .. import WEIGHTS, adapters
from .cards import card, write

SEED, RANK, STEPS = 0, 4, 60
REWARDS = {"aesthetic": rewards.aesthetic, "hps": rewards.hps, "action": rewards.action}
# High enough that a short run shows; for the aesthetic reward so high that other rewards fall, which is worth seeing too.
LEARNING_RATES = {"aesthetic": 5e-3, "hps": 1e-3, "action": 4e-3}
GRADED = 60  # held-out captions of the card
RUNS = Path("runs/zoo/adapters")


def train(name: str) -> None:
    reward = REWARDS[name]("tiny")
    run = align(
        load("tiny"),
        reward,
        prompts.get("tiny"),
        steps=STEPS,
        learning_rate=LEARNING_RATES[name],
        rank=RANK,
        seed=SEED,
        output_dir=RUNS / name,
        resume="latest",
    )
    run.adapter.save(
        WEIGHTS / "tiny-adapters" / f"{name}.safetensors", reward=name, steps=STEPS, seed=SEED
    )


def quality() -> dict[str, float]:
    """Mean differences from the base on held-out captions, same seeds: every reward, the oracles, motion."""
    metrics = [make("tiny") for make in REWARDS.values()]
    captions = {"held-out": prompts.get("tiny_held_out")[:GRADED]}
    result = evaluate(load("tiny"), adapters(), metrics, captions, seeds_per_prompt=1)
    return {
        f"{row.name}: {row.metric}, {row.base:.3f} changes by": row.difference
        for row in result.rows
    }


def main(names: list[str]) -> None:
    for name in names or REWARDS:
        train(name)
    size = sum(p.numel() for p in lora.add(load("tiny"), RANK).parameters())
    write(
        "tiny-adapters",
        card(
            "tiny-adapters: three adapters for tiny",
            f"LoRA of rank {RANK}, {size:,} parameters each, in diffusers' key layout: `lora.load(model, zoo.adapters()['hps'])`.\n"
            "`aesthetic`, `hps`, `action` are named after the one reward that each was aligned to, alone.",
            f"`vader_nb/zoo/scripts/train_adapters.py`: `align`, {STEPS} steps of 4 clips; learning rates\n"
            + ", ".join(f"{rate:g} ({name})" for name, rate in LEARNING_RATES.items())
            + ". The aesthetic adapter was trained too far, for comparison with the others: look at what it costs.",
            SEED,
            quality(),
            f"Means over {GRADED} held-out captions, one clip each, of the base and of the paired difference from it. The base names\n"
            "nearly all motions right already, so the action adapter has little to win: what it gains here is uncertain.",
        ),
    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1:])
