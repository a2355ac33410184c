"""What a training step costs, for the tiny model and for a larger random UNet: `python tests/benchmarks/step.py`

Prints seconds and peak memory (bytes of tensors, as `MemoryTracker` counts them) per step, and its parts, each
timed by itself on the same shapes: T - 1 denoiser forwards without an adapter and without a graph, K forwards and
backwards with it and with gradient checkpointing, the decoder's forward and backward, the reward's. With K = 1 the step
should cost at most 1.06 times their sum.

    python tests/benchmarks/step.py --against ../other        compares with another checkout

Each checkout runs in a process of its own, and rounds alternate between them, so that drift in the machine's
speed does not decide: the ratio is the median over rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from vader_nb import Sampling, load, lora, rewards
from vader_nb.gradient import reward_gradient
from vader_nb.memory_planner import MemoryTracker
from vader_nb.offload import recomputation
from vader_nb.strategies import Last

ROOT = Path(__file__).parent.parent.parent
PROMPTS = ["a red star", "a blue circle growing", "a green square", "a red circle moving left"]
LARGER = {"block_out_channels": (64, 128), "layers_per_block": 1, "cross_attention_dim": 64}
LARGER |= {"attention_head_dim": 16, "norm_num_groups": 16, "sample_size": 8}
LARGER |= {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D")}
LARGER |= {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}


def seconds(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


class Case:
    """One model with its step and the step's parts."""

    def __init__(self, larger: bool, batch_size: int, K: int):
        self.K = K
        self.model = load("tiny", device="cpu", dtype=torch.float32)
        if larger:
            from diffusers import UNet3DConditionModel

            torch.manual_seed(0)
            width = self.model.denoiser.config.cross_attention_dim
            network = UNet3DConditionModel(**(LARGER | {"cross_attention_dim": width}))
            attention = next(iter(self.model.denoiser.attn_processors.values()))
            network.set_attn_processor(attention)
            self.model.denoisers["unet"] = network.eval().requires_grad_(False)
        self.reward = rewards.hps("tiny")
        self.prompts = PROMPTS[:batch_size]
        self.sampling = Sampling().resolve(self.model)
        self.conditioning = self.model.encode(self.prompts, self.sampling)
        self.timesteps = list(self.model.new_scheduler(self.sampling).timesteps)
        seeded = torch.Generator().manual_seed(0)
        self.latents = torch.randn(len(self.prompts), 4, 8, 8, 8, generator=seeded)
        self.frame = torch.rand(len(self.prompts), 1, 3, 64, 64, generator=seeded)

    def predict(self, t) -> torch.Tensor:
        return self.model.guided(self.latents, t, self.conditioning, self.sampling)

    @torch.no_grad()
    def forwards(self) -> None:
        for t in self.timesteps[:-1]:
            self.predict(t)

    def forward_and_backward(self) -> None:
        with recomputation(self.model, True, False)():
            for t in self.timesteps[-self.K :]:
                self.predict(t).sum().backward()

    def decode(self) -> None:
        self.model.decode(self.latents.clone().requires_grad_(), [3]).sum().backward()

    def score(self) -> None:
        self.reward(self.frame.clone().requires_grad_(), self.prompts).sum().backward()

    def step(self) -> None:
        reward_gradient(
            self.model,
            self.adapter,
            self.reward,
            self.prompts,
            seeds=list(range(len(self.prompts))),
            strategy=Last(self.K),
            sampling=self.sampling,
            generator=torch.Generator().manual_seed(0),
        )

    def round(self) -> dict[str, float]:
        row = {"forwards": seconds(self.forwards)}
        self.adapter = lora.add(self.model, rank=8)
        for part in (self.forward_and_backward, self.decode, self.score):
            row[part.__name__] = seconds(part)
        parts = sum(row.values())
        row["step"] = seconds(self.step)
        self.adapter.remove()
        return row | {"step / parts": row["step"] / parts}

    def peak(self) -> float:
        """MB of tensors that a step makes."""
        self.adapter = lora.add(self.model, rank=8)
        with MemoryTracker() as tracker:
            self.step()
        self.adapter.remove()
        return tracker.bytes / 1e6


def serve(options) -> None:
    """A checkout's process: for each line on stdin, one round of that case, as JSON on stdout."""
    cases = {
        name: Case(name == "larger", options.batch_size, options.K) for name in ("tiny", "larger")
    }
    for line in sys.stdin:
        command, name = line.split()
        case = cases[name]
        answer = case.round() if command == "round" else {"peak, MB": case.peak()}
        print(json.dumps(answer), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--K", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    processes = {"here": start(ROOT, options)}
    if options.against:
        processes["against"] = start(options.against.resolve(), options)
    for name in ("tiny", "larger"):
        rounds = {checkout: [] for checkout in processes}
        for _ in range(options.rounds + 1):  # the first warms up
            for checkout, process in processes.items():
                rounds[checkout].append(ask(process, f"round {name}"))
        for checkout, process in processes.items():
            peak = ask(process, f"peak {name}")
            rounds[checkout] = [row | peak for row in rounds[checkout][1:]]
        report(name, rounds)
    for process in processes.values():
        process.stdin.close()
        process.wait()


def start(checkout: Path, options) -> subprocess.Popen:
    command = [sys.executable, __file__, "--serve", f"--batch-size={options.batch_size}"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    return subprocess.Popen(
        [*command, f"--K={options.K}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def ask(process: subprocess.Popen, line: str) -> dict[str, float]:
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def report(name: str, rounds: dict[str, list[dict[str, float]]]) -> None:
    """Medians of each checkout, and the median of the rounds' ratios here / against."""
    print(f"{name:<24}{''.join(f'{checkout:>12}' for checkout in rounds)}       ratio")
    for key in rounds["here"][0]:
        values = {checkout: [row[key] for row in rows] for checkout, rows in rounds.items()}
        medians = "".join(f"{statistics.median(numbers):12.3f}" for numbers in values.values())
        ratio = ""
        if len(values) > 1:
            pairs = zip(values["here"], values["against"])
            ratio = f"{statistics.median(here / there for here, there in pairs):12.3f}"
        print(f"{key:<24}{medians}{ratio}", flush=True)


if __name__ == "__main__":
    main()
