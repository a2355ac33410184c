"""CLIP, and rewards that compare a frame with its prompt: HPS, PickScore, CLIP score."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPVisionModelWithProjection

from .. import hub
from ..hub import StrPath
from .base import Reward, at_least_float32
from .gallery import SOURCES, find
from .networks import CLIP_MEAN, CLIP_STD, FrozenNetworks, preprocess

TINY = Path(__file__).parent.parent / "zoo" / "weights" / "tiny-clip"
HPS_VERSIONS = {"v2.0": SOURCES["hps-v2.0"], "v2.1": SOURCES["hps-v2.1"]}


class CLIP(FrozenNetworks):
    """Two frozen towers, for pictures and for sentences, with unit vectors that can be compared.

    Args:
        encode_image: (N, 3, size, size) -> (N, D).
        encode_text: list of B strings -> (B, D), or None.
        blocks: layers to checkpoint.
        resize: how a picture becomes a square, see `preprocess`. Where it is not squashed it is
            resized bicubically, as the towers' authors do.
    """

    def __init__(
        self,
        network: Any,
        encode_image: Callable,
        encode_text: Callable | None,
        size: int,
        blocks=(),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        resize: str = "squash",
    ):
        super().__init__([network], blocks)
        self.network, self.encode_image = network, encode_image
        self.encode_text: Any = encode_text
        interpolation = "bilinear" if resize == "squash" else "bicubic"
        self.preprocessing = {"size": size, "mean": mean, "std": std, "resize": resize}
        self.preprocessing["interpolation"] = interpolation
        preprocess(torch.zeros(1, 3, 8, 8), **self.preprocessing)  # raises for an unknown resize
        # exp() would turn the rounding of half precision into an error of a percent in every score.
        if encode_text:
            self.logit_scale = at_least_float32(network.logit_scale.detach().clone())

    def image(self, frames: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, F, D) of frames (B, F, 3, H, W), in float32 at least."""

        def encode(pictures):
            pixels = preprocess(pictures, **self.preprocessing).to(self.dtype)
            return unit_vectors(self.encode_image(pixels))

        return self.per_picture(encode, frames)

    def text(self, prompts: list[str]) -> torch.Tensor:
        """Unit vectors (B, D) of prompts."""
        return self.cached_text(prompts, lambda new: unit_vectors(self.encode_text(new)))

    def temperature(self) -> torch.Tensor:
        return self.logit_scale.exp()


def unit_vectors(vectors: torch.Tensor) -> torch.Tensor:
    return F.normalize(at_least_float32(vectors), dim=-1)


def open_clip_towers(model: Any, tokenizer: Callable, **options) -> CLIP:
    """The towers of an open_clip model."""
    size = model.visual.image_size
    return CLIP(
        model,
        model.encode_image,
        lambda prompts: model.encode_text(tokenizer(prompts).to(model.logit_scale.device)),
        size if isinstance(size, int) else size[0],
        model.visual.transformer.resblocks,
        **options,
    )


def open_clip_directory(
    folder: StrPath, dtype: torch.dtype, from_config: bool = False, **options
) -> CLIP:
    """The towers of a directory with `open_clip_config.json`, weights, and a tokenizer."""
    file = Path(folder) / "open_clip_config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is not an open_clip directory: it has no open_clip_config.json"
        )
    config = json.loads(file.read_text())
    statistics = config.get("preprocess_cfg", {})
    options |= {key: tuple(statistics[key]) for key in ("mean", "std") if key in statistics}
    # open_clip announces through the root logger that a directory has no preset of its own.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        if from_config:
            model = open_clip_model(config["model_cfg"])
        else:
            model = open_clip.create_model(f"local-dir:{folder}", device="cpu").to(dtype)
        return open_clip_towers(model, open_clip.get_tokenizer(f"local-dir:{folder}"), **options)
    finally:
        logging.disable(before)


def open_clip_model(config: Any) -> open_clip.CLIP:
    """A model of random weights."""
    return open_clip.CLIP(**{key: x for key, x in config.items() if key != "custom_text"})


def clip_towers(
    place: hub.Source | Path, dtype: torch.dtype, from_config: bool = False, **options
) -> CLIP:
    """The towers of a `CLIPModel` with its tokenizer."""
    model = hub.network(CLIPModel, place, from_config=from_config)
    tokenizer = hub.tokenizer(place, from_config)
    cut = {"truncation": True, "max_length": model.config.text_config.max_position_embeddings}

    def encode_image(pixels):
        return model.get_image_features(pixel_values=pixels).pooler_output

    def encode_text(prompts):
        tokens = tokenizer(prompts, padding="max_length", return_tensors="pt", **cut)
        return model.get_text_features(**tokens.to(model.device)).pooler_output

    size, blocks = model.config.vision_config.image_size, model.vision_model.encoder.layers
    towers = CLIP(model, encode_image, encode_text, size, blocks, **options)
    return towers if from_config else towers.to(dtype)  # afterwards: logit_scale is read exactly


def vision_tower(
    place: hub.Source | Path, dtype: torch.dtype, from_config: bool = False, **options
) -> CLIP:
    """The picture half of a `CLIPModel`, for heads that read no prompt."""
    model = hub.network(CLIPVisionModelWithProjection, place, dtype, from_config)

    def encode_image(pixels):
        return model(pixel_values=pixels).image_embeds

    size, blocks = model.config.image_size, model.vision_model.encoder.layers
    return CLIP(model, encode_image, None, size, blocks, **options)


