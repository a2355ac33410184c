"""What rewards with networks share: preprocessing that keeps the gradient, and bounded memory."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .base import Reward

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZES = ("squash", "crop", "pad")
CACHED_PROMPTS = 10_000  # of which a reward keeps the embeddings


def normalize(
    frames: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    center, scale = (frames.new_tensor(values)[:, None, None] for values in (mean, std))
    return (frames - center) / scale


def preprocess(
    frames: torch.Tensor,
    size: int,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    *,
    resize: str = "squash",
    interpolation: str = "bilinear",
    antialias: bool = True,
    shorter: int | None = None,
) -> torch.Tensor:
    """A network's input (…, 3, size, size) from frames (…, 3, H, W) in [0, 1], within the graph.

    Args:
        resize: "squash" both sides to `size` (as VADER); "crop": the shorter side to `shorter`
            (default `size`), then the center (as CLIP and VideoMAE); "pad": the longer side to
            `size`, centered on black, which is then normalized like the picture (as HPSv2).
        interpolation: "bilinear" or "bicubic", whose overshoot past 0 and 1 is kept, as the
            processors keep it on float tensors (on 8-bit pictures they clip it).
    """
    if resize not in RESIZES:
        raise ValueError(f"unknown resize {resize!r}; choose one of {', '.join(RESIZES)}")
    *outer, _, height, width = frames.shape
    target = (size, size)
    # As the reference processors round: a crop's longer side down, a padded one to the nearest.
    if resize == "crop":
        ratio = (shorter or size) / min(height, width)
        target = tuple(int(side * ratio + 1e-6) for side in (height, width))
    elif resize == "pad":
        ratio = size / max(height, width)
        target = tuple(max(1, round(side * ratio + 1e-6)) for side in (height, width))
    frames = frames.reshape(-1, 3, height, width)
    if target != (height, width):
        frames = F.interpolate(frames, target, mode=interpolation, antialias=antialias)
    if resize == "crop":
        # An odd margin as transformers cuts it; torchvision rounds, and may be a pixel further.
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        frames = frames[..., top : top + size, left : left + size]
    if resize == "pad":
        down, right = size - target[0], size - target[1]
        frames = F.pad(frames, (right // 2, right - right // 2, down // 2, down - down // 2))
    return normalize(frames, mean, std).reshape(*outer, 3, size, size)


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Keeps only each block's input for the backward pass, and computes the rest again there.

    (The libraries' own switches work in training mode alone; rewards stay in eval mode.)
    """
    for block in blocks:
        block.forward = checkpointed(block.forward)


def checkpointed(function: Callable) -> Callable:
    def run(*args, **kwargs):
        if torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, **kwargs)
        return function(*args, **kwargs)

    return run


class FrozenNetworks:
    """Networks in eval mode, without gradients of their own, with `blocks` checkpointed.

    Weights may be float32, float16, bfloat16 (or float64, for tests): `.to(dtype)`.
    """

    frames_at_once = 4  # pictures that are in memory with their graph at a time

    def __init__(self, networks: list[nn.Module], blocks: Iterable[nn.Module] = ()):
        self.networks = [network.eval().requires_grad_(False) for network in networks]
        self.text_cache: dict[str, torch.Tensor] = {}
        checkpoint_blocks(blocks)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.networks[0].parameters()).dtype

    def per_picture(
        self, function: Callable, frames: torch.Tensor, *per_clip: torch.Tensor
    ) -> torch.Tensor:
        """function((N, 3, H, W), …) -> (N, …) on all pictures of (B, F, 3, H, W): (B, F, …).

        In groups: each one's graph is dropped, and made again in the backward pass. Tensors
        `per_clip` (B, …) are repeated for the frames of each clip.
        """
        count = frames.shape[1]
        inputs = [frames.flatten(0, 1), *(x.repeat_interleave(count, dim=0) for x in per_clip)]
        groups = list(zip(*(tensor.split(self.frames_at_once) for tensor in inputs)))
        if len(groups) > 1:
            function = checkpointed(function)
        return torch.cat([function(*group) for group in groups]).unflatten(0, frames.shape[:2])

    def cached_text(self, prompts: list[str], compute: Callable) -> torch.Tensor:
        """Embeddings (B, …) of prompts, each computed once, without a graph, by `compute`."""
        known = self.text_cache
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if len(known) + len(new) > CACHED_PROMPTS:
            known.clear()
            new = list(dict.fromkeys(prompts))
        if new:
            with torch.no_grad():
                known.update(zip(new, compute(new)))
        return torch.stack([known[prompt] for prompt in prompts])

    def to(self, *args, **kwargs):
        self.text_cache.clear()
        for network in self.networks:
            network.to(*args, **kwargs)
        return self


class NetworkReward(FrozenNetworks, Reward):
    """A reward with frozen networks of its own."""


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The dtype in which networks are made inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
