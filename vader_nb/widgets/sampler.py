"""Sampling by hand: prompt, seed, steps, guidance, adapters, and what each does to the clip.

Sampler(model, adapters={"hps": "runs/hps"})          in a notebook
sampler.run(prompt="…", seed=3, scale=0.7)            the same from Python: a Video
"""

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from ipywidgets import (
    HTML,
    Checkbox,
    Dropdown,
    FloatRangeSlider,
    FloatSlider,
    HBox,
    IntSlider,
    IntText,
    Text,
    VBox,
)

from .. import zoo
from ..models import VideoModel
from ..sampling import Sampling
from ..video import Video
from . import clips
from .panel import ROW, SIDE, Panel, button, control, disable, download_link, escape, note
from .player import Player, moving, still

NONE = "none (base model)"
HISTORY = 8  # clips that are kept to go back to


@dataclass(frozen=True)
class Request:
    """The settings of a clip.

    adapter and second are names of the panel's adapters or `NONE`, with scales 0 to 1.5; they act
    from `start` to `end`, parts of the denoising.
    """

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
        """Return the adapters that act, by name. A second one acts only beside a first."""
        if self.adapter == NONE:
            return {}
        chosen = {self.adapter: self.scale}
        if self.second not in (NONE, self.adapter):
            chosen[self.second] = self.second_scale
        return {name: weight for name, weight in chosen.items() if weight}

    def __str__(self) -> str:
        weights = self.weights()
        text = " + ".join(f"{weight:g} × {name}" for name, weight in weights.items()) or "base"
        if weights and (self.start, self.end) != (0, 1):
            text += f", acting {self.start:.0%} to {self.end:.0%}"
        return (
            f"{text} · seed {self.seed} · {self.num_inference_steps} steps"
            f" · guidance {self.guidance_scale:g}"
        )


SETTINGS = [field.name for field in fields(Request)]


