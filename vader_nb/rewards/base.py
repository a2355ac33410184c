"""Rewards: callables (frames, prompts) -> (B,), higher is better, differentiable in the frames.

Frames are (B, F, 3, H, W) in [0, 1]. Rewards can be added, scaled and aimed:

    hps() + 0.1 * aesthetic()          a weighted sum
    aesthetic().towards(10)            minus the distance to 10, frame by frame
    reward(lambda frames, prompts: frames.mean(dim=(1, 2, 3, 4)), name="brightness")
"""

import contextlib
import copy
import functools
import hashlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import CodeType

import torch

from ..hub import Source, identity


class JudgeError(RuntimeError):
    """A judge outside of this process gave no scores. An evaluation goes on without it."""


_RECORD: ContextVar[dict[str, list[torch.Tensor]] | None] = ContextVar("parts", default=None)


@contextlib.contextmanager
def record_parts() -> Iterator[dict[str, list[torch.Tensor]]]:
    """Inside, the scores (B, F) or (B, 1) of every part of a mixed reward are noted by its name."""
    record: dict[str, list[torch.Tensor]] = {}
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


class Reward:
    """A score of each clip.

    A subclass gives `scores(frames, prompts)`: (B, F) for a reward on single frames (`per_frame`,
    decoding can then stream), or (B, 1) for one on the whole clip. The reward is the mean over
    dim 1.
    """

    name: str = "reward"
    per_frame: bool = True
    min_frames: int = 1  # of a clip that it can judge
    differentiable: bool = True
    instead: str = ""  # of a reward that is not: what to train on
    range: tuple[float, float] = (-math.inf, math.inf)
    unit: str = ""
    networks: list[torch.nn.Module] = []  # the modules inside
    children: tuple["Reward", ...] = ()  # the rewards that it is computed from

    def scores(self, frames: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        raise NotImplementedError

    def __call__(self, frames: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        frames = validate_frames(frames, prompts)
        before = frames._version
        scores = self.scores(frames, [str(prompt) for prompt in prompts])
        if frames._version != before:  # what is judged next would see other frames
            raise ValueError(
                f"reward {self.name!r} changes its frames in place; write frames = frames * 0.5"
            )
        return scores.mean(dim=1)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies this exact reward, in other processes too: weights, checkpoint, arguments."""
        options = {k: v for k, v in vars(self).items() if isinstance(v, int | float | str)}
        return f"{type(self).__module__}.{type(self).__qualname__}{options or ''}"

    def identified(self, *places: Source | Path, **options) -> "Reward":
        """Sets the fingerprint: where the weights come from, and the options that matter."""
        self.fingerprint = f"{self.name}{[*map(identity, places)]}{options or ''}"
        return self

    def check_prompts(self, prompts: Iterable[str]) -> None:
        """Raises ValueError for a prompt that this reward cannot judge."""
        for child in self.children:
            child.check_prompts(prompts)

    def check_frames(self, count: int) -> None:
        """Raises ValueError if this reward cannot judge clips of so many frames."""
        for child in self.children:
            child.check_frames(count)
        if count < self.min_frames:
            needed = f"{self.name} needs at least {self.min_frames} frames"
            raise ValueError(f"{needed}, got {count}; raise num_frames, or score more of them")

    def check_ready(self) -> None:
        """Raises JudgeError if a judge outside of this process does not answer."""
        for child in self.children:
            child.check_ready()

    def at_fps(self, fps: float) -> None:
        """Sets how fast the clips play, for the rewards that use it."""
        for child in self.children:
            child.at_fps(fps)

    def parts(self) -> list["Reward"]:
        """The rewards that this one is made of, each to be reported by itself."""
        return [part for child in self.children for part in child.parts()] or [self]

    def to(self, *args, **kwargs) -> "Reward":
        """Moves the networks inside, if any, to a device or dtype."""
        for child in self.children:
            child.to(*args, **kwargs)
        return self

    def renamed(self, name: str) -> "Reward":
        """A copy with another name; it shares the networks."""
        twin = copy.copy(self)
        twin.fingerprint, twin.name = self.fingerprint, name
        return twin

    def towards(self, target: float) -> "Reward":
        """Minus the distance to the target: the gradient vanishes there, and reverses beyond it."""
        return Combined(lambda x: -(x - target).abs(), "({} towards {})", self, target)

    def capped(self, limit: float) -> "Reward":
        """At most `limit`, above which there is no gradient. (For ReFL's relu(2 - r): 2.)"""
        result = Combined(lambda x: x.clamp(max=limit), "({} capped at {})", self, limit)
        result.range = (self.range[0], min(self.range[1], limit))
        return result

    def normalized(self, mean: float, std: float) -> "Reward":
        """In standard deviations from the mean, as `statistics` measures them on the base's clips.

        It makes rewards of different units comparable.
        """
        if not std > 0:
            raise ValueError(
                f"the standard deviation must be positive, got {std}; were the clips all alike?"
            )
        template = "({} normalized by {}, {})"
        result = Combined(lambda x: (x - mean) / std, template, self, mean, std)
        result.range = ((self.range[0] - mean) / std, (self.range[1] - mean) / std)
        result.name, result.unit = f"normalized {self.name}", "std"
        return result

    def __add__(self, other: "Reward | Callable | float") -> "Reward":
        if isinstance(other, int | float):
            shift = other
            if not other:  # as sum(…) begins with
                return self
            result = Combined(lambda x: x + shift, "{} + {}", self, shift)
            result.range = (self.range[0] + shift, self.range[1] + shift)
        else:
            other = as_reward(other)
            result = Combined(operator.add, "{} + {}", self, other)
            result.range = (self.range[0] + other.range[0], self.range[1] + other.range[1])
        return result

    __radd__ = __add__

    def __mul__(self, weight: float) -> "Reward":
        if not isinstance(weight, int | float):
            raise TypeError(
                f"a reward is multiplied by a number, not by {_shape(weight)}: 0.5 * {self.name}"
            )
        result = Combined(lambda x: weight * x, "{} × {}", weight, self)
        # 0 times infinity is 0 here, and there is no minus zero.
        low, high = sorted(weight * bound + 0.0 if weight else 0.0 for bound in self.range)
        result.range, result.unit = (low, high), self.unit
        return result

    __rmul__ = __mul__

    def __neg__(self) -> "Reward":
        return self * -1.0

    def __truediv__(self, divisor: float) -> "Reward":
        if not isinstance(divisor, int | float) or not divisor:
            raise TypeError(f"a reward is divided by a number that is not zero, not by {divisor!r}")
        return self * (1 / divisor)

    def __sub__(self, other: "Reward | Callable | float") -> "Reward":
        return self + (-other if isinstance(other, int | float) else -as_reward(other))

    def __rsub__(self, other: float) -> "Reward":
        return -self + other

    def __repr__(self) -> str:
        return self.name


class Combined(Reward):
    """A function of the scores of rewards; frame scores broadcast over clip scores.

    `template` makes the name from the operands: rewards, and numbers that the function holds.
    """

    def __init__(self, function: Callable, template: str, *operands: Reward | float):
        for x in operands:
            if not isinstance(x, Reward) and not hasattr(x, "__float__"):
                shown = template.format(*operands)
                raise TypeError(f"{shown}: {x!r} is neither a reward nor a number")
        self.function = function
        self.children = tuple(x for x in operands if isinstance(x, Reward))
        self.per_frame = all(child.per_frame for child in self.children)
        self.differentiable = all(child.differentiable for child in self.children)
        self.networks = [network for child in self.children for network in child.networks]
        names = (x.name if isinstance(x, Reward) else f"{x:g}" for x in operands)
        exact = (
            f"({x.fingerprint})" if isinstance(x, Reward) else repr(float(x)) for x in operands
        )
        self.name, self.fingerprint = template.format(*names), template.format(*exact)

    def scores(self, frames, prompts):
        scores, record = [child.scores(frames, prompts) for child in self.children], _RECORD.get()
        for child, values in zip(self.children, scores):
            if record is not None and not child.children:
                record.setdefault(child.name, []).append(values.detach())
        return self.function(*scores)


class FunctionReward(Reward):
    """A plain function (frames, prompts) -> (B,), on the whole clip unless `per_frame`.

    It gets copies of the frames, which it may change.
    """

    def __init__(self, function: Callable, name: str | None, per_frame: bool, differentiable: bool):
        self.function, self.name = function, name or getattr(function, "__name__", "function")
        self.per_frame, self.differentiable = per_frame, differentiable
        self.fingerprint = describe(function) + (" per frame" if per_frame else "")

    def scores(self, frames, prompts):
        clips = frames.split(1, dim=1) if self.per_frame else [frames]
        columns = [self.function(clip.clone(), prompts) for clip in clips]
        for value in columns:
            if not isinstance(value, torch.Tensor) or value.ndim != 1:
                raise ValueError(
                    "a reward function must return one score per clip, shape (B,); "
                    f"got {_shape(value)}"
                )
        return torch.stack(columns, dim=1)

    def __call__(self, frames, prompts):
        if self.per_frame:
            return super().__call__(frames, prompts)
        frames = validate_frames(frames, prompts)
        # Of any shape: the caller checks it and names the reward.
        return self.function(frames.clone(), [str(prompt) for prompt in prompts])


def describe(value, within: tuple = ()) -> str:
    """A text that is the same in every process for a function of the same code and constants.

    within: functions that are being described, because one may refer to itself.
    """
    again = functools.partial(describe, within=(*within, value))
    if isinstance(value, CodeType):
        parts = [value.co_code, value.co_names, *map(again, value.co_consts)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
    if isinstance(value, frozenset):
        return repr(sorted(map(again, value)))
    if isinstance(value, functools.partial):
        return f"{again(value.func)} of {value.args!r}, {value.keywords!r}"
    if isinstance(value, Reward):
        return value.fingerprint
    if hasattr(value, "__code__"):
        name = f"{value.__module__}.{value.__qualname__}"
        if any(value is outer for outer in within):
            return name
        code = ", ".join(map(again, [value.__code__, *held_values(value)]))
        return f"{name}#{code}"
    simple = (type(None), bool, int, float, str, bytes, tuple)
    return repr(value) if isinstance(value, simple) else type(value).__qualname__


def held_values(function) -> Iterator:
    """A function's defaults, and the values of the variables around it that have one by now."""
    yield from function.__defaults__ or ()
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # the cell is empty
            yield cell.cell_contents


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """For what would overflow, or be rounded away, in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def validate_frames(frames: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """The frames in float32 at least; ValueError if no reward can judge them and the prompts."""
    if not isinstance(frames, torch.Tensor) or frames.ndim != 5 or frames.shape[2] != 3:
        raise ValueError(f"frames must be a tensor (B, F, 3, H, W), got {_shape(frames)}")
    if not frames.is_floating_point():
        raise ValueError(
            f"frames must be floats in [0, 1], got {frames.dtype}; write frames.float() / 255"
        )
    if not len(prompts) or len(prompts) != len(frames) or isinstance(prompts, str):
        got = f"the string {prompts!r}" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(f"{len(frames)} clips need a list of as many prompts, got {got}")
    low, high = (bound.item() for bound in frames.detach().aminmax())
    # A rounding error may stick out; another convention, or NaN, may not.
    if not (low >= -0.01 and high <= 1.01):
        hint = "; from [-1, 1] write frames / 2 + 0.5" if low < 0 else ""
        raise ValueError(f"frames must lie in [0, 1], got {low:.3g} to {high:.3g}{hint}")
    return at_least_float32(frames)


def _shape(value) -> tuple | str:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def reward(
    function: Callable, name: str | None = None, per_frame=False, differentiable=True
) -> Reward:
    """A reward from a function (frames, prompts) -> (B,).

    Args:
        name: to show; default the function's.
        per_frame: the function scores frames one by one, so that decoding can stream. Otherwise
            it gets the whole clip.
        differentiable: its scores have a gradient in the frames.
    """
    return FunctionReward(function, name, per_frame, differentiable)


def as_reward(value: Reward | Callable) -> Reward:
    """The reward itself, or a reward of a function."""
    if isinstance(value, Reward):
        return value
    if callable(value):
        return reward(value)
    raise TypeError(
        f"a reward is a Reward or a function (frames, prompts) -> (B,), not {type(value).__name__}"
    )


def validate_scores(reward: Reward, frames: torch.Tensor, prompts: list) -> torch.Tensor:
    """The reward's scores (B,) of frames, with a graph; ValueError if it returns something else."""
    value = reward(frames, prompts)
    if not isinstance(value, torch.Tensor) or value.shape != (len(prompts),):
        raise ValueError(
            f"reward {reward.name!r} must return one score per clip, shape ({len(prompts)},); "
            f"it returned {_shape(value)}"
        )
    if not value.requires_grad:
        raise ValueError(
            f"reward {reward.name!r} has no gradient: somewhere it leaves the graph (no_grad, "
            "uint8, PIL, numpy, argmax). vader_nb.check(reward) shows more"
        )
    return value


def pixel_gradient(
    reward: Reward, frames: torch.Tensor, prompts: list, weight: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight * scores (B,), and the gradient of their sum on the frames, in float32 or wider.

    Where networks run in float16 the scores are scaled up, because small gradients would vanish
    there, and down if gradients overflow.

    Raises:
        ValueError: for scores of another shape or without a gradient on the frames.
    """
    scores, gradient, scale = frames, None, 1.0
    for scale in (2.0**12, 1.0, 2.0**-12) if frames.dtype == torch.float16 else (1.0,):
        leaf = at_least_float32(frames.detach()).requires_grad_()
        with torch.enable_grad():
            scores = validate_scores(reward, leaf, prompts) * weight
            (gradient,) = torch.autograd.grad(scores.sum() * scale, leaf, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"reward {reward.name!r} has no gradient: it does not look at the frames"
            )
        if gradient.isfinite().all():
            break
    assert gradient is not None
    return scores.detach(), gradient / scale


@torch.no_grad()
def statistics(
    reward: Reward | Callable, frames: torch.Tensor, prompts: list[str]
) -> tuple[float, float]:
    """Mean and standard deviation of a reward over clips (B >= 2), for `reward.normalized`."""
    scores = as_reward(reward)(frames, prompts)
    if len(scores) < 2:
        raise ValueError("the spread of a reward needs at least 2 clips, got 1")
    return scores.mean().item(), scores.std().item()


def conflict(
    first: Reward | Callable, second: Reward | Callable, frames: torch.Tensor, prompts: list[str]
) -> torch.Tensor:
    """The cosine between two rewards' gradients on the pixels of each clip of (B, F, 3, H, W).

    Returns:
        (B,): 1 where the rewards agree, 0 where neither affects the other, -1 where what one
        gains the other loses.

    Raises:
        ValueError: a reward has no gradient.
    """
    directions = []
    for reward in map(as_reward, (first, second)):
        leaf = at_least_float32(frames.detach()).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(validate_scores(reward, leaf, prompts).sum(), leaf)
        directions.append(gradient.flatten(1).double())  # sums over all pixels of a clip
    return torch.cosine_similarity(*directions, dim=1).to(leaf.dtype)
