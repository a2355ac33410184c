"""How low a rank suffices: python -m tests.benchmarks.lora_rank [seed …] ["rank 4" …]

Trains `tiny` to its `hps` reward for STEPS optimizer steps, each way from the same captions and noise: all weights of the
attention layers, and adapters of the ranks RANKS on the same layers. Prints, for `measured.rank` of vader_nb/course.yaml,
what each adds on held-out captions (each clip and its twin of the base model from the same noise), with half of the
95% interval over captions. Each way has the best of its learning rates RATES, by the same captions as the others (so
all are flattered a little, equally). "cut to rank r" is what is left of the trained weights' gain when each layer's
change is replaced by its best approximation of that rank.
"""

import sys

import torch

from vader_nb import Frames, Last, Sampling, load, lora, rewards, sample
from vader_nb import prompts as prompt_sets
from vader_nb.gradient import accumulate
from vader_nb.sampling import roll_out

STEPS, BATCH, CAPTIONS = 20, 4, 24
RANKS, CUTS = (1, 4), (1, 2, 4, 8)
RATES = {"all weights": (4e-4, 8e-4, 1.6e-3), "adapter": (4e-3, 8e-3, 1.6e-2)}
SAMPLING = Sampling(num_inference_steps=4)


class Weights:
    """All weights of the layers that an adapter would be added to, trained themselves."""

    def __init__(self, model):
        adapter = lora.add(model, rank=1)
        names = [name.partition(".")[2] for name in adapter.layers]
        adapter.remove()
        self.layers = [model.denoiser.get_submodule(name).weight for name in names]
        self.before = [weight.detach().clone() for weight in self.layers]
        for weight in self.layers:
            weight.requires_grad_()

    def parameters(self):
        return self.layers

    def changes(self):
        return [after.detach() - before for after, before in zip(self.layers, self.before)]

    def cut(self, changes, rank):
        """Give each layer the best approximation of its change."""
        for weight, before, change in zip(self.layers, self.before, changes):
            U, S, Vh = torch.linalg.svd(change, full_matrices=False)
            weight.data = before + (U[:, :rank] * S[:rank]) @ Vh[:rank]

    def remove(self):
        for weight, before in zip(self.layers, self.before):
            weight.requires_grad_(False)
            weight.data, weight.grad = before.clone(), None


def train(model, learner, reward, rate: float, seed: int) -> None:
    """STEPS steps of AdamW on `learner.parameters()`, of an adapter on the model or of its own weights."""
    captions, plan = prompt_sets.get("tiny"), Last(1).plan(SAMPLING.num_inference_steps, None)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=rate, weight_decay=0)
    generator = torch.Generator().manual_seed(seed)
    settings = SAMPLING.resolve(model)
    for step in range(STEPS):
        chosen = torch.randint(len(captions), (BATCH,), generator=generator).tolist()
        texts = [captions[i] for i in chosen]
        seeds = [10_000 * seed + BATCH * step + i for i in range(BATCH)]
        frames = Frames.random(1).choose(settings.num_frames, generator)
        adapter = learner if isinstance(learner, lora.Adapter) else None
        rollout = roll_out(model, texts, seeds, settings, adapter=adapter, window=1)
        optimizer.zero_grad()
        # There are only active steps, so the adapter is needed only to carry the gradient's scale.
        carrier = adapter or lora.Adapter(model, 1, 1.0, ())
        accumulate(model, carrier, reward, rollout, plan, frames, gradient_checkpointing=False)
        optimizer.step()


def held(model, reward, adapter=None) -> torch.Tensor:
    captions = prompt_sets.get("tiny_held_out")[:: 200 // CAPTIONS][:CAPTIONS]
    clips = [
        sample(model, captions[i : i + 8], seeds=500 + i, sampling=SAMPLING, adapter=adapter)
        for i in range(0, CAPTIONS, 8)
    ]
    return reward(torch.cat(clips), captions)


def main() -> None:
    torch.set_num_threads(1)
    model, reward = load("tiny", device="cpu"), rewards.hps("tiny")
    base = held(model, reward)
    ways = {"all weights": lambda seed: Weights(model)}
    for rank in RANKS:
        ways[f"rank {rank}"] = lambda seed, rank=rank: lora.add(model, rank=rank, seed=seed)
    chosen = [name for name in sys.argv[1:] if name in ways] or list(ways)
    for seed in [int(text) for text in sys.argv[1:] if text.isdigit()] or (0, 1, 2):
        for name in chosen:
            found = {}
            for rate in RATES.get(name, RATES["adapter"]):
                learner = ways[name](seed)
                train(model, learner, reward, rate, seed)
                adapter = None if name == "all weights" else learner
                found[rate] = gain(held(model, reward, adapter) - base)
                count = sum(p.numel() for p in learner.parameters())
                if isinstance(learner, Weights) and found[rate] == max(found.values()):
                    best, changes = learner, learner.changes()
                learner.remove()
            rate = max(found, key=found.get)
            row = f"seed: {seed}, rate: {rate:g}, parameters: {count}"
            tell(f"way: {name}, {row}", found[rate])
            print(f"#     {found}", file=sys.stderr, flush=True)
            for rank in CUTS if name == "all weights" else ():
                best.cut(changes, rank)
                tell(f"way: cut to rank {rank}, seed: {seed}", gain(held(model, reward) - base))
                best.remove()


def gain(added: torch.Tensor) -> tuple[float, float]:
    """Mean, and half of its 95% interval."""
    return added.mean().item(), 1.96 * added.std().item() / len(added) ** 0.5


def tell(row: str, found: tuple[float, float]) -> None:
    added, half = found
    print(f"    - {{{row}, added: {added:.4f}, half: {half:.4f}}}", flush=True)


if __name__ == "__main__":
    main()
