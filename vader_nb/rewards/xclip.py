"""Text-video similarity through X-CLIP (arXiv 2208.02816), which sees a clip as a whole."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import XCLIPModel

from .. import hub
from ..hub import StrPath
from .base import Reward, at_least_float32
from .gallery import find
from .networks import NetworkReward, preprocess


class TextVideo(NetworkReward):
    """The cosine between a clip and its prompt: `logits_per_video` without the temperature.

    Frames exchange messages in the vision tower; their projected class tokens, mixed over time,
    are the clip's vector. The prompt's vector is shifted by what its words find in the clip's
    patches (X-CLIP's video-specific prompts): it depends on the clip; the cached one does not.
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
        self.config: Any = model.config

    def pixels(self, frames: torch.Tensor) -> torch.Tensor:
        """The model's input (B, N, 3, size, size), for the N frames that it takes.

        They are the middles of N equal stretches of the clip, as in X-CLIP's evaluation; if there are
        fewer, some are repeated.
        """
        config = self.config.vision_config
        place = (torch.arange(config.num_frames) + 0.5) * frames.shape[1] / config.num_frames
        chosen = frames[:, place.long().to(frames.device)]
        # ImageNet's statistics, not CLIP's, as in the checkpoint's preprocessor_config.json.
        return preprocess(chosen, config.image_size, resize="crop").to(self.dtype)

    def video(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors (B, D) of clips and (B, P, D) of their patches, from (B, N, 3, size, size)."""
        model, shape = self.model, pixels.shape[:2]
        seen = model.vision_model(pixel_values=pixels.flatten(0, 1))
        classes = model.visual_projection(seen.pooler_output).unflatten(0, shape)
        patches = model.prompts_visual_layernorm(seen.last_hidden_state[:, 1:])
        patches = (patches @ model.prompts_visual_projection).unflatten(0, shape)
        return model.mit(classes).pooler_output, patches.mean(dim=1)

    def encode_text(self, prompts: list[str]) -> torch.Tensor:
        """(B, D). Longer prompts than the model takes are cut off."""
        cut = {"truncation": True, "max_length": self.config.text_config.max_position_embeddings}
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt", **cut)
        outputs: Any = self.model.get_text_features(**tokens.to(self.model.device))
        return outputs.pooler_output

    def scores(self, frames, prompts):
        clip, patches = self.video(self.pixels(frames))
        text = self.cached_text(prompts, self.encode_text).unsqueeze(1)  # (B, 1, D)
        shift = self.model.prompts_generator(text, patches)
        text = at_least_float32(text) + at_least_float32(shift)
        return F.cosine_similarity(at_least_float32(clip).unsqueeze(1), text, dim=-1)


def text_video(
    checkpoint: StrPath = "published", *, dtype=torch.float32, from_config=False
) -> Reward:
    """How well a clip fits its prompt, -1 to 1, in X-CLIP: motion counts, not just single frames.

    From a clip of any length, 8 frames are seen, evenly spread, and of each the central square. (VADER's site
    shows ViCLIP here, whose published files need remote code and have a disputed license.) This
    checkpoint learned from the names of Kinetics-400's actions, so it knows what people do better
    than how things look; microsoft/xclip-base-patch16-zero-shot loads the same way.

    Args:
        checkpoint: "published" (microsoft/xclip-base-patch32, 197 M parameters, MIT), or a local
            `XCLIPModel` directory with its tokenizer, for any size and number of frames.
    """
    place = find(checkpoint, "xclip-base-patch32")
    model = hub.network(XCLIPModel, place, dtype, from_config)
    return TextVideo(model, hub.tokenizer(place, from_config)).identified(place)
