"""Video models: `load("tiny")`, `load("modelscope")`, `load("videocrafter2")`, …, or a pipeline directory."""

import importlib
import json
import os
import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .. import quantization
from ..hub import quiet_if_embedded, reachable
from ..offload import is_sharded
from ..tables import Table
from .base import MODEL_LOCK, Conditioning, VideoModel, exclusive
from .causal_decoder import DECODER_SETTINGS, CausalDecoder

__all__ = [
    "CHECKPOINTS",
    "DECODER_SETTINGS",
    "FAMILIES",
    "MODEL_LOCK",
    "Checkpoint",
    "Conditioning",
    "VideoModel",
    "check_loaded",
    "checkpoint_of",
    "exclusive",
    "from_config",
    "load",
    "table",
]

# A family is found by the pipeline class that model_index.json names. Values are subclasses of
# `VideoModel`, or where to import one from; add your own.
FAMILIES: dict[str, type[VideoModel] | str] = {
    "TextToVideoSDPipeline": "vader_nb.models.modelscope:ModelScope",
    "StableVideoDiffusionPipeline": "vader_nb.models.svd:StableVideoDiffusion",
    "OpenSoraPipeline": "vader_nb.models.opensora:OpenSora",
    "CogVideoXPipeline": "vader_nb.models.cogvideox:CogVideoX",
    "WanPipeline": "vader_nb.models.wan:Wan",
    "WanImageToVideoPipeline": "vader_nb.models.wan_i2v:WanImageToVideo",
    "VideoCrafter2": "vader_nb.models.videocrafter:VideoCrafter2",  # diffusers has no pipeline of it
    "AnimateDiffPipeline": "vader_nb.models.animatediff:AnimateDiff",
    "LTXPipeline": "vader_nb.models.ltx_video:LTXVideo",
    "LTXConditionPipeline": "vader_nb.models.ltx_video:LTXCondition",
    "HunyuanVideoPipeline": "vader_nb.models.hunyuan:HunyuanVideo",
    "AnyFlowPipeline": "vader_nb.models.anyflow:AnyFlow",
    "WanAnyFlowPipeline": "vader_nb.models.anyflow:AnyFlow",  # its authors' name of it
}


def check_loaded(model: object) -> None:
    """Raise TypeError for a model's name or path in the place of the model."""
    if isinstance(model, str | Path):
        raise TypeError(f"{str(model)!r} is only a name: pass vader_nb.load({str(model)!r})")


@dataclass(frozen=True)
class Checkpoint:
    """Where a model comes from and how it is sampled by default.

    Attributes:
        source: hub id, or a local directory.
        family: key of `FAMILIES`.
        scheduler: name of a diffusers scheduler class.
        defaults: of sampling, under diffusers' argument names; what is missing is the family's.
        world: see `VideoModel.world`.
        size, license: of the download.
        hub: more arguments of `from_pretrained`.
        parts: hub ids of parts that are not in `source`.
        text_cache: see `load`.
        quantize: how denoisers are quantized while they are read.
    """

    source: str
    family: str
    scheduler: str
    defaults: dict = field(default_factory=dict)
    world: str | None = None
    size: str = ""
    license: str = ""
    hub: dict = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    text_cache: bool | None = None
    quantize: quantization.Config | None = None

    @property
    def directory(self) -> Path | None:
        """The local directory, if it is one."""
        return Path(self.source) if Path(self.source).is_dir() else None


