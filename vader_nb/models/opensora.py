"""Open-Sora 1.2 (github.com/hpcaitech/Open-Sora), for which diffusers has no pipeline.

Its networks are in `opensora_networks`; T5 and the schedule are transformers' and diffusers'. Latents
come in chunks: 17 frames are 5 latents, and what is left of a clip takes one per 4 frames. If a chunk
decodes to too many frames, the first ones are cut.
"""

import html
import inspect
import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from diffusers.utils.import_utils import is_bs4_available, is_ftfy_available
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from .. import hub as weights
from ..hub import DummyTokenizer
from . import texts
from .base import Conditioning, cached, is_flow, read_config, warn_truncated
from .opensora_networks import OpenSoraVAE, STDiT3, STDiT3Block, TemporalVAE
from .t5 import T5_XXL
from .texts import TextOnDisk

# The published architecture, for `from_config`; what is missing here is the classes' own default.
PUBLISHED = {
    "transformer": {},
    "vae": {
        "vae_2d": {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
        },
        "vae_temporal": {},
    },
    "text_encoder": T5_XXL,
    "scheduler": {"shift": 1.0},
}
DEFAULTS = {"num_inference_steps": 30, "guidance_scale": 7.0, "num_frames": 51, "fps": 24}
DEFAULTS |= {"height": 276, "width": 368}
# Sizes of Open-Sora's own tables that are no multiples of 8: frames are up to 7 pixels smaller.
SIZES = ((240, 426), (276, 368), (370, 278), (426, 240), (416, 554), (554, 416))
SIZES += ((480, 854), (554, 738), (740, 555), (854, 480))
IMAGE_FPS = 120  # what the network was told in training of clips of one frame
QUALITY = " aesthetic score: 6.5."  # what it was trained to read after a caption of good clips
CACHED_PROMPTS = 1000  # prompts whose embeddings a model keeps: 8 kB per token in half precision


