"""The training loop: reward gradients into an adapter, on accelerate.

    run = align(load("tiny"), hps("tiny") + 0.02 * aesthetic("tiny"), prompts, steps=40)

One step of a run: draw prompts, seeds, steps and frames from a generator seeded with (seed, step), so that a
resumed run draws what an uninterrupted one would; add up reward gradients; clip; AdamW. Everything a run has
made lies in its folder, readable at any moment: `config.json`, `metrics.jsonl`, `checkpoints/step-N/`, and
`adapter.safetensors` at the end or at a stop.
"""

import contextlib
import json
import math
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tqdm.auto import tqdm

from . import lora
from .gradient import Frames, Last, NonFinite, Sampling, Strategy, reward_gradient
from .models import VideoModel
from .rewards import Reward, as_reward

GIVE_UP = 3  # non-finite steps in a row
GIVE_UP_SCALED = 20  # with fp16, whose loss scale comes down by such steps


@dataclass
class Run:
    """What `align` hands back: the adapter, still on the model; the metrics of each step; the folder."""

    adapter: lora.Adapter
    metrics: list[dict]
    folder: Path
    stopped: bool = False  # by Ctrl-C or the notebook's stop button

    @property
    def rewards(self) -> list[float]:
        return [row["reward"] for row in self.metrics if "reward" in row]


@dataclass
class State:
    """Where a run stands."""

    step: int = 0
    metrics: list[dict] = field(default_factory=list)
    non_finite: int = 0  # in a row


