"""VADER's object removal, and its opposite, by YOLOS (2106.00666) or Grounding DINO (2303.05499)."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    GroundingDinoForObjectDetection,
    PretrainedConfig,
    YolosForObjectDetection,
)
from transformers.models.swin.modeling_swin import SwinLayer

from .. import hub
from ..hub import StrPath
from .base import Reward, at_least_float32
from .gallery import SOURCES
from .networks import IMAGENET_MEAN, IMAGENET_STD, NetworkReward, normalize

DETECTORS = ("yolos-tiny", "yolos-base", "grounding-dino-tiny", "grounding-dino-base")
HEIGHT = 512
SHARPNESS = 4.0  # of the smooth maximum over the queries


def scaled(frames: torch.Tensor, step: int) -> torch.Tensor:
    """Frames (N, 3, H, W) to a detector's input (N, 3, 512, W'): W' a multiple of `step` near W 512/H.

    Antialiased, unlike VADER's own resize.
    """
    height, width = frames.shape[-2:]
    size = (HEIGHT, max(1, round(HEIGHT * width / height / step)) * step)
    if size != (height, width):
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    return normalize(frames, IMAGENET_MEAN, IMAGENET_STD)


class Yolos:
    """p(target) of a query is its softmax over all classes and no-object."""

    at_once = 4  # pictures

    def __init__(self, model: YolosForObjectDetection, target: str):
        self.model, self.blocks = model, model.vit.encoder.layer
        config: Any = model.config
        self.step = config.patch_size  # otherwise the last columns would not be looked at
        names = config.id2label.items()
        labels = {name.lower(): i for i, name in names if name != "N/A"}  # ids not used by COCO
        if target not in labels:
            near = get_close_matches(target, labels, n=3, cutoff=0)
            raise ValueError(
                f"the detector does not know {target!r}; the nearest of its labels are {', '.join(near)}"
            )
        self.target = labels[target]

    def log_odds(self, pixels: torch.Tensor) -> torch.Tensor:
        logits = at_least_float32(self.model(pixel_values=pixels).logits)
        others = torch.cat([logits[..., : self.target], logits[..., self.target + 1 :]], dim=-1)
        return logits[..., self.target] - others.logsumexp(dim=-1)


class GroundingDino:
    """p(target) of a query is the mean over the phrase's tokens of the sigmoid of its match.

    As in the authors' evaluation, all words of "red book" count. (By a maximum any book would do.)
    """

    step = 1
    at_once = 1  # 320 by 512 needs 0.7 GB in float32, backward pass included

    def __init__(self, model: GroundingDinoForObjectDetection, tokenizer, target: str):
        self.model = model
        self.text = tokenizer(f"{target}.", return_tensors="pt")
        ids = self.text["input_ids"][0]
        if tokenizer.unk_token_id in ids:
            files = "tokenizer.json or vocab.txt"
            raise ValueError(f"the detector's vocabulary ({files}) has no tokens for {target!r}")
        delimiters = tokenizer.all_special_ids + tokenizer.convert_tokens_to_ids([".", "?"])
        self.phrase = (~torch.isin(ids, torch.tensor(delimiters))).nonzero()[:, 0]
        if len(self.phrase) != len(ids) - 3:
            raise ValueError(
                f"a target is one phrase without . or ?, such as 'red book', not {target!r}"
            )
        backbone = [x for x in model.model.backbone.modules() if isinstance(x, SwinLayer)]
        self.blocks = [*backbone, *model.model.encoder.layers, *model.model.decoder.layers]

    def log_odds(self, pixels: torch.Tensor) -> torch.Tensor:
        device, count = pixels.device, len(pixels)
        text = {name: ids.to(device).expand(count, -1) for name, ids in self.text.items()}
        logits = at_least_float32(self.model(pixel_values=pixels, **text).logits)
        logits = logits[..., self.phrase.to(device)]
        # The number of tokens, by which both means divide, cancels.
        return F.logsigmoid(logits).logsumexp(dim=-1) - F.logsigmoid(-logits).logsumexp(dim=-1)


def pooled(log_odds: torch.Tensor) -> torch.Tensor:
    """A smooth maximum over the last dimension."""
    return (SHARPNESS * log_odds).logsumexp(dim=-1) / SHARPNESS


class ObjectRemoval(NetworkReward):
    """1 minus the detector's confidence, frame by frame, that there is a target.

    A detector gives a p(target) for each of N queries: N = 100 for YOLOS, 900 for Grounding DINO.
    The confidence is a smooth maximum of the log odds l = log p - log(1 - p):

        confidence = sigmoid( 1/4 log sum_i exp(4 l_i) )

    Its gradient reaches every query, in proportion to exp(4 l_i), and never points the wrong way.
    For one sure query it is that query's p. N equal ones multiply their odds by N^(1/4): a
    background of 900 times p = 0.01 gives 0.05. The plainer 1 - prod(1 - p_i) would give 0.9999;
    and where two queries are sure of one object, as is common, each one's gradient would be
    multiplied by the other's 1 - p, so that an object in plain view could not be removed.
    """

    name, range, unit = "object removal", (0.0, 1.0), "1 - confidence"
    sign = -1

    def __init__(self, detector: Yolos | GroundingDino):
        super().__init__([detector.model], detector.blocks)
        self.detector, self.frames_at_once = detector, detector.at_once

    def scores(self, frames, prompts):
        return self.per_picture(self.judge, frames)

    def judge(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N,) of pictures (N, 3, H, W)."""
        log_odds = self.detector.log_odds(scaled(pictures, self.detector.step).to(self.dtype))
        return (self.sign * pooled(log_odds)).sigmoid()


