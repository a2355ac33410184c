"""What keeps memory small: networks and saved activations in CPU memory, and recomputed activations."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class CPUOffloader:
    """Keeps the networks at work on `device`, and the weights of all others on `offload_device`.

    Only frozen weights and buffers move. Trained parameters stay where their optimizer has its
    state. Frozen weights do not change, so a copy of them stays on `offload_device` for good, and
    offloading transfers nothing. (The hooks of accelerate and diffusers move a whole module, copy
    its weights back each time, and keep one module on the device, not the decoder and the reward
    together.)
    """

    def __init__(self, device: torch.device, offload_device: torch.device):
        self.device = device
        self.offload_device = offload_device
        self.loaded: list[nn.Module] = []  # whose weights are on `device`
        self._copies: WeakKeyDictionary[nn.Module, list] = WeakKeyDictionary()

    def onload(self, *modules: nn.Module) -> None:
        """Move these to the device and all others off it, unless these are all there already."""
        if all(module in self.loaded for module in modules):
            return
        self.offload(*(module for module in self.loaded if module not in modules))
        for module in modules:
            if module not in self.loaded:
                self._place(module, self.device)
        self.loaded = list(modules)

    def offload(self, *modules: nn.Module) -> None:
        """Move these off the device, until they are onloaded again."""
        for module in modules:
            self._place(module, self.offload_device)
        self.loaded = [module for module in self.loaded if module not in modules]

    def _place(self, module: nn.Module, device: torch.device) -> None:
        if is_sharded(module):  # an engine has it, and offloads it if asked to
            return
        if module not in self._copies:
            self._copies[module] = moved_tables(frozen_tensors(module), self.offload_device)
        for table, name, tensor in moved_tables(self._copies[module], device):
            table[name] = tensor


def frozen_tensors(module: nn.Module) -> Iterator[tuple[dict, str, torch.Tensor]]:
    """(table, name, tensor); a table is a dict in which an `nn.Module` keeps its tensors."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None and not tensor.requires_grad:
                    yield table, name, tensor


def moved_tables(entries: Iterable[tuple], device: torch.device) -> list[tuple]:
    """The entries with their tensors on the device; a tensor that has two names stays one."""
    entries, copies = list(entries), {}
    for _, _, tensor in entries:
        if tensor not in copies:
            copies[tensor] = moved(tensor, device)
    return [(table, name, copies[tensor]) for table, name, tensor in entries]


def moved(tensor: torch.Tensor, to: torch.device | torch.dtype) -> torch.Tensor:
    """The tensor on the device, or of the type; a Parameter stays a Parameter."""
    copy = tensor.to(to)
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


class Offloaded:
    """A tensor that autograd saved, which waits on another device.

    From a CUDA device it is copied to pinned memory while the device goes on computing; the copy back begins when
    the backward pass takes the one saved after it, so that it is there, or nearly, when it is needed.

    Args:
        before: weak reference to the one that was saved before it, or None.
    """

    def __init__(self, tensor: torch.Tensor, device: torch.device, before: ReferenceType | None):
        self.source_device, self.before = tensor.device, before
        self.coming: torch.Tensor | None = None
        overlaps = self.source_device.type == "cuda" and device.type == "cpu"
        self.stream = copies(self.source_device) if overlaps else None
        if self.stream is None:
            self.kept = tensor.to(device)
            return
        self.kept = torch.empty_like(tensor, device=device, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.source_device))
        with torch.cuda.stream(self.stream):
            self.kept.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)  # keeps its memory until it is copied

    def fetch(self) -> torch.Tensor:
        """Start copying it back, unless that has begun."""
        if self.coming is None:
            with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
                self.coming = self.kept.to(self.source_device, non_blocking=True)
        return self.coming

    def take(self) -> torch.Tensor:
        """The tensor on its own device. Starts fetching the one before it."""
        tensor, self.coming = self.fetch(), None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.source_device)
            current.wait_stream(self.stream)
            tensor.record_stream(current)
        if self.before is not None and (before := self.before()) is not None:
            before.fetch()
        return tensor


@functools.cache
def copies(device: torch.device) -> torch.cuda.Stream:
    """The stream for a device's copies; only one, since the allocator keeps separate memory for each."""
    return torch.cuda.Stream(device)


def offload_saved_tensors(device: torch.device, network: nn.Module) -> saved_tensors_hooks:
    """Context in which tensors that autograd saves for the backward pass wait on `device`, see `Offloaded`.

    The network's own weights, which autograd saves as well, stay where they are (torch's
    `save_on_cpu` would copy each of them, and its copies wait for the device and the device for them).
    """
    own = [*network.parameters(), *network.buffers()]  # quantized weights are buffers
    weights = {x.untyped_storage()._cdata for x in own}
    last: ReferenceType | None = None

    def pack(tensor):
        nonlocal last
        if tensor.untyped_storage()._cdata in weights:
            return tensor
        saved = Offloaded(tensor, device, last)
        last = ref(saved)
        return saved

    def unpack(saved):
        return saved.take() if isinstance(saved, Offloaded) else saved

    return saved_tensors_hooks(pack, unpack)


def is_sharded(network: nn.Module) -> bool:
    """Whether each process holds only a part of the weights: all must then call the network equally often."""
    # FSDP's are DTensors, ZeRO-3's have an attribute of DeepSpeed.
    return any(hasattr(p, "to_local") or hasattr(p, "ds_id") for p in network.parameters())


@contextlib.contextmanager
def checkpointed(blocks: list[nn.Module]) -> Iterator[None]:
    """Inside, these blocks keep their inputs only, and compute the rest again in the backward pass.

    The instances' `forward` is replaced for the duration, and what an instance had of its own (a hook, a
    compiled one) is put back. (A wrapper module would hide LoRA weights from `state_dict`, and
    `UNet3DConditionModel` has no checkpointing of its own.)
    """
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for block, forward in zip(blocks, own):
            del block.forward
            if forward is not None:
                block.forward = forward


def recomputation(
    model, gradient_checkpointing: bool, activation_offload: bool
) -> Callable[[], contextlib.AbstractContextManager]:
    """The context in which a denoiser call is computed again, in a backward pass.

    It has the current autocast state, which autograd's own threads do not inherit; as requested, blocks
    are checkpointed and saved tensors offloaded.
    """
    device = model.device.type
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    @contextlib.contextmanager
    def context():
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            if gradient_checkpointing:
                stack.enter_context(checkpointed(model.blocks()))
            if activation_offload:
                network = nn.ModuleList(model.denoisers.values())
                stack.enter_context(offload_saved_tensors(model.offload_device, network))
            yield

    return context


def kept_call(
    model,
    sampling,
    plan,
    *,
    gradient_checkpointing: bool = True,
    activation_offload: bool = False,
    decode_chunk_size: int = 1,
    **settings,
) -> Callable[[], contextlib.AbstractContextManager] | None:
    """The context in which the last denoiser call of a roll-out keeps its graph, which saves computing it again.

    None where that would change the computation or cost memory. The inputs of checkpointed blocks may stay
    while frames are decoded and scored one by one, since this takes less memory than the replay.
    """
    one_batch = model.branches(sampling) == model.learning_branches(sampling)
    one_batch = one_batch and not sampling.sequential_guidance
    learns = 1 + plan.stop in plan.active and not plan.renoise and not plan.linear
    stays = gradient_checkpointing and not activation_offload and model.offloader is None
    stays = stays and decode_chunk_size == 1 and model.independent_frames
    return recomputation(model, True, False) if one_batch and learns and stays else None
