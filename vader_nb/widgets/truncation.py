"""What a truncated reward gradient costs and where it points: memory, time, cosine to the exact.

explorer = TruncationExplorer(model)                   in a notebook
explorer.measure(K=2, frames="all")                    the same from Python: a Measured
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from ipywidgets import HTML

from .. import lora
from ..gradient import reward_gradient
from ..memory_planner import MemoryTracker
from ..models import VideoModel
from ..rewards import Reward, as_reward, parse
from ..sampling import Sampling
from ..strategies import Last, parse_frames
from . import clips
from . import controls as ui
from .controls import SettingsPanel
from .drawing import chain, image
from .panel import disable, note

ROWS = 12  # settings that are kept in the table
B_STD = 0.05  # of the adapter's B
EMPTY = "Nothing measured yet: press “measure”."
ATOMIC = "one gradient cannot be stopped midway"
TABLE = """
{% macro bar(text, share) -%}
<td style="background:linear-gradient(90deg,#8884 {{ "%.0f"|format(100 * share) }}%,transparent 0)">
{{- text }}</td>
{%- endmacro %}
<div class=vader-scroll><table class=vader-measured style="white-space:nowrap">
<tr><th>K</th><th>frames</th><th>memory</th><th>time</th><th>cosine</th>
<th>checkpointing</th><th>streaming</th></tr>
{% for setting, result in rows %}
<tr><td>{{ setting.K }}</td><td>{{ setting.frames }}</td>
{{ bar("%.1f MB"|format(result.bytes / 1e6), result.bytes / most_bytes) }}
{{ bar("%.2f s"|format(result.seconds), result.seconds / most_seconds) }}
{{ bar("%.3f (%.0f°)"|format(result.cosine, angle(result.cosine)), [result.cosine, 0]|max) }}
<td>{{ "yes" if setting.gradient_checkpointing else "no" }}</td>
<td>{{ "–" if result.frames|length == 1 else "yes" if setting.streaming else "no" }}</td></tr>
{% endfor %}
</table></div>
<div class=vader-note>Memory: the peak of all tensors that one gradient makes, without the weights.
Cosine to the exact gradient, which goes through all steps and frames: 1 is its direction (0°), 0 a
right angle, below 0 the wrong way.</div>
"""


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


class TruncationExplorer(SettingsPanel):
    """The chain from adapter to reward, and how far back its gradient is followed.

    The adapter is a new one with a random B, since A has no gradient where B is zero. The exact
    gradient goes through all steps and all frames, at the same seed.

    Args:
        model: the video model; its own adapter is left alone.
        reward: a reward or an expression; by default "hps".
        prompt: of the clip.
        seed: of the clip, of the adapter and of a random frame.
        rank: of the adapter.

    Raises:
        ValueError: an unknown reward, an empty prompt, or a rank below 1.
    """

    title = "Truncation explorer"
    hint = "Choose how far back the gradient goes and press “measure”: what is saved, what is lost?"

    def __init__(
        self,
        model: VideoModel,
        reward: Reward | Callable | str = "hps",
        prompt: str | None = None,
        seed: int = 0,
        rank: int = 4,
    ):
        super().__init__()
        self.model, self.seed = model, seed
        self.prompt = clips.examples(model, 1)[0] if prompt is None else prompt
        if not self.prompt.strip():
            raise ValueError("the prompt is empty: say what the clip should show")
        tiny = model.world == "tiny"
        # With 5 steps, the exact gradient of the tiny model takes a second or two.
        self.sampling = Sampling(num_inference_steps=5 if tiny else None).resolve(model)
        self.reward = parse(reward, tiny=tiny) if isinstance(reward, str) else as_reward(reward)
        self.reward.check_prompts([self.prompt])
        self.reward.to(model.device)
        self.adapter = random_adapter(model, rank, seed)
        self.exact: torch.Tensor | None = None  # the exact gradient (N,), of all parameters
        self.measured: dict[Truncation, Measured] = {}  # the newest last
        self._build()
        self.changed()
        self._show_table()

    def _build(self) -> None:
        steps = self.sampling.num_inference_steps
        self.K = ui.slider("K, steps", 1, 1, steps)
        self.frames = ui.choice("frames", ui.FRAMES if self.reward.per_frame else ["all"])
        self.gradient_checkpointing = ui.switch("gradient checkpointing: recompute blocks", True)
        self.streaming = ui.switch("streaming: decode and score frames one by one", True)
        self.measure_button = ui.button("measure", "play", 110, primary=True)
        self.why, self.drawing, self.table = HTML(), HTML(), HTML()
        self.settings = {name: getattr(self, name) for name in Truncation.__annotations__}
        self.watch_settings()
        self.on(lambda: self.jobs.submit(self._job), self.measure_button)
        self.given = (  # in all measurements
            f"Reward {self.reward.name}, prompt “{self.prompt}”, seed {self.seed}, {steps} steps; "
            f"an adapter of rank {self.adapter.rank} with random parameters."
        )
        buttons = [self.why, ui.row(self.measure_button), HTML(note(self.given))]
        controls = ui.column(*self.settings.values(), *buttons, max_width="400px")
        self.assemble(ui.beside(controls, ui.column(self.drawing, flex="2 1 330px")), self.table)

    @property
    def setting(self) -> Truncation:
        """The settings; a single frame is streamed, whatever the switch says."""
        return Truncation(
            **self.values() | {"streaming": len(self.chosen) == 1 or self.streaming.value}
        )

    @property
    def chosen(self) -> list[int]:
        """Indices of the scored frames; a random one is the one that `reward_gradient` draws."""
        return parse_frames(self.frames.value).choose(self.sampling.num_frames, self._generator())

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def changed(self) -> None:
        whole = f"“{self.reward.name}” scores the whole clip: it needs all frames."
        whole = "" if self.reward.per_frame else whole
        single = "With one frame there is nothing to stream." if len(self.chosen) == 1 else ""
        disable(whole, self.frames)
        disable(single, self.streaming)
        self.why.value = note(whole or single)
        self.drawing.value = self.chain + note(self.description)

    @property
    def description(self) -> str:
        """The current setting in words."""
        setting, steps, chosen = self.setting, self.sampling.num_inference_steps, self.chosen
        frames = ", ".join(str(i + 1) for i in chosen)
        order = "one by one" if setting.streaming else "all at once"
        window = f"all {steps}" if steps == setting.K else f"the last {setting.K} of {steps}"
        recomputed = "only inputs of blocks are kept, the rest is computed again"
        inside = recomputed if setting.gradient_checkpointing else "everything is kept"
        return (
            f"The gradient goes back from the reward through {len(chosen)} of "
            f"{self.sampling.num_frames} frames ({frames}), {order}, and {window} steps to the "
            f"adapter. Inside a step {inside}."
        )

    @property
    def chain(self) -> str:
        """The drawing of the current setting."""
        setting, sampling = self.setting, self.sampling
        return chain(
            sampling.num_inference_steps,
            setting.K,
            sampling.num_frames,
            self.chosen,
            adapter=f"adapter, rank {self.adapter.rank}",
            reward=self.reward.name,
            recompute=setting.gradient_checkpointing,
            stream=setting.streaming,
            label=self.description,
        )

    # ---------------------------------------------------------------------------------- measuring

    def measure(self, **changes) -> Measured:
        """Measure now, after setting controls by name, and wait for the result."""
        self.set(**changes)
        self.jobs.finish(self._job)
        return self.measured[self.setting]

    def gradient(
        self, setting: Truncation, meter: contextlib.AbstractContextManager
    ) -> torch.Tensor:
        """The adapter's gradient (N,) in float64; `meter` is a context around the call."""
        parameters = self.adapter.parameters()
        try:
            with lora.use_adapter(self.model, self.adapter), meter:
                reward_gradient(
                    self.model,
                    self.adapter,
                    self.reward,
                    [self.prompt],
                    seeds=[self.seed],
                    strategy=Last(setting.K),
                    frames=parse_frames(setting.frames),
                    sampling=self.sampling,
                    decode_chunk_size=1 if setting.streaming else self.sampling.num_frames,
                    gradient_checkpointing=setting.gradient_checkpointing,
                    generator=self._generator(),
                )
            return torch.cat([p.grad.flatten().double() for p in parameters])
        finally:
            for p in parameters:
                p.grad = None

    def _job(self):
        setting, chosen, nothing = self.setting, tuple(self.chosen), contextlib.nullcontext()
        if self.exact is None:
            self.say(f"First the exact gradient, through all steps and frames; {ATOMIC}.")
            yield 0.05
            self.exact = self.gradient(Truncation(self.K.max, "all"), nothing)
        self.say(f"Measuring memory at K = {setting.K}, frames: {setting.frames}; {ATOMIC}.")
        yield 0.4
        tracker = MemoryTracker(self.model.device.type)
        gradient = self.gradient(setting, tracker)
        self.say(f"Measuring time at K = {setting.K}, frames: {setting.frames}; {ATOMIC}.")
        yield 0.7  # time is measured apart, since the memory tracker takes time
        began = time.perf_counter()
        self.gradient(setting, nothing)
        seconds = time.perf_counter() - began
        cosine = torch.cosine_similarity(gradient, self.exact, dim=0).item()
        self.measured.pop(setting, None)
        self.measured[setting] = Measured(tracker.bytes, seconds, cosine, chosen)
        for old in list(self.measured)[:-ROWS]:
            del self.measured[old]
        self.say("")
        self._show_table()

    def _show_table(self) -> None:
        results = self.measured.values()
        if not results:
            self.table.value = note(EMPTY)
            return
        self.table.value = ui.template(TABLE).render(
            rows=reversed(self.measured.items()),
            most_bytes=max(result.bytes for result in results),
            most_seconds=max(result.seconds for result in results),
            angle=lambda cosine: math.degrees(math.acos(max(-1.0, min(1.0, cosine)))),
        )

    def to_html(self) -> str:
        drawing = image(self.chain, self.description)
        return f"<div>{drawing}{note(f'{self.description} {self.given}')}{self.table.value}</div>"


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
