"""Small heads on CLIP's picture vector: LAION's aesthetic predictor, VADER's other heads."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import hub
from .base import Reward
from .clip import CLIP, TINY, CLIPReward, hps, open_clip_directory, vision_tower
from .gallery import SOURCES

# Layer sizes of the published heads, all on the 768 numbers of CLIP ViT-L/14.
LAION_SIZES, COMPRESSION_SIZES = (768, 1024, 128, 64, 16, 1), (768, 512, 128, 32, 1)


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


def read_layers(
    file: hub.Source | str | Path, sizes: tuple[int, ...], from_config: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of a head with layers of these sizes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another layout.
    """
    if from_config:
        return empty_layers(sizes)
    if not isinstance(file, hub.Source) and not Path(file).is_file():
        layers = " -> ".join(map(str, sizes))
        raise FileNotFoundError(f"{file} is not a file: it should be a head with layers {layers}")
    path = hub.single_file(file if isinstance(file, hub.Source) else Path(file))
    head = hub.state_dict(path)
    found = [tuple(value.shape) for key, value in head.items() if key.endswith("weight")]
    expected = [(outputs, inputs) for inputs, outputs in pairwise(sizes)]
    if found != expected or not all(key.startswith("layers.") for key in head):
        raise ValueError(
            f"{path} is not this head: its weights are {found}, not {expected} at layers.N.weight"
        )
    return head


def large_clip(checkpoint: str | Path) -> hub.Source | Path:
    return hub.find(checkpoint, {"published": SOURCES["clip-vit-large-patch14"]})


def aesthetic(
    checkpoint: str | Path = "published",
    head: str | Path | None = None,
    *,
    resize="squash",
    dtype=torch.float32,
    from_config=False,
) -> Reward:
    """The LAION aesthetic predictor v2 (sac+logos+ava1): a rating of each frame, 1 to 10.

    Usual ratings are 4 to 7. Prompts are ignored.

    Args:
        checkpoint: "published" (openai/clip-vit-large-patch14), or a local copy of that directory;
            "tiny", the embedded one, which rates what can be seen: 40 % saturation of the object,
            40 % its contrast with the background, 20 % how central it is
            (`vader_nb.zoo.train_clip.beauty`); or an open_clip directory that holds an
            `aesthetic_head.safetensors`.
        head: a local copy of sac+logos+ava1-l14-linearMSE.pth.
        resize: "squash" as VADER, "crop" as the authors.
    """
    folder = TINY if checkpoint == "tiny" else Path(checkpoint)
    place, file = folder, folder / "aesthetic_head.safetensors"
    if file.is_file():
        clip = open_clip_directory(folder, dtype, from_config, resize=resize)
        width = clip.network.visual.output_dim
        layers = empty_layers((width, 1)) if from_config else hub.state_dict(file)
    else:
        file = Path(head) if head else SOURCES["laion-v2"]
        layers = read_layers(file, LAION_SIZES, from_config)
        place = large_clip(checkpoint)
        clip = vision_tower(place, dtype, from_config, resize=resize)
    reward = HeadReward(clip, layers, "aesthetic", (1.0, 10.0), unit="rating")
    return reward.identified(place, file, resize=resize)


def aesthetic_hps(
    checkpoint: str | Path = "published", *, resize="squash", dtype=torch.float32, from_config=False
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
    head: str | Path,
    checkpoint: str | Path = "published",
    *,
    dtype=torch.float32,
    from_config=False,
) -> Reward:
    """VADER's compression reward: minus the size in kB that a head predicts for each frame.

    The size is that as JPEG of quality 95. `compressibility` needs no weights.

    Args:
        head: compression_reward.pt, your own copy: its license does not let us ship it. (VADER's
            own class does not fit this file; the layers 768, 512, 128, 32, 1 with ReLU do.)
        checkpoint: as in `aesthetic`.
    """
    layers, place = read_layers(head, COMPRESSION_SIZES, from_config), large_clip(checkpoint)
    clip, limits = vision_tower(place, dtype, from_config), (0.0, float("inf"))
    size = HeadReward(clip, layers, "JPEG size", limits, unit="kB", hidden_activation=F.relu)
    return (-size.identified(place, Path(head))).renamed("compression")


def _weather(name, head, checkpoint, dtype, from_config) -> Reward:
    layers, place = read_layers(head, LAION_SIZES, from_config), large_clip(checkpoint)
    clip = vision_tower(place, dtype, from_config)
    reward = HeadReward(clip, layers, name, (0.0, 1.0), final_activation=torch.sigmoid)
    return reward.identified(place, Path(head))


def rainy(
    head: str | Path,
    checkpoint: str | Path = "published",
    *,
    dtype=torch.float32,
    from_config=False,
) -> Reward:
    """How much it rains in each frame, 0 to 1.

    Args:
        head: rainy_reward.pt of VADER, your own copy (it has no license).
        checkpoint: as in `aesthetic`.
    """
    return _weather("rainy", head, checkpoint, dtype, from_config)


def snowy(
    head: str | Path,
    checkpoint: str | Path = "published",
    *,
    dtype=torch.float32,
    from_config=False,
) -> Reward:
    """How much it snows in each frame, 0 to 1.

    Args:
        head: snowy_reward.pt of VADER, your own copy (it has no license).
        checkpoint: as in `aesthetic`.
    """
    return _weather("snowy", head, checkpoint, dtype, from_config)
