"""What published rewards need in float16: `python -m tests.benchmarks.reward_memory`.

The full-size network of each is built from its published configuration as fake tensors (shapes without numbers: no
download, no memory), and scores one clip of 16 frames of 256 x 256 pixels, forwards and backwards, as the package
does it. Counted are the weights, and the most that lives beside them at one moment (`vader_nb.memory.Peak`), against
the same without checkpointing and chunks.
"""

import json
import sys
from pathlib import Path

import open_clip
import torch
import transformers as hf
from torch._subclasses.fake_tensor import FakeTensorMode

from vader_nb.memory import Peak
from vader_nb.rewards import clip, detection, heads
from vader_nb.rewards.action import Action
from vader_nb.rewards.base import wide
from vader_nb.rewards.text_video import TextVideo

FRAMES = (1, 16, 3, 256, 256)
PROMPT = "playing guitar"


def hps():
    config = json.loads((Path(open_clip.__file__).parent / "model_configs" / "ViT-H-14.json").read_text())
    towers = clip.open_clip_towers(open_clip.CLIP(**config), open_clip.get_tokenizer("ViT-H-14"))
    return clip.Comparison(towers, "hps"), towers


LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
HUGE = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}


def picture_tower(**config):
    """Of transformers' CLIP, under a head of one layer (the published ones are equal to one). Prompts' vectors are kept,
    so that their tower adds nothing to a clip."""
    model = hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**config))
    blocks = [*model.vision_model.encoder.layers]
    towers = clip.CLIP(model, lambda pixels: model(pixel_values=pixels).image_embeds, None, 224, blocks)
    head = {"layers.0.weight": torch.zeros(1, model.config.projection_dim), "layers.0.bias": torch.zeros(1)}
    return heads.Rated(towers, head, "aesthetic", (1.0, 10.0)), towers


def kinetics():
    labels = {i: f"action {i}" for i in range(400)} | {0: PROMPT}
    names = {name: i for i, name in labels.items()}
    config = hf.VideoMAEConfig(id2label=labels, label2id=names, use_mean_pooling=True)
    reward = Action(hf.VideoMAEForVideoClassification(config))
    return reward, reward


def x_clip():
    reward = TextVideo(hf.XCLIPModel(hf.XCLIPConfig()), None)
    reward.read = lambda prompts: torch.zeros(len(prompts), 512, dtype=torch.float16)
    return reward, reward


def yolos():
    shape = {
        "hidden_size": 192,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "use_mid_position_embeddings": False,
    }
    names = {i: f"thing {i}" for i in range(90)} | {90: "book"}
    config = hf.YolosConfig(image_size=[800, 1333], id2label=names, label2id={v: k for k, v in names.items()}, **shape)
    reward = detection.ObjectRemoval(detection.Yolos(hf.YolosForObjectDetection(config), "book"))
    return reward, reward


BUILD = {
    "aesthetic": lambda: picture_tower(**LARGE, patch_size=14, projection_dim=768),
    "hps": hps,
    "pickscore": lambda: picture_tower(**HUGE, patch_size=14, projection_dim=1024),
    "clip_score": lambda: picture_tower(),
    "action": kinetics,
    "text_video": x_clip,
    "object_removal": yolos,
}


def measure(name: str, plain: bool = False) -> tuple[float, float]:
    """Gigabytes of the weights, and beside them."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.float16)  # fake weights cannot be converted
        reward, network = BUILD[name]()
        torch.set_default_dtype(torch.float32)
        if plain:
            network.frames_at_once = FRAMES[1]
            for part in network.networks:
                for module in part.modules():
                    module.__dict__.pop("forward", None)  # the checkpointed one hides the class's own
        frames = torch.empty(FRAMES, dtype=torch.float16).fill_(0.5).requires_grad_()
        weights = sum(p.nbytes for part in network.networks for p in part.parameters())
        reward.scores(wide(frames.detach()), [PROMPT])
        with Peak() as peak:
            reward.scores(wide(frames), [PROMPT]).sum().backward()
    return weights / 1e9, peak.bytes / 1e9


if __name__ == "__main__":
    print(f"{'reward':<22}{'weights':>9}{'beside':>9}{'plain':>9}   GB, float16, 16 frames of 256 x 256")
    for name in sys.argv[1:] or BUILD:
        weights, beside = measure(name)
        print(f"{name:<22}{weights:9.2f}{beside:9.2f}", end="", flush=True)
        print(f"{measure(name, plain=True)[1]:9.2f}", flush=True)
