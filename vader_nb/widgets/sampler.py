"""Sampling by hand: what prompt, seed, steps, guidance and adapters do to the clip.

Sampler(model, adapters={"hps": "runs/hps"})          in a notebook
sampler.run(prompt="…", seed=3, scale=0.7)            the same from Python: a Video
"""

import itertools
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ipywidgets import HTML, FloatRangeSlider, IntText, VBox

from .. import zoo
from ..models import VideoModel
from ..sampling import Sampling
from ..video import Video
from . import clips
from .controls import LABEL, LINE, beside, choice, column, disable, row, slider, switch, text
from .drawing import code, download_link, note
from .jobs import Job
from .panel import Panel
from .player import Player, moving, pictures

NONE = "none (base model)"
HISTORY = 8  # clips that are kept to go back to


@dataclass(frozen=True)
class Request:
    """The settings of a clip."""

    prompt: str
    seed: int = 0
    num_inference_steps: int = 10
    guidance_scale: float = 2.0
    adapter: str = NONE  # a name of the panel's adapters or `NONE`
    scale: float = 1.0  # 0 to 1.5
    second: str = NONE
    second_scale: float = 0.5
    start: float = 0.0  # the part of the denoising in which the adapters act
    end: float = 1.0

    def weights(self) -> dict[str, float]:
        """The adapters that act, by name. A second one acts only beside a first."""
        if self.adapter == NONE:
            return {}
        # The same adapter twice counts once, with the first scale.
        chosen = {self.second: self.second_scale, self.adapter: self.scale}
        return {n: chosen[n] for n in (self.adapter, self.second) if n != NONE and chosen[n]}

    def __str__(self) -> str:
        weights = self.weights()
        how = " + ".join(f"{weight:g} × {name}" for name, weight in weights.items()) or "base"
        if weights and (self.start, self.end) != (0, 1):
            how += f", acting {self.start:.0%} to {self.end:.0%}"
        steps, guidance = self.num_inference_steps, self.guidance_scale
        return f"{how} · seed {self.seed} · {steps} steps · guidance {guidance:g}"


