"""What a shortened reward gradient costs, and where it points: memory, seconds, and the cosine to the exact one.

explorer = TruncationExplorer(model)                   in a notebook
explorer.measure(K=2, frames="all")                    the same from Python: a Measured
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from ipywidgets import HTML, Button, Checkbox, Dropdown, HBox, IntSlider, Layout, VBox

from .. import lora
from ..gradient import Frames, Last, Sampling, reward_gradient
from ..memory import Peak
from ..models import VideoModel
from ..rewards import Reward, as_reward, parse
from . import clips
from .diagram import WIDTH, arrow, box, image, svg, words
from .panel import LABEL, ROW, SIDE, WIDE, Panel, disable, escape

FRAMES = {
    "1 random": Frames("random", 1),
    "ends": Frames("ends"),
    "every 2nd": Frames("nth", 2),
    "all": Frames("all"),
}
ROWS = 12  # settings that are kept in the table
STRENGTH = 0.05  # standard deviation of the adapter's B
EMPTY = "Nothing measured yet: press “measure”."


@dataclass(frozen=True)
class Truncation:
    """What is left of the chain: the last K steps; frames, a name of `FRAMES`; checkpointing, whether the denoiser's
    blocks are computed again in the backward pass; streaming, whether frames are decoded and scored one by one."""

    K: int = 1
    frames: str = "1 random"
    checkpointing: bool = True
    streaming: bool = True


@dataclass(frozen=True)
class Measured:
    """Of one reward_gradient call: the most bytes of tensors that lived at one moment, seconds, the cosine of the
    adapter's gradient to the exact one, and the frames that were scored."""

    bytes: int
    seconds: float
    cosine: float
    frames: tuple[int, ...]


