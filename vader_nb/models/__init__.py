"""Video models: `load("tiny")`, `load("modelscope")`, `load("zeroscope")`, or a directory of the same layout."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..hub import reachable
from .base import MODEL_LOCK, Conditioning, VideoModel, alone

__all__ = [
    "MODEL_LOCK",
    "CHECKPOINTS",
    "Checkpoint",
    "Conditioning",
    "VideoModel",
    "alone",
    "load",
    "outline",
]


@dataclass(frozen=True)
class Checkpoint:
    """Where a model comes from and how it is sampled by default (diffusers' argument names)."""

    source: str  # hub id, or a directory inside the package
    size: str  # of the download
    license: str
    scheduler: str  # diffusers class
    defaults: dict
    hub: dict = field(default_factory=dict)  # more arguments of from_pretrained


TINY = Path(__file__).parent.parent / "zoo" / "weights" / "tiny"
CHECKPOINTS = {
    "tiny": Checkpoint(
        str(TINY),
        "11 MB, embedded",
        "Apache-2.0",
        "DDIMScheduler",
        {"num_inference_steps": 10, "guidance_scale": 2.0, "num_frames": 8, "fps": 8},
    ),
    # DPM++ in 25 steps at guidance 9 is VADER's setting for ModelScope.
    "modelscope": Checkpoint(
        "ali-vilab/text-to-video-ms-1.7b",
        "3.7 GB (fp16)",
        "CC-BY-NC-4.0",
        "DPMSolverMultistepScheduler",
        {"num_inference_steps": 25, "guidance_scale": 9.0, "num_frames": 16, "fps": 8},
        {"variant": "fp16"},
    ),
    "zeroscope": Checkpoint(
        "cerspense/zeroscope_v2_576w",
        "7 GB",
        "CC-BY-NC-4.0",
        "DPMSolverMultistepScheduler",
        {
            "num_inference_steps": 25,
            "guidance_scale": 9.0,
            "num_frames": 24,
            "fps": 8,
            "height": 320,
            "width": 576,
        },
    ),
}


def load(
    name: str | Path = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    local_files_only: bool = False,
    **hub,
) -> VideoModel:
    """Load a video model, frozen and in eval mode.

    name: a key of `CHECKPOINTS`, or a directory in diffusers' `TextToVideoSDPipeline` layout.
    device: default CUDA if there is one, and the launcher does not say CPU; in one of several processes, the GPU of its
    own. dtype: default float16 on CUDA, float32 on the CPU.
    hub: passed to `from_pretrained` (revision, cache_dir, token, …).
    Raises ValueError for an unknown name and FileNotFoundError, which names the checkpoint, its size and
    the way out, where the weights are neither here nor within reach.
    """
    import diffusers

    from .modelscope import ModelScope

    device = torch.device(device or default_device())
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    checkpoint = checkpoint_of(name)
    local = Path(checkpoint.source).is_dir()
    if not local:
        local_files_only = local_files_only or not reachable()
    try:
        model = ModelScope.from_pretrained(
            checkpoint.source,
            name=str(name),
            scheduler=getattr(diffusers, checkpoint.scheduler),
            defaults=checkpoint.defaults,
            dtype=dtype,
            **({} if local else {"local_files_only": local_files_only}),
            **(checkpoint.hub | hub),
        )
    except OSError as error:
        if local:
            raise
        raise FileNotFoundError(
            f"the weights of {name!r} are not on this machine and the hub cannot be reached: "
            f"{checkpoint.source} ({checkpoint.size}, {checkpoint.license}).\n"
            f"  with a network:  hf download {checkpoint.source}\n"
            f"  with a copy:     vader_nb.load('/path/to/the/pipeline/directory')\n"
            f"  without either:  vader_nb.load('tiny'), embedded in this package"
        ) from error
    return model.to(device)


def default_device() -> str:
    """CUDA's if there is one, unless these processes were started for the CPU (`accelerate launch --cpu`, or
    `parallel.launch` with fewer GPUs than processes)."""
    from accelerate.utils import parse_flag_from_env

    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return "cpu" if on_cpu else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def outline(name: str | Path = "tiny") -> VideoModel:
    """The model without its weights, for fake tensors: see `ModelScope.outline`. Needs no download."""
    import diffusers

    from .modelscope import ModelScope

    checkpoint = checkpoint_of(name)
    folder, scheduler = Path(checkpoint.source), getattr(diffusers, checkpoint.scheduler)
    local = folder if folder.is_dir() else None
    return ModelScope.outline(
        local, name=str(name), scheduler=scheduler, defaults=checkpoint.defaults
    )


def checkpoint_of(name: str | Path) -> Checkpoint:
    """Raises ValueError for an unknown name, FileNotFoundError for a directory that is no pipeline's."""
    folder = Path(name)
    if str(name) in CHECKPOINTS:
        return CHECKPOINTS[str(name)]
    if (folder / "model_index.json").is_file():
        return Checkpoint(str(folder), "", "", "DDIMScheduler", CHECKPOINTS["modelscope"].defaults)
    if folder.is_dir():
        raise FileNotFoundError(
            f"{folder} has no model_index.json: not a diffusers pipeline directory"
        )
    known = ", ".join(CHECKPOINTS)
    raise ValueError(
        f"unknown model {str(name)!r}: choose one of {known}, or give a pipeline directory"
    )
