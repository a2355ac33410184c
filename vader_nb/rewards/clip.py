"""CLIP-style image rewards through open_clip: HPS (arXiv 2306.09341) and the LAION aesthetic predictor."""

import contextlib
import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from .base import Reward

TINY = Path(__file__).parent.parent / "zoo" / "weights" / "tiny-clip"


def preprocess(frames: torch.Tensor, size: int, mean: tuple, std: tuple) -> torch.Tensor:
    """Frames (N, 3, H, W) in [0, 1] to a network's input (N, 3, size, size), differentiable everywhere.
    The picture is squashed to a square, as VADER does, by antialiased bilinear interpolation."""
    if frames.shape[-2:] != (size, size):
        frames = F.interpolate(frames, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return (frames - frames.new_tensor(mean)[:, None, None]) / frames.new_tensor(std)[:, None, None]


class CLIP:
    """An open_clip model of a local directory (`open_clip_config.json`, weights, tokenizer), frozen."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not (folder / "open_clip_config.json").is_file():
            raise FileNotFoundError(f"{folder} is not an open_clip directory: it has no open_clip_config.json")
        with _quiet():
            self.model = open_clip.create_model(f"local-dir:{folder}", device="cpu").float()
            self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        self.model.eval().requires_grad_(False)
        preprocessing = json.loads((folder / "open_clip_config.json").read_text()).get("preprocess_cfg", {})
        self.mean = tuple(preprocessing.get("mean", open_clip.OPENAI_DATASET_MEAN))
        self.std = tuple(preprocessing.get("std", open_clip.OPENAI_DATASET_STD))
        size = self.model.visual.image_size
        self.size = size if isinstance(size, int) else size[0]
        self.texts: dict[str, torch.Tensor] = {}

    def image(self, frames: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B*F, D) of frames (B, F, 3, H, W), in the frames' precision or float32."""
        weight = self.model.logit_scale
        pixels = preprocess(frames.flatten(0, 1), self.size, self.mean, self.std).to(weight.dtype)
        features = self.model.encode_image(pixels)
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)

    def text(self, prompts: list[str]) -> torch.Tensor:
        """Unit vectors (B, D) of prompts, computed once each."""
        weight = self.model.logit_scale
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.texts]
        if new:
            with torch.no_grad():
                features = self.model.encode_text(self.tokenizer(new).to(weight.device))
            self.texts |= zip(new, F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1))
        return torch.stack([self.texts[prompt] for prompt in prompts])

    def to(self, *args, **kwargs) -> None:
        self.model.to(*args, **kwargs)
        self.texts.clear()


@contextlib.contextmanager
def _quiet():
    """open_clip announces through the root logger that a directory has no preset of its own."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class HPS(Reward):
    """Human preference score: the cosine between a frame and its prompt, not multiplied by CLIP's
    temperature, as VADER and HPSv2 report it."""

    name, range, unit = "hps", (-1.0, 1.0), "cosine"

    def __init__(self, clip: CLIP):
        self.clip = clip

    def scores(self, frames, prompts):
        image = self.clip.image(frames).unflatten(0, frames.shape[:2])  # (B, F, D)
        return (image * self.clip.text(prompts).unsqueeze(1)).sum(-1)

    def to(self, *args, **kwargs):
        self.clip.to(*args, **kwargs)
        return self


class Aesthetic(Reward):
    """A rating of each frame, 1 to 10, read off the unit image embedding by a stack of linear layers in the
    LAION predictor's key layout (`layers.N.weight`, `layers.N.bias`; it has no activations between them)."""

    name, range, unit = "aesthetic", (1.0, 10.0), "rating"

    def __init__(self, clip: CLIP, head: dict[str, torch.Tensor]):
        self.clip = clip
        numbers = sorted({int(key.split(".")[1]) for key in head})
        layers = [nn.Linear(*reversed(head[f"layers.{n}.weight"].shape)) for n in numbers]
        for layer, n in zip(layers, numbers):
            layer.load_state_dict({"weight": head[f"layers.{n}.weight"], "bias": head[f"layers.{n}.bias"]})
        self.head = nn.Sequential(*layers).requires_grad_(False)

    def scores(self, frames, prompts):
        features = self.clip.image(frames).to(self.head[0].weight.dtype)
        return self.head(features).squeeze(-1).unflatten(0, frames.shape[:2])

    def to(self, *args, **kwargs):
        self.clip.to(*args, **kwargs)
        self.head.to(*args, **kwargs)
        return self


def hps(checkpoint: str | Path = "tiny") -> Reward:
    """HPS-style preference for (frame, prompt). checkpoint: "tiny", or an open_clip directory."""
    return HPS(CLIP(TINY if checkpoint == "tiny" else checkpoint))


def aesthetic(checkpoint: str | Path = "tiny") -> Reward:
    """Aesthetic rating of frames, prompts ignored. checkpoint: "tiny", or an open_clip directory that
    holds an `aesthetic_head.safetensors`.

    The tiny one rates what can be seen: 40 % saturation of the object, 40 % contrast against its ground,
    20 % centring (`vader_nb.zoo.train_clip.beauty`)."""
    folder = TINY if checkpoint == "tiny" else Path(checkpoint)
    if not (folder / "aesthetic_head.safetensors").is_file():
        raise FileNotFoundError(f"{folder} holds no aesthetic_head.safetensors")
    return Aesthetic(CLIP(folder), load_file(folder / "aesthetic_head.safetensors"))
