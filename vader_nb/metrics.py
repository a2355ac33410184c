"""What is measured on a clip: rewards, motion, oracles of the tiny world, features for diversity."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .rewards import JudgeError, Reward, as_reward
from .zoo import oracles, world

# What cannot be measured on clips of fewer frames; see also `Reward.min_frames`.
MIN_FRAMES = {"motion": 2, "oracle: motion": 5}
# Names of what is measured besides rewards and oracles.
OWN = {"motion", "diversity", "seam consistency", "palette kept"}
# Metric -> scores (B,), or (seeds, prompts); diversity has one value per prompt, (1, prompts).
Scores = dict[str, torch.Tensor]


@torch.no_grad()
def measure(
    frames: torch.Tensor,
    prompts: list[str],
    metrics: Iterable[Reward],
    segment: int | None = None,
    failed: dict[str, str] | None = None,
) -> Scores:
    """Score clips with rewards, motion, and the oracles if all prompts are of the tiny world.

    What needs more frames is left out.

    Args:
        frames: Shape `(B, F, 3, H, W)`.
        prompts: One per clip.
        metrics: The rewards.
        segment: Frames of each segment of clips that were extended; oracles then read the last one alone,
            where drift shows most, and the seams are measured.
        failed: Takes the message of each reward whose judge is gone, which is left out; None: that is an error.

    Returns:
        Scores `(B,)` by name.
    """
    scores = {}
    for metric in metrics:
        try:
            scores[metric.name] = metric(frames, prompts)
        except JudgeError as error:
            if failed is None:
                raise
            failed[metric.name] = str(error)
    last = frames[:, -segment:] if segment else frames
    if all(world.parse(prompt) for prompt in prompts):
        for name, value in oracles.grade(last, prompts).items():
            scores[f"oracle: {name}"] = value
    scores["motion"] = motion(frames)
    if segment and segment < frames.shape[1]:
        scores["seam consistency"] = seam_consistency(frames, segment)
        scores["palette kept"] = palette_kept(frames, segment)
    enough = [name for name in scores if frames.shape[1] >= MIN_FRAMES.get(name, 1)]
    return {name: scores[name].float().cpu() for name in enough}


def motion(frames: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute change from frame to frame, `(B, F, 3, H, W)` -> `(B,)`."""
    return frames.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))


def seam_consistency(frames: torch.Tensor, segment: int) -> torch.Tensor:
    """How much less a clip changes at its seams than elsewhere, `(B, F, 3, H, W)` -> `(B,)`; 0: as elsewhere."""
    changes = frames.diff(dim=1).abs().mean(dim=(2, 3, 4))
    at_seam = torch.zeros(changes.shape[1], dtype=torch.bool)
    at_seam[segment - 1 :: segment - 1] = True  # a segment's first frame is the last one before
    return changes[:, ~at_seam].mean(1) - changes[:, at_seam].mean(1)


def palette_kept(frames: torch.Tensor, segment: int) -> torch.Tensor:
    """1 minus the distance in mean and spread of the colors, first segment against last; 1: no drift."""
    ends = [frames[:, :segment], frames[:, -segment:]]
    colors = [clip.transpose(1, 2).flatten(2) for clip in ends]  # (B, 3, pixels)
    first, last = (torch.stack([c.mean(-1), c.std(-1)]) for c in colors)
    return 1 - (first - last).abs().mean(dim=(0, 2))


def thumbnails(frames: torch.Tensor) -> torch.Tensor:
    """Shrink frames `(B, F, 3, H, W)` to 8 x 8 pixels of 0 to 255, features `(B, D)`.

    This space needs no weights. `videomae_features` are those of a network, which sees meaning.
    """
    small = torch.nn.functional.adaptive_avg_pool2d(frames.flatten(0, 1), 8)
    return 255 * small.reshape(len(frames), -1)


setattr(thumbnails, "unit", "8x8 pixels")  # noqa: B010, what pyright accepts


def videomae_features(checkpoint: str | Path = "tiny") -> Callable[[torch.Tensor], torch.Tensor]:
    """Make a function from clips `(B, F, 3, H, W)` to VideoMAE's features `(B, D)`, token means.

    This is the space in which VADER's page measures diversity.

    Args:
        checkpoint: "tiny", "published", or a directory, as in `rewards.action`.
    """
    from .rewards.video_mae import action, position_table

    reward: Any = action(checkpoint)

    @torch.no_grad()
    def features(frames: torch.Tensor) -> torch.Tensor:
        reward.to(frames.device)
        pixels = reward.pixels(frames)
        with position_table(reward.classifier, pixels.shape[1]):
            return reward.classifier.videomae(pixels).last_hidden_state.mean(1)

    features.min_frames, features.unit = reward.min_frames, "VideoMAE"
    return features


def unique_metrics(
    rewards: Reward | Callable | Sequence[Reward | Callable],
    held_out: Iterable[Reward | Callable] = (),
) -> tuple[list[Reward], set[str]]:
    """Return each reward and each of its parts once, and the names of those trained on.

    Raises:
        ValueError: A held-out reward, or a part of it, was trained on; or different rewards share a
            name, or have the name of something else that is measured.
    """
    listed = rewards if isinstance(rewards, Sequence) else [rewards]
    trained = {}
    for reward in map(as_reward, listed):
        for part in (reward, *reward.parts()):
            trained.setdefault(part.fingerprint, part)
    metrics = dict(trained)
    for reward in map(as_reward, held_out):
        for part in (reward, *reward.parts()):
            if known := trained.get(part.fingerprint):
                of = "" if part is reward else f"{reward.name}: "
                raise ValueError(
                    f"{of}{part.name} is trained on (as {known.name}), so it cannot be held out"
                )
        metrics.setdefault(reward.fingerprint, reward)
    named = {}
    for fingerprint, reward in metrics.items():
        other = named.setdefault(reward.name, fingerprint)
        if reward.name in OWN or reward.name.startswith("oracle: "):
            raise ValueError(
                f"the reward {fingerprint} is named {reward.name!r}, like a metric that evaluate "
                "adds itself; give the reward another name with reward.renamed('...')"
            )
        if other != fingerprint:
            raise ValueError(
                f"two rewards are named {reward.name!r}: {other} and {fingerprint}; "
                "give one of them another name with reward.renamed('...')"
            )
    return list(metrics.values()), {reward.name for reward in trained.values()}
