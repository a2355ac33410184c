"""A clip with a frame slider that needs no JavaScript of ours.

All frames are in the page, as pages of a Tab widget. The slider is linked to it in the browser
(`jslink`), so a remote kernel causes no delay.
"""

import io
from collections.abc import Sequence

from ipywidgets import HTML, SelectionSlider, Tab, VBox, jslink

from ..video import Video
from .panel import FULL, LINE, data_url, escape

EMPTY = "<div class=vader-note>no clip yet</div>"


def moving(video: Video, alt: str) -> str:
    """The clip as an <img> that plays."""
    source = data_url(video.encoded(".gif"), "image/gif")
    return f'<img class=vader-frame src="{source}" alt="{escape(alt)}">'


def still(video: Video, frame: int, alt: str) -> str:
    """One frame as an <img>."""
    buffer = io.BytesIO()
    Video(video.frames[frame : frame + 1]).images()[0].save(buffer, "PNG")
    source = data_url(buffer.getvalue(), "image/png")
    return f'<img class=vader-frame src="{source}" alt="{escape(alt)}, frame {frame + 1}">'


def pictures(video: Video, alt: str) -> list[str]:
    """The clip that plays, then each of its frames."""
    return [moving(video, alt), *(still(video, i, alt) for i in range(len(video.frames)))]


class Player:
    """A stack of pages in `box`: page 0 plays the clip, page i shows frame i."""

    def __init__(self, num_frames: int):
        options = _labels(num_frames)
        self.scrubber = SelectionSlider(options=options, description="frame", **LINE)
        self.pages = Tab([HTML(EMPTY) for _ in range(num_frames + 1)], layout=FULL)
        self.pages.add_class("vader-frames")
        self.pages.selected_index = 0
        jslink((self.scrubber, "index"), (self.pages, "selected_index"))
        self.box = VBox([self.pages, self.scrubber], layout=FULL)

    @property
    def num_frames(self) -> int:
        return len(self.pages.children) - 1

    def show(self, playing: str, frames: Sequence[str]) -> None:
        """Show HTML pages: the playing clip, and each frame. The open page stays open."""
        if len(frames) != self.num_frames:
            self._resize(len(frames))
        for page, value in zip(self.pages.children, [playing, *frames]):
            page.value = value

    def _resize(self, num_frames: int) -> None:
        """Add pages, or remove and close some: widgets that are not closed stay in memory."""
        pages = list(self.pages.children)
        added = [HTML(EMPTY) for _ in range(num_frames + 1 - len(pages))]
        self.scrubber.index = 0
        self.pages.children = (pages + added)[: num_frames + 1]
        self.scrubber.options = _labels(num_frames)
        for page in pages[num_frames + 1 :]:
            for part in (page.style, page.layout, page):
                part.close()


def _labels(num_frames: int) -> list[str]:
    return ["▶ all", *(f"{i} of {num_frames}" for i in range(1, num_frames + 1))]
