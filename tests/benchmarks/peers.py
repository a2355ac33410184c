"""A training step here against the same step in its peers' sequences: `python tests/benchmarks/peers.py`

The peers' loops are rewritten for the same model, adapter, noise and reward, so that only the sequence differs:

- VADER (its train_t2v_lora.py): steps before the window without a graph, the adapter beside the weights in
  all of them; the window, the decoder and the reward in one graph.
- VideoX-Fun (its train_reward_lora.py): every step with a graph, the outputs before the window detached.

Both with the denoiser's blocks checkpointed, as they do. Each case prints seconds and peak memory (bytes of
tensors, as `MemoryTracker` counts them) as ratios to ours: above 1 is better here. The sequences take turns, so that
drift in the machine's speed does not decide; a ratio is the median over rounds. Before that, all three must give
the same gradient. Their other costs, such as adapters on more layers or a checkpoint every step, are not counted.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from vader_nb import Sampling, load, lora, rewards
from vader_nb.gradient import reward_gradient
from vader_nb.memory_planner import MemoryTracker
from vader_nb.offload import recomputation
from vader_nb.strategies import Frames, Last

PROMPTS = ["a red star", "a blue circle growing"]
CASES = [(1, 1), (1, 8), (3, 1), (5, 1), (10, 8)]  # K, frames scored


def ours(model, adapter, reward, sampling, K: int, frames: list[int]) -> None:
    settings = {"strategy": Last(K), "frames": Frames.at(*frames), "sampling": sampling}
    reward_gradient(model, adapter, reward, PROMPTS, seeds=range(len(PROMPTS)), **settings)


def vader(model, adapter, reward, sampling, K: int, frames: list[int]) -> None:
    whole_graph(model, reward, sampling, K, frames, graph_before_window=False)


def videox_fun(model, adapter, reward, sampling, K: int, frames: list[int]) -> None:
    whole_graph(model, reward, sampling, K, frames, graph_before_window=True)


def whole_graph(
    model, reward, sampling, K, frames, graph_before_window: bool, prompts: list[str] = PROMPTS
) -> None:
    """Plain autograd from the reward through the window's steps."""
    scheduler = model.new_scheduler(sampling)
    conditioning = model.encode(prompts, sampling)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    latents = model.start(model.initial_latents(sampling, generators), scheduler)
    before = len(scheduler.timesteps) - K
    with recomputation(model, True, False)():
        for i, t in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(graph_before_window or i >= before):
                scaled = model.scale_input(scheduler, latents, t)
                output = model.guided(scaled, t, conditioning, sampling)
                output = output if i >= before else output.detach()
                latents = model.step(scheduler, output, t, latents)
        (-reward(model.decode(latents, frames), prompts).mean()).backward()


SEQUENCES: dict[str, Callable] = {"ours": ours, "VADER": vader, "VideoX-Fun": videox_fun}


def run(name: str, case: tuple, setting: tuple) -> tuple[float, list[torch.Tensor]]:
    """Seconds and gradients of one step."""
    parameters = setting[1].parameters()
    began = time.perf_counter()
    SEQUENCES[name](*setting, *case)
    seconds = time.perf_counter() - began
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return seconds, gradients


def peak(name: str, case: tuple, setting: tuple) -> float:
    with MemoryTracker() as tracker:
        run(name, case, setting)
    return tracker.bytes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="tiny", help="as for vader_nb.load")
    options = parser.parse_args()
    model = load(options.model, device="cpu", dtype=torch.float32)
    adapter = lora.add(model, rank=8, seed=0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.01)
    sampling = Sampling().resolve(model)
    setting = (model, adapter, rewards.hps("tiny"), sampling)
    print(f"{options.model}, {len(PROMPTS)} clips; ratios to ours, above 1 is better here")
    print(
        f"{'K':>3}{'frames':>8}{'sequence':>12}{'seconds':>9}{'time':>7}{'memory':>8}{'gradient':>10}"
    )
    for K, count in CASES:
        case = (K, list(range(count)))
        report(case, setting, options.rounds)


def report(case: tuple, setting: tuple, rounds: int) -> None:
    expected = run("ours", case, setting)[1]
    times: dict[str, list[float]] = {name: [] for name in SEQUENCES}
    for _ in range(rounds):
        for name in SEQUENCES:
            times[name].append(run(name, case, setting)[0])
    memory = {name: peak(name, case, setting) for name in SEQUENCES}
    for name in SEQUENCES:
        gradients = run(name, case, setting)[1]
        pairs = list(zip(gradients, expected))
        apart = sum((a - b).norm() ** 2 for a, b in pairs) / sum(b.norm() ** 2 for b in expected)
        ratio = statistics.median(a / b for a, b in zip(times[name], times["ours"]))
        seconds = statistics.median(times[name])
        print(
            f"{case[0]:3}{len(case[1]):8}{name:>12}{seconds:9.2f}{ratio:7.2f}"
            f"{memory[name] / memory['ours']:8.2f}{float(apart) ** 0.5:10.0e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