class TruncationExplorer(Panel):
    """The chain adapter -> denoising steps -> decoder -> frames -> reward, and how far back its gradient is followed.

    reward: a Reward or an expression, default "hps". rank: of the adapter, which is made here: a fresh one, with B drawn
    at random by the seed, since where B is zero A has no gradient. The exact gradient is the one through all steps and
    all frames at the same seed. Raises ValueError for a reward, a prompt or a rank that cannot be.
    """

    title = "Truncation explorer"
    hint = "Choose how far back the gradient goes, press “measure”, and compare: what does a shorter way save, and where does it point?"

    def __init__(
        self,
        model: VideoModel,
        reward: Reward | Callable | str | None = None,
        prompt: str | None = None,
        seed: int = 0,
        rank: int = 4,
    ):
        super().__init__()
        self.model, self.seed = model, seed
        self.prompt = clips.examples(model, 1)[0] if prompt is None else prompt
        if not self.prompt.strip():
            raise ValueError("the prompt is empty: say what the clip should show")
        tiny = model.name == "tiny"
        # A chain of 5 steps, so that the exact gradient of the tiny model takes a second or two.
        self.sampling = Sampling(num_inference_steps=5 if tiny else None).filled(model)
        chosen = "hps" if reward is None else reward
        self.reward = parse(chosen, tiny=tiny) if isinstance(chosen, str) else as_reward(chosen)
        self.reward.check_prompts([self.prompt])
        self.reward.to(model.device)
        self.adapter = random_adapter(model, rank, seed)
        self.exact: torch.Tensor | None = (
            None  # the exact gradient, (N,) over all of the adapter's numbers
        )
        self.measured: dict[Truncation, Measured] = {}  # the newest last
        self._filling = False
        self._controls()
        self.drawing, self.table = HTML(), HTML()
        controls = VBox(
            [
                self.K,
                self.frames,
                self.checkpointing,
                self.streaming,
                self.why,
                HBox([self.button], layout=ROW),
                HTML(f"<div class=vader-note>{escape(self.given)}</div>"),
            ],
            layout=Layout(flex="1 1 300px", max_width="400px", min_width="0"),
        )
        drawing = VBox(
            [self.drawing], layout=Layout(flex="2 1 330px", max_width="560px", min_width="0")
        )
        self.assemble(HBox([controls, drawing], layout=SIDE), self.table)
        self._moved()
        self._show()

    def _controls(self) -> None:
        steps, whole = self.sampling.num_inference_steps, not self.reward.per_frame
        self.K = IntSlider(1, min=1, max=steps, description="K, steps", style=LABEL, layout=WIDE)
        self.frames = Dropdown(
            options=list(FRAMES),
            value="all" if whole else "1 random",
            description="frames",
            style=LABEL,
            layout=WIDE,
        )
        self.checkpointing = Checkbox(
            True, description="checkpointing: compute blocks again", indent=False
        )
        self.streaming = Checkbox(
            True, description="streaming: one frame after the other", indent=False
        )
        for switch in (self.checkpointing, self.streaming):
            switch.layout.width = "auto"
        self.button = Button(
            description="measure", icon="play", button_style="primary", layout=Layout(width="110px")
        )
        self.why = HTML()
        self.on(self._moved, self.K, self.frames, self.checkpointing, self.streaming)
        self.on(lambda: self.jobs.submit(self._job), self.button)

    @property
    def given(self) -> str:
        """What stays the same in all measurements."""
        return (
            f"Reward {self.reward.name}, prompt “{self.prompt}”, seed {self.seed}, "
            f"{self.sampling.num_inference_steps} steps; an adapter of rank {self.adapter.rank} with random numbers."
        )

    # ------------------------------------------------------------------------------------------ the setting

    @property
    def setting(self) -> Truncation:
        one = len(self.chosen) == 1  # which is streaming, whatever the switch says
        return Truncation(
            self.K.value, self.frames.value, self.checkpointing.value, one or self.streaming.value
        )

    @property
    def chosen(self) -> list[int]:
        """The frames that are scored; a random one is drawn as `reward_gradient` does, from the seed."""
        return FRAMES[self.frames.value].choose(self.sampling.num_frames, self._generator())

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def set(self, **changes) -> None:
        """Set controls by name, those of `Truncation`. Raises ValueError for a value they cannot have."""
        known = {f.name: getattr(self, f.name) for f in fields(Truncation)}
        self._filling = True
        try:
            for name, value in changes.items():
                if name not in known:
                    raise ValueError(
                        f"unknown setting {name!r}; a truncation has {', '.join(known)}"
                    )
                if name == "K" and not 1 <= value <= self.K.max:
                    raise ValueError(
                        f"K must lie in 1..{self.K.max}, the steps of the chain; got {value}"
                    )
                if name == "frames" and value not in FRAMES:
                    raise ValueError(f"unknown frames {value!r}; choose one of {', '.join(FRAMES)}")
                if name == "frames" and not self.reward.per_frame and value != "all":
                    raise ValueError(
                        f"the reward {self.reward.name} judges the whole clip: frames must be 'all'"
                    )
                known[name].value = value
        finally:
            self._filling = False
            self._moved()

    def _moved(self) -> None:
        if self._filling:
            return
        whole = (
            ""
            if self.reward.per_frame
            else f"“{self.reward.name}” judges the whole clip: it needs all frames."
        )
        one = "With one frame there is nothing to stream." if len(self.chosen) == 1 else ""
        disable(whole, self.frames)
        disable(one, self.streaming)
        self.why.value = (
            f"<div class=vader-note>{escape(whole or one)}</div>" if whole or one else ""
        )
        drawing, alt = self.chain
        self.drawing.value = f"{drawing}<div class=vader-note>{escape(alt)}</div>"

    @property
    def chain(self) -> tuple[str, str]:
        """The drawing of the current setting, and what it shows in words."""
        names = self.reward.name, f"adapter, rank {self.adapter.rank}"
        return chain(
            self.setting,
            self.sampling.num_inference_steps,
            self.sampling.num_frames,
            self.chosen,
            *names,
        )

    # ------------------------------------------------------------------------------------------- measuring

    def measure(self, **changes) -> Measured:
        """Measure now, after setting controls by name, and wait for it."""
        self.set(**changes)
        self.jobs.finish(self._job)
        return self.measured[self.setting]

    def gradient(
        self, setting: Truncation, meter: contextlib.AbstractContextManager | None = None
    ) -> torch.Tensor:
        """The adapter's gradient as one vector (N,) in float64; `meter` surrounds the call. The model is left as it was."""
        parameters = self.adapter.parameters()
        try:
            with lora.wearing(self.model, self.adapter), meter or contextlib.nullcontext():
                reward_gradient(
                    self.model,
                    self.adapter,
                    self.reward,
                    [self.prompt],
                    seeds=[self.seed],
                    strategy=Last(setting.K),
                    frames=FRAMES[setting.frames],
                    sampling=self.sampling,
                    chunk=1 if setting.streaming else self.sampling.num_frames,
                    checkpoint_blocks=setting.checkpointing,
                    generator=self._generator(),
                )
            return torch.cat([p.grad.flatten().double() for p in parameters])
        finally:
            for p in parameters:
                p.grad = None

    def _job(self):
        setting, chosen = self.setting, tuple(self.chosen)
        whole = "one gradient is one piece of work, which cannot be stopped midway"
        if self.exact is None:
            self.say(f"First the exact gradient, through all steps and frames; {whole}.")
            yield 0.05
            self.exact = self.gradient(Truncation(self.K.max, "all"))
        self.say(f"Measuring K = {setting.K}, frames: {setting.frames}. Counting memory; {whole}.")
        yield 0.4
        peak = Peak(self.model.device.type)
        gradient = self.gradient(setting, peak)
        self.say(f"Measuring K = {setting.K}, frames: {setting.frames}. Once more, for the time.")
        yield 0.7  # a time of its own, since counting takes time too
        began = time.perf_counter()
        self.gradient(setting)
        seconds = time.perf_counter() - began
        cosine = torch.cosine_similarity(gradient, self.exact, dim=0).item()
        self.measured.pop(setting, None)
        self.measured[setting] = Measured(peak.bytes, seconds, cosine, chosen)
        for old in list(self.measured)[:-ROWS]:
            del self.measured[old]
        self.say("")
        self._show()

    # --------------------------------------------------------------------------------------------- showing

    def _show(self) -> None:
        self.table.value = self._table()

    def _table(self) -> str:
        """The measured settings, the newest first."""
        if not self.measured:
            return f"<div class=vader-note>{escape(EMPTY)}</div>"
        most = max(result.bytes for result in self.measured.values())
        slowest = max(result.seconds for result in self.measured.values())
        rows = []
        for setting, result in reversed(self.measured.items()):
            switches = ["yes" if on else "no" for on in (setting.checkpointing, setting.streaming)]
            if len(result.frames) == 1:
                switches[1] = "–"
            angle = math.degrees(math.acos(max(-1.0, min(1.0, result.cosine))))
            cells = [
                cell(str(setting.K)),
                cell(setting.frames),
                cell(f"{result.bytes / 1e6:.1f} MB", result.bytes / most),
                cell(f"{result.seconds:.2f} s", result.seconds / slowest),
                cell(f"{result.cosine:.3f} ({angle:.0f}°)", result.cosine),
                *map(cell, switches),
            ]
            rows.append(f"<tr>{''.join(cells)}</tr>")
        # What a phone shows without scrolling comes first.
        heads = ("K", "frames", "memory", "time", "cosine", "checkpointing", "streaming")
        head = "".join(f"<th>{name}</th>" for name in heads)
        note = (
            "Memory: all tensors that one gradient makes, at the worst moment; weights are not among them. Cosine to the "
            "exact gradient, through all steps and frames: 1 is its own direction (0°), 0 a right angle, below 0 the wrong way."
        )
        return (
            f"<div class=vader-scroll><table class=vader-measured style='white-space:nowrap'><tr>{head}</tr>{''.join(rows)}</table></div>"
            f"<div class=vader-note>{note}</div>"
        )

    def to_html(self) -> str:
        drawing, alt = self.chain
        return f"<div>{image(drawing, alt)}<p>{escape(alt)} {escape(self.given)}</p>{self._table()}</div>"


