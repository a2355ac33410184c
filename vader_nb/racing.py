"""A fair race: methods of alignment with equal budgets, on the same prompts and seeds, each at the best rate of its grid.

    model = load("tiny")
    contestants = {"VADER": {"strategy": "Last(1)"}, "GRPO": {"estimator": "GRPO", "batch_size": 32}, "best of 8": {"best_of": 8}}
    race(model, contestants, hps(), "tiny", held_out="tiny_held_out", held_out_reward=action(), budget={"seconds": 300})

Each contestant × learning rate × seed is one job: a run of the trainer that ends when its budget is spent. Jobs are
evaluated n times, the k-th time at (k / n)² of the budget; each evaluation appends one line to the job's
`evaluations.jsonl`. A race that was killed continues where it was when started again; `Race(folder)` reads it at any
time. Costs:

- reward_queries: clips scored in training, counted each time.
- denoiser_calls: latents that pass through the denoiser in training, once for each branch of the guidance: roll-outs,
  replays, references without the adapter.
- denoiser_backwards: those that a gradient is backpropagated through. A backward pass takes about as long as two calls.
- seconds: of training, without evaluations; on a CPU, the CPU time of its threads, whatever else the machine does.
- bytes_kept: the most that roll-outs and autograd keep at once for backward passes, without weights; on CUDA the most
  memory beyond what was in use before a step.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from tqdm.auto import tqdm

from . import checkpoints, lora
from . import prompts as prompt_sets
from .estimators import BestOf
from .evaluation import Evaluator
from .guidance import RewardGuidance
from .meter import COSTS, Meter, MeteredTrainer
from .metrics import thumbnails, unique_metrics
from .models import VideoModel
from .prompts import Prompt
from .race_jobs import Job, checked_budget, plan_jobs
from .race_results import EVALUATED, LINES, Race, read_lines
from .rewards import Reward, as_reward
from .sampling import sample
from .train_config import TrainConfig

# By which `accelerate launch` and torchrun tell a process that it is one of several.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def race(
    model: VideoModel,
    contestants: Mapping[str, Mapping[str, Any]],
    reward: Reward | Callable,
    prompts: Sequence[str | Prompt] | str,
    *,
    held_out: Sequence[str | Prompt] | str,
    held_out_reward: Reward | Callable,
    budget: Mapping[str, float],
    learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3),
    seeds: Sequence[int] = (0, 1, 2),
    evaluations: int = 4,
    seeds_per_prompt: int = 2,
    eval_batch_size: int = 8,
    features: Callable[[torch.Tensor], torch.Tensor] = thumbnails,
    output_dir: str | Path = "runs/race",
    progress: bool = True,
    **settings,
) -> Race:
    """Run what is left of a race. With n processes, each runs every n-th job by itself.

    Args:
        model: from `load`, without an adapter on it.
        contestants: name -> settings of `TrainConfig`, and any of: `estimator`; `reward`, to train on instead of the
            race's, by which it is still judged; `learning_rates`, its own grid, with as many rates as the others';
            or, instead of training, `best_of`, the number of clips of which the reward chooses the best, or
            `guidance`, the strength of `RewardGuidance`. The base model is always included.
        reward, prompts: to train on.
        held_out, held_out_reward: prompts and a reward that no contestant is trained on; all are judged by them.
        budget: of each run: `reward_queries`, `denoiser_calls` or `seconds`, and how many. A run's last step may go
            beyond it.
        learning_rates: the grid; each contestant gets the rate with the highest `reward` on held-out prompts at the
            end, averaged over its seeds. The held-out reward is not used for this.
        seeds: of the runs.
        evaluations: for each run, n: the k-th at (k / n)² of its budget.
        seeds_per_prompt, eval_batch_size, features: of an evaluation, as for `evaluate`.
        output_dir: the race's folder.
        **settings: of `TrainConfig`, for all contestants that do not set them. Sampling settings given here
            (`num_inference_steps`, …) also apply to evaluations.

    Raises:
        ValueError: before any work, for invalid settings, with the contestant's name; or if the folder holds
            another race.
    """
    judged = as_reward(reward), as_reward(held_out_reward)
    jobs = plan_jobs(contestants, settings, learning_rates, seeds)
    unit, limit = checked_budget(budget, evaluations)
    metrics, _ = unique_metrics(judged[0], [judged[1]])
    sampling = TrainConfig.from_flat(settings).sampling.resolve(model)
    texts, folder = prompt_sets.get(held_out), Path(output_dir).expanduser()
    with alone(model) as (index, count):
        options = {"seeds_per_prompt": seeds_per_prompt, "batch_size": eval_batch_size, "keep": 1}
        evaluator = Evaluator(model, metrics, sampling, features, **options)
        of = model, judged[0], prompts, evaluator, texts
        runner = Runner(*of, unit, limit, evaluations, folder)
        runner.check(jobs)
        about = described(runner, judged, [*prompt_sets.get(prompts), *texts])
        begin(folder, about, index)
        runner.run_all(jobs[index::count], disable=not progress, position=index)
    return Race(folder)


def described(runner: "Runner", judged: Sequence[Reward], prompts: Sequence[str | Prompt]) -> dict:
    """What a race is run on, so that another one is not mistaken for it."""
    evaluator, listed = runner.evaluator, "\n".join(map(str, prompts))
    return {
        "model": runner.model.name,
        "budget": {runner.unit: runner.budget},
        "evaluations": runner.evaluations,
        "held_out": len(runner.texts),
        "seeds_per_prompt": evaluator.seeds_per_prompt,
        "sampling": repr(evaluator.sampling),
        "reward": judged[0].name,
        "held_out_reward": judged[1].name,
        "fingerprints": [judge.fingerprint for judge in judged],
        "prompts_checksum": hashlib.sha256(listed.encode()).hexdigest()[:16],
    }


def begin(folder: Path, about: dict, index: int) -> None:
    """Write race.json. Raises ValueError if it holds another race."""
    path, about = folder / "race.json", json.loads(json.dumps(about))
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for key, value in about.items():
            if before.get(key) != value:
                was = f"{key} was {before.get(key)!r}, now {value!r}"
                raise ValueError(f"{folder} holds another race: {was}; choose another output_dir")
    elif not index:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.write_text(path, json.dumps(about, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def alone(model: VideoModel) -> Iterator[tuple[int, int]]:
    """Inside, this process trains by itself, whatever launched it. Yields its index, and how many there are."""
    before = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    count, dist = int(before.get("WORLD_SIZE", 1)), torch.distributed
    ready = dist.is_available() and dist.is_initialized()
    index = dist.get_rank() if ready else int(before.get("RANK", 0))
    if count > 1:
        before["ACCELERATE_TORCH_DEVICE"] = os.environ.get("ACCELERATE_TORCH_DEVICE", "")
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(model.device)
        AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield index, count
    finally:
        if count > 1:
            os.environ.update(before)
            AcceleratorState._reset_state(reset_partial_state=True)
            if not before["ACCELERATE_TORCH_DEVICE"]:
                del os.environ["ACCELERATE_TORCH_DEVICE"]


@dataclass
class Runner:
    """Runs jobs; fields as for `race`."""

    model: VideoModel
    reward: Reward
    prompts: Any
    evaluator: Evaluator
    texts: list
    unit: str
    budget: float
    evaluations: int
    output_dir: Path
    bar: Any = None

    def trainer(self, job: Job) -> MeteredTrainer:
        settings = {**job.settings, "checkpoints_total_limit": 1}
        estimator = settings.pop("estimator", None)
        reward = as_reward(settings.pop("reward", self.reward))
        settings |= {"learning_rate": job.learning_rate, "seed": job.seed, "steps": 10**9}
        settings |= {"output_dir": self.output_dir / job.folder, "resume": "latest"}
        settings |= {"validation_steps": 1, "progress": False}
        config = TrainConfig.from_flat(settings)
        if "constant" not in config.lr_scheduler:
            raise ValueError(
                f"lr_scheduler={config.lr_scheduler} needs a number of steps; a race has a budget"
            )

        def reached(trainer: MeteredTrainer, part: int) -> None:
            file = self.output_dir / job.folder / LINES
            if all(line["part"] < part for line in read_lines(file)):  # else written before a kill
                spent = {name: trainer.spent(name) for name in COSTS}
                trainer.adapter.save(file.with_name(EVALUATED.format(part)))
                line = {"part": part, "step": trainer.state.step} | spent
                self.add_line(job, file, line | self.evaluate(trainer.adapter))

        options = {"budget": (self.unit, self.budget), "parts": self.evaluations}
        options |= {"reached": reached, "estimator": estimator}
        return MeteredTrainer(self.model, reward, self.prompts, config, **options)

    def check(self, jobs: Sequence[Job]) -> None:
        """Check the held-out prompts, and a job of each contestant.

        Raises:
            ValueError: for prompts that a judge cannot score; with the contestant's name, for a job that cannot be run.
        """
        self.evaluator.check_prompts(self.texts)
        for job in {job.contestant: job for job in jobs}.values():
            try:
                self.check_job(job)
            except ValueError as error:
                raise ValueError(f"contestant {job.contestant!r}: {error}") from error

    def check_job(self, job: Job) -> None:
        if job.seed is None:
            self.sampler(job)
            return
        trainer = self.trainer(job)
        config, group = trainer.config, trainer.estimator.clips_per_prompt
        clips = config.batch_size * config.gradient_accumulation_steps
        if clips % group:
            raise ValueError(
                f"the {clips} clips of a step cannot be divided into groups of {group}"
            )

    def sampler(self, job: Job) -> BestOf | RewardGuidance | None:
        """What samples the clips of a contestant that is not trained; None: sampling alone."""
        if "best_of" in job.settings:
            return BestOf(job.settings["best_of"], self.reward)
        if "guidance" in job.settings:
            return RewardGuidance(self.reward, job.settings["guidance"])
        return None

    def run_all(self, jobs: Sequence[Job], **shown) -> None:
        """Run jobs until one is stopped; with arguments of tqdm."""
        total = sum(1 if job.seed is None else self.evaluations for job in jobs)
        with tqdm(total=total, desc="race", unit="evaluation", **shown) as self.bar:
            for job in jobs:
                if not self.run(job):
                    break

    def run(self, job: Job) -> bool:
        """Run a job, or what is left of it. Returns False if it was stopped."""
        file, trained = self.output_dir / job.folder / LINES, job.seed is not None
        lines = read_lines(file)
        self.bar.set_postfix_str(job.folder)
        if any("failed" in line for line in lines):
            self.bar.update(self.evaluations)
            return True
        if not trained:
            if lines:
                self.bar.update()
            else:
                self.add_line(job, file, self.evaluate(None, self.sampler(job)))
            return True
        saved = (file.parent / "adapter.safetensors").exists()  # it is, after the last line
        if saved and lines and lines[-1]["part"] == self.evaluations:
            self.bar.update(self.evaluations)
            return True
        self.bar.update(len(lines))
        trainer = self.trainer(job)
        try:
            run = trainer.fit()
        except RuntimeError as error:
            if trainer.state.non_finite < trainer.max_non_finite:
                raise
            self.add_line(job, file, {"part": self.evaluations, "failed": str(error)})
            return True
        run.adapter.remove()
        return not run.stopped

    def evaluate(self, adapter, sampler: Any = None) -> dict:
        """Scores of the held-out prompts, means over seeds; and the costs per clip."""
        clips = len(self.texts) * self.evaluator.seeds_per_prompt
        with lora.use_adapter(self.model, sampler or adapter) as used, Meter(self.model) as meter:
            how = getattr(sampler, "sample", sample)
            scores, _ = self.evaluator.run(used, self.texts, None, how)
        means = {name: x.mean(0).tolist() for name, x in scores.items()}
        queries = getattr(sampler, "n", 0)
        if isinstance(sampler, RewardGuidance):
            queries = self.model.num_steps(self.evaluator.sampling)
        per_clip = {"reward_queries": queries, "denoiser_calls": meter.calls / clips}
        return {"per_clip": per_clip, "scores": means}

    def add_line(self, job: Job, file: Path, values: dict) -> None:
        """Append a line; one that a kill has cut off is dropped."""
        keys = {"contestant": job.contestant, "learning_rate": job.learning_rate, "seed": job.seed}
        line = keys | {"part": 0, "step": 0, **dict.fromkeys(COSTS, 0)} | values
        file.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if text and not text.endswith("\n"):
            checkpoints.write_text(file, text[: text.rfind("\n") + 1])
        with file.open("a", encoding="utf-8") as stream:
            stream.write(checkpoints.to_json(line) + "\n")
        self.bar.update()
