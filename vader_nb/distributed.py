"""Several processes that train one adapter, on accelerate.

DDP's wrapper would silently not reduce gradients here, as the denoiser is called several times per step.
They are averaged explicitly, in one all-reduce; a checksum verifies that all hold the same adapter.
"""

import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .models import VideoModel, exclusive
from .prompts import Prompt

TRACKERS = ("tensorboard", "wandb")  # accelerate's names, and the packages'


def accelerator_for(
    device: torch.device, mixed_precision: str | None, log_with: str | None, folder
) -> Accelerator:
    """The accelerator of a run; a notebook's next run may want another one."""
    AcceleratorState._reset_state()
    if log_with is not None:
        if log_with not in TRACKERS:
            raise ValueError(f"unknown tracker {log_with!r}; choose one of {', '.join(TRACKERS)}")
        from accelerate.tracking import get_available_trackers

        if log_with not in [str(name) for name in get_available_trackers()]:
            raise ValueError(f"log_with={log_with} needs a package: pip install {log_with}")
    engines = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    engine = any(os.environ.get(name) == "true" for name in engines)
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=device.type == "cpu" and not engine,
        log_with=log_with,
        project_dir=str(folder),
    )
    if accelerator.device.type == device.type == "cuda" and accelerator.device != device:
        raise ValueError(
            f"the model is on {device}, but this process's GPU is {accelerator.device}: with several processes, leave "
            f"load(device=…) out, or give it that GPU"
        )
    if accelerator.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision=fp16 needs a GPU; on a CPU use bf16 or no")
    launched = "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if launched and on_cpu and accelerator.num_processes == 1:
        warnings.warn(
            "`accelerate launch --cpu` starts one process, whatever --num_processes says; for several on a CPU: "
            "torchrun --nproc-per-node 2 -m vader_nb align …",
            stacklevel=2,
        )
    return accelerator


@dataclass
class SyncResult:
    """What all processes know after `sync_gradients`: means, and whether one must skip or stop."""

    values: dict[str, float]
    non_finite: bool
    stop: bool


def sync_gradients(
    parameters: list[torch.nn.Parameter],
    accelerator: Accelerator,
    values: dict[str, float],
    non_finite: bool,
    stop: bool,
) -> SyncResult:
    """Average gradients (in place) and values over processes, in one all-reduce before clipping.

    It also lets all agree on what comes next: one that skipped a step alone would leave others waiting.
    """
    if accelerator.num_processes == 1:
        return SyncResult(values, non_finite, stop)
    for p in parameters:
        if p.grad is None or non_finite:
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in parameters if p.grad is not None]
    numbers = [0.0 if non_finite else value for value in values.values()]
    extra = parameters[0].new_tensor([*numbers, float(non_finite), float(stop)])
    with torch.no_grad():
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), extra])
        means: Any = accelerator.reduce(flat, "mean")
        *parts, extra = means.split([*(p.numel() for p in parameters), len(extra)])
        for gradient, part in zip(gradients, parts):
            gradient.copy_(part.view_as(gradient))
    *averages, non_finite, stop = extra.tolist()
    return SyncResult(dict(zip(values, averages)), non_finite > 0, stop > 0)


