"""What published rewards need in float16: `python -m tests.benchmarks.reward_memory`.

The full-size network of each is built from its published configuration as fake tensors (shapes without numbers: no
download, no memory), and scores one clip of 16 frames of 256 x 256 pixels, forwards and backwards, as the package
does it. Counted are the weights, and the most that lives beside them at one moment (`vader_nb.memory.Peak`), against
the same without checkpointing and chunks.
"""

import sys

import torch
from vader_nb.memory import Peak, Shapes

from vader_nb.rewards import outline
from vader_nb.rewards.base import wide

FRAMES = (1, 16, 3, 256, 256)
PROMPT = "a prompt"
BUILD = {
    "aesthetic": outline.aesthetic,
    "hps": outline.hps,
    "pickscore": outline.pickscore,
    "clip_score": outline.clip_score,
    "image_reward": outline.image_reward,
    "action": lambda: outline.action(label="action 0"),
    "text_video": outline.text_video,
    "temporal_consistency": outline.temporal_consistency,
    "object_removal": outline.object_removal,
}


def measure(name: str, plain: bool = False) -> tuple[float, float]:
    """Gigabytes of the weights, and beside them."""
    with Shapes(allow_non_fake_inputs=True) as shapes:
        shapes.yes = False
        with outline.default_dtype(torch.float16):  # fake weights cannot be converted
            reward = BUILD[name]()
        shapes.yes = True
        network = getattr(reward, "clip", reward)
        if plain:
            network.frames_at_once = FRAMES[1]
            for part in network.networks:
                for module in part.modules():
                    module.__dict__.pop(
                        "forward", None
                    )  # the checkpointed one hides the class's own
        frames = torch.empty(FRAMES, dtype=torch.float16).fill_(0.5).requires_grad_()
        weights = sum(p.nbytes for part in network.networks for p in part.parameters())
        reward.scores(wide(frames.detach()), [PROMPT])
        with Peak() as peak:
            reward.scores(wide(frames), [PROMPT]).sum().backward()
    return weights / 1e9, peak.bytes / 1e9


if __name__ == "__main__":
    print(
        f"{'reward':<22}{'weights':>9}{'beside':>9}{'plain':>9}   GB, float16, 16 frames of 256 x 256"
    )
    for name in sys.argv[1:] or BUILD:
        weights, beside = measure(name)
        print(f"{name:<22}{weights:9.2f}{beside:9.2f}", end="", flush=True)
        print(f"{measure(name, plain=True)[1]:9.2f}", flush=True)
