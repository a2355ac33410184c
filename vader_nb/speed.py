"""Switches for speed, all off by default: which of them help depends on the model and the machine.

    speed.apply(model, "channels_last,compile")     # from now on
    with speed.apply(model, "channels_last"):       # only inside

`vader-nb selfcheck speed=true` measures them on a machine. None changes the result, beyond rounding,
or the names of weights and of the adapter's tensors.

A switch is a function of the model and an `ExitStack`, on which it puts what turns it off again. It
raises `Unavailable` where it cannot help.
"""

import functools
import shutil
import statistics
import time
import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._triton import has_triton

from .models import VideoModel

# Of attention, as torch.backends.cuda names them.
KERNELS = ("flash", "mem_efficient", "cudnn", "math")
LAYOUTS = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
# Compiled variants of a block (sizes, with and without a graph, adapter fused or not); torch allows 8.
CACHE_SIZE_LIMIT = 64
SPEEDUP = 1.05  # that makes a switch worth it; more where chance alone goes further
SAME_GRADIENT = 0.99  # cosine of a switch's gradient to the one without
ROUNDS = 5


class Unavailable(RuntimeError):
    """A switch cannot help with this model on this device; says why."""


def tf32(model: VideoModel, undo: ExitStack) -> None:
    """float32 products with 10 bits of mantissa, on CUDA."""
    if model.device.type != "cuda":
        raise Unavailable("only CUDA devices have TF32")
    if torch.cuda.get_device_capability(model.device) < (8, 0):
        raise Unavailable("this GPU is older than TF32 (Ampere)")
    undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision("high")


def channels_last(model: VideoModel, undo: ExitStack) -> None:
    """Convolutions of denoiser and decoder on pixels with their channels adjacent in memory."""
    if model.offloader is not None:
        raise Unavailable(
            "weights that are offloaded keep their layout; turn this on before offloading"
        )
    for network in (*model.denoisers.values(), *model.decoders()):
        for module in network.modules():
            # A convolution with a channels-last weight returns channels-last activations.
            if layout := LAYOUTS.get(type(module)):
                weight: Any = module.weight
                undo.callback(setattr, weight, "data", weight.data)
                weight.data = weight.data.contiguous(memory_format=layout)


def compile_blocks(model: VideoModel, undo: ExitStack) -> None:
    """torch.compile of the denoiser's blocks; the first step takes minutes.

    Blocks of one class share compiled code, and gradient checkpointing, which wraps blocks, stays outside.
    """
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise Unavailable("torch.compile needs a C++ compiler, and there is none on the PATH")
    if model.device.type == "cuda" and not has_triton():
        raise Unavailable("torch.compile needs Triton on CUDA")
    from torch._dynamo import config  # takes a second

    undo.callback(setattr, config, "cache_size_limit", config.cache_size_limit)
    config.cache_size_limit = max(CACHE_SIZE_LIMIT, config.cache_size_limit)
    for block in model.blocks():
        if own := vars(block).get("forward"):  # a hook's; it is compiled with what it calls
            undo.callback(setattr, block, "forward", own)
            block.forward = torch.compile(own, dynamic=False)
        else:
            undo.callback(delattr, block, "forward")
            block.forward = types.MethodType(compiled_forward(type(block)), block)


@functools.cache
def compiled_forward(cls: type[nn.Module]):
    """The class's forward, compiled once for all its instances."""
    return torch.compile(cls.forward, dynamic=False)


def attention(kernel: str, model: VideoModel, undo: ExitStack) -> None:
    """Allow this kernel, and the plain one for shapes and masks that it does not support."""
    if kernel != "math" and model.device.type != "cuda":
        raise Unavailable("the CPU has one fused kernel, and uses it already")
    if kernel in ("flash", "cudnn"):
        if torch.cuda.get_device_capability(model.device) < (8, 0):
            raise Unavailable(f"{kernel} attention needs an Ampere or newer GPU")
        if model.dtype not in (torch.float16, torch.bfloat16):
            raise Unavailable(f"{kernel} attention does not support {model.dtype}")
    for name in KERNELS:
        enable = getattr(torch.backends.cuda, f"enable_{name}_sdp")
        undo.callback(enable, getattr(torch.backends.cuda, f"{name}_sdp_enabled")())
        enable(name in (kernel, "math"))


