"""CLIP, and the rewards that compare a frame with its prompt: HPS, PickScore, CLIP score. (`heads` rates frames alone.)"""

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModelWithProjection

from .. import hub
from .base import Reward, wide
from .gallery import CARDS, SOURCES
from .networks import CLIP_MEAN, CLIP_STD, Frozen, preprocess, remembered

TINY = Path(__file__).parent.parent / "zoo" / "weights" / "tiny-clip"


class CLIP(Frozen):
    """Two frozen towers, one for pictures and one for sentences, whose unit vectors can be compared.

    encode_image (N, 3, size, size) -> (N, D), encode_text (list of B strings) -> (B, D), or None.
    resize: how a picture becomes a square, see `preprocess`; what is not squashed is resized bicubically, as the
    towers' authors do.
    """

    def __init__(
        self,
        network: nn.Module,
        encode_image: Callable,
        encode_text: Callable | None,
        size: int,
        blocks=(),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        resize: str = "squash",
    ):
        super().__init__([network], blocks)
        self.network, self.encode_image, self.encode_text = network, encode_image, encode_text
        interpolation = "bilinear" if resize == "squash" else "bicubic"
        self.look = {
            "size": size,
            "mean": mean,
            "std": std,
            "resize": resize,
            "interpolation": interpolation,
        }
        preprocess(torch.zeros(1, 3, 8, 8), **self.look)  # an unknown resize is an error now
        # exp() would turn the rounding of half precision into a per cent of every score.
        self.logit_scale = wide(network.logit_scale.detach().clone()) if encode_text else None
        self.texts: dict[str, torch.Tensor] = {}

    def image(self, frames: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, F, D) of frames (B, F, 3, H, W), in float32 at least."""

        def unit(pictures):
            pixels = preprocess(pictures, **self.look).to(self.dtype)
            return F.normalize(wide(self.encode_image(pixels)), dim=-1)

        return self.picture_scores(unit, frames)

    def text(self, prompts: list[str]) -> torch.Tensor:
        """Unit vectors (B, D) of prompts, each computed once."""
        return remembered(
            self.texts, prompts, lambda new: F.normalize(wide(self.encode_text(new)), dim=-1)
        )

    def cosine(self, frames: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """(B, F): each frame with its own clip's prompt."""
        return (self.image(frames) * self.text(prompts).unsqueeze(1)).sum(-1)

    def temperature(self) -> torch.Tensor:
        return self.logit_scale.exp()

    def to(self, *args, **kwargs):
        self.texts.clear()
        return super().to(*args, **kwargs)


def open_clip_towers(model: nn.Module, tokenizer: Callable, **look) -> CLIP:
    """Of an open_clip model."""
    size = model.visual.image_size
    return CLIP(
        model,
        model.encode_image,
        lambda prompts: model.encode_text(tokenizer(prompts).to(model.logit_scale.device)),
        size if isinstance(size, int) else size[0],
        [*model.visual.transformer.resblocks],
        **look,
    )


def open_clip_directory(folder: str | Path, dtype: torch.dtype, **look) -> CLIP:
    """Of a local directory in open_clip's layout (`open_clip_config.json`, weights, tokenizer)."""
    folder = Path(folder)
    if not (folder / "open_clip_config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is not an open_clip directory: it has no open_clip_config.json"
        )
    statistics = json.loads((folder / "open_clip_config.json").read_text()).get(
        "preprocess_cfg", {}
    )
    look |= {key: tuple(statistics[key]) for key in ("mean", "std") if key in statistics}
    with quiet():
        model = open_clip.create_model(f"local-dir:{folder}", device="cpu").to(dtype)
        return open_clip_towers(model, open_clip.get_tokenizer(f"local-dir:{folder}"), **look)


OTHERWISE = "checkpoint='/path/to/the/CLIP/directory'"


def transformers_towers(
    checkpoint: str, local: str | Path | None, dtype: torch.dtype, **look
) -> CLIP:
    """Of a `CLIPModel` and its tokenizer: the published one of that name in `SOURCES`, or a local directory."""
    source = SOURCES[checkpoint]
    model = hub.network(CLIPModel, source, local, otherwise=OTHERWISE, dtype=torch.float32)
    tokenizer = hub.pretrained(AutoTokenizer.from_pretrained, source, local, otherwise=OTHERWISE)
    return towers_of(model, tokenizer, **look).to(dtype)


def towers_of(model: CLIPModel, tokenizer: Callable, **look) -> CLIP:
    length = model.config.text_config.max_position_embeddings

    # The parts by hand: what get_image_features returns differs between transformers 4 and 5.
    def encode_image(pixels):
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    def encode_text(prompts):
        tokens = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return model.text_projection(model.text_model(**tokens.to(model.device)).pooler_output)

    size, blocks = model.config.vision_config.image_size, [*model.vision_model.encoder.layers]
    return CLIP(model, encode_image, encode_text, size, blocks, **look)


def picture_tower(checkpoint: str, local: str | Path | None, dtype: torch.dtype, **look) -> CLIP:
    """The picture half of a `CLIPModel` only, for heads that read no prompt."""
    model = hub.network(
        CLIPVisionModelWithProjection, SOURCES[checkpoint], local, otherwise=OTHERWISE, dtype=dtype
    )
    return picture_tower_of(model, **look)


