"""Sampling by hand: prompt, seed, steps, guidance, adapters; what each of them does to the clip.

Sampler(model, adapters={"hps": "runs/hps"})          in a notebook
sampler.run(prompt="…", seed=3, scale=0.7)            the same from Python: a Video
"""

import base64
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from ipywidgets import (
    HTML,
    Button,
    Checkbox,
    Dropdown,
    FloatRangeSlider,
    FloatSlider,
    HBox,
    IntSlider,
    IntText,
    Layout,
    Text,
    VBox,
)

from .. import zoo
from ..gradient import Sampling
from ..models import VideoModel
from ..video import Video
from . import clips
from .panel import LABEL, ROW, SIDE, WIDE, Panel, disable, escape
from .player import Player, moving, still

NONE = "none (base model)"
HISTORY = 8  # clips that are kept to go back to


@dataclass(frozen=True)
class Request:
    """What a clip is made of. adapter, second: names of `adapters` or `NONE`; scale 0 to 1.5; start, end: the part of the
    denoising in which they act."""

    prompt: str
    seed: int = 0
    num_inference_steps: int = 10
    guidance_scale: float = 2.0
    adapter: str = NONE
    scale: float = 1.0
    second: str = NONE
    second_scale: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def weights(self) -> dict[str, float]:
        """Adapters that act, by name. A second one only beside a first."""
        if self.adapter == NONE:
            return {}
        chosen = {self.adapter: self.scale}
        if self.second not in (NONE, self.adapter):
            chosen[self.second] = self.second_scale
        return {name: weight for name, weight in chosen.items() if weight}

    def __str__(self) -> str:
        mix = (
            " + ".join(f"{weight:g} × {name}" for name, weight in self.weights().items()) or "base"
        )
        part = (
            f", acting {self.start:.0%} to {self.end:.0%}"
            if self.weights() and (self.start, self.end) != (0, 1)
            else ""
        )
        return f"{mix}{part} · seed {self.seed} · {self.num_inference_steps} steps · guidance {self.guidance_scale:g}"


