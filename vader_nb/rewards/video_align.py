"""VideoReward, VideoAlign's judge of generated videos (arXiv 2501.13918): Qwen2-VL with a head."""

import ast
import copy
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLModel, Qwen2VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from .. import hub
from ..hub import StrPath
from .base import _RECORD, Reward, at_least_float32
from .gallery import SOURCES, find
from .networks import NetworkReward, checkpointed

DIMENSIONS = {"VQ": "visual quality", "MQ": "motion quality", "TA": "text alignment"}
LEAST_FRAMES, MOST_FRAMES = 4, 768  # VideoAlign's vision_process.py; the rate is the checkpoint's
LEAST_PIXELS = 128 * 28 * 28
# Qwen2-VL's chat template, up to the video. Nothing after the last dimension's token is needed: a
# token sees only those before it.
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>",
    "<|vision_end|>",
)


class Network(nn.Module):
    def __init__(self, model: Any, outputs: int):
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.config.text_config.hidden_size, outputs, bias=False)


class VideoReward(NetworkReward):
    """The weighted sum of three dimensions, which are its parts: one pass gives them all.

    Two frames of a clip at a time are seen, and one clip at a time is read.

    Args:
        tokenizer: of Qwen2-VL; the tokens of the dimensions are the last three of the network's.
        instructions: the text before each of those tokens; "{text_prompt}" stands for the prompt.
        fps: of the clips.
        settings: the checkpoint's model_config.json.
    """

    name, unit, per_frame, min_frames = "video reward", "std", False, 2
    frames_at_once = 2  # pairs of frames

    def __init__(self, network: Network, tokenizer, instructions, fps: float, settings: dict):
        model, self.head = network.model, network.head
        self.visual, self.reader = model.visual, model.language_model
        super().__init__([network], [*self.visual.blocks, *self.reader.layers])
        self.tokenizer, self.fps, self.rate = tokenizer, fps, settings["data_config"]["fps"]
        self.instructions = (CHAT[0], CHAT[1] + instructions[0], *instructions[1:])
        self.scale = settings["inference_config"]
        self.weights = dict.fromkeys(DIMENSIONS, 1.0)
        self.limits = LEAST_PIXELS, settings["data_config"]["max_frame_pixels"]
        sizes = model.config.vision_config
        self.processor = Qwen2VLVideoProcessor(
            size=dict(zip(("shortest_edge", "longest_edge"), self.limits)),
            patch_size=sizes.patch_size,
            temporal_patch_size=sizes.temporal_patch_size,
            merge_size=sizes.spatial_merge_size,
            do_rescale=False,
            cap_pixels_per_frame=False,  # the cap is `longest_edge`
        )

    def weighted(self, weights: dict[str, float], *places: hub.Source | Path) -> "VideoReward":
        """A copy with weights of some dimensions; it shares the network."""
        twin = copy.copy(self)
        twin.weights = weights
        if list(weights.values()) == [1.0]:
            twin.name = DIMENSIONS[next(iter(weights))]
        else:
            twin.children = tuple(self.weighted({d: 1.0}, *places) for d in weights)
        twin.identified(*places, fps=self.fps, **weights)
        return twin

    def chosen(self, count: int) -> torch.Tensor:
        """Indices of the frames seen, out of `count`: an even number, evenly spread."""
        most = min(MOST_FRAMES, count // 2 * 2)
        number = min(max(count / self.fps * self.rate, LEAST_FRAMES), most)
        return torch.linspace(0, count - 1, round(number / 2) * 2).round().long()

    def patches(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches (B, pairs, P, D) of the frames that are seen, and their places (P, 2)."""
        clips = frames[:, self.chosen(frames.shape[1]).to(frames.device)]
        pixels = self.processor(videos=[*clips], return_tensors="pt")["pixel_values_videos"]
        patch, merge = self.processor.patch_size, self.processor.merge_size
        height, width = frames.shape[-2:]
        sides = smart_resize(height, width, patch * merge, *self.limits)
        down, across = (side // patch for side in sides)
        rows = (torch.arange(n, device=frames.device) for n in (down, across))
        # Square blocks of patches follow each other, which the network will merge.
        blocks = torch.cartesian_prod(*rows).view(down // merge, merge, across // merge, merge, 2)
        places = blocks.transpose(1, 2).flatten(0, 3)
        return pixels.unflatten(0, (len(clips), -1, len(places))).to(self.dtype), places

    def watch(self, frames: torch.Tensor) -> torch.Tensor:
        """What the language model gets to see of each clip, (B, N, D)."""
        patches, places = self.patches(frames)

        def see(pairs):
            count, size = pairs.shape[:2]  # pairs do not look at each other
            # An array, not a tensor: to wait for its numbers on a GPU costs time, and fake ones have none.
            ends = np.arange(count + 1) * size
            where = {"position_ids": places.repeat(count, 1), "cu_seqlens": ends}
            seen = self.visual(pairs.flatten(0, 1), None, **where).pooler_output
            return seen.unflatten(0, (count, -1))

        return self.per_picture(see, patches).flatten(1, 2)

    def read(self, video: torch.Tensor, prompt: str) -> torch.Tensor:
        """The raw scores (3,) of one clip (N, D)."""
        embed, options = self.reader.embed_tokens, {"add_special_tokens": False}
        own = torch.arange(-3, 0, device=video.device) + embed.num_embeddings
        rows, ends = [], []
        for piece, last in zip(self.instructions, [video, *embed(own).split(1)]):
            text = piece.replace("{text_prompt}", prompt)
            tokens = self.tokenizer(text, return_tensors="pt", **options)["input_ids"]
            rows += [embed(tokens[0].to(video.device)), last]
            ends.append(sum(map(len, rows)) - 1)
        # Plain positions, not Qwen2-VL's three-axis ones: it was trained with a forward pass without them.
        states = self.reader(inputs_embeds=torch.cat(rows)[None], use_cache=False).last_hidden_state
        scores = F.linear(*map(at_least_float32, (states[0, ends[1:]], self.head.weight)))
        return scores.diagonal() if scores.shape[1] == 3 else scores.squeeze(1)

    def dimensions(self, frames: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Scores (B, 1) of each dimension, in standard deviations from the mean."""
        read = checkpointed(self.read) if len(prompts) > 1 else self.read
        scores = torch.stack([read(*pair) for pair in zip(self.watch(frames), prompts)])
        columns, scale = zip(DIMENSIONS, scores.split(1, dim=1)), self.scale
        return {d: (x - scale[f"{d}_mean"]) / scale[f"{d}_std"] for d, x in columns}

    def scores(self, frames, prompts):
        self.check_frames(frames.shape[1])
        values = self.dimensions(frames, prompts)
        if (record := _RECORD.get()) is not None:
            for dimension, child in zip(self.weights, self.children):
                record.setdefault(child.name, []).append(values[dimension].detach())
        return sum(weight * values[d] for d, weight in self.weights.items())


def merged(weights: dict[str, torch.Tensor], scale: float, dtype: torch.dtype) -> dict:
    """The tensors of a `Network`, from a published file: adapters are added to their weights."""
    result = {}
    for key, value in weights.items():
        name = key.removeprefix("base_model.model.")
        if ".lora_" in name or name == "lm_head.weight":
            continue
        if name.endswith(".base_layer.weight"):
            stem = key.removesuffix("base_layer.weight")
            down, up = (weights[f"{stem}lora_{side}.default.weight"] for side in "AB")
            value = value.float() + scale * up.float() @ down.float()
        name = re.sub("^model", "model.language_model", name).replace(".base_layer.", ".")
        name = re.sub("^visual", "model.visual", name).replace("rm_head", "head")
        result[name] = value.to(dtype)
    return result


def load(path: Path, base: hub.Source | Path, settings: dict, dtype: torch.dtype) -> Network:
    """The network of a checkpoint file on Qwen2-VL's configuration.

    Raises:
        ValueError: the file is another's, or does not fit the configuration.
    """
    lora = settings["peft_lora_config"]
    rank = math.sqrt(lora["lora_r"]) if lora.get("use_rslora") else lora["lora_r"]
    problem = f"{path} does not hold VideoReward's weights on {base}"
    try:
        weights = merged(hub.state_dict(path, mmap=True), lora["lora_alpha"] / rank, dtype)
        vocabulary = len(weights["model.language_model.embed_tokens.weight"])
        outputs = len(weights["head.weight"])
    except KeyError as error:
        raise ValueError(f"{problem}: it lacks {error}") from error
    config = hub.pretrained(Qwen2VLConfig.from_pretrained, base)
    config.text_config.vocab_size = vocabulary
    with torch.device("meta"):  # no memory, no random numbers
        network = Network(Qwen2VLModel(config), outputs)
    hub.fill(network, weights, problem)
    model: Any = network.model  # and what no file holds
    model.visual.rotary_pos_emb = type(model.visual.rotary_pos_emb)(config.vision_config)
    model.language_model.rotary_emb = type(model.language_model.rotary_emb)(config.text_config)
    return network.to(dtype)


def read_instructions(path: Path) -> list[str]:
    """The text before each dimension's token, from VideoAlign's prompt_template.py, which is not run."""
    known = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign([ast.Name(name)], ast.Constant(str() as text)) if name == known:
                parts = re.split("|".join(rf"<\|{d}_reward\|>" for d in DIMENSIONS), text)
                if len(parts) == 4 and "{text_prompt}" in parts[2]:
                    return parts[:3]
    raise ValueError(f"{path} has no {known} with the tokens of {', '.join(DIMENSIONS)}")


def newest(folder: Path) -> Path:
    """The weights of a directory's last checkpoint."""
    found = list(folder.glob("checkpoint-*/model.pth"))
    if not found:
        raise FileNotFoundError(f"{folder} has no checkpoint-*/model.pth")
    return max(found, key=lambda path: int(path.parent.name.removeprefix("checkpoint-")))


def video_reward(
    checkpoint: StrPath = "published",
    *,
    fps: float,
    vq=1.0,
    mq=1.0,
    ta=1.0,
    base: StrPath = "published",
    dtype=torch.float32,
    from_config=False,
) -> Reward:
    """How much people would like a generated video: visual and motion quality, fit to the prompt.

    Each dimension is in standard deviations from the mean of its authors' videos, so bad clips are
    negative; `.parts()` has them apart. Two frames per second are seen and get a gradient (four at
    least, an even number), as pictures of 100,352 to 200,704 pixels.

    Args:
        checkpoint: "published" (KwaiVGI/VideoReward, 2.2 B parameters), or a local directory with
            model_config.json, checkpoint-*/model.pth and VideoAlign's prompt_template.py.
        fps: frames per second that the clips are made for. With a wrong one, motion looks too fast
            or too slow, and good clips score below zero.
        vq, mq, ta: weights of the three dimensions; 0: leave it out.
        base: Qwen2-VL's configuration and tokenizer; "published" (Qwen/Qwen2-VL-2B-Instruct), or a
            local directory.
        dtype: bfloat16 is what it was trained in.

    Raises:
        ValueError: fps is not positive, all weights are 0, or the files do not fit together.
    """
    if not 0 < fps < math.inf:
        raise ValueError(
            f"fps={fps} must be a positive number: the frame rate of the clips, such as 8 or 16"
        )
    used = {d: float(x) for d, x in zip(DIMENSIONS, (vq, mq, ta)) if x}
    if not used:
        raise ValueError("vq, mq and ta are all 0: give at least one dimension a weight")
    place, qwen = find(checkpoint, "video-reward"), find(base, "qwen2-vl-2b")
    if isinstance(place, hub.Source):
        path, text, settings = place, SOURCES["video-align-prompt"], dict(place.config)
    else:
        path, text = newest(place), place / "prompt_template.py"
        settings = json.loads(hub.single_file(place / "model_config.json").read_text("utf-8"))
    tokenizer: Any = hub.tokenizer(qwen, from_config)
    if from_config:
        network = Network(hub.network(Qwen2VLModel, qwen, from_config=True), 3)
        tokenizer = functools.partial(tokenizer, max_length=225)  # 900 tokens, as the real text has
        instructions = [""] * 3
    else:
        instructions = read_instructions(hub.single_file(text))
        network = load(hub.single_file(path), qwen, settings, dtype)
        room = network.model.config.text_config.vocab_size - len(DIMENSIONS)
        if len(tokenizer) > room:
            raise ValueError(f"{qwen} has {len(tokenizer)} tokens, more than the {room} of {path}")
    judge = VideoReward(network, tokenizer, instructions, fps, settings)
    return judge.weighted(used, *dict.fromkeys((path, place, qwen)))
