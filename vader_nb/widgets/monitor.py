"""Watching a run: its curves and clips while it trains, and stopping it without losing anything.

    monitor = TrainingMonitor("runs/mine", model, held_out=hps, prompts=texts[:4])
    monitor                                                  in a cell of its own
    align(model, reward, training, output_dir=monitor.folder, **monitor.hooks)
    TrainingMonitor("runs/mine")                             later, or elsewhere: the same run

The panel shows what is in the run's folder, so it shows the same after a restart of the kernel and
in another notebook. A kernel that trains in a cell does not react to buttons: there, ■ in the
toolbar stops the run.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from ipywidgets import HTML, SelectionSlider
from PIL import Image, ImageSequence

from .. import checkpoints
from .. import prompts as prompt_sets
from ..evaluation import motion, thumbnails
from ..lora import Adapter
from ..models import VideoModel
from ..prompts import Prompt
from ..rewards import Reward, as_reward
from ..sampling import Sampling, sample
from ..trainer import Run, best_step
from ..video import Video, grid
from .controls import beside, button, column, row, template
from .drawing import Series, chart, image
from .jobs import running
from .panel import LABEL, WIDE, Panel, disable, note
from .player import Player, moving, still

REDRAWS = 4  # per second while a cell trains: some pages cannot take more
POLL = 1.0  # seconds between two looks at a folder
SILENT = 120  # seconds without a step after which a run may be dead
SEEDS = 2  # clips per prompt; diversity needs two
CLIPS = "watched"  # the folder of the clips in the run's folder
NONE = "none yet"
DESCRIPTIONS = ("diversity", "motion")  # they describe the clips, and are no rewards
NO_STOP = {  # why there is nothing to stop
    "waiting": "There is nothing to stop yet.",
    "finished": "The run is over.",
    "stopped": "The run is over.",
    "stopping": "It stops after the current step.",
}
HERE = "This kernel trains and does not react to buttons: press ■ in the toolbar. The run is kept."
STATE = """
{% if status == "waiting" %}
<div><b>waiting</b> for the first step of {{ place }}</div>
{% else %}
<div><b>{{ status }}</b> · step {{ step }} of {{ steps }} · {{ place }}
{% if best %} · best held-out at step {{ best }}{% endif %}
{% if silence %}<br>no step for {{ silence }} s: it was killed, or a step takes long{% endif %}
{% if kept %}<br>kept: {{ kept }}{% endif %}
{% if resumable %}; continue with <code>align(…, resume=True)</code>{% endif %}
</div>
{% endif %}
"""


class TrainingMonitor(Panel):
    """The curves, the clips at fixed seeds and the state of a run.

    Args:
        run: folder of the run, which need not exist yet, or the `Run` that `align` returned.
        model: makes the clips; without it the monitor shows what is in the folder.
        held_out: rewards that the run is not trained on, which score the clips.
        prompts: prompts of the clips, as for `align`.
        sampling: settings of the clips; by default those of the model.
        every: optimizer steps between two sets of clips.
        seed: the first seed of the clips.

    Raises:
        ValueError: a held-out reward or prompts without the model, or the model without prompts.
    """

    title = "Training monitor"
    hint = "Start the run in a cell with **monitor.hooks: curves and clips follow it here."

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
        rewards = held_out if isinstance(held_out, (list, tuple)) else [held_out]
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
        self._clips: torch.Tensor | None = None  # of the current step
        self._drawn, self._task = 0.0, None
        self._build()
        self.refresh()

    def _build(self) -> None:
        self.state, self.curves, self.why, self.caption = HTML(), HTML(), HTML(), HTML()
        self.stop_button = button("stop and keep", "stop", 150)
        self.refresh_button = button("refresh", "refresh", 100)
        self.step = SelectionSlider(
            options=[NONE], description="clips of step", style=LABEL, layout=WIDE
        )
        self.player = Player(self.model.defaults["num_frames"] if self.model else 1)
        self.on(self.stop, self.stop_button)
        self.on(self.refresh, self.refresh_button)
        self.on(self._show_clips, self.step)
        clips = column(self.step, self.player.box, self.caption, max_width="480px")
        buttons = row(self.stop_button, self.refresh_button, self.why)
        self.assemble(self.state, buttons, beside(column(self.curves, flex="2 1 300px"), clips))
        self.progress.description = "steps"

    # ----------------------------------------------------------- while a cell of this kernel trains

    @property
    def hooks(self) -> dict:
        """Arguments for `align`: align(…, output_dir=monitor.folder, **monitor.hooks)."""
        if self.model is None:
            return {"callback": self.follow_step}
        validation = {"validate": self.validate, "validation_steps": self.every}
        return {"callback": self.follow_step, **validation}

    def follow_step(self, metrics: dict) -> None:
        """The callback of `align`: saves the clips of this step, and redraws if it is time to.

        Errors are shown in the panel; the run goes on.
        """
        self._trained_here = metrics["step"]
        try:
            if self._clips is not None:
                self._save_clips(metrics["step"])
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
        prompts = [prompt for prompt in self.prompts for _ in range(SEEDS)]
        texts, seeds = [str(p) for p in prompts], [self.seed + i for i in range(len(prompts))]
        with torch.random.fork_rng():  # a reward that draws must not change what training draws
            options = {"seeds": seeds, "adapter": adapter, "sampling": self.sampling}
            frames, scores = sample(self.model, prompts, **options).float(), {}
            for reward in self.held_out:
                reward.to(self.model.device)
                scores[reward.name] = reward(frames, texts).mean().item()
        features = thumbnails(frames).unflatten(0, (-1, SEEDS))
        scores["diversity"] = features.var(dim=1).mean().item()
        scores["motion"] = motion(frames).mean().item()
        self._clips = frames
        return scores

    def _save_clips(self, step: int) -> None:
        """Save one picture, a column per prompt; a resumed run replaces those of later steps."""
        folder = self.folder / CLIPS
        folder.mkdir(parents=True, exist_ok=True)
        texts = json.dumps([str(prompt) for prompt in self.prompts])
        checkpoints.write_text(folder / "prompts.json", texts)
        for later in (other for other in self._saved_steps() if other > step):
            self._clip_path(later).unlink()
        by_seed = self._clips.unflatten(0, (-1, SEEDS)).transpose(0, 1).flatten(0, 1)
        unfinished = folder / ".part.webp"
        Video(grid(by_seed, len(self.prompts)), self.model.defaults["fps"]).save(unfinished)
        unfinished.replace(self._clip_path(step))

    # --------------------------------------------------------------------- what is in the folder

    def _clip_path(self, step: int) -> Path:
        return self.folder / CLIPS / f"step-{step:06d}.webp"

    def _saved_steps(self) -> list[int]:
        return sorted(int(path.stem[5:]) for path in (self.folder / CLIPS).glob("step-*.webp"))

    def _total_steps(self) -> int:
        path = self.folder / "config.json"
        return json.loads(path.read_text(encoding="utf-8"))["steps"] if path.exists() else 0

    @property
    def status(self) -> str:
        """waiting, running, stopping, silent (killed, or at a long step), stopped or finished."""
        if not self.rows:
            return "waiting"
        if self.rows[-1]["step"] >= self._total_steps():
            return "finished"
        adapter = self.folder / "adapter.safetensors"
        if adapter.exists() and adapter.stat().st_mtime >= self._last_written():
            return "stopped"
        if time.time() - self._last_written() > SILENT:
            return "silent"
        return "stopping" if (self.folder / checkpoints.STOP).exists() else "running"

    def _last_written(self) -> float:
        return (self.folder / "metrics.jsonl").stat().st_mtime

    def _kept(self) -> str:
        """What can be loaded: the path within the folder."""
        if self.shown != "silent" and (self.folder / "adapter.safetensors").exists():
            return "adapter.safetensors"
        saved = checkpoints.list_checkpoints(self.folder).values()
        return max((f"checkpoints/{path.name}" for path in saved), default="")

    # ------------------------------------------------------------------------------------ display

    def refresh(self) -> None:
        """Read the folder again and show it."""
        self.rows = checkpoints.read_metrics(self.folder)
        self.shown = self.status  # read once: another process may change it meanwhile
        active = self.shown in ("running", "stopping")
        self.busy(self.rows[-1]["step"] / self._total_steps() if active else None)
        self.state.value = self._state(self.folder)
        self.curves.value = flow(self._charts().values())
        saved = [str(step) for step in self._saved_steps()] or [NONE]
        if list(self.step.options) != saved:
            at_newest = self.step.index == len(self.step.options) - 1
            chosen = saved[-1] if at_newest or self.step.value not in saved else self.step.value
            self.step.options = saved
            self.step.value = chosen
            self._show_clips()
        here = active and self.rows[-1]["step"] == self._trained_here
        reason = NO_STOP.get(self.shown, HERE if here else "")
        disable(reason, self.stop_button, remark=self.why)

    def _state(self, place: Path | str) -> str:
        """The state of the run in words; `place` is how its folder is named."""
        ended = self.shown in ("stopped", "finished", "silent")
        kept = self._kept() if ended else ""
        return template(STATE).render(
            status=self.shown,
            place=str(place),
            step=self.rows[-1]["step"] if self.rows else 0,
            steps=self._total_steps(),
            best=best_step(self.rows),
            silence=round(time.time() - self._last_written()) if self.shown == "silent" else 0,
            kept=str(Path(place) / kept) if kept else "",
            resumable=kept and self.shown != "finished",
        )

    def _charts(self) -> dict[str, str]:
        """The curves by their titles."""
        titles = {"reward": "reward, trained on"}
        for key in (key for r in self.rows for key in r if key.startswith("validation/")):
            name = key.removeprefix("validation/")
            titles[key] = name if name in DESCRIPTIONS else f"{name}, held out"
        titles["grad_norm"] = "gradient norm"
        steps = (0, self.rows[-1]["step"]) if self.rows else (0, 1)
        drawings = {}
        for key, title in titles.items():
            curve = Series([(r["step"], r[key]) for r in self.rows if key in r])
            look = {"x_label": "step", "x_range": steps, "width": 230, "height": 104}
            drawings[title] = chart([curve], label=title, **look)
        return drawings

    def _show_clips(self) -> None:
        if self.step.value == NONE:
            return
        path = self._clip_path(int(self.step.value))
        prompts = json.loads((path.parent / "prompts.json").read_text(encoding="utf-8"))
        video, alt = load_clip(path), f"clips of step {self.step.value}: {', '.join(prompts)}"
        frames = [still(video, i, alt) for i in range(len(video.frames))]
        self.player.show(moving(video, alt), frames)
        self.caption.value = note(f"from left to right, {SEEDS} seeds each: {' · '.join(prompts)}")

    def to_html(self) -> str:
        charts = self._charts() if self.rows else {}
        curves = flow(image(drawing, title) for title, drawing in charts.items())
        clips = self.player.pages.children[0].value if self.step.value != NONE else ""
        clips = f"<div style='max-width:420px'>{clips}</div>{self.caption.value}"
        return f"{self._state(self.folder.name)}{curves}{clips}"

    # ----------------------------------------------------------------- runs of other processes

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
