"""Rewards: callables (frames, prompts) -> (B,), higher is better, differentiable in the frames.

Frames are (B, F, 3, H, W) in [0, 1]. Rewards add, scale and aim:

    hps() + 0.1 * aesthetic()          a weighted sum
    aesthetic().towards(10)            minus the distance to 10, frame by frame
    reward(lambda frames, prompts: frames.mean(dim=(1, 2, 3, 4)), name="brightness")
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import contextlib
from contextvars import ContextVar

import torch

_RECORD: ContextVar[dict[str, list[torch.Tensor]] | None] = ContextVar("parts", default=None)


@contextlib.contextmanager
def record_parts() -> Iterator[dict[str, list[torch.Tensor]]]:
    """Inside, the scores of every part of a mixed reward are noted, at no cost.

    Yields:
        Name of the part -> its scores (B, F) or (B, 1), one tensor per call.
    """
    token = _RECORD.set({})
    try:
        yield _RECORD.get()
    finally:
        _RECORD.reset(token)


class Reward:
    """A score of each clip.

    A subclass or `reward(...)` gives `scores(frames, prompts)`: (B, F) for a reward that looks at frames one
    by one (`per_frame`, decoding can then stream), or (B, 1) for one on the whole clip. The reward is the
    mean over dim 1. `range` and `unit` describe it for plots.
    """

    name: str = "reward"
    per_frame: bool = True
    range: tuple[float, float] = (-float("inf"), float("inf"))
    typical: tuple[float, float] | None = None  # scores of usual pictures or clips, where known
    unit: str = ""
    networks: list = []  # the modules inside
    differentiable: bool = True  # in the frames

    @property
    def fingerprint(self) -> str:
        return self.name

    def scores(self, frames: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        raise NotImplementedError

    def __call__(self, frames: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.scores(inspect(frames, prompts), prompts).mean(dim=1)

    def check_prompts(self, prompts: Iterable[str]) -> None:
        """Raises ValueError for a prompt that this reward could not judge, before a run meets it at step 300."""

    def parts(self) -> list["Reward"]:
        """The rewards this one is made of, for reporting each by itself."""
        return [self]

    def to(self, *args, **kwargs) -> "Reward":
        """Move the networks inside, if any, to a device or dtype."""
        return self

    def named(self, name: str) -> "Reward":
        self.name = name
        return self

    def towards(self, target: float) -> "Reward":
        """Minus the distance to the target: the pull stops, and turns, once the target is reached."""
        return Mapped(
            f"({self.name} towards {target:g})", lambda scores: -(scores - target).abs(), self
        )

    def capped(self, limit: float) -> "Reward":
        """No more than `limit`: what is good enough pulls no further. ReFL's relu(2 - r) is this one's loss, at 2."""
        name = f"({self.name} capped at {limit:g})"
        return Mapped(
            name,
            lambda scores: scores.clamp(max=limit),
            self,
            (self.range[0], min(self.range[1], limit)),
        )

    def normalized(self, mean: float, std: float) -> "Reward":
        """In standard deviations from the mean, so that rewards of different units can be weighed against each other.
        `statistics` measures mean and std on clips of the base model."""
        if not std > 0:
            raise ValueError(
                f"the standard deviation must be positive, got {std}; were the clips all alike?"
            )
        bounds = tuple((bound - mean) / std for bound in self.range)
        name = f"normalized {self.name}"
        return Mapped(name, lambda scores: (scores - mean) / std, self, bounds, "std", (-2.0, 2.0))

    def __add__(self, other: "Reward | Callable") -> "Reward":
        return Sum(self, as_reward(other))

    def __mul__(self, weight: float) -> "Reward":
        low, high = sorted(weight * bound if weight else 0.0 for bound in self.range)
        typical = self.typical and tuple(
            sorted(weight * bound + 0.0 for bound in self.typical)
        )  # no minus zero
        name = f"{weight:g} × {self.name}"
        return Mapped(name, lambda scores: weight * scores, self, (low, high), self.unit, typical)

    __rmul__ = __mul__

    def __neg__(self) -> "Reward":
        return self * -1.0

    def __sub__(self, other: "Reward | Callable") -> "Reward":
        return self + -as_reward(other)

    def __repr__(self) -> str:
        return self.name


def part_scores(part: Reward, frames: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """The scores of a part of a reward, noted if `record_parts` listens and the part has no parts itself."""
    scores, record = part.scores(frames, prompts), _RECORD.get()
    if record is not None and part.parts() == [part]:
        record.setdefault(part.name, []).append(scores.detach())
    return scores


class Mapped(Reward):
    """A function of another reward's scores, score by score."""

    def __init__(
        self,
        name: str,
        function: Callable,
        inner: Reward,
        range=Reward.range,
        unit="",
        typical=None,
    ):
        self.name, self.function, self.inner = name, function, inner
        self.range, self.unit, self.typical = range, unit, typical
        self.per_frame, self.networks = inner.per_frame, inner.networks

    def scores(self, frames, prompts):
        return self.function(part_scores(self.inner, frames, prompts))

    def check_prompts(self, prompts):
        self.inner.check_prompts(prompts)

    def parts(self):
        return self.inner.parts()

    def to(self, *args, **kwargs):
        self.inner.to(*args, **kwargs)
        return self


