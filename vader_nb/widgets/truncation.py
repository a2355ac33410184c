"""What a truncated reward gradient costs and where it points: memory, time, cosine to the exact.

explorer = TruncationExplorer(model)                   in a notebook
explorer.measure(K=2, frames="all")                    the same from Python: a Measured
"""

import math
from collections.abc import Callable
from typing import Any

from ipywidgets import HTML
from markupsafe import Markup

from .. import stepwise
from ..drawing import chain, image, note, table
from ..models import VideoModel
from ..prompts import Prompt
from ..rewards import Reward
from ..sampling import Sampling
from ..stepwise import Job, remember
from ..truncation import Measured, Truncation, TruncationStudy
from .controls import FRAMES, beside, choice, column, disable, row, slider, switch
from .panel import Panel

ROWS = 12  # settings that are kept in the table
EMPTY = "Nothing measured yet: press “measure”."
COLUMNS = ("K", "frames", "memory", "time", "cosine", "turned off")
EXPLANATION = (  # of the table
    "Memory: the peak of all tensors that one gradient makes, without the weights. Cosine to the "
    "exact gradient, which goes through all steps and frames: 1 is its direction (0°), 0 a right "
    "angle, below 0 the wrong way."
)


class TruncationExplorer(Panel):
    """The chain from adapter to reward, and how far back its gradient is followed.

    Args:
        model: Its own adapter is left alone.
        reward: A reward or an expression.
        prompt: Of the clip.
        seed: Of the clip, of the adapter and of a random frame.
        rank: Of the adapter.

    Attributes:
        study: The `TruncationStudy` that measures.

    Raises:
        ValueError: An unknown reward, an empty prompt, or a rank below 1.
    """

    title = "Truncation explorer"
    hint = "Choose how far back the gradient goes and press “measure”: what is saved, what is lost?"

    def __init__(
        self,
        model: VideoModel,
        reward: Reward | Callable | str = "hps",
        prompt: str | Prompt | None = None,
        seed: int = 0,
        rank: int = 4,
    ):
        asked = stepwise.examples(model, 1)[0] if prompt is None else prompt
        self.prompt = str(asked)
        if not self.prompt.strip():
            raise ValueError("the prompt is empty: say what the clip should show")
        # With 5 steps, the exact gradient of the tiny model takes a second or two.
        sampling = Sampling(num_inference_steps=5) if model.world == "tiny" else Sampling()
        self.sampling = sampling.resolve(model)
        self.reward = stepwise.usable(reward, model, [self.prompt])
        self.study = TruncationStudy(model, self.reward, asked, self.sampling, seed, rank)
        self.measured: dict[Truncation, Measured] = {}  # the newest last
        steps = self.sampling.num_inference_steps
        super().__init__(
            K=slider("K, steps", 1, 1, steps),
            frames=choice("frames", FRAMES if self.reward.per_frame else ["all"]),
            gradient_checkpointing=switch("gradient checkpointing: recompute blocks", True),
            streaming=switch("streaming: decode and score frames one by one", True),
        )
        self.on(self.changed, *self.settings.values())
        self.measure_button = self.button("measure", "play", 110, self._job, "primary")
        self.drawing, self.table = HTML(), HTML(note(EMPTY))
        self.given = (  # in all measurements
            f"Reward {self.reward.name}, prompt “{self.prompt}”, seed {seed}, {steps} steps; "
            f"an adapter of rank {rank} with random parameters."
        )
        below = self.why, row(self.measure_button), HTML(note(self.given))
        controls = column(*self.settings.values(), *below, max_width="400px")
        self.assemble(beside(controls, column(self.drawing, flex="2 1 330px")), self.table)
        self.changed()

    @property
    def setting(self) -> Truncation:
        """The settings; a single frame is streamed, whatever the switch says."""
        streaming = len(self.chosen) == 1 or self.streaming.value
        values: dict[str, Any] = self.values() | {"streaming": streaming}
        return Truncation(**values)

    @property
    def chosen(self) -> list[int]:
        """Indices of the scored frames."""
        return self.study.chosen(self.frames.value)

    def changed(self) -> None:
        setting, chosen, steps = self.setting, self.chosen, self.sampling.num_inference_steps
        whole = single = ""
        if not self.reward.per_frame:
            whole = f"“{self.reward.name}” scores the whole clip: it needs all frames."
        if len(chosen) == 1:
            single = "With one frame there is nothing to stream."
        disable(whole, self.frames)
        disable(single, self.streaming)
        self.why.value = note(whole or single)
        frames = ", ".join(str(i + 1) for i in chosen)
        order = "one by one" if setting.streaming else "all at once"
        window = f"all {steps}" if steps == setting.K else f"the last {setting.K} of {steps}"
        recomputed = "only the inputs of blocks are kept, the rest is recomputed"
        inside = recomputed if setting.gradient_checkpointing else "everything is kept"
        self.description = (
            f"The gradient goes back from the reward through {len(chosen)} of "
            f"{self.sampling.num_frames} frames ({frames}), {order}, and {window} steps to the "
            f"adapter. Inside a step {inside}."
        )
        self.chain = chain(
            steps,
            setting.K,
            self.sampling.num_frames,
            chosen,
            adapter=f"adapter, rank {self.study.rank}",
            reward=self.reward.name,
            recompute=setting.gradient_checkpointing,
            stream=setting.streaming,
            label=self.description,
        )
        self.drawing.value = self.chain + note(self.description)

    def measure(self, **changes) -> Measured:
        """Measure now, after setting controls by name, and wait for the result."""
        self.set(**changes)
        self.jobs.finish(self._job)
        return self.measured[self.setting]

    def _job(self) -> Job:
        setting = self.setting
        result = yield from self.study.measure(setting, self.say)
        remember(self.measured, setting, result, ROWS)
        self.say("")
        self._show_table()

    def _show_table(self) -> None:
        results, rows = self.measured.values(), []
        most, longest = max(r.bytes for r in results), max(r.seconds for r in results)
        for setting, result in reversed(self.measured.items()):
            angle = math.degrees(math.acos(max(-1.0, min(1.0, result.cosine))))
            memory = bar(f"{result.bytes / 1e6:.1f} MB", result.bytes / most)
            duration = bar(f"{result.seconds:.2f} s", result.seconds / longest)
            cosine = bar(f"{result.cosine:.3f} ({angle:.0f}°)", max(result.cosine, 0))
            switches = {"checkpointing": setting.gradient_checkpointing}
            switches |= {"streaming": setting.streaming}
            off = ", ".join(name for name, on in switches.items() if not on)
            rows.append((setting.K, setting.frames, memory, duration, cosine, off))
        shown = len(COLUMNS) if any(row[-1] for row in rows) else len(COLUMNS) - 1
        cells = (row[:shown] for row in rows)
        look = "style='white-space:nowrap'"
        self.table.value = table(COLUMNS[:shown], cells, look) + note(EXPLANATION)

    def to_html(self) -> str:
        drawing = image(self.chain, self.description)
        return f"<div>{drawing}{note(f'{self.description} {self.given}')}{self.table.value}</div>"


def bar(text: str, share: float) -> Markup:
    """A number above a line that has its share of the cell's width."""
    line = (
        f"linear-gradient(90deg,#8888 {100 * share:.0f}%,transparent 0) bottom/100% 3px no-repeat"
    )
    return Markup(f'<div style="padding-bottom:3px;background:{line}">{text}</div>')
