"""VADER's action reward: a VideoMAE classifier (arXiv 2203.12602) recognises what the prompt asks for."""

from difflib import get_close_matches
from pathlib import Path

import torch
from transformers import VideoMAEForVideoClassification

from .base import Reward
from .clip import preprocess

TINY = Path(__file__).parent.parent / "zoo" / "weights" / "tiny-videomae"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which the checkpoints are trained with


class Action(Reward):
    """Log-probability of the class that the prompt names, from the whole clip; exp of it is VADER's
    reported reward. Through log-softmax, which cannot overflow in half precision."""

    name, range, unit, per_frame = "action", (-float("inf"), 0.0), "log-probability", False

    def __init__(self, classifier: VideoMAEForVideoClassification, label: str | None = None):
        self.classifier = classifier.eval().requires_grad_(False)
        self.labels = {name.lower(): i for name, i in classifier.config.label2id.items()}
        self.label = label
        if label is not None:
            self.index(label)  # an unknown label is an error now, not after the first roll-out

    def index(self, prompt: str) -> int:
        """The class a prompt names: the label itself, else the longest label inside the prompt."""
        text = " ".join(prompt.lower().split())
        inside = [label for label in self.labels if label in text]
        if not inside:
            near = get_close_matches(text, self.labels, n=3, cutoff=0) or list(self.labels)[:3]
            raise ValueError(f"no action of the classifier occurs in {prompt!r}; the nearest are {', '.join(near)}")
        return self.labels[max(inside, key=len)]

    def scores(self, frames, prompts):
        config = self.classifier.config
        if frames.shape[1] < 2:
            raise ValueError(f"the action reward needs at least 2 frames, got {frames.shape[1]}; score all frames")
        wanted = torch.tensor([self.index(self.label or prompt) for prompt in prompts], device=frames.device)
        # The classifier takes a fixed number of frames: pick that many, evenly spread, repeating if need be.
        place = torch.linspace(0, frames.shape[1] - 1, config.num_frames).round().long()
        dtype = self.classifier.dtype
        pixels = preprocess(frames[:, place].flatten(0, 1), config.image_size, MEAN, STD).to(dtype)
        logits = self.classifier(pixels.unflatten(0, (len(frames), config.num_frames))).logits
        log_probability = logits.to(torch.promote_types(dtype, torch.float32)).log_softmax(dim=-1)
        return log_probability.gather(1, wanted[:, None])

    def to(self, *args, **kwargs):
        self.classifier.to(*args, **kwargs)
        return self


def action(checkpoint: str | Path = "tiny", label: str | None = None) -> Reward:
    """Recognition of the action in the prompt, or always of `label`. checkpoint: "tiny" (the eight motions
    of the tiny world), or a `VideoMAEForVideoClassification` directory."""
    folder = TINY if checkpoint == "tiny" else Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a VideoMAE directory: it has no config.json")
    return Action(VideoMAEForVideoClassification.from_pretrained(folder, dtype=torch.float32), label)