class Sampler(Panel):
    """A clip of a prompt, sampled again whenever a control changes.

    Args:
        model: The video model.
        adapters: Name -> file or folder of a run; default: those shipped for the model "tiny".
        prompt: The first prompt.
        folder: Where clips are saved.

    Raises:
        FileNotFoundError: An adapter's file does not exist.
        ValueError: An adapter does not fit the model.
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
        self.model, self.folder = model, Path(folder)
        self.adapters = clips.validate_adapters(model, adapters)
        self.history: deque[tuple[Request, Video]] = deque(maxlen=HISTORY)
        self._filling = False
        self._merged = (None, None)  # weights by path, and their merged adapter
        settings = self._controls(prompt or clips.examples(model, 1)[0])
        self.player = Player(model.defaults["num_frames"])
        self.caption, self.listing, self.saved = HTML(), HTML(), HTML()
        self._slots = [self._slot(index) for index in range(HISTORY)]
        settings = VBox(settings, layout={"flex": "2 1 330px", "max_width": "600px"})
        clip = [self.player.box, self.caption]
        clip = VBox(clip, layout={"flex": "1 1 260px", "max_width": "340px"})
        settings.layout.min_width = clip.layout.min_width = "0"
        self.assemble(
            HBox([settings, clip], layout=SIDE),
            HBox([self.format, self.save_button, self.saved], layout=ROW),
            self.listing,
            HBox(self._slots, layout=ROW | {"align_items": "flex-start"}),
        )
        self._explain()

    def _controls(self, prompt: str) -> list:
        """Make the controls. Returns those that set the clip, from top to bottom."""
        defaults = self.model.defaults
        steps, guidance = defaults["num_inference_steps"], defaults["guidance_scale"]
        names = [NONE, *self.adapters]
        scales = {"min": 0, "max": 1.5, "step": 0.05}
        parts = {"min": 0, "max": 1, "step": 0.05, "readout_format": ".0%"}
        self.prompt = control(Text, "prompt", prompt)
        self.seed = control(IntText, "seed", 0, {"width": "220px"})
        self.dice = button("new seed", "random", "110px", "draw another seed")
        self.lock = Checkbox(True, description="keep the seed when the prompt changes")
        self.lock.indent, self.lock.layout.width = False, "auto"
        self.num_inference_steps = control(IntSlider, "steps", steps, min=1, max=max(50, steps))
        self.guidance_scale = control(FloatSlider, "guidance", guidance, min=1, max=15, step=0.5)
        self.adapter = control(Dropdown, "adapter", names[:2][-1], options=names)
        self.scale = control(FloatSlider, "scale", 1.0, **scales)
        self.second = control(Dropdown, "mixed with", NONE, options=names)
        self.second_scale = control(FloatSlider, "its scale", 0.5, **scales)
        self.part = control(FloatRangeSlider, "adapter acts", (0.0, 1.0), **parts)
        self.why = HTML()
        formats = [".mp4", ".gif", ".webp"]
        self.format = control(Dropdown, "save as", ".mp4", {"width": "210px"}, options=formats)
        self.save_button = button("save", "download", "90px")
        sliders = [self.num_inference_steps, self.guidance_scale]
        adapters = [self.adapter, self.scale, self.second, self.second_scale, self.part]
        self.on(self._changed, self.seed, *sliders, *adapters)
        self.on(self._new_prompt, self.prompt)
        self.on(self.roll, self.dice)
        self.on(self.save, self.save_button)
        seed = HBox([self.seed, self.dice], layout=ROW)
        return [self.prompt, seed, self.lock, *sliders, *adapters, self.why]

    # ----------------------------------------------------------------------------------- settings

    @property
    def request(self) -> Request:
        """The settings in the controls."""
        start, end = self.part.value
        values = {name: getattr(self, name).value for name in SETTINGS[:-2]}
        values |= {"start": start, "end": end}
        for name, value in values.items():
            if isinstance(value, float):
                values[name] = round(value, 4)  # a slider's steps add up to 0.30000000000000004
        return Request(**values)

    def set(self, **changes) -> None:
        """Set controls without sampling.

        Args:
            **changes: Fields of `Request`.

        Raises:
            ValueError: An unknown name, or a value out of range.
        """
        for name in changes:
            if name not in SETTINGS:
                raise ValueError(f"unknown setting {name!r}; a clip has {', '.join(SETTINGS)}")
        start, end = (changes.pop(n, now) for n, now in zip(SETTINGS[-2:], self.part.value))
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"an adapter acts from a start to a later end within 0..1, got {start:g} to {end:g}"
            )
        self._filling = True
        try:
            self.part.value = (start, end)
            for name, value in changes.items():
                _set_value(getattr(self, name), name, value)
        finally:
            self._filling = False
        self._explain()

    def roll(self) -> None:
        """Draw another seed."""
        self.seed.value = random.SystemRandom().randrange(10_000)

    def _new_prompt(self) -> None:
        if self._filling or self.lock.value:
            self._changed()
        else:
            self.roll()

    def _changed(self) -> None:
        self._explain()
        if not self._filling:
            self.jobs.submit(self._job)

    def _explain(self) -> None:
        """Disable what has no effect now, and say why."""
        first, second = self.adapter.value, self.second.value
        why = ""
        if not self.adapters:
            why = "No adapters were given: Sampler(model, adapters={'name': 'runs/…'})."
        elif first == NONE:
            why = "Without an adapter there is nothing to scale or to mix."
        elif first == second:
            why = "Mixing needs two different adapters."
        mixing = first != NONE and second not in (NONE, first)
        choose = "choose an adapter first" if first == NONE else ""
        disable("" if self.adapters else why, self.adapter)
        disable(choose, self.scale, self.second, self.part)
        disable("" if mixing else "choose a second adapter", self.second_scale)
        self.why.value = note(why)

    # --------------------------------------------------------------------------------------- clip

    def run(self, **changes) -> Video:
        """Set controls by name, as `set` does, and sample a clip now."""
        self.set(**changes)
        self.jobs.finish(self._job)
        return self.history[0][1]

    @property
    def video(self) -> Video | None:
        """The clip that is shown."""
        return self.history[0][1] if self.history else None

    def _job(self):
        request = self.request
        if not request.prompt.strip():
            raise ValueError("the prompt is empty: type what the clip should show")
        weights = {self.adapters[name]: weight for name, weight in request.weights().items()}
        if self._merged[0] != weights:
            self._merged = weights, clips.merged(self.model, weights)
        frames = yield from clips.denoising(
            self.model,
            [request.prompt],
            [request.seed],
            Sampling(request.num_inference_steps, request.guidance_scale),
            self._merged[1],
            request.start,
            request.end,
        )
        video = Video(frames[0], self.model.defaults["fps"], request.prompt)
        self.history.appendleft((request, video))
        self._show()

    def _show(self) -> None:
        request, video = self.history[0]
        alt = f"clip of: {request.prompt}"
        singles = [still(video, i, alt) for i in range(len(video.frames))]
        self.player.show(moving(video, alt), singles)
        self.caption.value = f"<b>{escape(request.prompt)}</b>{note(str(request))}"
        self.listing.value = (
            f"<details><summary>as code</summary>{note('one click selects all of it')}"
            f"<div class=vader-code>{escape(self.code)}</div></details>"
        )
        self.saved.value = ""
        for slot, entry in zip(self._slots, self.history):
            _fill(slot, *entry)

    @property
    def code(self) -> str:
        """Python that samples the clip that is shown, without this panel."""
        request = self.history[0][0] if self.history else self.request
        sampling = (
            f"Sampling(num_inference_steps={request.num_inference_steps}, "
            f"guidance_scale={request.guidance_scale:g})"
        )
        call = [repr(request.prompt), f"seeds={request.seed}", "sampling=sampling"]
        weights = request.weights()
        if weights:
            parts = [f"{self._path_code(name)}: {weight:g}" for name, weight in weights.items()]
            call.append(f"adapter={{{', '.join(parts)}}}")
            if (request.start, request.end) != (0, 1):
                call.append(f"adapter_start={request.start:g}, adapter_end={request.end:g}")
        return (
            "import vader_nb\n"
            "from vader_nb import Sampling, Video, zoo\n\n"
            f"model = vader_nb.load({self.model.name!r})\n"
            f"sampling = {sampling}\n"
            f"frames = vader_nb.sample(model, {', '.join(call)})\n"
            f"Video(frames[0], fps={self.model.defaults['fps']})"
        )

    def _path_code(self, name: str) -> str:
        """An adapter's file in Python; for a shipped one it holds on other machines too."""
        path = self.adapters[name]
        return f"zoo.adapters()[{name!r}]" if path == zoo.adapters().get(name) else repr(str(path))

    # ------------------------------------------------------------------------------------ history

    def back(self, index: int) -> None:
        """Show a clip of the history again, with its settings; 0 is the newest."""
        entry = self.history[index]
        self.set(**vars(entry[0]))
        self.jobs.give_up()
        del self.history[index]
        self.history.appendleft(entry)
        self._show()

    def _slot(self, index: int) -> VBox:
        """A place in the history strip, made once and filled again, so that nothing piles up."""
        again = button("back to this", width="120px")
        self.on(lambda: self.back(index), again)
        layout = {"width": "130px", "display": "none", "margin": "4px"}
        return VBox([HTML(), again], layout=layout)

    def save(self) -> Path:
        """Save the clip that is shown in the chosen format, with its settings in a text file.

        Returns:
            The clip's file.

        Raises:
            ValueError: There is no clip yet.
        """
        if not self.history:
            raise ValueError("there is no clip yet to save")
        request, video = self.history[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 1  # a prompt never becomes a file name
        while any(self.folder.glob(f"clip-{number:03d}.*")):
            number += 1
        path = video.save(self.folder / f"clip-{number:03d}{self.format.value}", width=256)
        text = f"{request.prompt}\n{request}\n\n{self.code}\n"
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
        link = download_link(path)
        self.saved.value = f"<span class=vader-note>saved as {escape(str(path))}{link}</span>"
        return path

    # ------------------------------------------------------------------------------------ display

    def prepare(self) -> None:
        if not self.history:
            self.run()

    def to_html(self) -> str:
        request, video = self.history[0]
        caption = f"<figcaption>{escape(str(request))}</figcaption>"
        return f"<figure style='margin:0'>{video.to_html(256)}{caption}</figure>"


def _set_value(widget, name: str, value) -> None:
    """Set a control. Raises ValueError for a value that it cannot have."""
    if name in ("adapter", "second") and value not in widget.options:
        raise ValueError(f"unknown adapter {value!r}; there are {', '.join(widget.options)}")
    if not getattr(widget, "min", value) <= value <= getattr(widget, "max", value):
        raise ValueError(f"{name} must lie in {widget.min:g}..{widget.max:g}, got {value}")
    widget.value = value


def _fill(slot: VBox, request: Request, video: Video) -> None:
    """Show a clip in a place of the history strip."""
    picture, again = slot.children
    text = f"{request.prompt} · {request}"
    caption = f"<figcaption>{escape(str(request))}</figcaption>"
    picture.value = f"<figure>{moving(video, text)}{caption}</figure>"
    again.tooltip = f"show this clip again: {text}"
    slot.layout.display = "flex"