def align(
    model: VideoModel,
    reward: Reward | Callable,
    prompts: list[str],
    *,
    steps: int = 40,
    batch_size: int = 4,
    gradient_accumulation_steps: int = 1,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    rank: int = 8,
    alpha: float | None = None,
    strategy: Strategy = Last(1),
    frames: Frames = Frames(),
    sampling: Sampling | None = None,
    chunk: int = 1,
    checkpoint_blocks: bool | None = None,
    offload: bool = False,
    mixed_precision: str = "no",
    seed: int = 0,
    output_dir: str | Path = "runs/align",
    checkpoint_every: int = 20,
    resume: bool = False,
    progress: bool = True,
    callback: Callable[[dict], None] | None = None,
) -> Run:
    """Align the model to the reward; returns a `Run` with the trained adapter on the model.

    steps: optimizer steps, each on batch_size * gradient_accumulation_steps clips (a process). max_grad_norm:
    clipping. rank, alpha: the adapter's (see `lora.add`). strategy, frames, sampling, chunk, offload: see
    `gradient.reward_gradient`. checkpoint_blocks: default on CUDA only, since it trades time for memory.
    mixed_precision: "no", "fp16" or "bf16". output_dir: a folder that no other run has used, unless resume,
    which goes on from its newest checkpoint. callback: gets each step's metrics.

    Raises before the work starts: FileExistsError if the folder holds another run, ValueError for settings that
    cannot be met, OSError if the folder cannot be written. Later: RuntimeError after 3 non-finite steps in a row.
    A KeyboardInterrupt ends the run early and keeps everything up to the last whole step.
    """
    reward, folder, sampling = as_reward(reward), Path(output_dir), (sampling or Sampling()).filled(model)
    if not prompts or not any(prompt.strip() for prompt in prompts):
        raise ValueError("no prompts to train on")
    for name, value in {"steps": steps, "batch_size": batch_size, "checkpoint_every": checkpoint_every}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    # Draw once for nothing: a window or frames that do not fit are an error now.
    strategy.plan(sampling.num_inference_steps, torch.Generator().manual_seed(seed))
    frames.choose(sampling.num_frames, torch.Generator().manual_seed(seed))
    AcceleratorState._reset_state()  # a notebook's next run may want another precision
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=model.device.type == "cpu")
    config = {
        "model": model.name,
        "reward": reward.name,
        "prompts": len(prompts),
        "steps": steps,
        "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "num_processes": accelerator.num_processes,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "rank": rank,
        "alpha": rank if alpha is None else alpha,
        "strategy": repr(strategy),
        "frames": asdict(frames),
        "sampling": asdict(sampling),
        "mixed_precision": mixed_precision,
        "seed": seed,
    }
    prepare_folder(folder, resume, config, accelerator)

    adapter = lora.add(model, rank, alpha, seed=seed)
    parameters = adapter.parameters()
    optimizer = accelerator.prepare(torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay))
    try:
        state = restore(folder, adapter, optimizer, accelerator) if resume else State()
    except BaseException:
        adapter.remove()
        raise
    reward.to(model.device)
    settings = {
        "strategy": strategy,
        "frames": frames,
        "sampling": sampling,
        "chunk": chunk,
        "offload": offload,
        "checkpoint_blocks": model.device.type == "cuda" if checkpoint_blocks is None else checkpoint_blocks,
        "weight": 1 / gradient_accumulation_steps,
        "backward": accelerator.backward,
    }

    def gradient_of(step: int) -> dict:
        """Gradients of all micro-batches, averaged and clipped, and what there is to record about them."""
        # One generator for what all processes share (steps, frames) and for the batch that they divide.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rewards = []
        for _ in range(gradient_accumulation_steps):
            size = batch_size * accelerator.num_processes
            mine = slice(accelerator.process_index * batch_size, (accelerator.process_index + 1) * batch_size)
            chosen = torch.randint(len(prompts), (size,), generator=generator)[mine].tolist()
            seeds = torch.randint(2**31, (size,), generator=generator)[mine].tolist()
            batch = [prompts[i] for i in chosen]
            with accelerator.autocast():
                result = reward_gradient(model, adapter, reward, batch, seeds=seeds, generator=generator, **settings)
            rewards.append(result.rewards)
        average_gradients(parameters, accelerator)
        norm = float(accelerator.clip_grad_norm_(parameters, max_grad_norm))
        if norm == 0 and step == 0:
            raise ValueError(f"the gradient of {reward.name!r} that reaches the adapter is zero: nothing to learn from")
        if not math.isfinite(norm):
            raise NonFinite(f"gradient norm {norm}")
        mean = accelerator.reduce(torch.cat(rewards).mean(), "mean").item()
        return {"step": step + 1, "reward": mean, "grad_norm": norm, "frames": result.frames}

    def record(row: dict) -> None:
        state.step += 1
        state.metrics.append(row)
        if accelerator.is_main_process:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        if state.non_finite >= limit:
            raise RuntimeError(f"{limit} steps in a row were not finite; the last one: {row['skipped']}")
        if state.step % checkpoint_every == 0:
            save(folder, state, adapter, optimizer, accelerator, reward)
        bar.update()

    limit = GIVE_UP if accelerator.scaler is None else GIVE_UP_SCALED
    stopped, hidden = False, not progress or not accelerator.is_main_process
    bar = tqdm(total=steps, initial=state.step, desc="align", unit="step", disable=hidden)
    try:
        while state.step < steps:
            try:
                row = gradient_of(state.step)
                state.non_finite = 0
                bar.set_postfix(reward=f"{row['reward']:.4f}", grad=f"{row['grad_norm']:.2e}")
            except NonFinite as error:
                state.non_finite += 1
                row = {"step": state.step + 1, "skipped": str(error)}
                bar.write(f"step {state.step + 1} skipped: {error}")
            with uninterrupted():  # a step is taken and recorded, or neither
                if "reward" in row or accelerator.scaler is not None:
                    optimizer.step()  # a loss scaler skips it by itself, and lowers its scale
                optimizer.zero_grad()
                record(row)
            if callback is not None:
                callback(row)
    except KeyboardInterrupt:
        stopped = True
        optimizer.zero_grad()
        bar.write(f"stopped after step {state.step}; kept in {folder}")
    except BaseException:
        finish(folder, state, adapter, optimizer, accelerator, reward)
        adapter.remove()  # nobody would be left to do it
        raise
    finally:
        bar.close()
    finish(folder, state, adapter, optimizer, accelerator, reward)
    return Run(adapter, state.metrics, folder, stopped)


