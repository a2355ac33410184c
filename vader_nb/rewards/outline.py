"""Published rewards without their weights: the same classes around networks made from their configurations.

For fake tensors (`vader_nb.memory`), which have sizes but no numbers: no download, no memory. Functions bear the names
and take the arguments of the rewards themselves, of which only those count here that change what has to be computed.
What is made has torch's default dtype.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import open_clip
import torch
import transformers as hf
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torchvision.models.optical_flow import raft_small

from . import clip, detection, flow, heads, vjepa
from .action import TINY as TINY_ACTION
from .action import Action
from .base import Reward
from .image_reward import ImageReward
from .pixels import brightness, colorfulness, compressibility, incompressibility, motion_smoothness  # noqa: F401
from .text_video import TextVideo

LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
HUGE = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
HUGE_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
CLIPS = {
    "clip-vit-base-patch32": {"projection_dim": 512},
    "clip-vit-large-patch14": {
        "projection_dim": 768,
        "text_config": TEXT,
        "vision_config": {**LARGE, "patch_size": 14},
    },
    "pickscore-v1": {
        "projection_dim": 1024,
        "text_config": {**HUGE_TEXT, "hidden_act": "gelu"},
        "vision_config": {**HUGE, "patch_size": 14, "hidden_act": "gelu"},
    },
}


class Tokens:
    """In place of a tokenizer: as many tokens as it would make, all of them 1."""

    def __call__(self, prompts: list[str], *, max_length: int, **options) -> hf.BatchEncoding:
        ids = torch.ones(len(prompts), max_length, dtype=torch.long)
        return hf.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def in_directory(folder: str | Path, kind: type, **otherwise):
    """The configuration of a checkpoint directory, or of what is published."""
    return kind.from_pretrained(folder) if Path(folder).is_dir() else kind(**otherwise)


def open_clip_towers(folder: Path | None, **look) -> clip.CLIP:
    configs = Path(open_clip.__file__).parent / "model_configs"
    file = folder / "open_clip_config.json" if folder else configs / "ViT-H-14.json"
    config = json.loads(file.read_text())
    config = {
        key: value for key, value in config.get("model_cfg", config).items() if key != "custom_text"
    }
    with clip.quiet():
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}" if folder else "ViT-H-14")
    return clip.open_clip_towers(open_clip.CLIP(**config), tokenizer, **look)


def hps(checkpoint="published", *, version=None, resize="squash", verify=True) -> Reward:
    folder = clip.TINY if checkpoint == "tiny" else Path(checkpoint)
    return clip.Comparison(
        open_clip_towers(folder if folder.is_dir() else None, resize=resize), "hps"
    )


def pickscore(checkpoint="published", *, resize="squash") -> Reward:
    config = in_directory(checkpoint, hf.CLIPConfig, **CLIPS["pickscore-v1"])
    return clip.Comparison(
        clip.towers_of(hf.CLIPModel(config), Tokens(), resize=resize), "pickscore", tempered=True
    )


def clip_score(checkpoint="published", *, resize="crop") -> Reward:
    published = CLIPS.get(str(checkpoint), CLIPS["clip-vit-base-patch32"])
    config = in_directory(checkpoint, hf.CLIPConfig, **published)
    return clip.Comparison(
        clip.towers_of(hf.CLIPModel(config), Tokens(), resize=resize), "clip_score"
    )


def rated(
    checkpoint, sizes: tuple[int, ...], name: str, resize: str = "squash", **options
) -> Reward:
    config = in_directory(
        checkpoint, hf.CLIPVisionConfig, **LARGE, patch_size=14, projection_dim=768
    )
    head = {}
    for n, (inside, outside) in enumerate(zip(sizes, sizes[1:])):
        head |= {
            f"layers.{n}.weight": torch.zeros(outside, inside),
            f"layers.{n}.bias": torch.zeros(outside),
        }
    towers = clip.picture_tower_of(hf.CLIPVisionModelWithProjection(config), resize=resize)
    return heads.Rated(towers, head, name, (0.0, 1.0), **options)


def aesthetic(checkpoint="published", head=None, *, resize="squash") -> Reward:
    folder = clip.TINY if checkpoint == "tiny" else Path(checkpoint)
    if (folder / "aesthetic_head.safetensors").is_file():
        towers = open_clip_towers(folder, resize=resize)
        width = towers.network.visual.output_dim
        layers = {"layers.0.weight": torch.zeros(1, width), "layers.0.bias": torch.zeros(1)}
        return heads.Rated(towers, layers, "aesthetic", (1.0, 10.0))
    return rated(checkpoint, heads.LAION_SIZES, "aesthetic", resize)


def aesthetic_hps(checkpoint="published", *, resize="squash") -> Reward:
    beauty = aesthetic(checkpoint, resize=resize).towards(10)
    return 0.075 * beauty + 0.5 * hps(checkpoint, resize=resize).towards(1)


def compression(head, checkpoint="published") -> Reward:
    return -rated(checkpoint, heads.COMPRESSION_SIZES, "compression", between=torch.relu)


def rainy(head, checkpoint="published") -> Reward:
    return rated(checkpoint, heads.LAION_SIZES, "rainy", after=torch.sigmoid)


def snowy(head, checkpoint="published") -> Reward:
    return rated(checkpoint, heads.LAION_SIZES, "snowy", after=torch.sigmoid)


def action(checkpoint="published", label=None) -> Reward:
    folder = TINY_ACTION if checkpoint == "tiny" else checkpoint
    names = {f"action {i}": i for i in range(400)}
    published = {
        "label2id": names,
        "id2label": {i: name for name, i in names.items()},
        "use_mean_pooling": True,
    }
    config = in_directory(folder, hf.VideoMAEConfig, **published)
    return Action(hf.VideoMAEForVideoClassification(config), label or next(iter(config.label2id)))


def text_video(checkpoint="published") -> Reward:
    return TextVideo(hf.XCLIPModel(in_directory(checkpoint, hf.XCLIPConfig)), Tokens())


def image_reward(checkpoint="published") -> Reward:
    vision = hf.BlipVisionConfig(**LARGE, image_size=224, patch_size=16)
    words = {
        "vocab_size": 30524,
        "encoder_hidden_size": 1024,
        "max_position_embeddings": 512,
        "is_decoder": True,
    }
    text = hf.BlipTextModel(hf.BlipTextConfig(**TEXT, num_hidden_layers=12, **words), False)
    return ImageReward(hf.BlipVisionModel(vision), text, torch.nn.Linear(768, 1), Tokens())


def temporal_consistency(checkpoint="published", *, seed=0) -> Reward:
    model = hf.VJEPA2Model(in_directory(checkpoint, hf.VJEPA2Config))
    with unset_fake_temporarily():  # masks are drawn, and their places counted
        return vjepa.TemporalConsistency(model, seed)


def flow_smoothness(checkpoint="published", *, floor=0.0) -> Reward:
    with default_dtype(torch.float32):  # as `FlowSmoothness.to` keeps it
        return flow.FlowSmoothness(raft_small(weights=None), floor)


def yolos(target: str, detector: str | Path) -> detection.Yolos:
    shape = {
        "hidden_size": 192,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "image_size": [800, 1333],
    }
    if detector != "yolos-tiny":
        raise ValueError(
            f"the memory of detector {str(detector)!r} cannot be simulated, only that of yolos-tiny"
        )
    target = target.lower().strip(" .")
    labels = {i: f"thing {i}" for i in range(90)} | {90: target}
    names = {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}
    config = hf.YolosConfig(**shape, **names, use_mid_position_embeddings=False)
    return detection.Yolos(hf.YolosForObjectDetection(config), target)


def object_removal(target="book", detector="yolos-tiny") -> Reward:
    return detection.ObjectRemoval(yolos(target, detector))


def object_presence(target, detector="yolos-tiny") -> Reward:
    return detection.ObjectPresence(yolos(target, detector))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The dtype in which networks are made inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