class Sum(Reward):
    """The sum of two rewards; a frame-wise one is spread over a clip-wise one by broadcasting."""

    def __init__(self, left: Reward, right: Reward):
        self.left, self.right = left, right
        self.name = f"{left.name} + {right.name}"
        self.per_frame, self.networks = (
            left.per_frame and right.per_frame,
            [*left.networks, *right.networks],
        )
        self.range = (left.range[0] + right.range[0], left.range[1] + right.range[1])

    def scores(self, frames, prompts):
        return part_scores(self.left, frames, prompts) + part_scores(self.right, frames, prompts)

    def check_prompts(self, prompts):
        self.left.check_prompts(prompts), self.right.check_prompts(prompts)

    def parts(self):
        return self.left.parts() + self.right.parts()

    def to(self, *args, **kwargs):
        self.left.to(*args, **kwargs), self.right.to(*args, **kwargs)
        return self


class Function(Reward):
    """A plain function (frames, prompts) -> (B,), taken to look at the whole clip unless told otherwise."""

    def __init__(self, function: Callable, name: str | None = None, per_frame: bool = False):
        self.function, self.name = function, name or getattr(function, "__name__", "function")
        self.per_frame = per_frame

    def scores(self, frames, prompts):
        if not self.per_frame:
            return as_column(self.function(frames, prompts))
        columns = [
            as_column(self.function(frames[:, i : i + 1], prompts)) for i in range(frames.shape[1])
        ]
        return torch.cat(columns, dim=1)

    def __call__(self, frames, prompts):
        if self.per_frame:
            return super().__call__(frames, prompts)
        return self.function(
            inspect(frames, prompts), prompts
        )  # of whatever shape: the caller checks it and names the reward


def wide(values: torch.Tensor) -> torch.Tensor:
    """At least float32: where half precision would overflow, or round away what matters."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def inspect(frames: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """The frames in float32 at least. Raises ValueError for what no reward can judge, naming what it was given."""
    if not isinstance(frames, torch.Tensor) or frames.ndim != 5 or frames.shape[2] != 3:
        got = tuple(frames.shape) if isinstance(frames, torch.Tensor) else type(frames).__name__
        raise ValueError(f"frames must be a tensor (B, F, 3, H, W), got {got}")
    if not frames.is_floating_point():
        raise ValueError(
            f"frames must be floats in [0, 1], got {frames.dtype}; write frames.float() / 255"
        )
    if not len(prompts) or len(prompts) != len(frames) or isinstance(prompts, str):
        got = f"the string {prompts!r}" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(f"{len(frames)} clips need a list of as many prompts, got {got}")
    low, high = (bound.item() for bound in frames.detach().aminmax())
    if not (
        low >= -0.01 and high <= 1.01
    ):  # a rounding error may stick out; another convention, or NaN, may not
        raise ValueError(
            f"frames must lie in [0, 1], got {low:.3g} to {high:.3g}; from [-1, 1] write frames / 2 + 0.5"
        )
    return wide(frames)


def as_column(value: torch.Tensor) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.ndim != 1:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(
            f"a reward function must return one score a clip, shape (B,); it returned {got}"
        )
    return value.unsqueeze(1)


def reward(function: Callable, name: str | None = None, per_frame: bool = False) -> Reward:
    """Make a reward of a function (frames, prompts) -> (B,). per_frame: it scores frames one by one, so
    that decoding may stream; without it the function is given the whole clip."""
    return Function(function, name, per_frame)


def as_reward(value: Reward | Callable) -> Reward:
    if isinstance(value, Reward):
        return value
    if callable(value):
        return Function(value)
    raise TypeError(
        f"a reward is a Reward or a function (frames, prompts) -> (B,), not {type(value).__name__}"
    )


@torch.no_grad()
def statistics(
    reward: Reward | Callable, frames: torch.Tensor, prompts: list[str]
) -> tuple[float, float]:
    """Mean and standard deviation of a reward over clips (B >= 2), for `reward.normalized(mean, std)`."""
    scores = as_reward(reward)(frames, prompts)
    if len(scores) < 2:
        raise ValueError("the spread of a reward needs at least 2 clips, got 1")
    return scores.mean().item(), scores.std().item()


def conflict(
    first: Reward | Callable, second: Reward | Callable, frames: torch.Tensor, prompts: list[str]
):
    """The cosine between two rewards' gradients on the pixels of each clip, (B,): 1 they agree, 0 they do not care
    about each other, -1 what one gains the other loses. frames (B, F, 3, H, W)."""
    directions = []
    for reward in map(as_reward, (first, second)):
        leaf = wide(frames.detach()).clone().requires_grad_()
        score = reward(leaf, prompts).sum()
        if not score.requires_grad:
            raise ValueError(
                f"reward {reward.name!r} has no gradient; vader_nb.check(reward) shows why"
            )
        (gradient,) = torch.autograd.grad(score, leaf)
        directions.append(gradient.flatten(1).double())  # sums over all pixels of a clip
    return torch.cosine_similarity(*directions, dim=1).to(leaf.dtype)


def validate_scores(reward: Reward, frames: torch.Tensor, prompts: Sequence) -> torch.Tensor:
    """The reward's scores (B,) of frames, with a graph.

    Raises:
        ValueError: if the reward returns something else.
    """
    value = reward(frames, [str(prompt) for prompt in prompts])
    if not isinstance(value, torch.Tensor) or value.shape != (len(prompts),):
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(
            f"reward {reward.name!r} must return one score per clip, shape ({len(prompts)},); "
            f"it returned {got}"
        )
    if not value.requires_grad:
        raise ValueError(
            f"reward {reward.name!r} has no gradient: somewhere it leaves the graph (no_grad, uint8, "
            f"PIL, numpy, argmax). vader_nb.check(reward) shows more"
        )
    return value