ZOO = Path(__file__).parent.parent / "zoo" / "weights"
TINY = ZOO / "tiny"
SVD = "StableVideoDiffusionPipeline", "EulerDiscreteScheduler"
COGVIDEOX = "CogVideoXPipeline", "CogVideoXDDIMScheduler"
WAN = "WanPipeline", "UniPCMultistepScheduler"
# The states of Wan's decoder for 81 frames of 480 x 832 take 40 GB in half precision; keeping every fifth one and
# recomputing the others takes 17 GB.
FIFTHS = {"decoder_states": 5}
# Decoding 14 frames of 576 x 1024 with a graph takes 91 GiB at once and 18 two at a time; to save memory, diffusers
# advises 2.
TWOS = {"decode_chunk_size": 2}
# DPM++ in 25 steps at guidance 9 is VADER's setting for ModelScope.
VADER = {"num_inference_steps": 25, "guidance_scale": 9.0, "num_frames": 16, "fps": 8}
CHECKPOINTS = {
    "tiny": TINY,
    "tiny-wan": ZOO / "tiny-wan",
    "tiny-i2v": ZOO / "tiny-i2v",
    "modelscope": Checkpoint(
        "ali-vilab/text-to-video-ms-1.7b",
        "TextToVideoSDPipeline",
        "DPMSolverMultistepScheduler",
        VADER,
        size="3.7 GB (fp16)",
        license="CC-BY-NC-4.0",
        hub={"variant": "fp16"},
    ),
    "zeroscope": Checkpoint(
        "cerspense/zeroscope_v2_576w",
        "TextToVideoSDPipeline",
        "DPMSolverMultistepScheduler",
        VADER | {"num_frames": 24, "height": 320, "width": 576},
        size="7 GB",
        license="CC-BY-NC-4.0",
    ),
    "svd": Checkpoint(
        "stabilityai/stable-video-diffusion-img2vid",
        *SVD,
        TWOS | {"num_frames": 14},
        size="4.2 GB (fp16)",
        license="Stability community license",
        hub={"variant": "fp16"},
    ),
    "svd-xt": Checkpoint(
        "stabilityai/stable-video-diffusion-img2vid-xt",
        *SVD,
        TWOS | {"num_frames": 25},
        size="4.2 GB (fp16)",
        license="Stability community license",
        hub={"variant": "fp16"},
    ),
    "opensora": Checkpoint(
        "hpcai-tech/OpenSora-STDiT-v3",
        "OpenSoraPipeline",
        "FlowMatchEulerDiscreteScheduler",
        size="4.8 GB, 25 GB with autoencoder and text encoder",
        license="Apache-2.0",
        parts={
            "vae": "hpcai-tech/OpenSora-VAE-v1.2",
            "text_encoder": "DeepFloyd/t5-v1_1-xxl",
            "tokenizer": "DeepFloyd/t5-v1_1-xxl",
        },
    ),
    "cogvideox": Checkpoint(
        "THUDM/CogVideoX-2b",
        *COGVIDEOX,
        size="13.3 GB",
        license="Apache-2.0",
    ),
    "cogvideox-5b": Checkpoint(
        "THUDM/CogVideoX-5b",
        *COGVIDEOX,
        size="21.1 GB",
        license="CogVideoX license",
    ),
    "cogvideox-1.5": Checkpoint(
        "THUDM/CogVideoX1.5-5B",
        *COGVIDEOX,
        size="21.1 GB",
        license="CogVideoX license",
    ),
    "wan": Checkpoint(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        *WAN,
        FIFTHS,
        size="5.7 GB, 29 GB with text encoder and autoencoder",
        license="Apache-2.0",
    ),
    "wan-14b": Checkpoint(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        *WAN,
        FIFTHS,
        size="57 GB, 80 GB with text encoder and autoencoder",
        license="Apache-2.0",
    ),
    "wan-i2v-14b": Checkpoint(
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        "WanImageToVideoPipeline",
        "UniPCMultistepScheduler",
        FIFTHS,
        size="66 GB, 91 GB with text encoder, image encoder and autoencoder",
        license="Apache-2.0",
    ),
    "wan2.2-5b": Checkpoint(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        *WAN,
        FIFTHS | {"num_frames": 121, "fps": 24, "height": 704, "width": 1280},
        size="20 GB, 34 GB with text encoder and autoencoder",
        license="Apache-2.0",
    ),
    "wan2.2-a14b": Checkpoint(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        *WAN,
        FIFTHS | {"num_inference_steps": 40, "guidance_scale": 4.0, "guidance_scale_2": 3.0},
        size="114 GB, 126 GB with text encoder and autoencoder",
        license="Apache-2.0",
    ),
    "anyflow": Checkpoint(
        "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers",
        "AnyFlowPipeline",
        "FlowMapEulerDiscreteScheduler",
        FIFTHS,
        size="5.7 GB, 29 GB with text encoder and autoencoder",
        license="NVIDIA's own, see the repository",
    ),
    "videocrafter2": Checkpoint(
        "VideoCrafter/VideoCrafter2",
        "VideoCrafter2",
        "DynamicScaleDDIM",
        size="7.4 GB",
        license="Apache-2.0",
    ),
    "animatediff": Checkpoint(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "AnimateDiffPipeline",
        "DDIMScheduler",
        size="3.8 GB (fp16, motion adapter fp32)",
        license="CreativeML Open RAIL-M, motion adapter Apache-2.0",
        hub={"variant": "fp16"},
        parts={"motion_adapter": "guoyww/animatediff-motion-adapter-v1-5-3"},
    ),
    "ltx-video": Checkpoint(
        "Lightricks/LTX-Video",
        "LTXPipeline",
        "FlowMatchEulerDiscreteScheduler",
        size="28 GB with text encoder",
        license="LTX-Video's own, see the repository",
    ),
    "ltx-video-0.9.1": Checkpoint(
        "Lightricks/LTX-Video-0.9.1",
        "LTXPipeline",
        "FlowMatchEulerDiscreteScheduler",
        size="25 GB with text encoder",
        license="LTX-Video's own, see the repository",
    ),
    "ltx-video-13b": Checkpoint(
        "Lightricks/LTX-Video-0.9.7-dev",
        "LTXConditionPipeline",
        "FlowMatchEulerDiscreteScheduler",
        {"guidance_scale": 5.0, "num_inference_steps": 30, "height": 512, "width": 768},
        size="47 GB with text encoder",
        license="LTX-Video's own, see the repository",
    ),
    "hunyuanvideo": Checkpoint(
        "hunyuanvideo-community/HunyuanVideo",
        "HunyuanVideoPipeline",
        "FlowMatchEulerDiscreteScheduler",
        {"vae_tiling": True},
        size="26 GB, 42 GB with text encoders and autoencoder",
        license="Tencent Hunyuan community license, not in the EU, the UK or South Korea",
    ),
}
# A directory without model_index.json is known by a file of its authors' layout: name -> checkpoint.
FILES = {"model.ckpt": "videocrafter2"}


