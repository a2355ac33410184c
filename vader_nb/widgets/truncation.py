"""What a truncated reward gradient costs and where it points: memory, time, cosine to the exact.

explorer = TruncationExplorer(model)                   in a notebook
explorer.measure(K=2, frames="all")                    the same from Python: a Measured
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from ipywidgets import HTML
from markupsafe import Markup

from .. import lora
from ..drawing import chain, image, note, table
from ..gradient import reward_gradient
from ..memory_planner import MemoryTracker
from ..models import VideoModel
from ..prompts import Prompt
from ..rewards import Reward
from ..sampling import Sampling
from ..strategies import Last, parse_frames
from . import clips
from .controls import FRAMES, beside, choice, column, disable, row, slider, switch
from .jobs import Job
from .panel import Panel, remember

ROWS = 12  # settings that are kept in the table
B_STD = 0.05  # of the adapter's B
EMPTY = "Nothing measured yet: press “measure”."
ATOMIC = "one gradient cannot be stopped midway"
COLUMNS = ("K", "frames", "memory", "time", "cosine", "without")
EXPLANATION = (  # of the table
    "Memory: the peak of all tensors that one gradient makes, without the weights. Cosine to the "
    "exact gradient, which goes through all steps and frames: 1 is its direction (0°), 0 a right "
    "angle, below 0 the wrong way."
)


@dataclass(frozen=True)
class Truncation:
    """A truncated gradient: K denoising steps learn, the last ones, and some frames are scored."""

    K: int = 1
    frames: str = "random:1"  # as for `strategies.parse_frames`
    gradient_checkpointing: bool = True  # compute the denoiser's blocks again in the backward pass
    streaming: bool = True  # decode and score the frames one by one


@dataclass(frozen=True)
class Measured:
    """What one `reward_gradient` call took."""

    bytes: int  # the peak of all tensors that were made
    seconds: float
    cosine: float  # of the adapter's gradient to the exact one
    frames: tuple[int, ...]  # indices of the scored frames


class TruncationExplorer(Panel):
    """The chain from adapter to reward, and how far back its gradient is followed.

    The adapter is a new one with a random B, since A has no gradient where B is zero. The exact
    gradient goes through all steps and all frames, at the same seed.

    Args:
        model: Its own adapter is left alone.
        reward: A reward or an expression.
        prompt: Of the clip.
        seed: Of the clip, of the adapter and of a random frame.
        rank: Of the adapter.

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
        self.model, self.seed = model, seed
        self.asked = clips.examples(model, 1)[0] if prompt is None else prompt
        self.prompt = str(self.asked)
        if not self.prompt.strip():
            raise ValueError("the prompt is empty: say what the clip should show")
        # With 5 steps, the exact gradient of the tiny model takes a second or two.
        sampling = Sampling(num_inference_steps=5) if model.world == "tiny" else Sampling()
        self.sampling = sampling.resolve(model)
        self.reward = clips.usable(reward, model, [self.prompt])
        self.adapter = random_adapter(model, rank, seed)
        self.exact: torch.Tensor | None = None  # the exact gradient (N,), of all parameters
        self.measured: dict[Truncation, Measured] = {}  # the newest last
        steps = self.sampling.num_inference_steps
        super().__init__(
            K=slider("K, steps", 1, 1, steps),
            frames=choice("frames", FRAMES if self.reward.per_frame else ["all"]),
            gradient_checkpointing=switch("gradient checkpointing: recompute blocks", True),
            streaming=switch("streaming: decode and score frames one by one", True),
        )
        self.on(self.changed, *self.settings.values())
        self.measure_button = self.button(
            "measure", "play", 110, lambda: self.jobs.submit(self._job), "primary"
        )
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
        """Indices of the scored frames; a random one is the one that `reward_gradient` draws."""
        generator = torch.Generator().manual_seed(self.seed)
        given = self.model.given_frames([self.asked])
        return parse_frames(self.frames.value).choose(self.sampling.num_frames, generator, given)

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
        recomputed = "only inputs of blocks are kept, the rest is computed again"
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
            adapter=f"adapter, rank {self.adapter.rank}",
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

    def gradient(self, setting: Truncation, meter: AbstractContextManager) -> torch.Tensor:
        """The adapter's gradient (N,) in float64; `meter` is a context around the call."""
        parameters = self.adapter.parameters()
        try:
            with lora.use_adapter(self.model, self.adapter), meter:
                reward_gradient(
                    self.model,
                    self.adapter,
                    self.reward,
                    [self.asked],
                    seeds=[self.seed],
                    strategy=Last(setting.K),
                    frames=parse_frames(setting.frames),
                    sampling=self.sampling,
                    decode_chunk_size=1 if setting.streaming else self.sampling.num_frames,
                    gradient_checkpointing=setting.gradient_checkpointing,
                    generator=torch.Generator().manual_seed(self.seed),
                )
            gradients: list[Any] = [p.grad for p in parameters]
            return torch.cat([part.flatten().double() for part in gradients])
        finally:
            for p in parameters:
                p.grad = None

    def _job(self) -> Job:
        setting, chosen = self.setting, tuple(self.chosen)
        where = f"at K = {setting.K}, frames: {setting.frames}; {ATOMIC}."
        if self.exact is None:
            self.say(f"First the exact gradient, through all steps and frames; {ATOMIC}.")
            yield 0.05
            self.exact = self.gradient(Truncation(self.K.max, "all"), nullcontext())
        self.say(f"Measuring memory {where}")
        yield 0.4
        tracker = MemoryTracker(self.model.device.type)
        gradient = self.gradient(setting, tracker)
        self.say(f"Measuring time {where}")
        yield 0.7  # time is measured apart, since the memory tracker takes time
        began = time.perf_counter()
        self.gradient(setting, nullcontext())
        seconds = time.perf_counter() - began
        cosine = torch.cosine_similarity(gradient, self.exact, dim=0).item()
        result = Measured(tracker.bytes, seconds, cosine, chosen)
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
        self.table.value = table(COLUMNS, rows, "style='white-space:nowrap'") + note(EXPLANATION)

    def to_html(self) -> str:
        drawing = image(self.chain, self.description)
        return f"<div>{drawing}{note(f'{self.description} {self.given}')}{self.table.value}</div>"


def bar(text: str, share: float) -> Markup:
    """A number above a line that has its share of the cell's width."""
    line = (
        f"linear-gradient(90deg,#8888 {100 * share:.0f}%,transparent 0) bottom/100% 3px no-repeat"
    )
    return Markup(f'<div style="padding-bottom:3px;background:{line}">{text}</div>')


def random_adapter(model: VideoModel, rank: int, seed: int) -> lora.Adapter:
    """A new adapter with a random B, off the model."""
    with lora.use_adapter(model, None):
        adapter = lora.add(model, rank, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in adapter.state_dict().items():
            if ".lora_B." in name:
                value.copy_(torch.randn(value.shape, generator=generator) * B_STD)
    return adapter
