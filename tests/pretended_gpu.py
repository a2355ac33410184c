"""A GPU where there is none: tensors hold their numbers on the CPU and say that they are on "cuda:0".

    with pretended_gpu.present():
        model = load("tiny")  # on the GPU, in float16
        model.encode(["a red star"]) + torch.ones(2)  # RuntimeError, as there

A storage made there is marked, and what is computed from it is, too. What fails on a GPU fails here: two devices in one
operation, a generator of another device, `numpy()`. What a GPU does to speed and to rounding, this cannot show.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.utils.checkpoint
from torch._C import _len_torch_function_stack
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vader_nb import models

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
load_on_cpu, load_dtypes = safetensors.torch.load_file, models.part_dtypes
aten = torch.ops.aten
BETWEEN_DEVICES = {aten.copy_.default, aten._foreach_copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXING |= {aten._index_put_impl_.default, aten._unsafe_index.Tensor}
UNSEEN = {torch.Tensor.__deepcopy__, torch.Tensor.new_tensor}  # by operations
NEEDS_CPU = {torch.Tensor.numpy, torch.Tensor.__array__}
NAMING = {torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__}
MOVING = {torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.cpu, torch.Tensor.cuda}
HANDLED = UNSEEN | NEEDS_CPU | NAMING | MOVING
# Inside, `Names` is not asked: in a backward pass it would be, for each attribute.
plain = torch._C.DisableTorchFunction


@contextlib.contextmanager
def present() -> Iterator[None]:
    """Inside, this machine has a GPU, and `load` takes it."""
    memory = ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated", "synchronize")
    marks, run_backward = Marks(), torch.autograd._engine_run_backward

    def run_backward_there(*args, **kwargs):
        off = not _len_torch_function_stack()  # as a mode is while it handles `backward`
        with Names(marks) if off else contextlib.nullcontext():
            return run_backward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        for name in memory:
            patched.setattr(torch.cuda, name, lambda *args: 0)
        patched.setattr(torch.autograd, "_engine_run_backward", run_backward_there)
        # It would compare devices, as hooks see them with a mode off and on.
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        patched.setitem(checks, "default", lambda tensor: None)
        patched.setattr(safetensors.torch, "load_file", load_file)
        patched.setattr(models, "default_device", lambda: GPU)
        patched.setattr(models, "part_dtypes", part_dtypes)
        patched.setattr(models, "is_unchecked_zoo", lambda checkpoint: False)  # for speed
        with Names(marks), Operations(marks):
            yield


def load_file(path, device="cpu") -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in load_on_cpu(path).items()}


def part_dtypes(made_for: dict, device: torch.device, dtype: Any) -> dict[str, torch.dtype]:
    """As on a GPU, but for float16, in which a CPU is eight times slower than in bfloat16."""
    found = load_dtypes(made_for, device, dtype)
    return {part: torch.bfloat16 if one == torch.float16 else one for part, one in found.items()}


class Marks:
    """The storages on the GPU; `moving` while one goes from device to device. `open`: storages of either, until one is met."""

    def __init__(self):
        self.known, self.open, self.moving = set(), set(), False

    def on_gpu(self, tensor: Any) -> bool:
        if tensor.is_meta or tensor.layout != torch.strided:
            return False
        return tensor.untyped_storage()._cdata in self.known

    def place(self, tensor: torch.Tensor, gpu: bool) -> None:
        storage = tensor.untyped_storage()
        if not gpu:
            self.known.discard(storage._cdata)
        elif storage._cdata not in self.known:
            self.known.add(storage._cdata)
            weakref.finalize(storage, self.known.discard, storage._cdata)

    def undecided(self, result: Any) -> None:
        for tensor in tensors_of((result,)):
            storage = tensor.untyped_storage()
            self.open.add(storage._cdata)
            weakref.finalize(storage, self.open.discard, storage._cdata)

    def decide(self, tensor: torch.Tensor) -> bool:
        """Whether it could be on either device; now it is on the GPU."""
        if tensor.untyped_storage()._cdata not in self.open:
            return False
        self.place(tensor, True)
        return True

    @contextlib.contextmanager
    def move(self) -> Iterator[None]:
        before, self.moving = self.moving, True
        try:
            yield
        finally:
            self.moving = before


class Moved(torch.autograd.Function):
    """A copy on the other device; its gradient goes back."""

    @staticmethod
    def forward(ctx, tensor, marks, gpu):
        ctx.marks, ctx.gpu = marks, gpu
        with marks.move():
            copy = tensor.detach().clone()
        marks.place(copy, gpu)
        return copy

    @staticmethod
    def backward(ctx, gradient):
        return Moved.apply(gradient, ctx.marks, not ctx.gpu), None, None


class Operations(TorchDispatchMode):
    """What is computed on the GPU stays there, and no operation has tensors of both."""

    def __init__(self, marks: Marks):
        super().__init__()
        self.marks = marks

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        marks, kwargs = self.marks, kwargs or {}
        with plain():
            given = tensors_of((*args, *kwargs.values()))
            apart = marks.moving or not any(map(marks.on_gpu, given))
            if not apart and function not in BETWEEN_DEVICES:
                self.check(function, args, given)
        result = function(*args, **kwargs)
        with plain():
            if not apart:
                known = {x.untyped_storage()._cdata for x in given}
                for made in tensors_of((result,)):
                    if made.untyped_storage()._cdata not in known:
                        marks.place(made, True)
            elif not given and torch._C._current_graph_task_id() >= 0:
                marks.undecided(result)  # zeros of a backward formula
        return result

    def check(self, function, args, given) -> None:
        """Raises RuntimeError if some of an operation's tensors are not on the GPU."""
        marks = self.marks
        for x in tensors_of((args[0], *args[2:3])) if function in INDEXING else given:
            if x.ndim and not marks.on_gpu(x) and not marks.decide(x):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, found cuda:0 and cpu: {function}"
                )


