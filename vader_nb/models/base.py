"""What every family of video models offers to the rest of the package.

A family is one file: a subclass of `VideoModel`, registered in `models.FAMILIES` under the pipeline class
that its `model_index.json` names. To the rest, all families look alike: latents are (B, C, F, H, W), frames
are (B, F, 3, H, W) in [0, 1], and a number of frames always means pixel frames, never latents.
"""

import functools
import inspect
import json
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ipndm import IPNDMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.distributed.tensor import DTensor

from ..offload import CPUOffloader
from ..prompts import Prompt
from ..quantization import is_quantized

MODEL_LOCK = threading.RLock()
# A last step whose `last_step_gain` is smaller teaches next to nothing, and what to take instead.
SMALL_GAIN, EARLIER_STEPS = 0.01, "ReFL(0.4) or DRTune(3)"


def exclusive(function: Callable) -> Callable:
    """Decorator: one thread at a time may use models.

    The threads of a server, or those in which some notebooks answer a widget's controls while a cell
    runs, would otherwise swap each other's adapters.
    """

    @functools.wraps(function)
    def locked(*args, **kwargs):
        with MODEL_LOCK:
            return function(*args, **kwargs)

    return locked


@dataclass
class Conditioning:
    """What the denoiser is conditioned on, by branch of the guidance.

    Attributes:
        branches: name -> the denoiser's keyword tensors, each with the batch first. Families with
            classifier-free guidance call their branches "negative" and "prompt".
    """

    branches: dict[str, dict[str, torch.Tensor]]

    def __getitem__(self, branch: str) -> dict[str, torch.Tensor]:
        return self.branches[branch]

    def all_finite(self) -> torch.Tensor:
        """Whether all numbers are, as a tensor."""
        tensors = [x for branch in self.branches.values() for x in branch.values()]
        return torch.stack([x.isfinite().all() for x in tensors]).all()

    def batched(self, branches: Sequence[str]) -> dict[str, torch.Tensor]:
        """The tensors of several branches, one after the other in the batch."""
        first = self.branches[branches[0]]
        return {key: torch.cat([self.branches[name][key] for name in branches]) for key in first}