def picture_tower_of(model: CLIPVisionModelWithProjection, **look) -> CLIP:
    def encode_image(pixels):
        return model(pixel_values=pixels).image_embeds

    return CLIP(
        model,
        encode_image,
        None,
        model.config.image_size,
        [*model.vision_model.encoder.layers],
        **look,
    )


@contextlib.contextmanager
def quiet():
    """open_clip announces through the root logger that a directory has no preset of its own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class Comparison(Reward):
    """The cosine between a frame and its prompt, or, `tempered`, that times exp(CLIP's logit scale)."""

    def __init__(self, clip: CLIP, name: str, tempered: bool = False):
        self.clip, self.name, self.tempered, self.networks = clip, name, tempered, clip.networks
        self.typical = CARDS[name].typical
        high = clip.temperature().item() if tempered else 1.0
        self.range, self.unit = (-high, high), "logit" if tempered else "cosine"

    def scores(self, frames, prompts):
        cosine = self.clip.cosine(frames, prompts)
        return cosine * self.clip.temperature().to(cosine) if self.tempered else cosine

    def to(self, *args, **kwargs):
        self.clip.to(*args, **kwargs)
        return self


def hps(
    checkpoint: str | Path = "published",
    *,
    version: str | None = None,
    resize: str = "squash",
    verify: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Reward:
    """Human preference score of (frame, prompt) (arXiv 2306.09341): the cosine, not times CLIP's temperature, as
    HPSv2 and VADER report it; 0.2 to 0.35 is usual. Scores compare only for one prompt and one version.

    checkpoint: "v2.1" (which "published" means) or "v2.0", through open_clip's ViT-H-14 and the authors' files; the path
    of such a file; "tiny", the embedded one; or an open_clip directory. resize: "squash" gives VADER's numbers and every pixel a
    gradient, "pad" gives the benchmark's. verify: a file must have the SHA-256 of a known version; version: of this one
    (files have been shared under the other's name).
    """
    look = {"resize": resize}
    if checkpoint == "tiny" or Path(checkpoint).is_dir():
        clip = open_clip_directory(TINY if checkpoint == "tiny" else checkpoint, dtype, **look)
    else:
        path = hps_file(checkpoint, version, verify)
        with quiet():
            empty = open_clip.create_model("ViT-H-14", pretrained=None, device="meta")
        model = filled(empty, hub.state_dict(path), path).to(dtype)
        clip = open_clip_towers(model, open_clip.get_tokenizer("ViT-H-14"), **look)
    return Comparison(clip, "hps")


def hps_file(checkpoint: str | Path, version: str | None, verify: bool) -> Path:
    versions = {
        name.removeprefix("hps-"): source
        for name, source in SOURCES.items()
        if name.startswith("hps-")
    }
    versions["published"] = versions["v2.1"]
    otherwise = (
        f"vader_nb.rewards.hps('/path/to/{SOURCES['hps-v2.1'].filename}')"
        + hub.EMBEDDED.format("hps")
    )
    if str(checkpoint) in versions:
        return hub.single_file(versions[str(checkpoint)], otherwise=otherwise)
    if not Path(checkpoint).is_file():
        raise ValueError(
            f"unknown HPS checkpoint {str(checkpoint)!r}: choose one of {', '.join(versions)}, tiny, or give the path "
            f"of a file or an open_clip directory"
        )
    if verify:
        known = {source.sha256: name for name, source in versions.items() if name != "published"}
        found = known.get(hub.sha256(checkpoint))
        if found is None:
            raise ValueError(
                f"{checkpoint} has the SHA-256 of no published HPS file; if it is your own, say verify=False"
            )
        if version not in (None, found):
            raise ValueError(f"{checkpoint} is HPS {found}, not {version}")
    return Path(checkpoint)


def filled(empty: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> nn.Module:
    """A model that was made on the meta device (no memory, no random numbers), with these weights."""
    try:
        empty.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not hold an open_clip ViT-H-14: {str(error)[:300]}"
        ) from error
    # The one tensor that no file holds: a word sees those before it.
    causal = torch.full((empty.context_length, empty.context_length), -torch.inf).triu(1)
    empty.register_buffer("attn_mask", causal, persistent=False)
    return empty


def pickscore(
    checkpoint: str | Path = "published",
    *,
    resize: str = "squash",
    dtype: torch.dtype = torch.float32,
) -> Reward:
    """PickScore of (frame, prompt) (arXiv 2305.01569): exp(logit scale) times the cosine, 18 to 24 is usual.

    checkpoint: "published" (yuvalkirstain/PickScore_v1), or a local `CLIPModel` directory with its tokenizer.
    resize: "squash" as VADER, "crop" as the authors.
    """
    clip = transformers_towers("pickscore-v1", hub.local(checkpoint), dtype, resize=resize)
    return Comparison(clip, "pickscore", tempered=True)


def clip_score(
    checkpoint: str | Path = "published",
    *,
    resize: str = "crop",
    dtype: torch.dtype = torch.float32,
) -> Reward:
    """The cosine between frame and prompt in OpenAI's CLIP (arXiv 2103.00020).

    checkpoint: "published" and "clip-vit-base-patch32" mean the same, "clip-vit-large-patch14", or a local `CLIPModel` directory."""
    names = ("clip-vit-base-patch32", "clip-vit-large-patch14")
    source = str(checkpoint) if checkpoint in names else names[0]
    clip = transformers_towers(source, hub.local(checkpoint, *names), dtype, resize=resize)
    return Comparison(clip, "clip_score")
