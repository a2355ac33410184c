"""Will it fit? The peak memory of a training step, stage by stage, without a GPU and without weights.

`memory("modelscope", "hps")` runs the code of training on fake tensors, which have shapes but no numbers,
and counts the bytes that are alive. A setting acts here because it acts in training.
"""

import contextlib
import copy
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jinja2
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from . import experts, lora, models, quantization, sharding
from .distributed import sync_gradients
from .gradient import accumulate, rolled_out
from .models import VideoModel
from .offload import frozen_tensors, moved
from .prompts import Prompt
from .rewards import Reward, parse
from .strategies import Frames, parse_frames, parse_strategy
from .train_config import HALF, TrainConfig, check_half

GIB = 2**30
STAGES = ("weights", "text", "roll-out", "decode", "reward", "replay", "optimizer")
GPUS = {  # GiB, as torch reports their total memory
    "T4": 14.6,
    "V100 16 GB": 15.8,
    "L4": 22.0,
    "RTX 4090": 23.6,
    "RTX 3090": 23.7,
    "V100 32 GB": 31.7,
    "A100 40 GB": 39.4,
    "A100 80 GB": 79.1,
    "H100": 79.1,
    "H200": 139.7,
    "B200": 178.3,
}
MARGIN = 1.0  # GiB for what is not a tensor
MARGIN_HELP = "for CUDA's context, kernels' workspaces and gaps between tensors"
# Big models are trained one clip at a time, with blocks recomputed.
DEFAULTS = {"batch_size": 1, "gradient_checkpointing": True}
# What saves memory, the cheapest in time and in quality first.
SAVINGS = (
    {"gradient_checkpointing": True},
    {"sequential_guidance": True},
    {"model_cpu_offload": True},
    {"sharding": "full"},
    {"decode_chunk_size": 1},
    {"decoder_states": "cpu"},
    {"activation_offload": True},
    {"batch_size": 1},
    {"quantize": "8bit"},
    {"quantize": "4bit"},
    {"frames": Frames.random(1)},
    {"num_frames": 8},
)
# Settings that are not training's.
OF_MODEL = ("dtype", "model_cpu_offload", "text_cache", "quantize", "num_gpus", "sharding")
OF_MODEL += models.DECODER_SETTINGS
METHODS = {  # of a model, and the stages that they begin; `predict` begins the replay, too
    "new_scheduler": "roll-out",
    "encode": "text",
    "predict": "roll-out",
    "decode": "decode",
    "decode_vjp": "decode",
}


class MemoryTracker(TorchDispatchMode):
    """Context that counts the memory of the tensors made inside, forward and backward.

    Every storage made inside counts once, until its last tensor is gone; what existed before does not
    count, nor does a kernel's workspace. (torch's `MemTracker` is private and groups by module, not by stage.)

    Args:
        device: the type of the devices whose tensors count; None: all.
    """

    def __init__(self, device: str | None = None):
        super().__init__()
        self.device = device
        self.live = 0  # bytes now
        self.bytes = 0  # the most at one moment
        self.stages: dict[str, int] = {}  # the most in each stage that was entered
        self.stage = ""
        self._known: dict[int, int] = {}  # bytes by storage

    def __enter__(self):
        # Patched, since dispatch does not see it: this is how FSDP frees gathered weights and gets them back.
        storages: Any = torch.UntypedStorage
        self._resize = resize = storages.resize_

        def resized(storage, size):
            resize(storage, size)
            if storage._cdata in self._known:
                self.live += storage.nbytes() - self._known[storage._cdata]
                self._known[storage._cdata] = storage.nbytes()
                self._update()

        storages.resize_ = resized
        return super().__enter__()

    def __exit__(self, *problem):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*problem)

    def enter(self, stage: str) -> None:
        self.stage = stage
        self._update()

    def track(self, *tensors: torch.Tensor) -> None:
        """Count these too."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self._update()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # until it is about the tensors inside
        result = function(*args, **(kwargs or {}))
        made = [x for x in _tensors(result) if self.device in (None, x.device.type)]
        if any(x.untyped_storage()._cdata not in self._known for x in made):
            # The rest are views of what was there before, or made in place.
            given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
            self.track(*(x for x in made if x.untyped_storage()._cdata not in given))
        return result

    def _update(self) -> None:
        self.bytes = max(self.bytes, self.live)
        self.stages[self.stage] = max(self.stages.get(self.stage, 0), self.live)

    def _free(self, storage: int) -> None:
        self.live -= self._known.pop(storage)


def _tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class CUDATracker:
    """What `MemoryTracker` counts, by torch's CUDA allocator."""

    def __init__(self):
        self.stage = ""
        self.stages: dict[str, int] = {}

    def enter(self, stage: str) -> None:
        peak = torch.cuda.max_memory_allocated()
        self.stages[self.stage] = max(self.stages.get(self.stage, 0), peak)
        torch.cuda.reset_peak_memory_stats()
        self.stage = stage