def load(
    name: str | Path = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    local_files_only: bool = False,
    check: bool | None = None,
    text_cache: bool | None = None,
    quantize: str | None = None,
    **hub,
) -> VideoModel:
    """Load a video model, frozen and in eval mode.

    Args:
        name: a key of `CHECKPOINTS`, or a pipeline directory of a known family, which is loaded with
            its own scheduler and defaults.
        device: by default CUDA if there is one and the launcher does not say CPU; one of several
            processes takes its own GPU.
        dtype: by default float32 on the CPU; on CUDA float16, or what the family was made for
            (`VideoModel.dtypes`). A mapping such as {"unet": torch.float16, "vae": torch.float32} gives parts
            their own; parts that it does not name get its "default", or else the default.
        local_files_only: download nothing.
        check: try gradients and partial decoding on a small clip, see `testing.quick_check`. By default for
            embedded models, once per process.
        text_cache: keep the text encoder's states of each text on disk (`text_files.folder()`), and load the encoder
            only for new texts, once for all that are known in advance. By default if it has over 1e9 parameters.
        quantize: "8bit" or "4bit": the denoisers' weights are kept in that precision (see `vader_nb.quantization`);
            an adapter stays in float32. Needs the package bitsandbytes.
        **hub: arguments of `from_pretrained` (revision, cache_dir, token, …).

    Raises:
        AssertionError: if the check finds a wrong gradient.
        ValueError: for an unknown name or family, `text_cache=True` where the text encoder stays in memory, or `quantize`
            without bitsandbytes or under FSDP.
        FileNotFoundError: if the weights are not here and cannot be downloaded; it says how to get them.
    """
    device = torch.device(device or default_device())
    if quantize:
        check_unsharded(quantize)
    quantized = quantization.config(quantize, device)
    checkpoint = replace(checkpoint_of(name), text_cache=text_cache, quantize=quantized)
    family = family_of(checkpoint)
    if text_cache:
        check_text_cache(family, name)
    options = {
        "name": str(name),
        "dtypes": part_dtypes(family.dtypes_of(checkpoint), device, dtype),
    }
    if checkpoint.directory is None:
        options |= checkpoint.hub | {"local_files_only": local_files_only or not reachable()}
    model = read(family, checkpoint, options | hub)
    quantization.apply(model, quantized)
    place(model, device)
    if check or (check is None and is_unchecked_zoo(checkpoint)):
        run_check(model, checkpoint)
    return model


