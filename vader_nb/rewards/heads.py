"""Small heads on CLIP's picture vector: LAION's aesthetic predictor, VADER's other heads."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import hub
from ..hub import StrPath
from .base import Reward
from .clip import CLIP, TINY, CLIPReward, hps, open_clip_directory, vision_tower
from .gallery import SOURCES, find

# Layer sizes of the published heads, all on the 768 numbers of CLIP ViT-L/14.
LAION_SIZES, COMPRESSION_SIZES = (768, 1024, 128, 64, 16, 1), (768, 512, 128, 32, 1)
RATING = {"range": (1.0, 10.0), "unit": "rating"}
WEATHER = {"range": (0.0, 1.0), "final_activation": torch.sigmoid}


class HeadReward(CLIPReward):
    """What a small head reads from a frame's unit vector.

    Args:
        layers: tensors `layers.N.weight` and `layers.N.bias`, to be applied in the order of N.
        hidden_activation, final_activation: between the layers, and after the last one.
    """

    def __init__(
        self,
        clip: CLIP,
        layers: dict[str, torch.Tensor],
        name: str,
        range: tuple[float, float],
        *,
        unit: str = "",
        hidden_activation: Callable | None = None,
        final_activation: Callable | None = None,
    ):
        super().__init__(clip, name)
        self.range, self.unit = range, unit
        self.hidden_activation, self.final_activation = hidden_activation, final_activation
        numbers = sorted({int(key.split(".")[1]) for key in layers})
        self.layers = [
            (layers[f"layers.{n}.weight"].float(), layers[f"layers.{n}.bias"].float())
            for n in numbers
        ]

    def scores(self, frames, prompts):
        value = self.clip.image(frames)
        for number, (weight, bias) in enumerate(self.layers):
            if number and self.hidden_activation:
                value = self.hidden_activation(value)
            value = F.linear(value, weight.to(value), bias.to(value))
        value = value.squeeze(-1)
        return self.final_activation(value) if self.final_activation else value


def empty_layers(sizes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    layers = {}
    for n, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers[f"layers.{n}.weight"] = torch.zeros(outputs, inputs)
        layers[f"layers.{n}.bias"] = torch.zeros(outputs)
    return layers


def read_layers(file: hub.Source | Path, sizes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The tensors of a head; ValueError unless its layers have these sizes."""
    path = hub.single_file(file)
    head = hub.state_dict(path)
    found = [tuple(value.shape) for key, value in head.items() if key.endswith("weight")]
    expected = [(outputs, inputs) for inputs, outputs in pairwise(sizes)]
    if found != expected or not all(key.startswith("layers.") for key in head):
        raise ValueError(
            f"{path} is not this head: its weights are {found}, not {expected} at layers.N.weight"
        )
    return head


def large_clip_head(
    name: str,
    sizes: tuple[int, ...],
    file: hub.Source | Path,
    checkpoint: StrPath,
    dtype: torch.dtype,
    from_config: bool,
    resize: str = "squash",
    **description,
) -> Reward:
    """A head on the published CLIP, or on a copy of it."""
    layers = empty_layers(sizes) if from_config else read_layers(file, sizes)
    place = find(checkpoint, "clip-vit-large-patch14")
    clip = vision_tower(place, dtype, from_config, resize=resize)
    return HeadReward(clip, layers, name, **description).identified(place, file, resize=resize)


def aesthetic(
    checkpoint: StrPath = "published",
    head: StrPath | None = None,
    *,
    resize="squash",
    dtype=torch.float32,
    from_config=False,
) -> Reward:
    """The LAION aesthetic predictor v2 (sac+logos+ava1): a rating of each frame, 1 to 10.

    Usual ratings are 4 to 7. Prompts are ignored.

    Args:
        checkpoint: "published" (openai/clip-vit-large-patch14), or a local copy of that directory;
            "tiny", the embedded one, which rates what can be seen: 40% saturation of the object,
            40% its contrast with the background, 20% how central it is
            (`vader_nb.zoo.scripts.train_clip.beauty`); or an open_clip directory that holds an
            `aesthetic_head.safetensors`.
        head: a local copy of sac+logos+ava1-l14-linearMSE.pth, for CLIP ViT-L/14.
        resize: "squash" as VADER, "crop" as the authors.
    """
    folder = TINY if checkpoint == "tiny" else Path(checkpoint)
    file = folder / "aesthetic_head.safetensors"
    if not file.is_file():
        file, options = Path(head) if head else SOURCES["laion-v2"], (dtype, from_config, resize)
        return large_clip_head("aesthetic", LAION_SIZES, file, checkpoint, *options, **RATING)
    if head is not None:
        raise ValueError(f"head={str(head)!r} is not used: {folder} holds a head of its own")
    clip = open_clip_directory(folder, dtype, from_config, resize=resize)
    width = clip.network.visual.output_dim
    layers = empty_layers((width, 1)) if from_config else hub.state_dict(file)
    return HeadReward(clip, layers, "aesthetic", **RATING).identified(folder, resize=resize)


def aesthetic_hps(
    checkpoint: StrPath = "published", *, resize="squash", dtype=torch.float32, from_config=False
) -> Reward:
    """VADER's mix, as it trains on it: minus (0.15 |aesthetic - 10| + |1 - hps|) / 2.

    (The figure that VADER logs is (aesthetic + 15 hps) / 2, with other weights than its loss;
    `parts()` gives both terms.)

    Args:
        checkpoint: "published" (HPS v2.1) or "tiny". For files of your own, write the sum:
            0.075 * aesthetic(...).towards(10) + 0.5 * hps(...).towards(1).
    """
    options = {"resize": resize, "dtype": dtype, "from_config": from_config}
    beauty = aesthetic(checkpoint, **options).towards(10)
    return 0.075 * beauty + 0.5 * hps(checkpoint, **options).towards(1)


def compression(
    head: StrPath, checkpoint: StrPath = "published", *, dtype=torch.float32, from_config=False
) -> Reward:
    """VADER's compression reward: minus the size in kB that a head predicts for each frame.

    The size is that as JPEG of quality 95. `compressibility` needs no weights.

    Args:
        head: compression_reward.pt, your own copy: its license does not let us ship it. (VADER's
            own class does not fit this file; the layers 768, 512, 128, 32, 1 with ReLU do.)
        checkpoint: as in `aesthetic`.
    """
    options = (Path(head), checkpoint, dtype, from_config)
    size = {"range": (0.0, math.inf), "unit": "kB", "hidden_activation": F.relu}
    kilobytes = large_clip_head("JPEG size", COMPRESSION_SIZES, *options, **size)
    return (-kilobytes).renamed("compression")


def rainy(
    head: StrPath, checkpoint: StrPath = "published", *, dtype=torch.float32, from_config=False
) -> Reward:
    """How much it rains in each frame, 0 to 1.

    Args:
        head: rainy_reward.pt of VADER, your own copy (it has no license).
        checkpoint: as in `aesthetic`.
    """
    options = (Path(head), checkpoint, dtype, from_config)
    return large_clip_head("rainy", LAION_SIZES, *options, **WEATHER)


def snowy(
    head: StrPath, checkpoint: StrPath = "published", *, dtype=torch.float32, from_config=False
) -> Reward:
    """How much it snows in each frame, 0 to 1, by snowy_reward.pt; otherwise as `rainy`."""
    options = (Path(head), checkpoint, dtype, from_config)
    return large_clip_head("snowy", LAION_SIZES, *options, **WEATHER)
