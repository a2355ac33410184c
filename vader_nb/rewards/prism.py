"""Text-video similarity through VideoPrism (arXiv 2402.13217), trained on videos and their texts."""

from typing import Any

import torch
import torch.nn.functional as F
import transformers

from .. import hub
from ..hub import StrPath
from .base import Reward, at_least_float32
from .gallery import find
from .networks import NetworkReward, preprocess


class VideoPrism(NetworkReward):
    """The cosine between VideoPrism's vectors of a clip and of its prompt."""

    name, range, unit, per_frame = "videoprism", (-1.0, 1.0), "cosine", False

    def __init__(self, model: Any, tokenizer):
        video = model.video_model
        encoder = video.vision_model
        blocks = [*encoder.spatial_layers, *encoder.temporal_layers, *video.auxiliary_layers]
        super().__init__([model], blocks)
        self.model, self.tokenizer = model, tokenizer

    def pixels(self, frames: torch.Tensor) -> torch.Tensor:
        """The model's input (B, N, 3, size, size), for the N frames that it takes.

        Each is the first frame of one of N equal stretches of the clip, as in its authors' code; if there
        are fewer, some are repeated. Pixels stay in [0, 1].
        """
        config = self.model.config.vision_config
        place = torch.arange(config.num_frames) * frames.shape[1] // config.num_frames
        chosen = frames[:, place.to(frames.device)]
        keep = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        size = config.image_size
        return preprocess(chosen, size, *keep, interpolation="bicubic").to(self.dtype)

    def encode_text(self, prompts: list[str]) -> torch.Tensor:
        """(B, D). Prompts are padded to the length that the model knows, and cut off there."""
        length = self.model.config.text_config.max_position_embeddings
        cut = {"padding": "max_length", "truncation": True, "max_length": length}
        tokens = self.tokenizer(prompts, return_tensors="pt", **cut)
        return self.model.get_text_features(**tokens.to(self.model.device)).pooler_output

    def scores(self, frames, prompts):
        clip = self.model.get_video_features(self.pixels(frames)).pooler_output  # (B, 1, D)
        text = self.cached_text(prompts, self.encode_text).unsqueeze(1)
        return F.cosine_similarity(at_least_float32(clip), at_least_float32(text), dim=-1)


def videoprism(
    checkpoint: StrPath = "published", *, dtype=torch.float32, from_config=False
) -> Reward:
    """How well a clip fits its prompt, -1 to 1, in VideoPrism LvT: what happens and how it looks.

    From a clip of any length, 16 frames are seen, evenly spread and squashed to 288 x 288; from a
    prompt, 64 tokens. Its attention looks at all 4,096 patches of a clip at once and keeps the comparisons of
    one layer at a time, which takes gigabytes a clip: see `vader_nb.rewards.table()`.

    Args:
        checkpoint: "published" (google/videoprism-lvt-base-f16r288, 248 M parameters, Apache-2.0),
            or a local `VideoPrismClipModel` directory with its tokenizer, for any size and number
            of frames.

    Raises:
        ImportError: transformers is too old.
    """
    if not hasattr(transformers, "VideoPrismClipModel"):
        raise ImportError(
            "videoprism needs VideoPrismClipModel, which transformers 5.24 has but "
            f"{transformers.__version__}, installed here, does not: pip install 'transformers>=5.24'"
        )
    place = find(checkpoint, "videoprism-lvt-base")
    model = hub.network(transformers.VideoPrismClipModel, place, dtype, from_config)
    return VideoPrism(model, hub.tokenizer(place, from_config)).identified(place)