def read(family: type[VideoModel], checkpoint: Checkpoint, options: dict) -> VideoModel:
    """The model of a checkpoint, with what went wrong in words. Raises as `load`."""
    try:
        with quiet_if_embedded(checkpoint.source):
            return family.from_pretrained(checkpoint, **options)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{checkpoint.source} holds a pickle, which can run any code; convert it to safetensors first"
        ) from None
    except OSError as error:
        if checkpoint.directory:
            raise
        raise FileNotFoundError(how_to_get(options["name"], checkpoint)) from error


def check_text_cache(family: type[VideoModel], name: str | Path) -> None:
    if not family.large_text_encoder:
        raise ValueError(f"text_cache=True: {str(name)!r} has no large text encoder; leave it out")


def check_unsharded(quantize: str) -> None:
    from .. import sharding

    sharding.check_quantize(quantize, bool(sharding.fsdp_options()))


def place(model: VideoModel, device: torch.device) -> None:
    """Move a model to its device; under FSDP, this process's shards of its denoisers."""
    from .. import sharding

    options = sharding.fsdp_options()
    if options is None:
        model.to(device)
        return
    sharding.shard(model, device, **options)
    for module in model.modules():
        if not is_sharded(module):
            module.to(device)


def how_to_get(name: str | Path, checkpoint: Checkpoint) -> str:
    """What to do where a published checkpoint is out of reach."""
    repositories = dict.fromkeys([checkpoint.source, *checkpoint.parts.values()])
    fetch = " && ".join(f"hf download {repository}" for repository in repositories)
    return (
        f"the weights of {name!r} are not on this machine and the hub cannot be reached: "
        f"{checkpoint.source} ({checkpoint.size}, {checkpoint.license}).\n"
        f"  with a network:  {fetch}\n"
        f"  with a copy:     vader_nb.load('/path/to/the/pipeline/directory')\n"
        f"  without either:  vader_nb.load('tiny'), embedded in this package"
    )


def is_unchecked_zoo(checkpoint: Checkpoint) -> bool:
    """Whether it is an embedded model that this process has not checked yet."""
    folder = checkpoint.directory
    return folder is not None and folder.parent == ZOO and checkpoint.source not in _checked


def run_check(model: VideoModel, checkpoint: Checkpoint) -> None:
    # Imported here, since testing knows models, samples and trains with them.
    from ..testing import quick_check

    quick_check(model)
    _checked.add(checkpoint.source)


def part_dtypes(
    made_for: dict[str, torch.dtype], device: torch.device, dtype: torch.dtype | dict | None
) -> dict[str, torch.dtype]:
    """Types of a model's parts, and "default", see `load`; made_for: see `VideoModel.dtypes`."""
    if isinstance(dtype, torch.dtype):
        return {"default": dtype}
    on_cuda = {"default": torch.float16} | made_for
    return (on_cuda if device.type == "cuda" else {"default": torch.float32}) | (dtype or {})


_checked: set[str] = set()  # sources of models that this process has checked


