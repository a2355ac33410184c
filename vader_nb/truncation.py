"""What a truncated reward gradient costs and where it points: memory, time, cosine to the exact one."""

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from . import lora
from .gradient import reward_gradient
from .memory_planner import MemoryTracker
from .models import VideoModel
from .prompts import Prompt
from .rewards import Reward
from .sampling import Sampling
from .strategies import Last, parse_frames

B_STD = 0.05  # of the adapter's B
ATOMIC = "one gradient cannot be stopped midway"


@dataclass(frozen=True)
class Truncation:
    """A truncated gradient: the last K denoising steps learn, and some frames are scored."""

    K: int = 1
    frames: str = "random:1"  # as for `strategies.parse_frames`
    gradient_checkpointing: bool = True  # compute the denoiser's blocks again in the backward pass
    streaming: bool = True  # decode and score the frames one by one


@dataclass(frozen=True)
class Measured:
    """What one `reward_gradient` call took."""

    bytes: int  # the peak of all tensors that were made
    seconds: float
    cosine: float  # of the adapter's gradient to the exact one
    frames: tuple[int, ...]  # indices of the scored frames


@dataclass
class TruncationStudy:
    """Gradients of a reward on one clip with respect to a new adapter's parameters, measured against the exact one.

    The adapter has a random B, since A has no gradient where B is zero. The exact gradient goes through all steps and
    all frames, at the same seed.

    Attributes:
        model: Its own adapter is left alone.
        sampling: Resolved.
        seed: Of the clip, of the adapter and of a random frame.
        rank: Of the adapter.
        exact: The exact gradient (N,), once it is known.
    """

    model: VideoModel
    reward: Reward
    prompt: str | Prompt
    sampling: Sampling
    seed: int = 0
    rank: int = 4
    exact: torch.Tensor | None = None

    def __post_init__(self):
        self.adapter = random_adapter(self.model, self.rank, self.seed)

    def chosen(self, frames: str) -> list[int]:
        """Indices of the scored frames; a random one is the one that `reward_gradient` draws."""
        generator = torch.Generator().manual_seed(self.seed)
        given = self.model.given_frames([self.prompt])
        return parse_frames(frames).choose(self.sampling.num_frames, generator, given)

    def gradient(self, setting: Truncation, meter: AbstractContextManager) -> torch.Tensor:
        """The adapter's gradient (N,) in float64; `meter` is a context around the call."""
        parameters = self.adapter.parameters()
        try:
            with lora.use_adapter(self.model, self.adapter), meter:
                reward_gradient(
                    self.model,
                    self.adapter,
                    self.reward,
                    [self.prompt],
                    seeds=[self.seed],
                    strategy=Last(setting.K),
                    frames=parse_frames(setting.frames),
                    sampling=self.sampling,
                    decode_chunk_size=1 if setting.streaming else self.sampling.num_frames,
                    gradient_checkpointing=setting.gradient_checkpointing,
                    generator=torch.Generator().manual_seed(self.seed),
                )
            gradients: list[Any] = [p.grad for p in parameters]
            return torch.cat([part.flatten().double() for part in gradients])
        finally:
            for p in parameters:
                p.grad = None

    def measure(
        self, setting: Truncation, say: Callable[[str], None]
    ) -> Generator[float, None, Measured]:
        """Measure a truncated gradient; yields the fraction done, and says what comes next."""
        where = f"at K = {setting.K}, frames: {setting.frames}; {ATOMIC}."
        if self.exact is None:
            say(f"First the exact gradient, through all steps and frames; {ATOMIC}.")
            yield 0.05
            whole = Truncation(self.sampling.num_inference_steps, "all")
            self.exact = self.gradient(whole, nullcontext())
        say(f"Measuring memory {where}")
        yield 0.4
        tracker = MemoryTracker(self.model.device.type)
        gradient = self.gradient(setting, tracker)
        say(f"Measuring time {where}")
        yield 0.7  # time is measured separately, since the memory tracker takes time
        began = time.perf_counter()
        self.gradient(setting, nullcontext())
        seconds = time.perf_counter() - began
        cosine = torch.cosine_similarity(gradient, self.exact, dim=0).item()
        return Measured(tracker.bytes, seconds, cosine, tuple(self.chosen(setting.frames)))


def random_adapter(model: VideoModel, rank: int, seed: int) -> lora.Adapter:
    """A new adapter with a random B, off the model."""
    with lora.use_adapter(model, None):
        adapter = lora.add(model, rank, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in adapter.state_dict().items():
            if ".lora_B." in name:
                value.copy_(torch.randn(value.shape, generator=generator) * B_STD)
    return adapter
