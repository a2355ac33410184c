"""Will it fit? The peak memory of a training step, stage by stage, without a GPU and without weights.

`memory("modelscope", "hps")` runs the very code of training (encode, roll out, decode, score, replay, optimizer step)
on fake tensors, which have shapes and types but no numbers, with the full-size networks, and counts the bytes that live
at each moment. What is run is no formula: a setting of `reward_gradient` acts here because it acts there.
"""

import copy
import functools
import html
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import lora, models
from .gradient import Frames, Last, Plan, Sampling, Strategy, reward_gradient
from .models import VideoModel
from .rewards import Reward, outline, parse

STAGES = ("weights", "text", "roll-out", "decode", "reward", "replay", "optimizer")
GIB = 2**30
GPUS = {
    "T4": 14.6,
    "L4": 22.0,
    "A100 40 GB": 39.4,
    "A100 80 GB": 79.1,
}  # GiB, as torch reports their total memory
MARGIN = (
    1.0  # GiB for what is not a tensor: CUDA's context, kernels' workspaces, gaps between tensors
)


# ------------------------------------------------------------------------------------------- counting


class Peak(TorchDispatchMode):
    """Inside `with Peak() as peak: …`, counts the tensors that torch makes, forwards and backwards, on any device or
    only on those of the type `device`.

    `peak.bytes` is the most that lived at one moment, `peak.stages` the same for each stage that was entered. Counted is
    every storage made inside, once, from its birth until its last tensor is gone; not what was there before, and not
    what a kernel needs for itself.
    """

    def __init__(self, device: str | None = None):
        super().__init__()
        self.device, self.live, self.bytes, self.known = device, 0, 0, set()
        self.stage, self.stages = "", {}

    def enter(self, stage: str) -> None:
        self.stage = stage
        self.note()

    def note(self) -> None:
        self.bytes = max(self.bytes, self.live)
        self.stages[self.stage] = max(self.stages.get(self.stage, 0), self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        new = [x.untyped_storage() for x in tensors(result) if self.device in (None, x.device.type)]
        if any(storage._cdata not in self.known for storage in new):
            given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
            for storage in new:
                if (
                    storage._cdata not in self.known and storage._cdata not in given
                ):  # else a view, or made in place
                    self.born(storage)
            self.note()
        return result

    def born(self, storage: torch.UntypedStorage) -> None:
        self.known.add(storage._cdata)
        self.live += storage.nbytes()
        weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())

    def gone(self, identity: int, size: int) -> None:
        self.known.discard(identity)
        self.live -= size


def tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Shapes(FakeTensorMode):
    """Inside, tensors have shapes but no numbers. Who asks one for its number (`.item()`, `if tensor:`) hears yes, 1.0
    or 0: what training's own questions want to hear, whether all is finite and in which range the frames lie. While
    networks are made, `yes` has to be False: initializers draw again as long as a number is out of bounds."""

    yes = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        try:
            return super().__torch_dispatch__(function, types, args, kwargs)
        except DataDependentOutputException:
            dtype = args[0].dtype
            return self.yes if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0


class CudaPeak:
    """What `Peak` counts, as torch's CUDA allocator has it."""

    def __init__(self):
        self.stage, self.stages = "", {}

    def enter(self, stage: str) -> None:
        most = torch.cuda.max_memory_allocated()
        self.stages[self.stage] = max(self.stages.get(self.stage, 0), most)
        torch.cuda.reset_peak_memory_stats()
        self.stage = stage


# --------------------------------------------------------------------------------- one training step


@dataclass(frozen=True)
class Setting:
    """What decides how much memory a training step takes. Names and meanings as in `align` and `Sampling`;
    model_cpu_offload: after `model.enable_model_cpu_offload()`."""

    model: str = "modelscope"
    reward: str = "hps"
    batch_size: int = 1
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    strategy: Strategy = Last(1)
    frames: Frames = Frames()
    chunk: int = 1
    checkpoint_blocks: bool = True
    sequential_guidance: bool = False
    unconditional_gradient: bool = True
    offload: bool = False
    model_cpu_offload: bool = False
    rank: int = 8
    dtype: torch.dtype = torch.float16

    def sampling(self, model: VideoModel) -> Sampling:
        return Sampling(
            **{f.name: getattr(self, f.name) for f in fields(Sampling) if hasattr(self, f.name)}
        ).filled(model)


@dataclass(frozen=True)
class Decided:
    """A plan that is drawn already, in a strategy's place."""

    drawn: Plan

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        return self.drawn


