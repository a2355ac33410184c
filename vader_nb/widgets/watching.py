"""What panels that follow folders being written share: a look every second, charts, clips of what is chosen."""

import asyncio
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from ipywidgets import HTML, Widget

from ..drawing import image, note
from ..models import VideoModel
from ..video import Video, grid, load
from .controls import beside, column
from .jobs import running
from .panel import Panel
from .player import EMPTY, Player, pictures

POLL = 1.0  # seconds between two looks at a folder
SEEDS = 2  # clips per prompt; diversity needs two
NONE = "none yet"


class Watcher(Panel):
    """A panel that follows folders; in Python alone, `refresh` looks again."""

    _task: asyncio.Task | None = None

    def __init__(self, model: VideoModel | None, chooser: str, **settings: Widget):
        """chooser: the name of the setting that says which clips are shown."""
        super().__init__(**settings)
        self.chooser = self.settings[chooser]
        self.state, self.curves, self.caption = HTML(), HTML(), HTML()
        self.player = Player(model.defaults["num_frames"] if model else 1)
        self.clips = column(self.chooser, self.player.box, self.caption, max_width="480px")
        self.on(self.changed, *self.settings.values())

    def watch(self, above: Sequence[Widget], *left: Widget) -> None:
        """Put the panel together, and look for the first time."""
        both = beside(column(*left, self.curves, flex="2 1 300px"), self.clips)
        both.layout.flex_flow, both.layout.align_items = "row wrap-reverse", "flex-end"
        self.assemble(*above, both)  # on a phone the clips come first
        try:
            self.refresh()
        except Exception as error:  # an odd folder: the panel says so, and follows what comes
            self.failed(error)

    def refresh(self) -> None:
        """Read the folders again and show them."""
        raise NotImplementedError

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        raise NotImplementedError

    def _state(self, named: bool = False) -> str:
        """How far it is, in words; with a folder's name for its whole path where `named`."""
        raise NotImplementedError

    def _charts(self) -> dict[str, str]:
        """The drawings by their titles."""
        raise NotImplementedError

    def draw(self) -> None:
        """Show the state, the charts and, if there are any, the clips."""
        self.state.value = self._state()
        self.curves.value = flow(self._charts().values())
        self.clips.layout.display = "none" if self.chooser.value == NONE else "flex"

    def changed(self) -> None:
        self.draw()
        self.show_clips()

    def show_clips(self) -> None:
        """Show the clips that are chosen."""
        raise NotImplementedError

    def play_file(self, path: Path, what: str) -> None:
        """Show what a `TrainingMonitor` has saved."""
        prompts = json.loads(path.with_name("prompts.json").read_text(encoding="utf-8"))
        self.play(encoded(load(path), prompts, what), prompts)

    def play(self, pages: Sequence[str], prompts: Sequence) -> None:
        """Show what `encoded` made."""
        self.player.show(pages)
        texts = " · ".join(map(str, prompts))
        self.caption.value = note(f"from left to right, {SEEDS} seeds each: {texts}")

    def prepare(self) -> None:
        """Refresh, and in a notebook keep watching until it is over."""
        self.refresh()
        if running() and (self._task is None or self._task.done()):
            self._task = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while not self.over:
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

    def to_html(self) -> str:
        curves = flow(image(drawing, title) for title, drawing in self._charts().items())
        clip = self.player.pages.children[0].value.replace(EMPTY, "")
        clip = f"<div style='max-width:420px'>{clip}</div>{self.caption.value}"
        return f"{self._state(named=True)}{curves}{clip}"


def flow(drawings: Iterable[str]) -> str:
    """As many drawings beside each other as there is room for."""
    style = "display:grid;grid-template-columns:repeat(auto-fit, minmax(210px, 1fr));gap:8px"
    return f"<div style='{style}'>{''.join(drawings)}</div>"


def by_seed(frames: torch.Tensor, model: VideoModel) -> Video:
    """Clips (B, F, 3, H, W) of all prompts, seed by seed, as one: a column per prompt."""
    return Video(grid(frames, len(frames) // SEEDS), model.defaults["fps"])


def encoded(clip: Video, prompts: Sequence, what: str) -> list[str]:
    """The pages of a player for a clip that `by_seed` made."""
    return pictures(clip, f"clips of {what}: {', '.join(map(str, prompts))}")


def offer(menu: Any, options: list, first: str = "", follow: bool = False) -> None:
    """Give a menu its options, or pairs of label and option. What was chosen stays if it is still offered, and not
    with `follow`; else `first`."""
    options = options or [NONE]
    values = [option[-1] if isinstance(option, tuple) else option for option in options]
    stays = menu.value in values and menu.value != NONE and not follow
    chosen = menu.value if stays else first or values[0]
    if list(menu.options) != options:
        menu.options = options
    menu.value = chosen
