"""The training loop: reward gradients into an adapter, on accelerate.

    run = align(load("tiny"), hps("tiny") + 0.02 * aesthetic("tiny"), prompts, steps=40)

One step of a run: draw prompts, seeds, steps and frames from a generator seeded with (seed, step), so that neither a
resumed run nor another number of processes draws anything else; add up reward gradients; meet the other processes
(`parallel`); clip; AdamW. Everything a run has made lies in its folder, readable at any moment (`checkpoints`).
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from . import checkpoints, lora, parallel
from .gradient import Frames, Last, NonFinite, Sampling, Strategy, reward_gradient
from .models import VideoModel, alone
from .rewards import Reward, as_reward

GIVE_UP = 3  # non-finite steps in a row
PROMPTS_CHECKED = (
    1000  # whether the reward can judge them, before the work starts; and whether a run had others
)
GIVE_UP_SCALED = 20  # with fp16, whose loss scale comes down by such steps


@dataclass
class Run:
    """What `align` hands back: the adapter, still on the model; the metrics of each step; the folder."""

    adapter: lora.Adapter
    metrics: list[dict]
    folder: Path
    stopped: bool = False  # by Ctrl-C, the notebook's stop button, or SIGTERM

    @property
    def rewards(self) -> list[float]:
        return [row["reward"] for row in self.metrics if "reward" in row]

    @property
    def best(self) -> Path | None:
        """The checkpoint with the highest validation score, if the run validated."""
        return checkpoints.steps_of(self.folder).get(best_step(self.metrics))


@dataclass
class State:
    """Where a run stands."""

    step: int = 0
    metrics: list[dict] = field(default_factory=list)
    non_finite: int = 0  # in a row


@alone
def align(
    model: VideoModel,
    reward: Reward | Callable,
    prompts: Sequence[str],
    *,
    steps: int = 40,
    batch_size: int = 4,
    gradient_accumulation_steps: int = 1,
    learning_rate: float = 1e-3,
    lr_scheduler: str = "constant",
    lr_warmup_steps: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    use_8bit_adam: bool = False,
    rank: int = 8,
    alpha: float | None = None,
    strategy: Strategy = Last(1),
    frames: Frames = Frames(),
    sampling: Sampling | None = None,
    chunk: int = 1,
    checkpoint_blocks: bool | None = None,
    offload: bool = False,
    mixed_precision: str | None = None,
    seed: int = 0,
    output_dir: str | Path = "runs/align",
    checkpoint_every: int = 20,
    checkpoints_total_limit: int | None = None,
    validate: Callable[[lora.Adapter], dict[str, float]] | None = None,
    validation_steps: int = 20,
    resume: bool | str | Path = False,
    log_with: str | None = None,
    progress: bool = True,
    callback: Callable[[dict], None] | None = None,
) -> Run:
    """Align the model to the reward; returns a `Run` with the trained adapter on the model.

    steps: optimizer steps, each on batch_size * gradient_accumulation_steps clips in each process. lr_scheduler,
    lr_warmup_steps: as in diffusers (`constant`, `constant_with_warmup`, `linear`, `cosine`, …). max_grad_norm:
    clipping. use_8bit_adam: the optimizer's state in 8 bits, with the package bitsandbytes. rank, alpha: the adapter's
    (see `lora.add`). strategy, frames, sampling, chunk, offload: see `gradient.reward_gradient`. checkpoint_blocks:
    default on CUDA only, since it trades time for memory. mixed_precision: "no", "fp16" or "bf16"; default: what
    `accelerate launch` was told, "no" without one.

    output_dir: a folder that no other run has used, unless resume: True goes on from its newest checkpoint, "latest"
    does too but starts anew where none is yet, a path names a checkpoint. checkpoints_total_limit: how many of the
    newest are kept (None: all); the best is always kept. validate: called every `validation_steps` with the adapter on
    the model; returns named scores, which enter the metrics, and of which the first decides what is best (see
    `evaluate.Validation`). log_with: "tensorboard" or "wandb", beside `metrics.jsonl`. callback: gets each step's metrics.

    Raises before the work starts: FileExistsError if the folder holds another run, ValueError for settings that
    cannot be met, OSError if the folder cannot be written. Later: RuntimeError after 3 non-finite steps in a row, or
    if processes come to hold different adapters. A KeyboardInterrupt, SIGTERM or a file named `stop` in the folder ends the
    run early and keeps everything up to the last whole step. A disk that fills up is a warning: the run goes on, and the
    adapter is on the model still.
    """
    reward, folder, sampling = (
        as_reward(reward),
        Path(output_dir),
        (sampling or Sampling()).filled(model),
    )
    if not any(prompt.strip() for prompt in prompts):
        raise ValueError("no prompts to train on")
    reward.check_prompts(prompts[:PROMPTS_CHECKED])
    counts = {
        "steps": steps,
        "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
    }
    counts |= {"checkpoint_every": checkpoint_every, "validation_steps": validation_steps}
    for name, value in (counts | {"checkpoints_total_limit": checkpoints_total_limit}).items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    # Draw once for nothing: a window or frames that do not fit are an error now.
    strategy.plan(sampling.num_inference_steps, torch.Generator().manual_seed(seed))
    frames.choose(sampling.num_frames, torch.Generator().manual_seed(seed))
    accelerator = parallel.accelerator_for(model.device, mixed_precision, log_with, folder)
    config = {
        "model": model.name,
        "reward": reward.name,
        "prompts": len(prompts),
        "prompts_checksum": checksum(prompts[:PROMPTS_CHECKED]),
        "steps": steps,
        "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "num_processes": accelerator.num_processes,
        "learning_rate": learning_rate,
        "lr_scheduler": lr_scheduler,
        "lr_warmup_steps": lr_warmup_steps,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "use_8bit_adam": use_8bit_adam,
        "rank": rank,
        "alpha": rank if alpha is None else alpha,
        "strategy": repr(strategy),
        "frames": asdict(frames),
        "sampling": asdict(sampling),
        "mixed_precision": accelerator.mixed_precision,
        "seed": seed,
    }

    def open_folder():
        """By the main process, on behalf of all: what to go on from, or None."""
        start = checkpoints.find(folder, resume)
        if start is not None:
            checkpoints.compare(folder, config)
        checkpoints.prepare(folder, config)
        if start is None:
            return None
        tensors, contents = checkpoints.read(start)
        checkpoints.rewind(folder, contents["step"])  # not before it was read: it may be damaged
        return tensors, contents, checkpoints.metrics_until(folder, contents["step"])

    found = parallel.broadcast_from_main(open_folder, accelerator)
    engine, cut_up = parallel.engine(accelerator), parallel.sharded(accelerator)
    if cut_up:
        parallel.shard(model, accelerator)
    adapter = lora.add(model, rank, alpha, seed=seed)
    try:
        parameters = adapter.parameters()
        optimizer = adamw(parameters, learning_rate, weight_decay, use_8bit_adam)
        schedule = scheduler(lr_scheduler, optimizer, lr_warmup_steps, steps)
        if not engine:
            optimizer = accelerator.prepare(optimizer)
        state = restore(found, adapter, optimizer, schedule, accelerator) if found else State()
    except BaseException:
        adapter.remove()
        raise
    half = (
        [model.dtype] if model.dtype in (torch.float16, torch.bfloat16) else []
    )  # what `memory` counts with
    if model.turns is None:
        reward.to(model.device, *half)
    else:  # it waits for its turn
        reward.to(*half or [model.home])
        model.send_home(*reward.networks)
    journal = checkpoints.Journal(folder / "metrics.jsonl", state.metrics)
    if log_with:
        accelerator.init_trackers(folder.name, flat(config), {"wandb": {"dir": str(folder)}})
    settings = {
        "strategy": strategy,
        "frames": frames,
        "sampling": sampling,
        "chunk": chunk,
        "offload": offload,
        "checkpoint_blocks": model.device.type == "cuda"
        if checkpoint_blocks is None
        else checkpoint_blocks,
        "weight": 1 / gradient_accumulation_steps,
        "backward": torch.Tensor.backward if engine else accelerator.backward,
    }

    def micro_batches(step: int):
        """This process's share of the step's prompts, seeds and generators. What all processes together draw depends on
        the seed, the step and the number of micro-batches, not on how these are divided."""
        number = accelerator.num_processes * gradient_accumulation_steps
        # The first also draws prompts and seeds for all; each draws the steps and frames of its own micro-batch.
        generators = [
            torch.Generator().manual_seed(seed * 1_000_003 + step + (i << 40))
            for i in range(number)
        ]
        chosen = torch.randint(len(prompts), (number * batch_size,), generator=generators[0]).split(
            batch_size
        )
        seeds = torch.randint(2**31, (number * batch_size,), generator=generators[0]).split(
            batch_size
        )
        for i in range(accelerator.process_index, number, accelerator.num_processes):
            # Processes that share the weights must call the denoiser equally often, and so draw the same steps.
            own = generators[i - accelerator.process_index if cut_up else i]
            yield [prompts[j] for j in chosen[i].tolist()], seeds[i].tolist(), own

    def gradient_of(step: int) -> dict:
        """Gradients of all micro-batches, averaged and clipped, and what there is to record about them."""
        rewards, trouble = [], ""
        for batch, seeds, generator in micro_batches(step):
            try:
                with accelerator.autocast():
                    result = reward_gradient(
                        model, adapter, reward, batch, seeds=seeds, generator=generator, **settings
                    )
                rewards.append(result.rewards)
            except (
                NonFinite
            ) as error:  # the other processes must hear of it before anyone skips the step
                trouble = trouble or str(error)
                if not cut_up:  # else they wait for this one at the next micro-batch, too
                    break
        mean = torch.cat(rewards).mean().item() if rewards else 0.0
        leave = bool(asked) or (folder / checkpoints.STOP).exists()
        met = parallel.meet(parameters, accelerator, mean, bool(trouble), leave)
        if met.stop:
            raise KeyboardInterrupt
        if met.non_finite:
            optimizer.zero_grad()  # half of the micro-batches is no gradient
            raise NonFinite(trouble or "the numbers of another process were not finite")
        clip = torch.nn.utils.clip_grad_norm_ if engine else accelerator.clip_grad_norm_
        norm = float(clip(parameters, max_grad_norm))
        if norm == 0 and step == 0:
            raise ValueError(
                f"the gradient of {reward.name!r} that reaches the adapter is zero: nothing to learn from"
            )
        if not math.isfinite(norm):
            raise NonFinite(f"gradient norm {norm}")
        return {"step": step + 1, "reward": met.reward, "grad_norm": norm, "frames": result.frames}

    def take_step(row: dict) -> None:
        if "reward" in row or (accelerator.scaler is not None and parameters[0].grad is not None):
            optimizer.step()  # a loss scaler skips a step that overflowed by itself, and lowers its scale
        if "reward" in row and not accelerator.optimizer_step_was_skipped:
            schedule.step()
        optimizer.zero_grad()
        parallel.same_everywhere(parameters, accelerator, state.step + 1)
        state.step += 1

    def record(row: dict) -> None:
        if validate is not None and (state.step % validation_steps == 0 or state.step == steps):
            row |= {f"validation/{name}": value for name, value in validate(adapter).items()}
        if accelerator.is_main_process:
            journal.add(row)
        else:
            state.metrics.append(row)
        if state.non_finite >= limit:
            raise RuntimeError(
                f"{limit} steps in a row were not finite; the last one: {row['skipped']}"
            )
        if state.step % checkpoint_every == 0 or best_step(state.metrics) == state.step:
            keep()
        if log_with:
            numbers = {name: value for name, value in row.items() if isinstance(value, float)}
            tracked(accelerator.log, numbers, step=state.step)

    def keep() -> bool:
        """A checkpoint of this moment: all processes bring their part, the main one writes."""
        contents = {
            "step": state.step,
            "non_finite": state.non_finite,
            "optimizer": optimizer.state_dict(),
        }
        contents |= {
            "schedule": schedule.state_dict(),
            "scaler": accelerator.scaler and accelerator.scaler.state_dict(),
        }
        contents["random"] = parallel.of_all(checkpoints.random_states(), accelerator)
        if not accelerator.is_main_process:
            return True
        kept = checkpoints.save(
            folder, state.step, adapter, contents, reward=reward.name, steps=state.step
        )
        if kept:
            checkpoints.prune(folder, checkpoints_total_limit, best_step(state.metrics))
        return kept

    def finish() -> None:
        """Keep what there is: a last checkpoint and the adapter by itself."""
        if state.step:
            with parallel.uninterrupted():
                keep()
                if accelerator.is_main_process:
                    journal.flush()
                    try:
                        adapter.save(
                            folder / "adapter.safetensors", reward=reward.name, steps=state.step
                        )
                    except OSError as error:
                        warnings.warn(
                            f"the adapter could not be written to {folder} ({error}); it is on the model still: "
                            f"run.adapter.save('another/place.safetensors')",
                            stacklevel=3,
                        )
        for tracker in accelerator.trackers if log_with else []:
            tracked(tracker.finish)

    limit = GIVE_UP if accelerator.scaler is None else GIVE_UP_SCALED
    stopped, hidden = False, not progress or not accelerator.is_main_process
    bar = tqdm(total=steps, initial=state.step, desc="align", unit="step", disable=hidden)
    with parallel.stoppable(accelerator) as asked:
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
                with parallel.uninterrupted():  # a step is taken and recorded, or neither
                    take_step(row)
                    record(row)
                    bar.update()
                if callback is not None:
                    callback(row)
        except KeyboardInterrupt:
            stopped = True
            optimizer.zero_grad()
            bar.write(f"stopped after step {state.step}; kept in {folder}")
            (folder / checkpoints.STOP).unlink(missing_ok=True)
        except BaseException:
            if accelerator.num_processes == 1 or state.non_finite >= limit:
                finish()  # else the others may not come: a checkpoint is a meeting of all processes
            adapter.remove()  # nobody would be left to do it
            raise
        finally:
            bar.close()
    finish()
    return Run(adapter, state.metrics, folder, stopped)


def tracked(call: Callable, *args, **options) -> None:
    """A tracker's call: a disk that is full for it costs its record, not the run."""
    try:
        call(*args, **options)
    except OSError as error:
        warnings.warn(
            f"the tracker could not write ({error}); metrics.jsonl has it all", stacklevel=3
        )


