"""Long clips of image-to-video models: segments, each of which continues the last frame of the one before.

    long = extend(model, image, times=3)                                 a clip three times as long
    run = align(model, reward, prompts, extend=3, segments="2,3")        trained on such clips

The reward sees the whole clip, its seams included. Its gradient goes through the segments that are named, each
through its own last denoising steps; it stops at a seam: the image that a segment continues counts as given, as it
does when the clip is made.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from . import experts, gradient
from .estimators import Batch, Collected, RewardGradient, Row
from .models import VideoModel
from .prompts import Prompt
from .rewards import Reward, record_parts
from .sampling import Rollout, Sampling, continued, join, roll_out, sample, segment_settings
from .sampling import decode as decode_frames


def extend(
    model: VideoModel,
    start,
    *,
    times: int = 3,
    prompts: Sequence[str | Prompt] | str | Prompt = "",
    seeds: Sequence[int] | int = 0,
    adapter=None,
    sampling: Sampling | None = None,
) -> torch.Tensor:
    """Make a clip longer by continuing its last frame.

    Args:
        model: one that starts from an image.
        start: an image (3, H, W), or a clip (F, 3, H, W) or (B, F, 3, H, W), all in [0, 1]; or None, where
            the prompts have images.
        times: segments of the whole. A segment after the first adds num_frames - 1 frames, since its first
            one repeats the last one before.
        prompts, seeds, adapter, sampling: as for `sample`.

    Returns:
        Frames (B, F + …, 3, H, W) in [0, 1]; a clip that was given stands at the beginning, unchanged.

    Raises:
        ValueError: for a model of text alone, fewer than 2 segments, or a `start` of another shape.
    """
    if times < 2:
        raise ValueError(f"times={times} must be at least 2")
    if start is not None and getattr(start, "ndim", 0) not in (3, 4, 5):
        raise ValueError(f"start must be a tensor, an image or clips, got {type(start).__name__}")
    texts = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
    options = {"seeds": seeds, "adapter": adapter}
    settings = sampling or Sampling()
    if start is None or start.ndim == 3:
        if start is not None:
            texts = [replace(as_prompt(text), image=start) for text in texts]
        return sample(model, texts, sampling=replace(settings, extend=times), **options)
    clips = start[None] if start.ndim == 4 else start
    texts = texts * len(clips) if len(texts) == 1 else texts
    settings = replace(settings, extend=times - 1)
    rest = sample(model, continued(texts, clips), sampling=settings, **options)
    return join([clips.to(rest), rest])


def as_prompt(prompt: str | Prompt) -> Prompt:
    return prompt if isinstance(prompt, Prompt) else Prompt(prompt)


def parse_segments(text: str, count: int) -> list[int]:
    """Indices, from 0, of the segments that "all", "last" or "1,3" (counted from 1) names.

    Raises:
        ValueError: for anything else, and for a segment that the clip does not have.
    """
    named = {"all": range(1, count + 1), "last": [count]}
    try:
        chosen = named[text] if text in named else sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise ValueError(f"segments={text!r}: write all, last, or numbers such as 2,3") from None
    if not 1 <= min(chosen) <= max(chosen) <= count:
        raise ValueError(f"segments={text!r} must lie in 1..{count}: the clip has {count} segments")
    return [number - 1 for number in chosen]


class Seamed(Reward):
    """A reward of the whole clip, as one of its segments sees it: the other frames are given.

    Attributes:
        clips: of all segments, each (B, F, 3, H, W).
        index: of the segment whose frames it is called with.
        frames: indices of the whole clip's frames that are scored.
    """

    def __init__(self, reward: Reward, clips: list[torch.Tensor], index: int, frames: list[int]):
        self.reward, self.clips, self.index, self.frames = reward, clips, index, frames
        self.name, self.per_frame, self.networks = reward.name, False, reward.networks

    def __call__(self, frames, prompts):
        clips = [clip.to(frames) for clip in self.clips]
        clips[self.index] = frames
        return self.reward(join(clips)[:, self.frames], prompts)


@dataclass
class LongCollected(Collected):
    """The roll-outs and the clips (B, F, 3, H, W) of all segments; `frames` are the whole clip's."""

    rollouts: list[Rollout] = field(default_factory=list)
    clips: list[torch.Tensor] = field(default_factory=list)


