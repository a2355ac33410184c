"""Small heads on CLIP's picture vector: LAION's aesthetic predictor, VADER's compression and weather rewards."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import hub
from .base import Reward
from .clip import CLIP, TINY, hps, open_clip_directory, picture_tower
from .gallery import CARDS, SOURCES


class Rated(Reward):
    """What a small head reads off a frame's unit vector. Its layers come from a file with the keys
    `layers.N.weight` and `layers.N.bias`, in the order of N; `between` and `after` are its activations."""

    def __init__(
        self,
        clip: CLIP,
        head: dict[str, torch.Tensor],
        name: str,
        range: tuple[float, float],
        *,
        unit: str = "",
        between: Callable | None = None,
        after: Callable | None = None,
    ):
        self.clip, self.name, self.range, self.unit, self.networks = (
            clip,
            name,
            range,
            unit,
            clip.networks,
        )
        self.typical = CARDS[name].typical if name in CARDS else None
        self.between, self.after = between, after
        numbers = sorted({int(key.split(".")[1]) for key in head})
        self.layers = [
            (head[f"layers.{n}.weight"].float(), head[f"layers.{n}.bias"].float()) for n in numbers
        ]

    def scores(self, frames, prompts):
        value = self.clip.image(frames)
        for number, (weight, bias) in enumerate(self.layers):
            if number and self.between:
                value = self.between(value)
            value = F.linear(value, weight.to(value), bias.to(value))
        value = value.squeeze(-1)
        return self.after(value) if self.after else value

    def to(self, *args, **kwargs):
        self.clip.to(*args, **kwargs)
        return self


def head_layers(path: str | Path, sizes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The tensors of a head whose layers have these sizes. Raises ValueError for a file of another layout."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is not a file: a head with layers {' -> '.join(map(str, sizes))} is wanted"
        )
    head = hub.state_dict(path)
    shapes = [tuple(value.shape) for key, value in head.items() if key.endswith("weight")]
    wanted = [(outside, inside) for inside, outside in pairwise(sizes)]
    if shapes != wanted or not all(key.startswith("layers.") for key in head):
        raise ValueError(
            f"{path} is not this head: its weights are {shapes}, wanted are {wanted} under layers.N.weight"
        )
    return head


# Layer sizes of the published heads, all on CLIP ViT-L/14's 768 numbers (models in LAION's, RewardMultiverse's files).
LAION_SIZES, COMPRESSION_SIZES = (768, 1024, 128, 64, 16, 1), (768, 512, 128, 32, 1)


def large(checkpoint: str | Path, dtype: torch.dtype, resize: str) -> CLIP:
    return picture_tower("clip-vit-large-patch14", hub.local(checkpoint), dtype, resize=resize)


def aesthetic(
    checkpoint: str | Path = "published",
    head: str | Path | None = None,
    *,
    resize: str = "squash",
    dtype: torch.dtype = torch.float32,
) -> Reward:
    """The LAION aesthetic predictor v2 (sac+logos+ava1): a rating of each frame, 1 to 10, usually 4 to 7; prompts are
    ignored.

    checkpoint: "published" (openai/clip-vit-large-patch14), a local copy of that directory, or "tiny", the embedded one,
    which rates what can be seen: 40 % saturation of the object, 40 % contrast against its ground, 20 % centring
    (`vader_nb.zoo.train_clip.beauty`); or an open_clip directory that holds an `aesthetic_head.safetensors`.
    head: a local copy of sac+logos+ava1-l14-linearMSE.pth. resize: "squash" as VADER, "crop" as the authors.
    """
    folder = TINY if checkpoint == "tiny" else Path(checkpoint)
    if (folder / "aesthetic_head.safetensors").is_file():
        clip = open_clip_directory(folder, dtype, resize=resize)
        layers = hub.state_dict(folder / "aesthetic_head.safetensors")
    else:
        otherwise = (
            "vader_nb.rewards.aesthetic(head='/path/to/sac+logos+ava1-l14-linearMSE.pth')"
            + hub.EMBEDDED.format("aesthetic")
        )
        layers = head_layers(
            head or hub.single_file(SOURCES["laion-v2"], otherwise=otherwise), LAION_SIZES
        )
        clip = large(checkpoint, dtype, resize)
    return Rated(clip, layers, "aesthetic", (1.0, 10.0), unit="rating")


def aesthetic_hps(
    checkpoint: str | Path = "published",
    *,
    resize: str = "squash",
    dtype: torch.dtype = torch.float32,
) -> Reward:
    """VADER's mix, as it trains on it: minus (0.15 |aesthetic - 10| + |1 - hps|) / 2. (The figure that VADER logs is
    (aesthetic + 15 hps) / 2, other weights than its loss has; `parts()` gives both terms.)

    checkpoint: "published" (HPS v2.1) or "tiny"; of files of your own, write the sum yourself:
    0.075 * aesthetic(...).towards(10) + 0.5 * hps(...).towards(1)."""
    beauty = aesthetic(checkpoint, resize=resize, dtype=dtype).towards(10)
    return 0.075 * beauty + 0.5 * hps(checkpoint, resize=resize, dtype=dtype).towards(1)


def compression(
    head: str | Path, checkpoint: str | Path = "published", *, dtype: torch.dtype = torch.float32
) -> Reward:
    """VADER's compression reward: minus the size in kB that a head predicts for a frame saved as JPEG at quality 95.

    head: compression_reward.pt, your own copy: the file has no license that would let us ship it. (VADER's own class
    does not fit this file; the layers 768, 512, 128, 32, 1 with ReLU do.) `compressibility` needs no weights."""
    layers = head_layers(head, COMPRESSION_SIZES)
    clip = large(checkpoint, dtype, "squash")
    size = Rated(clip, layers, "JPEG size", (0.0, float("inf")), unit="kB", between=F.relu)
    return (-size).named("compression")


def rainy(
    head: str | Path, checkpoint: str | Path = "published", *, dtype: torch.dtype = torch.float32
) -> Reward:
    """How much it rains in each frame, 0 to 1. head: rainy_reward.pt of VADER, your own copy (it has no license)."""
    layers = head_layers(head, LAION_SIZES)
    return Rated(
        large(checkpoint, dtype, "squash"), layers, "rainy", (0.0, 1.0), after=torch.sigmoid
    )


def snowy(
    head: str | Path, checkpoint: str | Path = "published", *, dtype: torch.dtype = torch.float32
) -> Reward:
    """How much it snows in each frame, 0 to 1. head: snowy_reward.pt of VADER, your own copy (it has no license)."""
    layers = head_layers(head, LAION_SIZES)
    return Rated(
        large(checkpoint, dtype, "squash"), layers, "snowy", (0.0, 1.0), after=torch.sigmoid
    )