def from_config(
    name: str | Path = "tiny", text_cache: bool | None = False, quantize: str | None = None
) -> VideoModel:
    """A model with the architecture of a checkpoint, without loading weights, for fake or meta tensors.

    Its tensors have torch's default dtype. No download is needed: for published checkpoints the family
    knows the configuration. All parts are there, unless `text_cache` leaves out a text encoder; `quantize`: see `load`.

    Raises:
        ValueError: for an unknown name or family, or `quantize` without bitsandbytes.
    """
    quantized = quantization.config(quantize)
    checkpoint = replace(checkpoint_of(name), text_cache=text_cache)
    model = family_of(checkpoint).from_config(checkpoint, name=str(name))
    quantization.apply(model, quantized)
    return model


def table() -> Table:
    """All models: what each takes, its size, license and memory, advice on K, and what was tested."""
    from .gallery import table

    return table()


def default_device() -> str:
    """CUDA if there is one, unless these processes were started for the CPU."""
    from accelerate.utils import parse_flag_from_env

    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return "cpu" if on_cpu else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def decoder_settings(name: str | Path, settings: dict) -> dict:
    """The decoder's among these settings, for `CausalDecoder.set_decoder`.

    Raises:
        ValueError: for invalid values, or a model whose decoder has no settings.
    """
    found = {key: settings[key] for key in DECODER_SETTINGS if settings.get(key) is not None}
    if found and not is_causal(name):
        key, value = next(iter(found.items()))
        raise ValueError(f"{key}={value!r} has no effect: the decoder of {name!r} is not causal")
    CausalDecoder().set_decoder(found)
    return found


def is_causal(name: str | Path) -> bool:
    """Whether the decoder of a model has the settings of `CausalDecoder`."""
    return issubclass(family_of(checkpoint_of(name)), CausalDecoder)


def checkpoint_of(name: str | Path) -> Checkpoint:
    """The checkpoint of a name, or of a pipeline directory.

    Raises:
        ValueError: for an unknown name.
        FileNotFoundError: for a directory that is no pipeline's.
    """
    found = CHECKPOINTS.get(str(name), Path(name).expanduser())
    if isinstance(found, Checkpoint):
        return found
    if (found / "model_index.json").is_file():
        return directory_checkpoint(found)
    for file, published in FILES.items():
        if (found / file).is_file():
            return replace(CHECKPOINTS[published], source=str(found))
    if found.is_dir():
        raise FileNotFoundError(
            f"{found} has no model_index.json: not a diffusers pipeline directory "
            f"(nor one with {', '.join(FILES)})"
        )
    known = ", ".join(CHECKPOINTS)
    raise ValueError(
        f"unknown model {str(name)!r}: choose one of {known}, or give a pipeline directory"
    )


def directory_checkpoint(folder: Path) -> Checkpoint:
    """A pipeline directory, with its own scheduler.

    Defaults of sampling are the family's, unless the directory has a file `vader_nb.json` with
    {"defaults": {"num_inference_steps": 10, …}, "world": "tiny" or null, "license": "…"}.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    extra = {}
    if (folder / "vader_nb.json").is_file():
        extra = json.loads((folder / "vader_nb.json").read_text(encoding="utf-8"))
    return Checkpoint(
        str(folder),
        index["_class_name"],
        index["scheduler"][1],
        extra.get("defaults", {}),
        extra.get("world"),
        license=extra.get("license", ""),
    )


def family_of(checkpoint: Checkpoint) -> type[VideoModel]:
    """The class that runs a checkpoint. Raises ValueError for a pipeline class that no family knows."""
    if checkpoint.family not in FAMILIES:
        raise ValueError(
            f"{checkpoint.source} is a {checkpoint.family}, which no family here can run; "
            f"known: {', '.join(FAMILIES)}. Register yours in vader_nb.models.FAMILIES"
        )
    family = FAMILIES[checkpoint.family]
    if isinstance(family, str):
        module, _, cls = family.partition(":")
        family = getattr(importlib.import_module(module), cls)
    return family