class LongRewardGradient(RewardGradient):
    """`RewardGradient` for clips of several segments."""

    def setup(self, model, adapter, reward, config) -> None:
        super().setup(model, adapter, reward, config)
        self.segments = parse_segments(config.segments, config.sampling.extend)
        if self.frames.kind != "random":  # which is drawn where something learns
            self.scored_segments(self.frames.named(len(segment_of_frames(self.sampling))))

    def scored_frames(self, batch: Batch) -> list[int]:
        """Indices in the whole clip; for a reward on single frames, random ones of the segments that learn."""
        places, generator = segment_of_frames(self.sampling), batch.generator
        if self.frames.kind != "random" or not self.reward.per_frame:
            return self.frames.choose(len(places), generator)
        learning = [frame for frame, segment in enumerate(places) if segment in self.segments]
        if learning[0] == 0:
            learning = learning[self.model.given_frames(batch.prompts) :]
        return [learning[i] for i in self.frames.choose(len(learning), generator)]

    def scored_segments(self, frames: list[int]) -> list[int]:
        """The segments that learn and hold scored frames; the others do not change the reward."""
        places = segment_of_frames(self.sampling)
        scored = {places[frame] for frame in frames}
        segments = [index for index in self.segments if index in scored]
        if not segments:
            raise ValueError(
                f"no scored frame (of {frames}) lies in the segments that learn: set frames=all"
            )
        return segments

    def collect(self, batch: Batch) -> LongCollected:
        sampling = self.sampling
        of = self.model, self.adapter, sampling
        plan = experts.draw_plan(*of, self.strategy, batch.generator)
        frames = self.scored_frames(batch)
        options = {"adapter": self.adapter, **plan.rollout}
        rolled = list(roll_out_segments(self.model, batch.prompts, batch.seeds, sampling, options))
        rollouts, clips = zip(*rolled)
        return LongCollected(rollouts[0], plan, frames, rollouts=list(rollouts), clips=list(clips))

    def accumulate(self, collected, weight, backward) -> Row:
        """Through each segment that learns and holds a scored frame."""
        rewards, parts = torch.empty(0), {}
        for index in self.scored_segments(collected.frames):
            seamed = Seamed(self.reward, collected.clips, index, collected.frames)
            with record_parts() as scores:
                result = gradient.accumulate(
                    self.model,
                    self.adapter,
                    seamed,
                    collected.rollouts[index],
                    collected.plan,
                    list(range(self.sampling.num_frames)),
                    weight=weight,
                    backward=backward,
                    **self.settings,
                )
            rewards = result.rewards
            parts = {name: torch.cat(values, dim=1).mean(dim=1) for name, values in scores.items()}
        return Row(rewards, parts, {"frames": collected.frames})


def segment_of_frames(sampling: Sampling) -> list[int]:
    """For each frame of the whole clip, the index of its segment."""
    later = [k for k in range(1, sampling.extend) for _ in range(sampling.num_frames - 1)]
    return [0] * sampling.num_frames + later


def roll_out_segments(
    model: VideoModel, prompts, seeds, sampling: Sampling, options: dict
) -> Iterator[tuple[Rollout, torch.Tensor]]:
    """The roll-out of each segment and its frames, one after the other."""
    for index in range(sampling.extend):
        one, own = segment_settings(sampling, seeds, index)
        rollout = roll_out(model, prompts, own, one, **options)
        rollout.check()
        clips = decode_frames(model, rollout.latents)
        yield rollout, clips
        prompts = continued(prompts, clips)