def finish(folder, state, adapter, optimizer, accelerator, reward) -> None:
    """Keep what there is: a last checkpoint and the adapter by itself."""
    if state.step:
        with uninterrupted():
            save(folder, state, adapter, optimizer, accelerator, reward)
            if accelerator.is_main_process:
                adapter.save(folder / "adapter.safetensors", **described(reward, state))


def average_gradients(parameters: list[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """The mean over processes, before clipping. The denoiser is called several times a step and not through
    a DDP wrapper, whose own reduction would silently not happen (each rank would train its own adapter)."""
    if accelerator.num_processes > 1:
        flat = accelerator.reduce(torch.cat([p.grad.flatten() for p in parameters]), "mean")
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(part.view_as(p))


# ------------------------------------------------------------------------------------------ the folder


def prepare_folder(folder: Path, resume: bool, config: dict, accelerator: Accelerator) -> None:
    """Make the run's folder, or say now why it cannot be used."""
    if resume and not list(folder.glob("checkpoints/step-*")):
        raise FileNotFoundError(f"cannot resume: {folder} holds no checkpoint")
    if not resume and (folder / "metrics.jsonl").exists():
        raise FileExistsError(f"{folder} holds another run; choose another name, or resume it")
    if resume:
        before, now = json.loads((folder / "config.json").read_text()), json.loads(json.dumps(config))
        changed = [name for name in now if name != "steps" and before.get(name) != now[name]]
        if changed:
            was = ", ".join(f"{name} was {before.get(name)!r}, now {now[name]!r}" for name in changed)
            raise ValueError(f"cannot resume {folder} with other settings: {was}")
    if not accelerator.is_main_process:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_bytes(b"0" * 4096)
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror or error}") from error
    free = shutil.disk_usage(folder).free
    if free < 50e6:
        raise OSError(f"only {free / 1e6:.0f} MB free where {folder} lies; a run needs at least 50 MB")
    write(folder / "config.json", json.dumps(config, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """A whole file or none."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def described(reward: Reward, state: State) -> dict:
    return {"reward": reward.name, "steps": state.step}


def save(folder, state, adapter, optimizer, accelerator, reward) -> None:
    """A checkpoint: a folder that appears under its name only when it is complete."""
    final = folder / "checkpoints" / f"step-{state.step:06d}"
    if final.exists() or not accelerator.is_main_process:
        return
    unfinished = final.with_name(final.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    adapter.save(unfinished / "adapter.safetensors", **described(reward, state))
    contents = {"step": state.step, "non_finite": state.non_finite, "optimizer": optimizer.state_dict()}
    contents["torch_rng"] = torch.get_rng_state()
    contents["cuda_rng"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    version, numbers, gauss = random.getstate()
    contents["python_rng"] = [version, list(numbers), gauss]
    if accelerator.scaler is not None:
        contents["scaler"] = accelerator.scaler.state_dict()
    torch.save(contents, unfinished / "state.pt")
    unfinished.replace(final)


def restore(folder: Path, adapter, optimizer, accelerator) -> State:
    """Go back to the newest checkpoint; the metrics after it are taken off the file."""
    newest = max(path for path in folder.glob("checkpoints/step-*") if path.suffix != ".part")
    tensors, _ = lora.read(newest / "adapter.safetensors")
    adapter.load_state_dict(tensors, str(newest))
    contents = torch.load(newest / "state.pt", weights_only=True, map_location="cpu")
    optimizer.load_state_dict(contents["optimizer"])
    torch.set_rng_state(contents["torch_rng"])
    if contents["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(contents["cuda_rng"])
    version, numbers, gauss = contents["python_rng"]
    random.setstate((version, tuple(numbers), gauss))
    if "scaler" in contents and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(contents["scaler"])
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may have torn the last one
    rows = [row for row in rows if row["step"] <= contents["step"]]
    write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return State(contents["step"], rows, contents["non_finite"])


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done: half an optimizer step or half a record is none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