def checksum(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """A sum, (1,) int64, that changes with any bit of the parameters and with their order."""
    total = torch.zeros(1, dtype=torch.int64, device=parameters[0].device)
    for p in parameters:
        bits = p.detach().view({4: torch.int32, 8: torch.int64}[p.element_size()]).flatten().long()
        # Odd weights, so that no bit is multiplied away.
        weights = torch.arange(1, 2 * len(bits), 2, device=bits.device)
        total = total * 31 + (bits * weights).sum()
    return total


def check_synchronized(
    parameters: list[torch.nn.Parameter], accelerator: Accelerator, step: int
) -> None:
    """Raise RuntimeError, in every process, unless all hold the same adapter to the last bit."""
    if accelerator.num_processes == 1:
        return
    gathered: Any = accelerator.gather(checksum(parameters))
    sums = gathered.tolist()
    if len(set(sums)) > 1:
        different = [rank for rank, value in enumerate(sums) if value != sums[0]]
        raise RuntimeError(
            f"after step {step} the processes hold different adapters: ranks {different} differ from rank 0. "
            f"Something changes the adapter or its gradient outside of the training loop, or a device "
            f"computes wrongly"
        )


def gather(value, accelerator: Accelerator) -> list:
    """The values of all processes, in order."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def broadcast_from_main(make: Callable, accelerator: Accelerator | PartialState | None = None):
    """In every process, what `make()` returns or raises in the main process. Files need not be shared."""
    accelerator = accelerator or PartialState(cpu=not torch.cuda.is_available())
    if accelerator.num_processes == 1:
        return make()
    result = [None]
    if accelerator.is_main_process:
        try:
            result = [make()]
        except Exception as error:
            result = [error]
    (value,) = broadcast_object_list(result)
    if isinstance(value, Exception):
        raise value
    return value


def encode_texts(model: VideoModel, prompts: Sequence[str | Prompt]) -> None:
    """`model.encode_texts`, by the main process; the others wait, and then find on disk what it left there."""
    if model.keeps_texts and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        broadcast_from_main(lambda: model.encode_texts(prompts))
    model.encode_texts(prompts)


def is_main_process() -> bool:
    """Whether this process speaks and writes for all. Also gives each process its own GPU."""
    return PartialState(cpu=not torch.cuda.is_available()).is_main_process


# ------------------------------------------------------------------------------------------- signals

# The stop button or Ctrl-C; a cluster's warning before it kills; a terminal that is closed.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]  # no SIGHUP on Windows


@contextlib.contextmanager
def signal_handler(handler: Callable) -> Iterator[None]:
    """Inside, these signals call the handler. Does nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def catch_signals(accelerator: Accelerator) -> Iterator[list]:
    """Yields a list of the signals that came; in a single process they raise KeyboardInterrupt, too."""
    received = []

    def handler(number, frame):
        received.append(number)
        if accelerator.num_processes == 1:
            raise KeyboardInterrupt

    with signal_handler(handler):
        yield received


@contextlib.contextmanager
def delay_signals() -> Iterator[None]:
    """Hold signals back until the block is done, so that a step is taken and recorded, or neither."""
    delayed = []
    with signal_handler(lambda number, frame: delayed.append(number)):
        yield
    for number in delayed:
        signal.raise_signal(number)


# -------------------------------------------------------------------------------------------- launching


@exclusive
def launch(function: Callable, *args, num_processes: int = 2) -> None:
    """Run function(*args) in several processes, from a notebook.

    There is one process per GPU or, with fewer GPUs than processes, all run on the CPU, to see how it
    works. Everything heavy (`load`, rewards) belongs inside the function, and results belong in files: the
    processes are forked, and what they change in memory is lost with them.

    Raises:
        RuntimeError: if this process already uses CUDA, which forked processes then could not use.
        Exception: what a process raised; the others end with it.
    """
    from accelerate import debug_launcher, notebook_launcher

    # An earlier run of this notebook was one process.
    AcceleratorState._reset_state(reset_partial_state=True)
    if torch.cuda.device_count() < num_processes:
        debug_launcher(_run_forked, (1, function, *args), num_processes=num_processes)
        return
    if torch.cuda.is_initialized():
        raise RuntimeError(
            "this notebook has used the GPU already, and processes forked from it cannot use it: restart the kernel "
            "and run this cell before any other that touches the GPU (load the model inside the function)"
        )
    notebook_launcher(_run_forked, (None, function, *args), num_processes=num_processes)


def _run_forked(threads: int | None, function: Callable, *args) -> None:
    """A forked process has neither its parent's threads nor a notebook's progress bars."""
    import diffusers
    import transformers

    if threads:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # or accelerate would set more again
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    function(*args)
