"""ImageReward (arXiv 2304.05977): a person's rating of a picture for a prompt, by a BLIP."""

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
from ..hub import StrPath
from .base import Reward, at_least_float32
from .gallery import SOURCES, find
from .networks import CLIP_MEAN, CLIP_STD, NetworkReward, preprocess

# BLIP's, after BERT's 30,522. The first token of a prompt stays BERT's [CLS].
ADDED_TOKENS = ["[DEC]", "[ENC]"]
TEXT_LENGTH = 35
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072  # of raw scores, as published
HEAD_WIDTH = 64  # of an attention head, in every size of BERT and of the ViTs

VISION, TEXT, MLP = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
MLP_LAYERS = (0, 2, 4, 6, 7)  # of the training, the others were dropout
VISION_NAMES = {  # the text encoder's names are transformers' own
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.(\d+)\.norm([12])\.": r"encoder.layers.\1.layer_norm\2.",
    r"^blocks\.(\d+)\.attn\.qkv\.": r"encoder.layers.\1.self_attn.qkv.",
    r"^blocks\.(\d+)\.attn\.proj\.": r"encoder.layers.\1.self_attn.projection.",
    r"^blocks\.(\d+)\.mlp\.fc([12])\.": r"encoder.layers.\1.mlp.fc\2.",
}
IGNORED = (  # a constant, and the projections of BLIP's contrastive training: not in the score
    "blip.text_encoder.embeddings.position_ids",
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
)


class ImageReward(NetworkReward):
    """Preference score of each frame for its clip's prompt, in published standard deviations.

    The prompt's tokens look at the picture in every layer of the text encoder, so only the
    tokens can be computed in advance.
    """

    name, unit = "image reward", "standard deviations"

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, head: nn.Linear, tokenizer):
        super().__init__([vision, text, head], [*vision.encoder.layers, *text.encoder.layer])
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer

    def scores(self, frames, prompts):
        options = {"padding": "max_length", "truncation": True, "max_length": TEXT_LENGTH}
        words = self.tokenizer(prompts, return_tensors="pt", **options).to(frames.device)
        return self.per_picture(self.rate, frames, words["input_ids"], words["attention_mask"])

    def rate(self, pictures: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(N,) of pictures (N, 3, H, W) and their prompts' tokens and attention masks, (N, 35)."""
        look = {"size": self.vision.config.image_size, "mean": CLIP_MEAN, "std": CLIP_STD}
        pixels = preprocess(pictures, **look, resize="crop", interpolation="bicubic")
        patches = self.vision(pixels.to(self.dtype)).last_hidden_state
        states = self.text(ids, mask, encoder_hidden_states=patches).last_hidden_state  # (N, 35, D)
        weight, bias = at_least_float32(self.head.weight), at_least_float32(self.head.bias)
        raw = F.linear(at_least_float32(states[:, 0]), weight, bias)
        return (raw[:, 0] - SCORE_MEAN) / SCORE_STD


def networks_of(state: dict[str, torch.Tensor]) -> tuple[BlipVisionModel, BlipTextModel, nn.Linear]:
    """The networks with these weights, in the published layout, of the size that they have.

    Raises:
        ValueError: a key is missing, or neither used nor known to be useless, or of wrong shape.
    """
    problem = "not a state dict in ImageReward's layout"
    parts: dict[str, dict] = {VISION: {}, TEXT: {}, MLP: {}}
    for key, value in state.items():
        if key in IGNORED:
            continue
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"{problem}: unknown {key}")
        parts[prefix][key.removeprefix(prefix)] = value
    try:
        with torch.device("meta"):  # no memory and no random numbers for what is replaced
            vision = BlipVisionModel(vision_config(parts[VISION]))
            text = BlipTextModel(text_config(parts[TEXT]), False)
        head = affine(parts[MLP])
    except KeyError as error:
        raise ValueError(f"{problem}: no key that ends in {error}") from error
    for pattern, name in VISION_NAMES.items():
        parts[VISION] = {re.sub(pattern, name, key): x for key, x in parts[VISION].items()}
    hub.fill(vision, parts[VISION], problem)
    hub.fill(text, parts[TEXT], problem)
    places = torch.arange(text.config.max_position_embeddings)[None]  # in no file
    text.embeddings.register_buffer("position_ids", places, persistent=False)
    return vision, text, head


def count_layers(weights: dict[str, torch.Tensor], pattern: str) -> int:
    return len({match[0] for match in map(re.compile(pattern).match, weights) if match})


def vision_config(weights: dict[str, torch.Tensor]) -> BlipVisionConfig:
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=count_layers(weights, r"blocks\.\d+"),
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
        num_hidden_layers=count_layers(weights, r"encoder\.layer\.\d+"),
        num_attention_heads=width // HEAD_WIDTH,  # transformers' default is 8, BLIP has 12
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
        is_decoder=True,  # makes the cross-attention; causality is decided when it is called
    )


def affine(layers: dict[str, torch.Tensor]) -> nn.Linear:
    """The published head, five linear layers with nothing between them, as one affine map."""
    pairs = [(layers[f"{n}.weight"].double(), layers[f"{n}.bias"].double()) for n in MLP_LAYERS]
    if len(layers) != 2 * len(pairs):
        found = ", ".join(sorted(layers))
        raise ValueError(f"the head's keys are not those of the layers {MLP_LAYERS}: {found}")
    (weight, bias), *rest = pairs
    for matrix, shift in rest:
        weight, bias = matrix @ weight, matrix @ bias + shift
    head = nn.Linear(weight.shape[1], 1)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head


def image_reward(
    checkpoint: StrPath = "published", *, dtype=torch.float32, from_config=False
) -> Reward:
    """Human preference for (frame, prompt), as learned from 137,000 comparisons.

    Unbounded, for most pictures between -2 and 2. A frame is scaled to a shorter side of 224
    (bicubic) and cropped to its center; a prompt is cut after 35 tokens.

    Args:
        checkpoint: "published", or a directory that holds the published `ImageReward.pt` and the
            `vocab.txt` of bert-base-uncased.
    """
    place = find(checkpoint, "image-reward")
    sources = [SOURCES["image-reward"], SOURCES["bert-vocabulary"]]
    if from_config:
        config = sources[0].config
        vision = BlipVisionModel(BlipVisionConfig(**config["vision_config"]))
        text = BlipTextModel(BlipTextConfig(**config["text_config"]), False)
        head = nn.Linear(text.config.hidden_size, 1)
        return ImageReward(vision, text, head, hub.DummyTokenizer()).identified(place)
    if isinstance(place, Path):
        sources = [place / source.filename for source in sources]
    path, vocabulary = map(hub.single_file, sources)
    vision, text, head = networks_of(hub.state_dict(path))
    tokenizer = BertTokenizer.from_pretrained(str(vocabulary.parent), do_lower_case=True)
    tokenizer.add_tokens(ADDED_TOKENS, special_tokens=True)
    if len(tokenizer) != text.config.vocab_size:
        raise ValueError(
            f"{vocabulary} makes {len(tokenizer)} tokens, {path} has {text.config.vocab_size}"
        )
    return ImageReward(vision, text, head, tokenizer).to(dtype).identified(place)
