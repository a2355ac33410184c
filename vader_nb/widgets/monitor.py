"""Watching a run: its curves and its clips while it trains, and stopping it without losing anything.

    monitor = TrainingMonitor("runs/mine", model, held_out=hps, prompts=texts[:4])
    monitor                                                  in a cell of its own
    align(model, reward, training, output_dir=monitor.folder, **monitor.hooks)
    TrainingMonitor("runs/mine")                             later, or in another notebook: the same run again

Everything that is shown lies in the run's folder, so a restarted kernel, or another one, shows the same. While a cell
trains, its kernel hears no button: there the toolbar's ■ stops the run, and the button serves everyone else who watches.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from ipywidgets import HTML, Button, HBox, Layout, SelectionSlider, VBox
from PIL import Image, ImageSequence

from .. import checkpoints
from ..align import Run, best_step
from ..evaluate import motion, thumbnails
from ..gradient import Sampling, sample
from ..lora import Adapter
from ..models import VideoModel
from ..rewards import Reward, as_reward
from ..video import Video, grid
from . import diagram
from .drawing import chart
from .jobs import running
from .panel import LABEL, ROW, SIDE, WIDE, Panel, disable, escape
from .player import Player, moving, still

PER_SECOND = 4  # redraws while a cell trains: more would cost time, and some pages choke on them
POLL = 1.0  # seconds between two looks at a folder that another process writes to
SILENT = 120  # seconds without a step after which one does not know whether a run still lives
SEEDS = 2  # clips a prompt, which diversity needs
WATCHED = "watched"  # the folder of the clips inside the run's
NONE = "none yet"
DESCRIPTIONS = ("diversity", "motion")  # of the clips; no reward


class TrainingMonitor(Panel):
    """The curves, the clips at fixed seeds and the state of a run.

    run: its folder, which need not exist yet, or the `Run` that align returned. model, held_out, prompts: to have clips of
    the prompts made at fixed seeds every `every` steps, judged by rewards that the run is not trained on, with the
    clips' motion and their diversity over seeds; without them the monitor shows what the folder holds.
    Raises ValueError for a held-out reward or prompts without the model.
    """

    title = "Training monitor"
    hint = "Start the run in a cell with **monitor.hooks: curves and clips follow it here."

    def __init__(
        self,
        run: Run | str | Path,
        model: VideoModel | None = None,
        held_out: Reward | Callable | Sequence[Reward | Callable] = (),
        prompts: Sequence[str] = (),
        *,
        sampling: Sampling | None = None,
        every: int = 5,
        seed: int = 10_000,
    ):
        super().__init__()
        self.folder = run.folder if isinstance(run, Run) else Path(run)
        self.held_out = [
            as_reward(r) for r in (held_out if isinstance(held_out, (list, tuple)) else [held_out])
        ]
        if model is None:
            self.hint = "Follows the run in this folder, whoever trains it, until it ends."
        self.model, self.prompts, self.sampling, self.every, self.seed = (
            model,
            list(prompts),
            sampling,
            every,
            seed,
        )
        if (model is None) != (not self.prompts) or (self.held_out and model is None):
            raise ValueError(
                "clips need the model and prompts: TrainingMonitor(folder, model, held_out=…, prompts=[…])"
            )
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.rows: list[dict] = []
        self.told = 0  # the step that a cell of this kernel told of last
        self._made: torch.Tensor | None = None  # clips of the step that is not told yet
        self.shown = ""  # the status that the panel tells
        self._drawn, self._task = 0.0, None
        self._controls()
        self.refresh()

    def _controls(self) -> None:
        self.state, self.curves, self.why = HTML(), HTML(), HTML()
        self.stop_button = Button(
            description="stop and keep", icon="stop", layout=Layout(width="150px")
        )
        self.refresh_button = Button(
            description="refresh", icon="refresh", layout=Layout(width="100px")
        )
        self.step = SelectionSlider(
            options=[NONE], description="clips of step", style=LABEL, layout=WIDE
        )
        self.player = Player(self.model.defaults["num_frames"] if self.model else 1)
        self.caption = HTML()
        self.on(self.stop, self.stop_button)
        self.on(self.refresh, self.refresh_button)
        self.on(self._show_clips, self.step)
        clips = VBox(
            [self.step, self.player.box, self.caption],
            layout=Layout(flex="1 1 300px", max_width="480px", min_width="0"),
        )
        curves = VBox(
            [self.curves], layout=Layout(flex="2 1 300px", max_width="560px", min_width="0")
        )
        self.assemble(
            self.state,
            HBox([self.stop_button, self.refresh_button, self.why], layout=ROW),
            HBox([curves, clips], layout=SIDE),
        )
        self.progress.description = "steps"

    # ------------------------------------------------------------------------------ while a cell of this kernel trains

    @property
    def hooks(self) -> dict:
        """What `align` needs to be told: align(…, output_dir=monitor.folder, **monitor.hooks)."""
        if self.model is None:
            return {"callback": self.follow_step}
        return {
            "callback": self.follow_step,
            "validate": self.validate,
            "validation_steps": self.every,
        }

    def follow_step(self, row: dict) -> None:
        """align's callback: keep the clips of this step, and redraw, at most `PER_SECOND` times a second. What goes wrong
        here is shown, and the run goes on."""
        self.told = row["step"]
        try:
            if self._made is not None:
                self._keep(row["step"])
            now = time.monotonic()
            if now - self._drawn >= 1 / PER_SECOND or row["step"] >= self._asked_steps():
                self.refresh()
                self._drawn = time.monotonic()
        except Exception as error:  # of watching, which must not cost anyone the run
            self.failed(error)
        finally:
            self._made = None

    @torch.no_grad()
    def validate(self, adapter: Adapter) -> dict[str, float]:
        """align's validation: clips of the prompts at fixed seeds, kept in the folder with the step. Returns the held-out rewards'
        means, the first of which decides which checkpoint is best, and the clips' motion and diversity."""
        texts = [prompt for prompt in self.prompts for _ in range(SEEDS)]
        with torch.random.fork_rng():  # a reward that draws must not change what training draws
            frames = sample(
                self.model,
                texts,
                seeds=[self.seed + i for i in range(len(texts))],
                sampling=self.sampling,
            ).float()
            scores = {}
            for reward in self.held_out:
                reward.to(self.model.device)
                scores[reward.name] = reward(frames, texts).mean().item()
        features = thumbnails(frames).unflatten(0, (-1, SEEDS))
        scores["diversity"] = features.var(dim=1).mean().item()
        scores["motion"] = motion(frames).mean().item()
        self._made = frames
        return scores

    def _keep(self, step: int) -> None:
        """The clips, prompts from left to right and seeds below each other, as one picture; and none of later steps, which
        a run left when it went back to a checkpoint."""
        columns = self._made.unflatten(0, (-1, SEEDS)).transpose(0, 1).flatten(0, 1)
        folder = self.folder / WATCHED
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.write(folder / "prompts.json", json.dumps(self.prompts))
        for later in (other for other in self._recorded() if other > step):
            (folder / f"step-{later:06d}.webp").unlink()
        unfinished = folder / ".part.webp"
        Video(grid(columns, len(self.prompts)), self.model.defaults["fps"]).save(unfinished)
        unfinished.replace(folder / f"step-{step:06d}.webp")

    # ---------------------------------------------------------------------------------------------- what the folder says

    def _read(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # the last line, while it is being written
                break
        return rows

    def _asked_steps(self) -> int:
        path = self.folder / "config.json"
        return json.loads(path.read_text(encoding="utf-8"))["steps"] if path.exists() else 0

    def _recorded(self) -> list[int]:
        return sorted(int(path.stem[5:]) for path in (self.folder / WATCHED).glob("step-*.webp"))

    @property
    def status(self) -> str:
        """waiting, running, stopping, silent (killed, or at a long step), stopped or finished."""
        if not self.rows:
            return "waiting"
        if self.rows[-1]["step"] >= self._asked_steps():
            return "finished"
        if (self.folder / "adapter.safetensors").exists() and self._newer(
            "adapter.safetensors", "metrics.jsonl"
        ):
            return "stopped"
        if self._silent() > SILENT:
            return "silent"
        return "stopping" if (self.folder / checkpoints.STOP).exists() else "running"

    def _newer(self, first: str, second: str) -> bool:
        return (self.folder / first).stat().st_mtime >= (self.folder / second).stat().st_mtime

    def _silent(self) -> float:
        return time.time() - (self.folder / "metrics.jsonl").stat().st_mtime

    # ------------------------------------------------------------------------------------------------------ showing

    def refresh(self) -> None:
        """Read the folder again, and show it."""
        self.rows = self._read()
        self.shown = (
            self.status
        )  # once, for all that is told: another process may change it meanwhile
        steps, asked = (self.rows[-1]["step"] if self.rows else 0), self._asked_steps()
        self.busy(steps / asked if asked and self.shown in ("running", "stopping") else None)
        self.state.value = f"<div>{self._state(self.folder)}</div>"
        self.curves.value = arranged(self._charts().values())
        recorded = [str(step) for step in self._recorded()] or [NONE]
        if list(self.step.options) != recorded:
            newest = self.step.index == len(self.step.options) - 1
            kept = None if newest else self.step.value
            self.step.options = recorded
            self.step.value = kept if kept in recorded else recorded[-1]
            self._show_clips()
        self._explain()

    def _state(self, place: Path | str) -> str:
        """Where the run stands, told with its folder's `place`."""
        steps, asked = (self.rows[-1]["step"] if self.rows else 0), self._asked_steps()
        name, status = escape(str(place)), self.shown
        if status == "waiting":
            return f"<b>waiting</b> for the first step of {name}"
        text = f"<b>{status}</b> · step {steps} of {asked} · {name}"
        best = best_step(self.rows)
        if best:
            text += f" · best held-out at step {best}"
        if status == "silent":
            text += (
                f"<br>no step for {self._silent():.0f} seconds: it was killed, or a step takes long"
            )
        kept = self._kept()
        if status in ("stopped", "finished", "silent") and kept:
            text += f"<br>kept: {escape(str(Path(place) / kept))}"
        if status in ("stopped", "silent") and kept:
            text += "; go on with <code>align(…, resume=True)</code>"
        return text

    def _kept(self) -> str:
        """What there is to load, inside the folder."""
        if self.shown != "silent" and (self.folder / "adapter.safetensors").exists():
            return "adapter.safetensors"
        return max(
            (f"checkpoints/{path.name}" for path in checkpoints.steps_of(self.folder).values()),
            default="",
        )

    def _charts(self) -> dict[str, str]:
        """The curves by what they tell."""
        measured = dict.fromkeys(
            key for row in self.rows for key in row if key.startswith("validation/")
        )
        titles = {"reward": "reward, trained on"}
        for key in measured:
            name = key.removeprefix("validation/")
            titles[key] = name if name in DESCRIPTIONS else f"{name}, held out"
        titles["grad_norm"] = "gradient norm"
        across = (0, self.rows[-1]["step"]) if self.rows else (0, 1)
        return {
            title: chart(
                title, [(row["step"], row[key]) for row in self.rows if key in row], across
            )
            for key, title in titles.items()
        }

    def _show_clips(self) -> None:
        if self.step.value == NONE:
            return
        path = self.folder / WATCHED / f"step-{int(self.step.value):06d}.webp"
        prompts = json.loads((self.folder / WATCHED / "prompts.json").read_text(encoding="utf-8"))
        video, alt = opened(path), f"clips of step {self.step.value}: {', '.join(prompts)}"
        self.player.show(
            moving(video, alt), [still(video, i, alt) for i in range(len(video.frames))]
        )
        listed = " · ".join(escape(prompt) for prompt in prompts)
        self.caption.value = (
            f"<div class=vader-note>from left to right, {SEEDS} seeds each: {listed}</div>"
        )

    def _explain(self) -> None:
        here = (
            bool(self.rows) and self.rows[-1]["step"] == self.told
        )  # else another process went on
        reason = {
            "waiting": "There is nothing to stop yet.",
            "finished": "The run is over.",
            "stopped": "The run is over.",
            "stopping": "It stops after the step that it is at.",
            "running": "This kernel trains and hears no button: press ■ in the toolbar. The run is kept."
            if here
            else "",
            "silent": "",
        }[self.shown]
        disable(reason, self.stop_button, remark=self.why)

    # ------------------------------------------------------------------------------------------------------ stopping

    def stop(self) -> None:
        """Ask the run to end after its step, wherever it is trained; it keeps its adapter and a checkpoint."""
        if self.status not in ("running", "silent"):
            raise ValueError(f"the run in {self.folder} is {self.status}: there is nothing to stop")
        checkpoints.ask_to_stop(self.folder)
        self.refresh()

    # ------------------------------------------------------------------------------------------ runs of other processes

    def prepare(self) -> None:
        """Shown in a notebook, the panel keeps an eye on the folder as long as the run goes on."""
        self.refresh()
        if running() and (self._task is None or self._task.done()):
            self._task = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while self.shown not in ("finished", "stopped"):
            await asyncio.sleep(POLL)
            try:
                self.refresh()
            except Exception as error:  # nobody awaits this task; the panel shows it
                self.failed(error)

    def close(self) -> None:
        """Watch no longer."""
        if self._task is not None:
            self._task.cancel()
        self.box.close()

    def to_html(self) -> str:
        curves = (
            [diagram.image(drawing, title) for title, drawing in self._charts().items()]
            if self.rows
            else []
        )
        clips = self.player.pages.children[0].value if self.step.value != NONE else ""
        return (
            f"<div>{self._state(self.folder.name)}</div>{arranged(curves)}"
            f"<div style='max-width:420px'>{clips}</div>{self.caption.value}"
        )


def arranged(drawings: Iterable[str]) -> str:
    """As many beside each other as there is room for."""
    columns = "repeat(auto-fit, minmax(210px, 1fr))"
    return f"<div style='display:grid;grid-template-columns:{columns};gap:8px'>{''.join(drawings)}</div>"


def opened(path: Path) -> Video:
    """A clip from a file that `Video.save` wrote as webp."""
    with Image.open(path) as image:
        frames = [
            torch.from_numpy(np.array(frame.convert("RGB")))
            for frame in ImageSequence.Iterator(image)
        ]
        rate = round(1000 / (image.info.get("duration") or 1000))  # a clip of one frame has none
        return Video(torch.stack(frames).permute(0, 3, 1, 2) / 255, fps=rate)
