"""The training loop: gradients of a reward into an adapter, on accelerate.

    run = align(load("tiny"), hps("tiny") + 0.02 * aesthetic("tiny"), "tiny", steps=40)

Everything is drawn from generators seeded with (seed, step), so that a resumed run, or one with a different
number of processes, draws the same.
"""

import contextlib
import hashlib
import importlib
import math
import resource
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from . import checkpoints, distributed, experts, lora, sharding
from . import prompts as prompt_sets
from .estimators import Batch, Collected, Estimator, RewardGradient, parse_estimator
from .long_clips import LongRewardGradient, parse_segments
from .models import VideoModel, exclusive
from .models.base import EARLIER_STEPS, SMALL_GAIN
from .near_base import MovingAverage
from .offload import is_sharded
from .prompts import Prompt
from .rewards import Reward, as_reward
from .sampling import NonFiniteError, Sampling, derived_seed
from .strategies import Frames
from .train_config import TrainConfig, check_half

MAX_NON_FINITE = 3  # steps in a row
MAX_NON_FINITE_SCALED = 20  # with fp16, whose loss scale comes down by such steps
KNOWN_STEPS = 10_000  # whose texts are encoded before the first one
CHECKED_PROMPTS = 1000  # are checked before the work starts, and compared when a run is resumed


@dataclass
class Run:
    """What training returns.

    Attributes:
        adapter: trained, and still on the model.
        metrics: one dict per step, the lines of metrics.jsonl.
        folder: where everything is saved.
        stopped: whether Ctrl-C, a notebook's stop button, SIGTERM or a stop file ended it.
    """

    adapter: lora.Adapter
    metrics: list[dict]
    folder: Path
    stopped: bool = False

    @property
    def rewards(self) -> list[float]:
        """Means over clips, one per step that was not skipped."""
        return [row["reward"] for row in self.metrics if "reward" in row]

    @property
    def best(self) -> Path | None:
        """The checkpoint with the highest validation score, if the run validated."""
        return checkpoints.list_checkpoints(self.folder).get(best_step(self.metrics) or 0)


@dataclass
class State:
    """Where a run stands. `non_finite` counts skipped steps in a row."""

    step: int = 0
    metrics: list[dict] = field(default_factory=list)
    non_finite: int = 0


def align(
    model: VideoModel,
    reward: Reward | Callable,
    prompts: Sequence[str | Prompt] | str,
    *,
    adapter=None,
    estimator: Estimator | str | None = None,
    validate: Callable[[lora.Adapter], dict[str, float]] | None = None,
    callback: Callable[[dict], None] | None = None,
    **settings,
) -> Run:
    """Align a model to a reward.

    Args:
        model: from `load`, without an adapter on it.
        reward: what to raise; a `Reward` or a function (frames, prompts) -> (B,).
        prompts: to train on: a list, the name of a set, or a file.
        adapter: to start from: an `Adapter` on the model, a `Run`, a path, or several by weight; default:
            a fresh one.
        estimator: what turns a batch into a gradient, also as text; default: `RewardGradient`. `DDPO`, `GRPO` and
            `DPO` take rewards without a gradient.
        validate: called every `validation_steps` steps with the adapter on the model. Returns named scores, which
            are added to the metrics; the first one decides which checkpoint is best. See `Validation`.
        callback: called with each step's metrics.
        **settings: fields of `TrainConfig` and of `Sampling`: steps=40, batch_size=4, learning_rate=1e-3,
            rank=8, strategy=Last(1), frames=Frames.random(1), num_inference_steps=10, output_dir="runs/mine", …

    Returns:
        The `Run`, with the trained adapter on the model.

    Raises:
        FileExistsError, ValueError, OSError: before anything is changed, if the folder holds another run,
            for invalid settings, or if the folder cannot be written.
        RuntimeError: after 3 non-finite steps in a row, or if the processes' adapters diverge.

    Ctrl-C, SIGTERM or a stop file ends the run early; everything up to the last complete step is kept. A full
    disk causes only a warning: the run goes on.
    """
    options = {
        "adapter": adapter,
        "estimator": estimator,
        "validate": validate,
        "callback": callback,
    }
    return Trainer(model, reward, prompts, TrainConfig.from_flat(settings), **options).fit()


