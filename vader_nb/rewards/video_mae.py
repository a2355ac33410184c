"""VADER's action reward: a VideoMAE classifier (arXiv 2203.12602) looks for what prompts name."""

import contextlib
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import VideoMAEForVideoClassification
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

from .. import hub
from ..hub import StrPath
from .base import Reward, at_least_float32
from .gallery import find
from .networks import NetworkReward, preprocess

# In the published files queries and values have a bias under their own names, and keys have none.
# transformers 5.15, for one, looks for query.bias, key.bias and value.bias; if missing, they are random.
PUBLISHED_KEYS = {
    r"attention\.q_bias$": "attention.query.bias",
    r"attention\.v_bias$": "attention.value.bias",
}
TINY = Path(__file__).parent.parent / "zoo" / "weights" / "tiny-videomae"


class Action(NetworkReward):
    """Log-probability of the class that the prompt names; exp of it is what VADER reports.

    Through log-softmax, which cannot overflow in half precision.
    """

    name, range, unit, per_frame = "action", (-float("inf"), 0.0), "log-probability", False
    min_frames = 2

    def __init__(self, classifier: VideoMAEForVideoClassification, label: str | None = None):
        super().__init__([classifier], classifier.videomae.encoder.layer)
        self.classifier = classifier
        self.config: Any = classifier.config
        self.labels = {plain(name): i for name, i in self.config.label2id.items()}
        self.label = label
        if label is not None:
            self.index(label)  # an unknown label is an error now, not after the first roll-out

    def index(self, prompt: str) -> int:
        """The class that a prompt names: by its label, else by the longest label inside the prompt.

        Else the longest with all its words in it, in order (a cat is playing the guitar).
        """
        text = plain(prompt)
        if text in self.labels:
            return self.labels[text]
        inside = [label for label in self.labels if f" {label} " in f" {text} "]
        inside = inside or [label for label in self.labels if in_order(label.split(), text.split())]
        if not inside:
            near = get_close_matches(text, self.labels, n=3, cutoff=0) or list(self.labels)[:3]
            raise ValueError(
                f"no action of the classifier occurs in {prompt!r}; the nearest are "
                f"{', '.join(near)}. To score one action for every prompt, write action(label=…)"
            )
        return self.labels[max(inside, key=len)]

    def check_prompts(self, prompts):
        for prompt in prompts:
            self.index(self.label or str(prompt))

    def scores(self, frames, prompts):
        classes = [self.index(self.label or prompt) for prompt in prompts]
        classes = torch.tensor(classes, device=frames.device)
        pixels = self.pixels(frames)
        with position_table(self.classifier, pixels.shape[1]):
            log_probability = at_least_float32(self.classifier(pixels).logits).log_softmax(dim=-1)
        return log_probability.gather(1, classes[:, None])

    def pixels(self, frames: torch.Tensor) -> torch.Tensor:
        """The classifier's input, with the last frame repeated to fill the last tubelet."""
        self.check_frames(frames.shape[1])
        missing = -frames.shape[1] % self.config.tubelet_size
        frames = torch.cat([frames, frames[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        return preprocess(frames, self.config.image_size).to(self.dtype)


def plain(text: str) -> str:
    """Lower case words with one space between them, without punctuation."""
    return " ".join(re.findall(r"[\w'-]+", text.lower()))


def in_order(words: list[str], text: list[str]) -> bool:
    rest = iter(text)
    return all(word in rest for word in words)


@contextlib.contextmanager
def position_table(classifier: VideoMAEForVideoClassification, num_frames: int):
    """Inside, the classifier has positions for another number of frames than its configuration's.

    VideoMAE's positions are sines of a token's place, not weights: the table is the one that
    `from_pretrained(num_frames=…)`, VADER's way, would build.
    """
    config: Any = classifier.config
    embeddings = classifier.videomae.embeddings
    places = (config.image_size // config.patch_size) ** 2 * (num_frames // config.tubelet_size)
    before = embeddings.position_embeddings
    if places != before.shape[1]:
        embeddings.position_embeddings = get_sinusoid_encoding_table(places, config.hidden_size)
    try:
        yield
    finally:
        embeddings.position_embeddings = before


def action(
    checkpoint: StrPath = "published",
    label: str | None = None,
    *,
    dtype=torch.float32,
    from_config=False,
) -> Reward:
    """Recognition of the action in the prompt: its log-probability, 0 is certainty.

    Takes 2 or more frames; an odd number is made even by repeating the last. Frames are squashed
    to a square, as in VADER.

    Args:
        checkpoint: "published" (Kinetics-400's 400 actions, non-commercial;
            MCG-NJU/videomae-base-finetuned-kinetics), "tiny" (the eight motions of the tiny
            world), or a local `VideoMAEForVideoClassification` directory.
        label: the action, whatever the prompt.
    """
    place = find(checkpoint, "videomae-base-kinetics", tiny=TINY)
    options = {"zero": "attention.key.bias", "key_mapping": PUBLISHED_KEYS}
    classifier = hub.network(VideoMAEForVideoClassification, place, dtype, from_config, **options)
    if from_config and (label is None or isinstance(place, hub.Source)):
        label = next(iter(classifier.config.label2id))  # any one: memory does not depend on it
    return Action(classifier, label).identified(place, label=label)
