"""Sampling by hand: what prompt, seed, steps, guidance and adapters do to the clip.

Sampler(model, adapters={"hps": "runs/hps"})          in a notebook
sampler.run(prompt="…", seed=3, scale=0.7)            the same from Python: a Video
"""

import contextlib
import itertools
import random
from collections import deque
from collections.abc import Generator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import torch
from ipywidgets import HTML, BoundedIntText, FloatRangeSlider, VBox, Widget

from .. import stepwise
from ..clip_request import NONE, Request, as_image
from ..drawing import code, columns, download_link, note
from ..evaluation import BASE
from ..long_clips import segment_of_frames
from ..models import VideoModel
from ..stepwise import Job, remember
from ..video import Video, fit, joined
from . import families
from .controls import LABEL, LINE, beside, choice, column, disable, fold, row, slider, switch, text
from .panel import Panel
from .player import Player, moving, pictures, segments
from .start_image import StartImage

HISTORY = 8  # clips that are kept to go back to, fewer if they are large
MEMORY = 2e9  # bytes that these clips take at most, and those of the base model beside them
SEEDS = 2**31 - 1  # the largest
SAME = "Left, the base model; right, the same noise with an adapter that was trained with a reward."


class Sampler(Panel):
    """A clip of a prompt, sampled again whenever a control changes; with an adapter, beside the base model's.

    It has the controls that the model's family has: an image to start from, a negative prompt, segments of a long clip,
    and options such as `fps` or `motion_bucket_id`, by their names in `Sampling`.

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
        self.adapters = stepwise.validate_adapters(model, adapters)
        self.history: deque[tuple[Request, Video]] = deque(maxlen=HISTORY)
        self._bases: dict[Request, Video] = {}  # the base model's clips
        self._shown: tuple[list[str], Video]  # names and clips side by side
        self._merged = (None, None)  # weights by path, and the adapter that is their sum
        steps, guidance = model.defaults["num_inference_steps"], model.defaults["guidance_scale"]
        names, late = [NONE, *self.adapters], {"continuous_update": False}
        fine = late | {"step": 0.05}
        own = families.controls(model)
        seed = {"min": 0, "max": SEEDS, "style": LABEL, "layout": {"width": "220px"}}
        super().__init__(
            prompt=text("prompt", prompt or stepwise.examples(model, 1)[0]),
            seed=BoundedIntText(0, description="seed", **seed),
            num_inference_steps=slider("steps", steps, 1, max(50, steps), **late),
            guidance_scale=slider("guidance", float(guidance), 1, 15, step=0.25, **late),
            adapter=choice("adapter", names, names[:2][-1]),
            scale=slider("scale", 1.0, 0, 1.5, **fine),
            second=choice("mixed with", names),
            second_scale=slider("its scale", 0.5, 0, 1.5, **fine),
            **own,
        )
        part = {"description": "adapter acts", "min": 0, "max": 1, "readout_format": ".0%"}
        self.part = FloatRangeSlider(value=(0, 1), **part, **fine, **LINE)
        self.part.add_class("vader-range")
        self.beside = switch("base model beside the adapter", bool(self.adapters))
        self.format = choice("save as", [".mp4", ".gif", ".webp"], width="210px")
        self.dice = self.button("new seed", "random", 110, self.roll)
        self.save_button = self.button("save", "download", 90, self.save)
        self.first = StartImage(self, model, self._last_frame, self._sample)
        self.player = Player(model.defaults["num_frames"])
        self.words, self.saved, self.caption, self.listing = HTML(), HTML(), HTML(), HTML()
        self._slots = [self._slot(index) for index in range(HISTORY)]
        self.on(self._sample, *self.settings.values(), self.part, self.beside)
        self._arrange(own)
        self.changed()

    def _arrange(self, own: Mapping[str, Widget]) -> None:
        s = self.settings
        acting = [s["adapter"], s["scale"]] if self.adapters else []
        mixing = [s["second"], s["second_scale"], self.part, self.beside] if self.adapters else []
        more = fold("more settings", *own.values(), *mixing)
        plain = row(s["seed"], self.dice), s["num_inference_steps"], s["guidance_scale"]
        controls = column(self.first.box, *plain, *acting, self.why, more, flex="2 1 270px")
        wide = "560px" if self.adapters else "340px"
        clip = column(self.player.box, self.caption, flex="3 1 260px", max_width=wide)
        self.assemble(
            s["prompt"],
            self.words,
            beside(clip, controls),
            row(self.format, self.save_button, self.saved),
            self.listing,
            row(*self._slots, align="flex-start"),
        )

    def _slot(self, index: int) -> VBox:
        """A place in the history strip, made once and filled again, so that nothing piles up."""
        again = self.button("back to this", "", 120, lambda: self.back(index))
        layout = {"width": "130px", "display": "none", "margin": "4px"}
        return VBox([HTML(), again, HTML()], layout=layout)

    @property
    def request(self) -> Request:
        """The settings in the controls."""
        start, end = self.part.value
        values: dict[str, Any] = self.values() | {"start": start, "end": end}
        for name, value in values.items():
            if isinstance(value, float):
                values[name] = round(value, 4)  # a slider's steps add up to 0.30000000000000004
        options = []
        for name, default in self.model.sampling_options.items():
            value = values.pop(name)
            if isinstance(value, str):
                value = families.number_or_none(name, value)
            if value != default:
                options.append((name, value))
        return Request(**values, options=tuple(options), image=self.first.data)

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
        image = changes.pop("image", self.first.data)
        super().set(**changes)
        with self.quiet():
            self.part.value = (start, end)
        self.first.set(image)
        self.changed()

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
        told = entry[0].settings_of(self.model)
        self.set(**{n: told[n] for n in (*self.settings, "start", "end", "image")})
        self.jobs.give_up()
        del self.history[index]
        self.history.appendleft(entry)
        self._show()

    def _last_frame(self) -> torch.Tensor:
        if self.video is None:
            raise ValueError("there is no clip yet to continue from")
        return self.video.frames[-1]

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
        disable("" if self.adapters else why, self.adapter, self.beside)
        choose = "choose an adapter first" if first == NONE else ""
        disable(choose, self.scale, self.second, self.part)
        disable("" if mixing else "choose a second adapter", self.second_scale)
        self.why.value = note(why)
        self._tell()

    def _tell(self) -> None:
        """What the model makes of these settings, as far as it is known before."""
        strange = families.unknown(self.model, self.prompt.value)
        remark = f"<div class=vader-remark role=status>{escape(strange)}</div>" if strange else ""
        self.words.value = remark + note(families.vocabulary(self.model))
        guided = families.guides(self.model, self.request.sampling)
        acting = [self.settings[n] for n in families.GUIDED if n in self.settings]
        disable("" if guided else "guidance is off: this has no effect", *acting)

    def _made(self, request: Request) -> Generator[float, None, Video]:
        """Sample a clip."""
        weights = {self.adapters[name]: weight for name, weight in request.weights.items()}
        if self._merged[0] != weights:
            self._merged = weights, stepwise.merged(self.model, weights)
        asked = [request.given], [request.seed], request.sampling, self._merged[1]
        frames = yield from stepwise.denoising(self.model, *asked, request.start, request.end)
        return Video(frames[0], self._fps(request), request.prompt)

    def _fps(self, request: Request) -> float:
        """Of the clip: the default, scaled if the model was told a different one."""
        told = self.model.sampling_options.get("fps", 1)
        return self.model.defaults["fps"] * dict(request.options).get("fps", told) / told

    def _job(self) -> Job:
        request = self.request
        base = request.base
        if not request.prompt.strip():
            raise ValueError("the prompt is empty: type what the clip should show")
        if self._has_base(request) and base not in self._bases:
            remember(self._bases, base, (yield from self._made(base)), HISTORY)
        video = yield from self._made(request)
        most = max(1, min(HISTORY, int(MEMORY // video.frames.nbytes)))
        if base in self._bases or request == base:
            remember(self._bases, base, self._bases.get(base, video), most)
        self.history.appendleft((request, video))
        while len(self.history) > most:
            self.history.pop()
        self._show()

    def _has_base(self, request: Request) -> bool:
        """Whether the base model's clip stands beside that of a request."""
        return self.beside.value and bool(request.weights)

    def _show(self) -> None:
        request, video = self.history[0]
        base = self._bases.get(request.base) if self._has_base(request) else None
        shown, names, alt = video, [], f"clip of: {request.prompt}"
        if base is not None:
            names, alt = [BASE, request.how], f"base and {request.how}: {request.prompt}"
            shown = joined([base.frames, video.frames], video.fps, request.prompt)
        self._shown = names, shown
        sampling = request.sampling.resolve(self.model)
        places = segment_of_frames(sampling)
        lengths = [places.count(index) for index in range(sampling.extend)]
        pages = []
        for frame, image in enumerate(pictures(shown, alt)):
            pages.append((columns(names, image) if names else image) + segments(lengths, frame))
        self.player.show(pages)
        frames, _, height, width = video.frames.shape
        size = f"{frames} frames of {width} x {height}, at {video.fps:g} per second"
        told = [f"{request} · {size}", SAME if names else ""]
        told.append(families.experts_at_work(self.model, sampling))
        self.caption.value = f"<b>{escape(request.prompt)}</b>{''.join(map(note, told))}"
        summary = f"<summary>as code</summary>{note('one click selects all of it')}"
        self.listing.value = f"<details>{summary}{code(self.code)}</details>"
        self.saved.value = ""
        for slot, (request, video) in zip(self._slots, self.history):
            picture, again, caption = slot.children
            alt = f"{request.prompt} · {request}"
            picture.value = moving(Video(fit(video.frames, 128), video.fps), alt)
            caption.value = note(alt)
            again.tooltip = f"show this clip again: {alt}"
            slot.layout.display = "flex"
        for slot in self._slots[len(self.history) :]:
            slot.layout.display = "none"

    @property
    def code(self) -> str:
        """Python that samples the clip that is shown, without this panel."""
        request = self.history[0][0] if self.history else self.request
        return request.code(self.model, self.adapters, self._fps(request))

    def save(self) -> Path:
        """Save the clip that is shown in the chosen format, its settings in a text file, and the image that it starts from.

        Raises:
            ValueError: There is no clip yet.
        """
        if not self.history:
            raise ValueError("there is no clip yet to save")
        request, video = self.history[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):  # a prompt never becomes a file name
            path = self.folder / f"clip-{number:03d}.txt"
            with contextlib.suppress(FileExistsError), path.open("x"):
                break  # of two notebooks that try, one makes it
        listing = self.code.replace("clip-001-start", f"{path.stem}-start")
        settings = f"{request.prompt}\n{request}\n\n{listing}\n"
        path.write_text(settings, encoding="utf-8")
        if request.image:
            as_image(request.image).save(path.with_name(f"{path.stem}-start.png"))
        path = video.save(path.with_suffix(str(self.format.value)), width=256)
        self.saved.value = f"{note(f'saved as {path}')}{download_link(path)}"
        return path

    def prepare(self) -> None:
        if not self.history:
            self.run()

    def to_html(self) -> str:
        names, shown = self._shown
        picture = shown.to_html(256 * (len(names) or 1))
        picture = columns(names, picture) if names else picture
        return f"<figure style='margin:0'>{picture}<figcaption>{self.caption.value}</figcaption></figure>"
