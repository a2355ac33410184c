"""A vision-language model as a judge: how much likelier "yes" is than "no" (as VQAScore, 2404.01291)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from .. import hub
from ..hub import Source, StrPath
from ..video import Video
from .base import Reward
from .networks import NetworkReward

QUESTION = (
    'These are frames of a video, in order. Does the video show "{prompt}"? Answer yes or no.'
)
ANSWERS = {"yes": ("Yes", "yes", " Yes", " yes"), "no": ("No", "no", " No", " no")}


class VLMYes(NetworkReward):
    """log p(yes) - log p(no) of the first token of a model's answer about a clip."""

    name, per_frame, differentiable = "vlm yes", False, False
    instead = "hps, image_reward or clip_score"

    def __init__(self, model: Any, processor: Any, question: str, num_frames: int):
        super().__init__([model])
        self.model, self.processor = model, processor
        self.question, self.num_frames = question, num_frames
        self.answers = first_tokens(processor.tokenizer)

    @torch.no_grad()
    def scores(self, frames, prompts):
        # One clip at a time: padding would let a clip's score depend on its neighbors.
        values = [self.score(clip, prompt) for clip, prompt in zip(frames, prompts)]
        return torch.stack(values).to(frames).unsqueeze(1)

    def score(self, clip: torch.Tensor, prompt: str) -> torch.Tensor:
        count = min(self.num_frames, len(clip))
        places = [(2 * i + 1) * len(clip) // (2 * count) for i in range(count)]  # evenly spread
        content: list[dict] = [{"type": "image", "image": x} for x in Video(clip[places]).images()]
        content.append({"type": "text", "text": self.question.replace("{prompt}", prompt)})
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, self.dtype)
        log_p = self.model(**inputs).logits[0, -1].float().log_softmax(-1)
        yes, no = (log_p[ids].logsumexp(0) for ids in self.answers)
        return yes - no


def first_tokens(tokenizer: Callable) -> list[list[int]]:
    """The ids of the tokens with which "yes" and "no" begin, however they are written.

    Raises:
        ValueError: they cannot be told apart.
    """
    begin = [
        {tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words}
        for words in ANSWERS.values()
    ]
    if shared := begin[0] & begin[1]:  # such as a space by itself, or the unknown token
        begin = [ids - shared for ids in begin]
    if not all(begin):
        raise ValueError("the model's tokenizer begins yes and no with the same token")
    return [sorted(ids) for ids in begin]


def vlm_yes(
    checkpoint: StrPath, question: str = QUESTION, *, num_frames: int = 8, dtype: Any = "auto"
) -> Reward:
    """log p(yes) - log p(no): how surely a vision-language model says yes to a question about a clip.

    For evaluation: the frames are rounded to 8 bits, so it has no gradient. 0 is undecided, 3 is 20
    to 1. All ways to write the two words count. (Diffusion-DRF, 2601.04153, trains on such a score
    through patched processors.)

    Args:
        checkpoint: an instruction-tuned image-text-to-text model that transformers has, with its
            processor and chat template: a repository of the hub, such as
            "HuggingFaceTB/SmolVLM2-2.2B-Instruct" (Apache-2.0), or a local directory.
        question: `{prompt}` stands for the clip's prompt; it should ask for yes or no.
        num_frames: that the model sees, as single images in order, evenly spread over the clip.
        dtype: of the weights; "auto": as they are stored.

    Raises:
        ValueError: the checkpoint has no chat template, or no words for yes and no.
        FileNotFoundError: it cannot be had.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames of vlm_yes must be at least 1, got {num_frames}")
    path = Path(checkpoint).expanduser()
    told: dict = {"size": "a model of your choice", "license": "license on its page"}
    told["local"] = f"vader_nb.rewards.vlm_yes('/path/to/{path.name}')"
    place = path if path.exists() else Source(str(checkpoint), **told)
    processor = hub.pretrained(AutoProcessor.from_pretrained, place)
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{checkpoint} has no chat template: use an instruction-tuned checkpoint")
    model = hub.network(AutoModelForImageTextToText, place, dtype)
    reward = VLMYes(model, processor, question, num_frames)
    return reward.identified(place, question=question, num_frames=num_frames)
