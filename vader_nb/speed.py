"""Switches for speed, each off unless it is asked for: which of them help depends on the model and the machine.

    speed.apply(model, "channels_last,compile")     # from now on
    with speed.switched(model, "channels_last"):    # in here; everything is afterwards as it was before

`python -m vader_nb.selfcheck` measures them on the machine at hand. None of them changes what is computed, beyond
rounding, nor the names of weights and of the adapter's tensors.
"""

import contextlib
import functools
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._triton import has_triton

from .models import VideoModel

Undo = Callable[[], None]


@dataclass(frozen=True)
class Switch:
    """`line` tells what it does; `idle(model)` why it cannot help there, "" if it can; `on(model)` turns it on, and
    returns what turns it off again."""

    line: str
    idle: Callable[[VideoModel], str]
    on: Callable[[VideoModel], Undo]


# -------------------------------------------------------------------------------------------- precision


def no_tf32(model: VideoModel) -> str:
    if model.device.type != "cuda":
        return "only CUDA devices have TF32"
    return (
        ""
        if torch.cuda.get_device_capability(model.device) >= (8, 0)
        else "this GPU is older than TF32 (Ampere)"
    )


def tf32(model: VideoModel) -> Undo:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    return functools.partial(torch.set_float32_matmul_precision, before)


# --------------------------------------------------------------------------------------- memory layout

LAYOUTS = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}


def offloaded(model: VideoModel) -> str:
    return (
        ""
        if model.turns is None
        else "weights that are offloaded keep their layout; switch it before the offload"
    )


def channels_last(model: VideoModel) -> Undo:
    """The weights decide: a convolution whose weight lies channels-last hands out activations that do. Networks are the
    denoiser and the decoder; the same parameters stay in place, with other strides."""
    before = []
    for network in (model.denoiser, *model.decoders()):
        for module in network.modules():
            if type(module) in LAYOUTS:
                before.append((module.weight, module.weight.data))
                module.weight.data = module.weight.data.contiguous(
                    memory_format=LAYOUTS[type(module)]
                )

    def undo():
        for weight, data in before:
            weight.data = data

    return undo


# -------------------------------------------------------------------------------------------- compiling


def no_compiler(model: VideoModel) -> str:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "torch.compile needs a C++ compiler, and there is none on the PATH"
    return (
        "torch.compile needs Triton on CUDA"
        if model.device.type == "cuda" and not has_triton()
        else ""
    )


VARIANTS = 64  # of one block: widths, sizes, with and without a graph, adapter fused and not; torch gives up at 8


def compile_blocks(model: VideoModel) -> Undo:
    """Regional: the denoiser's blocks, not the denoiser. Blocks of one kind share what is compiled, which makes that
    minutes instead of an hour; and activation checkpointing, which surrounds blocks, stays outside."""
    from torch._dynamo import config  # a second to import

    limit, config.cache_size_limit = config.cache_size_limit, max(VARIANTS, config.cache_size_limit)
    before = [(block, type(block)) for block in model.blocks()]
    for block, kind in before:
        block.__class__ = compiled(kind)

    def undo():
        config.cache_size_limit = limit
        for block, kind in before:
            block.__class__ = kind

    return undo


@functools.cache
def compiled(kind: type[nn.Module]) -> type[nn.Module]:
    """The same class with a compiled `forward`. An instance changes class, because a `forward` of its own is what
    `gradient.checkpointed` gives it and takes away again, and a module around it would rename its weights."""
    if hasattr(kind, "compiled_from"):
        return kind
    forward = torch.compile(kind.forward, dynamic=False)
    return type(kind.__name__, (kind,), {"forward": forward, "compiled_from": kind})


# ------------------------------------------------------------------------------------------- attention

KERNELS = ("flash", "mem_efficient", "cudnn", "math")  # as torch.backends.cuda spells them


def unfit(kernel: str, model: VideoModel) -> str:
    """Why this kernel of `scaled_dot_product_attention` is never run there."""
    if kernel == "math":
        return ""
    if model.device.type != "cuda":
        return "the CPU has one fused kernel, and uses it already"
    if kernel == "mem_efficient":
        return ""
    if torch.cuda.get_device_capability(model.device) < (8, 0):
        return f"{kernel} attention needs a GPU of the generation Ampere or newer"
    return (
        f"{kernel} attention knows no {model.dtype}"
        if model.dtype not in (torch.float16, torch.bfloat16)
        else ""
    )


def attend(kernel: str, model: VideoModel) -> Undo:
    """This kernel wherever it can run, and for shapes and masks that it cannot take the plain one."""
    before = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in KERNELS}

    def allow(kernels: dict[str, bool]) -> None:
        for name, allowed in kernels.items():
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(allowed)

    allow({name: name in (kernel, "math") for name in KERNELS})
    return functools.partial(allow, before)


def attention(kernel: str, line: str) -> Switch:
    return Switch(line, functools.partial(unfit, kernel), functools.partial(attend, kernel))


# ------------------------------------------------------------------------------------------ the switches

SWITCHES = {
    "tf32": Switch(
        "float32 products with 10 bits of mantissa: the float32 parts of a model on CUDA",
        no_tf32,
        tf32,
    ),
    "channels_last": Switch(
        "convolutions on pixels whose channels lie together in memory", offloaded, channels_last
    ),
    "compile": Switch(
        "torch.compile of the denoiser's blocks; the first step takes minutes",
        no_compiler,
        compile_blocks,
    ),
    "sdpa_flash": attention("flash", "attention by FlashAttention"),
    "sdpa_efficient": attention(
        "mem_efficient", "attention by xFormers' memory-efficient kernel, on any GPU"
    ),
    "sdpa_cudnn": attention("cudnn", "attention by cuDNN, made for Hopper and newer"),
    "sdpa_math": attention(
        "math", "attention as plain products, all weights in memory: for comparison, or tiny sizes"
    ),
}


def read(names: str | Sequence[str]) -> list[str]:
    """`"tf32,compile"` or a list, as a list. Raises ValueError for an unknown switch, or two kernels of attention."""
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    names = list(dict.fromkeys(name for name in names if name))
    for name in names:
        if name not in SWITCHES:
            raise ValueError(f"unknown switch {name!r}; choose among {', '.join(SWITCHES)}")
    kernels = [name for name in names if name.startswith("sdpa_")]
    if len(kernels) > 1:
        raise ValueError(f"attention has one kernel, not {' and '.join(kernels)}")
    return names


def turn_on(model: VideoModel, names: str | Sequence[str]) -> Iterator[Undo]:
    for name in read(names):
        if reason := SWITCHES[name].idle(model):
            warnings.warn(f"{name} stays off: {reason}", stacklevel=3)
        else:
            yield SWITCHES[name].on(model)


def apply(model: VideoModel, names: str | Sequence[str]) -> None:
    """Turn switches on, by name or as comma-separated text, for good; before an offload, before or after an adapter.
    What cannot help on this device stays off, and a warning says why. `tf32` and the kernels of attention are torch's
    own settings, and so hold for the whole process.

    Raises ValueError for an unknown name, before any is turned on."""
    for _ in turn_on(model, names):
        pass


@contextlib.contextmanager
def switched(model: VideoModel, names: str | Sequence[str]) -> Iterator[None]:
    """The same inside a `with`; afterwards everything is as it was."""
    with contextlib.ExitStack() as stack:
        for undo in turn_on(model, names):
            stack.callback(undo)
        yield
