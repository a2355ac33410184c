"""Several processes that train one adapter, on accelerate.

The denoiser is called several times a step, and not through a wrapper whose own reduction of gradients would silently
not happen: in most code that backpropagates rewards under DDP each process trains an adapter of its own, and the first
one's is saved. Here processes meet explicitly, once an optimizer step, in one all-reduce of the adapter's gradient; and
after the step a checksum tells whether they still hold the same adapter.
"""

import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

from .models import VideoModel, alone

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb"}  # accelerate's name -> what to install


def accelerator_for(
    device: torch.device, mixed_precision: str | None, log_with: str | None, folder
) -> Accelerator:
    """The accelerator of a run; a notebook's next run may want another one. mixed_precision: None for the launcher's."""
    AcceleratorState._reset_state()
    if log_with is not None:
        if log_with not in TRACKERS:
            raise ValueError(f"unknown tracker {log_with!r}; choose one of {', '.join(TRACKERS)}")
        from accelerate.tracking import get_available_trackers

        if log_with not in [str(name) for name in get_available_trackers()]:
            raise ValueError(
                f"log_with={log_with} needs a package: pip install {TRACKERS[log_with]}"
            )
    engine = any(
        os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("DEEPSPEED", "FSDP")
    )
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=device.type == "cpu" and not engine,
        log_with=log_with,
        project_dir=str(folder),
    )
    if accelerator.device.type == device.type == "cuda" and accelerator.device != device:
        raise ValueError(
            f"the model lies on {device}, but this process's GPU is {accelerator.device}: in several processes, leave "
            f"load(device=…) out, or give it that one"
        )
    lonely = "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if (
        lonely
        and accelerator.num_processes == 1
        and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    ):
        warnings.warn(
            "`accelerate launch --cpu` starts one process, whatever --num_processes says; for several on a CPU: "
            "torchrun --nproc-per-node 2 -m vader_nb align …",
            stacklevel=2,
        )
    return accelerator


@dataclass
class Met:
    """What all processes know after they met: the mean reward, and whether any of them saw a number that was not
    finite, or was asked to stop."""

    reward: float
    non_finite: bool
    stop: bool


def meet(
    parameters: list[torch.nn.Parameter],
    accelerator: Accelerator,
    reward: float,
    non_finite: bool,
    stop: bool,
) -> Met:
    """Average the gradients over processes, in place, before anything clips them; and agree, in the same all-reduce, on
    what to do next: a process that skipped or stopped on its own would leave the others waiting for ever."""
    if accelerator.num_processes == 1:
        return Met(reward, non_finite, stop)
    for p in parameters:
        if p.grad is None or non_finite:
            p.grad = torch.zeros_like(p)
    told = parameters[0].new_tensor([0.0 if non_finite else reward, float(non_finite), float(stop)])
    with torch.no_grad():
        flat = accelerator.reduce(
            torch.cat([*(p.grad.flatten() for p in parameters), told]), "mean"
        )
        *gradients, told = flat.split([*(p.numel() for p in parameters), 3])
        for p, gradient in zip(parameters, gradients):
            p.grad.copy_(gradient.view_as(p))
    reward, non_finite, stop = told.tolist()
    return Met(reward, non_finite > 0, stop > 0)


