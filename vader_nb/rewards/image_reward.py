"""ImageReward (arXiv 2304.05977): how a person would rate a picture for a prompt, by a BLIP that reads both."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertTokenizer
from transformers.models.blip import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from .. import hub
from .base import Reward, wide
from .gallery import SOURCES
from .networks import CLIP_MEAN, CLIP_STD, Network, preprocess

FILE, VOCABULARY = SOURCES["image-reward"].filename, "vocab.txt"
ADDED_TOKENS = (
    "[DEC]",
    "[ENC]",
)  # BLIP's, after BERT's 30,522; the first token of a prompt stays BERT's [CLS]
TEXT_LENGTH = 35
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072  # of raw scores, as published
HEAD_WIDTH = 64  # of an attention head, in every size of BERT and of the ViTs

VISION, TEXT, MLP = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
MLP_LAYERS = (0, 2, 4, 6, 7)  # of the training, the others were dropout
VISION_NAMES = (  # the text encoder's names are transformers' own
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.fc([12])\.", r"encoder.layers.\1.mlp.fc\2."),
)
IGNORED = (  # a constant, and the projections of BLIP's contrastive training, which the score does not use
    "blip.text_encoder.embeddings.position_ids",
    *(
        f"blip.{name}.{kind}"
        for name in ("vision_proj", "text_proj")
        for kind in ("weight", "bias")
    ),
)


class ImageReward(Network):
    """Preference score of each frame for its clip's prompt: the raw score less its published mean, in its published
    standard deviations. The prompt's tokens look at the picture in every layer of the text encoder, so that nothing
    of a prompt but its tokens can be computed ahead."""

    name, unit, typical = "image reward", "standard deviations", (-2.0, 2.0)

    def __init__(
        self,
        vision: BlipVisionModel,
        text: BlipTextModel,
        head: nn.Linear,
        tokenizer: BertTokenizer,
    ):
        super().__init__([vision, text, head], [*vision.encoder.layers, *text.encoder.layer])
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer

    def scores(self, frames, prompts):
        words = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=TEXT_LENGTH,
            return_tensors="pt",
        ).to(frames.device)
        return self.picture_scores(self.rate, frames, words["input_ids"], words["attention_mask"])

    def rate(self, pictures: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(N,) of pictures (N, 3, H, W) and their prompts' tokens and attention masks, (N, 35)."""
        size = self.vision.config.image_size
        pixels = preprocess(
            pictures, size, CLIP_MEAN, CLIP_STD, resize="crop", interpolation="bicubic"
        )
        patches = self.vision(pixels.to(self.dtype)).last_hidden_state
        states = self.text(ids, mask, encoder_hidden_states=patches).last_hidden_state  # (N, 35, D)
        raw = F.linear(wide(states[:, 0]), wide(self.head.weight), wide(self.head.bias))
        return (raw[:, 0] - SCORE_MEAN) / SCORE_STD


def networks_of(state: dict[str, torch.Tensor]) -> tuple[BlipVisionModel, BlipTextModel, nn.Linear]:
    """The networks whose weights a state dict in the published layout holds, of the size that its tensors have.

    Raises ValueError for a key that is missing, or neither used nor known to be useless, and for a wrong shape."""
    unknown = [
        key for key in state if key not in IGNORED and not key.startswith((VISION, TEXT, MLP))
    ]
    if unknown:
        raise ValueError(
            f"not a state dict in ImageReward's layout: unknown {', '.join(unknown[:5])}"
        )
    seen, read, rated = (
        {
            key.removeprefix(prefix): state[key]
            for key in state.keys() - set(IGNORED)
            if key.startswith(prefix)
        }
        for prefix in (VISION, TEXT, MLP)
    )
    try:
        with torch.device("meta"):  # no memory and no random numbers for what is replaced
            vision, text = (
                BlipVisionModel(vision_config(seen)),
                BlipTextModel(text_config(read), False),
            )
        vision.load_state_dict({rename(key): value for key, value in seen.items()}, assign=True)
        text.load_state_dict(read, assign=True)
        text.embeddings.position_ids = torch.arange(text.config.max_position_embeddings)[
            None
        ]  # in no file
        return vision, text, affine(rated)
    except KeyError as error:
        raise ValueError(
            f"not a state dict in ImageReward's layout: no key that ends in {error}"
        ) from error
    except RuntimeError as error:  # torch's, which lists keys and shapes
        raise ValueError(f"not a state dict in ImageReward's layout: {str(error)[:300]}") from error