class CLIPReward(Reward):
    """A reward that is read from CLIP's vectors."""

    def __init__(self, clip: CLIP, name: str):
        self.clip, self.name, self.networks = clip, name, clip.networks

    def to(self, *args, **kwargs):
        self.clip.to(*args, **kwargs)
        return self


class PromptSimilarity(CLIPReward):
    """The cosine between a frame and its prompt, times exp(CLIP's logit scale) if `scaled`."""

    def __init__(self, clip: CLIP, name: str, scaled: bool = False):
        super().__init__(clip, name)
        self.scaled = scaled
        high = clip.temperature().item() if scaled and not clip.logit_scale.is_meta else 1.0
        self.range, self.unit = (-high, high), "logit" if scaled else "cosine"

    def scores(self, frames, prompts):
        cosine = (self.clip.image(frames) * self.clip.text(prompts).unsqueeze(1)).sum(-1)
        return cosine * self.clip.temperature().to(cosine) if self.scaled else cosine


def hps(
    checkpoint: StrPath = "published",
    *,
    version: str | None = None,
    resize="squash",
    verify=True,
    dtype=torch.float32,
    from_config=False,
) -> Reward:
    """Human preference score of (frame, prompt) (arXiv 2306.09341).

    The cosine, not multiplied by CLIP's temperature, as in HPSv2 and VADER; 0.2 to 0.35 is usual.
    Scores are comparable only for the same prompt and version.

    Args:
        checkpoint: "v2.1" (the same as "published") or "v2.0", through open_clip's ViT-H-14 and
            the authors' files; the path of such a file; "tiny", the embedded one; or an open_clip
            directory.
        version: that the file must be of (files have been shared under the other's name).
        resize: "squash" gives VADER's numbers and every pixel a gradient, "pad" the benchmark's.
        verify: a file must have the SHA-256 of a known version.
    """
    known = HPS_VERSIONS | {"published": HPS_VERSIONS["v2.1"], "tiny": TINY}
    place = hub.find(checkpoint, known)
    if version is not None and not (isinstance(place, Path) and place.is_file()):
        raise ValueError(
            f"version={version!r} is not used: it is for a checkpoint file, and this is {checkpoint}"
        )
    if isinstance(place, Path) and place.is_dir():
        clip = open_clip_directory(place, dtype, from_config, resize=resize)
        return PromptSimilarity(clip, "hps").identified(place, resize=resize)
    config = open_clip.get_model_config("ViT-H-14")
    if from_config:
        model = open_clip_model(config)
    else:
        path = hub.single_file(place)
        if isinstance(place, Path) and verify:
            check_version(path, version)
        with torch.device("meta"):  # no memory, no random numbers
            model = open_clip_model(config)
        fill(model, hub.state_dict(path), path)
        model.to(dtype)
    clip = open_clip_towers(model, open_clip.get_tokenizer("ViT-H-14"), resize=resize)
    return PromptSimilarity(clip, "hps").identified(place, resize=resize)


def check_version(path: Path, version: str | None) -> None:
    """Raises ValueError unless the file is a known version of HPS, and this one if it is given."""
    digest = hub.sha256(path)
    found = [name for name, source in HPS_VERSIONS.items() if source.sha256 == digest]
    if not found:
        raise ValueError(
            f"the SHA-256 of {path} is not that of a published HPS file; for a file of your own, set verify=False"
        )
    if version not in (None, *found):
        raise ValueError(f"{path} is HPS {found[0]}, not {version}")


def fill(model: Any, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Gives a model that was made on the meta device these weights."""
    hub.fill(model, weights, f"{path} does not hold an open_clip ViT-H-14")
    # The one tensor that no file holds: a word sees those before it.
    causal = torch.full((model.context_length, model.context_length), -torch.inf).triu(1)
    model.register_buffer("attn_mask", causal, persistent=False)


def pickscore(
    checkpoint: StrPath = "published", *, resize="squash", dtype=torch.float32, from_config=False
) -> Reward:
    """PickScore of (frame, prompt) (arXiv 2305.01569): exp(logit scale) times the cosine.

    Usual scores are 18 to 24.

    Args:
        checkpoint: "published" (yuvalkirstain/PickScore_v1), or a local `CLIPModel` directory with
            its tokenizer.
        resize: "squash" as VADER, "crop" as the authors.
    """
    place = find(checkpoint, "pickscore-v1")
    clip = clip_towers(place, dtype, from_config, resize=resize)
    return PromptSimilarity(clip, "pickscore", scaled=True).identified(place, resize=resize)


def clip_score(
    checkpoint: StrPath = "published", *, resize="crop", dtype=torch.float32, from_config=False
) -> Reward:
    """The cosine between frame and prompt in OpenAI's CLIP (arXiv 2103.00020).

    Args:
        checkpoint: "clip-vit-base-patch32" (the same as "published"), "clip-vit-large-patch14", or
            a local `CLIPModel` directory with its tokenizer.
        resize: as in `pickscore`.
    """
    place = find(checkpoint, "clip-vit-base-patch32", "clip-vit-large-patch14")
    clip = clip_towers(place, dtype, from_config, resize=resize)
    return PromptSimilarity(clip, "clip_score").identified(place, resize=resize)
