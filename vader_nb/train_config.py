"""Every setting of a training run, written once."""

from collections.abc import Iterable
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from .lora_files import MAX_RANK, parse_targets
from .sampling import Sampling, check_bounds, setting, with_help
from .strategies import Frames, Last, Strategy, parse_frames, parse_strategy

BOUNDS = {
    "steps": (1, 10**9),
    "rollout_reuse": (1, 100),
    "batch_size": (1, 10_000),
    "gradient_accumulation_steps": (1, 100_000),
    "learning_rate": (1e-38, 100),
    "lr_warmup_steps": (0, 10**9),
    "weight_decay": (0, 100),
    "base_penalty": (0, 1e9),
    "ema_decay": (0, 0.999999),
    "max_grad_norm": (0, 1e9),
    "rank": (1, MAX_RANK),
    "alpha": (1e-6, 1e6),
    "decode_chunk_size": (1, 10_000),
    "seed": (0, 2**40 - 1),
    "checkpointing_steps": (1, 10**9),
    "checkpoints_total_limit": (1, 10**9),
    "validation_steps": (1, 10**9),
    "early_stopping": (1, 10**9),
}
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}  # of mixed_precision


@with_help
@dataclass
class TrainConfig:
    """The settings of `align`, of configuration files, the shell and the memory planner.

    Strategy, frames and output_dir may be given as text.
    """

    steps: int = setting(40, "training steps: roll-outs, then an update of the adapter from them")
    rollout_reuse: int = setting(
        1, "updates for each roll-out: only the steps that learn are repeated for each one"
    )
    batch_size: int = setting(4, "clips at once, in each process")
    gradient_accumulation_steps: int = setting(1, "batches per optimizer step, in each process")
    learning_rate: float = setting(1e-3, "of AdamW")
    lr_scheduler: str = setting(
        "constant", "constant_with_warmup, linear, cosine, … as in diffusers"
    )
    lr_warmup_steps: int = setting(0, "steps in which the learning rate rises")
    weight_decay: float = setting(0.0, "of AdamW: pulls the adapter toward zero, which is the base")
    base_penalty: float = setting(
        0.0,
        "weight of the outputs' distance to the base's at the steps that learn: KL divergence where the sampler adds "
        "noise, else mean squared difference",
    )
    ema_decay: float = setting(
        0.0,
        "moving average of the adapter's weights over updates (0.99: some 100); 0: the last weights",
    )
    max_grad_norm: float = setting(1.0, "longer gradients are clipped to this norm; 0: none are")
    use_8bit_adam: bool = setting(False, "optimizer state in 8 bits, with the package bitsandbytes")
    rank: int = setting(8, "of the adapter")
    alpha: float | None = setting(None, "the adapter is scaled by alpha / rank; default: its rank")
    targets: tuple[str, ...] | None = setting(
        None,
        "layers that get an adapter: attention, attention+ffn, or names or the ends of names; default: attention",
    )
    strategy: Strategy = setting(
        Last(1),
        "which steps learn: Last(1), Random(), Step(3), DRaFTLV(2), ReFL(0.25), DRTune(2, stop=3), DirectAlign, "
        "LeapAlign",
    )
    frames: Frames = setting(
        None,
        "which frames are scored: random:1, ends, every:2, all, 0,4,-1; default: random:1, or all for a "
        "reward on the whole clip",
    )
    segments: str = setting(
        "all", "with `extend`: the segments that the gradient goes through: all, last, or 2,3"
    )
    sampling: Sampling = field(default_factory=Sampling)
    decode_chunk_size: int = setting(1, "frames decoded at once", may_change=True)
    gradient_checkpointing: bool | None = setting(
        None,
        "recompute the denoiser's blocks in the backward pass; default: on CUDA",
        may_change=True,
    )
    activation_offload: bool = setting(
        False, "keep what the denoiser saves for backward in CPU memory", may_change=True
    )
    mixed_precision: str | None = setting(
        None, "no, fp16 or bf16; default: what accelerate launch was given, else no"
    )
    seed: int = setting(0, "of everything that is drawn")
    output_dir: Path = setting(Path("runs/align"), "the run's folder", may_change=True)
    checkpointing_steps: int = setting(20, "steps between checkpoints", may_change=True)
    checkpoints_total_limit: int | None = setting(
        None,
        "how many of the newest checkpoints are kept, in addition to the best; default: all",
        may_change=True,
    )
    validation_steps: int = setting(20, "steps between validations", may_change=True)
    early_stopping: int | None = setting(
        None,
        "end after this many validations without a better one, with the best checkpoint's adapter",
        may_change=True,
    )
    resume: bool | str | Path = setting(
        False,
        "true: continue from the newest checkpoint; latest: the same, or a new run if there is none; or a checkpoint's path",
        may_change=True,
    )
    log_with: str | None = setting(
        None, "tensorboard or wandb, in addition to metrics.jsonl", may_change=True
    )
    progress: bool = setting(True, "show a progress bar", may_change=True)

    def __post_init__(self):
        self.strategy = parse_strategy(self.strategy)
        if self.frames is not None:
            self.frames = parse_frames(self.frames)
        self.targets = parse_targets(self.targets) or None
        self.output_dir = Path(self.output_dir).expanduser()

    @classmethod
    def flat_fields(cls) -> list[Field]:
        """All settings as a shell and a file have them: those of `Sampling` beside the others."""
        return [f for f in fields(cls) if f.name != "sampling"] + list(fields(Sampling))

    @classmethod
    def from_flat(cls, settings: dict) -> "TrainConfig":
        """A configuration from the names of `flat_fields`, which may stand beside `sampling` and change it.

        Raises:
            ValueError: for an unknown name.
        """
        known = {f.name for f in cls.flat_fields()} | {"sampling"}
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise ValueError(
                f"unknown setting {unknown[0]!r}; choose one of {', '.join(sorted(known))}"
            )
        others = dict(settings)
        names = {f.name for f in fields(Sampling)} & settings.keys()
        flat = {name: others.pop(name) for name in names}
        sampling = replace(others.pop("sampling", None) or Sampling(), **flat)
        return cls(sampling=sampling, **others)

    def to_json(self) -> dict:
        """As `config.json` holds it."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain |= {"strategy": repr(self.strategy), "frames": str(self.frames)}
        plain |= {"sampling": asdict(self.sampling), "output_dir": str(self.output_dir)}
        return plain | {"resume": str(self.resume)}

    def validate(self) -> None:
        """Raises ValueError for a number that makes no sense."""
        check_bounds(self, BOUNDS)


def check_half(mixed_precision: str | None, dtypes: Iterable[torch.dtype]) -> None:
    """Raises ValueError for autocast to one half type over weights in the other: torch cannot mix the two."""
    half = HALF.get(mixed_precision or "")
    for dtype in dtypes:
        if half and dtype in HALF.values() and dtype != half:
            own = next(name for name, kind in HALF.items() if kind == dtype)
            raise ValueError(
                f"mixed_precision={mixed_precision} does not go with weights in {dtype}: "
                f"set mixed_precision={own} or no, or load the model with dtype={half}"
            )
