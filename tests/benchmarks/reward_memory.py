"""What published rewards need in float16: `python -m tests.benchmarks.reward_memory`.

The full-size network of each is built from its published configuration as fake tensors (shapes without numbers: no
download, no memory), and scores one clip of 16 frames of 256 x 256 pixels, forwards and backwards, as the package
does it. It counts the weights, and the most that is alive besides them at one moment (`MemoryTracker`), against
the same without checkpointing and chunks.
"""

import sys

import torch

from vader_nb.memory_planner import FakeMode, MemoryTracker
from vader_nb.rewards import parse
from vader_nb.rewards.base import at_least_float32
from vader_nb.rewards.networks import default_dtype

FRAMES = (1, 16, 3, 256, 256)
PROMPT = "a prompt"
NAMES = ["aesthetic", "hps", "pickscore", "clip_score", "image_reward", "action", "text_video"]
NAMES += ["temporal_consistency", "object_removal", "subject_consistency", "videoprism"]
NAMES += ["video_reward(fps=8)"]


def measure(name: str, plain: bool = False) -> tuple[float, float]:
    """Gigabytes of the weights, and beside them."""
    with FakeMode() as fake:
        fake.truth = False
        with default_dtype(torch.float16):  # fake weights cannot be converted
            reward = parse(name, from_config=True)
        fake.truth = True
        network = getattr(reward, "clip", reward)
        if plain:
            network.frames_at_once = FRAMES[1]
            for part in network.networks:
                for module in part.modules():
                    # The checkpointed forward hides the class's own.
                    module.__dict__.pop("forward", None)
        frames = torch.empty(FRAMES, dtype=torch.float16).fill_(0.5).requires_grad_()
        weights = sum(p.nbytes for part in network.networks for p in part.parameters())
        reward.scores(at_least_float32(frames.detach()), [PROMPT])
        with MemoryTracker() as peak:
            reward.scores(at_least_float32(frames), [PROMPT]).sum().backward()
    return weights / 1e9, peak.bytes / 1e9


if __name__ == "__main__":
    print(
        f"{'reward':<22}{'weights':>9}{'beside':>9}{'plain':>9}   GB, float16, 16 frames of 256 x 256"
    )
    for name in sys.argv[1:] or NAMES:
        weights, beside = measure(name)
        print(f"{name:<22}{weights:9.2f}{beside:9.2f}", end="", flush=True)
        print(f"{measure(name, plain=True)[1]:9.2f}", flush=True)