def tensors_of(values) -> list[torch.Tensor]:
    """Those among an operation's arguments or results, and in lists there."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [x for x in value if isinstance(x, torch.Tensor)]
    return found


class Names(TorchFunctionMode):
    """What names a device, in Python."""

    def __init__(self, marks: Marks):
        super().__init__()
        self.marks = marks

    def __torch_function__(self, function, types, args=(), kwargs=None):
        marks, kwargs = self.marks, kwargs or {}
        named = function in HANDLED or "device" in kwargs or "generator" in kwargs
        if not named or isinstance(function, torch._ops.OpOverload):  # the latter by another mode
            return function(*args, **kwargs)
        kwargs = dict(kwargs)
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if function == torch.Tensor.device.__get__ and marks.on_gpu(first):
            return GPU
        if function == torch.Tensor.is_cuda.__get__:
            return marks.on_gpu(first)
        if function in NEEDS_CPU and marks.on_gpu(first):
            raise TypeError("can't convert cuda:0 device type tensor to numpy: call .cpu() first")
        if function in NEEDS_CPU and first.dtype == torch.bfloat16:  # which stands for float16
            args = (first.half(), *args[1:])
        if function in UNSEEN and marks.on_gpu(first):
            twin = function(*args, **kwargs)
            marks.place(twin, True)
            return twin
        if function in (torch.Tensor.cpu, torch.Tensor.cuda):
            return self.moved(first, function is torch.Tensor.cuda)
        if function in (torch.Tensor.to, torch.Tensor.type_as):
            return self.to(first, args[1:], kwargs)
        device = kwargs.get("device")
        gpu = is_gpu(device) if device is not None else first is not None and marks.on_gpu(first)
        generator = kwargs.get("generator")
        if generator is not None and gpu != is_gpu(generator.device):
            raise RuntimeError(
                f"Expected a generator of the tensor's device, got {generator.device}"
            )
        if not is_gpu(device) and not (device is not None and first is not None):
            return function(*args, **kwargs)
        with marks.move():
            result = function(*args, **kwargs | {"device": CPU if gpu else device})
        return self.moved(result, gpu)

    def to(self, tensor, args, kwargs):
        """The type first, then the device."""
        target, rest = self.marks.on_gpu(tensor), []
        named = [*args, *(kwargs.pop(key) for key in ("device", "other") if key in kwargs)]
        for value in named:
            if isinstance(value, torch.Tensor):
                target = self.marks.on_gpu(value)
                rest.append(value.dtype)
            elif isinstance(value, str | torch.device):
                if torch.device(value).type == "meta":
                    return tensor.to(*args, **kwargs)
                target = is_gpu(value)
            elif isinstance(value, torch.dtype):
                rest.append(value)
        return self.moved(tensor.to(*rest, **kwargs) if rest or kwargs else tensor, target)

    def moved(self, tensor: torch.Tensor, gpu: bool) -> torch.Tensor:
        if tensor.is_meta or self.marks.on_gpu(tensor) == gpu:
            return tensor
        return Moved.apply(tensor, self.marks, gpu)


def is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"