class Trainer:
    """A training run in pieces, each of which a subclass may replace.

    `fit` runs the whole; one step is `batches` -> `collect` -> `gradients` -> `update` -> `record`, and
    `record` calls `validate` and `save` when they are due.
    """

    def __init__(
        self,
        model: VideoModel,
        reward: Reward | Callable,
        prompts: Sequence[str | Prompt] | str,
        config: TrainConfig | None = None,
        *,
        adapter=None,
        estimator: Estimator | str | None = None,
        validate: Callable[[lora.Adapter], dict[str, float]] | None = None,
        callback: Callable[[dict], None] | None = None,
    ):
        """Arguments as for `align`. Raises ValueError for invalid settings."""
        self.model, self.reward = model, as_reward(reward)
        self.prompts = prompt_sets.get(prompts)
        self.config = config = replace(config or TrainConfig())
        self.start_adapter, self.validation, self.callback = adapter, validate, callback
        self.state = State()
        self.lock: checkpoints.FileLock | None = None
        config.validate()
        config.sampling = config.sampling.resolve(model)
        self.estimator = parse_estimator(estimator) or default_estimator(config)
        if config.frames is None:  # without a gradient all of them cost little memory
            few = self.reward.per_frame and self.estimator.needs_reward_gradient
            config.frames = Frames.random(1) if few else Frames.all()
        if config.gradient_checkpointing is None:
            config.gradient_checkpointing = model.device.type == "cuda"
        self.reward.check_prompts([str(prompt) for prompt in self.prompts[:CHECKED_PROMPTS]])
        self.estimator.check_reward(self.reward)
        self.check_options()
        self.estimator.check_settings(config)
        self.reward.at_fps(model.defaults["fps"])
        self.reward.check_ready()
        # Draw once, so that a window or frames that do not fit are an error now.
        generator = torch.Generator().manual_seed(config.seed)
        plan = config.strategy.plan(model.num_steps(config.sampling), generator)
        if self.estimator.needs_reward_gradient and max(plan.active) == 1 and not plan.renoise:
            warn_of_small_step(model, config.sampling)
        self.reach = experts.Reach(model, config.sampling, self.estimator.strategy_of(config))
        self.targets = self.reach.targets(config.targets) if adapter is None else None
        given = model.given_frames(self.prompts)
        frames = config.frames.choose(config.sampling.total_frames, generator, given)
        self.reward.check_frames(len(frames))

    def check_options(self) -> None:
        """Raise ValueError for an option that would have no effect."""
        config, gradients = self.config, isinstance(self.estimator, RewardGradient)
        for name, off in {"rollout_reuse": 1, "base_penalty": 0}.items():
            if getattr(config, name) != off and not (gradients and config.sampling.extend == 1):
                what = "clips of one segment" if gradients else "the reward's gradient"
                raise ValueError(
                    f"{name}={getattr(config, name)} works only with {what}: set it to {off}"
                )
        if config.early_stopping and self.validation is None:
            raise ValueError(
                f"early_stopping={config.early_stopping} needs a validation: validate=Validation(…) in Python, "
                f"validation_steps=20 in a shell"
            )

    @exclusive
    def fit(self) -> Run:
        """Train; see `align`."""
        try:
            return self.run()
        finally:
            if self.lock is not None:
                self.lock.release()

    def run(self) -> Run:
        self.prepare()
        config, state = self.config, self.state
        hidden = not (config.progress and self.accelerator.is_main_process)
        bar = tqdm(
            total=config.steps, initial=state.step, desc="align", unit="step", disable=hidden
        )
        stopped = False
        with distributed.catch_signals(self.accelerator) as self.signals:
            try:
                while state.step < config.steps and not self.plateaued(bar):
                    self.train_step(bar)
            except KeyboardInterrupt:
                stopped = True
                self.optimizer.zero_grad()
                if state.step:
                    bar.write(f"stopped after step {state.step}; kept in {config.output_dir}")
                (config.output_dir / checkpoints.STOP).unlink(missing_ok=True)
            except BaseException:
                if self.accelerator.num_processes == 1 or state.non_finite >= self.max_non_finite:
                    self.finish()  # else others may never get here, and saving is a collective
                if self.adapter is not self.start_adapter:
                    self.adapter.remove()
                raise
            finally:
                bar.close()
        self.finish()
        return Run(self.adapter, state.metrics, config.output_dir, stopped)

    def plateaued(self, bar: tqdm) -> bool:
        """Whether `early_stopping` ends the run now."""
        patience, metrics = self.config.early_stopping, self.state.metrics
        best = best_step(metrics) if patience else None
        later = [
            row["step"] for row in metrics if best and row["step"] > best and is_validated(row)
        ]
        if not patience or len(later) < patience:
            return False
        bar.write(f"stopped early after step {later[-1]}: the best validation was at step {best}")
        return True

    def train_step(self, bar: tqdm) -> None:
        """One step: roll-outs, and as many optimizer updates on them as the estimator wants."""
        began = time.perf_counter()
        rollouts: list[Iterable[Collected]] = []

        def gradients(update: int) -> dict:
            try:
                if not update:
                    rollouts.append(self.collect(self.state.step))
                part = self.estimator.minibatch(rollouts[0], update)
                return self.gradients(part, may_stop=not update)
            except NonFiniteError as error:
                bar.write(f"step {self.state.step + 1} skipped: {error}")
                return {"step": self.state.step + 1, "skipped": str(error)}

        first = gradients(0)
        with distributed.delay_signals():  # a step is taken and recorded, or neither
            rows = [self.update(first)]
            while "reward" in rows[-1] and len(rows) < self.estimator.updates_per_rollout:
                rows.append(self.update(gradients(len(rows))))
            row = mean_row(rows)
            self.state.step += 1
            self.record(row | self.costs(time.perf_counter() - began))
            bar.update()
            if "reward" in row:
                bar.set_postfix(reward=f"{row['reward']:.4f}", grad=f"{row['grad_norm']:.2e}")
        if self.callback is not None:
            self.callback(self.state.metrics[-1])

    # ------------------------------------------------------------------ before the first step

    def prepare(self) -> None:
        """Make or restore all that a run needs; whatever is invalid raises before its folder is changed."""
        config, model = self.config, self.model
        self.accelerator = distributed.accelerator_for(
            model.device, config.mixed_precision, config.log_with, config.output_dir
        )
        networks = (
            *model.denoisers.values(),
            *model.decoders(),
        )  # texts are encoded without autocast
        dtypes = {p.dtype for network in networks for p in network.parameters()}
        check_half(self.accelerator.mixed_precision, dtypes)
        scaled = self.accelerator.scaler is not None
        self.max_non_finite = MAX_NON_FINITE_SCALED if scaled else MAX_NON_FINITE
        clips = config.batch_size * config.gradient_accumulation_steps
        clips, group = clips * self.accelerator.num_processes, self.estimator.clips_per_prompt
        if clips % group:
            raise ValueError(
                f"the {clips} clips of a step (batch_size × gradient_accumulation_steps × processes) cannot be "
                f"divided into groups of {group} of one prompt"
            )
        found = distributed.broadcast_from_main(self.find_checkpoint, self.accelerator)
        self.encode_texts(found[1]["step"] if found else 0)
        sharding.shard_as_launched(model, self.accelerator)
        self.adapter = self.make_adapter()
        try:
            self.estimator.setup(model, self.adapter, self.reward, config)
            self.make_optimizer()
            if found:
                self.restore(*found)
            self.place_reward()
            distributed.broadcast_from_main(
                lambda: checkpoints.begin(config.output_dir, self.description(), self.state.step),
                self.accelerator,
            )
        except BaseException:
            if self.adapter is not self.start_adapter:
                self.adapter.remove()
            raise
        file = config.output_dir / "metrics.jsonl" if self.accelerator.is_main_process else None
        self.journal = checkpoints.Journal(file, self.state.metrics)
        if config.log_with:
            settings = {name: _for_tracker(value) for name, value in self.description().items()}
            options = {"wandb": {"dir": str(config.output_dir)}}
            self.accelerator.init_trackers(config.output_dir.name, settings, options)

    def find_checkpoint(self) -> tuple | None:
        """In the main process: lock the folder; return the tensors, state and metrics to resume from, if any."""
        config = self.config
        start = checkpoints.find_checkpoint(config.output_dir, config.resume)
        if start is not None:
            may_change = {f.name for f in fields(config) if f.metadata.get("may_change")}
            if "constant" in config.lr_scheduler:  # other schedules stretch over all steps
                may_change.add("steps")
            checkpoints.check_same_run(config.output_dir, self.description(), may_change)
        checkpoints.check_writable(config.output_dir)
        self.lock = checkpoints.claim(config.output_dir)
        if start is None:
            return None
        tensors, contents = checkpoints.read(start)
        return tensors, contents, checkpoints.read_metrics(config.output_dir, contents["step"])

    def encode_texts(self, step: int) -> None:
        """Load just once a text encoder that is kept out of memory: for all prompts drawn from this step on."""
        if not self.model.keeps_texts:
            return
        steps = range(step, min(self.config.steps, step + KNOWN_STEPS))
        prompts = [prompt for i in steps for batch in self.batches(i) for prompt in batch.prompts]
        prompts += getattr(self.validation, "prompts", [])
        texts = dict.fromkeys(Prompt(str(p), getattr(p, "negative_prompt", "")) for p in prompts)
        every = distributed.gather(list(texts), self.accelerator)
        distributed.encode_texts(self.model, sum(every, []))

    def description(self) -> dict:
        """What `config.json` holds."""
        config = self.config
        texts = [_text_of(prompt) for prompt in self.prompts[:CHECKED_PROMPTS]]
        return {
            "model": self.model.name,
            "reward": self.reward.name,
            "reward_fingerprint": self.reward.fingerprint,
            "prompts": len(self.prompts),
            "prompts_checksum": hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16],
            "estimator": repr(self.estimator),
            "num_processes": self.accelerator.num_processes,
            **config.to_json(),
            "alpha": config.rank if config.alpha is None else config.alpha,
            "mixed_precision": self.accelerator.mixed_precision,
        }

    def make_adapter(self) -> lora.Adapter:
        """A fresh adapter, or the one to start from."""
        config, start = self.config, getattr(self.start_adapter, "adapter", self.start_adapter)
        if start is None:
            return lora.add(self.model, config.rank, config.alpha, self.targets, config.seed)
        if isinstance(start, lora.Adapter):
            start.check_attached(self.model)
            adapter = self.start_adapter = start
        elif isinstance(start, dict):
            adapter = lora.combine(self.model, start)
        else:
            adapter = lora.load(self.model, start)
        if config.rank not in (TrainConfig.rank, adapter.rank):
            if adapter is not start:
                adapter.remove()
            raise ValueError(
                f"rank={config.rank} does not match the adapter to start from, which has rank {adapter.rank}"
            )
        config.rank, config.alpha, config.targets = adapter.rank, adapter.alpha, adapter.targets
        return adapter

    def make_optimizer(self) -> None:
        """AdamW, its learning rate schedule, and what accelerate wraps around them."""
        config = self.config
        self.parameters = self.adapter.parameters(self.reach.trained(self.adapter))
        self.average = (
            MovingAverage(self.parameters, config.ema_decay) if config.ema_decay else None
        )
        self.optimizer = adamw(self.parameters, config)
        self.schedule = lr_schedule(self.optimizer, config, self.estimator.updates_per_rollout)
        self.backward = torch.Tensor.backward
        if not sharding.uses_engine(self.accelerator):
            self.optimizer = self.accelerator.prepare(self.optimizer)
            self.backward = self.accelerator.backward

    def place_reward(self) -> None:
        """Move the reward's networks to the model's device, in its half precision where it has one."""
        half = self.model.dtype in (torch.float16, torch.bfloat16)  # `memory` counts with it
        dtype = [self.model.dtype] if half else []
        if self.model.offloader is None:
            self.reward.to(self.model.device, *dtype)
        else:
            self.reward.to(*dtype or [self.model.offload_device])
            self.model.offload(*self.reward.networks)

    def restore(self, tensors: dict, contents: dict, metrics: list[dict]) -> None:
        """Put everything back as it was at a checkpoint."""
        self.adapter.load_state_dict(tensors, "the checkpoint")
        self.optimizer.load_state_dict(contents["optimizer"])
        self.schedule.load_state_dict(contents["schedule"])
        if self.average:  # of a version without it: from here on
            begun = MovingAverage(self.parameters, 0)
            self.average.load_state_dict(contents.get("average") or begun.state_dict())
        # A process that was not there before takes the states of one that was.
        states = contents["random"]
        checkpoints.set_random_states(states[self.accelerator.process_index % len(states)])
        if contents.get("scaler") and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(contents["scaler"])
        self.estimator.restore(contents.get("estimator", {}))  # older checkpoints have none
        self.state = State(contents["step"], metrics, contents["non_finite"])

    # ------------------------------------------------------------------ one step

    def batches(self, step: int) -> Iterator[Batch]:
        """This process's share of the step's micro-batches; how they are divided changes no draw."""
        config, accelerator = self.config, self.accelerator
        count = accelerator.num_processes * config.gradient_accumulation_steps
        base = config.seed * 1_000_003 + step
        generators = [torch.Generator().manual_seed(derived_seed(base, i)) for i in range(count)]
        # The first one also draws prompts and seeds for all.
        size = (count * config.batch_size,)
        groups = (size[0] // self.estimator.clips_per_prompt,)
        chosen = torch.randint(len(self.prompts), groups, generator=generators[0])
        chosen = chosen.repeat_interleave(self.estimator.clips_per_prompt)
        seeds = torch.randint(2**31, size, generator=generators[0])
        # Processes that share weights must call the denoiser equally often, and so draw the same steps.
        together = is_sharded(self.model.denoiser)
        for i in range(accelerator.process_index, count, accelerator.num_processes):
            part = slice(i * config.batch_size, (i + 1) * config.batch_size)
            yield Batch(
                [self.prompts[j] for j in chosen[part].tolist()],
                seeds[part].tolist(),
                generators[i - accelerator.process_index if together else i],
                i,
            )

    def collect(self, step: int) -> Iterable[Collected]:
        """Roll-outs of all micro-batches; one by one as they are needed, unless they are compared."""
        rollouts = map(self.estimator.collect, self.batches(step))
        if not self.estimator.compares_rollouts:
            return rollouts
        with self.accelerator.autocast():
            collected = list(rollouts)
        self.estimator.advantages(
            collected, lambda value: distributed.gather(value, self.accelerator)
        )
        return collected

    def gradients(self, collected: Iterable[Collected], may_stop: bool = True) -> dict:
        """Gradients of all micro-batches, averaged over processes and clipped; returns the step's row.

        Args:
            may_stop: True while no update of this step has been made.

        Raises:
            NonFiniteError: in every process, if one of them saw a number that is not finite.
            KeyboardInterrupt: in every process, if one of them was asked to stop.
        """
        rows, problem = [], ""
        sharded = is_sharded(self.model.denoiser)
        weight = 1 / self.config.gradient_accumulation_steps
        with self.accelerator.autocast():
            for part in collected:
                try:
                    rows.append(self.estimator.accumulate(part, weight, self.backward))
                except (
                    NonFiniteError
                ) as error:  # all processes must know before the step is skipped
                    problem = problem or str(error)
                    if not sharded:  # else they wait for this one at the next micro-batch, too
                        break
        means = mean_rewards(rows, self.reward)
        stop = bool(self.signals) or (self.config.output_dir / checkpoints.STOP).exists()
        stop = stop and may_stop
        synced = distributed.sync_gradients(
            self.parameters, self.accelerator, means, bool(problem), stop
        )
        if synced.stop:
            raise KeyboardInterrupt
        if synced.non_finite:
            self.optimizer.zero_grad()  # some of the micro-batches make no gradient
            raise NonFiniteError(problem or "the numbers of another process were not finite")
        return {
            "step": self.state.step + 1,
            **synced.values,
            "grad_norm": self.clip(
                synced.values["reward"] >= self.reward.range[1] - 1e-6, may_stop
            ),
            "learning_rate": self.schedule.get_last_lr()[0],
            **rows[-1].info,
        }

    def clip(self, at_cap: bool, first: bool = True) -> float:
        """Clip the gradient; returns its norm before clipping. Raises if it is not finite, or zero at
        the start although the reward is below its cap."""
        engine = sharding.uses_engine(self.accelerator)
        clip: Any = torch.nn.utils.clip_grad_norm_ if engine else self.accelerator.clip_grad_norm_
        norm = float(clip(self.parameters, self.config.max_grad_norm or math.inf))
        # Scores that are all equal, as those of a judge who says yes or no may be, teach nothing yet.
        needed = first and self.estimator.needs_reward_gradient
        if norm == 0 and self.state.step == 0 and needed:
            what = f"the gradient of {self.reward.name!r} that reaches the adapter is zero"
            if not at_cap:
                raise ValueError(f"{what}: nothing to learn from")
            warnings.warn(f"{what}: the first batch is at the reward's upper bound", stacklevel=2)
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient's norm is {norm}; a likely cause: the denoiser overflows in half precision"
            )
        return norm

    def update(self, row: dict) -> dict:
        """The optimizer's step, unless the row says that the step is skipped; returns the row to record."""
        scaler = self.accelerator.scaler
        before = [p.detach().clone() for p in self.parameters]
        if "reward" in row or (scaler is not None and self.parameters[0].grad is not None):
            self.optimizer.step()  # a loss scaler skips an overflow by itself, and lowers its scale
        if not all(p.isfinite().all() for p in self.parameters):
            rate = self.config.learning_rate
            problem = f"the weights after the update are not finite: lower learning_rate={rate:g}"
            row = {"step": row["step"], "skipped": problem}
            with torch.no_grad():
                for p, value in zip(self.parameters, before):
                    p.copy_(value)
        taken = "reward" in row
        if taken and not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
            if self.average:
                self.average.update()
        self.optimizer.zero_grad()
        self.state.non_finite = 0 if taken else self.state.non_finite + 1
        distributed.check_synchronized(self.parameters, self.accelerator, self.state.step + 1)
        return row

    def averaged(self) -> contextlib.AbstractContextManager:
        """Inside, the adapter is what the run would return now."""
        return self.average.applied() if self.average else contextlib.nullcontext()

    def costs(self, seconds: float) -> dict:
        """What a step took: time, clips per second in all processes, peak memory in bytes."""
        config, processes = self.config, self.accelerator.num_processes
        clips = config.batch_size * config.gradient_accumulation_steps * processes
        if self.model.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.model.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"seconds": seconds, "clips_per_second": clips / seconds, "peak_memory": memory}

    # ------------------------------------------------------------------ after a step

    def record(self, row: dict) -> None:
        """Write the row; validate, and save a checkpoint, where they are due."""
        config, state = self.config, self.state
        self.journal.add(row)
        if state.step % config.validation_steps == 0 or state.step == config.steps:
            self.validate()
        if state.non_finite >= self.max_non_finite:
            raise RuntimeError(
                f"{state.non_finite} steps in a row were not finite; the last one: {row['skipped']}"
            )
        if state.step % config.checkpointing_steps == 0 or best_step(state.metrics) == state.step:
            self.save()
        if config.log_with:
            values = {name: value for name, value in row.items() if isinstance(value, float)}
            track(self.accelerator.log, values, step=state.step)

    def validate(self) -> None:
        """Add validation scores to the step's row: the main process's, so that all decide alike."""
        if self.validation is None:
            return
        with self.averaged():
            own = self.validation(self.adapter)
        scores: Any = distributed.broadcast_from_main(lambda: own, self.accelerator)
        self.journal.amend({f"validation/{name}": value for name, value in scores.items()})

    def save(self) -> bool:
        """A checkpoint of this moment: all processes bring their part, the main one writes."""
        state, config, scaler = self.state, self.config, self.accelerator.scaler
        contents = {
            "step": state.step,
            "non_finite": state.non_finite,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler and scaler.state_dict(),
            "estimator": self.estimator.state(),
            "random": distributed.gather(checkpoints.random_states(), self.accelerator),
        }
        if self.average:
            contents["average"] = self.average.state_dict()
        if not self.accelerator.is_main_process:
            return True
        with self.averaged():
            saved = checkpoints.save(
                config.output_dir, state.step, self.adapter, contents, **self.adapter_metadata()
            )
        if saved:
            best = best_step(state.metrics)
            checkpoints.prune(config.output_dir, config.checkpoints_total_limit, best)
        return saved

    def adapter_metadata(self) -> dict:
        """What the adapter's file says besides rank and alpha."""
        return {
            "reward": self.reward.name,
            "reward_fingerprint": self.reward.fingerprint,
            "steps": self.state.step,
        }

    def finish(self) -> None:
        """Keep what there is: a last checkpoint, and the adapter by itself."""
        folder = self.config.output_dir
        if self.state.step:
            with distributed.delay_signals():
                self.save()
                steps = self.settle()
                if self.accelerator.is_main_process:
                    self.journal.flush()
                    try:
                        metadata = self.adapter_metadata() | {"steps": steps}
                        self.adapter.save(folder / "adapter.safetensors", **metadata)
                    except OSError as error:
                        warnings.warn(
                            f"the adapter could not be written to {folder} ({error}); a notebook still has "
                            f"it: run.adapter.save('another/place.safetensors')",
                            stacklevel=3,
                        )
        for tracker in self.accelerator.trackers if self.config.log_with else []:
            track(tracker.finish)

    def settle(self) -> int:
        """Leave what the run returns on the model: the last adapter, its average, or with `early_stopping` the best
        checkpoint's. Returns its step."""
        if self.average:
            self.average.apply()

        def read_best() -> tuple:
            best = best_step(self.state.metrics) if self.config.early_stopping else None
            path = checkpoints.list_checkpoints(self.config.output_dir).get(best or 0)
            return (best, lora.read(path)[0]) if path else (self.state.step, None)

        found: Any = distributed.broadcast_from_main(read_best, self.accelerator)
        step, tensors = found
        if tensors is not None:
            self.adapter.load_state_dict(tensors, "the best checkpoint")
        return step


