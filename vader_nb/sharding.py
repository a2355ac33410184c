"""The frozen denoisers sharded over processes, by FSDP2 or DeepSpeed's ZeRO-3; each process has the whole adapter.

Each process rolls out, decodes and scores its own clips. The blocks of a denoiser are gathered one by one as they
are called, and nothing of them is sent back, since they have no gradient.
"""

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .offload import is_sharded

SHARDING = ("none", "full")  # what `memory` simulates


def check(num_gpus: int, sharding: str) -> tuple[int, str]:
    """Returns both. Raises ValueError for invalid values."""
    if num_gpus < 1:
        raise ValueError(f"num_gpus must be at least 1, got {num_gpus}")
    if sharding not in SHARDING:
        raise ValueError(f"unknown sharding {sharding!r}; choose one of {', '.join(SHARDING)}")
    if num_gpus == 1 and sharding != "none":
        raise ValueError(
            f"sharding={sharding} has no effect on one GPU: give their number, such as num_gpus=8"
        )
    return num_gpus, sharding


def check_quantize(quantize: str | None, sharded: bool) -> None:
    """Raises ValueError for a quantized model that is to be sharded."""
    if quantize and sharded:
        raise ValueError(
            f"quantize={quantize} is of no use with FSDP: quantized weights are buffers, whole in each process; "
            f"leave out one of the two"
        )


def fsdp_options() -> dict | None:
    """Arguments for `shard`, if `accelerate launch` started these processes for FSDP.

    Raises:
        ValueError: for FSDP1.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return None
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = FullyShardedDataParallelPlugin()  # as the launcher's environment variables say
    if plugin.fsdp_version != 2:
        raise ValueError(
            "fsdp_version must be 2: version 1 flattens an adapter and frozen weights into one tensor"
        )
    offload = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    return {"reshard_after_forward": plugin.reshard_after_forward, "cpu_offload": offload}


def shard(
    model,
    device: str | torch.device | None = None,
    *,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Shard a model's denoisers over all processes (FSDP2), before it gets an adapter.

    Args:
        model: a `VideoModel`, the same in each process.
        device: default: the model's. From CPU memory the denoisers move there block by block, and are never whole there
            while they are loaded, rolled out, decoded, scored and replayed.
        reshard_after_forward: free a block's gathered weights after each call. False needs the memory of a whole
            denoiser, and gathers less often.
        cpu_offload: a process's part waits in CPU memory.

    Raises:
        ValueError: for a model with an adapter, or one of several dtypes where torch is too old for that.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    parameters = (p for denoiser in model.denoisers.values() for p in denoiser.parameters())
    kinds = {
        (p.requires_grad, str(p.dtype)) for p in parameters
    }  # and no reference to a whole weight
    if any(trained for trained, _ in kinds):
        raise ValueError(f"{model.name!r} carries an adapter: shard the model before it gets one")
    dtypes = {dtype for _, dtype in kinds}
    if len(dtypes) > 1 and torch.__version__ < "2.8":
        raise ValueError(
            f"{model.name!r} holds weights of {' and '.join(sorted(dtypes))}: sharding them together needs torch 2.8"
        )
    device = torch.device(device or model.device)
    if not torch.distributed.is_initialized():
        PartialState(cpu=device.type == "cpu")
    with unset_fake_temporarily():  # of `simulated`
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    on_gpu = device.type == "cuda"
    policy = CPUOffloadPolicy(pin_memory=on_gpu) if cpu_offload else OffloadPolicy()
    # A denoiser itself comes last, for what lies outside of its blocks. It is freed as they are: while frames are
    # decoded and scored, its weights would only be in the way.
    for module in [*model.blocks(), *model.denoisers.values()]:
        fully_shard(
            module, mesh=mesh, reshard_after_forward=reshard_after_forward, offload_policy=policy
        )
        if reshard_after_forward:
            # FSDP mistakes a replay inside a backward pass for a recomputation whose backward comes right away, and
            # would keep every block.
            module.register_forward_hook(lambda module, *_: module.reshard())


def uses_engine(accelerator: Accelerator) -> bool:
    """Whether launched for FSDP or DeepSpeed, which get the frozen model at most; the adapter stays here."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def shard_as_launched(model, accelerator: Accelerator) -> None:
    """Shard a model that `load` did not: by ZeRO-3, or one that was made in another way."""
    if is_sharded(model.denoiser):
        return
    if options := fsdp_options():
        shard(model, **options)
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin: Any = accelerator.deepspeed_plugin
        if getattr(plugin, "zero_stage", None) != 3:
            return
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # required, and unused
        for denoiser in model.denoisers.values():
            accelerator.prepare(denoiser)


@contextlib.contextmanager
def simulated(num_gpus: int) -> Iterator[None]:
    """Inside, this process is one of `num_gpus`, whose collectives send nothing: for fake tensors.

    Raises:
        RuntimeError: in one of several real processes.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        raise RuntimeError(
            "several processes are running here: simulate others in a separate process"
        )
    drawn = random.getstate()  # from which these collectives draw, too
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_gpus)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        random.setstate(drawn)
