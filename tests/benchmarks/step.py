"""What a training step costs against the sum of its parts, in one run: `python tests/benchmarks/step.py`

Parts, each timed by itself on the same shapes: T denoiser forwards without an adapter and without a graph,
K forwards and backwards with the adapter, the decoder's forward and backward, the reward's. The step should
cost at most 1.10 times their sum. Rounds alternate between step and parts, and the ratio is the median over
rounds, so that a machine whose speed drifts does not decide it.
"""

import argparse
import statistics
import time

import torch

from vader_nb import Frames, Last, Sampling, load, lora, prompts, rewards
from vader_nb.gradient import reward_gradient


def seconds(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--batch-size", type=int, default=4)
    arguments.add_argument("--K", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=7)
    options = arguments.parse_args()

    model, reward = load("tiny"), rewards.hps("tiny")
    sampling = Sampling().filled(model)
    batch = prompts.get("tiny")[: options.batch_size]
    conditioning = model.encode(batch)
    latents = torch.randn(len(batch), 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = list(model.new_scheduler(sampling.num_inference_steps).timesteps)

    def forwards():
        with torch.no_grad():
            for t in timesteps:
                model.predict(latents, t, conditioning, sampling.guidance_scale)

    def forward_and_backward():
        for t in timesteps[-options.K :]:
            model.predict(latents, t, conditioning, sampling.guidance_scale).sum().backward()

    def decode():
        leaf = latents.clone().requires_grad_()
        model.decode(leaf, [3]).sum().backward()

    frame = torch.rand(len(batch), 1, 3, 64, 64)

    def score():
        reward(frame.clone().requires_grad_(), batch).sum().backward()

    def step():
        generator = torch.Generator().manual_seed(0)
        reward_gradient(
            model,
            adapter,
            reward,
            batch,
            seeds=list(range(len(batch))),
            strategy=Last(options.K),
            frames=Frames("random", 1),
            sampling=sampling,
            checkpoint_blocks=False,
            generator=generator,
        )

    rows = {
        name: [] for name in ("forwards", "K forward+backward", "decode", "reward", "step", "ratio")
    }
    for round_ in range(options.rounds + 1):
        bare = seconds(forwards)
        adapter = lora.add(model, rank=8)
        times = [
            bare,
            seconds(forward_and_backward),
            seconds(decode),
            seconds(score),
            seconds(step),
        ]
        adapter.remove()
        if round_:  # the first warms up
            for name, value in zip(rows, [*times, times[-1] / sum(times[:-1])]):
                rows[name].append(value)
    for name, values in rows.items():
        print(
            f"{name:<20}{statistics.median(values):8.3f}   [{min(values):.3f}, {max(values):.3f}]"
        )


if __name__ == "__main__":
    main()