def mean_rewards(rows: list, reward: Reward) -> dict[str, float]:
    """The mean reward, and that of every part of a mixed one; the same names whatever was scored."""
    parts = [part.name for part in reward.parts()]
    names = ["reward", *(f"reward/{name}" for name in parts if len(parts) > 1)]
    if not rows:
        return dict.fromkeys(names, 0.0)
    means = {"reward": torch.cat([row.rewards for row in rows]).mean().item()}
    for name in names[1:]:
        values = [row.parts[name.removeprefix("reward/")] for row in rows]
        means[name] = torch.cat(values).mean().item()
    return means


def mean_row(rows: list[dict]) -> dict:
    """One row of those of a step's updates, with the means of their numbers; one that was skipped says why."""
    taken = [row for row in rows if "reward" in row]
    result = rows[0] | rows[-1]
    for name in taken[-1] if len(taken) > 1 else []:
        if isinstance(taken[-1][name], float):
            result[name] = sum(row[name] for row in taken) / len(taken)
    return result


def track(call: Callable, *args, **options) -> None:
    """Call a tracker; a full disk costs its record, not the run."""
    try:
        call(*args, **options)
    except OSError as error:
        warnings.warn(
            f"the tracker could not write ({error}); metrics.jsonl has it all", stacklevel=3
        )


