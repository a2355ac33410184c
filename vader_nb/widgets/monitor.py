"""Watching a run: its curves and clips while it trains, and stopping it without losing anything.

monitor = TrainingMonitor("runs/mine", model, held_out=hps, prompts=texts[:4])
align(model, reward, training, output_dir=monitor.folder, **monitor.hooks)   in another cell
TrainingMonitor("runs/mine")              later, or elsewhere: the same, from the run's folder
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ipywidgets import SelectionSlider

from .. import checkpoints
from .. import prompts as prompt_sets
from ..drawing import Series, chart, code
from ..evaluation import Evaluator
from ..lora import Adapter
from ..models import VideoModel
from ..prompts import Prompt
from ..rewards import Reward, as_reward
from ..run_data import DESCRIPTIONS, adapters, ended, run_titles, watched
from ..sampling import Sampling
from ..trainer import Run, best_step
from ..video import Video
from .controls import LINE, disable, row
from .watching import NONE, SEEDS, Watcher, by_seed, offer

REDRAWS = 4  # per second while a cell trains: some pages cannot take more
SILENT = 120  # seconds without a step after which a run may be dead
START = "run = align(model, reward, prompts, output_dir=monitor.folder, **monitor.hooks)"
NO_STOP = {  # why there is nothing to stop
    "waiting": "There is nothing to stop yet.",
    "finished": "The run is over.",
    "stopped": "The run is over.",
    "stopping": "The run stops after the current step.",
}
HERE = "This kernel is training and does not react to buttons: press ■ in the toolbar. The run is kept."


class TrainingMonitor(Watcher):
    """The curves, the clips at fixed seeds and the state of a run.

    Args:
        run: Folder of the run, which need not exist yet, or the `Run` that `align` returned.
        model: Makes the clips; without it the monitor shows what is in the folder.
        held_out: Rewards that the run is not trained on, which score the clips.
        prompts: Prompts of the clips, as for `align`.
        sampling: Settings of the clips; default: those of the model.
        every: Optimizer steps between two sets of clips.
        seed: The first seed of the clips.

    Raises:
        ValueError: A held-out reward or prompts without the model, or the model without prompts.
    """

    title = "Training monitor"
    hint = "Start a run in another cell: its curves and clips appear here while it trains."

    def __init__(
        self,
        run: Run | str | Path,
        model: VideoModel | None = None,
        held_out: Reward | Callable | Sequence[Reward | Callable] = (),
        prompts: str | Sequence[str | Prompt] = (),
        *,
        sampling: Sampling | None = None,
        every: int = 5,
        seed: int = 10_000,
    ):
        rewards = [held_out] if callable(held_out) else held_out
        self.folder = run.folder if isinstance(run, Run) else Path(run)
        self.held_out = [as_reward(reward) for reward in rewards]
        self.prompts = prompt_sets.get(prompts) if prompts else []
        self.model, self.every, self.evaluator = model, every, None
        if bool(model) != bool(self.prompts) or (self.held_out and not model):
            example = "TrainingMonitor(folder, model, held_out=…, prompts=[…])"
            raise ValueError(f"clips need the model and prompts: {example}")
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        if model:
            keep = SEEDS * len(self.prompts)
            options: dict[str, Any] = {"seeds_per_prompt": SEEDS, "seed": seed, "keep": keep}
            self.evaluator = Evaluator(model, self.held_out, sampling, **options)
            self.evaluator.judged = True  # training goes on in any case
        else:
            self.hint = "Follows the run in this folder until it ends."
        self.rows: list[dict] = []
        self.shown = ""  # the status that the panel shows
        self._trained_here = 0  # the last step of a run that is trained by this kernel
        self._clips: Video | None = None  # of the current step
        self._drawn = 0.0
        step = SelectionSlider(options=[NONE], description="clips of step", **LINE)
        super().__init__(model, "step", step=step)
        self.stop_button = self.button("stop and keep", "stop", 150, self.stop)
        self.watch([self.state, row(self.stop_button, self.why)])

    @property
    def hooks(self) -> dict:
        """Arguments for `align`: align(…, output_dir=monitor.folder, **monitor.hooks)."""
        validation = {"validate": self.validate, "validation_steps": self.every}
        return {"callback": self.follow_step} | (validation if self.model else {})

    def follow_step(self, metrics: dict) -> None:
        """The callback of `align`: saves the clips of this step, and redraws if it is time to.

        Errors are shown in the panel; the run goes on.
        """
        self._trained_here = metrics["step"]
        try:
            if self._clips is not None:
                self._save_clips(self._clips, metrics["step"])
            now = time.monotonic()
            if now - self._drawn >= 1 / REDRAWS or metrics["step"] >= self._total_steps():
                self.refresh()
                self._drawn = time.monotonic()
        except Exception as error:
            self.failed(error)
        finally:
            self._clips = None

    def validate(self, adapter: Adapter) -> dict[str, float]:
        """The validation of `align`: samples the prompts at fixed seeds and scores the clips.

        Returns:
            The mean of each held-out reward, of which the first decides which checkpoint is best;
            "diversity" and "motion" as `evaluate` measures them, as far as clips have frames for it.
        """
        assert self.model and self.evaluator  # else `hooks` have no validation
        self.evaluator.failed.clear()
        scores, frames = self.evaluator.run(adapter, self.prompts)
        self._clips = by_seed(frames, self.model)
        unknown = {reward.name: math.nan for reward in self.held_out}  # if its judge is away
        names = [name for name in (*unknown, *DESCRIPTIONS) if name in scores]
        return unknown | {name: scores[name].mean().item() for name in names}

    def _save_clips(self, clips: Video, step: int) -> None:
        """Save one picture, a column per prompt; a resumed run replaces those of later steps."""
        folder = self.folder / "watched"
        folder.mkdir(parents=True, exist_ok=True)
        texts = json.dumps([str(prompt) for prompt in self.prompts])
        checkpoints.write_text(folder / "prompts.json", texts)
        for later, path in watched(self.folder).items():
            if later > step:
                path.unlink()
        clips.save(folder / ".part.webp").replace(folder / f"step-{step:06d}.webp")

    def _step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    def _total_steps(self) -> int:
        path = self.folder / "config.json"
        return json.loads(path.read_text(encoding="utf-8"))["steps"] if path.exists() else 0

    def _last_written(self) -> float:
        return (self.folder / "metrics.jsonl").stat().st_mtime

    @property
    def status(self) -> str:
        """waiting, running, stopping, silent (killed, or at a long step), stopped or finished."""
        if not self.rows:
            return "waiting"
        if self._step() >= self._total_steps():
            return "finished"
        if ended(self.folder):
            return "stopped"
        if time.time() - self._last_written() > SILENT:
            return "silent"
        return "stopping" if (self.folder / checkpoints.STOP).exists() else "running"

    def refresh(self) -> None:
        """Read the folder again and show it."""
        self.rows = checkpoints.read_metrics(self.folder)
        self.shown = self.status  # read once: another process may change it meanwhile
        active = self.shown in ("running", "stopping")
        self.busy(self._step() / self._total_steps() if active else None)
        saved = [str(step) for step in watched(self.folder)] or [NONE]
        news = list(self.step.options) != saved
        if news:
            at_newest = self.step.index == len(self.step.options) - 1
            with self.quiet():
                offer(self.step, saved, saved[-1], follow=at_newest)
        self.draw()
        if news:
            self.show_clips()
        here = active and self._step() == self._trained_here
        reason = NO_STOP.get(self.shown, HERE if here else "")
        disable(reason, self.stop_button, remark=self.why)

    def _state(self, named: bool = False) -> str:
        place = self.folder.name if named else self.folder
        if self.shown == "waiting":
            start = code(START) if self.model else ""
            return f"<div><b>waiting</b> for the first step of {escape(str(place))}</div>{start}"
        lines = [f"step {self._step()} of {self._total_steps()} · {place}"]
        if best := best_step(self.rows):
            lines[0] += f" · best held-out at step {best}"
        if self.shown == "silent":
            silence = round(time.time() - self._last_written())
            lines.append(f"no step for {silence} s: the run was killed, or a step takes long")
        kept = [*adapters(self.folder, self._step()).values()]
        if kept and self.shown in ("stopped", "finished", "silent"):
            more = "" if self.shown == "finished" else "; continue with align(…, resume=True)"
            lines.append(f"kept: {Path(place) / kept[-1].relative_to(self.folder)}{more}")
        return f"<div><b>{self.shown}</b> · {'<br>'.join(map(escape, lines))}</div>"

    def _charts(self) -> dict[str, str]:
        look = {"x_label": "step", "x_range": (0, self._step() or 1), "width": 230, "height": 104}
        drawings = {}
        for key, title in run_titles(self.rows).items() if self.rows else ():
            curve = Series([(r["step"], r[key]) for r in self.rows if key in r])
            drawings[title] = chart([curve], label=title, **look)
        return drawings

    def show_clips(self) -> None:
        if self.step.value != NONE:
            path = watched(self.folder)[int(self.step.value)]
            self.play_file(path, f"step {self.step.value}")

    def stop(self) -> None:
        """Ask the run, in any process, to end after its current step; it keeps its adapter."""
        if self.status not in ("running", "silent"):
            raise ValueError(f"the run in {self.folder} is {self.status}: there is nothing to stop")
        checkpoints.request_stop(self.folder)
        self.refresh()

    @property
    def over(self) -> bool:
        return self.shown in ("finished", "stopped")