class FakeMode(FakeTensorMode):
    """Context in which tensors have shapes but no numbers; `if tensor:` gives `truth`.

    In training, True is right: all is finite, and the frames lie in their range. While networks are
    made it has to be False, since initializers draw again as long as a number is out of bounds.
    """

    def __init__(self):
        # A fake mode makes autograd believe in a CUDA device; the first backward pass would start a thread for it, and
        # a process with such threads cannot be forked (`distributed.launch`).
        torch.zeros((), requires_grad=True).backward()
        super().__init__(allow_non_fake_inputs=True)
        self.truth = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        try:
            return super().__torch_dispatch__(function, types, args, kwargs or {})
        except DataDependentOutputException:
            dtype = args[0].dtype
            if dtype == torch.bool:
                return self.truth
            return 1.0 if dtype.is_floating_point else 0


@dataclass(frozen=True)
class Step:
    """A training step, with all that decides how much memory it takes."""

    model: str
    reward: str
    config: TrainConfig
    dtype: torch.dtype | dict[str, torch.dtype] | None
    model_cpu_offload: bool
    text_cache: bool | None
    quantize: str | None
    decoder: dict
    num_gpus: int = 1
    sharding: str = "none"

    @classmethod
    def of(cls, model: str | Path, reward: str, settings: dict) -> "Step":
        """Arguments as for `memory`. Raises ValueError for an unknown setting."""
        known = [f.name for f in TrainConfig.flat_fields()] + [*OF_MODEL]
        for name in settings:
            if name not in known:
                raise ValueError(f"unknown setting {name!r}; memory depends on {', '.join(known)}")
        flat = DEFAULTS | settings
        if (flat.get("extend") or 1) > 1:
            raise ValueError(
                f"extend={flat['extend']}: segments learn one after the other; plan for one of them: extend=1"
            )
        shared = sharding.check(flat.pop("num_gpus", 1), flat.pop("sharding", "none"))
        sharding.check_quantize(flat.get("quantize"), shared[1] != "none")
        given = {name: flat.pop(name, None) for name in OF_MODEL}
        dtype, offload = given["dtype"], bool(given["model_cpu_offload"])
        dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if not isinstance(dtype, torch.dtype | dict | None):
            raise ValueError(f"unknown dtype {dtype!r}; choose float16, bfloat16 or float32")
        decoder = models.decoder_settings(model, given)
        quantization.config(given["quantize"])  # or an error now
        config, loading = TrainConfig.from_flat(flat), (given["text_cache"], given["quantize"])
        step = cls(str(model), reward, config, dtype, offload, *loading, decoder, *shared)
        dtypes = step.dtypes
        dtypes.pop("text_encoder", None)  # which autocast does not reach
        check_half(config.mixed_precision, dtypes.values())
        return step

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Types of the parts, and "default", as `models.load` gives them on a GPU."""
        checkpoint = models.checkpoint_of(self.model)
        own = models.family_of(checkpoint).dtypes_of(checkpoint)
        return models.part_dtypes(own, torch.device("cuda"), self.dtype)

    def make_reward(self, **options) -> Reward:
        tiny = models.checkpoint_of(self.model).world == "tiny"
        return parse(self.reward, tiny=tiny, **options)

    def load(self, device: str) -> VideoModel:
        options = {"text_cache": self.text_cache, "quantize": self.quantize}
        return models.load(self.model, device=device, dtype=self.dtypes, **options)

    def run(self, model: VideoModel, reward: Reward, tracker) -> dict[str, int]:
        """Peak bytes by stage of a step."""
        config: Any = self.config
        for name, value in self.decoder.items():
            setattr(model, name, value)
        strategy = parse_strategy(config.strategy)
        with unset_fake_temporarily():
            reach = experts.Reach(model, config.sampling.resolve(model), strategy)
            targets = reach.targets(config.targets)
        adapter = lora.add(model, config.rank, targets=targets)
        if len(model.denoisers) > 1:
            # Fake timesteps cannot say which expert's they are; experts are alike in size.
            learning = model.denoisers[adapter.denoisers[-1]]
            model.denoiser_at = lambda t: learning
        if self.model_cpu_offload:
            model.enable_model_cpu_offload()
            model.offload(*reward.networks)
        optimizer = torch.optim.AdamW(adapter.parameters())
        for p in adapter.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()  # makes its moments, which are there in every later step
        optimizer.zero_grad()
        gc.collect()
        tracker.enter("weights")
        _report_stages(model, tracker.enter)
        half = HALF.get(config.mixed_precision or "")
        with torch.autocast(model.device.type, half, enabled=half is not None):
            self.gradient(model, adapter, ReportingReward(reward, tracker.enter), tracker)
        gc.collect()  # uncollected garbage would count or not by chance
        tracker.enter("optimizer")
        if self.num_gpus > 1:
            one_of = SimpleNamespace(num_processes=self.num_gpus, reduce=lambda x, how: x.clone())
            sync_gradients(adapter.parameters(), cast(Any, one_of), {}, False, False)
        optimizer.step()
        optimizer.zero_grad()
        tracker.enter("")
        return {stage: tracker.stages[stage] for stage in STAGES}

    def gradient(self, model: VideoModel, adapter, reward: Reward, tracker) -> None:
        """As in training, with the stages reported. Before the window, only one of the identical steps is taken."""
        config, generator = self.config, torch.Generator().manual_seed(0)
        sampling = config.sampling.resolve(model)
        with unset_fake_temporarily():
            plan = experts.draw_plan(
                model, adapter, sampling, parse_strategy(config.strategy), generator
            )
            chosen = self.scored_frames(model, reward, sampling.num_frames)
        settings = {
            "gradient_checkpointing": bool(config.gradient_checkpointing),
            "activation_offload": config.activation_offload,
            "decode_chunk_size": config.decode_chunk_size,
        }
        steps = min(sampling.num_inference_steps, max(plan.active) + 1)
        few = replace(sampling, num_inference_steps=steps)
        prompts: list = ["a prompt"] * config.batch_size
        if model.takes_image:
            image = torch.zeros(3, sampling.height, sampling.width)
            prompts = [Prompt("a prompt", image=image)] * config.batch_size
        seeds = range(config.batch_size)
        rollout = rolled_out(model, adapter, prompts, seeds, few, plan, **settings)

        def backward(loss: torch.Tensor) -> None:
            tracker.enter("replay")
            loss.backward()

        accumulate(model, adapter, reward, rollout, plan, chosen, backward=backward, **settings)

    def scored_frames(self, model: VideoModel, reward: Reward, num_frames: int) -> list[int]:
        """Indices; in place of random ones, those that take the most memory: the last ones of a causal decoder, which
        decodes all before them, or else some in the middle, where chunks are whole."""
        default = Frames.random(1) if reward.per_frame else Frames.all()
        frames = parse_frames(self.config.frames or default)
        chosen = frames.choose(num_frames, torch.Generator().manual_seed(0))
        if frames.kind == "random":
            causal = isinstance(model, models.CausalDecoder)
            start = num_frames - len(chosen) if causal else (num_frames - len(chosen)) // 2
            chosen = list(range(start, start + len(chosen)))
        return chosen

    def simulate(self) -> dict[str, int]:
        """Peak bytes by stage."""
        # The accelerator's tensors are fake ones on "cpu", where torch picks fused attention, as
        # CUDA does on every GPU named here; offloaded ones are on "meta".
        before = torch.get_default_dtype()
        with FakeMode() as fake, MemoryTracker("cpu") as tracker:
            torch.set_default_dtype(self.dtypes["default"])
            try:
                fake.truth = False
                model = models.from_config(self.model, self.text_cache, self.quantize)
                reward = self.make_reward(from_config=True)
            finally:
                torch.set_default_dtype(before)
            fake.truth = True
            _convert_parts(model, self.dtypes)
            model.offload_device = torch.device("meta")
            if self.sharding == "none":
                return self.run(model, reward, tracker)
            with sharding.simulated(self.num_gpus):
                sharding.shard(model)
                return self.run(model, reward, tracker)

    def count(self) -> dict[str, int]:
        """The same with real weights on the CPU, which has no count of its own: every storage is counted."""
        with MemoryTracker() as tracker:
            model = self.load("cpu")
            reward = self.make_reward()
            for network in [*model.modules(), *reward.networks]:
                tracker.track(*network.parameters(), *network.buffers())
            if self.sharding != "none":
                sharding.shard(model)  # over processes that are there
            return self.run(model, reward, tracker)

    def measure(self) -> dict[str, int]:
        """The same with real weights on a CUDA device."""
        if self.num_gpus > 1:
            raise ValueError(
                f"measured works on one GPU only, and num_gpus={self.num_gpus}: leave one of the two out"
            )
        model = self.load("cuda")
        return self.run(model, self.make_reward().to("cuda", self.dtypes["default"]), CUDATracker())


class ReportingReward(Reward):
    """A reward that reports when it is called."""

    def __init__(self, inner: Reward, on_stage: Callable[[str], None]):
        self.inner, self.on_stage = inner, on_stage
        self.name, self.per_frame, self.networks = inner.name, inner.per_frame, inner.networks

    def __call__(self, frames, prompts):
        self.on_stage("reward")
        return self.inner(frames, prompts)


def _convert_parts(model: VideoModel, dtypes: dict[str, torch.dtype]) -> None:
    """Convert the parts named by `dtypes`: fake weights are replaced, since they cannot change."""
    for part, dtype in dtypes.items():
        if part != "default":
            network = model.denoisers.get(part) or getattr(model, part)
            for table, name, tensor in frozen_tensors(network):
                if tensor.is_floating_point():
                    table[name] = moved(tensor, dtype)


def _report_stages(model: VideoModel, on_stage: Callable[[str], None]) -> None:
    """Let the model report its stages from now on, and make its schedulers with real numbers."""

    def report(method, original, *args, **kwargs):
        replayed = method == "predict" and torch.is_grad_enabled()
        on_stage("replay" if replayed else METHODS[method])
        return original(*args, **kwargs)

    def new_scheduler(sampling, original=model.new_scheduler):
        with unset_fake_temporarily():
            scheduler: Any = original(sampling)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # or it would search for its place among the timesteps
        return _with_fake_deepcopy(scheduler)

    model.new_scheduler = new_scheduler
    for method in METHODS:
        setattr(model, method, functools.partial(report, method, getattr(model, method)))


def _with_fake_deepcopy(scheduler):
    """The scheduler; its deep copies clone tensors, since `copy` corrupts memory with fakes."""

    def deepcopy(memo):
        twin = copy.copy(scheduler)
        vars(twin).update(tree_map_only(torch.Tensor, torch.clone, vars(scheduler)))
        return _with_fake_deepcopy(twin)

    scheduler.__deepcopy__ = deepcopy
    return scheduler


_simulated: dict[str, dict[str, int]] = {}


def simulate(model: str | Path = "modelscope", reward: str = "hps", **settings) -> dict[str, int]:
    """Peak bytes of one training step by stage, simulated on the CPU; arguments as for `memory`."""
    step = Step.of(model, reward, settings)
    if repr(step) not in _simulated:
        _simulated[repr(step)] = step.simulate()
    return dict(_simulated[repr(step)])


def fits(amount: int, gib: float) -> bool:
    return amount / GIB + MARGIN <= gib


def find_gpu(gpu_memory: float | str) -> tuple[str, float]:
    """Name and GiB of a GPU: a number of GiB, or a name of `GPUS` or a part of one, such as "4090"."""
    number = 1000.0
    with contextlib.suppress(ValueError):
        number = float(gpu_memory)
    if 0 < number < 1000:
        return f"{number:g} GiB", number
    text = str(gpu_memory).lower().replace(" ", "")
    found = [name for name in GPUS if number > 0 and text in name.lower().replace(" ", "")]
    if len(found) == 1:
        return found[0], GPUS[found[0]]
    problem = f"{gpu_memory!r} may be {' or '.join(found)}"
    problem = problem if found else f"unknown GPU {gpu_memory!r}"
    raise ValueError(f"{problem}; choose one of {', '.join(GPUS)}, or give its memory in GiB")


def describe(suggestion: dict | None) -> str:
    """A suggestion in words."""
    if suggestion is None:
        return "no setting is enough; use fewer or smaller frames, or a larger GPU"
    return "with " + ", ".join(f"{name}={value}" for name, value in suggestion.items())


HTML = jinja2.Template(
    """<table><caption>{{ memory.title }}</caption>
{% for name, amount, remark in memory.rows() %}
<tr><th style="text-align:left">{{ name }}</th><td>{{ amount }} GiB</td>
<td style="text-align:left">{{ remark }}</td></tr>
{% endfor %}</table><p>A GPU needs {{ margin }} GiB more, {{ margin_help }}.</p>""",
    autoescape=True,
)


@dataclass
class Memory:
    """Peak memory of one training step; prints as a table, as text and in a notebook.

    Attributes:
        stages: peak bytes by stage, of all that is on the accelerator, weights included.
        measured: on a GPU, instead of simulated.
        gpus: GiB by name.
        suggestions: for GPUs that are too small, the settings that, changed together, make the step
            fit; None if none do.
    """

    model: str
    reward: str
    settings: dict
    stages: dict[str, int]
    measured: bool = False
    gpus: dict[str, float] = field(default_factory=lambda: dict(GPUS))
    suggestions: dict[str, dict | None] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return max(self.stages.values())

    @property
    def fits(self) -> dict[str, bool]:
        return {gpu: fits(self.bytes, size) for gpu, size in self.gpus.items()}

    @property
    def title(self) -> str:
        how = "measured on this GPU" if self.measured else "simulated"
        return f"{self.model} + {self.reward}, {how}: peak {self.bytes / GIB:.2f} GiB"

    def search(self, gpu: str) -> Iterator[dict]:
        """Search for settings with which the step fits on a GPU, for `suggestions`, by simulating.

        What helps is kept, and in the end what is not necessary is dropped. Yields the settings of
        the next simulation.
        """
        change, least, size = {}, self._peak({}), self.gpus[gpu]
        for saving in SAVINGS:
            if not _applies(saving, self.model, self.reward, self.settings | change):
                continue
            yield self.settings | change | saving
            try:
                peak = self._peak(change | saving)
            except ValueError:  # frames that are given by index, and would not be there
                continue
            if peak < 0.99 * least:
                change, least = change | saving, peak
            if fits(least, size):
                break
        else:
            self.suggestions[gpu] = None
            return
        for name in list(change):
            fewer = {key: value for key, value in change.items() if key != name}
            yield self.settings | fewer
            if fits(self._peak(fewer), size):
                change = fewer
        self.suggestions[gpu] = change

    def _peak(self, change: dict) -> int:
        return max(simulate(self.model, self.reward, **(self.settings | change)).values())

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, GiB, remark), first of the stages, then of GPUs."""
        rows, worst = [], max(self.stages, key=lambda stage: self.stages[stage])
        for stage, amount in self.stages.items():
            rows.append((stage, f"{amount / GIB:.2f}", "the peak" if stage == worst else ""))
        for gpu, size in self.gpus.items():
            remark = "fits" if self.fits[gpu] else "too small"
            if gpu in self.suggestions:
                remark += f": {describe(self.suggestions[gpu])}"
            rows.append((gpu, f"{size:.1f}", remark))
        return rows

    def __str__(self) -> str:
        rows, remark = self.rows(), f"with {MARGIN:g} GiB {MARGIN_HELP}"
        rows.insert(len(self.stages), ("needed", f"{self.bytes / GIB + MARGIN:.2f}", remark))
        lines = [f"{name:<12}{amount:>7} GiB  {remark}".rstrip() for name, amount, remark in rows]
        return "\n".join([self.title, *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return HTML.render(memory=self, margin=f"{MARGIN:g}", margin_help=MARGIN_HELP)


@functools.cache
def is_per_frame(model: str, reward: str) -> bool:
    """Whether the reward scores single frames, not the whole clip."""
    with FakeMode() as fake:
        fake.truth = False
        return Step.of(model, reward, {}).make_reward(from_config=True).per_frame


def _applies(saving: dict, model: str | Path, reward: str, settings: dict) -> bool:
    """Whether this saving changes anything that may be changed."""
    if saving.keys() & {"frames", "num_frames"} and not is_per_frame(str(model), reward):
        return False  # the reward would score another clip
    if "frames" in saving and settings.get("frames") is None:
        return False  # one random frame already
    if "sharding" in saving and settings.get("num_gpus", 1) == 1:
        return False
    if "decoder_states" in saving and not models.is_causal(model):
        return False
    if "quantize" in saving and not quantization.is_installed():
        return False
    return Step.of(model, reward, settings | saving) != Step.of(model, reward, settings)


def memory(
    model: str | Path = "modelscope",
    reward: str = "hps",
    *,
    gpu_memory: float | str | None = None,
    measured: bool = False,
    **settings,
) -> Memory:
    """Peak memory of one training step by stage, which GPUs it fits on, and if it does not, what to change.

    Weights have `dtype`, by default what `models.load` gives them on a GPU; the reward's have that of most of the
    model's; the adapter and its optimizer are float32. A simulation takes
    some seconds to half a minute on a CPU; a search for what to change takes several simulations.

    Args:
        model: a name of `models.CHECKPOINTS`, or a pipeline directory.
        reward: an expression, as for `rewards.parse`.
        gpu_memory: the GPU to find settings for: GiB, or a name such as "T4" or "4090"; None: all of `GPUS`.
        measured: take the step on this machine's CUDA device, and report torch's own count.
        **settings: fields of `TrainConfig` and `Sampling`, by default `batch_size=1` and
            `gradient_checkpointing=True`; `dtype`, of all or by part as for `models.load`; `model_cpu_offload`;
            of a causal decoder `decoder_states` and `decoder_gradient`; `quantize`, as for `load`; `text_cache`,
            too: the row "text" then has the text encoder alone, before the first step; `num_gpus`, each with
            `batch_size` clips, and `sharding="full"`, as by `vader-nb engine fsdp`: the memory is then that of one
            of them.

    Raises:
        ValueError: an unknown model, reward, setting or GPU.
    """
    chosen = dict([find_gpu(gpu_memory)]) if gpu_memory is not None else GPUS
    step = Step.of(model, reward, settings)
    stages = step.measure() if measured else simulate(model, reward, **settings)
    result = Memory(str(model), reward, settings, stages, measured, gpus=GPUS | chosen)
    for gpu in chosen:
        if not result.fits[gpu]:
            for _ in result.search(gpu):
                pass
    return result
