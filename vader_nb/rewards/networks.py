"""What every reward with a network inside shares: preprocessing that keeps the gradient, and bounded memory."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .base import Reward

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZES = ("squash", "crop", "pad")
REMEMBERED = 10_000  # prompts whose vectors a reward keeps


def preprocess(
    frames: torch.Tensor,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    resize: str = "squash",
    interpolation: str = "bilinear",
    antialias: bool = True,
    shorter: int | None = None,
) -> torch.Tensor:
    """Frames (N, 3, H, W) in [0, 1] to a network's input (N, 3, size, size), without leaving the graph.

    resize: "squash" both sides to `size` (VADER's way); "crop": the shorter side to `shorter` (default `size`), then
    the center (the way of CLIP and VideoMAE); "pad": the longer side to `size`, centered on black, which is then
    normalized like the picture (HPSv2's way). interpolation: "bilinear" or "bicubic", whose overshoot past 0 and 1 is
    kept, as the processors keep it on float tensors (on 8-bit pictures they cut it off).
    """
    if resize not in RESIZES:
        raise ValueError(f"unknown resize {resize!r}; choose one of {', '.join(RESIZES)}")
    height, width = frames.shape[-2:]
    if resize == "squash":
        target = (size, size)
    else:  # as the reference processors round: the shorter side exact, the longer cut off; padding rounds
        edge = (shorter or size) if resize == "crop" else size
        ratio = edge / (min if resize == "crop" else max)(height, width)
        cut = int if resize == "crop" else round
        target = tuple(max(1, cut(side * ratio + 1e-6)) for side in (height, width))
    if target != (height, width):
        frames = F.interpolate(
            frames, size=target, mode=interpolation, antialias=antialias, align_corners=False
        )
    if resize == "crop":
        # An odd margin as transformers cuts it; torchvision rounds, and may be a pixel further.
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        frames = frames[..., top : top + size, left : left + size]
    if resize == "pad":
        down, right = size - target[0], size - target[1]
        frames = F.pad(frames, (right // 2, right - right // 2, down // 2, down - down // 2))
    return (frames - frames.new_tensor(mean)[:, None, None]) / frames.new_tensor(std)[:, None, None]


def remembered(
    known: dict[str, torch.Tensor], prompts: list[str], compute: Callable
) -> torch.Tensor:
    """Vectors (B, …) of prompts, each computed once, without a graph, by compute(list of prompts) and kept in `known`."""
    new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    if len(known) + len(new) > REMEMBERED:
        known.clear()
        new = list(dict.fromkeys(prompts))
    if new:
        with torch.no_grad():
            known.update(zip(new, compute(new)))
    return torch.stack([known[prompt] for prompt in prompts])


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Keep only the input of each block for the backward pass, and compute the rest again there. (The libraries' own
    switches work in training mode alone; rewards stay in eval mode.)"""
    for block in blocks:
        block.forward = _checkpointed(block.forward)


def _checkpointed(function: Callable) -> Callable:
    def run(*args, **kwargs):
        if torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, **kwargs)
        return function(*args, **kwargs)

    return run


def by_groups(
    function: Callable, frames: torch.Tensor, at_once: int, *along: torch.Tensor
) -> torch.Tensor:
    """function((N, 3, H, W), …) -> (N, …) on all pictures of frames (B, F, 3, H, W), `at_once` at a time; returns
    (B, F, …). `along`: tensors (B, …) that belong to the clips and go with their pictures. The graph of each group is
    forgotten, and made again in the backward pass."""
    count = frames.shape[1]
    pictures = [frames.flatten(0, 1), *(tensor.repeat_interleave(count, dim=0) for tensor in along)]
    groups = list(zip(*(tensor.split(at_once) for tensor in pictures)))
    if len(groups) > 1:
        function = _checkpointed(function)
    return torch.cat([function(*group) for group in groups]).unflatten(0, frames.shape[:2])


class Frozen:
    """Networks in eval mode, without gradients of their own; `blocks`, the repeated layers inside, are checkpointed.
    Weights may be float32, float16, bfloat16 (or float64, for tests): `.to(dtype)`."""

    frames_at_once = 4  # pictures that are in memory with their graph at a time

    def __init__(self, networks: list[nn.Module], blocks: Iterable[nn.Module] = ()):
        self.networks = [network.eval().requires_grad_(False) for network in networks]
        checkpoint_blocks(blocks)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.networks[0].parameters()).dtype

    def picture_scores(
        self, function: Callable, frames: torch.Tensor, *along: torch.Tensor
    ) -> torch.Tensor:
        return by_groups(function, frames, self.frames_at_once, *along)

    def to(self, *args, **kwargs):
        for network in self.networks:
            network.to(*args, **kwargs)
        return self


class Network(Frozen, Reward):
    """A reward that looks through frozen networks of its own."""