SWITCHES = {
    "tf32": tf32,
    "channels_last": channels_last,
    "compile": compile_blocks,
    "sdpa_flash": functools.partial(attention, "flash"),
    "sdpa_efficient": functools.partial(attention, "mem_efficient"),  # xFormers', on any GPU
    "sdpa_cudnn": functools.partial(attention, "cudnn"),  # made for Hopper and newer
    "sdpa_math": functools.partial(attention, "math"),  # for comparison, or tiny sizes
}


def read(names: str | Sequence[str]) -> list[str]:
    """The switches of comma-separated text or a list.

    Raises:
        ValueError: For an unknown switch, or two kernels of attention.
    """
    words = names.split(",") if isinstance(names, str) else names
    switches = list(dict.fromkeys(word.strip() for word in words if word.strip()))
    for name in switches:
        if name not in SWITCHES:
            raise ValueError(f"unknown switch {name!r}; choose among {', '.join(SWITCHES)}")
    kernels = [name for name in switches if name.startswith("sdpa_")]
    if len(kernels) > 1:
        raise ValueError(f"attention has one kernel, not {' and '.join(kernels)}")
    return switches


def apply(model: VideoModel, names: str | Sequence[str]) -> ExitStack:
    """Turn switches on: before offloading, and before or after adding an adapter.

    A switch that cannot help on this device stays off, with a warning that says why. `tf32` and the
    kernels of attention are torch's own settings, and so hold for the whole process.

    Args:
        model: The model to speed up.
        names: Switches, by name or as comma-separated text.

    Returns:
        A stack: its `close()`, or the end of a `with` over it, turns the switches off again.

    Raises:
        ValueError: For an unknown name, before any switch is turned on.
    """
    with ExitStack() as stack:
        for name in read(names):
            try:
                SWITCHES[name](model, stack)
            except Unavailable as reason:
                warnings.warn(f"{name} stays off: {reason}", stacklevel=2)
        return stack.pop_all()


class Speed(NamedTuple):
    """Median seconds of a step, how many times as fast that is, and what this must exceed not to be chance."""

    seconds: float
    ratio: float
    limit: float


def compare(
    model: VideoModel, gradient: Callable[[], torch.Tensor], rounds: int = ROUNDS
) -> dict[str, Speed | str]:
    """Measure each switch by itself; for one that cannot be used here, the reason.

    Each round runs all of them, and the median of the rounds' ratios counts, so that drift in the
    machine's speed does not decide the result; "none, again" shows what chance alone does.

    Args:
        gradient: takes a step with this model, and returns its gradient.
    """
    synchronize = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None

    def timed(switch: Callable | None) -> tuple[float, torch.Tensor]:
        with ExitStack() as undo:
            if switch:
                switch(model, undo)
            synchronize()
            began = time.perf_counter()
            found = gradient()
            synchronize()
            return time.perf_counter() - began, found

    timed(None)
    expected, unfit = timed(None)[1], {}
    ready: dict[str, Callable | None] = {"none": None, "none, again": None}
    for name, switch in SWITCHES.items():
        try:
            same = torch.cosine_similarity(timed(switch)[1], expected, dim=0).item()
            if not same >= SAME_GRADIENT:
                raise RuntimeError(
                    f"the gradient's cosine to the one without the switch is {same:.4f}"
                )
            ready[name] = switch
        except Exception as error:
            unfit[name] = str(error).strip().partition("\n")[0] or type(error).__name__
    seconds = {name: [] for name in ready}
    for _ in range(rounds):
        for name, switch in ready.items():
            seconds[name].append(timed(switch)[0])
    return speeds(seconds) | unfit


def speeds(seconds: dict[str, list[float]]) -> dict[str, Speed | str]:
    """Of each switch's seconds in each round."""
    ratios = {
        name: statistics.median(base / mine for base, mine in zip(seconds["none"], times))
        for name, times in seconds.items()
    }
    chance = ratios["none, again"]
    limit = max(SPEEDUP, chance, 1 / chance)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {name: Speed(medians[name], ratio, limit) for name, ratio in ratios.items()}