def checksum(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """A number that changes with any bit of the parameters and with their order, (1,) int64; a sum, so it is cheap."""
    total = torch.zeros(1, dtype=torch.int64, device=parameters[0].device)
    for p in parameters:
        bits = p.detach().view({4: torch.int32, 8: torch.int64}[p.element_size()]).flatten().long()
        weights = torch.arange(
            1, 2 * len(bits), 2, device=bits.device
        )  # odd, so that no bit is multiplied away
        total = total * 31 + (bits * weights).sum()
    return total


def same_everywhere(
    parameters: list[torch.nn.Parameter], accelerator: Accelerator, step: int
) -> None:
    """Raises RuntimeError, in every process, unless all hold the same adapter to the last bit. 8 bytes a process."""
    if accelerator.num_processes == 1:
        return
    sums = accelerator.gather(checksum(parameters)).tolist()
    if len(set(sums)) > 1:
        odd = [rank for rank, value in enumerate(sums) if value != sums[0]]
        raise RuntimeError(
            f"after step {step} the processes hold different adapters: ranks {odd} differ from rank 0. Something changes "
            f"the adapter or its gradient outside of the training loop, or a device computes wrongly"
        )


def of_all(value, accelerator: Accelerator) -> list:
    """The values of all processes, in order."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def broadcast_from_main(make: Callable, accelerator: Accelerator):
    """What the main process makes (or the error it meets), in every process: files need not be shared."""
    if accelerator.num_processes == 1:
        return make()
    told = [None]
    if accelerator.is_main_process:
        try:
            told = [make()]
        except Exception as error:
            told = [error]
    (value,) = broadcast_object_list(told)
    if isinstance(value, Exception):
        raise value
    return value


SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
)  # the stop button or Ctrl-C; a cluster's warning before it kills


@contextlib.contextmanager
def handled(handler: Callable) -> Iterator[None]:
    """Inside, both signals call the handler; only a main thread can say so."""
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
def stoppable(accelerator: Accelerator) -> Iterator[list]:
    """Inside, a signal is a KeyboardInterrupt in a process that is alone. One of many only takes note, in the list that
    this hands out, and says so when they meet next."""
    asked = []

    def stop(number, frame):
        asked.append(number)
        if accelerator.num_processes == 1:
            raise KeyboardInterrupt

    with handled(stop):
        yield asked


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold a signal back until the block is done: half an optimizer step or half a record is none."""
    held = []
    with handled(lambda number, frame: held.append(number)):
        yield
    for number in held:
        signal.raise_signal(number)


def engine(accelerator: Accelerator) -> bool:
    """The processes were started by an engine (FSDP, DeepSpeed), which would have the loop's backward pass and optimizer
    for itself. It gets the frozen model at most; the adapter, whole in every process, stays with the loop."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def sharded(accelerator: Accelerator) -> bool:
    """The engine cuts the frozen model up over processes: FSDP, or DeepSpeed ZeRO-3."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def cut_up(network: torch.nn.Module) -> bool:
    """Of its weights each process holds a part (FSDP's are DTensors, ZeRO-3's bear DeepSpeed's marks): a call of it is a meeting
    of all processes, and one that not all of them make waits for ever."""
    return any(hasattr(p, "to_local") or hasattr(p, "ds_id") for p in network.parameters())


def shard(model: VideoModel, accelerator: Accelerator) -> None:
    """Let the engine cut up the frozen denoiser, before it gets an adapter. The adapter, which comes later, is whole in
    every process, and trains as without an engine; the engine gathers the weights around it, block by block."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = (
            1  # it wants to know; unused
        )
        accelerator.prepare(model.denoiser)
    else:
        from torch.distributed.fsdp import fully_shard

        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(
                "fsdp_version must be 2: version 1 flattens an adapter and frozen weights into one tensor"
            )
        for block in model.blocks():
            fully_shard(
                block,
                reshard_after_forward=plugin.reshard_after_forward,
                offload_policy=plugin.cpu_offload,
            )
        fully_shard(model.denoiser, offload_policy=plugin.cpu_offload)


@alone
def launch(function: Callable, *args, num_processes: int = 2) -> None:
    """Run function(*args) in several processes, from a notebook: one a GPU, or, with fewer GPUs than processes, on the
    CPU, to see how it works. Everything heavy (`load`, rewards) belongs inside the function, and results into files: the
    processes are forked, and what they change in memory is gone with them.

    Raises RuntimeError if CUDA is in use in this process already, which no forked process could then use. A process that
    fails takes the others with it, and its error is raised here.
    """
    from accelerate import debug_launcher, notebook_launcher

    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # an earlier run of this notebook was one process
    if torch.cuda.device_count() < num_processes:
        debug_launcher(_child, (1, function, *args), num_processes=num_processes)
        return
    if torch.cuda.is_initialized():
        raise RuntimeError(
            "this notebook has used the GPU already, and processes forked from it cannot: restart the kernel and run "
            "this cell before any other that touches the GPU (load the model inside the function)"
        )
    notebook_launcher(_child, (None, function, *args), num_processes=num_processes)


def _child(threads: int | None, function: Callable, *args) -> None:
    """What a forked process must know. It does not inherit its parent's threads, and would wait for them; and the bars
    of a notebook, which are widgets, belong to the parent."""
    import diffusers
    import transformers

    if threads:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # or accelerate would set more again
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    function(*args)