class Sampler(Panel):
    """A clip of a prompt, made anew whenever a control moves.

    adapters: name -> file or a run's folder, default the shipped ones for the model "tiny". prompt: the first one.
    folder: where clips are saved. Raises FileNotFoundError or ValueError for an adapter that does not fit the model.
    """

    title = "Sampler"
    hint = "Type a prompt and press Enter, or move a slider: the clip is made anew."

    def __init__(
        self,
        model: VideoModel,
        adapters: Mapping[str, str | Path] | None = None,
        prompt: str | None = None,
        folder: str | Path = "runs/clips",
    ):
        super().__init__()
        self.model, self.adapters, self.folder = model, clips.fitting(model, adapters), Path(folder)
        self.history: deque[tuple[Request, Video]] = deque(maxlen=HISTORY)
        self._filling = False
        self._blend = (None, None)  # the weights it was made for, and the adapter
        self._controls(prompt or clips.examples(model, 1)[0])
        self.player = Player(model.defaults["num_frames"])
        self.caption, self.listing, self.saved = HTML(), HTML(), HTML()
        self._slots = [self._slot(i) for i in range(HISTORY)]
        strip = HBox([slot.box for slot in self._slots], layout=ROW | {"align_items": "flex-start"})
        controls = VBox(
            [
                self.prompt,
                HBox([self.seed, self.dice], layout=ROW),
                self.lock,
                self.num_inference_steps,
                self.guidance_scale,
                self.adapter,
                self.scale,
                self.second,
                self.second_scale,
                self.part,
                self.why,
            ],
            layout=Layout(flex="2 1 330px", max_width="600px", min_width="0"),
        )
        clip = VBox(
            [self.player.box, self.caption],
            layout=Layout(flex="1 1 260px", max_width="340px", min_width="0"),
        )
        self.assemble(
            HBox([controls, clip], layout=SIDE),
            HBox([self.format, self.save_button, self.saved], layout=ROW),
            self.listing,
            strip,
        )
        self._explain()

    def _controls(self, prompt: str) -> None:
        defaults = self.model.defaults
        names = [NONE, *self.adapters]
        self.prompt = Text(
            prompt, description="prompt", continuous_update=False, style=LABEL, layout=WIDE
        )
        self.seed = IntText(0, description="seed", style=LABEL, layout=Layout(width="220px"))
        self.dice = Button(
            description="new seed",
            icon="random",
            tooltip="draw another seed",
            layout=Layout(width="110px"),
        )
        self.lock = Checkbox(
            True, description="keep the seed when the prompt changes", indent=False
        )
        self.lock.layout.width = "auto"
        slider = {"continuous_update": False, "style": LABEL, "layout": WIDE}
        most = max(50, defaults["num_inference_steps"])
        self.num_inference_steps = IntSlider(
            defaults["num_inference_steps"], min=1, max=most, description="steps", **slider
        )
        self.guidance_scale = FloatSlider(
            defaults["guidance_scale"], min=1, max=15, step=0.5, description="guidance", **slider
        )
        self.adapter = Dropdown(
            options=names,
            value=names[min(1, len(names) - 1)],
            description="adapter",
            style=LABEL,
            layout=WIDE,
        )
        self.second = Dropdown(
            options=names, value=NONE, description="mixed with", style=LABEL, layout=WIDE
        )
        self.scale = FloatSlider(1.0, min=0, max=1.5, step=0.05, description="scale", **slider)
        self.second_scale = FloatSlider(
            0.5, min=0, max=1.5, step=0.05, description="its scale", **slider
        )
        self.part = FloatRangeSlider(
            value=(0.0, 1.0),
            min=0,
            max=1,
            step=0.05,
            description="adapter acts",
            readout_format=".0%",
            **slider,
        )
        self.why = HTML()
        self.format = Dropdown(
            options=[".mp4", ".gif", ".webp"], description="save as", style=LABEL
        )
        self.format.layout = Layout(width="210px")
        self.save_button = Button(description="save", icon="download", layout=Layout(width="90px"))
        self.on(self._moved, self.seed, self.num_inference_steps, self.guidance_scale)
        self.on(self._moved, self.adapter, self.scale, self.second, self.second_scale, self.part)
        self.on(self._new_prompt, self.prompt)
        self.on(self.roll, self.dice)
        self.on(self.save, self.save_button)

    # ------------------------------------------------------------------------------------------- what is asked for

    @property
    def request(self) -> Request:
        start, end = self.part.value
        return Request(
            self.prompt.value,
            self.seed.value,
            self.num_inference_steps.value,
            self.guidance_scale.value,
            self.adapter.value,
            round(self.scale.value, 2),
            self.second.value,
            round(self.second_scale.value, 2),
            round(start, 2),
            round(end, 2),
        )

    def set(self, **changes) -> None:
        """Set controls without sampling; names are those of `Request`. Raises ValueError for a value they cannot have."""
        known = [f.name for f in fields(Request)]
        for name in changes:
            if name not in known:
                raise ValueError(f"unknown setting {name!r}; a clip has {', '.join(known)}")
        ends = [changes.pop(name, now) for name, now in zip(("start", "end"), self.part.value)]
        if not 0 <= ends[0] < ends[1] <= 1:
            raise ValueError(
                f"an adapter acts from a start to a later end within 0..1, got {ends[0]:g} to {ends[1]:g}"
            )
        self._filling = True
        try:
            self.part.value = ends
            for name, value in changes.items():
                control = getattr(self, name)
                if name in ("adapter", "second") and value not in control.options:
                    raise ValueError(
                        f"unknown adapter {value!r}; there are {', '.join(control.options)}"
                    )
                if not getattr(control, "min", value) <= value <= getattr(control, "max", value):
                    raise ValueError(
                        f"{name} must lie in {control.min:g}..{control.max:g}, got {value}"
                    )
                control.value = value
        finally:
            self._filling = False
        self._explain()

    def roll(self) -> None:
        """Another seed."""
        self.seed.value = random.SystemRandom().randrange(10_000)

    def _new_prompt(self) -> None:
        if self._filling or self.lock.value:
            self._moved()
        else:
            self.roll()

    def _moved(self) -> None:
        self._explain()
        if not self._filling:
            self.jobs.submit(self._job)

    def _explain(self) -> None:
        """Disable what has no effect now, and say why."""
        first, second = self.adapter.value != NONE, self.second.value != NONE
        reasons = []

        def rule(why: str, *controls) -> None:
            disable(why, *controls)
            if why:
                reasons.append(why)

        if not self.adapters:
            rule(
                "No adapters were given: Sampler(model, adapters={'name': 'runs/…'}).",
                self.adapter,
                self.second,
            )
        rule(
            ""
            if first
            else "Without an adapter there is nothing to scale or to mix."
            if self.adapters
            else "",
            self.scale,
        )
        disable("" if first else "choose an adapter first", self.second, self.scale)
        same = second and self.second.value == self.adapter.value
        rule("Mixing needs two different adapters." if first and same else "", self.second_scale)
        disable(
            "" if first and second and not same else "choose a second adapter", self.second_scale
        )
        disable("" if first else "without an adapter nothing acts", self.part)
        self.why.value = (
            f"<div class=vader-note>{escape(' '.join(reasons))}</div>" if reasons else ""
        )

    # ------------------------------------------------------------------------------------------------ the clip

    def run(self, **changes) -> Video:
        """Make a clip now, after setting controls by name, and wait for it."""
        self.set(**changes)
        self.jobs.finish(self._job)
        return self.video

    @property
    def video(self) -> Video | None:
        """The clip that is shown."""
        return self.history[0][1] if self.history else None

    def _job(self):
        request = self.request
        if not request.prompt.strip():
            raise ValueError("the prompt is empty: type what the clip should show")
        weights = {self.adapters[name]: weight for name, weight in request.weights().items()}
        if self._blend[0] != weights:
            self._blend = weights, clips.blended(self.model, weights)
        sampling = Sampling(request.num_inference_steps, request.guidance_scale)
        part = (request.start, request.end)
        frames = yield from clips.denoising(
            self.model, [request.prompt], [request.seed], sampling, self._blend[1], *part
        )
        self.history.appendleft(
            (request, Video(frames[0], self.model.defaults["fps"], request.prompt))
        )
        self._show()

    def _show(self) -> None:
        (request, video), *_ = self.history
        alt = f"clip of: {request.prompt}"
        self.player.show(
            moving(video, alt), [still(video, i, alt) for i in range(len(video.frames))]
        )
        self.caption.value = f"<div><b>{escape(request.prompt)}</b><br><span class=vader-note>{escape(str(request))}</span></div>"
        self.listing.value = (
            "<details><summary>as code</summary><div class=vader-note>one click selects all of it</div>"
            f"<div class=vader-code>{escape(self.code)}</div></details>"
        )
        self.saved.value = ""
        for slot, entry in zip(self._slots, self.history):
            slot.fill(*entry)

    @property
    def code(self) -> str:
        """Python that makes the clip that is shown, without this panel."""
        request = self.history[0][0] if self.history else self.request
        sampling = f"Sampling(num_inference_steps={request.num_inference_steps}, guidance_scale={request.guidance_scale:g})"
        lines = ["import vader_nb", "from vader_nb import Sampling, Video, lora, zoo", ""]
        lines += [f"model = vader_nb.load({self.model.name!r})", f"sampling = {sampling}"]
        call = f"vader_nb.sample(model, {request.prompt!r}, seeds={request.seed}, sampling=sampling"
        weights = request.weights()
        if weights:
            parts = ", ".join(
                f"{self._spelled(name)}: {weight:g}" for name, weight in weights.items()
            )
            lines.append(f"adapter = lora.blend(model, {{{parts}}})")
        if weights and (request.start, request.end) != (0, 1):
            part = f"{request.start:g}, {request.end:g}, num_inference_steps={request.num_inference_steps}"
            lines += [
                f"with lora.acting(adapter, {part}) as callback:",
                f"    frames = {call}, callback=callback)",
            ]
        else:
            lines.append(f"frames = {call}{', adapter=adapter' if weights else ''})")
        return "\n".join([*lines, f"Video(frames[0], fps={self.model.defaults['fps']})"])

    def _spelled(self, name: str) -> str:
        """An adapter's file, in Python that holds on other machines too where it is one of the shipped."""
        path = self.adapters[name]
        return f"zoo.adapters()[{name!r}]" if path == zoo.adapters().get(name) else repr(str(path))

    # ------------------------------------------------------------------------------------------------- history

    def back(self, index: int) -> None:
        """Show a clip of the history again, with the settings that made it; 0 is the newest."""
        entry = self.history[index]
        self.set(**vars(entry[0]))
        self.jobs.give_up()
        del self.history[index]
        self.history.appendleft(entry)
        self._show()

    def _slot(self, index: int) -> "Slot":
        slot = Slot()
        self.on(lambda: self.back(index), slot.button)
        return slot

    def save(self) -> Path:
        """Write the clip that is shown, in the chosen format; its settings go beside it. Returns the file."""
        if not self.history:
            raise ValueError("there is no clip yet to save")
        (request, video), suffix = self.history[0], self.format.value
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 1  # a prompt never becomes a file name
        while any(self.folder.glob(f"clip-{number:03d}.*")):
            number += 1
        path = video.save(self.folder / f"clip-{number:03d}{suffix}", width=256)
        path.with_suffix(".txt").write_text(
            f"{request.prompt}\n{request}\n\n{self.code}\n", encoding="utf-8"
        )
        kind = {".mp4": "video/mp4", ".gif": "image/gif", ".webp": "image/webp"}[suffix]
        data = base64.b64encode(path.read_bytes()).decode()
        link = f'<a download="{path.name}" href="data:{kind};base64,{data}">download</a>'
        self.saved.value = f"<span class=vader-note>saved as {escape(str(path))} · {link}</span>"
        return path

    # ------------------------------------------------------------------------------------------------- showing

    def prepare(self) -> None:
        if not self.history:
            self.run()

    def to_html(self) -> str:
        request, video = self.history[0]
        return f"<figure style='margin:0'>{video.to_html(256)}<figcaption>{escape(str(request))}</figcaption></figure>"


class Slot:
    """A place in the history strip: made once and filled again and again, so that nothing piles up."""

    def __init__(self):
        self.picture, self.button = (
            HTML(),
            Button(description="back to this", layout=Layout(width="120px")),
        )
        self.box = VBox(
            [self.picture, self.button], layout=Layout(width="130px", display="none", margin="4px")
        )

    def fill(self, request: Request, video: Video) -> None:
        text = f"{request.prompt} · {request}"
        self.picture.value = (
            f"<figure>{moving(video, text)}<figcaption>{escape(str(request))}</figcaption></figure>"
        )
        self.button.tooltip = f"show this clip again: {text}"
        self.box.layout.display = "flex"