def random_adapter(model: VideoModel, rank: int, seed: int) -> lora.Adapter:
    """A fresh adapter, off the model, whose B is random: with B = 0 no gradient would reach A."""
    with lora.bare(model):
        adapter = lora.add(model, rank, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in adapter.state_dict().items():
            if ".lora_B." in name:
                value.copy_(torch.randn(value.shape, generator=generator) * STRENGTH)
    return adapter


def cell(text: str, share: float | None = None) -> str:
    """A table cell; with a share, the text over a bar of this part of its width."""
    if share is None:
        return f"<td>{escape(text)}</td>"
    percent = 100 * max(0.0, min(1.0, share))
    return f'<td style="background:linear-gradient(90deg,#8884 {percent:.0f}%,transparent 0)">{escape(text)}</td>'


# ------------------------------------------------------------------------------------------- the drawing

LEFT, RIGHT = 10, WIDTH - 10
WIDE_BOXES = 15  # a row of so many boxes has room for large figures
NUMBERED = 26  # and one of so many for small ones
STEPS, DECODER, SCORED, JUDGE = 52, 128, 180, 232  # the rows' tops


def chain(
    setting: Truncation, steps: int, num_frames: int, chosen: list[int], reward: str, adapter: str
) -> tuple[str, str]:
    """The chain from top to bottom, the gradient's way back in thick arrows; and the same in words."""
    how = "one at a time" if setting.streaming else "all at once"
    inside = (
        "only the inputs of blocks are kept, the rest is computed again"
        if setting.checkpointing
        else "all is kept"
    )
    through = f"all {steps}" if steps == setting.K else f"the last {setting.K} of {steps}"
    alt = (
        f"The gradient goes back from the reward through {of(len(chosen), num_frames, 'frame')} "
        f"({', '.join(str(i + 1) for i in chosen)}), {how}, and {through} step{'s' * (steps > 1)} to the adapter. Inside a "
        f"step {inside}."
    )
    parts = [
        *denoising(setting, steps, adapter),
        box(LEFT, DECODER, RIGHT - LEFT, 26),
        words(WIDTH / 2, DECODER + 17, "decoder", bold=True, anchor="middle"),
        words(
            RIGHT - 8, DECODER + 17, f"frames {how}" if len(chosen) > 1 else "one frame", 11, "end"
        ),
        *decoded(num_frames, chosen),
        box(LEFT, JUDGE, RIGHT - LEFT, 26),
        words(WIDTH / 2, JUDGE + 17, f"reward: {reward}", bold=True, anchor="middle"),
        words(
            LEFT,
            JUDGE + 44,
            "thick arrows: the gradient, backwards · filled: what it passes through",
            11,
        ),
    ]
    return svg(JUDGE + 52, parts, alt), alt


def denoising(setting: Truncation, steps: int, adapter: str) -> list[str]:
    """The adapter over the window of steps that learn, the row of steps, and the way to and from the decoder."""
    width = (RIGHT - LEFT) / steps
    window, last = RIGHT - setting.K * width, RIGHT - width / 2
    inside = RIGHT - window > 8 * len(adapter)  # room for its name
    place = ((window + RIGHT) / 2, "middle") if inside else (window - 8, "end")
    parts = [
        box(window, 4, RIGHT - window, 24),
        words(place[0], 20, adapter, anchor=place[1], bold=True),
    ]
    for i in range(1, steps + 1):  # counted from the end
        x, learns = RIGHT - i * width, i <= setting.K
        parts.append(
            box(
                x + width * 0.03,
                STEPS,
                width * 0.94,
                30,
                "step learns" if learns else "step",
                learns,
            )
        )
        parts += number(x + width / 2, STEPS + 19, i, steps, learns)
        if learns:
            parts.append(arrow(x + width / 2, STEPS - 2, x + width / 2, 30, True))
    if setting.K > 1:
        parts.append(arrow(last, STEPS + 36, window + width / 2, STEPS + 36, True))
    kept = (
        "their blocks computed again" if setting.checkpointing else "all that they compute is kept"
    )
    return [
        *parts,
        words(LEFT, STEPS + 52, "noise → denoising steps, counted from the end", 11),
        words(LEFT, STEPS + 66, f"in the gradient: {of(setting.K, steps, 'step')}, {kept}", 11),
        arrow(last + 6, STEPS + 32, last + 6, DECODER - 2),
        arrow(last - 6, DECODER - 2, last - 6, STEPS + 32, True),
    ]


def decoded(num_frames: int, chosen: list[int]) -> list[str]:
    """The row of frames, those that are scored with the gradient from the reward and to the decoder."""
    width, parts = (RIGHT - LEFT) / num_frames, []
    for i in range(num_frames):
        x, scored = LEFT + i * width, i in chosen
        middle = x + width / 2
        parts.append(
            box(
                x + width * 0.05,
                SCORED,
                width * 0.9,
                26,
                "frame scored" if scored else "frame",
                scored,
            )
        )
        parts += number(middle, SCORED + 17, i + 1, num_frames, scored)
        if scored:
            parts.append(arrow(middle, SCORED - 2, middle, DECODER + 28, True))
            parts.append(arrow(middle, JUDGE - 2, middle, SCORED + 28, True))
    return parts


def number(x: float, y: float, value: int, count: int, marked: bool) -> list[str]:
    """A box's number as far as there is room; with a tick for what is chosen, since a shade alone is easily missed."""
    if count > NUMBERED and value % 5:
        return []
    wide = count <= WIDE_BOXES
    return [
        words(
            x,
            y,
            f"{value} ✓" if marked and wide else str(value),
            12 if wide else 9,
            "middle",
            marked,
        )
    ]


def of(part: int, whole: int, name: str) -> str:
    return f"{part} of {whole} {name}{'s' if whole != 1 else ''}"
