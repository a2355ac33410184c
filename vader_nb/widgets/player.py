"""A clip with a frame scrubber, without a line of JavaScript and without the kernel.

All frames lie in the page. Moving the slider turns the pages of a book whose first page plays the whole clip; slider and
book are linked in the browser (`jslink`), so nothing stutters on a remote kernel, and nothing plays by messages.
"""

import base64
import io
from collections.abc import Sequence

from ipywidgets import HTML, SelectionSlider, Tab, VBox, jslink

from ..video import Video
from .panel import LABEL, WIDE, escape

EMPTY = "<div class=vader-note>no clip yet</div>"


def png(image) -> str:
    """A Pillow image as the source of an <img>."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def moving(video: Video, alt: str) -> str:
    """The clip as an <img> that plays."""
    data = base64.b64encode(video.encoded(".gif")).decode()
    return f'<img class=vader-frame src="data:image/gif;base64,{data}" alt="{escape(alt)}">'


def still(video: Video, frame: int, alt: str) -> str:
    """One frame as an <img>."""
    return f'<img class=vader-frame src="{png(video.images()[frame])}" alt="{escape(alt)}, frame {frame + 1}">'


class Player:
    """`box` shows one of several pages: the first plays, page i shows frame i. `scrubber.index` is the page."""

    def __init__(self, num_frames: int):
        self.scrubber = SelectionSlider(
            options=self.stops(num_frames), description="frame", style=LABEL, layout=WIDE
        )
        self.pages = Tab(layout={"width": "100%"})
        self.pages.add_class("vader-frames")
        self.pages.children = [HTML(EMPTY) for _ in range(num_frames + 1)]
        self.pages.selected_index = 0
        jslink((self.scrubber, "index"), (self.pages, "selected_index"))
        self.box = VBox([self.pages, self.scrubber], layout={"width": "100%"})

    @staticmethod
    def stops(num_frames: int) -> list[str]:
        return ["▶ all", *(f"{i} of {num_frames}" for i in range(1, num_frames + 1))]

    @property
    def num_frames(self) -> int:
        return len(self.pages.children) - 1

    def show(self, playing: str, frames: Sequence[str]) -> None:
        """Pages of HTML: the clip at play, and each frame. The page that is open stays open."""
        if len(frames) != self.num_frames:
            self.resize(len(frames))
        for page, value in zip(self.pages.children, [playing, *frames]):
            page.value = value

    def resize(self, num_frames: int) -> None:
        """For clips of another length. Widgets that are not needed any more are closed, or they would live on."""
        pages = list(self.pages.children)
        spare = pages[num_frames + 1 :]
        self.scrubber.index = 0
        self.pages.children = (pages + [HTML(EMPTY) for _ in range(num_frames + 1 - len(pages))])[
            : num_frames + 1
        ]
        self.scrubber.options = self.stops(num_frames)
        for page in spare:
            for part in (page.style, page.layout, page):
                part.close()