def rename(key: str) -> str:
    for pattern, name in VISION_NAMES:
        key = re.sub(pattern, name, key)
    return key


def vision_config(weights: dict[str, torch.Tensor]) -> BlipVisionConfig:
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=len({key.split(".")[1] for key in weights if key.startswith("blocks.")}),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=round((weights["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,  # not transformers' default
    )


def text_config(weights: dict[str, torch.Tensor]) -> BlipTextConfig:
    words, width = weights["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(weights["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=len(
            {key.split(".")[2] for key in weights if key.startswith("encoder.layer.")}
        ),
        num_attention_heads=width // HEAD_WIDTH,  # transformers' default is 8, BLIP has 12
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
        is_decoder=True,  # this only makes the cross-attention: whether to look ahead is said when it is called
    )


def affine(layers: dict[str, torch.Tensor]) -> nn.Linear:
    """The published head, five linear layers without anything between them, as the one affine map that they are."""
    weights = [layers[f"{n}.weight"].double() for n in MLP_LAYERS]
    biases = [layers[f"{n}.bias"].double() for n in MLP_LAYERS]
    if len(layers) != len(weights) + len(biases):
        raise ValueError(
            f"the head has other keys than those of the layers {MLP_LAYERS}: {', '.join(sorted(layers))}"
        )
    weight, bias = weights[0], biases[0]
    for matrix, shift in zip(weights[1:], biases[1:]):
        weight, bias = matrix @ weight, matrix @ bias + shift
    head = nn.Linear(weight.shape[1], 1)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head


def image_reward(
    checkpoint: str | Path = "published", *, dtype: torch.dtype = torch.float32
) -> Reward:
    """Human preference for (frame, prompt) as ImageReward learned it from 137,000 comparisons (Xu et al., arXiv
    2304.05977): frames (B, F, 3, H, W) in [0, 1] to (B,), unbounded, for most pictures between -2 and 2.

    A frame is scaled to a shorter side of 224 (bicubic) and cropped to its center; a prompt is cut after 35 tokens.
    checkpoint: "published", or a directory that holds the published `ImageReward.pt` and the `vocab.txt` of
    bert-base-uncased.

    Raises FileNotFoundError where a file cannot be had, ValueError for a file of another layout.
    """
    folder = None if str(checkpoint) in ("published", "image-reward") else Path(checkpoint)
    if folder and not folder.is_dir():
        raise FileNotFoundError(
            f"{checkpoint} is neither 'image-reward' nor a directory with {FILE} and {VOCABULARY}"
        )
    otherwise = (
        f"vader_nb.rewards.image_reward('/path/to/a/directory/with/{FILE}/and/{VOCABULARY}')"
    )
    path, vocabulary = (
        hub.single_file(source, folder and folder / source.filename, otherwise=otherwise)
        for source in (SOURCES["image-reward"], SOURCES["bert-vocabulary"])
    )
    vision, text, head = networks_of(hub.state_dict(path))
    tokenizer = BertTokenizer.from_pretrained(str(vocabulary.parent), do_lower_case=True)
    tokenizer.add_tokens(list(ADDED_TOKENS), special_tokens=True)
    if len(tokenizer) != text.config.vocab_size:
        raise ValueError(
            f"{vocabulary} makes {len(tokenizer)} tokens, {path} has {text.config.vocab_size}"
        )
    return ImageReward(vision.to(dtype), text.to(dtype), head.to(dtype), tokenizer)
