"""Text-video similarity through X-CLIP (arXiv 2208.02816), which compares a sentence with a clip as a whole."""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, XCLIPModel

from .. import hub
from .base import Reward, wide
from .gallery import SOURCES
from .networks import IMAGENET_MEAN, IMAGENET_STD, Network, preprocess, remembered

PUBLISHED = "xclip-base-patch32"


class TextVideo(Network):
    """The cosine between a clip and its prompt: X-CLIP's `logits_per_video` of that pair, without the temperature.

    Frames exchange messages in the vision tower; their projected class tokens, mixed over time, are the clip's vector.
    The prompt's vector is shifted by what its words find in the clip's patches (X-CLIP's video-specific prompts), so
    that it is computed anew for each clip, from a sentence vector that is not.
    """

    name, range, unit, per_frame = "text video", (-1.0, 1.0), "cosine", False

    def __init__(self, model: XCLIPModel, tokenizer):
        blocks = [
            *model.vision_model.encoder.layers,
            *model.mit.encoder.layers,
            *model.prompts_generator.decoder,
        ]
        super().__init__([model], blocks)
        self.model, self.tokenizer = model, tokenizer
        self.sentences: dict[str, torch.Tensor] = {}

    def pixels(self, frames: torch.Tensor) -> torch.Tensor:
        """The model's input (B, N, 3, size, size): as many frames as it takes, the middles of N equal stretches of the
        clip, as in X-CLIP's evaluation; of fewer frames some are repeated. The shorter side to `size`, then the
        center; ImageNet's statistics, not CLIP's, as in the checkpoint's preprocessor_config.json."""
        config = self.model.config.vision_config
        place = (torch.arange(config.num_frames) + 0.5) * frames.shape[1] / config.num_frames
        chosen = frames[:, place.long().to(frames.device)]
        pixels = preprocess(
            chosen.flatten(0, 1), config.image_size, IMAGENET_MEAN, IMAGENET_STD, resize="crop"
        )
        return pixels.to(self.dtype).unflatten(0, chosen.shape[:2])

    def video(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of pixels (B, N, 3, size, size): a vector of each clip (B, D), and of each of its patches (B, P, D)."""
        model, shape = self.model, pixels.shape[:2]
        seen = model.vision_model(pixel_values=pixels.flatten(0, 1))
        clip = model.mit(
            model.visual_projection(seen.pooler_output).unflatten(0, shape)
        ).pooler_output
        patches = (
            model.prompts_visual_layernorm(seen.last_hidden_state[:, 1:])
            @ model.prompts_visual_projection
        )
        return clip, patches.unflatten(0, shape).mean(dim=1)

    def sentence(self, prompts: list[str]) -> torch.Tensor:
        """A vector of each prompt by itself (B, D), computed once. Longer prompts than the model takes are cut off."""
        return remembered(self.sentences, prompts, self.read)

    def read(self, prompts: list[str]) -> torch.Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            prompts, padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        return self.model.text_projection(
            self.model.text_model(**tokens.to(self.model.device)).pooler_output
        )

    def scores(self, frames, prompts):
        clip, patches = self.video(self.pixels(frames))
        text = self.sentence(prompts).unsqueeze(1)  # each clip with its own prompt alone: (B, 1, D)
        text = wide(text) + wide(self.model.prompts_generator(text, patches))
        return F.cosine_similarity(wide(clip).unsqueeze(1), text, dim=-1)

    def to(self, *args, **kwargs):
        self.sentences.clear()
        return super().to(*args, **kwargs)


def text_video(
    checkpoint: str | Path = "published", *, dtype: torch.dtype = torch.float32
) -> Reward:
    """How well a clip fits its prompt, -1 to 1, in X-CLIP (arXiv 2208.02816): motion counts, not just single frames.

    frames (B, F, 3, H, W) of any size and number; the central square of 8 of them, evenly spread, is seen (and gets a
    gradient).
    checkpoint: "published" (microsoft/xclip-base-patch32, 197 M parameters, MIT), or a local `XCLIPModel`
    directory with its tokenizer, of whatever size and number of frames its config says.

    VADER's site shows ViCLIP here, whose published files need remote code and whose license is disputed; X-CLIP loads
    without either. This checkpoint learned from the names of Kinetics-400's actions, so it knows what people do better
    than how things look; a zero-shot one, such as microsoft/xclip-base-patch16-zero-shot, loads the same way.

    Raises FileNotFoundError where the weights cannot be had, ValueError for a directory that lacks some of them.
    """
    local = None if checkpoint in ("published", PUBLISHED) else Path(checkpoint)
    if local and not local.exists():
        raise FileNotFoundError(
            f"no checkpoint {str(checkpoint)!r}: give {PUBLISHED!r} or an XCLIPModel directory"
        )
    otherwise = "vader_nb.rewards.text_video(checkpoint='/path/to/the/XCLIPModel/directory')"
    source = SOURCES[PUBLISHED]
    model = hub.network(XCLIPModel, source, local, otherwise=otherwise, dtype=dtype)
    return TextVideo(
        model, hub.pretrained(AutoTokenizer.from_pretrained, source, local, otherwise=otherwise)
    )