def step(model: VideoModel, reward: Reward, setting: Setting, meter: "Peak | CudaPeak") -> None:
    """One training step, and `meter` told of its stages.

    Sampling steps before the window are all alike, and one of them is taken: their peaks are the same.
    """
    sampling, generator = setting.sampling(model), torch.Generator().manual_seed(0)
    with unset_fake_temporarily():
        plan = setting.strategy.plan(sampling.num_inference_steps, generator)
        chosen = setting.frames.choose(sampling.num_frames, generator)
    sampling.num_inference_steps = min(sampling.num_inference_steps, max(plan.active) + 1)
    adapter = lora.add(model, setting.rank)
    if setting.model_cpu_offload:
        model.enable_model_cpu_offload()
        model.send_home(*reward.networks)
    optimizer = torch.optim.AdamW(adapter.parameters())
    for p in adapter.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # its moments are there from the first step on
    optimizer.zero_grad()
    meter.enter("weights")
    watch(model, meter.enter)
    reward_gradient(
        model,
        adapter,
        Watched(reward, meter.enter),
        ["a prompt"] * setting.batch_size,
        seeds=list(range(setting.batch_size)),
        strategy=Decided(plan),
        frames=Frames("list", indices=tuple(chosen)),
        sampling=sampling,
        chunk=setting.chunk,
        checkpoint_blocks=setting.checkpoint_blocks,
        offload=setting.offload,
        generator=generator,
    )
    meter.enter("optimizer")
    optimizer.step()
    optimizer.zero_grad()
    meter.enter("")


class Watched(Reward):
    def __init__(self, inner: Reward, enter: Callable[[str], None]):
        self.inner, self.enter = inner, enter
        self.name, self.per_frame, self.networks = inner.name, inner.per_frame, inner.networks

    def __call__(self, frames, prompts):
        self.enter("reward")
        return self.inner(frames, prompts)