class ObjectPresence(ObjectRemoval):
    """The detector's confidence, frame by frame, that there is a target."""

    name, unit = "object presence", "confidence"
    sign = 1


def load_detector(
    detector: StrPath, target: str, dtype: torch.dtype, from_config: bool
) -> tuple[Yolos | GroundingDino, hub.Source | Path]:
    place = hub.find(detector, {name: SOURCES[name] for name in DETECTORS})
    if isinstance(place, hub.Source):
        family = str(detector).rpartition("-")[0]
    else:
        family = hub.pretrained(PretrainedConfig.get_config_dict, place)[0].get("model_type")
    target = target.lower().strip(" .")  # VADER's full stop for Grounding DINO is optional here
    if not target:
        raise ValueError("the target must name an object, such as 'book'")
    if family == "yolos":
        model = hub.network(YolosForObjectDetection, place, dtype, from_config)
        if from_config and isinstance(place, hub.Source):
            target = "label_0"  # any one: memory does not depend on it
        return Yolos(model, target), place
    if family != "grounding-dino":
        raise ValueError(f"{place} holds a {family!r} model, not a yolos or grounding-dino one")
    if from_config:
        raise ValueError(f"detector {str(detector)!r} cannot be simulated, only yolos ones can")
    model = hub.network(GroundingDinoForObjectDetection, place, dtype)
    return GroundingDino(model, hub.tokenizer(place), target), place


def object_removal(
    target: str = "book",
    detector: StrPath = "yolos-tiny",
    *,
    dtype=torch.float32,
    from_config=False,
) -> Reward:
    """How sure a detector is that no `target` is in a frame, 0 to 1; prompts are ignored.

    VADER's reward (arXiv 2407.08737), but smooth: VADER counts only boxes above a threshold, with
    no gradient below it. Pictures are scaled to a height of 512, the width in proportion.
    As in its training, Grounding DINO's gradient leaves out a pixel's effect on the choice and the
    position of its queries.

    Args:
        target: for YOLOS one of its labels (COCO's 80 objects), for Grounding DINO any one phrase.
        detector: "yolos-tiny", "yolos-base", "grounding-dino-tiny", "grounding-dino-base", or a
            directory of a `YolosForObjectDetection`, or of a `GroundingDinoForObjectDetection`
            with its tokenizer.
    """
    found, place = load_detector(detector, target, dtype, from_config)
    return ObjectRemoval(found).identified(place, target=target)


def object_presence(
    target: str, detector: StrPath = "yolos-tiny", *, dtype=torch.float32, from_config=False
) -> Reward:
    """How sure a detector is that a `target` is in a frame: 1 - `object_removal`."""
    found, place = load_detector(detector, target, dtype, from_config)
    return ObjectPresence(found).identified(place, target=target)
