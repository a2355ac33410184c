"""The loop that every training script of the zoo shares: resumable, reproducible, one or more processes.

All randomness of step n comes from a generator seeded with (seed, n), so a resumed run draws what an
uninterrupted one would have drawn, and P processes (`torchrun --nproc-per-node P -m …`) together see
exactly the batch that one process sees: each takes its share of it.
"""

import json
import os
import re
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are (torchrun sets the environment)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def share(batch: torch.Tensor | list) -> torch.Tensor | list:
    """The part of a global batch that this process computes."""
    rank, world = rank_and_world()
    return batch[rank::world]


def save_atomically(state: dict, path: Path) -> None:
    """A crash leaves either the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def save_half(model: nn.Module, folder: Path) -> None:
    """Write a diffusers or transformers model in half precision, without changing it in memory. Its
    configuration asks for float32, since transformers would otherwise compute in the stored type, and does not name
    the folder that a model was loaded from."""
    deepcopy(model).half().save_pretrained(folder)
    path = folder / "config.json"
    text = path.read_text().replace('"dtype": "float16"', '"dtype": "float32"')
    path.write_text(re.sub(r'  "_name_or_path": .*\n', "", text))


def save_index(folder: Path, pipeline: str, parts: dict[str, object], settings: dict) -> None:
    """Write what makes a folder of parts a pipeline directory, and what `vader_nb.load` reads beside it."""
    index: dict = {"_class_name": pipeline, "_diffusers_version": "0.35.0"}
    for name, part in sorted(parts.items()):
        kind = type(part)
        # transformers 5 has a new name for this class, which older ones do not know.
        cls = kind.__name__.replace("TokenizersBackend", "PreTrainedTokenizerFast")
        index[name] = [kind.__module__.partition(".")[0], cls]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "vader_nb.json").write_text(json.dumps(settings, indent=2) + "\n")


def train(
    name: str,
    model: nn.Module,
    loss: Callable[[torch.Generator, int], torch.Tensor],
    *,
    steps: int,
    schedule: int | None = None,
    learning_rate: float,
    seed: int = 0,
    average: float = 0.0,
    folder: Path = Path("runs/zoo"),
    save_every: int = 100,
    on_save: Callable[[int], None] | None = None,
) -> None:
    """Train every parameter of `model` that asks for a gradient; end with the averaged weights in it.

    loss(generator, step) -> scalar of this process's share of one batch. AdamW (0.9, 0.99), gradient norm
    clipped at 1, learning rate warmed up over 50 steps and then falling linearly to zero at step `schedule`
    (default: the last one; more means to stop early). `average` is the decay of the exponential moving
    average of the weights (0: none). The state is kept in `folder/name.pt`; calling again resumes from
    there. on_save(step) runs with the averaged weights.
    """
    rank, world = rank_and_world()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    path = folder / f"{name}.pt"
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    mean = [p.detach().clone() for p in weights]
    start = restore(path, weights, mean, optimizer) if path.exists() else 0
    began, recent = time.time(), []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 50) * (1 - step / (schedule or steps))
        value = loss(torch.Generator().manual_seed(seed * 1_000_003 + step), step)
        optimizer.zero_grad()
        value.backward()
        if world > 1:
            average_gradients(weights, world)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        # Early on an average over everything would be an average with the random start.
        decay = min(average, (step + 1) / (step + 10))
        torch._foreach_lerp_(mean, [p.detach() for p in weights], 1 - decay)
        recent.append(value.item())
        done = step + 1
        if rank == 0 and done % 20 == 0:
            report(f"{name} {done}/{steps}", recent, (time.time() - began) / (done - start))
            recent = []
        if done % save_every == 0 or done == steps:
            if rank == 0:
                tensors = {"weights": [p.detach() for p in weights], "mean": mean}
                save_atomically({"step": done, "optimizer": optimizer.state_dict()} | tensors, path)
            if on_save is not None:
                swap(weights, mean)
                on_save(done)
                swap(weights, mean)
    swap(weights, mean)


def report(progress: str, recent: list[float], seconds: float) -> None:
    print(f"{progress} loss {sum(recent) / len(recent):.4f} {seconds:.2f} s/step", flush=True)


def restore(path: Path, weights: list, mean: list, optimizer: torch.optim.Optimizer) -> int:
    """Load weights, their average and the optimizer's state; returns the step."""
    state = torch.load(path, weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    for p, m, value, averaged in zip(weights, mean, state["weights"], state["mean"]):
        p.data.copy_(value)
        m.copy_(averaged)
    return state["step"]


def average_gradients(weights: list[nn.Parameter], world: int) -> None:
    """One all-reduce of one flat tensor: thousands of small ones would cost more."""
    flat = torch.cat([p.grad.flatten() for p in weights])
    dist.all_reduce(flat)
    for p, part in zip(weights, flat.split([p.numel() for p in weights])):
        p.grad.copy_(part.view_as(p) / world)


def swap(weights: list[nn.Parameter], mean: list[torch.Tensor]) -> None:
    """Exchange the weights and their average."""
    for p, m in zip(weights, mean):
        kept = p.data.clone()
        p.data.copy_(m)
        m.copy_(kept)