def watch(model: VideoModel, enter: Callable[[str], None]) -> None:
    """Let the model say at which stage it is, from now on; and its schedulers compute with numbers, fake or not."""

    def watched(function: Callable, stage: Callable[[], str]) -> Callable:
        def run(*args, **kwargs):
            enter(stage())
            return function(*args, **kwargs)

        return run

    def new_scheduler(num_inference_steps, make=model.new_scheduler):
        enter("roll-out")
        with unset_fake_temporarily():
            scheduler = make(num_inference_steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # else it would look for its place among the timesteps
        return copyable(scheduler)

    model.encode = watched(model.encode, lambda: "text")
    model.predict = watched(
        model.predict, lambda: "replay" if torch.is_grad_enabled() else "roll-out"
    )
    model.decode = watched(model.decode, lambda: "decode")
    model.new_scheduler = new_scheduler


def copyable(scheduler):
    """The same scheduler, whose deep copies are made of what fake tensors can do: `copy` asks for their address."""

    def duplicate(memo=None):
        twin = copy.copy(scheduler)
        for key, value in vars(twin).items():
            if isinstance(value, torch.Tensor | list):
                setattr(twin, key, copied(value))
        return copyable(twin)

    scheduler.__deepcopy__ = duplicate
    return scheduler


def copied(value):
    return (
        [copied(x) for x in value]
        if isinstance(value, list)
        else value.clone()
        if hasattr(value, "clone")
        else value
    )


@functools.cache
def sees_frames(model: str, reward: str) -> bool:
    """The reward scores single frames, not the whole clip."""
    with Shapes(allow_non_fake_inputs=True) as shapes:
        shapes.yes = False
        return parse(reward, tiny=model == "tiny", outline=True).per_frame


@functools.cache
def simulate(setting: Setting) -> dict[str, int]:
    """Bytes by stage. The accelerator's tensors are fake ones on "cpu", what waits elsewhere is on "meta": torch then
    picks fused attention, as CUDA does on every GPU named here, and not the one with all its weights in memory."""
    with Shapes(allow_non_fake_inputs=True) as shapes, Peak("cpu") as peak:
        shapes.yes = False
        with outline.default_dtype(setting.dtype):
            model = models.outline(setting.model)
            model.home = torch.device("meta")
            reward = parse(setting.reward, tiny=setting.model == "tiny", outline=True)
        shapes.yes = True
        step(model, reward, setting, peak)
    return {stage: peak.stages[stage] for stage in STAGES}


def measure(setting: Setting) -> dict[str, int]:
    """The same with real weights on a CUDA device, by torch's own count."""
    model, peak = models.load(setting.model, device="cuda", dtype=setting.dtype), CudaPeak()
    reward = parse(setting.reward, tiny=setting.model == "tiny").to("cuda", setting.dtype)
    step(model, reward, setting, peak)
    return {stage: peak.stages[stage] for stage in STAGES}


# ------------------------------------------------------------------------------------------ the answer

# What saves memory, the cheapest in time and in what is trained first.
REMEDIES = (
    {"checkpoint_blocks": True},
    {"sequential_guidance": True},
    {"model_cpu_offload": True},
    {"chunk": 1},
    {"batch_size": 1},
    {"frames": Frames("random", 1)},
    {"num_frames": 8},
)
FEWER = {
    "frames",
    "num_frames",
}  # of a clip, a reward on the whole of it would be given another clip, or none


@dataclass
class Memory:
    """Peak bytes by stage of one training step; prints as a table, as text and in a notebook.

    A stage's figure is all that lives on the accelerator at its worst moment, weights included. `remedies` tells for a
    GPU that is too small which settings, changed together, make the step fit, or None where none of ours does.
    """

    setting: Setting
    stages: dict[str, int]
    measured: bool = False
    remedies: dict[str, dict | None] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return max(self.stages.values())

    @property
    def fits(self) -> dict[str, bool]:
        return {gpu: fits(self.bytes, gpu) for gpu in GPUS}

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, GiB, remark), stages first, then GPUs."""
        worst = max(self.stages, key=self.stages.get)
        rows = [
            (s, f"{b / GIB:.2f}", "the peak" if s == worst else "") for s, b in self.stages.items()
        ]
        for gpu, size in GPUS.items():
            remark = "fits" if self.fits[gpu] else "too small"
            if gpu in self.remedies:
                remark += f": {spelled(self.remedies[gpu])}"
            rows.append((gpu, f"{size:.1f}", remark))
        return rows

    def __str__(self) -> str:
        lines = [
            f"{what:<12}{amount:>7} GiB  {remark}".rstrip() for what, amount, remark in self.rows()
        ]
        lines.insert(
            len(self.stages),
            f"needed      {self.bytes / GIB + MARGIN:7.2f} GiB  with {MARGIN:g} GiB {SPARE}",
        )
        return "\n".join([self.title, *lines])

    __repr__ = __str__

    @property
    def title(self) -> str:
        how = "measured on this GPU" if self.measured else "simulated"
        return (
            f"{self.setting.model} + {self.setting.reward}, {how}: peak {self.bytes / GIB:.2f} GiB"
        )

    def _repr_html_(self) -> str:
        cells = (
            f"<tr><th style='text-align:left'>{html.escape(what)}</th><td>{amount} GiB</td>"
            f"<td style='text-align:left'>{html.escape(remark)}</td></tr>"
            for what, amount, remark in self.rows()
        )
        note = f"A GPU needs {MARGIN:g} GiB more, {SPARE}."
        return f"<table><caption>{html.escape(self.title)}</caption>{''.join(cells)}</table><p>{note}</p>"


SPARE = "for CUDA's context, kernels' workspaces and gaps between tensors"


def fits(amount: int, gpu: str) -> bool:
    return amount / GIB + MARGIN <= GPUS[gpu]


def spelled(change: dict | None) -> str:
    if change is None:
        return "no setting of ours is enough; take fewer or smaller frames, or a larger GPU"
    return "with " + ", ".join(f"{name}={value!r}" for name, value in change.items())


def remedy(setting: Setting, gpu: str) -> dict | None:
    """The settings that make it fit, or None."""
    search = trying(setting, gpu)
    while True:
        try:
            next(search)
        except StopIteration as found:
            return found.value


def trying(setting: Setting, gpu: str) -> Generator[Setting, None, dict | None]:
    """Look for the settings that make it fit, by trying: one after the other, what helps is kept, and what turns out not
    to have been necessary is dropped. Yields each setting before it is simulated; returns what `remedy` does."""
    change, least = {}, simulate(setting)
    per_frame = sees_frames(setting.model, setting.reward)
    for offer in REMEDIES:
        candidate = replace(setting, **(change | offer))
        if candidate == replace(setting, **change) or (FEWER & offer.keys() and not per_frame):
            continue
        yield candidate
        try:
            simulate(candidate)
        except ValueError:  # frames that are named one by one, and would not be there
            continue
        if max(simulate(candidate).values()) < 0.99 * max(least.values()):
            change, least = change | offer, simulate(candidate)
        if fits(max(least.values()), gpu):
            break
    else:
        return None
    for name in list(change):
        without = {key: value for key, value in change.items() if key != name}
        yield replace(setting, **without)
        if fits(max(simulate(replace(setting, **without)).values()), gpu):
            change = without
    return change


def memory(
    model: str | Path = "modelscope",
    reward: str = "hps",
    *,
    gpu: str | None = None,
    measured: bool = False,
    **settings,
) -> Memory:
    """Peak memory of one training step, by stage, and which GPUs it fits on; if it does not, what to change.

    model: a name of `models.CHECKPOINTS`, or a pipeline directory. reward: an expression, as for `rewards.parse`.
    settings: the other fields of `Setting`, under the names they have in `align` and `Sampling`. gpu: one of `GPUS`, to
    look for the settings that make it fit on this one; None: on all. measured: take the step for real on this machine's
    CUDA device, with real weights, and report torch's own count.

    Weights, and the reward's, have `dtype`; the adapter and its optimizer are float32; there is no autocast. A simulation
    takes some seconds to half a minute on a CPU, and a search for what to change several of them. It counts tensors:
    for what else a GPU holds, `MARGIN` is added before `fits` says yes.

    Raises ValueError for an unknown model, reward, setting or GPU.
    """
    known = [f.name for f in fields(Setting)]
    for name in settings:
        if name not in known:
            raise ValueError(f"unknown setting {name!r}; memory depends on {', '.join(known)}")
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"unknown GPU {gpu!r}; choose one of {', '.join(GPUS)}")
    setting = Setting(str(model), reward, **settings)
    result = Memory(setting, (measure if measured else simulate)(setting), measured)
    for name in [gpu] if gpu else GPUS:
        if not result.fits[name]:
            result.remedies[name] = remedy(setting, name)
    return result