class VideoModel(ABC):
    """A video diffusion model, frozen and in eval mode.

    Attributes:
        name: what it was loaded as.
        world: "tiny" for models of the embedded synthetic world, whose captions have oracles; else None.
        denoisers: the networks that adapters attach to. Keys are diffusers' LoRA prefixes: "unet",
            "transformer", "transformer_2".
        targets: for each denoiser, name endings of the linear layers that an adapter attaches to by default:
            those of its attention.
        feed_forward: name endings of its feed-forward layers.
        scheduler: a diffusers scheduler; may be replaced, as in diffusers.
        defaults: of sampling, under diffusers' argument names, plus `fps`.
        original_names: for families whose LoRA files use their authors' names: the authors' names of the
            denoiser's modules -> ours. The part before a dot in a layer's name is replaced.
        lora_formats: those of `lora_export.LAYOUTS` in which some tool can read an adapter of this family.
        sampling_options: the family's own entries of `Sampling.options`, with their defaults.
        option_bounds: (least, most) of those entries that are numbers.
        dtypes: what its parts are loaded in on CUDA, by name or as "default", where that is not float16.
        large_text_encoder: the text encoder may be kept out of memory, see `texts.TextOnDisk`.
        keeps_texts: it is kept out of memory, and its states of each text are on disk.
        takes_image: it continues the image of a `Prompt`.
        independent_frames: the decoder has no temporal layers, so frames can be decoded, and scored, one by one.
        exact: decoding some frames gives what decoding the whole clip gives for them.
        offloader: with model offload, what moves networks; else None.
        offload_device: where networks that are not in use wait.
    """

    name: str
    world: str | None = None
    denoisers: dict[str, nn.Module]
    targets: dict[str, tuple[str, ...]]
    feed_forward: tuple[str, ...] = ("ff.net.0.proj", "ff.net.2")
    scheduler: Any
    defaults: dict
    sampling_options: dict = {}
    option_bounds: dict = {}
    dtypes: dict[str, torch.dtype] = {}
    large_text_encoder = False
    keeps_texts: Any = False
    takes_image = False
    original_names: Mapping[str, str] = {}
    lora_formats: tuple[str, ...] = ("diffusers", "peft", "kohya", "comfyui")
    independent_frames = True
    exact = True
    offloader: CPUOffloader | None = None
    offload_device = torch.device("cpu")

    # ------------------------------------------------------------------ what a family writes

    @classmethod
    @abstractmethod
    def from_pretrained(cls, checkpoint, *, name: str, dtypes: dict, **hub) -> "VideoModel":
        """Load a `models.Checkpoint`, see `models.load`; dtypes: of parts, and "default"."""

    @classmethod
    @abstractmethod
    def from_config(cls, checkpoint, *, name: str) -> "VideoModel":
        """The architecture of a `models.Checkpoint`, see `models.from_config`."""

    @classmethod
    def dtypes_of(cls, checkpoint) -> dict[str, torch.dtype]:
        """`dtypes` of a `models.Checkpoint`, for families whose sizes differ in it."""
        return cls.dtypes

    @abstractmethod
    def pipeline(self) -> Any:
        """diffusers' pipeline, made of the same parts."""

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """All networks."""

    @abstractmethod
    def decoders(self) -> list[nn.Module]:
        """The networks, or parts of networks, that `decode` runs."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The denoisers' parts whose activations gradient checkpointing recomputes, one by one."""

    @abstractmethod
    def latent_shape(self, sampling) -> tuple[int, int, int, int]:
        """(C, F, H, W) of one clip's latents. Raises ValueError for sizes that the model cannot make."""

    @abstractmethod
    def encode(
        self,
        prompts: Sequence[str | Prompt],
        sampling=None,
        generators: list[torch.Generator] | None = None,
    ) -> Conditioning:
        """The conditioning of B prompts, without a graph.

        Args:
            prompts: one per clip.
            sampling: resolved settings.
            generators: of the clips, for families whose conditioning is noised.
        """

    @abstractmethod
    def predict(
        self, latents: torch.Tensor, t: torch.Tensor, inputs: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The denoiser's output for scaled latents (B, C, F, H, W) at timestep t, for one branch."""

    @abstractmethod
    def decode(self, latents: torch.Tensor, frames: list[int] | None = None) -> torch.Tensor:
        """Differentiable frames (B, F, 3, H, W) in [0, 1] of latents (B, C, F, H, W).

        Args:
            latents: clean latents.
            frames: indices of pixel frames, decoded together; None for the whole clip, in bounded memory.
        """

    def given_frames(self, prompts: Sequence[str | Prompt]) -> int:
        """How many frames at the start of these prompts' clips are their images, whatever the denoiser predicts."""
        return 0

    def texts(self, prompts: Sequence[str | Prompt]) -> dict[str, list[str]]:
        """The prompts' texts by branch of the guidance.

        Raises:
            ValueError: for an image, if the model starts from none.
        """
        prompts = [p if isinstance(p, Prompt) else Prompt(p) for p in prompts]
        if not self.takes_image and any(prompt.image is not None for prompt in prompts):
            raise ValueError(
                f"{self.name!r} makes videos from text alone; its prompts take no image"
            )
        return {
            "negative": [prompt.negative_prompt for prompt in prompts],
            "prompt": [prompt.text for prompt in prompts],
        }

    def encode_texts(self, prompts: Sequence[str | Prompt]) -> None:
        """Put on disk what `encode` needs for these prompts' texts, if the text encoder is kept out of memory.

        It is loaded once for all new texts; meanwhile the other networks wait in CPU memory.
        """
        self.texts(prompts)  # raises now for an image that it cannot take

    # ------------------------------------------------------------------ guidance

    def branches(self, sampling) -> list[str]:
        """The branches that guidance needs, in the order of the batch."""
        return ["prompt"] if sampling.guidance_scale == 1 else ["negative", "prompt"]

    def learning_branches(self, sampling) -> list[str]:
        """The branches through which the reward's gradient goes."""
        names = self.branches(sampling)
        return names if sampling.unconditional_gradient else names[-1:]

    def predict_branches(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        conditioning: Conditioning,
        branches: list[str],
    ) -> dict[str, torch.Tensor]:
        """The denoiser's output for each of these branches, run as one batch."""
        if len(branches) == 1:
            return {branches[0]: self.predict(latents, t, conditioning[branches[0]])}
        outputs = self.predict(
            torch.cat([latents] * len(branches)), t, conditioning.batched(branches)
        )
        return dict(zip(branches, outputs.chunk(len(branches))))

    def combine(
        self, outputs: Mapping[str, torch.Tensor], t: torch.Tensor, sampling
    ) -> torch.Tensor:
        """Guidance: one output from the branches'. Differentiable and cheap, since the replay repeats it."""
        if len(outputs) == 1:
            return outputs["prompt"]
        negative, prompt = outputs["negative"], outputs["prompt"]
        guided = negative + sampling.guidance_scale * (prompt - negative)
        if sampling.guidance_rescale:  # arXiv 2305.08891, section 3.4
            dims = list(range(1, guided.ndim))
            ratio = prompt.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
            guided = guided * (1 + sampling.guidance_rescale * (ratio - 1))
        return guided

    def all_branches(
        self, latents: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, sampling
    ) -> dict[str, torch.Tensor]:
        """The denoiser's output for every branch of the guidance, in one batch or one after the other."""
        names = self.branches(sampling)
        if not sampling.sequential_guidance:
            return self.predict_branches(latents, t, conditioning, names)
        outputs = {}
        for name in names:
            outputs |= self.predict_branches(latents, t, conditioning, [name])
        return outputs

    def guided(
        self, latents: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, sampling
    ) -> torch.Tensor:
        """The denoiser's output after guidance, for scaled latents (B, C, F, H, W) at timestep t."""
        return self.combine(self.all_branches(latents, t, conditioning, sampling), t, sampling)

    def denoiser_at(self, t: torch.Tensor) -> nn.Module:
        """The denoiser that is responsible for timestep t."""
        return self.denoiser

    # ------------------------------------------------------------------ schedules

    def new_scheduler(self, sampling):
        """A new scheduler for each trajectory, with its timesteps set: multistep solvers remember earlier outputs."""
        scheduler = deepcopy(self.scheduler)
        scheduler.set_timesteps(sampling.num_inference_steps, device=self.device)
        return scheduler

    def num_steps(self, sampling) -> int:
        """Steps of a trajectory, one denoiser call each: solvers of second order take almost twice
        `num_inference_steps`. A strategy's K counts these."""
        return len(self.new_scheduler(sampling).timesteps)

    def last_step_gain(self, sampling) -> float:
        """How far the final latents move with the last denoiser output, by the schedule alone.

        The reward's gradient through the last step is multiplied by it: 0.2 for ModelScope, 0.002 for Stable
        Video Diffusion, where K = 1 teaches next to nothing.
        """
        scheduler = self.new_scheduler(sampling)
        latents = zeros = torch.zeros(1, 1, 1, 1, 1, device=self.device, dtype=torch.float64)
        *steps, last = scheduler.timesteps
        for t in steps:
            self.scale_input(scheduler, latents, t)
            latents = self.step(scheduler, zeros, t, latents)
        self.scale_input(scheduler, latents, last)
        twins = scheduler, deepcopy(scheduler)
        ends = [self.step(s, zeros + i, last, latents) for i, s in enumerate(twins)]
        return (ends[1] - ends[0]).abs().item()

    def initial_latents(self, sampling, generators: list[torch.Generator]) -> torch.Tensor:
        """Noise of unit variance (B, C, F, H, W), one generator per clip."""
        shape = (len(generators), *self.latent_shape(sampling))
        return randn_tensor(shape, generator=generators, device=self.device, dtype=self.dtype)

    def start(self, noise: torch.Tensor, scheduler) -> torch.Tensor:
        """The first latents of a trajectory; a sigma schedule begins at the scale of its first step."""
        return noise * getattr(scheduler, "init_noise_sigma", 1.0)

    def scale_input(self, scheduler, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Latents as the denoiser expects them at timestep t."""
        if not hasattr(scheduler, "scale_model_input"):  # flow matching
            return latents
        return scheduler.scale_model_input(latents, t)

    def step(
        self,
        scheduler,
        output: torch.Tensor,
        t,
        latents: torch.Tensor,
        *,
        eta: float = 0.0,
        generators=None,
    ) -> torch.Tensor:
        """The next latents. diffusers' `step` is differentiable; only its pipelines are not."""
        accepted = inspect.signature(scheduler.step).parameters
        if eta and isinstance(scheduler, DDIMScheduler):
            eta = rounded_eta(scheduler, t, eta)
        options = {"eta": eta, "generator": generators}
        options = {name: value for name, value in options.items() if name in accepted}
        result: Any = scheduler.step(output, t, latents, **options)
        return result.prev_sample

    def signal_and_noise(self, scheduler, t) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha, sigma) of latents = alpha * clean + sigma * noise at timestep t of this scheduler."""
        if not hasattr(scheduler, "sigmas") and not isinstance(scheduler, IPNDMScheduler):
            alpha_squared = scheduler.alphas_cumprod[int(t)]
            return alpha_squared**0.5, (1 - alpha_squared) ** 0.5
        index = scheduler.step_index
        index = scheduler.index_for_timestep(t) if index is None else index
        if isinstance(scheduler, IPNDMScheduler):
            return scheduler.alphas[index], scheduler.betas[index]
        sigmas = scheduler.sigmas
        if hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order:
            sigmas = scheduler.sigmas_interpol  # KDPM2's every second call
        sigma = sigmas[index]
        if is_flow(scheduler):
            return 1 - sigma, sigma
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # DPM++, UniPC, DEIS: variance preserving
            return scheduler._sigma_to_alpha_sigma_t(sigma)
        return torch.ones_like(sigma), sigma  # Euler, Heun, …: variance exploding

    def x0(self, scheduler, output: torch.Tensor, t, latents: torch.Tensor) -> torch.Tensor:
        """The clean latents that this output predicts from these latents, in one go.

        Computed from the schedule and from what the model predicts (`prediction_type`). The
        scheduler's own estimate may be clipped, missing, or the noise.
        """
        alpha, sigma = (x.to(latents.device) for x in self.signal_and_noise(scheduler, t))
        if is_flow(scheduler):
            return latents - sigma * output
        if alpha == 1:  # from variance exploding to variance preserving
            alpha = (1 + sigma**2) ** -0.5
            latents, sigma = alpha * latents, alpha * sigma
        predictions = {
            "epsilon": lambda: (latents - sigma * output) / alpha,
            "v_prediction": lambda: alpha * latents - sigma * output,
            "sample": lambda: output,
        }
        prediction = scheduler.config.get("prediction_type", "v_prediction")  # IPNDM names none
        if prediction not in predictions:
            raise ValueError(
                f"unknown prediction_type {prediction!r}; known: {', '.join(predictions)}"
            )
        return predictions[prediction]()

    def with_given(self, latents: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Final latents, with the part that the prompts give, such as a first frame, put in; here, unchanged."""
        return latents

    def add_noise(self, scheduler, latents: torch.Tensor, t, generators: list) -> torch.Tensor:
        """Clean latents noised to the level of timestep t."""
        noise = randn_tensor(
            latents.shape, generator=generators, device=latents.device, dtype=latents.dtype
        )
        t = torch.as_tensor(t, device=latents.device).expand(len(latents))
        if hasattr(scheduler, "scale_noise"):  # flow matching
            return scheduler.scale_noise(latents, t, noise)
        return scheduler.add_noise(latents, noise, t)

    # ------------------------------------------------------------------ the decoder's gradient

    def decode_vjp(
        self,
        latents: torch.Tensor,
        frames: list[int],
        gradient: torch.Tensor,
        decode_chunk_size: int = 1,
    ) -> torch.Tensor:
        """The gradient on the latents (B, C, F, H, W), given that on the decoded frames.

        Args:
            latents: clean latents.
            frames: indices of pixel frames.
            gradient: (B, len(frames), 3, H, W), with respect to `decode(latents, frames)`.
            decode_chunk_size: frames decoded at once, with a graph; their number bounds the memory.
        """
        leaf = latents.detach().requires_grad_()
        with torch.enable_grad():
            for start in range(0, len(frames), decode_chunk_size):
                part = slice(start, start + decode_chunk_size)
                self.decode(leaf, frames[part]).backward(gradient[:, part])
        assert leaf.grad is not None
        return leaf.grad

    # ------------------------------------------------------------------ where networks are

    def to(self, *args, **kwargs) -> "VideoModel":
        """Move or convert all networks, as `torch.nn.Module.to`."""
        if self.offloader is not None:
            raise RuntimeError(
                f"{self.name!r} offloads its networks already; move or convert it before that"
            )
        for module in self.modules():
            module.to(*args, **kwargs)
        return self

    def enable_model_cpu_offload(self) -> None:
        """As in diffusers: only the networks of the current stage are on the model's device.

        The stages are text, denoiser, decoder and reward. It costs time: the denoiser is moved there
        twice per training step.
        """
        self.offloader = CPUOffloader(self.device, self.offload_device)
        self.offload(*self.modules())

    def disable_model_cpu_offload(self) -> None:
        """Move all networks back to the model's device."""
        self.onload(*self.modules())
        self.offloader = None

    def offload(self, *modules: nn.Module) -> None:
        """With model offload: these wait on the offload device, for instance a reward's networks."""
        if self.offloader is not None:
            self.offloader.offload(*modules)

    def onload(self, *modules: nn.Module) -> None:
        """With model offload: these have the device to themselves from now on."""
        if self.offloader is not None:
            self.offloader.onload(*modules)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Save a pipeline directory, which `load` can read, and so can diffusers if it has the pipeline.

        Raises:
            FileExistsError: if the folder is not empty.
            ValueError: for a quantized model, whose weights are rounded.
        """
        if is_quantized(self):
            raise ValueError(
                f"{self.name!r} is quantized, and would be saved with rounded weights: load it without quantize"
            )
        folder = Path(folder).expanduser()
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty; choose another folder")
        self.save_parts(folder)
        extra = json.dumps({"defaults": self.defaults, "world": self.world}, indent=2)
        (folder / "vader_nb.json").write_text(extra + "\n", encoding="utf-8")
        return folder

    def save_parts(self, folder: Path) -> None:
        """Save `model_index.json` and a subfolder for each part; families without a pipeline write their own."""
        self.pipeline().save_pretrained(folder, safe_serialization=True)

    @property
    def denoiser(self) -> nn.Module:
        """The first of the denoisers; most families have one."""
        return next(iter(self.denoisers.values()))

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        if self.offloader is not None:
            return self.offloader.device
        weight = next(self.denoiser.parameters())
        if isinstance(weight, DTensor) and weight.device_mesh.device_type == "cuda":
            # Where FSDP gathers it: a process's part may wait in CPU memory.
            return torch.device("cuda", torch.cuda.current_device())
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's."""
        return next(self.denoiser.parameters()).dtype


def cached(
    cache: dict[str, torch.Tensor],
    texts: Sequence[str],
    embed: Callable[[str], torch.Tensor],
    size: int,
) -> dict[str, torch.Tensor]:
    """The cache with the embeddings of all these texts, emptied first if it could grow beyond `size`."""
    if len(cache) + len(texts) > size:
        cache.clear()
    for text in dict.fromkeys(texts):
        if text not in cache:
            cache[text] = embed(text)
    return cache


def warn_truncated(tokenizer, text: str, max_length: int | None = None) -> None:
    """Warn about words that the text encoder does not see, because the tokenizer cuts them off."""
    limit = max_length or tokenizer.model_max_length
    ids = tokenizer(text, truncation=False, verbose=False).input_ids
    if len(ids) > limit:
        lost = tokenizer.decode(ids[limit - 1 : -1])  # the last one marks the end
        shown = repr(lost) if len(lost) <= 200 else f"{lost[:200]!r} and what follows"
        warnings.warn(
            f"the text encoder reads {limit} tokens, but the prompt has {len(ids)}; not seen: {shown}",
            stacklevel=2,
        )


def instances(network: nn.Module, names: set[str]) -> list[nn.Module]:
    """Its modules of these classes. By the names of all of a module's classes, since an engine (FSDP) or a compiler
    derives its own class from a block's."""
    return [m for m in network.modules() if names & {cls.__name__ for cls in type(m).__mro__}]


def renamed(name: str, names: Mapping[str, str]) -> str | None:
    """A name whose longest known beginning, up to a dot, is replaced; None if there is none."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        if (known := names.get(".".join(parts[:n]))) is not None:
            return ".".join([known, *parts[n:]])
    return None


def rounded_eta(scheduler: DDIMScheduler, t, eta: float) -> float:
    """DDIM's eta, lowered by rounding: at zero terminal SNR, DDIM would otherwise take the root of -1e-8."""
    config: Any = scheduler.config
    before = int(t) - config.num_train_timesteps // scheduler.num_inference_steps
    final = scheduler.final_alpha_cumprod
    remaining = 1 - (scheduler.alphas_cumprod[before] if before >= 0 else final)
    variance = scheduler._get_variance(int(t), before)
    while float(remaining - (eta * variance**0.5) ** 2) < 0:  # a number, also of a fake tensor
        eta *= 1 - 2**-23
    return eta


def is_flow(scheduler) -> bool:
    """The schedule is a rectified flow's: latents are (1 - sigma) * clean + sigma * noise."""
    name = type(scheduler).__name__
    known = "FlowMatch" in name or "FlowMap" in name
    return known or scheduler.config.get("prediction_type") == "flow_prediction"


def read_config(folder: Path) -> dict:
    """The configuration of one part of a pipeline directory, without the type that its file has: the model's counts."""
    names = ("config.json", "scheduler_config.json")
    file = next(folder / name for name in names if (folder / name).is_file())
    config = json.loads(file.read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
