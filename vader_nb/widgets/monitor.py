"""Watching a run: its curves and clips while it trains, and stopping it without losing anything.

monitor = TrainingMonitor("runs/mine", model, held_out=hps, prompts=texts[:4])
align(model, reward, training, output_dir=monitor.folder, **monitor.hooks)   in another cell
TrainingMonitor("runs/mine")              later, or elsewhere: the same, from the run's folder
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch
from ipywidgets import HTML, SelectionSlider
from PIL import Image, ImageSequence

from .. import checkpoints
from .. import prompts as prompt_sets
from ..drawing import Series, chart, code, image, note
from ..evaluation import motion, thumbnails
from ..lora import Adapter
from ..models import VideoModel
from ..prompts import Prompt
from ..rewards import Reward, as_reward
from ..sampling import Sampling, sample
from ..trainer import Run, best_step
from ..video import Video, grid
from .controls import LINE, beside, column, disable, row
from .jobs import running
from .panel import Panel
from .player import Player, pictures

REDRAWS = 4  # per second while a cell trains: some pages cannot take more
POLL = 1.0  # seconds between two looks at a folder
SILENT = 120  # seconds without a step after which a run may be dead
START = "run = align(model, reward, prompts, output_dir=monitor.folder, **monitor.hooks)"
SEEDS = 2  # clips per prompt; diversity needs two
NONE = "none yet"
DESCRIPTIONS = ("diversity", "motion")  # they describe the clips, and are no rewards
NO_STOP = {  # why there is nothing to stop
    "waiting": "There is nothing to stop yet.",
    "finished": "The run is over.",
    "stopped": "The run is over.",
    "stopping": "It stops after the current step.",
}
HERE = "This kernel trains and does not react to buttons: press ■ in the toolbar. The run is kept."


class TrainingMonitor(Panel):
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
        super().__init__()
        rewards = [held_out] if callable(held_out) else held_out
        self.folder = run.folder if isinstance(run, Run) else Path(run)
        self.held_out = [as_reward(reward) for reward in rewards]
        self.prompts = prompt_sets.get(prompts) if prompts else []
        self.model, self.sampling, self.every, self.seed = model, sampling, every, seed
        if bool(model) != bool(self.prompts) or (self.held_out and not model):
            example = "TrainingMonitor(folder, model, held_out=…, prompts=[…])"
            raise ValueError(f"clips need the model and prompts: {example}")
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        if model is None:
            self.hint = "Follows the run in this folder until it ends."
        self.rows: list[dict] = []
        self.shown = ""  # the status that the panel shows
        self._trained_here = 0  # the last step of a run that is trained by this kernel
        self._clips: Video | None = None  # of the current step
        self._drawn = 0.0
        self._task: asyncio.Task | None = None
        self.state, self.curves, self.caption = HTML(), HTML(), HTML()
        self.stop_button = self.button("stop and keep", "stop", 150, self.stop)
        self.step = SelectionSlider(options=[NONE], description="clips of step", **LINE)
        self.on(self._show_clips, self.step)
        self.player = Player(model.defaults["num_frames"] if model else 1)
        self.clips = column(self.step, self.player.box, self.caption, max_width="480px")
        buttons = row(self.stop_button, self.why)
        pictures = beside(column(self.curves, flex="2 1 300px"), self.clips)
        self.assemble(self.state, buttons, pictures)
        try:
            self.refresh()
        except Exception as error:  # an odd folder: the panel says so, and follows what comes
            self.failed(error)

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

    @torch.no_grad()
    def validate(self, adapter: Adapter) -> dict[str, float]:
        """The validation of `align`: samples the prompts at fixed seeds and scores the clips.

        Returns:
            The mean of each held-out reward, of which the first decides which checkpoint is best;
            "diversity" over seeds, the variance of 8x8 thumbnails in levels of 0 to 255; "motion",
            the mean absolute change of a pixel from frame to frame.
        """
        assert self.model is not None  # `hooks` have a validation only with a model
        prompts = [prompt for prompt in self.prompts for _ in range(SEEDS)]
        texts, scores = [str(prompt) for prompt in prompts], {}
        with torch.random.fork_rng():  # a reward that draws must not change what training draws
            options = {"seeds": self.seed, "adapter": adapter, "sampling": self.sampling}
            frames = sample(self.model, prompts, **options).float()
            for reward in self.held_out:
                reward.to(self.model.device)
                scores[reward.name] = reward(frames, texts).mean().item()
        features = thumbnails(frames).unflatten(0, (-1, SEEDS))
        scores["diversity"] = features.var(dim=1).mean().item()
        scores["motion"] = motion(frames).mean().item()
        by_seed = frames.unflatten(0, (-1, SEEDS)).transpose(0, 1).flatten(0, 1)
        self._clips = Video(grid(by_seed, len(self.prompts)), self.model.defaults["fps"])
        return scores

    def _saved_clips(self) -> dict[int, Path]:
        """The pictures of clips in the run's folder by step."""
        paths = sorted((self.folder / "watched").glob("step-*.webp"))
        return {int(path.stem.removeprefix("step-")): path for path in paths}

    def _save_clips(self, clips: Video, step: int) -> None:
        """Save one picture, a column per prompt; a resumed run replaces those of later steps."""
        folder = self.folder / "watched"
        folder.mkdir(parents=True, exist_ok=True)
        texts = json.dumps([str(prompt) for prompt in self.prompts])
        checkpoints.write_text(folder / "prompts.json", texts)
        for later, path in self._saved_clips().items():
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
        adapter = self.folder / "adapter.safetensors"
        if adapter.exists() and adapter.stat().st_mtime >= self._last_written():
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
        self.state.value = self._state(self.folder)
        self.curves.value = flow(self._charts().values())
        saved = [str(step) for step in self._saved_clips()] or [NONE]
        self.clips.layout.display = "none" if saved == [NONE] else "flex"
        if list(self.step.options) != saved:
            at_newest = self.step.index == len(self.step.options) - 1
            chosen = saved[-1] if at_newest or self.step.value not in saved else self.step.value
            with self.quiet():
                self.step.options = saved
                self.step.value = chosen
            self._show_clips()
        here = active and self._step() == self._trained_here
        reason = NO_STOP.get(self.shown, HERE if here else "")
        disable(reason, self.stop_button, remark=self.why)

    def _state(self, place: Path | str) -> str:
        """The state of the run in words; `place` is how its folder is named."""
        if self.shown == "waiting":
            start = code(START) if self.model else ""
            return f"<div><b>waiting</b> for the first step of {escape(str(place))}</div>{start}"
        lines = [f"step {self._step()} of {self._total_steps()} · {place}"]
        if best := best_step(self.rows):
            lines[0] += f" · best held-out at step {best}"
        if self.shown == "silent":
            silence = round(time.time() - self._last_written())
            lines.append(f"no step for {silence} s: it was killed, or a step takes long")
        names = [
            f"checkpoints/{path.name}"
            for path in checkpoints.list_checkpoints(self.folder).values()
        ]
        if self.shown != "silent" and (self.folder / "adapter.safetensors").exists():
            names.append("adapter.safetensors")
        if names and self.shown in ("stopped", "finished", "silent"):
            more = "" if self.shown == "finished" else "; continue with align(…, resume=True)"
            lines.append(f"kept: {Path(place) / names[-1]}{more}")
        return f"<div><b>{self.shown}</b> · {'<br>'.join(map(escape, lines))}</div>"

    def _charts(self) -> dict[str, str]:
        """The curves by their titles."""
        if not self.rows:
            return {}
        titles = {"reward": "reward, trained on"}
        for key in (key for r in self.rows for key in r if key.startswith("validation/")):
            name = key.removeprefix("validation/")
            titles[key] = name if name in DESCRIPTIONS else f"{name}, held out"
        titles["grad_norm"] = "gradient norm"
        look = {"x_label": "step", "x_range": (0, self._step() or 1), "width": 230, "height": 104}
        drawings = {}
        for key, title in titles.items():
            curve = Series([(r["step"], r[key]) for r in self.rows if key in r])
            drawings[title] = chart([curve], label=title, **look)
        return drawings

    def _show_clips(self) -> None:
        if self.step.value == NONE:
            return
        path = self._saved_clips()[int(self.step.value)]
        prompts = json.loads((path.parent / "prompts.json").read_text(encoding="utf-8"))
        alt = f"clips of step {self.step.value}: {', '.join(prompts)}"
        self.player.show(pictures(load_clip(path), alt))
        self.caption.value = note(f"from left to right, {SEEDS} seeds each: {' · '.join(prompts)}")

    def to_html(self) -> str:
        curves = flow(image(drawing, title) for title, drawing in self._charts().items())
        clips = self.player.pages.children[0].value if self.step.value != NONE else ""
        clips = f"<div style='max-width:420px'>{clips}</div>{self.caption.value}"
        return f"{self._state(self.folder.name)}{curves}{clips}"

    def stop(self) -> None:
        """Ask the run, in any process, to end after its current step; it keeps its adapter."""
        if self.status not in ("running", "silent"):
            raise ValueError(f"the run in {self.folder} is {self.status}: there is nothing to stop")
        checkpoints.request_stop(self.folder)
        self.refresh()

    def prepare(self) -> None:
        """Refresh, and in a notebook keep watching the folder until the run ends."""
        self.refresh()
        if running() and (self._task is None or self._task.done()):
            self._task = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while self.shown not in ("finished", "stopped"):
            await asyncio.sleep(POLL)
            try:
                self.refresh()
            except Exception as error:  # nobody awaits this task, so the panel shows it
                self.failed(error)

    def close(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
        self.box.close()


def flow(drawings: Iterable[str]) -> str:
    """As many drawings beside each other as there is room for."""
    style = "display:grid;grid-template-columns:repeat(auto-fit, minmax(210px, 1fr));gap:8px"
    return f"<div style='{style}'>{''.join(drawings)}</div>"


def load_clip(path: Path) -> Video:
    """A clip that `Video.save` wrote as webp."""
    with Image.open(path) as picture:
        frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)]
        duration = picture.info.get("duration") or 1000  # a clip of one frame has none
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    return Video(pixels / 255, fps=round(1000 / duration))