def checksum(texts: Sequence[str]) -> str:
    """Tells other prompts from the same ones, as many as they may be."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def adamw(
    parameters, learning_rate: float, weight_decay: float, use_8bit_adam: bool
) -> torch.optim.Optimizer:
    if not use_8bit_adam:
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes"
        ) from error
    return AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)


def scheduler(name: str, optimizer, warmup: int, steps: int):
    """diffusers' learning rate schedules, by their names."""
    from diffusers.optimization import SchedulerType, get_scheduler

    usable = [kind.value for kind in SchedulerType if kind.value != "piecewise_constant"]
    if name not in usable:
        raise ValueError(f"unknown lr_scheduler {name!r}; choose one of {', '.join(usable)}")
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def restore(found, adapter, optimizer, schedule, accelerator) -> State:
    """Put everything back as it was at the checkpoint."""
    tensors, contents, rows = found
    adapter.load_state_dict(tensors, "the checkpoint")
    optimizer.load_state_dict(contents["optimizer"])
    schedule.load_state_dict(contents["schedule"])
    # A process that was not there before takes the states of one that was.
    checkpoints.set_random_states(
        contents["random"][accelerator.process_index % len(contents["random"])]
    )
    if contents["scaler"] and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(contents["scaler"])
    return State(contents["step"], rows, contents["non_finite"])


def best_step(metrics: list[dict]) -> int | None:
    """The step with the highest validation score (of the first that `validate` names), None without any."""
    scored = [
        row for row in metrics if any(key.startswith("validation/") for key in row)
    ]  # NaN is never the best
    if not scored:
        return None
    first = next(key for key in scored[0] if key.startswith("validation/"))
    return max(scored, key=lambda row: -math.inf if math.isnan(row[first]) else row[first])["step"]


def flat(config: dict) -> dict:
    """For trackers, which take numbers and texts only."""
    return {
        name: value if isinstance(value, (int, float, str)) else str(value)
        for name, value in config.items()
    }