def _text_of(prompt: str | Prompt) -> str:
    negative = getattr(prompt, "negative_prompt", "")
    return f"{prompt}\0{negative}" if negative else str(prompt)


def _for_tracker(value):
    return value if isinstance(value, (int, float, str)) else str(value)


def warn_of_small_step(model: VideoModel, sampling: Sampling) -> None:
    """Warn where the last step, the only one that learns, hardly moves the video."""
    gain = model.last_step_gain(sampling)
    if gain < SMALL_GAIN:
        warnings.warn(
            f"the last of {sampling.num_inference_steps} steps of {model.name!r} moves the video by {gain:.1g} "
            f"of the denoiser's output, and it is the only step that learns: next to nothing will be learned. Steps that form "
            f"the content learn with strategy={EARLIER_STEPS}",
            stacklevel=4,
        )


def default_estimator(config: TrainConfig) -> Estimator:
    """The reward's gradient, through one segment or several. Raises ValueError for segments that are not there."""
    parse_segments(config.segments, config.sampling.extend)
    return LongRewardGradient() if config.sampling.extend > 1 else RewardGradient()


def adamw(parameters: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW as configured. Raises ValueError if its 8-bit form is wanted and not installed."""
    options: dict = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.use_8bit_adam:
        try:
            eight_bit = importlib.import_module("bitsandbytes.optim").AdamW8bit
        except ImportError as error:
            raise ValueError(
                "use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes"
            ) from error
        return eight_bit(parameters, **options)
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.AdamW(parameters, **options, fused=fused)


def lr_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, updates: int = 1):
    """One of diffusers' learning rate schedules, for `updates` per step. Raises ValueError for an unknown name."""
    from diffusers.optimization import SchedulerType, get_scheduler

    usable = [kind.value for kind in SchedulerType if kind.value != "piecewise_constant"]
    if config.lr_scheduler not in usable:
        raise ValueError(
            f"unknown lr_scheduler {config.lr_scheduler!r}; choose one of {', '.join(usable)}"
        )
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps * updates,
        num_training_steps=config.steps * updates,
    )


def is_validated(row: dict) -> bool:
    return any(key.startswith("validation/") for key in row)


def best_step(metrics: list[dict]) -> int | None:
    """The step with the highest validation score (the first one that `validate` names), if any.

    If a resumed run validates with a different score, steps before that do not count.
    """
    scored = [row for row in metrics if is_validated(row)]
    if not scored:
        return None
    first = next(key for key in scored[-1] if key.startswith("validation/"))
    # NaN is never the best.
    scores = {row["step"]: row[first] for row in scored if first in row}
    return max(scores, key=lambda step: -math.inf if math.isnan(scores[step]) else scores[step])