class Sampler(Panel):
    """A clip of a prompt, sampled again whenever a control changes.

    Args:
        model: What makes the clips.
        adapters: Name -> file or folder of a run; default: those shipped for the model "tiny".
        prompt, folder: The first prompt, and where clips are saved.

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
        self.model, self.folder = model, Path(folder)
        self.adapters = clips.validate_adapters(model, adapters)
        self.history: deque[tuple[Request, Video]] = deque(maxlen=HISTORY)
        self._merged = (None, None)  # weights by path, and the adapter that is their sum
        steps, guidance = model.defaults["num_inference_steps"], model.defaults["guidance_scale"]
        names, late = [NONE, *self.adapters], {"continuous_update": False}
        fine = late | {"step": 0.05}
        super().__init__(
            prompt=text("prompt", prompt or clips.examples(model, 1)[0]),
            seed=IntText(0, description="seed", style=LABEL, layout={"width": "220px"}),
            num_inference_steps=slider("steps", steps, 1, max(50, steps), **late),
            guidance_scale=slider("guidance", float(guidance), 1, 15, step=0.5, **late),
            adapter=choice("adapter", names, names[:2][-1]),
            scale=slider("scale", 1.0, 0, 1.5, **fine),
            second=choice("mixed with", names),
            second_scale=slider("its scale", 0.5, 0, 1.5, **fine),
        )
        part = {"description": "adapter acts", "min": 0, "max": 1, "readout_format": ".0%"}
        self.part = FloatRangeSlider(value=(0, 1), **part, **fine, **LINE)
        self.lock = switch("keep the seed when the prompt changes", True)
        self.format = choice("save as", [".mp4", ".gif", ".webp"], width="210px")
        self.dice = self.button("new seed", "random", 110, self.roll)
        self.save_button = self.button("save", "download", 90, self.save)
        self.player = Player(model.defaults["num_frames"])
        self.caption, self.listing, self.saved = HTML(), HTML(), HTML()
        self._slots = [self._slot(index) for index in range(HISTORY)]
        box, seed, *others = self.settings.values()
        self.on(self._new_prompt, box)
        self.on(self._sample, seed, *others, self.part)
        controls = [box, row(seed, self.dice), self.lock, *others, self.part, self.why]
        clip = column(self.player.box, self.caption, flex="1 1 260px", max_width="340px")
        self.assemble(
            beside(column(*controls, flex="2 1 330px", max_width="600px"), clip),
            row(self.format, self.save_button, self.saved),
            self.listing,
            row(*self._slots, align="flex-start"),
        )
        self.changed()

    def _slot(self, index: int) -> VBox:
        """A place in the history strip, made once and filled again, so that nothing piles up."""
        again = self.button("back to this", "", 120, lambda: self.back(index))
        layout = {"width": "130px", "display": "none", "margin": "4px"}
        return VBox([HTML(), again], layout=layout)

    @property
    def request(self) -> Request:
        """The settings in the controls."""
        start, end = self.part.value
        values = self.values() | {"start": start, "end": end}
        for name, value in values.items():
            if isinstance(value, float):
                values[name] = round(value, 4)  # a slider's steps add up to 0.30000000000000004
        return Request(**values)

    @property
    def video(self) -> Video | None:
        """The clip that is shown."""
        return self.history[0][1] if self.history else None

    def set(self, **changes) -> None:
        """Set controls by the names of `Request`'s fields, without sampling.

        Raises:
            ValueError: An unknown name, or a value out of range.
        """
        now = self.part.value
        start, end = changes.pop("start", now[0]), changes.pop("end", now[1])
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"an adapter acts from start to end, 0 <= start < end <= 1; got {start:g}, {end:g}"
            )
        super().set(**changes)
        with self.quiet():
            self.part.value = (start, end)

    def run(self, **changes) -> Video:
        """Set controls by name, as `set` does, and sample a clip now."""
        self.set(**changes)
        self.jobs.finish(self._job)
        return self.history[0][1]

    def roll(self) -> None:
        """Draw another seed."""
        self.seed.value = random.SystemRandom().randrange(10_000)

    def back(self, index: int) -> None:
        """Show a clip of the history again, with its settings; 0 is the newest."""
        entry = self.history[index]
        self.set(**vars(entry[0]))
        self.jobs.give_up()
        del self.history[index]
        self.history.appendleft(entry)
        self._show()

    def _new_prompt(self) -> None:
        if self.lock.value:
            self._sample()
        else:
            self.roll()

    def _sample(self) -> None:
        self.changed()
        self.jobs.submit(self._job)

    def changed(self) -> None:
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
        disable("" if self.adapters else why, self.adapter)
        choose = "choose an adapter first" if first == NONE else ""
        disable(choose, self.scale, self.second, self.part)
        disable("" if mixing else "choose a second adapter", self.second_scale)
        self.why.value = note(why)

    def _job(self) -> Job:
        request = self.request
        if not request.prompt.strip():
            raise ValueError("the prompt is empty: type what the clip should show")
        weights = {self.adapters[name]: weight for name, weight in request.weights().items()}
        if self._merged[0] != weights:
            self._merged = weights, clips.merged(self.model, weights)
        sampling = Sampling(request.num_inference_steps, request.guidance_scale)
        asked = [request.prompt], [request.seed], sampling, self._merged[1]
        frames = yield from clips.denoising(self.model, *asked, request.start, request.end)
        video = Video(frames[0], self.model.defaults["fps"], request.prompt)
        self.history.appendleft((request, video))
        self._show()

    def _show(self) -> None:
        request, video = self.history[0]
        self.player.show(pictures(video, f"clip of: {request.prompt}"))
        self.caption.value = f"<b>{escape(request.prompt)}</b>{note(str(request))}"
        summary = f"<summary>as code</summary>{note('one click selects all of it')}"
        self.listing.value = f"<details>{summary}{code(self.code)}</details>"
        self.saved.value = ""
        for slot, (request, video) in zip(self._slots, self.history):
            picture, again = slot.children
            caption = f"<figcaption>{escape(str(request))}</figcaption>"
            alt = f"{request.prompt} · {request}"
            picture.value = f"<figure>{moving(video, alt)}{caption}</figure>"
            again.tooltip = f"show this clip again: {alt}"
            slot.layout.display = "flex"

    @property
    def code(self) -> str:
        """Python that samples the clip that is shown, without this panel."""
        request = self.history[0][0] if self.history else self.request
        steps, guidance = request.num_inference_steps, request.guidance_scale
        call = f"{request.prompt!r}, seeds={request.seed}, sampling=sampling"
        shipped, adapters = zoo.adapters(), []
        for name, weight in request.weights().items():
            path = self.adapters[name]
            # Of a shipped adapter, what holds on other machines too.
            known = path == shipped.get(name)
            file = f"zoo.adapters()[{name!r}]" if known else repr(str(path))
            adapters.append(f"{file}: {weight:g}")
        if adapters:
            call += f", adapter={{{', '.join(adapters)}}}"
            if (request.start, request.end) != (0, 1):
                call += f", adapter_start={request.start:g}, adapter_end={request.end:g}"
        return (
            "import vader_nb\n"
            "from vader_nb import Sampling, Video, zoo\n\n"
            f"model = vader_nb.load({self.model.name!r})\n"
            f"sampling = Sampling(num_inference_steps={steps}, guidance_scale={guidance:g})\n"
            f"frames = vader_nb.sample(model, {call})\n"
            f"Video(frames[0], fps={self.model.defaults['fps']})"
        )

    def save(self) -> Path:
        """Save the clip that is shown in the chosen format, and its settings in a text file.

        Raises:
            ValueError: There is no clip yet.
        """
        if not self.history:
            raise ValueError("there is no clip yet to save")
        request, video = self.history[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = itertools.count(1)  # a prompt never becomes a file name
        while not claimed(path := self.folder / f"clip-{next(numbers):03d}.txt"):
            pass
        settings = f"{request.prompt}\n{request}\n\n{self.code}\n"
        path.write_text(settings, encoding="utf-8")
        path = video.save(path.with_suffix(str(self.format.value)), width=256)
        self.saved.value = f"{note(f'saved as {path}')}{download_link(path)}"
        return path

    def prepare(self) -> None:
        if not self.history:
            self.run()

    def to_html(self) -> str:
        request, video = self.history[0]
        caption = f"<figcaption>{escape(str(request))}</figcaption>"
        return f"<figure style='margin:0'>{video.to_html(256)}{caption}</figure>"


def claimed(path: Path) -> bool:
    """Make this file; False if it is there. Of two notebooks that try, one makes it."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