class OpenSora(TextOnDisk):
    """`STDiT3` with T5's text encoder, and autoencoders over time and over space.

    Latents cannot tell apart clips whose lengths differ by less than 4 frames: `decode` uses the latest
    settings that made clips with this many latents.
    """

    targets = {"transformer": ("qkv", "q_linear", "kv_linear")}
    feed_forward = ("mlp.fc1", "mlp.fc2")
    sampling_options = {"fps": 24}
    option_bounds = {"fps": (1, 1000)}
    independent_frames = False
    scale = 8  # pixels per latent

    def __init__(
        self, name, transformer, vae, text_encoder, tokenizer, scheduler, defaults, world=None
    ):
        self.name, self.world, self.vae = name, world, vae
        self.denoisers = {"transformer": transformer}
        self.text_encoder, self.tokenizer, self.scheduler = text_encoder, tokenizer, scheduler
        self.defaults = DEFAULTS | defaults
        self._embeddings: dict[str, torch.Tensor] = {}  # on the CPU, without padding
        self._lengths: dict[int, Any] = {}  # number of latents -> frames of such clips
        for module in self.modules():
            module.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls, checkpoint, *, name: str, dtypes: dict[str, torch.dtype], **hub
    ) -> "OpenSora":
        """Load the parts of a directory that `save_pretrained` wrote, or the published ones, see `models.load`.

        The directory has a subfolder for each part; `transformer` and `vae` hold `config.json` and
        `model.safetensors` of the published layout.
        """
        folder, scheduler = checkpoint.directory, getattr(diffusers, checkpoint.scheduler)
        shared = {key: value for key, value in hub.items() if key != "revision"}

        def place(part: str) -> str:
            return str(folder / part) if folder else checkpoint.parts.get(part, checkpoint.source)

        def dtype(part: str) -> torch.dtype:
            return dtypes.get(part, dtypes["default"])

        return cls(
            name,
            read_network("transformer", place("transformer"), **hub).to(dtype("transformer")),
            read_network("vae", place("vae"), **shared).to(dtype("vae")),
            texts.from_pretrained(
                T5EncoderModel,
                place("text_encoder"),
                "",
                checkpoint,
                shared | {"dtype": dtype("text_encoder")},
            ),
            AutoTokenizer.from_pretrained(place("tokenizer"), **shared),
            scheduler.from_config(
                read_config(folder / "scheduler") if folder else PUBLISHED["scheduler"]
            ),
            checkpoint.defaults,
            checkpoint.world,
        )

    @classmethod
    def from_config(cls, checkpoint, *, name: str) -> "OpenSora":
        """The architecture of a directory's configuration, or the published one, see `models.from_config`."""
        folder = checkpoint.directory
        config = {part: read_config(folder / part) for part in PUBLISHED} if folder else PUBLISHED
        tokenizer = (
            AutoTokenizer.from_pretrained(folder / "tokenizer") if folder else DummyTokenizer()
        )
        with unset_fake_temporarily():  # the values of its tables are read, not only their sizes
            scheduler = getattr(diffusers, checkpoint.scheduler).from_config(config["scheduler"])
        return cls(
            name,
            network_of("transformer", config["transformer"]),
            network_of("vae", config["vae"]),
            texts.from_config(T5EncoderModel, T5Config(**config["text_encoder"]), checkpoint),
            tokenizer,
            scheduler,
            checkpoint.defaults,
            checkpoint.world,
        )

    def pipeline(self):
        """Raises NotImplementedError: diffusers has none."""
        raise NotImplementedError(
            f"{self.name!r} is Open-Sora, for which diffusers has no pipeline: sample with vader_nb.sample, "
            "and save with save_pretrained"
        )

    def save_parts(self, folder: Path) -> None:
        index: dict[str, Any] = {"_class_name": "OpenSoraPipeline"}
        parts = vars(self) | self.denoisers
        for name in (*PUBLISHED, "tokenizer"):
            part: Any = texts.whole(parts[name])
            kind = type(part)
            index[name] = [kind.__module__.partition(".")[0], kind.__name__]
            if name in ("transformer", "vae"):
                part.save_config(folder / name)
                save_file(part.state_dict(), folder / name / "model.safetensors", {"format": "pt"})
            else:
                part.save_pretrained(folder / name)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    def modules(self) -> list[nn.Module]:
        return [self.denoiser, self.vae, self.text_encoder]

    def decoders(self) -> list[nn.Module]:
        image, time = self.vae.spatial_vae["module"], self.vae.temporal_vae
        return [time.post_quant_conv, time.decoder, image.post_quant_conv, image.decoder]

    def blocks(self) -> list[nn.Module]:
        return [part for part in self.denoiser.modules() if isinstance(part, STDiT3Block)]

    # ------------------------------------------------------------------ the text

    def texts(self, prompts) -> dict[str, list[str]]:
        columns = super().texts(prompts)
        columns["prompt"] = [text + QUALITY for text in columns["prompt"]]
        return {branch: [cleaned(text) for text in column] for branch, column in columns.items()}

    def encode(self, prompts, sampling: Any = None, generators=None) -> Conditioning:
        """T5's states of the captions, and what else the denoiser is told: frame rate and size.

        The negative branch has learned states in the place of the empty text, with as many tokens as the
        caption has.
        """
        columns = self.texts(prompts)
        self.latent_shape(sampling)  # raises for invalid sizes, before T5 runs
        self.encode_texts(prompts)
        captions, negatives = columns["prompt"], columns["negative"]
        both = captions + [text for text in negatives if text]
        states = cached(self._embeddings, both, self._embed, CACHED_PROMPTS)
        learned = self.denoiser.get_buffer("y_embedder.y_embedding").to("cpu")
        chosen = {
            "negative": [
                states[negative] if negative else learned[: len(states[caption])]
                for negative, caption in zip(negatives, captions)
            ],
            "prompt": [states[caption] for caption in captions],
        }
        fps = sampling.options["fps"] if sampling.num_frames > 1 else IMAGE_FPS
        numbers = [float(fps), sampling.height, sampling.width]
        numbers = torch.tensor([numbers] * len(prompts), device=self.device)
        told = {"fps": numbers[:, 0], "size": numbers[:, 1:]}
        branches = {name: self._padded(rows, len(learned)) | told for name, rows in chosen.items()}
        return Conditioning(branches)

    def _padded(self, rows: list[torch.Tensor], length: int) -> dict[str, torch.Tensor]:
        padded = torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])
        mask = torch.stack([torch.arange(length) < len(row) for row in rows])
        return {"encoder_hidden_states": padded.to(self.device), "mask": mask.to(self.device)}

    @torch.no_grad()
    def _embed(self, text: str) -> torch.Tensor:
        """The text encoder's states (tokens, width), on the CPU; without padding, which it would not see."""
        self.onload(self.text_encoder)
        length = len(self.denoiser.get_buffer("y_embedder.y_embedding"))
        warn_truncated(self.tokenizer, text, length)
        tokens = self.tokenizer(text, max_length=length, truncation=True, return_tensors="pt")
        states = self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state[0]
        return states.to("cpu", self.dtype)

    # ------------------------------------------------------------------ denoising

    def latents_of(self, frames: int) -> int:
        """The number of latents of a clip of so many frames."""
        size = self.vae.micro_frame_size
        whole, rest = divmod(frames, size)
        return whole * -(-size // 4) + -(-rest // 4)

    def latent_shape(self, sampling) -> tuple[int, int, int, int]:
        size = sampling.height, sampling.width
        if size not in SIZES and any(n < self.scale or n % self.scale for n in size):
            own = ", ".join(f"{height}x{width}" for height, width in SIZES)
            raise ValueError(
                f"height={size[0]} and width={size[1]} must be positive multiples of {self.scale} pixels "
                f"for {self.name}, or one of Open-Sora's own sizes, from which up to 7 pixels are cut: {own}"
            )
        count = self.latents_of(sampling.num_frames)
        self._lengths[count] = sampling.num_frames  # for `decode`, which is given latents alone
        height, width = (n // self.scale for n in size)
        channels = int(self.denoiser.get_parameter("x_embedder.proj.weight").shape[1])
        return channels, count, height, width

    def new_scheduler(self, sampling):
        """A schedule with more steps at high noise for larger and longer clips."""
        if not is_flow(self.scheduler):
            raise ValueError(
                f"{self.name!r} is a rectified flow: {type(self.scheduler).__name__} cannot sample it, "
                "FlowMatchEulerDiscreteScheduler(shift=1.0) can"
            )
        scheduler, steps = deepcopy(self.scheduler), sampling.num_inference_steps
        pixels = sampling.height * sampling.width
        # The published code has 5 * (frames // 17) for the latents, which is 0 for 2 to 16 frames.
        ratio = (pixels / 512**2 * self.latents_of(sampling.num_frames)) ** 0.5
        times = [1 - i / steps for i in range(steps)]
        sigmas = [ratio * t / (1 + (ratio - 1) * t) for t in times]
        scheduler.set_timesteps(sigmas=sigmas, device=self.device)
        return scheduler

    def predict(self, latents, t, inputs) -> torch.Tensor:
        self.onload(self.denoiser)
        # diffusers' schedulers expect noise - clean, and the network predicts clean - noise.
        return -self.denoiser(latents, t.expand(len(latents)), **inputs)

    # ------------------------------------------------------------------ decoding

    def chunks(
        self, latents: torch.Tensor, frames: list[int]
    ) -> Iterator[tuple[torch.Tensor, list[int], list[int]]]:
        """For each chunk that holds one of these frames: the image autoencoder's latents of the whole chunk,
        and the frames' places in it and in `frames`."""
        self.onload(*self.decoders())
        size, count = self.vae.micro_frame_size, self.length(latents)
        step, frames = self.latents_of(size), [range(count)[frame] for frame in frames]
        for start in range(0, count, size):
            places = [i for i, frame in enumerate(frames) if start <= frame < start + size]
            if places:
                first = start // size * step
                part = latents[:, :, first : first + step]
                images = self.vae.decode_time(part, min(size, count - start))
                yield images, [frames[i] - start for i in places], places

    def length(self, latents: torch.Tensor) -> int:
        """The number of frames of these latents."""
        whole, rest = divmod(latents.shape[2], self.latents_of(self.vae.micro_frame_size))
        longest = whole * self.vae.micro_frame_size + 4 * rest
        return self._lengths.get(latents.shape[2], longest)

    def decode(self, latents: torch.Tensor, frames: list[int] | None = None) -> torch.Tensor:
        frames = list(range(self.length(latents))) if frames is None else frames
        decoded = [latents] * len(frames)
        for images, inner, places in self.chunks(latents, frames):
            for i, place in zip(inner, places):
                decoded[place] = self.vae.decode_frames(images[:, :, i : i + 1])
        return torch.cat(decoded, dim=1)

    def decode_vjp(self, latents, frames, gradient, decode_chunk_size=1) -> torch.Tensor:
        """As the base's; the image decoder's gradients meet at the latents of a chunk's images."""
        leaf = latents.detach().requires_grad_()
        with torch.enable_grad():
            for images, inner, places in self.chunks(leaf, frames):
                cut = images.detach().requires_grad_()
                for start in range(0, len(places), decode_chunk_size):
                    some = slice(start, start + decode_chunk_size)
                    pixels = self.vae.decode_frames(cut[:, :, inner[some]])
                    pixels.backward(gradient[:, places[some]])
                images.backward(cut.grad)
        assert leaf.grad is not None
        return leaf.grad


def cleaned(caption: str) -> str:
    """A caption, cleaned as in training: twice, since entities may be escaped twice."""
    if is_ftfy_available() and is_bs4_available():
        rules: Any = PixArtAlphaPipeline
        return rules._clean_caption(rules, rules._clean_caption(rules, caption))
    return " ".join(html.unescape(html.unescape(caption)).lower().split())


def known(kind: type, config: dict) -> dict:
    """The entries of a configuration that are arguments of this class."""
    names = inspect.signature(kind).parameters
    return {name: value for name, value in config.items() if name in names}


def vae_config(config: dict) -> dict:
    """The arguments of `OpenSoraVAE`; the published file names no sizes of the two autoencoders."""
    kinds = {"vae_2d": AutoencoderKL, "vae_temporal": TemporalVAE}
    parts = {
        name: PUBLISHED["vae"][name] | known(kind, config.get(name) or {})
        for name, kind in kinds.items()
    }
    return known(OpenSoraVAE, config) | parts


def read_network(part: str, source: str, **hub) -> nn.Module:
    """A network of a directory or hub repository with `config.json` and `model.safetensors`."""
    names = "config.json", "model.safetensors"
    if Path(source).is_dir():
        paths = [Path(source) / name for name in names]
    else:
        paths = [huggingface_hub.hf_hub_download(source, name, **hub) for name in names]
    config = json.loads(Path(paths[0]).read_text(encoding="utf-8"))
    with torch.device("meta"):
        network = network_of(part, config)
    weights.fill(
        network, weights.state_dict(paths[1]), f"{paths[1]} is not the {part} of Open-Sora 1.2"
    )
    return network


def network_of(part: str, config: dict) -> nn.Module:
    """A network of this configuration, with random weights."""
    if part == "vae":
        return OpenSoraVAE(**vae_config(config))
    return STDiT3(**known(STDiT3, config))
